"""Plots of judgments with their intervals: bars of models, and a radar over categories (Plotly)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tunesmith.evaluation.judging import calibration
from tunesmith.evaluation.judging.replay import sentences
from tunesmith.training.run import write_whole

COLORS = ("#1f6fc5", "#c9651a", "#1a7f37", "#8250df", "#b0306a", "#59636e")
FEW = 30
"""Judgments below which a category's value says little: its interval is drawn, and the page says so."""


def figures_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Title, caption, traces and layout of each plot that there is data for."""
    series = _series(found)
    if not series:
        return []
    is_single = found["kind"] == "single"
    unit, top = ("grade, 1 to 10", 10.0) if is_single else ("win rate, 0 to 1 (0.5: as good)", 1.0)
    bottom = 1.0 if is_single else 0.0
    made = [_bars(series, unit, (bottom, top))]
    categories = list(dict.fromkeys(name for _, _, by in series for name in by))
    if len(categories) >= 3:
        made += [
            _radar(series, categories, (bottom, top)),
            _by_category(series, categories, unit, (bottom, top)),
        ]
    return made


def write_page(path: Path, found: Mapping[str, Any]) -> Path:
    """A self-contained page: what was judged in words, then the plots."""
    from plotly.offline import get_plotlyjs

    lines = "".join(f"<p>{escape(line)}</p>" for line in sentences(dict(found)))
    own = found.get("calibration")
    said = (
        calibration.sentence(own)
        if own
        else "The judge was not calibrated: what its word is worth is not known."
    )
    plots = figures_of(found)
    parts = "".join(
        f"<h2>{escape(plot['title'])}</h2><p class=soft>{escape(plot['caption'])}</p><div id=plot{n}></div>"
        for n, plot in enumerate(plots)
    )
    data = json.dumps([plot["data"] for plot in plots]).replace("<", "\\u003c")
    judge = escape(", ".join(found["judge"]))
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Judged by {judge}</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:">
<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
 color: #1c2128; background: #fff; }} h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
.soft {{ color: #59636e; }} p {{ white-space: pre-wrap; margin: .2rem 0; }}</style></head>
<body><h1>Judged by {judge}</h1>{lines}
<h2>The judge</h2><p>{escape(said)}</p>{parts}
<script>{get_plotlyjs()}</script>
<script>const plots = {data};
const options = {{responsive: true, displaylogo: false}};
plots.forEach((p, n) => Plotly.newPlot("plot" + n, p.traces, p.layout, options));</script>
</body></html>
"""
    return write_whole(path, text)


def _series(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Of each model its name, its estimate over all, and those by category."""
    if found["kind"] == "single":
        entries = [
            (name, model["score"], model["categories"]) for name, model in found["ours"]["models"].items()
        ]
    else:
        entries = [
            (f"{pair['model']} against {pair['against']}", pair["win_rate"], pair["categories"])
            for pair in found["ours"]["pairs"]
        ]
    return [entry for entry in entries if entry[1]["value"] is not None]


def _errors(estimates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [e["high"] - e["value"] for e in estimates],
        "arrayminus": [e["value"] - e["low"] for e in estimates],
        "color": "#1c2128",
    }


def _bars(
    series: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]], unit: str, limits: tuple[float, float]
) -> dict[str, Any]:
    estimates = [overall for _, overall, _ in series]
    trace = {
        "type": "bar",
        "x": [name for name, _, _ in series],
        "y": [e["value"] for e in estimates],
        "error_y": _errors(estimates),
        "marker": {"color": [COLORS[n % len(COLORS)] for n in range(len(series))]},
    }
    layout = {"yaxis": {"title": {"text": unit}, "range": list(limits)}, "height": 340, **_even(limits)}
    return _figure("Over all", f"95 % intervals, {estimates[0]['method']}.", [trace], layout)


def _by_category(
    series: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]],
    categories: Sequence[str],
    unit: str,
    limits: tuple[float, float],
) -> dict[str, Any]:
    traces = []
    for number, (name, _, by) in enumerate(series):
        known = [c for c in categories if by.get(c, {}).get("value") is not None]
        estimates = [by[c] for c in known]
        traces.append(
            {
                "type": "bar", "name": name, "x": known, "y": [e["value"] for e in estimates],
                "error_y": _errors(estimates), "marker": {"color": COLORS[number % len(COLORS)]},
            }
        )  # fmt: skip
    layout = {
        "barmode": "group",
        "yaxis": {"title": {"text": unit}, "range": list(limits)},
        "height": 380,
        **_even(limits),
    }
    least = min(e["n"] for _, _, by in series for e in by.values())
    few = f" {least} judgments in a category say little: read the intervals." if least < FEW else ""
    return _figure("By category", "95 % intervals, clustered by question." + few, traces, layout)


def _radar(
    series: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]],
    categories: Sequence[str],
    limits: tuple[float, float],
) -> dict[str, Any]:
    traces: list[dict[str, Any]] = []
    for number, (name, _, by) in enumerate(series):
        color = COLORS[number % len(COLORS)]
        known = [c for c in categories if by.get(c, {}).get("value") is not None]
        around = [*known, *known[:1]]
        low, high = ([by[c][key] for c in around] for key in ("low", "high"))
        common = {"type": "scatterpolar", "theta": around, "legendgroup": name, "mode": "lines"}
        band = {"line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        traces += [
            {**common, **band, "r": low},
            {**common, **band, "r": high, "fill": "tonext", "fillcolor": f"{color}33"},
            {
                **common, "r": [by[c]["value"] for c in around], "name": name, "mode": "lines+markers",
                "line": {"color": color, "width": 2},
            },
        ]  # fmt: skip
    layout = {"polar": {"radialaxis": {"range": list(limits)}}, "height": 480, "margin": {"t": 40, "b": 40}}
    return _figure("Radar", "Lines are values, bands their 95 % intervals.", traces, layout)


def _even(limits: tuple[float, float]) -> dict[str, Any]:
    """Tight margins and, for win rates, the line at which neither is better."""
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0.5, "y1": 0.5, "line": {"dash": "dot"}}
    return {"margin": {"t": 20, "b": 50}, **({"shapes": [line]} if limits[1] == 1.0 else {})}


def _figure(title: str, caption: str, traces: list[dict[str, Any]], layout: dict[str, Any]) -> dict[str, Any]:
    return {"title": title, "caption": caption, "data": {"traces": traces, "layout": layout}}
