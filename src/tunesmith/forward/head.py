"""Log-probabilities of labels from hidden states, some positions at a time, with exact gradients and no logits kept.

With z the logits (scaled, capped, divided by the temperature) and p = softmax(z), the derivative of log p[label] by z
is onehot(label) - p, and that of the entropy H is -p (log p + H).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tunesmith.forward.activations import first_order

BYTES = 2**27
"""Logits that are held at a time: 256 positions of the larger vocabularies, which was the fastest on CPUs."""
CUDA_BYTES = 2**29
"""The same on GPUs, where it is the only limit: some 900 positions of the larger vocabularies. Every chunk reads the
head and, where it is trained, reads and writes the sum of its gradients in float32, which by bandwidth and FLOPs takes
longer than the products of 256 positions. Worked out, not measured."""
HALVED = 1024.0
"""Sum of the probabilities of a position in float16: far from its end, and from where its small numbers vanish."""
POSITIONS = 256
"""Most positions at a time; with more of them logits take more memory than they save time."""
CACHED = 2**22
"""Bytes of logits that a CPU computes at a time, by so many words of the vocabulary: what its caches hold, so that each
is gone through right after its product, which is itself faster than one by all words."""
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
        table = _Table(weight.to(ctx.dtype), bias, reading)
        gradients = _Gradients(hidden, weight, table, needed) if ahead else None
        whole = 4 * len(hidden) * len(weight)
        plain = reading.softcap is None and "entropy" not in reading.outputs
        keeps = any(needed) and not ahead and plain and whole <= KEPT
        results: list[Found] = []
        kept: list[_Masses] = []
        parts = _parts(hidden, table)
        room = None if keeps else table.room(parts[0])
        for part in parts:
            masses = _masses(hidden[part], targets[part][:, None], table, room)
            results.append(masses.found())
            if gradients:
                gradients.add(part, masses, targets[part], torch.ones_like(masses.total))
            elif keeps:
                kept.append(masses)
            del masses  # before there are others
        found = tuple(
            None if column[0] is None else torch.cat(column) for column in zip(*results, strict=True)
        )
        ctx.ahead, ctx.kept = gradients is not None, kept
        if gradients:
            ctx.save_for_backward(hidden, weight, bias, targets, gradients.hidden, gradients.bias)
        elif any(needed):
            ctx.save_for_backward(hidden, weight, bias, targets, None, None)
        # As large as the weights and scaled in place: given away in the first backward pass.
        ctx.of_weight = gradients.weight if gradients else None
        ctx.mark_non_differentiable(*(found[n] for n in (2, 3, 4) if found[n] is not None))
        return found

    @staticmethod
    @first_order
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        by_log, by_entropy = given[:2]
        hidden, weight, bias, targets, *ready = ctx.saved_tensors
        if by_log is None and by_entropy is None:
            return (None,) * 6
        needed = list(ctx.needs_input_grad[:3])
        of_weight, ctx.of_weight = ctx.of_weight, None
        is_there = ctx.ahead and (of_weight is not None or not needed[1])
        if is_there and by_entropy is None:
            assert by_log is not None
            of_hidden, of_bias = ready
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
        del of_weight
        table = _Table(weight.to(ctx.dtype), bias, ctx.reading)
        gradients = _Gradients(hidden, weight, table, needed)
        kept, ctx.kept = ctx.kept, []  # used up; a second backward pass computes them again
        kept.reverse()
        parts = _parts(hidden, table)
        room = None if kept else table.room(parts[0])
        for part in parts:
            own = (
                hidden.new_zeros(len(hidden[part]), 1, dtype=torch.float32)
                if by_log is None
                else by_log[part][:, None]
            )
            masses = kept.pop() if kept else _masses(hidden[part], targets[part][:, None], table, room)
            entropy = None if by_entropy is None else by_entropy[part][:, None]
            gradients.add(part, masses, targets[part], own, entropy)
            del masses
        return gradients.found()


@dataclass(frozen=True)
class _Table:
    """A head, and how logits are read off it."""

    weight: Tensor
    """(words, width), in the type of the products."""
    bias: Tensor | None
    reading: Reading

    @property
    def device(self) -> str:
        """The kind of device that this is for: of a plan, the one that it is made for."""
        return self.reading.device or self.weight.device.type

    def pieces(self, positions: int) -> list[slice]:
        """The words whose logits for so many positions are computed at a time."""
        words = len(self.weight)
        size = max(CACHED // (4 * max(positions, 1)), 1) if self.device in ("cpu", "meta") else words
        return [slice(start, min(start + size, words)) for start in range(0, words, size)]

    def room(self, part: slice) -> Tensor | None:
        """For the masses of so many positions at a time, one after the other, where they are computed in pieces: many
        pieces that come and go leave holes in a process's memory."""
        positions = part.stop - part.start
        if len(self.pieces(positions)) == 1:
            return None
        return torch.empty(positions, len(self.weight), device=self.weight.device)

    def logits(self, states: Tensor, words: slice) -> tuple[Tensor, Tensor | None]:
        """Logits (positions, words) in float32, and the derivative of capping."""
        weight = self.weight[words]
        logits = torch.mm(states, weight.t())
        if self.bias is not None:
            logits.add_(self.bias[words].to(logits.dtype))
        logits = logits.float()
        reading = self.reading
        if reading.scale != 1.0:
            logits.mul_(reading.scale)
        factor = None
        if reading.softcap is not None:
            logits.div_(reading.softcap).tanh_()
            factor = 1 - logits * logits
            logits.mul_(reading.softcap)
        if reading.temperature != 1.0:
            logits.div_(reading.temperature)
        return logits, factor


class _Piece(NamedTuple):
    """Of some words of the vocabulary, for each of some positions; sums are `(positions, 1)`."""

    words: slice
    masses: Tensor
    """(positions, words): exp(z - top), computed in the place of others where there is one."""
    factor: Tensor | None
    """Of the same shape: the derivative of capping."""
    top: Tensor
    """The largest logit."""
    total: Tensor
    """Sum of the masses."""
    label: Tensor
    """The label's logit; 0 where it is not of these words."""
    best: Tensor | None
    """Number of the first of the largest logits."""
    weighed: Tensor | None
    """Sum of (z - top) exp(z - top)."""
    squares: Tensor | None
    """Sum of the squares of the masses."""
    plain: Tensor | None
    """Sum of the logits."""


@dataclass
class _Masses:
    """exp(z - max z) of some positions over the whole vocabulary, by pieces that have a maximum each."""

    pieces: list[_Piece]
    labels: Tensor
    """(positions, 1)"""
    asked: tuple[str, ...]

    def __post_init__(self) -> None:
        tops = torch.cat([piece.top for piece in self.pieces], 1)
        self.top = tops.amax(1, keepdim=True)
        self.below = (tops - self.top).clamp_(min=-1e4)  # no infinity, which times nothing is no number
        """(positions, pieces): how much smaller the largest logit of a piece is."""
        self.scales = self.below.exp()
        """What makes the masses of a piece those of the whole."""
        self.totals = torch.cat([piece.total for piece in self.pieces], 1) * self.scales
        self.total = self.totals.sum(1, keepdim=True)

    @cached_property
    def label(self) -> Tensor:
        """(positions, 1): the label's logit."""
        return torch.cat([piece.label for piece in self.pieces], 1).sum(1, keepdim=True)

    def sure(self) -> Tensor:
        """(positions, 1): where the label has most of the probability."""
        return (self.label - self.top).exp() > 0.5 * self.total

    def entropy(self) -> Tensor:
        """(positions, 1)"""
        weighed = torch.cat([piece.weighed for piece in self.pieces if piece.weighed is not None], 1)
        mean = (weighed * self.scales + self.totals * self.below).sum(1, keepdim=True) / self.total
        return self.total.log() - mean

    def found(self) -> Found:
        """What is asked of them."""
        log_total, label = self.total.log(), self.label
        is_top = squares = means = None
        if "is_top1" in self.asked:
            # Of equal ones the first counts. In float32 none are equal, and finding where the largest is takes ten
            # times as long as finding it.
            is_top = (label >= self.top).squeeze(1)
            if self.pieces[0].best is not None:
                best = torch.cat([piece.best for piece in self.pieces if piece.best is not None], 1)
                first = (self.below == 0).int().argmax(1, keepdim=True)
                is_top = (best.gather(1, first) == self.labels).squeeze(1)
        if "log_sum_sq_probs" in self.asked:
            each = torch.cat([piece.squares for piece in self.pieces if piece.squares is not None], 1)
            squares = ((each * self.scales**2).sum(1, keepdim=True).log() - 2 * log_total).squeeze(1)
        if "mean_logits" in self.asked:
            sums = [piece.plain for piece in self.pieces if piece.plain is not None]
            means = torch.cat(sums, 1).sum(1) / self.pieces[-1].words.stop
        entropy = self.entropy().squeeze(1) if "entropy" in self.asked else None
        return Found((label - self.top - log_total).squeeze(1), entropy, squares, means, is_top)


def _parts(hidden: Tensor, table: _Table) -> list[slice]:
    """Positions at a time."""
    words = len(table.weight)
    most = CUDA_BYTES // (4 * words) if table.device == "cuda" else min(POSITIONS, BYTES // (4 * words))
    size = max(most, 1)
    return [slice(start, min(start + size, len(hidden))) for start in range(0, max(len(hidden), 1), size)]


def _masses(hidden: Tensor, labels: Tensor, table: _Table, room: Tensor | None) -> _Masses:
    states, count = hidden.to(table.weight.dtype), len(hidden)
    pieces = []
    for words in table.pieces(count):
        place = None
        if room is not None:
            place = room.view(-1)[count * words.start : count * words.stop].view(count, -1)
        pieces.append(_piece(states, labels, table, words, place))
    return _Masses(pieces, labels, table.reading.outputs)


def _piece(states: Tensor, labels: Tensor, table: _Table, words: slice, place: Tensor | None) -> _Piece:
    logits, factor = table.logits(states, words)
    asked = table.reading.outputs
    inside, numbers = _places(labels, words)
    label = logits.gather(1, numbers).masked_fill_(~inside, 0.0)
    plain = logits.sum(1, keepdim=True) if "mean_logits" in asked else None
    best = None
    if "is_top1" in asked and states.dtype != torch.float32:
        best = logits.argmax(1, keepdim=True) + words.start
    top = logits.amax(1, keepdim=True).clamp_(
        min=torch.finfo(torch.float32).min
    )  # of words that are ruled out
    logits.sub_(top)
    weighed = None
    if "entropy" in asked:
        masses = torch.exp(logits, out=place)
        weighed = logits.mul_(masses).sum(1, keepdim=True)
    else:
        masses = torch.exp(logits, out=logits if place is None else place)
    total = masses.sum(1, keepdim=True)
    squares = (masses * masses).sum(1, keepdim=True) if "log_sum_sq_probs" in asked else None
    return _Piece(words, masses, factor, top, total, label, best, weighed, squares, plain)


def _type(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _Gradients:
    """Sums of gradients over the positions, of what is trained."""

    def __init__(self, hidden: Tensor, weight: Tensor, table: _Table, needed: list[bool]) -> None:
        self.states, self.exact, self.table = hidden, weight, table
        self.types = hidden.dtype, weight.dtype
        self.hidden = torch.zeros_like(hidden, dtype=torch.float32) if needed[0] else None
        self.weight = torch.empty_like(weight, dtype=torch.float32) if needed[1] else None
        self.is_first = True
        """Whether nothing has been added to that of the weights, whose numbers mean nothing yet."""
        bias = table.bias
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if needed[2] and bias is not None else None

    def found(self) -> tuple[Tensor | None, ...]:
        """What autograd is given for the six arguments."""
        bias = self.table.bias
        return (
            None if self.hidden is None else self.hidden.to(self.types[0]),
            None if self.weight is None else self.weight.to(self.types[1]),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
            None,
            None,
            None,
        )

    def add(
        self, part: slice, masses: _Masses, names: Tensor, own: Tensor, entropy: Tensor | None = None
    ) -> None:
        """Add what comes of some positions with labels `names`, whose log-probabilities have the gradients `own`
        (positions, 1), and their entropies `entropy`. The masses are used up."""
        slope = self.table.reading.scale / self.table.reading.temperature
        shares = masses.scales / masses.total  # what makes masses probabilities
        # What pulls a sure label up is nearly what pushes it down: in half precision both have to go through one
        # product, as two that round on their own leave the roundings. Of others it is added exactly.
        sure = masses.sure()
        at_label = own.masked_fill(sure, 0.0)
        capped = masses.pieces[0].factor is not None
        if capped:  # of the label's logit too
            at_label = torch.zeros_like(own)
        shift = None if entropy is None else masses.entropy() - masses.total.log()
        while masses.pieces:
            piece, column = masses.pieces.pop(), slice(len(masses.pieces), len(masses.pieces) + 1)
            pull, share, each = piece.masses, shares[:, column], -own * slope
            inside, numbers = _places(masses.labels, piece.words)
            of_label = -1 / share
            if entropy is not None and shift is not None:
                # What is too small to have a logarithm is zero.
                logs = pull.log().clamp_(min=-104.0).add_(masses.below[:, column] + shift)
                pull.mul_(-share).mul_(logs.mul_(entropy).add_(own))
                share, each, of_label = torch.ones_like(share), torch.full_like(own, slope), own
            pull.scatter_add_(1, numbers, torch.where(sure & inside, of_label, 0.0))
            if piece.factor is not None:
                pull.mul_(piece.factor)
                at_label += own * piece.factor.gather(1, numbers) * (inside & ~sure)
            self._add_piece(part, piece.words, pull, share, each)
        self.is_first = False
        at_label = at_label * slope
        states = self.states[part].float()
        if self.bias is not None:
            self.bias.index_add_(0, names, at_label.squeeze(1))
        if self.hidden is not None:
            self.hidden[part].addcmul_(self.exact[names].float(), at_label)
        if self.weight is not None:
            self.weight.index_add_(0, names, states * at_label)

    def _add_piece(self, part: slice, words: slice, pull: Tensor, share: Tensor, each: Tensor) -> None:
        """Add what comes of derivatives by the logits of some words, `pull` times `share` times `each`, of which the
        last has the gradients that are given. `pull` is used up."""
        if self.bias is not None:
            self.bias[words] += (pull * (share * each)).sum(0)
        weight = self.table.weight[words]
        if weight.dtype == torch.float16:
            # Undivided, these add up to as much as the vocabulary, and half a number ends at 65,504.
            pull, share = pull.mul_(share * HALVED), torch.full_like(share, 1 / HALVED)
        each = share * each
        pull = pull.to(weight.dtype)
        if self.hidden is not None:
            # Scaled where it is narrow, which spares a pass over the vocabulary.
            self.hidden[part].addcmul_((pull @ weight).float(), each)
        if self.weight is not None:
            scaled, sums = self.states[part].float() * each, self.weight[words]
            if weight.dtype == torch.float32:
                sums.addmm_(pull.t(), scaled, beta=0.0 if self.is_first else 1.0)
            elif self.is_first:
                sums.copy_(pull.t() @ scaled.to(weight.dtype))
            else:
                sums += (pull.t() @ scaled.to(weight.dtype)).float()


def _places(labels: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Which labels (positions, 1) are among some words, and their numbers there; 0 for the others."""
    inside = (labels >= words.start) & (labels < words.stop)
    return inside, (labels - words.start) * inside
