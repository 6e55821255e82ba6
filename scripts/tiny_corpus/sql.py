"""Queries over a table, with the words to speak about them in either direction."""

import random
from dataclasses import dataclass, field

from tiny_corpus.schemas import Column, Table, literal
from tiny_corpus.words import plural


@dataclass(frozen=True)
class Query:
    """A query and the pieces of English that any sentence about it needs."""

    kind: str
    sql: str
    words: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Condition:
    """One WHERE condition: its SQL, and the English that follows `singers`."""

    sql: str
    english: str


AGGREGATES = (
    ("AVG", ("average", "mean")),
    ("MAX", ("highest", "maximum", "largest")),
    ("MIN", ("lowest", "minimum", "smallest")),
    ("SUM", ("total", "summed")),
)


def _texts(table: Table) -> tuple[Column, ...]:
    return tuple(c for c in table.columns[1:] if c.is_text)


def _numbers(table: Table) -> tuple[Column, ...]:
    return tuple(c for c in table.columns if not c.is_text)


def _text_condition(rng: random.Random, name: str, column: Column, value: str) -> Condition:
    phrases = [
        f"whose {column.name} is {value}",
        f"with {column.name} {value}",
        f"with the {column.name} {value}",
        f"that have {column.name} {value}",
    ]
    if column.equals:
        phrases += [column.equals.format(v=value)] * 2
    return Condition(f"{name} = {literal(value)}", rng.choice(phrases))


def _number_condition(
    rng: random.Random, name: str, column: Column, values: tuple[int, ...], row: int
) -> Condition:
    """A comparison that holds for the given row and, where it can, not for all of them."""
    order = sorted(values)
    own = values[row]
    place = order.index(own)
    way = rng.choice(("more", "less", "between", "more", "less"))
    if way == "between" and 0 < place < len(order) - 1:
        low, high = order[place - 1] + 1, order[rng.randrange(place, len(order) - 1)]
        if low < high:
            phrase = rng.choice(
                ("with {c} between {l} and {h}", "with a {c} between {l} and {h}",
                 "whose {c} is between {l} and {h}", "with {c} from {l} to {h}")
            )  # fmt: skip
            english = phrase.format(c=column.name, l=low, h=high)
            return Condition(f"{name} BETWEEN {low} AND {high}", english)
    more = way == "more" if 0 < place < len(order) - 1 else place > 0
    if more:
        bound, sign = rng.randrange(order[place - 1], own), ">"
        ways = ["with {c} above {k}", "with a {c} above {k}", "whose {c} is greater than {k}",
                "with {c} greater than {k}", "with more than {k} {c}", "whose {c} is over {k}",
                *[f"{column.more} {{k}}"] * (2 if column.more else 0)]  # fmt: skip
    else:
        bound, sign = rng.randint(own + 1, max(own + 1, order[place + 1])), "<"
        ways = ["with {c} below {k}", "with a {c} below {k}", "whose {c} is less than {k}",
                "with {c} less than {k}", "with less than {k} {c}", "whose {c} is under {k}",
                *[f"{column.less} {{k}}"] * (2 if column.less else 0)]  # fmt: skip
    return Condition(f"{name} {sign} {bound}", rng.choice(ways).format(c=column.name, k=bound))


def condition(rng: random.Random, table: Table, column: Column, row: int, prefix: str = "") -> Condition:
    """A condition on one column that the given row fulfils."""
    name = prefix + column.name
    values = table.values(column)
    if column.is_text:
        return _text_condition(rng, name, column, str(values[row]))
    return _number_condition(rng, name, column, tuple(int(v) for v in values), row)


def _base(table: Table) -> dict[str, str]:
    return {"one": table.name, "many": table.plural}


def _project(rng: random.Random, table: Table) -> Query:
    a = rng.choice(table.columns)
    return Query("project", f"SELECT {a.name} FROM {table.name}", _base(table) | {"a": a.name})


def _project_two(rng: random.Random, table: Table) -> Query:
    a, b = rng.sample(table.columns, 2)
    sql = f"SELECT {a.name}, {b.name} FROM {table.name}"
    return Query("project_two", sql, _base(table) | {"a": a.name, "b": b.name})


def _shown(rng: random.Random, table: Table, *not_these: Column) -> Column:
    """The column to show: mostly the key, else any that no condition speaks about."""
    if rng.random() < 0.5:
        return table.columns[0]
    return rng.choice([c for c in table.columns if c not in not_these])


def _filter(rng: random.Random, table: Table) -> Query:
    by = rng.choice(table.columns[1:])
    a = _shown(rng, table, by)
    where = condition(rng, table, by, rng.randrange(len(table.rows)))
    sql = f"SELECT {a.name} FROM {table.name} WHERE {where.sql}"
    return Query("filter", sql, _base(table) | {"a": a.name, "where": where.english})


def _lookup(rng: random.Random, table: Table) -> Query:
    """One property of the thing with a given name."""
    key = table.columns[0]
    a = rng.choice(table.columns[1:])
    value = str(rng.choice(table.values(key)))
    sql = f"SELECT {a.name} FROM {table.name} WHERE {key.name} = {literal(value)}"
    return Query("lookup", sql, _base(table) | {"a": a.name, "value": value, "key": key.name})


def _filter_both(rng: random.Random, table: Table) -> Query:
    first, second = rng.sample(table.columns[1:], 2)
    a = _shown(rng, table, first, second)
    row = rng.randrange(len(table.rows))
    one, two = (condition(rng, table, c, row) for c in (first, second))
    sql = f"SELECT {a.name} FROM {table.name} WHERE {one.sql} AND {two.sql}"
    where = f"{one.english} and {two.english}"
    return Query("filter_both", sql, _base(table) | {"a": a.name, "where": where})


def _count(rng: random.Random, table: Table) -> Query:
    return Query("count", f"SELECT COUNT(*) FROM {table.name}", _base(table))


def _count_filter(rng: random.Random, table: Table) -> Query:
    by = rng.choice(table.columns[1:])
    where = condition(rng, table, by, rng.randrange(len(table.rows)))
    sql = f"SELECT COUNT(*) FROM {table.name} WHERE {where.sql}"
    return Query("count_filter", sql, _base(table) | {"where": where.english})


def _aggregate(rng: random.Random, table: Table) -> Query:
    n = rng.choice(_numbers(table))
    function, names = rng.choice(AGGREGATES)
    sql = f"SELECT {function}({n.name}) FROM {table.name}"
    return Query("aggregate", sql, _base(table) | {"n": n.name, "agg": rng.choice(names)})


def _aggregate_filter(rng: random.Random, table: Table) -> Query:
    n = rng.choice(_numbers(table))
    by = rng.choice([c for c in table.columns[1:] if c != n])
    function, names = rng.choice(AGGREGATES)
    where = condition(rng, table, by, rng.randrange(len(table.rows)))
    sql = f"SELECT {function}({n.name}) FROM {table.name} WHERE {where.sql}"
    slots = _base(table) | {"n": n.name, "agg": rng.choice(names), "where": where.english}
    return Query("aggregate_filter", sql, slots)


def _top(rng: random.Random, table: Table) -> Query:
    n = rng.choice(_numbers(table))
    a = _shown(rng, table, n)
    down = rng.random() < 0.5
    ways = [f"with the {rng.choice(('highest', 'largest') if down else ('lowest', 'smallest'))}"
            f" {n.name}"]  # fmt: skip
    special = n.most if down else n.least
    slots = _base(table) | {"a": a.name, "which": f"{table.name} {ways[0]}"}
    if special and rng.random() < 0.5:
        slots["which"] = f"{special} {table.name}"
    direction = " DESC" if down else ""
    sql = f"SELECT {a.name} FROM {table.name} ORDER BY {n.name}{direction} LIMIT 1"
    return Query("top", sql, slots)


def _sort(rng: random.Random, table: Table) -> Query:
    n = rng.choice(_numbers(table))
    a = _shown(rng, table, n)
    down = rng.random() < 0.5
    order = rng.choice(
        ("from high to low", "in descending order", "highest first")
        if down
        else ("from low to high", "in ascending order", "lowest first")
    )
    sql = f"SELECT {a.name} FROM {table.name} ORDER BY {n.name}{' DESC' if down else ''}"
    return Query("sort", sql, _base(table) | {"a": a.name, "n": n.name, "order": order})


def _distinct(rng: random.Random, table: Table) -> Query:
    t = rng.choice(_texts(table))
    sql = f"SELECT DISTINCT {t.name} FROM {table.name}"
    return Query("distinct", sql, _base(table) | {"t": t.name})


def _count_distinct(rng: random.Random, table: Table) -> Query:
    t = rng.choice(_texts(table))
    sql = f"SELECT COUNT(DISTINCT {t.name}) FROM {table.name}"
    return Query("count_distinct", sql, _base(table) | {"t": t.name})


def _group_count(rng: random.Random, table: Table) -> Query:
    t = rng.choice(_texts(table))
    sql = f"SELECT {t.name}, COUNT(*) FROM {table.name} GROUP BY {t.name}"
    return Query("group_count", sql, _base(table) | {"t": t.name})


def _group_aggregate(rng: random.Random, table: Table) -> Query:
    t, n = rng.choice(_texts(table)), rng.choice(_numbers(table))
    function, names = rng.choice(AGGREGATES)
    sql = f"SELECT {t.name}, {function}({n.name}) FROM {table.name} GROUP BY {t.name}"
    slots = _base(table) | {"t": t.name, "n": n.name, "agg": rng.choice(names)}
    return Query("group_aggregate", sql, slots)


MAKERS = {
    "project": _project, "project_two": _project_two, "filter": _filter, "lookup": _lookup,
    "filter_both": _filter_both, "count": _count, "count_filter": _count_filter,
    "aggregate": _aggregate, "aggregate_filter": _aggregate_filter, "top": _top, "sort": _sort,
    "distinct": _distinct, "count_distinct": _count_distinct, "group_count": _group_count,
    "group_aggregate": _group_aggregate,
}  # fmt: skip
_WEIGHTS = {"filter": 5, "lookup": 2, "filter_both": 2, "count_filter": 3, "aggregate_filter": 2,
            "aggregate": 2, "top": 3, "count": 1}  # fmt: skip


def draw(rng: random.Random, table: Table) -> Query:
    """A random query over the table, the common kinds more often."""
    kinds = list(MAKERS)
    kind = rng.choices(kinds, [_WEIGHTS.get(k, 1.5) for k in kinds])[0]
    return MAKERS[kind](rng, table)


def draw_join(rng: random.Random, child: Table, parent: Table) -> Query:
    """A query over two tables: the child has a column with the parent's name, holding its key."""
    key = parent.columns[0].name
    on = f"{child.name} JOIN {parent.name} ON {child.name}.{parent.name} = {parent.name}.{key}"
    by = rng.choice(parent.columns[1:])
    shown = rng.choice([c for c in child.columns if c.name != parent.name])
    linked = {row[[c.name for c in child.columns].index(parent.name)] for row in child.rows}
    rows = [i for i, row in enumerate(parent.rows) if row[0] in linked]
    where = condition(rng, parent, by, rng.choice(rows), prefix=f"{parent.name}.")
    slots = {"one": child.name, "many": child.plural, "parent": parent.name,
             "parents": plural(parent.name), "a": shown.name, "where": where.english}  # fmt: skip
    if rng.random() < 0.3:
        return Query("join_count", f"SELECT COUNT(*) FROM {on} WHERE {where.sql}", slots)
    sql = f"SELECT {child.name}.{shown.name} FROM {on} WHERE {where.sql}"
    return Query("join_filter", sql, slots)
