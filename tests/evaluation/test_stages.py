"""A run on a run: every stage is measured on the same questions, and none on what it has learned."""

from __future__ import annotations

import json
import shutil

import pytest

from tunesmith import api
from tunesmith.compose import compose, overlaid
from tunesmith.training.run import Run


@pytest.fixture
def quick(tiny_model_folder, question_file, tmp_path):
    def recipe(**changes):
        layer = {
            "output_dir": str(tmp_path / "runs"),
            "model": {"base": str(tiny_model_folder)},
            "data": {"dataset": str(question_file), "max_length": 128},
            "training": {
                "max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 0, "learning_rate": 1e-2,
                "eval_steps": 1, "logging_steps": 1,
            },
            "evaluation": {"max_new_tokens": 4, "resamples": 100},
        }  # fmt: skip
        return compose(overlaid(layer, changes)).recipe

    return recipe


def lines(run: Run, file: str) -> list[dict]:
    return [json.loads(line) for line in (run.path / file).read_text(encoding="utf-8").splitlines()]


def fates(run: Run, fate: str) -> set[int]:
    return {row["row"] for row in lines(run, "ledger.jsonl") if row["fate"] == fate}


def asked(run: Run, file: str, model: str) -> list[str]:
    return [r["source_row"] for r in lines(run, f"evaluation/{file}") if r["model"] == model]


def test_each_stage_answers_the_same_questions(quick, tiny_model_folder, tmp_path):
    first = Run(api.train(quick(name="first", adapter={"kind": "lora"}, data={"held_out": 0.2})).run)
    wide = quick(name="second", model={"base": str(first.path)}, data={"held_out": 0.6})
    plan, _ = api.plan(wide)
    second = Run(api.train(wide).run)
    kept = second.read("evaluation/stages.json")
    names = [stage["name"] for stage in kept["stages"]]
    assert names == [tiny_model_folder.name, "first", "second"]
    assert [stage["method"] for stage in kept["stages"]] == [None, "sft", "sft"]

    # Questions that the first run learned prove nothing about either.
    mine = {
        f"{row}" for row in fates(second, "held_out") - fates(first, "train") - fates(first, "validation")
    }
    assert fates(second, "held_out") & fates(first, "train"), "negative control: the splits overlap"
    questions = asked(second, "rows.jsonl", "base")
    assert {row.rsplit(":", 1)[-1] for row in questions} == mine
    assert asked(second, "rows.jsonl", "tuned") == questions
    assert asked(second, "stages.jsonl", names[0]) == questions
    left_out = len(fates(second, "held_out")) - len(mine)
    assert any(f"{left_out} held-out examples are left out" in str(d.value) for d in plan.decisions)

    # The scores are those of the comparison; the stage before the base is another model than the base.
    comparison = second.read("evaluation/comparison.json")["comparisons"]
    for compared in comparison:
        values = [stage["scores"][compared["metric"]]["value"] for stage in kept["stages"]]
        assert values[1:] == pytest.approx([compared["base"], compared["tuned"]])
    perplexity = [stage["scores"]["perplexity"]["value"] for stage in kept["stages"]]
    assert len(set(perplexity)) == 3
    page = (second.path / "report.html").read_text(encoding="utf-8")
    assert "Every model on the way to this one" in page
    [way] = [e for e in second.events() if e.get("name") == "stages"]
    assert "first (sft)" in way["value"]
    assert way["value"].count("->") == 2


def test_stages_can_be_left_out_and_may_be_gone(quick, tiny_model_folder, tmp_path):
    moved = tmp_path / "base"
    shutil.copytree(tiny_model_folder, moved)
    first = Run(api.train(quick(name="first", model={"base": str(moved)}, evaluation={"skip": True})).run)
    shutil.rmtree(moved)
    second = Run(api.train(quick(name="second", model={"base": str(first.path)})).run)
    assert any("is not measured" in e["message"] for e in second.events() if e["kind"] == "warning")
    assert not (second.path / "evaluation" / "stages.json").exists()
    third = quick(name="third", model={"base": str(second.path)}, evaluation={"stages": False})
    assert not (Run(api.train(third).run).path / "evaluation" / "stages.json").exists()


def test_a_run_on_no_run_has_no_stages(quick):
    run = Run(api.train(quick()).run)
    assert not (run.path / "evaluation" / "stages.json").exists()
    assert "Every model on the way" not in (run.path / "report.html").read_text(encoding="utf-8")


def test_samples_are_answered_at_each_validation_and_change_nothing(quick):
    def trained(**changes):
        return Run(api.train(quick(name=f"run{len(changes)}", evaluation={"skip": True, **changes})).run)

    run, without = trained(), trained(samples=0)
    samples = [event for event in run.events() if event["kind"] == "sample"]
    assert [event["step"] for event in samples] == [1, 1, 1, 2, 2, 2]
    assert len({event["prompt"] for event in samples}) == 3
    assert all(event["prompt"] for event in samples)
    assert not [event for event in without.events() if event["kind"] == "sample"]
    losses = [[e["loss"] for e in r.events() if e["kind"] in ("step", "evaluation")] for r in (run, without)]
    assert losses[0] == losses[1]
    assert losses[0]
