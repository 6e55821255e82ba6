"""What pages share: which run is looked at, the state of jobs in words, commands to copy, errors as boxes."""

from __future__ import annotations

import contextlib
import html
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from tunesmith.errors import InputError, TunesmithError
from tunesmith.training.run import find_runs, is_run, open_run
from tunesmith.ui import curves, form
from tunesmith.ui.jobs import Job, Queue
from tunesmith.ui.shared import QUIET, Shared, box, problem
from tunesmith.ui.workspace import Workspace, workspace_of

WATCHING = 2.0
"""Seconds between two looks of a page at what it watches."""
LONGEST_TEXT = 2000
"""Characters of a text in a table; the whole one is shown when its row is chosen."""


def queue_of(workspace: Workspace) -> Queue:
    """The workspace's jobs."""
    return Queue(workspace.jobs)


def run_names(workspace: Workspace) -> list[str]:
    """The workspace's runs, newest first, those that are still to be made before them."""
    made = [run.path.name for run in reversed(find_runs(workspace.runs))]
    awaited = [job.run for job in queue_of(workspace).jobs() if job.is_open and job.run]
    return list(dict.fromkeys([*reversed(awaited), *made]))


def run_path(workspace: Workspace, name: str | None) -> Path:
    """The folder of a run that a browser has named. Raises InputError where it is none."""
    if not name:
        raise InputError("No run is chosen.", fix="Choose one at the top of the page.")
    path = workspace.inside(workspace.runs, name)
    if not is_run(path):
        raise InputError(
            "There is no such run.", found=repr(name[:60]), fix="Choose another one; it may be in the trash."
        )
    return path


def run_choice(shared: Shared, page: str) -> gr.Dropdown:
    """A list of the workspace's runs; `keep_in_step` keeps those of all pages in step."""
    chosen = gr.Dropdown(
        choices=[], value=None, label="Run", elem_id=f"{page}-run", interactive=True, allow_custom_value=False
    )
    shared.run_choices.append(chosen)
    chosen.input(lambda name: name, inputs=[chosen], outputs=[shared.run], **QUIET)
    return chosen


def watching(shared: Shared, name: str) -> gr.Timer:
    """A clock that ticks while the page of this name is looked at, which `keep_in_step` sees to."""
    timer = gr.Timer(WATCHING, active=False)
    shared.clocks[name] = timer
    return timer


def keep_in_step(shared: Shared, tabs: Sequence[gr.Tab]) -> None:
    """Have all pages show the same run, and the clock of that page tick which is looked at; once they are built."""

    def offered(workspace: Workspace, name: str | None) -> tuple[str | None, list[Any]]:
        """The run that is looked at, this one if it is there, and the lists of all pages."""
        names = run_names(workspace)
        run = name if name in names else names[0] if names else None
        return run, [gr.Dropdown(choices=names, value=run) for _ in shared.run_choices]

    def listed(name: str | None, request: gr.Request) -> list[Any]:
        return offered(workspace_of(request), name)[1]

    def given(name: str | None, request: gr.Request) -> list[Any]:
        workspace = workspace_of(request)
        run, lists = offered(workspace, name)
        with contextlib.suppress(InputError):  # none, or still to be made
            curves.read_ahead(run_path(workspace, run))
        return lists

    def turned(event: gr.SelectData) -> list[Any]:
        return [gr.Timer(active=name == event.value) for name in shared.clocks]

    # On load, and where another run is chosen.
    gr.on(None, given, inputs=[shared.run], outputs=shared.run_choices, **QUIET)
    # A tab tells of buttons that lead to it as well; all tabs together (`shared.tabs`) tell of clicks on them only.
    selected = [tab.select for tab in tabs]
    gr.on(selected, listed, inputs=[shared.run], outputs=shared.run_choices, **QUIET)
    gr.on(selected, turned, outputs=list(shared.clocks.values()), **QUIET)


def written(text: str, label: str, elem_id: str) -> gr.Code:
    """A text to read and to copy, such as a command or a file; in one colour, which every eye can read."""
    return gr.Code(
        text,
        language=None,
        label=label,
        elem_id=elem_id,
        lines=1,
        max_lines=24,
        interactive=False,
        wrap_lines=True,
        show_line_numbers=False,
    )


def shell_line(page: str) -> gr.Textbox:
    """The command that does what was last asked of a page; away until there is one."""
    return gr.Textbox(
        label="The same in a shell",
        interactive=False,
        elem_id=f"{page}-command",
        buttons=["copy"],
        max_lines=4,
        elem_classes="ts-late",
        placeholder="none yet",
    )


def job_facts(job: Job) -> list[str]:
    """A job in the table of the queue: number, what, state, since when, how it ended."""
    stopping = job.state == "running" and job.stop_asked
    state = "stopping" if stopping else "ended without a word" if job.state == "lost" else job.state
    at = job.ended or job.started or job.queued
    return [str(int(job.id)), job.title, state, clock(at), job.ending()]


def clock(at: float) -> str:
    """A time as people read it; the date where it is not today's."""
    then, today = time.localtime(at), time.localtime()
    return time.strftime("%H:%M:%S" if then[:3] == today[:3] else "%Y-%m-%d %H:%M", then)


def duration(seconds: float) -> str:
    """`2 h 05 min`, `3 min 20 s`, `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"


def job_box(queue: Queue, job: Job | None) -> str:
    """What became of a job, for `gr.HTML`; a failed one with its last lines."""
    if job is None:
        return ""
    if job.state == "waiting":
        return box(f"{job.title}: waiting", ["It begins when the jobs before it have ended."], kind="note")
    if job.state == "running":
        said = tail_of(queue, job, 1)
        return box(f"{job.title}: {'stopping' if job.stop_asked else 'running'}", said, kind="note")
    if job.state == "done":
        return box(f"{job.title}: done", [], kind="good")
    kind = "warn" if job.state in ("stopped", "canceled") else "problem"
    last = tail_of(queue, job, 12) if kind == "problem" else []
    text = "".join(f"<p>{html.escape(line)}</p>" for line in [job.ending()])
    log = f"<pre>{html.escape(chr(10).join(last))}</pre>" if last else ""
    role = "alert" if kind == "problem" else "status"
    return f'<div class="ts-box ts-{kind}" role="{role}"><strong>{html.escape(job.title)}</strong>{text}{log}</div>'


def tail_of(queue: Queue, job: Job, lines: int) -> list[str]:
    """The last lines of a job's log."""
    return [line for line in queue.said(job, lines=lines).split("\n") if line]


TOLD = 10.0
"""Seconds for which what was said of a job stays when it has got further."""


def is_told(job: Job | None) -> bool:
    """Whether what a page said of a job when a button was pressed (queued, asked to stop) has been seen and is over."""
    if job is None or job.state == "waiting" or (job.state == "running" and job.stop_asked):
        return False
    return time.time() - (job.ended or job.started or job.queued) > TOLD


def last_job(workspace: Workspace, run: str | None, kinds: Sequence[str]) -> Job | None:
    """The newest job of a kind that works on a run."""
    found = [
        job for job in queue_of(workspace).jobs() if job.kind in kinds and (run is None or job.run == run)
    ]
    return found[-1] if found else None


def guarded(build: Callable[[], Any], failed: Callable[[str], Any]) -> Any:
    """What `build` gives, or what `failed` makes of the box that tells its error."""
    try:
        return build()
    except Exception as error:
        return failed(told_of(error))


def either(part: Callable[[], list[Any]], outputs: int) -> list[Any]:
    """What a part of a page shows, or the box that tells its error and nothing else."""
    return list(guarded(part, lambda said: [said, *[None] * (outputs - 1)]))


def told_of(error: Exception) -> str:
    """The box that tells an error; of one that is not ours the server's log has the rest."""
    if not isinstance(error, TunesmithError):
        logging.getLogger("tunesmith.ui").error("a page failed", exc_info=error)
    return problem(error)


def require_finished(path: Path) -> Path:
    """A run's folder that has a final model. Raises InputError where it has none."""
    if not open_run(path).final_model.is_dir():
        raise InputError(
            f"The run {path.name} has no final model yet.",
            found=f"it is {open_run(path).state()}",
            fix="Wait for it, or resume it on the Train page.",
        )
    return path


def model_named(workspace: Workspace, name: str) -> str:
    """A run of the workspace, `tiny`, or a Hub id, as the command line takes it; never a path that is elsewhere."""
    name = name.strip()
    if name in run_names(workspace):
        return str(require_finished(run_path(workspace, name)))
    for said in form.outside({"model": {"base": name}}, workspace).values():
        raise InputError(said, found=repr(name[:60]), fix="Choose a run, tiny, or owner/name.")
    return name
