"""The shared reader of a run's events: what it shows, and how much it reads for it."""

from __future__ import annotations

import json
import math
import threading

import numpy as np
import pytest

from tunesmith.training.run import Run
from tunesmith.ui import curves
from tunesmith.ui.curves import POINTS, Events, thinned

STEPS = 100_000


def step(number: int, **more) -> dict:
    facts = {"loss": 4 * math.exp(-number / 300), "learning_rate": 1e-4, "grad_norm": 1.0}
    return {"time": 1.0, "kind": "step", "step": number, "epoch": 0.1, **facts,
            "tokens": 100 * number, "seconds": 0.5 * number, "memory": 2_000_000_000, **more}  # fmt: skip


def write(path, events) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def points(seen, title: str, trace: int = 0) -> list[tuple[int, float]]:
    figure = next(f for f in seen.figures if f["title"] == title)
    found = figure["data"]["traces"][trace]
    return list(zip(found["x"], found["y"], strict=True))


def test_it_shows_what_the_run_itself_says_of_its_events(tmp_path):
    file = tmp_path / "events.jsonl"
    write(file, [{"kind": "state", "step": None, "state": "prepared"}])
    write(file, [{"kind": "state", "step": 0, "state": "training", "total_steps": 20}])
    write(file, [step(n, measures={"rewards/margins": n / 10}) for n in range(1, 9)])
    write(file, [{"kind": "evaluation", "step": 8, "loss": 2.5}])
    write(file, [{"kind": "sample", "step": 8, "prompt": "p", "completion": "gone"}])
    with file.open("a") as cut:
        cut.write('{"kind": "step", "step": 9, "lo\n')
    write(file, [{"kind": "state", "step": 5, "state": "training", "total_steps": 20}])
    write(file, [step(n, loss=7.0 + n, seconds=0.25 * (n - 5)) for n in (6, 7)])
    write(file, [step(8, loss=math.nan, seconds=0.75)])
    with file.open("a") as odd:
        odd.write("\n")
    write(file, [{"kind": "warning", "step": None, "message": "look"}])
    events = Events(file)
    seen = events.look()
    kept = [e for e in Run(tmp_path).events() if isinstance(e, dict) and e.get("kind") == "step"]
    assert points(seen, "Loss") == [(e["step"], e["loss"]) for e in kept if math.isfinite(e["loss"])]
    assert [x for x, _ in points(seen, "rewards")] == [1, 2, 3, 4, 5], "the later ones were taken again"
    assert seen.samples == ()
    assert len(next(f for f in seen.figures if f["title"] == "Loss")["data"]["traces"]) == 1, (
        "no validation is left"
    )
    assert (seen.step, seen.total_steps, seen.state, seen.no_numbers) == (8, 20, "training", 1)
    assert seen.told[-1] == "warning: look"
    assert points(seen, "Speed")[-1] == (8, pytest.approx(400.0))
    assert seen.seconds_left == pytest.approx((20 - 8) * 0.75 / 3), "at the pace since it went on"
    with file.open("a") as odd:
        odd.write("[1, 2]\nnull\n{}\n")
    assert events.look().step == 8, "lines that are no events change nothing"


@pytest.fixture(scope="module")
def long_log(tmp_path_factory):
    """A log of 100,000 steps, with one peak."""
    file = tmp_path_factory.mktemp("long") / "events.jsonl"
    write(file, [{"kind": "state", "step": 0, "state": "training", "total_steps": 2 * STEPS}])
    write(file, (step(n, **({"loss": 99.0} if n == 54_321 else {})) for n in range(1, STEPS + 1)))
    return file


def test_a_long_log_is_read_once_for_all_watchers(long_log):
    file, size = long_log, long_log.stat().st_size
    assert size > 15e6
    shared = curves.events_of(file.parent)
    assert shared is curves.events_of(file.parent)
    watchers = [threading.Thread(target=shared.look) for _ in range(20)]
    for watcher in watchers:
        watcher.start()
    for watcher in watchers:
        watcher.join()
    assert shared.bytes_read == size, "one reading for twenty"
    first = shared.look()
    assert all(shared.look() is first for _ in range(20)), "nothing is made anew while nothing is added"
    assert shared.bytes_read == size

    write(file, [step(STEPS + 1, loss=0.5)])
    half = json.dumps(step(STEPS + 2))
    with file.open("a") as being_written:
        being_written.write(half[:40])
    assert shared.look().latest["loss"] == 0.5
    added = file.stat().st_size - size
    assert shared.bytes_read == size + added, "only what was added"
    with file.open("a") as being_written:
        being_written.write(half[40:] + "\n")
    assert shared.look().step == STEPS + 2
    assert shared.bytes_read < size + 2 * added + 1000
    assert shared.look().version > first.version

    found = points(first, "Loss")
    assert len(found) <= POINTS + 2
    assert (54_321, 99.0) in found, "a peak of one step in 100,000 is seen"
    assert found[0][0] == 1
    assert found[-1][0] == STEPS
    figure = next(f for f in first.figures if f["title"] == "Loss")
    assert len(curves.plotted(figure)) < 60_000, "bytes that each watcher is sent"


def test_a_run_of_the_same_name_is_another_run(tmp_path):
    file = tmp_path / "events.jsonl"
    events = Events(file)
    assert events.look().figures == ()
    write(file, [step(n) for n in range(1, 4)])
    assert len(points(events.look(), "Loss")) == 3
    before = events.look().version
    file.rename(tmp_path / "old")
    assert events.look().figures == ()
    write(file, [step(1)])
    assert len(points(events.look(), "Loss")) == 1
    assert events.look().version > before


@pytest.mark.parametrize("n", [1, 2, 999, 1000, 1001, 12_345])
def test_thinning_keeps_ends_and_extremes(n):
    values = np.random.default_rng(n).standard_cauchy(n)
    kept = thinned(range(n), values)
    assert len(kept) <= POINTS + 2
    assert {(int(k), float(values[k])) for k in (0, n - 1, values.argmin(), values.argmax())} <= set(kept)
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    assert all(values[x] == y for x, y in kept)


def test_a_log_is_read_before_its_page_is_looked_at(tmp_path):
    write(tmp_path / "events.jsonl", [step(n) for n in range(1, 50)])
    curves.read_ahead(tmp_path)
    for thread in threading.enumerate():
        if thread.name == "read-ahead":
            thread.join(10)
    reader = curves.events_of(tmp_path)
    assert reader.bytes_read == (tmp_path / "events.jsonl").stat().st_size
    assert reader.look().step == 49
    assert reader.bytes_read == (tmp_path / "events.jsonl").stat().st_size, "read once"
