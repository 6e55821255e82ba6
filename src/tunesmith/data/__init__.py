"""Data: from files of any layout to token ids, with an account of every row.

sources (rows) -> formats (examples) -> splitting (fates) -> templates (token ids and labels) -> supervision

Rows are read twice: `prepare` settles what becomes of each one, `encoded` tokenizes. Neither holds the
data set; what is kept of a row in memory is a few bytes, and everything else goes to disk (cache.py).
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith import heap
from tunesmith.data import cache, shares, supervision
from tunesmith.data.cache import Encodings, StoredExamples
from tunesmith.data.duplicates import NearDuplicates
from tunesmith.data.examples import (
    Example,
    Ledger,
    LedgerEntry,
    Preference,
    Rating,
    Row,
    Tally,
    Text,
    Unusable,
    texts,
)
from tunesmith.data.formats import (
    FORMATS,
    Detection,
    Format,
    Misnamed,
    absent,
    check_group,
    convert,
    detect,
    expected,
    has_numbers,
    keyed,
    none_usable,
    present,
    stands_in,
    unused_columns,
    unused_note,
)
from tunesmith.data.preferences import margin_of, sides
from tunesmith.data.shaping import SHAPING, shaped
from tunesmith.data.shares import BATCH as BATCH
from tunesmith.data.shares import Pieces
from tunesmith.data.sources import Source, checked, distinct, open_source, swallowed
from tunesmith.data.splitting import (
    CLUSTER,
    DROPPED,
    FATES,
    HELD_OUT,
    TRAIN,
    VALIDATION,
    Codes,
    Keys,
    Links,
    assign,
    draw,
    rooted,
)
from tunesmith.data.templates import (
    IGNORED,
    UNWRITTEN,
    Encoder,
    Encoding,
    LossOn,
    encode_batches,
    encoder,
    has_special_text,
    left_out,
    unwritten,
    views,
)
from tunesmith.data.tokens import Differs
from tunesmith.errors import DataError, counted, does
from tunesmith.recipe import Data, DataSource

__all__ = ["EncodedSplits", "Readings", "Splits", "encoded", "ledger_lines", "prepare"]

OPENING = {"config", "split", "data_files", "revision", "max_rows", "streaming"}
"""Fields of a data source that say which rows it has."""

NOT_SPLITTING = {"dataset", "max_length", "over_long", "on_breach", "packing", "cache"}
"""Fields of the data section on which the rows' fates do not depend."""

Adapt = Callable[[Example], Example]
"""Makes an example what a method learns from; raises Unusable for one that it has no use for."""


@dataclass(frozen=True)
class Part:
    """One data set of a mix, and how its rows are read."""

    source: Source
    detection: Detection


class Reasons:
    """Why rows are dropped: a few bytes a row, and each text once."""

    def __init__(self, count: int, texts: Iterable[str] = (), codes: NDArray[np.int32] | None = None) -> None:
        self.texts = list(texts)
        self.codes = np.full(count, -1, dtype=np.int32) if codes is None else codes
        self._places = {text: place for place, text in enumerate(self.texts)}

    def __setitem__(self, rows: Any, reason: str) -> None:
        if reason not in self._places:
            self._places[reason] = len(self.texts)
            self.texts.append(reason)
        self.codes[rows] = self._places[reason]

    def __getitem__(self, row: int) -> str | None:
        code = int(self.codes[row])
        return None if code < 0 else self.texts[code]

    def counts(self) -> Counter[str]:
        """Number of rows by reason."""
        given = np.bincount(self.codes[self.codes >= 0], minlength=len(self.texts))
        return Counter({text: int(n) for text, n in zip(self.texts, given, strict=True) if n})


@dataclass(frozen=True)
class Splits:
    """What becomes of every row, and the examples in their roles, read from the source when asked for."""

    parts: tuple[Part, ...]
    fates: Codes
    """Each row's place in FATES, over all parts in order."""
    copies: NDArray[np.int32]
    """How often each row is trained per epoch."""
    reasons: Reasons
    """Why a row is dropped."""
    notes: tuple[str, ...] = ()
    """What was decided on the way: detected format and why, small-set rules, named splits used."""
    adapt: Adapt = lambda example: example
    system_prompt: str | None = None
    group_by: str | None = None

    def rows(
        self, first: int = 0, end: int | None = None, readings: Readings | None = None
    ) -> Iterator[tuple[int, Row, Example | None]]:
        """Every row's running number and place, with its example where it has not been dropped; from one row to
        another, where only these are wanted. With `readings` it goes on where the last rows with them ended."""
        number, readings = 0, {} if readings is None else readings
        for place, part in enumerate(self.parts):
            if end is not None and number >= end:
                return
            reading = readings.setdefault(place, _Reading())
            passed = _Passed(first - number, None if end is None else end - number, reading)
            source = part.source
            if first or end is not None:
                source = replace(source, scan=partial(passed.within, source.scan))
            before = number
            for record, example in convert(
                source, part.detection, system_prompt=self.system_prompt, group_by=self.group_by
            ):
                if number < before + passed.left_out:
                    number = before + passed.left_out
                if number >= len(self.fates):
                    raise _changed(part.source)
                if self.fates[number] == DROPPED or isinstance(example, Unusable):
                    yield number, record.row, None
                else:
                    yield number, record.row, self.adapt(example)
                number += 1
            number = max(number, before + passed.left_out)
        if number != (len(self.fates) if end is None else end):
            raise _changed(self.parts[-1].source)

    def examples(self, *fates: int) -> Iterator[Example]:
        """The examples of some fates, in the order of the source."""
        for number, _, example in self.rows():
            if example is not None and self.fates[number] in fates:
                yield example

    @property
    def train(self) -> tuple[Example, ...]:
        """The training examples, all in memory."""
        return tuple(self.examples(TRAIN))

    @property
    def validation(self) -> tuple[Example, ...]:
        """The validation examples, all in memory."""
        return tuple(self.examples(VALIDATION))

    @property
    def held_out(self) -> tuple[Example, ...]:
        """The held-out examples, all in memory."""
        return tuple(self.examples(HELD_OUT))

    def count(self, fate: int) -> int:
        """Number of rows of a fate."""
        return int((self.fates == fate).sum())

    @property
    def ledger(self) -> Ledger:
        """Every row with its fate so far."""
        tally = Tally()
        for entry in self.entries():
            tally.add(entry)
        return tally.ledger(self.entries)

    def entries(self) -> Iterator[LedgerEntry]:
        """The ledger's rows, before anything is tokenized."""
        for number, row, _ in self.rows():
            yield self.entry(number, row)

    def entry(self, number: int, row: Row) -> LedgerEntry:
        """One row of the ledger."""
        fate = FATES[self.fates[number]]
        return LedgerEntry(row, fate, self.reasons[number], copies=int(self.copies[number]))


class _Reading:
    """How far one reading of a source is: pieces in their order, one after another, cost one reading in all."""

    def __init__(self) -> None:
        self.records: Iterator[Any] | None = None
        self.at = 0

    def begin(self, scan: Callable[[], Iterator[Any]], first: int) -> None:
        """Go on where it is, unless that is beyond a row."""
        if self.records is None or self.at > first:
            self.records, self.at = scan(), 0

    def next(self) -> Any:
        """The next record; None at the end."""
        assert self.records is not None
        try:
            record = next(self.records, None)
        except BaseException:
            self.records = None  # what has failed would seem to be at its end
            raise
        self.at += record is not None
        return record


Readings = dict[int, _Reading]
"""Of each part of a mix how far it has been read."""


@dataclass
class _Passed:
    """Rows of a source from one to another; those before are read and given to nobody."""

    first: int
    end: int | None
    reading: _Reading
    left_out: int = 0

    def within(self, scan: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """The rows of the range."""
        first, reading = max(self.first, 0), self.reading
        reading.begin(scan, first)
        self.left_out = reading.at
        while self.end is None or reading.at < self.end:
            record = reading.next()
            if record is None:
                return
            if reading.at <= first:
                self.left_out += 1
            else:
                yield record


def _changed(source: Source) -> DataError:
    return DataError(
        f"{source.title} changed while it was read.",
        fix="Start again when nothing writes to it any more.",
    )


@dataclass(frozen=True)
class EncodedSplits:
    """What is trained and validated on as token ids, what is measured on as examples, and the ledger."""

    train: Encodings
    validation: Encodings
    held_out: StoredExamples
    ledger: Ledger
    fingerprint: str
    """Hash of all training and validation tokens and labels: equal exactly when training sees the same."""
    proof: Mapping[str, Any]
    """What the supervision proof checked, on how many rows (supervision.py)."""
    notes: tuple[str, ...] = ()
    lengths: tuple[int, int] | None = None
    """Of pairs: most tokens of an input and of an answer that training keeps."""

    def release(self) -> None:
        """Hand back the memory that holds what was read of the tokens."""
        self.train.release()
        self.validation.release()


def as_it_is(example: Example) -> Example:
    """The example itself."""
    return example


@contextmanager
def rarely_collected() -> Iterator[None]:
    """Python's search for cycles seldom, and hardly ever among all that is there: rows are many, and have none."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@rarely_collected()
def prepare(
    data: Data, adapt: Adapt = as_it_is, remarks: Mapping[type[Example], str] = MappingProxyType({})
) -> Splits:
    """Read, convert, mix and split the data sets. Raises DataError for what cannot be read or used.

    `remarks` is what to say where there are examples of a shape, before `adapt` changed them.
    """
    sections: list[DataSource] = [data, *data.mix]
    name = None
    refused = cache.unwritable() if data.cache else None
    if data.cache and not refused:
        sources = _all_opened(sections)
        name = cache.key(
            {
                "rows": [(source.name, source.fingerprint) for source in sources],
                "data": data.model_dump(mode="json", exclude=NOT_SPLITTING),
                "adapt": adapt.__name__,
            }
        )
        found = cache.find(name)
        if found:
            return _splits_from(found, sources, sections, data, adapt)
    splits = _prepared(data, sections, adapt, remarks)
    if refused:
        said = f"prepared rows are not kept for the next run, since the cache cannot be written ({refused})"
        return replace(splits, notes=(*splits.notes, said))
    if name:
        with cache.making(name) as folder:
            _splits_into(folder, splits)
    return splits


class _Found:
    """What is kept of each row while the sources are read: a few bytes."""

    def __init__(self, *, with_texts: bool) -> None:
        self.keys, self.roles, self.parts = array("Q"), array("b"), array("H")
        self.links = Links()
        self.reasons: dict[str, array[int]] = {}
        """Rows that are dropped, by the reason."""
        self.shapes: set[type[Example]] = set()
        self.numbers = self.groups = self.swallowed = self.stand_ins = 0
        self.near = NearDuplicates() if with_texts else None
        self.contents = array("q")
        """Hashes of the texts, of this process only: rows with equal keys and texts are copies."""
        self._waiting: list[str] = []

    def add(self, part: int, example: Example, role: int) -> None:
        """A row that is an example."""
        self.groups += example.group is not None
        key = self.links.add(len(self.keys), example)
        self._row(part, key, role, "\n".join(texts(example)) if self.near else "")

    def drop(self, part: int, reason: str | None) -> None:
        """A row that is none, for a reason that is known or comes later."""
        if reason:
            self.say(len(self.keys), reason)
        self._row(part, 0, DROPPED, "")

    def say(self, row: int, reason: str) -> None:
        """Why a row is dropped."""
        self.reasons.setdefault(reason, array("I")).append(row)

    def _row(self, part: int, key: int, role: int, text: str) -> None:
        self.parts.append(part)
        self.keys.append(key)
        self.roles.append(role)
        if self.near:
            self.contents.append(hash(text))
            self._waiting.append(text)
            if len(self._waiting) == BATCH:
                self.sketch()

    def sketch(self) -> None:
        """Hand the texts that wait to the near-duplicates' sketches."""
        if self.near and self._waiting:
            self.near.add(self._waiting)
            self._waiting = []


def _prepared(
    data: Data, sections: list[DataSource], adapt: Adapt, remarks: Mapping[type[Example], str]
) -> Splits:
    found = _Found(with_texts=data.near_duplicates == "together")
    parts, notes = [], []
    for place, (section, source) in enumerate(zip(sections, _all_opened(sections), strict=True)):
        part, said = _read(source, section, place, found, data, adapt)
        parts.append(part)
        notes += [f"{part.source.name}: {note}" for note in said] if data.mix else said
    found.sketch()
    keys = np.frombuffer(found.keys, dtype=np.uint64)
    reasons = Reasons(len(keys))
    for reason, rows in found.reasons.items():
        reasons[np.frombuffer(rows, dtype=np.uint32)] = reason
    fates, said = _settled(found, keys, reasons, data)
    notes += said
    copies = np.ones(len(fates), dtype=np.int32)
    trained = np.flatnonzero(fates == TRAIN)
    drawn = draw(
        keys[trained],
        np.frombuffer(found.parts, dtype=np.uint16)[trained],
        weights=[section.weight for section in sections],
        total=data.num_samples,
        seed=data.mix_seed,
    )
    copies[trained] = np.maximum(drawn, 1)
    fates[trained[drawn == 0]] = DROPPED
    reasons[trained[drawn == 0]] = "not drawn: num_samples and the mix's weights leave it out"
    notes += _drawn(drawn) + _without_effect(data, len(trained))
    notes += [text for shape, text in remarks.items() if shape in found.shapes]
    if found.numbers:
        number = f"{counted(found.numbers, 'row')} {does('have', found.numbers)} a number"
        notes.append(f"{number} where text is expected; it is written out")
    if found.stand_ins:
        notes.append(
            f"{counted(found.stand_ins, 'row')} {does('have', found.stand_ins)} a word for an answer by which programs "
            "say that there is none (NaN, nan, #N/A); it is trained as text (`tunesmith validate` names them)"
        )
    if found.swallowed:
        notes.append(
            f"{counted(found.swallowed, 'row')} of a CSV file {does('have', found.swallowed)} a cell whose lines look "
            "like rows: a quote may be opened and never closed (`tunesmith validate` names them)"
        )
    if found.groups:
        grouped = f"{counted(found.groups, 'row')} {does('belong', found.groups)} to groups"
        notes.append(f"{grouped}, which stay whole in one split")
    return Splits(
        parts=tuple(parts),
        fates=fates,
        copies=copies,
        reasons=reasons,
        notes=tuple(notes),
        adapt=adapt,
        system_prompt=data.system_prompt,
        group_by=data.group_by,
    )


def _read(
    source: Source, section: DataSource, place: int, found: _Found, data: Data, adapt: Adapt
) -> tuple[Part, list[str]]:
    """Read one data set into what is found; how its rows are read, and what there is to say of it."""
    columns = section.model_dump(include={"format", "input_text_key", "output_text_key"})
    possible = expected(**columns)
    dropped: Counter[str] = Counter()
    unread: list[tuple[int, tuple[str, ...]]] = []
    """Rows that fit no format, with the columns that have a value: what is missing depends on the other rows."""
    converted = convert(source, possible, system_prompt=data.system_prompt, group_by=data.group_by)
    for record, example in shown_progress(converted, f"reading {source.name}"):
        found.numbers += has_numbers(record.values, possible)
        found.swallowed += swallowed(record) is not None
        if isinstance(example, Misnamed):
            raise DataError(
                f"A row of {source.title} asks for a check that cannot be made.",
                found=f"{record.row}: {example}",
                fix="Correct the row's `constraints`; docs/constraints.md says what each takes.",
            )
        try:
            if isinstance(example, Unusable):
                raise example
            found.shapes.add(type(example))
            found.stand_ins += stands_in(example) is not None
            adapted = adapt(example)
        except Unusable as reason:
            fits = possible.format_of(record.values) is not None
            if fits:
                dropped[str(reason)] += 1
            else:
                unread.append((len(found.keys), present(record.values)))
            found.drop(place, str(reason) if fits else None)
        else:
            found.add(place, adapted, FATES.index(record.role) if record.role else -1)
    source = checked(source, section.dataset)
    detection = detect(source, **columns)
    check_group(source, data.group_by)
    for number, names in unread:
        why = absent(set(names), detection)
        found.say(number, why)
        dropped[why] += 1
    if dropped.total() == source.facts.count:
        raise none_usable(source, dropped)
    titles = " and ".join(f"'{format.name}'" for format in detection.formats)
    notes = [*source.notes, f"rows are read as {titles}: {detection.reason}"]
    unused = [name for name in unused_columns(source, detection) if name != data.group_by]
    if unused:
        notes.append(unused_note(unused))
    return Part(source, detection), notes


def _all_opened(sections: list[DataSource]) -> list[Source]:
    """The data sets of a mix, with names of their own where two of them share one."""
    opened = [
        shaped(open_source(s.dataset, **s.model_dump(include=OPENING)), **s.model_dump(include=SHAPING))
        for s in sections
    ]
    return distinct(opened, [section.dataset for section in sections])


def _without_effect(data: Data, trained: int) -> list[str]:
    """Fields that are set and change nothing here."""
    notes = []
    is_weighted = any(section.weight is not None for section in (data, *data.mix))
    if data.num_samples is not None and data.num_samples >= trained and not is_weighted:
        notes.append(
            f"num_samples {data.num_samples} has no effect: there are {counted(trained, 'training row')}, and "
            "without weights none is repeated"
        )
    if data.weight is not None and not data.mix and (data.num_samples or 0) <= trained:
        notes.append(f"weight {data.weight:g} has no effect: there is no data.mix whose sets it could weigh")
    return notes


def _splits_into(folder: Path, splits: Splits) -> None:
    np.save(folder / "fates.npy", splits.fates)
    np.save(folder / "copies.npy", splits.copies)
    np.save(folder / "reasons.npy", splits.reasons.codes)
    facts = {
        "parts": [[[f.name for f in part.detection.formats], part.detection.reason] for part in splits.parts],
        "reasons": splits.reasons.texts,
        "notes": splits.notes,
    }
    (folder / cache.FACTS).write_text(json.dumps(facts))


def _splits_from(
    folder: Path, sources: list[Source], sections: list[DataSource], data: Data, adapt: Adapt
) -> Splits:
    facts = json.loads((folder / cache.FACTS).read_text())
    parts = [
        Part(source, Detection(tuple(format_named(name, section) for name in names), reason))
        for source, section, (names, reason) in zip(sources, sections, facts["parts"], strict=True)
    ]
    return Splits(
        parts=tuple(parts),
        fates=np.load(folder / "fates.npy"),
        copies=np.load(folder / "copies.npy"),
        reasons=Reasons(0, facts["reasons"], np.load(folder / "reasons.npy")),
        notes=tuple(facts["notes"]),
        adapt=adapt,
        system_prompt=data.system_prompt,
        group_by=data.group_by,
    )


def format_named(name: str, section: DataSource) -> Format:
    """A format by the name that a detection gave it."""
    if section.input_text_key and section.output_text_key:
        return keyed(section.input_text_key, section.output_text_key)
    return FORMATS[name]


def _settled(found: _Found, keys: Keys, reasons: Reasons, data: Data) -> tuple[Codes, list[str]]:
    """Each row's fate. Rows that would put one question on both sides of a split are dropped, with the reason."""
    roles = np.frombuffer(found.roles, dtype=np.int8)
    usable = np.flatnonzero(roles != DROPPED)
    notes = []
    pairs = found.near.pairs() if found.near else np.empty((0, 2), dtype=np.int64)
    pairs = pairs[(roles[pairs] != DROPPED).all(axis=1)]
    if found.near:
        is_copy = _copies(keys, np.frombuffer(found.contents, dtype=np.int64), usable)
        same, alike = int(is_copy.sum()), len(np.unique(pairs[~is_copy[pairs[:, 0]], 0]))
        if same:
            notes.append(f"{counted(same, 'row')} {does('are', same)} the same as an earlier one")
        if alike:
            notes.append(f"{counted(alike, 'row')} {does('are', alike)} nearly the same as an earlier one")
    edges = found.links.edges()
    root, released = rooted(len(roles), edges, pairs)
    if released.any():
        notes.append(
            f"{int(released.sum())} rows are nearly the same as more than {CLUSTER} others: texts of one form, "
            "which are not kept in one split"
        )
        pairs = pairs[~released[pairs[:, 0]]]
    fates = np.full(len(roles), DROPPED, dtype=np.int8)
    fates[usable], said = assign(
        keys[root][usable], roles[usable], validation=data.validation, held_out=data.held_out
    )
    split = fates.copy()
    _drop(fates, reasons, *_in_named_splits(split, roles, found.links))
    for related, reason in ((edges, "its question or group stands in a {} row"), (pairs, NEARLY)):
        for lost, other in _across(split, roles, related):
            _drop(fates, reasons, lost, reason.format(FATES[other].replace("_", "-")))
    # Whatever was decided so far, no question that is measured or picks the checkpoint is trained.
    kept_out = np.isin(fates[found.links.rows], (VALIDATION, HELD_OUT)) & found.links.is_main
    asked = found.links.rows_with(kept_out, among=fates[found.links.rows] == TRAIN)
    _drop(fates, reasons, asked, "its question is trained on the way to another answer")
    return fates, [*notes, *said]


def _copies(keys: Keys, contents: NDArray[np.int64], usable: NDArray[np.int64]) -> NDArray[np.bool_]:
    """For each row whether an earlier one asks and says the same, as `validate` counts duplicates."""
    both = keys[usable] ^ (contents[usable].view(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    is_copy = np.zeros(len(keys), dtype=bool)
    is_copy[usable] = True
    is_copy[usable[np.unique(both, return_index=True)[1]]] = False
    return is_copy


NEARLY = "nearly the same text as a {} row"


def _drop(fates: Codes, reasons: Reasons, rows: NDArray[Any], reason: str) -> None:
    rows = rows[fates[rows] != DROPPED]
    fates[rows] = DROPPED
    reasons[rows] = reason


def _in_named_splits(split: Codes, roles: Codes, links: Links) -> tuple[NDArray[Any], str]:
    """Training rows with a question of the validation or held-out rows that the source itself names."""
    named = np.isin(roles, (VALIDATION, HELD_OUT))[links.rows] & links.is_main
    rows = links.rows_with(split[links.rows] == TRAIN, among=named)
    return rows, "the same question stands in the source's validation or held-out split"


def _across(split: Codes, roles: Codes, pairs: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Of each pair across splits the row to drop: the later one, or the training row where the source names the
    splits. By the split of the other."""
    later, earlier = pairs[:, 0], pairs[:, 1]
    apart = (split[later] != split[earlier]) & (split[later] != DROPPED) & (split[earlier] != DROPPED)
    later, earlier = later[apart], earlier[apart]
    named = (roles[later] >= 0) | (roles[earlier] >= 0)
    lost = np.where(named & (split[later] != TRAIN) & (split[earlier] == TRAIN), earlier, later)
    other = np.where(lost == later, earlier, later)
    for fate in (TRAIN, VALIDATION, HELD_OUT):
        yield lost[split[other] == fate], fate


def _drawn(copies: NDArray[np.int32]) -> list[str]:
    repeated = int((copies > 1).sum())
    left = int((copies == 0).sum())
    notes = []
    if left:
        said = f"{counted(left, 'training row')} {does('are', left)} not drawn"
        notes.append(f"{said} (num_samples, weights)")
    if repeated:
        notes.append(
            f"{counted(repeated, 'training row')} {does('are', repeated)} repeated, up to {int(copies.max())} times, "
            "as the mix asks"
        )
    return notes


def encoded(splits: Splits, tokenizer: Any, *, data: Data, loss_on: LossOn) -> EncodedSplits:
    """Token ids and labels of all splits, with over-long examples treated as the recipe says.

    Every training row has passed the supervision proof. Raises DataError where the recipe refuses
    over-long examples, where a row fails the proof and may not be dropped, or where none remains.
    """

    pieces = in_pieces(splits, tokenizer, data=data, loss_on=loss_on)

    def write(folder: Path) -> dict[str, Any]:
        try:
            context = encoder(tokenizer, quick=True)
            return _encode_into(folder, splits, context, data=data, loss_on=loss_on, pieces=pieces)
        except Differs:
            facts = _encode_into(folder, splits, encoder(tokenizer), data=data, loss_on=loss_on)
            facts["notes"].append("tiktoken gave other ids than the model's tokenizer, and is not used")
            return facts

    options = {"loss_on": loss_on}
    try:
        found = stored(splits, tokenizer, data, options, write)
    except FileNotFoundError:  # another node was joining the same pieces, and has removed them
        if not (pieces and is_joined(pieces)):
            raise
        found = stored(splits, tokenizer, data, options, write)
    if pieces:
        pieces.remove()
    return found


def in_pieces(splits: Splits, tokenizer: Any, *, data: Data, loss_on: LossOn) -> Pieces | None:
    """Where pieces of these splits are kept until they are joined; None without a cache."""
    if not data.cache or cache.unwritable():
        return None
    return Pieces(_name(splits, tokenizer, data, {"loss_on": loss_on}), len(splits.fates))


def is_joined(pieces: Pieces) -> bool:
    """Whether all rows are tokenized already."""
    return cache.find(pieces.name) is not None


@rarely_collected()
def encode_piece(
    pieces: Pieces,
    begin: int,
    end: int,
    splits: Splits,
    tokenizer: Any,
    *,
    data: Data,
    loss_on: LossOn,
    readings: Readings | None = None,
) -> bool:
    """Tokenize the rows of one piece, and keep it; whether it did. Give each the same `readings`, in order.

    Not where tiktoken is no help (then they are left to the joining), nor where another node has joined all meanwhile.
    """
    if is_joined(pieces):
        return False

    def write(written: cache.SplitsWriter) -> dict[str, Any]:
        told = _Told(_proof(splits, encoder(tokenizer, quick=True), data=data, loss_on=loss_on))
        _encode_rows(begin, end, splits, written, told, data=data, loss_on=loss_on, readings=readings)
        return told.as_dict()

    try:
        pieces.make(begin, end, write)
    except Differs:
        return False
    except FileNotFoundError:  # the folder is gone
        if not is_joined(pieces):
            raise
        return False
    return True


@rarely_collected()
def stored(
    splits: Splits,
    tokenizer: Any,
    data: Data,
    options: Mapping[str, Any],
    write: Callable[[Path], dict[str, Any]],
) -> EncodedSplits:
    """What `write` makes of the rows, or made of them before: the cache knows them by their content, the
    tokenizer, the data section and these options."""
    if not splits.count(TRAIN):
        raise DataError(
            "There is no row to train on.",
            found="; ".join(
                [f"{splits.count(VALIDATION)} for validation, {splits.count(HELD_OUT)} held out"]
                + [f"{n} × {reason}" for reason, n in splits.reasons.counts().most_common(5)]
            ),
            fix="Give a source with training rows; data.split takes one named split and divides it.",
        )
    name = None
    if data.cache and not cache.unwritable():
        name = _name(splits, tokenizer, data, options)
        found = cache.find(name)
        if found:
            return _from_folder(found, splits, ("the tokenized examples of an earlier run are used again",))
    with cache.making(name) as folder:
        facts = write(folder)
        (folder / cache.FACTS).write_text(json.dumps(facts))
    _hand_back()
    place = cache.find(name) if name else folder
    assert place is not None
    return _from_folder(place, splits, ())


def _name(splits: Splits, tokenizer: Any, data: Data, options: Mapping[str, Any]) -> str:
    """What the tokens of these splits are called in the cache."""
    return cache.key(
        {
            "rows": [(part.source.name, part.source.fingerprint) for part in splits.parts],
            "fates": hashlib.sha256(splits.fates.tobytes() + splits.copies.tobytes()).hexdigest(),
            "data": data.model_dump(mode="json", exclude={"dataset", "packing", "cache"}),
            "options": dict(options),
            "adapt": getattr(splits.adapt, "__name__", ""),
            "tokenizer": cache.tokenizer_fingerprint(tokenizer),
        }
    )


def _hand_back() -> None:
    """Give the memory in which batches of rows were made back: it is in pieces that nothing larger fits into, and would
    count beside all that training takes."""
    import pyarrow

    gc.collect(1)  # of what came since libraries were loaded
    pyarrow.default_memory_pool().release_unused()
    heap.give_back()


def _from_folder(folder: Path, splits: Splits, notes: tuple[str, ...]) -> EncodedSplits:
    facts = json.loads((folder / cache.FACTS).read_text())
    return EncodedSplits(
        train=Encodings(folder / "train.arrow"),
        validation=Encodings(folder / "validation.arrow"),
        held_out=StoredExamples(folder / "held_out.jsonl"),
        ledger=Ledger(facts["counts"], facts["reasons"], lambda: cache.read_ledger(folder / "ledger.arrow")),
        fingerprint=facts["fingerprint"],
        proof=facts["proof"],
        notes=(*splits.notes, *facts["notes"], *notes),
        lengths=tuple(facts["lengths"]) if facts.get("lengths") else None,
    )


class _Told:
    """What there is to say of rows that were tokenized."""

    def __init__(self, proof: supervision.Proof) -> None:
        self.proof, self.counts, self.too_long, self.replayed = proof, Counter[str](), list[str](), 0

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it, for `include`."""
        return {"proof": self.proof.found(), "counts": dict(self.counts), "too_long": self.too_long}

    def include(self, told: Mapping[str, Any]) -> None:
        """What was said of the next rows."""
        self.proof.include(told["proof"])
        self.counts.update(told["counts"])
        self.too_long += told["too_long"]
        self.replayed += 1


def _proof(splits: Splits, context: Encoder, *, data: Data, loss_on: LossOn) -> supervision.Proof:
    return supervision.Proof(
        context,
        loss_on=loss_on,
        max_length=data.max_length,
        may_cut_answers=data.over_long == "truncate_answers",
        rows=len(splits.fates),
    )


def _encode_into(
    folder: Path,
    splits: Splits,
    context: Encoder,
    *,
    data: Data,
    loss_on: LossOn,
    pieces: Pieces | None = None,
) -> dict[str, Any]:
    """Write the splits, from the pieces that are there and from the rows of all others; the facts about them."""
    told = _Told(_proof(splits, context, data=data, loss_on=loss_on))
    encode = partial(_encode_rows, data=data, loss_on=loss_on, readings={})
    with cache.SplitsWriter(folder) as written:
        begin = 0
        for start, end in pieces.ranges() if pieces else ():
            assert pieces is not None
            facts_of_piece = pieces.facts(start) if pieces.has(start) else None
            if facts_of_piece is None:
                continue
            if begin < start:
                encode(begin, start, splits, written, told)
            shares.replayed(pieces.place(start), written)
            told.include(facts_of_piece["told"])
            begin = end
        if begin < len(splits.fates):
            encode(begin, None, splits, written, told)
    counts, proof, too_long = told.counts, told.proof, told.too_long
    if too_long and data.over_long == "error":
        raise DataError(
            f"{len(too_long)} examples are longer than max_length {data.max_length}.",
            found=", ".join(too_long[:10]),
            fix="Raise --max-length, shorten them, or choose data.over_long truncate or drop.",
        )
    proof.finish(on_breach=data.on_breach)
    facts = written.facts(
        rows=len(splits.fates), fix="Raise --max-length, or mend the rows that the reasons name."
    )
    notes = _notes(facts["counts"], counts)
    if told.replayed:
        notes.append(
            f"{counted(told.replayed, 'piece')} of {shares.PIECE:,} rows had been tokenized before (prepare)"
        )
    return {**facts, "proof": proof.as_dict(), "notes": notes}


def _encode_rows(
    begin: int,
    end: int | None,
    splits: Splits,
    written: cache.SplitsWriter,
    told: _Told,
    *,
    data: Data,
    loss_on: LossOn,
    readings: Readings | None = None,
) -> None:
    """Tokenize rows from one number to another, write them, and keep what there is to say of them."""
    counts, proof, too_long, context = told.counts, told.proof, told.too_long, told.proof.context
    for rows, encodings in _stream(splits, context, loss_on, begin, end, readings):
        entries = [splits.entry(number, row) for number, row, _, _ in rows]
        trained: list[tuple[int, Example, Encoding]] = []
        for place, (_, _, example, asked) in enumerate(rows):
            if example is None:
                continue
            entry = entries[place]
            counts["special"] += has_special_text(example, context)
            counts["left_out"] += left_out(example, context)
            counts.update(unwritten(example, context))
            found = [(place, view, next(encodings)) for view in asked]
            if isinstance(example, Preference | Rating):
                found = [
                    (place, view, part if isinstance(part, Unusable) else _judged(part, good, example))
                    for (_, view, part), (_, good) in zip(found, sides(example), strict=True)
                ]
            reason = next((str(part) for _, _, part in found if isinstance(part, Unusable)), None)
            if reason:
                entries[place] = entry._replace(fate="dropped", reason=reason)
                continue
            lengths = [len(part.input_ids) for _, _, part in found]
            entries[place] = entry._replace(tokens=sum(lengths))
            if entry.fate == "held_out":
                written.hold_out(example)
            elif max(lengths) > data.max_length and data.over_long in ("drop", "error"):
                reason = f"longer than max_length {data.max_length} (over_long: {data.over_long})"
                entries[place] = entries[place]._replace(fate="dropped", reason=reason)
                too_long.append(f"{entry.row} ({max(lengths)} tokens)")
            else:
                trained += found
                if len(asked) > 1 and not isinstance(example, Preference):
                    counts["unrolled"] += 1
                    counts["views"] += len(asked)
        breaches = proof.check(
            [rows[place][0] for place, _, _ in trained],
            [example for _, example, _ in trained],
            [encoding for _, _, encoding in trained],
        )
        for (place, _, _), breach in zip(trained, breaches, strict=True):
            if breach:
                entries[place] = entries[place]._replace(fate="dropped", reason=breach)
        for place, pair in _pairs(rows, trained):
            breach = None if entries[place].fate == "dropped" else proof.check_pair(rows[place][1], *pair)
            if breach:
                entries[place] = entries[place]._replace(fate="dropped", reason=breach)
        kept: dict[int, list[Encoding]] = {}
        for place, example, encoding in trained:
            entry = entries[place]
            if entry.fate == "dropped":
                continue
            pieces = _pieces(example, encoding, data.max_length)
            if not pieces:
                reason = f"no token could be trained in pieces of {data.max_length}"
                entries[place] = entry._replace(fate="dropped", reason=reason)
                continue
            if len(pieces) > 1:
                reason = f"cut into {len(pieces)} pieces of at most {data.max_length} tokens"
                entries[place] = entry._replace(reason=reason)
                counts["chunked"] += 1
            elif len(encoding.input_ids) > data.max_length:
                cut = len(encoding.input_ids) - data.max_length
                entries[place] = entry._replace(tokens_cut=entry.tokens_cut + cut)
            kept.setdefault(place, []).extend(pieces)
        written.write(entries, [(rows[place][0], entries[place], pieces) for place, pieces in kept.items()])


def _stream(
    splits: Splits, context: Encoder, loss_on: LossOn, begin: int, end: int | None, readings: Readings | None
) -> Iterator[tuple[list[Any], Iterator[Any]]]:
    """Rows in batches, each with its views (templates.py), and the encodings of all of these."""
    batches: list[list[tuple[int, Row, Example | None, list[Example]]]] = []

    def examples() -> Iterator[list[Example]]:
        total = (len(splits.fates) if end is None else end) - begin
        rows = shown_progress(splits.rows(begin, end, readings), "tokenizing", total=total)
        for batch in batched(rows, BATCH):
            batches.append(
                [
                    (number, row, example, _views(example, splits.fates[number], context, loss_on))
                    for number, row, example in batch
                ]
            )
            yield [view for *_, views in batches[-1] for view in views]

    for _, encodings in encode_batches(examples(), context, loss_on=loss_on):
        yield batches.pop(0), iter(encodings)


def _views(example: Example | None, fate: int, context: Encoder, loss_on: LossOn) -> list[Example]:
    if example is None:
        return []
    is_whole = fate == HELD_OUT and not isinstance(example, Preference | Rating)
    return [example] if is_whole else views(example, context, loss_on)


def _judged(encoding: Encoding, good: bool, example: Preference | Rating) -> Encoding:
    try:
        return replace(encoding, good=good, margin=margin_of(example))
    except Unusable:  # methods that learn from margins have dropped it; others do not care
        return replace(encoding, good=good)


def _pairs(
    rows: list[Any], trained: list[tuple[int, Example, Encoding]]
) -> Iterator[tuple[int, list[Encoding]]]:
    """The two encodings of each preference, chosen answer first, with the row's place."""
    for place, found in itertools.groupby(trained, key=lambda item: item[0]):
        if isinstance(rows[place][2], Preference):
            yield place, [encoding for _, _, encoding in found]


def shown_progress(items: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
    """The items, with a bar on a terminal once it takes more than a few seconds."""
    from tqdm import tqdm

    return iter(tqdm(items, what, total, leave=False, unit=" rows", unit_scale=True, delay=3, disable=None))


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """The items in lists of at most `size`."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _pieces(example: Example, encoding: Encoding, length: int) -> list[Encoding]:
    """The example in pieces of at most `length` tokens: its beginning, or all of a running text."""
    if len(encoding.input_ids) <= length:
        return [encoding]
    if isinstance(example, Text):
        return [piece for piece in _chunks(encoding, length) if piece.trained]
    return [_cut(encoding, length)]


def proven(proof: Mapping[str, Any]) -> str:
    """The supervision proof in a sentence."""
    rows = max(check["rows"] for check in proof["checks"])
    prompts = next(check["rows"] for check in proof["checks"] if check["name"] == "prompt")
    failed = sum(breach["rows"] for breach in proof["breaches"])
    said = f"supervision proof: {counted(rows, 'row')} checked, the prompts of {prompts} against inference"
    said += f"; {failed} failed and are dropped" if failed else ", none failed"
    if proof["served_otherwise"]:
        said += f"; transformers itself would tokenize the prompts of {proof['served_otherwise']} otherwise"
    return said


def ledger_lines(ledger: Ledger) -> Iterator[str]:
    """One JSON object per input row: source, row, fate, reason, tokens, tokens_cut, copies."""
    for entry in ledger.entries:
        yield json.dumps(
            {
                "source": entry.row.source,
                "row": entry.row.number,
                "fate": entry.fate,
                "reason": entry.reason,
                "tokens": entry.tokens,
                "tokens_cut": entry.tokens_cut,
                **({"copies": entry.copies} if entry.copies != 1 else {}),
            },
            ensure_ascii=False,
        )


def _cut(encoding: Encoding, length: int) -> Encoding:
    """The beginning of an example; what is cut is its end, so no false end of turn is taught."""
    return replace(encoding, input_ids=encoding.input_ids[:length], labels=encoding.labels[:length])


def _chunks(encoding: Encoding, length: int) -> list[Encoding]:
    """Consecutive pieces of a text; the first token of a piece has no context to be predicted from.

    A last piece of one token could teach nothing: it takes the token before it along.
    """
    pieces = []
    count = len(encoding.input_ids)
    for start in range(0, count, length):
        begin = start - 1 if start == count - 1 and length > 1 else start
        ids, labels = (
            encoding.input_ids[begin : start + length],
            encoding.labels[begin : start + length].copy(),
        )
        labels[0] = IGNORED
        pieces.append(Encoding(ids, labels))
    return pieces


def _notes(totals: Mapping[str, int], counts: Mapping[str, int]) -> list[str]:
    notes = []
    if counts["special"]:
        notes.append(
            f"{counted(counts['special'], 'row')} {does('contain', counts['special'])} the text of a special token; "
            "it is kept as plain text"
        )
    if counts["left_out"]:
        notes.append(
            f"{counted(counts['left_out'], 'row')} {does('have', counts['left_out'])} reasoning, for which the chat "
            "template has no place: it is left out"
        )
    notes += [
        f"{counted(counts[kind], 'row')} {does('have', counts[kind])} {what}, for which the chat template has no "
        "place: it is left out"
        for kind, what in UNWRITTEN.items()
        if counts[kind]
    ]
    if counts["unrolled"]:
        notes.append(
            f"{counted(counts['unrolled'], 'conversation')} {does('are', counts['unrolled'])} trained once for each "
            f"question, as {counts['views']} examples, since the chat template writes earlier answers or tool calls "
            "otherwise than when they were given"
        )
    if totals["truncated"]:
        cut = totals["truncated"]
        notes.append(f"{counted(cut, 'row')} {does('are', cut)} cut at the end to fit max_length")
    if counts["chunked"]:
        cut = counts["chunked"]
        notes.append(f"{counted(cut, 'long text')} {does('are', cut)} cut into consecutive pieces")
    return notes
