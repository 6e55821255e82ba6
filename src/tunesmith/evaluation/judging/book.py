"""The book of replies: what was paid for, written down before it counts, so that nothing is paid for twice.

One JSON line per reply under the hash of what was asked (judge, prompt texts, question, answers, parameters), and one
before each call, which puts its most expensive end aside. Lines are only ever appended, replies forced to the disk; a
last line that a crash cut off is taken away when the book is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from tunesmith.errors import RunError
from tunesmith.evaluation.judging.client import Reply


@dataclass(frozen=True)
class Entry:
    """A reply with what was asked for it and when it came."""

    reply: Reply
    messages: tuple[Mapping[str, str], ...]
    time: float


@dataclass
class Spent:
    """What a book's calls came to; those that may have been charged without a reply count at their most, and a call
    that was refused counts as none."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, prompt: int, completion: int) -> None:
        """Count one call."""
        self.calls += 1
        self.prompt_tokens += prompt
        self.completion_tokens += completion


def key(*facts: Any) -> str:
    """The name of a reply: a hash of all that it depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass
class Book:
    """A book that is open; one process at a time writes it. Raises RunError where another one does."""

    path: Path
    entries: dict[str, Entry] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)
    underway: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Tokens put aside for calls that are not over, by the name of what they ask."""
    repaired: bool = False
    """Whether a last line was cut off and taken away."""

    def __enter__(self) -> Book:
        from filelock import FileLock, Timeout

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._writing = threading.Lock()
        self._lock = FileLock(f"{self.path}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunError(
                f"Another process is judging with {self.path}.", fix="Wait for it, or give another --output."
            ) from None
        self._file = self.path.open("ab+")
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
            self.repaired = True
        for number, line in enumerate(content[:whole].split(b"\n"), start=1):
            if line.strip():
                self._take(line, number)
        # Nobody knows what became of the calls of a process that died: they count as charged.
        for tokens in self.underway.values():
            self.spent.add(*tokens)
        self.underway.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._lock.release()

    def committed(self) -> Spent:
        """What is spent and what is put aside, at one moment."""
        with self._writing:
            found = replace(self.spent)
            for tokens in self.underway.values():
                found.add(*tokens)
        return found

    def send(self, key: str, tokens: tuple[int, int]) -> None:
        """Put a call's most expensive end aside, before it is made."""
        self._append({"sent": key, "tokens": tokens}, force=False)
        with self._writing:
            self.underway[key] = tokens

    def free(self, key: str) -> None:
        """Give back what was put aside for a call that costs nothing."""
        self._append({"free": key}, force=False)
        with self._writing:
            self.underway.pop(key, None)

    def add(
        self, key: str, reply: Reply, messages: Sequence[Mapping[str, str]], tokens: tuple[int, int]
    ) -> Entry:
        """Write a reply down; it counts from then on. `tokens` are those read and written, counted or estimated."""
        entry = Entry(reply, tuple(messages), round(time.time(), 3))
        self._append(
            {
                "key": key,
                "reply": asdict(reply),
                "messages": list(messages),
                "time": entry.time,
                "tokens": tokens,
            }
        )
        with self._writing:
            self.entries[key] = entry
            self.underway.pop(key, None)
            self.spent.add(*tokens)
        return entry

    def lose(self, key: str, tokens: tuple[int, int], why: str) -> None:
        """Write down a call without a reply that may have been charged."""
        self._append({"lost": key, "why": why, "time": round(time.time(), 3), "tokens": tokens})
        with self._writing:
            self.underway.pop(key, None)
            self.spent.add(*tokens)

    def _append(self, row: Mapping[str, Any], *, force: bool = True) -> None:
        with self._writing:
            self._file.write(json.dumps(row).encode() + b"\n")
            self._file.flush()  # survives the process; a forced line survives the machine
            if force:
                os.fsync(self._file.fileno())

    def _take(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line)
            if "sent" in row:
                read, written = row["tokens"]
                self.underway[row["sent"]] = (read, written)
                return
            if "free" in row:
                self.underway.pop(row["free"], None)
                return
            self.underway.pop(row["key"] if "key" in row else row["lost"], None)
            self.spent.add(*row["tokens"])
            if "key" in row:
                self.entries[row["key"]] = Entry(Reply(**row["reply"]), tuple(row["messages"]), row["time"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"Line {number} of {self.path} is damaged.",
                found=str(error),
                fix="Restore the file, or delete the line.",
            ) from None
