"""torch.compile of the layers, for lengths that change from batch to batch.

What a layer does around the attention is compiled; the attention goes through rows of ever new lengths in torch's own
kernels, and the last layer, which is run twice on parts of the sequence, stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from transformers import AttentionInterface

from tunesmith.forward import attention
from tunesmith.forward.activations import Restore
from tunesmith.models import decoder_layers

NAME = "tunesmith_rows_apart"
"""The name under which compiled layers find the attention, which is kept out of their graph."""


def missing(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device here, in one sentence; None where it can."""

    def probe(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x) * x

    try:
        torch.compile(probe, dynamic=True)(torch.ones(3, 5, device=device))
    except (
        Exception
    ) as error:  # of the compiler, its libraries, the system: whatever it is, nothing is compiled
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return said.strip()[:200]
    return None


def compile_layers(model: Any) -> list[Any]:
    """Compile what a model's layers compute around the attention; what undoes it.

    Only rows in one sequence go through it. Answers are written on the layers as they are: their caches grow token by
    token.
    """
    disable: Any = torch.compiler.disable
    AttentionInterface.register(NAME, disable(_rows_alike))
    config = model.config.get_text_config()
    found = []
    for layer in list(decoder_layers(model))[:-1]:
        layer.forward = _rows_compiled(layer.forward, config)
        found.append(Restore(layer))
    return found


def _rows_alike(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """The attention, its result laid out the same for one row as for several: each other layout compiles anew."""
    found, _ = attention.rows_attention(*args, **kwargs)
    return found.clone(memory_format=torch.contiguous_format), None


def _rows_compiled(theirs: Callable[..., Any], config: Any) -> Callable[..., Any]:
    compiled = torch.compile(theirs, dynamic=True)

    @wraps(theirs)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if "rows" not in kwargs:
            return theirs(*args, **kwargs)
        with attention.used_by(config, NAME):
            return compiled(*args, **kwargs)

    return forward
