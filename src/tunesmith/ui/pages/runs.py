"""The Runs page: all runs, their curves over one another, what they take of the disk, and a trash with undo."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import gradio as gr
from gradio.components.plot import PlotData
from gradio.context import get_render_context

from tunesmith import api
from tunesmith.errors import RunError, counted, size
from tunesmith.evaluation.compare import shown
from tunesmith.evaluation.metrics import METRICS
from tunesmith.training.run import dataset_name
from tunesmith.ui import curves, theme, trash
from tunesmith.ui.choosing import clock, guarded, run_names, run_path, shell_line
from tunesmith.ui.shared import PRIVATE, QUIET, Shared, box, command, empty
from tunesmith.ui.workspace import Workspace, workspace_of

MOST = 8
"""Runs whose curves are drawn over one another."""
HEADERS = ["run", "state", "model", "data", "step", "metric", "base", "tuned", "verdict", "size"]
NONE_YET = empty("No runs yet.", "Start one on the Train page; it appears here with its scores.")


def lines(found: Sequence[api.RunSummary]) -> list[list[str]]:
    """The table, newest first."""
    return [
        [
            run.path.name, run.state, dataset_name(run.model), " + ".join(run.datasets), run.steps,
            run.metric or "", _score(run.base, run.metric), _score(run.tuned, run.metric), run.verdict or "",
            size(run.bytes),
        ]
        for run in reversed(found)
    ]  # fmt: skip


def _score(value: float | None, metric: str | None) -> str:
    return "" if value is None or metric not in METRICS else shown(value, METRICS[metric])


def disk(workspace: Workspace, found: Sequence[api.RunSummary]) -> str:
    """What the runs and the trash take, and what is left."""
    taken = sum(run.bytes for run in found)
    waste, made = (
        sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        for folder in (workspace.trash, workspace.exports)
    )
    told = [f"What was exported takes {size(made)}."] if made else []
    told += [f"The trash takes {size(waste)}; it is emptied below."] if waste else []
    if "best" in " ".join(run.steps for run in found):
        told.append(
            "Step “300, best 200”: trained to step 300; the model of step 200 validated best and is the run's."
        )
    left = shutil.disk_usage(workspace.root).free
    return box(
        f"{counted(len(found), 'run')}: {size(taken)}; {size(left)} of the disk are free.", told, kind="note"
    )


def titles(workspace: Workspace, names: Sequence[str]) -> list[str]:
    """Curves that any of these runs has."""
    figures = [f for name in names for f in curves.events_of(run_path(workspace, name)).look().figures]
    return list(dict.fromkeys(figure["title"] for figure in figures))


def overlaid(workspace: Workspace, names: Sequence[str], title: str) -> PlotData | None:
    """One kind of curve of several runs, each in its colour; validation is dotted."""
    traces: list[dict[str, Any]] = []
    layout: dict[str, Any] = {}
    for number, name in enumerate(names[:MOST]):
        figures = curves.events_of(run_path(workspace, name)).look().figures
        figure = next((f for f in figures if f["title"] == title), None)
        if figure is None:
            continue
        layout = layout or dict(figure["data"]["layout"])
        several = len(figure["data"]["traces"]) > 1
        for trace in figure["data"]["traces"]:
            dash = "dot" if "validation" in trace["name"] else trace.get("dash", "solid")
            line = {"color": theme.SERIES[number % len(theme.SERIES)], "dash": dash}
            label = f"{name}, {trace['name']}" if several else name
            traces.append({**trace, "name": label, "line": line, "marker": {"color": line["color"]}})
    if not traces:
        return None
    data = {"traces": traces, "layout": {**layout, "showlegend": True}}
    return PlotData(type="plotly", plot=curves.plotted({"title": title, "data": data}, height=420))


def build(shared: Shared) -> None:
    """Fill the tab."""
    about = gr.HTML(NONE_YET, elem_id="runs-about")
    table = gr.Dataframe(
        headers=HEADERS, datatype="str", type="array", interactive=False, wrap=True, elem_id="runs-table",
        label="Runs, newest first; choose a line to look at that run on the other pages", show_search="search",
    )  # fmt: skip
    line = shell_line("runs")
    told = gr.HTML("", elem_id="runs-told")
    with gr.Column(elem_id="runs-work"):
        gr.Markdown("### Curves over one another")
        with gr.Row():
            several = gr.Dropdown(choices=[], value=[], multiselect=True, max_choices=MOST, label="Runs",
                                  elem_id="runs-several", interactive=True)  # fmt: skip
            curve = gr.Dropdown(choices=[], value=None, label="Curve", elem_id="runs-curve", interactive=True)
        plot = gr.Plot(label="Curves", show_label=False, elem_id="runs-plot")
        with gr.Accordion("Delete and undo", open=False, elem_id="runs-delete-part"):
            with gr.Row():
                doomed = gr.Dropdown(
                    choices=[], value=None, label="Run", elem_id="runs-doomed", interactive=True
                )
                away = gr.Button("Move to the trash", variant="stop", elem_id="runs-delete")
            with gr.Row():
                back = gr.Dropdown(
                    choices=[], value=None, label="In the trash", elem_id="runs-trash", interactive=True
                )
                undo = gr.Button("Put it back", elem_id="runs-undo")
                sure = gr.Checkbox(label="I want it gone for good", elem_id="runs-sure")
                final = gr.Button("Empty the trash", variant="stop", elem_id="runs-empty")

    def refreshed(compared: list[str] | None, request: gr.Request) -> list[Any]:
        workspace = workspace_of(request)

        def act() -> list[Any]:
            found = api.runs(workspace.runs)
            names = [run.path.name for run in reversed(found)]
            thrown = [(f"{one.name}, {clock(one.at)}", one.id) for one in trash.thrown(workspace)]
            return [
                disk(workspace, found) if found or thrown else NONE_YET,
                lines(found),
                command(["tunesmith", "runs", str(workspace.runs)]),
                gr.Dropdown(
                    choices=names, value=[n for n in compared or names[:3] if n in names] or names[:3]
                ),
                gr.Dropdown(choices=names, value=names[0] if names else None),
                gr.Dropdown(choices=thrown, value=thrown[0][1] if thrown else None),
            ]

        return list(guarded(act, lambda said: [said, *[gr.skip()] * 5]))

    shown_parts = [about, table, line, several, doomed, back]

    tab = get_render_context()
    assert isinstance(tab, gr.Tab)
    tab.select(refreshed, inputs=[several], outputs=shown_parts, **QUIET)

    def of_runs(names: list[str] | None, title: str | None, request: gr.Request) -> list[Any]:
        def act() -> list[Any]:
            workspace = workspace_of(request)
            known = [name for name in names or [] if name in run_names(workspace)]
            there = titles(workspace, known)
            now = title if title in there else there[0] if there else None
            return [gr.Dropdown(choices=there, value=now), overlaid(workspace, known, now) if now else None]

        return list(guarded(act, lambda _: [gr.skip(), None]))

    gr.on([several.change, curve.input], of_runs, inputs=[several, curve], outputs=[curve, plot], **QUIET)

    def choose(event: gr.SelectData) -> Any:
        return event.row_value[0] if event.row_value else gr.skip()

    table.select(choose, outputs=[shared.run], **QUIET)

    def moved(act: Any, word: str) -> Any:
        def on(name: str | None, request: gr.Request) -> list[Any]:
            def make() -> list[Any]:
                if not name:
                    raise RunError("No run is chosen.", fix="Choose one beside the button.")
                start, end = act(workspace_of(request), name)
                return [
                    box(f"{start.name.partition('@')[0]}: {word}", kind="good"),
                    command(["mv", str(start), str(end)]),
                ]

            return list(guarded(make, lambda said: [said, gr.skip()]))

        return on

    away.click(
        moved(trash.delete, "in the trash, from which it can be put back"), [doomed], [told, line], **PRIVATE
    ).then(refreshed, inputs=[several], outputs=shown_parts, **QUIET)
    undo.click(moved(trash.undo, "back among the runs"), [back], [told, line], **PRIVATE).then(
        refreshed, inputs=[several], outputs=shown_parts, **QUIET
    )

    def emptied(is_sure: bool, request: gr.Request) -> list[Any]:
        def act() -> list[Any]:
            if not is_sure:
                raise RunError("Nothing was removed.", fix="Tick the box first: this cannot be undone.")
            workspace = workspace_of(request)
            doomed = [str(workspace.trash / one.id) for one in trash.thrown(workspace)]
            number = trash.empty(workspace)
            said = box(f"{number} runs are gone for good.", kind="warn")
            return [said, False, command(["rm", "-r", *doomed]) if doomed else gr.skip()]

        return list(guarded(act, lambda said: [said, gr.skip(), gr.skip()]))

    final.click(emptied, [sure], [told, sure, line], **PRIVATE).then(
        refreshed, inputs=[several], outputs=shown_parts, **QUIET
    )
