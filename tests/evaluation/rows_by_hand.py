"""Evaluation rows without a model."""

from __future__ import annotations

from tunesmith.evaluation.rows import EvalRow


def row(item, score=None, *, model="base", group=None, metric="exact_match", **fields):
    """An evaluation row by hand."""
    values = {
        "model": model, "item": item, "source_row": f"data:{item + 1}", "group": group, "turn": 0, "sample": 0,
        "prompt_sha256": f"hash {item}", "prompt_text": f"question {item}", "reference": f"answer {item}",
        "output": "out", "finish_reason": "stop", "generation": {}, "scores": {} if score is None else {metric: score},
        "nll": None, "tokens": None, "correct": None, "status": "ok",
    }  # fmt: skip
    return EvalRow(**(values | fields))
