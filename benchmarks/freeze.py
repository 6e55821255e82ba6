"""Tokens per second of training the top layers alone (`freeze`, ratio 0.7) beside our own full training.

The shape is 512 wide with 8 layers, of which 0.7 freezes 5 and the table of words, with it the tied head: of the 4
layers of the smaller shape it would freeze no more than 2, as layers are counted whole. Frozen layers are run once
without a graph, so the most that could be gained is what their backward passes, their weights' gradients and their
optimizer take. Rows and lengths are those of `sft_short_chat.py`; the two take turns in processes of their own.
The exit status is 1 below 1.4. With `--kept` it is told instead, without a bar, what keeping the frozen layers' outputs
from epoch to epoch gains over three epochs (`training.cache_frozen`), the first of which makes them; the plan's FLOPs,
and so the share of the matrix peak, are those without keeping.

    python benchmarks/freeze.py --shape 256x4
"""

from __future__ import annotations

import training

VARIANTS = [[], ["--kept"]]
BAR = 1.4


def main() -> None:
    """Compare and print the ratio."""
    parser = training.parser(__doc__, 112, shape="512x8")
    parser.add_argument("--kept", action="store_true", help="what keeping the frozen layers' outputs gains")
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    task = {"method": "sft", "adapter": {"kind": "freeze", "ratio": 0.7}, "batch": 8}
    if args.kept:
        other, bar, rows = "ours, not kept", 0.0, args.rows // 3
        task |= {"epochs": 3, "training": {"cache_frozen": True}, "alone": {other: {"training": {}}}}
    else:
        other, bar, rows = "ours, full", BAR, args.rows
        task |= {"alone": {other: {"adapter": {"kind": "full"}}}}
    title = f"freeze 0.7{', kept' if args.kept else ''}, {args.shape}"
    medians = training.compare(
        title, ["ours", other], task, shape=args.shape, vocabulary=32_768,
        rows=40 if args.quick else rows, rounds=rounds,
    )  # fmt: skip
    bars = training.times(medians, {other: bar})
    training.result(title, medians, other, rounds, bars=bars, quick=args.quick)


if __name__ == "__main__":
    main()
