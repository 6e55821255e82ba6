"""Devices by name: how much they hold, how fast they read and compute. What a plan for a machine that is elsewhere
rests on.

Figures are the makers' data sheets (NVIDIA, AMD, Apple), dense, without sparsity; memory is what the driver reports.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from tunesmith import heap
from tunesmith.errors import RecipeError

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class DeviceFacts:
    """What a plan has to know of a device."""

    name: str
    kind: Literal["cpu", "cuda", "mps"]
    memory: int
    """Bytes that a process can have of it."""
    bandwidth: float
    """Bytes a second."""
    peaks: Mapping[str, float]
    """FLOPs a second in matrix products, by type of number. A type that is missing has no units of its own."""
    product_share: float = 0.6
    """Share of the peak that large matrix products reach in a training step."""
    bandwidth_share: float = 0.75
    launch: float = 5e-6
    """Seconds that an operation costs at least."""
    reserved: int = 0
    """Bytes that the driver and the library take before anything is held."""
    assumed: str = ""
    """What stands for the speed of a device that nothing is known of."""

    def peak(self, dtype: str) -> float:
        """FLOPs a second in products of this type, in float32 where it has no units for it."""
        return self.peaks.get(dtype, self.peaks["float32"])


def _nvidia(
    name: str, mib: int, gbs: float, single: float, half: float, *, bfloat16: bool = True
) -> DeviceFacts:
    """A row of the table: MiB, GB/s, TFLOP/s in float32 and in 16 bits."""
    peaks = {"float32": single * 1e12, "float16": half * 1e12}
    if bfloat16:
        peaks["bfloat16"] = half * 1e12
    return DeviceFacts(name, "cuda", mib * MIB, gbs * 1e9, peaks, reserved=600 * MIB)


def _apple(name: str, gib: int, gbs: float, single: float) -> DeviceFacts:
    # Metal lets one process have about three quarters of the memory that is shared with the system.
    peaks = {"float32": single * 1e12, "float16": single * 1e12, "bfloat16": single * 1e12}
    return DeviceFacts(name, "mps", int(0.75 * gib * GIB), gbs * 1e9, peaks, launch=2e-5)


DEVICES: dict[str, DeviceFacts] = {
    row.name: row
    for row in (
        _nvidia("b200", 183_359, 8000, 75, 2250),
        _nvidia("h200", 143_771, 4800, 67, 989),
        _nvidia("h100-80gb", 81_559, 3350, 67, 989),
        _nvidia("h100-pcie-80gb", 81_559, 2000, 51, 756),
        _nvidia("a100-80gb", 81_920, 2039, 19.5, 312),
        _nvidia("a100-40gb", 40_960, 1555, 19.5, 312),
        _nvidia("l40s", 46_068, 864, 91.6, 362),
        _nvidia("l4", 23_034, 300, 30.3, 121),
        _nvidia("a10", 23_028, 600, 31.2, 125),
        _nvidia("a10g", 23_028, 600, 31.2, 70),
        _nvidia("t4", 15_360, 320, 8.1, 65, bfloat16=False),
        _nvidia("v100-32gb", 32_768, 900, 15.7, 125, bfloat16=False),
        _nvidia("v100-16gb", 16_384, 900, 15.7, 125, bfloat16=False),
        _nvidia("rtx-3090", 24_576, 936, 35.6, 71),
        _nvidia("rtx-4090", 24_564, 1008, 82.6, 165),
        _nvidia("rtx-5090", 32_607, 1792, 104.8, 209.5),
        _nvidia("mi300x", 196_592, 5300, 163.4, 1307),  # ROCm calls itself cuda as well
        _apple("m1-16gb", 16, 68, 2.6),
        _apple("m2-max-64gb", 64, 400, 13.6),
        _apple("m3-max-64gb", 64, 400, 14.2),
        _apple("m4-max-128gb", 128, 546, 18.4),
    )
}

ALIASES = {
    "h100": "h100-80gb", "h100-sxm": "h100-80gb", "a100": "a100-80gb", "a100-80": "a100-80gb", "a100-40": "a100-40gb",
    "3090": "rtx-3090", "4090": "rtx-4090", "5090": "rtx-5090", "rtx3090": "rtx-3090", "rtx4090": "rtx-4090",
    "rtx5090": "rtx-5090", "v100": "v100-16gb", "h200-141gb": "h200",
}  # fmt: skip


def named(name: str) -> DeviceFacts:
    """The facts of a device by its name; `cpu` is this machine's. Raises RecipeError with the known ones."""
    plain = name.strip().lower().replace("_", "-").replace(" ", "-").removeprefix("nvidia-")
    if plain == "cpu":
        return this_cpu()
    plain = ALIASES.get(plain, plain)
    if plain in DEVICES:
        return DEVICES[plain]
    known = ["cpu", *DEVICES]
    close = difflib.get_close_matches(plain, [*known, *ALIASES], n=1, cutoff=0.4)
    raise RecipeError(
        f"There is no device '{name}' among those that are known.",
        found=f"known: {', '.join(known)}",
        fix=f"Did you mean '{ALIASES.get(close[0], close[0])}'?" if close else "Name one of these.",
    )


def here(kind: str) -> DeviceFacts:
    """The facts of this machine's device of a kind."""
    if kind == "cpu":
        return this_cpu()
    if kind == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        # What others hold is not to be had; what this process holds is.
        room = free + torch.cuda.memory_reserved()
        title = torch.cuda.get_device_name()
        found = titled(title, total)
        if found:
            return replace(found, memory=room)
        peaks = {"float32": 8e12, "float16": 30e12, "bfloat16": 30e12}
        assumed = "30 TFLOP/s in 16 bits, 8 in float32 and 300 GB/s are taken"
        return DeviceFacts(title.lower(), "cuda", room, 300e9, peaks, assumed=assumed)
    return replace(
        DEVICES["m1-16gb"], name="mps", memory=int(0.75 * _physical()), assumed="that of an M1 is taken"
    )


def titled(title: str, memory: int) -> DeviceFacts | None:
    """The device that a driver names so, with so many bytes: of names that are part of the title the longest, of
    several sizes of one device the nearest. None where none is."""
    words = [word for word in re.split(r"[^a-z0-9]+", title.lower()) if word]

    def named_words(facts: DeviceFacts) -> list[str]:
        return [word for word in facts.name.split("-") if not re.fullmatch(r"\d+gb", word)]

    likely = [
        facts for facts in DEVICES.values() if facts.kind == "cuda" and set(named_words(facts)) <= set(words)
    ]
    return min(likely, key=lambda facts: (-len(named_words(facts)), abs(facts.memory - memory)), default=None)


def _physical() -> int:
    """Bytes of memory that the machine has."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 8 * GIB


CONTAINERS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", ""),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
"""Where Linux tells of a container: folder, files with the limit and with what is held, prefix of the numbers in
`memory.stat`; of the second and of the first version of its groups."""


def available() -> int:
    """Bytes that this process can come to hold: what is free and what it holds, on the machine and within its
    container's limit, of which other processes of the container hold a part."""
    own, rooms = resident(), [_physical()]
    with contextlib.suppress(OSError, KeyError, ValueError):
        rooms.append(_numbers(Path("/proc/meminfo"))["MemAvailable:"] * 1024 + own)
    for folder, limit, held_by_all, prefix in CONTAINERS:
        with contextlib.suppress(OSError, KeyError, ValueError):
            most = int(Path(folder, limit).read_text())  # "max" where there is none
            rooms.append(most)
            counts = _numbers(Path(folder, "memory.stat"))
            # Pages of files are given up where memory is short.
            files = sum(counts[f"{prefix}{kind}_file"] for kind in ("active", "inactive"))
            rooms.append(most - int(Path(folder, held_by_all).read_text()) + files + own)
    return max(min(rooms), own)


def _numbers(file: Path) -> dict[str, int]:
    """A system's file of a name and a number a line."""
    lines = (line.split() for line in file.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}


def held() -> int:
    """Bytes that this process holds when what its C library has free is given back: a step takes its blocks of that."""
    heap.give_back()
    return resident()


def resident() -> int:
    """Bytes that this process holds now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def this_cpu() -> DeviceFacts:
    """This machine's processors, measured once in a tenth of a second."""
    product, copied = _rates()
    return DeviceFacts(
        "cpu",
        "cpu",
        available(),
        copied,
        {"float32": product},
        product_share=0.8,
        bandwidth_share=1.0,
        launch=6e-6,
    )


@cache
def _rates() -> tuple[float, float]:
    """FLOPs a second in a matrix product, and bytes a second that are read and written in a copy."""
    import torch

    size = 768
    one, other = torch.ones(size, size), torch.ones(size, size)
    product = torch.empty(size, size)
    best = _least(lambda: torch.mm(one, other, out=product))
    block = torch.ones(4 * MIB)
    # Into memory that is there: a fresh block would cost its page faults, which a training step seldom meets.
    target = torch.zeros(4 * MIB)
    copied = _least(lambda: target.copy_(block))
    return 2 * size**3 / best, 2 * block.nbytes / copied


TRIED = 0.05
"""Seconds for which a piece of work is repeated: longer than the turn that another process may have."""


def _least(work: Callable[[], object]) -> float:
    """Seconds of the quickest of several tries."""
    found: list[float] = []
    begun = time.perf_counter()
    while len(found) < 4 or time.perf_counter() - begun < TRIED:
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)
