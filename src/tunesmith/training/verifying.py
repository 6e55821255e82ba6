"""Whether a run of a recipe goes on from a checkpoint as if nothing had happened, found out by doing it.

A few steps are trained with a checkpoint of each. Then a copy of the run is continued from every one of them, in
another folder, and must end with the same weights, the same optimizer and the same losses, to the bit.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.recipe import Export, Recipe, Tracking
from tunesmith.training import checkpoints, state
from tunesmith.training.run import Run

SHOWN = 5
"""Differences that are told of each step."""


@dataclass(frozen=True)
class Verified:
    """What became of the runs that were continued."""

    steps: int
    """Optimizer steps of the whole run."""
    continued_from: tuple[int, ...]
    differences: Mapping[int, tuple[str, ...]]
    """By the step that was continued from, what differs at the end; empty where nothing does."""

    @property
    def equal(self) -> bool:
        """Whether all ended with the same weights, optimizer and losses."""
        return not self.differences

    def sentence(self) -> str:
        """What was found, for people."""
        tried = ", ".join(map(str, self.continued_from))
        if self.equal:
            return (
                f"A run of this recipe continues to the bit: {self.steps} steps were trained, and trained again from "
                f"the checkpoint of each of the steps {tried}, with the same weights, optimizer and losses."
            )
        told = [f"from step {step}: {'; '.join(found)}" for step, found in self.differences.items()]
        return "A run of this recipe does not continue to the bit. " + " ".join(told)

    def as_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it."""
        return {
            "equal": self.equal,
            "steps": self.steps,
            "continued_from": list(self.continued_from),
            "differences": {str(step): list(found) for step, found in self.differences.items()},
            "sentence": self.sentence(),
        }


def verify(
    recipe: Recipe,
    *,
    steps: int,
    train: Callable[[Recipe], object],
    resume: Callable[[Path], object],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verified:
    """Train so many steps of a recipe in a folder that is thrown away, and continue from each of them.

    `train` and `resume` are those of `api`. Nothing of the recipe is changed but how long it trains, how often it
    saves, and that nothing is evaluated or published afterwards.
    """
    training = recipe.training.model_copy(
        update={"max_steps": steps, "save_steps": 1, "logging_steps": 1, "save_total_limit": steps + 1}
    )
    with tempfile.TemporaryDirectory(prefix="tunesmith-verify-") as place:
        shortened = recipe.model_copy(
            update={
                "name": "straight",
                "output_dir": place,
                "training": training,
                "evaluation": recipe.evaluation.model_copy(update={"skip": True}),
                "tracking": Tracking(),
                "export": Export(),
            }
        )
        progress(0, steps)
        train(shortened)
        straight = Run(Path(place) / "straight")
        taken = sorted(checkpoints.step_of(folder) for folder in checkpoints.found(straight))
        found: dict[int, tuple[str, ...]] = {}
        for number, step in enumerate(taken[:-1], 1):
            progress(number, steps)
            copy = interrupted_copy(straight, Path(place) / f"from-{step}", step)
            resume(copy.path)
            if differing := differences(straight, copy, since=step):
                found[step] = tuple(differing)
            shutil.rmtree(copy.path)
        progress(steps, steps)
        return Verified(taken[-1] if taken else 0, tuple(taken[:-1]), found)


def interrupted_copy(run: Run, folder: Path, step: int) -> Run:
    """A copy of a finished run as it would lie there had it been stopped after a step."""
    shutil.copytree(run.path, folder, ignore=shutil.ignore_patterns("final_model", ".*", "report.html"))
    copy = Run(folder)
    for later in checkpoints.found(copy):
        if checkpoints.step_of(later) > step:
            shutil.rmtree(later)
    for name in ("training.json", "status.json"):
        (folder / name).unlink(missing_ok=True)
    return copy


def differences(one: Run, other: Run, *, since: int = 0) -> list[str]:
    """What differs between two runs that should have come to the same: losses, weights, and the last checkpoint."""
    import torch
    from safetensors.torch import load_file

    told = []
    for kind, what in (("step", "loss"), ("evaluation", "validation loss")):
        losses = [
            {e["step"]: e["loss"] for e in run.events() if e["kind"] == kind and e["step"] > since}
            for run in (one, other)
        ]
        for step in sorted(losses[0].keys() | losses[1].keys()):
            if losses[0].get(step) != losses[1].get(step):
                told.append(
                    f"the {what} of step {step} is {losses[1].get(step)!r}, not {losses[0].get(step)!r}"
                )
                break
    folders = [(one.final_model, other.final_model)]
    last = [checkpoints.found(run)[:1] for run in (one, other)]
    names = [newest[0].name if newest else "none" for newest in last]
    if names[0] != names[1]:
        told.append(f"the last checkpoint is {names[1]}, not {names[0]}")
    folders += [(a, b) for a, b in zip(*last, strict=False)]
    for a, b in folders:
        for path in sorted(a.glob("*.safetensors")):
            if not (b / path.name).is_file():
                told.append(f"{a.name}/{path.name} is missing")
                continue
            before, after = load_file(path), load_file(b / path.name)
            differ = [n for n in before.keys() | after.keys() if not _same(before.get(n), after.get(n))]
            if differ:
                name = min(differ)
                by = ""
                if name in before and name in after and before[name].shape == after[name].shape:
                    largest = (before[name].to(torch.float64) - after[name].to(torch.float64)).abs().max()
                    by = f" by at most {float(largest):.3g}"
                told.append(f"{len(differ)} tensors of {a.name}/{path.name} differ, {name}{by}")
    numbers = [folder[0] / state.NUMBERS for folder in last if folder]
    if len(numbers) == 2 and _of_training(numbers[0]) != _of_training(numbers[1]):
        told.append("schedule, random numbers or counts of the last checkpoint differ")
    return told[:SHOWN]


def _same(one: Any, other: Any) -> bool:
    import torch

    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _of_training(file: Path) -> str:
    """A checkpoint's numbers without those that time how long something took."""
    found = state.read(file.parent)
    found["loop"] = {
        name: value for name, value in found["loop"].items() if name in ("_total_train_tokens", "_micro_rows")
    }
    return repr({name: found[name] for name in ("scheduler", "scaler", "random", "loop")})
