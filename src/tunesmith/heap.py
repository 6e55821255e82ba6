"""What a process comes to hold for blocks of memory that come and go: more than what is alive, since free room is in
pieces. The allocator is asked itself, in a process of its own whose heap is empty: the sequence is gone through with
blocks that nobody writes into, which take addresses and no memory."""

from __future__ import annotations

import ctypes
import json
import math
import os
import subprocess
import sys
from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

LARGE = 2**30
"""Bytes from which on a block is always the system's own: those of a command that trains (`tunesmith.__main__`). In
other processes glibc, which is asked here too, begins with 32 MB at the latest."""
MAPPED = 2
"""Bit in the word before a block: it is the system's own."""
WARMED = 16 * 2**20
"""Bytes of the largest block that came and went before, in measuring the machine (`devices`)."""
OBJECTS = (24, 56, 88, 104, 208)
"""Bytes of small objects that come and go with a tensor: the last two are its storage and itself, the others what
autograd keeps of it. They take the splinters that are cut off aligned blocks, so that free neighbours do not join and a
free piece seldom serves another block of its size."""
ALIGNMENT, HUGE, PAGE = 64, 2 * 2**20, 4096
"""Of a tensor's numbers, as torch asks for it; the bytes from which on it asks for huge pages (`tunesmith.__init__`),
and the alignment then."""


class Block(NamedTuple):
    """A block of a step: its bytes, when it comes and goes (infinity: after the step), whether it is a gradient."""

    size: int
    born: float
    died: float
    is_gradient: bool = False


def give_back() -> None:
    """Have the C library give what nothing uses back to the system, where it can."""
    with suppress(AttributeError, OSError, TypeError):  # another library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _library() -> Any:
    """The C library, with what it takes and gives."""
    library = ctypes.CDLL(None)
    library.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
    library.malloc.argtypes, library.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    library.free.argtypes, library.free.restype = [ctypes.c_void_p], None
    library.sbrk.argtypes, library.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
    return library


class _Held:
    """Blocks of the real allocator, and the bytes that the process would hold for them."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.blocks: dict[Hashable, tuple[int, int, list[int]]] = {}
        self.mapped = self.most = 0
        self.start: int = library.sbrk(0)

    def take(self, name: Hashable, size: int) -> None:
        if size >= LARGE:
            self.blocks[name] = (0, size, [])
            self.mapped += size
        else:
            found = ctypes.c_void_p()
            if (
                self.library.posix_memalign(ctypes.byref(found), PAGE if size >= HUGE else ALIGNMENT, size)
                or not found.value
            ):
                raise MemoryError
            word = ctypes.c_size_t.from_address(found.value - ctypes.sizeof(ctypes.c_size_t)).value
            own = (word & ~7) if word & MAPPED else 0
            self.blocks[name] = (found.value, own, [self.library.malloc(few) for few in OBJECTS])
            self.mapped += own
        self.most = max(self.most, self.library.sbrk(0) - self.start + self.mapped)

    def give(self, name: Hashable) -> None:
        address, own, objects = self.blocks.pop(name)
        self.mapped -= own
        for one in (address, *objects):
            if one:
                self.library.free(one)


def _c_library() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):
        return ""


def most_held(
    blocks: Sequence[Block], *, passes: int, states: int, moving: int = 2
) -> tuple[int, int] | None:
    """The most bytes that a process holds for a step's blocks: during its passes, and during its updates.

    `passes` are the passes whose gradients are added up, `states` the blocks that the optimizer keeps for each
    gradient, of its size; an update takes `moving` more for its length. None where the allocator is another than
    glibc's, or has not so many addresses.
    """
    if "glibc" not in _c_library() or not blocks:
        return None
    asked = json.dumps({"blocks": blocks, "passes": passes, "states": states, "moving": moving})
    done = subprocess.run(
        [sys.executable, "-I", "-S", __file__], input=asked, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return None
    stepping, updating = json.loads(done.stdout)
    return stepping, updating


def _replayed(blocks: Sequence[Block], passes: int, states: int, moving: int) -> tuple[int, int]:
    end = max((b.died for b in blocks if b.died < math.inf), default=0.0) + 1
    gradients = [n for n, block in enumerate(blocks) if block.is_gradient]
    first, later = [], []
    for n, block in enumerate(blocks):
        died = min(block.died, end)
        first.append((block.born, 1, n))
        later.append((block.born, 1, n))
        if block.is_gradient:
            later.append((block.born + 0.7, 0, n))  # added to what is there
        else:
            first.append((died, 0, n))
            later.append((died, 0, n))
    first.sort()
    later.sort()
    held = _Held(_library())
    # malloc asks the system for blocks that are larger than the largest that it gave back.
    held.take("before", WARMED)
    held.give("before")
    held.most = 0
    stepping = updating = 0
    for step in range(3):  # states are there from the second on
        for one in range(min(passes, 2)):
            for _, comes, n in later if one else first:
                name = (one, n)
                if comes:
                    held.take(name, blocks[n].size)
                else:
                    held.give(name)
        stepping, held.most = max(stepping, held.most), 0
        for n in gradients:
            if not step:
                for state in range(states):
                    held.take(("state", state, n), blocks[n].size)
            for place in range(moving):
                held.take(("moving", place), blocks[n].size)
            for place in range(moving):
                held.give(("moving", place))
        updating, held.most = max(updating, held.most), 0
        for n in gradients:
            held.give((0, n))
    return stepping, updating


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    blocks = [Block(*block) for block in asked.pop("blocks")]
    print(json.dumps(_replayed(blocks, **asked)))
