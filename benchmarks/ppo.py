"""Tokens per second of PPO steps: tunesmith's trainer and the step written straightforwardly, on the same prompts.

The peer answers all prompts in one left-padded batch, keeps the logits of every position of every row for
log-probabilities and entropy, pads every minibatch to the rollout's longest row, and holds a second copy of the model
as the reference. Both take turns in one process. The last line is one JSON object: tokens of prompts and answers per
second of a step (medians), and their ratio; seconds and shares of time are said above it.

    python benchmarks/ppo.py --steps 5 --batch 32
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tunesmith import models
from tunesmith.data import prepare
from tunesmith.data.prompts import encoded, questioned
from tunesmith.data.templates import Encoding, end_of_turn_ids, set_template
from tunesmith.methods import ppo_math as ppo
from tunesmith.methods import ppo_trainer
from tunesmith.methods.rewards import Scored
from tunesmith.recipe import PPO, Data, Full, LoRA
from tunesmith.training.run import Run


def rewarded(texts: list[str]) -> list[float]:
    """Something to learn that costs nothing."""
    return [min(len(text), 80) / 80 for text in texts]


class Ours:
    """The trainer, with a clock around every forward and backward pass."""

    def __init__(self, section: PPO, base: str, lora: bool, prompts: list[list[int]], args: Any) -> None:
        torch.manual_seed(0)
        tokenizer = models.load_tokenizer(base)
        model = models.attach(models.load_model(base), LoRA() if lora else Full())
        folder = Path(tempfile.mkdtemp())
        self.trainer = ppo_trainer.trainer(
            section,
            model=model,
            tokenizer=tokenizer,
            train=[Encoding(tuple(p), ()) for p in prompts],
            validation=[],
            score=lambda numbers, texts: Scored(rewarded(list(texts)), {}),
            arguments={
                "output_dir": str(folder), "max_steps": 10**6, "learning_rate": 1e-5, "report_to": ["none"],
                "per_device_train_batch_size": args.micro, "remove_unused_columns": False, "use_cpu": True,
                "gradient_accumulation_steps": args.batch // args.micro, "disable_tqdm": True, "max_grad_norm": 1.0,
            },
            run=Run(folder),
            keep=1,
        )  # fmt: skip
        trainer = self.trainer
        trainer.create_optimizer()
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        self.times = {"forward": 0.0, "backward": 0.0}
        self.running = False
        self._clock(trainer.model, "forward", "forward")
        self._clock(trainer, "_score_tokens", "forward")  # of the policy and of the reference
        self._clock(trainer.accelerator, "backward", "backward")

    def _clock(self, owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.running:
                return inner(*args, **kwargs)
            started, self.running = time.perf_counter(), True
            try:
                return inner(*args, **kwargs)
            finally:
                self.running = False
                self.times[name] += time.perf_counter() - started

        setattr(owner, method, timed)

    def step(self, numbers: list[int]) -> tuple[float, int]:
        """One rollout with all its updates: seconds and tokens."""
        started = time.perf_counter()
        trainer = self.trainer
        trainer.training_step(trainer.model, {"number": torch.tensor(numbers)})
        trainer._update(trainer.model)
        trainer.state.global_step += 1
        return time.perf_counter() - started, trainer._tokens


class Peer:
    """The same step, as one writes it down."""

    def __init__(self, section: PPO, base: str, lora: bool, prompts: list[list[int]], args: Any) -> None:
        torch.manual_seed(0)
        self.section, self.prompts, self.args = section, prompts, args
        self.tokenizer = models.load_tokenizer(base)
        self.model = models.attach(models.load_model(base), LoRA(dropout=0) if lora else Full())
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.head = torch.nn.Linear(self.model.config.hidden_size, 1)
        torch.nn.init.zeros_(self.head.weight)
        self.stops = end_of_turn_ids(self.tokenizer)
        self.trained = [p for m in (self.model, self.head) for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, eps=1e-5, weight_decay=0.0)

    def forward(self, model: Any, ids: Any, mask: Any, width: int) -> tuple[Any, Any, Any]:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            output_hidden_states=True,
        )
        logits = output.logits[:, width - 1 : -1].float() / self.section.temperature
        logs = torch.log_softmax(logits, -1)
        chosen = logs.gather(2, ids[:, width:, None]).squeeze(2)
        values = self.head(output.hidden_states[-1][:, width - 1 : -1]).squeeze(2)
        return chosen, values, -(logs.exp() * logs).sum(-1)

    def step(self, numbers: list[int]) -> tuple[float, int]:
        """One rollout with all its updates: seconds and tokens."""
        section = self.section
        started = time.perf_counter()
        prompts = [self.prompts[n] for n in numbers]
        width, pad = max(map(len, prompts)), self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        self.model.eval()
        with torch.no_grad():
            ids = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=section.max_new_tokens, do_sample=True,
                temperature=section.temperature, top_k=0, pad_token_id=pad, eos_token_id=list(self.stops),
            )  # fmt: skip
            answers = ids[:, width:]
            is_stop = torch.isin(answers, torch.tensor(self.stops))
            acted = is_stop.cumsum(1) - is_stop.long() == 0
            mask = torch.cat([mask, acted.long()], 1)
            texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
            old, values, _ = self.forward(self.model, ids, mask, width)
            reference, _, _ = self.forward(self.reference, ids, mask, width)
            kl = (old - reference) * acted
            rewards = ppo.token_rewards(torch.tensor(rewarded(texts)), kl, acted, section.kl_coefficient)
            gained = ppo.advantages(rewards, values, acted, gamma=section.gamma, lam=section.lam)
            returns = gained + values
            gained = ppo.whiten(gained, acted)
        self.model.train()
        for _ in range(section.ppo_epochs):
            for rows in torch.randperm(len(ids)).chunk(section.num_minibatches):
                for part in rows.split(self.args.micro):
                    m = acted[part]
                    new, value, _ = self.forward(self.model, ids[part], mask[part], width)
                    policy, _ = ppo.policy_losses(new, old[part], gained[part], cliprange=section.cliprange)
                    error, _ = ppo.value_losses(
                        value, values[part], returns[part], cliprange=section.cliprange_value
                    )
                    loss = ((policy + section.value_coefficient * error) * m).sum() / acted[rows].sum()
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return time.perf_counter() - started, int(mask.sum())


def main() -> None:
    """Measure both, by turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dataset", default="example:sql")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32, help="answers per step")
    parser.add_argument("--micro", type=int, default=8, help="answers per forward pass when learning")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--full", action="store_true", help="train every weight instead of LoRA")
    args = parser.parse_args()

    tokenizer = models.load_tokenizer(args.model)
    set_template(tokenizer, None)
    data = Data(dataset=args.dataset, max_rows=2 * args.batch * args.steps, cache=False)
    asked = encoded(prepare(data, questioned), tokenizer, data=data, room=args.max_new_tokens).train
    prompts = [list(asked[n].input_ids) for n in range(min(len(asked), args.batch * args.steps))]
    section = PPO(max_new_tokens=args.max_new_tokens, num_minibatches=2)
    sides = [side(section, args.model, not args.full, prompts, args) for side in (Ours, Peer)]
    seconds: dict[str, list[float]] = {"Ours": [], "Peer": []}
    rates: dict[str, list[float]] = {"Ours": [], "Peer": []}
    for step in range(args.steps):
        numbers = [(step * args.batch + n) % len(prompts) for n in range(args.batch)]
        for side in sides:
            name = type(side).__name__
            took, tokens = side.step(numbers)
            print(f"{name} step {step}: {took:.2f} s, {tokens / took:,.0f} tokens/s", file=sys.stderr)
            if step:  # the first warms up
                seconds[name].append(took)
                rates[name].append(tokens / took)
            elif isinstance(side, Ours):
                side.times.update(forward=0.0, backward=0.0)
                side.trainer._measures.clear()
    ours = sides[0]
    total = sum(seconds["Ours"])
    measures = ours.trainer._measures
    shares = {
        "generation": sum(measures["seconds/generation"]) / total,
        "forward": ours.times["forward"] / total,
        "backward": ours.times["backward"] / total,
    }
    medians = {name: statistics.median(found) for name, found in rates.items()}
    took = {name.lower(): round(statistics.median(found), 3) for name, found in seconds.items()}
    print(
        f"seconds {took}; shares { ({name: round(share, 3) for name, share in shares.items()}) }",
        file=sys.stderr,
    )
    print(
        json.dumps(
            {
                "name": "ppo step",
                "ours": round(medians["Ours"]),
                "peer": round(medians["Peer"]),
                "ratio": round(medians["Ours"] / medians["Peer"], 3),
                "unit": "tokens/s",
                "n": args.steps - 1,
            }
        )
    )


if __name__ == "__main__":
    main()
