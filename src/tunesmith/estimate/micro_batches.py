"""The micro-batches of a run in their order, as its seed deals them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.recipe import Training


@dataclass(frozen=True)
class Rows:
    """What batches are made of, and what is asked."""

    lengths: Sequence[int]
    validation: Sequence[int]
    questions: int = 0
    """Held-out questions, which are about as long as the rows."""
    scored: Sequence[tuple[int, int]] = ()
    """Of questions with their answers the tokens, and how many come before the answer; of the first ones, or none where
    they are not known."""
    answers: int = 0
    """Tokens of an answer, where a method trains on what the model writes."""
    group: int = 1
    """Answers to one prompt that are learned from together."""
    order: Sequence[int] | None = None
    """The one order in which every epoch has the rows; None where each has one of its own."""
    identity: str = ""
    """A hash of what the rows are; none where it is not known."""
    alike: int = 0
    """How many rows of like length come together, where they do; 0 for as many as a pass has."""
    any_order: bool = True
    """Whether rows that are chosen for their lengths may come together."""


def longest_rows(lengths: Sequence[int], count: int) -> list[int]:
    """Numbers of the longest rows, as many as a batch has, in the order of the data."""
    return sorted(sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))[:count])


MOST_ROWS = 2_000_000
"""Rows whose batches are gone through; a run of more is planned by its first ones."""


@dataclass(frozen=True)
class Batches:
    """The micro-batches of a run in their order: the rows of all, and where each begins."""

    rows: Any
    starts: Any
    steps: int
    """Steps that these are."""
    of_an_epoch: int
    """Micro-batches of a whole epoch."""
    are_alike: bool = False
    """Whether rows of like length come together."""

    def unevenness(self, lengths: Sequence[int], count: int, processes: int, *, pads: bool) -> float | None:
        """Tokens of the fullest of so many processes over their mean, where each takes so many batches in turn before
        they wait for one another; None where no epoch has as many."""
        import numpy as np

        sizes, whole = self.sizes(lengths, pads=pads), count * processes
        places = [slice(n, n + self.of_an_epoch) for n in range(0, len(sizes), self.of_an_epoch)]
        parts = [sizes[place][: len(sizes[place]) // whole * whole] for place in places]
        taken = np.concatenate(parts).reshape(-1, count, processes).sum(axis=1)
        return float(taken.max(axis=1).sum() / taken.mean(axis=1).sum()) if len(taken) else None

    def sizes(self, lengths: Sequence[int], *, pads: bool) -> Any:
        """Tokens that each computes, padding too where it `pads`."""
        import numpy as np

        given = np.asarray(lengths, dtype=np.int64)[self.rows]
        counts = np.diff(np.append(self.starts, len(self.rows)))
        return (
            np.maximum.reduceat(given, self.starts) * counts if pads else np.add.reduceat(given, self.starts)
        )

    def fullest(self, lengths: Sequence[int], *, pads: bool) -> list[int]:
        """The rows of the one that computes the most."""
        place = self.place_of_fullest(lengths, pads=pads)
        end = self.starts[place + 1] if place + 1 < len(self.starts) else len(self.rows)
        return sorted(int(number) for number in self.rows[self.starts[place] : end])

    def place_of_fullest(self, lengths: Sequence[int], *, pads: bool) -> int:
        """The number of the one that computes the most, the first of such."""
        return int(self.sizes(lengths, pads=pads).argmax())

    def share(self, rows: Rows, batch: Sequence[int], *, pads: bool) -> float:
        """How much the mean batch computes of what this one does."""
        lengths = [length + rows.answers for length in rows.lengths]
        mine = [lengths[number] for number in batch]
        whole = max(mine) * len(mine) if pads else sum(mine)
        if rows.answers:  # the longest prompt stands for all
            whole = (max(rows.lengths) + rows.answers) * len(mine)
        return float(self.sizes(lengths, pads=pads).mean() / whole)


def batches(rows: Rows, training: Training, steps: int, *, pads: bool = False) -> Batches:
    """The micro-batches of the first so many steps, in the order in which a run of this seed meets them.

    Each epoch has an order of its own, of the seed and its number (accelerate's SeedableRandomSampler), or one of rows
    of like length (`training.order`).
    """
    import numpy as np
    import torch

    from tunesmith.training.order import by_length, padding

    size, total = training.per_device_train_batch_size, len(rows.lengths)
    together = rows.alike or size
    alike = rows.order is None and (
        training.batches == "by_length"
        or (
            training.batches == "auto"
            and pads
            and rows.any_order
            and padding(rows.lengths, together, seed=training.seed).is_worth
        )
    )
    if rows.answers:  # several answers to one prompt
        size = max(size // rows.group, 1)
    parts: list[Any] = []
    starts: list[int] = []
    begun = epoch = 0
    times, done = training.gradient_accumulation_steps, 0
    while done < steps and begun < MOST_ROWS:
        if rows.order is not None:
            order = np.asarray(rows.order)
        elif alike:
            order = np.asarray(by_length(rows.lengths, together, seed=training.seed, epoch=epoch))
        else:
            draw = torch.Generator().manual_seed(training.seed + epoch)
            order = torch.randperm(total, generator=draw).numpy()
        parts.append(order[: (steps - done) * times * size])
        starts += range(begun, begun + len(parts[-1]), size)
        done += -(-len(parts[-1]) // (times * size))  # a step ends with its epoch
        begun, epoch = begun + len(parts[-1]), epoch + 1
    return Batches(np.concatenate(parts), np.asarray(starts), max(done, 1), -(-total // size), alike)
