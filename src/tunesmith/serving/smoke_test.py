"""Asks a deployed model over HTTP whether it is the one that was packed. Needs Python alone, and no package.

This file is also copied into deployment folders, where it lies beside manifest.json:

    TUNESMITH_TOKEN=... python smoke_test.py --url http://127.0.0.1:8000/v1

It compares the files with their hashes, and the server's answers with those that were written down when the folder was
made: each prompt has to be as many tokens, and each answer to begin as it did then, up to the first token that another
precision could choose otherwise. Exit code 0 where all is well, 1 where something is not.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SECONDS = 300.0
"""For an answer, of a large model on a small machine."""

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks without a proxy: the token is for the server alone."""


class Failed(Exception):
    """A check that failed, in words."""


def check_files(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Every file of the manifest is there with its hash."""
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise Failed(f"{name} is missing")
        if path.stat().st_size != facts["bytes"] or sha256(path) != facts["sha256"]:
            raise Failed(f"{name} is not the file that was packed")
    return f"{len(manifest['files'])} files have their hashes"


def sha256(path: Path) -> str:
    """The hash of a file of any size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


class Asker:
    """Requests to the server."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url, self.token = url.rstrip("/"), token

    def open(self, path: str, body: Any = None, *, token: str | None = None, seconds: float = SECONDS) -> Any:
        """The reply to a request. Raises urllib's errors."""
        headers = {"Content-Type": "application/json"}
        if token or self.token:
            headers["Authorization"] = f"Bearer {token or self.token}"
        data = None if body is None else json.dumps(body).encode()
        return OPENER.open(urllib.request.Request(self.url + path, data, headers), timeout=seconds)

    def ask(self, path: str, body: Any = None) -> Any:
        """The JSON of a reply. Raises Failed with the server's words."""
        try:
            with self.open(path, body) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode("utf-8", "replace")
            raise Failed(f"{path} was answered with {error.code}: {said}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise Failed(f"{path} was not answered: {error!r}") from None

    def wait(self, seconds: float, say: Callable[[str], None] = lambda line: None) -> str:
        """Until the server answers at all; that it does not yet is said once."""
        until = time.monotonic() + seconds
        is_said = False
        while True:
            try:
                with self.open("/models", seconds=5):
                    return "the server answers"
            except urllib.error.HTTPError as error:
                if error.code == 401:
                    had = "is not the token of this server" if self.token else "is not set"
                    raise Failed(
                        f"TUNESMITH_TOKEN {had}: it shows it at the start, or was given it"
                    ) from None
                if error.code not in (502, 503, 504) or time.monotonic() > until:
                    raise Failed(f"the server refuses: {error.code} {error.reason}") from None
            except (OSError, http.client.HTTPException) as error:
                if time.monotonic() > until:
                    raise Failed(f"nobody answers at {self.url}: {error}") from None
            if not is_said:
                is_said = True
                say(f"{self.url} does not answer yet; it is waited for, up to {seconds:g} s")
            time.sleep(0.2)


def check_alive(asker: Asker) -> str:
    """The server says that it is well, which it says to everybody: no token is sent."""
    place = asker.url.removesuffix("/v1") + "/health"
    try:
        with OPENER.open(place, timeout=10):
            return "the server is well"
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"{place} was not answered: {error}") from None


def check_names(asker: Asker, manifest: Mapping[str, Any]) -> str:
    """The model is served under its name."""
    names = [model["id"] for model in asker.ask("/models")["data"]]
    if manifest["name"] not in names:
        raise Failed(f"'{manifest['name']}' is not served, but {', '.join(names)}")
    return f"'{manifest['name']}' is served"


def check_token(asker: Asker) -> str:
    """Another token is refused."""
    if not asker.token:
        return "no token was given, so none was tried"
    try:
        with asker.open("/models", token="not-" + asker.token):
            pass
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return "another token is refused"
        raise Failed(f"another token gives {error.code}") from None
    raise Failed("another token is taken as well")


def check_answers(asker: Asker, manifest: Mapping[str, Any]) -> str:
    """Prompts are as many tokens as they were, and answers begin as they did."""
    same = ended = compared = 0
    for probe in manifest["probes"]:
        asked = probe["messages"][-1]["content"]
        body = {
            "model": manifest["name"], "messages": probe["messages"], "temperature": 0,
            "max_tokens": probe["max_tokens"],
        }  # fmt: skip
        reply = asker.ask("/chat/completions", body)
        text, reason = reply["choices"][0]["message"]["content"] or "", reply["choices"][0]["finish_reason"]
        read = reply["usage"]["prompt_tokens"]
        if read != probe["prompt_tokens"]:
            raise Failed(f"{asked!r} is read as {read} tokens instead of {probe['prompt_tokens']}")
        if not text.strip() and probe["answer"] != "":
            raise Failed(f"{asked!r} is answered with nothing")
        if not text.startswith(probe["sure"] or ""):
            raise Failed(
                f"{asked!r} is answered with {text[:80]!r}, which should begin {probe['sure'][:80]!r}"
            )
        compared += len(probe["sure"] or "")
        same += text == probe["answer"]
        ended += reason == "stop"
    asked = f"{len(manifest['probes'])} questions are answered, {ended} ended by themselves"
    if not compared:
        return f"{asked}; not proven: the folder was made without answers to compare with, or with none that is sure"
    return f"{asked}; {compared} characters are as they were, {same} answers the very same"


def check_stream(asker: Asker, manifest: Mapping[str, Any]) -> str:
    """An answer comes in pieces as well, and is the same."""
    probe = manifest["probes"][0]
    body = {
        "model": manifest["name"], "messages": probe["messages"], "temperature": 0,
        "max_tokens": probe["max_tokens"],
    }  # fmt: skip
    began = time.perf_counter()
    first, text, last = None, "", ""
    try:
        with asker.open("/chat/completions", {**body, "stream": True}) as reply:
            for line in reply:
                last = line.decode("utf-8").strip() or last
                if not line.startswith(b"data: {"):
                    continue
                first = first or time.perf_counter() - began
                event = json.loads(line[6:])
                if "error" in event:
                    raise Failed(f"the stream broke off: {event['error']['message']}")
                text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Failed(f"the stream broke off: {error!r}") from None
    whole = asker.ask("/chat/completions", body)["choices"][0]["message"]["content"] or ""
    if last != "data: [DONE]" or text != whole:
        raise Failed(f"in pieces the answer is {text[:80]!r}, and in one {whole[:80]!r}")
    return f"in pieces the same, the first after {1000 * (first or 0):.0f} ms"


def main(arguments: list[str] | None = None) -> int:
    """Check, print a line for each, and give the exit code."""
    parser = argparse.ArgumentParser(
        description="Asks a deployed model over HTTP whether it is the one that was packed.",
    )
    parser.add_argument(
        "--url",
        default=os.environ.get("TUNESMITH_URL", "http://127.0.0.1:8000/v1"),
        help="the server, up to /v1, also in TUNESMITH_URL (default: %(default)s)",
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=120.0,
        help="seconds until the server has to answer (default: %(default)g)",
    )
    parser.add_argument("--no-files", action="store_true", help="leave the hashes of the files out")
    parser.add_argument(
        "--alive", action="store_true", help="only whether the server says that it is well, without a token"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    given = parser.parse_args(arguments)
    folder = Path(__file__).resolve().parent
    asker = Asker(given.url, os.environ.get("TUNESMITH_TOKEN") or None)
    try:
        manifest = {} if given.alive else json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        said = f"manifest.json cannot be read: {error}"
        found_none = {"passed": False, "checks": [{"check": "manifest", "passed": False, "said": said}]}
        print(json.dumps(found_none) if given.json else f"FAILED  {said}")
        return 1
    checks: dict[str, Callable[[], str]] = {
        "files": lambda: check_files(folder, manifest),
        "server": lambda: asker.wait(given.wait, lambda line: print(line, file=sys.stderr, flush=True)),
        "name": lambda: check_names(asker, manifest),
        "token": lambda: check_token(asker),
        "answers": lambda: check_answers(asker, manifest),
        "stream": lambda: check_stream(asker, manifest),
    }
    if given.no_files:
        del checks["files"]
    if given.alive:
        checks = {"server": lambda: check_alive(asker)}
    found: list[dict[str, Any]] = []
    for name, check in checks.items():
        try:
            found.append({"check": name, "passed": True, "said": check()})
        except Failed as failure:
            found.append({"check": name, "passed": False, "said": str(failure)})
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            said = f"manifest.json or the server's reply is not as it should be: {error!r}"
            found.append({"check": name, "passed": False, "said": said})
        if not given.json:
            print(f"{'ok' if found[-1]['passed'] else 'FAILED':<8}{name:<9}{found[-1]['said']}", flush=True)
        if name == "server" and not found[-1]["passed"]:
            break
    passed = all(one["passed"] for one in found)
    if given.json:
        print(json.dumps({"passed": passed, "checks": found}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
