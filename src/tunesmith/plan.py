"""What a run will do, worked out before it starts: device, precision, steps, each with its reason.

The recipe says what the user wants; the plan says what that comes to on this machine and these examples.
It is saved as plan.json and printed before step 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.devices import DeviceFacts
from tunesmith.errors import DataError, OutOfResources, counted
from tunesmith.recipe import Model, Training
from tunesmith.training import gpu

if TYPE_CHECKING:
    from tunesmith.estimate import Estimate

Device = Literal["cpu", "cuda", "mps"]


@dataclass(frozen=True)
class Decision:
    """One value that was worked out, and why it is what it is."""

    name: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Plan:
    """The resolved run."""

    device: Device
    dtype: str
    mixed_precision: str
    examples: int
    batch_rows: int
    """Rows that batches are made of: the examples, or what they are packed into."""
    tokens_per_epoch: int
    batch_size: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    eval_steps: int | None
    save_steps: int
    logging_steps: int
    decisions: tuple[Decision, ...]
    estimate: Estimate | None = None
    """What the run takes, where that was worked out."""
    processes: int = 1
    """Processes that share the rows of every step."""
    per_node: int = 1
    """How many of them are on one machine."""
    zero_stage: int | None = None
    """What DeepSpeed spreads over them, where it does."""

    def as_dict(self) -> dict[str, Any]:
        """The plan as plan.json keeps it."""
        return {**asdict(self), "estimate": self.estimate.as_dict() if self.estimate else None}


@dataclass(frozen=True)
class HeldOut:
    """How much there is to measure on."""

    items: int
    groups: int
    """Independent groups; as many as items where these stand alone."""
    share: float
    max_items: int | None
    confidence: float = 0.95

    def findable(self) -> Decision | None:
        """The smallest difference that so many examples could show; None where no comparison is possible."""
        from tunesmith.evaluation.power import expected

        items = min(self.items, self.max_items or self.items)
        could = expected(items, min(self.groups, items), confidence=self.confidence)
        return Decision("smallest difference", could.value, could.reason) if could else None

    def too_few(self) -> str | None:
        """Why no comparison on so few examples can have a verdict, and what to do; None where one can."""
        from tunesmith.evaluation.compare import MIN_GROUPS, MIN_ITEMS

        asked = min(self.items, self.max_items or self.items)
        mend = f"give more rows or raise data.held_out, now {self.share:g}"
        if asked < MIN_ITEMS:
            if asked < self.items:
                mend = f"raise evaluation.max_items, now {self.max_items}"
            return f"{asked} held-out items are too few to compare, at least {MIN_ITEMS} are needed: {mend}"
        if self.groups < min(self.items, MIN_GROUPS):
            return f"{self.groups} held-out groups are too few to compare, at least {MIN_GROUPS} are needed: {mend}"
        return None


def device() -> Device:
    """The best device there is."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve(
    training: Training,
    model: Model,
    *,
    adapter_kind: str,
    lengths: Sequence[int],
    num_validation: int,
    num_examples: int | None = None,
    unit: str = "examples",
    held_out: HeldOut | None = None,
    notes: Sequence[str] = (),
    settled: Sequence[Decision] = (),
    elsewhere: DeviceFacts | None = None,
    processes: int = 1,
) -> Plan:
    """The plan for training on rows of these token lengths: examples, or what `num_examples` are packed or unrolled
    into, which `unit` names. `settled` is what the method decided. `elsewhere` is a device that
    is not this machine's.

    Steps follow transformers' Trainer: an epoch is ceil(batches / accumulation) optimizer steps; warm-up,
    evaluation and saving count optimizer steps. Raises DataError without examples and OutOfResources
    where the adapter, the optimizer or the precision needs a device that is not there, and MissingExtra.
    """
    if not lengths:
        raise DataError("There is no example to train on.", fix="See the ledger for what became of the rows.")
    where = elsewhere.kind if elsewhere else device()
    why = f"that of {elsewhere.name}" if elsewhere else "the best device found"
    decisions = [Decision("device", where, why)]
    decisions += check_device(training, model, where, adapter_kind=adapter_kind, elsewhere=elsewhere)
    decisions += [Decision("data", note, "reading the data") for note in notes]
    precision = computed_in(training.mixed_precision, where)
    if precision != training.mixed_precision:
        decisions.append(
            Decision(
                "mixed_precision",
                precision,
                f"{training.mixed_precision} was asked for, but gains nothing on a CPU: float32",
            )
        )
    dtype, why = weights_dtype(model.dtype, adapter_kind, where, training.mixed_precision)
    decisions.append(Decision("dtype", dtype, why))
    decisions += settled

    batch_size = training.per_device_train_batch_size * training.gradient_accumulation_steps
    batches = math.ceil(len(lengths) / training.per_device_train_batch_size)
    per_epoch = max(math.ceil(batches / training.gradient_accumulation_steps), 1)
    total = math.ceil(per_epoch * training.num_epochs)
    per_step = counted(batch_size, unit.removesuffix("s"))
    epochs = "1 epoch" if training.num_epochs == 1 else f"{training.num_epochs:g} epochs"
    why = f"{epochs} of {counted(per_epoch, 'step')} of {per_step}"
    if training.max_steps and training.max_steps < total:
        total, why = training.max_steps, f"max_steps, below {why}"
    elif training.max_steps and training.max_steps > total:
        rounds, rest = divmod(training.max_steps, per_epoch)
        passes = " and ".join(
            counted(number, word) for number, word in ((rounds, "epoch"), (rest, "step")) if number
        )
        total, why = training.max_steps, f"max_steps, {passes} in the place of {why}"
    decisions.append(Decision("total_steps", total, why))
    if processes > 1:
        own = dealt(training, processes)
        rows, times = own.per_device_train_batch_size, own.gradient_accumulation_steps
        tokens = sum(lengths) / len(lengths) * batch_size
        why = (
            f"each takes {times} × {counted(rows, unit.removesuffix('s'))} of a step's {batch_size}, which are "
            f"those of one process; {tokens:,.0f} tokens a step, {tokens / processes:,.0f} in each"
        )
        decisions.append(Decision("processes", processes, why))

    warmup = training.warmup_steps
    if training.scheduler == "constant" and warmup:
        decisions.append(
            Decision("warmup_steps", 0, "the constant schedule has no warm-up; constant_with_warmup has")
        )
        warmup = 0
    elif warmup > total // 2:
        warmup = total // 10
        decisions.append(
            Decision(
                "warmup_steps",
                warmup,
                f"{training.warmup_steps} would be more than half of {total} steps, so a tenth is used",
            )
        )
    eval_steps = per_epoch if training.eval_steps == "epoch" else training.eval_steps
    save_steps = per_epoch if training.save_steps == "epoch" else training.save_steps
    for name, steps in (("eval_steps", eval_steps if num_validation else 0), ("save_steps", save_steps)):
        if steps > total:
            decisions.append(
                Decision(name, total, f"{steps} would be more than all {total} steps, so once, at the end")
            )
    if not num_validation:
        decisions.append(
            Decision("eval_steps", "never", "no validation examples: the last step's model is final")
        )
    if held_out and (too_few := held_out.too_few()):
        decisions.append(Decision("verdict", "none possible", too_few))
    elif held_out and (findable := held_out.findable()):
        decisions.append(findable)
    return Plan(
        device=where,
        dtype=dtype,
        mixed_precision=precision,
        examples=len(lengths) if num_examples is None else num_examples,
        batch_rows=len(lengths),
        tokens_per_epoch=sum(lengths),
        batch_size=batch_size,
        steps_per_epoch=per_epoch,
        total_steps=total,
        warmup_steps=warmup,
        eval_steps=min(eval_steps, total) if num_validation else None,
        save_steps=min(save_steps, total),
        logging_steps=min(training.logging_steps, total),
        decisions=tuple(decisions),
        processes=processes,
    )


USUAL_RATES = (2e-5, 2e-4)
"""Peak learning rates of whole weights and of adapters, for methods that name none of their own."""
FAR_OFF = 100
"""How many times the usual rate, or what part of it, is far enough off to be said."""


def rate_remark(
    rate: float, *, method: str, own: tuple[float, float] | None, adapter_kind: str
) -> Decision | None:
    """What to say of a learning rate that is far from what a method is usually given; None of one that is not."""
    is_adapter = adapter_kind in ("lora", "qlora")
    usual = (own or USUAL_RATES)[is_adapter]
    if usual / FAR_OFF <= rate <= usual * FAR_OFF:
        return None
    of = f"the usual {usual:g} of {method} with {'adapters' if is_adapter else 'whole weights'}"
    said = (
        f"{rate / usual:,.0f} times {of}: the loss may well grow without end"
        if rate > usual
        else f"{usual / rate:,.0f} times below {of}: the model may well learn nothing"
    )
    return Decision("learning_rate", f"{rate:g}", f"{said}; `tunesmith find-lr` measures which one fits")


def dealt(training: Training, processes: int) -> Training:
    """What each of several processes takes of a step, so that the step stays that of one process: as many rows at once
    as the recipe allows, and as often as it takes. The rows have to be dealt evenly (`launch.check`)."""
    if processes == 1:
        return training
    most = training.per_device_train_batch_size
    rows = most * training.gradient_accumulation_steps // processes
    batch = next(size for size in range(min(most, rows), 0, -1) if rows % size == 0)
    changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": rows // batch}
    return training.model_copy(update=changes)


def check_device(
    training: Training, model: Model, where: Device, *, adapter_kind: str, elsewhere: DeviceFacts | None
) -> list[Decision]:
    """What a recipe comes to on a device. Raises OutOfResources and MissingExtra for what is not to be had there."""
    found = [Decision(*told) for told in gpu.checked(training, model, where, elsewhere=elsewhere)]
    return found + (_four_bits(where, here=not elsewhere) if adapter_kind == "qlora" else [])


def _four_bits(where: Device, *, here: bool) -> list[Decision]:
    """What to know of 4-bit weights on a device. Raises OutOfResources where there are none, and MissingExtra."""
    from tunesmith.models import require_four_bits

    if where not in ("cuda", "cpu"):
        raise OutOfResources(
            "QLoRA needs a CUDA device, or a CPU and patience: there are no 4-bit weights elsewhere.",
            found=f"device '{where}'",
            fix="Use --lora.",
        )
    if here:
        require_four_bits()
    if where == "cuda":
        return []
    why = "a CPU unpacks the 4-bit weights in every step: less memory than --lora, and more time"
    return [Decision("quantization", "4 bits", why)]


def computed_in(precision: str, where: Device) -> str:
    """The mixed precision that a recipe's comes to on a device."""
    return "no" if where == "cpu" else precision


def weights_dtype(asked: str, adapter_kind: str, where: Device, precision: str) -> tuple[str, str]:
    """Type of the weights that are trained or frozen under an adapter, and why."""
    if asked != "auto":
        return asked, "as the recipe says"
    if where == "cpu":
        return "float32", "CPUs compute fastest and most exactly in float32"
    if adapter_kind == "qlora":
        return "bfloat16", "compute type of the quantized base"
    if adapter_kind == "lora" and precision != "no":
        return "bfloat16" if precision == "bf16" else "float16", "the frozen base needs no float32 copy"
    return "float32", "trained weights are kept in float32"


def inference_dtype(asked: str, where: Device) -> str:
    """Type of the weights when a model only answers."""
    return asked if asked != "auto" else "float32" if where == "cpu" else "bfloat16"
