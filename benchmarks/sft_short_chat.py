"""Tokens per second of supervised fine-tuning on short chats: `tunesmith train` beside TRL and transformers.

Lengths log-normal around 140 tokens, up to 1,024, 40 % of them labelled, 8 rows a step, vocabulary 32,768. The ratio
is to TRL's SFTTrainer at its best flags on a CPU: float32, packing, no gradient checkpointing. Beside it TRL without
packing and transformers' Trainer with rows grouped by length. `training.py` says how they are compared. Leaves with 1
where ours is below what is wanted of it.

    python benchmarks/sft_short_chat.py --shape 512x8 --lora
"""

from __future__ import annotations

import training

PEERS = ["trl packing", "trl", "trainer by length"]
WANTED = {"trl packing": 4.0, "trl": 8.0, "trainer by length": 1.7}
"""Least ratios of speed."""


def main(
    title: str = "sft_short_chat",
    vocabulary: int = 32_768,
    rows: int = 80,
    wanted: dict[str, float] | None = None,
) -> None:
    """Compare, tell what share of the matrix product's speed ours reaches, and print the ratio."""
    args = training.parser(__doc__, rows).parse_args()
    rounds = 1 if args.quick else args.rounds
    task = {"method": "sft", "adapter": training.adapter(args.lora), "batch": 8}
    medians = training.compare(
        title, ["ours", *PEERS], task, shape=args.shape, vocabulary=vocabulary,
        rows=min(args.rows, 64) if args.quick else args.rows, rounds=rounds,
    )  # fmt: skip
    ours = medians["ours"]
    bars: list[training.Bar] = [
        (f"times {name}", ours["tokens_per_second"] / medians[name]["tokens_per_second"], least)
        for name, least in (wanted or WANTED).items()
    ]
    least = min(medians[name]["peak"] for name in PEERS)
    bars.append(("memory to the least of the peers", ours["peak"] / least, -0.5))
    share = training.of_matrix_peak(ours, shape=args.shape, vocabulary=vocabulary, lora=args.lora)
    is_bar = args.shape == "512x8" and not args.lora and wanted is None
    bars.append(("share of the matrix peak", share, 0.75 if is_bar else 0.0))
    training.result(
        f"{title}, {args.shape}, {task['adapter']['kind']}", medians, "trl packing", rounds,
        bars=bars, quick=args.quick,
    )  # fmt: skip


if __name__ == "__main__":
    main()
