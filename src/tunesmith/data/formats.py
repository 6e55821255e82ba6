"""From rows to examples: one function per format, each with a real row in its docstring.

A format knows columns and nothing of tokenizers. Detection goes by columns, row by row where a file mixes
formats of one shape, and says what it chose and why.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.data.examples import (
    Conversation,
    Example,
    Message,
    Preference,
    Prompt,
    Rating,
    Row,
    Text,
    Unusable,
)
from tunesmith.data.sources import Record, Source
from tunesmith.errors import DataError, closest, counted, nearest

Values = Mapping[str, Any]

SYSTEM_COLUMNS = ("system", "system_prompt")
"""Columns that may hold a row's system message."""

LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
"""Labels of rated answers in files that know only text."""

ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "bot": "assistant", "model": "assistant", "tool": "tool", "function": "tool", "observation": "tool",
    "developer": "system",
}  # fmt: skip
"""Names of speakers in the wild, and the role each one is."""


def _always(values: Values) -> bool:
    return True


@dataclass(frozen=True, eq=False)  # each is the same as itself only: hashing all fields would cost every row
class Format:
    """A row layout: the columns it needs (each one of several names) and how it becomes an example."""

    name: str
    shape: type
    columns: tuple[tuple[str, ...], ...]
    convert: Callable[[Values, Row], Example]
    when: Callable[[Values], bool] = _always
    optional: tuple[str, ...] = ()
    """Columns that are used where they are there, besides the system message's."""
    is_detected: bool = True
    """Whether rows may be found to be of this format; another has to be named."""

    @property
    def about(self) -> str:
        """What rows look like, from the function's docstring."""
        return (self.convert.__doc__ or "").split("\n\n")[0].strip().replace("\n    ", " ")

    @property
    def sample(self) -> dict[str, Any]:
        """The real row in the function's docstring."""
        match = re.search(r"^\s*(\{.*\})\s*$", self.convert.__doc__ or "", re.MULTILINE)
        assert match, self.name
        row: dict[str, Any] = json.loads(match[1])
        return row

    def has_columns(self, present: Collection[str]) -> bool:
        """Whether the columns that have a value are enough."""
        return all(any(name in present for name in names) for names in self.columns)

    @property
    def is_conditional(self) -> bool:
        """Whether the columns alone do not settle that a row is of this format."""
        return self.when is not _always

    def used(self, columns: Sequence[str]) -> list[str]:
        """Those of the columns that this format reads."""
        needed = [next((name for name in names if name in columns), None) for names in self.columns]
        return [c for c in columns if c in needed or c in self.optional or c in SYSTEM_COLUMNS]


@dataclass(frozen=True)
class Detection:
    """The formats that rows are read as, and why, in a sentence."""

    formats: tuple[Format, ...]
    reason: str

    def format_of(self, values: Values) -> Format | None:
        """The first of the formats that a row fits."""
        there = tuple([name for name, value in values.items() if value is not None])
        return next((f for f in _candidates(self.formats, there) if f.when(values)), None)


def present(values: Values) -> tuple[str, ...]:
    """The columns that have a value."""
    return tuple([name for name, value in values.items() if value is not None])


@functools.lru_cache(maxsize=4096)
def _candidates(formats: tuple[Format, ...], present: tuple[str, ...]) -> tuple[Format, ...]:
    """The formats that rows with these columns may be of, up to the first that asks for nothing more."""
    fitting = [format for format in formats if format.has_columns(present)]
    certain = next((n for n, format in enumerate(fitting) if not format.is_conditional), len(fitting))
    return tuple(fitting[: certain + 1])


def preference(values: Values, row: Row) -> Preference:
    """A better and a worse answer, as text or messages; the prompt is a column or their common beginning.

    {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"}
    """
    chosen, rejected = (
        _turns(values[name], "assistant", f"{name} answer") for name in ("chosen", "rejected")
    )
    asked = _first(values, "prompt", "question", "instruction", "conversations", "messages")
    given = values.get("input")
    if asked is not None and asked is values.get("instruction") and given is not None and str(given).strip():
        asked = _text(asked, "instruction") + "\n\n" + _text(given, "input")
    return _preference(None if asked is None else _turns(asked, "user"), chosen, rejected, values, row)


def transcripts(values: Values, row: Row) -> Preference:
    """Two transcripts with turns of Human and Assistant (HH-RLHF); the prompt is their common beginning.

    {"chosen": "\\n\\nHuman: 2 + 2?\\n\\nAssistant: 4", "rejected": "\\n\\nHuman: 2 + 2?\\n\\nAssistant: 5"}

    With a column `prompt` that is a transcript, `chosen` and `rejected` may hold the answers alone.
    """
    prompt = values.get("prompt")
    asked = None
    if prompt is not None:
        asked = _transcript(_text(prompt, "prompt"), "prompt")
        if asked[-1].role == "assistant" and is_blank(asked[-1].content):
            asked = asked[:-1]  # the opening of the answer
    sides = []
    for name in ("chosen", "rejected"):
        text = _text(values[name], f"{name} answer")
        is_whole = _SPOKEN.match(text) is not None
        sides.append(_transcript(text, name) if is_whole else (Message("assistant", text.strip()),))
    return _preference(asked, sides[0], sides[1], values, row)


_SPOKEN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant): ?")


def _transcript(text: str, what: str) -> tuple[Message, ...]:
    """The turns of a transcript."""
    before, *parts = _SPOKEN.split(text)
    if not parts or before.strip():
        raise Unusable(f"{what} does not begin with a turn of Human or Assistant")
    speakers = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        Message(speakers[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)
    )


def _is_transcript(values: Values) -> bool:
    """Whether two answers are transcripts, or answers to one."""
    chosen, rejected, prompt = (values.get(name) for name in ("chosen", "rejected", "prompt"))
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return False
    if isinstance(prompt, str):
        return bool(_SPOKEN.match(prompt))
    return prompt is None and all(_SPOKEN.match(text) for text in (chosen, rejected))


def _preference(
    turns: tuple[Message, ...] | None,
    chosen: tuple[Message, ...],
    rejected: tuple[Message, ...],
    values: Values,
    row: Row,
) -> Preference:
    """A pair of answers to a prompt, which is their common beginning where none is given."""
    prompt: tuple[Message, ...]
    if turns is not None:
        prompt = (*_system(values), *turns)
        # Some sets repeat the prompt's turns in both answers.
        for said in (prompt, turns):
            if chosen[: len(said)] == said == rejected[: len(said)] and len(said) < len(chosen):
                chosen, rejected = chosen[len(said) :], rejected[len(said) :]
                break
    else:
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        if shared == len(chosen) == len(rejected):
            shared -= 1  # one and the same answer; that it is, is said later
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise Unusable("no prompt: the answers have no common beginning")
    if turns is None:
        prompt = (*_system(values), *prompt)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or is_blank(answer[-1].content):
            raise Unusable(f"empty {name} answer")
        if answer[-1].role != "assistant":
            raise Unusable(f"the {name} answer is the {answer[-1].role}'s")
        if answer[0].role != "assistant":
            raise Unusable(
                f"the {name} answer begins with a turn of the {answer[0].role}, not with the answer"
            )
    if chosen == rejected:
        raise Unusable("chosen and rejected answer are the same")
    if _spaced_alike(chosen, rejected):
        raise Unusable("chosen and rejected answer are the same but for white space")
    return Preference(prompt, chosen, rejected, row, extra=_extra(values, "prompt", "chosen", "rejected"))


def _spaced_alike(one: Sequence[Message], other: Sequence[Message]) -> bool:
    """Whether answers differ in nothing but white space that says nothing: at the ends, blank lines, double spaces.

    Line breaks and indentation count: in code they are the difference.
    """
    if len(one) != len(other):
        return False
    for a, b in zip(one, other, strict=True):
        if a.content.split() != b.content.split() or a._replace(content="") != b._replace(content=""):
            return False
    return [_lines_of(turn) for turn in one] == [_lines_of(turn) for turn in other]


def _lines_of(turn: Message) -> list[tuple[str, list[str]]]:
    """The lines of a message, each as its indentation and its words."""
    lines = [line for line in turn.content.strip().splitlines() if line.strip()]
    return [(line[: len(line) - len(line.lstrip())], line.split()) for line in lines]


def rating(values: Values, row: Row) -> Rating:
    """An answer with a label, good (true, 1) or bad (false, 0), as prompt and completion or as messages.

    {"prompt": "What is 2 + 2?", "completion": "4", "label": true}
    """
    label = values["label"]
    label = LABELS.get(label.strip().lower(), label) if isinstance(label, str) else label
    if label not in (True, False):
        said = repr(label) if isinstance(label, str | int | float) else json_word(label)
        raise Unusable(f"label {said} is neither true nor false")
    completion: tuple[Message, ...]
    if values.get("messages") is not None:
        turns = (*_system(values), *_turns(_listed(values, "messages"), "user"))
        turns, completion = turns[:-1], turns[-1:]
    else:
        asked = _first(values, "prompt", "question", "instruction")
        if asked is None:
            raise Unusable("no prompt")
        turns = (*_system(values), *_turns(asked, "user"))
        completion = _turns(_first(values, "completion", "response"), "assistant")
    if not turns or not completion or completion[-1].role != "assistant":
        raise Unusable("the rated conversation does not end with an answer")
    if is_blank(completion[-1].content):
        raise Unusable("empty answer")
    return Rating(turns, completion, bool(label), row, extra=_extra(values, "prompt", "completion", "label"))


def messages(values: Values, row: Row) -> Conversation:
    """A conversation as a list of messages with role and content.

    {"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi! How can I help?"}]}

    An assistant's message may have `weight` (0 or 1) or `train` (true or false) to say whether it is
    trained, `reasoning_content` with the thoughts before the answer, and `tool_calls`; a `tool` message
    holds a result, and the column `tools` the schemas of what may be called.
    """
    turns = (*_system(values), *_turns(_listed(values, "messages"), "user"))
    return _conversation(turns, row, _extra(values, "messages", "tools"), _tools(values))


def sharegpt(values: Values, row: Row) -> Conversation:
    """A conversation as a list of turns with from (human, gpt, system) and value.

    {"conversations": [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Hi! How can I help?"}]}
    """
    turns = (*_system(values), *_turns(_listed(values, "conversations"), "user"))
    return _conversation(turns, row, _extra(values, "conversations", "tools"), _tools(values))


def sql(values: Values, row: Row) -> Conversation:
    """A question about a schema (CREATE TABLE ...) and the SQL that answers it; databases stay in one split.

    {"schema": "CREATE TABLE singer (name TEXT)", "question": "How many?", "query": "SELECT count(*) FROM singer"}

    Optional columns: `database` names the group of rows that share a database (else the schema does), and
    `setup` holds the INSERTs that fill it for scoring by execution.
    """
    schema = _text(_first(values, "schema", "context"), "schema")
    question = _text(values["question"], "question")
    query = _text(_first(values, "query", "sql", "answer"), "query")
    database = values.get("database")
    return replace(
        _question_answer(f"{schema}\n\n{question}", query, values, row),
        group=str(database) if database is not None else schema,
        extra={"schema": schema, "setup": values.get("setup") or "", "query": query},
    )


def instruction(values: Values, row: Row) -> Conversation:
    """An instruction, an optional input, and the output.

    {"instruction": "Translate to French", "input": "Hello world", "output": "Bonjour le monde"}
    """
    asked = _text(values["instruction"], "instruction")
    given = values.get("input")
    if given is not None and str(given).strip():
        asked += "\n\n" + _text(given, "input")
    return _question_answer(asked, _first(values, "output", "response", "answer"), values, row)


def prompt_response(values: Values, row: Row) -> Conversation:
    """A prompt and the response.

    {"prompt": "What is machine learning?", "response": "Machine learning is the study of programs that learn."}
    """
    return _question_answer(values["prompt"], values["response"], values, row)


def prompt_completion(values: Values, row: Row) -> Conversation:
    """A prompt and its completion, as for code; both as text or as messages.

    {"prompt": "Write a function to sort a list", "completion": "def sort_list(items):\\n    return sorted(items)"}
    """
    if isinstance(values["prompt"], list):
        turns = (
            *_system(values),
            *_turns(values["prompt"], "user"),
            *_turns(values["completion"], "assistant"),
        )
        return _conversation(turns, row, _extra(values, "prompt", "completion"))
    return _question_answer(values["prompt"], values["completion"], values, row)


def question_answer(values: Values, row: Row) -> Conversation:
    """A question and the reply.

    {"question": "How do I reset my lamp?", "reply": "Hold the button for five seconds."}
    """
    return _question_answer(values["question"], _first(values, "reply", "answer", "response"), values, row)


def input_output(values: Values, row: Row) -> Conversation:
    """An input and the output.

    {"input": "2 + 2", "output": "4"}
    """
    return _question_answer(values["input"], values["output"], values, row)


def problem_solution(values: Values, row: Row) -> Conversation:
    """A programming problem and its solution.

    {"problem": "Add two numbers", "solution": "def add(a, b):\\n    return a + b"}
    """
    return _question_answer(values["problem"], values["solution"], values, row)


def code(values: Values, row: Row) -> Text:
    """Source code without a prompt, trained as text.

    {"code": "class DataProcessor:\\n    def __init__(self):\\n        self.rows = []"}
    """
    return Text(_text(values["code"], "code"), row, extra=_extra(values, "code"))


def text(values: Values, row: Row) -> Text:
    """Running text.

    {"text": "The heart has four chambers."}
    """
    return Text(
        _text(_first(values, "text", "content"), "text"), row, extra=_extra(values, "text", "content")
    )


def prompt(values: Values, row: Row) -> Prompt:
    """A question alone, as text or messages, for methods that learn from rewards (grpo, rloo, ppo).

    {"prompt": "Name a fruit in one word."}

    An optional column `reference` (`answer`, `response`, `completion`, `solution`) holds the answer that is known
    to be right; all others are there for rewards and checks. The format has to be named (`--format prompt`).
    """
    asked = _first(values, *PROMPT_COLUMNS)
    turns = (*_system(values), *_turns(asked, "user"))
    if not any(turn.role == "user" for turn in turns):
        raise Unusable("no turn of the user")
    if turns[-1].role == "assistant":
        raise Unusable("the last turn is the assistant's: nothing is asked")
    known = _first(values, *REFERENCE_COLUMNS)
    if isinstance(known, list | tuple | Mapping):
        known = _turns(known, "assistant")[-1].content
    reference = "" if known is None else _text(known, "reference")
    return Prompt(
        turns, reference, row, checks=_extra(values, *PROMPT_COLUMNS, "tools"), tools=_tools(values)
    )


PROMPT_COLUMNS = ("prompt", "question", "instruction", "messages")
REFERENCE_COLUMNS = ("reference", "answer", "response", "completion", "solution")


def _is_schema(values: Values) -> bool:
    return "CREATE TABLE" in str(_first(values, "schema", "context")).upper()


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(
            "transcripts",
            Preference,
            (("chosen",), ("rejected",)),
            transcripts,
            _is_transcript,
            optional=("prompt",),
        ),
        Format(
            "preference",
            Preference,
            (("chosen",), ("rejected",)),
            preference,
            optional=("prompt", "question", "instruction", "input", "conversations", "messages"),
        ),
        Format(
            "rating",
            Rating,
            (("label",), ("messages", "completion", "response")),
            rating,
            optional=("prompt", "question", "instruction"),
        ),
        Format("messages", Conversation, (("messages",),), messages, optional=("tools",)),
        Format("sharegpt", Conversation, (("conversations",),), sharegpt, optional=("tools",)),
        Format(
            "sql",
            Conversation,
            (("schema", "context"), ("question",), ("query", "sql", "answer")),
            sql,
            _is_schema,
            optional=("database", "setup"),
        ),
        Format(
            "instruction",
            Conversation,
            (("instruction",), ("output", "response", "answer")),
            instruction,
            optional=("input",),
        ),
        Format("prompt_response", Conversation, (("prompt",), ("response",)), prompt_response),
        Format("prompt_completion", Conversation, (("prompt",), ("completion",)), prompt_completion),
        Format(
            "question_answer", Conversation, (("question",), ("reply", "answer", "response")), question_answer
        ),
        Format("problem_solution", Conversation, (("problem",), ("solution",)), problem_solution),
        Format("input_output", Conversation, (("input",), ("output",)), input_output),
        Format("code", Text, (("code",),), code),
        Format("text", Text, (("text", "content"),), text),
        Format(
            "prompt",
            Prompt,
            (PROMPT_COLUMNS,),
            prompt,
            optional=(*REFERENCE_COLUMNS, "tools"),
            is_detected=False,
        ),
    )
}
"""Formats by name, in the order in which detection tries them."""

DETECTED = tuple(format for format in FORMATS.values() if format.is_detected)
"""The formats that rows are tried as where none is named."""


def expected(*, format: str, input_text_key: str | None, output_text_key: str | None) -> Detection:
    """The formats that rows may be of, before any row is seen; `detect` then says which ones they are of.

    Raises DataError for an unknown name.
    """
    if input_text_key or output_text_key:
        if not (input_text_key and output_text_key):
            raise DataError("--input-text-key and --output-text-key go together.", fix="Give both.")
        return Detection((keyed(input_text_key, output_text_key),), "the recipe names the two columns")
    if format == "auto":
        return Detection(DETECTED, "columns")
    if format not in FORMATS:
        raise DataError(f"There is no format '{format}'.", fix=nearest(format, FORMATS))
    return Detection((FORMATS[format],), "the recipe names the format")


def detect(
    source: Source,
    *,
    format: str = "auto",
    input_text_key: str | None = None,
    output_text_key: str | None = None,
    known: Mapping[str, int] | None = None,
) -> Detection:
    """How the rows of a source are read. Raises DataError naming the columns that are there.

    `known` is the number of rows by format, where somebody has counted them already.
    """
    possible = expected(format=format, input_text_key=input_text_key, output_text_key=output_text_key)
    there = source.columns
    if input_text_key and output_text_key:
        missing = [key for key in (input_text_key, output_text_key) if key not in there]
        if missing:
            raise _missing(source, missing)
        return possible
    if format != "auto":
        [chosen] = possible.formats
        missing = [" or ".join(names) for names in chosen.columns if not set(names) & set(there)]
        if missing:
            raise _missing(source, missing, f" for format '{format}'")
        return possible
    known = _counts(source) if known is None else known
    if not known:
        raise DataError(
            f"The rows of {source.title} fit no known format.",
            found=_found(source),
            fix="Fill the empty column, or name others with --input-text-key and --output-text-key."
            if source.empty_columns
            else "Name the question's and the answer's column with --input-text-key and --output-text-key; "
            "`tunesmith show formats` lists the known ones, and rows that only ask need --format prompt.",
        )
    shapes = {FORMATS[name].shape for name in known}
    if len(shapes) > 1:
        raise DataError(
            f"The rows of {source.title} are of several kinds that are not trained alike.",
            found=", ".join(f"{counted(count, 'row')} '{name}'" for name, count in known.items()),
            fix="Split the file, or name one format with --format; rows that do not fit it are dropped.",
        )
    chosen_formats = tuple(f for f in FORMATS.values() if f.name in known)
    if len(known) == 1:
        [name] = known
        used = [next(n for n in names if n in there) for names in FORMATS[name].columns]
        columns = "column" if len(used) == 1 else "columns"
        reason = f"the {columns} {', '.join(used)} {'is' if len(used) == 1 else 'are'} there"
    else:
        reason = "row by row: " + ", ".join(f"{counted(n, 'row')} '{name}'" for name, n in known.items())
    return Detection(chosen_formats, reason)


def _counts(source: Source) -> dict[str, int]:
    """Number of rows by format; read again only where columns alone do not tell."""
    everything = DETECTED
    counts: Counter[str] = Counter()
    unsettled = set()
    for signature, count in source.facts.signatures.items():
        candidates = _candidates(everything, signature)
        if candidates and candidates[0].is_conditional:
            unsettled.add(signature)
        elif candidates:
            counts[candidates[0].name] += count
    if unsettled:
        whole = Detection(everything, "")
        for record in source.records:
            if present(record.values) in unsettled and (format := whole.format_of(record.values)):
                counts[format.name] += 1
    return dict(counts)


def convert(
    source: Source,
    detection: Detection,
    *,
    system_prompt: str | None = None,
    group_by: str | None = None,
) -> Iterator[tuple[Record, Example | Unusable]]:
    """Every row with the example it becomes, or with the reason why it becomes none."""
    opening = Message("system", system_prompt) if system_prompt else None
    for record in source.observed():
        yield record, converted(record, detection, opening=opening, group_by=group_by)


def check_group(source: Source, group_by: str | None) -> None:
    """Raises DataError where there is no such column to group by."""
    if group_by and group_by not in source.columns:
        raise _missing(source, [group_by], " to group by")


def converted(
    record: Record, detection: Detection, *, opening: Message | None = None, group_by: str | None = None
) -> Example | Unusable:
    """The example that one row becomes, or the reason why it becomes none."""
    format = detection.format_of(record.values)
    try:
        if format is None:
            raise Unusable(absent(set(present(record.values)), detection))
        example = format.convert(record.values, record.row)
    except Unusable as reason:
        return reason
    if wrong := _wrong_constraints(record.values):
        return Misnamed(wrong)
    if opening:
        example = _opened(example, opening)
    if group_by:
        value = record.values.get(group_by)
        example = replace(example, group=None if value is None else str(value))
    return example


class Misnamed(Unusable):
    """A row that asks for a check which cannot be made: left out, it would make every score say too much."""


def _wrong_constraints(values: Values) -> str | None:
    from tunesmith.evaluation.instructions import LIMITS, wrong_constraints

    if values.get("constraints") is None and LIMITS.keys().isdisjoint(values):
        return None
    return wrong_constraints(values)


def absent(there: Set[str], detection: Detection, columns: Set[str] = frozenset()) -> str:
    """Why a row that has values in these columns only fits none of the formats. Of names that stand for the same it is
    said which the file has among its `columns`."""
    format = min(detection.formats, key=lambda f: sum(not there & set(names) for names in f.columns))
    lacking = [names for names in format.columns if not there & set(names)]
    missing = [" or ".join([n for n in names if n in columns] or names) for names in lacking]
    return f"no value for {', '.join(missing)}" if missing else f"not of format {format.name}"


def column_of(reason: str, values: Values, format: Format) -> str:
    """The column that the reason speaks of for which `converted` refuses a row."""
    used = format.used(list(values))
    if reason.startswith("turn "):
        for name in used:
            try:
                _turns(values[name], "user")
            except Unusable as refusal:
                if str(refusal) == reason:
                    return name
    words = re.findall(r"\w+", reason.partition(" is ")[0] if " is " in reason else reason)
    named = next((name for name in used if name in words), None)
    if named:
        return named
    of_answer = not {"answer", "query", "completion"}.isdisjoint(words)
    names = format.columns[-1 if of_answer else 0]
    return next((name for name in names if name in used), names[0])


def none_usable(source: Source, reasons: Mapping[str, int]) -> DataError:
    """The error for a source of which no row becomes an example."""
    worst = sorted(reasons.items(), key=lambda item: -item[1])[:5]
    return DataError(
        f"None of the {source.facts.count} rows of {source.title} can be used.",
        found="; ".join(f"{count} × {reason}" for reason, count in worst),
        fix=f"Columns there: {', '.join(source.columns)}. Mend the rows, or name other columns.",
    )


def keyed(input_text_key: str, output_text_key: str) -> Format:
    """A format for data with column names of its own."""

    def convert(values: Values, row: Row) -> Conversation:
        """A question and an answer in columns that the recipe names."""
        return _question_answer(values[input_text_key], values[output_text_key], values, row)

    return Format("columns", Conversation, ((input_text_key,), (output_text_key,)), convert)


def asking(source: Source, key: str) -> Detection:
    """Rows that only ask, in a column with a name of its own. Raises DataError where there is none of that name."""
    if key not in source.columns:
        raise _missing(source, [key])

    def convert(values: Values, row: Row) -> Prompt:
        """A question in the column that the recipe names."""
        return prompt({**values, PROMPT_COLUMNS[0]: values[key]}, row)

    return Detection((Format("column", Prompt, ((key,),), convert),), "the recipe names the column")


def has_numbers(values: Values, detection: Detection) -> bool:
    """Whether a row has a number or truth value where an example has text; it is written out."""
    numbers = [name for name, value in values.items() if isinstance(value, int | float) and name != "label"]
    if not numbers:
        return False
    format = detection.format_of(values)
    return format is not None and not set(numbers).isdisjoint(format.used(list(values)))


def unused_note(columns: Sequence[str]) -> str:
    """What is said of columns beside those that examples are made of."""
    return f"columns that no example is made of, which metrics and rewards can read: {', '.join(columns)}"


def unused_columns(source: Source, detection: Detection) -> list[str]:
    """Columns that no example is made of; they stay beside the examples."""
    there = source.columns
    used = {name for format in detection.formats for name in format.used(there)}
    return [name for name in there if name not in used]


def _opened(example: Example, system: Message) -> Example:
    """The example with a system message, where it has turns and none of its own."""
    match example:
        case Conversation(messages=turns) | Prompt(messages=turns) if turns[0].role != "system":
            return replace(example, messages=(system, *turns))
        case Preference(prompt=turns) | Rating(prompt=turns) if turns[0].role != "system":
            return replace(example, prompt=(system, *turns))
        case _:
            return example


def _found(source: Source) -> str:
    found = "columns " + ", ".join(source.columns)
    if source.empty_columns:
        found += (
            f"; without a value in any of the {source.facts.count} rows: {', '.join(source.empty_columns)}"
        )
    return found


def _missing(source: Source, missing: Sequence[str], purpose: str = "") -> DataError:
    empty = [name for name in missing if name in source.empty_columns]
    if empty:
        return DataError(
            f"The column {empty[0]} of {source.title}{purpose} is empty in every row.",
            found=_found(source),
            fix="Fill it, or name another column.",
        )
    return DataError(
        f"{source.title} has no column {', '.join(missing)}{purpose}.",
        found=_found(source),
        fix=nearest(missing[0].split(" or ")[0], source.columns),
    )


def _question_answer(question: Any, answer: Any, values: Values, row: Row) -> Conversation:
    turns = (
        *_system(values),
        Message("user", _text(question, "question")),
        Message("assistant", _text(answer, "answer")),
    )
    return _conversation(turns, row, _extra(values))


def _conversation(
    turns: tuple[Message, ...], row: Row, extra: Values, tools: tuple[Mapping[str, Any], ...] = ()
) -> Conversation:
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        raise Unusable("no assistant turn")
    if turns[-1].role != "assistant":
        raise Unusable(f"the last turn is the {turns[-1].role}'s, not an answer")
    for turn in answers:
        if not turn.tool_calls and is_blank(turn.content):
            raise Unusable("empty answer")
    if all(turn.trained is False for turn in answers):
        raise Unusable("every answer has weight 0")
    return Conversation(turns, row, extra=extra, tools=tools)


def json_word(value: Any) -> str:
    """What a value is called in JSON, for messages to people."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = ((int | float, "a number"), (str, "text"), (Mapping, "an object"), (list | tuple, "a list"))
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)


def _keys(turn: Values) -> str:
    """The keys of a turn, for messages: at most six, and no long ones."""
    names = [str(name)[:30] for name in turn]
    return (", ".join(names[:6]) + (", ..." if len(names) > 6 else "")) or "none"


def _listed(values: Values, column: str) -> Any:
    """The column's list of turns."""
    if isinstance(values[column], str | int | float):
        raise Unusable(f"{column} is {json_word(values[column])}, not a list of turns")
    return values[column]


def _turns(value: Any, role: str, what: str | None = None) -> tuple[Message, ...]:
    """Messages from a text, one message, or a list of messages in OpenAI or ShareGPT style."""
    if isinstance(value, list | tuple):
        return tuple([_turn(turn, number) for number, turn in enumerate(value, 1)])
    if isinstance(value, Mapping):
        return (_turn(value, 1),)
    return (Message(role, _text(value, what or ("answer" if role == "assistant" else "prompt"))),)


def _turn(turn: Any, number: int) -> Message:
    if type(turn) is dict and len(turn) == 2:  # nearly all are: read at once
        speaker, content = turn.get("role"), turn.get("content")
        if speaker is None:
            speaker, content = turn.get("from"), turn.get("value")
        if type(content) is str and type(speaker) is str and speaker in ROLES:
            return Message(ROLES[speaker], content)
    if not isinstance(turn, Mapping):
        raise Unusable(f"turn {number} is {json_word(turn)}, not an object")
    speaker, content = _first(turn, "role", "from"), _first(turn, "content", "value")
    if speaker is None:
        raise Unusable(f"turn {number} has no role (role or from); its keys: {_keys(turn)}")
    if not isinstance(speaker, str) or speaker not in ROLES:
        said = repr(speaker) if isinstance(speaker, str) else json_word(speaker)
        near = closest(speaker.lower(), ROLES) if isinstance(speaker, str) else None
        raise Unusable(
            f"turn {number} is from {said}, which is no known role"
            + (f"; did you mean '{near}'?" if near else "")
        )
    role = ROLES[speaker]
    calls = _calls(turn, number)
    if content is None and calls:
        content = ""
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if content is None and not {"content", "value"} & set(turn):
        raise Unusable(f"turn {number} has no content (content or value); its keys: {_keys(turn)}")
    if not isinstance(content, str):
        raise Unusable(f"turn {number} has {json_word(content)} for content, not text")
    reasoning = _first(turn, "reasoning_content", "reasoning", "thinking")
    if reasoning is not None and not isinstance(reasoning, str):
        raise Unusable(f"turn {number} has {json_word(reasoning)} for reasoning, not text")
    name, call_id = turn.get("name"), turn.get("tool_call_id")
    return Message(
        role,
        content,
        reasoning=reasoning or None,
        tool_calls=calls,
        name=str(name) if name is not None and role == "tool" else None,
        tool_call_id=str(call_id) if call_id is not None else None,
        trained=_weight(turn, number),
    )


def _weight(turn: Values, number: int) -> bool | None:
    """Whether a message is trained, from `weight` (OpenAI's, 0 or 1), `train` or `training`."""
    given = {name: turn[name] for name in ("weight", "train", "training") if turn.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1):
            raise Unusable(f"turn {number} has {name} {value!r}, which is neither 0 nor 1 (false nor true)")
    if len({bool(value) for value in given.values()}) > 1:
        raise Unusable(f"turn {number} has {' and '.join(given)}, which contradict each other")
    return bool(next(iter(given.values()))) if given else None


def _calls(turn: Values, number: int) -> tuple[Mapping[str, Any], ...]:
    """A message's tool calls as templates take them, arguments as an object."""
    calls = turn.get("tool_calls") or (
        [{"function": turn["function_call"]}] if turn.get("function_call") else []
    )
    if not isinstance(calls, list | tuple):
        raise Unusable(f"turn {number} has {json_word(calls)} for tool_calls, not a list")
    made = []
    for call in calls:
        call = _without_none(call)
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Unusable(f"turn {number} calls a tool without a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except ValueError:
                raise Unusable(
                    f"turn {number} calls {function['name']} with arguments that are no JSON"
                ) from None
        if not isinstance(arguments, Mapping):
            raise Unusable(f"turn {number} calls {function['name']} with arguments that are no object")
        made.append(
            {
                **({"id": call["id"]} if call.get("id") else {}),
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
    return tuple(made)


def _tools(values: Values) -> tuple[Mapping[str, Any], ...]:
    """The row's tool schemas, from a list or its JSON."""
    tools = values.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise Unusable("tools is no JSON") from None
    if not tools:
        return ()
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise Unusable("tools is no list of objects")
    return tuple(_without_none(tool) for tool in tools)


def _without_none(value: Any) -> Any:
    """Without keys that have no value: columnar files give every object the keys of all others."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list | tuple) else value


def _system(values: Values) -> tuple[Message, ...]:
    system = _first(values, *SYSTEM_COLUMNS)
    return (Message("system", system),) if isinstance(system, str) and system.strip() else ()


def _text(value: Any, what: str) -> str:
    """A cell as text; numbers and truth values are written out, everything else is refused."""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if not isinstance(value, str):
        raise Unusable(f"{what} is {json_word(value)}, not text")
    if is_blank(value):
        raise Unusable(f"empty {what}")
    return value


INVISIBLE = " \t\n\r\x0b\x0c\xa0\xad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
"""Spaces and characters without width."""


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen."""
    return not text or text.isspace() or not (text.isascii() or text.strip(INVISIBLE))


STAND_INS = ("NaN", "nan", "#N/A")
"""Words that programs write where a value is missing. As a number or as JSON's own word NaN is no value (`sources`); a
text is taken as it stands, since it may be meant, and is told of."""


def stands_in(example: Example) -> str | None:
    """The word that a whole answer is, where it is one by which programs say that there is none."""
    match example:
        case Conversation(messages=turns) | Rating(completion=turns):
            answers: tuple[Message, ...] = turns[-1:]
        case Preference(chosen=chosen, rejected=rejected):
            answers = (*chosen[-1:], *rejected[-1:])
        case _:
            return None
    return next((turn.content for turn in answers if turn.content in STAND_INS), None)


MESSAGE_KEYS = (
    "role", "content", "from", "value", "weight", "train", "training", "reasoning_content", "reasoning", "thinking",
    "tool_calls", "function_call", "tool_call_id", "name",
)  # fmt: skip
"""What is read of a message."""


@functools.lru_cache(maxsize=4096)
def misspelt(key: str) -> str | None:
    """The message's key that another one is most likely meant to be."""
    if key in MESSAGE_KEYS:
        return None
    return next(iter(difflib.get_close_matches(key, MESSAGE_KEYS, 1, 0.8)), None)


def _first(values: Values, *names: str) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)


def _extra(values: Values, *used: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in used and value is not None}
