"""What ships inside the package: a tiny base model and example data, all made by this project.

`README.md` in this folder says how they were made, how large they are and what was measured;
`scripts/make_tiny_model` makes them again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_HERE = Path(__file__).resolve().parent

TINY_MODEL: Path = _HERE / "tiny"
"""The folder of the base model: `AutoModelForCausalLM.from_pretrained(TINY_MODEL)` loads it."""


@dataclass(frozen=True)
class Example:
    """One example data set: where it is, what shape its rows take, and what it is good for."""

    name: str
    path: Path
    shape: Literal["Conversation", "Preference", "Rating", "Text"]
    task: Literal["chat", "code", "instruct", "domain", "custom"]
    about: str


GENERAL = _HERE / "general.jsonl"
"""Short texts of many kinds, by which it is measured what a model forgot (evaluation/forgetting.py)."""

EXAMPLES: dict[str, Example] = {
    e.name: e
    for e in (
        Example("sql", _HERE / "examples/sql.jsonl", "Conversation", "custom",
                "Questions about a database schema, answered by an SQL query that can be run."),
        Example("support", _HERE / "examples/support.json", "Conversation", "domain",
                "Questions to the support desk of a maker of lamps, and its replies."),
        Example("preferences", _HERE / "examples/preferences.jsonl", "Preference", "chat",
                "Two replies to one question: the better one is polite, right and to the point."),
        Example("tone", _HERE / "examples/tone.jsonl", "Preference", "chat",
                "Two right replies to one question, the better one courteous: a base model has no opinion on that."),
        Example("ratings", _HERE / "examples/ratings.jsonl", "Rating", "chat",
                "Replies with a thumb up or down, by the same rule as the preferences."),
        Example("code", _HERE / "examples/code.jsonl", "Conversation", "code",
                "Requests for short Python functions, each answered by one that was run."),
        Example("chat", _HERE / "examples/chat.jsonl", "Conversation", "chat",
                "Conversations about everyday things, some opened by a system message."),
    )
}  # fmt: skip
"""Name -> example data set."""
