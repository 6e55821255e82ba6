"""Memory that is kept from step to step."""

from __future__ import annotations

import platform
import resource
from pathlib import Path

import pytest
import torch

from tunesmith.training import heap

PAGES = 64 * 2**20 // resource.getpagesize()


def faults_of_a_second_large_tensor() -> int:
    torch.ones(16 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's heap")
def test_a_large_tensor_takes_the_room_of_the_last_one():
    with heap.kept():
        assert faults_of_a_second_large_tensor() < PAGES // 20
    # Huge pages, where the system gives them unasked, are fewer faults.
    usual = faults_of_a_second_large_tensor()
    if "[always]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        assert usual > PAGES // 2
