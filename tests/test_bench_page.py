"""The table that `make bench` writes, and the lines that it is made of."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
FREE = {"plan_accuracy"}
"""Benchmarks whose line has more than the form."""


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("run_all", FOLDER / "run_all.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def result(ratio, *, missed=False):
    line = {"name": "startup", "ours": 9.5, "peer": 12.25, "ratio": ratio, "unit": "s", "n": 5}
    return {"name": "startup", "at": "2026-01-02, x86_64", "took": 61.4, "missed": missed, "result": line}


def test_the_table_is_rewritten_and_the_rest_of_the_page_stays(bench):
    page = "# Benchmarks\n\nBy hand.\n"
    once = bench.rewritten(page, {"startup": result(1.29)})
    assert once.startswith(page.rstrip())
    line = "| `benchmarks/startup.py` | 9.5 | 12.25 | 1.29 | s | 5 | held | 2026-01-02, x86_64 | 61 s |"
    assert line in once.splitlines()
    after = bench.rewritten(once + "\nMore by hand.\n", {"startup": result(1.4, missed=True)})
    changed = once.replace("| 1.29 |", "| 1.4 |").replace("| held |", "| missed |")
    assert after == changed + "\nMore by hand.\n"


def test_every_benchmark_of_the_folder_is_run_or_named_as_none(bench):
    names = {file.stem for file in FOLDER.glob("*.py")}
    assert names >= bench.NO_BENCHMARKS
    assert {"startup", "memory", "plan_accuracy"} <= names - bench.NO_BENCHMARKS


def keys_of_results(source):
    """The keys of every dictionary that is written out with `ours` and `ratio`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            if {"ours", "ratio"} <= set(keys):
                yield keys if len(keys) == len(node.keys) else None


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_every_benchmark_ends_with_a_line_of_the_one_form(bench, file):
    source = file.read_text(encoding="utf-8")
    found = list(keys_of_results(source))
    if file.stem in FREE or (file.stem in bench.NO_BENCHMARKS and not found):
        return
    if not found:  # what several share prints it
        assert "training.result(" in source or "sft_short_chat.main(" in source
        return
    assert [set(keys) for keys in found] == [set(bench.FORM)]


def test_a_line_of_another_form_is_no_result_and_a_missed_bar_is_one(bench, tmp_path, capfd):
    line = {"name": "x", "ours": 1.0, "peer": None, "ratio": None, "unit": "s", "n": 3}
    assert bench.result_of(f"said\n{json.dumps(line | {'more': 1})}\n") == line
    for wrong in ("", "nothing", "3", json.dumps({"name": "x", "ours": 1})):
        assert bench.result_of(wrong) is None
    file = tmp_path / "x.py"
    for code, missed in ((0, False), (1, True)):
        file.write_text(f"import sys\nprint({json.dumps(line)!r})\nsys.exit({code})", encoding="utf-8")
        found = bench.measured(file)
        assert (found["missed"], found["result"]) == (missed, line)
    file.write_text("raise OSError('no peer')", encoding="utf-8")
    assert bench.measured(file) is None
    assert "no result (exit code 1" in capfd.readouterr().err
