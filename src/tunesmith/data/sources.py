"""Where rows come from: files, folders, the Hub, the examples that ship; every row with its place.

A source is read whole or not at all: a broken line is an error that names file, line and column.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tunesmith.data.examples import Row
from tunesmith.errors import DataError, nearest

Role = Literal["train", "validation", "held_out"]

ROLES: dict[str, Role] = {
    "train": "train", "training": "train",
    "eval": "validation", "valid": "validation", "validation": "validation", "dev": "validation", "val": "validation",
    "test": "held_out", "held_out": "held_out", "holdout": "held_out",
}  # fmt: skip
"""Names of splits and files, and the role each one plays."""

SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Record:
    """One row as it stands in the source, and the role its file or split gives it."""

    row: Row
    values: Mapping[str, Any]
    role: Role | None = None


@dataclass(frozen=True)
class Source:
    """All rows of a data set, with a hash of its content."""

    name: str
    records: tuple[Record, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns with a value in at least one row, in order of appearance."""
        names = (c for record in self.records for c, value in record.values.items() if value is not None)
        return tuple(dict.fromkeys(names))

    @property
    def empty_columns(self) -> tuple[str, ...]:
        """Columns that are there without a value in any row."""
        filled = set(self.columns)
        names = dict.fromkeys(c for record in self.records for c in record.values)
        return tuple(name for name in names if name not in filled)


def read(
    dataset: str,
    *,
    config: str | None = None,
    split: str | None = None,
    data_files: str | None = None,
    revision: str | None = None,
    max_rows: int | None = None,
) -> Source:
    """The rows of `example:NAME`, a file, a folder or a Hub id.

    `split` takes one named split, which is then divided like a single file. Raises DataError.
    """
    path = _local(dataset)
    if path is None:
        source = _from_hub(dataset, config=config, split=split, data_files=data_files, revision=revision)
    else:
        ignored = [name for name, value in (("config", config), ("revision", revision)) if value]
        if ignored:
            raise DataError(
                f"data.{ignored[0]} is for Hub data sets, and {dataset} is local.", fix="Remove it."
            )
        if data_files and not path.is_dir():
            raise DataError(
                f"data.data_files picks files of a folder, and {dataset} is a file.", fix="Remove it."
            )
        source = _from_folder(path, data_files) if path.is_dir() else _from_file(path)
        source = _one_split(source, split) if split else source
    if not source.records:
        raise DataError(f"{dataset} has no rows.", fix="Check the file: expected at least one record.")
    if max_rows and max_rows < len(source.records):
        note = f"the first {max_rows} of {len(source.records)} rows are used (max_rows)"
        source = Source(source.name, source.records[:max_rows], source.fingerprint, (*source.notes, note))
    return source


def _local(dataset: str) -> Path | None:
    """The path that a data set's name stands for, or None for a Hub id."""
    if dataset.startswith("example:"):
        from tunesmith.assets import EXAMPLES

        name = dataset.removeprefix("example:")
        if name not in EXAMPLES:
            raise DataError(f"There is no example data set '{name}'.", fix=nearest(name, EXAMPLES))
        return EXAMPLES[name].path
    path = Path(dataset).expanduser()
    if path.exists():
        return path
    if path.suffix.lower() in READERS or dataset.startswith((".", "/", "~")) or dataset.count("/") > 1:
        near = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            f"There is no file {dataset}.",
            fix=nearest(str(path), near) if near else "Check the path; a Hub id looks like owner/name.",
        )
    return None


def _from_file(path: Path, role: Role | None = None) -> Source:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path.name} is not of a known format.",
            found=f"suffix '{path.suffix}'",
            fix=f"Use one of {' '.join(READERS)}.",
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read.", found=error.strerror) from None
    records = tuple(reader(path, content))
    if role:
        records = tuple(Record(r.row, r.values, role) for r in records)
    notes = _role_notes(path.name, records)
    return Source(path.stem, records, hashlib.sha256(content).hexdigest(), notes)


def _role_notes(name: str, records: tuple[Record, ...]) -> tuple[str, ...]:
    roles = dict.fromkeys(record.role for record in records if record.role)
    return tuple(f"{name} names rows for {role.replace('_', '-')}" for role in roles)


def _from_folder(path: Path, pattern: str | None) -> Source:
    if pattern and Path(pattern).is_absolute():
        raise DataError(
            f"data.data_files is a pattern inside {path}.", found=pattern, fix="Make it relative."
        )
    files = (
        sorted(path.glob(pattern)) if pattern else [p for p in sorted(path.iterdir()) if p.suffix in READERS]
    )
    files = [p for p in files if p.is_file()]
    named = [(p, ROLES[p.stem.lower()]) for p in files if p.stem.lower() in ROLES]
    chosen: list[tuple[Path, Role | None]] = [*named] if named else [(p, None) for p in files]
    if not chosen or (not named and not pattern and len(files) > 1):
        raise DataError(
            f"The folder {path} does not say which file to use.",
            found=", ".join(p.name for p in files[:SHOWN_PROBLEMS]) or "no data file",
            fix="Name files train/eval/test with a data suffix, give one file, or a pattern with data.data_files.",
        )
    sources = [_placed(_from_file(p, role), p, path) for p, role in chosen]
    unused = sorted({p.name for p in files} - {p.name for p, _ in chosen})
    notes = [note for source in sources for note in source.notes]
    if unused:
        notes.append(f"files without a split's name are not used: {', '.join(unused)}")
    digest = hashlib.sha256("".join(source.fingerprint for source in sources).encode()).hexdigest()
    return Source(path.name, tuple(r for s in sources for r in s.records), digest, tuple(notes))


def _placed(source: Source, file: Path, folder: Path) -> Source:
    """The source with its rows named by the file's path in the folder: files of two folders share names."""
    place = file.relative_to(folder).as_posix()
    if place == file.name:
        return source
    records = tuple(
        replace(r, row=Row(place + r.row.source.removeprefix(file.name), r.row.number))
        for r in source.records
    )
    return replace(source, records=records)


def _one_split(source: Source, split: str) -> Source:
    role = ROLES.get(split)
    chosen = tuple(Record(r.row, r.values) for r in source.records if r.role is not None and r.role == role)
    if not chosen:
        there = sorted({r.role for r in source.records if r.role})
        raise DataError(
            f"{source.name} has no split '{split}'.",
            found=", ".join(there) or "no named split",
            fix="Leave data.split out to use every row.",
        )
    return Source(source.name, chosen, source.fingerprint, (f"only the split '{split}' is used",))


def _from_hub(
    dataset: str, *, config: str | None, split: str | None, data_files: str | None, revision: str | None
) -> Source:
    import datasets

    try:
        loaded = datasets.load_dataset(dataset, config, split=split, data_files=data_files, revision=revision)
    except Exception as error:  # the loader raises many unrelated types for one user-visible fact
        raise DataError(
            f"'{dataset}' is neither a file, a folder, an example:NAME nor a Hub data set that can be read.",
            found=f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}",
            fix="Check the path or the Hub id (owner/name), and data.config / data.split for a Hub data set.",
        ) from error
    parts: Mapping[str | None, Any] = {None: loaded} if split else loaded
    name = dataset.rstrip("/").rpartition("/")[2]
    records = tuple(
        Record(
            Row(f"{dataset}/{part}" if part else dataset, number), values, ROLES.get(part) if part else None
        )
        for part, rows in parts.items()
        for number, values in enumerate(rows, 1)
    )
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record.values, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    notes = list(_role_notes(dataset, records))
    roleless = [part for part in parts if part and part not in ROLES]
    if roleless:
        notes.append(f"splits of no known role are divided like one file: {', '.join(roleless)}")
    return Source(name, records, digest.hexdigest(), tuple(notes))


def _text(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path.name} is not UTF-8: line {line}, byte {error.start}.",
            found=repr(content[max(error.start - 20, 0) : error.start + 20])[1:],
            fix="Save it as UTF-8, for example with `iconv -f latin1 -t utf-8`.",
        ) from None


def _excerpt(line: str, column: int) -> str:
    """The line around a column, and a caret under it."""
    start = max(column - 41, 0)
    piece = line[start : start + 80].replace("\t", " ")
    return f"{piece}\n         {' ' * (column - 1 - start)}^"


def _listed(problems: Sequence[str]) -> str:
    """The first problems, and how many more there are."""
    rest = len(problems) - SHOWN_PROBLEMS
    return "\n         ".join([*problems[:SHOWN_PROBLEMS], *([f"... and {rest} more"] if rest > 0 else [])])


def _jsonl(path: Path, content: bytes) -> Iterable[Record]:
    records, problems = [], []
    for number, line in enumerate(_text(path, content).split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append((number, error.colno, error.msg, line))
            continue
        except RecursionError:
            problems.append((number, 1, "nested too deeply", line))
            continue
        if isinstance(values, dict):
            records.append(Record(Row(path.name, number), values))
        else:
            problems.append((number, 1, f"expected an object, found {type(values).__name__}", line))
    if problems:
        lines = [
            f"{path.name}, line {n}, column {c}: {m}\n         {_excerpt(t, c)}" for n, c, m, t in problems
        ]
        raise DataError(
            f"{path.name} has {len(problems)} broken line{'s' if len(problems) > 1 else ''}.",
            found=_listed(lines),
            fix="Write one JSON object per line.",
        )
    return records


def _json(path: Path, content: bytes) -> Iterable[Record]:
    text = _text(path, content)
    if not text.strip():
        return []
    try:
        loaded = json.loads(text)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1]
        raise DataError(
            f"{path.name} is not JSON: line {error.lineno}, column {error.colno}.",
            found=f"{error.msg}\n         {_excerpt(line, error.colno)}",
            fix="A file with one object per line is JSON Lines: name it .jsonl."
            if error.msg == "Extra data"
            else None,
        ) from None
    except RecursionError:
        raise DataError(f"{path.name} is nested too deeply.", fix="Write a list of records.") from None
    if isinstance(loaded, dict) and loaded and all(isinstance(v, list) for v in loaded.values()):
        if all(name in ROLES for name in loaded):
            return [
                replace(record, role=ROLES[split])
                for split, rows in loaded.items()
                for record in _records(f"{path.name}/{split}", rows)
            ]
        lengths = {len(values) for values in loaded.values()}
        if len(lengths) == 1:
            columns = list(loaded)
            rows = zip(*loaded.values(), strict=True)
            return [
                Record(Row(path.name, n), dict(zip(columns, r, strict=True))) for n, r in enumerate(rows, 1)
            ]
    if not isinstance(loaded, list):
        raise DataError(
            f"{path.name} holds no list of records.",
            found=f"an object with {', '.join(list(loaded)[:6])}"
            if isinstance(loaded, dict)
            else type(loaded).__name__,
            fix='Write [{"prompt": ..., "response": ...}, ...] or {"train": [...], "test": [...]}.',
        )
    return _records(path.name, loaded)


def _records(name: str, rows: Sequence[Any]) -> list[Record]:
    problems = [
        f"record {number} is not an object: {repr(values)[:80]}"
        for number, values in enumerate(rows, 1)
        if not isinstance(values, dict)
    ]
    if problems:
        raise DataError(
            f"{name} has {len(problems)} broken record{'s' if len(problems) > 1 else ''}.",
            found=_listed(problems),
            fix='Write {"column": value, ...}.',
        )
    return [Record(Row(name, number), values) for number, values in enumerate(rows, 1)]


def _csv(path: Path, content: bytes) -> Iterable[Record]:
    text = _text(path, content)
    if not text.strip():
        return []
    try:
        dialect: Any = csv.Sniffer().sniff(text.split("\n", 1)[0], delimiters=",;\t|")
        dialect.doublequote = True
    except csv.Error:
        dialect = csv.excel  # one column has no delimiter to find
    csv.field_size_limit(2**31 - 1)
    # Strict: else a quote that is never closed would swallow the rest of the file into one cell.
    reader = csv.DictReader(io.StringIO(text, newline=""), dialect=dialect, strict=True)
    records: list[Record] = []
    problems: list[str] = []
    begin = 1
    try:
        header = list(reader.fieldnames or ())
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise DataError(
                f"{path.name} names a column twice: {', '.join(twice)}.", fix="Rename one of them."
            )
        begin = reader.line_num + 1
        for number, values in enumerate(reader, 1):
            begin = reader.line_num + 1
            if None in values or None in values.values():
                got = (
                    len(header) + len(values.get(None) or ()) - sum(v is None for k, v in values.items() if k)
                )
                problems.append(
                    f"{path.name}, line {reader.line_num}: {got} cells, but the header has {len(header)}"
                )
                continue
            # An empty cell is an absent value: CSV has no other way to say so.
            cells = {k: v if v != "" else None for k, v in values.items()}
            records.append(Record(Row(path.name, number), cells))
    except csv.Error as error:
        quoted = " (a quote is opened and never closed)" if "end of data" in str(error) else ""
        problems.append(f"{path.name}, the row that begins on line {begin}: {error}{quoted}")
    if problems:
        raise DataError(
            f"{path.name} has {len(problems)} broken row{'s' if len(problems) > 1 else ''}.",
            found=_listed(problems),
            fix="Quote cells that hold the separator, quotes (doubled) or line breaks.",
        )
    return records


def _parquet(path: Path, content: bytes) -> Iterable[Record]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        rows = parquet.read_table(arrow.BufferReader(content)).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path.name} is not a Parquet file.", found=str(error)) from None
    return [Record(Row(path.name, number), values) for number, values in enumerate(rows, 1)]


def _txt(path: Path, content: bytes) -> Iterable[Record]:
    lines = enumerate(_text(path, content).split("\n"), 1)
    return [
        Record(Row(path.name, number), {"text": line.rstrip("\r")}) for number, line in lines if line.strip()
    ]


READERS: dict[str, Callable[[Path, bytes], Iterable[Record]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}
"""How each kind of file is read."""
