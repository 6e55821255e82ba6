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
        if function and capped and "softcap" not in inspect.signature(function).parameters:
            function, problem = None, "the installed FlashAttention caps no scores"
        if function:
            return "flash", "FlashAttention is installed"
        if not capped and not drops and _torch_function():
            return "varlen", f"torch's own kernel for rows of various lengths; {problem}"
        what = "capped scores" if capped else "dropout" if drops else "rows of various lengths"
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


def _torch_function() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    return varlen_attn


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
    out: Tensor = function(
        q, k, v, facts.queries, facts.keys, facts.longest_queries, facts.longest_keys, dropout_p=asked.dropout,
        softmax_scale=asked.scale, causal=True, window_size=(-1, -1) if asked.window is None else (asked.window - 1, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(), **more,
    )  # fmt: skip
    return out


def _torch_varlen(
    function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, facts: Spread, asked: Asked
) -> Tensor:
    # (-1, 0) is its word for causal; what is left of a query counts without the query itself.
    out: Tensor = function(
        q, k, v, facts.queries, facts.keys, facts.longest_queries, facts.longest_keys, scale=asked.scale,
        window_size=(-1 if asked.window is None else asked.window - 1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out


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
        tokens=rows.kept.cpu().numpy() if trimmed else np.arange(total),
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

    tokens, until, depth = (tensor(values) for values in (found.tokens, found.until, found.depth))

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = tokens[q]
        seen = (k <= own) & (own < until[k])
        return seen if window is None else seen & (depth[own] - depth[k] < window)

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
    )  # fmt: skip
    found: Tensor = out.transpose(1, 2)
    return found


@functools.cache
def _flex(compiled: bool) -> Callable[..., Any]:
    """FlexAttention; without being compiled it writes out all scores, which is for tests."""
    from torch.nn.attention.flex_attention import flex_attention

    found: Callable[..., Any] = flex_attention
    return torch.compile(found, dynamic=True) if compiled else found
