"""Batches of like length, and a loss that counts every trained token once."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest

from tunesmith import api, dataflow
from tunesmith import estimate as estimating
from tunesmith.compose import compose
from tunesmith.data.packing import padded_share
from tunesmith.errors import RecipeError
from tunesmith.methods import METHODS
from tunesmith.training import order
from tunesmith.training.fit import arguments
from tunesmith.training.order import ByLength, by_length
from tunesmith.training.run import create


@pytest.fixture
def lengths():
    draw = random.Random(1)
    return [int(draw.lognormvariate(4.9, 0.8)) for _ in range(1003)]


def test_an_epochs_order_holds_every_row_once_and_follows_from_seed_and_epoch(lengths):
    orders = {(s, e): by_length(lengths, 8, seed=s, epoch=e) for s in (1, 2) for e in (0, 1)}
    assert all(sorted(order) == list(range(1003)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    sampler = ByLength(lengths, 8, seed=2)
    list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) == orders[2, 1]


def test_batches_hold_like_lengths_in_no_order_of_length(lengths):
    sizes = [lengths[n] for n in by_length(lengths, 8, seed=0, epoch=0)]
    assert 2 * padded_share(sizes, 8) < padded_share(lengths, 8)  # the longest few are unlike one another
    means = [sum(sizes[place : place + 8]) for place in range(0, 1000, 8)]
    rising = sum(a < b for a, b in pairwise(means))
    assert 40 < rising < 85


def test_no_row_is_likelier_than_another_to_come_in_the_part_of_an_epoch_that_is_trained(lengths):
    """Over many seeds each row, long or short, comes in the first third as often as chance has it."""
    import numpy as np

    rows = 200
    found = np.zeros(rows)
    for seed in range(1500):
        found[by_length(lengths[:rows], 4, seed=seed, epoch=3)[: rows // 3]] += 1
    share = found / 1500
    # The standard error of a row's share is 1.2 points; the largest of 200 is below 4.5 of them.
    assert abs(share - 66 / rows).max() < 0.055
    longest = np.argsort(lengths[:rows])[-rows // 4 :]
    assert abs(share[longest].mean() - share.mean()) < 0.01


@pytest.fixture
def settings(tiny_model_folder, tmp_path):
    draw = random.Random(0)
    file = tmp_path / "rows.jsonl"
    words = ["red", "blue", "green", "one", "two", "three"]
    rows = [
        {"prompt": f"count {n}", "response": " ".join(draw.choices(words, k=draw.randint(1, 40)))} for n in range(12)
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def made(name, **training):
        return {
            "name": name, "output_dir": str(tmp_path / "runs"), "model": {"base": str(tiny_model_folder)},
            "data": {
                "dataset": str(file), "max_length": 512, "validation": 0.0, "held_out": 0.0,
                "near_duplicates": "ignore",
            },
            "evaluation": {"skip": True},
            "training": {"warmup_steps": 0, "scheduler": "constant", "batches": "by_length", **training},
        }  # fmt: skip

    return made


def weights(run):
    from safetensors.torch import load_file

    return load_file(run / "final_model/model.safetensors")


def test_the_loss_is_normalized_by_the_trained_tokens_of_the_whole_step(settings):
    """One step of plain gradient descent over all rows in micro-batches of unlike size is one over the sum."""
    import torch
    from transformers import AutoModelForCausalLM

    recipe = compose(
        settings(
            "one", max_steps=1, per_device_train_batch_size=5, gradient_accumulation_steps=3, optimizer="sgd",
            learning_rate=0.1, weight_decay=0.0, max_grad_norm=0,
        )
    ).recipe  # fmt: skip
    tuned = weights(api.train(recipe).run)
    rows = list(api._driver().execute(["encodings"], inputs=api._inputs(recipe))["encodings"].train)
    model = AutoModelForCausalLM.from_pretrained(recipe.model.base)
    total, count = 0, 0
    for row in rows:
        ids, labels = torch.tensor([list(row.input_ids)]), torch.tensor(list(row.labels))
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
        count += int((labels[1:] != -100).sum())
    (total / count).backward()
    for name, parameter in model.named_parameters():
        moved = tuned[name] - parameter.detach()
        assert torch.allclose(moved, -0.1 * parameter.grad, atol=2e-7), name


@pytest.mark.slow
def test_a_run_that_is_continued_in_a_later_epoch_ends_as_if_it_never_stopped(settings):
    import torch

    straight = weights(
        api.train(compose(settings("straight", num_epochs=2, max_steps=6, save_steps=4)).recipe).run
    )
    run = api.train(compose(settings("stopped", num_epochs=2, max_steps=6, save_steps=4)).recipe).run
    for file in ("training.json", "status.json"):
        (run / file).unlink(missing_ok=True)
    resumed = weights(api.resume(run, checkpoint="checkpoint-step-4").run)
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    said = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert any(event.get("name") == "batches" and "padding" in event["reason"] for event in said)


@pytest.mark.parametrize("changes", [{"method": {"kind": "kto"}}, {"data": {"packing": True}}])
def test_where_an_order_has_no_effect_it_is_refused(settings, changes):
    asked = settings("refused")
    asked |= {name: {**asked.get(name, {}), **section} for name, section in changes.items()}
    with pytest.raises(RecipeError, match="by_length has no effect"):
        compose(asked)


def built(asked):
    """The order in which a run would take its rows, and what it says of that; its plan is made beside it."""
    recipe = compose(asked).recipe
    wanted = ["plan", "encodings", "packing", "estimate"]
    given = api._driver().execute(wanted, inputs=api._inputs(recipe))
    run = create(recipe)
    trainer = dataflow._trainer(
        recipe, run, dataflow._tokenizer(recipe)[0], given["plan"], given["encodings"], given["packing"],
        arguments(given["plan"], recipe.training, recipe.tracking, name="x", staging=run.staging),
    )  # fmt: skip
    said = [e["value"] for e in run.events() if e.get("name") == "batches"]
    return (
        trainer._get_train_sampler(),
        said,
        dataflow._row_lengths(METHODS["sft"], given["encodings"].train, None),
    )


@pytest.mark.parametrize(
    ("forward", "packing", "worth", "said"),
    [
        ("stock", False, 0.05, ["by length"]),
        ("stock", False, 0.9, ["shuffled"]),
        ("stock", True, 0.05, []),
        ("fast", False, 0.05, []),
    ],
)
def test_by_default_rows_of_like_length_come_together_where_that_saves_padding(
    settings, monkeypatch, forward, packing, worth, said
):
    monkeypatch.setattr(order, "WORTH", worth)
    planned, inner = [], estimating.batches
    monkeypatch.setattr(estimating, "batches", lambda *a, **k: planned.append(inner(*a, **k)) or planned[-1])
    asked = settings("auto", batches="auto", forward=forward, per_device_train_batch_size=2)
    asked["data"]["packing"] = packing
    sampler, told, lengths = built(asked)
    assert planned[-1].are_alike == (said == ["by length"])  # the plan is that of the run
    assert told == said
    assert isinstance(sampler, ByLength) == (said == ["by length"])
    if said == ["by length"]:
        assert list(sampler) == by_length(lengths, 2, seed=42, epoch=0)
