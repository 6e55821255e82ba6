"""Any OpenAI-compatible server's completions, by token ids: vLLM, SGLang, llama.cpp, and what else speaks so.

Base and tuned model are served under names of their own. The fields that make an answer comparable token by token
(stop tokens, ids of the answer) are extensions; a server that refuses them is asked without, which is said.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tunesmith.errors import ModelError, RecipeError, RunError, counted
from tunesmith.generation import Generated, cut

if TYPE_CHECKING:
    from tunesmith.engines import Asked, Finished, Say, Source
    from tunesmith.recipe import Server

BACKOFF, LONGEST_WAIT = 0.5, 60.0
"""Seconds before the first repetition, each further one twice as long, and at most."""
SHOWN = 200
"""Characters of a server's words that an error repeats."""


class _Refused(Exception):
    """A request that gave no answer; `again` where another try may."""

    def __init__(self, said: str, *, code: int = 0, again: bool, wait: float | None = None) -> None:
        super().__init__(said)
        self.code, self.again, self.wait = code, again, wait


def answer(source: Source, asked: Asked, finished: Finished, say: Say) -> None:
    """Answer the prompts, several at once; `finished` gets each one as it comes, in any order."""
    server = source.server
    call = _caller(server)
    model, stop = server.served(source.name), threading.Event()
    rooms = [asked.room(prompt, source.context) for prompt in asked.prompts]
    waiting = []
    for number, room in enumerate(rooms):
        if room:
            waiting.append(number)
        else:
            finished(number, Generated((), "", "length"))
    extended = True

    def one(number: int) -> Generated:
        prompt = list(asked.prompts[number])
        seed = asked.seeds[number] if asked.seeds else asked.seed
        body = _body(model, prompt, rooms[number], asked, source.tokenizer, seed=seed, extended=extended)
        draw = random.Random(number)
        for attempt in range(server.retries + 1):
            try:
                return _answer(call(body), prompt, asked, source.tokenizer)
            except _Refused as refusal:
                if not refusal.again or attempt == server.retries:
                    raise
                pause = min(refusal.wait or BACKOFF * 2**attempt * (1 + draw.random()), LONGEST_WAIT)
                if stop.wait(pause):
                    raise
        raise AssertionError("unreachable")

    def failed(number: int, refusal: _Refused) -> RunError:
        return RunError(
            f"The server gave no answer to prompt {number} in {counted(server.retries + 1, 'request')}."
            if refusal.again
            else f"The server refused prompt {number}.",
            found=f"{server.base_url}, model '{model}': {refusal}",
            fix="Check evaluation.server (base_url, models, api_key_env), and start again: the answers so far are "
            "kept.",
        )

    if waiting:
        # The first request shows whether the server knows the extensions.
        try:
            try:
                first = one(waiting[0])
            except _Refused as refusal:
                if refusal.code not in (400, 422):
                    raise
                extended = False
                first = one(waiting[0])
                say(
                    f"The server at {urlsplit(server.base_url).netloc} refuses stop tokens and ids, so it is asked "
                    f"without: {refusal}"
                )
        except _Refused as refusal:
            raise failed(waiting[0], refusal) from None
        finished(waiting[0], first)
    with ThreadPoolExecutor(server.concurrency, thread_name_prefix="ask") as threads:
        asking = {threads.submit(one, number): number for number in waiting[1:]}
        try:
            for done in as_completed(asking):
                finished(asking[done], done.result())
        except _Refused as refusal:
            raise failed(asking[done], refusal) from None
        finally:
            stop.set()
            threads.shutdown(wait=False, cancel_futures=True)


def _body(
    model: str, prompt: list[int], room: int, asked: Asked, tokenizer: Any, *, seed: int, extended: bool
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": room,
        "temperature": asked.temperature,
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "n": 1,
        "stream": False,
    }
    if extended:
        # Servers fill what is left open from the model's own generation_config.json.
        return body | {
            "return_token_ids": True,
            "stop_token_ids": list(asked.stop_ids),
            "ignore_eos": True,
            "top_k": -1,
            "repetition_penalty": 1.0,
            "skip_special_tokens": True,
        }
    ends = [str(tokenizer.decode([token])) for token in asked.stop_ids]
    return body | ({"stop": ends[:4]} if ends else {})


def _answer(content: Any, prompt: list[int], asked: Asked, tokenizer: Any) -> Generated:
    try:
        choice = content["choices"][0]
        text, reason = choice["text"], choice["finish_reason"]
        used = content.get("usage") or {}
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _Refused("a reply without choices[0].text and finish_reason", again=True) from None
    read, echoed = used.get("prompt_tokens"), choice.get("prompt_token_ids")
    if (echoed and list(echoed) != prompt) or (isinstance(read, int) and read != len(prompt)):
        raise ModelError(
            "The server read other tokens than it was sent.",
            found=f"{read if read is not None else len(echoed or [])} tokens instead of {len(prompt)}; a second "
            "beginning-of-text token is the usual reason",
            fix="Use a server that takes a prompt of token ids as it is, or another evaluation.engine.",
        )
    if reason not in ("stop", "length"):
        raise _Refused(f"an answer with the finish reason '{reason}'", again=True)
    ids = choice.get("token_ids")
    if ids is None:
        again = tokenizer.encode(text, add_special_tokens=False)
        return Generated(tuple(again), text, reason, exact=False)
    found = cut(list(ids), asked.stop_ids, tokenizer)
    if reason == "stop" and found.finish_reason != "stop":
        # Some servers leave the stop token out of the ids.
        ended = choice.get("stop_reason")
        return Generated(found.ids, found.text, "stop", ended if isinstance(ended, int) else None)
    return found


def _caller(server: Server) -> Any:
    """A function that sends one request's body and gives the reply's content."""
    from tunesmith.evaluation.judging.client import is_loopback, opener

    address = urlsplit(server.base_url)
    host = address.hostname or ""
    if address.scheme not in ("http", "https") or not host or address.username or address.query:
        raise RecipeError(
            "The address in evaluation.server.base_url is none of a server.",
            found=f"{address.scheme or 'no scheme'}://{host or 'no host'}"
            + (" with a user name" if address.username else ""),
            fix="Give evaluation.server.base_url as https://HOST/v1; a key goes into an environment variable "
            "(api_key_env).",
        )
    if address.scheme == "http" and not is_loopback(host):
        raise RecipeError(
            f"The server at {host} would be asked over http, readable for everybody on the way.",
            fix="Use https.",
        )
    headers = {"Content-Type": "application/json"}
    if server.api_key_env:
        key = (os.environ.get(server.api_key_env) or "").strip()
        if key and not (key.isascii() and key.isprintable()):
            raise RecipeError(
                f"The environment variable {server.api_key_env} holds no key.",
                found="characters that no header may have",
                fix="Set it to the key alone.",
            )
        if not key:
            raise RecipeError(
                f"The environment variable {server.api_key_env}, which should hold the server's key, is not set.",
                fix=f"Set it: export {server.api_key_env}=...",
            )
        headers["Authorization"] = f"Bearer {key}"
    asking = opener(host)
    place = server.base_url.rstrip("/") + "/completions"

    def call(body: dict[str, Any]) -> Any:
        request = urllib.request.Request(place, json.dumps(body).encode(), headers)
        try:
            with asking.open(request, timeout=server.timeout) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            again = error.code in (408, 409, 425, 429) or error.code >= 500
            wait = error.headers.get("Retry-After", "") if error.headers else ""
            try:
                said = error.read(4 * SHOWN).decode("utf-8", "replace")
            except (OSError, http.client.HTTPException):
                said = ""
            raise _Refused(
                shown(f"HTTP {error.code} {error.reason} {said}"),
                code=error.code,
                again=again,
                wait=float(wait) if wait.isdigit() else None,
            ) from None
        except (
            OSError,
            ValueError,
            http.client.HTTPException,
        ) as error:  # not reached, timed out, cut off, no JSON
            raise _Refused(shown(f"{type(error).__name__}: {error}"), again=True) from None

    def shown(said: str) -> str:
        """What a server says, without the key, should it repeat it, and without control characters."""
        key = headers.get("Authorization", "").removeprefix("Bearer ")
        plain = "".join(c if c.isprintable() else " " for c in (said.replace(key, "[key]") if key else said))
        return " ".join(plain.split())[:SHOWN]

    return call
