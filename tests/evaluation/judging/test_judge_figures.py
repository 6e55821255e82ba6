"""Figures of judgment files: FastChat's to the digit, ours where FastChat's hide something."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from tunesmith.cli import app
from tunesmith.errors import DataError
from tunesmith.evaluation.judging import figures, verdicts
from tunesmith.evaluation.judging.judgments import (
    Answers,
    Pair,
    Question,
    Single,
    read_answers,
    read_judgments,
    write_answers,
    write_judgments,
)
from tunesmith.evaluation.judging.questions import read_questions
from tunesmith.evaluation.judging.replay import replay


def pair_row(question, g1, g2, turn=1, **more):
    return {
        "question_id": question, "model_1": "tuned", "model_2": "base", "g1_winner": g1, "g2_winner": g2,
        "judge": ["gpt-4", "pair-v2"], "turn": turn, "tstamp": 1.0, **more,
    }  # fmt: skip


def single_row(question, score, turn=1, model="tuned", **more):
    return {
        "question_id": question, "model": model, "judge": ["gpt-4", "single-v1"], "score": score, "turn": turn,
        "tstamp": 1.0, **more,
    }  # fmt: skip


def saved(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def replayed(path, *options):
    result = CliRunner().invoke(app, ["judge", "--replay", str(path), *options, "--json"])
    return result.exit_code, json.loads(result.stdout.strip().splitlines()[-1])


def test_fastchat_s_published_example_is_reproduced(tmp_path):
    """106 wins, 8 losses, 44 ties of 158; two of 160 rows have an error game and drop out."""
    games = (
        [("model_1", "model_1")] * 106 + [("model_2", "model_2")] * 8 + [("tie", "tie")] * 20
        + [("model_1", "model_2")] * 12 + [("tie", "model_1")] * 6 + [("model_1", "tie")] * 6
        + [("error", "model_1"), ("model_2", "error")]
    )  # fmt: skip
    rows = [pair_row(81 + n // 2, *game, turn=1 + n % 2) for n, game in enumerate(games)]
    code, found = replayed(saved(tmp_path / "pair.jsonl", rows))
    assert code == 0
    tuned, base = found["fastchat"]["tuned"], found["fastchat"]["base"]
    assert (tuned["win"], tuned["loss"], tuned["tie"], tuned["n"]) == (106, 8, 44, 158)
    assert round(tuned["win_rate_adjusted"], 6) == 0.810127
    assert round(base["win_rate_adjusted"], 6) == 0.189873
    assert (tuned["win_rate"], tuned["loss_rate"]) == (106 / 158, 8 / 158)
    assert list(found["fastchat"]) == ["tuned", "base"]  # sorted by it
    code, found = replayed(tmp_path / "pair.jsonl", "--baseline", "base")
    assert list(found["fastchat"]) == ["tuned"]
    [ours] = found["ours"]["pairs"]
    # A win in one game and a tie in the other is worth .75 to us: 12 items more than half won.
    assert (ours["wins"], ours["ties"], ours["losses"], ours["errors"]) == (118, 32, 8, 2)
    assert ours["item_scores"] == {"1.0": 106, "0.75": 12, "0.5": 32, "0.25": 0, "0.0": 8}
    mean = (106 + 12 * 0.75 + 32 * 0.5) / 158
    assert ours["win_rate"]["value"] == pytest.approx(mean, abs=1e-12)
    assert ours["error_rate"] == 2 / 160
    assert ours["bounds"] == pytest.approx([(158 * mean + 0.5) / 160, (158 * mean + 1.5) / 160])
    assert ours["win_rate"]["clusters"] == 79  # the errors are both turns of one question


def test_single_scores_are_fastchat_s_means_and_errors_are_told(tmp_path):
    rows = [
        single_row(81, 8, 1), single_row(81, 6, 2), single_row(82, 9, 1), single_row(82, -1, 2),
        single_row(83, 4, 1),  # its second turn is missing
        single_row(81, 5, 1, model="base"), single_row(81, 5.5, 2, model="base"),
        single_row(82, 3, 1, model="base"), single_row(82, 3, 2, model="base"),
        single_row(83, 3, 1, model="base"), single_row(83, 3, 2, model="base"),
    ]  # fmt: skip
    code, found = replayed(saved(tmp_path / "single.jsonl", rows))
    assert code == 0
    assert found["fastchat"]["tuned"] == {"turn_1": 7.0, "turn_2": 6.0, "average": 27 / 4}
    assert found["fastchat"]["base"]["average"] == 22.5 / 6
    ours = found["ours"]["models"]["tuned"]
    assert (ours["errors"], ours["error_rate"], ours["missing_turns"]) == (1, 0.2, 1)
    assert ours["bounds"] == [28 / 5, 37 / 5]
    assert not ours["is_conclusive"]
    [against] = found["ours"]["differences"]
    assert (against["model"], against["against"], against["difference"]["n"]) == ("tuned", "base", 4)
    assert against["difference"]["value"] == pytest.approx((3 + 0.5 + 6 + 1) / 4)
    assert (against["wins"], against["ties"], against["losses"]) == (4, 0, 0)
    assert ours["categories"]["writing"]["n"] == 4  # 81 to 90 are FastChat's writing questions


TRAPS = [
    ("Rating: [[7]]", 7.0),
    ("As source [1] says, well done.", None),
    ("Rating: [7]", None),
    ("It claims [[10]].\n\nThat is wrong.\n\nRating: [[2]]", 2.0),
    ("Rating: [[0]]", None), ("Rating: [[11]]", None), ("Rating: [[-3]]", None), ("Rating: [[7.5]]", 7.5),
    ("Rating: [[9]]\na\nb\nc", None), ("", None), ("<think>Rating: [[9]]</think>\nRating: [[3]]", 3.0),
    ("<think>Rating: [[9]]", None), ("$ERROR$", None),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "score"), TRAPS)
def test_grades_are_read_strictly(reply, score):
    assert verdicts.rating(reply) == score


@pytest.mark.parametrize(
    ("reply", "slot"),
    [
        ("Verdict: [[A]]", "A"), ("Verdict: [[C]]", "tie"), ("[[b]]", "B"),
        ('A wrote "[[A]]" to win.\nNo.\nThat is cheating.\nVerdict: [[B]]', "B"),
        ("Either [[A]] or\n[[B]]", "B"), ("[[A]]\n1\n2\n3", None), ("[A]", None), ("A is better", None),
        ("[[D]]", None),
    ],
)  # fmt: skip
def test_verdicts_are_read_strictly(reply, slot):
    assert verdicts.verdict(reply) == slot


def test_replies_are_read_again_and_the_difference_is_told(tmp_path):
    """FastChat's reader takes `[1]` for a grade and the first of two quoted verdicts."""
    rows = [single_row(81, 1, judgment="See [1]. It is good."), single_row(82, 8, judgment="Rating: [[8]]")]
    found = replay(saved(tmp_path / "single.jsonl", rows))
    assert found["fastchat"]["tuned"]["average"] == 4.5
    assert found["reread_differently"] == 1
    assert found["ours"]["models"]["tuned"]["score"]["value"] == 8.0
    quoted = "It says [[A]], but:\n\n\nVerdict: [[B]]"
    rows = [pair_row(81, "model_1", "model_2", g1_judgment=quoted, g2_judgment="Verdict: [[B]]")]
    found = replay(saved(tmp_path / "pair.jsonl", rows))
    assert found["reread_differently"] == 1
    [ours] = found["ours"]["pairs"]
    assert (ours["ties"], ours["flip_rate"]["value"]) == (1, 1.0)  # B both times: model 2, then model 1


def test_flip_rate_and_slot_bias_by_hand():
    """Of three items with two verdicts each, one always goes to slot A; a tie has no slot."""
    judgments = [
        Pair(1, "m", "b", 1, "model_1", "model_2", "", "", "j"),  # A, A
        Pair(2, "m", "b", 1, "model_1", "model_1", "", "", "j"),  # A, B
        Pair(3, "m", "b", 1, "tie", "model_1", "", "", "j"),  # -, B
    ]
    [found] = figures.pair_figures(judgments)["pairs"]
    assert found["flip_rate"]["value"] == pytest.approx(1 / 3)
    assert found["first_slot"]["value"] == pytest.approx(3 / 5)
    assert found["consistency"] == pytest.approx(1 / 3)


def test_figures_hold_no_judgment_against_another(monkeypatch):
    """Their time grows with the judgments, not with the square: arenas have tens of thousands."""

    def refuse(one, other):
        raise AssertionError("compared")

    monkeypatch.setattr(Pair, "__eq__", refuse)
    monkeypatch.setattr(Single, "__eq__", refuse)
    games = [("model_1", "model_2"), ("model_1", "model_1"), ("tie", "model_2"), ("error", "tie")]
    pairs = [Pair(n, "m", "b", 1, *games[n % 4], "", "", "j") for n in range(400)]
    [found] = figures.pair_figures(pairs)["pairs"]
    assert found["flip_rate"]["value"] == pytest.approx(1 / 3)
    singles = [Single(n, m, 1, 5.0, "", "j") for n in range(100) for m in "ab"]
    assert len(figures.single_figures(singles)["models"]) == 2


@pytest.mark.parametrize("kind", ["single", "pair"])
def test_all_of_fastchat_s_questions_are_taken(tmp_path, kind):
    """Numbers 81 to 160, both turns, in its eight categories of ten; what is printed for people holds its figures."""
    ids = [(id, turn) for id in range(81, 161) for turn in (1, 2)]
    rows = [
        single_row(id, id % 10 + 1, turn) if kind == "single" else pair_row(id, "model_1", "model_1", turn)
        for id, turn in ids
    ]
    path = saved(tmp_path / "j.jsonl", rows)
    code, found = replayed(path)
    assert code == 0
    ours = found["ours"]["models"]["tuned"] if kind == "single" else found["ours"]["pairs"][0]
    assert ours["n"] == 160
    assert {name: e["n"] for name, e in ours["categories"].items()} == dict.fromkeys(
        ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"], 20
    )
    said = " ".join(CliRunner().invoke(app, ["judge", "--replay", str(path)]).stdout.split())
    if kind == "single":
        assert (
            "FastChat prints tuned: turn 1 5.500000, turn 2 5.500000, average 5.500000 (grades of 1 to 10"
            in said
        )
    else:
        assert "FastChat prints tuned: 160 wins, 0 losses, 0 ties of 160" in said
        assert "adjusted win rate 1.000000" in said


def test_where_nothing_was_judged_that_is_said(tmp_path):
    rows = [single_row(81, -1, turn) for turn in (1, 2)]
    said = CliRunner().invoke(app, ["judge", "--replay", str(saved(tmp_path / "s.jsonl", rows))]).stdout
    said = " ".join(said.split())
    assert "tuned: not graded, as none of 2 judgments has a verdict" in said
    assert "of 10" not in said
    assert "turn 1 -, turn 2 -, average -" in said
    rows = [pair_row(81, "error", "tie"), pair_row(82, "error", "error")]
    said = CliRunner().invoke(app, ["judge", "--replay", str(saved(tmp_path / "p.jsonl", rows))]).stdout
    said = " ".join(said.split())
    assert "tuned against base: not compared, as none of 2 judgments has a verdict" in said
    assert "flips" not in said
    assert "FastChat prints nothing: every row has an error" in said


def test_changing_sides_mirrors_every_figure(tmp_path):
    rng = np.random.default_rng(5)
    games = rng.choice(["model_1", "model_2", "tie", "error"], size=(60, 2), p=[0.5, 0.2, 0.2, 0.1])
    judgments = [
        Pair(n // 2, "m", "b", 1 + n % 2, *game, "", "", "j") for n, game in enumerate(games.tolist())
    ]
    [one] = figures.pair_figures(judgments, baseline="b")["pairs"]
    [other] = figures.pair_figures(judgments, baseline="m")["pairs"]
    assert (one["model"], other["model"]) == ("m", "b")
    assert (one["wins"], one["ties"], one["losses"]) == (other["losses"], other["ties"], other["wins"])
    for a, b in (("low", "high"), ("value", "value"), ("high", "low")):
        assert one["win_rate"][a] == pytest.approx(1 - other["win_rate"][b])
    assert one["first_slot"] == other["first_slot"]
    assert one["flip_rate"] == other["flip_rate"]
    assert one["bounds"] == pytest.approx([1 - bound for bound in reversed(other["bounds"])])


def test_the_clustered_interval_is_scipy_s_where_nobody_shares_a_cluster():
    values = list(np.random.default_rng(1).uniform(1, 10, 40))
    found = figures.clustered_mean(values, range(40), bounds=(1, 10))
    expected = stats.t.interval(0.95, 39, loc=np.mean(values), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    # Each value twice in its cluster says nothing new; as 80 values on their own they would seem to.
    twice = figures.clustered_mean(values * 2, [*range(40), *range(40)], bounds=(1, 10))
    assert (twice.low, twice.high) == pytest.approx(expected)
    apart = figures.clustered_mean(values * 2, range(80), bounds=(1, 10))
    assert apart.high - apart.low < 0.8 * (found.high - found.low)


def test_where_all_agree_the_interval_is_wilson_s():
    found = figures.clustered_mean([1.0] * 20, range(20), bounds=(0, 1))
    expected = stats.binomtest(20, 20).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert figures.clustered_mean([], [], bounds=(0, 1)).value is None
    one = figures.clustered_mean([5.5], [1], bounds=(1, 10))
    assert one.low < 3
    assert one.high > 8


def test_judgments_and_answers_survive_their_files(tmp_path):
    pairs = [
        Pair(
            1,
            "m",
            "b",
            2,
            "tie",
            "error",
            "x\u2028y",
            "",
            "j",
            "pair",
            ("", "HTTP 500"),
            ("role token",),
            "v",
        )
    ]
    assert read_judgments(write_judgments(tmp_path / "p.jsonl", pairs)) == pairs
    singles = [
        Single("q", "m", 1, None, "?", "j", "single", "no rating"),
        Single("q", "m", 2, 7.0, "[[7]]", "j"),
    ]
    path = write_judgments(tmp_path / "s.jsonl", singles)
    assert read_judgments(path) == singles
    assert json.loads(path.read_text().splitlines()[0])["score"] == -1
    answers = Answers("m", {81: ("a", "b\n"), "x": ("c",)})
    assert read_answers(write_answers(tmp_path / "a.jsonl", answers)) == answers


def test_a_question_answered_twice_and_references_of_any_judge(tmp_path):
    rows = [
        {"question_id": 81, "model_id": "m", "choices": [{"index": 0, "turns": [text, "ERROR"]}]}
        for text in ("old", "new")
    ]
    answers = read_answers(saved(tmp_path / "m.jsonl", rows))
    assert answers.turns == {81: ("new", "ERROR")}
    assert answers.up_to(81, 1) == ("new",)
    assert answers.up_to(81, 2) is None  # FastChat's mark of a failure is nobody's answer
    questions = saved(tmp_path / "q.jsonl", [{"question_id": 81, "category": "math", "turns": ["1?", "2?"]}])
    [question] = read_questions(questions, tmp_path / "m.jsonl")
    assert question == Question(81, "math", ("1?", "2?"), ("new", "ERROR"))
    assert question.reference(3) == ""  # a reference of fewer turns breaks nothing


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "x.jsonl, line 1, column 2"), ('{"a": 1}', "found: the keys a"), ("", "no rows"),
        (json.dumps(single_row(1, 5)) + "\n" + json.dumps(pair_row(1, "tie", "tie")), "grades and comparisons"),
        (json.dumps(pair_row(1, "A", "tie")), "winners among"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_says_where(tmp_path, text, said):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        read_judgments(path)
    assert replayed(path)[0] == 1


def test_an_unknown_baseline_names_the_nearest(tmp_path):
    path = saved(tmp_path / "pair.jsonl", [pair_row(1, "tie", "tie")])
    code, found = replayed(path, "--baseline", "bsae")
    assert code == 1
    assert "'base'" in found["fix"]


def test_judgments_made_again_count_once(tmp_path):
    rows = [single_row(81, 2), single_row(81, 8)]
    found = replay(saved(tmp_path / "s.jsonl", rows))
    assert found["fastchat"]["tuned"]["average"] == 5.0  # as FastChat counts
    assert found["ours"]["models"]["tuned"]["score"]["value"] == 8.0
    assert found["ours"]["repeated"] == 1
    assert not math.isnan(found["ours"]["models"]["tuned"]["score"]["low"])


def test_the_difference_of_grades_is_scipy_s_paired_one(tmp_path):
    rng = np.random.default_rng(7)
    scores = rng.integers(1, 11, size=(30, 2)).astype(float)
    judgments = [
        Single(n, name, 1, score, "", "j") for n, two in enumerate(scores) for name, score in zip("ab", two)
    ]
    [found] = figures.single_figures(judgments)["differences"]
    test = stats.ttest_rel(scores[:, 0], scores[:, 1]).confidence_interval()
    assert (found["difference"]["low"], found["difference"]["high"]) == pytest.approx((test.low, test.high))


def test_how_often_the_longer_answer_wins_by_hand():
    outcomes = [
        ("model_1", "model_1"),
        ("model_2", "model_2"),
        ("tie", "tie"),
        ("model_1", "model_1"),
        ("error", "tie"),
    ]
    judgments = [Pair(n, "m", "b", 1, *games, "", "", "j") for n, games in enumerate(outcomes)]
    texts = {("m", n, 1): "xx" for n in range(5)} | {("b", n, 1): "x" for n in range(5)} | {("b", 3, 1): "xx"}
    [found] = figures.length_figures(judgments, texts)
    assert found["characters"] == [2.0, 1.2]
    assert (found["longer_won"]["value"], found["longer_won"]["n"]) == (
        0.5,
        2,
    )  # a tie and equal lengths say nothing


@pytest.mark.parametrize(
    ("ids", "categories", "whose"),
    [
        ((85, 131, 160), ["writing", "extraction", "humanities"], "FastChat's questions 81 to 160"),
        ((1001, 1021), ["writing", "reasoning"], "the questions that ship"), ((85, 1001), [], None), ((5,), [], None),
    ],
)  # fmt: skip
def test_categories_are_known_by_number_where_a_file_has_none(tmp_path, ids, categories, whose):
    code, found = replayed(saved(tmp_path / "single.jsonl", [single_row(id, 5) for id in ids]))
    assert code == 0
    assert (list(found["ours"]["models"]["tuned"]["categories"]), found["categories_of"]) == (
        categories,
        whose,
    )
