"""Prompts: what a model is asked by methods that learn from rewards, and the answer that is known for it.

Of a row that has an answer all turns before the last one are asked, and that one is the reference. Rows share
their split with the same rows in supervised fine-tuning, so that one can follow the other on the same data.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data import (
    BATCH,
    EncodedSplits,
    Splits,
    batched,
    rarely_collected,
    shown_progress,
    stored,
)
from tunesmith.data.cache import SplitsWriter
from tunesmith.data.examples import (
    Conversation,
    Example,
    LedgerEntry,
    Message,
    Preference,
    Prompt,
    Rating,
    Row,
    Text,
    Unusable,
)
from tunesmith.data.splitting import HELD_OUT
from tunesmith.data.supervision import SAMPLE, SHOWN
from tunesmith.data.templates import (
    IGNORED,
    Encoder,
    Encoding,
    as_message,
    asked,
    encode_batches,
    encoder,
    has_special_text,
)
from tunesmith.errors import DataError, counted
from tunesmith.recipe import Data

CHECKS = {
    "prompt": "a prompt's tokens are those of the question where the model is trained on its answer",
    "room": "a prompt leaves room for an answer",
}
"""The checks of prompts by name."""


def questioned(example: Example) -> Example:
    """The example as a question with the answer that is known for it, if any: of a preference the chosen one, of a
    rating a good one.

    Raises Unusable for running text.
    """
    match example:
        case Text():
            raise Unusable("running text asks nothing")
        case Preference(prompt=prompt, chosen=answer) | Rating(prompt=prompt, completion=answer, label=True):
            turns = (*prompt, *answer)
            return Conversation(turns, row=example.row, group=example.group, extra=example.extra)
        case Rating(prompt=prompt):
            return Prompt(prompt, "", row=example.row, group=example.group, checks=example.extra)
        case _:
            return example


REMARKS: dict[type[Example], str] = {
    Preference: "of each preference pair the prompt is asked, with the chosen answer as reference",
    Rating: "of each rated answer the prompt is asked, with a good answer as reference",
}
"""What to say of data sets with examples of a shape that is not used as it is."""


def prompt_of(example: Example) -> Prompt | None:
    """The last question of an example with its answer as reference; None where nothing is asked."""
    if isinstance(example, Prompt):
        return example
    if not isinstance(example, Conversation):
        return None
    answers = [n for n, message in enumerate(example.messages) if message.role == "assistant"]
    if not answers:
        return None
    last = answers[-1]
    return Prompt(
        messages=example.messages[:last],
        reference=example.messages[last].content,
        row=example.row,
        group=example.group,
        checks=example.extra,
        tools=example.tools,
    )


def encoded(splits: Splits, tokenizer: Any, *, data: Data, room: int) -> EncodedSplits:
    """The prompts of all splits as token ids, none of them with a label; `examples` of each split has the prompts.

    A prompt that does not leave `room` tokens within `data.max_length` is dropped; none is ever cut. Raises
    DataError where the recipe refuses such rows (`data.over_long: error`), where a prompt fails its proof and may
    not be dropped, and where none remains.
    """
    return stored(
        splits,
        tokenizer,
        data,
        {"prompts": True, "room": room},
        lambda folder: _encode_into(folder, splits, encoder(tokenizer), data=data, room=room),
    )


class _Proof:
    """Compares prompts with what training on their answers would show, and keeps what it found."""

    def __init__(self, context: Encoder, *, rows: int) -> None:
        self.context, self.step = context, max(rows // SAMPLE, 1)
        self.compared = self.rows = self.served_otherwise = 0
        self.failed: list[Row] = []

    def check(self, number: int, example: Example, prompt: Prompt, ids: list[int]) -> str | None:
        """Why a prompt fails, None where it is right; all of a smaller set are compared, else a sample."""
        self.rows += 1
        if number % self.step:
            return None
        self.compared += 1
        if not has_special_text(prompt, self.context):
            served = self.context.tokenizer.apply_chat_template(
                [as_message(turn, self.context) for turn in prompt.messages],
                tools=list(prompt.tools) or None,
                add_generation_prompt=True,
                return_dict=False,
            )
            self.served_otherwise += list(served) != ids
        # Where no answer is known any will do: it is the place behind the prompt that counts.
        turn = Message("assistant", "a")
        if isinstance(example, Conversation):
            turn = example.messages[len(prompt.messages)]._replace(trained=None)
        answered = Conversation((*prompt.messages, turn), row=prompt.row, tools=prompt.tools)
        [(_, [encoding])] = encode_batches([[answered]], self.context, loss_on="last_answer", ahead=False)
        if isinstance(encoding, Encoding):
            labels = np.asarray(encoding.labels)
            begins = int(np.argmax(labels != IGNORED))
            if encoding.input_ids[:begins].tolist() == ids:
                return None
        self.failed.append(prompt.row)
        return "the prompt's tokens are not those before its answer when that is trained"

    def finish(self, *, on_breach: str) -> None:
        """Raises DataError that names the rows, unless they may be dropped."""
        if not self.failed or on_breach == "drop":
            return
        more = f" and {len(self.failed) - SHOWN} more" if len(self.failed) > SHOWN else ""
        raise DataError(
            f"The tokens of {counted(len(self.failed), 'prompt')} are not those before the answer in training; "
            "nothing was trained.",
            found=", ".join(map(str, self.failed[:SHOWN])) + more,
            fix="The chat template writes a question otherwise once it is answered: give another with "
            "--chat-template, or leave such rows out with --set data.on_breach=drop.",
        )

    def as_dict(self) -> dict[str, Any]:
        """What was checked on how many rows, and what failed."""
        checked = {"prompt": self.compared, "room": self.rows}
        reason = "the prompt's tokens are not those before its answer when that is trained"
        failed = [
            {"reason": reason, "rows": len(self.failed), "first": [str(r) for r in self.failed[:SHOWN]]}
        ]
        return {
            "checks": [
                {"name": name, "about": about, "rows": checked[name]} for name, about in CHECKS.items()
            ],
            "breaches": failed if self.failed else [],
            "served_otherwise": self.served_otherwise,
        }


@rarely_collected()
def _encode_into(folder: Path, splits: Splits, context: Encoder, *, data: Data, room: int) -> dict[str, Any]:
    """Write the prompts of all splits; the facts about them."""
    proof = _Proof(context, rows=len(splits.fates))
    counts, too_long = Counter[str](), list[str]()
    crowded = f"the prompt leaves no room for an answer of {room} tokens within max_length {data.max_length}"
    with SplitsWriter(folder) as written:
        rows = shown_progress(splits.rows(), "tokenizing", total=len(splits.fates))
        for batch in batched(rows, BATCH):
            entries: list[LedgerEntry] = []
            kept: list[tuple[int, LedgerEntry, list[Encoding]]] = []
            for number, row, example in batch:
                entry = splits.entry(number, row)
                prompt = prompt_of(example) if example is not None else None
                if example is None or prompt is None:
                    entries.append(entry)
                    continue
                counts["special"] += has_special_text(prompt, context)
                counts["unanswered"] += not prompt.reference
                try:
                    ids = asked(prompt.messages, context, prompt.tools)
                except Unusable as reason:
                    entries.append(_dropped(entry, str(reason)))
                    continue
                entry = entry._replace(tokens=len(ids))
                if splits.fates[number] == HELD_OUT:
                    written.hold_out(example)
                elif len(ids) + room > data.max_length:
                    entry = _dropped(entry, crowded)
                    too_long.append(f"{row} ({len(ids)} tokens)")
                elif breach := proof.check(number, example, prompt, ids):
                    entry = _dropped(entry, breach)
                else:
                    array = np.array(ids, dtype=np.int32)
                    kept.append((number, entry, [Encoding(array, np.full_like(array, IGNORED))]))
                    written.ask(prompt, entry)
                entries.append(entry)
            written.write(entries, kept)
    if too_long and data.over_long == "error":
        raise DataError(
            f"{counted(len(too_long), 'prompt')} leave no room for an answer of {room} tokens.",
            found=", ".join(too_long[:SHOWN]) + f", with max_length {data.max_length}",
            fix="Raise --max-length, lower method.max_new_tokens, or drop them with data.over_long=drop.",
        )
    proof.finish(on_breach=data.on_breach)
    fix = "Raise --max-length, or lower method.max_new_tokens."
    facts = written.facts(rows=len(splits.fates), fix=fix)
    return {**facts, "proof": proof.as_dict(), "notes": _notes(counts, len(too_long), crowded)}


def _dropped(entry: LedgerEntry, reason: str) -> LedgerEntry:
    """The ledger's line of a row that is dropped after all."""
    return entry._replace(fate="dropped", reason=reason)


def _notes(counts: Counter[str], crowded: int, reason: str) -> list[str]:
    notes = []
    if crowded:
        notes.append(f"{counted(crowded, 'row')} dropped: {reason}; prompts are never cut")
    if counts["special"]:
        said = "contains" if counts["special"] == 1 else "contain"
        notes.append(
            f"{counted(counts['special'], 'prompt')} {said} the text of a special token; it is kept as plain text"
        )
    if counts["unanswered"]:
        notes.append(
            f"{counted(counts['unanswered'], 'prompt')} without a reference: rewards that compare with one "
            "cannot score them"
        )
    return notes
