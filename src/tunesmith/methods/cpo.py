"""CPO and SimPO through TRL's CPOTrainer, on pairs whose tokens are already settled; no reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.data.cache import Encodings
from tunesmith.methods import preferred
from tunesmith.recipe import CPO, SimPO
from tunesmith.training.checkpoints import keeping_run_folder
from tunesmith.training.run import Run


def build(
    section: CPO | SimPO,
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
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    assert packing is None, "pairs are not packed; compose refuses it before"
    preferred.dropout_decision(run, preferred.own_dropout(model))
    own = (
        {"loss_type": "simpo", "simpo_gamma": section.gamma}
        if isinstance(section, SimPO)
        else {"loss_type": section.loss}
    )
    config = CPOConfig(
        **arguments,
        **own,
        beta=section.beta,
        cpo_alpha=section.sft_weight,
        label_smoothing=section.label_smoothing,
    )
    trainer = keeping_run_folder(preferred.likely(CPOTrainer), run, keep=keep, splits="passes")(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=preferred.Numbers("train", len(train) // 2),
        eval_dataset=preferred.Numbers("validation", len(validation) // 2) if validation else None,
        data_collator=collator(preferred.Sides(train, validation), tokenizer),
    )
    trainer.use_dpo_data_collator = True  # batches have its form, and it would warn at each validation
    return trainer


def collator(sides: preferred.Sides, tokenizer: Any) -> preferred.Collate:
    """Makes a batch of pairs under the names of TRL's CPO and ORPO trainers."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        better, worse = sides.pairs(rows)
        both = preferred.padded([*better, *worse], tokenizer.pad_token_id)
        batch = {name: both[name] for name in ("input_ids", "attention_mask")}  # for the count of tokens
        for name, value in both.items():
            batch[f"chosen_{name}"], batch[f"rejected_{name}"] = torch.chunk(value, 2)
        return batch

    return collate
