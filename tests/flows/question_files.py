"""Files of questions, a tiny T5 whose tokenizer is trained here, and drivers for the flow."""

from __future__ import annotations

import json
from pathlib import Path

from encoder_decoders import t5_config, t5_tokenizer

COLORS = ("red", "blue", "green")
KEYS = {"input_text_key": "question", "output_text_key": "gpt4_replies_target"}


def questions(count: int) -> list[dict[str, str]]:
    return [
        {"question": f"what is the color of {n}", "gpt4_replies_target": f"{COLORS[n % 3]} {n}"}
        for n in range(count)
    ]


def write(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def save_t5(folder: Path) -> Path:
    import torch
    from transformers import T5ForConditionalGeneration

    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    T5ForConditionalGeneration(t5_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def flow(start: str | None = "base"):
    """A driver as anybody would build it."""
    from hamilton import driver

    from tunesmith.flows import question_answer

    configuration = {} if start is None else {"start": start}
    return driver.Builder().with_config(configuration).with_modules(question_answer).build()
