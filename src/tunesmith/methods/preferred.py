"""What the preference methods share: the examples they take, batches of settled tokens, and the reference."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from tunesmith.data import EncodedSplits, Splits
from tunesmith.data import encoded as encode_splits
from tunesmith.data.cache import Encodings
from tunesmith.data.examples import Example, Preference, Rating, Unusable
from tunesmith.data.templates import IGNORED
from tunesmith.errors import ModelError, counted
from tunesmith.methods.sft import check_head
from tunesmith.recipe import DPO, KTO, PRINCIPAL, Data, Recipe
from tunesmith.training.run import Run

Reference = DPO | KTO
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


def paired(example: Example) -> Example:
    """A preference as it is. Raises Unusable for anything else."""
    if isinstance(example, Preference):
        return example
    if isinstance(example, Rating):
        raise Unusable("a rating is no pair of answers: the method kto learns from ratings")
    raise Unusable(
        "no pair of a better and a worse answer, which this method needs (columns `chosen` and `rejected`); "
        "`--method sft` learns from single answers"
    )


def rated(example: Example) -> Example:
    """A rating or a preference as it is. Raises Unusable for anything else."""
    if isinstance(example, Preference | Rating):
        return example
    raise Unusable("no answer that is judged good or bad")


def encoded(splits: Splits, tokenizer: Any, data: Data, section: Any) -> EncodedSplits:
    """Token ids and labels of all answers, two for each pair, with what was cut or dropped, and a remark where good
    answers are much longer or shorter than bad ones."""
    found = encode_splits(splits, tokenizer, data=data, loss_on="answers")
    lengths, good = found.train.lengths, found.train.good
    kinds = [
        [int(n) for n, mark in zip(lengths, good, strict=True) if mark is kind] for kind in (True, False)
    ]
    if not all(kinds):
        return found
    means = [sum(kind) / len(kind) for kind in kinds]
    if max(means) < MUCH * min(means):
        return found
    said = (
        f"good answers have {means[0]:.0f} tokens with their prompts in the mean, bad ones {means[1]:.0f}: length "
        "alone can be learned from them"
    )
    return replace(found, notes=(*found.notes, said))


def encoded_pairs(splits: Splits, tokenizer: Any, data: Data, section: Any) -> EncodedSplits:
    """The same of pairs, with a remark where the better answers are nearly always the longer or the shorter ones."""
    found = encode_splits(splits, tokenizer, data=data, loss_on="answers")
    lengths = found.train.lengths
    more = lengths[::2] - lengths[1::2]  # the prompts are the same
    for word, share in (("longer", float((more > 0).mean())), ("shorter", float((more < 0).mean()))):
        if share >= ONE_SIDED:
            by = counted(round(float(abs(more.mean()))), "token")
            said = (
                f"the better answer is the {word} one in {share:.0%} of the pairs, by {by} in the mean: length alone "
                "can be learned from them"
            )
            return replace(found, notes=(*found.notes, said))
    return found


MUCH = 1.5
"""Ratio of mean lengths of good and bad answers from which on it is said."""
ONE_SIDED = 0.8
"""Share of pairs with the better answer longer (or shorter) from which on it is said."""


class Numbers:
    """Numbers of pairs as a data set, for trainers that would tokenize what they are given."""

    def __init__(self, part: str, size: int) -> None:
        self.part, self.size = part, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"part": self.part, "pair": number}

    def map(self, *args: Any, **kwargs: Any) -> Numbers:
        """Itself: there is no text to prepare."""
        return self


def numbered(part: str, column: str, numbers: Sequence[int]) -> Any:
    """The same as a `datasets.Dataset`, which some trainers insist on."""
    from datasets import Dataset

    return Dataset.from_dict({"part": [part] * len(numbers), column: list(numbers)})


class Sides:
    """Token ids of training and validation, fetched by number when a batch is made."""

    def __init__(self, train: Encodings, validation: Encodings) -> None:
        self._parts = {"train": train.dataset(), "validation": validation.dataset() if validation else None}

    def __call__(self, part: str, number: int) -> tuple[list[int], list[int]]:
        """Ids and labels of one encoding, without what follows the answer."""
        found = self._parts[part][number]
        ids, labels = found["input_ids"], found["labels"]
        end = len(labels)
        while end and labels[end - 1] == IGNORED:
            end -= 1
        return ids[:end], labels[:end]

    def pairs(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[list[tuple[list[int], list[int]]]]:
        """The better answers of some pairs, then the worse ones."""
        for side in (0, 1):
            yield [self(row["part"], 2 * row["pair"] + side) for row in rows]


def padded(sides: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, Any]:
    """Ids, attention mask and labels as tensors, padded on the right."""
    import torch

    width = max(len(ids) for ids, _ in sides)
    ids = torch.full((len(sides), width), pad)
    mask = torch.zeros(len(sides), width, dtype=torch.long)
    labels = torch.full((len(sides), width), IGNORED)
    for line, (tokens, marks) in enumerate(sides):
        ids[line, : len(tokens)] = torch.tensor(tokens)
        labels[line, : len(marks)] = torch.tensor(marks)
        mask[line, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def masked(sides: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, Any]:
    """The same with a mask of the judged tokens in place of labels, as TRL's own collators have it."""
    batch = padded(sides, pad)
    labels = batch.pop("labels")
    return {**batch, "completion_mask": (labels != IGNORED).long()}


def check_reference(recipe: Recipe) -> None:
    """Raises RecipeError or ModelError, before anything is read, for a reference that cannot be one."""
    section = recipe.method
    assert isinstance(section, Reference)
    if section.reference_model:
        from tunesmith import models

        models.check_kind(section.reference_model, "causal", method=section.kind)
        own = models.load_tokenizer(recipe.model.base, revision=recipe.model.revision)
        other = models.load_tokenizer(section.reference_model)
        if own.get_vocab() != other.get_vocab():
            raise ModelError(
                f"The reference '{section.reference_model}' has another vocabulary than '{recipe.model.base}', so "
                "the likelihoods of their tokens cannot be compared.",
                found=f"{len(other)} and {len(own)} tokens",
                fix="Give a reference of the same family, or leave method.reference_model out.",
            )
    check_head(recipe)


def reference(section: Reference, model: Any, run: Run) -> tuple[Any, bool]:
    """The reference's own model, None where there is none beside the trained one, and whether its likelihoods are
    worked out before training; what was settled is kept in the run."""
    config = getattr(model, "peft_config", {}).get("default")
    where, why = section.reference, "as the recipe says"
    if section.reference_model:
        where = "precomputed" if section.reference == "precomputed" else "copy"
        why = f"{section.reference_model}, as the recipe says"
        other = _other(section.reference_model, model)
    elif where == "auto":
        if config is None:
            where, why = "copy", "the weights themselves are trained, so the model before is a second one"
        elif config.init_lora_weights in PRINCIPAL:
            where = "precomputed"
            why = f"the adapter's start '{config.init_lora_weights}' changes the weights beneath it"
        else:
            where, why = "adapter_off", "the model with its adapter off is the model before training"
    if not section.reference_model:
        other = copy.deepcopy(model).requires_grad_(False) if where == "copy" else None
    run.event("decision", name="reference", value=where, reason=why)
    return other, where == "precomputed"


def _other(name: str, model: Any) -> Any:
    """Another model as the reference, on the device and in the type of the trained one."""
    import peft

    from tunesmith import models

    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    found = models.load_model(
        name,
        dtype=dtype if dtype in ("float32", "float16", "bfloat16") else "bfloat16",
        device=str(model.device),
    )
    if isinstance(found, peft.PeftModel):
        found = models.merged(found)
    return found.requires_grad_(False)


_PLANNED: ContextVar[bool] = ContextVar("planned", default=False)


@contextmanager
def without_reference_pass() -> Iterator[None]:
    """Build trainers that work out no likelihoods of a reference: a plan puts numbers in their places."""
    token = _PLANNED.set(True)
    try:
        yield
    finally:
        _PLANNED.reset(token)


def settled(trainer_class: type, columns: Mapping[str, int], *, fast: Run | None = None) -> type:
    """One of TRL's trainers that prepares nothing: rows are numbers of examples whose tokens are settled.

    `columns` are those of the reference's log-likelihoods, with their place in what `compute_ref_log_probs`
    gives. The fast forward works them out where `fast` is a run, which is told where it could not. They stay in memory,
    where TRL would write them to a cache that knows the numbers only.
    """

    class SettledTrainer(trainer_class):  # type: ignore[misc]
        def __init__(self, *given: Any, **named: Any) -> None:
            # TRL names its cache by all weights of the reference, of which a hollow model has none.
            module: Any = sys.modules[trainer_class.__module__]
            kept = {name: value for name, value in vars(module).items() if name == "hash_module"}
            vars(module).update(dict.fromkeys(kept, lambda model: ""))
            try:
                super().__init__(*given, **named)
            finally:
                vars(module).update(kept)

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            from torch.utils.data import DataLoader

            from tunesmith import forward

            if _PLANNED.get():
                return dataset
            model = self.ref_model or self.model
            found: dict[str, list[float]] = {column: [] for column in columns}
            is_training = model.training
            model.eval()
            with forward.lent(self, model, fast) if fast else nullcontext():
                for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator):
                    values = self.compute_ref_log_probs(model, self._prepare_inputs(batch))
                    for column, place in columns.items():
                        if values[place] is not None:
                            found[column] += values[place].float().cpu().tolist()
            model.train(is_training)
            for column, numbers in found.items():
                if numbers:
                    dataset = dataset.add_column(column, numbers)
            return dataset

    return SettledTrainer


def likely(trainer_class: type) -> type:
    """TRL's CPO or ORPO trainer, asking its model for likelihoods of labels in the place of all logits where the fast
    forward is there to answer. Its measure of logits is then their mean at the labels, without prompts and padding."""

    class LikelyTrainer(trainer_class):  # type: ignore[misc]
        likelihoods_only = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            from trl.trainer.utils import add_fused_lm_head

            super().__init__(*args, **kwargs)
            if not self.is_encoder_decoder:
                model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
                add_fused_lm_head(model, outputs=("log_probs", "mean_logits"))

        def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> Any:
            import torch

            if not self.likelihoods_only:
                return super().concatenated_forward(model, batch)
            is_odds = not hasattr(
                self, "loss_type"
            )  # ORPO, which imitates the better rows with their prompts
            both = self.concatenated_inputs(
                batch,
                is_encoder_decoder=False,
                padding_value=self.padding_value if is_odds else self.pad_token_id,
                device=self.accelerator.device,
            )
            count = len(batch["chosen_labels"])
            ids, mask = both["concatenated_input_ids"], both["concatenated_attention_mask"]
            answers = both["concatenated_labels"]
            labels = answers
            if is_odds:
                labels = answers.clone()
                labels[:count] = torch.where(mask[:count] == 1, ids[:count], IGNORED)
            found = model(
                input_ids=ids, attention_mask=mask, use_cache=False, labels=labels, fused_lm_head=True
            )
            judged, imitated = answers[:, 1:] != IGNORED, labels[:count, 1:] != IGNORED
            logs = (found.log_probs * judged).sum(1)
            if is_odds or self.loss_type in ("ipo", "simpo"):
                logs = logs / judged.sum(1)
            imitation = -(found.log_probs[:count] * imitated).sum() / imitated.sum()
            if not is_odds and self.cpo_alpha == 0:
                imitation = torch.zeros_like(imitation)
            sides = (found.mean_logits[:count][judged[:count]], found.mean_logits[count:][judged[count:]])
            return logs[:count], logs[count:], *sides, imitation

    return LikelyTrainer


@contextmanager
def one_adapter(model: Any) -> Iterator[None]:
    """Build one of TRL's trainers for a model that may have an adapter, and leave it with that adapter alone.

    TRL puts a copy of the adapter beside it as the reference. Ours is switched off instead, or its likelihoods are
    precomputed with that copy; only one adapter is to be saved. A copy that starts as PiSSA or OLoRA do would take
    its share from the base once more, so it starts plainly before it gets our adapter's numbers.
    """
    config = getattr(model, "peft_config", {}).get("default")
    if config is None:
        yield
        return
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    start, config.init_lora_weights = config.init_lora_weights, True
    try:
        yield
    finally:
        config.init_lora_weights = start
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
        model.set_adapter("default")
    now = [name for name, p in model.named_parameters() if p.requires_grad]
    assert now == trained, "other weights would be trained"


def dropout_decision(run: Run, adapter_dropout: float) -> None:
    """Say that TRL switches dropout off, where there is any."""
    if adapter_dropout:
        run.event(
            "decision",
            name="dropout",
            value="off",
            reason=f"likelihoods of policy and reference are compared, and adapter.dropout {adapter_dropout:g} would "
            "make noise of them",
        )


def own_dropout(model: Any) -> float:
    """The dropout of the adapter on the model, 0 where there is none."""
    config = getattr(model, "peft_config", {}).get("default")
    return float(getattr(config, "lora_dropout", 0.0) or 0.0)
