"""The learning-rate finder: on a quadratic whose optimum is known, and on the tiny model."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tunesmith import api
from tunesmith.cli import app
from tunesmith.compose import compose
from tunesmith.errors import RecipeError
from tunesmith.training.find_lr import (
    Divergence,
    chart,
    exponential,
    found,
    page,
    restored,
    smoothed,
    sweep,
    swept,
)


def quadratic(curvatures, seed=0):
    """Gradient descent on sum of c x² / 2; the best constant rate is 2 / (lowest + highest curvature)."""
    c = np.array(curvatures, dtype=float)
    x = np.random.default_rng(seed).normal(size=len(c)) * 10

    def step(rate):
        nonlocal x
        loss = float((c * x * x).sum() / 2)
        x = x - rate * c * x
        return loss

    return step


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_a_quadratic_with_a_known_optimum(scale):
    curvatures = [scale, 2 * scale, 5 * scale]
    best, edge = 2 / (6 * scale), 2 / (5 * scale)
    rates = exponential(1e-7 / scale, 1e2 / scale, 120)
    search = found(rates, [sweep(quadratic(curvatures, seed), rates, seed=seed) for seed in range(3)])
    assert best / 4 < search.suggestion < edge, "below it slow, from the edge on it diverges"
    assert search.low < search.suggestion <= search.high
    assert search.high < edge
    assert all(s.diverged for s in search.sweeps)

    def after(rate, steps=20):
        step = quadratic(curvatures)
        return [step(rate) for _ in range(steps + 1)][-1]

    assert after(search.suggestion) < after(search.suggestion / 10)
    assert after(search.suggestion) < after(search.suggestion * 10)


def test_no_rate_is_suggested_where_none_lowers_the_loss():
    draw = random.Random(0)
    rates = exponential(1e-6, 1.0, 60)
    flat = found(rates, [sweep(lambda _: 2 + draw.gauss(0, 0.05), rates)])
    assert flat.suggestion is None
    assert "No learning rate to suggest: none of the rates from 1e-06" in flat.sentence()
    assert not any("suggested" in line for line in chart(flat))
    rising = found(rates, [sweep(lambda rate: 2 + rate * 50, rates)])
    assert rising.suggestion is None
    assert rising.sweeps[0].diverged


def test_a_sweep_stops_where_the_loss_is_no_number():
    rates = exponential(1e-6, 1.0, 60)
    one = sweep(lambda rate: math.nan if rate > 1e-3 else 2 - 100 * rate, rates)
    assert one.diverged
    assert len(one.losses) == sum(rate <= 1e-3 for rate in rates) + 1
    search = found(rates, [one])
    assert search.suggestion is not None
    assert search.high <= 1e-3


def test_a_fall_up_to_the_end_asks_for_higher_rates():
    rates = exponential(1e-6, 1e-3, 60)
    search = found(rates, [sweep(lambda rate: 3 - 1000 * rate, rates)])
    assert "a higher end may suggest a higher rate" in search.notes[0]


def test_smoothing_does_not_shift_the_curve():
    losses = [abs(n - 50) for n in range(101)]
    curve = smoothed(losses)
    assert min(range(101), key=lambda n: curve[n]) == 50


@pytest.mark.parametrize(
    ("low", "high", "steps"), [(0, 1, 100), (1, 1, 100), (1e-3, 1e-4, 100), (1e-6, 1, 5)]
)
def test_rates_that_cannot_be_swept_are_refused(low, high, steps):
    with pytest.raises(RecipeError, match="cannot be swept"):
        exponential(low, high, steps)


def test_everything_is_put_back():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5))
    model[0].bias.requires_grad = False
    model.eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with restored(model):
        model.train()
        for _ in range(3):
            model(torch.rand(4, 3)).sum().backward()
            with torch.no_grad():
                model[0].weight -= 0.1 * model[0].weight.grad
        random.random()
        np.random.rand()
        assert not torch.equal(model[0].weight, before["0.weight"]), "negative control"
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not model.training
    assert model[0].weight.grad is None
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


def test_gradients_and_the_mode_of_each_part_are_put_back_as_well():
    model = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Dropout(0.5))  # never all 64 dropped
    model[1].eval()
    model(torch.ones(1, 2)).sum().backward()
    gradient = model[0].weight.grad
    before = gradient.clone()
    with restored(model):
        model.train()
        model(torch.ones(1, 2)).sum().backward()
        assert not torch.equal(gradient, before), "negative control: it is added to in place"
    assert model[0].weight.grad is gradient
    assert torch.equal(gradient, before)
    assert [module.training for module in model] == [True, False]


@pytest.fixture
def recipe(tiny_model_folder, question_file, tmp_path):
    def made(**changes):
        layer = {
            "output_dir": str(tmp_path / "runs"), "model": {"base": str(tiny_model_folder)},
            "data": {"dataset": str(question_file), "max_length": 128},
            "training": {
                "per_device_train_batch_size": 8, "warmup_steps": 0, "max_steps": 40, "scheduler": "constant",
                "eval_steps": 40, "save_steps": 40, "logging_steps": 20,
            },
            "evaluation": {"skip": True},
        }  # fmt: skip
        layer["training"] |= changes.pop("training", {})
        return compose({**layer, **changes}).recipe

    return made


@pytest.mark.thorough
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_on_the_tiny_model_it_trains_better_than_ten_times_more_or_less(recipe, adapter):
    chosen = {} if adapter == "none" else {"adapter": {"kind": "lora", "rank": 8}}
    search = api.find_lr(recipe(**chosen), steps=60, seeds=2)
    assert search.low < search.suggestion <= search.high
    losses = {}
    for factor in (0.1, 1, 10):
        rate = {"learning_rate": search.suggestion * factor}
        try:
            run = api.train(recipe(name=f"times-{factor}", training=rate, **chosen)).run
            losses[factor] = json.loads((run / "training.json").read_text())["validation_loss"]
        except api.TunesmithError:
            losses[factor] = math.inf  # it diverged
    assert losses[1] < losses[0.1]
    assert losses[1] < losses[10]


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_verb_leaves_nothing_behind(recipe, method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--base-model", recipe().model.base, "--dataset", recipe().data.dataset, "--max-length", "128"]
    options += ["--per-device-train-batch-size", "4", "--steps", "10", "--seeds", "2", "--lora"]
    if method == "dpo":
        pairs = tmp_path / "pairs.jsonl"
        rows = [{"prompt": f"what is {n}", "chosen": f"red {n}", "rejected": f"no {n}"} for n in range(30)]
        pairs.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        options[3] = str(pairs)
        options += ["--method", "dpo"]
    there, state = sorted(tmp_path.rglob("*")), torch.get_rng_state()
    done = CliRunner().invoke(app, ["find-lr", *options, "--html", str(tmp_path / "rates.html"), "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout.splitlines()[-1])
    assert len(facts["rates"]) == 10
    assert facts["rates"][0] == pytest.approx(1e-6)
    assert facts["rates"][-1] == pytest.approx(10)
    assert len(facts["sweeps"]) == 2
    assert facts["sweeps"][0]["losses"] != facts["sweeps"][1]["losses"], "each seed is a start of its own"
    assert sorted(tmp_path.rglob("*")) == sorted([*there, tmp_path / "rates.html"])
    assert torch.equal(torch.get_rng_state(), state)
    told = (tmp_path / "rates.html").read_text(encoding="utf-8")
    assert "<polyline" in told
    assert "http" not in told.replace("http-equiv", "")


def test_a_sweep_with_a_trainer_uses_each_rate_and_puts_the_model_back(tiny_model_folder):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    rows = Dataset.from_list(
        [{"input_ids": [n, n + 1, n + 2], "labels": [n, n + 1, n + 2]} for n in range(40)]
    )
    settings = TrainingArguments(
        output_dir="unused", max_steps=12, learning_rate=1e-6, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=rows)
    rates, used = exponential(1e-6, 1e-1, 12), []
    log = trainer.log

    def logged(logs, *args, **kwargs):
        used.append(logs.get("learning_rate"))
        log(logs, *args, **kwargs)

    trainer.log = logged
    one = swept(trainer, rates, seed=0, measure="loss")
    assert len(one.losses) == 12
    assert [r for r in used if r is not None][:12] == pytest.approx(list(rates), rel=0.01)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_the_page_and_the_chart_show_the_suggestion():
    rates = exponential(1e-5, 1.0, 50)
    search = found(rates, [sweep(quadratic([1.0, 3.0], seed), rates, seed=seed) for seed in range(2)])
    told = page(search, "Rates <for> x")
    assert "Rates &lt;for&gt; x" in told
    assert f"Learning rate {search.suggestion:.1e}" in told
    assert sum("<- suggested" in line for line in chart(search)) == 1


@pytest.mark.parametrize(
    ("lowest", "up_to", "stops"),
    [(1.9, 3.9, False), (1.9, 4.1, True), (1.0, 4.9, False), (1.0, 5.1, True), (0.2, 7.3, False), (0.2, 7.5, True)],
)  # fmt: skip
def test_a_sweep_stops_beyond_both_limits(lowest, up_to, stops):
    """From losses of 2: beyond 4, twice that, and beyond 2.3, 5 and 7.4, three times the fall above 2."""
    watching = Divergence()
    assert not any(watching.seen(loss) for loss in [2.0] * 8 + [lowest] * 60)
    assert any(watching.seen(up_to) for _ in range(60)) == stops


def test_the_page_says_that_a_sweep_stops_beyond_both_limits():
    text = (Path(__file__).parents[2] / "docs" / "find-lr.md").read_text(encoding="utf-8")
    said = " ".join(text.split())
    assert "by as much again and by three times what it had fallen, whichever is more" in said
