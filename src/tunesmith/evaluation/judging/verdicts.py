"""A judge's word, read strictly: the last mark on the final lines counts, and nothing else does.

A reply without one is an error: never a 0, never a tie, never left out unsaid.
"""

from __future__ import annotations

import re
from typing import Literal

from tunesmith.evaluation.instructions import THOUGHTS

Slot = Literal["A", "B", "tie"]
FINAL_LINES = 2
"""Lines at the end of a reply in which the verdict stands; what is quoted further up is reasoning."""
LOWEST, HIGHEST = 1.0, 10.0
RATING = re.compile(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]")
VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]", re.IGNORECASE)
SLOTS: dict[str, Slot] = {"A": "A", "B": "B", "C": "tie"}


def rating(reply: str) -> float | None:
    """The grade of `Rating: [[N]]`, from 1 to 10; None where there is none. `[1]` is a citation, not a grade."""
    found = RATING.findall(_end(reply))
    value = float(found[-1]) if found else None
    return value if value is not None and LOWEST <= value <= HIGHEST else None


def verdict(reply: str) -> Slot | None:
    """The slot of `Verdict: [[A]]`, `[[B]]` or `[[C]]` for neither; None where there is none."""
    found = VERDICT.findall(_end(reply))
    return SLOTS[found[-1].upper()] if found else None


def _end(reply: str) -> str:
    lines = [line for line in THOUGHTS.sub("", reply).splitlines() if line.strip()]
    return "\n".join(lines[-FINAL_LINES:])
