"""Memory that a step has used is kept for the next one.

glibc maps blocks of more than 32 MB anew each time and gives the heap's free end back, so that every step pays for
page faults and for zeros in all that it touches: a gradient of the vocabulary alone is 16,000 pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Names of glibc's settings (malloc.h)."""
USUAL = {TRIM_THRESHOLD: 128 * 1024, MMAP_MAX: 65536}
"""glibc's own values (mallopt(3))."""


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Have this process keep what it has freed, until the end; nothing on systems without glibc."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        for name, value in USUAL.items():
            libc.mallopt(name, value)
        libc.malloc_trim(0)
