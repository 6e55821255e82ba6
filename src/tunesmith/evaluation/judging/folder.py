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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError, RunError
from tunesmith.evaluation.judging import asking, calibration
from tunesmith.evaluation.judging.asking import Asker, Estimate
from tunesmith.evaluation.judging.book import key
from tunesmith.evaluation.judging.figures import agreement, length_figures
from tunesmith.evaluation.judging.judging import estimated, jobs, judge_all
from tunesmith.evaluation.judging.judgments import Answers, Question, read_answers, write_judgments
from tunesmith.evaluation.judging.plots import write_page
from tunesmith.evaluation.judging.prompts import Mode, load_prompts
from tunesmith.evaluation.judging.questions import read_questions
from tunesmith.evaluation.judging.replay import computed
from tunesmith.evaluation.judging.settings import Judge
from tunesmith.evaluation.rows import read_rows
from tunesmith.training.run import Watch, write_whole


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
    """Judge answers and write the folder; gives what `figures.json` holds.

    Replies and calibration lie in `home`, by default the folder itself, for several judgings to share. With
    `dry_run` only the estimate is made, and nothing is asked. Raises RunError where the judging has to stop: the
    same call goes on from there.
    """
    todo = jobs(questions, answers, mode, baseline=baseline)
    if not todo:
        raise DataError("There is nothing to judge.")
    for message in [*own_kind(judge, answers), *unanswered(questions, answers), *constant(answers)]:
        watch({"kind": "warning", "message": message})
    texts = load_prompts(judge.prompts)
    asker = asking.asker(judge)
    home = home or folder
    book = Path(judge.cache).expanduser() if judge.cache else home / "replies.jsonl"
    about = {
        "judge_settings": judge.model_dump(mode="json"),
        "prompts": {"source": texts.source, "version": texts.version},
        "mode": mode,
    }
    if dry_run:
        estimate = estimated(todo, judge, asker, texts, book)
        _tell(watch, estimate)
        return {**about, "estimate": vars(estimate)}
    _tell(watch, estimated(todo, judge, asker, texts, book))  # before anything is asked, calibration included
    own = calibrate_into(home, judge, asker, watch) if calibrated else _kept(home, asker.name, texts.version)
    if own is None:
        watch(
            {
                "kind": "warning",
                "message": "The judge is not calibrated: what its word is worth is not known.",
            }
        )
    elif not calibration.is_trustworthy(own):
        watch({"kind": "warning", "message": f"The judge is not to be trusted: {calibration.sentence(own)}."})
    made = judge_all(
        todo,
        judge,
        asker,
        texts,
        book,
        progress=lambda done, total: watch(
            {"kind": "progress", "stage": f"{asker.name} judges", "done": done, "total": total}
        ),
    )
    if made.repaired:
        watch({"kind": "warning", "message": f"The last line of {book} was cut off and taken away."})
    twice = sorted(
        range(len(todo)), key=lambda n: key("twice", todo[n].model, todo[n].question.id, todo[n].turn)
    )
    twice = twice[: math.ceil(judge.recheck * len(todo))]
    again = judge_all([todo[n] for n in twice], judge, asker, texts, book, again=1) if twice else None
    if again:
        made = replace(made, spent=again.spent)
    file = write_judgments(folder / f"judgments_{mode}.jsonl", made.judgments)
    found = {
        **computed(made.judgments, questions=questions, baseline=baseline),
        **about,
        "judge": [asker.name],
        "file": str(file),
        "calibration": own,
        **({"lengths": _lengths(made.judgments, answers)} if mode == "pair" else {}),
        **({"recheck": agreement([made.judgments[n] for n in twice], again.judgments)} if again else {}),
        "estimate": vars(made.estimate),
        "spent": dict(made.spent),
    }
    write_whole(folder / "figures.json", json.dumps(found, indent=1))
    write_page(folder / "judged.html", found)
    return found


def calibrate_into(folder: Path, judge: Judge, asker: Asker, watch: Watch) -> dict[str, Any]:
    """Ask a judge about pairs of known outcome and keep the counts as `calibration.json`."""
    texts = load_prompts(judge.prompts)
    book = Path(judge.cache).expanduser() if judge.cache else folder / "replies.jsonl"
    if kept := _kept(folder, asker.name, texts.version):
        return kept
    found = calibration.calibrate(
        judge,
        asker,
        texts,
        book,
        progress=lambda done, total: watch(
            {"kind": "progress", "stage": f"{asker.name} is calibrated", "done": done, "total": total}
        ),
    )
    write_whole(folder / "calibration.json", json.dumps(found, indent=1))
    watch(
        {
            "kind": "decision",
            "name": "calibration",
            "value": calibration.sentence(found),
            "reason": "known pairs",
        }
    )
    return found


def answered(paths: Sequence[str | Path]) -> tuple[list[Question], list[Answers]]:
    """Answers of FastChat files, or of runs and `rows.jsonl` files, which bring their questions along.

    Those of a suite bring the questions that lie in its folder. Raises DataError for files that cannot go together.
    """
    questions: dict[int | str, Question] = {}
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
            asked, several = _rows(path)
            questions |= asked
            found += several
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
        raise DataError("Two files hold answers of a model of the same name.", found=", ".join(names))
    return list(questions.values()), found


def _rows(path: Path) -> tuple[dict[int | str, Question], list[Answers]]:
    """Questions and answers of evaluation rows: of each item all turns, of the first sample."""
    rows = [row for row in read_rows(path) if row.output is not None and row.sample == 0]
    by_item: dict[str, dict[int, list[Any]]] = {}
    for row in sorted(rows, key=lambda r: (r.item, r.turn)):
        by_item.setdefault(row.model, {}).setdefault(row.item, []).append(row)
    questions: dict[int | str, Question] = {}
    for items in by_item.values():
        for item, turns in items.items():
            questions[item] = Question(
                item, str(turns[0].generation.get("category", "")), tuple(r.prompt_text for r in turns),
                tuple(r.reference for r in turns),
            )  # fmt: skip
    answers = [
        Answers(model, {item: tuple(r.output for r in turns) for item, turns in items.items()})
        for model, items in by_item.items()
    ]
    return questions, answers


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


def _kept(folder: Path, judge: str, version: str) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(found, dict) and (found.get("judge"), found.get("prompt_version")) == (judge, version)
    return found if same else None


def _tell(watch: Watch, estimate: Estimate) -> None:
    watch(
        {
            "kind": "decision",
            "name": "the judge will cost",
            "value": estimate.sentence(),
            "reason": "estimated",
        }
    )
