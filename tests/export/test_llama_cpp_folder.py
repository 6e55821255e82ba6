"""What only llama.cpp's own source folder has, which TUNESMITH_LLAMA_CPP names: real vocabularies and the converter.

The folder is in the source archive of llama-cpp-python, as `vendor/llama.cpp`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import generate_merges

from tunesmith import api
from tunesmith.engines import llamacpp
from tunesmith.export import gguf as writing
from tunesmith.export.vocabulary import CONTROL, SPLITS, USER_DEFINED, WHOLE, vocabulary_of

gguf = pytest.importorskip("gguf")
FOLDER = Path(os.environ.get("TUNESMITH_LLAMA_CPP", "nowhere"))
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(not llamacpp.is_installed(), reason="llama-cpp-python is not here"),
    pytest.mark.skipif(not (FOLDER / "models").is_dir(), reason="TUNESMITH_LLAMA_CPP names no source folder"),
]


def of_vocabulary(file: Path):
    """A tokenizer of transformers' with the tokens and merges of a GGUF file."""
    fields = gguf.GGUFReader(file).fields

    def said(key: str):
        return fields[f"tokenizer.ggml.{key}"].contents()

    tokens, kinds = said("tokens"), said("token_type")
    ids = {token: n for n, token in enumerate(tokens)}
    added = [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    eos = tokens[said("eos_token_id")]
    if said("model") == "llama":
        merges = generate_merges(ids, dict(zip(tokens, said("scores"), strict=True)))
        backend = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        backend.decoder = decoders.ByteFallback()
        backend.add_tokens(added)
        own = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token=eos
        )
        return own, len(tokens), None
    merges = [(merge[: (at := merge.find(" ", 1))], merge[at + 1 :]) for merge in said("merges")]
    name = said("pre")
    backend = Tokenizer(models.BPE(ids, merges, ignore_merges=name in WHOLE))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(expression), "isolated") for expression in SPLITS[name]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(added)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos), len(tokens), name


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "qwen35", "llama-spm", "phi-3"])
def test_a_real_vocabulary_is_written_so_that_llama_cpp_reads_it_as_its_own_tokenizer_does(name, tmp_path):
    """By the texts of llama.cpp's own tests, and the ids that each model's own tokenizer gave them there."""
    file = FOLDER / "models" / f"ggml-vocab-{name}.gguf"
    texts = file.with_suffix(".gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = file.with_suffix(".gguf.out").read_text(encoding="utf-8").split("\n")
    expected = [[int(number) for number in line.split()] for line in lines[: len(texts)]]
    own, rows, split = of_vocabulary(file)
    assert [own(text, add_special_tokens=False).input_ids for text in texts] == expected
    vocabulary = vocabulary_of(
        own, rows=rows, stop_ids=[own.eos_token_id], texts=[text for text in texts if text]
    )
    assert vocabulary.keys.get("ggml.pre") == (split or "default")
    config = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.float16).save_pretrained(tmp_path)
    writing.write(tmp_path, tmp_path / "x.gguf", quant="f16", vocabulary=vocabulary, config=config, name="x")
    with llamacpp.opened(tmp_path / "x.gguf", length=64, words_only=True) as loaded:
        assert [llamacpp.tokenized(loaded, text) for text in texts] == expected


def test_the_converter_itself_writes_a_family_that_only_it_knows(tmp_path):
    """GPT-2 with the tokenizer of GPT-2, proven as what is written here is."""
    own, rows, _ = of_vocabulary(FOLDER / "models" / "ggml-vocab-gpt-2.gguf")
    own.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    folder = tmp_path / "model"
    config = transformers.GPT2Config(
        vocab_size=rows, n_embd=32, n_layer=2, n_head=2, n_positions=256, n_ctx=256, eos_token_id=own.eos_token_id,
        bos_token_id=own.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    own.save_pretrained(folder)
    made = api.export(folder, quant="f16", output=tmp_path / "out")
    assert made.passed, made.parity.problems()
    assert made.parity.check.positions > 0
    assert any("llama.cpp's converter" in note for note in made.notes)
