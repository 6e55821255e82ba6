"""Metrics while training: logged with the loss, they choose the best model, and change nothing of the training."""

from __future__ import annotations

import json
import shutil

import pytest

from tunesmith import api, dataflow, evaluation, models
from tunesmith.compose import compose, overlaid
from tunesmith.display import Display
from tunesmith.errors import RecipeError
from tunesmith.evaluation.report import write_report
from tunesmith.recipe import Training
from tunesmith.training.callbacks import BestModel
from tunesmith.training.fit import _why


@pytest.fixture
def recipe(tiny_model_folder, question_file, tmp_path):
    def made(name, **changes):
        layer = {
            "output_dir": str(tmp_path / "runs"),
            "name": name,
            "model": {"base": str(tiny_model_folder)},
            "data": {"dataset": str(question_file), "max_length": 128, "validation": 0.3, "near_duplicates": "ignore"},
            "adapter": {"kind": "lora", "dropout": 0.1},
            "training": {
                "max_steps": 6, "per_device_train_batch_size": 2, "warmup_steps": 0, "learning_rate": 1e-2,
                "eval_steps": 2, "save_steps": 6, "load_best_model_at_end": False,
            },
            "evaluation": {"skip": True, "samples": 0, "max_new_tokens": 8},
        }  # fmt: skip
        return compose(overlaid(layer, changes)).recipe

    return made


def weights(run):
    return (run / "final_model" / "adapter_model.safetensors").read_bytes()


def losses(run):
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    kinds = ("step", "evaluation")
    return [(e["kind"], e["step"], e["loss"]) for e in events if e["kind"] in kinds], events


def test_metrics_are_measured_at_each_validation_and_training_is_the_same_to_the_bit(recipe):
    plain = api.train(recipe("plain")).run
    names = ["rougeL", "perplexity"]
    chosen = recipe("measured", training={"eval_metrics": names, "eval_samples": 5, "best_by": "rougeL"})
    measured = api.train(chosen).run
    assert weights(measured) == weights(plain)
    assert losses(measured)[0] == losses(plain)[0]
    events = losses(measured)[1]
    found = [e for e in events if e["kind"] == "evaluation"]
    assert [e["step"] for e in found] == [2, 4, 6]
    assert all(set(e["measures"]) == set(names) for e in found)
    assert not any(e.get("measures") for e in losses(plain)[1])
    # The last one is that of the final model, measured anew.
    folder = str(measured / "final_model")
    tokenizer = models.load_tokenizer(folder)
    items = dataflow.validation_items(chosen, dataflow.splits(chosen))
    assert len(items) == 5
    rows = evaluation.evaluate(
        models.load_model(folder), tokenizer, items, name="by hand", metrics=names, max_new_tokens=8
    )
    for name in names:
        assert found[-1]["measures"][name] == pytest.approx(evaluation.value(rows, name), rel=1e-4)
    page = write_report(measured).read_text()
    assert "ROUGE-L" in page
    assert "On a sample of the validation examples" in page
    assert "loss of the method" not in page
    info = json.loads((measured / "best_model" / "best_model_info.json").read_text())
    values = [e["measures"]["rougeL"] for e in found]
    assert info["by"] == "rougeL"
    assert (info["value"], info["step"]) == (max(values), found[values.index(max(values))]["step"])
    # Which step won, by what, and what all the others had.
    [won] = [e for e in events if e.get("name") == "best model"]
    assert won["step"] == info["step"]
    assert won["value"] == f"step {info['step']}, ROUGE-L {100 * info['value']:.1f}"
    assert won["reason"].startswith("the highest of 3 validations by training.best_by=rougeL: step 2: ")
    assert won["value"] in page
    [by_loss] = [e for e in losses(plain)[1] if e.get("name") == "best model"]
    assert "validation loss" in by_loss["value"]
    # While it trains the console has the metrics beside the loss.
    said = []
    with Display(quiet=False) as display:
        display._line = said.append
        for event in found:
            display(event)
    assert f"ROUGE-L {100 * values[0]:.1f}" in said[0]
    assert "perplexity" in said[0]
    shutil.rmtree(measured)


class Control:
    should_training_stop = False


class State:
    def __init__(self):
        self.global_step, self.log_history = 0, []


@pytest.mark.parametrize(
    ("by", "higher", "values", "saved", "stopped_at"),
    [
        ("exact_match", True, [0.1, 0.4, 0.4, 0.3], [0, 1], 3),
        ("perplexity", False, [9.0, 3.0, 4.0, 5.0], [0, 1], 3),
        ("loss", False, [9.0, 8.0, 7.0, 6.0], [0, 1, 2, 3], None),
    ],
)
def test_the_best_model_and_early_stopping_follow_what_the_recipe_names(
    by, higher, values, saved, stopped_at
):
    kept, state, stopped = [], State(), None
    best = BestModel(
        lambda step, loss, value: kept.append((step, value)),
        best=None,
        patience=2,
        by=by,
        higher_is_better=higher,
    )
    for step, value in enumerate(values):
        control = Control()
        metrics = {"eval_loss": 10.0 - step, f"eval_{by}": value}
        state.global_step = step
        state.log_history.append({"step": step, **metrics})
        best.on_evaluate(None, state, control, metrics)
        if control.should_training_stop and stopped is None:
            stopped = step
    assert kept == [(step, values[step]) for step in saved]
    assert stopped == stopped_at
    again = BestModel(lambda *facts: kept.append(facts), best=max(values) if higher else min(values),
                      patience=None, by=by, higher_is_better=higher)  # fmt: skip
    before = len(kept)
    again.on_evaluate(None, state, Control(), {"eval_loss": 1.0, f"eval_{by}": values[0]})
    assert len(kept) == before, "a resumed run does not take a worse model for the best one"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"best_by": "rougel"}}, "rougeL"),
        ({"training": {"best_by": "sql_execution"}}, "fits none"),
        (
            {"training": {"eval_metrics": ["exact_match"]}, "data": {"validation": 0.0}},
            "no validation example",
        ),
        ({"training": {"best_by": "ranking_accuracy"}}, "reward model"),
        ({"training": {"best_by": "mean_reward"}}, "no mean reward"),
        ({"training": {"eval_metrics": ["pass_at_1"]}}, "--run-code"),
        (
            {"training": {"eval_metrics": ["pass_at_10"]}, "evaluation": {"run_code": True, "attempts": 2}},
            "at least 10 answers",
        ),
    ],
)
def test_what_cannot_be_measured_is_said_before_the_start(recipe, changes, said):
    with pytest.raises(RecipeError, match=said):
        api.plan(recipe("bad", **changes))


def test_a_validation_measures_with_the_settings_of_the_evaluation(recipe, tiny_tokenizer, monkeypatch):
    given = {}

    def evaluate(model, tokenizer, items, **options):
        given.update(options)
        return []

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(evaluation, "value", lambda rows, name: None)
    section = {"run_code": True, "attempts": 3, "attempts_temperature": 0.5, "seed": 7}
    asked = recipe("code", training={"eval_metrics": ["pass_at_1"]}, evaluation=section)
    assert dataflow._measures(asked, tiny_tokenizer, "cpu", [], None) == {}
    assert {name: given[name] for name in ("run_code", "attempts", "temperature", "seed")} == {
        "run_code": True, "attempts": 3, "temperature": 0.5, "seed": 7,
    }  # fmt: skip


def test_a_best_by_that_never_had_a_value_is_said_at_the_end(recipe, monkeypatch):
    monkeypatch.setattr(evaluation, "value", lambda rows, name: None)
    run = api.train(recipe("none", training={"best_by": "rougeL", "max_steps": 2})).run
    said = [e["message"] for e in losses(run)[1] if e["kind"] == "warning"]
    assert any("training.best_by=rougeL had no value at any validation" in message for message in said)
    assert not (run / "best_model").exists()


def test_where_a_model_is_trained_on_what_it_writes_the_best_one_is_told_by_its_reward():
    log = [
        {"step": step, "eval_loss": 0.0 - reward, "eval_reward": reward}
        for step, reward in ((1, 0.25), (2, 0.5), (3, 0.0))
    ]
    told = _why(Training(), log, {"step": 2, "eval_loss": -0.5}, False)
    assert told["value"] == "step 2, mean reward 0.5000"
    assert told["reason"].startswith(
        "the highest of 3 validations by training.best_by=loss, which is the mean reward"
    )
    assert told["reason"].endswith("step 1: 0.2500, step 2: 0.5000, step 3: 0.0000")
    assert (
        _why(Training(), log[2:], {"step": 3, "eval_loss": 0.0}, False)["value"]
        == "step 3, mean reward 0.0000"
    )
    plain = [{name: entry[name] for name in ("step", "eval_loss")} for entry in log]
    assert (
        _why(Training(), plain, {"step": 2, "eval_loss": -0.5}, False)["value"]
        == "step 2, validation loss -0.5000"
    )
