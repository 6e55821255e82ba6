"""The server as its clients see it, asked with OpenAI's own client and over bare sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

from serving_of_tests import TOKEN, served  # noqa: E402

from tunesmith import api  # noqa: E402
from tunesmith.serving.limits import Limits  # noqa: E402


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def post(url: str, body: bytes, **headers: str) -> tuple[int, dict, dict]:
    given = {"Authorization": f"Bearer {TOKEN}", **headers}
    request = urllib.request.Request(url, body, {key: value for key, value in given.items() if value})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.loads(reply.read()), dict(reply.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), dict(error.headers)


@pytest.fixture(scope="module")
def talk(talking_folder):
    chat = api.Chat(talking_folder)

    def answer(text: str, tokens: int) -> str:
        return "".join(chat.answer(question(text), max_new_tokens=tokens))

    return answer


def test_an_answer_is_that_of_chat_whole_and_as_a_stream(running, talk):
    client = running.client()
    for text in ("what is the capital of france", "red ü <|im_end|> blue", "one"):
        whole = client.chat.completions.create(model="model", messages=question(text), max_tokens=25)
        assert whole.choices[0].message.content == talk(text, 25)
        pieces = list(
            client.chat.completions.create(
                model="model",
                messages=question(text),
                max_tokens=25,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert "".join(p.choices[0].delta.content or "" for p in pieces[:-1]) == talk(text, 25)
        assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert pieces[-1].usage.model_dump() == whole.usage.model_dump()
        assert whole.usage.completion_tokens <= 25


def test_a_conversation_goes_on_with_the_message_that_came_back(running):
    """As it is, `refusal: null` and all; so does a history with the nulls that other clients write."""
    client, said = running.client(), {"model": "model", "max_tokens": 8}
    reply = client.chat.completions.create(messages=question("red"), **said).choices[0].message
    nulls = dict.fromkeys(("refusal", "audio", "function_call", "tool_calls", "name"))
    plain = {"role": "assistant", "content": reply.content}
    found = [
        client.chat.completions.create(messages=[*question("red"), turn, *question("blue")], **said, **more)
        for turn, more in ((plain, {}), (reply, {}), ({**plain, **nulls}, {"extra_body": {"tools": None}}))
    ]
    assert found[0].usage.prompt_tokens == found[1].usage.prompt_tokens == found[2].usage.prompt_tokens
    assert len({one.choices[0].message.content for one in found}) == 1
    with pytest.raises(openai.BadRequestError, match="refusal"):
        client.chat.completions.create(messages=[{**plain, "refusal": "no"}], **said)


def test_logprobs_are_the_models_own(running):
    import torch

    reply = running.client().completions.create(
        model="model", prompt=[5, 6, 7], max_tokens=5, logprobs=2, extra_body={"return_token_ids": True}
    )
    choice = reply.choices[0]
    ids = choice.model_extra["token_ids"]
    with torch.inference_mode():
        logits = running.loaded.model(input_ids=torch.tensor([[5, 6, 7, *ids]])).logits[0, 2:-1]
    expected = logits.log_softmax(-1)[range(len(ids)), ids].tolist()
    assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert all(len(likeliest) <= 2 for likeliest in choice.logprobs.top_logprobs)
    chat = running.client().chat.completions.create(
        model="model", messages=question("red"), max_tokens=3, logprobs=True, top_logprobs=3
    )
    told = chat.choices[0].logprobs.content
    assert len(told) == chat.usage.completion_tokens
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in told)


def test_stop_and_seed(running, talk):
    client, text = running.client(), "what is the count of rows"
    whole = talk(text, 40)
    stop = whole[6:9]
    cut = client.chat.completions.create(
        model="model", messages=question(text), max_tokens=40, stop=[stop, "zzz"]
    )
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"

    def drawn(seed: int) -> str:
        reply = client.completions.create(
            model="model", prompt="red", temperature=1.5, seed=seed, max_tokens=12
        )
        return reply.choices[0].text

    assert drawn(1) == drawn(1) != drawn(2)


def test_64_clients_at_once_get_each_its_own_answer(running, talk):
    texts = [f"what is {'red ' * (n % 7)}{n} of {n * n}" for n in range(64)]
    client = running.client()

    def ask(n: int) -> str:
        if n % 2:
            return client.chat.completions.create(
                model="model", messages=question(texts[n]), max_tokens=10 + n % 9
            ).choices[0].message.content  # fmt: skip
        stream = client.chat.completions.create(
            model="model", messages=question(texts[n]), max_tokens=10 + n % 9, stream=True
        )
        pieces = []
        for piece in stream:
            pieces.append(piece.choices[0].delta.content or "")
            time.sleep(0.01 if n % 8 == 0 else 0)  # some take their time
        return "".join(pieces)

    with ThreadPoolExecutor(64) as threads:
        found = list(threads.map(ask, range(64)))
    expected = [talk(text, 10 + n % 9) for n, text in enumerate(texts)]
    assert len(set(expected)) > 32  # mixed answers would show
    assert found == expected


@pytest.mark.parametrize("stream", [True, False])
def test_decoding_stops_when_the_client_leaves(running, stream):
    body = json.dumps(
        {"model": "model", "prompt": [5, 6], "max_tokens": 300, "ignore_eos": True, "stream": stream}
    ).encode()
    where = running.url.removeprefix("http://").split(":")
    rows = []
    submit = running.batcher.submit
    running.batcher.submit = lambda row: (rows.append(row), submit(row))
    try:
        with socket.create_connection((where[0], int(where[1]))) as bare:
            bare.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            until = time.monotonic() + 10
            while (not rows or len(rows[0].ids) < 3) and time.monotonic() < until:
                time.sleep(0.001)
    finally:
        running.batcher.submit = submit
    left = time.monotonic()
    [row] = rows
    while not row.ended and time.monotonic() < left + 5:
        time.sleep(0.002)
    assert time.monotonic() - left < 0.5
    assert len(row.ids) < 300
    until = time.monotonic() + 5
    while running.batcher.running and time.monotonic() < until:
        time.sleep(0.01)
    assert running.batcher.running == 0


GOOD = {"model": "model", "messages": question("red"), "max_tokens": 2}
HOSTILE = [
    ({"temperature": -1}, "temperature"), ({"temperature": 1e308}, "temperature"), ({"temperature": ""}, "temperature"),
    ({"temperature": math.nan}, None), ({"temperature": math.inf}, None), ({"top_p": 0}, "top_p"),
    ({"top_p": True}, "top_p"), ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 10**12}, "max_tokens"), ({"max_tokens": 2.5}, "max_tokens"), ({"max_tokens": "9"}, "max_tokens"),
    ({"seed": 2**70}, "seed"), ({"n": 2}, "n"), ({"n": 0}, "n"), ({"stop": ["a"] * 5}, "stop"), ({"stop": ""}, "stop"),
    ({"stop": {"a": 1}}, "stop"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"presence_penalty": 0.5}, "presence_penalty"), ({"frequency_penalty": -2}, "frequency_penalty"),
    ({"logit_bias": {"5": 100}}, "logit_bias"), ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": []}, "tools"), ({"temprature": 1}, "temprature"), ({"messages": []}, "messages"),
    ({"messages": "red"}, "messages"), ({"messages": [{"role": "root", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    ({"messages": question("\ud800")}, "messages"), ({"messages": question("red " * 400)}, "messages"),
    ({"stream_options": {"include_usage": True}}, "stream_options"), ({"stop_token_ids": [-1]}, "stop_token_ids"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "param"), HOSTILE, ids=[str(change)[:40] for change, _ in HOSTILE])
def test_what_is_not_meant_or_not_supported_is_refused_by_its_name(running, change, param):
    status, body, _ = post(f"{running.url}/v1/chat/completions", json.dumps(GOOD | change).encode())
    assert status == 400
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param
    assert body["error"]["type"] == "invalid_request_error"
    assert len(body["error"]["message"]) < 400


def test_of_a_choice_between_types_the_error_is_about_the_one_that_was_meant():
    from tunesmith.serving.protocol import ChatRequest, CompletionRequest, Problem, parsed

    for kind, change, said in (
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "'messages.0.content.0.type': Input should be 'text'."),
        (ChatRequest, {"stop": ["a"] * 5}, "'stop': List should have at most 4 items"),
        (ChatRequest, {"stop": ["a", ""]}, "'stop.1': String should have at least 1 character."),
        (CompletionRequest, {"prompt": ["a", "b"]}, "'prompt.0': Input should be a valid integer."),
        (CompletionRequest, {"prompt": []}, "'prompt': List should have at least 1 item"),
    ):  # fmt: skip
        good = GOOD if kind is ChatRequest else {"model": "model", "prompt": "red"}
        with pytest.raises(Problem) as caught:
            parsed(kind, json.dumps(good | change).encode())
        assert caught.value.message.startswith(said)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"{", 400), (b"\xff\xfe", 400), (b"[]", 400), (b"null", 400), (b"[" * 9_000, 400),
        (b'{"model":"model","messages":' + b'[{"a":' * 1_500 + b"1" + b"}]" * 1_500 + b"}", 400),
        (b'{"model":"model","seed":' + b"9" * 5_000 + b"}", 400), (b"x" * 20_001, 413),
    ],
    ids=range(9),
)  # fmt: skip
def test_a_body_that_is_none_is_refused(running, body, status):
    found, reply, _ = post(f"{running.url}/v1/chat/completions", body)
    assert found == status
    assert reply["error"]["message"]
    assert post(f"{running.url}/v1/chat/completions", json.dumps(GOOD).encode())[0] == 200


@pytest.mark.parametrize(
    "change", [{"prompt": [10**6]}, {"prompt": [-1]}, {"prompt": []}, {"prompt": ""}, {"prompt": ["a", "b"]},
               {"echo": True}, {"suffix": "x"}, {"best_of": 3}, {"prompt": [5] * 201}]
)  # fmt: skip
def test_hostile_completions(running, change):
    status, body, _ = post(
        f"{running.url}/v1/completions", json.dumps({"model": "model", "prompt": "red", **change}).encode()
    )
    assert status == 400
    assert body["error"]["param"] == next(iter(change))


def test_who_has_no_token_or_comes_by_another_name_is_refused(running):
    body = json.dumps(GOOD).encode()
    for header in ("", "Bearer", "Bearer wrong", f"bearer {TOKEN}x", f"Basic {TOKEN}"):
        status, reply, headers = post(f"{running.url}/v1/chat/completions", body, Authorization=header)
        assert (status, reply["error"]["code"]) == (401, "invalid_api_key")
        assert headers["www-authenticate"] == "Bearer"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong").models.list()
    for path in ("/metrics", "/v1/models"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(running.url + path)
    for path in ("/health", "/ready"):
        assert urllib.request.urlopen(running.url + path).status == 200
    status, reply, _ = post(f"{running.url}/v1/chat/completions", body, Host="evil.example:80")
    assert (status, reply["error"]["code"]) == (403, "wrong_host")


def test_unknown_models_and_paths(running):
    with pytest.raises(openai.NotFoundError, match="Did you mean 'model'") as error:
        running.client().chat.completions.create(model="modle", messages=question("red"))
    assert error.value.code == "model_not_found"
    assert [model.id for model in running.client().models.list()] == ["model"]
    assert post(f"{running.url}/v1/nothing", b"{}")[0] == 404


def test_metrics_tell_what_was_done(running):
    def figures() -> dict[str, float]:
        request = urllib.request.Request(
            f"{running.url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        lines = urllib.request.urlopen(request).read().decode().splitlines()
        return {
            key: float(value) for key, value in (line.rsplit(" ", 1) for line in lines if line[:1] != "#")
        }

    before = figures()
    reply = running.client().chat.completions.create(model="model", messages=question("red"), max_tokens=5)
    after = figures()
    for key, more in {
        'tunesmith_requests_total{path="/v1/chat/completions",status="200"}': 1,
        'tunesmith_prompt_tokens_total{model="model"}': reply.usage.prompt_tokens,
        'tunesmith_answer_tokens_total{model="model"}': reply.usage.completion_tokens,
        "tunesmith_first_token_seconds_count": 1,
        'tunesmith_request_seconds_bucket{le="300.0"}': 1,
    }.items():
        assert after[key] - before.get(key, 0) == more
    assert after["tunesmith_steps_total"] > before["tunesmith_steps_total"]
    assert TOKEN not in str(after)


def test_a_full_queue_is_refused_with_a_time_to_wait(talking_folder):
    with served(talking_folder, limits=Limits(concurrency=1, queue=1, max_tokens=200)) as small:
        client, began = small.client(), threading.Event()

        def long(_: int) -> int:
            stream = client.completions.create(
                model="model", prompt="red", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
            )
            pieces = []
            for piece in stream:
                pieces.append(piece)
                began.set()
            return len(pieces)

        with ThreadPoolExecutor(2) as threads:
            asking = [threads.submit(long, n) for n in range(2)]
            assert began.wait(10)
            until = time.monotonic() + 5
            while small.batcher.running + small.batcher.waiting < 2 and time.monotonic() < until:
                time.sleep(0.001)
            status, body, headers = post(
                f"{small.url}/v1/completions", json.dumps({"model": "model", "prompt": "red"}).encode()
            )
            with pytest.raises(urllib.error.HTTPError, match="503"):
                urllib.request.urlopen(f"{small.url}/ready")
            assert all(one.result() for one in asking)
        assert (status, body["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        assert (
            post(f"{small.url}/v1/completions", json.dumps({"model": "model", "prompt": "red"}).encode())[0]
            == 200
        )


def test_adapters_answer_by_name_as_each_does_alone(talking_folder, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kinds = {"plain": {}, "dora": {"use_dora": True}, "stabilized": {"use_rslora": True}}
    for number, (name, options) in enumerate(kinds.items()):
        torch.manual_seed(number)
        base = AutoModelForCausalLM.from_pretrained(talking_folder)
        tuned = get_peft_model(
            base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], **options)
        )
        with torch.no_grad():
            for key, parameter in tuned.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.5)
        tuned.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(talking_folder).save_pretrained(tmp_path / name)
    texts = ("red", "what is the count of rows", "one two three")
    with served(talking_folder, {name: tmp_path / name for name in kinds}) as several:
        client = several.client()
        asked = [(name, text) for text in texts for name in ("model", *kinds)]

        def ask(one: tuple[str, str]) -> str:
            reply = client.chat.completions.create(model=one[0], messages=question(one[1]), max_tokens=15)
            assert reply.model == one[0]
            return reply.choices[0].message.content

        with ThreadPoolExecutor(12) as threads:
            found = dict(zip(asked, threads.map(ask, asked), strict=True))
    for name in ("model", *kinds):
        alone = api.Chat(talking_folder if name == "model" else tmp_path / name)
        for text in texts:
            assert found[name, text] == "".join(alone.answer(question(text), max_new_tokens=15))
    assert len({found[name, texts[0]] for name in ("model", *kinds)}) == 4


def test_an_evaluation_gets_the_same_tokens_from_the_server(running, talking_folder, monkeypatch):
    from tunesmith.data.templates import end_of_turn_ids
    from tunesmith.engines import Asked, Source, answers
    from tunesmith.generation import generate
    from tunesmith.models import load_model, load_tokenizer
    from tunesmith.recipe import Server

    monkeypatch.setenv("SERVE_KEY", TOKEN)
    tokenizer, model = load_tokenizer(str(talking_folder)), load_model(str(talking_folder))
    source = Source(
        "model",
        tokenizer,
        lambda: model,
        server=Server(base_url=f"{running.url}/v1", api_key_env="SERVE_KEY"),
    )
    prompts = [[5 + (7 * n + i) % 300 for i in range(3 + n)] for n in range(10)]
    ends = end_of_turn_ids(tokenizer)
    found, settings = answers(source, Asked(prompts, 20, ends), engine="openai")
    assert "ids" not in settings  # the server tells its tokens
    assert found == generate(model, tokenizer, prompts, max_new_tokens=20, stop_ids=ends)


def test_the_verdict_on_a_server_compares_the_log_probabilities_that_it_tells(
    running, talking_folder, monkeypatch
):
    """They are those of the model in this process; of another model they are not, whatever it answers."""
    import torch

    from tunesmith.export import merge, parity
    from tunesmith.models import load_model, load_tokenizer

    monkeypatch.setenv("SERVE_KEY", TOKEN)
    tokenizer, model = load_tokenizer(str(talking_folder)), load_model(str(talking_folder)).eval()
    asked = merge.shipped_questions(tokenizer, model, is_pair=False)
    held = parity.Held(asked, 12, lambda numbers, own, others: (None, "not scored"))

    def verdict() -> parity.Parity:
        reader = parity.server_reader(f"{running.url}/v1", "model", tokenizer, api_key_env="SERVE_KEY")
        return parity.verdict(model, tokenizer, reader, held, artefact="served", quant="float32")

    found = verdict()
    assert found.passed, found.problems()
    assert found.check.of_logprobs
    assert found.check.positions == found.check.new_tokens > 4
    assert 0 < found.check.largest_difference < 1e-3
    assert {(one.place, one.same) for one in found.readings} == {
        ("training", 4), ("transformers", 4), ("server", 4), ("gguf", 0),
    }  # fmt: skip
    with torch.no_grad():  # the same order of tokens, so the same answers, but other probabilities
        model.model.norm.weight.mul_(1.05)
    found = verdict()
    assert found.check.same_answers == 4
    assert not found.passed
    assert "log-probability of a token that it wrote" in found.problems()[0]


def test_a_client_that_takes_nothing_is_cut_off():
    from tunesmith.serving.app import Access, Guard

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise AssertionError("nothing was taken")

    async def never(message):
        await asyncio.sleep(60)

    async def receive():
        return {"type": "http.request", "body": b""}

    guard = Guard(app, access=Access(), limits=Limits(stalled_seconds=0.05), counted=lambda status: None)
    scope = {"type": "http", "path": "/v1/models", "headers": [(b"host", b"localhost")]}
    asyncio.run(asyncio.wait_for(guard(scope, receive, never), 5))


def test_a_client_that_reads_a_byte_a_second_holds_up_nobody_and_is_cut_off(talking_folder):
    """Over bare sockets, as many as there are places: others get theirs, and what is kept for them is bounded."""
    import gc

    tokens, body = (
        300,
        {"model": "model", "prompt": "red", "stream": True, "logprobs": 20, "ignore_eos": True},
    )
    limits = Limits(concurrency=2, max_tokens=tokens, stalled_seconds=2)
    asked = json.dumps({**body, "max_tokens": tokens}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
    with served(talking_folder, limits=limits, buffer=4096) as small, contextlib.ExitStack() as stack:
        port, slow = int(small.url.rpartition(":")[2]), []
        for _ in range(limits.concurrency):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(f"{head}Content-Length: {len(asked)}\r\n\r\n".encode() + asked)
            assert client.recv(1)
            slow.append(client)
        until = time.monotonic() + 20
        while small.batcher.running and time.monotonic() < until:
            time.sleep(0.01)
        assert not small.batcher.running, "an answer that nobody takes is written on, and leaves its place"
        kept = [found for found in gc.get_objects() if isinstance(found, asyncio.Queue | asyncio.Transport)]
        waiting = [queue.qsize() for queue in kept if isinstance(queue, asyncio.Queue)]
        unsent = [one.get_write_buffer_size() for one in kept if isinstance(one, asyncio.Transport)]
        assert 0 < max(waiting) <= tokens
        assert max(unsent) < 100_000 < tokens * 1000, "an answer is larger than what is kept for the socket"
        began = time.monotonic()
        assert (
            post(f"{small.url}/v1/completions", json.dumps({"model": "model", "prompt": "red"}).encode())[0]
            == 200
        )
        assert time.monotonic() - began < 5
        told, until = "", time.monotonic() + 10
        while 'status="499"} 2.0' not in told and time.monotonic() < until:
            assert all(client.recv(1) for client in slow)
            time.sleep(1)
            request = urllib.request.Request(
                f"{small.url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}
            )
            told = urllib.request.urlopen(request).read().decode()
        assert 'status="499"} 2.0' in told


def test_a_body_that_does_not_arrive_is_refused():
    from tunesmith.serving.app import Access, Guard

    told = []

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        told.append(message)

    guard = Guard(None, access=Access(), limits=Limits(body_seconds=0.05), counted=told.append)
    scope = {"type": "http", "path": "/v1/models", "headers": [(b"host", b"[::1]:8000")]}
    asyncio.run(guard(scope, receive, send))
    assert told[0] == 408
    assert told[1]["status"] == 408


def test_tokens_and_addresses_that_protect_nothing_are_refused(monkeypatch):
    from tunesmith.errors import RecipeError
    from tunesmith.serving.server import token_from

    first, second = (token_from(None, without=False, host="127.0.0.1") for _ in range(2))
    assert first[1] is True
    assert first != second
    assert len(first[0]) >= 32
    monkeypatch.setenv("WEAK", "short")
    for given in ({"env": "WEAK"}, {"env": "ABSENT_VARIABLE"}):
        with pytest.raises(RecipeError, match="holds no token"):
            token_from(given["env"], without=False, host="127.0.0.1")
    with pytest.raises(RecipeError, match="everybody"):
        token_from(None, without=True, host="0.0.0.0")
    assert token_from(None, without=True, host="::1") == (None, False)


def test_further_names_come_from_options_and_the_environment(monkeypatch):
    from tunesmith.errors import RecipeError
    from tunesmith.serving.server import hosts_from

    monkeypatch.setenv("TUNESMITH_ALLOWED_HOSTS", "models.Example.org, chat")
    assert hosts_from("127.0.0.1", ["server"]) == {"127.0.0.1", "server", "models.example.org", "chat"}
    for bad in ("*", "https://models.example.org", "a:443", "a/b"):
        monkeypatch.setenv("TUNESMITH_ALLOWED_HOSTS", bad)
        with pytest.raises(RecipeError, match="is no name under which"):
            hosts_from("127.0.0.1", [])
    monkeypatch.delenv("TUNESMITH_ALLOWED_HOSTS")
    assert hosts_from("0.0.0.0", []) == {"0.0.0.0"}


def test_vllm_gets_what_maps_and_refuses_the_rest(talking_folder, tmp_path):
    from tunesmith.serving.server import Where, vllm_command, vllm_refuses

    folders = {"model": talking_folder}
    assert vllm_refuses(str(talking_folder), folders, Where()) is None
    other = shutil.copytree(talking_folder, tmp_path / "other")
    for settings, said in (
        ({"eos_token_id": 0}, "does not end"),
        ({"eos_token_id": 1, "top_k": 50}, "top_k"),
    ):
        (other / "generation_config.json").write_text(json.dumps(settings))
        assert said in vllm_refuses(str(other), {"model": other}, Where())
    where = Where(token="secret-of-the-server", port=9001)
    command = vllm_command(str(talking_folder), folders, where, Limits(concurrency=7), tmp_path / "t.jinja")
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--max-num-seqs") + 1] == "7"
    assert command[command.index("--served-model-name") + 1] == "model"
    assert where.token not in " ".join(command)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for settings, said in (
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "part of its base"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, "r": 8}))
        assert said in vllm_refuses(str(talking_folder), {**folders, "a": adapter}, Where())


def test_sigterm_leaves_no_server_of_vllm_behind(talking_folder, tmp_path, monkeypatch):
    """Not even one that does not heed it."""
    from tunesmith.errors import Terminated
    from tunesmith.serving import server

    stubborn = (
        "import os, pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"pathlib.Path({str(tmp_path / 'new')!r}).write_text(str(os.getpid()));"
        f"os.rename({str(tmp_path / 'new')!r}, {str(tmp_path / 'pid')!r}); time.sleep(60)"
    )
    monkeypatch.setattr(server, "vllm_command", lambda *given: [sys.executable, "-S", "-c", stubborn])
    monkeypatch.setattr(server, "ENDING", 0.2)

    def terminate() -> None:
        until = time.monotonic() + 20
        while not (tmp_path / "pid").exists() and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(Terminated):
        server._vllm(
            str(talking_folder),
            {"model": talking_folder},
            server.Where(),
            Limits(),
            say=lambda sentence: None,
        )
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_base_packed_in_training_is_told_whichever_engine_answers(talking_folder, tmp_path, monkeypatch):
    from tunesmith.serving import server

    (tmp_path / "adapter_config.json").write_text("{}")
    packing = {"bits": 4, "type": "nf4", "double_quantization": True, "dtype": "float32"}
    (tmp_path / "packing.json").write_text(json.dumps(packing))
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(server, "vllm_refuses", lambda *given: None)
    monkeypatch.setattr(server, "_vllm", lambda *given, say: say("vLLM answers"))
    said: list[str] = []
    folders = {"model": talking_folder, "mine": tmp_path}
    server.serve(str(talking_folder), folders, server.Where(engine="vllm"), Limits(), say=said.append)
    assert said[0].startswith("mine: It was trained on a base packed into 4 bits")
    assert said[1:] == ["vLLM answers"]


@pytest.mark.parametrize("start", ["pissa_niter_4", "OLoRA"])
def test_an_adapter_that_changes_the_base_of_the_others_is_refused(talking_folder, start, tmp_path):
    """As a checkpoint of such a run is, and what others publish: PEFT takes its start out of the base it is put on."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tunesmith.errors import ModelError
    from tunesmith.serving.models import load, sources

    base = AutoModelForCausalLM.from_pretrained(talking_folder)
    whole = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start))
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    assert not torch.equal(layer.base_layer.weight, whole), "this is what the base would answer with"
    tuned.save_pretrained(tmp_path / "a")
    with pytest.raises(ModelError, match="takes a part of its base") as caught:
        load(*sources(str(talking_folder), None, {"a": str(tmp_path / "a")}), dtype="float32", device="cpu")
    assert start in caught.value.found
    assert "merge" in caught.value.fix


def test_a_model_is_served_under_its_folder_s_name_without_what_no_name_may_hold(
    talking_folder, tmp_path, monkeypatch
):
    from tunesmith.serving.models import checked_name, sources

    folder = shutil.copytree(talking_folder, tmp_path / "my model, 2")
    monkeypatch.chdir(folder)
    for model in (".", str(folder), f"{folder}/"):
        [name] = sources(model, None, {})[1]
        assert checked_name(name) == "my-model-2"


def test_adapters_of_another_base_are_refused(talking_folder, tiny_model_folder, tmp_path):
    import torch
    from safetensors.torch import save_file

    from tunesmith.errors import ModelError
    from tunesmith.serving.models import sources

    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tiny_model_folder)})
    )
    save_file({"weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="another base"):
        sources(str(talking_folder), None, {"a": str(tmp_path)})
    with pytest.raises(ModelError, match="one base is served"):
        sources(str(talking_folder), None, {"a": str(tiny_model_folder)})


def test_a_server_whose_model_answers_no_more_ends_and_says_why(talking_folder, monkeypatch):
    """Its client is told, `serve` raises what becomes exit code 3, and a supervisor can start it again."""
    from tunesmith.errors import OutOfResources
    from tunesmith.serving import server
    from tunesmith.serving.batching import Batcher

    def broken(self) -> None:
        raise KeyError("a mistake of ours")

    ends, at, is_ready = [], [], threading.Event()

    def run() -> None:
        where = server.Where(port=0, token=TOKEN)
        with pytest.raises(OutOfResources, match=r"(?s)ended by itself.*a mistake of ours") as caught:
            server.serve(
                str(talking_folder), {"model": talking_folder}, where, Limits(), say=lambda said: None,
                ready=lambda url: (at.append(url), is_ready.set()),
            )  # fmt: skip
        ends.append(caught.value.exit_code)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert is_ready.wait(30)
    monkeypatch.setattr(Batcher, "_drop_left", broken)
    status, body, _ = post(f"{at[0]}/completions", json.dumps({"model": "model", "prompt": "red"}).encode())
    assert (status, body["error"]["message"]) == (503, "The server is stopping.")
    thread.join(10)
    assert ends == [3]


@pytest.mark.thorough
def test_the_command_serves_until_it_is_told_to_end(talking_folder, tmp_path):
    import subprocess

    errors = (tmp_path / "said").open("w")
    started = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", "serve", str(talking_folder), "--port", "0", "--name", "shop"],
        stderr=errors,
        env={**os.environ, "COLUMNS": "200"},
    )
    try:
        said, until = "", time.monotonic() + 90
        while "token: " not in said and time.monotonic() < until and started.poll() is None:
            time.sleep(0.1)
            said = (tmp_path / "said").read_text()
        lines = SimpleNamespace(
            url=said.split("Serving at ")[1].split()[0], token=said.split("token: ")[1].split()[0]
        )
        assert lines.url.startswith("http://127.0.0.1:")
        client = openai.OpenAI(base_url=lines.url, api_key=lines.token)
        assert (
            client.completions.create(model="shop", prompt="red", max_tokens=3).usage.completion_tokens <= 3
        )
        started.send_signal(signal.SIGTERM)
        started.wait(30)
        assert (tmp_path / "said").read_text().count(lines.token) == 1
    finally:
        if started.poll() is None:
            started.kill()
        errors.close()
