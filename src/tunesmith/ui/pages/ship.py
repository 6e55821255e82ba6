"""The Ship page: whole weights, files for other programs, a folder to deploy, the Hub; each with its proof."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from tunesmith import api
from tunesmith.errors import InputError, size
from tunesmith.evaluation.report import shipped
from tunesmith.export.artefact import DEFAULTS, STORED, TARGETS, check_target
from tunesmith.export.gguf import quants
from tunesmith.training.run import Run
from tunesmith.ui.choosing import (
    guarded,
    is_told,
    job_box,
    last_job,
    queue_of,
    require_finished,
    run_choice,
    run_path,
    shell_line,
    watching,
)
from tunesmith.ui.jobs import Job
from tunesmith.ui.shared import PRIVATE, QUIET, Shared, box, command, empty
from tunesmith.ui.workspace import Workspace, workspace_of

KINDS = ("merge", "export", "push", "prepare-deployment")
FILES_SHOWN = 40
"""Files of one thing that was made, to be downloaded."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
WHAT = ("merged", "deployment", *(rf"{target}-\w+" for target in TARGETS))
"""What a run's name is followed by in the names of its exports."""
NOTHING = empty("Nothing was shipped yet.", "What is made above appears here with the verdict of its check.")


def place(workspace: Workspace, run: Path, what: str) -> Path:
    """Where a thing that is made of a run's model goes: a free name among the exports."""
    number, name = 2, f"{run.name}-{what}"
    while any(workspace.inside(workspace.exports, taken).exists() for taken in (name, f"{name}.failed")):
        name, number = f"{run.name}-{what}-{number}", number + 1
    return workspace.exports / name


def kinds_of(target: str) -> tuple[str, ...]:
    """How a target's weights can be stored."""
    known = {"gguf": quants() or (DEFAULTS["gguf"],), "safetensors": tuple(STORED)}
    return known.get(target, ("f32",))


def merge_arguments(workspace: Workspace, run: Path, dtype: str) -> list[str]:
    """What follows `tunesmith` to merge a run's adapter into its base."""
    if dtype not in DTYPES:
        raise InputError("There is no such precision.", found=repr(str(dtype)[:40]), fix=", ".join(DTYPES))
    return ["merge", f"--dtype={dtype}", f"--output={place(workspace, run, 'merged')}", "--", str(run)]


def export_arguments(workspace: Workspace, run: Path, to: str, quant: str) -> list[str]:
    """What follows `tunesmith` to write a run's model for another program."""
    check_target(to, quant)
    output = place(workspace, run, f"{to}-{quant}")
    return ["export", f"--to={to}", f"--quant={quant}", f"--output={output}", "--", str(run)]


def bundle_arguments(workspace: Workspace, run: Path) -> list[str]:
    """What follows `tunesmith` to make a folder that serves the model elsewhere."""
    return ["prepare-deployment", f"--output-dir={place(workspace, run, 'deployment')}", "--", str(run)]


def push_arguments(run: Path, repository: str, *, public: bool, dry_run: bool = False) -> list[str]:
    """What follows `tunesmith` to upload a run's model."""
    if not repository.strip() or repository.strip().startswith("-"):
        raise InputError("Where to upload is missing.", found=repr(repository[:60]), fix="Give owner/name.")
    options = [*(["--public"] if public else []), *(["--dry-run"] if dry_run else [])]
    return ["push", *options, "--", str(run), repository.strip()]


def queued(workspace: Workspace, run: Path, arguments: list[str]) -> Job:
    """Queue one of these commands for a run that is finished. Raises InputError for one that is not."""
    require_finished(run)
    title = {"merge": "Merge", "export": "Export", "push": "Push", "prepare-deployment": "Bundle"}[
        arguments[0]
    ]
    return queue_of(workspace).add(arguments, title=f"{title} {run.name}", run=run.name)


def downloads(made: Path) -> str:
    """Links to the files of what was made, for `gr.HTML`; nothing where there are none."""
    found = [made] if made.is_file() else sorted(path for path in made.rglob("*") if path.is_file())
    plain = [f for f in found if not any(part.startswith(".") for part in f.relative_to(made.parent).parts)]
    links = "".join(
        f'<li><a href="/gradio_api/file={quote(str(file))}" download>'
        f"{html.escape(str(file.relative_to(made.parent)))}</a> ({size(file.stat().st_size)})</li>"
        for file in plain[:FILES_SHOWN]
    )
    more = f"<li>{len(plain) - FILES_SHOWN} more in the folder</li>" if len(plain) > FILES_SHOWN else ""
    return f"<details><summary>Download</summary><ul>{links}{more}</ul></details>" if links else ""


def made(workspace: Workspace, run: Path | None) -> str:
    """What was made of a run's model, each with its verdict and its files, for `gr.HTML`."""
    if run is None:
        return NOTHING
    problems: list[str] = []
    own = re.compile(re.escape(run.name) + rf"-({'|'.join(WHAT)})(-\d+)?(\.failed)?")
    proven = [
        (folder, one)
        for folder in (workspace.exports, run)
        for one in shipped(Run(folder), problems)
        if folder == run or own.fullmatch(one["name"])
    ]
    parts = [
        box(
            f"{one['name']}: {'not proven' if one['passed'] == 'unproven' else one['passed'] + ' its check'}",
            [*one["lines"], str(folder / one["name"])],
            kind={"passed": "good", "FAILED": "problem"}.get(one["passed"], "warn"),
        )
        + downloads(folder / one["name"])
        for folder, one in proven
    ]
    named = {folder / one["name"] for folder, one in proven}
    parts += [
        box(
            f"{folder.name}: written",
            ["What it was checked with is not told here.", str(folder)],
            kind="note",
        )
        + downloads(folder)
        for folder in sorted(workspace.exports.iterdir())
        if own.fullmatch(folder.name) and folder not in named
    ]
    return "".join(parts) + (box("Files are damaged.", problems, kind="warn") if problems else "") or NOTHING


def build(shared: Shared) -> None:
    """Fill the tab."""
    chosen = run_choice(shared, "ship")
    state = gr.HTML("", elem_id="ship-job")
    told = gr.HTML("", elem_id="ship-told")
    with gr.Row(elem_id="ship-ways"):
        with gr.Column(min_width=300):
            gr.Markdown("### Merge\nThe adapter into its base: whole weights that need nothing else.")
            dtype = gr.Dropdown(
                list(DTYPES), value="auto", label="Precision; auto as the base's", elem_id="ship-dtype"
            )
            whole = gr.HTML("", elem_id="ship-whole")
            merge = gr.Button("Merge", variant="primary", elem_id="ship-merge")
        with gr.Column(min_width=300):
            gr.Markdown("### Export\nOne file for llama.cpp, Ollama and others, read back and asked.")
            with gr.Row():
                to = gr.Dropdown(list(TARGETS), value="gguf", label="For", elem_id="ship-to")
                quant = gr.Dropdown(
                    list(kinds_of("gguf")),
                    value=DEFAULTS["gguf"],
                    label="Weights stored as",
                    elem_id="ship-quant",
                )
            export = gr.Button("Export", variant="primary", elem_id="ship-export")
        with gr.Column(min_width=300):
            gr.Markdown("### Bundle\nA folder with weights, server, containers and a smoke test.")
            bundle = gr.Button("Make the folder", variant="primary", elem_id="ship-bundle")
    gr.Markdown(
        "### Push\nTo the Hugging Face Hub, looked through for secrets and for rows that were trained on."
    )
    with gr.Row():
        repository = gr.Textbox(
            value="", label="Repository, owner/name", max_lines=1, max_length=200, elem_id="ship-repository"
        )
        public = gr.Checkbox(label="Public", elem_id="ship-public")
        dry = gr.Button("Dry run: what would be sent?", elem_id="ship-dry")
        push = gr.Button("Push", variant="primary", interactive=False, elem_id="ship-push")
    sent = gr.Dataframe(
        headers=["file", "size"], datatype="str", type="array", interactive=False, visible=False,
        label="What would be sent", elem_id="ship-files", max_height=300,
    )  # fmt: skip
    line = shell_line("ship")
    gr.Markdown("### What was made")
    proofs = gr.HTML(NOTHING, elem_id="ship-made")
    looked_through = gr.State(None)
    before = gr.State("")
    spoken_of = gr.State(None)  # number of the job that `told` is about
    answer = [told, line, spoken_of]
    timer = watching(shared, "Ship")

    def offered(target: str) -> Any:
        known = kinds_of(target)
        return gr.Dropdown(choices=list(known), value=DEFAULTS.get(target, known[0]))

    to.change(offered, inputs=[to], outputs=[quant], **QUIET)

    def doing(arguments: Any) -> Any:
        def on(workspace: Workspace, run: str | None, *given: Any) -> list[Any]:
            def act() -> list[Any]:
                path = run_path(workspace, run)
                job = queued(workspace, path, arguments(workspace, path, *given))
                return [box(f"{job.title}: queued", kind="good"), job.command, job.id]

            return list(guarded(act, lambda said: [said, gr.skip(), None]))

        return on

    def on_merge(run: str | None, dtype: str, request: gr.Request) -> list[Any]:
        return list(doing(merge_arguments)(workspace_of(request), run, dtype))

    def on_export(run: str | None, to: str, quant: str, request: gr.Request) -> list[Any]:
        return list(doing(export_arguments)(workspace_of(request), run, to, quant))

    def on_bundle(run: str | None, request: gr.Request) -> list[Any]:
        return list(doing(bundle_arguments)(workspace_of(request), run))

    merge.click(on_merge, inputs=[chosen, dtype], outputs=answer, **PRIVATE)
    export.click(on_export, inputs=[chosen, to, quant], outputs=answer, **PRIVATE)
    bundle.click(on_bundle, inputs=[chosen], outputs=answer, **PRIVATE)

    def on_dry(run: str | None, name: str, is_public: bool, request: gr.Request) -> list[Any]:
        def act() -> list[Any]:
            path = require_finished(run_path(workspace_of(request), run))
            shell = command(["tunesmith", *push_arguments(path, name, public=is_public, dry_run=True)])
            plan = api.push_plan(path, repository=name.strip(), private=not is_public)
            files = [[file, size(number)] for file, number in plan.files]
            lines = [
                f"{len(plan.files)} files, {size(plan.size)}, to {plan.repository}, "
                f"{'private' if plan.private else 'public'} where it is made.",
                *(f"FOUND {finding}" for finding in plan.findings),
                *(f"Not sent: {left}" for left in plan.left),
                *plan.notes,
            ]
            if plan.findings:
                title, kind, ready = "This should not be sent.", "problem", None
            else:
                title, kind, ready = (
                    "No secret and no trained row in what would be sent.",
                    "good",
                    (run, name, is_public),
                )
            sure = gr.Button(interactive=ready is not None)
            listed = gr.Dataframe(value=files, visible=True)
            return [box(title, lines, kind=kind), shell, None, listed, ready, sure]

        off = gr.Button(interactive=False)
        return list(guarded(act, lambda said: [said, gr.skip(), None, gr.skip(), None, off]))

    dry.click(
        on_dry,
        inputs=[chosen, repository, public],
        outputs=[*answer, sent, looked_through, push],
        **PRIVATE,
    )
    gr.on(
        [chosen.change, repository.change, public.change],
        lambda: [None, gr.Button(interactive=False), gr.Dataframe(visible=False)],
        outputs=[looked_through, push, sent],
        **QUIET,
    )

    def on_push(run: str | None, name: str, is_public: bool, known: Any, request: gr.Request) -> list[Any]:
        def arguments(workspace: Workspace, path: Path) -> list[str]:
            if known is None or tuple(known) != (run, name, is_public):
                raise InputError("What would be sent was not looked at.", fix="Do the dry run first.")
            return push_arguments(path, name, public=is_public)

        return list(doing(arguments)(workspace_of(request), run))

    push.click(on_push, inputs=[chosen, repository, public, looked_through], outputs=answer, **PRIVATE)

    def look(run: str | None, mark: str, spoken: str | None, request: gr.Request) -> list[Any]:
        workspace = workspace_of(request)
        queue = queue_of(workspace)
        job = last_job(workspace, run, KINDS) if run else None
        path = guarded(lambda: run_path(workspace, run), lambda _: None) if run else None
        # A run that is being trained becomes so while it is looked at.
        is_whole = path is not None and Run(path).is_whole
        is_over = is_told(next((j for j in queue.jobs() if j.id == spoken), None))
        now = f"{run}{is_whole}{job}{queue.said(job, lines=1) if job and job.is_open else ''}{is_over}"
        if now == mark:
            return [gr.skip()] * 8
        queue.wake()
        said = box("This run has no adapter: its model is whole already.", kind="note") if is_whole else ""
        return [
            now,
            job_box(queue, job),
            made(workspace, path),
            said,
            gr.Dropdown(visible=not is_whole),
            gr.Button(visible=not is_whole),
            *(["", None] if is_over else [gr.skip(), gr.skip()]),
        ]

    gr.on(
        [timer.tick, chosen.change],
        look,
        inputs=[chosen, before, spoken_of],
        outputs=[before, state, proofs, whole, dtype, merge, told, spoken_of],
        trigger_mode="always_last",
        **QUIET,
    )
