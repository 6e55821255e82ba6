"""Fine-tune an encoder-decoder model on questions and answers with LoRA, as one Hamilton module.

    data_path -> train_set, validation_set, hold_out_set -> tokenized_* -> trainer -> fit_trainer
              -> finetuned_model -> validation_predictions, hold_out_set_predictions -> ROUGE

The configuration `{"start": "base"}`, or none, trains; `{"start": "presaved"}` reads a saved adapter and only
measures it. Every public function is a node and its name is what it gives; docs/flows.md describes them all.
Nothing that is trained depends on the hold-out rows.

    python -m tunesmith.flows.question_answer --data-path questions.json --model-id google/flan-t5-small
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
import torch
import transformers
from datasets import Dataset, concatenate_datasets
from hamilton.function_modifiers import config, extract_fields
from numpy.typing import NDArray
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model, prepare_model_for_kbit_training
from safetensors.numpy import load_file, save_file
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from tunesmith import generation, models
from tunesmith import plan as planning
from tunesmith.data import BATCH, batched, pairs
from tunesmith.data.duplicates import NearDuplicates, plain, sketches
from tunesmith.data.examples import Conversation, Message, Prompt, Row, Unusable, texts
from tunesmith.data.formats import convert, detect
from tunesmith.data.sources import Source, read
from tunesmith.data.splitting import CLUSTER, Links, rooted
from tunesmith.data.templates import IGNORED, Encoding, encoder, end_of_turn_ids
from tunesmith.errors import (
    DataError,
    Interrupted,
    MissingExtra,
    ModelError,
    OutOfResources,
    RecipeError,
    RunError,
    TunesmithError,
    closest,
    counted,
    does,
    nearest,
)
from tunesmith.evaluation.metrics import METRICS, Metric
from tunesmith.methods.seq2seq import token_mean
from tunesmith.terminal import inert, json_line
from tunesmith.training.validating import token_weighted

log = logging.getLogger(__name__)

DEFAULT_MODEL = "google/mt5-small"
"""The model where none is named."""

CONFIGURATIONS: dict[str, dict[str, str]] = {"default": {"start": "base"}, "presaved": {"start": "presaved"}}
"""The configurations there are, by name."""

SUGGESTED_OUTPUTS = (
    "save_best_models",
    "hold_out_set_predictions",
    "training_and_validation_set_metrics",
    "finetuned_model_on_validation_set",
)

MAX_NEW_TOKENS = 512

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


_Node = TypeVar("_Node", bound=Callable[..., Any])


def _fields(**types: Any) -> Callable[[_Node], _Node]:
    """What a node's dictionary holds are nodes of their own."""
    decorator: Callable[[_Node], _Node] = extract_fields(types)
    return decorator


def _when(start: str) -> Callable[[_Node], _Node]:
    """The node exists in this configuration only; without a configuration the base model is trained."""
    starts = [configuration["start"] for configuration in CONFIGURATIONS.values()]

    def resolves(configuration: Mapping[str, Any]) -> bool:
        chosen = configuration.get("start") or "base"
        if chosen not in starts:
            raise RecipeError(
                "The configuration `start` is unknown.", found=repr(chosen), fix=nearest(str(chosen), starts)
            )
        return bool(chosen == start)

    decorator: Callable[[_Node], _Node] = config(resolves, config_used=["start"])
    return decorator


# Data: rows, splits, tokens


@_fields(train_set=Dataset, validation_set=Dataset, hold_out_set=Dataset)
def raw_dataset(
    data_path: str,
    random_state: int = 42,
    train_size: float = 0.95,
    validation_size: float = 0.8,
    input_text_key: str = "question",
    output_text_key: str = "reply",
) -> dict[str, Dataset]:
    """The three splits, with the columns `input_text` and `output_text`.

    `train_size` of the rows are trained on; of the rest `validation_size` go to validation and the others
    are held out. Each split gets a row at least, and rows that ask the same, or nearly the same, share one. What
    was decided and dropped is in the description of the training set (`info.description`), what so few held-out
    rows can prove in that of the held-out set. Raises DataError.
    """
    for name, share in (("train_size", train_size), ("validation_size", validation_size)):
        if not 0 < share < 1:
            raise DataError(f"{name} is a share between 0 and 1.", found=f"{share:g}")
    source = read(data_path)
    _check_keys(source, input_text_key=input_text_key, output_text_key=output_text_key)
    detection = detect(source, input_text_key=input_text_key, output_text_key=output_text_key)
    rows: list[Conversation] = []
    dropped: dict[str, list[int]] = {}
    for record, example in convert(source, detection):
        if isinstance(example, Unusable):
            dropped.setdefault(str(example), []).append(record.row.number)
        else:
            assert isinstance(example, Conversation)
            rows.append(example)
    losses = [
        f"{len(numbers)} dropped: {reason} (row {', '.join(map(str, numbers[:5]))}{', ...' * (len(numbers) > 5)})"
        for reason, numbers in dropped.items()
    ]
    if len(rows) < 3:
        raise DataError(
            f"{source.name} has {counted(len(rows), 'usable row')}, and each of the three splits needs one.",
            found="; ".join(losses) or None,
            fix="Give at least 3 rows with a question and an answer; 21 give the splits their usual shares.",
        )
    trained = int(train_size * len(rows))
    validated = int(validation_size * (len(rows) - trained))
    shares = (trained, validated, len(rows) - trained - validated)
    groups, near = _groups(rows)
    if len(groups) < 3:
        raise DataError(
            f"{source.name} asks too few different questions to be split in three.",
            found=f"{counted(len(rows), 'row')}, {counted(len(groups), 'different question')}",
            fix="Give more questions; rows that ask the same, or nearly the same, share a split, so that none is "
            "measured that was trained.",
        )
    sizes = {"hold_out_set": max(shares[2], 1), "validation_set": max(validated, 1)}
    places = _places(groups, sizes, seed=random_state)
    said = (
        f"{len(rows)} rows: {len(places['train_set'])} trained, {len(places['validation_set'])} for validation, "
        f"{len(places['hold_out_set'])} held out"
    )
    remarks = [said, *losses, *source.notes, *near]
    if any(role for _, role in source.facts.places):
        remarks.append("the flow draws its own splits all the same")
    if tuple(len(places[name]) for name in ("train_set", "validation_set", "hold_out_set")) != shares:
        remarks.append(
            f"the shares alone would give {'/'.join(map(str, shares))}: each split gets a row at least, and rows "
            "that ask the same, or nearly the same, stay together"
        )
    descriptions = {"train_set": remarks, "hold_out_set": _caution(len(places["hold_out_set"]))}
    return {
        name: _described(
            Dataset.from_dict(
                {
                    "input_text": [_question(rows[n]) for n in chosen],
                    "output_text": [rows[n].messages[-1].content for n in chosen],
                }
            ),
            *descriptions.get(name, ()),
        )
        for name, chosen in places.items()
    }


def _question(row: Conversation) -> str:
    return "\n\n".join(message.content for message in row.messages[:-1])


def _groups(rows: Sequence[Conversation]) -> tuple[list[list[int]], list[str]]:
    """The places of the rows that share a split, in the order of the first of each, and what is to be said.

    Rows share one where they ask the same but for case and punctuation, and where their questions, or question
    and answer, are near-duplicates.
    """
    links = Links()
    for place, row in enumerate(rows):
        said = tuple(m._replace(content=plain(m.content) or m.content) for m in row.messages)
        links.add(place, replace(row, messages=said))
    same, _ = rooted(len(rows), links.edges(), NO_PAIRS)
    # Copies are one question from here on: however many, they do not make a cluster large.
    firsts, question = np.unique(same, return_inverse=True)
    across = np.sort(question[_alike("\n".join(texts(row)) for row in rows)], axis=1)[:, ::-1]
    alike = np.concatenate(
        (_alike(_question(rows[place]) for place in firsts), across[across[:, 0] != across[:, 1]])
    )
    root, released = rooted(len(firsts), NO_PAIRS, alike)
    groups: dict[int, list[int]] = {}
    for place, of in enumerate(root[question]):
        groups.setdefault(int(of), []).append(place)
    joined = int((root != np.arange(len(root))).sum())
    remarks = []
    if joined:
        remarks.append(
            f"nearly the same as an earlier question, and in its split: {counted(joined, 'question')}"
        )
    if released.any():
        remarks.append(
            f"nearly the same as more than {CLUSTER} others: {counted(int(released.sum()), 'question')}; texts of "
            "one form are not kept in one split"
        )
    return list(groups.values()), remarks


NO_PAIRS: NDArray[np.int64] = np.empty((0, 2), dtype=np.int64)


LONG = 11
"""Words from which texts may be near-duplicates. In a shorter one every word counts: with one changed, its word
triples are less alike than the engine's threshold, and too few to be estimated by."""


def _is_long(text: str) -> bool:
    return len(plain(text).split()) + sum(not character.isascii() for character in text) >= LONG


def _alike(found: Iterable[str]) -> NDArray[np.int64]:
    """Places (n, 2) of texts that are near-duplicates: a text and an earlier one."""
    near, places = NearDuplicates(), []
    for batch in batched(((place, text) for place, text in enumerate(found) if _is_long(text)), BATCH):
        places += [place for place, _ in batch]
        near.add([text for _, text in batch])
    return np.array(places, dtype=np.int64)[near.pairs()]


def _places(groups: Sequence[list[int]], sizes: Mapping[str, int], *, seed: int) -> dict[str, list[int]]:
    """The row numbers of each split: the small splits are filled with whole groups, drawn by the seed.

    A split that no group fits into gets the smallest one there is.
    """
    drawn: dict[str, list[list[int]]] = {"train_set": [], **{name: [] for name in sizes}}
    room = dict(sizes)
    for place in np.random.default_rng(seed).permutation(len(groups)):
        group = groups[place]
        split = next((name for name in sizes if len(group) <= room[name]), None)
        if split:
            room[split] -= len(group)
        drawn[split or "train_set"].append(group)
    for taken in drawn.values():
        if not taken:
            largest = max(drawn.values(), key=len)
            taken.append(largest.pop(min(range(len(largest)), key=lambda n: len(largest[n]))))
    return {name: [place for group in taken for place in group] for name, taken in drawn.items()}


FEW = 30
"""With fewer held-out rows it is said how little they prove."""


def _caution(number: int) -> list[str]:
    """What can be concluded from so few held-out rows, in a sentence; nothing where there are enough."""
    if number >= FEW:
        return []
    from scipy.stats import binomtest

    low = binomtest(number, number).proportion_ci(method="wilson").low
    return [
        f"{counted(number, 'held-out row')} can prove little: were every answer right, the true share of right "
        f"answers could still be as low as {low:.0%} (Wilson's 95 % interval), and means of scores are as unsure; hold "
        f"out {FEW} rows or more (a smaller train_size or validation_size)"
    ]


def _described(dataset: Dataset, *remarks: str) -> Dataset:
    """The data set with remarks that stay with it, on disk too."""
    dataset.info.description = "; ".join(remarks)
    return dataset


@_when("base")
def tokenizer(model_id: str | None = None, model_id_tokenizer: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the base model. Raises ModelError for a model that is no encoder-decoder model."""
    name = _model_name(model_id, model_id_tokenizer)
    if not (model_id or model_id_tokenizer):
        log.warning("No model is named by model_id: %s is taken.", name)
    _check_kind(name)
    return _settled(models.load_tokenizer(name))


@_when("presaved")
def tokenizer__presaved(fit_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with the adapter."""
    return fit_tokenizer


def tokenized_inputs(
    train_set: Dataset, validation_set: Dataset, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Token ids of the questions that are trained and validated on, cut only where the tokenizer has a limit.

    The hold-out rows have no say in how long a question or an answer may be.
    """
    found = _pairs(concatenate_datasets([train_set, validation_set]), tokenizer)
    limit = tokenizer.model_max_length
    return Dataset.from_dict({"input_ids": [pairs.parted(p.input_ids, p.labels)[0][:limit] for p in found]})


def input_lengths(tokenized_inputs: Dataset) -> list[int]:
    """Tokens of each question."""
    return [len(ids) for ids in tokenized_inputs["input_ids"]]


def max_source_lengths(input_lengths: list[int]) -> int:
    """Most tokens of a question: the 95th percentile."""
    return int(np.percentile(input_lengths, pairs.PERCENTILE))


def tokenized_targets(
    train_set: Dataset, validation_set: Dataset, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Token ids of the answers that are trained and validated on, as `tokenized_inputs` has the questions."""
    found = _pairs(concatenate_datasets([train_set, validation_set]), tokenizer)
    limit = tokenizer.model_max_length
    return Dataset.from_dict({"input_ids": [pairs.parted(p.input_ids, p.labels)[1][:limit] for p in found]})


def target_lengths(tokenized_targets: Dataset) -> list[int]:
    """Tokens of each answer."""
    return [len(ids) for ids in tokenized_targets["input_ids"]]


def max_target_lengths(target_lengths: list[int]) -> int:
    """Most tokens of an answer in training: the 95th percentile."""
    return int(np.percentile(target_lengths, pairs.PERCENTILE))


def tokenized_train(
    train_set: Dataset, max_source_lengths: int, max_target_lengths: int, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """What is trained on: `input_ids`, `attention_mask` and `labels`, cut to the two lengths."""
    return _tokenized(train_set, max_source_lengths, max_target_lengths, tokenizer)


def tokenized_validation(
    validation_set: Dataset,
    max_source_lengths: int,
    max_target_lengths: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Dataset:
    """The validation rows in the form of `tokenized_train`."""
    return _tokenized(validation_set, max_source_lengths, max_target_lengths, tokenizer)


def tokenized_hold_out(
    hold_out_set: Dataset,
    max_source_lengths: int,
    max_target_lengths: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Dataset:
    """The hold-out rows in the form of `tokenized_train`."""
    return _tokenized(hold_out_set, max_source_lengths, max_target_lengths, tokenizer)


def saved_datasets(
    tokenized_train: Dataset,
    tokenized_validation: Dataset,
    tokenized_hold_out: Dataset,
    data_dir: str = "data",
) -> dict[str, str]:
    """The folders to which the three tokenized splits are written, by name: train, validation, inference."""
    named = {"train": tokenized_train, "validation": tokenized_validation, "inference": tokenized_hold_out}
    folders = {name: str(Path(data_dir).expanduser().resolve() / name) for name in named}
    for name, dataset in named.items():
        dataset.save_to_disk(folders[name])
    return folders


def _tokenized(
    dataset: Dataset, source_length: int, target_length: int, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Rows as token ids, unpadded (batches are padded when they are made), with a remark on what was cut."""
    limits = pairs.Lengths(source_length, target_length, "")
    closing = pairs.closing_tokens(tokenizer, encoder(tokenizer))
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    cut = Counter[str]()
    for pair in _pairs(dataset, tokenizer):
        kept = ~pairs.cut_off(pair, limits, closing)
        question, answer = pairs.parted(np.asarray(pair.input_ids)[kept], np.asarray(pair.labels)[kept])
        whole = pairs.parted(pair.input_ids, pair.labels)
        cut.update({"questions": len(question) < len(whole[0]), "answers": len(answer) < len(whole[1])})
        columns["input_ids"].append(question)
        columns["attention_mask"].append([1] * len(question))
        columns["labels"].append(answer)
    remark = (
        f"of {counted(len(dataset), 'row')} {counted(cut['questions'], 'question')} "
        f"{does('are', cut['questions'])} cut to {source_length} tokens, and {counted(cut['answers'], 'answer')} to "
        f"{target_length}"
    )
    return _described(Dataset.from_dict(columns), *([remark] if cut.total() else []))


def _pairs(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[Encoding]:
    """Each row as the engine's pair of tokens, uncut; text that looks like a special token stays text."""
    rows = [
        Conversation(
            (Message("user", question), Message("assistant", answer)), Row("question_answer", number)
        )
        for number, (question, answer) in enumerate(zip(dataset["input_text"], dataset["output_text"]), 1)
    ]
    [(_, found)] = pairs.encode_batches([rows], encoder(tokenizer), loss_on="last_answer")
    encodings = []
    for row, encoded in zip(rows, found, strict=True):
        if isinstance(encoded, Unusable):
            raise DataError(
                f"A row cannot be tokenized: {encoded}.",
                found=row.messages[0].content[:80],
                fix="Mend the row or leave it out.",
            )
        encodings += encoded
    return encodings


# Model and training


def lora_config() -> LoraConfig:
    """Rank 16 on the query and value projections as T5 names them; `base_model` finds those of other families."""
    return LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q", "v"],
        lora_dropout=0.2,
        bias="none",
        task_type=TaskType.SEQ_2_SEQ_LM,
    )


def device() -> torch.device:
    """Where the model lives: a GPU if there is one, else the CPU."""
    return torch.device(planning.device())


def base_model(
    lora_config: LoraConfig,
    device: torch.device,
    model_id: str | None = None,
    model_id_tokenizer: str | None = None,
    load_in_8bit: bool = False,
    random_state: int = 42,
) -> torch.nn.Module:
    """The base model with an untrained adapter on it; training changes this very object.

    `random_state` draws the adapter's first weights. Raises ModelError for a model that is no
    encoder-decoder model, MissingExtra and OutOfResources where 8-bit weights are not possible.
    """
    name = _model_name(model_id, model_id_tokenizer)
    _check_kind(name)
    if load_in_8bit:
        model = prepare_model_for_kbit_training(_eight_bit(name, device))
    else:
        model = models.load_model(name, device=str(device))
    transformers.set_seed(random_state)
    model.config.use_cache = False
    adapted: torch.nn.Module = get_peft_model(model, _fitting(lora_config, model))
    return adapted


def _eight_bit(name: str, device: torch.device) -> Any:
    import importlib.util

    if device.type != "cuda":
        raise OutOfResources(
            "load_in_8bit needs a CUDA device.",
            found=f"device {device}",
            fix="Leave load_in_8bit out: the adapter trains on 32-bit weights.",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "load_in_8bit", install="'tunesmith[qlora]'")
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(
        str(models.folder_of(name)),
        quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True),
        device_map={"": 0},
        trust_remote_code=False,
        use_safetensors=True,
    )


def _fitting(wanted: LoraConfig, model: Any) -> LoraConfig:
    """The adapter's settings, with the model's own query and value projections where it has no T5 names."""
    names = {name.rpartition(".")[2] for name in models.linear_modules(model)}
    if wanted.target_modules != {"q", "v"} or wanted.target_modules <= names:
        return wanted
    found = models.target_modules(model, "query-value")
    log.info("The adapter sits on %s: %s has no q and v.", ", ".join(found), type(model).__name__)
    return replace(wanted, target_modules=found)


def data_collator(
    tokenizer: PreTrainedTokenizerBase,
    base_model: torch.nn.Module,
    label_pad_token_id: int = -100,
    pad_to_multiple_of: int = 8,
) -> DataCollatorForSeq2Seq:
    """Makes batches: padded to the longest row, padding of answers without loss."""
    return _collator(tokenizer, base_model, label_pad_token_id, pad_to_multiple_of)


def _collator(
    tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module, label_pad_token_id: int, multiple: int
) -> DataCollatorForSeq2Seq:
    _check_positive(pad_to_multiple_of=multiple)
    if label_pad_token_id != IGNORED:
        raise RecipeError(
            "label_pad_token_id is the number that the loss leaves out; any other would train the padding.",
            found=str(label_pad_token_id),
            fix=f"Leave it out, or give {IGNORED}.",
        )
    return DataCollatorForSeq2Seq(
        tokenizer, model=model, label_pad_token_id=label_pad_token_id, pad_to_multiple_of=multiple
    )


def peft_model_id(model_id: str | None = None, model_id_tokenizer: str | None = None) -> str:
    """The folder of the adapter, below the working folder: `hamilton-<model>-peft`.

    <model> is a Hub id with `-` for `/`, or the name of the model's folder, however its path is spelled. Give
    another folder with `overrides={"peft_model_id": ...}`.
    """
    name = _model_name(model_id, model_id_tokenizer)
    path = Path(name).expanduser()
    if path.is_dir() or name.startswith((".", "/", "~")):
        name = path.resolve().name
    return f"hamilton-{name.replace('/', '-')}-peft"


def training_args(
    peft_model_id: str,
    device: torch.device,
    per_device_eval_batch_size: int = 8,
    per_device_train_batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    num_train_epochs: int = 2,
    random_state: int = 42,
) -> Seq2SeqTrainingArguments:
    """How it is trained. The model of the epoch with the lowest validation loss is kept."""
    _check_positive(
        per_device_eval_batch_size=per_device_eval_batch_size,
        per_device_train_batch_size=per_device_train_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        num_train_epochs=num_train_epochs,
    )
    return Seq2SeqTrainingArguments(
        output_dir=peft_model_id,
        per_device_eval_batch_size=per_device_eval_batch_size,
        per_device_train_batch_size=per_device_train_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        num_train_epochs=num_train_epochs,
        learning_rate=1e-3,
        do_train=True,
        do_eval=True,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        auto_find_batch_size=True,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        seed=random_state,
        report_to=["none"],
    )


def trainer(
    base_model: torch.nn.Module,
    training_args: Seq2SeqTrainingArguments,
    data_collator: DataCollatorForSeq2Seq,
    tokenized_train: Dataset,
    tokenized_validation: Dataset,
) -> Seq2SeqTrainer:
    """A trainer that has not started."""
    from tunesmith.training.callbacks import FiniteLoss

    return _quiet(
        token_weighted(Seq2SeqTrainer)(
            model=base_model,
            args=training_args,
            data_collator=data_collator,
            train_dataset=tokenized_train,
            eval_dataset=tokenized_validation,
            callbacks=[FiniteLoss()],
            compute_loss_func=token_mean,
        )
    )


def _quiet(trainer: Seq2SeqTrainer) -> Seq2SeqTrainer:
    """Keeps the trainer's own bars and prints from standard output; the numbers are in what it returns."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


@_when("base")
@_fields(
    fit_trainer=Seq2SeqTrainer,
    fit_trainer_training_metrics=dict[str, Any],
    fit_trainer_eval_metrics=dict[str, Any],
    finetuned_model=torch.nn.Module,
)
def fitted_and_evaluated_trainer(trainer: Seq2SeqTrainer, device: torch.device) -> dict[str, Any]:
    """The trainer when it is done, what it measured in training and on validation, and the model.

    `train_batch_size` is smaller than what was asked for where memory did not suffice. Raises RunError where the
    adapter's folder holds one already, TrainingDiverged before an update that is not a number, and OutOfResources.
    """
    _check_free(trainer.args.output_dir)
    try:
        fitted = trainer.train()
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        raise OutOfResources(
            "The device's memory does not suffice for one row at a time.",
            found=f"device {device}",
            fix="Use a smaller model, load_in_8bit on a GPU, or shorter texts.",
        ) from None
    measured = trainer.evaluate()
    model = _on(trainer.model, device).eval()
    model.config.use_cache = True
    return {
        "fit_trainer": trainer,
        "fit_trainer_training_metrics": {
            **{name: value for name, value in fitted.metrics.items() if name != "total_flos"},
            "train_batch_size": trainer.state.train_batch_size,
        },
        "fit_trainer_eval_metrics": measured,
        "finetuned_model": model,
    }


@_when("base")
def save_best_models(
    tokenizer: PreTrainedTokenizerBase,
    peft_model_id: str,
    fit_trainer: Seq2SeqTrainer,
    train_set: Dataset,
    validation_set: Dataset,
) -> dict[str, str]:
    """The trained adapter and its tokenizer, written to the folder `peft_model_id`.

    Beside them lies what recognizes the trained and validated questions, which are not in it themselves. The
    weights of the base stay where they are. Raises RunError where there is an adapter already.
    """
    folder = Path(peft_model_id).expanduser()
    _check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        fit_trainer.model.save_pretrained(staging)
        (Path(staging) / "README.md").unlink(missing_ok=True)  # PEFT's empty form
        tokenizer.save_pretrained(staging)
        learned = {**_marks("train", train_set), **_marks("validation", validation_set)}
        save_file(learned, Path(staging) / LEARNED)
        # The weights come last but one and the configuration last, so that a folder with both is whole.
        files = sorted(
            Path(staging).iterdir(), key=lambda file: (file.name in ADAPTER, file.name in ADAPTER[:1])
        )
        for file in files:
            os.replace(file, folder / file.name)
    return {"name": "save_best_models", "status": "success", "peft_model_id": peft_model_id}


@_when("presaved")
def save_best_models__presaved(peft_model_id: str, peft_config: PeftConfig) -> dict[str, str]:
    """Says that nothing is written: the adapter is only read."""
    return {"name": "save_best_models", "status": "unchanged", "peft_model_id": peft_model_id}


ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
LEARNED = "learned_questions.safetensors"
"""What recognizes the questions that an adapter was trained and validated on, beside it."""


def _marks(split: str, dataset: Dataset) -> dict[str, NDArray[Any]]:
    """By what the questions of a split are recognized: hashes but for case and punctuation; of long ones sketches."""
    asked = dataset["input_text"]
    hashes = [
        hashlib.blake2b((plain(text) or text).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for text in asked
    ]
    return {
        f"{split}_hashes": np.array([int.from_bytes(found, "big") for found in hashes], dtype=np.uint64),
        f"{split}_sketches": sketches([text for text in asked if _is_long(text)]),
    }


def _known(dataset: Dataset, learned: Mapping[str, NDArray[Any]], split: str) -> int:
    """How many of the questions stand, or nearly stand, among those of a split that were learned."""
    asked = _marks("asked", dataset)
    same = np.isin(asked["asked_hashes"], learned[f"{split}_hashes"])
    near, earlier = NearDuplicates(), learned[f"{split}_sketches"]
    near.add_sketches(earlier)
    near.add_sketches(asked["asked_sketches"])
    root, _ = rooted(near.count, NO_PAIRS, near.pairs())
    same[[_is_long(text) for text in dataset["input_text"]]] |= root[len(earlier) :] < len(earlier)
    return int(same.sum())


def _check_free(folder: str | Path) -> None:
    """Raises RunError where a folder holds an adapter: no run takes the place of another."""
    there = [name for name in ADAPTER if (Path(folder).expanduser() / name).exists()]
    if there:
        raise RunError(
            f"The folder {folder} holds an adapter already, and nothing is written over it.",
            found=", ".join(there),
            fix='Give this run another folder with overrides={"peft_model_id": ...} (--peft-model-id), delete that '
            'one, or measure it with the configuration {"start": "presaved"}.',
        )


def peft_config(
    peft_model_id: str, model_id: str | None = None, model_id_tokenizer: str | None = None
) -> PeftConfig:
    """The settings of the saved adapter.

    Raises ModelError that says what is missing in its folder, and where `model_id` names another model than the
    adapter's base.
    """
    folder = Path(peft_model_id).expanduser()
    missing = [name for name in ADAPTER if not (folder / name).is_file()]
    if missing:
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
        raise ModelError(
            f"The folder {peft_model_id} holds no saved adapter: {' and '.join(missing)} missing.",
            found=(", ".join(there[:8]) or "an empty folder") if there is not None else "no such folder here",
            fix='Train one first with the configuration {"start": "base"} and the output save_best_models, or name '
            'its folder with overrides={"peft_model_id": ...} (--peft-model-id).',
        )
    try:
        found = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"The adapter_config.json in {peft_model_id} is damaged.",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="Restore it, or train the adapter again.",
        ) from None
    if not found.base_model_name_or_path:
        raise ModelError(
            f"The adapter_config.json in {peft_model_id} does not say which model the adapter belongs to.",
            fix="Write that model's folder or Hub id into it as base_model_name_or_path.",
        )
    base = str(found.base_model_name_or_path)
    if (model_id or model_id_tokenizer) and not _same_model(_model_name(model_id, model_id_tokenizer), base):
        raise ModelError(
            f"The adapter in {peft_model_id} belongs to another model than the one that is named.",
            found=f"model_id {_model_name(model_id, model_id_tokenizer)}; the adapter's base is {base}",
            fix="Leave model_id out, or name the folder of that model's adapter with "
            'overrides={"peft_model_id": ...} (--peft-model-id).',
        )
    _check_kind(base)
    return found


def _same_model(one: str, other: str) -> bool:
    """Whether two names are the same Hub id, or lead to one folder."""
    if one == other:
        return True
    paths = [Path(name).expanduser() for name in (one, other)]
    return all(path.is_dir() for path in paths) and models.locate(one) == models.locate(other)


@_when("presaved")
def finetuned_model__presaved(peft_config: PeftConfig, peft_model_id: str, device: torch.device) -> PeftModel:
    """The saved adapter on its base, for answering."""
    return models.load_model(str(Path(peft_model_id).expanduser()), device=str(device)).eval()


@_when("presaved")
def fit_tokenizer__presaved(peft_config: PeftConfig, peft_model_id: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside the adapter; that of the base where none lies there."""
    folder = Path(peft_model_id).expanduser()
    saved = any((folder / name).is_file() for name in models.TOKENIZER_FILES)
    return _settled(models.load_tokenizer(str(folder if saved else peft_config.base_model_name_or_path)))


@_when("presaved")
def fit_trainer_eval_metrics__presaved(
    finetuned_model: torch.nn.Module,
    tokenized_validation: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    label_pad_token_id: int = -100,
    pad_to_multiple_of: int = 8,
    per_device_eval_batch_size: int = 8,
) -> dict[str, Any]:
    """What the trainer measures on the validation rows, of the saved adapter; nothing is trained or written."""
    with tempfile.TemporaryDirectory() as folder:
        measuring = token_weighted(Seq2SeqTrainer)(
            model=finetuned_model,
            args=Seq2SeqTrainingArguments(
                output_dir=folder,
                per_device_eval_batch_size=per_device_eval_batch_size,
                use_cpu=device.type == "cpu",
                dataloader_pin_memory=device.type == "cuda",
                report_to=["none"],
            ),
            data_collator=_collator(tokenizer, finetuned_model, label_pad_token_id, pad_to_multiple_of),
            eval_dataset=tokenized_validation,
            compute_loss_func=token_mean,
        )
        measured: dict[str, Any] = _quiet(measuring).evaluate()
    return {k: v for k, v in measured.items() if k not in ("epoch", "eval_model_preparation_time")}


# Answers and scores


def metric() -> dict[str, Metric]:
    """The four ROUGE metrics by name (rouge-score, stemmed; nothing is downloaded)."""
    return {name: METRICS[name] for name in ROUGE}


@_fields(validation_predictions=list[str], validation_references=list[str])
def finetuned_model_on_validation_set(
    tokenized_validation: Dataset,
    finetuned_model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    validation_set: Dataset,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> dict[str, list[str]]:
    """The model's answers to the validation questions, and the whole, uncut reference answers."""
    return {
        "validation_predictions": _answers(
            tokenized_validation, finetuned_model, tokenizer, device, max_new_tokens
        ),
        "validation_references": list(validation_set["output_text"]),
    }


def validation_set_metrics(
    validation_predictions: list[str], validation_references: list[str], metric: dict[str, Metric]
) -> dict[str, float]:
    """Mean ROUGE F1 of the validation answers, times 100: rouge1, rouge2, rougeL, rougeLsum."""
    return _means(_scored(validation_predictions, validation_references, metric))


@_when("base")
def training_and_validation_set_metrics(
    validation_set_metrics: dict[str, float],
    fit_trainer_eval_metrics: dict[str, Any],
    fit_trainer_training_metrics: dict[str, Any],
) -> dict[str, float]:
    """Training loss and speed, validation loss and speed, and ROUGE on validation, in one."""
    return {**fit_trainer_training_metrics, **fit_trainer_eval_metrics, **validation_set_metrics}


@_when("presaved")
def training_and_validation_set_metrics__presaved(
    validation_set_metrics: dict[str, float], fit_trainer_eval_metrics: dict[str, Any]
) -> dict[str, float]:
    """Validation loss and speed, and ROUGE on validation; there was no training to tell of."""
    return {**fit_trainer_eval_metrics, **validation_set_metrics}


def hold_out_set_predictions(
    tokenized_hold_out: Dataset,
    finetuned_model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    hold_out_set: Dataset,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[tuple[str, str]]:
    """Pairs of question, as it stands in the file, and the model's answer.

    How little so few rows prove is logged as a warning, and kept in `remarks`.
    """
    for caution in _caution(len(hold_out_set)):
        log.warning(caution)
    answers = _answers(tokenized_hold_out, finetuned_model, tokenizer, device, max_new_tokens)
    return list(zip(hold_out_set["input_text"], answers, strict=True))


def hold_out_set_references(hold_out_set: Dataset) -> list[str]:
    """The whole reference answers to the hold-out questions, in the order of `hold_out_set_predictions`."""
    return list(hold_out_set["output_text"])


def hold_out_set_rows(
    hold_out_set_predictions: list[tuple[str, str]],
    hold_out_set_references: list[str],
    metric: dict[str, Metric],
) -> list[dict[str, Any]]:
    """One row for each hold-out question: question, prediction, reference and the answer's ROUGE (times 100)."""
    predictions = [prediction for _, prediction in hold_out_set_predictions]
    scored = _scored(predictions, hold_out_set_references, metric)
    return [
        {"question": question, "prediction": prediction, "reference": reference, **scores}
        for (question, prediction), reference, scores in zip(
            hold_out_set_predictions, hold_out_set_references, scored, strict=True
        )
    ]


def hold_out_set_metrics(hold_out_set_rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean ROUGE F1 of the hold-out answers, times 100."""
    return _means([{name: row[name] for name in ROUGE} for row in hold_out_set_rows])


@_when("base")
def remarks(
    train_set: Dataset,
    tokenized_train: Dataset,
    tokenized_validation: Dataset,
    tokenized_hold_out: Dataset,
    validation_set: Dataset,
    hold_out_set: Dataset,
    metric: dict[str, Metric],
) -> list[str]:
    """What was decided on the way: splits, rows dropped, texts cut, what so few held-out rows can prove, and where
    ROUGE means nothing."""
    tokenized = {
        "trained": tokenized_train,
        "validation": tokenized_validation,
        "hold-out": tokenized_hold_out,
    }
    said = [f"{name}: {part.info.description}" for name, part in tokenized.items() if part.info.description]
    found = [train_set.info.description, *said, *_caution(len(hold_out_set))]
    references = [*validation_set["output_text"], *hold_out_set["output_text"]]
    if not _latin(references, metric):
        found.append(
            "ROUGE knows the letters a to z and digits only: of these answers it measures next to nothing"
        )
    return found


@_when("presaved")
def remarks__presaved(
    train_set: Dataset,
    tokenized_validation: Dataset,
    tokenized_hold_out: Dataset,
    validation_set: Dataset,
    hold_out_set: Dataset,
    metric: dict[str, Metric],
    peft_model_id: str,
) -> list[str]:
    """What `remarks` says, and how many of the measured questions the adapter was trained or validated on."""
    nothing = _described(Dataset.from_dict({}))
    found = remarks(
        train_set, nothing, tokenized_validation, tokenized_hold_out, validation_set, hold_out_set, metric
    )
    file = Path(peft_model_id).expanduser() / LEARNED
    if not file.is_file():
        return [
            *found,
            "it is not known what the adapter was trained on: scores may speak of trained questions",
        ]
    learned = load_file(file)
    for name, dataset, split, done in (
        ("validation", validation_set, "train", "trained"),
        ("hold-out", hold_out_set, "train", "trained"),
        ("hold-out", hold_out_set, "validation", "validated, and chose the epoch that is kept"),
    ):
        if known := _known(dataset, learned, split):
            found.append(
                f"{known} of the {name} questions, or nearly the same, were {done}: their scores prove nothing; give "
                "the data, random_state, train_size and validation_size of the training"
            )
            log.warning(found[-1])
    return found


def _answers(
    questions: Dataset,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers in batches, in the order of the questions."""
    _check_positive(max_new_tokens=max_new_tokens)
    made = generation.generate(
        _on(model, device),
        tokenizer,
        questions["input_ids"],
        max_new_tokens=max_new_tokens,
        stop_ids=end_of_turn_ids(tokenizer),
    )
    return [answer.text for answer in made]


def _on(model: Any, device: torch.device) -> Any:
    """The model on the device; quantized weights cannot be moved and are there already."""
    return model if getattr(model, "is_quantized", False) else model.to(device)


def _scored(
    predictions: Sequence[str], references: Sequence[str], metric: Mapping[str, Metric]
) -> list[dict[str, float]]:
    """Each answer's scores, times 100."""
    return [
        {
            name: 100 * found.score(_asked(reference), prediction, reference)
            for name, found in metric.items()
            if found.score
        }
        for prediction, reference in zip(predictions, references, strict=True)
    ]


def _means(scored: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([scores[name] for scores in scored])) for name in scored[0]}


def _latin(references: Sequence[str], metric: Mapping[str, Metric]) -> bool:
    fitting = [all(m.fits(_asked(reference)) for m in metric.values()) for reference in references]
    return 2 * sum(fitting) >= len(fitting)


def _asked(reference: str) -> Prompt:
    return Prompt((), reference, Row("question_answer", 0))


# Checks


def _check_keys(source: Source, **keys: str) -> None:
    """Raises DataError that names the inputs whose key no row has, and the keys that there are."""
    missing = {name: key for name, key in keys.items() if key not in (*source.columns, *source.empty_columns)}
    if not missing:
        return
    there = ", ".join(source.columns)
    hints = [
        f"{name}: did you mean '{near}'?"
        if (near := closest(key, source.columns))
        else f"{name}: one of {there}."
        for name, key in missing.items()
    ]
    raise DataError(
        f"No row of {source.name} has the key "
        + ", nor the key ".join(f"'{key}' ({name})" for name, key in missing.items())
        + ".",
        found=f"the keys {there}",
        fix=f"Give the keys of your rows. {' '.join(hints)}",
    )


def _model_name(model_id: str | None, model_id_tokenizer: str | None) -> str:
    """The model that `model_id` names, or its other name `model_id_tokenizer`. Raises RecipeError for two."""
    if model_id and model_id_tokenizer and model_id != model_id_tokenizer:
        raise RecipeError(
            "model_id and model_id_tokenizer name two models; they are two names of one input.",
            found=f"{model_id} and {model_id_tokenizer}",
            fix="Give model_id alone.",
        )
    return model_id or model_id_tokenizer or DEFAULT_MODEL


def _check_positive(**values: float) -> None:
    """Raises RecipeError for the values that leave nothing to do."""
    wrong = {name: value for name, value in values.items() if value <= 0}
    if wrong:
        raise RecipeError(
            f"{' and '.join(wrong)} must be at least 1.",
            found=", ".join(str(value) for value in wrong.values()),
        )


def _check_kind(name: str) -> None:
    """Raises ModelError for a model that is no encoder-decoder model, naming what it is."""
    models.check_writes(name)
    if models.kind(name) != "seq2seq":
        raise ModelError(
            f"'{name}' is a causal language model, and this flow fine-tunes encoder-decoder models.",
            fix=f"Use `tunesmith train --base-model {name}` (method sft), or give an encoder-decoder model such "
            "as google/flan-t5-small.",
        )


def _settled(tokenizer: Any) -> PreTrainedTokenizerBase:
    """The tokenizer with the form of the input noted in it, so that `tunesmith chat` and `tunesmith evaluate`
    ask a saved model as it was trained."""
    pairs.settle_template(tokenizer, None)
    settled: PreTrainedTokenizerBase = tokenizer
    return settled


# The command


def _inputs() -> dict[str, tuple[type, Any]]:
    """Type and default of everything that the nodes take from outside, by name."""
    nodes = {
        name: function
        for name, function in globals().items()
        if inspect.isfunction(function) and function.__module__ == __name__ and not name.startswith("_")
    }
    made = {name.partition("__")[0] for name in nodes}
    found: dict[str, tuple[type, Any]] = {}
    for function in nodes.values():
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is not parameter.empty:
                found[name] = (
                    type(parameter.default) if parameter.default is not None else str,
                    parameter.default,
                )
            elif name not in made:
                kind = get_type_hints(function)[name]
                if kind is str:
                    found.setdefault(name, (str, parameter.empty))
    return found


def _main(arguments: Sequence[str] | None = None) -> int:
    """Run the flow and print what it gives as one JSON object; progress goes to stderr."""
    inputs = _inputs()
    parser = argparse.ArgumentParser(
        prog="python -m tunesmith.flows.question_answer",
        description="Fine-tune an encoder-decoder model on questions and answers, and measure it.",
        epilog="docs/flows.md describes every node and input.",
    )
    add = parser.add_argument
    outputs = ", ".join(SUGGESTED_OUTPUTS)
    add(
        "--start",
        choices=("base", "presaved"),
        default="base",
        help="train (base), or measure a saved adapter",
    )
    add(
        "--output", action="append", metavar="NODE", help=f"what to give, once for each; by default {outputs}"
    )
    add("--peft-model-id", metavar="FOLDER", help="the adapter's folder; by default hamilton-<model>-peft")
    add(
        "--draw",
        metavar="FILE",
        type=Path,
        help="draw the flow to a .png, .svg or .pdf file first; needs graphviz",
    )
    for name, (kind, default) in inputs.items():
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            add(flag, action="store_true", default=argparse.SUPPRESS, help="by default not")
            continue
        required = default is inspect.Parameter.empty
        about = "required" if required else f"by default {DEFAULT_MODEL if default is None else default}"
        add(
            flag,
            type=kind,
            required=required,
            default=argparse.SUPPRESS,
            metavar=kind.__name__.upper(),
            help=about,
        )
    given = vars(parser.parse_args(arguments))
    try:
        found = _run(given, {name: value for name, value in given.items() if name in inputs})
    except TunesmithError as error:
        print(inert("\n".join(error.lines())), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Stopped; checkpoints of whole epochs are in the adapter's folder.", file=sys.stderr)
        return Interrupted.exit_code
    print(json_line(found))
    return 0


def _run(given: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    from hamilton.plugins.h_tqdm import ProgressBar

    from tunesmith.flows import driver

    flow = driver(given["start"], ProgressBar("fine-tuning"))
    wanted = [*(given["output"] or SUGGESTED_OUTPUTS), "remarks"]
    known = [variable.name for variable in flow.list_available_variables()]
    for name in wanted:
        if name not in known:
            raise RecipeError(f"There is no node '{name}'.", fix=nearest(name, known))
    if given["draw"]:
        _draw(flow, given["draw"])
    overrides = {"peft_model_id": given["peft_model_id"]} if given["peft_model_id"] else {}
    found: dict[str, Any] = flow.execute(
        list(dict.fromkeys(wanted)), inputs=dict(inputs), overrides=overrides
    )
    return found


PICTURES = (".png", ".svg", ".pdf")


def _draw(flow: Any, file: Path) -> None:
    """Draw the flow as a picture. Raises MissingExtra where graphviz or its program `dot` is missing."""
    import importlib.util
    import shutil

    if file.suffix not in PICTURES:
        raise RecipeError(
            "--draw takes a file name with the picture's kind.",
            found=str(file),
            fix=f"End it in {', '.join(PICTURES)}.",
        )
    if importlib.util.find_spec("graphviz") is None:
        raise MissingExtra("graphviz", "--draw", install="'tunesmith[draw]'")
    if shutil.which("dot") is None:
        raise MissingExtra(
            "dot", "--draw", install="... does not bring it: install your system's graphviz package"
        )
    flow.display_all_functions(str(file), orient="TB", deduplicate_inputs=True)


if __name__ == "__main__":
    sys.exit(_main())
