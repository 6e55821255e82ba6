"""What a run rests on, and whether it may be continued: its recipe, and hashes of what the recipe names.

Every checkpoint says it in its manifest, which is sealed, so that a checkpoint is continued by what it was made with.
`plan.json` says the same for people, the recipe from a run's first moment on; it counts only where no checkpoint does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.compose import differing, validated
from tunesmith.errors import RecipeError, RunError, counted
from tunesmith.recipe import Recipe
from tunesmith.training import checkpoints
from tunesmith.training.run import Run, anchored, is_edited

MAY_CHANGE = ("output_dir", "name", "preset", "evaluation", "export", "tracking", "launch", "parallel")
"""Parts of the recipe that a continued run may change. Of `evaluation` only what validations do not use as well
(`OF_VALIDATIONS`). `launch` and `parallel` say how many processes hold which part of the model: weights change with
them by rounding, which is said."""

OF_ROUNDING = {
    "launch": ("kind", "processes", "workers", "nodes", "processes_per_node"),
    "parallel": ("kind", "reduce_dtype", "cpu_offload", "stage", "offload_optimizer", "offload_parameters"),
}
"""Fields of parts that may change by which sums are made in another order, or elsewhere."""

OF_VALIDATIONS = ("max_new_tokens", "batch_tokens", "seed", "run_code", "attempts", "attempts_temperature")
"""Fields of `evaluation` by which metrics are measured while training: where `training.best_by` is one of them, they
decide which model is the best one and when a run stops early."""


def rests_on(recipe: Recipe, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run: the parts of its recipe on which its weights rest, and `identity`,
    hashes by name of what these parts name."""
    content = recipe.model_dump(mode="json")
    kept = {name: value for name, value in content.items() if name not in MAY_CHANGE}
    kept["evaluation"] = {name: content["evaluation"][name] for name in OF_VALIDATIONS}
    kept |= {part: content[part] for part in OF_ROUNDING}
    return {"recipe": kept, "identity": dict(identity)}


def planned(run: Run) -> dict[str, Any] | None:
    """A run's plan.json; None where it is not there, or cannot be read any more."""
    try:
        content: Any = run.read("plan.json")
    except (RunError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def known(run: Run, checkpoint: Path | None) -> Mapping[str, Any] | None:
    """What a run rested on when a checkpoint of it was written; without one, or of one that does not say it, what the
    newest that does says, else plan.json. None where nothing is known."""
    for folder in ([checkpoint] if checkpoint else []) + checkpoints.found(run):
        try:
            said = checkpoints.manifest(folder).get("rests_on")
        except RunError:
            continue
        if isinstance(said, dict) and isinstance(said.get("recipe"), dict):
            return said
    return planned(run)


def differences(before: Recipe, after: Recipe) -> list[str]:
    """Fields of two recipes that differ and that a continued run may not change, with both values."""
    fixed = [f"evaluation.{name}" for name in OF_VALIDATIONS] if before.training.best_by != "loss" else []
    return [
        f"{path} was {old!r}, is {new!r}{' (it decides training.best_by)' if path in fixed else ''}"
        for path, old, new in differing(before.model_dump(mode="json"), after.model_dump(mode="json"))
        if path.split(".")[0] not in MAY_CHANGE or path in fixed
    ]


def check_continued(run: Run, recipe: Recipe) -> None:
    """Raises RunError where a run was started with another recipe than this one, or is finished."""
    if changed := differences(anchored(run.recipe()), recipe):
        raise RunError(
            f"The recipe differs from the one {run.path} was started with, so it cannot be continued.",
            found="; ".join(changed),
            fix="Undo these changes, or start a new run with another --name.",
        )
    check_unfinished(run)


def check_unfinished(run: Run) -> None:
    """Raises RunError where nothing of a run is left to be done."""
    if run.state() == "done":
        raise RunError(
            f"The run {run.path} is finished; there is nothing to resume.",
            fix=f"`tunesmith evaluate {run.path}` measures it again; a new --name starts another run.",
        )


def changed_identity(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of a run's identity differs, name by name; what one of both did not know is no difference."""
    differ = [
        name
        for name in before.keys() & now.keys()
        if before[name] != now[name] and before[name] and now[name]
    ]
    if set(differ) & {"chat template"}:
        differ.remove("tokenizer")  # it has the template in it
    gone = [f"{name} is no longer part of it" for name in sorted(before.keys() - now.keys())]
    new = [f"{name} is new" for name in sorted(now.keys() - before.keys())]
    said = [f"{name} was {str(before[name])[:12]}, is {str(now[name])[:12]}" for name in sorted(differ)]
    return [*said, *gone, *new]


def check_recipe(recipe: Recipe, run: Run, checkpoint: Path | None) -> None:
    """Raises RunError where a run's recipe is not what it was started with, or nothing says any more what that was.

    `recipe.yaml` is open to editors. Where base, data and template lie is not compared: they may be moved, and
    `check_identity` says whether they are still the same.
    """
    said = known(run, checkpoint)
    if said is None:
        if checkpoints.found(run):
            raise RunError(
                f"What {run.path} was started with is not known any more, so it cannot be continued.",
                found=f"no checkpoint says it, and plan.json cannot be read in {run.path}: the recipe, and hashes of "
                "the data and the base model",
                fix="Put plan.json back, or start a new run with another --name.",
            )
        return
    if "recipe" not in said:  # of an older tunesmith
        run.event(
            "warning", message="plan.json has no recipe, so whether recipe.yaml was edited is not known."
        )
        return
    then = _told(run, said["recipe"])
    sections: dict[str, Any] = {
        "model": {"base": recipe.model.base, "chat_template": recipe.model.chat_template},
        "data": {"dataset": recipe.data.dataset},
    }
    if then.data.mix and len(then.data.mix) == len(recipe.data.mix):
        pairs = zip(then.data.mix, recipe.data.mix, strict=True)
        sections["data"]["mix"] = [old.model_copy(update={"dataset": new.dataset}) for old, new in pairs]
    moved = {name: getattr(then, name).model_copy(update=changes) for name, changes in sections.items()}
    then = then.model_copy(update=moved)
    if changed := differences(then, recipe):
        raise RunError(
            f"The recipe of {run.path} is not the one it was started with, so it cannot be continued.",
            found="; ".join(changed),
            fix=f"Undo these changes in {run.path / 'recipe.yaml'}, or start a new run with another --name.",
        )
    if elsewhere := rounded(then, recipe) if OF_ROUNDING.keys() <= said["recipe"].keys() else []:
        run.event("warning", message=f"The run goes on, equal but for rounding: {'; '.join(elsewhere)}.")
    others = [
        f"evaluation.{name} was {old!r}, is {new!r}"
        for name in OF_VALIDATIONS
        if (old := getattr(then.evaluation, name)) != (new := getattr(recipe.evaluation, name))
    ]
    if recipe.training.measured and others:
        names = ", ".join(recipe.training.measured)
        run.event(
            "warning", message=f"Validations measure {names} otherwise from here on: {'; '.join(others)}."
        )


def _told(run: Run, content: Any) -> Recipe:
    """The recipe that a manifest or plan.json tells of a run. Raises RunError for what is none."""
    try:
        if not isinstance(content, dict):
            raise RecipeError("It is no recipe.", found=type(content).__name__)
        return validated(content)
    except RecipeError as error:
        raise RunError(
            f"What {run.path} was started with cannot be read, so it cannot be continued.",
            found=error.found or error.problem,
            fix="Start a new run with another --name.",
        ) from None


def say_environment(run: Run, checkpoint: Path | None) -> None:
    """Say what of machine and packages is another than when a checkpoint was written: the bits may differ then."""
    if checkpoint and (changed := checkpoints.environment_differences(checkpoint)):
        run.event("warning", message=f"The run goes on, though not to the bit: {'; '.join(changed)}.")


def say_beginning(run: Run, checkpoint: Path | None) -> None:
    """Say where a run that is continued takes up no checkpoint, so that its steps are taken from the first one on."""
    if checkpoint is None and not (run.path / "training.json").exists():
        why = "as asked" if checkpoints.found(run) else "no checkpoint was saved before it ended"
        run.event("warning", message=f"Training begins at the first step: {why}.")


def rounded(before: Recipe, after: Recipe) -> list[str]:
    """Fields of two recipes that differ and change a continued run by rounding alone, with both values."""
    return [
        f"{path} was {old!r}, is {new!r}"
        for path, old, new in differing(before.model_dump(mode="json"), after.model_dump(mode="json"))
        if path.partition(".")[2] in OF_ROUNDING.get(path.partition(".")[0], ())
    ]


def check_identity(
    run: Run, checkpoint: Path | None, identity: Mapping[str, Any], *, rows: int | None = None
) -> None:
    """Raises RunError where what a run's recipe names is not what it was, with the number of its `rows` before and now
    where that is known. A plan.json that says something else than the checkpoint is told, since it is written anew."""
    said = known(run, checkpoint)
    if said is None:
        if (run.path / "plan.json").exists():
            run.event(
                "warning", message="plan.json cannot be read and is written anew; no checkpoint rests on it."
            )
        return
    then = said.get("identity")
    if not isinstance(then, dict):  # of an older tunesmith
        then = {**identity, "tokens": said.get("data_sha256")}
    if changed := changed_identity(then, identity):
        match planned(run):
            case {"rows": {"rows_in": int(before)}} if rows is not None and "data set " in "; ".join(changed):
                changed.append(
                    f"there were {counted(before, 'row')}, there are {rows:,} now"
                    if rows != before
                    else f"there are {counted(rows, 'row')} as before, of other content or in another order"
                )
        raise RunError(
            f"What {run.path} rests on is not what it was started with, so it cannot be continued.",
            found="; ".join(changed),
            fix="Restore it, or start a new run with another --name.",
        )
    plan = planned(run)
    if plan is None or plan.get("identity", then) != then or is_edited(plan):
        why = "is missing or cannot be read" if plan is None else "is not as it was written"
        run.event(
            "warning",
            message=f"plan.json {why}; what counts stands in the checkpoint, and it is written anew."
            if checkpoints.found(run)
            else f"plan.json {why}, and is written anew; no checkpoint rests on it.",
        )
