import io
import json
import math
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from rows_by_hand import row
from scipy.stats import binomtest, ttest_rel

from tunesmith.errors import RunError
from tunesmith.evaluation import scores
from tunesmith.evaluation.compare import (
    _p_shown,
    compare,
    holm,
    methods,
    remarks,
    score_interval,
    sentence,
    shown,
    table,
)
from tunesmith.evaluation.metrics import METRICS


def rows(values, *, model="base", groups=None, **fields):
    return [
        row(n, value, model=model, group=groups[n] if groups else None, **fields)
        for n, value in enumerate(values)
    ]


def one(base, tuned, *, metric="exact_match", groups=None, **options):
    options = {"resamples": 2000} | options
    [found] = compare(
        rows(base, groups=groups, metric=metric),
        rows(tuned, groups=groups, metric=metric, model="tuned"),
        metrics=[metric],
        **options,
    )
    return found


def binary(n, both, wins, losses):
    base = [1.0] * both + [0.0] * wins + [1.0] * losses
    tuned = [1.0] * both + [1.0] * wins + [0.0] * losses
    return base + [0.0] * (n - len(base)), tuned + [0.0] * (n - len(tuned))


def test_the_method_of_every_metric_is_told_where_they_differ():
    base = [row(n, scores={"exact_match": 0.0, "rougeL": 0.1 + n % 2 / 9}) for n in range(20)]
    tuned = [row(n, model="tuned", scores={"exact_match": 0.0, "rougeL": 0.5}) for n in range(20)]
    compared = compare(base, tuned, metrics=["exact_match", "rougeL"], resamples=100)
    told = methods(compared)
    assert told.startswith("Intervals: exact match: Tango's score interval of paired shares")
    assert "; ROUGE-L: paired bootstrap" in told
    assert methods(compared[:1]).endswith("p by McNemar's exact test.")
    assert methods([]) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.207, "3.21"),
        (999.99, "999.99"),
        (1234.5, "1,234"),
        (6.543e6, "6,543,000"),
        (math.exp(700), "1.01e+304"),
    ],
)
def test_a_large_perplexity_is_written_out(value, text):
    assert shown(value, METRICS["perplexity"]) == text


def test_better_worse_and_mcnemar():
    base, tuned = binary(100, 20, 30, 5)
    found = one(base, tuned)
    assert (found.base, found.tuned, found.difference) == pytest.approx((0.25, 0.5, 0.25))
    assert (found.wins, found.ties, found.losses) == (30, 65, 5)
    assert found.verdict == "better"
    assert found.primary
    assert 0 < found.low < 0.25 < found.high
    assert found.p_value == pytest.approx(binomtest(30, 35, 0.5).pvalue)
    assert one(tuned, base).verdict == "worse"


def test_interval_is_that_of_the_normal_theory():
    random = np.random.default_rng(0)
    base, noise = random.normal(size=400), random.normal(0.1, 1, size=400)
    found = one(list(base), list(base + noise), metric="rougeL", resamples=10_000)
    half = 1.96 * noise.std() / 20
    assert (found.low, found.high) == pytest.approx((noise.mean() - half, noise.mean() + half), abs=0.006)
    assert found.p_value == pytest.approx(ttest_rel(base + noise, base).pvalue)


def test_swapping_negates():
    random = np.random.default_rng(1)
    base, tuned = random.random(50), random.random(50)
    there, back = one(list(base), list(tuned), metric="rougeL"), one(list(tuned), list(base), metric="rougeL")
    assert (back.difference, back.low, back.high) == pytest.approx(
        (-there.difference, -there.high, -there.low)
    )
    assert (back.wins, back.losses) == (there.losses, there.wins)


def test_equal_answers_give_no_evidence():
    found = one([0.5] * 40, [0.5] * 40, metric="rougeL")
    assert (found.difference, found.low, found.high, found.p_value) == (0, None, None, 1)
    assert found.verdict == "no evidence"
    assert "score the same" in found.reason


def test_few_discordant_questions_never_settle_it():
    found = one(*binary(100, 50, 5, 0))
    assert found.p_value == pytest.approx(0.0625)
    assert found.verdict == "no evidence"
    assert "Only 5 questions" in found.reason
    assert "could hide" in found.reason
    assert one(*binary(100, 50, 6, 0)).verdict == "better"


def test_too_few_items_groups_or_too_many_errors_are_inconclusive():
    assert one([0.0] * 9, [1.0] * 9).verdict == "inconclusive"
    groups = [f"g{n % 4}" for n in range(40)]
    found = one([0.0] * 40, [1.0] * 40, groups=groups)
    assert found.verdict == "inconclusive"
    assert "4 groups are too few" in found.reason
    base, tuned = rows([0.0] * 50), rows([1.0] * 50, model="tuned")
    broken = [row(n, None, model="tuned", status="error:exact_match: x") for n in range(2)]
    [found] = compare(base, [*broken, *tuned[2:]], metrics=["exact_match"], resamples=200)
    assert found.verdict == "inconclusive"
    assert "2 of 50" in found.reason
    [found] = compare(base, [*broken[:1], *tuned[1:]], metrics=["exact_match"], resamples=200)
    assert found.verdict == "better"
    assert found.n == 49


def test_order_is_irrelevant_and_missing_rows_are_counted():
    random = np.random.default_rng(2)
    base, tuned = rows(random.random(30)), rows(random.random(30), model="tuned")
    expected = compare(base, tuned, metrics=["exact_match"], resamples=500)
    assert compare(base[::-1], tuned[7:] + tuned[:7], metrics=["exact_match"], resamples=500) == expected
    [found] = compare(base, tuned[:25], metrics=["exact_match"], resamples=500)
    assert found.n == 25
    assert "5 questions of one model have no counterpart" in found.reason


def test_other_questions_are_an_error_and_other_tokens_a_note():
    base = [row(n, 0.0, nll=20.0, tokens=10, correct=1) for n in range(20)]
    other = [row(n, 1.0, reference="else") for n in range(20)]
    with pytest.raises(RunError, match="same questions"):
        compare(base, other, metrics=["exact_match"])
    other = [row(n, 1.0, prompt_sha256="other", nll=9.0, tokens=10, correct=9) for n in range(20)]
    answer, likelihood = compare(base, other, metrics=["exact_match", "perplexity"], resamples=200)
    assert answer.verdict == "better"
    assert "different tokens" in answer.reason
    assert likelihood.verdict == "inconclusive"


def test_what_is_not_compared_says_why_beside_the_table():
    base = [row(n, 0.0, nll=20.0, tokens=10, correct=1) for n in range(20)]
    other = [row(n, 1.0, prompt_sha256="other", nll=9.0, tokens=10, correct=9) for n in range(20)]
    names = ["exact_match", "perplexity", "token_accuracy"]
    compared = compare(base, other, metrics=names, resamples=200, apart="another source prefix")
    assert [line[1] for line in table(compared)[2:]] == ["-", "-"]
    [said] = remarks(compared)
    assert said == (
        "Not compared: perplexity, token accuracy. 20 items reached the two models as different tokens (another "
        "source prefix), and likelihoods are per token."
    )
    [primary] = compare(base, other, metrics=["perplexity"], resamples=200)
    assert "another tokenizer, chat template or source prefix" in sentence(primary)
    assert remarks([primary]) == [], "its sentence says so"
    assert remarks(compare(base, base, metrics=names, resamples=200)) == []


LOOP = "red blue " * 6


@pytest.mark.parametrize(
    ("base", "tuned", "expected"),
    [
        ({"output": " "}, {}, ["All 20 answers of the base are empty"]),
        ({}, {"output": LOOP}, ["20 of 20 answers of the tuned model repeat themselves"]),
        ({}, {"output": LOOP, "reference": LOOP}, []),
        (
            {},
            {"finish_reason": "length", "generation": {"max_new_tokens": 6}},
            ["20 of 20 answers of the tuned model are cut off at the longest length (6 tokens)"],
        ),
        ({"finish_reason": "length", "output": LOOP}, {}, []),
        ({"output": None}, {"output": None}, []),
    ],
    ids=["empty base", "loops", "loops as asked", "cut", "the base's own", "not asked"],
)
def test_how_the_answers_look_is_said_beside_the_verdict(base, tuned, expected):
    questions = {"reference": tuned["reference"]} if "reference" in tuned else {}
    one = [row(n, 0.0, **base | questions) for n in range(20)]
    two = [row(n, 1.0, model="tuned", **tuned) for n in range(20)]
    compared = compare(one, two, metrics=["exact_match", "rougeL"], resamples=200)
    assert compared[0].verdict == "better"
    said = [remark for remark in remarks(compared) if not remark.startswith("Not compared")]
    assert len(said) == len(expected)
    assert all(remark.startswith(words) for remark, words in zip(said, expected, strict=True))
    assert compared[1].remarks == (), "with the primary metric only"


def test_a_small_share_of_odd_answers_is_not_mentioned():
    for number, count in ((4, 1), (3, 0)):  # a fifth of twenty, and less
        two = [row(n, 1.0, model="tuned", output=LOOP if n < number else "red") for n in range(20)]
        [found] = compare(rows([0.0] * 20), two, metrics=["exact_match"], resamples=200, names=("a", "b"))
        assert len(found.remarks) == count
        assert all(remark.startswith(f"{number} of 20 answers of b repeat") for remark in found.remarks)


def test_token_weighting_of_likelihood_metrics():
    base = [row(n, nll=float(n), tokens=n + 1, correct=n // 2) for n in range(20)]
    tuned = [row(n, nll=n / 2, tokens=n + 1, correct=n) for n in range(20)]
    perplexity, accuracy = compare(base, tuned, metrics=["perplexity", "token_accuracy"], resamples=500)
    assert perplexity.base == pytest.approx(math.exp(190 / 210))
    assert perplexity.tuned == pytest.approx(math.exp(95 / 210))
    assert perplexity.verdict == "better", "lower is better"
    assert perplexity.difference < 0
    assert accuracy.tuned == pytest.approx(190 / 210)
    assert perplexity.primary, "without an answer metric the first one is primary"
    assert "Holm" in accuracy.reason


def test_a_p_that_is_just_above_the_limit_is_shown_above_it():
    assert [_p_shown(p, 0.05) for p in (0.0502, 0.05004, 0.375)] == ["0.0502", "0.05004", "0.375"]


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_secondary_verdicts_need_the_adjusted_p():
    base, tuned = binary(100, 20, 17, 5)  # p = .017: enough alone, not among six
    base_rows, tuned_rows = [], []
    names = ["sql_execution", "exact_match", "rougeL", "rouge1", "rouge2", "rougeLsum"]
    for n in range(100):
        base_rows.append(row(n, scores=dict.fromkeys(names, base[n])))
        tuned_rows.append(row(n, scores=dict.fromkeys(names, tuned[n])))
    first, *others = compare(base_rows, tuned_rows, metrics=names, resamples=1000)
    assert first.verdict == "better"
    assert {c.verdict for c in others} == {"no evidence"}
    assert remarks([first, *others])[-1].startswith(
        "No evidence though the interval excludes 0: exact match, ROUGE-L, "
    )
    assert not any("No evidence" in said for said in remarks([first]))


def test_groups_widen_the_interval_and_a_copied_member_does_not_narrow_it():
    random = np.random.default_rng(3)
    effect = np.repeat(random.normal(0.1, 1, 20), 10)
    base, tuned = [0.0] * 200, list(effect)
    groups = [f"g{n // 10}" for n in range(200)]
    naive, clustered = one(base, tuned, metric="rougeL"), one(base, tuned, metric="rougeL", groups=groups)
    assert clustered.groups == 20
    assert clustered.high - clustered.low > 2.5 * (naive.high - naive.low)


def _coverage(draw, trials, **options):
    covered = 0
    for trial in range(trials):
        differences, truth, groups = draw(np.random.default_rng(trial))
        found = one([0.0] * len(differences), list(differences), metric="rougeL", groups=groups, seed=trial,
                    resamples=500, **options)  # fmt: skip
        covered += found.low <= truth <= found.high
    return covered / trials


def test_coverage_of_independent_items():
    def draw(random):
        return random.choice([-1.0, 0.0, 1.0], size=40, p=[0.2, 0.4, 0.4]), 0.2, None

    assert 0.92 <= _coverage(draw, 300) <= 0.98


def test_coverage_under_groups_and_negative_control_without():
    def grouped(random):
        values = np.repeat(random.normal(0, 1, 20), 6) + random.normal(0, 0.5, 120)
        return values, 0.0, [f"g{n // 6}" for n in range(120)]

    def naive(random):
        return (*grouped(random)[:2], None)

    assert 0.92 <= _coverage(grouped, 300) <= 0.98
    assert _coverage(naive, 100) < 0.75


def test_sentence_table_and_json():
    base, tuned = binary(100, 20, 30, 5)
    found = one(base, tuned, groups=[f"g{n % 25}" for n in range(100)], metric="sql_execution")
    assert sentence(found).startswith(
        "Better: SQL execution accuracy rose from 25.0 % to 50.0 %, +25.0 points ["
    )
    assert sentence(found).endswith("], n=100 questions in 25 groups.")
    header, line = table([found])
    assert header == ["metric", "base", "tuned", "difference [95 % interval]", "n", "verdict"]
    assert line[0::5] == ["sql_execution (%)", "better"]
    assert table([])[0][0] == "metric"
    nothing = one([None] * 20, [None] * 20)
    assert nothing.verdict == "inconclusive"
    assert "was not compared" in sentence(nothing)
    json.dumps([asdict(found), asdict(nothing)], allow_nan=False)


def test_scores_are_recomputed_from_rows_with_intervals():
    found = scores(rows([1.0] * 30), ["exact_match"])["exact_match"]
    expected = binomtest(30, 30).proportion_ci(method="wilson")
    assert (found["value"], found["n"], found["low"], found["high"]) == pytest.approx(
        (1, 30, expected.low, expected.high)
    )
    found = scores([*rows([0.2, 0.4]), row(2, None, status="error:x")], ["rougeL", "exact_match"])
    assert found["exact_match"]["n_errors"] == 1
    assert found["exact_match"]["value"] == pytest.approx(0.3)
    assert found["rougeL"]["value"] is None


def test_why_rows_are_not_scored_is_said_with_the_first_of_them():
    from rich.console import Console

    from tunesmith.api import Result
    from tunesmith.results import scores_text

    broken = [row(n, status="error:exact_match: no key; rougeL: too long") for n in (4, 5)]
    other = [row(6, status="error:no prompt")]
    found = scores([*rows([1.0] * 4), *broken, *other], ["exact_match", "rougeL"])
    assert found["exact_match"]["n_errors"] == 3
    assert found["exact_match"]["cause"] == "no key (first in data:5; 1 more for other reasons)"
    assert found["rougeL"]["cause"].startswith("too long (first in data:5")
    assert scores(rows([1.0] * 4), ["exact_match"])["exact_match"]["cause"] == ""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(scores_text(Result(run="here", comparisons=(), seconds=0.0, scores=found)))
    assert "not scored: exact match: no key (first in data:5" in console.export_text()


def test_a_verdict_needs_the_interval_and_p():
    """Small skewed samples, where the bootstrap's interval may exclude 0 before a t test does."""
    draw = np.random.default_rng(5)
    seen = 0
    for _ in range(150):
        base = draw.uniform(0, 0.5, 12)
        compared = one(
            list(base),
            list(base + draw.exponential(0.08, 12) * draw.choice([-0.3, 1.0], 12)),
            metric="rougeL",
        )
        if compared.verdict in ("better", "worse"):
            assert compared.p_value <= 0.05
            seen += 1
    assert seen > 10, "some of them are verdicts"


def test_tables_name_metrics_as_the_command_takes_them():
    from tunesmith.evaluation.metrics import known_metrics

    for name in METRICS:
        base, tuned = (rows([0.0, 1.0], metric=name, nll=9.0, tokens=3, correct=1) for _ in range(2))
        _, [shown_as, *_] = table(compare(base, tuned, metrics=[name], resamples=20))
        assert known_metrics([shown_as.split(" (")[0]]) == [name]
        assert shown_as.endswith({"share": " (%)", "points": " (points)", "ratio": name}[METRICS[name].unit])


def random_rows(metric, seed, *, rights=2):
    """Thirty rows of random answers and likelihoods; `rights` is one more than the right tokens of a row at most."""
    draw = np.random.default_rng([seed, len(metric)])
    found = []
    for n in range(30):
        fields = {"reference": f"answer {n % 3}", "output": f"answer {draw.integers(3)}"}
        if metric in ("bleu", "bleu1", "bleu2", "chrf"):
            words = [f"word{place}" for place in range(6)]
            said, wanted = draw.choice(words, 8), np.random.default_rng(n).choice(words, 8)
            fields = {"reference": " ".join(wanted), "output": " ".join(said)}
        if metric == "calibration_error":
            sure = draw.random()
            fields["label_probs"] = {"answer 0": sure, "answer 1": (1 - sure) / 2, "answer 2": (1 - sure) / 2}
        fields |= {"tokens": 3 + n % 5, "correct": int(draw.integers(rights)), "num_bytes": 20 + n}
        fields["nll"] = float(draw.integers(2))
        found.append(row(n, float(draw.integers(2)), metric=metric, **fields))
    return found


@pytest.mark.parametrize("name", METRICS)
def test_every_interval_holds_its_own_value(name):
    for seed in range(3):
        base, tuned = random_rows(name, seed), random_rows(name, seed + 100)
        score = score_interval(base, name, resamples=300)
        assert score.low is None or score.low - 1e-9 <= score.value <= score.high + 1e-9, score
        [found] = compare(base, tuned, metrics=[name], resamples=300)
        assert found.low is None or found.low - 1e-9 <= found.difference <= found.high + 1e-9, found


def test_one_right_token_of_many_does_not_make_a_row_right():
    """Token accuracy is right tokens over tokens: its numerators are no right-or-wrong answers."""
    base, tuned = random_rows("token_accuracy", 0), random_rows("token_accuracy", 1)
    score = score_interval(base, "token_accuracy")
    assert score.method.startswith("bootstrap")
    assert score.low < score.value < score.high < 0.35
    [found] = compare(base, tuned, metrics=["token_accuracy"], resamples=300)
    assert found.method.startswith("paired bootstrap")
    assert "questions are right with one model" not in found.reason


@pytest.mark.parametrize("name", ["response_diversity", "ead", "distinct_1", "distinct_2", "distinct_3"])
def test_one_number_of_all_answers_has_no_interval_and_no_verdict(name):
    """The rows' shares hang on one another: resampled, they would say what the answers do not."""
    score = score_interval(rows([0.1] * 60, metric=name), name)
    assert (score.value, score.low, score.high) == (pytest.approx(0.1), None, None)
    assert score.method.startswith("no interval: it is one number of all answers")
    found = one([0.1] * 60, [0.5 + n / 200 for n in range(60)], metric=name)
    assert (found.low, found.high, found.p_value, found.assumed_detectable) == (None, None, None, None)
    assert found.verdict == "inconclusive"
    assert found.difference == pytest.approx(0.5475)
    assert "one number of all answers" in found.reason
    assert sentence(found).startswith("No verdict: different ")
    assert table([found])[1][-1] == "none"
    both = [row(n, scores={name: 0.1, "rougeL": n / 60}) for n in range(60)]
    other = [row(n, model="tuned", scores={name: 0.5, "rougeL": n / 50}) for n in range(60)]
    compared = compare(both, other, metrics=["rougeL", "exact_match", name], resamples=200)
    assert [c.verdict for c in compared][::2] == ["better", "inconclusive"]


def test_which_metrics_are_one_number_of_all_answers():
    assert {name for name, metric in METRICS.items() if metric.of_set} == {
        "response_diversity", "ead", "distinct_1", "distinct_2", "distinct_3",
    }  # fmt: skip


def test_a_mistyped_case_of_the_coverage_benchmark_is_refused(monkeypatch, capsys):
    """Nothing measured must not look like a pass."""
    monkeypatch.setattr(sys, "argv", ["coverage.py", "--only", "BLUE"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "coverage.py"), run_name="__main__")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "no case's name contains 'BLUE'" in said
    assert "BLEU n=100; macro F1 n=150; " in said
    assert "distinct_3" in said
