"""Jobs: what takes long is a process of its own, which outlives the page, the browser and the web server.

    jobs/000001.json   what it is, its process, how it ended
    jobs/000001.log    the command, and what it said

One worker process takes a workspace's jobs in the order in which they came, one at a time, since they share memory
and device. Worker and job have sessions of their own, so that what ends the server ends neither; a worker that was
killed is replaced, and the new one goes on with the job that runs. All there is to know stands in the files: whether a
job lives is whether a process with its number *and its start time* does.

`python -m tunesmith.ui.jobs FOLDER PROGRAM...` is the worker.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from tunesmith.errors import INTERRUPTED, TERMINATED, RunError
from tunesmith.training.run import open_run, write_whole

State = Literal["waiting", "running", "done", "stopped", "failed", "canceled", "lost"]

TRAINING = ("train", "resume")
"""Verbs that write a run."""
OPEN = ("waiting", "running")
"""States of jobs that have not ended."""
STOPPED = (INTERRUPTED, TERMINATED, -signal.SIGINT, -signal.SIGTERM)
"""Exit codes of what was asked to stop."""
ENDINGS = {
    0: "Done.",
    1: "It was refused: something that it was given cannot be used. Its last lines say what.",
    2: "Its command line was not understood, which is a bug of the workbench.",
    3: "Memory, disk or device was not enough, or the loss was no longer a number.",
    4: "It met a bug in tunesmith. Its last lines belong into a report.",
    -signal.SIGKILL: "It was killed from outside (signal 9), as the system does when memory runs out.",
}
TAIL = 65_536
"""Bytes at a log's end that are looked at."""
LOOKING = 0.3
"""Seconds between two looks at a job that another worker began."""
STARTING = 5.0
"""Seconds that a worker may take to begin, before another one is started."""
BORN_WITHIN = 2.0
"""Seconds by which two readings of one process's start may differ, since clocks are set."""


@dataclass(frozen=True)
class Job:
    """One command and what became of it."""

    id: str
    kind: str
    """The verb."""
    title: str
    arguments: tuple[str, ...]
    """What follows `tunesmith` on the command line."""
    run: str | None
    """Name of the run that it makes or works on."""
    queued: float
    state: State = "waiting"
    started: float | None = None
    ended: float | None = None
    pid: int | None = None
    born: float | None = None
    """When its process began, in seconds since 1970: a number alone is given again."""
    exit_code: int | None = None
    stop_asked: float | None = None

    @property
    def command(self) -> str:
        """The command that does the same in a shell."""
        return shlex.join(["tunesmith", *self.arguments])

    @property
    def is_open(self) -> bool:
        """Whether it waits or runs."""
        return self.state in OPEN

    def is_alive(self) -> bool:
        """Whether its process lives."""
        return self.pid is not None and self.born is not None and is_alive(self.pid, self.born)

    def ending(self) -> str:
        """How it ended, in plain words; empty while it has not."""
        if self.is_open:
            return ""
        if self.state == "canceled":
            return "Canceled before it began."
        if self.state == "stopped":
            return "Stopped; what was finished is saved."
        if self.exit_code is None:
            return {
                "done": "Done.",
                "failed": "It failed while nobody watched it; its last lines say why.",
            }.get(self.state, "It ended without a word: the process is gone, and nobody saw how.")
        code = self.exit_code
        if code in ENDINGS:
            return ENDINGS[code] + (f" Exit code {code}." if code > 0 else "")
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"It was killed by signal {-code} ({signal.Signals(-code).name})."
        return f"It ended with exit code {code}."


@dataclass(frozen=True)
class Queue:
    """A workspace's jobs, in the folder that holds them."""

    folder: Path
    program: tuple[str, ...] = (sys.executable, "-m", "tunesmith")
    """What is given the jobs' arguments."""

    def jobs(self) -> list[Job]:
        """All jobs, oldest first. Only reads; `wake` sees to jobs whose worker is gone."""
        found = []
        for path in sorted(self.folder.glob("[0-9]*.json")):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # deleted or damaged by hand
                at = path.stat()
                found.append(_read(path, (at.st_mtime_ns, at.st_ino, at.st_size)))
        return found

    def job(self, id: str) -> Job:
        """The job with this number. Raises RunError where there is none."""
        found = next((job for job in self.jobs() if job.id == id), None)
        if found is None:
            raise RunError(f"There is no job {id[:20]!r}.", fix="Reload the page; the queue shows the jobs.")
        return found

    def of_run(self, run: str, kinds: Sequence[str] = ()) -> Job | None:
        """The newest job of a run and of these kinds, of those that are open the one that runs or comes first."""
        jobs = [job for job in self.jobs() if job.run == run and (not kinds or job.kind in kinds)]
        return next((job for job in jobs if job.is_open), jobs[-1] if jobs else None)

    def add(self, arguments: Sequence[str], *, title: str, run: str | None = None) -> Job:
        """Queue `tunesmith ARGUMENTS`; it begins at once where nothing else runs."""
        with self._lock():
            numbers = [int(path.stem) for path in self.folder.glob("[0-9]*.json") if path.stem.isdigit()]
            job = Job(
                id=f"{max(numbers, default=0) + 1:06}",
                kind=arguments[0],
                title=title,
                arguments=tuple(arguments),
                run=run,
                queued=time.time(),
            )
            self._write(job)
            self._start_worker(patience=0.0)
        return job

    def stop(self, id: str, *, at_once: bool = False) -> Job:
        """Ask a job to finish its step, save and end, as Ctrl-C does; a waiting one is canceled.

        `at_once` asks again one that was asked before: it ends where it is, and its newest checkpoint stays.
        """
        with self._lock():
            job = self.job(id)
            if job.state == "waiting":
                job = replace(job, state="canceled", ended=time.time())
                self._write(job)
            elif (
                job.state == "running"
                and job.pid is not None
                and job.is_alive()
                and (job.stop_asked is None or at_once)
            ):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(job.pid, signal.SIGINT)
                job = replace(job, stop_asked=time.time())
                self._write(job)
        return job

    def resume(self, run: Path) -> Job:
        """Queue that an interrupted run goes on from its newest whole checkpoint.

        Raises RunError where it is finished, is being written, or waits already.
        """
        opened = open_run(run)
        state = "waiting" if (job := self.of_run(run.name)) and job.is_open else opened.state()
        if state in ("waiting", "running", "done"):
            fixes = {"done": "Start a new run.", "running": "Stop it first.", "waiting": "Let it begin."}
            raise RunError(f"The run {run.name} cannot be resumed.", found=f"it is {state}", fix=fixes[state])
        return self.add(["resume", "--", str(run)], title=f"Resume {run.name}", run=run.name)

    def said(self, job: Job, *, lines: int = 200) -> str:
        """The end of what a job has printed, progress bars and colours left out."""
        return "\n".join(tail(self.folder / f"{job.id}.log", lines))

    def wake(self) -> None:
        """See to it that a worker is there while jobs are open. Cheap; called by every page that watches."""
        if any(job.is_open for job in self.jobs()):
            with self._lock():
                self._start_worker(patience=STARTING)

    def _start_worker(self, *, patience: float) -> None:
        """Start a worker where there is none, and none was started in the last `patience` seconds."""
        log = self.folder / "worker.log"
        with contextlib.suppress(OSError):
            if time.time() - log.stat().st_mtime < patience:
                return
        if self._has_worker():
            return
        with log.open("ab") as errors:
            os.utime(log)
            worker = subprocess.Popen(
                [sys.executable, "-m", "tunesmith.ui.jobs", str(self.folder), *self.program],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                env=_environment(),
            )
        # A child that nobody waits for stays in the table of processes while the server lives.
        threading.Thread(target=worker.wait, daemon=True).start()

    def work(self) -> None:
        """Be the worker: take job after job until none is open. Returns at once where there is one."""
        from filelock import FileLock, Timeout

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` would have jobs ignore it
        worker = FileLock(self.folder / ".worker")
        with self._lock():
            try:
                worker.acquire(timeout=0)
            except Timeout:
                return
        while True:
            with self._lock():
                opened = sorted(self.jobs(), key=lambda job: job.state != "running")
                job = next((job for job in opened if job.is_open), None)
                if job is None:
                    worker.release()  # under the queue's lock, so that no job is added unseen
                    return
                process = self._begin(job) if job.state == "waiting" else None
            self._see_to(self.job(job.id), process)

    def _begin(self, job: Job) -> subprocess.Popen[bytes]:
        self._write(replace(job, state="running", started=time.time()))
        with (self.folder / f"{job.id}.log").open("ab") as log:
            log.write(f"$ {job.command}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [*self.program, *job.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder.parent,
                env=_environment(),
            )
        self._write(
            replace(job, state="running", started=time.time(), pid=process.pid, born=_born(process.pid))
        )
        return process

    def _see_to(self, job: Job, process: subprocess.Popen[bytes] | None) -> None:
        """Wait for a job's end and write it down."""
        code = None
        if process is not None:
            code = process.wait()
        else:
            while job.is_alive():
                time.sleep(LOOKING)
        with self._lock():
            job = self.job(job.id)
            state: State = "lost"
            if code is None:
                state = self._left(job)
            else:
                state = "done" if code == 0 else "stopped" if code in STOPPED else "failed"
            self._write(replace(job, state=state, ended=time.time(), exit_code=code))

    def _left(self, job: Job) -> State:
        """How a job ended that nobody waited for, as far as the run's folder tells."""
        if job.kind not in TRAINING or job.run is None:
            return "lost"
        with contextlib.suppress(RunError):
            left: dict[str, State] = {"done": "done", "interrupted": "stopped", "failed": "failed"}
            return left.get(open_run(self.folder.parent / "runs" / job.run).state(), "lost")
        return "lost"

    def _has_worker(self) -> bool:
        from filelock import FileLock, Timeout

        try:
            with FileLock(self.folder / ".worker", timeout=0):
                return False
        except Timeout:
            return True

    def _write(self, job: Job) -> None:
        write_whole(self.folder / f"{job.id}.json", json.dumps(asdict(job), indent=1, ensure_ascii=False))

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        from filelock import FileLock

        with FileLock(self.folder / ".lock"):
            yield


@functools.lru_cache(maxsize=512)
def _read(path: Path, changed: tuple[int, int, int]) -> Job:
    """A job's file, read once for each time it was written."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    return Job(**{**facts, "arguments": tuple(facts["arguments"])})


def is_alive(pid: int, born: float) -> bool:
    """Whether the process with this number that began at this time lives."""
    found = _born(pid)
    return found is not None and abs(found - born) <= BORN_WITHIN


def _born(pid: int) -> float | None:
    """When a process began, in seconds since 1970; None for one that is gone, or dead and not yet waited for."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


def _environment() -> dict[str, str]:
    """The environment of a job: output as it comes, nothing imported from the folder that it works in."""
    path = os.environ.get("PYTHONPATH", "")
    absolute = os.pathsep.join(os.path.abspath(part) for part in path.split(os.pathsep) if part)
    return {
        **os.environ,
        **({"PYTHONPATH": absolute} if absolute else {}),
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",
        "NO_COLOR": "1",
    }


_DRAWN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log, without colours, and of lines that were drawn over the last state."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    found = [line.rstrip("\r").rpartition("\r")[2] for line in _DRAWN.sub("", text).split("\n")]
    if size > TAIL:
        found = found[1:]  # begins in the middle
    return [line for line in found if line.strip()][-lines:]


if __name__ == "__main__":
    Queue(Path(sys.argv[1]), tuple(sys.argv[2:])).work()
