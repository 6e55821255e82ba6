"""Questions, answers and judgments, and FastChat's files that hold them (`fastchat.llm_judge`, read in source).

Our files carry FastChat's keys and, behind them, what its formats leave out: `error`, `flags`, `prompt_version`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tunesmith.data.examples import Row
from tunesmith.errors import DataError
from tunesmith.training.run import write_whole

Id = int | str
Winner = Literal["model_1", "model_2", "tie", "error"]
WINNERS = ("model_1", "model_2", "tie", "error")
FAILED_ANSWERS = ("$ERROR$", "ERROR")
"""What FastChat stores where a model gave no answer; nobody's answer, so that nothing is judged."""


@dataclass(frozen=True)
class Question:
    """A question of one or several turns, with reference answers where they are known."""

    id: Id
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()
    temperature: float | None = None
    """Temperature that the question asks for; by default its category's."""
    before: tuple[tuple[str, str], ...] = ()
    """What was said before the first turn: role and text of each message."""

    def reference(self, turn: int) -> str:
        """The reference of a turn, counted from 1; empty where there is none."""
        return self.references[turn - 1] if turn <= len(self.references) else ""


@dataclass(frozen=True)
class Answers:
    """One model's answers: by question, the text of each turn."""

    model: str
    turns: Mapping[Id, tuple[str, ...]]

    def up_to(self, question: Id, turn: int) -> tuple[str, ...] | None:
        """The answers to the first turns of a question; None where one is missing or failed."""
        given = self.turns.get(question, ())[:turn]
        return given if len(given) == turn and not any(is_failed(text) for text in given) else None


@dataclass(frozen=True)
class Single:
    """A grade of one answer; `score` is None where the judge gave none, and `error` then says why."""

    question: Id
    model: str
    turn: int
    score: float | None
    judgment: str
    judge: str
    prompt: str = ""
    error: str = ""
    flags: tuple[str, ...] = ()
    version: str = ""
    tstamp: float = 0.0
    user_prompt: str = ""
    """What the judge was shown."""


@dataclass(frozen=True)
class Pair:
    """Two games of one comparison: in the first, model 1 is shown as A, in the second as B."""

    question: Id
    model_1: str
    model_2: str
    turn: int
    g1_winner: Winner
    g2_winner: Winner
    g1_judgment: str
    g2_judgment: str
    judge: str
    prompt: str = ""
    errors: tuple[str, str] = ("", "")
    flags: tuple[str, ...] = ()
    version: str = ""
    tstamp: float = 0.0
    user_prompts: tuple[str, str] = ("", "")
    """What the judge was shown in each game."""


def is_failed(text: str) -> bool:
    """Whether an answer is FastChat's mark of a failure."""
    return text.strip() in FAILED_ANSWERS


def with_references(questions: Sequence[Question], path: str | Path) -> list[Question]:
    """Questions with the reference answers of a file in place of their own. Raises DataError where none fits."""
    known = read_references(path)
    if not any(q.id in known for q in questions):
        raise DataError(
            f"No reference of {path} belongs to one of the {len(questions)} questions.",
            found=f"references of {', '.join(map(repr, list(known)[:5])) or 'nothing'}",
            fix="Give the references of these questions, under the same question_id.",
        )
    return [replace(q, references=known.get(q.id, q.references)) for q in questions]


def read_references(path: str | Path) -> dict[Id, tuple[str, ...]]:
    """Reference answers by question, whoever gave them: a file in the answers' format, or with `reference`."""
    found: dict[Id, tuple[str, ...]] = {}
    for place, row in entries(path):
        id, texts = row.get("question_id"), row.get("reference") or _choice(row)
        if not isinstance(id, Id) or not _texts(texts):
            raise _bad(place, "question_id with choices[0].turns or reference", row)
        found[id] = tuple(texts)
    return found


def read_answers(path: str | Path) -> Answers:
    """FastChat's answer file of one model; of a question answered twice the last answer counts.

    Only `choices[0]` is read, as FastChat judges no other.
    """
    models, turns = set[str](), dict[Id, tuple[str, ...]]()
    for place, row in entries(path):
        id, texts = row.get("question_id"), _choice(row)
        if not isinstance(id, Id) or not _texts(texts):
            raise _bad(place, "question_id and choices[0].turns", row)
        models.add(str(row.get("model_id", Path(path).stem)))
        turns[id] = tuple(texts)
    if len(models) != 1:
        raise DataError(
            f"{path} does not hold the answers of one model.",
            found=", ".join(sorted(models)) or "no answer",
            fix="Give one file for each model.",
        )
    return Answers(models.pop(), turns)


def write_answers(path: str | Path, answers: Answers, further: Sequence[Answers] = ()) -> Path:
    """Answers in FastChat's format, ordered as they are; the answer's id is a hash of what it says.

    `further` are the same model's further samples, which stand as `choices` behind the one that is judged.
    """
    rows = (
        {
            "question_id": id,
            "answer_id": hashlib.sha256(json.dumps([answers.model, id, turns]).encode()).hexdigest()[:22],
            "model_id": answers.model,
            "choices": [
                {"index": index, "turns": list(one)}
                for index, one in enumerate([turns, *(more.turns.get(id, ()) for more in further)])
            ],
            "tstamp": round(time.time(), 3),
        }
        for id, turns in answers.turns.items()
    )
    return write_whole(Path(path), "".join(json.dumps(row) + "\n" for row in rows))


def read_judgments(path: str | Path) -> list[Single] | list[Pair]:
    """A judgment file of either kind, FastChat's or ours. Raises DataError for one that is mixed or neither."""
    singles, pairs = list[Single](), list[Pair]()
    for place, row in entries(path):
        if "g1_winner" in row or "g2_winner" in row:
            pairs.append(_pair(place, row))
        else:
            singles.append(_single(place, row))
    if singles and pairs:
        raise DataError(
            f"{path} holds grades and comparisons.",
            found=f"{len(singles)} and {len(pairs)}",
            fix="Give one file of each kind.",
        )
    if not singles and not pairs:
        raise DataError(f"There is no judgment in {path}.", fix="Give a file of judgments, one to a line.")
    return singles or pairs


def write_judgments(path: str | Path, judgments: Sequence[Single] | Sequence[Pair]) -> Path:
    """Judgments as JSON lines that FastChat's `show_result` reads; a grade that is none is its -1."""
    rows = (_single_row(one) if isinstance(one, Single) else _pair_row(one) for one in judgments)
    return write_whole(Path(path), "".join(json.dumps(row) + "\n" for row in rows))


def _single_row(one: Single) -> dict[str, Any]:
    return {
        "question_id": one.question,
        "model": one.model,
        "judge": [one.judge, one.prompt],
        "user_prompt": one.user_prompt,
        "judgment": one.judgment,
        "score": -1 if one.score is None else one.score,
        "turn": one.turn,
        "tstamp": one.tstamp,
        **({"error": one.error} if one.error else {}),
        **({"flags": list(one.flags)} if one.flags else {}),
        **({"prompt_version": one.version} if one.version else {}),
    }


def _pair_row(one: Pair) -> dict[str, Any]:
    return {
        "question_id": one.question,
        "model_1": one.model_1,
        "model_2": one.model_2,
        "g1_winner": one.g1_winner,
        "g2_winner": one.g2_winner,
        "judge": [one.judge, one.prompt],
        "g1_user_prompt": one.user_prompts[0],
        "g1_judgment": one.g1_judgment,
        "g2_user_prompt": one.user_prompts[1],
        "g2_judgment": one.g2_judgment,
        "turn": one.turn,
        "tstamp": one.tstamp,
        **({"errors": list(one.errors)} if any(one.errors) else {}),
        **({"flags": list(one.flags)} if one.flags else {}),
        **({"prompt_version": one.version} if one.version else {}),
    }


def _single(place: Row, row: Mapping[str, Any]) -> Single:
    id, score, turn = row.get("question_id"), row.get("score"), row.get("turn", 1)
    if (
        not isinstance(id, Id)
        or "model" not in row
        or not isinstance(score, int | float)
        or isinstance(score, bool)
        or not isinstance(turn, int)
    ):
        raise _bad(
            place, "question_id, model, score and turn, or model_1, model_2, g1_winner, g2_winner", row
        )
    judge, prompt = _judge(row)
    return Single(
        id, str(row["model"]), turn, None if score == -1 else float(score), str(row.get("judgment", "")),
        judge, prompt, str(row.get("error", "")), tuple(row.get("flags", ())),
        str(row.get("prompt_version", "")), float(row.get("tstamp") or 0), str(row.get("user_prompt", "")),
    )  # fmt: skip


def _pair(place: Row, row: Mapping[str, Any]) -> Pair:
    id, turn = row.get("question_id"), row.get("turn", 1)
    games = [row.get("g1_winner"), row.get("g2_winner")]
    if (
        not isinstance(id, Id)
        or not isinstance(turn, int)
        or any(game not in WINNERS for game in games)
        or any(not isinstance(row.get(side), str) for side in ("model_1", "model_2"))
    ):
        raise _bad(place, f"question_id, model_1, model_2, and winners among {', '.join(WINNERS)}", row)
    judge, prompt = _judge(row)
    errors = [*row.get("errors", ()), "", ""][:2]
    return Pair(
        id, row["model_1"], row["model_2"], turn, row["g1_winner"], row["g2_winner"],
        str(row.get("g1_judgment", "")), str(row.get("g2_judgment", "")), judge, prompt,
        (str(errors[0]), str(errors[1])), tuple(row.get("flags", ())), str(row.get("prompt_version", "")),
        float(row.get("tstamp") or 0), (str(row.get("g1_user_prompt", "")), str(row.get("g2_user_prompt", ""))),
    )  # fmt: skip


def _judge(row: Mapping[str, Any]) -> tuple[str, str]:
    judge = row.get("judge") or [""]
    parts = [str(part) for part in judge] if isinstance(judge, list) else [str(judge)]
    return parts[0], (parts[1] if len(parts) > 1 else "")


def _choice(row: Mapping[str, Any]) -> Any:
    try:
        return row["choices"][0]["turns"]
    except (KeyError, IndexError, TypeError):
        return None


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def entries(path: str | Path) -> Iterator[tuple[Row, Mapping[str, Any]]]:
    """The rows of any file that the data room reads, with their places. Raises DataError as it does."""
    from tunesmith.data import sources

    for record in sources.read(str(path)).records:
        yield record.row, record.values


def _bad(place: Row, expected: str, row: Mapping[str, Any]) -> DataError:
    return DataError(
        f"{place} does not fit: expected {expected}.", found=f"the keys {', '.join(map(str, row))}"
    )
