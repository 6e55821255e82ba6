"""Any OpenAI-compatible server's completions, by token ids: vLLM, SGLang, llama.cpp, and what else speaks so.

Base and tuned model are served under names of their own. The fields that make an answer comparable token by token
(stop tokens, ids of the answer) are extensions; a server that refuses them is asked without, which is said.
"""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tunesmith.errors import ModelError, RunError, counted
from tunesmith.generation import Generated, cut
from tunesmith.http import Refused, Remote, pause

if TYPE_CHECKING:
    from tunesmith.engines import Asked, Finished, Say, Source

BACKOFF = 0.5
"""Seconds before the first repetition; each further one waits twice as long."""


def answer(source: Source, asked: Asked, finished: Finished, say: Say) -> None:
    """Answer the prompts, several at once; `finished` gets each one as it comes, in any order."""
    server = source.server
    remote = Remote(
        server.base_url,
        setting="evaluation.server.base_url",
        api_key_env=server.api_key_env,
        timeout=server.timeout,
    )
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
                return _answer(remote.post("/completions", body), prompt, asked, source.tokenizer)
            except Refused as refusal:
                if not refusal.again or attempt == server.retries:
                    raise
                if stop.wait(pause(attempt, refusal, backoff=BACKOFF, draw=draw.random)):
                    raise
        raise AssertionError("unreachable")

    def failed(number: int, refusal: Refused) -> RunError:
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
            except Refused as refusal:
                if refusal.code not in (400, 422):
                    raise
                extended = False
                first = one(waiting[0])
                say(
                    f"The server at {urlsplit(server.base_url).netloc} refuses stop tokens and ids, so it is asked "
                    f"without: {refusal}"
                )
        except Refused as refusal:
            raise failed(waiting[0], refusal) from None
        finished(waiting[0], first)
    with ThreadPoolExecutor(server.concurrency, thread_name_prefix="ask") as threads:
        asking = {threads.submit(one, number): number for number in waiting[1:]}
        try:
            for done in as_completed(asking):
                finished(asking[done], done.result())
        except Refused as refusal:
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
        raise Refused("a reply without choices[0].text and finish_reason", again=True) from None
    read, echoed = used.get("prompt_tokens"), choice.get("prompt_token_ids")
    if (echoed and list(echoed) != prompt) or (isinstance(read, int) and read != len(prompt)):
        raise ModelError(
            "The server read other tokens than it was sent.",
            found=f"{read if read is not None else len(echoed or [])} tokens instead of {len(prompt)}; a second "
            "beginning-of-text token is the usual reason",
            fix="Use a server that takes a prompt of token ids as it is, or another evaluation.engine.",
        )
    if reason not in ("stop", "length"):
        raise Refused(f"an answer with the finish reason '{reason}'", again=True)
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
