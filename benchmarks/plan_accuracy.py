"""How far plans are from the truth: methods x adapters x lengths, each trained in a process of its own.

The model is a Llama of random weights (512 wide, 8 layers, or as `--hidden` and `--layers` say; 32,768 words), rows
are the same random words in another order, of one length. A line per recipe: planned and held memory, planned and taken
seconds. The last line is one JSON object with the largest errors. Memory may be read on a busy machine, seconds only on
a quiet one.

    python benchmarks/plan_accuracy.py
    python benchmarks/plan_accuracy.py --only sft,dpo --adapters lora --lengths 256
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

METHODS = ("sft", "dpo", "kto", "orpo", "reward")
ADAPTERS = ("full", "freeze", "lora")
LENGTHS = (256, 1024)
WORDS = (
    "red",
    "blue",
    "green",
    "one",
    "two",
    "three",
    "count",
    "rows",
    "question",
    "answer",
    "yes",
    "no",
    "paris",
)


def model_in(folder: Path, hidden: int, layers: int) -> str:
    """A folder with a model of random weights and the shipped tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tunesmith.assets import TINY_MODEL

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_768, hidden_size=hidden, intermediate_size=hidden * 8 // 3 // 16 * 16, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=4096,
        tie_word_embeddings=True,
    )  # fmt: skip
    place = folder / f"model-{hidden}-{layers}"
    LlamaForCausalLM(config).save_pretrained(place)
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(place)
    return str(place)


def rows_in(folder: Path, method: str, length: int, tokenizer: Any, count: int = 48) -> str:
    """A file of rows of about so many tokens each: half of them the question's."""
    draw = random.Random(length)
    per_word = len(tokenizer(" ".join([*WORDS] * 5))["input_ids"]) / (5 * len(WORDS))
    half = int((length / 2 - 12) / per_word)

    words = draw.choices(WORDS, k=half)

    def text() -> str:
        draw.shuffle(words)  # the same words, hence the same number of tokens
        return " ".join(words)

    file = folder / f"{'pairs' if method != 'sft' else 'rows'}-{length}.jsonl"
    lines = []
    for number in range(count):
        row = {"prompt": f"{100 + number} {text()}"}
        row |= {"chosen": text(), "rejected": text()} if method != "sft" else {"response": text()}
        lines.append(json.dumps(row))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def one(settings: dict[str, Any]) -> dict[str, Any]:
    """Train a recipe and give what its run says of its plan."""
    from tunesmith import api
    from tunesmith.compose import compose

    run = api.train(compose(settings).recipe).run
    planned = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    found = planned["estimate"]
    if "truth" not in planned:
        sys.exit("; ".join(found["notes"]))
    return {
        "planned": found["peak"], "planned_seconds": found["seconds"], "stage": found["stage"],
        "stages": found["stages"], "blocks": found["blocks"], "notes": found["notes"], **planned["truth"],
    }  # fmt: skip


def main() -> None:
    """Run the recipes one after the other and print the errors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(METHODS), help="methods")
    parser.add_argument("--adapters", default=",".join(ADAPTERS))
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument(
        "--measure", action="store_true", help="also compare base and tuned model in each run"
    )
    parser.add_argument("--keep", help="file for all figures, a JSON line per recipe")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(json.loads(args.one))))
        return
    from transformers import AutoTokenizer

    work = Path(tempfile.mkdtemp(prefix="plan-accuracy-"))
    base = model_in(work, args.hidden, args.layers)
    tokenizer = AutoTokenizer.from_pretrained(base)
    results = []
    for method in args.only.split(","):
        for length in map(int, args.lengths.split(",")):
            file = rows_in(work, method, length, tokenizer)
            for adapter in args.adapters.split(","):
                name = f"{method} {adapter} {length}"
                settings = {
                    "name": name.replace(" ", "-"), "output_dir": str(work / "runs"), "model": {"base": base},
                    "data": {"dataset": file, "max_length": 2 * length, "near_duplicates": "ignore"},
                    "method": {"kind": method},
                    "adapter": {"kind": adapter, **({"ratio": 0.5} if adapter == "freeze" else {})},
                    "training": {"max_steps": args.steps, "per_device_train_batch_size": 4},
                    "evaluation": {"skip": not args.measure, "max_new_tokens": 16},
                }  # fmt: skip
                done = subprocess.run(
                    [sys.executable, __file__, "--one", json.dumps(settings)],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    print(f"{name}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                    continue
                found = json.loads(done.stdout.strip().splitlines()[-1])
                results.append({"recipe": name, **found})
                if args.keep:
                    with Path(args.keep).open("a", encoding="utf-8") as file_of_all:
                        file_of_all.write(json.dumps(results[-1]) + "\n")
                print(
                    f"{name}: {found['planned'] / 1e6:,.0f} MB planned while {found['stage']}, "
                    f"{found['peak_memory'] / 1e6:,.0f} held, {found['memory_error']:+.1%}; "
                    f"{found['planned_seconds']:.1f} s planned, {found['seconds']:.1f} taken, "
                    f"{found['time_error']:+.1%}",
                    flush=True,
                )
    if not results:
        sys.exit("no recipe was trained")
    memory = [r["memory_error"] for r in results]
    seconds = [r["time_error"] for r in results]
    print(
        json.dumps(
            {
                "benchmark": "plan_accuracy", "recipes": len(results),
                "memory_error": {"lowest": min(memory), "highest": max(memory)},
                "memory_within_8_percent": sum(abs(error) <= 0.08 for error in memory),
                "memory_under_by_more_than_3_percent": sum(error < -0.03 for error in memory),
                "time_error": {"lowest": min(seconds), "highest": max(seconds)},
                "time_within_15_percent": sum(abs(error) <= 0.15 for error in seconds),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
