"""What was forgotten: the frozen sample, its comparison, and a run that leaves it."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from rows_by_hand import row

from tunesmith import api
from tunesmith.assets import GENERAL
from tunesmith.compose import compose
from tunesmith.evaluation import forgetting, read_rows
from tunesmith.evaluation.report import _figures
from tunesmith.training.run import Run


def test_the_general_sample_is_frozen():
    """Another sample would make runs of before and after incomparable: change its hash on purpose only."""
    texts = [text.text for text in forgetting.general_texts()]
    assert len(texts) == len(set(texts)) == 48
    digest = hashlib.sha256(GENERAL.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
    assert digest == "2a47058f147b5f001490b43571a2b8505a76a87aa6c8ecfceb6eeebf9814f3ef"


def rows(shift, n, model):
    return [
        row(i, model=model, nll=40.0 + i % 7 + shift(i), tokens=20, correct=5, num_bytes=60 + i)
        for i in range(n)
    ]


def test_learned_and_forgotten_by_hand():
    base, same = rows(lambda i: 0.0, 30, "base"), rows(lambda i: 0.0, 30, "tuned")
    worse = rows(lambda i: 5.0 + i % 3, 30, "tuned")
    found = forgetting.forgotten((base, worse), (worse, base), resamples=200)
    assert found["general"]["verdict"] == "worse"
    assert found["domain"]["verdict"] == "better"
    assert found["general"]["difference"] == pytest.approx(-found["domain"]["difference"])
    assert found["sentence"].startswith("It forgot: on 30 general texts")
    kept = forgetting.forgotten((base, same), (base, same), resamples=200)
    assert kept["sentence"].startswith("No evidence that it forgot")
    without = forgetting.forgotten((base, worse), ([row(1)], [row(1)]), resamples=200)
    assert without["domain"] is None
    assert "held-out" not in without["sentence"]


@pytest.fixture
def recipe(tiny_model_folder, question_file, tmp_path):
    def made(**evaluation):
        return compose(
            {
                "task": "domain",
                "output_dir": str(tmp_path / "runs"),
                "model": {"base": str(tiny_model_folder)},
                "data": {"dataset": str(question_file), "max_length": 128},
                "training": {"max_steps": 4, "per_device_train_batch_size": 4, "warmup_steps": 0,
                             "learning_rate": 3e-2, "eval_steps": 4, "save_steps": 4},
                "evaluation": {"max_new_tokens": 2, "resamples": 200, **evaluation},
            }
        ).recipe  # fmt: skip

    return made


def test_a_domain_run_says_what_it_learned_and_forgot(recipe):
    run = Run(api.train(recipe()).run)
    found = run.read("evaluation/forgetting.json")
    general = read_rows(run.evaluation / "general.jsonl")
    assert [(r.model, r.status) for r in general] == [("base", "ok")] * 48 + [("tuned", "ok")] * 48
    sizes = [len(text.text.encode()) for text in forgetting.general_texts()]
    assert [r.num_bytes for r in general] == sizes * 2
    bits = {m: sum(r.nll for r in general if r.model == m) for m in ("base", "tuned")}
    assert (found["general"]["difference"] > 0) == (bits["tuned"] > bits["base"])
    assert found["domain"]["difference"] < 0, "it learned its own examples"
    html = (run.path / "report.html").read_text("utf-8")
    assert "Learned and forgotten" in html
    assert "general texts it was not tuned on" in html


def test_the_axis_says_which_way_is_better():
    metrics = [("mcc", "higher is better"), ("bits_per_byte", "lower is better")]
    for name, said in metrics:
        compared = forgetting.compare(
            rows(lambda i: 0.0, 30, "a"),
            rows(lambda i: 1.0 + i % 2, 30, "b"),
            metrics=["bits_per_byte"],
            resamples=100,
        )
        [figure] = _figures([replace(c, metric=name) for c in compared], [], [])
        assert said in figure["data"]["layout"]["xaxis"]["title"]["text"]


def test_it_is_left_out_where_that_is_asked_for(recipe):
    run = Run(api.train(recipe(forgetting=False)).run)
    assert not (run.evaluation / "forgetting.json").exists()
