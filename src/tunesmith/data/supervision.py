"""The supervision proof: what every training row has to fulfill before step 1.

The checks look at token ids and labels, not at what made them, so a template or a tokenizer that does the
unexpected is found out whatever the cause. Only what inference is fed is asked of the code that feeds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.examples import Conversation, Example, Row, Text, Unusable
from tunesmith.data.preferences import PAIR_CHECKS, pair_breach
from tunesmith.data.templates import (
    IGNORED,
    PROBES,
    Encoder,
    Encoding,
    LossOn,
    as_message,
    asked,
    encode_batches,
    end_of_turn_ids,
    has_special_text,
)
from tunesmith.errors import DataError

CHECKS = {
    "trained_tokens": "every row has a trained token",
    "whole_answers": "truncation removes no whole answer",
    "end_of_turn": "the end-of-turn token of every trained turn has a label",
    "one_bos": "a row begins with one BOS where the model wants one, and has no other",
    "prompt": "a row's prompt is what the model is fed when it is asked",
}
"""The checks by name, in the order in which they are made."""

SAMPLE = 500
"""Rows whose prompt is built once more as for inference: all of a smaller set, else evenly spread ones."""
SHOWN = 10


class Proof:
    """Checks encodings batch by batch, and keeps what it found."""

    def __init__(
        self, context: Encoder, *, loss_on: LossOn, max_length: int, may_cut_answers: bool, rows: int
    ) -> None:
        tokenizer = context.tokenizer
        self.context, self.loss_on, self.max_length = context, loss_on, max_length
        self.may_cut_answers = may_cut_answers
        self.ends = np.array(end_of_turn_ids(tokenizer), dtype=np.int32)
        self.bos = tokenizer.bos_token_id
        if self.bos in self.ends or self.bos == tokenizer.pad_token_id:
            self.bos = None  # the token has another meaning as well, so counting it would prove nothing
        self.step = max(rows // SAMPLE, 1)
        self.checked = dict.fromkeys(CHECKS, 0)
        self.breaches: dict[str, list[Row]] = {}
        self.counts: dict[str, int] = {}
        self.served_otherwise = 0
        self.pairs = 0
        self._last: dict[str, Row] = {}

    def check(
        self, numbers: Sequence[int], examples: Sequence[Example], encodings: Sequence[Encoding]
    ) -> list[str | None]:
        """Why each uncut encoding fails, None where it is right. `numbers` are the rows' running numbers."""
        if not encodings:
            return []
        lengths = np.array([len(encoding.input_ids) for encoding in encodings])
        ids, labels = flat(encodings, "input_ids"), flat(encodings, "labels")
        starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
        row = np.repeat(np.arange(len(encodings)), lengths)
        place = np.arange(len(ids)) - starts[row]
        trained = labels != IGNORED
        is_first, is_last = place == 0, place == lengths[row] - 1
        begins = trained & (is_first | ~np.concatenate(([False], trained[:-1])))
        ends = trained & (is_last | ~np.concatenate((trained[1:], [False])))
        is_text = np.array([isinstance(example, Text) for example in examples])
        count = len(encodings)

        def rows_with(places: NDArray[Any]) -> NDArray[Any]:
            return np.bincount(row[places], minlength=count) > 0

        failed = {"trained_tokens": ~rows_with(trained)}
        lost = rows_with(begins & (place >= self.max_length)) & ~is_text
        if self.loss_on == "everything":  # labels do not tell where answers begin
            for n in np.flatnonzero((lengths > self.max_length) & ~is_text).tolist():
                lost[n] = self._begins_late(examples[n])
        if self.may_cut_answers:
            lost &= ~rows_with(trained & (place < self.max_length))  # some of one has to stay all the same
        failed["whole_answers"] = lost
        if self.loss_on == "everything":
            failed["end_of_turn"] = ~rows_with(trained & np.isin(labels, self.ends))
        else:
            failed["end_of_turn"] = rows_with(ends & ~np.isin(labels, self.ends)) & ~is_text
        if self.bos is not None:
            is_bos = ids == self.bos
            wanted = np.array([self._wants_bos(bool(text)) for text in is_text])
            failed["one_bos"] = (np.bincount(row[is_bos], minlength=count) != wanted) | rows_with(
                is_bos & (place > 0)
            )
        sampled = [n for n, number in enumerate(numbers) if number % self.step == 0]
        failed["prompt"] = np.zeros(count, dtype=bool)
        for n in sampled:
            failed["prompt"][n] = not self._is_asked(examples[n], encodings[n])
        for name in failed:
            self.checked[name] += len(sampled) if name == "prompt" else count
        found: list[str | None] = [None] * count
        for name, wrong in failed.items():
            for n in np.flatnonzero(wrong).tolist():
                found[n] = found[n] or self._reason(name)
        for n, reason in enumerate(found):
            if reason:
                self._count(reason, examples[n].row)
        return found

    def check_pair(self, row: Row, good: Encoding, bad: Encoding) -> str | None:
        """Why the two answers of a preference cannot be compared, None where they can."""
        self.pairs += 1
        name = pair_breach(good, bad, self.max_length)
        if name is None:
            return None
        reason = {
            "shared_prompt": "the prompt's tokens differ between chosen and rejected answer",
            "different_answers": "chosen and rejected answer are the same tokens"
            + (
                f" within max_length {self.max_length}"
                if max(len(good.labels), len(bad.labels)) > self.max_length
                else ""
            ),
        }[name]
        self._count(reason, row)
        return reason

    def _count(self, reason: str, row: Row) -> None:
        """Keep that a row fails, once for all of its encodings."""
        if self._last.get(reason) == row:
            return
        self._last[reason] = row
        self.counts[reason] = self.counts.get(reason, 0) + 1
        kept = self.breaches.setdefault(reason, [])
        if len(kept) < SHOWN:
            kept.append(row)

    def _reason(self, name: str) -> str:
        return {
            "trained_tokens": "no token is trained",
            "whole_answers": f"max_length {self.max_length} cuts away a whole answer",
            "end_of_turn": "a trained turn has no label on its end-of-turn token",
            "one_bos": "the row does not begin with exactly one BOS"
            if self._wants_bos(False)
            else "the row has a BOS, and the model is asked without one",
            "prompt": "the prompt's tokens are not those that the model is fed when asked",
        }[name]

    def _begins_late(self, example: Example) -> bool:
        """Whether an answer begins behind the longest row."""
        [(_, [encoding])] = encode_batches([[example]], self.context, loss_on="answers", ahead=False)
        if isinstance(encoding, Unusable):
            return False
        trained = np.asarray(encoding.labels) != IGNORED
        return bool((trained & ~np.concatenate(([False], trained[:-1])))[self.max_length :].any())

    def _wants_bos(self, is_text: bool) -> bool:
        if not hasattr(self, "_openings"):
            tokenizer = self.context.tokenizer
            opened: list[int] = []
            for probe in PROBES if tokenizer.chat_template else ():
                try:
                    opened = asked(probe[:-1], self.context)
                    break
                except Unusable:
                    continue
            self._openings = (opened[:1] == [self.bos], tokenizer("a").input_ids[:1] == [self.bos])
        return self._openings[is_text]

    def _is_asked(self, example: Example, encoding: Encoding) -> bool:
        """Whether the row's ids up to its last answer are those of the question, as both paths ask it."""
        if not isinstance(example, Conversation) or example.messages[-1].role != "assistant":
            return True
        turns = example.messages[:-1]
        try:
            ids = tuple(asked(turns, self.context, example.tools))
        except Unusable:
            return False
        if not has_special_text(example, self.context):
            # transformers itself would take such text for the token; servers that do are not to be copied.
            served = self.context.tokenizer.apply_chat_template(
                [as_message(turn, self.context) for turn in turns],
                tools=list(example.tools) or None,
                add_generation_prompt=True,
                return_dict=False,
            )
            self.served_otherwise += tuple(served) != ids
        length = len(ids)
        if tuple(encoding.input_ids[:length].tolist()) != ids:
            return False
        if self.loss_on == "everything" or example.messages[-1].trained is False:
            return True
        begins = encoding.labels[length] != IGNORED
        return bool(begins and (length == 0 or encoding.labels[length - 1] == IGNORED))

    def found(self) -> dict[str, Any]:
        """What was checked and what failed, as JSON holds it, for `include`."""
        return {
            "checked": self.checked,
            "counts": self.counts,
            "breaches": {reason: [list(row) for row in rows] for reason, rows in self.breaches.items()},
            "served_otherwise": self.served_otherwise,
            "pairs": self.pairs,
        }

    def include(self, found: Mapping[str, Any]) -> None:
        """Count what was found of later rows elsewhere."""
        for name, number in found["checked"].items():
            self.checked[name] += number
        for reason, number in found["counts"].items():
            self.counts[reason] = self.counts.get(reason, 0) + number
            kept = self.breaches.setdefault(reason, [])
            kept += [Row(*row) for row in found["breaches"][reason]][: SHOWN - len(kept)]
        self.served_otherwise += found["served_otherwise"]
        self.pairs += found["pairs"]

    def finish(self, *, on_breach: str) -> None:
        """Raises DataError that names the rows, unless they may be dropped."""
        if not self.counts or on_breach == "drop":
            return
        total = sum(self.counts.values())
        lines = [
            f"{count} × {reason}: {', '.join(str(row) for row in self.breaches[reason])}"
            + (f" and {count - SHOWN} more" if count > SHOWN else "")
            for reason, count in self.counts.items()
        ]
        cut = self._reason("whole_answers") in self.counts
        raise DataError(
            f"{total} row{'s fail' if total > 1 else ' fails'} the supervision proof; nothing was trained.",
            found="\n         ".join(lines),
            fix=(
                "Raise --max-length, or allow it with --set data.over_long=truncate_answers. " if cut else ""
            )
            + "`tunesmith inspect` shows what the model sees; --set data.on_breach=drop leaves such rows out.",
        )

    def as_dict(self) -> dict[str, Any]:
        """What was checked on how many rows, and what failed."""
        notes: Mapping[str, Any] = (
            {} if self.bos is not None else {"one_bos": "the tokenizer has no BOS of its own: not checked"}
        )
        return {
            "checks": [
                {"name": name, "about": about, "rows": self.checked[name]}
                | ({"note": notes[name]} if name in notes else {})
                for name, about in CHECKS.items()
            ]
            + [
                {"name": name, "about": about, "rows": self.pairs}
                for name, about in PAIR_CHECKS.items()
                if self.pairs
            ],
            "breaches": [
                {"reason": reason, "rows": count, "first": [str(row) for row in self.breaches[reason]]}
                for reason, count in self.counts.items()
            ],
            "served_otherwise": self.served_otherwise,
        }


def flat(encodings: Sequence[Encoding], name: str) -> NDArray[np.int32]:
    """The ids or labels of all encodings, one behind the other."""
    return np.concatenate([getattr(encoding, name) for encoding in encodings])
