"""One optimizer step, so that it goes on when memory runs out and stops before a bad update, naming the rows.

Memory: what the step has done is taken back (gradients, random numbers, sums), its forward passes are made smaller,
and the same global batch is gone through again. The fullest batch of the whole run is tried before the first step, so
that memory runs out in the first minute or never. Numbers: losses and gradients are looked at before each update.

A row, or pair, weighs the same wherever it is: in a batch that is not full, and in the process that has fewer of them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith import ranks
from tunesmith.data.templates import IGNORED
from tunesmith.errors import TRAIN_IN_LESS, OutOfMemory, TrainingDiverged, counted, is_out_of_memory
from tunesmith.training.checkpoints import free_memory, not_finite
from tunesmith.training.run import Run

ROW = "row_number"
"""Key under which a batch carries the numbers of its rows, until a step takes them out."""

Splits = Literal["rows", "pairs", "passes"] | None
"""How a method's batch may be parted without changing its loss: by rows; by pairs whose better answers stand before
all the worse ones; `passes`, where the loss of a row depends on the others of its batch, so that the model reads the
batch in parts, each once more in the backward pass, and the loss is that of all likelihoods together; or not at all."""

NAMED = 16
"""Rows that an error names."""

TOLD = (
    "_metrics", "_stored_metrics", "_total_train_tokens", "_loss_sum", "_num_labels", "_step",
    "_current_train_step_time",
)  # fmt: skip
"""What a forward pass counts, and has to count anew when it is repeated."""

SOON = 2
"""Steps whose batches need not be tried beforehand: they come soon enough."""


@dataclass(frozen=True)
class Rehearsal:
    """The fullest batch of a run, to be tried before its first step."""

    rows: Sequence[Any]
    """As the trainer's data set gives them."""
    step: int
    """The step at which the run meets it."""
    states: int
    """Bytes that the optimizer's states will take beside it."""


class Abandoned(Exception):
    """A validation that was broken off because the run is to stop."""


class Numbered:
    """A data set whose rows know their numbers. Of a number below zero it is the row `-1 - number`, which fills a
    place (`order.Dealt`)."""

    total_dataset_length = 0
    """For accelerate, which would take rows of the last batch for repeated ones; those are known by their numbers."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.dataset[_place(number)], ROW: number}

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        fetch, places = getattr(self.dataset, "__getitems__", None), [_place(number) for number in numbers]
        rows = fetch(places) if fetch else [self.dataset[place] for place in places]
        return [{**row, ROW: number} for row, number in zip(rows, numbers, strict=True)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":  # asked for while being copied
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _place(number: int) -> int:
    return -1 - number if number < 0 else number


class Numbering:
    """A collator that carries the numbers of the rows into the batch. Rows that fill places stay out where there is
    another one."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: list[Any]) -> Any:
        """The batch, with the rows' numbers where they have any."""
        import torch

        if not rows or not isinstance(rows[0], dict) or ROW not in rows[0]:
            return self.collate(rows)
        rows = [row for row in rows if row[ROW] >= 0] or rows[:1]
        numbers = [row[ROW] for row in rows]
        batch = self.collate([{name: value for name, value in row.items() if name != ROW} for row in rows])
        if isinstance(batch, Mapping):
            return {**batch, ROW: torch.tensor(numbers)}
        return [{**row, ROW: number} for row, number in zip(batch, numbers, strict=True)]


def number_rows(trainer: Any) -> None:
    """Have a trainer's batches carry the numbers of their rows. PPO's do already."""
    data = trainer.train_dataset
    if len(data) and isinstance(data[0], dict) and not isinstance(data, Numbered):
        trainer.train_dataset = Numbered(data)
        trainer.data_collator = Numbering(trainer.data_collator)
        if trainer.eval_dataset is not None and ranks.count() > 1:
            trainer.eval_dataset = Numbered(trainer.eval_dataset)


def _fills(batch: Any) -> bool:
    """Whether a batch with numbers has but a row that fills a place."""
    numbers = batch.get(ROW) if isinstance(batch, Mapping) else None
    return numbers is not None and len(numbers) == 1 and int(numbers[0]) < 0


def _without_labels(batch: Any) -> Any:
    """A batch that fills a place, with no label that would count."""
    import torch

    if not _fills(batch) or "labels" not in batch:
        return batch
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}


def gather_unevenly(trainer: Any) -> None:
    """Have a trainer's measures be gathered from processes with different numbers of rows; a row that fills a place is
    left out."""
    accelerator = trainer.accelerator
    plain, objects = accelerator.gather, accelerator.gather_for_metrics

    def gather(value: Any, *given: Any, **named: Any) -> Any:
        import torch

        if not isinstance(value, torch.Tensor):
            return objects(value, *given, **named)
        if not value.dim():
            return plain(value * 0 if trainer._is_filling else value)
        if not trainer._is_uneven:
            return plain(value)
        own = value[:0] if trainer._is_filling else value
        sizes = plain(torch.tensor([len(own)], device=value.device)).tolist()
        even = value.new_zeros(max(sizes), *value.shape[1:])
        even[: len(own)] = own
        parts = plain(even).split(max(sizes)) if max(sizes) else ()
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]) if parts else own

    accelerator.gather = accelerator.gather_for_metrics = gather


def _taken_out(batch: Any) -> list[int]:
    """The numbers of a batch's rows, which it no longer carries afterwards."""
    if isinstance(batch, dict):
        numbers = batch.pop(ROW, batch.get("number", ()))
        # At once: on a GPU each number by itself would wait for the device.
        return [int(n) for n in (numbers.tolist() if hasattr(numbers, "tolist") else numbers)]
    return [int(row.pop(ROW)) for row in batch if isinstance(row, dict) and ROW in row]


def encoded_numbers(dataset: Any, number: int) -> list[int]:
    """Numbers of the encodings that a row of a trainer's data set was made of: a pair, a packed block, a prompt."""
    row = dataset[number]
    if not isinstance(row, dict):
        return [int(row)]
    if "examples" in row:
        return [int(n) for n in row["examples"]]
    if "pair" in row:
        return [2 * int(row["pair"])]
    if "row" in row:
        return [int(row["row"])]
    return [int(row["prompt"]) if "prompt" in row else number]


def named_rows(run: Run, input_rows: Sequence[int]) -> str:
    """Files and row numbers, from the running numbers of input rows; the ledger has one line for each."""
    wanted = set(input_rows)
    found: dict[int, str] = {}
    with (run.path / "ledger.jsonl").open(encoding="utf-8") as ledger:
        for number, line in enumerate(ledger):
            if number in wanted:
                entry = json.loads(line)
                found[number] = f"{entry['source']}:{entry['row']}"
    names = list(dict.fromkeys(found[n] for n in input_rows if n in found))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def size_of(batch: Mapping[str, Any], splits: Splits) -> int:
    """Rows, or pairs, of a batch."""
    ids = next(batch[name] for name in ("input_ids", "labels") if name in batch)
    return len(ids) // (2 if splits == "pairs" else 1)


def weight(batch: Mapping[str, Any], splits: Splits) -> float:
    """What a batch's mean loss weighs in a step: its labels, or its rows or pairs where it has none."""
    labels = batch.get("labels") if splits == "rows" else None
    return float((labels != IGNORED).sum()) if labels is not None else float(size_of(batch, splits))


def parted(forward: Callable[..., Any], rows: Callable[[int], int | None]) -> Callable[..., Any]:
    """A model's forward that gives likelihoods of labels, of at most so many rows at a time: `rows` is told how many
    there are, and says how many may be.

    Of each part nothing is kept for the backward pass, which runs it once more (arXiv 1604.06174), so that any loss of
    all likelihoods together has the gradient that it has in one pass.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    @functools.wraps(forward)
    def call(*given: Any, **named: Any) -> Any:
        ids = named.get("input_ids")
        if given or ids is None or not named.get("fused_lm_head"):
            return forward(*given, **named)
        size = len(ids)
        most = rows(size)
        if most is None or size <= most:
            return forward(**named)
        found = []
        for start in range(0, size, most):
            part = {
                name: value[start : start + most]
                if isinstance(value, torch.Tensor) and value.dim() and len(value) == size
                else value
                for name, value in named.items()
            }
            run = functools.partial(forward, **part)
            found.append(checkpoint(run, use_reentrant=False) if torch.is_grad_enabled() else run())
        if getattr(found[0], "aux_loss", None) is not None:
            raise OutOfMemory(
                "The memory is not enough for a batch, which cannot be parted.",
                found="the loss of its experts' router is a mean over the whole batch",
                fix=TRAIN_IN_LESS,
            )
        # A loss would be one of the parts; the trainers make theirs of the likelihoods.
        fields = {
            name: torch.cat([getattr(part, name) for part in found])
            for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")
            if getattr(found[0], name, None) is not None
        }
        return type(found[0])(**fields)

    return call


def parts(batch: Mapping[str, Any], splits: Splits, rows: int) -> Iterator[tuple[dict[str, Any], float]]:
    """A batch in parts of at most so many rows, each with its share in a loss that is a mean over the batch."""
    import torch

    size = size_of(batch, splits)
    labels = batch.get("labels") if splits == "rows" else None
    total = int((labels != IGNORED).sum()) if labels is not None else size
    for start in range(0, size, rows):
        end = min(start + rows, size)

        def cut(value: Any, start: int = start, end: int = end) -> Any:
            if not isinstance(value, torch.Tensor) or not value.dim():
                return value
            if len(value) == 2 * size and splits == "pairs":
                return torch.cat([value[start:end], value[size + start : size + end]])
            return value[start:end] if len(value) == size else value

        part = {name: cut(value) for name, value in batch.items()}
        own = int((part["labels"] != IGNORED).sum()) if labels is not None else end - start
        yield part, own / max(total, 1)


def guarded_steps(trainer_class: Any, run: Run, splits: Splits) -> Any:
    """The trainer class with steps that make do with less memory, and that know the rows they take."""
    from tunesmith.training import sharding, state  # load torch, which the methods' names do without

    class GuardedTrainer(trainer_class):  # type: ignore[misc]
        current_gradient_accumulation_steps: float
        splits: Splits
        _is_filling = False
        """Whether the batch under way fills a place."""
        _is_uneven = False
        """Whether the processes may have different numbers of rows in it."""
        _judged: Sequence[float] = (0.0, 0.0)
        """Of a validation on pairs in several processes: the sum of losses and the number of pairs."""
        _parted: Sequence[float] = ()
        """By what the mean loss of each batch of a step is divided, so that a row weighs the same in all of them."""
        _micro_rows: int | None = None
        """Most rows of a forward pass, once memory was not enough for all of a batch's."""
        _owes_evaluation = False
        """Whether the last validation was broken off."""
        _evaluation_rows: int | None = None
        """The same of a validation, where the model reads a batch in parts."""
        _widest = 0
        """Rows of the largest pass of a batch that the model may read in parts."""
        _writing = False
        """Whether answers were being written when memory ran out."""
        rehearsal: Rehearsal | None = None
        is_rehearsing = False
        stop_requested: Callable[[], bool] | None = None
        rows_of: Callable[[int], list[int]] | None = None
        """Gives the running numbers of the input rows behind a row of the training data; for errors."""

        def _get_num_items_in_batch(self, batches: list[Any], device: Any) -> Any:
            if ranks.count() > 1:
                batches[:] = [_without_labels(batch) for batch in batches]
            return super()._get_num_items_in_batch(batches, device)

        def get_batch_samples(self, *given: Any, **named: Any) -> Any:
            self._is_filling = self._is_uneven = False  # of the step before
            batches, items = super().get_batch_samples(*given, **named)
            fills = [_fills(batch) for batch in batches]
            self._numbers = [_taken_out(batch) for batch in batches]
            self._parted = []
            if items is None and splits in ("rows", "pairs"):
                own = [0.0 if fill else weight(b, splits) for b, fill in zip(batches, fills, strict=True)]
                [total] = ranks.summed([sum(own)])
                rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
                self._is_uneven = ranks.count() > 1 and total != rows * ranks.count()
                # DDP takes the mean over the processes.
                self._parted = [total / (part * ranks.count()) if part else math.inf for part in own]
            self._before: dict[str, Any] | None = None
            self._seen: list[Any] = []
            self._losses: list[Any] = []
            return batches, items

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            if not hasattr(self, "_seen"):  # called by itself, by a check
                self.get_batch_samples(iter([inputs]), 1, self.args.device)
            if self.rehearsal:
                self._rehearse(model)
            if self._before is None:
                self.may_go_back_here()
            self._seen.append(inputs)
            self._is_filling = any(n < 0 for place in self._numbers[len(self._seen) - 1 :][:1] for n in place)
            again = False
            while True:
                try:
                    for place in range(0 if again else len(self._seen) - 1, len(self._seen)):
                        loss = self._in_parts(model, place, num_items_in_batch)
                    break
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    said = str(error).strip().splitlines()
                # Out of the handler, so that nothing holds what the failed pass has computed.
                self._make_smaller(said[0] if said else "")
                model.zero_grad()
                self._rewind()
                again = True
            self._losses.append(loss)
            return loss

        def may_go_back_here(self) -> None:
            """A step that memory was not enough for is taken again from here."""
            self._before = {"random": state.randomness(), "told": _counted(self)}

        def _rehearse(self, model: Any) -> None:
            """Take the step of the fullest batch and undo it: what there is memory for is known from here on."""
            import torch

            rehearsal, self.rehearsal = self.rehearsal, None
            assert rehearsal is not None
            own = {
                name: getattr(self, name) for name in ("_seen", "_numbers", "_losses", "_before", "_parted")
            }
            [batch], items = super().get_batch_samples(
                iter([self.data_collator(list(rehearsal.rows))]), 1, self.args.device
            )
            _taken_out(batch)
            self.may_go_back_here()
            self._seen, self._losses, self._parted, self.is_rehearsing = [batch], [], [], True
            trained = [p for p in model.parameters() if p.requires_grad]
            held: list[Any] = []
            try:
                while True:
                    try:
                        # Instead of what is there when the batch comes: states, gradients of passes before.
                        states = 0 if self.optimizer is None or self.optimizer.state else rehearsal.states
                        held.append(torch.empty(states, dtype=torch.uint8, device=self.args.device))
                        if self.args.gradient_accumulation_steps > 1:
                            for parameter in trained:
                                parameter.grad = torch.zeros_like(parameter)
                        self._in_parts(model, 0, items)
                        break
                    except Exception as error:
                        if not is_out_of_memory(error):
                            raise
                        said = str(error).strip().splitlines()
                    held.clear()
                    self._make_smaller(said[0] if said else "", tried_for=rehearsal.step)
                    model.zero_grad()
                    self._rewind()
            finally:
                held.clear()
                self.is_rehearsing = False
            model.zero_grad()
            self._rewind()
            self.__dict__.update(own)

        def _in_parts(self, model: Any, place: int, num_items_in_batch: Any) -> Any:
            rows, inputs = self._micro_rows, self._seen[place]
            if splits == "passes":
                with self._passes():
                    return super().training_step(model, inputs, num_items_in_batch)
            before = self.current_gradient_accumulation_steps
            steps: float = self._parted[place] if place < len(self._parted) else before
            total: Any = 0.0
            try:
                if splits is None or rows is None or size_of(inputs, splits) <= rows:
                    self.current_gradient_accumulation_steps = steps
                    return super().training_step(model, inputs, num_items_in_batch)
                for part, share in parts(inputs, splits, rows):
                    if not share:
                        continue
                    # The Trainer divides by it where a loss is a mean over its batch, and only there.
                    self.current_gradient_accumulation_steps = steps / share
                    total = total + super().training_step(model, part, num_items_in_batch)
            finally:
                self.current_gradient_accumulation_steps = before
            return total

        def _track_num_input_tokens(self, inputs: Any) -> None:
            if self._is_filling and "attention_mask" in inputs:
                inputs = {**inputs, "attention_mask": inputs["attention_mask"] * 0}
            super()._track_num_input_tokens(inputs)

        @contextlib.contextmanager
        def _passes(self) -> Iterator[None]:
            """Have the models read a batch in parts where memory asks for it."""
            others = (getattr(self, name, None) for name in ("ref_model", "reference"))
            changed: list[tuple[Any, str, Any]] = []

            def rows(size: int) -> int | None:
                self._widest = max(self._widest, size)
                return self._micro_rows if self.model.training else self._evaluation_rows

            def put(module: Any, name: str, value: Any) -> None:
                changed.append((module, name, vars(module).get(name)))
                setattr(module, name, value)

            def write(generate: Callable[..., Any]) -> Callable[..., Any]:
                @functools.wraps(generate)
                def call(*given: Any, **named: Any) -> Any:
                    self._writing = True
                    found = generate(*given, **named)
                    self._writing = False
                    return found

                return call

            self._widest, self._writing = 0, False
            try:
                for module in (self.model, *(m for m in others if hasattr(m, "forward"))):
                    put(module, "forward", parted(module.forward, rows))
                if hasattr(self.model, "generate"):
                    put(self.model, "generate", write(self.model.generate))
                yield
            finally:
                for module, name, before in reversed(changed):
                    if before is None:
                        delattr(module, name)
                    else:
                        setattr(module, name, before)

        def _rewind(self) -> None:
            """Random numbers and counts as they were before the step."""
            assert self._before is not None
            state.set_randomness(self._before["random"])
            _count_back(self, self._before["told"])

        def _make_smaller(self, said: str, *, tried_for: int | None = None) -> None:
            """Halve the rows of a forward pass, and say so. Raises OutOfMemory where that is not possible."""
            free_memory()
            step = tried_for or self.state.global_step + 1
            if splits == "passes":
                rows = self._widest
            else:
                rows = max((size_of(batch, splits) for batch in self._seen), default=1) if splits else 1
            rows = min(rows, self._micro_rows or rows)
            if ranks.count() > 1:
                raise OutOfMemory(
                    f"The memory is not enough for step {step} in process {ranks.number()} of {ranks.count()}.",
                    found=f"the others are in the midst of this step, which one alone cannot take back; {said[:200]}",
                    fix=f"{TRAIN_IN_LESS[:-1]}; then resume.",
                )
            if self._writing or rows < 2:
                when = (
                    " of the run, whose batch is the fullest one and was tried before the first"
                    if tried_for
                    else ""
                )
                raise OutOfMemory(
                    f"The memory is not enough for step {step}{when}.",
                    found=f"{self._why_not_smaller(rows)}; {said[:200]}",
                    fix=TRAIN_IN_LESS,
                )
            self._micro_rows = rows // 2
            how = (
                f"with the {counted(rows, 'row')} of step {step}, the fullest batch of the run, which was tried before "
                "the first step; steps are taken in smaller passes"
                if tried_for
                else f"with {counted(rows, 'row')} in a forward pass; the step was taken back and is taken again in "
                "smaller passes"
            )
            run.event(
                "decision",
                step=self.state.global_step + 1,
                name="micro-batch",
                value=self._micro_rows,
                reason=f"memory ran out {how}, with the same rows for each update",
            )

        def _why_not_smaller(self, rows: int) -> str:
            if self._writing:
                return "answers were being written, and in smaller batches others would be drawn"
            if splits is None or (splits == "passes" and not rows):
                return "the loss of a row depends on the others of its batch, which so cannot be halved"
            seen = [batch for batch in self._seen if isinstance(batch, Mapping) and "input_ids" in batch]
            longest = max((batch["input_ids"].shape[-1] for batch in seen), default=None)
            what = "pair" if splits == "pairs" else "row"
            return (
                f"a single {what} of {longest} tokens is too much"
                if longest
                else f"a single {what} is too much"
            )

        def evaluate(self, *given: Any, **named: Any) -> Any:
            told = _counted(self)
            try:
                return super().evaluate(*given, **named)
            except Abandoned:
                _count_back(self, told)
                raise

        def evaluation_loop(self, *given: Any, **named: Any) -> Any:
            self._judged = [0.0, 0.0]
            found = super().evaluation_loop(*given, **named)
            self._is_filling = self._is_uneven = False
            if ranks.count() > 1 and splits == "pairs":
                loss, pairs = ranks.summed(self._judged)
                prefix = named.get("metric_key_prefix", given[4] if len(given) > 4 else "eval")
                found.metrics[f"{prefix}_loss"] = loss / pairs
            return found

        def prediction_step(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
            if self.stop_requested and self.stop_requested():
                raise Abandoned
            self._is_filling, self._is_uneven = _fills(inputs), ranks.count() > 1
            fills = self._is_filling
            inputs = {name: value for name, value in _without_labels(inputs).items() if name != ROW}
            if splits == "passes":
                return self._predicted(model, inputs, *given, **named)
            told = _counted(self)
            try:
                answer = super().prediction_step(model, inputs, *given, **named)
                if ranks.count() > 1 and splits == "pairs" and not fills:
                    pairs = size_of(inputs, splits)
                    self._judged = [self._judged[0] + float(answer[0]) * pairs, self._judged[1] + pairs]
                return answer
            except Exception as error:
                size = size_of(inputs, splits) if splits and is_out_of_memory(error) else 0
                if size < 2 or ranks.count() > 1:
                    raise
            _count_back(self, told)
            free_memory()
            run.event(
                "decision",
                step=self.state.global_step,
                name="validation batch",
                value=(size + 1) // 2,
                reason=f"memory ran out with {counted(size, 'row')}; they are validated in halves",
            )
            found = [
                (self.prediction_step(model, part, *given, **named), size_of(part, splits) / size)
                for part, _ in parts(inputs, splits, (size + 1) // 2)
            ]
            loss = sum(share * answer[0] for answer, share in found) if found[0][0][0] is not None else None
            return (loss, *(_joined([answer[place] for answer, _ in found]) for place in (1, 2)))

        def _predicted(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
            """A batch of a validation whose loss is that of all its rows, read by the model in parts if need be."""
            while True:
                told = _counted(self)
                try:
                    with self._passes():
                        return super().prediction_step(model, inputs, *given, **named)
                except Exception as error:
                    rows = min(self._widest, self._evaluation_rows or self._widest)
                    if not is_out_of_memory(error) or rows < 2:
                        raise
                _count_back(self, told)
                free_memory()
                self._evaluation_rows = rows // 2
                run.event(
                    "decision",
                    step=self.state.global_step,
                    name="validation batch",
                    value=self._evaluation_rows,
                    reason=f"memory ran out with {counted(rows, 'row')}; they are read in parts",
                )

        # What is no number

        def require_numbers(self, model: Any) -> None:
            """Raises TrainingDiverged before an update by a loss or a gradient that is no number, naming its rows."""
            import torch

            losses = getattr(self, "_losses", [])
            bad = [place for place, loss in enumerate(losses) if not math.isfinite(float(loss))]
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            # Under fp16 the loss scaler itself skips a step whose gradient is too large.
            good = (
                self.args.fp16
                or not gradients
                or torch.isfinite(sharding.plain(torch.nn.utils.get_total_norm(gradients)))
            )
            if good and not bad:
                return
            weight = not_finite(self.model)
            if ranks.count() > 1:
                # The gradient is that of all processes, so all of them are here, if it is the gradient.
                blamed = ranks.gathered((bad, self._numbers)) if not good else [(bad, self._numbers)]
                found = [n for places, numbers in blamed for place in places for n in numbers[place]]
                every = [n for _, numbers in blamed for part in numbers for n in part]
                self._numbers, bad = [[n for n in found or every if n >= 0]], [0] if found else []
            # DeepSpeed's backward pass ends with its update.
            updated = "had been updated by it" if self.is_deepspeed_enabled else "were not updated"
            what = "The weights are" if weight else "The loss is" if bad else "The gradient is"
            raise TrainingDiverged(
                f"{what} {'no longer numbers' if weight else 'not a number'} at step {self.state.global_step + 1}; "
                f"the weights {updated}.",
                found=self._blamed(bad or range(len(losses)), is_weight=bool(weight)),
                fix="The last good checkpoint is kept. Look at these rows with `tunesmith inspect`, lower "
                "training.learning_rate, raise warmup_steps, or use bf16 instead of fp16.",
            )

        def _blamed(self, places: Sequence[int], *, is_weight: bool) -> str | None:
            """The rows of some forward passes of the step by file and number, those that are bad alone where any is."""
            numbers = [n for place in places if place < len(self._numbers) for n in self._numbers[place]]
            # One of several processes cannot try rows by itself: what is counted of a loss is counted by all of them.
            is_alone = ranks.count() == 1 and not is_weight and splits in ("rows", "pairs")
            alone = self._bad_alone(places) if is_alone else []
            if self.rows_of is None or not numbers:
                return None
            rows = [row for number in alone or numbers for row in self.rows_of(number)]
            return f"{'rows' if len(rows) != 1 else 'row'} {named_rows(run, rows)}"

        def _bad_alone(self, places: Sequence[int]) -> list[int]:
            import torch

            found = []
            told = _counted(self)
            with torch.no_grad(), state.undisturbed(), self.compute_loss_context_manager():
                for place in places:
                    batch = self._prepare_inputs(self._seen[place])
                    if size_of(batch, splits) != len(self._numbers[place]):
                        continue  # rows flattened into one
                    for number, (part, _) in zip(self._numbers[place], parts(batch, splits, 1), strict=False):
                        if not math.isfinite(float(self.compute_loss(self.model, part))):
                            found.append(number)
            _count_back(self, told)
            return found

    GuardedTrainer.splits = splits
    return GuardedTrainer


def _counted(trainer: Any) -> dict[str, Any]:
    """Where the counts of a trainer stand: numbers as they are, lists by their lengths."""
    return {name: _lengths(getattr(trainer, name)) for name in TOLD if hasattr(trainer, name)}


def _lengths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lengths(inner) for key, inner in value.items()}
    return len(value) if isinstance(value, list) else value


def _count_back(trainer: Any, told: Mapping[str, Any]) -> None:
    """Take back what was counted since."""
    for name, then in told.items():
        if isinstance(then, dict):
            _shorten(getattr(trainer, name), then)
        else:
            setattr(trainer, name, then)


def _shorten(value: dict[Any, Any], then: Mapping[Any, Any]) -> None:
    for key in list(value):
        if isinstance(value[key], dict):
            _shorten(value[key], then.get(key, {}))
        elif isinstance(value[key], list):
            del value[key][then.get(key, 0) :]
            if not value[key]:
                del value[key]


def _joined(values: Sequence[Any]) -> Any:
    import torch

    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if len(tensors) != len(values) or len({t.shape[1:] for t in tensors}) != 1:
        return None
    return torch.cat(tensors)
