"""Who may sign in: a file of names and hashed passwords, and how often somebody may guess.

A password is kept as scrypt's hash with a salt of its own, at OWASP's lowest cost of 2023 (N 2^15, r 8, p 3: 32 MiB
and some 0.2 s), so that a copied file does not give it away at once.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.errors import RecipeError

NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
SHORTEST = 10
"""Characters of a password."""
LONGEST = 200
COST = {"n": 2**15, "r": 8, "p": 3}


@dataclass(frozen=True)
class Accounts:
    """Names and hashes, as the file has them when the server starts."""

    hashes: dict[str, dict[str, Any]] = field(repr=False)

    def is_right(self, name: str, password: str) -> bool:
        """Whether this is the name's password; an unknown name takes as long as a known one."""
        known = self.hashes.get(name)
        kept = known or {"salt": "00" * 16, "hash": "", **COST}
        made = _hash(password[:LONGEST], kept)
        return hmac.compare_digest(made, str(kept["hash"])) and known is not None


def read(file: Path) -> Accounts:
    """The accounts of a file. Raises RecipeError for a file that is none, or that others may read."""
    add = f"`tunesmith web --users {file} --add-user NAME` makes it and adds an account."
    try:
        mode = file.stat().st_mode
        content = json.loads(file.read_text(encoding="utf-8"))
        users = content["users"]
        whole = content["format"] == 1 and all(
            NAME.fullmatch(name) and {"salt", "hash", "n", "r", "p"} <= set(kept)
            for name, kept in users.items()
        )
    except FileNotFoundError:
        raise RecipeError(f"There is no file of accounts at {file}.", fix=add) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{file} is no file of accounts.", found=type(error).__name__, fix=add) from None
    if not whole or not users:
        raise RecipeError(f"{file} is no file of accounts.", found="no account in its form", fix=add)
    if mode & 0o077:
        raise RecipeError(
            f"Others on this machine can read the accounts in {file}.",
            found=f"mode {mode & 0o777:03o}",
            fix=f"chmod 600 {file}",
        )
    return Accounts(users)


def add(file: Path, name: str, password: str) -> bool:
    """Add an account, or give a known one another password; whether it was known. Raises RecipeError for a name or a
    password that is none."""
    if not NAME.fullmatch(name):
        raise RecipeError(
            f"'{name}' is no name for an account.",
            fix="Use small letters, digits, dashes and underscores, a letter first, 32 at most.",
        )
    if not SHORTEST <= len(password) <= LONGEST:
        raise RecipeError(
            f"A password has {SHORTEST} to {LONGEST} characters.", found=f"{len(password)} characters"
        )
    users = read(file).hashes if file.exists() else {}
    known = name in users
    kept: dict[str, Any] = {"salt": secrets.token_hex(16), **COST}
    kept["hash"] = _hash(password, kept)
    staged = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    handle = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        json.dump({"format": 1, "users": {**users, name: kept}}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    os.replace(staged, file)
    return known


def _hash(password: str, kept: dict[str, Any]) -> str:
    made = hashlib.scrypt(
        password.encode("utf-8", "surrogatepass"),
        salt=bytes.fromhex(str(kept["salt"])),
        n=int(kept["n"]),
        r=int(kept["r"]),
        p=int(kept["p"]),
        maxmem=128 * 2**20,
    )
    return made.hex()


@dataclass
class Guesses:
    """Wrong passwords and tokens of late, by account and by address; more than a few have to wait."""

    most: int = 8
    seconds: float = 300.0
    clock: Callable[[], float] = time.monotonic
    _wrong: OrderedDict[str, list[float]] = field(default_factory=OrderedDict, repr=False)

    def wait(self, *keys: str) -> float:
        """Seconds until another guess is looked at; 0 where it is at once."""
        now = self.clock()
        waits = [0.0]
        for key in keys:
            recent = [at for at in self._wrong.get(key, ()) if now - at < self.seconds]
            if len(recent) >= self.most:
                waits.append(self.seconds - (now - recent[-self.most]))
        return max(waits)

    def wrong(self, *keys: str) -> None:
        """A guess was wrong."""
        now = self.clock()
        for key in keys:
            recent = [at for at in self._wrong.pop(key, ()) if now - at < self.seconds]
            self._wrong[key] = [*recent, now][-self.most :]
        while len(self._wrong) > 10_000:
            self._wrong.popitem(last=False)


@dataclass
class Sessions:
    """Who has signed in, by the hash of what their cookie holds; all end with the server."""

    seconds: float = 24 * 3600.0
    clock: Callable[[], float] = time.monotonic
    _by_hash: OrderedDict[str, tuple[str, float]] = field(default_factory=OrderedDict, repr=False)

    def begin(self, user: str) -> str:
        """A new cookie's value; never one that a browser brought along."""
        value = secrets.token_urlsafe(32)
        self._by_hash[_digest(value)] = (user, self.clock() + self.seconds)
        while len(self._by_hash) > 10_000:
            self._by_hash.popitem(last=False)
        return value

    def user(self, value: str) -> str | None:
        """Whose cookie this is, if it is one and has not expired."""
        user, until = self._by_hash.get(_digest(value), (None, 0.0))
        if user is not None and self.clock() > until:
            self.end(value)
            return None
        return user

    def end(self, value: str) -> None:
        """Sign out."""
        self._by_hash.pop(_digest(value), None)


def _digest(value: str) -> str:
    return hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()
