"""What the benchmarks of training share: rows, models, contestants in processes of their own, and the comparison.

Every contestant is a fresh process; they take turns. All learn from the same token ids and labels, which tunesmith has
prepared, in float32, with AdamW, at a learning rate so small that every step meets the model it started from: so the
mean loss over all labels (of preferences, the mean log-likelihood of the answers) is one number, on which the
contestants have to agree before a ratio is printed, whatever their batches are. Tokens are counted without padding, and
a prompt in each of its rows; the first step and the last one are left out. Peak memory is the process's own, read
before anything is saved. TRL at its defaults computes in bfloat16, so that its loss is held to `LOOSE`. LLaMA-Factory
runs in the Python of its own environment on the same token ids; where it fails or its loss is another, that is said
and its speed left out.
"""

from __future__ import annotations

import argparse
import atexit
import json
import math
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import chat_rows

AROUND = dict(os.environ)
"""The environment before tunesmith is imported, which asks for huge pages: a peer is run as its users run it."""
SHAPES = {
    "256x4": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4},
    "512x8": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    },
}
T5_SHAPES = {
    "128x2": {
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 512,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
    },
    "256x4": {
        "d_model": 256,
        "d_kv": 64,
        "d_ff": 1024,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_heads": 4,
    },
}
"""Encoder-decoders: width, and layers of each half."""
MAX_LENGTH = 1024
"""Tokens of a row at most, where a task has no `length` of its own."""
POSITIONS = 8192
"""What the model could read at most."""
LOOSE = {"trl defaults": 2e-3}
"""How far the losses of those that do not compute in float32 may be from ours, of its size."""
RATE = 1e-9
"""Learning rate: the work of a step without its effect."""
LABELLED = 0.4
"""Share of tokens in answers."""


TEMPLATE = 19
"""Tokens of a row that are neither text nor labelled: 17 of ChatML, and a row's number."""


def words_of(seed: int) -> Any:
    """A function from a number of tokens to so much text: a word is a token, as the tokenizer is made of such text."""
    rng = random.Random(seed)
    vocabulary = sorted({"".join(rng.choices(chat_rows.SYLLABLES, k=rng.randint(1, 4))) for _ in range(6000)})
    weights = [1 / (rank + 1) for rank in range(len(vocabulary))]

    def text(tokens: float) -> str:
        return " ".join(rng.choices(vocabulary, weights, k=max(round(tokens), 1)))

    return text


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            file.write(json.dumps({**row, "prompt": f"{number} {row['prompt']}"}) + "\n")


def _chat(text: Any, tokens: float) -> dict[str, str]:
    """A question with its answer of so many tokens, template included."""
    asked, answered = tokens * (1 - LABELLED) - TEMPLATE, tokens * LABELLED - 1  # and the token that ends it
    return {"prompt": text(asked), "response": text(answered)}


def write_chats(path: Path, count: int) -> None:
    """Questions with answers, their lengths log-normal around 140 tokens, up to the limit."""
    rng, text = random.Random(0), words_of(0)
    lengths = (min(max(rng.lognormvariate(math.log(140), 0.8), 40), MAX_LENGTH - 8) for _ in range(count))
    _write(path, (_chat(text, tokens) for tokens in lengths))


def write_long_chats(path: Path, count: int) -> None:
    """Long texts with answers, 2,048 to 4,096 tokens, as many below their geometric mean as above."""
    rng, text = random.Random(0), words_of(0)
    _write(path, (_chat(text, 2048 * 2 ** rng.uniform(0.05, 0.95)) for _ in range(count)))


def write_pairs(path: Path, count: int) -> None:
    """Preferences whose prompts, template included, are three times as long as their answers."""
    rng, text = random.Random(0), words_of(0)

    def pair(tokens: float) -> dict[str, str]:
        asked = text(3 * tokens - TEMPLATE)
        return {"prompt": asked, "chosen": text(tokens - 1), "rejected": text(tokens * rng.uniform(0.8, 1.2))}

    _write(path, (pair(min(max(rng.lognormvariate(math.log(60), 0.5), 16), 240)) for _ in range(count)))


def write_summaries(path: Path, count: int) -> None:
    """Texts of 20 to 480 tokens, log-normal around 180, with answers a quarter as long."""
    rng, text = random.Random(0), words_of(0)
    lengths = (min(max(rng.lognormvariate(math.log(180), 0.6), 20), 480) for _ in range(count))
    _write(path, ({"prompt": text(tokens), "response": text(tokens / 4)} for tokens in lengths))


def write_model(folder: Path, shape: str, vocabulary: int) -> None:
    """A Llama with random weights, its head tied, and the tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    chat_rows.write_tokenizer(folder, chat_rows.CHATML)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=0,
        **SHAPES[shape],
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_t5(folder: Path, shape: str, vocabulary: int) -> None:
    """A T5 with random weights and without dropout, its head tied and scaled; the tokenizer has no chat template."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    chat_rows.write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=vocabulary,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        **T5_SHAPES[shape],
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)


def settings(work: Path, task: dict[str, Any]) -> dict[str, Any]:
    """The recipe of our run."""
    return {
        "output_dir": str(Path(tempfile.mkdtemp(dir=work))),
        "model": {"base": str(work / "model")},
        "data": {
            "dataset": str(work / "rows.jsonl"), "max_length": task.get("length", MAX_LENGTH),
            "near_duplicates": "ignore", **task.get("data", {}),
        },
        "method": {"kind": task["method"], **task.get("section", {})},
        "adapter": task["adapter"],
        "training": {
            "max_steps": task["steps"], "per_device_train_batch_size": task["batch"], "warmup_steps": 0,
            "gradient_accumulation_steps": 1,
            "learning_rate": RATE, "scheduler": "constant", "eval_steps": 10**6, "save_steps": 10**6,
            "logging_steps": 10**6, "early_stopping_patience": None, **task.get("training", {}),
        },
        "evaluation": {"skip": True, "samples": 0},
    }  # fmt: skip


def write_tokens(work: Path, method: str, task: dict[str, Any] | None = None) -> int:
    """Token ids and labels of our training split, for all others; how many rows they are."""
    from tunesmith import dataflow
    from tunesmith.compose import compose

    kept = {key: value for key, value in (task or {}).items() if key in ("section", "length", "data")}
    task = {"method": method, "adapter": {"kind": "full"}, "steps": 1, "batch": 1, **kept}
    recipe = compose(settings(work, task)).recipe
    made = dataflow.encodings(recipe, dataflow.splits(recipe)).train.dataset()
    with (work / "tokens.jsonl").open("w", encoding="utf-8") as file:
        for n in range(len(made)):
            row = made[n]
            file.write(json.dumps({"input_ids": row["input_ids"], "labels": row["labels"]}) + "\n")
    return len(made) // (2 if method == "dpo" else 1)


def peak_memory() -> float:
    """MB that were held at most: of the GPU's where there is one, else of the process's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Clock:
    """Looks on at a trainer's steps: when each begins, what it is given and what loss it has."""

    def __init__(self) -> None:
        from transformers import Trainer

        self.begun: list[float] = []
        self.tokens: list[int] = []
        self.labels: list[int] = []
        self.losses: list[float] = []
        self.peak = 0.0
        inner, clock = Trainer.training_step, self

        def step(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if not trainer.is_in_train or getattr(trainer, "is_rehearsing", False):  # a check before training
                return inner(trainer, model, inputs, *args, **kwargs)
            clock.begun.append(time.perf_counter())
            mask, labels = inputs.get("attention_mask"), inputs.get("labels")
            in_pairs = "decoder_input_ids" in inputs
            counted = labels if labels is None or in_pairs else labels[..., 1:]
            clock.labels.append(len(inputs["input_ids"]) if counted is None else int((counted != -100).sum()))
            if (
                mask is not None and mask.dim() == 4
            ):  # zero where a row of a pack may look; each looks at itself
                mask = mask.diagonal(dim1=-2, dim2=-1) == 0
            tokens = int(mask.sum() if mask is not None else inputs["input_ids"].numel())
            clock.tokens.append(tokens + (clock.labels[-1] if in_pairs else 0))
            loss = inner(trainer, model, inputs, *args, **kwargs)
            clock.peak = peak_memory()
            # A preference loss says nothing where model and reference are the same: their likelihoods do.
            told = getattr(trainer, "_metrics", {}).get("train", {})
            pair = [told[name][-1] for name in ("logps/chosen", "logps/rejected") if told.get(name)]
            clock.losses.append(-sum(pair) if pair else float(loss))
            return loss

        Trainer.training_step = step  # type: ignore[method-assign]

    def facts(self) -> dict[str, float]:
        """Tokens a second between the beginning of the second and of the last step, mean loss, peak in MB."""
        weighed = sum(loss * count for loss, count in zip(self.losses, self.labels, strict=True))
        return {
            "tokens_per_second": sum(self.tokens[1:-1]) / (self.begun[-1] - self.begun[1]),
            "loss": weighed / sum(self.labels),
            "peak": self.peak,
            "steps": len(self.losses),
            "labelled": sum(self.labels) / sum(self.tokens),
        }


def contestant(name: str, work: Path, task: dict[str, Any]) -> dict[str, float]:
    """Train in this process, and tell how it went."""
    if name.startswith("ours"):
        import tunesmith  # noqa: F401  # before torch's first tensor, as the command does

    import torch

    started = time.perf_counter()
    torch.manual_seed(0)
    if name == "ours without sharing":
        from tunesmith.forward import tree

        tree.LEAST = 10**9
    if name.startswith("ours"):
        from tunesmith import api, libraries
        from tunesmith.compose import compose
        from tunesmith.training.fit import quiet_libraries

        # As the command does. The clock would load them as any script does, with packages that no training needs.
        quiet_libraries()
        libraries.own_process()
        libraries.load_libraries()
        task = {**task, **task.get("alone", {}).get(name, {})}
        clock = Clock()
        result = api.train(compose(settings(work, task)).recipe)
        chosen = [e for e in _events(result.run) if e["kind"] == "decision" and e["name"] == "forward"]
        assert chosen[0]["value"] == task.get("training", {}).get("forward", "fast"), chosen
        plan = json.loads((Path(result.run) / "plan.json").read_text(encoding="utf-8"))
        planned = {key: value for key, value in plan.get("truth", {}).items() if key.endswith("_error")}
        counted = plan["estimate"]["flops_per_step"] * task["steps"] / sum(clock.tokens)
        planned["flops_per_token"] = counted
    else:
        clock, planned = Clock(), {}
        peer = _pairs_peer if task["method"] == "seq2seq" else _peer
        peer = _factory if name.startswith(FACTORY) else peer
        peer(name, work, {**task, **task.get("alone", {}).get(name, {})})
    return {
        **clock.facts(),
        "until_first_step": clock.begun[0] - started,
        **matrix_peaks(),  # here and now, as others may use the machine
        **planned,
    }


def _events(run: Any) -> list[dict[str, Any]]:
    lines = (Path(run) / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _common(work: Path, task: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(dir=work), "report_to": "none", "use_cpu": True, "bf16": False,
        "per_device_train_batch_size": task["batch"], "max_steps": task["steps"], "learning_rate": RATE,
        "lr_scheduler_type": "constant", "save_strategy": "no", "logging_steps": 10**6, "disable_tqdm": True,
        "gradient_checkpointing": False, "weight_decay": 0.01, "max_grad_norm": 1.0, "seed": 42,
    }  # fmt: skip


def _rows(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "tokens.jsonl").open(encoding="utf-8")]


def _pairs_peer(name: str, work: Path, task: dict[str, Any]) -> None:
    """transformers' Seq2SeqTrainer, every row padded to the longest of all or to its batch's, grouped by length."""
    from datasets import Dataset
    from transformers import (
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    model = AutoModelForSeq2SeqLM.from_pretrained(work / "model", dtype="float32")
    pairs = []
    for row in _rows(work):
        start = next(n for n, label in enumerate(row["labels"]) if label != -100)
        pairs.append({"input_ids": row["input_ids"][:start], "labels": row["labels"][start:]})
    common = _common(work, task)
    if name == "padded":
        longest = {key: max(len(pair[key]) for pair in pairs) for key in ("input_ids", "labels")}
        for pair in pairs:
            size = len(pair["input_ids"])
            rest = longest["input_ids"] - size
            pair["attention_mask"] = [1] * size + [0] * rest
            pair["input_ids"] += [tokenizer.pad_token_id] * rest
            pair["labels"] += [-100] * (longest["labels"] - len(pair["labels"]))
    else:
        common["train_sampling_strategy"] = "group_by_length"
        for pair in pairs:
            pair["attention_mask"] = [1] * len(pair["input_ids"])
    Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(**common),
        train_dataset=Dataset.from_list(pairs),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=-100),
    ).train()


FACTORY = "llamafactory"


def _factory(name: str, work: Path, task: dict[str, Any]) -> None:
    """LLaMA-Factory's `train` in its own environment, with our token ids as what it has encoded already."""
    from datasets import Dataset, DatasetDict
    from llamafactory.data.processor import (  # type: ignore[import-not-found, unused-ignore]
        PackedSupervisedDatasetProcessor,
    )
    from llamafactory.hparams import DataArguments  # type: ignore[import-not-found, unused-ignore]
    from llamafactory.train.tuner import run_exp  # type: ignore[import-not-found, unused-ignore]
    from transformers import AutoTokenizer

    rows = _rows(work)
    common, length = _common(work, task), task.get("length", MAX_LENGTH)
    packs = "packing" in name
    if packs:

        class Settled(PackedSupervisedDatasetProcessor):  # type: ignore[misc, unused-ignore]
            """Packs token ids as they are."""

            def _encode_data_example(self, *, response: list[int], **_: Any) -> tuple[list[int], list[int]]:
                return rows[response[0]]["input_ids"], rows[response[0]]["labels"]

        told = DataArguments(template="qwen", cutoff_len=length, neat_packing=True)
        tokenizer = AutoTokenizer.from_pretrained(work / "model")
        numbers = [[n] for n in range(len(rows))]
        asked: dict[str, list[Any]] = {"_prompt": numbers, "_response": numbers}
        asked |= {
            f"_{kind}": [None] * len(rows) for kind in ("system", "tools", "images", "videos", "audios")
        }
        made = Settled(template=None, tokenizer=tokenizer, processor=None, data_args=told).preprocess_dataset(
            asked
        )
        dataset = Dataset.from_dict(dict(made))
        common |= _packed(rows, task)
    else:
        dataset = Dataset.from_list([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows])
    folder = Path(tempfile.mkdtemp(dir=work)) / "tokens"
    DatasetDict({"train": dataset}).save_to_disk(str(folder))
    adapter = task["adapter"]
    tuned: dict[str, Any] = {"finetuning_type": "full"}
    if adapter["kind"] == "lora":
        tuned = {
            "finetuning_type": "lora", "lora_target": "all", "lora_rank": adapter["rank"],
            "lora_alpha": adapter["alpha"], "lora_dropout": 0.0,
        }  # fmt: skip
    del common["gradient_checkpointing"]
    run_exp(
        {
            **common, **tuned, "stage": "sft", "do_train": True, "template": "qwen", "cutoff_len": length,
            "model_name_or_path": str(work / "model"), "dataset": "rows", "tokenized_path": str(folder),
            "neat_packing": packs, "disable_gradient_checkpointing": True, "plot_loss": False,
        }
    )  # fmt: skip


def _packed(rows: list[dict[str, Any]], task: dict[str, Any]) -> dict[str, Any]:
    """Settings with which steps of packed rows have about as many tokens as others have."""
    mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
    size = max(round(task["batch"] * mean / task.get("length", MAX_LENGTH)), 1)
    return {"per_device_train_batch_size": size, "max_steps": -1, "num_train_epochs": 1}


def _peer(name: str, work: Path, task: dict[str, Any]) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    load = {"dtype": "float32", **task.get("load", {})}
    if load.pop("four_bits", False):
        import torch
        from transformers import BitsAndBytesConfig

        load["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(work / "model", **load)
    rows = _rows(work)
    if task["adapter"]["kind"] in ("lora", "qlora"):
        from peft import LoraConfig, get_peft_model

        adapter = task["adapter"]
        lora = LoraConfig(
            r=adapter["rank"], lora_alpha=adapter["alpha"], lora_dropout=0.0, target_modules="all-linear"
        )
        model = get_peft_model(model, lora)
    common = {**_common(work, task), **task.get("arguments", {})}
    trainer: Any
    if name == "trl dpo":
        pairs = []
        for better, worse in zip(rows[::2], rows[1::2], strict=True):
            start = next(n for n, label in enumerate(better["labels"]) if label != -100)
            pairs.append(
                {
                    "prompt_ids": better["input_ids"][:start],
                    "chosen_ids": better["input_ids"][start : _end(better["labels"])],
                    "rejected_ids": worse["input_ids"][start : _end(worse["labels"])],
                }
            )

        class Settled(DPOTrainer):  # type: ignore[misc]
            """Takes token ids as they are."""

            def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
                return dataset

        trainer = Settled(
            model=model, args=DPOConfig(**common, max_length=None), train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
        )  # fmt: skip
    elif name.startswith("trl"):
        packed: dict[str, Any] = {"max_length": None}
        if "packing" in name:
            packed = {"packing": True, "max_length": task.get("length", MAX_LENGTH)}
            common |= _packed(rows, task)
        trainer = SFTTrainer(
            model=model, args=SFTConfig(**common, **packed), train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )  # fmt: skip
    else:
        from transformers import DataCollatorForSeq2Seq

        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        if name == "trainer padded":  # as is usual: every row to the limit
            collator.padding, collator.max_length = "max_length", task.get("length", MAX_LENGTH)
        else:
            common["train_sampling_strategy"] = "group_by_length"
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**common),
            train_dataset=Dataset.from_list(rows),
            data_collator=collator,
        )
    trainer.train()


def _end(labels: list[int]) -> int:
    return len(labels) - next(n for n, label in enumerate(reversed(labels)) if label != -100)


def matrix_peaks() -> dict[str, float]:
    """GFLOP/s of this machine's matrix product in float32: as torch takes it by itself, and the most that either of its
    two libraries gives."""
    import torch

    a = torch.randn(2048, 2048)
    out = torch.empty_like(a)
    onednn: Any = torch.backends.mkldnn
    ways: list[Any] = [lambda: torch.mm(a, a, out=out)]
    if onednn.is_available():
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, a, None, "none", [], ""))
    found = []
    for product in ways:
        times = []
        for _ in range(8):
            started = time.perf_counter()
            product()
            times.append(time.perf_counter() - started)
        found.append(2 * 2048**3 / min(times) / 1e9)
    return {"matrix_gflops": max(found), "plain_gflops": found[0]}


def compare(
    title: str,
    names: list[str],
    task: dict[str, Any],
    *,
    shape: str,
    vocabulary: int,
    rows: int,
    rounds: int,
    agree: float = 1e-5,
    factory: str | None = None,
    write: Any = write_chats,
    model: Any = write_model,
) -> dict[str, dict[str, float]]:
    """Have the contestants take turns, the first of them ours, and print their ratios; medians by name.

    Leaves with an error where their losses differ by more than `agree` of their size. `factory` is the Python of an
    environment with LLaMA-Factory, which then takes part.
    """
    from tunesmith.__main__ import MALLOC

    names = [*names, FACTORY, f"{FACTORY} packing"] if factory else list(names)
    work = Path(tempfile.mkdtemp(prefix="training-"))
    atexit.register(shutil.rmtree, work, ignore_errors=True)
    model(work / "model", shape, vocabulary)
    write(work / "rows.jsonl", rows)
    trained = write_tokens(work, task["method"], task)
    task = {"steps": task.get("epochs", 1) * math.ceil(trained / task["batch"]), **task}
    if task["steps"] < 3:
        raise SystemExit(
            f"{rows} rows make {task['steps']} steps, and the first and the last are not measured: give more --rows"
        )
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in list(names):
            python = factory if factory and name.startswith(FACTORY) else sys.executable
            command = [python, __file__, name, str(work), json.dumps(task)]
            plain = {**AROUND, "DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}
            if name.startswith("ours"):
                plain["GLIBC_TUNABLES"] = MALLOC  # as the command starts itself
            made = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
            if made.returncode and name.startswith(FACTORY):
                print(f"{name} failed and is left out: {made.stderr[-2000:]}", file=sys.stderr)
                names.remove(name)
                found.pop(name)
                continue
            if made.returncode:
                raise SystemExit(f"{name}: {made.stderr[-3000:]}")
            facts = json.loads(made.stdout.splitlines()[-1])
            found[name].append(facts)
            told = ", ".join(f"{key} {value:.6g}" for key, value in facts.items())
            print(f"{title}, turn {turn + 1}, {name}: {told}", file=sys.stderr)
    medians = {
        name: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        for name, turns in found.items()
    }
    ours = medians[names[0]]["loss"]
    furthest = {
        name: max((turn["loss"] for turn in turns), key=lambda loss: abs(loss - ours))
        for name, turns in found.items()
    }
    apart = {
        name: loss for name, loss in furthest.items() if abs(loss - ours) > LOOSE.get(name, agree) * abs(ours)
    }
    for name in [name for name in apart if name.startswith(FACTORY)]:
        print(f"{name} is left out: its loss is {apart.pop(name):.7g}, ours {ours:.7g}", file=sys.stderr)
        del found[name], medians[name]
    if apart:
        raise SystemExit(f"the losses differ: ours {ours}, {apart}")
    for name, turns in found.items():
        speeds = [turn["tokens_per_second"] for turn in turns]
        medians[name] |= {"slowest": min(speeds), "fastest": max(speeds)}
        print(
            f"{title}, {name}: {medians[name]['tokens_per_second']:.0f} tokens/s ({min(speeds):.0f} to "
            f"{max(speeds):.0f}), {medians[name]['peak']:.0f} MB; ours is "
            f"{medians[names[0]]['tokens_per_second'] / medians[name]['tokens_per_second']:.2f} times as fast",
            file=sys.stderr,
        )
    return medians


def of_matrix_peak(
    facts: dict[str, float], *, shape: str, vocabulary: int, lora: bool, peak: str = "matrix_gflops"
) -> float:
    """Share of the matrix product's speed that a training reaches, from the products that it does.

    Six operations for each weight and token of the layers, and for each weight and label of the head; four where the
    weights are frozen under an adapter. Of the last layer only keys and values are made of tokens without a label.
    Attention, norms and the optimizer count as nothing; that rows share no beginning is the data's.
    """
    size = SHAPES[shape]
    width, labelled = size["hidden_size"], facts["labelled"]
    by_token, by_label = 2 * width**2, 2 * width**2 + 3 * width * size["intermediate_size"]
    layers = (by_token + by_label) * (size["num_hidden_layers"] - 1) + by_token + by_label * labelled
    per_token = (4 if lora else 6) * (layers + width * vocabulary * labelled)
    return per_token * facts["tokens_per_second"] / 1e9 / facts[peak]


Bar = tuple[str, float, float]
"""What is held against a bar, its value, and the bar: at least so much, or, where it is negative, at most; 0: none."""


def times(medians: dict[str, dict[str, float]], wanted: dict[str, float]) -> list[Bar]:
    """How many times as fast as each other one the first one is, with the least that is wanted."""
    ours, *others = medians
    speed = medians[ours]["tokens_per_second"]
    return [
        (f"times {name}", speed / medians[name]["tokens_per_second"], wanted.get(name, 0.0))
        for name in others
    ]


def result(
    title: str,
    medians: dict[str, dict[str, float]],
    peer: str,
    rounds: int,
    *,
    bars: Sequence[Bar] = (),
    quick: bool = False,
) -> None:
    """What was held against bars, and as the last line one JSON object. Leaves with 1 where a bar is missed, unless the
    turn was a quick one, which says nothing of speed."""
    first = next(iter(medians.values()))
    ours, theirs = first["tokens_per_second"], medians[peer]["tokens_per_second"]
    share = ours * first["flops_per_token"] / 1e9 / first["matrix_gflops"]
    bars = [*bars, ("share of the matrix peak by the plan's FLOPs", share, 0.0)]
    print(
        json.dumps(
            {
                "name": title,
                "ours": round(ours, 1),
                "peer": round(theirs, 1),
                "ratio": round(ours / theirs, 2),
                "unit": "tokens/s",
                "n": rounds,
            }
        )
    )
    for name, facts in medians.items():
        print(f"range of {name}: {facts['slowest']:,.0f} to {facts['fastest']:,.0f}, no bar", file=sys.stderr)
    missed = []
    for name, value, bar in bars:
        if not bar:
            print(f"{name}: {value:.2f}, no bar", file=sys.stderr)
            continue
        good = value >= bar if bar >= 0 else value <= -bar
        word = "at least" if bar >= 0 else "at most"
        print(f"{name}: {value:.2f}, {word} {abs(bar):g} wanted{'' if good else ': MISSED'}", file=sys.stderr)
        missed += [] if good else [name]
    if missed and not quick:
        sys.exit(1)


def parser(
    description: str | None, rows: int, shapes: Any = SHAPES, *, shape: str = "256x4", rounds: int = 5
) -> argparse.ArgumentParser:
    """Options that these benchmarks share."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--rows", type=int, default=rows)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--shape", choices=shapes, default=shape)
    made.add_argument("--lora", action="store_true")
    made.add_argument(
        "--quick", action="store_true", help="one short turn: that it works, not how fast it is"
    )
    return made


def adapter(lora: bool) -> dict[str, Any]:
    """The adapter of a recipe."""
    if lora:
        return {"kind": "lora", "rank": 8, "alpha": 16, "dropout": 0.0, "targets": "all-linear"}
    return {"kind": "full"}


if __name__ == "__main__":
    asked = argparse.ArgumentParser(
        description="One contestant, as `compare` starts it in a process of its own."
    )
    asked.add_argument("name")
    asked.add_argument("work", type=Path, help="the folder with its model and rows")
    asked.add_argument("task", type=json.loads, help="JSON")
    print(json.dumps(contestant(**vars(asked.parse_args()))))
