"""The wall before Gradio: who may ask, from which page, for what, how much, and what a browser may do with the answer.

    Host -> Origin -> token or account -> known route -> own files and sessions -> size and pace -> Gradio -> headers

Gradio has many more routes than its pages need (proxies, code editing, an API of every event); only those that a page
uses are let through, so that a new one in a later version is closed until somebody opens it here.
"""

from __future__ import annotations

import asyncio
import hmac
import html
import json
import os
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from tunesmith.http import is_own_name
from tunesmith.serving import bodies
from tunesmith.ui import theme
from tunesmith.ui.accounts import Accounts, Guesses, Sessions
from tunesmith.ui.keys import PROVIDERS
from tunesmith.ui.workspace import SCOPE, Workspace

READ = tuple(
    re.compile(pattern)
    for pattern in (
        r"/",
        r"/config/?",
        r"(/gradio_api)?/theme\.css",
        r"/(static|assets|svelte)/[A-Za-z0-9_./@+-]+",
        r"/favicon\.ico",
        r"/gradio_api/(queue/(data|status)|upload_progress|startup-events|app_id|login_check|user)/?",
        r"/gradio_api/heartbeat/[A-Za-z0-9]+",
        r"/gradio_api/file=(?s:.+)",
    )
)
WRITE = tuple(
    re.compile(pattern)
    for pattern in (r"/gradio_api/(queue/join|upload|cancel|reset)/?", r"/gradio_api/run/[A-Za-z0-9_]+/?")
)
"""Routes of Gradio's that its pages use; every other is closed."""
INLINE = ("image/png", "image/jpeg", "image/gif", "image/webp", "text/plain", "application/json")
"""Types that a file keeps; all others are sent as bytes, and all as attachments."""
HEADERS = {
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    # With no-referrer a form sends no origin either, not even here.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
}
CLOSED = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Limits:
    """How much a browser may send."""

    upload_bytes: int = 200 * 2**20
    """Of one upload, which may be several files."""
    kept_bytes: int = 2**30
    """Of a user's uploads all together, with those on their way."""
    body_bytes: int = 8 * 2**20
    """Of every other request."""
    stalled_seconds: float = 60.0
    """For the next piece of a body to arrive."""
    upload_seconds: float = 1800.0
    """For a whole upload: the largest one at 1 Mbit/s."""
    body_seconds: float = 60.0
    """For a whole body that is no upload."""


@dataclass(frozen=True)
class Access:
    """Who may ask: everybody with the token or, where there are accounts, those who sign in."""

    token: str
    accounts: Accounts | None = None
    hosts: frozenset[str] = frozenset()
    """Names in the Host header beside `localhost` and addresses."""


class Refused(Exception):
    """A request that is answered here."""

    def __init__(self, status: int, said: str, **headers: str) -> None:
        super().__init__(said)
        self.status, self.said, self.headers = status, said, headers


@dataclass
class Walls:
    """An ASGI application around another."""

    app: Any
    root: Path
    temporary: Path
    """Where Gradio keeps uploads and what it hands out."""
    access: Access
    limits: Limits = Limits()
    keys: Mapping[str, str] = field(default_factory=lambda: PROVIDERS)
    """As in `keys.allowed`."""
    runs_code: bool = False
    """As in `Workspace`."""
    cookie: str = "tunesmith"
    sessions: Sessions = field(default_factory=Sessions)
    guesses: Guesses = field(default_factory=Guesses)
    _pages: OrderedDict[str, str] = field(default_factory=OrderedDict)
    """User of every page that is open, by Gradio's name for it: its state and its events are theirs alone."""
    _arriving: int = 0
    _uploads: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no page uses a websocket
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            await self._answered(scope, headers, receive, send)
        except Refused as refused:
            await self._refusal(refused, headers, send)
        except bodies.Gone:
            pass

    async def _answered(self, scope: Any, headers: Mapping[bytes, bytes], receive: Any, send: Any) -> None:
        path, method = scope["path"], scope["method"]
        self._check_host(headers)
        if path == "/healthz" and method in ("GET", "HEAD"):
            await _send(send, 200, b'{"status":"ok"}', "application/json", CLOSED)
            return
        self._check_origin(headers, method)
        if path == "/login" and self.access.accounts is not None:
            await self._login(scope, headers, receive, send)
            return
        value = _cookie(headers, self.cookie)
        user = self.sessions.user(value) if value else None
        if path == "/" and method in ("GET", "HEAD") and b"token=" in scope["query_string"]:
            await self._entered(scope, send)
            return
        if user is None:
            raise self._unknown(path, method)
        if path == "/logout" and method == "POST":
            self.sessions.end(value or "")
            where = "/login" if self.access.accounts is not None else "/"
            await _send(
                send, 303, b"", "text/plain", CLOSED, location=where, **self._set_cookie("", 0, headers)
            )
            return
        await self._passed(scope, headers, receive, send, user)

    # Who asks.

    def _check_host(self, headers: Mapping[bytes, bytes]) -> None:
        if not is_own_name(headers.get(b"host", b"").decode("latin-1"), self.access.hosts):
            raise Refused(400, "This Host is not served here; start with --allowed-host for it.")

    def _check_origin(self, headers: Mapping[bytes, bytes], method: str) -> None:
        """A page of another site may link here, and nothing else."""
        site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
        host = headers[b"host"].decode("latin-1").lower()
        same = origin is not None and origin.decode("latin-1").lower() in (
            f"http://{host}",
            f"https://{host}",
        )
        foreign = (origin is not None and not same) or site in (b"cross-site", b"same-site")
        if method in ("GET", "HEAD"):
            if foreign and (headers.get(b"sec-fetch-mode") != b"navigate" or origin is not None):
                raise Refused(403, "This request comes from another site.")
        elif foreign or not (same or site == b"same-origin"):
            raise Refused(403, "This request does not come from a page of this server.")

    def _unknown(self, path: str, method: str) -> Refused:
        if self.access.accounts is not None:
            if path == "/" and method in ("GET", "HEAD"):
                return Refused(303, "Sign in.", location="/login")
            return Refused(401, "Sign in at /login.")
        return Refused(401, "Open the address that `tunesmith web` printed: it has the token.")

    async def _entered(self, scope: Any, send: Any) -> None:
        """The address with the token: a cookie takes its place, so that it stays in no history of links."""
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        key = "from " + _client(scope)
        right = hmac.compare_digest(given.encode("utf-8", "surrogatepass"), self.access.token.encode())
        if self.access.accounts is not None:
            raise Refused(303, "Sign in.", location="/login")
        if not right:
            if wait := self.guesses.wait(key):
                raise Refused(429, "Too many wrong tokens.", **{"retry-after": str(int(wait) + 1)})
            self.guesses.wrong(key)
            raise Refused(401, "This token is another start's: open the address printed last.")
        value = self.sessions.begin("")
        headers = {name.lower(): value for name, value in scope["headers"]}
        await _send(
            send, 303, b"", "text/plain", CLOSED, location="/", **self._set_cookie(value, None, headers)
        )

    async def _login(self, scope: Any, headers: Mapping[bytes, bytes], receive: Any, send: Any) -> None:
        accounts = self.access.accounts
        assert accounts is not None
        if scope["method"] in ("GET", "HEAD"):
            await self._login_page(send, 200, "")
            return
        if scope["method"] != "POST":
            raise Refused(405, "Use GET or POST.")
        body = await self._body(headers, receive, 4096)
        form = parse_qs(body.decode("utf-8", "replace"), max_num_fields=8)
        name, password = form.get("name", [""])[0].strip().lower(), form.get("password", [""])[0]
        keys = ("from " + _client(scope), "account " + name[:64])
        if wait := self.guesses.wait(*keys):
            await self._login_page(send, 429, f"Too many wrong passwords. Try again in {int(wait) + 1} s.")
            return
        right = await asyncio.to_thread(accounts.is_right, name, password)
        if not right:
            self.guesses.wrong(*keys)
            await self._login_page(send, 401, "Name or password is wrong.")
            return
        value = self.sessions.begin(name)
        await _send(
            send, 303, b"", "text/plain", CLOSED, location="/", **self._set_cookie(value, None, headers)
        )

    async def _login_page(self, send: Any, status: int, said: str) -> None:
        nonce = secrets.token_urlsafe(16)
        alert = f'<p role="alert">{html.escape(said)}</p>' if said else ""
        page = theme.LOGIN.replace("NONCE", nonce).replace("ALERT", alert).encode()
        policy = (
            f"default-src 'none'; style-src 'nonce-{nonce}'; form-action 'self'; "
            "frame-ancestors 'none'; base-uri 'none'"
        )
        await _send(send, status, page, "text/html; charset=utf-8", policy)

    def _set_cookie(self, value: str, age: int | None, headers: Mapping[bytes, bytes]) -> dict[str, str]:
        # Behind a proxy with TLS the page's own address says so.
        secure = "; Secure" if headers.get(b"origin", b"").startswith(b"https://") else ""
        until = f"; Max-Age={age}" if age is not None else ""
        return {"set-cookie": f"{self.cookie}={value}; Path=/; HttpOnly; SameSite=Strict{secure}{until}"}

    # What is asked.

    async def _passed(
        self, scope: Any, headers: Mapping[bytes, bytes], receive: Any, send: Any, user: str
    ) -> None:
        path, method = scope["path"], scope["method"]
        routes = READ if method in ("GET", "HEAD") else WRITE if method == "POST" else ()
        if not any(route.fullmatch(path) for route in routes) or "/.." in path or "\0" in path:
            raise Refused(404, "There is no such page.")
        workspace = Workspace(self.root / "users" / user if user else self.root, self.keys, self.runs_code)
        is_file = path.startswith("/gradio_api/file=")
        if is_file:
            self._check_file(path.removeprefix("/gradio_api/file="), workspace)
        inner = dict(scope)
        inner[SCOPE] = workspace
        if path == "/":
            dark = re.search(rb"(?:^|&)(__theme=(?:dark|light))(?:&|$)", scope["query_string"])
            inner["query_string"] = dark[1] if dark else b""
        else:
            asked = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=32)
            for page in asked.get("session_hash", ()):
                self._check_page(page, user)
            if path.startswith("/gradio_api/heartbeat/"):
                self._check_page(path.rsplit("/", 1)[1], user)
        # Brotli below is for slow networks; here the page is changed on its way.
        if path == "/":
            inner["headers"] = [pair for pair in scope["headers"] if pair[0].lower() != b"accept-encoding"]
        if path.rstrip("/") == "/gradio_api/upload":
            await self._uploaded(inner, headers, receive, send, workspace)
            return
        if method == "POST":
            body = await self._body(headers, receive, self.limits.body_bytes)
            self._check_page(_page_of(body), user)
            receive = bodies.again(body, receive)
        if path == "/" and method == "GET":
            await self._page(inner, receive, send)
            return
        await self.app(inner, receive, _with_headers(send, is_file=is_file, path=path))

    def _check_file(self, name: str, workspace: Workspace) -> None:
        """Only what Gradio keeps for its pages, and the user's own workspace."""
        path = Path(name)
        resolved = Path(os.path.realpath(path))
        own = (self.temporary, workspace.root)
        hidden = any(part.startswith(".") for part in _below(resolved, workspace.root))
        if not path.is_absolute() or ".." in path.parts:
            raise Refused(403, "This file is not handed out.")
        if not any(resolved.is_relative_to(os.path.realpath(folder)) for folder in own) or (
            hidden and not resolved.is_relative_to(os.path.realpath(self.temporary))
        ):
            raise Refused(403, "This file is not handed out.")
        if workspace.root == self.root and resolved.is_relative_to(os.path.realpath(self.root / "users")):
            raise Refused(403, "This file is not handed out.")

    def _check_page(self, page: str, user: str) -> None:
        if not page:
            return
        if self._pages.setdefault(page, user) != user:
            raise Refused(403, "This page is another user's.")
        self._pages.move_to_end(page)
        while len(self._pages) > 100_000:
            self._pages.popitem(last=False)

    # How much.

    async def _body(self, headers: Mapping[bytes, bytes], receive: Any, most: int) -> bytes:
        try:
            return await bodies.whole(headers, receive, most=most, seconds=self.limits.body_seconds)
        except bodies.TooLarge:
            raise Refused(413, f"This is more than {most:,} bytes.") from None
        except bodies.TooSlow:
            raise Refused(408, "The request did not arrive in time.") from None

    async def _uploaded(
        self, scope: Any, headers: Mapping[bytes, bytes], receive: Any, send: Any, workspace: Workspace
    ) -> None:
        """Pass an upload on while it is small enough; nothing of one that is too large, or ends early, stays."""
        most, kept = self.limits.upload_bytes, self.limits.kept_bytes
        announced = bodies.announced(headers)
        too_large = Refused(
            413,
            f"The upload is too large: at most {most // 2**20} MiB are taken at once. "
            "Upload a part of it, or put it into the workspace's folder `uploads` on the server.",
        )
        if announced > most:
            raise too_large
        held = _size(self.temporary) + _size(workspace.uploads)
        full = Refused(
            413,
            f"There is no room for this upload: {held / 2**20:,.0f} of {kept // 2**20:,} MiB are taken. "
            "Delete files in the workspace's folder `uploads` on the server.",
        )
        if held + self._arriving + announced > kept:
            raise full
        size, over, answered, began = 0, None, False, time.monotonic()

        async def counted() -> Any:
            nonlocal size, over
            left = self.limits.upload_seconds - (time.monotonic() - began)
            try:
                message = await asyncio.wait_for(receive(), min(self.limits.stalled_seconds, left))
            except TimeoutError:
                said = "has stalled" if left > self.limits.stalled_seconds else "takes too long"
                over = Refused(408, f"The upload {said}.")
                return {"type": "http.disconnect"}
            part = len(message.get("body", b""))
            size += part
            self._arriving += part
            if size > most or held + self._arriving > kept:
                over = too_large if size > most else full
                return {"type": "http.disconnect"}
            return message

        async def sent(message: Any) -> None:
            nonlocal answered
            if over is None:
                answered = True
                await send(message)

        self._uploads += 1
        try:
            await self.app(scope, counted, _with_headers(sent, is_file=False, path=scope["path"]))
        except Exception:
            if over is None and answered:
                raise
            if over is None:
                raise bodies.Gone from None
        finally:
            self._arriving -= size
            self._uploads -= 1
            if not self._uploads:
                for left in self.temporary.glob("tmp*"):
                    if left.is_file():
                        left.unlink(missing_ok=True)
        if over is not None:
            raise over

    # What a browser may do with it.

    async def _page(self, scope: Any, receive: Any, send: Any) -> None:
        """Gradio's page with its own scripts named as such: any other in it does not run."""
        status, headers, parts = 500, [], []

        async def collected(message: Any) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], message["headers"]
            else:
                parts.append(message.get("body", b""))

        await self.app(scope, receive, collected)
        nonce = secrets.token_urlsafe(16)
        page = b"".join(parts).replace(b"</head>", theme.head().encode() + b"</head>", 1)
        page = re.sub(rb"<script\b", b'<script nonce="%s"' % nonce.encode(), page)
        # An app to install it is not, and a browser asks for its manifest without the cookie.
        page = re.sub(rb'<link\s+rel="manifest"[^>]*>', b"", page)
        # They name pictures elsewhere, for those who link here.
        page = re.sub(rb'<meta\s+(?:property|name)="(?:og|twitter):[^>]*>', b"", page)
        # Gradio's HTML component makes a function of its own fixed template; text from data is an argument of it. What
        # stays closed is what data could bring: scripts in a page, handlers in elements, javascript: links.
        policy = (
            f"default-src 'none'; script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
            "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; media-src 'self' blob:; "
            "worker-src 'self' blob:; object-src 'none'; frame-src 'none'; base-uri 'self'; "
            "form-action 'self'; frame-ancestors 'none'"
        )
        kind = next((v.decode("latin-1") for k, v in headers if k.lower() == b"content-type"), "text/html")
        await _send(send, status, page, kind, policy)

    async def _refusal(self, refused: Refused, headers: Mapping[bytes, bytes], send: Any) -> None:
        if refused.status in (401, 429) and b"text/html" in headers.get(b"accept", b""):
            nonce = secrets.token_urlsafe(16)
            page = (
                theme.CLOSED_PAGE.replace("NONCE", nonce).replace("SAID", html.escape(refused.said)).encode()
            )
            policy = f"default-src 'none'; style-src 'nonce-{nonce}'; frame-ancestors 'none'; base-uri 'none'"
            await _send(send, refused.status, page, "text/html; charset=utf-8", policy, **refused.headers)
            return
        body = json.dumps({"detail": refused.said}).encode()
        await _send(send, refused.status, body, "application/json", CLOSED, **refused.headers)


def _cookie(headers: Mapping[bytes, bytes], name: str) -> str | None:
    for pair in headers.get(b"cookie", b"").decode("latin-1").split(";"):
        key, _, value = pair.strip().partition("=")
        if key == name:
            return value
    return None


def _client(scope: Any) -> str:
    return str((scope.get("client") or ("?",))[0])


def _page_of(body: bytes) -> str:
    """Gradio's name for the page that asks."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "This is no JSON.") from None
    page = said.get("session_hash") if isinstance(said, dict) else None
    return page if isinstance(page, str) else ""


def _below(path: Path, folder: Path) -> tuple[str, ...]:
    root = Path(os.path.realpath(folder))
    return path.relative_to(root).parts if path.is_relative_to(root) else ()


def _size(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(
        os.lstat(os.path.join(place, name)).st_size
        for place, _, names in os.walk(folder)
        for name in names
        if os.path.lexists(os.path.join(place, name))
    )


def _with_headers(send: Any, *, is_file: bool, path: str) -> Any:
    """Gradio's answer with our headers in place of its own on the same matters."""

    async def sent(message: Any) -> None:
        if message["type"] == "http.response.start":
            kept = [
                (name, value)
                for name, value in message.get("headers", ())
                if not name.lower().startswith(b"access-control-") and name.lower().decode() not in HEADERS
            ]
            if is_file:
                kept = _as_attachment(kept)
            policy = "sandbox; " + CLOSED if is_file else CLOSED
            added = {**HEADERS, "content-security-policy": policy}
            if not path.startswith(("/static/", "/svelte/")):
                kept = [(name, value) for name, value in kept if name.lower() != b"cache-control"]
                # The names of assets have a hash of what is in them.
                is_asset = path.startswith("/assets/") and message["status"] == 200
                added["cache-control"] = "private, max-age=31536000, immutable" if is_asset else "no-store"
            message = {**message, "headers": kept + _encoded(added)}
        await send(message)

    return sent


def _as_attachment(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    made = []
    for name, value in headers:
        if name.lower() == b"content-disposition":
            value = re.sub(rb"^\s*inline", b"attachment", value)
        if name.lower() == b"content-type":
            kind = value.split(b";")[0].strip().lower().decode("latin-1")
            value = value if kind in INLINE else b"application/octet-stream"
        made.append((name, value))
    if not any(name.lower() == b"content-disposition" for name, _ in made):
        made.append((b"content-disposition", b"attachment"))
    return made


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


async def _send(send: Any, status: int, body: bytes, kind: str, policy: str, **headers: str) -> None:
    """One whole answer."""
    added = {
        **HEADERS,
        "content-security-policy": policy,
        "cache-control": "no-store",
        "content-type": kind,
        "content-length": str(len(body)),
        **headers,
    }
    await send({"type": "http.response.start", "status": status, "headers": _encoded(added)})
    await send({"type": "http.response.body", "body": body})
