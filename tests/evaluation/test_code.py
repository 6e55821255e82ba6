"""Code: parsing, the same program, tests in the sandbox, pass@k; nothing runs unless that is asked for."""

from __future__ import annotations

import itertools
import random

import pytest

from tunesmith import api, engines, evaluation, models
from tunesmith.data.examples import Conversation, Message, Prompt, Row
from tunesmith.errors import RecipeError
from tunesmith.evaluation import code
from tunesmith.evaluation.metrics import METRICS, default_metrics
from tunesmith.generation import Generated

SUM = "def add(a, b):\n    return a + b"


def asked(reference=SUM, question="Write add.", **checks):
    return Prompt((Message("user", question),), reference, Row("a", 1), checks=checks)


@pytest.mark.parametrize(
    ("completion", "same"),
    [
        ("def add(a, b): return a+b  # sum", True),
        ('```python\ndef add(a, b):\n    """Add."""\n\n    return (a + b)\n```', True),
        ("    def add(a, b):\n        return a + b", True),
        ("def add(b, a):\n    return a + b", False),
        ("def add(a, b:\n    return a + b", False),
        ("", False),
    ],
)
def test_the_same_program_in_another_layout(completion, same):
    assert METRICS["code_exact_match"].score(asked(), completion, SUM) == same


@pytest.mark.parametrize(
    ("completion", "valid"),
    [
        ("return 1", 0),
        ("def f(a, a): pass", 0),
        ("await x", 0),
        ("print 'x'", 0),
        ("x = 1", 1),
        (SUM, 1),
        ("", 0),
    ],
)
def test_python_is_valid_where_it_compiles(completion, valid):
    assert METRICS["syntax_validity"].score(asked(), completion, SUM) == valid


VALID = {
    "javascript": ("const f = (a) => a + 1;", "const f = (a => ;"),
    "java": ("class A { int f() { return 1; } }", "class A { int f( { return 1; }"),
    "go": ("package a\nfunc f() int { return 1 }", "package a\nfunc f( int { return 1 "),
    "rust": ("fn f() -> i32 { 1 }", "fn f( -> i32 { 1 "),
    "cpp": ("int f() { return 1; }", "int f( { return 1; "),
}


@pytest.mark.parametrize("language", VALID)
def test_other_languages_are_parsed_where_their_grammar_is_installed(language):
    pytest.importorskip(code.GRAMMARS[language])
    good, bad = VALID[language]
    for prompt in (asked(good, language=language), asked(f"```{language}\n{good}\n```")):
        assert METRICS["syntax_validity"].fits(prompt)
        score = METRICS["syntax_validity"].score
        assert [score(prompt, text, prompt.reference) for text in (good, bad, "")] == [1, 0, 0]


def test_a_language_without_its_grammar_is_not_scored(monkeypatch):
    monkeypatch.setattr(code, "_parser", lambda language: None)
    assert not METRICS["syntax_validity"].fits(asked("const f = 1;", language="js"))


def test_every_grammar_is_tried():
    assert set(VALID) == set(code.GRAMMARS)


@pytest.mark.parametrize(
    "checks",
    [
        {"tests": "assert add(1, 2) == 3"},
        {"test": "def check(candidate):\n    assert candidate(1, 2) == 3", "entry_point": "add"},
        {"test_list": ["assert add(1, 2) == three"], "test_setup_code": "three = 3"},
    ],
)
def test_tests_of_a_row_in_three_layouts(checks):
    prompt = asked(**checks)
    assert METRICS["pass_at_1"].fits(prompt)
    with code.running_allowed():
        assert METRICS["pass_at_1"].score(prompt, f"Here:\n```python\n{SUM}\n```", SUM) == 1
        assert METRICS["pass_at_1"].score(prompt, SUM.replace("+", "-"), SUM) == 0
        assert METRICS["pass_at_1"].flags(prompt, "def add(", SUM)[0].startswith("syntax")
        assert METRICS["pass_at_1"].flags(prompt, "", SUM) == ("no_code",)
        assert METRICS["pass_at_1"].flags(prompt, SUM, SUM) == ()


def test_an_answer_may_go_on_where_the_question_ends():
    question = "def add(a, b):\n    '''Add two numbers.'''\n"
    prompt = asked(question=question, test="def check(f):\n    assert f(1, 2) == 3", entry_point="add")
    with code.running_allowed():
        assert code.pass_at_1(prompt, "    return a + b\n", "") == 1
        assert code.pass_at_1(prompt, SUM, "") == 1


def test_broken_tests_are_an_error_and_not_the_answers_fault():
    with code.running_allowed(), pytest.raises(ValueError, match="do not compile"):
        code.pass_at_1(asked(tests="assert ("), SUM, SUM)


def test_pass_at_k_equals_brute_force_on_200_random_cases():
    draw = random.Random(0)
    for _ in range(200):
        n = draw.randint(1, 8)
        passed, k = draw.randint(0, n), draw.randint(1, n)
        results = [True] * passed + [False] * (n - passed)
        choices = list(itertools.combinations(results, k))
        expected = sum(any(choice) for choice in choices) / len(choices)
        assert code.pass_at_k(n, passed, k) == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ValueError, match="pass@3"):
        code.pass_at_k(2, 1, 3)


def test_nothing_runs_unless_it_is_asked_for(tmp_path):
    with pytest.raises(RecipeError, match="not run unless"):
        code.pass_at_1(asked(tests="assert True"), SUM, SUM)
    for settings in ({}, {"evaluation": {"attempts": 20}}):
        with pytest.raises(RecipeError, match="which is off"):
            api.evaluate(
                "tiny", dataset="example:code", metrics=["pass_at_5"], settings=settings, output=tmp_path
            )
    with pytest.raises(RecipeError, match="at least 5 answers"):
        api.evaluate(
            "tiny", dataset="example:code", metrics=["pass_at_5"], settings={"evaluation": {"run_code": True}}
        )
    assert "pass_at_1" not in default_metrics([asked(tests="assert True")], False, "code")
    assert default_metrics([asked(tests="assert True")], False, "code", run_code=True)[0] == "pass_at_1"


def test_attempts_through_evaluate(tiny_model_folder, tiny_tokenizer, monkeypatch):
    """Two questions with six attempts each, of which three and none pass: pass@1 and pass@5 by hand."""
    given = []

    def written(model, tokenizer, prompts, *, temperature, finished, **options):
        given.extend([len(prompts), temperature])
        for n in range(len(prompts)):
            right = n < 6 and n % 2 == 0
            finished(n, Generated((1,), SUM if right else "def add(a, b): return 0", "stop", 2))

    monkeypatch.setattr(engines, "generate", written)
    examples = [
        Conversation(
            (Message("user", f"what is {word}"), Message("assistant", SUM)), Row("a", n),
            extra={"tests": "assert add(1, 2) == 3"},
        )
        for n, word in enumerate(["one", "two"])
    ]  # fmt: skip
    rows = evaluation.evaluate(
        models.load_model(str(tiny_model_folder)), tiny_tokenizer, evaluation.items(examples, tiny_tokenizer),
        name="m", metrics=["pass_at_5", "perplexity"], run_code=True, attempts=6, temperature=0.8,
    )  # fmt: skip
    assert given == [12, 0.8]
    assert [(row.item, row.sample) for row in rows] == [(i, s) for i in range(2) for s in range(6)]
    found = evaluation.scores(rows, ["pass_at_1", "pass_at_5", "perplexity"])
    assert found["pass_at_1"]["value"] == 3 / 12
    assert found["pass_at_5"]["value"] == pytest.approx((1 + 0) / 2)
    assert (found["pass_at_5"]["groups"], found["perplexity"]["n"]) == (2, 2)
    assert rows[1].flags["pass_at_1"][0].startswith("failed: AssertionError")
    assert evaluation.are_answers_to(
        rows,
        evaluation.items(examples, tiny_tokenizer),
        ["pass_at_5"],
        max_new_tokens=256,
        attempts=6,
        temperature=0.8,
    )
    assert not evaluation.are_answers_to(
        rows, evaluation.items(examples, tiny_tokenizer), ["pass_at_5"], max_new_tokens=256
    )


def test_it_cannot_be_a_reward():
    from tunesmith.methods import rewards
    from tunesmith.recipe import MetricReward

    with pytest.raises(RecipeError, match="cannot be a reward: it runs"):
        rewards._metric(MetricReward(name="pass_at_1"), [asked(tests="assert True")])
