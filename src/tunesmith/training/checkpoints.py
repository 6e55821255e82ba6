"""Checkpoints: written aside, completed by a manifest, renamed into place, verified before they are read.

    .staging/checkpoint-N  ->  manifest.json  ->  fsync  ->  one rename to checkpoints/checkpoint-step-N  ->  rotation

A folder counts as a checkpoint only with `manifest.json`, which is written last and lists every file with size and
sha256, and itself. A kill at any moment leaves the former checkpoints whole, and nothing that is not whole is ever
read. Nothing in it is a pickle (`state`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tunesmith import heap, ranks
from tunesmith.errors import (
    OutOfResources,
    RunError,
    TrainingDiverged,
    is_lost_peer,
    is_out_of_disk,
    is_out_of_files,
    is_out_of_memory,
    is_refused_writing,
)
from tunesmith.training.run import Run, environment, flush_folder, write_whole

if TYPE_CHECKING:
    from tunesmith.training.steps import Splits

MANIFEST = "manifest.json"
FORMAT = 1
NAME = re.compile(r"checkpoint-step-(\d+)")
PINNED = "pinned"
"""A file of this name in a checkpoint's folder keeps it from being deleted."""
TRASH = ".trash-"
"""How folders are called that are about to be deleted; nothing else is."""
LARGE = 2**24
"""Bytes from which on files are hashed by several threads."""
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})
"""Endings of files that hold weights as a pickle; no checkpoint of ours has one but DeepSpeed's."""
ZERO = "latest"
"""File of a checkpoint by which DeepSpeed finds its own part of it."""
LOG = "trainer_state.json"
"""File of a checkpoint with the Trainer's step, epoch and log."""
BEST = "best_model_info.json"
"""File of the best model's folder and the final one's: their manifest, and which step's it is, and by what."""
START = "start"
"""In the place of a checkpoint's name: continue from none, train from the first step."""


def folder_of(run: Run, step: int) -> Path:
    """Where the checkpoint of an optimizer step lies."""
    return run.checkpoints / f"checkpoint-step-{step}"


def step_of(folder: Path) -> int:
    """The optimizer step of a checkpoint's folder."""
    match = NAME.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def commit(staging: Path, final: Path, facts: Mapping[str, Any]) -> None:
    """Turn a finished staging folder into a checkpoint: hash, flush, manifest, one rename.

    One that already has the name was written in a former life of the run: it makes way, and is deleted last.
    """
    seal(staging, facts)
    if not final.parent.exists():
        final.parent.mkdir()
        flush_folder(final.parent.parent)
    former = _set_aside(final) if final.exists() else None
    staging.rename(final)
    flush_folder(final.parent)
    if former:
        shutil.rmtree(former, ignore_errors=True)


def seal(folder: Path, facts: Mapping[str, Any], name: str = MANIFEST) -> None:
    """Hash and flush every file of a folder, and write its manifest, which has the facts as well, as the last one."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, _digests(paths, flush=True), strict=True)
    }
    write_whole(folder / name, _sealed({"format": FORMAT, **facts, "files": files}))
    for inner in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        flush_folder(inner)


def _digests(paths: Sequence[Path], *, flush: bool = False) -> list[str]:
    """The sha256 of some files, large ones at the same time; with `flush` the disk has them afterwards."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if flush:
                os.fsync(file.fileno())
        return found

    if sum(path.stat().st_size for path in paths) < LARGE:
        return [digest(path) for path in paths]
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing lets other threads run
        return list(pool.map(digest, paths))


def _sealed(content: Mapping[str, Any]) -> str:
    """The manifest's text, which holds its own hash, so that no bit of it changes unseen."""
    digest = hashlib.sha256(_text(content).encode()).hexdigest()
    return _text({**content, "manifest_sha256": digest})


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1)


def _set_aside(folder: Path) -> Path:
    """Rename a folder that is to be deleted, so that a kill on the way leaves no half checkpoint under its name."""
    trash = folder.with_name(f"{TRASH}{uuid.uuid4().hex}")
    folder.rename(trash)
    return trash


def clean(run: Run) -> None:
    """Delete what a killed process left half written or half deleted; only names that this module gives."""
    if run.staging.is_dir():
        shutil.rmtree(run.staging)
    for leftover in run.checkpoints.glob(f"{TRASH}*"):
        shutil.rmtree(leftover)


def manifest(folder: Path, file: str = MANIFEST) -> dict[str, Any]:
    """A checkpoint's manifest. Raises RunError where the checkpoint was never completed, or it was changed since."""
    try:
        text = (folder / file).read_text(encoding="utf-8")
        content: dict[str, Any] = json.loads(text)
        rest = {name: value for name, value in content.items() if name != "manifest_sha256"}
        if _sealed(rest) != text:
            wrong: str | None = f"{file} does not have the content that was written"
        else:
            wrong = _misshapen(rest, file)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        wrong = f"{file} is no readable manifest ({error})"
    if wrong:
        raise RunError(f"{folder} is not whole.", found=wrong) from None
    return content


def _misshapen(content: Mapping[str, Any], file: str) -> str | None:
    """What of a manifest is not of the form in which we write it: a stranger can seal one as well."""
    kinds: dict[str, Any] = {
        "files": dict, "environment": dict | None, "rests_on": dict | None, "processes": int | None,
        "validation_loss": int | float | None,
    }  # fmt: skip
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            return f"{file} has not the form of a manifest: {name}"
    if not isinstance((content.get("environment") or {}).get("packages"), dict | None):
        return f"{file} has not the form of a manifest: environment.packages"
    for name, facts in content["files"].items():
        match facts:
            case {"bytes": int(), "sha256": str()}:
                continue
        return f"{file} has not the form of a manifest: {name[:80]}"
    return None


def _is_own(folder: Path, name: str) -> bool:
    """Whether a name is that of a place in a folder, and neither it nor a folder above it is a link."""
    try:
        return Path(os.path.realpath(folder / name)) == Path(os.path.realpath(folder)) / name
    except ValueError:  # characters that no path has
        return False


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None where every file is as it was written and a run can go on from it."""
    if wrong := damage(folder):
        return wrong
    content = manifest(folder)
    if LOG not in content["files"]:
        return f"{LOG} is no part of it"
    return _strange_log(folder / LOG, content.get("step"))


def damage(folder: Path, file: str = MANIFEST) -> str | None:
    """What in a folder is not as its manifest says, or None where every file of it is as it was written."""
    try:
        files = manifest(folder, file)["files"]
    except RunError as error:
        return str(error.found)
    for name, facts in files.items():
        path = folder / name
        if not _is_own(folder, name):
            return f"{name} is not a file of this folder"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {facts['bytes']}"
    try:
        digests = _digests([folder / name for name in files])
    except OSError as error:  # a disk that gives nothing back
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    for name, digest in zip(files, digests, strict=True):
        if digest != files[name]["sha256"]:
            return f"{name} does not have the content that was written"
    return None


def list_of(model: Path) -> str | None:
    """The file by which the folder of a model says how its files were written, where a run wrote it: its best model,
    its final one, or a checkpoint. None for another's model, and for one of an older tunesmith, which hashed none."""
    if NAME.fullmatch(model.name) and (model / MANIFEST).is_file():
        return MANIFEST
    try:
        info = json.loads((model / BEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return BEST if (model / BEST).is_file() else None
    is_older = isinstance(info, dict) and not info.keys() & {"files", "manifest_sha256"}
    return None if is_older else BEST


def changed(model: Path) -> str | None:
    """What of a model that a run wrote is not as it was written; None where all is, or nobody says how it was."""
    file = list_of(model)
    return damage(model, file) if file else None


def whole_beside(model: Path) -> list[Path]:
    """Models of the same run that are as they were written, in the place of one that is not: the best and the final
    one, and the newest checkpoint."""
    run = Run(model.parent.parent if NAME.fullmatch(model.name) else model.parent)
    kept = [path for path in (run.best_model, run.final_model) if list_of(path) and changed(path) is None]
    newest = next((path for path in found(run) if path != model and problem(path) is None), None)
    return [path for path in (*kept, *([newest] if newest else [])) if path != model]


def _strange_log(file: Path, step: object) -> str | None:
    """What of a checkpoint's log is not as the Trainer writes it, by which it would start elsewhere or fall over: a
    stranger can seal one as well."""
    try:
        log = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{LOG} cannot be read ({error})"
    if not isinstance(log, dict):
        return f"{LOG} has not the form of one: {type(log).__name__}"
    if unknown := sorted(map(str, log.keys() - _fields_of_the_log())):
        return f"{LOG} has not the form of one: {unknown[0][:80]}"
    numbers, intervals = (
        ("epoch", "total_flos", "num_input_tokens_seen"),
        ("logging_steps", "eval_steps", "save_steps", "train_batch_size"),
    )
    sound = {
        "global_step": type(log.get("global_step")) is int and log["global_step"] == step,
        **{name: isinstance(log.get(name), int | float) for name in numbers},
        **{name: type(log.get(name)) is int and log[name] > 0 for name in intervals},
        "best_model_checkpoint": isinstance(log.get("best_model_checkpoint"), str | None),
        "log_history": isinstance(log.get("log_history"), list) and all(map(_is_entry, log["log_history"])),
    }
    wrong = next((name for name, is_sound in sound.items() if not is_sound), None)
    return f"{LOG} has not the form of one: {wrong}" if wrong else None


def _is_entry(entry: Any) -> bool:
    """Whether something is a line of the Trainer's log: a step, and numbers by name."""
    return (
        isinstance(entry, dict)
        and type(entry.get("step")) is int
        and all(isinstance(value, int | float) for name, value in entry.items() if name.startswith("eval_"))
    )


@functools.cache
def _fields_of_the_log() -> frozenset[str]:
    from transformers.trainer_callback import TrainerState

    return frozenset(field.name for field in dataclasses.fields(TrainerState))


def best_info(run: Run, by: str) -> dict[str, Any] | None:
    """Which step's the best model is and what it measured, `by` being `training.best_by`; None where there is none.

    Raises RunError where its file is damaged.
    """
    info = run.read(f"best_model/{BEST}")
    measure = "eval_loss" if by == "loss" else "value"
    wanted: dict[str, Any] = {"step": int, "eval_loss": int | float, measure: int | float}
    if info is not None and (wrong := [n for n, kind in wanted.items() if not isinstance(info.get(n), kind)]):
        raise RunError(
            f"{run.best_model / BEST} is damaged.",
            found=f"no number as {wrong[0]}",
            fix="Restore it, or delete the folder best_model: of the validations that follow the best one is taken.",
        )
    return info


def found(run: Run) -> list[Path]:
    """The run's checkpoint folders, newest step first, whole or not."""
    folders = (
        [p for p in run.checkpoints.iterdir() if NAME.fullmatch(p.name)] if run.checkpoints.is_dir() else []
    )
    return sorted(folders, key=step_of, reverse=True)


def choose(run: Run, name: str = "latest") -> Path | None:
    """The checkpoint to continue from: a named one, or the newest that is whole; None where there is none, and for
    `start`.

    Skipped ones are reported as warnings. Raises RunError for a named checkpoint that is missing or damaged, and
    where all are damaged.
    """
    folders = found(run)
    if name == START:
        return None
    if name != "latest":
        wanted = run.checkpoints / Path(name).name
        is_path = Path(name).name != name  # of another run, perhaps
        if wanted not in folders or (is_path and Path(name).expanduser().resolve() != wanted.resolve()):
            raise RunError(
                f"The run {run.path} has no checkpoint '{name}'.",
                found=", ".join(p.name for p in folders) or "no checkpoint",
                fix="Name one of these, or use `latest`."
                if folders
                else f"Leave --checkpoint out: training then begins at the first step. tunesmith resume {run.path}",
            )
        if wrong := problem(wanted):
            raise RunError(
                f"The checkpoint {wanted} is damaged.", found=wrong, fix="Use another, or `latest`."
            )
        _say_unlisted(run, wanted)
        return wanted
    skipped = []
    for folder in folders:
        wrong = problem(folder)
        if wrong is None:
            _say_unlisted(run, folder)
            return folder
        skipped.append(f"{folder.name}: {wrong}")
        run.event("warning", message=f"{folder.name} is damaged and was skipped: {wrong}")
    if skipped:
        raise RunError(
            f"No checkpoint of {run.path} is whole.",
            found="; ".join(skipped),
            fix=f"Restore one, or train from the first step: tunesmith resume {run.path} --checkpoint {START}",
        )
    return None


def _say_unlisted(run: Run, folder: Path) -> None:
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    for name in sorted(names - {*manifest(folder)["files"], MANIFEST, PINNED}):
        run.event("warning", message=f"{folder.name}/{name} is no part of the checkpoint and is not read.")


@contextlib.contextmanager
def listed(folder: Path) -> Iterator[Path]:
    """A folder of a checkpoint's own files alone, by links: those that its manifest lists, and no pickle.

    The libraries take weights by what a file is called, and a `pytorch_model.bin` that somebody has put there before
    the adapter. What is read in here is not deleted with the folder.
    """
    with TemporaryDirectory(prefix="tunesmith-") as temporary:
        view = Path(temporary) / folder.name
        view.mkdir()
        for name in manifest(folder)["files"]:
            if PurePosixPath(name).suffix in PICKLES:
                continue
            link, file = view / name, (folder / name).absolute()
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                link.symlink_to(file)
            except OSError:  # Windows lets only some make links
                shutil.copyfile(file, link)
        yield view


@contextlib.contextmanager
def _in_words(checkpoint: str) -> Iterator[None]:
    """Raises RunError where a checkpoint does not hold what the trainer takes from it: anybody can seal a manifest."""
    from safetensors import SafetensorError

    try:
        yield
    except (
        ArithmeticError, AttributeError, FileNotFoundError, LookupError, RuntimeError, SafetensorError, TypeError,
        ValueError,
    ) as error:  # fmt: skip
        if is_out_of_memory(error) or is_lost_peer(error):
            raise
        said = next(iter(str(error).splitlines()), "")
        raise RunError(
            f"{Path(checkpoint).name or 'The checkpoint'} does not hold what this recipe's training continues from.",
            found=f"{type(error).__name__}: {said}"[:200],
            fix="Continue from another checkpoint (`--checkpoint NAME`), or start a new run with another --name.",
        ) from error


def rotate(run: Run, *, keep: int, written: int | None = None) -> None:
    """Delete checkpoints beyond `keep`: the newest stays, then those with the lowest validation loss.

    `written` is the step of the one that was just written. Those of later steps are left from before the run was
    continued; they may be damaged, and are neither counted nor deleted before their steps are taken again.

    The one of the best model's step stays whatever `keep` is, and so do pinned ones, and everything that this
    module did not write or that is not whole as far as its manifest and sizes say.
    """
    there = [folder for folder in found(run) if written is None or step_of(folder) <= written]
    whole = [folder for folder in there if _is_listed(folder)]
    best = None
    with contextlib.suppress(RunError):
        best = (run.read(f"best_model/{BEST}") or {}).get("step")
    older = [folder for folder in whole[1:] if step_of(folder) != best and not (folder / PINNED).exists()]
    kept = len(whole) - len(older)
    ranked = sorted(older, key=lambda folder: (_loss(folder), -step_of(folder)))
    for folder in ranked[max(keep - kept, 0) :]:
        shutil.rmtree(_set_aside(folder), ignore_errors=True)
    for leftover in run.checkpoints.glob(f"{TRASH}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _is_listed(folder: Path) -> bool:
    """Whether a folder has a manifest, and every file of it with its size."""
    try:
        files = manifest(folder)["files"]
        return all((folder / name).stat().st_size == facts["bytes"] for name, facts in files.items())
    except (RunError, OSError):
        return False


def _loss(folder: Path) -> float:
    try:
        loss = manifest(folder).get("validation_loss")
    except RunError:
        return float("inf")
    return float("inf") if loss is None else float(loss)


@functools.cache
def _environment() -> dict[str, Any]:
    return {name: value for name, value in environment().items() if name != "time"}


def environment_differences(folder: Path) -> list[str]:
    """What of machine and packages is not as it was when a checkpoint was written, with both values."""
    content = manifest(folder)
    before, now = content.get("environment") or {}, _environment()
    flat = [{**e, **(e.get("packages") or {})} for e in (before, now)]
    for facts, count in zip(flat, (content.get("processes") or 1, ranks.count()), strict=True):
        facts["the number of processes"] = count
    names = sorted((flat[0].keys() | flat[1].keys()) - {"packages"})
    return [
        f"{name} was {flat[0].get(name)}, is {flat[1].get(name)}"
        for name in names
        if flat[0].get(name) != flat[1].get(name)
    ]


def not_finite(model: Any) -> str | None:
    """The name of the first trained weight with a value that is no number; None where all are. Of a sharded model in
    this process's share."""
    from tunesmith.training import sharding

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not sharding.is_finite(parameter):
            return str(name)
    return None


def require_finite(trainer: Any) -> None:
    """Raises TrainingDiverged rather than let weights be saved that are no numbers. All processes of a run ask."""
    name = not_finite(trainer.model)
    if ranks.any_of(name is not None):
        name = name or "a weight in another process's share"
        raise TrainingDiverged(
            f"The weights are no longer numbers at step {trainer.state.global_step}; nothing was saved.",
            found=f"a value of {name} is infinite or no number",
            fix="The last good checkpoint is kept. Lower training.learning_rate, or raise warmup_steps.",
        )


def unwritten(error: BaseException, folder: Path, what: str) -> OutOfResources | None:
    """What to say of an error of the disk while something was written; None for any other error."""
    if is_out_of_disk(error):
        free = shutil.disk_usage(folder).free
        return OutOfResources(
            f"{what} could not be written: there is no room for it.",
            found=f"{str(error).splitlines()[0][:200]}; {free:,} bytes are free",
            fix="Free space; what was saved before is whole, and `tunesmith resume` goes on from it.",
        )
    if is_out_of_files(error):
        return OutOfResources(
            f"{what} could not be written: too many files are open.",
            found=str(error).splitlines()[0][:200],
            fix="Raise the limit (`ulimit -n`); what was saved before is whole, and `tunesmith resume` goes on from "
            "it.",
        )
    if is_refused_writing(error):
        return OutOfResources(
            f"{what} could not be written: the folder or its disk does not let us.",
            found=str(error).splitlines()[0][:200],
            fix="Make it writable; what was saved before is whole, and `tunesmith resume` goes on from it.",
        )
    return None


def save_weights(trainer: Any, folder: Path, state_dict: Any = None) -> None:
    """Write model and tokenizer as the Trainer does, but not its arguments, which are a pickle that holds tokens in
    the clear."""
    from tunesmith.models import write_packing

    folder.mkdir(parents=True, exist_ok=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.save_pretrained(folder, state_dict=state_dict)
    write_packing(model, folder)
    if trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card


def free_memory() -> None:
    """Give back what nothing uses any more, to Python, the system and the device."""
    import torch

    gc.collect()
    heap.give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keeping_run_folder(trainer_class: Any, run: Run, *, keep: int, splits: Splits = None) -> type:
    """The trainer class with its checkpoints written and read by the rules of this module, and its steps guarded by
    those of `steps`. `splits` is how a batch may be parted where memory runs out.

    The rest of the trainer is untouched: it fills a staging folder as it always does.
    """
    from transformers import Trainer

    from tunesmith.training import sharding, state
    from tunesmith.training.steps import Abandoned, guarded_steps

    guarded = guarded_steps(trainer_class, run, splits)

    class RunFolderTrainer(guarded):  # type: ignore[misc,valid-type]
        rests_on: Mapping[str, Any] | None = None
        """What the run rests on, by which it may be continued (`continuing`)."""
        written: Path | None = None
        """The last checkpoint that was written."""

        def __init__(self, *given: Any, **named: Any) -> None:
            arguments = named.get("args")
            if arguments is not None and arguments.n_gpu > 1:
                # The Trainer would spread each batch over all GPUs that it sees (DataParallel), which multiplies the
                # batch of recipe and plan and calls copies of the model that have not our forward.
                arguments._n_gpu = 1
            self.sharding = sharding.of(named.get("model"))
            super().__init__(*given, **named)

        # Weights in shares: nothing is placed on a device before each process has its own (`sharding`)

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            if self.sharding:
                self.accelerator.device_placement = False

        def _move_model_to_device(self, model: Any, device: Any) -> None:
            if not self.sharding:
                super()._move_model_to_device(model, device)

        def _defer_fsdp_gradient_reduction(self) -> Any:
            """Gradients are summed after each backward pass, and only shares of them are held."""
            return contextlib.nullcontext()

        def _prepare_for_training(self, steps: int, loader: Any, checkpoint: str | None) -> Any:
            if checkpoint:
                check_zero(Path(checkpoint), is_zero=self.is_deepspeed_enabled)
            if self.sharding:
                sharding.spread(self, self.sharding, run)
            return super()._prepare_for_training(steps, loader, checkpoint)

        def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
            with _in_words(checkpoint), listed(Path(checkpoint)) as folder:
                if sharding.is_sharded(folder):
                    sharding.read_weights(self.model, folder)
                else:
                    super()._load_from_checkpoint(str(folder), model)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            require_finite(self)
            try:
                self._save_staged(model, trial)
            except BaseException as error:
                if not is_out_of_memory(error) or ranks.count() > 1:
                    raise
                free_memory()
                run.event(
                    "decision",
                    step=self.state.global_step,
                    name="memory",
                    value="saved again",
                    reason="memory ran out while the checkpoint was written; what was not in use was given back",
                )
                self._save_staged(model, trial)

        def _save_staged(self, model: Any, trial: Any) -> None:
            step = self.state.global_step
            staging = Path(self.args.output_dir) / f"checkpoint-{step}"
            with ranks.first() as mine:
                if mine:
                    shutil.rmtree(staging, ignore_errors=True)
            try:
                with state.undisturbed():
                    super()._save_checkpoint(model, trial)
                with ranks.first() as mine:
                    if mine:
                        losses = [
                            entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry
                        ]
                        facts = {"step": step, "validation_loss": losses[-1] if losses else None}
                        facts |= {"processes": ranks.count(), "environment": _environment()}
                        facts |= {"rests_on": self.rests_on} if self.rests_on else {}
                        commit(staging, folder_of(run, step), facts)
                        self.written = folder_of(run, step)
            except Exception as error:
                if ranks.is_first():
                    shutil.rmtree(staging, ignore_errors=True)
                if mended := unwritten(error, run.path, f"The checkpoint of step {step}"):
                    raise mended from error
                raise
            with ranks.first() as mine:
                if mine:
                    rotate(run, keep=keep, written=step)
                    run.event("checkpoint", step=step, folder=folder_of(run, step).name)

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """None of TRL's with each checkpoint: the run's card comes from us."""

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            if self.sharding:  # the weights are with the optimizer's state, each share by its process
                Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)
            elif trainer_class._save is not Trainer._save:  # one that has more than a model to save
                super()._save(output_dir, state_dict)
            elif self.args.should_save:
                save_weights(self, Path(output_dir or self.args.output_dir), state_dict)

        # The state, without pickle, all of it or none

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            is_theirs = self.is_deepspeed_enabled and not self.args.deepspeed
            if is_theirs or self.is_fsdp_enabled:
                raise RunError(
                    "How processes hold the model is the recipe's to say.",
                    found="DeepSpeed or FSDP in the accelerate configuration",
                    fix="Switch it off there, and give --parallel fsdp or --parallel deepspeed.",
                )
            if self.is_deepspeed_enabled:  # each process's own part, in DeepSpeed's format
                super()._save_optimizer_and_scheduler(output_dir)
            state.write(self, Path(output_dir))

        def _save_scaler(self, output_dir: str) -> None:
            """With the optimizer's state."""

        def _save_rng_state(self, output_dir: str) -> None:
            """With the optimizer's state."""

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if checkpoint is not None:
                with listed(Path(checkpoint)) as folder:
                    self._read_state = state.read(folder, self.optimizer)
                with _in_words(checkpoint):
                    state.restore_optimizer(self, self._read_state)

        def _load_scaler(self, checkpoint: str | None) -> None:
            """With the optimizer's state."""

        def _load_rng_state(self, checkpoint: str | None) -> None:
            if checkpoint is not None:
                with _in_words(checkpoint):
                    state.restore_loop(self, self._read_state)
                del self._read_state

        # What is beside the steps, and after the last one

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            with state.undisturbed():
                return super().evaluate(*args, **kwargs)

        def _maybe_log_save_evaluate(
            self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *given: Any, **named: Any
        ) -> None:
            """A stop during a validation is served at once: what was begun of it is owed by whoever continues."""
            try:
                super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *given, **named)
            except Abandoned:
                self._owes_evaluation = True
                self._save_checkpoint(model, trial)
                self.control.should_evaluate = self.control.should_save = False
                self.control.should_training_stop = True

        def _pay_evaluation(self, trial: Any) -> None:
            loop = self._read_state["loop"] if hasattr(self, "_read_state") else {}
            if loop.get("_owes_evaluation"):
                loop["_owes_evaluation"] = False
                try:
                    self._evaluate(trial, None)
                except Abandoned:
                    loop["_owes_evaluation"] = self._owes_evaluation = True
                    self.control.should_training_stop = True  # the checkpoint that is there says it all

        def _run_epoch(self, **given: Any) -> None:
            """One pass, or nothing where the checkpoint is that of the last step: the loop would take one more."""
            self._pay_evaluation(given["trial"])
            if dealt := getattr(self, "dealt", None):
                dealt.set_epoch(
                    given["epoch"]
                )  # accelerate does not reach it behind batches that are skipped
            if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
                super()._run_epoch(**given)
                return
            self.control.should_training_stop = True

        def _finalize_training(self, trial: Any, *given: Any, **named: Any) -> Any:
            self._pay_evaluation(trial)
            if hasattr(self, "_read_state"):  # there was no step left to take
                self._load_rng_state("")
            found = super()._finalize_training(trial, *given, **named)
            # It looks through the staging folder, which the first process takes away when it is through.
            ranks.any_of(False)
            return found

    return RunFolderTrainer


def check_zero(folder: Path, *, is_zero: bool) -> None:
    """Raises RunError where the optimizer's state in a checkpoint is DeepSpeed's and cannot be read by what trains now,
    or the other way round: the run would go on with an optimizer that knows nothing."""
    content = manifest(folder)
    before, has_zero = content.get("processes") or 1, ZERO in content["files"]
    if not (is_zero or has_zero) or (is_zero and has_zero and before == ranks.count()):
        return
    kind = "DeepSpeed" if has_zero else "one process, or of other shares,"
    by = "one process" if before == 1 else f"{before} processes"
    raise RunError(
        f"A checkpoint of {kind} is continued as it was written: by {by}.",
        found=f"{ranks.count()} with{'' if is_zero else 'out'} DeepSpeed",
        fix=f"tunesmith resume {folder.parent.parent} --processes {before}. Checkpoints of parallel.kind fsdp go with "
        "any number.",
    )
