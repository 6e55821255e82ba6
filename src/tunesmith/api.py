"""The verbs in Python: one function each, the same that the command line calls.

from tunesmith import train
from tunesmith.compose import compose

result = train(compose({"data": {"dataset": "my.jsonl"}, "adapter": {"kind": "lora"}}).recipe)
print(result.primary.verdict)
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import launch, libraries, preflight, ranks
from tunesmith.errors import (
    INTERRUPTED,
    TERMINATED,
    TRAIN_IN_LESS,
    Interrupted,
    ModelError,
    RecipeError,
    RunError,
    Terminated,
    TunesmithError,
    as_ours,
    closest,
    is_lost_peer,
    mended,
    nearest,
)
from tunesmith.recipe import (
    Accelerate,
    DataSource,
    Local,
    Ray,
    Recipe,
    Seq2Seq,
    Task,
)
from tunesmith.training.checkpoints import BEST
from tunesmith.training.continuing import check_continued, check_unfinished
from tunesmith.training.fit import quiet_libraries
from tunesmith.training.run import (
    OF_STEPS,
    Run,
    State,
    Watch,
    anchored,
    check_writable,
    counting,
    create,
    dataset_name,
    dataset_names,
    deciding,
    discard,
    find_runs,
    folder_name,
    is_run,
    open_run,
    warning,
    write_whole,
)

if TYPE_CHECKING:
    from tunesmith import jobs
    from tunesmith.data.examples import Ledger
    from tunesmith.data.inspection import Inspected
    from tunesmith.data.templates import Encoder
    from tunesmith.data.validation import Report
    from tunesmith.engines.batch import Answered
    from tunesmith.engines.check import EngineCheck
    from tunesmith.evaluation import EvalRow
    from tunesmith.evaluation.compare import Comparison
    from tunesmith.evaluation.unseen import MeasuredOn
    from tunesmith.export.artefact import Exported
    from tunesmith.export.deployment import Deployment
    from tunesmith.export.merge import Merged
    from tunesmith.export.parity import Held
    from tunesmith.export.publish import Plan as PushPlan
    from tunesmith.export.tried import Questions as TriedQuestions
    from tunesmith.export.tried import Tried
    from tunesmith.models import Kind
    from tunesmith.plan import Plan
    from tunesmith.sweeps import Engine as SweepEngine
    from tunesmith.sweeps import Pruner, Sweep
    from tunesmith.training.find_lr import RateSearch
    from tunesmith.training.self_check import SelfCheck
    from tunesmith.training.verifying import Verified


@dataclass(frozen=True)
class Result:
    """What `train`, `resume`, `demo`, `evaluate` and `compare` give."""

    run: Path | None
    comparisons: tuple[Comparison, ...]
    seconds: float
    scores: Mapping[str, Any] = field(default_factory=dict)
    samples: tuple[Mapping[str, str], ...] = ()
    """Answers side by side: question, reference, base, tuned."""
    report: Path | None = None
    published: str | None = None
    sides: tuple[str, str] | None = None
    """The names of A and B in a comparison of two models."""
    measured_on: MeasuredOn | None = None
    """The questions that `evaluate` and `compare` asked."""
    saved: Path | None = None
    """Folder of the rows and the result of `compare`."""
    models: tuple[str, ...] = ()
    """The names of all models of a comparison, the baseline first."""
    leakage: Mapping[str, Any] | None = None
    """What of the questions stands in the training data of the runs behind the models; None where none is known."""
    engine_check: Mapping[str, Any] = field(default_factory=dict)
    """By model whether the engine's answers are those that the model gives alone (`docs/generation.md`)."""

    @property
    def primary(self) -> Comparison | None:
        """The comparison that the verdict rests on; None where more than two models were compared."""
        found = [c for c in self.comparisons if c.primary]
        return found[0] if len(found) == 1 else None

    @property
    def verdicts(self) -> dict[str, str]:
        """The verdict on each challenger, on the primary metric."""
        names = dict(zip(("base", "tuned"), self.sides or (), strict=False))
        return {names.get(c.model, c.model): c.verdict for c in self.comparisons if c.primary}

    def _engine_check(self) -> dict[str, str]:
        return {model: str(check["sentence"]) for model, check in self.engine_check.items()}

    def as_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it: the primary comparison's fields first."""
        names = ("metric", "base", "tuned", "difference", "low", "high", "n", "verdict")
        primary = asdict(self.primary) if self.primary else {}
        return {
            **{name: primary.get(name) for name in names},
            **({"a": self.sides[0], "b": self.sides[1]} if self.sides else {}),
            **({"measured_on": asdict(self.measured_on)} if self.measured_on else {}),
            **({"saved": str(self.saved)} if self.saved else {}),
            **({"leakage": dict(self.leakage)} if self.leakage else {}),
            **({"models": list(self.models)} if self.models else {}),
            **({"verdicts": self.verdicts} if self.models else {}),
            **({"engine_check": self._engine_check()} if self.engine_check else {}),
            "seconds": round(self.seconds, 1),
            "run": str(self.run) if self.run else None,
            "report": str(self.report) if self.report else None,
            "published": self.published,
            "comparisons": [asdict(c) for c in self.comparisons],
            "scores": dict(self.scores),
            "samples": [dict(sample) for sample in self.samples],
        }


@dataclass(frozen=True)
class RunSummary:
    """One line of `tunesmith runs`."""

    path: Path
    state: str
    task: str
    model: str
    dataset: str
    """As the recipe names it; the data sets of a mix joined by ` + `."""
    step: int | None
    """The last one that was trained."""
    metric: str | None
    base: float | None
    tuned: float | None
    verdict: str | None
    bytes: int
    datasets: tuple[str, ...] = ()
    """Short names of the data sets."""
    delivered: int | None = None
    """The step whose model `final_model` is, the best one's or the last; None where there is none yet."""

    @property
    def steps(self) -> str:
        """The last step and, where it is another's, the one whose model the run delivers: `300, best 200`."""
        other = self.delivered is not None and self.delivered != self.step
        return f"{self.step or ''}" + (f", best {self.delivered}" if other else "")


def _unwatched(event: Mapping[str, Any]) -> None:
    """Watch nothing."""


def plan(
    recipe: Recipe, *, device: str | None = None, measured: bool = False
) -> tuple[Plan, Mapping[str, Any]]:
    """What a recipe would do here and what it would take, and what becomes of its rows; nothing is written or trained.

    `device` names one that is elsewhere (`devices.DEVICES`). `measured` takes two micro-steps on this machine, for the
    seconds. Refuses what `train` refuses, but for a run that does not fit, which is told with what to change.
    """
    if device:
        from tunesmith import devices

        devices.named(device)
    preflight.check(recipe, weights=False)
    from tunesmith.evaluation import leakage

    inputs = {**_inputs(recipe), "device": device, "measured": measured}
    results = _driver().execute(["plan", "encodings", "leakage", "estimate"], inputs=inputs)
    ledger, found = results["encodings"].ledger, results["leakage"]
    decisions = (*results["plan"].decisions, leakage.decision(found))
    planned = replace(results["plan"], decisions=decisions, estimate=results["estimate"])
    leaked = {"sentence": found.sentence(), "leaked": len(found.leaked), "review": len(found.review)}
    return planned, {"rows": ledger.counts(), "dropped": ledger.reasons(), "leakage": leaked}


def prepare(
    recipe: Recipe, *, processes: int = 1, share: tuple[int, int] = (1, 1), watch: Watch = _unwatched
) -> dict[str, Any]:
    """Have a recipe's rows read and tokenized into the cache, by several processes; `train` finds them there.

    With `share` (1, 4) this one does every fourth piece from the first on, and other nodes that see the same cache
    (`TUNESMITH_CACHE`) the others; whoever finishes last joins them. What is there already is not made again. Gives
    what was made, what is missing, and of joined rows the counts and the fingerprint. With several `processes` the
    program that calls this has to guard its own start (`if __name__ == "__main__":`).
    """
    recipe = anchored(recipe)
    first, of = share
    if not 1 <= first <= of:
        raise TunesmithError(
            f"There is no share {first} of {of}.",
            fix="Give --share K/N with K from 1 to N, such as --share 2/4.",
        )
    preflight.check(recipe, weights=False)
    from tunesmith import preparing
    from tunesmith.data import cache

    why = cache.unwritable()
    if not recipe.data.cache or why:
        raise TunesmithError(
            "Prepared rows can only be kept in the cache.",
            found=why if recipe.data.cache else "data.cache is false",
            fix="Set data.cache to true, and TUNESMITH_CACHE to a folder that can be written.",
        )

    progress = partial(counting(watch), "tokenizing")
    found = preparing.prepare(recipe, processes=processes, share=share, watch=progress)
    return {**found, "cache": str(cache.folder())}


def baseline(recipe: Recipe, *, watch: Watch = _unwatched) -> tuple[Result, list[EvalRow]]:
    """Scores of a recipe's base model on what the recipe holds out, before anything is trained, and its rows.

    `train` takes the rows, so that the base need not be asked again. Nothing is written. Raises
    TunesmithError where nothing is held out.
    """
    recipe = anchored(recipe)
    preflight.check(recipe)
    from tunesmith import dataflow, evaluation
    from tunesmith.methods import METHODS

    started = time.perf_counter()
    found = _driver().execute(["items", "metrics", "plan"], inputs=_inputs(recipe))
    if not found["items"]:
        raise TunesmithError(
            "No example is held out to measure on.", fix="Give more rows, or raise data.held_out."
        )
    checks: list[EngineCheck] = []
    rows = evaluation.answers(
        recipe.model,
        recipe.evaluation,
        found["items"],
        found["metrics"],
        name="base",
        base=recipe.model.base,
        tokenizer=dataflow._tokenizer(recipe)[0],
        device=found["plan"].device,
        dtype=found["plan"].dtype,
        watch=watch,
        head=METHODS[recipe.method.kind].head,
        checked=checks.append,
    )
    scores = evaluation.scores(rows, found["metrics"])
    seconds = time.perf_counter() - started
    kept = {check.model: check.as_dict() for check in checks}
    return Result(run=None, comparisons=(), seconds=seconds, scores=scores, engine_check=kept), rows


def find_lr(
    recipe: Recipe,
    *,
    low: float | None = None,
    high: float | None = None,
    steps: int = 100,
    seeds: int = 3,
    page: str | Path | None = None,
    watch: Watch = _unwatched,
) -> RateSearch:
    """Which learning rate fits a recipe, by a range test on throw-away copies of its model.

    Each of `seeds` copies takes `steps` steps while the rate grows exponentially from `low` to `high` (by default
    1e-7 to 1, and ten times that for adapters). Nothing is written but `page`, an HTML file with the curve.
    """
    from tunesmith.training import find_lr as finding

    launch.require_one_process()
    finding.exponential(low or finding.FULL[0], high or finding.LOW_RANK[1], steps)
    recipe = anchored(recipe)
    preflight.check(recipe)
    inputs = _driver().execute(["plan", "encodings", "packing"], inputs=_inputs(recipe))

    progress = partial(counting(watch), "learning rates")
    progress(0, seeds)
    with mended(in_less=TRAIN_IN_LESS):
        search = finding.find(recipe, inputs, low=low, high=high, steps=steps, seeds=seeds, progress=progress)
    if page:
        title = f"Learning rates for {dataset_name(recipe.model.base)} on {dataset_name(recipe.data.dataset)}"
        write_whole(Path(page), finding.page(search, title))
    return search


def train(
    recipe: Recipe,
    *,
    resume: str | None = None,
    base_rows: Sequence[EvalRow] = (),
    base_check: Mapping[str, Any] | None = None,
    watch: Watch = _unwatched,
) -> Result:
    """Run a recipe from its examples to the report.

    `resume` continues the run of the same folder from a checkpoint's name, or from `latest`. `base_rows` are
    the base's answers of `baseline`, used where they answer this recipe's questions, and `base_check` its result's
    engine check. Where the recipe's launch section says so, several processes are started for it; in processes that
    were launched together each trains its share, and the first one's result is that of the run. Raises a
    TunesmithError for everything the user can mend; a run that trained nothing leaves no folder behind.
    """
    recipe = anchored(recipe)
    preflight.check_is_here(recipe.launch, "--launch local trains here.")
    if launch.starts(recipe.launch):
        rows = [asdict(row) for row in base_rows]
        return _launched(recipe, {"resume": resume, "base_rows": rows, "base_check": base_check}, watch)
    if not ranks.is_first():
        return assisted()
    if resume is None:
        run = create(recipe, watch=watch)
        if base_rows:
            from tunesmith.evaluation import write_rows

            write_rows(run.evaluation / "rows.jsonl", base_rows)
            if base_check:
                run.write("evaluation/engine_check.json", base_check)
        return _carry_out(recipe, run, None, fresh=True)
    run = open_run(Path(recipe.output_dir).expanduser() / folder_name(recipe), watch=watch)
    check_continued(run, recipe)
    return _carry_out(recipe, run, resume, fresh=False)


def job(recipe: Recipe, folder: str | Path, *, resume: str | None = None) -> jobs.Job:
    """The files with which a cluster runs a recipe (`launch.kind` slurm, kubernetes, or ray with `launch.nodes`),
    as they lie in `folder`, how they are submitted, and what has to be so there. Nothing is written. With `resume`
    `latest` they only go on with a run. Raises RecipeError for another checkpoint, or a step that cannot be dealt
    evenly, and RunError where the run's folder is another run's."""
    from tunesmith import jobs

    return jobs.job(recipe, Path(folder), resume=resume)


def resume(
    run: str | Path, *, checkpoint: str = "latest", processes: int | None = None, watch: Watch = _unwatched
) -> Result:
    """Continue an interrupted run from its newest whole checkpoint, with the recipe it was started with.

    In as many processes as were launched together now, else in `processes`, else in those of the recipe; the run goes
    on at the same row whatever their number is.
    """
    opened = open_run(run, watch=watch)
    check_unfinished(opened)
    recipe = opened.recipe()
    if processes:
        section = (
            recipe.launch.model_copy(update={"workers": processes})
            if isinstance(recipe.launch, Ray)
            else Accelerate(processes=processes)
            if processes > 1
            else Local()
        )
        recipe = recipe.model_copy(update={"launch": section})
    preflight.check_is_here(recipe.launch, f"tunesmith resume {opened.path} --processes N goes on here.")
    if launch.starts(recipe.launch):
        return _launched(recipe, {"run": str(opened.path.absolute()), "checkpoint": checkpoint}, watch)
    if not ranks.is_first():
        return assisted()
    return _carry_out(recipe, opened, checkpoint, fresh=False)


def _launched(recipe: Recipe, job: Mapping[str, Any], watch: Watch) -> Result:
    """A run in several processes that are started here."""
    from tunesmith.evaluation.compare import Comparison

    number = launch.processes(recipe.launch)
    preflight.check_processes(recipe)
    if isinstance(recipe.launch, Ray):  # whose workers are in folders of their own
        place = recipe.launch.storage
        if place and "://" not in place:
            section = recipe.launch.model_copy(update={"storage": str(Path(place).expanduser().absolute())})
            recipe = recipe.model_copy(update={"launch": section})
        recipe = recipe.model_copy(
            update={"output_dir": str(Path(recipe.output_dir).expanduser().absolute())}
        )
    job = {"recipe": recipe.model_dump(mode="json"), **job}
    path = run_folder(job)
    try:
        if isinstance(recipe.launch, Ray):
            from tunesmith import on_ray

            found = on_ray.start(job, recipe.launch, watch)
        else:
            found = launch.start(job, number, watch)
    except TunesmithError as error:
        if is_run(path) and Run(path).state() == "died":
            _finish(Run(path), "failed", error=str(error))
        raise
    comparisons = tuple(Comparison(**given) for given in found["comparisons"])
    return Result(
        run=Path(found["run"]),
        comparisons=comparisons,
        seconds=found["seconds"],
        samples=tuple(found["samples"]),
        report=Path(found["report"]) if found["report"] else None,
        published=found["published"],
        engine_check=found["checks"],
    )


def run_folder(job: Mapping[str, Any]) -> Path:
    """The folder of the run that a job trains."""
    recipe = Recipe.model_validate(job["recipe"])
    return Path(job.get("run") or Path(recipe.output_dir).expanduser() / folder_name(recipe)).absolute()


def carry_out_job(job: Mapping[str, Any], *, watch: Watch, at: Callable[[Path], None]) -> dict[str, Any]:
    """What `train` or `resume` has started this process for; `at` is told the run's folder. The first process's
    result, as JSON holds it."""
    from tunesmith.evaluation import EvalRow

    recipe = Recipe.model_validate(job["recipe"])
    at(run_folder(job))
    if "run" in job:
        result = resume(job["run"], checkpoint=job["checkpoint"], watch=watch)
    else:
        rows = [EvalRow(**row) for row in job["base_rows"]]
        result = train(
            recipe, resume=job["resume"], base_rows=rows, base_check=job["base_check"], watch=watch
        )
    return {**result.as_dict(), "seconds": result.seconds, "checks": dict(result.engine_check)}


def assisted() -> Result:
    """Train along in a further process, until the first one has no more steps. It writes nothing and gives nothing."""
    started = time.perf_counter()
    quiet_libraries()
    with ranks.alone(), launch.ended_by_sigterm():
        libraries.load_libraries()
        job = ranks.job()
        try:
            if job:
                from tunesmith import dataflow

                dataflow._assist(job)
        except Interrupted:
            pass  # the first process says so, and ends as well
        except Exception as error:
            if is_lost_peer(error):
                raise SystemExit(1) from None  # which is the first process's, or the launcher's, to say
            ours = error if isinstance(error, TunesmithError) else as_ours(error, in_less=TRAIN_IN_LESS)
            ranks.complain(ours.problem if ours else f"{type(error).__name__}: {error}")
            ranks.leave()
            if ours and ours is not error:
                raise ours from error
            raise
    return Result(run=None, comparisons=(), seconds=time.perf_counter() - started)


def sweep(
    recipe: Recipe,
    space: Sequence[str],
    *,
    trials: int = 20,
    engine: SweepEngine = "optuna",
    pruner: Pruner = "median",
    seed: int = 0,
    compared: int = 3,
    watch: Watch = _unwatched,
) -> Sweep:
    """Which values of a space train a recipe best: trials, chosen by validation and told apart on held-out questions.

    `space` are texts such as `training.learning_rate=loguniform(1e-5,1e-3)`, and files of such lines. `engine` carries
    out one trial after the other (`optuna`, which learns from those before), or several at once on the workers of Ray
    that `launch` names (`ray`, with ASHA). The best one is compared with the base and the `compared` next best. A sweep
    that is started again goes on. Raises RecipeError for a space that does not fit the recipe, before any trial.
    """
    from tunesmith import sweeps

    launch.require_one_process()
    recipe = anchored(recipe)
    # On Ray each trial is trained by one worker.
    one = recipe.model_copy(update={"launch": Local()}) if engine == "ray" else recipe
    preflight.check_is_here(one.launch, "--launch local sweeps here.")
    found = sweeps.spaces.checked(sweeps.spaces.read(space), one)
    if engine == "optuna":
        sweeps.require_optuna()
    preflight.check(one)
    return sweeps.sweep(
        recipe, found, trials=trials, engine=engine, pruner=pruner, seed=seed, compared=compared, watch=watch
    )


def self_check(recipe: Recipe) -> SelfCheck:
    """Whether rows of this recipe give the same loss and gradient in batches of other sizes and when they are packed.

    A few rows go through the recipe's own trainer; nothing is trained or kept. Refuses what `train` refuses.
    """
    from tunesmith.training import self_check as checking

    launch.require_one_process()
    recipe = anchored(recipe)
    preflight.check(recipe)
    inputs = _driver().execute(["plan", "encodings"], inputs=_inputs(recipe))
    with mended(in_less=TRAIN_IN_LESS):
        return checking.check(recipe, inputs)


def verify_resume(recipe: Recipe, *, steps: int = 4, watch: Watch = _unwatched) -> Verified:
    """Whether a run of this recipe continues to the bit, found out in a folder that is thrown away.

    So many steps are trained, and trained again from the checkpoint of each. Refuses what `train` refuses.
    """
    from tunesmith.training import verifying

    launch.require_one_process()

    progress = partial(counting(watch), "continuing")
    return verifying.verify(anchored(recipe), steps=steps, train=train, resume=resume, progress=progress)


def demo(*, output_dir: str | Path = "runs", watch: Watch = _unwatched) -> Result:
    """The shipped tiny model learns text-to-SQL and is measured on databases it has never seen."""
    from tunesmith.compose import compose

    taken = {run.path.name for run in find_runs(Path(output_dir))}
    name = next(n for n in ("demo", *(f"demo-{i}" for i in range(2, len(taken) + 3))) if n not in taken)
    return train(compose({"name": name, "output_dir": str(output_dir)}, preset="demo").recipe, watch=watch)


def inspected_recipe(dataset: str, model: str | None, flags: Mapping[str, Any]) -> Recipe:
    """The recipe that says what is seen of a data set, or of a run's own data.

    Raises TunesmithError for a task beside a run, whose recipe has one.
    """
    from tunesmith.compose import compose, overlaid, validated

    changes = overlaid({"model": {"base": model}} if model else {}, dict(flags))
    if not is_run(Path(dataset)):
        return compose(overlaid({"data": {"dataset": dataset}}, changes)).recipe
    recipe = open_run(dataset).recipe()
    if "task" in flags:
        raise TunesmithError(
            f"--task is for data sets, and {dataset} is a run.",
            found=f"a run of the task '{recipe.task}'",
            fix="Leave it out; single options such as --max-length may be given.",
        )
    return validated(overlaid(recipe.model_dump(mode="json"), changes))


def inspect(
    recipe: Recipe, *, rows: Sequence[str] = (), count: int = 3, page: str | Path | None = None
) -> list[Inspected]:
    """What the model sees of the named rows (`12`, `file.jsonl:12`), else of the worst ones by each measure.

    The worst are the longest, the most truncated and those of which least is trained, `count` of each.
    `page` is an HTML file to write as well. Nothing is trained, and no weights are loaded.
    """
    from tunesmith import models
    from tunesmith.data import pairs
    from tunesmith.data.inspection import inspect_rows, write_page
    from tunesmith.data.templates import set_template

    quiet_libraries()
    tokenizer = models.load_tokenizer(recipe.model.base, revision=recipe.model.revision)
    seen: dict[str, Any] = {}
    [splits] = _driver().execute(["splits"], inputs=_inputs(recipe)).values()
    if models.kind(recipe.model.base, revision=recipe.model.revision) == "seq2seq":
        section = recipe.method if isinstance(recipe.method, Seq2Seq) else Seq2Seq()
        pairs.settle_template(tokenizer, recipe.model.chat_template, section.source_prefix)
        seen = {"encode": pairs.encode_rows, "cut": pairs.cutter(splits, tokenizer, recipe.data, section)}
    else:
        set_template(tokenizer, recipe.model.chat_template)
    found = inspect_rows(
        splits,
        tokenizer,
        max_length=recipe.data.max_length,
        loss_on=recipe.method.loss_on,
        over_long=recipe.data.over_long,
        on_breach=recipe.data.on_breach,
        rows=rows,
        count=count,
        **seen,
    )
    if page:
        sets = " + ".join(dataset_names(recipe.data))
        name = f"{sets} as {dataset_name(recipe.model.base)} sees it"
        write_page(found, Path(page), title=name)
    return found


@dataclass(frozen=True)
class Looked:
    """What a data set's rows look like before anything is made of them."""

    rows: int
    columns: tuple[str, ...]
    first: tuple[Mapping[str, Any], ...]
    """The first rows, as they stand in the source but for what the recipe renames."""
    formats: tuple[str, ...]
    """What they are read as; empty where that is not settled."""
    reason: str
    """Why, or what is missing and what settles it."""
    notes: tuple[str, ...] = ()


def look(section: DataSource, *, count: int = 5) -> Looked:
    """Columns and first rows of a data set, and the format that they are read as. Raises DataError for broken rows."""
    from tunesmith.data import OPENING, formats, sources
    from tunesmith.data.shaping import SHAPING, shaped

    opened = sources.open_source(section.dataset, **section.model_dump(include=OPENING))
    source = sources.checked(shaped(opened, **section.model_dump(include=SHAPING)), section.dataset)
    named: tuple[str, ...] = ()
    try:
        found = formats.detect(
            source,
            format=section.format,
            input_text_key=section.input_text_key,
            output_text_key=section.output_text_key,
        )
        named, reason = tuple(format.name for format in found.formats), found.reason
    except TunesmithError as error:
        reason = " ".join(part for part in (error.problem, error.fix) if part)
    first = tuple(dict(record.values) for record in itertools.islice(source.records, count))
    return Looked(source.facts.count, source.columns, first, named, reason, source.notes)


def ledger(recipe: Recipe) -> Ledger:
    """What becomes of every row of a recipe, with its length in tokens. Refuses what `train` refuses of the data."""
    quiet_libraries()
    [encodings] = _driver().execute(["encodings"], inputs=_inputs(recipe)).values()
    found: Ledger = encodings.ledger
    return found


def evaluate(
    model: str | Path,
    *,
    dataset: str | None = None,
    metrics: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    watch: Watch = _unwatched,
) -> Result:
    """Scores of a run's final model, or of any model, each with its interval.

    A run is measured on its own held-out split unless `dataset` is given; of that every row is used except
    those that the run was trained or validated on. `settings` is a sparse recipe layer that says how the
    data set is read and answered. Rows and scores are written to `output`, by default
    `<run>/evaluation/<dataset>` or `evaluations/<model>_<dataset>`, with a number behind it where another
    measurement lies there.
    """
    launch.require_one_process()
    _check_metric_names(metrics, settings)
    quiet_libraries()
    from tunesmith import evaluation
    from tunesmith.evaluation import keeping, measuring
    from tunesmith.evaluation.rows import asked_in

    started = time.perf_counter()
    given = Path(output) if output else None
    keeping.check_place([model], given)
    run, questions = measuring.questions_for([model], dataset, metrics, settings, watch, output=given)
    rows, chosen, longer = measuring.answers_of(model, questions, name="model", watch=watch)
    questions = questions.with_longer({str(model): longer})
    scores = evaluation.scores(rows, chosen)
    asked = questions.recipe.evaluation.max_new_tokens
    kept = {
        "model": scores,
        "measured_on": asdict(questions.measured_on),
        "metrics": chosen,
        "max_new_tokens": asked,
        **keeping.made_with({"model": model}, questions.recipe),
    }
    place = given or keeping.evaluation_folder(run, model, questions.recipe, kept)
    evaluation.write_rows(place / "rows.jsonl", rows)
    if made := evaluation.classification.classification(rows):
        kept["labels"] = asdict(made)
        deciding(watch)("labels", len(made.labels), made.sentence())
    if (bias := evaluation.length_bias(rows)) and bias.is_strong:
        warning(watch)(bias.sentence("the model"))
    if copied := asked_in(rows).sentence():
        warning(watch)(copied)
    write_whole(place / "scores.json", json.dumps(kept, indent=1))
    leaked = measuring.leak_facts(questions, {"model": rows}, chosen, None)
    keeping.keep_leaks(leaked, place / "leakage.json", watch)
    keeping.settle_answers(place, questions)
    return Result(
        run=place,
        comparisons=(),
        seconds=time.perf_counter() - started,
        scores=scores,
        measured_on=questions.measured_on,
        leakage=keeping.short_leakage(leaked),
        engine_check=questions.engine_check(),
    )


def generate(
    model: str | Path,
    dataset: str,
    output: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    watch: Watch = _unwatched,
) -> Answered:
    """A causal model's greedy answers to every row of a set of prompts, as JSON lines in `output`.

    `settings` is a sparse recipe layer: how the set is read (`data`), and by which engine it is answered
    (`evaluation.engine`, `ray` for several workers). After a kill the same call goes on. Raises RunError where the file
    is there already.
    """
    launch.require_one_process()
    quiet_libraries()
    from tunesmith import engines
    from tunesmith.compose import compose, overlaid
    from tunesmith.engines import batch
    from tunesmith.evaluation.judging.bench import source_of

    recipe = compose(overlaid(dict(settings or {}), {"data": {"dataset": dataset}})).recipe
    section = recipe.evaluation
    engines.check_shards(section)
    if section.attempts > 1:
        raise RecipeError("Answers to a set of prompts are greedy, one each.", fix="Leave --attempts out.")
    source = source_of(str(model), server=section.server, shards=section.shards)

    progress = partial(counting(watch), "answers")
    return batch.generate(
        source,
        recipe.data,
        section,
        Path(output).expanduser(),
        progress=progress,
        say=warning(watch),
    )


def compare(
    a: str | Path,
    b: str | Path,
    *more: str | Path,
    baseline: str | Path | None = None,
    dataset: str | None = None,
    metrics: Sequence[str] | None = None,
    primary: str | None = None,
    settings: Mapping[str, Any] | None = None,
    watch: Watch = _unwatched,
) -> Result:
    """Whether each run or model is better than the first one on the same held-out examples.

    The examples are chosen as by `evaluate`, from the first of the models that is a run, without those that
    any of them was trained or validated on. All are answered now, along one code path. Every model is set against
    `a`, or against the one that `baseline` names. Of two, the baseline stands as `base` and the other as `tuned` in
    the result. `primary` declares the metric on which the verdict rests, by default the first that scores answers.
    Rows and comparison are written to `comparisons/<a>_vs_<b>` beside the runs, with a number behind it where another
    comparison lies there.
    """
    launch.require_one_process()
    _check_metric_names(metrics, settings, primary)
    quiet_libraries()
    from tunesmith import evaluation
    from tunesmith.engines.check import remarked
    from tunesmith.evaluation import compare as comparing
    from tunesmith.evaluation import keeping, measuring

    started = time.perf_counter()
    models = measuring.baseline_first([a, b, *more], baseline)
    keeping.check_place(models, None, is_comparison=True)
    measuring.check_askable(models)
    run, questions = measuring.questions_for(models, dataset, metrics, settings, watch)
    names = measuring.side_names(*models)
    stand_ins = ("base", "tuned") if len(models) == 2 else names
    watch(measuring.findable(questions))
    found, longer, chosen = [], {}, list[str]()
    for model, name, stand_in in zip(models, names, stand_ins, strict=True):
        rows, fitting, longer[name] = measuring.answers_of(
            model,
            questions,
            name=stand_in,
            known_as=name,
            primary=primary,
            watch=measuring.renamed(watch, stand_in, name),
        )
        chosen = chosen or fitting
        found.append(rows)
    questions = questions.with_longer(longer)
    section = questions.recipe.evaluation
    compared = comparing.compare_all(
        list(zip(names, found, strict=True)),
        metrics=chosen,
        resamples=section.resamples,
        confidence=section.confidence,
        primary=primary,
        apart=[measuring.apart(models[0], other, questions.recipe) for other in models[1:]],
    )
    compared = remarked(compared, questions.engine_check())
    if len(models) == 2:
        compared = [replace(c, model="tuned", against="base") for c in compared]
    about = {
        "models": dict(zip(names, map(str, models), strict=True)),
        "measured_on": asdict(questions.measured_on),
        "metrics": chosen,
        "primary": primary,
        **keeping.made_with(dict(zip(names, models, strict=True)), questions.recipe),
    }
    place = keeping.comparison_folder(run, names, dataset, about)
    evaluation.write_rows(place / "rows.jsonl", itertools.chain.from_iterable(found))
    kept = {
        "a": str(models[0]),
        "b": str(models[1]),
        **about,
        "comparisons": [asdict(c) for c in compared],
        "engine_check": questions.engine_check(),
    }
    origins = measuring.made_from(models, names)
    leaked = measuring.leak_facts(questions, dict(zip(names, found, strict=True)), chosen, primary, origins)
    keeping.keep_leaks(leaked, place / "leakage.json", watch)
    write_whole(place / "comparison.json", json.dumps(kept, indent=1, ensure_ascii=False))
    keeping.settle_answers(place, questions)
    return Result(
        run=run.path if run else None,
        comparisons=tuple(compared),
        seconds=time.perf_counter() - started,
        sides=(names[0], names[1]) if len(models) == 2 else None,
        measured_on=questions.measured_on,
        saved=place,
        models=names,
        leakage=keeping.short_leakage(leaked),
        engine_check=questions.engine_check(),
    )


def _check_metric_names(
    metrics: Sequence[str] | None, settings: Mapping[str, Any] | None, primary: str | None = None
) -> None:
    """Raise RecipeError for an unknown metric, before any data or model is read."""
    from tunesmith.evaluation.metrics import known_metrics

    section = (settings or {}).get("evaluation")
    more = section.get("metrics") if isinstance(section, Mapping) else None
    known_metrics(
        [*(metrics or ()), *(more if isinstance(more, list) else ()), *([primary] if primary else ())]
    )


def validate(
    dataset: str,
    *,
    task: Task | None = None,
    settings: Mapping[str, Any] | None = None,
    model: str | Path | None = None,
    fix: bool = False,
    output: str | Path | None = None,
    limit: int = 100,
    processes: int = 1,
    watch: Watch = _unwatched,
) -> Report:
    """What is wrong with a data set, before it is trained on.

    `settings` is a sparse recipe layer that says how it is read and how long rows may be; where it names a method, rows
    that the method cannot use are errors. `model` adds what only tokens can tell. `fix` writes a cleaned copy with a
    ledger to `output`, by default `<name>.clean.jsonl` beside the file. At most `limit` findings of a kind are kept
    whole. Give more `processes` for large files from a program that guards its own start
    (`if __name__ == "__main__":`).
    """
    from tunesmith import data
    from tunesmith.compose import compose, overlaid
    from tunesmith.data import cleaning, validation
    from tunesmith.data.examples import Preference, Rating
    from tunesmith.data.formats import FORMATS

    layer = {"data": {"dataset": dataset}, **({"task": task} if task else {})}
    recipe = compose(overlaid(dict(settings or {}), layer)).recipe
    place = cleaning.target(recipe.data.dataset, output) if fix else None
    context: Encoder | None = None
    kind: Kind = "causal"
    adapt: data.Adapt = data.as_it_is
    if model:
        quiet_libraries()
        from tunesmith import models
        from tunesmith.data.templates import encoder
        from tunesmith.methods import METHODS

        tokenizer = models.load_tokenizer(str(model))
        kind = models.kind(str(model))
        models.settle_asking(tokenizer, kind, recipe.model, recipe.method)
        context, adapt = encoder(tokenizer), METHODS[recipe.method.kind].adapt
    usable: data.Adapt | None = None
    if "kind" in (settings or {}).get("method", {}):
        from tunesmith.methods import METHODS

        usable = METHODS[recipe.method.kind].adapt
    checks = validation.settings_for(
        recipe.data, max_length=recipe.data.max_length, context=context, limit=limit, adapt=usable
    )
    report, source, refused = validation.validate(
        recipe.data,
        checks,
        task=task,
        context=context,
        adapt=adapt,
        loss_on=recipe.method.loss_on,
        kind=kind,
        processes=processes,
        watch=watch,
    )
    shapes = {FORMATS[name].shape for name in report.formats if name in FORMATS}
    if task and not shapes.isdisjoint((Preference, Rating)):
        from tunesmith.methods import METHODS

        remarks = METHODS[recipe.method.kind].remarks
        said = [remark for shape, remark in remarks.items() if shape in shapes]
        report = replace(report, notes=(*report.notes, *said))
    report = replace(report, model=str(model) if model else None)
    if place and source:
        cleaned = cleaning.clean(source, place, checks, refused=refused, processes=processes, watch=watch)
        report = replace(report, fixed=cleaned)
    elif place:
        report = replace(report, notes=(*report.notes, "no cleaned copy is written: the rows cannot be read"))
    return report


def evaluate_suite(
    model: str | Path,
    suite: str,
    *,
    questions: str | Path | None = None,
    references: str | Path | None = None,
    judge: str | Path | None = None,
    baseline: str | Path | None = None,
    calibrate: bool = True,
    dry_run: bool = False,
    settings: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    watch: Watch = _unwatched,
) -> dict[str, Any]:
    """A suite's questions (`mt-bench`, `alpaca`, `arena`) answered by a model and, with a judge, judged.

    `lm-eval:TASKS` runs tasks of lm-evaluation-harness. `settings` may set how the answers are made: `max_new_tokens`
    of `evaluation`, by default 1024, its `attempts`, `engine`, `engine_check`, `batch_tokens` and `server`. All is
    written to `output`, by default `<run>/evaluation/<suite>` or `evaluations/<model>_<suite>`; answers that lie there
    under other settings are never written over (then `<suite>-2`, or with `output` an error). With `dry_run` nothing
    is answered and nobody asked: it gives what the judge would take if every answer were as long as it may be.
    """
    from tunesmith.compose import overlaid, validated
    from tunesmith.evaluation.judging import bench, harness, suites
    from tunesmith.evaluation.judging.settings import load_judge
    from tunesmith.evaluation.report import told_in_report

    launch.require_one_process()
    quiet_libraries()
    changes = dict(settings or {})
    known = () if suite.startswith("lm-eval:") else suites.SETTINGS
    unused = [
        f"{section}.{name}"
        for section, fields in changes.items()
        for name in fields
        if section != "evaluation" or name not in known
    ]
    if unused:
        raise TunesmithError(
            f"{', '.join(unused)} would have no effect with {'lm-eval' if not known else 'a suite'}.",
            fix="Leave it out.",
        )
    if dry_run and not judge:
        raise TunesmithError(
            "A dry run says what a judge would take, and none is named.", fix="Give --judge, or leave it out."
        )
    evaluation = validated(
        overlaid({"evaluation": {"max_new_tokens": suites.MAX_NEW_TOKENS}}, changes)
    ).evaluation
    label = re.sub(r"[^\w.-]+", "-", suite)
    run = open_run(model) if is_run(Path(model).expanduser()) else None
    beside = run.evaluation / label if run else Path("evaluations") / f"{Path(str(model)).name}_{label}"
    place = Path(output) if output else beside
    if not dry_run:
        check_writable(place, fix="Give --output with a folder that can be written.")
    if suite.startswith("lm-eval:"):
        given = {"questions": questions, "references": references, "judge": judge, "baseline": baseline}
        if unused := [f"--{name}" for name, value in given.items() if value]:
            raise TunesmithError(
                f"{', '.join(unused)} would have no effect with lm-eval.", fix="Leave it out."
            )
        return harness.run(model, suite.removeprefix("lm-eval:"), place, apart=output is None, watch=watch)
    if dry_run and judge:
        return bench.forecast(
            suites.suite_of(suite),
            load_judge(judge),
            questions=questions,
            compared=baseline is not None,
            max_new_tokens=evaluation.max_new_tokens,
            calibrated=calibrate,
            watch=watch,
        )
    found = bench.run_suite(
        model,
        suites.suite_of(suite),
        questions=questions,
        references=references,
        judge=load_judge(judge) if judge else None,
        baseline=baseline,
        evaluation=evaluation,
        output=place,
        apart=output is None,
        calibrated=calibrate,
        watch=watch,
    )
    told_in_report(run, deciding(watch))
    return found


def judge(
    answers: Sequence[str | Path],
    *,
    judge: str | Path | None,
    mode: str = "pair",
    questions: str | Path | None = None,
    references: str | Path | None = None,
    baseline: str | None = None,
    output: str | Path | None = None,
    calibrate: bool = True,
    dry_run: bool = False,
    watch: Watch = _unwatched,
) -> dict[str, Any]:
    """Let a judge grade answers (`single`) or compare those of models (`pair`); gives every figure.

    `answers` are FastChat answer files, which need `questions`, or runs and `rows.jsonl` files, which bring theirs.
    `judge` is a file of settings or `local:MODEL`. Judgments, figures and plots are written to `output`, by default
    `<run>/evaluation/judged_<mode>` or `judged`; what a stopped judging has paid for is used when it is started
    again. The report of a run that is judged alone is written anew.
    """
    from tunesmith.evaluation.judging import folder as judging
    from tunesmith.evaluation.judging.judgments import with_references
    from tunesmith.evaluation.judging.questions import read_questions
    from tunesmith.evaluation.judging.settings import load_judge
    from tunesmith.evaluation.report import told_in_report

    launch.require_one_process()
    quiet_libraries()
    if mode not in ("single", "pair"):
        raise TunesmithError(f"There is no mode '{mode}' of judging.", fix=nearest(mode, ("single", "pair")))
    if judge is None or not answers:
        raise TunesmithError(
            "Who judges is missing." if judge is None else "What is to be judged is missing.",
            fix="Give --judge FILE (docs/judge.md) or local:MODEL."
            if judge is None
            else "Name answer files or a run, or give --replay FILE.",
        )
    settings = load_judge(judge)
    own, given = judging.answered(answers, say=warning(watch))
    asked = read_questions(questions) if questions else own
    if not asked:
        raise TunesmithError("The questions of these answers are missing.", fix="Give --questions FILE.")
    run = open_run(answers[0]) if len(answers) == 1 and is_run(Path(answers[0]).expanduser()) else None
    if baseline is None and own and judging.has_base(given):
        baseline = "base"
        deciding(watch)("baseline", baseline, "what a run is measured against")
    place = Path(output) if output else run.evaluation / f"judged_{mode}" if run else Path("judged")
    if not dry_run:
        check_writable(place, fix="Give --output with a folder that can be written.")
    found = judging.judge_into(
        place,
        settings,
        with_references(asked, references) if references else asked,
        given,
        mode="single" if mode == "single" else "pair",
        baseline=baseline,
        calibrated=calibrate,
        dry_run=dry_run,
        watch=watch,
    )
    if not dry_run:
        told_in_report(run, deciding(watch))
    return {**found, "output": str(place)}


def chat(
    model: str | Path,
    messages: Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """The model's answer to a conversation, piece by piece, under its own chat template."""
    yield from Chat(model).answer(messages, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


class Chat:
    """A loaded model to talk to, so that a conversation loads it once."""

    def __init__(self, model: str | Path) -> None:
        quiet_libraries()
        from tunesmith import models
        from tunesmith import plan as planning
        from tunesmith.data import pairs
        from tunesmith.data.templates import set_template

        models.check_writes(str(model))
        self.tokenizer = models.load_tokenizer(str(model))
        self.is_seq2seq = models.kind(str(model)) == "seq2seq"
        settle = pairs.settle_template if self.is_seq2seq else set_template
        self.template = settle(self.tokenizer, None)
        self.model = models.load_model(str(model), device=planning.device())
        from tunesmith.training.lineage import run_behind

        run = run_behind(model) if self.is_seq2seq else None
        self.reads = run.input_length() if run else None
        """Most tokens of an input that an encoder-decoder model was trained to read, where a run says so."""

    def remark(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """What is to be said of a question before it is asked: that it is longer than the model was trained
        to read. It is asked whole."""
        length = len(self._prompt(messages)) if self.reads else 0
        if not self.reads or length <= self.reads:
            return None
        return (
            f"This is {length} tokens long, and the model was trained to read {self.reads} of an input; it is asked "
            "whole."
        )

    def _prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of what is asked. Raises ModelError where the template refuses."""
        from tunesmith.data import pairs, templates
        from tunesmith.data.examples import Message, Unusable

        turns = tuple(Message(m["role"], m["content"]) for m in messages)
        try:
            return list((pairs if self.is_seq2seq else templates).prompt_ids(turns, self.tokenizer))
        except Unusable as reason:
            raise ModelError(f"The model cannot be asked this: {reason}.") from None

    def answer(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Stream the next turn."""
        from tunesmith.data.templates import end_of_turn_ids
        from tunesmith.generation import stream

        yield from stream(
            self.model,
            self.tokenizer,
            self._prompt(messages),
            max_new_tokens=max_new_tokens,
            stop_ids=end_of_turn_ids(self.tokenizer),
            temperature=temperature,
            seed=seed,
        )


OUTPUT_DIR = "./fine_tuned_models"


def runs(output_dir: str | Path = OUTPUT_DIR) -> list[RunSummary]:
    """The runs of an output folder, oldest first, with state, scores and size; of a run's folder, that run.

    Raises RunError where there is no such folder, except for the default one, in which no run was made yet.
    """
    folder = Path(output_dir).expanduser()
    if is_run(folder):
        return [_summary(open_run(folder))]
    if not folder.is_dir() and folder != Path(OUTPUT_DIR):
        beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
        near = closest(folder.name, [p.name for p in beside if p.is_dir() and (is_run(p) or find_runs(p))])
        raise RunError(
            f"There is no output folder {output_dir}.",
            found="a file" if folder.exists() else None,
            fix=f"Did you mean '{folder.parent / near}'?"
            if near
            else "Name the folder that your runs are in, their --output-dir: `tunesmith runs FOLDER`.",
        )
    return [_summary(run) for run in find_runs(folder)]


def merge(
    model: str | Path | None = None,
    *,
    adapters: Sequence[str] = (),
    output: str | Path | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    check: str = "auto",
    rows: int = 50,
    watch: Watch = _unwatched,
) -> Merged:
    """Merge a run's adapter, or an adapter's folder, into its base: whole weights that need no adapter.

    `adapters` are more of them, each `PATH` or `PATH=WEIGHT`: their changes are added up. Written to `output`,
    by default `<run>/merged_model` or `<adapter>_merged`, tensor by tensor in files of at most `max_shard_size`, only
    where every layer, and the whole model where it fits into memory (`check`: `auto`, `logits`, `layers`), read back
    and asked up to `rows` held-out questions, answers as base and adapter do. `dtype` is how weights are stored
    (`auto`, `float32`, `float16`, `bfloat16`). Raises TunesmithError where there is nothing to merge, where the
    folder is taken, and where the check fails.
    """
    launch.require_one_process()
    quiet_libraries()
    from tunesmith.export import merge as merging
    from tunesmith.export.held import held_for
    from tunesmith.export.weights import size_in_bytes
    from tunesmith.training.lineage import run_behind_folder

    max_shard = size_in_bytes(max_shard_size)
    given = [*([(str(model), 1.0)] if model is not None else []), *map(merging.weighted, adapters)]
    if not given:
        raise TunesmithError("There is nothing to merge.", fix="Name a run or an adapter's folder.")
    merging.check_dtype(dtype)
    parts = []
    for name, weight in given:
        path = Path(name).expanduser()
        of_run = run_behind_folder(path)
        parts.append(merging.Part(merging.adapter_of(name, of_run), weight, of_run))
    adapter, run = parts[0].folder, parts[0].run
    own = run is not None and adapter == run.final_model.resolve() and len(parts) == 1
    beside = run.path / "merged_model" if run and own else adapter.with_name(f"{adapter.name}_merged")
    folder = merging.free_place(Path(output).expanduser() if output else beside)

    with mended():
        return merging.merge(
            parts,
            folder,
            dtype=dtype,
            max_shard=max_shard,
            check=check,
            held=lambda model, tokenizer: held_for(run, model, tokenizer, rows, watch),
            progress=deciding(watch),
            counted=counting(watch),
        )


def export(
    model: str | Path,
    *,
    to: str = "gguf",
    quant: str | None = None,
    output: str | Path | None = None,
    max_shard_size: str = "5GB",
    check: str = "auto",
    rows: int = 50,
    watch: Watch = _unwatched,
) -> Exported:
    """Write a run's model, an adapter or a model's folder for another program, and prove it.

    `to` is one of `export.artefact.TARGETS`, `quant` how weights are stored, by default as its `DEFAULTS` say;
    `max_shard_size` is for safetensors. Written to `output`, by default
    `<run>/exports/gguf-<quant>` or `<model>_gguf-<quant>`. The file is read back and asked up to `rows` held-out
    questions of the run (or some that ship): same prompt tokens, same greedy answers, logits within the stated
    tolerance, a score that is not worse. Where the verdict is bad the folder ends in `.failed`, and `passed` is false;
    where nothing could ask the file, it is None, and `parity.unproven` says why. `check`: `auto` compares with the
    model in float32, in bfloat16 where that does not fit into memory, or else prompts alone; `logits` insists on the
    first, `prompts` asks for the last. Raises TunesmithError for a family that cannot be written, before any work.
    """
    launch.require_one_process()
    quiet_libraries()
    from tunesmith import models as loading
    from tunesmith.export import artefact
    from tunesmith.export.held import check_rows, held_for
    from tunesmith.export.weights import size_in_bytes
    from tunesmith.training.lineage import run_behind_folder

    quant = quant or artefact.DEFAULTS.get(to, "")
    artefact.check_target(to, quant, check)
    max_shard = size_in_bytes(max_shard_size)
    check_rows(rows)
    source = Path(loading.locate(str(model)))
    if source.is_dir():
        loading.check_as_written(source)
    run = run_behind_folder(model)
    own = run is not None and source == run.final_model.resolve()
    beside = (
        run.path / "exports" / f"{to}-{quant}"
        if run and own
        else source.with_name(f"{source.name}_{to}-{quant}")
    )

    with mended():
        folder = Path(output).expanduser() if output else beside

        def held(model: Any, tokenizer: Any) -> Held:
            return held_for(run, model, tokenizer, rows, watch)

        if to == "safetensors":
            return artefact.export_weights(
                source,
                folder,
                quant=quant,
                run=run,
                max_shard=max_shard,
                check=check,
                held=held,
                progress=deciding(watch),
                counted=counting(watch),
            )
        return artefact.export(
            source,
            folder,
            to=to,
            quant=quant,
            run=run,
            check=check,
            held=held,
            progress=deciding(watch),
            counted=counting(watch),
        )


def serve(
    model: str | Path,
    *,
    name: str | None = None,
    adapters: Mapping[str, str] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_env: str | None = None,
    no_token: bool = False,
    allowed_hosts: Sequence[str] = (),
    engine: str = "auto",
    dtype: str = "float32",
    temperature: float = 0.0,
    limits: Mapping[str, int] | None = None,
    say: Callable[[str], None] = lambda sentence: None,
    ready: Callable[[str, str | None], None] = lambda url, token: None,
) -> None:
    """Serve a run's model, or any model's folder, with OpenAI's HTTP interface until it is stopped.

    `adapters` are further runs or adapters on the same base, by the name that requests ask for. `allowed_hosts` are
    names under which it is reached, beside those in the variable TUNESMITH_ALLOWED_HOSTS. `ready` is told the
    address, and the token where one was made. Raises RecipeError for an address, token or limit that cannot be used.
    """
    quiet_libraries()
    from tunesmith import plan as planning
    from tunesmith.serving import server

    server.check_engine(engine)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise RecipeError(
            f"Models are not served in '{dtype}'.", fix=nearest(dtype, ("float32", "bfloat16", "float16"))
        )
    token, is_new = server.token_from(token_env, without=no_token, host=host)
    from tunesmith.serving.models import sources

    base, folders = sources(str(model), name, dict(adapters or {}))
    where = server.Where(
        host=host,
        port=port,
        token=token,
        hosts=server.hosts_from(host, allowed_hosts),
        engine=engine,
        dtype=dtype,
        device=planning.device(),
        temperature=temperature,
    )
    server.serve(
        base,
        folders,
        where,
        server.limited(limits or {}),
        say=say,
        ready=lambda url: ready(url, token if is_new else None),
    )


def web(
    workspace: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    token_env: str | None = None,
    users: str | Path | None = None,
    allowed_hosts: Sequence[str] = (),
    key_envs: Sequence[str] = (),
    run_code: bool = False,
    recipe: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda sentence: None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve the web workbench until it is stopped; what it started goes on.

    `users` is a file of accounts, each with a workspace of its own; `recipe` is what the Recipe page starts from,
    sparse. `key_envs` are `NAME=HOST[:PORT]`: variables that users' settings may name as keys beside those of known
    providers. With `run_code` their recipes may have the code run that models write. `ready` is told the address, with
    the token where one was made. Raises RecipeError for an address that cannot be used, and for one that others reach
    without accounts.
    """
    quiet_libraries()
    from tunesmith.ui import server

    place = server.Place(
        Path(workspace),
        host,
        port,
        token_env,
        Path(users) if users else None,
        tuple(allowed_hosts),
        tuple(key_envs),
        run_code,
    )
    server.serve(place, say=say, ready=ready, recipe=recipe)


def try_model(
    model: str | Path,
    *,
    dataset: str | None = None,
    task: str | None = None,
    rows: int = 12,
    max_new_tokens: int | None = None,
    url: str | None = None,
    served_as: str | None = None,
    api_key_env: str | None = None,
    watch: Watch = _unwatched,
) -> Tried:
    """Whether a model works: a run's, an adapter, whole weights, or a deployment folder.

    Files, weights, chat template and stop tokens are looked at; then it is asked up to `rows` held-out questions of its
    run, or of `dataset`, or those that ship for `task`, for answers that are not empty, end by themselves and do not
    loop, for its perplexity and its speed. With `url` the server there, which serves it as `served_as`, is asked the
    same and compared token by token. `passed` is false where a check fails. Raises TunesmithError where there is no
    such model.
    """
    launch.require_one_process()
    quiet_libraries()
    from tunesmith import plan as planning
    from tunesmith.data import sources
    from tunesmith.export import tried as trying
    from tunesmith.http import Remote

    if rows < 1:
        raise TunesmithError(
            "A model is not tried without questions.", found=f"rows = {rows}", fix="Give 1 or more."
        )
    if task is not None and task not in trying.TASK_PROMPTS:
        raise TunesmithError(
            f"No questions ship for the task '{task}'.", fix=nearest(task, trying.TASK_PROMPTS)
        )
    if dataset:
        sources.local(dataset)  # one that is not there shows before anything is loaded
    if url is not None:
        Remote(url, setting="the address", api_key_env=api_key_env)  # so does a wrong one
    place = trying.place_of(model)
    task = task or place.task
    asked: list[TriedQuestions] = []

    def questions(loaded: Any, tokenizer: Any) -> TriedQuestions:
        asked.append(
            trying.questions_for(
                place.run or place.folder,
                dataset,
                task,
                loaded,
                tokenizer,
                rows=rows,
                max_new_tokens=max_new_tokens,
                watch=watch,
            )
        )
        return asked[0]

    with mended():
        found = trying.tried(
            place.folder,
            hashes=place.hashes,
            device=planning.device(),
            questions=questions,
            progress=counting(watch),
        )
    found = replace(found, folder=str(model))
    if url is None:
        return found

    return trying.with_server(
        found,
        place,
        asked[0] if asked else None,
        url,
        served_as or place.served_as or (place.run.path.name if place.run else place.folder.name),
        api_key_env=api_key_env,
        by_its_run=dataset is None and task is None,
        rows=rows,
        watch=watch,
    )


def prepare_deployment(
    model: str | Path,
    *,
    output_dir: str | Path,
    name: str | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    space: bool = False,
    demo: str = "auto",
    check: str = "auto",
    rows: int = 50,
    despite: bool = False,
    watch: Watch = _unwatched,
) -> Deployment:
    """Make a folder that serves a run's model elsewhere, and prove it: it is served here and asked up to `rows`
    held-out questions over HTTP.

    It holds whole weights, a manifest with the hash of every file, the server as a wheel with the versions of all it
    needs, Dockerfile, compose file, start script, a page to ask it on (`demo`: `chat`, `sql` with a schema as an input,
    or `auto`), a smoke test, and with `space` what a Space of the Hub needs. Requests ask for `name`. Where the verdict
    is bad, or a secret or a trained text is found in it (unless `despite`), the folder ends in `.failed`, and `passed`
    is false; where it is not asked, `passed` is None and `served.unproven` says why. Raises TunesmithError for a model
    that cannot be served.
    """
    launch.require_one_process()
    quiet_libraries()
    from tunesmith import models as loading
    from tunesmith.export import deployment, scan
    from tunesmith.export.held import check_rows, held_for
    from tunesmith.export.weights import size_in_bytes
    from tunesmith.serving.models import checked_name, name_of
    from tunesmith.training.lineage import run_behind_folder

    max_shard = size_in_bytes(max_shard_size)
    check_rows(rows)
    source = loading.folder_of(str(model))
    run = run_behind_folder(model)
    asked: list[Held] = []
    if name is None:
        own = run.path if run else Path(model).expanduser().absolute()
        name = name_of(own)
        if name != own.name:
            deciding(watch)("name", name, f"'{own.name}' cannot be asked for")

    def held(loaded: Any, tokenizer: Any) -> Held:
        if not asked:
            asked.append(held_for(run, loaded, tokenizer, rows, watch))
        return asked[0]

    with mended():
        return deployment.prepare(
            source,
            Path(output_dir).expanduser().resolve(),
            name=checked_name(name),
            run=run,
            dtype=dtype,
            max_shard=max_shard,
            space=space,
            demo=demo,
            check=check,
            held=held,
            trained=scan.trained_texts(run),
            despite=despite,
            progress=deciding(watch),
            counted_on=counting(watch),
        )


def push(
    run: str | Path,
    *,
    repository: str | None = None,
    private: bool = True,
    token: str | None = None,
    create: bool = True,
    despite: bool = False,
    watch: Watch = _unwatched,
) -> str:
    """Upload a run's final model, or the folder of an adapter, of whole weights or of a GGUF file, to the Hub and give
    its address.

    Without a token the Hub client's own login is used; `create` makes the repository where it is missing. Raises
    TunesmithError where a secret or what the model was trained on is found in the files, unless `despite`.
    """
    from tunesmith.export import scan
    from tunesmith.export.publish import publish, upload_of

    folder, repository, behind, known = upload_of(run, repository)
    address = publish(
        folder,
        repository,
        private=private,
        token=token,
        create=create,
        trained=scan.trained_texts(behind),
        despite=despite,
        known=known,
        told=deciding(watch),
    )
    if behind:
        behind.event("decision", name="published", value=address, reason="tunesmith push")
    return address


def push_plan(run: str | Path, *, repository: str | None = None, private: bool = True) -> PushPlan:
    """What `push` would send, looked through for secrets and for what was trained on; nothing is asked of the Hub."""
    from tunesmith.export import scan
    from tunesmith.export.publish import planned, upload_of

    folder, repository, behind, known = upload_of(run, repository)
    return planned(folder, repository, private=private, trained=scan.trained_texts(behind), known=known)


def pull(
    repository: str,
    *,
    output: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    output_dir: str | Path = OUTPUT_DIR,
    watch: Watch = _unwatched,
) -> Path:
    """Fetch a model from the Hub, never code or pickles, to `output`, by default a folder of the repository's name.

    `repository` may be a run that was pushed from here, its folder or its name in `output_dir`: then what it was
    pushed to. Raises RunError for a run that was not pushed.
    """
    from tunesmith.export.publish import fetch, repository_named

    repository, why = repository_named(repository, Path(output_dir).expanduser())
    if why:
        deciding(watch)("repository", repository, why)
    return fetch(
        repository,
        Path(output).expanduser() if output else Path(repository.rpartition("/")[2]),
        revision=revision,
        token=token,
    )


def show(what: str, name: str | None = None) -> list[dict[str, Any]]:
    """What there is of a kind, as entries with name and description; `model` describes a model.

    Raises TunesmithError naming the kinds.
    """
    from tunesmith import listing

    return listing.entries(what, name)


def _carry_out(recipe: Recipe, run: Run, checkpoint: str | None, *, fresh: bool) -> Result:
    """Drive the dataflow to the report, and leave a status whatever happens."""
    quiet_libraries()
    with libraries.loading():
        from tunesmith.export.card import write_card
        from tunesmith.training import checkpoints, continuing

    started = time.perf_counter()
    before = run.read("status.json")
    wanted = ["fitted"] if recipe.evaluation.skip else ["comparisons", "samples", "report"]
    published: str | None = None
    refused: TunesmithError | None = None
    with run.lock(), launch.ended_by_sigterm(), _leading():
        num_starts = _num_starts(run)
        (run.path / "status.json").unlink(missing_ok=True)
        try:
            for note in launch.settle(recipe.training):
                run.event("warning", message=note)
            libraries.read_ahead(recipe.model.base, recipe.model.revision)
            if fresh:
                preflight.check(recipe)
            else:
                preflight.check_settings(recipe)
                libraries.load_libraries()
                preflight.check_processes(recipe)
            point = checkpoints.choose(run, checkpoint) if checkpoint else None
            if not fresh:
                continuing.check_recipe(recipe, run, point)
                continuing.say_beginning(run, point)
            continuing.say_environment(run, point)
            results = _driver().execute(wanted, inputs={**_inputs(recipe), "run": run, "checkpoint": point})
            if recipe.evaluation.skip:
                from tunesmith.evaluation.report import write_report

                write_card(run, [])
                results["report"] = write_report(run.path)
            if recipe.export.push_to_hub:
                from tunesmith.export.publish import publish_run

                published, refused = publish_run(run, recipe.export)
        except (KeyboardInterrupt, Interrupted) as error:
            if lost := _lost(error):  # the launcher's signal, after another process has ended
                _finish(run, "failed", error=str(lost))
                raise lost from error
            _finish(run, "interrupted")
            if isinstance(error, Interrupted):
                raise
            raise Interrupted(
                f"Stopped at once; {_kept(run)}.",
                fix=f"tunesmith resume {run.path}",
                exit_code=TERMINATED if isinstance(error, Terminated) else INTERRUPTED,
            ) from None
        except Exception as error:
            if ranks.count() > 1:
                launch.ignore_sigterm()
            lost = ranks.lost(error)
            ours = lost or as_ours(error, in_less=_in_less(run))
            if fresh and not run.checkpoints.exists() and not lost:
                discard(run)
            elif not fresh and _num_starts(run) == num_starts:
                # Nothing of the run was touched, so it is what it was before.
                with contextlib.suppress(OSError):
                    run.event("state", state="not resumed", error=str(ours or error))
                    if before:
                        run.write("status.json", before)
            else:
                _finish(run, "failed", error=str(ours or error))
            if ours:
                raise ours from error
            raise
        result = Result(
            run=run.path,
            comparisons=tuple(results.get("comparisons", ())),
            seconds=time.perf_counter() - started,
            samples=tuple(results.get("samples", ())),
            report=results.get("report"),
            published=published,
            engine_check=run.read("evaluation/engine_check.json") or {},
        )
        run.finish(
            "done", seconds=round(result.seconds, 1), verdict=result.primary and result.primary.verdict
        )
    if refused:
        raise refused
    return result


@contextlib.contextmanager
def _leading() -> Iterator[None]:
    """As if there were no other process, but for the steps; in the end the others are told that it is one."""
    with ranks.alone():
        try:
            yield
        finally:
            ranks.dismiss()


def _finish(run: Run, state: State, **fields: Any) -> None:
    """Leave a status where the disk lets us: why a run ended is more important than that it could not be written."""
    with contextlib.suppress(OSError):
        run.finish(state, **fields)


def _in_less(run: Run) -> str:
    """What to do where memory is not enough for a run: what comes after its training has no steps to make smaller."""
    if run.final_model.is_dir():
        return f"The model is trained and saved. Close other programs; `tunesmith resume {run.path}` does the rest."
    return TRAIN_IN_LESS


def _kept(run: Run) -> str:
    """What there is of a run that was stopped in the midst of something."""
    from tunesmith.training import checkpoints

    if run.final_model.is_dir():
        return "the training is done and its model saved, what comes after it is not"
    for point in checkpoints.found(run):
        with contextlib.suppress(RunError):
            checkpoints.manifest(point)
            return f"what was done after {point.name} is not saved, and is done again"
    return "nothing was saved yet, so that it begins at the first step again"


def _num_starts(run: Run) -> int:
    """How often training began in this run."""
    return sum(event["kind"] == "state" and event.get("state") == "training" for event in run.events())


def _lost(error: BaseException) -> RunError | None:
    """That another process of the run is gone, where this one's end came of it."""
    cause: BaseException | None = error
    while cause:
        if lost := ranks.lost(cause):
            launch.ignore_sigterm()
            return lost
        cause = cause.__cause__ or cause.__context__
    return None


def _inputs(recipe: Recipe) -> dict[str, Any]:
    return {"recipe": recipe}


def _driver() -> Any:
    quiet_libraries()
    logging.getLogger("hamilton").setLevel(logging.CRITICAL + 1)  # its banner; errors still come through
    from hamilton import driver

    from tunesmith import dataflow

    return driver.Builder().with_modules(dataflow).build()


def _summary(run: Run) -> RunSummary:
    recipe = run.recipe()
    comparison = run.read("evaluation/comparison.json") or {"comparisons": []}
    primary: dict[str, Any] = next((c for c in comparison["comparisons"] if c["primary"]), {})
    # Decisions name steps as well, the best model's for instance.
    steps = [e["step"] for e in run.events() if e.get("kind") in OF_STEPS and e.get("step") is not None]
    return RunSummary(
        path=run.path,
        state=run.state(),
        task=recipe.task,
        model=recipe.model.base,
        dataset=" + ".join([recipe.data.dataset, *(part.dataset for part in recipe.data.mix)]),
        datasets=tuple(dataset_names(recipe.data)),
        step=steps[-1] if steps else None,
        metric=primary.get("metric"),
        base=primary["base"] if primary.get("n") else None,
        tuned=primary["tuned"] if primary.get("n") else None,
        verdict=primary.get("verdict"),
        bytes=sum(p.stat().st_size for p in run.path.rglob("*") if p.is_file()),
        delivered=(run.read(f"final_model/{BEST}") or {}).get("step"),
    )
