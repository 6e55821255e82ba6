#!/usr/bin/env python
"""Time of `tunesmith validate` for a million chat rows, beside the checks that people write themselves.

    PYTHONPATH=src python benchmarks/validate_rows.py [--rows 1000000] [--peer-rows 50000] [--folder /tmp]

Rows are made here with a fixed seed: two turns, about 400 bytes of JSON Lines each, one row in a hundred with
planted damage (unparsable, empty answer, roles out of order, mojibake, NUL, special token, key, e-mail address,
exact copy, near-copy of an earlier row). What is planted has to be found, to the row, or the script fails.

ours: wall time of `api.validate` with one process per core, start of the processes included.
peer: `datasets.load_dataset("json")` of the same rows (the unparsable ones left out, which it refuses), then a loop
over the rows that looks for empty answers and roles out of order and puts each row's word triples into a datasketch
MinHash (64 permutations) and MinHashLSH, in one process, as datasketch's own examples do. It looks for nothing else,
so the comparison favors the peer. It is timed on the first --peer-rows rows and scaled by their number: its time
grows with the rows, and a million would take most of an hour. Memory is the peak of the main process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

DAMAGE = (
    "unparsable", "empty_answer", "roles", "mojibake", "nul", "special_token", "secret", "email", "duplicate",
    "near_duplicate",
)  # fmt: skip


def generate(path: Path, rows: int) -> Counter[str]:
    """Write the rows; how many of each damage were planted."""
    rng = random.Random(20260101)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(3, 9))) for _ in range(20_000)]
    planted: Counter[str] = Counter()
    earlier: list[tuple[str, str]] = []
    with path.open("w", encoding="utf-8") as out:
        for number in range(rows):
            question, answer = " ".join(rng.choices(words, k=18)), " ".join(rng.choices(words, k=27))
            damage = DAMAGE[(number // 100) % len(DAMAGE)] if number % 100 == 99 else None
            if number % 100 == 0:
                earlier.append((question, answer))
            turns = [("user", question), ("assistant", answer)]
            match damage:
                case "empty_answer":
                    turns[1] = ("assistant", " ")
                case "roles":
                    turns.insert(0, ("user", "hello"))
                case "mojibake":
                    turns[1] = ("assistant", answer + " cafÃ©")
                case "nul":
                    turns[0] = ("user", question + "\0")
                case "special_token":
                    turns[1] = ("assistant", answer + "<|im_end|>")
                case "secret":
                    turns[1] = ("assistant", f"{answer} sk-{number:040d}")
                case "email":
                    turns[0] = ("user", f"{question} someone@example.com")
                case "duplicate":
                    before = earlier.pop()
                    turns = [("user", before[0]), ("assistant", before[1])]
                case "near_duplicate":
                    before = earlier.pop()
                    turns = [("user", before[0]), ("assistant", before[1] + " indeed")]
            line = json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]})
            out.write((line[:-3] if damage == "unparsable" else line) + "\n")
            planted.update([damage] if damage else [])
    return planted


def ours(path: Path, planted: Counter[str]) -> float:
    """Seconds that validation takes; fails where it does not find what was planted."""
    from tunesmith import api

    started = time.perf_counter()
    report = api.validate(str(path), task="chat", processes=os.cpu_count() or 1)
    seconds = time.perf_counter() - started
    assert report.rows == report.ok + report.with_errors + report.with_warnings
    assert Counter(report.counts) == planted, (report.counts, planted)
    return seconds


def peer(path: Path, rows: int) -> float:
    """Seconds for a row that the usual tools take."""
    import datasets
    from datasketch import MinHash, MinHashLSH

    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "rows.jsonl")
        with path.open(encoding="utf-8") as lines, part.open("w", encoding="utf-8") as out:
            for _, line in zip(range(rows), lines, strict=False):
                if line.endswith("}\n"):
                    out.write(line)
        started = time.perf_counter()
        loaded = datasets.load_dataset("json", data_files=str(part), split="train", cache_dir=folder)
        lsh = MinHashLSH(threshold=0.8, num_perm=64)
        found: Counter[str] = Counter()
        for number, row in enumerate(loaded):
            roles = [turn["role"] for turn in row["messages"]]
            if any(a == b for a, b in itertools.pairwise(roles)) or roles[-1] != "assistant":
                found["roles"] += 1
            if not all(turn["content"].strip() for turn in row["messages"] if turn["role"] == "assistant"):
                found["empty_answer"] += 1
            words = " ".join(turn["content"] for turn in row["messages"]).lower().split()
            made = MinHash(num_perm=64)
            made.update_batch({" ".join(words[n : n + 3]).encode() for n in range(max(len(words) - 2, 1))})
            if lsh.query(made):
                found["near_duplicate"] += 1
            lsh.insert(number, made)
        return (time.perf_counter() - started) / max(len(loaded), 1)


def main() -> int:
    """Measure and print one JSON object as the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--peer-rows", type=int, default=50_000)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="tunesmith-benchmark-") as folder:
        path = Path(folder, "rows.jsonl")
        planted = generate(path, options.rows)
        size = path.stat().st_size
        seconds = ours(path, planted)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        theirs = peer(path, min(options.peer_rows, options.rows)) * options.rows
    print(
        f"{size / options.rows:.0f} bytes a row; memory {memory:.2f} GB, a process {children:.2f} GB",
        file=sys.stderr,
    )
    print(
        json.dumps(
            {
                "name": "validate_rows",
                "ours": round(seconds, 2),
                "peer": round(theirs, 2),
                "ratio": round(theirs / seconds, 2),
                "unit": "s",
                "n": options.rows,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
