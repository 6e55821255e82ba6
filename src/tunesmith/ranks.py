"""The processes of one run: how many there are, which one this is, and what they say to one another.

    first:   alone (rows, plan, base) -> tell -> together (steps) -> alone (tuned model, report) -> dismiss
    others:  alone (wait for a word)  -> hear -> together (steps) -> end

The first process prepares, writes and measures as if there were no other; what launchers set in the environment is
hidden from the libraries meanwhile. Waiting goes through the launcher's store and has no time limit: a process that is
gone ends the job, a slow one does not. A run of one process loads nothing here, and all of it returns at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from tunesmith.errors import OutOfResources, RunError, TunesmithError, is_lost_peer

WORLD_SIZES = {
    "WORLD_SIZE": "RANK",
    "PMI_SIZE": "PMI_RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
}
"""Variables by which torchrun, accelerate and the MPI launchers tell how many processes they started, and beside
each the one that numbers them."""

LOCAL_SIZES = (
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
)
"""Variables by which they tell how many of them are on this machine."""

HIDDEN = (*WORLD_SIZES, *WORLD_SIZES.values(), "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_FSDP")
"""Variables that make libraries look for other processes."""

RENDEZVOUS = "MASTER_ADDR"
"""Where several processes meet; accelerate sets it when it was asked for more than one."""

MEETING = 600
"""Seconds that a process looks for the others at the start."""
LOOKS = 0.05, 1.0
"""Seconds between two looks for a word, at first and after a while."""

_hidden: dict[str, str] = {}
_heard: dict[str, int] = {}
_together: list[bool] = []
_at_work: list[bool] = []


def _given(name: str) -> str | None:
    return _hidden.get(name, os.environ.get(name))


def _launched() -> tuple[int, int]:
    """How many processes were launched together, and the number of this one."""
    for name, number in WORLD_SIZES.items():
        size = _given(name) or "1"
        if size.isdigit() and int(size) > 1:
            return int(size), int(_given(number) or "0")
    return 1, 0


def count() -> int:
    """How many processes train together."""
    return _launched()[0]


def number() -> int:
    """Which of them this is, counted from 0."""
    return _launched()[1]


def on_this_machine() -> int | None:
    """How many of them are on this machine; None where the launcher does not say."""
    said = (_given(name) or "" for name in LOCAL_SIZES)
    return next((int(size) for size in said if size.isdigit() and int(size)), None)


def is_first() -> bool:
    """Whether this process writes and speaks."""
    return number() == 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Libraries see no other process in here."""
    if _hidden or count() == 1:
        yield
        return
    _hidden.update({name: os.environ.pop(name) for name in HIDDEN if name in os.environ})
    try:
        yield
    finally:
        os.environ.update(_hidden)
        _hidden.clear()


@contextlib.contextmanager
def together(device: str) -> Iterator[None]:
    """All processes of the run compute together in here: DDP's collectives on the device, words on the CPU."""
    if count() == 1:
        yield
        return
    import torch
    from torch import distributed
    from torch._C._distributed_c10d import PrefixStore

    place, size = number(), count()
    before = dict(_hidden)
    os.environ.update(before)
    _hidden.clear()
    os.environ["LOCAL_RANK"] = local = os.environ.get("LOCAL_RANK", str(place))
    if device == "cuda":
        torch.cuda.set_device(int(local) % torch.cuda.device_count())
    _forget_state()
    turn = _turn("together")
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=PrefixStore(f"together/{turn}", _store()),
            rank=place,
            world_size=size,
            timeout=timedelta(minutes=30),
        )
        _together.append(True)
        yield
        # All at once, and not after an error: one that closes takes words from one that still speaks, and one that is
        # gone may be waited for.
        distributed.barrier()
        distributed.destroy_process_group()
    finally:
        _together.clear()
        _forget_state()
        _hidden.update(
            {name: os.environ.pop(name) for name in HIDDEN if name in os.environ} if before else {}
        )


def _forget_state() -> None:
    """Have accelerate look anew at which processes there are."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@functools.cache
def _store() -> Any:
    """The store of the launcher, or one that the first process keeps where no launcher has any.

    Raises TunesmithError where nothing says how to reach it.
    """
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    host, port = _given(RENDEZVOUS), _given("MASTER_PORT")
    if not host or not port:
        raise TunesmithError(
            f"{count()} processes were launched together and have no place to meet.",
            found="MASTER_ADDR and MASTER_PORT are not set",
            fix="tunesmith train ... --launch accelerate --processes N, or torchrun --nproc-per-node N -m tunesmith",
        )
    is_kept = _given("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            host,
            int(port),
            is_master=is_first() and not is_kept,
            wait_for_workers=False,
            timeout=timedelta(seconds=MEETING),
        )
    except RuntimeError as error:
        raise TunesmithError(
            f"Process {number()} does not reach the others at {host}:{port}.",
            found=str(error).splitlines()[0][:200],
            fix="Check the name, the port and the network between the nodes.",
        ) from None
    return PrefixStore(f"tunesmith/{_given('TORCHELASTIC_RESTART_COUNT') or 0}", store)


def meet() -> None:
    """Have the first process keep the store from now on, where no launcher does, so that the others find it at once."""
    if count() > 1:
        _store()


def _turn(name: str) -> int:
    """How often this was asked before; all processes ask for the same things in the same order."""
    _heard[name] = _heard.get(name, -1) + 1
    return _heard[name]


def tell(name: str, word: Any) -> None:
    """Say something that JSON can hold to all others, from the first process."""
    if count() > 1:
        _store().set(f"{name}/{_turn(name)}", json.dumps(word))


def hear(name: str) -> Any:
    """What the first process says, however long it takes. Its end ends this process by the launcher."""
    key, pause = f"{name}/{_turn(name)}", LOOKS[0]
    while not _store().check([key]):
        time.sleep(pause)
        pause = min(pause * 1.2, LOOKS[1])
    return json.loads(_store().get(key))


def complain(reason: str) -> None:
    """Leave with the others why this process ends."""
    with contextlib.suppress(Exception):
        _store().set("complaint", f"process {number()}: {reason}")


def leave() -> None:
    """Have the others notice that this process takes no further part."""
    from torch import distributed

    with contextlib.suppress(Exception):
        if (
            distributed.is_initialized() and distributed.get_backend() == "gloo"
        ):  # NCCL's may wait for the others
            distributed.destroy_process_group()


def complaint(patience: float = 2.0) -> str | None:
    """Why another process has ended, where it could say so."""
    with contextlib.suppress(Exception):
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if _store().check(["complaint"]):
                return str(_store().get("complaint").decode())
            time.sleep(0.1)
    return None


def lost(error: BaseException) -> RunError | None:
    """That another process of the run is gone, where the error is what comes of it."""
    if count() == 1 or not is_lost_peer(error):
        return None
    found = RunError(
        f"Another of the {count()} processes is gone, so this run has ended.",
        found=complaint() or "it was ended from outside and could not say why, as where memory runs out",
        fix="`tunesmith resume` goes on from the last checkpoint.",
    )
    found.exit_code, found.is_lost = OutOfResources.exit_code, True
    return found


@contextlib.contextmanager
def first() -> Iterator[bool]:
    """Gives whether what follows is this process's work; the others wait for its end, without a time limit."""
    if not _together:
        yield True
        return
    if is_first():
        yield True
        tell("done", True)
    else:
        yield False
        hear("done")


def shared(value: Any) -> Any:
    """The first process's value, which JSON can hold, in all of them."""
    if not _together:
        return value
    if is_first():
        tell("shared", value)
        return value
    return hear("shared")


def summed(numbers: Sequence[float]) -> list[float]:
    """Sums over all processes, the same to the bit in each."""
    if not _together:
        return list(numbers)
    import torch

    values = torch.tensor(numbers, dtype=torch.float64)
    torch.distributed.all_reduce(values)
    found: list[float] = values.tolist()
    return found


def any_of(flag: bool) -> bool:
    """Whether it is so in any process."""
    return summed([float(flag)])[0] > 0 if _together else flag


def gathered(value: Any) -> list[Any]:
    """The values of all processes, in their order."""
    if not _together:
        return [value]
    import torch

    found: list[Any] = [None] * count()
    torch.distributed.all_gather_object(found, value)
    return found


def told(word: Mapping[str, Any]) -> None:
    """Have the others take part in the steps of a run; they are done with it when the steps are."""
    tell("job", dict(word))
    _at_work[:] = [True]


def dismiss() -> None:
    """End of a run: tell the others, where they had no part in it, that there is none to take."""
    if not _at_work:
        with contextlib.suppress(Exception):
            tell("job", None)
    _at_work.clear()


def job() -> dict[str, Any] | None:
    """What the first process wants of this one; None where there is nothing more to do."""
    word: dict[str, Any] | None = hear("job")
    return word
