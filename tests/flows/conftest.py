"""A tiny T5 whose tokenizer knows the words of the questions, and files of questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from encoder_decoders import t5_config, t5_tokenizer

COLORS = ("red", "blue", "green")


def questions(count: int) -> list[dict[str, str]]:
    return [
        {"question": f"what is the color of {n}", "gpt4_replies_target": f"{COLORS[n % 3]} {n}"} for n in range(count)
    ]


def write(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory) -> Path:
    import torch
    from transformers import T5ForConditionalGeneration

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "t5"
    tokenizer = t5_tokenizer()
    T5ForConditionalGeneration(t5_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
