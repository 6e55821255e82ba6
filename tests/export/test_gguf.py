"""GGUF: every family is read back with the logits that transformers computes, or refused before any work."""

from __future__ import annotations

import json
import shutil

import numpy
import pytest
import torch
from test_card import used
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from typer.testing import CliRunner

from tunesmith import api
from tunesmith.assets import TINY_MODEL
from tunesmith.cli import app
from tunesmith.engines import llamacpp
from tunesmith.errors import ModelError, RunError, TunesmithError, size
from tunesmith.export import gguf as writing
from tunesmith.export import ollama, parity
from tunesmith.export.vocabulary import BYTE, CONTROL, PROBE, SPLITS, vocabulary_of

gguf = pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(not llamacpp.is_installed(), reason="llama-cpp-python is not here")

SIZES = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "llama, own head": ("llama", {"tie_word_embeddings": False}),
    "llama, biases, wide heads": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama 3 positions": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}),
    "linear positions": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral, a window": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 16, "num_hidden_layers": 3,
                          "layer_types": WINDOWS}),
    "gemma3": ("gemma3_text", {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 16,
                               "num_hidden_layers": 3, "layer_types": WINDOWS}),
    "phi3": ("phi3", {}),
    "phi3, long": ("phi3", {"original_max_position_embeddings": 32, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0 + 0.1 * n for n in range(8)],
        "long_factor": [2.0 + 0.3 * n for n in range(8)], "original_max_position_embeddings": 32}}),
    "t5": ("t5", {"tie_word_embeddings": True, "feed_forward_proj": "relu"}),
    "t5, gated": ("t5", {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
}  # fmt: skip
T5_SIZES = {
    "vocab_size": 4096, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 3, "pad_token_id": 3, "eos_token_id": 2,
}  # fmt: skip
TEXT = "The quick brown fox jumps over the lazy dog. SELECT name FROM users WHERE id = 12; " * 2


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL)


def saved(name: str, folder, tokenizer):
    kind, settings = CONFIGS[name]
    config = AutoConfig.for_model(kind, **{**(T5_SIZES if kind == "t5" else SIZES), **settings})
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval()
    for weight in model.parameters():  # norms of 1 and biases of 0 would hide what is left out
        weight.data += torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def written(name: str, folder, tokenizer, quant: str = "f32"):
    model = saved(name, folder, tokenizer)
    vocabulary = vocabulary_of(tokenizer, rows=model.config.vocab_size, stop_ids=[2])
    writing.family_of(model.config, folder=str(folder))
    made = writing.write(
        folder, folder / "x.gguf", quant=quant, vocabulary=vocabulary, config=model.config, name="x"
    )
    return model, made


@needs_llama_cpp
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_what_transformers_does(name, tmp_path, tokenizer):
    model, made = written(name, tmp_path, tokenizer)
    ids = tokenizer(TEXT).input_ids[:48]
    answer = [] if model.config.is_encoder_decoder is False else [100, 200, 300]
    with llamacpp.opened(made.file, length=64) as loaded:
        own = llamacpp.logits(loaded, ids, answer)
        assert llamacpp.tokenized(loaded, TEXT)[:48] == ids
    with torch.no_grad():
        reference = parity._logits(model, ids, answer).numpy()
    # Gemma and gated T5 take their activation from a table of float16 in llama.cpp.
    is_rounded = made.architecture.startswith("gemma") or name == "t5, gated"
    assert numpy.abs(own - reference).max() <= (1e-3 if is_rounded else 1e-5) * numpy.abs(reference).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_is_in_the_file(name, tmp_path, tokenizer):
    """By gguf's own reader: as many numbers as the model has, tied tables once, none of them lost or invented."""
    model, made = written(name, tmp_path, tokenizer)
    tensors = {t.name: t for t in gguf.GGUFReader(made.file).tensors}
    extra = sum(int(t.n_elements) for n, t in tensors.items() if n.startswith("rope_"))
    unique = {p.data_ptr(): p.numel() for p in model.parameters()}
    own_head = model.config.vocab_size * model.config.d_model if made.architecture == "t5" else 0
    assert sum(int(t.n_elements) for t in tensors.values()) - extra == sum(unique.values()) + own_head
    embedding = torch.from_numpy(numpy.array(tensors["token_embd.weight"].data))
    assert torch.equal(embedding, model.get_input_embeddings().weight.data)


@pytest.mark.parametrize("quant", writing.quants())
def test_weights_are_stored_as_asked_for(quant, tmp_path, tokenizer):
    """Each matrix, taken apart again by gguf's own reader, is the model's to within what its kind of block rounds."""
    wide = quant.startswith("tq")  # blocks of 256
    if wide:
        CONFIGS["wide"] = ("qwen2", {"hidden_size": 256})
    model, made = written("wide" if wide else "qwen2", tmp_path, tokenizer, quant)
    CONFIGS.pop("wide", None)
    tensors = {t.name: t for t in gguf.GGUFReader(made.file).tensors}
    stored = tensors["blk.0.ffn_up.weight"]
    assert stored.tensor_type.name == quant.upper()
    back = gguf.dequantize(stored.data, stored.tensor_type).reshape(96, -1)
    own = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    step = {"f32": 0, "f16": 1e-3, "bf16": 8e-3, "q8_0": 1 / 127, "q5_1": 1 / 31, "q5_0": 1 / 15, "q4_1": 1 / 15,
            "q4_0": 1 / 7, "mxfp4": 1 / 4, "tq2_0": 1 / 2, "tq1_0": 1 / 2}[quant]  # fmt: skip
    assert quant in parity.TOLERANCES
    assert tensors["token_embd.weight"].tensor_type.name == (
        stored.tensor_type.name if step < 1e-1 and "q5" not in quant and "q4" not in quant else "Q8_0"
    )
    assert numpy.abs(back - own).max() <= step * numpy.abs(own).max() + 1e-7
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert made.tensors["F32"] >= 1


def test_the_modelfile_has_the_context_that_the_file_holds(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(llamacpp, "is_installed", lambda: False)
    saved("mistral, a window", tmp_path / "model", tokenizer)
    made = api.export(tmp_path / "model", output=tmp_path / "out")
    assert gguf.GGUFReader(made.file).get_field("llama.context_length").contents() == 64
    assert "PARAMETER num_ctx 64\n" in (made.folder / "Modelfile").read_text()


def test_ollama_keeps_room_for_what_was_trained_and_not_for_all_that_could_be_read():
    """A model of 131,072 tokens: its cache alone would be 17 GB."""
    sizes = {
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
    }
    config = AutoConfig.for_model("llama", **sizes)
    given = {"allowed": 131_072, "answered": 256}
    count, why = ollama.context_for(config, trained=1024, asked=300, **given)
    assert count == 1280
    assert "rows of up to 1024 tokens were trained on, answers of up to 256 measured" in why[0]
    assert "168 MB" in why[1]  # 2 bytes for each of 2 x 32 layers x 8 heads x 128 x 1280
    assert ollama.context_for(config, trained=1024, asked=2000, **given)[0] == 2256
    assert ollama.context_for(config, trained=None, asked=30, **given)[0] == 4096
    assert ollama.context_for(config, trained=1024, asked=30, allowed=512, answered=256)[0] == 512
    # Families that only llama.cpp's converter writes: with a part for text, or without attention.
    seeing = AutoConfig.for_model("llava", text_config={"model_type": "llama", **sizes})
    assert ollama.context_for(seeing, trained=1024, asked=300, **given) == (1280, why)
    state = AutoConfig.for_model("mamba")
    assert len(ollama.context_for(state, trained=1024, asked=300, **given)[1]) == 1


def test_a_sliding_window_shortens_the_context_and_says_so(tmp_path, tokenizer):
    _, made = written("mistral, a window", tmp_path, tokenizer)
    field = gguf.GGUFReader(made.file).get_field("llama.context_length")
    assert field.contents() == 64
    assert "64 tokens in this file, not 256" in made.notes[0]


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("bloom", {}, "Models of the kind 'bloom' are not written as GGUF"),
        ("llama", {"hidden_act": "relu"}, "the activation 'relu'"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "scaling 'yarn'",
        ),
        ("t5", {"num_layers": 1}, "more decoder than encoder layers"),
        ("gemma2", {"tie_word_embeddings": False}, "a head that is not the embedding"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(kind, settings, said):
    sizes = {"t5": T5_SIZES, "bloom": {}}.get(kind, SIZES)
    with pytest.raises(ModelError) as caught:
        writing.family_of(AutoConfig.for_model(kind, **{**sizes, **settings}), folder="there")
    assert said in " ".join(caught.value.lines())
    assert len(caught.value.lines()) == 3


def test_the_way_to_split_text_is_found_by_trying(tokenizer):
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    assert vocabulary_of(tokenizer, rows=4096, stop_ids=[2]).keys["ggml.pre"] == "gpt-2"

    def split_by(*expressions: str):
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(e), "isolated") for e in expressions),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")

    # The tiny vocabulary cannot tell all of them apart.
    assert vocabulary_of(split_by(*SPLITS["smollm"]), rows=4096, stop_ids=[2]).keys["ggml.pre"] == "smollm"
    with pytest.raises(ModelError, match="splits text in a way that llama"):
        vocabulary_of(split_by(r"[aeiou]"), rows=4096, stop_ids=[2])


@needs_llama_cpp
@pytest.mark.parametrize(("whole", "name"), [(True, "llama-bpe"), (False, "dbrx")])
def test_a_token_that_no_merge_makes_is_read_as_the_model_reads_it(whole, name, tmp_path, tokenizer):
    """Of two ways to split text alike, one takes such tokens (Llama 3), the other does not (Phi 4)."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    said = json.loads(tokenizer.backend_tokenizer.to_str())
    said["model"]["ignore_merges"] = whole
    said["model"]["merges"] = [pair for pair in said["model"]["merges"] if "".join(pair) != "\u0120the"]
    backend = Tokenizer.from_str(json.dumps(said))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[name][0]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    own = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    assert (own.get_vocab()["\u0120the"] in own(TEXT).input_ids) is whole
    vocabulary = vocabulary_of(own, rows=4096, stop_ids=[2], texts=[TEXT])
    assert vocabulary.keys["ggml.pre"] == name
    model = saved("qwen2", tmp_path, own)
    file = tmp_path / "x.gguf"
    writing.write(tmp_path, file, quant="f32", vocabulary=vocabulary, config=model.config, name="x")
    with llamacpp.opened(file, length=64, words_only=True) as loaded:
        for text in (TEXT, *PROBE):
            assert llamacpp.tokenized(loaded, text) == own(text).input_ids


def test_a_byte_fallback_tokenizer_is_merged_by_rank():
    """SentencePiece's kind: pieces get the rank of the merge that makes them, bytes and special tokens their kinds."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "a", "b", "ab", "▁ab"]
    backend = Tokenizer(
        models.BPE(
            {p: n for n, p in enumerate(pieces)},
            [("a", "b"), ("▁", "ab")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.ByteFallback()
    backend.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    keys = vocabulary_of(made, rows=len(pieces) + 2, stop_ids=[2]).keys
    assert (keys["ggml.model"], keys["ggml.add_space_prefix"], keys["ggml.add_bos_token"]) == (
        "llama",
        True,
        False,
    )
    scores = dict(zip(keys["ggml.tokens"], keys["ggml.scores"], strict=True))
    assert scores["ab"] > scores["▁ab"] > scores["a"]
    kinds = dict(zip(keys["ggml.tokens"], keys["ggml.token_type"], strict=True))
    assert (kinds["<unk>"], kinds["<s>"], kinds["<0x41>"], kinds["[PAD264]"]) == (2, CONTROL, BYTE, 5)


@needs_llama_cpp
@pytest.mark.parametrize(
    ("legacy", "turn", "adds"),
    [
        (True, "[INST]{{ m.content }}[/INST]", True),
        (True, "[INST] {{ m.content }} [/INST]", False),
        (False, "[INST]{{ m.content }}[/INST]", False),
    ],
    ids=["behind each special token", "not before another", "at the very beginning only"],
)
def test_spaces_are_put_where_a_llama_s_tokenizer_puts_them(legacy, turn, adds, tmp_path):
    """SentencePiece's kind, as transformers has it: what the template writes is read alike by llama.cpp."""
    from transformers import LlamaTokenizer

    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{n:02X}>" for n in range(256)),
        "\u2581",
        *"abc",
        "ab",
        "\u2581ab",
    ]
    own = LlamaTokenizer(
        vocab={piece: n for n, piece in enumerate(pieces)},
        merges=[("a", "b"), ("\u2581", "ab")],
        legacy=legacy,
    )
    own.add_tokens(["[INST]", "[/INST]"], special_tokens=True)
    own.chat_template = f"<s>{{% for m in messages %}}{turn}{{% endfor %}}"
    asked = [
        own.apply_chat_template([{"role": "user", "content": c}], tokenize=False) for c in ("ab", "c ab\nb")
    ]
    model = saved("llama, own head", tmp_path, own)
    vocabulary = vocabulary_of(own, rows=4096, stop_ids=[2], texts=asked)
    assert vocabulary.keys["ggml.add_space_prefix"] is adds
    assert not vocabulary.notes
    file = tmp_path / "x.gguf"
    writing.write(tmp_path, file, quant="f32", vocabulary=vocabulary, config=model.config, name="x")
    with llamacpp.opened(file, length=64, words_only=True) as loaded:
        for text in asked:
            assert llamacpp.tokenized(loaded, text) == own(text, add_special_tokens=False).input_ids
    mixed = [*asked, "ab", "<s>[INST] ab", "<s>[INST]ab"]
    assert "as other tokens" in vocabulary_of(own, rows=4096, stop_ids=[2], texts=mixed).notes[0]


def test_more_tokens_than_rows_are_refused(tokenizer):
    with pytest.raises(ModelError, match="no embedding for"):
        vocabulary_of(tokenizer, rows=100, stop_ids=[2])


CHATML = "".join(
    (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
)
FOLDED = "".join(
    (
        "{% set s = messages[0].content if messages[0].role == 'system' else '' %}",
        "{% for m in messages if m.role != 'system' %}[{{ m.role }}] {{ s if loop.first }}{{ m.content }}\n",
        "{% endfor %}",
        "{% if add_generation_prompt %}[assistant] {% endif %}",
    )
)


def test_a_template_that_goes_turn_by_turn_is_said_to_ollama(tokenizer):
    tokenizer.chat_template = CHATML
    pieces = ollama.pieces_of(tokenizer)
    assert pieces is not None
    assert pieces.around["user"] == ("<|im_start|>user\n", "<|im_end|>\n")
    assert pieces.opening == "<|im_start|>assistant\n"
    text, problem = ollama.modelfile("x.gguf", tokenizer, stop_ids=[2], context=2048)
    assert problem is None
    assert '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n' in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert text.startswith("FROM ./x.gguf\n")


def test_a_template_that_ollama_cannot_say_is_left_out_and_said(tokenizer):
    tokenizer.chat_template = FOLDED
    text, problem = ollama.modelfile("x.gguf", tokenizer, stop_ids=[2], context=None)
    assert "TEMPLATE" not in text
    assert "no TEMPLATE" in str(problem)


@needs_llama_cpp
def test_the_verb_proves_the_file_and_keeps_a_bad_one_aside(tmp_path, monkeypatch, capsys):
    model = tmp_path / "tiny"
    shutil.copytree(TINY_MODEL, model)
    (model / "LICENSE").write_text("Only on Sundays.")
    result = CliRunner().invoke(app, ["export", str(model), "--quant", "f32", "--json"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout.strip().splitlines()[-1])
    folder = tmp_path / "tiny_gguf-f32"
    assert (shown["folder"], shown["passed"]) == (str(folder), True)
    assert sorted(p.name for p in folder.iterdir()) == [
        "LICENSE", "Modelfile", "README.md", "parity.json", "tiny-f32.gguf",
    ]  # fmt: skip
    kept = json.loads((folder / "parity.json").read_text())
    assert kept["prompts"] == kept["same_prompts"] == kept["check"]["same_answers"] == 4
    assert {(one["place"], one["asked"], one["same"]) for one in kept["readings"]} == {
        (place, 4, 4) for place in ("training", "transformers", "server", "gguf")
    }
    assert kept["check"]["largest_difference"] <= 1e-4 * kept["check"]["largest_logit"]
    card = (folder / "README.md").read_text()
    assert "Checked against the model: passed.\nRead back by llama-cpp-python" in card
    assert "Its `LICENSE` lies beside" in card
    used(card, folder)
    asked = [{"role": "user", "content": "Hello"}]
    expected = "".join(api.Chat(model).answer(asked, max_new_tokens=256))
    assert capsys.readouterr().out.split()[:3] == expected.split()[:3] != []
    with pytest.raises(RunError, match="is not empty"):
        api.export(model, quant="f32")

    def as_it_is(name, tensor, config):
        return tensor

    broken = writing.FAMILIES["llama"]
    monkeypatch.setitem(
        writing.FAMILIES,
        "llama",
        writing.Family(broken.architecture, broken.keys, as_it_is, broken.problem),
    )
    result = CliRunner().invoke(app, ["export", str(model), "--output", str(tmp_path / "bad"), "--json"])
    shown = json.loads(result.stdout.strip().splitlines()[-1])
    assert (result.exit_code, shown["passed"]) == (1, False)
    assert not (tmp_path / "bad").exists()
    assert json.loads((tmp_path / "bad.failed" / "parity.json").read_text())["passed"] is False


@needs_llama_cpp
def test_questions_are_put_by_the_template_in_the_file(tmp_path, tokenizer):
    """As llama-cpp-python's own formatter puts them; a template that differs in the file shows as other tokens."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    from tunesmith.data.examples import Message, Prompt, Row

    model = saved("qwen2", tmp_path, tokenizer)
    turns = (Message("system", "Be brief."), Message("user", "What is <b>1 + 1</b>?"), Message("assistant", "2"),
             Message("user", " and 2 + 2 "))  # fmt: skip
    prompt = Prompt(turns, "", Row("x", 1))
    asked = parity.Question((), parity.text_of(prompt, tokenizer), prompt)
    vocabulary = vocabulary_of(tokenizer, rows=model.config.vocab_size, stop_ids=[2])
    read = {}
    for name, template in (("own", tokenizer.chat_template), ("other", f"!{tokenizer.chat_template}")):
        vocabulary.keys["chat_template"] = template
        file = tmp_path / f"{name}.gguf"
        writing.write(tmp_path, file, quant="f32", vocabulary=vocabulary, config=model.config, name="x")
        with parity.gguf_reader(file, tokenizer, length=64) as reader:
            read[name] = list(reader.tokens(asked))
    assert read["own"] == tokenizer(asked.text, add_special_tokens=False).input_ids
    assert read["other"] != read["own"]
    stored = gguf.GGUFReader(tmp_path / "own.gguf").get_field("tokenizer.chat_template").contents()
    formatter = Jinja2ChatFormatter(
        stored, eos_token=tokenizer.eos_token, bos_token=tokenizer.bos_token or ""
    )
    messages = [{"role": m.role, "content": m.content} for m in turns]
    assert formatter(messages=messages).prompt == asked.text


CONVERTER = """
import pathlib, shutil, sys
place = pathlib.Path(__file__).parent
(place / "asked").write_text(" ".join(sys.argv[1:]))
if (place / "fails").exists():
    sys.exit("Model FooForCausalLM is not supported")
shutil.copy(place / "ready.gguf", sys.argv[sys.argv.index("--outfile") + 1])
"""


def test_what_is_not_written_here_of_a_known_family_is_left_to_the_converter(tmp_path, monkeypatch):
    config = AutoConfig.for_model("llama", **{**SIZES, "hidden_act": "relu"})
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("TUNESMITH_LLAMA_CPP", raising=False)
    with pytest.raises(ModelError, match=r"the activation 'relu'(.|\n)*TUNESMITH_LLAMA_CPP"):
        writing.writer_of(config, folder="there", quant="f16")
    program = tmp_path / "convert_hf_to_gguf.py"
    program.touch()
    monkeypatch.setenv("TUNESMITH_LLAMA_CPP", str(tmp_path))
    assert writing.writer_of(config, folder="there", quant="f16") == program
    assert writing.writer_of(AutoConfig.for_model("llama", **SIZES), folder="there", quant="f16") is None


@needs_llama_cpp
def test_llama_cpp_s_converter_writes_the_families_that_only_it_knows(tmp_path, monkeypatch):
    config = AutoConfig.from_pretrained(TINY_MODEL)
    vocabulary = vocabulary_of(
        AutoTokenizer.from_pretrained(TINY_MODEL), rows=config.vocab_size, stop_ids=[2]
    )
    place = tmp_path / "llama.cpp"
    place.mkdir()
    writing.write(
        TINY_MODEL, place / "ready.gguf", quant="f16", vocabulary=vocabulary, config=config, name="x"
    )
    (place / "convert_hf_to_gguf.py").write_text(CONVERTER)
    monkeypatch.delitem(writing.FAMILIES, "llama")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        ModelError, match=r"Models of the kind 'llama' are not written(.|\n)*TUNESMITH_LLAMA_CPP"
    ):
        api.export(TINY_MODEL, quant="f16", output=tmp_path / "a")
    monkeypatch.setenv("TUNESMITH_LLAMA_CPP", str(place))
    with pytest.raises(ModelError, match="does not store weights as 'q4_0'"):
        api.export(TINY_MODEL, quant="q4_0", output=tmp_path / "a")
    made = api.export(TINY_MODEL, quant="f16", output=tmp_path / "a")
    assert made.passed, made.parity.problems()
    assert made.parity.check.positions > 0
    assert (place / "asked").read_text().split()[0] == str(TINY_MODEL)
    assert (place / "asked").read_text().endswith("--outtype f16")
    assert any("llama.cpp's converter" in note for note in made.notes)
    (place / "fails").touch()
    with pytest.raises(ModelError, match="exit code 1: Model FooForCausalLM is not supported"):
        api.export(TINY_MODEL, quant="f16", output=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_without_llama_cpp_the_file_is_said_to_be_unproven(tmp_path, monkeypatch):
    """To people, to programs, in the file and in the report; and `--check logits` does not take it."""
    from tunesmith.errors import MissingExtra
    from tunesmith.evaluation.report import shipped
    from tunesmith.training.run import Run

    monkeypatch.setattr(llamacpp, "is_installed", lambda: False)
    with pytest.raises(MissingExtra, match="llama-cpp-python"):
        api.export(TINY_MODEL, output=tmp_path / "out", check="logits")
    command = ["export", str(TINY_MODEL), "--quant", "q8_0", "--output", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout.strip().splitlines()[-1])
    kept = json.loads((tmp_path / "out" / "parity.json").read_text())
    for facts in (shown, shown["parity"], kept):
        assert facts["passed"] is None
        assert "llama.cpp was not here to read the file back" in facts["unproven"]
    readings = {one["place"]: (one["asked"], one["same"]) for one in kept["readings"]}
    assert readings == {"training": (4, 4), "transformers": (4, 4), "server": (4, 4), "gguf": (0, 0)}
    assert [one["passed"] for one in shipped(Run(tmp_path), [])] == ["unproven"]
    again = CliRunner().invoke(app, [*command[:-2], str(tmp_path / "again")])
    assert "parity    unproven: llama.cpp was not" in again.output


@needs_llama_cpp
@pytest.mark.parametrize(("share", "reference"), [(1.3, "bfloat16"), (0.1, None)])
def test_a_model_too_large_for_its_proof_is_compared_with_what_fits(share, reference, tmp_path, monkeypatch):
    from tunesmith import devices, models

    parameters = sum(p.numel() for p in models.outline(str(TINY_MODEL)).parameters())
    monkeypatch.setattr(devices, "available", lambda: int(share * 4 * parameters))
    loaded, own = [], models.load_model
    monkeypatch.setattr(models, "load_model", lambda *a, **k: loaded.append(k.get("dtype")) or own(*a, **k))
    told = []
    made = api.export(TINY_MODEL, quant="q8_0", output=tmp_path / "out", watch=told.append)
    assert loaded == ([reference] if reference else [])
    assert {one["place"]: one["same"] for one in made.parity.as_dict()["readings"]}["gguf"] == 4
    if reference:
        assert (made.passed, made.parity.reference) == (True, "bfloat16")
        assert made.parity.check.positions > 0
        assert any("as computed in bfloat16, not in float32" in line for line in made.parity.sentences())
    else:
        assert (made.passed, made.parity.check) == (None, None)
        assert f"{size(int(share * 4 * parameters))} are free" in made.parity.unproven
    assert any(one.get("name") == "parity" and "MB in bfloat16" in one["reason"] for one in told)


@needs_llama_cpp
def test_the_part_for_text_of_a_model_that_sees_is_written(tmp_path, tokenizer):
    """Gemma 3 as it is on the Hub: pictures have a tower of their own, text is read and written by a model within."""
    text = {**SIZES, **CONFIGS["gemma3"][1]}
    sight = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=sight, mm_tokens_per_image=4, image_token_index=4095
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    for weight in model.parameters():
        weight.data += torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.05)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    made = api.export(tmp_path / "model", quant="f32", output=tmp_path / "out")
    assert made.passed, made.parity.problems()
    assert any("for text: what the model sees pictures with is left out" in note for note in made.notes)
    with pytest.raises(ModelError, match="'gemma3' are not written as ONNX"):
        api.export(tmp_path / "model", to="onnx", output=tmp_path / "graph")


def test_a_reward_model_is_refused_before_any_work(tmp_path, tokenizer, monkeypatch):
    from transformers import AutoModelForSequenceClassification

    from tunesmith.export import merge

    config = AutoConfig.for_model("llama", **SIZES, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "scores")
    tokenizer.save_pretrained(tmp_path / "scores")
    monkeypatch.setattr(merge, "reference_of", lambda *a, **k: pytest.fail("the model was loaded"))
    for target in ("gguf", "onnx"):
        with pytest.raises(ModelError, match="reward model is not written"):
            api.export(tmp_path / "scores", to=target, output=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["scores"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "ggfu"}, "Models are not exported to 'ggfu'"),
        ({"quant": "q8"}, "Weights are not stored as 'q8' in GGUF"),
        ({"rows": 0}, "Nothing is proven without questions"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(options, said, tmp_path):
    with pytest.raises(TunesmithError, match=said):
        api.export(TINY_MODEL, output=tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())
