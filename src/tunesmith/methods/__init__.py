"""The training methods: each a function from plan, model and data to a trainer, and one row of METHODS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.data.examples import Example
from tunesmith.methods import sft


@dataclass(frozen=True)
class Method:
    """A way to train: its kind in the recipe, the examples it learns from, and how its trainer is built."""

    kind: str
    adapt: Callable[[Example], Example]
    """The example in the shape that the method needs; raises Unusable for one it has no use for."""
    remarks: Mapping[type[Example], str]
    """What to say of data sets with examples of a shape that the method changes."""
    build: Callable[..., Any]


METHODS = {
    "sft": Method("sft", adapt=sft.imitated, remarks=sft.REMARKS, build=sft.build),
}
