"""Text to token ids: by the model's own tokenizer, and for many texts by tiktoken where both say the same.

A byte-level BPE (GPT-2, Llama 3, Qwen and their kin) needs a seventh of the time in tiktoken. It is used once
thousands of texts gave the same ids in both, and one text in so many is still compared after that; the first
that differs raises Differs, and the caller starts again without it.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

SURE_AFTER, STILL_COMPARED = 4096, 64
"""Texts that are compared before tiktoken is used, and the share (one in so many) that is from then on."""
LONGEST = 20_000
"""Characters of a text that tiktoken is given; its time grows with the square of a stretch without spaces."""

BETWEEN = "\ue004"

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What a `ByteLevel` pre-tokenizer splits by when it is given no pattern of its own (Radford et al. 2019)."""


class Differs(Exception):
    """tiktoken gave other ids than the model's tokenizer."""


def tokenized(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Ids of each text, special tokens recognized, none put around it."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        ids: list[list[int]] = tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=False
        ).input_ids
        return ids
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = False  # transformers leaves it as the last call wanted it
    # Without offsets, which nobody needs here, it takes two thirds of the time.
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


class LiteralTokens:
    """Ids of texts in which the text of a special token is text like any other.

    On a copy of the tokenizer: several threads tokenize at a time, and which of the two is meant is a switch
    on the tokenizer itself.
    """

    _copies: WeakKeyDictionary[Any, tuple[int, Any]] = WeakKeyDictionary()
    """By tokenizer, with the size of the vocabulary that the copy has: making one takes a while."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str], *, opened: bool = False) -> list[list[int]]:
        """Ids of each text; with `opened` as the tokenizer opens and closes texts (BOS)."""
        if not texts:
            return []
        if not self._tokenizer.is_fast:
            ids: list[list[int]] = self._tokenizer(
                list(texts), add_special_tokens=opened, split_special_tokens=True
            ).input_ids
            return ids
        size, copy = self._copies.get(self._tokenizer, (0, None))
        if size != len(self._tokenizer):
            from tokenizers import Tokenizer

            copy = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
            copy.encode_special_tokens = True
            self._copies[self._tokenizer] = (len(self._tokenizer), copy)
        plain = [encoding.ids for encoding in copy.encode_batch_fast(texts, add_special_tokens=False)]
        spelled = [_spelled(ids, self._tokenizer) for ids in plain]
        if not opened:
            return spelled
        around = copy.encode("", add_special_tokens=True).ids
        [letter] = copy.encode_batch_fast(["a"], add_special_tokens=False)
        before = next(n for n in range(len(around) + 1) if self._opens(copy, around[:n], "a", letter.ids))
        return [[*around[:before], *ids, *around[before:]] for ids in spelled]

    @staticmethod
    def _opens(copy: Any, before: list[int], text: str, plain: list[int]) -> bool:
        """Whether these tokens are what the tokenizer puts before a text."""
        ids: list[int] = copy.encode(text, add_special_tokens=True).ids
        return ids[: len(before) + len(plain)] == [*before, *plain]


def _spelled(ids: list[int], tokenizer: Any) -> list[int]:
    """Ids of plain text without special ones: Unigram models (T5) have these among their pieces, so that the
    text of one would come out as the token itself. It becomes its letters."""
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    if special.isdisjoint(ids):
        return ids
    return [
        letter
        for i in ids
        for letter in (
            tokenizer.convert_tokens_to_ids(list(tokenizer.convert_ids_to_tokens(i))) if i in special else [i]
        )
    ]


class QuickTokens:
    """`tokenized` for a long stream of texts."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Ids as arrays, a ninth of what lists of Python's numbers take.
        self._met: dict[str, NDArray[np.int32]] | None = {}
        self._quick: Any = None
        self._only_composed = False

    def __call__(self, texts: Sequence[str]) -> list[Any]:
        """Ids of each text, in lists or arrays. Raises Differs."""
        if self._quick is None:
            ids = tokenized(texts, self._tokenizer)
            met = self._met  # several threads may come by here
            if met is not None:
                met.update((text, np.array(one, np.int32)) for text, one in zip(texts, ids, strict=True))
                if len(met) >= SURE_AFTER:
                    self._met = None
                    self._begin(dict(met))
            return ids
        is_quick = [self._can_be_quick(text) for text in texts]
        chosen = [text if quick else "" for text, quick in zip(texts, is_quick, strict=True)]
        found = self._encoded(chosen, self._quick)
        own = [place for place, quick in enumerate(is_quick) if not quick or place % STILL_COMPARED == 0]
        theirs = tokenized([texts[place] for place in own], self._tokenizer)
        for place, right in zip(own, theirs, strict=True):
            if is_quick[place] and list(found[place]) != right:
                raise Differs
            found[place] = right
        return found

    def _begin(self, met: Mapping[str, NDArray[np.int32]]) -> None:
        """Use tiktoken from now on, where it says the same of all texts so far."""
        quick, self._only_composed = as_tiktoken(self._tokenizer)
        texts = [text for text in met if self._can_be_quick(text)]
        if quick and all(
            np.array_equal(ids, met[text])
            for ids, text in zip(self._encoded(texts, quick), texts, strict=True)
        ):
            self._quick = quick

    def _encoded(self, texts: Sequence[str], quick: Any) -> list[Any]:
        """All texts in one call, which holds no lock of Python's: as one, with a token of ours between them."""
        ids = quick.encode_to_numpy(BETWEEN.join(texts), allowed_special="all", disallowed_special=())
        ends = np.flatnonzero(ids == quick.encode_single_token(BETWEEN)).tolist()
        ids = ids.astype(np.int32)
        return [ids[a + 1 : b] for a, b in itertools.pairwise([-1, *ends, len(ids)])]

    def _can_be_quick(self, text: str) -> bool:
        """Whether the text is not too long, and the tokenizer's normalizer (NFC, if any) leaves it as it is."""
        if len(text) > LONGEST or BETWEEN in text:
            return False
        return not self._only_composed or text.isascii() or unicodedata.is_normalized("NFC", text)


def as_tiktoken(tokenizer: Any) -> tuple[Any, bool]:
    """The tokenizer as a tiktoken encoding, and whether only composed text (NFC) may be given to it.

    None where its rules are not those of tiktoken: the longest match of added tokens, one pattern that
    splits the text, and byte pairs merged in the order of their ids.
    """
    if not tokenizer.is_fast:
        return None, False
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model, pattern = rules["model"], _pattern(rules["pre_tokenizer"])
    added = {token["content"]: token["id"] for token in rules["added_tokens"]}
    normalizer = (rules["normalizer"] or {"type": None})["type"]
    altering = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if (
        model["type"] != "BPE"
        or any(model.get(name) for name in altering)
        or pattern is None
        or normalizer not in (None, "NFC")
        or any(token[name] for token in rules["added_tokens"] for name in ("single_word", "lstrip", "rstrip"))
        or any(a != b and b.startswith(a) for a in added for b in added)
    ):
        return None, False
    ranks = _ranks(model, added)
    if ranks is None:
        return None, False
    import tiktoken

    special = {**added, BETWEEN: max(*ranks.values(), *added.values()) + 1}
    encoding = tiktoken.Encoding("model", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return encoding, normalizer == "NFC"


def _pattern(splitting: Mapping[str, Any] | None) -> str | None:
    """The one pattern by which the text is split; None where it is split otherwise."""
    steps = (splitting or {}).get("pretokenizers", [splitting or {}])
    *before, last = steps
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not before:
        return GPT2_PATTERN if last.get("use_regex", True) else None
    if len(before) > 1 or last.get("use_regex", True):
        return None
    [split] = before
    if split["type"] != "Split" or split["behavior"] != "Isolated" or split["invert"]:
        return None
    pattern: str | None = split["pattern"].get("Regex")
    return pattern


def _ranks(model: Mapping[str, Any], added: Mapping[str, int]) -> dict[bytes, int] | None:
    """The id of every byte sequence that a merge makes; None where ids do not tell the order of merges."""
    byte_of = _bytes_of_letters()
    vocabulary = model["vocab"]
    if any(letter not in vocabulary for letter in byte_of):
        return None
    # With `ignore_merges` a word of the vocabulary is one token, whatever the merges.
    names = [name for name in vocabulary if name not in added] if model.get("ignore_merges") else [*byte_of]
    last = -1
    for merge in model["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        number = vocabulary.get(first + second)
        if number is None or number < last:
            return None
        last = number
        names.append(first + second)
    try:
        return {bytes([byte_of[letter] for letter in name]): vocabulary[name] for name in names}
    except KeyError:
        return None


def _bytes_of_letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies write bytes: printable ones as they are, others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }
