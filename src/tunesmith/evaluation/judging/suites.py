"""Suites: sets of questions with their own rules of answering, and the answers of a model to them.

`mt-bench` asks two-turn questions of eight categories, each at its category's temperature; `alpaca` and `arena` compare
with a baseline over any file of prompts. Answers become evaluation rows, one per turn and sample, and a FastChat file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith import engines
from tunesmith.data import templates
from tunesmith.data.examples import Message, Unusable
from tunesmith.engines.check import EngineCheck
from tunesmith.errors import TunesmithError, nearest
from tunesmith.evaluation import check_engine
from tunesmith.evaluation.judging.judgments import Answers, Id, Question
from tunesmith.evaluation.judging.questions import read_questions, shipped
from tunesmith.evaluation.rows import EvalRow
from tunesmith.generation import Generated

TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1, "extraction": 0.0, "math": 0.0, "coding": 0.0,
    "reasoning": 0.0,
}  # fmt: skip
"""MT-Bench's, by category (fastchat.llm_judge, `temperature_config`)."""
OTHER_TEMPERATURE = 0.7
"""That of a category which it does not know."""
MAX_NEW_TOKENS = 1024
SETTINGS = ("max_new_tokens", "attempts", "engine", "engine_check", "batch_tokens", "server")
"""Settings of `evaluation` that suites go by."""


@dataclass(frozen=True)
class Suite:
    """How a set of questions is asked and judged."""

    name: str
    about: str
    grades: bool
    """Whether answers are graded by themselves as well as compared."""
    needs_baseline: bool
    temperature: Callable[[Question], float]
    questions: Callable[[str | Path | None], list[Question]]


def mt_bench_questions(path: str | Path | None = None) -> list[Question]:
    """MT-Bench's questions from a file, or our own 80 of the same shape."""
    return shipped() if path is None else read_questions(path)


def prompts_of(path: str | Path | None) -> list[Question]:
    """The prompts of a file. Raises TunesmithError where none is given."""
    if path is None:
        raise TunesmithError("The prompts of this suite are missing.", fix="Give --questions FILE.")
    return read_questions(path)


def _by_category(question: Question) -> float:
    if question.temperature is not None:
        return question.temperature
    return TEMPERATURES.get(question.category.lower(), OTHER_TEMPERATURE)


def _greedy(question: Question) -> float:
    return question.temperature or 0.0


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "mt-bench",
            "80 two-turn questions of eight categories, graded from 1 to 10 and, with a baseline, compared",
            grades=True, needs_baseline=False, temperature=_by_category, questions=mt_bench_questions,
        ),
        Suite(
            "alpaca", "any file of prompts, answered greedily and compared with a baseline, as in AlpacaEval",
            grades=False, needs_baseline=True, temperature=_greedy, questions=prompts_of,
        ),
        Suite(
            "arena", "any file of hard prompts, compared with a baseline by a judge that first answers them itself, "
            "as in Arena-Hard",
            grades=False, needs_baseline=True, temperature=_greedy, questions=prompts_of,
        ),
    )
}  # fmt: skip


def suite_of(name: str) -> Suite:
    """The suite of a name. Raises TunesmithError naming the nearest."""
    if name not in SUITES:
        raise TunesmithError(f"There is no suite '{name}'.", fix=nearest(name, [*SUITES, "lm-eval:TASKS"]))
    return SUITES[name]


def answer(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    name: str,
    suite: Suite,
    max_new_tokens: int = MAX_NEW_TOKENS,
    samples: int = 1,
    batch_tokens: int = 8192,
    engine: str = "padded",
    folder: Path | None = None,
    engine_check: int = 0,
    checked: Callable[[EngineCheck], None] | None = None,
    warn: Callable[[str], None] = lambda message: None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[EvalRow]:
    """One row per question, turn and sample, through the model's own chat template, by any of the engines.

    `model` is one in this process, or an `engines.Source`. Turn k of all questions is answered in one go (of each
    temperature), then turn k + 1 with these answers before it. Sample k draws with seed k. A conversation that the
    template refuses, or that leaves no room for an answer, ends there with an error. In `folder` each answer is kept as
    it comes, so that the same call goes on where it was killed. `engine_check` greedy answers are read again alone.
    """
    source = model if isinstance(model, engines.Source) else engines.Source(name, tokenizer, lambda: model)
    asking = engines.Asked(
        [], max_new_tokens, templates.end_of_turn_ids(tokenizer), batch_tokens=batch_tokens
    )
    rows: list[EvalRow] = []
    greedy: list[tuple[int, tuple[int, ...], Generated]] = []
    wrote = engine
    for sample in range(samples):
        talks: dict[int, list[Message]] = {n: [] for n in range(len(questions))}
        for turn in range(max(len(q.turns) for q in questions)):
            asked: dict[int, tuple[int, ...]] = {}
            for number in list(talks):
                question = questions[number]
                if turn >= len(question.turns):
                    del talks[number]
                    continue
                talks[number].append(Message("user", question.turns[turn]))
                try:
                    asked[number] = tuple(templates.prompt_ids(talks[number], tokenizer))
                except Unusable as reason:
                    rows += _failed(
                        name, suite, number, question, turn, sample, f"the template refuses: {reason}"
                    )
                    del talks[number]
            for temperature in sorted({suite.temperature(questions[n]) for n in asked}):
                part = [n for n in asked if suite.temperature(questions[n]) == temperature]
                which = f" of sample {sample + 1}" if samples > 1 else ""
                stage = f"{name}: turn {turn + 1}{which} at temperature {temperature:g}"
                found, settings = engines.answers(
                    source,
                    # What is greedy hangs on no seed: a further sample of it is found in the folder.
                    replace(
                        asking,
                        prompts=[asked[n] for n in part],
                        temperature=temperature,
                        seed=sample if temperature else 0,
                    ),
                    engine=engine,
                    folder=folder,
                    progress=_told(progress, stage, len(part)),
                    say=warn,
                )
                wrote = settings["engine"]
                for number, given in zip(part, found, strict=True):
                    question = questions[number]
                    if not given.ids and given.finish_reason == "length":
                        why = f"{len(asked[number])} tokens of conversation leave no room for an answer"
                        rows += _failed(name, suite, number, question, turn, sample, why)
                        del talks[number]
                        continue
                    if not temperature and not sample:
                        greedy.append((number, asked[number], given))
                    talks[number].append(Message("assistant", given.text))
                    rows.append(
                        _row(
                            name, suite, number, question, turn, sample,
                            prompt=asked[number], output=given.text, finish_reason=given.finish_reason,
                            generation={**settings, "new_tokens": len(given.ids)},
                        )
                    )  # fmt: skip
    if checked and engine_check and greedy:
        numbers, prompts, texts = zip(*greedy, strict=True)
        checked(check_engine(source, replace(asking, prompts=prompts), texts, wrote, numbers, engine_check))
    elif checked and engine_check:
        warn(f"The engine check of {name} is left out: all its answers are drawn, none is greedy.")
    return sorted(rows, key=lambda row: (row.item, row.sample, row.turn))


def answers_of(
    rows: Sequence[EvalRow], questions: Sequence[Question], name: str, *, sample: int = 0
) -> Answers:
    """A sample of a model's rows as answers by question; those that broke off have fewer turns."""
    turns: dict[Id, tuple[str, ...]] = {}
    for row in sorted(rows, key=lambda r: (r.item, r.turn)):
        if row.model == name and row.sample == sample and row.output is not None:
            id = questions[row.item].id
            turns[id] = (*turns.get(id, ()), row.output)
    return Answers(name, turns)


def _failed(
    name: str, suite: Suite, number: int, question: Question, turn: int, sample: int, why: str
) -> list[EvalRow]:
    """Rows of a turn that has no answer, and of those behind it."""
    return [
        _row(
            name, suite, number, question, late, sample,
            status=f"error:{why if late == turn else 'the turn before has no answer'}",
        )
        for late in range(turn, len(question.turns))
    ]  # fmt: skip


def _row(
    name: str,
    suite: Suite,
    number: int,
    question: Question,
    turn: int,
    sample: int,
    *,
    prompt: Sequence[int] = (),
    output: str | None = None,
    finish_reason: str | None = None,
    generation: Mapping[str, Any] | None = None,
    status: str = "ok",
) -> EvalRow:
    return EvalRow(
        model=name,
        item=number,
        source_row=f"{suite.name}:{question.id}",
        group=None,
        turn=turn,
        sample=sample,
        prompt_sha256=hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest(),
        prompt_text=question.turns[turn],
        reference=question.reference(turn + 1),
        output=output,
        finish_reason=finish_reason,
        generation={**(generation or {}), "category": question.category},
        scores={},
        nll=None,
        tokens=None,
        correct=None,
        status=status,
    )


def _told(
    progress: Callable[[str, int, int], None] | None, stage: str, total: int
) -> Callable[[int], None] | None:
    return (lambda done: progress(stage, done, total)) if progress else None
