"""Adapters sit where they should in every family; freezing freezes exactly its share."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

from tunesmith import api, libraries, models
from tunesmith.compose import compose
from tunesmith.errors import DataError, ModelError
from tunesmith.recipe import Freeze, LoRA, QLoRA

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, intermediate_size=32)),
    "mistral": lambda: tf.MistralForCausalLM(
        tf.MistralConfig(**SMALL, intermediate_size=32, num_key_value_heads=2)
    ),
    "qwen3": lambda: tf.Qwen3ForCausalLM(
        tf.Qwen3Config(**SMALL, intermediate_size=32, num_key_value_heads=2, head_dim=8)
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL, intermediate_size=32)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SMALL, intermediate_size=32, pad_token_id=0)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ),
}
EXPECTED = {
    "llama": ({"self_attn.q_proj", "self_attn.v_proj"}, {"self_attn.k_proj", "self_attn.o_proj"}),
    "mistral": ({"self_attn.q_proj", "self_attn.v_proj"}, {"self_attn.k_proj", "self_attn.o_proj"}),
    "qwen3": ({"self_attn.q_proj", "self_attn.v_proj"}, {"self_attn.k_proj", "self_attn.o_proj"}),
    "gpt2": ({"attn.c_attn"}, {"attn.c_proj"}),
    "gpt_neox": ({"attention.query_key_value"}, {"attention.dense"}),
    "phi3": ({"self_attn.qkv_proj"}, {"self_attn.o_proj"}),
    "t5": (
        {"SelfAttention.q", "SelfAttention.v", "EncDecAttention.q", "EncDecAttention.v"},
        {"SelfAttention.k", "SelfAttention.o", "EncDecAttention.k", "EncDecAttention.o"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_by_family(family):
    model = FAMILIES[family]()
    query_value, others = EXPECTED[family]
    assert set(models.target_modules(model, "query-value")) == query_value
    assert set(models.target_modules(model, "attention")) == query_value | others
    everything = set(models.target_modules(model, "all-linear"))
    assert everything > query_value | others
    assert not any("lm_head" in name or "embed_out" in name for name in everything)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"t5"}))
@pytest.mark.parametrize("targets", ["query-value", "attention", "all-linear"])
def test_only_the_adapter_is_trainable(family, targets):
    model = models.attach(FAMILIES[family](), LoRA(rank=2, targets=targets))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_gpt2_parameter_counts():
    """Rank 8 on GPT-2 small: 294,912 on c_attn alone (PEFT's documented figure), 811,008 with both c_proj."""
    with torch.device("meta"):
        model = tf.GPT2LMHeadModel(tf.GPT2Config())
    count = lambda m: sum(p.numel() for p in m.parameters() if p.requires_grad)  # noqa: E731
    assert count(models.attach(model, LoRA(rank=8, targets="query-value"))) == 294_912
    with torch.device("meta"):
        model = tf.GPT2LMHeadModel(tf.GPT2Config())
    assert count(models.attach(model, LoRA(rank=8, targets=["c_attn", "c_proj"]))) == 811_008


def test_no_match_is_an_error_and_never_full_training():
    class Odd(tf.LlamaForCausalLM):
        pass

    model = Odd(tf.LlamaConfig(**SMALL, intermediate_size=32))
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            layer.self_attn.add_module("odd_" + name, layer.self_attn._modules.pop(name))
    with pytest.raises(ModelError, match="No module of Odd is known as attention"):
        models.target_modules(model, "attention")


def test_a_named_target_that_does_not_exist():
    with pytest.raises(ModelError, match=r"q_prj(.|\n)*Did you mean 'q_proj'"):
        models.attach(FAMILIES["llama"](), LoRA(targets=["v_proj", "q_prj"]))


@pytest.mark.parametrize(
    "options",
    [{}, {"rank_stabilized": True}, {"dora": True}, {"init": "pissa"}, {"init": "pissa_niter_16"}, {"init": "olora"},
     {"init": "orthogonal"}, {"init": "gaussian"}, {"modules_to_save": ["embed_tokens"]}],
    ids=str,
)  # fmt: skip
def test_every_adapter_start_leaves_the_model_s_function_as_it_was(options):
    model = FAMILIES["llama"]().eval()
    ids = torch.arange(12).reshape(1, 12)
    before = model(ids).logits
    adapted = models.attach(model, LoRA(rank=4, dropout=0.0, **options)).eval()
    torch.testing.assert_close(adapted(ids).logits, before, atol=2e-4, rtol=1e-3)


def test_dora_on_weights_without_direction_is_refused_before_it_gives_nan():
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3] = 0
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj: 1 of its outputs"):
        models.attach(model, LoRA(rank=2, dora=True))
    assert models.attach(model, LoRA(rank=2))


@pytest.mark.parametrize("name", ["norm", "layers", "mlp", "act_fn"])
def test_a_named_target_that_is_no_matrix(name):
    """PEFT has no adapter for these, and the advice names none of them."""
    with pytest.raises(ModelError, match=f"what is no matrix.*: {name}") as error:
        models.attach(FAMILIES["llama"](), LoRA(targets=["q_proj", name]))
    advised = error.value.fix.split("Known: ")[-1]
    assert not {"norm", "layers", "mlp", "act_fn", "input_layernorm"} & set(re.findall(r"\w+", advised))
    assert {"q_proj", "embed_tokens"} <= set(re.findall(r"\w+", advised)) or "Did you mean" in error.value.fix


@pytest.fixture
def online(monkeypatch):
    """The Hub as it answers to one request: a function that sets the answer and gives the requests made."""
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def answer(error):
        def model_info(self, repo, *, revision=None, timeout=None):
            asked.append((repo, timeout))
            if error:
                raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        models._on_hub.cache_clear()
        return asked

    yield answer
    models._on_hub.cache_clear()


def test_a_hub_id_is_asked_for_once_and_shortly(online, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = online(None)
    assert models.locate("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B", "a version is no file's suffix"
    models.locate("Qwen/Qwen2.5-0.5B")
    assert asked == [("Qwen/Qwen2.5-0.5B", models.HUB_SECONDS)]
    online(ConnectionError("Name or service not known"))
    with pytest.raises(
        ModelError, match=r"no such folder or run here; the Hub cannot be reached (.|\n)*'tiny'"
    ):
        models.locate("tinny")
    assert len(asked) == 2


def test_what_looks_like_a_path_is_never_asked_of_the_hub(online, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = online(None)
    (tmp_path / "faq.csv").write_text("x")
    (tmp_path / "runs" / "support" / "final_model").mkdir(parents=True)
    for name, expected in {
        "./here": "no model folder or run",
        "a/b/c": "no model folder or run",
        "model.gguf": "no model folder or run",
        "two words": "no model folder or run",
        "faq.csv": "is a file",
        "./runs/support2": "Did you mean 'runs/support'",
    }.items():
        with pytest.raises(ModelError, match=f"(?s){expected}") as error:
            models.locate(name)
        assert f"'{name}'?" not in str(error.value), "never the same name again"
    assert asked == []


def test_alpha_is_twice_the_rank_unless_given():
    assert models.attach(FAMILIES["llama"](), LoRA(rank=6)).peft_config["default"].lora_alpha == 12
    assert models.attach(FAMILIES["llama"](), LoRA(rank=6, alpha=5)).peft_config["default"].lora_alpha == 5


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_freezing_freezes_embeddings_and_the_bottom_share(family):
    model = models.attach(FAMILIES[family](), Freeze(ratio=0.5))
    bottom, top = models.decoder_layers(model)
    assert not any(p.requires_grad for p in bottom.parameters())
    assert all(p.requires_grad for p in top.parameters())
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    assert len(tables) == (2 if family == "gpt2" else 1)  # words, and positions where they have a table
    assert not any(table.weight.requires_grad for table in tables)


def test_a_ratio_that_freezes_nothing_is_refused():
    with pytest.raises(ModelError, match="freezes no layer"):
        models.freeze(FAMILIES["llama"](), 0.3)


def test_where_a_model_may_be(tmp_path, tiny_model_folder, online):
    online(None)
    assert models.locate(str(tiny_model_folder)) == str(tiny_model_folder)
    assert models.locate("owner/name") == "owner/name"
    with pytest.raises(ModelError, match="no model folder"):
        models.locate(str(tmp_path / "missing"))
    with pytest.raises(ModelError, match="holds no model"):
        models.locate(str(tmp_path))
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ModelError, match=r"(?s)holds no model.*llama\.cpp or Ollama"):
        models.locate(str(tmp_path))
    run = tmp_path / "run" / "final_model"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    assert models.locate(str(run.parent)) == str(run)
    with pytest.raises(ModelError, match=rf"(?s)holds no model.*{run.parent}: give that"):
        models.locate(str(tmp_path))


def test_a_folder_without_tokenizer(tmp_path):
    FAMILIES["llama"]().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no tokenizer"):
        models.load_tokenizer(str(tmp_path))


def test_embeddings_are_trained_along_where_they_are_named():
    """How the words of a domain are learned beside an adapter."""
    model = models.attach(FAMILIES["llama"](), LoRA(rank=2, modules_to_save=["embed_tokens"]))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    beside = {name for name in trainable if "lora_" not in name}
    assert len(beside) == 1
    assert "embed_tokens.modules_to_save" in beside.pop()


@pytest.mark.parametrize("double", [True, False])
def test_qlora_packs_the_base_into_nf4(tiny_model_folder, double):
    model = models.load_model(str(tiny_model_folder), quantize=QLoRA(double_quantization=double))
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == "Linear4bit"
    assert (layer.weight.quant_type, layer.compute_dtype) == ("nf4", torch.float32)
    assert layer.weight.compress_statistics is double
    assert type(model.lm_head).__name__ == "Linear"
    assert models.four_bit(QLoRA(), device="cuda").bnb_4bit_compute_dtype == torch.bfloat16


def test_trained_weights_keep_their_type_while_a_trainer_is_made():
    model = FAMILIES["llama"]().requires_grad_(False)
    weight = model.lm_head.weight.requires_grad_(True)
    before = weight.detach().clone()
    with models.keeping_types(model):
        weight.data = weight.data.to(torch.bfloat16)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, before)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_that_is_named_is_loaded(tiny_model_folder, attention):
    model = models.load_model(str(tiny_model_folder), attention=attention)
    assert model.config._attn_implementation == attention


def test_an_adapter_on_plain_weights_is_loaded_without_what_packs_weights(
    tiny_model_folder, tmp_path, monkeypatch
):
    """torchao tells of libraries of its own that do not load, on standard error, whenever it is imported."""
    adapted = models.attach(models.load_model(str(tiny_model_folder)), LoRA(kind="lora", rank=2))
    adapted.save_pretrained(tmp_path / "adapter")
    packers = {"bitsandbytes", "torchao"}
    for name in [name for name in sys.modules if name.partition(".")[0] in packers]:
        monkeypatch.delitem(sys.modules, name)
    with libraries.loading():
        pass  # forgets what is known to be installed
    models.load_model(str(tmp_path / "adapter"))
    assert not packers & sys.modules.keys()


@pytest.fixture
def of_the_hub(online, tiny_model_folder, tmp_path, monkeypatch):
    """A model on a stub of the Hub, which gives the files that are asked for, and what was asked."""
    import fnmatch
    import shutil

    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    online(None)
    repository = Path(shutil.copytree(tiny_model_folder, tmp_path / "repository"))
    snapshot = tmp_path / "hub" / "models--me--mine" / "snapshots" / ("0" * 40)
    asked = []

    def download(name, *, revision=None, allow_patterns=None, local_files_only=False, **options):
        assert name == "me/mine"
        assert allow_patterns, "nothing is fetched without saying what"
        snapshot.mkdir(parents=True, exist_ok=True)
        for path in repository.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                asked.append(path.name)
                shutil.copy(path, snapshot / path.name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return repository, asked


def test_a_model_of_the_hub_is_read_from_files_that_were_looked_at(of_the_hub):
    repository, asked = of_the_hub
    for name in ("modeling_own.py", "pytorch_model.bin", "training_args.bin"):
        (repository / name).write_bytes(b"")
    assert models.kind("me/mine") == "causal"
    models.load_tokenizer("me/mine")
    assert not [name for name in asked if name.endswith(".safetensors")], "descriptions do without weights"
    model = models.load_model("me/mine")
    assert model.name_or_path == "me/mine"
    assert "model.safetensors" in asked
    assert not [name for name in asked if name.endswith((".py", ".bin"))]


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"attn_implementation": "me/kernel"}, "asks for a program from the Hub"),
        ("config.json", {"num_hidden_layers": 10**6}, "describes no model that could be"),
        ("tokenizer_config.json", {"vocab_file": "../../../secret.env"}, "names a file outside the folder"),
        ("config.json", None, "nested too deeply"),
    ],
)
def test_a_hostile_model_of_the_hub_is_refused_as_a_folder_is(of_the_hub, tmp_path, file, change, said):
    repository, _ = of_the_hub
    (tmp_path / "hub" / "models--me--mine").mkdir(parents=True)
    (tmp_path / "hub" / "models--me--mine" / "secret.env").write_text("")
    (tmp_path / "hub" / "secret.env").write_text("")
    path = repository / file
    content = json.loads(path.read_text()) | (change or {})
    path.write_text(json.dumps(content) if change else "[" * 5000)
    for load in (models.configuration, models.load_tokenizer, models.load_model, models.kind):
        with pytest.raises(ModelError, match=said):
            load("me/mine")


def test_of_a_model_that_sees_pictures_the_layers_of_the_text_are_counted_and_frozen():
    text = {
        "vocab_size": 90,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 70}
    sees = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = tf.Gemma3Config(
        text_config=text, vision_config={**sees, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=1
    )
    with torch.device("meta"):
        model = tf.Gemma3ForConditionalGeneration(config)
    found = models.describe(model)
    assert (found.layers, found.context_length) == (2, 70)
    # Those that look at pictures are more, and larger.
    assert models.decoder_layers(model) is model.model.language_model.layers


def test_a_model_without_weights_is_refused_before_rows_are_read(tmp_path, tiny_model_folder):
    base, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(tiny_model_folder, base, ignore=shutil.ignore_patterns("*.safetensors"))
    rows.write_text("no JSON\n")
    settings = {
        "model": {"base": str(base)},
        "data": {"dataset": str(rows), "max_length": 64},
        "output_dir": str(tmp_path / "runs"),
    }
    for verb in (api.train, api.baseline, api.self_check):
        with pytest.raises(ModelError, match="has no weights") as error:
            verb(compose(settings).recipe)
        assert "config.json" in error.value.found
    with pytest.raises(DataError):
        api.plan(compose(settings).recipe)
    assert not list((tmp_path / "runs").glob("*"))
