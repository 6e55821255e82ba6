"""What a process holds for blocks that come and go."""

from __future__ import annotations

import math

import pytest

from tunesmith import heap
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
