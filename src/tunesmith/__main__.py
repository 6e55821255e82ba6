"""The `tunesmith` command, and `python -m tunesmith`, the form that accelerate and torchrun launch."""

import os
import sys

TRAINS = frozenset({"train", "resume", "plan", "demo", "find-lr", "verify-resume", "wizard"})
"""Verbs that train, or foretell what training takes."""
MALLOC = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
"""A tensor's block is cut to its alignment, and glibc keeps the splinters for small objects, so that a freed block
does not serve the next of its size. Without these two caches splinters join again: a run holds 3 to 6 % less memory at
the same speed, and close to what its plan says (decision 0012). They are read when a process starts, and only then."""


def with_tuned_allocator() -> None:
    """Start this process again, under the same number, with `MALLOC`; return where the C library is another than glibc,
    or was told something else."""
    said = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc." in said or sys.platform != "linux" or not sys.executable or not sys.orig_argv[1:]:
        return
    try:
        is_glibc = "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (ValueError, OSError):
        return
    if is_glibc:
        given = {**os.environ, "GLIBC_TUNABLES": f"{said}:{MALLOC}".lstrip(":")}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], given)


def main() -> None:
    """Entry point; nothing is imported before the allocator is settled."""
    if len(sys.argv) == 1 or TRAINS.intersection(sys.argv[1:]):
        with_tuned_allocator()
    from tunesmith import cli

    cli.main()


if __name__ == "__main__":
    main()
