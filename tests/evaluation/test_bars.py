"""Every metric is measured on 200 random cases against a reference of its own, by some test of this room."""

from __future__ import annotations

import ast
import itertools
import json
import math
import random
import re
import sqlite3
from pathlib import Path

import pytest
from rows_by_hand import row

from tunesmith.data.examples import Message, Prompt, Row
from tunesmith.evaluation.metrics import METRICS

HERE = Path(__file__).parent
CASES = 200


def tested() -> dict[str, list[str]]:
    """By metric: the tests on 200 random cases that name it, in their lines or in what they use."""
    found: dict[str, list[str]] = {}
    for file in sorted(HERE.glob("test_*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        tables: dict[str, ast.AST] = {
            node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)
        }
        tables |= {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for test in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
            if not test.name.startswith("test_") or "test_every_metric" in test.name:
                continue
            used = [node.id for node in ast.walk(test) if isinstance(node, ast.Name)]
            numbers = [node.value for node in ast.walk(test) if isinstance(node, ast.Constant)]
            if not {"CASES", "cases"} & set(used) and 200 not in numbers:
                continue
            for part in (test, *(tables[name] for name in used if name in tables)):
                for node in ast.walk(part):
                    name = getattr(node, "value", None) if isinstance(node, ast.Constant) else None
                    name = node.attr if isinstance(node, ast.Attribute) else name
                    if isinstance(name, str) and name in METRICS:
                        found.setdefault(name, []).append(f"{file.name}::{test.name}")
    return found


TESTED = tested()
OF_MODELS = {
    "mean_reward": "the sum of a run's own rewards: tests/methods/test_rewards.py",
    "preference_accuracy": "test_judged.py, against likelihoods by hand",
    "rating_ranking": "test_judged.py, against likelihoods by hand",
}
"""What has no value without a model or a run, and where it is measured."""


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_measured_against_a_reference(name):
    assert TESTED.get(name) or name in OF_MODELS, (
        f"no test of 200 random cases names {name}: write its definition down once more, and compare"
    )


def words(text):
    return re.findall(r"\w+", text.lower())


def pieces(text):
    return re.findall(r"\w+|[^\w\s]", text)


def runs(parts, n):
    return [tuple(parts[at : at + n]) for at in range(len(parts) - n + 1)]


def shared_runs(asked, earlier, said, wanted):
    own, theirs = set(runs(pieces(said), 3)), set(runs(pieces(wanted), 3))
    return len(own & theirs) / len(theirs)


def refers(asked, earlier, said, wanted):
    known = [w for turn in earlier for w in words(turn) if len(w) > 3 and w not in words(asked)]
    return float(any(w in known for w in words(said)))


def asks(asked, earlier, said, wanted):
    def ends(text):
        return any(text[n] == "?" and (n + 1 == len(text) or text[n + 1].isspace()) for n in range(len(text)))

    return float(ends(said) == ends(wanted))


def longest_common(a, b):
    line = [0] * (len(b) + 1)
    for x in a:
        above, line = line, [0]
        for n, y in enumerate(b):
            line.append(above[n] + 1 if x == y else max(above[n + 1], line[-1]))
    return line[-1]


def again(asked, earlier, said, wanted):
    def same(text):
        # Words without endings, so that stemming changes nothing.
        a, b = words(text), words(earlier[-1])
        common = longest_common(a, b)
        return bool(common) and 2 * common / (len(a) + len(b)) > 0.8

    return float(same(said) and not same(wanted))


def leaks(asked, earlier, said, wanted):
    def has(text):
        return any(line.strip().lower().startswith(("user:", "assistant:")) for line in text.splitlines())

    return float(has(said) and not has(wanted))


def switched(asked, earlier, said, wanted):
    def script(text):
        latin, greek = (sum(low <= c <= high for c in text) for low, high in (("a", "z"), ("α", "ω")))
        return None if not latin + greek else "latin" if latin > greek else "greek"

    both = script(said), script(wanted)
    return float(None not in both and both[0] != both[1])


TALK = [
    "blue",
    "dog",
    "ran",
    "moon",
    "far",
    "tree?",
    "why?",
    "αβγ",
    "ωδεζη",
    "\nuser: no",
    "\nassistant: go",
    "1,",
]
TURNS = {
    "pattern_consistency": shared_runs,
    "refers_back": refers,
    "asks_back": asks,
    "repeats_answer": again,
    "role_leak": leaks,
    "script_switch": switched,
}


@pytest.mark.parametrize("name", TURNS)
def test_metrics_of_turns_equal_their_definitions(name):
    draw, seen = random.Random(name), set()
    for _ in range(CASES):
        # An odd number of letters of scripts, so that none is as frequent as the other.
        texts = [" ".join(draw.choices(TALK, k=draw.randint(4, 9))) for _ in range(4)]
        if draw.random() < 0.3:
            texts[2] = texts[1] + draw.choice(["", " moon"])
        asked, earlier, said, wanted = texts[0], texts[1], texts[2], texts[3]
        if name == "script_switch" and any(
            sum("a" <= c <= "z" for c in text) == sum("α" <= c <= "ω" for c in text)
            for text in (said, wanted)
        ):
            continue
        if name == "repeats_answer":
            asked, earlier, said, wanted = (re.sub(r"[^a-z ]", " ", text) or "moon" for text in texts)
            said = said if words(said) else "dog"
        turns = (Message("user", "x"), Message("assistant", earlier), Message("user", asked))
        prompt = Prompt(turns, wanted, Row("a", 1))
        found = METRICS[name].score(prompt, said, wanted)
        context = ["x", earlier]
        assert found == pytest.approx(TURNS[name](asked, context, said, wanted), abs=1e-9), texts
        seen.add(found)
    assert len(seen) > 1, "the cases tell values apart"


REFUSALS = ("I'm sorry, no.", "I cannot do that.", "As an AI I pass.", "Unfortunately, I stop here.")
ENDINGS = ("Done.", "It goes on and", "```python\nx = 1", "```\nx\n```", " ", "")


def rates(text, finish, reference):
    said = float(bool(text.strip()))
    stopped = float(finish == "stop")
    closed = text.count("```") in (0, 2, 4)
    uncut = float(closed and (text.rstrip()[-1:] in set(".`") or reference.rstrip()[-1:] not in set(".`")))
    kept = float(text not in REFUSALS or reference in REFUSALS)
    return {
        "answered": said, "ended": stopped, "uncut": uncut, "not_refused": kept,
        "completed": said * stopped * uncut * kept,
    }  # fmt: skip


RATES = ["answered", "ended", "uncut", "not_refused", "completed"]


@pytest.mark.parametrize("name", RATES)
def test_rates_of_completion_equal_their_definitions(name):
    draw = random.Random(0)
    for _ in range(CASES):
        text, reference = (draw.choice([*REFUSALS, *ENDINGS[: 6 if n else 3]]) for n in (1, 0))
        finish = draw.choice(["stop", "length"])
        [found] = METRICS[name].among([row(0, output=text, finish_reason=finish, reference=reference)])
        assert found == rates(text, finish, reference)[name], (text, reference)


LABELS = {
    "brier": lambda p, right: sum((p[k] - (k == right)) ** 2 for k in p),
    "label_ranking": lambda p, right: float(all(p[right] >= p[k] for k in p)),
}


@pytest.mark.parametrize("name", LABELS)
def test_metrics_of_label_probabilities_equal_their_definitions(name):
    draw = random.Random(1)
    for _ in range(CASES):
        weights = [draw.random() for _ in range(3)]
        chances = dict(zip(("yes", "no", "maybe"), (w / sum(weights) for w in weights), strict=True))
        right = draw.choice(list(chances))
        [found] = METRICS[name].among([row(0, reference=right, label_probs=chances)])
        assert found == pytest.approx(LABELS[name](chances, right), abs=1e-9)


def test_metrics_of_rewards_equal_their_definitions():
    from tunesmith.evaluation import Item, _ranked_by

    draw = random.Random(2)
    names = ["ranking_accuracy", "ranking_log_loss"]
    for _ in range(CASES):
        better, worse = draw.choice([0.0, draw.gauss(0, 3)]), draw.choice([0.0, draw.gauss(0, 3)])
        side = Item(0, Row("a", 1), None, None, (), (1,), (1,))
        item = Item(0, Row("a", 1), None, None, (), (1,), (1,), rejected=side)
        found = _ranked_by(row(0), item, names, better, worse).scores
        right = 0.5 if better == worse else float(better > worse)
        loss = -math.log(1 / (1 + math.exp(worse - better)))
        assert [found[name] for name in names] == pytest.approx([right, loss], abs=1e-9)


SCHEMA = "CREATE TABLE t (a INTEGER, b INTEGER); CREATE TABLE empty (a INTEGER, b INTEGER);"
QUERIES = [
    "SELECT a, b FROM t", "SELECT b, a FROM t", "SELECT DISTINCT a, b FROM t", "SELECT a, b FROM t ORDER BY a, b",
    "SELECT a, b FROM t ORDER BY b DESC, a", "SELECT a FROM t", "SELECT a FROM t WHERE b > 1", "SELECT a FROM",
    "SELECT no FROM t", "SELECT a, b FROM t UNION ALL SELECT a, b FROM t", "SELECT b, a FROM t ORDER BY a, b",
]  # fmt: skip
RAN = ["sql_execution", "ex_bag", "ex_set", "sql_executes", "sql_vacuous"]


def by_hand(setup, said, wanted):
    """The rows that SQLite gives, compared in every order of columns."""
    connection = sqlite3.connect(":memory:")
    connection.executescript(SCHEMA + setup)
    gold = connection.execute(wanted).fetchall()
    try:
        rows = connection.execute(said).fetchall()
    except sqlite3.Error:
        return dict.fromkeys(RAN, 0.0)

    def same(one):
        return one == gold if "ORDER BY" in wanted else sorted(one) == sorted(gold)

    width = len(rows[0]) if rows else 0
    any_order = any(
        same([tuple(r[n] for n in order) for r in rows]) for order in itertools.permutations(range(width))
    )
    return {
        "sql_execution": float(same(rows)),
        "ex_bag": float(same(rows) or any_order),
        "ex_set": float(set(rows) == set(gold)),
        "sql_executes": 1.0,
        "sql_vacuous": 0.0,
    }


@pytest.mark.parametrize("name", RAN)
def test_metrics_of_queries_equal_sqlite_by_hand(name):
    draw, seen = random.Random(3), set()
    usable = [query for query in QUERIES if not query.endswith("FROM") and "no" not in query]
    for _ in range(CASES):
        values = ", ".join(f"({draw.randint(0, 2)}, {draw.randint(0, 2)})" for _ in range(draw.randint(2, 4)))
        setup = f"INSERT INTO t VALUES {values}, (1, 2);"
        said, wanted = draw.choice(QUERIES), draw.choice(usable)
        expected = by_hand(setup, said, wanted)
        if draw.random() < 0.1:  # what finds nothing anywhere is right and says nothing
            said, wanted = "SELECT a FROM t WHERE 0", "SELECT a FROM t WHERE 1 = 2"
            expected = dict.fromkeys(RAN, 1.0)
        prompt = Prompt(
            (Message("user", "?"),), wanted, Row("a", 1), checks={"schema": SCHEMA, "setup": setup}
        )
        found = METRICS[name].score(prompt, said, wanted)
        assert found == expected[name], (setup, said, wanted)
        seen.add(found)
    assert seen == {0.0, 1.0}


def test_the_same_query_and_the_same_program_in_other_words():
    """Each case is written in two ways that mean the same, and once with one value changed."""
    draw = random.Random(4)
    for _ in range(CASES):
        low, high = draw.sample(range(100), 2)
        parts = [f"a > {low}", f"b < {high}", "c = 'X y'"]
        one = f"SELECT a FROM t WHERE {' AND '.join(parts)}"
        draw.shuffle(parts)
        other = f"select A from T as q where {' and '.join(part.replace('a >', 'q.A >') for part in parts)}"
        wrong = other.replace(f"< {high}", f"< {high + 1}")
        prompt = Prompt((Message("user", "?"),), one, Row("a", 1))
        assert [METRICS["sql_exact_match"].score(prompt, text, one) for text in (one, other, wrong)] == [
            1,
            1,
            0,
        ]
        name, indent = draw.choice("fgh"), " " * draw.randint(1, 8)
        code = f"def {name}(x):\n    return x * {low} + {high}"
        written = f'def {name}( x ):\n{indent}"""About it."""\n\n{indent}return (x*{low})+{high}  # so'
        other_code = written.replace(f"+{high}", f"+{high + 1}")
        score = METRICS["code_exact_match"].score
        assert [score(prompt, text, code) for text in (code, written, other_code)] == [1, 1, 0]


def test_syntax_validity_is_what_the_parsers_say():
    draw, seen = random.Random(5), set()
    signs = ["{", "}", '"a"', ":", "1", ",", "[", "]", " ", "true"]
    python = ["x", "=", "1", "(", ")", "\n", "if", ":", "pass", " "]
    for _ in range(CASES):
        wanted, alphabet = draw.choice([('{"a": 1}', signs), ("x = f(1)", python)])
        text = "".join(draw.choices(alphabet, k=draw.randint(1, 5))).strip()
        expected = 1.0
        try:
            json.loads(text) if alphabet is signs else compile(text, "x", "exec")
        except (ValueError, SyntaxError):
            expected = 0.0
        expected *= bool(text.strip())
        prompt = Prompt((Message("user", "?"),), wanted, Row("a", 1))
        assert METRICS["syntax_validity"].score(prompt, text, wanted) == expected, repr(text)
        seen.add((wanted, expected))
    assert len(seen) == 4


CHANCES = {"pass_at_5": 5, "pass_at_10": 10}


@pytest.mark.parametrize("name", CHANCES)
def test_pass_at_k_of_rows_equals_the_share_of_choices(name):
    draw, k = random.Random(6), CHANCES[name]
    for _ in range(CASES):
        n = draw.randint(k - 1, k + 4)
        passed = [float(draw.random() < 0.3) for _ in range(n)]
        rows = [row(0, one, sample=at, metric="pass_at_1") for at, one in enumerate(passed)]
        found = METRICS[name].among(rows)
        if n < k:
            assert found == [None] * n
            continue
        choices = list(itertools.combinations(passed, k))
        share = sum(any(choice) for choice in choices) / len(choices)
        assert found == pytest.approx([share] * n, abs=1e-9)


LIMITS = {"max_words": lambda t, n: len(t.split()) <= n, "no_commas": lambda t, n: "," not in t,
          "starts_with": lambda t, n: t.strip().lower().startswith(n)}  # fmt: skip
KEPT = ["constraints", "constraints_loose", "all_constraints", "all_constraints_loose"]


@pytest.mark.parametrize("name", KEPT)
def test_constraints_equal_their_definitions(name):
    """Loosely: each may hold in one of eight readings of its own, written down here once more."""
    draw, seen = random.Random(7), set()
    for _ in range(CASES):
        lines = [
            " ".join(draw.choices(["*go*", "red", "one,", "Sure"], k=draw.randint(1, 3))) for _ in range(3)
        ]
        text = "\n".join(lines)
        limits = {
            "max_words": draw.randint(1, 7),
            "no_commas": True,
            "starts_with": draw.choice(["go", "red"]),
        }
        readings = [text]
        if name.endswith("loose"):
            cut = [lines, lines[1:], lines[:-1], lines[1:-1]]
            readings = ["\n".join(part).replace(*sign) for part in cut for sign in (("", ""), ("*", ""))]
        holds = [any(LIMITS[one](form, limit) for form in readings) for one, limit in limits.items()]
        prompt = Prompt((Message("user", "?"),), "x", Row("a", 1), checks={"constraints": limits})
        expected = float(all(holds)) if name.startswith("all") else sum(holds) / 3
        found = METRICS[name].score(prompt, text, "")
        assert found == pytest.approx(expected, abs=1e-9), (text, limits)
        seen.add(round(found, 3))
    assert len(seen) > 1


DEMANDED = {
    "Answer in at most 4 words.": lambda t: 0 < len(t.split()) <= 4,
    "Use no commas.": lambda t: "," not in t,
    "Write in lower case.": lambda t: t.islower(),
    'Start with "red".': lambda t: t.lower().startswith("red"),
}


def test_adherence_is_the_share_of_demands_that_hold():
    draw, seen = random.Random(8), set()
    for _ in range(CASES):
        asked = draw.sample(list(DEMANDED), draw.randint(1, 4))
        text = " ".join(draw.choices(["red", "Blue,", "go", "one"], k=draw.randint(1, 6)))
        prompt = Prompt((Message("user", " ".join(asked)),), "x", Row("a", 1))
        found = METRICS["adherence"].score(prompt, text, "")
        assert found == pytest.approx(sum(DEMANDED[one](text) for one in asked) / len(asked), abs=1e-9), (
            asked,
            text,
        )
        seen.add(round(found, 3))
    assert len(seen) > 4


def test_label_accuracy_is_the_share_of_right_labels():
    draw = random.Random(9)
    for _ in range(CASES):
        right = [draw.choice(["yes", "no"]) for _ in range(8)] + ["yes", "no"]
        said = [draw.choice(["Yes.", "no", "No, never", "it is yes", "maybe", ""]) for _ in right]
        rows = [
            row(n, output=one, reference=other)
            for n, (one, other) in enumerate(zip(said, right, strict=True))
        ]
        found = METRICS["label_accuracy"].among(rows)
        means = {"Yes.": "yes", "no": "no", "No, never": "no", "it is yes": "yes"}
        assert found == [float(means.get(one) == other) for one, other in zip(said, right, strict=True)]
