"""report.html: one self-contained page, made from the run folder alone, that opens offline.

The verdict comes first, then the scores, the answers side by side, and how the model came to be. A part
whose file is missing or damaged says so in its place.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any

from tunesmith.errors import RunError
from tunesmith.evaluation.classification import UNPARSED, Classification, classification
from tunesmith.evaluation.compare import (
    Comparison,
    amount,
    difference_shown,
    remarks,
    sentence,
    shown,
    table,
    table_of_many,
)
from tunesmith.evaluation.leakage import KINDS, PASSAGE, Copied
from tunesmith.evaluation.metrics import METRICS, Metric
from tunesmith.evaluation.rows import EvalRow, read_rows
from tunesmith.training.run import EVENTS, Run, unwritable, without_retaken, write_whole

COMPARED_CHARACTERS = 2000
"""Beginning of an answer by which is told how much it changed."""
LEAKS_SHOWN = 20
"""Leaked pairs that the page has; evaluation/leakage.json has more."""
ANSWERS_OPEN = 20
"""Answers shown before the rest is folded away."""
FILES = {
    "recipe.yaml": "everything the run depends on",
    "environment.json": "versions and device",
    "plan.json": "what was worked out before the start, with reasons",
    "ledger.jsonl": "every input row and what became of it",
    EVENTS: "every metric, decision and state, in order",
    "evaluation/rows.jsonl": "every answer of both models, with scores",
    "evaluation/scores.json": "scores of each model with intervals",
    "evaluation/comparison.json": "base against tuned",
    "evaluation/general.jsonl": "how likely base and tuned model find general texts",
    "evaluation/forgetting.json": "what was learned and what was forgotten",
    "evaluation/parts.json": "base against tuned by category and by length",
    "evaluation/leakage.json": "held-out questions found in the training data, and copied answers",
    "evaluation/engine_check.json": "answers of each model, read again alone",
    "evaluation/stages.jsonl": "every answer of the models that the base was fine-tuned from",
    "evaluation/stages.json": "the scores of every stage",
    "final_model": "weights or adapter, tokenizer, template, model card",
    "status.json": "how the run ended; written last",
}


def told_in_report(run: Run | None, progress: Callable[[str, str, str], None]) -> None:
    """Have a run's report tell of what was added to the run. One that has none yet gets it when it is done; where the
    run may only be read, `progress` is told that it does not."""
    if not run or not (run.path / "report.html").is_file():
        return
    if why := unwritable(run.path):
        progress("report", "does not tell of it", why)
    else:
        write_report(run.path)


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run's folder, from what lies there."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    run, problems = Run(Path(run_dir)), list[str]()
    compared = _comparisons(run, problems)
    primary = next((c for c in compared if c.primary), None)
    rows = _rows(run, problems)
    ledger = _lines(run.path / "ledger.jsonl", problems)
    events = without_retaken(_lines(run.path / EVENTS, problems))
    plan = _json(run, "plan.json", problems) or {}
    text = _page().render(
        name=run.path.name,
        status=_json(run, "status.json", problems),
        primary=primary,
        verdict=sentence(primary) if primary else "No base and tuned model were compared in this run.",
        remarks=remarks(compared),
        table=table(compared) if compared else None,
        compared=[(c, METRICS[c.metric]) for c in compared],
        scores=_json(run, "evaluation/scores.json", problems),
        stages=_stages(run, problems),
        leaked=_leaked(run, problems),
        parts=parts_tables(run, problems),
        how_answered=how_answered(rows),
        found_from=_found_from,
        engine_checks=engine_checks(run, problems),
        answers=answers_side_by_side(rows, METRICS[primary.metric] if primary else None),
        labels=_labels(rows),
        answers_open=ANSWERS_OPEN,
        drawn=_drawn(events),
        figures=[*_figures(compared, events, ledger), *_learned_and_forgotten(run, problems)],
        difference_shown=difference_shown,
        # `<` would let data end the script element that carries it; as an escape it is the same JSON.
        as_json=lambda value: Markup(json.dumps(value).replace("<", "\\u003c")),
        plotly=Markup(get_plotlyjs()),
        fates=Counter(str(entry.get("fate")) for entry in ledger),
        reasons=Counter(
            (str(e.get("fate")), str(e["reason"])) for e in ledger if e.get("reason")
        ).most_common(),
        truncated=sum(1 for e in ledger if e.get("tokens_cut") and e.get("fate") != "dropped"),
        decisions=_decisions(plan, events),
        warnings=[_message(e) for e in events if e.get("kind") == "warning"],
        training=_json(run, "training.json", []),
        recipe=_text(run.path / "recipe.yaml", problems),
        environment=_json(run, "environment.json", problems),
        files=[(file, about) for file, about in FILES.items() if (run.path / file).exists()],
        problems=problems,
        judged=judged(run, problems),
        shipped=shipped(run, problems),
    )
    return write_whole(run.path / "report.html", text)


@dataclass(frozen=True)
class Measurement:
    """What was measured in a folder, for people to look through: verdict, scores, every answer."""

    names: tuple[str, str]
    """Of the two models; where one alone was measured the second is empty."""
    verdict: str
    """In a sentence."""
    kind: str
    """`better`, `worse`, `no evidence`, `inconclusive`; empty where nothing was compared."""
    remarks: tuple[str, ...]
    table: tuple[tuple[str, ...], ...]
    """A header, and a line for each metric with its interval."""
    answers: tuple[Mapping[str, Any], ...]
    """As `answers_side_by_side` gives them."""
    judged: tuple[Mapping[str, Any], ...]
    """What judges said: name, judge, lines, calibration, and the plots' figures."""
    problems: tuple[str, ...]
    """Files that are missing or damaged."""


def measurement(folder: Path) -> Measurement:
    """What was measured in a run's folder (its base against it), by `compare`, or by `evaluate` of one model."""
    run = Run(folder)
    place = Run(run.evaluation) if run.evaluation.is_dir() else run
    problems: list[str] = []
    content = _json(place, "comparison.json", []) or {}
    try:
        compared = [Comparison(**c) for c in content.get("comparisons", []) if c["metric"] in METRICS]
    except (TypeError, KeyError) as error:
        compared = []
        problems.append(f"comparison.json is not a comparison: {error}")
    try:
        rows = read_rows(place.path / "rows.jsonl")
    except RunError as error:
        rows = []
        problems.append(error.problem.replace(f"{place.path}/", ""))
    primary = next((c for c in compared if c.primary), None)
    known = list(content.get("models", {})) if isinstance(content.get("models"), dict) else []
    names = (known[0], known[1]) if len(known) == 2 else ("base", "tuned")
    if compared:
        many = len({c.model for c in compared}) > 1
        lines = table_of_many(compared) if many else table(compared, names)
        said = sentence(primary) if primary else "No metric was declared to rest a verdict on."
        answers = answers_side_by_side(rows, METRICS[primary.metric] if primary else None)
    else:
        names = (rows[0].model if rows else "model", "")
        scores = (_json(place, "scores.json", []) or {}).get("model") or {}
        lines = [["metric", "value [95 % interval]", "n", "not scored"]]
        lines += [
            [METRICS[m].named, _score(score, METRICS[m]), str(score["n"]), score["cause"] or ""]
            for m, score in scores.items()
            if m in METRICS
        ]
        said = "One model was measured; nothing was compared." if scores else "Nothing was measured here yet."
        first = next((METRICS[m] for m in scores if m in METRICS), None)
        answers = [
            {"question": r.prompt_text, "reference": r.reference, "source": r.source_row, "gain": 0.0, "moved": 0.0,
             "models": [_answer(names[0], r, first)]}
            for r in rows
        ]  # fmt: skip
    return Measurement(
        names=names,
        verdict=said,
        kind=primary.verdict if primary else "",
        remarks=tuple(remarks(compared)),
        table=tuple(tuple(line) for line in lines),
        answers=tuple(answers),
        judged=tuple(
            {**found, "figures": _judged_figures(run.evaluation / found["name"])}
            for found in judged(run, problems)
        ),
        problems=tuple(problems),
    )


def _judged_figures(folder: Path) -> list[dict[str, Any]]:
    """The plots of a judging: over all, the radar over categories, and bars by category."""
    from tunesmith.evaluation.judging.plots import figures_of

    try:
        return figures_of(json.loads((folder / "figures.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return []  # `judged` has told what is wrong with the file


VERDICTS = {True: "passed", False: "FAILED", None: "unproven"}
"""What `passed` in a verdict is called; None where nobody could ask the artefact."""


def shipped(run: Run, problems: list[str]) -> list[dict[str, Any]]:
    """What was made of the run's model to ship it, each with its verdict: the merged model, GGUF files."""
    found = []
    for file in sorted([*run.path.glob("*/parity.json"), *run.path.glob("exports/*/parity.json")]):
        name = str(file.relative_to(run.path))
        content = _json(run, name, problems)
        try:
            if content:
                lines = [*content["problems"], *content["sentences"]]
                found.append({"name": str(file.parent.relative_to(run.path)), "artefact": content["artefact"],
                              "passed": VERDICTS[content["passed"]], "lines": lines})  # fmt: skip
        except (KeyError, TypeError) as error:
            problems.append(f"{name} holds no verdict: {error!r}")
    return found


def judged(run: Run, problems: list[str]) -> list[dict[str, Any]]:
    """What judges said of the run's answers: figures in sentences, their calibration, and the page with the plots."""
    from tunesmith.evaluation.judging import calibration
    from tunesmith.evaluation.judging.replay import sentences

    found = []
    for file in sorted([*run.evaluation.glob("*/figures.json"), *run.evaluation.glob("*/*/figures.json")]):
        content = _json(run, str(file.relative_to(run.path)), problems)
        try:
            own = content and content.get("calibration")
            said = sentences(content) if content else []
            told = calibration.sentence(own) if own else "not calibrated: what its word is worth is not known"
            judge = ", ".join(content["judge"]) if content else ""
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            problems.append(f"{file.relative_to(run.path)} holds no judgments: {error!r}")
            continue
        if said:
            name = str(file.parent.relative_to(run.evaluation))
            page = file.with_name("judged.html").relative_to(run.path)
            found.append(
                {"name": name, "judge": judge, "lines": said, "calibration": told, "page": str(page)}
            )
    return found


@cache
def _page() -> Any:
    """The page's template, compiled once in a process."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tunesmith.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


def _comparisons(run: Run, problems: list[str]) -> list[Comparison]:
    content = _json(run, "evaluation/comparison.json", problems) or {}
    try:
        return [Comparison(**c) for c in content.get("comparisons", []) if c["metric"] in METRICS]
    except (TypeError, KeyError) as error:
        problems.append(f"evaluation/comparison.json is not a comparison: {error}")
        return []


def _stages(run: Run, problems: list[str]) -> dict[str, Any] | None:
    """The way to this model as a table: a header, a line for each stage, and the reward models with their proof."""
    if not (run.path / "evaluation/stages.json").is_file():
        return None
    found = _json(run, "evaluation/stages.json", problems) or {"stages": []}
    names = [name for name in (found["stages"][0]["scores"] if found["stages"] else ()) if name in METRICS]
    lines = []
    for stage in found["stages"]:
        cells = [_score(stage["scores"][name], METRICS[name]) for name in names]
        change = Comparison(**stage["change"]) if stage["change"] else None
        said = f"{difference_shown(change)}: {change.verdict}" if change and change.n else "-"
        lines.append([stage["name"], stage["method"] or "-", *cells, said])
    return {
        "header": ["stage", "method", *(METRICS[name].named for name in names), "against the stage before"],
        "lines": lines,
        "reward_models": [
            f"{r['name']}: {sentence(Comparison(**r['comparison']))}" for r in found.get("reward_models", ())
        ],
    }


def engine_checks(run: Run, problems: list[str]) -> list[dict[str, Any]]:
    """Of each model whether its answers are those that it gives alone: a sentence, and a line for each answer."""
    name = "evaluation/engine_check.json"
    found = (_json(run, name, problems) or {}) if (run.path / name).is_file() else {}
    return [
        {
            "model": model,
            "engine": check["engine"],
            "sentence": check["sentence"],
            "passed": check["passed"],
            "lines": [
                [
                    read["item"],
                    read["verdict"],
                    read["tokens"],
                    "-" if read["at"] is None else read["at"],
                    "-" if read["gap"] is None else f"{read['gap']:.3f}",
                    read["why"] or "",
                ]
                for read in check["items"]
            ],
        }
        for model, check in found.items()
        if isinstance(check, dict) and "sentence" in check
    ]


def how_answered(rows: Sequence[EvalRow]) -> str:
    """How the answers were made: greedily, or several drawn at a temperature; empty where there are none."""
    written = [row for row in rows if row.output is not None]
    if not written:
        return ""
    attempts = max(row.sample for row in written) + 1
    hot = sorted({float(row.generation.get("temperature") or 0.0) for row in written})
    longest = sorted({int(n) for row in written if (n := row.generation.get("max_new_tokens"))})
    drawn = " and ".join(f"{value:g}" for value in hot if value > 0)
    said = f"drawn at temperature {drawn}" if drawn else "greedily"
    if drawn and attempts > 1:
        said = f"{attempts} attempts each, {said}"
    return said + (f", with at most {longest[-1]} new tokens" if longest else "")


def _score(score: Mapping[str, Any], metric: Metric) -> str:
    if score["value"] is None:
        return "-"
    ends = [shown(score[key], metric) for key in ("low", "high") if score[key] is not None] or ["no interval"]
    return f"{shown(score['value'], metric)} [{', '.join(ends)}]"


def _rows(run: Run, problems: list[str]) -> list[EvalRow]:
    try:
        return read_rows(run.evaluation / "rows.jsonl")
    except RunError as error:
        problems.append(error.problem.replace(f"{run.path}/", ""))
        return []


def _text(path: Path, problems: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        problems.append(f"There is no {path.name} in the run's folder.")
        return None


def _json(run: Run, name: str, problems: list[str]) -> dict[str, Any] | None:
    path = run.path / name
    if not path.is_file():
        problems.append(f"There is no {name} in the run's folder.")
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        problems.append(f"{name} is damaged: {error}")
        return None
    return content if isinstance(content, dict) else {"content": content}


def _lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; lines that are none, such as one cut off by a crash, are counted."""
    entries, damaged = [], 0
    for line in (_text(path, problems) or "").split("\n"):
        try:
            entry = json.loads(line) if line.strip() else None
        except ValueError:
            entry, damaged = None, damaged + 1
        if isinstance(entry, dict):
            entries.append(entry)
    if damaged:
        problems.append(f"{damaged} lines of {path.name} are damaged and left out.")
    return entries


def _message(event: Mapping[str, Any]) -> str:
    return str(event.get("message") or {k: v for k, v in event.items() if k not in ("time", "kind")})


def _decisions(plan: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Decisions of plan and events, once each."""
    found = [*plan.get("decisions", []), *(e for e in events if e.get("kind") == "decision")]
    lines = [
        tuple("" if d.get(key) is None else str(d[key]) for key in ("name", "value", "reason")) for d in found
    ]
    return [(line[0], line[1], line[2]) for line in dict.fromkeys(lines)]


def answers_side_by_side(rows: Sequence[EvalRow], metric: Metric | None) -> list[dict[str, Any]]:
    """Answers of both models to each question, those on which the models differ first."""
    tuned = {(r.item, r.turn, r.sample): r for r in rows if r.model == "tuned"}
    pairs = [
        (row, tuned[key])
        for row in rows
        if row.model == "base"
        and (row.output is not None or row.score is not None)
        and (key := (row.item, row.turn, row.sample)) in tuned
    ]
    answers = [
        {
            "question": base.prompt_text,
            "reference": base.reference,
            "source": base.source_row,
            "models": [_answer("base", base, metric), _answer("tuned", answer, metric)],
            **_change(base, answer, metric),
        }
        for base, answer in pairs
    ]
    return sorted(answers, key=lambda a: a["models"][0]["score"] == a["models"][1]["score"])


def _change(base: EvalRow, tuned: EvalRow, metric: Metric | None) -> dict[str, float]:
    """How much better the tuned model's answer is, and which share of its words is other than the base's."""
    before, after = (r.scores.get(metric.name) if metric else None for r in (base, tuned))
    gain = 0.0 if before is None or after is None else after - before
    one, other = ((r.output or "")[:COMPARED_CHARACTERS].split() for r in (base, tuned))
    same = SequenceMatcher(None, one, other, autojunk=False).ratio() if one or other else 1.0
    return {"gain": gain if not metric or metric.higher_is_better else -gain, "moved": round(1 - same, 3)}


def parts_tables(run: Run, problems: list[str]) -> list[tuple[str, list[tuple[str, Comparison, list[str]]]]]:
    """The primary metric by category and by length: a title, and of each part its name, comparison and cells."""
    if not (run.path / "evaluation/parts.json").is_file():
        return []
    kept = _json(run, "evaluation/parts.json", problems) or {}
    titles = {"category": f"By {kept.get('column') or 'category'}", "length": "By length of the question"}
    found = []
    try:
        for kind, title in titles.items():
            lines = []
            for part in kept["parts"]:
                if part["by"] == kind:
                    c = Comparison(**part["comparison"])
                    metric = METRICS[c.metric]
                    cells = (
                        [shown(c.base, metric), shown(c.tuned, metric), difference_shown(c)] if c.n else []
                    )
                    lines.append((str(part["name"]), c, cells or ["-"] * 3))
            found += [(title, lines)] if lines else []
    except (KeyError, TypeError) as error:
        problems.append(f"evaluation/parts.json is not a record of parts: {error}")
    return found


def _found_from(comparison: Comparison) -> str:
    """The difference that the measurement would have found, before and after it."""
    metric = METRICS[comparison.metric]
    assumed, measured = (
        "-" if value is None else amount(value, metric)
        for value in (comparison.assumed_detectable, comparison.detectable)
    )
    return f"{assumed} / {measured}"


def _leaked(run: Run, problems: list[str]) -> dict[str, Any] | None:
    """What leaked from training into the held-out questions; None where the run did not look."""
    if not (run.path / "evaluation/leakage.json").is_file():
        return None
    found = _json(run, "evaluation/leakage.json", problems) or {}
    try:
        parts = {
            "clean": "questions that did not leak",
            "dirty": "questions that leaked",
        }
        return {
            "said": found.get("remark") or "Not measured: the run ended before.",
            "counts": {KINDS[kind]: count for kind, count in found["counts"].items() if count},
            "notes": found["notes"],
            "parts": [
                (said, Comparison(**found["parts"][name]))
                for name, said in parts.items()
                if name in found.get("parts", {})
            ],
            "copied": found.get("copied", {}),
            "copied_limit": next((Copied(**c).limit() for c in found.get("copied", {}).values()), ""),
            "passage": PASSAGE,
            "pairs": found["pairs"][:LEAKS_SHOWN],
            "more": max(len(found["pairs"]) - LEAKS_SHOWN, 0),
        }
    except (KeyError, TypeError) as error:
        problems.append(f"evaluation/leakage.json is not a record of leakage: {error}")
        return None


DRAWN = 12
"""Answers of the training that are shown, spread over its steps."""


def _drawn(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Answers that the model gave while it was trained, the first and the last among them."""
    empty: dict[str, Any] = {"row": None, "reward": None, "rewards": {}}
    found = [
        {**empty, **e} for e in events if e.get("kind") == "sample" and isinstance(e.get("completion"), str)
    ]
    if len(found) <= DRAWN:
        return found
    return [found[round(n * (len(found) - 1) / (DRAWN - 1))] for n in range(DRAWN)]


def _answer(name: str, row: EvalRow, metric: Metric | None) -> dict[str, Any]:
    score = row.scores.get(metric.name) if metric else None
    mark, style = "", "soft"
    if score is not None and metric:
        mark = shown(score, metric)
        # A preference is between two given answers, and says nothing of the one shown here.
        words = ("finds the better one likelier", "finds the worse one likelier")
        if metric.kind == "answer":
            words = ("✓ right", "✗ wrong")
        if metric.unit == "share":
            mark, style = (words[0], "better") if score == 1 else (words[1], "worse")
    text = row.output
    if row.score is not None:
        text = f"{row.score:+.2f} for this answer, {row.rejected_score:+.2f} for: {row.rejected}"
    notes = [note for flags in row.flags.values() for note in flags]
    if row.finish_reason == "length":
        notes.append("cut at the longest length")
    if row.status != "ok":
        notes.append(row.status)
    return {"name": name, "text": text, "score": score, "mark": mark, "style": style, "notes": notes}


def _figures(
    compared: Sequence[Comparison],
    events: Sequence[Mapping[str, Any]],
    ledger: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Title, caption, Plotly traces and layout of each figure that there is data for."""
    steps = [e for e in events if e.get("kind") == "step"]
    validations = [e for e in events if e.get("kind") == "evaluation"]
    figures = [
        _forest(compared, ("share", "points"), "Differences", "points, tuned minus base", 100),
        *(
            _forest(
                [c],
                ("ratio",),
                f"Difference in {METRICS[c.metric].label}",
                f"tuned minus base; {'higher' if METRICS[c.metric].higher_is_better else 'lower'} is better",
                1,
            )
            for c in compared
        ),
        *training_figures(steps, validations),
    ]
    lengths = [e["tokens"] for e in ledger if isinstance(e.get("tokens"), int | float)]
    if lengths:
        caption = (
            f"{len(lengths):,} examples before anything was cut; the longest has {max(lengths):,} tokens."
        )
        traces = [{"type": "histogram", "x": lengths, "nbinsx": 40, "role": "tuned"}]
        layout = {"xaxis": {"title": {"text": "tokens"}}, "yaxis": {"title": {"text": "examples"}}}
        figures.append(_figure("Token lengths", caption, traces, layout))
    return [figure for figure in figures if figure]


def training_figures(
    steps: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Title, caption, Plotly traces and layout of each curve that these events have, the method's own measures last."""
    measured = _measured(steps, validations)
    by_method = any(name not in METRICS for e in [*steps, *validations] for name in e.get("measures") or {})
    figures = [
        curves(
            "Loss",
            "Training loss, and validation loss on examples that are not trained on.",
            "loss of the method" if by_method else "nats per token",
            {"training": (steps, "loss"), "validation": (validations, "loss")},
        ),
        curves(
            "Learning rate",
            "As it was used, step by step.",
            "learning rate",
            {"learning rate": (steps, "learning_rate")},
        ),
        curves(
            "Gradient norm",
            "Of all trained weights together, before it is clipped.",
            "norm",
            {"gradient norm": (steps, "grad_norm")},
        ),
        curves(
            "Token accuracy",
            "Share of trained tokens that the model found likeliest, and the same on examples that are not trained "
            "on.",
            "share",
            {"training": (steps, "token_accuracy"), "validation": (validations, "token_accuracy")},
        ),
        *measured,
    ]
    return [figure for figure in figures if figure]


MEASURES = {
    "rewards": "How much likelier than under the reference an answer became, times beta (without a reference: how "
    "likely it is, times beta). The margin is that of chosen over rejected.",
    "rewards/accuracies": "Share of pairs whose chosen answer has the higher reward.",
    "logps": "Log-likelihood of the answers. Where that of the chosen ones falls with the rejected ones', good "
    "answers become unlikely as well.",
    "logits": "Mean logit over the answers' tokens.",
    "kl": "How far the model has moved from its reference, in nats: of an answer with ppo, of a token with grpo and "
    "rloo, and with kto an estimate from answers to other prompts.",
    "objective": "Reward less the cost of divergence and of answers that did not end.",
    "approx_kl": "How far the policy moved from the one that gave the answers, within a step, in nats per token.",
    "clip_fraction": "Share of tokens whose probability had moved so far that they taught nothing more.",
    "explained_variance": "How much of what answers came to be worth the value had foreseen; 1 is all, below 0 it "
    "misleads.",
    "accuracy": "Share of pairs whose better answer gets the higher score.",
    "margin": "By how much the better answer's score is the higher one.",
    "cost": "Calls and tokens so far of what is asked over a network.",
    "nll_loss": "Imitation loss on the better answers.",
    "completions": "Lengths of what the model writes while it is trained, in tokens.",
    "entropy": "Uncertainty of the next token, in nats.",
    "reward": "Mean of what answers were worth, all rewards added up by their weights. In training they are drawn, "
    "in validation each token is the likeliest.",
    "reward_std": "Spread of what answers were worth.",
    "frac_reward_zero_std": "Share of prompts whose answers all got the same reward: nothing is learned from these.",
    "reward_length_correlation": "Correlation of reward and length among the answers to a prompt; near 1 the reward is "
    "as good as the length.",
    "clip_ratio": "Share of tokens whose probability had moved so far that they taught nothing more.",
    "step_time": "Seconds of a step.",
}
"""What the curves of a family of measures show; a method's trainer names the measures."""

SHARES = ("accuracies", "accuracy", "ratio", "fraction", "no_eos")
"""Endings of measures between 0 and 1, which get a plot of their own."""


def _measured(
    steps: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One figure for each family of what a method measures: `rewards/chosen` and `rewards/rejected` are one."""
    parts = {
        "": [{"step": e.get("step"), **(e.get("measures") or {})} for e in steps],
        " (validation)": [{"step": e.get("step"), **(e.get("measures") or {})} for e in validations],
    }
    families: dict[str, list[str]] = {}
    for name in dict.fromkeys(
        name for events in parts.values() for e in events for name in e if name != "step"
    ):
        prefix, _, last = name.rpartition("/")
        families.setdefault(prefix if prefix and not last.endswith(SHARES) else name, []).append(name)
    figures = []
    for family, names in families.items():
        lines = {
            f"{name.removeprefix(f'{family}/')}{part}": (events, name)
            for name in names
            for part, events in parts.items()
        }
        title, caption = family, MEASURES.get(family, "As the trainer measures it.")
        if family in METRICS:
            title, caption = (
                METRICS[family].label,
                f"On a sample of the validation examples. {METRICS[family].about}",
            )
        figure = curves(title, caption, family, lines)
        if not figure:
            continue
        for trace in figure["data"]["traces"]:
            name = trace["name"].removesuffix(" (validation)")
            place = [n.removeprefix(f"{family}/") for n in names].index(name)
            trace["role"] = ROLES[place % len(ROLES)]
            trace["dash"] = "solid" if name == trace["name"] else "dot"
        figures.append(figure)
    return figures


ROLES = ("tuned", "bad", "good", "wait", "base", "soft")
"""Colours of the page, in the order in which curves take them."""


def _figure(
    title: str, caption: str, traces: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]
) -> dict[str, Any]:
    return {"title": title, "caption": caption, "data": {"traces": traces, "layout": layout}}


def _forest(
    compared: Sequence[Comparison], units: Sequence[str], title: str, axis: str, scale: float
) -> dict[str, Any] | None:
    kept = [c for c in compared if c.n and METRICS[c.metric].unit in units]
    if not kept:
        return None
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [scale * c.difference for c in kept],
        "y": [METRICS[c.metric].label for c in kept],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [None if c.high is None else scale * (c.high - c.difference) for c in kept],
            "arrayminus": [None if c.low is None else scale * (c.difference - c.low) for c in kept],
        },
        "verdicts": [c.verdict for c in kept],
        "role": "verdict",
        "hovertemplate": "%{x:.2f}<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": axis}, "zeroline": True, "zerolinewidth": 2, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed"},
        "showlegend": False,
        "height": 150 + 42 * len(kept),
    }
    caption = "Dot: measured difference; bar: its interval. A bar that crosses zero proves nothing."
    return _figure(title, caption, [trace], layout)


def curves(
    title: str,
    caption: str,
    unit: str,
    lines: Mapping[str, tuple[Sequence[Mapping[str, Any]], str]],
) -> dict[str, Any] | None:
    """A figure of lines over steps, each from events and the key of its values; None where there is no point."""
    traces = []
    for name, (events, key) in lines.items():
        points = [(e["step"], e[key]) for e in events if e.get("step") is not None and e.get(key) is not None]
        if points:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if len(points) < 30 else "lines",
                    "name": name,
                    "x": [x for x, _ in points],
                    "y": [y for _, y in points],
                    "role": "base" if name == "training" else "tuned",
                }
            )
    if not traces:
        return None
    layout = {
        "xaxis": {"title": {"text": "optimizer step"}},
        "yaxis": {"title": {"text": unit}, "exponentformat": "power"},
        "showlegend": len(traces) > 1,
    }
    return _figure(title, caption, traces, layout)


def _labels(rows: Sequence[EvalRow]) -> list[tuple[str, Classification, list[str]]]:
    """By model, of a classification: name, confusion matrix, and the heads of its columns."""
    found = []
    for name in dict.fromkeys(row.model for row in rows):
        if made := classification([row for row in rows if row.model == name]):
            found.append((name, made, [*made.labels, UNPARSED]))
    return found


def _reach(comparison: Mapping[str, Any], end: str) -> float | None:
    """How far an interval reaches from the difference; None where there is none."""
    return None if comparison[end] is None else abs(comparison[end] - comparison["difference"])


def _learned_and_forgotten(run: Run, problems: list[str]) -> list[dict[str, Any]]:
    """The learning-forgetting plot: what was gained on the held-out examples against what was lost elsewhere."""
    if not (run.path / "evaluation/forgetting.json").is_file():
        return []
    found = _json(run, "evaluation/forgetting.json", problems) or {}
    general, domain = found.get("general"), found.get("domain")
    if not general or not domain:
        return []
    # Gains to the right, losses upward: fewer bits per byte are better, so the gain is the difference turned round.
    traces = [
        {
            "type": "scatter",
            "mode": "markers+text",
            "x": [0.0, -domain["difference"]],
            "y": [0.0, general["difference"]],
            "text": ["base", "tuned"],
            "textposition": ["top right", "top left"],
            "cliponaxis": False,
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": [0.0, _reach(domain, "low")],
                "arrayminus": [0.0, _reach(domain, "high")],
            },
            "error_y": {
                "type": "data",
                "symmetric": False,
                "array": [0.0, _reach(general, "high")],
                "arrayminus": [0.0, _reach(general, "low")],
            },
            "role": "tuned",
        }
    ]
    layout = {
        "xaxis": {
            "title": {"text": "learned: bits per byte saved"},
            "rangemode": "tozero",
        },
        "yaxis": {"title": {"text": "forgotten: bits per byte more"}, "rangemode": "tozero"},
        "showlegend": False,
    }
    return [_figure("Learned and forgotten", str(found.get("sentence", "")), traces, layout)]
