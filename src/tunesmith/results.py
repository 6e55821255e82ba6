"""What each verb says to people when it is done: its result as text for a terminal."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from tunesmith.compose import Composition
from tunesmith.display import escaped, open_console, score_text, table_of
from tunesmith.errors import counted, size

if TYPE_CHECKING:
    from tunesmith.api import Result
    from tunesmith.data.inspection import Inspected
    from tunesmith.data.validation import Report
    from tunesmith.export.artefact import Exported
    from tunesmith.export.deployment import Deployment
    from tunesmith.export.merge import Merged
    from tunesmith.export.parity import Parity
    from tunesmith.export.publish import Plan as PushPlan
    from tunesmith.export.tried import Tried
    from tunesmith.plan import Plan
    from tunesmith.sweeps import Sweep
    from tunesmith.training.find_lr import RateSearch

TOKEN_STYLES = {"trained": "bold green", "context": "dim", "special": "magenta", "cut": "strike red"}
"""How tokens look in the terminal, by what becomes of them."""

TOKEN_MARKS = {"trained": ("{+", "+}"), "context": ("", ""), "special": ("{*", "*}"), "cut": ("[-", "-]")}
"""The same where there is no color: in files, in pipes, with NO_COLOR."""

LONGEST_SHOWN = 600
"""Characters of an answer in the terminal; the run's folder has all of it."""

SHOWN_FINDINGS = 5
"""Findings of a kind that people see; `--json` has all that were kept."""


def plan_text(plan: Plan, rows: Mapping[str, Any], composition: Composition) -> Any:
    """What a recipe comes to, value by value."""
    table = table_of("what", "value", "why")
    for note in composition.notes:
        table.add_row("recipe", escaped(note), "")
    recipe = composition.recipe
    table.add_row(
        "method", recipe.method.kind, escaped(f"on {recipe.model.base}, adapter {recipe.adapter.kind}")
    )
    rest = "".join(f" + {part.dataset}" for part in recipe.data.mix)
    table.add_row("dataset", escaped(f"{recipe.data.dataset}{rest}"), escaped(f"format {recipe.data.format}"))
    table.add_row(
        "learning_rate", f"{recipe.training.learning_rate:g}", f"{recipe.training.scheduler}, at its peak"
    )
    for reward in getattr(recipe.method, "rewards", ()):
        name = getattr(reward, "name", None) or getattr(reward, "function", None) or reward.model
        table.add_row("reward", escaped(name), f"weight {reward.weight:g}")
    counts = rows["rows"]
    table.add_row("rows", ", ".join(f"{name} {count}" for name, count in counts.items()), "the ledger")
    for reason, count in rows["dropped"].items():
        table.add_row("dropped", str(count), escaped(reason))
    table.add_row("tokens", f"{plan.tokens_per_epoch:,}", "in one pass over the training examples")
    for decision in plan.decisions:
        table.add_row(decision.name, escaped(decision.value), escaped(decision.reason))
    for name, value, reason in plan.estimate.lines() if plan.estimate else ():
        table.add_row(name, escaped(value), escaped(reason))
    return table


def inspected_text(rows: Sequence[Inspected], page: Path | None) -> Any:
    """Rows as the model sees them, token by token."""
    is_colored = open_console(stderr=False).color_system is not None
    legend = Text("tokens are ")
    for role, style in TOKEN_STYLES.items():
        before, behind = ("", "") if is_colored else TOKEN_MARKS[role]
        legend.append(f"{before}{role}{behind}", style=style).append(" ")
    parts: list[Any] = [legend, ""]
    for row in rows:
        head = Text(str(row.row), style="bold")
        head.append((f", {row.part}" if row.part else "") + (f" ({row.why})" if row.why else ""), style="")
        parts += [head]
        facts = f"{row.fate}, {counted(row.tokens, 'token')}"
        facts += f", {row.cut:,} cut; of the {row.tokens - row.cut:,} kept" if row.cut else ";"
        facts += f" {row.trained:,} trained ({row.trained_share:.0%})"
        if not row.pieces:
            facts = row.fate
        parts.append(Text(facts + (f"; {row.reason}" if row.reason else ""), style="dim"))
        seen = Text()
        for role, group in itertools.groupby(row.pieces, key=operator.itemgetter(1)):
            before, behind = ("", "") if is_colored else TOKEN_MARKS[role]
            seen.append(before + "".join(text for text, _ in group) + behind, style=TOKEN_STYLES[role])
        parts += [seen, ""]
    if page:
        parts.append(Text(f"page      {page}"))
    return Group(*parts)


def result_text(result: Result) -> Any:
    """Verdict first, then the table, answers before and after, and where everything lies."""
    from tunesmith.evaluation.compare import remarks, sentence, table, table_of_many

    parts: list[Any] = []
    if result.comparisons:
        names, of_many = result.sides or ("base", "tuned"), len(result.models) > 2
        compared = list(result.comparisons)
        header, *lines = table_of_many(compared) if of_many else table(compared, names)
        scores = table_of(*header)
        for line in lines:
            scores.add_row(*(escaped(cell) for cell in line))
        primary = result.primary
        for c in (c for c in compared if c.primary and of_many):
            style = {"better": "bold green", "worse": "bold red"}.get(c.verdict, "bold yellow")
            parts += [Text(f"{c.model} against {c.against}", style="bold"), Text(sentence(c), style=style)]
        if primary:
            if result.sides:
                parts.append(Text(f"{result.sides[1]} against {result.sides[0]}", style="bold"))
            style = {"better": "bold green", "worse": "bold red"}.get(primary.verdict, "bold yellow")
            parts += [Text(sentence(primary), style=style)]
            parts += [*(Text(remark, style="yellow") for remark in primary.remarks), ""]
        parts += ([""] if of_many else []) + [scores]
        told = primary.remarks if primary else ()
        parts += [*(Text(said, style="dim") for said in remarks(result.comparisons) if said not in told), ""]
    for sample in result.samples:
        parts.append(Text(sample["question"], style="bold"))
        for label in ("reference", "base", "tuned"):
            said = _shortened(sample[label])
            parts.append(Text(f"  {label:<10}{said}", style="dim" if label == "reference" else ""))
        parts.append("")
    for label, value in (
        ("run", result.run),
        ("report", result.report),
        ("published", result.published),
        ("saved", result.saved),
    ):
        if value:
            parts.append(Text(f"{label:<10}{value}"))
    parts.append(Text(f"{'seconds':<10}{result.seconds:.0f}"))
    return Group(*parts)


def _shortened(text: str) -> str:
    """An answer for the terminal, where one that goes round in circles would push everything else away."""
    if len(text) <= LONGEST_SHOWN:
        return text
    return f"{text[:LONGEST_SHOWN]}… ({len(text):,} characters; evaluation/rows.jsonl has them all)"


def scores_text(result: Result) -> Any:
    """Scores with their intervals, and why some are missing."""
    from tunesmith.evaluation.metrics import METRICS

    table = table_of("metric", "value", "95 % interval", "n", "not scored")
    for name, score in result.scores.items():
        cells = ["", ""]
        if score["value"] is not None:
            value, low, high = (score_text(score[part], name) for part in ("value", "low", "high"))
            cells = [value, f"{low} to {high}" if low else "no interval"]
        table.add_row(METRICS[name].named, *cells, str(score["n"]), str(score["n_errors"] or ""))
    causes: dict[str, list[str]] = {}
    for name, score in result.scores.items():
        if score["cause"]:
            causes.setdefault(score["cause"], []).append(METRICS[name].label)
    why = [Text(f"not scored: {', '.join(names)}: {cause}") for cause, names in causes.items()]
    return Group(table, *why, Text(f"\nrows      {result.run}"))


def report_text(report: Report) -> Any:
    """Findings by kind, each with its remedy, then the counts."""
    from tunesmith.data.checks import CHECKS

    styles = {"error": "bold red", "warning": "bold yellow", "note": "dim"}
    parts: list[Any] = []
    for kind, count in report.counts.items():
        check = CHECKS[kind]
        parts.append(
            Text(f"{check.severity} {kind}: {count:,} × {check.about}", style=styles[check.severity])
        )
        found = [finding for finding in report.findings if finding.kind == kind]
        parts += [Text(f"  {f.place}  {f.message}") for f in found[:SHOWN_FINDINGS]]
        if count > SHOWN_FINDINGS:
            parts.append(Text(f"  and {count - SHOWN_FINDINGS:,} more", style="dim"))
        parts += [*(Text(f"  do: {fix}", style="dim") for fix in dict.fromkeys(f.fix for f in found)), ""]
    read = f"read as {', '.join(report.formats)}: {report.detection}" if report.detection else ""
    lengths = ", ".join(f"{name} {value}" for name, value in report.lengths.items())
    fixed = ", ".join(f"{name} {value}" for name, value in (report.fixed or {}).items())
    labels = ", ".join(f"{name} {count}" for name, count in report.labels.items())
    facts = [
        ("rows", f"{report.rows:,} = {report.ok:,} ok + {report.with_errors:,} with errors + "
                 f"{report.with_warnings:,} with warnings only"),
        ("findings", ", ".join(counted(count, severity) for severity, count in report.severities.items())),
        ("format", read),
        ("lengths", lengths),
        ("ratings", labels),
        *(("note", note) for note in report.notes),
        ("fixed", fixed),
    ]  # fmt: skip
    return Group(*parts, *(Text(f"{name:<10}{value}") for name, value in facts if value))


def rates_text(search: RateSearch, page: Path | None) -> Any:
    """Which learning rate, with the curve."""
    from tunesmith.training.find_lr import chart

    style = "bold green" if search.suggestion else "bold yellow"
    parts = [
        Text(search.sentence(), style=style),
        *(Text(note, style="dim") for note in search.notes),
        Text(""),
    ]
    parts += [Text(line) for line in chart(search)]
    if search.suggestion:
        parts += [Text(""), Text(f"use       --learning-rate {search.suggestion:.1e}")]
    return Group(*parts, *([Text(f"page      {page}")] if page else []))


def sweep_text(found: Sweep) -> Any:
    """Which trial, how far to trust it, and all others."""
    from tunesmith.sweeps.page import against_table, trials_table

    first, *more = found.sentences()
    parts: list[Any] = [Text(first, style="bold green"), *(Text(line) for line in more), ""]
    for header, *lines in filter(None, (against_table(found), trials_table(found))):
        table = table_of(*header)
        for line in lines:
            table.add_row(*map(escaped, line))
        parts += [table, ""]
    run = found.folder / found.best.name
    parts += [
        Text(f"{'recipe':<10}{found.recipe}"),
        Text(f"{'run':<10}{run}"),
        Text(f"{'page':<10}{found.page}"),
        Text(
            f"{'next':<10}tunesmith train {found.recipe}, or ship the trial: tunesmith prepare-deployment {run}"
        ),
    ]
    return Group(*parts)


def merged_text(merged: Merged) -> Any:
    """Merged weights and their proof."""
    facts = [
        ("merged", str(merged.folder)),
        (
            "weights",
            f"{merged.parameters:,} parameters in {merged.dtype}, "
            f"{counted(len(merged.shards), 'file')}, base {merged.base}",
        ),
        *_proof("check", merged.parity),
        *(("note", note) for note in merged.notes),
    ]
    return _lines(facts)


def exported_text(exported: Exported) -> Any:
    """An exported file and its proof."""
    stored = ", ".join(f"{count} as {kind}" for kind, count in sorted(exported.tensors.items()))
    facts = [
        ("exported", str(exported.file)),
        ("size", f"{size(exported.size)}, tensors: {stored}"),
    ]
    facts += _proof("parity", exported.parity)
    facts += [("note", note) for note in exported.notes]
    return _lines(facts)


def tried_text(found: Tried) -> Any:
    """What the checks of a model found."""
    from tunesmith.export.tried import sentences, verdict

    facts = [
        ("tried", found.folder),
        *sentences(found),
        ("verdict", verdict(found)),
    ]
    return _lines(((name, " ".join(value.split())[:300]) for name, value in facts), width=11)


def deployment_text(made: Deployment) -> Any:
    """What a deployment holds, its proof, and how it is started."""
    facts = [
        ("made", str(made.folder)),
        ("holds", f"{counted(made.files, 'file')}, {size(made.size)}, weights in {made.dtype}"),
        ("name", made.name),
        ("page", "schema and question to SQL" if made.demo == "sql" else "chat"),
        ("vLLM", f"left out: {made.vllm}" if made.vllm else "in compose.yaml"),
    ]
    facts += [*_proof("weights", made.merged), *_proof("served", made.served)]
    facts += [("note", note) for note in made.notes]
    facts += [("FOUND", finding) for finding in made.findings]
    if made.findings and not made.despite:
        facts.append(("next", "take that out, or, where it is no secret, add --despite-findings"))
    elif made.passed is False:
        facts.append(("next", "look at what differs; it is not to be handed out as it is"))
    else:
        token = "python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
        facts += [
            ("next", f"export TUNESMITH_TOKEN=$({token})"),
            ("", f"{made.folder}/start.sh &"),
            ("", f"python3 {made.folder}/smoke_test.py --wait 1800"),
        ]
    return _lines(facts)


def _proof(name: str, proof: Parity) -> list[tuple[str, str]]:
    """A verdict with what it rests on, as lines under a name."""
    return [(name, proof.headline()), *(("", line) for line in proof.sentences())]


def push_text(plan: PushPlan) -> Any:
    """What an upload would send, and what was found in it."""
    facts = [
        ("to", f"{plan.repository}, created {'private' if plan.private else 'public'} where it is missing"),
        *(("file", f"{size(count):>9}  {name}") for name, count in plan.files),
        ("to send", f"{counted(len(plan.files), 'file')}, {size(plan.size)}"),
        *(("not sent", name) for name in plan.left),
        *(("FOUND", line) for line in plan.findings),
        *(("unread", line) for line in plan.unread),
        *(("note", note) for note in plan.notes),
        *([] if plan.findings else [("found", _nothing_found(plan))]),
    ]
    return _lines(facts)


def _nothing_found(plan: PushPlan) -> str:
    looked = len(plan.files) - len({line.partition(":")[0] for line in plan.unread})
    sought = "no secret and no trained text" if plan.knows_rows else "no secret"
    return f"{sought} in the {counted(looked, 'file')} that could be looked through"


def forecast_text(found: Mapping[str, Any]) -> str:
    """What a judging would cost."""
    from tunesmith.evaluation.judging.asking import Forecast

    return f"Would take {Forecast(**found['estimate']).sentence()}. Nothing was asked."


def judged_text(found: Mapping[str, Any], folder: Path) -> str:
    """What a judge said, and how far to trust it."""
    from tunesmith.evaluation.judging import calibration
    from tunesmith.evaluation.judging.replay import sentences

    lines = sentences(dict(found))
    told = len(found["verdicts"])
    lines[told:told] = found["doubts"]
    if found.get("calibration"):
        lines.append(f"The judge: {calibration.sentence(found['calibration'])}.")
    return "\n".join([*lines, f"plots      {folder / 'judged.html'}"])


def suite_text(found: Mapping[str, Any]) -> Any:
    """Verdict first, what it has to be read with, then one fact per line, and where everything lies."""
    from tunesmith.evaluation.judging import calibration
    from tunesmith.evaluation.judging.replay import sentences

    place = Path(found["output"])
    facts: list[tuple[str, str]] = []
    parts: list[Any] = []
    if "results" in found:
        parts.append(Text(found["sentence"], style="bold"))
        for task, metrics in found["results"].items():
            facts += [
                (task if not n else "", f"{name} {value}") for n, (name, value) in enumerate(metrics.items())
            ]
        facts.append(("template", found["chat_template"]))
    else:
        style = {"better": "bold green", "worse": "bold red"}.get(found["verdict"], "bold yellow")
        parts.append(Text(found["sentence"], style=style))
        parts += [Text(said, style="yellow") for said in found["doubts"]]
        facts.append(("suite", f"{found['suite']}: {found['questions']} questions, {found['turns']} turns"))
        for name, one in found["answers"].items():
            facts.append(
                (
                    "answers",
                    f"{name}: "
                    + ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in one.items()),
                )
            )
        for name, check in found["engine_check"].items():
            facts.append(("engine", f"{name}: {check['engine']}, {check['sentence']}"))
        for part in ("graded", "compared"):
            if part in found:
                lines = sentences({**found[part], "verdicts": ()})  # the headline has it
                facts += [(part if not n else "", line) for n, line in enumerate(lines)]
        judged = found.get("compared") or found.get("graded")
        if judged:
            own = judged.get("calibration")
            told = calibration.sentence(own) if own else "not calibrated: what its word is worth is not known"
            facts.append(("judge", f"{', '.join(judged['judge'])}, {told}"))
            plots = [place / part / "judged.html" for part in ("graded", "compared") if part in found]
            facts += [("plots", str(plot)) for plot in plots]
        facts += [("answers in", str(place / "answers"))]
    facts.append(("rows", str(place / "rows.jsonl")))
    return Group(*parts, Text(""), *(Text(f"{label:<12}{value}") for label, value in facts))


def _lines(facts: Iterable[tuple[str, str]], *, width: int = 10) -> Any:
    """One fact a line: a word, and what it is."""
    return Group(*(Text(f"{name:<{width}}{value}") for name, value in facts))
