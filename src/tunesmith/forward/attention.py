"""Attention of rows that stand in one sequence: each token sees its own row, and nothing of the others.

`rows` is the name under which transformers' models find it. On CUDA the rows go through one call of a kernel for
sequences of various lengths where there is one; elsewhere through one call of SDPA a row, which leaves out what a
mask over the whole sequence would compute in vain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from tunesmith.forward.tree import Block, Layout

NAME = "tunesmith_rows"


def rows_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    rows: Layout,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of `(1, heads, tokens, width)`, queries of all tokens or of the kept ones; gives `(1, tokens, heads,
    width)`, as transformers' attention functions do."""
    blocks = rows.blocks(sliding_window, query.shape[2] != key.shape[2])
    if query.is_cuda and softcap is None and not dropout and (kernel := varlen_kernel(query)):
        return _varlen(kernel, query, key, value, rows, blocks, scaling, sliding_window), None
    keys, values = (torch.split(states, rows.lengths, dim=2) for states in (key, value))
    found = []
    for part, block in zip(torch.split(query, [b.queries for b in blocks], dim=2), blocks, strict=True):
        seen, taken = (_seen(states, block) for states in (keys, values))
        if softcap is not None:
            out = _capped(part, seen, taken, block, dropout, scaling, softcap)
        else:
            out = functional.scaled_dot_product_attention(
                part,
                seen,
                taken,
                attn_mask=block.mask,
                dropout_p=dropout,
                is_causal=block.whole and block.queries > 1,
                scale=scaling,
                enable_gqa=part.shape[1] != seen.shape[1],
            )
        found.append(out.transpose(1, 2))
    return (torch.cat(found, dim=1) if len(found) > 1 else found[0].contiguous()), None


def _seen(states: tuple[Tensor, ...], block: Block) -> Tensor:
    """Keys or values that the queries of a block see."""
    way = [states[number] for number in block.pieces]
    whole = way[0] if len(way) == 1 else torch.cat(way, dim=2)
    if block.low == 0 and block.high == whole.shape[2]:
        return whole
    return whole[:, :, block.low : block.high]


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: Block,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """The same with scores that are capped before the softmax (Gemma 2), which SDPA cannot do."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = (query @ key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    mask = block.mask
    if block.whole:
        size = block.queries
        mask = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.nn.functional.dropout(weights, p=dropout, training=dropout > 0) @ value


def varlen_kernel(query: Tensor) -> Callable[..., Tensor] | None:
    """A kernel for sequences of various lengths in one, FlashAttention's or torch's own; None where there is none
    for this device and type."""
    if query.dtype not in (torch.float16, torch.bfloat16):
        return None
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        pass
    else:
        return _flash(flash_attn_varlen_func)
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return _torch_varlen(varlen_attn)


def _flash(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def kernel(q: Tensor, k: Tensor, v: Tensor, facts: _Lengths, scale: Any, window: int | None) -> Tensor:
        out: Tensor = function(
            q, k, v, facts.queries, facts.keys, facts.longest_queries, facts.longest_keys, causal=True,
            softmax_scale=scale, window_size=(-1, -1) if window is None else (window - 1, 0),
        )  # fmt: skip
        return out

    return kernel


def _torch_varlen(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def kernel(q: Tensor, k: Tensor, v: Tensor, facts: _Lengths, scale: Any, window: int | None) -> Tensor:
        out: Tensor = function(
            q, k, v, facts.queries, facts.keys, facts.longest_queries, facts.longest_keys, scale=scale,
            window_size=(-1, 0) if window is None else (window - 1, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out

    return kernel


class _Lengths:
    """Cumulated lengths of queries and of what they see."""

    def __init__(self, queries: list[int], keys: list[int], device: torch.device) -> None:
        def summed(lengths: list[int]) -> Tensor:
            return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)

        self.queries, self.keys = summed(queries), summed(keys)
        self.longest_queries, self.longest_keys = max(queries), max(keys)


def _varlen(
    kernel: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Layout,
    blocks: tuple[Block, ...],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """All blocks in one call: what each sees is laid out behind what the one before it sees.

    The kernels take the last query for one that sees the last key, and those before it for its neighbours. Queries
    of a block that are no neighbours (labels with gaps) see what lies between as well, so such a batch is given one
    query for every token from the first on, and loses the others again.
    """
    starts = torch.tensor([0, *rows.lengths[:-1]]).cumsum(0).tolist()
    ranges, queries, keys, taken = [], [], [], []
    begin = 0
    wanted = rows.kept.tolist() if query.shape[2] != key.shape[2] else list(range(key.shape[2]))
    for block in blocks:
        way = [
            torch.arange(starts[n], starts[n] + rows.pieces[n].length, device=query.device)
            for n in block.pieces
        ]
        ranges.append(torch.cat(way)[: block.high])
        own = block.pieces[-1]
        last = starts[own] + block.high - rows.pieces[own].offset  # behind the block's last query
        first = wanted[begin]
        queries.append(last - first)
        keys.append(block.high)
        taken.append(torch.tensor(wanted[begin : begin + block.queries], device=query.device) - first)
        begin += block.queries
    flat = [states[0].transpose(0, 1) for states in (query, key, value)]
    spread = sum(queries)
    edges = torch.tensor([0, *queries[:-1]]).cumsum(0).tolist()
    places = torch.cat([part + edge for part, edge in zip(taken, edges, strict=True)])
    asked = flat[0]
    if spread != len(asked):
        asked = asked.new_zeros(spread, *asked.shape[1:]).index_copy(0, places, asked)
    order = torch.cat(ranges)
    facts = _Lengths(queries, keys, query.device)
    out = kernel(asked, flat[1][order], flat[2][order], facts, scaling, window)
    return out[places][None] if spread != query.shape[2] else out[None]


@contextlib.contextmanager
def used_by(config: Any, name: str = NAME) -> Iterator[None]:
    """Have a model of this configuration use it, or ours of another name, and make no masks."""
    before = config._attn_implementation_internal
    config._attn_implementation_internal = name
    try:
        yield
    finally:
        config._attn_implementation_internal = before


AttentionInterface.register(NAME, rows_attention)
