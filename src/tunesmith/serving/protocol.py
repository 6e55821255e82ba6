"""What OpenAI's clients send and get: requests checked field by field, answers and errors in their form.

A field that would change the answer and is not honoured is refused by its name; one that says what happens anyway
(`n: 1`, a penalty of 0) is accepted. A null is a field that was not given, as it is for OpenAI: clients send the
assistant's turns back as they came, with `refusal: null` and the like.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from tunesmith.errors import nearest
from tunesmith.serving.batching import Piece, Token

MOST_STOPS = 4
"""Stop texts of a request; OpenAI's own limit."""


class Problem(Exception):
    """A request that is refused, as OpenAI's clients read it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        wait: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.wait = wait
        """Seconds after which another try may help."""

    def body(self) -> dict[str, Any]:
        """The reply's JSON."""
        kinds = {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            429: "rate_limit_error",
        }
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        given = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return given | ({"Retry-After": str(self.wait)} if self.wait is not None else {})


_Text = Annotated[str, StringConstraints(min_length=1, max_length=500)]
_Id = Annotated[int, Field(ge=0)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, found: Any) -> Any:
        if not isinstance(found, dict):
            return found
        return {name: value for name, value in found.items() if value is not None}


class StreamOptions(_Body):
    """What a stream says beside its pieces."""

    include_usage: bool = False


class _Common(_Body):
    """What both ways of asking have in common."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _Text | Annotated[list[_Text], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Accepted and not used: it names the client's own user."""
    # What OpenAI has and this server does not: only the value that changes nothing.
    n: Literal[1] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # vLLM's extensions, by which answers can be compared token by token.
    return_token_ids: bool = False
    stop_token_ids: Annotated[list[_Id], Field(max_length=64)] = []
    ignore_eos: bool = False
    top_k: Literal[-1, 0] = -1
    repetition_penalty: Annotated[float, Field(ge=1, le=1)] = 1.0
    skip_special_tokens: Literal[True] = True

    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def limit(self) -> int | None:
        """Most tokens of the answer, where the request says."""
        return self.max_tokens

    def alternatives(self) -> int | None:
        """Likeliest tokens that are told beside each; None for no probabilities."""
        return None


Asked = TypeVar("Asked", bound=_Common)


class TextPart(_Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(_Body):
    """The only form of answers there is."""

    type: Literal["text"]


class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None

    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Common):
    """POST /v1/completions: a text, or token ids as they are."""

    prompt: str | Annotated[list[_Id], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None

    def alternatives(self) -> int | None:
        return self.logprobs


def parsed(kind: type[Asked], body: bytes) -> Asked:
    """The request in a body. Raises Problem, which names the field."""

    def no_constant(word: str) -> Any:
        raise ValueError(f"{word} is no JSON")

    try:
        found = json.loads(body, parse_constant=no_constant)
    except RecursionError:
        raise Problem(400, "The body is nested too deeply.", code="invalid_json") from None
    except ValueError as error:
        raise Problem(400, f"The body is not JSON: {str(error)[:120]}.", code="invalid_json") from None
    if not isinstance(found, dict):
        raise Problem(400, "The body is no JSON object.", code="invalid_json")
    try:
        asked = kind.model_validate(found)
    except (ValidationError, RecursionError) as error:
        raise _refused(kind, error) from None
    if asked.stream_options is not None and not asked.stream:
        raise Problem(400, "stream_options needs stream: true.", param="stream_options")
    return asked


def _refused(kind: type[_Common], error: ValidationError | RecursionError) -> Problem:
    if isinstance(error, RecursionError):
        return Problem(400, "The body is nested too deeply.", code="invalid_json")
    first = max(error.errors(include_url=False, include_input=False)[:50], key=_nearness)
    begin, *rest = map(str, first["loc"])
    path = [begin[:40], *(part[:40] for part in rest if not _BRANCH.fullmatch(part))]
    name = path[0]
    if first["type"] == "extra_forbidden":
        known = kind.model_fields if len(path) == 1 else ()
        hint = " " + nearest(name, known) if known else ""
        return Problem(
            400,
            f"'{'.'.join(path)}' is not supported by this server.{hint}",
            code="unsupported_parameter",
            param=name,
        )
    if name in {"n", "best_of", "echo", "presence_penalty", "frequency_penalty", "logit_bias", "top_k",
                "repetition_penalty", "response_format", "skip_special_tokens"}:  # fmt: skip
        return Problem(
            400,
            f"This value of '{name}' is not supported by this server: {first['msg']}.",
            code="unsupported_value",
            param=name,
        )
    return Problem(400, f"'{'.'.join(path)}': {first['msg']}.", code="invalid_value", param=name)


_BRANCH = re.compile(r"str|constrained-str|list\[.+\]")
"""How pydantic names the types of a choice, in the place of an error."""


def _nearness(error: Mapping[str, Any]) -> tuple[bool, bool, int]:
    """Of a choice between types each one has its own errors: what is not of a wrong type, and lies deepest, is about
    what was meant."""
    return error["type"] != "extra_forbidden", not error["type"].endswith("_type"), len(error["loc"])


# Answers.


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Tokens that were read and written."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def chat_whole(text: str, reason: str, tokens: Sequence[Token] | None) -> dict[str, Any]:
    """The only choice of a chat answer."""
    return {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None
        if tokens is None
        else {"content": [_chat_token(t) for t in tokens], "refusal": None},
        "finish_reason": reason,
    }


def chat_piece(piece: Piece, reason: str | None, *, first: bool, with_tokens: bool) -> dict[str, Any]:
    """The only choice of a piece of a chat answer."""
    delta: dict[str, Any] = {"role": "assistant"} if first else {}
    if piece.text or first:
        delta["content"] = piece.text
    told = {"content": [_chat_token(t) for t in piece.tokens], "refusal": None} if with_tokens else None
    return {"index": 0, "delta": delta, "logprobs": told, "finish_reason": reason}


def text_choice(
    text: str, reason: str | None, tokens: Sequence[Token] | None, *, offset: int = 0
) -> dict[str, Any]:
    """The only choice of a text completion, whole or a piece; `offset` is where the piece's tokens begin."""
    return {"index": 0, "text": text, "logprobs": _text_tokens(tokens, offset), "finish_reason": reason}


def _chat_token(token: Token) -> dict[str, Any]:
    def one(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}

    return {**one(token.text, token.logprob), "top_logprobs": [one(*other) for other in token.likeliest]}


def _text_tokens(tokens: Sequence[Token] | None, offset: int) -> dict[str, Any] | None:
    if tokens is None:
        return None
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [t.text for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [dict(t.likeliest) for t in tokens],
        "text_offset": offsets,
    }
