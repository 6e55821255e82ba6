"""The whole workbench on one page: one function per fact, named after what it gives (Hamilton).

    recipe -> splits -> encodings -> plan -> fitted -> base_rows, tuned_rows -> comparisons, way -> report

Inputs are `recipe`, `run` (its folder) and `checkpoint` (None, or where to continue). Nodes carry facts
and paths; weights live and die inside a node. `api` drives this module, and so can any Hamilton driver.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

import tunesmith.evaluation as evaluation
from tunesmith import data, devices, engines, launch, models, parallel, ranks
from tunesmith import estimate as estimating
from tunesmith import plan as planning
from tunesmith.compose import check_together
from tunesmith.data.cache import Encodings, StoredExamples
from tunesmith.data.examples import Tally
from tunesmith.data.packing import Packing, pack, padded_share
from tunesmith.data.preferences import answer_begins, prompt_length
from tunesmith.data.splitting import TRAIN, VALIDATION
from tunesmith.data.templates import Encoding
from tunesmith.engines.check import FILE as CHECKS
from tunesmith.engines.check import keep_check, remarked
from tunesmith.errors import DataError, RecipeError, TunesmithError
from tunesmith.estimate import Estimate, pace
from tunesmith.estimate.micro_batches import Rows, batches
from tunesmith.estimate.step import hollow, rows_by_number, state_bytes, undisturbed
from tunesmith.evaluation import EvalRow, forgetting, stages
from tunesmith.evaluation import leakage as leaks
from tunesmith.evaluation import parts as parting
from tunesmith.evaluation.compare import Comparison, compare
from tunesmith.evaluation.leakage import Leakage
from tunesmith.evaluation.lengths import length_bias
from tunesmith.evaluation.metrics import METRICS, default_metrics
from tunesmith.evaluation.report import write_report
from tunesmith.evaluation.stages import Stage
from tunesmith.evaluation.unseen import Asked, asked_of, carry
from tunesmith.export.card import write_card
from tunesmith.methods import METHODS, Method
from tunesmith.methods.kto import shuffled
from tunesmith.methods.preferred import without_reference_pass
from tunesmith.plan import Decision, Plan
from tunesmith.recipe import FSDP, SFT, DeepSpeed, QLoRA, Recipe, Tracking, Training
from tunesmith.training import continuing, gpu
from tunesmith.training.fit import Fit, arguments, finished, fit, forget_peak
from tunesmith.training.order import order_by_length, padding
from tunesmith.training.retaking import Lacking, attempted, retaken
from tunesmith.training.run import Run

if TYPE_CHECKING:
    from tunesmith.training.steps import Rehearsal


def splits(recipe: Recipe) -> data.Splits:
    """The examples in their three roles, in the shape that the method trains on."""
    method = METHODS[recipe.method.kind]
    return data.prepare(recipe.data, method.adapt, method.remarks)


def encodings(recipe: Recipe, splits: data.Splits) -> data.EncodedSplits:
    """Token ids and labels of the examples, with what was cut or dropped for length."""
    tokenizer, _ = _tokenizer(recipe)
    return METHODS[recipe.method.kind].encoded(splits, tokenizer, recipe.data, recipe.method)


def packing(recipe: Recipe, encodings: data.EncodedSplits) -> Packing | None:
    """Which training examples share a row, where the recipe wants that."""
    return pack(encodings.train.lengths, recipe.data.max_length) if recipe.data.packing else None


def plan(
    recipe: Recipe,
    encodings: data.EncodedSplits,
    packing: Packing | None,
    asked: Asked,
    validation_items: Sequence[evaluation.Item] = (),
    device: str | None = None,
) -> Plan:
    """What the run will do on this machine, or on the device of this name, with reasons."""
    _, template = _tokenizer(recipe)
    lengths = encodings.train.lengths
    method = METHODS[recipe.method.kind]
    examples = lengths[::2] + lengths[1::2] if method.in_pairs else lengths
    training, passes, settled = method.settled(recipe.method, recipe.training, len(examples))
    remark = planning.rate_remark(
        recipe.training.learning_rate,
        method=method.kind,
        own=getattr(recipe.method, "learning_rates", None),
        adapter_kind=recipe.adapter.kind,
    )
    settled = [*settled, *([remark] if remark else [])]
    rows, unit = examples.tolist() * passes, "examples" if passes == 1 else "answers"
    notes = [*encodings.notes, template, data.proven(encodings.proof)]
    notes += [
        f"{number} held-out examples are left out of the measurement: {run} was trained or validated on them"
        for run, number in asked.left_out.items()
    ]
    most, held_out = recipe.evaluation.max_items, len(asked.examples)
    if most and most < held_out and not recipe.evaluation.skip:
        notes.append(
            f"{most} of {held_out} held-out examples are asked, by evaluation.max_items; leakage is looked for in all"
        )
    if validation_items:
        notes.append(
            f"each validation measures {', '.join(recipe.training.measured)} on {len(validation_items)} of "
            f"{len(encodings.validation)} validation examples; the best model is that by {recipe.training.best_by}"
        )
    if packing:
        rows, unit = [int(lengths[list(block)].sum()) for block in packing.blocks], "packed rows"
        batch = recipe.training.per_device_train_batch_size
        notes.append(
            f"{len(lengths)} examples are packed into {len(rows)} rows of at most {packing.capacity} tokens: "
            f"padding {padded_share(lengths, batch):.1%} before, {padded_share(rows, batch):.1%} after, each batch "
            "of them in the order of the data filled up to its longest"
        )
    placed = launch.placed(recipe.launch)
    found = planning.resolve(
        training,
        recipe.model,
        adapter_kind=recipe.adapter.kind,
        lengths=rows,
        num_validation=len(encodings.validation) // (2 if method.in_pairs else 1),
        num_examples=len(examples) if packing or passes > 1 else None,
        unit=unit,
        held_out=None if recipe.evaluation.skip else _held_out(recipe, asked),
        notes=notes,
        settled=settled,
        elsewhere=devices.named(device) if device else None,
        processes=placed.number,
    )
    parallel.check_device(recipe.parallel, found.processes, found.device, is_here=device is None)
    told = parallel.decided(recipe.parallel, found.processes, found.device, training)
    if placed.assumed:
        told.append(Decision("processes of a machine", placed.per_node, placed.assumed))
    number = None
    if isinstance(recipe.parallel, DeepSpeed) and found.processes > 1:
        facts = _facts(found.device, device, placed.per_node)
        model = hollow(recipe, found.dtype)
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        states = state_bytes(training.optimizer, model)
        alone = parallel.Model(sum(p.nbytes for p in model.parameters()), trained, states, layer=0, rest=0)
        number = parallel.stage(recipe.parallel, alone, found.processes, facts.memory)
        told.append(Decision("ZeRO stage", number, parallel.STAGES[number]))
    return replace(
        found,
        decisions=(*found.decisions, *told),
        zero_stage=number,
        per_node=placed.per_node,
    )


def _facts(kind: str, device: str | None, per_node: int) -> devices.DeviceFacts:
    """The facts of the device of this name, or of this machine's of a kind, as one process has it: of a CPU each
    process of a machine has its part, what the others hold by now among it."""
    facts = devices.named(device) if device else devices.here(kind)
    if facts.kind != "cpu":
        return facts
    others = per_node - 1 if ranks.count() > 1 else 0
    return replace(facts, memory=(facts.memory + others * devices.resident()) // per_node)


def estimate(
    recipe: Recipe,
    encodings: data.EncodedSplits,
    packing: Packing | None,
    plan: Plan,
    asked: Asked,
    device: str | None = None,
    measured: bool = False,
) -> Estimate:
    """What the run takes: memory by part, seconds, disk; on this machine, or on the device of this name. `measured` has
    two micro-steps taken here, and the largest micro-batch looked for."""
    method = METHODS[recipe.method.kind]
    facts = _facts(plan.device, device, plan.per_node)
    training, _, _ = method.settled(recipe.method, recipe.training, _examples(method, encodings.train))
    alike, own = training.per_device_train_batch_size, planning.dealt(training, plan.processes)
    # The batches of all processes: each takes its share of them.
    passes = own.gradient_accumulation_steps * plan.processes
    training = own.model_copy(update={"gradient_accumulation_steps": passes})
    recipe = recipe.model_copy(update={"training": training})
    if isinstance(recipe.parallel, DeepSpeed):
        section = recipe.parallel.model_copy(update={"stage": plan.zero_stage})
        recipe = recipe.model_copy(update={"parallel": section})
    given = Rows(
        _row_lengths(method, encodings.train, packing),
        validation=_row_lengths(method, encodings.validation, None) if len(encodings.validation) else [],
        questions=len(asked.examples),
        scored=_scored(recipe, asked),
        answers=getattr(recipe.method, "max_new_tokens", 0) if recipe.method.draws else 0,
        group=getattr(recipe.method, "num_generations", 1),
        order=shuffled(len(encodings.train), training.seed) if recipe.method.kind == "kto" else None,
        identity=encodings.fingerprint,
        alike=alike,
        any_order=_comes_in_any_order(recipe),
    )
    here = measured and not device
    try:
        return estimating.estimate(
            recipe,
            partial(_hollow_trainer, plan=plan, encodings=encodings, packing=packing, device=facts.kind),
            given,
            facts=facts,
            plan=plan,
            process=partial(_held, recipe),
            folder=None if device else Path(recipe.output_dir),
            thorough=measured or device is not None,
            measure=partial(_micro_steps, recipe, plan, encodings, packing) if here else None,
            check=partial(
                _check_change,
                device=plan.device,
                elsewhere=facts if device else None,
                processes=plan.processes,
            ),
        )
    except TunesmithError:
        raise
    except Exception as error:  # a model of parts that cannot be traced can be trained all the same
        return estimating.unknown(facts, error)


LATE: Mapping[str, Callable[[Recipe], bool]] = {
    "bitsandbytes": lambda recipe: isinstance(recipe.adapter, QLoRA),
    "trl.trainer.grpo_trainer": lambda recipe: recipe.method.kind == "grpo",
    "trl.trainer.rloo_trainer": lambda recipe: recipe.method.kind == "rloo",
    "torch._inductor.compile_fx": lambda recipe: recipe.training.compiles,
    "rouge_score.rouge_scorer": lambda recipe: not recipe.evaluation.skip,
}
"""Packages of some size that only some runs load, and a plan does not."""


LATER = 60_000_000
"""Bytes that a process comes to hold in its steps and keeps: the matrix library's buffers, stacks of threads, the last
modules, the code of kernels, and, after more steps than a plan goes through, a piece of the heap that a lasting object
keeps from being used again. 10 to 75 MB were measured on two cores, as a plan had better be over by few."""
OF_WORDS = 20_000_000
"""The share of the products of the vocabulary's width, which a model that gives scores does not have."""
COMPILED = 50_000_000
"""What compiling a model's layers comes to hold, beside the compiler."""


def _held(recipe: Recipe) -> int:
    """Bytes that this process holds, once all is loaded that the training loads."""
    for name, is_loaded in LATE.items():
        with suppress(ImportError):  # a run would say so
            if is_loaded(recipe):
                importlib.import_module(name)
    later = LATER - (OF_WORDS if METHODS[recipe.method.kind].head == "score" else 0)
    return devices.held() + later + (COMPILED if recipe.training.compiles else 0)


def _examples(method: Method, encodings: Encodings) -> int:
    return len(encodings) // 2 if method.in_pairs else len(encodings)


def _check_change(
    recipe: Recipe, *, device: planning.Device, elsewhere: devices.DeviceFacts | None, processes: int
) -> None:
    """Raises the TunesmithError with which a changed recipe would be refused."""
    check_together(recipe)
    METHODS[recipe.method.kind].check(recipe)
    parallel.check(recipe, processes)
    planning.check_device(
        recipe.training, recipe.model, device, adapter_kind=recipe.adapter.kind, elsewhere=elsewhere
    )


def _hollow_trainer(
    recipe: Recipe,
    model: Any,
    folder: Path,
    *,
    plan: Plan,
    encodings: data.EncodedSplits,
    packing: Packing | None,
    device: str,
) -> Any:
    """The method's trainer on a model that is there already, for a device of this kind; of methods that train on what
    the model writes, one that imitates. Its `pads` says whether padding is computed."""
    method = METHODS[recipe.method.kind]
    section, draws = recipe.method, recipe.method.draws
    if draws:
        method, section = METHODS["sft"], SFT()
    if getattr(section, "reference_model", None):
        section = section.model_copy(update={"reference_model": None, "reference": "auto"})
    tokenizer, _ = _tokenizer(recipe)
    plain = replace(plan, mixed_precision="no", device="cpu")
    given = arguments(plain, recipe.training, Tracking(), name="plan", staging=folder / ".staging")
    given |= {"report_to": ["none"]}
    with models.keeping_types(model), without_reference_pass():
        trainer = method.build(
            section,
            model=model,
            tokenizer=tokenizer,
            train=encodings.train,
            validation=encodings.validation,
            arguments=given,
            run=Run(folder),
            keep=1,
            packing=packing,
            fast=recipe.training.forward == "fast",
        )
    from tunesmith import forward

    alike = False if draws else None
    training = recipe.training.model_copy(update={"compile": False, "cache_frozen": False})
    trainer.pads = forward.attach(trainer, Run(folder), training, alike=alike, device=device)
    return trainer


def _micro_steps(
    recipe: Recipe,
    plan: Plan,
    encodings: data.EncodedSplits,
    packing: Packing | None,
    batches: Sequence[Sequence[int]],
) -> pace.Measured:
    """A micro-step on each of these batches and some tokens of the sample answers, by the real model, which is thrown
    away; where a step begins with answers that the model writes, the second and third whole step."""
    tokenizer, _ = _tokenizer(recipe)
    draws = recipe.method.draws
    with (
        undisturbed(),
        TemporaryDirectory(prefix="tunesmith-plan-") as folder,
        without_reference_pass(),
    ):
        given = arguments(plan, recipe.training, Tracking(), name="plan", staging=Path(folder) / ".staging")
        given |= {"report_to": ["none"]}
        if draws:
            given |= {"max_steps": 3, "save_strategy": "no", "eval_strategy": "no"}
        # No epoch goes by in which outputs that are kept would be used.
        training = recipe.training.model_copy(update={"cache_frozen": False})
        once = recipe.model_copy(update={"training": training})
        trainer = _trainer(once, Run(Path(folder)), tokenizer, plan, encodings, packing, given)
        if draws:
            return pace.Measured(pace.timed_steps(trainer))
        steps = pace.timed(trainer, batches, compiles=training.compiles)
        prompts = _asked(recipe, encodings.validation)
        token = pace.timed_token(trainer.model, tokenizer, prompts) if prompts else 0.0
        return pace.Measured(steps, token)


def _held_out(recipe: Recipe, asked: Asked) -> planning.HeldOut:
    groups = {
        number if example.group is None else example.group for number, example in enumerate(asked.examples)
    }
    return planning.HeldOut(
        items=len(asked.examples),
        groups=len(groups),
        share=recipe.data.held_out,
        max_items=recipe.evaluation.max_items,
        confidence=recipe.evaluation.confidence,
    )


def validation_items(recipe: Recipe, splits: data.Splits) -> list[evaluation.Item]:
    """The validation examples that metrics are measured on while training; none where the recipe names no metric."""
    metrics = evaluation.known_metrics(recipe.training.measured)
    if not metrics:
        return []
    tokenizer, _ = _tokenizer(recipe)
    found = evaluation.items(
        list(splits.examples(VALIDATION)),
        tokenizer,
        loss_on=recipe.method.loss_on,
        max_items=recipe.training.eval_samples,
        max_length=recipe.data.max_length,
        kind=METHODS[recipe.method.kind].model,
    )
    if not found:
        raise RecipeError(
            f"There is no validation example to measure {', '.join(metrics)} on while training.",
            fix="Raise data.validation, or leave training.eval_metrics and training.best_by out.",
        )
    evaluation.check_scoring(metrics, gives_scores=METHODS[recipe.method.kind].head is not None)
    evaluation.check_fit(metrics, found)
    return found


def leakage(splits: data.Splits, asked: Asked) -> Leakage:
    """Which of the questions that measure stand in the training data: next to none, by the way splits are made."""
    return leaks.find(asked.examples, splits.examples(TRAIN, VALIDATION))


def identity(recipe: Recipe, splits: data.Splits, encodings: data.EncodedSplits) -> dict[str, Any]:
    """Hashes of what a run rests on beside its recipe: a run is continued only where none of them has changed."""
    tokenizer, _ = _tokenizer(recipe)
    template = tokenizer.chat_template or ""
    prints: dict[str, str] = {}
    for part in splits.parts:  # of a mix several may have one name
        prints[part.source.name] = prints.get(part.source.name, "") + part.source.fingerprint
    return {
        "base model": models.fingerprint(recipe.model.base, revision=recipe.model.revision),
        "chat template": hashlib.sha256(str(template).encode()).hexdigest(),
        "tokenizer": data.cache.tokenizer_fingerprint(tokenizer),
        **{f"data set {name}": hashlib.sha256(text.encode()).hexdigest() for name, text in prints.items()},
        "tokens": encodings.fingerprint,
    }


def prepared(
    recipe: Recipe,
    run: Run,
    encodings: data.EncodedSplits,
    plan: Plan,
    leakage: Leakage,
    identity: dict[str, Any],
    estimate: Estimate,
    checkpoint: Path | None,
) -> Run:
    """The run's folder with ledger and plan, checked to be the same run when it is continued.

    Raises OutOfResources where the run is far from fitting.
    """
    fingerprint = encodings.fingerprint
    before = continuing.planned(run)
    counts = encodings.ledger.counts()
    continuing.check_identity(run, checkpoint, identity, rows=counts["rows_in"])
    estimate.check()
    run.write_lines("ledger.jsonl", data.ledger_lines(encodings.ledger))
    run.write("supervision.json", encodings.proof)
    facts = {
        **replace(plan, estimate=estimate).as_dict(),
        "data_sha256": fingerprint,
        "rows": encodings.ledger.counts(),
        "identity": identity,
        "recipe": recipe.model_dump(mode="json"),
    }
    run.write_plan({**facts, "lengths": encodings.lengths})
    if not before or "rows" not in before:  # a run that is created has the recipe alone in it
        for decision in plan.decisions:
            if decision.name == "verdict":
                run.event("warning", message=f"No verdict will be possible: {decision.reason}.")
            else:
                run.event("decision", name=decision.name, value=decision.value, reason=decision.reason)
        for name, value, reason in estimate.summary():
            run.event("decision", name=name, value=value, reason=reason)
        if estimate.missing:
            run.event("warning", message=estimate.warning())
        if short := estimate.disk_warning():
            run.event("warning", message=short)
        found = leaks.decision(leakage, run.path / "evaluation/leakage.json")
        run.event("decision", name=found.name, value=found.value, reason=found.reason)
    run.write("evaluation/leakage.json", leakage.as_dict())
    run.event("state", state="prepared", rows=encodings.ledger.counts(), dropped=encodings.ledger.reasons())
    return run


def asked(recipe: Recipe, encodings: data.EncodedSplits) -> Asked:
    """The held-out examples that measure: those that nothing behind the base was trained on."""
    return asked_of(encodings.held_out, recipe.model.base)


def items(recipe: Recipe, asked: Asked) -> list[evaluation.Item]:
    """The questions that measure, as token ids."""
    tokenizer, _ = _tokenizer(recipe)
    return evaluation.items(
        asked.examples,
        tokenizer,
        loss_on=recipe.method.loss_on,
        max_items=recipe.evaluation.max_items,
        max_length=recipe.data.max_length,
        kind=METHODS[recipe.method.kind].model,
    )


def metrics(recipe: Recipe, items: list[evaluation.Item]) -> list[str]:
    """Names of the metrics, the primary one first."""
    if recipe.evaluation.metrics:
        return evaluation.known_metrics(recipe.evaluation.metrics)
    if METHODS[recipe.method.kind].head:
        return evaluation.judged(items, by_score=True)
    prompts = [item.prompt for item in items if item.prompt]
    has_text = any(item.prompt is None and item.good is None for item in items)
    usual = default_metrics(
        prompts,
        has_text,
        task=recipe.task,
        method=recipe.method.kind,
        judged=evaluation.judged(items),
        run_code=recipe.evaluation.run_code,
    )
    # What was rewarded is what a run is about.
    rewards = getattr(recipe.method, "rewards", ())
    single = [
        reward.name
        for reward in rewards
        if reward.kind == "metric"
        and reward.weight > 0
        and any(METRICS[reward.name].fits(p) for p in prompts)
    ]
    if _is_measured(rewards) and (len(rewards) > 1 or not single):
        single.insert(0, "mean_reward")
    return list(dict.fromkeys([*single, *usual])) if prompts else usual


def _is_measured(rewards: Sequence[Any]) -> bool:
    """Whether held-out answers can be scored by a run's rewards; a judge would have to be paid again for them."""
    return bool(rewards) and not any(reward.kind == "judge" for reward in rewards)


def check_rewarded(recipe: Recipe, metrics: Sequence[str]) -> None:
    """Raises RecipeError where `mean_reward` is asked for and there are no rewards that could tell it."""
    if "mean_reward" in metrics and not _is_measured(getattr(recipe.method, "rewards", ())):
        raise RecipeError(
            "There is no mean reward: the method has no rewards, or one is a judge, who would be paid again.",
            fix="Leave mean_reward out of evaluation.metrics, training.eval_metrics and training.best_by.",
        )


def with_rewards(
    recipe: Recipe,
    rows: list[EvalRow],
    items: list[evaluation.Item],
    metrics: list[str],
    *,
    tokenizer: Any,
    device: str,
) -> list[EvalRow]:
    """The rows with what the recipe's rewards make of their answers, where that is measured.

    Raises RecipeError where `mean_reward` is asked for and there are no rewards that could tell it.
    """
    if "mean_reward" not in metrics:
        return rows
    from tunesmith.methods import rewards as rewarding

    check_rewarded(recipe, metrics)
    sections = getattr(recipe.method, "rewards", ())
    prompts = {item.number: item.prompt for item in items if item.prompt}
    answered = [row for row in rows if row.output is not None and row.item in prompts]
    asked = [prompts[row.item] for row in answered]
    resolved = rewarding.resolve(sections, prompts=asked, tokenizer=tokenizer, device=device)
    totals = rewarding.total(resolved, asked, [row.output or "" for row in answered]).totals
    worth = dict(zip(map(id, answered), totals, strict=True))  # a question may have several answers
    return [
        replace(row, scores={**row.scores, "mean_reward": worth[id(row)]}) if id(row) in worth else row
        for row in rows
    ]


def base_rows(
    recipe: Recipe, prepared: Run, plan: Plan, asked: Asked, items: list[evaluation.Item], metrics: list[str]
) -> list[EvalRow]:
    """The base model's answers; those of an interrupted run are used again."""
    for run, why in asked.unchecked.items():
        message = f"What {run} was trained on is not known, so held-out examples may be among it: {why}"
        if not any(event.get("message") == message for event in prepared.events()):
            prepared.event("warning", message=message)
    file = prepared.evaluation / "rows.jsonl"
    kept = [row for row in evaluation.read_rows(file) if row.model == "base"] if file.exists() else []
    rows = _start_rows(recipe, prepared, plan, items, metrics, name="base", kept=kept)
    if rows is not kept:
        evaluation.write_rows(file, rows)
    return rows


def stage_rows(
    recipe: Recipe, prepared: Run, plan: Plan, asked: Asked, base_rows: list[EvalRow], metrics: list[str]
) -> list[tuple[Stage, list[EvalRow]]]:
    """The answers of every model that the base was fine-tuned from, and last the base's own; nothing where the base is
    no run."""
    # A scoring head does not exist before the method that makes it.
    if METHODS[recipe.method.kind].head or not recipe.evaluation.stages:
        return []
    file = prepared.evaluation / "stages.jsonl"
    kept = evaluation.read_rows(file) if file.exists() else []
    found: list[tuple[Stage, list[EvalRow]]] = []
    before, missing = stages.earlier(recipe.model.base)
    for message in missing:
        prepared.event("warning", message=message)
    for stage in before:
        model = recipe.model.model_copy(update={"base": stage.model, "revision": stage.revision})
        then = recipe.model_copy(update={"model": model})
        own = [row for row in kept if row.model == stage.name]
        rows = _start_rows(then, prepared, plan, items(then, asked), metrics, name=stage.name, kept=own)
        found.append((stage, rows))
        if rows is not own:
            evaluation.write_rows(file, [row for _, rows in found for row in rows])
    return [*found, (stages.stage(recipe.model.base, recipe.model.revision), base_rows)] if found else []


def _start_rows(
    recipe: Recipe,
    prepared: Run,
    plan: Plan,
    items: list[evaluation.Item],
    metrics: list[str],
    *,
    name: str,
    kept: list[EvalRow],
) -> list[EvalRow]:
    """Answers of a recipe's base: those kept of an interrupted run, or new ones where they are others."""
    if evaluation.are_answers_to(
        kept,
        items,
        metrics,
        max_new_tokens=recipe.evaluation.max_new_tokens,
        attempts=recipe.evaluation.attempts,
        engine=recipe.evaluation.engine,
        temperature=evaluation.drawn_at(recipe.evaluation),
        seed=recipe.evaluation.seed,
        model=evaluation.identity(recipe.model, recipe.model.base, device=plan.device, dtype=plan.dtype)
        if kept
        else None,
    ):
        return kept
    tokenizer, _ = _tokenizer(recipe)
    return _rows(
        recipe, prepared, plan, items, metrics, name=name, base=recipe.model.base, tokenizer=tokenizer
    )


def _rows(
    recipe: Recipe,
    prepared: Run,
    plan: Plan,
    items: list[evaluation.Item],
    metrics: list[str],
    *,
    name: str,
    base: str,
    tokenizer: Any,
) -> list[EvalRow]:
    """A model's answers: the one code path of base, stages and tuned model."""
    rows = evaluation.answers(
        recipe.model,
        recipe.evaluation,
        items,
        metrics,
        name=name,
        base=base,
        tokenizer=tokenizer,
        device=plan.device,
        dtype=plan.dtype,
        watch=prepared.watch,
        head=METHODS[recipe.method.kind].head,
        folder=prepared.evaluation / "answers",
        checked=partial(keep_check, prepared),
        warn=lambda message: prepared.event("warning", message=message),
    )
    return with_rewards(recipe, rows, items, metrics, tokenizer=tokenizer, device=plan.device)


def fitted(
    recipe: Recipe,
    prepared: Run,
    plan: Plan,
    splits: data.Splits,
    encodings: data.EncodedSplits,
    packing: Packing | None,
    checkpoint: Path | None,
    validation_items: list[evaluation.Item],
    identity: dict[str, Any],
) -> Fit:
    """The finished model's folder and what training came to."""
    if done := finished(prepared):
        return done
    ranks.told(
        {
            "recipe": recipe.model_dump(mode="json"),
            "run": str(prepared.path),
            "plan": {**plan.as_dict(), "estimate": None, "decisions": ()},
            "train": str(encodings.train.file),
            "validation": str(encodings.validation.file),
            "checkpoint": str(checkpoint) if checkpoint else None,
            "measures": bool(validation_items),
        }
    )
    rests_on = continuing.rests_on(recipe, identity)
    attempt = partial(_fitted_from, recipe, prepared, plan, encodings, packing, validation_items, rests_on)
    result, is_whole = retaken(prepared, checkpoint, attempt)
    carry(result.final_model, prepared, splits, recipe.model.base)
    prepared.write("training.json", asdict(result))
    planned = prepared.read("plan.json") or {}
    if truth := estimating.truth(
        planned.get("estimate"), result, is_whole=is_whole, measured=planned.get("measured")
    ):
        prepared.write_plan({**planned, "truth": truth})
        prepared.event("decision", name="plan and truth", value=truth["value"], reason=truth["sentence"])
    return result


def _fitted_from(
    recipe: Recipe,
    prepared: Run,
    plan: Plan,
    encodings: data.EncodedSplits,
    packing: Packing | None,
    validation_items: Sequence[evaluation.Item],
    rests_on: Mapping[str, Any] | None,
    checkpoint: Path | None,
    may_fail_after: int | None,
) -> Fit | Lacking:
    """One training (`retaking.Attempt`)."""
    from transformers import set_seed

    method = METHODS[recipe.method.kind]
    training, _, _ = method.settled(recipe.method, recipe.training, len(encodings.train))
    with ranks.together(plan.device):
        forget_peak()
        set_seed(recipe.training.seed)
        tokenizer, _ = _tokenizer(recipe)
        own = planning.dealt(training, ranks.count())
        given = arguments(
            plan, own, recipe.tracking, name=prepared.path.name, staging=prepared.path / ".staging"
        )
        if isinstance(recipe.parallel, DeepSpeed) and plan.zero_stage:
            given["deepspeed"] = parallel.configuration(recipe.parallel, plan.zero_stage, plan, own)
        trainer = _trainer(recipe, prepared, tokenizer, plan, encodings, packing, given)
        work = partial(
            fit,
            trainer,
            prepared,
            recipe.training,
            adapter_init=getattr(recipe.adapter, "init", None),
            checkpoint=checkpoint,
            tensorboard="tensorboard" in recipe.tracking.trackers,
            samples=_asked(recipe, encodings.validation),
            max_new_tokens=recipe.evaluation.max_new_tokens,
            measure=partial(_measures, recipe, tokenizer, plan.device, list(validation_items))
            if validation_items
            else None,
            higher_is_better=recipe.training.best_by != "loss"
            and METRICS[recipe.training.best_by].higher_is_better,
            input_rows=encodings.train.rows,
            release=encodings.release,
            pace=partial(_paced, prepared) if checkpoint is None else None,
            # Of encoder-decoders the Trainer counts the inputs alone.
            tokens_per_step=0.0
            if recipe.method.draws or method.model != "causal"
            else plan.tokens_per_epoch / plan.steps_per_epoch,
            rehearsal=_rehearsal(recipe, training, trainer, plan, encodings, packing),
            rests_on=rests_on,
        )
        return attempted(trainer, work, checkpoint, may_fail_after)


def _assist(job: Mapping[str, Any]) -> None:
    """Take a further process's share of the steps of a run that the first one has prepared.

    Raises DataError where this machine does not see what the first one has prepared.
    """
    recipe = Recipe.model_validate(job["recipe"])
    train, validation = (Encodings(Path(job[name])) for name in ("train", "validation"))
    for place in (train.file, Path(job["run"])):
        if not place.exists():
            raise DataError(
                f"Process {ranks.number()} does not see {place}, which the first process has written.",
                fix="Put --output-dir and $TUNESMITH_CACHE into folders that all nodes share; data.cache has to be on.",
            )
    packing = pack(train.lengths, recipe.data.max_length) if recipe.data.packing else None
    nothing = StoredExamples(train.file), Tally().ledger(lambda: iter(()))
    encodings = data.EncodedSplits(train, validation, *nothing, fingerprint="", proof={})
    plan = Plan(**{**job["plan"], "decisions": ()})
    checkpoint = Path(job["checkpoint"]) if job["checkpoint"] else None
    run = Run(Path(job["run"]), is_read_only=True)
    # The first process measures; the others need to know that it does.
    measured = [None] if job["measures"] else []
    attempt = partial(_fitted_from, recipe, run, plan, encodings, packing, measured, None)  # type: ignore[arg-type]
    retaken(run, checkpoint, attempt)


def _rehearsal(
    recipe: Recipe,
    training: Training,
    trainer: Any,
    plan: Plan,
    encodings: data.EncodedSplits,
    packing: Packing | None,
) -> Rehearsal | None:
    """The fullest batch that the run will meet; None where it comes at once, where the model writes what it learns
    from, and where several processes have a batch each."""
    from tunesmith.training.steps import SOON, Rehearsal

    method = METHODS[recipe.method.kind]
    if recipe.method.draws or trainer.args.world_size > 1:
        return None
    is_ordered = "_get_train_sampler" in vars(trainer)  # by `order_by_length`
    given = Rows(
        _row_lengths(method, encodings.train, packing),
        validation=[],
        order=shuffled(len(encodings.train), training.seed) if recipe.method.kind == "kto" else None,
    )
    training = training.model_copy(update={"batches": "by_length" if is_ordered else "shuffled"})
    found = batches(given, training, plan.total_steps)
    place = found.place_of_fullest(given.lengths, pads=trainer.pads)
    step = place // training.gradient_accumulation_steps + 1
    if step <= SOON:
        return None
    return Rehearsal(
        rows_by_number(trainer.train_dataset, found.fullest(given.lengths, pads=trainer.pads)),
        step,
        state_bytes(training.optimizer, trainer.model),
    )


def _paced(run: Run, step: int, per_step: float, seconds: float) -> None:
    """Say what a run comes to by its own first steps, and keep it beside what was planned before them."""
    planned = run.read("plan.json") or {}
    if found := estimating.paced(planned.get("estimate"), per_step, seconds):
        run.write_plan({**planned, "measured": found})
        told = pace.duration(found["seconds"])
        run.event("decision", step=step, name="time in all", value=told, reason=found["basis"])


def _trainer(
    recipe: Recipe,
    run: Run,
    tokenizer: Any,
    plan: Plan,
    encodings: data.EncodedSplits,
    packing: Packing | None,
    arguments: dict[str, Any],
) -> Any:
    """The method's trainer on a model that is loaded for it."""
    method = METHODS[recipe.method.kind]
    section = recipe.parallel if isinstance(recipe.parallel, FSDP) and ranks.count() > 1 else None
    is_packed = isinstance(recipe.adapter, QLoRA)
    model = models.load_model(
        recipe.model.base,
        revision=recipe.model.revision,
        dtype=plan.dtype,
        device="cpu" if section and not is_packed else plan.device,  # a device gets its shares only
        attention=recipe.model.attention,
        quantize=recipe.adapter if isinstance(recipe.adapter, QLoRA) else None,
        head=method.head,
    )
    if recipe.training.kernels == "liger" and plan.device == "cuda":
        kernels, why = gpu.put_in_liger(model)
        run.event("decision", name="kernels", value=kernels, reason=why)
    model = models.attach(
        model,
        recipe.adapter,
        gradient_checkpointing=recipe.training.gradient_checkpointing,
        merged_base=run.path / "merged_base",
        revision=recipe.model.revision,
    )
    if plan.mixed_precision == "fp16" and (count := gpu.trained_in_float32(model)):
        why = "gradients of fp16 are scaled up, which half a number cannot hold"
        run.event("decision", name="trained weights", value=f"{count:,} in float32", reason=why)
    models.set_stop_tokens(model, tokenizer)
    if section:
        from tunesmith.training import sharding

        sharding.mark(model, section)
    described = models.describe(model).sentence()
    run.event("decision", name="model", value=described, reason=f"adapter.kind is {recipe.adapter.kind}")
    with models.keeping_types(model):
        trainer = method.build(
            recipe.method,
            model=model,
            tokenizer=tokenizer,
            train=encodings.train,
            validation=encodings.validation,
            arguments=arguments,
            run=run,
            keep=recipe.training.save_total_limit,
            packing=packing,
            fast=recipe.training.forward == "fast",
        )
    from tunesmith import forward

    pads = trainer.pads = forward.attach(trainer, run, recipe.training)
    wanted = recipe.training.batches
    if wanted == "by_length" or (wanted == "auto" and pads and _comes_in_any_order(recipe)):
        rows = _row_lengths(method, encodings.train, packing)
        batch = recipe.training.per_device_train_batch_size
        _order(trainer, run, rows, batch, is_asked=wanted == "by_length")
    return trainer


def _comes_in_any_order(recipe: Recipe) -> bool:
    """Whether rows that are chosen for their lengths may come together."""
    return recipe.method.any_order and not recipe.data.packing


def _order(trainer: Any, run: Run, lengths: Sequence[int], batch: int, *, is_asked: bool) -> None:
    """Have rows of like length come together, where that was asked or leaves much less padding; keep why."""
    found = padding(lengths, batch, seed=trainer.args.seed)
    orders = is_asked or found.is_worth
    if orders:
        order_by_length(trainer, lengths, batch)
    why = (
        f"padding is {found.alike:.1%} of a padded batch of like lengths, {found.mixed:.1%} where any rows come "
        "together"
    )
    run.event("decision", name="batches", value="by length" if orders else "shuffled", reason=why)


def _row_lengths(method: Method, encodings: Encodings, packing: Packing | None) -> list[int]:
    """Tokens of each row that batches are made of; of a pair those of its longer side."""
    lengths = encodings.lengths
    if packing:
        return [int(lengths[list(block)].sum()) for block in packing.blocks]
    found: list[int] = (np.maximum(lengths[::2], lengths[1::2]) if method.in_pairs else lengths).tolist()
    return found


LOOKED_AT = 1000
"""Of the held-out questions, how many a plan looks at."""


def _scored(recipe: Recipe, asked: Asked) -> list[tuple[int, int]]:
    """Of the first questions that measure with their answers the tokens, and how many come before the answer."""
    if recipe.evaluation.skip or METHODS[recipe.method.kind].model != "causal":
        return []
    most = min(recipe.evaluation.max_items or LOOKED_AT, LOOKED_AT)
    section = recipe.evaluation.model_copy(update={"max_items": most})
    found = items(recipe.model_copy(update={"evaluation": section}), asked)
    return [(len(item.input_ids), answer_begins(item.labels)) for item in found if item.input_ids]


def _measures(
    recipe: Recipe, tokenizer: Any, device: str, items: list[evaluation.Item], model: Any
) -> dict[str, float]:
    """The values of the metrics that a validation measures, of the model as it is now."""
    names = recipe.training.measured
    section = recipe.evaluation
    rows = evaluation.evaluate(
        model,
        tokenizer,
        items,
        name="validation",
        metrics=names,
        max_new_tokens=section.max_new_tokens,
        batch_tokens=section.batch_tokens,
        seed=section.seed,
        run_code=section.run_code,
        attempts=section.attempts,
        temperature=evaluation.drawn_at(section),
    )
    rows = with_rewards(recipe, rows, items, names, tokenizer=tokenizer, device=device)
    found = {name: evaluation.value(rows, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _asked(recipe: Recipe, validation: Sequence[Encoding]) -> list[tuple[int, ...]]:
    """Prompts of the first validation examples; none where the model writes nothing, and where the method's own
    answers are kept anyway."""
    method = METHODS[recipe.method.kind]
    if method.head or recipe.method.draws:
        return []
    found: dict[tuple[int, ...], None] = {}
    for encoding in validation:
        if len(found) == recipe.evaluation.samples:
            break
        ids = tuple(encoding.input_ids)
        if prompt := ids if method.model == "seq2seq" else ids[: prompt_length(encoding)]:
            found[prompt] = None
    return list(found)


def tuned_rows(
    recipe: Recipe, prepared: Run, plan: Plan, fitted: Fit, items: list[evaluation.Item], metrics: list[str]
) -> list[EvalRow]:
    """The tuned model's answers to the same questions, read back from its folder."""
    model = str(fitted.final_model)
    told = {event.get("message") for event in prepared.events()}
    if (longer := evaluation.longer_than_read(items, prepared.input_length())) and longer not in told:
        prepared.event("warning", message=longer)
    tokenizer = models.load_tokenizer(model)
    return _rows(recipe, prepared, plan, items, metrics, name="tuned", base=model, tokenizer=tokenizer)


def comparisons(
    recipe: Recipe, prepared: Run, base_rows: list[EvalRow], tuned_rows: list[EvalRow], metrics: list[str]
) -> list[Comparison]:
    """Base against tuned, metric by metric, with intervals and verdicts; rows, scores and comparison saved."""
    evaluation.write_rows(prepared.evaluation / "rows.jsonl", [*base_rows, *tuned_rows])
    engines.forget(prepared.evaluation / "answers")
    section = recipe.evaluation
    compared = compare(
        base_rows, tuned_rows, metrics=metrics, resamples=section.resamples, confidence=section.confidence
    )
    compared = remarked(compared, prepared.read(CHECKS) or {})
    scores = {"base": evaluation.scores(base_rows, metrics), "tuned": evaluation.scores(tuned_rows, metrics)}
    prepared.write("evaluation/scores.json", scores)
    prepared.write("evaluation/comparison.json", {"comparisons": [asdict(c) for c in compared]})
    if made := evaluation.classification.classification(tuned_rows):
        prepared.event("decision", name="labels", value=len(made.labels), reason=made.sentence())
    if bias := length_bias(tuned_rows):
        prepared.event(
            "decision",
            name="scores and lengths",
            value=f"rank correlation {bias.correlation:+.2f}",
            reason=bias.sentence("the tuned model"),
        )
    return compared


def samples(recipe: Recipe, base_rows: list[EvalRow], tuned_rows: list[EvalRow]) -> list[dict[str, str]]:
    """A few held-out answers side by side, spread over the items: question, reference, base, tuned."""
    tuned = {row.item: row for row in tuned_rows}
    answered = [row for row in base_rows if row.item in tuned and row.output is not None]
    step = max(len(answered) // max(recipe.evaluation.samples, 1), 1)
    return [
        {
            "question": row.prompt_text,
            "reference": row.reference,
            "base": row.output or "",
            "tuned": tuned[row.item].output or "",
        }
        for row in answered[::step][: recipe.evaluation.samples]
    ]


def way(
    recipe: Recipe,
    prepared: Run,
    stage_rows: list[tuple[Stage, list[EvalRow]]],
    tuned_rows: list[EvalRow],
    comparisons: list[Comparison],
) -> list[dict[str, Any]]:
    """The stages from the first model to this run's, each measured on the same questions; saved for the report."""
    if not stage_rows:
        return []
    this = Stage(prepared.path.name, str(prepared.final_model), method=recipe.method.kind)
    section = recipe.evaluation
    found = stages.measured(
        [*stage_rows, (this, tuned_rows)],
        [c.metric for c in comparisons],
        resamples=section.resamples,
        confidence=section.confidence,
    )
    scored_by = stages.reward_models(recipe)
    prepared.write("evaluation/stages.json", {"stages": found, "reward_models": scored_by})
    if primary := next((c.metric for c in comparisons if c.primary), None):
        label = METRICS[primary].label
        prepared.event(
            "decision",
            name="stages",
            value=stages.sentence(found, primary),
            reason=f"{label} on the same questions",
        )
    return found


def forgotten(
    recipe: Recipe,
    prepared: Run,
    plan: Plan,
    fitted: Fit,
    base_rows: list[EvalRow],
    tuned_rows: list[EvalRow],
    comparisons: list[Comparison],
) -> dict[str, Any]:
    """What the tuned model lost on general text, beside what it gained on its own; empty where that is not measured."""
    method, section = METHODS[recipe.method.kind], recipe.evaluation
    wanted = recipe.task == "domain" if section.forgetting is None else section.forgetting
    if not wanted:
        return {}
    if method.head or method.model != "causal":
        if section.forgetting:
            why = "evaluation.forgetting has no effect: only a model that writes on has likelihoods of running text."
            prepared.event("warning", message=why)
        return {}
    names = {"base": recipe.model.base, "tuned": str(fitted.final_model)}
    measured = []
    for name, place in names.items():
        tokenizer = _tokenizer(recipe)[0] if name == "base" else models.load_tokenizer(place)
        texts = evaluation.items(forgetting.general_texts(), tokenizer)
        measured.append(
            evaluation.answers(
                recipe.model,
                section,
                texts,
                [forgetting.METRIC],
                name=name,
                base=place,
                tokenizer=tokenizer,
                device=plan.device,
                dtype=plan.dtype,
                watch=prepared.watch,
            )
        )
    evaluation.write_rows(prepared.evaluation / "general.jsonl", [row for rows in measured for row in rows])
    found = forgetting.forgotten(
        (measured[0], measured[1]),
        (base_rows, tuned_rows),
        resamples=section.resamples,
        confidence=section.confidence,
    )
    prepared.write("evaluation/forgetting.json", found)
    prepared.event("decision", name="forgetting", value=found["general"]["verdict"], reason=found["sentence"])
    return found


def leak_effect(
    recipe: Recipe,
    prepared: Run,
    splits: data.Splits,
    leakage: Leakage,
    base_rows: list[EvalRow],
    tuned_rows: list[EvalRow],
    comparisons: list[Comparison],
) -> dict[str, Any]:
    """What leaked questions do to the verdict, and how much of the answers is copied from training; saved."""
    facts = leaks.effect(
        leakage,
        {"base": base_rows, "tuned": tuned_rows},
        (leaks.answer_of(example) for example in splits.examples(TRAIN)),
        next((c.metric for c in comparisons if c.primary), None),
        resamples=recipe.evaluation.resamples,
        confidence=recipe.evaluation.confidence,
    )
    prepared.write("evaluation/leakage.json", {**leakage.as_dict(), **facts})
    if leakage.leaked and not any(event.get("message") == facts["remark"] for event in prepared.events()):
        prepared.event("warning", message=facts["remark"])
    return facts


def parts(
    recipe: Recipe,
    prepared: Run,
    items: list[evaluation.Item],
    base_rows: list[EvalRow],
    tuned_rows: list[EvalRow],
    comparisons: list[Comparison],
) -> list[dict[str, Any]]:
    """The primary metric by category, where rows have one, and by length of the question; saved for the report."""
    primary = next((c.metric for c in comparisons if c.primary and c.n), None)
    if not primary:
        return []
    asked = {item.number: item.prompt.checks if item.prompt else {} for item in items}
    column = parting.category_column(list(asked.values()))
    found = parting.parts(
        base_rows,
        tuned_rows,
        primary,
        categories={n: str(checks[column]) for n, checks in asked.items() if column and column in checks},
        lengths={item.number: len(item.prompt_ids or item.input_ids) for item in items},
        confidence=recipe.evaluation.confidence,
    )
    prepared.write("evaluation/parts.json", {"column": column, "parts": found})
    return found


def report(
    prepared: Run,
    fitted: Fit,
    comparisons: list[Comparison],
    way: list[dict[str, Any]],
    forgotten: dict[str, Any],
    leak_effect: dict[str, Any],
    parts: list[dict[str, Any]],
) -> Path:
    """report.html, and the model card beside the weights."""
    write_card(prepared, comparisons)
    return write_report(prepared.path)


def _tokenizer(recipe: Recipe) -> tuple[Any, str]:
    """The base's tokenizer with its chat template settled, and a sentence on which template that is."""
    tokenizer = models.load_tokenizer(recipe.model.base, revision=recipe.model.revision)
    settle = METHODS[recipe.method.kind].template
    return tokenizer, settle(tokenizer, recipe.model.chat_template, recipe.method)
