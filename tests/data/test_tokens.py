"""Tokenizing by tiktoken gives what the model's tokenizer gives, or is not done."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data import encoded, prepare, tokens
from tunesmith.data.tokens import BETWEEN, QuickTokens, as_tiktoken, tokenized
from tunesmith.recipe import Data

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "The quick brown fox's 12345 jumps, doesn't it?\n\n  Ünïcödé 漢字 <tag> don't" * 3,
    "aaaa bbbb abab" * 9,
]


def byte_level(*, pattern=None, composed=False, ignore_merges=False, **added):
    """A byte-level BPE as model folders have it: GPT-2's kind, or with a pattern Llama 3's and Qwen's."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if composed:
        tokenizer.normalizer = normalizers.NFC()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = pattern and pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if split else level
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tag>", special=False, normalized=False, **added)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


KINDS = {
    "gpt2": byte_level(),
    "llama3": byte_level(pattern=LLAMA3, ignore_merges=True),
    "qwen": byte_level(pattern=LLAMA3, composed=True),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_tiktoken_gives_the_same_ids(kind, data):
    pieces = st.sampled_from(
        ["<tag>", "<|end|>", "don't", "'LL", "é", "\u0301", "12345", "\n\n", "  ", "漢字"]
    )
    text = data.draw(st.lists(st.text(max_size=8) | pieces, max_size=12).map("".join))
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    quick = QuickTokens(KINDS[kind])
    quick._begin({"the quick": tokenized(["the quick"], KINDS[kind])[0]})
    assert quick._quick is not None
    if quick._can_be_quick(text):
        assert [list(ids) for ids in quick._encoded([text, "x", text], quick._quick)][::2] == tokenized(
            [text] * 2, KINDS[kind]
        )
    assert list(quick([text, "", text])[2]) == tokenized([text], KINDS[kind])[0]


def test_what_would_be_normalized_otherwise_is_left_to_the_tokenizer():
    quick = QuickTokens(KINDS["qwen"])
    quick._begin({"the quick": tokenized(["the quick"], KINDS["qwen"])[0]})
    assert not quick._can_be_quick("e\u0301")
    assert list(quick(["", "e\u0301"])[1]) == tokenized(["é"], KINDS["qwen"])[0]
    assert not quick._can_be_quick(BETWEEN)
    assert list(quick(["", f"a{BETWEEN}b"])[1]) == tokenized([f"a{BETWEEN}b"], KINDS["qwen"])[0]


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(lstrip=True),
        byte_level(single_word=True),
        pytest.param(None, id="prefix-space"),
        pytest.param(..., id="word-level"),
    ],
)
def test_tokenizers_of_other_rules_are_not_taken_for_tiktoken(tokenizer):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if tokenizer is None:
        tokenizer = byte_level()
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif tokenizer is ...:
        words = models.WordLevel({"a": 0, "?": 1}, unk_token="?")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
    assert as_tiktoken(tokenizer) == (None, False)


@pytest.fixture
def chats(tmp_path, monkeypatch):
    """A file of 60 rows of different words, in several batches."""
    monkeypatch.setattr("tunesmith.data.BATCH", 20)
    file = tmp_path / "chats.jsonl"
    words = ["red", "blue", "green", "one", "two", "three"]
    rows = [
        {"prompt": f"what is {' '.join(p)}", "response": f"hello {p[0]}"}
        for p in itertools.islice(itertools.permutations(words, 3), 60)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def made(file, tokenizer):
    data = Data(dataset=str(file), cache=False, validation=0, held_out=0)
    return encoded(prepare(data), tokenizer, data=data, loss_on="answers")


def test_the_quick_path_is_taken_and_changes_nothing(chats, tiny_tokenizer, monkeypatch):
    plain = made(chats, tiny_tokenizer)
    counted = []
    encode = QuickTokens._encoded
    monkeypatch.setattr(tokens, "SURE_AFTER", 10)
    monkeypatch.setattr(
        QuickTokens,
        "_encoded",
        lambda self, texts, quick: counted.append(texts) or encode(self, texts, quick),
    )
    assert made(chats, tiny_tokenizer).fingerprint == plain.fingerprint
    assert len(counted) > 2


def test_a_difference_starts_again_with_the_tokenizer(chats, tiny_tokenizer, monkeypatch):
    plain = made(chats, tiny_tokenizer)
    encode, calls = QuickTokens._encoded, []

    def wrong(self, texts, quick):
        calls.append(len(texts))
        ids = encode(self, texts, quick)
        return ids if len(calls) == 1 else [[*i[1:], 1] for i in ids]

    monkeypatch.setattr(tokens, "SURE_AFTER", 10)
    monkeypatch.setattr(QuickTokens, "_encoded", wrong)
    again = made(chats, tiny_tokenizer)
    assert again.fingerprint == plain.fingerprint
    assert len(calls) > 1
    assert "tiktoken gave other ids" in " ".join(again.notes)
    assert again.ledger.counts() == plain.ledger.counts()
