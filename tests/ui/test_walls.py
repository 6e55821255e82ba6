"""The web catalogue, case by case, against the real application over real sockets: nothing done, nothing read."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import socket
import time
from urllib.parse import quote

import httpx
import pytest
from web_of_tests import TOKEN

from tunesmith.ui import accounts
from tunesmith.ui.security import Access, Limits

CANARY = "canary-9c1f: nobody may read this"
MIB = 2**20


@pytest.fixture
def canary(web, tmp_path_factory):
    """A file outside the workspace, one in another user's, and one that Gradio might read."""
    outside = web.root.parent / "secret.txt"
    outside.write_text(CANARY)
    return outside


def raw(web, head: str, body: bytes = b"") -> str:
    """What the server answers to bytes that no client library would send."""
    host, port = web.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as link:
        link.sendall(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n" + body)
        link.settimeout(10)
        parts = []
        try:
            while part := link.recv(65536):
                parts.append(part)
        except TimeoutError:
            pass
    return b"".join(parts).decode("latin-1")


def kept(web) -> set[str]:
    """Everything in the folder of uploads."""
    return {str(p.relative_to(web.temporary)) for p in web.temporary.rglob("*") if p.is_file()}


def upload(client, content: bytes, name: str = "rows.jsonl", **options):
    return client.post("/gradio_api/upload", files={"files": (name, content)}, **options)


# The token.


def routes(web):
    """Every route of the application below, with something in place of its parameters."""
    found = set()
    inner = next(route.app for route in web.walls.app.routes if hasattr(route, "app"))
    below = [inner, *(r.original_router for r in inner.routes if hasattr(r, "original_router"))]
    for route in (route for router in below for route in router.routes):
        if hasattr(route, "methods"):
            path = re.sub(r"\{[^}]*\}", "x", route.path)
            found |= {(method, path) for method in route.methods}
    return sorted(found)


def test_without_the_token_no_route_answers(web):
    asked = routes(web)
    assert len(asked) > 60
    for cookie in ("", f"tunesmith-0={TOKEN}"):
        with web.nobody(cookie=cookie, origin=web.url) as client:
            for method, path in asked:
                assert client.request(method, path).status_code in (401, 403), (method, path)
    with web.nobody() as client:
        for headers in ({"authorization": f"Bearer {TOKEN}"}, {"accept": "text/html"}):
            found = client.get("/config", headers=headers)
            assert found.status_code == 401
            assert "components" not in found.text
        assert client.get("/healthz").json() == {"status": "ok"}


def test_only_the_routes_that_pages_use_are_open(web):
    opened = {path for method, path in routes(web) if path.count("x") >= 0 and _is_open(web, method, path)}
    assert opened <= {
        "/",
        "/config",
        "/config/",
        "/theme.css",
        "/favicon.ico",
        "/gradio_api/theme.css",
        "/assets/x",
        "/static/x",
        "/svelte/x",
        "/gradio_api/file=x",
        "/gradio_api/heartbeat/x",
        "/gradio_api/queue/data",
        "/gradio_api/queue/status",
        "/gradio_api/queue/join",
        "/gradio_api/upload",
        "/gradio_api/upload_progress",
        "/gradio_api/startup-events",
        "/gradio_api/app_id",
        "/gradio_api/app_id/",
        "/gradio_api/login_check",
        "/gradio_api/login_check/",
        "/gradio_api/user",
        "/gradio_api/user/",
        "/gradio_api/cancel",
        "/gradio_api/reset",
        "/gradio_api/reset/",
        "/gradio_api/run/x",
        "/gradio_api/run/x/",
    }
    assert {"/", "/config", "/gradio_api/queue/join", "/gradio_api/upload"} <= opened
    with web.owner() as client:
        for path in (
            "/monitoring",
            "/monitoring/summary",
            "/docs",
            "/openapi.json",
            "/gradio_api/info",
            "/gradio_api/openapi.json",
            "/gradio_api/proxy=http://127.0.0.1:1/",
            "/gradio_api/vibe-code",
            "/gradio_api/runs",
            "/gradio_api/deep_link",
        ):
            assert client.get(path).status_code == 404, path
        for path in (
            "/gradio_api/vibe-edit",
            "/gradio_api/process_recording",
            "/gradio_api/component_server",
            "/gradio_api/call/x",
            "/login",
        ):
            assert client.post(path, json={}).status_code == 404, path
        for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
            assert client.request(method, "/").status_code in (403, 404, 405), method


def _is_open(web, method, path):
    from tunesmith.ui.security import READ, WRITE

    patterns = READ if method in ("GET", "HEAD") else WRITE if method == "POST" else ()
    return any(pattern.fullmatch(path) for pattern in patterns)


def test_the_address_with_the_token_gives_a_cookie_and_keeps_the_token_nowhere(web):
    with web.nobody(cookie="tunesmith-0=fixed-by-another-page") as client:
        found = client.get("/", params={"token": TOKEN})
    assert found.status_code == 303
    assert found.headers["location"] == "/"
    cookie = found.headers["set-cookie"]
    assert re.fullmatch(r"tunesmith-0=[\w-]{43}; Path=/; HttpOnly; SameSite=Strict", cookie)
    assert TOKEN not in cookie
    assert "fixed-by-another-page" not in cookie
    with web.owner() as client:
        page = client.get("/")
        assert page.status_code == 200
        assert TOKEN not in page.text
        assert "gradio_config" in page.text
        assert client.post("/logout").status_code == 303
        assert client.get("/").status_code == 401


def test_guessing_the_token_is_slowed_down_and_the_right_one_still_works(around):
    web = around()
    with web.nobody() as client:
        answers = [client.get("/", params={"token": f"guess-{n}"}).status_code for n in range(30)]
        assert set(answers[:8]) == {401}
        assert set(answers[8:]) == {429}
        assert client.get("/", params={"token": TOKEN}).status_code == 303
        assert (
            client.get("/", params={"token": "\udcff".encode("utf-8", "surrogateescape")}).status_code == 429
        )
        told = client.get("/", params={"token": "x"}, headers={"accept": "text/html"})
        assert int(told.headers["retry-after"]) > 0
        assert "Too many" in told.text


# Host and origin.


@pytest.mark.parametrize(
    "host",
    [
        "evil.com",
        "localhost.evil.com",
        "127.0.0.1.evil.com",
        "evil.com:{port}",
        "",
        "a/?x",
        "127.0.0.1:{port}/?x",
        "127.0.0.1@evil.com",
        "evil.com#127.0.0.1",
        "127.0.0.1 evil.com",
        "localhost:80:80",
        "[::1",
        "0x7f.1.evil",
        "127.0.0.1\tevil.com",
        "localhost\\@evil.com",
    ],
)
def test_a_page_of_another_name_cannot_be_made_to_point_here(web, host):
    with web.owner() as client:
        cookie = "; ".join(f"{k}={v}" for k, v in client.cookies.items())
    port = web.url.rsplit(":", 1)[1]
    said = raw(
        web, f"GET /config HTTP/1.1\nHost: {host.format(port=port)}\nCookie: {cookie}\nConnection: close\n"
    )
    assert said.split(" ")[1] == "400", said[:200]
    assert "components" not in said
    mine = raw(web, f"GET /config HTTP/1.1\nHost: 127.0.0.1:{port}\nCookie: {cookie}\nConnection: close\n")
    assert mine.split(" ")[1] == "200", "else the case above proves nothing"


def test_names_that_were_allowed_are_served(around, walls):
    web = around(access=Access(TOKEN, None, frozenset({"lab.example"})))
    with web.nobody() as client:
        assert client.get("/healthz", headers={"host": "lab.example"}).status_code == 200
        assert client.get("/healthz", headers={"host": "LAB.example:443"}).status_code == 200
        assert client.get("/healthz", headers={"host": "lab.example.evil.com"}).status_code == 400


FOREIGN = [
    {"origin": "http://evil.com"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:1"},
    {"origin": "http://localhost.evil.com"},
    {"origin": "file://"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"origin": "http://evil.com", "sec-fetch-site": "same-origin"},
    {},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_another_page_changes_nothing(web, headers):
    with web.owner() as inside:
        cookies = dict(inside.cookies)
    with web.nobody(**headers) as client:
        client.cookies.update(cookies)
        before = kept(web)
        body = {"data": [], "fn_index": 0, "session_hash": "foreign1", "event_data": None, "trigger_id": None}
        answers = [
            client.post("/gradio_api/queue/join", json=body),
            client.post(
                "/gradio_api/queue/join", content=json.dumps(body), headers={"content-type": "text/plain"}
            ),
            client.post("/gradio_api/run/predict", json=body),
            client.post("/gradio_api/reset", data={"x": "1"}),
            upload(client, b"x"),
            client.post("/logout"),
        ]
        assert {answer.status_code for answer in answers} == {403}
        assert kept(web) == before
        assert "access-control-allow-origin" not in str([dict(answer.headers) for answer in answers])
    with web.nobody(origin=web.url) as client:
        client.cookies.update(cookies)
        assert upload(client, b"mine").status_code == 200, "else the cases above prove nothing"


def test_another_page_may_link_here_and_read_nothing(web):
    with web.owner() as inside:
        cookies = dict(inside.cookies)
    with web.nobody() as client:
        client.cookies.update(cookies)
        link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
        assert client.get("/", headers=link).status_code == 200
        for mode in ("cors", "no-cors", "websocket"):
            found = client.get("/config", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": mode})
            assert found.status_code == 403
        assert client.get("/config", headers={"origin": "http://evil.com"}).status_code == 403
        asked = client.options(
            "/config", headers={"origin": "http://evil.com", "access-control-request-method": "GET"}
        )
        assert asked.status_code == 403
        assert not [name for name in asked.headers if name.startswith("access-control")]


def test_a_websocket_is_closed(web):
    port = web.url.rsplit(":", 1)[1]
    said = raw(
        web,
        f"GET /gradio_api/queue/join HTTP/1.1\nHost: 127.0.0.1:{port}\nOrigin: http://evil.com\nUpgrade: websocket\n"
        "Connection: Upgrade, close\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\nSec-WebSocket-Version: 13\n",
    )
    assert said.split(" ")[1] == "403"


# Headers.


def test_every_answer_tells_the_browser_what_it_may_not(web):
    with web.owner() as client, web.nobody() as stranger:
        name = upload(client, b"<script>alert(1)</script>", "page.html").json()[0]
        answers = [
            client.get("/"),
            client.get("/config"),
            client.get("/theme.css"),
            client.get("/nothing"),
            client.get("/favicon.ico"),
            client.get(f"/gradio_api/file={name}"),
            client.post("/gradio_api/queue/join", json={"data": 1}),
            client.post("/gradio_api/queue/join", content=b"{"),
            stranger.get("/"),
            stranger.get("/", headers={"host": "evil.com"}),
            stranger.get("/", headers={"accept": "text/html"}),
            client.get("/gradio_api/file=/etc/passwd"),
        ]
    for answer in answers:
        where = f"{answer.request.url} {answer.status_code}"
        assert answer.headers["x-frame-options"] == "DENY", where
        assert answer.headers["x-content-type-options"] == "nosniff", where
        assert answer.headers["referrer-policy"] == "same-origin", where
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy, where
        assert "frame-ancestors 'none'" in policy, where
        scripts = re.search(r"script-src ([^;]*)", policy)
        assert scripts is None or "unsafe-inline" not in scripts[1], where
        assert scripts is None or "http" not in scripts[1], where
        assert not [name for name in answer.headers if name.startswith("access-control")], where
        assert "server" not in answer.headers, where


def test_scripts_of_the_page_carry_this_answers_nonce(web):
    with web.owner() as client:
        first, second = client.get("/"), client.get("/")
        nonces = [
            re.search(r"'nonce-([\w-]+)'", page.headers["content-security-policy"])[1]
            for page in (first, second)
        ]
        assert nonces[0] != nonces[1]
        tags = re.findall(r"<script\b[^>]*>", first.text)
        assert len(tags) >= 4
        assert all(f'nonce="{nonces[0]}"' in tag for tag in tags)
        assert "githubusercontent" not in first.text
        assert 'rel="manifest"' not in first.text, "it is asked for without the cookie"
        assert client.get("/config").json()["i18n_translations"]["en"]["common.complete"] == "Done"
        # What follows the question mark reaches no more than the theme.
        assert client.get("/", params={"page": "x", "deep_link": "../../x"}).status_code == 200


def test_the_page_fetches_what_draws_plots_before_one_is_shown(web):
    with web.owner() as client:
        [at] = set(re.findall(r'import\("(/assets/[\w.-]+)"\)', client.get("/").text))
        found = client.get(at)
        assert (found.status_code, b"Plotly" in found.content) == (200, True)
        assert "immutable" in found.headers["cache-control"]
        assert client.get("/assets/nothing.js").headers["cache-control"] == "no-store"


# Paths.


def climbs(canary) -> list[str]:
    """Ways to write a path that should not be read."""
    up = ["../" * n for n in (1, 3, 8)] + [
        "..%2f" * 6,
        "..%252f" * 6,
        "%2e%2e/" * 6,
        "....//" * 6,
        "..\\" * 6,
        "..%5c" * 6,
        "%c0%ae%c0%ae/" * 6,
        "..;/" * 6,
    ]
    targets = ["etc/passwd", "proc/self/environ", str(canary).lstrip("/"), "root/.ssh/id_rsa"]
    whole = [
        "/etc/passwd",
        "//etc/passwd",
        "/./etc/passwd",
        "/etc/./passwd",
        "/proc/self/environ",
        "/proc/self/cwd/pyproject.toml",
        "/dev/stdin",
        "/dev/zero",
        "/etc/passwd%00.png",
        "file:///etc/passwd",
        "http://127.0.0.1:1/",
        "https://example.com/",
        "http%3a//127.0.0.1:1/",
        "ftp://x/y",
        "data:text/html,x",
        "~/.ssh/id_rsa",
        "~root/.bashrc",
        "C:\\Windows\\win.ini",
        "\\\\host\\share",
        "CON",
        ".",
        "..",
        "/",
        "",
        "%2f",
        "*",
        str(canary),
        quote(str(canary)),
        str(canary) + "%00",
        f"x/../../{canary}",
        "/tmp",
        "pyproject.toml",
    ]
    return whole + [a + b for a, b in itertools.product(up, targets)]


def test_no_path_outside_the_workspace_is_read(web, canary):
    inside = upload_of = None
    with web.owner() as client:
        upload_of = upload(client, CANARY.encode(), "mine.txt").json()[0]
        assert client.get(f"/gradio_api/file={upload_of}").text == CANARY, (
            "else the cases below prove nothing"
        )
        inside = web.temporary / "link.txt"
        inside.symlink_to(canary)
        tried = 0
        for path in [
            *climbs(canary),
            str(inside),
            quote(str(inside)),
            str(web.temporary / ".." / ".." / canary.name),
        ]:
            for before in ("/gradio_api/file=", "/static/", "/assets/", "/gradio_api/file/"):
                try:
                    answer = client.get(before + path)
                except httpx.InvalidURL:
                    continue
                tried += 1
                if "gradio_config" in answer.text:  # the client has tidied the path up: our own page
                    continue
                assert answer.status_code in (400, 403, 404), (before, path, answer.status_code)
                assert CANARY not in answer.text
                assert "root:x:0:0" not in answer.text
    assert tried > 200
    port = web.url.rsplit(":", 1)[1]
    cookie = "; ".join(f"{k}={v}" for k, v in client.cookies.items())
    for path in (
        "/gradio_api/file=/../../../../etc/passwd",
        "/static/../../../../../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/gradio_api/file=/etc/passwd?x=/",
        "http://evil.com/gradio_api/file=/etc/passwd",
    ):
        said = raw(web, f"GET {path} HTTP/1.1\nHost: 127.0.0.1:{port}\nCookie: {cookie}\nConnection: close\n")
        assert "root:x:0:0" not in said, path
        assert said.split(" ")[1] in ("400", "403", "404"), path


def test_a_form_that_names_a_file_of_the_machine_is_not_read(web, canary):
    """A mounted Gradio takes such a path unless it is told that it was launched."""
    with web.owner() as client:
        config = client.get("/config").json()
        files = {c["id"] for c in config["components"] if c["type"] in ("file", "uploadbutton")}
        taking = [d for d in config["dependencies"] if d["backend_fn"] and files & set(d["inputs"])]
        assert taking, "no event takes a file"
        for event in taking[:3]:
            for path in (str(canary), "/etc/passwd", str(web.temporary / ".." / ".." / canary.name)):
                given = {"path": path, "orig_name": "x.txt", "meta": {"_type": "gradio.FileData"}}
                multiple = next(
                    c["props"].get("file_count")
                    for c in config["components"]
                    if c["id"] in files & set(event["inputs"])
                )
                data = [
                    ([given] if multiple == "multiple" else given) if i in files else None
                    for i in event["inputs"]
                ]
                said = run_event(client, event["id"], data)
                assert CANARY not in said
                assert "root:x" not in said
                assert '"success":false' in said.replace(" ", ""), said[:500]


def run_event(client, number: int, data: list, page: str = "pageoftests") -> str:
    """What the server sends for an event, all of it."""
    body = {"data": data, "fn_index": number, "session_hash": page, "event_data": None, "trigger_id": None}
    joined = client.post("/gradio_api/queue/join", json=body)
    assert joined.status_code == 200, joined.text
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": page}) as stream:
        said = ""
        for line in stream.iter_lines():
            said += line + "\n"
            if "process_completed" in line or "unexpected_error" in line:
                break
    return said


# Uploads.


def test_an_upload_at_the_limit_is_taken_and_one_above_it_leaves_nothing(around):
    web = around(limits=Limits(upload_bytes=200_000, kept_bytes=10 * MIB))
    with web.owner() as client:
        assert upload(client, b"x" * 199_500, "at.jsonl").status_code == 200
        before = kept(web)
        announced = upload(client, b"y" * 202_000)
        assert announced.status_code == 413
        assert "MiB" in announced.json()["detail"]

        def pieces():
            yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n'
            for _ in range(30):
                yield b"z" * 10_000
            yield b"\r\n--b--\r\n"

        silent = client.post(
            "/gradio_api/upload",
            content=pieces(),
            headers={"content-type": "multipart/form-data; boundary=b"},
        )
        assert silent.status_code == 413
        assert kept(web) == before


def test_uploads_have_a_limit_all_together(around, web):
    held = sum(p.stat().st_size for p in web.temporary.rglob("*") if p.is_file())
    small = around(limits=Limits(upload_bytes=200_000, kept_bytes=held + 300_000))
    with small.owner() as client:
        answers = [upload(client, bytes([65 + n]) * 90_000, f"{n}.txt").status_code for n in range(5)]
    assert answers == [200, 200, 200, 413, 413]


def test_ten_thousand_files_at_once_are_refused(web):
    before = kept(web)
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\nz\r\n'
    with web.owner() as client:
        answer = client.post(
            "/gradio_api/upload",
            content=part * 10_000 + b"--b--\r\n",
            headers={"content-type": "multipart/form-data; boundary=b"},
        )
    assert answer.status_code in (400, 413)
    assert kept(web) == before


def test_an_upload_that_ends_early_or_stalls_leaves_nothing(around):
    # Each limit alone: on a busy machine what never stalls is stopped for half a second as well.
    stalling = around(limits=Limits(stalled_seconds=0.4))
    endless = around(limits=Limits(upload_seconds=1.0))
    before = kept(stalling)
    place, head = _half_an_upload(stalling)
    with socket.create_connection(place) as link:
        link.sendall(head)
        time.sleep(0.1)
    with socket.create_connection(place, timeout=10) as link:
        link.sendall(head)
        said = b""
        while b"has stalled" not in said and (piece := link.recv(65536)):  # head and body may come apart
            said += piece
    assert b" 408 " in said.split(b"\r\n")[0]
    assert b"has stalled" in said
    # One that never stalls and never ends.
    place, head = _half_an_upload(endless)
    with socket.create_connection(place, timeout=0.1) as link:
        link.sendall(head)
        began, said = time.monotonic(), b""
        while b"takes too long" not in said and time.monotonic() - began < 10:
            with contextlib.suppress(OSError):  # nothing to read yet, or the server has hung up
                said += link.recv(65536)
                continue
            with contextlib.suppress(OSError):
                link.sendall(b"z")
    assert b" 408 " in said.split(b"\r\n")[0]
    assert b"takes too long" in said
    until = time.monotonic() + 20
    while kept(stalling) != before and time.monotonic() < until:
        time.sleep(0.05)
    assert kept(stalling) == before


def _half_an_upload(web) -> tuple[tuple[str, int], bytes]:
    """Where to send an upload's beginning, and the beginning."""
    with web.owner() as client:
        cookie = "; ".join(f"{k}={v}" for k, v in client.cookies.items())
    host, port = web.url.removeprefix("http://").split(":")
    head = (
        f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}:{port}\r\nOrigin: {web.url}\r\nCookie: {cookie}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n' + "z" * 5000
    )
    return (host, int(port)), head.encode()


@pytest.mark.parametrize(
    "name", ["page.html", "picture.svg", "code.js", "x.xhtml", "x.xml", "style.css", "x.pdf"]
)
def test_what_was_uploaded_comes_back_as_bytes_and_never_as_a_page(web, name):
    with web.owner() as client:
        path = upload(client, b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", name).json()[0]
        own = web.root / "uploads" / name
        own.parent.mkdir(exist_ok=True)
        own.write_bytes(b"<script>alert(1)</script>")
        for place in (path, str(own)):
            answer = client.get(f"/gradio_api/file={place}")
            assert answer.status_code == 200
            assert answer.headers["content-disposition"].startswith("attachment"), place
            assert answer.headers["content-type"] == "application/octet-stream"
            assert "sandbox" in answer.headers["content-security-policy"]
            part = client.get(f"/gradio_api/file={place}", headers={"range": "bytes=0-3"})
            assert part.headers["content-disposition"].startswith("attachment")
            assert part.headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize(
    "name",
    [
        "../../../escaped.txt",
        "/etc/cron.d/escaped",
        "..\\..\\escaped.txt",
        "a/../../escaped",
        "~/escaped",
        ".",
        "..",
        "x\0y",
        "\n",
        "x" * 3000,
        "<img src=x>",
    ],
)
def test_an_uploads_name_leads_nowhere(web, name):
    with web.owner() as client:
        answer = upload(client, b"x", name)
    assert answer.status_code in (200, 400, 500) or answer.status_code == 413
    if answer.status_code == 200:
        assert answer.json()[0].startswith(str(web.temporary) + "/")
    assert not list(web.root.parent.rglob("*escaped*")) or all(
        p.is_relative_to(web.temporary) for p in web.root.parent.rglob("*escaped*")
    )


def test_other_bodies_are_small_and_well_formed(around):
    web = around(limits=Limits(body_bytes=10_000, body_seconds=0.5))
    with web.owner() as client:
        assert client.post("/gradio_api/queue/join", json={"data": ["x" * 20_000]}).status_code == 413
        deep = b'{"data": ' + b"[" * 4000 + b"]" * 4000 + b"}"
        for body in (b"", b"{", b"\xff", deep, b"[]", b'"x"', b'{"session_hash": 1}'):
            answer = client.post(
                "/gradio_api/queue/join", content=body, headers={"content-type": "application/json"}
            )
            assert 400 <= answer.status_code < 500, body[:20]
        cookie = "; ".join(f"{k}={v}" for k, v in client.cookies.items())
    slow = raw(
        web,
        f"POST /gradio_api/reset HTTP/1.1\nHost: localhost\nOrigin: http://localhost\n"
        f"Cookie: {cookie}\nContent-Length: 10\nConnection: close\n",
        b"{",
    )
    assert slow.split(" ")[1] == "408"


# Accounts.


@pytest.fixture
def shared(around, tmp_path):
    """A workbench with two accounts."""
    file = tmp_path / "users.json"
    for name in ("ann", "bob"):
        accounts.add(file, name, f"password of {name}")
    return around(access=Access(TOKEN, accounts.read(file)), root=tmp_path / "shared")


def test_users_sign_in_and_the_token_opens_nothing(shared):
    with shared.nobody(origin=shared.url) as client:
        assert client.get("/").headers["location"] == "/login"
        assert client.get("/", params={"token": TOKEN}).headers["location"] == "/login"
        page = client.get("/login")
        assert page.status_code == 200
        assert "<script" not in page.text
        assert client.get("/config").status_code == 401
        wrong = client.post("/login", data={"name": "ann", "password": "<b>wrong</b>"})
        assert wrong.status_code == 401
        assert "set-cookie" not in wrong.headers
        assert "<b>" not in wrong.text
        for body in ({}, {"name": "ann"}, {"name": "../ann", "password": "x"}):
            assert client.post("/login", data=body).status_code in (401, 429)
        assert client.post("/login", data={"name": "ann", "password": "x" * 9000}).status_code == 413
    with shared.user("ann", "password of ann") as client:
        assert client.get("/config").status_code == 200
        assert "Sign out" not in client.get("/nothing").text
        assert client.post("/logout").headers["location"] == "/login"
        assert client.get("/config").status_code == 401


def test_a_login_from_another_page_is_refused(shared):
    with shared.nobody(origin="http://evil.com") as client:
        assert client.post("/login", data={"name": "ann", "password": "password of ann"}).status_code == 403


def test_guessing_a_password_is_slowed_down(shared):
    with shared.nobody(origin=shared.url) as client:
        for _ in range(8):
            shared.walls.guesses.wrong("account ann")
        answer = client.post("/login", data={"name": "ann", "password": "password of ann"})
        assert answer.status_code == 429
        assert "Too many" in answer.text
    with shared.user("bob", "password of bob") as client:
        assert client.get("/config").status_code == 200


def test_a_session_behind_tls_is_kept_from_http(shared):
    host = shared.url.removeprefix("http://")
    with shared.nobody(origin=f"https://{host}") as client:
        found = client.post("/login", data={"name": "ann", "password": "password of ann"})
        assert "; Secure" in found.headers["set-cookie"]


def test_users_see_their_own_files_and_pages_only(shared):
    from tunesmith.ui.workspace import Workspace

    for name in ("ann", "bob"):
        place = Workspace(shared.root / "users" / name)
        (place.exports / "model.txt").write_text(f"of {name}")
    with shared.user("ann", "password of ann") as ann, shared.user("bob", "password of bob") as bob:
        own = shared.root / "users" / "ann" / "exports" / "model.txt"
        # Gradio hands out the first workbench's files only; what the wall says of them is what counts here.
        assert ann.get(f"/gradio_api/file={own}").status_code == 403
        assert "File not allowed" in ann.get(f"/gradio_api/file={own}").text
        assert bob.get(f"/gradio_api/file={own}").json()["detail"] == "This file is not handed out."
        body = {
            "data": [],
            "fn_index": 10**6,
            "session_hash": "pageofann",
            "event_data": None,
            "trigger_id": None,
        }
        assert ann.post("/gradio_api/queue/join", json=body).status_code != 403
        assert bob.post("/gradio_api/queue/join", json=body).status_code == 403
        for path in ("/gradio_api/queue/data?session_hash=pageofann", "/gradio_api/heartbeat/pageofann"):
            assert bob.get(path).status_code == 403


def test_the_workspace_is_the_users_own(shared, around):
    import gradio as gr
    from starlette.requests import Request

    from tunesmith.errors import InputError
    from tunesmith.ui.workspace import workspace_of

    seen = []

    async def inner(scope, receive, send):
        if scope["type"] == "lifespan":
            await shared.walls.app(scope, receive, send)
            return
        seen.append(workspace_of(gr.Request(Request(scope))).root)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    looked = around(access=shared.walls.access, root=shared.root, app=inner)
    for name in ("ann", "bob"):
        with looked.user(name, f"password of {name}") as client:
            assert client.get("/config").status_code == 200
    assert seen == [shared.root / "users" / "ann", shared.root / "users" / "bob"]
    with pytest.raises(InputError, match="did not come"):
        workspace_of(gr.Request(Request({"type": "http", "headers": []})))
