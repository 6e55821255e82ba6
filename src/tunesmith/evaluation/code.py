"""Whether a model's code parses, is the reference, and passes the tests of its row.

Parsing runs nothing. Tests run in the sandbox, and only inside `running_allowed`, which evaluation enters where the
recipe sets `evaluation.run_code`.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tunesmith.data.examples import Prompt
from tunesmith.errors import RecipeError
from tunesmith.evaluation.sandbox import Outcome, run

if TYPE_CHECKING:
    from tunesmith.evaluation.rows import EvalRow

TEST_COLUMNS = ("tests", "test", "test_list")
GRAMMARS = {
    "javascript": "tree_sitter_javascript",
    "java": "tree_sitter_java",
    "go": "tree_sitter_go",
    "rust": "tree_sitter_rust",
    "cpp": "tree_sitter_cpp",
}
"""Languages that are parsed by tree-sitter, and the package that each needs: `pip install tunesmith[code]`."""
NAMES = {"js": "javascript", "node": "javascript", "golang": "go", "rs": "rust", "c++": "cpp", "py": "python"}

_allowed: ContextVar[bool] = ContextVar("running a model's code is allowed", default=False)


@contextlib.contextmanager
def running_allowed(allowed: bool = True) -> Iterator[None]:
    """Within, metrics may run a model's code in the sandbox."""
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def is_valid_python(code: str) -> bool:
    """Whether Python compiles it, which is stricter than parsing: `return` outside a function is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(code, "<answer>", "exec", dont_inherit=True)
    except (ValueError, SyntaxError, RecursionError, MemoryError, OverflowError):
        return False
    return True


def named_language(prompt: Prompt) -> str | None:
    """The language that the row names, in a column `language` or on the code fence of its reference."""
    fence = re.search(r"```([\w+-]+)[ \t]*\n", prompt.reference)
    name = str(prompt.checks.get("language") or (fence.group(1) if fence else "")).strip().lower()
    return NAMES.get(name, name) or None


def has_grammar(language: str | None) -> bool:
    """Whether a language can be parsed by tree-sitter here."""
    return language in GRAMMARS and _parser(language) is not None


def parses(code: str, language: str) -> bool:
    """Whether tree-sitter parses code without an error node; laxer than a compiler."""
    parser = _parser(language)
    if parser is None:
        raise ValueError(f"{GRAMMARS.get(language, language)} is not installed")
    return bool(code.strip()) and not parser.parse(code.encode("utf-8", "replace")).root_node.has_error


@lru_cache
def _parser(language: str) -> Any:
    try:
        tree_sitter: Any = importlib.import_module("tree_sitter")
        grammar: Any = importlib.import_module(GRAMMARS[language])
    except ImportError:
        return None
    return tree_sitter.Parser(tree_sitter.Language(grammar.language()))


def code_exact_match(prompt: Prompt, completion: str, reference: str) -> float:
    """1 where answer and reference are the same program, comments and layout apart.

    Python is compared by its syntax trees, docstrings left out; what does not parse by its lines without blank ones,
    common indentation and white space at their ends. An answer in a Markdown code fence counts as the code in it.
    """
    from tunesmith.evaluation.tasks import code_of

    return float(_normal(code_of(completion)) == _normal(code_of(reference)))


def _normal(code: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(textwrap.dedent(code))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        lines = (line.rstrip() for line in textwrap.dedent(code).splitlines())
        return "text\n" + "\n".join(line for line in lines if line)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module) and body:
            first = body[0]
            is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            if is_text and isinstance(first.value.value, str) and len(body) > 1:
                del body[0]
    try:
        return "python\n" + ast.dump(tree)
    except RecursionError:  # an answer that never ends its expression
        return "text\n" + code


def tests_of(prompt: Prompt) -> str | None:
    """The tests of a row as one text of Python.

    `tests` or `test` holds asserts, or HumanEval's `check(candidate)` with `entry_point` beside it; `test_list` a
    list of asserts (MBPP), with `test_setup_code` before them.
    """
    given = next((prompt.checks[name] for name in TEST_COLUMNS if prompt.checks.get(name)), None)
    if given is None:
        return None
    text = "\n".join(map(str, given)) if isinstance(given, list | tuple) else str(given)
    if setup := prompt.checks.get("test_setup_code"):
        text = f"{setup}\n{text}"
    entry = prompt.checks.get("entry_point")
    return f"{text}\ncheck({entry})" if entry and re.search(r"(?m)^def check\(", text) else text


def has_tests(prompt: Prompt) -> bool:
    """Whether the row has tests that an answer can be run against."""
    return tests_of(prompt) is not None


def program(prompt: Prompt, completion: str) -> str:
    """The program of an answer: its code, behind the question's own where it only goes on from there."""
    from tunesmith.evaluation.tasks import code_of

    code = code_of(completion) if "```" in completion else completion.strip("\n")
    entry = prompt.checks.get("entry_point")
    if not entry or not code.strip() or re.search(rf"\b(?:def|class)\s+{re.escape(str(entry))}\b", code):
        return code
    asked = [m.content for m in prompt.messages if m.role == "user"][-1:]
    begun = code_of(asked[0]) if asked and "```" in asked[0] else "".join(asked)
    return f"{begun.rstrip()}\n{code}" if re.search(rf"\bdef\s+{re.escape(str(entry))}\b", begun) else code


@lru_cache(maxsize=4096)
def _outcome(code: str, tests: str) -> Outcome:
    return run(code, tests)


def outcome(prompt: Prompt, completion: str) -> Outcome:
    """What becomes of an answer's program and its tests. Raises RecipeError where running code is not allowed."""
    if not _allowed.get():
        raise RecipeError(
            "A model's code is not run unless you say so.",
            fix="Read docs/running-code.md, then add --run-code (evaluation.run_code: true).",
        )
    tests = tests_of(prompt)
    if tests is None:
        raise ValueError("the row has no tests")
    found = _outcome(program(prompt, completion), tests)
    if found.status == "harness_error":
        raise ValueError(found.detail)
    return found


def pass_at_1(prompt: Prompt, completion: str, reference: str) -> float:
    """1 where the answer's Python program passes all tests of its row; the mean over attempts is pass@1.

    (HumanEval, arXiv 2107.03374.) The program runs in a sandbox, only with `evaluation.run_code`. Tests stand in
    the row's column `tests` (`test` with `entry_point`, or `test_list`).
    """
    return float(outcome(prompt, completion).status == "passed")


def flags(prompt: Prompt, completion: str, reference: str) -> tuple[str, ...]:
    """How a program failed."""
    found = outcome(prompt, completion)
    return () if found.status == "passed" else (f"{found.status}: {found.detail}".rstrip(": "),)


def pass_at_k(attempts: int, passed: int, k: int) -> float:
    """The probability that of k out of `attempts` answers, drawn without putting back, one is among the `passed`.

    1 - C(n - c, k) / C(n, k), as a product (arXiv 2107.03374, section 2.1). Raises ValueError for k > n.
    """
    if not 0 < k <= attempts or not 0 <= passed <= attempts:
        raise ValueError(f"pass@{k} of {passed} in {attempts}")
    missed = 1.0
    for number in range(attempts - passed + 1, attempts + 1):
        missed *= max(0.0, 1 - k / number)
    return 1 - missed


def pass_at(k: int) -> Callable[[Sequence[EvalRow]], list[float | None]]:
    """pass@k of rows that have `pass_at_1`: of each row its question's; None where there are fewer attempts than k."""

    def among(rows: Sequence[EvalRow]) -> list[float | None]:
        passed: dict[int, list[float]] = defaultdict(list)
        for row in rows:
            if "pass_at_1" in row.scores:
                passed[row.item].append(row.scores["pass_at_1"])
        return [
            pass_at_k(len(found), int(sum(found)), k) if len(found := passed[row.item]) >= k else None
            for row in rows
        ]

    return among
