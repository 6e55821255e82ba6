"""Data: from a file of any layout to token ids, with an account of every row.

sources (rows) -> formats (examples) -> splitting (roles) -> templates (token ids and labels)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.data.examples import Example, Ledger, LedgerEntry, Row, Splits, Text, Unusable
from tunesmith.data.formats import convert, detect, numbers_as_text, unused_columns
from tunesmith.data.sources import read
from tunesmith.data.splitting import split
from tunesmith.data.templates import IGNORED, Encoding, LossOn, encode_all, special_texts
from tunesmith.errors import DataError
from tunesmith.recipe import Data

__all__ = ["EncodedSplits", "Splits", "encoded", "ledger_lines", "prepare"]


@dataclass(frozen=True)
class EncodedSplits:
    """What is trained and validated on as token ids, what is measured on as examples, and the ledger."""

    train: tuple[Encoding, ...]
    validation: tuple[Encoding, ...]
    held_out: tuple[Example, ...]
    ledger: Ledger
    notes: tuple[str, ...] = ()


def prepare(data: Data) -> Splits:
    """Read, convert and split a data set. Raises DataError for what cannot be read or used."""
    source = read(
        data.dataset,
        config=data.config,
        split=data.split,
        data_files=data.data_files,
        revision=data.revision,
        max_rows=data.max_rows,
    )
    detection = detect(
        source, format=data.format, input_text_key=data.input_text_key, output_text_key=data.output_text_key
    )
    pairs, dropped = convert(source, detection, system_prompt=data.system_prompt, group_by=data.group_by)
    splits = split(pairs, dropped, validation=data.validation, held_out=data.held_out)
    names = " and ".join(f"'{format.name}'" for format in detection.formats)
    groups = len({example.group for _, example in pairs} - {None})
    notes = [*source.notes, f"rows are read as {names}: {detection.reason}", *splits.notes]
    unused = [name for name in unused_columns(source, detection) if name != data.group_by]
    if unused:
        notes.append(f"columns that no example is made of: {', '.join(unused)}")
    numbers = numbers_as_text(source, detection)
    if numbers:
        notes.append(f"{numbers} rows have a number where text is expected; it is written out")
    if groups:
        notes.append(f"{groups} groups of rows stay whole in one split")
    return replace(splits, notes=tuple(notes))


def encoded(splits: Splits, tokenizer: Any, *, data: Data, loss_on: LossOn) -> EncodedSplits:
    """Token ids and labels of all splits, with over-long examples treated as the recipe says.

    No training example is left without a trained token. Raises DataError where the recipe refuses
    over-long examples, or where none remains.
    """
    fates: dict[Row, LedgerEntry] = {entry.row: entry for entry in splits.ledger.entries}
    parts: dict[str, list[Encoding]] = {}
    too_long: list[str] = []
    chunked = 0
    for name in ("train", "validation"):
        examples: Sequence[Example] = getattr(splits, name)
        kept: list[Encoding] = []
        for example, encoding in zip(examples, encode_all(examples, tokenizer, loss_on=loss_on), strict=True):
            entry = fates[example.row]
            if isinstance(encoding, Unusable):
                fates[example.row] = replace(entry, fate="dropped", reason=str(encoding))
                continue
            length = len(encoding.input_ids)
            entry = replace(entry, tokens=length)
            excess = length - data.max_length
            if excess > 0 and data.over_long != "truncate":
                too_long.append(f"{example.row} ({length} tokens)")
                reason = f"longer than max_length {data.max_length} (over_long: {data.over_long})"
                fates[example.row] = replace(entry, fate="dropped", reason=reason)
                continue
            if excess > 0 and isinstance(example, Text):
                pieces = _chunks(encoding, data.max_length)
                chunked += 1
                entry = replace(
                    entry, reason=f"cut into {len(pieces)} pieces of at most {data.max_length} tokens"
                )
            else:
                pieces = [_cut(encoding, data.max_length)]
                entry = replace(entry, tokens_cut=max(excess, 0))
            trained = [piece for piece in pieces if piece.trained]
            if trained:
                kept += trained
            else:
                why = (
                    f"max_length {data.max_length} leaves no token of the answer"
                    if excess > 0
                    else "no trained token"
                )
                entry = replace(entry, fate="dropped", reason=why, tokens_cut=0)
            fates[example.row] = entry
        parts[name] = kept
    if too_long and data.over_long == "error":
        raise DataError(
            f"{len(too_long)} examples are longer than max_length {data.max_length}.",
            found=", ".join(too_long[:10]),
            fix="Raise --max-length, shorten them, or choose data.over_long truncate or drop.",
        )
    held_out = []
    for example, encoding in zip(
        splits.held_out, encode_all(splits.held_out, tokenizer, loss_on=loss_on), strict=True
    ):
        if isinstance(encoding, Unusable):
            fates[example.row] = replace(fates[example.row], fate="dropped", reason=str(encoding))
        else:
            fates[example.row] = replace(fates[example.row], tokens=len(encoding.input_ids))
            held_out.append(example)
    ledger = Ledger(tuple(fates.values()))
    counts = ledger.counts()
    assert counts["rows_in"] == sum(counts[fate] for fate in ("train", "validation", "held_out", "dropped"))
    if not splits.train:
        raise DataError(
            "There is no row to train on.",
            found="; ".join(
                [f"{counts['validation']} for validation, {counts['held_out']} held out"]
                + [f"{count} × {reason}" for reason, count in ledger.reasons().items()]
            ),
            fix="Give a source with training rows; data.split takes one named split and divides it.",
        )
    if not parts["train"]:
        raise DataError(
            "No training example is left after tokenizing.",
            found="; ".join(f"{count} × {reason}" for reason, count in ledger.reasons().items()),
            fix="Raise --max-length, or mend the rows that the reasons name.",
        )
    return EncodedSplits(
        train=tuple(parts["train"]),
        validation=tuple(parts["validation"]),
        held_out=tuple(held_out),
        ledger=ledger,
        notes=(*splits.notes, *_notes(splits, tokenizer, counts, chunked)),
    )


def ledger_lines(ledger: Ledger) -> Iterator[str]:
    """One JSON object per input row: source, row, fate, reason, tokens, tokens_cut."""
    for entry in ledger.entries:
        yield json.dumps(
            {
                "source": entry.row.source,
                "row": entry.row.number,
                "fate": entry.fate,
                "reason": entry.reason,
                "tokens": entry.tokens,
                "tokens_cut": entry.tokens_cut,
            },
            ensure_ascii=False,
        )


def _cut(encoding: Encoding, length: int) -> Encoding:
    """The beginning of an example; what is cut is its end, so no false end of turn is taught."""
    return Encoding(encoding.input_ids[:length], encoding.labels[:length])


def _chunks(encoding: Encoding, length: int) -> list[Encoding]:
    """Consecutive pieces of a text; the first token of a piece has no context to be predicted from."""
    pieces = []
    for start in range(0, len(encoding.input_ids), length):
        ids, labels = encoding.input_ids[start : start + length], encoding.labels[start : start + length]
        pieces.append(Encoding(ids, (IGNORED, *labels[1:])))
    return pieces


def _notes(splits: Splits, tokenizer: Any, counts: dict[str, int], chunked: int) -> list[str]:
    examples = (*splits.train, *splits.validation, *splits.held_out)
    special = special_texts(examples, tokenizer)
    notes = []
    if special:
        notes.append(f"{special} rows contain the text of a special token; it is kept as plain text")
    if counts["truncated"]:
        notes.append(f"{counts['truncated']} rows are cut at their end to fit max_length")
    if chunked:
        notes.append(f"{chunked} long texts are cut into consecutive pieces")
    return notes
