"""Every kind of file gives its rows with their places; every broken one gives one clear error."""

from __future__ import annotations

import json

import pytest

from tunesmith.data.sources import distinct, locate, open_source, read
from tunesmith.errors import DataError

ROWS = [{"prompt": f"question {i}", "response": f"answer, {i}"} for i in range(3)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def values(source):
    return [dict(record.values) for record in source.records]


def as_parquet(path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize(
    "make",
    [
        lambda p: write(p / "a.json", json.dumps(ROWS)),
        lambda p: write(p / "a.json", json.dumps({k: [r[k] for r in ROWS] for k in ROWS[0]})),
        lambda p: write(p / "a.jsonl", "\n\n".join(json.dumps(r) for r in ROWS) + "\n"),
        lambda p: write(p / "a.jsonl", b"\xef\xbb\xbf" + "\r\n".join(json.dumps(r) for r in ROWS).encode()),
        lambda p: write(
            p / "a.csv", "prompt,response\n" + "".join(f'question {i},"answer, {i}"\n' for i in range(3))
        ),
        lambda p: write(
            p / "a.csv", "prompt;response\n" + "".join(f"question {i};answer, {i}\n" for i in range(3))
        ),
        lambda p: as_parquet(p / "a.parquet"),
    ],
    ids=["json", "json-columns", "jsonl-blank-lines", "jsonl-bom-crlf", "csv", "csv-semicolon", "parquet"],
)
def test_files_of_every_kind_give_the_same_rows(tmp_path, make):
    source = read(str(make(tmp_path)))
    assert values(source) == ROWS
    assert source.name == "a"


def test_rows_know_their_line_in_spite_of_blank_ones(tmp_path):
    path = write(tmp_path / "a.jsonl", '\n{"a": 1}\n\n{"a": 2}\n')
    assert [str(r.row) for r in read(str(path)).records] == ["a.jsonl:2", "a.jsonl:4"]


def test_text_files_give_one_row_a_line(tmp_path):
    path = write(tmp_path / "a.txt", "one\n\ntwo\r\n")
    assert values(read(str(path))) == [{"text": "one"}, {"text": "two"}]


def test_named_splits_of_a_json_file_play_their_roles(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"train": ROWS, "test": ROWS[:1]}))
    source = read(str(path))
    assert [record.role for record in source.records] == ["train"] * 3 + ["held_out"]
    assert str([*source.records][-1].row) == "a.json/test:1"
    assert any("held-out" in note for note in source.notes)
    only = read(str(path), split="test")
    assert [(record.role, dict(record.values)) for record in only.records] == [(None, ROWS[0])]
    with pytest.raises(DataError, match="no split 'dev'"):
        read(str(path), split="dev")


def test_folders(tmp_path):
    folder = tmp_path / "set"
    for name, rows in (("train", ROWS), ("eval", ROWS[:1])):
        write(folder / f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    write(folder / "notes.txt", "unused\n")
    source = read(str(folder))
    assert sorted(record.role for record in source.records) == ["train"] * 3 + ["validation"]
    assert any("notes.txt" in note for note in source.notes)
    assert len([*read(str(folder), data_files="ev*.jsonl").records]) == 1


def test_a_folder_that_does_not_say_which_file(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / "set" / f"{name}.jsonl", "{}\n")
    with pytest.raises(DataError, match=r"one\.jsonl, two\.jsonl"):
        read(str(tmp_path / "set"))


def test_a_hub_like_set_is_read_by_the_datasets_library(tmp_path, monkeypatch):
    """The hub is out of reach in tests; what it returns is not: a DatasetDict, here built from memory."""
    import datasets

    seen = {}

    def load(name, config, **options):
        seen.update(name=name, config=config, **options)
        part = datasets.Dataset.from_list(ROWS)
        return part if options["split"] else datasets.DatasetDict(train=part, test=part.select([0]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = read("owner/set", config="en", data_files="*.json", revision="v1")
    assert (seen["name"], seen["config"], seen["data_files"], seen["revision"]) == (
        "owner/set",
        "en",
        "*.json",
        "v1",
    )
    assert [record.role for record in source.records] == ["train"] * 3 + ["held_out"]
    assert source.name == "set"
    assert [record.role for record in read("owner/set", split="train").records] == [None] * 3


def test_the_fingerprint_is_that_of_content_and_name(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    a, b = (write(tmp_path / place, '{"a": 1}\n') for place in ("a.jsonl", "elsewhere/a.jsonl"))
    assert read(str(a)).fingerprint == read(str(b)).fingerprint
    assert read(str(a)).fingerprint != read(str(write(tmp_path / "b.jsonl", '{"a": 1}\n'))).fingerprint
    write(b, '{"a": 2}\n')
    assert read(str(a)).fingerprint != read(str(b)).fingerprint


def test_max_rows_is_said(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2}\n')
    source = read(str(path), max_rows=1)
    assert len([*source.records]) == 1
    assert any("max_rows" in note for note in source.notes)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 2,}\n', ["line 2", "column", "^", '{"a": 2,}']),
        ("a.jsonl", "[1]\n", ["line 1", "expected an object, found a list"]),
        ("a.jsonl", "".join("{\n" for _ in range(30)), ["30 broken lines", "and 20 more"]),
        ("a.json", '[{"a": 1},\n {"a": }]', ["line 2", "column 8", "^"]),
        ("a.json", '{"a": 1}\n{"a": 2}\n', ["JSON Lines", ".jsonl"]),
        ("a.json", '{"name": "x"}', ["no list of records"]),
        ("a.json", "[1, 2]", ["record 1 is not an object"]),
        ("a.json", "[]", ["has no rows"]),
        ("a.jsonl", "", ["has no rows"]),
        ("a.txt", "\n \n", ["has no rows"]),
        ("a.csv", "", ["has no rows"]),
        ("a.csv", "a,b\n1,2,3\n", ["a.csv, row 1", "line 2", "3 cells", "header has 2"]),
        ("a.csv", "a,b\n1\n", ["line 2", "1 cells", "header has 2"]),
        ("a.parquet", "nonsense", ["not a Parquet file"]),
        ("a.xml", "<a/>", ["suffix '.xml'", ".jsonl"]),
        ("a.jsonl", b'{"a": "ok"}\n{"a": "caf\xe9"}\n', ["line 2", "not UTF-8", "iconv"]),
    ],
)
def test_broken_files(tmp_path, name, content, expected):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        read(str(path))
    for fragment in expected:
        assert fragment in str(error.value)


def test_only_data_files_are_proposed_for_a_missing_one(tmp_path):
    for name in ("nope.csx", "nop.csv.md", "nopes.csv"):
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError) as error:
        read(str(tmp_path / "nope.csv"))
    assert error.value.fix == f"Did you mean '{tmp_path / 'nopes.csv'}'?"


def test_missing_files_name_their_neighbors(tmp_path):
    write(tmp_path / "questions.jsonl", "{}\n")
    with pytest.raises(DataError, match=r"Did you mean '.*questions\.jsonl'"):
        read(str(tmp_path / "question.jsonl"))
    with pytest.raises(DataError, match="Did you mean 'sql'"):
        read("example:sqll")
    with pytest.raises(DataError, match="neither a file"):
        read("owner/set-that-does-not-exist")


def test_a_suffix_in_capitals_is_the_same_suffix(tmp_path):
    for name, texts in (("train.jsonl", ["a", "b"]), ("test.JSONL", ["c"])):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert read(str(tmp_path)).facts.places == {("test.JSONL", "held_out"): 1, ("train.jsonl", "train"): 2}


@pytest.mark.parametrize("kind", ["broken line", "not UTF-8", "broken JSON", "no object", "private key"])
def test_no_error_quotes_a_secret(tmp_path, kind):
    key = "sk-" + "a1B2c3D4e5F6g7H8i9J0" * 2
    pem = "-----BEGIN PRIVATE KEY-----MIIEvQIBADANBgkqhkiG9w0BAQEFAASC"
    name, content, secret = {
        "broken line": ("a.jsonl", f'{{"text": "{key}" oops\n'.encode(), key),
        "not UTF-8": ("a.jsonl", f'{{"text": "{key}\xe9"}}\n'.encode("latin-1"), key),
        "broken JSON": ("a.json", f'[{{"text": "{key}" oops'.encode(), key),
        "no object": ("a.json", json.dumps([[key]]).encode(), key),
        "private key": ("a.jsonl", f'{{"text": "{pem}" oops\n'.encode(), pem),
    }[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read(str(tmp_path / name))
    said = f"{error.value} {error.value.found}"
    assert not any(secret[start : start + 8] in said for start in range(3, len(secret) - 8))
    assert "***" in said


# what a first user found


def test_broken_lines_name_the_file_every_remedy_and_the_way_out(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n{oops\n{"a": "caf\xe9"}\n{"a": "cut o')
    with pytest.raises(DataError) as error:
        read(str(path))
    said = str(error.value)
    assert said.startswith("a.jsonl has 3 broken lines.")
    assert "one JSON object per line" in said
    assert "iconv" in said
    assert f"`tunesmith validate {path} --fix`" in said
    assert said.count("looks cut off") == 1
    assert [(row["row"], row["column"]) for row in error.value.details["broken"]] == [
        (2, 2),
        (3, None),
        (4, 7),
    ]
    assert not any("\n" in row["problem"] for row in error.value.details["broken"])


def test_a_whole_broken_last_line_is_not_called_cut_off(tmp_path):
    with pytest.raises(DataError) as error:
        read(str(write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 1,}')))
    assert "cut off" not in str(error.value)


def test_ledgers_of_cleaned_copies_are_no_data(tmp_path):
    write(tmp_path / "set" / "rows.clean.jsonl", json.dumps(ROWS[0]) + "\n")
    write(tmp_path / "set" / "rows.clean.jsonl.ledger.jsonl", '{"source": "rows.jsonl", "row": 1}\n')
    assert values(read(str(tmp_path / "set"))) == ROWS[:1]
    assert values(read(str(tmp_path / "set"), data_files="*.jsonl")) == ROWS[:1]


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ("a/data.jsonl", "b/data.jsonl", ["a/data.jsonl", "b/data.jsonl"]),
        ("x/a/data.jsonl", "y/a/data.jsonl", ["x/a/data.jsonl", "y/a/data.jsonl"]),
        ("a/one.jsonl", "b/two.jsonl", ["one.jsonl", "two.jsonl"]),
        ("a/data.jsonl", "a/data.jsonl", ["data.jsonl", "data.jsonl"]),
        ("a/train.jsonl", "b/train.jsonl", ["a/train.jsonl", "b/train.jsonl"]),
    ],
)
def test_sources_of_a_mix_are_told_apart(tmp_path, first, second, names):
    files = [write(tmp_path / name, json.dumps(ROWS[0]) + "\n{\n") for name in (first, second)]
    datasets = [str(file.parent if file.stem == "train" else file) for file in files]
    opened = distinct([open_source(dataset) for dataset in datasets], datasets)
    assert [[str(record.row) for record in source.scan()] for source in opened] == [
        [f"{name}:1", f"{name}:2"] for name in names
    ]


@pytest.fixture
def hub(monkeypatch):
    """A Hub that has nothing and is slow to say so; gives the names it was asked for."""
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    asked = []

    def unreachable(_, name, **options):
        asked.append((name, options["timeout"]))
        raise ConnectionError("Name or service not known\nand more")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    return asked


@pytest.mark.parametrize(
    "name",
    ["nope.jsonl", "NOPE.JSON", "folder/nope.csv", "folder/nope.tsv", "/nope", "./nope", "../nope", "~/nope",
     "nope/", "a/b/c", "two words", "..", "nope.json.gz"],
)  # fmt: skip
def test_what_looks_like_a_path_never_goes_to_the_hub(tmp_path, monkeypatch, hub, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(DataError, match=r"There is no file|does not say which file"):
        open_source(name)
    assert hub == []


@pytest.mark.parametrize("ask", [open_source, locate])
def test_a_hub_out_of_reach_is_asked_once_and_briefly(hub, ask, monkeypatch):
    """The libraries would try for half a minute."""
    import time

    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits to ask again"))
    with pytest.raises(DataError) as error:
        ask("someone/nope")
    assert hub == [("someone/nope", 5.0)]
    assert error.value.found == "the Hub cannot be reached (ConnectionError: Name or service not known)"


def test_what_the_cache_has_is_read_though_the_hub_is_out_of_reach(hub, monkeypatch):
    import datasets

    seen = []

    def load(*arguments, **options):
        seen.append(datasets.config.HF_HUB_OFFLINE)
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert values(open_source("someone/cached")) == ROWS
    assert seen == [True]
    assert datasets.config.HF_HUB_OFFLINE is False
    monkeypatch.setattr(datasets.load, "dataset_module_factory", lambda name: None)
    locate("someone/cached")


def test_a_hub_that_has_no_such_set_says_so(hub, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    for kind, words in (
        (RepositoryNotFoundError, "no such data set"),
        (RevisionNotFoundError, "revision 'old'"),
    ):

        def refuse(*_, kind=kind, **__):
            raise kind.__new__(kind)

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
        with pytest.raises(DataError, match="neither a file") as error:
            open_source("someone/nope", revision="old")
        assert words in error.value.found


def test_a_missing_file_is_likened_to_others_by_name_alone(tmp_path, monkeypatch):
    """Folder and suffix are the same for files that have nothing to do with each other."""
    for name in ("odd.json", "questions.json"):
        write(tmp_path / name, "[]")
    with pytest.raises(DataError) as error:
        open_source(str(tmp_path / "nope.json"))
    assert error.value.fix == "Check the path; a Hub id looks like owner/name."
    with pytest.raises(DataError) as error:
        open_source(str(tmp_path / "question.jsonl"))
    assert error.value.fix == f"Did you mean '{tmp_path / 'questions.json'}'?"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        open_source("questions")
    assert error.value.fix == "Did you mean 'questions.json'?", "it could be the Hub's, but is not"
