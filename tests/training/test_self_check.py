"""The self-check finds equal batches equal, and bites where they are not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tunesmith import api
from tunesmith.compose import compose, overlaid
from tunesmith.methods import METHODS
from tunesmith.training import self_check, steps


@pytest.fixture
def made(tiny_model_folder, tiny_t5_folder, tmp_path):
    def recipe(kind: str, **changes: Any):
        rows = [
            {"prompt": f"count {n}" + " and more" * (n % 5), "response": f"one {n}" + " yes" * (n % 4)}
            if kind not in ("dpo", "orpo", "reward")
            else {
                "prompt": f"count {n}" + " more" * (n % 5),
                "chosen": f"one {n}",
                "rejected": "no" * (1 + n % 3),
            }
            for n in range(30)
        ]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        base = tiny_t5_folder if METHODS[kind].model == "seq2seq" else tiny_model_folder
        layer = {
            "model": {"base": str(base)}, "method": {"kind": kind},
            "data": {"dataset": str(path), "max_length": 96}, "training": {"max_steps": 3},
        }  # fmt: skip
        return compose(overlaid(layer, changes)).recipe

    return recipe


LORA = {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.3}}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("sft", ["4 + 4 accumulated", "packed"]),
        pytest.param("dpo", ["4 + 4 accumulated"], marks=pytest.mark.thorough),
        pytest.param("reward", ["4 + 4 accumulated"], marks=pytest.mark.thorough),
        pytest.param("seq2seq", ["4 + 4 accumulated"], marks=pytest.mark.thorough),
    ],
)
def test_the_same_rows_come_to_the_same_in_all_batches(made, kind, names):
    before = torch.get_rng_state()
    found = api.self_check(made(kind, **LORA))
    assert [c.second for c in found.compared] == names
    assert found.equal, [c.sentence() for c in found.compared]
    assert all(c.gradient < 1e-5 for c in found.compared)
    assert all(c.losses[0] > 0 for c in found.compared)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_mean_of_means_is_found_out(made, monkeypatch):
    """The control: the mistake that trainers made for years."""
    gradient = self_check._gradient

    def means(trainer, batches):
        trainer.model_accepts_loss_kwargs = False
        return gradient(trainer, batches)

    monkeypatch.setattr(self_check, "_gradient", means)
    assert api.self_check(made("sft")).compared[0].equal, "means are weighed by what they are means of"
    monkeypatch.setattr(steps, "weight", lambda batch, splits: 1.0)
    found = api.self_check(made("sft"))
    assert not found.compared[0].equal
    assert "NOT equal" in found.compared[0].sentence()


@pytest.mark.thorough
def test_packed_examples_that_see_one_another_are_found_out(made, monkeypatch):
    packed = self_check._packed

    def together(trainer, rows):
        batch = packed(trainer, rows)
        return {
            **batch,
            "position_ids": torch.arange(batch["input_ids"].shape[1]).expand(batch["input_ids"].shape),
        }

    monkeypatch.setattr(self_check, "_packed", together)
    found = api.self_check(made("sft"))
    assert [c.equal for c in found.compared] == [True, False]


@pytest.mark.thorough
def test_what_cannot_be_compared_is_said(made):
    found = api.self_check(made("orpo"))
    assert found.compared == ()
    assert "depends on the others of its batch" in found.left_out[0]
