"""The record that every number is computed from: one row per model, item, turn and sample."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tunesmith.errors import RunError
from tunesmith.training.run import write_whole


@dataclass(frozen=True)
class EvalRow:
    """What one model did with one held-out item."""

    model: str
    item: int
    source_row: str
    group: str | None
    turn: int
    sample: int
    prompt_sha256: str
    """Hash of the token ids that the model was given: equal where two models answered the same question."""
    prompt_text: str
    """The last user message; of running text, its beginning. `conversation` has what else the model was given."""
    reference: str
    output: str | None
    """The answer; None where nothing was asked for one."""
    finish_reason: str | None
    """`stop` or `length`."""
    generation: dict[str, Any]
    scores: dict[str, float]
    nll: float | None
    """Sum of negative log-likelihoods of the labelled tokens, in nats."""
    tokens: int | None
    """Labelled tokens behind `nll` and `correct`."""
    correct: int | None
    """Labelled tokens that the model found most likely."""
    status: str
    """`ok`, or `error:` with what went wrong."""
    tokens_cut: int = 0
    """Tokens that the likelihood leaves out, beyond the longest length."""
    flags: dict[str, list[str]] = field(default_factory=dict)
    """By metric: what else is to be known about its score."""
    good: bool | None = None
    """Of a rated answer whether it was rated good."""
    rejected_nll: float | None = None
    """The same sum as `nll` of the worse answer of a pair."""
    rejected_tokens: int | None = None
    """Labelled tokens behind it, or of the worse answer that got a score."""
    score: float | None = None
    """What a reward model gives the reference, the better answer of a pair."""
    rejected_score: float | None = None
    """What it gives the worse one."""
    rejected: str | None = None
    """The worse answer, where a score was given."""
    num_bytes: int | None = None
    """UTF-8 bytes of the text behind `nll`, special tokens excepted; None where a part of it was left out."""
    windows: int = 1
    """Windows of the context length in which the likelihood was taken; more than one of long texts only."""
    label_probs: dict[str, float] = field(default_factory=dict)
    """By label: the probability that the model gives it as the whole answer, over all labels of the set."""
    conversation: list[dict[str, str]] | None = None
    """All messages that the model was given, `role` and `content` each, where they are more than one user message;
    None where that was not written down."""


def write_rows(path: str | Path, rows: Iterable[EvalRow]) -> Path:
    """Write rows as JSON lines, in one piece."""
    # Pure ASCII: line separators and half surrogates inside answers would break readers by line.
    return write_whole(Path(path), "".join(json.dumps(asdict(row), allow_nan=False) + "\n" for row in rows))


def read_rows(path: str | Path) -> list[EvalRow]:
    """Rows that `write_rows` wrote. Raises RunError naming the line that is none."""
    path = Path(path)
    if not path.is_file():
        raise RunError(f"There are no evaluation rows at {path}.", fix="Run `tunesmith evaluate` first.")
    known = {f.name for f in fields(EvalRow)}
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(EvalRow(**{key: value for key, value in json.loads(line).items() if key in known}))
        except (ValueError, TypeError, AttributeError) as error:
            raise RunError(
                f"Line {number} of {path} is not an evaluation row.",
                found=str(error),
                fix="Delete the file and evaluate again.",
            ) from None
    return rows
