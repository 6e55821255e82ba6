"""The validation loss is one mean over all labels: the same at every batch size, and that of plain arithmetic."""

from __future__ import annotations

import json

import pytest
import torch

from tunesmith import api, dataflow, models
from tunesmith.compose import compose, overlaid
from tunesmith.training.run import Run


@pytest.fixture
def uneven(tiny_model_folder, tiny_t5_folder, tmp_path):
    """A recipe of two steps on answers of 1 to 45 words, for a kind of method and an evaluation batch size."""
    file = tmp_path / "uneven.jsonl"
    words = ("red", "blue", "green", "one", "two")
    rows = [
        {"prompt": f"what is {n}", "response": " ".join(words[(n + i) % 5] for i in range(1 + (n % 12) * 4))}
        for n in range(60)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(kind, eval_batch, **changes):
        layer = {
            "output_dir": str(tmp_path / "runs"),
            "name": f"{kind}-{eval_batch}",
            "model": {"base": str(tiny_t5_folder if kind == "seq2seq" else tiny_model_folder)},
            "method": {"kind": kind},
            "data": {"dataset": str(file), "max_length": 256, "validation": 0.4, "near_duplicates": "ignore"},
            "training": {
                "max_steps": 4, "per_device_train_batch_size": 4, "warmup_steps": 0, "learning_rate": 1e-2,
                "eval_steps": 2, "save_steps": 4, "per_device_eval_batch_size": eval_batch,
            },
            "evaluation": {"skip": True},
        }  # fmt: skip
        return compose(overlaid(layer, changes)).recipe

    return recipe


def by_hand(folder, encodings):
    """Nats per label, and the mean of the rows' means, from the plain model's logits row by row."""
    model = models.load_model(str(folder)).eval()
    is_pair = models.is_seq2seq(model)
    losses, means = [], []
    for encoding in encodings:
        ids, labels = torch.tensor([list(encoding.input_ids)]), torch.tensor([list(encoding.labels)])
        with torch.inference_mode():
            if is_pair:
                source = ids[labels == -100][None]
                wanted = ids[labels != -100][None]
                logits = model(input_ids=source, labels=wanted).logits
            else:
                logits, wanted = model(input_ids=ids).logits[:, :-1], labels[:, 1:]
        chosen = wanted[0] != -100
        row = -logits[0].double().log_softmax(-1)[chosen, wanted[0][chosen]]
        losses.append(row)
        means.append(row.mean().item())
    return torch.cat(losses).mean().item(), sum(means) / len(means)


@pytest.mark.parametrize(
    ("kind", "packing"),
    [
        pytest.param("sft", True, id="packed"),
        pytest.param("seq2seq", False, id="seq2seq"),
        pytest.param("sft", False, marks=pytest.mark.thorough, id="sft"),
    ],
)
def test_the_validation_loss_is_a_token_mean_at_every_batch_size(uneven, kind, packing):
    recorded = {}
    for batch in (1, 7, 64):
        recipe = uneven(kind, batch, data={"packing": packing})
        run = Run(api.train(recipe).run)
        recorded[batch] = {e["step"]: e["loss"] for e in run.events() if e["kind"] == "evaluation"}
        best = min(recorded[batch], key=recorded[batch].get)
        result = run.read("training.json")
        assert result["step_of_final_model"] == best
        assert result["validation_loss"] == recorded[batch][best]
    encodings = dataflow.encodings(recipe, dataflow.splits(recipe)).validation
    assert len(encodings) > 14, "more than two batches of seven"
    expected, mean_of_means = by_hand(run.final_model, encodings)
    assert abs(mean_of_means / expected - 1) > 1e-4, "negative control: the weighting shows"
    for losses in recorded.values():
        assert losses == pytest.approx(recorded[1], rel=1e-5)
        assert min(losses.values()) == pytest.approx(expected, rel=1e-5)
