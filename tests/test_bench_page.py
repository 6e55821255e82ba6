"""The table that `make bench` writes, and the lines that it is made of."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
FREE = {"plan_accuracy", "checkpoint", "scaling"}
"""Benchmarks whose line has more than the form."""


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("run_all", FOLDER / "run_all.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def result(ratio, *, missed=False, arguments=(), extras=()):
    line = {"name": "startup", "ours": 9.5, "peer": 12.25, "ratio": ratio, "unit": "s", "n": 5}
    return {
        "name": "startup", "arguments": list(arguments), "at": "2026-01-02, x86_64", "source": "1 a", "code": "0a1b2c",
        "took": 61.4, "missed": missed, "result": line, "extras": list(extras),
    }  # fmt: skip


def test_the_table_is_rewritten_and_the_rest_of_the_page_stays(bench):
    page = "# Benchmarks\n\nBy hand.\n"
    once = bench.rewritten(page, {"startup": result(1.29)})
    assert once.startswith(page.rstrip())
    line = "| `benchmarks/startup.py` | 9.5 | 12.25 | 1.29 | s | 5 | held | 2026-01-02, x86_64 | 0a1b2c | 61 s |  |"
    assert line in once.splitlines()
    after = bench.rewritten(once + "\nMore by hand.\n", {"startup": result(1.4, missed=True)})
    changed = once.replace("| 1.29 |", "| 1.4 |").replace("| held |", "| missed |")
    assert after == changed + "\nMore by hand.\n"


def test_each_variant_has_a_row_with_what_else_it_measured(bench):
    extras = [
        "times trl: 9.20, at least 8 wanted", "memory to the least of the peers: 0.61, at most 0.5 wanted: MISSED",
        "range of ours: 1,990 to 2,100, no bar", "error, %: -2.1 to 7.0, no bar", "no figure at all",
    ]  # fmt: skip
    found = {"startup": result(1.0), "startup --lora": result(2.0, arguments=["--lora"], extras=extras)}
    rows = bench.table(found).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| `benchmarks/startup.py`",
        "| `benchmarks/startup.py --lora`",
    ]
    said = "times trl 9.20 (at least 8); memory to the least of the peers 0.61 (at most 0.5, missed); range of ours "
    assert rows[1].endswith(f" | {said}1,990 to 2,100; error, % -2.1 to 7.0 |")


def test_variants_are_read_from_the_file_and_chosen_by_name(bench, tmp_path):
    file = tmp_path / "x.py"
    file.write_text("A = 1\nVARIANTS = [[], ['--lora']]\n", encoding="utf-8")
    assert bench.variants(file) == [[], ["--lora"]]
    file.write_text("VARIANT = 1\n", encoding="utf-8")
    assert bench.variants(file) == [[]]
    known = {"x": (file, []), "x --lora": (file, ["--lora"]), "y": (tmp_path / "y.py", [])}
    assert bench.chosen(None, known) == list(known)
    assert bench.chosen("x", known) == ["x", "x --lora"]
    assert bench.chosen("y,x --lora", known) == ["y", "x --lora"]
    with pytest.raises(SystemExit, match="no benchmark x --more; known: x, x --lora, y"):
        bench.chosen("x --more", known)


def test_every_variant_of_the_folder_takes_options_that_its_file_or_what_is_shared_has(bench):
    shared = "".join((FOLDER / f"{name}.py").read_text(encoding="utf-8") for name in bench.SHARED)
    for file in FOLDER.glob("*.py"):
        source = shared + file.read_text(encoding="utf-8")
        made = bench.variants(file)
        assert len({tuple(arguments) for arguments in made}) == len(made)
        for option in {word for arguments in made for word in arguments if word.startswith("--")}:
            assert f'"{option}"' in source, (file.name, option)


def test_what_was_measured_today_with_this_source_is_not_run_again(bench, tmp_path, monkeypatch, capfd):
    line = json.dumps({"name": "x", "ours": 1.0, "peer": None, "ratio": None, "unit": "s", "n": 3})
    for name in bench.SHARED:
        (tmp_path / f"{name}.py").write_text("", encoding="utf-8")
    file = tmp_path / "x.py"
    code = (
        f"import sys\nVARIANTS = [[], ['--b']]\nprint('y: 1.5, no bar', file=sys.stderr)\nprint({line!r})\n"
    )
    file.write_text(code, encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text("# Page\n", encoding="utf-8")
    for name, value in (("HERE", tmp_path), ("PAGE", page), ("KEPT", tmp_path / "kept.jsonl")):
        monkeypatch.setattr(bench, name, value)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_all.py", "--only", "x", *arguments])
        bench.main()
        return capfd.readouterr().err.splitlines()

    assert run("--resume") == ["x", "y: 1.5, no bar", "x --b", "y: 1.5, no bar"]
    assert page.read_text(encoding="utf-8").count(" | y 1.5 |") == 2
    assert run("--resume") == ["x: measured today", "x --b: measured today"]
    assert run("--only", "x --b") == ["x --b", "y: 1.5, no bar"]
    file.write_text(code + "# another source\n", encoding="utf-8")
    assert len(run("--resume")) == 4
    monkeypatch.setattr(bench, "today", lambda: "2000-01-01")
    assert len(run("--resume")) == 4
    page.write_text("# Page\n", encoding="utf-8")
    assert run("--kept") == []
    assert page.read_text(encoding="utf-8").count("2000-01-01") == 2


def test_every_benchmark_of_the_folder_is_run_or_named_as_none(bench):
    names = {file.stem for file in FOLDER.glob("*.py")}
    assert names >= bench.NO_BENCHMARKS
    wanted = "sft_short_chat sft_long sft_full_vocab dpo_shared_prompts seq2seq freeze generation startup plan_accuracy"
    assert {*wanted.split(), "memory"} <= names - bench.NO_BENCHMARKS


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
