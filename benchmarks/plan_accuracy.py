"""How far plans are from the truth: recipes of every method, several adapters and lengths, each trained in a process of
its own.

The model is a Llama of random weights (256 wide, 4 layers, 32,768 words; a T5 for seq2seq), rows are the same random
words in another order, or of log-normal lengths. A line per recipe on
stderr: planned and held memory, planned and taken seconds, the parts of
the peak. Memory planned is that of the run's own plan.json; seconds are those of `tunesmith plan`, which measures two
micro-steps, each in a process of its own. The last line is one JSON object: the share of recipes with memory
within 8 % and time within 15 % (ours), the same share of memory by the rule of thumb of `accelerate estimate-memory`,
four times the weights, beside what the process holds anyway (peer). It exits with 1 where a recipe misses the bar: 8 %
of memory, 3 % where it is too little, 15 % of time. Memory may be read on a busy machine, seconds only on a quiet one,
and where the machine's own pace changes from minute to minute by medians of several turns.

    python benchmarks/plan_accuracy.py
    python benchmarks/plan_accuracy.py --only 6,11 --rounds 5
    python benchmarks/plan_accuracy.py --only dpo,kto --memory-only
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chat_rows import WORDS

from tunesmith.__main__ import MALLOC

TOKENS_A_WORD = 1.77
"""With the shipped tokenizer, about."""
UNDER, OVER, TIME = 0.03, 0.08, 0.15
"""The bar: how much too little and too much memory, and how much time either way."""

BATCH = "per_device_train_batch_size"
RECIPES: tuple[tuple[str, str, int, int, dict[str, Any]], ...] = (
    ("sft", "full", 256, 8, {}),
    ("sft", "full", 1024, 4, {}),
    ("sft", "full", 512, 2, {"gradient_accumulation_steps": 4}),
    ("sft", "full", 512, 8, {"gradient_checkpointing": True}),
    ("sft", "full", 512, 4, {"forward": "stock"}),
    ("sft", "freeze", 1024, 4, {}),
    ("sft", "lora", 256, 8, {}),
    ("sft", "lora", 1024, 4, {}),
    ("sft", "lora", 1024, 4, {"gradient_checkpointing": True}),
    ("sft", "qlora", 512, 4, {}),
    ("seq2seq", "full", 256, 8, {}),
    ("seq2seq", "lora", 512, 4, {}),
    ("dpo", "full", 256, 4, {}),
    ("dpo", "lora", 512, 4, {}),
    ("dpo", "lora", 1024, 2, {"gradient_accumulation_steps": 2}),
    ("kto", "full", 256, 8, {}),
    ("kto", "lora", 512, 4, {}),
    ("orpo", "full", 256, 4, {}),
    ("orpo", "lora", 512, 4, {}),
    ("cpo", "full", 512, 4, {}),
    ("cpo", "lora", 256, 8, {}),
    ("simpo", "lora", 512, 4, {}),
    ("reward", "full", 256, 4, {}),
    ("reward", "lora", 512, 4, {}),
    ("grpo", "lora", 256, 8, {}),
    ("grpo", "full", 128, 8, {}),
    ("rloo", "lora", 256, 8, {}),
    ("ppo", "lora", 256, 8, {}),
    ("sft", "full", -140, 8, {}),
    ("sft", "lora", -140, 8, {}),
    ("dpo", "lora", -140, 4, {}),
    ("seq2seq", "full", -140, 8, {}),
    ("sft", "lora", -140, 8, {"compile": True}),
    ("sft", "full", -140, 8, {"evaluation": 32}),
    ("sft", "lora", 256, 4, {"evaluation": 128}),
    ("grpo", "lora", 256, 8, {"evaluation": 32}),
)
"""Method, adapter, tokens of a row, rows of a micro-batch, and what else is set in `training`; with `evaluation` base
and tuned model are measured, by answers of so many tokens. Where the tokens of a row are negative, lengths are
log-normal around so many, up to 1,024."""
MEDIANS = ("planned", "peak_memory", "memory_error", "planned_seconds", "seconds")
"""What is the median of all turns."""
DRAWING = ("grpo", "rloo", "ppo")
PAIRED = ("dpo", "kto", "orpo", "cpo", "simpo", "reward")


def models_in(folder: Path) -> None:
    """Models of random weights with the shipped tokenizer: `llama` and `t5`."""
    import torch
    from transformers import (
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    from tunesmith.assets import TINY_MODEL

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    llama = LlamaConfig(
        vocab_size=32_768, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=32_768, d_model=256, d_kv=64, d_ff=688, num_layers=4, num_decoder_layers=4, num_heads=4,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    for name, model in (("llama", LlamaForCausalLM(llama)), ("t5", T5ForConditionalGeneration(t5))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def rows_in(folder: Path, method: str, length: int, count: int = 64) -> str:
    """A file of rows of about so many tokens each, half of them the question's: all of one length, or, where it is
    negative, of lengths that are log-normal around it, as those of real files."""
    kind = "pairs" if method in PAIRED else "rows"
    file = folder / f"{kind}-{length}.jsonl"
    draw = random.Random(length)
    words: list[str] = []

    def text() -> str:
        draw.shuffle(words)  # the same words, hence the same number of tokens
        return " ".join(words)

    lines = []
    for number in range(count):
        if not words or length < 0:
            tokens = length if length > 0 else min(max(draw.lognormvariate(math.log(-length), 0.8), 24), 1000)
            words = draw.choices(WORDS, k=max(int(tokens / 2 / TOKENS_A_WORD) - 4, 1))
        row = {"prompt": f"{100 + number} {text()}"}
        row |= {"chosen": text(), "rejected": text()} if kind == "pairs" else {"response": text()}
        lines.append(json.dumps(row))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def named(recipe: tuple[str, str, int, int, dict[str, Any]]) -> str:
    """A recipe for people."""
    method, adapter, length, batch, extra = recipe
    return " ".join(
        map(
            str,
            (
                method,
                adapter,
                f"{batch} x {length if length > 0 else f'about {-length}'}",
                *(f"{k}={v}" for k, v in extra.items()),
            ),
        )
    )


def settings(
    recipe: tuple[str, str, int, int, dict[str, Any]], number: int, work: Path, steps: int, turn: int = 0
) -> dict[str, Any]:
    """A recipe as tunesmith reads it; a run of a turn is a run of its own."""
    method, adapter, length, batch, extra = recipe
    extra = dict(extra)
    answers = extra.pop("evaluation", 0)
    section: dict[str, Any] = {"kind": method}
    if method in DRAWING:
        section |= {"rewards": ["length_match"], "max_new_tokens": abs(length) // 4}
    if method in ("grpo", "rloo"):
        section["num_generations"] = 4
    return {
        "name": f"{number:02d}-{method}-{adapter}-{abs(length)}", "output_dir": str(work / f"runs-{turn}"),
        "model": {"base": str(work / ("t5" if method == "seq2seq" else "llama"))},
        "data": {
            "dataset": rows_in(work, method, length), "near_duplicates": "ignore",
            "max_length": 2 * length if length > 0 else 1024,
        },
        "method": section,
        "adapter": {"kind": adapter, **({"ratio": 0.5} if adapter == "freeze" else {})},
        "training": {"max_steps": steps, BATCH: batch, "gradient_accumulation_steps": 1, **extra},
        "evaluation": {"max_new_tokens": answers} if answers else {"skip": True},
    }  # fmt: skip


def trained(given: Mapping[str, Any]) -> dict[str, Any]:
    """Train a recipe, and what its run says of its plan."""
    from tunesmith import api
    from tunesmith.compose import compose

    run = api.train(compose(dict(given)).recipe).run
    planned = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    found = planned["estimate"]
    if "truth" not in planned:
        sys.exit("; ".join(found["notes"]))
    return {
        "planned": found["peak"], "unmeasured_seconds": found["seconds"], "stage": found["stage"],
        "stages": found["stages"], "notes": found["notes"], **planned["truth"],
    }  # fmt: skip


def planned(given: Mapping[str, Any]) -> dict[str, Any]:
    """Plan a recipe as `tunesmith plan` does."""
    from tunesmith import api
    from tunesmith.compose import compose

    found = api.plan(compose(dict(given)).recipe, measured=True)[0].estimate
    assert found is not None
    return {"planned_seconds": found.seconds, "basis": found.basis}


def results(args: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    """Each recipe with what was planned and what it came to."""
    wanted = args.only.split(",") if args.only else [recipe[0] for recipe in RECIPES]
    command = [sys.executable, __file__]
    os.environ["GLIBC_TUNABLES"] = MALLOC  # as the command starts itself
    subprocess.run([*command, "--models", str(work)], check=True, capture_output=True)
    for number, recipe in enumerate(RECIPES):
        if recipe[0] not in wanted and str(number) not in wanted:
            continue
        parts = ("--one",) if args.memory_only else ("--plan", "--one")
        turns: list[dict[str, Any]] = []
        found: dict[str, Any] = {"recipe": named(recipe)}
        for turn, part in itertools.product(range(args.rounds), parts):
            given = json.dumps(settings(recipe, number, work, args.steps, turn))
            done = subprocess.run([*command, part, given], capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{named(recipe)}: {' '.join(done.stderr.split()[-60:])}", file=sys.stderr)
                found["failed"] = True
                break
            if part == parts[0]:
                turns.append({})
            turns[-1] |= json.loads(done.stdout.strip().splitlines()[-1])
        else:
            found |= turns[-1] | {"turns": turns}
            found |= {key: statistics.median(turn[key] for turn in turns) for key in MEDIANS if key in found}
        yield found


def main() -> None:
    """Run the recipes one after the other and say how many are within the bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="methods, or numbers of recipes, joined by commas")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1, help="turns of planning and training; medians count")
    parser.add_argument("--memory-only", action="store_true", help="leave seconds out")
    parser.add_argument("--keep", help="file for all figures, a JSON line per recipe")
    for hidden in ("--one", "--plan", "--models"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for given, work in ((args.one, trained), (args.plan, planned)):
        if given:
            print(json.dumps(work(json.loads(given))))
            return
    if args.models:
        models_in(Path(args.models))
        return
    started = time.perf_counter()
    memory, seconds, thumb, failed = [], [], [], 0
    with tempfile.TemporaryDirectory(prefix="plan-accuracy-") as folder:
        for found in results(args, Path(folder)):
            if args.keep:
                with Path(args.keep).open("a", encoding="utf-8") as kept:
                    kept.write(json.dumps(found) + "\n")
            if found.get("failed"):
                failed += 1
                continue
            parts = found["stages"][found["stage"]]
            memory.append(found["memory_error"])
            by_rule = parts["process"] + 4 * found["stages"]["training"]["weights"]
            thumb.append(by_rule / found["peak_memory"] - 1)
            said = f"{found['recipe']}: {found['planned'] / 1e6:,.0f} MB planned while {found['stage']}, "
            said += f"{found['peak_memory'] / 1e6:,.0f} held, {found['memory_error']:+.1%}"
            if not args.memory_only:
                seconds.append(found["planned_seconds"] / found["seconds"] - 1)
                said += f"; {found['planned_seconds']:.1f} s planned, {found['seconds']:.1f} taken, {seconds[-1]:+.1%}"
            said += "; " + ", ".join(f"{name} {held / 1e6:,.0f}" for name, held in parts.items())
            print(said, file=sys.stderr, flush=True)
    if not memory:
        sys.exit("no recipe was trained")

    def within(errors: list[float]) -> list[bool]:
        return [-UNDER <= error <= OVER for error in errors]

    fits = within(memory)
    if seconds:
        fits = [good and abs(error) <= TIME for good, error in zip(fits, seconds, strict=True)]
    count = len(fits) + failed
    ours, peer = sum(fits) / count, sum(within(thumb)) / count
    found = {
        "name": "plan_accuracy", "ours": round(ours, 3), "peer": round(peer, 3),
        "ratio": round(ours / peer, 2) if peer else None, "unit": "share of recipes within the bar", "n": count,
        "failed": failed, "worst_under": round(min(memory), 4), "worst_over": round(max(memory), 4),
        "memory_within": sum(within(memory)),
    }  # fmt: skip
    if seconds:
        found |= {
            "time_within": sum(abs(error) <= TIME for error in seconds),
            "worst_time_under": round(min(seconds), 4), "worst_time_over": round(max(seconds), 4),
        }  # fmt: skip
    found["took_seconds"] = round(time.perf_counter() - started)
    for name, errors in (("memory", memory), ("time", seconds)):
        if errors:
            print(
                f"error of {name}, %: {100 * min(errors):.1f} to {100 * max(errors):.1f}, no bar",
                file=sys.stderr,
            )
    print(json.dumps(found))
    sys.exit(0 if all(fits) and not failed else 1)


if __name__ == "__main__":
    main()
