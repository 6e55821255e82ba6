"""Whether cost grows linearly: tokens a second and peak memory of a training, and of one with ten times the rows.

Fresh processes, in turns, equally many steps of `tunesmith train` of the shipped tiny model on rows whose lengths do
not change with their number. Reading and encoding, which ten times the rows take ten times, count into the peak and not
into the speed. The fewer rows are so many that tiktoken does the tokenizing (`data/tokens.py`), whose tables are 12
MB once and not by the row: 2,000 rows need none. The last line is one JSON object with the speeds, with ten times the
rows and with the fewer ones; the exit status is 1 where they differ by more than 3 %, or the peaks by more than 2 %.

    python benchmarks/memory.py --rows 5000 --times 5
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from chat_rows import WORDS

SPEED, MEMORY = 0.03, 0.02
"""Shares by which the speed may change, and the peak grow."""


def rows_in(file: Path, count: int) -> Path:
    """So many rows of lengths from one distribution."""
    draw = random.Random(count)

    def text(number: int) -> str:
        return f"{number} " + " ".join(draw.choices(WORDS, k=draw.randint(5, 60)))

    lines = (json.dumps({"prompt": text(n), "response": text(n)}) + "\n" for n in range(count))
    file.write_text("".join(lines), encoding="utf-8")
    return file


def trained(rows: Path, work: Path, name: str, steps: int) -> dict[str, Any]:
    """What a run in a process of its own says of itself."""
    command = [
        sys.executable, "-m", "tunesmith", "train", "--dataset", str(rows), "--output-dir", str(work), "--name", name,
        "--max-steps", str(steps), "--per-device-train-batch-size", "8", "--set", "evaluation.skip=true", "--set",
        "data.validation=0", "--set", "data.held_out=0", "--set", "data.near_duplicates=ignore", "--set",
        "data.cache=false",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    said: dict[str, Any] = json.loads((work / name / "training.json").read_text(encoding="utf-8"))
    return said


def main() -> int:
    """Train on both in turns and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    speeds: dict[int, list[float]] = {1: [], 10: []}
    peaks: dict[int, list[float]] = {1: [], 10: []}
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        work = Path(folder)
        files = {times: rows_in(work / f"{times}.jsonl", times * args.rows) for times in (1, 10)}
        for number in range(args.times):
            # The first one of a turn changes, so that what the machine does beside falls on both.
            for times, file in list(files.items())[:: 1 if number % 2 else -1]:
                said = trained(file, work, f"run-{times}-{number}", args.steps)
                speeds[times].append(said["tokens"] / said["seconds"])
                peaks[times].append(said["peak_memory"] / 1e6)
                print(
                    f"{times * args.rows} rows: {speeds[times][-1]:,.0f} tokens/s, {peaks[times][-1]:,.0f} MB",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
    speed, peak = ({t: statistics.median(v) for t, v in found.items()} for found in (speeds, peaks))
    memory = peak[10] / peak[1]
    print(f"peak memory {peak[1]:,.0f} and {peak[10]:,.0f} MB", file=sys.stderr)
    word = ": MISSED" if memory - 1 > MEMORY else ""
    print(f"peak memory, times: {memory:.3f}, at most {1 + MEMORY:g} wanted{word}", file=sys.stderr)
    result = {
        "name": "memory", "ours": round(speed[10]), "peer": round(speed[1]), "ratio": round(speed[10] / speed[1], 3),
        "unit": "tokens/s", "n": args.times,
    }  # fmt: skip
    print(json.dumps(result))
    return int(abs(speed[10] / speed[1] - 1) > SPEED or memory - 1 > MEMORY)


if __name__ == "__main__":
    sys.exit(main())
