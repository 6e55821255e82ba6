"""What a process holds for blocks that come and go."""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith import __main__, heap
from tunesmith.heap import Block

MB = 10**6

pytestmark = pytest.mark.skipif("glibc" not in heap._c_library(), reason="another C library")


def layers(count, size):
    """What is kept until its turn comes on the way back, and what is gone at once, one after the other."""
    found = []
    for n in range(count):
        found += [
            Block(size, 4 * n, 8 * count - 4 * n),
            Block(size // 2, 4 * n + 1, 4 * n + 2.5),
            Block(size, 4 * n + 2, 4 * n + 3.5),
        ]
    return found


@pytest.fixture
def tuned(monkeypatch):
    """As in a command that trains."""
    monkeypatch.setenv("GLIBC_TUNABLES", __main__.MALLOC)


@pytest.mark.parametrize("size", [4 * MB, 8 * MB, 12 * MB])
def test_free_pieces_are_held_as_well(size):
    blocks = layers(12, size)
    alive = max(sum(b.size for b in blocks if b.born <= moment.born < b.died) for moment in blocks)
    stepping, _ = heap.most_held(blocks, passes=1, states=0)
    assert alive < stepping < 1.1 * sum(block.size for block in blocks)


def test_little_is_held_for_little():
    stepping, _ = heap.most_held(layers(3, 10_000), passes=1, states=0)
    assert stepping < MB


def test_large_blocks_go_back_at_once():
    blocks = layers(4, 80 * MB)  # the temporary ones have 40
    alive = max(sum(b.size for b in blocks if b.born <= moment.born < b.died) for moment in blocks)
    stepping, _ = heap.most_held(blocks, passes=1, states=0)
    assert stepping == pytest.approx(alive, rel=0.01)


def test_in_a_command_that_trains_their_room_stays(tuned):
    blocks = [Block(80 * MB, 0, 3), Block(60 * MB, 1, 5), Block(90 * MB, 4, 6)]
    stepping, _ = heap.most_held(blocks, passes=1, states=0)
    assert stepping == pytest.approx(230 * MB, rel=0.01)  # the last does not fit where the first was


def test_states_are_there_from_the_second_step_on():
    blocks = [Block(40 * MB, 0, math.inf, True), Block(50 * MB, 1, 2.5)]
    stepping, updating = heap.most_held(blocks, passes=1, states=2)
    assert stepping == pytest.approx(170 * MB, rel=0.02)
    assert updating == pytest.approx(200 * MB, rel=0.02)  # two more for the length of an update
    passes, _ = heap.most_held(blocks, passes=4, states=2)
    assert passes == stepping  # a later gradient is added to the first, and gone before the other block comes


def test_another_allocator_is_not_asked(monkeypatch):
    monkeypatch.setattr(heap, "_c_library", lambda: "")
    assert heap.most_held(layers(2, MB), passes=1, states=0) is None


FAULTS = """
import resource, torch
torch.empty(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(16 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_large_tensors_take_huge_pages():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[never]" in setting.read_text():
        pytest.skip("the system gives no huge pages")
    done = subprocess.run(
        [sys.executable, "-c", "import tunesmith" + FAULTS], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 64 * 2**20 // resource.getpagesize() // 4


STARTED = """
import os, sys
from tunesmith import __main__
before = os.getpid()
__main__.with_tuned_allocator()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (None, __main__.MALLOC),
        ("glibc.rtld.nns=8", f"glibc.rtld.nns=8:{__main__.MALLOC}"),
        ("glibc.malloc.tcache_count=3", "glibc.malloc.tcache_count=3"),
    ],
)
def test_a_command_that_trains_starts_again_with_a_tuned_allocator(said, expected):
    if "glibc" not in heap._c_library():
        expected = said
    given = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    started = subprocess.Popen(
        [sys.executable, "-c", STARTED, "one", "two words"], stdout=subprocess.PIPE, text=True,
        env=given if said is None else {**given, "GLIBC_TUNABLES": said},
    )  # fmt: skip
    printed = started.communicate()[0].split()
    assert printed == [str(started.pid), str(expected), "['one',", "'two", "words']"]


def test_only_commands_that_train_start_again(monkeypatch):
    from tunesmith import cli

    seen = []
    monkeypatch.setattr(cli, "main", lambda: seen.append("ran"))
    monkeypatch.setattr(__main__, "with_tuned_allocator", lambda: seen.append("again"))
    for arguments in (["show", "presets"], ["train", "r.yaml"], ["--json", "plan"], ["sweep", "r.yaml"]):
        monkeypatch.setattr(sys, "argv", ["tunesmith", *arguments])
        __main__.main()
    assert seen == ["ran", *["again", "ran"] * 3]
    assert set(__main__.TRAINS) <= {command.name or "" for command in cli.app.registered_commands} | {
        (command.callback.__name__ if command.callback else "").replace("_", "-")
        for command in cli.app.registered_commands
    }
