"""Attention of rows in one sequence on CUDA: which kernel takes it, and how the tree of rows is told to it.

    flash     FlashAttention's kernel for rows of various lengths     16 bits, windows, capping, dropout
    varlen    torch's own, which is FlashAttention as well            16 bits, windows
    flex      FlexAttention under a block mask of the tree            any type, windows, capping
    rows      one call of SDPA a row (`attention`)                    everything

FlashAttention's and torch's kernels let the last query of a row see its last key, and those before it one key less
each; so what a piece of the tree sees is laid out as a row of its own. FlexAttention reads the tree in place.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tunesmith.forward.tree import Layout
from tunesmith.training import gpu

Kernel = Literal["flash", "varlen", "flex", "rows"]

HALF = (torch.float16, torch.bfloat16)
AMPERE = (8, 0)
"""Compute capability from which on FlashAttention's kernels run."""
WIDEST = 256
"""Widest head that they take; widths are multiples of `STEP`."""
STEP = 8
NARROWEST = 16
"""Narrowest head that FlexAttention takes."""
TILE = 128
"""Queries, and keys, of a block of FlexAttention's mask."""
VARIANTS = 64
"""Kernels that FlexAttention may be compiled into: torch makes another one where there are no gradients, one block, as
many queries as keys. Behind its own limit of 8 it would write out all scores."""


@dataclass(frozen=True)
class Asked:
    """What a layer asks beside queries, keys and values."""

    scale: float | None = None
    window: int | None = None
    """Keys that a query sees, itself the last; None for all before it."""
    softcap: float | None = None
    dropout: float = 0.0


def compute_type(states: Tensor) -> torch.dtype:
    """The type that attention is computed in: autocast's where it is on. Rotary positions leave queries and keys in
    float32 there, of which SDPA alone is relieved by autocast."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def choose(
    dtype: torch.dtype, width: int, capability: tuple[int, int], *, capped: bool = False, drops: bool = False
) -> tuple[Kernel, str]:
    """The kernel for heads of this width in this type on a GPU of this compute capability, and why."""
    why = ""
    if dtype not in HALF:
        why = f"{str(dtype).removeprefix('torch.')} is not a type of the kernels for rows of various lengths"
    elif torch.version.hip:
        why = "kernels for rows of various lengths are used on NVIDIA's GPUs only"
    elif capability < AMPERE:
        own = ".".join(map(str, capability))
        why = f"FlashAttention's kernels need an Ampere GPU or a newer one, this one is of {own}"
    elif width % STEP or width > WIDEST:
        why = f"FlashAttention's kernels take heads of 8, 16, ... to {WIDEST}, these have {width}"
    else:
        function, problem = flash_function()
        if function and capped and not _knows(function, "softcap"):
            function, problem = None, "the installed FlashAttention caps no scores"
        if function:
            return "flash", "FlashAttention is installed"
        if not capped and not drops and _torch_function():
            return "varlen", f"torch's own kernel for rows of various lengths; {problem}"
        what = "capped scores" if capped else "dropout" if drops else "causal rows of various lengths"
        why = f"torch has no kernel for {what}; {problem}"
    if capped and not drops and width >= NARROWEST and capability >= AMPERE and has_triton():
        return "flex", f"FlexAttention caps scores within its kernel; {why}"
    return "rows", f"one call of SDPA for each row: {why}"


def told(model: Any, args: Any) -> tuple[Kernel, str] | None:
    """The kernel of a model's attention under a trainer's arguments, and why; None where it is not on CUDA."""
    if model.device.type != "cuda":
        return None
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return choose(
        torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype,
        width,
        torch.cuda.get_device_capability(model.device),
        capped=getattr(config, "attn_logit_softcapping", None) is not None,
        drops=bool(getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0)),
    )


@functools.cache
def flash_function() -> tuple[Callable[..., Any] | None, str]:
    """FlashAttention's function for rows of various lengths, or why there is none."""
    if importlib.util.find_spec("flash_attn") is None:
        return None, "FlashAttention (flash-attn) is not installed"
    if why := gpu.broken("flash_attn"):
        return None, f"FlashAttention is installed and cannot be loaded ({why})"
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None, "the installed FlashAttention has no function for rows of various lengths"
    return flash_attn_varlen_func, ""


@functools.cache
def _torch_function() -> Callable[..., Any] | None:
    """Torch's function for rows of various lengths; None where it has none yet that scales and sees what we ask."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    # torch 2.10 knows neither.
    return varlen_attn if _knows(varlen_attn, "scale") and _knows(varlen_attn, "window_size") else None


@functools.cache
def _knows(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has an argument of this name."""
    return name in inspect.signature(function).parameters


def has_triton() -> bool:
    """Whether torch can compile kernels here."""
    return importlib.util.find_spec("triton") is not None


def answered(
    query: Tensor, key: Tensor, value: Tensor, rows: Layout, asked: Asked, *, kernel: Kernel | None = None
) -> Tensor | None:
    """Attention of `(1, heads, tokens, width)` as `(1, tokens, heads, width)`; None where it is to go row by row.

    `kernel` is for tests; else it is chosen.
    """
    dtype = compute_type(query)
    if kernel is None:
        capability = torch.cuda.get_device_capability(query.device)
        kernel, _ = choose(
            dtype, query.shape[-1], capability, capped=asked.softcap is not None, drops=asked.dropout > 0
        )
    query, key, value = (states.to(dtype) for states in (query, key, value))
    match kernel:
        case "flash":
            function, _ = flash_function()
            assert function
            return in_rows(functools.partial(_flash, function), query, key, value, rows, asked)
        case "varlen":
            function = _torch_function()
            assert function
            return in_rows(functools.partial(_torch_varlen, function), query, key, value, rows, asked)
        case "flex":
            return in_tree(query, key, value, rows, asked)
    return None


def repeated(states: Tensor, groups: int) -> Tensor:
    """Keys or values once for each of the query heads that share them. SDPA shares them itself, but on CUDA not in
    float32 nor under a mask, where it would write out all scores instead."""
    return states.repeat_interleave(groups, dim=1) if groups > 1 else states


# Rows of their own


@dataclass(frozen=True)
class Spread:
    """A tree of rows as rows of their own."""

    queries: Tensor
    """Where the queries of each row begin, and where the last one's end, int32."""
    keys: Tensor
    """The same of what they see."""
    longest_queries: int
    longest_keys: int
    order: Tensor | None
    """Tokens whose keys stand one behind the other; None where that is all of them as they are."""
    places: Tensor | None
    """Where each query stands; None where they stand side by side."""
    size: int
    """Queries, gaps counted."""


def spread(rows: Layout, window: int | None, trimmed: bool) -> Spread:
    """The tree as rows, worked out once for all layers of a batch.

    Queries that are no neighbours (labels with gaps) would see what lies between as well, so a row is given one for
    every token from its first on, and loses the others again.
    """
    known = (window, trimmed)
    if known not in rows.worked_out:
        rows.worked_out[known] = _spread(rows, window, trimmed)
    found: Spread = rows.worked_out[known]
    return found


def _spread(rows: Layout, window: int | None, trimmed: bool) -> Spread:
    starts = np.cumsum([0, *rows.lengths[:-1]])
    order, places, queries, keys = [], [], [0], [0]
    for block in rows.blocks(window, trimmed):
        way = [np.arange(starts[n], starts[n] + rows.pieces[n].length) for n in block.pieces]
        order.append(np.concatenate(way)[block.low : block.high])
        first = int(block.places[0])
        places.append(block.places - first + queries[-1])
        queries.append(queries[-1] + block.high - first)
        keys.append(keys[-1] + block.high - block.low)
    all_keys, all_places = np.concatenate(order), np.concatenate(places)
    device = rows.ids.device

    def tensor(numbers: Any, kind: type) -> Tensor:
        return torch.from_numpy(np.asarray(numbers, dtype=kind)).to(device)

    whole = np.array_equal(all_keys, np.arange(rows.ids.shape[1]))
    return Spread(
        queries=tensor(queries, np.int32),
        keys=tensor(keys, np.int32),
        longest_queries=int(np.diff(queries).max()),
        longest_keys=int(np.diff(keys).max()),
        order=None if whole else tensor(all_keys, np.int64),
        places=None if len(all_places) == queries[-1] else tensor(all_places, np.int64),
        size=queries[-1],
    )


def in_rows(
    kernel: Callable[[Tensor, Tensor, Tensor, Spread, Asked], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Layout,
    asked: Asked,
) -> Tensor:
    """All rows in one call of a kernel for rows of various lengths."""
    facts = spread(rows, asked.window, query.shape[2] != key.shape[2])
    flat, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    if facts.order is not None:
        keys, values = keys.index_select(0, facts.order), values.index_select(0, facts.order)
    if facts.places is not None:
        flat = flat.new_zeros(facts.size, *flat.shape[1:]).index_copy(0, facts.places, flat)
    out = kernel(flat, keys, values, facts, asked)
    return (out if facts.places is None else out.index_select(0, facts.places))[None]


def _flash(
    function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, facts: Spread, asked: Asked
) -> Tensor:
    more: dict[str, Any] = {"softcap": asked.softcap} if asked.softcap is not None else {}
    # The window says what causal says as well: where every row has one query, FlashAttention takes causal back and,
    # with a window open to the right, another kernel.
    out: Tensor = function(
        q, k, v, facts.queries, facts.keys, facts.longest_queries, facts.longest_keys, dropout_p=asked.dropout,
        softmax_scale=asked.scale, causal=True, window_size=_window(asked),
        deterministic=torch.are_deterministic_algorithms_enabled(), **more,
    )  # fmt: skip
    return out


def _torch_varlen(
    function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, facts: Spread, asked: Asked
) -> Tensor:
    # Before torch 2.12 heads may be shared without being asked for.
    shares = q.shape[1] != k.shape[1] and _knows(function, "enable_gqa")
    more: dict[str, Any] = {"enable_gqa": True} if shares else {}
    out: Tensor = function(
        q, k, v, facts.queries, facts.keys, facts.longest_queries, facts.longest_keys, scale=asked.scale,
        window_size=_window(asked), **more,
    )  # fmt: skip
    return out


def _window(asked: Asked) -> tuple[int, int]:
    """Keys to the left and to the right of a query, itself not counted: -1 is all, so (-1, 0) is causal."""
    return (-1 if asked.window is None else asked.window - 1, 0)


# The tree itself


@dataclass(frozen=True)
class Sight:
    """What sees what in the tree, in numbers: pieces stand in the order in which the tree is walked, so that whatever
    a token is seen by stands together."""

    tokens: np.ndarray[Any, Any]
    """Of each query the number of its token."""
    until: np.ndarray[Any, Any]
    """Of each token the first one behind all pieces that its own leads to."""
    depth: np.ndarray[Any, Any]
    """Of each token how many are on the way to it."""

    def blocks(
        self, window: int | None, tile: int = TILE
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """For blocks of queries and of tokens: which may see anything, and which see all of each other."""

        def edges(values: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
            cuts = np.arange(0, len(values), tile)
            return np.minimum.reduceat(values, cuts), np.maximum.reduceat(values, cuts)

        (q_low, q_high), (k_low, k_high) = edges(self.tokens), edges(np.arange(len(self.until)))
        u_low, u_high = edges(self.until)
        some = (k_low[None] <= q_high[:, None]) & (u_high[None] > q_low[:, None])
        every = (k_high[None] <= q_low[:, None]) & (u_low[None] > q_high[:, None])
        if window is not None:
            (a_low, a_high), (b_low, b_high) = edges(self.depth[self.tokens]), edges(self.depth)
            some &= a_low[:, None] - b_high[None] < window
            every &= a_high[:, None] - b_low[None] < window
        # A block that is not full on either side has places without a token.
        every[-1] &= len(self.tokens) % tile == 0
        every[:, -1] &= len(self.until) % tile == 0
        return some, every


def sight(rows: Layout, trimmed: bool) -> Sight:
    """What sees what among the tokens of a batch; queries are all of them, or the kept ones."""
    lengths = np.array(rows.lengths)
    ends = np.cumsum(lengths)
    last = ends.copy()  # of each piece the end of what it leads to
    for number, piece in enumerate(rows.pieces):
        for before in piece.way:
            last[before] = max(last[before], ends[number])
    offsets = np.array([piece.offset for piece in rows.pieces])
    total = int(ends[-1])
    return Sight(
        tokens=rows.numbers if trimmed else np.arange(total),
        until=np.repeat(last, lengths),
        depth=np.arange(total) - np.repeat(ends - lengths - offsets, lengths),
    )


def block_mask(rows: Layout, window: int | None, trimmed: bool) -> Any:
    """The tree as FlexAttention's mask, worked out once for all layers of a batch that have this window."""
    known = ("tree", window, trimmed)
    if known not in rows.worked_out:
        rows.worked_out[known] = _block_mask(sight(rows, trimmed), window, rows.ids.device)
    return rows.worked_out[known]


def _block_mask(found: Sight, window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    def tensor(numbers: Any) -> Tensor:
        return torch.from_numpy(np.asarray(numbers, dtype=np.int32)).to(device)

    # A window that were a number would make the kernel another one, with and without it.
    beyond = found.depth - window if window is not None else np.full_like(found.depth, -1)
    tokens, until, depth, lowest = (
        tensor(values) for values in (found.tokens, found.until, found.depth, beyond)
    )

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = tokens[q]
        return (k <= own) & (own < until[k]) & (depth[k] > lowest[own])

    some, every = found.blocks(window)

    def listed(marks: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        """Of each block of queries how many blocks of keys are marked, and their numbers, these first."""
        order = np.argsort(~marks, axis=1, kind="stable")
        return tensor(marks.sum(1))[None, None], tensor(order)[None, None]

    partly, fully = listed(some & ~every), listed(every)
    return BlockMask.from_kv_blocks(
        *partly, *fully, BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=(len(found.tokens), len(found.until))
    )


def in_tree(query: Tensor, key: Tensor, value: Tensor, rows: Layout, asked: Asked) -> Tensor:
    """All rows in one call of FlexAttention, shared beginnings in place."""
    cap = asked.softcap

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert cap is not None
        return torch.tanh(score / cap) * cap

    mask = block_mask(rows, asked.window, query.shape[2] != key.shape[2])
    out = _flex(query.is_cuda)(
        query, key, value, score_mod=None if cap is None else capped, block_mask=mask, scale=asked.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},  # few queries would go to a kernel for writing answers
    )  # fmt: skip
    found: Tensor = out.transpose(1, 2)
    return found


@functools.cache
def _flex(compiled: bool, backend: Any = "inductor") -> Callable[..., Any]:
    """FlexAttention; without being compiled it writes out all scores, which is for tests."""
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import flex_attention

    if not compiled:
        return flex_attention
    # A whole graph: where the limit is reached after all, that is an error and not slow in silence.
    made: Callable[..., Any] = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=backend)

    @functools.wraps(flex_attention)
    def found(*args: Any, **named: Any) -> Any:
        # Scale and cap are a model's own: constants of its kernel, which takes no numbers.
        with config.patch(recompile_limit=VARIANTS, specialize_float=True):
            return made(*args, **named)

    return found
