"""Every figure of a judgment file again, without asking anyone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError, counted, nearest
from tunesmith.evaluation.judging import figures
from tunesmith.evaluation.judging.judgments import Pair, Question, Single, read_judgments
from tunesmith.evaluation.judging.questions import read_questions, shipped, with_categories


def replay(
    path: str | Path,
    *,
    questions: str | Path | None = None,
    baseline: str | None = None,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """The figures of a judgment file, FastChat's or ours: `fastchat` as its `show_result` prints them from the
    outcomes that the file keeps, `ours` from its replies read again.

    Raises DataError for a file that holds no judgments, and for a baseline that is not in it.
    """
    judgments = read_judgments(path)
    known, whose = (read_questions(questions), str(questions)) if questions else _numbered(judgments)
    return {
        "file": str(path),
        "categories_of": whose,
        "judge": sorted({one.judge for one in judgments}),
        **computed(judgments, questions=known, baseline=baseline, confidence=confidence),
    }


def computed(
    judgments: Sequence[Single] | Sequence[Pair],
    *,
    questions: Sequence[Question] = (),
    baseline: str | None = None,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Both kinds of figures of judgments, with how many outcomes the strict reader changed."""
    again, changed = figures.reread(judgments)
    singles = [one for one in judgments if isinstance(one, Single)]
    common = {"rows": len(judgments), "confidence": confidence, "reread_differently": changed}
    if singles:
        if baseline:
            raise DataError(
                "Grades have no baseline.", fix="Leave --baseline out, or judge with `--mode pair`."
            )
        ours = figures.single_figures(
            [one for one in again if isinstance(one, Single)], questions=questions, confidence=confidence
        )
        return {"kind": "single", **common, "fastchat": figures.fastchat_single(singles), "ours": ours}
    pairs = [one for one in judgments if isinstance(one, Pair)]
    names = {side for one in pairs for side in (one.model_1, one.model_2)}
    if baseline is not None and baseline not in names:
        raise DataError(f"The baseline '{baseline}' is in no judgment.", fix=nearest(baseline, names))
    ours = figures.pair_figures(
        [one for one in again if isinstance(one, Pair)],
        baseline=baseline,
        questions=questions,
        confidence=confidence,
    )
    return {"kind": "pair", **common, "fastchat": figures.fastchat_pair(pairs, baseline), "ours": ours}


def _numbered(judgments: Sequence[Single] | Sequence[Pair]) -> tuple[list[Question], str | None]:
    """The questions by whose numbers alone a file's categories are known, FastChat's or our own, and whose they are."""
    ids = {one.question for one in judgments}
    known = with_categories(
        [Question(id, "", ("", "")) for id in sorted(ids, key=lambda id: (len(str(id)), str(id)))]
    )
    if all(question.category for question in known):
        return known, "FastChat's questions 81 to 160"
    own = {question.id: question for question in shipped()}
    if all(id in own for id in ids):
        return [question for question in own.values() if question.id in ids], "the questions that ship"
    return [], None


def sentences(found: dict[str, Any]) -> list[str]:
    """The figures as people read them, the warning first where there is one."""
    lines = []
    if found["kind"] == "single":
        for name, model in found["ours"]["models"].items():
            if model["score"]["value"] is None:
                lines.append(
                    f"{name}: not graded, as none of {counted(model['n'], 'judgment')} has a verdict"
                )
                continue
            lines.append(f"{name}: grade {_of(model['score'], 2)} of 10{_doubts(model, 2)}")
            lines += [
                f"  turn {turn}: {_of(e, 2)}" for turn, e in model["turns"].items() if len(model["turns"]) > 1
            ]
            lines += [f"  {category}: {_of(e, 2)}" for category, e in model["categories"].items()]
        for d in found["ours"]["differences"]:
            lines.append(
                f"{d['model']} less {d['against']}: {_of(d['difference'], 2)}, higher in {d['wins']}, "
                f"equal in {d['ties']}, lower in {d['losses']}"
            )
    else:
        for pair in found["ours"]["pairs"]:
            if pair["win_rate"]["value"] is None:
                lines.append(
                    f"{pair['model']} against {pair['against']}: not compared, as none of "
                    f"{counted(pair['n'], 'judgment')} has a verdict"
                )
                continue
            lines.append(
                f"{pair['model']} against {pair['against']}: win rate {_of(pair['win_rate'], 3)}, "
                f"where .5 is as good; {pair['wins']} won, {pair['ties']} tied, {pair['losses']} lost{_doubts(pair, 3)}"
            )
            lines.append(
                f"  the judge: both orders agree in {_share(pair['consistency'])}, flips with the order in "
                f"{_share(pair['flip_rate']['value'])}, prefers the first slot in {_share(pair['first_slot']['value'])}"
            )
            lines += [f"  {category}: {_of(e, 3)}" for category, e in pair["categories"].items()]
    for entry in found.get("lengths", ()):
        if entry["longer_won"]["value"] is not None:
            a, b = (round(length) for length in entry["characters"])
            lines.append(
                f"  lengths: {a:,} characters against {b:,}; the longer answer won in "
                f"{_share(entry['longer_won']['value'])} of the items that were decided"
            )
    if (twice := found.get("recheck")) and twice["n"]:
        lines.append(
            f"Asked twice about {twice['n']}, the judge said the same in {_share(twice['same'])}; the values are "
            f"{twice['distance']:.2f} apart on average."
        )
    if found["reread_differently"]:
        lines.append(f"{found['reread_differently']} of {found['rows']} outcomes differ from those in the file, "
                     "read strictly.")  # fmt: skip
    if found.get("categories_of"):
        lines.append(f"Categories are those of {found['categories_of']}.")
    if found["ours"]["repeated"]:
        lines.append(f"{found['ours']['repeated']} judgments were made again; the last one counts.")
    return lines


def _of(estimate: dict[str, Any], digits: int) -> str:
    if estimate["value"] is None:
        return "nothing judged"
    value, low, high = (f"{estimate[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}] (n={estimate['n']})"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _doubts(entry: dict[str, Any], digits: int) -> str:
    parts = []
    if entry["errors"]:
        low, high = (f"{bound:.{digits}f}" for bound in entry["bounds"])
        parts.append(
            f"{entry['errors']} of {entry['n']} without a verdict ({low} to {high} if all went one way)"
        )
    if entry.get("missing_turns"):
        parts.append(f"{entry['missing_turns']} turns missing")
    if not entry["is_conclusive"]:
        parts.append("inconclusive: too many are missing")
    return "".join(f"; {part}" for part in parts)


def fastchat_sentences(found: dict[str, Any]) -> list[str]:
    """What FastChat's `show_result` prints of the same file, to its digits."""
    lines = []
    for name, row in found["fastchat"].items():
        if found["kind"] == "single":
            values = (f"{label} {_six(row[key])}" for label, key in
                      (("turn 1", "turn_1"), ("turn 2", "turn_2"), ("average", "average")))  # fmt: skip
            lines.append(f"FastChat prints {name}: {', '.join(values)} (grades of 1 to 10, errors left out)")
        else:
            lines.append(
                f"FastChat prints {name}: {row['win']} wins, {row['loss']} losses, {row['tie']} ties of {row['n']}; "
                f"win rate {_six(row['win_rate'])}, loss rate {_six(row['loss_rate'])}, adjusted win rate "
                f"{_six(row['win_rate_adjusted'])} (ties half; errors left out)"
            )
    return lines or ["FastChat prints nothing: every row has an error."]


def _six(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"
