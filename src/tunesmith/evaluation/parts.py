"""Where a model got better: the primary metric by category, where rows have one, and by length of the question.

Parts are for looking where to look next: their p values are adjusted for their number (Holm 1979), and a part that
seems to differ among many is to be measured again on questions of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tunesmith.evaluation.compare import compare_all, holm
from tunesmith.evaluation.rows import EvalRow

CATEGORIES = (
    "category",
    "topic",
    "subject",
    "domain",
    "type",
    "question_type",
    "difficulty",
    "language",
    "task",
)
"""Columns that may say what kind of question a row is, in the order in which they are looked for."""
MOST = 20
"""Categories beyond this number are no parts to look at one by one."""
BANDS = 4
LEAST_IN_BAND = 5
RESAMPLES = 2000


def category_column(checks: Sequence[Mapping[str, Any]]) -> str | None:
    """The column that sorts the questions: 2 to 20 short texts, in at least half of the rows."""
    for name in CATEGORIES:
        values = [str(c[name]) for c in checks if isinstance(c.get(name), str | int) and str(c[name]).strip()]
        short = all(len(value) <= 60 for value in values)
        if 2 * len(values) >= len(checks) and short and 2 <= len(set(values)) <= MOST:
            return name
    return None


def bands(lengths: Mapping[int, int]) -> dict[int, str]:
    """Each item's band: quarters of the questions by their number of tokens; equal lengths share one."""
    ordered = sorted(lengths.values())
    if len(ordered) < BANDS * LEAST_IN_BAND:
        return {}
    limits = sorted({ordered[len(ordered) * n // BANDS - 1] for n in range(1, BANDS)})
    found = {}
    for item, length in lengths.items():
        place = sum(length > limit for limit in limits)
        low = ordered[0] if place == 0 else limits[place - 1] + 1
        high = ordered[-1] if place == len(limits) else limits[place]
        found[item] = f"{low} tokens" if low == high else f"{low} to {high} tokens"
    return found if len(set(found.values())) > 1 else {}


def parts(
    base_rows: Sequence[EvalRow],
    tuned_rows: Sequence[EvalRow],
    metric: str,
    *,
    categories: Mapping[int, str],
    lengths: Mapping[int, int],
    confidence: float = 0.95,
) -> list[dict[str, Any]]:
    """The comparison on each category and on each band of lengths; `categories` and `lengths` are by item."""
    found: list[dict[str, Any]] = []
    in_order = bands(lengths)
    by_length = sorted(set(in_order.values()), key=lambda name: int(name.split()[0]))
    for kind, of, names in (
        ("category", categories, sorted(set(categories.values()))),
        ("length", in_order, by_length),
    ):
        compared = []
        for name in names:
            sides = [[r for r in rows if of.get(r.item) == name] for rows in (base_rows, tuned_rows)]
            if all(sides):
                [one] = compare_all(
                    [("base", sides[0]), ("tuned", sides[1])],
                    metrics=[metric],
                    resamples=RESAMPLES,
                    confidence=confidence,
                )
                compared.append((name, one))
        adjusted = holm([c.p_value if c.p_value is not None else 1.0 for _, c in compared])
        for (name, one), p in zip(compared, adjusted, strict=True):
            facts = {**asdict(one), "p_value": p, "model": "tuned", "against": "base", "remarks": ()}
            if facts["verdict"] in ("better", "worse") and p > 1 - confidence:
                facts["verdict"] = "no evidence"
            found.append({"by": kind, "name": name, "comparison": facts})
    return found
