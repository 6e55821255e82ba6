"""Products of states and weights in float32 by the faster of the two libraries that torch has for them.

On a CPU torch multiplies float32 by MKL, whose kernels for AVX-512 are for Intel's processors. oneDNN makes its own for
the processor that it finds: measured on an AMD with AVX-512, a layer's products of the forward pass and of the states'
gradients take 10 to 25 % less time, with AVX2 as much (decision 0012). Gradients of weights stay with MKL: oneDNN wants
what it reads turned around first, which costs what it gains.

It is taken on request (`ASKED`), as it costs memory that grows with the tokens of a batch and that a plan does not
foretell: 70 to 270 MB of 1,000 to 2,300 with 4,000 tokens. oneDNN also keeps what it has made for a thousand shapes of
matrices, and every batch has a length of its own: it is told to keep as many as one batch takes (`KEPT`).
"""

from __future__ import annotations

import os
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunesmith.forward.activations import Restore

LEAST = 32
"""Rows from which on it is faster: a few are limited by how quickly the weights are read."""
NARROW = 64
"""Width up to which MKL keeps its lead: a LoRA's inner one."""
ASKED = "TUNESMITH_ONEDNN"
"""Variable of the environment that asks for it, by 1."""
KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
"""Variables by which oneDNN and torch's side of it are told, before their first product, how many shapes to keep."""


@cache
def is_faster() -> bool:
    """Whether oneDNN is asked for, and faster on this processor."""
    if os.environ.get(ASKED) != "1":
        return False
    for name, value in KEPT.items():
        os.environ.setdefault(name, value)
    onednn: Any = torch.backends.mkldnn
    return bool(onednn.is_available()) and torch.backends.cpu.get_cpu_capability() == "AVX512"


def quicken(model: nn.Module) -> list[Restore]:
    """Have a model's plain linear layers multiply by oneDNN where that is faster; what undoes it."""
    changed = []
    for module in model.modules() if is_faster() else ():
        turned = type(module).__name__ == "Conv1D"  # GPT-2's, whose weights are (in, out)
        if (turned or type(module) is nn.Linear) and "forward" not in vars(module):
            module.forward = partial(_linear, module, module.forward, turned)
            changed.append(Restore(module))
    return changed


def takes(states: Tensor, weight: Any) -> bool:
    """Whether a product of states `(..., in)` with a weight is one of those that are faster so."""
    return (
        is_faster()
        and type(weight) in (nn.Parameter, Tensor)
        and weight.device.type == states.device.type == "cpu"
        and weight.dtype == states.dtype == torch.float32
        and states.numel() >= LEAST * states.shape[-1]
        and min(weight.shape) > NARROW
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def product(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`states` (..., in) times the weights (out, in), which may be laid out either way, by oneDNN."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return found


def _linear(module: Any, theirs: Any, turned: bool, states: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    if not takes(states, weight):
        return theirs(states)  # type: ignore[no-any-return]
    apply: Any = _Linear.apply
    found: Tensor = apply(states, weight, bias, turned)
    return found


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> Tensor:
        ctx.save_for_backward(states if ctx.needs_input_grad[1] else None, weight)
        ctx.turned = turned
        return product(states, weight.t() if turned else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        [slope] = given
        states, weight = ctx.saved_tensors
        of_states = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_states = product(slope, weight if ctx.turned else weight.t())
        flat = slope.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            rows = states.flatten(0, -2)
            of_weight = rows.t() @ flat if ctx.turned else flat.t() @ rows
        if ctx.needs_input_grad[2]:
            of_bias = flat.sum(0)
        return of_states, of_weight, of_bias, None
