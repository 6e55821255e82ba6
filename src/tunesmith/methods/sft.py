"""Supervised fine-tuning through TRL's SFTTrainer, on rows whose tokens and labels are already settled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tunesmith.data.examples import Conversation, Example, Ledger, Preference, Rating, Splits
from tunesmith.data.templates import Encoding
from tunesmith.recipe import SFT
from tunesmith.training.checkpoints import keeping_run_folder
from tunesmith.training.run import Run


def imitated(splits: Splits) -> Splits:
    """The examples as answers to imitate: of a preference the chosen one, of ratings the good ones.

    Bad ratings go into the ledger as dropped; both conversions are noted.
    """
    unused = {
        example.row
        for part in (splits.train, splits.validation, splits.held_out)
        for example in part
        if isinstance(example, Rating) and not example.label
    }
    parts = {
        name: tuple(_answer(e) for e in getattr(splits, name) if e.row not in unused)
        for name in ("train", "validation", "held_out")
    }
    entries = tuple(
        replace(entry, fate="dropped", reason="rated bad: supervised fine-tuning imitates good answers only")
        if entry.row in unused
        else entry
        for entry in splits.ledger.entries
    )
    kinds = {type(e) for part in (splits.train, splits.validation, splits.held_out) for e in part}
    notes = [
        text
        for shape, text in (
            (
                Preference,
                "of each preference pair the chosen answer is imitated; the rejected one is not used",
            ),
            (Rating, f"answers rated good are imitated; {len(unused)} rated bad are not used"),
        )
        if shape in kinds
    ]
    return Splits(**parts, ledger=Ledger(entries), notes=(*splits.notes, *notes))


def _answer(example: Example) -> Example:
    match example:
        case Preference(prompt=prompt, chosen=answer) | Rating(prompt=prompt, completion=answer):
            return Conversation((*prompt, *answer), row=example.row, group=example.group, extra=example.extra)
        case _:
            return example


def build(
    section: SFT,
    *,
    model: Any,
    tokenizer: Any,
    train: Sequence[Encoding],
    validation: Sequence[Encoding],
    arguments: Mapping[str, Any],
    run: Run,
    keep: int,
) -> Any:
    """A trainer that has not started. The labels are used as they are; TRL prepares nothing."""
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        **arguments,
        neftune_noise_alpha=section.neftune_noise_alpha,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return keeping_run_folder(SFTTrainer, run, keep=keep)(
        model=model,
        args=config,
        train_dataset=rows(train),
        eval_dataset=rows(validation) if validation else None,
        processing_class=tokenizer,
    )


def rows(encodings: Sequence[Encoding]) -> Any:
    """The encodings as the data set TRL's collator pads: `input_ids` and `labels` (-100 where there is no loss)."""
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "input_ids": [list(encoding.input_ids) for encoding in encodings],
            "labels": [list(encoding.labels) for encoding in encodings],
        }
    )
