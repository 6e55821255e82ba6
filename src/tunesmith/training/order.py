"""The order of the training rows: batches of like length, the same ones whenever the same epoch is trained, and the
same rows in a step however many processes share them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.packing import padded_share

POOL = 50
"""Batches whose rows are sorted among one another: enough for little padding, few enough to stay a shuffle."""
WORTH = 0.05
"""Share of a batch that has to be saved in padding for `training.batches: auto` to put rows of like length together."""


def by_length(lengths: Sequence[int] | NDArray[Any], batch_size: int, *, seed: int, epoch: int) -> list[int]:
    """Numbers of all rows, so that consecutive batches hold rows of like length and come in no order of length.

    A function of its arguments alone: a run that is continued in any epoch meets that epoch's order. A batch that is
    not full comes last.
    """
    draw = np.random.default_rng([seed, epoch])
    shuffled = draw.permutation(len(lengths))
    sizes = np.asarray(lengths)
    whole: list[Any] = []
    rest: list[int] = []
    for start in range(0, len(shuffled), POOL * batch_size):
        pool = shuffled[start : start + POOL * batch_size]
        pool = pool[np.argsort(-sizes[pool], kind="stable")]
        cuts = [pool[place : place + batch_size] for place in range(0, len(pool), batch_size)]
        if len(cuts[-1]) < batch_size:
            rest = cuts.pop().tolist()
        whole += cuts
    order = [int(number) for place in draw.permutation(len(whole)) for number in whole[place]]
    return order + rest


class Padding(NamedTuple):
    """Shares of a padded batch that are padding: of rows of like length, and of any rows."""

    alike: float
    mixed: float

    @property
    def is_worth(self) -> bool:
        """Whether rows of like length save enough of it."""
        return self.mixed - self.alike >= WORTH


def padding(lengths: Sequence[int], batch_size: int, *, seed: int) -> Padding:
    """How much of a run's batches would be padding, by the orders of its first epoch."""
    order = by_length(lengths, batch_size, seed=seed, epoch=0)
    mixed = np.random.default_rng(seed).permutation(lengths)
    return Padding(padded_share([lengths[n] for n in order], batch_size), padded_share(mixed, batch_size))


class ByLength:
    """The sampler of `by_length`, which transformers tells the epoch."""

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int) -> None:
        # Four bytes a row, for the whole of the training.
        self.lengths = np.asarray(lengths, dtype=np.int32)
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(by_length(self.lengths, self.batch_size, seed=self.seed, epoch=self.epoch))


def order_by_length(trainer: Any, lengths: Sequence[int], batch_size: int) -> None:
    """Have a trainer that has not started take its rows, of these lengths, in batches of like length."""
    sampler = ByLength(lengths, batch_size, seed=trainer.args.seed)
    assert len(trainer.train_dataset) == len(lengths), "a length for every row"
    trainer._get_train_sampler = lambda dataset=None: sampler


class Dealt:
    """An order of rows for several processes: batches that they take in turn, so that a step has the rows that it has
    in one process.

    `inner` is the order, `step` the rows of an optimizer step, `batch` those of one process's batch. What the last step
    of a pass has too few of is spread over the processes. A negative number, `-1 - row`, stands for a row that
    fills a place and counts for nothing: every process takes as many batches as the others.
    """

    def __init__(self, inner: Any, *, step: int, batch: int, processes: int) -> None:
        assert step % (batch * processes) == 0, "a step is dealt evenly"
        self.inner, self.step, self.batch, self.processes = inner, step, batch, processes

    def set_epoch(self, epoch: int) -> None:
        """Whose order comes next."""
        if hasattr(self.inner, "set_epoch"):
            self.inner.set_epoch(epoch)

    def _last(self) -> tuple[int, int]:
        """Rows of the last step that is not full, and the batches that they become."""
        rest = len(self.inner) % self.step
        return rest, -(-rest // (self.batch * self.processes)) * self.processes

    def __len__(self) -> int:
        rest, batches = self._last()
        return len(self.inner) - rest + batches * self.batch

    def __iter__(self) -> Iterator[int]:
        rest, batches = self._last()
        rows = iter(self.inner)
        for _ in range(len(self.inner) - rest):
            yield next(rows)
        left = list(rows)
        for place in range(batches):
            part = left[-(-place * rest // batches) : -(-(place + 1) * rest // batches)]
            yield from part
            yield from [-1 - left[0]] * (self.batch - len(part))


def deal(trainer: Any, processes: int) -> None:
    """Have a trainer that has not started take its share of the rows of every step and of every validation.

    Its order stays that of one process, drawn from the same seed.
    """
    import torch
    from accelerate.data_loader import SeedableRandomSampler
    from torch.utils.data import RandomSampler

    args, seed, theirs = trainer.args, torch.random.initial_seed(), trainer._get_train_sampler

    def ordered(dataset: Any = None) -> Dealt:
        inner = theirs(dataset)
        if isinstance(inner, RandomSampler):
            inner = SeedableRandomSampler(inner.data_source, data_seed=seed)
        batch = args.per_device_train_batch_size
        step = batch * args.gradient_accumulation_steps * processes
        trainer.dealt = Dealt(inner, step=step, batch=batch, processes=processes)
        found: Dealt = trainer.dealt
        return found

    def in_turn(dataset: Any) -> Dealt:
        batch = args.per_device_eval_batch_size
        return Dealt(range(len(dataset)), step=batch * processes, batch=batch, processes=processes)

    trainer._get_train_sampler, trainer._get_eval_sampler = ordered, in_turn
