"""Each check of the supervision proof finds its own kind of damage, and sound rows of every family pass all."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from families import families, tokenizer_of

from tunesmith import data
from tunesmith.data.examples import Conversation, Message, Row, Text
from tunesmith.data.supervision import CHECKS, Proof
from tunesmith.data.templates import IGNORED, Encoding, encode_all, encoder, end_of_turn_ids, views
from tunesmith.errors import DataError
from tunesmith.recipe import Data

ROW = Row("x", 7)
TALK = Conversation(
    tuple(
        Message("assistant" if n % 2 else "user", text)
        for n, text in enumerate(["what is", "red", "and", "blue"])
    ),
    ROW,
)


def proof(tokenizer, *, loss_on="answers", max_length=1000, may_cut_answers=False):
    return Proof(
        encoder(tokenizer), loss_on=loss_on, max_length=max_length, may_cut_answers=may_cut_answers, rows=1
    )


def sound(tokenizer, example=TALK, loss_on="answers"):
    [found] = encode_all([example], tokenizer, loss_on=loss_on)
    return Encoding(np.array(found.input_ids), np.array(found.labels))


@pytest.fixture(scope="module")
def with_bos(tiny_tokenizer):
    """The tokenizer with a BOS that the template writes."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    return tokenizer


def damaged(encoding, tokenizer, how):
    ids, labels = encoding.input_ids.copy(), encoding.labels.copy()
    trained = np.flatnonzero(labels != IGNORED)
    match how:
        case "nothing trained":
            labels[:] = IGNORED
        case "no end":
            labels[np.isin(labels, end_of_turn_ids(tokenizer))] = IGNORED
        case "an earlier answer without end":
            ends = trained[np.flatnonzero(np.diff(trained) > 1)]
            labels[ends] = IGNORED
        case "two BOS":
            ids, labels = np.insert(ids, 0, ids[0]), np.insert(labels, 0, IGNORED)
        case "no BOS":
            ids, labels = ids[1:], labels[1:]
        case "another prompt":
            ids[2] += 1
        case "the prompt is trained as well":
            begins = trained[np.flatnonzero(np.diff(trained) > 1) + 1]
            labels[begins - 1] = ids[begins - 1]
    return Encoding(ids, labels)


DAMAGE = {
    "nothing trained": "no token is trained",
    "no end": "no label on its end-of-turn token",
    "an earlier answer without end": "no label on its end-of-turn token",
    "two BOS": "exactly one BOS",
    "no BOS": "exactly one BOS",
    "another prompt": "not those that the model is fed when asked",
    "the prompt is trained as well": "not those that the model is fed when asked",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_each_damage_is_found_by_its_check(with_bos, how):
    right = sound(with_bos)
    assert proof(with_bos).check([0], [TALK], [right]) == [None]
    checked = proof(with_bos)
    [reason] = checked.check([0], [TALK], [damaged(right, with_bos, how)])
    assert reason is not None
    assert DAMAGE[how] in reason
    assert [breach["rows"] for breach in checked.as_dict()["breaches"]] == [1]
    with pytest.raises(DataError, match=r"1 row fails") as stopped:
        checked.finish(on_breach="stop")
    assert "x:7" in str(stopped.value)
    checked.finish(on_breach="drop")


def test_a_model_that_is_asked_without_bos_must_not_be_trained_with_one(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    right = sound(tokenizer)
    assert proof(tokenizer).check([0], [TALK], [right]) == [None]
    wrong = Encoding(
        np.insert(right.input_ids, 0, tokenizer.bos_token_id), np.insert(right.labels, 0, IGNORED)
    )
    [reason] = proof(tokenizer).check([0], [TALK], [wrong])
    assert reason == "the row has a BOS, and the model is asked without one"


@pytest.mark.parametrize("loss_on", ["answers", "last_answer", "everything"])
def test_an_answer_that_is_cut_away_whole_is_found_whatever_is_trained(tiny_tokenizer, loss_on):
    encoding = sound(tiny_tokenizer, loss_on=loss_on)
    begins = int(np.flatnonzero(sound(tiny_tokenizer, loss_on="last_answer").labels != IGNORED)[0])
    for length, lost in ((begins + 1, False), (begins, True)):
        [reason] = proof(tiny_tokenizer, loss_on=loss_on, max_length=length).check([0], [TALK], [encoding])
        assert (reason is not None) == lost
        if lost:
            assert reason == f"max_length {length} cuts away a whole answer"


def test_the_template_that_needs_a_system_message_and_a_bos_is_no_traceback(with_bos):
    tokenizer = copy.deepcopy(with_bos)
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
        + tokenizer.chat_template
    )
    example = Conversation((Message("system", "be brief"), *TALK.messages), ROW)
    right = sound(tokenizer, example)
    assert proof(tokenizer).check([0], [example], [right]) == [None]
    assert "BOS" in str(proof(tokenizer).check([0], [example], [damaged(right, tokenizer, "two BOS")]))


TAKES_PARTS_ONLY = ("idefics3", "smolvlm", "llava_next")


@pytest.mark.parametrize(
    "family", [f for f in families() if f.name not in TAKES_PARTS_ONLY], ids=lambda family: family.name
)
def test_sound_rows_of_every_family_pass(family):
    tokenizer = tokenizer_of(family)
    context = encoder(tokenizer)
    examples = views(TALK, context, "answers")
    checked = Proof(context, loss_on="answers", max_length=10_000, may_cut_answers=False, rows=len(examples))
    encodings = [sound(tokenizer, example) for example in examples]
    assert checked.check(range(len(examples)), examples, encodings) == [None] * len(examples)
    assert all(checked.checked[name] for name in CHECKS if name != "one_bos" or checked.bos is not None)
    # Negative control: the same rows without their last label fail.
    broken = [damaged(encoding, tokenizer, "no end") for encoding in encodings]
    assert all(checked.check(range(len(examples)), examples, broken))


def test_texts_are_trained_to_their_end_whatever_their_length(tmp_path, tiny_tokenizer):
    said = "what is the capital of france paris red blue green"
    [whole] = encode_all([Text(said, ROW)], tiny_tokenizer)
    for length in range(2, len(whole.input_ids) + 1):
        path = tmp_path / f"{length}.jsonl"
        path.write_text(json.dumps({"text": said}) + "\n")
        settings = Data(dataset=str(path), max_length=length, validation=0, held_out=0, cache=False)
        made = data.encoded(data.prepare(settings), tiny_tokenizer, data=settings, loss_on="answers")
        assert made.train[-1].labels[-1] == tiny_tokenizer.eos_token_id
