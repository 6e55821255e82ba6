"""Text-to-SQL by execution: does the query give what the reference query gives?

Queries run on a fresh in-memory SQLite database that is locked after it is filled: an authorizer allows
reading only, a deadline and a row cap end what does not end itself.
"""

from __future__ import annotations

import random
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

DEADLINE = 1.0
"""Seconds a query may take."""
MAX_ROWS = 10_000
"""Rows of a result that are compared; a longer result counts as an error."""
SYNTHETIC_ROWS = 12
"""Rows per table where a data set gives schemas without content."""

_ALLOWED = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}


@dataclass(frozen=True)
class SQLResult:
    """How a predicted query fared against the reference."""

    match: bool
    executed: bool
    vacuous: bool
    """Both results are empty: they agree, but on nothing."""
    error: str | None = None


def execution_match(schema: str, setup: str, predicted: str, gold: str, *, deadline: float = DEADLINE) -> SQLResult:
    """Compare the results of two queries as bags of rows, in order where the reference orders its rows.

    This is the execution accuracy of Spider (Yu et al. 2018) with column order respected: floats are equal
    to 1e-6, NULL equals NULL. Tables without rows (`setup` empty) get synthetic ones that hold the
    reference's literals. Raises ValueError where the reference itself does not run.
    """
    statements = setup if setup.strip() else synthetic_rows(schema, gold)
    expected, error = run(schema, statements, gold, deadline=deadline)
    if expected is None:
        raise ValueError(f"the reference query fails: {error}")
    found, error = run(schema, statements, predicted, deadline=deadline)
    if found is None:
        return SQLResult(match=False, executed=False, vacuous=False, error=error)
    wanted, got = [_comparable(row) for row in expected], [_comparable(row) for row in found]
    match = wanted == got if is_ordered(gold) else Counter(wanted) == Counter(got)
    return SQLResult(match=match, executed=True, vacuous=match and not wanted)


def run(
    schema: str, setup: str, query: str, *, deadline: float = DEADLINE
) -> tuple[list[tuple[Any, ...]] | None, str | None]:
    """A query's rows on a fresh locked database, or None and the reason."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(schema.rstrip().rstrip(";") + ";" + setup)
        connection.commit()
        connection.execute("PRAGMA query_only = ON")
        connection.set_authorizer(_authorize)
        end = time.monotonic() + deadline
        connection.set_progress_handler(lambda: int(time.monotonic() > end), 1000)
        rows = connection.execute(query).fetchmany(MAX_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        reason = "took longer than the deadline" if "interrupted" in str(error) else str(error)
        return None, reason
    finally:
        connection.close()
    return (None, f"more than {MAX_ROWS} rows") if len(rows) > MAX_ROWS else (rows, None)


def _authorize(action: int, first: str | None, second: str | None, *rest: str | None) -> int:
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in {"load_extension", "randomblob", "zeroblob"}:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY


def is_ordered(query: str) -> bool:
    """Whether a query orders its rows at the top level."""
    import sqlglot
    from sqlglot import exp

    try:
        return sqlglot.parse_one(query, read="sqlite").args.get("order") is not None
    except (sqlglot.errors.SqlglotError, AttributeError):
        return isinstance(query, str) and exp is not None and bool(re.search(r"\border\s+by\b", query, re.I))


def _comparable(row: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(round(value, 6) if isinstance(value, float) else value for value in row)


def synthetic_rows(schema: str, gold: str) -> str:
    """INSERT statements for a schema without content: the same for the same schema and reference.

    Text and numbers repeat across rows, and the reference's literals are among them, so that filters
    choose some rows and not others.
    """
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(schema)
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = {t: [(c[1], c[2].upper()) for c in connection.execute(f'PRAGMA table_info("{t}")')] for t in tables}
    except sqlite3.Error as error:
        raise ValueError(f"the schema fails: {error}") from None
    finally:
        connection.close()
    rng = random.Random(f"{schema}\0{gold}")
    texts = [*re.findall(r"'((?:[^']|'')*)'", gold), *re.findall(r'"([^"]*)"', gold), "alpha", "beta", "gamma", "delta"]
    numbers = [*(float(n) for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", gold)), 1.0, 2.0, 5.0, 40.0]
    return "".join(_insert(table, columns[table], texts, numbers, rng) for table in tables)


def _insert(
    table: str, columns: Iterable[tuple[str, str]], texts: list[str], numbers: list[float], rng: random.Random
) -> str:
    columns = list(columns)
    lines = []
    for number in range(1, SYNTHETIC_ROWS + 1):
        cells = []
        for name, kind in columns:
            if name.lower() == "id":
                cells.append(str(number))  # keys differ from row to row and join to each other
            elif any(word in kind for word in ("INT", "REAL", "NUM", "DEC", "FLOA", "DOUB")):
                value = rng.choice(numbers) + rng.choice((-1, 0, 0, 1))
                cells.append(str(int(value)) if "INT" in kind else repr(value))
            else:
                text = rng.choice(texts).replace("''", "'").replace("'", "''")
                cells.append(f"'{text}'")
        lines.append(f"({', '.join(cells)})")
    return f'INSERT OR IGNORE INTO "{table}" VALUES {", ".join(lines)};'
