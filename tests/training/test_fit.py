"""What a recipe says of training is what the trainer is told."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from transformers import TrainingArguments

from tunesmith import plan as planning
from tunesmith.recipe import Model, Tracking, Training
from tunesmith.training.fit import arguments, quiet_libraries

GIVEN = Training(
    num_epochs=1, max_steps=70, learning_rate=3e-4, scheduler="cosine_with_restarts", warmup_steps=7,
    weight_decay=0.2, max_grad_norm=0.3, per_device_train_batch_size=3, per_device_eval_batch_size=5,
    gradient_accumulation_steps=6, gradient_checkpointing=True, eval_steps=11, save_steps=13, logging_steps=2,
    num_workers=4, seed=9,
)  # fmt: skip


@pytest.fixture
def told(tmp_path):
    plan = planning.resolve(GIVEN, Model(), adapter_kind="full", lengths=[10] * 2000, num_validation=9)
    return TrainingArguments(**arguments(plan, GIVEN, Tracking(), name="run", staging=tmp_path))


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("max_steps", "max_steps"),
        ("learning_rate", "learning_rate"),
        ("scheduler", "lr_scheduler_type"),
        ("warmup_steps", "warmup_steps"),
        ("weight_decay", "weight_decay"),
        ("max_grad_norm", "max_grad_norm"),
        ("per_device_train_batch_size", "per_device_train_batch_size"),
        ("per_device_eval_batch_size", "per_device_eval_batch_size"),
        ("gradient_accumulation_steps", "gradient_accumulation_steps"),
        ("gradient_checkpointing", "gradient_checkpointing"),
        ("eval_steps", "eval_steps"),
        ("save_steps", "save_steps"),
        ("logging_steps", "logging_steps"),
        ("num_workers", "dataloader_num_workers"),
        ("seed", "seed"),
    ],
)
def test_a_setting_of_the_recipe_reaches_the_trainer(told, field, name):
    assert getattr(told, name) == getattr(GIVEN, field)
    assert getattr(told, name) != getattr(TrainingArguments(), name), "and not by its own default"


@pytest.mark.parametrize(("precision", "fp16", "bf16"), [("fp16", True, False), ("bf16", False, True)])
def test_mixed_precision_reaches_the_trainer_where_there_is_a_gpu(
    monkeypatch, tmp_path, precision, fp16, bf16
):
    """What is asked of it; computing so needs CUDA."""
    monkeypatch.setattr(planning, "device", lambda: "cuda")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *a, **k: (8, 0))
    training = Training(mixed_precision=precision)
    plan = planning.resolve(training, Model(), adapter_kind="full", lengths=[10] * 2000, num_validation=9)
    told = arguments(plan, training, Tracking(), name="run", staging=tmp_path)
    assert (told["fp16"], told["bf16"], told["use_cpu"]) == (fp16, bf16, False)


def test_no_compiled_code_of_the_hub_is_run(tmp_path, monkeypatch):
    """bitsandbytes would fetch some through this package, were it there."""
    (tmp_path / "kernels.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    quiet_libraries()
    assert importlib.util.find_spec("kernels") is None
    with pytest.raises(ImportError):
        importlib.import_module("kernels")


def test_the_whole_is_told_by_the_second_and_third_step(monkeypatch):
    from types import SimpleNamespace

    from tunesmith.training import callbacks

    now, told = [0.0], []
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    pace = callbacks.Pace(lambda *found: told.append(found), tokens_per_step=100.0)
    state = SimpleNamespace(global_step=0, max_steps=10, num_input_tokens_seen=0)
    pace.on_train_begin(None, state, None)
    for seconds, tokens in ((9.0, 50), (1.0, 50), (3.0, 150), (7.0, 50)):
        pace.on_step_begin(None, state, None)
        now[0] += seconds
        state.global_step, state.num_input_tokens_seen = (
            state.global_step + 1,
            state.num_input_tokens_seen + tokens,
        )
        pace.on_step_end(None, state, None)
    # 4 s for 200 tokens, so 2 s for 100; 13 s are over after the third step, and of ten times 100 tokens 750 are left
    assert told == [(3, 2.0, 13.0 + 7.5 * 2.0)]
