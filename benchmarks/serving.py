"""64 streams at once against the same 64 one by one, over HTTP, on one machine in one run; and how soon decoding stops.

    python benchmarks/serving.py [--model tiny] [--clients 64] [--tokens 64]

Both are asked with OpenAI's own client of the same server, and have to give the same texts. The last line is one JSON
object; exit code 1 below 4 times the throughput, for a text that differs, or where a row still ran 500 ms after its
client had left.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import openai
import uvicorn

from tunesmith.plan import device
from tunesmith.serving.app import Access, create
from tunesmith.serving.batching import Batcher, Row
from tunesmith.serving.limits import Limits
from tunesmith.serving.models import load, sources
from tunesmith.training.fit import quiet_libraries

LEAST = 4.0
SOONEST = 0.5
TOKEN = "token-of-the-benchmark"


LEAVERS = 8
"""Of the streams at once, how many leave before their end."""
LONG = 400
"""Tokens of an answer that somebody leaves."""
PATIENCE = 120.0
"""Seconds for whatever is waited for."""


def waited(what: str, is_so: Callable[[], bool], *, every: float = 0.0005) -> None:
    """Wait until it is so. Exits with code 1 where it does not come."""
    until = time.monotonic() + PATIENCE
    while not is_so():
        if time.monotonic() > until:
            sys.exit(f"{what} did not come within {PATIENCE:.0f} s")
        time.sleep(every)


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    quiet_libraries()
    loaded = load(*sources(given.model, "model", {}), dtype="float32", device=device())
    batcher = Batcher(loaded.model, max_rows=given.clients, adapters=loaded.adapters)
    app = create(loaded, batcher, access=Access(TOKEN), limits=Limits(concurrency=given.clients))
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    waited("the server's start", lambda: server.started, every=0.01)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=TOKEN, max_retries=0)

    def ask(number: int) -> str:
        stream = client.chat.completions.create(
            model="model",
            messages=[{"role": "user", "content": f"How many rows have a count above {number}?"}],
            max_tokens=given.tokens,
            stream=True,
            extra_body={"ignore_eos": True},  # the same work for all
        )
        return "".join(piece.choices[0].delta.content or "" for piece in stream)

    ask(0)
    began = time.perf_counter()
    alone = [ask(number) for number in range(given.clients)]
    one_by_one = time.perf_counter() - began
    with ThreadPoolExecutor(given.clients) as threads:
        began = time.perf_counter()
        together = list(threads.map(ask, range(given.clients)))
        at_once = time.perf_counter() - began
    tokens = given.clients * given.tokens
    print(f"one by one {tokens / one_by_one:8.0f} tokens/s")
    print(
        f"at once    {tokens / at_once:8.0f} tokens/s, {sum(a == b for a, b in zip(alone, together))} texts the same"
    )

    rows: dict[int, Row] = {}
    submit = batcher.submit

    def kept(row: Row) -> None:
        rows[row.ask.seed] = row
        submit(row)

    batcher.submit = kept  # type: ignore[method-assign]
    streams = {}
    for number in range(given.clients):
        streams[number] = client.completions.create(
            model="model", prompt="How many", max_tokens=LONG, stream=True, seed=number,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
    for stream in streams.values():
        next(iter(stream))
    step = max(given.clients // LEAVERS, 1)
    leaving = []
    for number in list(streams)[::step][:LEAVERS]:
        streams[number].close()
        left = time.perf_counter()
        waited("a row's end", lambda: rows[number].ended)  # noqa: B023, called before the next one
        if len(rows[number].ids) < LONG:
            leaving.append(time.perf_counter() - left)
    beside = sum(not row.ended for row in rows.values())
    for stream in streams.values():
        stream.close()
    if not leaving:
        sys.exit("every answer was at its end before its client left: take a larger model")
    print(
        f"decoding stops {1000 * max(leaving):.0f} ms after a client has left, at most, of {len(leaving)} that left "
        f"one after the other, {beside} others being answered to the end of it"
    )
    server.should_exit = True
    thread.join(30)  # the app's end stops the batching; an interpreter that ends before it would abort
    ratio = one_by_one / at_once
    good = ratio >= LEAST and alone == together and max(leaving) < SOONEST
    print(
        json.dumps(
            {
                "name": "serving, 64 streams",
                "ours": round(tokens / at_once, 1),
                "peer": round(tokens / one_by_one, 1),
                "ratio": round(ratio, 2),
                "unit": "tokens/s",
                "n": given.clients,
            }
        )
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
