"""A page to talk to a served model: a chat, or for text-to-SQL a schema and a question.

This file is also copied into deployment folders, where it runs without tunesmith: it needs gradio, and beside it the
folder's manifest.json. The page asks a server and holds no model.

    TUNESMITH_URL=http://127.0.0.1:8000/v1 TUNESMITH_TOKEN=... python demo.py
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

SCHEMA = "CREATE TABLE school (name TEXT, city TEXT, last_championship INTEGER);"
QUESTION = "How many schools won their last championship in 2006?"
"""What stands in the fields as an example."""


@dataclass(frozen=True)
class Server:
    """Who answers, by OpenAI's HTTP interface."""

    url: str
    """Up to and with `/v1`."""
    model: str
    token: str | None = None
    seconds: float = 120.0
    """For each piece of an answer."""

    def answer(self, messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
        """The answer so far, each time a little longer. Raises RuntimeError with the server's own words."""
        body = json.dumps({"model": self.model, "messages": list(messages), "stream": True}).encode()
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        said = ""
        try:
            # No proxy: the server is this machine or a neighbour, and the token is for nobody else.
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                request, timeout=self.seconds
            ) as reply:
                for line in reply:
                    if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RuntimeError(event["error"]["message"])
                    for choice in event["choices"]:
                        said += choice["delta"].get("content") or ""
                    yield said
        except urllib.error.HTTPError as error:
            raise RuntimeError(_words(error)) from None
        except OSError as error:
            raise RuntimeError(f"The server at {self.url} does not answer: {error}") from None


def _words(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read(65_536))["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"The server said {error.code} {error.reason}."


def sql_messages(form: Mapping[str, str], schema: str, question: str) -> list[dict[str, str]]:
    """A question about a schema, put as the model was trained to read it: `form` has the texts of a turn by role,
    with `{schema}` and `{question}` in their places."""
    given = {"{schema}": schema.strip(), "{question}": question.strip()}

    def filled(text: str) -> str:
        # In one pass, so that a schema with such a word in it stays as it is.
        return re.sub(r"\{schema\}|\{question\}", lambda mark: given[mark[0]], text)

    return [{"role": role, "content": filled(form[role])} for role in ("system", "user") if role in form]


def turns(history: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A chat's history as a server takes it; gradio keeps a turn's text in one piece or in several."""
    found = []
    for turn in history:
        content = turn["content"]
        parts = [content] if isinstance(content, str) else content
        text = "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in parts)
        found.append({"role": str(turn["role"]), "content": text})
    return found


def build(manifest: Mapping[str, Any], server: Server) -> Any:
    """The page, a gradio Blocks, which is not served yet."""
    import gradio as gr

    title = f"{manifest['name']}: {'text to SQL' if manifest['demo']['kind'] == 'sql' else 'chat'}"
    about = str(manifest["demo"].get("about") or "")
    common: dict[str, Any] = {
        "title": title, "description": about, "flagging_mode": "never", "analytics_enabled": False,
        "cache_examples": False,
    }  # fmt: skip

    system = manifest["demo"].get("system")
    begun = [{"role": "system", "content": system}] if system else []

    def text_to_sql(schema: str, question: str) -> Iterator[str]:
        if not question.strip():
            raise gr.Error("Ask a question.")
        try:
            yield from server.answer(sql_messages(manifest["demo"]["form"], schema, question))
        except RuntimeError as error:
            raise gr.Error(str(error)) from None

    def chat(message: str, history: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        try:
            yield from server.answer([*begun, *turns(history), {"role": "user", "content": message}])
        except RuntimeError as error:
            raise gr.Error(str(error)) from None

    if manifest["demo"]["kind"] == "sql":
        return gr.Interface(
            text_to_sql,
            [
                gr.Textbox(label="Schema", lines=6, placeholder=SCHEMA),
                gr.Textbox(label="Question", placeholder=QUESTION),
            ],
            gr.Code(label="SQL", language="sql"),
            examples=[[SCHEMA, QUESTION]],
            api_name="text_to_sql",
            **common,
        )
    return gr.ChatInterface(chat, api_name="chat", **common)


def main(server: Server | None = None, *, folder: Path | None = None, **options: Any) -> None:
    """Serve the page until it is stopped: on this machine only, unless GRADIO_SERVER_NAME says otherwise."""
    manifest = json.loads(((folder or Path(__file__).parent) / "manifest.json").read_text(encoding="utf-8"))
    server = server or Server(
        os.environ.get("TUNESMITH_URL", "http://127.0.0.1:8000/v1"),
        manifest["name"],
        os.environ.get("TUNESMITH_TOKEN") or None,
    )
    build(manifest, server).launch(share=False, **options)


if __name__ == "__main__":
    main()
