"""The only call of trainer.train: everything between a built trainer and a finished model's folder."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import heap, ranks
from tunesmith.errors import Interrupted, MissingExtra, RunError, lacked_memory
from tunesmith.models import write_packing
from tunesmith.plan import Plan
from tunesmith.recipe import PRINCIPAL, Tracking, Training
from tunesmith.training import checkpoints
from tunesmith.training.checkpoints import BEST
from tunesmith.training.run import Run, flush_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tunesmith.training.steps import Rehearsal


@dataclass(frozen=True)
class Fit:
    """What training came to."""

    final_model: Path
    steps: int
    step_of_final_model: int
    train_loss: float | None
    validation_loss: float | None
    seconds: float
    """From where the first step begins, as planned: steps, validations and saving, not the trainer's own start."""
    tokens: int
    peak_memory: int


def finished(run: Run) -> Fit | None:
    """What a training came to that was finished before; None where it was not. Raises RunError for a damaged file."""
    done = run.read("training.json")
    if done is None:
        return None
    names = {field.name for field in fields(Fit)}
    if strange := sorted(done.keys() ^ names):
        raise RunError(
            f"{run.path / 'training.json'} is damaged.",
            found=f"{', '.join(strange[:4])} {'too many' if strange[0] in done else 'missing'}",
            fix="Restore it, or delete it: `tunesmith resume` then makes it anew from the last checkpoint.",
        )
    return Fit(**{**done, "final_model": run.final_model})  # the run may have been moved


def arguments(
    plan: Plan, training: Training, tracking: Tracking, *, name: str, staging: Path
) -> dict[str, Any]:
    """Keyword arguments of transformers' TrainingArguments, shared by every method's trainer.

    Everything that differs between TRL and transformers by default is set, so that neither decides.
    """
    several = (
        {} if ranks.count() == 1 else {"ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False}
    )
    return {
        **several,
        "output_dir": str(staging),
        "run_name": name,
        "project": tracking.project,
        "report_to": [t for t in tracking.trackers if t != "tensorboard"]
        or ["none"],  # fit() places tensorboard's
        "max_steps": plan.total_steps,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.scheduler,
        "warmup_steps": plan.warmup_steps,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": training.optimizer,
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "per_device_eval_batch_size": training.per_device_eval_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "gradient_checkpointing": training.gradient_checkpointing,
        "fp16": plan.mixed_precision == "fp16",
        "bf16": plan.mixed_precision == "bf16",
        "use_cpu": plan.device == "cpu",
        "eval_strategy": "steps" if plan.eval_steps else "no",
        "eval_steps": plan.eval_steps,
        "save_strategy": "steps",
        "save_steps": plan.save_steps,
        "save_total_limit": None,  # checkpoints.rotate decides
        "load_best_model_at_end": False,  # fit decides
        "logging_steps": plan.logging_steps,
        "logging_nan_inf_filter": False,
        "dataloader_num_workers": training.num_workers,
        "dataloader_pin_memory": plan.device == "cuda",
        "include_num_input_tokens_seen": "non_padding",
        "disable_tqdm": True,
        "seed": training.seed,
        "remove_unused_columns": False,
        "push_to_hub": False,
    }


def require_tracker(name: str) -> None:
    """Raises MissingExtra where a tracker's package is not installed."""
    import importlib.util

    if importlib.util.find_spec(name) is None and not (
        name == "tensorboard" and importlib.util.find_spec("tensorboardX")
    ):
        raise MissingExtra(name, f"The tracker '{name}'", install=f"'tunesmith[{name}]'")


def fit(
    trainer: Any,
    run: Run,
    training: Training,
    *,
    adapter_init: str | None = None,
    checkpoint: Path | None = None,
    tensorboard: bool = False,
    samples: Sequence[Sequence[int]] = (),
    max_new_tokens: int = 256,
    measure: Callable[[Any], Mapping[str, float]] | None = None,
    higher_is_better: bool = False,
    input_rows: Sequence[int] | NDArray[np.int64] | None = None,
    release: Callable[[], None] | None = None,
    pace: Callable[[int, float, float], None] | None = None,
    tokens_per_step: float = 0.0,
    rehearsal: Rehearsal | None = None,
    rests_on: Mapping[str, Any] | None = None,
) -> Fit:
    """Train, keep the best model, and write `final_model/`.

    `adapter_init` names a LoRA start that changes the base weights. `checkpoint` is where to continue. `samples`
    are prompts (token ids) that are answered at each validation, with at most `max_new_tokens` tokens. `measure` gives
    the metrics of a model that each validation logs; `higher_is_better` is of the one that `training.best_by` names.
    `input_rows` are the running numbers of the rows that the encodings were made of; errors name them. `release` is
    called after each step and batch of a validation, to hand back what was read for it.
    `pace` is told what the first steps took (`callbacks.Pace`), `tokens_per_step` being those of a mean one.
    `rehearsal` is the run's fullest batch, which is tried before the first step. `rests_on` is what each checkpoint
    says of the run that may be continued from it (`continuing`).
    Raises Interrupted after a stop on request, its state saved, and TrainingDiverged before a bad update.

    Of several processes each takes its share of the steps; the first one writes, and the others are done when the steps
    are: what they give is of no use.
    """
    from transformers.trainer_callback import PrinterCallback

    from tunesmith.training import callbacks, steps
    from tunesmith.training.order import deal
    from tunesmith.training.state import seed_apart
    from tunesmith.training.validating import measuring
    from tunesmith.training.watching import Watching

    is_first = ranks.is_first()
    # These starts change the base weights; their adapters are saved as plain LoRA of twice the rank.
    initial = run.path / "initial_adapter" if adapter_init in PRINCIPAL else None
    info = None
    if is_first:
        checkpoints.clean(run)
        if initial:
            _save_initial_adapter(trainer.model, initial)
        info = _best_so_far(run, checkpoint, training.best_by) if checkpoint else None
        if not info:
            shutil.rmtree(run.best_model, ignore_errors=True)
    info = ranks.shared(info)

    by = training.best_by

    def save_best(step: int, loss: float, value: float) -> None:
        facts = {"step": step, "eval_loss": loss, **({} if by == "loss" else {"by": by, "value": value})}
        save_model(trainer, run.best_model, initial, facts)

    stop = callbacks.StopOnRequest()
    events = callbacks.Events(run, peak_memory=peak_memory)
    best = callbacks.BestModel(
        save_best,
        best=info[("eval_loss" if by == "loss" else "value")] if info else None,
        patience=training.early_stopping_patience,
        by=by,
        higher_is_better=higher_is_better,
    )
    if measure:
        measuring(trainer, measure)

    def warn(message: str) -> None:
        run.event("warning", step=trainer.state.global_step, message=message)

    for callback in trainer.callback_handler.callbacks:
        if type(callback).__module__.startswith("transformers.integrations"):
            callbacks.surviving(callback, warn)
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to the verb's result
    steps.number_rows(trainer)
    trainer.rehearsal, trainer.rests_on = rehearsal, rests_on
    if input_rows is not None:
        data = trainer.train_dataset
        trainer.rows_of = lambda number: [int(input_rows[n]) for n in steps.encoded_numbers(data, number)]
    numbers = callbacks.FiniteLoss(trainer.require_numbers)
    for callback in (
        *([events] if is_first else []),
        best,
        callbacks.LastStep(),
        stop,
        numbers,
        Watching(run),
    ):
        trainer.add_callback(callback)
    if release:
        trainer.add_callback(callbacks.Releasing(release))
    if pace and is_first:
        trainer.add_callback(callbacks.Pace(pace, tokens_per_step=tokens_per_step))
    if samples and (trainer.sharding or trainer.is_deepspeed_enabled):
        run.event(
            "decision", name="samples", value="none while training", reason="no process has the whole model"
        )
    elif samples and is_first:
        trainer.add_callback(callbacks.Samples(run, trainer.processing_class, samples, max_new_tokens))
    if tensorboard and is_first:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        board = TensorBoardCallback(SummaryWriter(run.path / "tensorboard"))
        trainer.add_callback(callbacks.surviving(board, warn))
    if checkpoint:
        run.event(
            "decision",
            step=checkpoints.step_of(checkpoint),
            name="resume",
            value=checkpoint.name,
            reason="the newest whole checkpoint, or the one named",
        )
    trainer.stop_requested = stop.agreed
    if ranks.count() > 1:
        assert trainer.splits, "a loss that can be worked out in parts"
        deal(trainer, ranks.count())
        steps.gather_unevenly(trainer)
        seed_apart(training.seed)
    heap.give_back()  # what loading took: weights that went on to a GPU, or to another type
    try:
        with stop:
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        ended = time.perf_counter()
    except Exception as error:
        if stop.requested and lacked_memory(error):  # whoever would begin again was not asked to stop
            raise Interrupted(
                f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, where memory ran out; the "
                "last checkpoint is kept.",
                fix=f"tunesmith resume {run.path}",
                exit_code=stop.exit_code,
            ) from error
        raise
    if is_first:
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    is_open = trainer.state.global_step < trainer.state.max_steps or trainer._owes_evaluation
    if (stop.requested if ranks.count() == 1 else stop.is_agreed) and is_open:
        raise Interrupted(
            f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; the state is saved.",
            fix=f"tunesmith resume {run.path}",
            exit_code=stop.exit_code,
        )
    info = ranks.shared(checkpoints.best_info(run, by) if is_first else None)
    takes_last = not (training.load_best_model_at_end and info)
    if takes_last:
        info = {"step": trainer.state.global_step, "eval_loss": None}
        save_model(trainer, run.final_model, initial, info)
    if not is_first:
        return Fit(run.final_model, trainer.state.global_step, 0, None, None, 0.0, 0, 0)
    if not takes_last:
        copy_whole(run.best_model, run.final_model)
    if best_one := checkpoints.best_info(run, by):
        told = _why(training, trainer.state.log_history, best_one, higher_is_better)
        if best_one["step"] != info["step"]:
            told["reason"] += (
                f"; final_model is the last step's, {info['step']}: load_best_model_at_end is off"
            )
        run.event("decision", step=best_one["step"], **told)
    elif by != "loss":
        warn(
            f"training.best_by={by} had no value at any validation, so no model is known as the best one and nothing "
            f"stopped early: final_model is that of the last step, {info['step']}."
        )
    if initial:
        shutil.rmtree(initial)
    return Fit(
        final_model=run.final_model,
        steps=trainer.state.global_step,
        step_of_final_model=info["step"],
        train_loss=result.training_loss,
        validation_loss=info["eval_loss"],
        seconds=round(result.metrics["train_runtime"] + time.perf_counter() - ended, 3),
        tokens=int(trainer.state.num_input_tokens_seen),
        peak_memory=peak_memory(),
    )


def _best_so_far(run: Run, checkpoint: Path, by: str) -> dict[str, Any] | None:
    """The best model of the steps up to a checkpoint, as its folder tells; None where that is of steps which are about
    to be repeated, or gone, which is said. Raises RunError where what it tells is damaged."""
    former = _aside(run.best_model)
    if former.exists() and not run.best_model.exists():  # a kill between the two renames of `_swap`
        former.rename(run.best_model)
    step = checkpoints.step_of(checkpoint)
    if info := checkpoints.best_info(run, by):
        if info["step"] > step:
            return None
        if wrong := checkpoints.changed(run.best_model):
            raise _damaged(run.best_model, wrong)
        return info
    log = json.loads((checkpoint / checkpoints.LOG).read_text(encoding="utf-8"))["log_history"]
    if any(f"eval_{by}" in entry for entry in log):
        run.event(
            "warning",
            step=step,
            message="The best model so far is gone (best_model): the best one of the validations that follow is taken.",
        )
    return None


BEST_SHOWN = 12
"""Validations that are named when the best one is told; of more the first ones and the last ones."""


def _why(
    training: Training, log: Sequence[Mapping[str, Any]], info: Mapping[str, Any], higher_is_better: bool
) -> dict[str, str]:
    """Which step's model it is, by which metric, and the values of all validations: the decision for events.

    Where a model is trained on what it writes, the loss is the mean reward with its sign turned; the reward is told.
    """
    from tunesmith.evaluation.metrics import METRICS

    by, key = training.best_by, f"eval_{training.best_by}"
    is_reward = by == "loss" and any("eval_reward" in entry for entry in log)
    if is_reward:
        key, higher_is_better = "eval_reward", True
    # A run that was continued may have validated a step twice; the later one counts.
    values = {int(entry["step"]): entry[key] for entry in log if key in entry}
    told = [f"step {step}: {_value(value, by)}" for step, value in values.items()]
    if len(told) > BEST_SHOWN:
        told = [*told[: BEST_SHOWN // 2], "…", *told[-BEST_SHOWN // 2 :]]
    name = "mean reward" if is_reward else "validation loss" if by == "loss" else METRICS[by].label
    best = info["eval_loss"] if by == "loss" else info["value"]
    if is_reward:
        best = 0.0 - best  # in the place of -best, as a reward of nothing is no -0.0
    which = "highest" if higher_is_better else "lowest"
    turned = ", which is the mean reward with its sign turned" if is_reward else ""
    return {
        "name": "best model",
        "value": f"step {info['step']}, {name} {_value(best, by)}",
        "reason": f"the {which} of {len(values)} validations by training.best_by={by}{turned}: {', '.join(told)}",
    }


def _value(value: float, by: str) -> str:
    from tunesmith.evaluation.compare import shown
    from tunesmith.evaluation.metrics import METRICS

    return f"{value:.4f}" if by == "loss" else shown(value, METRICS[by])


def save_model(trainer: Any, folder: Path, initial_adapter: Path | None, info: Mapping[str, Any]) -> None:
    """Weights or adapter, tokenizer with template, and generation defaults, put in place as a whole. All processes of a
    run call it; the first one writes, and of a sharded model the others give it their shares."""
    from tunesmith.training import sharding

    checkpoints.require_finite(trainer)
    state = sharding.whole(trainer.model) if trainer.sharding else None
    if trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # base and adapter
        unwrapped = trainer.accelerator.unwrap_model(trainer.model)
        wanted, first = sharding.saved_names(unwrapped), dict[int, str]()
        for name, parameter in unwrapped.state_dict(keep_vars=True).items() if state else ():
            if name in state:  # it gives a copy of each: tied ones stay tied
                state[name] = state[first.setdefault(id(parameter), name)]
        if state is not None and wanted is not None:
            state = {name: tensor for name, tensor in state.items() if name in wanted}
    if not trainer.args.should_save:
        return
    staging = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if initial_adapter:
        model.save_pretrained(
            staging, path_initial_model_for_weight_conversion=str(initial_adapter / "initial")
        )
    else:
        model.save_pretrained(staging, **({} if state is None else {"state_dict": state}))
    if state is not None:
        sharding.check_whole(staging, state)
    trainer.processing_class.save_pretrained(staging)
    write_packing(model, staging)
    (staging / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
    checkpoints.seal(staging, info, BEST)
    _swap(staging, folder)


def copy_whole(source: Path, folder: Path) -> None:
    """Copy a model that a run wrote so that it appears in one piece. Raises RunError where it has changed since."""
    staging = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging)
    if wrong := checkpoints.changed(staging):
        shutil.rmtree(staging)
        raise _damaged(source, wrong)
    for path in staging.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    flush_folder(staging)
    _swap(staging, folder)


def _damaged(best_model: Path, wrong: str) -> RunError:
    return RunError(
        f"{best_model} is damaged.",
        found=wrong,
        fix=f"Restore it, or delete it and go on without: tunesmith resume {best_model.parent}. Of the validations "
        "that follow the best one is then taken, else the last step's model.",
    )


def _swap(staging: Path, folder: Path) -> None:
    old = _aside(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    staging.rename(folder)
    flush_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _aside(folder: Path) -> Path:
    """Where a folder lies while another takes its name."""
    return folder.with_name(f".{folder.name}.old")


def _save_initial_adapter(model: Any, folder: Path) -> None:
    """Keep the start of a PiSSA or OLoRA adapter, from which its change is computed when it is saved."""
    config = model.peft_config["default"]
    before = config.init_lora_weights
    config.init_lora_weights = True  # loaded back as plain numbers, not computed again
    model.save_pretrained(folder / "initial")
    config.init_lora_weights = before


def peak_memory() -> int:
    """The largest memory the process has held, in bytes: of the GPU where there is one, else of the process."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def forget_peak() -> None:
    """Have `peak_memory` leave out what a GPU has held up to now: answers are written in nearly all of its memory."""
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats()


def quiet_libraries() -> None:
    """Keep libraries from reporting home, from running code of the Hub and from writing over our progress bar; call
    before they load."""
    for message in (
        ".*gradient_checkpointing.*deprecated.*",
        "PiSSA changes the base weights.*",
        "OLoRA changes.*",
        ".*`broadcast_buffers` is deprecated.*",
        "torch.distributed is disabled, unavailable or uninitialized.*",
    ):
        warnings.filterwarnings("ignore", message=message)  # known, and answered by what we do
    # With this package libraries run compiled code from the Hub: bitsandbytes when it is imported, transformers on
    # request. It counts as not installed.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it says that this is missing
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    os.environ.setdefault("HAMILTON_AUTOLOAD_EXTENSIONS", "0")
    os.environ.setdefault("HAMILTON_TELEMETRY_ENABLED", "false")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # its version is pinned
