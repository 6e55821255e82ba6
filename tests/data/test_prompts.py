"""Prompts of every layout: their tokens are those of inference, their references stay beside them, none is cut."""

from __future__ import annotations

import json

import pytest
from families import families, tokenizer_of

from tunesmith import data, evaluation
from tunesmith.data import prompts, templates
from tunesmith.data.examples import Conversation, Message, Prompt, Row, as_json, from_json, questions
from tunesmith.data.splitting import HELD_OUT, TRAIN
from tunesmith.data.templates import IGNORED
from tunesmith.errors import DataError
from tunesmith.methods import sft
from tunesmith.recipe import Data


def written(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepared(folder, rows, tokenizer, *, room=8, **options):
    section = Data(dataset=written(folder, rows), cache=False, **options)
    splits = data.prepare(section, prompts.questioned, prompts.REMARKS)
    return splits, prompts.encoded(splits, tokenizer, data=section, room=room)


CHAT = [{"role": "user", "content": "what is red"}, {"role": "assistant", "content": "one"}]
LAYOUTS = {
    "conversation": (lambda n: {"messages": [*CHAT, {"role": "user", "content": f"and {n}"},
                     {"role": "assistant", "content": f"blue {n}"}]}, 3, "blue {}"),
    "question": (lambda n: {"prompt": f"what is {n}", "response": f"blue {n}"}, 1, "blue {}"),
    "preference": (lambda n: {"prompt": f"what is {n}", "chosen": f"good {n}", "rejected": "no"}, 1, "good {}"),
    "rated good": (lambda n: {"prompt": f"what is {n}", "completion": f"good {n}", "label": True}, 1, "good {}"),
    "rated bad": (lambda n: {"prompt": f"what is {n}", "completion": f"bad {n}", "label": False}, 1, ""),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_prompts_with_their_references(tmp_path, tiny_tokenizer, layout):
    make, turns, reference = LAYOUTS[layout]
    splits, found = prepared(tmp_path, [make(n) for n in range(40)], tiny_tokenizer)
    assert len(found.train) == len(found.train.examples) == splits.count(TRAIN)
    assert len(found.validation) == len(found.validation.examples)
    for part in (found.train, found.validation):
        for encoding, prompt, row in zip(part, part.examples, part.rows, strict=True):
            assert isinstance(prompt, Prompt)
            assert len(prompt.messages) == turns
            number = prompt.row.number - 1
            assert row == number
            assert prompt.reference == reference.format(number)
            assert list(encoding.input_ids) == templates.prompt_ids(prompt.messages, tiny_tokenizer)
            assert set(encoding.labels) == {IGNORED}
    assert len(found.held_out) == splits.count(HELD_OUT)


def test_prompts_alone_are_a_format_that_has_to_be_named(tmp_path, tiny_tokenizer):
    rows = [{"prompt": f"name {n}", "max_words": 3} for n in range(30)]
    rows += [
        {"prompt": [{"role": "user", "content": f"chat {n}"}], "reference": f"red {n}"} for n in range(10)
    ]
    with pytest.raises(DataError, match="--format prompt"):
        prepared(tmp_path, rows, tiny_tokenizer)
    _, found = prepared(tmp_path, rows, tiny_tokenizer, format="prompt")
    by_number = {p.row.number: p for p in found.train.examples}
    assert {p.reference for number, p in by_number.items() if number <= 30} == {""}
    assert all(p.reference == f"red {number - 31}" for number, p in by_number.items() if number > 30)
    assert all(p.checks["max_words"] == 3 for number, p in by_number.items() if number <= 30)
    assert any("without a reference" in note for note in found.notes)
    with pytest.raises(DataError, match="without an answer to imitate"):
        data.prepare(Data(dataset=written(tmp_path, rows[:30]), format="prompt", cache=False), sft.imitated)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([{"role": "assistant", "content": "a"}], "no turn of the user"),
        (CHAT, "the last turn is the assistant's"),
        ("  ", "empty prompt"),
    ],
)
def test_prompts_that_ask_nothing_are_dropped_with_the_reason(tmp_path, tiny_tokenizer, prompt, reason):
    rows = [{"prompt": prompt}, *({"prompt": f"what is {n}"} for n in range(20))]
    splits, _ = prepared(tmp_path, rows, tiny_tokenizer, format="prompt")
    assert reason in splits.reasons[0]


def test_an_example_that_is_stored_comes_back(tmp_path):
    turns = (Message("user", "q", name="x"), Message("assistant", "", tool_calls=({"id": "1"},)))
    prompt = Prompt(turns, "r", Row("f", 3), "g", {"max_words": 2}, ({"type": "function"},))
    assert from_json(as_json(prompt)) == prompt


def test_a_prompt_asks_what_its_conversation_asks():
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    talk = Conversation(turns, Row("x", 1), tools=({"name": "t"},))
    prompt = prompts.prompt_of(talk)
    assert prompt.reference == "d"
    assert questions(prompt) == questions(talk)


def test_rows_have_the_split_that_they_have_in_supervised_fine_tuning(tmp_path):
    rows = [{"prompt": f"what is {n}", "response": f"blue {n}"} for n in range(60)]
    section = Data(dataset=written(tmp_path, rows), cache=False)
    fates = [data.prepare(section, adapt).fates.tolist() for adapt in (prompts.questioned, sft.imitated)]
    assert fates[0] == fates[1]


def test_a_prompt_without_room_is_dropped_and_none_is_cut(tmp_path, tiny_tokenizer):
    rows = [
        {"prompt": "red " * (40 if n % 4 == 0 else 2) + str(n), "response": "one " * 90} for n in range(60)
    ]
    _, found = prepared(tmp_path, rows, tiny_tokenizer, room=20, max_length=64, near_duplicates="ignore")
    [(reason, count)] = found.ledger.reasons().items()
    assert "leaves no room for an answer of 20 tokens" in reason
    assert 0 < count <= 15
    assert max(found.train.lengths) + 20 <= 64
    assert not any(entry.tokens_cut for entry in found.ledger.entries)
    with pytest.raises(DataError, match="leave no room"):
        prepared(tmp_path, rows, tiny_tokenizer, room=20, max_length=64, over_long="error")
    with pytest.raises(DataError, match="No training example is left"):
        prepared(tmp_path, rows, tiny_tokenizer, room=64, max_length=64)


def test_repeated_rows_have_their_prompts_as_often(tmp_path, tiny_tokenizer):
    few = written(tmp_path, [{"prompt": f"few {n}", "response": "a"} for n in range(20)], "few.jsonl")
    many = written(tmp_path, [{"prompt": f"many {n}", "response": "a"} for n in range(80)], "many.jsonl")
    section = Data(
        dataset=few, weight=1.0, num_samples=120, mix=[{"dataset": many, "weight": 1.0}], cache=False
    )
    splits = data.prepare(section, prompts.questioned)
    found = prompts.encoded(splits, tiny_tokenizer, data=section, room=8)
    assert splits.copies.max() > 1
    assert len(found.train) == len(found.train.examples)
    for encoding, prompt in zip(found.train, found.train.examples, strict=True):
        assert list(encoding.input_ids) == templates.prompt_ids(prompt.messages, tiny_tokenizer)


def test_the_fingerprint_knows_references(tmp_path, tiny_tokenizer):
    marks = []
    for answer in ("a", "a", "b"):
        rows = [{"prompt": f"what is {n}", "response": answer} for n in range(30)]
        marks.append(prepared(tmp_path, rows, tiny_tokenizer)[1].fingerprint)
    assert marks[0] == marks[1] != marks[2]


TAKES_PARTS_ONLY = ("idefics3", "smolvlm", "llava_next")


@pytest.mark.parametrize(
    "family", [f for f in families() if f.name not in TAKES_PARTS_ONLY], ids=lambda family: family.name
)
def test_prompts_of_every_family_pass_their_proof(tmp_path, family):
    tokenizer = tokenizer_of(family)
    rows = [{"prompt": f"what is {n} </s> <|im_end|>", "response": f"blue {n}"} for n in range(24)]
    _, found = prepared(tmp_path, rows, tokenizer, max_length=4096)
    [compared, room] = found.proof["checks"]
    assert compared["rows"] == room["rows"] == len(found.train) + len(found.validation)
    assert not found.proof["breaches"]
    for encoding, prompt in zip(found.train, found.train.examples, strict=True):
        assert list(encoding.input_ids) == templates.prompt_ids(prompt.messages, tokenizer)


def test_prompts_with_other_tokens_than_in_training_are_found(tmp_path, tiny_tokenizer, monkeypatch):
    rows = [{"prompt": f"what is {n}", "response": "blue"} for n in range(30)]
    honest = prompts.asked
    monkeypatch.setattr(prompts, "asked", lambda *given: [*honest(*given), 7])
    with pytest.raises(DataError, match="not those before the answer in training"):
        prepared(tmp_path, rows, tiny_tokenizer)
    with pytest.raises(DataError, match="No training example is left"):
        prepared(tmp_path, rows, tiny_tokenizer, on_breach="drop")


def test_held_out_prompts_are_measured_with_and_without_a_reference(tmp_path, tiny_tokenizer):
    rows = [{"prompt": f"what is {n}", "max_words": 2} for n in range(30)]
    rows += [{"prompt": f"name {n}", "reference": "red"} for n in range(30)]
    _, found = prepared(tmp_path, rows, tiny_tokenizer, format="prompt", held_out=0.4)
    items = evaluation.items(found.held_out, tiny_tokenizer)
    for item in items:
        assert item.error is None
        assert list(item.prompt_ids) == templates.prompt_ids(item.prompt.messages, tiny_tokenizer)
        assert bool(item.input_ids) == bool(item.prompt.reference)
    assert {bool(item.input_ids) for item in items} == {True, False}
