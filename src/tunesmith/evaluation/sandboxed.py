"""The inside of the sandbox: a program in one process, and its tests in another, which alone knows the verdict.

Run by `sandbox.run` as a script of an isolated interpreter (`python -I -S -E`), never imported. It forks before it
reads tests and nonce, so that they are nowhere in the program's memory; the two speak over a line (`across.py`). Both
give everything up before the first line of foreign code: files outside the folder, sockets, new processes, memory.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import ctypes
import importlib.util
import json
import os
import platform
import resource
import signal
import struct
import sys
import time
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
    """Part into judge and program; only the judge reads the tests, and only after they have parted."""
    job = json.loads(given())
    across = neighbour("across")
    to_judge, to_program = os.pipe(), os.pipe()
    program = os.fork()
    if program == 0:
        for descriptor in (job["report"], to_judge[0], to_program[1]):
            os.close(descriptor)
        run_program(across.Line(to_program[0], to_judge[1], doubts=False), job)
    else:
        for descriptor in (to_program[0], to_judge[1]):
            os.close(descriptor)
        judge(across, across.Line(to_judge[0], to_program[1], doubts=True), job, json.loads(given()), program)


def given() -> bytes:
    """The next part of standard input: eight digits of its length, then itself; nothing is read ahead."""

    def exactly(size: int) -> bytes:
        found = b""
        while len(found) < size:
            found += os.read(0, size - len(found)) or os._exit(3)  # type: ignore[func-returns-value]
        return found

    return exactly(int(exactly(8), 16))


def neighbour(name: str) -> Any:
    """A module beside this one, which an isolated interpreter does not look for."""
    place = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, place)
    assert spec
    assert spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_input() -> None:
    """Nothing to read on standard input, neither for the program nor for its tests."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def run_program(line: Any, job: dict[str, Any]) -> None:
    """The program's process: shut in, run it, then answer for its objects until the judge is done."""
    without_input()
    line.send("held", shut_in(job["folder"], job["memory"], job["seconds"], job["wants"]))
    try:
        program = compile(job.pop("code"), "<answer>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError) as error:
        line.send("syntax", f"{type(error).__name__}: {error}")
        return
    except MemoryError:
        line.send("syntax", "too deeply nested for the parser")
        return
    line.send("compiled")
    line.names = {"__name__": "__answer__", "__builtins__": builtins}
    try:
        exec(program, line.names)
    except BaseException as error:  # SystemExit too: whoever ends early has not passed
        line.send("ended", *told(error))
        return
    line.send("ran")
    line.serve()
    with contextlib.suppress(BaseException):  # the program may have put anything in its place
        sys.stdout.flush()
    os._exit(0)


def told(error: BaseException) -> tuple[str, str]:
    """Status and detail of an error, whose message may come from a class of the program itself."""
    if isinstance(error, MemoryError):
        return "oom", "MemoryError"
    try:
        return "failed", f"{type(error).__name__}: {error}"
    except BaseException:
        return "failed", "an error without a message"


def judge(across: Any, line: Any, job: dict[str, Any], secret: dict[str, str], program: int) -> None:
    """The judge's process: shut in as well, run the tests against the program's objects, and report."""
    without_input()
    report = os.fdopen(job["report"], "w", encoding="utf-8")
    ours = shut_in(job["folder"], job["memory"], job["seconds"], job["wants"])
    nonce, tests = secret["nonce"], secret["tests"]
    theirs = line.hear()[1]
    report.write(json.dumps({"held": [name for name in ours if name in theirs]}) + "\n")
    report.flush()
    try:
        status, detail = judged(across, line, tests)
    except MemoryError:
        status, detail = "oom", "MemoryError"
    if line.broken and status not in ("syntax", "oom"):
        status, detail = gone(line, program) if "ended" in line.broken else ("failed", line.broken)
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    report.write(json.dumps({"status": status, "detail": detail[:500], "nonce": nonce}) + "\n")
    report.flush()
    os._exit(0)


def judged(across: Any, line: Any, tests: str) -> tuple[str, str]:
    """Status and detail of the program behind a line, by the tests."""
    try:
        kind, *facts = line.hear()
        if kind == "syntax":  # said before the first line of foreign code
            return "syntax", str(facts[0])
        try:
            checks = compile(tests, "<tests>", "exec", dont_inherit=True)
            names = Names(line, ast.parse(tests))
        except (SyntaxError, ValueError) as error:
            return "harness_error", f"the tests do not compile: {error}"
        # From here on every word is the program's: what it says of itself may only count against it.
        kind, *facts = line.hear()
        if kind != "ran":
            status, detail = (*facts, "", "")[:2]
            return ("oom" if status == "oom" else "failed"), str(detail)
        exec(checks, names)
    except across.LineError as error:
        return ("failed" if line.broken else "harness_error"), str(error)
    except BaseException as error:
        return told(error)
    return "passed", ""


def gone(line: Any, program: int) -> tuple[str, str]:
    """How a program's process ended before its tests did."""
    for _ in range(50):
        found, state = os.waitpid(program, os.WNOHANG)
        if found and os.WIFSIGNALED(state):
            number = os.WTERMSIG(state)
            if number == signal.SIGKILL:
                return "oom", "it was killed, as a rule for the memory it took"
            return "failed", f"it died of {signal.Signals(number).name}"
        if found:
            break
        time.sleep(0.01)
    return "failed", str(line.broken)


class Names(dict[str, Any]):
    """The global names of the tests: their own, then the program's, then builtins.

    What the tests lack they take from the program, but a program is not asked what `abs` or `math.isclose` is: a
    builtin is the program's only where nothing else of it is tested, and a module of the standard library, where the
    tests read its attributes, never is.
    """

    def __init__(self, line: Any, tree: ast.Module) -> None:
        super().__init__({"__name__": "__tests__", "__builtins__": builtins})
        self.line = line
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                bound.add(node.name)
            elif isinstance(node, ast.arg):
                bound.add(node.arg)
            elif isinstance(node, ast.alias):
                bound.add((node.asname or node.name).split(".")[0])
            elif isinstance(node, ast.ExceptHandler) and node.name:
                bound.add(node.name)
        read = {node.id for node in names} - bound
        owners = {
            node.value.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        self.modules = (owners & read) & sys.stdlib_module_names
        self.shadows = not {name for name in read - self.modules if not hasattr(builtins, name)}
        """Whether a builtin's name is the program's: nothing else of it is tested."""

    def __missing__(self, name: str) -> Any:
        if name in self.modules:
            self[name] = found = importlib.import_module(name)
            return found
        if hasattr(builtins, name):
            if not self.shadows or isinstance(getattr(builtins, name), type):
                raise KeyError(name)
            try:
                return self.line.name(name)
            except NameError:
                raise KeyError(name) from None
        try:
            return self.line.name(name)
        except NameError:
            raise KeyError(name) from None


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
        libc.prctl(4, 0, 0, 0, 0)  # nobody reads its memory, whoever may trace
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
