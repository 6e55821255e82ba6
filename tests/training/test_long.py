"""What shows only after long, or beside others: memory that grows, runs with one cold cache, losses of another day."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from tunesmith import api
from tunesmith.compose import compose
from tunesmith.training.run import Run

pytestmark = pytest.mark.thorough

GOLDEN = Path(__file__).with_name("golden_losses.json")
"""Losses by recipe; `TUNESMITH_GOLDEN=write` writes them anew, for a change that is meant to change them."""

NEAR = 1e-4
"""As far as losses of float32 are apart from processor to processor."""

RECIPES = {
    "sft": {},
    "sft, packed": {"data": {"packing": True}},
    "sft, LoRA": {"adapter": {"kind": "lora", "rank": 4}},
    "dpo": {"method": {"kind": "dpo"}, "data": {"dataset": "example:preferences"}},
    "kto": {"method": {"kind": "kto"}, "data": {"dataset": "example:preferences"}},
    "orpo": {"method": {"kind": "orpo"}, "data": {"dataset": "example:preferences"}},
}


def recipe_of(place: Path, name: str, base: Path, dataset: str, *layers: dict, steps: int = 5):
    from tunesmith.compose import overlaid

    return compose(
        overlaid(
            {
                "name": name.replace(", ", "-"), "output_dir": str(place), "model": {"base": str(base)},
                "data": {"dataset": dataset, "max_length": 256, "max_rows": 40},
                "training": {
                    "max_steps": steps, "per_device_train_batch_size": 4, "warmup_steps": 0, "learning_rate": 1e-2,
                    "logging_steps": 1, "save_steps": steps, "eval_steps": steps,
                },
                "evaluation": {"skip": True},
            },
            *layers,
        )
    ).recipe  # fmt: skip


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in Run(run).events() if event["kind"] == "step"]


@pytest.mark.parametrize("name", RECIPES)
def test_losses_are_those_of_the_day_they_were_written_down(name, tiny_model_folder, question_file, tmp_path):
    found = losses(
        api.train(recipe_of(tmp_path, name, tiny_model_folder, str(question_file), RECIPES[name])).run
    )
    kept = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    if os.environ.get("TUNESMITH_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps({**kept, name: [round(loss, 7) for loss in found]}, indent=1) + "\n")
        return
    assert found == pytest.approx(kept[name], abs=NEAR)


def _trained(place: Path, number: int, base: Path, dataset: str, said) -> None:
    try:
        run = api.train(recipe_of(place, f"run{number}", base, dataset, steps=2)).run
        said.put((number, losses(run)))
    except BaseException as error:
        said.put((number, repr(error)))


def test_eight_runs_at_once_with_one_cold_cache_are_the_same(
    tiny_model_folder, question_file, tmp_path, monkeypatch
):
    cache = tmp_path / "cache"
    monkeypatch.setenv("TUNESMITH_CACHE", str(cache))
    context = multiprocessing.get_context("fork")  # what they need is imported once
    said = context.Queue()
    eight = [
        context.Process(
            target=_trained, args=(tmp_path / "runs", n, tiny_model_folder, str(question_file), said)
        )
        for n in range(8)
    ]
    for process in eight:
        process.start()
    found = dict(said.get(timeout=300) for _ in eight)
    for process in eight:
        process.join(30)
    assert sorted(found) == list(range(8))
    assert all(given == found[0] for given in found.values()), found
    assert len(found[0]) == 2
    assert [name for name in os.listdir(cache) if name.startswith(".")] == [], "nothing half made is left"
    assert all("rows" in json.loads((run / "plan.json").read_text()) for run in (tmp_path / "runs").iterdir())


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


LEAK = 1_000_000
"""Bytes that 1,000 steps or requests may leave behind, beside `NOISE`."""
NOISE = 4_000_000
"""Bytes by which a process breathes."""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_2000_steps_leave_no_memory_behind(tiny_model_folder, question_file, tmp_path):
    sizes: dict[int, int] = {}

    def watch(event) -> None:
        if event["kind"] == "step":
            sizes[event["step"]] = resident()

    steps = {"logging_steps": 100, "save_steps": 2000, "eval_steps": 2000}
    api.train(
        recipe_of(tmp_path, "long", tiny_model_folder, str(question_file), {"training": steps}, steps=2000),
        watch=watch,
    )
    assert sizes[2000] - sizes[500] < 1.5 * LEAK + NOISE, sizes


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_2000_requests_leave_no_memory_behind(tiny_model_folder):
    pytest.importorskip("fastapi")
    import urllib.request

    from tunesmith.serving.limits import Limits
    from tunesmith.serving.server import Where, running

    token, sizes = "a-token-of-tests-1234", {}
    with running(str(tiny_model_folder), {"m": tiny_model_folder}, Where(port=0, token=token), Limits()) as (
        url,
        _,
    ):
        for number in range(1, 2001):
            messages = [{"role": "user", "content": f"count of {number}"}]
            body = json.dumps({"model": "m", "messages": messages, "max_tokens": 4}).encode()
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            with urllib.request.urlopen(
                urllib.request.Request(f"{url}/chat/completions", body, headers)
            ) as reply:
                assert json.load(reply)["usage"]["completion_tokens"] > 0
            if not number % 500:
                sizes[number] = resident()
    assert sizes[2000] - sizes[500] < 1.5 * LEAK + NOISE, sizes
