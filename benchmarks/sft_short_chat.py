"""Tokens per second of supervised fine-tuning on short chats: `tunesmith train` beside TRL and transformers.

Lengths log-normal around 140 tokens, up to 1,024, of which 40 % are labelled; no two rows begin alike; 8 rows a step,
vocabulary 32,768. The ratio is to TRL's SFTTrainer at its best flags on
a CPU: float32, packing, no gradient checkpointing. Beside it TRL without packing, transformers' Trainer with rows
grouped by length and, in an environment of its own (`--llamafactory`, or the variable LLAMAFACTORY_PYTHON),
LLaMA-Factory without and with its neat packing. `--all-peers` adds, on fewer rows and in at most three turns beside
ours on the same ones, what is slow on a CPU: TRL at its defaults (bfloat16, gradient checkpointing) and the Trainer
that pads every row to the limit. `training.py` says how they are compared. Leaves with 1 where ours is below what is
wanted of it.

    python benchmarks/sft_short_chat.py --shape 512x8 --lora
"""

from __future__ import annotations

import os
import sys
from typing import Any

import training

VARIANTS = [["--all-peers"], ["--lora"], ["--shape", "512x8"], ["--shape", "512x8", "--lora"]]
PEERS = ["trl packing", "trl", "trainer by length"]
SLOW = ["trl defaults", "trainer padded"]
"""Peers of `--all-peers`."""
WANTED = {"trl packing": 4.0, "trl": 8.0, "trainer by length": 1.7}
"""Least ratios of speed."""


def main(
    title: str = "sft_short_chat",
    *,
    about: str | None = __doc__,
    vocabulary: int = 32_768,
    rows: int = 80,
    slow: tuple[int, int] = (32, 8),
    rounds: int = 5,
    wanted: dict[str, float] | None = None,
    memory: float = 0.5,
    write: Any = training.write_chats,
    **task: Any,
) -> None:
    """Compare, tell what share of the matrix product's speed ours reaches, and print the ratio.

    `slow` are rows, and rows a step, of the slow peers' comparison; `memory` is the most that ours may hold of what the
    least of the peers holds (0: no bar); `task` is what the task has of its own.
    """
    parser = training.parser(about, rows, rounds=rounds)
    parser.add_argument("--all-peers", action="store_true", help="with those that are slow on a CPU")
    parser.add_argument("--llamafactory", default=os.environ.get("LLAMAFACTORY_PYTHON"), help="its Python")
    args = parser.parse_args()
    turns = 1 if args.quick else args.rounds
    task = {"method": "sft", "adapter": training.adapter(args.lora), "batch": 8, **task}
    if not args.llamafactory:
        print("LLaMA-Factory is left out: give --llamafactory or LLAMAFACTORY_PYTHON.", file=sys.stderr)
    medians = training.compare(
        title, ["ours", *PEERS], task, shape=args.shape, vocabulary=vocabulary,
        rows=min(args.rows, 64) if args.quick else args.rows, rounds=turns, write=write, factory=args.llamafactory,
    )  # fmt: skip
    ours, *others = medians
    least = min(others, key=lambda name: medians[name]["peak"])
    bars = training.times(medians, WANTED if wanted is None else wanted)
    bars.append(
        (
            f"memory to the least of the peers, {least}",
            medians[ours]["peak"] / medians[least]["peak"],
            -memory,
        )
    )
    share, plain = (
        training.of_matrix_peak(
            medians[ours], shape=args.shape, vocabulary=vocabulary, lora=args.lora, peak=peak
        )
        for peak in ("matrix_gflops", "plain_gflops")
    )
    is_bar = args.shape == "512x8" and wanted is None
    bars.append(("share of the matrix peak", share, 0.75 if is_bar else 0.0))
    bars.append(("share of what torch.mm gives", plain, 0.0))
    if args.all_peers:
        few = training.compare(
            f"{title}, fewer rows", ["ours", *SLOW], {**task, "batch": slow[1], "alone": {"trl defaults": DEFAULTS}},
            shape=args.shape, vocabulary=vocabulary, rows=slow[0], rounds=min(turns, 3), write=write,
        )  # fmt: skip
        bars += training.times(few, {})
    training.result(
        f"{title}, {args.shape}, {task['adapter']['kind']}", medians, "trl packing", turns,
        bars=bars, quick=args.quick,
    )  # fmt: skip


DEFAULTS = {"arguments": {"bf16": True, "gradient_checkpointing": True}}
"""What TRL's own configuration has on a CPU as well."""


if __name__ == "__main__":
    main()
