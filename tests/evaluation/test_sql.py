import time

import pytest

from tunesmith.evaluation.sql import BrokenReference, execution_match, is_ordered

SCHEMA = "CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, age INTEGER, pay REAL);"
SETUP = "INSERT INTO singer VALUES (1, 'Ann', 30, 1.0), (2, 'Bo', 20, 0.1), (3, 'Cy', 30, NULL), (4, 'Ann', 40, 0.2);"


def match(predicted, gold, setup=SETUP, **options):
    return execution_match(SCHEMA, setup, predicted, gold, **options)


@pytest.mark.parametrize(
    ("predicted", "gold", "same"),
    [
        ("select NAME from Singer where AGE>25", "SELECT name FROM singer WHERE age > 25", True),
        ("SELECT name FROM singer ORDER BY age", "SELECT name FROM singer", True),  # order free
        ("SELECT name FROM singer", "SELECT name FROM singer ORDER BY age DESC", False),  # order asked
        ("SELECT DISTINCT name FROM singer", "SELECT name FROM singer", False),  # repetitions count
        ("SELECT age, name FROM singer", "SELECT name, age FROM singer", False),  # column order counts
        ("SELECT 0.3", "SELECT 0.1 + 0.2", True),  # floats to 1e-6
        ("SELECT 3", "SELECT 3.0", True),
        ("SELECT '3'", "SELECT 3", False),
        ("SELECT pay FROM singer WHERE id = 3", "SELECT NULL", True),  # NULL equals NULL
        ("SELECT COUNT(*) FROM singer; -- done", "SELECT 4", True),
        ("SELECT COUNT(*) FROM singer", "SELECT 5", False),
    ],
)
def test_rows_are_compared_as_documented(predicted, gold, same):
    result = match(predicted, gold)
    assert result.match == same
    assert result.executed
    assert not result.vacuous


ATTACKS = {
    "drop": "DROP TABLE singer",
    "delete": "DELETE FROM singer",
    "update": "UPDATE singer SET age = 0",
    "insert": "INSERT INTO singer VALUES (9, 'x', 1, 1)",
    "create": "CREATE TABLE more (a)",
    "attach": "ATTACH DATABASE '/tmp/tunesmith_attack.db' AS other",
    "vacuum": "VACUUM INTO '/tmp/tunesmith_attack.db'",
    "pragma": "PRAGMA query_only = OFF",
    "pragma table": "SELECT * FROM pragma_table_info('singer')",
    "endless": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT MAX(i) FROM n",
    "endless rows": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
    "extension": "SELECT load_extension('/tmp/evil.so')",
    "two": "SELECT 1; DROP TABLE singer",
    "cross join": "SELECT COUNT(*) FROM " + ", ".join(f"singer s{n}" for n in range(30)),
    "blob": "SELECT zeroblob(2000000000)",
    "large value": "SELECT hex(zeroblob(900000))",
    "nothing": "",
    "comment": "-- SELECT 1",
    "prose": "I think the answer is 42.",
    "null byte": "SELECT 1\0",
    "half surrogate": "SELECT '\ud800'",
    "bad text": "SELECT CAST(x'ff' AS TEXT)",
    "transaction": "BEGIN",
    "long": "SELECT " + "(" * 5000 + "1" + ")" * 5000,
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_stopped(attack, tmp_path):
    began = time.monotonic()
    result = match(ATTACKS[attack], "SELECT name FROM singer", seconds=0.3)
    assert not result.match
    assert not result.executed
    assert result.error is not None
    assert time.monotonic() - began < 3
    assert match("SELECT COUNT(*) FROM singer", "SELECT 4").match, "the next query finds everything in place"


@pytest.mark.parametrize(
    "setup", ["ATTACH '/tmp/tunesmith_attack.db' AS x;", "PRAGMA query_only=0;", "INSERT INTO no VALUES (1);"]
)
def test_a_hostile_or_broken_setup_is_the_examples_fault(setup):
    with pytest.raises(BrokenReference, match="cannot be built"):
        match("SELECT 1", "SELECT 1", setup=setup)


def test_a_reference_that_does_not_run_is_not_the_answers_fault():
    with pytest.raises(BrokenReference, match="no such column"):
        match("SELECT 1", "SELECT size FROM singer")


@pytest.mark.parametrize(
    ("gold", "wrong"),
    [
        ("SELECT name FROM singer WHERE age > 56", "SELECT name FROM singer WHERE age >= 56"),
        ("SELECT age FROM singer WHERE name = 'Zoe'", "SELECT age FROM singer"),
        (
            "SELECT COUNT(*) FROM singer WHERE name = 'Zoe' AND age = 12",
            "SELECT COUNT(*) FROM singer WHERE age = 12",
        ),
        ("SELECT name FROM singer WHERE name LIKE '%Zo%'", "SELECT name FROM singer WHERE name LIKE 'Zq%'"),
        ("SELECT MAX(pay) FROM singer", "SELECT MIN(pay) FROM singer"),
    ],
)
def test_schema_alone_gets_rows_that_tell_queries_apart(gold, wrong):
    right = match(gold, gold, setup="")
    assert right.match
    assert not right.vacuous
    assert not match(wrong, gold, setup="").match
    execution_match.cache_clear()
    assert match(gold, gold, setup="") == right, "deterministic"


def test_synthetic_rows_join():
    schema = (
        "CREATE TABLE artist (artist_id INTEGER PRIMARY KEY, name TEXT);"
        "CREATE TABLE song (id INTEGER PRIMARY KEY, artist INTEGER REFERENCES artist(artist_id), title TEXT);"
    )
    gold = "SELECT a.name FROM artist a JOIN song s ON s.artist = a.artist_id WHERE s.title = 'Moon'"
    result = execution_match(schema, "", gold, gold)
    assert result.match
    assert not result.vacuous
    assert not execution_match(schema, "", "SELECT name FROM artist", gold).match


def test_agreement_on_nothing_is_tried_on_other_rows_and_flagged():
    nothing = "SELECT name FROM singer WHERE age > 1000"
    assert match(nothing, nothing) == match(nothing, nothing)
    assert not match(nothing, nothing).vacuous, "synthetic rows hold ages around 1000"
    assert not match("SELECT name FROM singer WHERE age > 2000", nothing).match
    impossible = "SELECT name FROM singer WHERE 1 = 0"
    assert match(impossible, impossible).vacuous


def test_order_is_looked_for_at_the_top_level_only():
    assert is_ordered("SELECT a FROM t ORDER BY a LIMIT 1")
    assert not is_ordered("SELECT a FROM (SELECT a FROM t ORDER BY a)")
    assert not is_ordered("SELECT a FROM t WHERE b = 'order by'")
