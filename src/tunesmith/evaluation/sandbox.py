"""Running a model's Python program against tests, shut in: only where a user asks for it.

A program gets an interpreter of its own without site packages or environment, an empty folder, a session that is
killed at the deadline, and limits on memory, CPU time, file sizes, open files and processes. Files outside the
folder are closed by Landlock, sockets and new processes by seccomp and, where the system lets us, by a network
namespace without devices; Python's audit events keep the same rules where the kernel does not. `guards` says what
holds on this machine.

Its tests run in a second process, the judge, which calls the program's functions over a line (`across.py`) and is
shut in alike. Tests, verdict and the nonce that comes with it are never in the program's process, so that there is
nothing in it to find, patch or print that would pass for a verdict: it can only answer what it is asked. What the
tests use without defining or importing it remains the program's word. A hole of the kernel is beyond this; for such,
use a machine of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from tunesmith.errors import RecipeError

Status = Literal["passed", "failed", "syntax", "timeout", "oom", "no_code", "harness_error"]

SECONDS = 5.0
MEMORY = 512 * 2**20
MAX_OUTPUT = 100_000
"""Bytes that a program may print."""
GUARDS = ("files", "calls", "audit")
"""Landlock, seccomp, and Python's audit events."""


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    status: Status
    detail: str = ""
    """Why it did not pass, for people."""
    seconds: float = 0.0
    output: str = ""
    """What it printed."""
    held: tuple[str, ...] = ()
    """What it was shut in by."""


def run(
    code: str,
    tests: str,
    *,
    seconds: float = SECONDS,
    memory: int = MEMORY,
    wants: Sequence[str] = GUARDS,
) -> Outcome:
    """Run a program and its tests, both Python, each in a process of its own; never raises for either.

    `seconds` is wall time for both, `memory` bytes of address space. Raises RecipeError on systems without limits
    for processes (Windows).
    """
    if sys.platform == "win32":
        raise RecipeError(
            "A model's code cannot be run safely on Windows.",
            fix="Leave evaluation.run_code off, or use WSL.",
        )
    if not code.strip():
        return Outcome("no_code")
    began = time.monotonic()
    nonce = secrets.token_hex(16)
    folder = tempfile.mkdtemp(prefix="tunesmith-sandbox-")
    read_end, write_end = os.pipe()
    job = {
        "code": code, "folder": folder, "memory": memory, "seconds": seconds, "report": write_end,
        "wants": list(wants),
    }  # fmt: skip
    secret = {"tests": tests, "nonce": nonce}
    apart = _apart()
    command = [
        *([apart, "-rn", "--"] if apart else []),
        os.path.realpath(sys.executable),
        "-I",
        "-S",
        "-E",
        "-u",
    ]
    with tempfile.TemporaryFile() as given:
        for part in (json.dumps(job).encode(), json.dumps(secret).encode()):
            given.write(b"%08x%b" % (len(part), part))
        given.seek(0)
        process = subprocess.Popen(
            [*command, str(Path(__file__).with_name("sandboxed.py"))],
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(write_end,),
            start_new_session=True,
        )
    os.close(write_end)
    try:
        printed, report, stopped = _watched(process, read_end, began + seconds)
    finally:
        _end(process)
        os.close(read_end)
        shutil.rmtree(folder, ignore_errors=True)
    found = _judged(process.returncode, report, stopped, nonce, printed)
    if apart:
        found = replace(found, held=(*found.held, "network namespace"))
    return replace(found, seconds=time.monotonic() - began, output=printed)


def guards() -> tuple[str, ...]:
    """What foreign code is shut in by on this machine, found by running a line of it."""
    return _guards()


@lru_cache
def _guards() -> tuple[str, ...]:
    return run("1", "", seconds=10).held


def missing() -> str | None:
    """What the sandbox lacks on this machine, in a sentence; None where nothing is lacking."""
    held = guards()
    lacking = [
        what
        for what, names in (
            ("files outside the sandbox are closed by Python's own audit events only", {"files"}),
            ("sockets and new processes are refused by Python's own audit events only", {"calls"}),
            ("there is no network namespace", {"network namespace"}),
        )
        if not names & set(held)
    ]
    return f"The sandbox is weaker on this machine: {'; '.join(lacking)}." if lacking else None


@lru_cache
def _apart() -> str | None:
    """The program that gives another a network without devices, where it works."""
    found = shutil.which("unshare")
    if not found:
        return None
    try:
        done = subprocess.run([found, "-rn", "--", "true"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found if done.returncode == 0 else None


def _watched(process: subprocess.Popen[bytes], report: int, deadline: float) -> tuple[str, str, str | None]:
    """What was printed and reported until the report is closed, and `timeout` or `output` where it was stopped."""
    assert process.stdout
    sources = {process.stdout.fileno(): bytearray(), report: bytearray()}
    stopped = None
    with selectors.DefaultSelector() as waiting:
        for descriptor in sources:
            waiting.register(descriptor, selectors.EVENT_READ)
        done = False
        while waiting.get_map() and not stopped:
            left = deadline - time.monotonic()
            if left <= 0:
                stopped = "timeout"
                break
            ready = waiting.select(0 if done else left)
            # The judge alone holds the report; a program may go on after it, and nothing more is waited for.
            if done and not ready:
                break
            for key, _ in ready:
                piece = os.read(key.fd, 65536)
                if not piece:
                    waiting.unregister(key.fd)
                    done = done or key.fd == report
                sources[key.fd] += piece
                if len(sources[key.fd]) > MAX_OUTPUT:
                    stopped = "output"
    printed, told = (bytes(part[:MAX_OUTPUT]).decode("utf-8", "replace") for part in sources.values())
    return printed, told, stopped


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the program and all that it started, and wait for it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout:
        process.stdout.close()


def _judged(returncode: int, report: str, stopped: str | None, nonce: str, printed: str) -> Outcome:
    lines = []
    for line in report.splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    lines = [line for line in lines if isinstance(line, dict)]
    if stopped == "timeout":
        return Outcome("timeout", "the deadline passed")
    if stopped == "output":
        return Outcome("failed", f"it printed more than {MAX_OUTPUT:,} bytes")
    if not lines or not isinstance(lines[0].get("held"), list):
        return Outcome("harness_error", f"the sandbox did not start: {printed[-300:]}")
    held = tuple(str(name) for name in lines[0]["held"])
    if len(lines) == 1 and returncode == -signal.SIGKILL:
        return Outcome("oom", "it was killed, as a rule for the memory it took", held=held)
    if len(lines) != 2:
        how = (
            f"died of {signal.Signals(-returncode).name}" if returncode < 0 else "ended before its tests did"
        )
        return Outcome("failed", f"it {how}", held=held)
    status, detail = lines[1].get("status"), str(lines[1].get("detail", ""))
    known = status in ("passed", "failed", "syntax", "oom", "harness_error")
    if not known or not secrets.compare_digest(str(lines[1].get("nonce")).encode(), nonce.encode()):
        return Outcome("failed", "its report came without the nonce", held=held)
    return Outcome(status, detail, held=held)
