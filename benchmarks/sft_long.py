"""The same as `sft_short_chat.py` with rows of 2,048 to 4,096 tokens, two of them a step, and no bars.

The rows are few and the turns three, so that it ends in minutes. All of them are trained on.

    python benchmarks/sft_long.py --lora
"""

from __future__ import annotations

import sft_short_chat
import training

VARIANTS = [[], ["--lora"]]
ALL = {"validation": 0, "held_out": 0}

if __name__ == "__main__":
    sft_short_chat.main(
        "sft_long", about=__doc__, rows=8, slow=(4, 1), rounds=3, wanted={}, memory=0.0,
        write=training.write_long_chats, batch=2, length=4096, data=ALL,
    )  # fmt: skip
