"""The main path end to end on the 14k-parameter model: every data set, every adapter, stop and resume, bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tunesmith import api, dataflow
from tunesmith.assets import EXAMPLES
from tunesmith.compose import compose, overlaid
from tunesmith.errors import DataError, Interrupted, ModelError, RunError, TrainingDiverged, TunesmithError
from tunesmith.recipe import Data
from tunesmith.training.run import Run, create, open_run

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def quick(tiny_model_folder, question_file, tmp_path):
    """A recipe of four steps on forty questions, with changes."""

    def recipe(**changes):
        layer = {
            "output_dir": str(tmp_path / "runs"),
            "model": {"base": str(tiny_model_folder)},
            "data": {"dataset": str(question_file), "max_length": 128},
            "training": {
                "max_steps": 4, "per_device_train_batch_size": 4, "warmup_steps": 0, "learning_rate": 1e-2,
                "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "scheduler": "linear",
            },
            "evaluation": {"max_new_tokens": 4, "resamples": 200},
        }  # fmt: skip
        return compose(overlaid(layer, changes)).recipe

    return recipe


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_run_folder_explains_itself(quick):
    seen = []
    result = api.train(quick(), watch=seen.append)
    run = Run(result.run)
    for name in ("recipe.yaml", "environment.json", "ledger.jsonl", "plan.json", "events.jsonl", "status.json",
                 "report.html", "evaluation/rows.jsonl", "evaluation/scores.json", "evaluation/comparison.json",
                 "final_model/README.md", "final_model/config.json", "best_model/best_model_info.json"):  # fmt: skip
        assert (run.path / name).stat().st_size > 0, name
    assert run.state() == "done"
    assert run.recipe() == quick()
    rows = run.read("plan.json")["rows"]
    assert rows["rows_in"] == rows["train"] + rows["validation"] + rows["held_out"] + rows["dropped"] == 40
    ledger = [json.loads(line) for line in (run.path / "ledger.jsonl").read_text().splitlines()]
    assert len(ledger) == 40
    steps = [event for event in run.events() if event["kind"] == "step"]
    assert [event["step"] for event in steps] == [1, 2, 3, 4]
    assert {"loss", "learning_rate", "grad_norm", "tokens", "seconds", "memory"} <= steps[0].keys()
    rates = [step["learning_rate"] for step in steps]
    assert rates[0] > rates[-1] >= 0, "the linear schedule, as it was used"
    assert all(step["grad_norm"] > 0 for step in steps)
    measured = [*steps, *(e for e in run.events() if e["kind"] == "evaluation")]
    assert all(0 <= event["token_accuracy"] <= 1 for event in measured), "of training and of validation"
    validations = {e["step"]: e["loss"] for e in run.events() if e["kind"] == "evaluation"}
    assert run.read("training.json")["step_of_final_model"] == min(validations, key=validations.get)
    assert any(event["kind"] == "progress" and event["stage"] == "training" for event in seen)
    assert not any("training_args" in p.name or ".staging" in str(p) for p in run.path.rglob("*"))
    models = {json.loads(line)["model"] for line in (run.evaluation / "rows.jsonl").read_text().splitlines()}
    assert models == {"base", "tuned"}
    assert result.primary.n == rows["held_out"]
    assert result.as_dict().keys() >= {
        "metric", "base", "tuned", "difference", "low", "high", "n", "verdict", "seconds", "run",
    }  # fmt: skip
    [summary] = api.runs(run.path.parent)
    assert (summary.state, summary.verdict, summary.step) == ("done", result.primary.verdict, 4)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_shipped_data_set_trains(quick, name):
    result = api.train(quick(data={"dataset": f"example:{name}", "max_rows": 60, "max_length": 512}))
    counts = Run(result.run).read("plan.json")["rows"]
    assert counts["train"] > 0
    assert result.comparisons


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize("file", ["alpaca_en_demo.json", "dpo_en_demo.json", "kto_en_demo.json"])
def test_real_data_sets_train(quick, file):
    result = api.train(
        quick(
            data={
                "dataset": str(SHARED / file),
                "max_rows": 30,
                "max_length": 256,
                "over_long": "truncate_answers",
                "on_breach": "drop",
            },
            evaluation={"max_items": 2},
        )
    )
    assert Run(result.run).read("plan.json")["rows"]["train"] > 0


ADAPTERS = {
    "full": {"kind": "full"},
    "freeze": {"kind": "freeze", "ratio": 0.5},
    "lora": {"kind": "lora", "rank": 4},
    "rslora": {"kind": "lora", "rank": 4, "rank_stabilized": True},
    "dora": {"kind": "lora", "rank": 4, "dora": True},
    "pissa": {"kind": "lora", "rank": 4, "init": "pissa"},
    "pissa-niter": {"kind": "lora", "rank": 4, "init": "pissa_niter_16"},
    "olora": {"kind": "lora", "rank": 4, "init": "olora"},
    "modules": {"kind": "lora", "rank": 4, "modules_to_save": ["norm"]},
    "all-linear": {"kind": "lora", "rank": 4, "targets": "all-linear", "bias": "lora_only"},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_trains_only_its_own_and_reloads_plainly(quick, tiny_model_folder, adapter):
    recipe = quick(adapter=ADAPTERS[adapter], training={"learning_rate": 5e-2})
    run = Run(api.train(recipe).run)
    cards = [path.parent.name for path in run.path.rglob("README.md")]
    assert cards == ["final_model"], "a card of ours or none, never PEFT's empty form"
    base = weights(tiny_model_folder)
    final = weights(run.final_model)
    kind = recipe.adapter.kind
    if kind == "full":
        assert final.keys() == base.keys()
        assert all(not torch.equal(final[name], base[name]) for name in base)
    elif kind == "freeze":
        changed = {name for name in base if not torch.equal(final[name], base[name])}
        assert changed == {
            name for name in base if "layers.2." in name or "layers.3." in name or "model.norm" in name
        }
    else:
        assert all(".lora_" in name or "norm" in name for name in final)

    # five lines of plain transformers and PEFT
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loader = AutoModelForCausalLM if kind in ("full", "freeze") else AutoPeftModelForCausalLM
    model = loader.from_pretrained(run.final_model)
    tokenizer = AutoTokenizer.from_pretrained(run.final_model)

    assert tokenizer.chat_template
    # the plainly loaded model gives the validation loss that training measured on that step
    encodings = dataflow.encodings(recipe, dataflow.splits(recipe))
    losses = [
        (
            model(torch.tensor([e.input_ids]), labels=torch.tensor([e.labels])).loss.item(),
            sum(x != -100 for x in e.labels),
        )
        for e in encodings.validation
    ]
    plain = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    recorded = run.read("training.json")["validation_loss"]
    assert plain == pytest.approx(recorded, rel=2e-3)
    before = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    untrained = [
        before(torch.tensor([e.input_ids]), labels=torch.tensor([e.labels])).loss.item()
        for e in encodings.validation
    ]
    assert recorded < 0.995 * sum(untrained) / len(untrained), (
        "negative control: training must have changed the loss"
    )


@pytest.mark.parametrize(
    "second", ["lora", *(pytest.param(k, marks=pytest.mark.thorough) for k in ("full", "freeze"))]
)
def test_a_tuned_run_as_the_base_of_another(quick, second):
    """What is delivered rests on the first run's weights too, and reloads as it was measured in training."""
    from tunesmith import models

    first = Run(
        api.train(quick(name="first", adapter=ADAPTERS["lora"], training={"learning_rate": 5e-2})).run
    )
    recipe = quick(
        name="second",
        adapter=ADAPTERS[second],
        model={"base": str(first.path)},
        training={"learning_rate": 1e-3},
    )
    run = Run(api.train(recipe).run)
    model = models.load_model(str(run.path))
    encodings = dataflow.encodings(recipe, dataflow.splits(recipe))
    losses = [
        model(torch.tensor([e.input_ids]), labels=torch.tensor([e.labels])).loss.item()
        for e in encodings.validation
    ]
    recorded = run.read("training.json")["validation_loss"]
    assert sum(losses) / len(losses) == pytest.approx(recorded, rel=5e-3)
    assert recorded < first.read("training.json")["validation_loss"] * 1.001


@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        ("full", {"packing": True}),
        ("dora", {"gradient_accumulation_steps": 2}),
        pytest.param("full", {}, marks=pytest.mark.thorough),
        pytest.param("dora", {}, marks=pytest.mark.thorough),
        pytest.param("full", {"gradient_accumulation_steps": 2}, marks=pytest.mark.thorough),
        pytest.param("full", {"gradient_checkpointing": True}, marks=pytest.mark.thorough),
        pytest.param("dora", {"gradient_checkpointing": True}, marks=pytest.mark.thorough),
        pytest.param("dora", {"packing": True}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_an_interrupted_run_continues_to_the_bit(quick, options, adapter):
    packing = {"packing": options.get("packing", False)}
    steps = {name: value for name, value in options.items() if name != "packing"}
    changes = {
        "data": packing,
        "training": {"max_steps": 6, "save_steps": 100, **steps},
        "adapter": ADAPTERS[adapter],
    }
    straight = Run(api.train(quick(name="straight", **changes)).run)

    def stop_at_three(event):
        if event["kind"] == "progress" and event["stage"] == "training" and event["done"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    recipe = quick(name="stopped", **changes)
    with pytest.raises(Interrupted, match="step 3 of 6") as stopped:
        api.train(recipe, watch=stop_at_three)
    run = open_run(Path(recipe.output_dir) / "stopped")
    assert f"tunesmith resume {run.path}" in str(stopped.value)
    assert run.state() == "interrupted"
    assert [p.name for p in run.checkpoints.iterdir()] == ["checkpoint-step-3"]
    api.resume(run.path)
    assert run.state() == "done"
    assert same(weights(run.final_model), weights(straight.final_model))
    losses = lambda r: {e["step"]: e["loss"] for e in r.events() if e["kind"] == "step"}  # noqa: E731
    assert losses(run) == losses(straight)


def first_step(run: Path) -> dict[str, float]:
    return next(event for event in Run(run).events() if event["kind"] == "step")


def test_packing_changes_the_rows_and_not_the_loss(quick):
    """One step over all examples, packed and not: the same loss and gradient norm, in fewer rows."""
    changes = {
        "data": {"validation": 0.0, "held_out": 0.1},
        "training": {"max_steps": 1, "per_device_train_batch_size": 64},
        "evaluation": {"skip": True},
    }
    plain = api.train(quick(name="plain", **changes))
    packed = api.train(quick(name="packed", **overlaid(changes, {"data": {"packing": True}})))
    a, b = first_step(plain.run), first_step(packed.run)
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    rows = {name: Run(run).read("plan.json") for name, run in (("plain", plain.run), ("packed", packed.run))}
    assert rows["packed"]["examples"] == rows["plain"]["examples"] == rows["plain"]["batch_rows"]
    assert rows["packed"]["batch_rows"] < rows["plain"]["batch_rows"]
    assert "packed rows" in next(
        d["reason"] for d in rows["packed"]["decisions"] if d["name"] == "total_steps"
    )
    assert rows["packed"]["tokens_per_epoch"] == rows["plain"]["tokens_per_epoch"]
    assert any("padding" in decision["value"] for decision in rows["packed"]["decisions"])


def test_packing_is_refused_where_examples_would_see_one_another(quick, monkeypatch):
    monkeypatch.setattr("tunesmith.data.packing.isolates", lambda model: False)
    with pytest.raises(ModelError, match="would see one another"):
        api.train(quick(data={"packing": True}))


def test_resuming_by_name_and_what_may_not_change(quick):
    run = Run(api.train(quick(training={"save_total_limit": 9})).run)
    with pytest.raises(RunError, match="finished"):
        api.resume(run.path)
    with pytest.raises(RunError, match=r"training.learning_rate was 0.01, is 0.5"):
        api.train(quick(training={"save_total_limit": 9, "learning_rate": 0.5}), resume="latest")


def test_the_same_recipe_gives_the_same_run(quick):
    a, b = (Run(api.train(quick(name=name)).run) for name in ("a", "b"))
    assert same(weights(a.final_model), weights(b.final_model))
    c = Run(api.train(quick(name="c", training={"seed": 1})).run)
    assert not same(weights(a.final_model), weights(c.final_model)), "negative control: another seed"


def test_early_stopping_stops(quick):
    result = api.train(
        quick(training={"learning_rate": 3.0, "max_steps": 40, "eval_steps": 1, "early_stopping_patience": 2})
    )
    assert Run(result.run).read("training.json")["steps"] < 40


def test_a_loss_that_is_no_number_stops_before_the_update(quick, monkeypatch):
    from tunesmith.training import fit as fitting

    recipe = quick(name="diverged")
    real = fitting.fit

    def poisoned(trainer, *args, **kwargs):
        inner = trainer.compute_loss
        trainer.compute_loss = lambda *a, **k: (
            inner(*a, **k)
            * (float("nan") if trainer.state.global_step == 2 and trainer.model.training else 1)
        )
        return real(trainer, *args, **kwargs)

    monkeypatch.setattr(dataflow, "fit", poisoned)
    with pytest.raises(TrainingDiverged, match="step 3"):
        api.train(recipe)
    run = open_run(Path(recipe.output_dir) / "diverged")
    assert run.state() == "failed"
    assert all(torch.isfinite(t).all() for t in weights(run.checkpoints / "checkpoint-step-2").values())


def test_five_rows_train(quick, tmp_path):
    file = tmp_path / "five.json"
    file.write_text(json.dumps([{"question": f"what is {i}", "reply": f"one {i}"} for i in range(5)]))
    result = api.train(quick(data={"dataset": str(file)}))
    assert Run(result.run).read("plan.json")["rows"]["train"] == 3
    assert result.primary.verdict == "inconclusive"
    [warning] = [e for e in Run(result.run).events() if e["kind"] == "warning"]
    assert warning["message"].startswith("No verdict will be possible: 1 held-out items are too few")
    card = (result.run / "final_model" / "README.md").read_text()
    assert warning["message"] in card


def test_tasks_without_held_out_rows_train_and_say_so(quick):
    result = api.train(quick(data={"held_out": 0.0, "validation": 0.0}))
    assert result.primary is None
    assert result.report.exists()


def test_evaluating_and_comparing_afterwards(quick, tiny_model_folder, question_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = api.train(quick())
    again = api.evaluate(trained.run)
    assert again.scores["exact_match"]["value"] == pytest.approx(
        next(c.tuned for c in trained.comparisons if c.metric == "exact_match")
    )
    assert (again.run / "rows.jsonl").exists()
    compared = api.compare(str(tiny_model_folder), trained.run)
    assert compared.primary.difference == pytest.approx(trained.primary.difference)
    swapped = api.compare(trained.run, str(tiny_model_folder))
    assert swapped.primary.difference == pytest.approx(-trained.primary.difference)
    other = api.evaluate(str(tiny_model_folder), dataset=str(question_file), metrics=["perplexity"])
    assert other.scores["perplexity"]["n"] == 40
    with pytest.raises(TunesmithError, match="measured on"):
        api.evaluate(str(tiny_model_folder))


def learned_from(run: Path) -> set[str]:
    """Questions of the rows that a run trained or validated on, by its ledger and its data file."""
    recipe = Run(run).recipe()
    rows = [json.loads(line) for line in Path(recipe.data.dataset).read_text().splitlines()]
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    return {rows[entry["row"] - 1]["prompt"] for entry in ledger if entry["fate"] in ("train", "validation")}


def asked_in(folder: Path) -> set[str]:
    return {json.loads(line)["prompt_text"] for line in (folder / "rows.jsonl").read_text().splitlines()}


def test_no_model_is_measured_on_what_it_learned(quick, question_file, tmp_path):
    """The other side may have another share, another file, another order, another system message or base."""
    wide = api.train(quick(name="wide", data={"held_out": 0.5})).run
    lines = question_file.read_text().splitlines()[::-1]
    copy = tmp_path / "copy.jsonl"
    copy.write_text("\n".join(lines[5:]))
    narrow = api.train(
        quick(name="narrow", data={"dataset": str(copy), "held_out": 0.1, "system_prompt": "Be short."})
    ).run
    seen = learned_from(narrow)
    own = asked_in(api.evaluate(wide).run)
    assert own & seen, "negative control: the two runs do overlap"
    told = []
    compared = api.compare(wide, narrow, watch=told.append)
    assert compared.saved == tmp_path / "runs" / "comparisons" / "wide_vs_narrow"
    assert asked_in(compared.saved) == own - seen - learned_from(wide)
    facts = compared.as_dict()
    assert facts["measured_on"]["split_of"] == str(wide)
    assert facts["measured_on"]["left_out"] == {str(narrow): len(own & seen)}
    assert compared.primary.n == facts["measured_on"]["questions"] == len(own - seen)
    assert (facts["a"], facts["b"]) == ("wide", "narrow")
    [line] = [e for e in told if e.get("name") == "measured on"]
    assert f"{len(own & seen)} are left out, {narrow} was trained or validated on them" in line["reason"]
    assert any(e.get("stage", "").startswith("narrow:") for e in told)
    saved = json.loads((compared.saved / "comparison.json").read_text())
    assert (saved["a"], saved["b"]) == (str(wide), str(narrow))
    assert saved["comparisons"][0]["n"] == len(own - seen)

    # a folder inside the run, and a run that rests on it, have learned the same
    assert asked_in(api.compare(wide, narrow / "best_model").saved) == own - seen
    above = api.train(quick(name="above", model={"base": str(narrow)}, data={"held_out": 0.5})).run
    assert asked_in(api.compare(wide, above).saved) == own - seen

    # nothing that both have not seen
    rest = tmp_path / "rest.jsonl"
    rest.write_text("\n".join(line for line in lines if json.loads(line)["prompt"] in seen))
    with pytest.raises(TunesmithError, match=r"No question is left(.|\n)*--dataset"):
        api.compare(wide, narrow, dataset=str(rest))


def test_every_row_of_another_set_is_used_but_what_was_learned(quick, question_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = api.train(quick(data={"max_rows": 30})).run
    seen = learned_from(run)
    told = []
    scores = api.evaluate(run, dataset=str(question_file), metrics=["perplexity"], watch=told.append)
    # Its own set by name, as it was read then; and a bigger one
    assert asked_in(scores.run).isdisjoint(seen)
    more = tmp_path / "more.jsonl"
    extra = [json.dumps({"prompt": f"say {n}", "response": "yes"}) for n in range(60)]
    more.write_text(question_file.read_text() + "\n".join(extra))
    scores = api.evaluate(run, dataset="more.jsonl", metrics=["perplexity"], watch=told.append)
    assert scores.scores["perplexity"]["n"] == 100 - len(seen)
    assert scores.as_dict()["measured_on"]["left_out"] == {str(run): len(seen)}
    assert f"{100 - len(seen)} of 100 questions of more.jsonl" in [e.get("value") for e in told]


def test_a_plain_copy_of_a_model_has_learned_what_its_run_has(quick, question_file, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = api.train(quick()).run
    seen = learned_from(run)
    copy = tmp_path / "away" / "model"
    shutil.copytree(run / "final_model", copy)
    options = {"dataset": str(question_file), "metrics": ["perplexity"]}
    # Beside its run the copy is that run's; with the run gone it is known by what it carries.
    found = api.evaluate(copy, **options).measured_on
    assert found.left_out == {str(run): len(seen)}
    assert (found.copies, found.unchecked) == ((), {})
    run.parent.rename(tmp_path / "elsewhere")
    told = []
    scores = api.evaluate(copy, watch=told.append, **options)
    assert scores.measured_on.left_out == {str(copy): len(seen)}
    assert asked_in(scores.run).isdisjoint(seen)
    assert scores.measured_on.copies == (str(copy),)
    [said] = [e["reason"] for e in told if e.get("name") == "measured on"]
    assert "near-copies are not" in said
    # A model that is trained on the copy has learned the same.
    above = api.train(quick(name="above", model={"base": str(copy)}, data={"held_out": 0.5})).run
    assert asked_in(above / "evaluation").isdisjoint(seen)
    lone = tmp_path / "lone"
    shutil.copytree(above / "final_model", lone)
    above.parent.rename(tmp_path / "gone")
    again = api.evaluate(lone, **options).measured_on
    assert again.left_out[str(lone)] >= len(seen)
    # What cannot be known is said, and a damaged record is not taken for none.
    (lone / "learned.json").write_text("{}")
    assert "damaged" in api.evaluate(lone, **options).measured_on.unchecked[str(lone)]
    (lone / "learned.json").unlink()
    unknown = api.evaluate(lone, **options).measured_on
    assert "trained" in unknown.unchecked[str(lone)]
    assert "no run here" not in unknown.sentences()[1]


def test_a_run_whose_data_are_gone_is_said_to_be_unchecked(quick, question_file, tmp_path):
    run = api.train(quick()).run
    other = tmp_path / "other.jsonl"
    seen = learned_from(run)
    question_file.rename(other)
    known = api.evaluate(run, dataset=str(other), metrics=["perplexity"]).measured_on
    assert (known.questions, known.copies) == (40 - len(seen), (str(run),)), "by the marks that it carries"
    (run / "final_model" / "learned.json").unlink()
    told = []
    scores = api.evaluate(run, dataset=str(other), metrics=["perplexity"], watch=told.append)
    assert scores.measured_on.questions == 40
    assert list(scores.measured_on.unchecked) == [str(run)]
    question_file.write_text(other.read_text().replace("what is", "where is"))
    changed = api.evaluate(run, dataset=str(other), metrics=["perplexity"])
    assert "is not what it was" in changed.measured_on.unchecked[str(run)]
    assert any(e["kind"] == "warning" and "not known" in e["message"] for e in told)


def test_the_dataflow_runs_under_a_plain_hamilton_driver(quick):
    from hamilton import driver

    flow = driver.Builder().with_modules(dataflow).build()
    result = flow.execute(["plan", "splits"], inputs={"recipe": quick()})
    assert result["plan"].total_steps == 4
    assert (
        len(result["splits"].train) + len(result["splits"].validation) + len(result["splits"].held_out) == 40
    )


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"data": {"dataset": "missing.jsonl"}}, DataError, "missing.jsonl"),
        ({"data": {"dataset": "example:sqll"}}, DataError, "sql"),
        ({"data": {"input_text_key": "qestion", "output_text_key": "response"}}, DataError, "prompt"),
        ({"data": {"format": "nonsense"}}, DataError, "messages"),
        ({"model": {"base": "./no/model"}}, ModelError, "no model folder"),
        ({"adapter": {"kind": "lora", "targets": ["q_prj"]}}, ModelError, "q_proj"),
        ({"evaluation": {"metrics": ["rougeX"]}}, TunesmithError, "Did you mean"),
        ({"export": {"push_to_hub": True}}, TunesmithError, "hub-model-id"),
        ({"tracking": {"trackers": ["trackio"]}}, TunesmithError, "pip install"),
        ({"data": {"max_length": 513}}, ModelError, "max-length 512"),
        ({"adapter": {"kind": "lora", "modules_to_save": ["nrm"]}}, ModelError, "'norm'"),
        ({"adapter": {"kind": "freeze", "ratio": 0.1}}, ModelError, "freezes no layer"),
        ({"adapter": {"kind": "lora", "init": "pissa", "rank": 9}}, ModelError, "--lora-rank 8 or less"),
        ({"adapter": {"kind": "lora", "init": "olora", "rank": 9}}, ModelError, "--lora-rank 8 or less"),
    ],
    ids=str,
)
def test_bad_input_is_one_clear_error_and_leaves_nothing(quick, tmp_path, changes, error, expected):
    with pytest.raises(error, match="(?s)" + expected) as trained:
        api.train(quick(**changes))
    with pytest.raises(error) as planned:
        api.plan(quick(**changes))
    assert str(planned.value) == str(trained.value), "plan refuses what train refuses"
    assert list((tmp_path / "runs").glob("*")) == []


def test_the_model_is_checked_before_the_rows_are_read(quick, monkeypatch):
    monkeypatch.setattr(dataflow.data, "prepare", lambda *_: pytest.fail("rows were read"))
    for changes in ({"adapter": {"kind": "lora", "targets": ["q_prj"]}}, {"data": {"max_length": 9999}}):
        for verb in (api.plan, api.train):
            with pytest.raises(ModelError):
                verb(quick(**changes))


@pytest.mark.parametrize("file", ["questions.jsonl", "missing.jsonl"])
def test_a_run_resumes_from_another_folder_or_stays_as_it_was(
    quick, tmp_path, monkeypatch, question_file, file
):
    """Its data set and model were named from where it was started."""
    monkeypatch.chdir(tmp_path)
    os.symlink(quick().model.base, "model")
    recipe = quick(
        name="moved",
        model={"base": "model"},
        data={"dataset": question_file.name, "mix": [{"dataset": question_file.name, "max_rows": 5}]},
    )

    def stop(event):
        if event["kind"] == "progress" and event["stage"] == "training" and event["done"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        api.train(recipe, watch=stop)
    run = open_run(tmp_path / "runs" / "moved")
    kept = run.recipe()
    assert [kept.data.dataset, kept.data.mix[0].dataset] == [str(question_file)] * 2
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    if file == "missing.jsonl":
        question_file.rename(tmp_path / "gone")
        with pytest.raises(DataError, match="questions"):
            api.resume(run.path)
        assert run.state() == "interrupted"
        (tmp_path / "gone").rename(question_file)
    assert api.resume(run.path).primary
    assert run.state() == "done"
    card = (run.final_model / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "dataset: questions" in card


def test_a_folder_that_is_another_run_s_is_refused_and_kept(quick):
    first = api.train(quick())
    before = sorted(p.name for p in first.run.rglob("*"))
    with pytest.raises(RunError, match="another run's"):
        api.train(quick(training={"seed": 7}))
    assert sorted(p.name for p in first.run.rglob("*")) == before


def test_a_stop_before_training_leaves_an_interrupted_run_that_resumes(quick):
    recipe = quick(name="early")

    def stop(event):
        if event["kind"] == "state" and event.get("state") == "prepared":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="resume"):
        api.train(recipe, watch=stop)
    run = open_run(Path(recipe.output_dir) / "early")
    assert run.state() == "interrupted"
    assert api.resume(run.path).primary


def test_trackers_receive_the_metrics(quick):
    pytest.importorskip("tensorboard")
    run = Run(api.train(quick(tracking={"trackers": ["tensorboard"]})).run)
    assert list(run.path.rglob("events.out.tfevents*"))


# what a first user found


def test_a_mix_is_named_whole(quick, question_file, tmp_path):
    """By the card, by the list of runs, and by what is measured on."""
    other = tmp_path / "more.jsonl"
    other.write_text(
        "".join(json.dumps({"prompt": f"say {n}", "response": "yes"}) + "\n" for n in range(60))
        + '{"prompt": "a"}\n'
    )
    run = api.train(quick(data={"mix": [{"dataset": str(other)}]})).run
    assert "Fine-tuned on `questions` and `more` for" in (run / "final_model" / "README.md").read_text()
    [listed] = api.runs(run)
    assert (listed.datasets, listed.dataset) == (("questions", "more"), f"{question_file} + {other}")
    told = []
    own = api.evaluate(run, metrics=["perplexity"], watch=told.append).measured_on
    assert own.dataset == f"{question_file} + {other}"
    # Of a set of the mix only its own rows are asked, and those that are none are counted.
    one = api.evaluate(run, dataset=str(other), metrics=["perplexity"], watch=told.append).measured_on
    left_out = sum(one.left_out.values())
    assert one.questions + left_out == 60
    assert one.dropped == {"no value for response": 1}
    [line] = [e for e in told if e.get("name") == "measured on" and e["value"].endswith("more.jsonl")]
    assert line["value"] == f"{one.questions} of 61 rows of {other}"
    assert line["reason"].startswith("1 cannot be asked: 1 × no value for response; ")
    assert f"{left_out} are left out" in line["reason"]


def test_sets_of_a_mix_that_share_a_name_keep_their_folders():
    from tunesmith.training.run import dataset_names

    mixed = Data(dataset="x/a/data.jsonl", mix=[{"dataset": "x/b/data.jsonl"}, {"dataset": "x/a/data.jsonl"}])
    assert dataset_names(mixed) == ["a/data", "b/data"]
    assert dataset_names(Data(dataset="x/a/data.jsonl")) == ["data"]


@pytest.mark.parametrize(("state", "may_resume"), [("done", False), ("interrupted", True)])
def test_a_taken_folder_is_resumed_only_where_that_works(quick, state, may_resume):
    recipe = quick(evaluation={"skip": True}, training={"max_steps": 1})
    run = create(recipe)
    run.finish(state)
    with pytest.raises(RunError, match="another --name") as error:
        api.train(recipe)
    assert ("tunesmith resume" in str(error.value)) is may_resume


@pytest.mark.parametrize("asked", [True, False])
def test_activations_are_recomputed_where_that_is_asked_for(quick, monkeypatch, asked):
    from transformers import modeling_utils

    calls = []
    checkpoint = modeling_utils.checkpoint
    monkeypatch.setattr(
        modeling_utils, "checkpoint", lambda *args, **options: calls.append(1) or checkpoint(*args, **options)
    )
    changes = {"training": {"max_steps": 1, "gradient_checkpointing": asked}, "evaluation": {"skip": True}}
    api.train(quick(**changes))
    assert bool(calls) == asked


def test_a_finished_model_is_uploaded_where_that_is_asked_for(quick, monkeypatch):
    asked = []

    class Hub:
        endpoint = "https://huggingface.co"

        def __init__(self, token=None):
            asked.append(token)

        def create_repo(self, name, **options):
            asked.append((name, options))

        def repo_info(self, name):
            return SimpleNamespace(private=True)

        def upload_folder(self, *, folder_path, repo_id, **options):
            asked.append((repo_id, {path.name for path in Path(folder_path).iterdir()}))

        def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, **options):
            assert path_in_repo == "README.md"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    changes = {"training": {"max_steps": 1}, "evaluation": {"skip": True}}
    result = api.train(quick(export={"push_to_hub": True, "hub_model_id": "me/mine"}, **changes))
    assert asked[:2] == [None, ("me/mine", {"private": True, "exist_ok": True})]
    assert asked[2][0] == "me/mine"
    assert asked[2][1] >= {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    assert result.published == "https://huggingface.co/me/mine"
    card = (Path(result.run) / "final_model/README.md").read_text(encoding="utf-8")
    assert "No held-out answers were compared." in card
    assert not re.search(r"scores above|The scores hold|\| metric", card), "of a run that measured nothing"
    asked.clear()
    api.train(quick(name="kept", **changes))
    assert asked == []


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_no_run_leaves_a_pickle_where_models_are(quick, adapter):
    run = Run(api.train(quick(adapter=ADAPTERS[adapter], evaluation={"skip": True})).run)
    name = "model.safetensors" if adapter == "full" else "adapter_model.safetensors"
    for folder in (run.final_model, run.best_model, *run.checkpoints.iterdir()):
        assert list(folder.rglob(name)), folder
        assert not [*folder.rglob("*.bin"), *folder.rglob("*model*.pt"), *folder.rglob("*.pkl")]


def test_a_measurement_of_some_questions_says_so_and_counts_the_leaks_of_these(
    quick, question_file, tmp_path
):
    run = api.train(quick(evaluation={"max_items": 3})).run
    held_out = sum(json.loads(line)["fate"] == "held_out" for line in (run / "ledger.jsonl").open())
    notes = [e["reason"] for e in open_run(run).events() if e["kind"] == "decision"] + [
        (run / "report.html").read_text()
    ]
    said = f"3 of {held_out} held-out examples are asked, by evaluation.max_items"
    assert any(said in str(note) for note in notes)
    told = []
    settings = {"evaluation": {"max_items": 4}}
    found = api.evaluate(run, metrics=["perplexity"], settings=settings, watch=told.append)
    kept = json.loads((found.run / "scores.json").read_text())["measured_on"]
    assert (kept["asked"], kept["questions"]) == (4, held_out) == (found.measured_on.asked, held_out)
    assert found.leakage["questions"] == found.scores["perplexity"]["n"] == 4
    [line] = [e for e in told if e.get("name") == "measured on"]
    assert (
        line["value"] == f"4 of {held_out} questions of the held-out split of {run}, by evaluation.max_items"
    )
    whole = api.evaluate(run, metrics=["perplexity"], settings={"evaluation": {"max_items": held_out}})
    assert whole.measured_on.asked is None
    assert whole.measured_on.sentences()[0].startswith(f"all {held_out} questions")
