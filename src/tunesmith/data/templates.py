"""The one place where text becomes token ids, for training and for inference alike.

A conversation is rendered by the model's own chat template and cut into segments: what the model is
given, and what it is to say. Segments are tokenized one by one, so the ids before an answer are the same
in training as when the model is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tunesmith.data.examples import Conversation, Example, Message, Row, Text, Unusable
from tunesmith.errors import ModelError, nearest

LossOn = Literal["answers", "last_answer", "everything"]
IGNORED = -100
"""Label of a token without loss, as torch and transformers have it."""

NAMED_TEMPLATES = {
    "plain": (
        "{{ bos_token if bos_token and starts_with_bos else '' }}"
        "{% for message in messages %}"
        "{% if message.role == 'assistant' %}{{ '### Response:\\n' + message.content + eos_token + '\\n\\n' }}"
        "{% elif message.role == 'system' %}{{ message.content + '\\n\\n' }}"
        "{% else %}{{ '### Instruction:\\n' + message.content + '\\n\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "angle": (
        "{{ bos_token if bos_token and starts_with_bos else '' }}"
        "{% for message in messages %}"
        "{{ '<|' + message.role + '|>' + message.content }}"
        "{{ eos_token if message.role == 'assistant' else '<|end|>' }}{{ '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    "chatml": (
        "{{ bos_token if bos_token and starts_with_bos else '' }}"
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
        "{{ eos_token if message.role == 'assistant' else '<|im_end|>' }}{{ '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}
"""Templates for models that have none. Answers end with the tokenizer's own end-of-text token, so no token
has to be added to the vocabulary."""

# Private-use characters stand for special-token text inside content until it is tokenized as plain text.
_MARK = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class Encoding:
    """Token ids and labels of one example, equally long; label -100 means no loss."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def trained(self) -> int:
        """Number of tokens with a label."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class _Segment:
    """A stretch of rendered text; an answer is what the model is to say."""

    text: str
    is_answer: bool


@dataclass(frozen=True)
class _Specials:
    """A tokenizer's special tokens, looked up once per call: on large vocabularies that takes a while."""

    tokens: tuple[str, ...]
    ids: frozenset[int]
    pattern: re.Pattern[str]
    """Special-token text, the longest first so that none hides in another, and the mark's own character."""

    def marked(self, content: str) -> str:
        """Content with special-token text as marks, so that no template or tokenizer takes it for real."""
        return self.pattern.sub(lambda found: f"\ue000{self.tokens.index(found[0])}\ue001", content)


_PROBES = (
    (Message("user", "a"), Message("assistant", "b")),
    (Message("system", "s"), Message("user", "a"), Message("assistant", "b")),
)
"""Conversations that show how a template closes a turn; some templates refuse one or the other."""


def set_template(tokenizer: Any, choice: str | None) -> str:
    """Settle the tokenizer's chat template, and say in a sentence which one it is.

    `choice` is a named template, a Jinja file, or None for the model's own (`plain` where it has none).
    Raises ModelError for an unknown name, for Jinja that does not parse, and where nothing can end an answer.
    """
    if choice is None and tokenizer.chat_template:
        return "The chat template is the model's own." + _remarks(tokenizer)
    name = choice or "plain"
    path = Path(name)
    if name in NAMED_TEMPLATES:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"The template '{name}' ends answers with the end-of-text token, and the tokenizer has none.",
                fix="Set eos_token in tokenizer_config.json, or give a Jinja file with --chat-template.",
            )
        starts_with_bos = tokenizer.bos_token_id is not None and (
            tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        )
        tokenizer.chat_template = (
            "{% set starts_with_bos = " + str(starts_with_bos).lower() + " %}" + (NAMED_TEMPLATES[name])
        )
        why = "as the recipe says" if choice else "since the model has none"
        return f"The chat template is '{name}', {why}; it is saved with the final model."
    if path.suffix in {".jinja", ".j2"} and path.is_file():
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        saved = f"The chat template is that of {path.name}; it is saved with the final model."
        return saved + _remarks(tokenizer)
    raise ModelError(
        f"There is no chat template '{name}'.",
        fix=nearest(name, NAMED_TEMPLATES) + " A .jinja file works as well.",
    )


def prompt_ids(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """What a model is fed to answer: the conversation so far and the opening of its turn.

    Raises Unusable with the template's own words where it refuses the conversation.
    """
    specials = _specials(tokenizer)
    turns = _turns(messages, specials)
    segments = _segments(_render(turns, tokenizer, opening=True), turns, tokenizer)
    [ids] = _ids([segments], tokenizer, specials)
    return [i for part in ids for i in part]


def encode(example: Example, tokenizer: Any, *, loss_on: LossOn = "answers") -> Encoding:
    """Token ids and labels of one example, uncut. Raises Unusable with the reason."""
    [encoding] = encode_all([example], tokenizer, loss_on=loss_on)
    if isinstance(encoding, Unusable):
        raise encoding
    return encoding


def encode_all(
    examples: Sequence[Example], tokenizer: Any, *, loss_on: LossOn = "answers"
) -> list[Encoding | Unusable]:
    """All encodings at once, in order, with the reason in place of an example that has none."""
    specials = _specials(tokenizer)
    prepared: list[list[_Segment] | Unusable] = []
    for example in examples:
        try:
            prepared.append(_example_segments(example, tokenizer, specials))
        except Unusable as reason:
            prepared.append(reason)
    segments = [item for item in prepared if not isinstance(item, Unusable)]
    ids = iter(_ids(segments, tokenizer, specials))
    texts = iter(
        _text_encodings(
            [
                e.text
                for e, item in zip(examples, prepared, strict=True)
                if isinstance(e, Text) and not isinstance(item, Unusable)
            ],
            tokenizer,
        )
    )
    encodings: list[Encoding | Unusable] = []
    for example, item in zip(examples, prepared, strict=True):
        if isinstance(item, Unusable):
            encodings.append(item)
            continue
        parts = next(ids)
        try:
            encodings.append(
                next(texts)
                if isinstance(example, Text)
                else _labelled(item, parts, specials, tokenizer, loss_on)
            )
        except Unusable as reason:
            encodings.append(reason)
    return encodings


def end_of_turn_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids at which an answer ends: the end-of-text token and the one the template closes a turn with."""
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    specials = _specials(tokenizer)
    for probe in _PROBES if tokenizer.chat_template else ():
        try:
            encoding = encode(Conversation(probe, row=Row("probe", 1)), tokenizer)
        except Unusable:
            continue
        ids += [i for i in encoding.labels if i in specials.ids][-1:]
        break
    return tuple(dict.fromkeys(ids))


def shown(encoding: Encoding, tokenizer: Any) -> list[tuple[str, Literal["trained", "context", "special"]]]:
    """Each token's text with its role, for everything that shows what the model sees."""
    specials = _specials(tokenizer).ids
    return [
        (
            tokenizer.decode([i], skip_special_tokens=False),
            "trained" if label != IGNORED else "special" if i in specials else "context",
        )
        for i, label in zip(encoding.input_ids, encoding.labels, strict=True)
    ]


def special_texts(examples: Iterable[Example], tokenizer: Any) -> int:
    """Number of examples whose content holds the text of a special token, which stays text."""
    specials = _specials(tokenizer)
    return sum(
        any(specials.marked(content) != content for content in _contents(example)) for example in examples
    )


def _contents(example: Example) -> list[str]:
    match example:
        case Conversation(messages=messages):
            return [message.content for message in messages]
        case Text(text=text):
            return [text]
        case _:
            return []


def _example_segments(example: Example, tokenizer: Any, specials: _Specials) -> list[_Segment]:
    match example:
        case Conversation(messages=messages):
            turns = _turns(messages, specials)
            segments = _segments(_render(turns, tokenizer, opening=False), turns, tokenizer)
            if not any(segment.is_answer for segment in segments):
                raise Unusable("the conversation has no answer that could be trained")
            return segments
        case Text(text=text):
            _encodable(text)
            return []
        case _:
            raise Unusable(f"a {type(example).__name__.lower()} is not one text")


def _turns(messages: Sequence[Message], specials: _Specials) -> list[Message]:
    """The messages as templates get them: special-token text in content is marked."""
    for message in messages:
        _encodable(message.content)
    return [replace(message, content=specials.marked(message.content)) for message in messages]


def _encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable(
            f"character {error.start + 1} is half a character (U+{ord(text[error.start]):04X})"
        ) from None


def _segments(text: str, messages: Sequence[Message], tokenizer: Any) -> list[_Segment]:
    """Cut rendered text where answers begin and end.

    A template that renders earlier turns differently once later ones follow (reasoning templates drop old
    thoughts) gives no boundary there; that turn is context, as it is when the model is asked. Some open
    the model's turn with text that they leave out around a given answer (DeepSeek-R1's `<think>`); then the
    last answer is put behind that opening, since it is what the model will be asked to continue.
    """
    segments: list[_Segment] = []
    position = 0
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        is_last = index + 1 == len(messages)
        opened = _render(messages[:index], tokenizer, opening=True)
        through = text if is_last else _render(messages[: index + 1], tokenizer, opening=False)
        if text.startswith(through) and through.startswith(opened) and len(opened) >= position:
            segments += [
                _Segment(text[position : len(opened)], False),
                _Segment(text[len(opened) : len(through)], True),
            ]
            position = len(through)
        elif is_last:
            content = message.content.strip()
            before, found, closing = through.rpartition(content)
            if not found or not before:
                raise Unusable("the chat template does not write the answer as it is")
            return [_Segment(opened, False), _Segment(content + closing, True)]
    if position < len(text):
        segments.append(_Segment(text[position:], False))
    return [segment for segment in segments if segment.text]


def _remarks(tokenizer: Any) -> str:
    """Sentences on what a template does otherwise than one would think, each with what follows from it."""
    import jinja2

    specials = _specials(tokenizer)
    remarks = ""
    for probe in _PROBES:
        try:
            opened = _render(probe[:-1], tokenizer, opening=True)
            whole = _render(probe, tokenizer, opening=False)
            if not whole.startswith(opened):
                remarks += f" It opens the model's turn with {opened[-24:]!r}, behind which the last answer is trained."
            segments = _segments(whole, probe, tokenizer)
            answer = _ids([segments], tokenizer, specials)[0][-1]
            if segments[-1].is_answer and not _through_end_of_turn(answer, specials, tokenizer):
                if tokenizer.eos_token_id is None:
                    raise ModelError(
                        "The chat template closes a turn with no token of its own, and the tokenizer has no "
                        "end-of-text token: no answer could end.",
                        fix="Set eos_token in tokenizer_config.json, or choose another --chat-template.",
                    )
                remarks += (
                    " It closes the model's turn with no token of its own: the end-of-text token is put behind "
                    "the last answer."
                )
            twice = (*probe, *probe[-2:])
            both = _segments(_render(twice, tokenizer, opening=False), twice, tokenizer)
            if whole.startswith(opened) and sum(segment.is_answer for segment in both) == 1:
                remarks += (
                    " It writes earlier answers otherwise than the last one, so only the last answer of a "
                    "conversation is trained."
                )
            return remarks
        except Unusable as refusal:
            if isinstance(refusal.__context__, jinja2.TemplateSyntaxError):
                raise ModelError(
                    "The chat template is no valid Jinja.",
                    found=f"line {refusal.__context__.lineno}: {refusal.__context__.message}",
                    fix="Mend it, or choose another with --chat-template.",
                ) from None
    return remarks


def _render(turns: Sequence[Message], tokenizer: Any, *, opening: bool) -> str:
    import jinja2

    conversation = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        text: str = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=opening)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise Unusable(f"the chat template refuses the conversation: {error}") from None
    return text


def _ids(
    conversations: Sequence[Sequence[_Segment]], tokenizer: Any, specials: _Specials
) -> list[list[list[int]]]:
    """Token ids of every segment, tokenized in one call; special tokens are recognized outside marks only."""
    spaced = _puts_space_first(tokenizer)
    wanted: list[list[tuple[str, str]]] = []
    for segments in conversations:
        tails = ["", *(_tail(s.text, specials) if spaced else "" for s in segments[:-1])]
        wanted.append([(tail, s.text) for tail, s in zip(tails, segments, strict=False)])
    pairs = dict.fromkeys(pair for segments in wanted for pair in segments)
    plain = sorted(
        {text for tail, t in pairs for text in (tail, tail + t, t) if text and not _MARK.search(text)}
    )
    known = (
        dict(zip(plain, tokenizer(plain, add_special_tokens=False).input_ids, strict=True)) if plain else {}
    )
    ids = {pair: _behind(*pair, known, tokenizer, specials) for pair in pairs}
    return [[ids[pair] for pair in segments] for segments in wanted]


def _behind(
    tail: str, text: str, known: dict[str, list[int]], tokenizer: Any, specials: _Specials
) -> list[int]:
    """Ids of a text as they are behind a tail; on its own where the two would melt into one token."""

    def of(text: str) -> list[int]:
        return known[text] if text in known else _marked_ids(text, tokenizer, specials)

    if tail:
        before, both = of(tail), of(tail + text)
        if both[: len(before)] == before:
            return both[len(before) :]
    return of(text)


def _marked_ids(text: str, tokenizer: Any, specials: _Specials) -> list[int]:
    ids: list[int] = []
    for position, piece in enumerate(_MARK.split(text)):
        if position % 2:
            token = specials.tokens[int(piece)]
            ids += tokenizer(token, add_special_tokens=False, split_special_tokens=True).input_ids
        elif piece:
            ids += tokenizer(piece, add_special_tokens=False).input_ids
    return ids


def _puts_space_first(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a space before whatever a text begins with, as SentencePiece does.

    Segments are then tokenized behind the end of the one before, or every answer would start with a space.
    """
    alone, line, behind = tokenizer(["a", "\n", "\na"], add_special_tokens=False).input_ids
    return bool(behind[: len(line)] == line and behind[len(line) :] != alone)


def _tail(text: str, specials: _Specials) -> str:
    """The end of a text that settles how the next one is tokenized: a special token, or one character."""
    bare = text.rstrip()
    token = next((token for token in specials.tokens if bare.endswith(token)), "")
    return text[len(bare) - len(token) :] if token else text[-1:]


def _specials(tokenizer: Any) -> _Specials:
    added = {i: str(token.content) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens = sorted({*tokenizer.all_special_tokens, *added.values()}, key=lambda token: (-len(token), token))
    return _Specials(
        tokens=(*tokens, "\ue000"),
        ids=frozenset((*tokenizer.all_special_ids, *added)),
        pattern=re.compile("|".join(re.escape(token) for token in (*tokens, "\ue000"))),
    )


def _labelled(
    segments: Sequence[_Segment],
    parts: Sequence[list[int]],
    specials: _Specials,
    tokenizer: Any,
    loss_on: LossOn,
) -> Encoding:
    input_ids: list[int] = []
    labels: list[int] = []
    last = max(number for number, segment in enumerate(segments) if segment.is_answer)
    for number, (segment, ids) in enumerate(zip(segments, parts, strict=True)):
        end = _through_end_of_turn(ids, specials, tokenizer) if segment.is_answer else 0
        if number == last and not end:
            # The template closes the turn with no token of its own: the model must still learn to stop.
            if tokenizer.eos_token_id is None:
                raise Unusable("neither the chat template nor the tokenizer has a token that ends an answer")
            ids = [*_without_trailing_space(ids, tokenizer), tokenizer.eos_token_id]
        trained = 0
        if loss_on == "everything":
            trained = len(ids)
        elif segment.is_answer and (loss_on == "answers" or number == last):
            trained = end or len(ids)
        input_ids += ids
        labels += [*ids[:trained], *[IGNORED] * (len(ids) - trained)]
    return Encoding(tuple(input_ids), tuple(labels))


def _through_end_of_turn(ids: Sequence[int], specials: _Specials, tokenizer: Any) -> int:
    """Number of ids up to and including the special one that closes the turn, 0 where none does.

    A special token with text behind it (a `</think>`) closes nothing.
    """
    end = max((position + 1 for position, i in enumerate(ids) if i in specials.ids), default=0)
    return end if end == len(ids) or not tokenizer.decode(ids[end:]).strip() else 0


def _without_trailing_space(ids: Sequence[int], tokenizer: Any) -> list[int]:
    ids = list(ids)
    while ids and not tokenizer.decode(ids[-1:]).strip():
        ids.pop()
    return ids


def _text_encodings(texts: Sequence[str], tokenizer: Any) -> list[Encoding]:
    """Running text, opened as the tokenizer opens texts and closed by the end-of-text token."""
    if not texts:
        return []
    encodings = []
    for ids in tokenizer(list(texts), split_special_tokens=True).input_ids:
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        is_bos = bool(ids) and ids[0] == tokenizer.bos_token_id
        encodings.append(Encoding(tuple(ids), (IGNORED, *ids[1:]) if is_bos else tuple(ids)))
    return encodings
