"""What may befall a run: signals, a full or read-only disk, clocks, dead trackers and hubs, two at once, kill -9."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_checkpoints import CALLS, traced

from tunesmith import api, dataflow
from tunesmith.compose import compose, overlaid
from tunesmith.data import rendering
from tunesmith.errors import Interrupted, OutOfMemory, OutOfResources, RunError, as_ours
from tunesmith.recipe import Recipe
from tunesmith.training import checkpoints, verifying
from tunesmith.training.run import Run, create, is_run, open_run


@pytest.fixture
def quick(tiny_model_folder, question_file, tmp_path):
    def recipe(**changes: Any):
        layer = {
            "output_dir": str(tmp_path / "runs"),
            "model": {"base": str(tiny_model_folder)},
            "data": {"dataset": str(question_file), "validation": 0.3, "max_length": 96},
            "training": {
                "max_steps": 4, "per_device_train_batch_size": 4, "warmup_steps": 0, "learning_rate": 1e-2,
                "eval_steps": 2, "save_steps": 100, "logging_steps": 1, "per_device_eval_batch_size": 2,
            },
            "evaluation": {"skip": True},
        }  # fmt: skip
        return compose(overlaid(layer, changes)).recipe

    return recipe


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return {}


def whole(quick, straight, tmp_path_factory_folder: Path) -> Run:
    """The run that nothing befell, made once."""
    if "run" not in straight:
        straight["run"] = Run(api.train(quick(name="whole", output_dir=str(tmp_path_factory_folder))).run)
    return straight["run"]


@pytest.fixture
def undisturbed(quick, straight, tmp_path_factory) -> Run:
    return whole(quick, straight, tmp_path_factory.mktemp("whole"))


def at(step: int, act, kind: str = "progress"):
    """A watcher that acts when a step of training is done."""

    def watch(event):
        if event["kind"] == kind and event.get("stage") == "training" and event["done"] == step:
            act()

    return watch


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.thorough),
        (signal.SIGTERM, 143),
    ],  # test_methods has Ctrl-C
)
def test_a_signal_stops_after_the_step_with_its_own_exit_code(quick, undisturbed, number, code):
    recipe = quick(name="stopped")
    with pytest.raises(Interrupted, match="step 1 of 4") as stopped:
        api.train(recipe, watch=at(1, lambda: os.kill(os.getpid(), number)))
    assert stopped.value.exit_code == code
    run = open_run(Path(recipe.output_dir) / "stopped")
    assert [p.name for p in run.checkpoints.iterdir()] == ["checkpoint-step-1"]
    api.resume(run.path)
    assert verifying.differences(undisturbed, run) == []


@pytest.mark.thorough
def test_sigterm_before_training_leaves_a_run_that_goes_on(quick, undisturbed):
    def watch(event):
        if event["kind"] == "state" and event.get("state") == "prepared":
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = quick(name="early")
    with pytest.raises(Interrupted, match="nothing was saved yet") as stopped:
        api.train(recipe, watch=watch)
    assert stopped.value.exit_code == 143
    run = open_run(Path(recipe.output_dir) / "early")
    assert run.state() == "interrupted"
    api.resume(run.path)
    assert verifying.differences(undisturbed, run) == []


def test_a_second_signal_stops_at_once(quick):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    recipe = quick(name="twice", training={"save_steps": 1})
    with pytest.raises(Interrupted, match="done after checkpoint-step-1 is not saved") as stopped:
        api.train(recipe, watch=at(2, twice))
    assert stopped.value.exit_code == 130
    run = open_run(Path(recipe.output_dir) / "twice")
    assert [p.name for p in run.checkpoints.iterdir()] == ["checkpoint-step-1"], (
        "step 2 was not saved any more"
    )


@pytest.mark.parametrize("step", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_a_signal_during_a_validation_breaks_it_off_and_it_is_made_up_for(
    quick, undisturbed, monkeypatch, step
):
    fit, batches = dataflow.fit, []

    def watched(trainer, *args, **kwargs):
        def before(module, given, named):
            if not module.training and trainer.state.global_step == step:
                batches.append(1)
                if len(batches) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)

        trainer.model.register_forward_pre_hook(before, with_kwargs=True)
        return fit(trainer, *args, **kwargs)

    monkeypatch.setattr(dataflow, "fit", watched)
    recipe = quick(name="stopped")
    with pytest.raises(Interrupted, match=f"step {step} of 4"):
        api.train(recipe, watch=lambda event: None)
    assert len(batches) == 2, "and no further batch"
    monkeypatch.setattr(dataflow, "fit", fit)
    run = open_run(Path(recipe.output_dir) / "stopped")
    assert [p.name for p in run.checkpoints.iterdir()] == [f"checkpoint-step-{step}"]
    api.resume(run.path)
    assert verifying.differences(undisturbed, run) == []
    found = [
        [(e["step"], e["loss"]) for e in r.events() if e["kind"] == "evaluation"] for r in (run, undisturbed)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "no room for it"),
        pytest.param(errno.EROFS, "does not let us", marks=pytest.mark.thorough),
        pytest.param(errno.EMFILE, "too many files are open", marks=pytest.mark.thorough),
        pytest.param(errno.EIO, "does not let us", marks=pytest.mark.thorough),
    ],
)
def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_keeps_the_last(
    quick, undisturbed, monkeypatch, number, said
):
    commit = checkpoints.commit

    def failing(staging, final, facts):
        if facts["step"] == 2:
            raise OSError(number, os.strerror(number), str(staging))
        commit(staging, final, facts)

    monkeypatch.setattr(checkpoints, "commit", failing)
    recipe = quick(name="full", training={"save_steps": 1})
    with pytest.raises(OutOfResources, match=said) as error:
        api.train(recipe)
    assert error.value.exit_code == 3
    run = open_run(Path(recipe.output_dir) / "full")
    assert run.state() == "failed"
    assert [p.name for p in run.checkpoints.iterdir()] == ["checkpoint-step-1"]
    assert not list(run.staging.glob("checkpoint-*"))
    monkeypatch.setattr(checkpoints, "commit", commit)
    api.resume(run.path)
    assert verifying.differences(undisturbed, run) == []


def test_too_many_open_files_are_a_lack_of_resources(tmp_path):
    import resource

    limits, opened = resource.getrlimit(resource.RLIMIT_NOFILE), []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, limits[1]))
    try:
        with pytest.raises(OSError, match="open files") as error:
            opened.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(10_000))
    finally:
        for file in opened:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for said in (as_ours(error.value), checkpoints.unwritten(error.value, tmp_path, "The checkpoint")):
        assert isinstance(said, OutOfResources)
        assert "many files are open" in said.problem
        assert "ulimit -n" in said.fix


@pytest.mark.thorough
def test_a_disk_that_is_full_for_the_log_as_well_is_still_told(quick, monkeypatch):
    real = Run.event

    def full(self, kind, **fields):
        if fields.get("step") == 2 or (kind == "state" and fields.get("state") == "failed"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events.jsonl")
        real(self, kind, **fields)

    monkeypatch.setattr(Run, "event", full)
    with pytest.raises(OutOfResources, match="disk is full"):
        api.train(quick(name="full", training={"save_steps": 1}))


def test_a_line_that_was_cut_off_does_not_spoil_the_next(tmp_path):
    run = create(Recipe(output_dir=str(tmp_path), name="cut"))
    run.event("step", step=1, loss=1.0)
    with (run.path / "events.jsonl").open("a") as file:
        file.write('{"time": 3, "kind": "st')
    run.event("step", step=2, loss=0.5)
    assert [event["step"] for event in run.events()] == [1, 2]


def test_steps_that_were_taken_twice_are_told_once(tmp_path):
    run = create(Recipe(output_dir=str(tmp_path), name="twice"))
    run.event("state", step=0, state="training")
    for step in (1, 2, 3):
        run.event("step", step=step, loss=float(step))
    run.event("warning", step=3, message="kept")
    run.event("state", step=1, state="training")
    run.event("step", step=2, loss=2.5)
    assert [(e["step"], e["loss"]) for e in run.events() if e["kind"] == "step"] == [(1, 1.0), (2, 2.5)]
    assert any(e["kind"] == "warning" for e in run.events())


@pytest.mark.thorough
@pytest.mark.parametrize("jump", [-10 * 365 * 86400, 10 * 365 * 86400])
def test_a_clock_that_jumps_changes_nothing(quick, undisturbed, monkeypatch, jump):
    real, calls = time.time, []

    def jumping():
        calls.append(1)
        return real() + (jump if len(calls) % 2 else 0)

    monkeypatch.setattr(time, "time", jumping)
    recipe = quick(name="jump", training={"save_steps": 1})
    with pytest.raises(Interrupted):
        api.train(recipe, watch=at(2, lambda: os.kill(os.getpid(), signal.SIGINT)))
    run = open_run(Path(recipe.output_dir) / "jump")
    api.resume(run.path)
    assert verifying.differences(undisturbed, run) == []


@pytest.mark.slow
def test_a_tracker_that_dies_is_told_and_the_run_goes_on(quick, undisturbed, monkeypatch):
    pytest.importorskip("tensorboard")
    from transformers.integrations import TensorBoardCallback

    calls = []

    def dead(self, *args, **kwargs):
        calls.append(1)
        raise ConnectionError("api.example.com does not answer")

    monkeypatch.setattr(TensorBoardCallback, "on_log", dead)
    run = Run(api.train(quick(name="tracked", tracking={"trackers": ["tensorboard"]})).run)
    told = [e["message"] for e in run.events() if e["kind"] == "warning" and "tracker" in e["message"]]
    assert told == [
        "The tracker TensorBoard failed and gets nothing more of this run, which goes on: ConnectionError: "
        "api.example.com does not answer"
    ]
    assert calls == [1]
    assert verifying.differences(undisturbed, run) == []


@pytest.mark.thorough
def test_a_hub_that_is_down_takes_nothing_of_the_run(quick, monkeypatch):
    from tunesmith.export import publish

    def down(*args, **kwargs):
        raise ConnectionError("hub does not answer")

    monkeypatch.setattr(publish, "publish", down)
    recipe = quick(name="hub", export={"push_to_hub": True, "hub_model_id": "me/mine"})
    with pytest.raises(RunError, match="is done, but its model was not published") as error:
        api.train(recipe)
    assert "tunesmith push" in error.value.fix
    run = open_run(Path(recipe.output_dir) / "hub")
    assert run.state() == "done"
    assert list(run.final_model.glob("*.safetensors"))


@pytest.mark.slow
def test_memory_that_runs_out_after_the_training_is_told_as_such(quick, monkeypatch):
    recipe = quick(
        name="long report", evaluation={"skip": False, "max_items": 1, "max_new_tokens": 2, "samples": 0}
    )

    def short(*args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(dataflow, "write_report", short)
        with pytest.raises(OutOfMemory, match="not enough") as error:
            api.train(recipe)
    assert "trained and saved" in error.value.fix
    assert "batch_size" not in error.value.fix
    run = open_run(Path(recipe.output_dir) / recipe.name)
    assert run.state() == "failed"
    assert f"`tunesmith resume {run.path}`" in error.value.fix
    api.resume(run.path)
    assert run.state() == "done"


def _start(recipe, barrier, said):
    barrier.wait(20)
    try:
        run = create(recipe)
        with run.lock():
            said.put("mine")
            barrier.wait(20)
    except RunError as error:
        said.put(f"{error.problem} {error.found}")
        barrier.wait(20)


def test_of_two_processes_that_start_the_same_run_one_does(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, said = context.Barrier(2), context.Queue()
    recipe = Recipe(output_dir=str(tmp_path), name="both")
    both = [context.Process(target=_start, args=(recipe, barrier, said)) for _ in range(2)]
    for process in both:
        process.start()
    found = sorted(said.get(timeout=30) for _ in both)
    for process in both:
        process.join()
    assert found[1] == "mine", found
    # The second comes while the first holds the run, or between its making the folder and its training there.
    assert re.match(r"The run .* is being written|This run was started before: ", found[0]), found
    assert "process" in found[0] or "'died'" in found[0], found


def test_who_holds_a_run_is_told_with_the_time(tmp_path):
    run = create(Recipe(output_dir=str(tmp_path), name="held"))
    child = os.fork()
    if not child:
        with run.lock():
            time.sleep(30)
        os._exit(0)
    try:
        deadline = time.monotonic() + 10
        while not (run.path / ".holder").exists() or not (run.path / ".holder").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(RunError, match="is being written") as error, run.lock():
            pass
        held = rf"process {child} on {re.escape(platform.node())}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{{4}}"
        assert re.fullmatch(held, error.value.found)
        with pytest.raises(RunError, match="was started before") as error:  # `train`, not `resume`
            create(Recipe(output_dir=str(tmp_path), name="held"))
        assert re.fullmatch(rf"a run in state 'running': {held}", error.value.found)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert run.state() == "died"
    with run.lock():  # a dead process holds nothing
        pass


def test_a_run_that_may_only_be_read_has_a_state(tmp_path, monkeypatch):
    run = create(Recipe(output_dir=str(tmp_path), name="archived"))
    (run.path / ".holder").write_text("process 1")

    def acquire(lock, **_):
        raise OSError(errno.EROFS, "Read-only file system", lock.lock_file)

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    assert run.state() == "died"
    with (run.path / ".lock").open("wb") as held:
        assert run.state() == "died"
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run.state() == "running"


def test_a_run_on_a_read_only_disk_is_measured_and_merged_elsewhere_or_refused_at_once(
    few_steps, question_file, tmp_path, monkeypatch
):
    tuned = few_steps("archived", {"adapter": {"kind": "lora", "rank": 2}}, max_steps=2)
    run = api.train(tuned).run
    may = os.access
    monkeypatch.setattr(
        os, "access", lambda p, mode: not Path(p).is_relative_to(tmp_path / "runs") and may(p, mode)
    )
    with monkeypatch.context() as early:
        for module in ("measuring.questions_for", "keeping.made_with"):
            early.setattr(f"tunesmith.evaluation.{module}", lambda *a, **k: pytest.fail("it began"))
        early.setattr("tunesmith.export.merge.make", lambda *a, **k: pytest.fail("it began"))
        for verb in (api.evaluate, api.merge, lambda path: api.compare(path, "tiny")):
            with pytest.raises(RunError, match="cannot be written"):
                verb(run)
        with pytest.raises(RunError, match="cannot be written") as refused:
            api.evaluate(run, output=question_file / "scores")
        assert refused.value.found == f"{question_file} is a file"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    told: list[Any] = []
    assert api.evaluate(run, metrics=["perplexity"], output=tmp_path / "scores").run == tmp_path / "scores"
    assert api.merge(run, output=tmp_path / "merged", watch=told.append).folder == tmp_path / "merged"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")} == before
    assert {path.name for path in (tmp_path / "scores").iterdir()} >= {"rows.jsonl", "scores.json"}
    assert any(e.get("name") == "report" and "no right to write" in e["reason"] for e in told)


def test_a_reader_that_looks_does_not_keep_a_writer_out(tmp_path):
    run = create(Recipe(output_dir=str(tmp_path), name="read"))
    child = os.fork()
    if not child:
        (run.path / ".holder").write_text("process 1")  # left by one that was killed
        while True:
            run.is_locked()
    try:
        time.sleep(0.2)
        for _ in range(20):
            with run.lock():
                pass
            (run.path / ".holder").write_text("process 1")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def nightly(*options: str) -> dict[str, int]:
    """The figures of the long suites, which fork and so have a process of their own."""
    script = Path(__file__).parents[2] / "scripts" / "nightly"
    done = subprocess.run(
        [sys.executable, script, "--json", *options], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_short_dose_of_the_nightly_suites():
    assert nightly("--kills", "20", "--flips", "100", "--fuzz", "200") == {
        "kills": 20, "equal": 20, "stuck": 0, "different": 0, "flips": 100, "found": 100, "inputs": 200,
        "tracebacks": 0,
    }  # fmt: skip


PARTS = {"write": 6, "fsync": 4, "unlink": 2, "unlinkat": 2}
"""Into how many parts of some minutes the calls of a kind are dealt; those of other kinds are one part."""
STRIDES = {"openat": 50}
"""Of a run's calls to open a file, most of which read modules, every fiftieth; of the others each one."""


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("call", "part"), [(call, part) for call in CALLS for part in range(PARTS.get(call, 1))], ids=str
)
def test_sigkill_at_each_write_of_a_run_is_made_good(
    quick, undisturbed, tiny_tokenizer, tmp_path, monkeypatch, call, part
):
    """By strace, from the folder's first file to the report; k = 1, 2, ... until a run is not hit. Then it goes on."""
    if not shutil.which("strace"):
        pytest.skip("strace is not here")
    # strace counts the calls of each process for itself: none but the run's own is to be hit.
    monkeypatch.setattr(rendering, "_OWN", {*rendering._OWN, tiny_tokenizer.chat_template})
    recipe = quick(name="killed", training={"save_steps": 1})
    place, hits, stride = Path(recipe.output_dir) / "killed", 0, STRIDES.get(call, 1)

    def begun() -> None:
        api.resume(place) if is_run(place) else api.train(recipe)

    for k in itertools.count(1 + part * stride, PARTS.get(call, 1) * stride):
        code, said = traced(begun, tmp_path / "said", call, f"signal=SIGKILL:when={k}")
        assert code in (0, -signal.SIGKILL), (call, k, said)
        if code == 0:
            break
        hits += 1
        if not is_run(place) or open_run(place).state() != "done":
            begun()
        run = open_run(place)
        assert verifying.differences(undisturbed, run) == [], (call, k)
        assert run.state() == "done"
        shutil.rmtree(place)
    print(f"{call}, part {part}: {hits} runs were hit")
    assert hits or call not in ("write", "fsync", "rename", "unlink", "unlinkat", "mkdir", "openat"), (
        "the control: a run was hit"
    )


@pytest.mark.thorough
def test_the_plain_trainer_gets_stuck_or_differs_where_it_is_killed():
    """The control: the same kills, and the Trainer's own checkpoints."""
    found = nightly("--kills", "40", "--flips", "1", "--fuzz", "1", "--plain")
    assert found["stuck"] + found["different"] > 0, found


def test_a_folder_that_a_kill_left_half_made_is_taken(tmp_path):
    folder = tmp_path / "half"
    folder.mkdir()
    for name in (".lock", ".holder", "environment.json", "plan.json", ".recipe.yaml.123.tmp"):
        (folder / name).write_text("")
    assert create(Recipe(output_dir=str(tmp_path), name="half")).recipe()
