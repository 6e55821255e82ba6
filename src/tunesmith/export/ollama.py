"""An Ollama Modelfile for a GGUF file, with the chat template in Ollama's own language where it can be said there.

Ollama does not run Jinja: its templates are Go's. A chat template is taken apart by rendering it: what stands before
and after each role's text. Where conversations put together from these pieces are what the template itself renders,
the Modelfile says them in Go; otherwise it has no TEMPLATE, which is said, instead of one that is nearly right.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import size

NAME = "Modelfile"

_PROBES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "Why is it so?"),),
    (("user", "One\ntwo."), ("assistant", "Three."), ("user", "Four?")),
    (
        ("system", "Be short."),
        ("user", "Hello there"),
        ("assistant", "Hi."),
        ("user", "And now?"),
        ("assistant", "No."),
    ),
    (("system", "Answer in verse."), ("user", "A question, please")),
)
"""Conversations that the pieces have to render as the template does."""


@dataclass(frozen=True)
class Pieces:
    """A chat template taken apart."""

    start: str
    """Before the first turn."""
    around: dict[str, tuple[str, str]]
    """By role, what stands before and after its text."""
    opening: str
    """What the model answers behind."""

    def rendered(self, turns: Sequence[tuple[str, str]], *, opening: bool) -> str:
        """A conversation put together."""
        body = "".join(self.around[role][0] + text + self.around[role][1] for role, text in turns)
        return self.start + body + (self.opening if opening else "")


def pieces_of(tokenizer: Any) -> Pieces | None:
    """The template taken apart; None where conversations are not simply one turn after the other."""
    if not tokenizer.chat_template:
        return None

    def text(turns: Sequence[tuple[str, str]], *, opening: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening)
        return rendered

    try:
        # Marks that no template has, one for each place.
        a, b, c, d = (f"qz{n}zq" for n in range(4))
        one = text([("user", a)], opening=False)
        two = text([("user", a), ("assistant", b), ("user", c)], opening=False)
        whole = text([("system", d), ("user", a)], opening=False)
        asked = text([("user", a)], opening=True)
        after_user_to_answer = two[two.index(a) + len(a) : two.index(b)]
        after_answer_to_user = two[two.index(b) + len(b) : two.index(c)]
        end_of_user = one[one.index(a) + len(a) :]
        if not after_user_to_answer.startswith(end_of_user) or not asked.startswith(one):
            return None
        opens_answer = after_user_to_answer[len(end_of_user) :]
        opens_user = _common_end(one[: one.index(a)], after_answer_to_user)
        start = one[: one.index(a)][: len(one[: one.index(a)]) - len(opens_user)]
        end_of_answer = after_answer_to_user[: len(after_answer_to_user) - len(opens_user)]
        before_system = whole[: whole.index(d)]
        between = whole[whole.index(d) + len(d) : whole.index(a)]
        if not before_system.startswith(start) or not between.endswith(opens_user):
            return None
        found = Pieces(
            start=start,
            around={
                "system": (before_system[len(start) :], between[: len(between) - len(opens_user)]),
                "user": (opens_user, end_of_user),
                "assistant": (opens_answer, end_of_answer),
            },
            opening=asked[len(one) :],
        )
        for probe in _PROBES:
            is_asked = probe[-1][0] == "user"
            if found.rendered(probe, opening=is_asked) != text(probe, opening=is_asked):
                return None
    except Exception:  # a template that refuses one of these conversations, with whatever error it raises
        return None
    return found


UNTRAINED = 4096
"""Tokens of context for a model without a run, where its file allows more: what Ollama itself takes."""


def context_for(
    config: Any, *, allowed: int, trained: int | None, answered: int, asked: int
) -> tuple[int, tuple[str, ...]]:
    """How many tokens Ollama keeps room for, and why, in lines for the Modelfile.

    `allowed` is what the file holds, which a sliding window may have shortened, `trained` the longest row of the run,
    `answered` the longest answer that was measured, `asked` the longest question that it is proven with. Not all that
    the model could read: its cache would fill the memory of a laptop for texts that it has not been tried on.
    """
    if trained is None:
        count, why = min(allowed, UNTRAINED), "no run says how long its texts are"
    else:
        count = min(allowed, max(trained, asked) + answered)
        why = f"rows of up to {trained} tokens were trained on, answers of up to {answered} measured"
    lines = [f"{count} tokens of context: {why}; the file allows {allowed}."]
    if each := _cache_of_a_token(config):
        lines.append(
            f"Their cache takes up to {size(each * count)} of memory beside the weights, "
            f"{size(each * 1024)} for each 1024 tokens more."
        )
    return count, tuple(lines)


def _cache_of_a_token(config: Any) -> int | None:
    """Bytes of keys and values for each token; None where a configuration does not say it in whole numbers, as those of
    families that llama.cpp's own converter writes need not."""
    if config.is_encoder_decoder:
        return None
    text = config.get_text_config()

    def said(name: str) -> int | None:
        value = getattr(text, name, None)
        return value if isinstance(value, int) and value > 0 else None

    layers, width, heads = said("num_hidden_layers"), said("hidden_size"), said("num_attention_heads")
    each = said("head_dim") or (width // heads if width and heads else None)
    kept = said("num_key_value_heads") or heads
    return 2 * 2 * layers * kept * each if layers and kept and each else None  # of 2 bytes each


def modelfile(
    file: str, tokenizer: Any, *, stop_ids: Sequence[int], context: int | None, why: Sequence[str] = ()
) -> tuple[str, str | None]:
    """The Modelfile's text, and why it has no template, if so. `why` is said of the context, as comments."""
    lines = [f"FROM ./{file}"]
    pieces = pieces_of(tokenizer)
    problem = None
    if pieces is None:
        problem = (
            "the Modelfile has no TEMPLATE: this chat template is none that Ollama's language can say turn by turn; "
            'send Ollama whole prompts with "raw": true, or serve the merged model instead'
        )
    else:
        bos = tokenizer.bos_token or ""
        # llama.cpp adds the first token itself where the file says so.
        start = (
            pieces.start.removeprefix(bos)
            if bos and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
            else pieces.start
        )
        turns = "".join(
            f'{{{{ {"if" if n == 0 else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for n, (role, (before, after)) in enumerate(pieces.around.items())
        )
        body = f"{start}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{pieces.opening}"
        if '"""' in body or any("{{" in part for pair in pieces.around.values() for part in pair):
            problem = (
                "the Modelfile has no TEMPLATE: the chat template's own text holds what Ollama's language would "
                "read"
            )
        else:
            lines.append(f'TEMPLATE """{body}"""')
    for token in tokenizer.convert_ids_to_tokens(list(stop_ids)):
        lines.append(f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}")
    if context:
        lines += [f"# {line}" for line in why]
        lines.append(f"PARAMETER num_ctx {context}")
    lines.append("PARAMETER temperature 0")
    return "\n".join(lines) + "\n", problem


def _common_end(one: str, other: str) -> str:
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return one[len(one) - count :]
