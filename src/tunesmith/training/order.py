"""The order of the training rows: batches of like length, the same ones whenever the same epoch is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

POOL = 50
"""Batches whose rows are sorted among one another: enough for little padding, few enough to stay a shuffle."""


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


def order_by_length(trainer: Any, lengths: Sequence[int]) -> None:
    """Have a trainer that has not started take its rows, of these lengths, in batches of like length."""
    sampler = ByLength(lengths, trainer.args.per_device_train_batch_size, seed=trainer.args.seed)
    assert len(trainer.train_dataset) == len(lengths), "a length for every row"
    trainer._get_train_sampler = lambda dataset=None: sampler
