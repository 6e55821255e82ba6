"""Questions from any file that the data room reads: FastChat's, conversations, or one prompt per row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from tunesmith.data.examples import Row, Unusable
from tunesmith.errors import DataError, closest
from tunesmith.evaluation.judging.judgments import Id, Question, entries, with_references

PROMPT_KEYS = ("prompt", "instruction", "question", "text")
"""Columns that hold the prompt, the first that is there."""
TALKS = ("messages", "conversations")
"""Columns that hold a conversation, whose answers are references."""
FASTCHAT_CATEGORIES = (
    "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities",
)  # fmt: skip
"""Of FastChat's questions 81 to 160, ten each in this order."""


def read_questions(path: str | Path, references: str | Path | None = None) -> list[Question]:
    """The questions of a file, with the references in it or those of a file in the answers' format.

    A row has `turns` (FastChat's, or Arena-Hard's, whose turns are objects with `content`), a conversation under
    `messages` or `conversations`, or a prompt under one of PROMPT_KEYS. Without `question_id` or `uid` its number in
    the file names it. Raises DataError naming the row.
    """
    found: dict[Id, Question] = {}
    for row, values in entries(path):
        question = _question(row, values)
        if question.id in found:
            raise DataError(f"The question {question.id!r} is in {path} twice.", found=f"again in {row}")
        found[question.id] = question
    asked = with_categories(list(found.values()))
    return asked if references is None else with_references(asked, references)


def shipped() -> list[Question]:
    """Our own 80 two-turn questions in MT-Bench's categories."""
    with resources.as_file(resources.files("tunesmith.assets").joinpath("mt_bench/questions.jsonl")) as own:
        return read_questions(own)


def with_categories(questions: Sequence[Question]) -> list[Question]:
    """The questions, those of a file without categories with FastChat's, where all have FastChat's numbers."""
    if any(q.category or not isinstance(q.id, int) or not 81 <= q.id <= 160 for q in questions):
        return list(questions)
    return [replace(q, category=FASTCHAT_CATEGORIES[(int(q.id) - 81) // 10]) for q in questions]


def row_of(question: Question) -> dict[str, Any]:
    """The question as FastChat's file has it."""
    return {
        "question_id": question.id,
        "category": question.category,
        "turns": list(question.turns),
        **({"reference": list(question.references)} if any(question.references) else {}),
        **({} if question.temperature is None else {"required_temperature": question.temperature}),
    }


def _question(row: Row, values: Mapping[str, Any]) -> Question:
    category = str(values.get("category") or values.get("dataset") or "")
    turns, references = _asked(row, values)
    return Question(_id(row, values), category, turns, references, _temperature(row, values))


def _asked(row: Row, values: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The turns of a row and their references."""
    given = values.get("turns")
    if given is not None:
        turns = _texts(given)
        if turns is None or not turns or not all(turns):
            raise DataError(f"{row} does not fit: expected turns, a list of texts.", found=repr(given)[:80])
        return turns, _references(row, values)
    if column := next((name for name in TALKS if values.get(name) is not None), None):
        return _talk(row, column, values)
    text = next((values[name] for name in PROMPT_KEYS if values.get(name)), None)
    if not isinstance(text, str) or not text.strip():
        known = ("turns", *TALKS, *PROMPT_KEYS)
        near = next((f"'{name}' for '{found}'" for found in values if (name := closest(found, known))), "")
        raise DataError(
            f"{row} holds no prompt.",
            found=f"the columns {', '.join(values)}" if values else "no column",
            fix=f"Name its column one of: {', '.join(known)}." + (f" Did you mean {near}?" if near else ""),
        )
    if values.get("input"):
        text = f"{text}\n\n{values['input']}"
    return (text,), _references(row, values)


def _references(row: Row, values: Mapping[str, Any]) -> tuple[str, ...]:
    given = values.get("reference") or values.get("answer") or ()
    texts = _texts(given)
    if texts is None and isinstance(given, str | int | float):
        texts = (str(given),)
    if texts is None:
        raise DataError(f"{row} does not fit: expected reference as texts.", found=repr(given)[:80])
    return texts


def _talk(row: Row, column: str, values: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the user says in a conversation, and what is answered there."""
    from tunesmith.data import formats

    read = formats.messages if column == "messages" else formats.sharegpt
    listed = {**values, column: _parsed(values[column])}
    said = listed[column]
    # A conversation to be gone on with ends with a question, and as an example it needs an answer.
    last = said[-1] if isinstance(said, list) and said and isinstance(said[-1], Mapping) else {}
    is_open = last.get("role", last.get("from")) in ("user", "human")
    if is_open:
        end = {"role": "assistant", "content": "?"} if "role" in last else {"from": "gpt", "value": "?"}
        listed[column] = [*said, end]
    try:
        turns = list(read(listed, row).messages)
    except Unusable as reason:
        raise DataError(f"{row} holds no conversation: {reason}.", found=f"under '{column}'") from None
    if is_open:
        turns.pop()
    asked = [turn.content for turn in turns if turn.role == "user"]
    answers = [turn.content for turn in turns if turn.role == "assistant"]
    roles = [turn.role for turn in turns]
    if any(role != ("assistant" if place % 2 else "user") for place, role in enumerate(roles)):
        raise DataError(
            f"{row} holds a conversation that a suite cannot ask.",
            found=", ".join(roles),
            fix="Expected turns of user and assistant by turns, the user first: leave system and tool messages out.",
        )
    return tuple(asked), tuple(answers)


def _id(row: Row, values: Mapping[str, Any]) -> Id:
    found = next(
        (values[name] for name in ("question_id", "uid") if values.get(name) is not None), row.number
    )
    if not isinstance(found, Id) or isinstance(found, bool):
        raise DataError(
            f"{row} does not fit: expected question_id as a number or text.", found=repr(found)[:80]
        )
    is_cell = row.source.lower().endswith(".csv")  # whose numbers are texts
    return int(found) if is_cell and isinstance(found, str) and found.isdecimal() else found


def _temperature(row: Row, values: Mapping[str, Any]) -> float | None:
    given = values.get("required_temperature")
    if given is None:
        return None
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = -1.0
    if isinstance(given, bool) or not 0 <= value < 100:
        raise DataError(
            f"{row} does not fit: expected required_temperature as a number from 0.", found=repr(given)[:80]
        )
    return value


def _parsed(value: Any) -> Any:
    """A list that a cell of a CSV file holds as JSON."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _texts(value: Any) -> tuple[str, ...] | None:
    """Texts, or objects with `content`, as a tuple; None where it is neither."""
    listed = _parsed(value)
    if not isinstance(listed, list | tuple):
        return None
    given = [one.get("content") if isinstance(one, Mapping) else one for one in listed]
    texts = tuple(text for text in given if isinstance(text, str))
    return texts if len(texts) == len(given) else None
