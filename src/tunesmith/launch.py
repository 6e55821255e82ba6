"""Where a run runs: in this process, started by hand or by `accelerate launch -m tunesmith`, and what it loads."""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from types import FrameType
from typing import Any

from tunesmith.errors import Terminated, TunesmithError
from tunesmith.recipe import Training

WORLD_SIZES = {
    "WORLD_SIZE": "RANK",
    "PMI_SIZE": "PMI_RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
}
"""Variables by which torchrun, accelerate and the MPI launchers tell how many processes they started, and beside
each the one that numbers them."""

PRECISION = "ACCELERATE_MIXED_PRECISION"

RENDEZVOUS = "MASTER_ADDR"
"""Where several processes would meet; accelerate sets it when it was asked for more than one."""

PATIENCE = 10.0
"""Seconds that a further process waits for its launcher to end it, before it speaks for itself."""


def require_one_process() -> None:
    """Raises TunesmithError in one of several processes that were launched together.

    Each of them would write the same run folder, and every one would train on all examples.
    """
    for name in WORLD_SIZES:
        size = os.environ.get(name, "1")
        if size.isdigit() and int(size) > 1:
            raise TunesmithError(
                f"A run is written by one process, and {size} were launched together.",
                found=f"{name}={size}: every process would write the same run folder and train on all examples",
                fix="accelerate launch --num_processes 1 -m tunesmith ..., or python -m tunesmith ... For the "
                "same batch as on several devices raise --gradient-accumulation-steps.",
            )


def let_the_first_speak() -> None:
    """Let a refusal be printed by the first of several processes only.

    The others wait to be ended by their launcher, which does so when the first one fails. Returns at once in
    the first process, and after `PATIENCE` where nobody ends it.
    """
    for size, rank in WORLD_SIZES.items():
        if os.environ.get(size, "1") not in ("0", "1") and os.environ.get(rank, "0") != "0":
            time.sleep(PATIENCE)
            return


def settle(training: Training) -> list[str]:
    """Let the recipe decide where the launcher's own settings say something else; what is to be said of it.

    Accelerate's configuration would otherwise change the precision of a run whose recipe and plan name
    another. On a CPU it starts one process whatever number it is given, and says nothing.
    """
    notes = []
    asked = os.environ.get(PRECISION, "no")
    if PRECISION in os.environ and RENDEZVOUS in os.environ and "WORLD_SIZE" not in os.environ:
        notes = [
            "accelerate was asked for several processes and started one, as it does without several GPUs: this "
            "run is trained in that one, as with --num_processes 1."
        ]
    if asked == training.mixed_precision or asked == "no":
        return notes
    os.environ[PRECISION] = "no"  # the trainer sets it anew from the plan
    return [
        *notes,
        f"accelerate is set to mixed precision '{asked}', the recipe to '{training.mixed_precision}': the recipe "
        f"counts. Give --mixed-precision {asked} for the other.",
    ]


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises Terminated in here, as Ctrl-C raises KeyboardInterrupt; in the main thread only."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


HIDDEN = ("bitsandbytes", "scipy")
"""Packages that no training needs while its libraries are loaded."""


@contextmanager
def loading() -> Iterator[None]:
    """Libraries load faster in here: the garbage collector rests, some packages count as not installed, and which are
    is only looked up for those that are asked about.

    The collector would go through all that is loaded again and again, and find nothing. PEFT imports bitsandbytes for
    any adapter, and that torch's compiler, while only QLoRA uses it: what loads a quantized model stays outside.
    transformers imports scipy for the losses of models that find objects in pictures. What was asked meanwhile about
    what is installed is forgotten afterwards.
    """
    collects, hidden = gc.isenabled(), [name for name in HIDDEN if name not in sys.modules]
    gc.disable()
    installed = metadata.packages_distributions
    metadata.packages_distributions = functools.partial(Installed, installed)
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        metadata.packages_distributions = installed
        for name in hidden:
            del sys.modules[name]
        for module, questions in ASKED.items() if hidden else ():
            for name in questions if module in sys.modules else ():
                getattr(sys.modules[module], name).cache_clear()
        if "scipy" in hidden:
            _give_assignment()
        if collects:
            gc.enable()


class Installed(dict[str, list[str]]):
    """By importable name the distributions it comes from, for the names that are asked for.

    TRL and transformers want the versions of a few packages, for which Python would read the list of files of every
    package there is. Both take the distribution of the package's own name first.
    """

    def __init__(self, look: Callable[[], Mapping[str, list[str]]]) -> None:
        super().__init__()
        self._look: Callable[[], Mapping[str, list[str]]] | None = look

    def __missing__(self, name: str) -> list[str]:
        own = name.replace("_", "-")
        try:
            self[name] = [metadata.distribution(own).metadata["Name"]]
        except metadata.PackageNotFoundError:
            self._complete()
            if name not in self.keys():
                raise KeyError(name) from None
        return self[name]

    def _complete(self) -> None:
        look, self._look = self._look, None
        if look:
            self.update(look())

    def get(self, name: str, default: Any = None) -> Any:
        """As of any mapping."""
        try:
            return self[name]
        except KeyError:
            return default


ASKED = {
    "peft.import_utils": ("is_bnb_available", "is_bnb_4bit_available"),
    "transformers.utils.import_utils": ("is_bitsandbytes_available", "is_scipy_available"),
}
"""Functions that keep whether a hidden package is installed."""

ASSIGNS = "linear_sum_assignment"


def _give_assignment() -> None:
    """Give transformers' losses of found objects the function of scipy that they would have imported."""
    if importlib.util.find_spec("scipy") is None:
        return

    def assigned(*args: Any, **kwargs: Any) -> Any:
        from scipy.optimize import linear_sum_assignment

        return linear_sum_assignment(*args, **kwargs)

    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.loss.") and hasattr(module, "is_scipy_available"):
            vars(module).setdefault(ASSIGNS, assigned)


_owned: list[bool] = []


def own_process() -> None:
    """Say that this process is the command's, and runs nothing of anybody else."""
    _owned[:] = [True]


def load_libraries() -> None:
    """Import at once what every training uses; call `training.fit.quiet_libraries` before."""
    with loading():
        names = ("datasets", "peft", "transformers.trainer", "trl.trainer.sft_trainer", "hamilton.driver")
        for name in names:
            importlib.import_module(name)
        if _owned:
            # Half a million objects that stay to the end: each search for cycles, of which accelerate and checkpoints
            # ask for some, would go through all of them. In another's process they may be more than libraries.
            gc.freeze()
