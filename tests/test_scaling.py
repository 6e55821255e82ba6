"""The model of scaling, against what can be counted by hand or drawn by chance, and the page that shows it."""

from __future__ import annotations

import importlib.util
import random
import statistics
import sys
from pathlib import Path

import pytest

from tunesmith import devices, scaling
from tunesmith.scaling import LINKS, Cluster, Link, Load, Network

ROOT = Path(__file__).parents[1]
NETWORK = Network(8e9, 32, 4096)
FACTS = devices.named("h100")


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("scaling_benchmark", ROOT / "benchmarks/scaling.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # its dataclasses look themselves up
    spec.loader.exec_module(found)
    return found


def test_the_page_shows_what_the_model_gives(bench):
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    assert bench.rewritten(page) == page, "python benchmarks/scaling.py --tables"
    lines = [line for line in page.splitlines(keepends=True) if not line.startswith("| 8B, LoRA |")]
    assert bench.rewritten("".join(lines)) == page


def test_published_rows_are_foretold(bench):
    """Of all rows that are not given the median error is small; the largest is said on the page."""
    errors = [abs(error) for table in bench.PUBLISHED for *_, error in bench.checked(table)]
    assert len(errors) >= 20
    assert statistics.median(errors) < 2
    assert sorted(errors)[-2] < 10


def test_bytes_that_a_device_sends_are_those_of_a_ring():
    slow = Link("slow", 1e9, 0.0)
    cluster, load = Cluster(4, 4, slow), Load(1000, 100, passes=3)
    sent = {mode: scaling.step(mode, NETWORK, cluster, load, FACTS).sent for mode in scaling.MODES}
    assert sent["ddp"] == pytest.approx(2 * 3 / 4 * 4 * 8e9)
    assert sent["zero-1"] == pytest.approx(sent["ddp"])
    assert sent["zero-2"] == pytest.approx((3 + 1) * 3 / 4 * 4 * 8e9), "gradients in each pass, weights once"
    assert sent["fsdp"] == sent["hybrid"] == pytest.approx(3 * 3 / 4 * (2 * 2 + 4) * 8e9)
    assert sent["fsdp-kept"] == pytest.approx(3 * 3 / 4 * (2 + 4) * 8e9), "weights once a pass"
    lora = Network(8e9, 32, 4096, trained=1e6)
    of_lora = {mode: scaling.step(mode, lora, cluster, load, FACTS).sent for mode in ("ddp", "fsdp")}
    assert of_lora["ddp"] == pytest.approx(2 * 3 / 4 * 4e6)
    assert of_lora["fsdp"] > 0.49 * sent["fsdp"], "frozen weights are gathered all the same"
    two = Cluster(8, 4, slow, slow)
    wide = scaling.step("hybrid", NETWORK, two, load, FACTS).sent
    assert wide == pytest.approx(sent["hybrid"] + 2 * 1 / 2 * 4 * 8e9 / 4)


def test_a_card_that_a_node_shares_is_as_fast_whatever_the_devices_of_the_node():
    shared, own = LINKS["ethernet-100"], LINKS["infiniband-400"]
    rates = [Cluster(2 * n, n, LINKS["nvlink-4"], shared).rate for n in (1, 4, 8)]
    assert rates == [pytest.approx(scaling.REACHED * 12.5e9)] * 3
    assert Cluster(8, 4, LINKS["nvlink-4"], own).rate == pytest.approx(scaling.REACHED * 4 * 50e9)
    twins = [Cluster(2 * n, n, LINKS["nvlink-4"], shared).twins().rate for n in (4, 8)]
    assert twins == pytest.approx([scaling.REACHED * 12.5e9 / n for n in (4, 8)]), "all places speak at once"


def test_one_device_has_nobody_to_speak_with_and_many_never_gain_more_than_their_number():
    load = Load(8192, 2048, 2)
    for mode in scaling.MODES:
        alone = scaling.step(mode, NETWORK, Cluster(1, 8, LINKS["nvlink-4"]), load, FACTS, alone=5000)
        assert alone.rate == pytest.approx(5000)
        assert (alone.sent, alone.speaking) == (0, 0)
        rates = {
            n: scaling.step(
                mode, NETWORK, Cluster(n, 8, LINKS["nvlink-4"], LINKS["infiniband-400"]), load, FACTS, alone=5000
            )
            for n in (8, 64, 1024)
        }  # fmt: skip
        assert all(found.speaking > 0 for found in rates.values())
        if mode != "hybrid":
            assert rates[8].efficiency > rates[64].efficiency > rates[1024].efficiency


@pytest.mark.parametrize(("rows", "count"), [(1, 4), (8, 2), (8, 64)])
def test_the_fullest_device_is_that_of_drawn_rows(rows, count):
    rng = random.Random(0)
    lengths = [max(int(rng.lognormvariate(5, 0.8)), 4) for _ in range(400)]
    drawn = [max(sum(rng.choices(lengths, k=rows)) for _ in range(count)) for _ in range(3000)]
    mean = rows * statistics.fmean(lengths)
    error = statistics.stdev(drawn) / mean / 3000**0.5
    assert scaling.fullest(lengths, rows, count) == pytest.approx(
        statistics.fmean(drawn) / mean, abs=5 * error
    )
    assert scaling.fullest([7, 7, 7], rows, count) == pytest.approx(1)


def test_sharded_modes_wait_in_each_pass():
    cluster = Cluster(8, 8, LINKS["nvlink-4"])
    load = Load(4096, 512, 4, fullest=1.5, fullest_step=1.2)
    waits = {mode: scaling.step(mode, NETWORK, cluster, load, FACTS) for mode in ("ddp", "fsdp")}
    assert waits["ddp"].waiting == pytest.approx(0.2 * waits["ddp"].computing)
    assert waits["fsdp"].waiting == pytest.approx(0.5 * waits["fsdp"].computing)


def test_what_is_divided_fits_and_is_saved_by_all(bench):
    cluster = Cluster(64, 8, LINKS["nvlink-4"], LINKS["infiniband-400"])
    assert not bench.fits("ddp", NETWORK, cluster, FACTS)
    assert bench.fits("fsdp", NETWORK, cluster, FACTS)
    assert bench.held("ddp", NETWORK, cluster) == pytest.approx((16 + 4) * 8e9), "gradients twice"
    inside = bench.held("hybrid", NETWORK, cluster) - bench.held("fsdp", NETWORK, cluster)
    assert inside == pytest.approx(16 * 8e9 * (1 / 8 - 1 / 64)), "divided in a node, and among all"
    assert bench.saving("ddp", NETWORK, cluster) == pytest.approx(8 * bench.saving("fsdp", NETWORK, cluster))
