"""Supervised fine-tuning through TRL's SFTTrainer, on rows whose tokens and labels are already settled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.data.cache import Encodings
from tunesmith.data.examples import Conversation, Example, Preference, Rating, Unusable
from tunesmith.recipe import SFT
from tunesmith.training.checkpoints import keeping_run_folder
from tunesmith.training.run import Run


def imitated(example: Example) -> Example:
    """The example as an answer to imitate: of a preference the chosen one, of ratings the good ones.

    Raises Unusable for an answer that was rated bad.
    """
    match example:
        case Rating(label=False):
            raise Unusable("rated bad: supervised fine-tuning imitates good answers only")
        case Preference(prompt=prompt, chosen=answer) | Rating(prompt=prompt, completion=answer):
            return Conversation((*prompt, *answer), row=example.row, group=example.group, extra=example.extra)
        case _:
            return example


REMARKS: dict[type[Example], str] = {
    Preference: "of each preference pair the chosen answer is imitated; the rejected one is not used",
    Rating: "answers rated good are imitated; those rated bad are not used",
}
"""What to say of data sets with examples of a shape that is not used as it is."""


def build(
    section: SFT,
    *,
    model: Any,
    tokenizer: Any,
    train: Encodings,
    validation: Encodings,
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
        train_dataset=train.dataset(),
        eval_dataset=validation.dataset() if validation else None,
        processing_class=tokenizer,
    )
