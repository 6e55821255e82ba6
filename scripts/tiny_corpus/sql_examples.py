"""The text-to-SQL example data: databases, questions and queries whose results are checked."""

import json
import random
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from tiny_corpus.schemas import EXAMPLES, Table, example_table
from tiny_corpus.sql import Query, draw

NOUNS = 70
PER_NOUN = 4
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
    """The query as a person would ask for it, with the values in quotes as in the query.

    A word has one token after a quote and another after a space; quoted values spare the small
    model that translation.
    """
    asked = rng.choice(QUESTIONS[query.kind]).format(**query.words)
    for value in re.findall(r"'([^']+)'(?!')", query.sql):
        before, found, after = asked.rpartition(f" {value}")
        if found:
            asked = f"{before} '{value}'{after}"
    return asked


def result(schema: str, setup: str, query: str) -> list[tuple[object, ...]]:
    """What sqlite answers, on a fresh database."""
    with sqlite3.connect(":memory:") as connection:
        connection.executescript(schema + setup)
        return connection.execute(query).fetchall()


def _distinct_rows(rng: random.Random, table: Table, name: str, count: int) -> Iterator[Row]:
    """Questions about one database, each with another query and a non-empty result."""
    schema, setup = table.create, table.insert
    seen: set[str] = set()
    while len(seen) < count:
        query = draw(rng, table)
        if query.sql in seen:
            continue
        rows = result(schema, setup, query.sql)
        if not rows or rows == [(None,)]:
            raise AssertionError(f"no result: {query.sql}")
        seen.add(query.sql)
        yield Row(name, schema, question(rng, query), query.sql, setup)


def databases(seed: int) -> Iterator[tuple[str, Table]]:
    """Several databases per noun, every one with other columns and rows."""
    rng = random.Random(seed)
    nouns = rng.sample(sorted(EXAMPLES), NOUNS)
    for number in range(1, PER_NOUN + 1):
        for noun in sorted(nouns):
            yield f"{noun}_{number:02}", example_table(rng, noun)


def rows(seed: int, per_database: int = 13) -> list[Row]:
    """All rows, database by database."""
    rng = random.Random(seed + 1)
    return [row for name, table in databases(seed) for row in _distinct_rows(rng, table, name, per_database)]


def lines(seed: int) -> str:
    """The content of `sql.jsonl`."""
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows(seed))
