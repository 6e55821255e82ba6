"""Answers to a whole set of prompts, by any engine, into one file: a line for every row, in the order of the rows."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith import engines
from tunesmith.data import OPENING, formats, prompts, sources, templates
from tunesmith.data.examples import Row, Unusable
from tunesmith.data.shaping import SHAPING, shaped
from tunesmith.errors import DataError, RunError
from tunesmith.recipe import DataSource, Evaluation
from tunesmith.training.run import write_whole


@dataclass(frozen=True)
class Answered:
    """What became of a set of prompts."""

    file: Path
    rows: int
    """All of the set: those answered, and those that could not be asked."""
    answered: int
    refused: Mapping[str, int]
    """Why rows could not be asked, and how many."""
    ended: Mapping[str, int]
    """Answers by why they ended: `stop` or `length`."""
    settings: Mapping[str, Any]
    """What the answers were made with."""

    def sentence(self) -> str:
        """How many rows became what."""
        why = "; ".join(f"{count} not asked: {reason}" for reason, count in self.refused.items())
        cut = self.ended.get("length", 0)
        return (
            f"{self.answered:,} of {self.rows:,} rows were answered"
            + (f", {cut:,} of them up to the longest length" if cut else "")
            + (f"; {why}" if why else "")
            + "."
        )


def generate(
    source: engines.Source,
    data: DataSource,
    evaluation: Evaluation,
    file: Path,
    *,
    progress: Callable[[int, int], None],
    say: Callable[[str], None],
) -> Answered:
    """Answer every row of a set greedily and write `file`: JSON lines of `row`, `prompt`, `completion` and
    `finish_reason`, or `error` where a row could not be asked.

    Rows are read as `prompt` unless the section names another format, or the column that asks. Answers are kept beside
    the file as they come, and taken from there by the same command after a kill. Raises DataError where no row is a
    question, RunError where the file is there already.
    """
    if file.exists():
        raise RunError(f"{file} is there already.", fix="Name another --output, or remove it.")
    asked: list[tuple[Row, str, tuple[int, ...]] | tuple[Row, str, None]] = list(_read(source, data))
    refused = Counter(text for _, text, ids in asked if ids is None)
    written = [ids for _, _, ids in asked if ids is not None]
    if not written:
        raise DataError(
            f"No row of {data.dataset} can be asked.",
            found="; ".join(f"{count} × {reason}" for reason, count in refused.most_common(3)) or "no row",
            fix="--format says how rows are read (`tunesmith show formats`); a column `prompt` is enough, and "
            "--input-text-key names another one.",
        )
    mark = hashlib.sha256(str(file.absolute()).encode()).hexdigest()[:16]
    folder = file.parent / f".answers-{mark}"
    given = engines.Asked(
        written,
        evaluation.max_new_tokens,
        templates.end_of_turn_ids(source.tokenizer),
        batch_tokens=evaluation.batch_tokens,
    )
    found, settings = engines.answers(
        source,
        given,
        engine=evaluation.engine,
        folder=folder,
        progress=lambda done: progress(done, len(written)),
        say=say,
    )
    waiting = iter(found)

    def lines() -> Iterator[str]:
        for row, text, ids in asked:
            line: dict[str, Any] = {"row": str(row)}
            if ids is None:
                line["error"] = text
            else:
                answer = next(waiting)
                line |= {"prompt": text, "completion": answer.text, "finish_reason": answer.finish_reason}
            yield json.dumps(line, ensure_ascii=False) + "\n"

    write_whole(file, lines())
    engines.forget(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    ended = Counter(str(answer.finish_reason) for answer in found)
    return Answered(file, len(asked), len(found), refused, ended, settings)


def _read(
    source: engines.Source, data: DataSource
) -> Iterator[tuple[Row, str, tuple[int, ...]] | tuple[Row, str, None]]:
    """Every row with its last question and its token ids, or with the reason why it cannot be asked."""
    opened = sources.open_source(data.dataset, **data.model_dump(include=OPENING))
    rows = sources.checked(shaped(opened, **data.model_dump(include=SHAPING)), data.dataset)
    question, answer = data.input_text_key, data.output_text_key
    if question and not answer:  # the answers are written here
        detection = formats.asking(rows, question)
    else:
        is_named = bool(question or answer) or data.format != "auto"
        detection = formats.detect(
            rows,
            format=data.format if is_named else "prompt",
            input_text_key=question,
            output_text_key=answer,
        )
    for record, example in formats.convert(rows, detection):
        if isinstance(example, Unusable):
            yield record.row, str(example), None
            continue
        prompt = prompts.prompt_of(example)
        if prompt is None:
            yield record.row, "nothing is asked", None
            continue
        try:
            ids = tuple(templates.prompt_ids(prompt.messages, source.tokenizer, tools=prompt.tools))
        except Unusable as reason:
            yield record.row, str(reason), None
            continue
        yield record.row, prompt.messages[-1].content, ids
