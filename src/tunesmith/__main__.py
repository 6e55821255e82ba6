"""The `tunesmith` command, and `python -m tunesmith`, the form that accelerate and torchrun launch."""

import os
import sys

TRAINS = frozenset({"train", "resume", "plan", "demo", "find-lr", "verify-resume", "wizard", "sweep"})
"""Verbs that train, or foretell what training takes."""
MALLOC = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "tcache_count": 0,
        "mxfast": 0,
        "mmap_threshold": 2**30,
        "trim_threshold": 2**40,
    }.items()
)
"""How glibc shares out memory among the tensors of a training (decision 0012); it reads this when a process starts, and
only then. A tensor's block is cut to its alignment, and glibc keeps the splinters for small objects, so that a freed
block does not serve the next of its size: without these two caches splinters join again, and a run holds 3 to 6 % less
memory, close to what its plan says. What is freed after a step stays with the process up to blocks of 1 GiB: the next
step needs it again, and fresh pages cost up to a tenth of its time."""


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
