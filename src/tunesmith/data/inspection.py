"""What the model sees of a row: every token, and whether it is trained, context, special or cut off."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.data import BATCH, Splits, batched
from tunesmith.data.examples import Example, Preference, Row, Text, Unusable
from tunesmith.data.splitting import FATES
from tunesmith.data.supervision import Proof
from tunesmith.data.templates import Encoder, Encoding, LossOn, encode_batches, encoder, shown, views
from tunesmith.errors import DataError, counted, nearest

TokenRole = Literal["trained", "context", "special", "cut"]

Encode = Callable[..., Iterator[tuple[Sequence[Example], list[Encoding | Unusable]]]]
Cut = Callable[[Encoding], NDArray[np.bool_]]
"""Which tokens of an encoding are cut off."""


@dataclass(frozen=True)
class _Look:
    """How the rows are looked at."""

    splits: Splits
    context: Encoder
    loss_on: LossOn
    encode: Encode
    cut: Cut

    def views(self, example: Example | None) -> list[Example] | list[None]:
        """The example as it is trained: once, or once for each question."""
        if example is None:
            return [None]
        return views(example, self.context, self.loss_on) if self.encode is encode_batches else [example]


@dataclass(frozen=True)
class Inspected:
    """One row as the model sees it."""

    row: Row
    fate: str
    tokens: int
    """Length of the whole example."""
    trained: int
    """Tokens with a label, after the cut."""
    cut: int
    """Tokens behind `max_length`."""
    reason: str | None = None
    """Why it is dropped, or why training would refuse it."""
    part: str | None = None
    """Which of several examples, where a conversation is trained once for each question."""
    why: str | None = None
    """Why it is shown."""
    pieces: tuple[tuple[str, TokenRole], ...] = ()
    """Text and role of each token; a character of several tokens stands at the last of them."""

    @property
    def trained_share(self) -> float:
        """Share of the kept tokens that is trained."""
        return self.trained / max(self.tokens - self.cut, 1)

    def as_dict(self) -> dict[str, Any]:
        """The row as `--json` gives it."""
        return {**asdict(self), "row": str(self.row), "trained_share": round(self.trained_share, 4)}


WORST: dict[str, Callable[[Inspected], float]] = {
    "longest": lambda seen: seen.tokens,
    "most truncated": lambda seen: seen.cut or -1,
    "lowest trained share": lambda seen: -seen.trained_share,
}
"""What makes a row worth looking at; the highest value first."""


def inspect_rows(
    splits: Splits,
    tokenizer: Any,
    *,
    max_length: int,
    loss_on: LossOn,
    over_long: str = "truncate",
    on_breach: str = "stop",
    rows: Iterable[str] = (),
    count: int = 3,
    encode: Encode = encode_batches,
    cut: Cut | None = None,
) -> list[Inspected]:
    """The named rows (`12`, or `file.jsonl:12`), else `count` of the worst by each measure.

    `encode` makes encodings of batches of examples, `cut` says which tokens of one are cut off; by default
    those behind `max_length`. What is shown has gone through the supervision proof, as in training; what fails
    says so. Raises DataError for a row that is not there.
    """
    context = encoder(tokenizer)
    cut = cut or (lambda encoding: np.arange(len(encoding.input_ids)) >= max_length)
    look = _Look(splits, context, loss_on, encode, cut)
    wanted = list(rows)
    proof = Proof(
        context,
        loss_on=loss_on,
        max_length=max_length,
        may_cut_answers=over_long == "truncate_answers",
        rows=0,  # few are shown: the prompts of all are tried
    )

    def proven(seen: Inspected, example: Example, encoding: Encoding) -> Inspected:
        if seen.fate not in ("train", "validation"):
            return seen
        if over_long in ("drop", "error") and seen.cut:
            reason = f"longer than max_length {max_length} (over_long: {over_long})"
            return replace(seen, fate="dropped", reason=reason)
        [breach] = proof.check([0], [example], [encoding])
        if breach and on_breach == "drop":
            return replace(seen, fate="dropped", reason=breach)
        said = f"fails the supervision proof, so nothing would be trained: {breach}"
        return replace(seen, reason=said) if breach else seen

    if wanted:
        return _named(look, wanted, proven)
    kept: dict[str, list[tuple[float, int, Inspected, Example, Encoding]]] = {name: [] for name in WORST}
    dropped: Counter[str] = Counter()
    for number, (seen, example, encoding) in enumerate(_seen(look)):
        if encoding is None or example is None:
            dropped[seen.reason or "?"] += 1
            continue
        for name, measure in WORST.items():
            value = measure(seen)
            if name == "most truncated" and value < 0:
                continue
            entry = (value, -number, seen, example, encoding)
            if len(kept[name]) < count:
                heapq.heappush(kept[name], entry)
            elif entry[:2] > kept[name][0][:2]:
                heapq.heapreplace(kept[name], entry)
    if dropped and not any(kept.values()):
        raise DataError(
            f"None of the {counted(dropped.total(), 'row')} can be shown.",
            found="; ".join(f"{number} × {reason}" for reason, number in dropped.most_common(5)),
            fix="Mend the rows, or choose another --chat-template or --model.",
        )
    chosen: dict[tuple[Row, str | None], tuple[Inspected, Example, Encoding]] = {}
    for name, entries in kept.items():
        for _, _, seen, example, encoding in sorted(entries, key=lambda entry: entry[:2], reverse=True):
            before = chosen.get((seen.row, seen.part))
            why = f"{before[0].why}, {name}" if before else name
            chosen[seen.row, seen.part] = (replace(seen, why=why), example, encoding)
    return [
        replace(proven(seen, example, encoding), pieces=_pieces(encoding, tokenizer, seen, cut))
        for seen, example, encoding in chosen.values()
    ]


def _named(
    look: _Look, wanted: list[str], proven: Callable[[Inspected, Example, Encoding], Inspected]
) -> list[Inspected]:
    splits, tokenizer = look.splits, look.context.tokenizer
    found: dict[str, list[Inspected]] = {}
    for seen, example, encoding in _seen(look):
        names = {str(seen.row), str(seen.row.number)} & set(wanted)
        for name in names:
            known = found.setdefault(name, [])
            if not known or known[0].row == seen.row:
                if encoding is not None and example is not None:
                    pieces = _pieces(encoding, tokenizer, seen, look.cut)
                    seen = replace(proven(seen, example, encoding), pieces=pieces)
                known.append(seen)
        if not names and len(found) == len(wanted):
            break
    missing = [name for name in wanted if name not in found]
    if missing:
        places: dict[str, tuple[int, int]] = {}
        for _, row, _ in splits.rows():
            low, high = places.get(row.source, (row.number, row.number))
            places[row.source] = (min(low, row.number), max(high, row.number))
        spans = [f"{name}:{low} to {high}" for name, (low, high) in list(places.items())[:5]]
        asked = missing[0].rpartition(":")
        raise DataError(
            f"There is no row {missing[0]}.",
            found=f"{counted(len(splits.fates), 'row')}, {', '.join(spans)}",
            fix=nearest(asked[0], places)
            if asked[1] and asked[0] not in places
            else f"Give the number of a row, such as {next(iter(places.values()))[0]}: that which `validate` and "
            "the ledger give it (of .jsonl and .txt its line; blank lines have none).",
        )
    return [seen for name in wanted for seen in found[name]]


def _seen(look: _Look) -> Iterator[tuple[Inspected, Example | None, Encoding | None]]:
    """Every row, without the text of its tokens."""
    splits = look.splits
    waiting: list[list[tuple[int, Row, Example | None, str | None]]] = []

    def examples() -> Iterator[list[Example]]:
        for batch in batched(splits.rows(), BATCH):
            waiting.append([])
            for number, row, example in batch:
                parts = look.views(example)
                named: list[str | None] = [
                    f"question {n} of {len(parts)}" if len(parts) > 1 else None
                    for n in range(1, len(parts) + 1)
                ]
                if isinstance(example, Preference):
                    named = ["chosen answer", "rejected answer"]
                waiting[-1] += [(number, row, view, name) for view, name in zip(parts, named, strict=True)]
            yield [view for _, _, view, _ in waiting[-1] if view is not None]

    for _, encodings in look.encode(examples(), look.context, loss_on=look.loss_on):
        each = iter(encodings)
        for number, row, example, part in waiting.pop(0):
            fate, reason = FATES[splits.fates[number]], splits.reasons[number]
            encoding = next(each) if example is not None else None
            if encoding is None or isinstance(encoding, Unusable):
                reason = reason if encoding is None else str(encoding)
                yield Inspected(row, "dropped", 0, 0, 0, reason), example, None
                continue
            length = len(encoding.input_ids)
            kept, lost = encoding, look.cut(encoding)
            if isinstance(example, Text):  # it is cut into pieces, and none lost
                lost = lost & False
            elif lost.any():
                kept = Encoding(encoding.input_ids[~lost], encoding.labels[~lost])
            yield Inspected(row, fate, length, kept.trained, int(lost.sum()), reason, part), example, encoding


def _pieces(
    encoding: Encoding, tokenizer: Any, seen: Inspected, cut: Cut
) -> tuple[tuple[str, TokenRole], ...]:
    lost = cut(encoding) if seen.cut else np.zeros(seen.tokens, dtype=bool)
    return tuple(
        (text, "cut" if lost[place] else role)
        for place, (text, role) in enumerate(
            shown(Encoding(encoding.input_ids.tolist(), encoding.labels.tolist()), tokenizer)
        )
    )


def write_page(rows: list[Inspected], path: Path, *, title: str) -> Path:
    """The rows as one HTML page that opens offline."""
    import jinja2

    from tunesmith.training.run import write_whole

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    page = environment.get_template("inspection.html.jinja").render(rows=rows, title=title)
    return write_whole(path, page)
