"""The HTTP side: who may ask, how much, and answers in OpenAI's form, whole or as a stream.

    guard (host, token, size) -> checked request -> token ids -> batching -> pieces -> client

A client that leaves is noticed by a task that waits for just that, whole answer or stream; its row gets no further
step.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.exceptions import HTTPException

from tunesmith.data.examples import Unusable
from tunesmith.errors import nearest
from tunesmith.http import is_own_name
from tunesmith.serving import bodies
from tunesmith.serving.batching import Ask, Batcher, Piece, Row
from tunesmith.serving.limits import Limits
from tunesmith.serving.models import Loaded, Served
from tunesmith.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    Problem,
    chat_piece,
    chat_whole,
    parsed,
    text_choice,
    usage,
)

log = logging.getLogger(__name__)

INERT = (
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"), (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
)  # fmt: skip
"""Headers of every answer: a browser that is brought here by a page shows and runs nothing of it."""

OPEN = ("/health", "/ready")
"""Paths that are answered without a token: they tell nothing but whether the server works."""


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    token: str | None = None
    hosts: frozenset[str] = frozenset()
    """Names in the Host header beside `localhost` and addresses: a page of another name cannot be made to point
    here (DNS rebinding)."""

    def refused(self, headers: Mapping[bytes, bytes], path: str) -> Problem | None:
        """Why a request is not answered, if so."""
        host = headers.get(b"host", b"").decode("latin-1")
        if not is_own_name(host, self.hosts):
            return Problem(
                403,
                "This Host is not served here; start the server with --allowed-host for it.",
                code="wrong_host",
            )
        if self.token is None or path in OPEN:
            return None
        given = headers.get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self.token.encode()):
            return Problem(
                401, "A token is missing or wrong: Authorization: Bearer TOKEN.", code="invalid_api_key"
            )
        return None


class Guard:
    """Before everything else: host, token, size and pace of the body, and clients that do not take their answer."""

    def __init__(self, app: Any, *, access: Access, limits: Limits, counted: Callable[[int], None]) -> None:
        self._app, self._access, self._limits, self._counted = app, access, limits, counted

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])

        async def inert(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *INERT]}
            await send(message)

        try:
            if problem := self._access.refused(headers, scope["path"]):
                raise problem
            body = await self._body(headers, receive)
        except Problem as problem:
            self._counted(problem.status)
            await _refusal(problem)(scope, receive, inert)
            return
        except bodies.Gone:
            return

        async def in_time(message: Any) -> None:
            try:
                await asyncio.wait_for(inert(message), self._limits.stalled_seconds)
            except TimeoutError:
                raise OSError("the client takes nothing any more") from None

        with contextlib.suppress(OSError):
            await self._app(scope, bodies.again(body, receive), in_time)

    async def _body(self, headers: Mapping[bytes, bytes], receive: Any) -> bytes:
        limits = self._limits
        try:
            return await bodies.whole(headers, receive, most=limits.body_bytes, seconds=limits.body_seconds)
        except bodies.TooLarge:
            raise Problem(
                413, f"The body is larger than {limits.body_bytes} bytes.", code="body_too_large"
            ) from None
        except bodies.TooSlow:
            raise Problem(408, "The body did not arrive in time.", code="body_too_slow") from None


SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Bounds by which durations are counted: from a GPU's first token to a CPU's long answer."""


class Metrics:
    """What /metrics tells, for Prometheus."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self.registry = CollectorRegistry()
        self.registry.register(self)
        given: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("tunesmith_requests", "Requests by their end.", ["path", "status"], **given)
        self.left = Counter(
            "tunesmith_clients_left", "Clients that left before their answer was whole.", **given
        )
        self.read = Counter("tunesmith_prompt_tokens", "Tokens of prompts.", ["model"], **given)
        self.written = Counter("tunesmith_answer_tokens", "Tokens of answers.", ["model"], **given)
        self.first = Histogram(
            "tunesmith_first_token_seconds", "From the request to its first token.", buckets=SECONDS, **given
        )
        self.whole = Histogram(
            "tunesmith_request_seconds", "From the request to its last token.", buckets=SECONDS, **given
        )

    def collect(self) -> Iterator[Metric]:
        """What the batching thread counts itself."""
        yield GaugeMetricFamily("tunesmith_running", "Requests being answered.", self._batcher.running)
        yield GaugeMetricFamily("tunesmith_waiting", "Requests that wait for a place.", self._batcher.waiting)
        yield CounterMetricFamily("tunesmith_steps", "Forward passes so far.", self._batcher.steps)


def create(
    loaded: Loaded, batcher: Batcher, *, access: Access, limits: Limits, temperature: float = 0.0
) -> Any:
    """The application for an ASGI server. `temperature` is used where a request names none."""
    started = int(time.time())
    metrics = Metrics(batcher)
    tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
    service = _Service(loaded, batcher, limits, temperature, metrics, tokenizing)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        batcher.stop()
        tokenizing.shutdown(wait=False, cancel_futures=True)

    # The generated pages would load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Problem)
    async def refused(request: Request, problem: Problem) -> Response:
        metrics.requests.labels(_known(request), str(problem.status)).inc()
        return _refusal(problem)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        said = "There is no such path." if error.status_code == 404 else str(error.detail)
        return await refused(request, Problem(error.status_code, said))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return await refused(request, Problem(500, "The server failed; its log says why."))

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"} if batcher.is_alive else {"status": "failed"},
                            200 if batcher.is_alive else 503)  # fmt: skip

    @app.get("/ready")
    async def ready() -> Response:
        takes = batcher.is_alive and service.open < limits.concurrency + limits.queue
        return JSONResponse({"status": "ready" if takes else "busy"}, 200 if takes else 503)

    @app.get("/metrics")
    async def told() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def listed() -> Any:
        return {"object": "list", "data": [_model(name, started) for name in loaded.by_name]}

    @app.get("/v1/models/{name:path}")
    async def one(name: str) -> Any:
        return _model(service.served(name).name, started)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = parsed(ChatRequest, await request.body())
        served = service.served(asked.model)
        turns = [(message.role, message.text()) for message in asked.messages]
        return await service.answered(request, asked, served, lambda: served.prompt(turns), "messages")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = parsed(CompletionRequest, await request.body())
        served = service.served(asked.model)
        prompt = asked.prompt
        ids: Callable[[], list[int]] = (
            (lambda: served.text(prompt)) if isinstance(prompt, str) else (lambda: list(prompt))
        )
        return await service.answered(request, asked, served, ids, "prompt")

    return Guard(
        app,
        access=access,
        limits=limits,
        counted=lambda status: metrics.requests.labels("refused", str(status)).inc(),
    )


@dataclass
class _Service:
    loaded: Loaded
    batcher: Batcher
    limits: Limits
    temperature: float
    metrics: Metrics
    tokenizing: ThreadPoolExecutor
    open: int = 0
    """Requests that were let in and are not at their end."""

    def served(self, name: str) -> Served:
        """Who is asked. Raises Problem for an unknown name."""
        if found := self.loaded.by_name.get(name):
            return found
        hint = nearest(name[:96], self.loaded.by_name)
        raise Problem(
            404, f"There is no model '{name[:96]}' here. {hint}", code="model_not_found", param="model"
        )

    async def answered(
        self,
        request: Request,
        asked: ChatRequest | CompletionRequest,
        served: Served,
        tokenized: Callable[[], list[int]],
        field: str,
    ) -> Response:
        """The answer to a request that is well formed."""
        began = time.perf_counter()
        if not self.batcher.is_alive:
            raise Problem(503, "The server is stopping.", wait=10)
        if self.open >= self.limits.concurrency + self.limits.queue:
            raise Problem(429, "The queue is full; try again later.", code="queue_full", wait=1)
        self.open += 1
        ended = _once(self._ended)
        try:
            ask = await self._ask(asked, served, tokenized, field)
            pieces: asyncio.Queue[Piece] = asyncio.Queue()
            loop = asyncio.get_running_loop()
            row = Row(ask, lambda piece: _deliver(loop, pieces, piece), served.tokenizer)
            try:
                self.batcher.submit(row)
            except RuntimeError:  # it ended while the prompt was put into tokens
                raise Problem(503, "The server is stopping.", wait=10) from None
        except BaseException:
            ended()
            raise
        self.metrics.read.labels(served.name).inc(len(ask.prompt))
        answer = _Answer(self, request, asked, served, row, pieces, began, ended)
        if asked.stream:
            return await answer.streamed()
        return await answer.whole()

    def _ended(self) -> None:
        self.open -= 1

    async def _ask(
        self,
        asked: ChatRequest | CompletionRequest,
        served: Served,
        tokenized: Callable[[], list[int]],
        field: str,
    ) -> Ask:
        try:
            prompt = await asyncio.get_running_loop().run_in_executor(self.tokenizing, tokenized)
        except Unusable as reason:
            raise Problem(400, f"The model cannot be asked this: {reason}.", param=field) from None
        except UnicodeEncodeError:
            raise Problem(400, "The text holds half a character (a lone surrogate).", param=field) from None
        if not prompt:
            raise Problem(400, "The prompt has no tokens.", param=field)
        if max(prompt) >= self.loaded.vocabulary:
            raise Problem(400, f"The model has no token {max(prompt)}.", param=field)
        if len(prompt) > self.limits.prompt_tokens:
            raise Problem(
                400,
                f"The prompt has {len(prompt)} tokens; this server takes {self.limits.prompt_tokens}.",
                code="context_length_exceeded",
                param=field,
            )
        wanted = asked.limit()
        if wanted is not None and wanted > self.limits.max_tokens:
            raise Problem(
                400,
                f"{wanted} tokens are asked for; this server gives {self.limits.max_tokens} at most.",
                param="max_tokens",
            )
        room, context = self.limits.max_tokens, self.loaded.context
        if context is not None:
            room = min(room, context - 1 if served.is_seq2seq else context - len(prompt))
            if room < 1 or len(prompt) > context or (wanted or 0) > room:
                raise Problem(
                    400,
                    f"The model's context is {context} tokens; the prompt has {len(prompt)}"
                    + (
                        f", and {wanted} more are asked for."
                        if wanted
                        else " and leaves no room for an answer."
                    ),
                    code="context_length_exceeded",
                    param=field,
                )
        ends = () if asked.ignore_eos else served.stop_ids
        drawn = asked.seed if asked.seed is not None else secrets.randbits(63)
        return Ask(
            prompt=tuple(prompt),
            max_new_tokens=wanted or room,
            stop_ids=tuple(dict.fromkeys([*ends, *asked.stop_token_ids])),
            stop=asked.stops(),
            temperature=self.temperature if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=drawn,
            logprobs=asked.alternatives(),
            adapter=served.adapter,
        )


@dataclass
class _Answer:
    """One request on its way back."""

    service: _Service
    request: Request
    asked: ChatRequest | CompletionRequest
    served: Served
    row: Row
    pieces: asyncio.Queue[Piece]
    began: float
    ended: Callable[[], None]

    async def whole(self) -> Response:
        """All of it in one reply."""
        watch = asyncio.create_task(self._until_left())
        pieces = []
        try:
            async for piece in self._told():
                pieces.append(piece)
        finally:
            watch.cancel()
            self._over()
        last = pieces[-1]
        if last.ending == "left":
            self._counted(499)
            return Response(status_code=499)
        if last.ending == "failed":
            raise Problem(503, last.problem or "", wait=1)
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens] if self._tells_tokens else None
        reason = str(last.ending)
        choice = chat_whole(text, reason, tokens) if self._is_chat else text_choice(text, reason, tokens)
        body = self._frame(whole=True) | {
            "choices": [choice | self._extended(pieces, last)],
            "usage": self._usage(),
        }
        self._counted(200)
        return _json(body)

    async def streamed(self) -> Response:
        """Piece by piece, as server-sent events."""
        return _Stream(self._events(), self._over)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        watch = asyncio.create_task(self._until_left())
        status, first, offset = 499, True, 0
        with_usage = self.asked.stream_options is not None and self.asked.stream_options.include_usage
        beside = {"usage": None} if with_usage else {}
        try:
            async for piece in self._told():
                if piece.ending == "left":
                    return
                if piece.ending == "failed":
                    status = 503
                    yield _event(Problem(503, piece.problem or "").body())
                    return
                if not (piece.text or piece.ending or piece.tokens or first or self.asked.return_token_ids):
                    continue
                if self._is_chat:
                    choice = chat_piece(piece, piece.ending, first=first, with_tokens=self._tells_tokens)
                else:
                    tokens = piece.tokens if self._tells_tokens else None
                    choice = text_choice(piece.text, piece.ending, tokens, offset=offset)
                    offset += sum(len(token.text) for token in piece.tokens)
                first = False
                yield _event(
                    self._frame(whole=False)
                    | {"choices": [choice | self._extended([piece], piece)], **beside}
                )
            if with_usage:
                yield _event(self._frame(whole=False) | {"choices": [], "usage": self._usage()})
            status = 200
            yield b"data: [DONE]\n\n"
        finally:
            watch.cancel()
            self._over()
            self._counted(status)

    async def _told(self) -> AsyncIterator[Piece]:
        is_first = True
        while True:
            piece = await self.pieces.get()
            if is_first and piece.ids:
                is_first = False
                self.service.metrics.first.observe(time.perf_counter() - self.began)
            yield piece
            if piece.ending:
                return

    async def _until_left(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.service.batcher.leave(self.row)

    def _over(self) -> None:
        """Whatever happened: no step is made for it any more, and its place is free."""
        self.service.batcher.leave(self.row)
        self.ended()

    def _counted(self, status: int) -> None:
        metrics = self.service.metrics
        metrics.written.labels(self.served.name).inc(len(self.row.ids))
        metrics.requests.labels(_known(self.request), str(status)).inc()
        if status == 499:
            metrics.left.inc()
        elif status == 200:
            metrics.whole.observe(time.perf_counter() - self.began)

    def _frame(self, *, whole: bool) -> dict[str, Any]:
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {
            "id": self._id,
            "object": kind if whole or not self._is_chat else "chat.completion.chunk",
            "created": self._created,
            "model": self.served.name,
        }

    def _extended(self, pieces: list[Piece], last: Piece) -> dict[str, Any]:
        if not self.asked.return_token_ids:
            return {}
        return {
            "token_ids": [token for piece in pieces for token in piece.ids],
            "prompt_token_ids": list(self.row.ask.prompt),
            "stop_reason": last.stopped_by,
        }

    def _usage(self) -> dict[str, int]:
        return usage(len(self.row.ask.prompt), len(self.row.ids))

    def __post_init__(self) -> None:
        self._is_chat = isinstance(self.asked, ChatRequest)
        self._tells_tokens = self.asked.alternatives() is not None
        self._id = f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())


class _Stream(Response):
    """Server-sent events; whatever breaks off, even before the first of them, `over` is called."""

    def __init__(self, events: AsyncGenerator[bytes, None], over: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._events, self._over = events, over

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._over()
            await self._events.aclose()


def _deliver(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[Piece], piece: Piece) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there any more
        loop.call_soon_threadsafe(pieces.put_nowait, piece)


def _once(work: Callable[[], None]) -> Callable[[], None]:
    left = [work]
    return lambda: left.pop()() if left else None


def _event(body: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode("ascii") + b"\n\n"


def _json(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # In ASCII, as generated text may hold half a character.
    return Response(
        json.dumps(body).encode("ascii"), status, dict(headers or {}), media_type="application/json"
    )


def _refusal(problem: Problem) -> Response:
    return _json(problem.body(), problem.status, problem.headers())


def _known(request: Request) -> str:
    """The path as the metrics tell it: few and ours, whatever clients ask for."""
    route = request.scope.get("route")
    return str(getattr(route, "path", "other"))


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "tunesmith"}
