"""Answers that are labels: which label an answer gives, and how the labels given go with the right ones.

The labels are those that occur among the references of a set. An answer that gives none of them is a class of its
own, wrong in every measure and seen in the confusion matrix.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.data.examples import Prompt

if TYPE_CHECKING:
    from tunesmith.evaluation.rows import EvalRow

MAX_LABELS = 20
MAX_WORDS = 5
PER_LABEL = 5
"""Questions per label that a set has on average, or it is no classification."""
BINS = 10
UNPARSED = "(none of them)"


def label(text: str) -> str:
    """A label without case, white space and punctuation at its ends."""
    return re.sub(r"\s+", " ", text).strip(" \t\n.,;:!?\"'`*()[]<>").casefold()


def is_label(prompt: Prompt) -> bool:
    """Whether the reference could be a label: one line of at most five words."""
    reference = prompt.reference.strip()
    return bool(label(reference)) and "\n" not in reference and len(reference.split()) <= MAX_WORDS


def labels_of(references: Sequence[str]) -> dict[str, str]:
    """The labels among references, the most frequent first, each with its most frequent spelling."""
    spellings: dict[str, Counter[str]] = {}
    for reference in references:
        spellings.setdefault(label(reference), Counter())[reference.strip()] += 1
    ordered = sorted(spellings, key=lambda name: (-spellings[name].total(), name))
    return {name: spellings[name].most_common(1)[0][0] for name in ordered}


def are_labels(references: Sequence[str]) -> bool:
    """Whether references are few labels that occur often: a classification."""
    labels = labels_of(references)
    short = all("\n" not in r.strip() and 0 < len(r.split()) <= MAX_WORDS for r in references)
    return short and 2 <= len(labels) <= MAX_LABELS and len(references) >= PER_LABEL * len(labels)


def parsed(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer gives: the one it consists of, else the first that it mentions as whole words (of
    two at one place the longer one); None where it gives none."""
    if label(answer) in labels:
        return label(answer)
    text = re.sub(r"\s+", " ", answer).casefold()
    found = [
        (match.start(), -len(name), name)
        for name in labels
        if (match := re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text))
    ]
    return min(found)[2] if found else None


def is_right(rows: Sequence[EvalRow]) -> list[float | None]:
    """Share of answers that give the right label, unparsed ones counted as wrong.

    An answer gives the label that it consists of, else the first that it mentions; case and punctuation at the
    ends do not count. The labels are those among the references of the set.
    """
    labels = list(labels_of([row.reference for row in rows]))
    return [float(parsed(row.output or "", labels) == label(row.reference)) for row in rows]


def tally(rows: Sequence[EvalRow]) -> Any:
    """One line per row: a flat matrix of right label by given one (the last column for none), 1 at its place."""
    import numpy as np

    labels = list(labels_of([row.reference for row in rows]))
    place = {name: number for number, name in enumerate(labels)}
    size = len(labels)
    found = np.zeros((len(rows), size * (size + 1)))
    for line, row in enumerate(rows):
        given = place.get(parsed(row.output or "", labels) or "", size)
        found[line, place[label(row.reference)] * (size + 1) + given] = 1
    return found


def _matrix(sums: Any) -> Any:
    """Sums of tallies as matrices, right label by given one."""
    import numpy as np

    sums = np.asarray(sums, dtype=float)
    size = round((math.sqrt(1 + 4 * sums.shape[-1]) - 1) / 2)
    return sums.reshape(*sums.shape[:-1], size, size + 1)


def balanced_accuracy(sums: Any) -> Any:
    """Mean over labels of the share of their questions that got them (Brodersen et al. 2010).

    0.5 for a coin on two labels, whatever their shares. Parsing as for label_accuracy.
    """
    matrix = _matrix(sums)
    right, asked = matrix.diagonal(axis1=-2, axis2=-1), matrix.sum(-1)
    return _mean_of_asked(right / asked.clip(1), asked)


def macro_f1(sums: Any) -> Any:
    """Mean over labels of F1 of giving them: 2 x right / (asked for + given) (Lewis et al. 1996).

    Each label weighs the same, however rare. Parsing as for label_accuracy.
    """
    matrix = _matrix(sums)
    right, asked = matrix.diagonal(axis1=-2, axis2=-1), matrix.sum(-1)
    given = matrix[..., :-1].sum(-2)
    return _mean_of_asked(2 * right / (asked + given).clip(1), asked)


def _mean_of_asked(values: Any, asked: Any) -> Any:
    """The mean over labels that occur; a resample may lack some."""
    occur = asked > 0
    return (values * occur).sum(-1) / occur.sum(-1).clip(1)


def mcc(sums: Any) -> Any:
    """Correlation of given and right labels, -1 to 1 (Matthews 1975; for several labels Gorodkin 2004).

    0 for chance and for always the same label. No label counts as one of its own. Parsing as for label_accuracy.
    """
    import numpy as np

    matrix = _matrix(sums)
    total, right = matrix.sum((-2, -1)), matrix.diagonal(axis1=-2, axis2=-1).sum(-1)
    asked, given = matrix.sum(-1), matrix.sum(-2)
    covariance = right * total - (asked * given[..., :-1]).sum(-1)
    spread = (total**2 - (asked**2).sum(-1)) * (total**2 - (given**2).sum(-1))
    return np.where(spread > 0, covariance / np.sqrt(np.maximum(spread, 1e-300)), 0.0)


def accuracy(sums: Any) -> Any:
    """Right ones / all, from sums of tallies."""
    matrix = _matrix(sums)
    return matrix.diagonal(axis1=-2, axis2=-1).sum(-1) / matrix.sum((-2, -1)).clip(1)


def brier(rows: Sequence[EvalRow]) -> list[float | None]:
    """Sum over labels of (probability - 1 if right else 0) squared, 0 to 2 (Brier 1950); lower is better.

    Probabilities are those that the model gives to each label as the whole answer, normalised over the labels.
    """
    return [
        sum((p - (name == label(row.reference))) ** 2 for name, p in row.label_probs.items())
        if row.label_probs
        else None
        for row in rows
    ]


def ranked(rows: Sequence[EvalRow]) -> list[float | None]:
    """Share of questions whose right label is the likeliest of all labels, taken as whole answers.

    It needs no parsing, but it is not what users see; label_accuracy is.
    """
    return [
        float(max(row.label_probs, key=lambda name: row.label_probs[name]) == label(row.reference))
        if row.label_probs
        else None
        for row in rows
    ]


def calibration_tally(rows: Sequence[EvalRow]) -> Any:
    """One line per row: in the bin of its likeliest label's probability 1, that probability, and 1 if it is right."""
    import numpy as np

    found = np.zeros((len(rows), 3 * BINS))
    for line, row in enumerate(rows):
        if row.label_probs:
            name, p = max(row.label_probs.items(), key=lambda pair: pair[1])
            place = 3 * max(0, min(BINS - 1, math.ceil(p * BINS) - 1))
            found[line, place : place + 3] = 1, p, name == label(row.reference)
    return found


def calibration_error(sums: Any) -> Any:
    """Mean gap between how sure the model is of its likeliest label and how often that is right.

    Expected calibration error over ten bins of equal width, (0, 0.1] to (0.9, 1] (Guo et al. 2017, arXiv
    1706.04599); lower is better. Probabilities as for brier.
    """
    import numpy as np

    sums = np.asarray(sums, dtype=float)
    parts = sums.reshape(*sums.shape[:-1], BINS, 3)
    count, sure, right = parts[..., 0], parts[..., 1], parts[..., 2]
    return np.abs(sure - right).sum(-1) / np.maximum(count.sum(-1), 1)


@dataclass(frozen=True)
class Classification:
    """How one model's labels go with the right ones."""

    labels: tuple[str, ...]
    matrix: tuple[tuple[int, ...], ...]
    """Questions by right label (lines) and given one (columns, the last for none)."""
    n: int
    unparsed: int
    majority: str
    majority_share: float
    """What always giving the most frequent label would get right."""

    def sentence(self) -> str:
        """The majority baseline and what could not be parsed, for people."""
        said = f"always answering {self.majority!r} would be right for {100 * self.majority_share:.1f} % of {self.n}"
        return f"{said}; {self.unparsed} answers give none of the labels" if self.unparsed else said


def classification(rows: Sequence[EvalRow]) -> Classification | None:
    """The confusion matrix of one model's answers; None where the references are no labels."""
    rows = [row for row in rows if row.output is not None]
    if not rows or not are_labels([row.reference for row in rows]):
        return None
    labels = labels_of([row.reference for row in rows])
    matrix = _matrix(tally(rows).sum(0)).astype(int)
    return Classification(
        tuple(labels.values()),
        tuple(tuple(int(count) for count in line) for line in matrix),
        len(rows),
        int(matrix[:, -1].sum()),
        next(iter(labels.values())),
        float(matrix.sum(1).max() / len(rows)),
    )
