"""Devices by name."""

from __future__ import annotations

import pytest

from tunesmith import devices
from tunesmith.errors import RecipeError


def test_an_unknown_device_lists_the_known_ones_and_the_nearest():
    with pytest.raises(RecipeError, match=r"no device 'h100-80g'") as error:
        devices.named("h100-80g")
    assert all(name in str(error.value) for name in devices.DEVICES)
    assert "Did you mean 'h100-80gb'?" in str(error.value)


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
