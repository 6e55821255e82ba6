"""A judge on this machine for tests: an HTTP server that answers, or fails, as it is told."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def openai(text, *, read=7, written=2):
    """A good reply as an OpenAI-compatible endpoint gives it."""
    message = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
    return 200, json.dumps({**message, "usage": {"prompt_tokens": read, "completion_tokens": written}}), {}


def dripping(write):
    """A good reply that comes byte by byte, each in time and the last one never."""
    write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
    for _ in range(5000):
        write(b" ")
        time.sleep(0.05)


@contextlib.contextmanager
def serving(reply):
    """The address of a server, and what it was sent: (path, body, headers).

    `reply(number, body)` gives status, body and headers, or seconds to wait before the line is dropped, or a
    function that writes bytes.
    """
    seen, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append((self.path, body, dict(self.headers)))
                number = len(seen)
            given = reply(number, body)
            if isinstance(given, int | float):
                time.sleep(given)
                return
            if callable(given):
                with contextlib.suppress(OSError):
                    given(lambda content: (self.wfile.write(content), self.wfile.flush()))
                return
            status, text, headers = given
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(text.encode())

        def log_message(self, *given):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
