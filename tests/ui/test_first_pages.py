"""The first pages as plain functions: uploads, mapping, findings, tokens, lengths, ledger, recipe, plan."""

from __future__ import annotations

import csv
import json
import shutil
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")

from tunesmith import api
from tunesmith.compose import compose
from tunesmith.data.examples import Row
from tunesmith.data.inspection import Inspected
from tunesmith.errors import InputError, TunesmithError
from tunesmith.ui import choosing, drafts, form, uploads
from tunesmith.ui.pages import chat, data, plan, recipe
from tunesmith.ui.workspace import SCOPE, Workspace

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>{{constructor}}${alert(3)}"
ROWS = [{"prompt": f"what is the count of {n}", "response": f"answer {n} one two"} for n in range(40)]


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path / "space")


@pytest.fixture
def model(workspace, tiny_model_folder) -> str:
    """A base model inside the workspace."""
    return str(shutil.copytree(tiny_model_folder, workspace.exports / "base"))


@pytest.fixture
def layer(workspace, model, tmp_path) -> dict:
    """A layer with forty questions, uploaded."""
    sent = tmp_path / "questions.jsonl"
    sent.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "model": {"base": model},
        "data": {"dataset": str(uploads.receive(str(sent), workspace).path), "max_length": 256},
    }


def written(kind: str, place) -> str:
    """The rows as a file of a kind that is taken."""
    file = place / f"rows{kind}"
    if kind == ".csv":
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, ["prompt", "response"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == ".json":
        file.write_text(json.dumps(ROWS))
    elif kind == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == ".parquet":
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        parquet.write_table(arrow.Table.from_pylist(ROWS), file)
    else:
        file.write_text("\n".join(row["response"] for row in ROWS))
    return str(file)


# Data


@pytest.mark.parametrize("kind", uploads.DATA)
def test_files_of_every_kind_are_kept_and_read(kind, workspace, tmp_path):
    kept = str(uploads.receive(written(kind, tmp_path), workspace).path)
    found = data.looked(data.with_data({}, data.Chosen(kept)), workspace)
    assert found.rows == 40
    assert found.formats == (("text",) if kind == ".txt" else ("prompt_response",))
    assert uploads.of_data(workspace) == [(f"rows{kind}", kept)]


def test_uploads_are_limited_and_never_overwrite(workspace, tmp_path, monkeypatch):
    sent = written(".csv", tmp_path)
    first, again = uploads.receive(sent, workspace), uploads.receive(sent, workspace)
    assert (first.path, first.is_new, again.path, again.is_new) == (again.path, True, first.path, False)
    assert again.said()[0] == "rows.csv is in your workspace already."
    content = first.path.read_bytes()
    with open(sent, "a") as file:
        file.write("one more,row\n")
    second = uploads.receive(sent, workspace)
    assert second.said()[0] == "rows.csv is in your workspace as rows-2.csv."
    assert first.path.read_bytes() == content != second.path.read_bytes()
    assert not uploads.receive(sent, workspace).is_new, "the second one is known as well"
    assert len(uploads.of_data(workspace)) == 2
    other = tmp_path / "rows.exe"
    other.write_text("x")
    with pytest.raises(InputError, match="of this kind"):
        uploads.receive(str(other), workspace)
    dashed = tmp_path / "-rows.csv"
    dashed.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="under its name") as error:
        uploads.receive(str(dashed), workspace)
    assert "Rename" in str(error.value.fix)
    monkeypatch.setattr(uploads, "LARGEST", 10)
    with pytest.raises(InputError, match="too large"):
        uploads.receive(sent, workspace)
    monkeypatch.setattr(uploads, "LARGEST", 10_000_000)
    monkeypatch.setattr(uploads, "LARGEST_TOGETHER", 100)
    with pytest.raises(InputError, match="no room"):
        uploads.receive(str(dashed.rename(tmp_path / "new.csv")), workspace)


def test_columns_that_no_format_knows_are_mapped_by_hand(workspace, tmp_path):
    file = tmp_path / "odd.jsonl"
    file.write_text("".join(json.dumps({"frage": "was?", "antwort": f"{n} das"}) + "\n" for n in range(5)))
    layer = data.with_data({}, data.Chosen(str(uploads.receive(str(file), workspace).path)))
    found = data.looked(layer, workspace)
    assert (found.formats, found.columns) == ((), ("frage", "antwort"))
    assert "fit no known format" in data.sentence(found)
    assert "--" not in data.by_control(data.sentence(found))
    layer = data.with_data(layer, data.Chosen(layer["data"]["dataset"], "auto", "frage", "antwort"))
    found = data.looked(layer, workspace)
    assert len(found.formats) == 1
    assert "the recipe names the two columns" in found.reason
    assert data.table(found) == {
        "headers": ["frage", "antwort"],
        "data": [["was?", f"{n} das"] for n in range(5)],
    }


def test_another_data_set_takes_nothing_of_the_mapping_of_the_one_before():
    layer = {"data": {"dataset": "a.csv", "input_text_key": "q", "output_text_key": "a", "max_length": 64}}
    assert data.with_data(layer, data.Chosen("example:chat")) == {
        "data": {"max_length": 64, "dataset": "example:chat"}
    }


def test_a_data_set_that_only_a_preset_names_is_read_and_is_in_the_commands(workspace):
    layer = {"preset": "demo"}
    assert json.loads(data.data_part(layer)) == {"dataset": "example:sql", "max_length": 256}
    assert data.looked(layer, workspace).formats == ("sql",)
    validate, inspect, plan = data.commands(layer, workspace).splitlines()
    assert "example:sql" in validate
    assert "--max-length 256" in inspect
    assert "--config demo" in plan
    named = data.with_data(layer, data.Chosen("example:sql", "auto", "question", "sql"))
    assert data.mapped(named) == ("question", "sql")
    assert data.data_part({"preset": "no such"}) is None


def test_a_data_set_outside_the_workspace_is_refused(workspace):
    with pytest.raises(InputError, match="outside your workspace"):
        data.looked(data.with_data({}, data.Chosen("/etc/passwd")), workspace)


def test_findings_say_where_what_and_what_to_do(layer, workspace):
    with open(layer["data"]["dataset"], "a") as file:
        file.write(json.dumps({"prompt": "empty?", "response": " "}) + "\n")
    report = data.validated(layer, workspace)
    listed = data.findings(report)
    assert report.with_errors == 1
    assert listed[0][0] == "error"
    assert listed[0][1].startswith("questions.jsonl:41")
    assert "ts-problem" in data.report_box(report)
    assert "41 rows = " in data.report_box(report)


def test_tokens_are_shown_by_role_and_escaped(layer, workspace):
    page = data.seen(layer, workspace, "1")
    assert "questions.jsonl:1" in page
    [seen] = api.inspect(form.checked(layer, workspace).recipe, rows=["1"])
    trained = "".join(text for text, role in seen.pieces if role == "trained")
    assert "answer 0 one two" in trained
    assert f'class="ts-token ts-trained" title="trained">{trained.split("<")[0]}' in page
    for role in data.ROLES:
        assert f"ts-{role}" in page


def test_nothing_of_the_data_is_html(workspace):
    row = Inspected(Row(HOSTILE, 1), "train", 3, 1, 0, reason=HOSTILE, part=HOSTILE, why=HOSTILE,
                    pieces=((HOSTILE, "trained"), ('" onclick="x', "context"), ("</div>", "special")))  # fmt: skip
    page = data.tokens([row]).replace(data.STYLE, "")
    for bad in ("<img", "<script", "<style", 'onclick="x'):
        assert bad not in page
    assert page.count("</div>") == 2
    looked = api.Looked(1, (HOSTILE,), ({HOSTILE: HOSTILE},), (HOSTILE,), HOSTILE, (HOSTILE,))
    assert "<img" not in data.sentence(looked)
    found = form.filled({"task": HOSTILE, "name": HOSTILE, "training": {"seed": HOSTILE}}, workspace)
    assert "<img" not in recipe.verdict(found)


def test_lengths_and_ledger_account_for_every_row(layer, workspace):
    layer["data"]["max_length"] = 30
    found = data.rows_of(layer, workspace)
    counts = found.counts
    assert counts["rows_in"] == 40 == sum(counts[n] for n in ("train", "validation", "held_out", "dropped"))
    figure = data.histogram(found)
    assert sum(figure.data[0].y) == len(found.lengths)
    assert figure.layout.shapes[0].x0 == 30  # where rows are cut
    assert "40 rows = " in data.ledger_box(found)
    assert len(data.entries(found)) == 40


def test_one_row_is_a_histogram_too():
    figure = data.histogram(data.Rows({}, {}, (7,), (), 100))
    assert sum(figure.data[0].y) == 1
    assert data.histogram(data.Rows({}, {}, (), (), 100)).data[0].y == (0,)


def test_the_commands_are_those_of_the_command_line(layer, workspace, monkeypatch):
    """Each of them reads the same data with the same base."""
    import shlex

    import typer
    from click.testing import CliRunner

    from tunesmith.cli import app

    caught = {}

    def catch(name):
        def verb(*given, **named):
            caught[name] = (given, named)
            raise TunesmithError("caught")

        return verb

    for name in ("validate", "inspect", "plan"):
        monkeypatch.setattr(api, name, catch(name))
    layer = {**layer, "task": "chat", "data": {**layer["data"], "max_length": 77}}
    command = typer.main.get_command(app)
    for line in data.commands(layer, workspace).splitlines():
        CliRunner().invoke(command, shlex.split(line)[1:])
    dataset, base = layer["data"]["dataset"], layer["model"]["base"]
    (given, named) = caught["validate"]
    assert (given, named["task"], named["model"]) == ((dataset,), "chat", base)
    assert named["settings"] == {"data": {"max_length": 77}}
    assert caught["inspect"][0][0].data.max_length == 77
    assert caught["plan"][0][0] == form.checked(layer, workspace).recipe


# Recipe


def test_yaml_command_and_state_follow_the_layer(workspace):
    text, line, state, *looks = recipe.outcome({"method": {"kind": "dpo"}}, workspace, expert=False)
    assert text == "method:\n  kind: dpo\n"
    assert line == f"tunesmith train --method dpo --output-dir {workspace.runs}"
    assert "The recipe fits." in state
    assert len(looks) == len(recipe.SECTIONS)
    _, _, state, *_ = recipe.outcome({"training": {"seed": -1}}, workspace, expert=False)
    assert "training.seed has to be greater than or equal to 0" in state


def test_a_section_is_drawn_anew_only_where_others_take_effect(workspace):
    def looks(layer):
        found = form.filled(layer, workspace)
        shown = form.visible(found, expert=True)
        return {section: recipe.drawn(found, section, shown) for section in recipe.SECTIONS}

    before = looks({})
    assert looks({"training": {"learning_rate": 1e-3}}) == before  # the place in which somebody types stays
    assert looks({"training": {"learning_rate": -1}}) == before
    changed = looks({"method": {"kind": "dpo"}})
    assert {name for name in before if before[name] != changed[name]} >= {"method", "data"}
    assert changed["evaluation"] == before["evaluation"]
    robust = looks({"method": {"kind": "dpo", "loss": "robust"}})
    assert {name for name in changed if changed[name] != robust[name]} == {"method"}


def test_a_control_that_is_used_changes_the_layer_and_its_own_label(workspace):
    control = next(c for c in form.controls() if c.path == "training.seed")
    layer, label, _ = recipe.changed({}, control, -1, workspace)
    assert layer == {"training": {"seed": -1}}
    assert "greater than or equal to 0" in label["label"]
    layer, label, _ = recipe.changed(layer, control, 3, workspace)
    assert (layer, label["label"]) == ({"training": {"seed": 3}}, "Seed")
    rate = next(c for c in form.controls() if c.path == "training.learning_rate")
    assert recipe.changed({}, rate, "2e-5", workspace)[0] == {"training": {"learning_rate": 2e-5}}
    assert "takes a number; found 'fast'" in recipe.changed({}, rate, "fast", workspace)[1]["label"]
    rows = next(c for c in form.controls() if c.path == "data.columns")
    same, label, _ = recipe.changed(layer, rows, "{a: [", workspace)
    assert same == layer
    assert "is not YAML" in label["label"]
    name = next(c for c in form.controls() if c.path == "name")
    assert "name of a file" in recipe.changed({}, name, "../x", workspace)[1]["label"]


def test_recipes_come_in_and_go_out_as_files(workspace, tmp_path):
    layer = {"name": "mine", "method": {"kind": "kto"}, "adapter": {"kind": "lora", "rank": 4}}
    file = recipe.saved(layer, workspace)
    assert file.parent == workspace.recipes
    assert recipe.saved(layer, workspace) == file
    assert recipe.saved({"name": "mine"}, workspace).name == "mine-2.yaml"
    assert compose(file=file).recipe == compose(layer).recipe
    assert recipe.taken(str(file)) == (layer, [])
    other = tmp_path / "recipe.txt"
    other.write_text("x")
    with pytest.raises(InputError):
        recipe.taken(str(other))
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(TunesmithError, match="not YAML"):
        recipe.taken(str(broken))


def test_what_a_page_was_left_with_comes_back_through_the_walls(workspace):
    assert drafts.restored(workspace) is None
    own = workspace.uploads / "rows.csv"
    own.write_text("question,answer\n1,2\n")
    layer = {
        "name": "1e-5",
        "data": {"dataset": str(own), "input_text_key": "question 😀", "output_text_key": "answer"},
        "training": {"learning_rate": 3e-5},
    }
    drafts.keep(layer, workspace)
    assert drafts.restored(workspace) == (layer, [])
    kept = workspace.root / drafts.NAME
    assert drafts.restored(workspace, since=kept.stat().st_mtime + 1) is None, (
        "the command line named another one"
    )
    drafts.keep({"data": {"dataset": "https://me:secret@example.org/x.csv"}}, workspace)
    assert "secret" not in kept.read_text()
    drafts.keep({}, workspace)
    assert drafts.restored(workspace) == ({}, [])

    kept.write_text("data: {dataset: /etc/passwd, max_length: 77}\nevaluation: {run_code: true}\n")
    found, notes = drafts.restored(workspace)
    assert found == {"data": {"max_length": 77}}
    assert [note.split()[0] for note in notes] == ["data.dataset", "evaluation.run_code"]
    kept.write_text("method: {grpo: {rewards: [{kind: python, function: 'os:system'}]}, kind: grpo}\n")
    assert "os:system" not in str(drafts.restored(workspace))
    for broken in ("a: [", "[]", "", "a: !!python/object:os.system x"):
        kept.write_text(broken)
        with pytest.raises(TunesmithError):
            drafts.restored(workspace)
    kept.unlink()
    kept.symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="outside the workspace"):
        drafts.restored(workspace)


def test_an_import_says_first_what_is_wrong_and_finds_uploads_by_their_names(workspace):
    place = workspace.uploads / "plants-2.csv"
    place.write_text("question,answer\n1,2\n")
    for name in ("plants-2.csv", "uploads/plants-2.csv", "./uploads/plants-2.csv"):
        layer = {"data": {"dataset": name, "mix": [{"dataset": name, "weight": 2}, "example:chat"]}}
        found, notes = form.found_in(layer, workspace)
        assert found["data"]["dataset"] == found["data"]["mix"][0]["dataset"] == str(place)
        assert found["data"]["mix"][1] == "example:chat"
        assert len(notes) == 2
    (workspace.uploads / "out.csv").symlink_to("/etc/passwd")
    for name in ("uploads/../plants-2.csv", "out.csv", "/etc/passwd", "no.csv", "example:chat", 5):
        layer = {"data": {"dataset": name}}
        assert form.found_in(layer, workspace) == (layer, [])

    said = recipe.told_of_import(form.filled({"training": {"epoch": 3}}, workspace), ["a note"])
    assert "does not fit" in said
    assert said.index("training.epoch") < said.index("a note")
    assert "ts-good" in recipe.told_of_import(form.filled({}, workspace), [])
    wrong = form.outside({"model": {"base": "/no/such/model"}}, workspace)["model.base"]
    assert "outside your workspace" in wrong
    assert "pload" not in wrong


def listeners_of(name: str, function: str) -> list:
    """The functions of this name that a page listens with."""
    from tunesmith.ui.app import blocks

    return [
        f.fn for f in blocks().fns.values() if f.name == function and f.fn.__module__.endswith(f".{name}")
    ]


def test_nothing_is_checked_and_no_plan_is_outdated_where_there_is_none(workspace):
    request = SimpleNamespace(request=SimpleNamespace(scope={SCOPE: workspace}))
    [check] = listeners_of("data", "inspect_all")
    said, findings, *_ = check({"training": {"seed": 3}}, "", request)
    assert "No data is chosen yet" in said
    assert findings is None
    [outdated] = listeners_of("plan", "outdated")
    assert "No plan yet" in outdated({}, plan.HERE, False, request)[0]
    assert "has changed" in outdated({}, plan.HERE, True, request)[0]


def test_the_architecture_of_the_base_or_why_there_is_none(model, workspace):
    summary, box = recipe.architecture({"model": {"base": model}}, workspace)
    assert summary.startswith("LlamaForCausalLM")
    assert box == ""
    summary, box = recipe.architecture({"model": {"base": "/etc"}}, workspace)
    assert summary == ""
    assert "outside your workspace" in box


# Plan


def test_the_plan_says_what_fits_with_reasons_before_anything_starts(layer, workspace):
    found = plan.planned(layer, workspace)
    estimate = found.plan.estimate
    assert estimate is not None
    assert "It fits: " in plan.verdict(found)
    bars = plan.memory(estimate).data
    parts = estimate.stages[estimate.stage]
    assert all(name in plan.legend(estimate) for name, held in parts.items() if held)
    stage = list(bars[0].y).index(estimate.stage)
    assert sum(bar.x[stage] for bar in bars) == pytest.approx(estimate.peak / 1e9)
    assert {bar.name for bar in bars} >= {name for name, held in parts.items() if held}
    listed = plan.lines(found)
    assert {"rows", "device", "total_steps", "peak memory", "time in all", "disk"} <= {
        row[0] for row in listed
    }
    assert plan.argv(layer, workspace)[:2] == ["tunesmith", "plan"]
    assert not list(workspace.runs.iterdir())


def test_a_run_that_does_not_fit_says_by_how_much_and_what_takes_less(layer, workspace):
    from dataclasses import replace

    from tunesmith.estimate.remedies import Remedy

    found = plan.planned(layer, workspace, "h100-80gb")
    assert "on h100-80gb" in plan.verdict(found)
    small = replace(found.plan.estimate, capacity=1000, remedies=(Remedy("use LoRA", "--lora", 900, True),))
    said = plan.verdict(replace(found, plan=replace(found.plan, estimate=small)))
    assert "It does not fit, by " in said
    assert "What takes less: use LoRA (--lora)" in said
    assert "Largest micro-batch that fits: " in plan.micro_batch(found.plan.estimate)
    assert plan.argv(layer, workspace, "h100-80gb")[-2:] == ["--device", "h100-80gb"]


def test_every_part_of_the_memory_has_a_colour():
    from tunesmith.estimate import ABOUT

    assert set(plan.COLOURS) == set(ABOUT)


def test_errors_are_boxes():
    def broken() -> list:
        raise TunesmithError(HOSTILE, found=HOSTILE, fix=HOSTILE)

    box, *others = choosing.either(broken, 3)
    assert "<img" not in box
    assert others == [None, None]

    def bug() -> list:
        raise ValueError("secret")

    box, *_ = choosing.either(bug, 1)
    assert "ValueError" in box
    assert "secret" not in box


BESIDE_API = {
    "tunesmith": {"api", "devices"},
    "tunesmith.assets": {"EXAMPLES"},
    "tunesmith.compose": {"layered", "overlaid", "preset_layer", "preset_names"},
    "tunesmith.data.examples": {"LedgerEntry"},
    "tunesmith.data.formats": {"FORMATS"},
    "tunesmith.data.inspection": {"Inspected"},
    "tunesmith.data.validation": {"Report"},
    "tunesmith.errors": {"InputError", "RecipeError", "RunError", "TunesmithError", "counted", "size"},
    "tunesmith.estimate": {"ABOUT", "Estimate"},
    "tunesmith.estimate.pace": {"duration"},
    "tunesmith.evaluation.compare": {"shown"},
    "tunesmith.evaluation.judging.asking": {"Forecast"},
    "tunesmith.evaluation.judging.settings": {"Judge", "load_judge"},
    "tunesmith.evaluation.judging.suites": {"suite_of"},
    "tunesmith.evaluation.metrics": {"METRICS"},
    "tunesmith.evaluation.report": {"Measurement", "measurement", "shipped"},
    "tunesmith.export.artefact": {"DEFAULTS", "STORED", "TARGETS", "check_target"},
    "tunesmith.export.gguf": {"quants"},
    "tunesmith.plan": {"Plan"},
    "tunesmith.recipe": {"DataSource", "Recipe", "sections_of"},
    "tunesmith.training.run": {"Run", "State", "dataset_name", "folder_name", "open_run"},
}
"""What pages import that is neither theirs nor a verb: types, tables of names, words, readers of run folders."""


def test_pages_reach_what_works_through_api_alone():
    import ast
    from pathlib import Path

    found: dict[str, set[str]] = {}
    for page in Path(data.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(page.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Import) and "tunesmith" in ast.unparse(node)), page.name
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            if module.startswith("tunesmith.") and not module.startswith("tunesmith.ui."):
                found.setdefault(module[:-1], set()).update(name.name for name in node.names)
    assert found == BESIDE_API


def test_the_pages_are_built():
    """All components with the ids and labels by which browsers and screen readers find them."""
    from tunesmith.ui.app import blocks

    made = blocks()
    ids = [b.elem_id for b in made.blocks.values() if b.elem_id]
    assert len(ids) == len(set(ids))
    assert {"data-upload", "data-hub", "recipe-view", "recipe-yaml", "plan-start", "plan-memory"} <= set(ids)
    asked = (
        "textbox",
        "dropdown",
        "number",
        "checkbox",
        "radio",
        "slider",
        "file",
        "dataframe",
        "plot",
        "code",
    )
    for block in made.blocks.values():
        if block.get_block_name() in asked and (block.elem_id or "").startswith(
            ("data-", "recipe-", "plan-")
        ):
            assert block.label, block.elem_id


def test_no_page_that_nobody_has_seen_has_a_state_whose_changes_are_listened_to():
    """Of such a one the browser tells a change with its first answer: the whole form was drawn on every load."""
    import gradio as gr

    from tunesmith.ui.app import blocks

    made = blocks()
    filled = {block._id for fn in made.fns.values() for block in fn.outputs}
    listened = {id for fn in made.fns.values() for id, event in fn.targets if event == "change"}

    def states(block) -> set[int]:
        found = {block._id} if isinstance(block, gr.State) else set()
        return found.union(*map(states, getattr(block, "children", ())))

    unseen = {
        tab.id: states(tab) for tab in made.blocks.values() if isinstance(tab, gr.Tab) and tab.id != "data"
    }
    assert not {name: told for name, found in unseen.items() if (told := found & filled & listened)}


def test_a_log_is_read_ahead_when_its_run_is_given_and_not_at_every_turn_to_a_page(workspace, monkeypatch):
    from tunesmith.ui.app import blocks

    run = workspace.runs / "mine"
    run.mkdir(parents=True)
    for name in ("recipe.yaml", "environment.json"):
        (run / name).write_text("{}")
    read: list = []
    monkeypatch.setattr(choosing.curves, "read_ahead", read.append)
    request = SimpleNamespace(request=SimpleNamespace(scope={SCOPE: workspace}))
    asking = [f for f in blocks().fns.values() if f.fn.__module__ == choosing.__name__ and len(f.outputs) > 1]
    turns = [f for f in asking if {event for _, event in f.targets} == {"select"} and f.inputs]
    assert [[part.value for part in f.fn(None, request)] for f in turns] == [["mine"] * len(turns[0].outputs)]
    assert not read
    [given] = [f for f in asking if "load" in {event for _, event in f.targets}]
    given.fn(None, request)
    assert read == [run]


@pytest.fixture
def a_thousand_pieces(monkeypatch):
    """Both models write a thousand pieces at once; gives a list that says when they are let go."""
    closed = []

    def answers(models, messages, **settings):
        try:
            for number in range(1000):
                yield f"base {number}", f"tuned {number}"
        finally:
            closed.append(True)

    monkeypatch.setattr(chat, "answers", answers)
    monkeypatch.setattr(chat, "sides", lambda workspace, run: ("base", "tuned"))
    monkeypatch.setattr(chat, "workspace_of", lambda request: None)
    return closed


def test_answers_end_with_the_piece_that_is_written_when_they_are_stopped(a_thousand_pieces, monkeypatch):
    monkeypatch.setattr(chat, "SHOWN_EVERY", 0)
    page, other = SimpleNamespace(session_hash="one"), SimpleNamespace(session_hash="other")
    [ask], [halt] = (listeners_of("chat", name) for name in ("ask", "halt_answers"))
    writing = ask("run", "how many?", [], None, None, "", 64, 0, 0, page)
    next(writing)
    next(writing)
    halt(other)  # another page's click
    assert "tuned 1" in str(next(writing)[3])
    halt(page)
    [last] = list(writing)
    turn, talk, told = last[1], last[3], last[7]
    assert not turn.is_whole
    assert (turn.base, turn.tuned) == ("base 2", "tuned 2")
    assert "aria-busy" not in talk
    assert "not whole" in told
    assert a_thousand_pieces == [True]
    assert not chat._asking


def test_a_page_is_sent_fewer_pictures_of_answers_than_there_are_pieces(a_thousand_pieces, monkeypatch):
    monkeypatch.setattr(chat, "SHOWN_EVERY", 60)
    page = SimpleNamespace(session_hash="one")
    [ask] = listeners_of("chat", "ask")
    _, first, last = ask("run", "how many?", [], None, None, "", 64, 0, 0, page)
    assert "tuned 0" in first[3]
    turn = last[1]
    assert turn.is_whole
    assert (turn.base, turn.tuned) == ("base 999", "tuned 999")


def test_nothing_is_seen_of_answers_whose_conversation_is_left(a_thousand_pieces, monkeypatch):
    """Also where the browser is told their end after it was told to empty the page."""
    monkeypatch.setattr(chat, "SHOWN_EVERY", 0)
    page = SimpleNamespace(session_hash="one")
    [ask], [ended, _] = (listeners_of("chat", name) for name in ("ask", "ended"))  # a click, another run
    writing = ask("run", "how many?", [], None, None, "", 64, 0, 0, page)
    next(writing)
    next(writing)
    leaving = threading.Thread(target=ended, args=(page,))
    leaving.start()
    assert chat._asking["one"].halted.wait(10)
    [last] = writing
    leaving.join(10)
    assert last[0] == []
    assert last[3] == chat.TRY
    assert a_thousand_pieces == [True]
