"""A run that is continued, from wherever, is the run that was not interrupted; what changed is named and refused."""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import json
import random
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoints import flipped

from tunesmith import api, dataflow, models
from tunesmith.compose import compose, faults, overlaid
from tunesmith.errors import ModelError, RecipeError, RunError
from tunesmith.methods import METHODS
from tunesmith.training import checkpoints, continuing, fit, state, verifying
from tunesmith.training.run import Run, create

LORA = {"kind": "lora", "rank": 4, "dropout": 0.1}
GRID = {
    "adapter": {
        "lora": {"adapter": LORA},
        "dora": {"adapter": {**LORA, "dora": True}},
        "pissa": {"adapter": {**LORA, "init": "pissa"}},
        "qlora": {"adapter": {**LORA, "kind": "qlora"}},
        "full": {},
        "freeze": {"adapter": {"kind": "freeze", "ratio": 0.5}},
    },
    "batches": {
        "ragged accumulation": {"training": {"gradient_accumulation_steps": 3}},
        "packing": {"data": {"packing": True, "max_length": 64, "on_breach": "drop"}},
        "workers": {"training": {"num_workers": 2}},
        "by length": {"training": {"batches": "by_length"}},
        "plain": {},
    },
    "forward": {
        "fast": {},
        "stock": {"training": {"forward": "stock"}},
        "checkpointing": {"training": {"gradient_checkpointing": True}},
        "frozen kept": {"training": {"cache_frozen": True}},
        "compiled": {"training": {"compile": True}},
    },
    "data": {
        "one": {},
        "mix": {"data": {"mix": [{"dataset": "example:support"}], "max_rows": 40}},
        "weighted": {
            "data": {"mix": [{"dataset": "example:support", "weight": 2}], "max_rows": 40, "num_samples": 30},
        },
    },
    "watched": {
        "best model": {"training": {"eval_steps": 1, "load_best_model_at_end": True}},
        "by a metric": {
            "training": {"eval_steps": 1, "best_by": "token_f1"}, "evaluation": {"max_new_tokens": 4},
        },
        "early stopping": {"training": {"eval_steps": 1, "early_stopping_patience": 2}},
        "rarely": {"training": {"eval_steps": 100}},
        "never": {"data": {"validation": 0.0}},
    },
    "schedule": {
        "linear": {"training": {"scheduler": "linear", "warmup_steps": 1}},
        "cosine_with_restarts": {"training": {"scheduler": "cosine_with_restarts", "warmup_steps": 2}},
        "inverse_sqrt": {"training": {"scheduler": "inverse_sqrt", "warmup_steps": 1}},
        "polynomial": {"training": {"scheduler": "polynomial"}},
    },
    "optimizer": {
        "adamw_torch_fused": {"training": {"optimizer": "adamw_torch_fused"}},
        "adamw_torch": {"training": {"optimizer": "adamw_torch"}},
        "adafactor": {"training": {"optimizer": "adafactor"}},
        "sgd": {"training": {"optimizer": "sgd"}},
    },
    "noise": {"neftune": {"method": {"neftune_noise_alpha": 5.0}}, "none": {}},
    "numbers": {
        "float32": {},
        "bfloat16": {"model": {"dtype": "bfloat16"}},
        "bf16 passes": {"training": {"mixed_precision": "bf16"}},
    },
}  # fmt: skip


def is_refused(combination: tuple[str, ...]) -> bool:
    """Whether the options of a combination exclude one another."""
    return "frozen kept" in combination and ("freeze" not in combination or "neftune" in combination)


def pairwise() -> list[tuple[str, ...]]:
    """Few combinations in which every two values of two options come together once."""
    names = [list(values) for values in GRID.values()]
    draw = random.Random(0)

    def pairs(combination: tuple[str, ...]) -> set[tuple[int, str, int, str]]:
        return {(a, x, b, y) for (a, x), (b, y) in itertools.combinations(enumerate(combination), 2)}

    drawn = [tuple(draw.choice(values) for values in names) for _ in range(4000)]
    each = {combination: pairs(combination) for combination in drawn if not is_refused(combination)}
    open_pairs, chosen = set().union(*each.values()), []
    while open_pairs:
        best = max(each, key=lambda combination: len(each[combination] & open_pairs))
        open_pairs -= each[best]
        chosen.append(best)
    return chosen


COMBINATIONS = pairwise()
SAMPLE = [
    (
        "lora",
        "ragged accumulation",
        "fast",
        "mix",
        "early stopping",
        "inverse_sqrt",
        "adamw_torch",
        "neftune",
        "float32",
    ),
    ("full", "packing", "stock", "one", "never", "linear", "adafactor", "none", "bfloat16"),
    (
        "freeze",
        "by length",
        "frozen kept",
        "one",
        "by a metric",
        "cosine_with_restarts",
        "adamw_torch_fused",
        "none",
        "float32",
    ),
    ("dora", "workers", "checkpointing", "mix", "best model", "polynomial", "sgd", "none", "float32"),
]
"""Those of every commit."""


@pytest.fixture
def quick(tiny_model_folder, question_file, tmp_path):
    def recipe(*layers: dict[str, Any], **changes: Any):
        layer = {
            "output_dir": str(tmp_path / "runs"),
            "model": {"base": str(tiny_model_folder)},
            "data": {"dataset": str(question_file), "validation": 0.2, "max_length": 96},
            "training": {
                "max_steps": 5, "per_device_train_batch_size": 4, "warmup_steps": 0, "learning_rate": 1e-2,
                "eval_steps": 2, "save_steps": 2, "logging_steps": 1,
            },
            "evaluation": {"skip": True},
        }  # fmt: skip
        return compose(overlaid(layer, *layers, changes)).recipe

    return recipe


def combined(quick, combination: tuple[str, ...]):
    return quick(*(values[name] for values, name in zip(GRID.values(), combination, strict=True)))


@pytest.mark.thorough
@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: ", ".join(c))
def test_every_step_of_every_pair_of_options_continues_to_the_bit(quick, combination):
    found = api.verify_resume(combined(quick, combination), steps=4)
    assert found.equal, found.sentence()
    assert found.continued_from == (1, 2, 3) or "early stopping" in combination
    assert found.continued_from


@pytest.mark.slow
@pytest.mark.parametrize("combination", SAMPLE, ids=lambda c: ", ".join(c))
def test_a_sample_of_the_options_continues_to_the_bit(quick, combination):
    found = api.verify_resume(combined(quick, combination), steps=2)
    assert found.equal, found.sentence()
    assert found.continued_from == (1,)


FROZEN = {"adapter": {"kind": "freeze"}, "training": {"cache_frozen": True}}
EXCLUDED = {
    "lora": ({"adapter": {"kind": "lora"}, "training": {"cache_frozen": True}}, "training.cache_frozen"),
    "full": ({"training": {"cache_frozen": True}}, "training.cache_frozen"),
    "noise": (overlaid(FROZEN, {"method": {"neftune_noise_alpha": 5}}), "training.cache_frozen"),
    "stock": (overlaid(FROZEN, {"training": {"forward": "stock"}}), "training.cache_frozen"),
    "pairs": (overlaid(FROZEN, {"method": {"kind": "seq2seq"}}), "training.cache_frozen"),
    "answers": (overlaid(FROZEN, {"method": {"kind": "grpo"}}), "training.cache_frozen"),
    "packing": ({"method": {"kind": "dpo"}, "data": {"packing": True}}, "data.packing"),
    "order": ({"method": {"kind": "kto"}, "training": {"batches": "by_length"}}, "training.batches"),
    "one row": (
        {"method": {"kind": "kto"}, "training": {"per_device_train_batch_size": 1}},
        "training.per_device_train_batch_size",
    ),
    "copy": (
        {"method": {"kind": "dpo", "reference": "copy"}, "adapter": {"kind": "lora"}},
        "method.reference",
    ),
    "no adapter": ({"method": {"kind": "dpo", "reference": "adapter_off"}}, "method.reference"),
    "pissa": (
        {"method": {"kind": "dpo", "reference": "adapter_off"}, "adapter": {"kind": "lora", "init": "pissa"}},
        "method.reference",
    ),
    "bias": ({"method": {"kind": "dpo"}, "adapter": {"kind": "lora", "bias": "all"}}, "adapter.bias"),
    "rewards": (
        {"method": {"kind": "grpo", "rewards": [{"kind": "metric", "name": "bleu", "weight": 0}]}},
        "method.rewards",
    ),
    "ZeRO": (
        {"parallel": {"kind": "deepspeed", "stage": 2, "offload_parameters": True}},
        "parallel.offload_parameters",
    ),
}


@pytest.mark.parametrize("what", EXCLUDED)
def test_options_that_exclude_one_another_are_refused_with_the_reason(quick, what):
    """When the recipe is composed, and so where a form is filled in; each at the field that is to be left out."""
    layer, field = EXCLUDED[what]
    with pytest.raises(RecipeError) as error:
        quick(layer)
    assert field.rpartition(".")[2] in str(error.value)
    assert faults(layer).keys() == {field}


def test_several_that_exclude_one_another_are_told_at_once(quick):
    with pytest.raises(RecipeError) as error:
        quick(EXCLUDED["packing"][0], EXCLUDED["copy"][0])
    assert "data.packing" in error.value.found
    assert "method.reference" in error.value.found
    assert "data.packing" in error.value.fix


def test_a_recipe_that_nobody_composed_is_refused_before_anything_is_read(quick):
    whole = quick()
    training = whole.training.model_copy(update={"cache_frozen": True})
    with pytest.raises(RecipeError, match="has nothing to keep"):
        api.train(whole.model_copy(update={"training": training}))


@pytest.mark.thorough
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_every_step_of_every_method_continues_to_the_bit(
    quick, tiny_model_folder, tiny_t5_folder, tmp_path, kind, adapter
):
    from test_steps import WHOLE, row

    path = tmp_path / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row(kind, n)) + "\n" for n in range(40)))
    base = tiny_t5_folder if METHODS[kind].model == "seq2seq" else tiny_model_folder
    changes = {
        "model": {"base": str(base)}, "data": {"dataset": str(path)}, "method": {"kind": kind},
        "training": {"gradient_accumulation_steps": 2}, "evaluation": {"max_new_tokens": 4},
    }  # fmt: skip
    found = api.verify_resume(quick(WHOLE.get(kind, {}), GRID["adapter"][adapter], changes), steps=3)
    assert found.equal, found.sentence()
    assert found.continued_from == (1, 2)


@pytest.mark.slow
def test_states_of_8_bits_continue_to_the_bit(quick):
    found = api.verify_resume(quick({"training": {"optimizer": "adamw_bnb_8bit"}}), steps=2)
    assert found.equal, found.sentence()


@pytest.mark.thorough
@pytest.mark.parametrize("lost", ["random numbers", "optimizer", "data order"])
def test_what_would_not_continue_is_found_out(quick, monkeypatch, lost):
    """The control: verify-resume bites."""
    match lost:
        case "random numbers":
            monkeypatch.setattr(state, "set_randomness", lambda found: None)
        case "optimizer":
            monkeypatch.setattr(state, "restore_optimizer", lambda *given: None)
        case "data order":
            monkeypatch.setattr("transformers.trainer.skip_first_batches", lambda loader, n: loader)
    found = api.verify_resume(quick(adapter=LORA, training={"eval_steps": 100}), steps=3)
    assert not found.equal
    assert found.differences
    assert "does not continue to the bit" in found.sentence()
    assert "differ" in found.sentence()


@pytest.mark.slow
@pytest.mark.parametrize("watching", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_watching_a_run_does_not_change_it(quick, monkeypatch, watching):
    """Validations, samples, logs and checkpoints, at each step or never; with dropout, so that draws count."""
    if not watching:
        monkeypatch.setattr(state, "undisturbed", contextlib.nullcontext)
    often = {"eval_steps": 1, "save_steps": 1, "logging_steps": 1}
    never = {"eval_steps": 100, "save_steps": 100, "logging_steps": 100}
    shared = {"adapter": LORA, "training": {"load_best_model_at_end": False}}
    folders = [
        api.train(quick(shared, name=name, training=training)).run
        / "final_model"
        / "adapter_model.safetensors"
        for name, training in (("often", often), ("never", never))
    ]
    one, other = map(load_file, folders)
    assert all(torch.equal(one[name], other[name]) for name in one) is watching, "False is the control"


@pytest.fixture(scope="module")
def stopped(tiny_model_folder, tmp_path_factory):
    """A run of four steps, its data and its base."""
    folder = tmp_path_factory.mktemp("stopped")
    data = folder / "questions.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"count {i}", "response": f"one {i}"}) + "\n" for i in range(30))
    )
    base = shutil.copytree(tiny_model_folder, folder / "base")
    recipe = compose(
        {
            "output_dir": str(folder), "name": "whole", "model": {"base": str(base)},
            "data": {"dataset": str(data), "max_length": 96},
            "training": {"max_steps": 4, "warmup_steps": 0, "save_steps": 2, "eval_steps": 2, "logging_steps": 1},
            "evaluation": {"skip": True},
        }
    ).recipe  # fmt: skip
    whole = Run(api.train(recipe).run)
    return folder, whole


@pytest.fixture
def copied(stopped, tmp_path, monkeypatch):
    """A copy of everything, elsewhere."""
    folder, whole = stopped
    place = tmp_path / "elsewhere"
    place.mkdir()
    run = verifying.interrupted_copy(whole, place / "run", 2)
    for name in ("questions.jsonl", "base"):
        source = folder / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, place / name)
    recipe = (run.path / "recipe.yaml").read_text().replace(str(folder), str(place))
    (run.path / "recipe.yaml").write_text(recipe)
    return run


def test_a_run_that_was_moved_goes_on(stopped, copied):
    api.resume(copied.path)
    assert verifying.differences(stopped[1], copied, since=2) == []
    steps = [event["step"] for event in copied.events() if event["kind"] == "step"]
    assert steps == [1, 2, 3, 4], "none twice, none missing"
    assert json.loads((copied.path / "training.json").read_text())["final_model"] == str(copied.final_model)
    page = (copied.path / "report.html").read_text(encoding="utf-8")
    assert "No base and tuned model were compared" in page, "a run that is not measured has a report too"


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("a row", "data set questions was "),
        ("one row more", "; there were 30 rows, there are 31 now"),
        pytest.param("order", "data set questions was ", marks=pytest.mark.thorough),
        pytest.param("template", "chat template was ", marks=pytest.mark.thorough),
        ("weights", "base model was "),
    ],
)
def test_what_a_run_rests_on_is_named_where_it_changed_and_refused(copied, what, named):
    base, data = copied.path.parent / "base", copied.path.parent / "questions.jsonl"
    match what:
        case "a row":
            data.write_text(data.read_text().replace("one 7", "two 7"))
        case "one row more":
            data.write_text(data.read_text() + '{"prompt": "count all", "response": "one"}\n')
        case "order":
            data.write_text("".join(reversed(data.read_text().splitlines(keepends=True))))
        case "template":
            file = next(base.glob("*.jinja"))
            file.write_text(file.read_text() + " ")
        case "weights":
            file = base / "model.safetensors"
            content = bytearray(file.read_bytes())
            content[-3] ^= 1
            file.write_bytes(content)
    before = {p.name for p in copied.checkpoints.iterdir()}
    with pytest.raises(RunError, match="not what it was started with") as error:
        api.resume(copied.path)
    assert named in error.value.found
    assert what != "weights" or "data set" not in error.value.found
    assert {p.name for p in copied.checkpoints.iterdir()} == before


def resealed(folder, change, file=checkpoints.MANIFEST):
    """Rewrite a manifest, so that its own hash fits."""
    content = checkpoints.manifest(folder, file)
    content.pop("manifest_sha256")
    change(content)
    (folder / file).write_text(checkpoints._sealed(content))


@pytest.mark.parametrize(
    "damage",
    ["gone", pytest.param("cut", marks=pytest.mark.thorough), "another", "one figure", "another row"],
)
def test_a_plan_that_is_lost_or_edited_changes_nothing(stopped, copied, damage):
    """The checkpoint says what the run rests on, and is sealed."""
    file = copied.path / "plan.json"
    plan = json.loads(file.read_text())
    match damage:
        case "gone":
            file.unlink()
        case "cut":
            file.write_text(file.read_text()[:700])
        case "another":
            plan |= {
                "total_steps": 9,
                "identity": {},
                "recipe": {"training": {"max_steps": 9}},
                "estimate": "x",
            }
            file.write_text(json.dumps(plan))
        case "one figure":
            file.write_text(json.dumps({**plan, "total_steps": 9}))
        case "another row":  # and what the plan says of it fits
            data = copied.path.parent / "questions.jsonl"
            data.write_text(data.read_text().replace("one 7", "two 7"))
            file.write_text(json.dumps({**plan, "identity": {}}))
    if damage == "another row":
        with pytest.raises(RunError, match="not what it was started with") as error:
            api.resume(copied.path)
        assert "data set questions was " in error.value.found
        assert "there are 30 rows as before, of other content" in error.value.found
        return
    api.resume(copied.path)
    assert verifying.differences(stopped[1], copied, since=2) == []
    assert json.loads(file.read_text())["identity"] == plan["identity"] or damage == "another"
    told = [e["message"] for e in copied.events() if e["kind"] == "warning" and "plan.json" in e["message"]]
    assert len(told) == 1
    assert told[0].endswith("what counts stands in the checkpoint, and it is written anew.")


def test_a_damaged_model_is_named_before_another_one_answers_with_what_is_whole(
    stopped, tmp_path, monkeypatch
):
    run, base = (
        shutil.copytree(place, tmp_path / place.name) for place in (stopped[1].path, stopped[0] / "base")
    )
    (run / "final_model" / "tokenizer.json").write_text("{")
    monkeypatch.setattr(
        "tunesmith.evaluation.measuring.answers_of", lambda *a, **k: pytest.fail("one answered")
    )
    with pytest.raises(ModelError, match="final_model is not as its run wrote it") as error:
        api.compare(base, run)
    assert error.value.found.startswith("tokenizer.json has 1 bytes")
    for whole in ("best_model", "checkpoints/checkpoint-step-4"):
        assert str(run / whole) in error.value.fix
    (base / "tokenizer.json").write_text("{")  # of which nobody says how it was
    with pytest.raises(ModelError, match="is damaged") as error:
        models.load_tokenizer(str(base))
    assert error.value.found.startswith("tokenizer.json is no JSON")


@pytest.mark.parametrize("is_planned", [True, False])
def test_checkpoints_that_do_not_say_what_they_rest_on_need_the_plan(copied, is_planned):
    """Those of an older tunesmith: without the plan a changed row would not be seen."""
    resealed(checkpoints.found(copied)[0], lambda content: content.pop("rests_on"))
    if is_planned:
        data = copied.path.parent / "questions.jsonl"
        data.write_text(data.read_text().replace("one 7", "two 7"))
    else:
        (copied.path / "plan.json").unlink()
    with pytest.raises(RunError, match="continued") as error:
        api.resume(copied.path)
    assert ("data set questions was " if is_planned else "no checkpoint says it") in error.value.found
    assert "--name" in error.value.fix
    assert (copied.path / "plan.json").exists() is is_planned, "nor is one made of what is there now"


STRANGE = {
    "files": (lambda content: content.update(files=["a"]), "No checkpoint"),
    "a file": (lambda content: content["files"].update({"trainer_state.json": 5}), "No checkpoint"),
    "a size": (lambda content: content["files"].update({"x": {"sha256": "y"}}), "No checkpoint"),
    "no path": (
        lambda content: content["files"].update({"\0\ud800": {"bytes": 1, "sha256": "y"}}),
        "No checkpoint",
    ),
    "machine": (lambda content: content.update(environment=["torch"]), "No checkpoint"),
    "processes": (lambda content: content.update(processes="two"), "No checkpoint"),
    "recipe": (lambda content: content["rests_on"].update(recipe={"method": [1]}), "cannot be read"),
    "plan": (lambda content: content.pop("rests_on"), "cannot be read"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_run_of_strangers_is_refused_in_words(copied, what):
    """Anybody can seal a manifest: what stands in it is nothing that they say it is."""
    change, said = STRANGE[what]
    resealed(checkpoints.found(copied)[0], change)
    (copied.path / "plan.json").write_text('{"recipe": 5, "identity": 5}')
    with pytest.raises(RunError, match=said):
        continuing.check_recipe(copied.recipe(), copied, checkpoints.choose(copied))


HELD = {
    "no schedule": (state.NUMBERS, lambda tree: tree["items"].__setitem__(1, ["scheduler", None])),
    "no random numbers": (
        state.NUMBERS,
        lambda tree: tree["items"].__setitem__(3, ["random", {"items": []}]),
    ),
    "no weights": ("model.safetensors", None),
}


@pytest.mark.parametrize(
    "what", ["no schedule", *(pytest.param(name, marks=pytest.mark.thorough) for name in [*HELD][1:])]
)
def test_what_a_sealed_checkpoint_does_not_hold_is_said_in_words(copied, what):
    point, (name, change) = checkpoints.found(copied)[0], HELD[what]
    if change:
        tree = json.loads((point / name).read_text())
        change(tree)
        (point / name).write_text(json.dumps(tree))
        [digest] = checkpoints._digests([point / name])
        facts = {"bytes": (point / name).stat().st_size, "sha256": digest}
        resealed(point, lambda content: content["files"].update({name: facts}))
    else:
        resealed(point, lambda content: content["files"].pop(name))
    with pytest.raises(
        RunError, match="checkpoint-step-2 does not hold what this recipe's training"
    ) as error:
        api.resume(copied.path)
    assert "--checkpoint" in error.value.fix


def test_a_best_model_that_is_damaged_or_gone_is_said(copied):
    def best():
        return fit._best_so_far(copied, checkpoints.found(copied)[0], "loss")

    file = copied.best_model / checkpoints.BEST
    whole = file.read_text()
    assert json.loads(whole)["step"] == 4, "the test's own ground"
    assert best() is None, "of a step that is about to be repeated"
    resealed(copied.best_model, lambda content: content.update(step=2), checkpoints.BEST)
    assert best()["step"] == 2
    weights, sealed = copied.best_model / "model.safetensors", file.read_text()
    for given in (weights, file):
        flipped(given, 8 * (given.stat().st_size // 2))
        with pytest.raises(RunError, match="is damaged") as error:
            best()
        assert given.name in f"{error.value.found}{error.value.problem}"
        flipped(given, 8 * (given.stat().st_size // 2))
    flipped(weights, 99)
    with pytest.raises(RunError, match="best_model is damaged"):
        fit.copy_whole(copied.best_model, copied.final_model)
    assert not copied.final_model.exists()
    flipped(weights, 99)
    for text in ("{}", "[]", "{", '{"step": "2", "eval_loss": 1.0}', '{"step": 2, "eval_loss": null}'):
        file.write_text(text)
        with pytest.raises(RunError, match="is damaged"):
            best()
    file.write_text(sealed)
    copied.best_model.rename(copied.path / ".best_model.old")  # where a kill between two renames leaves it
    assert best()["step"] == 2
    shutil.rmtree(copied.best_model)
    assert best() is None
    assert "The best model so far is gone" in copied.events()[-1]["message"]


def test_a_flipped_bit_of_a_finished_model_is_said_by_whoever_reads_it(stopped, tmp_path):
    from tunesmith.serving.models import sources

    model = shutil.copytree(stopped[1].final_model, tmp_path / "model")
    readers = {
        "load": models.load_model,
        "serve": lambda model: sources(model, None, {}),
        "merge": api.merge,
        "export": lambda model: api.export(model, to="safetensors"),
        "deploy": lambda model: api.prepare_deployment(model, output_dir=tmp_path / "packed"),
        "push": lambda model: api.push_plan(model, repository="me/mine"),
    }
    names = [*checkpoints.manifest(model, checkpoints.BEST)["files"], checkpoints.BEST]
    assert {"model.safetensors", "config.json", "tokenizer.json"} < set(names)
    draw = random.Random(0)
    for name, read in [
        *((name, models.folder_of) for name in names),
        *(("model.safetensors", r) for r in readers.values()),
    ]:
        models.folder_of(str(model))  # whole
        bit = draw.randrange(8 * (model / name).stat().st_size)
        flipped(model / name, bit)
        with pytest.raises(ModelError) as error:
            read(str(model))
        assert name in str(error.value.found), (name, bit)
        flipped(model / name, bit)
    (model / "config.json").write_text((model / "config.json").read_text() + " ")  # by its owner, who says so
    (model / checkpoints.BEST).unlink()
    models.folder_of(str(model))


def test_a_training_that_is_said_to_be_finished_in_no_form_of_ours_is_damaged(stopped, copied):
    assert fit.finished(copied) is None
    whole = json.loads((stopped[1].path / "training.json").read_text())
    for content in ({}, {**whole, "x": 1}, {"steps": 4}):
        copied.write("training.json", content)
        with pytest.raises(RunError, match="is damaged"):
            fit.finished(copied)
    copied.write("training.json", whole)
    assert fit.finished(copied).final_model == copied.final_model


@pytest.mark.parametrize("name", ["status.json", "plan.json"])
def test_a_file_of_a_run_that_is_no_object_is_damaged(copied, name):
    for text in ("[]", "5", "[" * 100_000, '"\xff"'):
        (copied.path / name).write_text(text, encoding="latin-1")
        with pytest.raises(RunError, match="is damaged"):
            copied.read(name)
    (copied.path / "events.jsonl").write_text(
        '5\n[]\n{"kind": "step", "step": "x"}\n{"kind": "step", "step": 1}\n'
    )
    assert copied.events() == [{"kind": "step", "step": 1}]


def test_how_processes_hold_the_model_may_change_and_is_said(copied):
    from tunesmith.recipe import FSDP, Accelerate

    point = checkpoints.choose(copied)
    recipe = copied.recipe()
    continuing.check_recipe(recipe, copied, point)
    assert not [e for e in copied.events() if "but for rounding" in e.get("message", "")]
    changed = {"parallel": FSDP(), "launch": Accelerate(processes=2)}
    continuing.check_recipe(recipe.model_copy(update=changed), copied, point)
    said = copied.events()[-1]["message"]
    assert said.startswith("The run goes on, equal but for rounding: ")
    for part in (
        "parallel.kind was 'ddp', is 'fsdp'",
        "launch.kind was 'local', is 'accelerate'",
        "launch.processes",
    ):
        assert part in said


def test_a_file_that_no_manifest_lists_makes_no_checkpoint_deepspeed_s(copied):
    point = checkpoints.choose(copied)
    (point / checkpoints.ZERO).write_text("global_step2")
    checkpoints.check_zero(point, is_zero=False)
    resealed(point, lambda content: content["files"].update({checkpoints.ZERO: {"bytes": 12, "sha256": ""}}))
    with pytest.raises(RunError, match="of DeepSpeed") as error:
        checkpoints.check_zero(point, is_zero=False)
    assert f"tunesmith resume {copied.path} --processes 1" in error.value.fix


FIELDS = {
    "training.learning_rate": 0.5, "training.seed": 7, "training.per_device_train_batch_size": 2,
    "training.gradient_accumulation_steps": 3, "training.scheduler": "linear", "training.max_steps": 9,
    "training.weight_decay": 0.5, "training.max_grad_norm": 0.5, "training.optimizer": "sgd", "data.max_length": 64,
    "data.validation": 0.3, "data.packing": True, "method.neftune_noise_alpha": 1.0, "adapter.kind": "lora",
    "model.dtype": "bfloat16", "training.warmup_steps": 1,
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_a_recipe_that_changed_is_refused_field_by_field(stopped, field):
    section, _, name = field.partition(".")
    before = stopped[1].recipe()
    layer = overlaid(
        before.model_dump(mode="json"), {section: {name: FIELDS[field]}} if name != "kind" else {}
    )
    after = compose({**layer, **({"adapter": {"kind": "lora"}} if name == "kind" else {})}).recipe
    [*said] = continuing.differences(before, after)
    assert any(line.startswith(f"{field} was ") for line in said), said
    with pytest.raises(RunError, match="cannot be continued") as error:
        api.train(after, resume="latest")
    assert f"{field} was " in error.value.found


def test_a_recipe_that_was_edited_in_the_run_is_refused_field_by_field(copied):
    """`resume` takes no recipe but that of the run's folder, which somebody may have opened in an editor."""
    file = copied.path / "recipe.yaml"
    text = file.read_text()
    for old, new in (("max_steps: 4", "max_steps: 6"), ("weight_decay: 0.01", "weight_decay: 0.5")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    file.write_text(text)
    with pytest.raises(RunError, match="cannot be continued") as error:
        api.resume(copied.path)
    assert error.value.found == "training.max_steps was 4, is 6; training.weight_decay was 0.01, is 0.5"


def test_a_run_that_was_killed_before_its_first_checkpoint_is_held_to_its_recipe_and_says_where_it_begins(
    quick,
):
    """`kill -9` right after the run's folder was made: nothing but what `create` writes is there."""
    run = create(quick({"training": {"max_steps": 1}}))
    file = run.path / "recipe.yaml"
    text = file.read_text()
    assert text.count("weight_decay: 0.01") == 1
    file.write_text(text.replace("weight_decay: 0.01", "weight_decay: 0.5"))
    with pytest.raises(RunError, match="cannot be continued") as error:
        api.resume(run.path)
    assert error.value.found == "training.weight_decay was 0.01, is 0.5"
    file.write_text(text)
    with pytest.raises(RunError, match="has no checkpoint") as error:
        api.resume(run.path, checkpoint="checkpoint-step-2")
    assert "Leave --checkpoint out" in error.value.fix
    api.resume(run.path)
    told = [e["message"] for e in run.events() if e["kind"] == "warning"]
    assert "Training begins at the first step: no checkpoint was saved before it ended." in told
    assert any(e["kind"] == "decision" for e in run.events()), "the plan is said as in a new run"


@pytest.mark.parametrize("field", continuing.OF_VALIDATIONS)
def test_what_decides_which_model_is_the_best_may_not_change(stopped, field):
    """`evaluation` may change, but for what `training.best_by` is measured by."""
    recipe = stopped[1].recipe()
    value = getattr(recipe.evaluation, field)
    other = (not value) if isinstance(value, bool) else value + 1
    after = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={field: other})})
    assert continuing.differences(recipe, after) == []
    by = {"training": recipe.training.model_copy(update={"best_by": "exact_match"})}
    [said] = continuing.differences(recipe.model_copy(update=by), after.model_copy(update=by))
    assert said == f"evaluation.{field} was {value!r}, is {other!r} (it decides training.best_by)"


def test_validations_use_no_other_field_of_the_evaluation():
    """What `_measures` asks of the recipe's evaluation is what may not change."""
    tree = ast.parse(inspect.getsource(dataflow._measures))
    used = {
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "section"
    }
    assert used | {"attempts_temperature"} == set(continuing.OF_VALIDATIONS)


def test_a_metric_that_is_measured_otherwise_from_here_on_is_said_or_refused(copied):
    file = copied.path / "recipe.yaml"
    file.write_text(file.read_text().replace("max_new_tokens: 256", "max_new_tokens: 3"))
    recipe = copied.recipe()
    assert recipe.evaluation.max_new_tokens == 3

    def measured(**training):
        then = {**recipe.training.model_dump(mode="json"), **training}
        resealed(
            checkpoints.found(copied)[0],
            lambda content: content["rests_on"]["recipe"].update(training=then),
        )
        return recipe.model_copy(update={"training": type(recipe.training)(**then)})

    point = checkpoints.found(copied)[0]
    continuing.check_recipe(measured(eval_metrics=["exact_match"]), copied, point)
    told = copied.events()[-1]["message"]
    assert told == (
        "Validations measure exact_match otherwise from here on: evaluation.max_new_tokens was 256, is 3."
    )
    with pytest.raises(RunError, match="cannot be continued") as error:
        continuing.check_recipe(measured(best_by="exact_match"), copied, point)
    assert error.value.found == "evaluation.max_new_tokens was 256, is 3 (it decides training.best_by)"


@pytest.mark.slow
def test_another_machine_is_said(copied, monkeypatch):
    now = checkpoints._environment()
    monkeypatch.setattr(
        checkpoints,
        "_environment",
        lambda: {**now, "cpu_threads": 99, "packages": {**now["packages"], "torch": "9.9"}},
    )
    api.resume(copied.path)
    [told] = [
        e["message"] for e in copied.events() if e["kind"] == "warning" and "not to the bit" in e["message"]
    ]
    assert f"cpu_threads was {now['cpu_threads']}, is 99" in told
    assert f"torch was {torch.__version__}, is 9.9" in told


def test_a_run_that_was_stopped_after_its_last_step_takes_no_further_one(stopped, tmp_path):
    _, whole = stopped
    copy = verifying.interrupted_copy(whole, tmp_path / "run", 4)
    api.resume(copy.path)
    assert verifying.differences(whole, copy) == []
    one, other = (json.loads((r.path / "training.json").read_text()) for r in (whole, copy))
    assert {k: other[k] for k in ("steps", "train_loss", "tokens")} == {
        k: one[k] for k in ("steps", "train_loss", "tokens")
    }
