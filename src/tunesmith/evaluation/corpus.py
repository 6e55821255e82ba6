"""BLEU and chrF of a whole set, as sacrebleu computes them: from counts of every row, added up.

The mean of sentence scores is another number. What sacrebleu counts of a row is its own; the value of added counts is
computed here for many resamples at once, and is sacrebleu's to the last digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tunesmith.data.examples import Prompt

if TYPE_CHECKING:
    from tunesmith.evaluation.rows import EvalRow


@lru_cache
def _scorer(order: int | None) -> Any:
    """sacrebleu's BLEU of words up to `order`, or its chrF for None."""
    from sacrebleu import BLEU, CHRF

    return CHRF() if order is None else BLEU(max_ngram_order=order, force=True)


@lru_cache
def _sentence_scorer(order: int | None) -> Any:
    from sacrebleu import BLEU

    return _scorer(None) if order is None else BLEU(max_ngram_order=order, effective_order=True)


def _sentence(order: int | None, completion: str, reference: str) -> float:
    return float(_sentence_scorer(order).sentence_score(completion, [reference]).score) / 100


def sentence_bleu(prompt: Prompt, completion: str, reference: str) -> float:
    """BLEU of up to four words, one answer at a time, mean over answers (effective order, exponential smoothing, as of
    sacrebleu). BLEU as published is that of the whole set: bleu."""
    return _sentence(4, completion, reference)


def sentence_chrf(prompt: Prompt, completion: str, reference: str) -> float:
    """chrF of one answer at a time, mean over answers (as of sacrebleu). The one of the whole set is chrf."""
    return _sentence(None, completion, reference)


def sentence_score(order: int | None) -> Any:
    """The score of one answer by itself: BLEU of words up to `order`, or chrF for None."""

    def score(prompt: Prompt, completion: str, reference: str) -> float:
        return _sentence(order, completion, reference)

    return score


def tally(order: int | None) -> Any:
    """Counts of each row, as sacrebleu takes them: of BLEU the lengths of answer and reference, then right and given
    n-grams by order; of chrF for each order the n-grams of answer and reference and those in both."""

    def counts(rows: Sequence[EvalRow]) -> Any:
        import numpy as np

        said, wanted = [row.output or "" for row in rows], [row.reference for row in rows]
        return np.array(_scorer(order)._extract_corpus_statistics(said, [wanted]), dtype=float)

    return counts


def signature(order: int | None) -> Any:
    """sacrebleu's own account of how it counts."""

    def said() -> str:
        scorer = _scorer(order)
        scorer.corpus_score(["a"], [["a"]])  # before which it does not know how many references there are
        words = "" if order in (None, 4) else f", words up to {order}"
        return f"sacrebleu {scorer.get_signature()}{words}"

    return said


def bleu(sums: Any) -> Any:
    """BLEU of the whole set: the geometric mean of the shares of right n-grams, times the brevity penalty (Papineni et
    al. 2002, as sacrebleu's corpus_bleu: exponential smoothing; its signature stands with the interval).

    Right n-grams and lengths are added up over rows before anything is divided. A row's own score is its sentence's.
    """
    import numpy as np

    sums = np.asarray(sums, dtype=float)
    order = (sums.shape[-1] - 2) // 2
    said, wanted = sums[..., 0], sums[..., 1]
    right, given = sums[..., 2 : 2 + order], sums[..., 2 + order :]
    missed = (right == 0) & (given > 0)
    halved = 2.0 ** np.cumsum(missed, axis=-1)
    shares = np.where(missed, 1 / halved, right) / np.where(given > 0, given, 1)
    scored = (given > 0).all(-1) & (right > 0).any(-1)
    logs = np.log(np.where(shares > 0, shares, 1)).mean(-1)
    brevity = np.minimum(0.0, 1 - wanted / np.where(said > 0, said, 1))
    return np.where(scored, np.exp(logs + brevity), 0.0)


def chrf(sums: Any) -> Any:
    """chrF of the whole set: F2 of shared strings of one to six characters, white space apart (Popović 2015, as
    sacrebleu's corpus_chrf; its signature stands with the interval).

    It needs no words, so that it holds in every script. A row's own score is its sentence's.
    """
    import numpy as np

    sums = np.asarray(sums, dtype=float)
    parts = sums.reshape(*sums.shape[:-1], -1, 3)
    said, wanted, shared = parts[..., 0], parts[..., 1], parts[..., 2]
    used = (said > 0) & (wanted > 0)
    orders = np.maximum(used.sum(-1), 1)
    precision, recall = (
        (np.where(used, shared, 0) / np.where(used, of, 1)).sum(-1) / orders for of in (said, wanted)
    )
    below = 4 * precision + recall
    return np.where(below > 0, 5 * precision * recall / np.where(below > 0, below, 1), 0.0)
