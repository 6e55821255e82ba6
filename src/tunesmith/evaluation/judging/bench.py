"""A suite from end to end: models answer, the judge judges, figures and plots lie in one folder.

answers/NAME.jsonl   FastChat's format           rows.jsonl           our record, with grades
questions.jsonl      what was asked              graded/, compared/   a folder of judgments each
suite.json           every figure                asked.json           what all of it depends on
leakage.json         questions met in training
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tunesmith import engines
from tunesmith.engines.check import EngineCheck, tell_check
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.evaluation import leakage
from tunesmith.evaluation.judging import headline, met, suites
from tunesmith.evaluation.judging.asking import BYTES_PER_TOKEN
from tunesmith.evaluation.judging.folder import Assignment, judge_several
from tunesmith.evaluation.judging.judgments import (
    Answers,
    Question,
    Single,
    is_failed,
    read_answers,
    read_judgments,
    with_references,
    write_answers,
)
from tunesmith.evaluation.judging.prompts import Mode, load_prompts
from tunesmith.evaluation.judging.questions import row_of
from tunesmith.evaluation.judging.settings import Judge
from tunesmith.evaluation.judging.suites import Suite
from tunesmith.evaluation.rows import EvalRow, read_rows, write_rows
from tunesmith.recipe import Evaluation, Server, Shards
from tunesmith.training.run import Watch, counting, warning, write_whole

ASKED = "asked.json"
"""What a folder's answers depend on, written before the first one."""


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
    apart: bool = False,
    calibrated: bool = True,
    watch: Watch,
) -> dict[str, Any]:
    """Answer a suite with a model and, where a judge is given, let it judge; gives what `suite.json` holds.

    `baseline` is a model or a FastChat answer file. Answers that are there are used again where model, questions and
    settings are the same. Others are never written over: where `output` has some it is refused, or with `apart` the
    next free name (`mt-bench-2`) is taken. Raises TunesmithError for a baseline that is needed and missing.
    """
    asked = suite.questions(questions)
    if references:
        asked = with_references(asked, references)
    if suite.needs_baseline and baseline is None:
        raise TunesmithError(
            f"The suite '{suite.name}' compares with a baseline.",
            fix="Give --baseline MODEL, or a file of answers.",
        )
    if evaluation.attempts > 1 and not any(suite.temperature(question) for question in asked):
        raise TunesmithError(
            f"All questions of '{suite.name}' are answered greedily, so {evaluation.attempts} answers would be alike.",
            fix="Leave --attempts out, or give questions a required_temperature.",
        )
    name, other = _names(model, baseline)
    sources: dict[str, engines.Source] = {
        name: source_of(str(model), name=name, server=evaluation.server, shards=evaluation.shards)
    }
    from_file: Answers | None = None
    if other is not None and is_file_of_answers(str(baseline)):
        from_file = replace(read_answers(str(baseline)), model=other)
    elif other is not None:
        sources[other] = source_of(
            str(baseline), name=other, server=evaluation.server, shards=evaluation.shards
        )
    if judge:
        judge = _with_prompts(suite, judge)
    facts = _facts(suite, name, other, sources, from_file, asked, evaluation, judge)
    home, passed = folder_for(output, facts, apart=apart, watch=watch)
    known = met.met(
        asked,
        {name: str(model), **({other: None if from_file else str(baseline)} if other is not None else {})},
    )
    if known.leakage:
        watch({"kind": "decision", **asdict(leakage.decision(known.leakage, home / "leakage.json"))})
    for message in known.not_known():
        watch({"kind": "warning", "message": message})
    before = _json(home / "suite.json")
    write_whole(home / "questions.jsonl", "".join(json.dumps(row_of(q)) + "\n" for q in asked))
    # What is not given now stays: a judge that has judged.
    then = _json(home / ASKED) if before else {}
    now = {key: value for key, value in facts.items() if value is not None}
    write_whole(home / ASKED, json.dumps({**then, **now}, indent=1))
    checks: dict[str, Any] = dict(before.get("engine_check", {}))
    given: list[Answers] = []
    rows: list[EvalRow] = []
    for who in sources:
        own = _rows_there([home, *passed], who, facts, watch)
        if own is None:
            own = _answered(sources[who], asked, suite, evaluation, home / "unfinished", checks, watch)
        else:
            for folder in passed:
                checks |= {
                    one: check
                    for one, check in _json(folder / "suite.json").get("engine_check", {}).items()
                    if one == who
                }
        sources[who].let_go()  # the next one needs the room
        rows += own
        given.append(suites.answers_of(own, asked, who))
        further = range(1, evaluation.attempts)
        write_answers(
            home / "answers" / f"{who}.jsonl",
            given[-1],
            [suites.answers_of(own, asked, who, sample=sample) for sample in further],
        )
    if from_file:
        given.append(from_file)
    found: dict[str, Any] = {
        **before,
        "suite": suite.name,
        "model": name,
        "baseline": other,
        "questions": len(asked),
        "turns": sum(len(q.turns) for q in asked),
        "max_new_tokens": evaluation.max_new_tokens,
        "samples": evaluation.attempts,
        "engine": facts["engine"],
        "answers": {
            **{who: _answer_facts(rows, who) for who in sources},
            **({from_file.model: _file_facts(from_file, asked)} if from_file else {}),
        },
        "engine_check": checks,
        "leakage": _leak_facts(known, before.get("leakage", {})),
    }
    # The answers are whole from here on, whatever becomes of the judging.
    _write(home, found, rows, asked)
    engines.forget(home / "unfinished")
    with contextlib.suppress(OSError):
        (home / "unfinished").rmdir()
    if judge is None and not before.keys() & {"graded", "compared"}:
        watch(
            {"kind": "warning", "message": "No --judge is given: the answers are kept, nobody judges them."}
        )
    wanted: dict[str, tuple[Mode, str | None]] = {
        **({"graded": ("single", other)} if suite.grades else {}),
        **({"compared": ("pair", other)} if other is not None else {}),
    }
    ways = [Assignment(home / part, asked, given, mode, against) for part, (mode, against) in wanted.items()]
    judged = (
        judge_several(ways, judge, home=home, calibrated=calibrated, watch=watch) if judge and ways else []
    )
    for (part, (mode, against)), figures in zip(wanted.items(), judged, strict=False):
        found[part] = figures
        if leaked := known.leaked(asked):
            judgments = read_judgments(home / part / f"judgments_{mode}.jsonl")
            clean = met.clean_figures(judgments, asked, leaked, baseline=against)
            found["leakage"]["clean"][part] = {
                "ours": clean,
                "sentences": met.compared(part, found[part]["ours"], clean),
            }
    if known.leakage:
        write_whole(home / "leakage.json", json.dumps(known.leakage.as_dict(), indent=1, ensure_ascii=False))
    word, sentence = verdict(found)
    found |= {"verdict": word, "sentence": sentence, "doubts": doubts(found)}
    _write(home, found, rows, asked)
    return {**found, "output": str(home)}


def forecast(
    suite: Suite,
    judge: Judge,
    *,
    questions: str | Path | None,
    compared: bool,
    max_new_tokens: int,
    calibrated: bool = True,
    watch: Watch,
) -> dict[str, Any]:
    """What the judging of a suite would take as if every answer were as long as it may be; nobody is asked.

    Gives the judge's settings and the `estimate` as `judge_several` does. `compared` counts a baseline in.
    """
    asked = suite.questions(questions)
    names: tuple[str, ...] = ("model", "baseline") if compared else ("model",)
    # Equal answers are not judged, so each model has a letter of its own.
    given = [
        Answers(name, {q.id: (name[0] * (max_new_tokens * BYTES_PER_TOKEN),) * len(q.turns) for q in asked})
        for name in names
    ]
    other = names[1] if compared else None
    modes: dict[Mode, bool] = {"single": suite.grades, "pair": compared}
    wanted = [mode for mode, is_wanted in modes.items() if is_wanted]
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        ways = [Assignment(home / mode, asked, given, mode, other) for mode in wanted]
        found = judge_several(
            ways, _with_prompts(suite, judge), home=home, calibrated=calibrated, dry_run=True, watch=watch
        )
    return {name: found[0][name] for name in ("judge_settings", "prompts", "estimate")}


def _with_prompts(suite: Suite, judge: Judge) -> Judge:
    """The judge with the suite's own prompts, where it has none."""
    if suite.name != "arena" or judge.prompts is not None:
        return judge
    return judge.model_copy(update={"prompts": str(Path(__file__).with_name("arena_prompts.yaml"))})


def verdict(found: Mapping[str, Any]) -> tuple[str, str]:
    """What a suite's record comes to, as one word and as a sentence.

    A comparison decides where there is one, else the difference of grades; a grade alone is no verdict.
    """
    for part in ("compared", "graded"):
        for word, sentence in headline.verdicts(found.get(part, {})):
            return word, sentence
    answered = f"{found['model']} has answered {found['questions']} questions"
    return "not judged", f"{answered}; nobody has judged the answers."


def doubts(found: Mapping[str, Any]) -> list[str]:
    """What the verdict has to be read with."""
    said = [
        f"The engine check of {name} failed ({check['sentence']}), so this may be the engine's doing."
        for name, check in found["engine_check"].items()
        if not check["passed"]
    ]
    of_judge = [line for part in ("compared", "graded") for line in headline.doubts(found.get(part, {}))]
    told = [line for part in found["leakage"]["clean"].values() for line in part["sentences"]]
    return [*dict.fromkeys(of_judge), *said, *found["leakage"]["remarks"], *told]


def _leak_facts(known: met.Met, before: Mapping[str, Any]) -> dict[str, Any]:
    """What was met in training, without the texts, which leakage.json has."""
    found = known.leakage
    counted = (
        {
            "questions": found.questions,
            "trained": found.trained,
            "leaked": len(found.leaked),
            "review": len(found.review),
            "counts": dict(found.counts),
        }
        if found
        else {}
    )
    return {
        **counted,
        "remarks": known.sentences(),
        "unknown": dict(known.unknown),
        "clean": before.get("clean", {}),
    }


def _facts(
    suite: Suite,
    name: str,
    other: str | None,
    sources: Mapping[str, engines.Source],
    from_file: Answers | None,
    questions: Sequence[Question],
    evaluation: Evaluation,
    judge: Judge | None,
) -> dict[str, Any]:
    """All that a folder's answers and judgments depend on."""
    against = {who: source.identity() for who, source in sources.items()}
    if from_file and other is not None:
        against[other] = _sha256([[id, turns] for id, turns in from_file.turns.items()])
    return {
        "suite": suite.name,
        "questions": _sha256(
            [{k: v for k, v in asdict(q).items() if k != "group" or v is not None} for q in questions]
        ),
        "model": [name, against[name]],
        "max_new_tokens": evaluation.max_new_tokens,
        "samples": evaluation.attempts,
        "engine": engines.chosen(evaluation.engine, sources[name].device),
        "server": evaluation.server.base_url if evaluation.engine == "openai" else None,
        "baseline": [other, against[other]] if other is not None else None,
        "judge": [judge.model, load_prompts(judge.prompts).version] if judge else None,
    }


def folder_for(
    output: Path, facts: Mapping[str, Any], *, apart: bool, watch: Watch
) -> tuple[Path, list[Path]]:
    """The folder for what depends on these facts, and those before it that have others. Raises TunesmithError unless
    `apart`."""
    passed: list[Path] = []
    first = ""
    for number in itertools.count(1):
        folder = output if number == 1 else output.with_name(f"{output.name}-{number}")
        why = _different(folder, facts)
        if not why:
            break
        if not apart:
            raise TunesmithError(
                f"{folder} holds this suite with other settings, and is not written over.",
                found=why,
                fix="Give another --output, or the same settings.",
            )
        first = first or why
        passed.append(folder)
    if passed:
        watch({"kind": "decision", "name": "output", "value": str(folder), "reason": f"{output} has {first}"})
    return folder, passed


def _different(folder: Path, facts: Mapping[str, Any]) -> str:
    """In what a folder's answers differ from those that are wanted; empty where they go together."""
    if not (folder / "rows.jsonl").is_file():
        return ""
    before = _json(folder / ASKED)
    if not before:
        return "answers of which it is not known what they depend on"
    found = []
    for name, now in facts.items():
        then = before.get(name)
        # A baseline or a judge may come to answers that have none, and what a judge said stays when none is named.
        if (
            then == now
            or (then is None and name in ("baseline", "judge"))
            or (now is None and name == "judge")
        ):
            continue
        if name in ("model", "baseline") and then and now and then[0] == now[0]:
            found.append(f"the {name} {then[0]} as it was before its files changed")
        elif name == "questions":
            found.append("other questions or references")
        else:
            was, wanted = (str(v[0] if isinstance(v, list) else v) for v in (then, now))
            found.append(f"{name.replace('_', ' ')} {was} instead of {wanted}")
    return ", ".join(found)


def _rows_there(
    folders: Sequence[Path], name: str, facts: Mapping[str, Any], watch: Watch
) -> list[EvalRow] | None:
    """Rows of a model that one of the folders has to the same questions under the same settings."""
    role = "model" if facts["model"][0] == name else "baseline"
    same = ("suite", "questions", "max_new_tokens", "samples", "engine", "server")
    for folder in folders:
        before = _json(folder / ASKED)
        if any(before.get(key) != facts[key] for key in same) or facts[role][1] is None:
            continue
        if facts[role] not in (before.get("model"), before.get("baseline")):
            continue
        if not (folder / "rows.jsonl").is_file():
            continue
        if own := [row for row in read_rows(folder / "rows.jsonl") if row.model == name]:
            watch({"kind": "decision", "name": "answers", "value": f"those of {name} in {folder}",
                   "reason": "same model, questions and settings"})  # fmt: skip
            return own
    return None


def _write(home: Path, found: Mapping[str, Any], rows: Sequence[EvalRow], asked: Sequence[Question]) -> None:
    """The record with the grades that there are, and what was found."""
    write_rows(home / "rows.jsonl", _graded(rows, asked, home / "graded/judgments_single.jsonl"))
    write_whole(home / "suite.json", json.dumps(found, indent=1))


def is_file_of_answers(path: str) -> bool:
    """Whether a baseline is a file of answers rather than a model."""
    return Path(path).suffix.lower() in (".jsonl", ".json")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _names(model: str | Path, baseline: str | Path | None) -> tuple[str, str | None]:
    """Short names of both; where they are the same, the baseline's says what it is."""
    name = Path(str(model)).name
    if baseline is None:
        return name, None
    other = Path(str(baseline)).name.removesuffix(".jsonl").removesuffix(".json")
    return name, f"{other} (baseline)" if other == name else other


def load_for_suite(model: str) -> tuple[Any, Any]:
    """A causal model with its tokenizer, its chat template settled."""
    source = source_of(model)
    return source.model, source.tokenizer


def source_of(
    model: str, *, name: str = "model", server: Server | None = None, shards: Shards | None = None
) -> engines.Source:
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
        lambda place=device: models.load_model(model, dtype=dtype, device=place),
        model,
        dtype=dtype,
        device=device,
        server=server or Server(),
        shards=shards or Shards(),
    )


def _answered(
    source: engines.Source,
    questions: Sequence[Question],
    suite: Suite,
    evaluation: Evaluation,
    unfinished: Path,
    checks: dict[str, Any],
    watch: Watch,
) -> list[EvalRow]:
    """A model's rows, made here; `checks` gets what the engine check found."""
    name = source.name

    def checked(check: EngineCheck) -> None:
        checks[name] = check.as_dict()
        tell_check(watch, check)

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
        warn=warning(watch),
        progress=counting(watch),
    )
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


def _file_facts(answers: Answers, questions: Sequence[Question]) -> dict[str, Any]:
    """The same of a file, of which it is not known why an answer ended."""
    texts = [text for question in questions for text in answers.turns.get(question.id, ())]
    wanted = sum(len(question.turns) for question in questions)
    return {
        "turns": wanted,
        "without_answer": wanted - sum(not is_failed(text) for text in texts),
        "empty": sum(not text.strip() for text in texts),
    }


def _graded(rows: Sequence[EvalRow], questions: Sequence[Question], path: Path) -> list[EvalRow]:
    """The rows with their grades, of the sample that was graded."""
    judged = read_judgments(path) if path.is_file() else []
    grades = {(one.model, one.question, one.turn): one for one in judged if isinstance(one, Single)}
    found = []
    for row in rows:
        row = replace(
            row,
            scores={k: v for k, v in row.scores.items() if k != "judge_grade"},
            flags={k: v for k, v in row.flags.items() if k != "judge_grade"},
        )
        one = grades.get((row.model, questions[row.item].id, row.turn + 1)) if row.sample == 0 else None
        if one is None:
            found.append(row)
        elif one.score is None:
            found.append(replace(row, flags={**row.flags, "judge_grade": [one.error]}))
        else:
            found.append(replace(row, scores={**row.scores, "judge_grade": one.score}))
    return found
