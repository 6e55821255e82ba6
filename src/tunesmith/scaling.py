"""What a step takes on many devices: computing, what the devices say to one another, waiting for the slowest, saving.

    seconds of a step = passes × (forward beside its traffic + backward beside its traffic) + optimizer
    traffic           = bytes × (N - 1) / N / the slowest link of the ring + steps round the ring × latency

A device alone is measured or published; the model says what is left of that on N. It knows data parallelism with and
without shards. `tunesmith plan` says with it what a run of several processes takes, and `docs/scaling.md`
(benchmarks/scaling.py) holds it against published tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tunesmith.devices import DeviceFacts

BUCKET = 25 * 2**20
"""Bytes of gradients that DDP sends together."""
BUSY = 0.6
"""Share of its own length by which traffic slows down the computing beside it: its kernels take processors and memory
bandwidth. Chosen on the rows of llm-foundry's H100 table; the other tables are predicted with it."""
REACHED = 0.8
"""Share of a link's data sheet that large messages reach (380 of 450 GB/s over NVLink 4: NVIDIA/nccl#1264)."""
BEGINNING = 8.4e-6
"""Seconds that a collective takes at least (NCCL's tuning table, ring and tree, protocol Simple)."""
MOMENTS = 28
"""Bytes a parameter that AdamW reads and writes in float32: weight, gradient, two moments, and three of them back."""


@dataclass(frozen=True)
class Link:
    """What one device sends over, in one direction."""

    name: str
    bandwidth: float
    """Bytes a second of one device, by the data sheet."""
    latency: float
    """Seconds from one device to the next."""
    is_shared: bool = False
    """Whether the bandwidth is that of a node's one card, which its devices share."""

    def of_one(self, sharing: int) -> Link:
        """What one device has of it when so many of its node send at once."""
        return replace(self, bandwidth=self.bandwidth / sharing, is_shared=False) if self.is_shared else self


LINKS: dict[str, Link] = {
    link.name: link
    for link in (
        # Bandwidths are data sheets', latencies those of NCCL's tuning table (ring, Simple).
        Link("nvlink-5", 900e9, 3.4e-6),
        Link("nvlink-4", 450e9, 3.4e-6),
        Link("nvlink-3", 300e9, 3.4e-6),
        Link("pcie-4", 32e9, 5.7e-6),
        Link("infiniband-400", 50e9, 14e-6),  # a card of 400 Gbit/s for each device
        Link("infiniband-200", 25e9, 14e-6),
        Link("ethernet-100", 12.5e9, 30e-6, is_shared=True),  # one of 100 Gbit/s for a node
        Link("ethernet-25", 3.125e9, 30e-6, is_shared=True),
        Link("this machine's memory", 1e9, 1e-4),  # gloo between two processes on two cores: 0.6 to 0.9 GB/s
    )
}

CONNECTED = {
    "b200": ("nvlink-5", "infiniband-400"), "h200": ("nvlink-4", "infiniband-400"),
    "h100-80gb": ("nvlink-4", "infiniband-400"), "a100-80gb": ("nvlink-3", "infiniband-200"),
    "a100-40gb": ("nvlink-3", "infiniband-200"), "cpu": ("this machine's memory", "ethernet-25"),
}  # fmt: skip
"""How devices are connected in a node and between nodes, where nothing else is known."""
PLAIN = ("pcie-4", "ethernet-100")
"""How those are that stand in no such table."""


@dataclass(frozen=True)
class Cluster:
    """Devices that train together."""

    devices: int
    per_node: int
    """Devices of a node."""
    inside: Link
    between: Link | None = None
    """None where all are in one node."""

    def __post_init__(self) -> None:
        assert self.nodes == 1 or self.between, "nodes have a link between them"

    @property
    def nodes(self) -> int:
        """Machines; the last one may not be full."""
        return -(-self.devices // self.per_node)

    @property
    def rate(self) -> float:
        """Bytes a second round a ring through all devices: each passes on as fast as it receives, and a node as fast as
        its cards together."""
        inside = self.inside.bandwidth
        if self.nodes == 1 or self.between is None:
            return REACHED * inside
        cards = 1 if self.between.is_shared else min(self.per_node, self.devices)
        return REACHED * min(inside, self.between.bandwidth * cards)

    def gather(self, size: float) -> float:
        """Seconds in which every device gets a whole of `size` bytes, of which each has a part; or, the other way
        round, in which each gets its part of a sum."""
        if self.devices == 1:
            return 0.0
        across = self.nodes - 1
        hops = (self.devices - 1 - across) * self.inside.latency
        hops += across * self.between.latency if self.between else 0.0
        return BEGINNING + hops + size * (self.devices - 1) / self.devices / self.rate

    def reduce(self, size: float) -> float:
        """Seconds in which every device gets the sum of `size` bytes: round a ring twice, or up and down a tree."""
        if self.devices == 1:
            return 0.0
        ring = 2 * self.gather(size) - BEGINNING
        between = self.between.latency if self.between else 0.0
        deep = min(self.per_node, self.devices) - 1
        up = deep * self.inside.latency + math.ceil(math.log2(self.nodes)) * between
        return min(ring, BEGINNING + 2 * up + 2 * size / self.rate)

    def part(self) -> Cluster:
        """One of its nodes."""
        return replace(self, devices=min(self.devices, self.per_node), between=None)

    def twins(self) -> Cluster:
        """The devices of one place in every node, which speak while those of the other places do."""
        assert self.between is not None
        return replace(self, devices=self.nodes, per_node=1, between=self.between.of_one(self.per_node))


@dataclass(frozen=True)
class Network:
    """A model in numbers, and how it is trained."""

    parameters: float
    layers: int
    width: int
    trained: float | None = None
    """Parameters that are trained; None for all."""
    again: bool = False
    """Whether the backward pass computes the forward again (gradient checkpointing)."""
    frozen_bytes: float = 2
    """Bytes of a weight that is not trained: 2 in bfloat16, 0.5 in four bits."""
    gathered_bytes: float = 2
    """Bytes in which a trained weight is sent to the others."""
    gradient_bytes: float = 4
    """Bytes in which a gradient is summed."""

    @property
    def learns(self) -> float:
        """Parameters that are trained."""
        return self.parameters if self.trained is None else self.trained

    def flops(self, length: float) -> tuple[float, float]:
        """FLOPs a token in the forward and in the backward pass, in rows of this length.

        Each weight is a product and a sum; attention looks back over half of the row on average. Backwards the same for
        the gradients of the inputs, and once more for those of the weights that are trained.
        """
        attention = 2 * self.layers * self.width * length
        forward = 2 * self.parameters + attention
        return forward, forward + attention + 2 * self.learns + (forward if self.again else 0.0)

    @property
    def sent(self) -> float:
        """Bytes of all weights as they are sent."""
        if self.trained is None:
            return self.gathered_bytes * self.parameters
        return self.frozen_bytes * self.parameters + self.gathered_bytes * self.trained


@dataclass(frozen=True)
class Load:
    """What a device does in a step."""

    tokens: float
    """Trained with in one pass, on average."""
    length: float
    """Of a row."""
    passes: int = 1
    fullest: float = 1.0
    """Tokens of the fullest device's pass, over the mean (`fullest`)."""
    fullest_step: float | None = None
    """The same of a whole step, for modes whose devices wait for each other once a step; by default as in a pass."""


@dataclass(frozen=True)
class Traffic:
    """Seconds that devices speak with one another, by what goes on beside it."""

    forward: float = 0.0
    """In each pass, beside its forward."""
    backward: float = 0.0
    last: float = 0.0
    """Once a step, beside its last backward."""
    after: float = 0.0
    """Once a step, beside nothing."""
    sent: float = 0.0
    """Bytes that a device sends in a step."""
    shards: int = 1
    """Among how many devices the optimizer's work is divided."""
    waits_each_pass: bool = False


def _ddp(network: Network, cluster: Cluster, load: Load) -> Traffic:
    size = network.gradient_bytes * network.learns
    buckets = max(math.ceil(size / BUCKET), 1)
    share = 2 * (cluster.devices - 1) / cluster.devices
    return Traffic(last=buckets * cluster.reduce(size / buckets), sent=share * size)


def _optimizer_in_shards(network: Network, cluster: Cluster, load: Load) -> Traffic:
    gradients, weights = network.gradient_bytes * network.learns, 4 * network.learns
    buckets = max(math.ceil(gradients / BUCKET), 1)
    share = (cluster.devices - 1) / cluster.devices
    return Traffic(
        last=buckets * cluster.gather(gradients / buckets),
        after=cluster.gather(weights),
        sent=share * (gradients + weights),
        shards=cluster.devices,
    )


def _gradients_in_shards(network: Network, cluster: Cluster, load: Load) -> Traffic:
    once = _optimizer_in_shards(network, cluster, load)
    gradients = network.gradient_bytes * network.learns * (cluster.devices - 1) / cluster.devices
    return replace(
        once,
        last=0.0,
        backward=once.last,
        sent=once.sent + (load.passes - 1) * gradients,
        waits_each_pass=True,
    )


def _all_in_shards(network: Network, cluster: Cluster, load: Load) -> Traffic:
    weights, gradients = network.sent, network.gradient_bytes * network.learns
    gathered = network.layers * cluster.gather(weights / network.layers)
    summed = network.layers * cluster.gather(gradients / network.layers)
    share = (cluster.devices - 1) / cluster.devices
    return Traffic(
        forward=gathered,
        backward=gathered + summed,
        sent=load.passes * share * (2 * weights + gradients),
        shards=cluster.devices,
        waits_each_pass=True,
    )


def _all_in_shards_kept(network: Network, cluster: Cluster, load: Load) -> Traffic:
    given = _all_in_shards(network, cluster, load)
    again = network.sent * (cluster.devices - 1) / cluster.devices
    return replace(given, backward=given.backward - given.forward, sent=given.sent - load.passes * again)


def _in_shards_by_node(network: Network, cluster: Cluster, load: Load) -> Traffic:
    inside = _all_in_shards(network, cluster.part(), load)
    if cluster.nodes == 1:
        return inside
    gradients = network.gradient_bytes * network.learns / cluster.per_node
    twins = cluster.twins()
    return replace(
        inside,
        last=network.layers * twins.reduce(gradients / network.layers),
        sent=inside.sent + 2 * (twins.devices - 1) / twins.devices * gradients,
    )


@dataclass(frozen=True)
class Mode:
    """A way to divide the work."""

    about: str
    traffic: Callable[[Network, Cluster, Load], Traffic]
    divides: tuple[bool, bool, bool]
    """Whether weights, gradients and moments are divided."""
    is_by_node: bool = False
    """Whether they are so among the devices of a node, and not among all."""
    keeps: bool = False
    """Whether gathered weights stay until the end of the backward."""


MODES: dict[str, Mode] = {
    "ddp": Mode("every device has all; gradients are summed once a step", _ddp, (False, False, False)),
    "zero-1": Mode("the optimizer's moments are divided", _optimizer_in_shards, (False, False, True)),
    "zero-2": Mode("gradients as well", _gradients_in_shards, (False, True, True)),
    "fsdp": Mode(
        "weights as well (ZeRO-3): each layer is fetched when it is used, forward and backward",
        _all_in_shards,
        (True, True, True),
    ),
    "fsdp-kept": Mode(
        "as fsdp, and weights are kept from the forward to the backward (parallel.reshard_after_forward false)",
        _all_in_shards_kept,
        (True, True, True),
        keeps=True,
    ),
    "hybrid": Mode(
        "FSDP inside each node, the nodes sum their gradients once a step; foretold, and not offered",
        _in_shards_by_node,
        (True, True, True),
        is_by_node=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """What a step takes, in seconds of a device."""

    computing: float
    """Of the mean device."""
    waiting: float
    """For the device with the most tokens."""
    speaking: float
    """That is not hidden behind computing, or slows it down."""
    optimizer: float
    tokens: float
    """Of all devices."""
    sent: float
    """Bytes that a device sends."""
    alone: float
    """Seconds that the same tokens of a device take without the others."""

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.computing + self.waiting + self.speaking + self.optimizer

    @property
    def rate(self) -> float:
        """Tokens a second of all devices."""
        return self.tokens / self.seconds

    @property
    def efficiency(self) -> float:
        """Tokens a second of a device, over those of one that trains alone."""
        return self.alone / self.seconds


def step(
    mode: str, network: Network, cluster: Cluster, load: Load, facts: DeviceFacts, *, alone: float | None = None,
    update: float | None = None,
) -> Step:  # fmt: skip
    """The step of a mode on these devices.

    `alone` is the tokens a second that one device was measured at; without it they follow from the device's peak and
    the share of it that large products reach. `update` is the seconds of the optimizer on one device, where they are
    known.
    """
    traffic = MODES[mode].traffic(network, cluster, load)
    forward, backward = network.flops(load.length)
    speed = facts.peak("bfloat16") * facts.product_share
    if update is None:
        update = MOMENTS * network.learns / (facts.bandwidth * facts.bandwidth_share)
    if alone is not None:  # which includes what the optimizer took
        worked = load.passes * load.tokens / alone - update
        speed = (forward + backward) * load.tokens * load.passes / max(worked, 1e-9)
    ahead, back = forward * load.tokens / speed, backward * load.tokens / speed
    each, whole = load.fullest, load.fullest_step or load.fullest
    factor = each if traffic.waits_each_pass else whole
    computing = load.passes * (ahead + back)
    one = _beside(factor * ahead, traffic.forward, network.layers)
    one += _beside(factor * back, traffic.backward, network.layers)
    final = _beside(factor * back, traffic.backward + traffic.last, network.layers)
    final -= _beside(factor * back, traffic.backward, network.layers)
    total = load.passes * one + final + traffic.after
    waiting = (factor - 1) * computing
    return Step(
        computing=computing,
        waiting=waiting,
        speaking=total - computing - waiting,
        optimizer=update / traffic.shards,
        tokens=cluster.devices * load.passes * load.tokens,
        sent=traffic.sent,
        alone=computing + update,
    )


def _beside(computing: float, speaking: float, layers: int) -> float:
    """Seconds of both at once, layer by layer: traffic slows down what it runs beside, and one layer's has nothing to
    run beside."""
    if not speaking:
        return computing
    return max(computing + BUSY * min(computing, speaking), speaking) + speaking / layers


@dataclass(frozen=True)
class Held:
    """Bytes that one of several devices holds of a model between and in its passes."""

    weights: float
    gradients: float
    moments: float
    gathered: float
    """Of other devices' weights, for the layers that are run."""
    buckets: float
    """Of gradients on their way to the other devices."""


def parts(
    mode: str, among: int, *, weights: float, gradients: float, moments: float, layer: float, rest: float = 0.0,
    packed: float = 0.0, sends: float = 1.0,
) -> Held:  # fmt: skip
    """What a device holds in a mode that divides `among` so many, from the bytes that it would hold alone.

    `layer` is the largest layer's weights and `rest` those outside of the layers, which travel as `sends` of their
    bytes; `packed` are weights that cannot be cut and belong to neither. While a layer is run the next one is fetched,
    and the rest stays for the whole pass; all does in a mode that `keeps` it.
    """
    of_weights, of_gradients, of_moments = (among if is_cut else 1 for is_cut in MODES[mode].divides)
    cut = weights - packed
    gathered = buckets = 0.0
    if of_weights > 1:
        gathered = sends * (cut if MODES[mode].keeps else min(2 * layer + rest, cut))
    if of_gradients > 1:
        buckets = sends * min(gradients, layer + rest)
    elif mode == "ddp" and among > 1:  # a second place for all of them, from which they are summed
        buckets = gradients
    return Held(packed + cut / of_weights, gradients / of_gradients, moments / of_moments, gathered, buckets)


def fullest(lengths: Sequence[int], rows: int, devices: int, *, bins: int = 2048) -> float:
    """Tokens of the fullest of so many devices, each with `rows` rows drawn of these lengths, over the mean.

    The expected maximum follows from the distribution of a device's sum, which is that of one row folded `rows` times;
    lengths are counted in steps of the longest row's `bins`-th part.
    """
    import numpy as np

    given = np.asarray(lengths, dtype=np.float64)
    unit = max(given.max() / bins, 1.0)
    counts = np.bincount(np.rint(given / unit).astype(np.int64))
    size = rows * (len(counts) - 1) + 1
    spectrum = np.fft.rfft(counts / counts.sum(), n=2 ** math.ceil(math.log2(max(size, 2)))) ** rows
    density = np.clip(np.fft.irfft(spectrum)[:size], 0.0, None)
    below = np.minimum(np.cumsum(density) / density.sum(), 1.0)
    mean = float((1 - below[:-1]).sum())
    return float((1 - below[:-1] ** devices).sum()) / mean
