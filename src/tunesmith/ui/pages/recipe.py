"""The Recipe page: what is tuned, how, and with which settings, as a form, as YAML and as one command."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import LocalContext, get_blocks_context, get_render_context

from tunesmith.errors import InputError, TunesmithError
from tunesmith.recipe import Recipe, sections_of
from tunesmith.ui import drafts, form, handlers
from tunesmith.ui.choosing import shell_line, told_of, written
from tunesmith.ui.form import Control, Filled
from tunesmith.ui.shared import PRIVATE, QUIET, Shared, box, command, problem
from tunesmith.ui.workspace import Workspace, workspace_of

SECTIONS = (
    "",
    *(
        name
        for name, field in Recipe.model_fields.items()
        if sections_of(field.annotation) and name not in form.ELSEWHERE
    ),
)
"""The parts of the form, in the order of the recipe."""
TITLES = {
    "": "Run",
    "model": "Base model",
    "data": "Data",
    "method": "Method",
    "adapter": "Adapter",
    "training": "Training",
    "evaluation": "Evaluation",
    "export": "After training",
    "tracking": "Tracking",
}
OPEN = frozenset({"", "model", "method", "adapter", "training"})
"""Sections that are open at first."""

Drawn = str
"""What a section shows besides the user's own values, as text: where it changes, the section is drawn anew."""


def drawn(found: Filled, section: str, shown: Sequence[Control], version: int = 0) -> Drawn:
    """What decides how a section is drawn: its fields, what they are without the user's values, what is between them.

    What the user types into a field is not in it, so that nobody loses the place in which he writes.
    """
    fields = [c for c in shown if c.section == section]
    rows = [(c.path, c.kind, repr(form.value_at(found.base, c.path, None))) for c in fields]
    between = sorted(
        said for path, said in found.faults.items() if "effect" in said and path.startswith(section or "-")
    )
    return json.dumps([version, rows, between])


def outcome(
    layer: dict[str, Any], workspace: Workspace | None, *, expert: bool, version: int = 0
) -> tuple[Any, ...]:
    """YAML, command, the box below them, and what decides how each section is drawn."""
    found = form.filled(layer, workspace)
    own = form.settled(layer, workspace) if workspace else layer
    shown = form.visible(found, expert=expert)
    return (
        form.as_yaml(layer),
        command(form.argv(own)),
        verdict(found),
        *(drawn(found, section, shown, version) for section in SECTIONS),
    )


def faults(found: Filled) -> list[str]:
    """What is wrong with the recipe, a line each that names the field."""
    return [
        said if said.startswith(path) or not path else f"{path}: {said}"
        for path, said in found.faults.items()
    ]


def told_of_import(found: Filled, notes: Sequence[str]) -> str:
    """What became of an import: what is wrong with the recipe first, then what was left out or found."""
    if found.faults:
        return box("The recipe was imported, and does not fit yet.", [*faults(found), *notes])
    return box("The recipe was imported.", notes, kind="good")


def verdict(found: Filled) -> str:
    """Whether the recipe holds together, as HTML with everything escaped."""
    if found.faults:
        return box("The recipe does not fit yet.", faults(found))
    recipe = found.sound
    what = f"{recipe.method.kind} on {recipe.model.base}, adapter {recipe.adapter.kind}, data {recipe.data.dataset}"
    return box("The recipe fits.", [what, *found.notes], kind="good")


def changed(
    layer: dict[str, Any], control: Control, raw: Any, workspace: Workspace | None
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The layer after a control was used, label and class for its component, and what fell away."""
    try:
        new, lost = form.changed(layer, control, raw)
    except TunesmithError as error:
        said = " ".join(part for part in (error.problem, error.found and f"Found: {error.found}.") if part)
        return layer, form.labelled(control, said), []
    fault = form.filled(new, workspace).faults.get(control.path)
    return new, form.labelled(control, fault), lost


def taken(file: str) -> tuple[dict[str, Any], list[str]]:
    """The layer of a recipe file that a browser has sent. Raises TunesmithError."""
    path = Path(file)
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise InputError("A recipe is a .yaml, .yml or .json file.", found=repr(path.name)[:80])
    return form.imported(path)


def saved(layer: dict[str, Any], workspace: Workspace) -> Path:
    """Keep the layer as a file in the workspace, beside those of the same name that say something else."""
    name = layer.get("name") if isinstance(layer.get("name"), str) and layer["name"] else "recipe"
    text, number = form.as_yaml(layer), 1
    place = workspace.inside(workspace.recipes, f"{name}.yaml")
    while place.exists() and place.read_text(encoding="utf-8") != text:
        number += 1
        place = workspace.inside(workspace.recipes, f"{name}-{number}.yaml")
    place.write_text(text, encoding="utf-8")
    return place


def about(section: str, found: Filled) -> str:
    """What a section is for, in the words of the recipe, escaped."""
    if not section:
        return "Task and preset set defaults for everything below; what you set yourself stays."
    return html.escape(" ".join((type(getattr(found.sound, section)).__doc__ or "").split()))


def base_of(layer: dict[str, Any]) -> str:
    """The base model that the layer names."""
    return str(form.value_at(layer, "model.base", "tiny"))


def architecture(layer: dict[str, Any], workspace: Workspace | None) -> tuple[str, str]:
    """Seed 000's "Model Architecture" of the recipe's base model, and a box where there is none."""
    base = base_of(layer)
    if workspace and (said := form.outside({"model": {"base": base}}, workspace)):
        return "", box("This model cannot be shown.", list(said.values()))
    summary, error = handlers.handle_submit(base)
    return summary, box("There is no summary of this model.", error.splitlines()) if error else ""


def build(shared: Shared) -> None:
    """Fill the tab."""
    root = get_blocks_context().root_block  # type: ignore[union-attr]
    start = form.filled(shared.recipe.value or {})
    basic = form.visible(start, expert=False)
    with shared.apart:
        version, is_open = gr.State(0), gr.State(False)
        looks = {section: gr.State(drawn(start, section, basic)) for section in SECTIONS}
    tab = get_render_context()
    assert isinstance(tab, gr.Tab)
    # The form is drawn when somebody looks at it: until then it would hold up other pages. This goes through the
    # queue: of a state that is changed past it Gradio tells nobody.
    tab.select(lambda: True, None, is_open, show_progress="hidden", **PRIVATE)
    with gr.Row():
        with gr.Column(scale=3, min_width=340):
            view = gr.Radio(
                ["Basic", "Expert"],
                value="Basic",
                label="View",
                elem_id="recipe-view",
                info="Expert has every field that takes effect with the chosen method and adapter.",
            )
            for section in SECTIONS:
                with gr.Accordion(
                    TITLES[section], open=section in OPEN, elem_id=f"recipe-section-{section or 'run'}"
                ):
                    _section(shared, section, looks[section], view, is_open)
        with gr.Column(scale=2, min_width=340, elem_id="recipe-aside"):
            state = gr.HTML(verdict(start), elem_id="recipe-state")
            text = written(form.as_yaml(start.layer), "Recipe (YAML)", "recipe-yaml")
            line = written(command(form.argv(start.layer)), "The same in a shell", "recipe-command")
            with gr.Row():
                upload = gr.UploadButton(
                    "Import a recipe", file_types=[".yaml", ".yml", ".json"], elem_id="recipe-import"
                )
                keep = gr.Button("Keep and export", elem_id="recipe-keep")
                clear = gr.Button("Start over", elem_id="recipe-clear")
            download = gr.DownloadButton("Export", visible=False, elem_id="recipe-export")
            said = gr.HTML("", elem_id="recipe-said")
            onward = gr.Button("Plan this run", variant="primary", elem_id="recipe-plan")
            show = gr.Button("Model architecture", elem_id="recipe-architecture-show")
            missing = gr.HTML("", elem_id="recipe-architecture-problem")
            summary = gr.Textbox(
                "",
                label="Model Architecture",
                lines=4,
                max_lines=20,
                buttons=["copy"],
                interactive=False,
                placeholder="none yet",
                elem_classes="ts-late",
                elem_id="recipe-architecture",
            )
            show_line = shell_line("recipe-architecture")

    def refresh(layer: dict[str, Any], view: str, version: int, request: gr.Request) -> tuple[Any, ...]:
        return outcome(layer, workspace_of(request), expert=view == "Expert", version=version)

    gr.on(
        [root.load, shared.recipe.change, view.change, version.change],
        refresh,
        [shared.recipe, view, version],
        [text, line, state, *looks.values()],
        show_progress="hidden",
        trigger_mode="always_last",
    )

    # What the command line names goes before what was kept at an earlier start.
    since = time.time() if shared.recipe.value else 0.0

    def restore(layer: dict[str, Any], version: int, request: gr.Request) -> tuple[Any, ...]:
        try:
            found = drafts.restored(workspace_of(request), since=since)
        except Exception as error:
            gr.Warning("The recipe of your last visit could not be restored; the Recipe page says why.")
            return layer, version, told_of(error)
        if found is None:
            return gr.skip(), gr.skip(), gr.skip()
        new, notes = found
        for note in notes:
            gr.Warning(html.escape(note))
        said = box("Your recipe was restored, but for this:", notes, kind="warn") if notes else ""
        return new, version + 1, said

    # Through the queue: of a state that is changed past it Gradio tells nobody.
    root.load(
        restore, [shared.recipe, version], [shared.recipe, version, said], show_progress="hidden", **PRIVATE
    )

    def keep_draft(layer: dict[str, Any], request: gr.Request) -> None:
        drafts.keep(layer, workspace_of(request))

    shared.recipe.change(keep_draft, shared.recipe, trigger_mode="always_last", **QUIET)

    def load(file: str, version: int, layer: dict[str, Any], request: gr.Request) -> tuple[Any, ...]:
        try:
            new, notes = taken(file)
        except TunesmithError as error:
            return layer, version, problem(error)
        workspace = workspace_of(request)
        new, found = form.found_in(new, workspace)
        return new, version + 1, told_of_import(form.filled(new, workspace), [*notes, *found])

    upload.upload(load, [upload, version, shared.recipe], [shared.recipe, version, said])
    clear.click(lambda version: ({}, version + 1, ""), version, [shared.recipe, version, said])

    def save(layer: dict[str, Any], request: gr.Request) -> tuple[str, Any]:
        try:
            place = saved(layer, workspace_of(request))
        except TunesmithError as error:
            return problem(error), gr.update(visible=False)
        kept = box("The recipe is kept in your workspace.", [f"recipes/{place.name}"], kind="good")
        return kept, gr.update(value=str(place), label=f"Download {place.name}", visible=True)

    keep.click(save, shared.recipe, [said, download])

    def look(layer: dict[str, Any], request: gr.Request) -> tuple[str, str, str]:
        same = command(["tunesmith", "show", "model", base_of(layer)])
        return *architecture(layer, workspace_of(request)), same

    show.click(
        look, shared.recipe, [summary, missing, show_line], concurrency_id="models", concurrency_limit=1
    )
    onward.click(
        lambda plans: (gr.Tabs(selected="plan"), plans + 1),
        shared.plans,
        [shared.tabs, shared.plans],
        concurrency_id="recipe",  # after what was typed just before the click
        concurrency_limit=1,
    )


def _section(shared: Shared, section: str, look: gr.State, view: gr.Radio, is_open: gr.State) -> None:
    """The controls of a section, drawn anew when others take effect."""

    late = gr.State(0)

    @gr.render(  # type: ignore[untyped-decorator]
        inputs=[shared.recipe, view, look],
        triggers=[is_open.change, look.change, late.change],
        show_progress="hidden",
        concurrency_id="draw",  # Gradio draws two parts of one page at once into the same dictionary
        concurrency_limit=1,
    )
    def draw(layer: dict[str, Any], view: str, drawn_as: Drawn) -> None:
        # Gradio hands no request to what it renders.
        request = LocalContext.request.get(None)
        found = form.filled(layer, workspace_of(request) if request else None)
        gr.HTML(f"<p>{about(section, found)}</p>")
        shown = [c for c in form.visible(found, expert=view == "Expert") if c.section == section]
        if not shown:
            gr.HTML("<p>Nothing to set here in the basic view.</p>")
        for control in shown:
            _listen(shared, control, form.component(control, found), look, drawn_as, late)


def _listen(
    shared: Shared, control: Control, made: Any, look: gr.State, drawn_as: Drawn, late: gr.State
) -> None:
    """Take what is typed, also into a field that is being drawn anew: its section is drawn once more then."""
    if control.path in form.SETTLED:
        return

    def use(
        layer: dict[str, Any], raw: Any, wanted: Drawn, count: int, request: gr.Request, event: gr.EventData
    ) -> tuple[Any, Any, Any]:
        workspace = workspace_of(request)
        if form.shown(control, form.current(control, form.filled(layer, workspace))) == raw:
            return gr.skip(), gr.skip(), gr.skip()  # left as it was
        new, label, lost = changed(layer, control, raw, workspace)
        for note in lost:
            gr.Info(html.escape(note))
        is_late = wanted != drawn_as or getattr(event.target, "_id", None) != made._id
        return new, gr.update(**label), count + is_late

    gr.on(
        # Gradio's text fields tell of keys that write, not of Backspace, pasting or a phone; leaving them does.
        [made.input, made.blur] if hasattr(made, "blur") else [made.input],
        use,
        [shared.recipe, made, look, late],
        [shared.recipe, made, late],
        show_progress="hidden",
        trigger_mode="always_last",
        concurrency_id="recipe",
        concurrency_limit=1,
        # With a key of its own it outlives the drawing: without, what was just typed would meet no listener.
        key=f"recipe:{control.path}:{control.kind}",
    )
