"""Pre-training texts with SQL: schemas followed by queries, and queries explained in English.

The direction English -> SQL never occurs here: that is what the demonstration fine-tune teaches.
"""

import random

from tiny_corpus.dialogue import chatml
from tiny_corpus.schemas import Column, Table, literal, pretrain_table
from tiny_corpus.sql import Query, draw, draw_join

EXPLANATIONS: dict[str, tuple[str, ...]] = {
    "project": (
        "It returns the {a} of every {one}.",
        "This lists the {a} of all the {many}.",
        "The result is one {a} for each {one}.",
    ),
    "project_two": (
        "It returns the {a} and the {b} of every {one}.",
        "This lists {a} and {b} for all the {many}.",
    ),
    "filter": (
        "It returns the {a} of the {many} {where}.",
        "This lists the {a} of every {one} {where}.",
        "The result is the {a} of all {many} {where}.",
    ),
    "lookup": (
        "It returns the {a} of the {one} called {value}.",
        "The result is the {a} of {value}.",
        "This gives the {a} for the {one} with {key} {value}.",
    ),
    "filter_both": (
        "It returns the {a} of the {many} {where}.",
        "This lists the {a} of every {one} {where}.",
    ),
    "count": ("It counts the {many}.", "The result is the number of {many}."),
    "count_filter": (
        "It counts the {many} {where}.",
        "The result is the number of {many} {where}.",
        "This tells how many {many} there are {where}.",
    ),
    "aggregate": (
        "It computes the {agg} {n} of the {many}.",
        "The result is the {agg} {n} over all {many}.",
    ),
    "aggregate_filter": (
        "It computes the {agg} {n} of the {many} {where}.",
        "The result is the {agg} {n} among the {many} {where}.",
    ),
    "top": (
        "It returns the {a} of the {which}.",
        "The result is one {a}: that of the {which}.",
    ),
    "sort": (
        "It returns the {a} of the {many}, sorted by {n} {order}.",
        "This lists the {a} of every {one} ordered by {n} {order}.",
    ),
    "distinct": (
        "It lists each different {t} of the {many} once.",
        "The result is every {t} that {many} have, without repeats.",
    ),
    "count_distinct": (
        "It counts how many different {t} values the {many} have.",
        "The result is the number of distinct {t} values among the {many}.",
    ),
    "group_count": (
        "It counts the {many} for each {t}.",
        "The result is the number of {many} per {t}.",
    ),
    "group_aggregate": (
        "It computes the {agg} {n} of the {many} for each {t}.",
        "The result is the {agg} {n} per {t} of the {many}.",
    ),
    "join_filter": (
        "It returns the {a} of the {many} of each {parent} {where}.",
        "This lists the {a} of every {one} that belongs to {parents} {where}.",
    ),
    "join_count": (
        "It counts the {many} of the {parents} {where}.",
        "The result is the number of {many} that belong to {parents} {where}.",
    ),
}


def explanation(rng: random.Random, query: Query) -> str:
    """What the query returns, in one English sentence."""
    return rng.choice(EXPLANATIONS[query.kind]).format(**query.words)


def linked(rng: random.Random, child: Table, parent: Table) -> Table:
    """The child with one more column, named like the parent and holding keys of its rows."""
    keys = [str(row[0]) for row in parent.rows]
    few = rng.sample(keys, 3)
    link = Column(parent.name, tuple(keys))
    owners = [*few, *rng.choices(few, k=len(child.rows) - 3)]
    rng.shuffle(owners)
    rows = tuple((row[0], owner, *row[1:]) for row, owner in zip(child.rows, owners, strict=True))
    return Table(child.name, (child.columns[0], link, *child.columns[1:]), rows)


def schema_document(rng: random.Random) -> str:
    """A schema and several queries over it."""
    table = pretrain_table(rng)
    queries = [draw(rng, table).sql for _ in range(rng.randint(3, 7))]
    return "\n".join([table.create, *queries])


def explained_document(rng: random.Random) -> str:
    """A schema, then queries each followed by what it returns."""
    table = pretrain_table(rng)
    queries = [draw(rng, table) for _ in range(rng.randint(2, 5))]
    told = [f"{q.sql}\n-- {explanation(rng, q)}" for q in queries]
    return "\n".join([table.create, *told])


def join_document(rng: random.Random) -> str:
    """Two linked tables, then queries that join them, mostly explained."""
    parent, child = pretrain_table(rng), pretrain_table(rng)
    while child.name == parent.name or parent.name in {c.name for c in child.columns}:
        child = pretrain_table(rng)
    child = linked(rng, child, parent)
    lines = [parent.create, child.create]
    for _ in range(rng.randint(2, 4)):
        q = draw_join(rng, child, parent) if rng.random() < 0.7 else draw(rng, child)
        lines.append(q.sql)
        if rng.random() < 0.6:
            lines.append(f"-- {explanation(rng, q)}")
    return "\n".join(lines)


def data_document(rng: random.Random) -> str:
    """A schema, its rows, and sentences that read facts off the rows."""
    table = pretrain_table(rng)
    lines = [table.create, f"INSERT INTO {table.name} VALUES"]
    rows = rng.sample(table.rows, 4)
    lines.append(",\n".join("(" + ", ".join(map(literal, row)) + ")" for row in rows) + ";")
    for _ in range(3):
        row = rng.choice(rows)
        index = rng.randrange(1, len(table.columns))
        lines.append(f"-- The {table.columns[index].name} of {row[0]} is {row[index]}.")
    return "\n".join(lines)


def told_document(rng: random.Random) -> str:
    """Facts in English, then the rows that hold them: copying words into quoted literals."""
    table = pretrain_table(rng)
    lines = [table.create]
    for row in rng.sample(table.rows, 3):
        facts = [f"{c.name} {v}" for c, v in zip(table.columns[1:], row[1:], strict=True)]
        lines.append(f"-- {row[0]} has {' and '.join(facts)}.")
        lines.append(f"INSERT INTO {table.name} VALUES ({', '.join(map(literal, row))});")
    return "\n".join(lines)


def chat_document(rng: random.Random) -> str:
    """Somebody asks what a query returns; no schema is in the conversation."""
    table = pretrain_table(rng)
    talk = []
    for _ in range(rng.randint(1, 3)):
        q = draw(rng, table)
        ask = rng.choice(("What does this query return?", "Explain this query.", "Explain:"))
        talk.append((f"{ask}\n{q.sql}", explanation(rng, q)))
    return chatml(talk)


def document(rng: random.Random) -> str:
    """One SQL document of any kind."""
    kinds = (schema_document, explained_document, join_document, data_document, told_document,
             chat_document)  # fmt: skip
    return rng.choices(kinds, (2.5, 6, 0.8, 0.5, 1, 1))[0](rng)
