"""Attempts at a question are one question: copies of them change no figure; and where there is no interval."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_by_hand import row

from tunesmith.evaluation import scores
from tunesmith.evaluation.compare import compare, difference_shown, sentence
from tunesmith.evaluation.metrics import METRICS
from tunesmith.evaluation.power import detectable_share, paired_shares

ATTEMPTS = 3
WORDS = ["red", "blue", "green", "one", "two"]
TALLIED = [name for name, metric in METRICS.items() if metric.tally and metric.kind == "answer"]
MEASURED = ["pass_at_1", "rougeL", "perplexity", "bleu", "chrf", "macro_f1"]
FEW = settings(max_examples=3, deadline=None, derandomize=True)


def answers(draw, model, questions, groups):
    made = []
    for item in range(questions):
        for sample in range(ATTEMPTS):
            likelihood = {"nll": draw.uniform(1, 9), "tokens": 5, "correct": 2} if not sample else {}
            scored = {"pass_at_1": float(draw.integers(2)), "rougeL": draw.random()}
            scored |= dict.fromkeys(TALLIED, draw.random())
            made.append(
                row(item, model=model, sample=sample, group=groups and f"g{item % groups}", scores=scored,
                    reference=["yes", "no", "maybe"][item % 3] + " it is the one",
                    output=" ".join(draw.choice([*WORDS, "it", "is", "yes", "no", "the"], 6)), **likelihood)
            )  # fmt: skip
    return made


def copied(rows, times):
    """The same attempts made again and again."""
    most = 1 + max(row.sample for row in rows)
    return [replace(row, sample=row.sample + most * copy) for copy in range(times) for row in rows]


@pytest.mark.parametrize("groups", [None, 6])
@FEW
@given(st.integers(0, 10_000), st.integers(2, 3))
def test_copies_of_every_attempt_change_no_figure(groups, seed, times):
    draw = np.random.default_rng(seed)
    base, tuned = (answers(draw, name, 12, groups) for name in ("base", "tuned"))
    once = compare(base, tuned, metrics=MEASURED, resamples=200)
    again = compare(copied(base, times), copied(tuned, times), metrics=MEASURED, resamples=200)
    for one, other in zip(once, again, strict=True):
        first, second = asdict(one), asdict(other)
        for name, value in first.items():
            if isinstance(value, float):
                assert second[name] == pytest.approx(value, rel=1e-9, abs=1e-9), (one.metric, name)
            elif name not in ("reason", "remarks"):
                assert second[name] == value, (one.metric, name)
    for name, score in scores(base, MEASURED).items():
        other = scores(copied(base, times), MEASURED)[name]
        assert [other[key] for key in score] == [
            pytest.approx(value, rel=1e-9, abs=1e-9) if isinstance(value, float) else value
            for value in score.values()
        ], name


def test_questions_are_counted_and_not_draws():
    """Three questions with twenty attempts each are three questions."""
    base, tuned = (
        [row(item, score, sample=n, model=model, metric="pass_at_1") for item in range(3) for n in range(20)]
        for model, score in (("base", 0.0), ("tuned", 1.0))
    )
    [found] = compare(base, tuned, metrics=["pass_at_1"], resamples=200)
    assert (found.n, found.groups, found.wins, found.verdict) == (3, 3, 3, "inconclusive")
    assert "3 items are too few" in found.reason
    assert found.assumed_detectable == detectable_share(3, 0.2)
    assert scores(base, ["pass_at_1"])["pass_at_1"]["n"] == 3


def test_attempts_are_averaged_before_questions_are_compared():
    rights = [[1, 0, 0], [1, 1, 1], [0, 0, 0]] * 5
    base = [row(n, 0.0, sample=k, metric="pass_at_1") for n in range(15) for k in range(3)]
    tuned = [
        row(n, float(r), sample=k, metric="pass_at_1", model="tuned")
        for n, own in enumerate(rights)
        for k, r in enumerate(own)
    ]
    [found] = compare(base, tuned, metrics=["pass_at_1"], resamples=400)
    assert (found.n, found.wins, found.ties, found.losses) == (15, 10, 5, 0)
    assert found.tuned == pytest.approx(4 / 9)
    assert found.method.endswith("p by paired t test"), "means of attempts are not right or wrong"


def test_a_question_with_an_attempt_that_could_not_be_scored_is_one_error():
    rows = [row(n, 1.0, sample=k, metric="pass_at_1") for n in range(12) for k in range(4)]
    broken = [
        replace(r, scores={}, status="error:pass_at_1: x") if r.item == 0 and r.sample < 3 else r
        for r in rows
    ]
    found = scores(broken, ["pass_at_1"])["pass_at_1"]
    assert (found["n"], found["n_errors"]) == (11, 1)
    [compared] = compare(broken, rows, metrics=["pass_at_1"], resamples=200)
    assert (compared.n, compared.verdict) == (11, "inconclusive")
    assert "1 of 12 items could not be scored" in compared.reason


@pytest.mark.parametrize("groups", [None, 6])
def test_right_or_wrong_scores_that_are_all_alike_have_an_interval_over_groups(groups):
    base, tuned = (
        [row(n, score, model=name, group=groups and f"g{n % groups}") for n in range(24)]
        for name, score in (("base", 0.0), ("tuned", 1.0))
    )
    independent = groups or 24
    score = scores(base, ["exact_match"])["exact_match"]
    assert (score["low"], score["method"]) == (0, "Wilson")
    assert score["high"] == pytest.approx(3.8415 / (independent + 3.8415), abs=1e-4)
    [same] = compare(base, base, metrics=["exact_match"])
    assert (same.low, same.high) == paired_shares(0, 0, independent)
    [all_won] = compare(base, tuned, metrics=["exact_match"])
    assert (all_won.low, all_won.high) == paired_shares(independent, 0, independent)
    assert all_won.p_value == pytest.approx(2.0 ** (1 - independent))


@pytest.mark.parametrize("metric", ["rougeL", "perplexity", "bleu"])
@pytest.mark.parametrize("groups", [None, 1])
def test_where_no_resamples_differ_there_is_no_interval_and_it_is_said(metric, groups):
    """One rule for scores and differences, for means, ratios and statistics of the whole set."""
    rows = [
        row(n, 0.5, metric=metric, nll=7.0, tokens=5, correct=1, output="a b c d e", reference="a b c d f",
            group=groups and "g")
        for n in range(12)
    ]  # fmt: skip
    score = scores(rows, [metric])[metric]
    assert (score["low"], score["high"]) == (None, None)
    assert score["method"].startswith("no interval: ")
    [same] = compare(rows, rows, metrics=[metric], resamples=100)
    assert (same.low, same.high, same.p_value) == (None, None, 1)
    assert same.method.startswith("no interval: all differences are zero")
    assert "no interval" in difference_shown(same)
    other = [replace(r, scores={metric: 0.6}, nll=6.0, output="a b c d f") for r in rows]
    [found] = compare(rows, other, metrics=[metric], resamples=100)
    assert (found.low, found.high) == (None, None)
    assert found.method.startswith("no interval: ")
    assert "no interval" in sentence(found)
    assert found.verdict == ("inconclusive" if groups else "better")


def test_kept_answers_are_taken_only_for_the_same_draw_of_the_same_model(tiny_model_folder, tiny_tokenizer):
    from tunesmith import engines, evaluation, models
    from tunesmith.data.examples import Conversation, Message, Row
    from tunesmith.recipe import Evaluation, Model

    asked = [
        Conversation((Message("user", f"q {n}"), Message("assistant", "a")), Row("a", n)) for n in range(2)
    ]
    items = evaluation.items(asked, tiny_tokenizer)
    source = engines.Source(
        "base", tiny_tokenizer, lambda: models.load_model(str(tiny_model_folder)), str(tiny_model_folder)
    )
    rows = evaluation.evaluate(
        source, tiny_tokenizer, items, name="base", metrics=["exact_match"], max_new_tokens=2, attempts=2,
        temperature=0.7, seed=3,
    )  # fmt: skip
    kept = {"max_new_tokens": 2, "attempts": 2, "temperature": 0.7, "seed": 3, "model": source.identity()}
    assert evaluation.are_answers_to(rows, items, ["exact_match"], **kept)
    for name, other in {"temperature": 0.8, "seed": 4, "model": "another", "attempts": 3}.items():
        assert not evaluation.are_answers_to(rows, items, ["exact_match"], **{**kept, name: other}), name
    same = evaluation.identity(
        Model(base=str(tiny_model_folder)), str(tiny_model_folder), device="cpu", dtype="float32"
    )
    assert same == source.identity()
    assert evaluation.drawn_at(Evaluation()) == 0
    assert evaluation.drawn_at(Evaluation(attempts=2)) == 0.8
