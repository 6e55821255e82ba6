"""Where a run runs: in this process, or in several that are started here, by torchrun or by `accelerate launch`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from tunesmith import ranks
from tunesmith.errors import (
    INTERRUPTED,
    TERMINATED,
    RecipeError,
    RunError,
    Terminated,
    TunesmithError,
    as_facts,
    counted,
    of_facts,
)
from tunesmith.recipe import Accelerate, Kubernetes, Launch, Local, Ray, Slurm, Training

PRECISION = "ACCELERATE_MIXED_PRECISION"

PATIENCE = 10.0
"""Seconds that a further process waits for its launcher to end it, before it speaks for itself."""
GRACE = 20
"""Seconds that the other processes have to end after one has failed."""
JOB = "TUNESMITH_JOB"
"""Variable with the file that says what started processes are to do."""


def require_one_process() -> None:
    """Raises TunesmithError in one of several processes that were launched together, for what one process does."""
    if (size := ranks.count()) > 1:
        raise TunesmithError(
            f"This is the work of one process, and {size} were launched together.",
            found=f"each of {size} processes would do all of it",
            fix="Start it without the launcher: python -m tunesmith ... Only `train` and `resume` use several.",
        )


def let_the_first_speak() -> None:
    """Let a refusal be printed by the first of several processes only.

    The others wait to be ended by their launcher, which does so when the first one fails. Returns at once in
    the first process, and after `PATIENCE` where nobody ends it.
    """
    if not ranks.is_first():
        time.sleep(PATIENCE)


AXES = {
    "PARALLELISM_CONFIG_CP_SIZE": "context",
    "PARALLELISM_CONFIG_SP_SIZE": "sequence",
    "PARALLELISM_CONFIG_TP_SIZE": "tensor",
}
"""Variables by which accelerate has rows or weights cut over processes in ways that are not offered here."""


def settle(training: Training) -> list[str]:
    """Let the recipe decide where the launcher's own settings say something else; what is to be said of it.

    Accelerate's configuration would otherwise change the precision of a run whose recipe and plan name
    another. On a CPU it starts one process whatever number it is given, and says nothing. Raises RecipeError where it
    asks for a row to be cut over several processes.
    """
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true" and (
        asked_for := [
            f"{name} parallelism" for axis, name in AXES.items() if os.environ.get(axis, "1") != "1"
        ]
    ):
        raise RecipeError(
            "A row is not cut over several processes here: each process computes whole rows.",
            found=f"{' and '.join(asked_for)} in the accelerate configuration",
            fix="Leave it out there. For models that do not fit: --parallel fsdp; for long rows: "
            "--gradient-checkpointing and one row per pass.",
        )
    notes = []
    asked = os.environ.get(PRECISION, "no")
    if PRECISION in os.environ and ranks.RENDEZVOUS in os.environ and not _is_numbered():
        notes = [
            "accelerate was asked for several processes and started one, as it does without several GPUs: this "
            "run is trained in that one, as with --num_processes 1. `tunesmith train ... --launch accelerate "
            "--processes N` starts several on a CPU as well."
        ]
    if asked == training.mixed_precision or asked == "no":
        return notes
    os.environ[PRECISION] = "no"  # the trainer sets it anew from the plan
    return [
        *notes,
        f"accelerate is set to mixed precision '{asked}', the recipe to '{training.mixed_precision}': the recipe "
        f"counts. Give --mixed-precision {asked} for the other.",
    ]


def _is_numbered() -> bool:
    return ranks.count() > 1 or "WORLD_SIZE" in os.environ


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises Terminated in here, as Ctrl-C raises KeyboardInterrupt; in the main thread only."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ignore_sigterm() -> None:
    """Let what is left to say be said: a launcher that ends the processes of a job ends this one for good later on."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


A_NODE = 8
"""Workers of a Ray cluster that are taken to be on one of its nodes, where nobody knows."""


class Placed(NamedTuple):
    """The processes that train a recipe."""

    number: int
    per_node: int
    """How many of them are on one machine."""
    assumed: str | None = None
    """Why that was taken to be so, where nobody says it."""


def placed(section: Launch) -> Placed:
    """The processes that were launched together, else those that a recipe would start."""
    if isinstance(section, Local) or _were_launched():
        number, here = ranks.count(), ranks.on_this_machine()
        if here is None and number > 1:
            return Placed(number, number, "the launcher does not say: all are taken to be on one machine")
        return Placed(number, min(here or 1, number))
    if isinstance(section, Accelerate):
        number = section.processes or _devices()
        return Placed(number, number)
    if isinstance(section, Ray):
        number = section.workers
        if section.nodes:
            return Placed(number, -(-number // len(section.nodes)))
        if section.address and number > 1:
            taken = f"Ray places them when they start: up to {A_NODE} are taken to be on one machine"
            return Placed(number, min(number, A_NODE), taken)
        return Placed(number, number)
    return Placed(section.nodes * section.processes_per_node, section.processes_per_node)


def processes(section: Launch) -> int:
    """How many processes train a recipe."""
    return placed(section).number


def check(training: Training, number: int) -> None:
    """Raises RecipeError where the rows of a step cannot be dealt to so many processes."""
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    if rows % number:
        fits = [n for n in range(1, number + 1) if rows % n == 0]
        raise RecipeError(
            f"A step's {counted(rows, 'row')} cannot be dealt evenly to {number} processes.",
            found=f"per_device_train_batch_size {training.per_device_train_batch_size} × "
            f"gradient_accumulation_steps {training.gradient_accumulation_steps}; the batch of a step stays what it is "
            "whatever the number of processes",
            fix=f"Raise --gradient-accumulation-steps to a multiple of {number}, or start "
            f"{' or '.join(str(n) for n in fits[-3:])}.",
        )


def _were_launched() -> bool:
    """Whether processes were launched: there may be another number of them than a recipe says, one as well."""
    return ranks.count() > 1 or JOB in os.environ


def _devices() -> int:
    """GPUs of this machine, told without loading torch; 1 where there are none."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return max(len([name for name in chosen.split(",") if name.strip()]), 1)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
        if told.returncode == 0:
            return max(len(told.stdout.strip().splitlines()), 1)
    return 1


def is_job(section: Launch) -> bool:
    """Whether a recipe is run by a cluster, to which its files are submitted, and this is not yet there."""
    is_submitted = isinstance(section, Slurm | Kubernetes) or (isinstance(section, Ray) and section.nodes)
    return bool(is_submitted) and not _were_launched()


def starts(section: Launch) -> bool:
    """Whether processes are to be started for a recipe, and this is none of them."""
    return isinstance(section, Accelerate | Ray) and not _were_launched()


def start(job: Mapping[str, Any], number: int, watch: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Have so many processes of this machine do a job, and give what the first of them came to.

    `watch` is told what happens in the first one. A signal to stop goes to it, and it stops with the others. Raises
    the error with which the first has ended, or RunError with the reason why another one did.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL + 1)  # what it says is said here
    with tempfile.TemporaryDirectory(prefix="tunesmith-job-") as place:
        folder = Path(place)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        told = folder / "told.jsonl"
        told.touch()
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=number,
            run_id=folder.name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            local_addr="localhost",
            shutdown_timeout=GRACE,
            signals_to_handle="SIGHUP" if hasattr(signal, "SIGHUP") else "SIGTERM",
            logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs"), redirects=Std.OUT),
        )
        share = max((os.cpu_count() or 1) // number, 1)
        given = {
            JOB: str(folder / "job.json"),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(share),
        }
        failed: Any = None
        with _followed(told, watch) as ended, _forwarded(ended), environment(given):
            try:
                elastic_launch(config, sys.executable)("-m", "tunesmith.launch")
            except ChildFailedError as error:
                failed = error
    if failed:
        raise _why(failed, ended, number)
    return dict(ended["result"])


@contextmanager
def environment(given: Mapping[str, str]) -> Iterator[None]:
    """Variables of the environment have these values in here."""
    before = {name: os.environ.get(name) for name in given}
    os.environ |= given
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _followed(file: Path, watch: Callable[[Mapping[str, Any]], None]) -> Iterator[dict[str, Any]]:
    """Tell `watch` what a started process writes into a file; gives what it says of itself: `pid`, `result`,
    `error`."""
    ended: dict[str, Any] = {}
    is_over = threading.Event()

    def follow() -> None:
        with file.open(encoding="utf-8") as lines:
            rest = ""
            while True:
                last = is_over.is_set()
                rest += lines.read()
                *whole, rest = rest.split("\n")
                for line in whole:
                    word = json.loads(line)
                    if word["kind"] == "job":
                        ended.update(word)
                    else:
                        watch(word)
                if last:
                    return
                is_over.wait(0.1)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield ended
    finally:
        is_over.set()
        thread.join(10)


@contextmanager
def _forwarded(ended: Mapping[str, Any]) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to the first of the started processes, which stops the others as well."""

    def forward(number: int, frame: FrameType | None) -> None:
        if "pid" not in ended:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        with contextlib.suppress(ProcessLookupError):
            os.kill(ended["pid"], number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _why(failed: Any, ended: Mapping[str, Any], number: int) -> TunesmithError:
    """Why a job has ended, from its launcher's report and the first process's own words."""
    place, failure = failed.get_first_failure()
    own = ended.get("error")
    if own and (place == 0 or not own.get("is_lost")):
        return of_facts(own)
    name = failure.signal_name()
    how = f"was ended by {name}" if name and name != "<N/A>" else f"ended with exit code {failure.exitcode}"
    why = " (which is how a system ends one when memory runs out)" if name == "SIGKILL" else ""
    run = ended.get("run")
    error = RunError(
        f"Process {place} of {number} {how}{why}, and the others were ended with it.",
        found=own["found"] if own else None,
        fix=f"tunesmith resume {run} goes on from the last checkpoint." if run else None,
    )
    error.exit_code = 3
    return error


class Started:
    """What a started process tells the one that has started it; the first process only."""

    def __init__(self, file: Path) -> None:
        self.file = file.open("a", encoding="utf-8", buffering=1) if ranks.is_first() else None

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Pass an event of the run on."""
        if self.file:
            self.file.write(json.dumps(event, ensure_ascii=True, default=str) + "\n")

    def job(self, **facts: Any) -> None:
        """Say something of the process itself."""
        self({"kind": "job", **facts})


def main() -> None:
    """What a started process does: the job of its file."""
    from tunesmith import api, libraries

    libraries.own_process()
    file = Path(os.environ[JOB])
    job = json.loads(file.read_text(encoding="utf-8"))
    tell = Started(file.with_name("told.jsonl"))
    tell.job(pid=os.getpid())
    try:
        result = api.carry_out_job(job, watch=tell, at=lambda run: tell.job(run=str(run)))
    except TunesmithError as error:
        _report(error)
        tell.job(error={**as_facts(error), "is_lost": getattr(error, "is_lost", False)})
        sys.exit(error.exit_code)
    except KeyboardInterrupt as error:
        sys.exit(TERMINATED if isinstance(error, Terminated) else INTERRUPTED)
    tell.job(result=result)


def _report(error: TunesmithError) -> None:
    """Leave a process's reason where its launcher looks for it."""
    if place := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": {"message": error.problem, "extraInfo": {"timestamp": int(time.time())}}}
        with contextlib.suppress(OSError):
            Path(place).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
