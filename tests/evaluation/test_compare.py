import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from rows_by_hand import row
from scipy.stats import binomtest, ttest_rel

from tunesmith.errors import RunError
from tunesmith.evaluation import scores
from tunesmith.evaluation.compare import compare, holm, methods, remarks, sentence, shown, table
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
