"""Merging: whole weights that answer as base and adapter do, for every kind of adapter and model, or no folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import encoder_decoders
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tunesmith import api, models
from tunesmith.cli import app
from tunesmith.compose import compose, overlaid
from tunesmith.errors import ModelError, RunError, TunesmithError
from tunesmith.evaluation import measuring
from tunesmith.export import merge as merging
from tunesmith.export import parity, weights
from tunesmith.export.held import held_for
from tunesmith.export.parity import Answered
from tunesmith.training import lineage
from tunesmith.training.run import Run

FAMILIES = ("llama", "t5", "bart")
TARGETS = {"llama": ["q_proj", "down_proj"], "t5": ["q", "v", "wo"], "bart": ["q_proj", "fc1"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny_model_folder):
    place = tmp_path_factory.mktemp("bases")
    made = {family: encoder_decoders.save(family, place / family) for family in ("t5", "bart")}
    return {"llama": tiny_model_folder, **made}


def made_adapter(base: Path, folder: Path, family: str, **settings) -> Path:
    """An adapter of random weights, as plain PEFT saves it: no tokenizer, no run."""
    import peft
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    causal = family == "llama"
    torch.manual_seed(1)
    model = (AutoModelForCausalLM if causal else AutoModelForSeq2SeqLM).from_pretrained(base)
    layer = {
        "r": 4,
        "target_modules": TARGETS[family],
        "task_type": "CAUSAL_LM" if causal else "SEQ_2_SEQ_LM",
    }
    tuned = peft.get_peft_model(model, peft.LoraConfig(**(layer | settings)))
    for name, weight in tuned.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(weight, std=0.2)
        elif "magnitude" in name or "modules_to_save" in name:
            weight.data *= 1 + 0.2 * torch.rand_like(weight)
    tuned.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(bases, tmp_path):
    def make(family="llama", name="adapter", **settings):
        return made_adapter(bases[family], tmp_path / name, family, **settings)

    return make


def plain(folder: Path, family: str):
    """Whole weights or an adapter as transformers and PEFT load them without us, and some logits."""
    import peft
    import transformers

    kind = "CausalLM" if family == "llama" else "Seq2SeqLM"
    is_adapter = (folder / "adapter_config.json").exists()
    auto = (
        getattr(peft, f"AutoPeftModelFor{kind}")
        if is_adapter
        else getattr(transformers, f"AutoModelFor{kind}")
    )
    model = auto.from_pretrained(folder).eval()
    ids = torch.arange(4, 40)[None]
    more = {} if family == "llama" else {"decoder_input_ids": torch.arange(5, 25)[None]}
    with torch.inference_mode():
        return model, model(input_ids=ids, **more).logits.float()


ADAPTERS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(family, kind, marks=() if is_first else pytest.mark.thorough)
        for family in FAMILIES
        for kind in ADAPTERS
        # Each kind on the first family, and each family with what its layers do to weights.
        for is_first in [
            (family == "llama" and kind != "olora") or kind == "lora" or (family, kind) == ("t5", "dora")
        ]
    ],
)
def test_merged_weights_are_plain_and_answer_as_base_and_adapter(adapter, bases, family, kind, tmp_path):
    source = adapter(family, **ADAPTERS[kind])
    merged = api.merge(source)
    assert merged.folder == tmp_path / "adapter_merged"
    (tuned, expected), (model, found) = plain(source, family), plain(merged.folder, family)
    _, base = plain(bases[family], family)
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= 1e-4 * scale
    assert (base - expected).abs().max() > 1e-2 * scale, "negative control: the adapter changes something"
    before = load_file(bases[family] / "model.safetensors")
    after = load_file(merged.folder / "model.safetensors")
    assert type(model).__name__ == type(tuned.get_base_model()).__name__
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    assert merged.check.passed
    assert merged.check.same_answers == merged.check.prompts == 4
    assert 0 <= merged.check.largest_difference <= 1e-4 * merged.check.largest_logit

    names = {path.name for path in merged.folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md",
            "chat_template.jinja", "merge.json"} <= names  # fmt: skip
    assert not any("adapter" in name or name.endswith((".bin", ".tmp")) for name in names)
    facts = json.loads((merged.folder / "merge.json").read_text())
    assert facts["check"]["passed"] is True
    assert (facts["adapter"], facts["base"], facts["run"]) == ("adapter", bases[family].name, None)
    card = (merged.folder / "README.md").read_text()
    assert "largest difference of a logit" in card
    assert f"AutoModelFor{'CausalLM' if family == 'llama' else 'Seq2SeqLM'}" in card
    for path in merged.folder.iterdir():
        assert str(tmp_path.parent).encode() not in path.read_bytes(), (
            f"{path.name} names this machine's folders"
        )
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_one_end_of_a_tied_matrix_can_be_adapted(adapter, settings):
    """The base uses one matrix for words and head; an adapter of one of them must leave the other alone."""
    source = adapter("llama", **settings)
    merged = api.merge(source)
    _, expected = plain(source, "llama")
    _, found = plain(merged.folder, "llama")
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.fixture
def trained(bases, question_file, tmp_path):
    """A finished run on forty questions, with changes to its recipe."""

    def run(family="llama", **changes):
        layer = {
            "output_dir": str(tmp_path / "runs"),
            "name": family,
            "model": {"base": str(bases[family])},
            "method": {"kind": "sft" if family == "llama" else "seq2seq"},
            "data": {"dataset": str(question_file), "max_length": 128, "held_out": 0.3},
            "adapter": {"kind": "lora"},
            "training": {
                "max_steps": 4, "per_device_train_batch_size": 4, "warmup_steps": 0, "learning_rate": 5e-2,
            },
            "evaluation": {"max_new_tokens": 6, "resamples": 100},
        }  # fmt: skip
        return Run(api.train(compose(overlaid(layer, changes)).recipe).run)

    return run


@pytest.mark.parametrize("family", ["llama", pytest.param("t5", marks=pytest.mark.thorough)])
def test_a_merged_run_is_asked_measured_and_compared(trained, question_file, family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = (
        {"method": {"source_prefix": "question: "}}
        if family == "t5"
        else {"adapter": {"init": "pissa", "rank": 4}}
    )
    run = trained(family, **changes)
    merged = api.merge(run.path)
    assert merged.folder == run.path / "merged_model"
    assert merged.run == family
    held_out = [json.loads(line) for line in (run.evaluation / "rows.jsonl").read_text().splitlines()]
    for row in [r for r in held_out if r["model"] == "tuned"][:3]:
        asked = [{"role": "user", "content": row["prompt_text"]}]
        assert "".join(api.chat(merged.folder, asked, max_new_tokens=6)) == row["output"]
    against = api.compare(run.path, merged.folder)
    assert {c.metric: c.verdict for c in against.comparisons}.keys() >= {"rougeL", "perplexity"}
    for compared in against.comparisons:
        assert compared.n > 5
        assert compared.tuned == pytest.approx(compared.base, rel=1e-4)

    # what the run has learned, its merged model has, wherever it lies
    elsewhere = api.merge(run.path, output=tmp_path / "out" / "mine").folder
    rows = run.read("plan.json")["rows"]
    for folder in (merged.folder, elsewhere):
        found = api.evaluate(folder, dataset=str(question_file), settings={"data": {"max_length": 128}})
        assert found.measured_on.left_out == {str(run.path): rows["train"] + rows["validation"]}
        assert found.measured_on.questions == rows["held_out"]
    assert found.scores["rougeL"]["value"] is not None
    card = (elsewhere / "README.md").read_text()
    assert "merged into" in card
    assert "held out for the scores above" in card
    assert "AutoPeftModel" not in card
    run.path.rename(tmp_path / "moved")
    found = api.evaluate(elsewhere, dataset=str(question_file), settings={"data": {"max_length": 128}})
    assert found.measured_on.left_out == {str(elsewhere): rows["train"] + rows["validation"]}
    (elsewhere / "learned.json").unlink()
    found = api.evaluate(elsewhere, dataset=str(question_file), settings={"data": {"max_length": 128}})
    assert f"merged from the run {family}" in found.measured_on.unchecked[str(elsewhere)]


def test_a_merged_model_is_trained_on(trained):
    merged = api.merge(trained().path)
    assert (
        trained(name="again", model={"base": str(merged.folder)}, adapter={"kind": "full"}).state() == "done"
    )


def test_weights_are_stored_as_the_base_s_are(bases, tmp_path):
    from transformers import AutoModelForCausalLM

    half = tmp_path / "half"
    shutil.copytree(bases["llama"], half)
    AutoModelForCausalLM.from_pretrained(half, dtype=torch.bfloat16).save_pretrained(half)
    source = made_adapter(half, tmp_path / "adapter", "llama")
    merged = api.merge(source)
    assert merged.dtype == "bfloat16"
    assert {t.dtype for t in load_file(merged.folder / "model.safetensors").values()} == {torch.bfloat16}
    assert merged.check.largest_difference > 1e-4 * merged.check.largest_logit, "rounding shows"
    whole = api.merge(source, output=tmp_path / "whole", dtype="float32")
    assert {t.dtype for t in load_file(whole.folder / "model.safetensors").values()} == {torch.float32}
    assert whole.check.tolerance < merged.check.tolerance


def test_qlora_is_merged_into_the_weights_it_was_trained_on(trained, bases, question_file, tmp_path_factory):
    """Against transformers and PEFT with the base packed into 4 bits by themselves; the whole base is further off."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    pytest.importorskip("bitsandbytes")
    run = trained(adapter={"kind": "qlora"})
    merged = api.merge(run.path)
    packed = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=run.recipe().adapter.double_quantization,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(bases["llama"], quantization_config=packed)
    models._keep_packing(base)
    tuned = peft.PeftModel.from_pretrained(base, run.final_model).eval()
    ids = torch.arange(4, 40)[None]
    with torch.inference_mode():
        expected = tuned(input_ids=ids).logits.float()
    (_, found), (_, whole) = plain(merged.folder, "llama"), plain(run.final_model, "llama")
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (whole - expected).abs().max() > 1e-3 * expected.abs().max(), "rounding to 4 bits shows"
    assert merged.parity.layers.passed
    assert merged.parity.prompts == merged.parity.same_prompts == 14
    assert "rounded to 4 bits" in merged.notes[0]
    assert merged.notes[0] in (merged.folder / "README.md").read_text()
    assert merged.dtype == "float32"
    with torch.inference_mode():
        asked, computed = merging.reference_of(run.final_model, run, dtype="bfloat16")
        asked = asked(input_ids=ids).logits.float()
    assert computed == "float32", "as trained, whatever was wanted"
    assert (asked - expected).abs().max() <= 1e-4 * expected.abs().max(), "an endpoint is compared with this"
    assert lineage.is_of_4_bits(run.final_model)
    assert not lineage.is_of_4_bits(merged.folder)
    # Far from its run the adapter still knows on what it was trained, and so does a checkpoint of it.
    away = tmp_path_factory.mktemp("elsewhere") / "a" / "b" / "c" / "adapter"
    shutil.copytree(run.final_model, away)
    assert lineage.run_behind(away) is None
    again = api.merge(away)
    assert again.parity.layers.passed
    assert "rounded to 4 bits" in again.notes[0]
    assert torch.equal(plain(again.folder, "llama")[1], found)
    assert lineage.is_of_4_bits(away)
    checkpoint = next((run.path / "checkpoints").glob("checkpoint-step-*"))
    assert models.read_packing(checkpoint) == models.read_packing(away) == models.Packing(True, "float32")
    kept = run.final_model / "adapter_model.safetensors"
    save_file({n: t.to(torch.float16) for n, t in load_file(kept).items()}, kept, {"format": "pt"})
    config = models.configuration(str(bases["llama"]))
    assert merging._stored("auto", config, run.final_model, is_quantized=True)[0] == "float16"
    assert json.loads((merged.folder / "parity.json").read_text())["score"]["n"] == 14


def test_shards_are_indexed_and_hold_every_tensor_once(adapter, bases):
    source = adapter(target_modules=["q_proj", "down_proj", "embed_tokens"])
    whole = api.merge(source, output=source.with_name("whole"))
    merged = api.merge(source, output=source.with_name("sharded"), max_shard_size="8KB")
    assert len(merged.shards) > 2
    files = {shard: load_file(merged.folder / shard) for shard in merged.shards}
    index = json.loads((merged.folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for shard, held in files.items() for name in held}
    sizes = [sum(t.nbytes for t in held.values()) for held in files.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(size <= 8000 or len(held) == 1 for size, held in zip(sizes, files.values(), strict=True))
    one = load_file(whole.folder / "model.safetensors")
    assert one.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], held[name]) for held in files.values() for name in held)
    assert torch.equal(plain(merged.folder, "llama")[1], plain(whole.folder, "llama")[1])
    with pytest.raises(TunesmithError, match="500MB"):
        api.merge(source, output=source.with_name("x"), max_shard_size="much")


def test_adapters_are_added_up_with_their_weights_as_peft_does(adapter, bases, tmp_path):
    """`cat` of add_weighted_adapter is the exact sum; `linear` is not."""
    import peft
    from transformers import AutoModelForCausalLM

    one = adapter(name="one")
    two = made_adapter(bases["llama"], tmp_path / "two", "llama", r=2, lora_alpha=4, use_rslora=True)
    merged = api.merge(adapters=[f"{one}=0.6", f"{two}=-0.25"], output=tmp_path / "sum")
    tuned = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["llama"]), one, "one")
    tuned.load_adapter(two, "two")
    tuned.base_model.add_weighted_adapter(["one", "two"], [0.6, -0.25], "sum", combination_type="cat")
    tuned.set_adapter("sum")
    with torch.inference_mode():
        expected = tuned.eval()(input_ids=torch.arange(4, 40)[None]).logits
    _, found = plain(merged.folder, "llama")
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert merged.check.passed
    assert merged.adapter == "0.6 x one + -0.25 x two"
    assert "sum of adapters `0.6 x one" in (merged.folder / "README.md").read_text()
    same = api.merge(one, adapters=[f"{two}=0"], output=tmp_path / "same")
    assert torch.allclose(plain(same.folder, "llama")[1], plain(one, "llama")[1], atol=1e-5)

    dora = adapter(name="dora", use_dora=True)
    with_dora = api.merge(one, adapters=[f"{dora}=0.5"], output=tmp_path / "with_dora")
    assert with_dora.check is None
    assert with_dora.parity.layers.passed
    assert "PEFT adds up no adapters but" in with_dora.parity.unproven
    with pytest.raises(TunesmithError, match="not a number"):
        api.merge(adapters=[f"{one}=much"])
    with pytest.raises(TunesmithError, match="nothing to merge"):
        api.merge()


def test_adapters_of_two_bases_are_not_added_up(adapter, bases, tmp_path):
    one = adapter(name="one")
    other = tmp_path / "other"
    shutil.copytree(bases["llama"], other)
    tensors = load_file(other / "model.safetensors")
    save_file({n: t + 0.1 for n, t in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    two = made_adapter(other, tmp_path / "two", "llama")
    with pytest.raises(ModelError, match=r"(?s)different bases.*other"):
        api.merge(one, adapters=[str(two)])


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_an_adapter_of_a_model_that_also_sees_is_merged_tensor_by_tensor(kind, bases, tmp_path):
    """Gemma 3's files name its weights otherwise than transformers does; what sees is copied."""
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3", text_config={**size, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 400},
        vision_config={**size, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4, image_token_index=399,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(bases["llama"]).save_pretrained(tmp_path / "base")
    options = {}
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
        options = {"quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)}  # fmt: skip
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    if kind == "qlora":
        models._keep_packing(own)
    tuned = peft.get_peft_model(
        own,
        peft.LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|up_proj)", task_type="CAUSAL_LM"),
    ).eval()
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    tuned.save_pretrained(tmp_path / "adapter")
    models.write_packing(tuned, tmp_path / "adapter")
    merged = api.merge(tmp_path / "adapter", output=tmp_path / "out")
    assert (merged.parity.passed, merged.parity.layers.changed) == (True, 4)
    ids = torch.arange(4, 40)[None]
    with torch.inference_mode():
        expected = tuned(input_ids=ids).logits.float()
    found = plain(merged.folder, "llama")[1]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("base", "out"))
    assert set(before) == set(after)
    if (
        kind == "lora"
    ):  # in 4 bits transformers packs what sees as well, and it is stored as it was trained beside
        assert all(
            torch.equal(before[name], after[name]) for name in before if name.startswith("vision_tower")
        )


def test_a_model_too_large_to_be_asked_is_checked_layer_by_layer(adapter, monkeypatch):
    from tunesmith import devices

    monkeypatch.setattr(devices, "available", lambda: 1000)
    monkeypatch.setattr(models, "load_model", lambda *a, **k: pytest.fail("the whole model was loaded"))
    merged = api.merge(adapter())
    assert merged.check is None
    assert "1.0 kB are free" in merged.parity.unproven
    layers = merged.parity.layers
    assert (layers.changed, layers.copied, layers.wrong) == (8, 30, ())
    assert 0 <= layers.largest_difference <= 1e-5
    assert merged.parity.same_prompts == 4
    assert "not asked as a whole" in (merged.folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("harmed", "said"),
    [("q_proj", "largest difference"), ("norm", "layernorm.weight read back as something else")],
)
def test_a_harmed_layer_is_found_without_the_whole_model(adapter, monkeypatch, harmed, said):
    right = weights._Shards.add

    def wrong(shards, name, tensor):
        right(shards, name, tensor * (1.001 if harmed in name else 1))

    monkeypatch.setattr(weights._Shards, "add", wrong)
    with pytest.raises(ModelError, match=said):
        api.merge(adapter(), check="layers")


def test_whole_weights_are_written_in_another_type_and_in_smaller_files(bases, tmp_path):
    made = api.export(
        bases["llama"], to="safetensors", quant="bf16", max_shard_size="6KB", output=tmp_path / "out"
    )
    assert (made.passed, made.quant, made.target) == (True, "bfloat16", "safetensors")
    before = load_file(bases["llama"] / "model.safetensors")
    after = {n: t for p in made.folder.glob("*.safetensors") for n, t in load_file(p).items()}
    assert len(list(made.folder.glob("*.safetensors"))) > 1
    assert after.keys() == before.keys()
    assert all(torch.equal(before[n].to(torch.bfloat16), t) for n, t in after.items())
    assert (made.parity.layers.changed, made.parity.layers.copied) == (0, len(before))
    assert made.parity.check.largest_difference > 0, "rounding shows"
    assert "These are the weights of" in (made.folder / "README.md").read_text()
    assert json.loads((made.folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_is_written_as_safetensors(adapter, tmp_path):
    source = adapter()
    made = api.export(source, to="safetensors", output=tmp_path / "out")
    assert torch.allclose(plain(made.folder, "llama")[1], plain(source, "llama")[1], atol=1e-5)
    with pytest.raises(TunesmithError, match="not stored as 'q8_0' in safetensors"):
        api.export(source, to="safetensors", quant="q8_0")


def test_a_reader_without_logits_is_compared_by_answers(bases):
    """As a server is: the same prompts and answers, and one that answers otherwise."""
    from tunesmith.generation import Generated

    model, tokenizer = (
        models.load_model(str(bases["llama"])).eval(),
        models.load_tokenizer(str(bases["llama"])),
    )
    asked = merging.shipped_questions(tokenizer, model, is_pair=False)
    right = parity.folder_reader(bases["llama"])
    server = parity.Reader("a server", right.tokens, right.greedy, None)
    held = parity.Held(asked, 6, lambda numbers, own, others: (None, "not scored"))
    found = parity.verdict(model, tokenizer, server, held, artefact="served", quant="float32")
    assert found.passed
    assert (found.same_prompts, found.check.same_answers, found.check.positions) == (4, 4, 0)
    assert "gives no logits to compare" in found.check.sentence()
    other = parity.Reader(
        "a server", lambda q: q.ids[1:], lambda ids, room: Generated((5,), "x", "stop"), None
    )
    found = parity.verdict(model, tokenizer, other, held, artefact="served", quant="float32")
    assert not found.passed
    assert found.problems()[0].startswith("4 of 4 prompts are read as other tokens")


@pytest.mark.parametrize(("quant", "passes"), [("float32", False), ("f32", False), ("bfloat16", True)])
def test_a_near_tie_excuses_other_answers_in_reduced_precision_only(quant, passes, bases):
    """The artefact answers with the second best token where the best is hardly better; all its logits are right."""
    from tunesmith.generation import Generated

    model, tokenizer = (
        models.load_model(str(bases["llama"])).eval(),
        models.load_tokenizer(str(bases["llama"])),
    )
    [asked, *_] = merging.shipped_questions(tokenizer, model, is_pair=False)
    right = parity.folder_reader(bases["llama"])
    [own] = parity.answered(model, tokenizer, [asked.ids], new_tokens=1)
    first, second = own.logits[-2 if own.ids else -1].topk(2).indices.tolist()
    with torch.no_grad():  # as near as it gets
        head = model.get_output_embeddings().weight
        head[second] = head[first] * (1 - 1e-6)
    tied = parity.Reader(
        "a reader", right.tokens, lambda ids, room: Generated((second,), "x", "length"),
        lambda ids, answer: parity._logits(model, ids, answer),
    )  # fmt: skip
    held = parity.Held([asked], 1, lambda numbers, own, others: (None, "not scored"))
    with torch.inference_mode():
        found = parity.verdict(model, tokenizer, tied, held, artefact="x", quant=quant)
    assert (found.check.same_answers, found.check.ties) == (0, 1)
    assert found.passed is passes
    assert bool(found.problems()) is not passes


def test_a_code_run_s_artefact_is_judged_by_its_tests(bases, tmp_path, monkeypatch):
    """By pass@1, as the run is; where another metric has to do it, the verdict says why."""
    from types import SimpleNamespace

    from tunesmith.data.examples import Message, Prompt, Row
    from tunesmith.generation import Generated

    model = models.outline(str(bases["llama"]))
    tokenizer = models.load_tokenizer(str(bases["llama"]))
    models.settle_template(tokenizer, is_pair=False)
    told = (Message("user", "write one"),)
    asked = [
        Prompt(told, "def one():\n    return 1", Row("x", n), checks={"tests": "assert one() == 1"})
        for n in range(2)
    ]
    answers = [
        [Generated((5,), f"def one():\n    return {value}", "stop") for _ in asked]
        for value in ("1", "2 - 1", "3")
    ]

    def judged(index: int, **evaluation):
        recipe = compose({"evaluation": {"resamples": 100, **evaluation}}).recipe
        found = SimpleNamespace(recipe=recipe, examples=asked)
        monkeypatch.setattr(measuring, "questions_for", lambda *a, **k: (None, found))
        held = held_for(Run(tmp_path), model, tokenizer, 2, lambda event: None)
        return held.score([0, 1], answers[0], answers[index])

    own = {"metrics": ["pass_at_1", "code_exact_match"], "run_code": True}
    score, why = judged(1, **own)
    assert (score.metric, score.base, score.tuned, why) == ("pass_at_1", 1.0, 1.0, None)
    assert judged(2, **own)[0].tuned == 0.0
    score, why = judged(1, metrics=["pass_at_5"], run_code=True, attempts=5)
    assert score.metric == "pass_at_1"
    assert "not judged by the run's own metric, pass@5: it needs several answers" in why
    score, why = judged(1, metrics=["pass_at_1"])
    assert score is None
    assert "pass@1, cannot judge it: it runs the code that the model writes, which is off" in why


def test_an_adapter_that_is_merged_wrongly_is_kept_and_marked_by_export(adapter, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from tunesmith.export import weights

    own = weights.checked
    monkeypatch.setattr(
        weights, "checked", lambda *a, **k: dataclasses.replace(own(*a, **k), wrong=("model.norm.weight",))
    )
    made = api.export(adapter(), output=tmp_path / "out")
    assert made.passed is False
    assert made.as_dict()["exit_code"] == 1
    assert made.folder == tmp_path / "out.failed"
    assert made.file.is_file()
    assert not (tmp_path / "out").exists()
    kept = json.loads((made.folder / "parity.json").read_text())
    assert kept["passed"] is False
    assert "model.norm.weight" in kept["problems"][0]
    assert "no file was made of them" in kept["unproven"]


def test_what_changes_more_than_a_matrix_is_merged_in_memory_and_that_is_said(adapter):
    source = adapter(trainable_token_indices={"embed_tokens": [5, 6]})
    merged = api.merge(source)
    assert "in memory and not tensor by tensor: the adapter has trainable_token_indices" in merged.notes[0]
    assert merged.parity.layers is None
    (_, expected), (_, found) = plain(source, "llama"), plain(merged.folder, "llama")
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_base_s_licence_goes_with_what_is_made_from_it(bases, tmp_path):
    base = tmp_path / "licensed"
    shutil.copytree(bases["llama"], base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: own-terms\n---\n# Base\n")
    (base / "LICENSE.txt").write_text("Only on Sundays.")
    merged = api.merge(made_adapter(base, tmp_path / "adapter", "llama"))
    card = (merged.folder / "README.md").read_text()
    assert card.startswith("---\ntags:\n- tunesmith\nlibrary_name: transformers\nlicense: other\n")
    assert "The base `licensed` is under `own-terms`" in card
    assert (merged.folder / "LICENSE.txt").read_text() == "Only on Sundays."
    # and on, from what is made from that
    again = api.merge(made_adapter(merged.folder, tmp_path / "again", "llama"))
    assert "license_name: own-terms" in (again.folder / "README.md").read_text()


def test_the_base_s_revision_is_written_into_the_adapter(bases):
    from tunesmith.recipe import LoRA

    model = models.attach(models.load_model(str(bases["llama"])), LoRA(rank=2), revision="v1")
    assert model.peft_config["default"].revision == "v1"


def test_code_that_a_configuration_names_is_left_out(bases, tmp_path):
    """Many models that transformers knows still name code of their own, which is not copied."""
    base = tmp_path / "named"
    shutil.copytree(bases["llama"], base)
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "modeling_own.py").write_text("raise SystemExit('this must never run')")
    merged = api.merge(made_adapter(base, tmp_path / "adapter", "llama"))
    assert "auto_map" not in (merged.folder / "config.json").read_text()
    assert "code of its own" in merged.notes[0]


def damaged(folder: Path) -> None:
    """One weight of the adapter is not a number."""
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})


def rebased(**config):
    """The adapter's base is another folder, with this configuration."""

    def change(folder: Path) -> None:
        base = folder.parent / "other"
        base.mkdir()
        (base / "config.json").write_text(json.dumps(config))
        settings = json.loads((folder / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = str(base)
        (folder / "adapter_config.json").write_text(json.dumps(settings))

    return change


def with_base(name: str | None):
    def change(folder: Path) -> None:
        settings = json.loads((folder / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = name
        (folder / "adapter_config.json").write_text(json.dumps(settings))

    return change


def as_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (damaged, r"cannot be merged into its base|does not answer"),
        (
            with_base("/nowhere/base"),
            r"base of the adapter .* is missing: /nowhere/base.*base_model_name_or_path",
        ),
        (with_base(None), r"names no base"),
        (as_pickle, r"no weights as safetensors.*adapter_model.bin"),
        (
            rebased(model_type="own", auto_map={"AutoConfig": "a.A", "AutoModelForCausalLM": "b.B"}),
            r"needs code of its own, and no code of a model is ever run",
        ),
        (
            rebased(
                model_type="llama",
                architectures=["LlamaForCausalLM"],
                quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
            ),
            r"stored quantized.*model that it was quantized from",
        ),
    ],
    ids=["not a number", "no base", "unnamed base", "pickle", "remote code", "quantized"],
)
def test_what_cannot_be_merged_is_one_clear_error(adapter, tmp_path, change, expected):
    source = adapter()
    change(source)
    with pytest.raises(ModelError, match="(?s)" + expected):
        api.merge(source)
    assert not (tmp_path / "adapter_merged").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def test_prompts_that_were_learned_are_no_weights(bases, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ModelError, match="PROMPT_TUNING is no change of weights"):
        api.merge(tmp_path / "prompt")


def test_what_has_no_adapter_says_where_its_weights_are(trained, bases):
    run = trained(adapter={"kind": "full"}, evaluation={"skip": True})
    with pytest.raises(ModelError, match=r"(?s)nothing to merge.*adapter kind 'full'.*final_model"):
        api.merge(run.path)
    with pytest.raises(ModelError, match=r"(?s)nothing to merge.*whole weights"):
        api.merge(bases["t5"])
    shutil.rmtree(run.final_model)
    with pytest.raises(RunError, match=r"(?s)no final model.*best_model"):
        api.merge(run.path)


def test_a_taken_place_is_refused_and_kept(adapter, tmp_path):
    source = adapter()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match=r"(?s)not empty.*mine.txt.*--output"):
        api.merge(source, output=tmp_path / "taken")
    with pytest.raises(RunError, match="is a file"):
        api.merge(source, output=tmp_path / "file")
    with pytest.raises(TunesmithError, match="float16"):
        api.merge(source, dtype="float61")
    (tmp_path / "empty").mkdir()
    assert api.merge(source, output=tmp_path / "empty").check.passed


def test_a_wrong_merge_fails_the_check_and_gets_no_folder(adapter, tmp_path, monkeypatch):
    source, right = adapter("t5"), weights._Shards.add

    def wrong(shards, name, tensor):
        right(shards, name, tensor + (0.5 if name.endswith("SelfAttention.q.weight") else 0))

    monkeypatch.setattr(weights._Shards, "add", wrong)
    result = CliRunner().invoke(app, ["merge", str(source), "--json"])
    shown = json.loads(result.stdout.strip().splitlines()[-1])
    assert result.exit_code == shown["exit_code"] == 1
    assert "does not answer as base and adapter do" in shown["problem"]
    assert "largest difference of a logit" in shown["found"]
    assert "changed layers answer as in parts, largest difference" in shown["found"]
    assert not (tmp_path / "adapter_merged").exists()
    facts = json.loads((tmp_path / "adapter_merged.failed" / "merge.json").read_text())
    assert facts["check"]["passed"] is False


def test_the_verb_prints_the_check(adapter, tmp_path):
    result = CliRunner().invoke(app, ["merge", str(adapter("bart")), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "check     passed" in result.stdout
    assert "largest difference of a logit" in result.stdout
    assert "4 of 4 prompts are the same tokens" in result.stdout
    assert "4 of 4 greedy answers have the same tokens" in result.stdout
    facts = json.loads(
        CliRunner()
        .invoke(app, ["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "two"), "--json"])
        .stdout.strip()
        .splitlines()[-1]
    )
    assert facts["folder"] == str(tmp_path / "two")
    assert facts["check"]["passed"] is True


def test_a_stop_leaves_nothing_behind(adapter, tmp_path, monkeypatch):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(parity, "compared", stopped)
    source = adapter()
    with pytest.raises(KeyboardInterrupt):
        api.merge(source)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def answers(*rows: tuple[tuple[int, ...], list[list[float]]]) -> list[Answered]:
    return [Answered(ids, torch.tensor(logits)) for ids, logits in rows]


def checked(before, after, *, tolerance: float):
    differences = [parity.difference(a, b) for a, b in zip(before, after, strict=True)]
    return parity.checked(differences, tolerance=tolerance)


def test_the_check_by_hand():
    """One prompt of one token, answers of two: three positions, of which the second decides the second token."""
    one = answers(((1, 0), [[0.0, 4.0], [2.0, 1.0], [0.0, 1.0]]))
    same = checked(one, one, tolerance=1e-4)
    assert (same.passed, same.positions, same.new_tokens, same.same_answers) == (True, 3, 2, 1)
    assert (same.largest_difference, same.largest_logit) == (0.0, 4.0)
    other = answers(((1, 1), [[0.0, 4.0], [2.0, 1.0], [0.0, 1.5]]))
    found = checked(
        one, other, tolerance=0.125
    )  # 0.5 of 4.0 is just allowed; the tokens differ by 1.0 = 2 x 0.5
    assert (found.largest_difference, found.ties, found.same_answers, found.passed) == (0.5, 1, 0, True)
    assert not checked(one, other, tolerance=0.12).passed
    clear = answers(((0, 0), [[0.0, 4.0], [2.0, 1.0], [0.0, 1.0]]))
    assert not checked(one, clear, tolerance=0.125).passed, "a token preferred by 4.0 is no tie"
    broken = answers(((1, 0), [[0.0, 4.0], [float("nan"), 1.0], [0.0, 1.0]]))
    assert not checked(one, broken, tolerance=1.0).passed
    short = checked(one, answers(((1,), one[0].logits.tolist())), tolerance=1e-4)
    assert not short.passed, "an answer that ends early is another answer"
