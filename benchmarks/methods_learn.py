"""Whether every method learns: on the shipped model and data, before and after training, on held-out examples.

    python benchmarks/methods_learn.py dpo kto

Prints a line per method, with the metric before and after and the number of examples it rests on, and last one JSON
object: how many learned. Preference methods start from the shipped base. `grpo`, `rloo` and `ppo` start
from a model that was fine-tuned first, on answers of which a third is courteous; their reward is whether an answer
begins courteously. `stages` is the whole way: fine-tuning, a reward model from pairs, PPO on that model's scores. It is
measured by the same constraint, which none of its stages is told.

The KL is measured afterwards and in the same way for all: answers to held-out prompts are drawn from the tuned model;
it is their mean log-probability under that model less that under the start. Seconds are those of the whole run,
evaluation included.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from tunesmith import api, dataflow, models
from tunesmith.assets import TINY_MODEL
from tunesmith.compose import compose, overlaid
from tunesmith.data.templates import end_of_turn_ids
from tunesmith.generation import for_inference, generate

COURTEOUS = (
    "Certainly", "Gladly", "Good question", "Happy to help", "Let me help you", "My pleasure", "Sure", "With pleasure",
)  # fmt: skip
"""How the better answers of `example:tone` begin."""

COMMON = {
    "model": {"base": "tiny"},
    "training": {"warmup_steps": 5, "eval_steps": 1000, "save_steps": 1000, "logging_steps": 5},
}

PAIRS = {
    "data": {"dataset": "example:tone", "max_length": 96, "held_out": 0.2},
    "training": {"max_steps": 20, "per_device_train_batch_size": 16, "learning_rate": 2e-4},
    "evaluation": {"metrics": ["preference_accuracy"]},
}
"""Right answers, one of each pair courteous; the base prefers neither."""

RANKS = {
    "data": {"dataset": "example:preferences", "max_length": 128, "held_out": 0.2},
    "training": {"num_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3},
}
"""Pairs of a polite, right and short answer and one that is not; a new head finds both of any pair equally good."""

ANSWERED = {
    "data": {"max_length": 128, "held_out": 0.2},
    "method": {"max_new_tokens": 32},
    "adapter": {"kind": "lora", "rank": 16, "targets": "all-linear"},
    "training": {
        "max_steps": 12, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3, "scheduler": "constant", "warmup_steps": 0, "logging_steps": 1,
    },
    "evaluation": {"metrics": ["constraints"], "max_new_tokens": 32, "max_items": 100},
}  # fmt: skip
"""The model's own answers are scored while it learns, 32 a step."""

PPO = {"method": {"ppo_epochs": 2, "num_minibatches": 4, "value_learning_rate": 1e-2}}

LEARN: dict[str, dict[str, Any]] = {
    "dpo": PAIRS,
    "dpo, lora": overlaid(PAIRS, {"adapter": {"kind": "lora"}, "training": {"learning_rate": 1e-3}}),
    "ipo": overlaid(PAIRS, {"method": {"kind": "dpo", "loss": "ipo"}}),
    "kto": PAIRS,
    "orpo": overlaid(PAIRS, {"training": {"learning_rate": 1e-3}}),
    "cpo": PAIRS,
    "simpo": PAIRS,
    "reward": RANKS,
    "reward, lora": overlaid(
        RANKS, {"adapter": {"kind": "lora", "targets": "all-linear"}, "training": {"learning_rate": 3e-3}}
    ),
    "grpo": overlaid(ANSWERED, {"method": {"rewards": "constraints"}}),
    "rloo": overlaid(ANSWERED, {"method": {"rewards": "constraints"}}),
    "ppo": overlaid(ANSWERED, PPO, {"method": {"rewards": "constraints"}}),
    "stages": overlaid(ANSWERED, PPO, {"method": {"kind": "ppo"}}),
}
"""By name the recipe that proves it, over COMMON; its method is the name's first word unless it says another."""


def questions(folder: Path) -> Path:
    """A file of the questions of `example:tone`, each with one of its answers, every third one courteous,
    and with the constraint that is measured."""
    file = folder / "questions.jsonl"
    pairs = (TINY_MODEL.parent / "examples" / "tone.jsonl").read_text(encoding="utf-8").splitlines()
    rows = []
    for number, pair in enumerate(map(json.loads, pairs)):
        answer = pair["rejected" if number % 3 else "chosen"]
        rows.append({"prompt": pair["prompt"], "response": answer, "starts_with": list(COURTEOUS)})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@cache
def start(folder: Path) -> Path:
    """The run of supervised fine-tuning that reinforcement learning starts from."""
    layer = {
        "name": "start", "output_dir": str(folder), "method": {"kind": "sft"},
        "data": {"dataset": str(questions(folder)), "max_length": 128, "held_out": 0.2},
        "training": {"max_steps": 40, "per_device_train_batch_size": 16, "learning_rate": 1e-3},
        "evaluation": {"metrics": ["constraints"], "max_new_tokens": 32, "max_items": 100},
    }  # fmt: skip
    return Path(api.train(compose(overlaid(COMMON, layer)).recipe).run)


@cache
def judge(folder: Path) -> Path:
    """The run of a reward model, trained on the pairs, that PPO's answers are scored by."""
    layer = overlaid(
        RANKS,
        {"name": "judge", "output_dir": str(folder), "method": {"kind": "reward"}, "data": PAIRS["data"]},
    )
    return Path(api.train(compose(overlaid(COMMON, layer)).recipe).run)


def learned(name: str, *, seed: int = 42, folder: Path, with_kl: bool = True) -> dict[str, Any]:
    """What one method came to: its primary metric before and after, the KL, and the seconds of the run."""
    layer = overlaid(COMMON, {"method": {"kind": name.split(",")[0]}}, LEARN[name])
    started = time.perf_counter()
    if name == "stages":
        layer["method"]["rewards"] = [{"kind": "model", "model": str(judge(folder))}]
    if "rewards" in layer["method"]:
        layer = overlaid(
            layer, {"model": {"base": str(start(folder))}, "data": {"dataset": str(questions(folder))}}
        )
        started = started if name == "stages" else time.perf_counter()
    own = f"{name.replace(', ', '-')}-{seed}"
    recipe = compose(
        overlaid(layer, {"output_dir": str(folder), "name": own, "training": {"seed": seed}})
    ).recipe
    result = api.train(recipe)
    seconds = time.perf_counter() - started
    assert result.primary
    has_kl = with_kl and recipe.method.kind != "reward"
    return {
        "metric": result.primary.metric,
        "before": round(result.primary.base, 4),
        "after": round(result.primary.tuned, 4),
        "interval": [
            None if end is None else round(end, 4) for end in (result.primary.low, result.primary.high)
        ],
        "n": result.primary.n,
        "kl": round(divergence(recipe, result.run), 4) if has_kl else None,
        "seconds": round(seconds, 1),
    }


def divergence(recipe: Any, run: Path, *, prompts: int = 64) -> float:
    """KL of the tuned model from the one it started from, in nats per answer: the mean log-ratio of drawn answers."""
    encodings = dataflow.encodings(recipe, dataflow.splits(recipe))
    items = dataflow.items(recipe, dataflow.asked(recipe, encodings))
    asked = [list(item.prompt_ids) for item in items[:prompts]]
    tokenizer = models.load_tokenizer(str(run / "final_model"))
    stop_ids = end_of_turn_ids(tokenizer)
    tuned, base = (models.load_model(place) for place in (str(run / "final_model"), recipe.model.base))
    drawn = generate(tuned, tokenizer, asked, max_new_tokens=32, stop_ids=stop_ids, temperature=1.0)
    ratios = []
    for ids, answer in zip(asked, drawn, strict=True):
        said = [*answer.ids, *([] if answer.stop_id is None else [answer.stop_id])]
        if said:
            ratios.append(logprob(tuned, ids, said) - logprob(base, ids, said))
    return fmean(ratios)


def logprob(model: Any, prompt: list[int], answer: list[int]) -> float:
    """The log-probability of an answer, all its tokens together, in nats."""
    import torch

    with for_inference(model):
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        found = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
    return float(found.sum())


def proven(name: str, found: Mapping[str, Any]) -> bool:
    """Whether a method did what is claimed of it: 85 % of preferences, 90 % of rankings, 30 points of a reward."""
    if name.startswith("reward"):
        return bool(found["after"] >= 0.9)
    if found["metric"] == "preference_accuracy":
        return bool(found["before"] <= 0.6 and found["after"] >= 0.85)
    return bool(found["after"] - found["before"] >= 0.3 and (found["kl"] is None or found["kl"] < 8))


def main() -> int:
    """Train and print, one method at a time; 1 where one did not learn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(LEARN)}; all without one")
    names = parser.parse_args().names
    if unknown := [name for name in names if name not in LEARN]:
        parser.error(f"{', '.join(unknown)}: there are {', '.join(LEARN)}")
    found: dict[str, Mapping[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="methods-learn-") as place:
        for name in names or list(LEARN):
            found[name] = learned(name, folder=Path(place))
            print(f"{name:12} {found[name]}", flush=True)
    learning = sum(proven(name, one) for name, one in found.items())
    result = {
        "name": "methods_learn", "ours": learning, "peer": None, "ratio": None, "unit": "methods that learn",
        "n": len(found),
    }  # fmt: skip
    print(json.dumps(result))
    return 0 if learning == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
