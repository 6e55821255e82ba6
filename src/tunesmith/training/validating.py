"""Validation loss as one mean over all labels, whatever the batches."""

from __future__ import annotations

from typing import Any

from tunesmith.data.templates import IGNORED
from tunesmith.models import is_seq2seq


def token_weighted(trainer_class: type) -> type:
    """The trainer class with `eval_loss` in nats per label: losses and labels are summed over the whole
    evaluation, and divided once.

    The trainers' own is the mean of the means of their batches, in which a token of a short answer weighs more,
    and which changes with the batch size. The best model and early stopping follow this loss.
    """

    class TokenWeightedTrainer(trainer_class):  # type: ignore[misc]
        def evaluation_loop(
            self,
            dataloader: Any,
            description: str,
            prediction_loss_only: bool | None = None,
            ignore_keys: list[str] | None = None,
            metric_key_prefix: str = "eval",
        ) -> Any:
            self._loss_sum, self._num_labels = 0.0, 0
            found = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            if self._num_labels:
                found.metrics[f"{metric_key_prefix}_loss"] = self._loss_sum / self._num_labels
            return found

        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            labels = inputs["labels"]
            # The first label of a causal model has no token before it that would predict it.
            counted = labels if is_seq2seq(self.model) else labels[..., 1:]
            number = int((counted != IGNORED).sum())
            loss, *rest = super().prediction_step(model, inputs, *args, **kwargs)
            if number and loss is not None:
                self._loss_sum += float(loss) * number
                self._num_labels += number
            return (loss, *rest)

    return TokenWeightedTrainer
