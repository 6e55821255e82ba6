"""One and two processes on this machine, the launcher against plain torchrun, and what the model of scaling says of it.

The same recipe (a Llama of random weights, 256 wide, 4 layers, float32, one thread a process) is trained in two
processes that `tunesmith train --launch accelerate` starts and in two that `torchrun -m tunesmith` starts, in pairs
whose order alternates, and every other time in one. Both of a pair compute the same rows in the same steps. Of each
step after the warm-up the median over the runs counts, so that neither the length of the rows nor a neighbour's burst
is taken for the launcher's; a step is the mean of these.

The last line is one JSON object: seconds of a step under our launcher and under torchrun, by how much ours is longer,
the same of each pair, the bar, and `noise_percent`, by how much torchrun's even runs differ from its odd ones. The exit
status is 1 where ours is more than 2 % longer. Above it: tokens a second of one and of two processes, gloo's bandwidth,
and how far `tunesmith.scaling` is from the two with what was measured of one.

    python benchmarks/scaling.py --rounds 4     measure, some seven minutes
    python benchmarks/scaling.py --tables       only write the tables of docs/scaling.md anew
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tunesmith import devices, scaling
from tunesmith.scaling import LINKS, Cluster, Link, Load, Network

PAGE = Path(__file__).parents[1] / "docs/scaling.md"
BAR = 2.0
"""Percent by which a step may be longer under our launcher than under torchrun."""


class Row(NamedTuple):
    """A published row: devices, rows of a pass, passes of a step, tokens a second of a device."""

    devices: int
    batch: int
    passes: int
    rate: float


@dataclass(frozen=True)
class Published:
    """A table of another project. Its first row is what the model is given; the others are predicted."""

    source: str
    address: str
    title: str
    network: Network
    device: str
    per_node: int
    inside: str
    between: str | None
    length: int
    rows: Sequence[Row]
    mode: str = "fsdp"


FOUNDRY = "https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md"
TITAN = "https://github.com/pytorch/torchtitan/blob/main/benchmarks/llama3_h100_202412_torchtitan.md"
KEMPNER = "https://github.com/KempnerInstitute/KempnerForge/blob/main/benchmarks/mfu_scaling/mfu_scaling_2026-04-05.md"
NEMO = (
    "https://docs.nvidia.com/nemo-framework/user-guide/24.12/nemotoolkit/performance/performance_summary.html"
)

MPT = {
    "1B": Network(1_315_950_592, 24, 2048),
    "3B": Network(2_651_837_440, 32, 2560),
    "7B": Network(6_658_859_008, 32, 4096, again=True, gradient_bytes=2),
    "13B": Network(12_853_954_560, 40, 5120),
    "13B again": Network(12_853_954_560, 40, 5120, again=True, gradient_bytes=2),
    "30B": Network(29_975_214_080, 48, 7168, again=True),
    "30B again": Network(29_975_214_080, 48, 7168, again=True, gradient_bytes=2),
    "70B": Network(64_862_437_376, 80, 8192, again=True),
    "70B again": Network(64_862_437_376, 80, 8192, again=True, gradient_bytes=2),
}


def _foundry(name: str, *rows: Row) -> Published:
    link = "infiniband-400"  # the page does not say which; that of most machines with eight H100
    title, where = f"MPT {name}, H100", ("h100-80gb", 8, "nvlink-4", link)
    return Published("llm-foundry", FOUNDRY, title, MPT[name], *where, 2048, rows)


def _foundry_a100(name: str, *rows: Row) -> Published:
    title = f"MPT {name.split()[0]}, A100 40 GB"
    where = ("a100-40gb", 8, "nvlink-3", "infiniband-200")
    return Published("llm-foundry", FOUNDRY, title, MPT[name], *where, 2048, rows)


LLAMA_8B = Network(8.03e9, 32, 4096)
PUBLISHED = (
    _foundry("1B", Row(8, 14, 1, 45455), Row(16, 20, 1, 46037), Row(32, 20, 1, 45130), Row(64, 20, 1, 44402)),
    _foundry("3B", Row(16, 10, 3, 24142), Row(32, 6, 3, 23021), Row(64, 6, 3, 22525)),
    _foundry("13B", Row(8, 2, 1, 4792), Row(16, 2, 1, 4767), Row(32, 2, 1, 4811), Row(64, 2, 1, 4800)),
    _foundry("30B", Row(8, 3, 21, 2002), Row(16, 10, 3, 2263), Row(32, 14, 3, 2308)),
    _foundry("70B", Row(32, 2, 16, 882), Row(64, 8, 4, 1039)),
    _foundry_a100(
        "7B", Row(8, 12, 4, 3679), Row(16, 16, 1, 3645), Row(32, 18, 1, 3725), Row(64, 18, 1, 3665),
        Row(128, 18, 1, 3623),
    ),
    _foundry_a100(
        "13B again", Row(16, 10, 1, 1993), Row(32, 14, 1, 1998), Row(64, 16, 1, 1976), Row(128, 16, 1, 1972)
    ),
    _foundry_a100("30B again", Row(32, 4, 1, 857), Row(128, 6, 1, 865)),
    _foundry_a100("70B again", Row(64, 2, 1, 276), Row(128, 4, 1, 376)),
    Published(
        "torchtitan", TITAN, "Llama 3.1 8B, H100", LLAMA_8B, "h100-80gb", 8, "nvlink-4", "infiniband-400",
        8192, (Row(8, 2, 1, 5762), Row(128, 2, 1, 5605)),
    ),
    Published(
        "torchtitan", TITAN, "the same, torch.compile", LLAMA_8B, "h100-80gb", 8, "nvlink-4",
        "infiniband-400", 8192, (Row(8, 2, 1, 6667), Row(128, 2, 1, 6514)),
    ),
    Published(
        "KempnerForge", KEMPNER, "Llama 3 8B, H200, from one", Network(8.03e9, 32, 4096, again=True), "h200",
        4, "nvlink-4", None, 4096, (Row(1, 4, 2, 10471), Row(2, 4, 2, 9364), Row(4, 4, 2, 9746)),
    ),
)  # fmt: skip
"""Tokens a second of a device, as the pages state them (KempnerForge: those of all, divided). torchtitan computes again
a part of the forward only; its rows are predicted from one another, so that it does not matter."""

LORA_7B = (16891.0, 24824.0)
"""LLAMA2-7B on 8 H100 in FP8, tokens a second of a device, all weights and LoRA (NEMO)."""
LLAMA_7B = Network(6.74e9, 32, 4096)
ADAPTER_7B = Network(6.74e9, 32, 4096, trained=40e6)


def _per_device(table: Published, row: Row, alone: float) -> float:
    cluster = Cluster(
        row.devices,
        table.per_node,
        LINKS[table.inside],
        LINKS[table.between] if table.between and row.devices > table.per_node else None,
    )
    load = Load(row.batch * table.length, table.length, row.passes)
    facts = devices.named(table.device)
    return scaling.step(table.mode, table.network, cluster, load, facts, alone=alone).rate / row.devices


def solved(rate: Callable[[float], float], wanted: float) -> float:
    """What a growing function has to be given to come to `wanted`, between this and eight times this."""
    low, high = wanted / 2, 8 * wanted
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rate(middle) < wanted else (low, middle)
    return high


def checked(table: Published) -> Iterator[tuple[Row, float, float]]:
    """Each row but the first with what the model says, and its error in percent."""
    first = table.rows[0]
    alone = solved(lambda rate: _per_device(table, first, rate), first.rate)
    for row in table.rows[1:]:
        said = _per_device(table, row, alone)
        yield row, said, 100 * (said / row.rate - 1)


def table_of_checks() -> str:
    """What the model says of published tables."""
    lines = [
        "| table | GPUs | rows × passes | published | model | error |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for table in PUBLISHED:
        first = table.rows[0]
        lines.append(
            f"| {table.title} ([{table.source}]({table.address})) | {first.devices} | {first.batch} × {first.passes} | "
            f"{first.rate:,.0f} | given | |"
        )
        lines += [
            f"| | {row.devices} | {row.batch} × {row.passes} | {row.rate:,.0f} | {said:,.0f} | {error:+.1f} % |"
            for row, said, error in checked(table)
        ]
    return "\n".join(lines)


def table_of_errors() -> str:
    """The same, a line for each source."""
    lines = ["| source | rows | mean error | largest |", "| --- | --- | --- | --- |"]
    by_source: dict[str, list[float]] = {}
    for table in PUBLISHED:
        name = (
            f"{table.source}, {table.title.split(', ')[1]}" if table.source == "llm-foundry" else table.source
        )
        by_source.setdefault(name, []).extend(error for *_, error in checked(table))
    for source, errors in by_source.items():
        mean = sum(map(abs, errors)) / len(errors)
        lines.append(f"| {source} | {len(errors)} | {mean:.1f} % | {max(errors, key=abs):+.1f} % |")
    published = LORA_7B[1] / LORA_7B[0]
    said = _lora_gain()
    error = 100 * (said / published - 1)
    lines.append(
        f"| [NeMo]({NEMO}), LoRA over all weights: {published:.2f} times | 1 | {abs(error):.1f} % "
        f"| {error:+.1f} % ({said:.2f}) |"
    )
    return "\n".join(lines)


def _lora_gain() -> float:
    """How many times quicker LoRA is on eight H100, computing at the same rate."""
    facts, cluster, load = devices.named("h100-80gb"), Cluster(8, 8, LINKS["nvlink-4"]), Load(4096, 4096, 4)
    whole, part = (
        scaling.step("ddp", network, cluster, load, facts).rate for network in (LLAMA_7B, ADAPTER_7B)
    )
    return part / whole


class Case(NamedTuple):
    """A model whose scaling is foretold: what one H100 makes of it, and the tokens of a pass."""

    title: str
    network: Network
    alone: float
    tokens: int


def _alone(place: int) -> float:
    """Tokens a second of one device, as the first row of a published table implies."""
    table = PUBLISHED[place]
    return solved(lambda rate: _per_device(table, table.rows[0], rate), table.rows[0].rate)


LENGTH = 2048
"""Tokens of a row, or of a pack, in what is foretold."""


def cases() -> list[Case]:
    """Models of 1, 8 and 70 billion parameters, all weights and LoRA of rank 16."""
    made = []
    for title, place, network, adapter, tokens in (
        ("1B", 0, Network(1.24e9, 16, 2048), 11.3e6, 16384),
        ("8B", 10, Network(8.03e9, 32, 4096), 41.9e6, 16384),
        ("70B", 4, Network(70.6e9, 80, 8192, again=True), 207e6, 8192),
    ):
        table = PUBLISHED[place]
        # The FLOPs a second of the published model, spent on this one.
        speed = _alone(place) * sum(table.network.flops(table.length))
        for kind, trained in (("all weights", None), ("LoRA", adapter)):
            one = Network(
                network.parameters, network.layers, network.width, trained=trained, again=network.again
            )
            made.append(Case(f"{title}, {kind}", one, speed / sum(one.flops(LENGTH)), tokens))
    return made


COUNTS = (8, 64, 1024)
FABRICS = ("infiniband-400", "ethernet-100")
H100 = devices.named("h100-80gb")


def _cluster(count: int, fabric: str) -> Cluster:
    return Cluster(count, 8, LINKS["nvlink-4"], LINKS[fabric] if count > 8 else None)


ROOM = 0.8
"""Share of a device's memory that weights, gradients and the optimizer may take; the rest is for the pass."""
STORAGE, STORAGE_LIMIT = 2e9, 50e9
"""Bytes a second that a node writes to what all nodes share, and those that this takes of all nodes together."""


def _among(mode: str, cluster: Cluster) -> int:
    """Among how many devices what a mode divides is."""
    return (cluster.part() if scaling.MODES[mode].is_by_node else cluster).devices


def held(mode: str, network: Network, cluster: Cluster) -> float:
    """Bytes of weights, gradients and AdamW's moments on a device, float32 for what is trained, and of what passes
    between devices."""
    frozen = 0.0 if network.trained is None else network.frozen_bytes * network.parameters
    weights = frozen + 4 * network.learns
    found = scaling.parts(
        mode,
        _among(mode, cluster),
        weights=weights,
        gradients=4 * network.learns,
        moments=8 * network.learns,
        layer=weights / network.layers,
        sends=network.sent / weights,
    )
    return found.weights + found.gradients + found.moments + found.gathered + found.buckets


def fits(mode: str, network: Network, cluster: Cluster, facts: devices.DeviceFacts) -> bool:
    """Whether that leaves the device enough room for the passes."""
    return held(mode, network, cluster) <= ROOM * facts.memory


def saving(mode: str, network: Network, cluster: Cluster) -> float:
    """Seconds of a checkpoint: trained weights and moments, written by the first device, or by all where they are
    divided."""
    size = 12 * network.learns
    if not any(scaling.MODES[mode].divides) or _among(mode, cluster) == 1:
        return size / STORAGE
    return size / min(STORAGE * cluster.nodes, STORAGE_LIMIT)


def doubled(rates: Mapping[int, float], *, worth: float = 1.5) -> int | None:
    """From which number of devices on twice as many bring less than `worth` times the tokens a second; None where they
    always do."""
    for number, rate in sorted(rates.items()):
        if 2 * number in rates and rates[2 * number] < worth * rate:
            return number
    return None


def _foretold(case: Case, mode: str, count: int, fabric: str) -> scaling.Step | None:
    cluster = _cluster(count, fabric)
    if not fits(mode, case.network, cluster, H100):
        return None
    load = Load(case.tokens, LENGTH)
    return scaling.step(mode, case.network, cluster, load, H100, alone=case.alone)


def _shown(found: scaling.Step | None) -> str:
    if found is None:
        return "too large"
    rate = f"{found.rate / 1e6:,.2f} M" if found.rate >= 1e6 else f"{found.rate / 1e3:,.0f} k"
    return f"{rate}, {found.efficiency:.0%}"


def table_of_predictions() -> str:
    """Tokens a second of all devices, and what is left of a device alone."""
    heads = [f"{count:,}" for count in COUNTS] + [f"{count:,} by Ethernet" for count in COUNTS[1:]]
    lines = [f"| model | mode | {' | '.join(heads)} |", "| --- " * (2 + len(heads)) + "|"]
    for case in cases():
        for mode in scaling.MODES:
            cells = [_shown(_foretold(case, mode, count, FABRICS[0])) for count in COUNTS]
            cells += [_shown(_foretold(case, mode, count, FABRICS[1])) for count in COUNTS[1:]]
            if set(cells) != {"too large"}:
                lines.append(f"| {case.title} | `{mode}` | {' | '.join(cells)} |")
    return "\n".join(lines)


STEP = 2**20
"""Tokens of a step that more and more devices share."""


def table_of_limits() -> str:
    """Up to which number of devices twice as many are worth it, where the step stays what it is."""
    lines = ["| model | mode | InfiniBand | Ethernet |", "| --- | --- | --- | --- |"]
    for case in cases():
        for mode in scaling.MODES:
            cells = []
            for fabric in FABRICS:
                rates = {}
                for count in (2**n for n in range(3, 13)):
                    cluster = _cluster(count, fabric)
                    if not fits(mode, case.network, cluster, H100):
                        continue
                    each = STEP / count
                    passes = max(round(each / case.tokens), 1)
                    load = Load(each / passes, min(LENGTH, each), passes)
                    rates[count] = scaling.step(
                        mode, case.network, cluster, load, H100, alone=case.alone
                    ).rate
                if not rates:
                    cells.append("too large")
                    continue
                end = doubled(rates)
                cells.append(f"{end:,}" if end else f"more than {max(rates) // 2:,}")
            if set(cells) != {"too large"}:
                lines.append(f"| {case.title} | `{mode}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def chat_lengths() -> list[int]:
    """Rows of chats by length: log-normal around 140 tokens (spread 0.8), up to 1,024; its thousand quantiles."""
    normal = statistics.NormalDist(math.log(140), 0.8)
    return [min(max(round(math.exp(normal.inv_cdf((n + 0.5) / 1000))), 16), 1024) for n in range(1000)]


def table_of_waiting() -> str:
    """Share of the time that the mean device waits for the fullest one."""
    lines = [
        f"| rows of a device | {' | '.join(f'{count:,} GPUs' for count in COUNTS)} |",
        "| --- " * 4 + "|",
    ]
    lengths = chat_lengths()
    for rows in (1, 4, 16, 64):
        waits = [1 - 1 / scaling.fullest(lengths, rows, count) for count in COUNTS]
        lines.append(f"| {rows} | {' | '.join(f'{wait:.0%}' for wait in waits)} |")
    return "\n".join(lines)


def table_of_saving() -> str:
    """Seconds of a checkpoint."""
    lines = [f"| model | mode | {' | '.join(f'{count:,} GPUs' for count in COUNTS)} |", "| --- " * 5 + "|"]
    for case in cases():
        for mode in ("ddp", "fsdp"):
            clusters = [_cluster(count, FABRICS[0]) for count in COUNTS]
            cells = [
                f"{saving(mode, case.network, cluster):,.1f} s"
                if fits(mode, case.network, cluster, H100)
                else "too large"
                for cluster in clusters
            ]
            if set(cells) != {"too large"}:
                lines.append(f"| {case.title} | `{mode}` | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "checks": table_of_checks,
    "errors": table_of_errors,
    "predictions": table_of_predictions,
    "limits": table_of_limits,
    "waiting": table_of_waiting,
    "saving": table_of_saving,
}


def rewritten(page: str) -> str:
    """The page with its tables made anew."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: begin (benchmarks/scaling.py --tables) -->", f"<!-- {name}: end -->"
        before, found, rest = page.partition(begin)
        assert found, f"docs/scaling.md has no place for the table {name}"
        page = f"{before}{begin}\n{table()}\n{end}{rest.partition(end)[2]}"
    return page


LAUNCHED = {
    "one process": ("-m", "tunesmith", "train"),
    "our launcher": ("-m", "tunesmith", "train"),
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tunesmith", "train"),
}  # fmt: skip
FURTHER = {"our launcher": ("--launch", "accelerate", "--processes", "2")}
WARM = 5
"""Steps at the beginning that do not count."""


class Measured(NamedTuple):
    """What a run's events say, without the first steps."""

    steps: tuple[float, ...]
    """Seconds of each step, in their order."""
    rate: float
    """Tokens a second."""


def trained(name: str, recipe: Path, work: Path, number: int) -> Measured:
    """Train the recipe in fresh processes, and read what its events say."""
    run = f"{name.replace(' ', '-')}-{number}"
    command = [sys.executable, *LAUNCHED[name], str(recipe), "--name", run, *FURTHER.get(name, ())]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    lines = (work / "runs" / run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [event for event in map(json.loads, lines) if event["kind"] == "step"][WARM - 1 :]
    spans = tuple(after["seconds"] - before["seconds"] for before, after in itertools.pairwise(steps))
    return Measured(spans, (steps[-1]["tokens"] - steps[0]["tokens"]) / sum(spans))


def typical(runs: Sequence[Measured]) -> float:
    """Seconds of a mean step, each step being the median of the runs."""
    columns = zip(*(run.steps for run in runs), strict=True)
    return statistics.fmean(statistics.median(column) for column in columns)


def longer(ours: Sequence[Measured], theirs: Sequence[Measured]) -> float:
    """By how many percent the steps of some runs are longer than those of others."""
    return 100 * (typical(ours) / typical(theirs) - 1)


def speak() -> None:
    """In one of two processes: how quickly gloo sums, told by the first."""
    import torch
    from torch import distributed

    distributed.init_process_group("gloo")
    found = {}
    for size in (2**10, 64 * 2**20):
        block = torch.ones(size // 4)
        times = []
        for _ in range(12):
            distributed.barrier()
            started = time.perf_counter()
            distributed.all_reduce(block)
            times.append(time.perf_counter() - started)
        found[size] = statistics.median(times[2:])
    if distributed.get_rank() == 0:
        small, large = found.values()
        # Of two processes each sends as much as the block is long.
        print(json.dumps({"bandwidth": 64 * 2**20 / (large - small), "latency": small / 2}))
    distributed.destroy_process_group()


def gloo() -> Link:
    """The link between two processes here, as a data sheet would have it."""
    command = [sys.executable, *LAUNCHED["torchrun"][:-3], __file__, "--speak"]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout.strip().splitlines()[-1])
    return Link("gloo", told["bandwidth"] / scaling.REACHED, told["latency"])


def foretold_here(network: Network, link: Link, load: Load, alone: float) -> float:
    """Tokens a second of two processes, from those of one."""
    facts = devices.this_cpu()
    return scaling.step("ddp", network, Cluster(2, 2, link), load, facts, alone=alone).rate


def prepared(work: Path, steps: int, rows: int) -> tuple[Path, Network, Load]:
    """The recipe, the network that it trains, and what each of two processes takes of a step."""
    sys.path.insert(0, str(Path(__file__).parent))
    import training
    import yaml

    training.write_chats(work / "rows.jsonl", steps * rows + 400)
    training.write_model(work / "model", "256x4", 8192)
    labelled = training.write_tokens(work, "sft")
    with (work / "tokens.jsonl").open(encoding="utf-8") as file:
        lengths = [len(json.loads(line)["input_ids"]) for line in file]
    assert labelled >= steps * rows, "no row is met twice"
    task = {
        "method": "sft", "adapter": {"kind": "full"}, "steps": steps, "batch": rows // 2,
        "training": {"gradient_accumulation_steps": 2, "logging_steps": 1},
    }  # fmt: skip
    settings = {**training.settings(work, task), "output_dir": str(work / "runs")}
    recipe = work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    shape = training.SHAPES["256x4"]
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    inner = layers * (4 * width**2 + 3 * width * shape["intermediate_size"])
    mean = sum(lengths) / len(lengths)
    full = scaling.fullest(lengths, rows // 2, 2)
    return recipe, Network(inner + 8192 * width, layers, width), Load(rows / 2 * mean, mean, 1, full)


def main() -> None:
    """Measure, compare, tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4, help="pairs of our launcher and torchrun")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=16, help="of a step, of which each process takes half")
    parser.add_argument("--tables", action="store_true", help="write the tables of docs/scaling.md, and end")
    parser.add_argument("--speak", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.speak:
        speak()
        return
    if args.tables:
        PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        work = Path(folder)
        recipe, network, load = prepared(work, args.steps, args.rows)
        link = gloo()
        found: dict[str, list[Measured]] = {name: [] for name in LAUNCHED}
        for number in range(args.rounds):
            pair = ["our launcher", "torchrun"] if number % 2 == 0 else ["torchrun", "our launcher"]
            for name in ["one process"] * (number % 2 == 0) + pair:
                found[name].append(trained(name, recipe, work, number))
                told = f"{typical(found[name][-1:]):.4f} s a step, {found[name][-1].rate:,.0f} tokens/s"
                print(f"{name} {number}: {told}", file=sys.stderr)
    ours, theirs = found["our launcher"], found["torchrun"]
    overhead = longer(ours, theirs)
    pairs = [round(longer([mine], [its]), 2) for mine, its in zip(ours, theirs, strict=True)]
    noise = longer(theirs[::2], theirs[1::2]) if len(theirs) > 1 else None
    rates = {name: statistics.median(each.rate for each in all_of) for name, all_of in found.items()}
    two = statistics.median(each.rate for name in list(LAUNCHED)[1:] for each in found[name])
    said = foretold_here(network, link, load, rates["one process"])
    missed = overhead > BAR
    for line in (
        f"longer than under torchrun, %: {overhead:.2f}, at most {BAR:g} wanted{': MISSED' if missed else ''}",
        f"tokens/s of one process: {rates['one process']:,.0f}, no bar",
        f"tokens/s of two: {two:,.0f}, no bar",
        f"the model's two: {said:,.0f}, no bar",
        f"its error, %: {100 * (said / two - 1):.1f}, no bar",
        f"gloo, GB/s: {link.bandwidth * scaling.REACHED / 1e9:.2f}, no bar",
    ):
        print(line, file=sys.stderr)
    result = {
        "name": "scaling", "ours": round(typical(ours), 5), "peer": round(typical(theirs), 5),
        "ratio": round(typical(theirs) / typical(ours), 4), "unit": "s a step", "n": args.rounds,
        "overhead_percent": round(overhead, 2), "bar_percent": BAR, "missed": missed, "pairs_percent": pairs,
        "noise_percent": None if noise is None else round(noise, 2),
    }  # fmt: skip
    print(json.dumps(result))
    sys.exit(int(missed))


if __name__ == "__main__":
    main()
