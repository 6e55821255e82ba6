"""Packing: whole examples side by side in one row of a batch, so that little of the batch is padding.

lengths -> pack (which examples share a block) -> packed_batch (tensors), for models that `isolates` accepts

Nothing is cut and no example sees another. There is no attention mask: transformers tell the examples of a
row apart by position ids that start over at 0, and only without `attention_mask` and with `use_cache=False`.
A model that ignores the position ids would train every example on the ones before it and say nothing;
`isolates` is there to find out first.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tunesmith.data.templates import IGNORED

if TYPE_CHECKING:
    import torch

Lengths = Sequence[int] | npt.NDArray[np.integer[Any]]
"""Tokens of every example, in the order of the examples."""

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]
"""(input_ids, labels) of every example of one block, each pair equally long."""

_ROUNDING = {"float64": 1e-9, "float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""How far logits of the same tokens may be apart when they are computed in batches of other shapes, as a
share of the largest logit. That of float32 leaves room for TF32."""


@dataclass(frozen=True)
class Packing:
    """Which examples share a block: every index once, no block above `capacity` tokens."""

    blocks: tuple[tuple[int, ...], ...]
    capacity: int
    tokens: int
    """Tokens of all examples together."""

    @property
    def padded_share(self) -> float:
        """Share of padding when every block is filled up to the capacity, 0 to 1; 0 without blocks.

        An upper bound: `packed_batch` pads to the longest block of a batch only.
        """
        return 1 - self.tokens / (len(self.blocks) * self.capacity) if self.blocks else 0.0


def pack(lengths: Lengths, capacity: int) -> Packing:
    """The blocks of `best_fit` with what is needed to account for them. Raises ValueError as that does."""
    blocks = tuple(tuple(block) for block in best_fit(lengths, capacity))
    return Packing(blocks, capacity, int(np.sum(np.asarray(lengths, dtype=np.int64))))


def padded_share(lengths: Lengths, batch_size: int) -> float:
    """Share of padding when consecutive rows go into batches and are padded to the longest of each, 0 to 1.

    Of examples that is the padding before packing, of blocks the padding after it. Raises ValueError for a
    batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; a batch has at least 1 row")
    sizes = np.asarray(lengths, dtype=np.int64)
    if not sizes.any():
        return 0.0
    starts = np.arange(0, len(sizes), batch_size)
    rows = np.diff(starts, append=len(sizes))
    return 1 - float(sizes.sum() / (np.maximum.reduceat(sizes, starts) * rows).sum())


def best_fit(lengths: Lengths, capacity: int) -> list[list[int]]:
    """Indices of examples by block, by best-fit decreasing: the longest first, into the fullest block with room.

    `lengths` and `capacity` are in tokens. Every index comes once, ascending within its block; blocks are
    ordered by their smallest index. The same lengths always give the same blocks. Open blocks are found by
    their remaining room, by binary search. Raises ValueError for a length above the capacity or below 1.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if not len(sizes):
        return []
    if sizes.max() > capacity:
        row = int(sizes.argmax())
        raise ValueError(f"example {row} has {sizes[row]} tokens, more than the {capacity} of a block")
    if sizes.min() < 1:
        raise ValueError(f"example {int(sizes.argmin())} has no tokens")

    # A block keeps the least room that still fits until the length no longer fits into it, so it takes all
    # it can of one length in one step.
    filled = np.empty(len(sizes), dtype=np.int64)  # block of each example, longest example first
    rooms: list[int] = []  # the different rooms of open blocks, ascending
    with_room: dict[int, list[int]] = {}
    opened = done = 0
    distinct, counts = np.unique(sizes, return_counts=True)
    for length, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = done + count
        while done < end:
            at = bisect_left(rooms, length)
            if at == len(rooms):
                room, block = capacity, opened
                opened += 1
            else:
                room = rooms[at]
                block = with_room[room].pop()
                if not with_room[room]:
                    del rooms[at], with_room[room]
            taken = min(end - done, room // length)
            filled[done : done + taken] = block
            done += taken
            left = room - taken * length
            if left in with_room:
                with_room[left].append(block)
            elif left:
                with_room[left] = [block]
                insort(rooms, left)

    block_of = np.empty_like(filled)
    block_of[np.argsort(-sizes, kind="stable")] = filled
    grouped = np.argsort(block_of, kind="stable")  # stable: ascending within a block
    starts = np.flatnonzero(np.diff(block_of[grouped], prepend=-1))
    ends = np.append(starts[1:], len(grouped))
    order = np.argsort(grouped[starts])
    rows: list[int] = grouped.tolist()
    return [rows[start:end] for start, end in zip(starts[order].tolist(), ends[order].tolist(), strict=True)]


def packed_batch(
    blocks: Sequence[Sequences], pad_token_id: int, *, flatten: bool = False
) -> dict[str, torch.Tensor]:
    """A batch of one row per block: input_ids, labels and position_ids, each of shape (blocks, longest block).

    Position ids start over at 0 with every example. The first label of an example is -100: the model's loss
    predicts a token from the one before it, which here is another example's. The padding of a row counts as
    one more example, without loss. The model has to be called with `use_cache=False`.

    With `flatten` all blocks come in one row without padding, shape (1, tokens); FlashAttention reads position
    ids in a batch of one row only. Raises ValueError for a batch without tokens, or labels that are not as
    many as the input ids.
    """
    import torch

    if flatten:
        blocks = [[example for block in blocks for example in block]]
    width = max((sum(len(ids) for ids, _ in block) for block in blocks), default=0)
    if not width:
        raise ValueError("a batch needs at least one example with tokens")
    # Padding joined to the last example would be harmless to it, but its positions could run past the last
    # one that a model has an embedding for.
    input_ids = torch.full((len(blocks), width), pad_token_id, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORED)
    position_ids = torch.zeros_like(input_ids)
    for row, block in enumerate(blocks):
        start = 0
        for ids, wanted in block:
            if len(ids) != len(wanted):
                raise ValueError(f"an example has {len(ids)} input ids but {len(wanted)} labels")
            end = start + len(ids)
            input_ids[row, start:end] = torch.tensor(ids, dtype=torch.long)
            labels[row, start + 1 : end] = torch.tensor(wanted[1:], dtype=torch.long)
            position_ids[row, start:end] = torch.arange(end - start)
            start = end
        position_ids[row, start:] = torch.arange(width - start)
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def isolates(model: torch.nn.Module) -> bool:
    """Whether this causal language model keeps packed examples apart, found out by running it.

    A short example is packed behind one neighbor and behind another. It must not notice which: at the same
    place of the same shapes its logits may not differ, except by what repeating a run changes. And every
    example must have the logits that it has alone, to rounding of the model's coarsest number type.

    Runs six forward passes of at most 24 tokens on the model's device, in eval mode without gradients; the
    mode of every module and the random state are left as they were. Also False for a model that refuses
    position ids, that has no row of logits per token, or in which no token sees another. Other errors of the
    forward pass are raised. Call it on the model that will be trained, adapter and attention included.
    """
    import torch

    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    # Spread over the middle of the vocabulary: special tokens mostly stand at its ends.
    tokens = [vocabulary // 4 + number * max(vocabulary // 2 // 17, 1) for number in range(17)]
    neighbor, other, example = tokens[:5], tokens[5:10], tokens[10:]
    first, second = ([(before, before), (example, example)] for before in (neighbor, other))
    flatten = str(config._attn_implementation).startswith("flash")
    device = next(model.parameters()).device
    if device.type == "meta":
        return True  # a model without weights, of which a plan is made, tells nothing
    modes = {module: module.training for module in model.modules()}

    def logits(rows: list[list[int]]) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=torch.tensor(rows, device=device), use_cache=False).logits
        return found.double().cpu()

    def packed_logits(*blocks: Sequences) -> torch.Tensor:
        batch = packed_batch(blocks, 0, flatten=flatten)
        inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
        found: torch.Tensor = model(**inputs, use_cache=False).logits
        return found.double().cpu()

    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            neighbors, alone = logits([neighbor, other]), logits([example])
            joined = logits([neighbor + example, other + example])
            try:
                packed, again = packed_logits(first, second), packed_logits(first, second)
                swapped = packed_logits(second, first)
            except (TypeError, ValueError):  # no such argument, or not for this model
                return False
    finally:
        for module, mode in modes.items():
            module.training = mode

    apart = torch.cat([neighbors, alone.expand(2, -1, -1)], dim=1)
    if packed.numel() != apart.numel() or joined.shape != apart.shape:
        return False  # prompt tuning, say, puts virtual tokens in front
    packed, again, swapped = (found.view_as(apart) for found in (packed, again, swapped))
    cut = len(neighbor)
    seen = (joined[0, cut:] - joined[1, cut:]).abs().max()
    leaked = (packed[:, cut:] - swapped[:, cut:]).abs().max()
    noise = (packed - again).abs().max()  # 0 but for kernels that add up in no fixed order
    coarsest = _ROUNDING["bfloat16"]  # also of quantized weights, stored as integers
    rounding = max(
        _ROUNDING.get(str(parameter.dtype).removeprefix("torch."), coarsest)
        for parameter in model.parameters()
    )
    return bool(
        seen > 0  # else the run shows nothing, and that is no proof
        and leaked <= 4 * noise
        and (packed - apart).abs().max() <= rounding * apart.abs().max()
    )
