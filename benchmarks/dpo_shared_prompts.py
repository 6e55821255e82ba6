"""Tokens per second of direct preference optimization: `tunesmith train` beside TRL's DPOTrainer, in float32.

Prompts are three times as long as answers; the better and the worse answer to one share theirs. Tokens are those of
both rows, prompts counted twice. `training.py` says how they are compared. Leaves with 1 where ours is below what is
wanted of it.

The ratio to TRL is measured at 256x4 with a vocabulary of 32,768. What sharing gains is measured beside our own path
without it at 512x8 with a vocabulary of 8,192, since answers and their logits are never shared. Counting products, with
five shared tokens for eight, sharing can gain at most

    256x4, 32,768   1.25, as the head is most of the work      512x8, 8,192      1.54
    512x8, 32,768   1.45                                       Llama 3.2 1B      1.53, 8B: 1.58

so at the first two a ratio of 1.5 cannot be had by anyone, and the third has the head's share of a real small model.

    python benchmarks/dpo_shared_prompts.py --lora
"""

from __future__ import annotations

import training

VARIANTS = [[], ["--lora"]]


def main() -> None:
    """Compare and print the ratio."""
    args = training.parser(__doc__, 25).parse_args()
    rounds = 1 if args.quick else args.rounds
    task = {"method": "dpo", "adapter": training.adapter(args.lora), "batch": 4}

    def compared(names: list[str], shape: str, vocabulary: int) -> dict[str, dict[str, float]]:
        return training.compare(
            "dpo_shared_prompts", names, task, shape=shape, vocabulary=vocabulary, rows=args.rows,
            rounds=rounds, write=training.write_pairs,
        )  # fmt: skip

    sharing = compared(["ours", "ours without sharing"], "512x8", 8_192)
    medians = compared(["ours", "trl dpo"], args.shape, 32_768)

    def ratio(found: dict[str, dict[str, float]], peer: str) -> float:
        return found["ours"]["tokens_per_second"] / found[peer]["tokens_per_second"]

    bars = [
        ("times trl dpo", ratio(medians, "trl dpo"), 4.0),
        ("times without sharing, 512x8, 8,192", ratio(sharing, "ours without sharing"), 1.5),
    ]
    training.result(
        f"dpo_shared_prompts, {args.shape}, {task['adapter']['kind']}", medians, "trl dpo", rounds,
        bars=bars, quick=args.quick,
    )  # fmt: skip


if __name__ == "__main__":
    main()
