"""A request's body, as an ASGI application gets it: read whole within a limit of bytes and seconds, and given again."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any


class Gone(Exception):
    """The client left before it had asked."""


class TooLarge(Exception):
    """The body has more bytes than allowed."""


class TooSlow(Exception):
    """The body did not arrive in time."""


def announced(headers: Mapping[bytes, bytes]) -> int:
    """Bytes that a request says its body has; 0 where it does not say."""
    length = headers.get(b"content-length", b"0")
    return int(length[:20]) if length.isdigit() else 0


async def whole(headers: Mapping[bytes, bytes], receive: Any, *, most: int, seconds: float) -> bytes:
    """The body. Raises TooLarge as soon as that shows, TooSlow and Gone."""
    if announced(headers) > most:
        raise TooLarge
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                part = message.get("body", b"")
                size += len(part)
                if size > most:
                    raise TooLarge
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise TooSlow from None


def again(body: bytes, receive: Any) -> Any:
    """What receives the body that was read, and then whatever else the client sends."""
    given = False

    async def replay() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
