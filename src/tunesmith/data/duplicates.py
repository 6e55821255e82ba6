"""Near-duplicates among millions of rows: MinHash sketches in numpy, candidates by banding.

A text is the set of its word triples, lower case, without punctuation. Two texts are near-duplicates where
the Jaccard similarity of these sets, as their sketches estimate it, is at least THRESHOLD.
Sources: Broder 1997 (MinHash); Li, Owen and Zhang 2012 (one permutation hashing); Shrivastava and Li 2014
(densification by rotation). datasketch computes the same estimate, at about 80 µs a short row; tests hold
this module against the exact similarity.
"""

from __future__ import annotations

import functools
import mmap
import tempfile
from collections.abc import Sequence
from typing import IO

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 0.8
BINS = 64
"""Values in a sketch: at similarity 0.8 the estimate's standard error is 0.05."""
BANDS = 16
"""A pair is compared where the values of one band (4 bins) agree: at similarity 0.8, 9,998 of 10,000 are."""

TOGETHER = 100_000
"""Characters that are sketched together: what is computed of them fits into a core's own cache."""

Words64 = NDArray[np.uint64]

_PRIME = 0x9E3779B97F4A7C15
_SEPARATORS = bytes(range(33)) + b"\x7f" + b".,;:!?\"'()[]{}_`"
"""Bytes between words. Signs of arithmetic and logic are kept: `3 - 4` is not `3 + 4`."""
_BETWEEN = dict.fromkeys(_SEPARATORS, " ")


def plain(text: str) -> str:
    """The words of a text as sketches tell them apart: lower case, one space for all that stands between them."""
    return " ".join(text.lower().translate(_BETWEEN).split())


def sketches(texts: Sequence[str]) -> NDArray[np.uint32]:
    """One sketch per text, shape (texts, BINS). Texts without a word have equal sketches of their own kind."""
    done = [np.empty((0, BINS), dtype=np.uint32)]
    begin = size = 0
    for number, text in enumerate(texts, 1):
        size += len(text)
        if size > TOGETHER or number == len(texts):
            done.append(_sketched(texts[begin:number]))
            begin, size = number, 0
    return np.concatenate(done)


def _sketched(texts: Sequence[str]) -> NDArray[np.uint32]:
    encoded = [text.encode("utf-8", "surrogatepass") + b"\n" for text in texts]
    content = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    made = np.full((len(texts), BINS), np.iinfo(np.uint32).max, dtype=np.uint32)
    is_word = _is_letter()[content]
    # A character beyond ASCII is a word of its own, so that text without spaces has words too.
    opens = content >= 0xC0
    begins = is_word & opens
    begins[1:] |= is_word[1:] & ~is_word[:-1]
    begins[:1] = is_word[:1]
    starts = np.flatnonzero(begins)
    if not len(starts):
        return made
    stops = is_word.copy()
    stops[:-1] &= ~is_word[1:] | begins[1:]
    ends = np.flatnonzero(stops) + 1
    with np.errstate(over="ignore"):
        powers, inverses = _powers(len(content))
        sums = np.zeros(len(content) + 1, dtype=np.uint64)  # one array for all steps: it is the largest
        letters = np.take(_letters(), content, out=sums[1:], mode="clip")
        np.multiply(letters, powers, out=letters)
        np.cumsum(letters, out=letters)
        words = (sums[ends] - sums[starts]) * inverses[starts]
        begin = np.searchsorted(starts, np.cumsum([0, *(len(e) for e in encoded)]))
        rows = np.repeat(np.arange(len(texts)), np.diff(begin))
        triples, places = _triples(words, rows)
    # Highest bits choose the bin, the next 32 are the value whose minimum is kept.
    places = places * BINS + (triples >> np.uint64(58)).astype(np.int64)
    np.minimum.at(made.reshape(-1), places, (triples >> np.uint64(26)).astype(np.uint32))
    return _densified(made)


class NearDuplicates:
    """Collects the sketches of a stream of texts on disk, and then tells which rows are alike."""

    def __init__(self) -> None:
        self._sketches, *self._bands = (_scratch() for _ in range(1 + BANDS))
        self.count = 0

    def add(self, texts: Sequence[str]) -> None:
        """The next rows' texts, in order."""
        self.add_sketches(sketches(texts))

    def add_sketches(self, made: NDArray[np.uint32]) -> None:
        """The next rows' sketches, in order: the same as `add` for those who compute them elsewhere."""
        self._sketches.write(made.tobytes())
        width = BINS // BANDS
        with np.errstate(over="ignore"):
            mixed = made.reshape(len(made), BANDS, width).astype(np.uint64)
            factors = np.array([pow(_PRIME, n + 1, 2**64) for n in range(width)], dtype=np.uint64)
            hashes = ((mixed * factors).sum(axis=2, dtype=np.uint64) >> np.uint64(32)).astype(np.uint32)
        for band, file in enumerate(self._bands):
            file.write(hashes[:, band].tobytes())
        self.count += len(made)

    def pairs(self, threshold: float = THRESHOLD) -> NDArray[np.int64]:
        """Rows (n, 2) that are alike: a row and an earlier one, of those that share a band the first or the last.

        Whether two rows are a pair depends on these two and the rows before them, never on later ones.
        """
        found = np.empty(0, dtype=np.int64)
        for file in self._bands:
            file.flush()
            file.seek(0)
            hashes = np.frombuffer(file.read(), dtype=np.uint32)
            order = np.argsort(hashes, kind="stable")
            in_order = hashes[order]
            is_first = np.ones(len(order), dtype=bool)
            is_first[1:] = in_order[1:] != in_order[:-1]
            others = ~is_first
            rows = order[others].astype(np.int64) << 32
            firsts = order[is_first][np.cumsum(is_first) - 1]
            found = np.union1d(found, rows | firsts[others])
            found = np.union1d(found, rows | np.roll(order, 1)[others])
        pairs = np.stack((found >> 32, found & 0xFFFFFFFF), axis=1)
        if not len(pairs):
            return pairs
        return pairs[self._alike(pairs, threshold)]

    def _alike(self, pairs: NDArray[np.int64], threshold: float) -> NDArray[np.bool_]:
        self._sketches.flush()
        mapped = mmap.mmap(self._sketches.fileno(), 0, access=mmap.ACCESS_READ)
        kept = np.frombuffer(mapped, dtype=np.uint32).reshape(self.count, BINS)
        found = []
        for chunk in np.array_split(pairs, len(pairs) // 8192 + 1):
            found.append((kept[chunk[:, 0]] == kept[chunk[:, 1]]).mean(axis=1) >= threshold)
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)  # else all that was looked at stays in memory
        return np.concatenate(found)


def _scratch() -> IO[bytes]:
    """A file that is gone when nobody holds it any more."""
    return tempfile.TemporaryFile(prefix="tunesmith-")


def _triples(words: Words64, rows: NDArray[np.int64]) -> tuple[Words64, NDArray[np.int64]]:
    """Hashes of three words in a row, with the row of each; fewer where a row has fewer words."""
    following = []
    for distance in (1, 2):
        same = np.zeros(len(words), dtype=bool)
        same[:-distance] = rows[distance:] == rows[:-distance]
        shifted = np.zeros_like(words)
        shifted[:-distance] = words[distance:]
        shifted[~same] = 0
        following.append((same, shifted))
    (_, second), (has_third, third) = following
    first_of_row = np.concatenate(([True], rows[1:] != rows[:-1]))
    kept = has_third | first_of_row
    mixed: Words64 = (
        words * np.uint64(_PRIME)
        + second * np.uint64(0xC2B2AE3D27D4EB4F)
        + third * np.uint64(0x165667B19E3779F9)
    )
    return _finalized(mixed[kept]), rows[kept]


def _densified(made: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Sketches without empty bins: each takes the next filled one's value, shifted by the distance."""
    empty = made == np.iinfo(np.uint32).max
    rows = np.flatnonzero(empty.any(axis=1) & ~empty.all(axis=1))
    if not len(rows):
        return made
    values, is_empty = made[rows], empty[rows]
    # Index of the next filled bin at or behind each one, going round.
    doubled = np.where(np.concatenate((is_empty, is_empty), axis=1), 4 * BINS, np.arange(2 * BINS))
    following = np.minimum.accumulate(doubled[:, ::-1], axis=1)[:, ::-1][:, :BINS]
    distance = (following - np.arange(BINS)).astype(np.uint32)
    with np.errstate(over="ignore"):
        filled = np.take_along_axis(values, following % BINS, axis=1) + distance * np.uint32(0x9E3779B1)
    made[rows] = filled
    return made


def _finalized(mixed: Words64) -> Words64:
    """Bits spread evenly (splitmix64's finalizer)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


@functools.cache
def _is_letter() -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = _letters() != 0
    return found


@functools.cache
def _letters() -> Words64:
    """What each byte counts as: lower case, and 0 between words."""
    table = np.arange(1, 257, dtype=np.uint64)
    upper = np.arange(ord("A"), ord("Z") + 1)
    table[upper] = table[upper + 32]
    table[list(_SEPARATORS)] = 0
    return table


@functools.cache
def _powers_of(size: int) -> tuple[Words64, Words64]:
    with np.errstate(over="ignore"):
        inverse = pow(_PRIME, -1, 2**64)
        return tuple(  # type: ignore[return-value]
            np.cumprod(
                np.concatenate(([np.uint64(1)], np.full(size, factor, dtype=np.uint64))), dtype=np.uint64
            )
            for factor in (_PRIME, inverse)
        )


def _powers(size: int) -> tuple[Words64, Words64]:
    """Powers of an odd number modulo 2**64 and of its inverse, by which a word's hash is freed of its place."""
    powers, inverses = _powers_of(1 << max(size, 1).bit_length())
    return powers[:size], inverses[: size + 1]
