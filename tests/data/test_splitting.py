"""The split depends on content alone; copies and groups stay whole; small sets are handled."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data import prepare
from tunesmith.data.examples import Conversation, Message, Row, Text
from tunesmith.data.sources import Record
from tunesmith.data.splitting import (
    CLUSTER,
    DROPPED,
    FATES,
    HELD_OUT,
    HUB,
    TRAIN,
    VALIDATION,
    Links,
    assign,
    key,
    rooted,
)
from tunesmith.recipe import Data


def split(pairs, *, validation, held_out):
    """The examples by fate, and the notes."""
    keys = np.array([key(example) for _, example in pairs], dtype=np.uint64)
    roles = [FATES.index(record.role) if record.role else -1 for record, _ in pairs]
    fates, notes = assign(keys, roles, validation=validation, held_out=held_out)
    parts = {
        name: tuple(e for (_, e), fate in zip(pairs, fates, strict=True) if FATES[fate] == name)
        for name in FATES[:3]
    }
    assert sum(map(len, parts.values())) == len(pairs)
    return SimpleNamespace(**parts, notes=notes)


def pairs(texts, *, groups=None, roles=None):
    made = []
    for number, text in enumerate(texts):
        row = Row("x", number)
        group = groups[number] if groups else None
        made.append((Record(row, {}, roles[number] if roles else None), Text(text, row, group=group)))
    return made


def texts_of(part):
    return sorted(example.text for example in part)


def parts(splits):
    return {name: texts_of(getattr(splits, name)) for name in ("train", "validation", "held_out")}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=4), min_size=1, max_size=40), st.randoms())
def test_order_does_not_matter_copies_stay_together_and_every_row_has_a_fate(texts, rng):
    made = split(pairs(texts), validation=0.1, held_out=0.1)
    found = parts(made)
    assert not set(found["train"]) & set(found["held_out"])
    assert not set(found["train"]) & set(found["validation"])
    assert not set(found["held_out"]) & set(found["validation"])
    shuffled = list(texts)
    rng.shuffle(shuffled)
    assert parts(split(pairs(shuffled), validation=0.1, held_out=0.1)) == found


@pytest.mark.parametrize("count", range(1, 13))
def test_small_sets(count):
    made = split(pairs([f"text {i}" for i in range(count)]), validation=0.1, held_out=0.1)
    if count < 3:
        assert len(made.train) == count
        assert any("too few" in note for note in made.notes)
    else:
        assert all(len(getattr(made, name)) >= 1 for name in ("train", "validation", "held_out"))


def test_five_rows_are_three_one_and_one():
    made = split(pairs([f"text {i}" for i in range(5)]), validation=0.1, held_out=0.1)
    assert [len(p) for p in (made.train, made.validation, made.held_out)] == [3, 1, 1]


def test_shares_are_met_and_adding_rows_moves_none():
    first = [f"text {i}" for i in range(2000)]
    before = parts(split(pairs(first), validation=0.1, held_out=0.2))
    assert 340 < len(before["held_out"]) < 460
    assert 150 < len(before["validation"]) < 250
    after = parts(split(pairs([*first, *(f"more {i}" for i in range(500))]), validation=0.1, held_out=0.2))
    assert all(set(before[name]) <= set(after[name]) for name in before)


def test_groups_stay_whole():
    rng = random.Random(0)
    groups = [f"database {rng.randrange(30)}" for _ in range(300)]
    made = split(pairs([f"text {i}" for i in range(300)], groups=groups), validation=0.2, held_out=0.2)
    found = [{example.group for example in part} for part in (made.train, made.validation, made.held_out)]
    assert all(found)
    assert not found[0] & found[1]
    assert not found[0] & found[2]
    assert not found[1] & found[2]


def test_the_source_s_own_roles_are_kept_and_missing_ones_carved_from_training():
    roles = ["train"] * 40 + ["held_out"] * 5
    made = split(pairs([f"text {i}" for i in range(45)], roles=roles), validation=0.2, held_out=0.2)
    assert texts_of(made.held_out) == sorted(f"text {i}" for i in range(40, 45))
    assert made.validation
    assert any("own splits" in note and "validation" in note for note in made.notes)


def test_training_rows_that_stand_in_the_held_out_split_are_counted():
    texts = [*(f"text {i}" for i in range(10)), "text 3"]
    made = split(pairs(texts, roles=["train"] * 10 + ["held_out"]), validation=0.0, held_out=0.0)
    assert any(note.startswith("1 training rows also stand") for note in made.notes)


def test_nothing_is_held_out_when_nothing_is_wanted():
    made = split(pairs([f"text {i}" for i in range(9)]), validation=0.0, held_out=0.0)
    assert (len(made.train), made.validation, made.held_out) == (9, (), ())


def test_rows_that_ask_the_same_share_a_split_whatever_they_answer():
    from tunesmith.data.examples import Conversation, Message, Preference, Rating

    made = []
    for number in range(300):
        row = Row("x", number)
        asked = Message("user", f"question {number % 60}")
        answer, other = Message("assistant", f"answer {number}"), Message("assistant", "no")
        example = (
            Conversation((asked, answer), row),
            Preference((asked,), (answer,), (other,), row),
            Rating((asked,), (answer,), True, row),
        )[number % 3]
        made.append((Record(row, {}), example))
    splits = split(made, validation=0.2, held_out=0.2)
    asked_in = [
        {(e.messages if isinstance(e, Conversation) else e.prompt)[0].content for e in part}
        for part in (splits.train, splits.validation, splits.held_out)
    ]
    assert all(asked_in)
    assert not asked_in[0] & asked_in[2]
    assert not asked_in[0] & asked_in[1]


def chat(*contents, group=None):
    turns = [Message("assistant" if n % 2 else "user", text) for n, text in enumerate(contents)]
    return Conversation(tuple(turns), Row("x", 1), group=group)


def linked(*examples):
    """The row whose split each example shares."""
    links = Links()
    for row, example in enumerate(examples):
        links.add(row, example)
    return rooted(len(examples), links.edges(), np.empty((0, 2), dtype=np.int64))[0].tolist()


def test_a_question_on_the_way_ties_rows_together_as_the_last_one_does():
    assert linked(chat("a", "b"), chat("c", "d"), chat("a", "b", "e", "f")) == [0, 1, 0]
    assert linked(chat("a", "b", "e", "f"), chat(" a\n", "other")) == [0, 0]
    assert linked(chat("a", "b"), chat("b", "a")) == [0, 1]


def test_a_greeting_that_many_share_ties_only_the_first_together():
    rows = [chat("hi", "hello", f"question {n}", "answer") for n in range(40)]
    found = linked(*rows)
    assert found[:HUB] == [0] * HUB
    assert found[HUB:] == list(range(HUB, 40))
    # Where it is what is measured, it does tie, however many.
    assert linked(*rows, chat("hi", "hello"))[-1] == 0


def test_groups_and_questions_both_tie():
    assert linked(chat("a", "b", group="g"), chat("c", "d", group="g"), chat("a", "x", group="h")) == [
        0,
        0,
        0,
    ]


def test_near_duplicates_tie_until_the_cluster_is_too_large():
    none = np.empty((0, 2), dtype=np.int64)
    alike = np.array([[row, row - 1] for row in range(1, 100)])
    root, released = rooted(100, none, alike)
    assert np.bincount(root).max() == CLUSTER
    assert released.sum() == 100 - CLUSTER
    # Rows behind change nothing, and another cluster is as it would be alone.
    longer = np.concatenate((alike, [[101, 100]]))
    again, _ = rooted(102, none, longer)
    assert (again[:100] == root).all()
    assert again[101] == 100


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3), st.sampled_from([None, "g", "h"])
        ),
        min_size=1,
        max_size=50,
    ),
    st.integers(1, 40),
)
def test_no_measured_question_is_trained_and_later_rows_move_none(tmp_path_factory, made, fewer):
    """Brute force over a file of small conversations and groups."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    data = Data(
        dataset=str(path),
        validation=0.2,
        held_out=0.3,
        near_duplicates="ignore",
        cache=False,
        group_by="group",
    )

    def split(rows):
        lines = [
            {
                "messages": [
                    {"role": role, "content": text}
                    for question in questions
                    for role, text in (("user", question), ("assistant", "x"))
                ],
                "group": group,
            }
            for questions, group in (*rows, (["z"], "z"))
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return prepare(data)

    splits = split(made)
    found = splits.fates.tolist()[:-1]
    rows = list(zip(made, found, strict=True))
    trained = {tuple(said[:n]) for (said, _), fate in rows if fate == TRAIN for n in range(1, 4)}
    groups = {group for (_, group), fate in rows if fate == TRAIN and group}
    for (questions, group), fate in rows:
        if fate in (VALIDATION, HELD_OUT):
            assert tuple(questions) not in trained
            assert group not in groups
    before = split(made[:fewer])
    if not any("evened out" in note or "too few" in note for note in (*splits.notes, *before.notes)):
        pairs = zip(before.fates.tolist()[:-1], found, strict=False)
        assert all(a == b or DROPPED in (a, b) for a, b in pairs)
