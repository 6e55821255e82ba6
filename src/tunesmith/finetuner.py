"""LLMFineTuner: fine-tuning step by step from a notebook, on the same engine as the command line.

    finetuner = LLMFineTuner("gpt2", "./my_model")
    finetuner.load_model()
    dataset = finetuner.load_dataset_from_source("./data.jsonl", num_samples=5000)
    tokenized, columns = finetuner.prepare_dataset(dataset, max_length=512)
    finetuner.setup_lora(r=8)
    finetuner.train(tokenized, num_epochs=3)
    finetuner.benchmark(["prompt: What is LoRA? response:"], use_finetuned=True, test_references=["..."])

The folder it leaves is a run like any other, with the adapter at its top as well. It trains on every row
it is given and holds nothing back; `tunesmith.train` splits, compares and gives a verdict.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import errors
from tunesmith import plan as planning
from tunesmith.errors import (
    DataError,
    Interrupted,
    ModelError,
    OutOfResources,
    RunError,
    counted,
    does,
    is_out_of_memory,
)
from tunesmith.recipe import Training
from tunesmith.training.fit import quiet_libraries

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from numpy.typing import NDArray

    from tunesmith.data.cache import Encodings
    from tunesmith.recipe import LoRA, Recipe
    from tunesmith.training.fit import Fit
    from tunesmith.training.retaking import Lacking
    from tunesmith.training.run import Run

TEXT_COLUMNS = (
    "text",
    "content",
    "input",
    "output",
    "prompt",
    "response",
    "instruction",
    "question",
    "answer",
)
"""Names of columns that hold text even where a row's value is a number."""

TARGET_PATTERNS = (
    ("q_proj", "v_proj", "k_proj", "o_proj"),  # Llama, Mistral, Qwen, Gemma; OPT without o_proj
    ("query", "value", "key", "dense"),
    ("q_lin", "v_lin", "k_lin", "out_lin"),
    ("c_attn", "c_proj"),  # GPT-2; c_proj is in attention and MLP alike
    ("qkv_proj", "out_proj"),
    ("fc1", "fc2"),
    ("up_proj", "down_proj", "gate_proj"),
)
"""Names of projections, family by family, in the order in which they are tried; the first two must be there.

For this class alone, whose documented numbers depend on it; a recipe's `adapter.targets` go by
`models.QUERY_VALUE`. A new family belongs into both, and a test compares them.
"""

GRADIENT_ACCUMULATION = 4
"""Forward passes per optimizer step."""

NEW_TOKENS = 100
"""Longest answer of `benchmark`, in tokens."""

TOKENIZED = ("input_ids", "attention_mask", "labels")
"""Columns of a tokenized data set that are read; the last two may be missing."""

NOTHING_TO_LEARN = "no token outside the padding has a label behind the first"
"""Why a tokenized row is left out."""

UNNAMED = "in memory"
"""What the recipe calls a data set that did not come from `load_dataset_from_source` unchanged."""

SELF_REFERENCE = (
    "No test_references were given, so each prompt is its own reference: the scores say how much of the prompt "
    "is left in prompt + answer. A model that answers nothing scores 1; a good answer lowers them. They do not "
    "measure quality: give test_references=[...] with the expected answers."
)


class OutOfMemory(errors.OutOfMemory, RuntimeError):
    """Training did not fit into memory; a RuntimeError that says `out of memory`, as torch's does."""


class LLMFineTuner:
    """Loads a model, prepares data, attaches LoRA, trains, measures and uploads: one method per step."""

    def __init__(self, model_name: str, output_dir: str = "./finetuned_model") -> None:
        quiet_libraries()
        self.model_name = os.fspath(model_name)
        self.output_dir = os.fspath(output_dir)
        self.device: str = planning.device()
        self.tokenizer: Any = None
        self.model: Any = None
        self.peft_model: Any = None
        self._is_tuned = False
        self._lora: LoRA | None = None
        self._origins: dict[str, dict[str, Any]] = {}
        self._columns: list[str] = []
        self._copy: tuple[Any, Any] | None = None

    def load_model(self) -> None:
        """Load tokenizer and weights: float16 on CUDA (spread over all GPUs there are), else float32.

        Sets `tokenizer` (with a padding token) and `model`, and prints what was loaded. Raises ModelError for
        what cannot be loaded.
        """
        import torch

        from tunesmith import models
        from tunesmith.generation import context_length

        models.check_writes(self.model_name)
        if models.kind(self.model_name) == "seq2seq":
            raise ModelError(
                f"'{self.model_name}' is an encoder-decoder model, and LLMFineTuner trains causal ones.",
                fix="Train it with `tunesmith train --method seq2seq` or with the module "
                "tunesmith.flows.question_answer, or name a causal model (GPT-2, Llama, Qwen).",
            )
        self.tokenizer = models.load_tokenizer(self.model_name)
        spread = self.device == "cuda" and torch.cuda.device_count() > 1
        model = models.load_model(
            self.model_name,
            dtype="float16" if self.device == "cuda" else "float32",
            device="cpu" if spread else self.device,
        )
        self.model = _spread(model) if spread else model
        self.peft_model, self._lora, self._is_tuned = None, None, False
        facts, limit = models.describe(self.model), context_length(self.model)
        _say(
            f"{self.model_name}: {facts.architecture}, {facts.parameters:,} parameters in "
            f"{counted(facts.layers, 'layer')}, {str(self.model.dtype).removeprefix('torch.')} on {self.device}"
            + (f", context of {limit:,} tokens" if limit else "")
        )

    def load_dataset_from_source(
        self,
        dataset_source: str,
        dataset_config: str | None = None,
        split: str = "train",
        num_samples: int | None = None,
        data_files: str | None = None,
    ) -> Dataset:
        """The first `num_samples` rows of a file, folder, `example:NAME` or Hub data set as a Dataset.

        `split` chooses among the named splits of a source; a file without any is one `train` split. Prints
        how many rows with which columns. Raises DataError for what cannot be read, naming file, line and column.
        """
        from itertools import islice

        from datasets import Dataset

        from tunesmith.data.sources import ROLES, Record, open_source

        dataset_source = os.fspath(dataset_source)
        if num_samples is not None:
            _check_count("num_samples", num_samples)
        is_local = dataset_source.startswith("example:") or Path(dataset_source).expanduser().exists()
        source = open_source(
            dataset_source, config=dataset_config, split=None if is_local else split, data_files=data_files
        )
        first = next(source.scan(), None)
        has_splits = isinstance(first, Record) and first.role is not None
        if has_splits or (is_local and split != "train"):
            found = {record.role: None for record in source.records}
            if ROLES.get(split) not in found or not has_splits:
                names = [name.replace("_", "-") for name in found if name]
                raise DataError(
                    f"{dataset_source} has no split '{split}'.",
                    found=f"splits {', '.join(names)}"
                    if names
                    else "rows without named splits: all are 'train'",
                    fix="Name one of them with split=." if names else "Leave split= out.",
                )
            chosen = (record.values for record in source.records if record.role == ROLES[split])
            rows = list(islice(chosen, num_samples))
        else:
            # Limited where it is read: rows behind the last one wanted are not looked at.
            limited = replace(source, scan=lambda: islice(source.scan(), num_samples))
            rows = [record.values for record in limited.records]
        if not rows:
            raise DataError(
                f"{dataset_source} has no rows.", fix="Check the file: expected at least one record."
            )
        names = list(dict.fromkeys(name for row in rows for name in row))
        dataset = Dataset.from_dict({name: _column(name, rows, dataset_source) for name in names})
        origin = {
            "dataset": dataset_source,
            "config": dataset_config,
            "split": split if has_splits or not is_local else None,
            "data_files": data_files,
            "max_rows": num_samples,
        }
        # Of a source with several splits, `max_rows` would count other rows than num_samples did.
        self._origins[dataset._fingerprint] = {} if num_samples and has_splits else origin
        _say(f"{counted(len(dataset), 'row')} of {dataset_source}: {_columns_shown(dataset)}")
        return dataset

    def detect_text_columns(self, dataset: Dataset) -> list[str]:
        """The columns that hold text, in the data set's order: those of strings, and known names with numbers."""
        return [
            name
            for name, feature in _as_dataset(dataset, "detect_text_columns()").features.items()
            if _is_text(feature) or (name.lower() in TEXT_COLUMNS and _is_number(feature))
        ]

    def prepare_dataset(
        self, dataset: Dataset, text_columns: list[str] | None = None, max_length: int = 512
    ) -> tuple[Dataset, list[str]]:
        """The rows as token ids, and the columns they were made of.

        Without `text_columns` all that `detect_text_columns` finds are used; which ones is printed. One column
        is taken as it is, several become `column: value column: value`; empty values are left out, and so are
        rows without any. Every text ends with the end-of-text token, which is trained, unless it is cut at
        `max_length` tokens. A list of dictionaries is taken for a data set. The result has `input_ids`,
        `attention_mask` and `labels` (-100 on padding) of exactly that length. Raises DataError for unknown
        columns, naming those that are there.
        """
        from datasets import Features, List, Value

        from tunesmith.generation import context_length

        self._need(self.tokenizer, "load_model()", "prepare_dataset()")
        dataset = _as_dataset(dataset, "prepare_dataset()")
        limit = context_length(self.model)
        _check_count("max_length", max_length)
        if limit and max_length > limit:
            raise ModelError(
                f"max_length has to be between 1 and the context of the model, {limit} tokens.",
                found=str(max_length),
                fix=f"Call prepare_dataset(..., max_length={limit}).",
            )
        columns = self._chosen_columns(dataset, text_columns)
        encoded = dataset.select_columns(columns).map(
            lambda rows: self._encoded(rows, columns, max_length),
            batched=True,
            remove_columns=columns,
            load_from_cache_file=False,
            features=Features(
                {name: List(Value("int32")) for name in ("input_ids", "attention_mask", "labels")}
                | {"truncated": Value("bool")}
            ),
            new_fingerprint=hashlib.sha256(
                f"{dataset._fingerprint} {columns} {max_length} {self.model_name}".encode()
            ).hexdigest()[:16],
        )
        empty = len(dataset) - len(encoded)
        if not len(encoded):
            raise DataError(
                f"No row has text in {columns[-1]}.", fix="Name other columns: text_columns=[...]."
            )
        truncated = sum(encoded["truncated"])
        _say(
            f"{len(encoded)} of {counted(len(dataset), 'row')} prepared from {', '.join(columns)}: "
            f"{empty} without {columns[-1]} and left out, {truncated} cut at {counted(max_length, 'token')}"
        )
        prepared = encoded.remove_columns(["truncated"])
        self._origins[prepared._fingerprint] = self._origins.get(dataset._fingerprint, {})
        self._columns = columns
        return prepared, columns

    def get_target_modules(self) -> list[str] | str:
        """Names of the modules that LoRA is to sit on, of the first pattern of which two are in the model.

        Else up to four linear modules named like projections, else `all-linear`.
        """
        self._need(self.model, "load_model()", "get_target_modules()")
        names = self._linear_names()
        for pattern in TARGET_PATTERNS:
            if set(pattern[:2]) <= set(names):
                return [name for name in pattern if name in names]
        alike = [name for name in names if any(part in name.lower() for part in ("lin", "proj", "fc"))]
        return alike[:4] or "all-linear"

    def setup_lora(
        self,
        r: int = 8,
        lora_alpha: int = 32,
        lora_dropout: float = 0.1,
        target_modules: list[str] | None = None,
    ) -> None:
        """Put LoRA on the model as `peft_model`, and print how much of it is trained.

        The adapter's start is drawn from a fixed seed, which sets the libraries' random streams. A second call
        begins a new adapter on the base's weights. Raises ModelError for modules that the model does not have,
        naming those it has.
        """
        from transformers import set_seed

        from tunesmith import models
        from tunesmith.compose import validated

        self._need(self.model, "load_model()", "setup_lora()")
        if isinstance(target_modules, str) and target_modules != "all-linear":
            target_modules = [target_modules]
        targets = target_modules or self.get_target_modules()
        known = self._linear_names()
        missing = [name for name in targets if name.rpartition(".")[2] not in known]
        if missing and targets != "all-linear":
            raise ModelError(
                f"{type(self.model).__name__} has no module {', '.join(missing)}.",
                found="linear modules " + ", ".join(known),
                fix="Name some of these with target_modules=[...], or leave it out.",
            )
        adapter: Any = validated(
            {
                "adapter": {
                    "kind": "lora",
                    "rank": r,
                    "alpha": lora_alpha,
                    "dropout": lora_dropout,
                    "targets": targets,
                }
            }
        ).adapter
        if self.peft_model is not None:
            _say(
                "The adapter in memory is given up for a new one."
                + (" Its weights are saved." * self._is_tuned)
            )
            self.model = self.peft_model.unload()
        merged_base = self._merged_base()
        if hasattr(self.model, "merge_and_unload") and merged_base.is_dir() and any(merged_base.iterdir()):
            raise RunError(
                f"The weights of '{self.model_name}' with its adapter merged would be written to {merged_base}, which "
                "is taken.",
                fix="Choose another output_dir, or move that folder away.",
            )
        set_seed(Training().seed)  # the adapter's start is drawn
        self.peft_model = models.attach(self.model, adapter, merged_base=merged_base)
        self.model = self.peft_model.get_base_model()
        self._lora, self._is_tuned = adapter, False
        self.peft_model.print_trainable_parameters()

    def train(
        self,
        train_dataset: Dataset,
        num_epochs: int = 3,
        batch_size: int = 4,
        learning_rate: float = 2e-4,
    ) -> None:
        """Train the adapter on a prepared data set, and save adapter and tokenizer in `output_dir`.

        Four batches make one optimizer step, the rate falls linearly, a checkpoint is written after each
        epoch, and every tenth step is logged. An interrupted training goes on from its last checkpoint when
        it is called again with the same data and settings. Raises RunError where the folder is taken,
        OutOfMemory with what to lower, and KeyboardInterrupt after Ctrl-C, its state saved.
        """
        import torch

        from tunesmith import forward, models
        from tunesmith.display import Display
        from tunesmith.export.card import write_card
        from tunesmith.methods import METHODS
        from tunesmith.training import continuing
        from tunesmith.training.fit import arguments, fit
        from tunesmith.training.retaking import attempted, retaken
        from tunesmith.training.run import anchored, create, discard, is_run, open_run

        self._need(self.model, "load_model()", "train()")
        self._need(self.peft_model, "setup_lora()", "train()")
        if self._lora is None:
            raise ModelError(
                "The adapter in memory was loaded for answering, not for training.",
                fix="Call setup_lora() before train().",
            )
        train_dataset = _as_dataset(train_dataset, "train()")
        rows, digest, counts, width = self._written(train_dataset)
        recipe = anchored(self._recipe(train_dataset, width, num_epochs, batch_size, learning_rate))
        longest = int(rows.lengths.max())
        plan = planning.resolve(
            recipe.training,
            recipe.model,
            adapter_kind="lora",
            lengths=rows.lengths.tolist(),
            num_validation=0,
        )
        identity = {"tokens": digest}
        with Display(quiet=False) as display:
            path = self._folder()
            is_begun = is_run(path)
            if is_begun:
                run = open_run(path, watch=display)
                if (state := run.state()) in {"done", "running"}:
                    raise RunError(
                        f"The folder {self.output_dir} holds a run already.",
                        found=f"a run in state '{state}'"
                        + (f": {run.holder()}" if state == "running" else ""),
                        fix=OTHER_FOLDER,
                    )
            else:
                try:
                    run = create(recipe, watch=display)
                except RunError as error:
                    raise RunError(error.problem, found=error.found, fix=OTHER_FOLDER) from None
            dropped = {NOTHING_TO_LEARN: counts["dropped"]} if counts["dropped"] else {}
            facts = {
                "data_sha256": digest, "rows": counts, "identity": identity, "recipe": recipe.model_dump(mode="json"),
            }  # fmt: skip
            with run.lock():
                checkpoint = _continued(run, recipe, identity) if is_begun else None
                run.write_plan({**plan.as_dict(), **facts})
                (run.path / "status.json").unlink(missing_ok=True)
                try:
                    run.event("state", state="prepared", rows=counts, dropped=dropped)
                    for decision in plan.decisions:
                        run.event(
                            "decision", name=decision.name, value=decision.value, reason=decision.reason
                        )
                    run.event("warning", message=NOT_REPEATABLE)
                    model = models.describe(self.peft_model).sentence()
                    run.event("decision", name="model", value=model, reason="adapter.kind is lora")
                    options = arguments(
                        plan, recipe.training, recipe.tracking, name=path.name, staging=path / ".staging"
                    )
                    begun = {n: p.detach().clone() for n, p in _trained(self.peft_model)}

                    def attempt(checkpoint: Path | None, may_fail_after: int | None) -> Fit | Lacking:
                        self.peft_model.zero_grad(set_to_none=True)
                        with torch.no_grad():
                            for name, parameter in _trained(self.peft_model):
                                parameter.copy_(begun[name])
                        torch.manual_seed(recipe.training.seed)
                        with models.keeping_types(self.peft_model):
                            trainer = METHODS["sft"].build(
                                recipe.method,
                                model=self.peft_model,
                                tokenizer=self.tokenizer,
                                train=rows,
                                validation=(),
                                arguments=options,
                                run=run,
                                keep=recipe.training.save_total_limit,
                            )
                        forward.attach(trainer, run, recipe.training)
                        rests_on = continuing.rests_on(recipe, identity)
                        work = partial(
                            fit, trainer, run, recipe.training, checkpoint=checkpoint, rests_on=rests_on
                        )
                        return attempted(trainer, work, checkpoint, may_fail_after)

                    result, _ = retaken(run, checkpoint, attempt)
                    run.write("training.json", asdict(result))
                    write_card(run, [])
                    _lay_open(run)
                except (KeyboardInterrupt, Interrupted) as error:
                    run.finish("interrupted")
                    problem = error.problem if isinstance(error, Interrupted) else "Stopped."
                    raise KeyboardInterrupt(f"{problem} Call train() again as before to go on.") from None
                except Exception as error:
                    if not run.checkpoints.exists():
                        discard(run)
                    else:
                        run.finish("failed", error=str(error))
                    if is_out_of_memory(error) or isinstance(error, errors.OutOfMemory):
                        raise _out_of_memory(error, self.device, batch_size, longest) from error
                    raise
                run.finish("done", seconds=result.seconds)
        self._is_tuned = True
        _say(f"Model saved in {self.output_dir}")

    def benchmark(
        self,
        test_prompts: list[str],
        use_finetuned: bool = False,
        *,
        test_references: list[str] | None = None,
        max_new_tokens: int = NEW_TOKENS,
    ) -> dict[str, float]:
        """Mean ROUGE-1, ROUGE-2 and ROUGE-L (F1, stemmed, 0 to 1) of greedy answers to prompts.

        `test_references` are the expected answers; without them each prompt is its own reference, which says
        nothing about quality, and that is printed. The base is the base's weights even when an adapter
        sits on them. Prompts are given to the model as they are, cut nowhere: DataError for those that fill
        its context; answers that the context's end cuts are counted and printed, as the scores are.
        """
        from tunesmith.data.examples import Prompt, Row
        from tunesmith.evaluation.metrics import METRICS
        from tunesmith.generation import context_length, generate

        prompts = self._checked_prompts(test_prompts, test_references)
        if use_finetuned:
            self._load_tuned()
        else:
            self._need(self.model, "load_model()", "benchmark()")
        model = self.peft_model if self.peft_model is not None else self.model
        base_only = (
            self.peft_model.disable_adapter() if self.peft_model is not None and not use_finetuned else None
        )
        _check_count("max_new_tokens", max_new_tokens)
        ids = self._fitting_prompts(prompts)
        with base_only or nullcontext():
            try:
                answers = generate(
                    model,
                    self.tokenizer,
                    ids,
                    max_new_tokens=max_new_tokens,
                    stop_ids=[] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id],
                )
            except OutOfResources as error:
                longest = max(map(len, ids))
                raise OutOfMemory(
                    f"Answering ran out of memory with a single prompt at a time: prompts have up to {longest} tokens, "
                    f"answers up to {max_new_tokens}.",
                    found=f"{error.found or 'out of memory'}; {_held(self.device)}",
                    fix=f"benchmark(..., max_new_tokens={max(max_new_tokens // 2, 1)}), shorter prompts, or a smaller "
                    "model.",
                ) from error
        if test_references is None:
            _say(SELF_REFERENCE)
        elif len(self._columns) > 1 and not all(p.startswith(f"{self._columns[0]}: ") for p in prompts):
            form = " ".join(f"{name}: …" for name in self._columns[:-1]) + f" {self._columns[-1]}:"
            _say(f"The prompts are asked as they are; the training texts begin with `{form}`.")
        cut = sum(a.finish_reason == "length" and len(a.ids) < max_new_tokens for a in answers)
        if cut:
            _say(
                f"{counted(cut, 'answer')} of {len(answers)} {does('end', cut)} where the model's context "
                f"of {context_length(self.model)} tokens does, before {max_new_tokens} new tokens."
            )
        scores: dict[str, float] = {}
        for name in ("rouge1", "rouge2", "rougeL"):
            score = METRICS[name].score
            assert score
            values = [
                score(Prompt((), reference, Row("benchmark", number)), answer, reference)
                for number, (answer, reference) in enumerate(
                    (a.text, r) if test_references is not None else (f"{p} {a.text}", p)
                    for p, a, r in zip(prompts, answers, test_references or prompts, strict=True)
                )
            ]
            scores[name] = sum(values) / len(values)
        _say(
            f"{'Fine-tuned model' if use_finetuned else 'Base model'}, {counted(len(prompts), 'prompt')}: "
            + ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        )
        return scores

    def upload_to_huggingface(
        self, repo_name: str, token: str | None = None, create_new: bool = False, private: bool = False
    ) -> None:
        """Upload the trained adapter and tokenizer to the Hub and print the address.

        `token` is used for this upload and kept nowhere; without one the Hub's own login is. Raises RunError
        where nothing was trained, and TunesmithError with the Hub's answer.
        """
        from tunesmith.export.publish import publish
        from tunesmith.training.run import Run

        folder = Run(self._folder()).final_model
        if not (folder / "adapter_config.json").is_file():
            raise RunError(
                f"There is no trained model in {self.output_dir}.",
                fix="Call train() before upload_to_huggingface().",
            )
        address = publish(folder, repo_name, private=private, token=token, create=create_new)
        _say(f"✅ Model uploaded successfully to: {address}")

    def _need(self, there: Any, step: str, wanted: str) -> None:
        if there is None:
            raise ModelError(f"{wanted} needs {step} first.", fix=f"Call {step}, then {wanted}.")

    def _folder(self) -> Path:
        return Path(os.path.abspath(Path(self.output_dir).expanduser()))

    def _merged_base(self) -> Path:
        """Where the weights of a tuned base are kept, with its adapter merged; the run's folder must begin empty."""
        return self._folder().with_name(f"{self._folder().name}-base")

    def _linear_names(self) -> list[str]:
        """Last parts of the names of the linear modules, without those of an adapter."""
        from tunesmith import models

        names = (name.removesuffix(".base_layer") for name in models.linear_modules(self.model))
        return list(dict.fromkeys(name.rpartition(".")[2] for name in names if ".lora_" not in name))

    def _chosen_columns(self, dataset: Dataset, asked: Sequence[str] | None) -> list[str]:
        there = _columns_shown(dataset)
        if asked is None:
            columns = self.detect_text_columns(dataset)
            if not columns:
                raise DataError(
                    "No column of the data set holds text.",
                    found=there,
                    fix="Make one, or train conversations with `tunesmith train`, which reads messages.",
                )
            return columns
        columns = [asked] if isinstance(asked, str) else list(asked)
        missing = [name for name in columns if name not in dataset.column_names]
        if missing or not columns:
            raise DataError(
                f"The data set has no column {', '.join(missing)}." if missing else "text_columns is empty.",
                found=there,
                fix="Name some of these, or leave text_columns out.",
            )
        unreadable = [n for n in columns if not (_is_text(f := dataset.features[n]) or _is_number(f))]
        if unreadable:
            raise DataError(
                f"The columns {', '.join(unreadable)} hold neither text nor numbers.", found=there
            )
        return columns

    def _encoded(self, rows: Mapping[str, list[Any]], columns: list[str], width: int) -> dict[str, list[Any]]:
        """A batch of rows as padded ids, masks and labels."""
        from tunesmith.data.examples import Row, Text, Unusable
        from tunesmith.data.templates import encode_all

        texts = []
        for values in zip(*(rows[name] for name in columns), strict=True):
            filled = {
                n: str(v) for n, v in zip(columns, values, strict=True) if v is not None and str(v).strip()
            }
            # Without its last column a row has no answer: it would teach to end behind the question.
            if columns[-1] in filled:
                alone = len(columns) == 1
                texts.append(" ".join(v if alone else f"{n}: {v}" for n, v in filled.items()))
        examples = [Text(text, row=Row("row", number)) for number, text in enumerate(texts)]
        result: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": [], "truncated": []}
        for encoding in encode_all(examples, self._templated(), loss_on="everything"):
            if isinstance(encoding, Unusable):
                continue
            ids = [int(i) for i in encoding.input_ids]
            kept, empty = ids[:width], max(width - len(ids), 0)
            result["input_ids"].append(kept + [self.tokenizer.pad_token_id] * empty)
            result["attention_mask"].append([1] * len(kept) + [0] * empty)
            result["labels"].append(kept + [-100] * empty)
            result["truncated"].append(len(ids) > width)
        return result

    def _templated(self) -> Any:
        """The tokenizer, or a copy with a template where it has none: the encoder asks for one, texts do not."""
        from tunesmith.data.templates import set_template

        if self.tokenizer.chat_template:
            return self.tokenizer
        if self._copy is None or self._copy[0] is not self.tokenizer:
            self._copy = (self.tokenizer, copy.deepcopy(self.tokenizer))
            set_template(self._copy[1], None)
        return self._copy[1]

    def _prompt_ids(self, prompt: str) -> list[int]:
        """A prompt opened as training texts are, and not closed."""
        from tunesmith.data.examples import Row, Text
        from tunesmith.data.templates import encode

        ids = [int(i) for i in encode(Text(prompt, row=Row("prompt", 1)), self._templated()).input_ids]
        return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def _fitting_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """The prompts' ids. Raises DataError for those that leave no room for an answer."""
        from tunesmith.generation import context_length

        ids = [self._prompt_ids(prompt) for prompt in prompts]
        limit = context_length(self.model)
        over = [f"prompt {n} with {len(i)} tokens" for n, i in enumerate(ids, 1) if limit and len(i) >= limit]
        if over:
            raise DataError(
                f"{counted(len(over), 'prompt')} of {len(ids)} {does('leave', len(over))} no room for an answer in "
                f"the model's context of {limit} tokens.",
                found=", ".join(over[:8]) + (", ..." if len(over) > 8 else ""),
                fix="Shorten them, or leave them out.",
            )
        return ids

    def _checked_prompts(self, prompts: Sequence[str], references: Sequence[str] | None) -> list[str]:
        if (
            isinstance(prompts, str)
            or not prompts
            or not all(isinstance(p, str) and p.strip() for p in prompts)
        ):
            raise DataError(
                "test_prompts has to be a list of texts, none of them empty.", found=repr(prompts)[:80]
            )
        if references is not None and (isinstance(references, str) or len(references) != len(prompts)):
            raise DataError(
                "test_references has to hold one answer per prompt.",
                found=f"{counted(len(prompts), 'prompt')}, "
                + ("one text" if isinstance(references, str) else counted(len(references), "reference")),
            )
        return list(prompts)

    def _load_tuned(self) -> None:
        """The tuned model: the one in memory, or that of a former training in `output_dir`."""
        from tunesmith import models
        from tunesmith.training.run import Run

        if self._is_tuned:
            return
        folder = Run(self._folder()).final_model
        if self.peft_model is not None or not (folder / "adapter_config.json").is_file():
            raise ModelError(
                "There is no fine-tuned model to benchmark yet.",
                found="an adapter without training, whose answers are the base's"
                if self.peft_model is not None
                else f"no adapter in memory or in {self.output_dir}",
                fix="Call setup_lora() and train() before benchmark(..., use_finetuned=True)."
                if self.peft_model is None
                else "Call train() before benchmark(..., use_finetuned=True).",
            )
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        named = {self.model_name, str(Path(models.locate(self.model_name)).resolve())}
        merged = self._merged_base().resolve()
        if base not in named and Path(base).resolve() not in {merged, *map(Path, named)}:
            raise ModelError(
                f"The adapter in {self.output_dir} is of another base than '{self.model_name}'.",
                found=f"it was trained on {base}",
                fix="Give that model's name, or the output_dir of this model's training.",
            )
        self.tokenizer = models.load_tokenizer(str(folder))
        self.peft_model = models.load_model(
            str(folder), dtype="float16" if self.device == "cuda" else "float32", device=self.device
        )
        self.model, self._is_tuned = self.peft_model.get_base_model(), True

    def _written(self, dataset: Any) -> tuple[Encodings, str, dict[str, int], int]:
        """The tokenized rows without their padding, in a file to train from; its hash; their counts and width."""
        from tunesmith.data import cache
        from tunesmith.data.templates import IGNORED, Encoding
        from tunesmith.generation import context_length

        names = dataset.column_names
        if "input_ids" not in names:
            raise DataError(
                "train() needs a tokenized data set.",
                found=f"columns {', '.join(names) or 'none'}",
                fix="Pass what prepare_dataset() gives: tokenized, columns = finetuner.prepare_dataset(dataset).",
            )
        dataset = dataset.select_columns([name for name in TOKENIZED if name in names])
        limit = context_length(self.model)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        digest, truncated, empty, width, end = hashlib.sha256(), 0, 0, 1, self.tokenizer.eos_token_id
        with cache.making(None) as folder:
            writer = cache.EncodingWriter(folder / "train.arrow", digest)
            for start in range(0, len(dataset), 1000):
                batch = dataset[start : start + 1000]
                numbers, encodings = [], []
                for number, row in enumerate(
                    dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
                ):
                    ids, labels = _unpadded(start + number + 1, row, limit, vocabulary)
                    width = max(width, len(row["input_ids"]))
                    # The first token is predicted from nothing, so that its label trains nothing.
                    if (labels[1:] == IGNORED).all():
                        empty += 1
                        continue
                    truncated += end not in (None, ids[-1])
                    numbers.append(start + number)
                    encodings.append(Encoding(ids, labels))
                writer.write(numbers, encodings)
            writer.close()
        if empty == len(dataset):
            raise DataError(
                "The data set to train on has no row with a token to learn."
                if empty
                else "The data set to train on has no rows.",
                found=f"{counted(empty, 'row')}: {NOTHING_TO_LEARN}" if empty else None,
                fix="Pass what prepare_dataset() gives.",
            )
        counts = {
            "rows_in": len(dataset), "train": len(dataset) - empty, "validation": 0, "held_out": 0, "dropped": empty,
            "truncated": truncated,
        }  # fmt: skip
        return cache.Encodings(folder / "train.arrow"), digest.hexdigest(), counts, width

    def _recipe(
        self, dataset: Dataset, width: int, num_epochs: float, batch_size: int, learning_rate: float
    ) -> Recipe:
        """What was done, as a recipe; the data's part says where the rows came from, where that is known."""
        from tunesmith.compose import validated

        assert self._lora
        origin = self._origins.get(dataset._fingerprint) or {"dataset": UNNAMED}
        folder = self._folder()
        return validated(
            {
                "name": folder.name,
                "output_dir": str(folder.parent),
                "model": {"base": self.model_name},
                "data": {
                    **origin,
                    "max_length": width,
                    "validation": 0.0,
                    "held_out": 0.0,
                    "near_duplicates": "ignore",
                },
                "method": {"loss_on": "everything"},
                "adapter": self._lora.model_dump(),
                "training": {
                    "num_epochs": num_epochs,
                    "per_device_train_batch_size": batch_size,
                    "learning_rate": learning_rate,
                    "gradient_accumulation_steps": GRADIENT_ACCUMULATION,
                    "scheduler": "linear",
                    "warmup_steps": 0,
                    "weight_decay": 0.0,
                    "mixed_precision": "fp16" if self.device == "cuda" else "no",
                    "logging_steps": 10,
                    "save_steps": "epoch",
                    "load_best_model_at_end": False,
                },
                "evaluation": {"skip": True},
            }
        )


NOT_REPEATABLE = (
    "LLMFineTuner joined the rows' columns to texts of its own, and held no row back: `tunesmith train` on this "
    "recipe reads the same rows as its formats say."
)


def get_user_input(prompt: str, default: str | None = None) -> str:
    """What the user types after `prompt [default]: `, stripped; the default where that is nothing."""
    answer = input(f"{prompt} [{default}]: " if default is not None else f"{prompt}: ").strip()
    return answer or (default or "")


OTHER_FOLDER = "Give LLMFineTuner another output_dir, or delete the folder."


def _continued(run: Run, recipe: Recipe, identity: Mapping[str, Any]) -> Path | None:
    """The checkpoint from which a run of a former call goes on; None for its start. Raises RunError where it was begun
    with another recipe or other data."""
    from tunesmith.training import checkpoints, continuing

    checkpoint = checkpoints.choose(run)
    try:
        continuing.check_recipe(recipe, run, checkpoint)
        continuing.check_identity(run, checkpoint, identity)
    except RunError as error:
        raise RunError(error.problem, found=error.found, fix=OTHER_FOLDER) from None
    continuing.say_beginning(run, checkpoint)
    continuing.say_environment(run, checkpoint)
    return checkpoint


def _trained(model: Any) -> list[tuple[str, Any]]:
    """The parameters that are trained, by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _say(text: str) -> None:
    """Print for whoever sits at the notebook or the terminal; names of columns are strangers' text."""
    from tunesmith.terminal import inert

    print(inert(text))


def _spread(model: Any) -> Any:
    """The model laid out over all GPUs, as `device_map="auto"` does."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = model._no_split_modules
    memory = get_balanced_memory(model, no_split_module_classes=whole)
    return dispatch_model(
        model, infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)
    )


def _lay_open(run: Run) -> None:
    """Copy the final model's files to the run's top, where `PeftModel.from_pretrained` is pointed at."""
    from tunesmith.training.checkpoints import BEST

    for file in run.final_model.iterdir():
        if file.is_file() and file.name != BEST:
            shutil.copy2(file, run.path / file.name)


def _out_of_memory(error: BaseException, device: str, batch_size: int, longest: int) -> OutOfMemory:
    """What to lower, with the numbers of this training."""
    said = (error.found if isinstance(error, errors.OutOfMemory) else None) or str(error)
    first = next(iter(said.splitlines()), "")[:200]
    tokens = batch_size * longest
    remedies = []
    if batch_size > 1:
        remedies.append(
            f"train(..., batch_size={batch_size // 2}): {tokens // 2:,} tokens per pass instead of {tokens:,}"
        )
    remedies.append(f"prepare_dataset(..., max_length={max(longest // 2, 1)}), half of the longest row")
    return OutOfMemory(
        f"Training ran out of memory at batch_size={batch_size} on rows of up to {longest} tokens, "
        f"{tokens:,} tokens per pass: {first or 'out of memory'}",
        found=_held(device),
        fix=" or ".join(remedies) + ". Nothing was lost but this call.",
    )


def _held(device: str) -> str:
    """Memory that this process has held, and what is free on a GPU."""
    from tunesmith.training.fit import peak_memory

    held = f"{peak_memory() / 2**30:.1f} GiB held at most"
    if device == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        held += f", {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return held


def _column(name: str, rows: Sequence[Mapping[str, Any]], source: str) -> Any:
    """A column's values as Arrow keeps them. Raises DataError naming the column and the first odd row."""
    import pyarrow as arrow

    values = [row.get(name) for row in rows]
    try:
        return arrow.array(values)
    except (arrow.ArrowInvalid, arrow.ArrowTypeError) as error:
        kinds: dict[str, int] = {}
        for number, value in enumerate(values, 1):
            if value is not None:
                kinds.setdefault(type(value).__name__, number)
        if set(kinds) <= {"str", "int", "float", "bool"}:
            # Text with a number here and there is text; which one it was stays visible in it.
            return arrow.array([v if v is None else str(v) for v in values])
        raise DataError(
            f"The column '{name}' of {source} mixes kinds of values that no column can hold.",
            found=", ".join(f"{kind} (first in row {number})" for kind, number in kinds.items())
            or str(error).splitlines()[0],
            fix="Give every row the same kind of value.",
        ) from None


def _as_dataset(rows: Any, wanted_by: str) -> Dataset:
    """A data set of the datasets library; a list of dictionaries becomes one. Raises DataError for other things."""
    from datasets import Dataset

    if isinstance(rows, Dataset):
        # Another format has another fingerprint, by which the rows' origin is known.
        return rows.with_format(None) if rows.format["type"] else rows
    if isinstance(rows, list | tuple) and rows and all(isinstance(row, Mapping) for row in rows):
        names = dict.fromkeys(name for row in rows for name in row)
        return Dataset.from_dict({name: _column(name, rows, "the list") for name in names})
    fix = "Pass what load_dataset_from_source() gives, Dataset.from_list([...]), or the list itself."
    if isinstance(rows, Mapping) and rows and all(isinstance(split, Dataset) for split in rows.values()):
        fix = f"Choose one of its splits: {', '.join(f'[{name!r}]' for name in rows)}."
    found = f"a {type(rows).__name__}"
    if isinstance(rows, list | tuple):
        odd = next((n for n, row in enumerate(rows, 1) if not isinstance(row, Mapping)), 0)
        found = f"a {type(rows[odd - 1]).__name__} in place {odd}" if odd else "an empty list"
    raise DataError(f"{wanted_by} needs a Dataset or a list of dictionaries.", found=found, fix=fix)


def _unpadded(
    number: int, row: Mapping[str, Any], limit: int | None, vocabulary: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Token ids and labels of a tokenized row without its padding. Raises DataError for one no model can take."""
    import numpy as np

    from tunesmith.data.templates import IGNORED

    fix = "Pass what prepare_dataset() gives, or rows that this model's tokenizer made."
    columns = {name: _whole_numbers(number, name, values, fix) for name, values in row.items()}
    length = len(columns["input_ids"])
    for name, values in columns.items():
        if len(values) != length:
            raise DataError(
                f"Row {number} has {counted(length, 'token')} in input_ids and "
                f"{counted(len(values), 'value')} in {name}.",
                fix=fix,
            )
    kept = columns.get("attention_mask", np.ones(length)).astype(bool)
    ids, labels = columns["input_ids"][kept], columns.get("labels", columns["input_ids"])[kept]
    if limit and len(ids) > limit:
        raise DataError(
            f"Row {number} is longer than the model's context of {limit} tokens.",
            found=counted(len(ids), "token"),
            fix=f"Cut it, as prepare_dataset(..., max_length={limit}) does.",
        )
    for name, values in (("input_ids", ids), ("labels", labels[labels != IGNORED])):
        odd = values[(values < 0) | (values >= vocabulary)]
        if len(odd):
            raise DataError(
                f"Row {number} holds a token in {name} that the model does not have.",
                found=f"{odd[0]}; the model's tokens are 0 to {vocabulary - 1}",
                fix=fix,
            )
    return ids.astype(np.int32), labels.astype(np.int32)


def _whole_numbers(number: int, name: str, values: Any, fix: str) -> NDArray[Any]:
    """A column's value as an array. Raises DataError where it is no plain list of whole numbers."""
    import numpy as np

    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths within
        array = np.asarray(values, dtype=object)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        raise DataError(
            f"{name} of row {number} is not a list of whole numbers.", found=repr(values)[:60], fix=fix
        )
    return array.astype(np.int64)


def _check_count(name: str, value: Any) -> None:
    """Raises DataError for what is no number of things; an answer of `get_user_input` is a text."""
    if not isinstance(value, int) or value < 1:
        raise DataError(
            f"{name} has to be at least 1; found {value!r}.",
            fix=f"Convert it: {name}=int({value!r})." if isinstance(value, str) else None,
        )


def _columns_shown(dataset: Dataset) -> str:
    return ", ".join(f"{name} ({_kind(feature)})" for name, feature in dataset.features.items())


def _kind(feature: Any) -> str:
    return str(getattr(feature, "dtype", type(feature).__name__))


def _is_text(feature: Any) -> bool:
    return _kind(feature) in {"string", "large_string"}


def _is_number(feature: Any) -> bool:
    return _kind(feature).startswith(("int", "uint", "float", "bool"))


__all__ = ["LLMFineTuner", "OutOfMemory", "get_user_input"]
