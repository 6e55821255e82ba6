"""How much a server takes on; read by the command line without anything heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """How much a server takes on."""

    concurrency: int = 64
    """Requests that are answered at once."""
    queue: int = 256
    """Requests that wait for a place; one more is refused with 429."""
    prompt_tokens: int = 8192
    max_tokens: int = 1024
    """Of an answer: most that a request may ask for, and what it gets where it names none."""
    body_bytes: int = 1_000_000
    body_seconds: float = 30.0
    """For a request's body to arrive."""
    stalled_seconds: float = 60.0
    """For a client to take what it was sent; one that does not is cut off."""
