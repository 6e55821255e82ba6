"""Peak memory with which a process of a training reads its rows, for ten times as many rows.

Two sets of tokens are written as `prepare` keeps them. A fresh process for each takes batches of them in a shuffled
order, as one of eight processes does in training, and hands back after each step what it read. The last line has the
megabytes above the imports for the larger set; those for the smaller one stand above it. The exit status is 1 where
ten times the rows take more than `--bar` bytes a row more.

    python benchmarks/rank_memory.py --rows 50000
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

BATCH, STEPS, PROCESSES = 8, 400, 8


def written(file: Path, rows: int) -> int:
    """Rows of 20 to 400 tokens, as the cache keeps them; the bytes of the file."""
    from tunesmith.data.cache import EncodingWriter
    from tunesmith.data.templates import Encoding

    rng = np.random.default_rng(0)
    writer = EncodingWriter(file, hashlib.sha256())
    for begin in range(0, rows, 1000):
        numbers = list(range(begin, min(begin + 1000, rows)))
        made = [rng.integers(0, 32_000, rng.integers(20, 400), dtype=np.int32) for _ in numbers]
        writer.write(numbers, [Encoding(ids, ids) for ids in made])
    writer.close()
    return file.stat().st_size


def taken(file: Path) -> float:
    """Megabytes above the imports that a process holds at most while it takes its batches."""
    import datasets  # noqa: F401
    import torch

    from tunesmith.data.cache import Encodings
    from tunesmith.training.order import Dealt

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = peak()
    tokens = Encodings(file)
    rows = tokens.dataset()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    dealt = Dealt(order, step=BATCH * PROCESSES, batch=BATCH, processes=PROCESSES)
    batch: list[int] = []
    read = 0
    for place, number in enumerate(dealt):
        if place // BATCH % PROCESSES == 0 and number >= 0:  # this process's turn
            batch.append(number)
        if len(batch) == BATCH:
            read += sum(len(ids) for ids in rows[batch]["input_ids"])
            tokens.release()
            batch = []
        if place >= STEPS * BATCH * PROCESSES:
            break
    assert read
    return peak() - before


def main() -> None:
    """Write, read, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=50_000, help="of the smaller set")
    parser.add_argument(
        "--bar", type=float, default=128.0, help="bytes that a further row may take of a process"
    )
    parser.add_argument("--file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.file:
        print(taken(Path(args.file)))
        return
    found = {}
    with tempfile.TemporaryDirectory(prefix="rank-memory-") as folder:
        for rows in (args.rows, 10 * args.rows):
            file = Path(folder) / f"{rows}.arrow"
            size = written(file, rows)
            done = subprocess.run(
                [sys.executable, __file__, "--file", str(file)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found[rows] = float(done.stdout.strip().splitlines()[-1])
            print(f"MB for {rows} rows in a file of {size / 1e6:.0f} MB: {found[rows]:.1f}, no bar", file=sys.stderr)  # fmt: skip  # noqa: E501
    small, large = found.values()
    each = (large - small) * 2**20 / (9 * args.rows)
    missed = each > args.bar
    print(
        f"bytes a further row: {each:.1f}, at most {args.bar:g} wanted{': MISSED' if missed else ''}",
        file=sys.stderr,
    )
    result = {
        "name": "rank_memory", "ours": round(large, 1), "peer": None, "ratio": None, "unit": "MB",
        "n": 10 * args.rows,
    }  # fmt: skip
    print(json.dumps(result))
    sys.exit(int(missed))


if __name__ == "__main__":
    main()
