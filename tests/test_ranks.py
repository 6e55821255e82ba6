"""Several processes that train one run: the same rows, the same losses, one writer, one end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tunesmith import api, launch, ranks
from tunesmith.compose import overlaid
from tunesmith.errors import RecipeError, RunError, TunesmithError
from tunesmith.plan import dealt
from tunesmith.recipe import DPO, Training
from tunesmith.training.order import Dealt
from tunesmith.training.run import Run, create

pytestmark = pytest.mark.usefixtures("unlaunched")

ONE_BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "num_epochs": 1}
LORA = {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.0}, "training": ONE_BY_ONE}
DPO_RECIPE = {"method": {"kind": "dpo"}}
REWARD = {"method": {"kind": "reward"}}
KINDS = {
    "full sft": {}, "lora sft": LORA, "full dpo": DPO_RECIPE, "lora dpo": {**LORA, **DPO_RECIPE},
    "full reward": REWARD, "lora reward": {**LORA, **REWARD}, "full seq2seq": {"method": {"kind": "seq2seq"}},
    "qlora sft": {**LORA, "adapter": {**LORA["adapter"], "kind": "qlora"}},
    "full sft checkpointed": {"training": {"gradient_checkpointing": True}},
    "lora dpo checkpointed": {**LORA, **DPO_RECIPE, "training": {**ONE_BY_ONE, "gradient_checkpointing": True}},
}  # fmt: skip
SHARES = " in shares"
KINDS |= {kind + SHARES: {**changes, "parallel": {"kind": "fsdp"}} for kind, changes in KINDS.items()}
CONTINUED = (
    "full sft",
    "lora reward",
    "qlora sft",
    "full dpo in shares",
    "lora sft in shares",
    "qlora sft in shares",
)
IN_CI = [
    f"{size} {method}{how}" for how in ("", SHARES) for size in ("full", "lora") for method in ("sft", "dpo")
]


@pytest.fixture
def pair_file(tmp_path) -> Path:
    path = tmp_path / "pairs.jsonl"
    colors = ("red", "blue", "green", "one", "two")
    rows = [
        {
            "prompt": f"what is the count of {i}",
            "chosen": f"{colors[i % 5]} {i}",
            "rejected": f"three {i % 7}",
        }
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def asked(few_steps, tiny_t5_folder, pair_file, tmp_path):
    """A recipe of a few steps in 1 process, with the model and the rows of its method."""

    def made(name: str, *changes, **training):
        method, own = overlaid(*changes).get("method", {}).get("kind", "sft"), {}
        if method in ("dpo", "reward"):
            own = {"data": {"dataset": str(pair_file)}}
        if method == "seq2seq":  # without dropout, which each process draws for its own rows
            base = Path(shutil.copytree(tiny_t5_folder, tmp_path / "t5", dirs_exist_ok=True))
            config = json.loads((base / "config.json").read_text())
            (base / "config.json").write_text(json.dumps({**config, "dropout_rate": 0.0}))
            own = {"model": {"base": str(base)}}
        return few_steps(name, own, *changes, **training)

    return made


def losses(run: Path, kind: str = "step") -> dict[int, float]:
    return {e["step"]: e["loss"] for e in Run(run).events() if e["kind"] == kind}


def unfinished(run: Path) -> None:
    for name in ("training.json", "status.json"):
        (run / name).unlink(missing_ok=True)


# Rows


@pytest.mark.parametrize(
    ("rows", "step", "batch", "processes"),
    [(41, 8, 2, 2), (41, 8, 2, 4), (3, 8, 2, 4), (16, 8, 4, 2), (9, 4, 1, 4), (7, 4, 1, 2), (1, 2, 1, 2), (5, 4, 2, 2)],
)  # fmt: skip
def test_a_step_has_the_rows_that_it_has_in_one_process(rows, step, batch, processes):
    order = [(7 * n + 3) % 97 for n in range(rows)]
    given = list(Dealt(order, step=step, batch=batch, processes=processes))
    assert len(given) == len(Dealt(order, step=step, batch=batch, processes=processes))
    batches = [given[n : n + batch] for n in range(0, len(given), batch)]
    assert len(batches) % processes == 0, "as many for each"
    places = [n // step for n in range(len(given))]
    for number in range(places[-1] + 1):
        own = [n for n, place in zip(given, places, strict=True) if place == number]
        assert sorted(n for n in own if n >= 0) == sorted(order[number * step : (number + 1) * step])
    assert batches[-processes][0] >= 0, "the first process never has nothing"
    assert all(-1 - n in order for n in given if n < 0)


@pytest.mark.parametrize(
    ("batch", "times", "processes", "own"),
    [(4, 2, 1, (4, 2)), (4, 2, 2, (4, 1)), (4, 2, 4, (2, 1)), (4, 3, 6, (2, 1)), (3, 5, 5, (3, 1)), (8, 3, 2, (6, 2))],
)  # fmt: skip
def test_every_process_takes_an_equal_share_in_batches_of_at_most_the_recipe_s_size(
    batch, times, processes, own
):
    given = Training(per_device_train_batch_size=batch, gradient_accumulation_steps=times)
    found = dealt(given, processes)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == own
    assert own[0] * own[1] * processes == batch * times


def test_rows_that_cannot_be_dealt_evenly_are_refused_with_what_fits():
    with pytest.raises(RecipeError, match="8 rows cannot be dealt evenly to 3 processes") as error:
        launch.check(Training(per_device_train_batch_size=4, gradient_accumulation_steps=2), 3)
    assert "multiple of 3, or start 1 or 2" in str(error.value)


def test_what_cannot_be_parted_is_refused_with_its_reason(asked):
    several = {"launch": {"kind": "accelerate", "processes": 2}}
    with pytest.raises(RecipeError, match="'kto' is trained in one process") as error:
        api.plan(asked("kto", several, {"method": {"kind": "kto"}}))
    assert "depends on the others of its batch" in str(error.value)
    from tunesmith.methods import METHODS

    assert METHODS["dpo"].alone(DPO()) is None
    assert "others of its batch" in METHODS["dpo"].alone(DPO(sft_weight=1.0))


@pytest.mark.parametrize("launcher", [False, True])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"parallel": {"kind": "fsdp"}, "training": {"eval_metrics": ["token_f1"]}},
            "has the whole model to ask",
        ),
        ({"method": {"kind": "dpo", "sft_weight": 1.0}}, "is trained in one process"),
    ],
)
def test_what_does_not_go_with_several_processes_is_refused_where_a_run_goes_on(
    asked, monkeypatch, changes, said, launcher
):
    """A run that one process began: with others than it has it would wait for answers that nobody gives."""
    recipe = asked("more", changes)
    run = create(recipe).path
    started = [monkeypatch.setattr(launch, "start", lambda *given: pytest.fail("processes were started"))]
    if launcher:  # launched together, and this is the first of them
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setattr(ranks, "dismiss", lambda: started.append("dismissed"))
    with pytest.raises(RecipeError, match=said):
        api.resume(run, processes=None if launcher else 2)
    assert launcher == ("dismissed" in started)


def test_the_plan_says_what_each_process_takes(asked):
    plan, _ = api.plan(asked("plan", {"launch": {"kind": "accelerate", "processes": 4}}))
    [told] = [d for d in plan.decisions if d.name == "processes"]
    assert (plan.processes, plan.batch_size, told.value) == (4, 12, 4)
    assert "1 × 3 examples of a step's 12" in told.reason
    assert "tokens a step" in told.reason


def test_a_row_weighs_the_same_in_a_batch_that_is_not_full(asked):
    """Of 27 pairs in steps of 12 the last step has 3, with batches of 2 the last of them has 1."""
    sizes = {
        "whole": {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1},
        "parted": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6},
    }
    whole, parted = (
        losses(api.train(asked(name, DPO_RECIPE, num_epochs=1, **size)).run) for name, size in sizes.items()
    )
    assert whole.keys() == parted.keys()
    assert whole == pytest.approx(parted, abs=1e-5)


# Processes


def test_one_process_is_asked_nothing_and_loads_nothing(monkeypatch):
    assert (ranks.count(), ranks.number(), ranks.is_first()) == (1, 0, True)
    assert ranks.shared({"a": 1}) == {"a": 1}
    assert ranks.summed([1.5, 2]) == [1.5, 2]
    assert ranks.gathered("x") == ["x"]
    assert ranks.any_of(True) is True
    with ranks.first() as mine, ranks.alone(), ranks.together("cpu"):
        assert mine
    ranks.tell("job", {})


def test_what_a_launcher_sets_is_hidden_from_libraries_and_comes_back(monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with ranks.alone():
        assert "WORLD_SIZE" not in os.environ
        assert "LOCAL_RANK" not in os.environ
        assert (ranks.count(), ranks.number()) == (4, 3)
        with ranks.alone():
            assert (ranks.count(), ranks.number()) == (4, 3)
    assert os.environ["LOCAL_RANK"] == "1"


def test_processes_without_a_place_to_meet_say_so(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(TunesmithError, match="no place to meet"):
        ranks._store.__wrapped__()


def test_words_reach_the_others_in_their_order_and_a_late_one_is_waited_for(monkeypatch):
    import torch.distributed as distributed

    store = distributed.HashStore()
    monkeypatch.setattr(ranks, "_store", lambda: store)
    monkeypatch.setattr(ranks, "_heard", {})
    monkeypatch.setattr(ranks, "count", lambda: 2)
    later = threading.Timer(0.3, lambda: store.set("job/0", json.dumps({"run": "x"})))
    later.start()
    assert ranks.job() == {"run": "x"}
    store.set("job/1", "null")
    assert ranks.job() is None
    assert ranks.complaint(patience=0.1) is None
    ranks.complain("no room")
    assert ranks.complaint() == "process 0: no room"


def failure(place, *, exitcode=1, name="<N/A>"):
    told = SimpleNamespace(exitcode=exitcode, signal_name=lambda: name)
    return SimpleNamespace(get_first_failure=lambda: (place, told))


def test_the_reason_of_an_end_is_that_of_the_process_that_ended_first():
    own = {
        "problem": "The disk is full.",
        "found": None,
        "fix": "Free space.",
        "exit_code": 3,
        "is_lost": False,
    }
    error = launch._why(failure(0, exitcode=3), {"error": own}, 2)
    assert (error.problem, error.exit_code) == ("The disk is full.", 3)
    lost = {**own, "is_lost": True, "found": "process 1: The memory is not enough."}
    error = launch._why(failure(1, exitcode=3), {"error": lost, "run": "runs/a"}, 2)
    assert "Process 1 of 2 ended with exit code 3" in error.problem
    assert "The memory is not enough" in error.found
    assert "tunesmith resume runs/a" in error.fix
    error = launch._why(failure(1, exitcode=-9, name="SIGKILL"), {"run": "runs/a"}, 2)
    assert "was ended by SIGKILL (which is how a system ends one when memory runs out)" in error.problem
    stopped = launch._why(failure(0, exitcode=130), {"error": {**own, "exit_code": 130}}, 2)
    assert stopped.exit_code == 130


def test_only_a_recipe_that_asks_for_it_starts_processes_and_a_started_one_none(asked, monkeypatch):
    several = asked("a", {"launch": {"kind": "accelerate", "processes": 3}}).launch
    assert launch.starts(several)
    assert not launch.starts(asked("b").launch)
    assert (launch.processes(several), launch.processes(asked("b").launch)) == (3, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,5")
    assert launch.processes(asked("c", {"launch": {"kind": "accelerate"}}).launch) == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.processes(several) == 2
    assert not launch.starts(several)


# Several of them

TRAINED = """
import json, sys
from pathlib import Path
from tunesmith import api
from tunesmith.recipe import Recipe
for given in json.loads(Path(sys.argv[1]).read_text()):
    api.train(Recipe.model_validate(given))
"""


def trained(recipes, tmp_path, processes) -> None:
    """Train some recipes one after the other in so many processes that torchrun starts."""
    (tmp_path / "trained.py").write_text(TRAINED)
    (tmp_path / "recipes.json").write_text(json.dumps([recipe.model_dump(mode="json") for recipe in recipes]))
    program = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*program, str(tmp_path / "trained.py"), str(tmp_path / "recipes.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, "".join(
        line for line in done.stderr.splitlines(keepends=True) if not re.match(r"(\[rank\d+\]:)?\[W", line)
    )


def same_as_one(asked, tmp_path, kinds, processes) -> None:
    trained([asked(f"{kind} in {processes}", KINDS[kind]) for kind in kinds], tmp_path, processes)
    alone: dict[str, Path] = {}
    for kind in kinds:
        several, plain = tmp_path / "runs" / f"{kind} in {processes}", kind.removesuffix(SHARES)
        if plain not in alone:
            alone[plain] = api.train(asked(plain, KINDS[plain])).run
        one = alone[plain]
        for what in ("step", "evaluation"):
            assert losses(several, what).keys() == losses(one, what).keys()
            assert losses(several, what) == pytest.approx(losses(one, what), abs=1e-5), (kind, what)
        assert len(losses(one)) >= 6
        assert_written_once(several, processes)
        events = {run: [e for e in Run(run).events() if e["kind"] == "step"] for run in (several, one)}
        assert [e["tokens"] for e in events[several]] == [e["tokens"] for e in events[one]]
        norms = [[e["grad_norm"] for e in events[run]] for run in (several, one)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4), "clipped by the norm of the whole gradient"
        if kind.endswith(SHARES):
            assert_in_shares(several, one, processes)
        if kind not in CONTINUED:
            continue
        # Continued in one process: at the same row, with the same numbers.
        unfinished(several)
        api.resume(several, checkpoint="checkpoint-step-4")
        assert losses(several) == pytest.approx(losses(one), abs=1e-5)
        assert [e["step"] for e in Run(several).events() if e.get("state") == "training"] == [0, 4]
        said = [e["message"] for e in Run(several).events() if e["kind"] == "warning"]
        assert any(f"the number of processes was {processes}, is 1" in message for message in said)


def assert_in_shares(run: Path, one: Path, processes: int) -> None:
    """A checkpoint is in shares and no pickle; the model at the end is whole, and that of one process."""
    from safetensors.torch import load_file

    for folder in (run / "checkpoints").iterdir():
        listed = set(json.loads((folder / "manifest.json").read_text())["files"])
        assert len([name for name in listed if name.startswith("sharded/")]) == processes
        assert {Path(name).suffix for name in listed} <= {".safetensors", ".json"}
    [told] = [e for e in Run(run).events() if e.get("name") == "sharding"]
    assert told["value"] == f"1/{processes} in each process"
    [mine], [its] = ([*(folder / "final_model").glob("*.safetensors")] for folder in (run, one))
    mine, its = load_file(mine), load_file(its)
    assert {name: t.shape for name, t in mine.items()} == {name: t.shape for name, t in its.items()}
    assert all(t.numel() for t in mine.values())
    assert max(float((t - its[name]).abs().max()) for name, t in mine.items()) < 1e-4
    for name in ("config.json", "adapter_config.json"):
        if (one / "final_model" / name).exists():
            written = [json.loads((folder / "final_model" / name).read_text()) for folder in (run, one)]
            for facts in written:
                facts["target_modules"] = sorted(facts.get("target_modules", ()))
            assert written[0] == written[1]


def assert_written_once(run: Path, processes: int) -> None:
    written = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    steps = [e["step"] for e in written if e["kind"] == "step"]
    assert steps == sorted(set(steps))
    for kind, name in (("state", "prepared"), ("state", "training"), ("state", "done")):
        assert sum(e["kind"] == kind and e.get("state") == name for e in written) == 1
    saved = [e["step"] for e in written if e["kind"] == "checkpoint"]
    assert saved == sorted(set(saved))
    assert {p.name for p in (run / "checkpoints").iterdir()} == {f"checkpoint-step-{n}" for n in saved}
    assert [e["value"] for e in written if e.get("name") == "processes"] == [processes]
    assert Run(run).state() == "done"
    assert any((run / "final_model").glob("*.safetensors"))
    assert not (run / ".staging").exists()


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(IN_CI, marks=pytest.mark.slow),
        pytest.param([kind for kind in KINDS if kind not in IN_CI], marks=pytest.mark.thorough),
    ],
    ids=", ".join,
)
def test_two_processes_give_the_losses_of_one_and_are_continued_by_one(asked, tmp_path, kinds):
    same_as_one(asked, tmp_path, kinds, 2)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kind", "stage"), [("full sft", 1), ("full sft", 2), ("full sft", 3), ("lora dpo", 3)]
)
def test_zero_gives_the_losses_of_one_process_and_goes_on_in_as_many(asked, tmp_path, kind, stage):
    pytest.importorskip("deepspeed")
    from safetensors.torch import load_file

    one = api.train(asked("one", KINDS[kind])).run
    zero = {"parallel": {"kind": "deepspeed", "stage": stage}}
    trained([asked("zero", KINDS[kind], zero)], tmp_path, 2)
    run = tmp_path / "runs" / "zero"
    for what in ("step", "evaluation"):
        assert losses(run, what).keys() == losses(one, what).keys()
        assert losses(run, what) == pytest.approx(losses(one, what), abs=1e-5)
    [mine], [its] = ([*(folder / "final_model").glob("*.safetensors")] for folder in (run, one))
    mine, its = load_file(mine), load_file(its)
    assert {name: t.shape for name, t in mine.items()} == {name: t.shape for name, t in its.items()}
    assert max(float((t - its[name]).abs().max()) for name, t in mine.items()) < 1e-4
    unfinished(run)
    with pytest.raises(RunError, match="continued as it was written: by 2 processes"):
        api.resume(run, checkpoint="checkpoint-step-4", processes=1)
    unfinished(run)
    api.resume(run, checkpoint="checkpoint-step-4", processes=2)
    assert losses(run) == pytest.approx(losses(one), abs=1e-5)


@pytest.mark.thorough
def test_four_processes_give_the_losses_of_one_and_are_continued_by_one(asked, tmp_path):
    same_as_one(asked, tmp_path, KINDS, 4)


@pytest.mark.thorough
def test_a_run_of_one_process_is_continued_by_two(asked, tmp_path):
    one = losses(api.train(asked("one")).run)
    run = api.train(asked("more")).run
    unfinished(run)
    api.resume(run, checkpoint="checkpoint-step-4", processes=2)
    assert losses(run) == pytest.approx(one, abs=1e-5)


@pytest.mark.thorough
def test_weights_go_into_shares_and_come_out_of_them_where_a_run_goes_on(asked):
    """One process, then two with shares of the same weights and states, then one."""
    one = losses(api.train(asked("one")).run)
    run = api.train(asked("more", {"parallel": {"kind": "fsdp"}})).run
    for step, processes in ((2, 2), (4, 1)):
        unfinished(run)
        api.resume(run, checkpoint=f"checkpoint-step-{step}", processes=processes)
        assert losses(run) == pytest.approx(one, abs=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["full sft", "lora reward", "full seq2seq"])
@pytest.mark.parametrize(("first", "then"), [(4, 2), (2, 4)])
def test_shares_of_some_processes_are_continued_by_more_and_by_fewer(asked, kind, first, then):
    """From checkpoints of the one number with the other, and back."""
    one = api.train(asked("one", KINDS[kind])).run
    sections = {"launch": {"kind": "accelerate", "processes": first}, "parallel": {"kind": "fsdp"}}
    run = api.train(asked("more", KINDS[kind], sections)).run
    for step, processes in ((2, then), (4, first)):
        assert len([*(run / f"checkpoints/checkpoint-step-{step}/sharded").iterdir()]) == (
            first if step == 2 else then
        )
        unfinished(run)
        api.resume(run, checkpoint=f"checkpoint-step-{step}", processes=processes)
        for what in ("step", "evaluation"):
            assert losses(run, what) == pytest.approx(losses(one, what), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.thorough), "fsdp"])
def test_a_killed_process_ends_the_job_with_the_reason_and_the_run_goes_on(asked, parallel):
    import psutil

    sections = {"launch": {"kind": "accelerate", "processes": 2}, "parallel": {"kind": parallel}}
    recipe = asked("killed", sections, num_epochs=12, save_steps=4)
    killed, seen = [], []

    def watch(event):
        seen.append(event["kind"])
        if event["kind"] == "checkpoint" and not killed:
            for child in psutil.Process().children(recursive=True):
                if child.environ().get("RANK") == "1":
                    killed.append(time.monotonic())
                    child.kill()

    with pytest.raises(RunError, match="Process 1 of 2 was ended by SIGKILL") as error:
        api.train(recipe, watch=watch)
    assert time.monotonic() - killed[0] < 30
    assert error.value.exit_code == 3
    run = Path(recipe.output_dir) / "killed"
    assert "progress" in seen
    assert f"tunesmith resume {run}" in error.value.fix
    assert Run(run).state() == "failed"
    result = api.resume(run, processes=1)
    assert Run(result.run).state() == "done"
    starts = [e["step"] for e in Run(run).events() if e.get("state") == "training"]
    assert starts[0] == 0
    assert starts[1] >= 4
