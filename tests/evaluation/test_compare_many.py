"""Properties that every comparison has, and comparisons of more than two models."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_by_hand import row
from typer.testing import CliRunner

from tunesmith import api
from tunesmith.cli import app
from tunesmith.errors import RecipeError, TunesmithError
from tunesmith.evaluation.compare import compare, compare_all, holm, table_of_many
from tunesmith.evaluation.power import detectable_mean, detectable_share, expected, paired_shares

VALUES = {
    "binary": st.sampled_from([0.0, 1.0]),
    "graded": st.floats(0, 1).map(lambda x: round(x, 3)),
}
FEW = settings(max_examples=30, deadline=None, derandomize=True)


def items(kind, low=12, high=40):
    return st.lists(st.tuples(VALUES[kind], VALUES[kind]), min_size=low, max_size=high)


def sides(pairs, *, groups=None, metric="exact_match", likelihood=False):
    def side(place, name):
        return [
            row(
                n,
                None if likelihood else pair[place],
                model=name,
                metric=metric,
                group=None if groups is None else f"g{n % groups}",
                **({"nll": 5 * pair[place] + 1, "tokens": 4 + n % 3, "correct": 2} if likelihood else {}),
            )
            for n, pair in enumerate(pairs)
        ]

    return side(0, "base"), side(1, "tuned")


def has_grades(pairs):
    return any(value not in (0, 1) for pair in pairs for value in pair[:1])


def only(one, other, metric="exact_match", **options):
    [found] = compare(one, other, metrics=[metric], resamples=400, **options)
    return found


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("groups", [None, 6])
@FEW
@given(st.data())
def test_swapping_mirrors_every_number(kind, groups, data):
    one, other = sides(data.draw(items(kind)), groups=groups)
    there, back = only(one, other), only(other, one)
    assert (back.base, back.tuned) == (there.tuned, there.base)
    assert (back.difference, back.low, back.high) == pytest.approx(
        (-there.difference, -there.high, -there.low), abs=1e-9
    )
    assert (back.wins, back.ties, back.losses) == (there.losses, there.ties, there.wins)
    assert back.p_value == pytest.approx(there.p_value)
    assert back.detectable == pytest.approx(there.detectable)
    assert back.assumed_detectable == there.assumed_detectable
    mirrored = {"better": "worse", "worse": "better"}
    assert back.verdict == mirrored.get(there.verdict, there.verdict)


@FEW
@given(items("graded"))
def test_swapping_mirrors_perplexity_whose_lower_is_better(pairs):
    one, other = sides(pairs, likelihood=True)
    there, back = only(one, other, "perplexity"), only(other, one, "perplexity")
    assert (back.difference, back.low, back.high) == pytest.approx(
        (-there.difference, -there.high, -there.low)
    )
    assert (back.wins, back.losses) == (there.losses, there.wins)
    assert back.detectable == pytest.approx(there.detectable)


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("groups", [None, 6])
@FEW
@given(st.data())
def test_identical_rows_have_no_difference_and_order_does_not_matter(kind, groups, data):
    pairs = data.draw(items(kind))
    one, other = sides(pairs, groups=groups)
    same = only(one, [replace(r, model="tuned") for r in one])
    assert (same.difference, same.p_value, same.wins, same.losses) == (0, 1, 0, 0)
    assert (
        (same.low is None and same.high is None)
        if kind == "graded" and has_grades(pairs)
        else (same.low <= 0 <= same.high)
    )
    assert same.verdict == "no evidence"
    order = data.draw(st.permutations(range(len(pairs))))
    assert only([one[n] for n in order], [other[n] for n in reversed(order)]) == only(one, other)


@pytest.mark.parametrize("kind", VALUES)
def test_copies_of_cluster_members_do_not_shrink_the_interval_as_independent_items_would(kind):
    random = np.random.default_rng(4)
    for _ in range(5):
        values = random.random((30, 2)) if kind == "graded" else random.integers(0, 2, (30, 2)).astype(float)
        one, other = sides(values.tolist())
        copies = [
            [replace(r, item=r.item + 100 * copy, group=f"item {r.item}") for copy in range(8) for r in rows]
            for rows in (one, other)
        ]
        alone = only(*([replace(r, group=f"item {r.item}") for r in rows] for rows in (one, other)))
        copied, naive = only(*copies), only(*([replace(r, group=None) for r in rows] for rows in copies))
        assert copied.groups == 30
        assert copied.n == 240
        assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.15)
        assert naive.high - naive.low < 0.5 * (copied.high - copied.low)
        assert naive.detectable < 0.5 * copied.detectable


@pytest.mark.parametrize(
    ("discordance", "n", "points"),
    [(0.1, 312, 0.05), (0.2, 626, 0.05), (0.3, 940, 0.05), (0.2, 1742, 0.03), (0.2, 155, 0.1)],
)
def test_what_can_be_found_is_what_connor_tabulates(discordance, n, points):
    assert detectable_share(n, discordance) == pytest.approx(points, abs=2e-4)


def test_what_can_be_found_in_a_mean_is_found_four_times_in_five():
    random = np.random.default_rng(0)
    n, deviation = 25, 0.3
    effect = detectable_mean(deviation / math.sqrt(n), n)
    drawn = random.normal(effect, deviation, (4000, n))
    t = drawn.mean(1) / (drawn.std(1, ddof=1) / math.sqrt(n))
    from scipy.stats import t as student

    assert (abs(t) > student.ppf(0.975, n - 1)).mean() == pytest.approx(0.8, abs=0.025)
    assert 2.8 * 1.8 / math.sqrt(80) == pytest.approx(detectable_mean(1.8 / math.sqrt(80), 80), rel=0.02)


def test_what_can_be_found_is_told_before_and_after():
    could = expected(155, 155)
    assert could.value == "±10.0 points right or wrong, ±6.8 points graded"
    assert "of 31 groups behave alike" in expected(155, 31).reason
    assert expected(1, 1) is None
    found = only(*sides([(0.0, 1.0)] * 20 + [(1.0, 0.0)] * 11 + [(1.0, 1.0)] * 124))
    assert found.verdict == "no evidence"
    assert found.assumed_detectable == pytest.approx(detectable_share(155, 0.2))
    assert found.detectable == pytest.approx(detectable_share(155, 31 / 155))
    assert "Differences from ±10.0 points on are found 4 times in 5." in found.reason
    none = only(*sides([(1.0, 1.0)] * 100))
    assert "a difference up to ±3.7 points could hide at n=100" in none.reason


@pytest.mark.parametrize(
    ("wins", "losses", "n"), [(12, 2, 44), (0, 0, 30), (9, 0, 20), (3, 3, 10), (1, 17, 60)]
)
def test_the_score_interval_is_where_its_test_statistic_reaches_its_limit(wins, losses, n):
    # Tango's statistic with the restricted estimate found by brute force instead of in closed form.
    def statistic(difference):
        q = np.linspace(
            max(0.0, -difference) + 1e-9, (1 - abs(difference)) / 2 + max(0.0, -difference), 200_001
        )
        q = q[(q > 0) & (q + difference > 0) & (2 * q + difference < 1)]
        loss = (
            wins * np.log(q + difference)
            + losses * np.log(q)
            + (n - wins - losses) * np.log(1 - 2 * q - difference)
        )
        best = q[np.argmax(loss)]
        return (wins - losses - n * difference) / math.sqrt(n * (2 * best + difference * (1 - difference)))

    low, high = paired_shares(wins, losses, n)
    assert statistic(low) == pytest.approx(1.96, abs=0.02)
    assert statistic(high) == pytest.approx(-1.96, abs=0.02)


def three(scores):
    return [
        (name, [row(n, scores={m: values[n] for m, values in of.items()}, model=name) for n in range(60)])
        for name, of in scores.items()
    ]


def test_p_is_adjusted_over_models_and_over_the_other_metrics_and_models():
    random = np.random.default_rng(1)
    names = ("base", "b", "c", "d")
    scores = {
        name: {m: (random.random(60) + 0.05 * k).tolist() for m in ("rougeL", "rouge1", "rouge2")}
        for k, name in enumerate(names)
    }
    found = compare_all(three(scores), metrics=["rougeL", "rouge1", "rouge2"], resamples=300)
    assert [(c.model, c.metric) for c in found][:4] == [
        ("b", "rougeL"),
        ("b", "rouge1"),
        ("b", "rouge2"),
        ("c", "rougeL"),
    ]
    assert {c.against for c in found} == {"base"}
    for primary in (True, False):
        family = [c for c in found if c.primary is primary]
        assert len(family) == (3 if primary else 6)
        assert [c.p_value for c in family] == pytest.approx(holm([c.p_alone for c in family]))
    pair = compare_all(three(scores)[:2], metrics=["rougeL", "rouge1"], resamples=300)
    assert pair[0].p_value == pair[0].p_alone == found[0].p_alone, "one challenger: nothing to adjust"
    declared = compare_all(three(scores), metrics=["rougeL", "rouge1"], primary="rouge1", resamples=100)
    assert {c.metric for c in declared if c.primary} == {"rouge1"}
    with pytest.raises(RecipeError, match="primary metric 'rouge2' is not measured"):
        compare_all(three(scores), metrics=["rougeL"], primary="rouge2")
    header, *lines = table_of_many(found)
    assert header[:3] == ["metric", "model", "value"]
    assert [line[1] for line in lines[:4]] == list(names)
    assert lines[0][-1] == "the baseline"


def test_many_models_of_no_difference_rarely_have_a_false_winner():
    random = np.random.default_rng(2)
    false = 0
    for _ in range(60):
        scores = {name: {"rougeL": random.random(60).tolist()} for name in "abcdefg"}
        found = compare_all(three(scores), metrics=["rougeL"], resamples=200)
        false += any(c.verdict in ("better", "worse") for c in found)
    assert false / 60 <= 0.12, "six challengers alone would err in about a quarter"


def test_three_models_on_the_same_rows(tiny_model_folder, question_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copies = [tmp_path / name for name in ("one", "two")]
    for copy in copies:
        shutil.copytree(tiny_model_folder, copy)
    models = [str(tiny_model_folder), *map(str, copies)]
    options = ["--dataset", str(question_file), "--max-new-tokens", "4", "--set", "evaluation.max_items=12"]
    done = CliRunner().invoke(app, ["compare", *models, *options, "--baseline", "two", "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["models"] == ["two", tiny_model_folder.name, "one"]
    assert facts["verdicts"] == {tiny_model_folder.name: "no evidence", "one": "no evidence"}
    assert facts["metric"] is None, "no single comparison stands for all"
    assert {(c["model"], c["against"], c["difference"]) for c in facts["comparisons"]} == {
        (tiny_model_folder.name, "two", 0.0),
        ("one", "two", 0.0),
    }
    said = CliRunner().invoke(app, ["compare", *models, *options], env={"COLUMNS": "200"})
    assert f"one against {tiny_model_folder.name}" in said.stdout
    assert "the baseline" in said.stdout
    assert "smallest difference to be found" in said.stderr
    rows = [json.loads(line) for line in (tmp_path / facts["saved"] / "rows.jsonl").open()]
    assert [r["model"] for r in rows] == [name for name in facts["models"] for _ in range(12)]
    with pytest.raises(TunesmithError, match="baseline three is not among"):
        api.compare(*models, baseline="three", dataset=str(question_file))
    with pytest.raises(TunesmithError, match="named twice"):
        api.compare(*models, models[0], dataset=str(question_file))
