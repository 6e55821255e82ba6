"""One step of a run, traced on the model's shape without weights: blocks of memory, operations, bytes of each part.

The method's own trainer takes it on the rows that it is asked for.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

from tunesmith.estimate.micro_batches import Rows, longest_rows
from tunesmith.heap import Block
from tunesmith.recipe import PRINCIPAL, LoRA, Model, QLoRA, Recipe
from tunesmith.training.run import Run

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
    return repr((of_training, of_data, *parts, known, recipe.model, written_at(recipe.model), *others))


def written_at(model: Model) -> int:
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
            notes += _of_forward(recipe, Path(folder))
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
                inputs = answered(max(rows.lengths), rows.answers, size, rows.group, vocabulary)
            else:
                inputs = trainer.data_collator(rows_by_number(trainer.train_dataset, asked.batch))
            inputs = _shortened(inputs, asked.cut)
            items = labels_of(inputs)
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
                numbers = longest_rows(rows.validation, recipe.training.per_device_eval_batch_size)
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


def _of_forward(recipe: Recipe, folder: Path) -> list[str]:
    """That a step takes the stock forward where the recipe asks for the fast one, and why."""
    if recipe.training.forward == "stock":
        return []
    return [
        f"the stock forward is taken, with padding and all logits: {event['reason']}"
        for event in Run(folder).events()
        if (event.get("name"), event.get("value")) == ("forward", "stock")
    ]


def labels_of(inputs: Mapping[str, Any]) -> Any:
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


def answered(prompt: int, answer: int, rows: int, group: int, vocabulary: int) -> dict[str, Any]:
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
