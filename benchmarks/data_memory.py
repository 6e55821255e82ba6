"""Peak memory of preparing JSONL files of two sizes: tunesmith, above the interpreter with its imports.

The peer is the way data sets are read where a file is a list in memory: `json.loads` of every line, kept. It is
run on the smaller file only. The ratio is peer over ours, on that file; what the larger file
takes more is said above the last line.

    python benchmarks/data_memory.py --gigabytes 0.5 2
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path


def peak_mb() -> float:
    """Highest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(file: str, tokenizer_folder: str) -> dict[str, float]:
    """Prepare with tunesmith."""
    import datasets  # noqa: F401
    import numpy  # noqa: F401
    import pandas  # noqa: F401 - pyarrow imports it
    import pyarrow  # noqa: F401
    from transformers import AutoTokenizer

    from tunesmith.data import encoded, prepare
    from tunesmith.recipe import Data

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    before = peak_mb()
    data = Data(dataset=file)
    made = encoded(prepare(data), tokenizer, data=data, loss_on="answers")
    return {"mb": peak_mb() - before, "rows": made.ledger.counts()["rows_in"], "imports_mb": before}


def in_memory(file: str, tokenizer_folder: str) -> dict[str, float]:
    """Read every row and keep it."""
    before = peak_mb()
    with open(file, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return {"mb": peak_mb() - before, "rows": len(rows), "imports_mb": before}


CONTESTANTS = {"ours": ours, "in_memory": in_memory}


def run(name: str, file: Path, tokenizer: Path, cache: Path) -> dict[str, float]:
    """One contestant in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--contestant",
        name,
        "--file",
        str(file),
        "--tokenizer",
        str(tokenizer),
    ]
    environment = {**os.environ, "TUNESMITH_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    size = file.stat().st_size / 1e9
    print(
        f"{name}, {size:.2f} GB, {found['rows']:,.0f} rows: {found['mb']:.0f} MB above {found['imports_mb']:.0f} MB",
        file=sys.stderr,
    )
    return found


def main() -> None:
    """Compare, or be one contestant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, nargs=2, default=(0.5, 2.0))
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(CONTESTANTS[options.contestant](options.file, options.tokenizer)))
        return
    from chat_rows import write_rows, write_tokenizer

    with tempfile.TemporaryDirectory(prefix="data-memory-") as folder:
        tokenizer = write_tokenizer(Path(folder) / "tokenizer")
        peaks = []
        for size in options.gigabytes:
            file = Path(folder) / "chats.jsonl"
            count = write_rows(file, size=size * 1e9)
            if not peaks:
                peer = run("in_memory", file, tokenizer, Path(folder) / "cache")
            peaks.append(run("ours", file, tokenizer, Path(folder) / "cache"))
            rows = count
    print(f"the larger file takes {peaks[1]['mb'] - peaks[0]['mb']:.0f} MB more", file=sys.stderr)
    print(
        json.dumps(
            {
                "name": "data_memory",
                "ours": round(peaks[0]["mb"]),
                "peer": round(peer["mb"]),
                "ratio": round(peer["mb"] / peaks[0]["mb"], 2),
                "unit": "MB",
                "n": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
