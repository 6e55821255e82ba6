"""The checkpoint protocol: whole or not there, damage found, disk full at every write, and no pickle at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tunesmith.errors import MissingExtra, OutOfResources, RunError, TrainingDiverged
from tunesmith.recipe import Recipe
from tunesmith.training import checkpoints, state
from tunesmith.training.run import Run, create

DROPOUT = 0.1


def trainer_of(
    run: Run,
    base: Path,
    trainer_class=None,
    *,
    steps: int = 4,
    dtype=torch.float32,
    keep: int = 99,
    lora: bool = False,
    **options,
):
    """The plain Trainer on 16 rows with dropout, under the rules of checkpoints unless another class is given."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, attention_dropout=DROPOUT, dtype=dtype)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    draw = random.Random(1)
    rows = [[draw.randrange(3, 300) for _ in range(12)] for _ in range(16)]
    arguments = TrainingArguments(
        output_dir=str(run.staging), max_steps=steps, save_steps=1, per_device_train_batch_size=4, logging_steps=3,
        learning_rate=1e-2, report_to=[], disable_tqdm=True, seed=3, use_cpu=True, **options,
    )  # fmt: skip
    return (trainer_class or checkpoints.keeping_run_folder(Trainer, run, keep=keep))(
        model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows]
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory, tiny_model_folder):
    """A run of four steps, with a checkpoint of each."""
    run = create(Recipe(output_dir=str(tmp_path_factory.mktemp("written")), name="first"))
    trainer = trainer_of(run, tiny_model_folder)
    trainer.train()
    return run, trainer


@pytest.fixture
def run(written, tmp_path):
    """A copy of it, to be damaged."""
    return Run(Path(shutil.copytree(written[0].path, tmp_path / "copy")))


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_checkpoint_lists_itself_and_all_its_files(written):
    for folder in checkpoints.found(written[0]):
        content = checkpoints.manifest(folder)
        assert content["step"] == checkpoints.step_of(folder)
        assert content["files"].keys() == {p.name for p in folder.iterdir()} - {checkpoints.MANIFEST}
        assert {"model.safetensors", state.NUMBERS, state.TENSORS} <= content["files"].keys()
        assert content["environment"]["packages"]["torch"] == torch.__version__
        assert checkpoints.problem(folder) is None
    assert not written[0].staging.joinpath("checkpoint-4").exists()


def test_every_step_continues_to_the_bit_without_any_pickle(written, run, tiny_model_folder, monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("a pickle")

    for module, name in ((torch, "load"), (torch, "save"), (torch.serialization, "load")):
        monkeypatch.setattr(module, name, refused)
    straight = written[0].checkpoints / "checkpoint-step-4"
    for step in (1, 2, 3, 4):
        point = written[0].checkpoints / f"checkpoint-step-{step}"
        trainer = trainer_of(run, tiny_model_folder)
        result = trainer.train(resume_from_checkpoint=str(point))
        assert same(dict(trainer.model.named_parameters()), dict(written[1].model.named_parameters()))
        assert result.training_loss == written[1].state.log_history[-1]["train_loss"]
        assert trainer.state.global_step == 4
        assert same(
            load_file(run.checkpoints / "checkpoint-step-4" / state.TENSORS),
            load_file(straight / state.TENSORS),
        )
    names = [p.name for p in run.path.rglob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    assert names == []


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_weights_that_the_manifest_does_not_list_are_not_read(tmp_path, tiny_model_folder, lora, monkeypatch):
    """The Trainer takes weights by their names alone, and a whole model or a pickle before an adapter."""
    run = create(Recipe(output_dir=str(tmp_path), name="strangers"))
    straight = trainer_of(run, tiny_model_folder, steps=2, lora=lora)
    straight.train()
    point = run.checkpoints / "checkpoint-step-1"
    zeros = {name: torch.zeros_like(value) for name, value in straight.model.state_dict().items()}
    for name in ("pytorch_model.bin", "adapter_model.bin", "pytorch_model_fsdp.bin"):
        torch.save(zeros, point / name)
    (point / "sharded").mkdir()
    (point / "stray").mkdir()
    for name in ("model.safetensors", "stray/adapter_model.safetensors"):
        if not (point / name).exists():
            save_file({k: v.clone() for k, v in zeros.items()}, point / name)
    if lora:
        shutil.copy(point / "adapter_config.json", point / "stray")
    assert checkpoints.choose(run, "checkpoint-step-1") == point
    assert checkpoints.choose(run, str(point)) == point
    with pytest.raises(RunError, match="no checkpoint '/elsewhere/checkpoint-step-1'"):
        checkpoints.choose(run, "/elsewhere/checkpoint-step-1")
    assert {e["message"].split()[0] for e in run.events() if e["kind"] == "warning"} >= {
        "checkpoint-step-1/pytorch_model.bin",
        "checkpoint-step-1/stray/adapter_model.safetensors",
    }
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was read"))
    again = trainer_of(run, tiny_model_folder, steps=2, lora=lora)
    again.train(resume_from_checkpoint=str(point))
    assert same(again.model.state_dict(), straight.model.state_dict())


@pytest.mark.parametrize("lost", ["optimizer", pytest.param("random", marks=pytest.mark.thorough)])
def test_what_the_state_holds_matters(written, run, tiny_model_folder, monkeypatch, lost):
    """The control: without a part of it the weights differ."""
    name = "restore_optimizer" if lost == "optimizer" else "set_randomness"
    monkeypatch.setattr(state, name, lambda *args: None)
    trainer = trainer_of(run, tiny_model_folder)
    torch.manual_seed(5)
    trainer.train(resume_from_checkpoint=str(run.checkpoints / "checkpoint-step-2"))
    assert not same(dict(trainer.model.named_parameters()), dict(written[1].model.named_parameters()))


@pytest.mark.slow
def test_optimizer_states_keep_their_own_type(run, tiny_model_folder):
    """torch brings them into the parameter's type when it loads them: float32 would become bfloat16."""
    trainer = trainer_of(run, tiny_model_folder, optim="adafactor", dtype=torch.bfloat16)
    trainer.train()
    before = trainer.optimizer.state_dict()
    found = {t.dtype for s in before["state"].values() for t in s.values() if isinstance(t, torch.Tensor)}
    assert torch.float32 in found
    again = trainer_of(run, tiny_model_folder, optim="adafactor", dtype=torch.bfloat16)
    again.create_optimizer_and_scheduler(4)
    state.restore_optimizer(again, state.read(run.checkpoints / "checkpoint-step-4"))
    for number, saved in before["state"].items():
        for name, value in again.optimizer.state_dict()["state"][number].items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == saved[name].dtype
                assert torch.equal(value, saved[name])


def test_any_state_comes_back_as_it_was(tmp_path):
    table = torch.arange(4, dtype=torch.uint8)
    tree = {
        "groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "params": [0, 1], "foreach": None}],
        0: {"state1": table, "qmap": table, "step": 7, "absmax": torch.tensor([float("inf")])},
        "big": 2**63, "nan": float("nan"), "half": torch.ones(2, dtype=torch.bfloat16),
    }  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(state.packed(tree, tensors, "s"))
    again = state.unpacked(json.loads(text), tensors)
    assert repr(again) == repr(tree)
    with pytest.raises(TypeError, match=r"s\.hook is a function"):
        state.packed({"hook": lambda: None}, {}, "s")


@pytest.mark.parametrize(
    "text",
    ["[]", "5", "{", '{"items": [["loop", 5]]}', '{"items": [[{"list": []}, 5]]}', '{"tensor": "x"}',
     '{"type": "load"}', '{"array": [[1], 2], "dtype": "int8"}', '{"quantized": "x", "parts": 5, "attributes": 5}'],
)  # fmt: skip
def test_a_state_of_strangers_is_refused_in_words(tmp_path, text):
    save_file({}, tmp_path / state.TENSORS)
    (tmp_path / state.NUMBERS).write_text(text)
    with pytest.raises(RunError, match="did not write"):
        state.read(tmp_path)


def test_states_of_several_tensors_in_one_come_back_as_they_were(monkeypatch):
    """torchao's, by a stand-in where it is not installed."""
    import sys
    import types

    class OptimState8bit(torch.Tensor):
        @staticmethod
        def __new__(cls, codes, scale, signed, dtype):
            return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype)

        def __init__(self, codes, scale, signed, dtype):
            self.codes, self.scale, self.signed = codes, scale, signed

        def __tensor_flatten__(self):
            return ["codes", "scale"], [self.signed, self.dtype]

        @classmethod
        def __tensor_unflatten__(cls, parts, attributes, size=None, stride=None):
            return cls(*parts.values(), *attributes)

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise AssertionError(func)  # nothing is to be computed with it

    package = types.ModuleType("torchao")
    package.optim = types.ModuleType("torchao.optim")
    module = types.ModuleType("torchao.optim.subclass_8bit")
    module.OptimState8bit = OptimState8bit
    for part in (package, package.optim, module):
        monkeypatch.setitem(sys.modules, part.__name__, part)
    one = OptimState8bit(torch.arange(6, dtype=torch.uint8), torch.rand(2), True, torch.bfloat16)
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(state.packed({"state": {0: {"exp_avg": one}}}, tensors, "s"))
    assert {name: t.dtype for name, t in tensors.items()} == {
        "s.state.0.exp_avg.codes": torch.uint8,
        "s.state.0.exp_avg.scale": torch.float32,
    }
    again = state.unpacked(json.loads(text), tensors)["state"][0]["exp_avg"]
    assert isinstance(again, OptimState8bit)
    assert (again.signed, again.dtype) == (True, torch.bfloat16)
    assert torch.equal(again.codes, one.codes)
    with pytest.raises(RunError, match="no tensor of the kind 'Evil'"):
        state.unpacked(json.loads(text.replace("OptimState8bit", "Evil")), tensors)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(MissingExtra, match="torchao"):
        state.unpacked(json.loads(text), tensors)


def flipped(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_every_flipped_bit_is_found(run):
    """A short dose; `scripts/nightly --flips` has more."""
    folder, draw = run.checkpoints / "checkpoint-step-4", random.Random(0)
    files = sorted(folder.iterdir())
    for number in range(150):
        path = files[number % len(files)]
        bit = draw.randrange(8 * path.stat().st_size)
        flipped(path, bit)
        assert checkpoints.problem(folder), (path.name, bit)
        flipped(path, bit)
    assert checkpoints.problem(folder) is None


def test_a_file_cut_anywhere_is_found_and_the_checkpoint_before_is_taken(run):
    folder = run.checkpoints / "checkpoint-step-4"
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        places = {0, 1, len(content) // 2, len(content) - 1, *range(512, len(content), 512)}
        for place in sorted(places):
            path.write_bytes(content[:place])
            wrong = checkpoints.problem(folder)
            assert wrong, (path.name, place)
        assert checkpoints.choose(run) == run.checkpoints / "checkpoint-step-3"
        assert run.events()[-1]["message"] == f"checkpoint-step-4 is damaged and was skipped: {wrong}"
        path.write_bytes(content)
    assert checkpoints.choose(run) == folder


def test_large_files_are_hashed_by_several_threads_to_the_same(run, monkeypatch):
    folder = run.checkpoints / "checkpoint-step-4"
    monkeypatch.setattr(checkpoints, "LARGE", 1)
    assert checkpoints.problem(folder) is None
    flipped(folder / state.TENSORS, 9)
    assert checkpoints.problem(folder) == f"{state.TENSORS} does not have the content that was written"


@pytest.mark.parametrize("damage", ["gone", "link", "outside", "folder is a file", "stranger"])
def test_what_else_may_have_become_of_a_checkpoint(run, damage, tmp_path):
    folder = run.checkpoints / "checkpoint-step-4"
    file = folder / "model.safetensors"
    expected = "checkpoint-step-3"
    match damage:
        case "gone":
            file.unlink()
        case "link":
            file.rename(tmp_path / "elsewhere")
            file.symlink_to(tmp_path / "elsewhere")
        case "outside":
            content = checkpoints.manifest(folder)
            content["files"]["../../recipe.yaml"] = content["files"].pop("model.safetensors")
            content.pop("manifest_sha256")
            (folder / checkpoints.MANIFEST).write_text(checkpoints._sealed(content))
        case "folder is a file":
            shutil.rmtree(folder)
            folder.write_text("not a folder")
        case "stranger":
            (folder / "optimizer.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
            expected = "checkpoint-step-4"
    assert checkpoints.choose(run).name == expected
    assert [e for e in run.events() if e["kind"] == "warning"]


STRANGE_LOGS = {
    "no JSON": "{",
    "no object": "[]",
    "levels without end": "[" * 100_000,
    "nothing in it": "{}",
    "a field that nobody knows": {"evil": 1},
    "another step": {"global_step": 3},
    "no interval": {"save_steps": 0},
    "an epoch in words": {"epoch": "one"},
    "a line that is none": {"log_history": [5]},
    "a validation that is no number": {"log_history": [{"step": 4, "eval_loss": "low"}]},
}


@pytest.mark.parametrize("text", STRANGE_LOGS.values(), ids=STRANGE_LOGS)
def test_a_log_that_the_trainer_did_not_write_is_no_checkpoint_s(run, text):
    """Its manifest fits: anybody can seal one. Without a log the Trainer would begin at step 0 with trained weights."""
    folder = run.checkpoints / "checkpoint-step-4"
    file = folder / checkpoints.LOG
    if isinstance(text, dict):
        text = json.dumps({**json.loads(file.read_text()), **text})
    content = checkpoints.manifest(folder)
    content.pop("manifest_sha256")
    file.write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    content["files"][checkpoints.LOG] = {"bytes": len(text), "sha256": digest}
    (folder / checkpoints.MANIFEST).write_text(checkpoints._sealed(content))
    assert checkpoints.LOG in (checkpoints.problem(folder) or "")
    assert checkpoints.choose(run).name == "checkpoint-step-3"
    content["files"].pop(checkpoints.LOG)
    (folder / checkpoints.MANIFEST).write_text(checkpoints._sealed(content))
    assert checkpoints.problem(folder) == f"{checkpoints.LOG} is no part of it"


def test_where_none_is_whole_nothing_starts_by_itself(run):
    for folder in checkpoints.found(run):
        flipped(folder / "config.json", 3)
    with pytest.raises(RunError, match=r"No checkpoint of .* is whole") as error:
        checkpoints.choose(run)
    assert "checkpoint-step-1: config.json" in error.value.found
    assert "--checkpoint start" in error.value.fix
    assert checkpoints.choose(run, "start") is None


def test_a_full_disk_leaves_the_former_checkpoint_and_no_part_of_the_new_one(run, tiny_model_folder):
    """Files may not grow beyond a limit, which fails each of the writes in turn; with room again the save is made."""
    last, former = (run.checkpoints / f"checkpoint-step-{step}" for step in (4, 3))
    shutil.rmtree(last)
    largest = max(p.stat().st_size for p in former.iterdir())
    trainer = trainer_of(run, tiny_model_folder)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    names = {p.name for p in run.checkpoints.iterdir()}
    trainer.args.save_strategy = trainer.args.save_strategy.__class__("no")
    trainer.train(resume_from_checkpoint=str(former))
    for part in range(16):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest * part // 16, hard))
            with pytest.raises(OutOfResources, match="step 4 could not be written") as error:
                trainer._save_checkpoint(trainer.model, None)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert "bytes are free" in error.value.found
        assert {p.name for p in run.checkpoints.iterdir()} == names, part
        assert list(run.staging.iterdir()) == [], part
        assert checkpoints.problem(former) is None, part
        trainer._save_checkpoint(trainer.model, None)
        assert checkpoints.choose(run) == last, part
        assert checkpoints.problem(last) is None, part
        shutil.rmtree(last)


def test_weights_that_are_no_numbers_are_not_saved(run, tiny_model_folder):
    trainer = trainer_of(run, tiny_model_folder, steps=1)
    trainer.train()
    with torch.no_grad():
        next(trainer.model.parameters())[0, 0] = float("inf")
    before = {p.name for p in run.checkpoints.iterdir()}
    trainer.state.global_step = 9
    with pytest.raises(TrainingDiverged, match="no longer numbers at step 9"):
        trainer._save_checkpoint(trainer.model, None)
    assert {p.name for p in run.checkpoints.iterdir()} == before


def test_rotation_deletes_only_what_is_surely_superfluous(run):
    for step in range(5, 9):
        shutil.copytree(run.checkpoints / "checkpoint-step-4", run.checkpoints / f"checkpoint-step-{step}")
    (run.checkpoints / "checkpoint-step-1" / checkpoints.PINNED).touch()
    (run.checkpoints / "checkpoint-step-3" / checkpoints.MANIFEST).unlink()
    (run.checkpoints / "my-checkpoint-step-9").mkdir()
    (run.checkpoints / "checkpoint-step-2.old").mkdir()
    (run.checkpoints / "notes").mkdir()
    run.write(f"best_model/{checkpoints.BEST}", {"step": 2, "eval_loss": 1.0})
    truncated = run.checkpoints / "checkpoint-step-8" / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-1])
    os.utime(
        run.checkpoints / "checkpoint-step-7", (0, 0)
    )  # the clock was put back: what is new is told by its step
    checkpoints.rotate(run, keep=1)
    left = {p.name.removeprefix("checkpoint-step-") for p in run.checkpoints.iterdir()}
    # 1 pinned, 2 the best, 3 and 8 not whole, 7 the newest that is; the rest is not ours.
    assert left == {"1", "2", "3", "7", "8", "my-checkpoint-step-9", "2.old", "notes"}


def test_a_kill_while_a_name_is_taken_again_leaves_a_checkpoint(run, monkeypatch):
    staging = run.staging / "checkpoint-4"
    shutil.copytree(run.checkpoints / "checkpoint-step-4", staging)
    real = Path.rename

    def killed(self, target):
        if self == staging:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.commit(staging, run.checkpoints / "checkpoint-step-4", {"step": 4})
    assert checkpoints.choose(run).name == "checkpoint-step-3"
    checkpoints.clean(run)
    assert not [p for p in run.checkpoints.iterdir() if p.name.startswith(".")]
    assert not run.staging.exists()


def test_what_is_written_now_counts_before_what_a_former_life_left(run):
    """A later checkpoint that was skipped as damaged looks whole by its sizes, and must not push out good ones."""
    flipped(run.checkpoints / "checkpoint-step-4" / "model.safetensors", 999)
    assert checkpoints.choose(run).name == "checkpoint-step-3"
    checkpoints.rotate(run, keep=1, written=3)
    assert {p.name for p in run.checkpoints.iterdir()} == {"checkpoint-step-3", "checkpoint-step-4"}
    assert checkpoints.choose(run).name == "checkpoint-step-3"


class Killed(BaseException):
    """What no handler of errors sees, as nothing sees a kill."""


@pytest.mark.slow
def test_a_kill_at_each_call_of_a_save_leaves_whole_checkpoints_only(run, tiny_model_folder, monkeypatch):
    """Every call that writes, flushes, renames or deletes is the last one in turn, rotation included."""
    trainer = trainer_of(run, tiny_model_folder, keep=1)
    shutil.rmtree(run.checkpoints / "checkpoint-step-4")
    trainer.args.save_strategy = trainer.args.save_strategy.__class__("no")
    trainer.train(resume_from_checkpoint=str(run.checkpoints / "checkpoint-step-3"))
    backup = shutil.copytree(run.checkpoints, run.path / "backup")
    calls, last = 0, 0

    def counting(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == last:
                raise Killed
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (Path, "write_text"),
        (Path, "rename"), (Path, "replace"), (shutil, "rmtree"), (state, "save_file"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, counting(getattr(owner, name)))
    survivors = []
    while True:
        calls, last = 0, last + 1
        at = last
        with contextlib.suppress(Killed):
            trainer._save_checkpoint(trainer.model, None)
        is_over, calls, last = calls < at, 0, -1
        checkpoints.clean(run)
        for folder in checkpoints.found(run):
            assert checkpoints.problem(folder) is None, (at, folder.name)
        survivors.append(checkpoints.step_of(checkpoints.choose(run)))
        assert not any(p.name.startswith(".") for p in run.checkpoints.iterdir())
        shutil.rmtree(run.checkpoints)
        shutil.copytree(backup, run.checkpoints)
        last = at
        if is_over:
            break
    assert len(survivors) > 20
    assert survivors == sorted(survivors), "the new one from its rename on"
    assert set(survivors) == {3, 4}


CALLS = (
    "write",
    "pwrite64",
    "fsync",
    "rename",
    "renameat",
    "renameat2",
    "unlink",
    "unlinkat",
    "rmdir",
    "mkdir",
    "sendfile",
    "copy_file_range",
    "openat",
)
"""System calls by which a save changes the disk, as Python's, torch's and Rust's libraries make them."""


def traced(work, said: Path, call: str, what: str) -> tuple[int, str]:
    """Some work in a process of its own whose system calls go wrong as strace says: its exit code and what it said."""
    import ctypes
    import subprocess
    import time

    child = os.fork()
    if not child:
        code = 1
        try:
            ctypes.CDLL(None).prctl(
                0x59616D61, ctypes.c_ulong(-1 & (2**64 - 1)), 0, 0, 0
            )  # anybody may trace it
            end = time.monotonic() + 20
            while "TracerPid:\t0" in Path("/proc/self/status").read_text():
                assert time.monotonic() < end, "nobody traces"
                time.sleep(0.005)
            work()
            code = 0
        except BaseException as error:
            with contextlib.suppress(OSError):
                said.write_text(f"{type(error).__name__}: {error}")
        os._exit(code)
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-p", str(child), "-e", f"trace={call}", "-e",
         f"inject={call}:{what}"],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    tracer.wait(20)
    found = said.read_text() if said.exists() else ""
    said.unlink(missing_ok=True)
    return code, found


def traced_save(trainer, call: str, what: str) -> tuple[int, str]:
    """A save whose system calls go wrong."""
    said = Path(trainer.args.output_dir).parent / "said"
    return traced(lambda: trainer._save_checkpoint(trainer.model, None), said, call, what)


@pytest.fixture
def before_the_last(run, tiny_model_folder):
    """A trainer that stands before its fourth save, of whose run only one checkpoint is to be kept."""
    if not shutil.which("strace"):
        pytest.skip("strace is not here")
    trainer = trainer_of(run, tiny_model_folder, keep=1)
    shutil.rmtree(run.checkpoints / "checkpoint-step-4")
    trainer.args.save_strategy = trainer.args.save_strategy.__class__("no")
    trainer.train(resume_from_checkpoint=str(run.checkpoints / "checkpoint-step-3"))
    return trainer, shutil.copytree(run.checkpoints, run.path / "backup")


@pytest.mark.thorough
@pytest.mark.parametrize("call", CALLS)
def test_sigkill_at_each_system_call_of_a_save_leaves_whole_checkpoints_only(run, before_the_last, call):
    """By strace, so that the calls of compiled libraries are among them; k = 1, 2, ... until a save is not hit."""
    trainer, backup = before_the_last
    survivors = []
    while True:
        code, _ = traced_save(trainer, call, f"signal=SIGKILL:when={len(survivors) + 1}")
        checkpoints.clean(run)
        for folder in checkpoints.found(run):
            assert checkpoints.problem(folder) is None, (call, len(survivors) + 1, folder.name)
        survivors.append(checkpoints.step_of(checkpoints.choose(run)))
        shutil.rmtree(run.checkpoints)
        shutil.copytree(backup, run.checkpoints)
        if code != -9:
            break
    assert code == 0
    assert survivors[-1] == 4, "the save that was not hit"
    if call in ("write", "fsync", "openat"):
        assert len(survivors) > 5, "the control: saves were hit"
    assert survivors == sorted(survivors), "the new one from its rename on"


@pytest.mark.thorough
@pytest.mark.parametrize("fault", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("call", ["write", "fsync", "rename", "mkdir"])
def test_a_disk_that_fails_at_each_call_from_one_on_is_told_and_leaves_the_former(
    run, before_the_last, call, fault
):
    trainer, backup = before_the_last
    hit = 0
    while True:
        code, said = traced_save(trainer, call, f"error={fault}:when={hit + 1}+")
        checkpoints.clean(run)
        for folder in checkpoints.found(run):
            assert checkpoints.problem(folder) is None, (call, hit + 1, folder.name)
        assert checkpoints.choose(run) is not None
        if code:
            hit += 1
            # Where nothing at all can be written, what is said of it cannot be either.
            assert said.startswith(("OutOfResources: ", "OSError: ")) or call == "write", said
        shutil.rmtree(run.checkpoints)
        shutil.copytree(backup, run.checkpoints)
        if not code:
            break
        assert hit < 500
    assert hit or call == "mkdir"


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk in memory of so many bytes, and gives its folder."""
    import subprocess

    mounted = []

    def mount(size: int) -> Path:
        place = tmp_path / f"disk-{size}"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)],
            capture_output=True,
            check=False,
        )
        if done.returncode:
            pytest.skip("no disk can be mounted here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=False)


@pytest.mark.thorough
@pytest.mark.parametrize("times", [1.5, 2.5, 3.1])
def test_a_disk_that_really_is_full_keeps_what_it_has(written, tiny_model_folder, small_disk, times):
    """A disk for so many checkpoints, of which each step writes one and none is deleted."""
    one = sum(p.stat().st_size for p in (written[0].checkpoints / "checkpoint-step-1").iterdir())
    run = create(Recipe(output_dir=str(small_disk(int(one * times) + 2**16)), name="full"))
    trainer = trainer_of(run, tiny_model_folder)
    with pytest.raises(OutOfResources, match="could not be written: there is no room") as error:
        trainer.train()
    assert "bytes are free" in error.value.found
    whole = checkpoints.found(run)
    assert 1 <= len(whole) <= times
    assert [checkpoints.problem(folder) for folder in whole] == [None] * len(whole)
    assert not [p for p in run.staging.iterdir() if p.name.startswith("checkpoint")]
    # The control: the plain Trainer leaves a part under a final name.
    shutil.rmtree(run.path)
    other = create(Recipe(output_dir=str(run.path.parent), name="plain"))
    with pytest.raises(Exception):  # noqa: B017
        plain(other, tiny_model_folder).train()
    names = sorted(other.staging.iterdir(), key=lambda p: int(p.name.rpartition("-")[2]))
    assert not (names[-1] / "trainer_state.json").exists(), "the newest one is not whole"


def test_files_are_flushed_before_their_checkpoint_has_its_name(run, monkeypatch):
    staging, said = run.staging / "checkpoint-9", []
    shutil.copytree(run.checkpoints / "checkpoint-step-4", staging)
    (staging / checkpoints.MANIFEST).unlink()
    fsync, rename = os.fsync, Path.rename
    name = lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda handle: (said.append(name(handle)), fsync(handle))[1])
    monkeypatch.setattr(Path, "rename", lambda s, t: (said.append(f"{s.name} -> {t.name}"), rename(s, t))[1])
    checkpoints.commit(staging, run.checkpoints / "checkpoint-step-9", {"step": 9})
    at = said.index("checkpoint-9 -> checkpoint-step-9")
    assert {p.name for p in (run.checkpoints / "checkpoint-step-9").iterdir()} - {
        checkpoints.MANIFEST
    } <= set(said[:at])
    assert f".{checkpoints.MANIFEST}" in "".join(said[:at])
    assert said[at - 1] == "checkpoint-9"
    assert said[at + 1] == "checkpoints"


def plain(run: Run, base: Path) -> Trainer:
    return trainer_of(run, base, Trainer)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("flip", marks=pytest.mark.slow),
        pytest.param("optimizer gone", marks=pytest.mark.thorough),
        pytest.param("half written", marks=pytest.mark.thorough),
    ],
)
def test_the_same_faults_are_no_faults_to_the_plain_trainer(tmp_path, tiny_model_folder, fault):
    """The control: without this module a damaged checkpoint is loaded in silence, or the run is stuck."""
    run = create(Recipe(output_dir=str(tmp_path), name="plain"))
    plain(run, tiny_model_folder).train()
    want = load_file(run.staging / "checkpoint-4" / "model.safetensors")
    shutil.rmtree(run.staging / "checkpoint-4")
    last = run.staging / "checkpoint-3"
    match fault:
        case "flip":
            flipped(last / "model.safetensors", 8 * (last / "model.safetensors").stat().st_size - 3)
        case "optimizer gone":
            (last / "optimizer.pt").unlink()
        case "half written":
            (last / "trainer_state.json").unlink()
    trainer = plain(run, tiny_model_folder)
    if fault == "half written":
        with pytest.raises((ValueError, OSError)):
            trainer.train(resume_from_checkpoint=True)
        return
    trainer.train(resume_from_checkpoint=True)
    got = load_file(run.staging / "checkpoint-4" / "model.safetensors")
    assert not same(got, want), "ended well, with other weights"
