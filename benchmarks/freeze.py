"""Tokens per second of training the top layers alone (`freeze`, ratio 0.7) beside our own full training.

python benchmarks/freeze.py --shape 512x8
"""

from __future__ import annotations

import training


def main() -> None:
    """Compare and print the ratio."""
    args = training.parser(__doc__, 320).parse_args()
    rounds = 1 if args.quick else args.rounds
    task = {
        "method": "sft", "adapter": {"kind": "freeze", "ratio": 0.7}, "batch": 8,
        "alone": {"ours, full": {"adapter": {"kind": "full"}}},
    }  # fmt: skip
    medians = training.compare(
        "freeze", ["ours", "ours, full"], task, shape=args.shape, vocabulary=32_768,
        rows=64 if args.quick else args.rows, rounds=rounds,
    )  # fmt: skip
    training.result(f"freeze 0.7, {args.shape}", medians, "ours, full", rounds)


if __name__ == "__main__":
    main()
