"""The gradient of a table that a model reads its tokens' vectors from and multiplies its last states with.

The head gives the whole table a gradient. Autograd would make another one of the same size for the few rows that were
read, nearly all of it zeros, and add it: the most that a step of a small model with a large vocabulary holds at a time.
Here those rows are added to the head's at the end of the backward pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.forward.activations import Restore, first_order, records


def join(model: Any) -> list[Restore]:
    """Have a model whose head is the table of its vectors add up their gradients in place; what undoes it.

    Tables in float32 alone, as half a number would round with every row that is added. Lookups that are recorded
    beside other processes, and where somebody looks at the table's gradient, are left to autograd.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not table.weight or "forward" in vars(table):
        return []
    known = type(table) is nn.Embedding or type(table).__name__.endswith("ScaledWordEmbedding")
    if not known or table.weight.dtype != torch.float32 or table.scale_grad_by_freq:
        return []
    table.forward = partial(_looked_up, table, table.forward)
    return [Restore(table)]


def _looked_up(table: Any, theirs: Any, ids: Tensor) -> Tensor:
    weight = table.weight
    if (
        not records()
        or not (weight.requires_grad and weight.is_leaf)
        or _is_watched(weight)
        # The head's gradient is sent to the others, and be it to none, before the rows would have come.
        or (torch.distributed.is_available() and torch.distributed.is_initialized())
    ):
        return theirs(ids)  # type: ignore[no-any-return]
    apply: Any = _Lookup.apply
    found: Tensor = apply(ids, weight, table, theirs)
    return found


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, table: Any, theirs: Any) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table, ctx.weight = table, weight
        found: Tensor = theirs(ids)
        return found

    @staticmethod
    @first_order
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        (ids,), table, weight = ctx.saved_tensors, ctx.table, ctx.weight
        rows = (given[0].flatten(0, -2) * getattr(table, "embed_scale", 1.0)).to(weight.dtype)
        if table.padding_idx is not None:
            rows = rows.masked_fill((ids == table.padding_idx).flatten()[:, None], 0.0)
        if not _accumulates(weight) or _is_watched(weight):
            return None, _add_rows(torch.zeros_like(weight), ids, rows), None, None
        # When the pass ends, the head's gradient is there, whichever of the two autograd came to first.
        engine: Any = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
        engine.queue_callback(partial(_complete, weight, ids, rows))
        return None, None, None, None


def _is_watched(weight: Any) -> bool:
    """Whether somebody looks at the gradient, who would see it before it is whole."""
    return bool(weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None))


def _accumulates(weight: Tensor) -> bool:
    """Whether the backward pass under way adds to `grad`, and does not give the gradient to somebody who asked."""
    node = torch.autograd.graph.get_gradient_edge(weight).node
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # of torch.autograd.grad
        return False


def _complete(weight: Any, ids: Tensor, rows: Tensor) -> None:
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    with torch.no_grad():
        _add_rows(weight.grad, ids, rows)


def _add_rows(table: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """Add to a table's rows in place."""
    if rows.is_cuda:  # in a fixed order, which `index_add_` has not there
        return table.index_put_((ids.flatten(),), rows, accumulate=True)
    return table.index_add_(0, ids.flatten(), rows)
