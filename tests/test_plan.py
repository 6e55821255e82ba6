"""Steps, warm-up and precision, counted by hand."""

from __future__ import annotations

import re

import pytest

from tunesmith import plan as planning
from tunesmith.errors import DataError, MissingExtra, OutOfResources
from tunesmith.recipe import Model, Training


def resolve(training: Training, *, examples: int = 100, adapter: str = "full", validation: int = 10):
    return planning.resolve(
        training, Model(), adapter_kind=adapter, lengths=[10] * examples, num_validation=validation
    )


def reasons(plan, name):
    return [d.reason for d in plan.decisions if d.name == name]


def test_steps_are_optimizer_steps():
    plan = resolve(
        Training(num_epochs=3, per_device_train_batch_size=8, gradient_accumulation_steps=4, warmup_steps=2)
    )
    # 100 examples are 13 batches of 8, which are 4 optimizer steps of 4 batches, the last one partial
    assert (plan.steps_per_epoch, plan.total_steps, plan.batch_size) == (4, 12, 32)
    assert plan.warmup_steps == 2
    assert plan.tokens_per_epoch == 1000


@pytest.mark.parametrize(
    ("max_steps", "total", "said"),
    [
        (5, 5, "max_steps, below {}"),
        (77, 77, "max_steps, 3 epochs and 2 steps in the place of {}"),
        (500, 500, "max_steps, 20 epochs in the place of {}"),
        (None, 75, "{}"),
    ],
)
def test_max_steps_wins_over_epochs_both_ways(max_steps, total, said):
    training = Training(
        num_epochs=3, per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=max_steps
    )
    plan = resolve(training)
    assert plan.total_steps == total
    assert reasons(plan, "total_steps") == [said.format("3 epochs of 25 steps of 4 examples")]


def test_a_warm_up_too_long_for_the_run_is_lowered_and_said():
    plan = resolve(Training(num_epochs=3, per_device_train_batch_size=4, warmup_steps=500))
    assert plan.warmup_steps == 7
    assert "500" in reasons(plan, "warmup_steps")[0]


@pytest.mark.parametrize("name", ["eval_steps", "save_steps"])
def test_intervals_longer_than_the_run_are_lowered_and_said(name):
    plan = resolve(Training(num_epochs=1, per_device_train_batch_size=4, **{name: 400}))
    assert getattr(plan, name) == 25
    assert "400" in reasons(plan, name)[0]
    assert not reasons(resolve(Training(max_steps=400, **{name: 400})), name)


@pytest.mark.parametrize(
    ("held_out", "said"),
    [
        ((9, 9, 500), "9 held-out items are too few to compare, at least 10 .* data.held_out, now 0.1"),
        ((10, 10, 500), None),
        ((50, 50, 4), "4 held-out items .* raise evaluation.max_items, now 4"),
        ((50, 3, None), "3 held-out groups are too few"),
        ((0, 0, None), "0 held-out items"),
    ],
)
def test_too_few_held_out_examples_are_told_before_the_start(held_out, said):
    items, groups, most = held_out
    plan = planning.resolve(
        Training(), Model(), adapter_kind="full", lengths=[9] * 50, num_validation=3,
        held_out=planning.HeldOut(items=items, groups=groups, share=0.1, max_items=most),
    )  # fmt: skip
    told = reasons(plan, "verdict")
    assert len(told) == bool(said)
    assert not said or re.match(said, told[0])


def test_the_constant_schedule_has_no_warm_up_and_says_so():
    plan = resolve(Training(scheduler="constant", warmup_steps=10))
    assert plan.warmup_steps == 0
    assert reasons(plan, "warmup_steps")


@pytest.mark.parametrize(
    ("epochs", "batch", "said"),
    [
        (1, 100, "1 epoch of 1 step of 100 examples"),
        (2.5, 1, "2.5 epochs of 100 steps of 1 example"),
    ],
)
def test_one_of_a_thing_is_named_in_the_singular(epochs, batch, said):
    training = Training(
        num_epochs=epochs, per_device_train_batch_size=batch, gradient_accumulation_steps=1, warmup_steps=0
    )
    assert reasons(resolve(training), "total_steps") == [said]


def test_per_epoch_intervals():
    plan = resolve(Training(per_device_train_batch_size=4, eval_steps="epoch", save_steps="epoch"))
    assert plan.eval_steps == plan.save_steps == 25


def test_without_validation_nothing_is_evaluated_and_it_is_said():
    plan = resolve(Training(), validation=0)
    assert plan.eval_steps is None
    [decision] = [d for d in plan.decisions if d.name == "eval_steps"]
    assert decision.value == "never"
    assert "no validation examples" in decision.reason


@pytest.mark.skipif(planning.device() != "cpu", reason="the rule is about CPUs")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_on_a_cpu_is_switched_off_aloud(precision):
    plan = resolve(Training(mixed_precision=precision))
    assert (plan.mixed_precision, plan.dtype) == ("no", "float32")
    assert precision in reasons(plan, "mixed_precision")[0]


def test_qlora_needs_a_device_and_a_package_that_have_four_bits(monkeypatch):
    monkeypatch.setattr(planning, "device", lambda: "cpu")
    assert "more time" in reasons(resolve(Training(), adapter="qlora"), "quantization")[0]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"tunesmith\[qlora\]"):
        resolve(Training(), adapter="qlora")
    monkeypatch.setattr(planning, "device", lambda: "mps")
    with pytest.raises(OutOfResources, match="CUDA") as error:
        resolve(Training(), adapter="qlora")
    assert "--lora" in str(error.value)


def test_no_examples():
    with pytest.raises(DataError, match="no example"):
        resolve(Training(), examples=0)
