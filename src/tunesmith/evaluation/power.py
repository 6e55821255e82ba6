"""How large a difference has to be to be found: before answers are paid for, and from what was measured.

The minimum detectable effect is the true difference that a two-sided test at the level of the intervals finds four
times in five (power 0.8). A comparison that finds nothing says nothing about smaller differences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

POWER = 0.8
DISCORDANCE = 0.2
"""Assumed share of questions that only one of two models answers rightly, before anything is measured."""
DEVIATION = 0.3
"""Assumed standard deviation of the differences of a score between 0 and 1, question by question."""


@dataclass(frozen=True)
class Expected:
    """What a measurement on so many questions could find, in the scale 0 to 1, under the assumptions named."""

    items: int
    groups: int
    binary: float
    """For right-or-wrong scores, where DISCORDANCE of the questions change sides."""
    real: float
    """For graded scores, whose differences spread by DEVIATION."""
    binary_grouped: float
    """The same where the questions of a group all behave alike, so that only groups count."""
    real_grouped: float

    @property
    def value(self) -> str:
        """The differences in points."""
        if self.groups == self.items:
            return f"±{100 * self.binary:.1f} points right or wrong, ±{100 * self.real:.1f} points graded"
        return (
            f"±{100 * self.binary:.1f} to ±{100 * self.binary_grouped:.1f} points right or wrong, "
            f"±{100 * self.real:.1f} to ±{100 * self.real_grouped:.1f} points graded"
        )

    @property
    def reason(self) -> str:
        """What the numbers rest on."""
        said = (
            f"the smallest true difference that {self.items} held-out questions show 4 times in 5, if "
            f"{DISCORDANCE:.0%} of right-or-wrong answers change sides and graded ones differ by {DEVIATION:g} "
            "(standard deviation)"
        )
        if self.groups < self.items:
            said += f"; the larger one if the questions of each of {self.groups} groups behave alike"
        return said


def expected(items: int, groups: int, *, confidence: float = 0.95) -> Expected | None:
    """What could be found on so many questions in so many groups; None where there are fewer than two groups."""
    if groups < 2:
        return None
    return Expected(
        items,
        groups,
        detectable_share(items, DISCORDANCE, confidence=confidence),
        detectable_mean(DEVIATION / math.sqrt(items), items, confidence=confidence),
        detectable_share(groups, DISCORDANCE, confidence=confidence),
        detectable_mean(DEVIATION / math.sqrt(groups), groups, confidence=confidence),
    )


def detectable_mean(standard_error: float, groups: int, *, confidence: float = 0.95) -> float:
    """The detectable difference of means: standard error times the t quantiles of level and power."""
    from scipy.stats import t

    if groups < 2:
        return math.inf
    level, power = t.ppf((1 + confidence) / 2, groups - 1), t.ppf(POWER, groups - 1)
    return float((level + power) * standard_error)


def detectable_share(n: int, discordance: float, *, confidence: float = 0.95) -> float:
    """The detectable difference of two paired shares under McNemar's test (Connor 1987, Biometrics 43, 207-211).

    It solves n = (z sqrt(d) + z' sqrt(d - x²))² / x² for x. At most `discordance`, where all differ one way.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    level, power = float(norm.ppf((1 + confidence) / 2)), float(norm.ppf(POWER))

    def lacking(x: float) -> float:
        spread = math.sqrt(max(discordance - x * x, 0.0))
        return level * math.sqrt(discordance) + power * spread - x * math.sqrt(n)

    if discordance <= 0 or n <= 0:
        return 1.0
    if lacking(discordance) > 0:
        # So few questions cannot show it at this discordance: more of them would have to change sides.
        return min(1.0, (level / math.sqrt(n)) ** 2) if discordance < 1 else 1.0
    return float(brentq(lacking, 1e-12, discordance))


def paired_shares(wins: int, losses: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the difference of two paired shares, by score (Tango 1998, Statistics in Medicine 17, 891-908).

    `wins` and `losses` are the questions of `n` that only the one or only the other answers rightly. It holds where
    few or none differ, of which a bootstrap knows nothing; swapping wins and losses mirrors it.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    limit = float(norm.ppf((1 + confidence) / 2))

    def beyond(difference: float, side: float) -> float:
        """Distance of the score statistic from its limit; falls with the difference."""
        a, c = 2.0 * n, -losses * difference * (1 - difference)
        b = -wins - losses + (2 * n - wins + losses) * difference
        q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        spread = math.sqrt(max(n * (2 * q + difference * (1 - difference)), 1e-300))
        return (wins - losses - n * difference) / spread - side * limit

    def bound(side: float) -> float:
        low, high = -1 + 1e-12, 1 - 1e-12
        if beyond(low, side) <= 0:
            return -1.0
        return 1.0 if beyond(high, side) >= 0 else float(brentq(beyond, low, high, args=(side,)))

    # One computation for both orders, so that mirrored numbers are equal to the last digit.
    if wins < losses:
        low, high = paired_shares(losses, wins, n, confidence=confidence)
        return -high, -low
    low = bound(1)
    return low, (-low if wins == losses else bound(-1))


def spread_of(differences: Any) -> float:
    """Standard error of the mean of independent differences."""
    return float(differences.std(ddof=1) / math.sqrt(len(differences))) if len(differences) > 1 else math.inf
