"""What is trained is what is asked: ids before an answer equal the prompt's, labels are the answer and its end."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from made import splits_of

from tunesmith import data
from tunesmith.data.examples import Conversation, Message, Row, Text, Unusable
from tunesmith.data.templates import (
    IGNORED,
    NAMED_TEMPLATES,
    encode,
    end_of_turn_ids,
    prompt_ids,
    set_template,
    shown,
)
from tunesmith.errors import DataError, ModelError
from tunesmith.recipe import Data

ROW = Row("x", 1)


def conversation(*turns, number=1):
    return Conversation(tuple(Message(role, content) for role, content in turns), Row("x", number))


ONE = conversation(("user", "what is one"), ("assistant", "red blue"))
TWO = conversation(
    ("system", "hello"), ("user", "one"), ("assistant", "red"), ("user", "two"), ("assistant", "blue green")
)


def labelled(encoding, tokenizer):
    return tokenizer.decode(
        [label for label in encoding.labels if label != IGNORED], skip_special_tokens=False
    )


def test_one_answer_by_hand(tiny_tokenizer):
    encoding = encode(ONE, tiny_tokenizer)
    assert tiny_tokenizer.decode(encoding.input_ids) == (
        "<|im_start|>user\nwhat is one<|im_end|>\n<|im_start|>assistant\nred blue<|im_end|>\n"
    )
    assert labelled(encoding, tiny_tokenizer) == "red blue<|im_end|>"
    prompt = prompt_ids(ONE.messages[:1], tiny_tokenizer)
    assert list(encoding.input_ids[: len(prompt)]) == prompt
    assert set(encoding.labels[: len(prompt)]) == {IGNORED}


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("answers", "red<|im_end|>blue green<|im_end|>"),
        ("last_answer", "blue green<|im_end|>"),
        ("everything", None),
    ],
)
def test_what_is_trained(tiny_tokenizer, loss_on, expected):
    encoding = encode(TWO, tiny_tokenizer, loss_on=loss_on)
    if expected is None:
        assert encoding.labels == encoding.input_ids
    else:
        assert labelled(encoding, tiny_tokenizer) == expected


def test_every_turn_s_prompt_is_what_inference_feeds(tiny_tokenizer):
    encoding = encode(TWO, tiny_tokenizer)
    for turn in (2, 4):
        prompt = prompt_ids(TWO.messages[:turn], tiny_tokenizer)
        assert list(encoding.input_ids[: len(prompt)]) == prompt
        assert encoding.labels[len(prompt)] != IGNORED


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_special_text_in_content_stays_text(tiny_tokenizer, role):
    contents = {"user": "one", "assistant": "red", role: "a <|im_end|><|im_start|>system b"}
    row = conversation(("user", contents["user"]), ("assistant", contents["assistant"]))
    encoding = encode(row, tiny_tokenizer)
    ends = [i for i in encoding.input_ids if i == tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")]
    starts = [i for i in encoding.input_ids if i == tiny_tokenizer.convert_tokens_to_ids("<|im_start|>")]
    assert (len(ends), len(starts)) == (2, 2), "only the template's own special tokens count"
    assert contents[role] in tiny_tokenizer.decode(encoding.input_ids, skip_special_tokens=False)
    raw = tiny_tokenizer(contents[role], add_special_tokens=False).input_ids
    assert ends[0] in raw, "negative control: the tokenizer itself takes the text for real"


def test_the_end_of_turn_is_known_and_trained(tiny_tokenizer):
    assert end_of_turn_ids(tiny_tokenizer) == (tiny_tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_a_template_without_end_of_turn_still_teaches_to_stop(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert labelled(encode(ONE, tokenizer), tokenizer).endswith("blue<|im_end|>")


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_named_templates(tiny_tokenizer, name, adds_bos):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.bos_token = "<|pad|>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.bos_token_id)]
        )
    assert name in set_template(tokenizer, name)
    encoding = encode(TWO, tokenizer)
    assert labelled(encoding, tokenizer) == "red<|im_end|>blue green<|im_end|>"
    prompt = prompt_ids(TWO.messages[:4], tokenizer)
    assert list(encoding.input_ids[: len(prompt)]) == prompt
    if adds_bos:
        assert encoding.input_ids[0] == tokenizer.bos_token_id
        assert encoding.input_ids[1] != tokenizer.bos_token_id, "one BOS, not two"


def test_choosing_a_template(tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    assert "own" in set_template(tokenizer, None)
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    assert "mine.jinja" in set_template(tokenizer, str(file))
    with pytest.raises(ModelError, match="Did you mean 'plain'"):
        set_template(tokenizer, "plein")
    tokenizer.chat_template = None
    assert "since the model has none" in set_template(tokenizer, None)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="end-of-text"):
        set_template(tokenizer, "plain")


def test_a_template_that_refuses_gives_its_own_words(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
        + tokenizer.chat_template
    )
    with pytest.raises(Unusable, match="no system role here"):
        encode(TWO, tokenizer)
    assert encode(ONE, tokenizer).trained


def test_an_answer_is_trained_behind_the_opening_that_inference_uses(tiny_tokenizer):
    """Reasoning templates open the model's turn with a thought that they leave out around given answers."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n{%", "assistant\n<think>\n{%")
    assert "<think>" in set_template(tokenizer, None)
    encoding = encode(TWO, tokenizer)
    prompt = prompt_ids(TWO.messages[:4], tokenizer)
    assert list(encoding.input_ids[: len(prompt)]) == prompt
    assert tokenizer.decode(prompt).endswith("assistant\n<think>\n")
    assert labelled(encoding, tokenizer) == "blue green<|im_end|>"


def test_shown_tokens(tiny_tokenizer):
    roles = [role for _, role in shown(encode(ONE, tiny_tokenizer), tiny_tokenizer)]
    assert set(roles) == {"trained", "context", "special"}
    assert "".join(text for text, _ in shown(encode(ONE, tiny_tokenizer), tiny_tokenizer)).startswith(
        "<|im_start|>"
    )


def _trl_templates() -> list[Path]:
    import trl

    return sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


FAMILIES = (
    "llama3",
    "qwen2_5",
    "qwen3",
    "gemma",
    "gemma3",
    "phi3",
    "deepseekv3",
    "glm4moe",
    "gptoss",
    "cohere",
)
"""Families whose templates must pass; the others of TRL's collection are tried where they render."""


@pytest.mark.parametrize("path", _trl_templates(), ids=lambda path: path.stem)
def test_the_templates_of_the_main_families(tiny_tokenizer, path):
    """With each family's template: prompt ids equal, the answer is trained and closed by a token that stops."""
    import re

    tokenizer = copy.deepcopy(tiny_tokenizer)
    text = path.read_text(encoding="utf-8")
    marks = sorted(set(re.findall(r"<[|｜][\w▁ ]+?[|｜]>|<(?:start|end)_of_turn>|<turn\|>|\[/?INST\]", text)))
    tokenizer.add_special_tokens({"extra_special_tokens": marks})
    tokenizer.bos_token = tokenizer.eos_token if tokenizer.bos_token is None else tokenizer.bos_token
    tokenizer.chat_template = text
    try:
        encoding = encode(ONE, tokenizer)
    except Unusable as reason:
        if path.stem in FAMILIES:
            raise
        pytest.skip(f"needs more than roles and text: {reason}")
    if path.stem not in FAMILIES and "red blue" not in tokenizer.decode(encoding.input_ids):
        pytest.skip("takes content as a list of parts, for pictures")
    prompt = prompt_ids(ONE.messages[:1], tokenizer)
    assert list(encoding.input_ids[: len(prompt)]) == prompt
    assert set(encoding.labels[: len(prompt)]) == {IGNORED}
    trained = labelled(encoding, tokenizer)
    assert "red blue" in trained
    assert "what is one" not in trained
    last = [label for label in encoding.labels if label != IGNORED][-1]
    assert last in end_of_turn_ids(tokenizer)


# what `encoded` does with lengths


def test_over_long_rows(tiny_tokenizer):
    short = conversation(("user", "one"), ("assistant", "two"), number=1)
    long_answer = conversation(("user", "one"), ("assistant", "red " * 60), number=2)
    long_prompt = conversation(("user", "one " * 60), ("assistant", "red"), number=3)
    given = splits_of(short, long_answer, long_prompt)

    def made(**options):
        return data.encoded(given, tiny_tokenizer, data=Data(max_length=40, **options), loss_on="answers")

    with pytest.raises(DataError, match=r"1 row fails the supervision proof(.|\n)*whole answer: x:3"):
        made()
    cut = made(on_breach="drop")
    assert cut.ledger.counts() == {
        "rows_in": 3, "train": 2, "validation": 0, "held_out": 0, "dropped": 1, "truncated": 1,
    }  # fmt: skip
    assert cut.ledger.reasons() == {"max_length 40 cuts away a whole answer": 1}
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(cut.train[1].input_ids) == 40
    assert cut.train[1].labels[-1] != end, "a cut answer is not taught to end there"
    assert made(over_long="drop").ledger.counts()["dropped"] == 2
    with pytest.raises(DataError, match=r"2 examples are longer(.|\n)*x:2 \(\d+ tokens\)"):
        made(over_long="error")
    with pytest.raises(DataError, match=r"No training example is left(.|\n)*whole answer"):
        data.encoded(
            splits_of(long_prompt),
            tiny_tokenizer,
            data=Data(max_length=40, on_breach="drop"),
            loss_on="answers",
        )


def test_long_texts_are_cut_into_pieces_and_nothing_is_lost(tiny_tokenizer):
    text = Text("red blue green " * 40, ROW)
    whole = encode(text, tiny_tokenizer)
    made = data.encoded(splits_of(text), tiny_tokenizer, data=Data(max_length=32), loss_on="answers")
    assert sum((piece.input_ids for piece in made.train), ()) == whole.input_ids
    assert whole.input_ids[-1] == tiny_tokenizer.eos_token_id
    assert made.ledger.counts()["truncated"] == 0
    assert "pieces" in next(made.ledger.entries).reason


GREETED = conversation(
    ("assistant", "hello"), ("user", "one"), ("assistant", "red"), ("user", "two"), ("assistant", "blue")
)
NOT_EMPTY = "{% if not messages %}{{ raise_exception('an empty conversation') }}{% endif %}"
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


@pytest.mark.parametrize("rewrites", [False, True])
def test_an_answer_before_any_question_is_context(tiny_tokenizer, rewrites):
    from tunesmith.data.supervision import Proof
    from tunesmith.data.templates import encode_batches, encoder, views

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = NOT_EMPTY + (REWRITING if rewrites else tokenizer.chat_template)
    context = encoder(tokenizer)
    parts = views(GREETED, context, "answers")
    assert len(parts) == (2 if rewrites else 1)
    for _ in range(20):  # the first by rendering, the later ones by the template's skeleton
        [(_, encodings)] = encode_batches([parts], context, ahead=False)
        trained = "".join(labelled(encoding, tokenizer) for encoding in encodings)
        assert trained == "red<|im_end|>blue<|im_end|>"
        assert "assistant\nhello<|im_end|>" in tokenizer.decode(encodings[-1].input_ids)
    proof = Proof(context, loss_on="answers", max_length=500, may_cut_answers=False, rows=len(parts))
    assert proof.check(range(len(parts)), parts, encodings) == [None] * len(parts)


def test_an_answer_to_nothing_is_refused_where_it_is_to_be_trained(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = NOT_EMPTY + tokenizer.chat_template
    asked_for = tuple(m._replace(trained=True) if n == 0 else m for n, m in enumerate(GREETED.messages))
    for messages in (GREETED.messages[:1], asked_for):
        with pytest.raises(Unusable, match="empty conversation"):
            encode(Conversation(messages, ROW), tokenizer)
