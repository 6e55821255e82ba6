"""Tokens per second of training an encoder-decoder: `tunesmith train` beside transformers' Seq2SeqTrainer.

A T5 of random weights, vocabulary 32,768, texts of 20 to 480 tokens (log-normal around 180) with answers a quarter as
long, 8 rows a step. The peer pads every row to the longest one of all, as is usual with `padding="max_length"`; beside
it the same trainer at its best, padded to the longest of each batch with rows grouped by length. The ratio is to the
first, and the exit status 1 where it is below 1.3. Tokens of inputs and of answers are counted. `training.py` says how
they are compared.

    python benchmarks/seq2seq.py --shape 128x2
"""

from __future__ import annotations

import training

VARIANTS = [[], ["--lora"]]
BAR = 1.3


def main() -> None:
    """Compare and print the ratio."""
    args = training.parser(__doc__, 96, training.T5_SHAPES).parse_args()
    rounds = 1 if args.quick else args.rounds
    task = {
        "method": "seq2seq", "adapter": training.adapter(args.lora), "batch": 8,
        "section": {"max_input_length": 512, "max_output_length": 128},
    }  # fmt: skip
    medians = training.compare(
        "seq2seq", ["ours", "padded", "by length"], task, shape=args.shape, vocabulary=32_768,
        rows=32 if args.quick else args.rows, rounds=rounds, write=training.write_summaries, model=training.write_t5,
    )  # fmt: skip
    title = f"seq2seq, {args.shape}, {task['adapter']['kind']}"
    bars = training.times(medians, {"padded": BAR})
    training.result(title, medians, "padded", rounds, bars=bars, quick=args.quick)


if __name__ == "__main__":
    main()
