"""Rows that several processes or nodes tokenize come out as one process makes them, and are not made twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tunesmith import api, dataflow, preparing
from tunesmith import data as data_room
from tunesmith.compose import compose
from tunesmith.data import cache, shares, sources
from tunesmith.errors import DataError, TunesmithError

RECIPES = {
    "sft": {"data": {"max_length": 48, "over_long": "truncate_answers"}},
    "everything": {"method": {"kind": "sft", "loss_on": "everything"}, "data": {"max_length": 48}},
    "dpo": {"method": {"kind": "dpo"}, "data": {"max_length": 64}},
}


@pytest.fixture
def asked(tiny_model_folder, tmp_path, monkeypatch):
    """A recipe of 500 rows of two files, batches and pieces of a hundred, and a cache of its own."""
    for module, name in ((shares, "PIECE"), (shares, "BATCH"), (data_room, "BATCH")):
        monkeypatch.setattr(module, name, 100)
    rows = tmp_path / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for n in range(470):
            answer = f"red {n} " + "blue " * (n % 50)
            row = {"prompt": f"count {n}", "chosen": answer, "rejected": f"two {n}"}
            file.write(
                json.dumps(row if n % 97 else {"prompt": f"x {n}", "chosen": "", "rejected": "a"}) + "\n"
            )
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"prompt": f"more {n}", "chosen": "yes", "rejected": "no"}) + "\n" for n in range(30)), encoding="utf-8")  # fmt: skip  # noqa: E501

    def made(kind: str, place: str):
        monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / place))
        change = RECIPES[kind]
        data = {"dataset": str(rows), "near_duplicates": "ignore", "mix": [{"dataset": str(more)}], **change.get("data", {})}  # fmt: skip  # noqa: E501
        return compose({**change, "model": {"base": str(tiny_model_folder)}, "data": data}).recipe

    return made


def files(place: Path) -> dict[str, bytes]:
    """What is kept of the tokens in a cache, by name; notes and hashes of the code left out."""
    [folder] = [f for f in (place / "prepared").iterdir() if (f / "train.arrow").is_file()]
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != cache.FACTS}
    facts = json.loads((folder / cache.FACTS).read_text(encoding="utf-8"))
    return {**found, "facts": json.dumps({k: v for k, v in facts.items() if k != "notes"}).encode()}


@pytest.mark.parametrize("kind", ["sft", "dpo", pytest.param("everything", marks=pytest.mark.thorough)])
def test_shares_of_four_nodes_joined_are_what_one_makes(asked, tmp_path, kind):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shares, "PIECE", 10**9)
        one = api.prepare(asked(kind, "one"))
    assert (one["pieces"], one["joined"]) == (1, True)
    recipe = asked(kind, "four")
    for node in (3, 1, 4):
        told = api.prepare(recipe, share=(node, 4))
        assert (told["joined"], told["pieces"]) == (False, 5)
    assert told["missing"] == 1
    manifest = json.loads(next((tmp_path / "four/prepared").glob("*.pieces/000002/piece.json")).read_text())
    assert (manifest["first_row"], manifest["rows"]) == (200, 100)
    assert manifest["files"].keys() == {"train.arrow", "validation.arrow", "held_out.jsonl", "ledger.arrow"}
    last = api.prepare(recipe, share=(2, 4))
    assert (last["made"], last["joined"]) == (1, True)
    assert last["fingerprint"] == one["fingerprint"]
    assert last["counts"] == one["counts"]
    assert last["counts"]["dropped"] > 0
    assert files(tmp_path / "four") == files(tmp_path / "one")
    assert not list((tmp_path / "four/prepared").glob("*.pieces")), "joined pieces are gone"
    assert any("5 pieces" in note for note in last["notes"])
    again = api.prepare(recipe, share=(1, 4))
    assert (again["made"], again["joined"], again["fingerprint"]) == (0, True, one["fingerprint"])


def test_what_was_interrupted_goes_on_and_a_spoiled_piece_is_made_anew(asked, tmp_path, monkeypatch):
    recipe = asked("sft", "a")
    assert api.prepare(recipe, share=(1, 2))["made"] == 3
    [folder] = (tmp_path / "a/prepared").glob("*.pieces")
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "000002/train.arrow").write_bytes(b"x" + whole[folder / "000002/train.arrow"][1:])
    (folder / "000004/piece.json").unlink()
    assert api.prepare(recipe, share=(1, 2))["made"] == 2, "the one that was whole is not made again"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == whole
    made = []
    make = preparing.make
    monkeypatch.setattr(preparing, "make", lambda *given: made.append(given[1]) or make(*given))
    told = api.prepare(recipe)
    assert made == [100, 300]
    assert told["joined"]


def test_a_process_reads_the_source_once_for_all_of_its_pieces(asked, tmp_path, monkeypatch):
    """Not from its first row for each piece; nor does joining where every other piece is missing."""
    one = api.prepare(asked("sft", "h"))
    recipe = asked("sft", "i")
    api.prepare(recipe, share=(4, 4))
    parsed, read = sources.parsed, []

    def counted(*given, **more):
        for record in parsed(*given, **more):
            read.append(record.row)
            yield record

    monkeypatch.setattr(sources, "parsed", counted)
    assert api.prepare(recipe, share=(2, 4))["made"] == 1
    assert len(read) == 200, "no further than its only piece"
    read.clear()
    assert api.prepare(recipe, share=(1, 4))["made"] == 2
    assert len(read) == 500, "pieces 1 and 5, of 2 files"
    read.clear()
    told = api.prepare(recipe, share=(3, 4))
    assert (told["made"], told["joined"], told["fingerprint"]) == (1, True, one["fingerprint"])
    assert len(read) == 300
    again = asked("sft", "j")
    for node in (1, 3):
        api.prepare(again, share=(node, 5))
    read.clear()
    found = dataflow.encodings(again, dataflow.splits(again))
    assert found.fingerprint == one["fingerprint"]
    assert len(read) == 500, "pieces 2, 4 and 5"


def test_training_takes_what_was_prepared_and_makes_what_is_missing(asked, tmp_path):
    recipe = asked("sft", "b")
    api.prepare(recipe, share=(2, 2))
    found = dataflow.encodings(recipe, dataflow.splits(recipe))
    assert any("2 pieces of 100 rows had been tokenized before" in note for note in found.notes)
    other = api.prepare(asked("sft", "c"))
    assert found.fingerprint == other["fingerprint"]


def test_two_nodes_that_end_together_may_both_join(asked, tmp_path, monkeypatch):
    """One has joined and removed the pieces while the other reads them."""
    recipe = asked("sft", "f")
    api.prepare(recipe, share=(1, 2))
    replayed = shares.replayed
    told = []

    def overtaken(place, written):
        if not told:
            told.append(True)
            told.append(api.prepare(recipe)["fingerprint"])
        replayed(place, written)

    monkeypatch.setattr(shares, "replayed", overtaken)
    assert api.prepare(recipe)["fingerprint"] == told[1]


@pytest.mark.parametrize("folder_goes", [False, True])
def test_joining_leaves_a_node_at_work_its_folder(asked, tmp_path, monkeypatch, folder_goes):
    """One node tokenizes a piece while another, without a share, makes and joins all of them."""
    recipe, told = asked("sft", "g"), []
    api.prepare(recipe, share=(3, 4))
    rows = data_room._encode_rows

    def overtaken(*given, **more):
        if not told:
            told.append(True)
            told.append(api.prepare(recipe)["fingerprint"])
            [folder] = (tmp_path / "g/prepared").glob("*.pieces")
            assert {path.name[:8] for path in folder.iterdir()} == {".making-"}, "of the node at work"
            if folder_goes:
                shutil.rmtree(folder)
        rows(*given, **more)

    monkeypatch.setattr(data_room, "_encode_rows", overtaken)
    last = api.prepare(recipe, share=(1, 4))
    assert (last["joined"], last["missing"], last["made"]) == (True, 0, 0 if folder_goes else 1)
    assert last["fingerprint"] == told[1]
    assert not list((tmp_path / "g/prepared").glob("*.pieces"))


def test_a_breach_in_a_piece_is_told_when_the_pieces_are_joined(asked, tmp_path):
    recipe = asked("sft", "d")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"over_long": "error"})})
    for node in (1, 2):
        if node == 1:
            assert not api.prepare(recipe, share=(1, 2))["joined"]
        else:
            with pytest.raises(DataError, match="examples are longer than max_length 48"):
                api.prepare(recipe, share=(2, 2))


def test_what_cannot_be_kept_or_shared_is_refused(asked):
    recipe = asked("sft", "e")
    with pytest.raises(TunesmithError, match="no share 5 of 4"):
        api.prepare(recipe, share=(5, 4))
    uncached = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache": False})})
    with pytest.raises(TunesmithError, match="only be kept in the cache"):
        api.prepare(uncached)


@pytest.mark.thorough
def test_processes_started_anew_make_the_same(asked, tmp_path, monkeypatch):
    """Pieces as large as they are: some 46,000 rows, three pieces, two processes."""
    for module, name, size in (
        (shares, "PIECE", 20_000),
        (shares, "BATCH", 1000),
        (data_room, "BATCH", 1000),
    ):
        monkeypatch.setattr(module, name, size)
    rows = tmp_path / "rows.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    rows.write_text("".join(line.replace("count ", f"count {n} ") for n in range(98) for line in lines), encoding="utf-8")  # fmt: skip  # noqa: E501
    two = api.prepare(asked("sft", "two"), processes=2)
    assert two["made"] == 3
    shutil.rmtree(tmp_path / "two")
    one = api.prepare(asked("sft", "one"), processes=1)
    assert two["fingerprint"] == one["fingerprint"]
