"""How several processes hold a model: what goes with it, what each of them then holds, and DeepSpeed's configuration.

ddp        everything in every process
fsdp       a share of weights, gradients and optimizer states in each, a layer gathered when it is run
deepspeed  ZeRO: optimizer states (stage 1), gradients too (2), weights too (3) in shares
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith import scaling
from tunesmith.errors import MissingExtra, OutOfResources, RecipeError
from tunesmith.plan import Decision, Plan
from tunesmith.recipe import DDP, FSDP, PRINCIPAL, DeepSpeed, Parallel, Recipe, Training

SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Optimizers that update each number by itself, so that a share of a weight is updated as the whole is."""
HALF = 0.5
"""Share of a GPU that weights, gradients and states may take before the next stage of ZeRO spreads more of them."""


def check(recipe: Recipe, processes: int) -> None:
    """Raises RecipeError for what does not go with weights in shares, with the reason."""
    section = recipe.parallel
    if isinstance(section, DDP) or processes == 1:
        return
    training, start = recipe.training, getattr(recipe.adapter, "init", "")
    own = training.optimizer not in SHARDED_OPTIMIZERS
    is_ahead = getattr(recipe.method, "reference", None) == "precomputed"
    reasons: list[tuple[object, str, str]] = [
        (
            training.measured,
            "training.eval_metrics and training.best_by",
            "no process has the whole model to ask",
        ),
        (
            start in PRINCIPAL,
            f"adapter.init {start}",
            "it is saved by taking its start from the whole weights",
        ),
        (training.cache_frozen, "training.cache_frozen", "each process would skip other layers"),
        (training.compile, "training.compile", "it was not tried on weights in shares"),
        (training.mixed_precision == "fp16", "fp16", "its loss scaler sees the gradients of one share only"),
        (
            own,
            f"training.optimizer {training.optimizer}",
            f"of {', '.join(SHARDED_OPTIMIZERS)} a share is enough",
        ),
        (is_ahead, "method.reference precomputed", "the reference is asked before the weights are in shares"),
    ]
    found = [f"{name} ({why})" for is_so, name, why in reasons if is_so]
    if found:
        raise RecipeError(
            f"parallel.kind {section.kind} in {processes} processes does not go with "
            + "; ".join(found)
            + ".",
            fix="Leave that out, or train with parallel.kind ddp, which holds the whole model in every process.",
        )


def check_device(section: Parallel, processes: int, device: str, *, is_here: bool) -> None:
    """Raises OutOfResources where ZeRO cannot train on a device, and MissingExtra without its package."""
    if not isinstance(section, DeepSpeed) or processes == 1:
        return
    if device not in ("cuda", "cpu"):
        raise OutOfResources(
            "DeepSpeed trains on CUDA devices and CPUs here.",
            found=f"device '{device}'",
            fix="Use parallel.kind fsdp, which spreads the same on every device.",
        )
    if is_here and importlib.util.find_spec("deepspeed") is None:
        raise MissingExtra("deepspeed", "parallel.kind deepspeed", install="'tunesmith[deepspeed]'")


def decided(section: Parallel, processes: int, device: str, training: Training) -> list[Decision]:
    """What to know of how the processes hold the model."""
    if processes == 1:
        if isinstance(section, DDP):
            return []
        return [
            Decision(
                "parallel", "one process", f"parallel.kind {section.kind} is of several, and this is one"
            )
        ]
    if isinstance(section, DDP):
        return [
            Decision("parallel", "ddp", "every process holds the whole model, and gradients are averaged")
        ]
    if isinstance(section, DeepSpeed):
        return [
            Decision(
                "parallel", "deepspeed", "the recipe's; checkpoints are continued by as many processes only"
            ),
            Decision(
                "not a number",
                "less guarded",
                "DeepSpeed updates by itself: a loss that is no number is noticed after its update, gradients are not "
                "looked at, and of stage 3 no weights",
            ),
        ]
    found = [Decision("parallel", "fsdp", f"each process holds 1/{processes} of what it would hold alone")]
    if section.cpu_offload and device == "cpu":
        found.append(Decision("cpu_offload", "off", "shares are in the machine's memory anyway"))
    if section.reduce_dtype != "float32" and training.mixed_precision != "bf16":
        found.append(Decision("reduce_dtype", "float32", "gradients are sums of float32 without bf16"))
    return found


STAGES = {
    1: "optimizer states are spread over the processes",
    2: "optimizer states and gradients are spread over the processes",
    3: "optimizer states, gradients and weights are spread over the processes; each GPU holds the whole model at first",
}
"""What each stage of ZeRO spreads."""

# What each process holds


@dataclass(frozen=True)
class Model:
    """The bytes that a process would hold alone, and those that are gathered at once."""

    weights: int
    trained: int
    """Of the trained weights, and so of their gradients."""
    states: int
    layer: int
    """Of the weights of the largest layer."""
    rest: int
    """Of the weights outside of the layers: embeddings, head, norms."""
    packed: int = 0
    """Of the weights that are packed in 4 bits, which cannot be cut; neither `layer` nor `rest` has them."""


def stage(section: DeepSpeed, model: Model, processes: int, capacity: int) -> int:
    """The stage of ZeRO: the recipe's, else the lowest with which a process has room for activations."""
    if section.stage:
        return section.stage
    if section.offload_parameters:
        return 3
    for number in (1, 2):
        states = 0 if section.offload_optimizer else model.states / processes
        gradients = model.trained / (processes if number == 2 else 1)
        if model.weights + gradients + states <= HALF * capacity:
            return number
    return 3


def held(
    section: Parallel,
    model: Model,
    parts: Mapping[str, int],
    *,
    processes: int,
    capacity: int,
    lower: bool = False,
    device: str = "cuda",
) -> dict[str, int]:
    """Bytes by part in one of several processes, from those that it would hold alone. `lower` says that float32 weights
    are sent in bfloat16. On a CPU nothing is held elsewhere between its uses. What is answered and written outside of
    the steps is the first process's alone."""
    found = dict(parts)
    if processes == 1 or "cache" in parts:
        return found
    number = stage(section, model, processes, capacity) if isinstance(section, DeepSpeed) else None
    own = scaling.parts(
        mode(section, number),
        processes,
        weights=parts["weights"],
        gradients=parts.get("gradients", 0),
        moments=parts.get("optimizer", 0),
        layer=model.layer,
        rest=model.rest,
        packed=model.packed,
        sends=HALF if lower and not isinstance(section, DDP) else 1.0,
    )
    found |= {"weights": int(own.weights), "optimizer": int(own.moments), "gathered": int(own.gathered)}
    if "gradients" in parts:
        found |= {"gradients": int(own.gradients), "buckets": int(own.buckets)}
    elsewhere = offloads(section, device)
    if elsewhere:
        found["optimizer"] = 0
    if elsewhere and elsewhere != ["parallel.offload_optimizer"]:
        found["weights"], found["gradients"] = model.packed, 0
    return {name: size for name, size in found.items() if size}


def mode(section: Parallel, number: int | None = None) -> str:
    """How a section divides the work, as `scaling.MODES` names it; `number` is the stage of ZeRO."""
    if isinstance(section, DeepSpeed):
        return {1: "zero-1", 2: "zero-2"}.get(number or 3, "fsdp")
    if isinstance(section, FSDP) and not section.reshard_after_forward:
        return "fsdp-kept"
    return section.kind


def offloads(section: Parallel, device: str) -> list[str]:
    """Fields of a section by which something is kept in the machine's memory between its uses on such a device."""
    if isinstance(section, FSDP):
        return ["parallel.cpu_offload"] if section.cpu_offload and device != "cpu" else []
    if isinstance(section, DeepSpeed):
        named = ("offload_optimizer", "offload_parameters")
        return [f"parallel.{name}" for name in named if getattr(section, name)]
    return []


# DeepSpeed


def configuration(section: DeepSpeed, number: int, plan: Plan, training: Training) -> dict[str, Any]:
    """DeepSpeed's configuration of a stage, for transformers' Trainer; `training` is what one process takes of a step.

    Optimizer and schedule stay the Trainer's. Raises RecipeError where the stage cannot have what is asked.
    """
    if section.offload_parameters and number != 3:
        raise RecipeError("parallel.offload_parameters is of ZeRO's stage 3.", found=f"stage {number}")
    zero: dict[str, Any] = {"stage": number, "overlap_comm": True, "contiguous_gradients": True}
    place = {"device": "cpu", "pin_memory": True}
    if section.offload_optimizer:
        zero["offload_optimizer"] = place
    if number == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        if section.offload_parameters:
            zero["offload_param"] = place
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": plan.mixed_precision == "bf16"},
        "fp16": {"enabled": plan.mixed_precision == "fp16"},
        "gradient_clipping": training.max_grad_norm,
        "train_micro_batch_size_per_gpu": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "train_batch_size": plan.batch_size,
    }
