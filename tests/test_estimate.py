"""What a run takes, before it starts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tunesmith import api, devices
from tunesmith import estimate as estimating
from tunesmith.compose import compose
from tunesmith.errors import OutOfResources
from tunesmith.evaluation.report import write_report


@pytest.fixture
def recipe(tiny_model_folder, question_file, tmp_path):
    def made(**changes):
        settings = {
            "output_dir": str(tmp_path / "runs"), "name": "planned", "model": {"base": str(tiny_model_folder)},
            "data": {"dataset": str(question_file), "max_length": 256}, "evaluation": {"skip": True},
            "training": {"max_steps": 2},
        }  # fmt: skip
        for name, section in changes.items():
            settings[name] = {**settings.get(name, {}), **section}
        return compose(settings).recipe

    return made


def planned(recipe, **options):
    return api.plan(recipe, **options)[0].estimate


def parameters(folder):
    from transformers import AutoModelForCausalLM

    return sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())


def test_parts_are_the_models_own(recipe, tiny_model_folder):
    count = parameters(tiny_model_folder)
    full = planned(recipe())
    training = full.stages["training"]
    assert 0 <= training["weights"] - 4 * count < 2000  # tables of positions
    assert training["optimizer"] == 8 * count
    assert full.stages["updating"]["gradients"] == 4 * count
    assert training["process"] == pytest.approx(devices.resident(), rel=0.3)
    assert full.disk["final_model"] == 4 * count
    lora = planned(recipe(adapter={"kind": "lora"}))
    assert lora.stages["training"]["optimizer"] == 2 * lora.disk["final_model"] < 8 * count
    assert lora.stages["training"]["weights"] == training["weights"] + lora.disk["final_model"]


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo", "cpo", "reward"])
def test_every_method_is_traced(recipe, method, tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"what is {n}", "chosen": f"yes {n}", "rejected": f"no no {n}"} for n in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = planned(recipe(method={"kind": method}, data={"dataset": str(file)}))
    assert not found.notes
    weights, trained = found.stages["training"]["weights"], found.stages["updating"]["gradients"]
    # a reference that is a copy is there twice
    assert weights >= (2 if method in ("dpo", "kto") else 1) * trained
    assert found.flops_per_step > 6 * trained / 4


def test_a_device_that_is_not_here(recipe):
    asked = recipe(training={"max_steps": 2, "mixed_precision": "bf16"})
    plan, _ = api.plan(asked, device="h100")
    assert (plan.device, plan.mixed_precision) == ("cuda", "bf16")
    found = plan.estimate
    assert found.device == "h100-80gb"
    assert found.capacity == 81_559 * 2**20
    assert "an estimate" in found.basis
    assert not found.missing
    assert found.largest_batch > found.micro_batch
    assert "process" not in found.stages["training"]


def test_micro_steps_are_measured_here(recipe):
    found = planned(recipe(training={"max_steps": 2, "warmup_steps": 0}), measured=True)
    assert "two measured micro-steps" in found.basis
    assert 1e-3 < found.seconds_per_step < 5
    assert found.largest_batch >= 4


def test_more_rows_and_longer_ones_take_more(recipe):
    small, large = (planned(recipe(training={"per_device_train_batch_size": n})) for n in (1, 8))

    def held(found):
        return sum(found.stages["training"][part] for part in ("activations", "head"))

    assert 5 * held(small) < held(large) < 9 * held(small)


def test_what_does_not_fit_says_by_how_much_and_what_to_change(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "resident", lambda: 10**8)  # the tests' own grows meanwhile
    asked = recipe(training={"per_device_train_batch_size": 32})
    whole = planned(asked)
    least = planned(recipe(training={"per_device_train_batch_size": 1}))
    room = (whole.peak + least.peak) // 2
    here = devices.here
    shrunk = lambda kind: replace(here(kind), memory=room)  # noqa: E731
    monkeypatch.setattr(devices, "here", shrunk)
    found = planned(asked)
    assert found.missing == found.peak - room > 0
    assert 1 <= len(found.remedies) <= 3
    first = found.remedies[0]
    assert first.fits
    assert first.peak <= room
    assert "one row per pass" in first.change
    assert "--per-device-train-batch-size 1" in first.flags
    from tunesmith import cli

    flags = {word for remedy in found.remedies for word in remedy.flags.split() if word.startswith("--")}
    assert flags <= {*cli.FLAGS, "--set", "--lora", "--qlora"}
    told = found.warning()
    assert estimating.size(found.missing) in told
    assert first.sentence() in told
    monkeypatch.setattr(estimating, "MARGIN", 0.0)
    with pytest.raises(OutOfResources) as error:
        api.train(asked)
    assert estimating.size(found.missing) in str(error.value) or "does not fit" in str(error.value)
    assert "--per-device-train-batch-size 1" in str(error.value)
    assert not (tmp_path / "runs/planned/checkpoints").exists()


@pytest.mark.parametrize(("over", "stops"), [(0.08, False), (0.24, False), (0.26, True)])
def test_a_run_is_tried_where_it_misses_by_up_to_a_quarter(over, stops):
    held = {"training": {"weights": int((1 + over) * 10**9)}}
    remedies = tuple(estimating.Remedy(f"change {n}", f"--flag {n}", n * 10**8, fits=True) for n in (1, 2, 3))
    found = replace(
        estimating.unknown(devices.DEVICES["t4"], ValueError("x")),
        stages=held,
        capacity=10**9,
        remedies=remedies,
    )
    if not stops:
        found.check()
        assert f"{estimating.size(found.missing)} too much" in found.warning()
        return
    with pytest.raises(OutOfResources) as error:
        found.check()
    for said in ("260 MB", "26%", "change 1 (--flag 1): 100 MB", "change 2", "change 3"):
        assert said in str(error.value)


def test_what_was_traced_is_not_traced_again(recipe, monkeypatch):
    first = planned(recipe())
    monkeypatch.setattr(estimating, "_traced", None)
    again = planned(recipe(training={"max_steps": 7, "learning_rate": 1e-4}))
    assert again.stages["updating"]["gradients"] == first.stages["updating"]["gradients"]
    monkeypatch.undo()
    changed = planned(recipe(training={"per_device_train_batch_size": 2}))
    assert changed.stages["training"]["activations"] != first.stages["training"]["activations"]


def test_a_run_says_at_its_end_how_far_the_plan_was_off(recipe):
    asked = recipe()
    run = api.train(asked).run
    kept = json.loads((run / "plan.json").read_text())
    truth = kept["truth"]
    assert truth["peak_memory"] > kept["estimate"]["stages"]["training"]["weights"]
    expected = kept["estimate"]["peak"] / truth["peak_memory"] - 1
    assert truth["memory_error"] == pytest.approx(expected, abs=1e-3)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [e for e in events if e.get("name") == "plan and truth" and "planned" in e["reason"]]
    assert "plan and truth" in write_report(run).read_text()


def test_planning_draws_no_random_numbers(recipe):
    import random

    import numpy as np
    import torch

    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    planned(recipe(adapter={"kind": "lora"}), measured=True)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
