"""Looking through files for what should not be handed out: secrets, and texts that a model was trained on.

    bytes in pieces -> how secrets look -> line or byte
    text in pieces  -> as JSON and YAML would have it read -> trained texts by how they begin

Every file is read to its end with the memory of a few pieces. One whose content is compressed cannot be read this way,
and is named instead.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tunesmith.errors import TunesmithError, counted
from tunesmith.training.run import Run

PIECE = 2**22
"""Bytes that are read at once."""

LONGEST_SECRET = 4096
"""Bytes that a piece has in common with the one before: no secret is longer up to where it is known as one."""

SHORTEST_ROW = 40
"""Letters of a trained text from which on finding it in a file means something."""


@dataclass(frozen=True)
class Secret:
    """What is taken for a secret: one of `signs` stands in it, in small letters, and it looks like `pattern`."""

    what: str
    signs: tuple[bytes, ...]
    pattern: re.Pattern[bytes]


def _secret(what: str, pattern: bytes, *signs: bytes) -> Secret:
    return Secret(what, signs, re.compile(pattern))


SECRETS = (
    _secret("a Hugging Face token", rb"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}", b"hf_"),
    _secret("an OpenAI or Anthropic key", rb"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{20,}", b"sk-"),
    _secret(
        "a GitHub token",
        rb"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
        b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"github_pat_",
    ),
    _secret("a GitLab token", rb"(?<![A-Za-z0-9])glpat-[A-Za-z0-9_-]{20,}", b"glpat-"),
    _secret("an npm token", rb"(?<![A-Za-z0-9])npm_[A-Za-z0-9]{36}", b"npm_"),
    _secret("a PyPI token", rb"(?<![A-Za-z0-9])pypi-[A-Za-z0-9_-]{50,}", b"pypi-"),
    _secret("an AWS key", rb"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])", b"akia", b"asia"),
    _secret("a Google key", rb"(?<![A-Za-z0-9])AIza[A-Za-z0-9_-]{35}", b"aiza"),
    _secret("a Slack token", rb"(?<![A-Za-z0-9])xox[abprs]-[A-Za-z0-9-]{10,}", b"xox"),
    _secret("a Stripe key", rb"(?<![A-Za-z0-9])[sr]k_live_[A-Za-z0-9]{16,}", b"k_live_"),
    _secret("a signed web token", rb"(?<![A-Za-z0-9])eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}", b"eyj"),
    _secret("a private key", rb"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----", b"private key-----"),
    _secret(
        "a password in an address",
        rb"(?<=[a-z0-9])://[!-.0-9;-?A-~]{1,200}:[!-.0-9;-?A-~]{1,200}@[A-Za-z0-9_.-]",
        b"://",
    ),
    _secret(
        "a named secret",
        rb"(?i)(?:api[_-]?key|secret[_-]?key|access[_-]?key|account[_-]?key|client[_-]?secret|access[_-]?token|"
        rb"auth[_-]?token|password)\\{0,4}[\"']?\s{0,20}[:=]\s{0,20}"
        # In quotes, or as YAML and .env files have it: then only with a digit, or prose would be one.
        rb"(?:\\{0,4}[\"'][^\"'\s\\]{12,1000}\\{0,4}[\"']|(?=[A-Za-z+/=_.~-]{0,200}[0-9])[A-Za-z0-9+/=_.~-]{16,})",
        b"api_key", b"api-key", b"apikey", b"secret_key", b"secret-key", b"secretkey", b"access_key", b"access-key",
        b"accesskey", b"account_key", b"account-key", b"accountkey", b"client_secret", b"client-secret",
        b"clientsecret", b"access_token", b"access-token", b"accesstoken", b"auth_token", b"auth-token", b"authtoken",
        b"password",
    ),
)  # fmt: skip
"""Signs are sought first, which is quick: in a gigabyte of weights hardly any piece has one."""

PACKED = {
    b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "compressed by gzip", b"BZh": "compressed by bzip2",
    b"\xfd7zXZ\x00": "compressed by xz", b"\x28\xb5\x2f\xfd": "compressed by zstandard",
    b"\x04\x22\x4d\x18": "compressed by lz4", b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a rar archive",
    b"PAR1": "a Parquet table, which is compressed", b"ARROW1": "an Arrow table, which may be compressed",
}  # fmt: skip
"""How archives and tables begin: whatever is in them, no search of bytes finds it, and rows are what they are for."""

TABLES = (".parquet", ".arrow", ".feather", ".orc", ".avro")
"""How names of tables end that need not begin so."""

PICTURED = {
    b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture", b"GIF8": "a picture", b"RIFF": "a picture or sound",
    b"%PDF": "a PDF document",
}  # fmt: skip
"""How other files begin whose content no search of bytes finds."""


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    findings: tuple[str, ...]
    """Also the archives and tables, which no search of bytes sees into."""
    unread: tuple[str, ...]
    """Files, or parts of them, that could not be looked through, with the reason."""
    homes: tuple[str, ...]
    """Files that name a folder of this machine."""


def trained_texts(run: Run | None) -> list[str] | None:
    """All texts of the rows that a run was trained or validated on; None where they are not here."""
    from tunesmith import dataflow
    from tunesmith.data.examples import texts
    from tunesmith.data.splitting import TRAIN, VALIDATION

    if run is None:
        return None
    try:
        splits = dataflow.splits(run.recipe())
    except TunesmithError:
        return None
    return [text for example in splits.examples(TRAIN, VALIDATION) for text in texts(example)]


def searched(
    files: Sequence[tuple[str, Path]],
    trained: Iterable[str] | None,
    home: str,
    *,
    vouched: Collection[str] = (),
) -> Found:
    """Look through files, given as name and path. `trained` are the texts that a model learned, if they are known;
    `home` is the user's folder, whose name is looked for. `vouched` are names of archives whose content is known."""
    rows = Rows(trained) if trained is not None else None
    findings, unread, homes = list[str](), list[str](), list[str]()
    marks = [
        mark.encode() for mark in (f"{home.rstrip('/')}/", '"base_model_name_or_path": "/') if len(mark) > 1
    ]
    for name, path in files:
        with path.open("rb") as file:
            start = file.read(16)
            packed = next((why for magic, why in PACKED.items() if start.startswith(magic)), None)
            if packed is None and path.suffix in TABLES:
                packed = "a table, which may be compressed"
            reason = packed or next((why for magic, why in PICTURED.items() if start.startswith(magic)), None)
            # Also what is compressed has a name and comments outside of it.
            file.seek(0)
            found, names_home = _secrets(file, marks)
        if reason and name not in vouched:
            unread.append(f"{name}: {reason}")
            if packed:
                findings.append(f"{name}: {packed}, and cannot be looked through")
        findings += [f"{name}, {where}: {what}" for what, where in found.items()]
        if names_home:
            homes.append(name)
        if rows is None or reason:
            continue
        end, problem = _header_end(path)
        if problem:
            unread.append(f"{name}: {problem}")
        elif count := rows.count_in(_text(path, end)):
            findings.append(f"{name}: {counted(count, 'text')} that the model was trained on")
    return Found(tuple(findings), tuple(unread), tuple(homes))


def _secrets(file: BinaryIO, marks: Sequence[bytes]) -> tuple[dict[str, str], bool]:
    """What looks like a secret in a file and where, never its text; and whether one of `marks` is in it."""
    found: dict[str, str] = {}
    tail, offset, lines, is_text, is_marked = b"", 0, 1, True, False
    for piece in _pieces(file):
        is_text = is_text and b"\0" not in piece
        held = tail + piece
        for begin, part in [(0, held)] if is_text else _wordy(held):
            small = part.lower()
            for secret in SECRETS:
                if secret.what in found or not any(sign in small for sign in secret.signs):
                    continue
                if hit := secret.pattern.search(part):
                    at = begin + hit.start()
                    line = lines + held.count(10, 0, at)
                    found[secret.what] = f"line {line}" if is_text else f"byte {offset + at:,}"
        is_marked = is_marked or any(mark in held for mark in marks)
        cut = max(len(held) - LONGEST_SECRET, 0)
        lines += held.count(10, 0, cut)
        tail, offset = held[cut:], offset + cut
    return found, is_marked


WORDS = (b"://", b"key", b"secret", b"token", b"password")
"""One of them is in each named secret, in an address with a password and at the head of a private key."""
_BLOCK = 8
_AROUND = 1024


def _wordy(piece: bytes) -> list[tuple[int, bytes]]:
    """The parts of numbers and text mixed that can hold a secret, with where they begin.

    A key or token has 16 letters in a row or more, and so one aligned block of 8: numbers hardly ever look so, and a
    search of them for a dozen patterns would be 50 times slower. What is shorter has one of `WORDS` in it.
    """
    import numpy as np

    letters = np.frombuffer(piece, np.uint8, len(piece) // _BLOCK * _BLOCK)
    is_letter = ((letters >= ord("-")) & (letters <= ord("z"))).view(np.uint64)
    blocks = np.flatnonzero(is_letter == int.from_bytes(b"\1" * _BLOCK, "little")) * _BLOCK
    small = piece.lower()
    hits = np.union1d(blocks, [at for word in WORDS for at in _places(word, small)]).astype(np.int64)
    if not hits.size:
        return []
    groups = np.split(hits, np.flatnonzero(np.diff(hits) > _AROUND) + 1)
    spans = [(max(int(group[0]) - _AROUND, 0), int(group[-1]) + _AROUND) for group in groups]
    return [(begin, piece[begin:end]) for begin, end in spans]


def _places(word: bytes, text: bytes) -> Iterator[int]:
    at = text.find(word)
    while at >= 0:
        yield at
        at = text.find(word, at + len(word))


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """A file in pieces; text of two bytes a letter as UTF-8."""
    first = file.read(PIECE)
    decoder = None
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        decoder = codecs.getincrementaldecoder("utf-16")("replace")
    piece = first
    while piece:
        yield decoder.decode(piece).encode("utf-8", "replace") if decoder else piece
        piece = file.read(PIECE)


def _header_end(path: Path) -> tuple[int | None, str | None]:
    """Behind which byte a file holds numbers alone, None where none does; and why that is not known, if so."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            return 8 + int.from_bytes(file.read(8), "little"), None
    if path.suffix != ".gguf":
        return None, None
    try:
        import gguf
    except ModuleNotFoundError:
        return (
            0,
            "trained texts were not looked for in its metadata; pip install 'tunesmith[gguf]' reads them",
        )
    try:
        return int(gguf.GGUFReader(path).data_offset), None
    except (ValueError, OSError, IndexError, KeyError) as error:
        return 0, f"its metadata cannot be read: {type(error).__name__}: {error}"


def _text(path: Path, end: int | None) -> Iterator[str]:
    """The text of a file up to a byte, or to its end, in pieces."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with path.open("rb") as file:
        for piece in _pieces(file):
            yield decoder.decode(piece if end is None else piece[:end])
            if end is not None and (end := end - len(piece)) <= 0:
                return


_ESCAPE = re.compile(
    r"\\(?:(u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[0-9a-fA-F]{4})|x([0-9a-fA-F]{2})"
    r"|U([0-9a-fA-F]{8})|\r?\n[ \t]*|(.))",
    re.DOTALL,
)
_MEANT = {"n": " ", "r": " ", "t": " "}
_LONGEST_ESCAPE = 12
"""Letters of a letter that is written as a pair of surrogates."""


def plain(text: str) -> str:
    """A text with each white space as one blank."""
    return re.sub(r"\s+", " ", text)


def unescaped(text: str) -> str:
    """A text as JSON and YAML would have it read."""

    def meant(hit: re.Match[str]) -> str:
        if hit[1]:
            units = (int(part[:4], 16).to_bytes(2, "big") for part in hit[1].split("u")[1:])
            return b"".join(units).decode("utf-16-be", "replace")
        if number := hit[2] or hit[3]:
            return chr(min(int(number, 16), 0x10FFFF))
        return _MEANT.get(hit[4], hit[4]) if hit[4] else ""

    return _ESCAPE.sub(meant, text)


def _whole_escapes(text: str) -> int:
    """Up to where a text, which begins with no half of an escape, ends with none."""
    if "\\" not in text[-2 * _LONGEST_ESCAPE :]:
        return len(text)
    cut = max(len(text) - _LONGEST_ESCAPE, 0)
    for hit in _ESCAPE.finditer(text):
        if hit.start() >= cut:
            break
        if hit.end() > cut:
            return hit.start()
    return cut


class Rows:
    """Texts that were trained on, found wherever they stand in a text that comes in pieces."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.rows = {row for text in texts if len(row := plain(text).strip()) >= SHORTEST_ROW}
        self.longest = max(map(len, self.rows), default=0)
        self.lengths: dict[str, set[int]] = {}
        """By the first letters of a text, how long texts are that begin so."""
        for row in self.rows:
            self.lengths.setdefault(row[:SHORTEST_ROW], set()).add(len(row))

    def count_in(self, pieces: Iterable[str]) -> int:
        """How many of the texts stand in a text, as it is or as JSON and YAML would have it read."""
        found: set[str] = set()
        as_it_is = as_read = raw = ""
        has_escapes = False
        for piece in pieces if self.rows else ():
            if not has_escapes and "\\" in piece:
                has_escapes, as_read = True, as_it_is
            as_it_is = self._take(as_it_is, piece, found)
            if not has_escapes:
                continue
            raw += piece
            cut = _whole_escapes(raw)
            as_read, raw = self._take(as_read, unescaped(raw[:cut]), found), raw[cut:]
        self._take(as_read, unescaped(raw), found)
        return len(found)

    def _take(self, held: str, more: str, found: set[str]) -> str:
        """Look through what is there, and give what the next piece may go on with."""
        text = plain(more)
        held += text[1:] if held.endswith(" ") and text.startswith(" ") else text
        for at in range(len(held) - SHORTEST_ROW + 1):
            if lengths := self.lengths.get(held[at : at + SHORTEST_ROW]):
                found.update(row for n in lengths if (row := held[at : at + n]) in self.rows)
        return held[max(len(held) - self.longest + 1, 0) :]
