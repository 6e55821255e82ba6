"""What is wrong with a data set, before anything is trained on it.

One pass in pieces over several processes (pieces.py), every row checked as training would convert it
(checks.py); what is kept of a row is its place, its hash and its worst finding. Whole findings are kept up to
a limit for each kind.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data import Adapt, as_it_is, batched, pairs, supervision
from tunesmith.data.checks import (
    CHARACTERS_PER_TOKEN,
    CHECKS,
    COMMON_SPECIALS,
    SEVERITIES,
    Found,
    Settings,
    Severity,
    broken,
    check_row,
    estimated_length,
    masked,
)
from tunesmith.data.duplicates import NearDuplicates, sketches
from tunesmith.data.examples import (
    Example,
    Message,
    Preference,
    Rating,
    Row,
    Text,
    Unusable,
    row_hash,
    texts,
)
from tunesmith.data.formats import FORMATS, Detection, absent, converted, detect, unused_columns, unused_note
from tunesmith.data.pieces import Lines, Piece, rows, worked
from tunesmith.data.shaping import SHAPING, shaped
from tunesmith.data.sources import Broken, Facts, Source, open_source
from tunesmith.data.templates import IGNORED, Encoder, Encoding, LossOn, encode_batches, views
from tunesmith.errors import DataError, counted, nearest
from tunesmith.models import Kind
from tunesmith.recipe import Data, DataSource, Task

MINORITY = 0.1
"""Ratings are out of balance where fewer than this share are of one kind."""
FEW_RATINGS = 10
"""With fewer ratings their balance says nothing."""
NEARLY_ALL = 0.95
"""Where at least this share of the rows is of one format, the others are likely meant to be."""
_PLACE_OF = {name: place for place, name in enumerate(FORMATS, 1)}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: where, what, and what mends it. File-level findings have no row."""

    kind: str
    severity: Severity
    source: str
    row: int | None
    column: str | None
    message: str
    fix: str

    @property
    def place(self) -> str:
        """Source, row and column in one."""
        row = "" if self.row is None else f":{self.row}"
        return f"{self.source}{row}" + (f" {self.column}" if self.column else "")


@dataclass
class Checked:
    """What the rows of one piece came to, in the order of the source."""

    numbers: array[int] = field(default_factory=lambda: array("Q"))
    sources: list[tuple[str, int]] = field(default_factory=list)
    """Names of the rows' sources, each with how many rows in a row it has."""
    worst: bytearray = field(default_factory=bytearray)
    """Each row's worst finding as a place in SEVERITIES; 0 for none."""
    format_of: bytearray = field(default_factory=bytearray)
    """Each row's format as a place in FORMATS, counted from 1; 0 for none."""
    blank: int = 0
    """Blank lines."""
    counts: Counter[str] = field(default_factory=Counter)
    found: list[tuple[int, Found]] = field(default_factory=list)
    """The first findings of each kind, each with its row's place in the piece."""
    usable: array[int] = field(default_factory=lambda: array("Q"))
    """Places of the rows that have an example; what follows is about them."""
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    lengths: array[int] = field(default_factory=lambda: array("Q"))
    """Tokens, estimated."""
    sketches: NDArray[np.uint32] | None = None
    labels: Counter[bool] = field(default_factory=Counter)
    rated: list[tuple[int, int, bool]] = field(default_factory=list)
    """Rated answers: place, hash of prompt and answer, and label."""
    formats: Counter[str] = field(default_factory=Counter)
    signatures: Counter[tuple[str, ...]] = field(default_factory=Counter)
    names: dict[str, None] = field(default_factory=dict)
    roles: Counter[tuple[str, Any]] = field(default_factory=Counter)

    def add(self, place: int, found: Found, limit: int) -> None:
        """Count a finding, and keep it while there are few of its kind."""
        self.counts[found.kind] += 1
        self.worst[place] = max(self.worst[place], SEVERITIES.index(CHECKS[found.kind].severity))
        if self.counts[found.kind] <= limit:
            self.found.append((place, found))


def check_piece(settings: Settings, piece: Piece) -> Checked:
    """Everything that one piece tells without the others."""
    checked = Checked()
    detection = settings.detection
    keys_seen: set[tuple[str, ...]] = set()
    joined: list[str] = []
    for place, record in enumerate(rows(piece)):
        checked.numbers.append(record.row.number)
        checked.worst.append(0)
        checked.format_of.append(0)
        if checked.sources and checked.sources[-1][0] == record.row.source:
            checked.sources[-1] = (record.row.source, checked.sources[-1][1] + 1)
        else:
            checked.sources.append((record.row.source, 1))
        if isinstance(record, Broken):
            checked.add(place, broken(record), settings.limit)
            continue
        keys = tuple(record.values)
        if keys not in keys_seen:
            keys_seen.add(keys)
            checked.names.update(dict.fromkeys(keys))
        checked.signatures[tuple([name for name, value in record.values.items() if value is not None])] += 1
        checked.roles[record.row.source, record.role] += 1
        example, format, found = check_row(record, detection, settings)
        for item in found:
            checked.add(place, item, settings.limit)
        if format is not None:
            checked.formats[format.name] += 1
            checked.format_of[-1] = _PLACE_OF.get(format.name, 0)
        if example is None:
            continue
        text = "\n".join(texts(example))
        checked.usable.append(place)
        checked.hashes.append(int(row_hash(example)[:16], 16))
        checked.lengths.append(estimated_length(example, len(text)) if settings.estimates else 0)
        joined.append(text)
        if isinstance(example, Rating):
            checked.labels[example.label] += 1
            answer = row_hash(replace(example, label=True))
            checked.rated.append((place, int(answer[:16], 16), example.label))
    checked.sketches = np.concatenate(
        [sketches(joined[n : n + 500]) for n in range(0, len(joined), 500)] or [sketches([])]
    )
    if isinstance(piece, Lines):
        checked.blank = piece.count - len(checked.numbers)
    return checked


@dataclass
class Report:
    """What `validate` found."""

    dataset: str
    task: str | None
    rows: int
    ok: int
    with_errors: int
    with_warnings: int
    """rows = ok + with_errors + with_warnings: a row counts once, by its worst finding; notes leave it ok."""
    counts: Mapping[str, int]
    """Number of findings of each kind, those of whole files included."""
    findings: Sequence[Finding]
    """The first of each kind, in the order of the source."""
    limit: int
    formats: Mapping[str, int]
    detection: str | None
    """Why rows are read as these formats; None where that could not be settled."""
    notes: Sequence[str]
    labels: Mapping[str, int]
    lengths: Mapping[str, Any]
    model: str | None = None
    proof: Mapping[str, Any] | None = None
    fixed: Mapping[str, Any] | None = None

    @property
    def severities(self) -> dict[Severity, int]:
        """Number of findings by severity."""
        counts: Counter[Severity] = Counter()
        for kind, count in self.counts.items():
            counts[CHECKS[kind].severity] += count
        return {severity: counts[severity] for severity in reversed(SEVERITIES)}

    @property
    def has_errors(self) -> bool:
        """Whether training would drop a row, or refuse the whole data set."""
        return self.severities["error"] > 0

    def as_dict(self) -> dict[str, Any]:
        """The report as `--json` prints it."""
        facts = asdict(self)
        rows = {name: facts.pop(name) for name in ("rows", "ok", "with_errors", "with_warnings")}
        return {
            "dataset": facts.pop("dataset"),
            "task": facts.pop("task"),
            "rows": rows,
            "findings_by_severity": self.severities,
            **facts,
        }


Watch = Callable[[Mapping[str, Any]], None]

TASK_SHAPES: dict[Task, tuple[tuple[str, ...], str]] = {
    "chat": (tuple(f.name for f in FORMATS.values() if f.shape is not Text), "conversations"),
    "instruct": (tuple(f.name for f in FORMATS.values() if f.shape is not Text), "questions with answers"),
    "code": (
        ("code", "prompt_completion", "problem_solution", "prompt_response", "instruction", "input_output"),
        "code, or prompts with completions",
    ),
}
"""Formats that a task is made for, and what they are in a word; tasks that take any are not listed."""


@dataclass
class _Whole:
    """What is kept of all rows, a few bytes each, and the findings so far."""

    numbers: array[int] = field(default_factory=lambda: array("Q"))
    sources: list[tuple[str, int]] = field(default_factory=list)
    """Each source's name with the running number of its first row."""
    worst: bytearray = field(default_factory=bytearray)
    format_of: bytearray = field(default_factory=bytearray)
    blank: int = 0
    usable: array[int] = field(default_factory=lambda: array("Q"))
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    lengths: array[int] = field(default_factory=lambda: array("Q"))
    counts: Counter[str] = field(default_factory=Counter)
    kept: list[tuple[int, Found]] = field(default_factory=list)
    """Findings with their row's running number, -1 for one of the whole source."""
    labels: Counter[bool] = field(default_factory=Counter)
    rated: dict[int, tuple[int, bool]] = field(default_factory=dict)
    """The first row with a rated answer, by its hash, and the label."""
    contradicted: list[tuple[int, int]] = field(default_factory=list)
    """Rows whose answer is rated otherwise in an earlier one, with that one."""
    formats: Counter[str] = field(default_factory=Counter)
    signatures: Counter[tuple[str, ...]] = field(default_factory=Counter)
    names: dict[str, None] = field(default_factory=dict)
    roles: Counter[tuple[str, Any]] = field(default_factory=Counter)

    def take(self, checked: Checked, limit: int) -> None:
        """Add a piece's rows."""
        base = len(self.numbers)
        number = base
        for name, count in checked.sources:
            if not self.sources or self.sources[-1][0] != name:
                self.sources.append((name, number))
            number += count
        self.numbers.extend(checked.numbers)
        self.worst.extend(checked.worst)
        self.format_of.extend(checked.format_of)
        self.blank += checked.blank
        self.usable.extend(base + place for place in checked.usable)
        self.hashes.extend(checked.hashes)
        self.lengths.extend(checked.lengths)
        seen = self.counts.copy()
        for place, found in checked.found:
            seen[found.kind] += 1
            if seen[found.kind] <= limit:
                self.kept.append((base + place, found))
        self.counts += checked.counts
        self.labels += checked.labels
        for place, answer, label in checked.rated:
            earlier, before = self.rated.setdefault(answer, (base + place, label))
            if before != label:
                self.contradicted.append((base + place, earlier))
        self.formats += checked.formats
        self.signatures += checked.signatures
        self.names.update(checked.names)
        self.roles += checked.roles

    def add(
        self,
        number: int,
        kind: str,
        message: str,
        limit: int,
        column: str | None = None,
        fix: str | None = None,
    ) -> None:
        """One more finding, of the row with this running number or of the source as a whole (-1)."""
        self.counts[kind] += 1
        if number >= 0:
            self.worst[number] = max(self.worst[number], SEVERITIES.index(CHECKS[kind].severity))
        if self.counts[kind] <= limit:
            self.kept.append((number, Found(kind, column, message, fix)))

    def row(self, number: int) -> Row:
        """A row's place by its running number."""
        name = next(name for name, first in reversed(self.sources) if first <= number)
        return Row(name, self.numbers[number])


def settings_for(
    data: DataSource,
    *,
    max_length: int = 1024,
    context: Encoder | None = None,
    limit: int = 100,
    adapt: Adapt | None = None,
) -> Settings:
    """What rows are checked by; with `adapt`, that the method can use them as well.

    Raises DataError for options that contradict each other.
    """
    if data.format != "auto" and data.format not in FORMATS:
        raise DataError(f"There is no format '{data.format}'.", fix=nearest(data.format, FORMATS))
    if bool(data.input_text_key) != bool(data.output_text_key):
        raise DataError("--input-text-key and --output-text-key go together.", fix="Give both.")
    return Settings(
        format=data.format,
        input_text_key=data.input_text_key,
        output_text_key=data.output_text_key,
        max_length=max_length,
        # Those of other models' templates are left over from somewhere whatever model is trained.
        specials=tuple(dict.fromkeys((*_own_specials(context), *COMMON_SPECIALS))),
        estimates=context is None,
        limit=limit,
        adapt=adapt,
    )


def _own_specials(context: Encoder | None) -> list[str]:
    return [token for token in context.specials.tokens if token != "\ue000"] if context else []


def validate(
    data: Data,
    settings: Settings,
    *,
    task: Task | None = None,
    context: Encoder | None = None,
    adapt: Adapt = as_it_is,
    loss_on: LossOn = "answers",
    kind: Kind = "causal",
    processes: int = 1,
    watch: Watch = lambda event: None,
) -> tuple[Report, Source | None, bytearray]:
    """What is wrong with a data set: a report, the source (None where it cannot be used), and a byte for
    each row that is not 0 where only tokens told that it cannot be trained.

    With `context`, a tokenizer with its template settled, lengths are counted, and the template and the
    supervision proof are tried, as they are for a model of this kind.
    """
    dataset, max_length, limit = data.dataset, settings.max_length, settings.limit
    whole, near = _Whole(), NearDuplicates()
    source, detection = None, None
    name = Path(dataset).name
    notes: list[str] = []
    refused = bytearray()
    proof = None
    try:
        source = open_source(
            dataset,
            **data.model_dump(include={"config", "split", "data_files", "revision", "max_rows", "streaming"}),
        )
        source = shaped(source, **data.model_dump(include=SHAPING))
        size = source.lines.stat().st_size if source.lines else 0
        for piece, checked in worked(source, functools.partial(check_piece, settings), processes=processes):
            whole.take(checked, limit)
            assert checked.sketches is not None
            if len(checked.sketches):
                near.add_sketches(checked.sketches)
            watch(progress("checking rows", len(whole.numbers), piece, size))
        if not whole.numbers:
            raise DataError(f"{dataset} has no rows.", fix="Check the file: expected at least one record.")
    except DataError as error:
        if source is not None and whole.numbers:
            notes.append("rows behind the place where the file cannot be read are not counted")
        whole.add(-1, "unreadable", told(error), limit, fix=error.fix)
        source = None
    for number, earlier in whole.contradicted:
        said = _same(whole, "rated otherwise than", earlier, limit, "contradiction")
        whole.add(number, "contradiction", said, limit)
    duplicates(whole, near, limit)
    if source:
        detection = _detected(source, whole, data, limit)
        notes += source.notes
        if _begins_with_bom(dataset):
            whole.add(-1, "file_bom", CHECKS["file_bom"].about, limit)
    if source and detection:
        unused = unused_columns(source, detection)
        if unused:
            notes.append(unused_note(unused))
    notes += _not_looked_at(data, with_tokens=context is not None)
    if whole.blank:
        notes.append(f"{counted(whole.blank, 'blank line')} skipped")
    _file_findings(whole, task, limit)
    _other_formats(whole, limit)
    lengths = np.frombuffer(whole.lengths, dtype=np.uint64) if whole.lengths else np.empty(0, dtype=np.uint64)
    unit = f"tokens, estimated at {CHARACTERS_PER_TOKEN} characters each"
    if source and detection and context:
        refused, token_lengths, proof = tokens_checked(
            source, detection, context, whole, adapt=adapt, loss_on=loss_on, kind=kind, data=data,
            limit=limit, watch=watch,
        )  # fmt: skip
        lengths, unit = (
            np.frombuffer(token_lengths, dtype=np.uint64) if token_lengths else lengths[:0],
            "tokens",
        )
    worst = Counter(whole.worst)
    failed, warned = SEVERITIES.index("error"), SEVERITIES.index("warning")
    report = Report(
        dataset=dataset,
        task=task,
        rows=len(whole.numbers),
        ok=len(whole.numbers) - worst[failed] - worst[warned],
        with_errors=worst[failed],
        with_warnings=worst[warned],
        counts={kind: whole.counts[kind] for kind in CHECKS if whole.counts[kind]},
        findings=_findings(whole, name, detection),
        limit=limit,
        formats=dict(whole.formats),
        detection=detection.reason if detection else None,
        notes=notes,
        labels={"good": whole.labels[True], "bad": whole.labels[False]} if whole.labels else {},
        lengths=percentiles(lengths, max_length, unit),
        proof=proof,
    )
    return report, source if detection else None, refused


def _not_looked_at(data: Data, *, with_tokens: bool) -> list[str]:
    """What the recipe says of the rows that no finding takes into account."""
    notes = []
    if data.mix:
        others = ", ".join(section.dataset for section in data.mix)
        notes.append(
            f"data.mix is not looked at: validate {others} on {'its' if len(data.mix) == 1 else 'their'} own"
        )
    if data.group_by:
        notes.append("data.group_by is not looked at: it says which rows share a split")
    if not with_tokens:
        ignored = [name for name in ("system_prompt", "over_long") if name in data.model_fields_set]
        notes += [
            f"data.{name} counts in tokens only: give --model to take it into account" for name in ignored
        ]
    return notes


def progress(stage: str, done: int, piece: Piece, size: int) -> dict[str, Any]:
    """How far the rows are; of a file with lines the share of its bytes tells how many there are."""
    total = None
    if isinstance(piece, Lines):
        total = max(done, round(done * size / max(piece.end, 1)))
    return {"kind": "progress", "stage": stage, "done": done, "total": total}


def told(error: DataError) -> str:
    """A data error in one line, without what it quotes from the file."""
    found = (error.found or "").partition("\n")[0]
    if found[:1] in ("'", '"'):
        found = ""
    return masked(" ".join(part for part in (error.problem, found) if part))


def _begins_with_bom(dataset: str) -> bool:
    path = Path(dataset).expanduser()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(3) == b"\xef\xbb\xbf"


def duplicates(whole: _Whole, near: NearDuplicates, limit: int) -> None:
    """Findings for rows that are the same, or nearly the same, as an earlier one."""
    if not whole.usable:
        return
    hashes = np.frombuffer(whole.hashes, dtype=np.uint64)
    order = np.argsort(hashes, kind="stable")
    in_order = hashes[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = in_order[1:] != in_order[:-1]
    firsts = order[is_first][np.cumsum(is_first) - 1]
    is_copy = np.zeros(len(order), dtype=bool)
    is_copy[order[~is_first]] = True
    first_of = np.empty(len(order), dtype=np.int64)
    first_of[order] = firsts
    for later in np.flatnonzero(is_copy).tolist():
        number, earlier = whole.usable[later], whole.usable[int(first_of[later])]
        whole.add(number, "duplicate", _same(whole, "the same as", earlier, limit, "duplicate"), limit)
    pairs = near.pairs()
    pairs = pairs[~is_copy[pairs[:, 0]]]
    _, which = np.unique(pairs[:, 0], return_index=True)
    told_already = {number for number, _ in whole.contradicted}
    for later, before in pairs[which].tolist():
        number, earlier = whole.usable[later], whole.usable[before]
        if number in told_already:
            continue
        said = _same(whole, "nearly the same as", earlier, limit, "near_duplicate")
        whole.add(number, "near_duplicate", said, limit)


def _same(whole: _Whole, words: str, earlier: int, limit: int, kind: str) -> str:
    """The message, where it will be kept."""
    return f"{words} {whole.row(earlier)}" if whole.counts[kind] < limit else ""


def _detected(source: Source, whole: _Whole, data: DataSource, limit: int) -> Detection | None:
    """The formats that training would read the rows as, from what the pass has counted."""
    source.__dict__["facts"] = Facts(whole.signatures, tuple(whole.names), whole.roles)
    if not whole.signatures:
        return None  # every row is broken
    try:
        return detect(
            source,
            format=data.format,
            input_text_key=data.input_text_key,
            output_text_key=data.output_text_key,
            known=dict(whole.formats),
        )
    except DataError as error:
        whole.add(-1, "undetected", told(error), limit, fix=error.fix)
        if whole.counts["no_format"] == len(whole.numbers):  # said once for all rows, not of each again
            del whole.counts["no_format"]
            whole.kept = [(number, found) for number, found in whole.kept if found.kind != "no_format"]
        return None


def _file_findings(whole: _Whole, task: Task | None, limit: int) -> None:
    total = whole.labels.total()
    if total >= FEW_RATINGS:
        label, count = min(
            ((label, whole.labels[label]) for label in (True, False)), key=lambda item: item[1]
        )
        if count < MINORITY * total:
            said = "good" if label else "bad"
            whole.add(-1, "imbalance", f"{count} of {total} ratings are {said}", limit, "label")
    if task in TASK_SHAPES:
        wanted, words = TASK_SHAPES[task]
        others = {
            name: count for name, count in whole.formats.items() if name in FORMATS and name not in wanted
        }
        if others:
            found = ", ".join(f"{counted(count, 'row')} '{name}'" for name, count in others.items())
            whole.add(-1, "task", f"task '{task}' is made for {words}; found {found}", limit)


def _other_formats(whole: _Whole, limit: int) -> None:
    """Findings for the few rows that are read as another format than nearly all of them."""
    total = whole.formats.total()
    if len(whole.formats) < 2 or max(whole.formats.values()) < NEARLY_ALL * total:
        return
    [(main, count)] = whole.formats.most_common(1)
    needed = ", ".join(" or ".join(names) for names in FORMATS[main].columns)
    format_of, names = np.frombuffer(whole.format_of, dtype=np.uint8), list(FORMATS)
    for number in np.flatnonzero((format_of != 0) & (format_of != _PLACE_OF[main])).tolist():
        said = f"read as '{names[format_of[number] - 1]}', where {count:,} of {total:,} rows are '{main}', "
        whole.add(number, "other_format", f"{said}which needs a value in {needed}", limit)


def _findings(whole: _Whole, name: str, detection: Detection | None) -> list[Finding]:
    """What was kept, in the order of the source, with severity and remedy."""
    made = []
    for number, found in sorted(whole.kept, key=lambda item: item[0]):
        check = CHECKS[found.kind]
        row = whole.row(number) if number >= 0 else None
        column, message = found.column, found.message
        if found.kind == "no_format":
            column, message = _missing(json.loads(message), detection, whole.names.keys())
        made.append(
            Finding(
                found.kind,
                check.severity,
                row.source if row else name,
                row.number if row else None,
                column,
                message,
                found.fix or check.fix,
            )
        )
    return made


def _missing(present: list[str], detection: Detection | None, columns: Set[str]) -> tuple[str | None, str]:
    if detection is None:
        return None, f"no format is known for the columns {', '.join(present)}"[:300]
    reason = absent(set(present), detection, columns)
    column = re.match(r"no value for ([^, ]+)", reason)
    return column[1] if column else None, reason


def percentiles(lengths: NDArray[np.uint64], max_length: int, unit: str) -> dict[str, Any]:
    """How long the rows are."""
    if not len(lengths):
        return {}
    at = (0, 50, 90, 95, 99, 100)
    values = np.percentile(lengths, at, method="nearest")
    names = ("shortest", "median", "p90", "p95", "p99", "longest")
    return {
        "unit": unit,
        **{name: int(value) for name, value in zip(names, values, strict=True)},
        "max_length": max_length,
        "above_max_length": int((lengths > max_length).sum()),
    }


REFUSALS = {
    "template": "the model's chat template refuses it",
    "supervision": "it breaches the supervision proof",
    "unusable": "it is longer than max_length allows",
}
"""Findings for which a row that is well in itself cannot be trained with a model, and why."""

TOKENIZED = 1000
"""Rows that are tokenized together."""


def tokens_checked(
    source: Source,
    detection: Detection,
    context: Encoder,
    whole: _Whole,
    *,
    adapt: Adapt,
    loss_on: LossOn,
    kind: Kind,
    data: Data,
    limit: int,
    watch: Watch,
) -> tuple[bytearray, array[int], Mapping[str, Any]]:
    """What only tokens can tell: rows that the template refuses, the supervision proof, what is cut.

    Gives a byte for each row (a place in REFUSALS where it cannot be trained), the rows' lengths,
    and the proof's account.
    """
    refused, lengths = bytearray(len(whole.numbers)), array("Q")
    encode: Callable[..., Iterator[Any]] = encode_batches
    max_length = data.max_length
    opening = Message("system", data.system_prompt) if data.system_prompt else None
    drops = data.over_long in ("drop", "error")
    proof = supervision.Proof(
        context,
        loss_on=loss_on,
        max_length=max_length,
        may_cut_answers=data.over_long == "truncate_answers",
        rows=len(whole.numbers),
    )
    if kind == "seq2seq":
        encode, proof = pairs.encode_rows, pairs.PairProof(context, rows=len(whole.numbers))
    error = SEVERITIES.index("error")

    def examples() -> Iterator[tuple[int, Example]]:
        for number, record in enumerate(source.scan()):
            if isinstance(record, Broken) or number >= len(refused) or whole.worst[number] == error:
                continue
            example = converted(record, detection, opening=opening)
            if isinstance(example, Unusable):
                continue
            try:
                yield number, adapt(example)
            except Unusable:
                continue  # nothing is wrong with it; the method has no use for it

    waiting: list[list[tuple[int, int, bool]]] = []

    def batches() -> Iterator[list[Example]]:
        for batch in batched(examples(), TOKENIZED):
            seen = [
                (
                    number,
                    [example] if kind == "seq2seq" else views(example, context, loss_on),
                    isinstance(example, Preference),
                )
                for number, example in batch
            ]
            waiting.append([(number, len(shown), is_pair) for number, shown, is_pair in seen])
            yield [view for _, shown, _ in seen for view in shown]

    def refuse(number: int, kind: str, message: str) -> None:
        refused[number] = 1 + list(REFUSALS).index(kind)
        whole.add(number, kind, masked(message), limit)

    for batch, encodings in encode(batches(), context, loss_on=loss_on):
        numbers, made = waiting.pop(0), iter(zip(batch, encodings, strict=True))
        kept: list[tuple[int, Example, Encoding]] = []
        paired: list[tuple[int, list[Encoding]]] = []
        for number, count, is_pair in numbers:
            shown = list(itertools.islice(made, count))
            reason = next((str(found) for _, found in shown if isinstance(found, Unusable)), None)
            if reason:
                refuse(number, "template", reason)
                continue
            found = [(number, view, item) for view, item in shown if isinstance(item, Encoding)]
            lengths.append(sum(len(item.input_ids) for _, _, item in found))
            longest = max(len(item.input_ids) for _, _, item in found)
            if drops and longest > max_length:
                said = f"{longest:,} tokens are more than {max_length:,} (over_long: {data.over_long})"
                refuse(number, "unusable", said)
            else:
                kept += found
                if is_pair:
                    paired.append((number, [item for _, _, item in found]))
        breaches = proof.check([n for n, _, _ in kept], [e for _, e, _ in kept], [e for _, _, e in kept])
        for (number, example, encoding), breach in zip(kept, breaches, strict=True):
            if refused[number]:
                continue
            if breach:
                refuse(number, "supervision", f"{breach} ({len(encoding.input_ids):,} tokens)")
            elif kind == "seq2seq":
                if lost := pairs.cut_to(encoding, max_length, context.tokenizer)[1]:
                    said = f"{lost:,} of its {len(encoding.input_ids):,} tokens would be cut"
                    whole.add(
                        number, "long", f"{said}: inputs and answers have up to {max_length:,} each", limit
                    )
            elif len(encoding.input_ids) > max_length and not isinstance(example, Text):
                whole.add(number, "long", cut(encoding, max_length), limit)
        for number, (good, bad) in paired:
            if not refused[number] and (breach := proof.check_pair(whole.row(number), good, bad)):
                refuse(number, "supervision", breach)
        watch({"kind": "progress", "stage": "tokenizing", "done": numbers[-1][0] + 1, "total": len(refused)})
    return refused, lengths, proof.as_dict()


def cut(encoding: Encoding, max_length: int) -> str:
    """What a row above the length loses, exactly."""
    trained = encoding.trained
    lost = sum(label != IGNORED for label in encoding.labels[max_length:])
    said = f"{lost:,} of its {trained:,} trained tokens" if lost else "only context behind the answers"
    tokens = len(encoding.input_ids)
    return f"{tokens:,} tokens, of which the first {max_length:,} are kept: {said} would be cut"
