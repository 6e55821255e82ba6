"""Measuring models on the same questions: which they are asked, what each answers, what of it it may have met before.

    models -> questions that none of them has learned from -> each model's rows -> what leaked

A comparison's numbers are `compare`'s; where all of it is kept is `keeping`'s.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tunesmith import data, dataflow, engines, evaluation
from tunesmith import models as loading
from tunesmith import plan as planning
from tunesmith.compose import overlaid, validated
from tunesmith.data.examples import Example, texts
from tunesmith.data.pairs import MARK
from tunesmith.data.splitting import HELD_OUT, TRAIN, VALIDATION
from tunesmith.engines.check import EngineCheck, tell_check
from tunesmith.errors import TunesmithError, nearest
from tunesmith.evaluation import EvalRow, leakage, unseen
from tunesmith.evaluation.leakage import Leakage
from tunesmith.evaluation.metrics import METRICS, primary_metric
from tunesmith.evaluation.power import expected
from tunesmith.evaluation.unseen import MeasuredOn
from tunesmith.methods import METHODS
from tunesmith.recipe import DataSource, Recipe, RewardModel, Seq2Seq
from tunesmith.training.lineage import run_behind
from tunesmith.training.run import Run, Watch, check_not_lost, deciding, is_run, open_run, warning


@dataclass(frozen=True)
class Questions:
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

    def with_longer(self, found: Mapping[str, str | None]) -> Questions:
        """The same, with what is to be said by model of questions longer than it was trained to read."""
        longer = {model: said for model, said in found.items() if said}
        return replace(self, measured_on=replace(self.measured_on, longer=longer))


def questions_for(
    models: Sequence[str | Path],
    dataset: str | None,
    metrics: Sequence[str] | None,
    settings: Mapping[str, Any] | None,
    watch: Watch,
    *,
    rows: int | None = None,
    output: Path | None = None,
) -> tuple[Run | None, Questions]:
    """The first of the models that is a run, and what it and the others are to be asked, at most `rows` where that
    is given. Answers are kept in `output` until their rows are written, by default in the run's folder.

    Raises TunesmithError where no question is left that none of them has learned from.
    """
    for model in models:
        loading.locate(str(model))
    run = next((open_run(m) for m in models if is_run(Path(m).expanduser())), None)
    if not run and not dataset:
        for model in models:
            check_not_lost(Path(model).expanduser())
        raise TunesmithError(
            f"What {models[0]} is to be measured on is missing.", fix="Give --dataset, or name a run."
        )
    base = run.recipe() if run else _recipe_of(models, settings)
    settings = {"evaluation": {"max_items": rows}} if rows else settings
    recipe = _asked_with(base, dataset, metrics, settings, is_run=run is not None)
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
    deciding(watch)("measured on", value, reason)
    for name, why in unchecked.items():
        warning(watch)(f"What {name} was trained on is not known, so its questions may be among these: {why}")
    found, answers = _leaked(models, kept)
    if found:
        decided = leakage.decision(found)
        watch({"kind": "decision", **asdict(decided)})
    # A folder of its own, so that a measurement that ends takes from no other one what it would go on with.
    about = json.dumps([*map(str, models), dataset, recipe.evaluation.model_dump(mode="json")], default=str)
    mark = hashlib.sha256(about.encode()).hexdigest()[:16]
    unfinished = (output or (run.evaluation if run else Path("evaluations"))) / "answers" / mark
    return run, Questions(recipe, tuple(kept), measured_on, unfinished, leakage=found, learned=answers)


def check_askable(models: Sequence[str | Path]) -> None:
    """Raises ModelError for the first of several models that cannot be asked, before another one has answered: its
    tokenizer, its files as its run wrote them, and the base that an adapter names."""
    for model in models:
        loading.load_tokenizer(str(model))
        loading.kind(str(model))
        folder = loading.folder_of(str(model))
        if (folder / "adapter_config.json").is_file():
            base, revision = loading.base_of(folder)
            loading.folder_of(base, revision=revision)


def _recipe_of(models: Sequence[str | Path], settings: Mapping[str, Any] | None) -> Recipe:
    """What models that are no runs are asked with: the method for their kind, unless the settings name one."""
    if "method" in (settings or {}):
        return Recipe()
    kinds = [loading.kind(str(model)) for model in models]
    if "reward" in kinds:
        return Recipe(method=RewardModel())
    return Recipe(method=Seq2Seq()) if kinds[0] == "seq2seq" else Recipe()


def _asked_with(
    base: Recipe,
    dataset: str | None,
    metrics: Sequence[str] | None,
    settings: Mapping[str, Any] | None,
    *,
    is_run: bool,
) -> Recipe:
    """A recipe, of a run or of none, changed to ask the questions of another data set, by other metrics or settings."""
    changes: dict[str, Any] = {"evaluation": {"metrics": metrics}} if metrics else {}
    layer = base.model_dump(mode="json")
    is_whole = not base.data.mix and _same_place(base.data.dataset, dataset or "")
    if dataset is not None and not (is_run and is_whole):
        # Columns and subsets named for the run's own data do not hold for another set; those of one set of its
        # mix do for that one.
        own_set = next(
            (part for part in (base.data, *base.data.mix) if is_run and _same_place(part.dataset, dataset)),
            None,
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
    if "shards" in (settings or {}).get("evaluation", {}):  # those of the run were for its own engine
        engines.check_shards(recipe.evaluation, is_asked=True)
    return recipe


def _leaked(
    models: Sequence[str | Path], asked: Sequence[Example]
) -> tuple[Leakage | None, Callable[[], Iterator[str]]]:
    """What of these examples stands in the training data of the runs behind the models, and the answers there."""
    known = [s for _, s in unseen.runs_behind(models) if isinstance(s, data.Splits)]
    if not known:
        return None, lambda: iter(())
    learned = itertools.chain.from_iterable(splits.examples(TRAIN, VALIDATION) for splits in known)
    found = leakage.find(asked, learned)
    return found, lambda: (leakage.answer_of(e) for splits in known for e in splits.examples(TRAIN))


def answers_of(
    model: str | Path,
    questions: Questions,
    *,
    name: str,
    known_as: str | None = None,
    primary: str | None = None,
    watch: Watch,
) -> tuple[list[EvalRow], list[str], str | None]:
    """A model's rows, the metrics, and what is to be said of questions longer than it was trained to read."""
    settings = questions.recipe
    tokenizer = loading.load_tokenizer(str(model))
    kind = loading.kind(str(model))
    loading.settle_asking(tokenizer, kind, settings.model, settings.method)
    head = METHODS[settings.method.kind].head
    if head and kind == "causal":
        warning(watch)(f"{model} gives no scores; it gets the head that training begins with.")
    items = evaluation.items(
        questions.examples,
        tokenizer,
        loss_on=settings.method.loss_on,
        max_items=settings.evaluation.max_items,
        max_length=settings.data.max_length,
        kind=kind,
    )
    run = run_behind(model) if kind == "seq2seq" else None
    longer = evaluation.longer_than_read(items, run.input_length()) if run else None
    if longer:
        warning(watch)(f"{model}: {longer}")
    device = planning.device()
    chosen = dataflow.metrics(settings, items)
    if primary and primary not in chosen:
        chosen = evaluation.known_metrics([primary, *chosen])

    def checked(check: EngineCheck) -> None:
        check = replace(check, model=known_as or name)
        questions.checks.append(check)
        tell_check(watch, check)

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


def findable(questions: Questions) -> dict[str, Any]:
    """What a comparison on these questions could find, as an event, before any answer is paid for."""
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


def leak_facts(
    questions: Questions,
    rows: Mapping[str, Sequence[EvalRow]],
    metrics: Sequence[str],
    primary: str | None,
    origins: Collection[str] = (),
) -> dict[str, Any] | None:
    """The leakage with what it does to the verdict on each challenger, as it is saved and printed. Of those whose names
    are `origins` the first model was made: there the first is the challenger, whose gain may be memory."""
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


def apart(a: str | Path, b: str | Path, recipe: Recipe) -> str:
    """Why two models may be given different tokens for the same question."""
    one, other = (loading.load_tokenizer(str(model)) for model in (a, b))
    if one.get_vocab() != other.get_vocab():
        return "they have tokenizers of their own"
    for model, tokenizer in ((a, one), (b, other)):
        loading.settle_asking(tokenizer, loading.kind(str(model)), recipe.model, recipe.method)
    templates = [str(tokenizer.chat_template) for tokenizer in (one, other)]
    if all(template.startswith(MARK) for template in templates):
        return "another source prefix, `method.source_prefix`, before the input"
    return "another chat template around the question"


def baseline_first(models: Sequence[str | Path], baseline: str | Path | None) -> list[str | Path]:
    """The models, the baseline before the others. Raises TunesmithError for one that is not among them."""
    if baseline is None:
        return list(models)
    names = side_names(*models)
    for place, (model, name) in enumerate(zip(models, names, strict=True)):
        if str(baseline) in (str(model), name):
            return [models[place], *models[:place], *models[place + 1 :]]
    raise TunesmithError(
        f"The baseline {baseline} is not among the models.",
        found=", ".join(map(str, models)),
        fix=nearest(str(baseline), [str(model) for model in models]),
    )


def side_names(*models: str | Path) -> tuple[str, ...]:
    """What the models of a comparison are called: their folders' names, where these differ."""
    short = tuple(Path(str(model)).name for model in models)
    whole = tuple(map(str, models))
    names = short if len(set(short)) == len(short) and all(short) else whole
    if len(models) > 2 and len(set(names)) < len(names):
        raise TunesmithError(
            "A model is named twice.", found=", ".join(whole), fix="Name each model of a comparison once."
        )
    return names


def made_from(models: Sequence[str | Path], names: Sequence[str]) -> list[str]:
    """The names of those that the first one was trained from, where that is a run."""
    if not is_run(Path(models[0]).expanduser()):
        return []
    base = open_run(models[0]).recipe().model.base
    return [name for name, model in zip(names, models, strict=True) if _same_place(str(model), base)]


def renamed(watch: Watch, before: str, after: str) -> Watch:
    """A watcher that is told of a stage under the name that people know."""

    def told(event: Mapping[str, Any]) -> None:
        stage = str(event.get("stage", ""))
        known = stage.startswith(f"{before}:")
        watch({**event, "stage": after + stage.removeprefix(before)} if known else event)

    return told


def _same_place(a: str, b: str) -> bool:
    return a == b or (
        Path(a).exists() and Path(b).expanduser().exists() and Path(a).samefile(Path(b).expanduser())
    )
