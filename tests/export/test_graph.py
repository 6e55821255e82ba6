"""ONNX: onnxruntime gives the logits that transformers computes, or the model is refused before any work."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from test_card import used
from test_gguf import CONFIGS, SIZES, saved
from transformers import AutoConfig, AutoTokenizer

from tunesmith import api
from tunesmith.assets import TINY_MODEL
from tunesmith.errors import MissingExtra, ModelError, TunesmithError
from tunesmith.export import graph, parity

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 4096}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL)


PROVEN = "llama, own head"
"""The family whose graph CI writes; each takes its seconds."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == PROVEN else pytest.mark.thorough)
        for name in (*CONFIGS, "gpt2")
    ],
)
def test_onnxruntime_computes_what_transformers_does(name, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(CONFIGS, "gpt2", ("gpt2", GPT2))
    model = saved(name, tmp_path, tokenizer)
    graph.check_family(model.config, folder="there")
    graph.write(tmp_path, tmp_path / graph.NAME)
    reader = graph.reader(tmp_path / graph.NAME, model, tokenizer)
    for length in (5, 48, 100):  # a window of 16 and one of 64 tokens among them
        ids = torch.randint(4, 4000, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        answer = [100, 200, 300] if model.config.is_encoder_decoder else []
        with torch.no_grad():
            expected = parity._logits(model, ids, answer).numpy()
        found = reader.logits(ids, answer).numpy()
        assert numpy.abs(found - expected).max() <= 1e-4 * numpy.abs(expected).max()


@pytest.mark.thorough
def test_the_verb_writes_a_graph_and_proves_it(tmp_path, capsys):
    made = api.export(TINY_MODEL, to="onnx", output=tmp_path / "out")
    assert made.passed
    assert (made.file.name, made.quant) == ("model.onnx", "f32")
    assert {"tokenizer.json", "chat_template.jinja", "parity.json"} <= {p.name for p in made.folder.iterdir()}
    kept = json.loads((made.folder / "parity.json").read_text())
    assert kept["prompts"] == kept["same_prompts"] == kept["check"]["same_answers"] == 4
    assert kept["check"]["largest_difference"] <= 1e-4 * kept["check"]["largest_logit"]
    assert kept["read_by"].startswith("onnxruntime")
    assert "keeps no cache" in made.notes[0]
    used((made.folder / "README.md").read_text(), made.folder)
    asked = [{"role": "user", "content": "Hello"}]
    answer = "".join(api.Chat(TINY_MODEL).answer(asked, max_new_tokens=256))
    assert capsys.readouterr().out == f"{answer}\n"


def test_a_family_that_was_not_tried_is_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match=r"(?s)kind 'bloom' are not written as ONNX.*Written are: gemma2"):
        graph.check_family(AutoConfig.for_model("bloom"), folder="there")
    for family in graph.FAMILIES:
        graph.check_family(AutoConfig.for_model(family), folder="there")
    assert {kind for kind, _ in CONFIGS.values()} | {"gpt2"} == set(graph.FAMILIES), "each has its test"
    with pytest.raises(TunesmithError, match="not stored as 'q8_0' in onnx"):
        api.export(TINY_MODEL, to="onnx", quant="q8_0", output=tmp_path / "out")


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "onnxscript" else found(n))
    with pytest.raises(MissingExtra, match=r"(?s)onnxscript.*tunesmith\[onnx\]"):
        api.export(TINY_MODEL, to="onnx", output=tmp_path / "out")


def test_what_torch_cannot_export_says_why(tmp_path, tokenizer, monkeypatch):
    saved("qwen2", tmp_path, tokenizer)

    def fails(*arguments, **options):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(ModelError, match=r"(?s)cannot export.*no such operator"):
        graph.write(tmp_path, tmp_path / "x.onnx")
    assert SIZES["vocab_size"] == len(tokenizer)
