"""What a judge is asked: our own texts, a file that can replace them, and a fence that no answer can leave."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from tunesmith.errors import RecipeError, nearest

Mode = Literal["single", "pair"]
Message = Mapping[str, str]

ROLE_TOKENS = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</?s>|<</?SYS>>|\[/?INST\]|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>",
    re.IGNORECASE,
)
"""Marks by which chat templates part roles. They are broken by a space, so that no tokenizer reads them as one."""
VERDICT_MARKS = re.compile(r"\[\[\s*(?:[ABC]|tie|\d+(?:\.\d+)?)\s*\]\]", re.IGNORECASE)
CLAIMS = re.compile(
    r"\[[0-9a-f]{6,} |\[?end of (?:answer|the answer)\b|"
    r"\b(?:ignore|disregard) (?:all|any|the) (?:previous|above|other)|^\s*(?:verdict|rating)\s*:",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class Prompts:
    """The texts of a judge's requests by name, and where they are from."""

    texts: Mapping[str, str]
    source: str

    @property
    def version(self) -> str:
        """A hash of the texts: other texts are other judgments."""
        return hashlib.sha256(json.dumps(dict(sorted(self.texts.items()))).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Turn:
    """One turn as a judge sees it: the question, and the reference answer where one is known."""

    question: str
    reference: str = ""


def load_prompts(path: str | Path | None = None) -> Prompts:
    """The shipped texts, with those that a YAML file replaces.

    Raises RecipeError for a file that is none, an unknown name, and a text that leaves out what it has to say.
    """
    import yaml

    from tunesmith.compose import read_layer

    shipped = (
        resources.files("tunesmith.evaluation.judging").joinpath("prompts.yaml").read_text(encoding="utf-8")
    )
    texts: dict[str, str] = yaml.safe_load(shipped)
    if path is None:
        return Prompts(texts, "shipped")
    own = read_layer(Path(path).expanduser(), what="judge's prompts", example="pairwise: TEXT")
    if not all(isinstance(text, str) for text in own.values()):
        raise RecipeError(
            f"The judge's prompts {path} are not texts by name.", fix=f"Names: {', '.join(texts)}."
        )
    for name, text in own.items():
        if name not in texts:
            raise RecipeError(
                f"There is no text '{name}' in a judge's prompts.", fix=nearest(str(name), texts)
            )
        for part in ("{material}", "{mark}"):
            if part in texts[name] and part not in text:
                raise RecipeError(
                    f"The text '{name}' of {path} has no {part}, without which an answer could give instructions.",
                    fix=f"Put {part} into it.",
                )
    return Prompts({**texts, **own}, str(path))


def neutral(text: str, *, specials: Sequence[str] = ()) -> str:
    """A text whose role tokens are broken by a space, those of a tokenizer (`specials`) included."""
    found = ROLE_TOKENS.sub(lambda match: match[0][0] + " " + match[0][1:], text)
    for special in specials:
        if len(special) > 1:
            found = found.replace(special, special[0] + " " + special[1:])
    return found


def suspicions(text: str) -> list[str]:
    """What in an answer looks as if it were meant for the judge: kept beside its judgment."""
    patterns = {"role token": ROLE_TOKENS, "verdict mark": VERDICT_MARKS, "instruction to the judge": CLAIMS}
    return [name for name, pattern in patterns.items() if pattern.search(text)]


def fenced(name: str, text: str, mark: str, *, specials: Sequence[str] = ()) -> str:
    """A text as a section that only the mark ends; what is inside cannot hold it."""
    if mark in text:
        raise ValueError("the mark stands in the text")
    return f"[{mark} {name}]\n{neutral(text, specials=specials)}\n[{mark} end of {name}]"


def mark_for(texts: Sequence[str]) -> str:
    """A random mark that none of the texts holds."""
    while True:
        mark = secrets.token_hex(8)
        if not any(mark in text for text in texts):
            return mark


def single(
    prompts: Prompts,
    turns: Sequence[Turn],
    answers: Sequence[str],
    *,
    before: Sequence[tuple[str, str]] = (),
    specials: Sequence[str] = (),
) -> tuple[Message, ...]:
    """The request to grade the last of a conversation's answers from 1 to 10; `before` are role and text of the
    messages before its first turn."""
    parts = _earlier(before)
    for number, (turn, answer) in enumerate(zip(turns, answers, strict=True), start=1):
        name = _name(number, turns)
        parts.append((f"question{name}", turn.question))
        if turn.reference:
            parts.append((f"reference answer{name}", turn.reference))
        parts.append((f"answer{name}", answer))
    return _messages(prompts, "single", parts, len(turns) + len(before), specials)


def pair(
    prompts: Prompts,
    turns: Sequence[Turn],
    a: Sequence[str],
    b: Sequence[str],
    *,
    before: Sequence[tuple[str, str]] = (),
    specials: Sequence[str] = (),
) -> tuple[Message, ...]:
    """The request to say whose last answer is better, that of A or that of B."""
    parts = _earlier(before)
    for number, turn in enumerate(turns, start=1):
        name = _name(number, turns)
        parts.append((f"question{name}", turn.question))
        if turn.reference:
            parts.append((f"reference answer{name}", turn.reference))
    for letter, answers in (("A", a), ("B", b)):
        parts += [(f"answer{_name(n, turns)} of {letter}", text) for n, text in enumerate(answers, start=1)]
    return _messages(prompts, "pair", parts, len(turns) + len(before), specials)


def repair(prompts: Prompts, messages: Sequence[Message], reply: str) -> tuple[Message, ...]:
    """The request for the verdict alone, after a reply without one."""
    return (
        *messages,
        {"role": "assistant", "content": reply or "(empty)"},
        {"role": "user", "content": prompts.texts["repair"]},
    )


def split(messages: Sequence[tuple[str, str]]) -> tuple[tuple[tuple[str, str], ...], str]:
    """A conversation, role and text each, as what was said before and the question that it ends with; where that is
    not the user's, as after a tool's result, its role stands in front."""
    *before, (role, last) = messages
    return tuple(before), last if role == "user" else f"({role}) {last}"


def _earlier(before: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    # A role is a word; what a file puts there instead could look like a line of ours.
    return [
        (f"earlier message {number} by {re.sub(r'[^a-z]', '', role.lower())[:20]}", text)
        for number, (role, text) in enumerate(before, start=1)
    ]


def _name(number: int, turns: Sequence[Turn]) -> str:
    return f" {number}" if len(turns) > 1 else ""


def _messages(
    prompts: Prompts,
    mode: Mode,
    parts: Sequence[tuple[str, str]],
    turns: int,
    specials: Sequence[str],
) -> tuple[Message, ...]:
    texts, mark = prompts.texts, mark_for([text for _, text in parts])
    system = texts[mode]
    # Replaced one by one: a file's text may hold other braces, as JSON does.
    for name, value in (
        ("material", texts["material"]),
        ("rubric", texts["rubric"]),
        ("task", texts["task_one_turn" if turns == 1 else "task_two_turns"]),
        ("mark", mark),
    ):
        system = system.replace("{" + name + "}", value)
    given = "\n\n".join(fenced(name, text, mark, specials=specials) for name, text in parts)
    return ({"role": "system", "content": system}, {"role": "user", "content": given})
