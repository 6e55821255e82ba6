"""The training methods: each a function from plan, model and data to a trainer, and one row of METHODS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tunesmith.data.examples import Splits
from tunesmith.methods import sft


@dataclass(frozen=True)
class Method:
    """A way to train: its kind in the recipe, the examples it learns from, and how its trainer is built."""

    kind: str
    adapt: Callable[[Splits], Splits]
    """Examples in the shape the method needs, the ledger naming those it has no use for."""
    build: Callable[..., Any]


METHODS = {
    "sft": Method("sft", adapt=sft.imitated, build=sft.build),
}
