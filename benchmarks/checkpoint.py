"""What the checkpoint protocol costs: seconds of a run with it, and of the same run with the Trainer's own saving.

The shipped tiny model learns the shipped text-to-SQL examples, in float32, with a checkpoint every 50 steps. Both
runs take the same steps on the same rows; which goes first changes from repeat to repeat. With the protocol each
checkpoint is hashed, flushed to the disk, sealed by a manifest and renamed, and its state is JSON and safetensors;
without it the plain Trainer writes as it does. The last line is one JSON object: seconds of saving of both, the
medians of the repeats, and `overhead`, what the protocol adds to the run that saves plainly. Exit code 1 where that is
more than 5 %.

    python benchmarks/checkpoint.py --steps 200 --every 50 --repeats 5
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from tunesmith import dataflow, models
from tunesmith.compose import compose
from tunesmith.data.templates import IGNORED
from tunesmith.recipe import Recipe
from tunesmith.training import continuing
from tunesmith.training.checkpoints import keeping_run_folder
from tunesmith.training.run import create

MOST = 5.0
"""Per cent that the protocol may add to a run that saves every 50 steps."""


def collator(pad: int) -> Any:
    """Rows padded to the longest of their batch."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        batch = {}
        for name, filler in (("input_ids", pad), ("labels", IGNORED)):
            batch[name] = torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])
        batch["attention_mask"] = torch.tensor(
            [[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows]
        )
        return batch

    return collate


def seconds(
    recipe: Recipe, rows: Any, folder: Path, *, ours: bool, steps: int, every: int
) -> tuple[float, float]:
    """Seconds of the whole run, and of them in saving."""
    torch.manual_seed(0)
    tokenizer, _ = dataflow._tokenizer(recipe)
    run = create(Recipe(output_dir=str(folder), name="run"))
    saving = 0.0
    trainer_class = keeping_run_folder(Trainer, run, keep=3, splits="rows") if ours else Trainer

    class Timed(trainer_class):  # type: ignore[misc,valid-type]
        def _save_checkpoint(self, *given: Any, **named: Any) -> None:
            nonlocal saving
            started = time.perf_counter()
            super()._save_checkpoint(*given, **named)
            saving += time.perf_counter() - started

    trainer = Timed(
        model=models.load_model(recipe.model.base, dtype="float32", device="cpu"),
        args=TrainingArguments(
            output_dir=str(run.staging), max_steps=steps, save_steps=every, save_total_limit=None if ours else 3,
            per_device_train_batch_size=8, report_to=[], disable_tqdm=True, logging_steps=10, use_cpu=True,
            remove_unused_columns=False, learning_rate=1e-3,
        ),
        train_dataset=rows,
        data_collator=collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )  # fmt: skip
    if ours:  # as in a run: each manifest says what the run rests on
        trainer.rests_on = continuing.rests_on(recipe, {"data set": "0" * 64, "base model": "0" * 64})
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started, saving


def main() -> int:
    """Run both in turns and print the medians; 1 where the protocol costs more than it may."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    recipe = compose({"data": {"dataset": "example:sql"}}, preset="demo").recipe
    encodings = dataflow.encodings(recipe, dataflow.splits(recipe))
    rows = encodings.train.dataset()
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for repeat in range(asked.repeats + 1):
        for ours in (True, False) if repeat % 2 else (False, True):
            place = Path(tempfile.mkdtemp(prefix="tunesmith-benchmark-"))
            taken = seconds(recipe, rows, place, ours=ours, steps=asked.steps, every=asked.every)
            shutil.rmtree(place)
            if repeat:  # the first pair warms up
                found[ours].append(taken)
    medians = {
        ours: [statistics.median(v) for v in zip(*times, strict=True)] for ours, times in found.items()
    }
    with_us, without = medians[True], medians[False]
    # Of what each run took besides saving, as the steps themselves are the same and only their noise differs.
    stepping = statistics.median(total - saving for times in found.values() for total, saving in times)
    overhead = 100 * (with_us[1] - without[1]) / (stepping + without[1])
    missed = overhead > MOST
    for line in (
        f"per cent that the protocol adds: {overhead:.2f}, at most {MOST:g} wanted{': MISSED' if missed else ''}",
        f"per cent that all of saving adds: {100 * with_us[1] / stepping:.2f}, no bar",
        f"seconds of a run's steps: {stepping:.2f}, no bar",
    ):
        print(line, file=sys.stderr)
    result = {
        "name": "checkpoint", "ours": round(with_us[1], 3), "peer": round(without[1], 3),
        "ratio": round(without[1] / with_us[1], 2), "unit": "s of saving", "n": asked.repeats,
        "overhead": round(overhead / 100, 4),
    }  # fmt: skip
    print(json.dumps(result))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
