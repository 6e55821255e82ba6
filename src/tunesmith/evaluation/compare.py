"""Whether one model is better than another: paired differences with intervals, and a computed verdict.

Both models answered the same items, so items are resampled in pairs; items of one group (a database, a
document) are resampled together, since they are not independent (Miller 2024, arXiv 2411.00640).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from tunesmith.errors import RunError
from tunesmith.evaluation import EvalRow, has_value, sums, value_of
from tunesmith.evaluation.metrics import METRICS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Verdict = Literal["better", "worse", "no evidence", "inconclusive"]

MIN_ITEMS = 10
"""Fewer items, or fewer than MIN_GROUPS groups, are too few for an interval to mean anything."""
MIN_GROUPS = 5
MAX_ERROR_RATE = 0.02
"""More rows in error than this, and the verdict is inconclusive: they may not be missing at random."""


@dataclass(frozen=True)
class Comparison:
    """One metric of two models on the same items; `difference` is tuned minus base."""

    metric: str
    base: float
    tuned: float
    difference: float
    low: float
    high: float
    confidence: float
    n: int
    groups: int
    """Independent units that were resampled: groups where the data has them, else items."""
    p_value: float | None
    """Two-sided; Holm-adjusted for every metric but the primary one."""
    wins: int
    ties: int
    losses: int
    verdict: Verdict
    reason: str
    method: str
    higher_is_better: bool
    primary: bool


def compare(
    base_rows: Sequence[EvalRow],
    tuned_rows: Sequence[EvalRow],
    *,
    metrics: Sequence[str],
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Comparison]:
    """Each metric's comparison, the primary one first: the first that scores answers, else the first.

    Raises RunError where the two models were not asked the same.
    """
    pairs = _paired(base_rows, tuned_rows)
    compared = []
    for name in metrics:
        usable = [(a, b) for a, b in pairs if has_value(a, name) and has_value(b, name)]
        if usable:
            compared.append(_compared(name, usable, len(pairs), resamples, confidence, seed))
    if not compared:
        return []
    primary = next((c for c in compared if METRICS[c.metric].score), compared[0])
    others = _holm([c for c in compared if c is not primary])
    return [replace(primary, primary=True), *others]


def _paired(base_rows: Sequence[EvalRow], tuned_rows: Sequence[EvalRow]) -> list[tuple[EvalRow, EvalRow]]:
    tuned = {row.item: row for row in tuned_rows}
    if {row.item for row in base_rows} != tuned.keys():
        raise RunError(
            "The two models did not answer the same items.",
            found=f"{len(base_rows)} and {len(tuned)} rows",
            fix="Evaluate both on the same data set with the same settings.",
        )
    pairs = [(row, tuned[row.item]) for row in base_rows]
    # Models with tokenizers of their own see other ids for the same words, so the words decide.
    differing = sum((a.prompt_text, a.reference) != (b.prompt_text, b.reference) for a, b in pairs)
    if differing:
        raise RunError(f"The two models were asked different questions in {differing} of {len(pairs)} items.")
    return pairs


def _compared(
    name: str,
    pairs: Sequence[tuple[EvalRow, EvalRow]],
    asked: int,
    resamples: int,
    confidence: float,
    seed: int,
) -> Comparison:
    import numpy as np

    base, tuned = sums([a for a, _ in pairs], name), sums([b for _, b in pairs], name)
    units = [a.group for a, _ in pairs]
    statistic = value_of(name)
    values = float(statistic(base.sum(axis=0))), float(statistic(tuned.sum(axis=0)))
    draws = bootstrap(
        [base, tuned],
        units,
        statistic=lambda totals: statistic(totals[1]) - statistic(totals[0]),
        resamples=resamples,
        seed=seed,
    )
    low, high = interval(draws, confidence)
    higher = METRICS[name].higher_is_better
    gains = (tuned[:, 0] / tuned[:, 1] - base[:, 0] / base[:, 1]) * (1 if higher else -1)
    wins, losses = int((gains > 1e-12).sum()), int((gains < -1e-12).sum())
    clustered = any(unit is not None for unit in units)
    groups = len(set(units)) if clustered else len(pairs)
    difference = values[1] - values[0]
    binary = METRICS[name].score is not None and set(np.unique([base[:, 0], tuned[:, 0]])) <= {0.0, 1.0}
    if wins + losses == 0:
        p_value: float | None = 1.0
    elif binary and not clustered:
        p_value = mcnemar(wins, losses)
    else:
        p_value = _two_sided(draws)
    comparison = Comparison(
        metric=name,
        base=values[0],
        tuned=values[1],
        difference=difference,
        low=low,
        high=high,
        confidence=confidence,
        n=len(pairs),
        groups=groups,
        p_value=p_value,
        wins=wins,
        ties=len(pairs) - wins - losses,
        losses=losses,
        verdict="inconclusive",
        reason="",
        method=f"paired bootstrap, {resamples:,} resamples of {groups} {'groups' if clustered else 'items'}",
        higher_is_better=higher,
        primary=False,
    )
    verdict, reason = _verdict(comparison, errors=asked - len(pairs), asked=asked, clustered=clustered)
    return replace(comparison, verdict=verdict, reason=reason)


def bootstrap(
    totals: Sequence[NDArray[np.float64]],
    units: Sequence[str | None],
    *,
    statistic: Callable[[list[NDArray[np.float64]]], NDArray[np.float64]],
    resamples: int = 10_000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """A statistic over resamples of whole units, `(resamples,)`; `totals` are arrays `(rows, 2)` summed per unit.

    Rows without a unit are units of their own (Efron 1979; for clusters Davison and Hinkley 1997, 3.8).
    """
    import numpy as np

    names = [unit if unit is not None else f"\0{number}" for number, unit in enumerate(units)]
    index = {name: position for position, name in enumerate(dict.fromkeys(names))}
    owner = np.array([index[name] for name in names])
    summed = []
    for rows in totals:
        per_unit = np.zeros((len(index), rows.shape[1]))
        np.add.at(per_unit, owner, rows)
        summed.append(per_unit)
    rng = np.random.default_rng(seed)
    draws = []
    for start in range(0, resamples, 1000):
        size = min(1000, resamples - start)
        counts = rng.multinomial(len(index), np.full(len(index), 1 / len(index)), size=size).astype(float)
        draws.append(statistic([counts @ per_unit for per_unit in summed]))
    return np.concatenate(draws)


def interval(draws: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """The percentile interval of bootstrap draws."""
    import numpy as np

    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p of as uneven a division of the items on which the models differ (McNemar 1947)."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses, 0.5).pvalue)


def _two_sided(draws: NDArray[np.float64]) -> float:
    """Share of draws on the other side of zero, doubled; never below what the number of draws can show."""
    count = len(draws)
    below, above = int((draws <= 0).sum()), int((draws >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (count + 1))


def _holm(compared: Sequence[Comparison]) -> list[Comparison]:
    """Holm-adjusted p values (1979) for the metrics on which no verdict rests, in the order given."""
    ranked = sorted(range(len(compared)), key=lambda i: compared[i].p_value or 0.0)
    adjusted = list(compared)
    floor = 0.0
    for rank, i in enumerate(ranked):
        comparison = compared[i]
        floor = max(floor, min(1.0, (comparison.p_value or 0.0) * (len(compared) - rank)))
        adjusted[i] = replace(comparison, p_value=floor)
        if comparison.verdict in ("better", "worse") and floor > 1 - comparison.confidence:
            reason = f"adjusted for {len(compared)} further metrics, p = {floor:.3f}"
            adjusted[i] = replace(adjusted[i], verdict="no evidence", reason=reason)
    return adjusted


def _verdict(c: Comparison, *, errors: int, asked: int, clustered: bool) -> tuple[Verdict, str]:
    unit = "groups" if clustered else "items"
    if c.n < MIN_ITEMS or c.groups < MIN_GROUPS:
        few = f"{c.n} items" if c.n < MIN_ITEMS else f"{c.groups} groups"
        return "inconclusive", f"only {few}: too few to tell"
    if errors > MAX_ERROR_RATE * asked:
        return "inconclusive", f"{errors} of {asked} items could not be scored"
    sign = 1 if c.higher_is_better else -1
    low, high = sorted((c.low * sign, c.high * sign))
    note = ""
    if not clustered and 0 < c.wins + c.losses < 6:
        note = f"; the models differ on {c.wins + c.losses} items only"
    level = f"{c.confidence:.0%}"
    if low > 0:
        return "better", f"the {level} interval lies on the better side of zero, {c.groups} {unit}{note}"
    if high < 0:
        return "worse", f"the {level} interval lies on the worse side of zero, {c.groups} {unit}{note}"
    hidden = shown(c.metric, max(abs(c.low), abs(c.high)), is_difference=True).lstrip("+")
    return "no evidence", f"a difference of up to {hidden} could hide at {c.groups} {unit}{note}"


def shown(metric: str, value: float, *, is_difference: bool = False) -> str:
    """A value as people read it: shares in percent, their differences in points."""
    sign = "+" if is_difference else ""
    if METRICS[metric].is_share:
        return f"{100 * value:{sign}.1f}" + (" points" if is_difference else " %")
    return f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign},.0f}"


def table(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Header and one line per metric, for the terminal, the report and the model card."""
    level = f"{comparisons[0].confidence:.0%}".replace("%", " %") if comparisons else "95 %"
    lines = [["metric", "base", "tuned", f"difference [{level} interval]", "n", "verdict"]]
    for c in comparisons:
        low, high = (shown(c.metric, x, is_difference=True).removesuffix(" points") for x in (c.low, c.high))
        lines.append(
            [
                c.metric + (" (primary)" if c.primary else ""),
                shown(c.metric, c.base),
                shown(c.metric, c.tuned),
                f"{shown(c.metric, c.difference, is_difference=True)} [{low}, {high}]",
                f"{c.n}" + (f" in {c.groups} groups" if c.groups != c.n else ""),
                c.verdict,
            ]
        )
    return lines


def sentence(c: Comparison) -> str:
    """The verdict in words: what was measured, what came out, and why that is the verdict."""
    verdict = {
        "better": "Better",
        "worse": "Worse",
        "no evidence": "No evidence of a difference",
        "inconclusive": "Inconclusive",
    }[c.verdict]
    low, high = (shown(c.metric, x, is_difference=True).removesuffix(" points") for x in (c.low, c.high))
    change = f"{shown(c.metric, c.difference, is_difference=True)} [{low}, {high}]"
    return (
        f"{verdict}: {c.metric} {shown(c.metric, c.base)} -> {shown(c.metric, c.tuned)}, {change}, "
        f"n = {c.n}; {c.reason}."
    )
