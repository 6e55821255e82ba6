"""A model in numbers: counts and memory against formulas by hand, PEFT, and really loaded models."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from tunesmith.architecture import PARTS, architecture, get_model_summary
from tunesmith.cli import app
from tunesmith.errors import ModelError


@pytest.fixture
def described(tmp_path):
    """The summary of a configuration, which is all that its folder holds."""

    def describe(config):
        config.save_pretrained(tmp_path)
        return architecture(str(tmp_path))

    return describe


def llama(**changes):
    sizes = {
        "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    return transformers.LlamaConfig(**{**sizes, **changes})


def t5(**changes):
    sizes = {
        "vocab_size": 1000, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": 3,
        "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    return transformers.T5Config(**{**sizes, **changes})


def test_gpt2_has_the_published_number_of_parameters(described):
    found = described(transformers.GPT2Config())
    assert found.parameters == 124_439_808
    assert found.parts["embeddings"] == (50257 + 1024) * 768
    assert found.parts["attention"] == 12 * (768 * 2304 + 2304 + 768 * 768 + 768)
    assert found.parts["feed-forward"] == 12 * (768 * 3072 + 3072 + 3072 * 768 + 768)
    assert found.parts["norms"] == 25 * 2 * 768
    assert "head" not in found.parts, "it is the embeddings' matrix"
    assert (found.layers, found.context, found.vocabulary, found.kind) == (12, 1024, 50257, "causal")
    assert found.lora_targets == ("attn.c_attn", "attn.c_proj")
    # Seed 004's sample number is c_attn alone: 294,912 = 12 · 8 · (768 + 2304).
    assert found.lora_parameters == 294_912 + 12 * 8 * (768 + 768)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_by_hand(described, tied):
    found = described(llama(tie_word_embeddings=tied))
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64
    assert found.parts == {
        "embeddings": 1000 * 64,
        "attention": 3 * attention,
        "feed-forward": 3 * 3 * 64 * 172,
        "norms": (2 * 3 + 1) * 64,
        **({} if tied else {"head": 1000 * 64}),
    }
    assert found.parameters == sum(found.parts.values())
    assert found.lora_parameters == 3 * 8 * ((64 + 64) + 2 * (64 + 32) + (64 + 64))


def test_t5_by_hand(described):
    found = described(t5(tie_word_embeddings=True))
    attention = 4 * 64 * 64
    assert found.parts == {
        "embeddings": 1000 * 64,
        # Encoder layers attend once, decoder layers twice; each stack has one table of relative positions.
        "attention": (3 + 2 * 2) * attention + 2 * 32 * 4,
        "feed-forward": (3 + 2) * 3 * 64 * 128,
        "norms": (3 * 2 + 1 + 2 * 3 + 1) * 64,
    }
    assert (found.kind, found.layers, found.decoder_layers) == ("seq2seq", 3, 2)
    assert "seq2seq" in found.needs


CONFIGS = {
    "llama": lambda: llama(),
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=500, n_positions=64),
    "neox": lambda: transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=500
    ),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, vocab_size=500,
        word_embed_proj_dim=32, max_position_embeddings=64,
    ),
    "t5": lambda: t5(),
    "bart": lambda: transformers.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=500, max_position_embeddings=64,
    ),
    "qwen3 experts": lambda: transformers.Qwen3MoeConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
        moe_intermediate_size=16, intermediate_size=32, vocab_size=500, head_dim=16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_counts_memory_and_adapter_are_those_of_the_loaded_model(tmp_path, name, dtype):
    """Against transformers' own footprint of the instantiated model, and what PEFT makes trainable."""
    import peft

    config = CONFIGS[name]()
    is_t5 = config.is_encoder_decoder
    cls = transformers.AutoModelForSeq2SeqLM if is_t5 else transformers.AutoModelForCausalLM
    cls.from_config(config).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    model = cls.from_pretrained(tmp_path)
    found = architecture(str(tmp_path))
    assert found.dtype == dtype
    assert found.dtype_from == "the weights on disk"
    assert found.parameters == model.num_parameters()
    assert found.memory == model.get_memory_footprint()
    assert found.memory_as[dtype] == found.memory
    saved = {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    assert sum(found.stored.values()) == sum(t.nbytes for t in (*model.parameters(), *saved.values()))
    assert "other" not in found.parts
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=found.lora_rank, target_modules=list(found.lora_targets))
    )
    assert found.lora_parameters == adapted.get_nb_trainable_parameters()[0]


def test_what_is_kept_in_float32_is_counted_so(tmp_path):
    """T5's second feed-forward matrix is not run in float16."""
    transformers.T5ForConditionalGeneration(t5()).half().save_pretrained(tmp_path)
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert architecture(str(tmp_path)).memory == model.get_memory_footprint()


def test_an_encoder_is_described_and_said_to_be_no_generator(described):
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=500
    )
    found = described(config)
    assert found.kind == "encoder"
    assert "cannot generate text" in found.needs
    assert found.lora_targets == ()
    assert found.parameters == transformers.BertForMaskedLM(config).num_parameters()
    attention, norms = 4 * (32 * 32 + 32), (1 + 2 * 2 + 1) * 2 * 32
    assert (found.parts["attention"], found.parts["norms"]) == (2 * attention, norms)
    # The prediction head: a dense layer and a bias for every token; its matrix is the embeddings'.
    assert found.parts["head"] == 32 * 32 + 32 + 500
    shown = {entry["name"]: entry["about"] for entry in found.entries()}
    assert "adapter size" not in shown, "no number where there is nothing to count"
    assert shown["adapter targets"].startswith("none: it cannot generate text")
    assert "--qlora" not in " ".join(shown)


def small_bert(**changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.BertConfig(**{**sizes, "vocab_size": 500, **changes})


def test_four_bits_of_small_matrices_take_more_than_eight_and_that_is_said(described):
    """Per matrix: 8 bits a float32 for each output, 4 bits tables of 16 and 256 float32 and the constants."""
    found = described(small_bert())
    sizes = [(32, 32)] * 4 + [(64, 32), (32, 64)]
    sizes = 2 * sizes + [(32, 32)]  # the head's dense layer
    plain = 2 * (found.parameters - sum(o * i for o, i in sizes)) + found.memory - 4 * found.parameters
    assert found.memory_as["8 bits"] == plain + sum(o * i + 4 * o for o, i in sizes)
    four = sum(o * i // 2 + o * i // 64 + 4 * -(-o * i // 64 // 256) + 4 + 64 + 1024 for o, i in sizes)
    assert found.memory_as["4 bits"] == plain + four > found.memory_as["8 bits"]
    assert "4 bits take more than 8 bits here" in " ".join(found.notes)
    usual = described(transformers.BertConfig(num_hidden_layers=1))
    assert usual.memory_as["4 bits"] < usual.memory_as["8 bits"]
    assert "take more" not in " ".join(usual.notes)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_encoder_in_fewer_bits_is_what_bitsandbytes_makes_of_it(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    transformers.BertForMaskedLM(small_bert()).bfloat16().save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    model = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    assert architecture(str(tmp_path)).memory_as[f"{bits} bits"] == sum(t.nbytes for t in kept_tensors(model))


def test_models_that_see_or_hear_are_described_as_what_they_are(described):
    seeing = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    both = transformers.LlavaConfig(text_config=llama(), vision_config=seeing)
    found = described(both)
    assert found.kind == "image-text"
    assert found.parameters == transformers.LlavaForConditionalGeneration(both).num_parameters()
    alone = transformers.CLIPVisionModel(seeing).num_parameters()
    # The projector into the text's width: two dense layers.
    assert found.parts["vision"] == alone + 32 * 64 + 64 + 64 * 64 + 64
    assert (found.layers, found.vocabulary) == (3, 1000)


def test_what_is_no_language_model_is_said_to_be_none(described):
    found = described(transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                             intermediate_size=64, image_size=16, patch_size=8))  # fmt: skip
    assert (found.kind, found.vocabulary) == ("other", None)
    assert "no language model" in found.needs
    assert all(entry["about"] for entry in found.entries())


FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("packing", "matrix"),
    [
        # A float32 per block of 64 weights, and a table of 16 values: 64 · 172 weights in 172 blocks.
        (FOUR_BITS, lambda o, i: o * i // 2 + 4 * (o * i // 64) + 64),
        # A byte per block, a float32 per 256 blocks, an offset, and tables of 16 and 256 values.
        (
            {**FOUR_BITS, "bnb_4bit_use_double_quant": True},
            lambda o, i: o * i // 2 + o * i // 64 + 4 * -(-(o * i // 64) // 256) + 4 + 64 + 1024,
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, lambda o, i: o * i + 4 * o),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 64},
            lambda o, i: o * i // 2 + -(-i // 64) * (2 * o + o // 2) + 4 * i,
        ),
    ],
    ids=["nf4", "nf4 double", "int8", "gptq"],
)
def test_quantized_models_by_hand(tmp_path, packing, matrix):
    """Seven matrices a layer are packed; embeddings, norms and head stay in bfloat16."""
    config = llama(dtype="bfloat16").to_dict() | {
        "quantization_config": packing, "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = architecture(str(tmp_path))
    sizes = [(64, 64), (32, 64), (32, 64), (64, 64), (172, 64), (172, 64), (64, 172)] * 3
    frequencies = 2 * 4 * 64 // 4 // 2  # rotary frequencies and their originals, a buffer of float32
    plain = 2 * (2 * 1000 * 64 + 7 * 64) + frequencies
    assert found.memory == plain + sum(matrix(*size) for size in sizes)
    assert found.quantized_parameters == sum(o * i for o, i in sizes)
    assert found.parameters == architecture(str(tmp_path)).parameters
    assert found.quantization.bits == (8 if packing.get("load_in_8bit") else 4)


def kept_tensors(model):
    """Every tensor that bitsandbytes keeps for a model it has packed."""
    kept = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        while state:
            kept += [t for t in (state.absmax, state.code, getattr(state, "offset", None)) if t is not None]
            state = state.state2 if state.nested else None
        if getattr(getattr(module, "weight", None), "SCB", None) is not None:
            kept.append(module.weight.SCB)
    return kept


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_memory_is_that_of_bitsandbytes(tmp_path, bits, double):
    """Every tensor that bitsandbytes keeps for a model it has packed."""
    pytest.importorskip("bitsandbytes")
    transformers.LlamaForCausalLM(llama(hidden_size=128)).bfloat16().save_pretrained(tmp_path / "plain")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "packed")
    found = architecture(str(tmp_path / "packed"))
    assert found.quantization.bits == bits
    assert found.memory == sum(tensor.nbytes for tensor in kept_tensors(model))


def test_modules_that_the_packing_skips_keep_their_type(tmp_path):
    for skipped, expected in ((None, 21), (["lm_head", "down_proj"], 12), (["nothing"], 22)):
        packing = {**FOUR_BITS, **({"llm_int8_skip_modules": skipped} if skipped else {})}
        config = llama(tie_word_embeddings=False).to_dict() | {"quantization_config": packing}
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = architecture(str(tmp_path))
        matrices = 3 * (2 * 64 * 64 + 2 * 32 * 64)
        mlp, head = 3 * 3 * 64 * 172, 1000 * 64
        assert found.quantized_parameters == {
            21: matrices + mlp, 12: matrices + mlp * 2 // 3, 22: matrices + mlp + head,
        }[expected]  # fmt: skip


def test_unknown_packing_gives_no_number(tmp_path):
    config = llama().to_dict() | {"quantization_config": {"quant_method": "quanto", "weights": "int4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = architecture(str(tmp_path))
    assert found.memory is None
    assert "quanto" in " ".join(found.notes)


def test_no_weights_are_allocated(described):
    """A model of 70 billion parameters is described on a machine that could not hold it."""
    big = llama(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8,
    )  # fmt: skip
    found = described(big)
    assert found.parameters == 70_553_706_496
    assert found.memory_as["bfloat16"] > 2 * found.parameters


def test_a_folder_without_tokenizer_says_so(described):
    assert "template not known" in " ".join(described(llama()).notes)


@pytest.mark.parametrize(
    ("settings", "words", "rank"),
    [
        ({"r": 4, "target_modules": ["q_proj"]}, "LORA, rank 4, on q_proj", 4),
        ({"r": 3, "target_modules": ["v_proj", "down_proj"], "use_dora": True}, "rank 3, on down_proj, v_proj", 3),
        ({"r": 2, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 5}}, "rank 2 and 5", None),
        ({"r": 2, "target_modules": r".*0\.self_attn\.(q|k)_proj"}, r"on .*0\.self_attn\.(q|k)_proj of", 2),
        (
            {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
            "with embed_tokens trained in full", 2,
        ),
    ],
    ids=["lora", "dora", "ranks", "pattern", "saved"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_its_base_and_its_own_numbers(
    tiny_model_folder, tmp_path, settings, words, rank, dtype
):
    """Against PEFT's own count, and the footprint of what it loads."""
    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_folder).to(getattr(torch, dtype))
    # Untied, because a matrix that is trained in full is then the embeddings' alone.
    base.config.tie_word_embeddings = False
    base.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    trainable = tuned.get_nb_trainable_parameters()[0]
    tuned.save_pretrained(tmp_path / "adapter")
    below, found = architecture(str(tmp_path / "base")), architecture(str(tmp_path / "adapter"))
    assert found.parameters == below.parameters
    assert words in found.adapter
    assert (found.lora_parameters, found.lora_rank) == (trainable, rank)
    targets = settings["target_modules"]
    assert found.lora_targets == ((targets,) if isinstance(targets, str) else tuple(sorted(targets)))
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=getattr(torch, dtype))
    assert found.memory == loaded.get_memory_footprint()
    shown = {entry["name"]: entry["about"] for entry in found.entries()}
    assert shown["adapter size"].startswith(f"{trainable:,} trainable parameters")
    assert "--qlora" not in " ".join(shown), "an adapter is merged before its base is quantized"


def test_an_adapter_without_weights_has_no_size(tiny_model_folder, tmp_path):
    saved = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(tiny_model_folder),
        "r": 4,
        "target_modules": ["q_proj"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    found = architecture(str(tmp_path))
    assert found.lora_parameters is None
    assert "no adapter_model.safetensors" in " ".join(found.notes)
    assert "adapter size" not in {entry["name"] for entry in found.entries()}


def test_an_adapter_s_own_template_is_the_one_it_answers_under(tiny_model_folder, tiny_tokenizer, tmp_path):
    import copy

    import peft

    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert architecture(str(tmp_path)).template == "its own", "without a tokenizer it is the base's"
    plain.save_pretrained(tmp_path)
    assert architecture(str(tmp_path)).template is None


def test_get_model_summary_gives_a_summary_or_an_error(tiny_model_folder, tmp_path):
    text, error = get_model_summary(str(tiny_model_folder))
    assert "LlamaForCausalLM" in text
    assert "q_proj" in text
    assert error == ""
    text, error = get_model_summary(str(tmp_path / "nothing"))
    assert text == ""
    assert "no model" in error


def test_show_model_prints_numbers_for_programs(tiny_model_folder):
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["show", "model", str(tiny_model_folder), "--json"])
    shown = {e["name"].strip(): e.get("value") for e in json.loads(result.stdout)["model"]}
    assert shown["parameters"] == sum(shown.get(part) or 0 for part in PARTS)
    assert shown["memory at load"] == 4 * shown["parameters"] + 2 * 4 * 4  # rotary frequencies
    assert shown["adapter size"] > 0
    text = CliRunner().invoke(app, ["show", "model", str(tiny_model_folder)]).stdout
    assert "memory at load" in text
    assert "GiB" in text


def test_what_is_no_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ModelError, match="configuration"):
        architecture(str(tmp_path))
