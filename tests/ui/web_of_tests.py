"""The workbench in this process, as `tunesmith web` starts it, but for its signals."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tunesmith.serving.server import listen

TOKEN = "a-token-of-tests-1234"


@dataclass
class Running:
    """A workbench that answers."""

    url: str
    walls: Any

    @property
    def root(self) -> Path:
        return self.walls.root

    @property
    def temporary(self) -> Path:
        return self.walls.temporary

    def nobody(self, **headers: str) -> httpx.Client:
        """A browser that has not come in."""
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)

    @contextlib.contextmanager
    def owner(self, **headers: str) -> Iterator[httpx.Client]:
        """A browser that opened the address with the token, on a page of the workbench."""
        with self.nobody(**{"origin": self.url, **headers}) as client:
            found = client.get("/", params={"token": TOKEN}, headers={"origin": self.url})
            assert found.status_code == 303, found.text
            yield client

    @contextlib.contextmanager
    def user(self, name: str, password: str) -> Iterator[httpx.Client]:
        """A browser that has signed in."""
        with self.nobody(origin=self.url) as client:
            found = client.post("/login", data={"name": name, "password": password})
            assert found.status_code == 303, found.text
            yield client


@contextlib.contextmanager
def listening(walls: Any):
    """The address at which an application answers."""
    import uvicorn

    at = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{at.getsockname()[1]}"
    config = uvicorn.Config(
        walls,
        log_level="critical",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [at]}, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    assert server.started
    try:
        yield Running(url, walls)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
        at.close()
