"""Supervised fine-tuning through TRL's SFTTrainer, on rows whose tokens and labels are already settled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.data import EncodedSplits, Splits
from tunesmith.data import encoded as encode_splits
from tunesmith.data.cache import Encodings
from tunesmith.data.examples import Conversation, Example, Preference, Prompt, Rating, Unusable
from tunesmith.data.templates import set_template
from tunesmith.errors import ModelError, RecipeError
from tunesmith.recipe import SFT, Data, LoRA, Recipe
from tunesmith.training.checkpoints import keeping_run_folder
from tunesmith.training.run import Run
from tunesmith.training.validating import token_weighted

if TYPE_CHECKING:
    from tunesmith.data.packing import Packing


def imitated(example: Example) -> Example:
    """The example as an answer to imitate: of a preference the chosen one, of ratings the good ones.

    Raises Unusable for an answer that was rated bad.
    """
    match example:
        case Rating(label=False):
            raise Unusable("rated bad: supervised fine-tuning imitates good answers only")
        case Prompt():
            raise Unusable("a question without an answer to imitate")
        case Preference(prompt=prompt, chosen=answer) | Rating(prompt=prompt, completion=answer):
            return Conversation((*prompt, *answer), row=example.row, group=example.group, extra=example.extra)
        case _:
            return example


def check_head(recipe: Recipe) -> None:
    """Raises RecipeError, before anything is read, for an adapter on the head: TRL multiplies by the head's own
    weights, so it would never be trained."""
    adapter, model = recipe.adapter, recipe.model
    if not isinstance(adapter, LoRA) or isinstance(adapter.targets, str):
        return
    from tunesmith import models

    whole = models.outline(model.base, revision=model.revision)
    head = whole.get_output_embeddings()
    name = next((name for name, module in whole.named_modules() if module is head), None)
    if name and any(name == target or name.endswith(f".{target}") for target in adapter.targets):
        raise RecipeError(
            f"An adapter on the head ({name}) is not trained by this method.",
            fix="Leave it out of adapter.targets, or train it whole with adapter.modules_to_save.",
        )


def template(tokenizer: Any, choice: str | None, section: SFT) -> str:
    """Settle the tokenizer's chat template, and say in a sentence which one it is."""
    return set_template(tokenizer, choice)


def encoded(splits: Splits, tokenizer: Any, data: Data, section: SFT) -> EncodedSplits:
    """Token ids and labels of all splits, with what was cut or dropped for length."""
    return encode_splits(splits, tokenizer, data=data, loss_on=section.loss_on)


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
    packing: Packing | None = None,
    fast: bool = True,
) -> Any:
    """A trainer that has not started. The labels are used as they are; TRL prepares nothing.

    Raises ModelError for a model in which packed examples would see one another.
    """
    from trl import SFTConfig, SFTTrainer

    if packing:
        from tunesmith.data.packing import isolates

        if not isolates(model):
            raise ModelError(
                f"{type(model).__name__} cannot be trained on packed examples: they would see one another.",
                found="its answers change with what is packed beside them",
                fix="Leave data.packing out.",
            )

    config = SFTConfig(
        **arguments,
        neftune_noise_alpha=section.neftune_noise_alpha,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    rows = (
        _packed(train, validation, packing, model, tokenizer)
        if packing
        else {
            "train_dataset": train.dataset(),
            "eval_dataset": validation.dataset() if validation else None,
        }
    )
    return keeping_run_folder(token_weighted(SFTTrainer), run, keep=keep, splits="rows")(
        model=model, args=config, processing_class=tokenizer, **rows
    )


def _packed(
    train: Encodings, validation: Encodings, packing: Packing, model: Any, tokenizer: Any
) -> dict[str, Any]:
    """Data sets of blocks, as lists of example numbers, and the collator that fetches them.

    Validation examples stay blocks of their own.
    """
    from datasets import Dataset

    from tunesmith.data.packing import packed_batch

    parts = {"train": train.dataset(), "validation": validation.dataset() if validation else None}
    flatten = str(model.config._attn_implementation).startswith("flash")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        blocks = []
        for row in rows:
            found = parts[row["part"]][row["examples"]]
            blocks.append(list(zip(found["input_ids"], found["labels"], strict=True)))
        return packed_batch(blocks, pad, flatten=flatten)

    def blocks_of(part: str, blocks: Sequence[Sequence[int]]) -> Any:
        return Dataset.from_dict({"part": [part] * len(blocks), "examples": [list(b) for b in blocks]})

    return {
        "train_dataset": blocks_of("train", packing.blocks),
        "eval_dataset": blocks_of("validation", [[n] for n in range(len(validation))])
        if validation
        else None,
        "data_collator": collate,
    }
