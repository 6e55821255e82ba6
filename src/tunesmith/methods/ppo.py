"""PPO on prompts and rewards of ours: from a recipe's section to a trainer (`ppo_trainer`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tunesmith.data.cache import Encodings
from tunesmith.methods import rewards as rewarding
from tunesmith.methods import sampled
from tunesmith.plan import Decision
from tunesmith.recipe import PPO, Recipe, Training
from tunesmith.training.run import Run


def check(recipe: Recipe) -> None:
    """Refuses, before anything is read, rewards and a critic that are not there."""
    from tunesmith import models

    sampled.check(recipe)
    if isinstance(recipe.method, PPO) and recipe.method.critic:
        models.kind(recipe.method.critic)


def settled(section: PPO, training: Training, num_prompts: int) -> tuple[Training, int, list[Decision]]:
    """The training section as it is, a prompt once per epoch, and what a step comes to."""
    prompts = training.per_device_train_batch_size * training.gradient_accumulation_steps
    parts = min(section.num_minibatches, prompts)
    why = f"one answer to each of {prompts} prompts, {section.ppo_epochs} passes over them, {parts} updates a pass"
    if parts < section.num_minibatches:
        why += f" (no more than answers; {section.num_minibatches} were asked for)"
    decisions = [Decision("updates per step", section.ppo_epochs * parts, why)]
    return training, 1, decisions


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
    fast: bool = True,
) -> Any:
    """A trainer that has not started. Raises RecipeError and ModelError for what cannot be a reward or a critic."""
    from tunesmith.methods.ppo_trainer import trainer

    assert packing is None, "prompts are not packed; compose refuses it before"
    asked = {"train": train.examples, "validation": validation.examples if validation else ()}
    batch = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    resolved = rewarding.settled(
        section.rewards,
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        device=model.device.type,
        answers=arguments["max_steps"] * batch,
        validations=rewarding.validations(arguments["max_steps"], arguments["eval_steps"]),
        run=run,
    )

    def score_of(part: str) -> Any:
        def score(numbers: Sequence[int], texts: Sequence[str]) -> rewarding.Scored:
            return rewarding.total(resolved, [asked[part][n] for n in numbers], texts)

        return score

    def samples(numbers: Sequence[int], texts: Sequence[str], scored: rewarding.Scored) -> Iterator[Any]:
        return rewarding.samples([train.examples[n] for n in numbers], texts, scored)

    def facts() -> dict[str, float]:
        return {f"cost/{r.name}/{name}": value for r in resolved for name, value in r.facts().items()}

    return trainer(
        section,
        model=model,
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        score=score_of("train"),
        score_validation=score_of("validation"),
        samples=samples,
        facts=facts,
        arguments=arguments,
        run=run,
        keep=keep,
    )
