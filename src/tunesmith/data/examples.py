"""The shapes every file is turned into, and the ledger that accounts for every row."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Fate = Literal["train", "validation", "held_out", "dropped"]


@dataclass(frozen=True)
class Row:
    """Where an example came from: the source's name and the row's number in it, counted from 1."""

    source: str
    number: int

    def __str__(self) -> str:
        return f"{self.source}:{self.number}"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns between user and assistant; the assistant's are the answers."""

    messages: tuple[Message, ...]
    row: Row
    group: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, the better one named."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    row: Row
    group: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rating:
    """One answer, judged good or bad."""

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    label: bool
    row: Row
    group: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Text:
    """Running text without turns."""

    text: str
    row: Row
    group: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


Example = Conversation | Preference | Rating | Text


@dataclass(frozen=True)
class Prompt:
    """A question to ask a model: what is asked, the reference answer, and what checks need to know."""

    messages: tuple[Message, ...]
    reference: str
    row: Row
    group: str | None = None
    checks: Mapping[str, Any] = field(default_factory=dict)


def content_hash(example: Example) -> str:
    """Hex digest of what a model could learn from the example; the same text gives the same hash anywhere.

    The row's place and unused columns do not count, so that copies of a row always share a split.
    """
    match example:
        case Conversation(messages=messages):
            content: Any = [[m.role, m.content] for m in messages]
        case Preference(prompt=prompt, chosen=chosen, rejected=rejected):
            content = [[[m.role, m.content] for m in part] for part in (prompt, chosen, rejected)]
        case Rating(prompt=prompt, completion=completion, label=label):
            content = [[[m.role, m.content] for m in part] for part in (prompt, completion)] + [label]
        case Text(text=text):
            content = text
    canonical = json.dumps([type(example).__name__, content], ensure_ascii=False)
    return hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def question_hash(example: Example) -> str:
    """Hex digest of what is asked: the same for rows that differ in their last answer only."""
    match example:
        case Conversation(messages=messages) if len(messages) > 1:
            return content_hash(replace(example, messages=messages[:-1]))
        case Preference(prompt=prompt) | Rating(prompt=prompt):
            return content_hash(Conversation(prompt, example.row))
        case _:
            return content_hash(example)


@dataclass(frozen=True)
class LedgerEntry:
    """What became of one input row, and why where that is not obvious."""

    row: Row
    fate: Fate
    reason: str | None = None
    tokens: int | None = None
    tokens_cut: int = 0


@dataclass(frozen=True)
class Ledger:
    """Every input row once: rows in = train + validation + held out + dropped."""

    entries: tuple[LedgerEntry, ...]

    def counts(self) -> dict[str, int]:
        """Rows by fate, with `rows_in` and `truncated`."""
        fates = Counter(entry.fate for entry in self.entries)
        return {
            "rows_in": len(self.entries),
            **{fate: fates[fate] for fate in ("train", "validation", "held_out", "dropped")},
            "truncated": sum(1 for e in self.entries if e.tokens_cut and e.fate != "dropped"),
        }

    def reasons(self) -> dict[str, int]:
        """Dropped rows by reason, most frequent first."""
        return dict(Counter(e.reason or "?" for e in self.entries if e.fate == "dropped").most_common())


@dataclass(frozen=True)
class Splits:
    """The examples in their three roles, with the ledger of all rows they came from."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    held_out: tuple[Example, ...]
    ledger: Ledger
    notes: tuple[str, ...] = ()
    """What was decided on the way: detected format and why, small-set rules, named splits used."""


class Unusable(Exception):
    """One row that cannot become an example; its text is the reason that the ledger keeps."""
