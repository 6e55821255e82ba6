"""A source's rows in pieces, worked on by several processes, results in order and never all in memory.

A JSON Lines file is cut at line ends, and the processes read their pieces themselves; rows of every other
source are read here and sent to them. What is small is done in this process.
"""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tunesmith.data.sources import Broken, Record, Source, lines_of, parsed, skip_line
from tunesmith.errors import DataError, OutOfResources

BYTES = 1 << 20
"""Size of a piece of a file: some two thousand short rows."""
ROWS = 1000
"""Rows in a piece of any other source."""
SMALL = 8
"""Sources of no more pieces are done in this process: starting others takes longer."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Lines:
    """Whole lines of a JSON Lines file: where they begin and end, the number of the first, and how many they are."""

    path: Path
    begin: int
    end: int
    first: int
    count: int


Piece = Lines | list[Record | Broken]


def rows(piece: Piece) -> Iterator[Record | Broken]:
    """The rows of a piece, as the source itself gives them."""
    if isinstance(piece, list):
        yield from piece
        return
    with piece.path.open("rb") as file:
        file.seek(piece.begin)
        yield from parsed(piece.path.name, itertools.islice(lines_of(file), piece.count), piece.first)


def pieces(source: Source) -> Iterator[Piece]:
    """A source in pieces, in order."""
    if source.lines:
        yield from _cut(source.lines)
        return
    piece: list[Record | Broken] = []
    try:
        for record in source.scan():
            piece.append(record)
            if len(piece) == ROWS:
                yield piece
                piece = []
    except DataError:
        yield piece  # rows before the damage count as well
        raise
    yield piece


def _cut(path: Path) -> Iterator[Lines]:
    begin, first = 0, 1
    with path.open("rb") as file:
        while content := file.read(BYTES):
            count, end = content.count(b"\n"), begin + len(content)
            if not content.endswith(b"\n"):
                count, end = count + 1, end + skip_line(file)
            yield Lines(path, begin, end, first, count)
            begin, first = end, first + count


def worked(
    source: Source, work: Callable[[Piece], Result], *, processes: int
) -> Iterator[tuple[Piece, Result]]:
    """Each piece with what `work` makes of it, in order. `work` has to be picklable.

    With more than one process the program that calls this must be importable without running
    (`if __name__ == "__main__":`), as always where Python starts processes anew.
    """
    all_pieces = _readable(source)
    begun = list(itertools.islice(all_pieces, SMALL + 1))
    if processes < 2 or len(begun) <= SMALL:
        for piece in itertools.chain(begun, all_pieces):
            yield piece, work(piece)
        return
    # Started anew, not forked: this process may have threads, of a tokenizer or of a display.
    # Ctrl-C reaches all of them, and this one ends the others.
    pool = ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    waiting: deque[tuple[Piece, Future[Result]]] = deque()
    try:
        for piece in itertools.chain(begun, all_pieces):
            waiting.append((piece, pool.submit(work, piece)))
            if len(waiting) > 4 * processes:
                done, result = waiting.popleft()
                yield done, result.result()
        while waiting:
            done, result = waiting.popleft()
            yield done, result.result()
    except BrokenProcessPool:
        raise OutOfResources(
            "A process that checked rows has died, most likely for want of memory.",
            fix="Give fewer --processes; one needs the least memory.",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _readable(source: Source) -> Iterator[Piece]:
    try:
        yield from pieces(source)
    except OSError as error:
        raise DataError(f"{source.name} cannot be read.", found=error.strerror) from None
