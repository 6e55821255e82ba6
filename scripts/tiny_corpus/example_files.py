"""Every file of `assets/examples/`, as text: the same seed gives the same bytes."""

import json
import random
from collections.abc import Iterable

from tiny_corpus import code, dialogue, feedback, sql_examples, support_desk

_COUNT = 300
_TONES = 500
_SYSTEM = ("You are a helpful assistant.", "You are a friendly teacher.", "Answer in one sentence.",
           "You are a polite helper who answers short questions.")  # fmt: skip


def _jsonl(rows: Iterable[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def support(rng: random.Random) -> str:
    rows = [{"question": q, "reply": a} for q, a in support_desk.talk(rng)]
    unique = list({row["question"]: row for row in rows}.values())[:_COUNT]
    return json.dumps(unique, ensure_ascii=False, indent=1) + "\n"


def preferences(rng: random.Random) -> str:
    return _jsonl(
        {"prompt": c.prompt, "chosen": c.chosen, "rejected": c.rejected}
        for c in feedback.comparisons(rng, _COUNT)
    )


def tone(rng: random.Random) -> str:
    return _jsonl(
        {"prompt": c.prompt, "chosen": c.chosen, "rejected": c.rejected} for c in feedback.tones(rng, _TONES)
    )


def ratings(rng: random.Random) -> str:
    rows = []
    for c in feedback.comparisons(rng, _COUNT):
        good = rng.random() < 0.5
        rows.append({"prompt": c.prompt, "completion": c.chosen if good else c.rejected,
                     "label": good})  # fmt: skip
    return _jsonl(rows)


def code_requests(rng: random.Random) -> str:
    made: dict[str, dict[str, object]] = {}
    while len(made) < _COUNT:
        s = code.snippet(rng)
        request = f"{s.request} Example: {s.call} gives {s.result}."
        made.setdefault(s.request, {"prompt": request, "completion": s.source.rstrip()})
    return _jsonl(made.values())


def chat(rng: random.Random) -> str:
    rows: list[dict[str, object]] = []
    while len(rows) < _COUNT:
        messages: list[dict[str, str]] = []
        if rng.random() < 0.3:
            messages.append({"role": "system", "content": rng.choice(_SYSTEM)})
        for said, reply in dialogue.turns(rng, rng.randint(2, 4)):
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": reply})
        rows.append({"messages": messages})
    return _jsonl(rows)


def files(seed: int) -> dict[str, str]:
    """File name -> content, each from a generator of its own, so that one never moves another."""
    makers = {"support.json": support, "preferences.jsonl": preferences, "tone.jsonl": tone,
              "ratings.jsonl": ratings, "code.jsonl": code_requests, "chat.jsonl": chat}  # fmt: skip
    made = {name: make(random.Random(f"{seed} {name}")) for name, make in makers.items()}
    return {"sql.jsonl": sql_examples.lines(seed), **made}
