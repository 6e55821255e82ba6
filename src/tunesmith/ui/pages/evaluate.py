"""The Evaluate page: the verdict first, then scores with intervals, then every answer side by side."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.plot import PlotData
from gradio.context import get_render_context

from tunesmith import api
from tunesmith.errors import InputError
from tunesmith.evaluation.judging.settings import Judge, load_judge
from tunesmith.evaluation.judging.suites import suite_of
from tunesmith.evaluation.report import Measurement, measurement
from tunesmith.training.run import open_run
from tunesmith.ui import curves, uploads
from tunesmith.ui.choosing import (
    LONGEST_TEXT,
    guarded,
    is_told,
    job_box,
    last_job,
    model_named,
    queue_of,
    require_finished,
    run_choice,
    run_names,
    run_path,
    shell_line,
    watching,
)
from tunesmith.ui.jobs import Job
from tunesmith.ui.keys import refusal
from tunesmith.ui.shared import PRIVATE, QUIET, Shared, box, command, empty
from tunesmith.ui.workspace import Workspace, workspace_of

PAGE = 25
"""Answers on one page of the table."""
OWN = "its base against it"
KINDS = {"better": "good", "worse": "problem", "no evidence": "warn", "inconclusive": "warn"}
FILTERS = ("all", "differing", "better", "worse", "with notes")
SETTINGS, QUESTIONS = (".yaml", ".yml"), (".jsonl", ".json")
"""Endings of a judge's settings and of a suite's questions."""
REPLIES = ".jsonl"
"""Ending of the file in which a judge's replies are kept."""
SUITES = ("mt-bench", "alpaca", "arena")
NOTHING = empty(
    "Nothing was measured yet.", "A finished training measures itself; below you can compare any two models."
)


def places(workspace: Workspace, run: str | None) -> dict[str, Path]:
    """By name what was measured of a run, and all comparisons of the workspace."""
    found: dict[str, Path] = {}
    if run:
        path = run_path(workspace, run)
        if (path / "evaluation" / "comparison.json").is_file():
            found[OWN] = path
        for file in sorted(path.glob("evaluation/*/scores.json")):
            found[f"{run} on {file.parent.name}"] = file.parent
    for file in sorted(workspace.runs.glob("comparisons/*/comparison.json")):
        found[file.parent.name.replace("_vs_", " against ")] = file.parent
    return found


def measured(place: Path) -> Measurement:
    """What was measured in a folder, read once for each time that it was written."""
    files = (place / "evaluation", place) if (place / "evaluation").is_dir() else (place,)
    changed = tuple(
        at.stat().st_mtime_ns
        for folder in files
        for at in sorted([*folder.glob("*.json*"), *folder.glob("*/figures.json")])
    )
    return _measured(place, changed)


@functools.lru_cache(maxsize=16)
def _measured(place: Path, changed: tuple[int, ...]) -> Measurement:
    return measurement(place)


def chosen_answers(found: Measurement, search: str, kind: str) -> list[int]:
    """Which answers hold the words and are of the kind; places in `found.answers`."""
    words = search.lower().split()
    kept = []
    for place, answer in enumerate(found.answers):
        text = " ".join(
            [answer["question"], answer["reference"], *(str(m["text"] or "") for m in answer["models"])]
        ).lower()
        is_kind = {
            "differing": answer["moved"] > 0,
            "better": answer["gain"] > 0,
            "worse": answer["gain"] < 0,
            "with notes": any(m["notes"] for m in answer["models"]),
        }.get(kind, True)
        if is_kind and all(word in text for word in words):
            kept.append(place)
    return kept


def answer_line(found: Measurement, place: int) -> list[str]:
    """An answer's line in the table: number, question, reference, then each model's answer and mark."""
    answer = found.answers[place]
    cells = [str(place + 1), answer["question"], answer["reference"]]
    for model in answer["models"]:
        cells += [str(model["text"] or ""), model["mark"]]
    cells += [""] * (7 - len(cells))
    return [_short(cell) for cell in cells]


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def verdict(found: Measurement) -> str:
    """The verdict with what is to be known beside it, for `gr.HTML`."""
    lines = [*found.remarks]
    for judged in found.judged:
        lines += [f"Judged by {judged['judge']}: {line}" for line in judged["lines"]]
        lines.append(f"The judge: {judged['calibration']}")
    return box(found.verdict, [*lines, *found.problems], kind=KINDS.get(found.kind, "note"))


def judged_plots(found: Measurement) -> dict[str, PlotData]:
    """By title the plots of judges, the radar first."""
    plots = {
        f"{plot['title']} ({judged['name']})": PlotData(type="plotly", plot=curves.plotted(plot, height=420))
        for judged in found.judged
        for plot in judged["figures"]
    }
    return dict(sorted(plots.items(), key=lambda item: not item[0].startswith("Radar")))


def judge_named(workspace: Workspace, given: str | None) -> str:
    """`local:MODEL`, or an uploaded file of a judge's settings. Raises InputError for anything else."""
    if not given:
        raise InputError(
            "Who judges is missing.", fix="Choose an uploaded settings file (docs/judge.md), or local:RUN."
        )
    if given.startswith("local:"):
        return f"local:{model_named(workspace, given.removeprefix('local:'))}"
    file = uploads.named(workspace, given)
    check_judge(workspace, load_judge(file))
    return file


def check_judge(workspace: Workspace, judge: Judge) -> None:
    """Raise InputError for a judge's settings that name what is the server's and not the user's."""
    said: list[str | None] = []
    if judge.api == "local" and judge.model in run_names(workspace):
        said.append(f"model: a file knows no runs by name; choose local:{judge.model} instead of the file.")
    elif judge.api == "local":
        model_named(workspace, judge.model)
    if judge.api_key_env:
        said.append(refusal(judge.api_key_env, judge.address, workspace.keys))
    folder = workspace.uploads.resolve()
    for name, value in (("prompts", judge.prompts), ("cache", judge.cache)):
        if value and not (Path(value).is_absolute() and Path(value).resolve().parent == folder):
            said.append(f"{name}: {value[:80]} is no whole path of a file in {folder}.")
    if judge.cache and Path(judge.cache).suffix != REPLIES:  # written to, and so no settings of another judge
        said.append(f"cache: {judge.cache[:80]} does not end in {REPLIES}.")
    if found := " ".join(filter(None, said)):
        raise InputError(
            "These settings of a judge are not for the workbench.",
            found=found,
            fix="Change the file and upload it again.",
        )


def judge_arguments(workspace: Workspace, run: str | None, judge: str | None, mode: str) -> list[str]:
    """What follows `tunesmith` to have a run's answers judged."""
    path = run_path(workspace, run)
    return ["judge", f"--judge={judge_named(workspace, judge)}", f"--mode={mode}", "--", str(path)]


def forecast(workspace: Workspace, run: str | None, judge: str | None, mode: str) -> str:
    """What a judging would take, in a sentence; nobody is asked."""
    from tunesmith.evaluation.judging.asking import Forecast

    found = api.judge(
        [run_path(workspace, run)], judge=judge_named(workspace, judge), mode=mode, dry_run=True
    )
    return Forecast(**found["estimate"]).sentence()


def compare(workspace: Workspace, a: str | None, b: str | None, dataset: str | None) -> Job:
    """Queue a comparison of two models on the same questions."""
    if not a or not b:
        raise InputError("Two models are needed.", fix="Choose A and B.")
    on = [f"--dataset={uploads.named(workspace, dataset, examples=True)}"] if dataset else []
    models = [model_named(workspace, a), model_named(workspace, b)]
    return queue_of(workspace).add(["compare", *on, "--", *models], title=f"Compare {a} with {b}")


def suite_asked(
    workspace: Workspace, run: str | None, name: str, questions: str | None, judge: str | None
) -> tuple[Path, dict[str, Any]]:
    """The run that a suite's questions are put to, and with what: options of the command by name.

    A suite that compares has the run's base to compare with. Raises InputError for what is not the user's.
    """
    if name not in SUITES:
        raise InputError("There is no such suite.", found=repr(str(name)[:40]), fix=", ".join(SUITES))
    path = require_finished(run_path(workspace, run))
    options = {
        "questions": uploads.named(workspace, questions) if questions else None,
        "judge": judge_named(workspace, judge) if judge else None,
        "baseline": open_run(path).recipe().model.base if suite_of(name).needs_baseline else None,
    }
    return path, {option: value for option, value in options.items() if value}


def suite_arguments(
    workspace: Workspace, run: str | None, name: str, questions: str | None, judge: str | None
) -> list[str]:
    """What follows `tunesmith` to ask a run a suite's questions, judged where a judge is named."""
    path, options = suite_asked(workspace, run, name, questions, judge)
    given = [f"--{option}={value}" for option, value in options.items()]
    return ["evaluate", f"--suite={name}", *given, "--", str(path)]


def suite_forecast(
    workspace: Workspace, run: str | None, name: str, questions: str | None, judge: str | None
) -> str:
    """What judging a suite would take at most, in a sentence; nobody is asked."""
    from tunesmith.evaluation.judging.asking import Forecast

    path, options = suite_asked(workspace, run, name, questions, judge)
    if "judge" not in options:
        raise InputError("Without a judge a suite costs nothing.", fix="Start it, or choose a judge above.")
    found = api.evaluate_suite(path, name, dry_run=True, **options)
    return Forecast(**found["estimate"]).sentence()


def require_priced(known: Sequence[Any] | None, *now: Any) -> None:
    """Raise InputError where the cost of exactly these settings was not asked for before they are paid."""
    if known is None or tuple(known) != now:
        raise InputError(
            "What it costs was not asked for these settings.", fix="Press 'What would it cost?' first."
        )


def build(shared: Shared) -> None:
    """Fill the tab."""
    with gr.Row():
        chosen = run_choice(shared, "evaluate")
        place = gr.Dropdown(
            choices=[], value=None, label="What was measured", elem_id="evaluate-place", interactive=True
        )
    said = gr.HTML(NOTHING, elem_id="evaluate-verdict")
    table = gr.Dataframe(
        headers=["metric", "base", "tuned", "difference", "n", "verdict"], datatype="str", type="array",
        interactive=False, wrap=True, label="Scores with intervals", elem_id="evaluate-scores",
    )  # fmt: skip
    with gr.Accordion("Judged", open=True, visible=False, elem_id="evaluate-judged") as judged_part:
        which = gr.Dropdown(
            choices=[], value=None, label="Plot", elem_id="evaluate-plot-choice", interactive=True
        )
        radar = gr.Plot(label="Judged", show_label=False, elem_id="evaluate-plot")
    with gr.Column(elem_id="evaluate-every"):
        gr.Markdown("### Every answer")
        with gr.Row():
            search = gr.Textbox(
                value="",
                label="Search",
                placeholder="words in question, reference or answer",
                elem_id="evaluate-search",
            )
            kind = gr.Radio(list(FILTERS), value="all", label="Show", elem_id="evaluate-filter")
            number = gr.Number(value=1, minimum=1, precision=0, label="Page", elem_id="evaluate-page")
        count = gr.HTML("", elem_id="evaluate-count")
        answers = gr.Dataframe(
            headers=["#", "question", "reference", "A", "A's mark", "B", "B's mark"], datatype="str", type="array",
            interactive=False, wrap=True, label="Answers; choose a line to see it whole", max_height=480,
            elem_id="evaluate-answers", column_widths=["6%", "21%", "17%", "22%", "6%", "22%", "6%"],
        )  # fmt: skip
        with gr.Group(elem_id="evaluate-whole", elem_classes="ts-late"):
            question = gr.Textbox(
                label="Question",
                interactive=False,
                lines=2,
                max_lines=12,
                elem_id="evaluate-question",
                placeholder="none chosen",
            )
            reference = gr.Textbox(
                label="Reference", interactive=False, max_lines=12, elem_id="evaluate-reference"
            )
            with gr.Row():
                left = gr.Textbox(
                    label="A", interactive=False, lines=3, max_lines=20, elem_id="evaluate-left"
                )
                right = gr.Textbox(
                    label="B", interactive=False, lines=3, max_lines=20, elem_id="evaluate-right"
                )

    with gr.Accordion("Compare two models", open=False, elem_id="evaluate-compare-part"):
        with gr.Row():
            a = gr.Dropdown(choices=["tiny"], value="tiny", label="A, the base", elem_id="evaluate-a",
                            allow_custom_value=True, interactive=True)  # fmt: skip
            b = gr.Dropdown(choices=[], value=None, label="B, the challenger", elem_id="evaluate-b",
                            allow_custom_value=True, interactive=True)  # fmt: skip
            dataset = gr.Dropdown(choices=[], value=None, label="On (by default what the run held out)",
                                  elem_id="evaluate-dataset", allow_custom_value=True, interactive=True)  # fmt: skip
        compare_button = gr.Button("Compare", variant="primary", elem_id="evaluate-compare")
    with gr.Accordion("Let a judge decide", open=False, elem_id="evaluate-judge-part"):
        with gr.Row():
            judge = gr.Dropdown(choices=[], value=None, label="Judge: an uploaded settings file, or local:RUN",
                                elem_id="evaluate-judge", allow_custom_value=True, interactive=True)  # fmt: skip
            mode = gr.Radio(["pair", "single"], value="pair", label="How", elem_id="evaluate-mode")
        with gr.Row():
            cost_button = gr.Button("What would it cost?", elem_id="evaluate-cost")
            judge_button = gr.Button(
                "Start judging", variant="primary", interactive=False, elem_id="evaluate-judge-start"
            )
        send = gr.UploadButton(
            "Upload a judge's settings, or questions",
            file_types=[*SETTINGS, *QUESTIONS],
            elem_id="evaluate-upload",
            size="md",
        )
        priced, suite_priced = gr.State(None), gr.State(None)
        gr.Markdown(
            "Or a suite of questions, MT-Bench for instance. With a judge it starts once its cost was asked for."
        )
        with gr.Row():
            suite_name = gr.Dropdown(list(SUITES), value=SUITES[0], label="Suite", elem_id="evaluate-suite")
            questions = gr.Dropdown(choices=[], value=None, label="Its questions, an uploaded file",
                                    elem_id="evaluate-questions", interactive=True)  # fmt: skip
        with gr.Row():
            suite_cost_button = gr.Button("What would the suite cost?", elem_id="evaluate-suite-cost")
            suite_button = gr.Button("Run the suite", variant="primary", elem_id="evaluate-suite-start")
    line = shell_line("evaluate")
    told = gr.HTML("", elem_id="evaluate-told")
    state = gr.HTML("", elem_id="evaluate-job")
    timer = watching(shared, "Evaluate")
    before = gr.State("")
    spoken_of = gr.State(None)  # number of the job that `told` is about
    answer = [told, line, spoken_of]

    def refreshed(run: str | None, now: str | None, request: gr.Request) -> list[Any]:
        workspace = workspace_of(request)
        names = list(guarded(lambda: places(workspace, run), lambda _: {}))
        files = uploads.names(workspace)
        runs = run_names(workspace)
        return [
            gr.Dropdown(choices=names, value=now if now in names else names[0] if names else None),
            gr.Dropdown(choices=["tiny", *runs]),
            gr.Dropdown(choices=["tiny", *runs], value=run),
            gr.Dropdown(choices=files),
            gr.Dropdown(choices=[f for f in files if f.endswith(SETTINGS)]),
            gr.Dropdown(choices=[f for f in files if f.endswith(QUESTIONS)]),
        ]

    lists = [place, a, b, dataset, judge, questions]
    chosen.change(refreshed, inputs=[chosen, place], outputs=lists, **QUIET)
    tab = get_render_context()
    assert isinstance(tab, gr.Tab)
    tab.select(refreshed, inputs=[chosen, place], outputs=lists, **QUIET)

    def received(file: str, request: gr.Request) -> list[Any]:
        def act() -> list[Any]:
            workspace = workspace_of(request)
            received = uploads.receive(file, workspace, (*SETTINGS, *QUESTIONS))
            name, (title, lines) = received.path.name, received.said()
            files = uploads.names(workspace)
            offered = [
                gr.Dropdown(choices=[f for f in files if f.endswith(kind)], value=name)
                if name.endswith(kind)
                else gr.skip()
                for kind in (SETTINGS, QUESTIONS)
            ]
            return [box(title, lines, kind="good"), *offered]

        return list(guarded(act, lambda said: [said, gr.skip(), gr.skip()]))

    send.upload(received, inputs=[send], outputs=[told, judge, questions], **PRIVATE)

    def found_at(workspace: Workspace, run: str | None, name: str | None) -> Measurement | None:
        known = places(workspace, run)
        return measured(known[name]) if name in known else None

    def show(run: str | None, name: str | None, request: gr.Request) -> list[Any]:
        def act() -> list[Any]:
            found = found_at(workspace_of(request), run, name)
            if found is None:
                return [NOTHING, gr.Dataframe(value=[]), gr.Accordion(visible=False), gr.skip(), None, 1]
            header, *body = [list(cells) for cells in found.table]
            plots = judged_plots(found)
            first = next(iter(plots), None)
            return [
                verdict(found),
                gr.Dataframe(value=body, headers=header),
                gr.Accordion(visible=bool(plots)),
                gr.Dropdown(choices=list(plots), value=first),
                plots[first] if first else None,
                1,
            ]

        return list(guarded(act, lambda box: [box, *[gr.skip()] * 5]))

    def listed(
        run: str | None, name: str | None, words: str, of: str, page: float, request: gr.Request
    ) -> list[Any]:
        def act() -> list[Any]:
            found = found_at(workspace_of(request), run, name)
            if found is None:
                return [gr.Dataframe(value=[]), ""]
            kept = chosen_answers(found, words or "", of)
            pages = max(1, -(-len(kept) // PAGE))
            at = min(max(int(page or 1), 1), pages) - 1
            shown = kept[at * PAGE : (at + 1) * PAGE]
            one, other = found.names
            headers = ["#", "question", "reference", one, "mark", other or "-", "mark of B"]
            lines = [answer_line(found, n) for n in shown]
            note = f"<p>{len(kept):,} of {len(found.answers):,} answers, page {at + 1} of {pages}</p>"
            return [gr.Dataframe(value=lines, headers=headers), note]

        return list(guarded(act, lambda box: [gr.skip(), box]))

    shown_by = [chosen, place, search, kind, number]
    place.change(
        show, inputs=[chosen, place], outputs=[said, table, judged_part, which, radar, number], **QUIET
    ).then(listed, inputs=shown_by, outputs=[answers, count], **QUIET)
    gr.on(
        [search.submit, search.blur, kind.change, number.change],
        listed,
        inputs=shown_by,
        outputs=[answers, count],
        **QUIET,
    )

    def whole(run: str | None, name: str | None, request: gr.Request, event: gr.SelectData) -> list[Any]:
        def act() -> list[Any]:
            found = found_at(workspace_of(request), run, name)
            line = event.row_value or []
            if found is None or not line:
                return [gr.skip()] * 4
            answer = found.answers[int(line[0]) - 1]
            one, *others = answer["models"]
            right_text = _told(others[0]) if others else ""
            return [
                answer["question"],
                answer["reference"],
                gr.Textbox(value=_told(one), label=found.names[0]),
                gr.Textbox(value=right_text, label=found.names[1] or "-"),
            ]

        return list(guarded(act, lambda _: [gr.skip()] * 4))

    answers.select(whole, inputs=[chosen, place], outputs=[question, reference, left, right], **QUIET)

    def plotted_choice(run: str | None, name: str | None, title: str | None, request: gr.Request) -> Any:
        found = guarded(lambda: found_at(workspace_of(request), run, name), lambda _: None)
        return judged_plots(found).get(title or "") if found else None

    which.input(plotted_choice, inputs=[chosen, place, which], outputs=[radar], **QUIET)

    def queued(act: Any) -> Any:
        def on(*given: Any) -> list[Any]:
            *values, request = given

            def make() -> list[Any]:
                job = act(workspace_of(request), *values)
                return [box(f"{job.title}: queued", kind="good"), job.command, job.id]

            return list(guarded(make, lambda said: [said, gr.skip(), None]))

        return on

    def on_compare(a: str, b: str, dataset: str, request: gr.Request) -> list[Any]:
        return list(queued(compare)(a, b, dataset, request))

    compare_button.click(on_compare, inputs=[a, b, dataset], outputs=answer, **PRIVATE)

    def suite_cost(
        run: str | None, name: str, asked: str | None, by: str | None, request: gr.Request
    ) -> list[Any]:
        now = (run, name, asked, by)

        def act() -> list[Any]:
            workspace = workspace_of(request)
            said = suite_forecast(workspace, *now)
            return [
                box("Judging it would take at most", [said, "Nobody was asked yet."], kind="note"),
                command(["tunesmith", *suite_arguments(workspace, *now)]),
                None,
                now,
                gr.Button(interactive=True),
            ]

        return list(guarded(act, lambda said: [said, gr.skip(), None, None, gr.Button(interactive=not by)]))

    def on_suite(
        run: str | None, name: str, asked: str | None, by: str | None, known: Any, request: gr.Request
    ) -> list[Any]:
        def act(workspace: Workspace) -> Job:
            if by:
                require_priced(known, run, name, asked, by)
            arguments = suite_arguments(workspace, run, name, asked, by)
            return queue_of(workspace).add(arguments, title=f"{name} for {run}", run=run)

        return [*queued(act)(request), *suite_unpriced(by)]

    def suite_unpriced(by: str | None) -> list[Any]:
        return [None, gr.Button(interactive=not by)]

    suite_of_page = [chosen, suite_name, questions, judge]
    suite_cost_button.click(
        suite_cost, inputs=suite_of_page, outputs=[*answer, suite_priced, suite_button], **PRIVATE
    )
    suite_button.click(
        on_suite,
        inputs=[*suite_of_page, suite_priced],
        outputs=[*answer, suite_priced, suite_button],
        **PRIVATE,
    )
    gr.on(
        [field.change for field in (suite_name, questions, judge)],
        suite_unpriced,
        inputs=[judge],
        outputs=[suite_priced, suite_button],
        **QUIET,
    )

    def cost(run: str | None, by: str | None, how: str, request: gr.Request) -> list[Any]:
        def act() -> list[Any]:
            workspace = workspace_of(request)
            sentence = forecast(workspace, run, by, how)
            shown = command(["tunesmith", *judge_arguments(workspace, run, by, how)])
            return [
                box("It would take", [sentence, "Nobody was asked yet."], kind="note"),
                shown,
                None,
                (run, by, how),
                gr.Button(interactive=True),
            ]

        return list(guarded(act, lambda said: [said, gr.skip(), None, None, gr.Button(interactive=False)]))

    cost_button.click(cost, inputs=[chosen, judge, mode], outputs=[*answer, priced, judge_button], **PRIVATE)

    def unpriced() -> list[Any]:
        return [None, gr.Button(interactive=False)]

    gr.on([judge.change, mode.change], unpriced, outputs=[priced, judge_button], **QUIET)
    chosen.change(
        lambda by: [*unpriced(), *suite_unpriced(by)],
        inputs=[judge],
        outputs=[priced, judge_button, suite_priced, suite_button],
        **QUIET,
    )

    def on_judge(run: str | None, by: str | None, how: str, known: Any, request: gr.Request) -> list[Any]:
        def act(workspace: Workspace) -> Job:
            require_priced(known, run, by, how)
            arguments = judge_arguments(workspace, run, by, how)
            return queue_of(workspace).add(arguments, title=f"Judge {run}", run=run)

        return [*queued(act)(request), *unpriced()]

    judge_button.click(
        on_judge, inputs=[chosen, judge, mode, priced], outputs=[*answer, priced, judge_button], **PRIVATE
    )

    def look(
        run: str | None, name: str | None, mark: str, spoken: str | None, request: gr.Request
    ) -> list[Any]:
        workspace = workspace_of(request)
        queue = queue_of(workspace)
        job = last_job(workspace, None, ("compare", "evaluate", "judge"))
        known = guarded(lambda: places(workspace, run), lambda _: {})
        is_over = is_told(next((j for j in queue.jobs() if j.id == spoken), None))
        now = f"{job}{queue.said(job, lines=1) if job and job.is_open else ''}{list(known)}{is_over}"
        if now == mark:
            return [gr.skip()] * 5
        queue.wake()

        value = name if name in known else next(iter(known), None)
        over = ["", None] if is_over else [gr.skip(), gr.skip()]
        return [now, job_box(queue, job), gr.Dropdown(choices=list(known), value=value), *over]

    timer.tick(
        look,
        inputs=[chosen, place, before, spoken_of],
        outputs=[before, state, place, told, spoken_of],
        **QUIET,
    )


def _told(model: Mapping[str, Any]) -> str:
    notes = [str(model["mark"]), *map(str, model["notes"])]
    below = ", ".join(note for note in notes if note)
    return f"{model['text'] or ''}" + (f"\n\n({below})" if below else "")
