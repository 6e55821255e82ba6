"""What happens beside the training loop: events, samples, the best model, stopping on request, stopping on NaN."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from tunesmith import ranks
from tunesmith.data.templates import end_of_turn_ids
from tunesmith.errors import INTERRUPTED, TERMINATED, Terminated, TrainingDiverged
from tunesmith.evaluation.metrics import METRICS
from tunesmith.generation import generate
from tunesmith.training.run import SAMPLE_TEXT, SAMPLE_TOKENS, Run


class Events(TrainerCallback):  # type: ignore[misc]
    """Writes the run's step and evaluation events and tells the watcher about progress."""

    def __init__(self, run: Run, *, peak_memory: Callable[[], int]) -> None:
        self.run, self.peak_memory = run, peak_memory
        self.started, self.tokens_before = time.perf_counter(), 0
        self.last_loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started, self.tokens_before = time.perf_counter(), state.num_input_tokens_seen
        self.run.event("state", step=state.global_step, state="training", total_steps=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell how far the training is."""
        seconds = time.perf_counter() - self.started
        self.run.progress(
            "training",
            state.global_step,
            state.max_steps,
            loss=self.last_loss,
            tokens_per_second=(state.num_input_tokens_seen - self.tokens_before) / max(seconds, 1e-9),
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Keep what the trainer logs, under our names."""
        if "loss" in logs:
            self.last_loss = logs["loss"]
            self.run.event(
                "step",
                step=state.global_step,
                epoch=state.epoch,
                loss=logs["loss"],
                learning_rate=logs.get("learning_rate"),
                grad_norm=logs.get("grad_norm"),
                token_accuracy=logs.get("mean_token_accuracy"),
                tokens=int(state.num_input_tokens_seen),
                seconds=round(time.perf_counter() - self.started, 3),
                memory=self.peak_memory(),
                **_own(logs),
            )
        elif "eval_loss" in logs:
            self.run.event(
                "evaluation",
                step=state.global_step,
                loss=logs["eval_loss"],
                token_accuracy=logs.get("eval_mean_token_accuracy"),
                seconds=logs.get("eval_runtime"),
                **_own({key.removeprefix("eval_"): value for key, value in logs.items()}),
            )


class Pace(TrainerCallback):  # type: ignore[misc]
    """Measures a run's second and third step, and has told what the whole of it comes to. The first one is slow.

    `tell` is given the step, the seconds of a mean one, and those from the beginning to the last step's end, without
    validations. Steps weigh by their tokens, where these are counted and a mean step's are known.
    """

    MEASURED = 2

    def __init__(self, tell: Callable[[int, float, float], None], *, tokens_per_step: float) -> None:
        self.tell, self.tokens_per_step = tell, tokens_per_step
        self._first = self._seen = 0
        self._begun = self._started = 0.0
        self._found: list[tuple[float, int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._first, self._begun, self._found = state.global_step, time.perf_counter(), []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins; its first batch is counted already."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is done."""
        now, seen = time.perf_counter(), int(state.num_input_tokens_seen)
        step, before, self._seen = state.global_step, self._seen, seen
        done = step - self._first
        if not 1 < done <= 1 + self.MEASURED:
            return
        self._found.append((now - self._started, seen - before))
        left = state.max_steps - step
        if len(self._found) < self.MEASURED or not left:
            return
        seconds, tokens = (sum(column) for column in zip(*self._found, strict=True))
        mean = seconds / self.MEASURED
        if tokens and self.tokens_per_step:
            mean = seconds / tokens * self.tokens_per_step
            left = max(state.max_steps - seen / self.tokens_per_step, 0.0)  # in mean steps
        self.tell(step, mean, now - self._begun + left * mean)


class Samples(TrainerCallback):  # type: ignore[misc]
    """Has the model answer the same few prompts (token ids) at each validation, greedily, for people to read along.

    Draws no random numbers, so that training goes on as if nothing had been asked.
    """

    def __init__(
        self, run: Run, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> None:
        self.run, self.tokenizer, self.prompts = run, tokenizer, prompts
        self.max_new_tokens = min(max_new_tokens, SAMPLE_TOKENS)

    def on_evaluate(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Write what the model answers now."""
        answers = generate(
            model,
            self.tokenizer,
            self.prompts,
            max_new_tokens=self.max_new_tokens,
            stop_ids=end_of_turn_ids(self.tokenizer),
        )
        for prompt, answer in zip(self.prompts, answers, strict=True):
            question = self.tokenizer.decode(list(prompt), skip_special_tokens=True).strip()
            self.run.event(
                "sample", step=state.global_step, prompt=question[-SAMPLE_TEXT:], completion=answer.text
            )


class Releasing(TrainerCallback):  # type: ignore[misc]
    """Has what was read of the rows for a step handed back after it."""

    def __init__(self, release: Callable[[], None]) -> None:
        self.release = release

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Of what was looked at beforehand."""
        self.release()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Of the training rows."""
        self.release()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Of the validation rows."""
        self.release()


COMMON = {
    "loss",
    "learning_rate",
    "grad_norm",
    "mean_token_accuracy",
    "epoch",
    "step",
    "num_tokens",
    "entropy",
}
"""What every trainer logs; entropy is kept only beside other measures of a method, not beside metrics."""
SPEED = ("runtime", "_per_second", "num_input_tokens_seen")


def _own(logs: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What a method logs beyond what all do (margins, rewards, KL), as the event's `measures`."""
    found = {
        name: float(value)
        for name, value in logs.items()
        if isinstance(value, int | float) and name not in COMMON and not name.endswith(SPEED)
    }
    if "entropy" in logs and found.keys() - METRICS:
        found["entropy"] = float(logs["entropy"])
    return {"measures": found} if found else {}


class BestModel(TrainerCallback):  # type: ignore[misc]
    """Saves the model whenever validation is at its best; stops when it has not become better for long.

    `by` is what counts: `loss`, or a metric that is measured with it, of which more may be better.
    """

    def __init__(
        self,
        save: Callable[[int, float, float], None],
        *,
        best: float | None,
        patience: int | None,
        by: str = "loss",
        higher_is_better: bool = False,
    ) -> None:
        self.save, self.patience, self.by = save, patience, by
        self.sign = -1.0 if higher_is_better else 1.0
        self.best = math.inf if best is None else self.sign * best

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop again where a run that is continued had stopped."""
        self._stop_in_vain(state, control)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Compare, save, and count in vain validations from the log, so that a resumed run counts on."""
        loss, key = metrics["eval_loss"], f"eval_{self.by}"
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"The validation loss is {loss} at step {state.global_step}.", fix=DIVERGED
            )
        if key not in metrics:  # no answer could be scored; `fit` says so where none ever was
            return
        if self.sign * metrics[key] < self.best:
            self.best = self.sign * metrics[key]
            self.save(state.global_step, loss, metrics[key])
        self._stop_in_vain(state, control)

    def _stop_in_vain(self, state: Any, control: Any) -> None:
        key = f"eval_{self.by}"
        found = [self.sign * entry[key] for entry in state.log_history if key in entry]
        if self.patience and found:
            since_best = len(found) - 1 - found.index(min(found))
            control.should_training_stop = control.should_training_stop or since_best >= self.patience


DIVERGED = "Lower training.learning_rate, raise warmup_steps, or use bf16 instead of fp16."


class LastStep(TrainerCallback):  # type: ignore[misc]
    """Validates after the last step, whatever the interval, so that the last model can be the best one."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for an evaluation and a checkpoint at the end."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_evaluate or args.eval_strategy != "no"
            control.should_save = True
            control.should_log = True


_listening: list[StopOnRequest] = []


def ask_to_stop() -> bool:
    """Ask the training of this process, if there is one, to stop after its step; whether there is one."""
    for listener in _listening:
        listener.requested = True
    return bool(_listening)


class StopOnRequest(TrainerCallback):  # type: ignore[misc]
    """Turns the first Ctrl-C or SIGTERM into: finish this step, save, stop. The second one stops at once.

    Use as a context manager around the training; outside the main thread it only listens to `stop()`. Of several
    processes each stops where any one was asked to.
    """

    def __init__(self) -> None:
        self.requested = self.is_agreed = False
        self.exit_code = INTERRUPTED
        self._before: dict[int, Any] = {}

    def stop(self, number: int = 0, frame: FrameType | None = None) -> None:
        """Ask for a stop after the current step."""
        if self.requested:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        self.requested = True
        self.exit_code = TERMINATED if number == signal.SIGTERM else INTERRUPTED

    def __enter__(self) -> StopOnRequest:
        _listening.append(self)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self.stop)
        return self

    def __exit__(self, *error: object) -> None:
        _listening.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether to stop now; all processes of a run ask at the same places."""
        self.is_agreed = self.is_agreed or ranks.any_of(self.requested)
        return self.is_agreed

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop at a step's end, where the state is whole."""
        if self.agreed():
            control.should_save = True
            control.should_training_stop = True


def surviving(callback: Any, tell: Callable[[str], None]) -> Any:
    """A tracker's callback that cannot end a run: at its first error it is told and asked no more."""
    dead = False

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal dead
            if dead:
                return None
            try:
                return method(*given, **named)
            except Exception as error:
                dead = True
                name = type(callback).__name__.removesuffix("Callback")
                said = next(iter(str(error).strip().splitlines()), "")[:200]
                tell(
                    f"The tracker {name} failed and gets nothing more of this run, which goes on: "
                    f"{type(error).__name__}: {said}"
                )
                return None

        return call

    for name in dir(TrainerCallback):
        if name.startswith("on_"):
            setattr(callback, name, guarded(getattr(callback, name)))
    return callback


class FiniteLoss(TrainerCallback):  # type: ignore[misc]
    """Stops before the optimizer would write a gradient that is not a number into the weights.

    `check` is a trainer's own that knows the rows of its step (`steps`).
    """

    def __init__(self, check: Callable[[Any], None] | None = None) -> None:
        self.check = check

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        """Check the norm of all gradients; under fp16 the loss scaler skips such steps itself."""
        if self.check:
            self.check(model)
            return
        if args.fp16:
            return
        import torch

        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if gradients and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            raise TrainingDiverged(
                f"The gradient is not a number at step {state.global_step + 1}; the weights were not updated.",
                fix=DIVERGED,
            )
