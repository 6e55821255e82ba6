"""One trial of a sweep: an ordinary run, its best validation, and how it ended."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunesmith.errors import Interrupted, OutOfMemory, TrainingDiverged, TunesmithError
from tunesmith.recipe import Recipe
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


def higher_is_better(by: str) -> bool:
    """Whether more is better of what trials are chosen by: `loss`, or a metric."""
    from tunesmith.evaluation.metrics import METRICS

    return by != "loss" and METRICS[by].higher_is_better


def best_of(validations: Iterable[tuple[int, float]], by: str) -> tuple[int | None, float | None]:
    """Step and value of the best validation, of equal ones the first; None where there was none."""
    best = max if higher_is_better(by) else min
    none: tuple[int | None, float | None] = (None, None)
    return best(sorted(validations), key=lambda one: one[1], default=none)


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

    `report` is told step and value of each validation but that of the last step, those of a continued run again; where
    it raises Pruned, the run ends there. What its own values have brought about (`is_of_its_values`) is its result; any
    other error, and a request to stop, is raised.
    """
    from tunesmith import api

    recipe = Recipe.model_validate(given)
    path = Path(recipe.output_dir).expanduser() / folder_name(recipe)
    by, started = recipe.training.best_by, time.perf_counter()
    found: dict[int, float] = {}
    last = math.inf

    def note(event: Mapping[str, Any], *, reports: bool = True) -> None:
        nonlocal last
        last = event.get("total_steps") or last
        if event["kind"] == "evaluation" and (value := measured(event, by)) is not None:
            step = int(event["step"])
            found[step] = value
            if reports and step < last:  # who has come to the last step has nothing left to save
                report(step, value)

    def told(event: Mapping[str, Any]) -> None:
        watch(event)
        note(event)

    def ended(state: State, reason: str = "") -> Trial:
        step, value = best_of(found.items(), by)
        seconds = round(time.perf_counter() - started, 1)
        return Trial(number, {}, state, value, step, tuple(sorted(found.items())), seconds, reason)

    try:
        if is_run(path):
            is_over = Run(path).state() == "done"
            for event in Run(path).events():
                note(event, reports=not is_over)
            if not is_over:
                api.resume(path, watch=told)
        else:
            api.train(recipe, watch=told)
    except Pruned as error:
        if is_run(path):
            Run(path).event("decision", name="pruned", value=f"trial {number}", reason=error.problem)
        return ended("pruned", error.problem)
    except TunesmithError as error:
        if not is_of_its_values(error):
            raise
        return ended("failed", " ".join(filter(None, (error.problem, error.found))))
    if not found:
        return ended("failed", f"No validation has measured training.best_by={by}.")
    return ended("done")


def is_of_its_values(error: TunesmithError) -> bool:
    """Whether an error is that of a trial's own values: it diverged, or took more memory than there is. A full disk is
    not, nor a request to stop: the next trial would meet them as well."""
    return isinstance(error, TrainingDiverged | OutOfMemory)
