"""What is measured on the validation examples: the loss as one mean over all labels, or the mean reward."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from tunesmith import ranks
from tunesmith.data.cache import Encodings
from tunesmith.data.templates import IGNORED
from tunesmith.generation import generate
from tunesmith.models import is_seq2seq

if TYPE_CHECKING:
    from tunesmith.methods.rewards import Scored


def token_weighted(trainer_class: type) -> type:
    """The trainer class with `eval_loss` in nats per label: losses and labels are summed over the whole
    evaluation, and divided once.

    The trainers' own is the mean of the means of their batches, in which a token of a short answer weighs more,
    and which changes with the batch size. The best model and early stopping follow this loss.
    """

    class TokenWeightedTrainer(trainer_class):  # type: ignore[misc]
        _is_predicting = False

        def _get_num_items_in_batch(self, batches: list[Any], device: Any) -> Any:
            """In a validation nothing: the loss is the mean over the labels of this process's batch, which are summed
            later on, and not its part of a batch of all processes."""
            if self._is_predicting:
                return None
            return super()._get_num_items_in_batch(batches, device)

        def evaluation_loop(
            self,
            dataloader: Any,
            description: str,
            prediction_loss_only: bool | None = None,
            ignore_keys: list[str] | None = None,
            metric_key_prefix: str = "eval",
        ) -> Any:
            self._loss_sum, self._num_labels = 0.0, 0.0
            found = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            # DDP's processes have some of the rows each.
            self._loss_sum, self._num_labels = ranks.summed([self._loss_sum, self._num_labels])
            if self._num_labels:
                found.metrics[f"{metric_key_prefix}_loss"] = self._loss_sum / self._num_labels
            return found

        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            labels = inputs["labels"]
            # The first label of a causal model has no token before it that would predict it.
            counted = labels if is_seq2seq(self.model) else labels[..., 1:]
            number = int((counted != IGNORED).sum())
            self._is_predicting = True
            try:
                loss, *rest = super().prediction_step(model, inputs, *args, **kwargs)
            finally:
                self._is_predicting = False
            if number and loss is not None:
                self._loss_sum += float(loss) * number
                self._num_labels += number
            return (loss, *rest)

    return TokenWeightedTrainer


def measuring(trainer: Any, measure: Callable[[Any], Mapping[str, float]]) -> None:
    """Have a trainer's validations measure the model as well: what `measure` gives of it is logged beside the loss.

    It must draw no random numbers of training's stream, so that training goes on as if nothing had been measured. Of
    several processes the first one measures, and tells the others.
    """
    log = trainer.log

    def with_measures(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "eval_loss" in logs:  # one dictionary serves the log and the callbacks behind it
            model = trainer.accelerator.unwrap_model(trainer.model)
            found = ranks.shared(dict(measure(model)) if ranks.is_first() else None)
            logs.update({f"eval_{name}": value for name, value in found.items()})
        log(logs, *args, **kwargs)

    trainer.log = with_measures


def rewarded(
    trainer_class: type,
    *,
    validation: Encodings,
    score: Callable[[Sequence[int], Sequence[str]], Scored],
    stop_ids: Sequence[int],
    max_new_tokens: int,
) -> type:
    """The trainer class with the mean reward of greedy answers to the validation prompts as its evaluation.

    `score` gives totals and single rewards of answers to prompts by number. `eval_loss`, by which the best model is
    chosen, is that mean with its sign turned. Drawing random numbers is left to training, which goes on as if
    nothing had been validated.
    """

    class RewardedTrainer(trainer_class):  # type: ignore[misc]
        def evaluate(
            self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
        ) -> dict[str, float]:
            started = time.perf_counter()
            with self.accelerator.autocast():  # which a part of a prepared model does not bring along
                answers = generate(
                    self.accelerator.unwrap_model(self.model),
                    self.processing_class,
                    [list(encoding.input_ids) for encoding in validation],
                    max_new_tokens=max_new_tokens,
                    stop_ids=stop_ids,
                )
            scored = score(range(len(answers)), [answer.text for answer in answers])
            found = {"loss": -fmean(scored.totals)}
            for name, values in (("reward", scored.totals), *scored.columns.items()):
                of_all = name == "reward" and values is scored.totals
                found["reward" if of_all else f"rewards/{name}/mean"] = fmean(values)
                found["reward_std" if of_all else f"rewards/{name}/std"] = pstdev(values)
            found["completions/mean_length"] = fmean(len(answer.ids) for answer in answers)
            found["completions/clipped_ratio"] = fmean(a.finish_reason == "length" for a in answers)
            found["runtime"] = round(time.perf_counter() - started, 4)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
            # What a trainer averages of its steps since the last log stays for their own log.
            kept: Any = getattr(self, "_metrics", None)
            self._metrics: Any = {"train": {}, "eval": {}}
            self.log(metrics)
            self._metrics = kept
            self.control: Any = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
            return metrics

    return RewardedTrainer
