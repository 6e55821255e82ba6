"""The Data page: where the examples come from, how they are read, what is wrong with them, what the model sees."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.context import get_blocks_context

from tunesmith import api
from tunesmith.compose import layered, overlaid, preset_layer, preset_names
from tunesmith.data.examples import LedgerEntry
from tunesmith.errors import RecipeError, TunesmithError, counted
from tunesmith.recipe import DataSource, Recipe
from tunesmith.ui import form, theme, uploads
from tunesmith.ui.choosing import either, written
from tunesmith.ui.form import UNSET
from tunesmith.ui.shared import QUIET, Shared, box, command, empty, problem
from tunesmith.ui.workspace import Workspace, workspace_of

if TYPE_CHECKING:
    from tunesmith.data.inspection import Inspected
    from tunesmith.data.validation import Report

SHOWN_ROWS, SHOWN_FINDINGS, SHOWN_ENTRIES = 5, 200, 500
LONGEST_CELL, ONE_CELL = 400, 160
"""Characters of a cell that are sent, and that are shown before a click on it."""
LONGEST_ROW = 4000
"""Tokens of a row that are shown."""
BINS = 40

NOTHING = empty(
    "No data is chosen yet.",
    "Upload a file, name a Hub data set, or take an example. "
    f"Until then a run takes {Recipe.model_fields['data'].get_default(call_default_factory=True).dataset}.",
)

CONTROLS = {
    "with --input-text-key and --output-text-key": "in the two lists of columns",
    "--input-text-key and --output-text-key": "The two columns",
    "--format": "“Read rows as”",
}
"""What the command line's options are called here."""
NOT_CHECKED = empty("Not checked yet.", "Choose data, then check it.")
NOT_SHOWN = empty("No rows are shown yet.", "Show tokens, or name rows.")

ROLES = {
    "trained": "the model learns to write it",
    "context": "it is read, and not learned",
    "special": "a token of the chat template",
    "cut": "cut off, nobody sees it",
}
"""What becomes of a token, for people."""


@dataclass(frozen=True)
class Chosen:
    """A data set and how it is read, as the page's controls have it."""

    dataset: str
    format: str = "auto"
    question: str | None = None
    answer: str | None = None


def data_of(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is said of the data: by the layer, and below it by its preset and its task."""
    with suppress(RecipeError):  # of a task or preset that is not there; the Recipe page says so
        layer = layered(layer)[0]
    data = layer.get("data")
    return data if isinstance(data, Mapping) else {}


def with_data(layer: Mapping[str, Any], chosen: Chosen) -> dict[str, Any]:
    """The layer with a data set and how it is read; what was said of another set's columns is left out."""
    kept = dict(layer)
    if data_of(layer).get("dataset") != chosen.dataset:
        data = layer.get("data")
        for name in data if isinstance(data, Mapping) else ():
            if name in DataSource.model_fields:
                kept = form.without(kept, f"data.{name}")
    for path, value in (
        ("data.dataset", chosen.dataset),
        ("data.format", chosen.format if chosen.format != "auto" else UNSET),
        ("data.input_text_key", chosen.question or UNSET),
        ("data.output_text_key", chosen.answer or UNSET),
    ):
        kept = form.put(kept, path, value)
    return kept


def looked(layer: Mapping[str, Any], workspace: Workspace) -> api.Looked:
    """Columns, first rows and format of the layer's data set. Raises TunesmithError."""
    return api.look(form.checked(layer, workspace).recipe.data, count=SHOWN_ROWS)


def table(found: api.Looked) -> dict[str, Any]:
    """The first rows for `gr.Dataframe`, which shows text as text."""
    return {
        "headers": list(found.columns),
        "data": [[cell(row.get(name)) for name in found.columns] for row in found.first],
    }


def cell(value: Any) -> str:
    """A value of a row as one cell."""
    text = (
        value
        if isinstance(value, str)
        else ""
        if value is None
        else json.dumps(value, ensure_ascii=False, default=str)
    )
    return text if len(text) <= LONGEST_CELL else text[:LONGEST_CELL] + " ..."


def sentence(found: api.Looked, name: str = "") -> str:
    """What the rows of the data set with this name are read as, as a box."""
    head = f"{counted(found.rows, 'row')} with {counted(len(found.columns), 'column')}: {', '.join(found.columns)}"
    head = f"{name}: {head}" if name else head
    if not found.formats:
        return box("The columns fit no known format.", [head, found.reason], kind="warn")
    return box(
        f"Read as {' and '.join(found.formats)}", [head, f"Why: {found.reason}.", *found.notes], kind="good"
    )


def validated(layer: Mapping[str, Any], workspace: Workspace) -> Report:
    """What is wrong with the layer's data set for its method and its base model. Raises TunesmithError."""
    recipe = form.checked(layer, workspace).recipe
    return api.validate(
        recipe.data.dataset,
        task=layer.get("task"),
        settings=dict(layer),
        model=recipe.model.base,
        limit=SHOWN_FINDINGS,
    )


def findings(report: Report) -> list[list[str]]:
    """The findings for `gr.Dataframe`: the worst first."""
    order = {"error": 0, "warning": 1}
    found = sorted(report.findings, key=lambda f: order.get(f.severity, 2))
    return [[f.severity, f.place, cell(f.message), f.fix] for f in found[:SHOWN_FINDINGS]]


def report_box(report: Report) -> str:
    """The report in a few lines."""
    by = report.severities
    lines = [
        f"{counted(report.rows, 'row')} = {report.ok:,} fine + {report.with_warnings:,} with warnings + "
        f"{report.with_errors:,} with errors"
    ]
    if report.lengths:
        named = report.lengths
        lines.append(
            f"Length in {named['unit']}: median {named['median']:,}, 95 % up to {named['p95']:,}, "
            f"longest {named['longest']:,}; {named['above_max_length']:,} above {named['max_length']:,}"
        )
    lines += report.notes
    kind = "problem" if by["error"] else "warn" if by["warning"] else "good"
    title = ", ".join(counted(by[severity], severity) for severity in ("error", "warning", "note"))
    return box(title, lines, kind=kind)


def seen(layer: Mapping[str, Any], workspace: Workspace, rows: str = "") -> str:
    """What the model sees of the named rows, else of the longest and the like, as HTML with every text escaped."""
    named = [part.strip() for part in rows.split(",") if part.strip()]
    return tokens(api.inspect(form.checked(layer, workspace).recipe, rows=named, count=2))


def tokens(found: Sequence[Inspected]) -> str:
    """Rows with their tokens coloured by what becomes of them; every text escaped, every role in words as well."""
    legend = "".join(
        f'<li><span class="ts-token ts-{role}">{role}</span> {html.escape(said)}</li>'
        for role, said in ROLES.items()
    )
    parts = [f'<ul class="ts-legend">{legend}</ul>']
    for row in found:
        head = " ".join(
            filter(None, [str(row.row), row.part and f"({row.part})", row.why and f"- {row.why}"])
        )
        facts = f"{row.fate}, {row.tokens:,} tokens, {row.trained:,} trained ({row.trained_share:.0%}), {row.cut:,} cut"
        parts.append(f"<h4>{html.escape(head)}</h4><p>{html.escape(facts)}</p>")
        if row.reason:
            parts.append(f"<p>{html.escape(row.reason)}</p>")
        spans = "".join(
            f'<span class="ts-token ts-{role}" title="{role}">{html.escape(text)}</span>'
            for text, role in _joined(row.pieces)
        )
        more = (
            f"<p>... and {len(row.pieces) - LONGEST_ROW:,} more tokens</p>"
            if len(row.pieces) > LONGEST_ROW
            else ""
        )
        parts.append(f'<div class="ts-tokens" dir="auto">{spans}</div>{more}')
    return STYLE + f'<div class="ts-seen">{"".join(parts)}</div>'


STYLE = """<style>
.ts-tokens { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; line-height: 1.7; }
.ts-token { border-radius: 3px; box-decoration-break: clone; }
.ts-trained { background: #c9ecd3; color: #0b3d1c !important; border-bottom: 2px solid #1d7a3c; }
.ts-special { background: #e6dcf7; color: #3b1d6e !important; border-bottom: 2px dotted #6b3fb5; }
.ts-cut { background: #fbe3e3; color: #9a1c1c !important; text-decoration: line-through; }
.dark .ts-trained { background: #16402a; color: #d3f3dd !important; border-color: #4fae73; }
.dark .ts-special { background: #33264f; color: #e3d8f8 !important; border-color: #a888d6; }
.dark .ts-cut { background: #4a1f1f; color: #f7cccc !important; }
.ts-legend { display: flex; flex-wrap: wrap; gap: 0.3rem 1.2rem; list-style: none !important; padding: 0; }
.ts-legend li { list-style: none !important; margin: 0; }
.ts-seen h4 { margin: 0.9rem 0 0.1rem; font-weight: 600; }
</style>"""
"""Colours, each with a line or a stroke beside it. Gradio gives text in a page's HTML its own colour otherwise."""


def _joined(pieces: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Neighbours of one role as one stretch: a long row would else be thousands of elements."""
    made: list[tuple[str, str]] = []
    for text, role in islice(pieces, LONGEST_ROW):
        if made and made[-1][1] == role and role != "special":
            made[-1] = (made[-1][0] + text, role)
        else:
            made.append((text, role))
    return made


@dataclass(frozen=True)
class Rows:
    """What becomes of every row, and how long each is."""

    counts: Mapping[str, int]
    reasons: Mapping[str, int]
    lengths: tuple[int, ...]
    entries: tuple[LedgerEntry, ...]
    max_length: int


def rows_of(layer: Mapping[str, Any], workspace: Workspace) -> Rows:
    """The ledger of the layer's recipe, whole in numbers, its first entries row by row. Raises TunesmithError."""
    recipe = form.checked(layer, workspace).recipe
    ledger = api.ledger(recipe)
    lengths: list[int] = []
    first: list[LedgerEntry] = []
    for entry in ledger.entries:
        if entry.tokens is not None:
            lengths.append(entry.tokens)
        if len(first) < SHOWN_ENTRIES:
            first.append(entry)
    return Rows(ledger.counts(), ledger.reasons(), tuple(lengths), tuple(first), recipe.data.max_length)


def histogram(found: Rows) -> Any:
    """Lengths in tokens, with the limit above which rows are cut, as a Plotly figure."""
    import plotly.graph_objects as go

    longest = max(found.lengths, default=1)
    width = max(-(-longest // BINS), 1)
    counts = Counter((length - 1) // width for length in found.lengths)
    bins = range(max(counts, default=0) + 1)
    figure = go.Figure(
        go.Bar(
            x=[(n + 0.5) * width for n in bins],
            y=[counts[n] for n in bins],
            width=width * 0.95,
            hovertext=[
                f"{n * width + 1} to {(n + 1) * width} tokens: {counted(counts[n], 'row')}" for n in bins
            ],
            hoverinfo="text",
            marker_color=theme.SERIES[0],
        )
    )
    figure.update_layout(
        **theme.plain_layout(300),
        title=theme.plot_title("Length of the rows in tokens"),
        xaxis_title="tokens",
        yaxis_title="rows",
        bargap=0,
        showlegend=False,
    )
    if longest > found.max_length / 4:
        figure.add_vline(
            x=found.max_length,
            line_dash="dash",
            line_color=theme.SERIES[1],
            annotation_text=f"max_length {found.max_length:,}",
        )
    return figure


def ledger_box(found: Rows) -> str:
    """Every row accounted for: rows in = train + validation + held out + dropped."""
    counts = dict(found.counts)
    rows_in, truncated = counts.pop("rows_in", 0), counts.pop("truncated", 0)
    sums = " + ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in counts.items())
    lines = [f"{counted(rows_in, 'row')} = {sums}"]
    lines += [f"{truncated:,} are cut to {found.max_length:,} tokens"] if truncated else []
    lines += [f"Dropped {number:,}: {reason}" for reason, number in found.reasons.items()]
    return box("The ledger", lines, kind="warn" if found.reasons else "good")


def entries(found: Rows) -> list[list[Any]]:
    """The ledger's first rows for `gr.Dataframe`."""
    return [[str(e.row), e.fate, e.tokens, e.tokens_cut, e.reason or ""] for e in found.entries]


def commands(layer: Mapping[str, Any], workspace: Workspace) -> str:
    """What does the same on the command line, one verb a line."""
    preset = layer.get("preset")
    below = preset_layer(preset) if preset in preset_names() else {}  # these verbs take no preset
    own = overlaid(dict(below), dict(layer))
    own = {name: part for name, part in own.items() if name in ("task", "method", "data", "model")}
    base = str(form.value_at(own, "model.base", "tiny"))
    own = form.without(own, "model.base")
    dataset = str(form.value_at(own, "data.dataset", "example:sql"))
    bare = form.without(own, "data.dataset")
    given = form.argv(bare, "validate")[2:]
    return "\n".join(
        [
            command(["tunesmith", "validate", dataset, "--model", base, *given]),
            command(["tunesmith", "inspect", dataset, "--model", base, *given]),
            command(form.argv(form.settled(layer, workspace), "plan")),
        ]
    )


def mapped(layer: Mapping[str, Any]) -> tuple[str, str]:
    """The columns of question and answer that the recipe names; empty where it names none."""
    named = [data_of(layer).get(key) or "" for key in ("input_text_key", "output_text_key")]
    return str(named[0]), str(named[1])


def offered_columns(columns: Sequence[str]) -> list[tuple[str, str]]:
    """What a list of columns offers."""
    return [("(by the format)", ""), *((name, name) for name in columns)]


def by_control(said: str) -> str:
    """A box with the controls of this page in place of the command line's options."""
    for option, control in CONTROLS.items():
        said = said.replace(option, control)
    return said


def title(layer: Mapping[str, Any]) -> str:
    """The chosen data set by the last part of its path, or as it is named; empty where none is chosen."""
    name = str(data_of(layer).get("dataset") or "")
    return Path(name).name if Path(name).is_absolute() else name


def data_part(layer: Mapping[str, Any]) -> str | None:
    """What is said of the data as text: what a new look depends on."""
    return json.dumps(data, sort_keys=True, default=str) if (data := data_of(layer)) else None


def build(shared: Shared) -> None:
    """Fill the tab."""
    root = get_blocks_context().root_block  # type: ignore[union-attr]
    from tunesmith.assets import EXAMPLES
    from tunesmith.data.formats import FORMATS

    examples = [(f"{e.name}: {e.about}", f"example:{e.name}") for e in EXAMPLES.values()]
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            upload = gr.File(
                label=f"CSV, JSON, JSONL, Parquet, TXT; {uploads.LARGEST // 2**20} MiB at most",
                file_types=list(uploads.DATA),
                elem_id="data-upload",
                height=170,
            )
            files = gr.Dropdown([], label="Files in your workspace", elem_id="data-files", value=None)
            hub = gr.Textbox(
                label="Hub data set or name of the catalogue",
                placeholder="owner/name",
                elem_id="data-hub",
                info="Enter loads it.",
            )
            shipped = gr.Dropdown(examples, label="Examples that ship", elem_id="data-example", value=None)
        with gr.Column(scale=2, min_width=340):
            told = gr.HTML("", elem_id="data-told")
            state = gr.HTML(
                NOTHING,
                elem_id="data-state",
            )
            with gr.Row():
                kind = gr.Dropdown(
                    [("auto: by the columns", "auto"), *((name, name) for name in FORMATS)],
                    value="auto",
                    label="Read rows as",
                    elem_id="data-format",
                )
                question = gr.Dropdown(
                    offered_columns(()),
                    value="",
                    label="Column of the question",
                    elem_id="data-question",
                    allow_custom_value=True,
                )
                answer = gr.Dropdown(
                    offered_columns(()),
                    value="",
                    label="Column of the answer",
                    elem_id="data-answer",
                    allow_custom_value=True,
                )
            first = gr.Dataframe(
                label="First rows",
                elem_id="data-rows",
                interactive=False,
                wrap=True,
                datatype="str",
                type="array",
                max_chars=ONE_CELL,
                max_height=420,
            )
    with gr.Row():
        check = gr.Button("Check the data", variant="primary", elem_id="data-check")
        onward = gr.Button("On to the recipe", elem_id="data-onward")
    with gr.Accordion("Findings", open=True, elem_id="data-findings-part"):
        found = gr.HTML(NOT_CHECKED, elem_id="data-report")
        listed = gr.Dataframe(
            headers=["severity", "where", "what", "what to do"],
            label="Findings",
            wrap=True,
            elem_id="data-findings",
            interactive=False,
            datatype="str",
            type="array",
        )
    with gr.Accordion("What the model sees", open=True, elem_id="data-seen-part"):
        with gr.Row():
            named = gr.Textbox(
                label="Rows",
                placeholder="12, 40",
                elem_id="data-seen-rows",
                scale=3,
                info="Numbers of rows; by default the longest, the most cut, the least trained.",
            )
            show = gr.Button("Show tokens", elem_id="data-seen-show", scale=1)
        view = gr.HTML(NOT_SHOWN, elem_id="data-seen")
    with gr.Accordion(
        "Lengths and ledger", open=True, elem_id="data-ledger-part", elem_classes="ts-with-table"
    ):
        plot = gr.Plot(
            label="Length of the rows in tokens", show_label=False, elem_id="data-lengths", visible=False
        )
        total = gr.HTML("", elem_id="data-ledger-box")
        ledger = gr.Dataframe(
            headers=["row", "fate", "tokens", "cut", "why"],
            label="Ledger, row by row",
            elem_id="data-ledger",
            interactive=False,
            datatype="str",
            type="array",
            show_search="filter",
        )
    line = written("", "The same in a shell", "data-command")

    def look(
        layer: dict[str, Any], question: str, answer: str, known: Any, request: gr.Request
    ) -> tuple[Any, ...]:
        """Box, rows, format and columns of the layer's data; for every change of it."""
        workspace = workspace_of(request)
        own, dataset = uploads.of_data(workspace), data_of(layer).get("dataset")
        kept = gr.update(choices=own, value=dataset if dataset in [path for _, path in own] else None)
        if "dataset" not in data_of(layer):
            if known is None:
                return kept, *[gr.skip()] * 5, "", None
            bare = [gr.update(choices=offered_columns(()), value="") for _ in range(2)]
            return kept, NOTHING, gr.update(value=None), gr.update(value="auto"), *bare, "", None
        line, named = commands(layer, workspace), mapped(layer)
        if bool(named[0]) != bool(named[1]):
            said = box(
                "One column is missing.", ["Name the question's and the answer's column."], kind="warn"
            )
            return gr.skip(), said, *[gr.skip()] * 4, line, known
        try:
            rows = looked(layer, workspace)
        except TunesmithError as error:
            return kept, by_control(problem(error)), gr.update(value=None), *[gr.skip()] * 3, line, None
        # Lists that are as they were stay untouched: somebody may be about to choose from one.
        same = known == rows.columns and named == (question, answer)
        offered = offered_columns(rows.columns)
        lists = [gr.skip() if same else gr.update(choices=offered, value=name) for name in named]
        kind = gr.update(value=data_of(layer).get("format", "auto"))
        return (
            kept,
            by_control(sentence(rows, title(layer))),
            gr.update(value=table(rows)),
            kind,
            *lists,
            line,
            rows.columns,
        )

    columns = gr.State(None)
    looks = [files, state, first, kind, question, answer, line, columns]
    said_of_data = gr.State(None)  # only a change of the data has the file read again
    shared.recipe.change(
        data_part, shared.recipe, said_of_data, show_progress="hidden", trigger_mode="always_last"
    )
    gr.on(
        [root.load, said_of_data.change],
        look,
        [shared.recipe, question, answer, columns],
        looks,
        trigger_mode="always_last",  # a recipe that is restored while the first look runs is looked at as well
        concurrency_id="models",
        concurrency_limit=1,
    )

    results = [found, listed, view, total, plot, ledger]
    # What was found in another data set, or in this one read in another way, is none of this one's.
    said_of_data.change(lambda: unchecked(NOT_CHECKED), None, results, **QUIET)

    def send(file: str | None, layer: dict[str, Any], request: gr.Request) -> tuple[Any, Any]:
        if not file:
            return gr.skip(), gr.skip()
        try:
            received = uploads.receive(file, workspace_of(request))
        except TunesmithError as error:
            return gr.skip(), problem(error)
        title, lines = received.said()
        # Of one that is new under its own name the box below says enough.
        return with_data(layer, Chosen(str(received.path))), box(title, lines, kind="note") if lines else ""

    upload.upload(send, [upload, shared.recipe], [shared.recipe, told])

    def take(name: str | None, layer: dict[str, Any]) -> tuple[Any, Any]:
        if not name or not name.strip():
            return gr.skip(), gr.skip()
        return with_data(layer, Chosen(name.strip())), ""

    files.input(take, [files, shared.recipe], [shared.recipe, told])
    shipped.input(take, [shipped, shared.recipe], [shared.recipe, told])
    hub.submit(take, [hub, shared.recipe], [shared.recipe, told])

    def map_columns(layer: dict[str, Any], kind: str, question: str, answer: str) -> Any:
        dataset = data_of(layer).get("dataset")
        return (
            gr.skip()
            if dataset is None
            else with_data(layer, Chosen(dataset, kind, question or None, answer or None))
        )

    for control in (kind, question, answer):
        control.input(
            map_columns, [shared.recipe, kind, question, answer], shared.recipe, show_progress="hidden"
        )

    def inspect_all(layer: dict[str, Any], rows: str, request: gr.Request) -> tuple[Any, ...]:
        workspace = workspace_of(request)
        if "dataset" not in data_of(layer):
            return unchecked(NOTHING)
        return (
            *either(lambda: _report(layer, workspace), 2),
            *either(lambda: [seen(layer, workspace, rows)], 1),
            *either(lambda: _ledger(layer, workspace), 3),
        )

    check.click(
        inspect_all,
        [shared.recipe, named],
        results,
        concurrency_id="models",
        concurrency_limit=1,
    )

    def show_rows(layer: dict[str, Any], rows: str, request: gr.Request) -> Any:
        if "dataset" not in data_of(layer):
            return NOTHING
        workspace = workspace_of(request)
        return either(lambda: [seen(layer, workspace, rows)], 1)[0]

    gr.on(
        [show.click, named.submit],
        show_rows,
        [shared.recipe, named],
        view,
        concurrency_id="models",
        concurrency_limit=1,
    )
    onward.click(lambda: gr.Tabs(selected="recipe"), None, shared.tabs)


def unchecked(said: str) -> tuple[Any, ...]:
    """Report, findings, tokens, ledger in sum, lengths and ledger where nothing was checked, with the report's box."""
    return said, None, NOT_SHOWN, "", gr.update(value=None, visible=False), None


def _report(layer: Mapping[str, Any], workspace: Workspace) -> list[Any]:
    report = validated(layer, workspace)
    return [report_box(report), findings(report)]


def _ledger(layer: Mapping[str, Any], workspace: Workspace) -> list[Any]:
    rows = rows_of(layer, workspace)
    return [ledger_box(rows), gr.update(value=histogram(rows), visible=True), entries(rows)]
