"""A user's folders, and the one way to a path in them: a name from a browser never leads outside."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.errors import InputError, OutOfResources
from tunesmith.ui.keys import PROVIDERS

if TYPE_CHECKING:
    import gradio as gr

SCOPE = "tunesmith.workspace"
"""Key of a request's scope under which the app leaves the user's workspace."""
LONGEST_NAME = 200
"""Bytes; file systems take 255, and files beside it have longer names."""
SHOWN = 60


@dataclass(frozen=True)
class Workspace:
    """Everything of one user: folders that only the server's own account can read."""

    root: Path
    keys: Mapping[str, str] = field(default_factory=lambda: PROVIDERS, compare=False)
    """Variables of the server that its settings may name as keys, each with the one host that may be sent it."""
    runs_code: bool = field(default=False, compare=False)
    """Whether its recipes may have the code run that models write, which whoever starts the server decides."""

    @property
    def uploads(self) -> Path:
        """Files that were uploaded."""
        return self._folder("uploads")

    @property
    def recipes(self) -> Path:
        """Recipes that were saved."""
        return self._folder("recipes")

    @property
    def runs(self) -> Path:
        """Run folders, and the folders of evaluations."""
        return self._folder("runs")

    @property
    def exports(self) -> Path:
        """Merged models, GGUF files, bundles."""
        return self._folder("exports")

    @property
    def jobs(self) -> Path:
        """The queue: what runs, what waits, what has ended."""
        return self._folder("jobs")

    @property
    def chats(self) -> Path:
        """Preference pairs from the Chat page."""
        return self._folder("chats")

    @property
    def trash(self) -> Path:
        """What was deleted and can be put back."""
        return self._folder("trash")

    def _folder(self, name: str) -> Path:
        made = self.root / name
        made.mkdir(mode=0o700, parents=True, exist_ok=True)
        if stat.S_ISLNK(made.lstat().st_mode):
            raise OutOfResources(
                f"The workspace's folder '{name}' is a link.",
                found=str(made),
                fix="Replace it by a folder: what is written there must stay in the workspace.",
            )
        return made

    def inside(self, folder: Path, name: str) -> Path:
        """The path of a thing with this name in one of the folders above, whether it exists or not.

        Raises InputError for a name that is none (separators, `..`, control characters) and for one that leads
        elsewhere through a link.
        """
        shown = repr(name[:SHOWN])
        if (
            not name.strip()
            or name in (".", "..")
            or name.startswith("-")
            or any(c in "/\\" or ord(c) < 32 or ord(c) == 127 for c in name)
            or len(name.encode("utf-8", "surrogatepass")) > LONGEST_NAME
            or not _is_text(name)
        ):
            raise InputError(
                "This is no name of a file or folder in the workspace.",
                found=shown,
                fix="Use letters, digits, spaces, dots, dashes and underscores; no slashes, no leading dash.",
            )
        path, root = folder / name, self.root.resolve()
        if not folder.resolve().is_relative_to(root) or not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(
                "This name leads outside the workspace.",
                found=shown,
                fix="Upload the file, or choose one of those in the workspace.",
            )
        return path


def _is_text(name: str) -> bool:
    try:
        os.fsencode(name)
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def workspace_of(request: gr.Request) -> Workspace:
    """The workspace of the user who asks, as the app's first layer has written it into the request's scope."""
    asked = request.request
    if asked is None or SCOPE not in asked.scope:
        raise InputError("This request did not come through the app.", fix="Reload the page.")
    found = asked.scope[SCOPE]
    assert isinstance(found, Workspace)
    return found
