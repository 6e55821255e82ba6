"""The three-way split, by content: the same rows are held out whatever their order, seed or machine.

Rows that ask the same, rows of one group and near-duplicates share a split, the one of whichever came first; a
row that would have to be in two is dropped. So no question that is measured is trained, and no row moves to
another split when rows are added behind it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.examples import Example, Fate, questions
from tunesmith.errors import DataError

FATES: tuple[Fate, ...] = ("train", "validation", "held_out", "dropped")
"""What may become of a row; arrays hold the place in this tuple."""
TRAIN, VALIDATION, HELD_OUT, DROPPED = range(4)

SMALL = 20
"""Below this number of groups chance could keep most of them from training; such sets are evened out."""

Keys = NDArray[np.uint64]
Codes = NDArray[np.int8]


def key(example: Example) -> int:
    """64 bits from which a row's split follows: its group's, else those of the question that is measured."""
    return group_key(example.group) if example.group is not None else questions(example)[-1]


def group_key(group: str) -> int:
    """64 bits of a group."""
    said = f"group:{group}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big")


class Links:
    """What ties rows together: equal hashes of questions and groups, a few bytes each."""

    def __init__(self) -> None:
        self._hashes, self._rows, self._is_main = array("Q"), array("I"), array("b")

    def add(self, row: int, example: Example) -> int:
        """The row's group and the questions that it answers; its key (see `key`)."""
        *earlier, last = questions(example)
        main = [last] if example.group is None else [last, group_key(example.group)]
        self._hashes.extend([*main, *earlier])
        self._rows.extend([row] * (len(main) + len(earlier)))
        self._is_main.extend([1] * len(main) + [0] * len(earlier))
        return main[-1]

    @property
    def hashes(self) -> Keys:
        """Hashes of groups and questions, of all rows in order."""
        return np.frombuffer(self._hashes, dtype=np.uint64)

    @property
    def rows(self) -> NDArray[np.uint32]:
        """The row of each hash."""
        return np.frombuffer(self._rows, dtype=np.uint32)

    @property
    def is_main(self) -> NDArray[np.bool_]:
        """Whether it is the group's, or the question that is measured, not one on the way to it."""
        return np.frombuffer(self._is_main, dtype=np.bool_)

    def parts(self) -> Iterator[NDArray[np.int64]]:
        """Places in these arrays, equal hashes together, in pieces that are small to work on."""
        first_bits = (self.hashes >> np.uint64(60)).astype(np.uint8)
        for bits in range(16):
            yield np.flatnonzero(first_bits == bits)

    def edges(self) -> NDArray[np.int64]:
        """Rows (n, 2) that have a hash in common: a row, and the first one that has it.

        A question on the way, such as "hi", ties the first HUB rows that have it and no more.
        """
        found = [np.empty((0, 2), dtype=np.int64)]
        for places in self.parts():
            if not len(places):
                continue
            hashes, rows = self.hashes[places], self.rows[places].astype(np.int64)
            order = np.lexsort((rows, hashes))
            hashes, rows, is_main = hashes[order], rows[order], self.is_main[places][order]
            begins = np.flatnonzero(np.concatenate(([True], hashes[1:] != hashes[:-1])))
            of = np.repeat(np.arange(len(begins)), np.diff([*begins, len(order)]))
            first, rank = rows[begins][of], np.arange(len(order)) - begins[of]
            kept = (rows > first) & (is_main | (rank < HUB))
            found.append(np.stack((rows[kept], first[kept]), axis=1))
        return np.concatenate(found)

    def rows_with(self, chosen: NDArray[np.bool_], among: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Rows of the places `chosen` whose hash stands in one of the places `among`."""
        found = [np.empty(0, dtype=np.uint32)]
        for places in self.parts():
            mine, theirs = places[chosen[places]], places[among[places]]
            found.append(self.rows[mine[np.isin(self.hashes[mine], self.hashes[theirs])]])
        return np.unique(np.concatenate(found).astype(np.int64))


HUB = 16
"""Rows that a question on the way ties together."""
CLUSTER = 32
"""Rows that near-duplicates tie together. In a larger cluster texts are alike since they fill one form."""


def rooted(
    count: int, links: NDArray[np.int64], alike: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """For each of `count` rows the row whose split it shares, and whether it left too large a cluster.

    links, alike: rows (n, 2), each with an earlier row that it has to be with; `alike` of near-duplicates. A row
    follows the earliest. What becomes of a row depends on the rows before it, never on later ones.
    """
    linked, near, released = np.arange(count), np.arange(count), np.zeros(count, dtype=bool)
    if not count:
        return linked, released
    np.minimum.at(linked, links[:, 0], links[:, 1])
    np.minimum.at(near, alike[:, 0], alike[:, 1])
    while True:
        root = np.minimum(linked, np.where(released, np.arange(count), near))
        while not (root[root] == root).all():
            root = root[root]
        order = np.argsort(root, kind="stable")
        begins = np.concatenate(([0], np.flatnonzero(np.diff(root[order])) + 1))
        rank = np.empty(count, dtype=np.int64)
        rank[order] = np.arange(count) - np.repeat(begins, np.diff([*begins, count]))
        too_many = (rank >= CLUSTER) & (near < np.arange(count)) & (linked == np.arange(count)) & ~released
        if not too_many.any():
            return root, released
        released |= too_many


def assign(
    keys: Keys, roles: Sequence[int] | Codes, *, validation: float, held_out: float
) -> tuple[Codes, tuple[str, ...]]:
    """Each row's fate (a place in FATES), and sentences on what was decided.

    `roles` is the fate that the source names, or -1. A key, read as a number in [0, 1), is held out below
    `held_out`, then comes validation, the rest is trained; so adding rows moves none. Named roles are
    kept, and missing ones are taken from the training rows. With three or more keys every wanted role
    gets at least one; of a small set no more than half is kept from training, unless the shares say so.
    Where that decides, a sentence says that adding rows may move some.
    Raises DataError for shares that leave nothing to train on.
    """
    if validation + held_out >= 1:
        raise DataError(
            "data.validation and data.held_out leave nothing to train on.",
            found=f"{validation:g} + {held_out:g}",
            fix="Let them sum to less than 1.",
        )
    roles = np.asarray(roles, dtype=np.int8)
    shares = {HELD_OUT: held_out, VALIDATION: validation}
    notes = []
    named = sorted({int(role) for role in np.unique(roles) if role >= 0})
    for role in named:
        shares.pop(role, None)
    if named:
        carved = [_said(role) for role, share in shares.items() if share > 0]
        notes.append(
            "the source's own splits are used"
            + (f"; {' and '.join(carved)} rows are taken from its training rows" if carved else "")
        )
    kept_out = np.isin(roles, (VALIDATION, HELD_OUT))
    if kept_out.any():
        leaked = int(np.isin(keys[~kept_out], np.unique(keys[kept_out])).sum())
        if leaked:
            notes.append(f"{leaked} training rows also stand in the source's validation or held-out split")
    groups = np.unique(keys[~kept_out])
    group_fates, evened = _fates(groups, shares.get(HELD_OUT, 0.0), shares.get(VALIDATION, 0.0))
    wanted = [role for role, share in shares.items() if share > 0]
    missing = [_said(role) for role in wanted if not (group_fates == role).any()]
    if missing:
        notes.append(
            f"too few different rows ({len(groups)}) for {' and '.join(missing)} rows: nothing is left out for it"
        )
    elif evened or (len(groups) < SMALL and wanted):
        notes.append(f"with {len(groups)} different rows the split is evened out; adding rows may move some")
    fates = roles.copy()
    fates[~kept_out] = group_fates[np.searchsorted(groups, keys[~kept_out])] if len(groups) else TRAIN
    return fates, tuple(notes)


def draw(
    keys: Keys, parts: NDArray[Any], *, weights: Sequence[float | None], total: int | None, seed: int
) -> NDArray[np.int32]:
    """How often each training row is used per epoch, for a mix of sources.

    keys: what the choice of rows depends on, with the seed; of rows with equal keys the earlier ones are
    taken as they come. parts: the number of each row's source. weights: each source's share of what is
    trained; all None uses every row once. total: number of examples per epoch; without it, as many as the
    weights allow without repeating a row.
    """
    copies = np.ones(len(keys), dtype=np.int32)
    sizes = np.bincount(parts, minlength=len(weights))
    if any(weight is not None for weight in weights):
        shares = np.array([1.0 if w is None else w for w in weights]) * (sizes > 0)
        shares = shares / shares.sum()
        filled = shares > 0
        wanted = total if total is not None else int(np.floor((sizes[filled] / shares[filled]).min() + 1e-9))
        counts = _rounded(shares * wanted, wanted)
    elif total is not None and total < len(keys):
        shares = sizes / sizes.sum()
        counts = _rounded(shares * total, total)
    else:
        return copies
    for part, count in enumerate(counts):
        rows = np.flatnonzero(parts == part)
        if not len(rows):
            continue
        whole, rest = divmod(int(count), len(rows))
        order = np.argsort(_mixed(keys[rows], seed), kind="stable")
        copies[rows] = whole
        copies[rows[order[:rest]]] += 1
    return copies


def _rounded(exact: NDArray[Any], total: int) -> NDArray[np.int64]:
    """Whole numbers that sum to the total, each nearest to its exact share (largest remainders)."""
    counts: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts


def _mixed(keys: Keys, seed: int) -> Keys:
    """A new, seeded 64-bit number for every row (splitmix64's finalizer, Steele et al. 2014).

    Rows with equal keys are told apart by which of them they are.
    """
    order = np.argsort(keys, kind="stable")
    begins = np.concatenate(([0], np.flatnonzero(np.diff(keys[order])) + 1))
    which = np.empty(len(keys), dtype=np.uint64)
    which[order] = (np.arange(len(keys)) - np.repeat(begins, np.diff([*begins, len(keys)]))).astype(np.uint64)
    with np.errstate(over="ignore"):
        mixed: Keys = keys ^ (which * np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(seed + 1)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        spread: Keys = mixed ^ (mixed >> np.uint64(31))
        return spread


def _fates(groups: Keys, held_out: float, validation: float) -> tuple[Codes, bool]:
    """Each group's role by its key, topped up so that three groups or more fill every wanted role; whether any
    was moved for that.

    `groups` is sorted, so the lowest keys come first.
    """
    place = groups.astype(np.float64) / 2**64
    fates = np.full(len(groups), TRAIN, dtype=np.int8)
    fates[place < held_out + validation] = VALIDATION
    fates[place < held_out] = HELD_OUT
    if len(groups) < 3:
        return np.full(len(groups), TRAIN, dtype=np.int8), False
    by_key = fates.copy()
    wanted = [r for r, share in ((HELD_OUT, held_out), (VALIDATION, validation)) if share > 0]

    def count(role: int) -> int:
        return int((fates == role).sum())

    for role in (*wanted, TRAIN):
        if not count(role):
            # The group nearest to the missing role's range moves, from the role that has most.
            largest = max((TRAIN, VALIDATION, HELD_OUT), key=count)
            candidates = np.flatnonzero(fates == largest)
            fates[candidates[-1] if role == TRAIN else candidates[0]] = role
    allowed = max(len(groups) // 2, len(wanted))
    is_small = len(groups) < SMALL and held_out + validation <= 0.5
    while is_small and int((fates != TRAIN).sum()) > allowed:
        larger = max(wanted, key=count)
        fates[np.flatnonzero(fates == larger)[-1]] = TRAIN
    return fates, bool((fates != by_key).any())


def _said(role: int) -> str:
    return FATES[role].replace("_", "-")
