"""The Plan page: what a run would do and take, with reasons, before anything is started."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from tunesmith import api, devices
from tunesmith.errors import counted, size
from tunesmith.ui import form, theme
from tunesmith.ui.choosing import either, written
from tunesmith.ui.shared import Shared, box, busy, command, empty
from tunesmith.ui.workspace import Workspace, workspace_of

if TYPE_CHECKING:
    from tunesmith.estimate import Estimate
    from tunesmith.plan import Plan

HERE = "this machine"
COLOURS = {
    "process": "#8d99ae",
    "weights": "#3b6ea5",
    "gradients": "#6b3fb5",
    "optimizer": "#b3541e",
    "activations": "#1d7a3c",
    "head": "#c08a00",
    "cache": "#2a8c8c",
    "outputs": "#5a9e6f",
    "evaluation": "#7a5c3e",
    "save": "#a23b72",
    "reserved": "#5c6370",
    "gathered": "#7fa3d1",
    "buckets": "#a888d6",
    "spread": "#b8bec8",
}
"""A colour for each part of the memory, as `estimate.ABOUT` names them."""


NONE_YET = empty("No plan yet.", "It reads the data and takes a step on a hollow model: some seconds.")


@dataclass(frozen=True)
class Planned:
    """A plan with what became of the rows, and notes of composing the recipe."""

    plan: Plan
    rows: Mapping[str, Any]
    notes: tuple[str, ...]


def planned(
    layer: Mapping[str, Any], workspace: Workspace, device: str = HERE, *, measured: bool = False
) -> Planned:
    """What the layer's recipe comes to here, or on a device of this name. Raises TunesmithError.

    `measured` takes two micro-steps here, which loads the model, and looks for the largest micro-batch.
    """
    made = form.checked(layer, workspace)
    here = device == HERE
    plan, rows = api.plan(made.recipe, device=None if here else device, measured=measured and here)
    return Planned(plan, rows, made.notes)


def verdict(found: Planned) -> str:
    """Whether the run fits, as a box: the one thing to know before the start."""
    plan, estimate = found.plan, found.plan.estimate
    lines = [
        f"{counted(plan.total_steps, 'step')} of {counted(plan.batch_size, 'row')}, "
        f"{plan.tokens_per_epoch:,} tokens in one pass over {counted(plan.examples, 'example')}",
        *found.notes,
    ]
    if estimate is None or not estimate.stages:
        return box(
            "Memory and time are not known.", [*(estimate.notes if estimate else ()), *lines], kind="warn"
        )
    from tunesmith.estimate.pace import duration

    used = f"{size(estimate.peak)} of {size(estimate.capacity)} on {estimate.device}"
    lines.insert(
        0,
        f"About {duration(estimate.seconds)}, {duration(estimate.seconds_per_step)} a step ({estimate.basis})",
    )
    if short := estimate.disk_warning():
        lines.append(short)
    if not estimate.missing:
        return box(f"It fits: {used}.", lines, kind="warn" if short else "good")
    lines += [f"What takes less: {remedy.sentence()}" for remedy in estimate.remedies]
    return box(f"It does not fit, by {size(estimate.missing)}: {used}.", lines)


def micro_batch(estimate: Estimate | None) -> str:
    """How many rows a forward pass takes, and why, as a box."""
    if estimate is None or not estimate.stages:
        return ""
    if estimate.largest_batch is None:
        said = "The recipe says so. The largest that fits is looked for where steps are measured."
        return box(f"Micro-batch: {estimate.micro_batch}", [said], kind="note")
    lines = [f"As this run's seed puts rows together; the recipe has {estimate.micro_batch}."]
    return box(f"Largest micro-batch that fits: {estimate.largest_batch:,}", lines, kind="note")


def memory(estimate: Estimate | None) -> Any:
    """The memory of each stage as a bar of its parts, against what there is; None where nothing is known."""
    if estimate is None or not estimate.stages:
        return None
    import plotly.graph_objects as go

    from tunesmith.estimate import ABOUT

    stages = sorted(estimate.stages, key=lambda name: sum(estimate.stages[name].values()))
    parts = [part for part in ABOUT if any(estimate.stages[stage].get(part) for stage in stages)]
    figure = go.Figure(
        [
            go.Bar(
                name=part,
                orientation="h",
                y=stages,
                x=[estimate.stages[stage].get(part, 0) / 1e9 for stage in stages],
                hovertext=[
                    f"{part} {size(estimate.stages[stage].get(part, 0))}: {ABOUT[part]}" for stage in stages
                ],
                hoverinfo="text",
                marker_color=COLOURS[part],
            )
            for part in parts
        ]
    )
    # Far to the right it would leave the parts too narrow to be told apart.
    near = estimate.capacity < 3 * estimate.peak
    if near:
        figure.add_vline(x=estimate.capacity / 1e9, line_dash="dash", line_color=theme.SERIES[1])
    figure.update_layout(
        **theme.plain_layout(150 + 44 * len(stages)),
        barmode="stack",
        title=theme.plot_title(
            f"Memory by stage, in GB; {'the line: ' if near else ''}there are {size(estimate.capacity)}"
        ),
        showlegend=False,
    )
    return figure


def legend(estimate: Estimate | None) -> str:
    """What the colours of the memory stand for, and how much each part is where the memory is fullest, as HTML.

    Below the plot and not in it: there it would wrap over the bars of a narrow window.
    """
    if estimate is None or not estimate.stages:
        return ""
    from tunesmith.estimate import ABOUT

    fullest = estimate.stages[estimate.stage]
    parts = [part for part in ABOUT if any(held.get(part) for held in estimate.stages.values())]
    items = "".join(
        f'<li title="{html.escape(ABOUT[part])}"><i style="background:{COLOURS[part]}"></i>{html.escape(part)} '
        f'<span class="ts-quiet">{size(fullest[part]) if fullest.get(part) else "-"}</span></li>'
        for part in parts
    )
    said = f"In {html.escape(estimate.stage)}, which takes most:"
    return f'<p class="ts-quiet">{said}</p><ul class="ts-parts">{items}</ul>'


def lines(found: Planned) -> list[list[str]]:
    """Everything that was worked out, with its reason, for `gr.Dataframe`."""
    rows = [
        [
            "rows",
            ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in found.rows["rows"].items()),
            "the ledger",
        ]
    ]
    rows += [["dropped", str(count), reason] for reason, count in found.rows["dropped"].items()]
    rows += [[d.name, str(d.value), d.reason] for d in found.plan.decisions]
    if found.plan.estimate:
        rows += [[name.strip(), value, reason] for name, value, reason in found.plan.estimate.lines()]
    return rows


def all_of(
    layer: Mapping[str, Any], workspace: Workspace, device: str = HERE, *, measured: bool = False
) -> list[Any]:
    """What the page shows of a plan: verdict, memory and its legend, micro-batch, and everything in a table."""
    found = planned(layer, workspace, device, measured=measured)
    estimate = found.plan.estimate
    return [verdict(found), memory(estimate), legend(estimate), micro_batch(estimate), lines(found)]


def argv(layer: Mapping[str, Any], workspace: Workspace, device: str = HERE) -> list[str]:
    """The command that plans the same."""
    return [
        *form.argv(form.settled(layer, workspace), "plan"),
        *([] if device == HERE else ["--device", device]),
    ]


def build(shared: Shared) -> None:
    """Fill the tab."""
    with gr.Row():
        device = gr.Dropdown(
            [HERE, *devices.DEVICES],
            value=HERE,
            label="Plan for",
            elem_id="plan-device",
            info="A device that is elsewhere can be planned for by its name.",
            scale=1,
            min_width=280,
        )
        measure = gr.Checkbox(
            False,
            label="Measure two steps here",
            elem_id="plan-measure",
            scale=1,
            min_width=280,
            info="As the command does: loads the model and times two steps, after the plan is shown.",
        )
        start = gr.Button("Work out the plan", variant="primary", elem_id="plan-start", scale=1)
        onward = gr.Button("On to training", elem_id="plan-onward", scale=1)
    state = gr.HTML(NONE_YET, elem_id="plan-state")
    was_planned = gr.State(False)
    plot = gr.Plot(label="Memory", show_label=False, elem_id="plan-memory", visible=False)
    colours = gr.HTML("", elem_id="plan-legend")
    batch = gr.HTML("", elem_id="plan-batch")
    table = gr.Dataframe(
        headers=["what", "value", "why"],
        label="Everything, with reasons",
        elem_id="plan-table",
        interactive=False,
        wrap=True,
        datatype="str",
        type="array",
    )
    line = written("", "The same in a shell", "plan-command")

    def work(
        layer: dict[str, Any], device: str, measured: bool, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """The plan without measuring, which is soon there; then, where it is wanted, with measured seconds."""
        workspace = workspace_of(request)
        known = device if device in devices.DEVICES else HERE
        line = command(argv(layer, workspace, known))
        yield busy("Reading and preparing the rows ..."), *[gr.skip()] * 4, line, True
        said, bar, *others = either(lambda: all_of(layer, workspace, known), 5)
        again = measured and known == HERE and bar is not None
        waits = busy("Measuring two steps here; the plan below is without them ...") if again else ""
        yield waits + said, gr.update(value=bar, visible=bar is not None), *others, line, True
        if again:
            said, bar, *others = either(lambda: all_of(layer, workspace, measured=True), 5)
            yield said, gr.update(value=bar, visible=bar is not None), *others, line, True

    gr.on(
        [start.click, shared.plans.change],
        work,
        [shared.recipe, device, measure],
        [state, plot, colours, batch, table, line, was_planned],
        show_progress="hidden",
        trigger_mode="always_last",  # a click just after the plan is shown counts as well
        concurrency_id="models",
        concurrency_limit=1,
    )

    def outdated(
        layer: dict[str, Any], device: str, was_planned: bool, request: gr.Request
    ) -> tuple[str, str]:
        changed = empty("The recipe has changed.", "The plan below is of the one before: work it out again.")
        said = changed if was_planned else NONE_YET
        return said, command(argv(layer, workspace_of(request), device))

    gr.on(
        [shared.recipe.change, device.input],
        outdated,
        [shared.recipe, device, was_planned],
        [state, line],
        show_progress="hidden",
        trigger_mode="always_last",
    )
    onward.click(lambda: gr.Tabs(selected="train"), None, shared.tabs)
