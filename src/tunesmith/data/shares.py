"""Tokenizing in pieces: several processes, and several nodes, do some each; joined they are what one would have made.

prepare (fates of all rows) -> pieces (folders in the cache, each with its manifest) -> joined (cache.py), pieces gone

A piece is a range of rows. One that is there is not made again, so that what was interrupted goes on. Joining reads the
pieces in order through the same writer: files and fingerprint are those of one process.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data import cache
from tunesmith.data.cache import SplitsWriter
from tunesmith.data.templates import Encoding
from tunesmith.errors import OutOfResources

BATCH = 1000
"""Rows that are rendered and tokenized together."""
PIECE = 20 * BATCH
"""Rows of a piece."""
MANIFEST = "piece.json"


@dataclass(frozen=True)
class Pieces:
    """The pieces of one data set, tokenized in one way, in the cache."""

    name: str
    rows: int

    @property
    def folder(self) -> Path:
        """Where they lie until they are joined."""
        return cache.folder() / "prepared" / f"{self.name}.pieces"

    def ranges(self) -> list[tuple[int, int]]:
        """First row and end of each piece."""
        return [(begin, min(begin + PIECE, self.rows)) for begin in range(0, self.rows, PIECE)]

    def place(self, begin: int) -> Path:
        """The folder of the piece that begins with this row."""
        return self.folder / f"{begin // PIECE:06}"

    def has(self, begin: int) -> bool:
        """Whether a piece is there and whole."""
        return (self.place(begin) / MANIFEST).is_file()

    def facts(self, begin: int) -> Mapping[str, Any] | None:
        """The manifest of a piece whose files are what it says; None where there is none.

        A piece whose files are others is removed, and made anew.
        """
        place = self.place(begin)
        try:
            facts: dict[str, Any] = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
            whole = all(_sealed(place / name) == seal for name, seal in facts["files"].items())
        except (OSError, ValueError, KeyError):
            whole = False
        if not whole:
            shutil.rmtree(place, ignore_errors=True)
            return None
        return facts

    def make(self, begin: int, end: int, write: Callable[[SplitsWriter], dict[str, Any]]) -> dict[str, Any]:
        """Have a piece written, and seal it; its manifest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".making-", dir=self.folder))
        try:
            with SplitsWriter(staging) as written:
                told = write(written)
            files = {path.name: _sealed(path) for path in sorted(staging.iterdir())}
            tokens = written.tokens
            facts = {"first_row": begin, "rows": end - begin, "tokens": tokens, "files": files, "told": told}
            (staging / MANIFEST).write_text(json.dumps(facts), encoding="utf-8")
            shutil.rmtree(self.place(begin), ignore_errors=True)
            try:
                staging.rename(self.place(begin))
            except OSError:
                if not self.has(begin):  # else another node was faster
                    raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return facts

    def remove(self) -> None:
        """When they are joined. What another node is still writing stays, and that node removes it."""
        for begin, _ in self.ranges():
            if self.has(begin):
                with suppress(OSError):  # another node was faster
                    (self.place(begin) / MANIFEST).unlink()
                shutil.rmtree(self.place(begin), ignore_errors=True)
        with suppress(OSError):  # it is gone, or has such a piece
            self.folder.rmdir()


def _sealed(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def replayed(place: Path, written: SplitsWriter) -> None:
    """Write a piece's rows once more, in the order in which they were written."""
    for line in (place / "held_out.jsonl").open(encoding="utf-8"):
        written.hold_out_line(line)
    entries = groupby(enumerate(cache.read_ledger(place / "ledger.arrow")), key=lambda item: item[0] // BATCH)
    for _, batch in entries:
        written.account([entry for _, entry in batch])
    parts = [
        (rows[0] // BATCH, order, fate, rows, encodings)
        for order, fate in enumerate(written.fates)
        for rows, encodings in _batches(place / f"{fate}.arrow")
    ]
    for _, _, fate, rows, encodings in sorted(parts, key=lambda part: part[:2]):
        written.append(fate, rows, encodings)


def _batches(file: Path) -> Iterator[tuple[list[int], list[Encoding]]]:
    import pyarrow as arrow

    with arrow.memory_map(str(file)) as content:
        for batch in arrow.ipc.open_stream(content):
            ids, labels = (
                _lists(batch.column(batch.schema.get_field_index(name))) for name in ("input_ids", "labels")
            )
            good, margins = batch.column("good").to_pylist(), batch.column("margin").to_pylist()
            yield (
                batch.column("row").to_pylist(),
                [
                    Encoding(one, other, mark, margin)
                    for one, other, mark, margin in zip(ids, labels, good, margins, strict=True)
                ],
            )


def _lists(column: Any) -> list[Any]:
    offsets, values = column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=False)
    return [np.array(values[begin:end]) for begin, end in pairwise(offsets)]


def shared_out(
    pieces: Pieces,
    make: Callable[[Any, int, int], bool],
    given: Any,
    *,
    processes: int,
    share: tuple[int, int] = (1, 1),
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Have the pieces of a share that are not there made, by several processes started anew; how many were made.

    `make(given, begin, end)` makes one, in a process that may have made others, and says whether it did; of `share`
    (1, 4) it is every fourth piece from the first on. `watch` is told how many of how many are done.
    """
    mine = [
        bounds
        for number, bounds in enumerate(pieces.ranges())
        if number % share[1] == share[0] - 1 and pieces.facts(bounds[0]) is None
    ]
    made = 0
    if processes == 1 or len(mine) < 2:
        for done, (begin, end) in enumerate(mine, 1):
            made += make(given, begin, end)
            watch(done, len(mine))
        return made
    pool = ProcessPoolExecutor(
        min(processes, len(mine)),
        multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        waiting = [pool.submit(make, given, begin, end) for begin, end in mine]
        for done, future in enumerate(as_completed(waiting), 1):
            made += future.result()
            watch(done, len(mine))
    except BrokenProcessPool:
        raise OutOfResources(
            "A process that tokenized rows has died, most likely for want of memory.",
            fix="Give fewer --processes; pieces that are done are kept.",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
    return made
