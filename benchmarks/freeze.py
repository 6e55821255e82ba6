"""Tokens per second of training the top layers alone (`freeze`, ratio 0.7) beside our own full training.

The shape is 512 wide with 8 layers, of which 0.7 freezes 5 and the table of words, with it the tied head: of the 4
layers of the smaller shape it would freeze no more than 2, as layers are counted whole. Frozen layers are run once
without a graph, so the most that could be gained is what their backward passes, their weights' gradients and their
optimizer take. Rows and lengths are those of `sft_short_chat.py`; the two take turns in processes of their own.
The exit status is 1 below 1.4.

    python benchmarks/freeze.py --shape 256x4
"""

from __future__ import annotations

import training

BAR = 1.4


def main() -> None:
    """Compare and print the ratio."""
    args = training.parser(__doc__, 112, shape="512x8").parse_args()
    rounds = 1 if args.quick else args.rounds
    task = {
        "method": "sft", "adapter": {"kind": "freeze", "ratio": 0.7}, "batch": 8,
        "alone": {"ours, full": {"adapter": {"kind": "full"}}},
    }  # fmt: skip
    medians = training.compare(
        "freeze", ["ours", "ours, full"], task, shape=args.shape, vocabulary=32_768,
        rows=40 if args.quick else args.rows, rounds=rounds,
    )  # fmt: skip
    title = f"freeze 0.7, {args.shape}"
    bars = training.times(medians, {"ours, full": BAR})
    training.result(title, medians, "ours, full", rounds, bars=bars, quick=args.quick)


if __name__ == "__main__":
    main()
