"""What to change where a run does not fit, in order of harm, and the largest micro-batch that does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.errors import size
from tunesmith.estimate.step import STATES
from tunesmith.recipe import DDP, FSDP, LoRA, QLoRA, Recipe

if TYPE_CHECKING:
    from tunesmith.estimate import Estimate


@dataclass(frozen=True)
class Remedy:
    """A change to the recipe, and what the run would take then."""

    change: str
    flags: str
    peak: int
    fits: bool

    @property
    def value(self) -> str:
        """What the run would take then, for people."""
        return size(self.peak) + ("" if self.fits else ", still too much")

    def sentence(self) -> str:
        """For people."""
        return f"{self.change} ({self.flags}): {self.value}"


def most_rows(peak_of: Callable[[int], float], capacity: int, first: int, most: int) -> int:
    """How many rows of at most `most` fit, or up to an eighth fewer; 0 where not even one does.

    Goes from `first` along straight lines between what was looked at, and names only what was.
    """
    fits, beyond, rows = 0, most + 1, min(first, most)
    peaks: dict[int, float] = {}
    while True:
        peaks[rows] = peak_of(rows)
        fits, beyond = (rows, beyond) if peaks[rows] <= capacity else (fits, rows)
        closest = max(fits // 8, 1)
        if beyond - fits <= closest:
            return fits
        known = sorted(peaks)
        if not fits:
            rows = beyond // 2
        elif len(known) == 1:
            rows = min(2 * fits, most)
        else:
            low, high = (fits, beyond) if beyond in peaks else known[-2:]
            slope = (peaks[high] - peaks[low]) / (high - low)
            line = fits + int(min((capacity - peaks[fits]) / slope, most)) if slope > 0 else most
            rows = min(max(line, fits + closest), 8 * fits, beyond - 1)


MOST_TRACED = {"cpu": 256, "cuda": 2_048, "mps": 2_048}
"""Rows times layers of the largest batch that is traced where the largest that fits is looked for: some seconds. A
CPU's attention is an operation per row."""
REFUSED = sys.maxsize
"""The peak of a recipe that would be refused."""
FEWER = 4
"""The part of the tokens that a batch of answers has as a remedy."""
MOST_REMEDIES = 3


@dataclass(frozen=True, eq=False)
class Change:
    """A change to a recipe with which it takes less memory."""

    kind: str
    """What it is a try at; of one kind the first that is not refused counts."""
    said: str
    flags: str
    fields: Mapping[str, Any]
    """By section of the recipe: the fields that are set, or the section that takes its place."""


def with_changes(recipe: Recipe, changes: Iterable[Change]) -> Recipe:
    """The recipe with these changes, the later on top."""
    for change in changes:
        update = {
            name: value if not isinstance(value, dict) else getattr(recipe, name).model_copy(update=value)
            for name, value in change.fields.items()
        }
        recipe = recipe.model_copy(update=update)
    return recipe


def ways_to_fit(
    found: Estimate, changes: Iterable[Change], peak_of: Callable[..., int], fixed: int
) -> list[Remedy]:
    """Three remedies from changes in order of harm: ways in which the run fits, the least harmful first, each without
    what it can do without; where there are fewer, what comes closest. `peak_of` gives the bytes at the peak of the
    recipe with some of the changes, `fixed` are those that no change makes less.
    """

    def remedy(taken: Sequence[Change], most: int) -> Remedy:
        """Of these changes those without which the peak would be more than that."""
        for change in reversed(taken):
            fewer = [other for other in taken if other is not change]
            taken = fewer if fewer and peak_of(*fewer) <= most else taken
        said, flags = ", and ".join(c.said for c in taken), " ".join(c.flags for c in taken)
        peak = peak_of(*taken)
        return Remedy(said, flags, peak, peak <= found.capacity)

    def beyond(share: float, peak: int) -> int:
        return fixed + int(share * (peak - fixed))

    fits: list[Remedy] = []
    short: dict[str, Remedy] = {}
    waiting: list[Change] = []
    offered: set[str] = set()
    for change in changes:
        if change.kind in offered or (peak := peak_of(change)) == REFUSED:
            continue
        offered.add(change.kind)
        if peak <= found.capacity:
            fits.append(remedy([change], found.capacity))
        else:
            waiting.append(change)
            short[change.flags] = remedy([change], peak)
            if peak_of(*waiting) <= found.capacity:
                fits.append(remedy(waiting, found.capacity))
                waiting = []
        if len(fits) == MOST_REMEDIES:
            return fits
    if not fits and len(waiting) > 1:
        closest = remedy(waiting, beyond(1.02, peak_of(*waiting)))
        short[closest.flags] = closest
    less = [one for one in short.values() if one.peak < beyond(0.98, found.peak)]
    return [*fits, *sorted(less, key=lambda one: one.peak)[: MOST_REMEDIES - len(fits)]]


def possible_changes(recipe: Recipe, longest: int, processes: int, device: str) -> Iterator[Change]:
    """Changes in order of harm: the same maths in smaller pieces, in shares of several processes, more time, coarser
    products and states, fewer trained weights, coarser weights, shorter rows, no proof."""
    rows, times = recipe.training.per_device_train_batch_size, recipe.training.gradient_accumulation_steps
    for few in (1, 2):
        if rows > few:
            passes = -(-times * rows // few)
            fields = {
                "per_device_train_batch_size": few, "gradient_accumulation_steps": passes,
                "per_device_eval_batch_size": few,
            }  # fmt: skip
            flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in fields.items())
            said = f"{'one row' if few == 1 else f'{few} rows'} per pass, {passes} passes per step"
            yield Change("rows", said, flags, {"training": fields})
    if recipe.evaluation.batch_tokens > 2048:
        wanted = recipe.evaluation.batch_tokens // FEWER
        said, flags = f"{wanted} tokens per batch of answers", f"--set evaluation.batch_tokens={wanted}"
        yield Change("answers", said, flags, {"evaluation": {"batch_tokens": wanted}})
    if processes > 1 and isinstance(recipe.parallel, DDP):
        said = f"weights, gradients and optimizer states in shares of the {processes} processes, more to send"
        yield Change("shares", said, "--parallel fsdp", {"parallel": FSDP()})
    if not recipe.training.gradient_checkpointing:
        said = "activations computed again in the backward pass, about a third more time"
        yield Change(
            "again", said, "--gradient-checkpointing", {"training": {"gradient_checkpointing": True}}
        )
    if device == "cuda" and recipe.training.mixed_precision == "no":
        base = " and a frozen base" if isinstance(recipe.adapter, LoRA) else ""
        for precision in ("bf16", "fp16"):  # which older GPUs lack, as is found when it is tried
            said, flags = f"products{base} in 16 bits, which is faster too", f"--mixed-precision {precision}"
            yield Change("precision", said, flags, {"training": {"mixed_precision": precision}})
    if device == "cuda" and STATES[recipe.training.optimizer] == 8 and not isinstance(recipe.adapter, LoRA):
        said, flags = "optimizer states in 8 bits", "--set training.optimizer=adamw_bnb_8bit"
        yield Change("states", said, flags, {"training": {"optimizer": "adamw_bnb_8bit"}})
    if not isinstance(recipe.adapter, LoRA):
        yield Change("adapter", "an adapter instead of all weights", "--lora", {"adapter": LoRA()})
    if not isinstance(recipe.adapter, QLoRA):
        is_adapted = isinstance(recipe.adapter, LoRA)
        kept = recipe.adapter.model_dump(exclude={"kind"}) if is_adapted else {}
        said = "4-bit weights under the adapter" if is_adapted else "an adapter on 4-bit weights"
        yield Change("bits", said, "--qlora", {"adapter": QLoRA(**kept)})
    half = max(min(recipe.data.max_length, longest) // 2, 16)
    yield Change(
        "length", f"rows cut at {half} tokens", f"--max-length {half}", {"data": {"max_length": half}}
    )
    if not recipe.evaluation.skip:
        said = "no comparison in the run, for which `tunesmith evaluate RUN` makes up on a larger machine"
        flags = "--set evaluation.skip=true"
        yield Change("measuring", said, flags, {"evaluation": {"skip": True}})
