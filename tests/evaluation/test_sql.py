import itertools
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tunesmith.data.examples import Message, Prompt, Row
from tunesmith.evaluation.metrics import METRICS
from tunesmith.evaluation.sql import MAX_BYTES, BrokenReference, execution_match, is_ordered

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
    "long pattern": "SELECT printf('%.*c', 99000, 'a') LIKE printf('%%%.*cb%%', 45000, 'a')",
    "long glob": "SELECT printf('%.*c', 99000, 'a') GLOB printf('*%.*cb*', 45000, 'a')",
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
    "detach": "DETACH DATABASE main",
    "reindex": "REINDEX",
    "analyze": "ANALYZE",
    "savepoint": "SAVEPOINT a",
    "trigger": "CREATE TEMP TRIGGER t AFTER INSERT ON singer BEGIN DELETE FROM singer; END",
    "returning": "DELETE FROM singer RETURNING *",
    "replace in a CTE": "WITH a AS (SELECT 1) REPLACE INTO singer SELECT 9, 'x', 1, 1",
    "schema table": "UPDATE sqlite_master SET sql = ''",
    "virtual table": "CREATE VIRTUAL TABLE v USING fts5(a)",
    "read file": "SELECT readfile('/etc/passwd')",
    "write file": "SELECT writefile('/tmp/tunesmith_attack.db', 'x')",
    "edit": "SELECT edit('x')",
    "tokenizer": "SELECT fts3_tokenizer('simple')",
    "many large rows": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 9000) "
    "SELECT hex(zeroblob(49000)) FROM n",
    "large columns": "SELECT " + ", ".join(["zeroblob(99000)"] * 600),
    "growing value": "WITH RECURSIVE n(i, s) AS (SELECT 1, 'ab' UNION ALL SELECT i + 1, s || s FROM n LIMIT 99) "
    "SELECT MAX(LENGTH(s)) FROM n",
    "large sort": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 99999999) "
    "SELECT i FROM (SELECT i, hex(randomblob(40000)) AS s FROM n) ORDER BY s",
    "large group": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 9999999) "
    "SELECT group_concat(hex(zeroblob(10000))) FROM n",
    "expensive pattern": "SELECT replace(hex(zeroblob(40000)), '0', hex(zeroblob(40000)))",
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


MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from tunesmith.evaluation.sql import execution_match
import test_sql as t
t.match("SELECT 1", "SELECT 1")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[2:]:
    assert not t.match(t.ATTACKS[name], "SELECT name FROM singer", seconds=0.3).executed, name
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read as Linux counts it, in KiB")
def test_attacks_on_memory_stay_below_the_caps():
    """All of them in one process, whose peak is measured: less than three times the cap on rows."""
    names = [
        name
        for name in ATTACKS
        if name.startswith(("large", "many", "growing", "endless", "blob", "expensive"))
    ]
    command = [sys.executable, "-c", MEMORY, str(Path(__file__).parent), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 3 * MAX_BYTES / 1e6


def test_nothing_is_left_on_the_disk():
    assert not Path("/tmp/tunesmith_attack.db").exists()


@pytest.mark.parametrize(
    ("predicted", "gold", "same"),
    [
        ("select NAME from Singer where AGE>25", "SELECT name FROM singer WHERE age > 25", True),
        ("SELECT s.name FROM singer AS s", "SELECT name FROM singer", True),
        ("SELECT name AS n FROM singer", "SELECT name FROM singer", True),
        ('SELECT "name" FROM singer;', "SELECT name FROM singer", True),
        ('SELECT "Name" FROM "Singer"', "SELECT name FROM singer", True),
        ('SELECT age FROM singer WHERE name = "Paris"', 'SELECT age FROM singer WHERE name = "paris"', False),
        ('SELECT age FROM singer WHERE name = "Paris"', "SELECT age FROM singer WHERE name = 'Paris'", True),
        ('SELECT age FROM singer WHERE name = "paris"', "SELECT age FROM singer WHERE name = 'Paris'", False),
        ('SELECT age AS "Years" FROM singer ORDER BY "Years"', "SELECT age AS years FROM singer ORDER BY years", True),
        ("SELECT name FROM singer WHERE pay = 1 AND age = 2", "SELECT name FROM singer WHERE age=2 AND pay=1", True),
        ("SELECT name FROM singer WHERE 2 = age", "SELECT name FROM singer WHERE age = 2", True),
        ("SELECT a.name FROM singer a JOIN song b ON a.id = b.singer",
         "SELECT singer.name FROM singer JOIN song ON song.singer = singer.id", True),
        ("SELECT x.name FROM singer x JOIN singer y ON x.id = y.age",
         "SELECT y.name FROM singer x JOIN singer y ON x.id = y.age", False),
        ("SELECT DISTINCT name FROM singer", "SELECT name FROM singer", False),
        ("SELECT name FROM singer WHERE age > 26", "SELECT name FROM singer WHERE age > 25", False),
        ("SELECT name, age FROM singer", "SELECT age, name FROM singer", False),
        ("SELECT age AS a FROM singer ORDER BY a", "SELECT name AS a FROM singer ORDER BY a", False),
        ("DROP TABLE singer", "SELECT name FROM singer", False),
        ("no query", "SELECT name FROM singer", False),
    ],
)  # fmt: skip
def test_the_same_query_in_other_words(predicted, gold, same):
    prompt = Prompt((Message("user", "?"),), gold, Row("a", 1), checks={"schema": SCHEMA, "setup": SETUP})
    assert METRICS["sql_exact_match"].score(prompt, predicted, gold) == same
    assert METRICS["sql_exact_match"].score(prompt, gold, gold) == 1


def test_comparisons_of_rows_equal_brute_force_on_200_random_pairs():
    """Bags, bags with every order of the columns, and sets, by Python's own containers."""
    draw, seen = random.Random(0), set()
    for _ in range(200):
        columns = draw.randint(1, 3)
        values = [
            [draw.choice(["1", "2", "NULL", "'a'"]) for _ in range(columns)]
            for _ in range(draw.randint(1, 4))
        ]
        order = draw.sample(range(columns), columns) if draw.random() < 0.5 else range(columns)
        other = [[row[n] for n in order] for row in draw.sample(values, len(values))]
        if draw.random() < 0.3:
            other.append(draw.choice(other))
        if draw.random() < 0.2:
            other[0][0] = "7"
        gold, predicted = (
            f"VALUES {', '.join('(' + ', '.join(r) + ')' for r in rows)}" for rows in (values, other)
        )
        gold, predicted = f"SELECT * FROM ({gold})", f"SELECT * FROM ({predicted})"
        result = match(predicted, gold)
        want, have = [tuple(r) for r in values], [tuple(r) for r in other]
        orders = itertools.permutations(range(columns))
        expected = (
            Counter(have) == Counter(want),
            any(Counter(tuple(r[n] for n in o) for r in have) == Counter(want) for o in orders),
            set(have) == set(want),
        )
        assert (result.match, result.match_any_columns, result.match_as_sets) == expected, (predicted, gold)
        seen.add(expected)
    assert len(seen) >= 4


def test_order_counts_with_columns_in_any_order_and_not_for_sets():
    gold = "SELECT name, age FROM singer ORDER BY age DESC, id"
    result = match("SELECT age, name FROM singer ORDER BY age DESC, id", gold)
    assert (result.match, result.match_any_columns, result.match_as_sets) == (False, True, False)
    result = match("SELECT DISTINCT name, age FROM singer ORDER BY age", gold)
    assert (result.match, result.match_any_columns, result.match_as_sets) == (False, False, True)


def test_executes_and_vacuous_are_shares_of_their_own():
    prompt = Prompt((Message("user", "?"),), "", Row("a", 1), checks={"schema": SCHEMA, "setup": SETUP})
    nothing = "SELECT name FROM singer WHERE 1 = 0"
    scores = {name: METRICS[name].score for name in ("sql_executes", "sql_vacuous", "ex_bag", "ex_set")}
    assert scores["sql_executes"](prompt, "SELECT 1", "SELECT 2") == 1
    assert scores["sql_executes"](prompt, "DROP TABLE singer", "SELECT 2") == 0
    assert scores["sql_vacuous"](prompt, nothing, nothing) == 1
    assert scores["sql_vacuous"](prompt, "SELECT name FROM singer", nothing) == 0
    assert scores["sql_vacuous"](prompt, "SELECT name FROM singer", "SELECT name FROM singer") == 0
    assert scores["ex_bag"](prompt, "SELECT 1, 2", "SELECT 2, 1") == 1
    assert scores["ex_set"](prompt, "SELECT 1, 2", "SELECT 2, 1") == 0


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
