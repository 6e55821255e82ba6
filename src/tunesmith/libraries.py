"""What a command loads before it works, and how it loads that quickly."""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from tunesmith import devices

HIDDEN = ("bitsandbytes", "scipy", "torchao")
"""Packages that no training needs while its libraries are loaded."""

PACKERS = ("bitsandbytes", "torchao")
"""Those of them that no weights need but packed ones."""


@contextmanager
def loading(hidden: Sequence[str] = HIDDEN) -> Iterator[None]:
    """Libraries load faster in here: the garbage collector rests, some packages count as not installed, and which are
    is only looked up for those that are asked about.

    The collector would go through all that is loaded again and again, and find nothing. PEFT imports bitsandbytes for
    any adapter, and that torch's compiler, while only QLoRA uses it: what loads a quantized model stays outside.
    transformers imports scipy for the losses of models that find objects in pictures, and torchao (1.8 seconds) for
    models that are packed by it. What was asked about what is installed is forgotten before, as a process that has
    worked already knows of scipy, and afterwards. `hidden` are the packages that count as not installed.
    """
    collects, hidden = gc.isenabled(), [name for name in hidden if name not in sys.modules]
    gc.disable()
    installed = metadata.packages_distributions
    metadata.packages_distributions = functools.partial(Installed, installed)
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    if hidden:
        _forget_asked()
    try:
        yield
    finally:
        metadata.packages_distributions = installed
        for name in hidden:
            del sys.modules[name]
        if hidden:
            _forget_asked()
        for name in hidden:
            _give(name)
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
    "peft.import_utils": ("is_bnb_available", "is_bnb_4bit_available", "is_torchao_available", "is_torchao_ge_v0_18_0"),
    "transformers.utils.import_utils": (
        "is_bitsandbytes_available", "is_scipy_available", "is_torchao_available",
    ),
}  # fmt: skip
"""Functions that keep whether a hidden package is installed."""


def _forget_asked() -> None:
    for module, questions in ASKED.items():
        for name in questions:
            # A package whose loading failed, or goes on elsewhere, is there without its functions.
            if clear := getattr(getattr(sys.modules.get(module), name, None), "cache_clear", None):
                clear()


MISSED = {
    "scipy": ("transformers.loss.", "is_scipy_available", "scipy.optimize", "linear_sum_assignment"),
    "torchao": (
        "transformers.quantizers.quantizer_torchao", "is_torchao_available",
        "torchao.prototype.safetensors.safetensors_support", "flatten_tensor_state_dict",
    ),
}  # fmt: skip
"""What modules of transformers would have imported of a hidden package: how they are called, what they ask before, and
where the function is that they lack."""


def _give(package: str) -> None:
    """Give modules the function of a hidden package that they would have imported; it is imported when it is called."""
    if package not in MISSED or importlib.util.find_spec(package) is None:
        return
    prefix, asked, source, name = MISSED[package]

    def late(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(source), name)(*args, **kwargs)

    for called, module in list(sys.modules.items()):
        if called.startswith(prefix) and hasattr(module, asked):
            vars(module).setdefault(name, late)


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


AT_A_TIME = 2**17
"""Bytes for which the system is asked at once: of more Linux reads no more than a device's usual read-ahead."""


def read_ahead(base: str, revision: str | None = None) -> threading.Thread | None:
    """Have the system read a model's weights from the disk while Python is at other work: libraries, rows, tokens.

    A thread asks for it, which reads and holds nothing itself; whoever loads the model finds what has come by then.
    Gives the thread; None where the files are not here, or are more than half of the free memory, since the last ones
    would push out the first.
    """
    folder = Path(base).expanduser()
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = None
        with suppress(ValueError):  # no name that the Hub could have
            found = try_to_load_from_cache(base, "config.json", revision=revision)
        if not isinstance(found, str):
            return None
        folder = Path(found).parent
    folder = folder / "final_model" if (folder / "final_model").is_dir() else folder
    sizes = {file: file.stat().st_size for file in folder.glob("*.safetensors") if file.is_file()}
    if not sizes or not hasattr(os, "posix_fadvise") or 2 * sum(sizes.values()) > devices.available():
        return None

    def ask() -> None:
        for file, size in sizes.items():
            with suppress(OSError), file.open("rb") as weights:
                for start in range(0, size, AT_A_TIME):
                    os.posix_fadvise(weights.fileno(), start, AT_A_TIME, os.POSIX_FADV_WILLNEED)

    thread = threading.Thread(target=ask, name="read ahead", daemon=True)
    thread.start()
    return thread
