"""PPO on transformers' Trainer: one training step answers a batch of prompts, scores the answers and learns from them.

    prompts -> generate -> rewards -> log-probabilities, values, reference -> advantages -> ppo_epochs x minibatches

The last optimizer update of a rollout is the Trainer's own, those before it are made here, so that its step, learning
rate, logging, checkpoints and resume count rollouts (`docs/decisions/0011-a-ppo-step-is-a-rollout.md`). The arithmetic
is in `ppo_math`, with its sources.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tunesmith import models
from tunesmith.data.cache import Encodings
from tunesmith.data.templates import end_of_turn_ids
from tunesmith.errors import ModelError, OutOfMemory, RunError, counted, is_out_of_memory
from tunesmith.forward import TRUNK, Trunk
from tunesmith.forward.head import Reading, read
from tunesmith.generation import Generated, generate, halving, length_batches
from tunesmith.methods import ppo_math as ppo
from tunesmith.methods.rewards import Scored, correlation, without_spread
from tunesmith.recipe import PPO
from tunesmith.training.checkpoints import free_memory, keeping_run_folder, save_weights
from tunesmith.training.run import Run, write_whole
from tunesmith.training.validating import rewarded

Score = Callable[[Sequence[int], Sequence[str]], Scored]
"""What answers are worth, given the numbers of their prompts and their texts."""

Samples = Callable[[Sequence[int], Sequence[str], Scored], Iterable[Mapping[str, Any]]]
"""Some answers for people to read, of those that were just learned from."""

VALUE = "value.safetensors"
STATE = "ppo.json"
LOGITS = 2**25
"""Logits held at a time (128 MB in float32); those of more tokens are computed again in the backward pass."""
SCORING_TOKENS = 16_384
"""Tokens per batch of a pass without gradients, padding included."""
ADAM_EPSILON = 1e-5
"""As in the N+ details: early gradients of a value head that starts at zero are tiny, and 1e-8 blows them up."""


class PolicyAndValue(nn.Module):
    """A language model and the estimate of what its unfinished answers are worth, as one module.

    The value is linear in the last hidden state: of the policy itself, or of a critic. The head starts at zero
    (N+ details), so that at first the reward alone speaks. Whatever else is asked of it, the policy answers.
    """

    is_quantized = False  # the policy may be; Trainer's checks on that are for a bare base without an adapter

    def __init__(
        self, policy: nn.Module, critic: nn.Module | None = None, head: nn.Linear | None = None
    ) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic
        width = _text_config(critic or policy).hidden_size
        if head is None:
            head = nn.Linear(width, 1)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.value_head = head.to(device=next(policy.parameters()).device, dtype=torch.float32)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("policy"), name)

    @property
    def generation_config(self) -> Any:
        """The policy's, which generation swaps for its own."""
        return self.policy.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.policy.generation_config = config

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, acted: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability and entropy of each token that `acted` marks, and the value of the state before it.

        One number per token, row by row. Entropies are zeros unless they are asked for.
        """
        hidden, logits = states(self.policy, input_ids, attention_mask, acted)
        logs, entropies = token_logprobs(
            self.policy, hidden, logits, input_ids, acted, temperature, entropy=entropy
        )
        if self.critic is not None:
            output = self.critic(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            hidden = output.last_hidden_state[:, :-1][acted[:, 1:]]
        with torch.autocast(hidden.device.type, enabled=False):
            values = self.value_head(hidden.float()).squeeze(-1)
        return logs, values, torch.zeros_like(logs) if entropies is None else entropies

    def value_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters that are not the policy's, by name."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and not name.startswith("policy.")
        }

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in the backward pass, of policy and critic."""
        self.policy.activation_checkpointing_enable(**options)  # type: ignore[operator]
        if self.critic is not None:
            self.critic.activation_checkpointing_enable(**options)  # type: ignore[operator]

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Save the policy alone, which plain transformers and PEFT load."""
        self.policy.save_pretrained(folder, **options)  # type: ignore[operator]


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _language_model(policy: Any) -> Any:
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


def is_parted(policy: Any) -> bool:
    """Whether the model's logits are its head applied to its trunk and nothing more (Gemma caps, Granite scales)."""
    model = _language_model(policy)
    if not hasattr(model, "_logits_are_head_of_trunk"):
        trunk, head = model.base_model, model.get_output_embeddings()
        alike = False
        if trunk is not model and head is not None:
            ids = torch.arange(8, device=model.device)[None] % _text_config(model).vocab_size
            flags = [(module, module.training) for module in model.modules()]
            model.eval()
            with torch.no_grad():
                whole = model(input_ids=ids, use_cache=False).logits.float()
                parts = head(trunk(input_ids=ids, use_cache=False).last_hidden_state).float()
            for module, flag in flags:
                module.training = flag
            alike = torch.allclose(whole, parts, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
        model._logits_are_head_of_trunk = alike
    return bool(model._logits_are_head_of_trunk)


def states(policy: Any, ids: Tensor, mask: Tensor, acted: Tensor) -> tuple[Tensor, Tensor | None]:
    """The last hidden state before each token that is marked, and its logits where these cannot be made of it."""
    model = _language_model(policy)
    trunk: Trunk | None = getattr(model, TRUNK, None)
    if trunk is not None:
        wanted = torch.zeros_like(acted)
        wanted[:, :-1] = acted[:, 1:]
        found = trunk.hidden({"input_ids": ids, "attention_mask": mask}, wanted)
        if found is not None:
            return found.states.index_select(0, torch.argsort(found.slots)), None
    if is_parted(policy):
        output = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return output.last_hidden_state[:, :-1][acted[:, 1:]], None
    output = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    return output.hidden_states[-1][:, :-1][acted[:, 1:]], output.logits[:, :-1][acted[:, 1:]]


def token_logprobs(
    policy: Any,
    hidden: Tensor,
    logits: Tensor | None,
    ids: Tensor,
    acted: Tensor,
    temperature: float,
    *,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (and entropies) of the marked tokens, without ever holding all of their logits."""
    targets = ids[:, 1:][acted[:, 1:]]
    if logits is not None:
        return ppo.logprobs_and_entropy(logits, targets, temperature=temperature, entropy=entropy)
    model = _language_model(policy)
    head = model.get_output_embeddings()
    if hasattr(model, TRUNK):
        outputs = ("log_probs", "entropy") if entropy else ("log_probs",)
        cap = getattr(_text_config(model), "final_logit_softcapping", None)
        read_off = Reading(temperature=temperature, softcap=cap, outputs=outputs)
        found = read(hidden, head.weight, head.bias, targets, read_off)
        return found.log_probs, found.entropy

    def of(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        return ppo.logprobs_and_entropy(head(hidden), targets, temperature=temperature, entropy=entropy)

    chunk = max(LOGITS // _text_config(policy).vocab_size, 1)
    if len(targets) <= chunk:
        return of(hidden, targets)
    from torch.utils.checkpoint import checkpoint

    parts = [
        checkpoint(of, *part, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else of(*part)
        for part in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    ]
    logs = torch.cat([part[0] for part in parts])
    entropies = [part[1] for part in parts if part[1] is not None]
    return logs, torch.cat(entropies) if entropies else None


def without_dropout(model: nn.Module) -> float:
    """Switch all dropout off, in place, and give the largest rate there was.

    A policy that drops units at random gives other probabilities when it learns than when it answered (N+ details).
    """
    largest = 0.0
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            largest, module.p = max(largest, module.p), 0.0
        for name in ("attention_dropout", "activation_dropout", "hidden_dropout", "dropout", "layerdrop"):
            rate = module.__dict__.get(name)
            if isinstance(rate, float) and rate > 0:
                largest = max(largest, rate)
                setattr(module, name, 0.0)
    return largest


def critic_of(policy: Any, tokenizer: Any, section: PPO) -> tuple[Any, nn.Linear | None, str]:
    """The critic's trunk and head, if it is to have its own, and what it starts from.

    Raises ModelError for one that reads other tokens than the policy.
    """
    if section.value == "trunk":
        return None, None, "a linear head on the model's last layer"
    if section.critic is None:
        return models.copied(policy_trunk(policy)), None, "a copy of the model, with the same weights trained"
    if models.load_tokenizer(section.critic).get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"The critic {section.critic} reads other tokens than the model.",
            found="a tokenizer with another vocabulary",
            fix="Name a model of the same family, or leave method.critic out.",
        )
    found, head = models.load_model(section.critic, device=str(policy.device)), None
    if hasattr(found, "merge_and_unload"):
        found = models.merged(found)
    score = getattr(found, "score", None)
    if isinstance(score, nn.Linear) and score.out_features == 1:
        head = score.requires_grad_(True)
    trunk = found.base_model.float().requires_grad_(True)
    without_dropout(trunk)
    return trunk, head, f"{section.critic}" + (" and its scoring head" if head else "")


def policy_trunk(policy: Any) -> Any:
    """The part of a language model below its head."""
    return _language_model(policy).base_model


@dataclass
class Rollout:
    """Prompts with the answers that the policy gave, and what is known of each of their tokens, `(answers, tokens)`."""

    prompts: list[list[int]]
    answers: list[list[int]]
    """New tokens, with the stop token that ended them."""
    mask: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def lengths(self) -> dict[int, int]:
        """Tokens of each prompt with its answer."""
        return {n: len(p) + len(a) for n, (p, a) in enumerate(zip(self.prompts, self.answers, strict=True))}

    def batch(self, rows: Sequence[int], device: Any) -> dict[str, Tensor]:
        """Prompts and answers as the model's input, padded on the right to the longest of them."""
        width = max(len(self.prompts[n]) + len(self.answers[n]) for n in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask, acted = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for line, n in enumerate(rows):
            start, end = len(self.prompts[n]), len(self.prompts[n]) + len(self.answers[n])
            ids[line, :end] = torch.tensor(self.prompts[n] + self.answers[n])
            mask[line, :end] = 1
            acted[line, start:end] = True
        return {
            "input_ids": ids.to(device),
            "attention_mask": mask.to(device),
            "acted": acted.to(device),
        }


class PPOTrainer(Trainer):  # type: ignore[misc]
    """The Trainer with PPO as its training step."""

    control: Any
    model: Any
    _micro_rows: int | None = None

    def __init__(
        self,
        *,
        section: PPO,
        model: PolicyAndValue,
        reference: Any,
        score: Score,
        samples: Samples,
        facts: Callable[[], Mapping[str, float]],
        asked: Encodings | Sequence[Any],
        num_validation: int,
        micro_batch_size: int,
        run: Run,
        **options: Any,
    ) -> None:
        super().__init__(
            model=model,
            train_dataset=range(len(asked)),
            eval_dataset=range(num_validation) if num_validation else None,
            data_collator=self._collate,
            **options,
        )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise RunError(
                "PPO runs on one or more processes that each hold the whole model.",
                found="DeepSpeed or FSDP in the accelerate configuration",
                fix="Use `accelerate launch --multi_gpu`, or one process.",
            )
        self.section, self.reference, self.run_folder = section, reference, run
        self.score, self.samples, self.facts, self.asked = score, samples, facts, asked
        self.micro_batch_size = micro_batch_size
        self.stop_ids = end_of_turn_ids(self.processing_class)
        self.kl_coefficient = section.kl_coefficient
        self._measures: dict[str, list[float]] = defaultdict(list)
        self._tokens = 0
        self._warned = False
        self._drawn: tuple[Sequence[int], list[str], Scored] | None = None

    # What a step is

    def _collate(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Prompts by number; the Trainer counts tokens and work by their ids."""
        prompts = [list(self.asked[number].input_ids) for number in numbers]
        width = max(map(len, prompts))
        return {
            "number": torch.tensor(list(numbers)),
            "input_ids": torch.tensor([p + [0] * (width - len(p)) for p in prompts]),
            "attention_mask": torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in prompts]),
        }

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One rollout, and all updates from it but the last, whose gradient is left for the Trainer to apply."""
        model.train()
        rollout = self._rollout(inputs["number"].tolist())
        started = time.perf_counter()
        count = len(rollout.prompts)
        parts = min(self.section.num_minibatches, count)
        random = np.random.default_rng([self.args.seed, self.state.global_step, 1])
        updates = [
            part
            for _ in range(self.section.ppo_epochs)
            for part in np.array_split(random.permutation(count), parts)
        ]
        losses = []
        for number, rows in enumerate(updates, 1):
            losses.append(self._backward(model, rollout, rows.tolist(), is_first=number == 1))
            if number < len(updates):
                self._update(model)
        self._measure("seconds/learning", time.perf_counter() - started)
        return torch.tensor(sum(losses) / len(losses), device=self.args.device)

    def _update(self, model: Any) -> None:
        """An optimizer update as the Trainer makes it, at the learning rate of this rollout."""
        if self.args.max_grad_norm > 0:
            self._clip_grad_norm(model)
        self.control = self.callback_handler.on_pre_optimizer_step(self.args, self.state, self.control)
        self.optimizer.step()
        model.zero_grad()

    def _backward(self, model: Any, rollout: Rollout, rows: list[int], *, is_first: bool) -> float:
        """Gradients of the loss on one minibatch, a mean over all its tokens; gives the loss. Where memory runs out its
        passes are halved, which changes nothing in a sum over tokens."""
        while True:
            try:
                return self._minibatch(model, rollout, rows, is_first=is_first)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error).strip().splitlines()
            free_memory()
            model.zero_grad()  # of the passes before; each minibatch begins without gradients
            most = min(self._pass_rows, len(rows))
            step = self.state.global_step + 1
            if most < 2:
                raise OutOfMemory(
                    f"The memory is not enough for step {step}.",
                    found=f"a single answer with its prompt is too much; {said[0][:200] if said else ''}",
                    fix="Add --gradient-checkpointing, lower method.max_new_tokens or --max-length, or use --lora.",
                )
            self._micro_rows = most // 2
            self.run_folder.event(
                "decision",
                step=step,
                name="micro-batch",
                value=self._micro_rows,
                reason=f"memory ran out with {counted(most, 'answer')} in a forward pass; the minibatch is taken again "
                "in smaller passes, with the same answers for each update",
            )

    @property
    def _pass_rows(self) -> int:
        return self._micro_rows or self.micro_batch_size

    def _minibatch(self, model: Any, rollout: Rollout, rows: list[int], *, is_first: bool) -> float:
        section = self.section
        rows = sorted(rows, key=lambda n: -(len(rollout.prompts[n]) + len(rollout.answers[n])))
        tokens = float(self._add(rollout.mask[rows].sum()).clamp(min=1))
        # Processes' gradients are averaged, the loss is a mean over the tokens of all of them.
        share = self.accelerator.num_processes / tokens
        sums: dict[str, float] = defaultdict(float)
        micro = [rows[start : start + self._pass_rows] for start in range(0, len(rows), self._pass_rows)]
        for number, part in enumerate(micro, 1):
            mask = rollout.mask[part]
            old, values_then, advantages, returns = (
                table[part][mask]
                for table in (rollout.logprobs, rollout.values, rollout.advantages, rollout.returns)
            )
            syncs = number == len(micro)
            with contextlib.nullcontext() if syncs else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    logs, values, entropy = model(
                        **rollout.batch(part, self.args.device),
                        temperature=section.temperature,
                        entropy=section.entropy_coefficient > 0,
                    )
                policy, clipped = ppo.policy_losses(logs, old, advantages, cliprange=section.cliprange)
                value, value_clipped = ppo.value_losses(
                    values, values_then, returns, cliprange=section.cliprange_value
                )
                loss = policy.sum() + section.value_coefficient * value.sum()
                if section.entropy_coefficient > 0:
                    loss = loss - section.entropy_coefficient * entropy.sum()
                self.accelerator.backward(loss * share)
            with torch.no_grad():
                sums["loss"] += float(loss)
                sums["policy_loss"] += float(policy.sum())
                sums["value_loss"] += float(value.sum())
                sums["approx_kl"] += float(ppo.approximate_kl(logs, old).sum())
                sums["clip_fraction"] += float(clipped.sum())
                sums["value_clip_fraction"] += float(value_clipped.sum())
        names = list(sums)
        found = self._add(torch.tensor([sums[name] for name in names], device=self.args.device))
        means = dict(zip(names, (found / tokens).tolist(), strict=True))
        if is_first:
            self._check_repeats(means["approx_kl"])
        for name in names:
            if name != "loss":
                self._measure(name, means[name])
        return float(means["loss"])

    def _check_repeats(self, moved: float) -> None:
        """Before any update the policy must be the one that answered."""
        if moved > 0.01 and not self._warned:
            self._warned = True
            self.run_folder.event(
                "warning",
                step=self.state.global_step,
                message=f"The model gives other probabilities when it learns than when it answered (KL {moved:.3f} "
                "before any update): its forward pass is random or too coarse, and the clipping works on noise.",
            )

    def compute_loss_context_manager(self) -> Any:
        """Mixed precision. A model that is prepared brings it along; the policy and the reference in it, which are
        asked by themselves, do not."""
        return self.accelerator.autocast()

    # What a rollout is

    def _rollout(self, numbers: Sequence[int]) -> Rollout:
        """Answer prompts, score the answers, and work out what each token did better than expected."""
        section = self.section
        started = time.perf_counter()
        prompts = [list(self.asked[number].input_ids) for number in numbers]
        answers = self._answers(prompts, section.temperature, self._seed())
        self._measure("seconds/generation", time.perf_counter() - started)

        started = time.perf_counter()
        texts = [answer.text for answer in answers]
        scored = self.score(numbers, texts)
        self._drawn = (numbers, texts, scored)
        self._measure("seconds/rewards", time.perf_counter() - started)

        started = time.perf_counter()
        device = self.args.device
        written = [[*a.ids, *([] if a.stop_id is None else [a.stop_id])] for a in answers]
        lengths = torch.tensor([len(ids) for ids in written])
        mask = (torch.arange(max(int(lengths.max()), 1)) < lengths[:, None]).to(device)
        empty = torch.zeros(mask.shape, device=device)
        rollout = Rollout(prompts, written, mask, *(empty.clone() for _ in range(4)))
        reference, entropy = self._score_tokens(rollout)

        scores = torch.tensor(scored.totals, dtype=torch.float32, device=device)
        ended = torch.tensor([a.finish_reason == "stop" for a in answers], device=device)
        penalized = ppo.penalized_scores(scores, ended, section.missing_eos_penalty)
        kl = ppo.kl_estimates(rollout.logprobs, reference, estimator=section.kl_estimator) * mask
        rewards = ppo.token_rewards(penalized, kl, mask, self.kl_coefficient)
        if section.whiten_rewards:
            rewards = ppo.whiten(rewards, mask, shift_mean=False, add=self._add)
        gained = ppo.advantages(rewards, rollout.values, mask, gamma=section.gamma, lam=section.lam)
        rollout.returns = ppo.returns(gained, rollout.values, mask)
        rollout.advantages = ppo.whiten(gained, mask, add=self._add)
        self._measure("seconds/scoring", time.perf_counter() - started)

        self._tokens = sum(rollout.lengths().values())
        divergence = (ppo.kl_estimates(rollout.logprobs, reference) * mask).sum(1)
        self._measure_answers(scored, lengths, ended)
        together = correlation([len(ids) for ids in written], scored.totals, [0] * len(written))
        if together is not None:
            self._measure("reward_length_correlation", together)
        everywhere = torch.ones_like(scores)
        objective = penalized - self.kl_coefficient * kl.sum(1)
        mean_kl = float(ppo.masked_mean(divergence, everywhere, self._add))
        self._measure("objective", float(ppo.masked_mean(objective, everywhere, self._add)))
        self._measure("kl", mean_kl)
        self._measure("entropy", float(ppo.masked_mean(entropy, mask, self._add)))
        self._measure("kl_coefficient", self.kl_coefficient)
        self._measure("values/mean", float(ppo.masked_mean(rollout.values, mask, self._add)))
        self._measure("returns/mean", float(ppo.masked_mean(rollout.returns, mask, self._add)))
        explained = ppo.explained_variance(rollout.values, rollout.returns, mask, self._add)
        if math.isfinite(explained):
            self._measure("explained_variance", explained)
        if section.kl_target is not None:
            self.kl_coefficient = ppo.adapted_coefficient(
                self.kl_coefficient,
                mean_kl,
                target=section.kl_target,
                horizon=section.kl_horizon,
                num_answers=len(prompts) * self.accelerator.num_processes,
            )
        return rollout

    def _answers(self, prompts: Sequence[Sequence[int]], temperature: float, seed: int) -> list[Generated]:
        with self.compute_loss_context_manager():
            return generate(
                self.model.policy,
                self.processing_class,
                prompts,
                max_new_tokens=self.section.max_new_tokens,
                stop_ids=self.stop_ids,
                batch_tokens=self.section.generation_batch_tokens,
                temperature=temperature,
                seed=seed,
            )

    def _seed(self) -> int:
        """Of the recipe's seed, the step and the process, so that a resumed run draws what a straight one does."""
        parts = [self.args.seed, self.state.global_step, self.accelerator.process_index, 0]
        return int(np.random.SeedSequence(parts).generate_state(1)[0])

    def _score_tokens(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Fill in log-probabilities and values of the rollout's tokens; gives the reference's and the entropies."""
        temperature = self.section.temperature
        reference, entropies = torch.zeros_like(rollout.values), torch.zeros_like(rollout.values)

        def fill(rows: Sequence[int]) -> list[None]:
            part = list(rows)
            batch, mask = rollout.batch(part, self.args.device), rollout.mask[part]

            def put(table: Tensor, numbers: Tensor) -> None:
                lines = torch.zeros(mask.shape, device=table.device)
                lines[mask] = numbers.float()
                table[part] = lines

            with torch.no_grad(), self.compute_loss_context_manager():
                logs, values, entropy = self.model(**batch, temperature=temperature, entropy=True)
                for table, numbers in (
                    (rollout.logprobs, logs), (rollout.values, values), (entropies, entropy),
                ):  # fmt: skip
                    put(table, numbers)
                off = self.model.policy.disable_adapter() if self.reference is None else None
                with off or contextlib.nullcontext():
                    policy = self.model.policy if self.reference is None else self.reference
                    args = (batch["input_ids"], batch["attention_mask"], batch["acted"])
                    hidden, logits = states(policy, *args)
                    logs, _ = token_logprobs(
                        policy, hidden, logits, args[0], args[2], temperature, entropy=False
                    )
                    put(reference, logs)
            return [None] * len(part)

        self.model.eval()
        for batch in length_batches(rollout.lengths(), tokens=SCORING_TOKENS):
            for _ in halving(fill, batch):
                pass
        self.model.train()
        return reference, entropies

    # What is told

    def _add(self, numbers: Tensor) -> Tensor:
        """Sums over all processes."""
        if self.accelerator.num_processes == 1:
            return numbers
        summed: Tensor = self.accelerator.reduce(numbers, reduction="sum")
        return summed

    def _measure(self, name: str, value: float) -> None:
        self._measures[name].append(value)

    def _measure_answers(
        self,
        scored: Scored,
        lengths: Tensor,
        ended: Tensor,
    ) -> None:
        """Rewards, each with its spread, and the lengths of answers."""
        # Over all answers of the rollout, as there is one to each prompt.
        self._measure("frac_reward_zero_std", without_spread(scored.totals, [0] * len(scored.totals)))
        tables = {"reward": scored.totals, **{f"rewards/{n}": c for n, c in scored.columns.items()}}
        for name, numbers in tables.items():
            table = torch.tensor(numbers, dtype=torch.float32, device=self.args.device)
            everywhere = torch.ones_like(table)
            mean = float(ppo.masked_mean(table, everywhere, self._add))
            spread = math.sqrt(float(ppo.masked_variance(table, everywhere, self._add)))
            names = ("reward", "reward_std") if name == "reward" else (f"{name}/mean", f"{name}/std")
            self._measure(names[0], mean)
            self._measure(names[1], spread)
        table = lengths.to(self.args.device, torch.float32)
        everywhere = torch.ones_like(table)
        self._measure("completions/mean_length", float(ppo.masked_mean(table, everywhere, self._add)))
        self._measure(
            "completions/clipped_ratio",
            float(ppo.masked_mean((~ended).to(everywhere), everywhere, self._add)),
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """What the Trainer logs of a step, with the means of our measures since the last time."""
        if "loss" in logs:
            for name, values in self._measures.items():
                logs[name] = sum(values) / len(values)
            self._measures.clear()
            logs |= self.facts()
            for sample in self.samples(*self._drawn) if self._drawn else ():
                self.run_folder.event("sample", step=self.state.global_step, **sample)
        super().log(logs, *args, **kwargs)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        self.state.num_input_tokens_seen += int(
            self._add(torch.tensor(self._tokens, device=self.args.device))
        )

    # What is kept

    def create_optimizer(self, model: Any = None) -> Any:
        """The Trainer's optimizer, with the value's parameters at their own learning rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.section.value_learning_rate is not None:
            own = {id(p) for p in self.model.value_parameters().values()}
            for group in list(optimizer.param_groups):
                moved = [p for p in group["params"] if id(p) in own]
                if moved:
                    group["params"] = [p for p in group["params"] if id(p) not in own]
                    options = {k: v for k, v in group.items() if k not in {"params", "initial_lr"}}
                    optimizer.add_param_group(
                        {**options, "params": moved, "lr": self.section.value_learning_rate}
                    )
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The policy as any model is saved, and beside it the value and the KL coefficient."""
        if self.args.should_save:
            from safetensors.torch import save_file

            folder = Path(output_dir or self.args.output_dir)
            with self._policy_alone():
                save_weights(self, folder)
            value = self.model.value_parameters().items()
            save_file({name: p.detach().cpu().contiguous() for name, p in value}, folder / VALUE)
            write_whole(folder / STATE, json.dumps({"kl_coefficient": self.kl_coefficient}))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._policy_alone():
            super()._load_from_checkpoint(resume_from_checkpoint, self.model)
        from safetensors.torch import load_file

        folder = Path(resume_from_checkpoint)
        saved, own = load_file(folder / VALUE), self.model.value_parameters()
        if saved.keys() != own.keys():
            raise RunError(
                f"The value of {folder} is not of the kind that the recipe names.",
                found=", ".join(sorted(saved.keys() ^ own.keys())[:4]),
                fix="Resume with the recipe that the run was started with.",
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])
        self.kl_coefficient = json.loads((folder / STATE).read_text(encoding="utf-8"))["kl_coefficient"]

    @contextlib.contextmanager
    def _policy_alone(self) -> Iterator[None]:
        """The policy in the place of the whole model, for what the Trainer does with a model's own class."""
        whole = self.model
        self.model = whole.policy
        try:
            yield
        finally:
            self.model = whole


def trainer(
    section: PPO,
    *,
    model: Any,
    tokenizer: Any,
    train: Encodings | Sequence[Any],
    validation: Any,
    score: Score,
    score_validation: Score | None = None,
    samples: Samples = lambda *drawn: (),
    facts: Callable[[], Mapping[str, float]] = dict,
    arguments: Mapping[str, Any],
    run: Run,
    keep: int,
) -> Any:
    """A trainer on prompts whose answers `score` rewards, that has not started."""
    rate = without_dropout(model)
    if rate:
        run.event(
            "decision",
            name="dropout",
            value=0,
            reason=f"{rate:g} was set, but PPO compares the probabilities of one and the same model (docs/ppo.md)",
        )
    reference, reason = models.reference_of(model)
    run.event(
        "decision", name="reference", value="adapter off" if reference is None else "copy", reason=reason
    )
    if not is_parted(model):
        run.event(
            "decision",
            name="logits",
            value="all at once",
            reason="the model does more than apply its head to its last layer, so the logits of a whole batch are held",
        )
    critic, head, reason = critic_of(model, tokenizer, section)
    run.event("decision", name="value", value=section.value, reason=reason)
    micro = arguments["per_device_train_batch_size"]
    batch = micro * arguments["gradient_accumulation_steps"]
    options = {
        **arguments,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "adam_epsilon": ADAM_EPSILON,
    }
    validated = rewarded(
        PPOTrainer,
        validation=validation,
        score=score_validation or score,
        stop_ids=end_of_turn_ids(tokenizer),
        max_new_tokens=section.max_new_tokens,
    )
    return keeping_run_folder(validated, run, keep=keep)(
        section=section,
        model=PolicyAndValue(model, critic, head),
        reference=reference,
        score=score,
        samples=samples,
        facts=facts,
        asked=train,
        num_validation=len(validation),
        micro_batch_size=micro,
        run=run,
        args=TrainingArguments(**options),
        processing_class=tokenizer,
    )
