"""Trains the tiny base model from nothing on packed windows of the corpus."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tiny_corpus import copy_circuit
from tiny_corpus.tokenizer import MAX_TOKENS, SPECIAL


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: a short warm-up, a plateau, then a linear fall to zero."""

    steps: int = 1030
    window: int = 256
    windows_per_step: int = 16
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    warmup: int = 50
    fall: float = 0.13
    """The share of the steps over which the rate falls."""

    def copying(self, step: int) -> int:
        """How many of a step's windows are copying exercises: a quarter, in the end an eighth."""
        return self.windows_per_step // (4 if step < 475 else 8)

    def factor(self, step: int) -> float:
        falling = self.fall * self.steps
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / falling)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The untrained model: small enough that a CPU fine-tunes it in a minute."""
    endoftext = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    copy_circuit.plant(model, seed)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, endoftext], pad_token_id=tokenizer.pad_token_id
    )
    return model


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """All texts as one row of ids, each closed by the document separator."""
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids: list[int] = []
    for start in range(0, len(texts), 2000):
        for one in tokenizer(list(texts[start : start + 2000]))["input_ids"]:
            ids.extend(one)
            ids.append(separator)
    return torch.tensor(ids, dtype=torch.int32)


def copying_windows(
    count: int, width: int, vocabulary: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random tokens said again and again, with a loss only where they can be foretold.

    Reading a name in the context and writing it again is what the model is for; random tokens
    teach it in minutes, because nothing but looking back can predict them.
    """
    ids = torch.empty(count, width, dtype=torch.long)
    labels = torch.full((count, width), -100)
    for row in range(count):
        at = 0
        while at < width:
            length, times = torch.randint(3, 40, (2,), generator=generator).tolist()
            times = 2 + times % 3
            phrase = torch.randint(len(SPECIAL), vocabulary, (length,), generator=generator)
            whole = phrase.repeat(times)[: width - at]
            ids[row, at : at + len(whole)] = whole
            known = slice(at + length + 1, at + len(whole))
            labels[row, known] = ids[row, known]
            at += len(whole)
    return ids, labels


def batches(ids: Tensor, schedule: Schedule, seed: int) -> Iterator[Tensor]:
    """Windows of the row in random order, again in another order when the row is used up."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        shift = int(torch.randint(schedule.window, (1,), generator=generator))
        windows = ids[shift : shift + (len(ids) - shift) // schedule.window * schedule.window]
        rows = windows.view(-1, schedule.window)
        order = torch.randperm(len(rows), generator=generator)
        for chosen in order.split(schedule.windows_per_step):
            if len(chosen) == schedule.windows_per_step:
                yield rows[chosen].long()


class Muon:
    """Momentum whose update is made orthogonal: on matrices, about twice as quick as Adam."""

    def __init__(self, parameters: Sequence[nn.Parameter], momentum: float = 0.95) -> None:
        shapes = dict.fromkeys(p.shape for p in parameters)
        self.groups = [[p for p in parameters if p.shape == shape] for shape in shapes]
        self.moments = [torch.zeros(len(g), *g[0].shape) for g in self.groups]
        self.momentum = momentum

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for group, moment in zip(self.groups, self.moments, strict=True):
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            moment.lerp_(gradient, 1 - self.momentum)
            update = _orthogonal(gradient.lerp(moment, self.momentum))
            update *= max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1 - 0.02 * rate).sub_(change, alpha=rate)


def _orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly the nearest orthogonal matrices, by the quintic Newton-Schulz iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def train(
    model: LlamaForCausalLM,
    ids: Tensor,
    schedule: Schedule,
    seed: int,
    keep: Callable[[int], None],
    compiled: bool = False,
) -> None:
    """Trains the model in place, calls `keep` now and then, and prints how it goes."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=schedule.other_rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    forward = torch.compile(model) if compiled else model
    started, seen, smooth = time.monotonic(), 0, math.nan
    generator = torch.Generator().manual_seed(seed + 1)
    vocabulary = model.config.vocab_size
    for step, window in zip(range(schedule.steps), batches(ids, schedule, seed), strict=False):
        labels, count = window.clone(), schedule.copying(step)
        window[:count], labels[:count] = copying_windows(count, schedule.window, vocabulary, generator)
        loss = forward(input_ids=window, labels=labels, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        factor = schedule.factor(step)
        for group in adam.param_groups:
            group["lr"] = schedule.other_rate * factor
        adam.step()
        muon.step(schedule.matrix_rate * factor)
        model.zero_grad(set_to_none=True)
        seen += window.numel()
        smooth = loss.item() if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss.item()
        if (step + 1) % 50 == 0:
            speed = seen / (time.monotonic() - started)
            print(f"step {step + 1}/{schedule.steps} loss {smooth:.3f} {speed:.0f} tokens/s",
                  flush=True)  # fmt: skip
        if (step + 1) % 250 == 0:
            keep(step + 1)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, ids: Tensor, window: int = 256) -> float:
    """The mean negative log-likelihood per token, in nats, over whole windows."""
    model.eval()
    rows = ids[: len(ids) // window * window].view(-1, window).long()
    losses = [model(input_ids=r, labels=r, use_cache=False).loss.item() for r in rows.split(16)]
    weights = [len(r) for r in rows.split(16)]
    return sum(a * b for a, b in zip(losses, weights, strict=True)) / sum(weights)


def unigram_loss(train_ids: Tensor, held_out: Tensor, vocabulary: int) -> float:
    """The same for an add-one unigram model counted on the training text."""
    counts = torch.bincount(train_ids.long(), minlength=vocabulary).double() + 1
    return float(-(counts / counts.sum()).log()[held_out.long()].mean())
