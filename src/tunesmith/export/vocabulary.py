"""A tokenizer said in llama.cpp's terms: its tokens, how text is split, which tokens are special, the chat template.

llama.cpp has its own tokenizers: byte-level BPE whose way to split text is one of a fixed list ("gpt2"), merging by the
scores of the pieces ("llama", SentencePiece's BPE) and unigrams ("t5"). A way to split is never guessed from a name:
the model's own merges are run behind each of llama.cpp's ways, and the one is taken that gives the same tokens for
every text tried.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens in GGUF."""

_SHORT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_ANY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _REST

SPLITS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "llama-bpe": (_GPT4,),
    "dbrx": (_GPT4,),
    "qwen2": (_SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _REST,),
    "qwen35": (_SHORT + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _REST,),
    "smollm": (r"\p{N}", _GPT2),
    "tekken": (
        r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+"
        r"((?=[\p{L}])([^A-Z]))*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _REST,
    ),
    "gpt-4o": (
        rf"[^\r\n\p{{L}}\p{{N}}]?((?=[\p{{L}}])([^a-z]))*((?=[\p{{L}}])([^A-Z]))+{_SHORT}?|"
        rf"[^\r\n\p{{L}}\p{{N}}]?((?=[\p{{L}}])([^a-z]))+((?=[\p{{L}}])([^A-Z]))*{_SHORT}?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _REST,
    ),
}
"""llama.cpp's name of a way to split text -> its expressions, applied one after the other (src/llama-vocab.cpp)."""

WHOLE = ("llama-bpe", "tekken")
"""Ways by which llama.cpp takes a piece that is a token as it is, and does not ask whether merges make it."""

PROBE = (
    "The 3 quick-brown foxes (don't they?) jumped over 12,345.67 lazy dogs; it's 2024-11-05, isn't IT'S?",
    "SELECT name, COUNT(*) FROM 'store' WHERE x='say' AND y >= 1000000;\n\tGROUP BY name -- ok\n\n\n  end  ",
    "def f(x):\n    return x**2 + 10 # it'll\r\n\r\nprint(f'{f(3)!r}')\t\t<|x|> [[1]] {} \\n",
    "Straße, naïve café; Ελλάδα; Москва 1990; 東京2020年、大阪; 서울; عربي; हिन्दी; 🙂👍🏽 ½ ²³ Ⅷ",
    "camelCaseHTTPServer snake_case_99 ALLCAPS'LL MixedCASE we've WE'VE y'all'd 1st 22nd 333rd 4444th",
    " leading and   inner   spaces \n \n\n trailing \t ",
)
"""Texts in which the ways to split differ."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    keys: Mapping[str, Any]
    """Without `tokenizer.` before them."""
    tried: int
    """Texts whose tokens are equal under the way to split that was chosen; 0 where no text is split."""
    notes: tuple[str, ...]


def vocabulary_of(
    tokenizer: Any, *, rows: int, stop_ids: Sequence[int], texts: Sequence[str] = ()
) -> Vocabulary:
    """A fast tokenizer in llama.cpp's terms, for an embedding of `rows` tokens.

    `stop_ids` end an answer, the first of a turn. `texts` are tried beside `PROBE`. Raises ModelError for a kind of
    tokenizer that llama.cpp does not have.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            "The tokenizer has no tokenizer.json, which the file is written from.",
            found=type(tokenizer).__name__,
            fix="Save it with transformers' fast tokenizer.",
        )
    said = json.loads(backend.to_str())
    model = said["model"]
    tokens, kinds = _tokens(tokenizer, said, rows)
    notes = []
    keys: dict[str, Any] = {}
    tried = 0
    match model["type"], _is_byte_level(said):
        case "BPE", True:
            split, tried = _split_of(backend, said, (*PROBE, *texts))
            keys |= {"ggml.model": "gpt2", "ggml.pre": split, "ggml.merges": list(_merges(model))}
            if said.get("normalizer"):
                notes.append(
                    "llama.cpp does not normalise Unicode: text in decomposed form gives other tokens there"
                )
        case "BPE", False if model.get("byte_fallback"):
            adds, alike = _space_of(backend, texts or PROBE)
            if texts and alike < len(texts):
                notes.append(
                    f"llama.cpp reads {len(texts) - alike} of {len(texts)} texts as other tokens: this tokenizer puts "
                    "spaces behind special tokens where llama.cpp puts none, or the other way round"
                )
            keys |= {
                "ggml.model": "llama",
                "ggml.pre": "default",
                "ggml.scores": _scores(model, tokens),
                "ggml.add_space_prefix": adds,
            }
        case "Unigram", _:
            pieces = {piece: float(score) for piece, score in model["vocab"]}
            lowest = min(pieces.values())
            keys |= {
                "ggml.model": "t5",
                "ggml.pre": "default",
                "ggml.scores": [pieces.get(token, lowest - 10.0) for token in tokens],
                "ggml.add_space_prefix": _adds_space(said),
                "ggml.remove_extra_whitespaces": _squeezes(said),
            }
            if charsmap := _charsmap(said.get("normalizer")):
                keys["ggml.precompiled_charsmap"] = charsmap
        case kind, _:
            raise ModelError(
                f"llama.cpp has no tokenizer of this kind: {kind}.",
                found="tokenizer.json",
                fix="Byte-level BPE, BPE with byte fallback and unigrams can be written.",
            )
    keys |= {"ggml.tokens": tokens, "ggml.token_type": kinds}
    keys |= _special(tokenizer, stop_ids)
    if tokenizer.chat_template:
        keys["chat_template"] = tokenizer.chat_template
    return Vocabulary(keys, tried, tuple(notes))


def _tokens(tokenizer: Any, said: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Text and kind of every row of the embedding."""
    ids = tokenizer.get_vocab()
    if ids and max(ids.values()) >= rows:
        raise ModelError(
            "The tokenizer has tokens that the model has no embedding for.",
            found=f"ids up to {max(ids.values())}, {rows} rows",
            fix="Resize the embedding before training, or use the tokenizer that the model was trained with.",
        )
    tokens = [f"[PAD{n}]" for n in range(rows)]
    kinds = [UNUSED] * rows
    for token, n in ids.items():
        tokens[n] = token
        is_byte = said["model"].get("byte_fallback") and token.startswith("<0x") and len(token) == 6
        kinds[n] = BYTE if is_byte else NORMAL
    unknown = tokenizer.unk_token_id
    for added in said["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        tokens[added["id"]] = added["content"]
    if unknown is not None and (said["model"]["type"] != "BPE" or said["model"].get("byte_fallback")):
        kinds[unknown] = UNKNOWN
    return tokens, kinds


def _merges(model: Mapping[str, Any]) -> Iterator[str]:
    for merge in model["merges"]:
        yield merge if isinstance(merge, str) else " ".join(merge)


def _scores(model: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """What llama.cpp merges by, highest first: the rank of the merge that makes a piece."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(_merges(model)):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _parts(node: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, sequences taken apart."""
    if not node:
        return
    if node["type"] == "Sequence":
        for part in next(v for v in node.values() if isinstance(v, list)):
            yield from _parts(part)
    else:
        yield node


def _is_byte_level(said: Mapping[str, Any]) -> bool:
    return any(part["type"] == "ByteLevel" for part in _parts(said["pre_tokenizer"]))


def _adds_space(said: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text."""
    return any(part["type"] == "Prepend" for part in _parts(said["normalizer"])) or any(
        part["type"] == "Metaspace" and part.get("prepend_scheme") != "never"
        for part in _parts(said["pre_tokenizer"])
    )


def _space_of(backend: Any, texts: Sequence[str]) -> tuple[bool, int]:
    """Whether llama.cpp is to put a space before a text, which it does behind each special token as well, and how many
    texts it then reads as the tokenizer does, which may put it at the very beginning only, or not before another one.
    """
    from tokenizers import Tokenizer, normalizers, pre_tokenizers

    own = [e.ids for e in backend.encode_batch(list(texts), add_special_tokens=False)]
    plain = Tokenizer.from_str(backend.to_str())
    plain.pre_tokenizer = pre_tokenizers.Sequence([])
    alike = {}
    for adds in (True, False):
        before = [normalizers.Prepend("\u2581")] if adds else []
        plain.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "\u2581")])
        other = [e.ids for e in plain.encode_batch(list(texts), add_special_tokens=False)]
        alike[adds] = sum(a == b for a, b in zip(own, other, strict=True))
    return max(alike.items(), key=lambda found: found[1])


def _squeezes(said: Mapping[str, Any]) -> bool:
    """Whether runs of spaces become one before text is split."""
    return any(
        part["type"] in ("Strip", "Replace", "WhitespaceSplit")
        for part in (*_parts(said["normalizer"]), *_parts(said["pre_tokenizer"]))
    )


def _charsmap(normalizer: Any) -> bytes:
    return next(
        (
            base64.b64decode(part["precompiled_charsmap"])
            for part in _parts(normalizer)
            if part["type"] == "Precompiled"
        ),
        b"",
    )


def _split_of(backend: Any, said: Mapping[str, Any], texts: Sequence[str]) -> tuple[str, int]:
    """The first of llama.cpp's ways to split that gives the tokenizer's own tokens for every text, and how many were
    tried. The way that it names itself is tried first, as a vocabulary may not tell some of them apart. Raises
    ModelError where none does."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

    plain = Tokenizer.from_str(backend.to_str())
    # llama.cpp reads text as it is: what a normalizer does to it is said in a note, not part of the choice.
    texts = [plain.normalizer.normalize_str(t) if plain.normalizer else t for t in texts]
    own = [e.ids for e in plain.encode_batch(list(texts), add_special_tokens=False)]
    named = tuple(
        part["pattern"]["Regex"].replace(_ANY_CASE, _SHORT)
        for part in _parts(said["pre_tokenizer"])
        if part["type"] == "Split" and "Regex" in part["pattern"]
    )
    takes_whole = bool(said["model"].get("ignore_merges"))

    def likeness(name: str) -> tuple[bool, bool]:
        return SPLITS[name] == named, (name in WHOLE) == takes_whole

    worst: dict[str, tuple[int, str]] = {}
    plain.normalizer = normalizers.Sequence([])
    for name in sorted(SPLITS, key=likeness, reverse=True):
        expressions = SPLITS[name]
        plain.model.ignore_merges = name in WHOLE
        plain.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(e), "isolated") for e in expressions),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        other = [e.ids for e in plain.encode_batch(list(texts), add_special_tokens=False)]
        different = [text for text, a, b in zip(texts, own, other, strict=True) if a != b]
        if not different:
            return name, len(texts)
        worst[name] = (len(different), different[0])
    closest = min(worst, key=lambda name: worst[name][0])
    count, example = worst[closest]
    raise ModelError(
        "The tokenizer splits text in a way that llama.cpp does not have.",
        found=f"the closest, '{closest}', gives other tokens for {count} of {len(texts)} texts, for instance "
        f"{example[:60]!r}",
        fix="Serve the merged model with transformers or vLLM, which use the tokenizer itself.",
    )


def _special(tokenizer: Any, stop_ids: Sequence[int]) -> dict[str, Any]:
    """Ids of the special tokens, and whether text gets one before it."""
    keys: dict[str, Any] = {}
    for name, value in (
        ("bos", tokenizer.bos_token_id),
        ("unknown", tokenizer.unk_token_id),
        ("padding", tokenizer.pad_token_id),
    ):
        if value is not None:
            keys[f"ggml.{name}_token_id"] = int(value)
    stops = list(
        dict.fromkeys([*stop_ids, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])])
    )
    if stops:
        keys["ggml.eos_token_id"] = int(stops[0])
        keys["ggml.eot_token_id"] = int(stops[0])
    if len(stops) > 1:
        keys["ggml.eom_token_id"] = int(stops[1])
    one = tokenizer("a").input_ids
    keys["ggml.add_bos_token"] = (
        bool(one) and tokenizer.bos_token_id is not None and one[0] == tokenizer.bos_token_id
    )
    keys["ggml.add_eos_token"] = bool(one) and one[-1] in stops
    return keys
