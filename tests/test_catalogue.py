"""The catalogue of fault tests in docs/reliability.md: no number left out, and every test that it names is there."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LENGTHS = {"RES": 15, "CKPT": 11, "CONC": 3, "NUM": 2, "MEM": 4, "DATA": 18, "SEC": 11, "WEB": 10, "JDG": 4, "SRV": 9,
           "META": 4}  # fmt: skip
"""How many numbers each part of the catalogue has."""


def rows() -> dict[str, str]:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    table = page.partition("### By number")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| ([A-Z]+-[\d.b]+) \|.*?\| (.+) \|$", table, re.MULTILINE))


@functools.cache
def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_no_number_is_left_out():
    named = set()
    for number in rows():
        part, _, numbers = number.partition("-")
        first, _, last = numbers.removesuffix("b").partition("..")
        named |= {(part, n) for n in range(int(first), int(last or first) + 1)}
    assert named == {(part, n) for part, count in LENGTHS.items() for n in range(1, count + 1)}


@pytest.mark.parametrize("number", rows())
def test_each_number_has_tests_or_a_reason(number):
    said = rows()[number]
    if said.startswith("not covered"):
        assert re.match(r"not covered( here)?: .{20,}", said)
        return
    named = re.findall(r"`([^`]+)`", said)
    assert named
    for name in named:
        file, _, test = name.partition("::")
        path = ROOT / file if file.startswith("benchmarks/") else ROOT / "tests" / file
        assert path.is_file(), name
        assert not test or test in functions_of(path), name
