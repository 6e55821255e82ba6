"""Deleting runs so that it can be undone: a move into the workspace's trash, and back."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import InputError
from tunesmith.training.run import is_run, open_run
from tunesmith.ui.jobs import Queue
from tunesmith.ui.workspace import Workspace

_NAMED = re.compile(r"(?P<name>.+)@(?P<at>\d{10,})(?:-\d+)?")


@dataclass(frozen=True)
class Thrown:
    """A run in the trash."""

    id: str
    """Its folder's name there."""
    name: str
    at: float
    """When it was thrown away, in seconds since 1970."""


def thrown(workspace: Workspace) -> list[Thrown]:
    """What lies in the trash, newest first."""
    found = [
        Thrown(path.name, match["name"], float(match["at"]))
        for path in workspace.trash.iterdir()
        if (match := _NAMED.fullmatch(path.name)) and is_run(path)
    ]
    return sorted(found, key=lambda one: one.at, reverse=True)


def delete(workspace: Workspace, name: str) -> tuple[Path, Path]:
    """Move a run into the trash; gives from where and where to.

    Raises InputError for one that is written, or that a job works on or waits for.
    """
    path = workspace.inside(workspace.runs, name)
    if not is_run(path):
        raise InputError("There is no such run.", found=repr(name[:60]), fix="Choose one of the list.")
    job = Queue(workspace.jobs).of_run(name)
    if (job and job.is_open) or open_run(path).is_locked():
        raise InputError(
            f"The run {name} is in use.",
            found=f"{job.title}: {job.state}" if job and job.is_open else "a process writes it",
            fix="Stop or cancel that first.",
        )
    place = workspace.inside(workspace.trash, f"{name}@{time.time():.0f}")
    number = 2
    while place.exists():
        place, number = place.with_name(f"{name}@{time.time():.0f}-{number}"), number + 1
    path.rename(place)
    return path, place


def undo(workspace: Workspace, id: str) -> tuple[Path, Path]:
    """Move a run back from the trash; gives from where and where to. Raises InputError where its name is taken."""
    found = _in_trash(workspace, id)
    path, place = workspace.inside(workspace.trash, found.id), workspace.inside(workspace.runs, found.name)
    if place.exists():
        raise InputError(f"There is a run {found.name} again.", fix="Delete that one first; both stay.")
    path.rename(place)
    return path, place


def empty(workspace: Workspace) -> int:
    """Remove for good what lies in the trash; gives how many runs that were."""
    found = thrown(workspace)
    for one in found:
        shutil.rmtree(workspace.inside(workspace.trash, one.id))
    return len(found)


def _in_trash(workspace: Workspace, id: str) -> Thrown:
    found = next((one for one in thrown(workspace) if one.id == id), None)
    if found is None:
        raise InputError(
            "There is no such run in the trash.", found=repr(id[:60]), fix="Choose one of the list."
        )
    return found
