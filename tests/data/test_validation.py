"""Every kind of finding is found with its place, the accounts add up, the cleaned copy is clean, nothing escapes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from any_files import files, rows_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith import api, data
from tunesmith.assets import EXAMPLES, TINY_MODEL
from tunesmith.data import pieces
from tunesmith.data.checks import CHECKS, KIND_OF_REASON
from tunesmith.data.sources import open_source
from tunesmith.errors import DataError, TunesmithError
from tunesmith.recipe import Data

CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
GOOD = [{"prompt": f"What is {n} and {n}?", "response": f"It is {2 * n}."} for n in range(1, 4)]
KEY = "sk-" + "a1B2c3D4e5F6g7H8i9J0" * 2


def turns(*said):
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat(*said):
    """A good conversation and one that is not; the bad one is the second row."""
    return lines(turns(("user", "Are you there?"), ("assistant", "I am.")), turns(*said))


def pair(prompt, response):
    return lines(GOOD[0], {"prompt": prompt, "response": response})


PREFERENCE = {"prompt": "What is 2 + 2?", "chosen": "Four.", "rejected": "Five."}
RATING = {"prompt": "What is 2 + 2?", "completion": "Four.", "label": True}
LONG_WORDS = " ".join(f"word{n}" for n in range(90))

# kind -> content of the file, its suffix, row and column of the one finding, and further options
BAD = {
    "unreadable": (b"{", ".json", None, None, {}),
    "undetected": (lines({"foo": "x"}), ".jsonl", None, None, {}),
    "unparsable": (lines(GOOD[0]) + b"{broken\n", ".jsonl", 2, None, {}),
    "not_utf8": (lines(GOOD[0]) + b'{"prompt": "caf\xe9", "response": "x"}\n', ".jsonl", 2, None, {}),
    "no_format": (lines(GOOD[0], {"prompt": "What now?"}), ".jsonl", 2, "response", {}),
    "not_text": (lines(GOOD[0], {"prompt": "What now?", "response": ["a"]}), ".jsonl", 2, "response", {}),
    "empty_answer": (pair("What now?", "  "), ".jsonl", 2, "response", {}),
    "empty_question": (pair(" ", "Yes."), ".jsonl", 2, "prompt", {}),
    "unknown_role": (chat(("king", "Hello"), ("assistant", "Yes.")), ".jsonl", 2, "messages", {}),
    "no_answer": (chat(("user", "Hello"), ("assistant", "Yes."), ("user", "And?")), ".jsonl", 2, "messages", {}),
    "same_answers": (lines(PREFERENCE, {**PREFERENCE, "rejected": "Four."}), ".jsonl", 2, "chosen", {}),
    "label": (lines(RATING, {**RATING, "label": "perhaps"}), ".jsonl", 2, "label", {}),
    "surrogate": (pair("What now?", "half \ud83d"), ".jsonl", 2, "response", {}),
    "unusable": (lines({**turns(("user", "a"), ("assistant", "b")), "tools": "{"}), ".jsonl", 1, "tools", {}),
    "template": (
        chat(("user", "Hello"), ("assistant", "Yes.")), ".jsonl", 2, None,
        {"model": TINY_MODEL, "settings": {"model": {"chat_template": "REFUSING"}}}),
    "supervision": (
        pair(LONG_WORDS, "Yes."), ".jsonl", 2, None,
        {"model": TINY_MODEL, "settings": {"data": {"max_length": 64}}}),
    "roles": (chat(("user", "Hello"), ("user", "Anyone?"), ("assistant", "Yes.")), ".jsonl", 2, "messages", {}),
    "empty_turn": (chat(("system", ""), ("user", "Hello"), ("assistant", "Yes.")), ".jsonl", 2, "messages", {}),
    "number": (pair("What is 3 and 4?", 7), ".jsonl", 2, "response", {}),
    "stand_in": (b"prompt,response\nWhat now?,Nothing.\nWhat is 0/0?,NaN\n", ".csv", 2, "response", {}),
    "swallowed": (
        "\n".join(["prompt,response", *(f"q {n},a {n * 7}" for n in range(20))])
        .replace("a 21", '"a 21').replace("a 84", 'a 84"').encode(), ".csv", 4, "response", {}),
    "ignored_key": (
        lines({"messages": [{"role": "user", "content": "What now?"},
                            {"role": "assistant", "content": "Nothing.", "weightt": 0}]}), ".jsonl", 1, "messages", {}),
    "contradiction": (lines(RATING, {**RATING, "label": False}), ".jsonl", 2, None, {}),
    "nul": (pair("What\0 now?", "Nothing."), ".jsonl", 2, "prompt", {}),
    "bom": (pair("What now?", "\ufeffNothing."), ".jsonl", 2, "response", {}),
    "mojibake": (pair("What now?", "A cafÃ© perhaps."), ".jsonl", 2, "response", {}),
    "duplicate": (lines(GOOD[0], {**GOOD[0], "id": 2}), ".jsonl", 2, None, {}),
    "near_duplicate": (
        pair(LONG_WORDS, "Yes.") + lines({"prompt": LONG_WORDS, "response": "No."}), ".jsonl", 3, None, {}),
    "special_token": (pair("What now?<|im_end|>", "Nothing."), ".jsonl", 2, "prompt", {}),
    "secret": (pair("What is the key?", f"It is {KEY}."), ".jsonl", 2, "response", {}),
    "email": (pair("Whom do I ask?", "Ask jo.doe@example.com."), ".jsonl", 2, "response", {}),
    "long": (pair("What now?", LONG_WORDS), ".jsonl", 2, "response", {"settings": {"data": {"max_length": 64}}}),
    "imbalance": (
        lines(*({**RATING, "prompt": f"What is {n}?", "completion": f"{n * 7}"} for n in range(12))), ".jsonl",
        None, "label", {}),
    "other_format": (
        lines(
            *({"instruction": f"Name the number {n}.", "output": f"It is {n * 7}."} for n in range(19)),
            {"instruction": None, "input": "Name the last one.", "output": "It is none."}), ".jsonl", 20, None, {}),
    "task": (lines({"text": "The heart has four chambers."}), ".jsonl", None, None, {"task": "chat"}),
    "file_bom": (b"\xef\xbb\xbf" + lines(GOOD[0]), ".jsonl", None, None, {}),
}  # fmt: skip


REFUSING = (
    "{% if messages[0].content == 'Hello' %}{{ raise_exception('no greeting') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
)


def written(folder, content, suffix=".jsonl"):
    path = folder / f"rows{suffix}"
    path.write_bytes(content)
    return path


def adds_up(report):
    assert report.rows == report.ok + report.with_errors + report.with_warnings
    return report


def test_every_kind_of_finding_has_a_row_here():
    assert BAD.keys() == CHECKS.keys()
    assert {kind for _, kind in KIND_OF_REASON} <= CHECKS.keys()


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_gives_its_finding_and_no_other(tmp_path, kind):
    content, suffix, row, column, options = BAD[kind]
    options = dict(options)
    others = options.pop("also", set())
    path = written(tmp_path, content, suffix)
    if options.get("settings", {}).get("model"):
        (tmp_path / "refusing.jinja").write_text(REFUSING)
        options["settings"] = {"model": {"chat_template": str(tmp_path / "refusing.jinja")}}
    report = adds_up(api.validate(str(path), **options))
    assert set(report.counts) - others == {kind}
    assert report.counts[kind] == 1
    [found] = [finding for finding in report.findings if finding.kind == kind]
    place = (found.source, found.row, found.column, found.severity)
    assert place == (path.name, row, column, CHECKS[kind].severity)
    assert found.message
    assert found.fix
    assert report.has_errors is (CHECKS[kind].severity == "error" or bool(others))
    assert KEY not in json.dumps(report.as_dict())


@pytest.mark.parametrize("kind", BAD)
def test_the_cleaned_copy_has_no_errors_and_its_ledger_every_row(tmp_path, kind):
    content, suffix, _, _, options = BAD[kind]
    path = written(tmp_path, content, suffix)
    before = path.read_bytes()
    model = options.get("model")
    settings = {} if kind == "template" else options.get("settings", {})
    report = api.validate(str(path), model=model, settings=settings, fix=True)
    assert path.read_bytes() == before
    fixed = report.fixed
    if not fixed or not fixed["file"]:
        assert kind in ("unreadable", "undetected", "unusable")
        assert {p.name for p in tmp_path.iterdir()} == {path.name}
        return
    entries = [json.loads(line) for line in Path(fixed["ledger"]).read_text().splitlines()]
    assert len(entries) == report.rows == fixed["kept"] + fixed["mended"] + fixed["dropped"]
    kept = [entry for entry in entries if entry["fate"] != "dropped"]
    assert all(entry["what"] for entry in entries if entry["fate"] != "kept")
    assert len(Path(fixed["file"]).read_text().splitlines()) == len(kept)
    again = adds_up(api.validate(fixed["file"], model=model, settings=settings))
    assert not again.has_errors
    assert kind not in again.counts or "is kept" in CHECKS[kind].mended
    with pytest.raises(DataError, match="already"):
        api.validate(str(path), fix=True)


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"role": "user", "content": "q", "train": True}, "'train' is for answers"),
        ({"role": "user", "content": "q", "contentt": "r"}, "is 'content' meant"),
        ({"role": "user", "content": "q", "weight": 0, "id": 7, "refusal": None, "roel": None}, None),
    ],
)
def test_keys_of_messages_that_nobody_reads(tmp_path, turn, expected):
    found = api.validate(
        str(
            written(tmp_path, lines({"messages": [turn, {"role": "assistant", "content": "a", "weight": 1}]}))
        )
    ).findings
    assert [f.kind for f in found] == (["ignored_key"] if expected else [])
    assert not expected or expected in found[0].message


@pytest.mark.parametrize(
    "row",
    [
        {**turns(("user", "a"), ("assistant", "b")), "tools": [{"function": {"name": "f", "description": KEY}}]},
        {**turns(("user", "a"), ("assistant", "b")), "tools": json.dumps([{"name": "f", "description": KEY}])},
        {"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}],
         "rejected": [{"role": "assistant", "content": "c", "reasoning_content": f"It is {KEY}."}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "thinking": KEY}]},
    ],
    ids=["schema", "schema as text", "rejected reasoning", "reasoning"],
)  # fmt: skip
def test_secrets_are_looked_for_wherever_training_reads(tmp_path, row):
    [found] = api.validate(str(written(tmp_path, lines(row)))).findings
    assert found.kind == "secret"
    assert found.column in row


@pytest.mark.parametrize("blank", ["\u200b", " \u2060\n", "\ufeff", "\u00ad\u200d"])
@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (lambda text: {"prompt": "a", "response": text}, "empty_answer"),
        (lambda text: {"prompt": text, "response": "a"}, "empty_question"),
        (lambda text: turns(("user", "a"), ("assistant", text)), "empty_answer"),
        (lambda text: {**PREFERENCE, "rejected": [{"role": "assistant", "content": text}]}, "empty_answer"),
        (lambda text: {**RATING, "completion": [{"role": "assistant", "content": text}]}, "empty_answer"),
    ],
)
def test_characters_without_width_are_no_text(tmp_path, blank, row, kind):
    assert api.validate(str(written(tmp_path, lines(row(blank))))).counts == {kind: 1}


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_ships_has_no_errors(name):
    report = adds_up(api.validate(f"example:{name}", task=EXAMPLES[name].task))
    assert not report.has_errors
    assert report.rows == open_source(f"example:{name}").facts.count


@pytest.mark.parametrize(
    "text",
    [
        "naïve café, señor, Ärger, NÃO",
        "日本語の文",
        "a < b and c > d",
        "e-mail me @ noon",
        "skip-level",
        "ΑΒΓ",
        "Il a parlé… « CAFÉ », ÉTÉ™, der Spaß“ – Maß” und Öl°",
        "À côté: Ünlü, œuvre, Škoda, łódź, ĐÀ NẴNG, NGƯỜI, São Tomé “É” ‘Á’",
    ],
)
def test_ordinary_text_is_left_alone(tmp_path, text):
    report = api.validate(str(written(tmp_path, pair(text, text + "!"))))
    assert not report.counts


@pytest.mark.parametrize(
    "secret",
    [
        "AKIAIOSFODNN7EXAMPLE",
        "hf_" + "a" * 34,
        "ghp_" + "b" * 36,
        "github_pat_" + "c" * 30,
        "xoxb-123456789012-abcdef",
        "-----BEGIN RSA PRIVATE KEY-----",
        "AIza" + "d" * 35,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N",
        KEY,
    ],
)
@pytest.mark.parametrize(
    "row",
    [
        lambda s: turns(("user", "key?"), ("assistant", s)),
        lambda s: turns((s, "key?"), ("assistant", "x")),
        lambda s: {"prompt": "a", "completion": "b", "label": s},
        lambda s: [s],
    ],
    ids=["content", "role", "label", "no-object"],
)
def test_no_message_holds_a_secret(tmp_path, secret, row):
    content = lines(row(secret)) + f'{{"prompt": "{secret}" oops\n'.encode()
    report = api.validate(str(written(tmp_path, content)), fix=True)
    assert report.has_errors
    assert secret not in json.dumps(report.as_dict())
    assert all(secret not in path.read_text() for path in tmp_path.glob("*.ledger.jsonl"))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([("user", "a"), ("system", "b"), ("assistant", "c")], "turn 2 is the system's"),
        ([("user", "a"), ("assistant", "b"), ("assistant", "c")], "turns 2 and 3 are both the assistant's"),
        ([("user", "a"), ("tool", "b"), ("assistant", "c")], "no tool was called"),
        ([("assistant", "a"), ("user", "b"), ("assistant", "c")], "nothing was asked"),
    ],
)
def test_roles_out_of_order(tmp_path, said, expected):
    [found] = api.validate(str(written(tmp_path, lines(turns(*said))))).findings
    assert found.kind == "roles"
    assert expected in found.message


def test_calls_of_tools_are_in_order(tmp_path):
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
    }
    said = [{"role": "user", "content": "a"}, call, *[{"role": "tool", "content": "1"}] * 2]
    row = {"messages": [*said, {"role": "assistant", "content": "b"}]}
    assert not api.validate(str(written(tmp_path, lines(row)))).counts


def test_counts_go_on_where_findings_are_kept_no_more(tmp_path):
    path = written(tmp_path, lines(*({"prompt": f"question {n} of many", "response": ""} for n in range(50))))
    report = adds_up(api.validate(str(path), limit=3))
    assert report.counts == {"empty_answer": 50}
    assert [finding.row for finding in report.findings] == [1, 2, 3]


def test_several_processes_find_what_one_finds(tmp_path, monkeypatch):
    rows = [
        turns(("user", f"question {n % 37}"), ("assistant", "" if n % 10 == 0 else f"answer {n % 41}"))
        for n in range(300)
    ]
    content = lines(*rows[:100]) + b"\n\n{broken\n\xff\n" + lines(*rows[100:])
    path = written(tmp_path, content)
    alone = api.validate(str(path), processes=1).as_dict()
    monkeypatch.setattr(pieces, "BYTES", 1500)
    monkeypatch.setattr(pieces, "ROWS", 20)
    assert api.validate(str(path), processes=1).as_dict() == alone
    assert api.validate(str(path), processes=2).as_dict() == alone
    assert {f["row"] for f in alone["findings"] if f["kind"] in ("unparsable", "not_utf8")} == {103, 104}
    fixed = api.validate(str(path), processes=2, fix=True).fixed
    assert fixed["kept"] + fixed["dropped"] == 302
    as_csv = tmp_path / "rows.csv"
    as_csv.write_text(
        "prompt,response\n" + "".join(f"question {n},{'' if n % 9 else n}\n" for n in range(200))
    )
    assert (
        api.validate(str(as_csv), processes=2).as_dict() == api.validate(str(as_csv), processes=1).as_dict()
    )


def test_the_whole_round_trip_or_nothing_is_repaired(tmp_path):
    path = written(tmp_path, pair("Which cafÃ© â€“ and when?", "The cafÃ© and the 日本 one."))
    fixed = api.validate(str(path), fix=True).fixed
    row = json.loads(Path(fixed["file"]).read_text().splitlines()[1])
    assert row == {"prompt": "Which café – and when?", "response": "The cafÃ© and the 日本 one."}


def fixed_lines(path, **options):
    """The cleaned copy's rows and its ledger's entries."""
    fixed = api.validate(str(path), fix=True, **options).fixed
    return [
        [
            json.loads(line, parse_constant=pytest.fail)
            for line in Path(fixed[name]).read_text().split("\n")
            if line
        ]
        if fixed[name]
        else []
        for name in ("file", "ledger")
    ]


def weighed(*weights):
    said = turns(("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two"))
    for turn, weight in zip(said["messages"][1::2], weights, strict=True):
        turn |= {} if weight is None else {"weight": weight}
    return said


SQL = {"schema": "CREATE TABLE t (a int)", "question": "How many?", "query": "SELECT count(*) FROM t"}


@pytest.mark.parametrize(
    "rows",
    [
        [weighed(1, 0), weighed(0, 1), weighed(None, None)],
        [{**SQL, "setup": "INSERT INTO t VALUES (1)"}, {**SQL, "setup": "INSERT INTO t VALUES (2)"}],
        [{**SQL, "database": "a"}, {**SQL, "database": "b"}],
        [
            {"messages": [{"role": "user", "content": "a"}, CALL, {"role": "tool", "content": "1", "name": name},
                          {"role": "assistant", "content": "b"}]}
            for name in ("f", "g")
        ],
    ],
    ids=["weights", "setup", "database", "tool"],
)  # fmt: skip
def test_rows_that_are_trained_or_scored_otherwise_are_no_copies(tmp_path, rows):
    report = api.validate(str(written(tmp_path, lines(*rows))))
    assert "duplicate" not in report.counts
    kept, ledger = fixed_lines(written(tmp_path, lines(*rows, {**rows[0], "id": 7})))
    assert kept == rows
    assert [entry["fate"] for entry in ledger] == ["kept"] * len(rows) + ["dropped"], (
        "a copy is one all the same"
    )


def test_a_quote_that_is_never_closed_costs_its_own_row_only(tmp_path):
    said = [f"q{n},a{n}" for n in range(100)]
    said[3] = 'q3,"a3'
    said[60] = 'q60,"a60, and more"'
    path = written(tmp_path, "\n".join(["prompt,response", *said]).encode(), ".csv")
    kept, ledger = fixed_lines(path)
    assert [row["prompt"] for row in kept] == [f"q{n}" for n in range(100) if n != 3]
    assert kept[59]["response"] == "a60, and more"
    assert len(ledger) == 100
    assert "line 5" in ledger[3]["what"]
    with pytest.raises(DataError, match="1 broken row") as error:
        list(open_source(str(path)).records)
    assert ledger[3]["row"] == 4
    assert "row 4: " in error.value.found
    assert "line 5 of the file" in error.value.found
    # An answer of several lines that is cut off is no rows: it is one broken row, and its lines are named.
    path = written(tmp_path, b'prompt,response\nq,a\nr,"a poem\nof lines\nwithout, end\n', ".csv")
    (tmp_path / "rows.clean.jsonl").unlink()
    (tmp_path / "rows.clean.jsonl.ledger.jsonl").unlink()
    kept, ledger = fixed_lines(path)
    assert [row["prompt"] for row in kept] == ["q"]
    assert "lines 3 to 5" in ledger[1]["what"]


def test_a_quote_closed_many_rows_later_is_said_in_training_too(tmp_path):
    path = written(tmp_path, BAD["swallowed"][0], ".csv")
    notes = data.prepare(Data(dataset=str(path), cache=False)).notes
    assert any("1 row of a CSV file has a cell whose lines look like rows" in note for note in notes)
    poem = (
        'prompt,response\nWrite a poem.,"' + "\n".join("a b, c" if n % 2 else "d" for n in range(9)) + '"\n'
    )
    assert not api.validate(str(written(tmp_path, poem.encode(), ".csv"))).counts


def test_what_json_has_no_form_of_is_said_to_be_written_otherwise(tmp_path):
    import datetime
    import decimal

    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows = [
        {**GOOD[0], "when": datetime.datetime(2020, 1, 2), "much": decimal.Decimal("1.10"), "share": 0.5, "raw": None},
        {**GOOD[1], "when": None, "much": None, "share": float("nan"), "raw": None},
        {**GOOD[2], "when": None, "much": None, "share": 1.0, "raw": b"\x00\xff"},
    ]  # fmt: skip
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    kept, ledger = fixed_lines(path)
    assert [(row["when"], row["much"], row["share"]) for row in kept] == [
        ("2020-01-02 00:00:00", "1.10", 0.5),
        (None, None, None),
    ]
    assert [(entry["fate"], entry["what"]) for entry in ledger] == [
        ("mended", "Decimal written as text; datetime written as text"),
        ("kept", None),
        ("dropped", "unusable: column raw has bytes, which JSON cannot hold"),
    ]


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_what_is_no_number_is_no_value_in_training_and_in_the_cleaned_copy(tmp_path, number):
    path = written(tmp_path, lines(*GOOD) + f'{{"prompt": "What is 0/0?", "response": {number}}}\n'.encode())
    trained = data.prepare(Data(dataset=str(path)))
    assert dict(trained.reasons.counts()) == {"no value for response": 1}
    assert [entry["fate"] for entry in fixed_lines(path)[1]] == [*["kept"] * len(GOOD), "dropped"]


@pytest.mark.parametrize(
    "text",
    [
        "Why does my page show Ã© in place of an accent?",
        "The bytes of é were read as Latin-1, which gives Ã©.",
        'My editor shows "cafÃ©" today.',
        "That is UTF-8: cafÃ©.",
    ],
)
def test_text_about_mojibake_is_left_as_it_is(tmp_path, text):
    kept, ledger = fixed_lines(written(tmp_path, pair(text, "Yes.")))
    assert kept[1]["prompt"] == text
    assert ledger[1]["fate"] == "kept"


ABROAD = {
    "Russian": "привет, мир",
    "Greek": "καλημέρα σε όλους",
    "Turkish": "ışık ve güneş",
    "Polish": "dzień dobry, źdźbło i łąka",
    "Czech": "příliš žluťoučký kůň",
    "Chinese": "今天天气很好",
    "Japanese": "日本語の文です",
    "Arabic": "مرحبا بالعالم",
}


@pytest.mark.parametrize("language", ABROAD)
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_mojibake_of_every_script_is_found_and_repaired(tmp_path, language, encoding):
    text = ABROAD[language]
    # What a lenient reader makes of bytes: Windows-1252 where it has a character, Latin-1 for its five gaps.
    wrong = "".join(
        bytes([byte]).decode(encoding, "replace").replace("\ufffd", chr(byte)) for byte in text.encode()
    )
    path = written(tmp_path, pair("What now?", wrong))
    assert api.validate(str(path)).counts == {"mojibake": 1}
    kept, ledger = fixed_lines(path)
    assert kept[1]["response"] == text
    assert ledger[1]["what"] == "mojibake repaired"
    whole = tmp_path / "whole.jsonl"
    whole.write_bytes(pair("What now?", text))
    assert not api.validate(str(whole)).counts


def test_named_splits_are_not_put_into_one_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"train": GOOD, "test": GOOD[:1]}))
    with pytest.raises(DataError, match="rows for held_out and train"):
        api.validate(str(path), fix=True)
    assert [f.kind for f in api.validate(str(path)).findings] == ["duplicate"]


def test_lengths_are_estimated_or_counted(tmp_path):
    path = written(tmp_path, pair("What now?", LONG_WORDS))
    guessed, counted = (api.validate(str(path), model=model).lengths for model in (None, TINY_MODEL))
    assert "estimated" in guessed["unit"]
    assert counted["unit"] == "tokens"
    assert counted["shortest"] <= counted["median"] <= counted["longest"]


def test_what_would_be_cut_is_told(tmp_path):
    path = written(tmp_path, pair("What now?", LONG_WORDS))
    settings = {"data": {"max_length": 64}}
    [guess] = api.validate(str(path), settings=settings).findings
    assert "the end of the last answer" in guess.message
    [exact] = api.validate(str(path), settings=settings, model=TINY_MODEL).findings
    assert "trained tokens would be cut" in exact.message
    path = written(tmp_path, pair(LONG_WORDS, "Yes."))
    [guess] = api.validate(str(path), settings=settings).findings
    assert "the whole last answer" in guess.message


def test_options_count_as_in_training(tmp_path):
    path = str(written(tmp_path, pair(LONG_WORDS, "Yes.")))

    def found(model=TINY_MODEL, **options):
        return api.validate(path, model=model, settings={"data": {"max_length": 64, **options}})

    assert found().counts == {"supervision": 1}
    for over_long in ("drop", "error"):
        assert found(over_long=over_long).counts == {"unusable": 1}
        assert (
            data_counts(path, over_long=over_long) is None
            or data_counts(path, over_long=over_long)["dropped"] == 1
        )
    assert "supervision" in found(over_long="truncate_answers").counts, (
        "nothing of the only answer would be left"
    )
    short = found(max_length=1024).lengths["shortest"]
    assert found(max_length=1024, system_prompt="Be brief and kind.").lengths["shortest"] > short + 4
    said = found(None, system_prompt="Be brief.", mix=[{"dataset": path}], group_by="prompt").notes
    for option in (
        "data.system_prompt counts in tokens only",
        "data.mix is not looked at",
        "data.group_by is not",
    ):
        assert any(option in note for note in said), option
    assert not any("data." in note for note in found().notes)


def test_rows_that_the_named_method_cannot_use_are_errors(tmp_path):
    path = str(written(tmp_path, pair("What is one?", "Red.")))
    refused = adds_up(api.validate(path, settings={"method": {"kind": "dpo"}}))
    assert (refused.rows, refused.with_errors, refused.counts) == (2, 2, {"unusable": 2})
    assert all("no pair of a better and a worse answer" in found.message for found in refused.findings)
    assert adds_up(api.validate(path, settings={"method": {"kind": "sft"}})).ok == 2
    assert api.validate("example:tone", settings={"method": {"kind": "dpo"}}).with_errors == 0


def test_the_column_that_lacks_a_value_is_called_as_in_the_file(tmp_path):
    rows = [{"question": f"What is {n}?", "answer": f"Red {n}."} for n in range(30)] + [{"question": "Why?"}]
    path = written(tmp_path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    [found] = [f for f in api.validate(str(path)).findings if f.kind == "no_format"]
    assert (found.column, found.message) == ("answer", "no value for answer")


def data_counts(path, **options):
    """What training makes of the same rows; None where it stops."""
    from tunesmith import models

    section = Data(dataset=path, cache=False, validation=0, held_out=0, max_length=64, **options)
    try:
        splits = data.prepare(section)
        return data.encoded(
            splits, models.load_tokenizer(TINY_MODEL), data=section, loss_on="answers"
        ).ledger.counts()
    except DataError:
        return None


def test_answers_may_be_cut_where_the_recipe_says_so(tmp_path):
    said = turns(("user", "a"), ("assistant", "Yes."), ("user", LONG_WORDS), ("assistant", "No."))
    path = str(written(tmp_path, lines(GOOD[0], said)))
    for over_long, kind in (("truncate", "supervision"), ("truncate_answers", "long")):
        settings = {"data": {"max_length": 64, "over_long": over_long}}
        assert set(api.validate(path, model=TINY_MODEL, settings=settings).counts) == {kind}


def test_conversations_that_a_template_rewrites_are_checked_as_they_are_trained(tmp_path):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think></think>"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>{% endif %}"
    )
    (tmp_path / "rewriting.jinja").write_text(template)
    path = str(written(tmp_path, chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))))
    settings = {"model": {"chat_template": str(tmp_path / "rewriting.jinja")}}
    proof = api.validate(path, model=TINY_MODEL, settings=settings).proof
    assert proof["checks"][0]["rows"] == 3, "two conversations, one of them with two questions"


# the command line


@pytest.fixture
def invoke():
    """Run a verb with `--json`; gives exit code and the JSON object."""
    from typer.testing import CliRunner

    from tunesmith.cli import app

    def run(*arguments):
        result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        return result.exit_code, json.loads(result.stdout.strip().splitlines()[-1])

    return run


def test_exit_codes_and_json(tmp_path, invoke):
    path = written(tmp_path, lines(*GOOD))
    code, said = invoke("validate", path, "--task", "chat")
    assert (code, said["exit_code"], said["rows"]["ok"]) == (0, 0, 3)
    code, said = invoke("validate", "--dataset", path, "--task", "chat")
    assert code == 0
    path.write_bytes(lines(*GOOD) + b"{\n")
    code, said = invoke("validate", path, "--fix", "--output", tmp_path / "out.jsonl")
    assert (code, said["counts"], said["fixed"]["kept"]) == (0, {"unparsable": 1}, 3)
    assert said["findings"][0]["row"] == 4
    assert invoke("validate", tmp_path / "out.jsonl")[0] == 0
    assert invoke("validate", tmp_path / "none.jsonl")[0] == 1
    assert invoke("validate")[0] == 1
    assert invoke("validate", path, "--output", "x.jsonl")[0] == 1
    assert invoke("validate", path, "--format", "chats")[0] == 1


def test_people_see_places_and_remedies(tmp_path):
    from typer.testing import CliRunner

    from tunesmith.cli import app

    result = CliRunner().invoke(app, ["validate", str(written(tmp_path, pair("[bold]?", "\0")))])
    assert result.exit_code == 0
    assert "rows.jsonl:2 response" in result.stdout
    assert "do: Remove it." in result.stdout
    assert "rows      2 = 1 ok + 0 with errors + 1 with warnings only" in result.stdout


# whatever a file holds

LIBERAL = settings(
    max_examples=int(os.environ.get("TUNESMITH_FUZZ", "60")), deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@LIBERAL
@given(file=files())
def test_no_file_gives_a_traceback_and_every_row_is_counted(tmp_path, file, invoke):
    suffix, content = file
    path = written(tmp_path, content, suffix)
    copy = tmp_path / "copy.jsonl"
    for old in tmp_path.glob("copy.*"):
        old.unlink()
    code, said = invoke("validate", path, "--fix", "--output", copy)
    assert code in (0, 1)
    assert "error" not in said, said["error"]
    rows = said["rows"]
    assert rows["rows"] == rows["ok"] + rows["with_errors"] + rows["with_warnings"]
    counted = rows_of(path)
    if counted is None:
        assert {"unreadable", "unparsable", "undetected"} & said["counts"].keys() or suffix in (
            ".csv",
            ".json",
        )
    else:
        assert rows["rows"] == counted
    assert code == (said["findings_by_severity"]["error"] > 0 and not copy.exists())
    if copy.exists():
        assert (
            said["fixed"]["rows"]
            == rows["rows"]
            == len(Path(said["fixed"]["ledger"]).read_text().splitlines())
        )
        code, again = invoke("validate", copy)
        assert code == 0, again["findings"]


@LIBERAL
@given(file=files(), beside=st.booleans())
def test_preparing_any_file_gives_examples_or_an_error_of_ours(tmp_path, file, beside, tiny_tokenizer):
    from tunesmith.data.inspection import inspect_rows
    from tunesmith.methods.sft import imitated

    suffix, content = file
    path = written(tmp_path, content, suffix)
    other = tmp_path / "other.jsonl"
    other.write_bytes(lines(*GOOD))
    mix = [{"dataset": str(other)}] if beside else []
    section = Data(dataset=str(path), cache=False, on_breach="drop", mix=mix)
    counted = rows_of(path)
    try:
        splits = data.prepare(section, imitated)
        fates = splits.ledger.counts()
        assert counted is None or fates["rows_in"] == counted + len(GOOD) * beside
        looked_at = inspect_rows(splits, tiny_tokenizer, max_length=100, loss_on="answers", count=2)
        assert all(seen.pieces for seen in looked_at)
        made = data.encoded(splits, tiny_tokenizer, data=section, loss_on="answers")
    except TunesmithError:
        return
    counts = made.ledger.counts()
    assert counts["rows_in"] == fates["rows_in"] == sum(1 for _ in made.ledger.entries)
    assert counts["rows_in"] == sum(counts[fate] for fate in ("train", "validation", "held_out", "dropped"))


# what a first user found


def kinds(report):
    return {finding.kind: finding for finding in report.findings}


def test_an_empty_chosen_answer_is_found_in_its_column(tmp_path):
    path = written(tmp_path, lines(PREFERENCE, {**PREFERENCE, "chosen": ""}, {**PREFERENCE, "rejected": " "}))
    found = api.validate(str(path)).findings
    assert [(f.kind, f.row, f.column) for f in found] == [
        ("empty_answer", 2, "chosen"),
        ("empty_answer", 3, "rejected"),
    ]


@pytest.mark.parametrize(
    ("rejected", "is_same"),
    [
        ("Four. \n", True),
        (" Four.", True),
        ("F our.", False),
        ("Four!", False),
    ],
)
def test_white_space_makes_no_better_answer(tmp_path, rejected, is_same):
    path = written(tmp_path, lines({**PREFERENCE, "rejected": rejected}))
    assert ("same_answers" in api.validate(str(path)).counts) is is_same


def test_indentation_makes_a_better_answer(tmp_path):
    chosen = "for x in y:\n    a(x)\nb()"
    row = {**PREFERENCE, "chosen": chosen, "rejected": "for x in y:\n    a(x)\n    b()"}
    assert not api.validate(str(written(tmp_path, lines(row)))).has_errors


def test_a_row_of_another_format_than_nearly_all_is_found(tmp_path):
    rows = [{"instruction": f"Name {n}", "input": "", "output": f"number {n * 7}"} for n in range(19)]
    odd = {"instruction": None, "input": "Name the last", "output": "none"}
    found = kinds(api.validate(str(written(tmp_path, lines(*rows, odd)))))["other_format"]
    assert found.row == 20
    assert "read as 'input_output', where 19 of 20 rows are 'instruction'" in found.message
    mixed = api.validate(str(written(tmp_path, lines(*rows[:10], odd))))
    assert "other_format" not in mixed.counts


def test_every_secret_of_a_row_is_told(tmp_path):
    other = "hf_" + "z" * 34
    mails = " ".join(f"a{n}@example.com" for n in range(8))
    report = api.validate(str(written(tmp_path, pair(f"{KEY} {mails}", f"{KEY} or {other} <s>x</s>"))))
    found = kinds(report)
    assert found["secret"].message.count("an API key") == 2
    assert "response, a Hugging Face token" in found["secret"].message
    assert found["secret"].column == "prompt"
    assert found["email"].message.endswith("and 3 more")
    assert "<s> at character" in found["special_token"].message
    assert "</s> at character" in found["special_token"].message
    assert KEY not in json.dumps(report.as_dict())
    assert other not in json.dumps(report.as_dict())


def test_with_a_model_the_tokens_of_other_templates_are_found_too(tmp_path):
    path = written(tmp_path, pair("[INST] What now?", "Nothing."))
    assert api.validate(str(path), model=TINY_MODEL).counts == {"special_token": 1}


def test_estimates_count_tools_and_the_frames_of_turns(tmp_path):
    row = turns(("user", "a"), ("assistant", "b"))
    tool = {"type": "function", "function": {"name": "f", "description": "word " * 200, "parameters": {}}}
    call = {"function": {"name": "f", "arguments": {"text": "x" * 400}}}
    called = [row["messages"][0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    for name, said in (("bare", row), ("tools", {**row, "tools": [tool]}), ("calls", {"messages": called})):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(said))
    bare, tools, calls = (
        api.validate(str(tmp_path / f"{name}.jsonl")).lengths["longest"]
        for name in ("bare", "tools", "calls")
    )
    counted = api.validate(str(tmp_path / "bare.jsonl"), model=TINY_MODEL).lengths["longest"]
    assert counted / 2 < bare <= 2 * counted
    assert tools > bare + 250
    assert calls > bare + 100


def test_what_is_too_long_is_said_once_and_right(tmp_path):
    path = written(tmp_path, pair("What now?", LONG_WORDS))
    settings = {"data": {"max_length": 64}}
    for model in (None, TINY_MODEL):
        [found] = api.validate(str(path), settings=settings, model=model).findings
        assert "of which the first 64 are kept" in found.message
        assert ("estimated" in found.message) is (model is None)
    assert "estimated at" not in CHECKS["long"].about


def ledger(fixed):
    return [json.loads(line) for line in Path(fixed["ledger"]).read_text().splitlines()]


def test_the_ledger_says_what_remains(tmp_path):
    rows = [
        {"prompt": "Which cafÃ©?", "response": "lost \ufffd here"},
        {"prompt": "Who?", "response": "jo@example.com"},
        {"prompt": "Which?"},
        GOOD[0],
        GOOD[0],
    ]
    entries = ledger(api.validate(str(written(tmp_path, lines(*rows))), fix=True).fixed)
    assert [entry["fate"] for entry in entries] == ["mended", "kept", "dropped", "kept", "dropped"]
    assert entries[0]["what"].startswith("mojibake repaired in part; mojibake: U+FFFD")
    assert entries[1]["what"] == "email: an e-mail address (…@example.com) at character 1"
    assert entries[2]["what"] == "no_format: only prompt has a value"
    assert entries[3]["what"] is None
    assert entries[4]["what"] == "duplicate: the same as rows.jsonl:4"


def test_the_ledger_says_why_a_model_refuses_a_row(tmp_path):
    path = written(tmp_path, pair(LONG_WORDS, "Yes."))
    fixed = api.validate(str(path), model=TINY_MODEL, settings={"data": {"max_length": 64}}, fix=True).fixed
    assert ledger(fixed)[1]["what"] == "supervision: it breaches the supervision proof"


@pytest.mark.parametrize(
    ("bad", "kind", "said"),
    [
        ({"role": "user", "content": None}, "not_text", "turn 1 has null for content, not text"),
        ({"role": "user", "content": {"a": 1}}, "not_text", "turn 1 has an object for content, not text"),
        ({"role": "user", "text": "Hi"}, "not_text", "no content (content or value); its keys: role, text"),
        (
            {"speaker": "user", "text": "Hi"},
            "unknown_role",
            "no role (role or from); its keys: speaker, text",
        ),
        ({"role": "User", "content": "Hi"}, "unknown_role", "did you mean 'user'?"),
        (["user", "Hi"], "not_text", "turn 1 is a list, not an object"),
    ],
)
def test_faults_of_a_turn_are_said_in_the_words_of_json(tmp_path, bad, kind, said):
    good = turns(("user", "a"), ("assistant", "b"))
    row = {"messages": [bad, {"role": "assistant", "content": "Yes."}]}
    [found] = api.validate(str(written(tmp_path, lines(good, row)))).findings
    assert (found.kind, found.column) == (kind, "messages")
    assert said in found.message


def test_messages_that_are_text_are_called_so(tmp_path):
    good = turns(("user", "a"), ("assistant", "b"))
    [found] = api.validate(str(written(tmp_path, lines(good, {"messages": "hello"})))).findings
    assert (found.kind, found.message) == ("not_text", "messages is text, not a list of turns")


def test_blank_lines_are_counted(tmp_path, monkeypatch):
    path = written(tmp_path, lines(GOOD[0]) + b"\n" + lines(*GOOD[1:]) + b"  \n")
    assert "2 blank lines skipped" in api.validate(str(path)).notes
    monkeypatch.setattr(pieces, "BYTES", 40)
    assert "2 blank lines skipped" in api.validate(str(path)).notes
    assert not api.validate(str(written(tmp_path, lines(*GOOD)))).notes


def test_a_cut_off_last_line_is_called_so(tmp_path):
    whole = lines(*GOOD)
    [found] = api.validate(str(written(tmp_path, whole[:-12]))).findings
    assert "the file ends here: the line looks cut off" in found.message
    [found] = api.validate(str(written(tmp_path, b"{broken\n" + whole))).findings
    assert "cut off" not in found.message


def test_turns_are_not_sought_in_the_column_of_tools(tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "description": "ask jo@example.com"}}]
    said = turns(("user", "a"), ("user", "b"), ("assistant", "c"))
    found = kinds(api.validate(str(written(tmp_path, lines({"tools": tools, **said})))))
    assert found["roles"].column == "messages"
    assert found["email"].message.startswith("tool 1: ")
