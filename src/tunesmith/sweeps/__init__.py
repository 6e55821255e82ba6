"""Sweeps: trials of one recipe with other values, chosen by validation, told apart on held-out questions.

    space -> trials (ordinary runs) -> the best by validation -> comparison on held-out questions -> recipe, page

`sweep.json` is the record, rewritten whole after every trial; a sweep that is started again goes on from it, and
proposes what it would have proposed. No trial is measured on held-out questions before one of them is chosen.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from tunesmith import launch
from tunesmith.compose import as_yaml, differing
from tunesmith.errors import Interrupted, MissingExtra, RecipeError, RunError, TunesmithError, counted, does
from tunesmith.recipe import Local, Ray, Recipe
from tunesmith.sweeps import space as spaces
from tunesmith.sweeps.space import Distribution, short
from tunesmith.sweeps.trials import Pruned, State, Trial, best_of, carried_out, higher_is_better, name_of
from tunesmith.training.run import Run, Watch, folder_name, is_run, write_whole

if TYPE_CHECKING:
    from tunesmith.evaluation.compare import Comparison

Engine = Literal["optuna", "ray"]
Pruner = Literal["median", "asha", "none"]

RECORD, BEST, PAGE = "sweep.json", "best.yaml", "report.html"
REPEATS = 5
"""Proposals of values that were tried before, after which untried ones are drawn by chance."""
IN_VAIN = 3
"""Trials that fail one after the other before any is done, after which a sweep ends."""
STARTUP = 4
"""Trials that the median pruner lets end before it prunes any."""
HALVING = 4
"""ASHA lets the best one of so many go on, at the first validation and then each time at so many times the steps."""


@dataclass(frozen=True)
class Against:
    """A model against the chosen trial on held-out questions, on the primary metric."""

    comparison: Comparison
    low: float | None
    """Ends of an interval that holds together with those of all others here: each at 1 - (1 - confidence) / number."""
    high: float | None


@dataclass(frozen=True)
class Compared:
    """What the held-out questions have said."""

    trials: tuple[str, ...]
    """The names of the trials that were compared, the best one first."""
    against: tuple[Against, ...] = ()
    """The base and the next best trials against the best one; empty where nothing could be compared."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """What a sweep came to."""

    folder: Path
    by: str
    """What trials are chosen by: `loss`, or a metric at validation."""
    space: Mapping[str, Distribution]
    trials: tuple[Trial, ...]
    best: Trial
    compared: Compared
    notes: tuple[str, ...]
    seconds: float
    recipe: Path | None = None
    """The file of the best recipe."""
    page: Path | None = None

    @property
    def against(self) -> tuple[Against, ...]:
        """The base and the next best trials against the best one."""
        return self.compared.against

    def count(self, state: State) -> int:
        """How many trials ended so."""
        return sum(trial.state == state for trial in self.trials)

    def sentences(self) -> list[str]:
        """What was found, and how far to trust it."""
        from tunesmith.sweeps.page import sentences

        return sentences(self)

    def as_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "folder": str(self.folder),
            "by": self.by,
            "space": {path: str(given) for path, given in self.space.items()},
            "trials": [{**asdict(trial), "name": trial.name} for trial in self.trials],
            "counts": {state: self.count(state) for state in ("done", "pruned", "failed", "open")},
            "best": self.best.name,
            "values": dict(self.best.values),
            "value": self.best.value,
            "against_best": [
                {**asdict(one.comparison), "simultaneous": [one.low, one.high]} for one in self.against
            ],
            "compared": {"trials": list(self.compared.trials), "notes": list(self.compared.notes)},
            "notes": list(self.notes),
            "recipe": str(self.recipe) if self.recipe else None,
            "run": str(self.folder / self.best.name),
            "report": str(self.page) if self.page else None,
            "seconds": round(self.seconds, 1),
        }


def sweep(
    recipe: Recipe,
    space: Mapping[str, Distribution],
    *,
    trials: int,
    engine: Engine,
    pruner: Pruner,
    seed: int,
    compared: int,
    watch: Watch,
) -> Sweep:
    """Try values of a space, one trial after the other (`optuna`) or several at once (`ray`), until there are `trials`.

    The space is one that `space.checked` gave for this recipe. Trials share everything but their values; the best one
    is that with the best validation. It is then compared, on the held-out questions, with the base and the `compared`
    next best ones. A sweep of the same name that ended early, or that is to have more trials, goes on. Raises
    RecipeError for a recipe without validation, and RunError where the folder is that of another sweep, or no trial is
    finished.
    """
    started = time.perf_counter()
    if not recipe.data.validation:
        raise RecipeError(
            "A sweep chooses by validation, and the recipe keeps no rows for it.",
            found="data.validation 0",
            fix="Set data.validation, such as 0.1.",
        )
    folder = Path(recipe.output_dir).expanduser().absolute() / f"{folder_name(recipe)}.sweep"
    about = {
        "recipe": recipe.model_dump(mode="json", exclude={"launch", "output_dir", "preset"}),
        "space": {path: str(given) for path, given in space.items()},
        "seed": seed,
        "by": recipe.training.best_by,
    }
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=1):
            records, before = _before(folder, about)
            notes = _tried(recipe, space, records, folder, about, trials, engine, pruner, seed, watch)
            by = recipe.training.best_by
            ranked = [
                (one.value, one) for one in records.values() if one.state == "done" and one.value is not None
            ]
            if not ranked:
                reasons = [one.reason for one in records.values() if one.state == "failed"]
                raise RunError(
                    f"None of {counted(len(records), 'trial')} was finished.",
                    found=reasons[-1] if reasons else None,
                    fix="Narrow the space to values that train, or mend the recipe; the record is in "
                    f"{folder / RECORD}.",
                )
            ranked.sort(key=lambda one: one[0], reverse=higher_is_better(by))
            best, *others = [one for _, one in ranked[: compared + 1]]
            names = (best.name, *(one.name for one in others))
            if before and before.trials == names:
                found = before
                told = "kept: the same trials were compared by an earlier start"
                watch({"kind": "decision", "name": "held-out questions", "value": told})
            else:
                found = _compared(recipe, folder, best, others, watch)
            every = tuple(records[number] for number in sorted(records))
            seconds = time.perf_counter() - started
            done = Sweep(folder, by, space, every, best, found, (*notes, *found.notes), seconds)
            return _written(done, recipe, about)
    except Timeout:
        raise RunError(
            f"Another process sweeps in {folder}.", fix="Wait for it, or give this sweep another --name."
        ) from None


def _before(folder: Path, about: Mapping[str, Any]) -> tuple[dict[int, Trial], Compared | None]:
    """The trials that an earlier start of this sweep has made, and what it has compared. Raises RunError where the
    folder is another sweep's."""
    file = folder / RECORD
    if not file.is_file():
        if others := [path.name for path in folder.iterdir() if path.name != ".lock"]:
            raise RunError(
                f"The folder {folder} is not empty and not a sweep.",
                found=", ".join(sorted(others)[:5]),
                fix="Give this sweep another --name.",
            )
        return {}, None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        found = {int(one["number"]): _trial(one) for one in kept["trials"]}
        before, compared = kept["about"], _compared_before(kept)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{file} is damaged.", found=str(error), fix="Restore it, or delete the folder."
        ) from None
    if changed := [
        f"{path} was {old!r}, is {new!r}"
        for path, old, new in differing(before, json.loads(json.dumps(about)))
    ]:
        raise RunError(
            f"The sweep in {folder} is another one, so it cannot go on.",
            found="; ".join(changed[:8]),
            fix="Undo these changes, or give this sweep another --name.",
        )
    return found, compared


def _compared_before(kept: Mapping[str, Any]) -> Compared | None:
    from tunesmith.evaluation.compare import Comparison

    known = {one.name for one in dataclasses.fields(Comparison)}
    against = []
    for one in kept.get("against_best", ()):
        own: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in one.items() if key in known
        }
        against.append(Against(Comparison(**own), *one["simultaneous"]))
    about = kept.get("compared")
    return (
        Compared(tuple(about["trials"]), tuple(against), tuple(about["notes"])) if about and against else None
    )


def _trial(kept: Mapping[str, Any]) -> Trial:
    known = {one.name for one in dataclasses.fields(Trial)}
    given = {key: value for key, value in kept.items() if key in known}
    validations = tuple((int(step), float(value)) for step, value in given.get("validations", ()))
    return Trial(**{**given, "validations": validations})


def _record(
    folder: Path,
    about: Mapping[str, Any],
    records: Mapping[int, Trial],
    more: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    lines = [{**asdict(records[number]), "name": name_of(number)} for number in sorted(records)]
    kept = {"about": about, "trials": lines, **more}
    write_whole(folder / RECORD, json.dumps(kept, indent=1, ensure_ascii=False))


def _recipe_of(
    recipe: Recipe, folder: Path, number: int, values: Mapping[str, Any], engine: Engine
) -> Recipe:
    """A trial's recipe: its values, its place, and no measurement on held-out questions."""
    own = spaces.settled(recipe, values)
    return own.model_copy(
        update={
            "name": name_of(number),
            "output_dir": str(folder),
            "evaluation": own.evaluation.model_copy(update={"skip": True}),
            "export": type(own.export)(),
            **({"launch": Local()} if engine == "ray" else {}),
        }
    )


def _tried(
    recipe: Recipe,
    space: Mapping[str, Distribution],
    records: dict[int, Trial],
    folder: Path,
    about: Mapping[str, Any],
    trials: int,
    engine: Engine,
    pruner: Pruner,
    seed: int,
    watch: Watch,
) -> list[str]:
    """Carry out what is missing of the trials; what is to be said of it."""
    notes: list[str] = []

    def keep(trial: Trial) -> None:
        records[trial.number] = trial
        _record(folder, about, records)
        if trial.state == "open":
            told = ", ".join(f"{path} {short(value)}" for path, value in trial.values.items())
            watch({"kind": "decision", "name": trial.name, "value": told})
        else:
            value = "-" if trial.value is None else f"{trial.value:.4g}"
            reason = trial.reason or f"{about['by']} at step {trial.step}"
            watch(
                {"kind": "decision", "name": f"{trial.name} {trial.state}", "value": value, "reason": reason}
            )

    if before := sum(trial.state != "open" for trial in records.values()):
        told = f"{counted(before, 'trial')} of an earlier start are not repeated"
        watch({"kind": "decision", "name": "sweep", "value": "goes on", "reason": told})
    if engine == "optuna" and pruner != "none" and launch.starts(recipe.launch):
        pruner = "none"
        why = f"trials train in processes of their own (launch.kind {recipe.launch.kind}), which go on to their end"
        was_pruned = any(trial.state == "pruned" for trial in records.values())  # by an earlier start
        if not was_pruned or before < trials:
            notes.append(f"No {'further ' if was_pruned else ''}trial was pruned: {why}.")
        watch({"kind": "decision", "name": "pruner", "value": "none", "reason": why})
    if engine == "ray" and pruner == "median":
        pruner = "asha"
        why = "trials at once have no median to be held against"
        notes.append(f"On Ray ASHA prunes instead: {why}.")
        watch({"kind": "decision", "name": "pruner", "value": "asha", "reason": why})
    search = _Search(recipe, space, records, folder, trials, engine, pruner, seed, keep, watch)
    notes += _at_once(search) if engine == "ray" else _one_by_one(search)
    alone = all(len(one.validations) < 2 for one in records.values() if one.state == "done")
    if pruner != "none" and alone and not any(one.state == "pruned" for one in records.values()):
        notes.append("No trial was validated twice, so that none could be pruned (training.eval_steps).")
    return notes


@dataclass(frozen=True)
class _Search:
    """What is tried, and what became of it so far."""

    recipe: Recipe
    space: Mapping[str, Distribution]
    records: dict[int, Trial]
    folder: Path
    trials: int
    engine: Engine
    pruner: Pruner
    seed: int
    keep: Callable[[Trial], None]
    watch: Watch

    def tried(self) -> list[dict[str, Any]]:
        """The values of all trials so far."""
        return [dict(one.values) for one in self.records.values()]

    def missing(
        self, propose: Callable[[int], dict[str, Any] | None], notes: list[str]
    ) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
        """Number, values and recipe of each trial that has not ended, recorded as open; `notes` is told where there is
        nothing left to propose."""
        for number in range(self.trials):
            known = self.records.get(number)
            if known and known.state != "open":
                continue
            values = dict(known.values) if known else propose(number)
            if values is None:
                notes.append(
                    f"The space is used up after {counted(len(self.records), 'trial')}: all its values were tried."
                )
                return
            self.keep(Trial(number, values))
            own = _recipe_of(self.recipe, self.folder, number, values, self.engine)
            yield number, values, own.model_dump(mode="json")


def _one_by_one(search: _Search) -> list[str]:
    """Trials of which each is proposed by those before it; what is to be said of it."""
    failed, notes = 0, list[str]()
    for number, values, own in search.missing(partial(_proposed, search), notes):
        asked = _asked(_study(search, number), search.space, values)

        def report(step: int, value: float, asked: Any = asked) -> None:
            asked.report(value, step)
            if asked.should_prune():
                raise Pruned(f"Its validation of {value:.4g} at step {step} lags behind ({search.pruner}).")

        try:
            ended = carried_out(number, own, report=report, watch=_inner(search.watch, number))
        except Interrupted as error:
            raise Interrupted(
                f"The sweep was stopped in trial {number} of {search.trials}; what was finished is saved.",
                fix="Start the same sweep again: it goes on.",
                exit_code=error.exit_code,
            ) from None
        search.keep(replace(ended, values=values))
        failed = failed + 1 if ended.state == "failed" else 0
        if failed >= IN_VAIN and not any(one.state == "done" for one in search.records.values()):
            raise RunError(
                f"The first {failed} trials have failed.",
                found=ended.reason,
                fix="Narrow the space to values that train, or mend the recipe.",
            )
    return notes


def _inner(watch: Watch, number: int) -> Watch:
    """What is shown of a trial's own events: its progress and warnings, under its name."""

    def told(event: Mapping[str, Any]) -> None:
        if event["kind"] == "progress":
            watch({**event, "stage": f"{name_of(number)}: {event['stage']}"})
        elif event["kind"] == "warning":
            watch({**event, "message": f"{name_of(number)}: {event['message']}"})

    return told


def require_optuna() -> Any:
    """Optuna. Raises MissingExtra without it."""
    try:
        import optuna
    except ImportError:
        raise MissingExtra("optuna", "tunesmith sweep", install="'tunesmith[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _distributions(space: Mapping[str, Distribution]) -> dict[str, Any]:
    """The space in Optuna's words; choices by their JSON, which holds lists as well."""
    known = require_optuna().distributions
    made = {}
    for path, given in space.items():
        match given.kind:
            case "choice":
                made[path] = known.CategoricalDistribution([json.dumps(value) for value in given.values])
            case "uniform" | "loguniform":
                made[path] = known.FloatDistribution(given.low, given.high, log=given.kind == "loguniform")
            case "int" | "logint":
                made[path] = known.IntDistribution(
                    int(given.low), int(given.high), log=given.kind == "logint", step=given.step
                )
    return made


def _study(search: _Search, number: int, again: int = 0) -> Any:
    """A study that knows the trials before this one, made anew for each: what it proposes depends on these, the seed
    and the number alone, whenever and how often the sweep was started."""
    optuna = require_optuna()
    states = optuna.trial.TrialState
    records = search.records
    first = min((one.validations[0][0] for one in records.values() if one.validations), default=1)
    pruners = {
        "median": optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
        "asha": optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=HALVING),
        "none": optuna.pruners.NopPruner(),
    }
    study = optuna.create_study(
        direction="maximize" if higher_is_better(search.recipe.training.best_by) else "minimize",
        sampler=optuna.samplers.TPESampler(seed=(search.seed * 1_000_003 + number * 1009 + again) % 2**32),
        pruner=pruners[search.pruner],
    )
    states_of = {"done": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}
    for _, one in sorted(records.items()):
        if one.number == number or one.state == "open":
            continue
        study.add_trial(
            optuna.trial.create_trial(
                state=states_of[one.state],
                params=_params(search.space, one.values),
                distributions=_distributions(search.space),
                value=one.value if one.state == "done" else None,
                intermediate_values=dict(one.validations),
                system_attrs=_rungs(one, first),
            )
        )
    return study


def _rungs(trial: Trial, first: int) -> dict[str, float]:
    """What a trial came to at each rung of ASHA, as Optuna's pruner notes it: at the first validation, and each time at
    `HALVING` times the steps. A pruned one ended at a rung and has seen none beyond."""
    rungs: dict[str, float] = {}
    for step, value in trial.validations:
        while step >= first * HALVING ** len(rungs):
            rungs[f"completed_rung_{len(rungs)}"] = value
            if trial.state == "pruned" and step == trial.validations[-1][0]:
                break
    return rungs


def _params(space: Mapping[str, Distribution], values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        path: json.dumps(value) if space[path].kind == "choice" else value for path, value in values.items()
    }


def _asked(study: Any, space: Mapping[str, Distribution], values: Mapping[str, Any]) -> Any:
    """A trial of the study with just these values."""
    study.enqueue_trial(_params(space, values))
    return study.ask(_distributions(space))


def _proposed(search: _Search, number: int) -> dict[str, Any] | None:
    """What to try next, which was not tried before; None where the space is used up.

    Where TPE comes back to the same values, as it does in a small space, untried ones are drawn by chance.
    """
    space, tried = search.space, search.tried()
    if spaces.is_used_up(space, tried):
        return None
    for again in range(REPEATS):
        study = _study(search, number, again)
        asked = study.ask(_distributions(space)).params
        found = {
            path: json.loads(asked[path]) if given.kind == "choice" else asked[path]
            for path, given in space.items()
        }
        if found not in tried:
            return found
    return spaces.untried(space, tried, search.seed, number)


def _at_once(search: _Search) -> list[str]:
    """Trials whose values are drawn beforehand, several at a time, on the workers of Ray; what is to be said of it."""
    from tunesmith import on_ray

    recipe, records, folder, notes = search.recipe, search.records, search.folder, list[str]()

    def drawn(number: int) -> dict[str, Any] | None:
        return spaces.untried(search.space, search.tried(), search.seed, number)

    asked = [{"number": number, "recipe": own} for number, _, own in search.missing(drawn, notes)]
    if not asked:
        return notes
    by = recipe.training.best_by

    def record(given: Mapping[str, Any]) -> None:
        before = records[int(given["number"])]
        step, value = best_of(before.validations, by)
        kept = {**asdict(before), "step": step, "value": value}
        found = _trial({**kept, **{key: value for key, value in given.items() if key != "values"}})
        path = folder / before.name
        if found.state == "pruned" and is_run(path) and Run(path).state() == "died":
            Run(path).finish("interrupted", error=f"pruned {found.reason}")
        search.keep(found)

    def told(number: int, step: int, value: float) -> None:
        before = records[number]
        known = {**dict(before.validations), step: value}  # those of a trial that goes on come again
        records[number] = replace(before, validations=tuple(sorted(known.items())))

    section = recipe.launch if isinstance(recipe.launch, Ray) else Ray()
    every = recipe.training.eval_steps
    longest = [recipe.training.max_steps]
    if "training.max_steps" in search.space:
        longest = list(search.space["training.max_steps"].every)
    on_ray.tried(
        asked,
        section,
        folder=folder,
        mode="max" if higher_is_better(by) else "min",
        patience=every if isinstance(every, int) else 1,
        horizon=None if None in longest else max(n for n in longest if n),
        prunes=search.pruner != "none",
        record=record,
        told=told,
        watch=search.watch,
    )
    return notes


def _compared(recipe: Recipe, folder: Path, best: Trial, others: Sequence[Trial], watch: Watch) -> Compared:
    """The base and other trials against the best one on held-out questions, which chose none of them."""
    names = tuple(trial.name for trial in (best, *others))

    def none(note: str) -> Compared:
        return Compared(names, notes=(note,))

    if recipe.evaluation.skip:
        return none("Nothing was measured on held-out questions: evaluation.skip is on.")
    if not recipe.data.held_out:
        return none("Nothing was measured on held-out questions: data.held_out is 0.")
    from tunesmith import api
    from tunesmith.evaluation import read_rows
    from tunesmith.evaluation.compare import compare_all

    runs = [folder / name for name in names]
    try:
        result = api.compare(runs[0], recipe.model.base, *runs[1:], watch=watch)
    except TunesmithError as error:
        return none(f"Nothing was compared on held-out questions: {error.problem}")
    found = [
        replace(c, model=_named(c.model, recipe), against=best.name) for c in result.comparisons if c.primary
    ]
    if not found or result.saved is None:
        return none("No metric of the recipe scores answers, so that nothing was compared.")
    section = recipe.evaluation
    by_model: dict[str, list[Any]] = {}
    for row in read_rows(result.saved / "rows.jsonl"):
        by_model.setdefault(row.model, []).append(row)
    together = compare_all(
        list(by_model.items()),
        metrics=[found[0].metric],
        primary=found[0].metric,
        resamples=section.resamples,
        confidence=1 - (1 - section.confidence) / len(found),
    )
    against = tuple(Against(one, wide.low, wide.high) for one, wide in zip(found, together, strict=True))
    leaked = int((result.leakage or {}).get("leaked", 0))
    notes = (
        f"{counted(leaked, 'held-out question')} of {found[0].n} "
        f"{does('stand', leaked)} in the training rows, or nearly so, and may be remembered: "
        f"comparisons/{result.saved.name}/leakage.json."
    )
    return Compared(names, against, (notes,) if leaked else ())


def _named(model: str, recipe: Recipe) -> str:
    """What a model of the comparison is called: of two the base stands as `tuned`."""
    return model if model.startswith("trial-") else f"base ({Path(recipe.model.base).name})"


def _written(done: Sweep, recipe: Recipe, about: Mapping[str, Any]) -> Sweep:
    """The sweep with its files: the record, the best recipe, the page."""
    from tunesmith.sweeps.page import page

    own = spaces.settled(recipe, done.best.values)
    best = write_whole(done.folder / BEST, as_yaml(own))
    done = replace(done, recipe=best, page=done.folder / PAGE)
    records = {trial.number: trial for trial in done.trials}
    more = {key: value for key, value in done.as_dict().items() if key not in ("trials", "space", "by")}
    _record(done.folder, about, records, more)
    write_whole(done.folder / PAGE, page(done))
    return done
