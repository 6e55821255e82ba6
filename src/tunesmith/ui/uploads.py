"""A user's uploads: taken from a browser within limits, and named by nothing but their own names."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from tunesmith.errors import InputError
from tunesmith.ui.security import Limits
from tunesmith.ui.workspace import Workspace

DATA = (".csv", ".json", ".jsonl", ".parquet", ".txt")
"""Endings of data."""
LARGEST, LARGEST_TOGETHER = Limits.upload_bytes, Limits.kept_bytes
"""Bytes of an uploaded file, and of all that a workspace keeps, at most."""


def receive(sent: str, workspace: Workspace, suffixes: Sequence[str] = DATA) -> str:
    """Keep a file that a browser has sent; gives its path in the workspace. Raises InputError.

    An equal name gets a number, so that no earlier recipe's data changes under it.
    """
    path = Path(sent)
    if path.suffix.lower() not in suffixes:
        raise InputError(
            "This kind of file is not read.",
            found=repr(path.name)[:80],
            fix=f"Upload one of {', '.join(suffixes)}.",
        )
    size = path.stat().st_size
    if size > LARGEST:
        raise InputError(
            "The file is too large to upload.",
            found=f"{size:,} bytes; at most {LARGEST:,} are taken",
            fix="Put it into the workspace's folder `uploads` on the server, or train on a part of it.",
        )
    kept = sum(file.stat().st_size for file in workspace.uploads.iterdir() if file.is_file())
    if kept + size > LARGEST_TOGETHER:
        raise InputError(
            "The workspace has no room for another upload.",
            found=f"{kept:,} bytes of {LARGEST_TOGETHER:,} are taken",
            fix="Delete files in its folder `uploads`.",
        )
    place, number = workspace.inside(workspace.uploads, path.name), 1
    while place.exists():
        number += 1
        place = workspace.inside(workspace.uploads, f"{path.stem}-{number}{path.suffix}")
    shutil.copyfile(path, place)
    place.chmod(0o600)
    return str(place)


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
