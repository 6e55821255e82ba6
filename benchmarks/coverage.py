#!/usr/bin/env python
"""How often the intervals of comparisons hold the truth: nominal 95 % has to be 93.5 to 96.5 % in simulation.

    PYTHONPATH=src python benchmarks/coverage.py [--trials 4000] [--resamples 1000]

Each case draws held-out items of two models from a known distribution, lets `tunesmith.evaluation.compare` set them
against one another as a user's rows are, and counts how often the interval of the difference holds the true one.
Cases: right-or-wrong answers with few and with many questions that change sides; graded differences that are normal,
of three levels, and skewed; groups that are equal and of unequal sizes; perplexity, which is a ratio of sums; BLEU and
macro F1, which are statistics of summed counts, whose truth is that of 20,000 drawn items; the metrics that are one
number of all answers, which have to give no interval (`none`); and as negative control groups that are told to be
independent items, which has to fail. The standard error of a share of 4,000 trials is 0.34 points.
The last line is one JSON object: the share of cases that hold; there is no peer.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tunesmith.evaluation.compare import Comparison, compare
from tunesmith.evaluation.metrics import METRICS
from tunesmith.evaluation.rows import EvalRow

LOW, HIGH = 0.935, 0.965

Drawn = tuple[Any, Any, list[str] | None]
"""Values of base and tuned model, and groups."""


def row(item: int, name: str, group: str | None, **fields: Any) -> EvalRow:
    """A row of which only what is compared matters."""
    values: dict[str, Any] = {
        "model": name, "item": item, "source_row": "", "group": group, "turn": 0, "sample": 0, "prompt_sha256": "",
        "prompt_text": "", "reference": "", "output": None, "finish_reason": None, "generation": {}, "scores": {},
        "nll": None, "tokens": None, "correct": None, "status": "ok",
    }  # fmt: skip
    return EvalRow(**(values | fields))


def binary(n: int, better: float, worse: float) -> tuple[Callable[[Any], Drawn], float]:
    """Questions that the tuned model alone answers rightly with the one chance, the base alone with the other."""

    def draw(random: Any) -> Drawn:
        kind = random.choice(4, size=n, p=[better, worse, (1 - better - worse) / 2, (1 - better - worse) / 2])
        return np.isin(kind, (1, 2)).astype(float), np.isin(kind, (0, 2)).astype(float), None

    return draw, better - worse


def normal(n: int) -> tuple[Callable[[Any], Drawn], float]:
    """Graded scores whose differences are normal."""
    return lambda random: (np.zeros(n), random.normal(0.1, 0.3, n), None), 0.1


def levels(n: int) -> tuple[Callable[[Any], Drawn], float]:
    """Win, tie or loss."""
    return lambda random: (np.full(n, 0.5), random.choice([0.0, 0.5, 1.0], n, p=[0.2, 0.4, 0.4]), None), 0.1


def skewed(n: int) -> tuple[Callable[[Any], Drawn], float]:
    """Most answers change little, a few much."""
    return lambda random: (np.zeros(n), random.gamma(1.0, 0.2, n), None), 0.2


def clustered(groups: int, size: int, *, equal: bool = True) -> tuple[Callable[[Any], Drawn], float]:
    """Groups whose questions share most of their difference (intra-class correlation 0.5)."""

    def draw(random: Any) -> Drawn:
        sizes = np.full(groups, size) if equal else 1 + random.poisson(size - 1, groups)
        effect = np.repeat(random.normal(0.1, 0.25, groups), sizes)
        values = effect + random.normal(0, 0.25, len(effect))
        return np.zeros(len(values)), values, [f"g{g}" for g in np.repeat(np.arange(groups), sizes)]

    return draw, 0.1


def clustered_binary(groups: int, size: int) -> tuple[Callable[[Any], Drawn], float]:
    """Right-or-wrong answers whose chances differ from group to group."""

    def draw(random: Any) -> Drawn:
        base, gain = random.beta(2, 2, groups) * 0.6, random.beta(2, 2, groups) * 0.4
        before, after = np.repeat(base, size), np.repeat(base + gain, size)
        chance = random.random(groups * size)
        other = np.where(random.random(groups * size) < 0.7, chance, random.random(groups * size))
        names = [f"g{g}" for g in np.repeat(np.arange(groups), size)]
        return (chance < before).astype(float), (other < after).astype(float), names

    return draw, 0.2


def measured(
    draw: Callable[[Any], Drawn], truth: float, *, trials: int, resamples: int, blind: bool = False
) -> float:
    """Share of trials whose interval holds the truth; `blind` forgets the groups."""
    covered = 0
    for trial in range(trials):
        base, tuned, groups = draw(np.random.default_rng(trial))
        known = [None] * len(base) if blind or groups is None else groups
        sides = [
            [row(n, name, known[n], scores={"exact_match": float(v)}) for n, v in enumerate(values)]
            for name, values in (("base", base), ("tuned", tuned))
        ]
        [found] = compare(*sides, metrics=["exact_match"], resamples=resamples, seed=trial)
        assert found.low is not None
        assert found.high is not None
        covered += found.low - 1e-12 <= truth <= found.high + 1e-12
    return covered / trials


def perplexity(n: int, *, trials: int, resamples: int) -> float:
    """The same for a ratio of sums whose items differ in length."""
    truth, covered = math.exp(1.8) - math.exp(2.0), 0
    for trial in range(trials):
        random = np.random.default_rng(trial)
        tokens = 1 + random.poisson(20, n)
        base = tokens * 2.0 + np.sqrt(tokens) * random.normal(0, 1, n)
        tuned = base - tokens * 0.2 + np.sqrt(tokens) * random.normal(0, 0.4, n)
        sides = [
            [row(i, name, None, nll=float(v), tokens=int(t)) for i, (v, t) in enumerate(zip(values, tokens))]
            for name, values in (("base", base), ("tuned", tuned))
        ]
        [found] = compare(*sides, metrics=["perplexity"], resamples=resamples, seed=trial)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= truth <= found.high
    return covered / trials


def answers(n: int, random: Any) -> tuple[list[str], list[str], list[str]]:
    """References of ten words, and answers of two models that hit each word more or less often."""
    words = np.array([f"word{at}" for at in range(40)])
    wanted = random.choice(words, (n, 10))
    said = [
        np.where(random.random((n, 10)) < hit, wanted, random.choice(words, (n, 10))) for hit in (0.6, 0.75)
    ]
    base, tuned, references = ([" ".join(line) for line in lines] for lines in (*said, wanted))
    return base, tuned, references


def labels(n: int, random: Any) -> tuple[list[str], list[str], list[str]]:
    """Three labels of unequal shares, and two models that are right more or less often."""
    names = np.array(["no", "yes", "maybe"])
    wanted = random.choice(names, n, p=[0.5, 0.3, 0.2])
    said = [np.where(random.random(n) < right, wanted, random.choice(names, n)) for right in (0.5, 0.65)]
    return list(said[0]), list(said[1]), list(wanted)


WRITTEN: dict[str, tuple[str, Callable[[int, Any], tuple[list[str], list[str], list[str]]], int]] = {
    "BLEU n=100": ("bleu", answers, 100),
    "macro F1 n=150": ("macro_f1", labels, 150),
}
OF_SET = [name for name, metric in METRICS.items() if metric.of_set]


def written(
    metric: str,
    draw: Callable[[int, Any], tuple[list[str], list[str], list[str]]],
    n: int,
    trials: int,
    resamples: int,
) -> float | None:
    """The same for a metric of texts; None where it gives no interval."""

    def found(size: int, seed: int, times: int) -> Comparison:
        base, tuned, wanted = draw(size, np.random.default_rng(seed))
        sides = [
            [
                row(at, name, None, scores={metric: 0.0}, output=text, reference=wanted[at])
                for at, text in enumerate(texts)
            ]
            for name, texts in (("base", base), ("tuned", tuned))
        ]
        return compare(*sides, metrics=[metric], resamples=times, seed=seed)[0]

    truth, covered = found(20_000, 10**6, 10).difference, 0
    for trial in range(trials):
        one = found(n, trial, resamples)
        if one.low is None or one.high is None:
            return None
        covered += one.low <= truth <= one.high
    return covered / trials


CASES: dict[str, tuple[Callable[[Any], Drawn], float]] = {
    "binary n=50, 20 % discordant": binary(50, 0.15, 0.05),
    "binary n=100, 20 % discordant": binary(100, 0.15, 0.05),
    "binary n=500, 20 % discordant": binary(500, 0.15, 0.05),
    "binary n=100, 40 % discordant": binary(100, 0.3, 0.1),
    "binary n=200, 10 % discordant, no difference": binary(200, 0.05, 0.05),
    "graded normal n=20": normal(20),
    "graded normal n=100": normal(100),
    "graded three levels n=40": levels(40),
    "graded three levels n=200": levels(200),
    "graded skewed n=50": skewed(50),
    "graded skewed n=200": skewed(200),
    "clustered 20 groups of 5": clustered(20, 5),
    "clustered 50 groups of 10": clustered(50, 10),
    "clustered 40 groups of about 6": clustered(40, 6, equal=False),
    "clustered binary 25 groups of 4": clustered_binary(25, 4),
    "clustered binary 60 groups of 5": clustered_binary(60, 5),
}


def main() -> None:
    """Measure every case; exit 1 where one falls outside, or the negative control inside."""
    options = argparse.ArgumentParser()
    options.add_argument("--trials", type=int, default=4000)
    options.add_argument("--resamples", type=int, default=1000)
    options.add_argument("--only", default="", help="cases whose name contains this")
    given = options.parse_args()
    known = [*CASES, "perplexity n=100", *WRITTEN, *OF_SET]
    chosen = [name for name in known if given.only in name]
    if not chosen:
        options.error(f"no case's name contains '{given.only}'; known are: {'; '.join(known)}")
    limits = {"trials": given.trials, "resamples": given.resamples}
    started, found = time.perf_counter(), dict[str, float]()
    wrong = []
    for name in chosen:
        share: float | None
        if name in CASES:
            share = measured(*CASES[name], **limits)
        elif name in WRITTEN:
            share = written(*WRITTEN[name], **limits)
        elif name in OF_SET:
            share = written(name, answers, 60, 1, given.resamples)
        else:
            share = perplexity(100, **limits)
        print(f"{name:<48}{'none' if share is None else f'{share:.2%}'}", flush=True)
        if share is not None:
            found[name] = share
        if (share is None) != (name in OF_SET):
            wrong.append(name)
    draw, truth = clustered(20, 5)
    control = measured(draw, truth, **{**limits, "trials": max(given.trials // 10, 50)}, blind=True)
    outside = [*wrong, *(name for name, share in found.items() if not LOW <= share <= HIGH)]
    seconds = time.perf_counter() - started
    print(f"outside: {outside or 'none'}; negative control {control:.2%}; {seconds:.0f} s", file=sys.stderr)
    print(
        json.dumps(
            {
                "name": "coverage",
                "ours": round(1 - len(outside) / len(chosen), 3),
                "peer": None,
                "ratio": None,
                "unit": f"share of cases with {LOW:.1%} to {HIGH:.1%} coverage",
                "n": given.trials,
            }
        )
    )
    sys.exit(1 if outside or control > 0.9 else 0)


if __name__ == "__main__":
    main()
