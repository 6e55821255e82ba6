"""Which questions prove something: those that none of the measured models was trained or validated on.

Rows are recognized by content, so another file, another order or another split of the same rows hides none.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.data.examples import Conversation, Example, Preference, Prompt, Rating, questions
from tunesmith.data.splitting import key
from tunesmith.errors import RunError, TunesmithError

if TYPE_CHECKING:
    from tunesmith.data import Splits
    from tunesmith.training.run import Run


@dataclass(frozen=True)
class MeasuredOn:
    """The questions of a measurement, and those that were left out of it."""

    dataset: str
    split_of: str | None
    """The run whose held-out split this is; None where it is a whole data set."""
    questions: int
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many questions are left out since a run was trained or validated on them, by run."""
    unchecked: Mapping[str, str] = field(default_factory=dict)
    """Runs of which it is not known what they were trained on, and why."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """How many rows of a whole data set became no question, by reason."""
    longer: Mapping[str, str] = field(default_factory=dict)
    """By encoder-decoder model: how many questions are longer than the inputs that it was trained to read."""

    def sentences(self) -> tuple[str, str]:
        """What is measured on, and what was left out of it and why."""
        where = f"the held-out split of {self.split_of}" if self.split_of else self.dataset
        unusable = sum(self.dropped.values())
        whole = self.questions + sum(self.left_out.values()) + unusable
        count = f"all {whole}" if whole == self.questions else f"{self.questions} of {whole}"
        rows = "rows" if unusable else "questions"
        why = [
            f"{number} are left out, {run} was trained or validated on them"
            for run, number in self.left_out.items()
        ]
        if unusable:
            reasons = ", ".join(f"{number} × {reason}" for reason, number in self.dropped.items())
            why = [f"{unusable} cannot be asked: {reasons}", *why]
        if not self.left_out:
            why.append("no run here was trained on any of them")
        return f"{count} {rows} of {where}", "; ".join(why)


@dataclass(frozen=True)
class Asked:
    """The held-out examples that a run is measured on, and those that are left out since a run behind its base was
    trained or validated on them."""

    examples: Sequence[Example]
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many, by run."""
    unchecked: Mapping[str, str] = field(default_factory=dict)
    """Runs of which it is not known what they were trained on, and why."""


def asked_of(held_out: Sequence[Example], base: str) -> Asked:
    """The examples that nothing behind a base has learned from."""
    known, unchecked = learned([base], None)
    kept, left_out = unseen(held_out, known) if known else (held_out, {})
    return Asked(kept, left_out, unchecked)


def marks(example: Example) -> frozenset[str]:
    """What an example teaches, as recognized in any data set: the questions that it answers, whatever the
    system message, and its group."""
    return frozenset((*map(str, questions(_without_system(example))), *_group(example)))


def asked(example: Example) -> frozenset[str]:
    """What an example asks: the last of its questions, and its group."""
    return frozenset((str(questions(_without_system(example))[-1]), *_group(example)))


def _group(example: Example) -> tuple[str, ...]:
    return () if example.group is None else (f"group {key(example)}",)


def _without_system(example: Example) -> Example:
    match example:
        case Conversation(messages=messages) | Prompt(messages=messages):
            return replace(example, messages=tuple(m for m in messages if m.role != "system"))
        case Preference(prompt=prompt) | Rating(prompt=prompt):
            return replace(example, prompt=tuple(m for m in prompt if m.role != "system"))
        case _:
            return example


def own_marks(example: Example) -> frozenset[str]:
    """What an example is recognized by in the data set that its split was made of."""
    return frozenset((str(key(example)),))


def unseen(
    examples: Iterable[Example], learned: Mapping[str, frozenset[str]], own: str | None = None
) -> tuple[list[Example], dict[str, int]]:
    """The examples that no run has learned from, and the number of the others by run.

    `learned` has each run's marks; those of the run `own`, whose split the examples are, are `own_marks`.
    """
    kept: list[Example] = []
    left_out: Counter[str] = Counter()
    for example in examples:
        known, split = asked(example), own_marks(example)
        run = next(
            (r for r, seen in learned.items() if not seen.isdisjoint(split if r == own else known)), None
        )
        if run is None:
            kept.append(example)
        else:
            left_out[run] += 1
    return kept, dict(left_out)


def learned(
    models: Sequence[str | Path], own: str | None
) -> tuple[dict[str, frozenset[str]], dict[str, str]]:
    """What each run behind these models was trained or validated on, and the runs of which it is not known.

    A run's base may be a run itself; what that one learned, its successor has learned too.
    """
    from tunesmith.data.splitting import TRAIN, VALIDATION
    from tunesmith.export.merge import run_behind
    from tunesmith.export.merge import run_of as merged_from

    found: dict[str, frozenset[str]] = {}
    unchecked: dict[str, str] = {}
    for model in models:
        origin = merged_from(Path(model).expanduser())
        if origin and not run_behind(model):
            unchecked[str(model)] = f"it was merged from the run {origin[0]}, which is not at {origin[1]}."
    for name, splits in runs_behind(models):
        try:
            if isinstance(splits, TunesmithError):
                raise splits
            mark = own_marks if name == own else marks
            found[name] = frozenset(m for e in splits.examples(TRAIN, VALIDATION) for m in mark(e))
        except TunesmithError as error:
            unchecked[name] = error.problem
    return found, unchecked


def runs_behind(models: Sequence[str | Path]) -> Iterator[tuple[str, Splits | TunesmithError]]:
    """Each run behind these models once, with its splits, or why these cannot be told."""
    from tunesmith import dataflow
    from tunesmith.export.merge import run_behind

    waiting = [run for model in models if (run := run_behind(model))]
    done: set[str] = set()
    while waiting:
        run = waiting.pop(0)
        name = str(run.path)
        if name in done:
            continue
        done.add(name)
        recipe = run.recipe()
        if below := run_behind(recipe.model.base):
            waiting.append(below)
        try:
            splits = dataflow.splits(recipe)
            if not _is_split_of(run, splits):
                raise RunError("its data set is not what it was when the run was started.")
        except TunesmithError as error:
            yield name, error
        else:
            yield name, splits


def _is_split_of(run: Run, splits: Splits) -> bool:
    """Whether the run's ledger has the same rows in the same roles; dropped ones may have been too long."""
    from tunesmith.data.splitting import FATES

    ledger = run.path / "ledger.jsonl"
    if not ledger.is_file():
        return True
    with ledger.open(encoding="utf-8") as lines:
        then = [json.loads(line)["fate"] for line in lines]
    return len(then) == len(splits.fates) and all(
        fate in ("dropped", FATES[now]) for fate, now in zip(then, splits.fates.tolist(), strict=True)
    )
