"""Reward models through TRL's RewardTrainer, on pairs whose tokens are already settled.

The loss is -log sigmoid(score of the better answer - score of the worse one - margin), the likelihood of the
judgement under Bradley and Terry's model (Biometrika 1952, 39, 324-345).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tunesmith import scoring
from tunesmith.data.cache import Encodings
from tunesmith.data.examples import Example, Preference
from tunesmith.data.preferences import margin_of
from tunesmith.data.templates import set_template
from tunesmith.methods import preferred
from tunesmith.recipe import RewardModel
from tunesmith.training.checkpoints import keeping_run_folder
from tunesmith.training.run import Run


def compared(example: Example) -> Example:
    """A preference as it is. Raises Unusable for anything else, and for a margin that is no number."""
    pair = preferred.paired(example)
    assert isinstance(pair, Preference)
    margin_of(pair)
    return pair


def template(tokenizer: Any, choice: str | None, section: RewardModel) -> str:
    """Settle chat template and padding token, and say in sentences which they are."""
    return f"{set_template(tokenizer, choice)} {scoring.settle_padding(tokenizer)}"


def build(
    section: RewardModel,
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
    from trl import RewardConfig, RewardTrainer

    assert packing is None, "pairs are not packed; compose refuses it before"
    preferred_dropout = preferred.own_dropout(model)
    if preferred_dropout:
        run.event(
            "decision",
            name="dropout",
            value="off",
            reason=f"two scores are compared, and adapter.dropout {preferred_dropout:g} would make noise of them",
        )
    margins = {"train": train.margins, "validation": validation.margins if validation else []}
    given = [margin for margin in margins["train"][::2] if margin is not None]
    if given:
        used = section.margin == "auto"
        without = len(train) // 2 - len(given)
        run.event(
            "decision",
            name="margin",
            value=f"{min(given):g} to {max(given):g}" if used else "none",
            reason="as the column `margin` says"
            + (f"; {without} pairs without one have 0" if used and without else "")
            if used
            else "method.margin is none, and the column `margin` is left out",
        )
    config = RewardConfig(**arguments, center_rewards_coefficient=section.centering or None, max_length=None)
    return keeping_run_folder(preferred.settled(RewardTrainer, {}), run, keep=keep, splits="pairs")(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=preferred.numbered("train", "pair", range(len(train) // 2)),
        eval_dataset=preferred.numbered("validation", "pair", range(len(validation) // 2))
        if validation
        else None,
        data_collator=collator(
            {"train": train.dataset("input_ids"), "validation": validation.dataset("input_ids")}
            if validation
            else {"train": train.dataset("input_ids")},
            margins if given and section.margin == "auto" else None,
            tokenizer.pad_token_id,
        ),
    )


def collator(
    parts: Mapping[str, Any], margins: Mapping[str, Sequence[float | None]] | None, pad: int
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Makes a batch of pairs as TRL's own collator does, with whole conversations: the better answers in its first
    half, padded on the right."""
    from trl.trainer.reward_trainer import DataCollatorForPreference

    padded = DataCollatorForPreference(pad)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        pairs = []
        for row in rows:
            part, first = parts[row["part"]], 2 * row["pair"]
            pair = {"chosen_ids": part[first]["input_ids"], "rejected_ids": part[first + 1]["input_ids"]}
            if margins:
                pair["margin"] = margins[row["part"]][first] or 0.0
            pairs.append(pair)
        batch: dict[str, Any] = padded(pairs)
        return batch

    return collate
