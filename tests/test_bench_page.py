"""The table that `make bench` writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

FILE = Path(__file__).parents[1] / "benchmarks/run_all.py"


def module():
    spec = importlib.util.spec_from_file_location("run_all", FILE)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def result(ratio):
    return {"name": "startup", "at": "2026-01-02, x86_64", "took": 61.4, "result": {
        "benchmark": "startup", "seconds": {"ours": 9.5, "trl": 12.25}, "ratio": ratio,
    }}  # fmt: skip


def test_the_table_is_rewritten_and_the_rest_of_the_page_stays():
    bench = module()
    page = "# Benchmarks\n\nBy hand.\n"
    once = bench.rewritten(page, {"startup": result(1.29)})
    assert once.startswith(page.rstrip())
    line = "| `benchmarks/startup.py` | 2026-01-02, x86_64 | 61 s | seconds: ours 9.5; seconds: trl 12.25; ratio 1.29 |"
    assert line in once.splitlines()
    after = bench.rewritten(once + "\nMore by hand.\n", {"startup": result(1.4)})
    assert after == once.replace("ratio 1.29", "ratio 1.4") + "\nMore by hand.\n"


def test_every_benchmark_of_the_folder_is_run_or_named_as_none():
    bench = module()
    names = {file.stem for file in FILE.parent.glob("*.py")}
    assert names >= bench.NO_BENCHMARKS
    assert {"startup", "memory", "plan_accuracy"} <= names - bench.NO_BENCHMARKS
