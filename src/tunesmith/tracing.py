"""What a training step takes, found out without doing it: the real trainer's step on a model without weights.

Every number of a hollow model is a tensor on torch's meta device, which has shape and type and no content; token ids,
labels and masks stay real, so that what depends on them (which positions are labelled) is as it will be. Storages are
counted as they come and go, and operations by their FLOPs and bytes.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from tunesmith.heap import Block

META = torch.device("meta")
aten = torch.ops.aten

MOVES_NOTHING = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "detach", "alias", "unsqueeze",
    "squeeze", "split", "unbind", "as_strided", "_reshape_alias", "split_with_sizes", "unfold", "diagonal",
}  # fmt: skip
"""Operations that give another view of what is there."""


IN_PLACE = {aten.add, aten.scatter_add, aten.index_add, aten.index_put}
"""Operations of a backward pass that torch has write into their first block, but while a mode like ours is on."""


@dataclass
class _Piece:
    """One storage: its bytes, when it came and went (numbers of operations), and what it is for."""

    size: int
    born: int
    head: bool
    died: float = math.inf
    heir: int = -1
    """The operation whose result takes the place of this block, if that is the last that asks for it."""


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations on hollow numbers and real indices, and keeps count."""

    def __init__(self, *, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary = vocabulary
        self.clock = 0
        """Operations so far."""
        self.pieces: list[_Piece] = []
        self.costs: list[tuple[float, float]] = []
        self._known: dict[int, tuple[Any, _Piece]] = {}
        self.tags: dict[int, str] = {}

    def restart(self) -> None:
        """Forget what was counted so far."""
        self.pieces, self.costs, self.tags = [], [], {}

    def known(self, tensors: Iterable[Any]) -> int:
        """Bytes of tensors that were there before; these are not counted as they are used."""
        found = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
            self._known[storage._cdata] = (storage, _Piece(0, 0, head=False))
        return sum(found.values())

    def tag(self, tensors: Iterable[Any], name: str) -> None:
        """Say what the storages of these tensors are for."""
        for tensor in tensors:
            if entry := self._known.get(tensor.untyped_storage()._cdata):
                self.tags[id(entry[1])] = name

    def live(self, start: int = 0) -> tuple[int, dict[str, int]]:
        """The most bytes that were held at once since a moment, and what they were for then."""
        changes: dict[float, int] = {}
        for piece in self.pieces:
            if piece.died > start:
                begin = max(piece.born, start)
                changes[begin] = changes.get(begin, 0) + piece.size
                changes[piece.died] = changes.get(piece.died, 0) - piece.size
        held, most, at = 0, 0, 0.0
        for moment in sorted(changes):
            held += changes[moment]
            if held > most:
                most, at = held, moment
        parts: dict[str, int] = {}
        for piece in self.pieces:
            if piece.born <= at < piece.died:
                name = self.tags.get(id(piece), "head" if piece.head else "activations")
                parts[name] = parts.get(name, 0) + piece.size
        return most, parts

    def blocks(self) -> list[Block]:
        """What came and went, in the order of coming."""
        return [
            Block(piece.size, piece.born, piece.died, self.tags.get(id(piece)) == "gradients")
            for piece in self.pieces
        ]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        given = dict(kwargs or {})
        tensors = list(_tensors((*args, *given.values())))
        hollow = any(t.device == META for t in tensors)
        packet = func._overloadpacket
        if hollow and packet in (aten._local_scalar_dense, aten.equal, aten.is_nonzero):
            number = tensors[0]
            return 1.0 if packet is aten._local_scalar_dense and number.is_floating_point() else 0
        stays_real = not any(t.is_floating_point() or t.device == META for t in tensors)
        target = given.get("device")
        if target is not None and torch.device(target) == META and stays_real:
            wanted = given.get("dtype")
            numbers = [a for a in args if isinstance(a, float)]
            floats = (
                wanted.is_floating_point
                if wanted is not None
                else (not tensors and packet is not aten.arange)
            )
            if not floats and not (numbers and wanted is None):
                given["device"] = torch.device("cpu")
        if hollow and (target is not None or any(t.device != META for t in tensors)):
            args, given = self._hollowed(packet, args, given)
        out = _computed(func, args, given)
        self._count(packet, func, tensors, args, given, out)
        return out

    def _hollowed(self, packet: Any, args: Sequence[Any], given: dict[str, Any]) -> tuple[Any, Any]:
        """Arguments that all are hollow; masks that select become numbers first, whose count is known."""
        if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) and len(args) > 1:
            chosen: list[Any] = []
            for index in args[1]:
                if isinstance(index, torch.Tensor) and index.dtype == torch.bool and index.device != META:
                    chosen += list(index.nonzero(as_tuple=True))
                else:
                    chosen.append(index)
            args = (args[0], chosen, *args[2:])
        if packet is aten.copy_ and args[0].device != META:
            return (args[0].to(META), *args[1:]), given
        return tree_map(_hollow, args), tree_map(_hollow, given)

    def _count(self, packet: Any, func: Any, tensors: Any, args: Any, given: Any, out: Any) -> None:
        self.clock += 1
        made = list(_tensors((out,)))
        if packet in IN_PLACE and torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled():
            entry = self._known.get(args[0].untyped_storage()._cdata)
            if entry and made and entry[1].size == made[0].untyped_storage().nbytes():
                entry[1].heir = self.clock
        hollow = any(tensor.device == META for tensor in made)
        for tensor in made:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            if not storage.nbytes():
                continue
            piece = _Piece(
                storage.nbytes(), self.clock, head=tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
            )
            self.pieces.append(piece)
            self._known[key] = (weakref.ref(storage, partial(self._gone, key, piece)), piece)
        if packet is aten.bernoulli_ and hollow:
            # On a CPU the draw is made as whole numbers first; the block is gone when the operation ends.
            self.pieces.append(_Piece(4 * args[0].numel(), self.clock, head=False, died=self.clock + 0.25))
        if packet.__name__ in MOVES_NOTHING:
            return
        flops = 0.0
        if packet in flop_registry:
            flops = float(flop_registry[packet](*args, **given, out_val=out))
        elif packet in CPU_ATTENTION:
            flops = CPU_ATTENTION[packet](args)
        if any(t.device == META for t in (*tensors, *made)):
            moved = sum(t.numel() * t.element_size() for t in (*tensors, *made))
            self.costs.append((flops, float(moved)))

    def _gone(self, key: int, piece: _Piece, _: Any) -> None:
        # After the operation that it was last part of, or before, where that one writes into it.
        piece.died = self.clock + (-0.25 if piece.heir == self.clock else 0.5)
        if self._known.get(key, (None, None))[1] is piece:
            del self._known[key]


_Form = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Of a hollow tensor all that there is: sizes, strides, type."""

_FORMS: dict[Any, tuple[_Form, ...] | None] = {}
"""What operations make of hollow tensors, by what they are given; None where it has to be asked each time. The layers
of a model are alike, and torch works such forms out in Python, a quarter of a millisecond each."""
MOST_FORMS = 20_000


def _computed(func: Any, args: Sequence[Any], given: Mapping[str, Any]) -> Any:
    """An operation's result; new hollow tensors at once where it was given the like before."""
    try:
        asked = _asked(func, args, given)
    except _Real:
        return func(*args, **given)
    if asked in _FORMS and (forms := _FORMS[asked]):
        made = [torch.empty_strided(size, stride, dtype=t, device=META) for size, stride, t in forms]
        return made[0] if len(func._schema.returns) == 1 else tuple(made)
    out = func(*args, **given)
    if asked not in _FORMS:
        if len(_FORMS) >= MOST_FORMS:
            _FORMS.clear()
        _FORMS[asked] = _forms(func, out, args, given)
    return out


class _Real(Exception):
    """Something that is given has a content, or may be written into."""


def _asked(func: Any, args: Sequence[Any], given: Mapping[str, Any]) -> Any:
    """An operation with all that its result's form depends on. Raises _Real."""
    if not _makes_anew(func):
        raise _Real

    def form(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.device != META:
                raise _Real
            return value.shape, value.stride(), value.dtype
        if isinstance(value, list | tuple):
            return tuple(map(form, value))
        return type(value), value

    return (
        func,
        form(args),
        tuple((name, form(value)) for name, value in given.items()),
        torch.get_default_dtype(),
    )


@functools.cache
def _makes_anew(func: Any) -> bool:
    """Whether an operation by its own account writes into nothing and gives tensors that share nothing."""
    returns = func._schema.returns
    return (
        bool(returns)
        and not func._schema.is_mutable
        and all(str(value.type) == "Tensor" and value.alias_info is None for value in returns)
    )


def _forms(func: Any, out: Any, args: Sequence[Any], given: Mapping[str, Any]) -> tuple[_Form, ...] | None:
    """The forms of what an operation gave; None where it shares a block after all, or has one larger than it needs."""
    made = [out] if len(func._schema.returns) == 1 else list(out)
    if not all(isinstance(tensor, torch.Tensor) and tensor.device == META for tensor in made):
        return None
    shared = {t.untyped_storage()._cdata for t in _tensors((*args, *given.values()))}
    blocks = [tensor.untyped_storage() for tensor in made]
    forms = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in made)
    like = [torch.empty_strided(size, stride, dtype=t, device=META) for size, stride, t in forms]
    is_own = len({block._cdata for block in blocks} - shared) == len(made)
    is_whole = all(a.nbytes() == b.untyped_storage().nbytes() for a, b in zip(blocks, like, strict=True))
    return forms if is_own and is_whole else None


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments or results, those in lists too."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _hollow(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor) and leaf.device != META:
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=META)
    return META if isinstance(leaf, torch.device) else leaf


def _attention_flops(args: Sequence[Any], factor: float) -> float:
    query, key = args[0], args[1]
    batch, heads, length, width = query.shape
    return float(factor * batch * heads * length * key.shape[-2] * width)


CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda args: _attention_flops(args, 4.0),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda args: _attention_flops(args[1:], 10.0),
}
"""FLOPs of torch's attention on CPUs, which its own table lacks: two products forward, five backward."""


@contextmanager
def _kernels(kernel: str, autocast: torch.dtype | None) -> Iterator[None]:
    """Functions of torch as a device has them, while hollow numbers are computed with: its attention kernel, where
    torch would take the plain one with its square matrix; and products in the type of autocast, which it lacks there.

    Functions are put in the place of torch's, since a mode of torch's is off where checkpointed layers are computed
    again.
    """

    from tunesmith.forward import head

    def cast(leaf: Any) -> Any:
        is_whole = isinstance(leaf, torch.Tensor) and leaf.device == META and leaf.dtype == torch.float32
        return leaf.to(autocast) if is_whole and autocast else leaf

    def attention(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        if query.device != META:
            return plain[2](
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        query, key, value, attn_mask = map(cast, (query, key, value, attn_mask))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype, device=META)
        # Only the plain kernel has a trained bias and, on a CPU, dropout.
        if (attn_mask is not None and attn_mask.requires_grad) or (dropout_p and kernel == "cpu"):
            return plain[2](
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if kernel == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        if key.shape[-3] != query.shape[-3]:
            times = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
        if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
        )[0]

    ours: Any = torch
    functions = ours.nn.functional
    plain = functions.linear, ours.matmul, functions.scaled_dot_product_attention
    if autocast:
        functions.linear = lambda *given: plain[0](*map(cast, given))
        ours.matmul = lambda one, other: plain[1](cast(one), cast(other))
    functions.scaled_dot_product_attention = attention
    own = head._type
    # The head asks torch whether autocast is on, which says no there.
    head._type = lambda hidden: autocast if autocast and hidden.device == META else own(hidden)
    try:
        yield
    finally:
        functions.linear, ours.matmul, functions.scaled_dot_product_attention = plain
        head._type = own


@contextmanager
def counting(
    *, vocabulary: int, kernel: str = "cpu", autocast: torch.dtype | None = None
) -> Iterator[Counting]:
    """Count what is done meanwhile with hollow models. `kernel` is whose attention is taken: cpu or cuda. `autocast` is
    the type that mixed precision computes products in."""
    with Counting(vocabulary=vocabulary) as count, _kernels(kernel, autocast), _no_autocast_there():
        yield count


@contextmanager
def _no_autocast_there() -> Iterator[None]:
    """torch has no autocast for hollow numbers, and raises where it is asked whether it is on."""
    ours: Any = torch
    is_on, chosen = ours.is_autocast_enabled, ours.get_autocast_dtype
    ours.is_autocast_enabled = lambda *device: device != ("meta",) and is_on(*device)
    ours.get_autocast_dtype = lambda device: torch.float32 if device == "meta" else chosen(device)
    try:
        yield
    finally:
        ours.is_autocast_enabled, ours.get_autocast_dtype = is_on, chosen


BLOCK, SECOND_BLOCK = 64, 256
"""Weights that share a scale in bitsandbytes' 4-bit format, and scales that share one of their own."""


class FourBit(torch.nn.Linear):
    """A hollow linear layer whose weights are packed: they are unpacked for every product, forward and backward."""

    def __init__(self, plain: torch.nn.Linear, *, double: bool) -> None:
        super().__init__(1, 1, bias=False, device=META)
        self.in_features, self.out_features, self.computed = (
            plain.in_features,
            plain.out_features,
            plain.weight.dtype,
        )
        count = plain.weight.numel()
        scales = count // BLOCK * (1 if double else 4) + (count // BLOCK // SECOND_BLOCK * 4 if double else 0)
        packed = torch.empty(count // 2 + scales, dtype=torch.uint8, device=META)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)  # type: ignore[assignment]
        self.bias = plain.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product with unpacked weights, in the type of what is given."""
        shape = (self.out_features, self.in_features)
        unpacked: Any = _Unpacked.apply
        out: torch.Tensor = unpacked(input.to(self.computed), shape)
        return (out if self.bias is None else out + self.bias).to(input.dtype)


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.shape, ctx.dtype = shape, given.dtype
        return torch.nn.functional.linear(given, torch.empty(shape, dtype=given.dtype, device=META))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] @ torch.empty(ctx.shape, dtype=ctx.dtype, device=META), None


def packed_in_four_bits(model: Any, *, double: bool) -> None:
    """Put hollow packed layers in the place of a hollow model's linear ones, without its head, as a QLoRA run does;
    what stays as it is becomes float32."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and module is not head and not name.endswith("score"):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], FourBit(module, double=double))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
