"""RLOO through TRL's RLOOTrainer: each answer against the mean of the other answers to its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.data.cache import Encodings
from tunesmith.methods import sampled
from tunesmith.recipe import RLOO
from tunesmith.training.run import Run


def build(
    section: RLOO,
    *,
    model: Any,
    tokenizer: Any,
    train: Encodings,
    validation: Encodings,
    arguments: Mapping[str, Any],
    run: Run,
    keep: int,
    packing: Any = None,
    fast: bool = True,
) -> Any:
    """A trainer that has not started."""
    from trl import RLOOConfig, RLOOTrainer

    clip = section.reward_clip
    config = RLOOConfig(
        **sampled.options(section, arguments),
        normalize_advantages=section.normalize_advantages,
        reward_clip_range=None if clip is None else (-clip, clip),
    )
    return sampled.build(
        RLOOTrainer, config, section, model=model, tokenizer=tokenizer, train=train, validation=validation,
        run=run, keep=keep,
    )  # fmt: skip
