"""The one place where text becomes token ids, for training and for inference alike.

A conversation is rendered by the model's own chat template and cut into segments: what the model is
given, and what it is to say. Segments are tokenized one by one, so the ids before an answer are the same
in training as when the model is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.data.examples import Conversation, Example, Message, Text, Unusable
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


def set_template(tokenizer: Any, choice: str | None) -> str:
    """Settle the tokenizer's chat template, and say in a sentence which one it is.

    `choice` is a named template, a Jinja file, or None for the model's own (`plain` where it has none).
    Raises ModelError for an unknown name and for a tokenizer without end-of-text token.
    """
    if choice is None and tokenizer.chat_template:
        return "The chat template is the model's own." + _opening_remark(tokenizer)
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
        return saved + _opening_remark(tokenizer)
    raise ModelError(
        f"There is no chat template '{name}'.",
        fix=nearest(name, NAMED_TEMPLATES) + " A .jinja file works as well.",
    )


def prompt_ids(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """What a model is fed to answer: the conversation so far and the opening of its turn.

    Raises Unusable with the template's own words where it refuses the conversation.
    """
    text = _render(messages, tokenizer, opening=True)
    return [i for segment in _segments(text, messages, tokenizer) for i in _ids([segment.text], tokenizer)[0]]


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
    prepared: list[list[_Segment] | Unusable] = []
    for example in examples:
        try:
            prepared.append(_example_segments(example, tokenizer))
        except Unusable as reason:
            prepared.append(reason)
    texts = {segment.text for item in prepared if not isinstance(item, Unusable) for segment in item}
    ordered = sorted(texts)
    known = dict(zip(ordered, _ids(ordered, tokenizer), strict=True))
    specials = _special_ids(tokenizer)
    encodings: list[Encoding | Unusable] = []
    for example, item in zip(examples, prepared, strict=True):
        if isinstance(item, Unusable):
            encodings.append(item)
        elif isinstance(example, Text):
            encodings.append(_text_encoding(example, tokenizer))
        else:
            encodings.append(_labelled(item, known, specials, tokenizer, loss_on))
    return encodings


def end_of_turn_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids at which an answer ends: the end-of-text token and the one the template closes a turn with."""
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        probe = Conversation((Message("user", "a"), Message("assistant", "b")), row=None)  # type: ignore[arg-type]
        last = encode(probe, tokenizer)
        closing = [i for i in last.labels if i in _special_ids(tokenizer)]
        ids += closing[-1:]
    return tuple(dict.fromkeys(ids))


def shown(encoding: Encoding, tokenizer: Any) -> list[tuple[str, Literal["trained", "context", "special"]]]:
    """Each token's text with its role, for everything that shows what the model sees."""
    specials = _special_ids(tokenizer)
    return [
        (
            tokenizer.decode([i], skip_special_tokens=False),
            "trained" if label != IGNORED else "special" if i in specials else "context",
        )
        for i, label in zip(encoding.input_ids, encoding.labels, strict=True)
    ]


def has_special_text(example: Example, tokenizer: Any) -> bool:
    """Whether content holds the text of a special token, which stays text."""
    if not isinstance(example, Conversation):
        return False
    tokens = _special_tokens(tokenizer)
    return any(token in message.content for message in example.messages for token in tokens)


def _example_segments(example: Example, tokenizer: Any) -> list[_Segment]:
    match example:
        case Conversation(messages=messages):
            text = _render(messages, tokenizer, opening=False)
            segments = _segments(text, messages, tokenizer)
            if not any(segment.is_answer for segment in segments):
                raise Unusable("the conversation has no answer that could be trained")
            return segments
        case Text():
            return []
        case _:
            raise Unusable(f"a {type(example).__name__.lower()} is not one text")


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
            content = _marked(message.content, _special_tokens(tokenizer)).strip()
            before, found, closing = through.rpartition(content)
            if not found or not before:
                raise Unusable("the chat template does not write the answer as it is")
            return [_Segment(opened, False), _Segment(content + closing, True)]
    if position < len(text):
        segments.append(_Segment(text[position:], False))
    return [segment for segment in segments if segment.text]


def _opening_remark(tokenizer: Any) -> str:
    """A sentence on a template whose opening of a turn is not how it writes a given answer, or nothing."""
    probe = (Message("user", "a"), Message("assistant", "b"))
    try:
        opened = _render(probe[:1], tokenizer, opening=True)
        if _render(probe, tokenizer, opening=False).startswith(opened):
            return ""
    except Unusable:
        return ""
    return f" It opens the model's turn with {opened[-24:]!r}, behind which the last answer is trained."


def _render(messages: Sequence[Message], tokenizer: Any, *, opening: bool) -> str:
    import jinja2

    tokens = _special_tokens(tokenizer)
    turns = [{"role": m.role, "content": _marked(m.content, tokens)} for m in messages]
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opening)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise Unusable(f"the chat template refuses the conversation: {error}") from None
    return text


def _marked(content: str, tokens: Sequence[str]) -> str:
    """Content with special-token text replaced by marks, so that no template or tokenizer takes it for real."""
    for number, token in enumerate(tokens):
        if token in content:
            content = content.replace(token, f"\ue000{number}\ue001")
    return content


def _ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of texts; special tokens are recognized outside marks only."""
    if not texts:
        return []
    plain = [text for text in texts if not _MARK.search(text)]
    known = (
        dict(zip(plain, tokenizer(plain, add_special_tokens=False).input_ids, strict=True)) if plain else {}
    )
    return [known[text] if text in known else _marked_ids(text, tokenizer) for text in texts]


def _marked_ids(text: str, tokenizer: Any) -> list[int]:
    tokens = _special_tokens(tokenizer)
    ids: list[int] = []
    for position, piece in enumerate(_MARK.split(text)):
        if position % 2:
            ids += tokenizer(
                tokens[int(piece)], add_special_tokens=False, split_special_tokens=True
            ).input_ids
        elif piece:
            ids += tokenizer(piece, add_special_tokens=False).input_ids
    return ids


def _special_tokens(tokenizer: Any) -> list[str]:
    """Texts of all special tokens, longest first so that none hides in another."""
    added = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added}, key=lambda token: (-len(token), token))


def _special_ids(tokenizer: Any) -> set[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *added}


def _labelled(
    segments: Sequence[_Segment],
    known: dict[str, list[int]],
    specials: set[int],
    tokenizer: Any,
    loss_on: LossOn,
) -> Encoding:
    input_ids: list[int] = []
    labels: list[int] = []
    last = max(number for number, segment in enumerate(segments) if segment.is_answer)
    for number, segment in enumerate(segments):
        ids = known[segment.text]
        trained = 0
        if loss_on == "everything":
            trained = len(ids)
        elif segment.is_answer and (loss_on == "answers" or number == last):
            trained = _through_end_of_turn(ids, specials)
            if not trained:
                # The template closes the turn with no token of its own: the model must still learn to stop.
                ids = (
                    [*_without_trailing_space(ids, tokenizer), tokenizer.eos_token_id]
                    if number == last
                    else ids
                )
                trained = len(ids)
        input_ids += ids
        labels += [*ids[:trained], *[IGNORED] * (len(ids) - trained)]
    return Encoding(tuple(input_ids), tuple(labels))


def _through_end_of_turn(ids: Sequence[int], specials: Iterable[int]) -> int:
    """Number of ids up to and including the last special one, 0 where there is none."""
    specials = set(specials)
    return max((position + 1 for position, i in enumerate(ids) if i in specials), default=0)


def _without_trailing_space(ids: Sequence[int], tokenizer: Any) -> list[int]:
    ids = list(ids)
    while ids and not tokenizer.decode(ids[-1:]).strip():
        ids.pop()
    return ids


def _text_encoding(example: Text, tokenizer: Any) -> Encoding:
    ids = list(tokenizer(example.text, split_special_tokens=True).input_ids)
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    is_bos = bool(ids) and ids[0] == tokenizer.bos_token_id
    return Encoding(tuple(ids), (IGNORED, *ids[1:]) if is_bos else tuple(ids))
