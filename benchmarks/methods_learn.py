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
from pathlib import Path
from typing import Any

from tunesmith import api
from tunesmith.compose import compose, overlaid

TONE = {
    "data": {"dataset": "example:tone", "max_length": 96, "held_out": 0.2},
    "training": {"max_steps": 20, "per_device_train_batch_size": 16, "learning_rate": 2e-4},
    "evaluation": {"metrics": ["preference_accuracy"]},
}
"""Pairs of right answers, one of them courteous; the base prefers neither."""

LEARN: dict[str, dict[str, Any]] = {
    "dpo": TONE,
    "dpo, lora": overlaid(TONE, {"adapter": {"kind": "lora"}, "training": {"learning_rate": 1e-3}}),
    "ipo": overlaid(TONE, {"method": {"loss": "ipo"}}),
    "kto": TONE,
    "orpo": overlaid(TONE, {"training": {"learning_rate": 1e-3}}),
    "cpo": TONE,
    "simpo": TONE,
}
"""By name: the recipe that proves it, over COMMON; the method is the name's first word unless the recipe says."""

KINDS = {"ipo": "dpo"}
"""The method behind a name that is none."""

COMMON = {
    "model": {"base": "tiny"},
    "training": {"warmup_steps": 5, "eval_steps": 1000, "save_steps": 1000, "logging_steps": 5},
}


def learned(name: str, *, seed: int = 42, output_dir: str | Path | None = None) -> dict[str, Any]:
    """What one method came to: its primary metric before and after, the last KL, and the seconds of the run."""
    first = name.split(",")[0]
    layer = overlaid(
        COMMON,
        {"method": {"kind": KINDS.get(first, first)}, "training": {"seed": seed}},
        LEARN[name],
        {"output_dir": str(output_dir or tempfile.mkdtemp(prefix="methods-learn-")), "name": first},
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
