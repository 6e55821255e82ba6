"""Constraints of a row that a program can verify, after IFEval (arXiv 2311.07911): strictly and loosely.

A row sets them in a column `constraints`, an object such as `{"max_words": 50, "no_commas": true}`; those of `LIMITS`
may also be columns of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tunesmith.data.examples import Prompt, Row
from tunesmith.errors import nearest

Holds = Callable[[Any, str], bool]

THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


def num_sentences(text: str) -> int:
    """Parts that end with a mark of a sentence, and what is left behind the last one."""
    return len([part for part in re.split(r"[.!?…。！？]+(?:\s|$)", text) if part.strip()])


def num_items(text: str) -> int:
    """Lines that begin as items of a list: `-`, `*`, `•`, or a number with `.` or `)`."""
    return len(re.findall(r"(?m)^\s*(?:[-*•]|\d+[.)])\s", text))


def has_word(word: str, text: str) -> bool:
    """Whether a word or phrase stands in a text as a whole, in any case."""
    return bool(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def several(words: Any) -> list[str]:
    """One text or a list of them as a list."""
    return [str(word) for word in words] if isinstance(words, list | tuple) else [str(words)]


def _num_paragraphs(text: str) -> int:
    return len([part for part in re.split(r"\n\s*\n", text) if part.strip()])


def _num_words(text: str) -> int:
    return len(text.split())


def _num_headings(text: str) -> int:
    return len(re.findall(r"(?m)^#{1,6}\s+\S", text))


def _num_highlights(text: str) -> int:
    return len(re.findall(r"\*\*[^*\n]*\S[^*\n]*\*\*|(?<!\*)\*[^*\n]*[^*\s\n][^*\n]*\*(?!\*)", text))


def _num_placeholders(text: str) -> int:
    return len(re.findall(r"\[[^\[\]\n]+\]", text))


def _num_capital_words(text: str) -> int:
    return sum(word.isupper() for word in re.findall(r"[^\W\d_]+", text))


def _parsed_json(text: str) -> Any:
    from tunesmith.evaluation.tasks import code_of

    return json.loads(code_of(text))


def _is_json(wanted: Any, text: str) -> bool:
    try:
        _parsed_json(text)
    except (ValueError, RecursionError):
        return not wanted
    return bool(wanted)


def _has_keys(keys: Any, text: str) -> bool:
    try:
        found = _parsed_json(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and set(several(keys)) <= found.keys()


def _counts(limits: Mapping[str, Any], text: str, bound: Callable[[int, int], bool]) -> bool:
    return all(
        bound(len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)), int(number))
        for word, number in limits.items()
    )


def _in_case(wanted: Any, text: str) -> bool:
    cases = {"upper": text.isupper, "lower": text.islower, "title": text.istitle}
    if wanted not in cases:
        raise ValueError(f"case {wanted!r} is none of {', '.join(cases)}")
    return cases[wanted]()


def _first_paragraph_word(wanted: Mapping[str, Any], text: str) -> bool:
    parts = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    return all(
        0 < int(number) <= len(parts)
        and re.sub(r"^\W+|\W+$", "", parts[int(number) - 1].split()[0]).lower() == str(word).lower()
        for number, word in wanted.items()
    )


LIMITS: dict[str, Holds] = {
    "max_words": lambda limit, text: _num_words(text) <= int(limit),
    "min_words": lambda limit, text: _num_words(text) >= int(limit),
    "contains": lambda wanted, text: all(has_word(word, text) for word in several(wanted)),
    "forbids": lambda unwanted, text: not any(has_word(word, text) for word in several(unwanted)),
    "starts_with": lambda starts, text: any(
        text.strip().lower().startswith(start.lower()) for start in several(starts)
    ),
    "ends_with": lambda ends, text: any(text.strip().lower().endswith(end.lower()) for end in several(ends)),
}
"""Columns of a row that limit its answer, and how each is checked; words count as whole words, in any case."""


def _between(name: str, count: Callable[[str], int]) -> dict[str, Holds]:
    return {
        f"min_{name}": lambda limit, text: count(text) >= int(limit),
        f"max_{name}": lambda limit, text: count(text) <= int(limit),
    }


CHECKS: dict[str, Holds] = {
    **LIMITS,
    **_between("sentences", num_sentences),
    **_between("paragraphs", _num_paragraphs),
    **_between("bullets", num_items),
    **_between("headings", _num_headings),
    **_between("highlights", _num_highlights),
    **_between("placeholders", _num_placeholders),
    **_between("capital_words", _num_capital_words),
    **_between("characters", len),
    "json": _is_json,
    "json_keys": _has_keys,
    "min_counts": lambda limits, text: _counts(limits, text, int.__ge__),
    "max_counts": lambda limits, text: _counts(limits, text, int.__le__),
    "min_letters": lambda limits, text: all(
        text.lower().count(str(letter).lower()) >= int(number) for letter, number in limits.items()
    ),
    "case": _in_case,
    "no_commas": lambda wanted, text: not re.search("[,，、،]", text) or not wanted,
    "quoted": lambda wanted, text: bool(re.fullmatch(r'"[^"]*"', text.strip(), re.DOTALL)) or not wanted,
    "title": lambda wanted, text: bool(re.search(r"<<[^<>\n]*\S[^<>\n]*>>", text)) or not wanted,
    "postscript": lambda mark, text: bool(re.search(rf"(?mi)^\s*{re.escape(str(mark))}", text)),
    "one_of": lambda options, text: (
        text.strip(" .!\n").casefold() in [option.strip(" .!\n").casefold() for option in several(options)]
    ),
    "separated": lambda wanted, text: all(
        len([part for part in text.split(str(mark)) if part.strip()]) == int(number)
        for mark, number in wanted.items()
    ),
    "paragraph_begins": _first_paragraph_word,
    "ascii": lambda wanted, text: text.isascii() or not wanted,
}
"""Every constraint by name; docs/constraints.md says what each takes."""


def _said(limit: Any) -> Any:
    """A limit without the keys that only other rows of a table have."""
    if isinstance(limit, Mapping):
        return {key: _said(value) for key, value in limit.items() if value is not None}
    return limit


def constraints_of(prompt: Prompt) -> dict[str, Any]:
    """The constraints that a row sets to its answer, by name. Raises ValueError for an unknown one."""
    given = prompt.checks.get("constraints")
    found = {name: prompt.checks[name] for name in LIMITS if prompt.checks.get(name) is not None}
    if isinstance(given, str) and given.lstrip().startswith("{"):
        given = json.loads(given)
    if isinstance(given, Mapping):
        found |= {str(name): _said(limit) for name, limit in given.items() if _said(limit) not in (None, {})}
    for name in found:
        if name not in CHECKS:
            raise ValueError(f"there is no constraint '{name}'. {nearest(name, CHECKS)}")
    return found


def wrong_constraints(values: Mapping[str, Any]) -> str | None:
    """What is wrong with the names of a row's constraints, before anything is asked or trained; None where nothing
    is."""
    row = Row("", 0)
    try:
        constraints_of(Prompt((), "", row, checks=values))
    except ValueError as error:
        return f"constraints: {error}"
    return None


def is_constrained(prompt: Prompt) -> bool:
    """Whether the row sets its answer a constraint, known or not."""
    given = prompt.checks.get("constraints")
    is_object = isinstance(given, Mapping) or (isinstance(given, str) and given.lstrip().startswith("{"))
    return bool(given and is_object) or any(prompt.checks.get(name) is not None for name in LIMITS)


def variants(text: str) -> Iterator[str]:
    """An answer in the eight forms of IFEval's loose reading: without its first, its last, both or none of its lines,
    each with and without asterisks."""
    lines = text.split("\n")
    for form in (lines, lines[1:], lines[:-1], lines[1:-1]):
        joined = "\n".join(form).strip()
        yield joined
        yield joined.replace("*", "")


def kept(prompt: Prompt, completion: str, *, loosely: bool = False) -> list[bool]:
    """Of each constraint whether the answer keeps it; thoughts (`<think>`) do not count, an empty answer keeps none."""
    text = THOUGHTS.sub("", completion).strip()
    forms = [form for form in variants(text) if form] if loosely else [text] * bool(text)
    return [
        any(CHECKS[name](limit, form) for form in forms) for name, limit in constraints_of(prompt).items()
    ]


def constraints(prompt: Prompt, completion: str, reference: str) -> float:
    """Constraints of the row that the answer keeps / constraints that the row sets (IFEval, arXiv 2311.07911).

    The mean over answers, where IFEval's accuracy by instruction is that over instructions. A column `constraints`
    sets them, as `{"max_words": 50}` (docs/constraints.md lists all); `max_words`, `min_words`, `contains`, `forbids`,
    `starts_with` and `ends_with` may be columns themselves. An empty answer keeps none.
    """
    found = kept(prompt, completion)
    return sum(found) / len(found) if found else 0.0


def constraints_loose(prompt: Prompt, completion: str, reference: str) -> float:
    """As constraints, but each may hold in one of eight readings (IFEval's loose accuracy, arXiv 2311.07911).

    Without the first line, the last, both or none (for `Sure, here it is:`), with and without asterisks.
    """
    found = kept(prompt, completion, loosely=True)
    return sum(found) / len(found) if found else 0.0


def all_constraints(prompt: Prompt, completion: str, reference: str) -> float:
    """1 where the answer keeps every constraint of its row (IFEval's strict accuracy by prompt, arXiv 2311.07911)."""
    return float(all(kept(prompt, completion)))


def all_constraints_loose(prompt: Prompt, completion: str, reference: str) -> float:
    """1 where every constraint holds in one of the eight loose readings (IFEval's loose accuracy by prompt)."""
    return float(all(kept(prompt, completion, loosely=True)))
