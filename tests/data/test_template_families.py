"""What is trained is what each model family's own chat template says, and what is asked is asked in its way.

Every template that the installed TRL ships is tried with a tokenizer of the family's traits (see families.py).
"""

from __future__ import annotations

import random
import re
from functools import lru_cache
from itertools import groupby
from typing import Any

import pytest
from families import Family, families, tokenizer_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tunesmith.data import templates
from tunesmith.data.examples import Conversation, Message, Row, Unusable
from tunesmith.data.templates import (
    IGNORED,
    Encoding,
    encode,
    encode_all,
    encoder,
    end_of_turn_ids,
    prompt_ids,
    set_template,
    views,
)

ROW = Row("t", 1)
ALL = families()
REFUSED = {
    "idefics3": "takes content as a list of parts only, and leaves out a plain string",
    "smolvlm": "takes content as a list of parts only, and leaves out a plain string",
    "llava_next": "takes content as a list of parts only, and fails on a plain string",
}
"""Families that have to be refused, and why."""
NO_SYSTEM = {"gemma", "mistral_v1", "mistral_v3"}
UNCLOSED = {"glm4moe"}
"""Templates that close the model's turn by nothing but the opening of the next one: an earlier answer would teach
the model to run on, and is context."""
MARKED_AHEAD = {
    "deepseek": "<｜Assistant｜>",
    "gptoss": "<|start|>assistant",
    "muse_glimmer": "<|start|>assistant",
    "nemotron": "<think></think>",
    "qwen2_5": "\n",
    "qwen2_5_vl": "",
    "qwen3_5_nothink": "<think>\n\n</think>\n\n",
    "qwen3_5_think": "<think>\n",
    "qwen3_6": "<think>\n",
    "qwen3_8": "<think>\n",
}
"""What TRL marks as the assistant's though inference feeds it, or puts another opening in its place."""
USABLE = [family for family in ALL if family.name not in REFUSED]
each = pytest.mark.parametrize("family", USABLE, ids=lambda family: family.name)
known = pytest.mark.parametrize("family", [f for f in USABLE if f.known], ids=lambda family: family.name)
# Revisions of one layout differ in nothing that the slowest tests look at: one template of each is enough.
REVISION = re.compile(r"gemma4_v|_v2$|_vl$|lightning|super|ultra|llama3_1|phi3_5")
distinct = pytest.mark.parametrize(
    "family", [f for f in USABLE if not REVISION.search(f.name)], ids=lambda family: family.name
)


def talk(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    """Turns of user and assistant by turns."""
    turns = [Message("user" if n % 2 == 0 else "assistant", text) for n, text in enumerate(contents)]
    return (*([Message("system", system)] if system is not None else []), *turns)


TWO = talk("what is one", "red blue", "and two", "green")
ENDS = "end", "of", "im", "turn", "|"
"""Answers that are part of a token that closes a turn."""


@lru_cache
def tokenizer(name: str) -> Any:
    """The family's tokenizer; built once, since building takes longer than most tests."""
    return tokenizer_of(next(family for family in ALL if family.name == name))


def encoded(family: Family, messages: tuple[Message, ...]) -> Encoding:
    try:
        return encode(Conversation(messages, ROW), tokenizer(family.name))
    except Unusable as reason:
        if family.known:
            raise
        pytest.skip(f"a template newer than this test: {reason}")


def rendered(tok: Any, messages: tuple[Message, ...], *, opening: bool = False, **more: Any) -> Any:
    dicts = [{"role": message.role, "content": message.content} for message in messages]
    return tok.apply_chat_template(dicts, add_generation_prompt=opening, **{"tokenize": False, **more})


def runs(ids: Any, trained: Any) -> list[list[int]]:
    """The stretches of trained ids."""
    pairs = groupby(zip(ids, trained, strict=True), key=lambda pair: bool(pair[1]))
    return [[i for i, _ in stretch] for is_trained, stretch in pairs if is_trained]


def melts(family: Family) -> bool:
    """Whether the opening of the turn and what the model says would share a token, were they one text."""
    return family.traits.before.startswith("\n</think>")


def trained_runs(encoding: Encoding) -> list[list[int]]:
    assert all(label in (IGNORED, i) for i, label in zip(encoding.input_ids, encoding.labels, strict=True))
    return runs(encoding.input_ids, [label != IGNORED for label in encoding.labels])


def specials(ids: Any, tok: Any) -> list[int]:
    return [i for i in ids if i in tok.added_tokens_decoder and tok.added_tokens_decoder[i].special]


def as_decoded(text: str, family: Family, tok: Any) -> str:
    """Text as it decodes again: where special tokens swallow the space behind them, without that space."""
    if not family.traits.swallows:
        return text
    tokens = sorted((str(t) for t in tok.added_tokens_decoder.values() if t.special), key=len, reverse=True)
    return re.sub("(^|" + "|".join(map(re.escape, tokens)) + r")\s+", r"\1", text)


def said(family: Family, messages: tuple[Message, ...], tok: Any) -> str:
    """What the model says in the last turn, through the token that closes it, by plain string comparison."""
    opened, whole = rendered(tok, messages[:-1], opening=True), rendered(tok, messages)
    if family.traits.reopens and not whole.startswith(opened):
        answer = messages[-1].content.lstrip()
        if "</think>" in answer and opened.rstrip().endswith("<think>"):
            # The opening begins the thought that the template would leave out of the answer.
            thought, _, rest = answer.rstrip().rpartition("</think>")
            return f"{thought.strip().removeprefix('<think>').strip()}\n</think>{rest}{family.traits.end}"
        ways = [way + family.traits.end for way in (answer, answer.rstrip())]
        return next(text for text in ways if whole.rstrip().endswith(text))
    assert whole.startswith(opened)
    text = whole[len(opened) :].rstrip()
    return text + family.traits.eos if family.name in UNCLOSED else text


def check(family: Family, messages: tuple[Message, ...], encoding: Encoding) -> None:
    """All that holds of any conversation that ends with an answer."""
    tok = tokenizer(family.name)
    ids, labels = encoding.input_ids, encoding.labels
    stretches = trained_runs(encoding)
    # The last turn is what the model has to say, closed by a token at which it will be stopped.
    assert as_decoded(tok.decode(stretches[-1]), family, tok) == as_decoded(
        said(family, messages, tok), family, tok
    )
    assert stretches[-1][-1] in end_of_turn_ids(tok)
    # Up to it, training is fed what inference is fed.
    first = len(labels) - next(n for n, x in enumerate(reversed(labels)) if x != IGNORED) - len(stretches[-1])
    assert list(ids[:first]) == prompt_ids(messages[:-1], tok)
    # One beginning of text where the template writes it, and none elsewhere.
    traits = family.traits
    if traits.bos and traits.bos != traits.eos:
        opening_tokens = [n for n, i in enumerate(ids) if i == tok.bos_token_id]
        assert opening_tokens == ([0] if traits.writes_bos else [])


@each
def test_labels_are_the_assistant_s_turns(family):
    tok, traits = tokenizer(family.name), family.traits
    found = [tok.decode(stretch) for stretch in trained_runs(encoded(family, TWO))]
    if not family.known:
        assert "green" in found[-1]
        assert not any(word in text for word in ("what", "and two") for text in found)
        return
    both = [f"{traits.before}red blue{traits.earlier_end or traits.end}", f"{traits.before}green{traits.end}"]
    assert found == (both if traits.trains == "all" else both[1:])


@known
def test_the_remark_says_what_is_trained(family):
    remark = set_template(tokenizer(family.name), None)
    traits = family.traits
    assert ("once for each question" in remark) == (traits.trains == "last")
    assert ("behind which the last answer is trained" in remark) == traits.reopens
    assert ("no token of its own" in remark) == (family.name in UNCLOSED)


@each
@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("system", [None, "be brief"])
def test_every_trained_turn_ends_and_is_asked_as_it_is_trained(family, turns, system):
    if system and family.name in NO_SYSTEM:
        with pytest.raises(Unusable, match=r"System role not supported|only user and assistant"):
            encoded(family, talk("one", "two", system=system))
        return
    tok = tokenizer(family.name)
    messages = talk(*["what is one", "red blue", "hello", "green", "yes", "no"][: 2 * turns], system=system)
    encoding = encoded(family, messages)
    if not family.known:
        asked = prompt_ids(messages[:-1], tok)
        assert list(encoding.input_ids[: len(asked)]) == asked
        assert trained_runs(encoding)[-1][-1] in end_of_turn_ids(tok)
        return
    check(family, messages, encoding)
    for stretch in trained_runs(encoding)[:-1]:
        assert stretch[-1] in end_of_turn_ids(tok)
    # transformers' own ids, made in one go from the whole text, are the same.
    if turns == 1 or not melts(family):
        asked = rendered(tok, messages[:-1], opening=True, tokenize=True, return_dict=False)
        assert prompt_ids(messages[:-1], tok) == asked
    if not family.traits.reopens and not melts(family):
        whole = rendered(tok, messages, tokenize=True, return_dict=False)
        assert list(encoding.input_ids) == [*whole, *[tok.eos_token_id] * (family.name in UNCLOSED)]


@known
@pytest.mark.parametrize("reasoning", [None, "thoughts"])
def test_every_answer_is_trained_once(family, reasoning):
    """In one pass, or once for each question where the template writes earlier answers otherwise."""
    messages = tuple(
        message._replace(reasoning=reasoning if message.role == "assistant" else None)
        for message in talk("what is one", "red blue", "and two", "green", "hello", "yes")
    )
    context = encoder(tokenizer(family.name))
    found = views(Conversation(messages, ROW), context, "answers")
    if reasoning and family.name == "qwen3_5_nothink":
        with pytest.raises(Unusable, match="the chat template asks for one without"):
            encoded(family, messages)
        return
    stretches = [runs_of for view in found for runs_of in trained_runs(encoded(family, view.messages))]
    texts = [context.tokenizer.decode(stretch) for stretch in stretches]
    assert len(texts) == 3
    assert [word in text for word, text in zip(("red blue", "green", "yes"), texts, strict=True)] == [
        True
    ] * 3
    assert all(stretch[-1] in end_of_turn_ids(context.tokenizer) for stretch in stretches)
    if reasoning is None:
        assert len(found) == (1 if family.traits.trains == "all" else 3)
        for view in found:
            check(family, view.messages, encoded(family, view.messages))
    elif context.reasoning_key:
        # What a thought is worth to the template in the last turn, it is in every turn.
        assert len({text.count("thoughts") for text in texts}) == 1


@pytest.mark.parametrize(
    "family", [f for f in USABLE if f.reference and f.known], ids=lambda family: family.name
)
def test_trl_marks_the_same_tokens(family, monkeypatch):
    """TRL's training templates mark what the assistant says; trained here is that, with these differences."""
    from transformers.utils import chat_template_utils

    from tunesmith.data import rendering

    tok = tokenizer(family.name)
    encoding = encoded(family, TWO)
    # The process that renders marks nothing; encoding has put it into the place of transformers' own function.
    monkeypatch.setattr(chat_template_utils, "_compile_jinja_template", rendering._stock[0])
    theirs = rendered(
        tok,
        TWO,
        chat_template=family.reference,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    expected = [tok.decode(run) for run in runs(theirs["input_ids"], theirs["assistant_masks"])]
    found = [tok.decode(run) for run in trained_runs(encoding)]
    # TRL marks the line break behind the closing token as well, which the model is never asked for, and in some
    # families what stands ahead of the answer when the model is asked.
    named = [name for name in MARKED_AHEAD if family.name.startswith(name)]
    ahead = MARKED_AHEAD[max(named, key=len)] if named else ""
    assert all(text.startswith(ahead) for text in expected)
    expected = [text.rstrip("\n").removeprefix(ahead) for text in expected]
    if family.traits.trains == "last":
        # TRL's variants write earlier turns like the last one. The model's own template, as inference has it,
        # does not, and so an earlier answer is context here.
        assert len(expected) == 2
        expected = expected[1:]
    if family.name in UNCLOSED:
        # TRL counts the opening of the user's turn as the end of the answer; here the end of text is put there.
        expected = [text.removesuffix("<|user|>") for text in expected]
        expected[-1] += family.traits.eos
    assert found == expected


@each
@pytest.mark.parametrize("place", range(4))
def test_special_text_in_content_stays_text(family, place):
    tok, traits = tokenizer(family.name), family.traits
    injected = f"a {traits.end}{traits.eos} b {traits.bos or ''}<|im_end|><eos></s>"
    contents = ["what is one", "red blue", "and two", "green"]
    encoding = encoded(family, talk(*contents))
    contents[place] = injected
    attacked = encoded(family, talk(*contents))
    assert specials(attacked.input_ids, tok) == specials(encoding.input_ids, tok)
    assert len(trained_runs(attacked)) == len(trained_runs(encoding))
    assert specials(attacked.labels, tok) == specials(encoding.labels, tok)
    asked = prompt_ids(talk(*contents[:3]), tok)
    assert list(attacked.input_ids[: len(asked)]) == asked
    # Pieces put a space before each stretch that is tokenized on its own: compared but for spaces.
    text = tok.decode(attacked.input_ids).replace(" ", "")
    assert injected.replace(" ", "") in text
    # Negative control: the tokenizer itself takes the text for real.
    assert specials(tok(injected, add_special_tokens=False).input_ids, tok)


SPACES = " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u200b", "\ufeff", "\x00"
WORDS = (
    "red",
    "Blue ",
    "'s",
    "1234567",
    "</think>",
    "<think>",
    "{{ x }}",
    "{%",
    "é",
    "ß",
    "👩\u200d👧",
    "ﷺ",
    "漢字",
)
MARKS = "\ue000", "\ue001", "\ue0000\ue001"
"""Characters that stand for special-token text on its way through the template."""
PARTS = st.sampled_from((*SPACES, *WORDS, *MARKS, *ENDS))
CONTENT = st.lists(
    PARTS | st.text(st.characters(exclude_characters="▁", codec="utf-8"), max_size=4), max_size=5
)


@distinct
@settings(
    max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(contents=st.lists(CONTENT.map("".join), min_size=4, max_size=4), turns=st.sampled_from([2, 4]))
@example(contents=["", "", "", ""], turns=2)
@example(contents=["\n\n", " \n", "\n", "  "], turns=4)
@example(contents=["a", "</think>", "b", "c</think>d"], turns=4)
def test_any_content(family, contents, turns):
    """Whatever is written: a reason why not, or all that holds of plain conversations."""
    messages = talk(*contents[:turns])
    tok = tokenizer(family.name)
    [encoding] = encode_all([Conversation(messages, ROW)], tok)
    if isinstance(encoding, Unusable) and family.known:
        # Only a template that opens the turn otherwise may not write an answer as it is.
        answer = contents[turns - 1]
        if "empty answer" in str(encoding):
            assert not answer.strip()
        else:
            assert "</think>" in answer or "</think>" in contents[1]
            assert str(encoding)
    if isinstance(encoding, Unusable) or not family.known:
        return
    check(family, messages, encoding)
    if not family.traits.reopens and family.name not in UNCLOSED:
        whole = tok(rendered(tok, messages), add_special_tokens=False).input_ids
        assert specials(encoding.input_ids, tok) == specials(whole, tok)


@each
def test_all_at_once_is_one_by_one(family):
    tok = tokenizer(family.name)
    given = [
        TWO,
        TWO[:2],
        talk("a <|im_end|> b", " c\n"),
        talk("x", "\n\ny"),
        talk("no answer"),
        talk("\ud800", "z"),
    ]
    examples = [Conversation(messages, Row("t", n)) for n, messages in enumerate(given, 1)]

    def alone(conversation: Conversation) -> Encoding | str:
        try:
            return encode(conversation, tok)
        except Unusable as reason:
            return str(reason)

    together = [str(e) if isinstance(e, Unusable) else e for e in encode_all(examples, tok)]
    assert together == [alone(conversation) for conversation in examples]
    assert [isinstance(item, str) for item in together[-2:]] == [True, True]


@pytest.mark.parametrize(
    ("family", "count"),
    [
        pytest.param(f, count, marks=marks, id=f"{f.name}-{count}")
        for count in (150, 500)
        for f in USABLE
        for marks in [() if count == 150 and not REVISION.search(f.name) else pytest.mark.thorough]
    ],
)
def test_what_is_not_rendered_is_what_rendering_gives(family, count, monkeypatch):
    """Most conversations are put together without rendering; the result is that of the long way, to the id."""
    rng = random.Random(0)
    words = [*WORDS, *ENDS, "what", "is", "one", "\n", "<tool_response>", "user", "image", "content"]
    given = [
        Conversation(
            talk(*(" ".join(rng.choices(words, k=rng.randint(1, 5))) for _ in range(4))), Row("t", n)
        )
        for n in range(count)
    ]
    tok = tokenizer(family.name)
    rendered_rows = []
    whole = templates._render_all
    monkeypatch.setattr(templates, "SURE_AFTER", 16)
    monkeypatch.setattr(
        templates, "_render_all", lambda turns, context: rendered_rows.extend(turns) or whole(turns, context)
    )
    fast = [str(e) if isinstance(e, Unusable) else e for n in range(5) for e in encode_all(given[n::5], tok)]
    skipped = 1 - len(rendered_rows) / len(given)
    monkeypatch.setattr(templates, "_skeleton", lambda turns, context: None)
    slow = [str(e) if isinstance(e, Unusable) else e for n in range(5) for e in encode_all(given[n::5], tok)]
    assert fast == slow
    if family.name in ("qwen2_5", "llama3"):
        assert skipped > 0.2, "else the test shows nothing"


def test_a_template_that_looks_at_more_than_texts_is_always_rendered():
    tok = tokenizer_of(next(family for family in ALL if family.name == "qwen2_5"))
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ CONTENT }}<|im_end|>\n{% endfor %}"
    opening = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    contents = {
        "m.content": True,
        "m.content | trim": True,
        "m.content | upper": False,
        "m.content | tojson": False,
        "m.content if m.content | length < 99 else m.content[:99]": False,
        "'list' if m.content[0] == '[' else m.content": False,
        "m.content | replace('é', 'e')": False,
    }
    for content, verbatim in contents.items():
        tok.chat_template = plain.replace("CONTENT", content) + opening
        context = templates.encoder(tok)
        skeleton = templates._worked_out(("user", "assistant"), context)
        assert (skeleton is not None and skeleton.is_verbatim) == verbatim, content
    tok.chat_template = plain.replace("CONTENT", "m.content if 'secret' not in m.content else 'x'") + opening
    assert templates.encoder(tok).triggers == ("secret",)


# Each of these was wrong once.


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "llava_next"])
def test_templates_that_take_no_plain_text_are_refused(name):
    if name not in {family.name for family in ALL}:
        pytest.skip("the installed TRL does not ship it")
    with pytest.raises(Unusable):
        encode(Conversation(TWO, ROW), tokenizer(name))


REOPENING = [f.name for f in USABLE if f.traits.reopens]


@pytest.mark.parametrize("name", REOPENING)
def test_an_answer_that_is_part_of_the_closing_token(name):
    family = next(family for family in ALL if family.name == name)
    messages = talk("which part of a line", "end")
    check(family, messages, encoded(family, messages))


@pytest.mark.parametrize("name", REOPENING)
def test_an_empty_answer_behind_an_opening_of_its_own(name):
    found = encode_all([Conversation(talk("hello", " "), ROW), Conversation(TWO, ROW)], tokenizer(name))
    assert isinstance(found[1], Encoding)


@pytest.mark.parametrize("name", [*(name for name in REOPENING if "nemotron" in name), "qwen3_5_nothink"])
def test_a_thought_is_opened_once(name):
    tok = tokenizer(name)
    thought = "<think>\nred\n</think>\n\nblue" if "qwen" in name else "<think>red</think>blue"
    conversation = Conversation(talk("hello", thought), ROW)
    if "qwen" in name:
        with pytest.raises(Unusable, match="asks for one without"):
            encode(conversation, tok)
        return
    encoding = encode(conversation, tok)
    assert tok.decode(encoding.input_ids).count("<think>") == 1


@pytest.mark.parametrize("name", ["mistral_v1", "mistral_v3"])
def test_special_text_in_an_answer_gets_no_space(name):
    tok = tokenizer(name)
    [trained] = trained_runs(encode(Conversation(talk("hello", "red</s>blue"), ROW), tok))
    assert tok.decode(trained) == " red</s>blue</s>"


@pytest.mark.parametrize("name", ["phi3", "phi3_5"])
def test_phi_3_stops_at_the_end_of_its_turn(name):
    tok = tokenizer(name)
    assert tok.convert_tokens_to_ids("<|end|>") in end_of_turn_ids(tok)


@pytest.mark.parametrize(
    "flag",
    [
        "{% if 'secret' in m.content %}!{% endif %}",
        "{% set mark = 'secret' %}{% if mark in m.content %}!{% endif %}",
        "{% for word in ['secret', 'hidden'] %}{% if word in m.content %}!{% endif %}{% endfor %}",
        "{% if m.role != 'secret' and 'secret' in m.content %}!{% endif %}",
        "{% set words = {'secret': 1} %}{% if m.content.split()[-1] in words %}!{% endif %}",
    ],
)
def test_contents_that_a_template_treats_otherwise_are_rendered(flag):
    """However the template names the text it looks for; and where it only writes it, nothing is rendered for it."""
    tok = tokenizer_of(next(family for family in ALL if family.name == "qwen2_5"))
    tok.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        + flag
        + "{{ 'said: ' + m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    context = encoder(tok)
    assert "secret" in context.triggers
    assert "said: " not in context.triggers
    rows = [Conversation(talk(f"q {n}" + " secret" * (n >= 500), f"a {n}"), ROW) for n in range(600)]
    batches = [rows[:500], rows[500:]]
    made = [e for _, found in templates.encode_batches(batches, context) for e in found]
    assert context.agreed  # the shortcut was taken
    for row, encoding in zip(rows[490:510], made[490:510], strict=True):
        assert encode(row, tok).input_ids == tuple(encoding.input_ids.tolist())
