"""Preferences and ratings as token ids: two encodings a pair, what is trained in them, and what stops a pair."""

from __future__ import annotations

import json

import pytest

from tunesmith import data
from tunesmith.data.examples import Message, Preference, Rating, Row
from tunesmith.data.inspection import inspect_rows
from tunesmith.data.preferences import pair_breach, prompt_length, sides
from tunesmith.data.templates import IGNORED, Encoding
from tunesmith.errors import DataError
from tunesmith.recipe import Data

COLORS = ("red", "blue", "green", "one", "two", "three", "yes", "no")


def pairs(count=40, **changes):
    rows = [
        {
            "prompt": f"what is the count of {n}",
            "chosen": f"{COLORS[n % 8]} {n}",
            "rejected": f"no {COLORS[(n + 1) % 8]} rows",
        }
        for n in range(count)
    ]
    for number, row in changes.items():
        rows[int(number[1:])] = row
    return rows


def ratings(count=40):
    return [
        {"prompt": f"what is the count of {n}", "completion": f"{COLORS[n % 8]} {n}", "label": n % 3 > 0}
        for n in range(count)
    ]


@pytest.fixture
def encoded(tmp_path, tiny_tokenizer):
    def run(rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        section = Data(dataset=str(path), max_length=options.pop("max_length", 128), **options)
        splits = data.prepare(section)
        return data.encoded(splits, tiny_tokenizer, data=section, loss_on="answers")

    return run


def test_a_pair_is_two_encodings_of_its_row_chosen_first(encoded, tiny_tokenizer):
    found = encoded(pairs())
    assert len(found.train) % 2 == 0
    assert len(found.train) == 2 * found.ledger.counts()["train"]
    assert found.train.good == [True, False] * (len(found.train) // 2)
    numbers = found.train.rows.tolist()
    assert numbers[::2] == numbers[1::2]
    assert len(set(numbers)) == len(numbers) // 2
    rows = pairs()
    for place in range(0, len(found.train), 2):
        row = rows[numbers[place]]
        for side, answer in zip(found.train[place : place + 2], ("chosen", "rejected"), strict=True):
            labelled = [label for label in side.labels if label != IGNORED]
            assert tiny_tokenizer.decode(labelled) == row[answer] + "<|im_end|>"
            before = side.input_ids[: prompt_length(side)]
            assert tiny_tokenizer.decode(before) == (
                f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
            )
    assert all(isinstance(example, Preference) for example in found.held_out)
    assert {c["name"]: c["rows"] for c in found.proof["checks"]}["different_answers"] == len(
        found.train
    ) // 2 + len(found.validation) // 2


def test_ratings_are_one_encoding_each_with_their_label(encoded):
    rows = ratings()
    found = encoded(rows)
    assert found.train.good == [rows[n]["label"] for n in found.train.rows]
    assert {True, False} == set(found.train.good)
    assert all(isinstance(example, Rating) for example in found.held_out)
    assert not any(check["name"] == "different_answers" for check in found.proof["checks"])


def test_conversations_have_no_mark(encoded):
    found = encoded([{"prompt": f"what is {n}", "response": "red"} for n in range(20)])
    assert set(found.train.good) == {None}
    assert found.train[0].good is None


def test_only_the_judged_answer_is_trained_in_both_conversations():
    example = Preference(
        prompt=(Message("user", "a"), Message("assistant", "b", trained=True), Message("user", "c")),
        chosen=(Message("assistant", "d", trained=False),),
        rejected=(Message("assistant", "e"),),
        row=Row("x", 1),
    )
    [(chosen, yes), (rejected, no)] = sides(example)
    assert (yes, no) == (True, False)
    assert [m.trained for m in chosen.messages] == [None, False, None, None]
    assert chosen.messages[:3] == rejected.messages[:3]


@pytest.mark.parametrize("allowed", ["truncate", "truncate_answers"])
def test_a_side_that_is_cut_away_is_a_breach(encoded, allowed):
    long = {"prompt": "what is the capital of france " * 4, "chosen": "red", "rejected": "blue"}
    rows = pairs(r3=long)
    with pytest.raises(DataError, match="fails the supervision proof") as error:
        encoded(rows, max_length=40, over_long=allowed, held_out=0.0)
    assert "rows.jsonl:4" in error.value.found
    assert "cuts away a whole answer" in error.value.found
    found = encoded(rows, max_length=40, over_long=allowed, on_breach="drop", held_out=0.0)
    assert found.ledger.reasons() == {"max_length 40 cuts away a whole answer": 1}


def test_answers_alike_within_the_length_are_a_breach(encoded):
    rows = pairs(
        r5={"prompt": "what is it", "chosen": "red blue " * 20 + "one", "rejected": "red blue " * 20 + "two"}
    )
    encoded(rows, max_length=256, held_out=0.0)
    with pytest.raises(DataError) as error:
        encoded(rows, max_length=40, held_out=0.0)
    assert "the same tokens within max_length 40: rows.jsonl:6" in error.value.found


def test_answers_that_the_tokenizer_makes_alike_are_a_breach(tmp_path, tiny_tokenizer):
    from copy import deepcopy

    from tokenizers.normalizers import Lowercase

    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    path = tmp_path / "rows.jsonl"
    rows = pairs(r7={"prompt": "what is it", "chosen": "RED", "rejected": "red"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = Data(dataset=str(path), on_breach="drop", held_out=0.0)
    found = data.encoded(data.prepare(section), tokenizer, data=section, loss_on="answers")
    assert found.ledger.reasons() == {"chosen and rejected answer are the same tokens": 1}
    assert found.proof["breaches"] == [
        {"reason": "chosen and rejected answer are the same tokens", "rows": 1, "first": ["rows.jsonl:8"]}
    ]


@pytest.mark.parametrize(
    ("good", "bad", "breach"),
    [
        (([1, 2, 3], [-100, -100, 3]), ([1, 2, 4], [-100, -100, 4]), None),
        (([1, 2, 3], [-100, -100, 3]), ([1, 2, 3], [-100, -100, 3]), "different_answers"),
        (([1, 2, 3], [-100, -100, 3]), ([1, 5, 4], [-100, -100, 4]), "shared_prompt"),
        (([1, 2, 3], [-100, -100, 3]), ([1, 3], [-100, 3]), "shared_prompt"),
        (([1, 2, 9, 3], [-100, 2, 9, 3]), ([1, 2, 9, 4], [-100, 2, 9, 4]), "different_answers"),
    ],
)
def test_what_a_pair_can_fail(good, bad, breach):
    import numpy as np

    sides = [Encoding(np.array(ids), np.array(labels)) for ids, labels in (good, bad)]
    assert pair_breach(*sides, max_length=3) == breach


def test_a_mix_repeats_whole_pairs(tmp_path, tiny_tokenizer):
    for name in ("a", "b"):
        rows = [{**row, "prompt": f"{name} {row['prompt']}"} for row in pairs(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = Data(
        dataset=str(tmp_path / "a.jsonl"),
        weight=5.0,
        mix=[{"dataset": str(tmp_path / "b.jsonl"), "weight": 1.0}],
        num_samples=60,
    )
    found = data.encoded(data.prepare(section), tiny_tokenizer, data=section, loss_on="answers")
    assert len(found.train) == 120
    assert found.train.good == [True, False] * 60
    numbers = found.train.rows.tolist()
    assert numbers[::2] == numbers[1::2]


def test_inspection_shows_both_answers(tmp_path, tiny_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    splits = data.prepare(Data(dataset=str(path)))
    seen = inspect_rows(splits, tiny_tokenizer, max_length=128, loss_on="answers", rows=["3"])
    assert [(s.part, s.trained > 1) for s in seen] == [("chosen answer", True), ("rejected answer", True)]


def test_validate_finds_what_training_would_stop_at(tmp_path, tiny_model_folder):
    from tunesmith import api

    path = tmp_path / "rows.jsonl"
    long = {"prompt": "what is it", "chosen": "red blue " * 20 + "one", "rejected": "red blue " * 20 + "two"}
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs(12, r4=long)))
    settings = {"method": {"kind": "dpo"}, "data": {"max_length": 40}}
    report = api.validate(str(path), settings=settings, model=str(tiny_model_folder))
    [found] = [f for f in report.findings if f.kind == "supervision"]
    assert found.row == 5
    assert "the same tokens within max_length 40" in found.message
