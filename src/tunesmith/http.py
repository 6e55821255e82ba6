"""Requests to a server, for all that is asked over a network: judges, judge rewards, engines.

A key comes from an environment variable or the system's keyring, and goes into one header: into no message, no file,
no error. Other machines are asked over https only, and no redirect is followed, as it would carry the key to another
address. A reply has a largest size and one deadline for all of it, however it drips.
"""

from __future__ import annotations

import email.utils
import functools
import http.client
import importlib.util
import io
import ipaddress
import json
import os
import random
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tunesmith.errors import RecipeError

SHOWN = 200
"""Characters of a server's words that an error repeats."""
READ = 65_536
"""Bytes that are read of a reply that is an error."""
LARGEST = 16_000_000
"""Bytes of a reply at most; no verdict and no answer's token ids are longer."""
LONGEST_WAIT = 120.0
"""Seconds between two tries at most, whatever `Retry-After` asks for."""
NOT_BEGUN = (503, 529)
"""Server errors that say that nothing was done: overloaded. After the others it may have been, and be charged."""


class Refused(Exception):
    """A request that gave no reply."""

    def __init__(
        self,
        said: str,
        *,
        again: bool,
        wait: float | None = None,
        hopeless: bool = False,
        charged: bool = False,
        code: int = 0,
    ) -> None:
        super().__init__(said)
        self.again = again
        """Whether another try may help."""
        self.wait = wait
        """Seconds that the server asks to wait."""
        self.hopeless = hopeless
        """Whether every other request would fail alike: a wrong key, an unknown model."""
        self.charged = charged
        """Whether the server may have done the work, and charge for it."""
        self.code = code
        """HTTP status; 0 where there is none."""


@dataclass
class Remote:
    """A server that is asked by `post`. Raises RecipeError for an address or a key that cannot be used."""

    base_url: str
    who: str = "the server"
    """Whose address it is, as errors call it."""
    setting: str = "base_url"
    """Where the address is set, as errors call it."""
    api_key_env: str | None = None
    timeout: float = 30.0
    """Seconds for a whole request, to the last byte of its reply."""
    key_header: str = "Authorization"
    """Header of the key; in this one it follows the word `Bearer`."""
    host: str = field(init=False)
    _key: str | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        who = self.who[0].upper() + self.who[1:]
        try:
            address = urlsplit(self.base_url)
            self.host, port = address.hostname or "", address.port
        except ValueError:
            address, self.host, port = urlsplit(""), "", None
        unusable = address.username or address.query or address.fragment or port == 0
        if address.scheme not in ("http", "https") or not self.host or unusable:
            raise RecipeError(
                f"{who}'s address '{_without_user(self.base_url)}' is none.",
                fix=f"Give {self.setting} as https://HOST/v1; a key goes into an environment variable (api_key_env).",
            )
        if address.scheme == "http" and not is_loopback(self.host):
            raise RecipeError(
                f"{who} at {self.host} would be asked over http, readable for everybody on the way.",
                fix="Use https.",
            )
        if self.api_key_env:
            self._key = _key(self.api_key_env, self.who)
        self._opener = _opener(self.host)

    def post(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Any:
        """The JSON that the server gives to a request of JSON. Raises Refused where there is none."""
        sent = {"Content-Type": "application/json", "User-Agent": "tunesmith", **(headers or {})}
        if self._key:
            sent[self.key_header] = ("Bearer " if self.key_header == "Authorization" else "") + self._key
        # Half a character, as generated text may hold, has no UTF-8; as an escape it is ASCII.
        request = urllib.request.Request(self.base_url.rstrip("/") + path, json.dumps(body).encode(), sent)
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                content = _read(response)
        except urllib.error.HTTPError as error:
            with error:
                raise self._http(error) from None
        except urllib.error.URLError as error:
            timed_out = isinstance(error.reason, TimeoutError)
            raise self.refused(f"{type(error).__name__}: {error.reason}", charged=timed_out) from None
        except Exception as error:  # timed out, cut off, or no HTTP: http.client has types of its own
            raise self.refused(f"{type(error).__name__}: {error}") from None
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            what = "an empty body" if not content.strip() else "a body that is not JSON"
            raise self.refused(what) from None

    def refused(self, said: str, *, charged: bool = True) -> Refused:
        """A refusal that another try may mend."""
        return Refused(self._safe(said), again=True, charged=charged)

    def _http(self, error: urllib.error.HTTPError) -> Refused:
        try:
            said = error.read(READ).decode("utf-8", "replace")
        except Exception:
            said = ""
        message = f"HTTP {error.code} {error.reason}" + (f": {said}" if said.strip() else "")
        return Refused(
            self._safe(message),
            again=error.code in (408, 409, 425, 429) or error.code >= 500,
            wait=_retry_after(error.headers.get("Retry-After", "") if error.headers else ""),
            hopeless=error.code in (401, 402, 403, 404) or 300 <= error.code < 400,
            charged=error.code >= 500 and error.code not in NOT_BEGUN,
            code=error.code,
        )

    def _safe(self, said: str) -> str:
        """A message cut short, without the key even where the server repeats it, and without control characters,
        which a terminal would obey."""
        said = said.replace(self._key, "***") if self._key else said
        said = " ".join("".join(sign if sign.isprintable() else " " for sign in said).split())
        return (said.replace(self._key, "***") if self._key else said)[:SHOWN]


def pause(
    attempt: int, refusal: Refused, *, backoff: float, draw: Callable[[], float] = random.random
) -> float:
    """Seconds to wait after a refusal: what the server asks for, else twice as long each time; up to half as
    much again by chance, so that calls refused together do not come back together."""
    wanted = refusal.wait if refusal.wait is not None else backoff * float(2**attempt)
    return min(wanted, LONGEST_WAIT) * (1 + 0.5 * draw())


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")
"""A Host header: a name or address, with a port or without."""


def is_own_name(host: str, names: Container[str] = ()) -> bool:
    """Whether a Host header names this server: an address, `localhost` or one of `names`, in small letters.

    A page can make any other name point here (DNS rebinding); no address can be made to mean another machine.
    """
    found = HOST.fullmatch(host.lower())
    if found is None:
        return False
    name = found[1]
    if name == "localhost" or name in names:
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


# A deadline for the whole request: a socket's own time-out begins anew with every byte.


class _Until(io.RawIOBase):
    """A socket's bytes until a deadline."""

    def __init__(self, raw: Any, sock: socket.socket, deadline: float) -> None:
        self._raw, self._sock, self._deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the reply was not whole in time")
        self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: Any, *given: Any, deadline: float, **named: Any) -> None:
        super().__init__(sock, *given, **named)
        self.fp = io.BufferedReader(_Until(self.fp.detach(), sock, deadline))


class _Plain(http.client.HTTPConnection):
    def __init__(self, host: str, *, timeout: float, **named: Any) -> None:
        super().__init__(host, timeout=timeout, **named)
        self.response_class = functools.partial(_Response, deadline=time.monotonic() + timeout)  # type: ignore[assignment]


class _Secure(http.client.HTTPSConnection):
    def __init__(self, host: str, *, timeout: float, **named: Any) -> None:
        super().__init__(host, timeout=timeout, **named)
        self.response_class = functools.partial(_Response, deadline=time.monotonic() + timeout)  # type: ignore[assignment]


class _PlainHandler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Plain, request)  # type: ignore[arg-type]


class _SecureHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Secure, request, context=ssl.create_default_context())  # type: ignore[arg-type]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *given: Any) -> None:
        """Follow none."""


def _opener(host: str) -> urllib.request.OpenerDirector:
    """What asks a host: no redirect is followed, and this machine is asked through no proxy."""
    handlers: list[Any] = [_NoRedirect(), _PlainHandler(), _SecureHandler()]
    if is_loopback(host):
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers)


def _read(response: Any) -> bytes:
    """The whole body, of which no more is read than it may hold."""
    parts, size = list[bytes](), 0
    while part := response.read1(65_536):
        parts.append(part)
        size += len(part)
        if size > LARGEST:
            raise ValueError(f"a body above {LARGEST:,} bytes")
    if response.length:  # what was announced and did not come
        raise ValueError("a body that was cut off")
    return b"".join(parts)


KEYRING = "tunesmith"
"""The service under whose name the system's keyring keeps our secrets."""


def secret(name: str) -> str | None:
    """A secret by the name of its environment variable: from there, else from the system's keyring, where the package
    `keyring` is installed. Raises RecipeError for a keyring that cannot be asked, such as a locked one."""
    given = (os.environ.get(name) or "").strip()
    if given:
        return given
    try:
        import keyring
        from keyring.errors import NoKeyringError
    except ImportError:
        return None
    try:
        return (keyring.get_password(KEYRING, name) or "").strip() or None
    except NoKeyringError:  # a machine without any, as servers and containers are
        return None
    except Exception as error:  # a backend may raise what it likes
        raise RecipeError(
            f"The system's keyring was asked for {name} and did not answer.",
            found=type(error).__name__,  # its words may hold anything
            fix=f"Unlock it, or set the environment variable: export {name}=...",
        ) from None


def _key(name: str, who: str) -> str:
    key = secret(name)
    if not key:
        raise RecipeError(
            f"The environment variable {name}, which should hold {who}'s key, is not set.",
            found=no_secret(name),
            fix=f"Set it: export {name}=...",
        )
    if not (key.isascii() and key.isprintable()):
        raise RecipeError(
            f"What the environment variable {name}, or the keyring under that name, holds is no key.",
            found="characters that no header may have",
            fix="Set it to the key alone.",
        )
    return key


def no_secret(name: str) -> str:
    """What was found in the keyring where the environment has nothing, and how a secret gets in."""
    if importlib.util.find_spec("keyring"):
        return f"nothing in the system's keyring either (`keyring set {KEYRING} {name}` puts it there)"
    return "no keyring either: the package `keyring` (pip install tunesmith[keyring]) is not installed"


def _without_user(url: str) -> str:
    """An address as an error may show it: someone may have put a password into it."""
    scheme, mark, rest = url.partition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2].partition('?')[0].partition('#')[0]}"


def _retry_after(text: str) -> float | None:
    """Seconds of a `Retry-After` header, in either of its forms."""
    try:
        seconds = float(text)
        return max(0.0, seconds) if seconds == seconds else None
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
