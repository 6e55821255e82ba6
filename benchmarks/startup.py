"""Seconds from the command to the end of the first training step: ours, TRL's `trl sft` and LLaMA-Factory's `train`.

All train a LoRA adapter on the shipped tiny model with the same rows, each a command in a fresh process, in turns. Ours
reads, splits, proves and plans before it trains. Losses are not compared, as each command splits and masks the rows as
its users get them. A step is done when ours has written its event, or a peer its loss.
LLaMA-Factory needs an environment of its own: its Python is `--llamafactory`, or the variable LLAMAFACTORY_PYTHON. The
CPU seconds of each command's `--help` come beside. The last line is one JSON object with the medians, of the faster
peer; the exit status is 1 where ours takes more than `--bar` seconds, or longer than a peer.

    python benchmarks/startup.py --times 5
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from tunesmith.assets import TINY_MODEL

BAR = 12.0
LOSS = re.compile(r"'loss':")
TRL = (sys.executable, "-c", "from trl.cli import main; main()", "sft")


def ours(rows: Path, work: Path, name: str) -> tuple[list[str], Path]:
    """The command, and the events that it writes."""
    command = [
        sys.executable, "-m", "tunesmith", "train", "--dataset", str(rows), "--base-model", "tiny", "--lora",
        "--output-dir", str(work), "--name", name, "--max-steps", "1", "--per-device-train-batch-size", "4",
        "--set", "evaluation.skip=true", "--set", "training.logging_steps=1", "--set", "data.cache=false",
    ]  # fmt: skip
    return command, work / name / "events.jsonl"


def trl(rows: Path, work: Path, name: str) -> list[str]:
    """TRL's command, without the precision and the recomputing that cost time on a CPU."""
    return [
        *TRL, "--model_name_or_path", str(TINY_MODEL), "--dataset_name", str(rows.parent), "--use_peft",
        "--output_dir", str(work / name), "--max_steps", "1", "--per_device_train_batch_size", "4",
        "--logging_steps", "1", "--report_to", "none", "--save_strategy", "no", "--bf16", "False",
        "--gradient_checkpointing", "False", "--use_cpu", "True",
    ]  # fmt: skip


def llamafactory(python: str, rows: Path, work: Path, name: str) -> list[str]:
    """LLaMA-Factory's command, with its files."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    chats = {
        "file_name": str(rows), "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags,
    }  # fmt: skip
    folder = work / f"{name}-data"
    folder.mkdir()
    (folder / "dataset_info.json").write_text(json.dumps({"chats": chats}), encoding="utf-8")
    settings = {
        "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_target": "all", "template": "qwen",
        "model_name_or_path": str(TINY_MODEL), "dataset": "chats", "dataset_dir": str(folder), "cutoff_len": 1024,
        "output_dir": str(work / name), "max_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "use_cpu": True, "overwrite_cache": True,
    }  # fmt: skip
    file = folder / "train.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return [python, "-c", "from llamafactory.cli import main; main()", "train", str(file)]


def environment(work: Path, name: str) -> dict[str, str]:
    """Nothing kept of earlier runs but compiled modules; no network, no GPU, nothing that importing tunesmith sets."""
    left = ("PYTHONDONTWRITEBYTECODE", "THP_MEM_ALLOC_ENABLE")
    plain = {key: value for key, value in os.environ.items() if key not in left}
    return {
        **plain, "HF_DATASETS_CACHE": str(work / f"cache-{name}"), "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1", "DISABLE_VERSION_CHECK": "1",
    }  # fmt: skip


def seconds_to_step(command: list[str], settings: dict[str, str], events: Path | None = None) -> float:
    """Seconds to the first step. Raises RuntimeError with what was said where there is none."""
    started = time.time()
    process = subprocess.Popen(
        command, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout
    at, said = None, []
    for line in process.stdout:
        said.append(line)
        if at is None and LOSS.search(line):
            at = time.time()
    failed = process.wait()
    if events and events.exists():
        found = map(json.loads, events.read_text(encoding="utf-8").splitlines())
        at = next((event["time"] for event in found if event["kind"] == "step"), None)
    if failed or at is None:
        raise RuntimeError(f"{command[0]} ended with {failed} and no step:\n{''.join(said)[-2000:]}")
    return at - started


def help_seconds(command: list[str], settings: dict[str, str]) -> float:
    """CPU seconds of a command's `--help`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "--help"], env=settings, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rows_in(folder: Path, count: int) -> Path:
    """So many short conversations, alone in a folder."""
    folder.mkdir()
    turns = (
        [
            {"role": "user", "content": f"What is {n} and {n}?"},
            {"role": "assistant", "content": f"It is {2 * n}."},
        ]
        for n in range(count)
    )
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns), encoding="utf-8")
    return file


def main() -> int:
    """Start them in turns and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--bar", type=float, default=BAR, help="seconds that ours may take")
    parser.add_argument("--llamafactory", default=os.environ.get("LLAMAFACTORY_PYTHON"), help="its Python")
    args = parser.parse_args()
    if not args.llamafactory:
        print(
            "LLaMA-Factory is left out: give --llamafactory or LLAMAFACTORY_PYTHON.",
            file=sys.stderr,
            flush=True,
        )
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        work = Path(folder)
        rows = rows_in(work / "rows", args.rows)
        helps = {"ours": [sys.executable, "-m", "tunesmith"], "trl sft": list(TRL)}
        if args.llamafactory:
            helps["llamafactory"] = [
                args.llamafactory,
                "-c",
                "from llamafactory.cli import main; main()",
                "train",
            ]
        for number in range(args.times + 1):
            command, events = ours(rows, work, f"ours-{number}")
            turn = {"ours": seconds_to_step(command, environment(work, f"ours-{number}"), events)}
            name = f"trl-{number}"
            turn["trl"] = seconds_to_step(trl(rows, work, name), environment(work, name))
            if args.llamafactory:
                name = f"llamafactory-{number}"
                command = llamafactory(args.llamafactory, rows, work, name)
                turn["llamafactory"] = seconds_to_step(command, environment(work, name))
            print({name: round(value, 2) for name, value in turn.items()}, file=sys.stderr, flush=True)
            for name, value in turn.items() if number else ():  # the first turn compiles and warms the disk
                seconds.setdefault(name, []).append(value)
        told = {name: help_seconds(command, environment(work, "help")) for name, command in helps.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        bar = f", at most {args.bar:g} wanted{': MISSED' if medians[name] > args.bar else ''}"
        print(
            f"seconds of {name}: {medians[name]:.2f}{bar if name == 'ours' else ', no bar'}", file=sys.stderr
        )
        print(f"range of {name}: {min(values):.2f} to {max(values):.2f}, no bar", file=sys.stderr)
    print(
        "--help, CPU seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in told.items()),
        file=sys.stderr,
    )
    mine, peer = medians.pop("ours"), min(medians.values())
    result = {
        "name": "startup", "ours": round(mine, 2), "peer": round(peer, 2), "ratio": round(peer / mine, 2),
        "unit": "s", "n": args.times,
    }  # fmt: skip
    print(json.dumps(result))
    if missed := mine > args.bar or mine > peer:
        print(f"{mine:.1f} s is above {args.bar:g} s or the peer's {peer:.1f} s", file=sys.stderr)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
