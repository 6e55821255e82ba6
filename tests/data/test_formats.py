"""Each format reads the sample in its own docstring; detection says what it chose; bad rows are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.api import validate
from tunesmith.data import prepare
from tunesmith.data.examples import Conversation, Preference, Rating, Row, Text, Unusable
from tunesmith.data.formats import FORMATS, check_group, convert, detect
from tunesmith.data.sources import in_memory, read
from tunesmith.errors import DataError
from tunesmith.recipe import Data

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def source(*rows):
    return in_memory("rows", rows)


def example(row, **options):
    rows = source(row)
    [(_, made)] = convert(rows, detect(rows, **options))
    if isinstance(made, Unusable):
        raise made
    return made


@pytest.mark.parametrize("name", FORMATS)
def test_the_sample_in_the_docstring_is_read_by_its_own_format(name):
    format = FORMATS[name]
    rows = source(format.sample)
    detection = detect(rows, format="auto" if format.is_detected else name)
    assert [f.name for f in detection.formats] == [name]
    assert isinstance(format.convert(format.sample, Row("docs", 1)), format.shape)
    assert format.about


def turns(conversation):
    return [(message.role, message.content) for message in conversation.messages]


def test_conversations_from_every_layout():
    plain = [("user", "hi"), ("assistant", "hello")]
    openai = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    sharegpt = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    for row in (
        {"messages": openai},
        {"conversations": sharegpt},
        {"conversations": openai},
        {"prompt": "hi", "response": "hello"},
        {"prompt": "hi", "completion": "hello"},
        {"prompt": openai[:1], "completion": openai[1:]},
        {"question": "hi", "reply": "hello"},
        {"question": "hi", "answer": "hello"},
        {"instruction": "hi", "input": "", "output": "hello"},
        {"instruction": "hi", "output": "hello"},
        {"input": "hi", "output": "hello"},
        {"problem": "hi", "solution": "hello"},
    ):
        assert turns(example(row)) == plain, row
    assert turns(example({"instruction": "Add", "input": "1 and 2", "output": "3"}))[0][1] == "Add\n\n1 and 2"
    assert turns(example({"system": "Be kind.", "prompt": "hi", "response": "hello"}))[0] == (
        "system",
        "Be kind.",
    )


def test_named_columns_win():
    row = {"ask": "hi", "say": "hello", "question": "other", "answer": "other"}
    assert turns(example(row, input_text_key="ask", output_text_key="say")) == [
        ("user", "hi"),
        ("assistant", "hello"),
    ]
    with pytest.raises(
        DataError, match=r"no column as.k(.|\n)*ask, say, question, answer(.|\n)*Did you mean 'ask'"
    ):
        detect(source(row), input_text_key="as.k", output_text_key="say")
    with pytest.raises(DataError, match="go together"):
        detect(source(row), input_text_key="ask")


def test_sql_rows_keep_their_database_together():
    row = {"context": "CREATE TABLE a (b TEXT)", "question": "All b?", "answer": "SELECT b FROM a"}
    made = example(row)
    assert made.group == row["context"]
    assert made.extra["schema"] == row["context"]
    assert turns(made)[0][1].startswith("CREATE TABLE a (b TEXT)\n\nAll b?")
    assert example({**row, "database": "shop"}).group == "shop"
    assert example({**row, "context": "An article about b."}).group is None, (
        "context without a schema is no SQL row"
    )


HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: who are you?\n\nAssistant:"
ASKED = [("user", "hi"), ("assistant", "hello"), ("user", "who are you?")]
OPENAI = [{"role": role, "content": content} for role, content in ASKED]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[r], "value": c} for r, c in ASKED]


def said(who, answer):
    return {"role": "assistant", "content": answer} if who == "role" else {"from": "gpt", "value": answer}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": OPENAI, "chosen": "a friend", "rejected": "go away"},
        {"prompt": OPENAI, "chosen": [said("role", "a friend")], "rejected": [said("role", "go away")]},
        {"prompt": OPENAI, "chosen": [*OPENAI, said("role", "a friend")],
         "rejected": [*OPENAI, said("role", "go away")]},
        {"chosen": [*OPENAI, said("role", "a friend")], "rejected": [*OPENAI, said("role", "go away")]},
        {"messages": OPENAI, "chosen": said("role", "a friend"), "rejected": said("role", "go away")},
        {"conversations": SHAREGPT, "chosen": said("from", "a friend"), "rejected": said("from", "go away")},
        {"conversations": SHAREGPT, "chosen": [said("from", "a friend")], "rejected": [said("from", "go away")]},
        {"chosen": HH + " a friend", "rejected": HH + " go away"},
        {"prompt": HH, "chosen": " a friend", "rejected": " go away"},
        {"prompt": HH, "chosen": HH + " a friend", "rejected": HH + " go away"},
    ],
    ids=[
        "prompt as messages", "answers as messages", "answers repeat the prompt", "implicit prompt", "messages column",
        "sharegpt objects", "sharegpt lists", "transcripts", "transcript as prompt", "transcripts and prompt",
    ],
)  # fmt: skip
def test_pairs_from_every_layout(row):
    made = example(row)
    assert isinstance(made, Preference)
    assert [(m.role, m.content) for m in made.prompt] == ASKED
    assert [(m.role, m.content) for m in made.chosen] == [("assistant", "a friend")]
    assert [(m.role, m.content) for m in made.rejected] == [("assistant", "go away")]


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"prompt": "hi", "chosen": "hello", "rejected": "bye"}, [("user", "hi")]),
        ({"question": "hi", "chosen": "hello", "rejected": "bye"}, [("user", "hi")]),
        ({"system": "Be kind.", "question": "hi", "chosen": "hello", "rejected": "bye"},
         [("system", "Be kind."), ("user", "hi")]),
        ({"instruction": "Greet", "input": "Ada", "chosen": "hello", "rejected": "bye"},
         [("user", "Greet\n\nAda")]),
        ({"instruction": "Greet", "input": "", "chosen": "hello", "rejected": "bye"}, [("user", "Greet")]),
    ],
)  # fmt: skip
def test_pairs_of_texts(row, asked):
    made = example(row)
    assert [(m.role, m.content) for m in made.prompt] == asked
    assert (made.chosen[0].content, made.rejected[0].content) == ("hello", "bye")


def test_transcripts_that_part_early_keep_their_later_turns_as_answers():
    made = example(
        {
            "chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: thanks\n\nAssistant: sure",
            "rejected": "\n\nHuman: hi\n\nAssistant: bye",
        }
    )
    assert [m.role for m in made.chosen] == ["assistant", "user", "assistant"]
    assert [m.content for m in made.rejected] == ["bye"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: ho\n\nAssistant: a"},
            "no prompt",
        ),
        ({"chosen": HH + " a\n\nHuman: b", "rejected": HH + " c"}, "the chosen answer is the user's"),
        ({"chosen": HH, "rejected": HH + " c"}, "empty chosen answer"),
        ({"chosen": "hi Human: a", "rejected": "hi Human: b"}, "no prompt"),
        (
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: a\n\nHuman: b\n\nAssistant: c",
                "rejected": "\n\nHuman: hi\n\nAssistant: a\n\nHuman: d\n\nAssistant: c",
            },
            "begins with a turn of the user",
        ),
    ],
)
def test_transcripts_that_cannot_be_compared_say_why(row, reason):
    with pytest.raises(Unusable, match=reason):
        example(row)


@pytest.mark.parametrize("label", [True, 1, "true", "1"])
def test_ratings_from_every_layout(label):
    for row in (
        {"prompt": "hi", "completion": "hello", "label": label},
        {"prompt": "hi", "response": "hello", "label": label},
        {"question": "hi", "response": "hello", "label": label},
        {"prompt": OPENAI[:1], "completion": [said("role", "hello")], "label": label},
        {"messages": [*OPENAI[:1], said("role", "hello")], "label": label},
    ):
        made = example(row)
        assert isinstance(made, Rating)
        assert made.label is True
        assert [m.content for m in (*made.prompt, *made.completion)] == ["hi", "hello"]


def test_preferences_with_and_without_a_prompt():
    openai = lambda *pairs: [{"role": r, "content": c} for r, c in pairs]  # noqa: E731
    made = example(
        {
            "chosen": openai(("user", "hi"), ("assistant", "hello")),
            "rejected": openai(("user", "hi"), ("assistant", "go away")),
        }
    )
    assert isinstance(made, Preference)
    assert [m.content for m in made.prompt] == ["hi"]
    assert made.chosen[0].content == "hello"
    with pytest.raises(Unusable, match="the same"):
        FORMATS["preference"].convert({"prompt": "a", "chosen": "b", "rejected": "b"}, Row("x", 1))


def test_ratings():
    assert example({"prompt": "a", "completion": "b", "label": 1}).label is True
    assert isinstance(example({"prompt": "a", "completion": "b", "label": False}), Rating)
    with pytest.raises(Unusable, match="label 'great'"):
        example({"prompt": "a", "completion": "b", "label": "great"})


def test_a_file_may_mix_formats_of_one_shape():
    rows = source({"messages": FORMATS["messages"].sample["messages"]}, {"prompt": "a", "response": "b"})
    detection = detect(rows)
    assert [type(made) for _, made in convert(rows, detection)] == [Conversation, Conversation]
    assert "1 row 'messages', 1 row 'prompt_response'" in detection.reason
    with pytest.raises(DataError, match="several kinds"):
        detect(source({"prompt": "a", "response": "b"}, {"text": "c"}))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "response": ""}, "empty answer"),
        ({"prompt": "a", "response": None}, "no value for response"),
        ({"prompt": "", "response": "b"}, "empty question"),
        ({"prompt": "a", "response": ["b"]}, "answer is a list"),
        ({"prompt": "a"}, "no value for response"),
    ],
)
def test_unusable_rows_are_dropped_with_a_reason(row, reason):
    good = {"prompt": "a", "response": "b"}
    (_, first), (record, second) = convert(source(good, row), detect(source(good)))
    assert isinstance(first, Conversation)
    assert str(record.row) == "rows:2"
    assert reason in str(second)


@pytest.mark.parametrize(
    ("turn_list", "reason"),
    [
        ([{"role": "user", "content": "a"}], "no assistant turn"),
        (
            [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}],
            "last turn is the user's",
        ),
        ([{"role": "narrator", "content": "a"}], "no known role"),
        ([{"role": "user", "content": 3}, {"role": "assistant", "content": "b"}], "a number for content"),
        (["a"], "not an object"),
        ([], "no assistant turn"),
    ],
)
def test_unusable_conversations(turn_list, reason):
    with pytest.raises(Unusable, match=reason):
        FORMATS["messages"].convert({"messages": turn_list}, Row("x", 1))


def test_numbers_become_text():
    assert turns(example({"question": "2 + 2", "answer": 4}))[1][1] == "4"


def test_an_empty_answer_column_is_one_clear_error(tmp_path):
    rows = [{"prompt": f"a{i}", "response": ""} for i in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"None of the 4 rows(.|\n)*4 × empty answer"):
        prepare(Data(dataset=str(tmp_path / "a.json")))


def test_unknown_columns_are_named():
    with pytest.raises(DataError, match=r"columns foo, bar(.|\n)*--input-text-key"):
        detect(source({"foo": "a", "bar": "b"}))
    with pytest.raises(DataError, match="no column output or response or answer for format 'instruction'"):
        detect(source({"instruction": "a"}), format="instruction")
    with pytest.raises(DataError, match="Did you mean 'instruction'"):
        detect(source({"instruction": "a"}), format="instructions")
    rows = source({"prompt": "a", "response": "b", "author": "c"})
    with pytest.raises(DataError, match="Did you mean 'author'"):
        check_group(rows, "autor")
    [(_, made)] = convert(rows, detect(rows), group_by="author")
    assert made.group == "c"


def test_a_system_prompt_is_put_before_conversations_that_have_none():
    rows = source({"prompt": "a", "response": "b"}, {"system": "Own.", "prompt": "a", "response": "b"})
    pairs = list(convert(rows, detect(rows), system_prompt="Given."))
    assert [pair[1].messages[0].content for pair in pairs] == ["Given.", "Own."]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize(
    ("file", "format", "shape", "rows"),
    [
        ("alpaca_en_demo.json", "instruction", Conversation, 999),
        ("dpo_en_demo.json", "preference", Preference, 300),
        ("kto_en_demo.json", "rating", Rating, 300),
    ],
)
def test_real_sets_are_read_whole(file, format, shape, rows):
    loaded = read(str(SHARED / file))
    detection = detect(loaded)
    made = [example for _, example in convert(loaded, detection)]
    assert [f.name for f in detection.formats] == [format]
    assert len(made) == rows
    assert sum(isinstance(example, Unusable) for example in made) <= 1
    assert {type(example) for example in made} - {Unusable} == {shape}


def test_text_rows():
    assert isinstance(example({"text": "once"}), Text)
    assert isinstance(example({"content": "once"}), Text)


@pytest.mark.parametrize(
    "row", [{"messages": [], "label": True}, {"prompt": "a", "completion": "", "label": True}]
)
def test_a_rating_without_an_answer_is_unusable(row):
    with pytest.raises(Unusable):
        FORMATS["rating"].convert(row, Row("x", 1))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        {
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
        },
        {
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
        },
        {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "label": True,
        },
    ],
)
def test_the_system_column_is_used_by_every_format_that_says_so(row):
    found = example({**row, "system": "Be brief."})
    said = found.messages if isinstance(found, Conversation) else found.prompt
    assert [(turn.role, turn.content) for turn in said[:2]] == [("system", "Be brief."), ("user", "q")]
    if isinstance(found, Preference):
        assert [turn.content for turn in (*found.chosen, *found.rejected)] == ["a", "b"]


def test_the_row_of_tool_calls_in_the_documentation_is_read(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "preparing.md").read_text()
    values = json.loads(page.partition("## Tool calls and reasoning")[2].split("```")[1].removeprefix("json"))
    example = FORMATS["messages"].convert(values, Row("x", 1))
    call, result, answer = example.messages[1:]
    assert [turn.role for turn in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert call.tool_calls[0]["function"] == {"name": "lamp_state", "arguments": {"number": 7}}
    assert call.reasoning == "I have to look."
    assert (result.name, result.tool_call_id, answer.trained) == ("lamp_state", "c1", True)
    assert example.tools[0]["function"]["name"] == "lamp_state"
    path = tmp_path / "row.jsonl"
    path.write_text(json.dumps(values))
    report = validate(str(path), task="chat")
    assert not report.counts


def test_the_rows_of_seed_003_are_read_as_its_page_means_them():
    """Each line of its format examples, word for word."""
    read_as = {
        '{"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi! How can I help '
        'you?"}]}': ("Hello!", "Hi! How can I help you?"),
        '{"prompt": "What is machine learning?", "response": "Machine learning is..."}': (
            "What is machine learning?", "Machine learning is...",
        ),
        '{"instruction": "Translate to French", "input": "Hello world", "output": "Bonjour le monde"}': (
            "Translate to French\n\nHello world", "Bonjour le monde",
        ),
        '{"instruction": "Summarize this text", "output": "This is a summary..."}': (
            "Summarize this text", "This is a summary...",
        ),
        '{"prompt": "Write a function to sort a list", "completion": "def sort_list(lst):\\n    return sorted(lst)"}': (
            "Write a function to sort a list", "def sort_list(lst):\n    return sorted(lst)",
        ),
    }  # fmt: skip
    for line, (question, answer) in read_as.items():
        assert turns(example(json.loads(line))) == [("user", question), ("assistant", answer)]
    code = "class DataProcessor:\n    def __init__(self):\n        pass"
    assert example({"code": code}) == Text(code, Row("rows", 1))


@pytest.mark.parametrize(
    ("row", "options", "question", "answer"),
    [
        ({"instruction": "hi", "input": "", "output": "hello", "text": "### ..."}, {}, "hi", "hello"),
        ({"instruction": "hi", "context": "", "response": "hello", "category": "qa"}, {}, "hi", "hello"),
        ({"system_prompt": "Be kind.", "question": "hi", "response": "hello"}, {}, "hi", "hello"),
        ({"db_id": "a", "query": "SELECT 1", "question": "hi"}, {"keys": ("question", "query")}, "hi", "SELECT 1"),
        ({"system": "Be kind.", "question": "hi", "chosen": "hello", "rejected": "no"}, {}, "hi", "hello"),
        (
            {"prompt": "hi", "chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
             "rejected": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]},
            {}, "hi", "hello",
        ),
    ],
    ids=["alpaca", "dolly", "orca", "spider", "orca-dpo", "ultrafeedback"],
)  # fmt: skip
def test_the_data_sets_that_seed_002_names_are_read(row, options, question, answer):
    """Rows in the layout of each, by hand."""
    data = {}
    if "keys" in options:
        data = dict(zip(("input_text_key", "output_text_key"), options["keys"]))
    made = example(row, **data)
    asked, told = (
        (made.prompt, made.chosen)
        if isinstance(made, Preference)
        else (made.messages[:-1], made.messages[-1:])
    )
    assert asked[-1].content == question
    assert [message.content for message in told] == [answer]


def test_one_answer_given_twice_is_that_and_no_empty_one():
    """Two equal conversations: the common beginning must not take the answer as well."""
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    for row in ({"chosen": said, "rejected": said}, {"prompt": said[:1], "chosen": said, "rejected": said}):
        with pytest.raises(Unusable, match="chosen and rejected answer are the same"):
            example(row)
