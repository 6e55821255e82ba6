"""Checks of one row: what is damaged, empty, out of order, too long or better not repeated.

`CHECKS` has every kind of finding; docs/data.md is written from it. A row is converted by the functions that
training uses, so a row with an error is one that training would drop.
"""

from __future__ import annotations

import codecs
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tunesmith.data.examples import (
    Conversation,
    Example,
    Message,
    Preference,
    Prompt,
    Rating,
    Text,
    Unusable,
    strings,
    texts,
)
from tunesmith.data.formats import (
    DETECTED,
    FORMATS,
    ROLES,
    Detection,
    Format,
    column_of,
    converted,
    has_numbers,
    is_blank,
    json_word,
    keyed,
    misspelt,
    stands_in,
)
from tunesmith.data.sources import UTF8, Broken, Record, swallowed

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")
"""From harmless to what keeps a row from being trained; a row's place in here is its worst finding's."""

CHARACTERS_PER_TOKEN = 4
"""What a token is taken for where no tokenizer is known; right for English, too much for Chinese."""
FRAME = 5
"""Tokens that a chat template writes around a turn, as most do: its beginning, the role, its end."""


@dataclass(frozen=True)
class Check:
    """A kind of finding: how bad it is, what it means, what mends it, and what `--fix` does."""

    kind: str
    severity: Severity
    about: str
    fix: str
    mended: str = "the row is kept"
    """What becomes of such a row in the cleaned copy."""


_DROPPED = "the row is dropped"
CHECKS: dict[str, Check] = {
    check.kind: check
    for check in (
        Check("unreadable", "error", "the source cannot be opened or read: no such file, unknown suffix, not JSON, "
              "not Parquet, no row", "Mend what the message names.", "no copy is written"),
        Check("undetected", "error", "the rows fit no known format, or several that are not trained alike",
              "Name the format, or the columns of question and answer.", "no copy is written"),
        Check("unparsable", "error", "a line that is no JSON object, or a row whose cells do not fit the header",
              "Write one JSON object per line; quote cells that hold separators or line breaks.", _DROPPED),
        Check("not_utf8", "error", "bytes that are not UTF-8", UTF8, _DROPPED),
        Check("no_format", "error", "a row without a value in a column that its format needs; null, an "
              "empty cell of CSV, and what is no number (NaN, Infinity) are none",
              "Fill the column, or remove the row.", _DROPPED),
        Check("not_text", "error", "a value of another type where text, or a list of messages, is needed",
              "Write it as text, or as a list of messages with role and content.", _DROPPED),
        Check("empty_answer", "error", "an answer without a character that is no space",
              "Write the answer, or remove the row.", _DROPPED),
        Check("empty_question", "error", "a question or text without a character that is no space",
              "Write it, or remove the row.", _DROPPED),
        Check("unknown_role", "error", "a turn whose speaker is no known role",
              "Name it system, user, assistant or tool.", _DROPPED),
        Check("no_answer", "error", "a conversation that has no answer, or does not end with one",
              "End it with the assistant's turn.", _DROPPED),
        Check("same_answers", "error", "the chosen answer is the rejected one, or differs in white space only",
              "Remove the row: it says nothing about which answer is better.", _DROPPED),
        Check("label", "error", "a rating that is neither good nor bad", "Write true or false, or 1 or 0.", _DROPPED),
        Check("surrogate", "error", "half a character (a lone surrogate), which no tokenizer takes",
              "Remove it; text was cut in the middle of a character.", "it is removed"),
        Check("unusable", "error", "anything else for which training would drop the row",
              "Mend what the message names, or remove the row.", _DROPPED),
        Check("template", "error", "the model's chat template or tokenizer refuses the row (with --model)",
              "Mend the turns, or choose another --chat-template.", _DROPPED),
        Check("supervision", "error", "the row breaches the supervision proof, such as a whole answer cut away or no "
              "trained token (with --model)", "Shorten the row, raise --max-length, or choose another template.",
              _DROPPED),
        Check("roles", "warning", "turns out of order: two of one speaker in a row, a system message that is not "
              "first, an answer before any question, a tool's result without a call",
              "Join or reorder the turns; some chat templates refuse them."),
        Check("empty_turn", "warning", "a turn other than an answer without text", "Write it, or remove the turn."),
        Check("ignored_key", "warning", "a message's key that nobody reads: misspelt, or a weight on a turn that is no "
              "answer", "Correct the key, or remove it."),
        Check("number", "warning", "a number or truth value in a column of text; training writes it out (as a "
              "message's content it is an error, `not_text`)",
              "Write it as text, in the way it should be learnt."),
        Check("stand_in", "warning", "an answer that is nothing but NaN, nan or #N/A, as programs write a missing "
              "value into a table; as text it is trained like any other",
              "Leave the cell empty or remove the row, unless that is the answer."),
        Check("swallowed", "warning", "a cell of a CSV file whose lines have as many separators as the header: a quote "
              "may be opened in the row and never closed, so that the rows behind it are in the cell",
              "Close the quote, or double it where it is text."),
        Check("nul", "warning", "a NUL character", "Remove it.", "it is removed"),
        Check("bom", "warning", "a byte order mark (U+FEFF) inside text", "Remove it.", "it is removed"),
        Check("mojibake", "warning", "text that was read in the wrong encoding (Ã©, â€™) or lost (U+FFFD)",
              "Read the original as UTF-8 again.", "it is repaired where the whole text can be"),
        Check("duplicate", "warning", "the same example as an earlier row", "Keep one of them.",
              "the first is kept, the others are dropped"),
        Check("near_duplicate", "warning", "nearly the same text as an earlier row (word triples, Jaccard similarity "
              "0.8); training keeps such rows in one split", "Keep one of them unless the difference matters."),
        Check("special_token", "warning", "the text of a special token inside content; it is trained as plain text",
              "Remove it where it is left over from another chat template."),
        Check("secret", "warning", "what looks like a key or token to a service; it is never printed",
              "Revoke it and take it out: models repeat what they are trained on."),
        Check("email", "warning", "an e-mail address", "Take it out, unless it may be repeated to everybody."),
        Check("long", "warning", "a row above --max-length, whose end would be cut (counted with --model, else "
              "estimated)", "Shorten it, or raise --max-length."),
        Check("contradiction", "warning", "an answer that is rated good in one row and bad in another",
              "Settle which it is, and remove the other row."),
        Check("imbalance", "warning", "fewer than one rating in ten is of one kind (from ten ratings on)",
              "Add ratings of the other kind."),
        Check("other_format", "warning", "a row of another format than nearly all others (19 of 20 or more), as when "
              "a column was left empty",
              "Fill the column that is empty here, or name one format with --format."),
        Check("task", "warning", "rows of a shape that the task is not made for",
              "Choose another --task, or other data."),
        Check("file_bom", "note", "the file begins with a byte order mark, which is skipped",
              "Save it as UTF-8 without one.", "it is removed"),
    )
}  # fmt: skip
"""Kinds of findings by name, the worst first."""

KIND_OF_REASON: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"^(no value for|not of format) ", "no_format"),
        (r"^empty (answer|query|chosen answer|rejected answer)$", "empty_answer"),
        (r"^empty ", "empty_question"),
        (r" (not text|not an object|not a list of turns)$| has no content ", "not_text"),
        (r" no known role\b| has no role ", "unknown_role"),
        (
            r"^no assistant turn$|^the last turn is |not end with an answer$|^the \w+ answer is the ",
            "no_answer",
        ),
        (r"^chosen and rejected answer are the same\b", "same_answers"),
        (r"^label ", "label"),
    )
)
"""The kind of finding for the reasons why `converted` refuses a row; any other reason is `unusable`."""

COMMON_SPECIALS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
    "<|eom_id|>", "<|python_tag|>", "<|channel|>", "<|message|>", "<|return|>", "<|start|>",
    "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>", "[INST]", "[/INST]",
    "<<SYS>>", "<</SYS>>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
)  # fmt: skip
"""Special tokens of widespread models, looked for where no --model is given."""

SECRETS: tuple[tuple[str, str, re.Pattern[str]], ...] = tuple(
    (beginning, name, re.compile(pattern))
    for beginning, name, pattern in (
        ("AKIA", "an AWS access key", r"AKIA[0-9A-Z]{16}"),
        ("ASIA", "an AWS access key", r"ASIA[0-9A-Z]{16}"),
        ("sk-", "an API key", r"(?<![\w-])sk-[\w-]{20,}"),
        ("k_live_", "a Stripe key", r"\b[sr]k_live_\w{16,}"),
        ("hf_", "a Hugging Face token", r"\bhf_[A-Za-z0-9]{30,}"),
        ("gh", "a GitHub token", r"\bgh[opsur]_[A-Za-z0-9]{36,}"),
        ("github_pat_", "a GitHub token", r"\bgithub_pat_\w{22,}"),
        ("xox", "a Slack token", r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"),
        ("-----BEGIN", "a private key", r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"),
        ("AIza", "a Google API key", r"\bAIza[\w-]{35}"),
        ("eyJ", "a JSON web token", r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"),
    )
)
"""Keys and tokens of well-known shapes: a text that such a one has in it, its name, and its shape."""

SECRETS_BY_SIGN = tuple(
    (sign, tuple(secret for secret in SECRETS if next(s for s in "-_AJxg" if s in secret[0]) == sign))
    for sign in "-_AJxg"
)
"""The same by a character that their beginning has and that few texts have."""

EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
_BEHIND = "[\x80-\xbfŒœŠšŸŽžƒˆ˜–—‘’‚“”„†‡•…‰‹›€™]"
"""Bytes of UTF-8 behind the first of a character, as Latin-1 or Windows-1252 have them."""
_CHARACTER = f"(?:[\xc2-\xdf]{_BEHIND}|[\xe0-\xef]{_BEHIND}{{2}}|[\xf0-\xf4]{_BEHIND}{{3}})"
MOJIBAKE = re.compile(
    f"{_CHARACTER}{{2,}}|(?<=[a-z])[\xc2-\xde]{_BEHIND}|[ÃÂ]{_BEHIND}|â[€\x80]{_BEHIND}|ðŸ|ð\x9f|ï»¿|\ufffd"
)
"""What UTF-8 looks like once read as Latin-1 or Windows-1252, and the character that stands for a lost one.

Characters of Western Europe and signs are known alone; those of other scripts by several of them side by side,
or by a capital with a sign behind a small letter, which no language writes.
"""


_SUSPECT = re.compile(f"[\xc2-\xf4]{_BEHIND}")
"""Stands in all of these but the lost character, and is looked for in a tenth of the time."""


def _as_byte(error: UnicodeError) -> tuple[bytes, int]:
    """A control character as the byte that it stands for: Windows-1252 has no character for five bytes."""
    assert isinstance(error, UnicodeEncodeError)
    if "\x80" <= error.object[error.start] <= "\x9f":
        return bytes([ord(error.object[error.start])]), error.start + 1
    raise error


codecs.register_error("tunesmith.as_byte", _as_byte)


def read_again(text: str) -> str | None:
    """The text that was UTF-8 before it was read as Windows-1252 or Latin-1; None where not all of it was."""
    for encoding, errors in (("cp1252", "tunesmith.as_byte"), ("latin-1", "strict")):
        try:
            return text.encode(encoding, errors).decode("utf-8")
        except ValueError:
            continue
    return None


SURROGATE = re.compile("[\ud800-\udfff]")
NUL, BOM = re.compile("\0"), re.compile("\ufeff")


class Found(NamedTuple):
    """A finding before its kind's severity and remedy are put to it."""

    kind: str
    column: str | None
    message: str
    fix: str | None = None
    """What mends this one, where that is more than the kind's remedy."""


@dataclass(frozen=True)
class Settings:
    """What the processes that check rows need to know."""

    format: str = "auto"
    input_text_key: str | None = None
    output_text_key: str | None = None
    max_length: int = 1024
    specials: tuple[str, ...] = COMMON_SPECIALS
    estimates: bool = True
    """Whether lengths are estimated: there is no tokenizer to count them."""
    limit: int = 100
    """Findings of a kind that are kept whole."""
    adapt: Callable[[Example], Example] | None = None
    """The example in the shape that the named method needs, which raises Unusable; None where none was named."""

    @functools.cached_property
    def detection(self) -> Detection:
        """How each row is read. All formats stand for `auto`: the first that a row fits is the one that
        `detect` would choose for it."""
        if self.input_text_key and self.output_text_key:
            return Detection((keyed(self.input_text_key, self.output_text_key),), "")
        return Detection(DETECTED if self.format == "auto" else (FORMATS[self.format],), "")

    @functools.cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Any of the special tokens, the longest first so that none hides in another."""
        return re.compile(
            "|".join(re.escape(token) for token in sorted(self.specials, key=len, reverse=True))
        )

    @functools.cached_property
    def special_beginnings(self) -> tuple[str, ...]:
        """One of these is in any text that has a special token."""
        return tuple(sorted({token[:1] for token in self.specials}))


def broken(record: Broken) -> Found:
    """The finding that a row which cannot be read is. What stands around the place is left out: it may be secret."""
    problem = record.problem.partition("\n")[0]
    if record.problem.startswith(("not UTF-8: ", "record ")):
        problem = problem.partition(": ")[0]
    if record.fix == UTF8:
        where = re.search(r"byte \d+$", record.place)
        return Found("not_utf8", None, f"{problem} at {where[0]}" if where else problem)
    column = f" at column {record.column}" if record.column else ""
    return Found("unparsable", None, masked(f"{problem}{column}"), record.fix)


def check_row(
    record: Record, detection: Detection, settings: Settings
) -> tuple[Example | None, Format | None, list[Found]]:
    """The example that a row becomes, if any, the format it is of, and everything wrong with it."""
    values = record.values
    try:
        example = converted(record, detection)
        format = detection.format_of(values)
        if isinstance(example, Unusable):
            return None, format, [_refused(str(example), values, format)]
        if settings.adapt:
            try:
                settings.adapt(example)
            except Unusable as reason:
                return None, format, [Found("unusable", None, masked(str(reason)))]
        found = list(_looked_at(example, record, format, detection, settings))
    except RecursionError:
        return None, None, [Found("unusable", None, "nested too deeply")]
    is_usable = not any(item.kind == "surrogate" for item in found)
    return example if is_usable else None, format, found


def _refused(reason: str, values: Mapping[str, Any], format: Format | None) -> Found:
    kind = next((kind for pattern, kind in KIND_OF_REASON if pattern.search(reason)), "unusable")
    if format is None:
        # Which column is missing depends on the formats of the other rows: settled at the end.
        present = [name for name, value in values.items() if value is not None]
        return Found("no_format", None, json.dumps(present))
    return Found(kind, column_of(reason, values, format), masked(reason))


def _looked_at(
    example: Example,
    record: Record,
    format: Format | None,
    detection: Detection,
    settings: Settings,
) -> Iterator[Found]:
    """What is wrong with a row that becomes an example. Columns are looked up for those that have something."""
    assert format is not None
    values = record.values
    everything = "\n".join(texts(example))
    parts = _parts(example)
    for turns in parts:
        message = out_of_order(turns)
        if message:
            yield Found("roles", _turns_column(format, values), message)
            break
    for turn in itertools.chain.from_iterable(parts):
        if turn.reasoning or turn.tool_calls:
            everything += f"\n{_beside(turn)}"
    yield from _ignored_keys(values, format)
    for number, turn in enumerate(parts[0] if parts else (), 1):
        if turn.role in ("system", "user") and is_blank(turn.content):
            said = f"turn {number}, the {turn.role}'s, is empty"
            yield Found("empty_turn", _turns_column(format, values), said)
    if isinstance(example, Conversation | Prompt) and example.tools:
        everything = "\n".join((everything, *strings(example.tools)))
    if has_numbers(values, detection):
        name = next(
            n for n in format.used(list(values)) if isinstance(values[n], int | float) and n != "label"
        )
        yield Found("number", name, f"{json_word(values[name])} where text is expected")
    if word := stands_in(example):
        said = f"the whole answer is {word}, as programs write a value that is missing"
        yield Found("stand_in", column_of("empty answer", values, format), said)
    column = swallowed(record)
    if column:
        said = f"{values[column].count(chr(10)) + 1} lines in one cell, each with as many separators as the header"
        yield Found("swallowed", column, said)
    for kind in suspicions(everything, settings):
        yield _located(kind, values, format.used(list(values)), settings)
    if settings.estimates and not isinstance(example, Text):
        turns_in_all = sum([len(turns) for turns in parts])
        rough = len(everything) // CHARACTERS_PER_TOKEN + FRAME * turns_in_all
        has_tools = isinstance(example, Conversation | Prompt) and example.tools
        length = 0
        if has_tools or rough > settings.max_length:
            length = estimated_length(example, sum(map(len, texts(example))))
        if length > settings.max_length:
            message = _estimated(example, length, settings.max_length)
            yield Found("long", column_of("empty answer", values, format), message)


_PLAIN = ({"role", "content"}, {"from", "value"})


def _ignored_keys(values: Mapping[str, Any], format: Format) -> Iterator[Found]:
    for column in values:
        turns = values[column]
        if type(turns) is not list or all(type(turn) is dict and turn.keys() in _PLAIN for turn in turns):
            continue
        if column not in format.used(list(values)):
            continue
        for number, turn in enumerate(turns, 1):
            if not isinstance(turn, Mapping):
                continue
            for key, value in turn.items():
                if value is None:
                    continue
                meant = misspelt(key)
                if meant:
                    yield Found(
                        "ignored_key", column, f"turn {number}: {key!r} is not read; is '{meant}' meant?"
                    )
                    return
                speaker = turn.get("role") or turn.get("from")
                is_answer = isinstance(speaker, str) and ROLES.get(speaker) == "assistant"
                if key in ("weight", "train", "training") and value and not is_answer:
                    yield Found(
                        "ignored_key", column, f"turn {number}: {key!r} is for answers, and this is none"
                    )
                    return


def _beside(turn: Message) -> str:
    """What a turn says besides its content."""
    calls = json.dumps(turn.tool_calls, ensure_ascii=False, default=str) if turn.tool_calls else ""
    return f"{turn.reasoning or ''}\n{calls}"


def estimated_length(example: Example, characters: int) -> int:
    """Tokens of a row whose texts have so many characters, estimated: with tools, calls and the frame of each turn."""
    if isinstance(example, Conversation | Prompt):
        turns = example.messages
        if example.tools:
            characters += len(json.dumps(example.tools, ensure_ascii=False, default=str))
    elif isinstance(example, Text):
        return characters // CHARACTERS_PER_TOKEN
    elif isinstance(example, Preference):
        turns = (*example.prompt, *example.chosen, *example.rejected)
    else:
        turns = (*example.prompt, *example.completion)
    for turn in turns:
        if turn.reasoning or turn.tool_calls:
            characters += len(_beside(turn))
    return characters // CHARACTERS_PER_TOKEN + FRAME * len(turns)


def _parts(example: Example) -> tuple[tuple[Message, ...], ...]:
    """The conversations that an example holds."""
    match example:
        case Conversation(messages=turns) | Prompt(messages=turns):
            return (turns,)
        case Preference(prompt=prompt, chosen=chosen, rejected=rejected):
            return ((*prompt, *chosen), (*prompt, *rejected))
        case Rating(prompt=prompt, completion=completion):
            return ((*prompt, *completion),)
        case _:
            return ()


def _turns_column(format: Format, values: Mapping[str, Any]) -> str:
    columns = format.used(list(values))
    lists = [name for name in columns if isinstance(values[name], list | tuple) and name != "tools"]
    return lists[0] if lists else columns[0]


def out_of_order(turns: Sequence[Message]) -> str | None:
    """What is wrong with the order of the speakers, if anything."""
    before, called = None, False
    for number, turn in enumerate(turns, 1):
        role = turn.role
        if role == "system" and number > 1:
            return f"turn {number} is the system's, which belongs first"
        if role == before and role in ("user", "assistant"):
            return f"turns {number - 1} and {number} are both the {role}'s"
        if role == "tool" and not called:
            return f"turn {number} is a tool's result, and no tool was called"
        if role == "assistant" and before in (None, "system"):
            return f"turn {number} is an answer, and nothing was asked"
        called = called or bool(turn.tool_calls)
        before = role
    return None


def suspicions(text: str, settings: Settings) -> Iterator[str]:
    """Kinds of damage and of unwanted content that a text has; quick for the many texts that have none."""
    if "\0" in text:
        yield "nul"
    if not text.isascii():
        if "\ufeff" in text:
            yield "bom"
        if ("\ufffd" in text or _SUSPECT.search(text)) and MOJIBAKE.search(text):
            yield "mojibake"
        try:
            text.encode()
        except UnicodeEncodeError:
            yield "surrogate"
    for beginning in settings.special_beginnings:
        if beginning in text:
            if settings.special_pattern.search(text):
                yield "special_token"
            break
    if _has_secret(text):
        yield "secret"
    if "@" in text and EMAIL.search(text):
        yield "email"


def _has_secret(text: str) -> bool:
    for sign, secrets in SECRETS_BY_SIGN:
        if sign in text:  # one character is found much faster than several
            for beginning, _, pattern in secrets:
                if beginning in text and pattern.search(text):
                    return True
    return False


def _said_of(kind: str, text: str, settings: Settings) -> Iterator[str]:
    """What is to be said of each place of such damage in a text."""
    match kind:
        case "nul":
            yield from (f"NUL at character {match.start() + 1}" for match in NUL.finditer(text))
        case "bom":
            yield from (f"U+FEFF at character {match.start() + 1}" for match in BOM.finditer(text))
        case "mojibake":
            for match in MOJIBAKE.finditer(text):
                said = "U+FFFD (a lost character)" if match[0] == "\ufffd" else f"'{match[0]}'"
                yield f"{said} at character {match.start() + 1}"
        case "surrogate":
            for match in SURROGATE.finditer(text):
                yield f"half a character (U+{ord(match[0]):04X}) at character {match.start() + 1}"
        case "special_token":
            for match in settings.special_pattern.finditer(text):
                yield f"{match[0]} at character {match.start() + 1}"
        case "secret":
            found = [
                (m.start(), m.end(), beginning, name)
                for beginning, name, pattern in SECRETS
                for m in pattern.finditer(text)
            ]
            last = 0
            for begin, end, beginning, name in sorted(found):
                if begin >= last:  # one key may have several known shapes
                    yield f"{name} ({beginning}…, {end - begin} characters) at character {begin + 1}"
                last = max(last, end)
        case _:
            for match in EMAIL.finditer(text):
                yield f"an e-mail address (…@{match[0].rpartition('@')[2]}) at character {match.start() + 1}"


SHOWN_PLACES = 5
"""Places of one kind that a row's finding names; the others are counted."""


def _located(kind: str, values: Mapping[str, Any], columns: Sequence[str], settings: Settings) -> Found:
    """One finding for a row with such damage: where it is, and in how many places."""
    first: str | None = None
    places: list[str] = []
    count = 0
    for column in columns:
        is_list = isinstance(values[column], list | tuple)
        for number, turn in enumerate(values[column] if is_list else [values[column]], 1):
            for text in strings(turn):
                for said in _said_of(kind, text, settings):
                    count += 1
                    if count <= SHOWN_PLACES:
                        first = first or column
                        where = "" if column == first else f"{column}, "
                        part = "tool" if column == "tools" else "turn"
                        places.append(where + (f"{part} {number}: " if is_list else "") + said)
    if not places:
        return Found(kind, None, CHECKS[kind].about)
    more = f"; and {count - SHOWN_PLACES:,} more" if count > SHOWN_PLACES else ""
    return Found(kind, first, "; ".join(places) + more)


def masked(message: str) -> str:
    """A message in which no secret stands; of others it quotes at most a few hundred characters."""
    for beginning, _, pattern in SECRETS:
        if beginning in message:
            message = pattern.sub(f"{beginning}…", message)
    return message if len(message) <= 300 else f"{message[:300]}…"


def _estimated(example: Example, tokens: int, max_length: int) -> str:
    """What would be cut of a row, estimated; nothing of running text, which is divided."""
    answer = len(_parts(example)[0][-1].content) // CHARACTERS_PER_TOKEN
    lost = "the whole last answer" if tokens - answer >= max_length else "the end of the last answer"
    return (
        f"about {tokens:,} tokens (estimated at {CHARACTERS_PER_TOKEN} characters a token), of which the first "
        f"{max_length:,} are kept: {lost} would be cut"
    )
