"""Data files that are malformed, or made to do harm: every case of the catalogue by its name.

Each is given to `validate`, which counts every row, and to `prepare`, which is strict: what is not right is one error
of ours that names the file and, where there is one, the line.
"""

import gzip
import io
import json
import os
import re
import resource
import time
import zipfile
from dataclasses import replace

import pytest
from any_files import accounted, lines_named, unplaced

from tunesmith import api, data
from tunesmith.compose import read_layer
from tunesmith.data import pieces, sources
from tunesmith.errors import DataError, RecipeError, TunesmithError
from tunesmith.recipe import Data

GOOD = [json.dumps({"prompt": f"what is {n}", "response": f"it is {n}"}).encode() for n in range(4)]


def among(line: bytes, at: int = 2) -> bytes:
    """Four good rows with a line among them."""
    return b"\n".join([*GOOD[:at], line, *GOOD[at:]]) + b"\n"


def row(**values) -> bytes:
    return json.dumps(values).encode()


def talk(*said, **more) -> bytes:
    return row(messages=[{"role": role, "content": content} for role, content in said], **more)


def talks(line: bytes) -> bytes:
    good = talk(("user", "what is one"), ("assistant", "two"))
    return b"\n".join([good, line, good.replace(b"one", b"three"), good.replace(b"one", b"four")]) + b"\n"


def called(arguments) -> bytes:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return row(messages=[
        {"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"}, {"role": "assistant", "content": "y"},
    ])  # fmt: skip


TABLE = b"prompt,response\n" + b"".join(b"what is %d,it is %d\n" % (n, n) for n in range(4))


# name -> suffix, content, number of rows, number of the first row with an error (None: none has one; 0: the file has).
def parquet_of_latin_1() -> bytes:
    """Five rows, the third of which has a text that nobody decoded before it was written."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows = [
        {"prompt": f"what is {n}", "response": "caf\u00e9!" if n == 2 else f"it is {n}"} for n in range(5)
    ]
    out = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows), out, compression="none", use_dictionary=False)
    return out.getvalue().replace("caf\u00e9!".encode(), b"caf\xe9!!")


CASES = {
    "first line broken": (".jsonl", among(b'{"prompt": ', 0), 5, 1),
    "middle line broken": (".jsonl", among(b'{"prompt": x}'), 5, 3),
    "last line broken": (".jsonl", among(b"{]", 4), 5, 5),
    "last line cut off": (".jsonl", b"\n".join(GOOD) + b'\n{"prompt": "a", "resp', 5, 5),
    "trailing comma": (".jsonl", among(GOOD[0] + b","), 5, 3),
    "UTF-16": (".jsonl", b"\n".join(GOOD).decode().encode("utf-16"), 4, 1),
    "latin-1": (".jsonl", among('{"prompt": "é", "response": "x"}'.encode("latin-1")), 5, 3),
    "BOM": (".jsonl", b"\xef\xbb\xbf" + b"\n".join(GOOD), 4, None),
    "raw NUL": (".jsonl", among(b'{"prompt": "a\0", "response": "b"}'), 5, 3),
    "escaped NUL": (".jsonl", among(b'{"prompt": "a\\u0000", "response": "b"}'), 5, None),
    "lone surrogate": (".jsonl", among(b'{"prompt": "\\ud800", "response": "b"}'), 5, 3),
    "NaN": (".jsonl", among(b'{"prompt": "a", "response": NaN}'), 5, 3),
    "Infinity": (".jsonl", among(b'{"prompt": "a", "response": -Infinity}'), 5, 3),
    "huge number": (".jsonl", among(b'{"prompt": "a", "response": ' + b"9" * 5000 + b"}"), 5, 3),
    "duplicate keys": (".jsonl", among(b'{"prompt": "a", "prompt": "c", "response": "b"}'), 5, 3),
    "duplicate keys inside": (".jsonl", talks(b'{"messages": [{"role": "user", "role": "tool"}]}'), 4, 2),
    "deep nesting": (".jsonl", among(b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), 5, 3),
    "nesting that parses": (".jsonl", among(GOOD[0][:-1] + b', "x": ' + b"[" * 70 + b"]" * 70 + b"}"), 5, 3),
    "scalars": (".jsonl", among(b"42"), 5, 3),
    "empty file": (".jsonl", b"", 0, 0),
    "white space only": (".jsonl", b" \n\t\n", 0, 0),
    "a JSON array in lines": (".jsonl", b"[" + b",".join(GOOD) + b"]\n", 1, 1),
    "lines in a JSON array's place": (".json", b"\n".join(GOOD), 0, 0),
    "gzip": (".jsonl.gz", gzip.compress(b"\n".join(GOOD)), 0, 0),
    "gzip cut off": (".jsonl.gz", gzip.compress(b"\n".join(GOOD))[:30], 0, 0),
    "gzip called lines": (".jsonl", gzip.compress(b"\n".join(GOOD), mtime=0), None, 1),
    "zstd cut off": (".jsonl.zst", b"\x28\xb5\x2f\xfd\x04", 0, 0),
    "ragged table": (".csv", TABLE + b"a,b,c\n", 5, 5),
    "unclosed quote": (".csv", TABLE + b'"a,b\n', 5, 5),
    "NUL in a table": (".csv", TABLE + b"a\0,b\n", 5, None),
    "numbers in a table": (".csv", TABLE + b"007,1e5\nNA,null\n", 6, None),
    "semicolons": (".csv", TABLE.replace(b",", b";"), 4, None),
    "a column twice": (".csv", TABLE.replace(b"prompt,response", b"prompt,prompt"), 0, 0),
    "mixed schema": (".jsonl", among(row(question="x", answer="y")), 5, None),
    "an object for a text": (".jsonl", among(row(prompt="a", response={"x": 1})), 5, 3),
    "null answer": (".jsonl", among(row(prompt="a", response=None)), 5, 3),
    "empty answer": (".jsonl", among(row(prompt="a", response="")), 5, 3),
    "white answer": (".jsonl", among(row(prompt="a", response=" \n")), 5, 3),
    "system only": (".jsonl", talks(talk(("system", "be kind"))), 4, 2),
    "roles out of order": (".jsonl", talks(talk(("assistant", "a"), ("user", "b"))), 4, 2),
    "unknown role": (".jsonl", talks(talk(("king", "a"), ("assistant", "b"))), 4, 2),
    "arguments as text": (".jsonl", talks(called('{"a": 1}')), 4, None),
    "arguments as an object": (".jsonl", talks(called({"a": 1})), 4, None),
    "arguments that are no JSON": (".jsonl", talks(called("{a")), 4, 2),
    "ShareGPT misspelled": (".jsonl", b"\n".join([
        row(conversations=[{"from": "human", "value": f"a{n}"}, {"from": "gpt", "value": f"b{n}"}]) for n in range(3)
    ] + [row(conversations=[{"from": "humn", "value": "a"}, {"from": "gpt", "value": "b"}])]), 4, 4),
    "a chat cut into lines": (".jsonl", b'{"messages": [\n' + talk(("user", "a"), ("assistant", "b")) + b"\n]}", 3, 1),
    "bad UTF-8 in an escape": (".jsonl", among(b'{"prompt": "\\u12", "response": "b"}'), 5, 3),
    "a text file with a NUL": (".txt", b"one\0two\n", 1, None),
    "broken header": (".csv", b'prs, ""0"""\nwhat is 1,it is 1\n', 0, 0),
    "no header": (".csv", b"what is 1,it is 1\n", 0, 0),
    "Parquet with a text that is not UTF-8": (".parquet", parquet_of_latin_1(), 5, 3),
    "damaged Parquet": (".parquet", b"PAR1" + bytes(40) + b"PAR1", 0, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_case_is_accounted_for_and_said_in_one_clear_error(tmp_path, name):
    suffix, content, count, bad = CASES[name]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    assert not accounted(path)
    section = Data(dataset=str(path), cache=False, validation=0.0, held_out=0.0)
    report = refused = None
    try:
        report = api.validate(str(path)).as_dict()
    except TunesmithError as error:
        refused = str(error)
    if report is None:
        assert bad == 0
        assert path.name in refused
    else:
        rows, errors = report["rows"], [f for f in report["findings"] if f["severity"] == "error"]
        assert rows["rows"] == rows["ok"] + rows["with_errors"] + rows["with_warnings"]
        assert count is None or rows["rows"] == count
        assert bool(errors) == (bad is not None), report["findings"]
        assert not bad or bad in {f["row"] for f in errors}, errors
    counts = refused = None
    try:
        counts = data.prepare(section).ledger.counts()
    except TunesmithError as error:
        refused = str(error)
    if counts is None:
        assert bad is not None
        assert path.name in refused
        assert not unplaced(refused, path)
        if bad:  # rows of a table stand one line below their number
            named = set(lines_named(refused, path))
            assert {bad, bad + (suffix == ".csv")} & named or "None of the" in refused, refused
        return
    # What reads well and cannot be trained is dropped, and the ledger has its reason.
    assert counts["rows_in"] == count
    assert counts["rows_in"] == sum(counts[fate] for fate in ("train", "validation", "held_out", "dropped"))
    # Half a character is found where it is tokenized, by `test_half_a_character_drops_the_row_only`.
    assert bool(counts["dropped"]) == bool(bad) or name == "lone surrogate"


def skipping(records):
    """A reader that leaves broken rows out without a word."""
    return (record for record in records if isinstance(record, sources.Record))


def renumbering(records):
    """A reader whose broken rows all stand in line 1."""
    for record in records:
        is_broken = isinstance(record, sources.Broken)
        row = record.row._replace(number=1)
        yield replace(record, row=row, place="rows.jsonl, line 1") if is_broken else record


def nameless(records):
    """A reader that ends at a broken row without its place."""
    for record in records:
        if isinstance(record, sources.Broken):
            raise DataError("rows.jsonl has a line that is no object.", fix="Mend the line.")
        yield record


def lenient(records):
    """A reader that makes a row of what it cannot read."""
    for record in records:
        values = {"prompt": "a", "response": "b"}
        yield record if isinstance(record, sources.Record) else sources.Record(record.row, values)


def miscounting(records):
    """A reader that numbers its rows and not the lines of the file."""
    for number, record in enumerate(records, 1):
        yield (
            replace(record, row=record.row._replace(number=number))
            if isinstance(record, sources.Broken)
            else record._replace(row=record.row._replace(number=number))
        )


@pytest.mark.parametrize(
    ("defect", "line"),
    [(skipping, b"{x}"), (renumbering, b"{x}"), (nameless, b"{x}"), (lenient, b"{x}"), (miscounting, b"")],
)
def test_the_judge_of_the_fuzz_finds_a_defect(tmp_path, monkeypatch, defect, line):
    """Each reader does one thing wrong, with an error of ours or none at all."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(among(line))
    assert not accounted(path)
    for module in (sources, pieces):
        monkeypatch.setattr(module, "parsed", lambda *given, read=sources.parsed: defect(read(*given)))
    assert accounted(path)


def test_the_catalogue_has_its_cases():
    assert len(CASES) >= 40


def counts_of(tmp_path, tokenizer, *rows, **options):
    """What becomes of rows: the ledger's counts, and the reasons of those that are not trained."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(rows) + b"\n")
    section = Data(**{"dataset": str(path), "cache": False, "validation": 0.0, "held_out": 0.0, **options})
    made = data.encoded(data.prepare(section), tokenizer, data=section, loss_on="answers")
    entries = list(made.ledger.entries)
    assert len(entries) == len(rows), "every row has its line"
    assert {entry.row.source for entry in entries} == {"rows.jsonl"}
    return made, [(entry.row.number, entry.fate, entry.reason or "") for entry in entries]


LONG = row(prompt="what is long", response="yes " * 400)


def test_a_row_that_is_too_long_is_dropped_with_its_number_or_ends_it(tmp_path, tiny_tokenizer):
    made, fates = counts_of(tmp_path, tiny_tokenizer, *GOOD, LONG, max_length=64, over_long="drop")
    assert [number for number, fate, _ in fates if fate == "dropped"] == [5]
    assert "64" in fates[4][2]
    assert int(made.train.lengths.max()) <= 64
    with pytest.raises(DataError) as error:
        counts_of(tmp_path, tiny_tokenizer, *GOOD, LONG, max_length=64, over_long="error")
    assert "rows.jsonl" in str(error.value)
    assert re.search(r"\b5\b", str(error.value))


def test_a_row_that_has_no_token_to_train_ends_it_or_is_dropped_with_its_number(tmp_path, tiny_tokenizer):
    question = row(prompt="what is " * 200, response="two")
    with pytest.raises(DataError) as error:
        counts_of(tmp_path, tiny_tokenizer, *GOOD, question, max_length=64)
    assert "rows.jsonl:5" in str(error.value)
    _, fates = counts_of(tmp_path, tiny_tokenizer, *GOOD, question, max_length=64, on_breach="drop")
    assert [number for number, fate, _ in fates if fate == "dropped"] == [5], fates


def test_copies_are_trained_together_and_never_measured_by_one_another(tmp_path, tiny_tokenizer):
    rows = [row(prompt=f"what is {n % 10}", response=f"it is {n % 10}") for n in range(40)]
    _, fates = counts_of(tmp_path, tiny_tokenizer, *rows, validation=0.3, held_out=0.2)
    where = {}
    for number, fate, _ in fates:
        where.setdefault((number - 1) % 10, set()).add(fate)
    assert all(len(found - {"dropped"}) == 1 for found in where.values()), where
    assert api.validate(str(tmp_path / "rows.jsonl")).as_dict()["counts"]["duplicate"] == 30


def test_what_stands_in_both_splits_of_a_source_is_not_trained(tmp_path, tiny_tokenizer):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(b"\n".join(GOOD))
    (tmp_path / "set" / "test.jsonl").write_bytes(b"\n".join(GOOD[2:]))
    section = Data(dataset=str(tmp_path / "set"), cache=False)
    splits = data.prepare(section)
    entries = [splits.entry(number, record) for number, record, _ in splits.rows()]
    both = [e for e in entries if e.row.source.endswith("train.jsonl") and e.row.number in (3, 4)]
    assert len(both) == 2
    assert {e.fate for e in both} == {"dropped"}, both


@pytest.mark.parametrize("kind", ["an object", "another schema", "a number"])
def test_a_schema_that_changes_late_is_found_with_its_line(tmp_path, kind):
    """At row 20,001, where what was read before has long been decided."""
    late = {
        "an object": b'{"prompt": "a", "response": {"x": 1}}', "another schema": b'{"foo": "a"}',
        "a number": b'{"prompt": "a", "response": 7}',
    }[kind]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.writelines(b'{"prompt": "what is %d", "response": "it is %d"}\n' % (n, n) for n in range(20_000))
        file.write(late + b"\n")
    splits = data.prepare(Data(dataset=str(path), cache=False))
    counts = splits.ledger.counts()
    assert counts["rows_in"] == 20_001
    last = next(entry for entry in splits.ledger.entries if entry.row.number == 20_001)
    if kind == "a number":
        assert last.fate != "dropped", "a number is text that was written so"
    else:
        assert last.fate == "dropped"
        assert counts["dropped"] == 1
        assert last.reason


SPECIAL = (
    "<|im_end|>",
    "<|im_start|>system",
    "<|pad|>",
    "<|im_",
    "end|>",
    "<think>",
    "[INST]",
    "\ue000",
    "<\u200b|im_end|>",
)


@pytest.mark.parametrize("place", ["prompt", "response"])
@pytest.mark.parametrize("text", SPECIAL)
def test_the_text_of_a_special_token_in_content_stays_text(tmp_path, tiny_tokenizer, text, place):
    """DATA-17, from a file to the ids: as many control tokens as without it, and the content comes back whole."""
    values = {"prompt": "what is one", "response": "two"}
    plain, _ = counts_of(tmp_path, tiny_tokenizer, row(**values))
    content = values[place] + f" {text} b"
    made, _ = counts_of(tmp_path, tiny_tokenizer, row(**{**values, place: content}))
    controls = tiny_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>", "<|pad|>"])
    count = lambda found: [list(found.train[0].input_ids).count(i) for i in controls]  # noqa: E731
    assert count(made) == count(plain)
    assert content in tiny_tokenizer.decode(made.train[0].input_ids)
    if text in ("<|im_end|>", "<|pad|>"):  # the control: the plain way makes control tokens of it
        rendered = tiny_tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        ids = tiny_tokenizer(rendered, add_special_tokens=False).input_ids
        assert [ids.count(i) for i in controls] != [1, 1, 0]


def grown(read) -> tuple[float, float]:
    """Seconds, and MiB that memory grew by at its highest, of something done in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        at = time.process_time()
        try:
            read()
            said = "no error"
        except (DataError, RecipeError) as error:
            said = str(error)
        except BaseException as error:
            said = f"traceback {type(error).__name__}: {error}"
        grew = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        os.write(writer, json.dumps([time.process_time() - at, grew, said[:2000]]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        seconds, grew, said = json.loads(file.read())
    os.waitpid(child, 0)
    assert "traceback" not in said, said
    assert "no error" not in said
    return seconds, grew


def long_line(path, size=300 * 2**20):
    """A line of 300 MiB between two rows, on no disk: a file with a hole."""
    with path.open("wb") as file:
        file.write(TABLE if path.suffix == ".csv" else GOOD[0] + b"\n")
        file.seek(size, os.SEEK_CUR)
        file.write(b"\n" + (b"a,b" if path.suffix == ".csv" else GOOD[1]) + b"\n")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
def test_a_line_without_end_takes_little_memory(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    long_line(path)
    seconds, grew = grown(lambda: sources.read(str(path)))
    assert grew < 200
    assert seconds < 5
    if suffix == ".jsonl":
        [one, broken, two] = sources.open_source(str(path)).scan()
        assert isinstance(broken, sources.Broken)
        assert (one.row.number, broken.row.number, two.row.number) == (1, 2, 3)


def test_pieces_of_a_file_with_such_a_line_are_those_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    long_line(path, 40 * 2**20)
    with path.open("ab") as file:
        file.writelines(line + b"\n" for line in GOOD * 10)
    source = sources.open_source(str(path))
    monkeypatch.setattr(pieces, "BYTES", 300)
    made = [record for piece in pieces.pieces(source) for record in pieces.rows(piece)]
    assert len(made) == 43
    assert [record.row for record in made] == [record.row for record in source.scan()]


def test_a_file_of_one_value_has_a_largest_size(tmp_path):
    path = tmp_path / "rows.json"
    with path.open("wb") as file:
        file.truncate(2 * 2**30)
    assert max(grown(lambda: sources.read(str(path)))) < 5


def test_a_column_packed_as_no_text_is_refused(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    path = tmp_path / "rows.parquet"
    table = arrow.table({"prompt": ["a" * 30_000_000] * 2, "response": ["b"] * 2})
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    del table
    assert path.stat().st_size < 2**20
    assert grown(lambda: sources.read(str(path)))[1] < 100


def test_one_long_text_in_a_dictionary_is_not_multiplied(tmp_path):
    """Four hundred rows of one text of two million characters: 1.6 GB, if read at once."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    path = tmp_path / "rows.parquet"
    letters = "".join(chr(97 + n % 26) for n in range(2_000_000))
    column = arrow.DictionaryArray.from_arrays(arrow.array([0] * 400, arrow.int32()), arrow.array([letters]))
    parquet.write_table(arrow.table({"text": column}), path, store_schema=False)

    def read():
        for record in sources.open_source(str(path)).scan():
            assert len(record.values["text"]) == 2_000_000
        raise DataError("read")

    assert grown(read)[1] < 700


def test_a_long_text_before_levels_without_end_takes_little_memory(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('["' + r"a\"" * 700_000 + '",\n' + "[" * 5000)
    assert grown(lambda: sources.read(str(path)))[1] < 60


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path), os.mkdir])
def test_what_is_no_file_is_refused_at_once(tmp_path, make):
    path = str(tmp_path / "rows.jsonl")
    make(path)
    with pytest.raises(DataError):
        sources.open_source(path)


def test_archives_are_not_opened(tmp_path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../rows.jsonl", b"0" * 2**26)
    (tmp_path / "rows.zip").write_bytes(content.getvalue())
    with pytest.raises(DataError, match="known format"):
        sources.open_source(str(tmp_path / "rows.zip"))


@pytest.mark.parametrize("pattern", ["../*.jsonl", "/etc/*", "a/../../*.jsonl"])
def test_a_pattern_stays_in_its_folder(tmp_path, pattern):
    (tmp_path / "outside.jsonl").write_bytes(b"\n".join(GOOD))
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "rows.jsonl").write_bytes(b"\n".join(GOOD))
    with pytest.raises(DataError):
        sources.read(str(tmp_path / "set"), data_files=pattern)


@pytest.mark.parametrize("dataset", ["text", "json", "pandas", "webdataset"])
def test_a_loader_of_the_hub_s_library_is_no_data_set(tmp_path, monkeypatch, dataset):
    """It would read any file of this machine, in whatever way the library has."""
    (tmp_path / "secret.txt").write_text("secret")
    monkeypatch.chdir(tmp_path)
    for pattern in ("secret.txt", f"file://{tmp_path}/secret.txt", str(tmp_path / "secret.txt"), None):
        with pytest.raises(DataError, match="is no data set"):
            sources.open_source(dataset, data_files=pattern)


@pytest.mark.parametrize("pattern", ["../*.jsonl", "/etc/*", "file:///etc/passwd", "zip://x::/etc/x.zip"])
def test_a_pattern_stays_in_its_set_on_the_hub(monkeypatch, pattern):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("it was asked for"))
    with pytest.raises(DataError, match="pattern inside owner/set"):
        sources.open_source("owner/set", data_files=pattern)


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
YAML = {
    "laughs": (LAUGHS, "more than"),
    "merged laughs": (MERGED, "more than"),
    "itself": ("data: &a [*a]\n", "itself"),
    "python object": ("data: !!python/object/apply:os.system ['true']\n", "line 1, column 7: the tag"),
    "python name": ("data: !!python/name:os.system\n", "line 1, column 7: the tag"),
    "own tag": ("data: !run 1\n", "line 1, column 7: the tag '!run'"),
    "a tag that YAML knows": ("data: 1\nseed: !!int '5'\n", "line 2, column 7: the tag"),
    "an empty number": ("data: 1\nseed: !!int ''\n", "line 2, column 7: the tag"),
    "no truth": ("data: 1\nseed: !!bool x\n", "line 2, column 7: the tag"),
    "a set": ("data: !!set {x, y}\n", "line 1, column 7: the tag"),
    "a place left open": ("task: chat\nname: {{ x }}\n", "line 2, column 8 is not YAML"),
    "a list for a name": ("task: chat\n? [1]\n: x\n", "line 2, column 3 is not YAML"),
    "another end of a line": ("task: chat # \u2028\nname: 2024-99-99\n", "line 2, column 7 is not YAML"),
    "bits without end": ("task: chat\nname: 0x" + "f" * 5000, "line 2, column 7 is not YAML"),
    "minutes without end": ("task: chat\nname: 1" + ":10" * 400 + ".5\n", "line 2, column 7 is not YAML"),
    "a name that ends early": ('output_dir: "a\\0b"\n', "line 1, column 13 is not YAML"),
    "no character": ('task: chat\nname: "\\UFFFFFFFF"\n', "line 2, column .* is not YAML"),
    "key twice": ("task: chat\ntask: code\n", "again, after line 1"),
    "key twice inside": ("data: {dataset: a, dataset: b}\n", "again, after line 1"),
    "key twice in JSON": ('{"data": {"dataset": "a", "dataset": "b"}}', "again, after line 1"),
    "deep": ("[" * 100_000, "more than 64 levels"),
    "deep in a list": ("- " * 100_000 + "x", "more than 64 levels"),
    "long": ("# " + "x" * 2**21, "too large"),
    "binary": ("data: \0\n", "line 1, column 7 is not YAML"),
    "no date": ("task: chat\nname: 2024-99-99\n", "line 2, column 7 is not YAML"),
    "digits without end": ("task: chat\nname: " + "9" * 5000, "line 2, column 7 is not YAML"),
    "two documents": ("task: chat\n---\ntask: code\n", "not YAML"),
}


@pytest.mark.parametrize("name", YAML)
@pytest.mark.parametrize("what", ["recipe", "judge", "prompts", "catalogue"])
def test_no_yaml_does_more_than_say_values(tmp_path, name, what):
    """Recipes, judges' settings and texts, and catalogues are read by one reader."""
    from tunesmith import catalog
    from tunesmith.evaluation.judging import prompts, settings

    path = tmp_path / "file.yaml"
    path.write_text(YAML[name][0])
    read = {"recipe": read_layer, "judge": settings.load_judge, "prompts": prompts.load_prompts,
            "catalogue": lambda path: catalog._read(path, 0)}[what]  # fmt: skip
    at = time.process_time()
    with pytest.raises(RecipeError, match=YAML[name][1]) as error:
        read(path)
    assert path.name in str(error.value)
    assert time.process_time() - at < 2
