"""Inputs and answers of encoder-decoder models: what is read, what is trained, what is cut, and what is told."""

from __future__ import annotations

import json

import encoder_decoders
import numpy as np
import pytest

from tunesmith import data
from tunesmith.data import pairs
from tunesmith.data.examples import Conversation, Message, Row, Text, Unusable
from tunesmith.data.templates import Encoding, encoder, plain_ids
from tunesmith.errors import DataError, ModelError
from tunesmith.recipe import Data, Seq2Seq

ROW = Row("made", 1)
TOKENIZERS = {"t5": encoder_decoders.t5_tokenizer, "bart": encoder_decoders.bart_tokenizer}


def conversation(*turns: str, system: str | None = None) -> Conversation:
    messages = [Message(("user", "assistant")[n % 2], text) for n, text in enumerate(turns)]
    return Conversation((*([Message("system", system)] if system else []), *messages), row=ROW)


def settled(name="t5", prefix=None):
    tokenizer = TOKENIZERS[name]()
    pairs.settle_template(tokenizer, None, prefix)
    return tokenizer


@pytest.mark.parametrize("prefix", [None, "summarize: ", 'say "so" {{ x }}: '])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_pair_is_what_the_tokenizer_itself_makes_of_text_and_answer(name, prefix):
    tokenizer = settled(name, prefix)
    encoding = pairs.encode(conversation("what is one", "the answer"), tokenizer)
    source, target = pairs.parted(encoding.input_ids, encoding.labels)
    plain = TOKENIZERS[name]()
    assert source == plain((prefix or "") + "what is one").input_ids
    assert target == plain(text_target="the answer").input_ids
    assert target[-1] == tokenizer.eos_token_id, "the end of the answer is trained"
    assert source[-1] == tokenizer.eos_token_id
    served = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is one"}], add_generation_prompt=True, return_dict=False
    )
    assert served == source == pairs.prompt_ids((Message("user", "what is one"),), tokenizer)


@pytest.mark.parametrize("answer", ["red blue", "no </s> yes"])
def test_an_answer_ends_where_the_tokenizer_adds_no_end(answer):
    """GPT-2's and Llama's tokenizers, put before a decoder, put nothing behind a text."""
    tokenizer = encoder_decoders.t5_tokenizer()
    tokenizer._tokenizer.post_processor = None
    assert tokenizer("red").input_ids[-1] != tokenizer.eos_token_id
    [ids] = pairs.target_ids([answer], encoder(tokenizer))
    assert ids == [*plain_ids(answer, tokenizer), tokenizer.eos_token_id]
    assert tokenizer.decode(ids[:-1]) == answer
    pairs.settle_template(tokenizer, None)
    talk = conversation("one", answer)
    encoding = pairs.encode(talk, tokenizer)
    assert encoding.labels[-1] == tokenizer.eos_token_id, "so that the model learns to stop"
    proof = pairs.PairProof(encoder(tokenizer), rows=1)
    [(_, [found])] = pairs.encode_rows([[talk]], encoder(tokenizer), loss_on="answers")
    assert proof.check([0], [talk], [found]) == [None]


def test_an_end_before_the_language_is_not_doubled():
    """mBART closes an answer with the end-of-text token and the language."""
    from tokenizers import processors

    tokenizer = encoder_decoders.t5_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s> <unk>", special_tokens=[("</s>", 1), ("<unk>", 2)]
    )
    for answer in ("red blue", "no </s> yes"):
        [ids] = pairs.target_ids([answer], encoder(tokenizer))
        assert ids[-2:] == [1, 2]
        assert ids.count(1) == 1


def test_special_tokens_in_the_text_stay_text():
    tokenizer = settled()
    encoding = pairs.encode(conversation("one </s> two", "no <pad> yes"), tokenizer)
    source, target = pairs.parted(encoding.input_ids, encoding.labels)
    assert source.count(tokenizer.eos_token_id) == target.count(tokenizer.eos_token_id) == 1
    assert tokenizer.pad_token_id not in [*source, *target]
    assert tokenizer.decode(source, skip_special_tokens=True) == "one </s> two"


def test_every_answer_is_a_pair_behind_all_turns_before_it():
    tokenizer = settled()
    talk = conversation("one", "red", "two", "blue", system="question")
    context = encoder(tokenizer)
    [(_, [both])] = pairs.encode_batches([[talk]], context, loss_on="answers")
    read = [
        [tokenizer.decode(part, skip_special_tokens=True) for part in pairs.parted(p.input_ids, p.labels)]
        for p in both
    ]
    # Metaspace pieces have no line ends: they come out as the unknown token, which is skipped
    assert [answer for _, answer in read] == ["red", "blue"]
    assert read[0][0].startswith("question")
    assert read[0][0].endswith("one")
    assert "user: one" in read[1][0]
    assert "assistant: red" in read[1][0]
    assert read[1][0].endswith("user: two")
    [(_, [last])] = pairs.encode_batches([[talk]], context, loss_on="last_answer")
    assert len(last) == 1
    assert np.array_equal(last[0].input_ids, both[1].input_ids)


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (Text("running", row=ROW), "no question"),
        (conversation("one"), "no answer"),
        (conversation("one", "  "), "empty answer"),
        (Conversation((Message("assistant", "hello"),), row=ROW), "no answer to a question"),
        (Conversation((Message("user", "a"), Message("assistant", "b", trained=False)), row=ROW), "trains no"),
        (conversation("one", "\ud800"), "half a character"),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_told_why(example, reason):
    [(_, [found])] = pairs.encode_batches([[example]], encoder(settled()), loss_on="answers")
    assert isinstance(found, Unusable)
    assert reason in str(found)


def test_a_prefix_and_a_template_exclude_one_another():
    tokenizer = encoder_decoders.t5_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ModelError, match="source_prefix has no place"):
        pairs.settle_template(tokenizer, None, "say: ")
    assert "own" in pairs.settle_template(tokenizer, None)


def test_a_tuned_model_keeps_its_prefix_until_another_is_given():
    tokenizer = settled(prefix="say: ")
    before = tokenizer.chat_template
    pairs.settle_template(tokenizer, None)
    assert tokenizer.chat_template == before
    pairs.settle_template(tokenizer, None, "tell: ")
    assert tokenizer.chat_template == settled(prefix="tell: ").chat_template


@pytest.fixture
def mixed_file(tmp_path):
    """Forty rows whose inputs and answers grow: 1 to 40 words, and 1 to 20."""
    rows = [{"prompt": f"{n} " + "one " * n, "response": f"{n} " + "red " * (n // 2 + 1)} for n in range(40)]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def encoded(file, section=None, **options):
    section = section or Seq2Seq()
    settings = Data(dataset=str(file), near_duplicates="ignore", **options)
    return pairs.encoded(data.prepare(settings), settled(), data=settings, section=section)


def sizes(encodings):
    parts = [pairs.parted(e.input_ids, e.labels) for e in encodings]
    return [len(source) for source, _ in parts], [len(target) for _, target in parts]


def test_lengths_are_the_95th_percentile_of_the_training_pairs(mixed_file):
    whole = encoded(mixed_file, Seq2Seq(max_input_length=1000, max_output_length=1000))
    inputs, answers = sizes(whole.train)
    expected = [sorted(numbers) for numbers in (inputs, answers)]
    limits = []
    for numbers in expected:  # linear interpolation between order statistics, by hand
        place = 0.95 * (len(numbers) - 1)
        low = int(place)
        limits.append(int(numbers[low] + (place - low) * (numbers[low + 1] - numbers[low])))
    cut = encoded(mixed_file)
    found = sizes(cut.train)
    assert [max(found[0]), max(found[1])] == limits
    assert max(inputs) > limits[0]
    assert max(answers) > limits[1]
    assert any(f"inputs have up to {limits[0]} tokens: the 95th percentile" in note for note in cut.notes)


def test_rows_that_are_not_trained_have_no_say_in_the_lengths(tmp_path):
    words = {"train": 1, "validation": 20, "test": 30}
    (tmp_path / "set").mkdir()
    for name, times in words.items():
        rows = [{"prompt": f"what is {n} {'one ' * times}", "response": "two " * times} for n in range(20)]
        (tmp_path / f"set/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = Seq2Seq(max_input_length=1000, max_output_length=1000)
    whole, cut = encoded(tmp_path / "set", section), encoded(tmp_path / "set")
    assert len(whole.train) == len(whole.validation) == 20
    longest = [max(numbers) for numbers in sizes(whole.train)]
    assert [max(numbers) for numbers in sizes(cut.validation)] == longest
    assert all(short < 20 < min(long) for short, long in zip(longest, sizes(whole.validation)))


def test_every_cut_is_in_the_ledger_and_teaches_no_false_end(mixed_file):
    whole = encoded(mixed_file, Seq2Seq(max_input_length=1000, max_output_length=1000))
    cut = encoded(mixed_file, Seq2Seq(max_input_length=12, max_output_length=9))
    eos = settled().eos_token_id
    entries = [e for e in cut.ledger.entries if e.fate in ("train", "validation")]
    lost = 0
    for before, after in zip(whole.train, cut.train, strict=True):
        (a, b), (c, d) = (pairs.parted(e.input_ids, e.labels) for e in (before, after))
        assert c == (a if len(a) <= 12 else [*a[:11], eos]), "an input keeps its end-of-text token"
        assert d == b[:9]
        assert (d[-1] == eos) == (len(b) <= 9), "a cut answer has no end"
        lost += len(a) + len(b) - len(c) - len(d)
    assert lost == sum(e.tokens_cut for e in entries if e.fate == "train") > 0
    assert all(bool(e.tokens_cut) == bool(e.reason) for e in entries)
    assert any("of the input (at most 12) and" in (e.reason or "") for e in entries)
    assert cut.ledger.counts()["truncated"] == sum(bool(e.tokens_cut) for e in entries)
    assert any("lose the end of an answer" in note for note in cut.notes)


def test_longer_rows_can_be_dropped_or_refused(mixed_file):
    dropped = encoded(mixed_file, max_length=30, over_long="drop")
    assert max(map(max, sizes(dropped.train))) <= 30
    assert any("over_long: drop" in reason for reason in dropped.ledger.reasons())
    with pytest.raises(DataError, match="max_input_length"):
        encoded(mixed_file, max_length=30, over_long="error")


def test_the_proof_names_what_is_wrong():
    tokenizer = settled()
    proof = pairs.PairProof(encoder(tokenizer), rows=4)
    right = conversation("one", "red")
    [(_, [found])] = pairs.encode_rows([[right]], encoder(tokenizer), loss_on="answers")
    no_end = Encoding(found.input_ids[:-1], found.labels[:-1])
    untrained = Encoding(found.input_ids, np.full_like(found.labels, -100))
    padded = Encoding(
        found.input_ids, np.where(found.labels == found.labels[-2], tokenizer.pad_token_id, found.labels)
    )
    other = conversation("two", "red")
    reasons = proof.check([0, 1, 2, 3, 0], [right] * 4 + [other], [found, no_end, untrained, padded, found])
    assert reasons[0] is None
    for reason, words in zip(
        reasons[1:], ("end-of-text", "no token is trained", "padding", "not those"), strict=True
    ):
        assert words in reason
    assert proof.as_dict()["checks"][0]["rows"] == 5


def test_characters_that_the_tokenizer_does_not_know_are_counted(tmp_path):
    path = tmp_path / "odd.jsonl"
    rows = [{"prompt": f"what is {n}", "response": "{ 漢 }" if n < 5 else "red"} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert any(note.startswith("5 rows have characters") for note in encoded(path).notes)


def test_a_second_run_finds_the_pairs_and_another_prefix_does_not(mixed_file):
    first = encoded(mixed_file, max_length=41)
    again = encoded(mixed_file, max_length=41)
    assert again.fingerprint == first.fingerprint
    assert any("used again" in note for note in again.notes)
    assert not any("used again" in note for note in first.notes)
    other = encoded(mixed_file, Seq2Seq(max_output_length=5), max_length=41)
    assert other.fingerprint != first.fingerprint
