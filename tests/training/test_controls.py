"""What the plain Trainer does with the faults that the other tests put in: each of them bites there.

Thorough, for they say nothing of tunesmith: that a fault which our tests put in is one. Kills are `scripts/nightly
--plain`; flipped bits, missing files and NaN stand beside the tests of the same faults.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoints import plain, same, traced_save, trainer_of, weights
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from tunesmith.recipe import Recipe
from tunesmith.training.run import Run, create

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


class Dead(TrainerCallback):
    """A tracker whose server does not answer."""

    def on_log(self, args, state, control, **kwargs):
        raise ConnectionError("api.example.com does not answer")


def test_a_tracker_that_dies_ends_the_run(run, tiny_model_folder):
    """The first word to it is the last of the run, here at step 3."""
    trainer = plain(run, tiny_model_folder)
    trainer.add_callback(Dead())
    with pytest.raises(ConnectionError):
        trainer.train()
    assert trainer.state.global_step == 3


def test_with_a_hub_that_is_down_it_does_not_begin(run, tiny_model_folder, monkeypatch):
    class Down:
        def create_repo(self, *args, **options):
            raise ConnectionError("hub does not answer")

    monkeypatch.setattr("transformers.trainer.hf_api", lambda *args: Down())
    with pytest.raises(ConnectionError):
        trainer_of(run, tiny_model_folder, Trainer, push_to_hub=True, hub_model_id="me/mine")


def test_a_clock_that_was_put_back_costs_the_newest_checkpoint(run, tiny_model_folder, monkeypatch):
    """Which checkpoints are old is read from the times of their folders: what was just written is deleted."""
    from transformers import trainer_utils

    def rotate(output_dir, **options):
        newest = Path(output_dir) / "checkpoint-4"
        if newest.is_dir():  # as the system writes it where the clock stands a year earlier
            os.utime(newest, (0, newest.stat().st_mtime - 365 * 86400))
        trainer_utils.rotate_checkpoints(output_dir, **options)

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", rotate)
    trainer = trainer_of(run, tiny_model_folder, Trainer, save_total_limit=2)
    assert trainer.train().global_step == 4
    assert sorted(p.name for p in run.staging.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_that_was_moved_still_finds_its_best_model(run, tmp_path, tiny_model_folder, moved):
    """A fault that does it no harm: the best checkpoint's place is an absolute one, and is looked for again."""

    def measured(place, steps):
        trainer = trainer_of(Run(place), tiny_model_folder, Trainer, steps=steps)
        trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy("steps"), 1
        # The first is made the best one: of losses that fall, the highest.
        trainer.args.load_best_model_at_end, trainer.args.metric_for_best_model = True, "eval_loss"
        trainer.args.greater_is_better = True
        trainer.eval_dataset = trainer.train_dataset
        return trainer

    measured(run.path, 4).train()
    place = run.path
    if moved:
        place = Path(shutil.move(run.path, tmp_path / "elsewhere"))
    trainer = measured(place, 5)
    trainer.train(resume_from_checkpoint=True)
    best = weights(Run(place).staging / "checkpoint-1")
    tuned = {name: value for name, value in trainer.model.state_dict().items() if name in best}
    assert same(tuned, best)


def test_a_folder_that_became_read_only_ends_it_by_a_bare_error(run, tiny_model_folder, monkeypatch):
    """It ends as ours does; the error names no checkpoint to go on from and no remedy."""
    real = os.makedirs

    def makedirs(name, *args, **options):
        if str(name).endswith("checkpoint-3"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(name))
        return real(name, *args, **options)

    monkeypatch.setattr(os, "makedirs", makedirs)
    with pytest.raises(OSError, match="Read-only") as error:
        plain(run, tiny_model_folder).train()
    assert "checkpoint-2" not in str(error.value)


def test_a_full_disk_leaves_a_part_that_it_cannot_start_from(run, tiny_model_folder):
    """CKPT-01: after room was made the run is stuck, though the checkpoint before is whole."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = plain(run, tiny_model_folder)
    trainer.add_callback(At(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))))
    try:
        with pytest.raises(Exception):  # noqa: B017  torch's, Rust's or Python's
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert (run.staging / "checkpoint-4").is_dir()
    with pytest.raises(Exception) as error:
        trainer_of(run, tiny_model_folder, Trainer, steps=6).train(resume_from_checkpoint=True)
    assert "checkpoint-3" not in str(error.value)


def test_sigkill_at_some_write_of_a_save_gets_it_stuck(run, tiny_model_folder):
    """RES-04, by strace as for ours: k = 1, 2, ... until one leaves a run that does not start."""
    if not shutil.which("strace"):
        pytest.skip("strace is not here")
    trainer = plain(run, tiny_model_folder)
    trainer.train()
    for number in range(1, 200):
        shutil.rmtree(run.staging / "checkpoint-4", ignore_errors=True)
        code, _ = traced_save(trainer, "write", f"signal=SIGKILL:when={number}")
        if code != -signal.SIGKILL:
            pytest.fail(f"no write of {number} got it stuck")
        try:
            trainer_of(run, tiny_model_folder, Trainer, steps=4).train(resume_from_checkpoint=True)
        except Exception:
            assert (run.staging / "checkpoint-3" / "trainer_state.json").is_file(), "the one before is whole"
            return


def test_memory_of_this_machine_that_runs_out_ends_the_run(run, tiny_model_folder):
    """MEM-02, by RLIMIT_AS as for ours: no smaller pass is tried."""
    trainer = plain(run, tiny_model_folder)
    trainer.train()
    again = trainer_of(run, tiny_model_folder, Trainer, steps=5)
    row = [5 + n for n in range(96)]
    again.train_dataset = [{"input_ids": row, "labels": row}] * 2048
    again._train_batch_size = 2048
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + 60 * 2**20, hard))
        with pytest.raises((RuntimeError, MemoryError), match=r"(?i)memory|alloc"):
            again.train()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
