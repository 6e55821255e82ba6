"""`python -m tunesmith` and `accelerate launch -m tunesmith`: the same program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith import api, launch, ranks
from tunesmith.compose import compose
from tunesmith.errors import RecipeError, TunesmithError
from tunesmith.recipe import Local, Ray, Training
from tunesmith.training.run import Run

SEED_COMMAND = """train --task chat --config low_resource --lora --lora-rank 2 --mixed-precision no
--gradient-checkpointing --per-device-train-batch-size 2 --gradient-accumulation-steps 2 --max-length 128
--num-workers 0 --num-epochs 1 --max-steps 4 --learning-rate 1e-4 --eval-steps 2 --save-steps 2
""".split()  # noqa: SIM905


LAUNCHERS = (*ranks.WORLD_SIZES, *ranks.WORLD_SIZES.values(), launch.PRECISION, ranks.RENDEZVOUS)
"""Variables that launchers set."""


@pytest.fixture
def alone(monkeypatch):
    """An environment as without any launcher."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def recipe(tiny_model_folder, question_file, tmp_path):
    return compose(
        {
            "model": {"base": str(tiny_model_folder)}, "data": {"dataset": str(question_file), "max_length": 128},
            "output_dir": str(tmp_path / "runs"), "training": {"max_steps": 1, "mixed_precision": "no"},
            "evaluation": {"skip": True},
        }
    ).recipe  # fmt: skip


@pytest.mark.parametrize("name", ranks.WORLD_SIZES)
def test_several_processes_are_refused_before_anything_is_written(alone, recipe, tmp_path, name):
    """Of what one process does; training is shared."""
    alone.setenv(name, "2")
    for verb in (lambda: api.evaluate("tiny"), lambda: api.find_lr(recipe), lambda: api.self_check(recipe)):
        with pytest.raises(TunesmithError, match="one process") as error:
            verb()
        assert "Only `train` and `resume`" in "\n".join(error.value.lines())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("size", ["1", ""])
def test_one_process_may_be_launched(alone, size):
    alone.setenv("WORLD_SIZE", size)
    launch.require_one_process()


def test_the_recipe_decides_on_precision_and_says_so(alone):
    assert launch.settle(Training()) == []
    alone.setenv(launch.PRECISION, "bf16")
    assert launch.settle(Training(mixed_precision="bf16")) == []
    [note] = launch.settle(Training())
    assert "--mixed-precision bf16" in note
    assert os.environ[launch.PRECISION] == "no"


def test_a_run_keeps_what_the_launcher_wanted(alone, recipe):
    alone.setenv(launch.PRECISION, "bf16")
    run = Run(api.train(recipe).run)
    assert any("accelerate is set to" in e.get("message", "") for e in run.events() if e["kind"] == "warning")


def test_one_process_where_several_were_asked_for_is_said(alone):
    """What `accelerate launch --cpu --num_processes 2` sets, which starts one process."""
    alone.setenv(launch.PRECISION, "no")
    assert launch.settle(Training()) == []
    alone.setenv(ranks.RENDEZVOUS, "127.0.0.1")
    [note] = launch.settle(Training())
    assert "asked for several processes and started one" in note
    alone.setenv(launch.PRECISION, "bf16")
    assert len(launch.settle(Training())) == 2
    alone.setenv("WORLD_SIZE", "1")
    assert launch.settle(Training(mixed_precision="bf16")) == []


@pytest.mark.parametrize(("size", "rank", "waits"), [("2", "1", True), ("2", "0", False), ("1", "1", False)])
def test_only_the_first_process_speaks_at_once(alone, monkeypatch, size, rank, waits):
    waited = []
    monkeypatch.setattr(launch.time, "sleep", waited.append)
    launch.let_the_first_speak()
    for name, number in ranks.WORLD_SIZES.items():
        alone.setenv(name, size)
        alone.setenv(number, rank)
        launch.let_the_first_speak()
        alone.delenv(name)
        alone.delenv(number)
    assert waited == [launch.PATIENCE] * (len(ranks.WORLD_SIZES) if waits else 0)


def _launched(program, arguments, *, folder, model, data):
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHERS}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [
        *program, *arguments, "--base-model", str(model), "--dataset", str(data), "--output-dir", str(folder),
        "--json",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


ACCELERATE = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu"]


def test_accelerate_reads_the_documented_command_as_a_module():
    """What `accelerate launch -m tunesmith train ...` hands over is what `python -m tunesmith` gets."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    known = ["--cpu", "--num_machines", "1", "--num_processes", "1"]
    known += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    args = launch_command_parser().parse_args([*known, "-m", "tunesmith", *SEED_COMMAND])
    command, _ = prepare_simple_launcher_cmd_env(args)
    assert command == [sys.executable, "-m", "tunesmith", *SEED_COMMAND]


@pytest.mark.slow
@pytest.mark.thorough
def test_accelerate_launch_trains_resumes_and_leaves_the_documented_layout(
    tiny_model_folder, question_file, tmp_path
):
    where = {"folder": tmp_path / "runs", "model": tiny_model_folder, "data": question_file}
    small = ["--warmup-steps", "0", "--max-new-tokens", "4", "--set", "evaluation.resamples=100"]
    program = [*ACCELERATE, "--num_processes", "1", "-m", "tunesmith"]
    done = _launched(program, [*SEED_COMMAND, *small], **where)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    run = Path(result["run"])
    assert run == tmp_path / "runs" / "chat_questions"
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"):
        assert (run / "final_model" / name).is_file()
    assert (run / "best_model").is_dir()
    assert {p.name for p in (run / "checkpoints").iterdir()} >= {"checkpoint-step-2", "checkpoint-step-4"}
    names = {c["metric"] for c in result["comparisons"]}
    assert {"response_diversity", "vocabulary_use", "bigram_diversity"} <= names
    assert "different answers" in (run / "report.html").read_text(encoding="utf-8")
    steps = [e["step"] for e in Run(run).events() if e["kind"] == "evaluation"]
    assert steps == [2, 4]
    for name in ("training.json", "status.json"):  # as if it had been stopped after its checkpoints
        (run / name).unlink()
    # Continued from the checkpoint that is named, in the plain way of starting it.
    again = _launched(
        [sys.executable, "-m", "tunesmith"], [*SEED_COMMAND, *small, "--resume", "checkpoint-step-2"], **where
    )
    assert again.returncode == 0, again.stderr
    assert [e["step"] for e in Run(run).events() if e.get("state") == "training"] == [0, 2]
    (run / "status.json").unlink()
    missing = _launched(program, [*SEED_COMMAND, *small, "--resume", "checkpoint-step-1000"], **where)
    assert missing.returncode != 0
    assert "checkpoint-step-4" in missing.stderr + missing.stdout


@pytest.mark.thorough
def test_two_processes_end_with_the_reason(tiny_model_folder, question_file, tmp_path):
    where = {"folder": tmp_path / "runs", "model": tiny_model_folder, "data": question_file}
    # What accelerate starts on two GPUs.
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "tunesmith"]
    done = _launched(program, [*SEED_COMMAND, "--method", "kto"], **where)
    assert done.returncode != 0
    assert done.stderr.count("The method 'kto' is trained in one process here, and 2 are asked for.") == 1
    assert len(done.stdout.strip().splitlines()) == 1, "and one JSON object"
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.thorough
def test_accelerate_on_a_cpu_trains_in_one_process_and_says_so(tiny_model_folder, question_file, tmp_path):
    where = {"folder": tmp_path / "runs", "model": tiny_model_folder, "data": question_file}
    program = [*ACCELERATE, "--num_processes", "2", "-m", "tunesmith"]
    done = _launched(
        program, [*SEED_COMMAND, "--warmup-steps", "0", "--set", "evaluation.skip=true"], **where
    )
    assert done.returncode == 0, done.stderr
    events = Run(tmp_path / "runs" / "chat_questions").events()
    assert any("started one" in e["message"] for e in events if e["kind"] == "warning")
    assert [e["step"] for e in events if e["kind"] == "evaluation"] == [2, 4], "trained once"


def test_rows_that_accelerate_would_cut_over_processes_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "1")
    launch.settle(Training())
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with pytest.raises(RecipeError, match="each process computes whole rows") as error:
        launch.settle(Training())
    assert "context parallelism" in error.value.found


def test_a_run_that_its_launcher_s_settings_refuse_is_as_before(alone, recipe, tmp_path):
    """A fresh one leaves no folder, and one that would go on keeps how it ended."""
    run = Run(api.train(recipe).run)
    (run.path / "training.json").unlink()
    run.write("status.json", {"state": "interrupted"})
    alone.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    alone.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with pytest.raises(RecipeError, match="each process computes whole rows"):
        api.resume(run.path)
    assert run.state() == "interrupted"
    with pytest.raises(RecipeError, match="each process computes whole rows"):
        api.train(recipe.model_copy(update={"name": "fresh"}))
    assert not (tmp_path / "runs/fresh").exists()


def test_how_many_processes_share_a_machine_is_the_launcher_s_word_or_said_to_be_assumed(alone):
    alone.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone.setenv("OMPI_COMM_WORLD_SIZE", "16")
    alone.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "4")
    assert launch.placed(Local()) == (16, 4, None)
    alone.delenv("OMPI_COMM_WORLD_LOCAL_SIZE")
    number, here, why = launch.placed(Local())
    assert (number, here, "all are taken to be on one machine" in why) == (16, 16, True)
    alone.delenv("OMPI_COMM_WORLD_SIZE")
    assert launch.placed(Local()) == (1, 1, None)
    number, here, why = launch.placed(Ray(workers=16, address="auto"))
    assert (number, here, "up to 8 are taken" in why) == (16, 8, True)
    assert launch.placed(Ray(workers=16)) == (16, 16, None)
