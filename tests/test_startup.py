"""What a command loads before it says what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "trl", "peft", "datasets", "scipy", "gradio", "pandas")


def loaded_after(code: str) -> dict:
    told = f"import json, sys\nprint(json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{told}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *said, loaded = done.stdout.strip().splitlines()
    return {"said": "\n".join(said), "loaded": json.loads(loaded)}


def test_the_dataflow_alone_loads_nothing_heavy():
    assert loaded_after("import tunesmith.dataflow, tunesmith.estimate, tunesmith.devices")["loaded"] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "--dataset", "missing.jsonl"], "missing.jsonl"),
        (["plan", "--set", "training.learning_rat=1"], "learning_rate"),
        (["plan", "--device", "h1000"], "h100-80gb"),
        (["show", "presetz"], "presets"),
        (["validate", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_a_bad_command_is_answered_without_torch(arguments, said):
    code = f"from tunesmith.cli import app\ntry:\n    app({arguments!r})\nexcept SystemExit:\n    pass\n"
    found = loaded_after("import sys; sys.stderr = sys.stdout\n" + code)
    assert said in found["said"]
    assert found["loaded"] == []
