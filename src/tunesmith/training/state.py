"""What a checkpoint holds beside the weights: optimizer, schedule, loss scale, random numbers and the loop's own sums.

Two files, and no pickle: `training_state.json` with every number and name, and `training_state.safetensors` with
the tensors that it names. What is read back is equal to the bit, in its own type.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tunesmith import ranks
from tunesmith.errors import MissingExtra, RunError
from tunesmith.training import sharding

NUMBERS, TENSORS = "training_state.json", "training_state.safetensors"

LOOP = (
    "_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step", "_metrics",
    "_total_train_tokens", "_stored_metrics", "_same", "_measures", "_micro_rows", "_owes_evaluation",
)  # fmt: skip
"""Sums that the trainers keep from step to step: the loss since the last log, measures not logged yet, tokens; the
rows of a forward pass that memory was enough for; and whether a validation was broken off by a stop."""


APART = 1_000_003
"""What the seeds of two processes differ by: more than anybody counts seeds up."""

QUANTIZED = {"OptimState8bit": "subclass_8bit", "OptimState4bit": "subclass_4bit"}
"""Tensors of torchao's optimizers that are several in one, and where in its `optim` they are."""


def packed(tree: Any, tensors: dict[str, torch.Tensor], name: str = "") -> Any:
    """A nested state as what JSON can hold; tensors are moved into `tensors` under their place in it.

    Raises TypeError for an object that is neither a number, a text, a tensor nor made of these.
    """
    match tree:
        case None | bool() | int() | float() | str():
            return tree
        case torch.Tensor() if type(tree).__name__ in QUANTIZED:
            parts, attributes = cast(Any, tree).__tensor_flatten__()
            return {
                "quantized": type(tree).__name__,
                "parts": {part: packed(getattr(tree, part), tensors, f"{name}.{part}") for part in parts},
                "attributes": packed(list(attributes), tensors, name),
            }
        case torch.dtype():
            return {"type": str(tree).removeprefix("torch.")}
        case torch.Tensor():
            tensors[name] = tree.detach()
            return {"tensor": name}
        case np.ndarray():
            return {"array": tree.tolist(), "dtype": str(tree.dtype)}
        case np.generic():
            return tree.item()
        case Mapping():
            return {
                "items": [[packed(k, tensors), packed(v, tensors, f"{name}.{k}")] for k, v in tree.items()]
            }
        case list() | tuple():
            kind = "list" if isinstance(tree, list) else "tuple"
            return {kind: [packed(value, tensors, f"{name}.{place}") for place, value in enumerate(tree)]}
        case _:
            raise TypeError(f"{name} is a {type(tree).__name__}, which no checkpoint of ours can hold")


def unpacked(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The state that `packed` was given."""
    match tree:
        case {"tensor": name}:
            return tensors[name]
        case {"quantized": kind, "parts": parts, "attributes": attributes}:
            return _quantized(
                kind,
                {name: unpacked(part, tensors) for name, part in parts.items()},
                unpacked(attributes, tensors),
            )
        case {"type": name}:
            kind = getattr(torch, name)
            if not isinstance(kind, torch.dtype):
                raise TypeError(f"torch.{name} is no type of a tensor")
            return kind
        case {"array": values, "dtype": dtype}:
            return np.array(values, dtype=dtype)
        case {"items": pairs}:
            return {unpacked(key, tensors): unpacked(value, tensors) for key, value in pairs}
        case {"list": values}:
            return [unpacked(value, tensors) for value in values]
        case {"tuple": values}:
            return tuple(unpacked(value, tensors) for value in values)
        case _:
            return tree


def _quantized(kind: str, parts: Mapping[str, torch.Tensor], attributes: Sequence[Any]) -> torch.Tensor:
    """A tensor of torchao's optimizers. Raises RunError for another one, and MissingExtra without the package."""
    if kind not in QUANTIZED:
        raise RunError(f"A checkpoint of ours holds no tensor of the kind '{kind}'.")
    try:
        from torchao import optim  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise MissingExtra("torchao", "The checkpoint's optimizer", install="'tunesmith[gpu]'") from None
    module = importlib.import_module(f"{optim.__name__}.{QUANTIZED[kind]}")
    made: torch.Tensor = getattr(module, kind).__tensor_unflatten__(dict(parts), attributes)
    return made


def write(trainer: Any, folder: Path) -> None:
    """Write all of a trainer's state but the weights and its log into a checkpoint's folder.

    All processes of a run call it; the first one writes, with the random numbers of each.
    """
    scaler = getattr(trainer.accelerator, "scaler", None)
    random_numbers = ranks.gathered(randomness())
    loop = {name: getattr(trainer, name) for name in LOOP if hasattr(trainer, name)}
    if ranks.count() > 1 and isinstance(loop.get("_tr_loss"), torch.Tensor):
        # Each has a part of it, and the log takes their mean.
        [total] = ranks.summed([float(loop["_tr_loss"])])
        loop["_tr_loss"] = torch.full_like(loop["_tr_loss"], total / ranks.count())
    if not ranks.is_first() and not trainer.sharding:
        return
    state = {
        "optimizer": None if trainer.is_deepspeed_enabled else trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "random": random_numbers if ranks.count() > 1 else random_numbers[0],
        "loop": loop,
    }
    found: dict[str, torch.Tensor] = {}
    tree = packed(state, found, "state")
    if trainer.sharding:
        sharding.write(trainer, folder, found)
        if ranks.is_first():
            (folder / NUMBERS).write_text(json.dumps({"format": 1, **tree}), encoding="utf-8")
        return
    # Safetensors refuses tensors that share memory: the 8-bit optimizers have one table for all parameters.
    places: set[int] = set()
    for name, tensor in found.items():
        whole = tensor.contiguous()
        if whole.numel() and whole.untyped_storage().data_ptr() in places:
            whole = whole.clone()
        places.add(whole.untyped_storage().data_ptr())
        found[name] = whole
    save_file(found, folder / TENSORS)
    (folder / NUMBERS).write_text(json.dumps({"format": 1, **tree}), encoding="utf-8")


def read(folder: Path, optimizer: Any = None) -> dict[str, Any]:
    """The state in a checkpoint's folder; of one in shares, `optimizer`'s parameters say which are this process's.
    Raises RunError where there is none of this format, or none that `write` has made."""
    try:
        text = (folder / NUMBERS).read_text(encoding="utf-8")
        is_sharded = sharding.is_sharded(folder)
        tensors = sharding.read_states(optimizer, folder) if is_sharded else load_file(folder / TENSORS)
    except OSError as error:
        raise RunError(
            f"{folder.name} has no state of optimizer and random numbers, so nothing can be continued from it exactly.",
            found=f"{Path(str(error.filename)).name if error.filename else error} is missing",
            fix="Continue from another checkpoint, or start a new run from its weights with --base-model.",
        ) from None
    except (SafetensorError, ValueError) as error:
        raise _not_ours(folder, str(error)) from None
    try:
        tree = json.loads(text)
        state: dict[str, Any] = unpacked(tree, tensors)
        missing = PARTS - state.keys()
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _not_ours(folder, f"{type(error).__name__}: {error}") from None
    if missing or not isinstance(state["loop"], Mapping):
        raise _not_ours(folder, f"no {', '.join(sorted(missing) or ['loop'])}")
    return state


PARTS = {"optimizer", "scheduler", "scaler", "random", "loop"}
"""What a state has."""


def _not_ours(folder: Path, found: str) -> RunError:
    return RunError(
        f"{folder.name} has a state of optimizer and random numbers that tunesmith did not write.",
        found=found[:200],
        fix="Continue from another checkpoint, or start a new run from its weights with --base-model.",
    )


def restore_optimizer(trainer: Any, state: Mapping[str, Any]) -> None:
    """Give optimizer, schedule and loss scale back what they had, every tensor in its own type."""
    optimizer, saved = trainer.optimizer, state["optimizer"]
    if saved is None:  # of DeepSpeed, which has its own
        trainer.lr_scheduler.load_state_dict(state["scheduler"])
        return
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters) if trainer.sharding else ():
        own = saved["state"].get(number, {})
        own.update(
            {
                name: sharding.shared_like(v, parameter)
                for name, v in own.items()
                if isinstance(v, torch.Tensor)
            }
        )
    try:
        optimizer.load_state_dict(saved)
    except (ValueError, KeyError) as error:
        raise RunError(
            "The checkpoint's optimizer is not of the parameters that the recipe trains.", found=str(error)
        ) from None
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        # torch brings the state into the parameter's type, in which what was kept in float32 loses digits.
        own = inner.state.get(parameter, {})
        for name, value in saved["state"].get(number, {}).items():
            if isinstance(value, torch.Tensor) and own[name].dtype != value.dtype:
                own[name] = value.to(own[name].device)
    trainer.lr_scheduler.load_state_dict(state["scheduler"])
    scaler = getattr(trainer.accelerator, "scaler", None)  # none where a run on a GPU is continued on a CPU
    if state["scaler"] and scaler is not None:
        scaler.load_state_dict(state["scaler"])


def restore_loop(trainer: Any, state: Mapping[str, Any]) -> None:
    """Give the loop its sums back, and the random numbers their places."""
    for name, value in state["loop"].items():
        if name not in LOOP:  # a stranger's would set anything
            continue
        own = getattr(trainer, name, None)
        if isinstance(value, torch.Tensor):
            value = value.to(trainer.args.device)
        if isinstance(own, dict):
            _refill(own, value)
        else:
            setattr(trainer, name, value)
    found = state["random"] if isinstance(state["random"], list) else [state["random"]]
    if ranks.number() < len(found):
        set_randomness(found[ranks.number()])
    else:  # there were fewer processes
        seed_apart(trainer.args.seed + trainer.state.global_step)


def seed_apart(seed: int) -> None:
    """Have each process but the first draw random numbers of its own: dropout is not to fall on the same places."""
    if ranks.number():
        torch.manual_seed(seed + APART * ranks.number())


def _refill(own: dict[Any, Any], saved: Mapping[Any, Any]) -> None:
    """Put saved values into a dictionary that may make missing entries by itself, at any depth."""
    for key, value in saved.items():
        if isinstance(value, dict) and (key in own or isinstance(own, defaultdict)):
            _refill(own[key], value)
        else:
            own[key] = value
    for key in own.keys() - saved.keys():
        del own[key]


def randomness() -> dict[str, Any]:
    """Where the random numbers of Python, numpy, torch and its device stand."""
    found = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        found["mps"] = torch.mps.get_rng_state()
    return found


def set_randomness(found: Mapping[str, Any]) -> None:
    """Put the random numbers back to where they stood; those of a device that is not here are left."""
    random.setstate(found["python"])
    np.random.set_state(found["numpy"])
    torch.set_rng_state(found["torch"])
    if "cuda" in found and torch.cuda.device_count() == len(found["cuda"]):
        torch.cuda.set_rng_state_all(found["cuda"])
    if "mps" in found and torch.backends.mps.is_available():
        torch.mps.set_rng_state(found["mps"])


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever draws random numbers in here leaves those of training where they were."""
    before = randomness()
    try:
        yield
    finally:
        set_randomness(before)
