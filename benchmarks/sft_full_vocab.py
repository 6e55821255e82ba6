"""The same as `sft_short_chat.py` with a vocabulary of 151,936, as Qwen's models have it.

python benchmarks/sft_full_vocab.py --quick
"""

from __future__ import annotations

import sft_short_chat

VARIANTS = [["--all-peers"], ["--lora"]]
WANTED = {"trl packing": 4.0, "trainer by length": 2.5}
"""Least ratios of speed."""

if __name__ == "__main__":
    sft_short_chat.main(
        "sft_full_vocab", about=__doc__, vocabulary=151_936, rows=40, slow=(9, 2), wanted=WANTED
    )
