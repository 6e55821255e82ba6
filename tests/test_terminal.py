"""What strangers write moves no cursor, sets no title and hides nothing on the terminal of whoever looks at it."""

from __future__ import annotations

import io
import json

import pytest
import typer
from rich.console import Console as Plain
from rich.table import Table
from typer.testing import CliRunner

from tunesmith.cli import app
from tunesmith.errors import OutOfMemory, RecipeError
from tunesmith.terminal import Console, inert, json_line

HOSTILE = "a\x1b[2J\x1b]0;owned\x07\x9b2K\u202eb"


def written(console_class, *printed) -> str:
    console = console_class(file=io.StringIO(), force_terminal=True, width=100, color_system="standard")
    for one in printed:
        console.print(one, highlight=False)
    return console.file.getvalue()


def test_commands_in_text_are_shown_and_our_own_styles_stay():
    table = Table("what")
    table.add_row(HOSTILE)
    said = written(Console, HOSTILE, table, "[red]ours[/]")
    assert "\x1b[31mours" in said
    for command in ("\x1b[2J", "\x1b]0", "\x9b", "\u202e"):
        assert command not in said
        assert command in written(Plain, HOSTILE), "the control"
    assert said.count("\u241b[2J") == 2
    assert inert("one\ttwo\nthree é 漢 \U0001f600") == "one\ttwo\nthree é 漢 \U0001f600"


def test_a_progress_bar_keeps_its_cursor():
    from rich.progress import Progress

    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    with Progress(console=console) as progress:
        progress.add_task(HOSTILE, total=2)
    assert "\x1b[?25l" in console.file.getvalue()
    assert "\x1b[2J" not in console.file.getvalue()


@pytest.mark.parametrize("verb", ["validate", "inspect"])
def test_no_verb_lets_data_command_the_terminal(tmp_path, verb):
    rows = [{"prompt": f"what {n} {HOSTILE}", "response": f"it {n}", f"x{HOSTILE}": "y"} for n in range(4)]
    path = tmp_path / f"rows{HOSTILE}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    done = CliRunner().invoke(app, [verb, str(path)])
    assert done.exit_code == 0, done.output
    assert "\u241b" in done.output
    for command in ("\x1b", "\x9b", "\x07", "\u202e"):
        assert command not in done.output
    refused = CliRunner().invoke(app, [verb, str(tmp_path / f"{HOSTILE}.nothing")])
    assert refused.exit_code
    assert "\x1b" not in refused.output


class Screen(io.StringIO):
    """What a verb believes to be a terminal."""

    def isatty(self):
        return True


def test_json_on_a_terminal_is_ascii_and_elsewhere_is_text(monkeypatch):
    named = {HOSTILE + "é\x7f": 1}
    for stream, is_ascii in ((Screen(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stdout", stream)
        line = json_line(named)
        assert json.loads(line) == named
        assert (line.isascii() and line.isprintable()) == is_ascii


def test_memory_that_runs_out_in_any_command_is_no_bug(capsys):
    from tunesmith import cli

    def short(*, quiet: bool = False):
        raise MemoryError

    with pytest.raises(typer.Exit) as error:
        cli.verb(short)(as_json=False)
    said = capsys.readouterr().err
    assert error.value.exit_code == OutOfMemory.exit_code
    assert said.startswith("The memory is not enough.\n  do:    Close other programs")
    assert "Traceback" not in said


def test_no_traceback_no_flow_and_no_notebook_lets_data_command_the_terminal(monkeypatch, capsys, tmp_path):
    from tunesmith import cli
    from tunesmith.finetuner import LLMFineTuner
    from tunesmith.flows import question_answer

    def broken(*, quiet: bool = False):
        raise RuntimeError(HOSTILE)

    with pytest.raises(typer.Exit):
        cli.verb(broken)(as_json=False)
    monkeypatch.setattr(question_answer, "_run", lambda *given: (_ for _ in ()).throw(RecipeError(HOSTILE)))
    assert question_answer._main(["--data-path", "x"]) == 1
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({f"x{HOSTILE}": "y"}) + "\n")
    LLMFineTuner("tiny", str(tmp_path / "out")).load_dataset_from_source(str(rows))
    said = capsys.readouterr()
    assert "Traceback" in said.err
    assert said.err.count("\u241b[2J") >= 3
    assert "\u241b[2J" in said.out
    for command in ("\x1b[2J", "\x1b]0", "\x9b", "\x07", "\u202e"):
        assert command not in said.out + said.err
