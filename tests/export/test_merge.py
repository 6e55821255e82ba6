"""Merging: whole weights that answer as base and adapter do, for every kind of adapter and model, or no folder."""

from __future__ import annotations

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
from tunesmith.export import merge as merging
from tunesmith.export import parity
from tunesmith.export.parity import Answered
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
}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(family, kind, marks=() if is_first else pytest.mark.thorough)
        for family in FAMILIES
        for kind in ADAPTERS
        # Each kind on the first family, and each family with what its layers do to weights.
        for is_first in [family == "llama" or kind == "lora" or (family, kind) == ("t5", "dora")]
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


def test_an_adapter_of_a_quantized_base_is_merged_into_whole_weights_and_that_is_said(trained):
    """What can be shown without CUDA: the recipe says QLoRA, nothing is quantized, type and note are right."""
    run = trained()
    text = (run.path / "recipe.yaml").read_text()
    (run.path / "recipe.yaml").write_text(text.replace("kind: lora", "kind: qlora"))
    weights = run.final_model / "adapter_model.safetensors"
    save_file({n: t.to(torch.float16) for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    merged = api.merge(run.path)
    assert merged.dtype == "float16"
    assert {t.dtype for t in load_file(merged.folder / "model.safetensors").values()} == {torch.float16}
    [note] = merged.notes
    assert "4-bit base" in note
    assert note in (merged.folder / "README.md").read_text()


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
        (as_pickle, r"no adapter_model.safetensors.*Only safetensors"),
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
    source, right = adapter("t5"), models.merged

    def wrong(model):
        found = right(model)
        found.get_output_embeddings().weight.data[:, 0] += 0.5
        return found

    monkeypatch.setattr(models, "merged", wrong)
    result = CliRunner().invoke(app, ["merge", str(source), "--json"])
    shown = json.loads(result.stdout.strip().splitlines()[-1])
    assert result.exit_code == shown["exit_code"] == 1
    assert "does not answer as base and adapter do" in shown["problem"]
    assert "largest difference of a logit" in shown["found"]
    assert not (tmp_path / "adapter_merged").exists()
    facts = json.loads((tmp_path / "adapter_merged.failed" / "merge.json").read_text())
    assert facts["check"]["passed"] is False


def test_the_verb_prints_the_check(adapter, tmp_path):
    result = CliRunner().invoke(app, ["merge", str(adapter("bart")), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "passed: largest difference of a logit" in result.stdout
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
    asked = merging.answered

    def stopped(model, *arguments, **options):
        if "along" in options:
            raise KeyboardInterrupt
        return asked(model, *arguments, **options)

    monkeypatch.setattr(merging, "answered", stopped)
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
