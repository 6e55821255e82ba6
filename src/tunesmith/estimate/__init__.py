"""What a run takes before it starts: memory by part, seconds, disk, the largest micro-batch, and what to change.

The method's own trainer is built on a hollow model (`tracing`) and takes one step on the longest batch, so that the
figures follow whatever the trainers come to do. Seconds come from the operations' FLOPs and bytes against what the
device can do, and on this machine from two measured micro-steps.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import parallel, scaling
from tunesmith.devices import DeviceFacts
from tunesmith.errors import OutOfResources, TunesmithError, size
from tunesmith.estimate.memory import (
    MEASURING,
    SPREAD,
    drawing,
    kept_outputs,
    measuring,
    most_of,
    questions_asked,
    stages,
)
from tunesmith.estimate.micro_batches import Batches, Rows, batches
from tunesmith.estimate.pace import (
    MEASURED_SECONDS,
    Measure,
    duration,
    pace_of_batches,
    pace_of_drawing,
    pass_over,
    roofline,
    roofline_of_writing,
)
from tunesmith.estimate.remedies import (
    MOST_TRACED,
    REFUSED,
    Change,
    Remedy,
    most_rows,
    possible_changes,
    ways_to_fit,
    with_changes,
)
from tunesmith.estimate.step import Asked, Build, Parts, Traced, trace
from tunesmith.plan import Plan, computed_in, weights_dtype
from tunesmith.recipe import FSDP, LoRA, QLoRA, Ray, Recipe
from tunesmith.training.run import SAMPLE_TOKENS

if TYPE_CHECKING:
    from tunesmith.training.fit import Fit


ABOUT = {
    "process": "Python with its libraries and the data, measured, and what it loads later",
    "weights": "of all models that are loaded, frozen ones too",
    "gradients": "of what is trained",
    "gathered": "weights of other processes, for the layers that are run",
    "buckets": "gradients on their way to the other processes",
    "optimizer": "its running means",
    "activations": "kept from the forward for the backward pass",
    "head": "what has the vocabulary's width: logits and their gradients",
    "cache": "keys and values of answers that are being written",
    "outputs": "of frozen layers, kept from epoch to epoch",
    "evaluation": "a forward pass of the longest batch of questions",
    "save": "trained weights on their way to the disk",
    "reserved": "the driver's context and kernels",
    "spread": "what the allocator holds beyond what is alive",
}
"""What a part of the memory is."""


MARGIN = 0.25
"""Share of the memory by which a run may miss and is tried all the same, with a warning: what is free changes, and a
step that runs out of memory is taken again in smaller passes."""


@dataclass(frozen=True)
class Shared:
    """What a step of several processes takes beside its computing (`tunesmith.scaling`)."""

    processes: int
    mode: str
    over: str
    """The links that they speak over, as taken."""
    sent: int
    """Bytes that each sends in a step."""
    speaking: float
    """Seconds of a step that this adds."""
    waiting: float
    """Seconds of a step for the process with the most tokens."""

    def lines(self) -> list[tuple[str, str, str]]:
        """Name, value and reason of each figure."""
        why = f"{self.mode} in {self.processes} processes over {self.over}; {size(self.sent)} sent by each"
        fullest = "for the process with the most tokens, in the mean step"
        return [
            ("  of it speaking", duration(self.speaking), why),
            ("  of it waiting", duration(self.waiting), fullest),
        ]


@dataclass(frozen=True)
class Estimate:
    """What a run takes, as it is saved in plan.json."""

    device: str
    capacity: int
    """Bytes that the process can have."""
    stages: Mapping[str, Parts]
    """Bytes by part in each stage of the run that holds memory."""
    seconds_per_step: float
    seconds: float
    """Of the training: steps, validations with their sample answers, and what is saved."""
    validation_seconds: float
    """The share of the validations in them."""
    saving_seconds: float
    """The share of what is saved."""
    basis: str
    """What the seconds rest on."""
    tokens_per_epoch: int
    epochs: float
    flops_per_step: float
    disk: Mapping[str, int]
    disk_free: int | None
    """Bytes; None of another machine's disk."""
    micro_batch: int
    largest_batch: int | None = None
    """Rows in the largest micro-batch that fits, of those that there are; None where it was not looked for."""
    remedies: tuple[Remedy, ...] = ()
    notes: tuple[str, ...] = ()
    longest: int = 0
    """Tokens in the widest row of the batch that was traced."""
    shared: Shared | None = None
    """What several processes cost one another."""

    @property
    def stage(self) -> str:
        """The stage that takes the most."""
        return max(self.stages, key=lambda name: sum(self.stages[name].values()), default="")

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return most_of(self.stages)

    @property
    def missing(self) -> int:
        """Bytes by which the run does not fit; 0 where it does."""
        return max(self.peak - self.capacity, 0)

    def as_dict(self) -> dict[str, Any]:
        """As plan.json keeps it."""
        return {**asdict(self), "stage": self.stage, "peak": self.peak, "missing": self.missing}

    def lines(self) -> list[tuple[str, str, str]]:
        """Name, value and reason of each figure, for the terminal and the report."""
        if not self.stages:
            return [("note", note, "") for note in self.notes]
        parts = self.stages[self.stage]
        rows = [
            (
                "peak memory",
                size(self.peak),
                f"of {size(self.capacity)} on {self.device}, while {self.stage}"
                + (f": it does not fit, by {size(self.missing)}" if self.missing else ""),
            )
        ]
        rows += [(f"  {name}", size(held), ABOUT[name]) for name, held in parts.items() if held]
        others = {name: sum(held.values()) for name, held in self.stages.items() if name != self.stage}
        if others:
            rows.append(
                ("other stages", ", ".join(f"{n} {size(b)}" for n, b in others.items()), "peaks of their own")
            )
        if self.largest_batch is not None:
            why = f"as this run's seed puts rows together; the recipe has {self.micro_batch}"
            rows.append(("largest micro-batch", f"{self.largest_batch:,}", why))
        rows += [
            (f"remedy {n}", remedy.value, f"{remedy.change} ({remedy.flags})")
            for n, remedy in enumerate(self.remedies, 1)
        ]
        rows.append(("time per step", duration(self.seconds_per_step), self.basis))
        rows += self.shared.lines() if self.shared else []
        rows.append(
            (
                "time in all",
                duration(self.seconds),
                "steps, validations and saving; start-up and the comparison are not in it",
            )
        )
        written = ", ".join(f"{name} {size(held)}" for name, held in self.disk.items())
        wanted = sum(self.disk.values())
        free = (
            "what that machine has free is not known"
            if self.disk_free is None
            else f"{size(self.disk_free)} free" + (": not enough" if wanted > self.disk_free else "")
        )
        rows.append(
            (
                "disk",
                size(wanted),
                f"{written}; {free}",
            )
        )
        rows += [("note", note, "") for note in self.notes]
        return rows

    def summary(self) -> list[tuple[str, str, str]]:
        """Name, value and reason of memory, time and what is not known, for the run's events."""
        wanted = ("peak memory", "time in all", "disk", "note")
        return [line for line in self.lines() if line[0] in wanted]

    def warning(self) -> str:
        """What to say of a run that may not fit and is tried."""
        better = "; or ".join(remedy.sentence() for remedy in self.remedies)
        return (
            f"The run may not fit into the memory of {self.device}: {size(self.peak)} while {self.stage}, "
            f"{size(self.capacity)} to be had, {size(self.missing)} too much. It is tried all the same."
            + (f" What takes less: {better}." if better else "")
        )

    def disk_warning(self) -> str:
        """What to say of a disk that is too small; nothing of one that is not."""
        wanted = sum(self.disk.values())
        if self.disk_free is None or wanted <= self.disk_free or not self.stages:
            return ""
        return (
            f"The disk may be too small: {size(wanted)} are written, {size(self.disk_free)} are free. Lower "
            "training.save_total_limit, or give another output_dir."
        )

    def check(self) -> None:
        """Raises OutOfResources, with what to change, where the run misses by more than MARGIN."""
        if self.peak <= (1 + MARGIN) * self.capacity:
            return
        raise OutOfResources(
            f"The run does not fit into the memory of {self.device}, by {size(self.missing)} "
            f"({self.missing / self.capacity:.0%} of it).",
            found=f"{size(self.peak)} while {self.stage}, {size(self.capacity)} to be had",
            fix="; or ".join(remedy.sentence() for remedy in self.remedies) or "Use a smaller model.",
        )


def unknown(facts: DeviceFacts, error: Exception) -> Estimate:
    """What is left to say of a model whose step could not be traced, and where it ended: be it the model or we."""
    why = next(iter(str(error).splitlines()), "")[:160]
    places = traceback.extract_tb(error.__traceback__)
    at = f", {Path(places[-1].filename).name} line {places[-1].lineno}" if places else ""
    told = f"the model's step could not be traced ({type(error).__name__}: {why}{at})"
    return Estimate(
        device=facts.name, capacity=facts.memory, stages={}, seconds_per_step=0.0, seconds=0.0, validation_seconds=0.0,
        saving_seconds=0.0, basis="",
        tokens_per_epoch=0, epochs=0.0, flops_per_step=0.0, disk={}, disk_free=0, micro_batch=0,
        notes=(f"memory and time were not worked out: {told}; the run itself does not need it, a report of it helps",),
    )  # fmt: skip


def paced(planned: Mapping[str, Any] | None, per_step: float, seconds: float) -> dict[str, Any]:
    """What the first steps of a run say of all of it, as plan.json keeps it: `per_step` seconds a step, `seconds` for
    all of them. Validations, of which none was yet, are as much longer than planned as the steps are; what is saved
    takes what was planned."""
    if not planned or not planned["stages"]:
        return {}
    slower = per_step / max(planned["seconds_per_step"], 1e-12)
    seconds += planned["validation_seconds"] * slower + planned["saving_seconds"]
    before = duration(planned["seconds"])
    why = f"two measured steps, {duration(per_step)} for a mean one; {before} were estimated before"
    return {"seconds_per_step": per_step, "seconds": seconds, "basis": why}


def truth(
    planned: Mapping[str, Any] | None,
    fitted: Fit,
    *,
    is_whole: bool,
    measured: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What training came to beside what was planned; nothing where nothing was. Seconds are held against those that the
    run's first steps told (`paced`), where they did. A continued training's are only those since it was continued, so
    that they are left out."""
    if not planned or not planned["stages"]:
        return {}
    stages = planned["stages"]
    if not any("process" in parts for parts in stages.values()):
        # A GPU's peak is the training's alone (`fit.forget_peak`), and torch does not count what the driver takes.
        stages = {
            name: {**parts, "reserved": 0} for name, parts in stages.items() if name not in MEASURING
        } or stages
    expected = most_of(stages)
    memory = expected / max(fitted.peak_memory, 1) - 1
    found: dict[str, Any] = {"peak_memory": fitted.peak_memory, "memory_error": round(memory, 4)}
    said = f"memory {size(expected)} planned, {size(fitted.peak_memory)} held at most"
    value = f"memory {memory:+.1%}"
    if is_whole:
        before = planned["seconds"]
        told = measured["seconds"] if measured else before
        seconds = told / max(fitted.seconds, 1e-9) - 1
        found |= {"seconds": fitted.seconds, "time_error": round(seconds, 4)}
        found["time_error_before_the_run"] = round(before / max(fitted.seconds, 1e-9) - 1, 4)
        said += f"; training {duration(told)} planned, {duration(fitted.seconds)} taken"
        value += f", time {seconds:+.0%}"
    return {**found, "value": value, "sentence": said}


def estimate(
    recipe: Recipe,
    build: Build,
    rows: Rows,
    *,
    facts: DeviceFacts,
    plan: Plan,
    process: Callable[[], int],
    folder: Path | None,
    thorough: bool = False,
    measure: Measure | None = None,
    check: Callable[[Recipe], None] = lambda recipe: None,
) -> Estimate:
    """What the run takes on this device, written to `folder`; without one, on another machine.

    `thorough` also looks for the largest micro-batch; `measure` times micro-steps on rows of these numbers, here.
    Remedies are worked out where the run does not fit, of those that `check` does not refuse with a TunesmithError.
    """
    case = _Case(build, rows, facts, plan)
    met = case.met(recipe)
    traced = case.traced(recipe, met.fullest(rows.lengths, pads=False))
    if not traced.unpadded:
        case = replace(case, pads=True)
        met = case.met(recipe)
        traced = case.traced(recipe, met.fullest(rows.lengths, pads=True))
    answers, notes = measuring(recipe, rows, facts=facts, dtype=plan.dtype)
    case = replace(case, held=process())  # now that every library is loaded
    found = case.stages(recipe, traced, answers)
    if most_of(found) > facts.memory:
        measure = None
    elif measure and roofline(traced.costs, facts, plan.dtype) > MEASURED_SECONDS:
        measure = None
        notes.append(f"no micro-step was measured: one would take longer than {MEASURED_SECONDS:.0f} s")
    notes += [
        *_notes(case, recipe, traced),
        *several_notes(recipe, plan, facts, traced.weights),
        *traced.notes,
        *rows_notes(rows, recipe, compiled=measure is not None),
    ]
    took = _seconds(case, recipe, traced, met, measure)
    result = Estimate(
        device=facts.name,
        capacity=facts.memory,
        stages=found,
        seconds_per_step=took.step,
        seconds=took.first + plan.total_steps * took.step + took.validations + took.saving,
        validation_seconds=took.validations,
        saving_seconds=took.saving,
        basis=took.basis,
        tokens_per_epoch=plan.tokens_per_epoch,
        epochs=round(plan.total_steps / max(plan.steps_per_epoch, 1), 2),
        flops_per_step=took.flops,
        disk=_disk(recipe, traced, rows, plan),
        disk_free=_free(folder) if folder else None,
        micro_batch=recipe.training.per_device_train_batch_size,
        longest=traced.width,
        shared=took.shared,
    )
    if thorough:
        largest, said = _largest(case, recipe, traced, found, answers)
        notes += said
        result = replace(result, largest_batch=largest)
    result = replace(result, notes=tuple(notes))
    if result.missing:
        peak_of = cache(partial(_peak_with, case, recipe, result, check))
        fixed = case.held if facts.kind == "cpu" else facts.reserved
        changes = list(possible_changes(recipe, result.longest, plan.processes, facts.kind))
        result = replace(result, remedies=tuple(ways_to_fit(result, changes, peak_of, fixed)))
    return result


@dataclass(frozen=True)
class _Case:
    """What is asked of a recipe and of those that differ a little from it."""

    build: Build
    rows: Rows
    facts: DeviceFacts
    plan: Plan
    pads: bool = False
    """Whether batches are padded, as the trace of one tells."""
    held: int = 0
    """Bytes of the process, with every library."""

    def types(self, recipe: Recipe) -> tuple[str, str]:
        """Of the weights and of mixed precision."""
        asked = recipe.training.mixed_precision
        held, _ = weights_dtype(recipe.model.dtype, recipe.adapter.kind, self.facts.kind, asked)
        return held, computed_in(asked, self.facts.kind)

    def lowers(self, recipe: Recipe) -> bool:
        """Whether weights of float32 are sent in bfloat16."""
        return self.types(recipe) == ("float32", "bf16")

    def traced(
        self, recipe: Recipe, batch: Sequence[int], cut: float = 1.0, validates: bool = True
    ) -> Traced:
        """A step on the rows of these numbers."""
        asked = Asked(self.facts.kind, *self.types(recipe), tuple(batch), cut, validates)
        return trace(recipe, self.build, self.rows, asked)

    def met(self, recipe: Recipe) -> Batches:
        """The batches of a run of the recipe."""
        return batches(self.rows, recipe.training, self.plan.total_steps, pads=self.pads)

    def fullest(self, recipe: Recipe) -> Sequence[int]:
        """Numbers of the rows of the fullest of them."""
        return self.met(recipe).fullest(self.rows.lengths, pads=self.pads)

    def kept(self, recipe: Recipe, traced: Traced) -> int:
        """Bytes of frozen layers' outputs."""
        return kept_outputs(
            recipe, self.rows, traced.shape.width, facts=self.facts, dtype=self.types(recipe)[0],
            steps=self.plan.total_steps, used=self.held + traced.weights,
        )  # fmt: skip

    def stages(self, recipe: Recipe, traced: Traced, answers: Mapping[str, Parts]) -> dict[str, Parts]:
        """Bytes by part in each stage."""
        return stages(
            traced, recipe, self.facts, process=self.held, evaluation=answers,
            writing=drawing(recipe, self.rows, facts=self.facts, dtype=self.types(recipe)[0]),
            outputs=self.kept(recipe, traced),
            processes=self.plan.processes, per_node=self.plan.per_node, lower=self.lowers(recipe),
        )  # fmt: skip


def _notes(case: _Case, recipe: Recipe, traced: Traced) -> list[str]:
    """What the figures leave out, or take for granted, of this device."""
    facts, notes = case.facts, []
    if facts.kind != "cpu" and (kept := case.kept(recipe, traced)):
        notes.append(
            f"training.cache_frozen keeps {size(kept)} of outputs in the memory of the machine, not of the device"
        )
    if facts.kind == "cpu" and None in traced.replayed.values():
        notes.append(
            f"the allocator could not be asked what it holds beyond what is alive: {SPREAD['cpu']:.0%} are taken"
        )
    if facts.kind == "mps":
        notes.append(
            "attention is figured as the kernel of a CUDA device, which keeps no scores: whether that of MPS does was "
            "not measured, and with long rows it may take more"
        )
    if facts.assumed:
        notes.append(f"how fast {facts.name} is, is not known: {facts.assumed}, until steps are measured")
    return notes


@dataclass(frozen=True)
class _Seconds:
    """Of a run: before its first step, of a step, of all validations and of all that is saved."""

    first: float
    step: float
    validations: float
    saving: float
    basis: str
    flops: float
    """Of a step."""
    shared: Shared | None


def _seconds(case: _Case, recipe: Recipe, traced: Traced, met: Batches, measure: Measure | None) -> _Seconds:
    from tunesmith.training.steps import SOON

    rows, facts, plan, several = case.rows, case.facts, case.plan, case.plan.processes
    batch = met.fullest(rows.lengths, pads=case.pads)
    share = met.share(rows, batch, pads=case.pads)
    if rows.answers and measure:
        pace = pace_of_drawing(traced, measure)
    else:
        pace = pace_of_batches(traced, rows, batch, share, facts, plan.dtype, plan.mixed_precision, measure)
    seconds = pace.seconds
    fullest = met.place_of_fullest(rows.lengths, pads=case.pads)
    # Before the first step, by a run alone.
    is_tried = fullest // recipe.training.gradient_accumulation_steps >= SOON
    tried = seconds / share if is_tried and several == 1 and not rows.answers else 0.0
    passes = len(met.starts) / met.steps  # an epoch's last step may have fewer
    # Several operations in the place of one kernel read and write about twice as much.
    moved = scaling.MOMENTS / 4 * traced.trained * (1 if "fused" in recipe.training.optimizer else 2)
    update = moved / (facts.bandwidth * facts.bandwidth_share)
    shared = None
    # Where processes share cores and memory nothing is gained.
    slower = plan.per_node if facts.kind == "cpu" else 1
    if several > 1:
        passes /= several
        seconds *= slower
        update *= slower
        whole, shared = _shared(
            traced, recipe, rows, met, facts, plan, lower=case.lowers(recipe), passes=passes,
            seconds=seconds, tokens=share * sum(rows.lengths[n] for n in batch), update=update,
        )  # fmt: skip
        update = whole - passes * seconds
    per_token = pace.token or roofline_of_writing(traced.writing_costs, facts, plan.dtype)
    if rows.answers and measure:
        per_step = seconds
    else:
        writing = rows.answers * per_token / getattr(recipe.method, "num_iterations", 1)
        per_step = passes * (seconds + writing) + update
    validations = math.ceil(plan.total_steps / plan.eval_steps) if plan.eval_steps and rows.validation else 0
    scale = 1.0 if rows.answers else seconds / max(share * roofline(traced.costs, facts, plan.dtype), 1e-12)
    validation = pass_over(traced, rows, recipe, facts, plan.dtype) * scale / several
    if recipe.evaluation.samples and not rows.answers:
        validation += min(SAMPLE_TOKENS, recipe.evaluation.max_new_tokens) * per_token
    model = traced.saved + traced.beside
    written = math.ceil(plan.total_steps / plan.save_steps) * (model + traced.states)
    if recipe.training.load_best_model_at_end:
        written += (validations + 1) * model
    return _Seconds(
        pace.first + tried, per_step, validations * validation, written / WRITTEN, pace.basis,
        passes * traced.flops * share, shared,
    )  # fmt: skip


def _largest(
    case: _Case, recipe: Recipe, traced: Traced, found: Mapping[str, Parts], answers: Mapping[str, Parts]
) -> tuple[int, list[str]]:
    """Rows in the largest micro-batch that fits, and what is to be said of it."""
    rows = case.rows
    first, times = recipe.training.per_device_train_batch_size, recipe.training.gradient_accumulation_steps
    # Prompts are learned from in whole groups of answers, and a step needs as many as it has groups.
    group = rows.group if rows.answers else 1
    there = max(len(rows.lengths) // (times if rows.answers else 1), 1)
    traceable = max(MOST_TRACED[case.facts.kind] // max(traced.shape.layers, 1), first, 2)

    @cache
    def peak_of(count: int) -> float:
        if count <= traceable:
            training = recipe.training.model_copy(update={"per_device_train_batch_size": count})
            changed = recipe.model_copy(update={"training": training})
            again = case.traced(changed, case.fullest(changed), validates=False)
            return most_of({**found, **case.stages(changed, again, answers)})
        half, whole = peak_of(traceable // 2), peak_of(traceable)
        return whole + (count - traceable) * (whole - half) / (traceable - traceable // 2)

    room = case.facts.memory
    largest = group * most_rows(lambda count: peak_of(group * count), room, max(first // group, 1), there)
    if not largest and group > 1:
        largest = most_rows(peak_of, room, group // 2, group - 1)
    if first % group and most_of(found) <= room:
        largest = max(largest, first)
    if largest == group * there:
        return largest, [
            "the largest micro-batch has all rows that there are for a step: more memory is not needed"
        ]
    if largest > traceable:
        more = (
            f"what more than {traceable:,} rows take is a straight line's from {traceable // 2:,} and those"
        )
        return largest, [f"the largest micro-batch was not traced: {more}"]
    return largest, []


def _peak_with(
    case: _Case,
    recipe: Recipe,
    found: Estimate,
    check: Callable[[Recipe], None],
    *changes: Change,
) -> int:
    """Bytes at the peak of the recipe with these changes."""
    changed = with_changes(recipe, changes)
    try:
        check(changed)
    except TunesmithError:
        return REFUSED
    cut = min(changed.data.max_length / found.longest, 1.0)
    traced = case.traced(changed, case.fullest(changed), cut, validates=found.stage == "validating")
    answers, _ = measuring(changed, case.rows, facts=case.facts, dtype=case.types(changed)[0])
    return most_of(case.stages(changed, traced, answers))


def _shared(
    traced: Traced, recipe: Recipe, rows: Rows, batches: Batches, facts: DeviceFacts, plan: Plan, *, lower: bool,
    passes: float, seconds: float, tokens: float, update: float,
) -> tuple[float, Shared]:  # fmt: skip
    """Seconds of a step in several processes, from those of a pass of so many tokens and of an update in one, and what
    of it they cost one another."""
    shape, trained = traced.shape, traced.shape.trained
    frozen = max(shape.parameters - trained, 0)
    whole = traced.layer * shape.layers + traced.rest  # weights that can be cut, or are sent at all
    each = gradient = traced.trained / max(trained, 1)
    if isinstance(recipe.parallel, FSDP) and plan.mixed_precision == "bf16":
        gradient = 2 if recipe.parallel.reduce_dtype == "bfloat16" else 4
    network = scaling.Network(
        shape.parameters,
        shape.layers,
        shape.width,
        trained=None if not frozen else trained,
        again=recipe.training.gradient_checkpointing,
        frozen_bytes=max(whole - traced.trained, 0) / max(frozen, 1) * (parallel.HALF if lower else 1.0),
        gathered_bytes=2 if lower else each,
        gradient_bytes=gradient,
    )
    inside, between = scaling.CONNECTED.get(facts.name, scaling.PLAIN)
    several = plan.processes > plan.per_node
    cluster = scaling.Cluster(
        plan.processes,
        plan.per_node,
        scaling.LINKS[inside],
        scaling.LINKS[between] if several else None,
    )
    own = recipe.training.per_device_train_batch_size
    lengths, times = [length + rows.answers for length in rows.lengths], max(round(passes), 1)

    def fullest(count: int) -> float:
        """Of a process that takes so many batches, over the mean; of rows in any order in coarser steps of length the
        more they are."""
        if batches.are_alike and (
            found := batches.unevenness(rows.lengths, count, plan.processes, pads=not traced.unpadded)
        ):
            return found
        drawn = own * count
        return scaling.fullest(lengths, drawn, plan.processes, bins=max(min(2048, 2**19 // drawn), 32))

    load = scaling.Load(
        tokens * passes / times,
        tokens / own,
        times,
        fullest=fullest(1),
        fullest_step=fullest(times),
    )
    mode = parallel.mode(recipe.parallel, plan.zero_stage)
    alone = times * load.tokens / (passes * seconds + update)
    found = scaling.step(mode, network, cluster, load, facts, alone=alone, update=update)
    over = inside + (f" in a node and {between} between nodes" * several) + " (assumed)"
    return found.seconds, Shared(plan.processes, mode, over, int(found.sent), found.speaking, found.waiting)


FLOATS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""What `tunesmith export --quant` calls types."""


def _is_converted(recipe: Recipe, dtype: str) -> bool:
    """Whether weights are held in another type than that of the base's files, from which they are mapped otherwise."""
    from tunesmith import models

    said = models.configuration(recipe.model.base, recipe.model.revision).dtype
    return not isinstance(recipe.adapter, QLoRA) and str(said).removeprefix("torch.") != dtype


def several_notes(recipe: Recipe, plan: Plan, facts: DeviceFacts, weights: int) -> list[str]:
    """What the figures of one of several processes leave out; `weights` are the bytes of the whole model's."""
    if plan.processes == 1:
        return []
    found = [
        f"memory is that of one of {plan.processes} processes, without the buffers of their connections"
        + (f"; {plan.per_node} of them share a machine's cores and memory" * (facts.kind == "cpu"))
    ]
    if not recipe.evaluation.skip and recipe.evaluation.engine not in ("ray", "vllm", "openai"):
        dealt = (
            "with evaluation.skip, `tunesmith evaluate RUN --set evaluation.engine=ray` deals the questions to "
            "workers when the run is done"
            if isinstance(recipe.launch, Ray)
            else "evaluation.engine ray deals the questions to workers"
        )
        found.append(
            "base and tuned model answer the held-out questions in the first process alone, whole, while the "
            f"others wait; {dealt}"
        )
    if moved_by := parallel.offloads(recipe.parallel, facts.kind):
        found.append(
            f"{' and '.join(moved_by)}: what goes between a device and the machine's memory, and the update there, "
            "are not in the seconds"
        )
    if recipe.parallel.kind != "ddp" and facts.kind != "cpu" and _is_converted(recipe, plan.dtype):
        found.append(
            f"each process makes {plan.dtype} of all weights in its machine's memory at first: "
            f"{size(plan.per_node * weights)} a machine; of a base with files in {plan.dtype} (`tunesmith export "
            f"BASE --to safetensors --quant {FLOATS[plan.dtype]}`) they are mapped, which takes none of it"
        )
    return found


def rows_notes(rows: Rows, recipe: Recipe, *, compiled: bool = False) -> list[str]:
    """What the figures leave out; `compiled` says that micro-steps were measured as the recipe has them compiled."""
    found = []
    if rows.answers:
        found.append(
            f"{recipe.method.kind} trains on what the model writes: memory is that of writing, and of learning from, "
            f"{rows.answers} new tokens a row, without the rewards' models and a critic"
        )
    if isinstance(recipe.adapter, LoRA) and recipe.adapter.dora:
        found.append("DoRA is figured as LoRA: the norms of its weights take more memory and time")
    if recipe.training.compile and not recipe.training.compiles:
        found.append(
            "training.compile is left out: it goes with the fast forward alone, and not with "
            "gradient_checkpointing"
        )
    elif recipe.training.compiles and (rows.answers or not compiled):
        found.append(
            "training.compile: compiling takes half a minute to a minute of the first step, which these seconds leave "
            "out; what a run tells after its third step has it"
        )
    if getattr(recipe.method, "reference", "") == "precomputed":
        found.append("the reference's pass over all rows before the first step is not in the seconds")
    return found


WRITTEN = 400e6
"""Bytes a second that are hashed, written and flushed; about what one thread and a laptop's disk do."""


LEDGER, EVENT, ANSWER = 130, 250, 900
"""Bytes of a line in a run's ledger, of one in its events, and of one that holds an answer, about and without the
answer itself."""


def _disk(recipe: Recipe, traced: Traced, rows: Rows, plan: Plan) -> dict[str, int]:
    """Bytes that the run's folder comes to hold."""
    saves = math.ceil(plan.total_steps / max(plan.save_steps, 1))
    # One more is there while the oldest is still to be deleted.
    kept = min(recipe.training.save_total_limit + 1, saves)
    model = traced.saved + traced.beside
    found = {"checkpoints": kept * (model + traced.states), "final_model": model}
    if recipe.training.load_best_model_at_end:
        found["best_model"] = model
    answers = 2 * questions_asked(recipe, rows) * (ANSWER + 4 * recipe.evaluation.max_new_tokens)
    ledger = LEDGER * (len(rows.lengths) + len(rows.validation) + rows.questions)
    found["records"] = _page() + ledger + answers + EVENT * plan.total_steps // plan.logging_steps
    return found


def _page() -> int:
    """Bytes of the library of plots, which every report holds, so that it opens offline."""
    spec = importlib.util.find_spec("plotly")
    places = (spec and spec.submodule_search_locations) or ()
    files = (Path(place, "package_data/plotly.min.js") for place in places)
    return sum(file.stat().st_size for file in files if file.is_file())


def _free(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
