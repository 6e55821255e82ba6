"""Figures of judgments: those that FastChat's `show_result` prints, to the digit, and beside them ours.

Ours count what FastChat leaves out. A judgment has four outcomes, win, loss, tie and error; errors are reported as a
rate, with the figure that would result if all of them were against a model or for it. An item is worth the mean of
its two games (1, .75, .5, .25 or 0), and intervals are clustered by question, whose turns belong together.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from tunesmith.evaluation.compare import MAX_ERROR_SHARE
from tunesmith.evaluation.judging import verdicts
from tunesmith.evaluation.judging.judgments import Id, Pair, Question, Single, Winner

POINTS = {"model_1": 1.0, "tie": 0.5, "model_2": 0.0}


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval; None where there is nothing to take one of."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    clusters: int
    method: str


def clustered_mean(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    bounds: tuple[float, float],
    confidence: float = 0.95,
) -> Estimate:
    """A mean with a t interval whose standard error is clustered, cut to the bounds of the values.

    Standard error: sqrt(sum over clusters of (sum of deviations)^2 * C / (C - 1)) / n (Miller 2024, arXiv 2411.00640).
    Where the clusters show no spread it would be 0, and Wilson's interval over clusters stands in.
    """
    from scipy.stats import norm, t

    n, num = len(values), len(set(clusters))
    if not n:
        return Estimate(None, None, None, 0, 0, "nothing to judge")
    mean = fmean(values)
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    low, high = bounds
    spread = math.fsum(total * total for total in sums.values())
    if num > 1 and spread > 1e-12:
        error = math.sqrt(spread * num / (num - 1)) / n
        half = float(t.ppf((1 + confidence) / 2, num - 1)) * error
        method = f"t interval, standard error clustered over {num} questions"
        return Estimate(mean, max(low, mean - half), min(high, mean + half), n, num, method)
    z = float(norm.ppf((1 + confidence) / 2))
    share = (mean - low) / (high - low)
    centre = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    scale = high - low
    return Estimate(
        mean, low + scale * max(0.0, centre - half), low + scale * min(1.0, centre + half), n, num,
        f"Wilson over {num} questions, which show no spread",
    )  # fmt: skip


def reread(judgments: Sequence[Single] | Sequence[Pair]) -> tuple[list[Single] | list[Pair], int]:
    """The judgments with every reply read again by our strict reader, and in how many that changed the outcome.

    Where a file keeps no reply, its outcome stands.
    """
    found: list[Any] = []
    changed = 0
    for one in judgments:
        if isinstance(one, Single):
            score = verdicts.rating(one.judgment) if one.judgment else one.score
            new: Single | Pair = replace(one, score=score)
            changed += score != one.score
        else:
            games = (
                _winner(one.g1_judgment, one.g1_winner, swapped=False),
                _winner(one.g2_judgment, one.g2_winner, swapped=True),
            )
            new = replace(one, g1_winner=games[0], g2_winner=games[1])
            changed += games != (one.g1_winner, one.g2_winner)
        found.append(new)
    return found, changed


def winner(slot: verdicts.Slot | None, *, swapped: bool) -> Winner:
    """Whom a verdict names: in the first game model 1 is A, in the second (`swapped`) it is B."""
    if slot is None:
        return "error"
    if slot == "tie":
        return "tie"
    return "model_1" if (slot == "A") != swapped else "model_2"


def _winner(reply: str, before: Winner, *, swapped: bool) -> Winner:
    return winner(verdicts.verdict(reply), swapped=swapped) if reply else before


# What FastChat prints


def fastchat_single(judgments: Sequence[Single]) -> dict[str, dict[str, float | None]]:
    """By model: mean of turn 1, of turn 2 and over all rows, those without a score (-1) left out."""
    found: dict[str, dict[str, float | None]] = {}
    for model in _models(judgments):
        kept = [one for one in judgments if one.model == model and one.score is not None]
        found[model] = {
            name: _mean([one.score for one in kept if turn in (None, one.turn)])
            for name, turn in (("turn_1", 1), ("turn_2", 2), ("average", None))
        }
    return found


def fastchat_pair(judgments: Sequence[Pair], baseline: str | None = None) -> dict[str, dict[str, float]]:
    """By model: win, loss, tie, and their rates; with a baseline only its comparisons, and without its own row.

    A tie is where the first game is one or the two games differ; a row with an error in either game is left out.
    """
    counts: dict[str, dict[str, int]] = {}
    for one in judgments:
        sides = (one.model_1, one.model_2)
        if "error" in (one.g1_winner, one.g2_winner) or (baseline is not None and baseline not in sides):
            continue
        for side in sides:
            counts.setdefault(side, {"win": 0, "loss": 0, "tie": 0})
        if one.g1_winner == "tie" or one.g1_winner != one.g2_winner:
            for side in sides:
                counts[side]["tie"] += 1
        else:
            first = one.g1_winner == "model_1"
            counts[sides[0 if first else 1]]["win"] += 1
            counts[sides[1 if first else 0]]["loss"] += 1
    found: dict[str, dict[str, float]] = {}
    for model, c in counts.items():
        n = sum(c.values())
        if model != baseline:
            found[model] = {
                **c,
                "n": n,
                "win_rate": c["win"] / n,
                "loss_rate": c["loss"] / n,
                "win_rate_adjusted": (c["win"] + 0.5 * c["tie"]) / n,
            }
    return dict(sorted(found.items(), key=lambda entry: -entry[1]["win_rate_adjusted"]))


# Ours


def single_figures(
    judgments: Sequence[Single],
    *,
    questions: Sequence[Question] = (),
    confidence: float = 0.95,
) -> dict[str, Any]:
    """By model: mean grade with interval over all, by turn and by category; errors as a rate, with bounds."""
    by_id = {question.id: question for question in questions}
    kept, repeated = _last([((one.model, one.question, one.turn), one) for one in judgments])
    turns = sorted({one.turn for one in kept})
    wanted = {(question, turn) for question in dict.fromkeys(one.question for one in kept) for turn in turns}
    models: dict[str, Any] = {}
    for model in _models(kept):
        own = [one for one in kept if one.model == model]
        errors = [one for one in own if one.score is None]
        have = {(one.question, one.turn) for one in own}
        missing = sum(
            pair not in have and not (pair[0] in by_id and pair[1] > len(by_id[pair[0]].turns))
            for pair in wanted
        )
        models[model] = {
            "score": asdict(_grade(own, confidence)),
            "turns": {
                str(turn): asdict(_grade([o for o in own if o.turn == turn], confidence)) for turn in turns
            },
            "categories": {
                name: asdict(_grade([o for o in own if by_id[o.question].category == name], confidence))
                for name in _categories(own, by_id)
            },
            "n": len(own),
            "errors": len(errors),
            "error_rate": len(errors) / len(own),
            "bounds": [_filled(own, verdicts.LOWEST), _filled(own, verdicts.HIGHEST)],
            "missing_turns": missing,
            "flagged": sum(bool(one.flags) for one in own),
            "is_conclusive": len(errors) + missing <= MAX_ERROR_SHARE * (len(own) + missing),
        }
    return {"models": models, "differences": _differences(kept, confidence), "repeated": repeated}


def pair_figures(
    judgments: Sequence[Pair],
    *,
    baseline: str | None = None,
    questions: Sequence[Question] = (),
    confidence: float = 0.95,
) -> dict[str, Any]:
    """By pair of models: how the first one fares against the second, with interval, errors, bounds and biases.

    A pair is named once, a baseline last.
    """
    by_id = {question.id: question for question in questions}
    turned = [_oriented(one, baseline) for one in judgments]
    kept, repeated = _last([((o.model_1, o.model_2, o.question, o.turn), o) for o in turned])
    pairs: list[dict[str, Any]] = []
    for sides in dict.fromkeys((one.model_1, one.model_2) for one in kept):
        own = [one for one in kept if (one.model_1, one.model_2) == sides]
        pairs.append(
            {
                "model": sides[0],
                "against": sides[1],
                **_against(own, confidence),
                "turns": {
                    str(turn): asdict(_win_rate([o for o in own if o.turn == turn], confidence))
                    for turn in sorted({o.turn for o in own})
                },
                "categories": {
                    name: asdict(
                        _win_rate([o for o in own if by_id[o.question].category == name], confidence)
                    )
                    for name in _categories(own, by_id)
                },
            }
        )
    return {"pairs": pairs, "repeated": repeated}


def length_figures(
    judgments: Sequence[Pair], answers: Mapping[tuple[str, Id, int], str], *, confidence: float = 0.95
) -> list[dict[str, Any]]:
    """By pair of models the mean lengths of their answers in characters, and how often the longer answer won.

    Length says nothing of worth, but judges like it: far above a half, the win rate may be one of lengths.
    """
    found = []
    for sides in dict.fromkeys((one.model_1, one.model_2) for one in judgments):
        own = [one for one in judgments if (one.model_1, one.model_2) == sides]
        lengths = [
            [len(answers[side, one.question, one.turn]) for side in sides]
            for one in own
            if all((side, one.question, one.turn) in answers for side in sides)
        ]
        values, clusters = list[float](), list[Id]()
        for one in own:
            texts = [answers.get((side, one.question, one.turn)) for side in sides]
            score = item_score(one)
            if score is None or score == 0.5 or None in texts or len(texts[0] or "") == len(texts[1] or ""):
                continue
            values.append(float((score > 0.5) == (len(texts[0] or "") > len(texts[1] or ""))))
            clusters.append(one.question)
        found.append(
            {
                "model": sides[0],
                "against": sides[1],
                "characters": [_mean([pair[side] for pair in lengths]) for side in (0, 1)],
                "longer_won": asdict(
                    clustered_mean(values, clusters, bounds=(0.0, 1.0), confidence=confidence)
                ),
            }
        )
    return found


def agreement(first: Sequence[Single | Pair], second: Sequence[Single | Pair]) -> dict[str, Any]:
    """How far a judge that is asked twice agrees with itself: share of equal outcomes, mean distance of the values."""
    values: list[tuple[float, float]] = []
    for a, b in zip(first, second, strict=True):
        x = a.score if isinstance(a, Single) else item_score(a)
        y = b.score if isinstance(b, Single) else item_score(b)
        if x is not None and y is not None:
            values.append((x, y))
    return {
        "n": len(values),
        "same": _mean([float(x == y) for x, y in values]),
        "distance": _mean([abs(x - y) for x, y in values]),
    }


def item_score(one: Pair) -> float | None:
    """What both games of an item are worth to model 1: 1, .75, .5, .25 or 0; None where a game has no verdict."""
    if "error" in (one.g1_winner, one.g2_winner):
        return None
    return (POINTS[one.g1_winner] + POINTS[one.g2_winner]) / 2


def outcome(one: Pair) -> str:
    """`win`, `loss`, `tie` or `error`, of model 1."""
    score = item_score(one)
    if score is None:
        return "error"
    return "tie" if score == 0.5 else "win" if score > 0.5 else "loss"


def _differences(kept: Sequence[Single], confidence: float) -> list[dict[str, Any]]:
    """Of each two models the mean difference of their grades on the same turns: the first less the second."""
    grades: dict[str, dict[tuple[Id, int], float]] = {}
    for one in kept:
        own = grades.setdefault(one.model, {})
        if one.score is not None:
            own[one.question, one.turn] = one.score
    names = list(grades)
    span = verdicts.HIGHEST - verdicts.LOWEST
    found = []
    for n, a in enumerate(names):
        for b in names[n + 1 :]:
            both = [key for key in grades[a] if key in grades[b]]
            values = [grades[a][key] - grades[b][key] for key in both]
            estimate = clustered_mean(
                values, [question for question, _ in both], bounds=(-span, span), confidence=confidence
            )
            found.append(
                {
                    "model": a,
                    "against": b,
                    "difference": asdict(estimate),
                    "wins": sum(value > 0 for value in values),
                    "ties": sum(value == 0 for value in values),
                    "losses": sum(value < 0 for value in values),
                }
            )
    return found


def _against(own: Sequence[Pair], confidence: float) -> dict[str, Any]:
    outcomes = [outcome(one) for one in own]
    errors = outcomes.count("error")
    whole = [one for one in own if outcome(one) != "error"]
    flipped = [float({one.g1_winner, one.g2_winner} == {"model_1", "model_2"}) for one in whole]
    slots, clusters = list[float](), list[Id]()
    for one in own:
        for game, first in ((one.g1_winner, "model_1"), (one.g2_winner, "model_2")):
            if game in ("model_1", "model_2"):
                slots.append(float(game == first))
                clusters.append(one.question)
    ids = [one.question for one in whole]
    return {
        "win_rate": asdict(_win_rate(own, confidence)),
        **{
            f"{name}s" if name != "loss" else "losses": outcomes.count(name)
            for name in ("win", "loss", "tie", "error")
        },
        "n": len(own),
        "item_scores": {
            str(value): sum(item_score(one) == value for one in own) for value in (1.0, 0.75, 0.5, 0.25, 0.0)
        },
        "error_rate": errors / len(own),
        "bounds": [_bounded(own, for_model=False), _bounded(own, for_model=True)],
        "is_conclusive": errors <= MAX_ERROR_SHARE * len(own),
        "flip_rate": asdict(clustered_mean(flipped, ids, bounds=(0.0, 1.0), confidence=confidence)),
        "consistency": _mean([float(one.g1_winner == one.g2_winner) for one in whole]),
        "first_slot": asdict(clustered_mean(slots, clusters, bounds=(0.0, 1.0), confidence=confidence)),
        "flagged": sum(bool(one.flags) for one in own),
    }


def _win_rate(own: Sequence[Pair], confidence: float) -> Estimate:
    found = [(score, one.question) for one in own if (score := item_score(one)) is not None]
    return clustered_mean(
        [s for s, _ in found], [q for _, q in found], bounds=(0.0, 1.0), confidence=confidence
    )


def _bounded(own: Sequence[Pair], *, for_model: bool) -> float:
    """The win rate if every game without a verdict had gone one way."""
    points = {**POINTS, "error": float(for_model)}
    return fmean((points[one.g1_winner] + points[one.g2_winner]) / 2 for one in own)


def _oriented(one: Pair, baseline: str | None) -> Pair:
    """The comparison with the baseline second; games keep their places, since slots belong to them."""
    if baseline is None or one.model_1 != baseline or one.model_2 == baseline:
        return one
    other: dict[str, Winner] = {"model_1": "model_2", "model_2": "model_1", "tie": "tie", "error": "error"}
    # In the first game model 1 is A. Seen from the other model, that is the second game.
    return replace(
        one,
        model_1=one.model_2,
        model_2=one.model_1,
        g1_winner=other[one.g2_winner],
        g2_winner=other[one.g1_winner],
        g1_judgment=one.g2_judgment,
        g2_judgment=one.g1_judgment,
        errors=(one.errors[1], one.errors[0]),
        user_prompts=(one.user_prompts[1], one.user_prompts[0]),
    )


def _grade(own: Sequence[Single], confidence: float) -> Estimate:
    found = [(one.score, one.question) for one in own if one.score is not None]
    bounds = (verdicts.LOWEST, verdicts.HIGHEST)
    return clustered_mean([s for s, _ in found], [q for _, q in found], bounds=bounds, confidence=confidence)


def _filled(own: Sequence[Single], value: float) -> float:
    return fmean(value if one.score is None else one.score for one in own)


def _last(entries: Sequence[tuple[Hashable, Any]]) -> tuple[list[Any], int]:
    """The last entry of each key, as a judgment that is made again replaces the first; and how many were replaced."""
    found = dict(entries)
    return list(found.values()), len(entries) - len(found)


def _models(judgments: Sequence[Single]) -> list[str]:
    return list(dict.fromkeys(one.model for one in judgments))


def _categories(own: Sequence[Any], by_id: Mapping[Id, Question]) -> list[str]:
    if not own or any(one.question not in by_id for one in own):
        return []
    present = {by_id[one.question].category for one in own}
    return [
        name for name in dict.fromkeys(question.category for question in by_id.values()) if name in present
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
