"""Fine-tuning of encoder-decoder models through transformers' Seq2SeqTrainer, on pairs that are settled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tunesmith.data import EncodedSplits, Splits, pairs
from tunesmith.data.cache import Encodings
from tunesmith.data.templates import IGNORED
from tunesmith.recipe import Data, Seq2Seq
from tunesmith.training.checkpoints import keeping_run_folder
from tunesmith.training.run import Run
from tunesmith.training.validating import token_weighted


def template(tokenizer: Any, choice: str | None, section: Seq2Seq) -> str:
    """Settle how an input is written, and say so in a sentence."""
    return pairs.settle_template(tokenizer, choice, section.source_prefix)


def encoded(splits: Splits, tokenizer: Any, data: Data, section: Seq2Seq) -> EncodedSplits:
    """Inputs and answers of all splits, with what was cut or dropped."""
    return pairs.encoded(splits, tokenizer, data=data, section=section)


def build(
    section: Seq2Seq,
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
    """A trainer that has not started."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    assert packing is None, "pairs are not packed; compose refuses it before"
    return keeping_run_folder(token_weighted(Seq2SeqTrainer), run, keep=keep, splits="rows")(
        model=model,
        args=Seq2SeqTrainingArguments(**arguments, predict_with_generate=False),
        processing_class=tokenizer,
        train_dataset=train.dataset(),
        eval_dataset=validation.dataset() if validation else None,
        data_collator=collator(model, tokenizer),
        compute_loss_func=token_mean,
    )


def collator(model: Any, tokenizer: Any) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
    """Makes a batch of rows that are pairs, padded to the longest of the batch and no further.

    Padding of answers has label -100; the decoder's input is the answer shifted by the model's own function.
    """
    from transformers import DataCollatorForSeq2Seq

    pad = DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=IGNORED)

    def collate(rows: list[dict[str, Any]]) -> Mapping[str, Any]:
        features = []
        for row in rows:
            source, target = pairs.parted(row["input_ids"], row["labels"])
            features.append({"input_ids": source, "attention_mask": [1] * len(source), "labels": target})
        batch: Mapping[str, Any] = pad(features)
        return batch

    return collate


def token_mean(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """Mean loss of a label over the whole optimizer step, so that a token weighs the same in every batch of it."""
    import torch

    logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
    total = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(),
        labels.reshape(-1),
        ignore_index=IGNORED,
        reduction="sum",
    )
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count
