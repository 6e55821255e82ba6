"""Questions of a suite that a model has met in training, and what is left of its figures without them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.data import Splits
from tunesmith.data.examples import Message, Prompt, Row
from tunesmith.data.splitting import TRAIN, VALIDATION
from tunesmith.evaluation import leakage, unseen
from tunesmith.evaluation.judging.judgments import Id, Pair, Question, Single
from tunesmith.evaluation.judging.replay import computed
from tunesmith.evaluation.leakage import Kind, Leakage
from tunesmith.training.lineage import run_behind


@dataclass(frozen=True)
class Met:
    """What of a suite's questions stands in the training data of the models that answer it."""

    leakage: Leakage | None
    """By the questions' places; None where no model's training data is known."""
    unknown: Mapping[str, str]
    """Models and runs whose training data is not known, and why."""

    def leaked(self, questions: Sequence[Question]) -> set[Id]:
        """The questions that were met, by id."""
        return {questions[place].id for place in self.leakage.leaked} if self.leakage else set()

    def not_known(self) -> list[str]:
        """What could not be looked for, in sentences."""
        return [
            f"What {name} was trained on is not known, so it may have met any question: {why}"
            for name, why in self.unknown.items()
        ]

    def sentences(self) -> list[str]:
        """What was found, and what could not be looked for."""
        return [
            *([leakage.remark(self.leakage, {})] if self.leakage else []),
            *self.not_known(),
        ]


def met(questions: Sequence[Question], models: Mapping[str, str | None]) -> Met:
    """Which questions the runs behind the models, by name, have met; a name without a model is a file of answers.

    A question counts where its first turn or all its turns together are found in a training or validation row.
    """
    runs = {name: model for name, model in models.items() if model is not None and run_behind(model)}
    unknown = {
        name: "it is a file of answers." if model is None else "it is no run of tunesmith."
        for name, model in models.items()
        if name not in runs
    }
    # Whatever else these tell, the marks come first and what is not known second.
    known, unchecked, *_ = unseen.learned(list(runs.values()), None)
    unknown |= unchecked
    splits = [found for _, found, *_ in unseen.runs_behind(list(runs.values())) if isinstance(found, Splits)]
    if not splits:
        return Met(None, unknown)
    examples, places = list[Prompt](), list[int]()
    for place, question in enumerate(questions):
        row = Row("questions", place + 1)
        turns = [Message("user", text) for text in question.turns]
        first = Prompt((turns[0],), question.reference(1), row)
        whole = Prompt(tuple(turns), question.reference(len(turns)), row)
        for example in (first, whole) if len(turns) > 1 else (first,):
            examples.append(example)
            places.append(place)
    found = leakage.find(
        examples, itertools.chain.from_iterable(s.examples(TRAIN, VALIDATION) for s in splits)
    )
    leaked: dict[int, Kind] = {}
    for number, kind in found.leaked.items():
        leaked.setdefault(places[number], kind)
    marks = frozenset[str]().union(*known.values())
    for number, example in enumerate(examples):
        # The first question of a longer conversation, word for word, which looking at whole rows does not find.
        if not marks.isdisjoint(unseen.asked(example)):
            leaked.setdefault(places[number], "other answer")
    counts = Counter(leaked.values())
    return Met(
        replace(
            found,
            questions=len(questions),
            leaked=dict(sorted(leaked.items())),
            review=tuple(sorted({places[number] for number in found.review} - leaked.keys())),
            counts={kind: counts[kind] for kind in leakage.KINDS},
            pairs=tuple(replace(pair, item=places[pair.item]) for pair in found.pairs),
        ),
        unknown,
    )


def clean_figures(
    judgments: Sequence[Single] | Sequence[Pair],
    questions: Sequence[Question],
    leaked: set[Id],
    *,
    baseline: str | None,
) -> dict[str, Any] | None:
    """The figures of the judgments of questions that nobody has met; None where there are none."""
    kept: list[Any] = [one for one in judgments if one.question not in leaked]
    return computed(kept, questions=questions, baseline=baseline)["ours"] if kept else None


def compared(part: str, every: Mapping[str, Any], clean: Mapping[str, Any] | None) -> list[str]:
    """The difference on the clean questions against that on all, in sentences."""
    if clean is None:
        return ["No clean question is left to judge by."]
    if part == "compared":
        pairs = zip(every["pairs"], clean["pairs"], strict=False)
        return [
            f"On the clean questions alone the win rate of {now['model']} against {now['against']} is "
            f"{_of(now['win_rate'], 3)} instead of {_of(then['win_rate'], 3)}."
            for then, now in pairs
        ]
    scores = [
        f"On the clean questions alone {name} has {_of(one['score'], 2)} of 10 instead of "
        f"{_of(every['models'][name]['score'], 2)}."
        for name, one in clean["models"].items()
    ]
    differences = zip(every["differences"], clean["differences"], strict=False)
    return scores + [
        f"On them {now['model']} less {now['against']} is {_of(now['difference'], 2)} instead of "
        f"{_of(then['difference'], 2)}."
        for then, now in differences
    ]


def _of(estimate: Mapping[str, Any], digits: int) -> str:
    if estimate["value"] is None:
        return "nothing"
    value, low, high = (f"{estimate[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
