"""Kahneman-Tversky optimization through TRL's KTOTrainer, on answers whose tokens are already settled."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from tunesmith.data.cache import Encodings
from tunesmith.data.preferences import answer_begins
from tunesmith.errors import DataError
from tunesmith.methods import preferred
from tunesmith.recipe import KTO
from tunesmith.training.checkpoints import keeping_run_folder
from tunesmith.training.run import Run

LEAST, MOST = 1.0, 4 / 3
"""Bounds of the total weight of good answers to that of bad ones, equation 8 of arXiv 2402.01306."""


def build(
    section: KTO,
    *,
    model: Any,
    tokenizer: Any,
    train: Encodings,
    validation: Encodings,
    arguments: Mapping[str, Any],
    run: Run,
    keep: int,
    packing: Any = None,
    fast: bool = True,
) -> Any:
    """A trainer that has not started. Each of its rows is one answer; TRL prepares nothing.

    Raises DataError where all answers are good, or all are bad.
    """
    from trl import KTOConfig, KTOTrainer

    assert packing is None, "answers are judged one by one; compose refuses packing before"
    desirable, undesirable = weights(section, sum(map(bool, train.good)), len(train), run)
    reference, precompute = preferred.reference(section, model, run)
    preferred.dropout_decision(run, preferred.own_dropout(model))
    config = KTOConfig(
        **arguments,
        loss_type=section.loss,
        beta=section.beta,
        desirable_weight=desirable,
        undesirable_weight=undesirable,
        precompute_ref_log_probs=precompute,
        max_length=None,
    )
    columns = {"ref_logps": 0, "ref_KL_logps": 1}
    sides = preferred.Sides(train, validation)
    with preferred.one_adapter(model):
        own = preferred.settled(KTOTrainer, columns, fast=run if fast else None)
        trainer = keeping_run_folder(own, run, keep=keep, splits="passes")(
            model=model,
            ref_model=reference,
            args=config,
            processing_class=tokenizer,
            train_dataset=preferred.numbered("train", "row", shuffled(len(train), config.seed)),
            eval_dataset=preferred.numbered("validation", "row", shuffled(len(validation), config.seed))
            if validation
            else None,
            data_collator=collator(
                sides,
                {"train": train.good, "validation": validation.good if validation else []},
                tokenizer,
                limit=max(int(part.lengths.max()) for part in (train, validation) if part),
            ),
        )
    if precompute:
        trainer.ref_model = None  # it has said what it had to say
    return trainer


def shuffled(count: int, seed: int) -> list[int]:
    """Numbers of answers in the one order in which every epoch meets them.

    TRL wants a fixed order, in which an answer's neighbour in its batch serves for the KL. The two answers of one
    preference stand beside each other in the data and must not be such neighbours.
    """
    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    return numbers


def weights(section: KTO, good: int, total: int, run: Run) -> tuple[float, float]:
    """Weights of good and of bad answers, and a warning where given ones leave them out of balance."""
    bad = total - good
    if not good or not bad:
        raise DataError(
            f"KTO needs good and bad answers, and all {total} training answers are {'good' if good else 'bad'}.",
            fix="Give answers of both kinds, or imitate the good ones with the method sft.",
        )
    desirable, undesirable = section.desirable_weight, section.undesirable_weight
    is_open = desirable is None and undesirable is None
    if is_open and good < LEAST * bad:
        desirable = bad / good
    elif is_open and good > MOST * bad:
        undesirable = good / bad
    found = (desirable or 1.0, undesirable or 1.0)
    ratio = found[0] * good / (found[1] * bad)
    if is_open:
        run.event(
            "decision",
            name="weights",
            value=f"{found[0]:.3g} good, {found[1]:.3g} bad",
            reason=f"{good} good and {bad} bad answers come to {ratio:.2f} to 1",
        )
    elif not LEAST * 0.99 <= ratio <= MOST * 1.01:
        run.event(
            "warning",
            message=f"Good answers weigh {ratio:.2f} times as much as bad ones ({good} and {bad} of them); KTO's paper "
            "found 1 to 1.33 best. Leave desirable_weight and undesirable_weight out to have them balanced.",
        )
    return found


def collator(
    sides: preferred.Sides, good: Mapping[str, list[bool | None]], tokenizer: Any, *, limit: int
) -> preferred.Collate:
    """Makes a batch of answers as TRL's own collator does, with the answers turned round by one for the KL.

    The answer of the row before, the last one's for the first, stands behind each prompt; a batch of one row takes
    that of the next row of the data. Of a long prompt with a long answer behind it what is beyond `limit` tokens is
    cut, as TRL cuts it: nothing may be longer than the rows themselves, for which there is room.
    """

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        own = [sides(row["part"], row["row"]) for row in rows]
        answers = [own[-1], *own[:-1]]
        if len(rows) == 1:
            [row] = rows
            answers = [sides(row["part"], (row["row"] + 1) % len(good[row["part"]]))]
        batch = preferred.masked(own, tokenizer.pad_token_id)
        turned = [_behind(prompt, answer, limit) for prompt, answer in zip(own, answers, strict=True)]
        other = preferred.masked(turned, tokenizer.pad_token_id)
        batch |= {f"KL_{name}": value for name, value in other.items()}
        batch["label"] = torch.tensor([bool(good[row["part"]][row["row"]]) for row in rows])
        for name in ("ref_logps", "ref_KL_logps"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch

    return collate


def _behind(
    prompt: tuple[list[int], list[int]], answer: tuple[list[int], list[int]], limit: int
) -> tuple[list[int], list[int]]:
    """The first one's prompt with the other one's answer behind it, together at most `limit` tokens."""
    (ids, labels), (other_ids, other_labels) = prompt, answer
    begin, start = answer_begins(labels), answer_begins(other_labels)
    return (ids[:begin] + other_ids[start:])[:limit], (labels[:begin] + other_labels[start:])[:limit]
