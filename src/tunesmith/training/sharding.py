"""Weights, gradients and optimizer states in shares: each of several processes holds a part of every tensor (FSDP2).

    mark (the model is loaded) -> Trainer.__init__ (nothing is moved or wrapped) -> weights of a checkpoint
        -> spread (layer by layer) -> optimizer on the shares -> steps -> whole (one tensor at a time) -> final_model

Outside of the steps nothing is sharded: a model is loaded, adapted and saved as in one process. A checkpoint keeps what
training changes in shares, by torch.distributed.checkpoint in safetensors, which any number of processes reads.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tunesmith import ranks
from tunesmith.errors import RunError, TunesmithError, counted, is_lost_peer, is_out_of_memory
from tunesmith.models import layer_stacks
from tunesmith.recipe import FSDP
from tunesmith.training.run import Run

FOLDER = "sharded"
"""Of a checkpoint: what training changes, in shares."""
WEIGHTS = "weights."
"""What the names of weights begin with in it."""
MARK = "_tunesmith_sharding"
"""Attribute of a model that is to be sharded when its training begins, with how."""


def mark(model: nn.Module, section: FSDP) -> None:
    """Have the model be sharded when its training begins."""
    setattr(model, MARK, section)


def of(model: Any) -> FSDP | None:
    """How a model is to be sharded; None where it is not."""
    found: FSDP | None = getattr(model, MARK, None)
    return found


def spread(trainer: Any, section: FSDP, run: Run) -> None:
    """Shard the models of a trainer in place: each layer is gathered when it is run, the rest for the whole pass.

    The hooks of the fast forward stay before those of FSDP's, and see a layer's weights whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    device = trainer.args.device
    mesh = init_device_mesh(device.type, (ranks.count(),))
    offloads = section.cpu_offload and device.type != "cpu"
    lower = torch.bfloat16 if trainer.args.bf16 else None
    given: dict[str, Any] = {
        "mesh": mesh,
        "offload_policy": CPUOffloadPolicy() if offloads else OffloadPolicy(),
        # Autocast decides what is computed in which type; here only what is sent.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=lower,
            reduce_dtype=getattr(torch, section.reduce_dtype) if lower else None,
            cast_forward_inputs=False,
        ),
    }
    others = (getattr(trainer, name, None) for name in ("ref_model", "reference"))
    groups = 0
    for model in (trainer.model, *(other for other in others if isinstance(other, nn.Module))):
        packed = {p for p in model.parameters() if not (p.is_floating_point() or p.is_complex())}
        for p in packed:  # 4-bit weights, which cannot be cut: every process has them whole
            p.data = p.data.to(device)
        for stack in layer_stacks(model):
            for layer in stack:
                fully_shard(
                    layer, **given, reshard_after_forward=section.reshard_after_forward, ignored_params=packed
                )
                groups += 1
        # The root stays gathered from the forward to the backward pass, which begins with the head.
        fully_shard(model, **given, reshard_after_forward=False, ignored_params=packed)
        if packed:
            run.event(
                "decision",
                name="4-bit weights",
                value="whole in every process",
                reason="their packed numbers cannot be cut into shares; the adapter on them is sharded",
            )
    # It owns its placement: nothing is to be wrapped in DDP.
    trainer.is_distributed_loading_by_transformers = True
    held = sum(_local(p).numel() * p.element_size() for p in trainer.model.parameters())
    after = "is gathered again for the backward pass" if section.reshard_after_forward else "stays gathered"
    run.event(
        "decision",
        name="sharding",
        value=f"1/{ranks.count()} in each process",
        reason=f"{counted(groups, 'layer')} and the rest; a layer {after}; {held:,} bytes of weights in this process"
        + (", in the machine's memory between their uses" if offloads else ""),
    )


def _local(tensor: Any) -> torch.Tensor:
    """This process's part of a tensor."""
    found: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return found


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is spread over processes, whole in each of them; all of them ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def parted(model: nn.Module) -> None:
    """Have every group of a sharded model give back what it has gathered, so that its parameters are the shares."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_finite(parameter: torch.Tensor) -> bool:
    """Whether this process's part of a parameter has nothing but numbers."""
    return bool(torch.isfinite(_local(parameter.detach())).all())


def saved_names(model: nn.Module) -> set[str] | None:
    """Which tensors of a model are saved: with an adapter those that are trained; None where all are."""
    if not hasattr(model, "peft_config"):
        return None
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The tensors of a sharded model by name, whole, one gathered after the other, in the first process; None in the
    others, which take part. Of a model with an adapter those that are trained."""
    parted(model)
    wanted = saved_names(model)
    found: dict[str, torch.Tensor] = {}
    once: dict[int, torch.Tensor] = {}  # tied ones stay tied
    for name, value in model.state_dict(keep_vars=True).items():
        if wanted is not None and name not in wanted:
            continue
        if id(value) not in once:
            full = plain(value.detach())
            once[id(value)] = full.cpu() if ranks.is_first() else full.new_empty(0)
        found[name] = once[id(value)]
    return found if ranks.is_first() else None


def check_whole(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Raises RunError where what was saved of a gathered model lacks weights or has empty ones."""
    saved = {name: shape for file in folder.glob("*.safetensors") for name, shape in _shapes(file)}
    empty = [name for name, shape in saved.items() if 0 in shape]
    wrong = [name for name in saved.keys() & state.keys() if list(state[name].shape) != saved[name]]
    wanted = sum(tensor.numel() for tensor in {id(t): t for t in state.values()}.values())
    there = sum(torch.Size(shape).numel() for shape in saved.values())
    if empty or wrong or there < wanted:
        raise RunError(
            f"The weights in {folder} are not whole, so nothing was put in place.",
            found=f"{there:,} of {wanted:,} numbers"
            + (
                f"; {(empty or wrong)[0]} is {'empty' if empty else 'of another shape'}"
                if empty or wrong
                else ""
            ),
            fix="The last checkpoint is whole: `tunesmith resume` goes on from it.",
        )


def _shapes(file: Path) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes in a safetensors file, by its header."""
    with file.open("rb") as content:
        (size,) = struct.unpack("<Q", content.read(8))
        header = json.loads(content.read(size))
    for name, facts in header.items():
        if name != "__metadata__":
            yield name, facts["shape"]


# Checkpoints


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    parted(model)
    return {WEIGHTS + name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def _plainly(what: str) -> Iterator[None]:
    """Raise what a process has met while shares were written or read. torch hands it to all processes in a
    CheckpointException, which is no Exception, so nothing that mends or cleans up would see it."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as wrapped:
        process, (error, _) = next(iter(sorted(wrapped.failures.items())))
        if (
            isinstance(error, TunesmithError | OSError)
            or not isinstance(error, Exception)  # a stop on request
            or is_out_of_memory(error)
            or is_lost_peer(error)
        ):
            raise error from wrapped
        raise RunError(
            f"{what} failed.",
            found=f"process {process}: {type(error).__name__}: {error}",
            fix="What was saved before is whole: `tunesmith resume` goes on from it.",
        ) from wrapped


def write(trainer: Any, folder: Path, states: Mapping[str, torch.Tensor]) -> None:
    """Write trained weights and the optimizer's tensors by name, each process its shares; all of them call it.

    Raises what any process has met, in all of them, and RunError where the first one does not find what the others
    say they have written.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    class Compared(HuggingFaceStorageWriter):
        def finish(self, metadata: Any, results: list[list[Any]]) -> None:
            """In the first process, when all have written."""
            check_there(folder / FOLDER, [part.storage_data.relative_path for own in results for part in own])
            super().finish(metadata, results)

    tensors = {**_trained(trainer.model), **states}
    with _plainly(f"Writing the shares to {folder}"):
        save(tensors, storage_writer=Compared(str(folder / FOLDER), save_distributed=True))


def check_there(folder: Path, written: Sequence[str]) -> None:
    """Raises RunError where the files of a folder are not those that the processes say they wrote, as where each node
    has a disk of its own under the run's path."""
    there, told = {path.name for path in folder.glob("*.safetensors")}, set(written)
    if there != told:
        missing, more = sorted(told - there), sorted(there - told)
        raise RunError(
            f"The files in {folder} are not those that the processes wrote, so this is no checkpoint.",
            found="; ".join(
                f"{counted(len(names), 'file')} {what}: {', '.join(names[:3])}"
                for what, names in (("missing", missing), ("too many", more))
                if names
            ),
            fix="Have all nodes write to one folder that each of them sees (--output-dir).",
        )


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint's tensors are in shares."""
    return (folder / FOLDER).is_dir()


def read_weights(model: nn.Module, folder: Path) -> None:
    """Put the trained weights of a checkpoint into a model that is not sharded yet. Raises RunError where they are
    those of another one."""
    _read(folder, _trained(model), together=False)


def read_states(optimizer: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The optimizer's tensors of a checkpoint by name: those of a share's size as shares like its parameter, else as
    they are."""
    inner = getattr(optimizer, "optimizer", optimizer)
    groups = inner.param_groups if inner is not None else ()
    parameters = [parameter for group in groups for parameter in group["params"]]
    found: dict[str, torch.Tensor] = {}
    for name, facts in _metadata(folder).items():
        if name.startswith(WEIGHTS):
            continue
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        like = parameters[number] if number is not None and number < len(parameters) else None
        if isinstance(like, DTensor) and like.shape == facts.size:
            found[name] = torch.zeros_like(like.detach(), dtype=facts.properties.dtype)
        else:
            found[name] = torch.empty(facts.size, dtype=facts.properties.dtype)
    _read(folder, found, together=any(isinstance(value, DTensor) for value in found.values()))
    return found


def shared_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor of the optimizer as its parameter is: this process's share of it where that is sharded."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # All processes have read the same, so none has to send anything.
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def _metadata(folder: Path) -> Mapping[str, Any]:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder / FOLDER))
    found: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    return found


def _read(folder: Path, into: Mapping[str, torch.Tensor], *, together: bool) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    there = _metadata(folder)
    for name, tensor in into.items():
        facts = there.get(name)
        if facts is None or facts.size != tensor.shape:
            raise RunError(
                f"The checkpoint {folder.name} is not of the weights that the recipe trains.",
                found=f"{name.removeprefix(WEIGHTS)} is {'missing' if facts is None else tuple(facts.size)}, expected "
                f"{tuple(tensor.shape)}",
                fix="Continue with the recipe and the base model that the run was started with.",
            )
    reader = HuggingFaceStorageReader(str(folder / FOLDER))
    with _plainly(f"Reading the shares of {folder.name}"):
        load(dict(into), storage_reader=reader, no_dist=not together)
