"""Whether the tuned model is better than the base: paired differences, their intervals, a computed verdict.

Both models answered the same questions, so differences are taken question by question, over the mean of the
attempts at each, and rows that ask the same are attempts at one question; questions that belong together (one
database, one document) are resampled together. Every statistic is made of sums over questions: scores over counts,
losses over tokens, or what a metric's `statistic` makes of its `tally`, as BLEU of counted words.

Where no two resamples could differ (all questions score alike, or there is one group) a bootstrap knows nothing. Then
right-or-wrong scores have Wilson's interval and Tango's of differences, over groups; others have no interval. Nor have
metrics that are one number of all answers, such as how many of them differ: their rows' shares hang on one another, so
that a bootstrap of them holds the truth in 84 % of simulations or in all, and a jackknife in 90 to 99 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tunesmith.errors import RecipeError, RunError
from tunesmith.evaluation.lengths import length_bias
from tunesmith.evaluation.metrics import METRICS, Metric, known_metrics, primary_metric
from tunesmith.evaluation.power import (
    DEVIATION,
    DISCORDANCE,
    detectable_mean,
    detectable_share,
    paired_shares,
    spread_of,
)
from tunesmith.evaluation.rows import Asked, EvalRow, Key, asked_in
from tunesmith.evaluation.tasks import repeated, words

Verdict = Literal["better", "worse", "no evidence", "inconclusive"]

MIN_ITEMS = 10
MIN_GROUPS = 5
MAX_ERROR_SHARE = 0.02
LARGE_SHARE = 0.2
"""From this share of a model's answers on, that they are empty, cut off or repeat themselves is said."""
LOOPING = 0.5
"""An answer repeats itself where at least this share of its word trigrams has come before in it."""
MIN_DISCORDANT = 6
"""With fewer questions that only one model answers rightly, an exact McNemar test cannot fall below .05."""

OF_SET = "it is one number of all answers, and no interval that was tried holds it as often as it says"


@dataclass(frozen=True)
class Comparison:
    """Base against tuned on one metric. Differences are tuned minus base, in the metric's own scale."""

    metric: str
    base: float
    tuned: float
    difference: float
    low: float | None
    """The interval's lower end; None where there is no interval, since no two resamples could differ."""
    high: float | None
    confidence: float
    n: int
    """Different questions, of each of which the attempts are averaged first."""
    groups: int
    """Independent groups behind the interval; n where every question stands alone."""
    p_value: float | None
    """Of no difference, two-sided; Holm-adjusted unless primary; None where nothing could be compared."""
    wins: int
    """Items on which the tuned model is better."""
    ties: int
    losses: int
    verdict: Verdict
    reason: str
    method: str
    higher_is_better: bool
    primary: bool
    remarks: tuple[str, ...] = ()
    """What the answers look like, where that bears on the verdict; with the primary metric only."""
    p_alone: float | None = None
    """The p value before it was adjusted for the number of comparisons."""
    assumed_detectable: float | None = None
    """The true difference that so many questions, or groups of them, find four times in five, as assumed before the
    run (power.py); None for likelihoods and for metrics without a scale from 0 to 1."""
    detectable: float | None = None
    """The same from the differences that were observed; None where none was."""
    model: str = "tuned"
    against: str = "base"


@dataclass(frozen=True)
class Score:
    """One model on one metric."""

    value: float | None
    n: int
    """Different questions, of each of which the attempts are averaged first."""
    n_errors: int
    """Questions with an answer that could not be scored; they are left out."""
    low: float | None
    high: float | None
    groups: int
    method: str
    cause: str = ""
    """Why answers could not be scored, the most frequent reason, with the first row of it; empty where all were."""


@dataclass(frozen=True)
class _Questions:
    """One model's questions on one metric, the attempts at each averaged: what the metric's value is made of."""

    lines: Any
    """One line for each question: sums of which `_value` makes the metric's value."""
    own: Any
    """Of each question its own score, or its loss."""
    groups: list[str]


@dataclass(frozen=True)
class _Pairs:
    """The questions on which both models have a value."""

    base: _Questions
    tuned: _Questions
    errors: int
    unpaired: int
    other_tokens: int
    """Questions that the two models were given as different tokens, by another tokenizer or template."""

    @property
    def is_binary(self) -> bool:
        """Whether every question is right or wrong with both models, for a metric that is the mean of that."""
        return _is_binary(self.base.own) and _is_binary(self.tuned.own)


def compare(
    base_rows: Sequence[EvalRow],
    tuned_rows: Sequence[EvalRow],
    *,
    metrics: Sequence[str],
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    primary: str | None = None,
    names: tuple[str, str] = ("the base", "the tuned model"),
    apart: str = "another tokenizer, chat template or source prefix",
) -> list[Comparison]:
    """Base against tuned, metric by metric, from their rows.

    `names` are those of the two models, and `apart` says why they may be given different tokens for the same
    question.

    The interval of right-or-wrong scores of items that stand alone is Tango's score interval (power.py), which
    holds where few or none differ. Of others it is an expanded percentile bootstrap (Hesterberg 2015, The American
    Statistician 69(4)) over items, or over groups where rows have them: percentiles are set outward by the t
    distribution, which mends the plain percentile interval's narrowness in small samples. p is McNemar's exact test
    for right-or-wrong scores, a paired t test for others, and the bootstrap's own under groups and for ratio
    statistics. `primary` names the metric on which the verdict rests, by default the first that scores answers; the
    p values of the others are adjusted for their number (Holm 1979), and their verdict needs both interval and p.

    Raises RunError where the two sets of rows do not answer the same questions. Models with tokenizers of
    their own see other tokens for the same words: their answers are compared, with a note, and their
    likelihoods are not, since these are per token.
    """
    found = compare_all(
        [(names[0], base_rows), (names[1], tuned_rows)],
        metrics=metrics,
        resamples=resamples,
        confidence=confidence,
        seed=seed,
        primary=primary,
        apart=[apart],
    )
    return [replace(c, model="tuned", against="base") for c in found]


def compare_all(
    models: Sequence[tuple[str, Sequence[EvalRow]]],
    *,
    metrics: Sequence[str],
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    primary: str | None = None,
    apart: Sequence[str] = (),
) -> list[Comparison]:
    """Every model against the first, metric by metric, from names and rows.

    As `compare`, with p adjusted over models as well: on the primary metric over the challengers, on the others over
    all metrics and challengers together, so that the chance of any false win on the primary metric stays at 1 minus
    `confidence`, however many models are compared. `apart` says of each challenger why it may see other tokens.
    """
    metrics = known_metrics(metrics)
    primary = _chosen_primary(metrics, primary)
    (first, base_rows), *challengers = models
    found = []
    for place, (name, own) in enumerate(challengers):
        _check_same_questions(base_rows, own)
        said = apart[place] if apart else "another tokenizer, chat template or source prefix"
        asked = asked_in(base_rows, own)
        copied = asked.sentence()
        remarks = tuple(
            ([copied] if copied else [])
            + _answers_look(base_rows, first)
            + _answers_look(own, name, closely=True)
            + _length_said(base_rows, first)
            + _length_said(own, name)
        )
        for metric in metrics:
            c = _compared(
                base_rows, own, METRICS[metric], resamples, confidence, seed, metric == primary, said, asked
            )
            found.append(replace(c, model=name, against=first, remarks=remarks if c.primary else ()))
    for is_primary in (True, False):
        family = [n for n, c in enumerate(found) if c.primary is is_primary and c.p_value is not None]
        if is_primary and len(family) == 1:
            continue
        adjusted = holm([found[n].p_value or 0.0 for n in family])
        for n, p in zip(family, adjusted, strict=True):
            found[n] = _adjusted(found[n], p, len(family), models=len(challengers))
    return found


def _chosen_primary(metrics: Sequence[str], declared: str | None) -> str | None:
    if declared is None:
        return primary_metric(metrics)
    known_metrics([declared])
    if declared not in metrics:
        raise RecipeError(
            f"The primary metric '{declared}' is not measured.",
            found=", ".join(metrics),
            fix="Name it among the metrics, or declare one of them.",
        )
    return declared


def _length_said(rows: Sequence[EvalRow], name: str) -> list[str]:
    bias = length_bias(rows)
    return [bias.sentence(name)] if bias and bias.is_strong else []


def sentence(comparison: Comparison) -> str:
    """The verdict with its numbers, in one sentence."""
    c, metric = comparison, METRICS[comparison.metric]
    head = "No verdict" if verdict_shown(c) == "none" else c.verdict[0].upper() + c.verdict[1:]
    if not c.n:
        return f"{head}: {metric.label} was not compared. {c.reason}"
    went = "rose" if c.difference > 0 else "fell" if c.difference < 0 else "stayed"
    path = f"{went} from {shown(c.base, metric)} to {shown(c.tuned, metric)}"
    if not c.difference:
        path = f"stayed at {shown(c.base, metric)}"
    what = {"answer": "questions", "preference": "pairs", "reward": "pairs"}.get(metric.kind, "items")
    groups = f" in {c.groups} groups" if c.groups < c.n else ""
    text = f"{head}: {metric.label} {path}, {difference_shown(c)}, n={c.n} {what}{groups}."
    return text if c.verdict in ("better", "worse") else f"{text} {c.reason}"


def remarks(comparisons: Sequence[Comparison]) -> list[str]:
    """What is to be known beside verdict and table: how the answers look, and why a metric has no value."""
    found = list(dict.fromkeys(remark for c in comparisons for remark in c.remarks))
    by_reason: dict[str, list[str]] = {}
    for c in comparisons:
        if not c.n and not c.primary:  # the primary one's sentence says so
            labels = by_reason.setdefault(c.reason, [])
            labels += [METRICS[c.metric].label] if METRICS[c.metric].label not in labels else []
    found += [f"Not compared: {', '.join(names)}. {reason}" for reason, names in by_reason.items()]
    above = dict.fromkeys(METRICS[c.metric].label for c in comparisons if _is_above_the_limit(c))
    if above:
        limit = 1 - comparisons[0].confidence
        found.append(
            f"No evidence though the interval excludes 0: {', '.join(above)}. A verdict needs p of {limit:.2g} or less "
            "as well, adjusted for the number of comparisons (Holm)."
        )
    return found


def _is_above_the_limit(c: Comparison) -> bool:
    """Whether a line of the table has an interval without 0 and no verdict, since its p is too high."""
    if c.verdict != "no evidence" or c.low is None or c.high is None or c.primary:  # whose sentence says it
        return False
    return not c.low <= 0 <= c.high


def verdict_shown(comparison: Comparison) -> str:
    """The verdict for a table; `none` of a metric that allows no verdict."""
    return "none" if comparison.n and METRICS[comparison.metric].of_set else comparison.verdict


def _answers_look(rows: Sequence[EvalRow], name: str, *, closely: bool = False) -> list[str]:
    """Whether a large share of a model's answers is empty; and, closely, cut off or repeats itself."""
    answers = [(row, row.output) for row in rows if row.output is not None]
    empty = [row for row, text in answers if not text.strip()]
    if answers and len(empty) == len(answers):
        return [
            f"All {len(answers)} answers of {name} are empty, so that anything may look good beside them."
        ]
    found = [(len(empty), "are empty")]
    if closely:
        cut = [row for row, _ in answers if row.finish_reason == "length"]
        limits = sorted({row.generation["max_new_tokens"] for row in cut if row.generation})
        at = f" ({' or '.join(map(str, limits))} tokens)" if limits else ""
        looping = [r for r, text in answers if _loops(text) and not _loops(r.reference)]
        found += [
            (len(cut), f"are cut off at the longest length{at}"),
            (len(looping), "repeat themselves: half of their word trigrams or more have come before"),
        ]
    least = LARGE_SHARE * len(answers)
    return [
        f"{number} of {len(answers)} answers of {name} {what}."
        for number, what in found
        if number > 0 and number >= least
    ]


def _loops(text: str) -> bool:
    return repeated([words(text)], 3) >= LOOPING


def table(comparisons: Sequence[Comparison], names: tuple[str, str] = ("base", "tuned")) -> list[list[str]]:
    """A header and one line per metric, for the terminal, the report and the model card."""
    level = f"{comparisons[0].confidence:.0%}".replace("%", " %") if comparisons else "95 %"
    lines = [["metric", *names, f"difference [{level} interval]", "n", "verdict"]]
    for c in comparisons:
        metric = METRICS[c.metric]
        values = [shown(c.base, metric), shown(c.tuned, metric), difference_shown(c)] if c.n else ["-"] * 3
        lines.append([metric.named, *values, str(c.n), verdict_shown(c)])
    return lines


def table_of_many(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """A header and, metric by metric, a line for the first model and one for each challenger."""
    level = f"{comparisons[0].confidence:.0%}".replace("%", " %") if comparisons else "95 %"
    lines = [
        ["metric", "model", "value", f"difference [{level} interval]", "p", "won/tied/lost", "n", "verdict"]
    ]
    for name in dict.fromkeys(c.metric for c in comparisons):
        metric, found = METRICS[name], [c for c in comparisons if c.metric == name]
        shown_base = next((shown(c.base, metric) for c in found if c.n), "-")
        lines.append(
            [metric.named, found[0].against, shown_base, "", "", "", str(found[0].n), "the baseline"]
        )
        for c in found:
            values = [shown(c.tuned, metric), difference_shown(c)] if c.n else ["-", "-"]
            p = "-" if c.p_value is None else f"{c.p_value:.3g}"
            counts = f"{c.wins}/{c.ties}/{c.losses}"
            lines.append([metric.named, c.model, *values, p, counts, str(c.n), verdict_shown(c)])
    return lines


def methods(comparisons: Sequence[Comparison]) -> str:
    """How the intervals were computed, metric by metric where it differs; nothing where none was."""
    by_method: dict[str, list[str]] = {}
    for c in comparisons:
        if c.n:
            by_method.setdefault(c.method, []).append(METRICS[c.metric].label)
    if not by_method:
        return ""
    if len(by_method) == 1:
        return f"Intervals: {next(iter(by_method))}."
    return "Intervals: " + "; ".join(f"{', '.join(names)}: {m}" for m, names in by_method.items()) + "."


def shown(value: float, metric: Metric) -> str:
    """A score as people read it: `85.2 %`, `43.1` points, perplexity `3.21`."""
    if metric.unit == "share":
        return f"{100 * value:.1f} %"
    return f"{100 * value:.1f}" if metric.unit == "points" else _ratio(value)


def difference_shown(comparison: Comparison) -> str:
    """A difference as people read it: `+82.1 points [78.2, 86.0]`."""
    c, metric = comparison, METRICS[comparison.metric]
    change = (
        f"{'+' if c.difference > 0 else ''}{_ratio(c.difference)}"
        if metric.unit == "ratio"
        else f"{100 * c.difference:+.1f} points"
    )
    return f"{change} {interval_shown(c.low, c.high, metric)}"


def interval_shown(low: float | None, high: float | None, metric: Metric) -> str:
    """An interval of differences as people read it: `[78.2, 86.0]`."""
    ends = [
        _ratio(end) if metric.unit == "ratio" else f"{100 * end:.1f}"
        for end in (low, high)
        if end is not None
    ]
    return f"[{', '.join(ends) or 'no interval'}]"


def score_interval(
    rows: Sequence[EvalRow],
    name: str,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Score:
    """One model's value on one metric with its interval, over the mean of the attempts at each question.

    Wilson's interval for right-or-wrong scores of questions that stand alone, or that are all alike; else the same
    bootstrap as for differences, where resamples can differ.
    """
    from scipy.stats import binomtest

    metric = METRICS[name]
    asked = asked_in(rows)
    scored, errors = _by_question(rows, metric, asked)
    if not scored:
        why = _cause(rows, metric)
        return Score(None, 0, len(errors), None, None, 0, "no row could be scored", why)
    of = _questions(scored, metric, asked)
    n, groups = len(of.groups), len(set(of.groups))
    value = float(_value(of.lines.sum(0), metric))
    found = Score(value, n, len(errors), None, None, groups, "Wilson", _cause(rows, metric))
    if metric.of_set:
        return replace(found, method=f"no interval: {OF_SET}")
    if _is_mean(metric) and _is_binary(of.own) and (groups == n or of.own.min() == of.own.max()):
        over = binomtest(round(of.own.mean() * groups), groups).proportion_ci(confidence, method="wilson")
        return replace(found, low=over.low, high=over.high)
    interval = _interval(
        _value(_resampled(_by_group(of.lines, of.groups), resamples, seed), metric), groups, confidence
    )
    if interval is None:
        return replace(found, method=_signed(f"no interval: {_alike(groups)}", metric))
    method = _signed(f"bootstrap over {f'{groups} groups' if groups < n else 'items'}", metric)
    return replace(found, low=interval[0], high=interval[1], method=method)


def _alike(groups: int) -> str:
    return "there is one group only" if groups == 1 else "all questions score alike"


def _signed(method: str, metric: Metric) -> str:
    return f"{method}; {metric.signature()}" if metric.signature else method


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Scandinavian Journal of Statistics 1979, 6, 65-70), in the given order."""
    order = sorted(range(len(p_values)), key=lambda n: p_values[n])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, n in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[n]))
        adjusted[n] = highest
    return adjusted


def _compared(
    base_rows: Sequence[EvalRow],
    tuned_rows: Sequence[EvalRow],
    metric: Metric,
    resamples: int,
    confidence: float,
    seed: int,
    primary: bool,
    apart: str,
    asked: Asked,
) -> Comparison:
    import numpy as np

    pairs = _paired(base_rows, tuned_rows, metric, asked)
    n, groups = len(pairs.base.groups), len(set(pairs.base.groups))
    if not n:
        why = _sentences("No question has a score of both models.", _left_out(pairs, apart))
        if metric.kind == "likelihood" and metric.name != "bits_per_byte" and pairs.other_tokens:
            why = (
                f"{pairs.other_tokens} items reached the two models as different tokens ({apart}), and "
                "likelihoods are per token."
            )
        return Comparison(
            metric.name, 0.0, 0.0, 0.0, None, None, confidence, 0, 0, None, 0, 0, 0, "inconclusive", why, "none",
            metric.higher_is_better, primary,
        )  # fmt: skip
    base, tuned = (float(_value(side.lines.sum(0), metric)) for side in (pairs.base, pairs.tuned))
    if metric.of_set:
        why = _sentences(f"There is no verdict on {metric.label}: {OF_SET}.", _left_out(pairs, apart))
        return Comparison(
            metric.name, base, tuned, tuned - base, None, None, confidence, n, groups, None, 0, n, 0, "inconclusive",
            why, f"no interval: {OF_SET}", metric.higher_is_better, primary,
        )  # fmt: skip
    differences = pairs.tuned.own - pairs.base.own
    differences[np.abs(differences) < 1e-9] = 0.0
    more, fewer = int((differences > 0).sum()), int((differences < 0).sum())
    wins, losses = (more, fewer) if metric.higher_is_better else (fewer, more)
    alone = groups == n
    interval: tuple[float, float] | None = None
    detectable: float | None = None
    p = 1.0
    if _is_mean(metric) and pairs.is_binary and (alone or differences.min() == differences.max()):
        scale = groups / n  # questions of a group that all differ alike count once
        interval = paired_shares(round(more * scale), round(fewer * scale), groups, confidence=confidence)
        method = "Tango's score interval of paired shares; p by McNemar's exact test"
        if wins or losses:
            p = _mcnemar(round(more * scale), round(fewer * scale))
            detectable = detectable_share(groups, (wins + losses) / n, confidence=confidence)
    elif np.array_equal(pairs.base.lines, pairs.tuned.lines) or (not metric.tally and not differences.any()):
        method = "no interval: all differences are zero"
    else:
        width = pairs.base.lines.shape[1]
        both = np.concatenate([pairs.base.lines, pairs.tuned.lines], axis=1)
        sums = _resampled(_by_group(both, pairs.base.groups), resamples, seed)
        drawn = _value(sums[:, width:], metric) - _value(sums[:, :width], metric)
        interval = _interval(drawn, groups, confidence)
        # Equal differences have no spread for a t test to judge by; the bootstrap's p is its limit.
        if alone and _is_mean(metric) and differences.std() > 1e-12:
            p, test = _t_test(pairs), "paired t test"
        else:
            p, test = _bootstrap_p(drawn, tuned - base, groups), "bootstrap"
        unit = f"{groups} groups" if groups < n else f"{n} items"
        method = (
            f"paired bootstrap{' of the whole statistic' if metric.tally else ''} over {unit}, {resamples} resamples, "
            f"seed {seed}, expanded percentile interval; p by {test}"
        )
        if interval is None:
            why = "there is one group only" if groups == 1 else "all differences are equal"
            method = f"no interval: {why}; p by {test}"
        spread = spread_of(differences) if alone and _is_mean(metric) else float(drawn.std())
        found = detectable_mean(spread, groups, confidence=confidence)
        detectable = found if math.isfinite(found) else None
    low, high = interval or (None, None)
    result = Comparison(
        metric=metric.name, base=base, tuned=tuned, difference=tuned - base, low=low, high=high,
        confidence=confidence, n=n, groups=groups, p_value=p, wins=wins, ties=n - wins - losses,
        losses=losses, verdict="no evidence", reason="", method=_signed(method, metric),
        higher_is_better=metric.higher_is_better, primary=primary, p_alone=p,
        assumed_detectable=_assumed(metric, groups, confidence), detectable=detectable,
    )  # fmt: skip
    verdict, reason = _verdict(result, pairs, metric)
    return replace(result, verdict=verdict, reason=_sentences(reason, _left_out(pairs, apart)))


def _verdict(c: Comparison, pairs: _Pairs, metric: Metric) -> tuple[Verdict, str]:
    """The verdict of the interval, unless errors or too few items forbid one."""
    asked = c.n + pairs.errors
    if pairs.errors > MAX_ERROR_SHARE * asked:
        return "inconclusive", (
            f"{pairs.errors} of {asked} items could not be scored for both; at most {MAX_ERROR_SHARE:.0%} may."
        )
    if c.n < MIN_ITEMS:
        return "inconclusive", f"{c.n} items are too few; at least {MIN_ITEMS} are needed."
    if c.groups < c.n and c.groups < MIN_GROUPS:
        return "inconclusive", f"{c.groups} groups are too few; at least {MIN_GROUPS} are needed."
    if not c.wins and not c.losses and not c.difference:
        hidden = f"; a difference up to ±{amount(c.high, metric)} could hide at n={c.n}" if c.high else ""
        return "no evidence", f"All {c.n} items score the same with both models{hidden}."
    alpha = 1 - c.confidence
    good = (c.difference > 0) == c.higher_is_better
    if c.low is None or c.high is None:
        why = f"All {c.n} items differ by the same amount, which leaves no interval; p = {c.p_value:.3g}."
        settled = c.p_value is not None and c.p_value <= alpha
        return ("better" if good else "worse") if settled else "no evidence", why
    hidden = amount(max(abs(c.low), abs(c.high)), metric)
    if c.low <= 0 <= c.high:
        return (
            "no evidence",
            _sentences(
                f"The interval holds 0; a difference up to ±{hidden} could hide at n={c.n}.",
                _found_at(c, metric),
            ),
        )
    if (
        _is_mean(metric)
        and pairs.is_binary
        and c.groups == c.n
        and c.p_value is not None
        and c.p_value > alpha
    ):
        differ = c.wins + c.losses
        few = f"; fewer than {MIN_DISCORDANT} can never settle it" if differ < MIN_DISCORDANT else ""
        return "no evidence", (
            f"Only {differ} questions are right with one model and wrong with the other{few} "
            f"(McNemar p = {_p_shown(c.p_value, alpha)}); a difference up to ±{hidden} could hide at n={c.n}."
        )
    if c.p_value is not None and c.p_value > alpha:
        return "no evidence", (
            f"The interval excludes 0, but p = {_p_shown(c.p_value, alpha)} is above {alpha:.2g}; a difference up to "
            f"±{hidden} could hide at n={c.n}."
        )
    return ("better" if good else "worse"), f"The {c.confidence:.0%} interval excludes 0."


def _p_shown(p: float, limit: float) -> str:
    """A p above the limit, with as many digits as show that it is."""
    return next((text for n in range(3, 9) if float(text := f"{p:.{n}f}") > limit), f"{p!r}")


def _found_at(c: Comparison, metric: Metric) -> str:
    """From which difference on this measurement would have found one."""
    if c.detectable is None:
        return ""
    return f"Differences from ±{amount(c.detectable, metric)} on are found 4 times in 5."


def _assumed(metric: Metric, n: int, confidence: float) -> float | None:
    if metric.unit == "ratio" or metric.kind == "likelihood" or n < 2:
        return None
    if metric.unit == "share":
        return detectable_share(n, DISCORDANCE, confidence=confidence)
    return detectable_mean(DEVIATION / math.sqrt(n), n, confidence=confidence)


def _adjusted(c: Comparison, p: float, number: int, *, models: int) -> Comparison:
    """A comparison with its adjusted p, which its verdict needs as well as the interval."""
    over = "metrics" if models == 1 else "models" if c.primary else "metrics and models"
    kind = "Primary" if c.primary else "Secondary"
    limit = 1 - c.confidence
    said = f"{p:.3g}" if p <= limit or p > 1.1 * limit else _p_shown(p, limit)
    note = f"{kind} metric: p = {said} after Holm's adjustment over {number} {over}."
    if models > 1 and not c.primary:
        note = f"{kind} metric: p = {said} after Holm's adjustment over {number} comparisons of {over}."
    if c.verdict in ("better", "worse") and p > limit:
        return replace(
            c,
            p_value=p,
            verdict="no evidence",
            reason=_sentences(c.reason, note, "It is above the limit."),
        )
    return replace(c, p_value=p, reason=_sentences(c.reason, note))


def _mcnemar(more: int, fewer: int) -> float:
    from scipy.stats import binomtest

    return float(binomtest(more, more + fewer).pvalue)


def _is_mean(metric: Metric) -> bool:
    """Whether a metric is the mean over questions of their own scores."""
    return metric.kind != "likelihood" and not metric.tally


def _t_test(pairs: _Pairs) -> float:
    from scipy.stats import ttest_rel

    return float(ttest_rel(pairs.tuned.own, pairs.base.own).pvalue)


def _bootstrap_p(drawn: Any, difference: float, num_groups: int) -> float:
    """Twice the smaller tail beyond 0, set outward as the interval is, so that the two agree.

    Where no resample reaches 0, a t test with the bootstrap's standard error goes on from there; p is never
    below that of as many coin tosses as there are groups.
    """
    from scipy.stats import norm, t

    if num_groups < 2:
        return 1.0
    expand = math.sqrt(num_groups / (num_groups - 1))
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    tail = (1 + beyond) / (1 + len(drawn))
    if tail >= 0.5:
        return 1.0
    distance = -norm.ppf(tail)
    if not beyond:
        spread = float(drawn.std())
        distance = max(distance, abs(difference) / spread if spread else math.inf)
    return float(max(2 * t.sf(distance / expand, num_groups - 1), 2.0 ** (1 - num_groups)))


def _interval(drawn: Any, num_groups: int, confidence: float) -> tuple[float, float] | None:
    """Expanded percentile interval (Hesterberg 2015, section 5.3); None where no two resamples differ."""
    import numpy as np
    from scipy.stats import norm, t

    if np.ptp(drawn) <= 1e-12 * max(1.0, float(np.abs(drawn).max())):
        return None

    tail = (1 - confidence) / 2
    if num_groups > 1:
        tail = norm.cdf(math.sqrt(num_groups / (num_groups - 1)) * t.ppf(tail, num_groups - 1))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def _resampled(sums: Any, resamples: int, seed: int) -> Any:
    """Sums over resampled groups, one line per resample: how often each group is drawn, times its sums."""
    import numpy as np

    random = np.random.default_rng(seed)
    groups = len(sums)
    chunk = max(1, 4_000_000 // groups)
    parts = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        parts.append(random.multinomial(groups, np.full(groups, 1 / groups), size=size) @ sums)
    return np.concatenate(parts)


def _by_group(sums: Any, groups: Sequence[str]) -> Any:
    import numpy as np

    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    grouped = np.zeros((len(numbers), sums.shape[1]))
    np.add.at(grouped, [numbers[group] for group in groups], sums)
    return grouped


def _value(sums: Any, metric: Metric) -> Any:
    """The metric's value from sums over questions; resamples without any count have a mean of 0."""
    import numpy as np

    if metric.statistic:
        return metric.statistic(sums)
    mean = sums[..., 0] / np.where(sums[..., 1] > 0, sums[..., 1], 1)
    return np.exp(np.minimum(mean, 700)) if metric.name == "perplexity" else mean


def _sums(row: EvalRow, metric: Metric) -> tuple[float, float] | None:
    """What the row adds to the metric's numerator and denominator; None where it has no value."""
    if metric.kind != "likelihood":
        return (row.scores[metric.name], 1.0) if metric.name in row.scores else None
    if metric.name == "bits_per_byte":
        return (
            (row.nll / math.log(2), float(row.num_bytes)) if row.nll is not None and row.num_bytes else None
        )
    total = row.nll if metric.name == "perplexity" else row.correct
    return (float(total), float(row.tokens)) if total is not None and row.tokens else None


def _is_error(row: EvalRow, metric: Metric) -> bool:
    return row.status != "ok" and _sums(row, metric) is None


def _is_binary(values: Any) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _key(row: EvalRow) -> Key:
    """The question that a row is an attempt at."""
    return row.item, row.turn


def _cause(rows: Sequence[EvalRow], metric: Metric) -> str:
    """Why rows could not be scored: the most frequent reason, and the first row that has it."""
    failed: dict[str, list[EvalRow]] = {}
    for row in rows:
        if _is_error(row, metric):
            parts = row.status.removeprefix("error:").split("; ")
            own = [
                part.removeprefix(f"{metric.name}: ") for part in parts if part.startswith(f"{metric.name}: ")
            ]
            failed.setdefault(own[0] if own else "; ".join(parts), []).append(row)
    if not failed:
        return ""
    why, there = max(failed.items(), key=lambda entry: len(entry[1]))
    others = sum(map(len, failed.values())) - len(there)
    more = f"; {others} more for other reasons" if others else ""
    return f"{why} (first in {there[0].source_row}{more})"


def _by_question(
    rows: Sequence[EvalRow], metric: Metric, asked: Asked
) -> tuple[dict[Key, list[EvalRow]], set[Key]]:
    """The attempts at every different question that could be scored, and the questions with one that could not.

    Only answers have attempts: what a model finds likely is asked once, in the first row.
    """
    scored: dict[Key, list[EvalRow]] = {}
    errors = set()
    for row in sorted(rows, key=lambda row: (*_key(row), row.sample)):
        if metric.kind != "answer" and row.sample:
            continue
        if _sums(row, metric):
            scored.setdefault(asked.question[_key(row)], []).append(row)
        elif _is_error(row, metric):
            errors.add(asked.question[_key(row)])
    return {key: own for key, own in scored.items() if key not in errors}, errors


def _questions(scored: dict[Key, list[EvalRow]], metric: Metric, asked: Asked) -> _Questions:
    import numpy as np

    rows = [row for own in scored.values() for row in own]
    sums = np.array([_sums(row, metric) for row in rows], dtype=float).reshape(-1, 2)
    lines = np.asarray(metric.tally(rows), dtype=float) if metric.tally and rows else sums
    place = {key: number for number, key in enumerate(scored)}
    of = [place[asked.question[_key(row)]] for row in rows]
    times = np.bincount(of, minlength=len(scored))[:, None] if rows else np.ones((0, 1))
    averaged = []
    starts = np.cumsum([0, *(len(own) for own in scored.values())])[:-1].astype(int)
    for values in (lines, sums[:, :1]):
        first = values[starts]
        total = np.zeros((len(scored), values.shape[1]))
        np.add.at(total, of, values - first[of])  # from the first, so that the mean of equal ones is exact
        averaged.append(first + total / times)
    return _Questions(averaged[0], averaged[1][:, 0], [asked.group[key] for key in scored])


def _paired(
    base_rows: Sequence[EvalRow], tuned_rows: Sequence[EvalRow], metric: Metric, asked: Asked
) -> _Pairs:
    (base, base_errors), (tuned, tuned_errors) = (
        _by_question(rows, metric, asked) for rows in (base_rows, tuned_rows)
    )
    hashes = [
        {asked.question[_key(row)]: row.prompt_sha256 for row in rows} for rows in (base_rows, tuned_rows)
    ]
    shared = hashes[0].keys() & hashes[1].keys()
    other_tokens = {key for key in shared if hashes[0][key] != hashes[1][key]}
    both = sorted(base.keys() & tuned.keys())
    if metric.kind == "likelihood":
        # Bits per byte are comparable whatever the tokens are, as long as the bytes are the same.
        counts = [{key: _sums(side[key][0], metric) for key in both} for side in (base, tuned)]
        both = [
            key
            for key in both
            if (key not in other_tokens or metric.name == "bits_per_byte")
            and (counts[0][key] or (0, 0))[1] == (counts[1][key] or (0, 0))[1]
        ]
    errors = {key for key in base_errors | tuned_errors if key in shared}
    errors |= (base.keys() & tuned.keys()) - set(both)
    sides = [_questions({key: side[key] for key in both}, metric, asked) for side in (base, tuned)]
    return _Pairs(
        sides[0], sides[1], len(errors), len(hashes[0].keys() ^ hashes[1].keys()), len(other_tokens)
    )


def _check_same_questions(base_rows: Sequence[EvalRow], tuned_rows: Sequence[EvalRow]) -> None:
    base = {_key(row): row for row in base_rows}
    for row in tuned_rows:
        other = base.get(_key(row))
        if other and (other.prompt_text, other.reference) != (row.prompt_text, row.reference):
            raise RunError(
                "The two models did not answer the same questions.",
                found=f"item {row.item} is row {other.source_row} of one and {row.source_row} of the other",
                fix="Evaluate both on the same data set with the same settings.",
            )


def _left_out(pairs: _Pairs, apart: str) -> str:
    parts = []
    if pairs.other_tokens:
        parts.append(f"{pairs.other_tokens} items reached the two models as different tokens ({apart}).")
    if pairs.unpaired:
        parts.append(f"{pairs.unpaired} questions of one model have no counterpart and do not count.")
    if pairs.errors:
        parts.append(f"{pairs.errors} items that could not be scored for both are left out.")
    return " ".join(parts)


def amount(value: float, metric: Metric) -> str:
    """A size of differences as people read it: `3.1 points`."""
    return _ratio(value) if metric.unit == "ratio" else f"{100 * value:.1f} points"


def _ratio(value: float) -> str:
    if abs(value) < 1000:
        return f"{value:.2f}"
    return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.2e}"


def _sentences(*parts: str) -> str:
    return " ".join(part for part in parts if part)
