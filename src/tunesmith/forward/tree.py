"""The rows of a batch as one sequence without padding, in which what rows begin with alike stands once.

    rows:  a b c d e      pieces:  (a b c)  (d e)  (x)      a token sees the tokens before it in its own piece,
           a b c x                                           and all of the pieces that lead to it

Tokens behind the last label of a row are left out: nothing that is asked for depends on them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.templates import IGNORED

LEAST = 16
"""Tokens from which on a beginning is worth sharing, and a piece of one a piece: each costs a call in each layer."""
QUERIES = 512
"""Longest run of queries that are answered under one mask; what they cannot see is left out block by block."""


@dataclass(frozen=True)
class Row:
    """A row or a part of one: tokens that see nothing of other rows."""

    ids: np.ndarray[Any, Any]
    start: int
    """Position of its first token."""
    wanted: np.ndarray[Any, Any]
    """Places of the tokens whose outputs are asked for."""
    slots: np.ndarray[Any, Any]
    """For each of them, where its result goes."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of the sequence, with the pieces before it on the way from the first token of its rows."""

    length: int
    offset: int
    """Tokens on the way to it."""
    way: tuple[int, ...]
    """Numbers of the pieces that lead to it."""


@dataclass
class Block:
    """Queries of one piece, with what they see: neighbouring tokens of the way through the tree."""

    places: np.ndarray[Any, Any]
    """The queries, counted from the beginning of the way."""
    pieces: tuple[int, ...]
    """Numbers of the pieces of the way, their own the last."""
    low: int
    """First key on the way that one of them sees."""
    high: int
    """Behind the last one."""
    window: int | None
    whole: bool
    """Whether they are all tokens of the way, of which each sees itself and all before it."""
    device: torch.device

    @property
    def queries(self) -> int:
        """How many they are."""
        return len(self.places)

    @cached_property
    def mask(self) -> Tensor | None:
        """Which query sees which key; None where each sees all, or `whole` says it."""
        if self.whole:
            return None
        keys = np.arange(self.low, self.high)
        sees = keys[None] <= self.places[:, None]
        if self.window is not None:
            sees &= keys[None] > self.places[:, None] - self.window
        return None if sees.all() else torch.from_numpy(sees).to(self.device)


@dataclass(frozen=True)
class Layout:
    """A batch as one sequence: tokens, positions, what sees what, and where outputs are wanted."""

    ids: Tensor
    """(1, tokens)"""
    positions: Tensor
    """(1, tokens)"""
    pieces: tuple[Piece, ...]
    kept: Tensor
    """Tokens whose outputs are wanted, ascending, `(kept,)`."""
    numbers: np.ndarray[Any, Any]
    """The same where no device has to be waited for."""
    others: Tensor
    """All other tokens, `(tokens - kept,)`."""
    outputs: Tensor | None
    """For each result the number of its token among the kept ones, as one may have several; None where each has one,
    in this order."""
    slots: Tensor
    """For each result where it goes."""
    sources: tuple[tuple[int, int, int], ...] = ()
    """For each piece the number of a row that it is of, and where in the row it begins and ends."""
    below: Tensor | None = None
    """Outputs of the frozen bottom layers, `(1, tokens, width)`, where they are known."""
    stops: bool = False
    """Whether only these are asked for."""
    _blocks: dict[tuple[int | None, bool], tuple[Block, ...]] = field(default_factory=dict)
    worked_out: dict[Any, Any] = field(default_factory=dict)
    """What an attention kernel has made of the layout, for all layers."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each piece."""
        return [piece.length for piece in self.pieces]

    def blocks(self, window: int | None, trimmed: bool) -> tuple[Block, ...]:
        """What the queries see, in their order: of all tokens, or of the kept ones."""
        key = (window, trimmed)
        if key not in self._blocks:
            self._blocks[key] = tuple(_blocks(self, window, trimmed))
        return self._blocks[key]


def rows_of(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    wanted: Tensor,
    *,
    trim: bool = True,
) -> list[Row] | None:
    """The rows of a batch, and parts of packed ones, without padding; None where a mask has holes, or padding is asked
    for something.

    `wanted` marks the tokens whose outputs are asked for; rows without any are left out. Their results go to the
    places that they have in `wanted`, flattened.
    """
    ids, marks = input_ids.cpu().numpy(), wanted.cpu().numpy()
    count, width = ids.shape
    positions = None if position_ids is None else position_ids.expand(count, width).cpu().numpy()
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        return None
    masks = None if attention_mask is None else attention_mask.cpu().numpy() != 0
    found = []
    for number in range(count):
        first, end = 0, width
        if masks is not None:
            [real] = masks[number].nonzero()
            if not len(real):
                continue
            first, end = int(real[0]), int(real[-1]) + 1
            if len(real) != end - first:
                return None
        if positions is None:
            parts = [(first, end, first)]
        else:
            [cuts] = (np.diff(positions[number, first:end]) != 1).nonzero()
            edges = [first, *(int(cut) + first + 1 for cut in cuts), end]
            parts = [(a, b, int(positions[number, a])) for a, b in pairwise(edges) if b > a]
        for a, b, start in parts:
            [places] = marks[number, a:b].nonzero()
            if len(places):
                last = int(places[-1]) + 1 if trim else b - a
                found.append(Row(ids[number, a : a + last], start, places, number * width + a + places))
    # What is asked of padding nothing here could answer.
    return found if sum(len(row.wanted) for row in found) == marks.sum() else None


def layout(rows: Sequence[Row], *, share: bool, device: Any) -> Layout:
    """The sequence of some rows, with what they begin with alike once if `share` is set."""
    order = list(range(len(rows)))
    common = [0] * len(rows)
    if share and len(rows) > 1:
        # Bytes of big-endian numbers sort as the numbers do, so equal beginnings come to stand together.
        keys = [np.concatenate(([row.start], row.ids)).astype(">u4").tobytes() for row in rows]
        order.sort(key=keys.__getitem__)
        for place in range(1, len(order)):
            common[place] = _alike(rows[order[place - 1]], rows[order[place]])
        common = _worth(common)
    pieces: list[Piece] = []
    ids, positions, wanted, slots = [], [], [], []
    starts: list[int] = []
    sources: list[tuple[int, int, int]] = []
    done = 0
    stack: list[tuple[int, int]] = []  # pieces on the way to the current row, each with the depth of its end

    def add(number: int, low: int, high: int) -> None:
        nonlocal done
        row = rows[number]
        sources.append((number, low, high))
        pieces.append(Piece(high - low, low, tuple(number for number, _ in stack)))
        starts.append(done)
        stack.append((len(pieces) - 1, high))
        ids.append(row.ids[low:high])
        positions.append(np.arange(row.start + low, row.start + high))
        done += high - low

    for place, number in enumerate(order):
        row = rows[number]
        while stack and stack[-1][1] > common[place]:
            stack.pop()
        # A row is cut where a later one leaves it: the smallest common length up to there, whenever it shrinks.
        cuts, least = [], len(row.ids)
        for later in range(place + 1, len(order)):
            if common[later] >= least:
                continue
            least = common[later]
            if least <= (stack[-1][1] if stack else 0):
                break
            cuts.append(least)
        for low, high in _steps(stack[-1][1] if stack else 0, [*reversed(cuts), len(row.ids)]):
            add(number, low, high)
        ends = np.array([end for _, end in stack])
        begins = np.array([starts[n] - pieces[n].offset for n, _ in stack])
        wanted.append(row.wanted + begins[np.searchsorted(ends, row.wanted, side="right")])
        slots.append(row.slots)
    where = np.concatenate(wanted)
    kept, outputs = np.unique(where, return_inverse=True)
    others = np.setdiff1d(np.arange(done), kept, assume_unique=True)

    def tensor(numbers: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int64)).to(device)

    return Layout(
        ids=tensor(np.concatenate(ids))[None],
        positions=tensor(np.concatenate(positions))[None],
        pieces=tuple(pieces),
        kept=tensor(kept),
        numbers=kept,
        others=tensor(others),
        outputs=None if np.array_equal(outputs, np.arange(len(kept))) else tensor(outputs),
        slots=tensor(np.concatenate(slots)),
        sources=tuple(sources),
    )


def _alike(one: Row, other: Row) -> int:
    """Tokens with which two rows begin alike."""
    if one.start != other.start:
        return 0
    size = min(len(one.ids), len(other.ids))
    [differ] = (one.ids[:size] != other.ids[:size]).nonzero()
    return int(differ[0]) if len(differ) else size


def _worth(common: Sequence[int]) -> list[int]:
    """Of lengths that each row begins alike with the one before, what is worth sharing: of rows that all begin alike,
    lengths less than a piece apart become the shortest of them."""
    found = list(common)
    edges = [place for place, length in enumerate(common) if length < LEAST]
    for low, high in pairwise([*edges, len(common)]):
        depths = [0]
        for length in sorted(set(common[low + 1 : high])):
            if length - depths[-1] >= LEAST:
                depths.append(length)
        found[low] = 0
        for place in range(low + 1, high):
            found[place] = depths[bisect_right(depths, common[place]) - 1]
    return found


def _steps(begin: int, ends: Sequence[int]) -> list[tuple[int, int]]:
    found = []
    for end in ends:
        if end > begin:
            found.append((begin, end))
            begin = end
    return found


def _blocks(layout: Layout, window: int | None, trimmed: bool) -> list[Block]:
    found = []
    begin = 0
    kept = layout.numbers if trimmed else None
    for number, piece in enumerate(layout.pieces):
        places = np.arange(begin, begin + piece.length)
        if kept is not None:
            low, high = np.searchsorted(kept, (begin, begin + piece.length))
            places = kept[low:high]
        places = places - begin + piece.offset
        begin += piece.length
        way = (*piece.way, number)
        device = layout.ids.device
        fits = window is None or piece.length <= window
        if len(places) == piece.length and not piece.offset and fits:
            found.append(Block(places, way, 0, piece.length, window, True, device))
            continue
        most = QUERIES if device.type == "cpu" else max(len(places), 1)
        for start in range(0, len(places), most):
            some = places[start : start + most]
            first = 0 if window is None else max(int(some[0]) - window + 1, 0)
            found.append(Block(some, way, first, int(some[-1]) + 1, window, False, device))
    return found


def labelled(labels: Tensor) -> Tensor:
    """The tokens that are asked for the next one's label, marked."""
    marks = torch.zeros_like(labels, dtype=torch.bool)
    marks[:, :-1] = labels[:, 1:] != IGNORED
    return marks
