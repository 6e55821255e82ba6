"""Devices by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tunesmith import devices
from tunesmith.errors import RecipeError


def test_an_unknown_device_lists_the_known_ones_and_the_nearest():
    with pytest.raises(RecipeError, match=r"no device 'h100-80g'") as error:
        devices.named("h100-80g")
    assert all(name in str(error.value) for name in devices.DEVICES)
    assert "Did you mean 'h100-80gb'?" in str(error.value)


def test_the_page_on_plans_names_every_device():
    page = (Path(__file__).parent.parent / "docs/plan.md").read_text(encoding="utf-8")
    listed = page.split("Known are ")[1].split("`cpu`")[0]
    assert re.findall(r"[\w-]+", listed.removesuffix("and ")) == [*devices.DEVICES]


@pytest.mark.parametrize(
    ("said", "meant"),
    [("H100 80GB", "h100-80gb"), ("a100-40", "a100-40gb"), ("rtx_4090", "rtx-4090"), ("nvidia-l4", "l4")],
)
def test_names_are_taken_as_people_write_them(said, meant):
    assert devices.named(said).name == meant


def test_this_machine_is_measured():
    found = devices.named("cpu")
    assert found.kind == "cpu"
    assert 1e8 < found.peaks["float32"] < 1e14
    assert 1e8 < found.bandwidth < 1e13
    assert devices.resident() < found.memory <= devices._physical()


def test_a_device_without_16_bit_units_computes_in_float32():
    assert devices.named("t4").peak("bfloat16") == devices.named("t4").peak("float32")
    assert devices.named("h100").peak("bfloat16") > 10 * devices.named("h100").peak("float32")


@pytest.mark.parametrize(
    ("title", "mib", "meant"),
    [
        ("NVIDIA H100 80GB HBM3", 81_559, "h100-80gb"),
        ("NVIDIA H100 PCIe", 81_559, "h100-pcie-80gb"),
        ("NVIDIA A10G", 22_731, "a10g"),
        ("NVIDIA A10", 22_731, "a10"),
        ("Tesla V100-SXM2-32GB", 32_510, "v100-32gb"),
        ("Tesla V100-SXM2-16GB", 16_160, "v100-16gb"),
        ("NVIDIA A100-SXM4-40GB", 40_536, "a100-40gb"),
        ("NVIDIA L40S", 45_589, "l40s"),
        ("NVIDIA L4", 22_731, "l4"),
        ("NVIDIA GeForce RTX 4090", 24_217, "rtx-4090"),
        ("NVIDIA GeForce GTX 1080", 8_192, None),
    ],
)
def test_a_device_is_known_by_its_drivers_title(title, mib, meant):
    found = devices.titled(title, mib * 2**20)
    assert (found.name if found else None) == meant


def test_what_others_hold_of_a_gpu_is_not_to_be_had(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
    found = devices.here("cuda")
    assert (found.name, found.memory, found.assumed) == ("h100-pcie-80gb", 21 * 2**30, "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU of 2031")
    found = devices.here("cuda")
    assert (found.name, found.memory) == ("some gpu of 2031", 21 * 2**30)
    assert "300 GB/s" in found.assumed


@pytest.mark.parametrize(("version", "prefix"), [(2, ""), (1, "total_")])
def test_what_others_of_a_container_hold_is_not_to_be_had(version, prefix, tmp_path, monkeypatch):
    """Of a limit of 500 MB others hold 300 MB, and pages of files, which the system gives up, 80 MB."""
    mb, own = 10**6, devices.resident()
    files = [row for row in devices.CONTAINERS if row[3] == prefix]
    monkeypatch.setattr(devices, "CONTAINERS", [(str(tmp_path), *row[1:]) for row in files])
    [(_, limit, held, _)] = files
    (tmp_path / limit).write_text(f"{own + 500 * mb}\n")
    assert devices.available() == own + 500 * mb
    (tmp_path / held).write_text(f"{own + 380 * mb}\n")
    counts = {"anon": 300 * mb, f"{prefix}active_file": 50 * mb, f"{prefix}inactive_file": 30 * mb}
    (tmp_path / "memory.stat").write_text("".join(f"{name} {number}\n" for name, number in counts.items()))
    assert devices.available() == pytest.approx(own + 200 * mb, abs=20 * mb)
    (tmp_path / limit).write_text("max\n")
    assert devices.available() > own + 500 * mb
