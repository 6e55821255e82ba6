"""Prepared data sets on disk: written once as Arrow files, found again by the content they were made from.

A folder is complete or absent: it is written under another name and renamed. What is read from it is
mapped into memory piece by piece, so the size of a data set is the disk's matter.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.examples import Example, LedgerEntry, Prompt, Row, Tally, as_json, from_json
from tunesmith.data.splitting import FATES
from tunesmith.data.templates import Encoding
from tunesmith.errors import DataError

LIMIT = 50 * 1024**3
"""Bytes that the cache may take; what was not used for longest goes first."""
ABANDONED = 7 * 24 * 3600
"""Seconds after which a folder that is still being written belongs to nobody."""
IN_USE = 6 * 3600
"""Seconds after its last use in which nothing is deleted: whoever uses it for longer says so now and then."""
OFTEN = 600
"""Seconds after which that is said again."""
FACTS = "facts.json"

_said: dict[Path, float] = {}
"""When this process said last of a folder that it uses it."""


@dataclass(frozen=True)
class Encodings(Sequence[Encoding]):
    """Encoded examples in an Arrow file: columns `row` (running number of the input row), `input_ids`, `labels`,
    `good` where answers are judged, and `margin` where a row says by how much one is better."""

    file: Path

    @cached_property
    def _content(self) -> mmap.mmap:
        with self.file.open("rb") as content:
            return mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)

    @cached_property
    def _table(self) -> Any:
        import pyarrow as arrow

        return arrow.ipc.open_stream(arrow.py_buffer(self._content)).read_all()

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file}  # another process maps the file itself

    def release(self) -> None:
        """Hand back the memory that holds what was read of the file, which is still in use and stays readable. Where a
        system cannot, nothing.

        What is read of a mapped file counts as memory of this process for as long as nobody else needs room, so a run
        would seem to take as much more as its file is long.
        """
        if "_content" in self.__dict__ and hasattr(mmap, "MADV_DONTNEED"):
            self._content.madvise(mmap.MADV_DONTNEED)
        if time.monotonic() - _said.get(self.file.parent, -math.inf) > OFTEN:
            _use(self.file.parent)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each example."""
        return self._numbers("tokens")

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Running number of the input row that each example comes from, counted from 0."""
        return self._numbers("row")

    def _numbers(self, column: str) -> NDArray[np.int64]:
        return np.asarray(self._table.column(column).to_numpy(), dtype=np.int64)

    @property
    def examples(self) -> StoredExamples:
        """The prompts that the encodings were made of, one for each; only methods that learn from rewards have
        them."""
        return StoredExamples(self.file.with_suffix(".jsonl"))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        ids, labels, good, margin = (
            self._table.column(name)[number].as_py() for name in ("input_ids", "labels", "good", "margin")
        )
        return Encoding(tuple(ids), tuple(labels), good, margin)

    @cached_property
    def good(self) -> list[bool | None]:
        """Of each example whether its answer is the good one; None where answers are not judged."""
        values: list[bool | None] = self._table.column("good").to_pylist()
        return values

    @cached_property
    def margins(self) -> list[float | None]:
        """Of each judged answer by how much its pair's better one is better; None where nothing says so."""
        values: list[float | None] = self._table.column("margin").to_pylist()
        return values

    def dataset(self, *columns: str) -> Any:
        """The examples as the data set that trainers read: by default `input_ids` and `labels`."""
        from datasets import Dataset
        from datasets.table import MemoryMappedTable

        # The same mapping, so that `release` reaches what trainers read.
        table = MemoryMappedTable(self._table, str(self.file))
        return Dataset(table).select_columns(list(columns or ("input_ids", "labels")))


@dataclass(frozen=True)
class StoredExamples(Sequence[Example]):
    """Examples in a file of one JSON object per line, read when asked for."""

    file: Path

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        sizes = []
        with self.file.open("rb") as content:
            sizes = [len(line) for line in content]
        return np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return len(self._places) - 1

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        with self.file.open("rb") as content:
            content.seek(int(self._places[number]))
            return from_json(content.readline().decode())

    def __iter__(self) -> Iterator[Example]:
        with self.file.open("rb") as content:
            for line in content:
                yield from_json(line.decode())


class EncodingWriter:
    """Writes encodings in batches, and hashes what it writes."""

    def __init__(self, file: Path, digest: Any) -> None:
        import pyarrow as arrow

        self.digest = digest
        numbers = arrow.list_(arrow.int32())
        self._schema = arrow.schema(
            [
                ("row", arrow.int64()),
                ("tokens", arrow.int32()),
                ("input_ids", numbers),
                ("labels", numbers),
                ("good", arrow.bool_()),
                ("margin", arrow.float64()),
            ]
        )
        self._writer = arrow.ipc.new_stream(str(file), self._schema)

    def write(self, rows: Sequence[int], encodings: Sequence[Encoding]) -> None:
        """The next examples, with the number of the row of each."""
        import pyarrow as arrow

        if not rows:
            return
        lengths = np.array([len(encoding.input_ids) for encoding in encodings], dtype=np.int32)
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        columns = []
        for name in ("input_ids", "labels"):
            values = np.concatenate([getattr(encoding, name) for encoding in encodings], dtype=np.int32)
            self.digest.update(values)
            columns.append(arrow.ListArray.from_arrays(offsets, values))
        self.digest.update(lengths)
        good = [encoding.good for encoding in encodings]
        if any(mark is not None for mark in good):
            self.digest.update(repr(good).encode())
        margins = [encoding.margin for encoding in encodings]
        if any(margin is not None for margin in margins):
            self.digest.update(repr(margins).encode())
        numbers = arrow.array(rows, arrow.int64())
        judged = [arrow.array(good, arrow.bool_()), arrow.array(margins, arrow.float64())]
        self._writer.write_batch(
            arrow.record_batch([numbers, arrow.array(lengths), *columns, *judged], schema=self._schema)
        )

    def close(self) -> None:
        """End the file."""
        self._writer.close()


class LedgerWriter:
    """Writes what became of every row, in batches."""

    def __init__(self, file: Path) -> None:
        import pyarrow as arrow

        self._schema = arrow.schema(
            [
                ("source", arrow.string()),
                ("row", arrow.int64()),
                ("fate", arrow.string()),
                ("reason", arrow.string()),
                ("tokens", arrow.int32()),
                ("tokens_cut", arrow.int32()),
                ("copies", arrow.int32()),
            ]
        )
        self._writer = arrow.ipc.new_stream(str(file), self._schema)

    def write(self, entries: Sequence[LedgerEntry]) -> None:
        """The next rows."""
        import pyarrow as arrow

        columns = [
            [entry.row.source for entry in entries],
            [entry.row.number for entry in entries],
            [entry.fate for entry in entries],
            # A reason may quote a row, and rows may hold half characters.
            [e.reason and e.reason.encode("utf-8", "backslashreplace").decode() for e in entries],
            [entry.tokens for entry in entries],
            [entry.tokens_cut for entry in entries],
            [entry.copies for entry in entries],
        ]
        arrays = [arrow.array(c, item.type) for c, item in zip(columns, self._schema, strict=True)]
        self._writer.write_batch(arrow.record_batch(arrays, schema=self._schema))

    def close(self) -> None:
        """End the file."""
        self._writer.close()


class SplitsWriter:
    """Writes a data set while it is encoded: train.arrow, validation.arrow, held_out.jsonl and ledger.arrow; for
    prompts train.jsonl and validation.jsonl as well.

    To be used with `with`; `facts` follows when all is written.
    """

    def __init__(self, folder: Path) -> None:
        self._digest, self._tally = hashlib.sha256(), Tally()
        self._encodings = {
            fate: EncodingWriter(folder / f"{fate}.arrow", self._digest) for fate in ("train", "validation")
        }
        self._ledger = LedgerWriter(folder / "ledger.arrow")
        self._held_out = (folder / "held_out.jsonl").open("w", encoding="utf-8")
        self._folder, self._prompts = folder, dict[str, TextIO]()
        self.tokens = 0
        """Of what was written to train and validate on."""

    @property
    def fates(self) -> tuple[str, ...]:
        """Of which encodings are written, in this order within a batch of rows."""
        return tuple(self._encodings)

    def __enter__(self) -> SplitsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._encodings.values():
            file.close()
        self._ledger.close()
        for lines in (self._held_out, *self._prompts.values()):
            lines.close()

    def hold_out(self, example: Example) -> None:
        """Keep an example that is measured on."""
        self.hold_out_line(as_json(example) + "\n")

    def hold_out_line(self, line: str) -> None:
        """Keep an example that was written so before."""
        self._held_out.write(line)

    def ask(self, prompt: Prompt, entry: LedgerEntry) -> None:
        """Keep the prompt of the next encoding of its split, as often as that is written."""
        if not self._prompts:
            self._prompts = {
                fate: (self._folder / f"{fate}.jsonl").open("w", encoding="utf-8") for fate in self._encodings
            }
        line = as_json(prompt) + "\n"
        self._prompts[entry.fate].write(line * entry.copies)
        self._digest.update(line.encode("utf-8", "surrogatepass"))

    def write(
        self, entries: Sequence[LedgerEntry], encoded: Iterable[tuple[int, LedgerEntry, Sequence[Encoding]]]
    ) -> None:
        """A batch of rows: their places in the ledger; and of those that are trained or validated on the
        running number, the entry and the encodings, written as often as the entry has copies."""
        made: dict[str, tuple[list[int], list[Encoding]]] = {fate: ([], []) for fate in self._encodings}
        for number, entry, encodings in encoded:
            numbers, written = made[entry.fate]
            written += [*encodings] * entry.copies
            numbers += [number] * len(encodings) * entry.copies
        for fate in self._encodings:
            self.append(fate, *made[fate])
        self.account(entries)

    def append(self, fate: str, rows: Sequence[int], encodings: Sequence[Encoding]) -> None:
        """Encodings of a fate, with the running number of the row of each."""
        self._encodings[fate].write(rows, encodings)
        self.tokens += sum(len(encoding.input_ids) for encoding in encodings)

    def account(self, entries: Sequence[LedgerEntry]) -> None:
        """What became of a batch of rows."""
        for entry in entries:
            self._tally.add(entry)
        self._ledger.write(entries)

    def facts(self, *, rows: int, fix: str) -> dict[str, Any]:
        """Counts by fate, reasons and fingerprint of what was written.

        Raises DataError with `fix` where nothing is left to train on.
        """
        ledger = self._tally.ledger(lambda: iter(()))
        counts, reasons = ledger.counts(), ledger.reasons()
        assert counts["rows_in"] == sum(counts[fate] for fate in FATES) == rows
        if not counts["train"]:
            raise DataError(
                "No training example is left after tokenizing.",
                found="; ".join(f"{count} × {reason}" for reason, count in reasons.items()),
                fix=fix,
            )
        return {"counts": counts, "reasons": reasons, "fingerprint": self._digest.hexdigest()}


def read_ledger(file: Path) -> Iterator[LedgerEntry]:
    """The rows that a LedgerWriter wrote."""
    import pyarrow as arrow

    with arrow.memory_map(str(file)) as content:
        for batch in arrow.ipc.open_stream(content):
            for values in batch.to_pylist():
                row = Row(values.pop("source"), values.pop("row"))
                yield LedgerEntry(row, **values)


def folder() -> Path:
    """Where prepared data sets are kept: $TUNESMITH_CACHE, else tunesmith/ in the user's cache folder."""
    own = os.environ.get("TUNESMITH_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tunesmith"


def key(facts: Mapping[str, Any]) -> str:
    """Name of what was prepared from these facts and by this code."""
    from importlib.metadata import version

    code = hashlib.sha256()
    here = Path(__file__).parent
    for file in (*sorted(here.glob("*.py")), *sorted((here.parent / "methods").glob("*.py"))):
        code.update(file.read_bytes())
    libraries = {name: version(name) for name in ("transformers", "tokenizers", "tiktoken", "jinja2")}
    content = json.dumps([facts, libraries, code.hexdigest()], sort_keys=True, default=str)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of everything about a tokenizer that decides on ids: vocabulary, rules, special tokens, template."""
    digest = hashlib.sha256()
    if tokenizer.is_fast:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    else:
        digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode("utf-8", "surrogatepass"))
        digest.update(repr(sorted(tokenizer.init_kwargs.items(), key=str)).encode("utf-8", "surrogatepass"))
    facts = [type(tokenizer).__name__, tokenizer.special_tokens_map, tokenizer.chat_template]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _use(place: Path) -> None:
    """Mark a folder as used now; one that others own, or that is not kept, stays as it is."""
    _said[place] = time.monotonic()
    with suppress(OSError):
        os.utime(place / FACTS)


def find(name: str) -> Path | None:
    """The folder of what was prepared under this name, marked as used; None where there is none."""
    place = folder() / "prepared" / name
    if not (place / FACTS).is_file():
        return None
    _use(place)
    return place


def unwritable() -> str | None:
    """Why nothing can be kept, None where it can."""
    place = folder() / "prepared"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"{place}: {error.strerror or error}"


@contextmanager
def making(name: str | None) -> Iterator[Path]:
    """A folder to write into. It is kept under the name when the block ends well, and is gone otherwise.

    Without a name it lies in the system's temporary folder, until this process ends.
    """
    if name is None:
        import atexit

        staging = Path(tempfile.mkdtemp(prefix="tunesmith-"))
        atexit.register(shutil.rmtree, staging, ignore_errors=True)
        yield staging
        return
    place = folder() / "prepared"
    place.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".making-", dir=place))
    try:
        yield staging
        try:
            staging.rename(place / name)
        except OSError:
            if not (place / name / FACTS).is_file():  # else another process was faster
                shutil.rmtree(place / name, ignore_errors=True)
                staging.rename(place / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _make_room(place, keep=name)


def _make_room(place: Path, *, keep: str) -> None:
    """Delete what was not used for longest, until the cache is within its limit or all of it is in use."""
    found = []
    for staging in (
        *place.glob(".making-*"),
        *place.glob("*.pieces"),
    ):  # of what was killed and never gone on with
        with suppress(OSError):  # another process may have joined these
            if time.time() - staging.stat().st_mtime > ABANDONED:
                shutil.rmtree(staging, ignore_errors=True)
    for entry in place.iterdir():
        facts = entry / FACTS
        if facts.is_file():
            size = sum(file.stat().st_size for file in entry.iterdir())
            found.append((facts.stat().st_mtime, size, entry))
    total = sum(size for _, size, _ in found)
    for used, size, entry in sorted(found):
        if total <= LIMIT or time.time() - used < IN_USE:
            return
        if entry.name != keep:
            shutil.rmtree(entry, ignore_errors=True)
            total -= size
