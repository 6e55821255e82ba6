"""The three-way split, by content: the same rows are held out whatever their order, seed or machine.

Rows that ask the same, and rows of one group, always share a split, so no question that is measured was
trained.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from tunesmith.data.examples import Example, Fate, Ledger, LedgerEntry, Splits, question_hash
from tunesmith.data.sources import Record
from tunesmith.errors import DataError

ROLES: tuple[Fate, ...] = ("train", "validation", "held_out")

SMALL = 20
"""Below this number of groups chance could keep most of them from training; such sets are evened out."""


def split(
    pairs: Sequence[tuple[Record, Example]],
    dropped: Sequence[LedgerEntry],
    *,
    validation: float,
    held_out: float,
) -> Splits:
    """Examples by role, with the ledger of all rows.

    A group's hash is a number in [0, 1); below `held_out` it is held out, then comes validation, the rest
    is trained. So adding rows moves none. Roles that the source names are kept, and missing ones are
    taken from its training rows. With three or more groups every wanted role gets at least one; of a
    small set no more than half is kept from training, unless the shares say so. Raises DataError for
    shares that leave nothing to train on.
    """
    if validation + held_out >= 1:
        raise DataError(
            "data.validation and data.held_out leave nothing to train on.",
            found=f"{validation:g} + {held_out:g}",
            fix="Let them sum to less than 1.",
        )
    keys = [_key(example) for _, example in pairs]
    named = {key: record.role for key, (record, _) in zip(keys, pairs, strict=True) if record.role}
    shares = {"held_out": held_out, "validation": validation}
    notes = []
    for role in named.values():
        shares.pop(role, None)
    if named:
        carved = [role.replace("_", "-") for role, share in shares.items() if share > 0]
        notes.append(
            "the source's own splits are used"
            + (f"; {' and '.join(carved)} rows are taken from its training rows" if carved else "")
        )
        leaked = _leaks(keys, pairs)
        if leaked:
            notes.append(f"{leaked} training rows also stand in the source's validation or held-out split")
    free = sorted(
        {key for key, (record, _) in zip(keys, pairs, strict=True) if record.role in (None, "train")}
    )
    fates = _fates(free, shares.get("held_out", 0.0), shares.get("validation", 0.0))
    wanted = [role for role, share in shares.items() if share > 0]
    missing = [role.replace("_", "-") for role in wanted if role not in fates.values()]
    if missing:
        notes.append(
            f"too few different rows ({len(free)}) for {' and '.join(missing)} rows: nothing is left out for it"
        )
    parts: dict[Fate, list[Example]] = defaultdict(list)
    entries = list(dropped)
    for key, (record, example) in zip(keys, pairs, strict=True):
        fate: Fate = record.role if record.role in ("validation", "held_out") else fates[key]
        parts[fate].append(example)
        entries.append(LedgerEntry(example.row, fate))
    return Splits(
        train=tuple(parts["train"]),
        validation=tuple(parts["validation"]),
        held_out=tuple(parts["held_out"]),
        ledger=Ledger(tuple(entries)),
        notes=tuple(notes),
    )


def _fates(keys: Sequence[str], held_out: float, validation: float) -> dict[str, Fate]:
    """Each group's role by its hash, topped up so that three groups or more fill every wanted role."""
    fates: dict[str, Fate] = {}
    for key in keys:
        place = _place(key)
        fates[key] = (
            "held_out" if place < held_out else "validation" if place < held_out + validation else "train"
        )
    if len(keys) < 3:
        return dict.fromkeys(keys, "train")
    order = sorted(keys, key=_place)
    wanted: list[Fate] = [r for r, share in (("held_out", held_out), ("validation", validation)) if share > 0]  # type: ignore[misc]
    for role in (*wanted, "train"):
        if role not in fates.values():
            # The group nearest to the missing role's range moves, from the role that has most.
            largest = max(ROLES, key=lambda r: sum(fate == r for fate in fates.values()))
            candidates = [key for key in order if fates[key] == largest]
            fates[candidates[-1] if role == "train" else candidates[0]] = role
    allowed = max(len(keys) // 2, len(wanted))
    is_small = len(keys) < SMALL and held_out + validation <= 0.5
    while is_small and sum(fate != "train" for fate in fates.values()) > allowed:
        larger = max(wanted, key=lambda role: sum(fate == role for fate in fates.values()))
        fates[[key for key in order if fates[key] == larger][-1]] = "train"
    return fates


def _place(key: str) -> float:
    """A key's place in [0, 1), uniform over keys."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _key(example: Example) -> str:
    return f"group:{example.group}" if example.group is not None else question_hash(example)


def _leaks(keys: Sequence[str], pairs: Sequence[tuple[Record, Example]]) -> int:
    measured = {
        key for key, (record, _) in zip(keys, pairs, strict=True) if record.role in ("validation", "held_out")
    }
    return sum(
        key in measured
        for key, (record, _) in zip(keys, pairs, strict=True)
        if record.role not in ("validation", "held_out")
    )
