"""`scripts/gpu_check` without a GPU: what it says then, what it counts, and the same code at toy size on a CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[1] / "scripts/gpu_check"


@pytest.fixture(scope="module")
def check():
    path = list(sys.path)
    loader = SourceFileLoader("gpu_check", str(FILE))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_check", loader))
    sys.modules["gpu_check"] = module  # where its dataclasses look
    loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules["gpu_check"]


def test_without_cuda_it_says_so_in_one_sentence(check, capsys, tmp_path):
    assert check.main(["--out", str(tmp_path / "x.jsonl")]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("There is no CUDA device here; --dry-run")
    assert told.err.count("\n") == 1
    assert check.main(["--dry-run", "--shapes", "huge", "--out", str(tmp_path / "x.jsonl")]) == 1
    assert "Known: llama-3.2-1b" in capsys.readouterr().err


@pytest.mark.slow
def test_work_is_counted_as_torch_counts_it(check):
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    facts = dict(check.SHAPES["tiny"])
    config = AutoConfig.for_model(facts.pop("kind"), attn_implementation="eager", **facts)
    model = AutoModelForCausalLM.from_config(config)
    length = 24
    ids = torch.arange(length)[None]
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    # Eager attention multiplies the whole square, of which a causal one needs the half with the diagonal.
    square = 12 * config.num_hidden_layers * config.hidden_size * length**2
    rotary = (
        6 * (config.hidden_size // config.num_attention_heads // 2) * length
    )  # positions times frequencies
    half = square * (length + 1) / (2 * length)
    counted = counter.get_total_flops() - square + half
    assert check.flops("tiny", [length], length, trains_all=True) == pytest.approx(counted, abs=rotary)
    lora = check.flops("tiny", [length], length, trains_all=False)
    assert lora == pytest.approx((counted - half) * 4 / 6 + half, abs=rotary)


def test_published_sizes(check):
    """Parameters in the layers and the embeddings, as the models' cards round them."""
    billions = {"llama-3.2-1b": 1.24, "qwen-2.5-1.5b": 1.54, "qwen-2.5-7b": 7.6, "llama-3.1-8b": 8.03}
    for shape, count in billions.items():
        facts = check.SHAPES[shape]
        words = facts["vocab_size"] * facts["hidden_size"] * (1 if facts["tie_word_embeddings"] else 2)
        assert (check.layer_weights(shape) + words) / 1e9 == pytest.approx(count, rel=0.01)


LINES = [
    {"part": "sft", "shape": "s", "adapter": "lora", "name": "ours", "tokens_per_second": 3000.0, "share": 0.5,
     "peak": 2048.0, "loss": 1.5, "memory_error": 0.021, "time_error": -0.1, "ok": True},
    {"part": "sft", "shape": "s", "adapter": "lora", "name": "trl", "tokens_per_second": 1000.0, "share": 0.17,
     "peak": 4096.0, "loss": 1.6, "ok": False},
    {"part": "dpo", "shape": "s", "adapter": "lora", "name": "trl dpo", "failed": "no | room", "ok": False},
    {"part": "equal", "shape": "s", "adapter": "full", "name": "float32", "loss_error": 1e-7, "gradient_error": 2e-6,
     "ok": True},
    {"part": "head", "shape": "s", "adapter": "full", "name": "256 positions", "seconds": 0.002,
     "flops_per_second": 4e14, "ok": True},
    {"part": "generation", "shape": "s", "adapter": "full", "name": "paged", "tokens_per_second": 9000.0,
     "seconds": 2.0, "alike": 0.97, "ok": True},
    {"part": "kernels", "shape": "-", "adapter": "-", "name": "flash", "ok": None, "skipped": "it is not installed"},
    {"part": "ways", "shape": "-", "adapter": "-", "name": "bf16", "ok": False, "told": "loss 9.1", "loss": 9.1},
]  # fmt: skip


def test_the_table(check, tmp_path, capsys):
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    assert check.main(["--table", "--out", str(file)]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows == [
        "| sft | s | lora | ours | 3,000 tokens/s, 50% of the matrix product, 2.0 GiB, loss 1.5000; planned memory "
        "+2.1%, time -10% |",
        "| sft | s | lora | trl | 1,000 tokens/s, 17% of the matrix product, 4.0 GiB, loss 1.6000; ours is 3.00 "
        "times as fast **not as it should be** |",
        "| dpo | s | lora | trl dpo | failed: no / room **not as it should be** |",
        "| equal | s | full | float32 | loss 1.0e-07, gradients 2.0e-06 from float32's stock path |",
        "| head | s | full | 256 positions | 2.0 ms, 400 TFLOP/s |",
        "| generation | s | full | paged | 9,000 new tokens/s, 97% of the answers as padded |",
        "| kernels | - | - | flash | not run: it is not installed |",
        "| ways | - | - | bf16 | loss 9.1 **not as it should be** |",
    ]


SAYS = """
import json, os, sys, time
def say(**line): print(json.dumps(line), flush=True)
"""
FIRST = (
    SAYS
    + """
say(begins="one"); say(name="one", ok=True)
say(begins="two"); print("an illegal access", file=sys.stderr); os.abort()
"""
)
SECOND = (
    SAYS
    + """
say(begins="three"); say(name="three", ok=True); say(lost=True)
"""
)
THIRD = (
    SAYS
    + """
say(begins="four"); time.sleep(60)
"""
)


def test_what_ends_a_process_ends_no_other_case(check, monkeypatch):
    asked = []
    scripts = iter([FIRST, SECOND, THIRD])

    def command(unit, known, ends):
        asked.append(set(known))
        return [sys.executable, "-c", next(scripts)]

    monkeypatch.setattr(check, "command_of", command)
    monkeypatch.setattr(check, "GRACE", 0.0)
    times = iter([60, 60, 1])
    found = list(check.heard(check.Unit("kernels"), {}, lambda: next(times)))
    assert [(line["name"], line["ok"]) for line in found] == [
        ("one", True), ("two", False), ("three", True), ("four", None),
    ]  # fmt: skip
    assert found[1]["failed"] == "its process ended with -6: an illegal access"
    assert "not done within" in found[3]["skipped"]
    assert asked == [set(), {"one", "two"}, {"one", "two", "three"}]


def test_a_case_that_fails_or_lacks_something_says_so_and_the_next_one_runs(check, monkeypatch):
    def part(unit, device, dry, known):
        def absent():
            raise check.Absent("flash-attn is not installed")

        def failing():
            raise ValueError("\nno room")

        yield "one, two", absent
        yield "two", failing
        yield "three", lambda: {"ok": True}

    monkeypatch.setitem(check.PARTS, "kernels", part)
    times = iter([60, 60, 60])
    unit = check.Unit("kernels", only=("one", "two", "three"))
    found = [x for x in check.lines(unit, "cpu", False, {}, lambda: next(times)) if "name" in x]
    assert [line.pop("took") >= 0 for line in found] == [True] * 3
    assert found == [
        {"name": "one, two", "ok": None, "skipped": "flash-attn is not installed"},
        {"name": "two", "ok": False, "failed": "ValueError: no room"},
        {"name": "three", "ok": True},
    ]
    few = check.lines(check.Unit("kernels", only=("two",)), "cpu", False, {}, lambda: 0)
    assert list(few) == [{"name": "two", "ok": None, "skipped": "the budget was spent"}]


def test_every_case_is_of_a_unit_and_the_first_call_has_the_telling_ones(check):
    names = {(unit.part, unit.shape, unit.adapter) for unit in check.UNITS if not unit.only}
    assert {unit.part for unit in check.UNITS} == set(check.PARTS)
    assert all((u.part, u.shape, u.adapter) in names for u in check.UNITS)
    for part, cases in (("kernels", check.KERNELS), ("equal", check.FAMILIES), ("ways", check.WAYS)):
        first = next(unit for unit in check.UNITS if unit.part == part)
        assert sum(first.takes(name) for name in cases) >= len(cases) * 2 / 3


@pytest.mark.thorough
def test_all_parts_run_on_a_cpu_at_toy_size(check, tmp_path, capsys):
    file = tmp_path / "lines.jsonl"
    given = ["--dry-run", "--shapes", "tiny", "--budget", "inf", "--out", str(file)]
    assert check.main(given) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    done = {(line["part"], line["name"]): line for line in lines if line["ok"]}
    assert all(line["ok"] or line.get("skipped") for line in lines)
    assert {
        ("equal", f"{family}, {kind}") for family in check.FAMILIES for kind in ("float32", "bfloat16")
    } <= done.keys()
    assert {("kernels", "rows"), ("kernels", "rows, cap"), ("head", "64 positions")} <= done.keys()
    assert {("sft", name) for name in ("ours", "ours stock", "trl defaults", "trl packing")} <= done.keys()
    assert {("dpo", name) for name in ("ours", "ours without sharing", "trl dpo")} <= done.keys()
    ways = {name for part, name in done if part == "ways"}
    assert ways >= {
        "float32, stock",
        "bf16",
        "bf16, QLoRA",
        "continued",
        "answers",
        "dpo",
        "grpo",
        "ppo",
        "reward",
        "t5",
    }
    assert done["generation", "paged"]["alike"] == 1.0
    assert all("memory_error" in done[part, "ours"] for part in ("sft", "dpo"))
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert told == lines
    # What is done is left; what was lost, bad or not run is made again.
    bad = [{**line, "ok": False} if line["name"] == "llama, float32" else line for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in bad))
    assert check.main([*given, "--part", "equal,head"]) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["name"] for line in again] == ["llama, float32"]
