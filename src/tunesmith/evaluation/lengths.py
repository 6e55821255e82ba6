"""Whether a reward model's scores follow the length of answers, which a policy trained on them would exploit.

arXiv 2310.03716 found that much of what is gained by reinforcement learning from preferences is length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.evaluation.rows import EvalRow

STRONG = 0.5
"""From this rank correlation on, of either sign, it is said."""
LEAST = 10
"""Fewer pairs say nothing about it."""


@dataclass(frozen=True)
class LengthBias:
    """How scores go with lengths, over both answers of all pairs."""

    correlation: float
    """Spearman's, of score and tokens of an answer."""
    answers: int
    pairs: int
    """Pairs whose answers differ in length."""
    longer_better: int
    """Those of them whose longer answer is the better one."""
    right_longer: int
    """Those of the latter that are ranked rightly."""
    right_shorter: int

    def sentence(self, name: str = "the model") -> str:
        """What was measured, for people."""
        shorter = self.pairs - self.longer_better
        return (
            f"Scores of {name} {'rise' if self.correlation > 0 else 'fall'} with an answer's length: rank correlation "
            f"{self.correlation:+.2f} over {self.answers} held-out answers. The longer answer is the better one in "
            f"{self.longer_better} of {self.pairs} pairs; ranked rightly are {self.right_longer} of these, and "
            f"{self.right_shorter} of the {shorter} whose shorter answer is better."
        )

    @property
    def is_strong(self) -> bool:
        """Whether it is to be warned of."""
        return abs(self.correlation) >= STRONG


def length_bias(rows: Sequence[EvalRow]) -> LengthBias | None:
    """The bias of one model's rows; None where they have no scores, or too few, or all the same."""
    from scipy.stats import spearmanr

    found = [
        (row.score, row.rejected_score, row.tokens, row.rejected_tokens)
        for row in rows
        if row.score is not None
        and row.rejected_score is not None
        and row.tokens is not None
        and row.rejected_tokens is not None
    ]
    scores = [value for better, worse, _, _ in found for value in (better, worse)]
    lengths = [value for _, _, better, worse in found for value in (better, worse)]
    if len(found) < LEAST or len(set(scores)) == 1 or len(set(lengths)) == 1:
        return None
    correlation = float(spearmanr(scores, lengths).statistic)
    if not math.isfinite(correlation):
        return None
    apart = [pair for pair in found if pair[2] != pair[3]]
    longer = [pair for pair in apart if pair[2] > pair[3]]
    shorter = [pair for pair in apart if pair[2] < pair[3]]
    return LengthBias(
        correlation=correlation,
        answers=len(scores),
        pairs=len(apart),
        longer_better=len(longer),
        right_longer=sum(pair[0] > pair[1] for pair in longer),
        right_shorter=sum(pair[0] > pair[1] for pair in shorter),
    )
