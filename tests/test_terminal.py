"""What strangers write moves no cursor, sets no title and hides nothing on the terminal of whoever looks at it."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console as Plain
from rich.table import Table
from typer.testing import CliRunner

from tunesmith.cli import app
from tunesmith.terminal import Console, inert

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
