"""What a run takes before it starts: memory by part, seconds, disk, the largest micro-batch, and what to change.

The method's own trainer is built on a hollow model (`tracing`) and takes one step on the longest batch, so that the
figures follow whatever the trainers come to do. Seconds come from the operations' FLOPs and bytes against what the
device can do, and on this machine from two measured micro-steps.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from tunesmith import devices, parallel, scaling
from tunesmith.devices import DeviceFacts
from tunesmith.errors import OutOfResources, TunesmithError, size
from tunesmith.heap import Block, most_held
from tunesmith.plan import Plan, computed_in, weights_dtype
from tunesmith.recipe import DDP, FSDP, PPO, PRINCIPAL, DeepSpeed, LoRA, Model, QLoRA, Ray, Recipe, Training
from tunesmith.training.run import SAMPLE_TOKENS

if TYPE_CHECKING:
    from tunesmith.training.fit import Fit

Parts = Mapping[str, int]
Build = Callable[[Recipe, Any, Path], Any]
"""The method's trainer on a model, with a folder for what it writes."""
Costs = tuple[tuple[float, float], ...]
"""Of each operation its FLOPs, and the bytes that it moves."""

STATES = {
    "adamw_torch": 8.0, "adamw_torch_fused": 8.0, "adafactor": 0.0, "sgd": 0.0, "paged_adamw_32bit": 8.0,
    "adamw_bnb_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256, "adamw_torch_8bit": 2 + 8 / 256,
    "adamw_torch_4bit": 1 + 8 / 128,
}  # fmt: skip
"""Bytes of optimizer state for each trained float32 weight: two means, in fewer bits with a scale in float32 for each
block of each. Adam's follow the weights' own type, the factors of Adafactor are a row and a column of each matrix."""
SMALL = 4096
"""Weights in a tensor below which both packages keep its states whole."""


def state_bytes(optimizer: str, model: Any) -> int:
    """Bytes of the optimizer's states of a model's trained weights.

    bitsandbytes keeps those of embeddings whole, as transformers asks of it; torchao those of tensors that are no
    multiple of a block.
    """
    import torch

    kept, theirs = STATES[optimizer], "bnb" in optimizer or "paged" in optimizer
    words = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    total = 0.0
    for p in {id(p): p for p in model.parameters() if p.requires_grad}.values():
        if kept in (0.0, 8.0):
            total += 2 * p.numel() * 4 if theirs else kept / 4 * p.nbytes
        elif p.numel() < SMALL or (id(p) in words if theirs else p.numel() % (256 if kept > 2 else 128)):
            total += 2 * (4 * p.numel() if theirs else p.nbytes)
        else:
            total += kept * p.numel()
    return int(total)


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
class Remedy:
    """A change to the recipe, and what the run would take then."""

    change: str
    flags: str
    peak: int
    fits: bool

    @property
    def value(self) -> str:
        """What the run would take then, for people."""
        return size(self.peak) + ("" if self.fits else ", still too much")

    def sentence(self) -> str:
        """For people."""
        return f"{self.change} ({self.flags}): {self.value}"


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
            why = f"rows of up to {self.longest} tokens; the recipe has {self.micro_batch}"
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
    """What is left to say of a model that could not be traced."""
    why = next(iter(str(error).splitlines()), "") or type(error).__name__
    return Estimate(
        device=facts.name, capacity=facts.memory, stages={}, seconds_per_step=0.0, seconds=0.0, validation_seconds=0.0,
        saving_seconds=0.0, basis="",
        tokens_per_epoch=0, epochs=0.0, flops_per_step=0.0, disk={}, disk_free=0, micro_batch=0,
        notes=(f"memory and time were not worked out: the model's step could not be traced ({why[:160]})",),
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
            name: {**parts, "reserved": 0} for name, parts in stages.items() if name != "answering"
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


def most_of(stages: Mapping[str, Parts]) -> int:
    """Bytes of the stage that takes the most."""
    return max((sum(parts.values()) for parts in stages.values()), default=0)


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass(frozen=True)
class Rows:
    """What batches are made of, and what is asked."""

    lengths: Sequence[int]
    validation: Sequence[int]
    questions: int = 0
    """Held-out questions, which are about as long as the rows."""
    answers: int = 0
    """Tokens of an answer, where a method trains on what the model writes."""
    group: int = 1
    """Answers to one prompt that are learned from together."""
    order: Sequence[int] | None = None
    """The one order in which every epoch has the rows; None where each has one of its own."""
    identity: str = ""
    """A hash of what the rows are; none where it is not known."""
    alike: int = 0
    """How many rows of like length come together, where they do; 0 for as many as a pass has."""
    any_order: bool = True
    """Whether rows that are chosen for their lengths may come together."""


@dataclass(frozen=True)
class Shape:
    """Of the model that is trained."""

    layers: int
    width: int
    parameters: int
    trained: int


@dataclass
class Traced:
    """What a trace gave, in bytes and operations."""

    weights: int
    trained: int
    """Bytes of the trained weights."""
    states: int
    """Bytes of the optimizer's states."""
    largest: int
    """Bytes of the largest trained matrix."""
    saved: int
    """Bytes of the weights that are saved as the model."""
    beside: int
    """Bytes of the tokenizer that is saved with them."""
    layer: int
    """Bytes of the weights of the largest layer that can be cut into shares."""
    rest: int
    """Bytes of those outside of the layers."""
    packed: int
    """Bytes of the weights that are packed in 4 bits, which cannot."""
    shape: Shape
    step: dict[str, int]
    costs: Costs
    flops: float
    width: int
    blocks: list[Block] = field(default_factory=list)
    """What came and went in the step."""
    replayed: dict[tuple[int, int, int], tuple[int, int] | None] = field(default_factory=dict)
    """What a process holds for them, by passes, states of the optimizer and what an update moves."""
    unpadded: bool = False
    """Whether the trainer leaves padding out."""
    validation: int = 0
    validation_costs: Costs = ()
    writing_costs: Costs = ()
    """Of one new token in each row of a batch of answers; none where nothing is written."""
    notes: list[str] = field(default_factory=list)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave every stream of random numbers as it was: trainers seed them when they are built."""
    import numpy as np
    import torch

    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


def hollow(recipe: Recipe, dtype: str) -> Any:
    """The recipe's model with its adapter, without weights; without dropout where the method trains without."""
    from tunesmith import models
    from tunesmith.methods import METHODS
    from tunesmith.tracing import packed_in_four_bits

    model = models.outline(
        recipe.model.base,
        revision=recipe.model.revision,
        head=METHODS[recipe.method.kind].head,
        dtype=dtype,
        attention=recipe.model.attention,
    )
    adapter = recipe.adapter
    if isinstance(adapter, QLoRA):
        packed_in_four_bits(model, double=adapter.double_quantization)
        adapter = LoRA(**{**adapter.model_dump(exclude={"kind", "double_quantization"}), "dora": False})
    if isinstance(adapter, LoRA):
        # How an adapter starts changes no shape, and DoRA's check looks at the weights.
        adapter = adapter.model_copy(update={"init": "default", "dora": False})
    model = models.attach(model, adapter)
    if recipe.method.draws:
        from trl.trainer.utils import disable_dropout_in_model

        disable_dropout_in_model(model)
    model.to = MethodType(_stays, model)  # bound, so that a copy gives the copy
    return model


def _stays(model: Any, *given: Any, **named: Any) -> Any:
    """There is nothing to move."""
    return model


_TRACES: dict[str, Traced] = {}
"""The last traces by what they depend on: a plan and its run, or a run and its continuation, often share a process."""
KEPT_TRACES = 16


def _depends_on(recipe: Recipe, rows: Rows, *others: Any) -> str:
    """What a trace depends on, as a text; none where the rows are not known."""
    if not rows.identity:
        return ""
    of_training = recipe.training.model_dump(exclude={"max_steps", "num_epochs", "learning_rate", "seed"})
    # What the rows are their hash says, wherever they lie.
    of_data = recipe.data.model_dump(exclude={"dataset", "revision", "data_files"})
    parts = (part.model_dump() for part in (recipe.adapter, recipe.method))
    known = rows.identity, rows.answers, len(rows.lengths), recipe.evaluation.samples
    return repr((of_training, of_data, *parts, known, recipe.model, _changed(recipe.model), *others))


def _changed(model: Model) -> int:
    """When the model's configuration was written, where it lies in a folder."""
    config = Path(model.base) / "config.json"
    return config.stat().st_mtime_ns if config.is_file() else 0


@dataclass(frozen=True)
class Asked:
    """What is to be traced of a recipe."""

    kind: str
    """Of device."""
    dtype: str
    precision: str
    batch: tuple[int, ...]
    """Numbers of the rows."""
    cut: float = 1.0
    """Share of the widest row to which the rows are shortened."""
    validates: bool = True


def trace(recipe: Recipe, build: Build, rows: Rows, asked: Asked) -> Traced:
    """One micro-step and one validation batch of the recipe's trainer; that of before, where nothing has changed that
    it depends on."""
    key = _depends_on(recipe, rows, asked)
    if not key:
        return _traced(recipe, build, rows, asked)
    if key not in _TRACES:
        found = _traced(recipe, build, rows, asked)
        while len(_TRACES) >= KEPT_TRACES:
            _TRACES.pop(next(iter(_TRACES)))
        _TRACES[key] = found
    return _TRACES[key]


def _traced(recipe: Recipe, build: Build, rows: Rows, asked: Asked) -> Traced:
    import torch

    from tunesmith.methods import METHODS
    from tunesmith.models import layer_stacks
    from tunesmith.tracing import counting

    notes: list[str] = []
    with undisturbed(), tempfile.TemporaryDirectory(prefix="tunesmith-plan-") as folder, torch.enable_grad():
        model = hollow(recipe, asked.dtype)
        vocabulary = model.config.get_text_config().vocab_size
        kernel = "cpu" if asked.kind == "cpu" else "cuda"
        autocast = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(asked.precision)
        with counting(vocabulary=vocabulary, kernel=kernel, autocast=autocast) as count:
            trainer = build(recipe, model, Path(folder))
            model = trainer.model
            if recipe.training.gradient_checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
                if hasattr(model, "enable_input_require_grads"):
                    model.enable_input_require_grads()
            trainer.current_gradient_accumulation_steps = recipe.training.gradient_accumulation_steps
            count.restart()
            others = [m for m in vars(trainer).values() if isinstance(m, torch.nn.Module)]
            held = {id(p): p for m in (model, *others) for p in (*m.parameters(), *m.buffers())}
            weights = count.known(held.values())
            weights += _references(recipe, model, asked.dtype)
            size = recipe.training.per_device_train_batch_size
            if rows.answers:
                inputs = _answered(max(rows.lengths), rows.answers, size, rows.group, vocabulary)
            else:
                inputs = trainer.data_collator(rows_by_number(trainer.train_dataset, asked.batch))
            inputs = _shortened(inputs, asked.cut)
            items = _labels(inputs)
            start = count.clock
            trainer.training_step(model, dict(inputs), num_items_in_batch=items)
            trained = [p for p in model.parameters() if p.requires_grad]
            count.tag([p.grad for p in trained if p.grad is not None], "gradients")
            _, parts = count.live(start)
            blocks, costs = count.blocks(), tuple(count.costs)
            model.zero_grad(set_to_none=True)
            writing: Costs = ()
            if METHODS[recipe.method.kind].head is None:
                writing = _writing(model, count, max(size if rows.answers else recipe.evaluation.samples, 1))
            validation = 0
            validation_costs: Costs = ()
            if asked.validates and rows.validation and trainer.eval_dataset is not None and not rows.answers:
                numbers = _longest(rows.validation, recipe.training.per_device_eval_batch_size)
                given = trainer.data_collator(rows_by_number(trainer.eval_dataset, numbers))
                try:
                    validation, validation_costs = _validating(trainer, _shortened(given, asked.cut), count)
                except (RuntimeError, NotImplementedError, TypeError) as error:
                    notes.append(f"a validation was not traced: {str(error).splitlines()[0][:120]}")
        trainer.processing_class.save_pretrained(Path(folder) / "tokenizer")
        own = _bytes(trained)
        every = {id(p): p for p in model.parameters()}.values()
        saved = own if isinstance(recipe.adapter, LoRA) else _bytes(every)
        packed = [p for p in every if not p.is_floating_point()]
        layers = [
            _bytes(p for p in layer.parameters() if p.is_floating_point())
            for stack in layer_stacks(model)
            for layer in stack
        ]
        width = max(
            (v.shape[-1] for v in inputs.values() if isinstance(v, torch.Tensor) and v.dim() == 2), default=0
        )
        return Traced(
            weights=weights,
            trained=own,
            states=state_bytes(recipe.training.optimizer, model),
            largest=max((p.nbytes for p in trained), default=0),
            saved=saved,
            beside=sum(file.stat().st_size for file in Path(folder, "tokenizer").iterdir()),
            layer=max(layers, default=0),
            rest=max(_bytes(every) - _bytes(packed) - sum(layers), 0),
            packed=_bytes(packed),
            shape=Shape(
                layers=max(len(layers), 1),
                width=int(getattr(model.config.get_text_config(), "hidden_size", 0) or 0),
                parameters=sum(p.numel() * (1 if p.is_floating_point() else 2) for p in every),
                trained=sum(p.numel() for p in trained),
            ),
            step=dict(parts),
            costs=costs,
            flops=sum(flops for flops, _ in costs),
            width=width,
            blocks=blocks,
            unpadded=not trainer.pads,
            validation=validation,
            validation_costs=validation_costs,
            writing_costs=writing,
            notes=notes,
        )


def _labels(inputs: Mapping[str, Any]) -> Any:
    """How many labels a batch has, as the Trainer tells its loss; None where it has no labels of its own."""
    import torch

    return torch.tensor(max(int((inputs["labels"] != -100).sum()), 1)) if "labels" in inputs else None


def _validating(trainer: Any, given: dict[str, Any], count: Any) -> tuple[int, Costs]:
    """The most bytes that a batch of a validation holds, and its operations."""
    count.restart()
    trainer.model.eval()
    trainer._loss_sum, trainer._num_labels = 0.0, 0  # as an evaluation begins
    trainer.prediction_step(trainer.model, given, prediction_loss_only=True)
    most, _ = count.live()
    return most, tuple(count.costs)


def _writing(model: Any, count: Any, rows: int) -> Costs:
    """Operations of a pass over one new token in each of so many rows; none where the model cannot be asked so."""
    import torch

    count.restart()
    was_training = model.training
    model.eval()
    ids = torch.ones(rows, 1, dtype=torch.long)
    given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
    except (RuntimeError, NotImplementedError, TypeError):
        return ()
    finally:
        model.train(was_training)
    return tuple(count.costs)


def _answered(prompt: int, answer: int, rows: int, group: int, vocabulary: int) -> dict[str, Any]:
    """Rows of a prompt and an answer of these lengths, as a model that writes them is trained on them: each group of
    rows has one prompt, and every answer is another."""
    import torch

    draw = torch.Generator().manual_seed(0)
    asked = torch.randint(vocabulary, (-(-rows // group), prompt), generator=draw).repeat_interleave(group, 0)
    written = torch.randint(vocabulary, (rows, answer), generator=draw)
    ids = torch.cat([asked[:rows], written], dim=1)
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _references(recipe: Recipe, model: Any, dtype: str) -> int:
    """Bytes of a reference that the hollow trainer lacks: the copy beside a policy that draws, and a model of its own
    in the place of that which the trainer has."""
    from tunesmith import models

    section = recipe.method
    own = _bytes({id(p): p for p in model.parameters()}.values())
    if section.draws:
        diverges = getattr(section, "beta", 0.0) or getattr(section, "kl_coefficient", 0.0)
        is_off = (
            isinstance(recipe.adapter, LoRA)
            and recipe.adapter.bias == "none"
            and recipe.adapter.init not in PRINCIPAL
        )
        return own if diverges and not is_off else 0
    name = getattr(section, "reference_model", None)
    if not name:
        return 0
    other = _bytes(models.outline(name, dtype=dtype).parameters())
    return other - (0 if isinstance(recipe.adapter, LoRA) else own)


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def rows_by_number(dataset: Any, numbers: Iterable[int]) -> list[dict[str, Any]]:
    """Rows of a trainer's data by their numbers in the data, which it may hold in another order; with places for
    likelihoods of a reference that are worked out before training."""
    found, first = [], dataset[0]
    if "part" in first and "row" in first:
        places = {int(number): place for place, number in enumerate(dataset["row"])}
        numbers = [places[number] for number in numbers]
    for number in numbers:
        row = dict(dataset[number])
        if "part" in row:
            for name in ("ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_KL_logps"):
                row.setdefault(name, 0.0)
        found.append(row)
    return found


def _shortened(inputs: Any, share: float) -> dict[str, Any]:
    import torch

    if share >= 1:
        return dict(inputs)
    return {
        name: value[:, : max(int(value.shape[1] * share), 2)]
        if isinstance(value, torch.Tensor) and value.dim() == 2
        else value
        for name, value in inputs.items()
    }


def roofline(costs: Costs, facts: DeviceFacts, dtype: str) -> float:
    """Seconds of operations, each bound by arithmetic, by memory or by its start."""
    peak = facts.peak(dtype) * facts.product_share
    bandwidth = facts.bandwidth * facts.bandwidth_share
    return sum(max(flops / peak, moved / bandwidth, facts.launch) for flops, moved in costs)


def stages(
    traced: Traced,
    recipe: Recipe,
    facts: DeviceFacts,
    *,
    process: int,
    evaluation: Parts | None = None,
    writing: Parts | None = None,
    outputs: int = 0,
    processes: int = 1,
    per_node: int = 1,
    lower: bool = False,
) -> dict[str, Parts]:
    """Bytes by part in each stage of a run that holds memory; in one of its processes where these are several, of which
    `per_node` share a machine. `evaluation` is what answers to questions take, `writing` those that are trained on,
    `outputs` what is kept of frozen layers. `lower` as in `parallel.held`."""
    on_cpu = facts.kind == "cpu"
    fixed = {"process": process} if on_cpu else {"reserved": facts.reserved}
    whole, optimizer = fixed, traced.states
    if outputs and on_cpu:  # a GPU's are kept in the machine's memory
        fixed = {**fixed, "outputs": outputs}
    step = dict(traced.step)
    if recipe.training.gradient_accumulation_steps > 1:
        step["gradients"] = traced.trained
    # One matrix after the other on a CPU; on others all of them at once, unless it is one kernel.
    together = not on_cpu and recipe.training.optimizer == "adamw_torch"
    is_fused = recipe.training.optimizer == "adamw_torch_fused"
    moving = 0 if is_fused else traced.trained if together else 2 * traced.largest
    found: dict[str, dict[str, int]] = {
        "training": {**fixed, "weights": traced.weights, "optimizer": optimizer, **step},
        "updating": {
            **fixed, "weights": traced.weights, "gradients": traced.trained, "optimizer": optimizer + moving,
        },
        "saving": {
            **fixed, "weights": traced.weights, "optimizer": optimizer, "save": traced.saved if on_cpu else 0,
        },
    }  # fmt: skip
    if traced.validation:
        found["validating"] = {
            **fixed, "weights": traced.weights, "optimizer": optimizer, "evaluation": traced.validation,
        }  # fmt: skip
    if writing:
        found["writing"] = {**fixed, **writing, "weights": traced.weights, "optimizer": optimizer}
    if evaluation:
        tuned = traced.saved if isinstance(recipe.adapter, LoRA) else 0
        found["answering"] = {**whole, **evaluation, "weights": evaluation["weights"] + tuned}
    replayed = None
    if on_cpu:
        asked = (
            recipe.training.gradient_accumulation_steps,
            {8.0: 2, 0.0: 0}.get(STATES[recipe.training.optimizer], 1),
            0 if is_fused else 2,
        )
        if asked not in traced.replayed:
            passes, states, places = asked
            traced.replayed[asked] = most_held(traced.blocks, passes=passes, states=states, moving=places)
        replayed = traced.replayed[asked]
    for name, parts in found.items():
        loose = sum(
            parts.get(part, 0) for part in ("gradients", "activations", "head", "evaluation", "cache")
        )
        spread = SPREAD[facts.kind] * loose
        if replayed and name in ("training", "updating"):
            spread = max(replayed[name == "updating"] - loose - parts["optimizer"], 0)
        parts["spread"] = int(spread)
    alone = parallel.Model(
        traced.weights, traced.trained, traced.states, traced.layer, traced.rest, traced.packed
    )
    held: dict[str, Parts] = {
        name: {part: size for part, size in parts.items() if size}
        if processes == 1
        else parallel.held(
            recipe.parallel,
            alone,
            parts,
            processes=processes,
            capacity=facts.memory,
            lower=lower,
            device=facts.kind,
        )
        for name, parts in found.items()
    }
    if processes > 1 and (on_cpu or (isinstance(recipe.parallel, DeepSpeed) and recipe.parallel.stage == 3)):
        # Every process reads the whole model; on a GPU ZeRO's third stage does so before it cuts it.
        held["loading"] = {**whole, "weights": traced.weights}
    if processes > 1 and on_cpu and evaluation:
        # The first process alone answers, in the memory that all of them share: its part of each process's room.
        first, among = held["answering"], max(per_node, 1)
        held["answering"] = {**whole, **{name: b // among for name, b in first.items() if name not in whole}}
    return held


SPREAD = {"cpu": 0.03, "cuda": 0.03, "mps": 0.05}
"""What an allocator keeps beyond what is alive, as a share of what comes and goes, where it is not asked (`heap`)."""


def answering(recipe: Recipe, rows: Rows, *, facts: DeviceFacts, dtype: str) -> tuple[Parts, list[str]]:
    """Bytes that writing answers to the held-out questions takes, and what is not known. Base and tuned model are
    loaded for it one after the other, in whole weights, whatever the training packs."""
    from tunesmith.methods import METHODS

    questions = _questions(recipe, rows)
    if not questions or recipe.evaluation.engine in ("vllm", "openai"):
        return {}, []
    method = METHODS[recipe.method.kind]
    if method.head or method.model != "causal":
        return {}, [
            "measuring the models is not part of the memory figures: it is not traced for this method"
        ]
    width, new = max(rows.lengths), recipe.evaluation.max_new_tokens
    count_rows = max(min(recipe.evaluation.batch_tokens // (width + new), questions), 1)
    sizes = count_rows, width, new
    return dict(_answering(recipe.model, _changed(recipe.model), facts.kind, dtype, sizes)), []


def drawing(recipe: Recipe, rows: Rows, *, facts: DeviceFacts, dtype: str) -> Parts:
    """Bytes that writing the answers takes which a step learns from, by part; none where a method writes none. The
    model is the one in training."""
    if not rows.answers:
        return {}
    training, width = recipe.training, max(rows.lengths)
    count = training.per_device_train_batch_size * training.gradient_accumulation_steps
    if isinstance(recipe.method, PPO):
        count = max(min(count, recipe.method.generation_batch_tokens // (width + rows.answers)), 1)
    sizes = count, width, rows.answers
    return dict(_answering(recipe.model, _changed(recipe.model), facts.kind, dtype, sizes))


def kept_outputs(
    recipe: Recipe, rows: Rows, width: int, *, facts: DeviceFacts, dtype: str, steps: int, used: int
) -> int:
    """Bytes of the outputs of frozen layers that are kept: of every row that comes within so many steps, up to the
    share of the memory beyond `used` bytes that they may take."""
    if not recipe.training.cache_frozen:
        return 0
    from tunesmith.forward.frozen import SHARE

    training = recipe.training
    come = min(
        steps * training.per_device_train_batch_size * training.gradient_accumulation_steps, len(rows.lengths)
    )
    tokens = sum(rows.lengths) * come // max(len(rows.lengths), 1) + sum(rows.validation)
    asked = tokens * width * (4 if dtype == "float32" else 2)
    free = facts.memory - used if facts.kind == "cpu" else devices.available() - devices.resident()
    return max(min(asked, int(SHARE * free)), 0)


def _questions(recipe: Recipe, rows: Rows) -> int:
    """How many questions each model is measured by."""
    if recipe.evaluation.skip:
        return 0
    return min(rows.questions, recipe.evaluation.max_items or rows.questions)


@functools.lru_cache(KEPT_TRACES)
def _answering(section: Model, changed: int, kind: str, dtype: str, sizes: tuple[int, int, int]) -> Parts:
    """Bytes that a batch of rows, a question's width and new tokens takes, by part."""
    import torch

    from tunesmith import models
    from tunesmith.tracing import counting

    rows, width, new = sizes
    with undisturbed():
        model = models.outline(
            section.base, revision=section.revision, dtype=dtype, attention=section.attention
        ).eval()
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.ones(rows, width, dtype=torch.long)
        with torch.no_grad(), counting(vocabulary=vocabulary, kernel=kind) as count:
            weights = count.known([*model.parameters(), *model.buffers()])
            try:
                out = model(
                    input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1
                )
            except TypeError:  # a model that cannot leave logits out
                out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
            most, _ = count.live()
            del out.logits
            cache, _ = count.live(count.clock)
    grown = cache * (width + new) / width
    layers = max(int(getattr(model.config.get_text_config(), "num_hidden_layers", 1)), 1)
    # A layer's keys and values are there twice while a token is joined to them.
    cached = int(grown * (1 + 1 / layers))
    return {"weights": weights, "cache": cached, "evaluation": max(most - cached, 0)}


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
    from tunesmith.training.steps import SOON

    dtype, precision, total_steps = plan.dtype, plan.mixed_precision, plan.total_steps

    def types(changed: Recipe) -> tuple[str, str]:
        """Of the weights and of mixed precision."""
        asked = changed.training.mixed_precision
        held, _ = weights_dtype(changed.model.dtype, changed.adapter.kind, facts.kind, asked)
        return held, computed_in(asked, facts.kind)

    def traced_as(
        changed: Recipe, rows_in_batch: Sequence[int], cut: float = 1.0, validates: bool = True
    ) -> Traced:
        asked = Asked(facts.kind, *types(changed), tuple(rows_in_batch), cut, validates)
        return trace(changed, build, rows, asked)

    def lowers(changed: Recipe) -> bool:
        """Whether weights of float32 are sent in bfloat16."""
        return types(changed) == ("float32", "bf16")

    found_batches = batches(rows, recipe.training, total_steps)
    batch = found_batches.fullest(rows.lengths, pads=False)
    traced = traced_as(recipe, batch)
    if not traced.unpadded:
        found_batches = batches(rows, recipe.training, total_steps, pads=True)
        batch = found_batches.fullest(rows.lengths, pads=True)
        traced = traced_as(recipe, batch)
    share = found_batches.share(rows, batch, pads=not traced.unpadded)
    answers, notes = answering(recipe, rows, facts=facts, dtype=dtype)
    held = process()  # now that every library is loaded
    several = plan.processes

    def kept_of(changed: Recipe, traced: Traced) -> int:
        return kept_outputs(
            changed, rows, traced.shape.width, facts=facts, dtype=types(changed)[0], steps=total_steps,
            used=held + traced.weights,
        )  # fmt: skip

    def stages_of(changed: Recipe, traced: Traced, answers: Parts) -> dict[str, Parts]:
        return stages(
            traced, changed, facts, process=held, evaluation=answers,
            writing=drawing(changed, rows, facts=facts, dtype=types(changed)[0]), outputs=kept_of(changed, traced),
            processes=several, per_node=plan.per_node, lower=lowers(changed),
        )  # fmt: skip

    found = stages_of(recipe, traced, answers)
    if facts.kind != "cpu" and (kept := kept_of(recipe, traced)):
        notes.append(
            f"training.cache_frozen keeps {size(kept)} of outputs in the memory of the machine, not of the device"
        )
    if facts.kind == "cpu" and None in traced.replayed.values():
        notes.append(
            f"the allocator could not be asked what it holds beyond what is alive: {SPREAD['cpu']:.0%} are taken"
        )
    if most_of(found) > facts.memory:
        measure = None
    elif measure and roofline(traced.costs, facts, dtype) > MEASURED_SECONDS:
        measure = None
        notes.append(f"no micro-step was measured: one would take longer than {MEASURED_SECONDS:.0f} s")
    if rows.answers and measure:
        pace = _pace_of_drawing(traced, measure)
    else:
        pace = _pace_of_batches(traced, rows, batch, share, facts, dtype, precision, measure)
    seconds = pace.seconds
    fullest = found_batches.place_of_fullest(rows.lengths, pads=not traced.unpadded)
    # Before the first step, by a run alone.
    is_tried = fullest // recipe.training.gradient_accumulation_steps >= SOON
    tried = seconds / share if is_tried and several == 1 and not rows.answers else 0.0
    accumulation = len(found_batches.starts) / found_batches.steps  # an epoch's last step may have fewer
    # Several operations in the place of one kernel read and write about twice as much.
    moved = scaling.MOMENTS / 4 * traced.trained * (1 if "fused" in recipe.training.optimizer else 2)
    update = moved / (facts.bandwidth * facts.bandwidth_share)
    shared = None
    # Where processes share cores and memory nothing is gained.
    slower = plan.per_node if facts.kind == "cpu" else 1
    if several > 1:
        accumulation /= several
        seconds *= slower
        update *= slower
        whole, shared = _shared(
            traced, recipe, rows, found_batches, facts, plan, lower=lowers(recipe), passes=accumulation,
            seconds=seconds, tokens=share * sum(rows.lengths[n] for n in batch), update=update,
        )  # fmt: skip
        update = whole - accumulation * seconds
    per_token = pace.token or _roofline_of_writing(traced.writing_costs, facts, dtype)
    if rows.answers and measure:
        per_step = seconds
    else:
        writing = rows.answers * per_token / getattr(recipe.method, "num_iterations", 1)
        per_step = accumulation * (seconds + writing) + update
    validations = math.ceil(total_steps / plan.eval_steps) if plan.eval_steps and rows.validation else 0
    scale = 1.0 if rows.answers else seconds / max(share * roofline(traced.costs, facts, dtype), 1e-12)
    validation = _pass_over(traced, rows, recipe, facts, dtype) * scale / several
    if recipe.evaluation.samples and not rows.answers:
        validation += min(SAMPLE_TOKENS, recipe.evaluation.max_new_tokens) * per_token
    model = traced.saved + traced.beside
    written = math.ceil(total_steps / plan.save_steps) * (model + traced.states)
    if recipe.training.load_best_model_at_end:
        written += (validations + 1) * model
    notes += [*several_notes(recipe, plan, facts, traced.weights), *traced.notes, *rows_notes(rows, recipe)]
    if facts.kind == "mps":
        notes.append(
            "attention is figured as the kernel of a CUDA device, which keeps no scores: whether that of MPS does was "
            "not measured, and with long rows it may take more"
        )
    if facts.assumed:
        notes.append(f"how fast {facts.name} is, is not known: {facts.assumed}, until steps are measured")
    result = Estimate(
        device=facts.name,
        capacity=facts.memory,
        stages=found,
        seconds_per_step=per_step,
        seconds=pace.first + tried + total_steps * per_step + validations * validation + written / WRITTEN,
        validation_seconds=validations * validation,
        saving_seconds=written / WRITTEN,
        basis=pace.basis,
        tokens_per_epoch=plan.tokens_per_epoch,
        epochs=round(total_steps / max(plan.steps_per_epoch, 1), 2),
        flops_per_step=accumulation * traced.flops * share,
        disk=_disk(recipe, traced, rows, plan),
        disk_free=_free(folder) if folder else None,
        micro_batch=recipe.training.per_device_train_batch_size,
        notes=tuple(notes),
        longest=traced.width,
        shared=shared,
    )
    if thorough:
        there = len(rows.lengths) * (rows.group if rows.answers else 1)
        first = recipe.training.per_device_train_batch_size
        traceable = max(MOST_TRACED[facts.kind] // max(traced.shape.layers, 1), first, 2)

        @functools.cache
        def peak_of_rows(count: int) -> float:
            if count > traceable:
                half, whole = peak_of_rows(traceable // 2), peak_of_rows(traceable)
                return whole + (count - traceable) * (whole - half) / (traceable - traceable // 2)
            change = Change("batch", "", "", {"training": {"per_device_train_batch_size": count}})
            changed = _with(recipe, [change])
            again = traced_as(changed, _longest(rows.lengths, count), validates=False)
            return most_of({**found, **stages_of(changed, again, answers)})

        largest = _most_rows(peak_of_rows, facts.memory, first, there)
        result = replace(result, largest_batch=largest)
        if largest > traceable:
            more = f"what more than {traceable:,} rows take is a straight line's from {traceable // 2:,} and those"
            result = replace(result, notes=(*result.notes, f"the largest micro-batch was not traced: {more}"))
    if result.missing:

        @functools.cache
        def peak_of(*changes: Change) -> int:
            changed = _with(recipe, changes)
            try:
                check(changed)
            except TunesmithError:
                return REFUSED
            batch = _longest(rows.lengths, changed.training.per_device_train_batch_size)
            cut = min(changed.data.max_length / result.longest, 1.0)
            again = traced_as(changed, batch, cut, validates=result.stage == "validating")
            own, _ = answering(changed, rows, facts=facts, dtype=types(changed)[0])
            return most_of(stages_of(changed, again, own))

        fixed = held if facts.kind == "cpu" else facts.reserved
        changes = list(_changes(recipe, result.longest, several, facts.kind))
        result = replace(result, remedies=tuple(_remedies(result, changes, peak_of, fixed)))
    return result


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


def timed(trainer: Any, batches: Sequence[Sequence[int]]) -> list[float]:
    """Seconds of the trainer's micro-step on rows of these numbers.

    The first one is run once, as the first steps of a process are slow; the others in several turns where they are
    quick, since single steps vary by a fifth, and their medians count.
    """
    import torch

    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)

    def step(batch: Sequence[int]) -> float:
        inputs = trainer.data_collator(rows_by_number(trainer.train_dataset, batch))
        items = _labels(inputs)
        started = time.perf_counter()
        with trainer.accelerator.autocast():  # which a prepared model would bring along
            trainer.training_step(trainer.model, inputs, num_items_in_batch=items)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken = time.perf_counter() - started
        trainer.model.zero_grad(set_to_none=True)
        return taken

    first, *others = batches
    began = step(first)
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


def rows_notes(rows: Rows, recipe: Recipe) -> list[str]:
    """What the figures leave out."""
    found = []
    if rows.answers:
        found.append(
            f"{recipe.method.kind} trains on what the model writes: memory is that of writing, and of learning from, "
            f"{rows.answers} new tokens a row, without the rewards' models and a critic"
        )
    if isinstance(recipe.adapter, LoRA) and recipe.adapter.dora:
        found.append("DoRA is figured as LoRA: the norms of its weights take more memory and time")
    if recipe.training.compile:
        found.append(
            "training.compile: compiling takes half a minute to a minute, which is not in the seconds"
        )
    if getattr(recipe.method, "reference", "") == "precomputed":
        found.append("the reference's pass over all rows before the first step is not in the seconds")
    return found


def _longest(lengths: Sequence[int], count: int) -> list[int]:
    """Numbers of the longest rows, as many as a batch has, in the order of the data."""
    return sorted(sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))[:count])


MOST_ROWS = 2_000_000
"""Rows whose batches are gone through; a run of more is planned by its first ones."""


@dataclass(frozen=True)
class Batches:
    """The micro-batches of a run in their order: the rows of all, and where each begins."""

    rows: Any
    starts: Any
    steps: int
    """Steps that these are."""
    of_an_epoch: int
    """Micro-batches of a whole epoch."""
    are_alike: bool = False
    """Whether rows of like length come together."""

    def unevenness(self, lengths: Sequence[int], count: int, processes: int, *, pads: bool) -> float | None:
        """Tokens of the fullest of so many processes over their mean, where each takes so many batches in turn before
        they wait for one another; None where no epoch has as many."""
        import numpy as np

        sizes, whole = self.sizes(lengths, pads=pads), count * processes
        places = [slice(n, n + self.of_an_epoch) for n in range(0, len(sizes), self.of_an_epoch)]
        parts = [sizes[place][: len(sizes[place]) // whole * whole] for place in places]
        taken = np.concatenate(parts).reshape(-1, count, processes).sum(axis=1)
        return float(taken.max(axis=1).sum() / taken.mean(axis=1).sum()) if len(taken) else None

    def sizes(self, lengths: Sequence[int], *, pads: bool) -> Any:
        """Tokens that each computes, padding too where it `pads`."""
        import numpy as np

        given = np.asarray(lengths, dtype=np.int64)[self.rows]
        counts = np.diff(np.append(self.starts, len(self.rows)))
        return (
            np.maximum.reduceat(given, self.starts) * counts if pads else np.add.reduceat(given, self.starts)
        )

    def fullest(self, lengths: Sequence[int], *, pads: bool) -> list[int]:
        """The rows of the one that computes the most."""
        place = self.place_of_fullest(lengths, pads=pads)
        end = self.starts[place + 1] if place + 1 < len(self.starts) else len(self.rows)
        return sorted(int(number) for number in self.rows[self.starts[place] : end])

    def place_of_fullest(self, lengths: Sequence[int], *, pads: bool) -> int:
        """The number of the one that computes the most, the first of such."""
        return int(self.sizes(lengths, pads=pads).argmax())

    def share(self, rows: Rows, batch: Sequence[int], *, pads: bool) -> float:
        """How much the mean batch computes of what this one does."""
        lengths = [length + rows.answers for length in rows.lengths]
        mine = [lengths[number] for number in batch]
        whole = max(mine) * len(mine) if pads else sum(mine)
        if rows.answers:  # the longest prompt stands for all
            whole = (max(rows.lengths) + rows.answers) * len(mine)
        return float(self.sizes(lengths, pads=pads).mean() / whole)


def batches(rows: Rows, training: Training, steps: int, *, pads: bool = False) -> Batches:
    """The micro-batches of the first so many steps, in the order in which a run of this seed meets them.

    Each epoch has an order of its own, of the seed and its number (accelerate's SeedableRandomSampler), or one of rows
    of like length (`training.order`).
    """
    import numpy as np
    import torch

    from tunesmith.training.order import by_length, padding

    size, total = training.per_device_train_batch_size, len(rows.lengths)
    together = rows.alike or size
    alike = rows.order is None and (
        training.batches == "by_length"
        or (
            training.batches == "auto"
            and pads
            and rows.any_order
            and padding(rows.lengths, together, seed=training.seed).is_worth
        )
    )
    if rows.answers:  # several answers to one prompt
        size = max(size // rows.group, 1)
    parts: list[Any] = []
    starts: list[int] = []
    begun = epoch = 0
    times, done = training.gradient_accumulation_steps, 0
    while done < steps and begun < MOST_ROWS:
        if rows.order is not None:
            order = np.asarray(rows.order)
        elif alike:
            order = np.asarray(by_length(rows.lengths, together, seed=training.seed, epoch=epoch))
        else:
            draw = torch.Generator().manual_seed(training.seed + epoch)
            order = torch.randperm(total, generator=draw).numpy()
        parts.append(order[: (steps - done) * times * size])
        starts += range(begun, begun + len(parts[-1]), size)
        done += -(-len(parts[-1]) // (times * size))  # a step ends with its epoch
        begun, epoch = begun + len(parts[-1]), epoch + 1
    return Batches(np.concatenate(parts), np.asarray(starts), max(done, 1), -(-total // size), alike)


@dataclass(frozen=True)
class _Pace:
    """What the seconds of a run are made of."""

    seconds: float
    """Of the mean micro-step, or of a whole step that begins with answers which the model writes."""
    basis: str
    """What they rest on."""
    first: float = 0.0
    """By which the first one is longer."""
    token: float = 0.0
    """Of one more token in each sample answer; 0 where that was not measured."""


def _pace_of_batches(
    traced: Traced, rows: Rows, batch: Sequence[int], part: float, facts: DeviceFacts, dtype: str, precision: str,
    measure: Measure | None,
) -> _Pace:  # fmt: skip
    """That of micro-steps of which the mean one is `part` of that which was traced."""
    compute = {"fp16": "float16", "bf16": "bfloat16"}.get(precision, dtype)
    counted_seconds = roofline(traced.costs, facts, compute) * part
    share = f"{traced.flops / 1e9:,.1f} GFLOP in the longest micro-step"
    if measure is None:
        rates = f"{facts.peak(compute) * facts.product_share / 1e12:.3g} TFLOP/s in {compute}"
        basis = f"an estimate: {share}, at {rates} and {facts.bandwidth / 1e9:,.0f} GB/s"
        return _Pace(counted_seconds, basis)
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
    return _Pace(seconds, basis, first=max(first_seconds - typical_seconds, 0.0), token=found.token)


def _pace_of_drawing(traced: Traced, measure: Measure) -> _Pace:
    """That of whole steps whose answers are written first."""
    found = measure([]).steps
    told = " and ".join(map(duration, found))
    return _Pace(
        sum(found) / len(found),
        f"{len(found)} measured steps ({told}), the answers of which the model wrote; "
        f"{traced.flops / 1e9:,.1f} GFLOP in a micro-step beside the writing",
    )


BY_PYTHON = 3e-5
"""Seconds from one operation to the next while a model writes, which keeps no device busy: 8 to 10 ms a token were
measured with 4 layers on a CPU, and as much a layer is known of GPUs."""


def _roofline_of_writing(costs: Costs, facts: DeviceFacts, dtype: str) -> float:
    """Seconds of a new token in each row."""
    return roofline(costs, replace(facts, launch=max(BY_PYTHON, facts.launch)), dtype)


WRITTEN = 400e6
"""Bytes a second that are hashed, written and flushed; about what one thread and a laptop's disk do."""


def _pass_over(traced: Traced, rows: Rows, recipe: Recipe, facts: DeviceFacts, dtype: str) -> float:
    """Seconds of one validation."""
    if not traced.validation_costs:
        return 0.0
    rows_in_batch = min(recipe.training.per_device_eval_batch_size, len(rows.validation))
    longest = max(rows.validation)
    mean = sum(rows.validation) / len(rows.validation)
    batches = math.ceil(len(rows.validation) / rows_in_batch)
    return batches * roofline(traced.validation_costs, facts, dtype) * (0.5 + 0.5 * mean / longest)


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
    answers = 2 * _questions(recipe, rows) * (ANSWER + 4 * recipe.evaluation.max_new_tokens)
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


def _most_rows(peak_of: Callable[[int], float], capacity: int, first: int, most: int) -> int:
    """How many rows of at most `most` fit, or up to an eighth fewer; 0 where not even one does.

    Goes from `first` along straight lines between what was looked at, and names only what was.
    """
    fits, beyond, rows = 0, most + 1, min(first, most)
    peaks: dict[int, float] = {}
    while True:
        peaks[rows] = peak_of(rows)
        fits, beyond = (rows, beyond) if peaks[rows] <= capacity else (fits, rows)
        closest = max(fits // 8, 1)
        if beyond - fits <= closest:
            return fits
        known = sorted(peaks)
        if not fits:
            rows = beyond // 2
        elif len(known) == 1:
            rows = min(2 * fits, most)
        else:
            low, high = (fits, beyond) if beyond in peaks else known[-2:]
            slope = (peaks[high] - peaks[low]) / (high - low)
            line = fits + int(min((capacity - peaks[fits]) / slope, most)) if slope > 0 else most
            rows = min(max(line, fits + closest), 8 * fits, beyond - 1)


MOST_TRACED = {"cpu": 256, "cuda": 2_048, "mps": 2_048}
"""Rows times layers of the largest batch that is traced where the largest that fits is looked for: some seconds. A
CPU's attention is an operation per row."""

REFUSED = sys.maxsize
"""The peak of a recipe that would be refused."""
FEWER = 4
"""The part of the tokens that a batch of answers has as a remedy."""
MOST_REMEDIES = 3


@dataclass(frozen=True, eq=False)
class Change:
    """A change to a recipe with which it takes less memory."""

    kind: str
    """What it is a try at; of one kind the first that is not refused counts."""
    said: str
    flags: str
    fields: Mapping[str, Any]
    """By section of the recipe: the fields that are set, or the section that takes its place."""


def _with(recipe: Recipe, changes: Iterable[Change]) -> Recipe:
    """The recipe with these changes, the later on top."""
    for change in changes:
        update = {
            name: value if not isinstance(value, dict) else getattr(recipe, name).model_copy(update=value)
            for name, value in change.fields.items()
        }
        recipe = recipe.model_copy(update=update)
    return recipe


def _remedies(
    found: Estimate, changes: Iterable[Change], peak_of: Callable[..., int], fixed: int
) -> list[Remedy]:
    """Three remedies from changes in order of harm: ways in which the run fits, the least harmful first, each without
    what it can do without; where there are fewer, what comes closest. `peak_of` gives the bytes at the peak of the
    recipe with some of the changes, `fixed` are those that no change makes less.
    """

    def remedy(taken: Sequence[Change], most: int) -> Remedy:
        """Of these changes those without which the peak would be more than that."""
        for change in reversed(taken):
            fewer = [other for other in taken if other is not change]
            taken = fewer if fewer and peak_of(*fewer) <= most else taken
        said, flags = ", and ".join(c.said for c in taken), " ".join(c.flags for c in taken)
        peak = peak_of(*taken)
        return Remedy(said, flags, peak, peak <= found.capacity)

    def beyond(share: float, peak: int) -> int:
        return fixed + int(share * (peak - fixed))

    fits: list[Remedy] = []
    short: dict[str, Remedy] = {}
    waiting: list[Change] = []
    offered: set[str] = set()
    for change in changes:
        if change.kind in offered or (peak := peak_of(change)) == REFUSED:
            continue
        offered.add(change.kind)
        if peak <= found.capacity:
            fits.append(remedy([change], found.capacity))
        else:
            waiting.append(change)
            short[change.flags] = remedy([change], peak)
            if peak_of(*waiting) <= found.capacity:
                fits.append(remedy(waiting, found.capacity))
                waiting = []
        if len(fits) == MOST_REMEDIES:
            return fits
    if not fits and len(waiting) > 1:
        closest = remedy(waiting, beyond(1.02, peak_of(*waiting)))
        short[closest.flags] = closest
    less = [one for one in short.values() if one.peak < beyond(0.98, found.peak)]
    return [*fits, *sorted(less, key=lambda one: one.peak)[: MOST_REMEDIES - len(fits)]]


def _changes(recipe: Recipe, longest: int, processes: int, device: str) -> Iterator[Change]:
    """Changes in order of harm: the same maths in smaller pieces, in shares of several processes, more time, coarser
    products and states, fewer trained weights, coarser weights, shorter rows, no proof."""
    rows, times = recipe.training.per_device_train_batch_size, recipe.training.gradient_accumulation_steps
    for few in (1, 2):
        if rows > few:
            passes = -(-times * rows // few)
            fields = {
                "per_device_train_batch_size": few, "gradient_accumulation_steps": passes,
                "per_device_eval_batch_size": few,
            }  # fmt: skip
            flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in fields.items())
            said = f"{'one row' if few == 1 else f'{few} rows'} per pass, {passes} passes per step"
            yield Change("rows", said, flags, {"training": fields})
    if recipe.evaluation.batch_tokens > 2048:
        wanted = recipe.evaluation.batch_tokens // FEWER
        said, flags = f"{wanted} tokens per batch of answers", f"--set evaluation.batch_tokens={wanted}"
        yield Change("answers", said, flags, {"evaluation": {"batch_tokens": wanted}})
    if processes > 1 and isinstance(recipe.parallel, DDP):
        said = f"weights, gradients and optimizer states in shares of the {processes} processes, more to send"
        yield Change("shares", said, "--parallel fsdp", {"parallel": FSDP()})
    if not recipe.training.gradient_checkpointing:
        said = "activations computed again in the backward pass, about a third more time"
        yield Change(
            "again", said, "--gradient-checkpointing", {"training": {"gradient_checkpointing": True}}
        )
    if device == "cuda" and recipe.training.mixed_precision == "no":
        base = " and a frozen base" if isinstance(recipe.adapter, LoRA) else ""
        for precision in ("bf16", "fp16"):  # which older GPUs lack, as is found when it is tried
            said, flags = f"products{base} in 16 bits, which is faster too", f"--mixed-precision {precision}"
            yield Change("precision", said, flags, {"training": {"mixed_precision": precision}})
    if device == "cuda" and STATES[recipe.training.optimizer] == 8 and not isinstance(recipe.adapter, LoRA):
        said, flags = "optimizer states in 8 bits", "--set training.optimizer=adamw_bnb_8bit"
        yield Change("states", said, flags, {"training": {"optimizer": "adamw_bnb_8bit"}})
    if not isinstance(recipe.adapter, LoRA):
        yield Change("adapter", "an adapter instead of all weights", "--lora", {"adapter": LoRA()})
    if not isinstance(recipe.adapter, QLoRA):
        is_adapted = isinstance(recipe.adapter, LoRA)
        kept = recipe.adapter.model_dump(exclude={"kind"}) if is_adapted else {}
        said = "4-bit weights under the adapter" if is_adapted else "an adapter on 4-bit weights"
        yield Change("bits", said, "--qlora", {"adapter": QLoRA(**kept)})
    half = max(min(recipe.data.max_length, longest) // 2, 16)
    yield Change(
        "length", f"rows cut at {half} tokens", f"--max-length {half}", {"data": {"max_length": half}}
    )
    if not recipe.evaluation.skip:
        said = "no comparison in the run, for which `tunesmith evaluate RUN` makes up on a larger machine"
        flags = "--set evaluation.skip=true"
        yield Change("measuring", said, flags, {"evaluation": {"skip": True}})
