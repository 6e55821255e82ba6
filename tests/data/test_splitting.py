"""The split depends on content alone; copies and groups stay whole; small sets are handled."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.examples import Row, Text
from tunesmith.data.sources import Record
from tunesmith.data.splitting import FATES, assign, key


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
