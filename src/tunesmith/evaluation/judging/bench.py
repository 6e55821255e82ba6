"""A suite from end to end: models answer, the judge judges, figures and plots lie in one folder.

answers/NAME.jsonl   FastChat's format           rows.jsonl   our record, with grades
suite.json           what was asked of whom      graded/, compared/   a folder of judgments each
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith import engines
from tunesmith.engines.check import EngineCheck
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.evaluation.judging import suites
from tunesmith.evaluation.judging.folder import judge_into
from tunesmith.evaluation.judging.judgments import (
    Answers,
    Question,
    Single,
    read_answers,
    read_judgments,
    with_references,
    write_answers,
)
from tunesmith.evaluation.judging.settings import Judge
from tunesmith.evaluation.judging.suites import Suite
from tunesmith.evaluation.rows import EvalRow, read_rows, write_rows
from tunesmith.recipe import Evaluation, Server
from tunesmith.training.run import Watch, write_whole


def run_suite(
    model: str | Path,
    suite: Suite,
    *,
    questions: str | Path | None,
    references: str | Path | None,
    judge: Judge | None,
    baseline: str | Path | None,
    evaluation: Evaluation,
    output: Path,
    calibrated: bool = True,
    watch: Watch,
) -> dict[str, Any]:
    """Answer a suite with a model and, where a judge is given, let it judge; gives what `suite.json` holds.

    `baseline` is a model or a FastChat answer file. Answers that lie in the folder are used again where model,
    questions and settings are the same. Raises TunesmithError for a baseline that is needed and missing.
    """
    asked = suite.questions(questions)
    if references:
        asked = with_references(asked, references)
    if suite.needs_baseline and baseline is None:
        raise TunesmithError(
            f"The suite '{suite.name}' compares with a baseline.",
            fix="Give --baseline MODEL, or a file of answers.",
        )
    name, other = _names(model, baseline)
    if evaluation.attempts > 1 and not any(suite.temperature(question) for question in asked):
        raise TunesmithError(
            f"All questions of '{suite.name}' are answered greedily, so {evaluation.attempts} answers would be alike.",
            fix="Leave --attempts out, or give questions a required_temperature.",
        )
    answering = {
        "suite": suite.name,
        "max_new_tokens": evaluation.max_new_tokens,
        "samples": evaluation.attempts,
        "engine": evaluation.engine,
    }
    checks: list[EngineCheck] = []
    given: list[Answers] = []
    rows: list[EvalRow] = []
    for who, which in ((name, model), (other, baseline)):
        if which is None:
            continue
        if who == other and str(which).endswith(".jsonl"):
            given.append(replace(read_answers(which), model=str(who)))
            continue
        own = _rows_of(output, str(who), str(which), asked, suite, answering, evaluation, checks, watch)
        rows += own
        given.append(suites.answers_of(own, asked, str(who)))
        further = [
            suites.answers_of(own, asked, str(who), sample=sample) for sample in range(1, evaluation.attempts)
        ]
        write_answers(output / "answers" / f"{who}.jsonl", given[-1], further)
    found: dict[str, Any] = {
        "suite": suite.name,
        "model": name,
        "baseline": other,
        "questions": len(asked),
        "turns": sum(len(q.turns) for q in asked),
        **answering,
        "answers": {one.model: _answer_facts(rows, one.model) for one in given},
        "engine_check": {check.model: check.as_dict() for check in checks},
    }
    if judge:
        if suite.name == "arena" and judge.prompts is None:
            judge = judge.model_copy(update={"prompts": _arena_prompts(output)})
        if suite.grades:
            found["graded"] = judge_into(
                output / "graded",
                judge,
                asked,
                given,
                mode="single",
                calibrated=calibrated,
                home=output,
                watch=watch,
            )
            rows = _graded(rows, asked, output / "graded/judgments_single.jsonl")
        if other is not None:
            found["compared"] = judge_into(
                output / "compared", judge, asked, given, mode="pair", baseline=other, calibrated=calibrated,
                home=output, watch=watch,
            )  # fmt: skip
    else:
        watch(
            {"kind": "warning", "message": "No --judge is given: the answers are kept, nobody judges them."}
        )
    write_rows(output / "rows.jsonl", rows)
    write_whole(output / "suite.json", json.dumps(found, indent=1))
    return found


def _names(model: str | Path, baseline: str | Path | None) -> tuple[str, str | None]:
    """Short names of both; where they are the same, the baseline's says what it is."""
    name = Path(str(model)).name
    if baseline is None:
        return name, None
    other = Path(str(baseline)).name.removesuffix(".jsonl")
    return name, f"{other} (baseline)" if other == name else other


def load_for_suite(model: str) -> tuple[Any, Any]:
    """A causal model with its tokenizer, its chat template settled."""
    source = source_of(model)
    return source.model, source.tokenizer


def source_of(model: str, *, name: str = "model", server: Server | None = None) -> engines.Source:
    """A causal model as engines take it, its chat template settled; loaded when one needs it.

    Raises ModelError for a model of another kind.
    """
    from tunesmith import models
    from tunesmith import plan as planning
    from tunesmith.data.templates import set_template

    if (kind := models.kind(model)) != "causal":
        raise ModelError(
            f"The model {model} cannot hold a conversation.", found=f"a model of the kind {kind}"
        )
    tokenizer = models.load_tokenizer(model)
    set_template(tokenizer, None)
    device = planning.device()
    dtype = planning.inference_dtype("auto", device)
    return engines.Source(
        name,
        tokenizer,
        lambda: models.load_model(model, dtype=dtype, device=device),
        model,
        dtype=dtype,
        device=device,
        server=server or Server(),
    )


def _rows_of(
    output: Path,
    name: str,
    model: str,
    questions: Sequence[Question],
    suite: Suite,
    answering: dict[str, Any],
    evaluation: Evaluation,
    checks: list[EngineCheck],
    watch: Watch,
) -> list[EvalRow]:
    from tunesmith import models

    mark = suites.fingerprint(questions, models.locate(model), answering)
    file, facts = output / "answers" / f"{name}.rows.jsonl", output / "answers" / f"{name}.json"
    if file.is_file() and facts.is_file() and json.loads(facts.read_text(encoding="utf-8"))["sha256"] == mark:
        watch({"kind": "decision", "name": "answers", "value": f"those of {name} that lie there",
               "reason": "same model, questions and settings"})  # fmt: skip
        return read_rows(file)
    source = source_of(model, name=name, server=evaluation.server)

    def checked(check: EngineCheck) -> None:
        checks.append(check)
        watch(
            {
                "kind": "decision",
                "name": f"engine check of {name}",
                "value": check.sentence(),
                "reason": f"answers of the {check.engine} engine, read again alone",
            }
        )
        if not check.passed:
            watch({"kind": "warning", "message": check.warning()})

    unfinished = output / "unfinished"
    rows = suites.answer(
        source,
        source.tokenizer,
        questions,
        name=name,
        suite=suite,
        max_new_tokens=evaluation.max_new_tokens,
        samples=evaluation.attempts,
        batch_tokens=evaluation.batch_tokens,
        engine=evaluation.engine,
        folder=unfinished,
        engine_check=evaluation.engine_check,
        checked=checked,
        warn=lambda message: watch({"kind": "warning", "message": message}),
        progress=lambda stage, done, total: watch(
            {"kind": "progress", "stage": stage, "done": done, "total": total}
        ),
    )
    write_rows(file, rows)
    write_whole(facts, json.dumps({"sha256": mark, "model": model, **answering}))
    engines.forget(unfinished)
    unfinished.rmdir()
    broken = sum(row.status != "ok" for row in rows)
    if broken:
        watch({"kind": "warning", "message": f"{name} gave no answer to {broken} of {len(rows)} turns."})
    return rows


def _answer_facts(rows: Sequence[EvalRow], name: str) -> dict[str, Any]:
    own = [row for row in rows if row.model == name]
    return {
        "turns": len(own),
        "without_answer": sum(row.output is None for row in own),
        "empty": sum(row.output is not None and not row.output.strip() for row in own),
        "cut": sum(row.finish_reason == "length" for row in own),
    }


def _graded(rows: Sequence[EvalRow], questions: Sequence[Question], path: Path) -> list[EvalRow]:
    """The rows with their grades, of the sample that was graded."""
    grades = {
        (one.model, one.question, one.turn): one for one in read_judgments(path) if isinstance(one, Single)
    }
    found = []
    for row in rows:
        one = grades.get((row.model, questions[row.item].id, row.turn + 1)) if row.sample == 0 else None
        if one is None:
            found.append(row)
        elif one.score is None:
            found.append(replace(row, flags={**row.flags, "judge_grade": [one.error]}))
        else:
            found.append(replace(row, scores={**row.scores, "judge_grade": one.score}))
    return found


ARENA = """\
You compare the answers of two assistants, A and B, to the same request.

{material}

First write your own answer to the request, in your head or in full. Then hold both answers against it and look for
mistakes in either.

{rubric}

{task}

The order in which the two are shown is chance and means nothing. Give your reasons in a few sentences. Then end with
one line of its own: `Verdict: [[A]]` if A is better, `Verdict: [[B]]` if B is better, or `Verdict: [[C]]` if neither
is. Write double brackets nowhere else.
"""


def _arena_prompts(output: Path) -> str:
    """The file of texts with which a judge answers first and judges then."""
    import yaml

    return str(write_whole(output / "arena_prompts.yaml", yaml.safe_dump({"pair": ARENA})))
