"""Preferences and ratings as conversations, and what has to hold between the two answers of a pair.

A preference becomes two encodings of its row, the chosen answer's and then the rejected one's; a rating becomes
one. In each only the judged answer is trained: answers in the prompt are context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tunesmith.data.examples import Conversation, Message, Preference, Rating, Unusable
from tunesmith.data.templates import IGNORED, Encoding

PAIR_CHECKS = {
    "shared_prompt": "chosen and rejected answer of a pair stand behind the same prompt tokens",
    "different_answers": "chosen and rejected answer of a pair are different tokens",
}
"""Checks of pairs by name, in the order in which they are made."""


def sides(example: Preference | Rating) -> list[tuple[Conversation, bool]]:
    """The conversations that end with each answer, and whether that answer is the good one."""
    if isinstance(example, Rating):
        return [(_conversation(example, example.completion), example.label)]
    return [(_conversation(example, example.chosen), True), (_conversation(example, example.rejected), False)]


def _conversation(example: Preference | Rating, answer: tuple[Message, ...]) -> Conversation:
    prompt = [turn._replace(trained=False if turn.role == "assistant" else None) for turn in example.prompt]
    return Conversation(
        (*prompt, *(turn._replace(trained=None) for turn in answer)),
        row=example.row,
        group=example.group,
        extra=example.extra,
    )


def margin_of(example: Preference | Rating) -> float | None:
    """By how much the chosen answer is better, as the column `margin` says; None where it says nothing.

    Raises Unusable for what is no number, and for one below 0.
    """
    said = example.extra.get("margin") if isinstance(example, Preference) else None
    if said is None or said == "":
        return None
    try:
        margin = float(said)
    except (TypeError, ValueError):
        margin = math.nan
    if not math.isfinite(margin) or margin < 0:
        raise Unusable(f"the column margin is no number of at least 0: {str(said)[:40]!r}")
    return margin


def prompt_length(encoding: Encoding) -> int:
    """Number of tokens before the judged answer; all of them where no token has a label."""
    return answer_begins(encoding.labels)


def answer_begins(labels: Sequence[int]) -> int:
    """Place of the first token with a label; their number where none has one."""
    trained = np.flatnonzero(np.asarray(labels) != IGNORED)
    return int(trained[0]) if len(trained) else len(labels)


def pair_breach(good: Encoding, bad: Encoding, max_length: int) -> str | None:
    """The name of the check that a pair fails once both sides are cut to `max_length`, None where it is right."""
    length = prompt_length(good)
    if length != prompt_length(bad) or not np.array_equal(good.input_ids[:length], bad.input_ids[:length]):
        return "shared_prompt"
    answers = [np.asarray(side.labels)[length:max_length] for side in (good, bad)]
    if np.array_equal(*(answer[answer != IGNORED] for answer in answers)):
        return "different_answers"
    return None
