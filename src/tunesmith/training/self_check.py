"""Whether the same rows give the same loss and gradient however they are batched, found out on the user's own.

Eight rows at once must come to what two times four of them come to, accumulated, and packed rows to what padded ones
come to, but for rounding: a trainer that averages averages, or lets packed examples see one another, learns
something else than its recipe says.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.recipe import Recipe
from tunesmith.training.run import Run

ROWS = 8
"""Rows that are looked at, evenly spread from the shortest to the longest."""

BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference that counts as rounding, as a share of the loss and of the gradient's norm, by the type that the
forward pass computes in. In float32 about 1e-6 is usual."""


@dataclass(frozen=True)
class Compared:
    """Loss and gradient of the same rows in two ways."""

    first: str
    second: str
    losses: tuple[float, float]
    gradient: float
    """Norm of the difference of the gradients, as a share of the first one's norm."""
    bound: float

    @property
    def equal(self) -> bool:
        """Whether both differ by no more than rounding."""
        one, other = self.losses
        return abs(one - other) <= self.bound * abs(one) and self.gradient <= self.bound

    def sentence(self) -> str:
        """What was found, for people."""
        said = "equal to rounding" if self.equal else "NOT equal"
        return (
            f"{self.first} and {self.second}: losses {self.losses[0]:.7g} and {self.losses[1]:.7g}, gradients "
            f"{self.gradient:.1g} of their norm apart: {said}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The comparison as `--json` prints it."""
        return {**asdict(self), "equal": self.equal, "sentence": self.sentence()}


@dataclass(frozen=True)
class SelfCheck:
    """What was compared, and why anything was not."""

    compared: tuple[Compared, ...]
    left_out: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing differs by more than rounding."""
        return all(found.equal for found in self.compared)

    def as_dict(self) -> dict[str, Any]:
        """The check as `--json` prints it."""
        return {
            "equal": self.equal,
            "compared": [found.as_dict() for found in self.compared],
            "left_out": list(self.left_out),
        }


def check(recipe: Recipe, inputs: Mapping[str, Any]) -> SelfCheck:
    """Compare what the recipe's own trainer makes of some rows in several batches; nothing is trained or kept.

    `inputs` are the plan, the encodings and the tokenizer of the dataflow. Dropout is off, as it would be different
    noise each time.
    """
    from tunesmith import dataflow
    from tunesmith.data.packing import isolates
    from tunesmith.methods import METHODS
    from tunesmith.methods.ppo_trainer import without_dropout
    from tunesmith.training.find_lr import restored
    from tunesmith.training.fit import arguments

    plan, encodings = inputs["plan"], inputs["encodings"]
    method = METHODS[recipe.method.kind]
    with restored(), tempfile.TemporaryDirectory(prefix="tunesmith-self-check-") as place:
        run = Run(Path(place))
        training, _, _ = method.settled(recipe.method, recipe.training, len(encodings.train))
        given = {
            **arguments(plan, training, recipe.tracking, name="self-check", staging=run.staging),
            "report_to": ["none"], "eval_strategy": "no", "eval_steps": None, "save_strategy": "no",
        }  # fmt: skip
        trainer = dataflow._trainer(recipe, run, dataflow._tokenizer(recipe)[0], plan, encodings, None, given)
        if trainer.splits not in ("rows", "pairs"):
            why = "the loss of a row depends on the others of its batch, or on what the model draws"
            return SelfCheck(
                (), (f"{recipe.method.kind}: {why}, so batches of another size have another loss",)
            )
        without_dropout(trainer.model)
        trainer.compute_loss_context_manager = (
            trainer.accelerator.autocast
        )  # as a prepared model brings it along
        precision = {"fp16": "float16", "bf16": "bfloat16"}.get(plan.mixed_precision, plan.dtype)
        bound = BOUNDS.get(precision, BOUNDS["bfloat16"])
        numbers = _spread(encodings.train.lengths, in_pairs=method.in_pairs)
        rows = [trainer.train_dataset[n] for n in numbers]
        half = (len(rows) + 1) // 2
        whole = _gradient(trainer, [trainer.data_collator(rows)])
        halves = _gradient(
            trainer, [trainer.data_collator(part) for part in (rows[:half], rows[half:]) if part]
        )
        names = f"{len(rows)} rows at once", f"{half} + {len(rows) - half} accumulated"
        compared, left_out = [_compared(*names, whole, halves, bound)], []
        if not recipe.method.can_pack:
            left_out.append(f"packing: rows of the method '{recipe.method.kind}' stay rows of their own")
        elif not isolates(trainer.model):
            left_out.append(f"packing: {type(trainer.model).__name__} does not keep packed examples apart")
        else:
            packed = _gradient(trainer, [_packed(trainer, rows)])
            compared.append(_compared("padded", "packed", whole, packed, bound))
    return SelfCheck(tuple(compared), tuple(left_out))


def _spread(lengths: Any, *, in_pairs: bool) -> list[int]:
    """Numbers of rows evenly spread over the lengths, so that there is padding where there can be any."""
    sizes = [int(n) for n in (lengths[::2] if in_pairs else lengths)]
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    count = min(ROWS, len(order))
    return [order[round(place * (len(order) - 1) / max(count - 1, 1))] for place in range(count)]


def _packed(trainer: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows in two blocks."""
    from tunesmith.data.packing import packed_batch

    tokenizer = trainer.processing_class
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    blocks = [[(list(row["input_ids"]), list(row["labels"])) for row in rows[start::2]] for start in (0, 1)]
    flatten = str(trainer.model.config._attn_implementation).startswith("flash")
    return packed_batch([block for block in blocks if block], pad, flatten=flatten)


def _gradient(trainer: Any, batches: Sequence[Any]) -> tuple[float, dict[str, Any]]:
    """Loss and gradient of a step on these batches, as the trainer takes one."""
    import torch

    device = trainer.args.device
    trainer.model.zero_grad()
    taken, items = trainer.get_batch_samples(iter(batches), len(batches), device)
    trainer.current_gradient_accumulation_steps = len(taken)
    loss = sum(float(trainer.training_step(trainer.model, batch, items)) for batch in taken)
    found = {
        name: p.grad.detach().to("cpu", torch.float64)
        for name, p in trainer.model.named_parameters()
        if p.grad is not None
    }
    trainer.model.zero_grad()
    return loss, found


def _compared(
    first: str,
    second: str,
    one: tuple[float, dict[str, Any]],
    other: tuple[float, dict[str, Any]],
    bound: float,
) -> Compared:
    size = sum(float((g * g).sum()) for g in one[1].values()) ** 0.5
    apart = sum(float(((g - other[1][name]) ** 2).sum()) for name, g in one[1].items()) ** 0.5
    return Compared(first, second, (one[0], other[0]), apart / size if size else apart, bound)
