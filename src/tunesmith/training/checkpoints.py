"""Checkpoints: written aside, completed by a manifest, renamed into place, verified before they are read.

A folder counts as a checkpoint only with `manifest.json`, which is written last and lists every file with
size and sha256. A kill at any moment leaves the former checkpoints whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import RunError
from tunesmith.training.run import Run, write_whole

MANIFEST = "manifest.json"
NAME = re.compile(r"checkpoint-step-(\d+)$")


def folder_of(run: Run, step: int) -> Path:
    """Where the checkpoint of an optimizer step lies."""
    return run.checkpoints / f"checkpoint-step-{step}"


def step_of(folder: Path) -> int:
    """The optimizer step of a checkpoint's folder."""
    match = NAME.search(folder.name)
    assert match, folder
    return int(match[1])


def commit(staging: Path, final: Path, facts: Mapping[str, Any]) -> None:
    """Turn a finished staging folder into a checkpoint: hash, flush, manifest, rename."""
    files = {}
    for path in sorted(p for p in staging.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.relative_to(staging).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    write_whole(staging / MANIFEST, json.dumps({**facts, "files": files}, indent=1))
    if final.exists():
        shutil.rmtree(final)
    staging.rename(final)
    _flush_folder(final.parent)


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no way to flush a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest. Raises RunError where the checkpoint was never completed."""
    try:
        content: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(
            f"{folder} is not a whole checkpoint.", found=f"no readable manifest ({error})"
        ) from None
    return content


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None where every file is as it was written."""
    try:
        files = manifest(folder)["files"]
    except RunError as error:
        return str(error.found)
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {facts['bytes']}"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                return f"{name} does not have the content that was written"
    return None


def found(run: Run) -> list[Path]:
    """The run's checkpoint folders, newest step first, whole or not."""
    folders = (
        [p for p in run.checkpoints.iterdir() if NAME.search(p.name)] if run.checkpoints.is_dir() else []
    )
    return sorted(folders, key=step_of, reverse=True)


def choose(run: Run, name: str = "latest") -> Path | None:
    """The checkpoint to continue from: a named one, or the newest that is whole; None where there is none.

    Skipped ones are reported as warnings. A named checkpoint that is missing or damaged is a RunError.
    """
    folders = found(run)
    if name != "latest":
        wanted = run.checkpoints / Path(name).name
        if wanted not in folders:
            raise RunError(
                f"The run {run.path} has no checkpoint '{name}'.",
                found=", ".join(p.name for p in folders) or "no checkpoint",
                fix="Name one of these, or use `latest`.",
            )
        if wrong := problem(wanted):
            raise RunError(
                f"The checkpoint {wanted} is damaged.", found=wrong, fix="Use another, or `latest`."
            )
        return wanted
    for folder in folders:
        wrong = problem(folder)
        if wrong is None:
            return folder
        run.event("warning", message=f"{folder.name} is damaged and was skipped: {wrong}")
    return None


def rotate(run: Run, *, keep: int) -> None:
    """Delete checkpoints beyond `keep`: the newest stays, then those with the lowest validation loss."""
    older = found(run)[1:]
    ranked = sorted(older, key=lambda folder: (_loss(folder), -step_of(folder)))
    for folder in ranked[max(keep - 1, 0) :]:
        # Renamed first, so that a kill while deleting leaves no half checkpoint under a checkpoint's name.
        doomed = folder.with_name("." + folder.name + ".deleted")
        folder.rename(doomed)
        shutil.rmtree(doomed)
    for leftover in run.checkpoints.glob(".*.deleted"):
        shutil.rmtree(leftover)


def _loss(folder: Path) -> float:
    try:
        loss = manifest(folder).get("validation_loss")
    except RunError:
        return float("inf")
    return float("inf") if loss is None else float(loss)


def keeping_run_folder(trainer_class: type, run: Run, *, keep: int) -> type:
    """The trainer class with its checkpoints written by the rules of this module.

    The rest of the trainer is untouched: it fills a staging folder as it always does.
    """

    class RunFolderTrainer(trainer_class):  # type: ignore[misc]
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            step = self.state.global_step
            staging = Path(self.args.output_dir) / f"checkpoint-{step}"
            shutil.rmtree(staging, ignore_errors=True)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                losses = [entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry]
                run.checkpoints.mkdir(exist_ok=True)
                facts = {"step": step, "validation_loss": losses[-1] if losses else None}
                commit(staging, folder_of(run, step), facts)
                rotate(run, keep=keep)
                run.event("checkpoint", step=step, folder=folder_of(run, step).name)
            self.accelerator.wait_for_everyone()

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """None of TRL's with each checkpoint: the run's card comes from us."""

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            super()._save(output_dir, state_dict)
            # A pickle that nothing of ours reads and that would hold tokens in the clear.
            Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    return RunFolderTrainer
