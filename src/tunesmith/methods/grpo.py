"""GRPO through TRL's GRPOTrainer: groups of answers to one prompt, compared by their rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.data.cache import Encodings
from tunesmith.methods import sampled
from tunesmith.recipe import GRPO
from tunesmith.training.run import Run


def build(
    section: GRPO,
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
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        **sampled.options(section, arguments),
        loss_type=section.loss,
        scale_rewards=section.scale_rewards,
        importance_sampling_level=section.importance,
    )
    return sampled.build(
        GRPOTrainer, config, section, model=model, tokenizer=tokenizer, train=train, validation=validation,
        run=run, keep=keep,
    )  # fmt: skip
