"""The page on flows: its code runs as it stands, its tables name what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

from question_files import flow, questions, save_t5, write

from tunesmith.flows import question_answer as qa

PAGE = (Path(__file__).resolve().parents[2] / "docs/flows.md").read_text(encoding="utf-8")


def table(title: str) -> set[str]:
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([a-z_0-9]+)`", cell)}


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_t5(tmp_path / "google/flan-t5-small")
    write(tmp_path / "example-support-dataset.json", questions(41))
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/flows.md", "exec"), names)
    assert names["measured"]["hold_out_set_metrics"].keys() == set(qa.ROUGE)
    printed = capsys.readouterr().out
    assert "hamilton-flan-t5-small-peft\n" in printed
    assert "1 held-out row can prove little" in printed
    settings = json.loads((tmp_path / "hamilton-flan-t5-small-peft/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"].endswith("google/flan-t5-small")


def test_the_tables_name_every_node_and_input():
    both = {
        start: {v.name for v in flow(start).list_available_variables() if not v.is_external_input}
        for start in ("base", "presaved")
    }
    assert table("Nodes") == both["base"] | both["presaved"]
    assert f"{len(both['base'])} with" in PAGE
    assert f"{len(both['presaved'])} with" in PAGE
    assert table("Inputs") == qa._inputs().keys()


def test_the_commands_of_the_page_are_parsed(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(qa, "_run", lambda given, inputs: ran.append((given, inputs)) or {})
    for line in re.findall(r"^python -m tunesmith\.flows\.question_answer (.*)$", PAGE, re.MULTILINE):
        assert qa._main(line.split()) == 0
    assert [given["start"] for given, _ in ran] == ["base", "presaved"]
    assert ran[0][1] == {"data_path": "example:support", "model_id": "google/flan-t5-small"}
