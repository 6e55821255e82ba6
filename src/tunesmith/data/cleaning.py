"""A cleaned copy of a data set: what can be mended is mended, what cannot be trained is left out, all of it said.

The copy is JSON Lines with every column of its rows; beside it lies a ledger with one line per input row.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tunesmith.data.checks import (
    CHECKS,
    MOJIBAKE,
    SURROGATE,
    Found,
    Settings,
    broken,
    check_row,
    masked,
    read_again,
)
from tunesmith.data.examples import Row, row_hash
from tunesmith.data.pieces import Piece, rows, worked
from tunesmith.data.sources import Broken, Source
from tunesmith.data.validation import REFUSALS, Watch, progress
from tunesmith.errors import DataError

Fate = Literal["kept", "mended", "dropped"]


@dataclass(frozen=True)
class Cleaned:
    """What becomes of one row: its line in the copy, and what was done to it or why it is dropped."""

    row: Row
    fate: Fate
    what: str | None
    line: str | None
    content: int = 0
    """Hash of the example, by which copies are known."""


def target(dataset: str, output: str | Path | None) -> Path:
    """Where the copy goes: `<name>.clean.jsonl` beside the file, or in this folder. Raises DataError if it is taken."""
    path = Path(dataset).expanduser()
    if output:
        place = Path(output).expanduser()
    elif path.exists():
        place = path.with_name(f"{path.stem if path.is_file() else path.name}.clean.jsonl")
    else:
        place = Path(f"{dataset.rpartition('/')[2].rpartition(':')[2]}.clean.jsonl")
    if place.suffix.lower() != ".jsonl":
        raise DataError(
            f"The cleaned copy is JSON Lines, and {place} is not named so.", fix="Name it .jsonl."
        )
    for taken in (place, ledger_of(place)):
        if taken.exists():
            raise DataError(
                f"{taken} is there already, and nothing is overwritten.", fix="Give another --output."
            )
    if not place.parent.is_dir():
        raise DataError(f"There is no folder {place.parent}.", fix="Make it, or give another --output.")
    return place


def ledger_of(place: Path) -> Path:
    """The ledger beside a cleaned copy."""
    return place.with_name(f"{place.name}.ledger.jsonl")


def clean(
    source: Source,
    place: Path,
    settings: Settings,
    *,
    refused: bytearray,
    processes: int = 1,
    watch: Watch = lambda event: None,
) -> dict[str, Any]:
    """Write the copy and its ledger; how many rows were kept, mended and dropped.

    `refused` has a byte for each row, a place in REFUSALS where a model's template or the proof refuses it.
    Of rows that are the same example the first is kept. Nothing is left behind where no row remains.
    Raises DataError for a source whose rows play roles: one file would put them together.
    """
    named = sorted({role for _, role in source.facts.places if role})
    if named:
        raise DataError(
            f"{source.name} has rows for {' and '.join(named)}, which one cleaned file would put together.",
            fix="Clean each of its files on its own.",
        )
    settings = replace(settings, estimates=False)
    parts = {file: file.with_name(f".{file.name}.part") for file in (place, ledger_of(place))}
    counts, number = Counter[Fate](), 0
    first: dict[int, Row] = {}
    size = source.lines.stat().st_size if source.lines else 0
    try:
        with (
            parts[place].open("w", encoding="utf-8") as copy,
            parts[ledger_of(place)].open("w", encoding="utf-8") as ledger,
        ):
            for piece, cleaned in worked(
                source, functools.partial(clean_piece, settings), processes=processes
            ):
                for entry in cleaned:
                    if entry.line is not None:
                        entry = _settled(entry, first, refused[number] if number < len(refused) else 0)
                    if entry.line is not None:
                        copy.write(entry.line + "\n")
                    counts[entry.fate] += 1
                    facts = {"source": entry.row.source, "row": entry.row.number, "fate": entry.fate}
                    ledger.write(json.dumps({**facts, "what": entry.what}) + "\n")
                    number += 1
                watch(progress("cleaning rows", number, piece, size))
        assert counts.total() == number
        written = counts["kept"] + counts["mended"] > 0
        if written:
            for file, part in parts.items():
                part.rename(file)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return {
        "file": str(place) if written else None,
        "ledger": str(ledger_of(place)) if written else None,
        "rows": number,
        **{fate: counts[fate] for fate in ("kept", "mended", "dropped")},
    }


def _settled(entry: Cleaned, first: dict[int, Row], refusal: int) -> Cleaned:
    """The row's fate beside the others, and under the model if there is one."""
    if refusal:
        kind, why = list(REFUSALS.items())[refusal - 1]
        return replace(entry, fate="dropped", line=None, what=f"{kind}: {why}")
    if entry.content in first:
        return replace(
            entry, fate="dropped", line=None, what=f"duplicate: the same as {first[entry.content]}"
        )
    first[entry.content] = entry.row
    return entry


def clean_piece(settings: Settings, piece: Piece) -> list[Cleaned]:
    """Each row of a piece, mended where it can be."""
    cleaned = []
    for record in rows(piece):
        if isinstance(record, Broken):
            found = broken(record)
            cleaned.append(Cleaned(record.row, "dropped", f"{found.kind}: {found.message}", None))
            continue
        try:
            held = next((name for name, value in record.values.items() if holds_bytes(value)), None)
            if held is not None:
                said = f"unusable: column {held} has bytes, which JSON cannot hold"
                cleaned.append(Cleaned(record.row, "dropped", said, None))
                continue
            done: set[str] = set()
            values = {name: mended(value, done) for name, value in record.values.items()}
            example, _, findings = check_row(record._replace(values=values), settings.detection, settings)
            line = as_line(values) if example is not None else None
        except RecursionError:
            cleaned.append(Cleaned(record.row, "dropped", "unusable: nested too deeply", None))
            continue
        if example is None:
            found = next(item for item in findings if CHECKS[item.kind].severity == "error")
            said = found.message
            if found.kind == "no_format":
                there = ", ".join(json.loads(said)) or "no column"
                said = masked(
                    f"only {there} has a value" if ", " not in there else f"only {there} have a value"
                )
            cleaned.append(Cleaned(record.row, "dropped", f"{found.kind}: {said}", None))
            continue
        what = _account(done, findings)
        content = int(row_hash(example)[:16], 16)
        cleaned.append(Cleaned(record.row, "mended" if done else "kept", what, line, content))
    return cleaned


def _account(done: set[str], findings: Sequence[Found]) -> str | None:
    """What was mended in a row, and what of it should still be looked at."""
    left = [f"{item.kind}: {item.message}" for item in findings]
    if any(item.kind == "mojibake" for item in findings):
        done = {"mojibake repaired in part" if name == "mojibake repaired" else name for name in done}
    return "; ".join([*sorted(done), *left]) or None


def as_line(values: Mapping[str, Any]) -> str:
    """A row as JSON; in ASCII where the name of a column holds half a character."""
    line = json.dumps(values, ensure_ascii=False, allow_nan=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(values, allow_nan=False)
    return line


def holds_bytes(value: Any) -> bool:
    """Whether bytes stand anywhere in a value, as columnar files may have them."""
    if isinstance(value, bytes | bytearray):
        return True
    if isinstance(value, Mapping):
        return any(holds_bytes(item) for item in value.values())
    return isinstance(value, list | tuple) and any(holds_bytes(item) for item in value)


def mended(value: Any, done: set[str]) -> Any:
    """A value as JSON has it, without the damage that can be mended in its texts; `done` gets what was done."""
    if isinstance(value, str):
        for name, mend in MENDS.items():
            better = mend(value)
            if better != value:
                done.add(name)
                value = better
        return value
    if isinstance(value, Mapping):
        return {key: mended(item, done) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mended(item, done) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    done.add(f"{type(value).__name__} written as text")
    return str(value)


def repaired(text: str) -> str:
    """Text that was UTF-8 and read as Windows-1252 or Latin-1, where all of it can be turned back."""
    if text.isascii() or not MOJIBAKE.search(text) or not _is_damage(text):
        return text
    better = read_again(text)
    return text if better is None else better


_SPEAKS_OF_IT = re.compile(
    r"mojibake|encod|utf-?8|unicode|charset|latin-?1|iso-?8859|windows-?125|cp-?125|\bbytes?\b", re.IGNORECASE
)


def _is_damage(text: str) -> bool:
    """Whether the text is damaged, rather than about such damage: it does not speak of encodings, and has at
    least one damaged word that is not in quotes, with a letter more than the damaged one."""
    if _SPEAKS_OF_IT.search(text):
        return False
    for found in MOJIBAKE.finditer(text):
        begin = max(text.rfind(space, 0, found.start()) for space in " \n\t") + 1
        ends = [end for end in (text.find(space, found.end()) for space in " \n\t") if end >= 0]
        word = text[begin : min(ends, default=len(text))].strip(".,;:!?()[]")
        is_quoted = len(word) > 1 and word[0] in "'\"`" and word[-1] in "'\"`"
        meant = read_again(found[0]) or found[0]
        if not is_quoted and (word != found[0] or len(meant) > 1 or not meant.isalpha()):
            return True
    return False


MENDS: dict[str, Callable[[str], str]] = {
    "NUL removed": lambda text: text.replace("\0", ""),
    "half characters removed": lambda text: text if text.isascii() else SURROGATE.sub("", text),
    "mojibake repaired": repaired,
    "byte order mark removed": lambda text: text.replace("\ufeff", ""),
}
"""What is done to a text, in order: a repaired one may have a byte order mark again."""
