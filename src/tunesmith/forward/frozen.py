"""Outputs of the frozen bottom layers, kept from epoch to epoch.

They are computed row by row: how a matrix product rounds can depend on how many tokens it is given, so only then does a
row have the same numbers in every batch, in every epoch and after every continuation, kept or computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.forward.activations import Restore
from tunesmith.forward.tree import Layout, Row
from tunesmith.models import decoder_layers

SHARE = 0.25
"""Share of the memory that is free before training which the outputs may take."""


def frozen_layers(model: Any) -> tuple[int, str]:
    """How many layers from the bottom on have outputs that no step changes, and what ends them.

    At least the last layer is left to be run.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = list(decoder_layers(model))
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside = [module for module in model.base_model.modules() if id(module) not in inside]
    if any(isinstance(m, nn.Embedding) and m.weight.requires_grad for m in outside):
        return 0, "the embeddings are trained"
    if any(isinstance(m, nn.Dropout) and m.p for m in outside):
        return 0, "the embeddings have dropout"
    if getattr(model.config.get_text_config(), "attention_dropout", 0.0):
        return 0, "the attention of layer 1 has dropout"
    for number, layer in enumerate(layers[:-1]):
        modules = list(layer.modules())
        if any(isinstance(m, BaseTunerLayer) for m in modules):
            return number, f"an adapter sits in layer {number + 1}"
        if any(p.requires_grad for p in layer.parameters()):
            return number, f"layer {number + 1} is trained"
        if any(isinstance(m, nn.Dropout) and m.p for m in modules):
            return number, f"layer {number + 1} has dropout"
    return len(layers) - 1, f"layer {len(layers)} is the last one"


class _Reached(Exception):
    """What the first layer that is not frozen is given."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


@dataclass
class Frozen:
    """The bottom layers of a model, with their outputs by row."""

    layers: Sequence[Any]
    """All of the model's."""
    count: int
    """How many of them, from the bottom on, are not run where outputs are given."""
    most: int
    """Bytes of outputs that are kept."""
    full: Callable[[int], None]
    """Told once, with the number of rows that are kept, that no more are."""
    held: int = 0
    _states: dict[tuple[int, bytes], Tensor] = field(default_factory=dict)
    _said: bool = False

    def handles(self) -> list[Any]:
        """Have the layers take given outputs in the place of their own; what undoes it."""
        found: list[Any] = [
            self.layers[self.count].register_forward_pre_hook(_given, with_kwargs=True, prepend=True)
        ]
        for layer in self.layers[: self.count]:
            theirs = layer.forward
            layer.forward = _skipping(theirs)
            found.append(Restore(layer))
        return found

    def below(self, rows: Sequence[Row], plan: Layout, run: Callable[[Row], None]) -> Tensor:
        """What the first layer above them is given for all tokens of a sequence; `run` runs the model on one row."""
        states = [self._of(row, run) for row in rows]
        parts = [states[n][:, low:high].to(plan.ids.device) for n, low, high in plan.sources]
        return torch.cat(parts, dim=1)

    def _of(self, row: Row, run: Callable[[Row], None]) -> Tensor:
        key = (row.start, row.ids.tobytes())
        if key in self._states:
            return self._states[key]
        try:
            with torch.no_grad():
                run(row)
        except _Reached as reached:
            states = reached.states
        else:
            raise AssertionError("the layers above the frozen ones were not reached")
        size = states.numel() * states.element_size()
        if self.held + size <= self.most:
            self.held += size
            self._states[key] = states.cpu()
        elif not self._said:
            self._said = True
            self.full(len(self._states))
        return states


def _skipping(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows: Layout | None = kwargs.get("rows")
        if rows is not None and rows.below is not None:
            return hidden_states
        return theirs(hidden_states, *args, **kwargs)

    return forward


def _given(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    rows: Layout | None = kwargs.get("rows")
    if rows is None or (rows.below is None and not rows.stops):
        return None
    if rows.stops:
        raise _Reached(args[0])
    return (rows.below, *args[1:]), kwargs
