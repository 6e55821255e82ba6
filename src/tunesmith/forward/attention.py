"""Attention of rows that stand in one sequence: each token sees its own row, and nothing of the others.

`rows` is the name under which transformers' models find it. On CUDA the rows go through one call of a kernel where
there is one for them (`cuda`); elsewhere through one call of SDPA a row, which leaves out what a mask over the whole
sequence would compute in vain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from tunesmith.forward import activations, cuda
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
    if query.is_cuda:
        asked = cuda.Asked(scaling, sliding_window, softcap, dropout)
        if (answer := cuda.answered(query, key, value, rows, asked)) is not None:
            return answer, None
    keys, values = (torch.split(states, rows.lengths, dim=2) for states in (key, value))
    found = []
    for part, block in zip(torch.split(query, [b.queries for b in blocks], dim=2), blocks, strict=True):
        seen, taken = (_seen(states, block) for states in (keys, values))
        if softcap is not None:
            out = _capped(part, seen, taken, block, dropout, scaling, softcap)
        else:
            shares = part.shape[1] != seen.shape[1]
            if (
                shares
                and part.is_cuda
                and (block.mask is not None or cuda.compute_type(part) == torch.float32)
            ):
                seen, taken = (
                    cuda.repeated(states, part.shape[1] // states.shape[1]) for states in (seen, taken)
                )
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
    if len(found) == 1:
        return found[0].contiguous(), None
    joined = torch.cat(found, dim=1)
    if softcap is None and joined.requires_grad:  # the kernels keep their own answers
        activations.remember(joined, partial(torch.cat, [out.detach() for out in found], 1))
    return joined, None


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


@contextlib.contextmanager
def used_by(config: Any, name: str = NAME) -> Iterator[None]:
    """Have a model of this configuration use it, or ours of another name, and make no masks."""
    before = config._attn_implementation_internal
    config._attn_implementation_internal = name
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def is_run_again(layer: nn.Module) -> bool:
    """Whether a layer keeps nothing for the backward pass, which runs it once more."""
    return bool(layer.training and getattr(layer, "gradient_checkpointing", False))


def held_to(layer: nn.Module, config: Any, name: str = NAME) -> list[Any]:
    """Have a layer that is run again in the backward pass, outside of `used_by`, use our attention there too; what
    undoes it."""

    def again(once: Callable[..., Any], run: Callable[..., Any], *args: Any) -> Any:
        def with_rows(*given: Any) -> Any:
            with used_by(config, name):
                return run(*given)

        return once(with_rows, *args)

    def wrap(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        once: Any = getattr(module, "_gradient_checkpointing_func", None)
        if "rows" in kwargs and is_run_again(module) and getattr(once, "func", None) is not again:
            module._gradient_checkpointing_func = partial(again, once)

    def unwrap(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        once = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(once, "func", None) is again:
            module._gradient_checkpointing_func = once.args[0]  # type: ignore[union-attr]

    return [
        layer.register_forward_pre_hook(wrap, with_kwargs=True),
        layer.register_forward_hook(unwrap, with_kwargs=True, always_call=True),
    ]


AttentionInterface.register(NAME, rows_attention)
