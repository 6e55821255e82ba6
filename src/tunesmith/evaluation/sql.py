"""Whether a predicted SQL query gives the same rows as the reference, found by running both, safely.

Each query runs on its own SQLite database in memory that is then locked: an authorizer lets only reading
through, one statement, a deadline, a cap on rows, on columns and on the size of values and of all rows.
"""

from __future__ import annotations

import random
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

MAX_SECONDS = 1.0
MAX_ROWS = 10_000
MAX_BYTES = 50_000_000
"""Of all texts and blobs among a query's rows."""
MAX_VALUE = 100_000
"""Of one text or blob that a query makes, in bytes; more where the rows of the set itself need it."""
MAX_COLUMNS = 500
MAX_TRIES = 2000
"""Orders of columns that are tried; tables of many equal columns would have too many."""
SYNTHETIC_DATABASES = 3
SYNTHETIC_ROWS = 30
WORDS = ("amber", "birch", "coral", "delta", "ember", "fjord", "grove", "haven")

# What a query may do (sqlite3.html, "Authorizer Action Codes"); everything else is refused.
READING = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
BUILDING = READING | {
    sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_CREATE_INDEX, sqlite3.SQLITE_CREATE_VIEW,
    sqlite3.SQLITE_DROP_TABLE, sqlite3.SQLITE_ALTER_TABLE, sqlite3.SQLITE_REINDEX,
    sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE, sqlite3.SQLITE_TRANSACTION,
}  # fmt: skip
REFUSED_FUNCTIONS = {"load_extension", "fts3_tokenizer"}


@dataclass(frozen=True)
class SQLResult:
    """What running a predicted query against the reference came to."""

    match: bool
    executed: bool
    """Whether the predicted query ran to its end."""
    vacuous: bool
    """Whether the reference gave no rows on any database, so that a match says little."""
    error: str | None
    """What stopped the predicted query, in SQLite's words."""
    match_any_columns: bool = False
    """Whether the rows match with the columns in some order."""
    match_as_sets: bool = False
    """Whether the same rows occur in both, however often and in whatever order."""


class BrokenReference(Exception):
    """The schema, its rows or the reference query do not run: the example is broken, not the answer."""


@lru_cache(maxsize=8192)
def execution_match(
    schema: str,
    setup: str,
    predicted: str,
    gold: str,
    *,
    seconds: float = MAX_SECONDS,
    max_rows: int = MAX_ROWS,
    seed: int = 0,
) -> SQLResult:
    """Run both queries on a database built from `schema` and the INSERTs of `setup`, and compare the rows.

    Rows are compared as a bag (order free, repetitions count), in order where the reference has ORDER BY
    at its top level; column order counts, column names do not; floats are rounded to six places, NULL
    equals NULL. This is execution accuracy as of Spider (arXiv 1809.08887) and BIRD (arXiv 2305.03111).

    Where `setup` is empty, or the reference finds no rows in it, three databases are filled with seeded
    synthetic rows of the columns' types, among them the values that the reference asks for; a match must
    hold on all of them. Two laxer comparisons are made along with it, as the two benchmarks make them: columns
    in any order (Spider), and rows as sets (BIRD). Raises BrokenReference where schema, setup or reference do not run.
    """
    ordered = is_ordered(gold)
    databases: list[int | None] = [None] if setup.strip() else []
    synthetic = [seed + number for number in range(SYNTHETIC_DATABASES)]
    databases += synthetic if not databases else []
    vacuous = True
    exact = any_columns = as_sets = True
    for position, filling in enumerate(databases):
        with _closing(_built(schema, setup, gold, filling, seconds)) as connection:
            expected = _expected(connection, gold, seconds, max_rows)
            if expected:
                vacuous = False
            elif filling is None:
                databases[position + 1 :] = synthetic
            try:
                found = _rows(connection, predicted, seconds, max_rows)
            except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
                return SQLResult(False, False, vacuous, str(error))
            exact = exact and _same(found, expected, ordered)
            any_columns = any_columns and (exact or _same_any_columns(found, expected, ordered))
            as_sets = as_sets and set(found) == set(expected)
            if not any_columns and not as_sets:
                break
    return SQLResult(exact, True, vacuous, None, any_columns, as_sets)


Rows = Sequence[tuple[Any, ...]]


def _same(found: Rows, expected: Rows, ordered: bool) -> bool:
    return found == expected if ordered else Counter(found) == Counter(expected)


def _same_any_columns(found: Rows, expected: Rows, ordered: bool) -> bool:
    """Whether some order of the columns makes the rows the same; only columns of equal values are tried."""
    if len(found) != len(expected):
        return False
    if not found:
        return True
    have, want = ([Counter(column) for column in zip(*rows, strict=True)] for rows in (found, expected))
    if len(have) != len(want):
        return False
    tries = 0

    def fits(order: tuple[int, ...]) -> bool:
        nonlocal tries
        tries += 1
        if tries > MAX_TRIES:
            return False
        place = len(order)
        if order and not _same(
            [tuple(row[n] for n in order) for row in found], [row[:place] for row in expected], ordered
        ):
            return False
        if place == len(want):
            return True
        return any(fits((*order, n)) for n in range(len(have)) if n not in order and have[n] == want[place])

    return fits(())


@lru_cache(maxsize=256)
def names_of(schema: str) -> frozenset[str]:
    """Tables, columns and aliases of a schema, in lower case; none of one that cannot be parsed."""
    import sqlglot
    from sqlglot import exp
    from sqlglot.errors import SqlglotError

    try:
        trees = [tree for tree in sqlglot.parse(schema, read="sqlite") if tree is not None]
    except (SqlglotError, RecursionError, ValueError):
        return frozenset()
    return frozenset(
        part.alias_or_name.lower()
        for tree in trees
        for part in tree.find_all(exp.Table, exp.ColumnDef, exp.Alias)
    )


def canonical(query: str, schema: str = "") -> str:
    """A query in one form of many: lower case names, no needless aliases and qualifiers, conditions sorted.

    Values, DISTINCT and the order of columns count. Of `schema` are the names that a text in double quotes may be;
    what is none, and none of the query's own, is a value, as SQLite takes it (sqlite.org/quirks.html, section 8).
    Without a schema such a text keeps its case. Raises ValueError for what is no single query of SQLite.
    """
    import sqlglot
    from sqlglot import exp
    from sqlglot.errors import SqlglotError

    try:
        [tree] = sqlglot.parse(query, read="sqlite")
    except (SqlglotError, RecursionError, ValueError) as error:
        raise ValueError(f"not one query: {error}") from None
    if not isinstance(tree, exp.Query):
        raise ValueError("not a query")
    given = {part.alias.lower() for part in tree.find_all(exp.Alias, exp.Table, exp.Subquery, exp.CTE)}
    known = names_of(schema) | given | {"rowid", "oid", "_rowid_"}
    for name in list(tree.find_all(exp.Identifier)):
        column, text = name.parent, str(name.this)
        is_alone = isinstance(column, exp.Column) and not column.table
        if name.quoted and is_alone and text.lower() not in known:
            if names_of(schema):
                column.replace(exp.Literal.string(text))
            else:
                name.set("quoted", False)
            continue
        name.set("this", text.lower())
        name.set("quoted", False)
    tables = list(tree.find_all(exp.Table))
    times = Counter(table.name for table in tables)
    for table in tables:
        if table.alias and times[table.name] == 1:
            for column in tree.find_all(exp.Column):
                if column.table == table.alias:
                    column.set("table", exp.to_identifier(table.name))
            table.set("alias", None)
    if len(tables) == 1:
        for column in tree.find_all(exp.Column):
            column.set("table", None)
    used = {column.name for column in tree.find_all(exp.Column) if not column.table}
    for select in tree.find_all(exp.Select):
        shown = [
            part.this if isinstance(part, exp.Alias) and select is tree and part.alias not in used else part
            for part in select.expressions
        ]
        select.set("expressions", shown)
    return str(_sorted(tree).sql(dialect="sqlite", comments=False))


def _sorted(tree: Any) -> Any:
    """The tree with the parts of every AND and OR, and the sides of every =, in the order of their texts."""
    from sqlglot import exp

    def text(part: Any) -> str:
        return str(part.sql(dialect="sqlite", comments=False))

    def mended(node: Any) -> Any:
        kind = type(node)
        if isinstance(node, exp.And | exp.Or) and not isinstance(node.parent, kind):
            parts = sorted((part.transform(mended) for part in node.flatten()), key=text)
            found = parts[0]
            for part in parts[1:]:
                found = kind(this=found, expression=part)
            return found
        if isinstance(node, exp.EQ | exp.NEQ):
            left, right = sorted((node.left, node.right), key=text)
            return kind(this=left.copy(), expression=right.copy())
        return node

    return tree.transform(mended)


def is_ordered(query: str) -> bool:
    """Whether the query has ORDER BY at its top level, so that the order of its rows is part of the answer."""
    import sqlglot
    from sqlglot.errors import SqlglotError

    try:
        return sqlglot.parse_one(query, read="sqlite").args.get("order") is not None
    except (SqlglotError, RecursionError):
        # Where the parser gives up, an ORDER BY behind the last parenthesis is at the top level.
        return bool(re.search(r"\border\s+by\b[^()]*$", query, re.IGNORECASE))


def _built(schema: str, setup: str, gold: str, filling: int | None, seconds: float) -> sqlite3.Connection:
    """A filled and locked database; `filling` is the seed of synthetic rows, None for those of `setup`."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000)
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        _only(connection, BUILDING, seconds)
        connection.executescript(schema)
        if filling is None:
            connection.executescript(setup)
        connection.set_authorizer(None)
        if filling is not None:
            _fill(connection, schema, gold, filling)
        # What is sorted or gathered on the way goes to a file, which the deadline bounds, not into memory.
        connection.execute("PRAGMA temp_store = FILE")
        connection.execute("PRAGMA query_only = ON")
        connection.setlimit(
            sqlite3.SQLITE_LIMIT_LENGTH, min(1_000_000, max(MAX_VALUE, len(schema), len(setup)))
        )
        connection.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, MAX_COLUMNS)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, MAX_PATTERN)
        _only(connection, READING, seconds)
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        connection.close()
        raise BrokenReference(f"the schema or its rows cannot be built: {error}") from None
    return connection


def _only(connection: sqlite3.Connection, allowed: set[int], seconds: float) -> None:
    """Lock the connection to some actions, and start its clock."""

    def authorize(action: int, first: str | None, second: str | None, *place: str | None) -> int:
        refused = action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in REFUSED_FUNCTIONS
        return sqlite3.SQLITE_OK if action in allowed and not refused else sqlite3.SQLITE_DENY

    connection.set_authorizer(authorize)
    _start_clock(connection, seconds)


MAX_PATTERN = 200
"""Characters of a LIKE or GLOB pattern: a long one against a long text takes minutes in a single step."""
GRACE = 0.2
"""Seconds after its deadline at which a query is interrupted from outside."""


def _start_clock(connection: sqlite3.Connection, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    connection.set_progress_handler(lambda: int(time.monotonic() > deadline), 1000)


def _expected(
    connection: sqlite3.Connection, gold: str, seconds: float, max_rows: int
) -> list[tuple[Any, ...]]:
    try:
        return _rows(connection, gold, seconds, max_rows)
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        raise BrokenReference(f"the reference query does not run: {error}") from None


def _rows(connection: sqlite3.Connection, query: str, seconds: float, max_rows: int) -> list[tuple[Any, ...]]:
    """The query's rows with floats rounded. sqlite3 itself refuses a second statement."""
    _start_clock(connection, seconds)
    # The clock is looked at between steps of SQLite's machine, and one step may be a long one.
    alarm = threading.Timer(seconds + GRACE, connection.interrupt)
    alarm.daemon = True
    alarm.start()
    try:
        return _fetched(connection, query, max_rows)
    finally:
        alarm.cancel()


def _fetched(connection: sqlite3.Connection, query: str, max_rows: int) -> list[tuple[Any, ...]]:
    cursor = connection.execute(query)
    if cursor.description is None:
        raise ValueError("not a query")
    rows: list[tuple[Any, ...]] = []
    size = 0
    for row in cursor:
        size += sum(len(value) for value in row if isinstance(value, str | bytes))
        if size > MAX_BYTES:
            raise ValueError(f"rows of more than {MAX_BYTES:,} bytes")
        if len(rows) == max_rows:
            raise ValueError(f"more than {max_rows} rows")
        rows.append(row)
    return [tuple(round(v, 6) if isinstance(v, float) else v for v in row) for row in rows]


class _closing:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def __enter__(self) -> sqlite3.Connection:
        return self.connection

    def __exit__(self, *error: object) -> None:
        self.connection.close()


def _fill(connection: sqlite3.Connection, schema: str, gold: str, seed: int) -> None:
    """Seeded rows for every table; foreign keys point to existing values, so that joins find partners."""
    draw = random.Random(f"{seed}:{schema}")
    asked = _asked_values(gold)
    tables = [
        name
        for (name,) in connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY rowid"
        )
    ]
    parents = {
        (table.lower(), str(key[3]).lower()): (str(key[2]).lower(), str(key[4] or key[3]).lower())
        for table in tables
        for key in connection.execute(f"PRAGMA foreign_key_list({_quoted(table)})")
    }
    for table in tables:
        columns = connection.execute(f"PRAGMA table_info({_quoted(table)})").fetchall()
        names = [column[1] for column in columns]
        num_keys = sum(1 for column in columns if column[5])
        for number in range(SYNTHETIC_ROWS):
            values = []
            for _, name, type_name, not_null, _, key in columns:
                parent = parents.get((table.lower(), name.lower()))
                unique = bool(key) and num_keys == 1
                if parent or unique or name.lower().endswith("id"):
                    at = number if unique and not parent else draw.randrange(SYNTHETIC_ROWS)
                    pool = _key_values(type_name, asked.get(parent[1] if parent else name.lower(), []))
                    values.append(pool[at])
                elif not not_null and draw.random() < 0.08:
                    values.append(None)
                else:
                    values.append(_value(draw, type_name, [*asked.get(name.lower(), []), *asked.get("", [])]))
            # A CHECK or UNIQUE constraint may refuse a synthetic row; others remain.
            marks = ", ".join("?" * len(names))
            connection.execute(
                f"INSERT OR IGNORE INTO {_quoted(table)} ({', '.join(map(_quoted, names))}) VALUES ({marks})",
                values,
            )


def _is_numeric(type_name: str) -> bool:
    """SQLite's affinity rules (datatype3.html, 3.1), with BOOLEAN, NUMERIC and DECIMAL as numbers."""
    return bool(re.search(r"INT|REAL|FLOA|DOUB|NUM|DEC|BOOL", type_name.upper()))


def _is_real(type_name: str) -> bool:
    return bool(re.search(r"REAL|FLOA|DOUB|DEC", type_name.upper()))


def _fitting(type_name: str, asked: list[Any]) -> list[Any]:
    """Asked values as the column's type stores them; neighbors of numbers tell `>` from `>=`."""
    if not _is_numeric(type_name):
        return [str(value) for value in asked]
    numbers = [value for value in asked if not isinstance(value, str)]
    return [value + step for value in numbers for step in (-1, 0, 1)]


def _key_values(type_name: str, asked: list[Any]) -> list[Any]:
    """Distinct values of a key column, the same wherever the column is referred to."""
    fitting = _fitting(type_name, asked)
    start: list[Any] = list(range(1, SYNTHETIC_ROWS + 1))
    if not _is_numeric(type_name):
        start = [f"{WORDS[n % len(WORDS)]}-{n}" for n in range(SYNTHETIC_ROWS)]
    return list(dict.fromkeys([*fitting, *start]))[:SYNTHETIC_ROWS]


def _value(draw: random.Random, type_name: str, asked: list[Any]) -> Any:
    fitting = _fitting(type_name, asked)
    if fitting and draw.random() < 0.6:
        return draw.choice(fitting)
    if _is_real(type_name):
        return round(draw.uniform(0, 100), 2)
    if _is_numeric(type_name):
        return draw.randint(0, 1) if "BOOL" in type_name.upper() else draw.randint(0, 100)
    if re.search(r"DATE|TIME", type_name.upper()):
        return f"{draw.randint(2000, 2024)}-{draw.randint(1, 12):02}-{draw.randint(1, 28):02}"
    return draw.choice(WORDS)


def _asked_values(query: str) -> dict[str, list[Any]]:
    """Literals of the query by the column they are compared with, '' for those of no single column."""
    import sqlglot
    from sqlglot import exp
    from sqlglot.errors import SqlglotError

    asked: dict[str, list[Any]] = {}
    try:
        tree = sqlglot.parse_one(query, read="sqlite")
    except (SqlglotError, RecursionError):
        return asked
    for literal in tree.find_all(exp.Literal):
        if literal.find_ancestor(exp.Limit, exp.Offset):
            continue
        condition = literal.find_ancestor(exp.Predicate)
        columns = {column.name.lower() for column in condition.find_all(exp.Column)} if condition else set()
        value: Any = literal.this
        if literal.is_string:
            value = value.replace("%", "").replace("_", "a") if isinstance(condition, exp.Like) else value
        else:
            try:
                value = float(value) if re.search(r"[.eE]", value) else int(value)
            except ValueError:
                continue
        name = next(iter(columns)) if len(columns) == 1 else ""
        asked.setdefault(name, []).append(value)
    return asked


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
