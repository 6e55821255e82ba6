"""Evaluation: the same held-out questions to any model along one code path, one row per answer.

Rows are the record; every number shown anywhere is computed again from them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.data.examples import Conversation, Example, Message, Prompt, Row, Unusable, content_hash
from tunesmith.data.templates import IGNORED, LossOn, encode_all, end_of_turn_ids, prompt_ids
from tunesmith.evaluation.metrics import METRICS, known_metrics
from tunesmith.recipe import Evaluation, Model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["EvalRow", "Item", "answers", "evaluate", "items", "known_metrics", "read_rows", "scores", "write_rows"]

MAX_LOGITS = 2**26
"""Most logits held at a time when references are scored: 256 MB in float32."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Item:
    """One held-out example, ready to ask: as a prompt where it has an answer, and as labelled tokens."""

    number: int
    row: Row
    group: str | None
    prompt: Prompt | None
    prompt_ids: tuple[int, ...]
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class EvalRow:
    """One line of rows.jsonl: one model's answer to one item, or why there is none."""

    model: str
    item: int
    source_row: str
    group: str | None
    prompt_sha256: str
    prompt_text: str | None
    reference: str | None
    output: str | None
    finish_reason: str | None
    generation: Mapping[str, Any]
    scores: Mapping[str, float]
    nll: float | None
    """Sum of the reference tokens' negative log-likelihoods, in nats."""
    tokens: int
    """Reference tokens with a label."""
    correct: int | None
    """Of these, the ones the model finds likeliest."""
    turn: int = 1
    sample: int = 0
    status: str = "ok"
    errors: Mapping[str, str] = field(default_factory=dict)
    """Metrics that could not be computed for this answer, and why."""


def items(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    loss_on: LossOn = "answers",
    max_items: int | None = None,
    max_length: int | None = None,
) -> list[Item]:
    """Held-out examples as items, in the order of their content's hash, at most `max_items`.

    A conversation is asked up to its last answer. References beyond `max_length` tokens are scored up to
    there. Examples that the template refuses have no item.
    """
    chosen = sorted(examples, key=content_hash)[:max_items]
    ready = []
    for example, encoding in zip(chosen, encode_all(chosen, tokenizer, loss_on=loss_on), strict=True):
        if isinstance(encoding, Unusable):
            continue
        prompt, ids = None, ()
        if isinstance(example, Conversation):
            *before, answer = example.messages
            prompt = Prompt(tuple(before), answer.content, example.row, example.group, checks=example.extra)
            ids = tuple(prompt_ids(before, tokenizer))
        ready.append(
            Item(
                number=len(ready),
                row=example.row,
                group=example.group,
                prompt=prompt,
                prompt_ids=ids,
                input_ids=encoding.input_ids[:max_length],
                labels=encoding.labels[:max_length],
            )
        )
    return ready


def answers(
    model: Model,
    evaluation: Evaluation,
    items: Sequence[Item],
    metrics: Sequence[str],
    *,
    name: str,
    base: str,
    tokenizer: Any,
    device: str,
    dtype: str,
    watch: Callable[[Mapping[str, Any]], None],
) -> list[EvalRow]:
    """One model's rows, from its folder or id: loaded here, freed when done."""
    if not items:
        return []
    from tunesmith import models

    def progress(stage: str, done: int, total: int) -> None:
        watch({"kind": "progress", "stage": f"{name}: {stage}", "done": done, "total": total})

    return evaluate(
        models.load_model(base, dtype=dtype, device=device, attention=model.attention),
        tokenizer,
        items,
        name=name,
        metrics=metrics,
        max_new_tokens=evaluation.max_new_tokens,
        batch_tokens=evaluation.batch_tokens,
        progress=progress,
    )


def evaluate(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    name: str,
    metrics: Sequence[str],
    max_new_tokens: int = 256,
    batch_tokens: int = 8192,
    progress: Progress = lambda stage, done, total: None,
) -> list[EvalRow]:
    """The model's rows: greedy answers where a metric scores answers, likelihoods where one needs them."""
    from tunesmith.generation import generate

    chosen = [METRICS[metric] for metric in known_metrics(metrics)]
    asked = [item for item in items if item.prompt] if any(metric.score for metric in chosen) else []
    stop_ids = end_of_turn_ids(tokenizer)
    generated = generate(
        model,
        tokenizer,
        [item.prompt_ids for item in asked],
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        batch_tokens=batch_tokens,
        progress=lambda done: progress("answering", done, len(asked)),
    )
    by_item = dict(zip((item.number for item in asked), generated, strict=True))
    scored = any(metric.score is None for metric in chosen)
    likelihoods = _likelihoods(model, items, batch_tokens, progress) if scored else [(None, None)] * len(items)
    settings = {"max_new_tokens": max_new_tokens, "temperature": 0.0, "stop_ids": list(stop_ids)}
    rows = []
    for item, (nll, correct) in zip(items, likelihoods, strict=True):
        answer = by_item.get(item.number)
        values: dict[str, float] = {}
        errors: dict[str, str] = {}
        if answer and item.prompt:
            for metric in (metric for metric in chosen if metric.score and metric.fits(item.prompt)):
                try:
                    values[metric.name] = metric.score(item.prompt, answer.text, item.prompt.reference)  # type: ignore[misc]
                except ValueError as error:  # a reference or check that does not hold: no fault of the answer
                    errors[metric.name] = str(error)
        rows.append(
            EvalRow(
                model=name,
                item=item.number,
                source_row=str(item.row),
                group=item.group,
                prompt_sha256=_sha256(item.prompt_ids or item.input_ids),
                prompt_text=_shown(item.prompt.messages) if item.prompt else None,
                reference=item.prompt.reference if item.prompt else None,
                output=answer.text if answer else None,
                finish_reason=answer.finish_reason if answer else None,
                generation=settings,
                scores=values,
                nll=nll,
                tokens=_labelled(item),
                correct=correct,
                status="error" if errors else "ok",
                errors=errors,
            )
        )
    return rows


def scores(rows: Sequence[EvalRow], metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each metric's value over the rows with a 95 % bootstrap interval, its n, and rows in error."""
    from tunesmith.evaluation.compare import bootstrap, interval

    result = {}
    for name in metrics:
        usable = [row for row in rows if has_value(row, name)]
        if not usable:
            continue
        totals = sums(usable, name)
        statistic = value_of(name)
        draws = bootstrap([totals], [row.group for row in usable], statistic=lambda t: statistic(t[0]))
        low, high = interval(draws, 0.95)
        result[name] = {
            "value": float(statistic(totals.sum(axis=0))),
            "low": low,
            "high": high,
            "n": len(usable),
            "errors": sum(name in row.errors for row in rows),
        }
    return result


def has_value(row: EvalRow, metric: str) -> bool:
    """Whether a row says something about a metric."""
    return metric in row.scores if METRICS[metric].score else row.nll is not None and row.tokens > 0


def sums(rows: Sequence[EvalRow], metric: str) -> NDArray[np.float64]:
    """Per row, numerator and denominator of a metric, `(len(rows), 2)`: the score and 1, or token sums."""
    import numpy as np

    if METRICS[metric].score:
        pairs = [(row.scores[metric], 1.0) for row in rows]
    elif metric == "perplexity":
        pairs = [(row.nll or 0.0, row.tokens) for row in rows]
    else:
        pairs = [(row.correct or 0, row.tokens) for row in rows]
    return np.array(pairs, dtype=np.float64)


def value_of(metric: str) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """The metric from summed numerators and denominators in the last axis: a mean, or exp of one."""
    import numpy as np

    if metric == "perplexity":
        return lambda totals: np.exp(totals[..., 0] / totals[..., 1])
    return lambda totals: totals[..., 0] / totals[..., 1]


def write_rows(path: Path, rows: Sequence[EvalRow]) -> None:
    """Write rows as JSON lines, in one piece."""
    from tunesmith.training.run import write_whole

    write_whole(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[EvalRow]:
    """Rows as they were written."""
    return [EvalRow(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _likelihoods(
    model: Any, items: Sequence[Item], batch_tokens: int, progress: Progress
) -> list[tuple[float | None, int | None]]:
    """Per item, the summed negative log-likelihood of its labelled tokens and how many the model finds likeliest.

    Position t's logits predict token t + 1, so labels are shifted by one against them.
    """
    import torch

    results: list[tuple[float | None, int | None]] = [(None, None)] * len(items)
    budget = max(min(batch_tokens, MAX_LOGITS // model.get_output_embeddings().weight.shape[0]), 1)
    context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    order = sorted(range(len(items)), key=lambda i: -len(items[i].input_ids))
    done = 0
    was_training = model.training
    model.eval()
    try:
        while done < len(order):
            longest = min(len(items[order[done]].input_ids), context)
            batch = order[done : done + max(budget // max(longest, 1), 1)]
            ids = [list(items[i].input_ids[:context]) for i in batch]
            padded = torch.tensor([x + [0] * (longest - len(x)) for x in ids], device=model.device)
            mask = torch.tensor([[1] * len(x) + [0] * (longest - len(x)) for x in ids], device=model.device)
            with torch.inference_mode():
                logits = model(input_ids=padded, attention_mask=mask).logits
            for position, i in enumerate(batch):
                targets = torch.tensor(items[i].labels[1:context], device=model.device)
                places = (targets != IGNORED).nonzero().squeeze(-1)
                if len(places):
                    log_probabilities = logits[position, places].float().log_softmax(-1)
                    wanted = targets[places]
                    nll = -log_probabilities.gather(-1, wanted[:, None]).double().sum().item()
                    results[i] = (nll, int((log_probabilities.argmax(-1) == wanted).sum()))
            done += len(batch)
            progress("scoring", done, len(order))
    finally:
        model.train(was_training)
    assert all(nll is None or math.isfinite(nll) or math.isnan(nll) or nll > 0 for nll, _ in results)
    return results


def _labelled(item: Item) -> int:
    return sum(label != IGNORED for label in item.labels[1:])


def _sha256(ids: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()


def _shown(messages: Sequence[Message]) -> str:
    """The question as people read it: one user turn alone, several with their roles."""
    if len(messages) == 1:
        return messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in messages)
