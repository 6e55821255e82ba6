"""The judge of the kills in scripts/nightly: what it counts as equal, stuck and different, without a run."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
from hashlib import sha256
from pathlib import Path

import pytest

KILLED, DONE, FAILED = (-9, 0.1, True), (0, 0.1, False), (1, 0.1, False)


@pytest.fixture
def nightly(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the script sets it where nobody did
    place = str(Path(__file__).parents[1] / "scripts" / "nightly")
    loader = importlib.machinery.SourceFileLoader("nightly", place)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("nightly", loader))
    loader.exec_module(module)
    monkeypatch.setattr(module, "warm", lambda *args: None)
    for number in range(9):
        (tmp_path / f"killed-{number}").mkdir()
    return module


@pytest.mark.parametrize(
    ("ends", "differs", "told"),
    [
        ([KILLED, DONE], False, "1 equal"),
        ([KILLED, DONE], True, "1 different"),
        # One attempt: that a second one might go on helps nobody who was told no.
        ([KILLED, FAILED, KILLED, DONE], False, "1 stuck"),
        # It runs for ever where nothing kills it.
        ([KILLED, KILLED], False, "1 stuck"),
        # No kill met these; what they come to counts where it is not equal, and another run is killed.
        ([FAILED, KILLED, DONE], False, "1 stuck, 1 equal"),
        ([DONE, KILLED, DONE], False, "1 equal"),
        ([DONE, KILLED, DONE], True, "2 different"),
    ],
)
def test_each_end_of_a_run_is_counted(nightly, tmp_path, monkeypatch, ends, differs, told):
    left = [DONE, DONE, *ends]  # the model, and the run that is not killed
    monkeypatch.setattr(nightly, "in_child", lambda *args, **options: left.pop(0))
    monkeypatch.setattr(nightly, "unlike", lambda *args, **options: ["a weight"] if differs else [])
    (tmp_path / "log").write_text("what it said\n")
    found = nightly.kills(1, folder=tmp_path)
    counts = {name: int(number) for number, name in (part.split() for part in told.split(", "))}
    assert found == {"equal": 0, "stuck": 0, "different": 0, **counts, "kills": 1}


def test_moments_that_meet_no_run_are_told(nightly, tmp_path, monkeypatch):
    monkeypatch.setattr(nightly, "in_child", lambda *args, **options: DONE)
    monkeypatch.setattr(nightly, "unlike", lambda *args, **options: [])
    for number in range(9, 30):
        (tmp_path / f"killed-{number}").mkdir()
    with pytest.raises(SystemExit, match="none was killed"):
        nightly.kills(1, folder=tmp_path)


@pytest.mark.parametrize(
    ("said", "told"),
    [("checkpoint-step-2", "equal"), ("checkpoint-step-1", "different"), (None, "different")],
)
def test_a_run_has_to_go_on_from_its_newest_whole_checkpoint(nightly, tmp_path, monkeypatch, said, told):
    """Of three checkpoints the last one is cut off; a continued run says where it goes on from."""
    run, calls = tmp_path / "killed-0" / "run", []

    def in_child(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            for step in (1, 2, 3):
                point = run / "checkpoints" / f"checkpoint-step-{step}"
                point.mkdir(parents=True)
                (point / "weights").write_text("" if step == 3 else "whole")
                facts = {"files": {"weights": {"sha256": sha256(b"whole").hexdigest()}}}
                (point / "manifest.json").write_text(json.dumps(facts))
            return KILLED
        if len(calls) == 4 and said:
            event = {"kind": "decision", "name": "resume", "value": said}
            (run / "events.jsonl").write_text(json.dumps(event) + "\n")
        return DONE

    monkeypatch.setattr(nightly, "in_child", in_child)
    monkeypatch.setattr(nightly, "unlike", lambda *args, **options: [])
    found = nightly.kills(1, folder=tmp_path)
    assert found == {"kills": 1, "stuck": 0, "equal": 0, "different": 0, told: 1}


def test_a_short_name_of_a_field_is_not_found_in_any_sentence(nightly, tmp_path, monkeypatch):
    from tunesmith import compose, errors

    path = tmp_path / "recipe.yaml"
    path.write_text("a: 1\n")
    for said, is_right in (("This is a fault.", False), ("a is not a field.", True)):

        def validated(layer, said=said):
            raise errors.RecipeError(said)

        monkeypatch.setattr(compose, "validated", validated)
        assert (nightly.read_as_recipe(path) == []) is is_right
