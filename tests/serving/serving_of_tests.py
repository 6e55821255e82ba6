"""A server in this process, as `tunesmith serve` starts it, but for its signals."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path

from tunesmith.serving.limits import Limits

TOKEN = "a-token-of-tests-1234"


class Running:
    """An address with what is behind it."""

    def __init__(self, url, batcher, loaded) -> None:
        self.url, self.batcher, self.loaded = url, batcher, loaded

    def client(self, **options):
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=TOKEN, max_retries=0, timeout=60, **options)


@contextlib.contextmanager
def served(
    base: Path,
    adapters: dict[str, Path] | None = None,
    *,
    limits: Limits | None = None,
    buffer: int | None = None,
    **options,
):
    """`buffer` is how much the system keeps of what a client has not read, in bytes."""
    import uvicorn

    from tunesmith.serving.app import Access, create
    from tunesmith.serving.batching import Batcher
    from tunesmith.serving.models import load, sources

    limits = limits or Limits()
    loaded = load(*sources(str(base), "model", adapters or {}), dtype="float32", device="cpu")
    batcher = Batcher(loaded.model, max_rows=limits.concurrency, adapters=loaded.adapters)
    app = create(loaded, batcher, access=Access(TOKEN), limits=limits, **options)
    listening = socket.socket()
    if buffer:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    try:
        yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", batcher, loaded)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
        listening.close()
