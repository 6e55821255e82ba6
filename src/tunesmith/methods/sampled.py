"""What GRPO and RLOO share: TRL's trainers on our prompts, rewards, reference and validation.

    prompts (token ids) -> answers (TRL) -> rewards (ours) -> advantages, loss (TRL) -> step

TRL is given the number of each prompt in place of its text and fetches its token ids from our data, so that nothing
is rendered or tokenized a second time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tunesmith import models
from tunesmith.data import EncodedSplits, Splits, prompts
from tunesmith.data.cache import Encodings
from tunesmith.data.examples import Prompt
from tunesmith.data.templates import end_of_turn_ids, set_template
from tunesmith.errors import DataError
from tunesmith.methods import rewards as rewarding
from tunesmith.methods.rewards import Reward
from tunesmith.methods.sft import check_head
from tunesmith.plan import Decision
from tunesmith.recipe import GRPO, PPO, RLOO, Data, Recipe, Training
from tunesmith.training.checkpoints import LOG, keeping_run_folder
from tunesmith.training.run import Run
from tunesmith.training.validating import rewarded

Section = GRPO | RLOO
BUFFER = "answers.safetensors"
"""File of a checkpoint with the answers that are still to be learned from."""


def template(tokenizer: Any, choice: str | None, section: Section | PPO) -> str:
    """Settle the tokenizer's chat template, and say in a sentence which one it is."""
    return set_template(tokenizer, choice)


def encoded(splits: Splits, tokenizer: Any, data: Data, section: Section | PPO) -> EncodedSplits:
    """The prompts of all splits, with those dropped that leave no room for an answer.

    Raises RecipeError for a reward that cannot score them.
    """
    found = prompts.encoded(splits, tokenizer, data=data, room=section.max_new_tokens)
    for part in (found.train, found.validation):
        if part:
            rewarding.check_fit(section.rewards, [e for e in part.examples if isinstance(e, Prompt)])
    return found


def check(recipe: Recipe) -> None:
    """Refuses, before anything is read, rewards that are not there and an adapter that would not be trained."""
    if not isinstance(recipe.method, PPO):  # whose trainer is ours, and asks the whole model
        check_head(recipe)
    rewarding.check(getattr(recipe.method, "rewards", ()))


def settled(section: Section, training: Training, num_prompts: int) -> tuple[Training, int, list[Decision]]:
    """The training section with a batch that holds whole groups, how often a prompt counts in an epoch's batches, and
    what was decided.

    Raises DataError where there are fewer prompts than one step needs.
    """
    size, group = training.per_device_train_batch_size, section.num_generations
    decisions = []
    if training.gradient_accumulation_steps * size % group:
        least = math.lcm(size, group) // size
        steps = math.ceil(training.gradient_accumulation_steps / least) * least
        decisions.append(
            Decision(
                "gradient_accumulation_steps",
                steps,
                f"{training.gradient_accumulation_steps} batches of {size} answers hold no whole groups of {group} "
                f"(method.num_generations); {steps} hold {steps * size // group}",
            )
        )
        training = training.model_copy(update={"gradient_accumulation_steps": steps})
    needed = training.gradient_accumulation_steps * size // group
    decisions.append(
        Decision(
            "answers",
            section.num_generations,
            f"drawn for each prompt; a step learns from {needed * group} answers to "
            f"{'one prompt' if needed == 1 else f'{needed} prompts'}",
        )
    )
    if num_prompts < needed:
        raise DataError(
            f"A step needs {needed} prompts, and there are {num_prompts} to train on.",
            fix="Lower gradient_accumulation_steps or per_device_train_batch_size, or give more rows.",
        )
    return training, group * section.num_iterations, decisions


def options(section: Section, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of TRL's configurations that both methods share."""
    return {
        **arguments,
        "include_num_input_tokens_seen": "no",  # TRL counts prompts and answers itself
        "num_generations": section.num_generations,
        "num_generations_eval": 1,  # validation is ours
        "steps_per_generation": arguments["gradient_accumulation_steps"],
        "max_completion_length": section.max_new_tokens,
        "temperature": section.temperature,
        "top_p": section.top_p,
        "top_k": 0,
        "num_iterations": section.num_iterations,
        "epsilon": section.epsilon,
        "epsilon_high": section.epsilon_high,
        "mask_truncated_completions": section.mask_cut_answers,
        "beta": 0.0,  # the reference is ours: `build` switches it on
        # With dropout the probabilities that are learned from would not be those that answers were drawn from.
        "disable_dropout": True,
        "log_completions": False,
    }


def build(
    trainer_class: type,
    config: Any,
    section: Section,
    *,
    model: Any,
    tokenizer: Any,
    train: Encodings,
    validation: Encodings,
    run: Run,
    keep: int,
) -> Any:
    """A trainer of one of TRL's classes that has not started.

    Raises RecipeError for what cannot be a reward.
    """
    from datasets import Dataset

    stop_ids = end_of_turn_ids(tokenizer)
    answers = config.max_steps * config.per_device_train_batch_size * config.gradient_accumulation_steps
    resolved = rewarding.settled(
        section.rewards,
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        device=model.device.type,
        answers=answers // section.num_iterations,
        validations=rewarding.validations(config.max_steps, config.eval_steps),
        run=run,
    )
    reference = None
    if section.beta:
        reference, reason = models.reference_of(model)
        run.event(
            "decision", name="reference", value="adapter off" if reference is None else "copy", reason=reason
        )

    def score(numbers: Sequence[int], texts: Sequence[str]) -> rewarding.Scored:
        return rewarding.total(resolved, [validation.examples[n] for n in numbers], texts)

    validated = rewarded(
        _on_prompts(trainer_class, train, resolved, stop_ids, run),
        validation=validation,
        score=score,
        stop_ids=stop_ids,
        max_new_tokens=section.max_new_tokens,
    )
    rows = {"prompt": [str(n) for n in range(len(train))]}
    config.reward_weights = [reward.weight for reward in resolved]
    trainer = keeping_run_folder(validated, run, keep=keep, splits="passes")(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict(rows),
        eval_dataset=Dataset.from_dict({"prompt": [str(n) for n in range(len(validation))]})
        if validation
        else None,
        reward_funcs=[_named(reward.name) for reward in resolved],
    )
    trainer.eos_token_ids = list(stop_ids)
    trainer.generation_config.eos_token_id = trainer.generation_kwargs["eos_token_id"] = list(stop_ids)
    trainer.model.register_forward_pre_hook(_with_positions, with_kwargs=True)
    if section.beta:
        trainer.beta = section.beta
        if reference is not None:
            _prepared_reference(trainer, reference, section)
    return trainer


def _prepared_reference(trainer: Any, reference: Any, section: Section) -> None:
    from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

    if hasattr(reference, "get_base_model"):
        reference = reference.get_base_model()  # its adapter's matrices stay in the layers
    disable_dropout_in_model(reference)
    add_fused_lm_head(reference, temperature=section.temperature)
    reference.register_forward_pre_hook(_with_positions, with_kwargs=True)
    trainer.ref_model = trainer.accelerator.prepare_model(reference, evaluation_mode=True)


def _with_positions(module: Any, given: Any, named: dict[str, Any]) -> Any:
    """Positions counted from a row's first real token, as while answering. TRL gives none, so that padding on the left
    would shift models with learned positions."""
    mask = named.get("attention_mask")
    if named.get("fused_lm_head") and mask is not None and named.get("position_ids") is None:
        named = {**named, "position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}
    return given, named


def _named(name: str) -> Any:
    """A placeholder by which TRL knows a reward's name; `_calculate_rewards` is ours."""

    def placeholder(**given: Any) -> list[float]:
        raise AssertionError("rewards are computed all at once")

    placeholder.__name__ = name
    return placeholder


def _on_prompts(
    trainer_class: type, train: Encodings, resolved: Sequence[Reward], stop_ids: Sequence[int], run: Run
) -> type:
    """The trainer class with prompts and rewards of ours, and with checkpoints from which it goes on exactly."""

    class OnPrompts(trainer_class):  # type: ignore[misc]
        def __init__(self, *given: Any, **named: Any) -> None:
            self._same: list[float] = []
            self._answered_at = -1
            super().__init__(*given, **named)

        def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
            return [list(train[int(number)].input_ids) for number in prompts], None, {}

        def _calculate_rewards(
            self, inputs: Any, prompts: list[str], completions: Any, completion_ids_list: list[list[int]]
        ) -> Any:
            import torch

            asked: list[Prompt] = [train.examples[int(number)] for number in prompts]
            texts = [_text(ids, stop_ids, self.processing_class) for ids in completion_ids_list]
            scored = rewarding.total(resolved, asked, texts)
            self._drawn = (asked, texts, scored)
            self._same.append(rewarding.without_spread(scored.totals, prompts))
            together = rewarding.correlation(
                [len(ids) for ids in completion_ids_list], scored.totals, prompts
            )
            if together is not None:
                self._metrics["train"]["reward_length_correlation"].append(together)
            table = [scored.columns[reward.name] for reward in resolved]
            return torch.tensor(table, dtype=torch.float32, device=self.accelerator.device).T

        def _prepare_inputs(self, generation_batch: Any) -> Any:
            """Answers once for all steps that learn from them: one that memory was not enough for meets them again."""
            if not self.model.training:
                return super()._prepare_inputs(generation_batch)
            if self._answered_at == self._step and self._buffered_inputs is not None:
                return self._buffered_inputs[self._step % self.args.steps_per_generation]
            found = super()._prepare_inputs(generation_batch)
            if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
                self._answered_at = self._step
                self.may_go_back_here()
            return found

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            sampler = super()._get_train_sampler(dataset)
            seed = self.args.seed

            def set_epoch(epoch: int) -> None:
                sampler.generator.manual_seed(seed + epoch)

            # So that a run that is continued in a later epoch meets that epoch's order.
            sampler.set_epoch = set_epoch
            return sampler

        def log(self, logs: dict[str, float], *given: Any, **named: Any) -> None:
            if "loss" in logs:
                for reward in resolved:
                    logs |= {f"cost/{reward.name}/{name}": v for name, v in reward.facts().items()}
                # TRL's own is of 32-bit numbers, in which equal rewards may differ, and of RLOO's after divergence.
                self._metrics["train"]["frac_reward_zero_std"], self._same = self._same, []
                for sample in self._first_answers():
                    run.event("sample", step=self.state.global_step, **sample)
            super().log(logs, *given, **named)

        def _first_answers(self) -> Iterator[dict[str, Any]]:
            """The best and the worst answer to the first prompt of the last batch, for people."""
            if not hasattr(self, "_drawn"):
                return
            asked, texts, scored = self._drawn
            group = [n for n, prompt in enumerate(asked) if prompt.row == asked[0].row]
            yield from rewarding.samples(asked, texts, scored, among=group)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            every = self.args.steps_per_generation * self.num_iterations
            if self._step % every and self._buffered_inputs is not None and self.args.should_save:
                from pathlib import Path

                from safetensors.torch import save_file

                folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
                tensors = {
                    f"{place}.{name}": value.detach().cpu().contiguous().clone()
                    for place, batch in enumerate(self._buffered_inputs)
                    for name, value in batch.items()
                    if hasattr(value, "detach")
                }
                save_file(tensors, folder / BUFFER)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            from pathlib import Path

            from safetensors.torch import load_file

            folder = Path(resume_from_checkpoint)
            done = json.loads((folder / LOG).read_text(encoding="utf-8"))["global_step"]
            self._step = done * self.args.gradient_accumulation_steps
            if (folder / BUFFER).is_file():
                batches: dict[int, dict[str, Any]] = {}
                for key, value in load_file(folder / BUFFER, device=str(self.accelerator.device)).items():
                    place, _, name = key.partition(".")
                    batches.setdefault(int(place), {})[name] = value
                self._buffered_inputs = [batches[place] for place in sorted(batches)]

    return OnPrompts


def _text(ids: Sequence[int], stop_ids: Sequence[int], tokenizer: Any) -> str:
    """An answer's text without the token that ends it, as evaluation reads answers."""
    end = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids))
    text: str = tokenizer.decode(
        list(ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text
