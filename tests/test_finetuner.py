"""LLMFineTuner: every method of the seed's API reference, its examples run as they stand on tiny models.

The examples name `gpt2` and `./data.jsonl`; here these are a GPT-2-shaped folder and a file in the working folder.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tunesmith import LLMFineTuner, get_user_input, models
from tunesmith.errors import DataError, ModelError, OutOfResources, RunError, TunesmithError, is_out_of_memory
from tunesmith.finetuner import SELF_REFERENCE
from tunesmith.training.run import open_run

ROWS = [{"prompt": f"what is the count of {i}", "response": "red blue green"} for i in range(24)]
PROMPT = "prompt: what is the count of 99 response:"


@pytest.fixture(scope="session")
def gpt2_folder(tiny_tokenizer, tmp_path_factory) -> Path:
    """A GPT-2-shaped model whose tokenizer, like GPT-2's own, has no padding token and no template."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2-shaped")
    end = tiny_tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tiny_tokenizer), n_positions=512, n_embd=16, n_layer=2, n_head=2,
        eos_token_id=end, bos_token_id=end,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    facts = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    facts.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(facts), encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, gpt2_folder, tiny_model_folder) -> Path:
    """A working folder with `gpt2`, `llama` and `data.jsonl`."""
    (tmp_path / "gpt2").symlink_to(gpt2_folder)
    (tmp_path / "llama").symlink_to(tiny_model_folder)
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (tmp_path / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def loaded(here):
    """A fine-tuner with its model loaded."""

    def load(name: str = "gpt2", output_dir: str = "./my_model") -> LLMFineTuner:
        finetuner = LLMFineTuner(name, output_dir)
        finetuner.load_model()
        return finetuner

    return load


def prepared(finetuner: LLMFineTuner, **options):
    dataset = finetuner.load_dataset_from_source("./data.jsonl", **options)
    return finetuner.prepare_dataset(dataset, max_length=48)[0]


SIGNATURES = {
    "__init__": "(self, model_name: str, output_dir: str = './finetuned_model') -> None",
    "load_model": "(self) -> None",
    "load_dataset_from_source": "(self, dataset_source: str, dataset_config: str | None = None, split: str = 'train', "
    "num_samples: int | None = None, data_files: str | None = None) -> Dataset",
    "detect_text_columns": "(self, dataset: Dataset) -> list[str]",
    "prepare_dataset": "(self, dataset: Dataset, text_columns: list[str] | None = None, max_length: int = 512) "
    "-> tuple[Dataset, list[str]]",
    "get_target_modules": "(self) -> list[str] | str",
    "setup_lora": "(self, r: int = 8, lora_alpha: int = 32, lora_dropout: float = 0.1, "
    "target_modules: list[str] | None = None) -> None",
    "train": "(self, train_dataset: Dataset, num_epochs: int = 3, batch_size: int = 4, learning_rate: float = 0.0002) "
    "-> None",
    "upload_to_huggingface": "(self, repo_name: str, token: str | None = None, create_new: bool = False, "
    "private: bool = False) -> None",
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_the_reference(name):
    signature = str(inspect.signature(getattr(LLMFineTuner, name))).replace("'", "").replace('"', "")
    assert signature == SIGNATURES[name].replace("'", "")


def test_benchmark_takes_what_the_reference_says_and_references_by_name():
    parameters = inspect.signature(LLMFineTuner.benchmark).parameters
    assert [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        "self", "test_prompts", "use_finetuned",
    ]  # fmt: skip
    assert parameters["use_finetuned"].default is False
    assert parameters["test_references"].default is None


def test_constructor_sets_the_documented_attributes():
    finetuner = LLMFineTuner(model_name="gpt2", output_dir="./my_model")
    assert (finetuner.model_name, finetuner.output_dir) == ("gpt2", "./my_model")
    assert finetuner.device in {"cpu", "cuda", "mps"}
    assert (finetuner.tokenizer, finetuner.model, finetuner.peft_model) == (None, None, None)
    assert LLMFineTuner("gpt2").output_dir == "./finetuned_model"


def test_load_model_sets_tokenizer_model_and_padding(here):
    finetuner = LLMFineTuner("gpt2")
    assert finetuner.load_model() is None
    assert type(finetuner.model).__name__ == "GPT2LMHeadModel"
    assert finetuner.tokenizer.pad_token == finetuner.tokenizer.eos_token
    assert finetuner.model.dtype == (torch.float16 if finetuner.device == "cuda" else torch.float32)


def test_each_step_says_what_it_came_to(loaded, capsys):
    finetuner = loaded()
    count = sum(p.numel() for p in finetuner.model.parameters())
    assert capsys.readouterr().out == (
        f"gpt2: GPT2LMHeadModel, {count:,} parameters in 2 layers, float32 on {finetuner.device}, "
        "context of 512 tokens\n"
    )
    dataset = finetuner.load_dataset_from_source("./data.jsonl", num_samples=1)
    assert capsys.readouterr().out == "1 row of ./data.jsonl: prompt (string), response (string)\n"
    finetuner.prepare_dataset(dataset)
    assert "1 of 1 row prepared from prompt, response" in capsys.readouterr().out
    scores = finetuner.benchmark([PROMPT], test_references=["red blue green"])
    assert (
        f"Base model, 1 prompt: rouge1 {scores['rouge1']:.4f}, rouge2 {scores['rouge2']:.4f}, "
        f"rougeL {scores['rougeL']:.4f}\n" in capsys.readouterr().out
    )


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".txt"])
def test_local_files_of_every_documented_format(loaded, here, suffix):
    """A JSON list of records loads as its columns, which in the original became one column `data`."""
    file = here / f"rows{suffix}"
    texts = {
        ".json": json.dumps(ROWS),
        ".jsonl": "\n".join(json.dumps(row) for row in ROWS),
        ".csv": "prompt,response\n" + "".join(f"{r['prompt']},{r['response']}\n" for r in ROWS),
        ".txt": "".join(f"{r['prompt']}\n" for r in ROWS),
    }
    file.write_text(texts[suffix], encoding="utf-8")
    dataset = loaded().load_dataset_from_source(dataset_source=f"./rows{suffix}", num_samples=10)
    assert type(dataset).__name__ == "Dataset"
    if suffix == ".txt":
        assert dataset["text"][:2] == [ROWS[0]["prompt"], ROWS[1]["prompt"]]
    else:
        assert [dict(row) for row in dataset] == ROWS[:10]


def test_named_splits_of_a_file(loaded, here):
    (here / "both.json").write_text(json.dumps({"train": ROWS[:5], "test": ROWS[5:]}), encoding="utf-8")
    finetuner = loaded()
    assert len(finetuner.load_dataset_from_source("both.json")) == 5
    assert len(finetuner.load_dataset_from_source("both.json", split="test", num_samples=3)) == 3
    with pytest.raises(DataError, match=r"no split 'validation'(.|\n)*splits train, held-out"):
        finetuner.load_dataset_from_source("both.json", split="validation")
    with pytest.raises(DataError, match="no split 'test'"):
        finetuner.load_dataset_from_source("data.jsonl", split="test")


def test_hub_data_sets_are_asked_for_as_the_examples_say(loaded, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    finetuner = loaded()
    dataset = finetuner.load_dataset_from_source(
        dataset_source="wikitext", dataset_config="wikitext-2-raw-v1", split="train", num_samples=5
    )
    assert len(dataset) == 5
    finetuner.load_dataset_from_source(
        dataset_source="HuggingFaceH4/ultrachat_200k",
        data_files="data/train_sft-00000-of-00004.parquet",
        num_samples=2,
    )
    assert asked[0][0] == ("wikitext", "wikitext-2-raw-v1")
    assert asked[0][1]["split"] == "train"
    assert asked[1][0] == ("HuggingFaceH4/ultrachat_200k", None)
    assert asked[1][1]["data_files"] == "data/train_sft-00000-of-00004.parquet"


def test_broken_rows_are_errors_where_they_are_wanted(loaded, here):
    good, bad = json.dumps(ROWS[0]), "{"
    (here / "broken.jsonl").write_text(f"{good}\n{good}\n{bad}\n", encoding="utf-8")
    finetuner = loaded()
    assert len(finetuner.load_dataset_from_source("broken.jsonl", num_samples=2)) == 2
    with pytest.raises(DataError, match=r"broken\.jsonl, line 3, column"):
        finetuner.load_dataset_from_source("broken.jsonl", num_samples=3)
    with pytest.raises(DataError, match=r"no file ./dat\.jsonl(.|\n)*data\.jsonl"):
        finetuner.load_dataset_from_source("./dat.jsonl")
    with pytest.raises(DataError, match="at least 1; found 0"):
        finetuner.load_dataset_from_source("data.jsonl", num_samples=0)
    with pytest.raises(DataError, match=r"num_samples has to be at least 1; found '5'(.|\n)*int\('5'\)"):
        finetuner.load_dataset_from_source("data.jsonl", num_samples="5")
    with pytest.raises(DataError, match="max_length has to be at least 1; found 0"):
        finetuner.prepare_dataset(ROWS, max_length=0)


def test_paths_may_be_path_objects(here):
    finetuner = LLMFineTuner(here / "gpt2", here / "my_model")
    finetuner.load_model()
    tokenized, _ = finetuner.prepare_dataset(finetuner.load_dataset_from_source(here / "data.jsonl"))
    finetuner.setup_lora()
    finetuner.train(tokenized, num_epochs=1)
    assert open_run(here / "my_model").state() == "done"


def test_on_cuda_weights_are_float16_and_several_gpus_share_them(here, monkeypatch):
    """What is asked of the loader; no GPU is needed to see it."""
    from tunesmith import finetuner as module

    asked = []
    whole, laid_out = models.outline("gpt2"), models.outline("gpt2")
    monkeypatch.setattr(models, "load_model", lambda name, **options: asked.append(options) or whole)
    monkeypatch.setattr(module, "_spread", lambda model: laid_out)
    one = LLMFineTuner("gpt2")
    one.device = "cuda"
    for count, model, device in ((1, whole, "cuda"), (2, laid_out, "cpu")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        one.load_model()
        assert (one.model, asked[-1]) == (model, {"dtype": "float16", "device": device})


def test_mixed_values_become_text_or_name_the_column(loaded, here):
    (here / "mixed.json").write_text(json.dumps([{"answer": "one"}, {"answer": 2}]), encoding="utf-8")
    assert loaded().load_dataset_from_source("mixed.json")["answer"][:] == ["one", "2"]
    (here / "odd.json").write_text(json.dumps([{"a": "one"}, {"a": ["two"]}]), encoding="utf-8")
    with pytest.raises(DataError, match=r"column 'a'(.|\n)*str \(first in row 1\), list \(first in row 2\)"):
        loaded().load_dataset_from_source("odd.json")


def test_detect_text_columns(loaded):
    from datasets import Dataset

    finetuner = loaded()
    assert finetuner.detect_text_columns(finetuner.load_dataset_from_source("./data.jsonl")) == [
        "prompt",
        "response",
    ]
    odd = Dataset.from_dict({"id": [1], "Answer": [7], "note": ["x"], "tags": [["a"]], "score": [0.5]})
    assert finetuner.detect_text_columns(odd) == ["Answer", "note"]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prepare_dataset_gives_padded_rows_whose_end_of_text_is_trained(loaded, name, capsys):
    """The original masked every end-of-text token as padding, so that no model learned to stop."""
    finetuner = loaded(name)
    dataset = finetuner.load_dataset_from_source("./data.jsonl")
    tokenized, cols = finetuner.prepare_dataset(dataset, max_length=64)
    assert cols == ["prompt", "response"]
    assert tokenized.column_names == ["input_ids", "attention_mask", "labels"]
    end = finetuner.tokenizer.eos_token_id
    for row, source in zip(tokenized, ROWS, strict=True):
        length = sum(row["attention_mask"])
        assert {len(values) for values in row.values()} == {64}
        assert row["input_ids"][length - 1] == row["labels"][length - 1] == end
        assert row["labels"][:length] == row["input_ids"][:length]
        assert set(row["labels"][length:]) == {-100}
        text = finetuner.tokenizer.decode(row["input_ids"][: length - 1])
        assert text == f"prompt: {source['prompt']} response: {source['response']}"
    assert "24 of 24 rows prepared" in capsys.readouterr().out


def test_prepare_dataset_by_hand_cuts_and_says_so(loaded, capsys):
    from datasets import Dataset

    finetuner = loaded()
    dataset = Dataset.from_dict(
        {"prompt": ["what is red", "", None], "response": ["blue", None, "  "], "n": [1, 2, 3]}
    )
    tokenized, cols = finetuner.prepare_dataset(dataset, text_columns=["response"], max_length=2)
    assert (cols, len(tokenized)) == (["response"], 1)
    assert tokenized[0]["labels"] != [-100, -100]
    assert finetuner.tokenizer.eos_token_id not in tokenized[0]["labels"]
    assert (
        "1 of 3 rows prepared from response: 2 without response and left out, 1 cut at 2 tokens"
        in capsys.readouterr().out
    )
    with pytest.raises(
        DataError, match=r"no column answer(.|\n)*prompt \(string\), response \(string\), n \(int64\)"
    ):
        finetuner.prepare_dataset(dataset, text_columns=["response", "answer"])
    with pytest.raises(DataError, match="No row has text in response"):
        finetuner.prepare_dataset(dataset.select([1]), text_columns=["response"])
    with pytest.raises(ModelError, match=r"context of the model, 512 tokens(.|\n)*513"):
        finetuner.prepare_dataset(dataset, max_length=513)
    with pytest.raises(DataError, match=r"No column(.|\n)*n \(int64\)"):
        finetuner.prepare_dataset(dataset.select_columns(["n"]))


def test_a_list_of_dictionaries_is_a_data_set_and_other_things_are_named(loaded):
    from datasets import Dataset, DatasetDict

    finetuner = loaded()
    assert finetuner.detect_text_columns(ROWS) == ["prompt", "response"]
    listed, cols = finetuner.prepare_dataset(ROWS, max_length=64)
    assert cols == ["prompt", "response"]
    whole = Dataset.from_list(ROWS)
    assert listed[:] == finetuner.prepare_dataset(whole, max_length=64)[0][:]
    assert listed[:] == finetuner.prepare_dataset(whole.with_format("numpy"), max_length=64)[0][:]
    uneven, _ = finetuner.prepare_dataset([{"text": "red"}, {"text": "blue", "id": 7}], max_length=8)
    assert len(uneven) == 2
    for odd, found in (
        ("data.jsonl", "a str"),
        ([], "an empty list"),
        ([ROWS[0], "red"], "a str in place 2"),
        (DatasetDict({"train": whole}), r"a DatasetDict(.|\n)*\['train'\]"),
    ):
        with pytest.raises(DataError, match=rf"needs a Dataset or a list of dictionaries(.|\n)*{found}"):
            finetuner.prepare_dataset(odd)


def shaped(tmp_path: Path, kind: str, **facts) -> LLMFineTuner:
    """A fine-tuner of a model that is a configuration only: shapes without weights."""
    from transformers import AutoConfig

    AutoConfig.for_model(kind, **facts).save_pretrained(tmp_path / kind)
    finetuner = LLMFineTuner(str(tmp_path / kind), str(tmp_path / "out"))
    finetuner.model = models.outline(str(tmp_path / kind))
    return finetuner


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}


@pytest.mark.parametrize(
    ("kind", "facts", "found"),
    [
        ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2}, ["c_attn", "c_proj"]),
        ("llama", {**SMALL, "intermediate_size": 32}, ["q_proj", "v_proj", "k_proj", "o_proj"]),
        ("opt", {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16}, ["q_proj", "v_proj", "k_proj"]),
        ("bert", {**SMALL, "intermediate_size": 32, "is_decoder": True}, ["query", "value", "key", "dense"]),
        (
            "phi3",
            {**SMALL, "intermediate_size": 32, "pad_token_id": 0},
            ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        ),
        ("gpt_neox", {**SMALL, "intermediate_size": 32}, "all-linear"),
    ],
)  # fmt: skip
def test_target_modules_family_by_family(tmp_path, kind, facts, found):
    finetuner = shaped(tmp_path, kind, **facts)
    names = finetuner.get_target_modules()
    assert (sorted(names) if isinstance(names, list) else names) == (
        sorted(found) if isinstance(found, list) else found
    )
    if kind in {"gpt2", "llama", "opt"}:
        assert names == found  # in the pattern's order, as the reference prints it
    if names != "all-linear":
        assert models.QUERY_VALUE & set(names), "the command line's table knows the family, too"
    finetuner.setup_lora(r=2)
    assert any("lora_A" in name for name, _ in finetuner.peft_model.named_parameters())


@pytest.mark.parametrize(
    ("targets", "trained", "share"), [(["c_attn"], 294_912, "0.2364"), (None, 811_008, "0.6475")]
)
def test_the_sample_output_comes_out_of_gpt2_s_shape(tmp_path, capsys, targets, trained, share):
    """The reference prints 294,912 beside the base's own 124,439,808; PEFT counts the adapter among all."""
    finetuner = shaped(tmp_path, "gpt2")
    assert sum(p.numel() for p in finetuner.model.parameters()) == 124_439_808
    with warnings.catch_warnings(action="error", category=UserWarning):
        finetuner.setup_lora(target_modules=targets)
    counted = sum(p.numel() for p in finetuner.peft_model.parameters() if p.requires_grad)
    assert counted == trained
    printed = capsys.readouterr().out.strip()
    assert (
        printed
        == f"trainable params: {trained:,} || all params: {124_439_808 + trained:,} || trainable%: {share}"
    )


def test_setup_lora_custom_and_again(loaded, capsys):
    finetuner = loaded("llama")
    finetuner.setup_lora()
    assert finetuner.get_target_modules() == ["q_proj", "v_proj", "k_proj", "o_proj"]
    finetuner.setup_lora(r=16, lora_alpha=64, lora_dropout=0.15, target_modules=["q_proj", "v_proj"])
    config = finetuner.peft_model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 64, 0.15)
    assert set(config.target_modules) == {"q_proj", "v_proj"}
    assert (config.bias, config.task_type) == ("none", "CAUSAL_LM")
    adapted = {name for name, _ in finetuner.peft_model.named_parameters() if "lora_A" in name}
    assert all("q_proj" in name or "v_proj" in name for name in adapted), "the first adapter is gone"
    assert "given up for a new one" in capsys.readouterr().out
    with pytest.raises(ModelError, match=r"no module c_attn(.|\n)*q_proj, k_proj, v_proj, o_proj, gate_proj"):
        finetuner.setup_lora(target_modules=["c_attn"])
    with pytest.raises(TunesmithError, match=r"adapter.rank has to be greater than 0; found 0"):
        finetuner.setup_lora(r=0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_complete_pipeline_and_what_it_leaves(here, name, capsys):
    """The reference's first pattern; the base's scores do not move."""
    finetuner = LLMFineTuner(name, "./my_model")
    finetuner.load_model()
    dataset = finetuner.load_dataset_from_source("./data.jsonl", num_samples=5000)
    tokenized, cols = finetuner.prepare_dataset(dataset, max_length=512)
    assert cols == ["prompt", "response"]
    test_prompts, references = [PROMPT, "prompt: what is the count of 77 response:"], ["red blue green"] * 2
    asked = {"test_references": references, "max_new_tokens": 4}
    base_scores = finetuner.benchmark(test_prompts, use_finetuned=False, **asked)
    assert finetuner.setup_lora(r=8, lora_alpha=32, lora_dropout=0.1) is None
    assert finetuner.benchmark(test_prompts, **asked) == base_scores
    assert finetuner.train(tokenized, num_epochs=3, batch_size=4, learning_rate=2e-4) is None
    finetuned_scores = finetuner.benchmark(test_prompts, use_finetuned=True, **asked)
    assert set(base_scores) == set(finetuned_scores) == {"rouge1", "rouge2", "rougeL"}
    assert finetuner.benchmark(test_prompts, use_finetuned=False, **asked) == base_scores
    assert "Model saved in ./my_model" in capsys.readouterr().out
    folder = here / "my_model"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        p.name for p in folder.iterdir()
    }
    run = open_run(folder)
    assert run.state() == "done"
    assert len(list(run.checkpoints.iterdir())) == 3, "one per epoch, the newest are kept"
    recipe = run.recipe()
    assert (recipe.data.dataset, recipe.data.max_rows) == (str(here / "data.jsonl"), 5000)
    training = recipe.training
    assert (training.gradient_accumulation_steps, training.logging_steps, training.save_steps) == (
        4,
        10,
        "epoch",
    )
    assert (training.scheduler, training.learning_rate) == ("linear", 2e-4)
    assert recipe.tracking.trackers == []
    assert not list(here.rglob("*.bin")), "adapter and tokenizer are safetensors and text"
    again = LLMFineTuner(name, "./my_model")
    assert again.benchmark(test_prompts, use_finetuned=True, **asked) == finetuned_scores
    assert again.benchmark(test_prompts, use_finetuned=False, **asked) == base_scores


@pytest.mark.slow
def test_what_is_trained_is_learned_and_ends(loaded, here):
    """The shipped model learns one answer; it stops after it, since the end of text was trained.

    In 30 optimizer steps; half of them suffice whatever the seed, while 10 leave it to the adapter's start.
    """
    finetuner = loaded("tiny")
    tokenized = prepared(finetuner)
    asked = {"test_prompts": [PROMPT], "test_references": ["red blue green"], "max_new_tokens": 20}
    base = finetuner.benchmark(**asked)
    finetuner.setup_lora()
    finetuner.train(tokenized, num_epochs=10, batch_size=2, learning_rate=1e-2)
    assert open_run(here / "my_model").read("plan.json")["total_steps"] == 30
    assert finetuner.benchmark(**asked, use_finetuned=True) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert finetuner.benchmark(**asked) == base
    assert base["rougeL"] < 0.2


@pytest.fixture
def trained(loaded):
    """A fine-tuner after two short epochs."""
    finetuner = loaded()
    tokenized = prepared(finetuner)
    finetuner.setup_lora()
    finetuner.train(train_dataset=tokenized, num_epochs=2, batch_size=8, learning_rate=1e-2)
    return finetuner


def test_the_loading_and_merging_patterns(trained, here):
    """The reference's second and third pattern, with transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base_model = AutoModelForCausalLM.from_pretrained("gpt2")
    tokenizer = AutoTokenizer.from_pretrained("gpt2")
    model = PeftModel.from_pretrained(base_model, "./my_model")
    inputs = tokenizer("what is the", return_tensors="pt", return_token_type_ids=False)
    outputs = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(outputs[0], skip_special_tokens=True).startswith("what is the")
    trained.peft_model.eval()
    with torch.no_grad():
        loaded_logits = model(**inputs).logits
        torch.testing.assert_close(loaded_logits, trained.peft_model.cpu()(**inputs).logits)
        merged_model = model.merge_and_unload()
        merged_model.save_pretrained("./merged_model")
        tokenizer.save_pretrained("./merged_model")
        merged = AutoModelForCausalLM.from_pretrained("./merged_model")
        torch.testing.assert_close(merged(**inputs).logits, loaded_logits, atol=1e-5, rtol=1e-4)
        base_logits = AutoModelForCausalLM.from_pretrained("gpt2")(**inputs).logits
    assert not torch.allclose(base_logits, loaded_logits), "the saved adapter is a trained one"


def test_a_folder_that_holds_a_finished_run_is_not_overwritten(trained, here):
    before = weights(here / "my_model")
    with pytest.raises(RunError, match=r"holds a run already(.|\n)*'done'(.|\n)*another output_dir"):
        trained.train(prepared(trained), num_epochs=1)
    assert all(torch.equal(before[name], w) for name, w in weights(here / "my_model").items())
    (here / "full").mkdir()
    (here / "full/notes.txt").write_text("mine", encoding="utf-8")
    trained.output_dir = "./full"
    with pytest.raises(RunError, match=r"not empty(.|\n)*another output_dir"):
        trained.train(prepared(trained), num_epochs=1)


def test_an_interrupted_training_goes_on_when_called_again(loaded, here, monkeypatch):
    from tunesmith.training.run import Run

    straight = loaded(output_dir="./straight")
    tokenized = prepared(straight)

    def start(finetuner):
        torch.manual_seed(0)
        finetuner.setup_lora(lora_dropout=0.0)
        finetuner.train(tokenized, num_epochs=3, batch_size=2)

    start(straight)
    stopped = loaded(output_dir="./stopped")
    progress = Run.progress

    def stop_at_four(run, stage, done, total, **fields):
        progress(run, stage, done, total, **fields)
        if done == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "progress", stop_at_four)
    with pytest.raises(KeyboardInterrupt, match=r"step 4 of 9(.|\n)*again"):
        start(stopped)
    monkeypatch.setattr(Run, "progress", progress)
    run = open_run(here / "stopped")
    assert run.state() == "interrupted"
    (run.path / "plan.json").unlink()  # the checkpoint says what its data were
    with pytest.raises(
        RunError, match=r"rests on is not what it was(.|\n)*tokens was (.|\n)*another output_dir"
    ):
        stopped.train(tokenized.select(range(8)), num_epochs=3, batch_size=2)
    with pytest.raises(RunError, match=r"data\.max_rows was None, is 8"):
        stopped.train(prepared(stopped, num_samples=8), num_epochs=3, batch_size=2)
    other = loaded(output_dir="./stopped")
    other.setup_lora(r=4)
    with pytest.raises(RunError, match=r"adapter.rank was 8, is 4"):
        other.train(tokenized, num_epochs=3, batch_size=2)
    assert run.state() == "interrupted", "what is refused changes nothing"
    stopped.train(tokenized, num_epochs=3, batch_size=2)
    assert run.state() == "done"
    expected = weights(here / "straight")
    assert all(torch.equal(expected[name], w) for name, w in weights(here / "stopped").items())


def test_rouge_is_that_of_rouge_score(loaded, capsys):
    from rouge_score.rouge_scorer import RougeScorer

    finetuner = loaded()
    prompts, references = ["what is the capital", "red blue"], ["one two three", "blue red"]
    scores = finetuner.benchmark(prompts, test_references=references, max_new_tokens=6)
    assert SELF_REFERENCE not in capsys.readouterr().out
    alone = finetuner.benchmark(prompts, max_new_tokens=6)
    assert SELF_REFERENCE in capsys.readouterr().out
    answers = []
    for prompt in prompts:
        ids = finetuner.tokenizer(prompt, return_tensors="pt").input_ids
        out = finetuner.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        answers.append(finetuner.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for name in scores:
        mean = sum(scorer.score(r, a)[name].fmeasure for r, a in zip(references, answers, strict=True)) / 2
        assert scores[name] == pytest.approx(mean)
        echo = (
            sum(scorer.score(p, f"{p} {a}")[name].fmeasure for p, a in zip(prompts, answers, strict=True)) / 2
        )
        assert alone[name] == pytest.approx(echo)


def test_benchmark_says_how_training_texts_begin_and_refuses_odd_lists(loaded, capsys):
    finetuner = loaded()
    prepared(finetuner)
    finetuner.benchmark(["what is red"], test_references=["x"], max_new_tokens=1)
    assert "training texts begin with `prompt: … response:`" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"one answer per prompt(.|\n)*1 prompt, 2 references"):
        finetuner.benchmark(["a"], test_references=["b", "c"])
    for wrong in ([], "what", ["a", " "]):
        with pytest.raises(DataError, match="list of texts"):
            finetuner.benchmark(wrong)


def test_prompts_beyond_the_context_are_refused_and_cut_answers_counted(loaded, capsys):
    finetuner = loaded()
    full, nearly = "z" * 512, "z" * 509
    lengths = [len(finetuner.tokenizer(text)["input_ids"]) for text in (full, nearly)]
    assert lengths == [512, 509]
    with pytest.raises(
        DataError, match=r"1 prompt of 2 leaves no room .* context of 512 tokens(.|\n)*prompt 2 with 512"
    ):
        finetuner.benchmark(["red", full], test_references=["x", "y"])
    finetuner.benchmark(["red", nearly], test_references=["x", "y"], max_new_tokens=3)
    assert "context" not in capsys.readouterr().out.partition("tokens\n")[2]
    finetuner.benchmark(["red", nearly], test_references=["x", "y"], max_new_tokens=4)
    said = "1 answer of 2 ends where the model's context of 512 tokens does, before 4 new tokens."
    assert said in capsys.readouterr().out
    with pytest.raises(DataError, match="max_new_tokens has to be at least 1; found 0"):
        finetuner.benchmark(["red"], max_new_tokens=0)


@pytest.mark.parametrize(
    ("call", "missing"),
    [
        (lambda f, d: f.prepare_dataset(d), r"load_model\(\)"),
        (lambda f, d: f.get_target_modules(), r"load_model\(\)"),
        (lambda f, d: f.setup_lora(), r"load_model\(\)"),
        (lambda f, d: f.train(d), r"load_model\(\)"),
        (lambda f, d: f.benchmark(["a"]), r"load_model\(\)"),
        (lambda f, d: (f.load_model(), f.train(d)), r"setup_lora\(\)"),
        (lambda f, d: (f.load_model(), f.setup_lora(), f.train(d)), r"prepare_dataset\(\)"),
        (
            lambda f, d: (f.load_model(), f.benchmark(["a"], use_finetuned=True)),
            r"setup_lora\(\) and train\(\)",
        ),
        (
            lambda f, d: (f.load_model(), f.setup_lora(), f.benchmark(["a"], use_finetuned=True)),
            r"Call train\(\) before",
        ),
        (lambda f, d: f.upload_to_huggingface("a/b"), r"train\(\)"),
    ],
)
def test_a_wrong_order_names_the_missing_step(here, call, missing):
    finetuner = LLMFineTuner("gpt2", "./my_model")
    dataset = finetuner.load_dataset_from_source("./data.jsonl")
    with pytest.raises(TunesmithError, match=missing):
        call(finetuner, dataset)
    assert not (here / "my_model").exists()


@pytest.mark.parametrize("at", [2, 5])
def test_memory_that_runs_out_in_an_update_costs_the_steps_since_the_last_checkpoint(
    loaded, here, monkeypatch, at
):
    """Three steps are an epoch, after which a checkpoint is written: once none is there, and once that of step 3."""
    from torch.optim import AdamW

    updated, tried = AdamW.step, []

    def short(self, *args, **kwargs):
        tried.append(len(tried) + 1)
        result = updated(self, *args, **kwargs)
        if len(tried) == at:  # behind it: weights and states are others by now
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return result

    for name in ("straight", "short"):
        finetuner = loaded(output_dir=f"./{name}")
        tokenized = prepared(finetuner)
        finetuner.setup_lora(lora_dropout=0.1)
        if name == "short":
            monkeypatch.setattr(AdamW, "step", short)
        finetuner.train(tokenized, num_epochs=2, batch_size=2)
    [said] = [e for e in open_run(here / "short").events() if e.get("name") == "memory"]
    assert said["value"] == f"taken back to {'the start' if at == 2 else 'checkpoint-step-3'}"
    expected = weights(here / "straight")
    assert all(torch.equal(expected[name], w) for name, w in weights(here / "short").items())


def test_out_of_memory_says_what_to_lower_in_numbers(loaded, here, monkeypatch):
    """The reference's own handler: a RuntimeError with `out of memory` in it."""
    finetuner = loaded()
    tokenized = prepared(finetuner)
    finetuner.setup_lora()
    longest = max(sum(row["attention_mask"]) for row in tokenized)

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("trl.SFTTrainer.training_step", full)
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        finetuner.train(tokenized, batch_size=8)
    text = str(caught.value)
    assert isinstance(caught.value, OutOfResources)
    assert f"batch_size=8 on rows of up to {longest} tokens, {8 * longest:,} tokens per pass" in text
    assert f"batch_size=4): {4 * longest:,} tokens per pass" in text
    assert f"max_length={longest // 2}" in text
    assert "GiB held at most" in text
    assert not (here / "my_model").exists(), "the folder is free for the next try"
    monkeypatch.undo()
    monkeypatch.chdir(here)
    finetuner.train(tokenized, batch_size=4, num_epochs=1)


def test_answering_out_of_memory_says_what_to_lower_in_numbers(loaded, monkeypatch):
    finetuner = loaded()

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(type(finetuner.model), "generate", full)
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        finetuner.benchmark([PROMPT], max_new_tokens=20)
    assert "benchmark(..., max_new_tokens=10)" in str(caught.value)
    assert "GiB held at most" in str(caught.value)


@pytest.mark.parametrize("missing", [None, "", "  "])
def test_a_row_without_its_answer_is_left_out(loaded, capsys, missing):
    """It would teach to end behind the question. An empty column before the answer is nothing amiss."""
    finetuner = loaded()
    rows = [
        {"q": "one", "hint": "h", "a": "two"},
        {"q": "one", "hint": None, "a": "three"},
        {"q": "x", "hint": "h", "a": missing},
    ]
    tokenized, _ = finetuner.prepare_dataset(rows, text_columns=["q", "hint", "a"], max_length=64)
    assert len(tokenized) == 2
    assert "2 of 3 rows prepared from q, hint, a: 1 without a and left out" in capsys.readouterr().out


def test_the_reference_s_benchmark_and_preparation_examples_word_for_word(trained, capsys):
    finetuner = trained
    dataset = finetuner.load_dataset_from_source("./data.jsonl")
    # Manual column specification
    tokenized, cols = finetuner.prepare_dataset(dataset, text_columns=["prompt", "response"], max_length=256)
    assert (cols, len(tokenized[0]["input_ids"])) == (["prompt", "response"], 256)
    test_prompts = [
        "What is machine learning?",
        "Explain neural networks.",
        "Define artificial intelligence.",
    ]
    base_scores = finetuner.benchmark(test_prompts, use_finetuned=False)
    finetuned_scores = finetuner.benchmark(test_prompts, use_finetuned=True)
    for metric in base_scores:
        improvement = (finetuned_scores[metric] - base_scores[metric]) / base_scores[metric] * 100
        print(f"{metric}: {improvement:+.2f}% improvement")
    printed = capsys.readouterr().out
    assert re.search(r"rougeL: [+-]\d+\.\d\d% improvement", printed)
    assert printed.count(SELF_REFERENCE) == 2, "what these scores are is said each time"
    assert all(0 < base_scores[name] <= 1 for name in ("rouge1", "rouge2", "rougeL"))


@pytest.mark.parametrize(
    ("error", "ends", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError, "Reduce batch size or sequence length"),
        (KeyboardInterrupt(), SystemExit, "Training interrupted"),
    ],
)
def test_the_reference_s_error_handling_word_for_word(loaded, monkeypatch, capsys, error, ends, said):
    finetuner = loaded()
    dataset = prepared(finetuner)
    finetuner.setup_lora()

    def fail(*args, **options):
        raise error

    monkeypatch.setattr("trl.SFTTrainer.training_step", fail)

    def handled():
        try:
            finetuner.train(dataset)
        except RuntimeError as e:
            if "out of memory" in str(e):
                print("Reduce batch size or sequence length")
            raise
        except KeyboardInterrupt:
            print("Training interrupted")
            sys.exit(0)

    with pytest.raises(ends):
        handled()
    assert said in capsys.readouterr().out


def test_the_loss_is_taken_at_the_end_of_text_even_where_it_pads(loaded, monkeypatch):
    """What the trainer's batches hold: GPT-2 pads with its end-of-text token, and the labels know which is which."""
    from trl import SFTTrainer

    finetuner = loaded("gpt2")
    end = finetuner.tokenizer.eos_token_id
    assert finetuner.tokenizer.pad_token_id == end
    batches = []
    step = SFTTrainer.training_step

    def seen(trainer, model, inputs, *args):
        batches.append({name: inputs[name].tolist() for name in ("input_ids", "attention_mask", "labels")})
        return step(trainer, model, inputs, *args)

    monkeypatch.setattr(SFTTrainer, "training_step", seen)
    tokenized = prepared(finetuner)
    finetuner.setup_lora()
    finetuner.train(tokenized, num_epochs=1, batch_size=8)
    rows = [row for batch in batches for row in zip(*batch.values(), strict=True)]
    assert len(rows) == len(ROWS)
    for ids, mask, labels in rows:
        length = sum(mask)
        assert labels[length - 1] == ids[length - 1] == end
        assert labels[:length] == ids[:length]
        assert set(labels[length:]) <= {-100}
    assert max(len(ids) for ids, _, _ in rows) < 48, "padding to max_length is not computed on"


def test_base_means_the_base_s_weights_with_a_trained_adapter_on_them(trained, monkeypatch):
    """Which model is asked, by its logits: those of a freshly loaded base, and other ones when tuned."""
    from tunesmith import generation

    seen = []

    def asked(model, tokenizer, ids, **options):
        with torch.no_grad():
            seen.append(model.eval()(torch.tensor([ids[0]], device=model.device)).logits.cpu())
        return [generation.Generated((), "", "stop")] * len(ids)

    monkeypatch.setattr(generation, "generate", asked)
    fresh = LLMFineTuner("gpt2")
    fresh.load_model()
    for finetuner, tuned in ((fresh, False), (trained, False), (trained, True)):
        finetuner.benchmark(["what is red"], use_finetuned=tuned)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)
    assert not torch.allclose(seen[0], seen[2])


def test_a_data_set_tokenized_elsewhere_is_trained_and_an_empty_one_is_not(loaded, here):
    from datasets import Dataset

    finetuner = loaded()
    finetuner.setup_lora()
    ids = finetuner.tokenizer(["what is red", "blue"])["input_ids"]
    rows = Dataset.from_dict({"input_ids": ids})
    with pytest.raises(DataError, match="no rows"):
        finetuner.train(rows.select([]))
    finetuner.train(rows, num_epochs=1)
    run = open_run(here / "my_model")
    assert run.recipe().data.dataset == "in memory"
    counts = {"rows_in": 2, "train": 2, "validation": 0, "held_out": 0, "dropped": 0, "truncated": 2}
    assert run.read("plan.json")["rows"] == counts
    assert run.read("training.json")["tokens"] == sum(map(len, ids))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": [5, 6], "attention_mask": [0, 0]}, r"no row with a token to learn(.|\n)*1 row"),
        ({"input_ids": [5]}, "no row with a token to learn"),
        ({"input_ids": []}, "no row with a token to learn"),
        ({"input_ids": [5, 6], "labels": [5, -100]}, "no row with a token to learn"),
        ({"input_ids": [5] * 513}, r"Row 1 is longer .* context of 512 tokens(.|\n)*513 tokens(.|\n)*max_length=512"),
        ({"input_ids": [5, 6], "attention_mask": [1]}, "Row 1 has 2 tokens in input_ids and 1 value in attention_mask"),
        ({"input_ids": [5, 6], "labels": 1}, r"labels of row 1 is not a list of whole numbers(.|\n)*found: 1"),
        ({"input_ids": [[5, 6]]}, r"input_ids of row 1 is not a list of whole numbers(.|\n)*\[\[5, 6\]\]"),
        ({"input_ids": [[5], [6, 7]]}, r"input_ids of row 1 is not a list of whole numbers"),
        ({"input_ids": "red"}, r"input_ids of row 1 is not a list of whole numbers(.|\n)*'red'"),
        ({"input_ids": [5, None]}, r"input_ids of row 1 is not a list of whole numbers"),
        ({"input_ids": [5, 99_999]}, r"Row 1 holds a token in input_ids(.|\n)*99999; the model's tokens are 0 to \d+"),
        ({"input_ids": [5, 6], "labels": [5, -1]}, r"Row 1 holds a token in labels(.|\n)*-1;"),
    ],
)  # fmt: skip
def test_odd_rows_tokenized_elsewhere_are_named(loaded, here, row, said):
    finetuner = loaded()
    finetuner.setup_lora()
    with pytest.raises(DataError, match=said):
        finetuner.train([row])
    assert not (here / "my_model").exists()


def test_rows_without_a_token_to_learn_are_left_out_and_counted(loaded, here, capsys):
    finetuner = loaded()
    finetuner.setup_lora()
    good = finetuner.tokenizer("what is red")["input_ids"]
    finetuner.train(
        [
            {"input_ids": good, "attention_mask": [0] * len(good)},
            {"input_ids": good, "attention_mask": [1] * len(good)},
        ],
        num_epochs=1,
    )
    run = open_run(here / "my_model")
    counts = {"rows_in": 2, "train": 1, "validation": 0, "held_out": 0, "dropped": 1, "truncated": 1}
    assert run.read("plan.json")["rows"] == counts
    assert run.read("training.json")["tokens"] == len(good)
    assert re.search(r"dropped 1: no token", capsys.readouterr().err)


class Hub:
    """Stands for huggingface_hub.HfApi and keeps what it is asked."""

    asked: list = []
    endpoint = "https://huggingface.co"

    def __init__(self, token=None):
        Hub.asked = [("token", token)]

    def create_repo(self, name, **options):
        Hub.asked.append(("create", name, options))

    def repo_info(self, name):
        return SimpleNamespace(private=True)

    def upload_folder(self, *, folder_path, repo_id, **options):
        Hub.asked.append(("upload", repo_id, sorted(p.name for p in Path(folder_path).iterdir())))
        if repo_id.endswith("broken"):
            raise ValueError(f"Illegal header value b'Bearer {dict(Hub.asked[:1])['token']}'")

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, **options):
        assert path_in_repo == "README.md"


def test_upload_creates_only_when_asked_and_never_shows_the_token(trained, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    trained.upload_to_huggingface(
        repo_name="myusername/gpt2-finetuned", token="hf_xxxxxxxxxxxxx", create_new=True, private=False
    )
    name = "myusername/gpt2-finetuned"
    assert Hub.asked[:2] == [
        ("token", "hf_xxxxxxxxxxxxx"),
        ("create", name, {"private": False, "exist_ok": True}),
    ]
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= set(
        Hub.asked[2][2]
    )
    printed = capsys.readouterr().out
    assert f"✅ Model uploaded successfully to: https://huggingface.co/{name}" in printed
    trained.upload_to_huggingface("me/there", private=True)
    assert [kind for kind, *_ in Hub.asked] == ["token", "upload"]
    with pytest.raises(TunesmithError, match="not uploaded to me/broken") as caught:
        trained.upload_to_huggingface("me/broken", token="hf_secret")
    assert "hf_secret" not in str(caught.value)
    assert "create_new=True" in str(caught.value)
    for file in Path("my_model").rglob("*"):
        if file.is_file():
            assert b"hf_xxxxxxxxxxxxx" not in file.read_bytes()


def test_the_page_s_code_runs_as_it_stands(here, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs/notebook.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    names: dict = {}
    exec(code, names)
    assert set(names["before"]) == set(names["after"]) == {"rouge1", "rouge2", "rougeL"}
    assert "uploaded successfully" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "default", "answer"), [("", "gpt2", "gpt2"), (" tiny ", "gpt2", "tiny"), ("", None, "")]
)
def test_get_user_input(monkeypatch, typed, default, answer):
    shown = []
    monkeypatch.setattr("builtins.input", lambda prompt: shown.append(prompt) or typed)
    assert get_user_input("Enter model name", default) == answer
    assert shown == ["Enter model name [gpt2]: " if default else "Enter model name: "]


def test_a_tuned_run_can_be_tuned_again(trained, loaded, here):
    """The adapter below becomes part of the weights, kept beside the new folder, so that the result loads."""
    second = loaded("./my_model", "./second")
    tokenized = prepared(second)
    second.setup_lora(r=2)
    second.train(tokenized, num_epochs=1)
    tuned = models.load_model("./second")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(tuned.eval()(ids).logits, second.peft_model.eval().cpu()(ids).logits)


def test_an_encoder_decoder_is_named_with_the_way_to_train_it(tiny_t5_folder, tmp_path):
    tuner = LLMFineTuner(str(tiny_t5_folder), str(tmp_path / "out"))
    with pytest.raises(ModelError, match="encoder-decoder") as refused:
        tuner.load_model()
    assert "--method seq2seq" in str(refused.value)
    assert tuner.model is None


def test_the_adapter_s_start_is_the_same_every_time(tiny_model_folder, tmp_path):
    def start():
        tuner = LLMFineTuner(str(tiny_model_folder), str(tmp_path / "out"))
        tuner.load_model()
        tuner.setup_lora()
        return {
            name: p.detach().clone() for name, p in tuner.peft_model.named_parameters() if "lora_A" in name
        }

    first, second = start(), start()
    assert first
    assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
            ),
            True,
        ),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
    ],
)
def test_memory_runs_out_on_a_cpu_as_well(error, expected):
    assert is_out_of_memory(error) is expected
