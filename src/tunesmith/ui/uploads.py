"""A user's uploads: taken from a browser within limits, and named by nothing but their own names."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import InputError
from tunesmith.ui.security import Limits
from tunesmith.ui.workspace import Workspace

DATA = (".csv", ".json", ".jsonl", ".parquet", ".txt")
"""Endings of data."""
LARGEST, LARGEST_TOGETHER = Limits.upload_bytes, Limits.kept_bytes
"""Bytes of an uploaded file, and of all that a workspace keeps, at most."""


@dataclass(frozen=True)
class Received:
    """A file of the workspace that was uploaded just now."""

    path: Path
    name: str
    """As it was sent."""
    is_new: bool
    """False where the same content was there already."""

    def said(self) -> tuple[str, list[str]]:
        """What became of it, as title and lines of a box."""
        if not self.is_new:
            again = "It has the same content, so nothing was stored again."
            return f"{self.path.name} is in your workspace already.", [again]
        if self.path.name != self.name:
            other = f"Another {self.name} is there, with other content; what was made from it stays as it is."
            return f"{self.name} is in your workspace as {self.path.name}.", [other]
        return f"{self.name} is in your workspace.", []


def receive(sent: str, workspace: Workspace, suffixes: Sequence[str] = DATA) -> Received:
    """Keep a file that a browser has sent. Raises InputError.

    An equal name gets a number, so that no earlier recipe's data changes under it; equal content is kept once.
    """
    path = Path(sent)
    if path.suffix.lower() not in suffixes:
        raise InputError(
            f"A file of this kind is not taken: {', '.join(suffixes)} are.",
            found=repr(path.name)[:80],
            fix="Convert it, or choose another file.",
        )
    size = path.stat().st_size
    if size > LARGEST:
        raise InputError(
            "The file is too large to upload.",
            found=f"{size:,} bytes; at most {LARGEST:,} are taken",
            fix="Put it into the workspace's folder `uploads` on the server, or train on a part of it.",
        )
    place, number = _place(workspace, path.name), 1
    while place.exists():
        if filecmp.cmp(path, place, shallow=False):
            return Received(place, path.name, is_new=False)
        number += 1
        place = _place(workspace, f"{path.stem}-{number}{path.suffix}")
    kept = sum(file.stat().st_size for file in workspace.uploads.iterdir() if file.is_file())
    if kept + size > LARGEST_TOGETHER:
        raise InputError(
            "The workspace has no room for another upload.",
            found=f"{kept:,} bytes of {LARGEST_TOGETHER:,} are taken",
            fix="Delete files in its folder `uploads` on the server.",
        )
    shutil.copyfile(path, place)
    place.chmod(0o600)
    return Received(place, path.name, is_new=True)


def _place(workspace: Workspace, name: str) -> Path:
    try:
        return workspace.inside(workspace.uploads, name)
    except InputError as error:
        raise InputError(
            "The file cannot be kept under its name: letters, digits, spaces, dots, dashes and underscores are taken, "
            "at most 200 bytes of them, with no dash before them.",
            found=error.found,
            fix="Rename the file and upload it again.",
        ) from None


def of_data(workspace: Workspace) -> list[tuple[str, str]]:
    """Names and paths of the uploaded data, the newest first."""
    files = [f for f in workspace.uploads.iterdir() if f.is_file() and f.suffix.lower() in DATA]
    return [(f.name, str(f)) for f in sorted(files, key=lambda f: -f.stat().st_mtime_ns)]


def names(workspace: Workspace) -> list[str]:
    """The files that were uploaded."""
    return sorted(
        path.name for path in workspace.uploads.iterdir() if path.is_file() and not path.name.startswith(".")
    )


def named(workspace: Workspace, name: str | None, *, examples: bool = False) -> str:
    """An uploaded file by its name, or `example:NAME`. Raises InputError for anything else."""
    if not name:
        raise InputError("No file is chosen.", fix="Upload it on the Data page.")
    if examples and name.startswith("example:"):
        return name
    path = workspace.inside(workspace.uploads, name)
    if not path.is_file():
        raise InputError("There is no such upload.", found=repr(name[:60]), fix="Upload it on the Data page.")
    return str(path)
