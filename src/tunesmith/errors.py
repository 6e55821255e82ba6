"""The exceptions a user can meet, and the exit code each one ends a command with.

    TunesmithError                1  the base of all; carries what was expected, found and what to do
    ├── RecipeError               1  a recipe, preset or flag that cannot be composed
    ├── DataError                 1  rows, columns or files that cannot become examples
    ├── ModelError                1  a base model, tokenizer, template or adapter that does not fit
    ├── RunError                  1  a run folder that is missing, taken, damaged or another run's
    ├── MissingExtra              1  an optional package that this option needs
    ├── InputError                1  a name or value from a browser that cannot be taken
    ├── OutOfResources            3  memory, disk or device is not enough
    │   └── OutOfMemory           3  memory is not, be it for the smallest forward pass
    ├── TrainingDiverged          3  the loss is no longer a number
    └── Interrupted             130  stopped on request, state saved (143 after SIGTERM)

`assert` is for our own bugs, these are for everybody else's. Exit code 2 is the command line's own
(unknown option), 4 is an exception that is none of these: a bug of ours.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes of what Ctrl-C and SIGTERM end, by the shells' custom: 128 and the signal's number."""


class TunesmithError(Exception):
    """A problem that the user can mend: says what was expected, what was found and what to do."""

    exit_code = 1
    is_lost = False
    """Whether it tells that another process of the run is gone."""

    def __init__(self, problem: str, *, found: str | None = None, fix: str | None = None) -> None:
        self.problem, self.found, self.fix = problem, found, fix
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """The message, one fact per line, as the terminal and the web page show it."""
        lines = [self.problem]
        if self.found:
            lines.append(f"  found: {self.found}")
        if self.fix:
            lines.append(f"  do:    {self.fix}")
        return lines


class RecipeError(TunesmithError):
    """A recipe, preset or flag that cannot be composed."""


class DataError(TunesmithError):
    """Rows, columns or files that cannot become examples."""


class ModelError(TunesmithError):
    """A base model, tokenizer, template or adapter that does not fit."""


class RunError(TunesmithError):
    """A run folder that is missing, taken, damaged or another run's."""


class InputError(TunesmithError):
    """A name or value from a browser that cannot be taken."""


class MissingExtra(TunesmithError):
    """An optional package that the chosen option needs."""

    def __init__(self, package: str, needed_for: str, *, install: str | None = None) -> None:
        super().__init__(
            f"{needed_for} needs the package '{package}', which is not installed.",
            fix=f"pip install {install or package}",
        )


class OutOfResources(TunesmithError):
    """Memory, disk or device is not enough for what was asked."""

    exit_code = 3


class OutOfMemory(OutOfResources):
    """Memory is not enough, be it for the smallest forward pass that there is."""


class TrainingDiverged(TunesmithError):
    """The loss is no longer a number; nothing was saved after the last good checkpoint."""

    exit_code = 3


class Interrupted(TunesmithError):
    """The run was stopped on request; its state is saved. 130 after Ctrl-C, 143 after SIGTERM."""

    exit_code = INTERRUPTED

    def __init__(
        self,
        problem: str,
        *,
        found: str | None = None,
        fix: str | None = None,
        exit_code: int = INTERRUPTED,
    ) -> None:
        self.exit_code = exit_code
        super().__init__(problem, found=found, fix=fix)


class Terminated(KeyboardInterrupt):
    """SIGTERM, as `KeyboardInterrupt` is Ctrl-C: what is under way ends at once, and everything is put away."""


def nearest(word: str, known: Iterable[str]) -> str:
    """'Did you mean 'x'?' for the closest other word that is known, or a list of the known ones."""
    known = [name for name in known if name != word]
    close = closest(word, known)
    if close:
        return f"Did you mean '{close}'?"
    return "Known: " + ", ".join(sorted(known)) + "."


def counted(number: int, word: str) -> str:
    """A number with its word, in the plural unless there is one: `1 row`, `2,000 rows`."""
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def size(count: float) -> str:
    """Bytes for people: MB and GB of 1,000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.{1 if count < 100 * scale else 0}f} {unit}"
    return f"{count:.0f} bytes"


def does(word: str, number: int) -> str:
    """The verb of so many things: `2 rows are`, `1 row is`."""
    return {"are": "is", "have": "has"}.get(word, f"{word}s") if number == 1 else word


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is spelled most like this one, if any is."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch's class on a GPU, Python's own, or what torch's CPU allocator, Metal's, the driver
    and its libraries say."""
    said = (
        "DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory",
        "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
        "MPS backend out of memory",
    )  # fmt: skip
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(text in str(error) for text in said))
    )


def lacked_memory(error: BaseException) -> bool:
    """Whether memory ran out, be it that one of ours says so while the other is handled."""
    inner = error.__context__ if isinstance(error, OutOfResources) else error
    return inner is not None and is_out_of_memory(inner)


def is_lost_peer(error: BaseException) -> bool:
    """Whether another process of the run is gone, as gloo and NCCL say it."""
    said = (
        "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout", "gloo/transport",
        "remote process exited", "NCCL communicator was aborted", "NCCL error",
    )  # fmt: skip
    return type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError") or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in said)
    )


def is_out_of_disk(error: BaseException) -> bool:
    """Whether a disk, a quota or a limit has no room for what was written, as Python, torch or Rust say it."""
    return _is_errno(error, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_refused_writing(error: BaseException) -> bool:
    """Whether a folder or its disk may not, or cannot, be written."""
    return _is_errno(error, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def is_out_of_files(error: BaseException) -> bool:
    """Whether no further file could be opened, as many as a process or the machine may have being open."""
    return _is_errno(error, errno.EMFILE, errno.ENFILE)


def _is_errno(error: BaseException, *numbers: int) -> bool:
    # Errors of safetensors and tokenizers have no number but in their text.
    return getattr(error, "errno", None) in numbers or any(f"(os error {n})" in str(error) for n in numbers)


TRAIN_IN_LESS = (
    "Lower per_device_train_batch_size and raise gradient_accumulation_steps, add --gradient-checkpointing, "
    "lower --max-length, or use --lora."
)
"""What to do where memory is not enough for a training step."""


def as_ours(
    error: BaseException, *, in_less: str = "Close other programs, or do this on a machine with more memory."
) -> TunesmithError | None:
    """A library's error that the user can act on, as one of ours. `in_less`: what to do where memory is not enough."""
    if is_out_of_memory(error):
        return OutOfMemory(
            "The memory is not enough.",
            found=str(error).splitlines()[0][:200] if str(error) else None,
            fix=in_less,
        )
    if is_out_of_disk(error):
        return OutOfResources("The disk is full.", found=str(error), fix="Free space and resume the run.")
    if is_out_of_files(error):
        return OutOfResources(
            "Too many files are open.",
            found=str(error),
            fix="Raise the limit (`ulimit -n`) and resume the run.",
        )
    if isinstance(error, OSError) and is_refused_writing(error):
        return OutOfResources(
            f"{error.filename or 'A file'} cannot be read or written.",
            found=error.strerror,
            fix="Give this user the right to, or choose another folder; then resume the run.",
        )
    return None


@contextlib.contextmanager
def mended(**said: str) -> Iterator[None]:
    """What a library raises in here that the user can act on is raised as one of ours, `said` as in `as_ours`."""
    try:
        yield
    except Exception as error:
        if ours := as_ours(error, **said):
            raise ours from error
        raise


def as_facts(error: TunesmithError) -> dict[str, Any]:
    """What JSON can hold of an error, for another process."""
    return {
        "class": type(error).__name__,
        "problem": error.problem,
        "found": error.found,
        "fix": error.fix,
        "exit_code": error.exit_code,
    }


def of_facts(facts: Mapping[str, Any]) -> TunesmithError:
    """The error that another process has met, as far as what is done about it hangs on its kind."""
    told = {name: facts[name] for name in ("found", "fix")}
    if facts["exit_code"] in (INTERRUPTED, TERMINATED):
        return Interrupted(facts["problem"], **told, exit_code=facts["exit_code"])
    kinds = {kind.__name__: kind for kind in (OutOfMemory, TrainingDiverged)}
    error = kinds.get(facts.get("class", ""), TunesmithError)(facts["problem"], **told)
    error.exit_code = facts["exit_code"]
    return error
