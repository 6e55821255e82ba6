"""Files in object stores and on the Hub, read in pieces where they lie: what a URL names, and bytes that survive the
network's failures.

A row is named by its file and number there, as in a local folder. A file is opened again at the byte where its
connection broke or ended too early, and one that has changed since it was listed is an error.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import IO, Any, Literal, TypeVar, overload

from tunesmith.errors import DataError, MissingExtra, TunesmithError

PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "hf", "http", "https", "memory")
"""Kinds of places that are read; what they are called in a URL."""
TRIES = 6
"""How often in a row a piece is asked for."""
PAUSE = 1.0
"""Seconds before the second try; each next one waits twice as long."""
AT_ONCE = 2**20
"""Bytes that are asked for at a time when a file is read from its beginning to its end."""

OURS = (
    TunesmithError,
    ImportError,
    TypeError,
    AttributeError,
    NameError,
    AssertionError,
    NotImplementedError,
)
"""What no store and no connection raises: these go on as they are."""
LATER = (408, 425, 429)
"""Answers of HTTP between 400 and 499 after which another try may succeed."""

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


def is_url(dataset: str) -> bool:
    """Whether a data set is named by a URL, of whatever kind."""
    return "://" in dataset


@dataclass(frozen=True)
class Shard:
    """One file behind a URL; as much of a path as the readers of data files ask for."""

    filesystem: Any
    path: str
    place: str
    """Its name in the ledger: the path below what the URL has in common with the other files."""
    size: int | None
    mark: str
    """What the store says of its content: equal as long as nobody changed it."""

    @property
    def name(self) -> str:
        """The name that rows carry."""
        return self.place

    @property
    def stem(self) -> str:
        """The file's name without its ending."""
        return PurePosixPath(self.path).stem

    @property
    def suffix(self) -> str:
        """The file's ending."""
        return PurePosixPath(self.path).suffix

    @overload
    def open(self, mode: Literal["rb"]) -> IO[bytes]: ...

    @overload
    def open(self, mode: Literal["r"] = ..., *, encoding: str, errors: str | None = ..., newline: str | None = ...) -> IO[str]: ...  # fmt: skip  # noqa: E501

    def open(
        self,
        mode: str = "r",
        *,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """The file's bytes, or its text. Raises DataError where it has changed or is gone."""
        self.check()
        raw = io.BufferedReader(Steady(self), AT_ONCE)
        if mode == "rb":
            return raw
        return io.TextIOWrapper(raw, encoding=encoding, errors=errors, newline=newline)

    def read_bytes(self) -> bytes:
        """All of it."""
        with self.open("rb") as file:
            return file.read()

    def check(self) -> None:
        """Raises DataError where the file is another one than when it was listed."""
        mark = _asked(self._mark_now, self.place, f"{self.place} cannot be looked up.")
        if mark != self.mark:
            raise DataError(
                f"{self.place} changed while it was read.",
                found="the store has another file in its place"
                if mark != "gone"
                else "it is not there any more",
                fix="Start again when nothing writes to it any more.",
            )

    def _mark_now(self) -> str:
        try:
            self.filesystem.invalidate_cache()
            return _mark(self.filesystem.info(self.path))
        except FileNotFoundError:
            return "gone"


class Steady(io.RawIOBase):
    """The bytes of a remote file, whatever happens to a connection: what breaks is opened again at the next byte."""

    def __init__(self, shard: Shard) -> None:
        self.shard, self._place = shard, 0
        self._file: Any = None
        self._was_open = False

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The number of the next byte."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte, which is asked for when it is read."""
        if whence == io.SEEK_END:
            size = self.shard.size
            if size is None:
                raise io.UnsupportedOperation(f"{self.shard.place}: the store does not say how long it is")
            self._place = size + offset
        else:
            self._place = offset + (self._place if whence == io.SEEK_CUR else 0)
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fill as much of the buffer as comes at once. Raises DataError when the store does not answer any more."""
        piece = _asked(
            lambda: self._next(len(buffer)),
            f"{self.shard.place}, byte {self._place:,}",
            f"{self.shard.place} cannot be read further than byte {self._place:,}.",
        )
        buffer[: len(piece)] = piece
        self._place += len(piece)
        return len(piece)

    def _next(self, length: int) -> bytes:
        try:
            if self._file is None:
                self._file = self.shard.filesystem.open(self.shard.path, "rb", block_size=AT_ONCE)
                if self._was_open:  # the first time, Shard.open has looked
                    self.shard.check()
                self._was_open = True
            if self._file.tell() != self._place:
                self._file.seek(self._place)
            piece: bytes = self._file.read(length)
            if not piece and length and self._place < (self.shard.size or 0):
                raise EOFError(f"the store's answer ends at byte {self._place:,} of {self.shard.size:,}")
        except Exception:
            self._drop()
            raise
        return piece

    def _drop(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except Exception:  # it is broken, which is why it is closed
                logger.debug("%s: closed with an error", self.shard.place, exc_info=True)
        self._file = None

    def close(self) -> None:
        """Let the connection go."""
        self._drop()
        super().close()


def _asked(ask: Callable[[], Answer], place: str, problem: str, fix: str = "") -> Answer:
    """What a store answers, asked again where it fails: each store and each connection fails in its own types.

    Raises DataError in the end, and at once for what is missing or not allowed.
    """
    for tried in range(1, TRIES + 1):
        try:
            return ask()
        except OURS:
            raise
        except Exception as error:
            if tried == TRIES or _is_final(error):
                said = str(error).splitlines()
                times = f", {tried} times" if tried > 1 else ""
                raise DataError(
                    problem,
                    found=f"{type(error).__name__}: {said[0][:300] if said else ''}{times}",
                    fix=fix or "Start again; rows that were prepared are kept.",
                ) from error
            logger.warning("%s: %s; asked again", place, type(error).__name__)
            time.sleep(PAUSE * 2 ** (tried - 1))
    raise AssertionError("the last try returns or raises")


def _is_final(error: Exception) -> bool:
    """Whether a store has said no: there is nothing, it may not be read, or nobody is logged in."""
    if isinstance(error, FileNotFoundError | PermissionError) or "Credential" in type(error).__name__:
        return True
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        codes = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
    else:
        codes = [getattr(one, name, None) for one in (error, response) for name in ("status_code", "status", "code")]  # fmt: skip  # noqa: E501
    return any(isinstance(code, int) and 400 <= code < 500 and code not in LATER for code in codes)


def _mark(info: dict[str, Any]) -> str:
    """What tells a file from another one in its place: the store's own hash or version, else size and time."""
    for name in ("ETag", "etag", "md5Hash", "crc32c", "content_md5", "blob_id", "sha256", "generation"):
        if info.get(name):
            return f"{name}:{info[name]}"
    when = next((info[name] for name in ("LastModified", "last_modified", "mtime", "created") if name in info), "")  # fmt: skip  # noqa: E501
    return f"{info.get('size')}:{when}"


def shards(url: str, suffixes: tuple[str, ...]) -> list[Shard]:
    """The files that a URL names, in the order of their names: one, those of a folder, or those of a pattern.

    Raises DataError where there are none or the store cannot be reached, MissingExtra where its library is not there.
    """
    import fsspec

    protocol = url.partition("://")[0].lower()
    if protocol not in PROTOCOLS:
        raise DataError(
            f"'{protocol}://' is no place that data are read from.",
            found=url,
            fix="Give a path for local files, or one of "
            + " ".join(f"{name}://" for name in PROTOCOLS[:-1])
            + ".",
        )
    problem = f"{url} cannot be listed."
    fix = "Check the address, and that this machine's own credentials may read it."
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
        found = _asked(lambda: _listed(filesystem, root, suffixes), url, problem, fix)
    except ImportError as error:
        raise MissingExtra(
            _library(protocol), f"Reading {protocol}://", install=_library(protocol)
        ) from error
    except TunesmithError:
        raise
    except Exception as error:  # each store fails in its own types
        said = str(error).splitlines()
        raise DataError(
            problem, found=f"{type(error).__name__}: {said[0][:300] if said else ''}", fix=fix
        ) from error
    if not found:
        raise DataError(
            f"{url} names no data file.", found="nothing there", fix=f"Use one of {' '.join(suffixes)}."
        )
    start = _common(found)
    made = []
    for path in found:
        place = path[start:]
        info = _asked(partial(filesystem.info, path), place, f"{place} cannot be looked up.", fix)
        made.append(Shard(filesystem, path, place, info.get("size"), _mark(info)))
    return made


def _listed(filesystem: Any, root: str, suffixes: tuple[str, ...]) -> list[str]:
    filesystem.invalidate_cache()
    if any(sign in root for sign in "*?["):
        return sorted(path for path in filesystem.glob(root) if filesystem.isfile(path))
    if filesystem.isfile(root):
        return [root]
    return sorted(
        path
        for path in filesystem.find(root)
        if PurePosixPath(path).suffix.lower() in suffixes
        and not any(part.startswith((".", "_")) for part in PurePosixPath(path[len(root) :]).parts[1:])
    )


def _common(paths: list[str]) -> int:
    """How many characters of the paths are the folder that all of them lie in."""
    parents = [PurePosixPath(path).parent.parts for path in paths]
    same = 0
    for parts in zip(*parents, strict=False):
        if len(set(parts)) > 1:
            break
        same += 1
    together = str(PurePosixPath(*parents[0][:same])) if same else ""
    return len(together) + 1 if together and not together.endswith("/") else len(together)


def _library(protocol: str) -> str:
    return {
        "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
        "adl": "adlfs", "oci": "ocifs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp",
    }.get(protocol, "fsspec")  # fmt: skip
