"""Starts a Llama model with a circuit that can look back: the seed of copying from the context.

A model this small would need far more text than an hour of CPU allows before it discovers by
itself how to find "what came after this token last time". So training starts from a rough version
of that circuit and refines it: heads of layer 0 attend to the previous token (by the rotary angles
alone) and write what it was beside the present token; heads of layer 1 look for places whose
previous token equals the present one, and pass on what stood there.
"""

import math

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

_HEADS = 3
_PAIRS_NEAR = 4
"""Fast-turning rotary pairs, which tell one step back from two."""
_PAIRS_FAR = 5
"""The first of the slow pairs, which hardly turn over a few hundred tokens."""


def _rows(head: int, size: int) -> slice:
    return slice(head * size, (head + 1) * size)


def _bases(hidden: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Orthogonal directions for the present and for the previous token, none along axis 0."""
    full = torch.linalg.qr(torch.randn(hidden - 1, hidden - 1, generator=generator)).Q
    wide = torch.zeros(2 * _HEADS * rank, hidden)
    wide[:, 1:] = full[: 2 * _HEADS * rank]
    own, previous = wide.view(2, _HEADS, rank, hidden)
    return own, previous


@torch.no_grad()
def plant(model: LlamaForCausalLM, seed: int) -> None:
    """Writes the circuit into the untrained weights."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    hidden = config.hidden_size
    size = hidden // config.num_attention_heads
    half = size // 2
    own, previous = _bases(hidden, size - 1, generator)

    embedding = model.model.embed_tokens.weight
    embedding.normal_(0, 0.08, generator=generator)
    embedding[:, 0] = 0.24  # the same for every token: what lets a head ignore the content
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.1)
        layer.mlp.down_proj.weight.mul_(0.1)

    turn = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    back, match = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    slow = torch.cat([torch.arange(_PAIRS_FAR, half), torch.arange(_PAIRS_FAR, half) + half])
    for head in range(_HEADS):
        rows = _rows(head, size)
        query, key = torch.zeros(size, hidden), torch.zeros(size, hidden)
        for pair in range(_PAIRS_NEAR):
            query[pair, 0] = 2.3
            key[pair, 0] = 2.3 * math.cos(turn[pair])
            key[pair + half, 0] = 2.3 * math.sin(turn[pair])
        back.q_proj.weight[rows], back.k_proj.weight[rows] = query, key
        back.v_proj.weight[rows] = 0
        back.v_proj.weight[rows][: size - 1] = own[head]
        back.o_proj.weight[:, rows] = 0
        back.o_proj.weight[:, rows][:, : size - 1] = 0.2 * previous[head].T

        match.q_proj.weight[rows] = 0
        match.k_proj.weight[rows] = 0
        match.q_proj.weight[rows.start + slow] = 2.5 * own[head, : len(slow)]
        match.k_proj.weight[rows.start + slow] = 2.5 * previous[head, : len(slow)]
        match.v_proj.weight[rows] = 0
        match.v_proj.weight[rows][: size - 1] = own[head]
        match.o_proj.weight[:, rows] = 0
        match.o_proj.weight[:, rows][:, : size - 1] = 0.8 * own[head].T

    # Exact zeros would stay zero for ever where query and key rows are both zero, and would leave rows
    # without a direction, which adapters such as DoRA divide by.
    for attention in (back, match):
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            noise = torch.randn(projection.weight.shape, generator=generator)
            projection.weight.add_(0.005 * noise)
