"""What real files and tokenizers do wrong or otherwise: each case is an error with its place, a reason, or a note."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from made import splits_of

from tunesmith import data
from tunesmith.data.examples import Conversation, Message, Rating, Row, Text, Unusable
from tunesmith.data.formats import FORMATS, convert, detect
from tunesmith.data.sources import in_memory, read
from tunesmith.data.templates import IGNORED, encode, end_of_turn_ids, prompt_ids, set_template
from tunesmith.errors import DataError, ModelError
from tunesmith.recipe import Data

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ROW = Row("x", 1)


def jsonl(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def source(*rows):
    return in_memory("rows", rows)


def talk(*contents, number=1):
    roles = ("user", "assistant") * len(contents)
    turns = (Message(role, content) for role, content in zip(roles, contents, strict=False))
    return Conversation(tuple(turns), Row("x", number))


def labelled(encoding, tokenizer):
    return tokenizer.decode([label for label in encoding.labels if label != IGNORED])


# files


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", 'a,b\n1,2\n3,"x\n5,6\n', ["row 2", "(line 3 of the file)", "never closed"]),
        (
            "a.csv",
            "a,b\n1\n2\n3,4\n",
            ["2 broken rows", "a.csv, row 1: 1 cells", "(line 2 of the file)", "row 2", "line 3"],
        ),
        ("a.csv", "a,b,a\n1,2,3\n", ["a.csv, line 1", "names a column twice: a"]),
        ("a.json", '[1, {"a": 2}, 3]', ["2 broken records", "record 1 is", "record 3 is"]),
        ("a.jsonl", "[" * 100_000, ["line 1", "nested too deeply"]),
        ("a.csv", "\n\n\udcff,b\n1,2\n", ["a.csv, line 3", "the header is not UTF-8"]),
        ("a.json", '["]",\n{"a":\n' + "[" * 100_000, ["a.json, line 3", "nested too deeply"]),
        ("a.json", '[{"a":\n' + "9" * 5000 + "}]", ["line 2", "digits"]),
    ],
)
def test_every_broken_row_is_named(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError) as error:
        read(str(tmp_path / name))
    assert all(fragment in str(error.value) for fragment in expected), error.value


def test_a_damaged_parquet_page_is_a_clear_error(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": [f"{i} " * 200 for i in range(500)]}), path)
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes(300) + content[500:])
    with pytest.raises(DataError, match="not a Parquet file"):
        read(str(path))


def test_files_of_one_name_in_two_folders_keep_their_rows_apart(tmp_path):
    for name in ("a", "b"):
        jsonl(tmp_path / name / "rows.jsonl", {"prompt": name, "response": "x"})
    splits = data.prepare(Data(dataset=str(tmp_path), data_files="*/rows.jsonl"))
    assert [str(entry.row) for entry in splits.ledger.entries] == ["a/rows.jsonl:1", "b/rows.jsonl:1"]


def test_options_that_would_be_ignored_are_refused(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "a", "response": "b"})
    for options in ({"data_files": "*.jsonl"}, {"config": "en"}):
        with pytest.raises(DataError, match=next(iter(options))):
            read(str(path), **options)
    with pytest.raises(DataError, match="Make it relative"):
        read(str(tmp_path), data_files="/etc/*.json")


def test_hub_splits_of_no_known_role_are_said(monkeypatch):
    import datasets

    part = datasets.Dataset.from_list([{"prompt": "a", "response": "b"}])
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: datasets.DatasetDict(train_sft=part, x=part)
    )
    assert any("train_sft, x" in note for note in read("owner/set").notes)


# columns and rows


def test_an_empty_column_is_called_empty_not_absent(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("ask,say\nq,\nr,\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"column say of a.csv is empty in every row"):
        data.prepare(Data(dataset=str(path), input_text_key="ask", output_text_key="say"))
    with pytest.raises(DataError, match=r"without a value in any of the 2 rows: say"):
        data.prepare(Data(dataset=str(path)))


def test_unused_columns_and_written_out_numbers_are_said(tmp_path):
    rows = [{"question": f"{i} + 1", "answer": i + 1, "context": "sums"} for i in range(5)]
    notes = data.prepare(Data(dataset=str(jsonl(tmp_path / "a.jsonl", *rows)))).notes
    assert "columns that no example is made of, which metrics and rewards can read: context" in notes
    assert any(note.startswith("5 rows have a number") for note in notes)


@pytest.mark.parametrize("name", FORMATS)
def test_every_column_of_a_sample_is_used_by_its_format(name):
    format = FORMATS[name]
    assert format.used(list(format.sample)) == list(format.sample)


@pytest.mark.parametrize(("label", "expected"), [("true", True), ("False", False), ("1", True), (0, False)])
def test_labels_as_text(label, expected):
    rated = FORMATS["rating"].convert({"prompt": "a", "completion": "b", "label": label}, ROW)
    assert isinstance(rated, Rating)
    assert rated.label is expected


CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("rating", {"completion": "b", "label": True}, "no prompt"),
        ("rating", {"messages": [], "label": True}, "does not end with an answer"),
        ("messages", {"messages": [{"role": ["user"], "content": "a"}]}, "no known role"),
        ("messages", {"messages": [{"role": "user", "content": "a"}, CALL]}, "calls a tool without a name"),
        (
            "preference",
            {"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"},
            "the chosen answer is the user's",
        ),
    ],
)
def test_odd_rows_have_a_reason(name, row, reason):
    with pytest.raises(Unusable, match=reason):
        FORMATS[name].convert(row, ROW)


def test_an_empty_answer_in_the_middle_is_not_trained():
    turns = [
        {"role": r, "content": c}
        for r, c in zip(("user", "assistant") * 2, ("a", " ", "b", "c"), strict=True)
    ]
    with pytest.raises(Unusable, match="empty answer"):
        FORMATS["messages"].convert({"messages": turns}, ROW)


def test_the_system_prompt_reaches_preferences_and_ratings():
    for row in (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "completion": "b", "label": True},
    ):
        [(_, made)] = convert(source(row), detect(source(row)), system_prompt="Be kind.")
        assert [m.role for m in made.prompt] == ["system", "user"]


def test_shares_must_leave_something_to_train_on(tmp_path):
    rows = [{"prompt": str(i), "response": "x"} for i in range(9)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    with pytest.raises(DataError, match="nothing to train on"):
        data.prepare(Data(dataset=str(path), validation=0.5, held_out=0.5))


def test_five_rows_are_three_one_and_one_whatever_they_say(tmp_path):
    for start in range(100):
        rows = [{"prompt": f"{start} {i}", "response": "x"} for i in range(5)]
        made = data.prepare(Data(dataset=str(jsonl(tmp_path / "a.jsonl", *rows))))
        assert (len(made.train), len(made.validation), len(made.held_out)) == (3, 1, 1)


def test_a_source_with_held_out_rows_only_cannot_train(tmp_path, tiny_tokenizer):
    jsonl(tmp_path / "set" / "test.jsonl", {"prompt": "a", "response": "b"})
    settings = Data(dataset=str(tmp_path / "set"))
    with pytest.raises(DataError, match=r"no row to train on(.|\n)*1 held out"):
        data.encoded(data.prepare(settings), tiny_tokenizer, data=settings, loss_on="answers")


# tokens


@pytest.mark.parametrize("text", ["\ue0000\ue001", "\ue00099\ue001", "a \ue000 b \ue001"])
def test_the_mark_s_own_characters_may_stand_in_content(tiny_tokenizer, text):
    assert labelled(encode(talk("one", f"red {text} blue"), tiny_tokenizer), tiny_tokenizer) == (
        f"red {text} blue<|im_end|>"
    )


def test_half_a_character_drops_the_row_only(tiny_tokenizer):
    examples = (talk("one \ud800", "red"), talk("one", "red", number=2), Text("a \udfff", Row("x", 3)))
    made = data.encoded(splits_of(*examples), tiny_tokenizer, data=Data(), loss_on="answers")
    assert made.ledger.counts()["dropped"] == 2
    assert any("half a character (U+D800)" in reason for reason in made.ledger.reasons())


def test_a_special_token_before_the_answer_does_not_end_it(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}<think></think>{% endif %}"
        "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert labelled(encode(talk("one", "red"), tokenizer), tokenizer) == "<think></think>red<|im_end|>"
    assert end_of_turn_ids(tokenizer) == (tokenizer.eos_token_id,)


@pytest.mark.parametrize("loss_on", ["answers", "last_answer", "everything"])
def test_a_template_without_end_of_turn_is_said_and_closed(tiny_tokenizer, loss_on):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert "no token of its own" in set_template(tokenizer, None)
    encoding = encode(talk("one", "red"), tokenizer, loss_on=loss_on)
    assert encoding.labels[-1] == encoding.input_ids[-1] == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no answer could end"):
        set_template(tokenizer, None)


def test_templates_that_write_earlier_answers_otherwise_say_so(tiny_tokenizer):
    import trl

    tokenizer = copy.deepcopy(tiny_tokenizer)
    assert "once for each question" not in set_template(tokenizer, None)
    path = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    assert "once for each question" in set_template(tokenizer, str(path))
    assert labelled(encode(talk("a", "one", "b", "two"), tokenizer), tokenizer).endswith("two<|im_end|>")


def test_broken_jinja_is_the_template_s_error_not_every_row_s(tiny_tokenizer, tmp_path):
    path = tmp_path / "broken.jinja"
    path.write_text("{% for m in messages %}\n{{ m.content ")
    with pytest.raises(ModelError, match=r"no valid Jinja(.|\n)*line 2"):
        set_template(copy.deepcopy(tiny_tokenizer), str(path))


def test_a_template_that_needs_a_system_message_still_tells_its_end_of_turn(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = "<|pad|>"
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('say who you are') }}{% endif %}"
        + tokenizer.chat_template
    )
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in end_of_turn_ids(tokenizer)


@pytest.mark.parametrize("kind", ["first", "legacy"])
def test_answers_start_without_the_space_that_sentencepiece_puts_first(kind):
    """Tokenized on its own an answer would begin with a space; behind its prompt it must not."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"])
    backend.train_from_iterator(["<user>\n<assistant>\nwhat is red blue\n"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m.role + '>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
    )
    row = talk("what", "blue", "is", "red")
    encoding = encode(row, tokenizer)
    assert labelled(encoding, tokenizer) == "blue</s>red</s>"
    for turn in (1, 3):
        prompt = prompt_ids(row.messages[:turn], tokenizer)
        assert list(encoding.input_ids[: len(prompt)]) == prompt


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
def test_a_real_set_from_file_to_ids(tiny_tokenizer):
    settings = Data(dataset=str(SHARED / "alpaca_en_demo.json"), max_rows=200, max_length=512)
    made = data.encoded(data.prepare(settings), tiny_tokenizer, data=settings, loss_on="answers")
    counts = made.ledger.counts()
    assert counts["rows_in"] == 200 == sum(counts[f] for f in ("train", "validation", "held_out", "dropped"))
    assert all(e.trained and len(e.input_ids) <= 512 for e in (*made.train, *made.validation))
    lines = [json.loads(line) for line in data.ledger_lines(made.ledger)]
    assert len(lines) == 200
    assert set(lines[0]) == {"source", "row", "fate", "reason", "tokens", "tokens_cut"}
