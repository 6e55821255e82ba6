"""What the model sees of a row: every token, and whether it is trained, context, special or cut off."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tunesmith.data import BATCH, Splits, batched
from tunesmith.data.examples import Example, Row, Text, Unusable
from tunesmith.data.splitting import FATES
from tunesmith.data.supervision import Proof
from tunesmith.data.templates import Encoder, Encoding, LossOn, encode_batches, encoder, shown, views
from tunesmith.errors import DataError, counted, nearest

TokenRole = Literal["trained", "context", "special", "cut"]


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
) -> list[Inspected]:
    """The named rows (`12`, or `file.jsonl:12`), else `count` of the worst by each measure.

    What is shown has gone through the supervision proof, as in training; what fails says so. Raises DataError
    for a row that is not there.
    """
    context = encoder(tokenizer)
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
        return _named(splits, context, wanted, max_length, loss_on, proven)
    kept: dict[str, list[tuple[float, int, Inspected, Example, Encoding]]] = {name: [] for name in WORST}
    dropped: Counter[str] = Counter()
    for number, (seen, example, encoding) in enumerate(_seen(splits, context, max_length, loss_on)):
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
        replace(proven(seen, example, encoding), pieces=_pieces(encoding, tokenizer, seen))
        for seen, example, encoding in chosen.values()
    ]


def _named(
    splits: Splits,
    context: Encoder,
    wanted: list[str],
    max_length: int,
    loss_on: LossOn,
    proven: Callable[[Inspected, Example, Encoding], Inspected],
) -> list[Inspected]:
    found: dict[str, list[Inspected]] = {}
    for seen, example, encoding in _seen(splits, context, max_length, loss_on):
        names = {str(seen.row), str(seen.row.number)} & set(wanted)
        for name in names:
            known = found.setdefault(name, [])
            if not known or known[0].row == seen.row:
                if encoding is not None and example is not None:
                    seen = replace(
                        proven(seen, example, encoding), pieces=_pieces(encoding, context.tokenizer, seen)
                    )
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


def _seen(
    splits: Splits, context: Encoder, max_length: int, loss_on: LossOn
) -> Iterator[tuple[Inspected, Example | None, Encoding | None]]:
    """Every row, without the text of its tokens."""
    waiting: list[list[tuple[int, Row, Example | None, str | None]]] = []

    def examples() -> Iterator[list[Example]]:
        for batch in batched(splits.rows(), BATCH):
            waiting.append([])
            for number, row, example in batch:
                parts = views(example, context, loss_on) if example is not None else [None]
                named = [
                    f"question {n} of {len(parts)}" if len(parts) > 1 else None
                    for n in range(1, len(parts) + 1)
                ]
                waiting[-1] += [(number, row, view, name) for view, name in zip(parts, named, strict=True)]
            yield [view for _, _, view, _ in waiting[-1] if view is not None]

    for _, encodings in encode_batches(examples(), context, loss_on=loss_on):
        each = iter(encodings)
        for number, row, example, part in waiting.pop(0):
            fate, reason = FATES[splits.fates[number]], splits.reasons.get(number)
            encoding = next(each) if example is not None else None
            if encoding is None or isinstance(encoding, Unusable):
                reason = reason if encoding is None else str(encoding)
                yield Inspected(row, "dropped", 0, 0, 0, reason), example, None
                continue
            length = len(encoding.input_ids)
            kept, cut = encoding, 0
            if length > max_length and not isinstance(
                example, Text
            ):  # a text is cut into pieces, and none lost
                kept = Encoding(encoding.input_ids[:max_length], encoding.labels[:max_length])
                cut = length - max_length
            yield Inspected(row, fate, length, kept.trained, cut, reason, part), example, encoding


def _pieces(encoding: Encoding, tokenizer: Any, seen: Inspected) -> tuple[tuple[str, TokenRole], ...]:
    kept = seen.tokens - seen.cut
    return tuple(
        (text, "cut" if place >= kept else role)
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
