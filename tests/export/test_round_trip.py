"""What was trained is what is shipped: a causal and an encoder-decoder model up to transformers and llama.cpp."""

from __future__ import annotations

import json

import encoder_decoders
import pytest

from tunesmith import api
from tunesmith.assets import TINY_MODEL
from tunesmith.compose import compose
from tunesmith.engines import llamacpp
from tunesmith.evaluation.report import write_report
from tunesmith.training.run import Run

COLORS = ("red", "blue", "green", "yes", "no", "hello")


def trained(place, family: str, count: int, adapter: str = "lora") -> Run:
    """A LoRA run on rows of which 45 of 100 are held out."""
    file = place / "rows.jsonl"
    rows = [
        {"prompt": f"what is the color of {n}", "response": f"{COLORS[n % 6]} {COLORS[n % 5]}"}
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = TINY_MODEL if family == "causal" else encoder_decoders.save("t5", place / "base")
    recipe = {
        "output_dir": str(place / "runs"), "name": family, "model": {"base": str(base)},
        "method": {"kind": "sft" if family == "causal" else "seq2seq"},
        "data": {"dataset": str(file), "max_length": 128, "held_out": 0.45},
        "adapter": {"kind": adapter, "targets": "all-linear"},
        "training": {"max_steps": 12, "per_device_train_batch_size": 8, "warmup_steps": 0, "learning_rate": 1e-2},
        "evaluation": {"max_new_tokens": 8, "resamples": 100},
    }  # fmt: skip
    return Run(api.train(compose(recipe).recipe).run)


@pytest.mark.thorough
@pytest.mark.skipif(not llamacpp.is_installed(), reason="llama-cpp-python is not here")
@pytest.mark.parametrize("family", ["causal", "seq2seq"])
def test_from_training_to_transformers_and_llama_cpp(family, tmp_path):
    """Prompts are the same tokens for all 50 held-out rows, by each of four readers; transformers', f32's and f16's
    answers too; scores are no worse."""
    pytest.importorskip("gguf")
    run = trained(tmp_path, family, 140)
    merged = api.merge(run.path)
    verdicts = [merged.parity]
    for quant in ("f32", "f16", "q8_0"):
        made = api.export(run.path, quant=quant)
        verdicts.append(made.parity)
        text = (made.folder / "Modelfile").read_text()
        assert f"PARAMETER num_ctx {min(api_context(made.file), 128 + 8)}\n" in text
        assert {(r.place, r.asked, r.same) for r in made.parity.readings} == {
            (place, 50, 50) for place in ("training", "transformers", "server", "gguf")
        }
    for verdict in verdicts:
        assert verdict.passed, verdict.problems()
        assert verdict.prompts == verdict.same_prompts == 50
        assert verdict.score.n == 50
        assert verdict.score.verdict != "worse"
    assert [v.check.same_answers for v in verdicts[:3]] == [50, 50, 50]
    assert verdicts[3].check.same_answers + verdicts[3].check.ties == 50
    page = (run.path / "report.html").read_text()
    assert page.count("50 of 50 prompts are the same tokens") == 4
    for name in ("merged_model", "exports/gguf-f32", "exports/gguf-f16", "exports/gguf-q8_0"):
        assert f"<h3>{name}: " in page


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("family", "adapter"), [("causal", "lora"), ("causal", "qlora"), ("seq2seq", "lora")]
)
def test_a_deployment_answers_50_held_out_rows_over_http_as_the_model(family, adapter, tmp_path):
    """Prompt ids and greedy answers; once more beside the verdict, with OpenAI's client and transformers' generate."""
    openai = pytest.importorskip("openai")
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    from tunesmith.serving.limits import Limits
    from tunesmith.serving.server import Where, running

    if adapter == "qlora":
        pytest.importorskip("bitsandbytes")
    run = trained(tmp_path, family, 140, adapter)
    made = api.prepare_deployment(run.path, output_dir=tmp_path / "out", name="mine")
    assert made.passed, made.served.problems()
    assert made.served.prompts == made.served.same_prompts == 50
    assert made.served.check.same_answers + made.served.check.ties == 50
    if adapter == "lora":
        assert made.served.check.same_answers == 50
    assert made.served.score.n == 50
    assert made.served.check.of_logprobs
    assert made.served.check.positions > 50
    assert made.served.score.verdict != "worse"

    folder = made.folder / "model"
    auto = AutoModelForCausalLM if family == "causal" else AutoModelForSeq2SeqLM
    model, tokenizer = auto.from_pretrained(folder).float(), AutoTokenizer.from_pretrained(folder)
    entries = map(json.loads, (run.path / "ledger.jsonl").read_text().splitlines())
    held = [entry["row"] for entry in entries if entry["fate"] == "held_out"][:50]
    assert len(held) == 50
    token = "a-token-of-tests-1234"
    with running(str(folder), {"mine": folder}, Where(port=0, token=token), Limits()) as (url, _):
        client = openai.OpenAI(base_url=url, api_key=token)
        for row in held:
            messages = [{"role": "user", "content": f"what is the color of {row - 1}"}]
            reply = client.chat.completions.create(
                model="mine", messages=messages, max_tokens=8, extra_body={"return_token_ids": True}
            )
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt"
            ).input_ids
            written = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0]
            answer = written[1:] if family == "seq2seq" else written[ids.shape[1] :]
            assert reply.choices[0].model_extra["prompt_token_ids"] == ids[0].tolist()
            assert reply.choices[0].message.content == tokenizer.decode(answer, skip_special_tokens=True)


def api_context(file) -> int:
    """The context that a GGUF file holds, by gguf's own reader."""
    import gguf

    reader = gguf.GGUFReader(file)
    [name] = [name for name in reader.fields if name.endswith(".context_length")]
    return int(reader.get_field(name).contents())


def test_the_report_shows_each_verdict_and_what_is_damaged(tmp_path):
    """From the files alone: one that passed, one that failed, one that is no verdict."""
    run = tmp_path / "run"
    for name, facts in {
        "merged_model": {"artefact": "merged_model", "passed": True, "problems": [], "sentences": ["all 50 alike"]},
        "exports/gguf-q4_0.failed": {
            "artefact": "x.gguf", "passed": False, "problems": ["its score is worse"], "sentences": ["50 of 50"],
        },
        "exports/gguf-f16": {"passed": True},
    }.items():  # fmt: skip
        (run / name).mkdir(parents=True)
        (run / name / "parity.json").write_text(json.dumps(facts))
    page = write_report(run).read_text()
    assert '<h3>merged_model: <b class="better">passed</b></h3>\n<div class="text">all 50 alike</div>' in page
    assert '<h3>exports/gguf-q4_0.failed: <b class="worse">FAILED</b></h3>' in page
    assert "its score is worse\n50 of 50" in page
    assert "exports/gguf-f16/parity.json holds no verdict" in page
