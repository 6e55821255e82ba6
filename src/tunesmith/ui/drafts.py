"""The recipe as a page was left with it, kept in the workspace: a reload, or another start, brings it back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.compose import Layer, check_passwords
from tunesmith.errors import InputError, RecipeError
from tunesmith.training.run import write_whole
from tunesmith.ui import form
from tunesmith.ui.workspace import Workspace

NAME = "draft.yaml"
"""The file, in the workspace's own folder."""


def keep(layer: Mapping[str, Any], workspace: Workspace) -> None:
    """Write a layer down, but for one with a password in an address, which the Recipe page complains of."""
    try:
        check_passwords(layer, "")
    except RecipeError:
        return
    place = workspace.inside(workspace.root, NAME)
    text = form.as_yaml(layer) if layer else "{}\n"
    if not place.is_file() or place.read_text(encoding="utf-8") != text:
        write_whole(place, text)


def restored(workspace: Workspace, *, since: float = 0.0) -> tuple[Layer, list[str]] | None:
    """What was kept, and what was left out of it; None where nothing was kept since then (seconds since 1970).

    It passes the walls of an imported recipe: a field that leads outside the workspace falls away. Raises
    TunesmithError for a file that is no recipe, and where what leads outside cannot be taken out.
    """
    place = workspace.inside(workspace.root, NAME)
    if not place.is_file() or place.stat().st_mtime < since:
        return None
    layer, notes = form.imported(place)
    for field, said in form.outside(layer, workspace).items():
        layer = form.without(layer, field)
        notes.append(f"{field} was left out: {said}")
    for field, said in form.outside(layer, workspace).items():
        raise InputError(f"{field}: {said}", fix="Choose data and model again.")
    return layer, notes
