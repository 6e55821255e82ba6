"""Odds ratio preference optimization through TRL's ORPOTrainer, on settled pairs; no reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.data.cache import Encodings
from tunesmith.methods import preferred
from tunesmith.methods.cpo import collator
from tunesmith.recipe import ORPO
from tunesmith.training.checkpoints import keeping_run_folder
from tunesmith.training.run import Run


def build(
    section: ORPO,
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
    """A trainer that has not started. Each of its rows is a pair; TRL prepares nothing.

    TRL's imitation loss covers prompt and better answer, as the authors' code does.
    """
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    assert packing is None, "pairs are not packed; compose refuses it before"
    preferred.dropout_decision(run, preferred.own_dropout(model))
    trainer = keeping_run_folder(preferred.likely(ORPOTrainer), run, keep=keep, splits="passes")(
        model=model,
        args=ORPOConfig(**arguments, beta=section.beta),
        processing_class=tokenizer,
        train_dataset=preferred.Numbers("train", len(train) // 2),
        eval_dataset=preferred.Numbers("validation", len(validation) // 2) if validation else None,
        data_collator=collator(preferred.Sides(train, validation), tokenizer),
    )
    trainer.use_dpo_data_collator = True  # batches have its form, and it would warn at each validation
    return trainer
