"""The Train page: start, watch, stop, go on. What trains is a job of its own; the page only looks at its files."""

from __future__ import annotations

import functools
import html
import threading
from collections.abc import Mapping
from typing import Any, get_args

import gradio as gr
from gradio.components.plot import PlotData
from gradio.context import get_render_context

from tunesmith.errors import InputError, TunesmithError, size
from tunesmith.training.run import State, folder_name, open_run
from tunesmith.ui import curves, form
from tunesmith.ui.choosing import (
    LONGEST_TEXT,
    clock,
    duration,
    guarded,
    is_told,
    job_box,
    job_facts,
    queue_of,
    run_choice,
    run_path,
    told_of,
    watching,
)
from tunesmith.ui.jobs import TRAINING, Job
from tunesmith.ui.shared import PRIVATE, QUIET, Shared, box, command, empty
from tunesmith.ui.workspace import Workspace, workspace_of

MAIN = ("Loss", "Learning rate", "Gradient norm", "Speed", "Memory")
"""Figures that have a place of their own; of the others one is chosen."""
SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("learning_rate", "learning rate", "{:.2e}"),
    ("grad_norm", "gradient norm", "{:.3g}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
)
"""What the newest step says, its name and how it is written."""
ENDS = get_args(State)
"""What a run says last."""
PLOTS_KEPT = 128
UNNAMED = "the recipe's name, or task and data set, if nothing is said"
NONE_YET = empty("No run yet.", "Start one above: it trains on its own, also when you close this page.")


def start(workspace: Workspace, layer: Mapping[str, Any], name: str | None = None) -> Job:
    """Queue a training of this recipe under a run's name, by default its task's and data set's with a free number.

    Raises TunesmithError for a recipe that cannot be, or names what is not the user's, for a name that is taken, and
    without a name for a recipe that waits or is trained already: that is the same button once more.
    """
    with _starting:
        argv, free = planned(workspace, layer, name)
        queue = queue_of(workspace)
        for job in queue.jobs():
            if (name or "").strip() or not job.is_open or job.kind != "train":
                continue
            if list(job.arguments) == _argv(workspace, layer, str(job.run))[1:]:
                raise InputError(
                    "This recipe is in the queue already.",
                    found=job.title,
                    fix="Give the new run a name to train it once more.",
                )
        return queue.add(argv[1:], title=f"Train {free}", run=free)


_starting = threading.Lock()
"""One start at a time: it looks at names and jobs before it adds one."""


def planned(
    workspace: Workspace, layer: Mapping[str, Any], name: str | None = None, *, shown: bool = False
) -> tuple[list[str], str]:
    """The command that trains this recipe, and the run's name; one that is only shown may have a taken name."""
    if not layer:
        raise InputError(
            "There is no recipe yet.", fix="Choose data on the Data page, a model on the Recipe page."
        )
    recipe = form.checked(layer, workspace).recipe
    jobs = queue_of(workspace).jobs()
    taken = {path.name for path in workspace.runs.iterdir()} | {job.run for job in jobs if job.is_open}
    name = (name or "").strip()
    wanted = name or folder_name(recipe)
    if name and wanted in taken and not shown:
        raise InputError("This name is taken.", found=repr(wanted[:60]), fix="Choose another one.")
    number, free = 2, wanted
    while free in taken and not (name and shown):
        free, number = f"{wanted}-{number}", number + 1
    workspace.inside(workspace.runs, free)
    return _argv(workspace, layer, free), free


def _argv(workspace: Workspace, layer: Mapping[str, Any], name: str) -> list[str]:
    return form.argv({**form.settled(layer, workspace), "name": name})


def preview(workspace: Workspace, layer: Mapping[str, Any], name: str | None) -> str:
    """The command that a start would run, or as a comment in a shell why there is none yet."""
    try:
        return command(planned(workspace, layer, name, shown=True)[0])
    except Exception as error:
        told_of(error)  # one that is not ours goes to the log
        said = str(error) if isinstance(error, TunesmithError) else "This failed; the log has the details."
        return "# " + " ".join(said.split())


def unnamed(workspace: Workspace, layer: Mapping[str, Any]) -> str:
    """What the page says of a new run's name where none is typed: the one that it gets."""
    try:
        return f"{planned(workspace, layer)[1]}, if nothing is said"
    except TunesmithError:  # the preview says why there is no run yet
        return UNNAMED


def status(seen: curves.Seen, job: Job | None, state: str) -> str:
    """How far a run is, for `gr.HTML`."""
    word = "stopping" if job and job.stop_asked and job.is_open else state
    facts = []
    if seen.total_steps:
        facts.append(("step", f"{seen.step:,} of {seen.total_steps:,}"))
    facts += [
        (label, written.format(seen.latest[key])) for key, label, written in SHOWN if key in seen.latest
    ]
    if seen.latest.get("memory"):
        facts.append(("memory", size(seen.latest["memory"])))
    if seen.seconds_left is not None and state == "running" and seen.state == "training":
        facts.append(("time left", duration(seen.seconds_left)))
    if state == "running" and seen.state != "training":
        # A run that goes on has its last end as its newest word until it says where it is.
        facts.append(("now", "preparing" if seen.state in ENDS else seen.state or "preparing"))
    if seen.no_numbers:
        facts.append(("not shown", f"{seen.no_numbers} values that are no numbers"))
    cells = "".join(f"<div><dt>{html.escape(n)}</dt><dd>{html.escape(v)}</dd></div>" for n, v in facts)
    share = 100 * seen.step / seen.total_steps if seen.total_steps else 0
    bar = (
        f'<progress aria-label="steps done" max="100" value="{share:.1f}">{share:.0f} %</progress>'
        if seen.total_steps
        else ""
    )
    return f'<div class="ts-status" role="status"><strong>{html.escape(word)}</strong>{bar}<dl>{cells}</dl></div>'


@functools.lru_cache(maxsize=PLOTS_KEPT)
def plot(seen: curves.Seen, title: str | None) -> PlotData | None:
    """A figure of a run as it is sent to a browser, made once for all who watch; None where there is none."""
    figure = next((f for f in seen.figures if f["title"] == title), None)
    return PlotData(type="plotly", plot=curves.plotted(figure)) if figure else None


def queued(job: Job, *lines: str) -> str:
    """The box for a job that was put into the queue; it goes once the job runs."""
    return box(f"{job.title}: queued at {clock(job.queued)}", lines, kind="good")


def samples(seen: curves.Seen) -> list[list[str]]:
    """Answers while it is trained, newest first."""
    return [
        [
            str(e.get("step") or 0),
            str(e.get("prompt", ""))[:LONGEST_TEXT],
            str(e.get("completion", ""))[:LONGEST_TEXT],
        ]
        for e in seen.samples
    ]


def build(shared: Shared) -> None:
    """Fill the tab."""
    with gr.Column(elem_id="train-start-group"):
        with gr.Row():
            name = gr.Textbox(
                value="", label="Name of the new run", placeholder=UNNAMED, max_lines=1,
                elem_id="train-name", max_length=120, scale=3,
            )  # fmt: skip
            begin = gr.Button("Start training", variant="primary", elem_id="train-start", scale=1)
        line = gr.Textbox(
            label="The same in a shell",
            interactive=False,
            elem_id="train-command",
            buttons=["copy"],
            lines=1,
            max_lines=4,
        )
        told = gr.HTML("", elem_id="train-told")
    chosen = run_choice(shared, "train")
    state = gr.HTML(NONE_YET, elem_id="train-status")
    with gr.Row():
        stop = gr.Button("Stop and save", elem_id="train-stop", interactive=False)
        stop_now = gr.Button("Stop at once", elem_id="train-stop-now", variant="stop", interactive=False)
        resume = gr.Button("Resume", elem_id="train-resume", interactive=False)
    ended = gr.HTML("", elem_id="train-ended")
    with gr.Row(elem_id="train-plots"):
        plots = [
            gr.Plot(
                label=title,
                show_label=False,
                elem_id=f"train-plot-{title.lower().replace(' ', '-')}",
                min_width=240,
            )
            for title in MAIN
        ]
    with gr.Accordion("Other curves", open=False, elem_id="train-more"):
        other = gr.Dropdown(choices=[], value=None, label="Curve", elem_id="train-curve", interactive=True)
        other_plot = gr.Plot(label="Other curve", show_label=False, elem_id="train-plot-other")
    with gr.Accordion(
        "Sample answers", open=True, elem_id="train-samples-part", elem_classes="ts-with-table"
    ):
        answers = gr.Dataframe(
            headers=["step", "prompt", "answer"], datatype="str", type="array", interactive=False, wrap=True,
            label="What it answers while it learns, newest first", elem_id="train-samples", max_height=320,
        )  # fmt: skip
    with gr.Accordion("Log", open=False, elem_id="train-log-part"):
        log = gr.Textbox(
            label="Log", lines=14, max_lines=14, interactive=False, elem_id="train-log", autoscroll=True
        )
    with gr.Accordion("Queue", open=True, elem_id="train-queue-part", elem_classes="ts-with-table"):
        table = gr.Dataframe(
            headers=["job", "what", "state", "at", "how it ended"], datatype="str", type="array", interactive=False,
            wrap=True, label="Jobs, newest first", elem_id="train-queue", max_height=320,
        )  # fmt: skip
        with gr.Row():
            waiting = gr.Dropdown(
                choices=[],
                value=None,
                label="Waiting job",
                elem_id="train-waiting",
                interactive=True,
                visible=False,
            )
            cancel = gr.Button("Cancel this job", elem_id="train-cancel", visible=False)
    seen_before = gr.State(("", -1, "", ""))
    spoken_of = gr.State(None)  # number of the job that `told` is about
    timer = watching(shared, "Train")

    def look(
        run: str | None,
        curve: str | None,
        picked: str | None,
        before: tuple[str, int, str, str],
        spoken: str | None,
        request: gr.Request,
    ) -> Any:
        """What has changed since the last look, by component."""
        workspace = workspace_of(request)
        queue = queue_of(workspace)
        queue.wake()
        jobs = queue.jobs()
        rows = [job_facts(job) for job in reversed(jobs)]
        job = queue.of_run(run, TRAINING) if run else None
        # None where the run waits for its turn, or was deleted.
        path = guarded(lambda: run_path(workspace, run), lambda _: None) if run else None
        seen = curves.events_of(path).look() if path else None
        is_running = bool(job and job.state == "running" and job.is_alive())
        is_stopping = bool(job and job.stop_asked)
        real = "running" if is_running else open_run(path).state() if path else job.state if job else ""
        said = queue.said(job) if job else "\n".join(seen.told) if seen else ""
        others = [f["title"] for f in seen.figures if f["title"] not in MAIN] if seen else []
        curve = curve if curve in others else others[0] if others else None
        is_over = is_told(next((j for j in jobs if j.id == spoken), None))
        now = (
            run or "",
            seen.version if seen else -1,
            curve or "",
            f"{rows}{real}{hash(said)}{job}{is_over}",
        )
        if now == before:
            return gr.skip()  # of everything
        can_go_on = bool(path) and real in ("interrupted", "died", "failed") and not (job and job.is_open)
        went_wrong = job is not None and not job.is_open and job.state != "done"
        open_jobs = [(f"{int(j.id)}: {j.title}", j.id) for j in jobs if j.state == "waiting"]
        ids = [id for _, id in open_jobs]
        chosen_job = picked if picked in ids else ids[0] if ids else None
        changed: dict[Any, Any] = {
            seen_before: now,
            stop: gr.Button(interactive=is_running and not is_stopping),
            stop_now: gr.Button(interactive=is_running and is_stopping),
            resume: gr.Button(interactive=can_go_on),
            ended: job_box(queue, job) if went_wrong else "",
            **({told: "", spoken_of: None} if is_over else {}),
            table: rows,
            waiting: gr.Dropdown(choices=open_jobs, value=chosen_job, visible=bool(ids)),
            cancel: gr.Button(visible=bool(ids)),
            log: said,
        }
        if seen is None:
            nothing: dict[Any, Any] = {
                other: gr.Dropdown(choices=[], value=None),
                other_plot: None,
                answers: [],
            }
            begins = (
                "It is beginning." if real == "running" else "It begins when the jobs before it have ended."
            )
            awaited = box(f"{run}: {real}", [begins], kind="note") if job and job.is_open else NONE_YET
            return {**changed, state: awaited, **dict.fromkeys(plots), **nothing}
        changed[state] = status(seen, job, real)
        if now[:3] != before[:3]:
            changed[other] = gr.Dropdown(choices=others, value=curve)
            changed[other_plot] = plot(seen, curve)
        if now[:2] != before[:2]:
            changed |= {place: plot(seen, title) for place, title in zip(plots, MAIN, strict=True)}
            changed[answers] = samples(seen)
        return changed

    watched = [
        seen_before, stop, stop_now, resume, ended, table, waiting, cancel, log, state, *plots, other, other_plot,
        answers, told, spoken_of,
    ]  # fmt: skip
    tab = get_render_context()
    assert isinstance(tab, gr.Tab)
    # With the click on the tab as well: the clock's first tick comes only after its pause. One look at a time: two at
    # once would both find everything new, and draw it twice.
    gr.on(
        [tab.select, timer.tick, chosen.change, other.input],
        look,
        inputs=[chosen, other, waiting, seen_before, spoken_of],
        outputs=watched,
        trigger_mode="always_last",
        **QUIET,
    )

    def previewed(layer: Mapping[str, Any], name: str, request: gr.Request) -> tuple[str, Any]:
        workspace = workspace_of(request)
        return preview(workspace, layer, name), gr.update(placeholder=unnamed(workspace, layer))

    gr.on(
        [tab.select, shared.recipe.change, name.blur],
        previewed,
        inputs=[shared.recipe, name],
        outputs=[line, name],
        **QUIET,
    )

    def started(layer: Mapping[str, Any], name: str, request: gr.Request) -> list[Any]:
        def act() -> list[Any]:
            job = start(workspace_of(request), layer, name)
            return [
                queued(job, "It goes on when you close this page."),
                job.command,
                job.id,
                job.run,
            ]

        return list(guarded(act, lambda said: [said, gr.skip(), None, gr.skip()]))

    begin.click(started, inputs=[shared.recipe, name], outputs=[told, line, spoken_of, shared.run], **PRIVATE)

    def acted(act: Any) -> Any:
        def on(run: str | None, request: gr.Request) -> list[Any]:
            workspace = workspace_of(request)
            return list(guarded(lambda: act(workspace, run), lambda said: [said, gr.skip(), None]))

        return on

    def ask_to_stop(workspace: Workspace, run: str | None, *, at_once: bool = False) -> list[Any]:
        queue = queue_of(workspace)
        job = queue.of_run(run, TRAINING) if run else None
        if job is None or not job.is_open:
            raise InputError(
                "Nothing runs here that could be stopped.",
                fix="It has ended already, or was started elsewhere.",
            )
        queue.stop(job.id, at_once=at_once)
        same = command(["kill", "-INT", str(job.pid)]) if job.pid else gr.skip()
        if at_once:
            said = box(
                "Asked to stop at once.",
                ["Its newest checkpoint stays; Resume goes on from there."],
                kind="warn",
            )
            return [said, same, job.id]
        said = box(
            "Asked to stop.",
            ["It finishes its step, saves, and ends; Resume goes on from there."],
            kind="note",
        )
        return [said, same, job.id]

    def go_on(workspace: Workspace, run: str | None) -> list[Any]:
        job = queue_of(workspace).resume(run_path(workspace, run))
        return [queued(job), job.command, job.id]

    def call_off(workspace: Workspace, id: str | None) -> list[Any]:
        if not id:
            raise InputError("No waiting job is chosen.", fix="Choose one of the queue.")
        job = queue_of(workspace).job(id)
        if job.state != "waiting":
            raise InputError(
                f"{job.title} is not waiting any more.", found=job.state, fix="Use Stop and save."
            )
        return [box(f"{queue_of(workspace).stop(id).title}: canceled", kind="note"), gr.skip(), id]

    at_once = acted(lambda workspace, run: ask_to_stop(workspace, run, at_once=True))
    answer = [told, line, spoken_of]
    stop.click(acted(ask_to_stop), inputs=[chosen], outputs=answer, **PRIVATE)
    stop_now.click(at_once, inputs=[chosen], outputs=answer, **PRIVATE)
    resume.click(acted(go_on), inputs=[chosen], outputs=answer, **PRIVATE)
    cancel.click(acted(call_off), inputs=[waiting], outputs=answer, **PRIVATE)
