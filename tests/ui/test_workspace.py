"""Names from a browser, and what they may reach."""

from __future__ import annotations

import os
import stat

import pytest

from tunesmith.errors import InputError, OutOfResources
from tunesmith.ui.workspace import Workspace

BAD = [
    "",
    " ",
    ".",
    "..",
    "../x",
    "a/b",
    "/etc/passwd",
    "a\\b",
    "..\\x",
    "a\0b",
    "a\nb",
    "a\x1bb",
    "a\x7f",
    "-rf",
    "--output=x",
    "x" * 201,
    "é" * 101,
    "\ud800",
    "x/",
    "./x",
    "~/../x",
]


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_is_none_is_refused(tmp_path, name):
    workspace = Workspace(tmp_path / "w")
    with pytest.raises(InputError):
        workspace.inside(workspace.runs, name)


@pytest.mark.parametrize(
    "name", ["a", "support-lora 2", "grüße.jsonl", "a..b", ".hidden", "~", "$(touch x)", "'; touch x"]
)
def test_an_ordinary_or_odd_name_stays_inside(tmp_path, name):
    workspace = Workspace(tmp_path / "w")
    assert workspace.inside(workspace.runs, name) == workspace.root / "runs" / name


def test_a_link_leads_nowhere_outside(tmp_path):
    workspace = Workspace(tmp_path / "w")
    (tmp_path / "secret").write_text("x")
    os.symlink(tmp_path / "secret", workspace.runs / "link")
    os.symlink("/", workspace.runs / "root")
    os.symlink("real", workspace.runs / "within")
    for name in ("link", "root"):
        with pytest.raises(InputError, match="outside"):
            workspace.inside(workspace.runs, name)
    assert workspace.inside(workspace.runs, "within").name == "within"
    with pytest.raises(InputError, match="outside"):
        workspace.inside(tmp_path, "secret")
    os.symlink(tmp_path, workspace.root / "exports")
    with pytest.raises(OutOfResources, match="link"):
        workspace.exports  # noqa: B018


def test_folders_are_the_servers_own(tmp_path):
    workspace = Workspace(tmp_path / "deep" / "w")
    for name in ("uploads", "recipes", "runs", "exports", "jobs", "chats", "trash"):
        assert stat.S_IMODE(getattr(workspace, name).stat().st_mode) == 0o700
