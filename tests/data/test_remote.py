"""Files in object stores: the same rows as from a folder, whatever happens to the connection."""

from __future__ import annotations

import json

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tunesmith.compose import compose
from tunesmith.data import prepare, remote, sources
from tunesmith.errors import DataError, MissingExtra, RecipeError
from tunesmith.recipe import Data

ROWS = [{"prompt": f"question {n} é", "response": f"answer {n} " + "long " * (n % 7)} for n in range(3000)]


@pytest.fixture
def store(monkeypatch):
    """An object store in memory, with a data set in shards of each kind."""
    memory = fsspec.filesystem("memory")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS]
    for part in range(3):
        memory.pipe(f"/bucket/chats/train-{part:05}-of-00003.jsonl", "".join(lines[part * 900 : part * 900 + 900]).encode())  # fmt: skip  # noqa: E501
    memory.pipe("/bucket/chats/test/rest.jsonl", "".join(lines[2700:]).encode())
    memory.pipe("/bucket/chats/notes.md", b"no data")
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    monkeypatch.setattr(remote, "AT_ONCE", 4096)
    yield memory
    memory.rm("/bucket", recursive=True)


def rows_of(source):
    return [(record.row, dict(record.values), record.role) for record in source.records]


def test_shards_are_read_in_order_with_their_roles_and_named_by_place(store):
    source = sources.read("memory://bucket/chats")
    found = rows_of(source)
    assert [values for _, values, _ in found] == ROWS[2700:] + ROWS[:2700], "by the names of the files"
    assert found[0][0] == ("test/rest.jsonl", 1)
    assert found[300][0] == ("train-00000-of-00003.jsonl", 1)
    assert {role for *_, role in found} == {"train", "held_out"}
    one = sources.read("memory://bucket/chats/train-00001-of-00003.jsonl")
    assert [values for _, values, _ in rows_of(one)] == ROWS[900:1800]
    some = sources.read("memory://bucket/chats", data_files="train-0000[02]*.jsonl")
    assert [values for _, values, _ in rows_of(some)] == ROWS[:900] + ROWS[1800:2700]
    assert "4 files" in source.notes[0]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json", ".txt"])
def test_every_kind_of_file_is_read_there_as_here(store, tmp_path, suffix):
    import pandas

    table = pandas.DataFrame(ROWS[:200])
    path = tmp_path / f"rows{suffix}"
    {
        ".csv": lambda: table.to_csv(path, index=False),
        ".parquet": lambda: table.to_parquet(path),
        ".json": lambda: path.write_text(json.dumps(ROWS[:200]), encoding="utf-8"),
        ".txt": lambda: path.write_text(
            "".join(f"{row['prompt']}\n" for row in ROWS[:200]), encoding="utf-8"
        ),
    }[suffix]()
    store.pipe(f"/bucket/rows{suffix}", path.read_bytes())
    here, there = sources.read(str(path)), sources.read(f"memory://bucket/rows{suffix}")
    assert rows_of(there) == rows_of(here)


def test_a_connection_that_breaks_is_taken_up_at_the_same_byte(store, monkeypatch):
    """Every third piece fails, after half of it came; the rows are those of a whole reading."""
    whole = rows_of(sources.read("memory://bucket/chats"))
    opened = MemoryFileSystem._open
    count = {"reads": 0, "failed": 0}

    class Breaking:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def read(self, size):
            count["reads"] += 1
            if count["reads"] % 3 == 0:
                self.file.read(size // 2)
                count["failed"] += 1
                raise ConnectionResetError("gone")
            return self.file.read(size)

    monkeypatch.setattr(MemoryFileSystem, "_open", lambda self, *a, **k: Breaking(opened(self, *a, **k)))
    assert rows_of(sources.read("memory://bucket/chats")) == whole
    assert count["failed"] > 10
    monkeypatch.setattr(Breaking, "read", lambda self, size: (_ for _ in ()).throw(TimeoutError("slow")))
    with pytest.raises(
        DataError, match=r"cannot be read further than byte 0.*\n.*TimeoutError: slow, 6 times"
    ):
        rows_of(sources.read("memory://bucket/chats"))


class Lost(Exception):
    """What a library of a store raises where a connection breaks: as of httpx, aiohttp and botocore, no OSError."""


class Reads:
    """A file of the store whose readings go through a function of the test: the file, the size, the place."""

    def __init__(self, file, read):
        self.file, self.read = file, lambda size=-1: read(file, size)

    def __getattr__(self, name):
        return getattr(self.file, name)


def reading(monkeypatch, read):
    opened = MemoryFileSystem._open
    monkeypatch.setattr(MemoryFileSystem, "_open", lambda self, *a, **k: Reads(opened(self, *a, **k), read))


def test_an_answer_that_ends_too_early_is_no_end_of_the_file(store, monkeypatch):
    whole, ended, times = rows_of(sources.read("memory://bucket/chats")), [], [3]

    def early(file, size):
        if file.tell() > 8000 and len(ended) < times[0]:
            ended.append(file.tell())
            return b""
        return file.read(size)

    reading(monkeypatch, early)
    assert rows_of(sources.read("memory://bucket/chats")) == whole
    assert len(ended) == 3
    times[0] = 10**9
    with pytest.raises(
        DataError, match=r"cannot be read further than byte [\d,]+.*\n.*ends at byte .*, 6 times"
    ):
        rows_of(sources.read("memory://bucket/chats"))


def test_whatever_a_connection_fails_with_is_tried_again_and_a_no_is_not(store, monkeypatch):
    whole = rows_of(sources.read("memory://bucket/chats"))
    asked = {"info": 0, "read": 0}

    def failing(what, answer):
        asked[what] += 1
        if asked[what] % 3 == 1:
            raise Lost("connection reset")
        return answer()

    info = MemoryFileSystem.info
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, *a, **k: failing("info", lambda: info(self, *a, **k)))  # fmt: skip  # noqa: E501
    reading(monkeypatch, lambda file, size: failing("read", lambda: file.read(size)))
    assert rows_of(sources.read("memory://bucket/chats")) == whole
    assert min(asked.values()) > 10

    class Denied(Lost):
        status = 403

    for error, times in ((Denied("not you"), 1), (TypeError("ours"), 1), (Lost("gone"), remote.TRIES)):
        told = []

        def refusing(self, *given, error=error, told=told, **more):
            told.append(given)
            raise error

        monkeypatch.setattr(MemoryFileSystem, "info", info)
        source = sources.open_source("memory://bucket/chats/test")
        monkeypatch.setattr(MemoryFileSystem, "info", refusing)
        with pytest.raises(TypeError if isinstance(error, TypeError) else DataError):
            list(source.scan())
        assert len(told) == times
    monkeypatch.setattr(MemoryFileSystem, "info", info)  # the store is emptied with it


def test_a_file_that_changes_while_a_connection_is_broken_is_an_error(store, monkeypatch):
    name = "/bucket/chats/test/rest.jsonl"
    content = store.cat(name)

    def breaking(file, size):
        if file.tell() > 8000 and store.cat(name) == content:
            store.pipe(name, content.replace(b"answer", b"reward"))
            raise Lost("connection reset")
        return file.read(size)

    reading(monkeypatch, breaking)
    with pytest.raises(DataError, match=r"rest.jsonl changed while it was read"):
        rows_of(sources.read("memory://bucket/chats/test"))


def test_a_file_that_changes_between_two_readings_is_an_error(store):
    data = Data(dataset="memory://bucket/chats", cache=False, near_duplicates="ignore")
    splits = prepare(data)
    assert len(list(splits.rows())) == 3000
    before = sources.read("memory://bucket/chats").fingerprint
    assert sources.read("memory://bucket/chats").fingerprint == before
    store.pipe("/bucket/chats/train-00001-of-00003.jsonl", b'{"prompt": "a", "response": "b"}\n')
    with pytest.raises(DataError, match=r"train-00001-of-00003.jsonl changed while it was read"):
        list(splits.rows())
    assert sources.read("memory://bucket/chats").fingerprint != before


def test_what_cannot_be_read_is_said_with_what_to_do(store, monkeypatch):
    with pytest.raises(DataError, match="names no data file"):
        sources.read("memory://bucket/nothing")
    with pytest.raises(DataError, match="'file://' is no place"):
        sources.read("file:///etc/passwd")
    with pytest.raises(DataError, match=r"data\.revision is for Hub data sets by their id"):
        sources.read("memory://bucket/chats", revision="main")
    store.pipe("/bucket/odd/rows.xlsx", b"x")
    with pytest.raises(DataError, match=r"rows.xlsx is not of a known format"):
        sources.read("memory://bucket/odd/rows.xlsx")
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (_ for _ in ()).throw(ImportError("s3fs")))
    with pytest.raises(MissingExtra, match="pip install s3fs"):
        sources.read("s3://bucket/chats")


@pytest.mark.parametrize(
    "url",
    [
        "https://x.blob.core/r.jsonl?sv=1&sig=abc",
        "https://b.s3.aws/r.jsonl?X-Amz-Signature=abc",
        "s3://a:b@c/d",
        "https://abc@raw.x/y.jsonl",
        "https://x.org/r.jsonl?auth=abc",
        "https://x.org/r.jsonl?v=1&X-Amz-Credential=abc",
    ],
)
def test_an_address_with_a_key_in_it_is_refused_without_being_shown(url):
    with pytest.raises(RecipeError) as refused:
        compose({"data": {"dataset": url}})
    assert "data.dataset has a password in its address" in str(refused.value)
    assert "abc" not in str(refused.value)
    for fine in (
        "https://x.org/r.jsonl?version=3&author=me",
        "hf://datasets/a/b@main/c",
        "https://x.org/a@2/b",
    ):
        assert compose({"data": {"dataset": fine}}).recipe.data.dataset == fine


def test_no_more_is_held_than_a_piece(store):
    """A file of 40 MB is read with a few pieces in memory."""
    import tracemalloc

    line = json.dumps({"prompt": "q" * 1000, "response": "a" * 1000}).encode() + b"\n"
    store.pipe("/bucket/large.jsonl", line * 20_000)
    source = sources.open_source("memory://bucket/large.jsonl")
    tracemalloc.start()
    assert sum(1 for _ in source.scan()) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
