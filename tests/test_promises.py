"""Promises that new code joins without being edited: tables equal types, pages equal code, README runs."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.assets import EXAMPLES, TINY_MODEL
from tunesmith.compose import union_members
from tunesmith.evaluation.metrics import METRICS
from tunesmith.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "COLUMNS": "100",
}


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def commands(page: str) -> list[list[str]]:
    lines = [line for block in blocks("sh", page) for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("tunesmith")]


PAGES = {
    path.name: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if commands(path.read_text(encoding="utf-8"))
}
"""Pages with commands of ours in them."""


def test_methods_equal_the_recipe_s_union():
    assert METHODS.keys() == union_members("method").keys()
    assert all(kind == method.kind for kind, method in METHODS.items())


def test_every_metric_says_what_it_is():
    assert all(name == metric.name and len(metric.about) > 20 for name, metric in METRICS.items())
    assert not any("  " in metric.about or "\n" in metric.about for metric in METRICS.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_there_and_small(name):
    assert EXAMPLES[name].path.stat().st_size < 3_000_000
    assert EXAMPLES[name].about


def test_the_tiny_model_is_small_and_safe():
    names = {path.name for path in TINY_MODEL.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert sum(path.stat().st_size for path in TINY_MODEL.iterdir()) < 16_000_000


def test_generated_pages_are_what_the_code_says():
    result = subprocess.run(
        [sys.executable, ROOT / "scripts/make_docs", "--check"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"], ids=lambda p: p.name
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_tree_in_the_readme_names_every_module_and_folder():
    tree = next(block for block in blocks("text") if "src/tunesmith/" in block)
    package = ROOT / "src/tunesmith"
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    folders = {
        f"{path.name}/"
        for path in package.iterdir()
        if (path / "__init__.py").exists() or path.name == "presets"
    }
    assert [
        name for name in sorted(modules | folders) if not re.search(rf"(?<!\w){re.escape(name)}", tree)
    ] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_runs(page, tmp_path):
    """Every tunesmith command of a page, in order, in an empty folder with the page's recipes, and its Python."""
    content = PAGES[page]
    for block in blocks("yaml", content):
        if named := re.match(r"# (\S+\.yaml)\n", block):
            (tmp_path / named[1]).write_text(block)
    ran = 0
    for command in commands(content):
        if "PATH_OR_HUB_ID" in command:
            continue
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
        assert result.returncode == 0, f"{command}\n{result.stderr}"
        ran += 1
    assert ran
    for code in blocks("python", content):
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.split()


def promises() -> list[tuple[str, str, str, str]]:
    page = (ROOT / "docs/from-the-seeds.md").read_text(encoding="utf-8")
    rows = [
        re.split(r"\s*\|\s*", line.strip("| ")) for line in page.splitlines() if re.match(r"\| \d{3} ", line)
    ]
    assert all(len(row) == 4 for row in rows)
    return [tuple(row) for row in rows]


def test_every_promise_of_the_seeds_has_its_test():
    """The table names tests that are there; what has none says that it is not built."""
    rows = promises()
    assert {seed for seed, *_ in rows} == {"000", "001", "002", "003", "004"}
    assert len(rows) > 90
    missing = []
    for seed, promise, place, test in rows:
        if test == "-":
            assert place.startswith("not "), f"{seed} {promise}: no test, and nothing said about it"
            continue
        file, *names = test.strip("`").split("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8")) if (ROOT / file).is_file() else None
        for name in names:
            tree = tree and next((node for node in tree.body if getattr(node, "name", None) == name), None)
        if tree is None:
            missing.append(test)
    assert missing == []


def test_the_readme_has_commands():
    assert len(commands(README)) >= 7
    assert len(blocks("python")) == 1


@pytest.mark.slow
def test_the_demo_proves_its_model_better(tmp_path):
    """The promise of the demo: under 15 % before, at least 75 % after, on at least 200 held-out questions."""
    import json

    result = subprocess.run(
        ["tunesmith", "demo", "--output-dir", tmp_path, "--json"],
        capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    [line] = result.stdout.strip().splitlines()
    shown = json.loads(line)
    assert shown["metric"] == "sql_execution"
    assert shown["base"] < 0.15
    assert shown["tuned"] >= 0.75
    assert shown["n"] >= 200
    assert shown["verdict"] == "better"
    assert shown["low"] > 0.5
    assert Path(shown["run"], "report.html").exists()
