"""A question that several rows ask is one question."""

from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_by_hand import row

from tunesmith.evaluation import scores
from tunesmith.evaluation.compare import compare, sentence
from tunesmith.evaluation.judging.figures import pair_figures, single_figures
from tunesmith.evaluation.judging.judgments import Pair, Question, Single
from tunesmith.evaluation.rows import asked_in


def copied(rows, k, *, regrouped=False):
    """Every row k times; `regrouped` gives each copy a group of its own."""
    most = 1 + max(r.item for r in rows)
    return [
        replace(r, item=r.item + most * n, group=f"copy {n}" if regrouped and r.group else r.group)
        for n in range(k)
        for r in rows
    ]


def side(values, model, groups=None, metric="rougeL"):
    return [
        row(
            n, value, model=model, metric=metric, group=groups and groups[n],
            nll=3.0 + value, tokens=5 + n % 3, correct=n % 4, num_bytes=20,
        )
        for n, value in enumerate(values)
    ]  # fmt: skip


def test_six_questions_asked_six_times_are_no_verdict():
    base, tuned = (
        copied(side([v] * 6, m, metric="exact_match"), 6) for v, m in ((0.0, "base"), (1.0, "tuned"))
    )
    [found] = compare(base, tuned, metrics=["exact_match"])
    assert (found.n, found.groups, found.wins, found.verdict) == (6, 6, 6, "inconclusive")
    assert "6 items are too few" in sentence(found)
    said = "30 of 36 rows are copies, with the prompt and reference of another: each different question counts once."
    assert said in found.remarks
    assert asked_in(base).sentence() == said


GRADES = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@given(
    st.lists(st.tuples(GRADES, GRADES, st.sampled_from(["a", "b", "c", None])), min_size=2, max_size=24),
    st.integers(2, 4),
)
@settings(deadline=None, max_examples=25)
def test_copying_every_row_changes_no_figure(drawn, k):
    metrics = ["rougeL", "perplexity", "token_accuracy", "bits_per_byte"]
    groups = [group for _, _, group in drawn]
    base = side([b for b, _, _ in drawn], "base", groups)
    tuned = side([t for _, t, _ in drawn], "tuned", groups)

    def figures(times):
        sides = copied(base, times), copied(tuned, times)
        found = compare(*sides, metrics=metrics, resamples=200)
        own = scores(sides[0], metrics)
        return [asdict(replace(c, remarks=())) for c in found], own

    (once, alone), (often, alone_often) = figures(1), figures(k)
    for before, after in [*zip(once, often, strict=True), *((alone[m], alone_often[m]) for m in alone)]:
        for name, value in before.items():
            expected = pytest.approx(value, abs=1e-9) if isinstance(value, float) else value
            assert after[name] == expected, name


def test_copies_join_the_groups_that_they_stand_in():
    groups = [f"g{n}" for n in range(12)]
    rows = side([0.0, 1.0] * 6, "base", groups)
    asked = asked_in([*rows, replace(rows[0], item=50, group="g7"), replace(rows[3], item=51, group=None)])
    assert asked.copies == 2
    assert len(set(asked.group.values())) == 11
    assert asked.group[0, 0] == asked.group[7, 0] == asked.group[50, 0]
    assert asked.question[51, 0] == (3, 0)
    assert asked_in(rows).sentence() == ""


def test_what_differs_in_prompt_reference_or_for_one_model_is_no_copy():
    rows = side([0.0, 1.0], "base")
    for change in ({"prompt_sha256": "other"}, {"reference": "other"}, {"turn": 1}):
        assert asked_in([*rows, replace(rows[0], item=5, **change)]).copies == 0
    twice = copied(rows, 2)
    apart = [replace(r, prompt_sha256=f"{r.item}") for r in twice]
    assert (asked_in(twice).copies, asked_in(twice, apart).copies) == (2, 0)


def test_later_turns_are_copies_where_texts_are_whatever_was_answered():
    talk = [row(0, turn=t, prompt_sha256=f"{t}", prompt_text=f"turn {t}", reference="") for t in (0, 1)]
    again = [replace(r, item=1, prompt_sha256=r.prompt_sha256 + "?" * r.turn) for r in talk]
    other = [replace(talk[0], item=2), replace(talk[1], item=2, prompt_text="something else")]
    asked = asked_in([*talk, *again, *other])
    assert len(set(asked.question.values())) == 3
    assert asked.copies == 1
    assert len(set(asked.group.values())) == 1


def test_judgments_of_one_question_are_one_cluster():
    def of(k):
        questions = [Question(n, "", (f"question {n % 6}",)) for n in range(6 * k)]
        grades = [
            Single(
                question=q.id,
                model=m,
                judge="j",
                judgment="",
                turn=1,
                score=float(1 + (int(q.id) % 6) * step),
            )
            for q in questions
            for m, step in (("a", 1), ("b", 0.5))
        ]
        pairs = [
            Pair(question=q.id, model_1="a", model_2="b", judge="j", turn=1,
                 g1_winner="model_1" if int(q.id) % 6 else "model_2", g2_winner="model_1",
                 g1_judgment="", g2_judgment="")
            for q in questions
        ]  # fmt: skip
        single, pair = single_figures(grades, questions=questions), pair_figures(pairs, questions=questions)
        return [single["models"]["a"]["score"], single["differences"][0]["difference"],
                pair["pairs"][0]["win_rate"], pair["pairs"][0]["first_slot"]]  # fmt: skip

    for before, after in zip(of(1), of(5), strict=True):
        assert after["clusters"] == before["clusters"] == 6
        assert (after["low"], after["high"]) == pytest.approx((before["low"], before["high"]))


def test_what_could_be_found_is_told_of_different_questions():
    from types import SimpleNamespace

    from tunesmith.data.examples import Conversation, Message, Row
    from tunesmith.evaluation.measuring import findable
    from tunesmith.recipe import Recipe

    def told(times):
        asked = [
            Conversation((Message("user", f"q{n}"), Message("assistant", "a")), Row("d", n + 30 * k))
            for k in range(times)
            for n in range(30)
        ]
        return findable(SimpleNamespace(recipe=Recipe(), examples=asked))["value"]

    assert told(1) == told(6)
