"""What judgments come to in a word and a sentence, and what these have to be read with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.evaluation.judging import calibration
from tunesmith.evaluation.judging.prompts import Mode


def verdicts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of a record of figures a word and a sentence for each comparison, or each difference of grades; of one model's
    grades alone `graded`. A judge that its calibration found not to be trusted decides nothing."""
    ours = found.get("ours", {})
    models = ours.get("models", {})
    doubted = distrust(found)
    said = []
    for pair in ours.get("pairs", ()):
        rests = f"a win rate of {_of(pair['win_rate'], 3)} over {pair['n']} judgments"
        said.append(_said(pair, pair["win_rate"], 0.5, pair["is_conclusive"], rests, doubted))
    for one in ours.get("differences", ()):
        sure = all(models[name]["is_conclusive"] for name in (one["model"], one["against"]))
        rests = f"grades {_of(one['difference'], 2)} apart"
        said.append(_said(one, one["difference"], 0.0, sure, rests, doubted))
    if said:
        return said
    return [_graded(name, model, doubted) for name, model in models.items()]


def doubts(found: Mapping[str, Any]) -> list[str]:
    """What of the judge a record of figures has to be read with."""
    if not found:
        return []
    if found.get("calibration") is None:
        return ["The judge was not calibrated: what its word is worth is not known."]
    doubted = distrust(found)
    return [f"The judge is {doubted}."] if doubted else []


def is_empty(found: Mapping[str, Any]) -> bool:
    """Whether nothing of a record has a verdict of the judge."""
    ours = found.get("ours", {})
    estimates = [pair["win_rate"] for pair in ours.get("pairs", ())]
    estimates += [model["score"] for model in ours.get("models", {}).values()]
    return all(estimate["value"] is None for estimate in estimates)


def distrust(found: Mapping[str, Any]) -> str:
    """Why the judge of a record is not to be trusted; empty where it is, or where that is not known."""
    own = found.get("calibration")
    mode: Mode = "single" if "models" in found.get("ours", {}) else "pair"
    if own is None or calibration.is_trustworthy(own, mode):
        return ""
    share = own["accuracy" if mode == "pair" else "grade_order"]["value"]
    right = "in none" if share is None else f"in {100 * share:.0f} %"
    return (
        f"not to be trusted: of answers of known worth it finds the better one {right}, "
        f"and gives a verdict in {100 * own['parse_rate']:.0f} %"
    )


def _said(
    entry: Mapping[str, Any], estimate: Mapping[str, Any], even: float, sure: bool, rests: str, doubted: str
) -> tuple[str, str]:
    name, other = entry["model"], entry["against"]
    if estimate["value"] is None:
        return "inconclusive", f"Inconclusive: no judgment of {name} and {other} has a verdict."
    if doubted:
        return "inconclusive", f"Inconclusive: the judge is {doubted}. {name} and {other}: {rests}."
    if not sure:
        return (
            "inconclusive",
            f"Inconclusive: too many judgments of {name} and {other} are missing ({rests}).",
        )
    if entry.get("too_few"):
        return "inconclusive", f"Inconclusive: {entry['too_few']}. {name} and {other}: {rests}."
    if estimate["low"] > even:
        return "better", f"{name} is better than {other}: {rests}."
    if estimate["high"] < even:
        return "worse", f"{name} is worse than {other}: {rests}."
    return "no evidence", f"No evidence of a difference between {name} and {other}: {rests}."


def _graded(name: str, model: Mapping[str, Any], doubted: str) -> tuple[str, str]:
    if model["score"]["value"] is None:
        return "inconclusive", f"Inconclusive: no judgment of {name} has a verdict."
    rests = f"{name} is graded {_of(model['score'], 2)} of 10"
    if doubted:
        return "inconclusive", f"Inconclusive: the judge is {doubted}. {rests}."
    return "graded", f"{rests}."


def _of(estimate: Mapping[str, Any], digits: int) -> str:
    if estimate["value"] is None:
        return "nothing"
    value, low, high = (f"{estimate[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
