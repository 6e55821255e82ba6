"""In a run: the engine check lies in its folder and on its page, and a stopped measurement goes on where it stopped."""

from __future__ import annotations

import json
import os
import signal
from functools import partial

import pytest
import torch
from counting import PROMPTS, STOP, TOKENIZER, counting_llama

from tunesmith import api, evaluation
from tunesmith.compose import compose, overlaid
from tunesmith.data.examples import Row
from tunesmith.errors import Interrupted
from tunesmith.evaluation import Item
from tunesmith.evaluation.report import write_report
from tunesmith.training.run import open_run


def made(model, folder, **changes):
    file = folder / "questions.jsonl"
    colors = ("red", "blue", "green", "one", "two")
    rows = [{"prompt": f"what is the count of {i}", "response": f"{colors[i % 5]} {i}"} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    layer = {
        "output_dir": str(folder / "runs"),
        "name": "run",
        "model": {"base": str(model)},
        "data": {"dataset": str(file), "max_length": 128, "near_duplicates": "ignore", "held_out": 0.5},
        "training": {
            "max_steps": 2, "per_device_train_batch_size": 2, "warmup_steps": 0, "eval_steps": 2, "save_steps": 2,
        },
        "evaluation": {"max_new_tokens": 4, "resamples": 100, "batch_tokens": 1, "samples": 0},
    }  # fmt: skip
    return compose(overlaid(layer, changes)).recipe


@pytest.fixture
def recipe(tiny_model_folder, tmp_path):
    return partial(made, tiny_model_folder, tmp_path)


@pytest.fixture(scope="module")
def padded(tiny_model_folder, tmp_path_factory):
    """A run that went through, which several tests look at."""
    folder = tmp_path_factory.mktemp("padded")
    return open_run(api.train(made(tiny_model_folder, folder)).run)


def test_a_run_tells_of_both_models_that_their_answers_are_their_own(padded):
    run = padded
    kept = run.read("evaluation/engine_check.json")
    assert list(kept) == ["base", "tuned"]
    for check in kept.values():
        assert check["engine"] == "padded"
        assert check["passed"]
        assert check["sentence"].startswith("8/8 equal or near tie")
        assert len({read["item"] for read in check["items"]}) == 8
    assert [read["item"] for read in kept["base"]["items"]] == [r["item"] for r in kept["tuned"]["items"]]
    told = {e["name"]: e["value"] for e in run.events() if e["kind"] == "decision"}
    assert told["engine check of tuned"] == kept["tuned"]["sentence"]
    page = (run.path / "report.html").read_text()
    assert "engine check of base (padded): 8/8 equal or near tie" in page
    rows = evaluation.read_rows(run.evaluation / "rows.jsonl")
    assert {row.generation["engine"] for row in rows} == {"padded"}
    assert not list((run.evaluation / "answers").iterdir()), "the rows are written, so nothing has to be kept"


@pytest.mark.thorough
def test_the_paged_engine_answers_for_both_and_gives_the_same_run(recipe, padded):
    padded = evaluation.read_rows(api.train(recipe(name="a")).run / "evaluation" / "rows.jsonl")
    result = api.train(recipe(name="b", evaluation={"engine": "paged"}))
    rows = evaluation.read_rows(result.run / "evaluation" / "rows.jsonl")
    assert {row.generation["engine"] for row in rows} == {"paged"}
    assert [(row.model, row.item, row.output) for row in rows] == [
        (r.model, r.item, r.output) for r in padded
    ]


def test_a_failed_check_is_a_warning_that_the_verdict_carries(recipe, monkeypatch):
    import tunesmith.generation as generation
    from tunesmith import engines

    inner = generation.generate

    def drawn(model, tokenizer, prompts, **options):
        """The bug: answers are drawn, though greedy ones were asked for."""
        return inner(model, tokenizer, prompts, **{**options, "temperature": 5.0})

    monkeypatch.setattr(engines, "generate", drawn)
    result = api.train(recipe())
    run = open_run(result.run)
    kept = run.read("evaluation/engine_check.json")
    assert not kept["tuned"]["passed"]
    assert any(
        "engine check of tuned failed" in str(e.get("message"))
        for e in run.events()
        if e["kind"] == "warning"
    )
    primary = next(c for c in result.comparisons if c.primary)
    assert any("engine check of tuned failed" in remark for remark in primary.remarks)
    page = write_report(run.path).read_text()
    assert "so this verdict may be the engine" in page
    card = (run.final_model / "README.md").read_text()
    assert "engine check of tuned failed" in card


@pytest.mark.parametrize("stage", ["base: answers", "tuned: answers"])
def test_a_measurement_that_is_stopped_goes_on_where_it_stopped(recipe, padded, stage):
    def stop(event):
        if event["kind"] == "progress" and event["stage"] == stage and event["done"] == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="resume"):
        api.train(recipe(), watch=stop)
    run = open_run(recipe().output_dir + "/run")
    assert run.state() == "interrupted"
    [file] = (run.evaluation / "answers").glob(f"answers-{stage[:4]}*.jsonl")
    assert len(file.read_text().splitlines()) >= 6
    told = []
    api.resume(run.path, watch=lambda e: told.append(e["done"]) if e.get("stage") == stage else None)
    assert told[0] >= 6, "no answer is made again"
    rows = evaluation.read_rows(run.evaluation / "rows.jsonl")
    other = evaluation.read_rows(padded.evaluation / "rows.jsonl")
    assert [(r.model, r.item, r.output, r.scores) for r in rows] == [
        (r.model, r.item, r.output, r.scores) for r in other
    ]


def test_evaluating_afterwards_keeps_the_check_beside_the_scores(recipe):
    run = api.train(recipe(evaluation={"skip": True})).run
    result = api.evaluate(run, settings={"evaluation": {"engine_check": 3}})
    kept = json.loads((result.run / "engine_check.json").read_text())
    assert kept["model"]["sentence"] == "3/3 equal or near tie"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_the_likelihood_of_a_batch_is_that_of_each_row_alone(dtype, tolerance):
    model = counting_llama().to(dtype)
    items = []
    for number, prompt in enumerate(PROMPTS):
        ids = (*prompt, *range(prompt[-1] + 1, prompt[-1] + 6), STOP)
        labels = (*(-100 for _ in prompt), *ids[len(prompt) :])
        items.append(Item(number, Row("t", number), None, None, (), ids, labels))

    def nll(size):
        options = {"name": "m", "metrics": ["perplexity"], "batch_tokens": size}
        return [row.nll / row.tokens for row in evaluation.evaluate(model, TOKENIZER, items, **options)]

    assert nll(8192) == pytest.approx(nll(1), abs=tolerance)


def test_a_measurement_that_ends_leaves_another_one_s_answers(tiny_model_folder, tmp_path, monkeypatch):
    """Without a run all measurements keep their answers below one folder."""
    monkeypatch.chdir(tmp_path)
    recipe = made(tiny_model_folder, tmp_path)
    options = {"dataset": recipe.data.dataset, "settings": {"evaluation": {"max_new_tokens": 4}}}

    def stop(event):
        if event["kind"] == "progress" and event["stage"] == "model: answers" and event["done"] == 7:
            raise KeyboardInterrupt

    few = {"evaluation": {"max_new_tokens": 4, "batch_tokens": 1}}
    with pytest.raises(KeyboardInterrupt):
        api.evaluate(tiny_model_folder, **{**options, "settings": few}, watch=stop)
    [kept] = (tmp_path / "evaluations" / "answers").rglob("answers-*.jsonl")
    api.evaluate(tiny_model_folder, **options)
    assert kept.exists(), "it belongs to the measurement that was stopped"
    told = []
    api.evaluate(
        tiny_model_folder,
        **{**options, "settings": few},
        watch=lambda e: told.append(e["done"]) if e.get("stage") == "model: answers" else None,
    )
    assert told[0] >= 6
    assert not kept.exists()
