"""The one place where text becomes token ids, for training and for inference alike.

A conversation is rendered by the model's own chat template and cut into segments: what the model is
given, and what it is to say. Segments are tokenized one by one, so the ids before an answer are the same
in training as when the model is asked.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tunesmith.data import rendering
from tunesmith.data.examples import (
    Conversation,
    Example,
    Message,
    Preference,
    Rating,
    Row,
    Text,
    Unusable,
    strings,
    texts,
)
from tunesmith.data.tokens import LiteralTokens, QuickTokens, tokenized
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
_PLACE = re.compile("\ue002(\\d+)\ue003")


@dataclass(frozen=True)
class Encoding:
    """Token ids and labels of one example, equally long; label -100 means no loss.

    Tuples where there is one example, views of an array where there are many.
    """

    input_ids: Any
    labels: Any
    good: bool | None = None
    """Whether the answer was chosen or rated good (True), or rejected or rated bad (False)."""
    margin: float | None = None
    """Of a pair's answers by how much the better one is better, where the row says so."""

    @property
    def trained(self) -> int:
        """Number of tokens with a label."""
        return int(np.count_nonzero(np.asarray(self.labels) != IGNORED))


class _Segment(NamedTuple):
    """A stretch of rendered text; an answer is what the model is to say."""

    text: str
    is_answer: bool
    trained: bool | None = None
    """What the message itself says about being trained."""


@dataclass(frozen=True)
class _Specials:
    """A tokenizer's special tokens, looked up once: on large vocabularies that takes a while."""

    tokens: tuple[str, ...]
    ids: frozenset[int]
    pattern: re.Pattern[str]
    """Special-token text, the longest first so that none hides in another, and the mark's own character."""
    beginnings: tuple[str, ...]
    """One of these is in any text that the pattern is found in: a quick test for most texts, which have none."""

    def marked(self, content: str) -> str:
        """Content with special-token text as marks, so that no template or tokenizer takes it for real."""
        for beginning in self.beginnings:
            if beginning in content:
                return self.pattern.sub(lambda found: f"\ue000{self.tokens.index(found[0])}\ue001", content)
        return content


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with its chat template, and all that is worked out about them once."""

    tokenizer: Any
    specials: _Specials
    puts_space_first: bool
    reasoning_key: str | None
    """Name under which the template takes an answer's reasoning; None where it has no place for it."""
    takes_tools: bool
    triggers: tuple[str, ...]
    """Texts by which the template may tell contents apart; content with one of them is always rendered."""
    tokens: Callable[[Sequence[str]], list[list[int]]]
    """Ids of each text."""
    literally: LiteralTokens
    """The same where the text of a special token is to stay text."""
    skeletons: dict[tuple[str, ...], _Skeleton | None] = field(default_factory=dict)
    met: Counter[tuple[str, ...]] = field(default_factory=Counter)
    """Number of conversations before there was a skeleton, by roles."""
    agreed: Counter[tuple[str, ...]] = field(default_factory=Counter)
    """Number of rows for which a skeleton and the rendered text were the same, by roles."""
    closings: dict[tuple[int, ...], bool] = field(default_factory=dict)
    rewriting: dict[tuple[bool, bool], bool] = field(default_factory=dict)
    """Whether earlier answers (or tool calls) are written otherwise than when they were given, by whether they
    have reasoning and whether they are calls."""
    calling: dict[str, bool | None] = field(default_factory=dict)
    """Whether the template takes a call's arguments as JSON text, not as an object, once that is found out; None
    where it writes no calls."""
    writing: dict[str, bool] = field(default_factory=dict)
    """Whether the template writes system messages, tools' results and tools' schemas, once that is found out."""


@dataclass(frozen=True)
class _Skeleton:
    """What a template writes around the contents of messages with given roles.

    Each segment is a list of literals and message numbers, in the order of the text.
    """

    segments: tuple[tuple[tuple[str | int, ...], bool, int | None], ...]
    """Pieces, whether it is an answer, and the number of the answer's message."""
    is_verbatim: bool
    """Whether contents of very different kinds all came out as they went in."""

    def filled(self, turns: Sequence[Message]) -> list[_Segment]:
        """The segments with contents in their places."""
        return [
            _Segment(
                "".join([piece if isinstance(piece, str) else turns[piece].content for piece in pieces]),
                is_answer,
                None if number is None else turns[number].trained,
            )
            for pieces, is_answer, number in self.segments
        ]


def encoder(tokenizer: Any, *, quick: bool = False) -> Encoder:
    """What `encode_all` and the others need to know of a tokenizer; worth keeping for many calls.

    With `quick`, which is for many rows, whatever encodes may raise Differs (tokens.py).
    """
    rendering.install()
    template = tokenizer.chat_template
    source = template if isinstance(template, str) else "".join((template or {}).values())
    if tokenizer.is_fast:
        # A tokenizer.json may ask for truncation or padding; here nothing is cut or filled up.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.encode_special_tokens = False
    return Encoder(
        tokenizer,
        _specials(tokenizer),
        _puts_space_first(tokenizer),
        next((k for k in REASONING_KEYS if re.search(rf"""[.\["']{k}\b""", source)), None),
        "tool_calls" in source or "tools" in source,
        _triggers(source),
        QuickTokens(tokenizer) if quick else partial(tokenized, tokenizer=tokenizer),
        LiteralTokens(tokenizer),
    )


REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Names under which templates in the wild take an answer's thoughts."""


PROBES = (
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
        rendering.trust(tokenizer.chat_template)
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


def prompt_ids(
    messages: Sequence[Message], tokenizer: Any, *, tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """What a model is fed to answer: the conversation so far and the opening of its turn.

    Raises Unusable with the template's own words where it refuses the conversation.
    """
    return asked(messages, encoder(tokenizer), tools)


def asked(
    messages: Sequence[Message], context: Encoder, tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """`prompt_ids` for a tokenizer that is known already."""
    turns, marked_tools = _turns(messages, context), _marked_all(tools, context.specials)
    segments = _segments(_render(turns, context, marked_tools, opening=True), turns, context, marked_tools)
    [ids] = _ids([segments], context)
    return [i for part in ids for i in part]


def asked_whole(conversations: Sequence[Sequence[Message]], context: Encoder) -> list[list[int] | Unusable]:
    """What a model that reads its prompt as one text is fed for each conversation: the ids of all that the
    template writes, tokenized in one piece."""
    found: list[list[int] | Unusable] = []
    texts: list[list[_Segment]] = []
    for messages in conversations:
        try:
            text = _render(_turns(messages, context), context, opening=True)
        except Unusable as reason:
            found.append(reason)
        else:
            found.append([])
            texts.append([_Segment(text, False)])
    ids = iter(_ids(texts, context))
    return [item if isinstance(item, Unusable) else [i for part in next(ids) for i in part] for item in found]


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
    [(_, encodings)] = encode_batches([examples], encoder(tokenizer), loss_on=loss_on, ahead=False)
    return [
        e if isinstance(e, Unusable) else Encoding(tuple(e.input_ids.tolist()), tuple(e.labels.tolist()))
        for e in encodings
    ]


def encode_batches(
    batches: Iterable[Sequence[Example]], context: Encoder, *, loss_on: LossOn = "answers", ahead: bool = True
) -> Iterator[tuple[Sequence[Example], list[Encoding | Unusable]]]:
    """Each batch with its encodings, as views of int32 arrays that hold the whole batch.

    While one batch is tokenized, in native threads, the next one is rendered.

    With `ahead` a batch is read before the one before it is given back.
    """
    rendered = ((batch, _rendered(batch, context)) for batch in batches)
    if not ahead:
        for batch, segments in rendered:
            yield batch, _assembled(batch, segments, _tokens(batch, segments, context), context, loss_on)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as thread:
        waiting = None
        for batch, segments in rendered:
            started = (batch, segments, thread.submit(_tokens, batch, segments, context))
            if waiting:
                done, parts, ids = waiting
                yield done, _assembled(done, parts, ids.result(), context, loss_on)
            waiting = started
        if waiting:
            done, parts, ids = waiting
            yield done, _assembled(done, parts, ids.result(), context, loss_on)


_Parts = list["list[_Segment] | Unusable"]
_Tokens = tuple[list[list[list[int]]], list[list[int]]]


def _rendered(examples: Sequence[Example], context: Encoder) -> _Parts:
    """Segments of each example, one rendering each wherever the template's skeleton is known."""
    parts: _Parts = []
    to_render: list[tuple[int, Sequence[Message], list[_Segment]]] = []
    for number, example in enumerate(examples):
        try:
            if isinstance(example, Conversation):
                turns = _turns(example.messages, context)
                skeleton = None if example.tools else _skeleton(turns, context)
                if skeleton:
                    segments = skeleton.filled(turns)
                    if not _is_certain(number, turns, skeleton, context):
                        to_render.append((number, turns, segments))
                    parts.append(segments)
                else:
                    parts.append(_conversation_segments(turns, example.tools, context))
            else:
                parts.append(_no_segments(example))
        except Unusable as reason:
            parts.append(reason)
    rendered = _render_all([plain for _, plain, _ in to_render], context)
    for (number, plain, segments), text in zip(to_render, rendered, strict=True):
        roles = tuple([turn.role for turn in plain])
        if text == "".join([segment.text for segment in segments]):
            context.agreed[roles] += 1
            continue
        if not _has_trigger(plain, context):
            context.agreed[roles] = -(10**12)  # the template tells contents apart by something else
        try:
            parts[number] = _conversation_segments(plain, (), context)
        except Unusable as reason:
            parts[number] = reason
    return parts


SURE_AFTER, STILL_CHECKED = 256, 32
"""Conversations with given roles that are all rendered, and the share (one in so many) that is from then on."""


def _is_certain(number: int, turns: Sequence[Message], skeleton: _Skeleton, context: Encoder) -> bool:
    """Whether rendering could only repeat what the skeleton says.

    That takes a template that has written hundreds of such conversations by its skeleton, contents of every
    kind verbatim, and contents without any of the texts that the template looks for.
    """
    if not skeleton.is_verbatim or number % STILL_CHECKED == 0:
        return False
    if context.agreed[tuple([turn.role for turn in turns])] < SURE_AFTER:
        return False
    return not _has_trigger(turns, context)


def _has_trigger(turns: Sequence[Message], context: Encoder) -> bool:
    return any(trigger in turn.content for trigger in context.triggers for turn in turns)


@lru_cache(maxsize=256)
def _triggers(source: str) -> tuple[str, ...]:
    """Every text in a template that it does more with than write it: by one of them it may tell contents apart.

    It could also do so by a content's length, its place or its first characters; `_is_verbatim` tries contents
    that differ in these. What a role is compared with and names of keys (`message['role']`) do not count.
    """
    import jinja2

    nodes = jinja2.nodes
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", source)
        )
    except (jinja2.TemplateSyntaxError, RecursionError):
        return ("",)  # unknown to this parser: in every content, so everything is rendered
    innocent: set[int] = set()
    for node in tree.find_all((nodes.Output, nodes.Assign, nodes.Getitem, nodes.Compare, nodes.Call)):
        match node:
            case nodes.Output():
                innocent |= {id(const) for part in node.nodes for const in _written(part)}
            case nodes.Assign() if isinstance(node.node, nodes.Add | nodes.Concat):
                innocent |= {id(const) for const in _written(node.node)}
            case nodes.Getitem(arg=nodes.Const() as name):
                innocent.add(id(name))
            case nodes.Compare() if _names_role(node.expr):
                innocent |= {id(const) for operand in node.ops for const in operand.find_all(nodes.Const)}
            case nodes.Call(node=nodes.Name(name="raise_exception")):
                innocent |= {id(const) for const in node.find_all(nodes.Const)}
            case _:
                pass
    texts = {
        const.value
        for const in tree.find_all(nodes.Const)
        if isinstance(const.value, str) and const.value and id(const) not in innocent
    }
    return tuple(sorted(texts))


def _written(expression: Any) -> Iterator[Any]:
    """The constants that an expression joins into text."""
    import jinja2

    nodes = jinja2.nodes
    match expression:
        case nodes.Const():
            yield expression
        case nodes.Add() | nodes.Concat():
            for part in expression.iter_child_nodes():
                yield from _written(part)
        case nodes.CondExpr():
            yield from _written(expression.expr1)
            yield from _written(expression.expr2)
        case _:
            pass


def _names_role(node: Any) -> bool:
    """Whether an expression is a message's role."""
    import jinja2

    if isinstance(node, jinja2.nodes.Getattr):
        return bool(node.attr == "role")
    is_item = isinstance(node, jinja2.nodes.Getitem) and isinstance(node.arg, jinja2.nodes.Const)
    return bool(is_item and node.arg.value == "role")


def _tokens(examples: Sequence[Example], parts: _Parts, context: Encoder) -> _Tokens:
    segments = [item for item in parts if not isinstance(item, Unusable)]
    texts = [
        example.text
        for example, item in zip(examples, parts, strict=True)
        if isinstance(example, Text) and not isinstance(item, Unusable)
    ]
    return _ids(segments, context), _text_ids(texts, context)


def _assembled(
    examples: Sequence[Example], parts: _Parts, tokens: _Tokens, context: Encoder, loss_on: LossOn
) -> list[Encoding | Unusable]:
    ids, texts = iter(tokens[0]), iter(tokens[1])
    flat: list[Sequence[int]] = []
    end = 0
    trained: list[tuple[int, int]] = []
    found: list[tuple[int, int] | Unusable] = []
    for example, item in zip(examples, parts, strict=True):
        if isinstance(item, Unusable):
            found.append(item)
            continue
        pieces = next(ids)
        start = end
        if isinstance(example, Text):
            text = next(texts)
            flat.append(text)
            end += len(text)
            trained.append((start + (text[:1] == [context.tokenizer.bos_token_id]), end))
        else:
            try:
                labelled = _labelled(item, pieces, context, loss_on)
            except Unusable as reason:
                found.append(reason)
                continue
            for piece, count in labelled:
                if count:
                    trained.append((end, end + count))
                flat.append(piece)
                end += len(piece)
        found.append((start, end))
    input_ids = np.concatenate([np.empty(0, dtype=np.int32), *flat]).astype(np.int32)
    steps = np.zeros(end + 1, dtype=np.int32)
    bounds = np.array(trained, dtype=np.int64).reshape(-1, 2)
    np.add.at(steps, bounds[:, 0], 1)
    np.add.at(steps, bounds[:, 1], -1)
    labels = np.where(np.cumsum(steps[:-1]) > 0, input_ids, np.int32(IGNORED))
    return [
        place
        if isinstance(place, Unusable)
        else Encoding(input_ids[place[0] : place[1]], labels[place[0] : place[1]])
        for place in found
    ]


def end_of_turn_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids at which an answer ends: the end-of-text token and the one the template closes a turn with."""
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    special = encoder(tokenizer).specials.ids
    said = tokenizer("b", add_special_tokens=False).input_ids[-1:]
    for probe in PROBES if tokenizer.chat_template else ():
        try:
            encoding = encode(Conversation(probe, row=Row("probe", 1)), tokenizer)
        except Unusable:
            continue
        labels = [i for i in encoding.labels if i != IGNORED]
        behind = len(labels) - labels[::-1].index(said[0]) if said and said[0] in labels else 0
        ids += [i for i in labels[behind:] if i in special]
        break
    for probe in PROBES if tokenizer.chat_template else ():
        try:  # Gemma 4 and gpt-oss close a tool call with a token of its own
            call = Conversation((*probe[:-1], _CALL), row=Row("probe", 1), tools=_CALLED)
            last = encode(call, tokenizer).labels[-1:]
        except Unusable:
            continue
        ids += [i for i in last if i in special]
        break
    return tuple(dict.fromkeys(ids))


def shown(encoding: Encoding, tokenizer: Any) -> list[tuple[str, Literal["trained", "context", "special"]]]:
    """Each token's text with its role, for everything that shows what the model sees.

    A character that several tokens make up stands at the last of them.
    """
    specials = _specials(tokenizer).ids
    pieces: list[tuple[str, Literal["trained", "context", "special"]]] = []
    pending: list[int] = []
    for i, label in zip(encoding.input_ids, encoding.labels, strict=True):
        pending.append(i)
        text = _text_of(pending, tokenizer)
        is_part = text.endswith("\ufffd") and len(pending) < 4 and i not in specials
        role: Literal["trained", "context", "special"] = (
            "trained" if label != IGNORED else "special" if i in specials else "context"
        )
        pieces.append(("" if is_part else text, role))
        if not is_part:
            pending = []
    return pieces


def _text_of(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of ids inside a text: a decoder that strips the space in front of a text must not do it here."""
    text: str = tokenizer.decode(ids, skip_special_tokens=False)
    if tokenizer.is_fast:
        first = tokenizer.convert_ids_to_tokens(ids[0])
        if isinstance(first, str) and first.startswith("\u2581") and not text.startswith(" "):
            return " " + text
    return text


def has_special_text(example: Example, context: Encoder) -> bool:
    """Whether the example's content holds the text of a special token, which stays text."""
    marked = context.specials.marked
    return any(marked(content) != content for content in texts(example))


def left_out(example: Example, context: Encoder) -> bool:
    """Whether the example has reasoning for which the template has no place."""
    return (
        context.reasoning_key is None
        and isinstance(example, Conversation)
        and any(message.reasoning for message in example.messages)
    )


def views(example: Example, context: Encoder, loss_on: LossOn) -> list[Example]:
    """The example as it is trained: itself, or one conversation for each question that was asked.

    The latter where the template writes earlier answers otherwise once others follow (without their thoughts,
    or the place for them, or an end): no single text has every answer as the model would have to give it.
    A preference is two conversations, of its chosen and of its rejected answer; a rating is one.
    """
    if isinstance(example, Preference | Rating):
        from tunesmith.data.preferences import sides

        return [side for side, _ in sides(example)]
    if not isinstance(example, Conversation) or loss_on != "answers":
        return [example]
    messages = example.messages
    asked_at = [n for n, message in enumerate(messages) if message.role == "user" and n]
    # An answer before the first question is no answer of its own (see `_segments`).
    ends = [n for n in asked_at if messages[n - 1].role == "assistant" and n > _first_question(messages)]
    if ends and not _rewrites(any(m.reasoning for m in messages[: ends[-1]]), context):
        ends = []
    called = [n for n, m in enumerate(messages) if n and m.role == "tool" and messages[n - 1].tool_calls]
    if any(
        _rewrites(kind, context, calls=True) for kind in {bool(messages[n - 1].reasoning) for n in called}
    ):
        ends = sorted([*ends, *called])
    if not ends:
        return [example]
    found: list[Example] = []
    begin = 0
    for end in (*ends, len(messages)):
        turns = [
            turn._replace(trained=False) if place < begin and turn.role == "assistant" else turn
            for place, turn in enumerate(messages[:end])
        ]
        if any(turn.role == "assistant" and turn.trained is not False for turn in turns):
            found.append(replace(example, messages=tuple(turns)))
        begin = end
    return found


def _first_question(messages: Sequence[Message]) -> int:
    return next((n for n, message in enumerate(messages) if message.role == "user"), len(messages))


def _rewrites(with_reasoning: bool, context: Encoder, *, calls: bool = False) -> bool:
    """Whether an answer is written otherwise once a question follows, or a call once its result does."""
    kind = (with_reasoning, calls)
    if kind not in context.rewriting:
        reasoning = "r" if with_reasoning and context.reasoning_key else None
        answer = Message("assistant", "b", reasoning=reasoning)
        context.rewriting[kind] = False
        for probe in PROBES:
            turns = (*probe[:-1], answer, Message("user", "c"), answer)
            if calls:
                turns = (*probe[:-1], _CALL._replace(reasoning=reasoning), _RESULT, answer)
            try:
                segments = _conversation_segments(turns, _CALLED if calls else (), context)
            except Unusable:
                continue
            labelled = _labelled(segments, _ids([segments], context)[0], context, "answers")
            context.rewriting[kind] = sum(trained > 0 for _, trained in labelled) == 1
            break
    return context.rewriting[kind]


_ARGUMENTS = {"probed_key": "probed value", "probed_list": [1, True]}
_CALL = Message(
    "assistant",
    "",
    tool_calls=(
        {
            "id": "probe0001",
            "type": "function",
            "function": {"name": "probed_tool", "arguments": _ARGUMENTS},
        },
    ),
)
_RESULT = Message("tool", "probed result", name="probed_tool", tool_call_id="probe0001")
_CALLED: tuple[Mapping[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "probed_tool",
            "description": "probed",
            "parameters": {
                "type": "object",
                "properties": {"probed_key": {"type": "string", "description": "probed"}},
            },
        },
    },
)
"""A tool call that shows how a template writes calls, with its result and the schema."""


def _takes_text(context: Encoder) -> bool | None:
    """Whether the template takes a call's arguments as JSON text, found out by trying; None where it writes none."""
    if "found" not in context.calling:
        ways = (as_text for as_text in (False, True) if _writes_calls(as_text, context))
        context.calling["found"] = next(ways, None)
    return context.calling["found"]


def _writes_calls(as_text: bool, context: Encoder) -> bool:
    context.calling["tried"] = as_text
    try:
        for probe in PROBES:
            try:
                opened = _render(probe[:-1], context, _CALLED, opening=True)
                through = _render((*probe[:-1], _CALL), context, _CALLED, opening=False)
                _check_calls(_CALL, opened, through)
            except Unusable:
                continue
            # An object that is put into the text as it is comes out as Python writes it, not as JSON.
            return str(_ARGUMENTS) not in through
        return False
    finally:
        del context.calling["tried"]


def _check_calls(turn: Message, opened: str, through: str) -> None:
    """Raises Unusable where the template leaves out a tool that is called, or what it is called with.

    The prompt may name the tool as well: what counts is what comes behind it.
    """

    def is_written(text: str) -> bool:
        if through.startswith(opened):
            return through.find(text, len(opened)) >= 0
        return through.count(text) > opened.count(text)

    for call in turn.tool_calls:
        name = call["function"]["name"]
        if not is_written(name):
            raise Unusable(f"the chat template does not write the call of {name}")
        for value in filter(str.strip, strings(call["function"]["arguments"])):
            forms = (
                value,
                json.dumps(value, ensure_ascii=False)[1:-1],
                json.dumps(value)[1:-1],
                repr(value)[1:-1],
            )
            if not any(is_written(form.strip()) for form in forms):
                raise Unusable(f"the chat template does not write what {name} is called with")


UNWRITTEN = {
    "system": "a system message",
    "tool": "a tool's result",
    "tools": "schemas of tools",
}
"""What a template may have no place for, besides reasoning; the row is trained without it, and that is said."""


def unwritten(example: Example, context: Encoder) -> list[str]:
    """Which of UNWRITTEN the example has and the template leaves out."""
    if not isinstance(example, Conversation):
        return []
    there = {turn.role for turn in example.messages} & {"system", "tool"}
    if example.tools:
        there.add("tools")
    return [kind for kind in UNWRITTEN if kind in there and not _writes(kind, context)]


def _writes(kind: str, context: Encoder) -> bool:
    """Whether the template writes such a thing, tried with a short conversation; a refusal is no omission."""
    if kind not in context.writing:
        called = Message("user", "a"), _CALL, _RESULT, Message("assistant", "b")
        system = Message("system", "probed words")
        tries: tuple[tuple[Sequence[Message], str], ...] = {
            "system": ((((system, *PROBES[0])), system.content),),
            "tool": ((called, _RESULT.content), ((system, *called), _RESULT.content)),
            "tools": tuple((probe, "probed_tool") for probe in PROBES),
        }[kind]
        tools = _CALLED if kind != "system" else ()
        found: list[bool] = []
        for turns, words in tries:
            try:
                found.append(words in _render(turns, context, tools, opening=False))
            except Unusable:
                continue
        context.writing[kind] = any(found) or not found
    return context.writing[kind]


def _no_segments(example: Example) -> list[_Segment]:
    if isinstance(example, Text):
        _encodable(example.text)
        return []
    raise Unusable(f"a {type(example).__name__.lower()} is not one text")


def _conversation_segments(
    turns: Sequence[Message], tools: Sequence[Mapping[str, Any]], context: Encoder
) -> list[_Segment]:
    marked_tools = _marked_all(tools, context.specials)
    if not context.takes_tools and (tools or any(turn.tool_calls for turn in turns)):
        raise Unusable("the chat template has no place for tools")
    if any(turn.tool_calls for turn in turns) and _takes_text(context) is None:
        raise Unusable("the chat template does not write tool calls")
    segments = _segments(_render(turns, context, marked_tools, opening=False), turns, context, marked_tools)
    if not any(segment.is_answer for segment in segments):
        raise Unusable("the conversation has no answer that could be trained")
    _check_written(segments, turns)
    return segments


def _skeleton(turns: Sequence[Message], context: Encoder) -> _Skeleton | None:
    """What the template writes around contents, where these messages are plain enough to be put in.

    Content with space at its ends, which templates may strip, is not; nor is anything but content.
    """
    for turn in turns:
        content = turn.content
        if turn.reasoning or turn.tool_calls or turn.name or turn.tool_call_id:
            return None
        if not content or content[0].isspace() or content[-1].isspace():
            return None
    roles = tuple([turn.role for turn in turns])
    if roles not in context.skeletons:
        context.met[roles] += 1
        if context.met[roles] < WORTHWHILE:
            return None
        context.skeletons[roles] = _worked_out(roles, context)
    return context.skeletons[roles]


WORTHWHILE = 8
"""Conversations with given roles after which a skeleton is worked out: it costs about as much as these."""


def _worked_out(roles: Sequence[str], context: Encoder) -> _Skeleton | None:
    """The skeleton for these roles, from a conversation whose contents are place holders."""
    turns = [Message(role, f"\ue002{number}\ue003") for number, role in enumerate(roles)]
    try:
        segments = _conversation_segments(turns, (), context)
    except Unusable:
        return None
    made = []
    seen: list[int] = []
    for segment in segments:
        pieces: list[str | int] = []
        for position, piece in enumerate(_PLACE.split(segment.text)):
            if position % 2:
                pieces.append(int(piece))
                seen.append(int(piece))
            elif piece:
                pieces.append(piece)
        own = [piece for piece in pieces if isinstance(piece, int) and roles[piece] == "assistant"]
        if segment.is_answer and len(own) != 1:
            return None
        made.append((tuple(pieces), segment.is_answer, own[0] if segment.is_answer else None))
    if seen != list(range(len(roles))):
        return None
    skeleton = _Skeleton(tuple(made), is_verbatim=True)
    return _Skeleton(tuple(made), is_verbatim=_is_verbatim(roles, skeleton, context))


KINDS = (
    "a",
    "Zß 漢字 é\n\n\tq \"quoted\" 'too' & <b>c</b> \\n {{ d }} {% e %} # f / g = 1.50 | h",
    '{"name": [1, 2]}',
    "[INST] x",
    "# y\nz " + "long " * 2000 + "end",
)
"""Contents as different as they come: a template that writes all of them verbatim transforms none."""


def _is_verbatim(roles: Sequence[str], skeleton: _Skeleton, context: Encoder) -> bool:
    for shift in range(len(KINDS)):
        turns = _turns(
            [Message(role, KINDS[(number + shift) % len(KINDS)]) for number, role in enumerate(roles)],
            context,
        )
        [text] = _render_all([turns], context)
        if text != "".join([segment.text for segment in skeleton.filled(turns)]):
            return False
    return True


def _turns(messages: Sequence[Message], context: Encoder) -> list[Message]:
    """The messages as templates get them: special-token text in content is marked."""
    specials = context.specials
    turns = []
    for message in messages:
        content = message.content
        if not content.isascii():
            _encodable(content)
        marked = specials.marked(content)
        if message.reasoning or message.tool_calls:
            message = message._replace(
                reasoning=specials.marked(message.reasoning) if message.reasoning else None,
                tool_calls=_marked_all(message.tool_calls, specials),
            )
        turns.append(message if marked is content else message._replace(content=marked))
    return turns


def _marked_all(value: Any, specials: _Specials) -> Any:
    """Marks in every text of a nested value, names of keys excepted."""
    if isinstance(value, str):
        _encodable(value)
        return specials.marked(value)
    if isinstance(value, Mapping):
        return {key: _marked_all(item, specials) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (
            tuple(_marked_all(item, specials) for item in value)
            if isinstance(value, tuple)
            else [_marked_all(item, specials) for item in value]
        )
    return value


def _encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable(
            f"character {error.start + 1} is half a character (U+{ord(text[error.start]):04X})"
        ) from None


def _segments(
    text: str, messages: Sequence[Message], context: Encoder, tools: Sequence[Mapping[str, Any]] = ()
) -> list[_Segment]:
    """Cut rendered text where answers begin and end.

    A template that renders earlier turns differently once later ones follow (reasoning templates drop old
    thoughts) gives no boundary there; that turn is context, as it is when the model is asked. Some open
    the model's turn with text that they leave out around a given answer (DeepSeek-R1's `<think>`); then the
    last answer is put behind that opening, since it is what the model will be asked to continue.

    An answer before the first question is context where the template refuses the turns before it, as nearly
    all refuse an empty conversation: the model is never asked for it.
    """
    first_question = _first_question(messages)
    segments: list[_Segment] = []
    position = 0
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        is_last = index + 1 == len(messages)
        try:
            opened = _render(messages[:index], context, tools, opening=True)
        except Unusable:
            if index > first_question or is_last or message.trained:
                raise
            continue
        through = text if is_last else _render(messages[: index + 1], context, tools, opening=False)
        if message.tool_calls:
            _check_calls(message, opened, through)
        if not text.startswith(through) and context.tokenizer.eos_token:
            # Some (Phi-3) end the whole conversation with a token of their own: it is not the turn's.
            turn = through.removesuffix(context.tokenizer.eos_token)
            through = turn if turn.rstrip().endswith(context.specials.tokens) else through
        if text.startswith(through) and through.startswith(opened) and len(opened) >= position:
            segments += [
                _Segment(text[position : len(opened)], False),
                _Segment(text[len(opened) : len(through)], True, message.trained),
            ]
            position = len(through)
        elif is_last:
            answer = _behind_opening(opened, through, messages, context, tools)
            return [_Segment(opened, False), _Segment(answer, True, message.trained)]
    if position < len(text):
        segments.append(_Segment(text[position:], False))
    return [segment for segment in segments if segment.text]


def _behind_opening(
    opened: str,
    through: str,
    messages: Sequence[Message],
    context: Encoder,
    tools: Sequence[Mapping[str, Any]],
) -> str:
    """The last answer and its closing, as the model has to write them behind an opening of another form.

    What closes the turn is found with a place holder in the answer's stead. Thoughts that the template
    leaves out are kept where the opening begins one.
    """
    message = messages[-1]
    place = "\ue002\ue003"
    holder = Message("assistant", place, tool_calls=message.tool_calls)
    before, found, closing = _render((*messages[:-1], holder), context, tools, opening=False).partition(place)
    content = message.content.strip()
    if not content and not message.tool_calls:
        raise Unusable("empty answer")
    if not found or not through.endswith(closing):
        raise Unusable("the chat template does not write the answer as it is")
    if not content:
        closing = (
            closing.lstrip()
        )  # the call, behind the line break that separates it from the words before it
    thought, thinks, answer = content.rpartition(THOUGHT_ENDS)
    if message.reasoning and not thinks:
        thought, thinks, answer = message.reasoning, THOUGHT_ENDS, f"\n\n{content}"
    thought = thought.strip().removeprefix(THOUGHT_BEGINS).strip()
    begins_thought = opened.rstrip().endswith(THOUGHT_BEGINS)
    if thinks and thought and not begins_thought:
        raise Unusable("the answer has a thought, and the chat template asks for one without")
    if thinks and begins_thought:
        return f"{thought}\n{thinks}{answer}{closing}"
    if not thinks and content and through.startswith(before):
        content = through[len(before) : len(through) - len(closing)].lstrip()
    return (answer.strip() if thinks else content) + closing


THOUGHT_BEGINS, THOUGHT_ENDS = "<think>", "</think>"


def _check_written(segments: Sequence[_Segment], turns: Sequence[Message]) -> None:
    """Raises Unusable where the template leaves out what somebody says: some take no plain text."""
    text = "".join([segment.text for segment in segments])
    for turn in turns:
        said = turn.content.rpartition(THOUGHT_ENDS)[2].strip()
        if turn.role in ("user", "assistant") and said and said not in text:
            raise Unusable(f"the chat template does not write what the {turn.role} says")


def _remarks(tokenizer: Any) -> str:
    """Sentences on what a template does otherwise than one would think, each with what follows from it."""
    import jinja2

    context = encoder(tokenizer)
    remarks = ""
    for probe in PROBES:
        try:
            opened = _render(probe[:-1], context, opening=True)
            whole = _render(probe, context, opening=False)
            if not whole.startswith(opened):
                remarks += f" It opens the model's turn with {opened[-24:]!r}, behind which the last answer is trained."
            segments = _segments(whole, probe, context)
            answer = _ids([segments], context)[0][-1]
            if segments[-1].is_answer and not _through_end_of_turn(answer, context):
                if tokenizer.eos_token_id is None:
                    raise ModelError(
                        "The chat template closes a turn with no token of its own, and the tokenizer has no "
                        "end-of-text token: no answer could end.",
                        fix="Set eos_token in tokenizer_config.json, or choose another --chat-template.",
                    )
                remarks += " It closes the model's turn with no token of its own: the end-of-text token is put behind."
            if _rewrites(False, context):
                remarks += (
                    " It writes earlier answers otherwise than the last one: a conversation is trained once for "
                    "each question in it."
                )
            return remarks
        except Unusable as refusal:
            if rendering.is_exhausting(context.tokenizer.chat_template):
                raise ModelError(
                    "The chat template goes beyond its limits for a conversation of two words.",
                    found=str(refusal),
                    fix="Choose another with --chat-template, and do not use this model's.",
                ) from None
            if isinstance(refusal.__context__, jinja2.TemplateSyntaxError):
                raise ModelError(
                    "The chat template is no valid Jinja.",
                    found=f"line {refusal.__context__.lineno}: {refusal.__context__.message}",
                    fix="Mend it, or choose another with --chat-template.",
                ) from None
    return remarks


def _render(
    turns: Sequence[Message], context: Encoder, tools: Sequence[Mapping[str, Any]] = (), *, opening: bool
) -> str:
    import jinja2

    try:
        text: str = context.tokenizer.apply_chat_template(
            [as_message(turn, context) for turn in turns],
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=opening,
        )
    except (jinja2.TemplateError, ValueError, TypeError, AttributeError) as error:
        raise Unusable(f"the chat template refuses the conversation: {error}") from None
    return text


def _render_all(conversations: Sequence[Sequence[Message]], context: Encoder) -> list[str | None]:
    """Each conversation as text, in one call; None for one that the template refuses."""
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # What apply_chat_template does with one conversation, without what it does around it.
    template = _compile_jinja_template(context.tokenizer.get_chat_template(None, None))
    facts = {
        **context.tokenizer.special_tokens_map,
        "tools": None,
        "documents": None,
        "add_generation_prompt": False,
    }
    rows = [
        {"messages": [{"role": turn.role, "content": turn.content} for turn in turns], **facts}
        for turns in conversations
    ]
    try:
        if isinstance(template, rendering.Template):
            return list(template.render_all(rows))
        return [template.render(**row) for row in rows]
    except (jinja2.TemplateError, ValueError, TypeError, AttributeError):
        return [None] * len(conversations)  # one is refused: each is then rendered on its own


def as_message(turn: Message, context: Encoder) -> dict[str, Any]:
    """A message as chat templates take it."""
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.reasoning and context.reasoning_key:
        message[context.reasoning_key] = turn.reasoning
    if turn.tool_calls:
        as_text = context.calling["tried"] if "tried" in context.calling else _takes_text(context)
        message["tool_calls"] = [_with_text(call) if as_text else call for call in turn.tool_calls]
    if turn.name:
        message["name"] = turn.name
    if turn.tool_call_id:
        message["tool_call_id"] = turn.tool_call_id
    return message


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as JSON."""
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False, default=str)
    return {**call, "function": {**function, "arguments": arguments}}


def _ids(conversations: Sequence[Sequence[_Segment]], context: Encoder) -> list[list[list[int]]]:
    """Token ids of every segment, tokenized in one call; special tokens are recognized outside marks only."""
    if not context.puts_space_first:
        texts = list(dict.fromkeys([s.text for segments in conversations for s in segments]))
        plain = [text for text in texts if "\ue000" not in text]
        known = dict(zip(plain, context.tokens(plain), strict=True))
        for text in texts:
            if text not in known:
                known[text] = _marked_ids(text, context)
        return [[known[segment.text] for segment in segments] for segments in conversations]
    wanted: list[list[tuple[str, str]]] = []
    for segments in conversations:
        tails = ["", *(_tail(s.text, context.specials) for s in segments[:-1])]
        wanted.append([(tail, s.text) for tail, s in zip(tails, segments, strict=False)])
    pairs = dict.fromkeys(pair for segments in wanted for pair in segments)
    plain = sorted(
        {text for tail, t in pairs for text in (tail, tail + t, t) if text and not _MARK.search(text)}
    )
    known = dict(zip(plain, tokenized(plain, context.tokenizer), strict=True))
    ids = {pair: _behind(*pair, known, context) for pair in pairs}
    return [[ids[pair] for pair in segments] for segments in wanted]


def plain_ids(text: str, tokenizer: Any) -> list[int]:
    """Ids of a text in which nothing is special, whatever it looks like."""
    return LiteralTokens(tokenizer)([text])[0]


def _behind(tail: str, text: str, known: dict[str, list[int]], context: Encoder) -> list[int]:
    """Ids of a text as they are behind a tail; on its own where the two would melt into one token."""

    def of(text: str) -> list[int]:
        return known[text] if text in known else _marked_ids(text, context)

    if tail:
        before, both = of(tail), of(tail + text)
        if both[: len(before)] == before:
            return both[len(before) :]
    return of(text)


def _marked_ids(text: str, context: Encoder) -> list[int]:
    """Ids of a text with marks: what they stand for becomes plain text, the rest is as it would be without."""
    ids: list[int] = []
    tail = ""
    for position, piece in enumerate(_MARK.split(text)):
        is_plain = position % 2 == 1
        piece = context.specials.tokens[int(piece)] if is_plain else piece
        if not piece:
            continue
        ids_of = context.literally if is_plain else partial(tokenized, tokenizer=context.tokenizer)
        found = ids_of([tail + piece])[0]
        if tail:
            alone = ids_of([tail])[0]
            if found[: len(alone)] == alone:
                found = found[len(alone) :]
        ids += found
        if context.puts_space_first:
            tail = piece[-1:] if is_plain else _tail(piece, context.specials)
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
        beginnings=tuple(sorted({token[:2] for token in tokens} | {"\ue000"})),
        tokens=(*tokens, "\ue000"),
        ids=frozenset((*tokenizer.all_special_ids, *added)),
        pattern=re.compile("|".join(re.escape(token) for token in (*tokens, "\ue000"))),
    )


def _labelled(
    segments: Sequence[_Segment], parts: Sequence[list[int]], context: Encoder, loss_on: LossOn
) -> list[tuple[list[int], int]]:
    """The ids of each segment, and how many of them, from its first, are trained."""
    labelled: list[tuple[list[int], int]] = []
    last = max([number for number, segment in enumerate(segments) if segment.is_answer])
    for number, (segment, ids) in enumerate(zip(segments, parts, strict=True)):
        trained = 0
        if segment.is_answer:
            end = _through_end_of_turn(ids, context)
            if number == last and not end:
                # The template closes the turn with no token of its own: the model must still learn to stop.
                eos = context.tokenizer.eos_token_id
                if eos is None:
                    raise Unusable(
                        "neither the chat template nor the tokenizer has a token that ends an answer"
                    )
                ids = [*_without_trailing_space(ids, context.tokenizer), eos]
            # An earlier answer that nothing closes would teach the model to run on; it stays context.
            chosen = (loss_on == "answers" and bool(end)) or number == last
            if segment.trained is not None:
                chosen = segment.trained
            trained = (end or len(ids)) if chosen else 0
        if loss_on == "everything" and segment.trained is not False:
            trained = len(ids)
        labelled.append((ids, trained))
    return labelled


def _through_end_of_turn(ids: Sequence[int], context: Encoder) -> int:
    """Number of ids up to and including the special one that closes the turn, 0 where none does.

    A special token with text behind it (a `</think>`) closes nothing.
    """
    special = context.specials.ids
    for position in range(len(ids) - 1, -1, -1):
        if ids[position] in special:
            tail = tuple([int(i) for i in ids[position + 1 :]])
            if tail not in context.closings:
                if len(tail) > 8:
                    return 0 if context.tokenizer.decode(tail).strip() else position + 1
                context.closings[tail] = not context.tokenizer.decode(tail).strip()
            return position + 1 if context.closings[tail] else 0
    return 0


def _without_trailing_space(ids: Sequence[int], tokenizer: Any) -> list[int]:
    ids = [int(i) for i in ids]
    while ids and not tokenizer.decode(ids[-1:]).strip():
        ids.pop()
    return ids


def _text_ids(texts: Sequence[str], context: Encoder) -> list[list[int]]:
    """Running texts, opened as the tokenizer opens texts and closed by the end-of-text token."""
    found = context.literally(texts, opened=True)
    end = context.tokenizer.eos_token_id
    for ids in found:
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
    return found
