"""Direct preference optimization through TRL's DPOTrainer, on pairs whose tokens are already settled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tunesmith.data.cache import Encodings
from tunesmith.methods import preferred
from tunesmith.recipe import DPO
from tunesmith.training.checkpoints import keeping_run_folder
from tunesmith.training.run import Run

if TYPE_CHECKING:
    from tunesmith.training.steps import Splits

SMOOTHING = {"robust": 0.1, "exo_pair": 1e-3}
"""Label smoothing by default, as the papers of these losses recommend it."""


def build(
    section: DPO,
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
    """A trainer that has not started. Each of its rows is a pair; TRL prepares nothing."""
    from trl import DPOConfig, DPOTrainer

    assert packing is None, "pairs are not packed; compose refuses it before"
    reference, precompute = preferred.reference(section, model, run)
    preferred.dropout_decision(run, preferred.own_dropout(model))
    config = DPOConfig(
        **arguments,
        loss_type=[section.loss, "sft"] if section.sft_weight else [section.loss],
        loss_weights=[1.0, section.sft_weight] if section.sft_weight else None,
        beta=section.beta,
        label_smoothing=SMOOTHING.get(section.loss, 0.0)
        if section.label_smoothing is None
        else section.label_smoothing,
        f_divergence_type=section.f_divergence,
        f_alpha_divergence_coef=section.divergence_alpha or 0.5,
        precompute_ref_log_probs=precompute,
        max_length=None,
    )
    columns = {"ref_chosen_logps": 0, "ref_rejected_logps": 1}
    with preferred.one_adapter(model):
        # The likelihood of the better answers is a mean over the tokens of a batch, and parts of it have another.
        splits: Splits = "passes" if section.sft_weight else "pairs"
        own = preferred.settled(DPOTrainer, columns, fast=run if fast else None)
        trainer = keeping_run_folder(own, run, keep=keep, splits=splits)(
            model=model,
            ref_model=reference,
            args=config,
            processing_class=tokenizer,
            train_dataset=preferred.numbered("train", "pair", range(len(train) // 2)),
            eval_dataset=preferred.numbered("validation", "pair", range(len(validation) // 2))
            if validation
            else None,
            data_collator=collator(preferred.Sides(train, validation), tokenizer),
        )
    if precompute:
        trainer.ref_model = None  # it has said what it had to say
    return trainer


def collator(sides: preferred.Sides, tokenizer: Any) -> preferred.Collate:
    """Makes a batch of pairs as TRL's own collator does: the better answers in its first half."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        batch = preferred.masked(
            [side for half in sides.pairs(rows) for side in half], tokenizer.pad_token_id
        )
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch

    return collate
