"""The run folder: events, whole files, one writer, states; checkpoints that count only when whole."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
from transformers.trainer_callback import TrainerState

from tunesmith.errors import RunError
from tunesmith.recipe import Data, Recipe
from tunesmith.training import checkpoints
from tunesmith.training.run import (
    Run,
    anchored,
    check_free,
    create,
    discard,
    find_runs,
    folder_name,
    open_run,
    write_whole,
)


@pytest.fixture
def run(tmp_path):
    return create(Recipe(output_dir=str(tmp_path), name="first"))


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("my/chat_data.jsonl", "chat_chat_data"),
        ("owner/alpaca-en", "chat_alpaca-en"),
        ("example:sql", "chat_sql"),
        ("./folder/", "chat_folder"),
        ("a b:c.csv", "chat_a-b-c"),
    ],
)
def test_folder_names(dataset, name):
    assert folder_name(Recipe(task="chat", data=Data(dataset=dataset))) == name


def test_names_that_are_no_paths_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    for base, dataset in (("tiny", "example:sql"), ("owner/name", "owner/set"), ("gpt2", "missing.csv")):
        recipe = Recipe(model={"base": base}, data={"dataset": dataset})
        assert anchored(recipe) == recipe
    (tmp_path / "faq.csv").write_text("x")
    assert anchored(Recipe(data={"dataset": "faq.csv"})).data.dataset == str(tmp_path / "faq.csv")


def test_a_run_without_its_recipe_is_not_taken_for_another_one(run, tmp_path):
    other = create(Recipe(output_dir=str(tmp_path), name="firsts"))
    other.event("state", state="training")
    (other.path / "recipe.yaml").unlink()
    with pytest.raises(RunError, match="is not whole") as error:
        open_run(other.path)
    assert error.value.found == "no recipe.yaml"
    assert "plan.json" in error.value.fix


def test_a_run_that_is_made_while_its_folder_is_looked_at_is_known(run, monkeypatch):
    text, recipe = (run.path / "recipe.yaml").read_bytes(), run.recipe()
    (run.path / "recipe.yaml").unlink()
    listed = Path.iterdir

    def the_other_ends(path):
        (run.path / "recipe.yaml").write_bytes(text)
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", the_other_ends)
    with pytest.raises(RunError, match="This run was started before"):
        check_free(run.path, recipe=recipe)


def test_a_taken_folder_is_refused(run, tmp_path):
    with pytest.raises(RunError, match="This run was started before"):
        create(run.recipe())
    with pytest.raises(RunError, match="another run's"):
        create(run.recipe().model_copy(update={"task": "chat"}))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(RunError, match="not empty and not a run"):
        create(Recipe(output_dir=str(tmp_path), name="notes"))


def test_events_survive_a_line_cut_off_by_a_crash(run):
    run.event("step", step=1, loss=2.0)
    with (run.path / "events.jsonl").open("a") as file:
        file.write('{"kind": "st')
    assert [event["loss"] for event in run.events()] == [2.0]


def test_watchers_see_events_and_progress_but_progress_is_not_kept(tmp_path):
    seen = []
    run = create(Recipe(output_dir=str(tmp_path), name="seen"), watch=seen.append)
    run.progress("training", 1, 2)
    run.event("warning", message="careful")
    assert [event["kind"] for event in seen] == ["progress", "warning"]
    assert [event["kind"] for event in run.events()] == ["warning"]


def _hold(path, ready, done):
    with Run(path).lock():
        ready.set()
        done.wait(20)


def test_one_writer_per_run(run):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(run.path, ready, done))
    other.start()
    try:
        assert ready.wait(30)
        assert run.state() == "running"
        with pytest.raises(RunError, match=f"process {other.pid}"), run.lock():
            pass
    finally:
        done.set()
        other.join()
    assert run.state() == "died"
    with run.lock():
        pass
    run.finish("done")
    assert run.state() == "done"


def test_opening_what_is_no_run_names_the_runs_nearby(run, tmp_path):
    with pytest.raises(RunError, match=r"Did you mean '.*first'"):
        open_run(tmp_path / "frist")
    assert [r.path.name for r in find_runs(tmp_path)] == ["first"]
    discard(run)
    assert find_runs(tmp_path) == []


def test_the_environment_names_no_path_and_no_secret(run):
    text = json.dumps(run.read("environment.json"))
    assert "/" not in text
    assert "torch" in text


def test_a_file_is_written_in_one_piece(tmp_path):
    path = write_whole(tmp_path / "sub" / "file.txt", "héllo")
    assert path.read_text(encoding="utf-8") == "héllo"
    assert list(path.parent.iterdir()) == [path]


def checkpoint(run, step, *, loss=None):
    staging = run.path / ".staging"
    staging.mkdir()
    (staging / "model.safetensors").write_bytes(bytes([step]) * 100)
    TrainerState(global_step=step, train_batch_size=4).save_to_json(str(staging / checkpoints.LOG))
    run.checkpoints.mkdir(exist_ok=True)
    checkpoints.commit(staging, checkpoints.folder_of(run, step), {"step": step, "validation_loss": loss})
    return checkpoints.folder_of(run, step)


def test_rotation_keeps_the_newest_and_then_the_best(run):
    for step, loss in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.8)):
        checkpoint(run, step, loss=loss)
    checkpoints.rotate(run, keep=3)
    assert [checkpoints.step_of(p) for p in checkpoints.found(run)] == [4, 3, 1]
    checkpoints.rotate(run, keep=1)
    assert [checkpoints.step_of(p) for p in checkpoints.found(run)] == [4]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_checkpoint_is_skipped_aloud_and_refused_by_name(run, damage):
    good, bad = checkpoint(run, 1), checkpoint(run, 2)
    file = bad / "model.safetensors"
    match damage:
        case "flip":
            file.write_bytes(bytes([7]) + file.read_bytes()[1:])
        case "truncate":
            file.write_bytes(file.read_bytes()[:-1])
        case "remove":
            file.unlink()
        case "manifest":
            (bad / checkpoints.MANIFEST).unlink()
    assert checkpoints.choose(run) == good
    assert any("damaged and was skipped" in e.get("message", "") for e in run.events())
    with pytest.raises(RunError, match="damaged"):
        checkpoints.choose(run, "checkpoint-step-2")


def test_choosing_a_checkpoint(run):
    assert checkpoints.choose(run) is None
    checkpoint(run, 1)
    newest = checkpoint(run, 12)
    assert checkpoints.choose(run) == newest
    assert checkpoints.choose(run, "checkpoint-step-1") == checkpoints.folder_of(run, 1)
    with pytest.raises(RunError, match="no checkpoint 'checkpoint-step-5'"):
        checkpoints.choose(run, "checkpoint-step-5")
