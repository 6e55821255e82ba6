"""A Space of the Hugging Face Hub in one process tree: the server on the machine itself, and the page before it.

This file is copied into deployment folders as app.py. The server listens at the loopback address with a token that is
made at each start, so that only the page is reached from outside.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PORT = int(os.environ.get("TUNESMITH_PORT", "8000"))


def started(name: str, token: str) -> subprocess.Popen[bytes]:
    """The server as a process of its own."""
    command = [
        sys.executable, "-m", "tunesmith", "serve", str(FOLDER / "model"), "--name", name,
        "--engine", "transformers", "--port", str(PORT), "--token-env", "TUNESMITH_TOKEN",
    ]  # fmt: skip
    return subprocess.Popen(command, env={**os.environ, "TUNESMITH_TOKEN": token})


def wait(server: subprocess.Popen[bytes], seconds: float = 600.0) -> None:
    """Until it answers. Raises SystemExit where it ends before."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if server.poll() is not None:
            sys.exit(f"the server ended with exit code {server.returncode}; its words are above")
        try:
            with opener.open(f"http://127.0.0.1:{PORT}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    sys.exit("the server does not answer")


def end_with(server: subprocess.Popen[bytes]) -> None:
    """End this process when the server has ended: the page alone answers nothing, and a container can start anew."""
    server.wait()
    os.kill(os.getpid(), signal.SIGTERM)


def main(**options: Any) -> None:
    """Serve model and page until Ctrl-C or SIGTERM, which containers are stopped with; no server is left behind."""
    demo = importlib.import_module("demo")  # beside this file
    name = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))["name"]
    token = secrets.token_urlsafe(32)
    signal.signal(signal.SIGTERM, lambda *given: sys.exit(143))
    server = started(name, token)
    try:
        wait(server)
        threading.Thread(target=end_with, args=(server,), daemon=True).start()
        demo.main(demo.Server(f"http://127.0.0.1:{PORT}/v1", name, token), folder=FOLDER, **options)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


if __name__ == "__main__":
    # Spaces reach the page from outside the container.
    main(server_name="0.0.0.0", server_port=7860)
