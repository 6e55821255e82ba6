"""Requests to servers that do their worst: each ends in time, in one kind of error, which shows no key."""

from __future__ import annotations

import contextlib
import email.utils
import importlib.machinery
import socket
import sys
import threading
import time
import traceback
import types

import pytest

from tunesmith import http
from tunesmith.errors import RecipeError
from tunesmith.http import Refused, Remote

OK = b"HTTP/1.1 200 OK\r\n"


@contextlib.contextmanager
def answering(reply):
    """The address of a server that reads a request and then lets `reply(write, request)` write bytes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def one(connection):
        with connection, contextlib.suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(65536)
            # What is left unread when a connection is closed resets it, and may take the reply with it.
            head, _, body = request.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split()[0])
            while len(body) < length:
                body += connection.recv(65536)
            reply(connection.sendall, request)

    def serve():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        listener.close()


def posted(content, timeout=5.0, **more):
    """What a post to a server comes to that writes these bytes, or does as a function says."""
    reply = content if callable(content) else lambda write, request: write(content)
    with answering(reply) as url:
        return Remote(url, timeout=timeout, **more).post("/x", {"a": "\ud800"})


def test_a_request_and_its_reply():
    seen = []

    def reply(write, request):
        seen.append(request)
        write(OK + b"Content-Length: 8\r\n\r\n" + b'{"b": 1}')

    assert posted(reply) == {"b": 1}
    assert seen[0].startswith(b"POST /v1/x HTTP/1.1\r\n")
    chunked = OK + b"Transfer-Encoding: chunked\r\n\r\n4\r\n[1, \r\n2\r\n2]\r\n0\r\n\r\n"
    assert posted(chunked) == [1, 2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (OK + b"\r\n", "an empty body"), (OK + b"\r\n{not", "not JSON"), (OK + b"\r\n" + b"[" * 40_000, "not JSON"),
        (OK + b"Content-Length: 9\r\n\r\n{}", "cut off"), (b"", "RemoteDisconnected"),
        (b"SSH-2.0\r\n\r\n", "BadStatusLine"), (OK + b"x: " + b"y" * 70_000, "LineTooLong"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "IncompleteRead"),
    ],
)  # fmt: skip
def test_a_reply_that_is_none_may_be_charged_and_is_asked_again(content, said):
    with pytest.raises(Refused, match=said) as error:
        posted(content)
    assert error.value.again
    assert error.value.charged
    assert len(str(error.value)) <= http.SHOWN


def endless(write, request):
    write(OK + b"\r\n")
    while True:
        write(b"x" * 65536)


def test_a_body_without_an_end_is_left(monkeypatch):
    monkeypatch.setattr(http, "LARGEST", 200_000)
    with pytest.raises(Refused, match="above 200,000 bytes"):
        posted(endless)


def dripping(beginning):
    def reply(write, request):
        write(beginning)
        while True:
            write(b" ")
            time.sleep(0.05)

    return reply


@pytest.mark.parametrize(
    "beginning",
    [b"HTTP/1.1 200", OK + b"X: ", OK + b"\r\n", OK + b"Content-Length: 900000\r\n\r\n",
     OK + b"Transfer-Encoding: chunked\r\n\r\nfffff\r\n", b"HTTP/1.1 500 Oh\r\n\r\n"],
)  # fmt: skip
def test_the_deadline_holds_for_the_whole_reply_wherever_it_drips(beginning):
    """A socket's own time-out begins anew with each byte, in the status line and the headers as in the body."""
    begun = time.monotonic()
    with pytest.raises(Refused) as error:
        posted(dripping(beginning), timeout=0.25)
    assert 0.2 < time.monotonic() - begun < 3
    assert error.value.again


def test_a_server_that_says_nothing_is_left_and_may_charge():
    with pytest.raises(Refused, match=r"timed out|Timeout") as error:
        posted(lambda write, request: time.sleep(3), timeout=0.3)
    assert error.value.charged
    with pytest.raises(Refused) as error:
        Remote("http://127.0.0.1:1/v1").post("/x", {})
    assert not error.value.charged, "who is not reached does no work"


@pytest.mark.parametrize(
    ("status", "again", "hopeless", "charged"),
    [
        (400, False, False, False), (401, False, True, False), (404, False, True, False), (408, True, False, False),
        (429, True, False, False), (500, True, False, True), (502, True, False, True), (503, True, False, False),
        (504, True, False, True), (307, False, True, False),
    ],
)  # fmt: skip
def test_what_a_status_means(status, again, hopeless, charged):
    with pytest.raises(Refused, match=f"HTTP {status} Oh: no") as error:
        posted(f"HTTP/1.1 {status} Oh\r\nLocation: http://127.0.0.1:1/\r\n\r\nno".encode())
    found = error.value
    assert (found.code, found.again, found.hopeless, found.charged) == (status, again, hopeless, charged)


def test_waits_grow_heed_retry_after_and_have_an_end():
    refusal = Refused("x", again=True)
    waits = [http.pause(n, refusal, backoff=1.0, draw=lambda: 0.0) for n in range(9)]
    assert waits[:4] == [1, 2, 4, 8]
    assert waits[8] == http.LONGEST_WAIT
    assert len({http.pause(1, refusal, backoff=1.0) for _ in range(20)}) > 1, "not all come back at once"
    asked = Refused("x", again=True, wait=7.0)
    assert http.pause(3, asked, backoff=1.0, draw=lambda: 1.0) == 7 * 1.5


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("12", 12, 12), ("0.5", 0.5, 0.5), ("-3", 0, 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("in ten minutes", 590, 601),
    ],
)  # fmt: skip
def test_retry_after_is_read_in_both_forms(value, low, high):
    if value == "in ten minutes":
        value = email.utils.formatdate(time.time() + 600, usegmt=True)
    with pytest.raises(Refused) as error:
        posted(f"HTTP/1.1 429 Slow\r\nRetry-After: {value}\r\n\r\n".encode())
    assert low <= error.value.wait <= high


@pytest.mark.parametrize("value", ["soon", "nan", ""])
def test_a_retry_after_that_says_nothing_is_none(value):
    with pytest.raises(Refused) as error:
        posted(f"HTTP/1.1 429 Slow\r\nRetry-After: {value}\r\n\r\n".encode())
    assert error.value.wait is None


@pytest.mark.parametrize("header", ["Authorization", "x-api-key"])
def test_a_key_is_sent_and_never_said(header, monkeypatch):
    monkeypatch.setenv("OWN_KEY", "sk-secret 42\n")
    seen = []

    def reply(write, request):
        seen.append(request)
        text = b"bad \x1b[2J" + b" " * 900 + request.split(header.encode() + b": ")[-1].split(b"\r\n")[0]
        write(b"HTTP/1.1 401 sk-secret 42\r\n\r\n" + text)

    with pytest.raises(Refused) as error:
        posted(reply, api_key_env="OWN_KEY", key_header=header)
    said = str(error.value)
    assert b"sk-secret 42" in seen[0]
    assert "secret" not in said
    assert "***" in said
    assert "\x1b" not in said
    assert "secret" not in repr(Remote("http://127.0.0.1:1", api_key_env="OWN_KEY"))


@pytest.mark.parametrize(
    ("url", "more", "said"),
    [
        ("http://example.com/v1", {}, "readable"), ("ftp://127.0.0.1", {}, "is none"), ("127.0.0.1:80", {}, "is none"),
        ("https://me:hunter2@host/v1", {}, "'https://host/v1' is none"), ("https://h/v1?key=hunter2", {}, "is none"),
        ("http://127.0.0.1:99999/v1", {}, "is none"), ("https://h", {"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY"),
        ("https://h", {"api_key_env": "TWO_LINES"}, "is no key"),
    ],
)  # fmt: skip
def test_what_is_not_safe_is_refused(url, more, said, monkeypatch):
    monkeypatch.setenv("TWO_LINES", "hunter2\nmore")
    with pytest.raises(RecipeError, match=said) as error:
        Remote(url, **more)
    assert "hunter2" not in str(error.value)
    assert error.value.fix


# keys


class Locked(Exception):
    """What the stand-in for the keyring's library raises."""


class None_(Locked):
    """Where there is no keyring at all."""


@pytest.fixture
def keyring(monkeypatch):
    """The library `keyring` with a backend of the test's: the real library where it is installed, else one with the
    same functions and errors."""
    kept = {}
    try:
        import keyring as real
        from keyring.backend import KeyringBackend
    except ImportError:
        real = types.ModuleType("keyring")
        real.errors = types.ModuleType("keyring.errors")
        real.errors.KeyringError, real.errors.NoKeyringError = Locked, None_
        monkeypatch.setitem(sys.modules, "keyring", real)
        monkeypatch.setitem(sys.modules, "keyring.errors", real.errors)
        real.__spec__ = importlib.machinery.ModuleSpec("keyring", None)
        real.get_password = lambda service, name: read(service, name)
    else:

        class InMemory(KeyringBackend):
            priority = 1

            def get_password(self, service, username):
                return read(service, username)

            set_password = delete_password = None

        before = real.get_keyring()
        real.set_keyring(InMemory())
        monkeypatch.setattr(real, "restored", before, raising=False)

    def read(service, name):
        found = kept.get((service, name))
        if isinstance(found, Exception):
            raise found
        return found

    yield real, kept
    if hasattr(real, "restored"):
        real.set_keyring(real.restored)


def test_a_key_comes_from_the_environment_and_else_from_the_keyring(keyring, monkeypatch):
    library, kept = keyring
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    asked = {"api_key_env": "JUDGE_KEY"}
    with pytest.raises(RecipeError, match=r"is not set\.\n.*keyring set tunesmith JUDGE_KEY"):
        Remote("https://example.com/v1", **asked)
    kept["tunesmith", "JUDGE_KEY"] = "sk-of-the-keyring"
    kept["another", "JUDGE_KEY"] = "sk-of-another"
    seen = []
    reply = lambda write, request: (seen.append(request), write(OK + b"Content-Length: 2\r\n\r\n{}"))  # noqa: E731
    posted(reply, **asked)
    monkeypatch.setenv("JUDGE_KEY", "sk-of-the-environment")
    posted(reply, **asked)
    assert [b"Bearer sk-of-the-keyring" in seen[0], b"Bearer sk-of-the-environment" in seen[1]] == [
        True,
        True,
    ]
    monkeypatch.delenv("JUDGE_KEY")
    for told in (library.errors.KeyringError("locked: sk-secret"), RuntimeError("sk-secret")):
        kept["tunesmith", "JUDGE_KEY"] = told
        with pytest.raises(RecipeError, match="Unlock it") as error:
            Remote("https://example.com/v1", **asked)
        assert "sk-secret" not in "".join(traceback.format_exception(error.value))
    kept["tunesmith", "JUDGE_KEY"] = library.errors.NoKeyringError("none")
    with pytest.raises(RecipeError, match="is not set"):
        Remote("https://example.com/v1", **asked)


def test_a_server_s_token_may_be_in_the_keyring(keyring, monkeypatch):
    from tunesmith.serving.server import token_from

    monkeypatch.delenv("MY_TOKEN", raising=False)
    keyring[1]["tunesmith", "MY_TOKEN"] = "t" * 40
    assert token_from("MY_TOKEN", without=False, host="127.0.0.1") == ("t" * 40, False)


def test_without_the_keyring_s_library_the_environment_is_enough(monkeypatch):
    monkeypatch.setitem(sys.modules, "keyring", None)
    monkeypatch.setattr(http.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    assert http.secret("JUDGE_KEY") is None
    with pytest.raises(RecipeError, match=r"pip install tunesmith\[keyring\]"):
        Remote("https://example.com/v1", api_key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", " sk-1 ")
    assert http.secret("JUDGE_KEY") == "sk-1"
