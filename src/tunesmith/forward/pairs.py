"""The fast forward of encoder-decoder models: pairs without padding, and the vocabulary at the labels alone.

On a CPU the rows of the encoder stand behind one another in one sequence and so do those of the decoder, each up to its
last label; a token sees its own row, and of the other half the row that it answers. On other devices, where a call for
every row costs more than padding does, the batch stays padded to its longest row. In both cases the head is asked only
where there is a label, some positions at a time (`head`).
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from tunesmith.data.templates import IGNORED
from tunesmith.forward import activations, adapters, attention, lookup
from tunesmith.forward.head import Reading, read

COVERED = {"bart", "mt5", "t5"}
"""Kinds of encoder-decoders (`config.model_type`) of which a test shows that the result is the stock one."""
NAME = "tunesmith_pairs"
"""The name under which transformers' models find the attention."""
UNDERSTOOD = {"input_ids", "attention_mask", "decoder_input_ids"}
"""Inputs without which nothing else of a batch matters."""
HOOKS = "_tunesmith_pairs"
"""Attribute of a model with the hooks that are set on it."""
READING = Reading(alike=True)


@dataclass(frozen=True)
class Lines:
    """Rows in one sequence, and what they see of the other half's sequence."""

    lengths: list[int]
    seen: list[int]
    """Tokens of the encoder that each sees where it looks across; of the encoder's own rows their lengths."""


@dataclass(frozen=True)
class Half:
    """What an encoder or a decoder is given, without padding."""

    ids: Tensor
    """(1, tokens)"""
    positions: Tensor
    """(tokens,)"""
    lengths: list[int]


def pairs_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    rows: Lines,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of `(1, heads, tokens, width)`, row by row; gives `(1, tokens, heads, width)`.

    `position_bias` is that of the longest row, from its first token on, and forbids in a decoder what comes later.
    """
    causal = bool(module.is_causal)
    seen = rows.lengths if causal else rows.seen
    bias = position_bias[0] if position_bias is not None and position_bias.numel() else None
    parts = (torch.split(query, rows.lengths, 2), torch.split(key, seen, 2), torch.split(value, seen, 2))
    found = []
    for asked, keys, values in zip(*parts, strict=True):
        if bias is None:
            out = functional.scaled_dot_product_attention(
                asked, keys, values, dropout_p=dropout, is_causal=causal and asked.shape[2] > 1, scale=scaling
            )
        else:
            out = _biased(asked, keys, values, bias, dropout, scaling)
        found.append(out.transpose(1, 2))
    return torch.cat(found, dim=1), None


def _biased(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    """With a bias that may be trained, which SDPA's kernels have no gradient of."""
    scores = torch.baddbmm(
        bias[:, : query.shape[2], : key.shape[2]],
        query[0],
        key[0].transpose(1, 2),
        alpha=query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    weights = functional.dropout(torch.softmax(scores, dim=-1), p=dropout, training=dropout > 0)
    return torch.bmm(weights, value[0])[None]


def _with_positions(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before T5's first block: the bias of the longest row, where the block would make that of all rows in one."""
    rows: Lines | None = kwargs.get("rows")
    own = block.layer[0].SelfAttention
    if rows is None or args[2] is not None or not own.has_relative_attention_bias:
        return None
    longest = max(rows.lengths)
    bias = own.compute_bias(longest, longest)
    if own.is_causal:
        later = torch.ones(longest, longest, dtype=torch.bool, device=bias.device).triu(1)
        bias = bias.masked_fill(later, float("-inf"))
    return (*args[:2], bias, *args[3:5], bias.new_zeros(0)), kwargs


@dataclass
class Trunk:
    """An encoder-decoder below its head."""

    model: Any
    """The model itself, without PEFT's wrapping."""
    say: Callable[[str], None]
    """Told, once each, why a batch took the stock path."""
    unpadded: bool | None = None
    """Whether rows stand behind one another; None where the device says it."""
    reading: Reading = READING

    def __post_init__(self) -> None:
        self.say = cache(self.say)
        for handle in getattr(self.model, HOOKS, ()):  # of an earlier training
            handle.remove()
        handles: list[Any] = [*activations.keep_less(self.model), *adapters.add_in_place(self.model)]
        handles += lookup.join(self.model)
        for half in (self.model.get_encoder(), self.model.get_decoder()):
            for layer in getattr(half, "block", None) or half.layers:
                handles += attention.held_to(layer, half.config, NAME)
                if hasattr(layer, "layer"):
                    handles.append(layer.register_forward_pre_hook(_with_positions, with_kwargs=True))
        setattr(self.model, HOOKS, handles)

    def states(self, inputs: dict[str, Any], labels: Tensor) -> Tensor | None:
        """The decoder's last states at the labels, in their order; None, said why, where the batch is not of the kind
        that is understood."""
        given = {name: value for name, value in inputs.items() if value is not None and value is not False}
        if given.keys() - UNDERSTOOD or "input_ids" not in given:
            unknown = ", ".join(sorted(given.keys() - UNDERSTOOD))
            self.say(f"a batch brings {unknown or 'no token ids'}")
            return None
        ids = given["input_ids"]
        if "decoder_input_ids" not in given:
            given["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels)
        mask = given.get("attention_mask")
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
        marks = labels != IGNORED
        rows = marks.any(1)
        if not bool(rows.any()):
            self.say("a batch has no label")
            return None
        lengths = mask.sum(1)
        whole = torch.arange(mask.shape[1], device=ids.device) < lengths[:, None]
        if mask.shape != ids.shape or bool((mask != whole).any()) or not bool(lengths[rows].all()):
            self.say("the mask of a batch has holes, or padding comes first")
            return None
        places = torch.arange(marks.shape[1], device=ids.device)
        ends = (places * marks).amax(1) + 1
        unpadded = ids.device.type == "cpu" if self.unpadded is None else self.unpadded
        if not unpadded:
            return self._padded(given, mask[rows], marks[rows], rows)
        written = (places < ends[:, None]) & rows[:, None]
        source = _laid_out(ids, mask & rows[:, None])
        target = _laid_out(given["decoder_input_ids"], written)
        states = self._unpadded(source, target)
        return states if len(states) == int(marks.sum()) else states[marks[written]]

    def _unpadded(self, source: Half, target: Half) -> Tensor:
        encoder, decoder = self.model.get_encoder(), self.model.get_decoder()
        with _reading(encoder, source):
            read_states = encoder(
                input_ids=source.ids, rows=Lines(source.lengths, source.lengths)
            ).last_hidden_state
        with _reading(decoder, target):
            states: Tensor = decoder(
                input_ids=target.ids,
                encoder_hidden_states=read_states,
                use_cache=False,
                rows=Lines(target.lengths, source.lengths),
            ).last_hidden_state
        return states[0]

    def _padded(self, given: dict[str, Any], mask: Tensor, marks: Tensor, rows: Tensor) -> Tensor:
        """The padded rows, without columns that are all padding and without rows that learn nothing."""
        longest, last = int(mask.sum(1).max()), int(marks.any(0).nonzero().max()) + 1
        mask, marks = mask[:, :longest].long(), marks[:, :last]
        read_states = self.model.get_encoder()(
            input_ids=given["input_ids"][rows][:, :longest], attention_mask=mask
        ).last_hidden_state
        states: Tensor = self.model.get_decoder()(
            input_ids=given["decoder_input_ids"][rows][:, :last],
            encoder_hidden_states=read_states,
            encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state
        return states[marks]

    def loss(self, states: Tensor, labels: Tensor, items: Any) -> Tensor:
        """The sum over the labels by `items`; by their own number where that is None."""
        config, head = self.model.config, self.model.get_output_embeddings()
        if getattr(config, "scale_decoder_outputs", False):
            states = states * config.d_model**-0.5
        bias = getattr(self.model, "final_logits_bias", None)
        targets = labels[labels != IGNORED]
        logs = read(
            states, head.weight, head.bias if bias is None else bias[0], targets, self.reading
        ).log_probs
        return -logs.sum() / (len(targets) if items is None else items)


def _laid_out(ids: Tensor, where: Tensor) -> Half:
    """The tokens that are marked, row after row."""
    lengths = [length for length in where.sum(1).tolist() if length]
    return Half(ids[where][None], where.nonzero()[:, 1], lengths)


@contextlib.contextmanager
def _reading(half: Any, given: Half) -> Iterator[None]:
    """Have a half use our attention, and tables of positions (BART) count within the rows."""
    table = getattr(half, "embed_positions", None)
    handle = table and table.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "position_ids": given.positions}), with_kwargs=True
    )
    try:
        with attention.used_by(half.config, NAME), activations.keeping():
            yield
    finally:
        if handle:
            handle.remove()


def uncovered(model: Any) -> str | None:
    """Why an encoder-decoder has to take the stock path; None where it need not."""
    if model.config.model_type not in COVERED:
        return f"models of the kind {model.config.model_type} are not covered"
    if type(model.get_output_embeddings()) is not nn.Linear:
        return "the head is no plain layer, but has an adapter or packed weights"
    return None


def attach(trainer: Any, model: Any, *, say: Callable[[str], None], device: str | None = None) -> None:
    """Have a trainer of pairs take its losses from the fast forward of its model.

    Its `compute_loss_func` keeps the loss of batches that take the stock path. `device` is the kind that a hollow model
    is planned for.
    """
    mean, ask = trainer.compute_loss_func, trainer.compute_loss
    unpadded = None if device is None else device == "cpu"
    quicken(model, mean, say=say, unpadded=unpadded, device=device)
    trainer.compute_loss_func, trainer.model_accepts_loss_kwargs = None, True

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return ask(model, {**inputs, "fused_lm_head": True}, *args, **kwargs)

    trainer.compute_loss = compute_loss


def quicken(
    model: Any,
    mean: Callable[..., Any],
    *,
    say: Callable[[str], None],
    unpadded: bool | None = None,
    device: str | None = None,
) -> None:
    """Have a model answer `fused_lm_head=True` with its loss alone, in our way.

    `mean` is the loss of logits: `(outputs, labels, num_items_in_batch)`. `say` is told, once each, why single batches
    took the stock path.
    """
    from transformers.modeling_outputs import Seq2SeqLMOutput

    theirs, trunk = model.forward, Trunk(model, say, unpadded, replace(READING, device=device))

    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            return theirs(*args, **({} if labels is None else {"labels": labels}), **kwargs)
        assert labels is not None
        states = None
        if args:
            trunk.say("a batch brings inputs without names")
        else:
            states = trunk.states(kwargs, labels)
        if states is None:
            return Seq2SeqLMOutput(loss=mean(theirs(*args, **kwargs), labels, num_items_in_batch))
        return Seq2SeqLMOutput(loss=trunk.loss(states, labels, num_items_in_batch))

    forward.__signature__ = inspect.signature(getattr(theirs, "__func__", theirs))  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


AttentionInterface.register(NAME, pairs_attention)
