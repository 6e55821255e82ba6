"""report.html: one self-contained page, made from the run folder alone, that opens offline.

The verdict comes first, then the scores, the answers side by side, and how the model came to be.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.evaluation import EvalRow, read_rows
from tunesmith.evaluation.compare import Comparison, sentence, shown, table
from tunesmith.evaluation.metrics import METRICS
from tunesmith.training.run import Run, write_whole

ANSWERS_OPEN = 12
"""Answers shown before the rest is folded away."""
BASE_COLOR, TUNED_COLOR, MUTED = "#8a8f98", "#2f7fd6", "#8a8f98"


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run's folder; parts whose files are not there say so."""
    import jinja2

    run = Run(run_dir)
    events = run.events()
    compared = [Comparison(**c) for c in (run.read("evaluation/comparison.json") or {}).get("comparisons", [])]
    primary = next((c for c in compared if c.primary), None)
    rows_file = run.evaluation / "rows.jsonl"
    rows = read_rows(rows_file) if rows_file.exists() else []
    ledger_file = run.path / "ledger.jsonl"
    ledger = [json.loads(x) for x in ledger_file.read_text("utf-8").splitlines()] if ledger_file.exists() else []
    recipe_file = run.path / "recipe.yaml"
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tunesmith.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("report.html.jinja").render(
        name=run.path.name,
        primary=primary,
        verdict=sentence(primary) if primary else "No held-out answers were compared in this run.",
        table=table(compared) if compared else None,
        verdicts=[c.verdict for c in compared],
        reasons=[(c.metric, c.reason, c.method, c.p_value) for c in compared],
        answers=_answers(rows, primary.metric if primary else None),
        answers_open=ANSWERS_OPEN,
        figures=_figures(compared, events, ledger),
        plotly=_plotly(),
        fates=Counter(entry["fate"] for entry in ledger),
        dropped=Counter(entry["reason"] or "?" for entry in ledger if entry["fate"] == "dropped").most_common(),
        truncated=sum(bool(entry["tokens_cut"]) for entry in ledger if entry["fate"] != "dropped"),
        decisions=[e for e in events if e["kind"] == "decision"],
        warnings=[e["message"] for e in events if e["kind"] == "warning"],
        training=run.read("training.json"),
        recipe=recipe_file.read_text("utf-8") if recipe_file.exists() else None,
        environment=run.read("environment.json"),
        metrics=[METRICS[c.metric] for c in compared],
        percent=lambda value: shown("exact_match", value),
    )
    return write_whole(run.path / "report.html", text)


def _answers(rows: Sequence[EvalRow], metric: str | None) -> list[dict[str, Any]]:
    """Answers of both models to each question, those on which the models differ first."""
    tuned = {row.item: row for row in rows if row.model == "tuned"}
    pairs = [(row, tuned[row.item]) for row in rows if row.model == "base" and row.item in tuned and row.prompt_text]
    answers = [
        {
            "question": a.prompt_text,
            "reference": a.reference,
            "base": a.output,
            "tuned": b.output,
            "base_score": a.scores.get(metric or ""),
            "tuned_score": b.scores.get(metric or ""),
            "finish": b.finish_reason,
        }
        for a, b in pairs
    ]
    return sorted(answers, key=lambda x: x["base_score"] == x["tuned_score"])


def _plotly() -> str:
    """The plotting library itself, so that the page needs nothing from outside."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _figures(
    compared: Sequence[Comparison], events: Sequence[dict[str, Any]], ledger: Sequence[dict[str, Any]]
) -> list[dict[str, str]]:
    """Title, caption and HTML of each figure that there is data for."""
    import plotly.graph_objects as go

    steps = [e for e in events if e["kind"] == "step"]
    validations = [e for e in events if e["kind"] == "evaluation"]
    figures: list[tuple[str, str, Any]] = []
    shares = [c for c in compared if METRICS[c.metric].is_share]
    if shares:
        figure = go.Figure()
        points = [100 * c.difference for c in shares]
        figure.add_trace(
            go.Scatter(
                x=points,
                y=[c.metric for c in shares],
                mode="markers",
                marker={"size": 11, "color": TUNED_COLOR},
                error_x={
                    "array": [100 * (c.high - c.difference) for c in shares],
                    "arrayminus": [100 * (c.difference - c.low) for c in shares],
                    "color": TUNED_COLOR,
                },
            )
        )
        figure.add_vline(x=0, line={"color": MUTED, "dash": "dot"})
        figure.update_yaxes(autorange="reversed")
        figure.update_xaxes(title="points, tuned minus base")
        caption = "Dot: measured difference; bar: its interval. A bar that crosses zero proves nothing."
        figures.append(("Differences", caption, figure))
    if steps:
        figure = go.Figure()
        x, y = [e["step"] for e in steps], [e["loss"] for e in steps]
        figure.add_trace(go.Scatter(x=x, y=y, name="training", line={"color": BASE_COLOR}))
        if validations:
            x, y = [e["step"] for e in validations], [e["loss"] for e in validations]
            figure.add_trace(
                go.Scatter(x=x, y=y, name="validation", mode="lines+markers", line={"color": TUNED_COLOR})
            )
        figure.update_xaxes(title="optimiser step")
        figure.update_yaxes(title="loss, nats per token")
        figures.append(("Loss", "The final model is the one with the lowest validation loss.", figure))
        figure = go.Figure()
        figure.add_trace(
            go.Scatter(x=[e["step"] for e in steps], y=[e["learning_rate"] for e in steps], line={"color": TUNED_COLOR})
        )
        figure.update_xaxes(title="optimiser step")
        figure.update_yaxes(exponentformat="power")
        figures.append(("Learning rate", "As it was used, step by step.", figure))
    lengths = [entry["tokens"] for entry in ledger if entry["tokens"] is not None]
    if lengths:
        figure = go.Figure(go.Histogram(x=lengths, marker={"color": TUNED_COLOR}, nbinsx=40))
        figure.update_xaxes(title="tokens per example")
        figure.update_yaxes(title="examples")
        caption = f"{len(lengths)} examples, before anything was cut; the longest has {max(lengths)} tokens."
        figures.append(("Token lengths", caption, figure))
    return [{"title": title, "caption": caption, "html": _html(figure)} for title, caption, figure in figures]


def _html(figure: Any) -> str:
    figure.update_layout(
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        height=300,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": MUTED, "size": 13},
        legend={"orientation": "h", "y": 1.15},
    )
    figure.update_xaxes(automargin=True, gridcolor="rgba(128,128,128,.2)")
    figure.update_yaxes(automargin=True, gridcolor="rgba(128,128,128,.2)")
    config = {"displayModeBar": False, "responsive": True}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=config))
