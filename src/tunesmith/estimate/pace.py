"""Seconds of a step: of operations against what a device can do, or measured in micro-steps."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.devices import DeviceFacts
from tunesmith.estimate.micro_batches import Rows
from tunesmith.estimate.step import Costs, Traced, labels_of, rows_by_number
from tunesmith.recipe import Recipe


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def roofline(costs: Costs, facts: DeviceFacts, dtype: str) -> float:
    """Seconds of operations, each bound by arithmetic, by memory or by its start."""
    peak = facts.peak(dtype) * facts.product_share
    bandwidth = facts.bandwidth * facts.bandwidth_share
    return sum(max(flops / peak, moved / bandwidth, facts.launch) for flops, moved in costs)


MEASURED_SECONDS = 20.0
"""Longest micro-step that a plan takes to measure."""


@dataclass(frozen=True)
class Measured:
    """What was measured here before a run."""

    steps: Sequence[float]
    """Seconds of micro-steps, or of whole steps that begin with answers which the model writes."""
    token: float = 0.0
    """Seconds of one more token in each sample answer; 0 where there is none."""


Measure = Callable[[Sequence[Sequence[int]]], Measured]


TURNS, ENOUGH = 5, 3.0
"""How often micro-steps are timed at most, and the seconds after which no further turn begins."""


def timed(trainer: Any, batches: Sequence[Sequence[int]], *, compiles: bool = False) -> list[float]:
    """Seconds of the trainer's micro-step on rows of these numbers.

    The first one is run once, as the first steps of a process are slow; the others in several turns where they are
    quick, since single steps vary by a fifth, and their medians count. Where layers are compiled, what that takes is in
    the first one's seconds, for validations too, as it is in a run that comes after: torch keeps what it has compiled.
    """
    import torch

    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)

    def taken(work: Callable[[dict[str, Any]], Any], batch: Sequence[int]) -> float:
        inputs = trainer.data_collator(rows_by_number(trainer.train_dataset, batch))
        started = time.perf_counter()
        with trainer.accelerator.autocast():  # which a prepared model would bring along
            work(inputs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def step(batch: Sequence[int]) -> float:
        found = taken(
            lambda i: trainer.training_step(trainer.model, i, num_items_in_batch=labels_of(i)), batch
        )
        trainer.model.zero_grad(set_to_none=True)
        return found

    def look(batch: Sequence[int]) -> float:
        trainer._loss_sum, trainer._num_labels = 0.0, 0  # as an evaluation begins
        trainer.model.eval()
        return taken(lambda i: trainer.prediction_step(trainer.model, i, prediction_loss_only=True), batch)

    first, *others = batches
    looks = compiles and trainer.eval_dataset is not None
    if compiles:
        step(first)
        if looks:
            look(first)
        torch.compiler.reset()
    began = step(first)
    if looks:
        compiling = look(first)
        began += compiling - look(first)
    turns: list[list[float]] = []
    while not turns or (len(turns) < TURNS and sum(map(sum, turns)) < ENOUGH):
        turns.append([step(batch) for batch in others])
    return [began, *map(statistics.median, zip(*turns, strict=True))]


def timed_steps(trainer: Any) -> list[float]:
    """Seconds of the second and each further step of a trainer of a few steps: the first of a process is slow."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Ends(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *given: Any, **named: Any) -> None:
            ends.append(time.perf_counter())

    trainer.add_callback(Ends())
    trainer.train()
    return [after - before for before, after in itertools.pairwise(ends)]


def timed_token(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, few: int = 8) -> float:
    """Seconds of one more token in the answers to these prompts, which are written together."""
    from tunesmith.generation import generate

    def taken(count: int) -> float:
        started = time.perf_counter()
        generate(model, tokenizer, prompts, max_new_tokens=count, stop_ids=())
        return time.perf_counter() - started

    taken(1)  # the first pass of a process is slow
    return max(taken(1 + few) - taken(1), 0.0) / few


@dataclass(frozen=True)
class Pace:
    """What the seconds of a run are made of."""

    seconds: float
    """Of the mean micro-step, or of a whole step that begins with answers which the model writes."""
    basis: str
    """What they rest on."""
    first: float = 0.0
    """By which the first one is longer."""
    token: float = 0.0
    """Of one more token in each sample answer; 0 where that was not measured."""


def pace_of_batches(
    traced: Traced, rows: Rows, batch: Sequence[int], part: float, facts: DeviceFacts, dtype: str, precision: str,
    measure: Measure | None,
) -> Pace:  # fmt: skip
    """That of micro-steps of which the mean one is `part` of that which was traced."""
    compute = {"fp16": "float16", "bf16": "bfloat16"}.get(precision, dtype)
    counted_seconds = roofline(traced.costs, facts, compute) * part
    share = f"{traced.flops / 1e9:,.1f} GFLOP in the longest micro-step"
    if measure is None:
        rates = f"{facts.peak(compute) * facts.product_share / 1e12:.3g} TFLOP/s in {compute}"
        basis = f"an estimate: {share}, at {rates} and {facts.bandwidth / 1e9:,.0f} GB/s"
        return Pace(counted_seconds, basis)
    by_length = sorted(range(len(rows.lengths)), key=lambda n: rows.lengths[n])
    middle = max(len(by_length) // 2 - len(batch) // 2, 0)
    typical = sorted(by_length[middle : middle + len(batch)])
    found = measure([typical, batch, typical])
    first_seconds, long_seconds, typical_seconds = found.steps
    lengths = rows.lengths
    together = sum if traced.unpadded else max
    high, low = together(lengths[n] for n in batch), together(lengths[n] for n in typical)
    mean = part * high
    if high > 1.1 * low:
        slope = (long_seconds - typical_seconds) / (high - low)
        seconds = max(typical_seconds + slope * (mean - low), 0.3 * typical_seconds)
    else:
        seconds = (long_seconds + typical_seconds) / 2 * mean / high
    basis = f"two measured micro-steps ({duration(long_seconds)} and {duration(typical_seconds)}); {share}"
    return Pace(seconds, basis, first=max(first_seconds - typical_seconds, 0.0), token=found.token)


def pace_of_drawing(traced: Traced, measure: Measure) -> Pace:
    """That of whole steps whose answers are written first."""
    found = measure([]).steps
    told = " and ".join(map(duration, found))
    return Pace(
        sum(found) / len(found),
        f"{len(found)} measured steps ({told}), the answers of which the model wrote; "
        f"{traced.flops / 1e9:,.1f} GFLOP in a micro-step beside the writing",
    )


BY_PYTHON = 3e-5
"""Seconds from one operation to the next while a model writes, which keeps no device busy: 8 to 10 ms a token were
measured with 4 layers on a CPU, and as much a layer is known of GPUs."""


def roofline_of_writing(costs: Costs, facts: DeviceFacts, dtype: str) -> float:
    """Seconds of a new token in each row."""
    return roofline(costs, replace(facts, launch=max(BY_PYTHON, facts.launch)), dtype)


def pass_over(traced: Traced, rows: Rows, recipe: Recipe, facts: DeviceFacts, dtype: str) -> float:
    """Seconds of one validation."""
    if not traced.validation_costs:
        return 0.0
    rows_in_batch = min(recipe.training.per_device_eval_batch_size, len(rows.validation))
    longest = max(rows.validation)
    mean = sum(rows.validation) / len(rows.validation)
    batches = math.ceil(len(rows.validation) / rows_in_batch)
    return batches * roofline(traced.validation_costs, facts, dtype) * (0.5 + 0.5 * mean / longest)
