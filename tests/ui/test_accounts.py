"""Passwords at rest, guesses, and sessions."""

from __future__ import annotations

import hashlib
import json
import stat

import pytest

from tunesmith.errors import RecipeError
from tunesmith.ui import accounts
from tunesmith.ui.accounts import Guesses, Sessions

PASSWORD = "correct horse battery"


def test_the_file_has_hashes_only_and_is_private(tmp_path):
    file = tmp_path / "users.json"
    assert accounts.add(file, "ann", PASSWORD) is False
    assert accounts.add(file, "bob", PASSWORD) is False
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = file.read_text()
    assert PASSWORD not in text
    users = json.loads(text)["users"]
    assert users["ann"]["hash"] != users["bob"]["hash"], "salts differ"
    kept = users["ann"]
    by_hand = hashlib.scrypt(
        PASSWORD.encode(), salt=bytes.fromhex(kept["salt"]), n=32768, r=8, p=3, maxmem=2**27
    )
    assert by_hand.hex() == kept["hash"]
    read = accounts.read(file)
    assert read.is_right("ann", PASSWORD)
    assert not read.is_right("ann", PASSWORD + " ")
    assert not read.is_right("eve", PASSWORD)
    assert not read.is_right("ann", "")
    assert PASSWORD not in repr(read)
    assert kept["hash"] not in repr(read)
    assert accounts.add(file, "ann", "another password") is True
    assert accounts.read(file).is_right("ann", "another password")
    assert accounts.read(file).is_right("bob", PASSWORD)
    assert [p.name for p in tmp_path.iterdir()] == ["users.json"]


@pytest.mark.parametrize("name", ["", "Ann", "a b", "../x", "1a", "a" * 33, "a/b", "ä"])
def test_names_that_are_no_folders_are_refused(tmp_path, name):
    with pytest.raises(RecipeError, match="no name"):
        accounts.add(tmp_path / "users.json", name, PASSWORD)
    assert not (tmp_path / "users.json").exists()


def test_a_short_password_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="10 to 200"):
        accounts.add(tmp_path / "users.json", "ann", "short")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 1, "users": {}}', '{"format": 1, "users": {"../x": {}}}']
)
def test_a_file_that_is_none_is_refused(tmp_path, content):
    file = tmp_path / "users.json"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(RecipeError, match="no file of accounts"):
        accounts.read(file)


def test_a_file_that_others_read_is_refused(tmp_path):
    file = tmp_path / "users.json"
    accounts.add(file, "ann", PASSWORD)
    file.chmod(0o644)
    with pytest.raises(RecipeError, match="Others"):
        accounts.read(file)


def test_guesses_wait_and_are_forgotten():
    now = [0.0]
    guesses = Guesses(most=3, seconds=100.0, clock=lambda: now[0])
    for _ in range(3):
        assert guesses.wait("a") == 0
        guesses.wrong("a", "b")
        now[0] += 10
    assert guesses.wait("a") == pytest.approx(70)
    assert guesses.wait("b", "c") == pytest.approx(70)
    assert guesses.wait("c") == 0
    now[0] += 71
    assert guesses.wait("a") == 0


def test_sessions_end():
    now = [0.0]
    sessions = Sessions(seconds=60.0, clock=lambda: now[0])
    value = sessions.begin("ann")
    assert sessions.user(value) == "ann"
    assert sessions.user("made up by a browser") is None
    assert value not in repr(sessions._by_hash), "kept as a hash"
    sessions.end(value)
    assert sessions.user(value) is None
    other = sessions.begin("ann")
    now[0] += 61
    assert sessions.user(other) is None
