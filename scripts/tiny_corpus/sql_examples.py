"""The text-to-SQL example data: databases, questions and queries whose results are checked."""

import json
import random
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from tiny_corpus.schemas import EXAMPLES, Table, example_table
from tiny_corpus.sql import Query, draw, draw_join
from tiny_corpus.sql_documents import linked

QUESTIONS: dict[str, tuple[str, ...]] = {
    "project": (
        "List the {a} of all {many}.",
        "What is the {a} of each {one}?",
        "Show me the {a} of every {one}.",
    ),
    "project_two": (
        "List the {a} and {b} of all {many}.",
        "Show the {a} and the {b} of every {one}.",
        "What are the {a} and {b} of each {one}?",
    ),
    "filter": (
        "Show the {a} of the {many} {where}.",
        "What is the {a} of the {many} {where}?",
        "List the {a} of all {many} {where}.",
        "Find the {a} of every {one} {where}.",
    ),
    "lookup": (
        "What is the {a} of the {one} called {value}?",
        "What {a} does the {one} {value} have?",
        "Show the {a} of the {one} named {value}.",
    ),
    "filter_both": (
        "Show the {a} of the {many} {where}.",
        "List the {a} of all {many} {where}.",
        "Find the {a} of every {one} {where}.",
    ),
    "count": (
        "How many {many} are there?",
        "Count the {many}.",
        "What is the number of {many}?",
    ),
    "count_filter": (
        "How many {many} are there {where}?",
        "Count the {many} {where}.",
        "What is the number of {many} {where}?",
    ),
    "aggregate": (
        "What is the {agg} {n} of all {many}?",
        "Find the {agg} {n} of the {many}.",
        "Give me the {agg} {n} among the {many}.",
    ),
    "aggregate_filter": (
        "What is the {agg} {n} of the {many} {where}?",
        "Find the {agg} {n} of all {many} {where}.",
    ),
    "top": (
        "What is the {a} of the {which}?",
        "Show the {a} of the {which}.",
        "Find the {a} of the {which}.",
    ),
    "sort": (
        "List the {a} of all {many} sorted by {n} {order}.",
        "Show the {a} of every {one} ordered by {n} {order}.",
    ),
    "distinct": (
        "What are the different {t} values of the {many}?",
        "List each distinct {t} of the {many}.",
        "Show every different {t} among the {many}.",
    ),
    "count_distinct": (
        "How many different {t} values do the {many} have?",
        "Count the distinct {t} values of the {many}.",
    ),
    "group_count": (
        "How many {many} are there for each {t}?",
        "Count the {many} per {t}.",
        "Show the number of {many} for each {t}.",
    ),
    "group_aggregate": (
        "What is the {agg} {n} of the {many} for each {t}?",
        "Show the {agg} {n} per {t} of the {many}.",
    ),
    "join_filter": (
        "Show the {a} of the {many} of each {parent} {where}.",
        "List the {a} of every {one} that belongs to {parents} {where}.",
    ),
    "join_count": (
        "How many {many} belong to {parents} {where}?",
        "Count the {many} of the {parents} {where}.",
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of `sql.jsonl`."""

    database: str
    schema: str
    question: str
    query: str
    setup: str


def question(rng: random.Random, query: Query) -> str:
    """The query as a person would ask for it."""
    return rng.choice(QUESTIONS[query.kind]).format(**query.words)


def result(schema: str, setup: str, query: str) -> list[tuple[object, ...]]:
    """What sqlite answers, on a fresh database."""
    with sqlite3.connect(":memory:") as connection:
        connection.executescript(schema + setup)
        return connection.execute(query).fetchall()


def _distinct_rows(
    rng: random.Random, tables: tuple[Table, ...], name: str, count: int
) -> Iterator[Row]:
    """Questions about one database, each with another query and a non-empty result."""
    schema = "\n".join(t.create for t in tables)
    setup = "\n".join(t.insert for t in tables)
    seen: set[str] = set()
    while len(seen) < count:
        query = _any_query(rng, tables)
        if query.sql in seen:
            continue
        rows = result(schema, setup, query.sql)
        if not rows or rows == [(None,)]:
            raise AssertionError(f"no result: {query.sql}")
        seen.add(query.sql)
        yield Row(name, schema, question(rng, query), query.sql, setup)


def _any_query(rng: random.Random, tables: tuple[Table, ...]) -> Query:
    if len(tables) == 1:
        return draw(rng, tables[0])
    if rng.random() < 0.5:
        return draw_join(rng, tables[1], tables[0])
    return draw(rng, rng.choice(tables))


def databases(seed: int, joined_share: float = 0.0) -> Iterator[tuple[str, tuple[Table, ...]]]:
    """One database per noun: a held-out database is also about a thing not met in training."""
    rng = random.Random(seed)
    nouns = sorted(EXAMPLES)
    rng.shuffle(nouns)
    while nouns:
        table = example_table(rng, nouns.pop())
        if nouns and rng.random() < joined_share:
            child = linked(rng, example_table(rng, nouns.pop()), table)
            yield f"{table.name}_{child.name}", (table, child)
        else:
            yield table.name, (table,)


def rows(seed: int, per_database: int = 13) -> list[Row]:
    """All rows, database by database."""
    rng = random.Random(seed + 1)
    return [
        row
        for name, tables in databases(seed)
        for row in _distinct_rows(rng, tables, name, per_database)
    ]


def lines(seed: int) -> str:
    """The content of `sql.jsonl`."""
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows(seed))
