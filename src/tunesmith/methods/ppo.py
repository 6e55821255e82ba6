"""PPO on prompts and rewards of ours: from a recipe's section to a trainer (`ppo_trainer`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.data import EncodedSplits, Splits, prompts
from tunesmith.data.cache import Encodings
from tunesmith.data.templates import set_template
from tunesmith.methods import rewards as rewarding
from tunesmith.recipe import PPO, Data
from tunesmith.training.run import Run


def template(tokenizer: Any, choice: str | None, section: PPO) -> str:
    """Settle the tokenizer's chat template, and say in a sentence which one it is."""
    return set_template(tokenizer, choice)


def encoded(splits: Splits, tokenizer: Any, data: Data, section: PPO) -> EncodedSplits:
    """The prompts of all splits, with those dropped that leave no room for an answer."""
    return prompts.encoded(splits, tokenizer, data=data, room=section.max_new_tokens)


def build(
    section: PPO,
    *,
    model: Any,
    tokenizer: Any,
    train: Encodings,
    validation: Encodings,
    arguments: Mapping[str, Any],
    run: Run,
    keep: int,
    packing: Any = None,
) -> Any:
    """A trainer that has not started. Raises RecipeError and ModelError for what cannot be a reward or a critic."""
    from tunesmith.methods.ppo_trainer import trainer

    assert packing is None, "prompts are not packed; api refuses it before"
    asked = {"train": train.examples, "validation": validation.examples if validation else ()}
    resolved = rewarding.resolve(
        section.rewards,
        prompts=[*asked["train"], *asked["validation"]],
        tokenizer=tokenizer,
        device=str(model.device),
        dtype="bfloat16" if model.device.type == "cuda" else "float32",
    )
    batch = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    for decision in rewarding.said(resolved, answers=arguments["max_steps"] * batch):
        run.event("decision", name=decision["name"], value=decision["value"], reason=decision["reason"])

    def score_of(part: str) -> Any:
        def score(numbers: Sequence[int], texts: Sequence[str]) -> rewarding.Scored:
            return rewarding.total(resolved, [asked[part][n] for n in numbers], texts)

        return score

    return trainer(
        section,
        model=model,
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        score=score_of("train"),
        score_validation=score_of("validation"),
        arguments=arguments,
        run=run,
        keep=keep,
    )
