"""A run's folder in a second place that outlives the node: any folder or URL that fsspec knows.

    push: files that changed since the last time, each folder's mark last  ->  fetch: the whole folder, on another node

What is cut off by a kill is never taken for whole: a checkpoint counts only with its manifest and a best model only
with its facts, and these are removed before, and written after, the files that they speak of.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.errors import MissingExtra, RecipeError, RunError
from tunesmith.training.checkpoints import BEST, MANIFEST
from tunesmith.training.run import EVENTS, OF_NODE, close_to_others

MARKS = (MANIFEST, BEST)
"""Files without which their folder does not count."""
PASSING = (".staging", "wandb")
"""Folders of a run that are of no use on another node."""
_CHECKPOINT = re.compile(r"checkpoints/checkpoint-step-(\d+)/" + re.escape(MANIFEST))


@dataclass
class Storage:
    """The place of one run, and what was sent there by this process."""

    filesystem: Any
    root: str
    url: str
    sent: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Size and time of change of each file as it was sent, by its path in the run's folder."""

    def push(self, folder: Path) -> tuple[int, int]:
        """Copy what is new or changed, and remove what is gone; how many files that were, and their bytes.

        Raises RunError, and changes nothing, where the place holds another run.
        """
        here, there = _files(folder), set(self._found())
        if not self.sent:
            self.check(folder)
            self.sent.update(self._sent_before(folder, here, there))
        changed = {name for name, facts in here.items() if name not in there or self.sent.get(name) != facts}
        gone = there - here.keys()
        doubtful = {str(Path(name).parent) for name in changed | gone}
        marks = {name for name in there if Path(name).name in MARKS and str(Path(name).parent) in doubtful}
        for name in sorted(marks) + sorted(gone - marks):
            self.filesystem.rm_file(f"{self.root}/{name}")
            self.sent.pop(name, None)
        again = changed | (marks & here.keys())
        if "file" in self.filesystem.protocol:  # what a run holds is its owner's, here as there
            Path(self.root).mkdir(mode=0o700, parents=True, exist_ok=True)
        size = 0
        for name in sorted(again, key=lambda name: (Path(name).name in MARKS, "/" not in name, name)):
            self.filesystem.makedirs(f"{self.root}/{name}".rpartition("/")[0], exist_ok=True)
            self.filesystem.put_file(str(folder / name), f"{self.root}/{name}")
            self.sent[name] = here[name]
            size += here[name][0]
        return len(again), size

    def _sent_before(
        self, folder: Path, here: Mapping[str, tuple[int, int]], there: Set[str]
    ) -> dict[str, tuple[int, int]]:
        """What another process has sent: the files beside a mark that is there as it is here, with which they were
        whole. To copy them again would take the mark away meanwhile, and with it all that a lost node leaves."""
        found: dict[str, tuple[int, int]] = {}
        for mark in (name for name in here.keys() & there if Path(name).name in MARKS):
            if self.filesystem.cat_file(f"{self.root}/{mark}") == (folder / mark).read_bytes():
                beside = mark.removesuffix(Path(mark).name)
                found |= {name: here[name] for name in here.keys() & there if name.startswith(beside)}
        return found

    def fetch(self, folder: Path) -> int | None:
        """Bring the run back where its place is further than the folder here; the step of its newest checkpoint.

        None, and nothing is touched, where there is no run in the place, the one here is as far, or it went back to an
        earlier checkpoint since the last copy. Raises RunError where the two are not the same run.
        """
        self.check(folder)
        names = self._found()
        step = _newest(names)
        if "recipe.yaml" not in names or (folder.is_dir() and _newest(_files(folder)) >= step):
            return None
        if self._is_begun_again(folder):
            return None
        staging = folder.with_name(f".{folder.name}.fetched")
        shutil.rmtree(staging, ignore_errors=True)
        staging.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir(mode=0o700)
        for name in names:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            self.filesystem.get_file(f"{self.root}/{name}", str(staging / name))
        close_to_others(staging)
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
        return max(step, 0)

    def holds(self) -> bool:
        """Whether anything is in the place."""
        return bool(self._found())

    def check(self, folder: Path) -> None:
        """Raises RunError where the place and a folder hold two runs."""
        here, there = _identity(folder), self._identity()
        if here and there and here != there:
            raise RunError(
                f"{self.url} holds another run than {folder}.",
                found=f"runs of the same name: {there} there, {here} here",
                fix="Give the run another --name or launch.storage, or move away the one of them that is not wanted.",
            )

    def _identity(self) -> str | None:
        self.filesystem.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            recipe = self.filesystem.cat_file(f"{self.root}/recipe.yaml")
            with self.filesystem.open(f"{self.root}/{EVENTS}", "rb") as events:
                return _hashed(recipe, events.readline())
        return None

    def _is_begun_again(self, folder: Path) -> bool:
        """Whether the training of the folder here began once more after all that its place knows: the place's later
        checkpoints are then of a course that was left."""
        try:
            known, here = (
                self.filesystem.cat_file(f"{self.root}/{EVENTS}"),
                (folder / EVENTS).read_bytes(),
            )
        except FileNotFoundError:
            return False
        since = here[len(known) :] if here.startswith(known) else b""
        return any(_is_beginning(line) for line in since.splitlines())

    def _found(self) -> list[str]:
        self.filesystem.invalidate_cache()
        if not self.filesystem.exists(self.root):
            return []
        start = self.root.rstrip("/") + "/"
        return [path[len(start) :] for path in self.filesystem.find(self.root) if path.startswith(start)]


def storage(url: str, name: str) -> Storage:
    """The place of a run of this name below a folder or URL.

    Raises RecipeError for a kind of URL that nobody knows, MissingExtra for one whose package is not installed.
    """
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(f"{url.rstrip('/')}/{name}")
    except ImportError as error:
        package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
        needed = package.get(url.partition(":")[0], str(error))
        raise MissingExtra(needed, f"launch.storage={url}") from None
    except ValueError as error:
        raise RecipeError(
            f"launch.storage names a place that fsspec does not know: {url}.",
            found=str(error),
            fix="Give a folder, or a URL such as s3://bucket/runs or gs://bucket/runs.",
        ) from None
    return Storage(filesystem, root.rstrip("/"), f"{url.rstrip('/')}/{name}")


def _identity(folder: Path) -> str | None:
    """What tells a run from others of its name: its recipe and its first event with the time. Neither changes ever."""
    with contextlib.suppress(FileNotFoundError), (folder / EVENTS).open("rb") as events:
        return _hashed((folder / "recipe.yaml").read_bytes(), events.readline())
    return None


def _hashed(recipe: bytes, first: bytes) -> str:
    return hashlib.sha256(recipe + first).hexdigest()[:12]


def _is_beginning(line: bytes) -> bool:
    """Whether a line of a run's events is that of a training's beginning."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):  # cut off
        return False
    return isinstance(event, dict) and (event.get("kind"), event.get("state")) == ("state", "training")


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] not in PASSING and not OF_NODE.fullmatch(path.name):
            facts = path.stat()
            found[name.as_posix()] = (facts.st_size, facts.st_mtime_ns)
    return found


def _newest(names: Any) -> int:
    """The step of the newest checkpoint with a manifest among a run's files; -1 where there is none."""
    return max((int(found[1]) for name in names if (found := _CHECKPOINT.fullmatch(name))), default=-1)
