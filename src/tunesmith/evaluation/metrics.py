"""Metrics: one signature, `(prompt, completion, reference) -> float`, pure, so that each can be a reward.

Two kinds stand beside each other in METRICS: those that score an answer, and those that are read off the
model's own probabilities of the reference (`score` is None; `evaluation.scores` sums them over tokens).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.data.examples import Prompt
from tunesmith.errors import RecipeError, nearest
from tunesmith.evaluation.sql import execution_match


@dataclass(frozen=True)
class Metric:
    """A measure of answers or of probabilities, and how to read it."""

    name: str
    about: str
    score: Callable[[Prompt, str, str], float] | None = None
    higher_is_better: bool = True
    is_share: bool = True
    """Whether values lie in [0, 1] and are shown in percent."""
    fits: Callable[[Prompt], bool] = lambda prompt: True


def sql_execution(prompt: Prompt, completion: str, reference: str) -> float:
    """1 where the query gives the same rows as the reference query on the row's own database."""
    checks = prompt.checks
    return float(execution_match(str(checks["schema"]), str(checks.get("setup", "")), completion, reference).match)


def exact_match(prompt: Prompt, completion: str, reference: str) -> float:
    """1 where answer and reference are the same text, runs of white space counted as one space."""
    return float(" ".join(completion.split()) == " ".join(reference.split()))


@functools.cache
def _rouge(kinds: tuple[str, ...]) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(kinds), use_stemmer=True)


def rouge(kind: str) -> Callable[[Prompt, str, str], float]:
    """The F measure of one ROUGE kind (Lin 2004), by google's rouge-score with stemming, from 0 to 1."""

    def score(prompt: Prompt, completion: str, reference: str) -> float:
        return float(_rouge((kind,)).score(reference, completion)[kind].fmeasure)

    return score


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric(
            "sql_execution",
            "Share of answers that, run on SQLite, give the same rows as the reference query; order counts where the "
            "reference orders (execution accuracy, Yu et al. 2018).",
            sql_execution,
            fits=lambda prompt: "schema" in prompt.checks,
        ),
        Metric("exact_match", "Share of answers equal to the reference, white space normalized.", exact_match),
        Metric("rougeL", "Longest common subsequence with the reference, F measure (Lin 2004), stemmed.", rouge("rougeL")),
        Metric("rouge1", "Overlap of words with the reference, F measure (Lin 2004), stemmed.", rouge("rouge1")),
        Metric("rouge2", "Overlap of word pairs with the reference, F measure (Lin 2004), stemmed.", rouge("rouge2")),
        Metric(
            "rougeLsum",
            "ROUGE-L line by line, F measure (Lin 2004), stemmed: for answers of several sentences, one a line.",
            rouge("rougeLsum"),
        ),
        Metric("token_accuracy", "Share of the reference's tokens that the model itself finds likeliest, given all before."),
        Metric(
            "perplexity",
            "exp(total negative log-likelihood / total tokens) of the references, token-weighted; lower is better.",
            higher_is_better=False,
            is_share=False,
        ),
    )
}
"""Metrics by name."""

ROUGES = ("rougeL", "rouge1", "rouge2", "rougeLsum")


def default_metrics(prompts: Sequence[Prompt], *, has_text: bool) -> list[str]:
    """The metrics that fit what is asked, the primary one first."""
    likelihood = ["token_accuracy", "perplexity"]
    if not prompts:
        return likelihood if has_text else []
    if all(METRICS["sql_execution"].fits(prompt) for prompt in prompts):
        return ["sql_execution", "exact_match", *likelihood]
    # Long answers are never reproduced word for word; short ones are better judged exactly.
    words = sorted(len(prompt.reference.split()) for prompt in prompts)[len(prompts) // 2]
    answer = ["exact_match", *ROUGES] if words <= 3 else [ROUGES[0], "exact_match", *ROUGES[1:]]
    return [*answer, *likelihood]


def known_metrics(names: Sequence[str]) -> list[str]:
    """The names, checked. Raises RecipeError with the nearest known one."""
    for name in names:
        if name not in METRICS:
            raise RecipeError(f"There is no metric '{name}'.", fix=nearest(name, METRICS))
    return list(dict.fromkeys(names))
