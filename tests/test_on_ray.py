"""Runs, answers and trials on the workers of Ray: what one process gives, whatever becomes of a worker."""

from __future__ import annotations

import copy
import functools
import json
import os
import pickle
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray_in_process

from tunesmith import api, engines, launch, libraries, on_ray, ranks
from tunesmith.errors import Interrupted, MissingExtra, RecipeError, RunError, TunesmithError
from tunesmith.recipe import Ray, Shards
from tunesmith.training import callbacks
from tunesmith.training import run as run_folders
from tunesmith.training.run import Run
from tunesmith.training.storage import storage

pytestmark = pytest.mark.usefixtures("unlaunched")


@pytest.fixture
def recipe(few_steps):
    return few_steps


@pytest.fixture
def in_process(monkeypatch):
    """Ray in this process, with one worker; gives what each start of it was told."""
    monkeypatch.setattr(libraries, "own_process", lambda: None)
    return ray_in_process.installed(monkeypatch)


ONE_WORKER = {"launch": {"kind": "ray", "workers": 1}}
ON_RAY = {"launch": {"kind": "ray", "workers": 2}}


def losses(run: Path, kind: str = "step") -> dict[int, float]:
    return {e["step"]: e["loss"] for e in Run(run).events() if e["kind"] == kind}


# What needs no Ray


def test_a_recipe_for_ray_starts_workers_and_a_worker_starts_none(recipe, monkeypatch):
    section = recipe("a", ON_RAY).launch
    assert launch.starts(section)
    assert not launch.is_job(section)
    assert launch.processes(section) == 2
    monkeypatch.setenv(launch.JOB, "ray")
    assert not launch.starts(section.model_copy(update={"workers": 1})), "of one worker as well"


def test_the_plan_knows_the_workers_and_refuses_rows_that_cannot_be_dealt(recipe):
    plan, _ = api.plan(recipe("plan", ON_RAY))
    assert plan.processes == 2
    with pytest.raises(RecipeError, match="dealt evenly to 5 processes"):
        api.plan(recipe("plan", {"launch": {"kind": "ray", "workers": 5}}))


def test_workers_that_train_and_workers_that_answer_do_not_wait_for_one_another(recipe):
    both = ON_RAY, {"evaluation": {"skip": False, "engine": "ray"}}
    with pytest.raises(RecipeError, match=r"does not go with launch\.kind ray") as error:
        api.plan(recipe("both", *both))
    assert "tunesmith evaluate RUN" in error.value.fix
    api.plan(recipe("later", *both, {"evaluation": {"skip": True}}))
    plan, _ = api.plan(recipe("first", ON_RAY, {"evaluation": {"skip": False}}))
    [told] = [note for note in plan.estimate.notes if "in the first process alone" in note]
    assert "with evaluation.skip" in told


def test_a_worker_of_a_run_that_goes_on_counts_the_workers_that_are_there(recipe, monkeypatch):
    """`resume --processes 1` of a run of two workers: the run's recipe says two."""
    section = recipe("a", ON_RAY).launch
    monkeypatch.setenv(launch.JOB, "ray")
    assert launch.placed(section) == (1, 1, None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert launch.placed(section) == (4, 3, None)


def test_workers_of_several_nodes_have_to_see_the_output_folder(tmp_path, monkeypatch):
    import torch.distributed as distributed

    store, notes = distributed.HashStore(), tmp_path / "runs/.ray/notes"
    monkeypatch.setattr(ranks, "_store", lambda: store)
    monkeypatch.setattr(on_ray, "SEEN", 0.0)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "_heard", {})
    on_ray._show_folder(notes)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(ranks, "_heard", {})
    on_ray._look_for_folder()
    shutil.rmtree(tmp_path / "runs")  # as on a node with a disk of its own
    monkeypatch.setattr(ranks, "_heard", {})
    with pytest.raises(RunError, match="output folder that all of them see") as error:
        on_ray._look_for_folder()
    assert f"worker 1 on {socket.gethostname()} does not see {tmp_path / 'runs'}," in error.value.found
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    on_ray._look_for_folder()  # of one node nothing is asked


def test_without_ray_its_extra_is_named(recipe, monkeypatch):
    monkeypatch.setattr(on_ray.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"launch\.kind=ray") as error:
        api.train(recipe("none", ON_RAY))
    assert "tunesmith[ray]" in error.value.fix


def test_how_workers_ended_is_told_as_of_any_launcher():
    section = Ray(max_failures=2)
    given = {"problem": "The disk is full.", "found": None, "fix": "Free space.", "exit_code": 3}
    with pytest.raises(TunesmithError, match="disk is full") as error:
        on_ray._came_to({"value": {"error": given}}, section)
    assert error.value.exit_code == 3
    with pytest.raises(Interrupted) as stopped:
        on_ray._came_to({"value": {"error": {**given, "exit_code": 143}}}, section)
    assert stopped.value.exit_code == 143

    class Group(Exception):
        worker_failures = {1: on_ray.WorkerLost("Traceback\nActorDiedError: killed")}

    with pytest.raises(RunError, match="2 replacements were not enough") as error:
        on_ray._came_to({"error": Group()}, section)
    assert "worker 1: ActorDiedError: killed" in error.value.found
    with pytest.raises(TunesmithError, match="disk is full"):
        on_ray._came_to({"error": Group(), "fault": given}, section)
    with pytest.raises(KeyError, match="a slip"):
        on_ray._came_to({"error": KeyError("a slip")}, section)
    try:
        raise ValueError("a slip in a worker")
    except ValueError as slip:
        bug = on_ray._facts(slip)
    with pytest.raises(RuntimeError, match="ValueError: a slip in a worker") as error:
        on_ray._came_to({"value": {"error": bug}}, section)
    assert not isinstance(error.value, TunesmithError), "so that the command ends with 4"
    assert on_ray._came_to({"value": {"result": {"run": "x"}}}, section) == {"run": "x"}


def test_a_wish_to_stop_reaches_the_training_of_a_thread():
    assert not callbacks.ask_to_stop(), "where nothing trains"
    with callbacks.StopOnRequest() as stop:
        assert callbacks.ask_to_stop()
        assert stop.agreed()
    assert not callbacks.ask_to_stop()


@pytest.mark.parametrize(
    ("base", "temperature", "says"), [(None, 0.0, "from its folder"), ("x", 0.8, "greedily")]
)
def test_answers_that_workers_could_not_give_alike_are_refused(base, temperature, says):
    source = engines.Source("model", None, lambda: None, base)
    with pytest.raises(RecipeError, match=says):
        engines.answers(source, engines.Asked([[1]], 2, [0], temperature=temperature), engine="ray")


# The second place of a run's folder


def a_run(folder: Path, *steps: int, began: int = 1) -> Path:
    (folder / "recipe.yaml").parent.mkdir(parents=True, exist_ok=True)
    for name in ("environment.json", ".lock"):
        (folder / name).write_text(f"{name} {steps}")
    (folder / "recipe.yaml").write_text("name: run")
    (folder / "events.jsonl").write_text(f'{{"time": {began}}}\n{{"steps": "{steps}"}}\n')
    for step in steps:
        own = folder / "checkpoints" / f"checkpoint-step-{step}"
        own.mkdir(parents=True, exist_ok=True)
        (own / "weights.safetensors").write_bytes(b"w" * step)
        (own / "manifest.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


def test_of_two_runs_of_one_name_neither_takes_the_others_place(tmp_path, recipe):
    kept = storage(f"{tmp_path}/far", "run")
    kept.push(a_run(tmp_path / "first" / "run", 8))
    before = contents(tmp_path / "far" / "run")
    second = a_run(tmp_path / "second" / "run", 2, began=2)
    again = storage(f"{tmp_path}/far", "run")
    for done in (again.push, again.fetch):
        with pytest.raises(RunError, match="holds another run"):
            done(second)
    assert contents(tmp_path / "far" / "run") == before
    assert contents(second) == contents(a_run(tmp_path / "third", 2, began=2))
    fresh = recipe("run", ON_RAY, {"launch": {"storage": f"{tmp_path}/far"}})
    with pytest.raises(RunError, match="this is a new run"):  # before any worker is there
        api.train(fresh)
    assert not Path(fresh.output_dir).exists()


def test_a_run_that_comes_back_is_open_to_its_owner_alone(tmp_path):
    kept = storage(f"{tmp_path}/far", "run")
    kept.push(a_run(tmp_path / "run", 2))
    assert (tmp_path / "far" / "run").stat().st_mode & 0o077 == 0
    for path in (tmp_path / "far").rglob("*"):
        path.chmod(0o777)
    kept.fetch(tmp_path / "other")
    modes = {path.stat().st_mode & 0o077 for path in [tmp_path / "other", *(tmp_path / "other").rglob("*")]}
    assert modes == {0}


@pytest.mark.parametrize(("has_saved", "goes_on_from"), [(False, "checkpoint-step-2"), (True, "latest")])
def test_a_chosen_checkpoint_counts_until_another_is_written(tmp_path, recipe, has_saved, goes_on_from):
    run = a_run(tmp_path / "run", 2, 4)
    asked = {"recipe": {}, "run": str(run), "checkpoint": "checkpoint-step-2"}
    before = {"starts": 2, "has_saved": has_saved, "has_stored": False, "fault": None}
    assert on_ray._going_on(asked, run, None, before, lambda event: None)["checkpoint"] == goes_on_from


@pytest.mark.parametrize("is_there", [True, False])
def test_a_course_that_was_left_does_not_come_back_from_the_second_place(tmp_path, is_there):
    """The run went back to step 2, and its later checkpoint could not be copied: the place has steps 4 and 6 still."""
    kept = storage(f"file://{tmp_path}/far", "run")
    run = a_run(tmp_path / "run", 2, 4, 6)
    kept.push(run)
    shutil.rmtree(run / "checkpoints/checkpoint-step-6")
    begun = {"kind": "state", "state": "training", "step": 2}
    with (run / "events.jsonl").open("a") as events:
        events.write(json.dumps(begun) + "\n")
    if not is_there:  # its node is gone
        shutil.rmtree(run)
    asked = {"recipe": {}, "run": str(run), "checkpoint": "checkpoint-step-2"}
    before = {"starts": 2, "has_saved": True, "has_stored": False, "fault": None}
    again = storage(f"file://{tmp_path}/far", "run")
    found = on_ray._going_on(asked, run, again, before, lambda event: None)["checkpoint"]
    assert found == ("latest" if is_there else "checkpoint-step-2")
    assert (run / "checkpoints/checkpoint-step-6").exists() is not is_there


def test_shards_without_ray_are_refused_and_not_ignored(tiny_model_folder, question_file):
    settings = {"evaluation": {"shards": {"workers": 2}}}
    with pytest.raises(RecipeError, match=r"evaluation\.shards is for the engine 'ray'"):
        api.evaluate(str(tiny_model_folder), dataset=str(question_file), settings=settings)


def test_a_trial_that_diverged_in_a_worker_is_a_failed_one():
    from tunesmith.errors import TrainingDiverged
    from tunesmith.sweeps.trials import is_of_its_values

    told = json.loads(json.dumps(on_ray._facts(TrainingDiverged("The loss is nan.", fix="Lower it."))))
    with pytest.raises(TunesmithError, match="loss is nan") as error:
        on_ray._came_to({"value": {"error": told}}, Ray())
    assert is_of_its_values(error.value)
    assert error.value.exit_code == 3


@pytest.mark.parametrize("kind", ["memory", "file", "folder"])
def test_a_run_comes_back_from_any_place_as_it_was(tmp_path, kind):
    url = {
        "memory": f"memory://{tmp_path.name}",
        "file": f"file://{tmp_path}/far",
        "folder": f"{tmp_path}/far",
    }
    kept = storage(url[kind], "run")
    assert kept.fetch(tmp_path / "other") is None, "nothing there"
    run = a_run(tmp_path / "run", 2)
    files, size = kept.push(run)
    assert files == 5
    assert size == sum(map(len, contents(run).values()))
    assert kept.push(run) == (0, 0), "nothing has changed"
    a_run(run, 4)
    for file in (run / "checkpoints" / "checkpoint-step-2").iterdir():
        file.unlink()
    kept.push(run)
    elsewhere = storage(url[kind], "run")
    assert elsewhere.fetch(tmp_path / "other") == 4
    assert contents(tmp_path / "other") == contents(run)
    assert elsewhere.fetch(tmp_path / "other") is None, "as far as the place"
    assert elsewhere.fetch(a_run(tmp_path / "behind", 2)) == 4
    assert contents(tmp_path / "behind") == contents(run)
    assert elsewhere.fetch(a_run(tmp_path / "ahead", 4, 6)) is None


def test_a_checkpoint_whose_copy_was_cut_off_does_not_count(tmp_path, monkeypatch):
    url = f"file://{tmp_path}/far"
    kept = storage(url, "run")
    run = a_run(tmp_path / "run", 2)
    kept.push(run)
    a_run(run, 4)
    put = kept.filesystem.put_file

    def cut(here, there, **how):
        if "checkpoint-step-4" in there and there.endswith(".safetensors"):
            raise OSError("the network is gone")
        put(here, there, **how)

    monkeypatch.setattr(kept.filesystem, "put_file", cut)
    with pytest.raises(OSError, match="network"):
        kept.push(run)
    monkeypatch.undo()
    assert storage(url, "run").fetch(tmp_path / "other") == 2
    kept.push(run)
    assert storage(url, "run").fetch(tmp_path / "third") == 4


def test_workers_that_start_again_copy_what_is_new_and_leave_whole_what_was_there(tmp_path, monkeypatch):
    """Those before had copied step 2; the copy of those after them is cut off in step 4."""
    url = f"file://{tmp_path}/far"
    run = a_run(tmp_path / "run", 2)
    (run / "best_model").mkdir()
    for name, text in (("weights.safetensors", "best"), ("best_model_info.json", "{}")):
        (run / "best_model" / name).write_text(text)
    storage(url, "run").push(run)
    a_run(run, 4)
    again = storage(url, "run")
    put, copied = again.filesystem.put_file, []

    def cut(here, there, **how):
        copied.append(there)
        if "checkpoint-step-4" in there:
            raise OSError("the node is gone")
        put(here, there, **how)

    monkeypatch.setattr(again.filesystem, "put_file", cut)
    with pytest.raises(OSError, match="gone"):
        again.push(run)
    monkeypatch.undo()
    assert not any("checkpoint-step-2" in name or "best_model" in name for name in copied)
    assert storage(url, "run").fetch(tmp_path / "other") == 2
    assert (tmp_path / "other/best_model/best_model_info.json").exists()
    (tmp_path / "far/run/surplus").touch()
    storage(url, "run").push(run)
    assert contents(tmp_path / "far" / "run") == contents(run), "what is not in the run is not in its place"


def test_a_changed_best_model_is_unmarked_while_it_is_written(tmp_path, monkeypatch):
    kept = storage(f"file://{tmp_path}/far", "run")
    run = a_run(tmp_path / "run", 2)
    (run / "best_model").mkdir()
    for name, text in (("weights.safetensors", "old"), ("best_model_info.json", "{}")):
        (run / "best_model" / name).write_text(text)
    kept.push(run)
    (run / "best_model" / "weights.safetensors").write_text("better")
    put, seen = kept.filesystem.put_file, []

    def watched(here, there, **how):
        if there.endswith("best_model/weights.safetensors"):
            seen.append((tmp_path / "far/run/best_model/best_model_info.json").exists())
        put(here, there, **how)

    monkeypatch.setattr(kept.filesystem, "put_file", watched)
    kept.push(run)
    assert seen == [False]
    assert contents(tmp_path / "far" / "run") == contents(run)


def test_a_place_that_nobody_knows_is_refused():
    with pytest.raises(RecipeError, match="does not know"):
        storage("nowhere://bucket", "run")


def weights(run: Path) -> dict[str, object]:
    from safetensors.torch import load_file

    return load_file(run / "final_model" / "model.safetensors")


# With one worker, in this process


def test_workers_that_were_lost_begin_at_the_last_checkpoint_and_end_as_if_none_had_been(
    recipe, tmp_path, monkeypatch, in_process
):
    """Lost twice: first the folder stays, then it is gone as well, and the second place is all there is."""
    undisturbed = api.train(recipe("undisturbed", ONE_WORKER)).run
    lost, run = [], tmp_path / "runs/lost"

    class Words(on_ray._Words):
        def tell(self, event):
            """Ends the worker as a collective does when another one is gone."""
            super().tell(event)
            if (event["kind"], event.get("step")) == ("checkpoint", 2) and not lost:
                lost.append("a worker")
                raise RuntimeError("Connection closed by peer")
            if (event["kind"], event.get("step")) == ("stored", 4) and len(lost) == 1:
                lost.append("its node")
                shutil.rmtree(run)
                raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(on_ray, "_Words", Words)
    place = {"launch": {"storage": f"file://{tmp_path}/far"}}
    assert api.train(recipe("lost", ONE_WORKER, place)).run == run
    assert lost == ["a worker", "its node"]
    events = Run(run).events()
    assert [e["step"] for e in events if e.get("state") == "training"] == [0, 2, 4]
    said = " ".join(e["message"] for e in events if e["kind"] == "warning")
    assert "started the workers again (start 2)" in said
    assert "started the workers again (start 3)" in said
    assert [e["value"] for e in events if e.get("name") == "fetched"] == [4]
    for of_what in ("step", "evaluation"):
        assert losses(run, of_what) == losses(undisturbed, of_what)
    assert all(bool((t == weights(run)[part]).all()) for part, t in weights(undisturbed).items())
    # Without anything that gathers gradients a tied table's are added up in another order (forward/lookup.py).
    alone = losses(api.train(recipe("alone")).run)
    assert losses(run) == pytest.approx(alone, rel=1e-6)
    assert contents(tmp_path / "far/lost") == contents(run)
    assert not (tmp_path / "runs/.ray").exists()
    [_, began] = in_process
    assert (began["address"], began["include_dashboard"], began["RAY_AUTH_MODE"]) == ("local", False, "token")
    assert len(began["RAY_AUTH_TOKEN"]) == 64
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_workers_that_are_lost_too_often_end_the_run_and_it_goes_on_later(recipe, monkeypatch, in_process):
    class Words(on_ray._Words):
        def tell(self, event):
            super().tell(event)
            if event["kind"] == "checkpoint":
                raise RuntimeError("Connection closed by peer")

    asked = recipe("lost", ONE_WORKER, {"launch": {"max_failures": 1}})
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(on_ray, "_Words", Words)
        with pytest.raises(RunError, match="1 replacements were not enough") as error:
            api.train(asked)
    assert error.value.exit_code == 3
    run = Path(asked.output_dir) / "lost"
    assert Run(run).state() == "failed"
    api.resume(run)
    assert [e["step"] for e in Run(run).events() if e.get("state") == "training"] == [0, 2, 4]
    assert Run(run).state() == "done"


def test_an_error_of_a_worker_s_own_ends_the_run_at_once(recipe, in_process):
    told: list[str] = []
    asked = recipe("diverged", ONE_WORKER, learning_rate=1e30)
    with pytest.raises(TunesmithError, match="not a number"):
        api.train(asked, watch=lambda event: told.append(event.get("state") or ""))
    assert told.count("training") == 1


def test_answers_of_shards_come_in_their_order_whatever_comes_first_or_twice(
    tiny_model_folder, tiny_tokenizer, in_process
):
    several, one, told = answered(tiny_model_folder, tiny_tokenizer)
    assert several == one
    assert told == [0, *range(1, len(one) + 1)]


# On Ray itself


@pytest.fixture(scope="module")
def workers():
    """A Ray of this machine's own, for all tests that need one."""
    pytest.importorskip("ray")
    with on_ray.cluster(Ray(workers=2), needed_for="tests") as ray:
        yield ray


def kill(*, every: bool) -> int:
    """Kill one worker, or all of them, as a node's end does."""
    import psutil

    found = [
        p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())
    ]
    for process in found if every else found[-1:]:
        process.kill()
    return len(found)


@pytest.mark.parametrize(
    ("loses_folder", "beside"),
    [
        pytest.param(False, {}, marks=pytest.mark.slow, id="a worker, beside one process"),
        pytest.param(False, ON_RAY, marks=pytest.mark.thorough, id="a worker"),
        pytest.param(True, ON_RAY, marks=pytest.mark.thorough, id="all, with their folder"),
    ],
)
def test_lost_workers_are_replaced_and_the_run_ends_as_if_none_had_been(
    recipe, tmp_path, workers, loses_folder, beside
):
    """One is killed while the folder stays; or all, with their folder, whose second place is all there is. Beside
    undisturbed workers it is the same run to the bit, beside one process to rounding."""
    undisturbed = api.train(recipe("undisturbed", beside, num_epochs=8)).run
    place = {"launch": {"storage": f"file://{tmp_path}/far"}}
    wanted = recipe("lost", ON_RAY, place if loses_folder else {}, num_epochs=8)
    run, killed = Path(wanted.output_dir) / "lost", []
    kind = "stored" if loses_folder else "checkpoint"

    def watch(event):
        if event["kind"] == kind and event["step"] >= 4 and not killed:
            killed.append(kill(every=loses_folder))
            if loses_folder:
                time.sleep(0.5)
                shutil.rmtree(run)

    api.train(wanted, watch=watch)
    assert killed == [2]
    starts = [e["step"] for e in Run(run).events() if e.get("state") == "training"]
    assert starts[0] == 0
    assert starts[1] >= 2
    said = [e["message"] for e in Run(run).events() if e["kind"] == "warning"]
    assert sum("Ray started the workers again (start 2)" in message for message in said) == 1
    fetched = [e for e in Run(run).events() if e.get("name") == "fetched"]
    assert len(fetched) == loses_folder
    assert Run(run).state() == "done"
    for of_what in ("step", "evaluation"):
        assert losses(run, of_what)
        assert losses(run, of_what) == pytest.approx(losses(undisturbed, of_what), abs=1e-5)
    far = {part: float((t - weights(run)[part]).abs().max()) for part, t in weights(undisturbed).items()}
    assert max(far.values()) < 1e-4
    if beside:
        assert losses(run) == losses(undisturbed)
        assert not any(far.values())
    if loses_folder:
        assert contents(tmp_path / "far" / "lost") == contents(run)


@pytest.mark.thorough
def test_undisturbed_workers_give_the_losses_of_one_process(recipe, workers):
    one, several = (api.train(recipe(name, own)).run for name, own in (("one", {}), ("several", ON_RAY)))
    for of_what in ("step", "evaluation"):
        assert losses(several, of_what) == pytest.approx(losses(one, of_what), abs=1e-5)


@pytest.mark.thorough
def test_refusals_in_a_worker_are_told_once_and_not_tried_again(recipe, workers, monkeypatch):
    with pytest.raises(TunesmithError, match="'kto' is trained in one process"):
        api.train(recipe("refused", ON_RAY, {"method": {"kind": "kto"}}))
    taken = recipe("taken", ON_RAY)
    a_run(Path(taken.output_dir) / "taken", 2)
    with pytest.raises(RunError, match="another run's"):  # at once
        api.train(taken)
    monkeypatch.setattr(
        run_folders, "check_free", lambda path, **_: None
    )  # here, as if only the workers saw the folder
    with pytest.raises(TunesmithError, match="another run's"):
        api.train(taken)


@pytest.mark.thorough
def test_an_error_amid_the_steps_is_told_as_it_is_and_not_tried_again(recipe, workers):
    told: list[str] = []

    def watch(event):
        told.append(event.get("state") or event.get("message") or "")

    with pytest.raises(TunesmithError, match="not a number") as error:
        api.train(recipe("diverged", ON_RAY, num_epochs=8, learning_rate=1e30), watch=watch)
    assert error.value.exit_code == 3
    assert told.count("training") == 1
    assert not any("Ray started the workers again" in message for message in told)


@pytest.mark.thorough
def test_sigterm_stops_the_workers_after_their_step(recipe, workers):
    sent = []

    def watch(event):
        if event["kind"] == "step" and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    stopped = recipe("stopped", ON_RAY, num_epochs=200)
    with pytest.raises(Interrupted) as error:
        api.train(stopped, watch=watch)
    assert error.value.exit_code == 143
    run = Run(Path(stopped.output_dir) / "stopped")
    assert run.state() == "interrupted"
    assert not (run.path.parent / ".ray").exists()


def answered(folder, tokenizer):
    """What workers and one process answer to the same prompts, one of them asked twice, and the progress told."""
    from tunesmith import models

    def load(device="cpu"):
        return models.load_model(str(folder), dtype="float32", device=device)

    prompts = [tokenizer(f"what is {'count ' * (n % 5)}{n}")["input_ids"] for n in range(45)]
    asked = engines.Asked([*prompts, prompts[0]], 6, [tokenizer.eos_token_id])
    source = engines.Source("model", tokenizer, load, str(folder), shards=Shards(workers=2, batch=16))
    one, _ = engines.answers(source, asked)
    told: list[int] = []
    several, settings = engines.answers(source, asked, engine="ray", progress=told.append)
    assert settings["engine"] == "ray"
    return several, one, told


@pytest.mark.thorough
def test_workers_give_the_answers_of_one_process_in_their_order(tiny_model_folder, tiny_tokenizer, workers):
    several, one, told = answered(tiny_model_folder, tiny_tokenizer)
    assert several == one
    assert told[-1] == len(one)


def test_a_short_recipe_has_a_scheduler():
    pytest.importorskip("ray")
    assert on_ray._scheduler("min", 100, 4)._max_t == 5, "validated every 100 steps, trained for 4"


def test_trials_are_recorded_as_they_end(in_process):
    recorded, validated, wrong = [], [], []
    tell = on_ray._records(recorded.append, lambda *one: validated.append(one), wrong)

    def trial(number, **last):
        return SimpleNamespace(
            config={"trial": {"number": number}}, last_result=last, get_error=lambda: RuntimeError("no node")
        )

    assert copy.deepcopy(tell) is tell
    assert pickle.loads(pickle.dumps(tell)) is not None, "whatever it calls, such as a terminal with a lock"
    ended = json.dumps({"number": 0, "state": "failed"})
    tell.on_trial_result(0, [], trial(0), {"ended": ended})  # before any validation
    tell.on_trial_complete(0, [], trial(0))
    tell.on_trial_result(0, [], trial(1), {"step": 2, "value": 0.5})
    tell.on_trial_complete(0, [], trial(1, step=2))
    tell.on_trial_error(0, [], trial(2))
    assert [one["state"] for one in recorded] == ["failed", "pruned", "failed"]
    assert validated == [(1, 2, 0.5)]
    assert recorded[2]["reason"] == "no node"
    facts = {"problem": "The disk is full.", "found": None, "fix": None, "exit_code": 3}
    until = on_ray._until(wrong)
    assert not until.stop_all()
    tell.on_trial_result(0, [], trial(3), {"wrong": json.dumps(facts)})
    tell.on_trial_complete(0, [], trial(3))
    assert until.stop_all(), "an error that the next trial would meet as well ends all"
    assert wrong[0].problem == "The disk is full."
    assert len(recorded) == 3
    try:
        raise ValueError("a slip in a trial")
    except ValueError as slip:
        tell.on_trial_result(0, [], trial(4), {"wrong": json.dumps(on_ray._facts(slip))})
    assert "ValueError: a slip in a trial" in str(wrong[1])
    assert not isinstance(wrong[1], TunesmithError), "so that the command ends with 4"


def test_whatever_else_goes_wrong_in_a_trial_is_told_to_the_sweep(monkeypatch, in_process):
    from ray import tune

    from tunesmith.sweeps import trials

    def slips(*given, **named):
        raise ValueError("a slip in a trial")

    said = []
    monkeypatch.setenv(launch.JOB, "")  # which a trial sets
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(trials, "carried_out", slips)
    monkeypatch.setattr(tune, "report", said.append)
    on_ray._trial({"gpus": 0, "trial": {"number": 0, "recipe": {}}})
    assert "ValueError: a slip in a trial" in json.loads(said[0]["wrong"])["bug"]


@pytest.mark.thorough
def test_a_sweep_on_ray_tries_each_trial_once_and_goes_on(recipe, workers):
    space = ["training.learning_rate=loguniform(1e-4,1e-2)"]
    asked = recipe("sweep", ON_RAY, {"data": {"held_out": 0.3, "num_samples": None}}, max_steps=4)
    display = functools.partial(
        lambda lock, event: None, threading.RLock()
    )  # which no pickle takes, as a terminal
    found = api.sweep(asked, space, trials=3, engine="ray", watch=display)
    ended = {trial.number: trial.state for trial in found.trials}
    assert set(ended) == {0, 1, 2}
    assert set(ended.values()) <= {"done", "pruned"}
    assert found.best.value == min(trial.value for trial in found.trials if trial.state == "done")
    again = api.sweep(asked, space, trials=4, engine="ray")
    assert [trial.seconds for trial in again.trials[:3]] == [trial.seconds for trial in found.trials]
    assert json.loads((again.folder / "sweep.json").read_text())["best"] == again.best.name
