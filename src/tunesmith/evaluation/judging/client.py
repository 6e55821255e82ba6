"""One call to a model behind an endpoint, OpenAI-compatible or Anthropic's; shared by the judge and the judge reward.

A key comes from an environment variable and goes into one header: into no message, no file, no error. Other machines
are asked over https only, and no redirect is followed, as it would carry the key to another address.
"""

from __future__ import annotations

import email.utils
import ipaddress
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from tunesmith.errors import RecipeError

SHOWN = 200
"""Characters of a reply that an error shows."""
LARGEST = 8_000_000
"""Bytes of a reply that are read; no verdict is longer."""
LONGEST_WAIT = 120.0
"""Seconds between two tries at most, whatever `Retry-After` asks for."""
ANTHROPIC_VERSION = "2023-06-01"
Api = Literal["openai", "anthropic"]


@dataclass(frozen=True)
class Reply:
    """What a model said, and the tokens that the endpoint counted (None where it does not say)."""

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None


class Refused(Exception):
    """A call that gave no reply."""

    def __init__(
        self,
        said: str,
        *,
        again: bool,
        wait: float | None = None,
        hopeless: bool = False,
        charged: bool = False,
    ) -> None:
        super().__init__(said)
        self.again = again
        """Whether another try may help."""
        self.wait = wait
        """Seconds that the endpoint asks to wait."""
        self.hopeless = hopeless
        """Whether every other call would fail alike: a wrong key, an unknown model."""
        self.charged = charged
        """Whether the endpoint may have done the work, and charge for it."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *given: Any) -> None:
        """Follow none."""


@dataclass
class Endpoint:
    """A model behind an address. Raises RecipeError for an address or a key that cannot be used."""

    base_url: str
    model: str
    api: Api = "openai"
    api_key_env: str | None = None
    max_tokens: int = 1024
    temperature: float | None = 0.0
    timeout: float = 60.0
    """Seconds for a whole call."""
    max_tokens_name: str = "max_tokens"
    """What an OpenAI-compatible endpoint calls the longest reply."""
    host: str = field(init=False)
    _key: str | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        address = urlsplit(self.base_url)
        self.host = address.hostname or ""
        if address.scheme not in ("http", "https") or not self.host or address.username or address.query:
            raise RecipeError(
                f"The judge's address '{_without_user(self.base_url)}' is none.",
                fix="Give it as https://HOST/v1; a key goes into an environment variable (api_key_env).",
            )
        if address.scheme == "http" and not is_loopback(self.host):
            raise RecipeError(
                f"The judge at {self.host} would be asked over http, readable for everybody on the way.",
                fix="Use https.",
            )
        if self.api_key_env:
            self._key = _key(self.api_key_env)
        self._opener = opener(self.host)

    def call(self, messages: Sequence[Mapping[str, str]]) -> Reply:
        """The reply to a conversation. Raises Refused where there is none."""
        path, headers, body = (self._anthropic if self.api == "anthropic" else self._openai)(messages)
        request = urllib.request.Request(
            self.base_url.rstrip("/") + path,
            # Half a character, as generated text may hold, has no UTF-8; as an escape it is ASCII.
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "User-Agent": "tunesmith", **headers},
        )
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                content = _read(response, deadline)
        except urllib.error.HTTPError as error:
            raise self._http(error) from None
        except urllib.error.URLError as error:
            timed_out = isinstance(error.reason, TimeoutError)
            raise self._refused(f"{type(error).__name__}: {error.reason}", charged=timed_out) from None
        except Exception as error:  # timed out, cut off, or no HTTP: http.client has types of its own
            raise self._refused(f"{type(error).__name__}: {error}", charged=True) from None
        try:
            found = json.loads(content)
        except ValueError:
            what = "an empty body" if not content.strip() else "a body that is not JSON"
            raise self._refused(what, charged=True) from None
        try:
            return (_anthropic_reply if self.api == "anthropic" else _openai_reply)(found)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            where = "content" if self.api == "anthropic" else "choices[0].message.content"
            raise self._refused(f"a reply without {where}", charged=True) from None

    def _openai(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, dict[str, str], dict[str, Any]]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            self.max_tokens_name: self.max_tokens,
        }
        if self.temperature is not None:
            body["temperature"] = self.temperature
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return "/chat/completions", headers, body

    def _anthropic(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, dict[str, str], dict[str, Any]]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in messages if message["role"] != "system"],
            "max_tokens": self.max_tokens,
        }
        if system := "\n\n".join(m["content"] for m in messages if m["role"] == "system"):
            body["system"] = system
        if self.temperature is not None:
            body["temperature"] = self.temperature
        headers = {"anthropic-version": ANTHROPIC_VERSION, **({"x-api-key": self._key} if self._key else {})}
        return "/messages", headers, body

    def _http(self, error: urllib.error.HTTPError) -> Refused:
        try:
            said = error.read(4 * SHOWN).decode("utf-8", "replace")
        except Exception:
            said = ""
        message = f"HTTP {error.code} {error.reason}" + (
            f": {' '.join(said.split())}" if said.strip() else ""
        )
        return Refused(
            self._safe(message),
            again=error.code in (408, 409, 425, 429) or error.code >= 500,
            wait=_retry_after(error.headers.get("Retry-After", "") if error.headers else ""),
            hopeless=error.code in (401, 402, 403, 404) or 300 <= error.code < 400,
        )

    def _refused(self, said: str, *, charged: bool) -> Refused:
        return Refused(self._safe(said), again=True, charged=charged)

    def _safe(self, said: str) -> str:
        """A message cut short, without the key even where the endpoint repeats it, and without control characters,
        which a terminal would obey."""
        said = "".join(sign if sign.isprintable() else " " for sign in said)
        return (said.replace(self._key, "***") if self._key else said)[:SHOWN]


def pause(
    attempt: int, refusal: Refused, *, backoff: float, draw: Callable[[], float] = random.random
) -> float:
    """Seconds to wait after a refusal: what the endpoint asks for, else twice as long each time; up to half as
    much again by chance, so that calls refused together do not come back together."""
    wanted = refusal.wait if refusal.wait is not None else backoff * float(2**attempt)
    return min(wanted, LONGEST_WAIT) * (1 + 0.5 * draw())


def opener(host: str) -> urllib.request.OpenerDirector:
    """What asks a host: no redirect is followed, and this machine is asked through no proxy."""
    handlers: list[Any] = [_NoRedirect()]
    if is_loopback(host):
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _key(name: str) -> str:
    key = (os.environ.get(name) or "").strip()
    if not key:
        raise RecipeError(
            f"The environment variable {name}, which should hold the judge's key, is not set.",
            fix=f"Set it: export {name}=...",
        )
    if not (key.isascii() and key.isprintable()):
        raise RecipeError(f"What the environment variable {name} holds is no key: it has control characters.")
    return key


def _without_user(url: str) -> str:
    """An address as an error may show it: someone may have put a password into it."""
    scheme, mark, rest = url.partition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2].partition('?')[0]}"


def _read(response: Any, deadline: float) -> bytes:
    """The whole body before the deadline: a socket's own time-out begins anew with every byte."""
    parts, size = list[bytes](), 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if size > LARGEST:
            raise ValueError(f"a body above {LARGEST:,} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("timed out while the reply was read")
    if response.length:  # what was announced and did not come
        raise ValueError("a body that was cut off")
    return b"".join(parts)


def _retry_after(text: str) -> float | None:
    """Seconds of a `Retry-After` header, in either of its forms."""
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _openai_reply(found: Any) -> Reply:
    choice, used = found["choices"][0], found.get("usage") or {}
    text = choice["message"]["content"]
    if not isinstance(text, str | None):
        raise ValueError
    return Reply(
        text or "",
        _count(used.get("prompt_tokens")),
        _count(used.get("completion_tokens")),
        choice.get("finish_reason"),
    )


def _anthropic_reply(found: Any) -> Reply:
    text = "".join(part["text"] for part in found["content"] if part.get("type") == "text")
    used = found.get("usage") or {}
    return Reply(
        text, _count(used.get("input_tokens")), _count(used.get("output_tokens")), found.get("stop_reason")
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
