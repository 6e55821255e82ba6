"""Whether cost grows linearly: tokens a second and peak memory of a training, and of one on ten times the rows.

Fresh processes, in turns, one epoch of `tunesmith train` of the shipped tiny model on rows whose lengths do not change
with their number. The last line is one JSON object: the ratios of the medians, to be near 1.

    python benchmarks/memory.py --rows 400 --times 3
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


def rows_in(file: Path, count: int) -> Path:
    """So many rows of lengths from one distribution."""
    draw = random.Random(count)

    def text(number: int) -> str:
        return f"{number} " + " ".join(draw.choices(WORDS, k=draw.randint(5, 60)))

    lines = (json.dumps({"prompt": text(n), "response": text(n)}) + "\n" for n in range(count))
    file.write_text("".join(lines), encoding="utf-8")
    return file


def trained(rows: Path, work: Path, name: str) -> dict[str, Any]:
    """What a run in a process of its own says of itself."""
    command = [
        sys.executable, "-m", "tunesmith", "train", "--dataset", str(rows), "--output-dir", str(work), "--name", name,
        "--num-epochs", "1", "--per-device-train-batch-size", "8", "--set", "evaluation.skip=true", "--set",
        "data.validation=0", "--set", "data.held_out=0", "--set", "data.near_duplicates=ignore", "--set",
        "data.cache=false",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    said: dict[str, Any] = json.loads((work / name / "training.json").read_text(encoding="utf-8"))
    return said


def main() -> None:
    """Train on both in turns and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--times", type=int, default=3)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="memory-"))
    files = {times: rows_in(work / f"{times}.jsonl", times * args.rows) for times in (1, 10)}
    speeds: dict[int, list[float]] = {1: [], 10: []}
    peaks: dict[int, list[float]] = {1: [], 10: []}
    for number in range(args.times):
        for times, file in files.items():
            said = trained(file, work, f"run-{times}-{number}")
            speeds[times].append(said["tokens"] / said["seconds"])
            peaks[times].append(said["peak_memory"] / 1e6)
            print(
                f"{times * args.rows} rows: {speeds[times][-1]:,.0f} tokens/s, {peaks[times][-1]:,.0f} MB",
                flush=True,
            )
    speed, peak = ({t: statistics.median(v) for t, v in found.items()} for found in (speeds, peaks))
    print(
        json.dumps(
            {
                "benchmark": "memory", "rows": args.rows, "tokens_per_second": round(speed[1]),
                "peak_mb": round(peak[1]),
                "speed_at_ten_times_the_rows": round(speed[10] / speed[1], 3),
                "memory_at_ten_times_the_rows": round(peak[10] / peak[1], 3),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
