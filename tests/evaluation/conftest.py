"""A run folder made by hand, for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict

import pytest
import yaml
from rows_by_hand import row

from tunesmith.evaluation.compare import compare
from tunesmith.evaluation.rows import write_rows


@pytest.fixture
def run_folder(tmp_path):
    """A finished run's folder, with hostile text in its data."""
    folder = tmp_path / "custom_sql"
    draw = random.Random(0)
    sql = "SELECT name FROM singer WHERE age > "
    rows = []
    for name, share in (("base", 0.03), ("tuned", 0.85)):
        for item in range(60):
            right = float(draw.random() < share)
            reference = f"{sql}{item}"
            output = reference if right else "I do not know </script><script>alert(1)</script>"
            rows.append(
                row(
                    item, model=name, group=f"db{item % 12}", metric="sql_execution",
                    prompt_text=f"CREATE TABLE singer (name TEXT, age INTEGER);\n\nWho is over {item}? <b>",
                    reference=reference, output=output,
                    scores={"sql_execution": right, "exact_match": right, "token_accuracy": 0.3 + right / 2,
                            "perplexity": 4 - right},
                    nll=10 * math.log(9 if name == "base" else 1.6), tokens=10,
                    correct=int(3 + 5 * right),
                )
            )  # fmt: skip
    metrics = ["sql_execution", "exact_match", "token_accuracy", "perplexity"]
    compared = compare(rows[:60], rows[60:], metrics=metrics, resamples=500)
    (folder / "evaluation").mkdir(parents=True)
    write_rows(folder / "evaluation" / "rows.jsonl", rows)
    comparison = {"comparisons": [asdict(c) for c in compared]}
    (folder / "evaluation" / "comparison.json").write_text(json.dumps(comparison), encoding="utf-8")
    (folder / "evaluation" / "scores.json").write_text("{}", encoding="utf-8")
    ledger = [
        {
            "source": "data.jsonl",
            "row": n,
            "fate": fate,
            "tokens": int(draw.gauss(90, 25)),
            "tokens_cut": 0,
            "reason": why,
        }
        for n, (fate, why) in enumerate(
            [("train", None)] * 400
            + [("validation", None)] * 50
            + [("held_out", None)] * 60
            + [("dropped", "empty answer <img src=x onerror=alert(1)>")] * 3
        )
    ]
    events = [
        *(
            {
                "time": n,
                "kind": "step",
                "step": n,
                "loss": 5 * math.exp(-n / 60) + 0.3,
                "learning_rate": 1e-4 * (1 - n / 200),
            }
            for n in range(0, 200, 4)
        ),
        *(
            {"time": n, "kind": "evaluation", "step": n, "loss": 5 * math.exp(-n / 60) + 0.4}
            for n in range(20, 201, 20)
        ),
        {
            "time": 1,
            "kind": "decision",
            "step": None,
            "name": "warmup",
            "value": 10,
            "reason": "the run is short",
        },
        {
            "time": 2,
            "kind": "warning",
            "step": None,
            "message": "3 rows were dropped <script>alert(2)</script>",
        },
    ]
    for file, lines in (("ledger.jsonl", ledger), ("events.jsonl", events)):
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"task": "custom", "name": "<i>"}), encoding="utf-8")
    (folder / "environment.json").write_text('{"python": "3.11", "packages": {"torch": "2.13"}}')
    (folder / "plan.json").write_text(
        '{"decisions": [{"name": "device", "value": "cpu", "reason": "no GPU"}]}'
    )
    (folder / "status.json").write_text('{"state": "done"}')
    return folder
