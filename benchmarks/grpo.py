"""GRPO's steps: where their time goes, and against TRL's GRPOTrainer used directly.

    python benchmarks/grpo.py 12 3

Both train the shipped model on the prompts of `example:preferences` with one verifiable reward, the same settings and
the same seed, one after the other in one process, in turns. Printed for each: tokens per second (prompts and answers),
and the shares of time in generation, in forward passes (policy and reference) and in the backward pass. The last line
is one JSON object: tokens per second of ours and of the peer, and their ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from tunesmith import dataflow, models
from tunesmith.compose import compose
from tunesmith.methods import METHODS
from tunesmith.training.fit import arguments, quiet_libraries
from tunesmith.training.run import Run

ANSWERS, GROUP, NEW_TOKENS = 32, 8, 24


def recipe(steps: int) -> Any:
    """What both do."""
    return compose(
        {
            "data": {"dataset": "example:preferences", "max_length": 256, "validation": 0.0, "held_out": 0.0},
            "method": {
                "kind": "grpo", "rewards": "length_match", "num_generations": GROUP,
                "max_new_tokens": NEW_TOKENS,
            },
            "training": {
                "max_steps": steps, "per_device_train_batch_size": ANSWERS, "gradient_accumulation_steps": 1,
                "warmup_steps": 0, "learning_rate": 1e-5, "logging_steps": 10,
            },
        }
    ).recipe  # fmt: skip


def ours(steps: int, folder: Path) -> Any:
    """Our trainer."""
    asked = recipe(steps)
    encodings = dataflow.encodings(asked, dataflow.splits(asked))
    plan = dataflow.plan(asked, encodings, None, dataflow.asked(asked, encodings))
    tokenizer, _ = dataflow._tokenizer(asked)
    model = models.load_model("tiny")
    models.set_stop_tokens(model, tokenizer)
    training, _, _ = METHODS["grpo"].settled(asked.method, asked.training, len(encodings.train))
    return METHODS["grpo"].build(
        asked.method,
        model=model,
        tokenizer=tokenizer,
        train=encodings.train,
        validation=encodings.validation,
        arguments=arguments(plan, training, asked.tracking, name="ours", staging=folder / "staging")
        | {"save_strategy": "no"},
        run=Run(folder),
        keep=1,
    )


def peer(steps: int, folder: Path) -> Any:
    """TRL's own, from messages and a reward function."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from tunesmith.evaluation.metrics import METRICS

    asked = recipe(steps)
    encodings = dataflow.encodings(asked, dataflow.splits(asked))
    prompts = list(encodings.train.examples)
    tokenizer, _ = dataflow._tokenizer(asked)
    rows = [
        {"prompt": [{"role": t.role, "content": t.content} for t in p.messages], "number": n}
        for n, p in enumerate(prompts)
    ]

    def reward(completions: Any, number: Any, **rest: Any) -> list[float]:
        score = METRICS["length_match"].score
        assert score
        return [
            score(prompts[n], c[0]["content"], prompts[n].reference)
            for n, c in zip(number, completions, strict=True)
        ]

    return GRPOTrainer(
        model=models.load_model("tiny"),
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(folder / "peer"), max_steps=steps, per_device_train_batch_size=ANSWERS,
            gradient_accumulation_steps=1, num_generations=GROUP, max_completion_length=NEW_TOKENS, top_k=0,
            beta=0.04, learning_rate=1e-5, lr_scheduler_type="cosine", weight_decay=0.01, logging_steps=10,
            save_strategy="no", report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
            disable_tqdm=True, seed=42, disable_dropout=True, dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip


def timed(trainer: Any, spent: dict[str, float]) -> None:
    """Let a trainer's parts add up their seconds."""

    def wrapped(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return work(*given, **named)
            finally:
                spent[name] += time.perf_counter() - started

        return run

    trainer._generate_single_turn = wrapped("generation", trainer._generate_single_turn)
    trainer._get_per_token_logps_and_entropies = wrapped(
        "forward", trainer._get_per_token_logps_and_entropies
    )
    trainer._calculate_rewards = wrapped("rewards", trainer._calculate_rewards)
    trainer.accelerator.backward = wrapped("backward", trainer.accelerator.backward)


def measured(make: Callable[[int, Path], Any], steps: int) -> dict[str, float]:
    """One training: tokens per second, and the share of time of each part."""
    with tempfile.TemporaryDirectory() as place:
        trainer = make(steps, Path(place))
        spent: dict[str, float] = defaultdict(float)
        timed(trainer, spent)
        started = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
        seconds = time.perf_counter() - started
        tokens = int(trainer.state.num_input_tokens_seen)
    parts = {name: spent[name] / seconds for name in ("generation", "forward", "backward", "rewards")}
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        **parts,
        "other": 1 - sum(parts.values()),
    }


def main() -> None:
    """Both, in turns; a first round warms up and does not count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", type=int, nargs="?", default=12, help="of each training")
    parser.add_argument("rounds", type=int, nargs="?", default=3)
    args = parser.parse_args()
    steps, rounds = args.steps, args.rounds
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    quiet_libraries()
    found: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    for number in range(rounds + 1):
        for name, make in (("ours", ours), ("peer", peer)):
            one = measured(make, steps if number else 2)
            if number:
                found[name].append(one)
                print(name, {key: round(value, 3) for key, value in one.items()}, flush=True)
    speed = {name: median(one["tokens_per_second"] for one in all_of) for name, all_of in found.items()}
    shares = {
        part: round(median(one[part] for one in found["ours"]), 3)
        for part in ("generation", "forward", "backward", "rewards", "other")
    }
    print(f"shares of time: {shares}", file=sys.stderr)
    print(
        json.dumps(
            {
                "name": "grpo",
                "ours": round(speed["ours"], 1),
                "peer": round(speed["peer"], 1),
                "ratio": round(speed["ours"] / speed["peer"], 3),
                "unit": "tokens/s",
                "n": rounds,
            }
        )
    )


if __name__ == "__main__":
    main()
