"""What several pages use: components that outlive a page, and words that are safe to show."""

from __future__ import annotations

import html
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunesmith.errors import TunesmithError

if TYPE_CHECKING:
    import gradio as gr

PRIVATE: dict[str, Any] = {"api_visibility": "private"}
"""Of a listener: no route of the page's API."""
QUIET: dict[str, Any] = {**PRIVATE, "queue": False, "show_progress": "hidden"}
"""Of one that answers at once: it waits for no other, and shows no progress."""


@dataclass(frozen=True)
class Shared:
    """Components that several pages use; `app.py` makes them before the tabs."""

    recipe: gr.State
    """A plain dict: what the user has set, sparse, as `compose` takes it as a layer."""
    run: gr.State
    """Name of the chosen run folder under `workspace.runs`, or None."""
    plans: gr.State
    """How often a plan was asked for from another page than the plan's own."""
    apart: gr.Column
    """Where states belong whose changes are listened to: of those in a page that nobody has looked at yet, Gradio's
    browser tells a change with the first answer, also where nothing has changed."""
    tabs: gr.Tabs
    """Chosen with `gr.Tabs(selected=NAME)`; a tab's id is its page's name in small letters."""
    run_choices: list[gr.Dropdown] = field(default_factory=list)
    """The pages' lists of runs, as the pages are built."""
    clocks: dict[str, gr.Timer] = field(default_factory=dict)
    """By its page's name what ticks while the page is looked at."""


def command(argv: Sequence[str]) -> str:
    """A command as one types it into a shell; shown in a `gr.Code` or `gr.Textbox`, never run from this text."""
    return shlex.join(argv)


def problem(error: Exception) -> str:
    """The box for an error, for `gr.HTML`: what was expected, found, and what to do, all of it escaped.

    An exception that is not ours is a bug: its type is named, its text stays in the server's log.
    """
    if not isinstance(error, TunesmithError):
        return box(
            "This failed.", [f"A bug of tunesmith's: {type(error).__name__}. The log has the details."]
        )
    said = [error.found and f"Found: {error.found}", error.fix and f"What to do: {error.fix}"]
    return box(error.problem, [line for line in said if line])


def box(title: str, lines: Sequence[str] = (), *, kind: str = "problem") -> str:
    """A box with a title and lines, for `gr.HTML`, all of it escaped. Kinds: problem, note, good, warn, empty."""
    assert kind in ("problem", "note", "good", "warn", "empty")
    role = ' role="alert"' if kind == "problem" else ' role="status"'
    body = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    return f'<div class="ts-box ts-{kind}"{role}><strong>{html.escape(title)}</strong>{body}</div>'


def empty(title: str, what_to_do: str) -> str:
    """The box of a place where nothing is yet, for `gr.HTML`."""
    return box(title, [what_to_do], kind="empty")


def busy(what: str) -> str:
    """The box of what takes a while, for `gr.HTML`; a line moves in it while it is shown."""
    said = html.escape(what)
    return f'<div class="ts-box ts-busy" role="status" aria-busy="true"><strong>{said}</strong><i></i></div>'
