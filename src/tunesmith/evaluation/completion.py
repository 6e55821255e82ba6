"""Whether a model completes its task at all: four separate rates, and all of them together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith.evaluation.rows import EvalRow

REFUSAL = re.compile(
    r"(?i)^\W*(?:(?:i['’]?m|i am|we are|we['’]re) (?:(?:very |so |truly )?sorry|afraid|unable|not able|not allowed)"
    r"|sorry\b|i apologi[sz]e|unfortunately,? (?:i|we)\b|as an? (?:ai|artificial|language model|assistant)"
    r"|(?:i|we) (?:can ?not|can['’]t|could not|couldn['’]t|won['’]t|will not|must decline|have to decline)\b"
    r"|(?:i|we) (?:do not|don['’]t) (?:feel comfortable|have (?:the ability|access)))"
)
ENDS = re.compile(r"[.!?…。！？:;)\]}\"'”’`*>|]\s*$")


def is_refusal(text: str) -> bool:
    """Whether an answer begins as refusals do, in English."""
    return bool(REFUSAL.match(text))


def is_uncut(answer: str, reference: str) -> bool:
    """Whether an answer does not stop in the middle: no code fence is open, and it ends with a mark if the reference
    does."""
    return answer.count("```") % 2 == 0 and bool(ENDS.search(answer) or not ENDS.search(reference))


def answered(rows: Sequence[EvalRow]) -> list[float | None]:
    """Share of answers that are not empty (white space does not count)."""
    return [float(bool((row.output or "").strip())) for row in rows]


def ended(rows: Sequence[EvalRow]) -> list[float | None]:
    """Share of answers that the model ended by itself, with its end-of-turn token, before the longest length."""
    return [float(row.finish_reason == "stop") for row in rows]


def uncut(rows: Sequence[EvalRow]) -> list[float | None]:
    """Share of answers that do not stop in the middle by their text.

    No code fence is left open, and the answer ends with a punctuation mark where its reference does.
    """
    return [float(is_uncut(row.output or "", row.reference)) for row in rows]


def not_refused(rows: Sequence[EvalRow]) -> list[float | None]:
    """Share of answers that do not begin as refusals do (`I'm sorry`, `I cannot`, `As an AI`), in English wording.

    An answer whose reference refuses as well counts as none.
    """
    return [float(not is_refusal(row.output or "") or is_refusal(row.reference)) for row in rows]


def completed(rows: Sequence[EvalRow]) -> list[float | None]:
    """Share of answers that are not empty, ended by themselves, are not cut and do not refuse.

    The four rates answered, ended, uncut and not_refused, all at once for each answer.
    """
    parts = zip(answered(rows), ended(rows), uncut(rows), not_refused(rows), strict=True)
    return [float(all(found)) for found in parts]
