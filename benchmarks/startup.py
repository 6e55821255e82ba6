"""Seconds from the command to the end of the first training step: ours, and a script with TRL's SFTTrainer.

Both train the shipped tiny model on the same rows, in fresh processes, in turns. Ours reads, splits, proves and plans
before it trains; the peer's script does what TRL's examples do. The last line is one JSON object with the medians.

    python benchmarks/startup.py --times 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEER = """
import sys, time
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

class First(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("first step at", time.time(), flush=True)
        control.should_training_stop = True

model, rows, folder = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
config = SFTConfig(
    output_dir=folder, max_steps=1, per_device_train_batch_size=4, bf16=False, gradient_checkpointing=False,
    use_cpu=True, report_to="none", save_strategy="no",
)
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(model), args=config, processing_class=tokenizer,
    train_dataset=load_dataset("json", data_files=rows, split="train"), callbacks=[First()],
)
trainer.train()
"""


def ours(rows: Path, work: Path, number: int) -> float:
    """Seconds to the first step of `tunesmith train`, by its run's events."""
    command = [
        sys.executable, "-m", "tunesmith", "train", "--dataset", str(rows), "--output-dir", str(work), "--name",
        f"run-{number}", "--max-steps", "1", "--per-device-train-batch-size", "4", "--set", "evaluation.skip=true",
        "--set", "training.logging_steps=1", "--set", "data.cache=false",
    ]  # fmt: skip
    started = time.time()
    subprocess.run(command, check=True, capture_output=True)
    events = (work / f"run-{number}" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return next(e["time"] for e in map(json.loads, events) if e["kind"] == "step") - started


def peer(script: Path, model: str, rows: Path, work: Path, number: int) -> float:
    """The same of the peer's script, by what it prints."""
    command = [sys.executable, str(script), model, str(rows), str(work / f"peer-{number}")]
    started = time.time()
    cache = {**os.environ, "HF_DATASETS_CACHE": str(work / f"cache-{number}")}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=cache)
    line = next(line for line in done.stdout.splitlines() if line.startswith("first step at"))
    return float(line.rpartition(" ")[2]) - started


def main() -> None:
    """Start both in turns and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1000)
    args = parser.parse_args()
    from tunesmith.assets import TINY_MODEL

    work = Path(tempfile.mkdtemp(prefix="startup-"))
    rows, script = work / "rows.jsonl", work / "peer.py"
    turns = (
        [
            {"role": "user", "content": f"What is {n} and {n}?"},
            {"role": "assistant", "content": f"It is {2 * n}."},
        ]
        for n in range(args.rows)
    )
    rows.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns), encoding="utf-8")
    script.write_text(PEER, encoding="utf-8")
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    for number in range(args.times):
        seconds["ours"].append(ours(rows, work, number))
        seconds["trl"].append(peer(script, str(TINY_MODEL), rows, work, number))
        print({name: round(values[-1], 2) for name, values in seconds.items()}, flush=True)
    medians = {name: round(statistics.median(values), 2) for name, values in seconds.items()}
    ratio = round(medians["trl"] / medians["ours"], 2)
    print(json.dumps({"benchmark": "startup", "rows": args.rows, "seconds": medians, "ratio": ratio}))


if __name__ == "__main__":
    main()
