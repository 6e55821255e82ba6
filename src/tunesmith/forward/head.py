"""Log-probabilities of labels from hidden states, some positions at a time, with exact gradients and no logits kept.

With z the logits (scaled, capped, divided by the temperature) and p = softmax(z), the derivative of log p[label] by z
is onehot(label) - p, and that of the entropy H is -p (log p + H).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

BYTES = 2**27
"""Logits that are held at a time: 256 positions of the larger vocabularies, which was the fastest on CPUs."""
CUDA_BYTES = 2**29
"""The same on GPUs, where it is the only limit: some 900 positions of the larger vocabularies. Every chunk reads the
head and, where it is trained, reads and writes the sum of its gradients in float32, which by bandwidth and FLOPs takes
longer than the products of 256 positions. Worked out, not measured."""
HALVED = 1024.0
"""Sum of the probabilities of a position in float16: far from its end, and from where its small numbers vanish."""
POSITIONS = 256
"""Most positions at a time; with more of them the logits leave the processor's cache before they are used."""
CACHED = 2**22
"""Bytes of logits that a CPU goes through at a time, once they are computed: what its caches hold, so that they come
from memory once, and what is needed beside them is as little."""
KEPT = 2**27
"""Bytes of probabilities that may wait for the backward pass where labels weigh differently: as much as one chunk of
the larger vocabularies takes anyhow. Beyond, they are computed again, which costs a product more."""


@dataclass(frozen=True)
class Reading:
    """How a model reads logits off its head, and what is asked of them."""

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None
    outputs: tuple[str, ...] = ("log_probs",)
    """Of log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1."""
    alike: bool = False
    """Whether every label is expected to have the same weight in the loss; if not, the gradient is computed again."""
    device: str | None = None
    """Kind of device that a hollow model is planned for; None for the one that the numbers are on."""


class Found(NamedTuple):
    """What the head gives for each label; None for what was not asked."""

    log_probs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


def read(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, reading: Reading) -> Found:
    """Log-probabilities of `targets` (labels,) given `hidden` (labels, width), and what else is asked."""
    apply: Any = _Head.apply
    return Found(*apply(hidden, weight, bias, targets, reading, torch.is_grad_enabled()))


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        reading: Reading,
        learns: bool,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.reading, ctx.dtype = reading, _type(hidden)
        needed = [learns and need for need in ctx.needs_input_grad[:3]]
        # The gradient of the hidden states can be scaled label by label afterwards; that of the weights is one sum
        # over all labels, and can be only where these weigh the same.
        ahead = any(needed) and (reading.alike or not any(needed[1:]))
        pieces: list[Found] = []
        table = weight.to(ctx.dtype)
        gradients = _Gradients(hidden, weight, table, bias, needed, reading) if ahead else None
        whole = 4 * len(hidden) * len(weight)
        plain = reading.softcap is None and "entropy" not in reading.outputs
        keeps = any(needed) and not ahead and plain and whole <= KEPT
        kept: list[tuple[Tensor, Tensor]] = []
        for part, logits, factor in _chunks(hidden, table, bias, reading, fresh=keeps):
            labels = targets[part][:, None]
            few = _at_a_time(logits, reading)
            totals = []
            for rows, own in zip(torch.split(logits, few), torch.split(labels, few), strict=True):
                piece, total = _to_masses(rows, own, reading, counts_first=ctx.dtype != torch.float32)
                pieces.append(piece)
                totals.append(total)
            masses, total = logits, torch.cat(totals)
            if gradients:
                gradients.add(part, masses, -1 / total, labels, torch.ones_like(total), factor)
            elif keeps:
                kept.append((masses, total))
        found = tuple(
            None if column[0] is None else torch.cat(column) for column in zip(*pieces, strict=True)
        )
        ctx.ahead, ctx.kept = gradients is not None, kept
        if gradients:
            ctx.save_for_backward(
                hidden, weight, bias, targets, gradients.hidden, gradients.weight, gradients.bias
            )
        elif any(needed):
            ctx.save_for_backward(hidden, weight, bias, targets, None, None, None)
        ctx.mark_non_differentiable(*(found[n] for n in (2, 3, 4) if found[n] is not None))
        return found

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        by_log, by_entropy = given[:2]
        hidden, weight, bias, targets, *ready = ctx.saved_tensors
        if by_log is None and by_entropy is None:
            return (None,) * 6
        needed = list(ctx.needs_input_grad[:3])
        if ctx.ahead and by_entropy is None:
            assert by_log is not None
            of_hidden, of_weight, of_bias = ready
            # Hollow numbers, which a plan is made with, cannot be compared: they are taken to be as expected.
            same = by_log.is_meta or not len(by_log) or bool((by_log == by_log[0]).all())
            if same or not any(needed[1:]):
                first = by_log[0] if len(by_log) else by_log.new_ones(())
                return (
                    None if of_hidden is None else (of_hidden * by_log[:, None]).to(hidden.dtype),
                    None if of_weight is None else of_weight.mul_(first).to(weight.dtype),
                    None if of_bias is None or bias is None else (of_bias * first).to(bias.dtype),
                    None,
                    None,
                    None,
                )
        table = weight.to(ctx.dtype)
        gradients = _Gradients(hidden, weight, table, bias, needed, ctx.reading)
        if kept := ctx.kept:
            assert by_log is not None
            ctx.kept = []  # used up; a second backward pass computes them again
            begin = 0
            for masses, total in kept:
                part = slice(begin, begin + len(masses))
                begin = part.stop
                own = by_log[part][:, None]
                gradients.add(part, masses, -own / total, targets[part][:, None], own, None)
            return gradients.found(hidden, weight, bias)
        for part, logits, factor in _chunks(hidden, table, bias, ctx.reading):
            labels = targets[part][:, None]
            top = logits.amax(1, keepdim=True)
            masses = logits.sub_(top).exp()
            total = masses.sum(1, keepdim=True)
            given_log = torch.zeros_like(total) if by_log is None else by_log[part][:, None]
            if by_entropy is None:
                gradients.add(part, masses, -given_log / total, labels, given_log, factor)
                continue
            given_entropy = by_entropy[part][:, None]
            logs, masses = logits.sub_(total.log()), masses.div_(total)
            entropy = -(masses * logs).sum(1, keepdim=True)
            pull = -masses * (given_log + given_entropy * (logs + entropy))
            gradients.add(part, pull, torch.ones_like(total), labels, given_log, factor)
        return gradients.found(hidden, weight, bias)


def _at_a_time(logits: Tensor, reading: Reading) -> int:
    """Positions whose logits are gone through together: on a CPU those that its cache holds from pass to pass."""
    if _device(logits, reading) not in ("cpu", "meta"):
        return max(len(logits), 1)
    return max(CACHED // (4 * logits.shape[1]), 1)


def _to_masses(
    logits: Tensor, labels: Tensor, reading: Reading, *, counts_first: bool
) -> tuple[Found, Tensor]:
    """Turn logits into exp(z - max z) in place; gives what is asked of them, and the sums of these (positions, 1)."""
    asked = reading.outputs
    own = logits.gather(1, labels)
    means = logits.mean(1) if "mean_logits" in asked else None
    is_top = entropy = squares = None
    if "is_top1" in asked and counts_first:
        # Of equal ones the first counts. In float32 none are equal, and finding where the largest is takes ten times
        # as long as finding it.
        is_top = (logits.argmax(1, keepdim=True) == labels).squeeze(1)
    top = logits.amax(1, keepdim=True)
    if "is_top1" in asked and not counts_first:
        is_top = (own >= top).squeeze(1)
    logits.sub_(top)
    if "entropy" in asked:
        masses = logits.exp()
        total = masses.sum(1, keepdim=True)
        mean = logits.mul_(masses).sum(1, keepdim=True) / total
        logits.copy_(masses)
        entropy = (total.log() - mean).squeeze(1)
    else:
        total = logits.exp_().sum(1, keepdim=True)
    log_total = total.log()
    if "log_sum_sq_probs" in asked:
        squares = (logits * logits).sum(1).log() - 2 * log_total.squeeze(1)
    return Found((own - top - log_total).squeeze(1), entropy, squares, means, is_top), total


def _device(tensor: Tensor, reading: Reading) -> str:
    """The kind of device that this is for: of a plan, the one that it is made for."""
    return reading.device or tensor.device.type


def _type(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _chunks(
    hidden: Tensor,
    table: Tensor,
    bias: Tensor | None,
    reading: Reading,
    *,
    fresh: bool = False,
) -> Any:
    """Positions, their logits in float32 in one buffer that is used again unless `fresh` is set, and the derivative of
    capping. `table` is the head in the type of the products."""
    dtype = table.dtype
    if _device(hidden, reading) == "cuda":
        size = max(CUDA_BYTES // (4 * len(table)), 1)
    else:
        size = max(min(POSITIONS, BYTES // (4 * len(table))), 1)
    buffer = hidden.new_empty(min(size, max(len(hidden), 1)), len(table), dtype=dtype)
    for start in range(0, len(hidden), size):
        part = slice(start, min(start + size, len(hidden)))
        logits = torch.empty_like(buffer) if fresh and start else buffer
        logits = logits[: part.stop - part.start]
        torch.mm(hidden[part].to(dtype), table.t(), out=logits)
        if bias is not None:
            logits.add_(bias.to(dtype))
        logits = logits.float()
        if reading.scale != 1.0:
            logits.mul_(reading.scale)
        factor = None
        if reading.softcap is not None:
            logits.div_(reading.softcap).tanh_()
            factor = 1 - logits * logits
            logits.mul_(reading.softcap)
        if reading.temperature != 1.0:
            logits.div_(reading.temperature)
        yield part, logits, factor


class _Gradients:
    """Sums of gradients over the positions, of what is trained."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        table: Tensor,
        bias: Tensor | None,
        needed: list[bool],
        reading: Reading,
    ) -> None:
        self.states, self.exact, self.table, self.dtype = hidden, weight, table, table.dtype
        self.slope = reading.scale / reading.temperature
        self.hidden = torch.zeros_like(hidden, dtype=torch.float32) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if needed[2] and bias is not None else None

    def found(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        """What autograd is given for the six arguments."""
        return (
            None if self.hidden is None else self.hidden.to(hidden.dtype),
            None if self.weight is None else self.weight.to(weight.dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
            None,
            None,
            None,
        )

    def add(
        self, part: slice, pull: Tensor, each: Tensor, labels: Tensor, own: Tensor, factor: Tensor | None
    ) -> None:
        """Add what comes of some positions, whose derivatives by their logits are `pull` times `each`, and `own` more
        at their labels. `pull` is used up."""
        if factor is not None:  # of capping: inside of it, where the label's is another as well
            own, _ = own * factor.gather(1, labels), pull.mul_(factor)
        each, own = each * self.slope, own * self.slope
        names, states = labels.squeeze(1), self.states[part]
        if self.bias is not None:
            self.bias += (pull * each).sum(0).index_add_(0, names, own.squeeze(1))
        if self.dtype == torch.float16:
            # Undivided, these add up to as much as the vocabulary, and half a number ends at 65,504.
            pull, each = pull.mul_(each * HALVED), torch.full_like(each, 1 / HALVED)
        pull = pull.to(self.dtype)
        if self.hidden is not None:
            # Scaled where it is narrow, which spares a pass over the vocabulary.
            found = self.hidden[part]
            if self.dtype == torch.float32:
                torch.mm(pull, self.table, out=found).mul_(each)
            else:
                found.copy_((pull @ self.table).float() * each)
            found.addcmul_(self.exact[names].float(), own)
        if self.weight is not None:
            scaled = states.float() * each
            if self.dtype == torch.float32:
                self.weight.addmm_(pull.t(), scaled)
            else:
                self.weight += (pull.t() @ scaled.to(self.dtype)).float()
            self.weight.index_add_(0, names, states.float() * own)
