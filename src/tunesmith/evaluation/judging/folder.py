"""A folder of judgments: the answers judged, the figures computed, the judge's calibration beside them.

judgments_single.jsonl or judgments_pair.jsonl   the record, in FastChat's format
replies.jsonl       what was paid for (the judge's `cache`)
figures.json        every figure, with settings, calibration and costs
judged.html         bar and radar plots with intervals
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError, RunError
from tunesmith.evaluation.judging import asking, calibration, headline
from tunesmith.evaluation.judging.asking import Asker, Request
from tunesmith.evaluation.judging.book import Book, key
from tunesmith.evaluation.judging.figures import agreement, length_figures
from tunesmith.evaluation.judging.judging import Job, Judged, is_asked, jobs, judge_all, requests
from tunesmith.evaluation.judging.judgments import Answers, Id, Question, read_answers, write_judgments
from tunesmith.evaluation.judging.plots import write_page
from tunesmith.evaluation.judging.prompts import Mode, load_prompts, split
from tunesmith.evaluation.judging.questions import read_questions
from tunesmith.evaluation.judging.replay import computed
from tunesmith.evaluation.judging.settings import Judge
from tunesmith.evaluation.rows import EvalRow, read_rows
from tunesmith.training.run import Watch, counting, write_whole


@dataclass(frozen=True)
class Assignment:
    """Answers that are to be judged one way, and the folder that it is written to."""

    folder: Path
    questions: Sequence[Question]
    answers: Sequence[Answers]
    mode: Mode
    baseline: str | None = None


def judge_into(
    folder: Path,
    judge: Judge,
    questions: Sequence[Question],
    answers: Sequence[Answers],
    *,
    mode: Mode,
    baseline: str | None = None,
    calibrated: bool = True,
    dry_run: bool = False,
    home: Path | None = None,
    watch: Watch,
) -> dict[str, Any]:
    """Judge answers one way and write the folder; gives what `figures.json` holds. See `judge_several`."""
    assignment = Assignment(folder, questions, answers, mode, baseline)
    [found] = judge_several(
        [assignment], judge, home=home or folder, calibrated=calibrated, dry_run=dry_run, watch=watch
    )
    return found


def judge_several(
    assignments: Sequence[Assignment],
    judge: Judge,
    *,
    home: Path,
    calibrated: bool = True,
    dry_run: bool = False,
    watch: Watch,
) -> list[dict[str, Any]]:
    """Judge answers in one or several ways and write the folders; gives what each `figures.json` holds.

    Replies and calibration lie in `home`, for all to share: one forecast is told before the first call, and one budget
    holds for all of it. With `dry_run` nothing is asked. Raises RunError where the judging has to stop: the same call
    goes on from there.
    """
    texts = load_prompts(judge.prompts)
    todo = [jobs(one.questions, one.answers, one.mode, baseline=one.baseline) for one in assignments]
    if not all(todo):
        raise DataError(
            "There is nothing to judge: no question has a turn.", fix="Give questions with one turn or more."
        )
    messages = [
        message
        for one in assignments
        for message in [*own_kind(judge, one.answers), *unanswered(one.questions, one.answers), *constant(one.answers)]
    ]  # fmt: skip
    for message in dict.fromkeys(messages):
        watch({"kind": "warning", "message": message})
    asker = asking.asker(judge)
    path = Path(judge.cache).expanduser() if judge.cache else home / "replies.jsonl"
    own = _kept(home, calibration.mark(asker, texts))
    twice = [_twice(each, judge.recheck) for each in todo]
    planned: dict[str, list[Request]] = {
        "to calibrate": requests(calibration.jobs(), asker, texts, ask_identical=True)
        if calibrated and own is None
        else [],
        "to judge": [r for each in todo for r in requests(each, asker, texts)],
        "to recheck": [
            r
            for each, again in zip(todo, twice, strict=True)
            for r in requests([each[n] for n in again], asker, texts, again=1)
        ],
    }
    with Book(path) as book:
        forecast = asking.forecast(judge, planned, book)
    if not dry_run:  # whose answer is the forecast
        watch(
            {
                "kind": "decision",
                "name": "the judge will cost",
                "value": forecast.sentence(),
                "reason": "estimated before the first call",
            }
        )
    if above := forecast.too_much():
        watch({"kind": "warning", "message": above})
    about = {
        "judge_settings": judge.model_dump(mode="json"),
        "prompts": {"source": texts.source, "version": texts.version},
        "estimate": asdict(forecast),
    }
    if dry_run:
        return [{**about, "mode": one.mode} for one in assignments]
    if calibrated and own is None:
        own = calibrate_into(home, judge, asker, watch)
    if own is None:
        watch(
            {
                "kind": "warning",
                "message": "The judge is not calibrated: what its word is worth is not known.",
            }
        )
    elif not all(calibration.is_trustworthy(own, one.mode) for one in assignments):
        watch({"kind": "warning", "message": f"The judge is not to be trusted: {calibration.sentence(own)}."})

    def ask(todo: Sequence[Job], again: int = 0) -> Judged:
        stage = f"{asker.name} judges" + (" again" if again else "")
        made = judge_all(
            todo,
            judge,
            asker,
            texts,
            path,
            again=again,
            progress=partial(counting(watch), stage),
        )
        if made.repaired:
            watch({"kind": "warning", "message": f"The last line of {path} was cut off and taken away."})
        return made

    results = []
    for one, each, again in zip(assignments, todo, twice, strict=True):
        made = ask(each)
        spent, recheck = made.spent, {}
        if again:
            second = ask([each[n] for n in again], 1)
            spent = second.spent
            recheck = {"recheck": agreement([made.judgments[n] for n in again], second.judgments)}
        file = write_judgments(one.folder / f"judgments_{one.mode}.jsonl", made.judgments)
        found = {
            **computed(made.judgments, questions=one.questions, baseline=one.baseline),
            **about,
            "mode": one.mode,
            "judge": [asker.name],
            "file": str(file),
            "calibration": own,
            **({"lengths": _lengths(made.judgments, one.answers)} if one.mode == "pair" else {}),
            **recheck,
            "spent": dict(spent),
        }
        found["verdicts"] = [{"verdict": word, "sentence": said} for word, said in headline.verdicts(found)]
        found["doubts"] = headline.doubts(found)
        write_whole(one.folder / "figures.json", json.dumps(found, indent=1))
        write_page(one.folder / "judged.html", found)
        results.append(found)
    return results


def _twice(todo: Sequence[Job], share: float) -> list[int]:
    """Which jobs are done twice: a share of those that a judge is asked, the same ones in every order of the jobs."""
    order = sorted(
        (n for n, job in enumerate(todo) if is_asked(job)),
        key=lambda n: key("twice", todo[n].model, todo[n].question.id, todo[n].turn),
    )
    return order[: math.ceil(share * len(order))]


def calibrate_into(folder: Path, judge: Judge, asker: Asker, watch: Watch) -> dict[str, Any]:
    """Ask a judge about pairs of known outcome and keep the counts as `calibration.json`."""
    texts = load_prompts(judge.prompts)
    book = Path(judge.cache).expanduser() if judge.cache else folder / "replies.jsonl"
    found = calibration.calibrate(
        judge,
        asker,
        texts,
        book,
        progress=partial(counting(watch), f"{asker.name} is calibrated"),
    )
    write_whole(folder / "calibration.json", json.dumps(found, indent=1))
    watch(
        {
            "kind": "decision",
            "name": "calibration",
            "value": calibration.sentence(found),
            "reason": "answers of known worth",
        }
    )
    return found


def answered(
    paths: Sequence[str | Path], *, say: Callable[[str], None] = lambda message: None
) -> tuple[list[Question], list[Answers]]:
    """Answers of FastChat files, or of runs and `rows.jsonl` files, which bring their questions along.

    Those of a suite bring the questions that lie in its folder. `say` hears what the judge will not see. Raises
    DataError for files that cannot go together.
    """
    questions: dict[Id, Question] = {}
    found: list[Answers] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            path = next(
                (p for p in (path / "evaluation/rows.jsonl", path / "rows.jsonl") if p.is_file()), path
            )
        if path.is_dir():
            raise RunError(f"There are no answers in {given}.", fix="Evaluate the run first, or name a file.")
        if path.name == "rows.jsonl":
            rows = _filled([row for row in read_rows(path) if row.sample == 0])
            _take_questions(questions, rows, path)
            found += _answers_in(rows)
            # Rows of suites hold every turn as a question of its own.
            silent = sum(
                row.conversation is None and not {"category", "suite"} & row.generation.keys() for row in rows
            )
            if silent:
                say(
                    f"{silent} of {len(rows)} rows of {path} do not hold what was said before the last question: the "
                    "judge does not see it. Evaluate again, and it will."
                )
        else:
            found.append(read_answers(path))
            beside = path.parent.parent / "questions.jsonl"
            if path.parent.name == "answers" and beside.is_file():
                theirs = {question.id: question for question in read_questions(beside)}
                if any(questions.get(id, question) != question for id, question in theirs.items()):
                    raise DataError(
                        "These files answer different questions of the same numbers.",
                        found=str(beside),
                        fix="Give --questions FILE.",
                    )
                questions |= theirs
    names = [one.model for one in found]
    if len(set(names)) < len(names):
        raise DataError(
            "Two files hold answers of a model of the same name.",
            found=", ".join(names),
            fix="Judge one after the other, or change `model_id` in one of the files.",
        )
    return list(questions.values()), found


def _filled(rows: Sequence[EvalRow]) -> list[EvalRow]:
    """Rows of a former version, as a base's that were used again, with the conversation of another model's row."""
    known = {
        (row.item, row.turn, row.prompt_text): row.conversation
        for row in rows
        if row.conversation is not None
    }
    return [
        row
        if row.conversation is not None
        else replace(row, conversation=known.get((row.item, row.turn, row.prompt_text)))
        for row in rows
    ]


def _take_questions(questions: dict[Id, Question], rows: Sequence[EvalRow], path: Path) -> None:
    """Add the questions that somebody answers to those that are known. Raises DataError where a number is that of two
    different texts, as the answers to one would be judged by the other."""
    asked = {row.item for row in rows if row.output is not None}
    by_model: dict[tuple[str, int], list[EvalRow]] = {}
    for row in sorted(rows, key=lambda r: (r.item, r.turn)):
        if row.item in asked:
            by_model.setdefault((row.model, row.item), []).append(row)
    for (model, item), turns in by_model.items():
        said: tuple[tuple[str, str], ...] = ()
        texts = [row.prompt_text for row in turns]
        if turns[0].conversation:
            said, texts[0] = split([(m["role"], m["content"]) for m in turns[0].conversation])
        new = Question(
            item, str(turns[0].generation.get("category", "")), tuple(texts), tuple(r.reference for r in turns),
            before=said, group=turns[0].group,
        )  # fmt: skip
        old = questions.setdefault(item, new)
        if (old.turns, old.references, old.before) != (new.turns, new.references, new.before):
            raise DataError(
                f"Question {item} is not one question: {model} in {path} was asked something else than others.",
                found=_differing(old, new),
                fix="Judge answers to the same questions: evaluate all models on the same rows.",
            )


def _differing(old: Question, new: Question) -> str:
    for name in ("turns", "references", "before"):
        a, b = repr(getattr(old, name)), repr(getattr(new, name))
        if a != b:
            at = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            start = max(0, at - 20)
            return f"{name} ...{a[start : start + 60]}... and ...{b[start : start + 60]}..."
    return "the same texts"


def _answers_in(rows: Sequence[EvalRow]) -> list[Answers]:
    """By model its answers of the first sample, each up to the first turn that has none."""
    by_model: dict[str, dict[Id, list[str | None]]] = {}
    for row in sorted(rows, key=lambda r: (r.item, r.turn)):
        by_model.setdefault(row.model, {}).setdefault(row.item, []).append(row.output)
    return [
        Answers(model, {
            item: tuple(text for text in takewhile(lambda text: text is not None, turns) if text is not None)
            for item, turns in items.items() if turns[0] is not None
        })
        for model, items in by_model.items()
    ]  # fmt: skip


def has_base(answers: Sequence[Answers]) -> bool:
    """Whether a run's base is among several models, so that the others are measured against it."""
    return len(answers) > 1 and any(one.model == "base" for one in answers)


def own_kind(judge: Judge, answers: Sequence[Answers]) -> list[str]:
    """What is to be said of a judge that judges itself; judges favour their own words."""
    name = Path(judge.model).name
    return [f"The judge {name} judges its own answers" for one in answers if Path(one.model).name == name]


def unanswered(questions: Sequence[Question], answers: Sequence[Answers]) -> list[str]:
    """What is to be said of questions without answers. Raises DataError where a model answers none of them."""
    found = []
    for one in answers:
        missing = sum(one.up_to(q.id, len(q.turns)) is None for q in questions)
        if not any(q.id in one.turns for q in questions):
            raise DataError(
                f"{one.model} answers none of the {len(questions)} questions.",
                found=f"answers to {', '.join(map(repr, list(one.turns)[:5]))}",
                fix="Give the question file that these answers belong to.",
            )
        if missing:
            found.append(
                f"{one.model} has no whole answer to {missing} of {len(questions)} questions: counted as errors"
            )
        if other := len(one.turns.keys() - {q.id for q in questions}):
            found.append(f"{one.model} answers {other} questions that are not asked here: left out")
    return found


CONSTANT_SHARE = 0.2
"""Share of all questions that may get one and the same answer before it is told: judges have been fooled by one."""


def constant(answers: Sequence[Answers]) -> list[str]:
    """What is to be said of models that answer many questions alike."""
    found = []
    for one in answers:
        said = Counter(turns[0].strip() for turns in one.turns.values() if turns)
        for text, times in said.most_common(1):
            if times >= 3 and times > CONSTANT_SHARE * len(one.turns):
                found.append(
                    f"{one.model} gives {times} of {len(one.turns)} questions the same answer: {text[:80]!r}"
                )
    return found


def _lengths(judgments: Sequence[Any], answers: Sequence[Answers]) -> list[dict[str, Any]]:
    texts = {
        (one.model, id, turn): text
        for one in answers
        for id, turns in one.turns.items()
        for turn, text in enumerate(turns, start=1)
    }
    return length_figures(judgments, texts)


def _kept(folder: Path, mark: str) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("mark") == mark else None
