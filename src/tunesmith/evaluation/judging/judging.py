"""Judging a set of questions: which requests it takes, and what their replies say of the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError, nearest
from tunesmith.evaluation.judging import asking, figures, prompts, verdicts
from tunesmith.evaluation.judging.asking import Asker, Request
from tunesmith.evaluation.judging.book import Book, Entry, key
from tunesmith.evaluation.judging.judgments import Answers, Pair, Question, Single, Winner
from tunesmith.evaluation.judging.prompts import Mode, Prompts, Turn
from tunesmith.evaluation.judging.settings import Judge

NO_ANSWER = "no answer to judge"
IDENTICAL = "identical answers, not asked"


@dataclass(frozen=True)
class Job:
    """One judgment to make: a grade of one answer, or both games of a comparison."""

    question: Question
    turn: int
    model: str
    answers: tuple[str, ...] | None
    """The model's answers up to the turn; None where one is missing."""
    other: str | None = None
    """The model that it is compared with."""
    other_answers: tuple[str, ...] | None = None
    other_first: tuple[str, ...] | None = None
    """What the other model says in the second game, in which it is shown first, where that is not the same."""


@dataclass(frozen=True)
class Judged:
    """Judgments in the order of their jobs, and what the book's calls came to."""

    judgments: list[Single] | list[Pair]
    spent: Mapping[str, Any]
    repaired: bool


def jobs(
    questions: Sequence[Question], answers: Sequence[Answers], mode: Mode, *, baseline: str | None = None
) -> list[Job]:
    """Every judgment that a set of answers takes: of each model each turn, or of each pair of models.

    With a baseline only its pairs, the baseline second. Raises DataError where there is nothing to compare.
    """
    if mode == "single":
        return [
            Job(q, turn, one.model, one.up_to(q.id, turn))
            for one in answers
            for q in questions
            for turn in range(1, len(q.turns) + 1)
        ]
    names = [one.model for one in answers]
    if len(set(names)) < len(names) or len(names) < 2:
        raise DataError(
            "A comparison needs the answers of two models or more, of different names.",
            found=", ".join(names) or "none",
            fix="Name answers of another model, too, or grade these: --mode single.",
        )
    if baseline is not None and baseline not in names:
        raise DataError(
            f"There are no answers of the baseline '{baseline}'.",
            found=f"answers of {', '.join(names)}",
            fix=nearest(baseline, names),
        )
    pairs = [
        (one, other)
        for n, one in enumerate(answers)
        for other in answers[n + 1 :]
        if baseline is None or baseline in (one.model, other.model)
    ]
    sides = [(b, a) if a.model == baseline else (a, b) for a, b in pairs]
    return [
        Job(q, turn, a.model, a.up_to(q.id, turn), b.model, b.up_to(q.id, turn))
        for a, b in sides
        for q in questions
        for turn in range(1, len(q.turns) + 1)
    ]


def judge_all(
    todo: Sequence[Job],
    judge: Judge,
    asker: Asker,
    texts: Prompts,
    book_path: Path,
    *,
    ask_identical: bool = False,
    again: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Judged:
    """The judgments of all jobs.

    Answers of two models that are the same are a tie without asking, unless `ask_identical`. With `again` the judge
    is asked anew, and what it says is kept apart from its first word. Raises RunError where the judging has to
    stop; run again, it goes on from the book.
    """
    planned = [_requests(job, asker, texts, ask_identical, again) for job in todo]
    with Book(book_path) as book:
        flat = [request for several in planned for request in several]
        replies = asking.ask(flat, asker, judge, texts, book, progress=progress)
        made = [
            _judgment(job, several, replies, asker.name, texts)
            for job, several in zip(todo, planned, strict=True)
        ]
        singles = [one for one in made if isinstance(one, Single)]
        pairs = [one for one in made if isinstance(one, Pair)]
        return Judged(singles or pairs, asking.spent(judge, book), book.repaired)


def requests(
    todo: Sequence[Job], asker: Asker, texts: Prompts, *, ask_identical: bool = False, again: int = 0
) -> list[Request]:
    """What the jobs ask, in the order in which `judge_all` asks it."""
    return [request for job in todo for request in _requests(job, asker, texts, ask_identical, again)]


def turns_of(job: Job) -> list[Turn]:
    """The conversation as the judge sees it, up to the job's turn."""
    q = job.question
    return [Turn(text, q.reference(n)) for n, text in enumerate(q.turns[: job.turn], start=1)]


def _requests(job: Job, asker: Asker, texts: Prompts, ask_identical: bool, again: int = 0) -> list[Request]:
    """None where there is nothing to ask, one for a grade, two for a comparison."""
    turns, specials = turns_of(job), asker.specials
    shown: list[Any] = [asdict(turn) for turn in turns]
    before = job.question.before
    if before:
        shown.append(before)
    facts = (
        "single" if job.other is None else "pair", dict(asker.facts), texts.version, shown, *([again] if again else []),
    )  # fmt: skip
    if job.answers is None or (job.other is not None and job.other_answers is None):
        return []
    if job.other_answers is None:
        messages = prompts.single(texts, turns, job.answers, before=before, specials=specials)
        return [Request(key(*facts, job.answers), messages, lambda text: verdicts.rating(text) is not None)]
    if job.answers == job.other_answers and not ask_identical:
        return []
    games = ((job.answers, job.other_answers), (job.other_first or job.other_answers, job.answers))
    return [
        Request(
            # The same two texts in the other order are another game, and so are two that are the same.
            key(*facts, a, b, *([game] if a == b else [])),
            prompts.pair(texts, turns, a, b, before=before, specials=specials),
            lambda text: verdicts.verdict(text) is not None,
        )
        for game, (a, b) in enumerate(games)
    ]


def _judgment(
    job: Job, requests: Sequence[Request], replies: Mapping[str, Entry | str], judge: str, texts: Prompts
) -> Single | Pair:
    found = [replies[request.key] for request in requests]
    said = [entry.reply.text if isinstance(entry, Entry) else "" for entry in found]
    shown = [entry.messages[1]["content"] if isinstance(entry, Entry) else "" for entry in found]
    last = max((entry.time for entry in found if isinstance(entry, Entry)), default=0.0)
    name = f"tunesmith-{'single' if job.other is None else 'pair'}" + ("-multi-turn" if job.turn > 1 else "")
    if job.other is None:
        score = verdicts.rating(said[0]) if found else None
        why = "" if score is not None else _why(found, NO_ANSWER)
        flags = tuple(prompts.suspicions(job.answers[-1])) if job.answers else ()
        return Single(
            job.question.id, job.model, job.turn, score, said[0] if found else "", judge, name, why, flags,
            texts.version, last, shown[0] if found else "",
        )  # fmt: skip
    if not found and job.answers is not None and job.answers == job.other_answers:
        return Pair(
            job.question.id, job.model, job.other, job.turn, "tie", "tie", "", "", judge, name,
            flags=(IDENTICAL,), version=texts.version,
        )  # fmt: skip
    winners: list[Winner] = ["error", "error"]
    errors = [NO_ANSWER, NO_ANSWER]
    if found:
        winners = [
            figures.winner(verdicts.verdict(text), swapped=bool(game)) for game, text in enumerate(said)
        ]
        errors = [
            "" if one != "error" else _why([entry], NO_ANSWER)
            for one, entry in zip(winners, found, strict=True)
        ]
    flags = tuple(
        f"{model}: {flag}"
        for model, texts_ in ((job.model, job.answers), (job.other, job.other_answers))
        for flag in (prompts.suspicions(texts_[-1]) if texts_ else [])
    )
    text_1, text_2 = said or ["", ""]
    return Pair(
        job.question.id, job.model, job.other, job.turn, winners[0], winners[1], text_1, text_2, judge, name,
        (errors[0], errors[1]), flags, texts.version, last, (shown[0], shown[1]) if shown else ("", ""),
    )  # fmt: skip


def _why(found: Iterable[Entry | str], nothing: str) -> str:
    for entry in found:
        return entry if isinstance(entry, str) else "a reply without a verdict"
    return nothing
