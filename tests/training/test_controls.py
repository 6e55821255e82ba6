"""What the plain Trainer does with the faults that the other tests put in: each of them bites there.

Thorough, for they say nothing of tunesmith: that a fault which our tests put in is one. Kills are `scripts/nightly
--plain`; flipped bits, missing files and NaN stand beside the tests of the same faults.
"""

from __future__ import annotations

import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoints import plain, trainer_of
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from tunesmith.recipe import Recipe
from tunesmith.training.run import create

pytestmark = pytest.mark.thorough


@pytest.fixture
def run(tmp_path):
    return create(Recipe(output_dir=str(tmp_path), name="plain"))


def last(run):
    return load_file(run.staging / "checkpoint-4" / "model.safetensors")


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
def test_a_cut_file_ends_it_where_an_older_checkpoint_is_whole(run, tiny_model_folder, name):
    """CKPT-03: no falling back, and an error that names no remedy."""
    plain(run, tiny_model_folder).train()
    path = run.staging / "checkpoint-4" / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(Exception) as error:
        trainer_of(run, tiny_model_folder, Trainer, steps=6).train(resume_from_checkpoint=True)
    assert "checkpoint-3" not in str(error.value)


def test_a_changed_learning_rate_is_not_told(run, tiny_model_folder):
    """RES-09: the run goes on, with the old rate or the new one, and says neither."""
    plain(run, tiny_model_folder).train()
    again = trainer_of(run, tiny_model_folder, Trainer, steps=6)
    again.args.learning_rate = 0.5
    assert again.train(resume_from_checkpoint=True).global_step == 6


def test_half_the_rows_are_not_missed(run, tiny_model_folder):
    """RES-09: another data set is taken for the same one."""
    plain(run, tiny_model_folder).train()
    again = trainer_of(run, tiny_model_folder, Trainer, steps=6)
    again.train_dataset = again.train_dataset[:8]
    assert again.train(resume_from_checkpoint=True).global_step == 6


def test_two_at_once_write_into_one_folder(run, tiny_model_folder):
    """CONC-01: the second one starts in the middle of the first, and both end well."""
    first, second = plain(run, tiny_model_folder), plain(run, tiny_model_folder)
    first.add_callback(At(2, second.train))
    assert first.train().global_step == second.state.global_step == 4


def test_sigterm_saves_nothing(run, tiny_model_folder):
    """RES-06: in a process of its own, for it dies of it."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        trainer = trainer_of(run, tiny_model_folder, Trainer, steps=50)
        trainer.args.save_steps = 1000
        trainer.add_callback(At(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        trainer.train()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert not list(run.staging.glob("checkpoint-*"))


def test_memory_that_runs_out_once_ends_the_run(run, tiny_model_folder):
    """MEM-01."""
    trainer, seen = plain(run, tiny_model_folder), []

    def before(*given):
        seen.append(1)
        if len(seen) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.model.register_forward_pre_hook(before)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()


def test_automatic_batch_sizes_go_on_from_trained_weights(run, tiny_model_folder):
    """MEM-01: after memory ran out at step 3 it begins with step 0 again, but not with the weights of step 0."""
    pytest.importorskip("accelerate")
    trainer = trainer_of(run, tiny_model_folder, Trainer, auto_find_batch_size=True)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    seen, found = [], []

    def before(*given):
        seen.append(1)
        if len(seen) == 3:
            raise RuntimeError("CUDA out of memory.")
        if len(seen) == 4:
            found.append(any(not torch.equal(p, start[n]) for n, p in trainer.model.named_parameters()))

    trainer.model.register_forward_pre_hook(before)
    trainer.train()
    assert found == [True]
    assert trainer.state.global_step == 4


def test_evaluation_changes_training(run, tmp_path, tiny_model_folder):
    """RES-07: random numbers of validations come out of training's."""
    found = []
    for name, strategy in (("with", "steps"), ("without", "no")):
        own = create(Recipe(output_dir=str(tmp_path), name=name))
        trainer = trainer_of(own, tiny_model_folder, Trainer)
        trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy(strategy), 1
        trainer.eval_dataset = trainer.train_dataset[:4]
        trainer.train()
        found.append(load_file(own.staging / "checkpoint-4" / "model.safetensors"))
    one, other = found
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_token_is_written_in_the_clear(run):
    """SEC-08, CKPT-11: into a pickle, which push_to_hub uploads."""
    arguments = TrainingArguments(
        output_dir=str(run.staging), hub_token="hf_canary", report_to=[], use_cpu=True
    )
    model = torch.nn.Linear(1, 1)
    Trainer(model=model, args=arguments).save_model(str(run.staging / "saved"))
    assert b"hf_canary" in (run.staging / "saved" / "training_args.bin").read_bytes()


def test_a_template_without_limits_does_not_end():
    """SEC-05b: two loops are enough; ours is ended after two seconds of processor time."""
    import subprocess
    import sys

    code = (
        "from transformers.utils.chat_template_utils import _compile_jinja_template as made\n"
        "made('{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}').render()"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", code], timeout=20, check=False, capture_output=True)
