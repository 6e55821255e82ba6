"""Jobs as processes of their own: order, stopping, and that nothing of them depends on who started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

pytest.importorskip("gradio")

from tunesmith.errors import RunError
from tunesmith.ui import choosing
from tunesmith.ui.jobs import Job, Queue, is_alive, tail

PROGRAM = """
import pathlib, sys, time
verb, *rest = sys.argv[1:]
note = pathlib.Path("notes.txt")
def write(word):
    with note.open("a") as file:
        file.write(word + "\\n")
write(f"begin {rest[0] if rest else verb}")
print("said", verb, rest, flush=True)
if verb == "sleep":
    until = time.monotonic() + 60
    while time.monotonic() < until and not pathlib.Path("enough").exists():
        time.sleep(0.02)
elif verb == "fail":
    print("it could not be", file=sys.stderr)
    sys.exit(int(rest[0]))
write(f"end {rest[0] if rest else verb}")
"""
PATIENCE = 60


@pytest.fixture
def queue(tmp_path):
    """A queue whose jobs are a few lines of Python; what is left at the end is ended."""
    folder = tmp_path / "jobs"
    folder.mkdir()
    made = Queue(folder, (sys.executable, "-S", "-c", PROGRAM))
    yield made
    (tmp_path / "enough").touch()
    wait(lambda: not any(job.is_open for job in made.jobs()))


def wait(is_so, seconds=PATIENCE):
    """Wait until something is so."""
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "never became so"
        time.sleep(0.02)


def ended(queue, job):
    wait(lambda: not queue.job(job.id).is_open)
    return queue.job(job.id)


def running(queue, job):
    wait(lambda: queue.job(job.id).pid is not None and "said" in queue.said(job))
    return queue.job(job.id)


def notes(queue):
    return (queue.folder.parent / "notes.txt").read_text().splitlines()


def test_jobs_run_one_after_another_in_the_order_in_which_they_came(queue):
    jobs = [queue.add(["note", word], title=word) for word in ("one", "two", "three")]
    assert [job.id for job in jobs] == ["000001", "000002", "000003"]
    assert [ended(queue, job).state for job in jobs] == ["done"] * 3
    assert notes(queue) == ["begin one", "end one", "begin two", "end two", "begin three", "end three"]
    assert queue.job(jobs[0].id).ending() == "Done."


def test_a_failed_job_tells_its_exit_code_and_its_last_lines(queue):
    job = ended(queue, queue.add(["fail", "3"], title="Train it"))
    assert (job.state, job.exit_code) == ("failed", 3)
    assert "Memory, disk or device" in job.ending()
    assert job.ending().endswith("Exit code 3.")
    box = choosing.job_box(queue, job)
    assert "it could not be" in box
    assert 'role="alert"' in box
    assert queue.said(job).splitlines()[-1] == "it could not be"
    assert queue.said(job).startswith("$ tunesmith fail 3\n")


def test_stopping_asks_the_process_and_cancels_what_waits(queue):
    first = queue.add(["sleep", "a"], title="a")
    second = queue.add(["note", "b"], title="b")
    running(queue, first)
    assert queue.job(second.id).state == "waiting"
    assert queue.stop(second.id).state == "canceled"
    assert queue.stop(first.id).stop_asked
    found = ended(queue, first)
    assert (found.state, found.exit_code) == ("stopped", -signal.SIGINT)
    assert notes(queue) == ["begin a"], "the canceled one never began"
    assert queue.stop(first.id) == found, "what has ended is left alone"


def test_what_is_said_of_a_job_goes_when_it_has_got_further():
    job = Job("000001", "train", "Train a", ("train",), "a", queued=0.0)
    long_ago, now = time.time() - 60, time.time()
    assert not choosing.is_told(None)
    assert not choosing.is_told(job), "it waits, however long"
    running = replace(job, state="running", started=long_ago)
    assert choosing.is_told(running)
    assert not choosing.is_told(replace(running, started=now)), "nobody has read it yet"
    assert not choosing.is_told(replace(running, stop_asked=now)), "it is still stopping"
    stopped = replace(running, state="stopped", stop_asked=long_ago, ended=now)
    assert not choosing.is_told(stopped)
    assert choosing.is_told(replace(stopped, ended=long_ago))


def test_a_killed_job_says_so_and_the_next_one_begins(queue):
    first, second = queue.add(["sleep", "a"], title="a"), queue.add(["note", "b"], title="b")
    os.kill(running(queue, first).pid, signal.SIGKILL)
    found = ended(queue, first)
    assert (found.state, found.exit_code) == ("failed", -9)
    assert "memory" in found.ending()
    assert ended(queue, second).state == "done"


SERVER = """
import sys, time
from pathlib import Path
from tunesmith.ui.jobs import Queue
queue = Queue(Path(sys.argv[1]), tuple(sys.argv[2:]))
queue.add(["sleep", "a"], title="a")
queue.add(["note", "b"], title="b")
print("added", flush=True)
time.sleep(600)
"""


def test_a_server_that_is_killed_takes_nothing_with_it_and_finds_all_again(queue):
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(queue.folder), *queue.program],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert server.stdout.readline() == b"added\n"
    job = running(queue, queue.jobs()[0])
    os.killpg(server.pid, signal.SIGKILL)  # the whole session, as a closed terminal does
    server.wait()
    [first, second] = queue.jobs()
    assert first.state == "running"
    assert first.is_alive()
    assert os.getsid(job.pid) == job.pid, "the job has a session of its own"
    (queue.folder.parent / "enough").touch()
    assert ended(queue, first).exit_code == 0, "seen by the worker, with no server about"
    assert ended(queue, second).state == "done"


def test_a_new_worker_goes_on_with_what_runs(queue):
    first, second = queue.add(["sleep", "a"], title="a"), queue.add(["note", "b"], title="b")
    job = running(queue, first)
    worker = psutil.Process(job.pid).parent()
    worker.kill()
    wait(lambda: not psutil.pid_exists(worker.pid) or worker.status() == psutil.STATUS_ZOMBIE)
    os.utime(queue.folder / "worker.log", (0, 0))  # as if it had begun long ago
    queue.wake()
    time.sleep(0.3)
    assert [j.state for j in queue.jobs()] == ["running", "waiting"], "not two at once"
    (queue.folder.parent / "enough").touch()
    assert ended(queue, first).state == "lost", "nobody saw how it ended"
    assert "without a word" in queue.job(first.id).ending()
    assert ended(queue, second).state == "done"
    assert notes(queue) == ["begin a", "end a", "begin b", "end b"]


def test_a_number_that_was_given_to_another_process_is_not_the_job(queue):
    own = psutil.Process()
    assert is_alive(own.pid, own.create_time())
    assert not is_alive(own.pid, own.create_time() - 60)
    job = Job(
        "000009",
        "train",
        "t",
        ("train",),
        None,
        0.0,
        state="running",
        pid=own.pid,
        born=own.create_time() - 60,
    )
    queue._write(job)
    assert queue.stop(job.id).stop_asked is None, "this process was not sent anything"
    queue._write(replace(job, state="done"))


def test_arguments_arrive_as_they_are(queue):
    words = ["; touch owned", "$(touch owned)", "--flag", "line\nbreak", "ünïcode"]
    job = ended(queue, queue.add(["note", *words], title="t"))
    assert repr(words) in queue.said(job)
    assert not list(queue.folder.parent.rglob("owned*"))


def test_a_log_keeps_the_last_state_of_a_line_that_was_drawn_over(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"first\n\x1b[2K 10 %\r 50 %\r\x1b[31m100 %\x1b[0m\n\nlast\r\n")
    assert tail(log, 10) == ["first", "100 %", "last"]
    assert tail(log, 1) == ["last"]
    assert tail(tmp_path / "none", 5) == []


def test_what_cannot_be_resumed_is_refused(queue, tmp_path):
    with pytest.raises(RunError, match="not a run"):
        queue.resume(tmp_path / "nothing")


@pytest.mark.thorough
def test_a_real_training_is_stopped_saves_and_goes_on(tmp_path, tiny_model_folder, question_file):
    from tunesmith.training.run import Run
    from tunesmith.ui import curves
    from tunesmith.ui.pages.train import start, status
    from tunesmith.ui.workspace import Workspace

    workspace = Workspace(tmp_path / "w")
    for name in ("model", "data"):
        (workspace.uploads / name).mkdir()
    model = Path(os.path.abspath(workspace.uploads / "model"))
    for file in tiny_model_folder.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    data = workspace.uploads / "questions.jsonl"
    data.write_bytes(question_file.read_bytes())
    layer = {
        "model": {"base": str(model)},
        "data": {"dataset": str(data), "max_length": 64},
        "training": {"max_steps": 100_000, "logging_steps": 1, "eval_steps": 100_000, "save_steps": 100_000,
                     "per_device_train_batch_size": 4, "num_epochs": 100_000},
        "evaluation": {"skip": True},
    }  # fmt: skip
    queue = Queue(workspace.jobs)
    job = start(workspace, layer, "mine")
    run = workspace.runs / "mine"
    seen = curves.events_of(run)
    wait(lambda: seen.look().step >= 3 or not queue.job(job.id).is_open)
    assert queue.job(job.id).is_open, queue.said(job)
    assert "of 100,000" in status(seen.look(), queue.job(job.id), "running")
    queue.stop(job.id)
    assert ended(queue, job).state == "stopped", queue.said(job)
    assert Run(run).state() == "interrupted"
    done = seen.look().step
    assert (run / "checkpoints" / f"checkpoint-step-{done}").is_dir()

    again = queue.resume(run)
    with pytest.raises(RunError, match="cannot be resumed"):
        queue.resume(run)
    wait(lambda: seen.look().step > done + 2 or not queue.job(again.id).is_open)
    assert queue.job(again.id).is_open, queue.said(again)
    os.kill(queue.job(again.id).pid, signal.SIGKILL)
    found = ended(queue, again)
    assert found.exit_code == -9
    assert Run(run).state() == "died"
