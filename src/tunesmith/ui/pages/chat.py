"""The Chat page: base and tuned answer the same; the better answer is kept as a pair for DPO."""

from __future__ import annotations

import contextlib
import functools
import html
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from tunesmith import api
from tunesmith.errors import InputError
from tunesmith.training.run import open_run
from tunesmith.ui import preferences
from tunesmith.ui.choosing import guarded, require_finished, run_choice, run_path, shell_line, told_of
from tunesmith.ui.shared import PRIVATE, QUIET, Shared, box, command, empty
from tunesmith.ui.workspace import Workspace, workspace_of

LOADED = 2
"""Models that are kept in memory: the two of one run."""
LONGEST_QUESTION = 20_000
WAITING = 120.0
"""Seconds that a question waits for another one's answers."""
STOPPING = 60.0
"""Seconds that a new conversation waits for a model that is being loaded."""
SHOWN_EVERY = 0.15
"""Seconds between two pictures of answers that are being written. A page takes longer to draw one than a small model to
write the next piece: sent with every piece they would pile up in the browser, and *Stop* be seen minutes later."""
NEW_TOKENS = (16, 2048)
TRY = empty("No question yet.", "Ask something below: base and tuned model answer the same conversation.")

_loading = threading.Lock()
_answering = threading.Lock()
"""One conversation at a time: the models share memory and cores."""


@dataclass
class Asking:
    """A question that is being answered."""

    halted: threading.Event = field(default_factory=threading.Event)
    """Its answers end with the piece that is being written."""
    is_left: bool = False
    """Another conversation has begun: nothing more is to be seen of this one."""


_asking: dict[str, Asking] = {}
"""By Gradio's name for them the pages whose question is being answered. Gradio's own `cancels` leaves the generator
where it is, so that nothing could be said of what is written."""


@dataclass(frozen=True)
class Turn:
    """The last question with both answers."""

    prompt: tuple[dict[str, str], ...]
    """The conversation up to the question."""
    base: str
    tuned: str
    names: tuple[str, str]
    is_whole: bool = True
    """Whether both answers are written to their end."""


@functools.lru_cache(maxsize=LOADED)
def _talker(model: str, changed: int) -> api.Chat:
    return api.Chat(model)


def talker(model: str | Path) -> api.Chat:
    """A loaded model; a run's final model is loaded anew when it has changed."""
    folder = Path(model) / "final_model"
    with _loading:
        return _talker(str(model), folder.stat().st_mtime_ns if folder.is_dir() else 0)


def let_go() -> None:
    """Give the memory of the loaded models back."""
    with _loading:
        _talker.cache_clear()


def sides(workspace: Workspace, run: str | None) -> tuple[str, str]:
    """The base and the tuned model of a run. Raises InputError where it has no final model yet."""
    path = require_finished(run_path(workspace, run))
    return open_run(path).recipe().model.base, str(path)


def answers(
    models: tuple[str, str],
    messages: Sequence[dict[str, str]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Generator[tuple[str, str]]:
    """Both answers as far as they are written, piece by piece, in turns; closed, it lets the models go."""
    if not _answering.acquire(timeout=WAITING):
        raise InputError("The models answer somebody else.", fix="Ask again in a minute.")
    try:
        streams = [
            talker(model).answer(messages, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
            for model in models
        ]
        said, open_ones = ["", ""], [0, 1]
        while open_ones:
            for side in list(open_ones):
                piece = next(streams[side], None)
                if piece is None:
                    open_ones.remove(side)
                else:
                    said[side] += piece
            yield said[0], said[1]
    finally:
        _answering.release()


def shown(history: Sequence[dict[str, str]], question: str, both: tuple[str, str], *, is_open: bool) -> str:
    """The conversation, and both answers to the last question side by side, for `gr.HTML`: all of it escaped."""
    lines = [
        f'<div class="ts-turn ts-{turn["role"]}"><span>{html.escape(turn["role"])}</span>'
        f"<p>{html.escape(turn['content'])}</p></div>"
        for turn in history
    ]
    if question:
        lines.append(f'<div class="ts-turn ts-user"><span>user</span><p>{html.escape(question)}</p></div>')
        cells = "".join(
            f'<div class="ts-answer" id="chat-answer-{side}"><span>{side}</span><p>{html.escape(text)}'
            + ("<i>…</i>" if is_open else "")
            + "</p></div>"
            for side, text in zip(("base", "tuned"), both, strict=True)
        )
        lines.append(f'<div class="ts-both">{cells}</div>')
    busy = ' aria-busy="true"' if is_open else ""
    return f'<div class="ts-talk" role="log" aria-live="polite"{busy}>{"".join(lines)}</div>'


def messages_of(system: str, history: Sequence[dict[str, str]], question: str) -> list[dict[str, str]]:
    """What the models are asked."""
    if not question.strip():
        raise InputError("There is no question.", fix="Write one.")
    if len(question) > LONGEST_QUESTION:
        raise InputError(
            "The question is too long.",
            found=f"{len(question):,} characters",
            fix=f"At most {LONGEST_QUESTION:,}.",
        )
    first = [{"role": "system", "content": system}] if system.strip() else []
    return [*first, *history, {"role": "user", "content": question}]


def settled(
    history: Sequence[dict[str, str]], turn: Turn | None, preferred: str | None
) -> list[dict[str, str]]:
    """The conversation with the last turn in it: the answer that was preferred, by default the tuned model's.

    Of a turn that was stopped it is the base's where the tuned model had said nothing yet.
    """
    if turn is None or not (turn.is_whole or (turn.base + turn.tuned).strip()):
        return list(history)
    is_base = preferred == "base" or not (turn.is_whole or turn.tuned.strip())
    answer = turn.base if is_base else turn.tuned
    return [*history, turn.prompt[-1], {"role": "assistant", "content": answer}]


def prefer(workspace: Workspace, turn: Turn | None, side: str) -> Path:
    """Keep that an answer of the last turn was the better one; gives the file."""
    if turn is None:
        raise InputError("There are no two answers to choose from.", fix="Ask something first.")
    if not turn.is_whole:
        raise InputError("The answers were stopped, and half ones teach nothing.", fix="Ask once more.")
    both = {"base": (turn.base, turn.names[0]), "tuned": (turn.tuned, turn.names[1])}
    better, worse = both[side], both["base" if side == "tuned" else "tuned"]
    return preferences.keep(
        workspace.chats, prompt=turn.prompt, chosen=better[0], rejected=worse[0], models=(better[1], worse[1])
    )


def stopped(history: Sequence[dict[str, str]], turn: Turn) -> tuple[Turn | None, str, str, str]:
    """What is left of a turn that was stopped: the turn, the conversation, the question to be asked again, and a box.

    What was written stays, and the conversation goes on from it; where nothing was, the question comes back.
    """
    question, both = turn.prompt[-1]["content"], (turn.base, turn.tuned)
    if not (turn.base + turn.tuned).strip():
        note = box("Stopped before a word was said.", ["Your message is back in its field."], kind="note")
        return None, shown(history, "", ("", ""), is_open=False) if history else TRY, question, note
    whose = "tuned model" if turn.tuned.strip() else "base"
    said = [f"What was written stays; the conversation goes on from what the {whose} had said."]
    page = shown(history, question, both, is_open=False)
    return turn, page, "", box("Stopped: these answers are not whole.", said, kind="note")


def commands(
    names: tuple[str, str],
    messages: Sequence[dict[str, str]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    """The same question to both models in a shell, a line each.

    A shell's question stands alone: where a conversation goes before it, a comment says that it is left out.
    """
    first = messages[0]["role"] == "system"
    system = [f"--system={messages[0]['content']}"] if first else []
    options = [f"--max-new-tokens={max_new_tokens}", f"--temperature={temperature:g}", f"--seed={seed}"]
    lines = [
        command(["tunesmith", "chat", *system, f"--prompt={messages[-1]['content']}", *options, "--", name])
        for name in names
    ]
    before = len(messages) - 1 - first
    if before:
        lines.insert(0, f"# Without the {before} messages before it, which these models were given here.")
    return "\n".join(lines)


def cleared() -> list[Any]:
    """The page without a conversation: history, turn, preference, talk, both thumbs, question, note and command."""
    off = gr.Button(interactive=False)
    return [[], None, None, TRY, off, off, "", "", ""]


def build(shared: Shared) -> None:
    """Fill the tab."""
    chosen = run_choice(shared, "chat")
    history = gr.State([])
    turn = gr.State(None)
    with shared.apart:
        preferred = gr.State(None)
    talk = gr.HTML(TRY, elem_id="chat-talk", autoscroll=True)
    with gr.Row():
        base_up = gr.Button("The base is better", elem_id="chat-prefer-base", interactive=False)
        tuned_up = gr.Button("The tuned one is better", elem_id="chat-prefer-tuned", interactive=False)
    question = gr.Textbox(
        value="", label="Your message", lines=2, max_lines=8, elem_id="chat-question", max_length=LONGEST_QUESTION,
        placeholder="Enter sends, Shift and Enter begins a line",
    )  # fmt: skip
    with gr.Row():
        send = gr.Button("Send to both", variant="primary", elem_id="chat-send")
        halt = gr.Button("Stop the answers", elem_id="chat-stop")
        afresh = gr.Button("New conversation", elem_id="chat-new")
    told = gr.HTML("", elem_id="chat-told")
    with gr.Accordion("Parameters", open=False, elem_id="chat-parameters"):
        system = gr.Textbox(
            value="", label="System message", elem_id="chat-system", lines=2, max_length=LONGEST_QUESTION
        )
        with gr.Row():
            length = gr.Slider(
                *NEW_TOKENS, value=256, step=16, label="Longest answer, in tokens", elem_id="chat-length"
            )
            temperature = gr.Slider(
                0,
                2,
                value=0,
                step=0.05,
                label="Temperature; 0 takes the likeliest token",
                elem_id="chat-temperature",
            )
            seed = gr.Number(value=0, minimum=0, precision=0, label="Seed", elem_id="chat-seed")
    with gr.Accordion("What you preferred", open=False, elem_id="chat-preferences"):
        kept = gr.HTML("", elem_id="chat-kept")
        use = gr.Button("Make a DPO recipe of it", elem_id="chat-use")
        unload = gr.Button("Give the models' memory back", elem_id="chat-unload")
    line = shell_line("chat")

    def ask(
        run: str | None, asked: str, before: list[dict[str, str]], last: Turn | None, better: str | None,
        system: str, length: float, temperature: float, seed: float, request: gr.Request,
    ) -> Iterator[list[Any]]:  # fmt: skip
        page, asking = str(request.session_hash), Asking()
        _asking[page] = asking
        try:
            with contextlib.closing(
                answered(
                    workspace_of(request),
                    run,
                    asked,
                    before,
                    last,
                    better,
                    system,
                    length,
                    temperature,
                    seed,
                    asking.halted,
                )
            ) as pictures:
                for picture in pictures:
                    if not asking.is_left:
                        yield picture
            if asking.is_left:
                yield cleared()
        finally:  # also where the page is closed meanwhile
            _asking.pop(page, None)

    def answered(
        workspace: Workspace, run: str | None, asked: str, before: list[dict[str, str]], last: Turn | None,
        better: str | None, system: str, length: float, temperature: float, seed: float, halted: threading.Event,
    ) -> Generator[list[Any]]:  # fmt: skip
        off, nothing = gr.Button(interactive=False), gr.skip()
        page: Any = nothing
        try:
            names = sides(workspace, run)
            before = settled(before, last, better)
            messages = messages_of(system, before, asked)
            low, high = NEW_TOKENS
            settings: dict[str, Any] = {
                "max_new_tokens": min(max(int(length), low), high),
                "temperature": min(max(float(temperature), 0.0), 2.0),
                "seed": max(int(seed or 0), 0),
            }
            shell = commands(names, messages, **settings)
            page = shown(before, "", ("", ""), is_open=False) if before else TRY
            both = ("", "")
            yield [before, None, None, shown(before, asked, both, is_open=True), off, off, "", "", shell]
            next_picture = 0.0
            with contextlib.closing(answers(names, messages, **settings)) as pieces:
                for both in pieces:
                    if halted.is_set():
                        part = Turn(tuple(messages), *both, names, is_whole=False)
                        left, page, back, note = stopped(before, part)
                        yield [nothing, left, nothing, page, off, off, back, note, nothing]
                        return
                    if (now := time.monotonic()) >= next_picture:
                        next_picture = now + SHOWN_EVERY
                        yield [*[nothing] * 3, shown(before, asked, both, is_open=True), *[nothing] * 5]
        except Exception as error:
            gone = nothing if page is nothing else None
            yield [nothing, gone, nothing, page, off, off, asked, told_of(error), nothing]
            return
        made = Turn(tuple(messages), both[0], both[1], names)
        on = gr.Button(interactive=both[0].split() != both[1].split())
        note = "" if both[0].split() != both[1].split() else box("Both say the same.", kind="note")
        yield [before, made, None, shown(before, asked, both, is_open=False), on, on, "", note, nothing]

    inputs = [chosen, question, history, turn, preferred, system, length, temperature, seed]
    outputs = [history, turn, preferred, talk, base_up, tuned_up, question, told, line]
    gr.on([send.click, question.submit], ask, inputs=inputs, outputs=outputs, concurrency_limit=1, **PRIVATE)

    def halt_answers(request: gr.Request) -> None:
        """They end with the piece that is being written."""
        if asking := _asking.get(str(request.session_hash)):
            asking.halted.set()

    def ended(request: gr.Request) -> list[Any]:
        """Stop, and clear the page once nothing more is said: what comes after it would open the page's turn again."""
        if asking := _asking.get(str(request.session_hash)):
            asking.is_left = True
        halt_answers(request)
        until = time.monotonic() + STOPPING
        while str(request.session_hash) in _asking and time.monotonic() < until:
            time.sleep(0.05)
        return cleared()

    halt.click(halt_answers, **QUIET)

    for event in (afresh.click, chosen.change):
        event(ended, outputs=outputs, show_progress="hidden", **PRIVATE)

    def vote(side: str) -> Any:
        def on(last: Turn | None, request: gr.Request) -> list[Any]:
            def act() -> list[Any]:
                workspace = workspace_of(request)
                prefer(workspace, last, side)
                off = gr.Button(interactive=False)
                number = preferences.count(workspace.chats)
                note = f"The conversation goes on from it. {number} pairs are kept."
                return [
                    side,
                    box(f"Kept: the {side} model's answer is the better one.", [note], kind="good"),
                    off,
                    off,
                ]

            return list(guarded(act, lambda said: [gr.skip(), said, gr.skip(), gr.skip()]))

        return on

    base_up.click(vote("base"), inputs=[turn], outputs=[preferred, told, base_up, tuned_up], **PRIVATE)
    tuned_up.click(vote("tuned"), inputs=[turn], outputs=[preferred, told, base_up, tuned_up], **PRIVATE)

    def pairs(_: Any, request: gr.Request) -> str:
        workspace = workspace_of(request)
        number = preferences.count(workspace.chats)
        if not number:
            return empty(
                "No pair yet.",
                "Say under two answers which is the better one; a DPO run learns from such pairs.",
            )
        return box(f"{number} pairs are kept.", [str(workspace.chats / preferences.NAME)], kind="note")

    gr.on(None, pairs, inputs=[preferred], outputs=[kept], **QUIET)

    def recipe_of(run: str | None, request: gr.Request) -> list[Any]:
        def act() -> list[Any]:
            layer = dpo_layer(workspace_of(request), run)
            data, base = layer["data"]["dataset"], layer["model"]["base"]
            shell = command(
                ["tunesmith", "train", "--method=dpo", f"--dataset={data}", f"--base-model={base}"]
            )
            return [layer, gr.Tabs(selected="recipe"), shell, ""]

        return list(guarded(act, lambda said: [gr.skip(), gr.skip(), gr.skip(), said]))

    use.click(recipe_of, inputs=[chosen], outputs=[shared.recipe, shared.tabs, line, told], **PRIVATE)

    def free() -> str:
        let_go()
        return box(
            "The models are no longer in memory.", ["The next question loads them again."], kind="note"
        )

    unload.click(free, outputs=[told], **PRIVATE)


def dpo_layer(workspace: Workspace, run: str | None) -> dict[str, Any]:
    """A recipe's layer that trains a run's model on what was preferred over it."""
    if not preferences.count(workspace.chats):
        raise InputError("No pair was kept yet.", fix="Say under two answers which is the better one.")
    _, tuned = sides(workspace, run)
    return {
        "model": {"base": tuned},
        "data": {"dataset": str(workspace.chats / preferences.NAME)},
        "method": {"kind": "dpo"},
    }
