"""Tokens per second of supervised fine-tuning on short chats: `tunesmith train` beside TRL and transformers.

Lengths log-normal around 140 tokens, up to 1,024, 40 % of them labelled, 8 rows a step, vocabulary 32,768. The ratio
is to TRL's SFTTrainer at its best flags on a CPU: float32, packing, no gradient checkpointing. Beside it TRL without
packing and transformers' Trainer with rows grouped by length. `training.py` says how they are compared.

    python benchmarks/sft_short_chat.py --shape 512x8 --lora
"""

from __future__ import annotations

import sys

import training

PEERS = ["trl packing", "trl", "trainer by length"]


def main(title: str = "sft_short_chat", vocabulary: int = 32_768, rows: int = 480) -> None:
    """Compare, tell what share of the matrix product's speed ours reaches, and print the ratio."""
    args = training.parser(__doc__, rows).parse_args()
    rounds = 1 if args.quick else args.rounds
    task = {"method": "sft", "adapter": training.adapter(args.lora), "batch": 8}
    medians = training.compare(
        title, ["ours", *PEERS], task, shape=args.shape, vocabulary=vocabulary,
        rows=64 if args.quick else args.rows, rounds=rounds,
    )  # fmt: skip
    if not args.lora:
        shape = training.SHAPES[args.shape]
        width = shape["hidden_size"]
        layer = 4 * width**2 + 3 * width * shape["intermediate_size"]
        flops = 6 * (layer * shape["num_hidden_layers"] + width * vocabulary * training.LABELLED)
        reached = flops * medians["ours"]["tokens_per_second"] / 1e9
        print(f"about {reached:.0f} GFLOP/s of {training.matrix_peak():.0f}", file=sys.stderr)
    least = min(medians[name]["peak"] for name in PEERS)
    print(f"memory: {medians['ours']['peak'] / least:.2f} times the least of the peers", file=sys.stderr)
    training.result(f"{title}, {args.shape}, {task['adapter']['kind']}", medians, "trl packing", rounds)


if __name__ == "__main__":
    main()
