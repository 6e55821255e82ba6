"""Where a run runs: in this process, started by hand or by `accelerate launch -m tunesmith`, and what it loads."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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


QUANTIZES = "bitsandbytes"


@contextmanager
def loading() -> Iterator[None]:
    """Libraries load faster in here: the garbage collector rests, and bitsandbytes counts as not installed.

    The collector would go through all that is loaded again and again, and find nothing. PEFT imports bitsandbytes for
    any adapter, and that torch's compiler, while only QLoRA uses it: what loads a quantized model stays outside. What
    was asked meanwhile about what is installed is forgotten afterwards.
    """
    collects, hides = gc.isenabled(), QUANTIZES not in sys.modules
    gc.disable()
    if hides:
        sys.modules[QUANTIZES] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hides:
            del sys.modules[QUANTIZES]
            for module, questions in ASKED.items():
                for name in questions if module in sys.modules else ():
                    getattr(sys.modules[module], name).cache_clear()
        if collects:
            gc.enable()


ASKED = {
    "peft.import_utils": ("is_bnb_available", "is_bnb_4bit_available"),
    "transformers.utils.import_utils": ("is_bitsandbytes_available",),
}
"""Functions that keep whether bitsandbytes is installed."""


def load_libraries() -> None:
    """Import at once what every training uses; call `training.fit.quiet_libraries` before."""
    with loading():
        for name in ("datasets", "peft", "transformers.trainer", "trl.trainer.sft_trainer"):
            importlib.import_module(name)
