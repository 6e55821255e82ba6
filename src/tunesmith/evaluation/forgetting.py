"""What a model forgot while it learned: bits per byte on a frozen sample of general text, base against tuned.

The sample (`assets/general.jsonl`) is 48 short texts of many kinds, written for this: prose, letters, questions, code,
tables, sums, four languages. It never changes, so that runs can be compared. It is small: it shows whether a model
lost much, not what.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tunesmith.assets import GENERAL
from tunesmith.data.examples import Row, Text
from tunesmith.evaluation.compare import compare, difference_shown, shown
from tunesmith.evaluation.metrics import METRICS
from tunesmith.evaluation.rows import EvalRow

METRIC = "bits_per_byte"


def general_texts() -> list[Text]:
    """The frozen sample."""
    lines = GENERAL.read_text(encoding="utf-8").splitlines()
    return [Text(json.loads(line)["text"], Row(GENERAL.name, n)) for n, line in enumerate(lines, start=1)]


def forgotten(
    general: tuple[Sequence[EvalRow], Sequence[EvalRow]],
    domain: tuple[Sequence[EvalRow], Sequence[EvalRow]],
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Base against tuned on general text and on the held-out examples, as comparisons of bits per byte, and what they
    come to in a sentence. `domain` is None in it where the held-out examples have no likelihoods."""
    options: dict[str, Any] = {"metrics": [METRIC], "resamples": resamples, "confidence": confidence}
    [on_general] = compare(*general, **options)
    [on_domain] = compare(*domain, **options)
    metric = METRICS[METRIC]
    verdict = {"worse": "It forgot", "better": "It gained there as well"}.get(
        on_general.verdict, "No evidence that it forgot"
    )
    sentence = (
        f"{verdict}: on {on_general.n} general texts it was not tuned on, {metric.label} went from "
        f"{shown(on_general.base, metric)} to {shown(on_general.tuned, metric)}, {difference_shown(on_general)}"
    )
    if on_domain.n:
        sentence += f"; on the held-out examples {difference_shown(on_domain)}"
    return {
        "general": asdict(on_general),
        "domain": asdict(on_domain) if on_domain.n else None,
        "sentence": sentence + ". Less is better.",
    }
