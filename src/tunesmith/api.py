"""The verbs in Python: one function each, the same that the command line calls.

from tunesmith import train
from tunesmith.compose import compose

result = train(compose({"data": {"dataset": "my.jsonl"}, "adapter": {"kind": "lora"}}).recipe)
print(result.primary.verdict)
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import launch, libraries, parallel, ranks
from tunesmith.errors import (
    INTERRUPTED,
    TERMINATED,
    Interrupted,
    ModelError,
    OutOfMemory,
    OutOfResources,
    RecipeError,
    RunError,
    Terminated,
    TunesmithError,
    closest,
    is_lost_peer,
    is_out_of_disk,
    is_out_of_files,
    is_out_of_memory,
    is_refused_writing,
    nearest,
)
from tunesmith.recipe import (
    Accelerate,
    DataSource,
    Evaluation,
    Launch,
    Local,
    Ray,
    Recipe,
    RewardModel,
    Seq2Seq,
    Shards,
    Task,
)
from tunesmith.training.continuing import check_continued, check_unfinished
from tunesmith.training.fit import quiet_libraries
from tunesmith.training.run import (
    Run,
    State,
    Watch,
    anchored,
    create,
    dataset_name,
    dataset_names,
    discard,
    find_runs,
    folder_name,
    is_run,
    open_run,
    write_whole,
)

if TYPE_CHECKING:
    from tunesmith import jobs
    from tunesmith.data.examples import Example, Ledger
    from tunesmith.data.inspection import Inspected
    from tunesmith.data.templates import Encoder
    from tunesmith.data.validation import Report
    from tunesmith.engines.batch import Answered
    from tunesmith.engines.check import EngineCheck
    from tunesmith.evaluation import EvalRow
    from tunesmith.evaluation.compare import Comparison
    from tunesmith.evaluation.leakage import Leakage
    from tunesmith.evaluation.unseen import MeasuredOn
    from tunesmith.export.artefact import Exported
    from tunesmith.export.deployment import Deployment
    from tunesmith.export.merge import Merged
    from tunesmith.export.parity import Held, Parity
    from tunesmith.export.publish import Plan as PushPlan
    from tunesmith.export.tried import Questions as TriedQuestions
    from tunesmith.export.tried import Tried
    from tunesmith.generation import Generated
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
    metric: str | None
    base: float | None
    tuned: float | None
    verdict: str | None
    bytes: int
    datasets: tuple[str, ...] = ()
    """Short names of the data sets."""


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
    _check_before_training(recipe)
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
    _check_before_training(recipe)
    from tunesmith import preparing
    from tunesmith.data import cache

    why = cache.unwritable()
    if not recipe.data.cache or why:
        raise TunesmithError(
            "Prepared rows can only be kept in the cache.",
            found=why if recipe.data.cache else "data.cache is false",
            fix="Set data.cache to true, and TUNESMITH_CACHE to a folder that can be written.",
        )

    def told(done: int, total: int) -> None:
        watch({"kind": "progress", "stage": "tokenizing", "done": done, "total": total})

    found = preparing.prepare(recipe, processes=processes, share=share, watch=told)
    return {**found, "cache": str(cache.folder())}


def baseline(recipe: Recipe, *, watch: Watch = _unwatched) -> tuple[Result, list[EvalRow]]:
    """Scores of a recipe's base model on what the recipe holds out, before anything is trained, and its rows.

    `train` takes the rows, so that the base need not be asked again. Nothing is written. Raises
    TunesmithError where nothing is held out.
    """
    recipe = anchored(recipe)
    _check_before_training(recipe)
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
    _check_before_training(recipe)
    inputs = _driver().execute(["plan", "encodings", "packing"], inputs=_inputs(recipe))

    def progress(done: int, total: int) -> None:
        watch({"kind": "progress", "stage": "learning rates", "done": done, "total": total})

    progress(0, seeds)
    try:
        search = finding.find(recipe, inputs, low=low, high=high, steps=steps, seeds=seeds, progress=progress)
    except Exception as error:
        if mended := _as_ours(error):
            raise mended from error
        raise
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
    _check_is_here(recipe.launch, "--launch local trains here.")
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


def _check_is_here(section: Launch, otherwise: str) -> None:
    """Raises RecipeError for what a cluster trains; `otherwise` says what is to be done to train it here."""
    if launch.is_job(section):
        raise RecipeError(
            f"launch.kind {section.kind} is run by a cluster, and this is not one of its nodes.",
            fix=f"`tunesmith train RECIPE --launch {section.kind}` writes what is to be submitted, with --resume "
            f"latest for a run that is there; {otherwise}",
        )


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
    _check_is_here(recipe.launch, f"tunesmith resume {opened.path} --processes N goes on here.")
    if launch.starts(recipe.launch):
        return _launched(recipe, {"run": str(opened.path.absolute()), "checkpoint": checkpoint}, watch)
    if not ranks.is_first():
        return assisted()
    return _carry_out(recipe, opened, checkpoint, fresh=False)


def _launched(recipe: Recipe, job: Mapping[str, Any], watch: Watch) -> Result:
    """A run in several processes that are started here."""
    from tunesmith.evaluation.compare import Comparison

    number = launch.processes(recipe.launch)
    _check_processes(recipe)
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
            mended = error if isinstance(error, TunesmithError) else _as_ours(error)
            ranks.complain(mended.problem if mended else f"{type(error).__name__}: {error}")
            ranks.leave()
            if mended and mended is not error:
                raise mended from error
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
    _check_is_here(one.launch, "--launch local sweeps here.")
    found = sweeps.spaces.checked(sweeps.spaces.read(space), one)
    if engine == "optuna":
        sweeps.require_optuna()
    _check_before_training(one)
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
    _check_before_training(recipe)
    inputs = _driver().execute(["plan", "encodings"], inputs=_inputs(recipe))
    try:
        return checking.check(recipe, inputs)
    except Exception as error:
        if mended := _as_ours(error):
            raise mended from error
        raise


def verify_resume(recipe: Recipe, *, steps: int = 4, watch: Watch = _unwatched) -> Verified:
    """Whether a run of this recipe continues to the bit, found out in a folder that is thrown away.

    So many steps are trained, and trained again from the checkpoint of each. Refuses what `train` refuses.
    """
    from tunesmith.training import verifying

    launch.require_one_process()

    def progress(done: int, total: int) -> None:
        watch({"kind": "progress", "stage": "continuing", "done": done, "total": total})

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
    from tunesmith.evaluation.rows import asked_in

    started = time.perf_counter()
    run, questions = _questions([model], dataset, metrics, settings, watch)
    rows, chosen, longer = _answers(model, questions, name="model", watch=watch)
    questions = questions.with_longer({str(model): longer})
    scores = evaluation.scores(rows, chosen)
    asked = questions.recipe.evaluation.max_new_tokens
    kept = {
        "model": scores,
        "measured_on": asdict(questions.measured_on),
        "metrics": chosen,
        "max_new_tokens": asked,
        **_made_with({"model": model}, questions.recipe),
    }
    place = Path(output) if output else _evaluation_folder(run, model, questions.recipe, kept)
    evaluation.write_rows(place / "rows.jsonl", rows)
    if made := evaluation.classification.classification(rows):
        kept["labels"] = asdict(made)
        watch({"kind": "decision", "name": "labels", "value": len(made.labels), "reason": made.sentence()})
    if (bias := evaluation.length_bias(rows)) and bias.is_strong:
        watch({"kind": "warning", "message": bias.sentence("the model")})
    if copied := asked_in(rows).sentence():
        watch({"kind": "warning", "message": copied})
    write_whole(place / "scores.json", json.dumps(kept, indent=1))
    leaked = _leak_facts(questions, {"model": rows}, chosen, None)
    _keep_leaks(leaked, place / "leakage.json", watch)
    _settle_answers(place, questions)
    return Result(
        run=place,
        comparisons=(),
        seconds=time.perf_counter() - started,
        scores=scores,
        measured_on=questions.measured_on,
        leakage=_short_leakage(leaked),
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
    from tunesmith.compose import compose, overlaid
    from tunesmith.engines import batch
    from tunesmith.evaluation.judging.bench import source_of

    recipe = compose(overlaid(dict(settings or {}), {"data": {"dataset": dataset}})).recipe
    section = recipe.evaluation
    _check_shards(section)
    if section.attempts > 1:
        raise RecipeError("Answers to a set of prompts are greedy, one each.", fix="Leave --attempts out.")
    source = source_of(str(model), server=section.server, shards=section.shards)

    def progress(done: int, total: int) -> None:
        watch({"kind": "progress", "stage": "answers", "done": done, "total": total})

    return batch.generate(
        source,
        recipe.data,
        section,
        Path(output).expanduser(),
        progress=progress,
        say=lambda message: watch({"kind": "warning", "message": message}),
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

    started = time.perf_counter()
    models = _baseline_first([a, b, *more], baseline)
    run, questions = _questions(models, dataset, metrics, settings, watch)
    names = _side_names(*models)
    stand_ins = ("base", "tuned") if len(models) == 2 else names
    watch(_findable(questions))
    found, longer, chosen = [], {}, list[str]()
    for model, name, stand_in in zip(models, names, stand_ins, strict=True):
        rows, fitting, longer[name] = _answers(
            model,
            questions,
            name=stand_in,
            known_as=name,
            primary=primary,
            watch=_renamed(watch, stand_in, name),
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
        apart=[_apart(models[0], other, questions.recipe) for other in models[1:]],
    )
    compared = remarked(compared, questions.engine_check())
    if len(models) == 2:
        compared = [replace(c, model="tuned", against="base") for c in compared]
    about = {
        "models": dict(zip(names, map(str, models), strict=True)),
        "measured_on": asdict(questions.measured_on),
        "metrics": chosen,
        "primary": primary,
        **_made_with(dict(zip(names, models, strict=True)), questions.recipe),
    }
    beside = (run.path.parent if run else Path()) / "comparisons"
    place = _own_folder(beside / _comparison_name(names, dataset) / "comparison.json", about)
    evaluation.write_rows(place / "rows.jsonl", itertools.chain.from_iterable(found))
    kept = {
        "a": str(models[0]),
        "b": str(models[1]),
        **about,
        "comparisons": [asdict(c) for c in compared],
        "engine_check": questions.engine_check(),
    }
    own_base = open_run(models[0]).recipe().model.base if is_run(Path(models[0]).expanduser()) else None
    origins = [name for name, model in zip(names, models) if own_base and _same_place(str(model), own_base)]
    leaked = _leak_facts(questions, dict(zip(names, found, strict=True)), chosen, primary, origins)
    _keep_leaks(leaked, place / "leakage.json", watch)
    write_whole(place / "comparison.json", json.dumps(kept, indent=1, ensure_ascii=False))
    _settle_answers(place, questions)
    return Result(
        run=run.path if run else None,
        comparisons=tuple(compared),
        seconds=time.perf_counter() - started,
        sides=(names[0], names[1]) if len(models) == 2 else None,
        measured_on=questions.measured_on,
        saved=place,
        models=names,
        leakage=_short_leakage(leaked),
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


def _keep_leaks(facts: Mapping[str, Any] | None, file: Path, watch: Watch) -> None:
    """Write the leakage, and say where its pairs are."""
    if facts is None:
        return
    write_whole(file, json.dumps(facts, indent=1, ensure_ascii=False))
    if facts["leaked"]:
        watch({"kind": "warning", "message": f"{facts['remark']} The pairs are in {file}."})
    elif facts["review"]:
        reason = "pairs with too much in common, to be looked at"
        watch({"kind": "decision", "name": "leakage pairs", "value": str(file), "reason": reason})


def _short_leakage(facts: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The leakage without the texts of its pairs."""
    if facts is None:
        return None
    kept = {key: facts[key] for key in ("questions", "trained", "counts", "remark", "parts", "copied")}
    return {**kept, "leaked": len(facts["leaked"]), "review": len(facts["review"])}


def _baseline_first(models: Sequence[str | Path], baseline: str | Path | None) -> list[str | Path]:
    """The models, the baseline before the others. Raises TunesmithError for one that is not among them."""
    if baseline is None:
        return list(models)
    names = _side_names(*models)
    for place, (model, name) in enumerate(zip(models, names, strict=True)):
        if str(baseline) in (str(model), name):
            return [models[place], *models[:place], *models[place + 1 :]]
    raise TunesmithError(
        f"The baseline {baseline} is not among the models.",
        found=", ".join(map(str, models)),
        fix=nearest(str(baseline), [str(model) for model in models]),
    )


def _findable(questions: _Questions) -> dict[str, Any]:
    """What a comparison on these questions could find, as an event, before any answer is paid for."""
    from tunesmith.data.examples import texts
    from tunesmith.evaluation.power import expected

    section = questions.recipe.evaluation
    different = list({(e.group, *texts(e)): e for e in questions.examples}.values())
    items = min(len({tuple(texts(e)) for e in different}), section.max_items or len(different))
    groups = len({n if e.group is None else e.group for n, e in enumerate(different)})
    could = expected(items, min(groups, items), confidence=section.confidence)
    return {
        "kind": "decision",
        "name": "smallest difference to be found",
        "value": could.value if could else "none",
        "reason": could.reason if could else "one question or group cannot show any",
    }


def _comparison_name(names: Sequence[str], dataset: str | None) -> str:
    """The folder of a comparison; of very many models a name that a file system takes."""
    name = "_vs_".join(re.sub(r"[^\w.-]+", "-", side) for side in names)
    if len(name) > 150:
        name = f"{name[:120]}_and_others_{hashlib.blake2b(name.encode(), digest_size=6).hexdigest()}"
    return f"{name}_on_{dataset_name(dataset)}" if dataset else name


def _apart(a: str | Path, b: str | Path, recipe: Recipe) -> str:
    """Why two models may be given different tokens for the same question."""
    from tunesmith import models
    from tunesmith.data.pairs import MARK

    one, other = (models.load_tokenizer(str(model)) for model in (a, b))
    if one.get_vocab() != other.get_vocab():
        return "they have tokenizers of their own"
    for model, tokenizer in ((a, one), (b, other)):
        _settle_template(tokenizer, models.kind(str(model)), recipe)
    templates = [str(tokenizer.chat_template) for tokenizer in (one, other)]
    if all(template.startswith(MARK) for template in templates):
        return "another source prefix, `method.source_prefix`, before the input"
    return "another chat template around the question"


def _side_names(*models: str | Path) -> tuple[str, ...]:
    """What the models of a comparison are called: their folders' names, where these differ."""
    short = tuple(Path(str(model)).name for model in models)
    whole = tuple(map(str, models))
    names = short if len(set(short)) == len(short) and all(short) else whole
    if len(models) > 2 and len(set(names)) < len(names):
        raise TunesmithError(
            "A model is named twice.", found=", ".join(whole), fix="Name each model of a comparison once."
        )
    return names


def _renamed(watch: Watch, before: str, after: str) -> Watch:
    """A watcher that is told of a stage under the name that people know."""

    def told(event: Mapping[str, Any]) -> None:
        stage = str(event.get("stage", ""))
        known = stage.startswith(f"{before}:")
        watch({**event, "stage": after + stage.removeprefix(before)} if known else event)

    return told


@dataclass(frozen=True)
class _Questions:
    """Held-out examples and the settings they are asked with."""

    recipe: Recipe
    examples: tuple[Example, ...]
    measured_on: MeasuredOn
    unfinished: Path
    """Where answers are kept until their rows are written."""
    leakage: Leakage | None = None
    """Of the runs behind the models; None where there are none, or their data sets are not known."""
    learned: Callable[[], Iterator[str]] = lambda: iter(())
    """The answers that they were trained on."""
    checks: list[EngineCheck] = field(default_factory=list)

    def engine_check(self) -> dict[str, Any]:
        """The engine checks so far, by model."""
        return {check.model: check.as_dict() for check in self.checks}

    def with_longer(self, found: Mapping[str, str | None]) -> _Questions:
        """The same, with what is to be said by model of questions longer than it was trained to read."""
        longer = {model: said for model, said in found.items() if said}
        return replace(self, measured_on=replace(self.measured_on, longer=longer))


def _questions(
    models: Sequence[str | Path],
    dataset: str | None,
    metrics: Sequence[str] | None,
    settings: Mapping[str, Any] | None,
    watch: Watch,
    *,
    rows: int | None = None,
) -> tuple[Run | None, _Questions]:
    """The first of the models that is a run, and what it and the others are to be asked, at most `rows` where that
    is given.

    Raises TunesmithError where no question is left that none of them has learned from.
    """
    from tunesmith import data, dataflow, evaluation
    from tunesmith import models as loading
    from tunesmith.compose import overlaid, validated
    from tunesmith.data.splitting import HELD_OUT, TRAIN, VALIDATION
    from tunesmith.evaluation import leakage, unseen
    from tunesmith.evaluation.metrics import METRICS

    for model in models:
        loading.locate(str(model))
    run = next((open_run(m) for m in models if is_run(Path(m).expanduser())), None)
    if not run and not dataset:
        raise TunesmithError(
            f"What {models[0]} is to be measured on is missing.", fix="Give --dataset, or name a run."
        )
    base = run.recipe() if run else Recipe()
    if not run and "method" not in (settings or {}):
        kinds = {loading.kind(str(model)) for model in models}
        if "reward" in kinds:
            base = Recipe(method=RewardModel())
        elif loading.kind(str(models[0])) == "seq2seq":
            base = Recipe(method=Seq2Seq())
    settings = {"evaluation": {"max_items": rows}} if rows else settings
    changes: dict[str, Any] = {"evaluation": {"metrics": metrics}} if metrics else {}
    layer = base.model_dump(mode="json")
    is_whole = not base.data.mix and _same_place(base.data.dataset, dataset or "")
    if dataset is not None and not (run and is_whole):
        # Columns and subsets named for the run's own data do not hold for another set; those of one set of its
        # mix do for that one.
        own_set = next(
            (part for part in (base.data, *base.data.mix) if run and _same_place(part.dataset, dataset)), None
        )
        layer["data"] = {
            **(own_set.model_dump(mode="json", include=set(DataSource.model_fields)) if own_set else {}),
            "weight": None,
            "dataset": dataset,
            "max_length": base.data.max_length,
            "validation": 0.0,
            "held_out": 0.0,
            "near_duplicates": "ignore",
        }
        if not metrics:
            changes["evaluation"] = {"metrics": None}
    recipe = validated(overlaid(layer, changes, dict(settings or {})))
    if "shards" in (settings or {}).get(
        "evaluation", {}
    ):  # those of the run's recipe were for its own engine
        _check_shards(recipe.evaluation, is_asked=True)
    # A method that imitates answers would leave one answer of each pair.
    is_judged = dataset is not None and any(
        METRICS[name].kind == "preference" for name in recipe.evaluation.metrics or () if name in METRICS
    )
    splits = data.prepare(recipe.data) if is_judged else dataflow.splits(recipe)
    asked = splits.examples(HELD_OUT) if dataset is None else splits.examples(TRAIN, VALIDATION, HELD_OUT)
    own = str(run.path) if run and dataset is None else None
    learned, unchecked, copies = unseen.learned(models, own)
    kept, left_out = unseen.unseen(asked, learned, own)
    taken = evaluation.taken(kept, recipe.evaluation.max_items)
    measured_on = unseen.MeasuredOn(
        dataset=dataset or " + ".join([base.data.dataset, *(part.dataset for part in base.data.mix)]),
        dropped=dict(splits.reasons.counts().most_common()) if dataset is not None else {},
        split_of=own,
        questions=len(kept),
        left_out=left_out,
        unchecked=unchecked,
        copies=copies,
        asked=len(taken) if len(taken) < len(kept) else None,
    )
    kept = [kept[number] for number in taken]
    value, reason = measured_on.sentences(*(["--rows"] if rows else []))
    if not kept:
        raise TunesmithError(
            "No question is left to measure on." if left_out else "There is no question to measure on.",
            found=f"{value}: {reason}" if left_out or measured_on.dropped else f"{value}, which has none",
            fix="Give --dataset with examples that no model here was trained on.",
        )
    watch({"kind": "decision", "name": "measured on", "value": value, "reason": reason})
    for name, why in unchecked.items():
        watch(
            {
                "kind": "warning",
                "message": f"What {name} was trained on is not known, so its questions may be among these: {why}",
            }
        )
    found, answers = _leaked(models, kept)
    if found:
        decided = leakage.decision(found)
        watch({"kind": "decision", **asdict(decided)})
    # A folder of its own, so that a measurement that ends takes from no other one what it would go on with.
    about = json.dumps([*map(str, models), dataset, recipe.evaluation.model_dump(mode="json")], default=str)
    mark = hashlib.sha256(about.encode()).hexdigest()[:16]
    unfinished = (run.evaluation if run else Path("evaluations")) / "answers" / mark
    return run, _Questions(recipe, tuple(kept), measured_on, unfinished, leakage=found, learned=answers)


def _leaked(
    models: Sequence[str | Path], asked: Sequence[Example]
) -> tuple[Leakage | None, Callable[[], Iterator[str]]]:
    """What of these examples stands in the training data of the runs behind the models, and the answers there."""
    from tunesmith import data
    from tunesmith.data.splitting import TRAIN, VALIDATION
    from tunesmith.evaluation import leakage, unseen

    known = [s for _, s in unseen.runs_behind(models) if isinstance(s, data.Splits)]
    if not known:
        return None, lambda: iter(())
    learned = itertools.chain.from_iterable(splits.examples(TRAIN, VALIDATION) for splits in known)
    found = leakage.find(asked, learned)
    return found, lambda: (leakage.answer_of(e) for splits in known for e in splits.examples(TRAIN))


def _leak_facts(
    questions: _Questions,
    rows: Mapping[str, Sequence[EvalRow]],
    metrics: Sequence[str],
    primary: str | None,
    origins: Collection[str] = (),
) -> dict[str, Any] | None:
    """The leakage with what it does to the verdict on each challenger, as it is saved and printed. Of those whose names
    are `origins` the first model was made: there the first is the challenger, whose gain may be memory."""
    from tunesmith.evaluation import leakage
    from tunesmith.evaluation.metrics import primary_metric

    found, section = questions.leakage, questions.recipe.evaluation
    if found is None:
        return None
    (first, base), *others = rows.items()
    metric = primary or primary_metric(metrics)
    parts = {}
    if metric and found.leaked:
        for name, own in others:
            pair = (own, base) if name in origins else (base, own)
            told = f"{first} over {name}" if name in origins else name
            parts[told] = leakage.subsets(
                found, *pair, metric, resamples=section.resamples, confidence=section.confidence
            )
    remarks = [leakage.remark(found, part) for part in parts.values()] or [leakage.remark(found, {})]
    return {
        **found.as_dict(),
        "remark": " ".join(f"{n}: {r}" for n, r in zip(parts, remarks)) if len(parts) > 1 else remarks[0],
        "parts": {name: {k: asdict(c) for k, c in part.items()} for name, part in parts.items()},
        "copied": leakage.copied_by(rows, questions.learned()),
    }


def _same_place(a: str, b: str) -> bool:
    return a == b or (
        Path(a).exists() and Path(b).expanduser().exists() and Path(a).samefile(Path(b).expanduser())
    )


def _settle_answers(place: Path, questions: _Questions) -> None:
    """Keep the engine checks beside the rows, which are written by now, and let go of what a kill would have needed."""
    from tunesmith import engines

    if questions.checks:
        write_whole(place / "engine_check.json", json.dumps(questions.engine_check(), indent=1))
    engines.forget(questions.unfinished)
    with suppress(OSError):  # was never there
        questions.unfinished.rmdir()


def _answers(
    model: str | Path,
    questions: _Questions,
    *,
    name: str,
    known_as: str | None = None,
    primary: str | None = None,
    watch: Watch,
) -> tuple[list[EvalRow], list[str], str | None]:
    """A model's rows, the metrics, and what is to be said of questions longer than it was trained to read."""
    from tunesmith import dataflow, evaluation, models
    from tunesmith import plan as planning
    from tunesmith.methods import METHODS

    settings = questions.recipe
    tokenizer = models.load_tokenizer(str(model))
    kind = models.kind(str(model))
    _settle_template(tokenizer, kind, settings)
    head = METHODS[settings.method.kind].head
    if head and kind == "causal":
        watch(
            {
                "kind": "warning",
                "message": f"{model} gives no scores; it gets the head that training begins with.",
            }
        )
    items = evaluation.items(
        questions.examples,
        tokenizer,
        loss_on=settings.method.loss_on,
        max_items=settings.evaluation.max_items,
        max_length=settings.data.max_length,
        kind=kind,
    )
    from tunesmith.training.lineage import run_behind

    run = run_behind(model) if kind == "seq2seq" else None
    longer = evaluation.longer_than_read(items, run.input_length()) if run else None
    if longer:
        watch({"kind": "warning", "message": f"{model}: {longer}"})
    device = planning.device()
    chosen = dataflow.metrics(settings, items)
    if primary and primary not in chosen:
        chosen = evaluation.known_metrics([primary, *chosen])

    def checked(check: EngineCheck) -> None:
        check = replace(check, model=known_as or name)
        questions.checks.append(check)
        value, reason = check.sentence(), f"answers of the {check.engine} engine, read again alone"
        watch(
            {"kind": "decision", "name": f"engine check of {check.model}", "value": value, "reason": reason}
        )
        if not check.passed:
            watch({"kind": "warning", "message": check.warning()})

    rows = evaluation.answers(
        settings.model,
        settings.evaluation,
        items,
        chosen,
        name=name,
        base=str(model),
        tokenizer=tokenizer,
        device=device,
        dtype=planning.inference_dtype(settings.model.dtype, device),
        watch=watch,
        head=head,
        folder=questions.unfinished,
        checked=checked,
    )
    rows = dataflow.with_rewards(settings, rows, items, chosen, tokenizer=tokenizer, device=device)
    return rows, chosen, longer


def _settle_template(tokenizer: Any, kind: Kind, recipe: Recipe) -> None:
    """Settle how a model of this kind is asked, outside of a training."""
    from tunesmith import scoring
    from tunesmith.data import pairs
    from tunesmith.data.templates import set_template

    if kind == "seq2seq":
        # A tuned model brings the prefix that it was trained with.
        prefix = None if tokenizer.chat_template else getattr(recipe.method, "source_prefix", None)
        pairs.settle_template(tokenizer, recipe.model.chat_template, prefix)
    else:
        set_template(tokenizer, recipe.model.chat_template)
        if kind == "causal" and recipe.method.kind == "reward":
            scoring.settle_padding(tokenizer)


def _evaluation_folder(run: Run | None, model: str | Path, recipe: Recipe, facts: Mapping[str, Any]) -> Path:
    """Where a measurement is kept: never over another one, only over itself."""
    dataset = dataset_name(recipe.data.dataset)
    place = run.evaluation / dataset if run else Path("evaluations") / f"{Path(str(model)).name}_{dataset}"
    return _own_folder(place / "scores.json", {key: value for key, value in facts.items() if key != "model"})


def _own_folder(file: Path, about: Mapping[str, Any]) -> Path:
    """The file's folder, with a number behind it where the file there tells another thing than `about`."""
    about = json.loads(json.dumps(about))
    for number in itertools.count(1):
        place = file.parent
        folder = place if number == 1 else place.with_name(f"{place.name}-{number}")
        try:
            before = json.loads((folder / file.name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return folder
        if all(key in before and before[key] == value for key, value in about.items()):
            return folder
    raise AssertionError("unreachable")


def _made_with(models: Mapping[str, str | Path], recipe: Recipe) -> dict[str, Any]:
    """What tells one measurement from another on the same questions: the models' files, by name, and all settings.

    Of a server its address without user and query, and the models' names there.
    """
    from urllib.parse import urlsplit

    from tunesmith import evaluation
    from tunesmith import plan as planning

    device = planning.device()
    dtype = planning.inference_dtype(recipe.model.dtype, device)
    settings = recipe.evaluation.model_dump(mode="json", exclude={"server"})
    server = recipe.evaluation.server
    address = urlsplit(server.base_url)
    shown = address._replace(netloc=address.netloc.rpartition("@")[2], query="", fragment="").geturl()
    rest = recipe.model_dump(mode="json", include={"data", "method"})
    about = json.dumps([rest, recipe.model.chat_template], sort_keys=True, default=str)
    return {
        "identity": {
            name: evaluation.identity(recipe.model, str(model), device=device, dtype=dtype)
            for name, model in models.items()
        },
        "settings": {**settings, "server": {"base_url": shown, "models": dict(server.models)}},
        "data_and_method": hashlib.sha256(about.encode()).hexdigest(),
    }


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
        _settle_template(tokenizer, kind, recipe)
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
    if run:
        _report_again(run)
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
    own, given = judging.answered(answers, say=lambda message: watch({"kind": "warning", "message": message}))
    asked = read_questions(questions) if questions else own
    if not asked:
        raise TunesmithError("The questions of these answers are missing.", fix="Give --questions FILE.")
    run = open_run(answers[0]) if len(answers) == 1 and is_run(Path(answers[0]).expanduser()) else None
    if baseline is None and own and judging.has_base(given):
        baseline = "base"
        watch(
            {
                "kind": "decision",
                "name": "baseline",
                "value": baseline,
                "reason": "what a run is measured against",
            }
        )
    place = Path(output) if output else run.evaluation / f"judged_{mode}" if run else Path("judged")
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
    if run and not dry_run:
        _report_again(run)
    return {**found, "output": str(place)}


def _report_again(run: Run) -> None:
    """Write a run's report with what was added to its folder; a run that has none yet gets it when it is done."""
    from tunesmith.evaluation.report import write_report

    if (run.path / "report.html").exists():
        write_report(run.path)


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
    from tunesmith.export.weights import size_in_bytes
    from tunesmith.training.lineage import run_behind

    max_shard = size_in_bytes(max_shard_size)
    given = [*([(str(model), 1.0)] if model is not None else []), *map(_weighted, adapters)]
    if not given:
        raise TunesmithError("There is nothing to merge.", fix="Name a run or an adapter's folder.")
    merging.check_dtype(dtype)
    parts = []
    for name, weight in given:
        path = Path(name).expanduser()
        of_run = run_behind(path) if path.is_dir() else None
        parts.append(merging.Part(merging.adapter_of(name, of_run), weight, of_run))
    adapter, run = parts[0].folder, parts[0].run
    own = run is not None and adapter == run.final_model.resolve() and len(parts) == 1
    beside = run.path / "merged_model" if run and own else adapter.with_name(f"{adapter.name}_merged")
    folder = merging.free_place(Path(output).expanduser() if output else beside)

    try:
        return merging.merge(
            parts,
            folder,
            dtype=dtype,
            max_shard=max_shard,
            check=check,
            held=lambda model, tokenizer: _held_for(run, model, tokenizer, rows, watch),
            progress=_deciding(watch),
            counted=_counting(watch),
        )
    except Exception as error:
        if mended := _as_ours(error):
            raise mended from error
        raise


def _deciding(watch: Watch) -> Callable[[str, str, str], None]:
    """Tells a watcher decisions: a name, a value and the reason."""
    return lambda name, value, reason: watch(
        {"kind": "decision", "name": name, "value": value, "reason": reason}
    )


def _counting(watch: Watch) -> Callable[[str, int, int], None]:
    """Tells a watcher how far a stage is."""
    return lambda stage, done, total: watch(
        {"kind": "progress", "stage": stage, "done": done, "total": total}
    )


def _weighted(adapter: str) -> tuple[str, float]:
    """`PATH=0.6` in its parts; a path alone, even one with such a name, has the weight 1."""
    path, equals, weight = adapter.rpartition("=")
    if not equals or Path(adapter).expanduser().is_dir():
        return adapter, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise TunesmithError(
            f"The weight of the adapter {path} is not a number.", found=weight, fix="Write it like PATH=0.6."
        ) from None


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
    from tunesmith.export.weights import size_in_bytes
    from tunesmith.training.lineage import run_behind

    quant = quant or artefact.DEFAULTS.get(to, "")
    artefact.check_target(to, quant, check)
    max_shard = size_in_bytes(max_shard_size)
    if rows < 1:
        raise TunesmithError(
            "Nothing is proven without questions.", found=f"rows = {rows}", fix="Give 1 or more."
        )
    source = Path(loading.locate(str(model)))
    run = run_behind(Path(model).expanduser()) if Path(model).expanduser().is_dir() else None
    own = run is not None and source == run.final_model.resolve()
    beside = (
        run.path / "exports" / f"{to}-{quant}"
        if run and own
        else source.with_name(f"{source.name}_{to}-{quant}")
    )

    try:
        folder = Path(output).expanduser() if output else beside

        def held(model: Any, tokenizer: Any) -> Held:
            return _held_for(run, model, tokenizer, rows, watch)

        if to == "safetensors":
            return artefact.export_weights(
                source,
                folder,
                quant=quant,
                run=run,
                max_shard=max_shard,
                check=check,
                held=held,
                progress=_deciding(watch),
                counted=_counting(watch),
            )
        return artefact.export(
            source,
            folder,
            to=to,
            quant=quant,
            run=run,
            check=check,
            held=held,
            progress=_deciding(watch),
            counted=_counting(watch),
        )
    except Exception as error:
        if mended := _as_ours(error):
            raise mended from error
        raise


def _held_for(run: Run | None, model: Any, tokenizer: Any, rows: int, watch: Watch) -> Held:
    """Questions to prove an artefact with: held-out ones of the run behind it, or those that ship."""
    from tunesmith import dataflow, evaluation
    from tunesmith import models as loading
    from tunesmith.evaluation import compare as comparing
    from tunesmith.evaluation.code import running_allowed
    from tunesmith.export import merge
    from tunesmith.export.parity import NEW_TOKENS, Held, Question, text_of

    is_pair = bool(model.config.is_encoder_decoder)

    def shipped(why: str) -> Held:
        asked = merge.shipped_questions(tokenizer, model, is_pair=is_pair)
        return Held(asked, NEW_TOKENS, lambda numbers, own, others: (None, why))

    if run is None:
        return shipped("no run is behind this model, so there are no held-out rows")
    if loading.is_reward(model):
        return shipped("a reward model answers nothing")
    try:
        _, questions = _questions([run.path], None, None, None, watch, rows=rows)
    except TunesmithError as error:
        return shipped(f"the run's held-out rows cannot be asked: {error.problem}")
    recipe = questions.recipe
    found = evaluation.items(
        questions.examples,
        tokenizer,
        loss_on=recipe.method.loss_on,
        max_items=rows,
        max_length=recipe.data.max_length,
        kind="seq2seq" if is_pair else "causal",
    )
    usable = [item for item in found if item.prompt and not item.error]
    metric, unlike = _judging_metric(dataflow.metrics(recipe, usable), run_code=recipe.evaluation.run_code)
    if not usable:
        return shipped("the run held out no questions that are answered")

    def score(
        numbers: Sequence[int], own: Sequence[Generated], others: Sequence[Generated]
    ) -> tuple[Comparison | None, str | None]:
        if metric is None:
            return None, unlike
        settings = {"max_new_tokens": recipe.evaluation.max_new_tokens, "temperature": 0.0}
        with running_allowed(recipe.evaluation.run_code):
            one, other = (
                evaluation.rows_of(
                    [usable[n] for n in numbers], given, name=name, metrics=[metric], settings=settings
                )
                for name, given in (("base", own), ("tuned", others))
            )
        compared = comparing.compare(
            one,
            other,
            metrics=[metric],
            resamples=recipe.evaluation.resamples,
            confidence=recipe.evaluation.confidence,
            names=("the model", "the file"),
        )
        return compared[0], unlike

    asked = [
        Question(item.prompt_ids, text_of(item.prompt, tokenizer), item.prompt)
        for item in usable
        if item.prompt
    ]
    return Held(asked, recipe.evaluation.max_new_tokens, score)


def _judging_metric(names: Sequence[str], *, run_code: bool) -> tuple[str | None, str | None]:
    """By which of a run's metrics an artefact's answers are judged: the primary one, where single greedy answers can
    be; else another, or none, and why."""
    from tunesmith.evaluation.metrics import METRICS, primary_metric

    primary = primary_metric(names)
    if primary is None:
        return None, "the run has no metric"

    def obstacle(name: str) -> str | None:
        metric = METRICS[name]
        if metric.kind != "answer":
            return "it scores no answers"
        if metric.attempts > 1:
            return "it needs several answers to a question, and an artefact is asked once, greedily"
        if metric.score is None:
            return "it is a figure of all answers together"
        if metric.runs_code and not run_code:
            return "it runs the code that the model writes, which is off (evaluation.run_code)"
        return None

    why = obstacle(primary)
    found = next((n for n in (primary, *METRICS[primary].needs, *names) if obstacle(n) is None), None)
    if why is None:
        return primary, None
    if found is None:
        return None, f"the run's own metric, {METRICS[primary].label}, cannot judge it: {why}"
    return found, f"not judged by the run's own metric, {METRICS[primary].label}: {why}"


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
    from tunesmith import models as loading
    from tunesmith import plan as planning
    from tunesmith.data import sources
    from tunesmith.export import tried as trying
    from tunesmith.export.deployment import MANIFEST
    from tunesmith.http import Remote
    from tunesmith.serving import smoke_test
    from tunesmith.training.lineage import run_behind

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
    path = Path(model).expanduser()
    packed = path / MANIFEST if (path / "model").is_dir() and not is_run(path) else None
    hashes: Callable[[], str] | None = None
    if url is not None:
        Remote(
            url, setting="the address", api_key_env=api_key_env
        )  # a wrong one shows before anything is loaded
    if packed is not None and packed.is_file():
        try:
            manifest = json.loads(packed.read_text(encoding="utf-8"))
            served_as, _ = served_as or str(manifest["name"]), manifest["files"]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{packed} is damaged.", found=repr(error)[:200], fix="Copy the folder again."
            ) from None
        task = task or (manifest.get("task") if manifest.get("task") in trying.TASK_PROMPTS else None)

        def compared() -> str:
            try:
                return smoke_test.check_files(path, manifest)
            except smoke_test.Failed as failure:
                raise ModelError("The folder is not as it was packed.", found=str(failure)) from None

        hashes = compared
        folder = path / "model"
    elif path.is_dir():
        own = path / "final_model"
        folder = own if own.is_dir() else path
        if is_run(path) and not own.is_dir():
            raise open_run(path).unfinished()
    else:
        folder = loading.folder_of(str(model))
    run = run_behind(path) if path.is_dir() else None

    asked: list[TriedQuestions] = []

    def questions(loaded: Any, tokenizer: Any) -> trying.Questions:
        asked.append(
            _tried_with(
                run or folder,
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

    try:
        found = trying.tried(
            folder, hashes=hashes, device=planning.device(), questions=questions, progress=_counting(watch)
        )
    except Exception as error:
        if mended := _as_ours(error):
            raise mended from error
        raise
    found = replace(found, folder=str(model))
    if url is None:
        return found

    def unasked(why: str) -> Tried:
        return replace(found, findings=(*found.findings, trying.Finding("served", False, why)))

    if not found.is_whole or not asked:
        return unasked("not asked: there is no model here to compare it with, or one that answers nothing")
    try:
        verdict = _served_verdict(
            run,
            folder,
            url,
            served_as or (run.path.name if run else folder.name),
            api_key_env,
            asked[0],
            by_its_run=dataset is None and task is None,
            rows=rows,
            watch=watch,
        )
    except ModelError as error:
        return unasked("; ".join(filter(None, (error.problem, error.found, error.fix))))
    said = "; ".join(verdict.problems() or verdict.sentences())
    return replace(
        found,
        findings=(*found.findings, trying.Finding("served", bool(verdict.passed), said)),
        served=verdict.as_dict(),
    )


def _tried_with(
    model_or_run: Run | Path,
    dataset: str | None,
    task: str | None,
    model: Any,
    tokenizer: Any,
    *,
    rows: int,
    max_new_tokens: int | None,
    watch: Watch,
) -> TriedQuestions:
    """Held-out questions of a run or a data set, where there are any, else those that ship."""
    from tunesmith import evaluation
    from tunesmith import models as loading
    from tunesmith.evaluation.forgetting import general_texts
    from tunesmith.export import tried as trying

    kind: Kind = "seq2seq" if loading.is_seq2seq(model) else "causal"
    run = model_or_run if isinstance(model_or_run, Run) else None
    if (run and task is None) or dataset:
        asked_of = model_or_run.path if isinstance(model_or_run, Run) else model_or_run
        try:
            _, questions = _questions([asked_of], dataset, None, None, watch, rows=rows)
        except TunesmithError as error:
            if dataset:
                raise
            watch({"kind": "warning", "message": f"The run's held-out rows cannot be asked: {error.problem}"})
        else:
            recipe = questions.recipe
            items = evaluation.items(
                questions.examples, tokenizer, loss_on=recipe.method.loss_on, max_length=recipe.data.max_length,
                kind=kind,
            )  # fmt: skip
            turns = [item.prompt.messages for item in items if item.prompt and not item.error]
            where = f"held-out rows of {run.path.name}" if run and not dataset else f"rows of {dataset}"
            if turns:
                return trying.Questions(
                    turns,
                    where,
                    max_new_tokens or recipe.evaluation.max_new_tokens,
                    trying.of_items(items, "on their references"),
                    on_references=True,
                )
    asked, where = trying.asked_of(task)
    general = evaluation.items(general_texts(), tokenizer, kind=kind)
    return trying.Questions(
        asked[:rows], where, max_new_tokens or 256, trying.of_items(general, "on general text that ships")
    )


def _served_verdict(
    run: Run | None,
    folder: Path,
    url: str,
    name: str,
    api_key_env: str | None,
    tried_with: TriedQuestions,
    *,
    by_its_run: bool,
    rows: int,
    watch: Watch,
) -> Parity:
    """The verdict on a served endpoint, against the model in this process, which was asked the same.

    Where those are questions of its run (`by_its_run`), they are scored as well, and the verdict is kept with the run.
    """
    from tunesmith import models as loading
    from tunesmith.data import pairs, templates
    from tunesmith.data.examples import Prompt, Row, Unusable
    from tunesmith.export import merge, parity
    from tunesmith.generation import context_length

    (model, computed), tokenizer = merge.reference_of(folder, run), loading.load_tokenizer(str(folder))
    is_pair = bool(model.config.is_encoder_decoder)
    loading.settle_template(tokenizer, is_pair=is_pair)
    if run and by_its_run:
        asked = replace(_held_for(run, model, tokenizer, rows, watch), new_tokens=tried_with.new_tokens)
    else:
        form, questions = pairs if is_pair else templates, list[parity.Question]()
        for number, turns in enumerate(tried_with.turns):
            prompt = Prompt(tuple(turns), "", Row("asked", number))
            try:
                ids = tuple(form.prompt_ids(prompt.messages, tokenizer))
            except Unusable:
                continue  # counted among the answers
            questions.append(parity.Question(ids, parity.text_of(prompt, tokenizer), prompt))
        unscored = f"asked were {len(questions)} questions, {tried_with.where}"
        asked = parity.Held(questions, tried_with.new_tokens, lambda numbers, own, others: (None, unscored))
    context = None if is_pair else context_length(model)
    stored = str(getattr(loading.configuration(str(folder)), "dtype", None)).removeprefix("torch.")
    found = parity.verdict(
        model,
        tokenizer,
        parity.server_reader(url, name, tokenizer, api_key_env=api_key_env, length=context),
        asked,
        artefact=f"served endpoint '{name}'",
        quant=stored if stored in parity.TOLERANCES else "float32",
        context=context,
        reference=computed,
    )
    if run and by_its_run:
        file = run.path / "exports" / "served" / parity.VERDICT
        if found.passed or not file.is_file():
            write_whole(file, json.dumps(found.as_dict(), indent=1))
            merge.told_in_report(run)
        else:
            said = "The run's report keeps its earlier verdict: this address may be that of another model."
            watch({"kind": "warning", "message": said})
    return found


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
    from tunesmith.export import deployment
    from tunesmith.export.weights import size_in_bytes
    from tunesmith.serving.models import checked_name, name_of
    from tunesmith.training.lineage import run_behind

    max_shard = size_in_bytes(max_shard_size)
    if rows < 1:
        raise TunesmithError(
            "Nothing is proven without questions.", found=f"rows = {rows}", fix="Give 1 or more."
        )
    source = Path(loading.locate(str(model)))
    if not source.is_dir():
        source = loading.folder_of(str(model))
    run = run_behind(Path(model).expanduser()) if Path(model).expanduser().is_dir() else None
    asked: list[Held] = []
    if name is None:
        own = run.path if run else Path(model).expanduser().absolute()
        name = name_of(own)
        if name != own.name:
            _deciding(watch)("name", name, f"'{own.name}' cannot be asked for")

    def held(loaded: Any, tokenizer: Any) -> Held:
        if not asked:
            asked.append(_held_for(run, loaded, tokenizer, rows, watch))
        return asked[0]

    try:
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
            trained=_trained_texts(run),
            despite=despite,
            progress=_deciding(watch),
            counted_on=_counting(watch),
        )
    except Exception as error:
        if mended := _as_ours(error):
            raise mended from error
        raise


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
    from tunesmith.export.publish import publish

    folder, repository, behind, known = _pushed(run, repository)

    address = publish(
        folder,
        repository,
        private=private,
        token=token,
        create=create,
        trained=_trained_texts(behind),
        despite=despite,
        known=known,
        told=_deciding(watch),
    )
    if behind:
        behind.event("decision", name="published", value=address, reason="tunesmith push")
    return address


def push_plan(run: str | Path, *, repository: str | None = None, private: bool = True) -> PushPlan:
    """What `push` would send, looked through for secrets and for what was trained on; nothing is asked of the Hub."""
    from tunesmith.export.publish import planned

    folder, repository, behind, known = _pushed(run, repository)
    return planned(folder, repository, private=private, trained=_trained_texts(behind), known=known)


def _pushed(run: str | Path, repository: str | None) -> tuple[Path, str, Run | None, list[str]]:
    """The folder that is uploaded, where to, the run behind it, and what is to be known of it. Raises TunesmithError
    for one that did not pass its check."""
    from tunesmith.export import parity
    from tunesmith.training.lineage import run_behind

    path = Path(run).expanduser()
    marks = ("config.json", "adapter_config.json", "*.gguf")
    if not is_run(path) and path.is_dir() and any(next(path.glob(mark), None) for mark in marks):
        behind = run_behind(path)
        folder = path
    elif (path.exists() or str(run) == "tiny") and not is_run(path):
        raise _not_pushed(path, marks)
    else:
        behind = open_run(run)
        folder = behind.final_model
        if not folder.is_dir():
            raise behind.unfinished()
    known = []
    if any(part.endswith(".failed") for part in folder.resolve().parts):
        raise TunesmithError(
            f"{folder} did not pass its check.", found="its parity.json says why", fix="Push the adapter."
        )
    # Of a deployment the verdict lies beside `model`.
    for place in (folder, folder.resolve().parent):
        match parity.passed_in(place):
            case False:
                raise TunesmithError(
                    f"{folder} did not pass its check.",
                    found=f"passed: false in {place / parity.VERDICT}",
                    fix="Push the adapter, or make it anew.",
                )
            case None:
                known.append(
                    f"{place / parity.VERDICT} is no proof: the model was not asked, or it is damaged"
                )
    repository = repository or (behind.recipe().export.hub_model_id if behind else None)
    if not repository:
        raise TunesmithError("Where to upload is missing.", fix="Give --hub-model-id owner/name.")
    return folder, repository, behind, known


def _not_pushed(path: Path, marks: Sequence[str]) -> RunError:
    """What a file or folder is that cannot be pushed, and what in it, or around it, can be."""
    if not path.exists():
        return RunError(
            f"{path} is the model that ships with tunesmith, and nothing of yours to push.",
            fix="Name a run, or a folder with a model.",
        )
    within = path if path.is_dir() else path.parent
    folders = {file.parent for mark in marks for depth in ("", "*/") for file in within.glob(depth + mark)}
    folders |= {found.path for found in find_runs(within)} | ({within} if is_run(within) else set())
    held = sorted(map(str, folders))
    return RunError(
        f"{path} is a folder without a model, and not a run."
        if path.is_dir()
        else f"{path} is a file; runs and folders are pushed.",
        found=", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty folder"
        if path.is_dir()
        else None,
        fix=f"There can be pushed: {', '.join(held[:8])}."
        if held
        else "Name a run, or a folder with config.json, adapter_config.json or a GGUF file.",
    )


def _trained_texts(run: Run | None) -> list[str] | None:
    """All texts of the rows that a run was trained or validated on; None where they are not here."""
    from tunesmith import dataflow
    from tunesmith.data.examples import texts
    from tunesmith.data.splitting import TRAIN, VALIDATION

    if run is None:
        return None
    try:
        splits = dataflow.splits(run.recipe())
    except TunesmithError:
        return None
    return [text for example in splits.examples(TRAIN, VALIDATION) for text in texts(example)]


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
    from tunesmith.export.publish import fetch

    run = _run_named(repository, Path(output_dir).expanduser())
    if run:
        told = [e["value"] for e in run.events() if e["kind"] == "decision" and e["name"] == "published"]
        if not told:
            raise RunError(f"The run {run.path} was not pushed.", fix="Name the repository, owner/name.")
        places = list(dict.fromkeys("/".join(str(t).rstrip("/").split("/")[-2:]) for t in reversed(told)))
        repository, *others = places
        before = f", and before to {', '.join(others)}" if others else ""
        said = f"the run {run.path.name} was last pushed there{before}"
        watch({"kind": "decision", "name": "repository", "value": repository, "reason": said})
    return fetch(
        repository,
        Path(output).expanduser() if output else Path(repository.rpartition("/")[2]),
        revision=revision,
        token=token,
    )


def _run_named(name: str, output_dir: Path) -> Run | None:
    """A run by its folder or by its name in an output folder; None for what is none, as a repository.

    Raises RunError for a lone name, as no repository has it, that is nearly a run's.
    """
    for place in (Path(name).expanduser(), output_dir / name):
        if is_run(place):
            return open_run(place)
    near = closest(name, [run.path.name for run in find_runs(output_dir)])
    if "/" not in name and near:
        raise RunError(f"There is no run {name} in {output_dir}.", fix=f"Did you mean '{near}'?")
    return None


def show(what: str, name: str | None = None) -> list[dict[str, Any]]:
    """What there is of a kind, as entries with name and description; `model` describes a model.

    Raises TunesmithError naming the kinds.
    """
    if what not in SHOWN:
        raise TunesmithError(f"There is nothing called '{what}' to show.", fix=nearest(what, SHOWN))
    return SHOWN[what](name)


def _presets(_: str | None) -> list[dict[str, Any]]:
    from tunesmith.compose import TASKS, preset_about, preset_layer, preset_names

    return [
        {"name": name, "about": preset_about(name), "sample": json.dumps(preset_layer(name))}
        for name in preset_names()
        if name not in TASKS
    ]


def _tasks(_: str | None) -> list[dict[str, Any]]:
    from tunesmith.compose import TASKS, preset_about, preset_layer

    return [{"name": t, "about": preset_about(t), "sample": json.dumps(preset_layer(t))} for t in TASKS]


def _recipe_fields(_: str | None) -> list[dict[str, Any]]:
    from tunesmith.recipe import fields

    return [
        {
            "name": f.path + (f" ({f.kind})" if f.kind else ""),
            "about": f.about,
            "sample": f"{f.type}; default {f.default!r}",
        }
        for f in fields()
    ]


def _formats(_: str | None) -> list[dict[str, Any]]:
    from tunesmith.data.formats import FORMATS

    return [
        {"name": f.name, "about": f.about, "sample": json.dumps(f.sample, ensure_ascii=False)}
        for f in FORMATS.values()
    ]


def _templates(_: str | None) -> list[dict[str, Any]]:
    from tunesmith.data.templates import NAMED_TEMPLATES

    return [{"name": name, "about": template} for name, template in NAMED_TEMPLATES.items()]


def _methods(_: str | None) -> list[dict[str, Any]]:
    from tunesmith.compose import union_members

    return [
        {"name": kind, "about": " ".join(str(section.__doc__).split())}
        for kind, section in union_members("method").items()
    ]


def _metrics(_: str | None) -> list[dict[str, Any]]:
    from tunesmith.evaluation.metrics import METRICS

    return [{"name": metric.name, "about": metric.about} for metric in METRICS.values()]


def _examples(_: str | None) -> list[dict[str, Any]]:
    from tunesmith.assets import EXAMPLES
    from tunesmith.data.sources import read

    return [
        {
            "name": f"example:{example.name}",
            "about": example.about,
            "sample": json.dumps(
                dict(next(read(f"example:{example.name}", max_rows=1).records).values), ensure_ascii=False
            ),
        }
        for example in EXAMPLES.values()
    ]


def _model(name: str | None) -> list[dict[str, Any]]:
    quiet_libraries()
    from tunesmith.architecture import architecture

    named = [] if name else [{"name": "model", "about": "tiny, which ships with tunesmith (none was named)"}]
    return [*named, *architecture(name or "tiny").entries()]


def _catalog(part: str | None) -> list[dict[str, Any]]:
    from tunesmith import catalog

    return catalog.entries(part)


SHOWN: dict[str, Callable[[str | None], list[dict[str, Any]]]] = {
    "presets": _presets,
    "tasks": _tasks,
    "recipe": _recipe_fields,
    "formats": _formats,
    "templates": _templates,
    "methods": _methods,
    "metrics": _metrics,
    "examples": _examples,
    "model": _model,
    "catalog": _catalog,
}


def _carry_out(recipe: Recipe, run: Run, checkpoint: str | None, *, fresh: bool) -> Result:
    """Drive the dataflow to the report, and leave a status whatever happens."""
    with libraries.loading():
        from tunesmith.export.card import write_card
        from tunesmith.training import checkpoints, continuing

    started = time.perf_counter()
    before = run.read("status.json")
    wanted = ["fitted"] if recipe.evaluation.skip else ["comparisons", "samples", "report"]
    refused: TunesmithError | None = None
    with run.lock(), launch.ended_by_sigterm(), _leading():
        num_starts = _num_starts(run)
        (run.path / "status.json").unlink(missing_ok=True)
        try:
            for note in launch.settle(recipe.training):
                run.event("warning", message=note)
            if fresh:
                _check_before_training(recipe)
            else:
                _check_settings(recipe)
                _check_processes(recipe)
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
            try:
                published = _published(recipe, run)
            except Exception as error:  # a hub that is down takes nothing of a run that is done
                published, refused = None, _not_published(error, run)
        except (KeyboardInterrupt, Interrupted) as error:
            if lost := _lost(error):  # the launcher's signal, after another process has ended
                _finish(run, "failed", error=str(lost))
                raise lost from error
            _finish(run, "interrupted")
            if isinstance(error, Interrupted):
                raise
            raise Interrupted(
                "Stopped; what was finished is saved.",
                fix=f"tunesmith resume {run.path}",
                exit_code=TERMINATED if isinstance(error, Terminated) else INTERRUPTED,
            ) from None
        except Exception as error:
            if ranks.count() > 1:
                launch.ignore_sigterm()
            mended = _as_ours(error)
            if fresh and not run.checkpoints.exists() and not getattr(mended, "is_lost", False):
                discard(run)
            elif not fresh and _num_starts(run) == num_starts:
                # Nothing of the run was touched, so it is what it was before.
                with contextlib.suppress(OSError):
                    run.event("state", state="not resumed", error=str(mended or error))
                    if before:
                        run.write("status.json", before)
            else:
                _finish(run, "failed", error=str(mended or error))
            if mended:
                raise mended from error
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


def _not_published(error: Exception, run: Run) -> TunesmithError:
    problem = error.problem if isinstance(error, TunesmithError) else f"{type(error).__name__}: {error}"
    run.event("warning", message=f"The model was not published: {problem}")
    return RunError(
        f"The run {run.path} is done, but its model was not published.",
        found=problem,
        fix=f"tunesmith push {run.path}, when the Hub answers again.",
    )


def _num_starts(run: Run) -> int:
    """How often training began in this run."""
    return sum(event["kind"] == "state" and event.get("state") == "training" for event in run.events())


def _check_before_training(recipe: Recipe) -> None:
    """Cheap failures first: nothing is read or computed before these are settled."""
    from tunesmith.compose import check_together

    check_together(recipe)  # composed ones were; this one may be somebody's own
    _check_settings(recipe)
    _check_shards(recipe.evaluation)
    quiet_libraries()
    from tunesmith.data import sources

    for source in (recipe.data, *recipe.data.mix):  # before what loads torch
        sources.local(source.dataset)
    libraries.load_libraries()
    from tunesmith import evaluation, models
    from tunesmith.methods import METHODS

    method = METHODS[recipe.method.kind]
    models.check_kind(
        recipe.model.base,
        method.model,
        method=method.kind,
        head=method.head,
        revision=recipe.model.revision,
    )
    method.check(recipe)
    _check_processes(recipe)
    evaluation.check_scoring(recipe.evaluation.metrics or [], gives_scores=method.head is not None)
    models.check_fit(
        recipe.model.base,
        recipe.adapter,
        revision=recipe.model.revision,
        max_length=recipe.data.max_length,
        head=method.head,
    )


def _check_processes(recipe: Recipe) -> None:
    """Raises RecipeError for what the number of processes does not go with, which may be another one in each life of a
    run."""
    from tunesmith.methods import METHODS

    method = METHODS[recipe.method.kind]
    if (number := launch.processes(recipe.launch)) > 1:
        launch.check(recipe.training, number)
        if why := method.alone(recipe.method):
            raise RecipeError(
                f"The method '{method.kind}' is trained in one process here, and {number} are asked for.",
                found=why,
                fix="Leave --launch out, or start it without a launcher.",
            )
    parallel.check(recipe, number)
    if isinstance(recipe.launch, Ray) and recipe.evaluation.engine == "ray" and not recipe.evaluation.skip:
        raise RecipeError(
            "evaluation.engine ray does not go with launch.kind ray.",
            found="workers that train keep what they have until the run ends, and those that answer would wait for it",
            fix="Leave evaluation.engine out; or set evaluation.skip, and measure the run when it is done: tunesmith "
            "evaluate RUN --set evaluation.engine=ray.",
        )


def _check_settings(recipe: Recipe) -> None:
    from tunesmith.dataflow import check_rewarded
    from tunesmith.evaluation import check_runnable
    from tunesmith.training.fit import require_tracker

    section = recipe.evaluation
    asked = [*(section.metrics or []), *recipe.training.measured]
    check_runnable(asked, run_code=section.run_code, attempts=section.attempts)
    check_rewarded(recipe, asked)
    for tracker in recipe.tracking.trackers:
        require_tracker(tracker)
    if recipe.export.push_to_hub and not recipe.export.hub_model_id:
        raise TunesmithError(
            "Where to upload is missing.", fix="Give --hub-model-id owner/name with --push-to-hub."
        )
    if recipe.export.push_to_hub and recipe.export.hub_model_id:
        from tunesmith.export.publish import check_repository

        check_repository(recipe.export.hub_model_id)


def _check_shards(section: Evaluation, *, is_asked: bool = False) -> None:
    if (is_asked or section.shards != Shards()) and section.engine != "ray":
        raise RecipeError(
            f"evaluation.shards is for the engine 'ray', and evaluation.engine is '{section.engine}'.",
            fix="Add --set evaluation.engine=ray, or leave evaluation.shards out.",
        )


def _published(recipe: Recipe, run: Run) -> str | None:
    if not recipe.export.push_to_hub or not recipe.export.hub_model_id:
        return None
    from tunesmith.export.publish import publish

    address = publish(
        run.final_model,
        recipe.export.hub_model_id,
        private=recipe.export.hub_private,
        trained=_trained_texts(run),
    )
    run.event("decision", name="published", value=address, reason="push_to_hub")
    return address


def _lost(error: BaseException) -> TunesmithError | None:
    """That another process of the run is gone, where this one's end came of it."""
    cause: BaseException | None = error
    while ranks.count() > 1 and cause:
        if is_lost_peer(cause):
            launch.ignore_sigterm()
            return _as_ours(cause)
        cause = cause.__cause__ or cause.__context__
    return None


def _as_ours(error: BaseException) -> TunesmithError | None:
    """A library's error that the user can act on, as one of ours."""
    if ranks.count() > 1 and is_lost_peer(error):
        lost = RunError(
            f"Another of the {ranks.count()} processes is gone, so this run has ended.",
            found=ranks.complaint()
            or "it was ended from outside and could not say why, as where memory runs out",
            fix="`tunesmith resume` goes on from the last checkpoint.",
        )
        lost.exit_code, lost.is_lost = OutOfResources.exit_code, True  # type: ignore[attr-defined]
        return lost
    if is_out_of_memory(error):
        return OutOfMemory(
            "The memory is not enough.",
            found=str(error).splitlines()[0][:200] if str(error) else None,
            fix="Lower per_device_train_batch_size and raise gradient_accumulation_steps, add "
            "--gradient-checkpointing, lower --max-length, or use --lora.",
        )
    if is_out_of_disk(error):
        return OutOfResources("The disk is full.", found=str(error), fix="Free space and resume the run.")
    if is_out_of_files(error):
        return OutOfResources(
            "Too many files are open.",
            found=str(error),
            fix="Raise the limit (`ulimit -n`) and resume the run.",
        )
    if isinstance(error, OSError) and is_refused_writing(error):
        return OutOfResources(
            f"{error.filename or 'A file'} cannot be read or written.",
            found=error.strerror,
            fix="Give this user the right to, or choose another folder; then resume the run.",
        )
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
    steps = [event["step"] for event in run.events() if event.get("step") is not None]
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
    )
