"""Scores of a reward model, from token ids in batches: shared by evaluation and rewards.

A score is read at the last token that does not pad, of the whole conversation as its chat template writes it. So
plain transformers give the same scores for what `tokenizer.apply_chat_template(messages)` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith import models
from tunesmith.data.examples import Conversation, Message, Row, Unusable
from tunesmith.data.templates import PROBES, encode, set_template
from tunesmith.errors import ModelError
from tunesmith.generation import context_length, for_inference, halving, length_batches


@dataclass(frozen=True)
class RewardModel:
    """A reward model with its tokenizer, loaded."""

    model: Any
    tokenizer: Any

    def scores(
        self, questions: Sequence[Sequence[Message]], answers: Sequence[str], *, batch_tokens: int = 8192
    ) -> list[float]:
        """Scores of answers to conversations that wait for one, in their order. Raises Unusable, with the
        template's own words, where it refuses a conversation."""
        texts = [
            answered(question, answer, self.tokenizer)
            for question, answer in zip(questions, answers, strict=True)
        ]
        return scores(self.model, self.tokenizer, texts, batch_tokens=batch_tokens)


def load(
    base: str | Path, *, revision: str | None = None, device: str = "cpu", dtype: str = "float32"
) -> RewardModel:
    """A reward model of a folder, a run or a Hub id. Raises ModelError for a model that is none."""
    if models.kind(str(base), revision=revision) != "reward":
        raise ModelError(
            f"'{base}' is no reward model: it writes answers and gives them no score.",
            fix="Train one with --method reward, or name one with a score of one number "
            "(AutoModelForSequenceClassification, num_labels 1).",
        )
    tokenizer = models.load_tokenizer(str(base), revision=revision)
    set_template(tokenizer, None)
    model = models.load_model(str(base), revision=revision, device=device, dtype=dtype)
    return RewardModel(model.eval().requires_grad_(False), tokenizer)


def settle_padding(tokenizer: Any) -> str:
    """Choose a padding token that ends no conversation, and say in a sentence which one it is.

    Classification models take the last token other than padding for the last one of the text: were the end-of-text
    token to pad as well, they would not see that an answer has ended.
    """
    last = _last_id(tokenizer)
    own = tokenizer.pad_token
    if tokenizer.pad_token_id != last:
        return f"Scores are read at the last token of a conversation; {own} pads."
    specials = dict.fromkeys(
        [*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())]
    )
    free = [token for token in specials if tokenizer.convert_tokens_to_ids(token) != last]
    if not free:
        return (
            f"Scores are read at the last token other than {own}, which pads and ends answers alike: the tokenizer "
            "has no other special token to pad with."
        )
    tokenizer.pad_token = free[0]
    return (
        f"Scores are read at the last token of a conversation; {free[0]} pads, since {own} ends answers and would be "
        "taken for padding there."
    )


def _last_id(tokenizer: Any) -> int | None:
    """With what the template ends a conversation; None where it refuses every one that is tried."""
    for probe in PROBES:
        try:
            return int(encode(Conversation(probe, Row("probe", 1)), tokenizer).input_ids[-1])
        except Unusable:
            continue
    return None


def answered(question: Sequence[Message], answer: str, tokenizer: Any) -> list[int]:
    """Token ids of a conversation with its answer, as they are scored. Raises Unusable."""
    turns = (*question, Message("assistant", answer))
    return list(encode(Conversation(turns, Row("asked", 1)), tokenizer).input_ids)


def scores(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Sequence[int]],
    *,
    batch_tokens: int = 8192,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """The score of each text of token ids, in their order; beyond the model's context length it is cut.

    `progress` is told the number of texts that have one.
    """
    import torch

    config = model.config.get_text_config()
    if config.pad_token_id is None:
        models.set_padding(model, tokenizer)
    limit = context_length(model)
    kept = [list(text[:limit]) for text in texts]
    for number, text in enumerate(kept):
        if not text:
            raise ValueError(f"text {number} has no tokens")
    found: dict[int, float] = {}

    def batch_scores(batch: Sequence[int]) -> list[float]:
        width = max(len(kept[n]) for n in batch)
        ids = torch.full((len(batch), width), config.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, n in enumerate(batch):
            ids[line, : len(kept[n])] = torch.tensor(kept[n])
            mask[line, : len(kept[n])] = 1
        output = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
        values: list[float] = output.logits[:, 0].float().tolist()
        return values

    with for_inference(model):
        for batch in length_batches({n: len(text) for n, text in enumerate(kept)}, tokens=batch_tokens):
            for part, values in halving(batch_scores, batch):
                found |= dict(zip(part, values, strict=True))
                if progress:
                    progress(len(found))
    return [found[n] for n in range(len(kept))]


__all__ = ["RewardModel", "Unusable", "answered", "load", "scores", "settle_padding"]
