"""Rows a second from a JSONL file of chats to token ids with labels: tunesmith beside TRL (and LLaMA-Factory).

Ours: reading, near-duplicates, split, rendering, tokenizing, masking, the supervision proof, the ledger and the
cache's files. TRL: `load_dataset` and what `SFTTrainer` prepares with `assistant_only_loss=True`; once with its
defaults, which the ratio is of, and once with `dataset_num_proc=2`. Every contestant is a process of its own,
one after the other, with empty caches; ours runs a second time on its cache. LLaMA-Factory runs where
`--llamafactory` names the Python of an environment that has it.

    python benchmarks/data_prep.py --rows 200000
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
MAX_LENGTH = 1024


def ours(file: str, tokenizer_folder: str) -> dict[str, float]:
    """Prepare with tunesmith; seconds and rows."""
    from transformers import AutoTokenizer

    from tunesmith.data import encoded, prepare
    from tunesmith.recipe import Data

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    data = Data(dataset=file, max_length=MAX_LENGTH)
    started = time.perf_counter()
    splits = prepare(data)
    made = encoded(splits, tokenizer, data=data, loss_on="answers")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "rows": made.ledger.counts()["rows_in"]}


def trl(file: str, tokenizer_folder: str, processes: int | None = None) -> dict[str, float]:
    """Prepare with TRL; seconds and rows."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    model = LlamaForCausalLM(config)
    arguments = SFTConfig(
        tempfile.mkdtemp(),
        report_to="none",
        assistant_only_loss=True,
        use_cpu=True,
        bf16=False,
        max_length=MAX_LENGTH,
        dataset_num_proc=processes,
    )
    started = time.perf_counter()
    dataset = load_dataset("json", data_files=file, split="train")
    loaded = time.perf_counter()
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    seconds = time.perf_counter() - started
    assert {"input_ids", "labels"} <= set(trainer.train_dataset.column_names)
    return {"seconds": seconds, "rows": len(trainer.train_dataset), "loading": loaded - started}


def llamafactory(file: str, tokenizer_folder: str) -> dict[str, float]:
    """Prepare with LLaMA-Factory, whose own template `qwen` is the one of the tokenizer; seconds and rows."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments, ModelArguments
    from transformers import AutoTokenizer, Seq2SeqTrainingArguments

    folder = Path(tempfile.mkdtemp())
    columns = {"messages": "messages"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    (folder / "dataset_info.json").write_text(
        json.dumps({"chats": {"file_name": file, "formatting": "sharegpt", "columns": columns, "tags": tags}})
    )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    arguments = DataArguments(
        template="qwen", dataset="chats", dataset_dir=str(folder), cutoff_len=MAX_LENGTH, overwrite_cache=True
    )
    template = get_template_and_fix_tokenizer(tokenizer, arguments)
    training = Seq2SeqTrainingArguments(output_dir=str(folder), use_cpu=True)
    started = time.perf_counter()
    made = get_dataset(
        template,
        ModelArguments(model_name_or_path=tokenizer_folder),
        arguments,
        training,
        stage="sft",
        tokenizer=tokenizer,
    )
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "rows": len(made["train_dataset"])}


CONTESTANTS = {
    "ours": ours,
    "trl": trl,
    "trl_2_processes": lambda file, folder: trl(file, folder, processes=2),
    "llamafactory": llamafactory,
}


def run(
    name: str, file: Path, tokenizer: Path, caches: Path, python: str = sys.executable
) -> dict[str, float]:
    """One contestant in a process of its own."""
    environment = {
        **os.environ,
        "TUNESMITH_CACHE": str(caches / "ours"),
        "HF_DATASETS_CACHE": str(caches / f"datasets-{name}"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [python, __file__, "--contestant", name, "--file", str(file), "--tokenizer", str(tokenizer)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    print(
        f"{name}: {found['rows'] / found['seconds']:,.0f} rows/s ({found['seconds']:.1f} s)", file=sys.stderr
    )
    return found


def main() -> None:
    """Compare, or be one contestant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument(
        "--llamafactory",
        default=os.environ.get("LLAMAFACTORY_PYTHON"),
        help="Python of an environment with LLaMA-Factory; by default LLAMAFACTORY_PYTHON",
    )
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(CONTESTANTS[options.contestant](options.file, options.tokenizer)))
        return
    from chat_rows import write_rows, write_tokenizer

    with tempfile.TemporaryDirectory(prefix="data-prep-") as folder:
        file, tokenizer = Path(folder) / "chats.jsonl", write_tokenizer(Path(folder) / "tokenizer")
        write_rows(file, count=options.rows)
        mine = run("ours", file, tokenizer, Path(folder))
        cached = run("ours", file, tokenizer, Path(folder))
        theirs = run("trl", file, tokenizer, Path(folder))
        parallel = run("trl_2_processes", file, tokenizer, Path(folder))
        others = {"trl_2_processes": parallel["rows"] / parallel["seconds"]}
        if options.llamafactory:
            other = run("llamafactory", file, tokenizer, Path(folder), options.llamafactory)
            others["llamafactory"] = other["rows"] / other["seconds"]
    speeds = [found["rows"] / found["seconds"] for found in (mine, theirs)]
    for name, speed in others.items():
        print(f"{name}: {speed:,.0f} rows/s", file=sys.stderr)
    if not options.llamafactory:
        print("LLaMA-Factory is left out: give --llamafactory.", file=sys.stderr)
    print(f"second run, from the cache: {cached['seconds']:.2f} s", file=sys.stderr)
    print(
        json.dumps(
            {
                "name": "data_prep",
                "ours": round(speeds[0]),
                "peer": round(speeds[1]),
                "ratio": round(speeds[0] / speeds[1], 2),
                "unit": "rows/s",
                "n": options.rows,
            }
        )
    )


if __name__ == "__main__":
    main()
