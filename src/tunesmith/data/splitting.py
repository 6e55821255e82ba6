"""The three-way split, by content: the same rows are held out whatever their order, seed or machine.

Rows that ask the same, and rows of one group, always share a split, so no question that is measured was
trained. Near-duplicates share the split of the one that came first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.examples import Example, Fate, question_hash
from tunesmith.errors import DataError

FATES: tuple[Fate, ...] = ("train", "validation", "held_out", "dropped")
"""What may become of a row; arrays hold the place in this tuple."""
TRAIN, VALIDATION, HELD_OUT, DROPPED = range(4)

SMALL = 20
"""Below this number of groups chance could keep most of them from training; such sets are evened out."""

Keys = NDArray[np.uint64]
Codes = NDArray[np.int8]


def key(example: Example) -> int:
    """64 bits that are the same for rows which have to share a split: a group's, else the question's."""
    text = f"group:{example.group}" if example.group is not None else question_hash(example)
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )


def assign(
    keys: Keys, roles: Sequence[int] | Codes, *, validation: float, held_out: float
) -> tuple[Codes, tuple[str, ...]]:
    """Each row's fate (a place in FATES), and sentences on what was decided.

    `roles` is the fate that the source names, or -1. A key, read as a number in [0, 1), is held out below
    `held_out`, then comes validation, the rest is trained; so adding rows moves none. Named roles are
    kept, and missing ones are taken from the training rows. With three or more keys every wanted role
    gets at least one; of a small set no more than half is kept from training, unless the shares say so.
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
    group_fates = _fates(groups, shares.get(HELD_OUT, 0.0), shares.get(VALIDATION, 0.0))
    wanted = [role for role, share in shares.items() if share > 0]
    missing = [_said(role) for role in wanted if not (group_fates == role).any()]
    if missing:
        notes.append(
            f"too few different rows ({len(groups)}) for {' and '.join(missing)} rows: nothing is left out for it"
        )
    elif len(groups) < SMALL and wanted:
        notes.append(f"with {len(groups)} different rows the split is evened out; adding rows may move some")
    fates = roles.copy()
    fates[~kept_out] = group_fates[np.searchsorted(groups, keys[~kept_out])] if len(groups) else TRAIN
    return fates, tuple(notes)


def draw(
    keys: Keys, parts: Codes, *, weights: Sequence[float | None], total: int | None, seed: int
) -> NDArray[np.int32]:
    """How often each training row is used per epoch, for a mix of sources.

    keys: what the choice of rows depends on, with the seed, and nothing else. parts: the number of each
    row's source. weights: each source's share of what is trained; all None uses every row once. total:
    number of examples per epoch; without it, as many as the weights allow without repeating a row.
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
        order = np.argsort(_mixed(keys[rows], rows, seed), kind="stable")
        copies[rows] = whole
        copies[rows[order[:rest]]] += 1
    return copies


def _rounded(exact: NDArray[Any], total: int) -> NDArray[np.int64]:
    """Whole numbers that sum to the total, each nearest to its exact share (largest remainders)."""
    counts: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts


def _mixed(keys: Keys, rows: NDArray[np.int64], seed: int) -> Keys:
    """A new, seeded 64-bit number for every row (splitmix64's finalizer, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        mixed: Keys = keys ^ (rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(seed + 1)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        spread: Keys = mixed ^ (mixed >> np.uint64(31))
        return spread


def _fates(groups: Keys, held_out: float, validation: float) -> Codes:
    """Each group's role by its key, topped up so that three groups or more fill every wanted role.

    `groups` is sorted, so the lowest keys come first.
    """
    place = groups.astype(np.float64) / 2**64
    fates = np.full(len(groups), TRAIN, dtype=np.int8)
    fates[place < held_out + validation] = VALIDATION
    fates[place < held_out] = HELD_OUT
    if len(groups) < 3:
        return np.full(len(groups), TRAIN, dtype=np.int8)
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
    return fates


def _said(role: int) -> str:
    return FATES[role].replace("_", "-")
