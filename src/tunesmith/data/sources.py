"""Where rows come from: files, folders, URLs, the Hub, the examples that ship; every row with its place.

A source is read row by row, as often as somebody asks, and never held in memory (a .json file excepted:
its one value has to be parsed whole). `read` is strict: a broken line is an error that names file, line
and column. `open_source` leaves broken rows in the stream, for those who list them.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from tunesmith import models
from tunesmith.data import remote
from tunesmith.data.examples import Row
from tunesmith.data.remote import Shard
from tunesmith.errors import DataError, closest, counted, nearest, size

Role = Literal["train", "validation", "held_out"]

ROLES: dict[str, Role] = {
    "train": "train", "training": "train",
    "eval": "validation", "valid": "validation", "validation": "validation", "dev": "validation", "val": "validation",
    "test": "held_out", "held_out": "held_out", "holdout": "held_out",
}  # fmt: skip
"""Names of splits and files, and the role each one plays."""

OTHER_FILES = {
    ".tsv",
    ".xls",
    ".xlsx",
    ".arrow",
    ".zip",
    ".gz",
    ".zst",
    ".xml",
    ".html",
    ".md",
    ".pdf",
    ".docx",
}
"""Suffixes of files that are no data to us, and none of a Hub id either."""

SHOWN_PROBLEMS = 10

LONGEST = 16 * 2**20
"""Bytes of a line, and characters of a cell, at most; a row of a million tokens has some four million."""
LARGEST_JSON = 512 * 2**20
"""Bytes of a .json file at most: it is parsed whole, which takes seven times as much memory."""
DEEPEST = 64
"""Levels of lists and objects in a row at most."""
LARGEST_BATCH, LARGEST_COLUMN = 2**27, 2**31
"""Bytes that the rows of a Parquet file read at once, and a column of one of its row groups, may come to at most."""
PACKED = 100
"""How many times as large as in its file a column may be: text is packed to a fifth, a bomb to a thousandth."""


def _number(text: str) -> float | None:
    """A number with a point or an exponent; None where none is so large."""
    number = float(text)
    return number if math.isfinite(number) else None


_decode = json.JSONDecoder(parse_constant=lambda name: None, parse_float=_number).decode
"""Reads JSON as every row is read: what is no number (NaN, Infinity, 1e999) is no value, as `null` is. Where it came
from it stands for a value that is missing, and as an answer nobody means it. Text is text, the word `NaN` as well."""


def _with_numbers(value: Any) -> Any:
    """The same of what a library or a program gives."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _with_numbers(inner) for name, inner in value.items()}
    return [_with_numbers(inner) for inner in value] if isinstance(value, list | tuple) else value


class Record(NamedTuple):
    """One row as it stands in the source, but for numbers that are none, and the role its file or split gives it."""

    row: Row
    values: Mapping[str, Any]
    role: Role | None = None


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that cannot be read: where it stands, what is wrong there, and what mends it."""

    row: Row
    place: str
    problem: str
    fix: str
    unit: str = "line"
    column: int | None = None
    """Column of a text line, counted from 1."""


class BrokenRows(DataError):
    """Rows that cannot be read; `details` has them for programs, without the excerpts that people see."""

    def __init__(self, problem: str, shown: Sequence[Broken], count: int, *, fix: str) -> None:
        self.details = {
            "broken": [
                {
                    "source": record.row.source,
                    "row": record.row.number,
                    "place": record.place,
                    "column": record.column,
                    "problem": record.problem.partition("\n")[0],
                }
                for record in shown
            ],
            "count": count,
        }
        more = [f"... and {count - len(shown)} more"] if count > len(shown) else []
        lines = [f"{record.place}: {record.problem}" for record in shown]
        super().__init__(problem, found="\n         ".join([*lines, *more]), fix=fix)


Scan = Callable[[], Iterator[Record | Broken]]
DataFile = Path | Shard
"""A file here, or one behind a URL."""


@dataclass(frozen=True)
class Source:
    """A data set that can be read again and again, row by row."""

    name: str
    scan: Scan
    """Begins at the first row every time it is called."""
    digest: Callable[[], str]
    """Hash of the content."""
    notes: tuple[str, ...] = ()
    place: Path | None = None
    """The file or folder; None for what is no local file."""
    lines: Path | None = None
    """The JSON Lines file whose lines are the rows, for those who read it in pieces; None for other sources."""

    @property
    def title(self) -> str:
        """What an error calls it: the file or folder as it is on the disk."""
        return self.place.name if self.place else self.name

    @functools.cached_property
    def fingerprint(self) -> str:
        """The content, the files' names and the splits they name: equal only where every row is the same."""
        return self.digest()

    @property
    def records(self) -> Iterator[Record]:
        """The rows. Raises DataError that lists the broken ones, once all are known."""
        shown: list[Broken] = []
        files: set[str] = set()
        fixes: dict[str, None] = {}
        count, first = 0, None
        for record in self.scan():
            if isinstance(record, Record):
                yield record
                continue
            count += 1
            first = first or record
            files.add(record.row.source)
            fixes[record.fix] = None
            if len(shown) < SHOWN_PROBLEMS:
                shown.append(record)
        if first:
            named = next(iter(files)) if len(files) == 1 else self.name
            place = self.place
            if place and place.is_dir() and (place / named).is_file():
                place = place / named
            cleaned = f"`tunesmith validate {shlex.quote(str(place or self.name))} --fix`"
            raise BrokenRows(
                f"{named} has {counted(count, f'broken {first.unit}')}.",
                shown,
                count,
                fix=f"{' '.join(fixes)} {cleaned} lists them and writes a copy without them.",
            )

    @functools.cached_property
    def facts(self) -> Facts:
        """What one reading of every row tells. Raises DataError as `records` does."""
        for _ in self.observed():
            pass
        known: Facts = self.__dict__["facts"]
        return known

    def observed(self) -> Iterator[Record]:
        """The rows; when the last one has been given, `facts` are known without another reading."""
        if "facts" in self.__dict__:
            yield from self.records
            return
        signatures: Counter[tuple[str, ...]] = Counter()
        names: dict[str, None] = {}
        roles: Counter[tuple[str, Role | None]] = Counter()
        seen: dict[tuple[str, ...], None] = {}
        for record in self.records:
            keys = tuple(record.values)
            if keys not in seen:
                seen[keys] = None
                names.update(dict.fromkeys(keys))
            signatures[tuple([c for c, value in record.values.items() if value is not None])] += 1
            roles[record.row.source, record.role] += 1
            yield record
        self.__dict__["facts"] = Facts(signatures, tuple(names), roles)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns with a value in at least one row, in order of appearance."""
        filled = {name for signature in self.facts.signatures for name in signature}
        return tuple(name for name in self.facts.names if name in filled)

    @property
    def empty_columns(self) -> tuple[str, ...]:
        """Columns that are there without a value in any row."""
        filled = set(self.columns)
        return tuple(name for name in self.facts.names if name not in filled)


@dataclass(frozen=True)
class Facts:
    """What a data set's rows look like."""

    signatures: Counter[tuple[str, ...]]
    """Number of rows by the columns that have a value."""
    names: tuple[str, ...]
    """All columns, in order of appearance."""
    places: Counter[tuple[str, Role | None]]
    """Number of rows by file (or split) and the role it gives them."""

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.signatures.total()


def read(
    dataset: str,
    *,
    config: str | None = None,
    split: str | None = None,
    data_files: str | None = None,
    revision: str | None = None,
    max_rows: int | None = None,
    streaming: bool = False,
) -> Source:
    """The rows of `example:NAME`, a file, a folder, a URL or a Hub id, all of them seen once to be whole.

    `split` takes one named split, which is then divided like a single file. `streaming` reads a Hub set
    over the network, no more of it than `max_rows`. Raises DataError.
    """
    source = open_source(
        dataset,
        config=config,
        split=split,
        data_files=data_files,
        revision=revision,
        max_rows=max_rows,
        streaming=streaming,
    )
    return checked(source, dataset)


def checked(source: Source, dataset: str) -> Source:
    """The source, which is not empty, with notes on the roles of its files. Raises DataError as `facts` does."""
    if not source.facts.count:
        raise DataError(f"{dataset} has no rows.", fix="Check the file: expected at least one record.")
    notes = [
        f"{place} names rows for {role.replace('_', '-')}" for place, role in source.facts.places if role
    ]
    changed = replace(source, notes=(*source.notes, *notes))
    changed.__dict__["facts"] = source.facts
    return changed


def open_source(
    dataset: str,
    *,
    config: str | None = None,
    split: str | None = None,
    data_files: str | None = None,
    revision: str | None = None,
    max_rows: int | None = None,
    streaming: bool = False,
) -> Source:
    """The same without having read a row. Raises DataError where there is nothing to open."""
    path = local(dataset)
    if remote.is_url(dataset):
        _check_url_options(dataset, config=config, revision=revision)
        source = _from_url(dataset, data_files)
        source = _one_split(source, split) if split else source
    elif path is None:
        source = _from_hub(
            dataset,
            config=config,
            split=split,
            data_files=data_files,
            revision=revision,
            max_rows=max_rows if streaming else None,
            streaming=streaming,
        )
    else:
        check_options(
            dataset, path, config=config, revision=revision, streaming=streaming, data_files=data_files
        )
        source = _from_folder(path, data_files) if path.is_dir() else _from_file(path)
        source = _one_split(source, split) if split else source
    if max_rows:
        note = f"at most the first {max_rows} rows are used (max_rows)"
        scan = source.scan
        source = replace(
            source,
            scan=lambda: itertools.islice(scan(), max_rows),
            digest=functools.partial(_limited, source, max_rows),
            notes=(*source.notes, note),
            lines=None,
        )
    return source


def check_options(
    dataset: str,
    path: Path,
    *,
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    data_files: str | None = None,
) -> None:
    """Raises DataError for options that a local data set has no use for."""
    for_hub = {"config": config, "revision": revision, "streaming": streaming}
    ignored = [name for name, value in for_hub.items() if value]
    if ignored:
        raise DataError(
            f"data.{ignored[0]} is for Hub data sets, and {dataset} is local.",
            fix="Remove it."
            + (" Local files are always read in pieces." if ignored[0] == "streaming" else ""),
        )
    if data_files and not path.is_dir():
        raise DataError(
            f"data.data_files picks files of a folder, and {dataset} is a file.", fix="Remove it."
        )


def _check_url_options(dataset: str, *, config: str | None, revision: str | None) -> None:
    """Raises DataError for options that files behind a URL have no use for."""
    for name, value in {"config": config, "revision": revision}.items():
        if value:
            raise DataError(
                f"data.{name} is for Hub data sets by their id, and {dataset} is a URL.",
                fix="Remove it; a URL names folder and version itself (hf://datasets/owner/name@revision/folder).",
            )


def distinct(sources: Sequence[Source], datasets: Sequence[str]) -> list[Source]:
    """The sources of a mix; local ones that share a name get as much of their path as tells them apart.

    Rows of `a/data.jsonl` and `b/data.jsonl` would else both stand as `data.jsonl` in the ledger.
    """
    places = [source.place.resolve() if source.place else None for source in sources]
    made = []
    for source, place in zip(sources, places, strict=True):
        # Folders name rows by the path inside, so any two of them may clash.
        others = {
            other
            for other in places
            if other and place and other != place
            and (other.name == place.name or (other.is_dir() and place.is_dir()))
        }  # fmt: skip
        made.append(_renamed(source, place, _apart(place, others)) if place and others else source)
    return made


def _apart(place: Path, others: set[Path]) -> str:
    """The shortest end of a path that none of the others ends with."""
    for count in range(1, len(place.parts)):
        end = place.parts[-count:]
        if all(other.parts[-count:] != end for other in others):
            return "/".join(end)
    return place.as_posix()


def _renamed(source: Source, place: Path, name: str) -> Source:
    is_folder = place.is_dir()

    def named(row: Row) -> Row:
        return Row(
            f"{name}/{row.source}" if is_folder else name + row.source.removeprefix(place.name), row.number
        )

    def scan() -> Iterator[Record | Broken]:
        for record in source.scan():
            row = named(record.row)
            yield record._replace(row=row) if isinstance(record, Record) else replace(record, row=row)

    return replace(source, name=name, scan=scan, lines=None)


def _limited(source: Source, max_rows: int) -> str:
    return f"{source.fingerprint}:{max_rows}"


def in_memory(name: str, rows: Sequence[Mapping[str, Any]]) -> Source:
    """Rows that a program has made."""
    records = [Record(Row(name, number), values) for number, values in enumerate(rows, 1)]
    content = json.dumps([dict(row) for row in rows], sort_keys=True, default=str)
    return Source(name, lambda: iter(records), lambda: hashlib.sha256(content.encode()).hexdigest())


def local(dataset: str) -> Path | None:
    """The path that a data set's name stands for, or None for a Hub id or a URL."""
    if remote.is_url(dataset):
        return None
    if dataset.startswith("example:"):
        from tunesmith.assets import EXAMPLES

        name = dataset.removeprefix("example:")
        if name not in EXAMPLES:
            raise DataError(f"There is no example data set '{name}'.", fix=nearest(name, EXAMPLES))
        return EXAMPLES[name].path
    path = Path(dataset).expanduser()
    if path.exists():
        return path
    if path.suffix.lower() in OTHER_FILES or models.is_path(dataset):
        near = _file_like(path)
        raise DataError(
            f"There is no file {dataset}.",
            fix=f"Did you mean '{near}'?" if near else "Check the path; a Hub id looks like owner/name.",
        )
    return None


def _file_like(path: Path) -> Path | None:
    """The data file beside a path that is not there whose name is spelled most like it.

    Folder and suffix do not count: files that have nothing to do with each other agree in them.
    """
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    near = {p.stem: p for p in beside if p.suffix.lower() in READERS}
    close = closest(path.stem, near)
    return near[close] if close else None


def locate(dataset: str) -> None:
    """Raises DataError where nothing stands behind a name: no file, no folder, no example, and neither the Hub
    nor its cache has such a data set. No rows are read."""
    if local(dataset) is not None:
        return
    if remote.is_url(dataset):
        remote.shards(dataset, tuple(READERS))
        return
    problem = _problem_on_hub(dataset, None)
    if problem is None:
        return
    import datasets

    _check_hub(dataset)
    try:
        with _cache_only():
            datasets.load.dataset_module_factory(dataset)
    except Exception:  # whatever is wrong with the cache, the data set is not there
        raise _not_loaded(dataset, problem) from None


def _problem_on_hub(dataset: str, revision: str | None) -> str | None:
    """What keeps a data set from being loaded from the Hub, by one short request.

    The libraries would ask again and again before they give up.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "the Hub is switched off (HF_HUB_OFFLINE)"
    try:
        HfApi().dataset_info(dataset, revision=revision, timeout=models.HUB_SECONDS)
    except RepositoryNotFoundError:
        return "the Hub has no such data set, or it is private: then `hf auth login`"
    except RevisionNotFoundError:
        return f"the Hub's data set has no revision '{revision}'"
    except Exception as error:  # the network's many ways to fail come as many types
        first_line = next(iter(str(error).strip().splitlines()), "")[:200]
        return f"the Hub cannot be reached ({type(error).__name__}: {first_line})"
    return None


@contextlib.contextmanager
def _cache_only() -> Iterator[None]:
    """Let `datasets` look into its cache and nowhere else."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _from_file(path: Path, role: Role | None = None) -> Source:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path.name} is not of a known format.",
            found=f"suffix '{path.suffix}'",
            fix=f"Use one of {' '.join(READERS)}.",
        )
    if not path.is_file():  # a pipe would be waited for, and a device has no end
        raise DataError(
            f"{path} is no file with an end.", fix="Give a file, or write what it gives into one."
        )
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"{path} cannot be read.", found=error.strerror) from None

    def scan() -> Iterator[Record | Broken]:
        for record in reader(path):
            yield Record(record.row, record.values, role) if role and isinstance(record, Record) else record

    lines = path if reader is _jsonl and role is None else None
    return Source(path.stem, scan, lambda: f"{path.name}:{role}:{_hash(path)}", place=path, lines=lines)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_folder(path: Path, pattern: str | None) -> Source:
    if pattern and Path(pattern).is_absolute():
        raise DataError(
            f"data.data_files is a pattern inside {path}.", found=pattern, fix="Make it relative."
        )
    files = (
        sorted(path.glob(pattern))
        if pattern
        else [p for p in sorted(path.iterdir()) if p.suffix.lower() in READERS]
    )
    outside = [p for p in files if not p.resolve().is_relative_to(path.resolve())] if pattern else []
    if outside:
        raise DataError(
            f"data.data_files leads out of {path}.",
            found=pattern,
            fix="Give that file or folder as data.dataset.",
        )
    # What became of each row of a cleaned copy lies beside it, and is no data.
    files = [p for p in files if p.is_file() and not p.name.endswith(".ledger.jsonl")]
    named = [(p, ROLES[p.stem.lower()]) for p in files if p.stem.lower() in ROLES]
    chosen: list[tuple[Path, Role | None]] = [*named] if named else [(p, None) for p in files]
    if not chosen or (not named and not pattern and len(files) > 1):
        raise DataError(
            f"The folder {path} does not say which file to use.",
            found=", ".join(p.name for p in files[:SHOWN_PROBLEMS]) or "no data file",
            fix="Name files train/eval/test with a data suffix, give one file, or a pattern with data.data_files.",
        )
    sources = [(_from_file(p, role), p.relative_to(path).as_posix()) for p, role in chosen]

    def scan() -> Iterator[Record | Broken]:
        for source, place in sources:
            for record in source.scan():
                # Named by the path in the folder: files of two folders share names.
                row = Row(place + record.row.source.removeprefix(Path(place).name), record.row.number)
                yield record._replace(row=row) if isinstance(record, Record) else replace(record, row=row)

    unused = sorted({p.name for p in files} - {p.name for p, _ in chosen})
    notes = [f"files without a split's name are not used: {', '.join(unused)}"] if unused else []

    def digest() -> str:
        content = "\n".join(f"{place}:{source.fingerprint}" for source, place in sources)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    return Source(path.name, scan, digest, tuple(notes), place=path)


def _one_split(source: Source, split: str) -> Source:
    role = ROLES.get(split)

    def scan() -> Iterator[Record | Broken]:
        there: set[str] = set()
        found = False
        for record in source.scan():
            if isinstance(record, Broken):
                yield record
                continue
            there |= {record.role} if record.role else set()
            if role and record.role == role:
                found = True
                yield Record(record.row, record.values)
        if not found:
            raise DataError(
                f"{source.name} has no split '{split}'.",
                found=", ".join(sorted(there)) or "no named split",
                fix="Leave data.split out to use every row.",
            )

    return Source(
        source.name,
        scan,
        lambda: f"{source.fingerprint}:{split}",
        (f"only the split '{split}' is used",),
        place=source.place,
    )


_PART = re.compile(r"(.+?)[-_.]\d+([-_.]of[-_.]\d+)?")
"""The name of one of several files of a split: train-00000-of-00008."""


def _role_of(shard: Shard) -> Role | None:
    """The role that a shard's name or its folders give it."""
    part = _PART.fullmatch(shard.stem)
    folders = shard.path.split("/")[:-1] if "/" in shard.place else []
    for name in (shard.stem, part[1] if part else "", *reversed(folders)):
        if role := ROLES.get(name.lower()):
            return role
    return None


def _from_url(url: str, pattern: str | None) -> Source:
    """The files behind a URL, one after the other, each read in pieces where it lies."""
    whole = f"{url.rstrip('/')}/{pattern}" if pattern else url
    shards = remote.shards(whole, tuple(READERS))
    for shard in shards:
        if shard.suffix.lower() not in READERS:
            raise DataError(
                f"{shard.place} is not of a known format.",
                found=f"suffix '{shard.suffix}'",
                fix=f"Use {' '.join(READERS)}.",
            )
    roles = {shard.place: _role_of(shard) for shard in shards}
    named = [shard for shard in shards if roles[shard.place]]
    chosen = named or shards

    def scan() -> Iterator[Record | Broken]:
        for shard in chosen:
            role = roles[shard.place]
            for record in READERS[shard.suffix.lower()](shard):
                yield (
                    Record(record.row, record.values, role) if role and isinstance(record, Record) else record
                )

    def digest() -> str:
        content = "\n".join(f"{shard.path}:{shard.mark}:{roles[shard.place]}" for shard in chosen)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    total = sum(shard.size or 0 for shard in chosen)
    notes = [f"{counted(len(chosen), 'file')} of {size(total)} in all, read in pieces from {url}"]
    if unused := sorted({shard.place for shard in shards} - {shard.place for shard in chosen}):
        more = f" and {len(unused) - SHOWN_PROBLEMS} more" if len(unused) > SHOWN_PROBLEMS else ""
        notes.append(f"files without a split's name are not used: {', '.join(unused[:SHOWN_PROBLEMS])}{more}")
    name = Path(url.rstrip("/").rpartition("://")[2].split("*")[0].rstrip("/")).stem
    return Source(name or "data", scan, digest, tuple(notes))


def _check_hub(dataset: str, pattern: str | None = None) -> None:
    """Raises DataError for what would have the Hub's library read this machine: one of its loaders of files as a data
    set (`text`), and a pattern that is no part of the set (`file:///etc/passwd`)."""
    from datasets import packaged_modules

    if dataset in packaged_modules._PACKAGED_DATASETS_MODULES:
        raise DataError(
            f"'{dataset}' reads files and is no data set.",
            fix="Give the file or folder itself as data.dataset.",
        )
    if pattern and (Path(pattern).is_absolute() or ".." in Path(pattern).parts or ":" in pattern):
        raise DataError(
            f"data.data_files is a pattern inside {dataset}.",
            found=hidden(pattern),
            fix="Make it relative, or give that file or folder as data.dataset.",
        )


def _from_hub(
    dataset: str,
    *,
    config: str | None,
    split: str | None,
    data_files: str | None,
    revision: str | None,
    max_rows: int | None,
    streaming: bool,
) -> Source:
    import datasets

    _check_hub(dataset, data_files)
    options: dict[str, Any] = {"split": split, "data_files": data_files, "revision": revision}
    if streaming:
        options["streaming"] = True
    problem = _problem_on_hub(dataset, revision)
    try:
        with _cache_only() if problem else contextlib.nullcontext():
            loaded = datasets.load_dataset(dataset, config, **options)
    except Exception as error:  # the loader raises many unrelated types for one user-visible fact
        raise _not_loaded(dataset, problem or _first_line(error)) from error
    parts: Mapping[str | None, Any] = {None: loaded} if split else loaded
    name = dataset.rstrip("/").rpartition("/")[2]

    def rows() -> Iterator[tuple[str | None, int, Mapping[str, Any]]]:
        try:
            for part, content in parts.items():
                for number, values in enumerate(content, 1):
                    yield part, number, _with_numbers(values)
        except (OSError, ValueError) as error:  # the network, or a file of the set that is not what it says
            raise _not_loaded(dataset, _first_line(error)) from error

    read_again = _spooled(dataset, itertools.islice(rows(), max_rows)) if streaming else rows

    def scan() -> Iterator[Record | Broken]:
        for part, number, values in read_again():
            place = f"{dataset}/{part}" if part else dataset
            yield Record(Row(place, number), values, ROLES.get(part) if part else None)

    def digest() -> str:
        content = hashlib.sha256()
        for part, _, values in read_again():
            said = json.dumps([part, values], sort_keys=True, default=str)
            content.update(said.encode("utf-8", "surrogatepass"))
        return content.hexdigest()

    roleless = [part for part in parts if part and part not in ROLES]
    notes = []
    if roleless:
        notes.append(f"splits of no known role are divided like one file: {', '.join(roleless)}")
    return Source(name, scan, digest, tuple(notes))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"


def _not_loaded(dataset: str, problem: str) -> DataError:
    from tunesmith.catalog import closest_dataset

    file, near = _file_like(Path(dataset)), closest_dataset(dataset)
    return DataError(
        f"'{dataset}' is neither a file, a folder, an example:NAME nor a Hub data set that can be read.",
        found=problem,
        fix=f"Did you mean '{file}'?"
        if file
        else f"Did you mean '{near}' of the catalogue?"
        if near
        else "Check the path or the Hub id (owner/name), and data.config / data.split for a Hub data set.",
    )


def _spooled(
    dataset: str, rows: Iterator[tuple[str | None, int, Mapping[str, Any]]]
) -> Callable[[], Iterator[tuple[str | None, int, Mapping[str, Any]]]]:
    """Rows from the network, kept in a temporary file: they are read more than once, and sent once."""
    import tempfile

    spool = tempfile.TemporaryFile("w+", encoding="utf-8", prefix="tunesmith-")  # noqa: SIM115 - lives as long as the source
    for row in rows:
        spool.write(json.dumps(row, default=str) + "\n")
    spool.flush()

    def again() -> Iterator[tuple[str | None, int, Mapping[str, Any]]]:
        with open(os.dup(spool.fileno()), "rb") as handle:
            position = 0
            while True:  # the descriptor is shared, so every reading keeps its own place
                handle.seek(position)
                lines = handle.readlines(1 << 22)
                position = handle.tell()
                if not lines:
                    return
                for line in lines:
                    part, number, values = json.loads(line)
                    yield part, number, values

    return again


def _excerpt(line: str, column: int) -> str:
    """The line around a column, and a caret under it."""
    start = max(column - 41, 0)
    piece = hidden(line)[start : start + 80].replace("\t", " ")
    return f"\n         {piece}\n         {' ' * (column - 1 - start)}^"


_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----.*?(?:-----END|$)", re.DOTALL)


def hidden(text: str) -> str:
    """A text of the same length in which no secret of a known shape can be read."""
    from tunesmith.data.checks import SECRETS  # which reads rows itself

    if "-----BEGIN" in text:
        text = _PRIVATE_KEY.sub(_starred, text)
    for beginning, _, pattern in SECRETS:
        if beginning in text:
            text = pattern.sub(_starred, text)
    return text


def _starred(found: re.Match[str]) -> str:
    return found[0][:3] + "*" * (len(found[0]) - 3)


def _near(raw: bytes, place: int) -> str:
    """The bytes around a place, as Python shows them."""
    shown = hidden(raw.decode("latin-1")).encode("latin-1")
    return repr(shown[max(place - 20, 0) : place + 20])[1:]


UTF8 = "Save it as UTF-8, for example with `iconv -f latin1 -t utf-8`."
A_LINE = "Write one JSON object per line."
A_ROW = "Quote cells that hold the separator, quotes (doubled) or line breaks."
BOM = b"\xef\xbb\xbf"


def lines_of(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file; of one that is longer than LONGEST the beginning, one byte too long."""
    while line := file.readline(LONGEST + 1):
        yield line
        if len(line) > LONGEST and not line.endswith(b"\n"):
            skip_line(file)


def skip_line(file: IO[bytes]) -> int:
    """Go to the end of the line, however long it is, in little memory, and say how many bytes that were."""
    skipped = 0
    while part := file.readline(2**20):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def too_deep(value: Any, left: int = DEEPEST) -> bool:
    """Whether lists and objects are nested in more levels than that."""
    if isinstance(value, dict):
        return not left or any(too_deep(v, left - 1) for v in value.values() if isinstance(v, dict | list))
    if isinstance(value, list):
        return not left or any(too_deep(v, left - 1) for v in value if isinstance(v, dict | list))
    return False


def _keys(value: Any) -> int:
    """Number of keys in a parsed value, at every level."""
    if isinstance(value, dict):
        return len(value) + sum([_keys(v) for v in value.values() if isinstance(v, dict | list)])
    return sum([_keys(v) for v in value if isinstance(v, dict | list)]) if isinstance(value, list) else 0


class _Doubled(Exception):
    """A key that stands twice in an object."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Doubled(next(key for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n])))
    return found


def _twice(text: str) -> str | None:
    """The first key that stands twice in one object of a JSON text."""
    try:
        json.loads(text, object_pairs_hook=_once)
    except _Doubled as error:
        return str(error)[:80]
    return None


TOO_DEEP = f"nested too deeply: in more than {DEEPEST} levels"


def _lines(name: str, raw_lines: Iterable[bytes], first: int = 1) -> Iterator[tuple[int, str] | Broken]:
    """Lines that are not blank, with their numbers, and those that are not UTF-8 as broken."""
    for number, raw in enumerate(raw_lines, first):
        if number == 1:
            raw = raw.removeprefix(BOM)
        if len(raw) > LONGEST:
            problem = f"the line has more than {LONGEST:,} bytes, which is the most that is read of one row"
            yield Broken(Row(name, number), f"{name}, line {number}", problem, "Divide it into several rows.")
            continue
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            place = f"{name}, line {number}, byte {error.start + 1}"
            yield Broken(Row(name, number), place, f"not UTF-8: {_near(raw, error.start)}", UTF8)
            continue
        if line and not line.isspace():
            yield number, line


def _jsonl(path: DataFile) -> Iterator[Record | Broken]:
    with path.open("rb") as file:
        yield from parsed(path.name, lines_of(file))


def parsed(name: str, raw_lines: Iterable[bytes], first: int = 1) -> Iterator[Record | Broken]:
    """The rows that lines of JSON are; `first` is the first line's number in its file."""
    for line in _lines(name, raw_lines, first):
        if isinstance(line, Broken):
            yield line
            continue
        number, text = line[0], line[1].rstrip("\r\n")
        try:
            values = _decode(text)
        except json.JSONDecodeError as error:
            column, problem = error.colno, error.msg
            is_end = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
            if is_end and not line[1].endswith("\n"):  # only a file's last line has no end
                problem += " (the file ends here: the line looks cut off)"
        except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
            column, problem = 1, TOO_DEEP if isinstance(error, RecursionError) else str(error)
        else:
            # Counting is quick, and most rows have few of these signs.
            deep = text.count("[") + text.count("{") > DEEPEST and too_deep(values)
            twice = None if deep or text.count('":') == _keys(values) else _twice(text)
            if isinstance(values, dict) and not deep and twice is None:
                yield Record(Row(name, number), values)
                continue
            column, problem = 1, f"expected an object, found {_json_type(values)}"
            if deep or twice is not None:
                problem = TOO_DEEP if deep else f"an object has {twice!r} twice, and only one could count"
        place = f"{name}, line {number}, column {column}"
        yield Broken(Row(name, number), place, problem + _excerpt(text, column), A_LINE, column=column)


def _json_type(value: Any) -> str:
    """What a parsed value is in JSON."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return "a list" if isinstance(value, list) else "text" if isinstance(value, str) else "a number"


def _json(path: DataFile) -> Iterator[Record | Broken]:
    length = (path.size or 0) if isinstance(path, Shard) else path.stat().st_size
    if length > LARGEST_JSON:
        raise DataError(
            f"{path.name} is too large to be read as one JSON value.",
            found=f"{length:,} bytes; at most {LARGEST_JSON:,} are",
            fix=f"Write one object per line, which is read row by row: `jq -c '.[]' {path.name} > {path.stem}.jsonl`.",
        )
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path.name} is not UTF-8: line {line}, byte {error.start}.",
            found=_near(content, error.start),
            fix=UTF8,
        ) from None
    del content
    if not text.strip():
        return
    try:
        loaded = _decode(text)
    except json.JSONDecodeError as error:
        line_text = text.split("\n")[error.lineno - 1]
        raise DataError(
            f"{path.name} is not JSON: line {error.lineno}, column {error.colno}.",
            found=f"{error.msg}{_excerpt(line_text, error.colno)}",
            fix="A file with one object per line is JSON Lines: name it .jsonl."
            if error.msg == "Extra data"
            else None,
        ) from None
    except RecursionError:
        place = f"{path.name}, line {_deep_line(text)}"
        raise DataError(f"{place}: {TOO_DEEP}.", fix="Write a list of records.") from None
    except ValueError as error:  # a number of thousands of digits
        long = re.search(rf"\d{{{sys.get_int_max_str_digits() + 1},}}", text)
        line = text.count("\n", 0, long.start() if long else 0) + 1
        raise DataError(f"{path.name} is not JSON: line {line}.", found=str(error)) from None
    del text
    if isinstance(loaded, dict) and loaded and all(isinstance(v, list) for v in loaded.values()):
        if all(name in ROLES for name in loaded):
            for split, rows in loaded.items():
                for record in _records(f"{path.name}/{split}", rows):
                    yield record._replace(role=ROLES[split]) if isinstance(record, Record) else record
            return
        if len({len(values) for values in loaded.values()}) == 1:
            columns = list(loaded)
            for number, cells in enumerate(zip(*loaded.values(), strict=True), 1):
                yield Record(Row(path.name, number), dict(zip(columns, cells, strict=True)))
            return
    if not isinstance(loaded, list):
        raise DataError(
            f"{path.name} holds no list of records.",
            found=f"an object with {', '.join(list(loaded)[:6])}"
            if isinstance(loaded, dict)
            else _json_type(loaded),
            fix='Write [{"prompt": ..., "response": ...}, ...] or {"train": [...], "test": [...]}.',
        )
    yield from _records(path.name, loaded)


_MARK = re.compile(r'"(?:[^"\\]++|\\.)*+"|[\[{\]}]', re.DOTALL)
"""A text of JSON, in which brackets mean nothing, or a bracket."""


def _deep_line(text: str) -> int:
    """The line of a JSON text on which more levels are open than a row may have."""
    levels = 0
    for mark in _MARK.finditer(text):
        levels += {"[": 1, "{": 1, "]": -1, "}": -1}.get(mark[0], 0)
        if levels > DEEPEST:
            return text.count("\n", 0, mark.start()) + 1
    return 1


def _records(name: str, rows: Sequence[Any]) -> Iterator[Record | Broken]:
    for number, values in enumerate(rows, 1):
        row = Row(name, number)
        if isinstance(values, dict) and not too_deep(values):
            yield Record(row, values)
        elif isinstance(values, dict):
            yield Broken(row, f"{name}, record {number}", TOO_DEEP, "Write plain columns.", unit="record")
        else:
            problem = f"record {number} is not an object: {hidden(repr(values))[:80]}"
            yield Broken(row, name, problem, 'Write {"column": value, ...}.', unit="record")


def _csv(path: DataFile) -> Iterator[Record | Broken]:
    # Bytes that are no UTF-8 come through as lone surrogates, so that the rows around them are still read.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline(LONGEST)
        while first and first.isspace():
            first = file.readline(LONGEST)
        if not first:
            return
        file.seek(0)
        try:
            dialect: Any = csv.Sniffer().sniff(first, delimiters=",;\t|")
            dialect.doublequote = True
        except csv.Error:
            dialect = csv.excel  # one column has no delimiter to find
        csv.field_size_limit(LONGEST)
        lines = _csv_rows(_text_lines(path.name, file), dialect)
        number, header = 0, None
        for begin, end, cells in lines:
            if isinstance(cells, csv.Error):
                if header is None:  # without it no row behind can be read
                    raise DataError(
                        f"{path.name}, line {begin}: the header cannot be read.", found=str(cells), fix=A_ROW
                    )
                number += 1
                yield _unreadable(path.name, number, begin, end, cells)
                continue
            if not cells:
                continue
            if header is None:
                header = cells
                _check_header(f"{path.name}, line {begin}", header)
                continue
            number += 1
            row = Row(path.name, number)
            if len(cells) != len(header):
                problem = f"{len(cells)} cells, but the header has {len(header)}{_where(begin, end)}"
                yield Broken(row, f"{path.name}, row {number}", problem, A_ROW, unit="row")
            elif any("\udc80" <= c <= "\udcff" for cell in cells if not cell.isascii() for c in cell):
                problem = f"not UTF-8{_where(begin, end)}"
                yield Broken(row, f"{path.name}, row {number}", problem, UTF8, unit="row")
            else:
                # An empty cell is an absent value: CSV has no other way to say so.
                yield Record(row, {k: v if v != "" else None for k, v in zip(header, cells, strict=True)})


def _text_lines(name: str, file: IO[str]) -> Iterator[str]:
    """The lines of a table. Raises DataError at one that has no end."""
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST and not line.endswith(("\n", "\r")):
            raise DataError(
                f"{name}, line {number} has more than {LONGEST:,} characters, the most that is read of one row.",
                fix="Divide it into several rows, or check that the file is a table.",
            )
        yield line


def _check_header(place: str, header: Sequence[str]) -> None:
    if any("\udc80" <= c <= "\udcff" for column in header for c in column):
        raise DataError(f"{place}: the header is not UTF-8.", fix=UTF8)
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise DataError(
            f"{place}: the header names a column twice: {', '.join(twice)}.", fix="Rename one of them."
        )


def _unreadable(name: str, number: int, begin: int, end: int, error: csv.Error) -> Broken:
    why = " (a quote is opened and never closed)" if "end of data" in str(error) else ""
    problem = f"{error}{why}{_where(begin, end)}"
    return Broken(Row(name, number), f"{name}, row {number}", problem, A_ROW, unit="row")


def _where(begin: int, end: int) -> str:
    """A table's row in its file: rows are counted behind the header, lines with it."""
    return f" (lines {begin} to {end} of the file)" if end > begin else f" (line {begin} of the file)"


def _csv_rows(lines: Iterable[str], dialect: Any) -> Iterator[tuple[int, int, list[str] | csv.Error]]:
    """Each row with its first and last line, an error for one that cannot be read.

    A quote that is never closed swallows what comes behind it. Where that looks like rows, they are read
    again on their own; else all of it is one row that cannot be read.
    """
    lines = iter(lines)
    waiting: deque[str] = deque()
    taken: list[str] = []

    def fed() -> Iterator[str]:
        while True:
            line = waiting.popleft() if waiting else next(lines, None)
            if line is None:
                return
            taken.append(line)
            yield line

    begin, width = 1, 0
    while True:
        try:
            # Strict: else the rest of the file would be one cell.
            for cells in csv.reader(fed(), dialect=dialect, strict=True):
                width = width or len(cells)
                yield begin, begin + len(taken) - 1, cells
                begin += len(taken)
                taken.clear()
            return
        except csv.Error as error:
            count = _broken_lines(taken, width, dialect)
            yield begin, begin + count - 1, error
            waiting.extendleft(reversed(taken[count:]))
            begin += count
            taken.clear()


def _broken_lines(taken: Sequence[str], width: int, dialect: Any) -> int:
    """How many of the lines that a broken row took are its own: all, or those up to the last quote it opens."""
    is_open, own = False, 1
    for number, line in enumerate(taken, 1):
        if line.count(dialect.quotechar) % 2:
            is_open = not is_open
            own = number if is_open else own
    alike = sum(line.count(dialect.delimiter) >= width - 1 for line in taken[own:])
    return own if width > 1 and alike >= 0.75 * len(taken[own:]) else len(taken)


SWALLOWED = 5
"""Lines in one cell of a CSV file that have as many separators as its header, from which on they look like rows."""


def swallowed(record: Record) -> str | None:
    """The column of a CSV row whose cell looks as if an unclosed quote had swallowed the rows behind it."""
    width = len(record.values)
    if width < 2 or not record.row.source.lower().endswith(".csv"):
        return None
    for name, value in record.values.items():
        if isinstance(value, str) and value.count("\n") >= SWALLOWED:
            inner = value.split("\n")[1:-1]
            if any(all(line.count(sign) == width - 1 for line in inner) for sign in ",;\t|"):
                return name
    return None


def _rows_in(batch: Any) -> Iterator[Mapping[str, Any] | UnicodeDecodeError]:
    """The rows of a batch of Parquet, whose text nothing has looked at; of one that is not UTF-8 the error."""
    batch.schema.names  # noqa: B018  raises where the name of a column is not UTF-8, which no single row is to blame for
    has_floats = any(word in str(field.type) for field in batch.schema for word in ("float", "double"))
    made: Callable[[Any], Any] = _with_numbers if has_floats else lambda row: row
    try:
        yield from map(made, batch.to_pylist())
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            try:
                yield made(batch.slice(number, 1).to_pylist()[0])
            except UnicodeDecodeError as error:
                yield error


def _parquet(path: DataFile) -> Iterator[Record | Broken]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        with parquet.ParquetFile(path.open("rb") if isinstance(path, Shard) else path) as file:
            for batch in file.iter_batches(batch_size=_batch(path.name, file.metadata)):
                for values in _rows_in(batch):
                    number += 1
                    row = Row(path.name, number)
                    if isinstance(values, UnicodeDecodeError):
                        place = f"{path.name}, record {number}"
                        yield Broken(row, place, "not UTF-8", "Write its text as UTF-8.", unit="record")
                    else:
                        yield Record(row, values)
    except UnicodeDecodeError as error:
        raise DataError(f"A column's name in {path.name} is not UTF-8.", found=str(error)) from None
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path.name} is not a Parquet file.", found=str(error)) from None


def _batch(name: str, metadata: Any) -> int:
    """How many rows are read at once: each may be as long as a whole column, where a dictionary holds one long text.

    Raises DataError for a column that is packed as no text is.
    """
    largest = 1
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for number in range(row_group.num_columns):
            column = row_group.column(number)
            large, small = column.total_uncompressed_size, column.total_compressed_size
            if large > LARGEST_COLUMN or large > PACKED * small + LONGEST:
                raise DataError(
                    f"{name} holds a column that unpacks to far more than it is.",
                    found=f"'{column.path_in_schema}', {small:,} bytes that stand for {large:,}",
                    fix="Do not use it, or write it anew in smaller row groups.",
                )
            largest = max(largest, large)
    return int(max(1, min(512, LARGEST_BATCH // largest)))


def _txt(path: DataFile) -> Iterator[Record | Broken]:
    with path.open("rb") as file:
        for line in _lines(path.name, lines_of(file)):
            if isinstance(line, Broken):
                yield line
            else:
                yield Record(Row(path.name, line[0]), {"text": line[1].rstrip("\r\n")})


READERS: dict[str, Callable[[DataFile], Iterator[Record | Broken]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}
"""How each kind of file is read."""
