"""The inside of the sandbox: reads a program and its tests from standard input, shuts itself in, runs both.

Run by `sandbox.run` as a script of an isolated interpreter (`python -I -S -E`), never imported. Everything is
given up before the first line of foreign code: files outside the folder, sockets, new processes, memory.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import os
import platform
import resource
import struct
import sys
from collections.abc import Callable
from typing import Any

# Read, write and create, but never execute (linux/landlock.h).
READ = 1 << 2 | 1 << 3
WRITE = READ | 1 << 1 | sum(1 << bit for bit in (4, 5, 7, 8, 14))
HANDLED = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
"""All rights that a version of Landlock knows; from version 5 on also device control."""
NOT_PERMITTED, NOT_THERE = 0x00050000 | 1, 0x00050000 | 38
ALLOWED, KILLED = 0x7FFF0000, 0x80000000
ARCHITECTURES: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    # audit code, clone, clone3; then fork, vfork, execve, execveat, socket, socketpair, ptrace, kill, tkill, tgkill,
    # process_vm_readv and writev, mount, umount2, unshare, setns, pidfd_open and send_signal, setrlimit, prlimit64,
    # bpf, keyctl, io_uring_setup and enter, setsid, setpgid, shmget, msgget, semget, mq_open, perf_event_open
    "x86_64": (
        0xC000003E, 56, 435,
        (57, 58, 59, 322, 41, 53, 101, 62, 200, 234, 310, 311, 165, 166, 272, 308, 434, 424, 160, 302, 321, 250, 425,
         426, 112, 109, 29, 68, 64, 240, 298),
    ),
    "aarch64": (
        0xC00000B7, 220, 435,
        (221, 281, 198, 199, 117, 129, 130, 131, 270, 271, 40, 39, 97, 268, 434, 424, 164, 261, 280, 219, 425, 426,
         157, 154, 194, 186, 190, 180, 241),
    ),
}  # fmt: skip
NEW_THREAD = 0x00010000
STOPPED_EVENTS = (
    "socket.", "subprocess.", "os.system", "os.fork", "os.exec", "os.posix_spawn",
    "os.spawn", "os.kill", "os.startfile", "ctypes.", "pty.", "shutil.chown",
    "signal.pthread_kill", "syslog.", "webbrowser.", "winreg.", "sys.setprofile", "sys.settrace",
    "resource.setrlimit", "resource.prlimit", "sys._current_frames", "gc.get_objects", "gc.get_referrers",
)  # fmt: skip
PATH_EVENTS = (
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.utime", "os.chdir", "os.chflags", "os.setxattr", "os.removexattr",
)  # fmt: skip


def main() -> None:
    """Shut in, then run; the outcome goes to the descriptor that the first line names."""
    job = json.loads(sys.stdin.buffer.read())
    report = os.fdopen(job["report"], "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    held = shut_in(job["folder"], job["memory"], job["seconds"], job["wants"])
    report.write(json.dumps({"held": held}) + "\n")
    report.flush()
    finish = finisher(report, job.pop("nonce"))
    finish(*outcome(job["code"], job["tests"]))


def finisher(report: Any, nonce: str) -> Callable[[str, str], None]:
    """What sends the outcome, with the nonce that shows that the last test was reached."""

    def finish(status: str, detail: str) -> None:
        try:
            sys.stdout.flush()
        except BaseException as error:  # the program may have put anything in its place
            del error
        report.write(json.dumps({"status": status, "detail": detail[:500], "nonce": nonce}) + "\n")
        report.flush()
        os._exit(0)

    return finish


def outcome(code: str, tests: str) -> tuple[str, str]:
    """Status and detail of a program and its tests."""
    try:
        program = compile(code, "<answer>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError) as error:
        return "syntax", f"{type(error).__name__}: {error}"
    except MemoryError:
        return "syntax", "too deeply nested for the parser"
    try:
        checks = compile(tests, "<tests>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        return "harness_error", f"the tests do not compile: {error}"
    names: dict[str, Any] = {"__name__": "__answer__", "__builtins__": builtins}
    try:
        exec(program, names)
        exec(checks, names)
    except MemoryError:
        return "oom", "MemoryError"
    except BaseException as error:  # SystemExit too: whoever ends early has not passed
        # The message may come from a class of the program itself.
        try:
            return "failed", f"{type(error).__name__}: {error}"
        except BaseException:
            return "failed", "an error without a message"
    return "passed", ""


def shut_in(folder: str, memory: int, seconds: float, wants: list[str]) -> list[str]:
    """Give up what foreign code must not have; the names of what holds."""
    held = ["limits"]
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_FSIZE, 10_000_000),
        (resource.RLIMIT_NOFILE, 64),
        (getattr(resource, "RLIMIT_NPROC", None), 256),
        (resource.RLIMIT_CORE, 0),
    ):
        if limit is not None:
            most = resource.getrlimit(limit)[1]
            value = value if most == resource.RLIM_INFINITY else min(value, most)
            try:
                resource.setrlimit(limit, (value, value))
            except (ValueError, OSError):  # macOS refuses a limit on memory
                held.append(f"no limit {limit}")
    readable = [os.path.realpath(path) for path in sys.path if os.path.exists(path)]
    libc: Any = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux" and libc.prctl(38, 1, 0, 0, 0) == 0:  # no new privileges
        if "files" in wants and landlock(libc, folder, readable):
            held.append("files")
        if "calls" in wants and seccomp(libc):
            held.append("calls")
    if "audit" in wants:
        sys.addaudithook(watcher(os.path.realpath(folder), tuple(readable)))
        held.append("audit")
    return held


def landlock(libc: Any, folder: str, readable: list[str]) -> bool:
    """Files: reading Python's own library, writing the folder, nothing else (kernel 5.13 and newer)."""
    version = libc.syscall(444, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    rights = HANDLED.get(version, (1 << 16) - 1)
    rules = struct.pack("QQ", rights, 3) if version >= 4 else struct.pack("Q", rights)
    place = libc.syscall(444, rules, ctypes.c_size_t(len(rules)), 0)
    if place < 0:
        return False
    shared = ("/lib", "/lib64", "/usr/lib", "/usr/share/zoneinfo", os.path.join(sys.base_prefix, "lib"))
    libraries = [path for path in shared if os.path.exists(path)]
    allowed = [(path, READ) for path in (*readable, *libraries)] + [(folder, WRITE)]
    for path, access in (*allowed, (os.devnull, 1 << 1 | 1 << 2)):
        opened = os.open(path, getattr(os, "O_PATH", 0))
        libc.syscall(445, place, 1, struct.pack("=Qi", access & rights, opened), 0)
        os.close(opened)
    done = libc.syscall(446, place, 0) == 0
    os.close(place)
    return bool(done)


def seccomp(libc: Any) -> bool:
    """System calls: no sockets, no other process, no program; threads are allowed."""
    known = ARCHITECTURES.get(platform.machine())
    if known is None or sys.byteorder != "little":
        return False
    audit, clone, clone3, refused = known
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    program = [
        (load, 0, 0, 4), (equal, 1, 0, audit), (end, 0, 0, KILLED),
        (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (end, 0, 0, NOT_PERMITTED),
        (equal, 0, 1, clone3), (end, 0, 0, NOT_THERE),
    ]  # fmt: skip
    for number in refused:
        program += [(equal, 0, 1, number), (end, 0, 0, NOT_PERMITTED)]
    program += [
        (equal, 1, 0, clone), (end, 0, 0, ALLOWED),
        (load, 0, 0, 16), (any_bit, 0, 1, NEW_THREAD), (end, 0, 0, ALLOWED), (end, 0, 0, NOT_PERMITTED),
    ]  # fmt: skip
    lines = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(lines)))
    return bool(libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(header)), 0, 0) == 0)


def watcher(folder: str, readable: tuple[str, ...]) -> Callable[[str, tuple[Any, ...]], None]:
    """Python's own events: the same rules again, for systems whose kernel keeps none of them."""
    real, separator = os.path.realpath, os.sep
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def within(path: Any, places: tuple[str, ...]) -> bool:
        if isinstance(path, int):
            return True
        found = real(os.fsdecode(path))
        return any(found == place or found.startswith(place + separator) for place in places)

    def watch(event: str, facts: tuple[Any, ...]) -> None:
        if event.startswith(STOPPED_EVENTS):
            raise PermissionError(f"{event} is not allowed in the sandbox")
        if event == "open":
            path, mode, flags = facts
            writes = bool(isinstance(flags, int) and flags & writing) or bool(
                mode and set(str(mode)) & set("wxa+")
            )
            if not within(path, (folder,) if writes else (folder, *readable, os.devnull)):
                raise PermissionError(f"{path} is outside the sandbox")
        elif event in ("os.listdir", "os.scandir"):
            if facts[0] is not None and not within(facts[0], (folder, *readable)):
                raise PermissionError(f"{facts[0]} is outside the sandbox")
        elif event in PATH_EVENTS:
            for path in facts:
                if isinstance(path, str | bytes) and not within(path, (folder,)):
                    raise PermissionError(f"{path!r} is outside the sandbox")

    return watch


if __name__ == "__main__":
    main()
