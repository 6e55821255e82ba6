"""`test-model`: what is whole and sensible passes, and what is broken in one place fails there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import taught
from typer.testing import CliRunner

from tunesmith import api
from tunesmith.cli import app
from tunesmith.data.templates import end_of_turn_ids
from tunesmith.errors import TunesmithError
from tunesmith.export.tried import TASK_PROMPTS, loops
from tunesmith.recipe import Recipe


@pytest.fixture
def finished(taught_model):
    return taught_model, taught_model.with_name("rows.jsonl")


def invoke(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout.strip().splitlines()[-1])


def test_a_data_file_that_is_not_there_is_told_before_a_model_is_looked_for(tmp_path):
    with pytest.raises(TunesmithError, match="There is no file"):
        api.try_model(tmp_path / "no model", dataset=str(tmp_path / "none.jsonl"))


def test_a_model_that_answers_and_stops_is_fit_to_be_used(finished):
    folder, rows = finished
    code, found = invoke("test-model", folder, "--dataset", rows, "--rows", 5, "--max-new-tokens", 30)
    assert code == 0, found["findings"]
    assert [f["check"] for f in found["findings"]] == [
        "files", "weights", "template", "ends", "answers", "stops", "loops", "perplexity", "speed",
    ]  # fmt: skip
    assert found["passed"]
    assert [s["answer"] for s in found["samples"]] == [taught.ANSWER] * 5
    assert all(s["finish_reason"] == "stop" for s in found["samples"])
    assert 1 <= found["perplexity"] < 1.1
    assert found["tokens_per_second"] > 0
    assert 0 < found["first_token_seconds"] < found["answer_seconds"]


def test_the_perplexity_is_that_of_evaluate(finished, tmp_path, monkeypatch):
    folder, rows = finished
    monkeypatch.chdir(tmp_path)
    found = api.try_model(folder, dataset=str(rows), rows=50)
    heard: list[dict] = []
    api.try_model(
        folder, dataset=str(rows), rows=2, max_new_tokens=4, watch=lambda event: heard.append(dict(event))
    )
    assert [e["value"].rpartition(", ")[2] for e in heard if e.get("name") == "measured on"] == ["by --rows"]
    scored = api.evaluate(folder, dataset=str(rows), metrics=["perplexity"])
    assert found.perplexity == pytest.approx(scored.scores["perplexity"]["value"], rel=1e-6)


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def broken_file(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-500])


def broken_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def broken_number(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def broken_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def broken_end(folder: Path) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 5}))


def broken_shards(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    next(folder.glob("model-00002-of-*.safetensors")).unlink()


def changed(folder: Path, change) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        change(model, AutoTokenizer.from_pretrained(folder))
    model.save_pretrained(folder)


def untrained_end(folder: Path) -> None:
    """The token that ends an answer has no weights that were ever trained, as after adding one without training it."""

    def change(model, tokenizer) -> None:
        ids = end_of_turn_ids(tokenizer)
        head = model.get_output_embeddings().weight
        head[list(ids)] = head.mean(dim=0)

    changed(folder, change)


def one_word(folder: Path) -> None:
    """Whatever it is asked, one word is the likeliest."""

    def change(model, tokenizer) -> None:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        model.model.norm.weight.fill_(0)
        # All are alike now, so the first of them is taken: let that one be a word.
        [word] = tokenizer("yes", add_special_tokens=False).input_ids[:1]
        model.lm_head.bias = None
        table = model.get_input_embeddings().weight
        model.model.layers[-1].mlp.down_proj.weight.fill_(0)
        model.lm_head.weight[word] = 1.0
        model.model.norm.weight.fill_(1.0)
        table.copy_(table.abs() + 0.1)

    import torch

    changed(folder, change)


@pytest.mark.parametrize(("harm", "check"), [(untrained_end, "stops"), (one_word, "loops")])
def test_what_is_broken_in_what_it_says_is_found(finished, harm, check, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(finished[0], folder)
    harm(folder)
    code, found = invoke("test-model", folder, "--dataset", finished[1], "--rows", 3, "--max-new-tokens", 40)
    assert code == 1
    assert check in found["failed"], found["findings"]
    assert found["samples"][0]["answer"]
    assert {"files", "weights", "template", "ends"} & set(found["failed"]) == set()


@pytest.mark.parametrize(
    ("harm", "check", "said"),
    [
        (broken_tokenizer, "files", "no tokenizer.json"),
        (broken_file, "files", "model.safetensors"),
        (broken_shards, "files", "no model-00002-of-"),
        (broken_tensor, "weights", "model.layers.2.mlp.up_proj.weight"),
        (broken_number, "weights", "model.layers.1.mlp.up_proj.weight"),
        (broken_template, "template", "no chat template"),
        (broken_end, "ends", "generation_config.json ends answers at [5]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_broken_is_found_where_it_is(finished, harm, check, said, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(finished[0], folder)
    harm(folder)
    found = api.try_model(folder, dataset=str(finished[1]), rows=2, max_new_tokens=4)
    assert not found.passed
    assert next(f.check for f in found.findings if not f.passed) == check
    assert said in next(f.said for f in found.findings if f.check == check)
    assert found.as_dict()["exit_code"] == 1


def test_a_model_that_learned_nothing_does_not_stop(tiny_model_folder):
    code, found = invoke("test-model", "--model-path", tiny_model_folder, "--rows", 4, "--max-new-tokens", 40)
    assert code == 1
    assert "stops" in found["failed"]
    assert len(found["samples"]) == 4


def test_an_adapter_whose_weights_have_no_place_fails(tiny_model_folder, tmp_path):
    import peft
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    shutil.copy(tiny_model_folder / "tokenizer.json", tmp_path)
    shutil.copy(tiny_model_folder / "tokenizer_config.json", tmp_path)
    shutil.copy(tiny_model_folder / "chat_template.jinja", tmp_path)
    good = api.try_model(tmp_path, rows=1, max_new_tokens=2)
    assert next(f for f in good.findings if f.check == "weights").passed
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {name.replace("q_proj", "query"): tensor for name, tensor in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    found = api.try_model(tmp_path, rows=1, max_new_tokens=2)
    weights = next(f for f in found.findings if f.check == "weights")
    assert not weights.passed
    assert "query" in weights.said
    lacking = next(name for name in tensors if "lora_B" in name)
    save_file({n: t for n, t in tensors.items() if n != lacking}, tmp_path / "adapter_model.safetensors")
    found = api.try_model(tmp_path, rows=1, max_new_tokens=2)
    weights = next(f for f in found.findings if f.check == "weights")
    assert not weights.passed
    assert lacking in weights.said


@pytest.mark.parametrize(
    ("ids", "is_loop"),
    [
        ([1] * 12, True),
        ([1] * 11, False),
        ([9, 8, *[1, 2, 3] * 4], True),
        ([9, 8, *[1, 2, 3] * 3, 1, 2], False),
        ([*[1, 2, 3] * 9, 4], True),
        ([7, *range(60), *range(60), *range(60), *range(60)], True),
        ([*range(100), *range(100), *range(56)], True),
        ([*range(100), *range(100)], False),
        ([*range(60), *[99] * 14, *range(100, 160)], False),
        ([token for n in range(9) for token in (1000 + n, *range(20))], True),
        ([token for n in range(30) for token in (1, 1000 + n, 2, 3, 2000 + n, 4)], False),
        (list(range(200)), False),
        ([], False),
    ],
)
def test_a_loop_is_the_same_again_and_again(ids, is_loop):
    assert loops(ids) is is_loop


def test_every_task_of_the_recipe_has_questions_but_the_one_without_a_form():
    import typing

    tasks = set(typing.get_args(Recipe.model_fields["task"].annotation))
    assert set(TASK_PROMPTS) == tasks - {"custom"}


def test_what_cannot_be_asked_for_is_refused(tmp_path):
    with pytest.raises(TunesmithError, match="chat"):
        api.try_model("tiny", task="chatt")
    with pytest.raises(TunesmithError, match="rows = 0"):
        api.try_model("tiny", rows=0)
    code, found = invoke("test-model", tmp_path / "none")
    assert code == 1
    assert "none" in found["error"]
    code, found = invoke("test-model", "tiny", "--model-path", "other")
    assert code == 1
    assert "tiny, other" in found["error"]
