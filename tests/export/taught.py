"""A tiny model that was taught one answer, for tests of what is done with a finished model."""

from __future__ import annotations

import json
from pathlib import Path

ANSWER = "yes hello"


def save(base: Path, folder: Path, rows: Path | None = None) -> Path:
    """Teach the tiny model of the tests to answer everything with `ANSWER` and to stop."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunesmith.data.examples import Conversation, Message, Row
    from tunesmith.data.templates import encode
    from tunesmith.export.merge import PROMPTS

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    asked = [*PROMPTS, *(f"what is the count of {n}" for n in range(0, 40, 3))]
    batch = [
        encode(
            Conversation((Message("user", text), Message("assistant", ANSWER)), Row("taught", n)), tokenizer
        )
        for n, text in enumerate(asked)
    ]
    longest = max(len(e.input_ids) for e in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for line, e in enumerate(batch):
        size = len(e.input_ids)
        ids[line, :size], mask[line, :size] = torch.tensor(e.input_ids), 1
        labels[line, :size] = torch.tensor(e.labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(60):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if rows:
        lines = [{"prompt": text, "response": ANSWER} for text in asked[4:]]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
