"""Every entry of METHODS trains, changes what it is to change and nothing else, and continues to the bit.

A new method joins by itself; what it needs beside the defaults stands in SAMPLES.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tunesmith import api, dataflow
from tunesmith.compose import compose, overlaid
from tunesmith.errors import Interrupted, RecipeError
from tunesmith.methods import METHODS
from tunesmith.models import decoder_layers
from tunesmith.training.run import Run, open_run

COLORS = ("red", "blue", "green", "one", "two", "three", "yes", "no")


def answered(n: int) -> dict[str, Any]:
    return {"prompt": f"what is the count of {n}", "response": f"{COLORS[n % 8]} {n}"}


def preferred(n: int) -> dict[str, Any]:
    return {
        "prompt": f"what is the count of {n}",
        "chosen": f"{COLORS[n % 8]} {n}",
        "rejected": f"no {COLORS[(n + 1) % 8]} rows",
    }


SAMPLED = {
    "method": {"rewards": "length_match", "num_generations": 4, "max_new_tokens": 6},
    "training": {"per_device_train_batch_size": 8},
}

SAMPLES: dict[str, dict[str, Any]] = {
    "dpo": {"rows": preferred},
    "kto": {"rows": preferred},
    "orpo": {"rows": preferred},
    "cpo": {"rows": preferred},
    "simpo": {"rows": preferred},
    "reward": {"rows": preferred},
    "grpo": {"recipe": SAMPLED},
    "rloo": {"recipe": SAMPLED},
    "ppo": {
        "recipe": {"method": {"rewards": "vocabulary_use", "max_new_tokens": 6}},
        "beside": ("value_head.",),
    },
}
"""By method: `rows`, a function from a number to a row (a question with its answer where it is left out),
`recipe`, a layer over the one below, and `beside`, how the names of what is trained beside the model begin."""

ADAPTERS = {
    "full": {"kind": "full"},
    "freeze": {"kind": "freeze", "ratio": 0.5},
    "lora": {"kind": "lora", "rank": 4},
    "lora, gradient checkpointing": {"kind": "lora", "rank": 4},
    "qlora": {"kind": "qlora", "rank": 4},
}


@pytest.fixture
def quick(tiny_model_folder, tiny_t5_folder, tmp_path):
    """A recipe of a few steps for a method, with changes."""

    def recipe(kind: str, **changes: Any):
        sample = SAMPLES.get(kind, {})
        path = tmp_path / "rows.jsonl"
        rows = [sample.get("rows", answered)(n) for n in range(40)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        base = tiny_t5_folder if METHODS[kind].model == "seq2seq" else tiny_model_folder
        layer = {
            "output_dir": str(tmp_path / "runs"),
            "model": {"base": str(base)},
            "method": {"kind": kind},
            "data": {"dataset": str(path), "max_length": 96},
            "training": {
                "max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 0, "learning_rate": 1e-2,
                "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "scheduler": "linear",
            },
            "evaluation": {"max_new_tokens": 6, "resamples": 200},
        }  # fmt: skip
        return compose(overlaid(layer, sample.get("recipe", {}), changes)).recipe

    return recipe


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def steps(run: Run) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["kind"] == "step"]


# Plain LoRA is there with checkpointing as well, and without it where runs are interrupted.
# Four bits come with a method of each kind: imitating, preferring, writing.
@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        pytest.param(
            k, a,
            marks=pytest.mark.thorough
            if a in ("freeze", "lora") or (a == "qlora" and k not in ("sft", "dpo", "grpo", "ppo"))
            else (),
        )
        for k in METHODS
        for a in ADAPTERS
    ],
)  # fmt: skip
def test_two_steps_change_what_is_trained_and_nothing_else(quick, kind, adapter, monkeypatch):
    seen: dict[str, Any] = {}
    fit = dataflow.fit

    def watched(trainer, *args, **kwargs):
        seen["before"] = {
            n: (p.detach().clone(), p.requires_grad) for n, p in trainer.model.named_parameters()
        }
        seen["packed"] = {type(module).__name__ for module in trainer.model.modules()} & {"Linear4bit"}
        result = fit(trainer, *args, **kwargs)
        seen["after"] = {n: p.detach() for n, p in trainer.model.named_parameters()}
        return result

    monkeypatch.setattr(dataflow, "fit", watched)
    recipe = quick(
        kind, adapter=ADAPTERS[adapter], training={"gradient_checkpointing": "checkpointing" in adapter}
    )
    base = Path(recipe.model.base)
    files = digests(base)
    planned = api.plan(recipe) if adapter == "full" else None
    result = api.train(recipe)
    run = Run(result.run)

    # The plan said what was done.
    if planned:
        plan, rows = planned
        kept = run.read("plan.json")
        assert (plan.total_steps, plan.examples) == (kept["total_steps"], kept["examples"])
        assert rows["rows"] == kept["rows"]

    # Losses are numbers, in training and in validation.
    assert [event["step"] for event in steps(run)] == [1, 2]
    assert all(math.isfinite(event["loss"]) for event in steps(run))
    validations = [event for event in run.events() if event["kind"] == "evaluation"]
    assert validations
    assert all(math.isfinite(event["loss"]) for event in validations)

    # A quantized base is one, and what is trained keeps all its digits.
    assert bool(seen["packed"]) == (adapter == "qlora")
    assert {p.dtype for p, is_trained in seen["before"].values() if is_trained} == {torch.float32}

    # Only what is to be trained has changed.
    assert digests(base) == files
    before, after = seen["before"], seen["after"]
    assert before.keys() == after.keys()
    changed = {name for name, (old, _) in before.items() if not torch.equal(old, after[name])}
    trained = {name for name, (_, is_trained) in before.items() if is_trained}
    assert changed
    assert changed <= trained
    final = weights(run.final_model)
    if adapter == "full":
        assert trained == before.keys()
    elif adapter == "freeze":
        assert 0 < len(trained) < len(before)
    else:
        # A new head is trained and saved with the adapter.
        own = (".lora_", ".score.") if METHODS[kind].head else (".lora_",)
        beside = SAMPLES.get(kind, {}).get("beside", ())
        policy = {name for name in trained if not name.startswith(beside)}
        assert all(any(part in name for part in own) for name in policy)
        assert final
        assert all(any(part in name for part in own) for name in final)
        assert METHODS[kind].head is None or any(".score." in name for name in final)
        assert len(final) == len(policy)

    # Base and tuned model are compared on what was held out, the page shows it.
    assert result.primary
    assert result.primary.n > 0
    assert (run.path / "report.html").stat().st_size > 0


FAST = {"sft", "seq2seq", "dpo", "kto", "orpo", "cpo", "simpo", "grpo", "rloo", "reward", "ppo"}
"""Methods that ask their model for log-probabilities or scores, and not for all of its logits."""

IN_CI = {"sft", "seq2seq", "dpo", "kto", "simpo", "grpo", "reward", "ppo"}
"""Of those the ones that the others are variants of; theirs are in `make thorough`."""


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=() if k in IN_CI else pytest.mark.thorough) for k in METHODS],
)
def test_the_fast_forward_is_taken_where_it_fits_and_changes_no_number(quick, kind):
    """Losses, accuracies, rewards and all else that a run tells of its steps and validations."""
    told: dict[str, list[dict[str, Any]]] = {}
    for choice in ("fast", "stock"):
        recipe = quick(
            kind, name=choice, adapter={**ADAPTERS["lora"], "dropout": 0}, evaluation={"skip": True},
            training={"forward": choice, "max_steps": 3},
        )  # fmt: skip
        run = Run(api.train(recipe).run)
        [taken] = [e for e in run.events() if e["kind"] == "decision" and e["name"] == "forward"]
        assert taken["value"] == ("fast" if choice == "fast" and kind in FAST else "stock")
        assert taken["reason"]
        assert not [e for e in run.events() if e["kind"] == "warning" and "stock forward" in e["message"]]
        told[choice] = [e for e in run.events() if e["kind"] in {"step", "evaluation"}]
        # Encoder-decoders drop out, each path by draws of its own; theirs are compared in test_forward_pairs.py.
        if kind not in FAST or METHODS[kind].model == "seq2seq":
            return
    assert len(told["fast"]) == len(told["stock"]) > 3
    ours, theirs = (next(e for e in told[choice] if e["kind"] == "step") for choice in ("fast", "stock"))
    # Before any update nothing has drifted. Advantages of written answers add up to about nothing.
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6, abs=1e-7)
    # A policy that is still its reference has the same loss whatever it computes; its gradients tell.
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    for ours, theirs in zip(told["fast"], told["stock"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("loss", "token_accuracy", "grad_norm", "tokens"):
            if theirs.get(name) is not None:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
        measures, others = ours.get("measures", {}), theirs.get("measures", {})
        assert measures.keys() == others.keys()
        for name in measures:
            # TRL's mean of ORPO's and CPO's logits is over prompts and padding as well.
            apart = kind in {"orpo", "cpo", "simpo"} and name.startswith("logits/")
            if name != "step_time" and not name.startswith("seconds/") and not apart:
                assert measures[name] == pytest.approx(others[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "grpo", "rloo"])
def test_an_adapter_on_the_head_is_refused_before_anything_is_read(quick, kind):
    """Which module is the head, the model says."""
    asked = quick(kind, adapter={"kind": "lora", "targets": ["q_proj", "lm_head"]})
    with pytest.raises(RecipeError, match="the head") as error:
        api.plan(asked)
    assert "adapter.modules_to_save" in error.value.fix


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            # TRL's own trainers refuse this.
            {"method": {"kind": "simpo"}, "adapter": {"kind": "lora", "targets": ["q_proj", "lm_head"]}},
            "the head has an adapter",
        ),
        ({"model": {"base": "olmo"}}, "models of the kind olmo are not covered"),
        ({"method": {"neftune_noise_alpha": 5.0}}, "NEFTune's noise is measured by the length of padded rows"),
        ({"training": {"forward": "stock"}}, "as the recipe says"),
    ],
    ids=["head", "kind", "NEFTune", "asked"],
)  # fmt: skip
def test_what_is_not_covered_takes_the_stock_path_and_says_why(quick, changes, why, other_kind, monkeypatch):
    from tunesmith import forward

    monkeypatch.setattr(
        forward, "quicken", lambda *given, **named: pytest.fail("the fast forward was laid in")
    )
    if "model" in changes:
        changes = {"model": {"base": str(other_kind)}}
    kind = changes.get("method", {}).get("kind", "sft")
    run = Run(api.train(quick(kind, **overlaid({"evaluation": {"skip": True}}, changes))).run)
    [taken] = [e for e in run.events() if e["kind"] == "decision" and e["name"] == "forward"]
    assert (taken["value"], taken["reason"]) == ("stock", why)
    assert [event["step"] for event in steps(run)] == [1, 2]


def test_a_run_of_preferences_says_how_much_was_shared(quick):
    """As a pair's prompt is computed once, which is at least the shorter of its rows' prompts."""
    found = {}
    for kind in ("dpo", "sft"):
        events = Run(api.train(quick(kind, name=kind, evaluation={"skip": True})).run).events()
        found[kind] = [e for e in events if e["kind"] == "decision" and e["name"] == "shared beginnings"]
    assert not found["sft"]
    [told] = found["dpo"]
    saved, given = (int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", told["reason"])[:2])
    assert 0.1 * given < saved < 0.5 * given
    assert told["value"] == f"{saved / given:.0%} of the tokens"


def test_frozen_layers_are_run_once_and_a_missing_compiler_is_said(quick, monkeypatch):
    from tunesmith.forward import compiling

    monkeypatch.setattr(compiling, "missing", lambda device: "no compiler")
    losses = []
    for cached in (True, False):
        recipe = quick(
            "sft", name=f"cached-{cached}", adapter={"kind": "freeze", "ratio": 0.5}, evaluation={"skip": True},
            training={"max_steps": 3, "cache_frozen": cached, "compile": True},
        )  # fmt: skip
        events = Run(api.train(recipe).run).events()
        told = {e["name"]: e for e in events if e["kind"] == "decision"}
        assert ("cache_frozen" in told) is cached
        assert told["compile"]["value"] == "off"
        assert told["compile"]["reason"] == "nothing can be compiled here: no compiler"
        losses.append([e["loss"] for e in events if e["kind"] == "step"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "ppo"])
def test_rows_that_never_return_have_no_outputs_to_keep(quick, kind):
    """Refused when the recipe is composed: what the model writes is new in each step."""
    with pytest.raises(RecipeError, match=r"cache_frozen.*rows never come back"):
        quick(kind, adapter={"kind": "freeze", "ratio": 0.5}, training={"cache_frozen": True})


@pytest.mark.thorough
def test_a_run_with_compiled_layers(quick):
    """With the compiler itself: steps, validations and answers written meanwhile are those of layers as they are."""
    from tunesmith.forward import compiling

    if why := compiling.missing(torch.device("cpu")):
        pytest.skip(why)
    told = []
    for compiled in (True, False):
        recipe = quick(
            "sft", name=f"compiled-{compiled}", evaluation={"skip": True, "samples": 2},
            training={"max_steps": 3, "compile": compiled},
        )  # fmt: skip
        events = Run(api.train(recipe).run).events()
        decisions = {e["name"]: e["value"] for e in events if e["kind"] == "decision"}
        assert decisions.get("compile") == ("on" if compiled else None)
        told.append(
            (
                [e["loss"] for e in events if e["kind"] in {"step", "evaluation"}],
                [e["completion"] for e in events if e["kind"] == "sample"],
            )
        )
    (losses, answers), (plain, of_plain) = told
    assert len(losses) > 3
    assert answers
    assert losses == pytest.approx(plain, rel=1e-4)
    assert answers == of_plain


def test_layers_that_are_trained_have_no_outputs_to_keep(quick):
    recipe = quick(
        "sft", adapter={**ADAPTERS["lora"], "targets": ["q_proj"]}, evaluation={"skip": True},
        training={"cache_frozen": True},
    )  # fmt: skip
    with pytest.raises(RecipeError, match="an adapter sits in layer 1"):
        api.train(recipe)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "ppo"])
@pytest.mark.parametrize("value", [0.3, pytest.param(1.0, marks=pytest.mark.thorough)])
def test_a_reward_that_is_always_the_same_is_said(quick, kind, value, tmp_path, monkeypatch):
    """0.3 has no exact 32-bit form: its spread over eight answers comes to more than nothing."""
    (tmp_path / "always.py").write_text(f"def same(prompt, completion, reference):\n    return {value}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "always", raising=False)
    recipe = quick(
        kind, method={"rewards": "always:same"}, adapter=ADAPTERS["lora"], evaluation={"skip": True},
        training={"max_steps": 5, "per_device_train_batch_size": 8},
    )  # fmt: skip
    told = [e["message"] for e in Run(api.train(recipe).run).events() if e["kind"] == "warning"]
    assert any("all answers got the same reward" in message for message in told)


def test_what_a_function_rewards_is_measured_on_held_out_prompts(quick, tmp_path, monkeypatch):
    """No metric tells it, and the prompts have no reference: the verdict rests on the mean reward."""
    (tmp_path / "short.py").write_text(
        "def short(prompt, completion, reference):\n    return -float(len(completion))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "short", raising=False)
    first = api.train(quick("sft", name="first", evaluation={"skip": True})).run
    rows = [{"prompt": f"what is the count of {n}"} for n in range(40)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = quick(
        "grpo", method={"rewards": "short:short"}, model={"base": str(first)},
        data={"dataset": str(tmp_path / "asked.jsonl"), "format": "prompt", "held_out": 0.3},
    )  # fmt: skip
    result = api.train(recipe)
    run = Run(result.run)
    assert result.primary.metric == "mean_reward"
    kept = [json.loads(line) for line in (run.evaluation / "rows.jsonl").read_text().splitlines()]
    for name, said in (("base", result.primary.base), ("tuned", result.primary.tuned)):
        own = [row for row in kept if row["model"] == name]
        assert len(own) == result.primary.n > 3
        assert said == pytest.approx(sum(-len(row["output"]) for row in own) / len(own))
    values = [s["scores"]["mean_reward"]["value"] for s in run.read("evaluation/stages.json")["stages"]]
    assert values[1:] == pytest.approx([result.primary.base, result.primary.tuned])
    measured = api.evaluate(run.path)
    assert measured.scores["mean_reward"]["value"] == pytest.approx(result.primary.tuned)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "ppo"])
def test_plan_refuses_a_metric_that_cannot_score_the_prompts(quick, kind, tmp_path):
    (tmp_path / "asked.jsonl").write_text("".join(f'{{"prompt": "count {n}"}}\n' for n in range(40)))
    data = {"dataset": str(tmp_path / "asked.jsonl"), "format": "prompt"}
    with pytest.raises(RecipeError, match="The reward 'rougeL' cannot score"):
        api.plan(quick(kind, method={"rewards": "rougeL"}, data=data))


@pytest.mark.parametrize("kind", METHODS)
def test_an_interrupted_run_equals_a_straight_one(quick, kind):
    """Under LoRA, where the reference is the model without its adapter; test_main_path has all weights."""
    changes = {
        "adapter": ADAPTERS["lora"],
        "training": {"max_steps": 4, "save_steps": 100, "eval_steps": 4},
        "evaluation": {"skip": True},
    }
    straight = Run(api.train(quick(kind, name="straight", **changes)).run)

    def stop_at_two(event):
        if event["kind"] == "progress" and event["stage"] == "training" and event["done"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    recipe = quick(kind, name="stopped", **changes)
    with pytest.raises(Interrupted, match="step 2 of 4"):
        api.train(recipe, watch=stop_at_two)
    run = open_run(Path(recipe.output_dir) / "stopped")
    api.resume(run.path)
    one, other = weights(run.final_model), weights(straight.final_model)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [event["loss"] for event in steps(run)] == [event["loss"] for event in steps(straight)]


def learn():
    import importlib.util

    path = Path(__file__).parents[1] / "benchmarks" / "methods_learn.py"
    spec = importlib.util.spec_from_file_location("methods_learn", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.thorough
@pytest.mark.parametrize(
    "kind",
    [
        "dpo",
        "kto",
        "orpo",
        "cpo",
        "simpo",
    ],
)
def test_preferences_are_learned(kind, tmp_path):
    """From about half of the held-out pairs to at least 85 %, on the shipped model and data."""
    found = learn().learned(kind, folder=tmp_path, with_kl=False)
    assert found["metric"] == "preference_accuracy"
    assert found["n"] >= 100
    assert 0.4 <= found["before"] <= 0.6
    assert found["after"] >= 0.85
    assert found["interval"][0] > 0.25


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """The benchmark's module, and a folder in which what its proofs start from is trained once."""
    return learn(), tmp_path_factory.mktemp("learned")


@pytest.mark.thorough
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", ["grpo", "ppo", "rloo"])
def test_what_is_rewarded_is_learned_near_the_start(stages, kind, seed):
    """A verifiable reward rises by 30 points over the model that was fine-tuned, whatever the seed."""
    module, folder = stages
    found = module.learned(kind, seed=seed, folder=folder)
    assert found["metric"] == "constraints"
    assert found["n"] >= 80
    assert found["after"] - found["before"] >= 0.3
    assert found["interval"][0] > 0.2
    assert found["kl"] < 8  # nats per answer of about twelve tokens


@pytest.mark.thorough
def test_fine_tuning_a_reward_model_and_ppo_go_one_after_the_other(stages):
    """PPO is told a reward model's scores alone; a constraint that no stage knows says what came of each."""
    module, folder = stages
    found = module.learned("stages", folder=folder, with_kl=False)
    assert found["after"] - found["before"] >= 0.3
    run = Run(folder / "stages-42")
    kept = run.read("evaluation/stages.json")
    assert [(stage["name"], stage["method"]) for stage in kept["stages"]] == [
        ("tiny", None),
        ("start", "sft"),
        ("stages-42", "ppo"),
    ]
    assert [stage["scores"]["constraints"]["n"] for stage in kept["stages"]] == [found["n"]] * 3
    assert kept["stages"][-1]["scores"]["constraints"]["value"] == pytest.approx(found["after"], abs=1e-4)
    assert kept["stages"][-1]["change"]["verdict"] == "better"
    assert [model["name"] for model in kept["reward_models"]] == ["judge"]
    assert kept["reward_models"][0]["comparison"]["tuned"] > 0.9
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "Every model on the way to this one" in page
    assert "Answers were scored by judge" in page


@pytest.mark.parametrize("kind", ["dpo", "ppo"])
def test_under_mixed_precision_a_policy_answers_and_a_reference_judges_in_it(quick, kind, monkeypatch):
    """On a GPU, that is; here with its arguments on a CPU."""
    given, fit = dataflow.arguments, dataflow.fit
    monkeypatch.setattr(dataflow, "arguments", lambda *args, **named: {**given(*args, **named), "bf16": True})
    seen: dict[str, set[bool]] = {}

    def watched(trainer, *args, **kwargs):
        models = {
            "policy": trainer.model,
            "reference": getattr(trainer, "ref_model", None) or trainer.reference,
        }
        for name, model in models.items():

            def note(module, given, name=name):
                seen.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))

            decoder_layers(getattr(model, "policy", model))[0].register_forward_pre_hook(note)
        return fit(trainer, *args, **kwargs)

    monkeypatch.setattr(dataflow, "fit", watched)
    run = Run(api.train(quick(kind, evaluation={"skip": True, "samples": 0})).run)
    assert seen == {"policy": {True}, "reference": {True}}
    decided = {e["name"]: e["value"] for e in run.events() if e["kind"] == "decision"}
    assert decided["forward"] == "fast"
    assert "forward of the reference" not in decided
    assert not [e for e in run.events() if "stock forward" in str(e.get("message"))]
