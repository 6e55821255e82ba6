"""The shapes every file is turned into, and the ledger that accounts for every row."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

Fate = Literal["train", "validation", "held_out", "dropped"]


class Row(NamedTuple):
    """Where an example came from: the source's name and the row's number in it, counted from 1."""

    source: str
    number: int

    def __str__(self) -> str:
        return f"{self.source}:{self.number}"


class Message(NamedTuple):
    """One turn of a conversation. (A named tuple: millions are made, and these are made fast.)"""

    role: str
    content: str
    reasoning: str | None = None
    """What the model thought before it answered, written where the template writes thoughts."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Calls as chat templates take them: `{"type": "function", "function": {"name", "arguments"}}`."""
    name: str | None = None
    """Name of the tool whose result this is."""
    tool_call_id: str | None = None
    trained: bool | None = None
    """Whether this answer is trained, where the row says so itself; None leaves it to the recipe."""


@dataclass(frozen=True)
class Conversation:
    """Turns between user and assistant; the assistant's are the answers."""

    messages: tuple[Message, ...]
    row: Row
    group: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    """Tools that the assistant may call, as JSON schemas."""


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


@dataclass(frozen=True)
class Prompt:
    """A question to ask a model: what is asked, the reference answer, and what checks need to know."""

    messages: tuple[Message, ...]
    reference: str
    """The answer that is known to be right or good; empty where none is known."""
    row: Row
    group: str | None = None
    checks: Mapping[str, Any] = field(default_factory=dict)
    """Other columns of the row: a database's schema, limits that the answer has to keep."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Tools that the assistant may call, as JSON schemas."""


Example = Conversation | Preference | Rating | Text | Prompt


_CANONICAL = json.JSONEncoder(ensure_ascii=False, default=str)
"""Made once: `json.dumps` with options makes one for every call."""


def content_hash(example: Example) -> str:
    """Hex digest of what a model could learn from the example; the same text gives the same hash anywhere.

    The row's place and unused columns do not count, so that copies of a row always share a split.
    """
    match example:
        case Conversation(messages=messages, tools=tools):
            content: Any = [_content(messages), tools] if tools else _content(messages)
        case Preference(prompt=prompt, chosen=chosen, rejected=rejected):
            content = [_content(part) for part in (prompt, chosen, rejected)]
        case Rating(prompt=prompt, completion=completion, label=label):
            content = [_content(part) for part in (prompt, completion)] + [label]
        case Prompt(messages=messages, tools=tools):
            content = [_content(messages), tools] if tools else _content(messages)
        case Text(text=text):
            content = text
    canonical = _CANONICAL.encode([type(example).__name__, content])
    return hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _content(messages: tuple[Message, ...]) -> list[list[Any]]:
    return [
        [m.role, m.content, m.reasoning, m.tool_calls] if m.reasoning or m.tool_calls else [m.role, m.content]
        for m in messages
    ]


def row_hash(example: Example) -> str:
    """Hex digest of all that is used of a row: besides its content, which answers are trained, whose results
    tools' results are, and the database that an SQL query is scored on.

    Rows of one digest are copies; `content_hash` may be the same for rows that are not.
    """
    digest = content_hash(example)
    used: list[Any] = []
    if isinstance(example, Conversation):
        marks = [m[4:] for m in example.messages]  # name, tool_call_id, trained
        if marks.count((None, None, None)) < len(marks):
            used += marks
        if "query" in example.extra and "setup" in example.extra:  # as the format sql keeps them
            used.append([example.group, example.extra["setup"]])
    if not used:
        return digest
    canonical = _CANONICAL.encode([digest, used])
    return hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _spaced(text: str) -> str:
    """The text with one space for each stretch of white space, none at its ends."""
    if text.isascii() and "  " not in text and "\n" not in text and "\t" not in text and "\r" not in text:
        return text.strip()  # the same, in a tenth of the time
    return " ".join(text.split())


def questions(example: Example) -> list[int]:
    """64 bits for each question that the example answers: all that was said before an answer. The last is the
    one that is measured.

    White space counts as one space, and nothing else is equal to anything: an instruction or a system message
    is part of the question.
    """
    state = hashlib.blake2b(digest_size=8)
    match example:
        case Conversation(messages=messages, tools=tools):
            turns = messages
            if tools:
                state.update(_CANONICAL.encode(tools).encode("utf-8", "surrogatepass"))
        case Prompt(messages=messages, tools=tools):
            turns = (*messages, Message("assistant", ""))
            if tools:
                state.update(_CANONICAL.encode(tools).encode("utf-8", "surrogatepass"))
        case Preference(prompt=prompt) | Rating(prompt=prompt):
            turns = (*prompt, Message("assistant", ""))
        case Text(text=text):
            state.update(_spaced(text).encode("utf-8", "surrogatepass"))
            return [int.from_bytes(state.digest(), "big")]
    found: list[int] = []
    is_asked = False
    for place, turn in enumerate(turns, 1):
        if turn.role == "assistant" and is_asked:
            found.append(int.from_bytes(state.digest(), "big"))
            if place == len(turns):
                return found
        is_asked = is_asked or turn.role == "user"
        said = f"{turn.role}\x1f{_spaced(turn.content)}\x1e"
        if turn.reasoning or turn.tool_calls:
            said += _CANONICAL.encode([turn.reasoning, turn.tool_calls])
        state.update(said.encode("utf-8", "surrogatepass"))
    return found or [int.from_bytes(state.digest(), "big")]


def strings(value: Any) -> Iterator[str]:
    """Every text in a nested value, names of keys excepted."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def texts(example: Example) -> Iterator[str]:
    """Every text of an example, in order."""
    match example:
        case Conversation(messages=messages) | Prompt(messages=messages):
            yield from (m.content for m in messages)
        case Preference(prompt=prompt, chosen=chosen, rejected=rejected):
            yield from (m.content for m in (*prompt, *chosen, *rejected))
        case Rating(prompt=prompt, completion=completion):
            yield from (m.content for m in (*prompt, *completion))
        case Text(text=text):
            yield text


SHAPES: dict[str, type[Example]] = {
    shape.__name__.lower(): shape for shape in (Conversation, Preference, Rating, Text, Prompt)
}
"""The shapes by name."""


def as_json(example: Example) -> str:
    """An example as one line of JSON, from which `from_json` makes it again."""
    facts = {item.name: getattr(example, item.name) for item in fields(example)}
    return json.dumps({"shape": type(example).__name__.lower(), **facts, "row": example.row}, default=str)


def from_json(line: str) -> Example:
    """The example that `as_json` wrote."""
    facts = json.loads(line)
    shape = SHAPES[facts.pop("shape")]
    facts["row"] = Row(*facts["row"])
    for name in ("messages", "prompt", "chosen", "rejected", "completion"):
        if name in facts:
            facts[name] = tuple(Message(*turn)._replace(tool_calls=tuple(turn[3])) for turn in facts[name])
    if "tools" in facts:
        facts["tools"] = tuple(facts["tools"])
    return shape(**facts)


class LedgerEntry(NamedTuple):
    """What became of one input row, and why where that is not obvious."""

    row: Row
    fate: Fate
    reason: str | None = None
    tokens: int | None = None
    tokens_cut: int = 0
    copies: int = 1
    """How often the row is trained per epoch; more than once where a mix's weights ask for it."""


@dataclass(frozen=True)
class Ledger:
    """Every input row once: rows in = train + validation + held out + dropped."""

    _counts: Mapping[str, int]
    _reasons: Mapping[str, int]
    _entries: Callable[[], Iterator[LedgerEntry]]

    @property
    def entries(self) -> Iterator[LedgerEntry]:
        """The rows in the order of the source, read from where they are kept."""
        return self._entries()

    def counts(self) -> dict[str, int]:
        """Rows by fate, with `rows_in` and `truncated`."""
        return dict(self._counts)

    def reasons(self) -> dict[str, int]:
        """Dropped rows by reason, most frequent first."""
        return dict(self._reasons)


class Tally:
    """Counts ledger entries while they pass by."""

    def __init__(self) -> None:
        self.fates: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.truncated = 0

    def add(self, entry: LedgerEntry) -> None:
        """Count one row."""
        self.fates[entry.fate] += 1
        if entry.fate == "dropped":
            self.dropped[entry.reason or "?"] += 1
        elif entry.tokens_cut:
            self.truncated += 1

    def ledger(self, entries: Callable[[], Iterator[LedgerEntry]]) -> Ledger:
        """The ledger of what was counted; `entries` reads the rows anew."""
        counts = {
            "rows_in": self.fates.total(),
            **{fate: self.fates[fate] for fate in ("train", "validation", "held_out", "dropped")},
            "truncated": self.truncated,
        }
        return Ledger(counts, dict(self.dropped.most_common()), entries)


class Unusable(Exception):
    """One row that cannot become an example; its text is the reason that the ledger keeps."""
