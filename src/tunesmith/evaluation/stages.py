"""The way that led to a run's base, as stages: what was fine-tuned before, and the reward models that scored answers.

A run's report measures every stage on the run's own held-out questions, so that one sees which of them helped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError
from tunesmith.evaluation.compare import compare, score_interval, shown
from tunesmith.evaluation.metrics import METRICS
from tunesmith.evaluation.rows import EvalRow
from tunesmith.models import locate
from tunesmith.recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """A model on the way to a run's base."""

    name: str
    model: str
    """What `locate` finds it by."""
    revision: str | None = None
    method: str | None = None
    """How it was trained; None for what the first run started from."""


def stage(model: str, revision: str | None = None) -> Stage:
    """The stage that a model is: a run by its name and method, anything else by its id or its folder's name."""
    from tunesmith.training.lineage import run_behind

    if run := run_behind(model):
        return Stage(run.path.name, model, revision, run.recipe().method.kind)
    folder = Path(model).expanduser()
    return Stage(folder.name if folder.is_absolute() or folder.is_dir() else model, model, revision)


def earlier(base: str) -> tuple[list[Stage], list[str]]:
    """The stages before a run's base, the first one first, and what is to be said of those that are not there."""
    from tunesmith.training.lineage import run_behind

    found: list[Stage] = []
    missing: list[str] = []
    run = run_behind(base)
    while run:
        section = run.recipe().model
        run = run_behind(section.base)
        try:
            locate(section.base, revision=section.revision)
        except TunesmithError as error:
            missing.append(f"The stage {section.base} is not measured: {error.problem}")
        else:
            found.insert(0, stage(section.base, section.revision))
    return found, missing


def reward_models(recipe: Recipe) -> list[dict[str, Any]]:
    """The reward models of a recipe that are runs: by name, what their own held-out pairs showed."""
    from tunesmith.training.lineage import run_behind

    found = []
    for reward in getattr(recipe.method, "rewards", ()):
        run = run_behind(reward.model) if reward.kind == "model" else None
        compared = run.read("evaluation/comparison.json") if run else None
        primary = next((c for c in (compared or {}).get("comparisons", ()) if c["primary"]), None)
        if run and primary:
            found.append({"name": run.path.name, "method": run.recipe().method.kind, "comparison": primary})
    return found


def measured(
    stages: Sequence[tuple[Stage, Sequence[EvalRow]]],
    metrics: Sequence[str],
    *,
    resamples: int,
    confidence: float,
) -> list[dict[str, Any]]:
    """Of each stage, in their order: name, method, its score by metric, and what the primary metric says of it against
    the stage before."""
    found: list[dict[str, Any]] = []
    before: Sequence[EvalRow] | None = None
    for one, rows in stages:
        scores = {name: vars(score_interval(rows, name, confidence=confidence)) for name in metrics}
        change = None
        if before is not None:
            compared = compare(before, rows, metrics=metrics, resamples=resamples, confidence=confidence)
            change = next((vars(c) for c in compared if c.primary), None)
        found.append({"name": one.name, "method": one.method, "scores": scores, "change": change})
        before = rows
    return found


def sentence(stages: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The way in a line: `tiny 0.0 % -> answers (sft) 44.0 % -> polite (ppo) 88.0 %`."""

    def part(one: Mapping[str, Any]) -> str:
        value = one["scores"][metric]["value"]
        how = f" ({one['method']})" if one["method"] else ""
        return f"{one['name']}{how} {'-' if value is None else shown(value, METRICS[metric])}"

    return " -> ".join(map(part, stages))
