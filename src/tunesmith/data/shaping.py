"""Rows as a recipe wants them before any format sees them: columns renamed, questions made of texts.

What the catalogue's data sets need (a column map and a preparation), and what `data.columns`,
`data.prompt_prefix` and `data.prompt_length` say for any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from tunesmith.data.sources import Broken, Record, Source
from tunesmith.errors import DataError

SHAPING = {"columns", "prompt_prefix", "prompt_length"}
"""Fields of a data source that say how its rows are changed."""

NOTHING = {"prompt": None, "completion": None}


def shaped(
    source: Source,
    *,
    columns: Mapping[str, str],
    prompt_prefix: str | None = None,
    prompt_length: int | None = None,
) -> Source:
    """The source with its rows changed, or the same where there is nothing to change.

    Its scan raises DataError for a column that no row has, and for a new name that a row has already.
    """
    if not (columns or prompt_prefix or prompt_length):
        return source
    settings = json.dumps([dict(columns), prompt_prefix, prompt_length])
    key = hashlib.sha256(settings.encode()).hexdigest()[:16]
    notes = [f"column {old} is read as {new} (data.columns)" for old, new in columns.items()]
    if prompt_length:
        notes.append(f"of each text {prompt_length} characters are the question, the rest is the answer")
    if prompt_prefix:
        notes.append(f"every question begins with {prompt_prefix!r}")

    def scan() -> Iterator[Record | Broken]:
        missing, there = set(columns), dict[str, None]()
        for record in source.scan():
            if isinstance(record, Record):
                missing -= record.values.keys()
                if len(there) < 40:
                    there.update(dict.fromkeys(record.values))
                values = _renamed(record, columns, source.name) if columns else dict(record.values)
                record = record._replace(values=_asked(values, record, prompt_prefix, prompt_length))
            yield record
        if missing and there:
            raise DataError(
                f"data.columns renames columns that {source.name} does not have: {', '.join(sorted(missing))}.",
                found="columns " + ", ".join(there),
                fix="Write {name in the data: name in the format}.",
            )

    return replace(
        source,
        scan=scan,
        digest=lambda: f"{source.fingerprint}:{key}",
        notes=(*source.notes, *notes),
        lines=None,
    )


def _renamed(record: Record, columns: Mapping[str, str], name: str) -> dict[str, Any]:
    values = {columns.get(old, old): value for old, value in record.values.items()}
    if len(values) < len(record.values):
        new = [columns.get(old, old) for old in record.values]
        raise DataError(
            f"data.columns gives two columns of {name} one name.",
            found=f"{', '.join(sorted({n for n in new if new.count(n) > 1}))} in {record.row}",
            fix="Rename the other one as well, such as {prompt: old_prompt}.",
        )
    return values


def _asked(values: dict[str, Any], record: Record, prefix: str | None, length: int | None) -> dict[str, Any]:
    """The row with its question made of running text, and with the words that every question begins with."""
    if length:
        if "text" not in values:
            raise DataError(
                f"data.prompt_length cuts the column text, and {record.row} has none.",
                found="columns " + ", ".join(record.values),
                fix="Name it with data.columns: {its name: text}.",
            )
        text = values.pop("text")
        # An answer that is not there is a row that is dropped and counted, as everywhere.
        whole = isinstance(text, str) and len(text) > length
        values |= {"prompt": text[:length], "completion": text[length:]} if whole else NOTHING
    if prefix:
        asked = values.get("prompt")
        if "prompt" not in values:
            raise DataError(
                f"data.prompt_prefix goes before the column prompt, and {record.row} has none.",
                found="columns " + ", ".join(record.values),
                fix="Name the question's column with data.columns: {its name: prompt}.",
            )
        values["prompt"] = prefix + asked if isinstance(asked, str) else asked
    return values
