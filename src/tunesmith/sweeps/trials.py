"""One trial of a sweep: an ordinary run, its best validation, and how it ended."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunesmith.errors import Interrupted, TunesmithError
from tunesmith.recipe import Recipe, Training
from tunesmith.training.run import Run, folder_name, is_run

State = Literal["open", "done", "pruned", "failed"]


@dataclass(frozen=True)
class Trial:
    """What a trial tried, and what it came to."""

    number: int
    values: Mapping[str, Any] = field(default_factory=dict)
    """By the recipe's field what was tried."""
    state: State = "open"
    """`open` while it trains, and where the sweep ended before it did."""
    value: float | None = None
    """The best validation's, by `training.best_by`."""
    step: int | None = None
    """Of the best validation."""
    validations: tuple[tuple[int, float], ...] = ()
    """Step and value of each."""
    seconds: float = 0.0
    reason: str = ""
    """Why it was pruned, or has failed."""

    @property
    def name(self) -> str:
        """Of its run's folder."""
        return name_of(self.number)


def name_of(number: int) -> str:
    """The name of a trial's run."""
    return f"trial-{number:03}"


class Pruned(Interrupted):
    """A trial that lags behind the others and is ended at a validation."""


def higher_is_better(training: Training) -> bool:
    """Whether more is better of what a trial is chosen by."""
    from tunesmith.evaluation.metrics import METRICS

    return training.best_by != "loss" and METRICS[training.best_by].higher_is_better


def measured(event: Mapping[str, Any], by: str) -> float | None:
    """What a validation's event says of a model by `training.best_by`; None where it could not be measured."""
    value = event.get("loss") if by == "loss" else (event.get("measures") or {}).get(by)
    return float(value) if value is not None and math.isfinite(value) else None


def carried_out(
    number: int,
    given: Mapping[str, Any],
    *,
    report: Callable[[int, float], None],
    watch: Callable[[Mapping[str, Any]], None] = lambda event: None,
) -> Trial:
    """Train a trial's recipe, or go on with the run that was begun, and give what it came to, without its values.

    `report` is told step and value of each validation, those of a continued run again; where it raises Pruned, the run
    ends there. An error of the trial is its result; a request to stop is raised.
    """
    from tunesmith import api

    recipe = Recipe.model_validate(given)
    path = Path(recipe.output_dir).expanduser() / folder_name(recipe)
    by, started = recipe.training.best_by, time.perf_counter()
    found: dict[int, float] = {}

    def told(event: Mapping[str, Any]) -> None:
        watch(event)
        if event["kind"] == "evaluation" and (value := measured(event, by)) is not None:
            found[int(event["step"])] = value
            report(int(event["step"]), value)

    def ended(state: State, reason: str = "") -> Trial:
        order = sorted(found.items())
        best = (max if higher_is_better(recipe.training) else min)(
            order, key=lambda one: one[1], default=(None, None)
        )
        return Trial(
            number,
            {},
            state,
            best[1],
            best[0],
            tuple(order),
            round(time.perf_counter() - started, 1),
            reason,
        )

    try:
        if is_run(path):
            for event in Run(path).events():
                if event["kind"] == "evaluation" and (value := measured(event, by)) is not None:
                    found[int(event["step"])] = value
            if Run(path).state() != "done":
                api.resume(path, watch=told)
        else:
            api.train(recipe, watch=told)
    except Pruned as error:
        if is_run(path):
            Run(path).event("decision", name="pruned", value=f"trial {number}", reason=error.problem)
        return ended("pruned", error.problem)
    except Interrupted:
        raise
    except TunesmithError as error:
        failed = ended("failed", " ".join(filter(None, (error.problem, error.found))))
        if not error_of_a_trial(error):
            raise
        return failed
    if not found:
        return ended("failed", f"No validation has measured training.best_by={by}.")
    return ended("done")


def error_of_a_trial(error: TunesmithError) -> bool:
    """Whether an error is that of a trial's own values: it diverged, or took more than there is."""
    return error.exit_code == 3
