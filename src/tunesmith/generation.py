"""Answers from a model: token ids in, token ids out, batched, in the order asked.

One explicit generation configuration serves every model, so that no folder's own defaults decide; torch's
random state is left as it was found, so that measuring never changes training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Generated:
    """One answer: its new tokens without the stop token, their text, and why it ended."""

    ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    batch_tokens: int = 8192,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Generated]:
    """Answers to prompts of token ids; greedy at temperature 0.

    Prompts are sorted by length, longest first, and batched so that padded prompts and answers stay within
    `batch_tokens`; a batch that does not fit into memory is halved. A prompt that leaves no room in the
    model's context gets an empty answer with finish reason `length`. `progress` hears how many are done.
    Sampling depends on the batches, so it repeats only for the same prompts and settings.
    """
    import torch

    room = _context_length(model)
    answers: list[Generated | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    fitting = [i for i in order if len(prompts[i]) < room]
    for i in set(order) - set(fitting):
        answers[i] = Generated((), "", "length")
    pending = list(_batches(fitting, prompts, max_new_tokens, batch_tokens))[::-1]
    done = len(prompts) - len(fitting)
    with _answering(model, seed):
        while pending:
            batch = pending.pop()
            try:
                results = _answer_batch(
                    model, tokenizer, [prompts[i] for i in batch], room, max_new_tokens, stop_ids, temperature
                )
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                torch.cuda.empty_cache()
                middle = len(batch) // 2
                pending += [batch[middle:], batch[:middle]]
                continue
            for i, result in zip(batch, results, strict=True):
                answers[i] = result
            done += len(batch)
            if progress:
                progress(done)
    assert all(answer is not None for answer in answers)
    return [answer for answer in answers if answer is not None]


def stream(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """One answer as pieces of text, as they come; characters are never torn apart."""
    import torch

    ids: list[int] = []
    told = ""
    room = min(max_new_tokens, _context_length(model) - len(prompt))
    with _answering(model, seed):
        inputs, cache = torch.tensor([list(prompt)], device=model.device), None
        for _ in range(room):
            output = model(input_ids=inputs, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[0, -1].float()
            token = (
                int(logits.argmax())
                if temperature == 0
                else int(torch.multinomial(torch.softmax(logits / temperature, -1), 1))
            )
            if token in stop_ids:
                break
            ids.append(token)
            text = tokenizer.decode(ids, skip_special_tokens=True)
            # A character of several tokens decodes to a replacement mark until its last one is there.
            if not text.endswith("\ufffd"):
                yield text[len(told) :]
                told = text
            inputs = torch.tensor([[token]], device=model.device)
    rest = tokenizer.decode(ids, skip_special_tokens=True)[len(told) :]
    if rest:
        yield rest


def _context_length(model: Any) -> int:
    return int(getattr(model.config, "max_position_embeddings", None) or 1 << 30)


def _batches(
    order: Sequence[int], prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_tokens: int
) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in order:
        longest = len(prompts[batch[0]]) if batch else len(prompts[i])
        if batch and (len(batch) + 1) * (longest + max_new_tokens) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _answer_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    room: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float,
) -> list[Generated]:
    import torch
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (list(stop_ids) or [0])[0]
    width = max(len(prompt) for prompt in prompts)
    padded = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    config = GenerationConfig(
        max_new_tokens=min(max_new_tokens, room - width),
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad,
        use_cache=True,
        **(sampling or {"do_sample": False}),
    )
    output = model.generate(input_ids=padded, attention_mask=mask, generation_config=config)
    return [_finished(row, stop_ids, tokenizer) for row in output[:, width:].tolist()]


def _finished(ids: list[int], stop_ids: Sequence[int], tokenizer: Any) -> Generated:
    """An answer cut by ids at its stop token, before anything is decoded."""
    end = next((position for position, i in enumerate(ids) if i in stop_ids), None)
    kept = tuple(ids if end is None else ids[:end])
    text = tokenizer.decode(kept, skip_special_tokens=True)
    return Generated(kept, text, "length" if end is None else "stop")


@contextlib.contextmanager
def _answering(model: Any, seed: int) -> Iterator[None]:
    """Evaluation mode without gradients, the model's own generation defaults and all random states put back."""
    import torch
    from transformers import GenerationConfig

    was_training, own = model.training, getattr(model, "generation_config", None)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode():
        torch.manual_seed(seed)
        model.eval()
        if own is not None:
            model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            model.train(was_training)
            if own is not None:
                model.generation_config = own
