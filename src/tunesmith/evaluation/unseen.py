"""Which questions prove something: those that none of the measured models was trained or validated on.

Rows are recognized by content, so another file, another order or another split of the same rows hides none. A finished
model carries the marks of its rows in its folder (`learned.json`), so that a copy of it is known by them as well.
"""

from __future__ import annotations

import base64
import binascii
import json
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.data.examples import Conversation, Example, Preference, Prompt, Rating, questions
from tunesmith.data.splitting import key
from tunesmith.errors import ModelError, RunError, TunesmithError
from tunesmith.training.lineage import CARRIED, run_behind, run_of

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
    copies: tuple[str, ...] = ()
    """Models of which only marks are known, as their data are not here: equal questions are found, near-copies not."""
    longer: Mapping[str, str] = field(default_factory=dict)
    """By encoder-decoder model: how many questions are longer than the inputs that it was trained to read."""
    asked: int | None = None
    """How many of the questions are asked, where `evaluation.max_items` leaves others out; None where all are."""

    def sentences(self, limit: str = "evaluation.max_items") -> tuple[str, str]:
        """What is measured on, and what was left out of it and why; `limit` is what says how many are asked."""
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
        if not self.left_out and not self.unchecked:
            why.append("no run here was trained on any of them")
        why += [
            f"the data of {name} are not here: equal questions are found by the marks that it carries, near-copies "
            "are not"
            for name in self.copies
        ]
        why += [f"what {name} was trained on is not known" for name in self.unchecked]
        if self.asked is not None:
            return (
                f"{self.asked} of {whole} {rows} of {where}, by {limit}",
                "; ".join(
                    [
                        f"{self.asked} of the {self.questions} that are left are asked, chosen by content hash",
                        *why,
                    ]
                ),
            )
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
    known, unchecked, _ = learned([base], None)
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


@dataclass(frozen=True)
class Carried:
    """What a model's folder tells of the rows behind it."""

    run: str
    """Name of the run that it is from."""
    marks: frozenset[str]


def carry(folder: Path, run: Run, splits: Splits, base: str) -> None:
    """Write into a finished model's folder by what its rows are recognized, and those behind its base."""
    from tunesmith.data.splitting import TRAIN, VALIDATION
    from tunesmith.training.run import write_whole

    below, _, _ = learned([base], None)
    found = {mark for e in splits.examples(TRAIN, VALIDATION) for mark in marks(e)}.union(*below.values())
    groups = {mark for mark in found if mark.startswith("group ")}
    facts = {
        "run": run.path.name,
        "rows": "64-bit hashes of the questions that were trained or validated on, and of their groups",
        "questions": _packed(int(mark) for mark in found - groups),
        "groups": _packed(int(mark.removeprefix("group ")) for mark in groups),
    }
    write_whole(folder / CARRIED, json.dumps(facts, indent=1))


def carry_together(sources: Sequence[Path], folder: Path) -> list[str]:
    """Have a model that is made from others carry what they carry; the names of those that carry nothing."""
    from tunesmith.training.run import write_whole

    left = [source.name for source in sources if not (source / CARRIED).is_file()]
    if len(sources) == 1:
        if not left:
            write_whole(folder / CARRIED, (sources[0] / CARRIED).read_text(encoding="utf-8"))
        return []
    told = [one for source in sources if (one := carried(source))]
    groups = {mark for one in told for mark in one.marks if mark.startswith("group ")}
    plain = {mark for one in told for mark in one.marks} - groups
    if told:
        facts = {
            "run": " + ".join(one.run for one in told),
            "rows": "64-bit hashes of the questions that were trained or validated on, and of their groups",
            "questions": _packed(int(mark) for mark in plain),
            "groups": _packed(int(mark.removeprefix("group ")) for mark in groups),
        }
        write_whole(folder / CARRIED, json.dumps(facts, indent=1))
    return left


def carried(folder: Path) -> Carried | None:
    """What a model's folder tells; None where it tells nothing. Raises ModelError for a damaged file."""
    file = folder / CARRIED
    if not file.is_file():
        return None
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        known = frozenset(map(str, _unpacked(facts["questions"])))
        return Carried(str(facts["run"]), known | {f"group {n}" for n in _unpacked(facts["groups"])})
    except (OSError, ValueError, KeyError, TypeError, binascii.Error) as error:
        raise ModelError(
            f"its {CARRIED} is damaged.", found=str(error), fix="Copy it from the run's final_model again."
        ) from None


def _packed(numbers: Iterable[int]) -> str:
    made = array("Q", sorted(numbers))
    if sys.byteorder == "big":
        made.byteswap()
    return base64.b64encode(made.tobytes()).decode("ascii")


def _unpacked(text: str) -> array[int]:
    found = array("Q", base64.b64decode(text, validate=True))
    if sys.byteorder == "big":
        found.byteswap()
    return found


def learned(
    models: Sequence[str | Path], own: str | None
) -> tuple[dict[str, frozenset[str]], dict[str, str], tuple[str, ...]]:
    """What each run behind these models was trained or validated on, the runs of which it is not known and why, and
    those of which it is known by the marks that a copy carries alone.

    A run's base may be a run itself; what that one learned, its successor has learned too.
    """
    from tunesmith.data.splitting import TRAIN, VALIDATION

    found: dict[str, frozenset[str]] = {}
    unchecked: dict[str, str] = {}
    copies = []
    for name, behind in runs_behind(models):
        try:
            if isinstance(behind, TunesmithError):
                raise behind
            if isinstance(behind, Carried):
                found[name] = behind.marks
                copies.append(name)
                continue
            mark = own_marks if name == own else marks
            found[name] = frozenset(m for e in behind.examples(TRAIN, VALIDATION) for m in mark(e))
        except TunesmithError as error:
            unchecked[name] = error.problem
    return found, unchecked, tuple(copies)


def runs_behind(models: Sequence[str | Path]) -> Iterator[tuple[str, Splits | Carried | TunesmithError]]:
    """Each run behind these models once, with its splits, or why these cannot be told.

    A copy of a model whose run is not here gives what it carries. Nothing is given for a model that no training here
    has left a trace on: a base.
    """
    from tunesmith import dataflow

    waiting: list[str | Path] = list(models)
    done: set[str] = set()
    while waiting:
        model = waiting.pop(0)
        run = run_behind(model)
        name = str(run.path if run else model)
        if name in done:
            continue
        done.add(name)
        if not run:
            if told := _told(model):
                yield name, told
            continue
        recipe = run.recipe()
        waiting.append(recipe.model.base)
        try:
            splits = dataflow.splits(recipe)
            if not _is_split_of(run, splits):
                raise RunError("its data set is not what it was when the run was started.")
        except TunesmithError as error:
            yield name, _of_finished(run) or error
        else:
            yield name, splits


def _of_finished(run: Run) -> Carried | None:
    """What a run's own model carries, where its data are gone."""
    try:
        return carried(run.final_model)
    except ModelError:
        return None


def _told(model: str | Path) -> Carried | TunesmithError | None:
    """What a model that lies in no run tells of its rows; None for a base, an error where training is seen but not on
    what."""
    from tunesmith.models import locate
    from tunesmith.training.checkpoints import BEST

    try:
        if not Path(model).expanduser().is_dir():
            return None  # of the Hub, or the shipped one
        folder = Path(locate(str(model)))
        if found := carried(folder):
            return found
    except TunesmithError as error:
        return error
    if origin := run_of(folder):
        return RunError(f"it was merged from the run {origin[0]}, which is not at {origin[1]}.")
    traces = [name for name in ("adapter_config.json", BEST) if (folder / name).is_file()]
    if traces:
        return RunError(f"it was trained, as {traces[0]} shows, but no {CARRIED} in its folder says on what.")
    return None


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
