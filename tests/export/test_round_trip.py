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


def trained(place, family: str, count: int) -> Run:
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
        "adapter": {"kind": "lora", "targets": "all-linear"},
        "training": {"max_steps": 12, "per_device_train_batch_size": 8, "warmup_steps": 0, "learning_rate": 1e-2},
        "evaluation": {"max_new_tokens": 8, "resamples": 100},
    }  # fmt: skip
    return Run(api.train(compose(recipe).recipe).run)


@pytest.mark.thorough
@pytest.mark.skipif(not llamacpp.is_installed(), reason="llama-cpp-python is not here")
@pytest.mark.parametrize("family", ["causal", "seq2seq"])
def test_from_training_to_transformers_and_llama_cpp(family, tmp_path):
    """Prompts are the same tokens for all 50 held-out rows, f16's and transformers' answers too, scores no worse."""
    pytest.importorskip("gguf")
    run = trained(tmp_path, family, 140)
    merged = api.merge(run.path)
    verdicts = [merged.parity]
    for quant in ("f16", "q8_0"):
        made = api.export(run.path, quant=quant)
        verdicts.append(made.parity)
        text = (made.folder / "Modelfile").read_text()
        assert f"PARAMETER num_ctx {api_context(made.file)}\n" in text
    for verdict in verdicts:
        assert verdict.passed, verdict.problems()
        assert verdict.prompts == verdict.same_prompts == 50
        assert verdict.score.n == 50
        assert verdict.score.verdict != "worse"
    assert [v.check.same_answers for v in verdicts[:2]] == [50, 50]
    assert verdicts[2].check.same_answers + verdicts[2].check.ties == 50
    page = (run.path / "report.html").read_text()
    assert page.count("50 of 50 prompts are the same tokens") == 3
    for name in ("merged_model", "exports/gguf-f16", "exports/gguf-q8_0"):
        assert f"<h3>{name}: " in page


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
