"""One call to a chat model behind an endpoint, OpenAI-compatible or Anthropic's; shared by judge and judge reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from tunesmith.http import Remote

ANTHROPIC_VERSION = "2023-06-01"
Api = Literal["openai", "anthropic"]


@dataclass(frozen=True)
class Reply:
    """What a model said, and the tokens that the endpoint counted (None where it does not say)."""

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None


@dataclass
class Endpoint:
    """A model behind an address. Raises RecipeError for an address or a key that cannot be used."""

    base_url: str
    model: str
    api: Api = "openai"
    api_key_env: str | None = None
    max_tokens: int = 1024
    temperature: float | None = 0.0
    timeout: float = 30.0
    """Seconds for a whole call."""
    max_tokens_name: str = "max_tokens"
    """What an OpenAI-compatible endpoint calls the longest reply."""
    host: str = field(init=False)

    def __post_init__(self) -> None:
        self._remote = Remote(
            self.base_url,
            "the judge",
            api_key_env=self.api_key_env,
            timeout=self.timeout,
            key_header="x-api-key" if self.api == "anthropic" else "Authorization",
        )
        self.host = self._remote.host
        address = urlsplit(self.base_url)
        self.base_url = address._replace(netloc=address.netloc.lower()).geturl().rstrip("/")

    def call(self, messages: Sequence[Mapping[str, str]]) -> Reply:
        """The reply to a conversation. Raises Refused where there is none."""
        if self.api == "anthropic":
            found = self._remote.post(
                "/messages", self._anthropic(messages), {"anthropic-version": ANTHROPIC_VERSION}
            )
        else:
            found = self._remote.post("/chat/completions", self._openai(messages))
        try:
            return (_anthropic_reply if self.api == "anthropic" else _openai_reply)(found)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            where = "content" if self.api == "anthropic" else "choices[0].message.content"
            raise self._remote.refused(f"a reply without {where}") from None

    def _openai(self, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            self.max_tokens_name: self.max_tokens,
        }
        return body if self.temperature is None else {**body, "temperature": self.temperature}

    def _anthropic(self, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in messages if message["role"] != "system"],
            "max_tokens": self.max_tokens,
        }
        if system := "\n\n".join(m["content"] for m in messages if m["role"] == "system"):
            body["system"] = system
        return body if self.temperature is None else {**body, "temperature": self.temperature}


def _openai_reply(found: Any) -> Reply:
    choice, used = found["choices"][0], found.get("usage") or {}
    text = choice["message"]["content"]
    if not isinstance(text, str | None):
        raise ValueError
    return Reply(
        text or "",
        _count(used.get("prompt_tokens")),
        _count(used.get("completion_tokens")),
        choice.get("finish_reason"),
    )


def _anthropic_reply(found: Any) -> Reply:
    text = "".join(part["text"] for part in found["content"] if part.get("type") == "text")
    used = found.get("usage") or {}
    return Reply(
        text, _count(used.get("input_tokens")), _count(used.get("output_tokens")), found.get("stop_reason")
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
