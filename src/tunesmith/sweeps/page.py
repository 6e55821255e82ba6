"""What a sweep found, in sentences, in tables and on one page without scripts."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunesmith.errors import counted
from tunesmith.sweeps.space import short
from tunesmith.sweeps.trials import Trial, higher_is_better

if TYPE_CHECKING:
    from tunesmith.sweeps import Sweep

FARTHEST = 3
"""Times the middle trial's value up to which the plots reach where less is better."""


def sentences(sweep: Sweep) -> list[str]:
    """What was found, and how far to trust it."""
    from tunesmith.evaluation.compare import difference_shown

    done = sweep.count("done")
    ended = ", ".join(
        f"{sweep.count(state)} {state}"
        for state in ("done", "pruned", "failed", "open")
        if sweep.count(state)
    )
    values = ", ".join(f"{path} {short(value)}" for path, value in sweep.best.values.items())
    by = "validation loss" if sweep.by == "loss" else f"{sweep.by} at validation"
    found = [
        f"{sweep.best.name} is the best of {counted(done, 'trial')} by {by}, {_value(sweep.best)} at step "
        f"{sweep.best.step} ({ended}): {values}."
    ]
    if done > 1:
        found.append(
            f"That value was chosen as the best of {done} and flatters it; the held-out questions chose nothing."
        )
    for one in sweep.against:
        c = one.comparison
        said = {
            "worse": "is worse than it",
            "better": "is better than it",
            "inconclusive": "cannot be told from it (inconclusive)",
        }.get(c.verdict, "is not shown to differ from it")
        found.append(
            f"{c.model} {said} on held-out questions: {difference_shown(c)}{_p(c.p_value)}, n={c.n}."
        )
    equal = [
        one.comparison.model
        for one in sweep.against
        if one.comparison.verdict in ("no evidence", "inconclusive")
        and one.comparison.model.startswith("trial-")
    ]
    if equal:
        found.append(
            f"Where {' or '.join(equal)} is cheaper to train or to run, nothing here speaks against it."
        )
    return [*found, *sweep.notes]


def trials_table(sweep: Sweep) -> list[list[str]]:
    """A header, and a line for each trial, the best first and those without a value last."""
    names = list(sweep.space)
    sign = -1.0 if higher_is_better(sweep.by) else 1.0
    order = sorted(
        sweep.trials,
        key=lambda one: (
            one.state != "done",
            math.inf if one.value is None else sign * one.value,
            one.number,
        ),
    )
    header = [
        "trial",
        *(name.rpartition(".")[2] for name in names),
        sweep.by,
        "step",
        "seconds",
        "state",
        "why",
    ]
    lines = []
    for one in order:
        cells = [short(one.values.get(name)) for name in names]
        step = "-" if one.step is None else str(one.step)
        lines.append([one.name, *cells, _value(one), step, f"{one.seconds:.0f}", one.state, one.reason[:160]])
    return [header, *lines]


def against_table(sweep: Sweep) -> list[list[str]]:
    """A header, and a line for each model that was measured against the best trial; empty where none was."""
    from tunesmith.evaluation.compare import difference_shown, interval_shown, shown
    from tunesmith.evaluation.metrics import METRICS

    if not sweep.against:
        return []
    metric = METRICS[sweep.against[0].comparison.metric]
    level = f"{sweep.against[0].comparison.confidence:.0%}".replace("%", " %")
    lines = [
        [
            "model",
            metric.named,
            f"difference to the chosen one [{level} interval]",
            "all together",
            "p (Holm)",
            "n",
            "verdict",
        ]
    ]
    first = sweep.against[0].comparison
    lines.append(
        [
            sweep.best.name,
            shown(first.base, metric) if first.n else "-",
            "",
            "",
            "",
            str(first.n),
            "chosen by validation",
        ]
    )
    for one in sweep.against:
        c = one.comparison
        p = "-" if c.p_value is None else f"{c.p_value:.3g}"
        shown_ones = [shown(c.tuned, metric), difference_shown(c)] if c.n else ["-", "-"]
        together = interval_shown(one.low, one.high, metric)
        lines.append([c.model, *shown_ones, together, p, str(c.n), c.verdict])
    return lines


def _p(value: float | None) -> str:
    return "" if value is None else f", Holm's p {value:.2g}"


def _value(trial: Trial) -> str:
    return "-" if trial.value is None else f"{trial.value:.4g}"


def _rows(table: Sequence[Sequence[str]]) -> str:
    if not table:
        return ""
    head, *lines = (tuple(html.escape(cell) for cell in line) for line in table)
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    return f"<div class=wide><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"


def _heights(sweep: Sweep) -> tuple[float, float]:
    """The lowest and the highest value that the plots show. Where less is better, what diverged would flatten all
    others, and is drawn at the upper edge."""
    values = sorted(one.value for one in sweep.trials if one.value is not None)
    bottom, top = values[0], values[-1]
    if not higher_is_better(sweep.by) and bottom > 0:
        top = min(top, FARTHEST * values[len(values) // 2])
    return bottom, top


def _picture(sweep: Sweep) -> str:
    """Value against each searched field, one small plot each: grey pruned, blue done, green the best."""
    told = [(one, one.value) for one in sweep.trials if one.value is not None]
    bottom, top = _heights(sweep)
    beyond = sum(value > top for _, value in told)
    plots = []
    for path, given in sweep.space.items():
        places = {str(value): n for n, value in enumerate(given.values)}
        logarithmic = given.kind in ("loguniform", "logint")

        def x(
            value: object, places: dict[str, int] = places, given: object = given, log: bool = logarithmic
        ) -> float:
            if places:
                return 60 + 300 * (places[str(value)] + 0.5) / len(places)
            low, high, at = (float(v) for v in (given.low, given.high, value))  # type: ignore[attr-defined, arg-type]
            if log:
                low, high, at = (math.log(v) for v in (low, high, at))
            return 60 + 300 * (at - low) / ((high - low) or 1.0)

        dots = []
        for one, value in told:
            y = 180 - 160 * (min(value, top) - bottom) / ((top - bottom) or 1.0)
            color = "#1a7f37" if one == sweep.best else "#1f6fc5" if one.state == "done" else "#9aa4af"
            title = html.escape(f"{one.name}: {short(one.values[path])}, {value:.4g}, {one.state}")
            place = f'cx="{x(one.values[path]):.1f}" cy="{y:.1f}" r="5" fill="{color}"'
            dots.append(f"<circle {place}><title>{title}</title></circle>")
        marks = [str(value) for value in given.values] or [short(given.low), short(given.high)]
        spots = [x(value) for value in given.values] or [60.0, 360.0]
        axis = "".join(
            f'<text x="{spot:.0f}" y="200" text-anchor="middle" font-size="12">{html.escape(mark)}</text>'
            for mark, spot in zip(marks, spots, strict=True)
        )
        ends = "".join(
            f'<text x="52" y="{y}" text-anchor="end" font-size="12">{value:.3g}</text>'
            for y, value in ((184, bottom), (24, top))
        )
        name = html.escape(path)
        plots.append(
            f'<svg viewBox="0 0 380 225" role="img" aria-label="{html.escape(sweep.by)} by {name}">'
            f"{axis}{ends}{''.join(dots)}"
            f'<text x="210" y="220" text-anchor="middle" font-size="13">{name}</text></svg>'
        )
    return (
        f'<div class="plots">{"".join(plots)}</div><p>{html.escape(sweep.by)} at the best validation of each trial. '
        "Green: the best. Blue: done. Grey: pruned or failed."
        + (f" {counted(beyond, 'trial')} above {top:.3g} at the upper edge." if beyond else "")
        + "</p>"
    )


def page(sweep: Sweep) -> str:
    """The sweep as one page that opens offline."""
    title = f"Sweep of {sweep.folder.name.removesuffix('.sweep')}"
    said = "".join(f"<p>{html.escape(line)}</p>" for line in sentences(sweep))
    space = "; ".join(f"{path}: {given}" for path, given in sweep.space.items())
    compared = _rows(against_table(sweep))
    if compared:
        number = len(sweep.against)
        compared = (
            f"<h2>On held-out questions</h2>{compared}<p>Paired differences on the same questions. The intervals under "
            f"“all together” hold at once with the chosen probability (Bonferroni over {number}); p is adjusted by "
            "Holm's method, and a verdict needs the interval and p.</p>"
        )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{padding:.25rem .75rem;text-align:left;border-bottom:1px solid #d0d7de}"
        ".wide{overflow-x:auto}.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(18rem,1fr))}</style>"
        f"<h1>{html.escape(title)}</h1>{said}{compared}<h2>Trials</h2>{_picture(sweep)}{_rows(trials_table(sweep))}"
        f"<p>Searched: {html.escape(space)}</p></html>\n"
    )
