"""What layers keep for their backward pass: what they cannot work out again from the rest in a few passes over it.

Autograd keeps what every single operation needs: of a norm its input, the scaled input and the output; of a gated layer
the gate, its activation, what goes through it and the product; of GPT-2's activation seven steps on the way to it. Here
norms and gates keep what they were given (`keep_less`), and layers behind them that would keep their results keep a way
to them (`keeping`): about half of a Llama's activations are spared. The forward pass is the model's own code, so
that its numbers, and those that are worked out again, are the stock ones to the bit, but for GPT-2's activation.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from functools import cached_property, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

aten: Any = torch.ops.aten

SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "GELUActivation": aten.gelu_backward,
    "GELUTanh": partial(aten.gelu_backward, approximate="tanh"),
    "NewGELUActivation": partial(aten.gelu_backward, approximate="tanh"),
    "SiLUActivation": aten.silu_backward,
}
"""By an activation's class, its gradient given that of its output, and its input."""
IN_STEPS = "NewGELUActivation"
"""The tanh approximation of GELU in single steps, which torch has as one (arXiv 1606.08415)."""
GATES = ("gate_proj", "gate_up_proj", "wi_0")
"""Parts of a layer whose activation is multiplied with another part."""


class Restore:
    """Gives a module that has just got another forward its own one back."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.given = module, vars(module)["forward"]

    def remove(self) -> None:
        """Do it, unless somebody has put another one there meanwhile."""
        if vars(self.module).get("forward") is self.given:
            del self.module.forward


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass through which there is no other one: whoever asks for second derivatives gets an error, not
    numbers that lack a part."""

    @wraps(backward)
    def checked(ctx: Any, *given: Any) -> Any:
        if torch.is_grad_enabled():  # by create_graph alone
            raise RuntimeError(
                "The fast forward has no second derivatives (create_graph=True); `--set training.forward=stock` has."
            )
        return backward(ctx, *given)

    return checked


def keep_less(model: nn.Module) -> list[Restore]:
    """Have a model's norms and activations keep no more than they have to; what undoes it.

    Modules whose forward somebody else has replaced (Liger's kernels) stay as they are, as do those of other kinds.
    """
    changed = []
    for module in list(model.modules()):
        gated = any(hasattr(module, name) for name in GATES)
        for part in module.children():
            forward = _sparing(part, gated)
            if forward and "forward" not in vars(part):
                part.forward = forward
                changed.append(Restore(part))
    return changed


def _sparing(module: nn.Module, gated: bool) -> Callable[[Tensor], Any] | None:
    """A forward that keeps less, where there is one."""
    kind, theirs = type(module).__name__, module.forward
    if kind.endswith("RMSNorm") or kind == "T5LayerNorm":
        return partial(_normed, module, theirs, 1.0 if kind.startswith("Gemma") else 0.0)
    if kind == IN_STEPS:
        theirs = partial(functional.gelu, approximate="tanh")
    if gated and kind in SLOPES:
        return partial(_activated, module, theirs, SLOPES[kind])
    return theirs if kind == IN_STEPS else None


_ways: dict[int, tuple[weakref.ref[Tensor], int, Callable[[], Tensor]]] = {}
"""By storage the tensor that has it, its version, and a way to it."""


def remember(tensor: Tensor, way: Callable[[], Tensor]) -> None:
    """Have the tensor not be kept for a backward pass, as there is a way to it.

    What the way holds is held as long as what would have kept the tensor.
    """
    place: int = tensor.untyped_storage()._cdata

    def gone(which: weakref.ref[Tensor]) -> None:
        if (known := _ways.get(place)) and known[0] is which:
            del _ways[place]

    _ways[place] = (weakref.ref(tensor, gone), tensor._version, way)


def _pack(tensor: Tensor) -> Any:
    place = tensor.untyped_storage()._cdata
    if known := _ways.get(place):
        # While the remembered tensor lives and has its storage, no other can have it; it may have been written into.
        there, version, way = known
        same = there()
        is_there = same is not None and same.untyped_storage()._cdata == place
        if is_there and same._version == version and same.dtype == tensor.dtype:  # type: ignore[union-attr]
            return way, tensor.size(), tensor.stride(), tensor.storage_offset()
    # Without its graph: an operation that keeps its own result would else keep itself, and all before it, for good.
    return tensor.detach(), tensor._version


def _unpack(kept: Any) -> Tensor:
    if len(kept) == 2:
        tensor, version = kept
        if tensor._version != version:  # autograd looks only where there are no hooks
            raise RuntimeError(
                "A tensor that the backward pass needs was written into after it had been kept."
            )
        return tensor  # type: ignore[no-any-return]
    way, shape, strides, offset = kept
    with torch.no_grad():
        found: Tensor = way().as_strided(shape, strides, offset)
    return found


def keeping() -> contextlib.AbstractContextManager[None]:
    """In here, tensors to which there is a way are not kept for the backward pass by whatever takes them.

    Nothing changes where somebody else sees to what is kept, as a checkpoint around all of it does: of several torch
    asks the innermost alone.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return contextlib.nullcontext()
    return saved_tensors_hooks(_pack, _unpack)


def records() -> bool:
    """Whether autograd records what is computed now, and nobody compiles it."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _normed(module: Any, theirs: Callable[[Tensor], Tensor], base: float, states: Tensor) -> Tensor:
    if not records():
        return theirs(states)
    epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
    apply: Any = _Norm.apply
    found: Tensor = apply(states, module.weight, base, epsilon, theirs)
    if found.requires_grad:
        remember(found, partial(_norm_again, found.grad_fn))
    return found


def _norm_again(node: Any) -> Tensor:
    if node.met is None:
        node.met = node.theirs(node.saved_tensors[0])
    found: Tensor = node.met
    return found


def _activated(
    module: nn.Module,
    theirs: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor, Tensor], Tensor],
    gate: Tensor,
) -> Any:
    is_watched = module._backward_hooks or module._backward_pre_hooks  # which are given tensors
    if is_watched or not records():
        return theirs(gate)
    return Gate(gate, theirs, slope)


class _Norm(torch.autograd.Function):
    """x / rms(x) * (base + weight) over the last dimension (arXiv 1910.07467)."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        base: float,
        epsilon: float,
        theirs: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(states, weight)
        ctx.base, ctx.epsilon, ctx.theirs = base, epsilon, theirs
        ctx.met = None  # the output, from when it is worked out again until all that take it are through
        return theirs(states)

    @staticmethod
    @first_order
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        # With r = 1 / rms(x), n = x r and h the gradient times the factor, dx = r (h - n mean(h n)).
        ctx.met = None
        states, weight = ctx.saved_tensors
        factor = weight.float() + ctx.base if ctx.base else weight.float()
        exact, slope = states.float(), given[0].float()
        width = exact.shape[-1]
        scale = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        scale = scale.square_().div_(width).add_(ctx.epsilon).rsqrt_()
        normed = exact * scale
        pulled = slope * normed
        of_weight = pulled.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None, None, None
        mean = (pulled @ factor).div_(width).unsqueeze(-1)
        found = torch.mul(slope, factor, out=pulled).addcmul_(normed, mean, value=-1).mul_(scale)
        return found.to(states.dtype), of_weight, None, None, None


class Gate:
    """An activation that waits for what it is multiplied with; to all else it is the tensor that it stands for."""

    def __init__(
        self, gate: Tensor, theirs: Callable[[Tensor], Tensor], slope: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self.gate, self.theirs, self.slope = gate, theirs, slope

    @cached_property
    def tensor(self) -> Tensor:
        """The activation itself."""
        return self.theirs(self.gate)

    def __mul__(self, other: Any) -> Any:
        gate = self.gate
        if not isinstance(other, Tensor) or (other.shape, other.dtype) != (gate.shape, gate.dtype):
            return self.tensor * other
        apply: Any = _Gated.apply
        found: Tensor = apply(gate, other, self.theirs, self.slope)
        if found.requires_grad:
            remember(found, partial(_product_again, found.grad_fn))
        return found

    __rmul__ = __mul__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Of torch's functions the product is taken as above, the others of the tensor."""
        if function in PRODUCTS and len(args) == 2 and not kwargs:
            one, other = args
            return one * other if isinstance(one, cls) else other * one

        def plain(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(map(plain, value))
            return value.tensor if isinstance(value, cls) else value

        return function(*plain(args), **{name: plain(value) for name, value in (kwargs or {}).items()})


PRODUCTS = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}


def _product_again(node: Any) -> Tensor:
    if node.met is None:
        gate, through = node.saved_tensors
        active = node.theirs(gate)
        node.met = (active, active * through)
    found: Tensor = node.met[1]
    return found


class _Gated(torch.autograd.Function):
    """An activation of the gate, times what goes through it (arXiv 2002.05202)."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        through: Tensor,
        theirs: Callable[[Tensor], Tensor],
        slope: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(gate, through)
        ctx.theirs, ctx.slope = theirs, slope
        ctx.met = None  # activation and product, from when they are worked out again
        return theirs(gate).mul_(through)

    @staticmethod
    @first_order
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        gate, through = ctx.saved_tensors
        met, ctx.met = ctx.met, None
        of_gate = ctx.slope(given[0] * through, gate) if ctx.needs_input_grad[0] else None
        of_through = None
        if ctx.needs_input_grad[1]:
            of_through = (ctx.theirs(gate) if met is None else met[0]).mul_(given[0])
        return of_gate, of_through, None, None
