"""The pages in the order of the work: each builds its components inside its tab."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tunesmith.ui.pages import chat, data, evaluate, plan, recipe, runs, ship, train
from tunesmith.ui.shared import Shared


@dataclass(frozen=True)
class Page:
    """A tab: its name, and what fills it."""

    name: str
    build: Callable[[Shared], None]


PAGES = (
    Page("Data", data.build),
    Page("Recipe", recipe.build),
    Page("Plan", plan.build),
    Page("Train", train.build),
    Page("Evaluate", evaluate.build),
    Page("Chat", chat.build),
    Page("Ship", ship.build),
    Page("Runs", runs.build),
)
