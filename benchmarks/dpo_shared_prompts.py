"""Tokens per second of direct preference optimization: `tunesmith train` beside TRL's DPOTrainer, in float32.

Prompts are three times as long as answers; the better and the worse answer to one share theirs. Tokens are those of
both rows, prompts counted twice. Beside TRL our own path without sharing. `training.py` says how they are compared.

    python benchmarks/dpo_shared_prompts.py --lora
"""

from __future__ import annotations

import training


def main() -> None:
    """Compare and print the ratio."""
    args = training.parser(__doc__, 160).parse_args()
    rounds = 1 if args.quick else args.rounds
    task = {"method": "dpo", "adapter": training.adapter(args.lora), "batch": 4}
    medians = training.compare(
        "dpo_shared_prompts", ["ours", "ours without sharing", "trl dpo"], task, shape=args.shape,
        vocabulary=32_768, rows=32 if args.quick else args.rows, rounds=rounds, write=training.write_pairs,
    )  # fmt: skip
    training.result(
        f"dpo_shared_prompts, {args.shape}, {task['adapter']['kind']}", medians, "trl dpo", rounds
    )


if __name__ == "__main__":
    main()
