"""Whether every method learns: each trains the shipped base on shipped data, seeded, and is measured before and after.

    python benchmarks/methods_learn.py                 # all of them
    python benchmarks/methods_learn.py dpo kto         # some of them

The last line is one JSON object, {method: {"before", "after", "kl", "seconds", ...}}. `before` and `after` are the
method's primary metric on held-out examples, `kl` is what the method measured last (null where it has none).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunesmith import api
from tunesmith.assets import TINY_MODEL
from tunesmith.compose import compose, overlaid

TONE = {
    "data": {"dataset": "example:tone", "max_length": 96, "held_out": 0.2},
    "training": {"max_steps": 20, "per_device_train_batch_size": 16, "learning_rate": 2e-4},
    "evaluation": {"metrics": ["preference_accuracy"]},
}
"""Pairs of right answers, one of them courteous; the base prefers neither."""

RANKS = {
    "data": {"dataset": "example:preferences", "max_length": 128, "held_out": 0.2},
    "training": {"num_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3},
}
"""Pairs of a polite, right and short answer and one that is not; a new head finds both of any pair equally good."""


def short_answers(folder: Path) -> dict[str, Any]:
    """Questions that the base answers in a sentence, to be answered in at most four words."""
    rows = [
        json.loads(line) for line in (TINY_MODEL.parent / "examples/preferences.jsonl").open(encoding="utf-8")
    ]
    file = folder / "short.jsonl"
    file.write_text("".join(json.dumps({**row, "max_words": 4}) + "\n" for row in rows), encoding="utf-8")
    return {
        "data": {"dataset": str(file), "max_length": 256},
        "method": {
            "rewards": "constraints",
            "max_new_tokens": 24,
            "ppo_epochs": 2,
            "num_minibatches": 4,
            "value_learning_rate": 1e-2,
        },
        "adapter": {"kind": "lora", "rank": 16, "targets": "all-linear"},
        "training": {
            "max_steps": 36,
            "per_device_train_batch_size": 64,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "scheduler": "constant",
            "warmup_steps": 0,
            "eval_steps": 18,
            "logging_steps": 1,
        },
        "evaluation": {"metrics": ["constraints"], "max_new_tokens": 24},
    }


LEARN: dict[str, dict[str, Any] | Callable[[Path], dict[str, Any]]] = {
    "dpo": TONE,
    "dpo, lora": overlaid(TONE, {"adapter": {"kind": "lora"}, "training": {"learning_rate": 1e-3}}),
    "ipo": overlaid(TONE, {"method": {"loss": "ipo"}}),
    "kto": TONE,
    "orpo": overlaid(TONE, {"training": {"learning_rate": 1e-3}}),
    "cpo": TONE,
    "simpo": TONE,
    "reward": RANKS,
    "reward, lora": overlaid(
        RANKS,
        {"adapter": {"kind": "lora", "targets": "all-linear"}, "training": {"learning_rate": 3e-3}},
    ),
    "ppo": short_answers,
}
"""By name: the recipe that proves it, or what makes it in a folder, over COMMON; the method is the name's first word
unless the recipe says."""

KINDS = {"ipo": "dpo"}
"""The method behind a name that is none."""

COMMON = {
    "model": {"base": "tiny"},
    "training": {"warmup_steps": 5, "eval_steps": 1000, "save_steps": 1000, "logging_steps": 5},
}


def learned(name: str, *, seed: int = 42, output_dir: str | Path | None = None) -> dict[str, Any]:
    """What one method came to: its primary metric before and after, the last KL, and the seconds of the run."""
    first = name.split(",")[0]
    folder = Path(output_dir or tempfile.mkdtemp(prefix="methods-learn-"))
    proof = LEARN[name]
    layer = overlaid(
        COMMON,
        {"method": {"kind": KINDS.get(first, first)}, "training": {"seed": seed}},
        proof(folder) if callable(proof) else proof,
        {"output_dir": str(folder), "name": first},
    )
    started = time.perf_counter()
    result = api.train(compose(layer).recipe)
    assert result.primary
    assert result.run
    events = [json.loads(line) for line in (result.run / "events.jsonl").read_text().splitlines()]
    kl = [event["measures"]["kl"] for event in events if "kl" in (event.get("measures") or {})]
    return {
        "metric": result.primary.metric,
        "before": round(result.primary.base, 4),
        "after": round(result.primary.tuned, 4),
        "interval": [round(result.primary.low, 4), round(result.primary.high, 4)],
        "n": result.primary.n,
        "kl": round(kl[-1], 4) if kl else None,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main(names: list[str]) -> None:
    """Train and print, one method at a time."""
    found = {}
    for name in names or list(LEARN):
        found[name] = learned(name)
        print(f"{name:12} {found[name]}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
