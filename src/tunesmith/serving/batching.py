"""Many answers at once, step by step: a request joins between two steps and leaves at the step that ends it.

    waiting -> read in (in parts, so that others go on) -> stepped together -> told piece by piece

Rows lie left-padded in one cache, as `generation.generate` pads them, so a greedy answer is what the model writes
alone. Each adapter has a batch of its own. Models without such a cache (encoder-decoder models, states) are stepped
row by row. One thread does all of it, and no other thread touches the model.

A round that fails is told to the rows that it was of, and the others go on. What is not of any row ends the thread: all
are told, and so is whoever runs the server.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

from tunesmith.errors import is_out_of_memory
from tunesmith.generation import decoded, feeder, for_inference, length_batches, pick
from tunesmith.models import first_tokens, is_seq2seq

log = logging.getLogger(__name__)

PART = 512
"""Tokens of each prompt that are read before the running answers get their next token."""
TOGETHER = 8192
"""Padded tokens of prompts that are read in together."""

Ending = Literal["stop", "length", "left", "failed"]
Done = TypeVar("Done")


@dataclass(frozen=True)
class Ask:
    """One request: token ids, and how they are to be answered."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    """At most the room that the model's context leaves."""
    stop_ids: tuple[int, ...]
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends."""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    logprobs: int | None = None
    """Number of likeliest tokens to tell beside each token; None for no probabilities."""
    adapter: str | None = None


@dataclass(frozen=True)
class Token:
    """A token of an answer with its log-probability in nats, before temperature."""

    text: str
    logprob: float
    likeliest: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Piece:
    """What a step added to an answer."""

    text: str
    ids: tuple[int, ...] = ()
    tokens: tuple[Token, ...] = ()
    ending: Ending | None = None
    stopped_by: int | str | None = None
    problem: str | None = None
    """Why it failed, in words for the client."""


class Text:
    """An answer's text as it grows; what may still become another character or a stop text is held back."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._from, self._read, self._sent = 0, 0, 0
        self._whole = ""

    def add(self, ids: Sequence[int]) -> tuple[str, str | None]:
        """Text that is certain by now, and the stop text that was met; `ids` are all of the answer's."""
        before = decoded(ids[self._from : self._read], self._tokenizer)
        text = decoded(ids[self._from :], self._tokenizer)
        if len(text) <= len(before) or text.endswith("\ufffd"):
            return "", None
        self._from, self._read = self._read, len(ids)
        return self._grown(self._whole + text[len(before) :], is_end=False)

    def end(self, ids: Sequence[int]) -> tuple[str, str | None]:
        """All that is left, as the whole answer's tokens read."""
        text = decoded(ids, self._tokenizer)
        sent = self._whole[: self._sent]
        return self._grown(text if text.startswith(sent) else self._whole, is_end=True)

    def _grown(self, text: str, *, is_end: bool) -> tuple[str, str | None]:
        longest = max(map(len, self._stop), default=1)
        since = max(0, len(self._whole) - longest + 1) if not is_end else self._sent
        met = [(at, stop) for stop in self._stop if (at := text.find(stop, since)) >= 0]
        self._whole = text
        at, stop = min(met, default=(len(text), None))
        until = at if is_end or stop is not None else at - self._held(text, longest)
        new = text[self._sent : max(until, self._sent)]
        self._sent += len(new)
        return new, stop

    def _held(self, text: str, longest: int) -> int:
        """Characters at the end that begin a stop text."""
        for length in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


@dataclass(eq=False)
class Row:
    """One answer under way."""

    ask: Ask
    told: Callable[[Piece], None]
    """Called from the thread that steps."""
    tokenizer: Any
    ids: list[int] = field(default_factory=list)
    left: bool = False
    """Set by anyone; no further step is made for it."""
    ended: bool = False
    past: Any = None
    read: dict[str, Any] = field(default_factory=dict)
    generator: Any = None
    text: Text = field(init=False)

    def __post_init__(self) -> None:
        self.text = Text(self.tokenizer, self.ask.stop)


@dataclass
class _Batch:
    """Rows with one cache; `mask` has a column for each of the cache's, and those of prompts still to be read."""

    rows: list[Row]
    cache: Any
    mask: Any
    unread: Any = None
    """Prompts, left-padded, from the column on to which the cache reaches."""


class Batcher:
    """Steps a model for all that ask it, in a thread of its own."""

    def __init__(self, model: Any, *, max_rows: int, adapters: Sequence[str] = ()) -> None:
        self.model = model
        self.max_rows = max_rows
        self.steps = 0
        """Number of forward passes so far."""
        self.fault: str | None = None
        """Why the thread has ended, if it has by itself."""
        self.on_fault: Callable[[], None] = lambda: None
        """Called once everybody knows that it has."""
        owner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.alone = why_alone(model)
        """Why rows are stepped one by one; None where they share a batch."""
        self._owner = owner
        self._adapters = tuple(adapters)
        self._active: str | None = "" if adapters else None  # "" is none of them: the first step settles it
        self._takes = set(inspect.signature(owner.forward).parameters)
        self._first = first_tokens(owner)
        self._waiting: deque[Row] = deque()
        self._coming: list[Row] = []
        """Rows that have a place, but no batch yet."""
        self._joining: dict[str | None, list[_Batch]] = {}
        self._running: dict[str | None, _Batch] = {}
        self._single: list[Row] = []
        self._news = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="batching", daemon=True)

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    def stop(self) -> None:
        """End after the step under way; answers that are not whole are told that they failed."""
        with self._news:
            self._stopping = True
            self._news.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        """Number of requests that have no place yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of requests being read or answered."""
        return len(self._all())

    def submit(self, row: Row) -> None:
        """Have a row answered."""
        if row.ask.adapter is not None and row.ask.adapter not in self._adapters:
            raise ValueError(f"no adapter {row.ask.adapter!r}")
        with self._news:
            if not self.is_alive:
                raise RuntimeError("the batching thread has ended")
            self._waiting.append(row)
            self._news.notify()

    def leave(self, row: Row) -> None:
        """Nobody waits for a row any more."""
        with self._news:
            row.left = True
            self._news.notify()

    def _run(self) -> None:
        try:
            with for_inference(self.model):
                while self._next():
                    pass
        except BaseException as error:
            self.fault = f"{type(error).__name__}: {error}"
            log.exception("batching has ended")
        finally:
            with self._news:
                self._stopping = True
                rest = [*self._all(), *self._waiting]
                self._waiting.clear()
            self._fail(rest, "The server is stopping.")
            if self.fault is not None:
                self.on_fault()

    def _fail(self, rows: Sequence[Row], problem: str) -> None:
        for row in list(rows):
            try:
                self._end(row, "failed", problem=problem)
            except Exception:  # whoever cannot be told must not keep the others from it
                log.exception("a client could not be told that its answer failed")

    def _all(self) -> list[Row]:
        # Copied first: other threads count the rows, and a dictionary that changes ends their loop with an error.
        batches = [*self._running.values()]
        for some in list(self._joining.values()):
            batches += some
        return [*(row for batch in batches for row in batch.rows), *self._single, *self._coming]

    def _next(self) -> bool:
        """One round: who has left goes, who waits comes, and everybody gets a token. False at the end."""
        with self._news:
            self._news.wait_for(lambda: self._stopping or self._waiting or self._all())
            if self._stopping:
                return False
            gone = [row for row in self._waiting if row.left]
            kept = [row for row in self._waiting if not row.left]
            places = max(0, self.max_rows - self.running)
            self._coming, self._waiting = kept[:places], deque(kept[places:])
        for row in gone:
            self._end(row, "left")
        self._drop_left()
        self._take(self._coming)
        self._coming = []
        for adapter in sorted({*self._joining, *self._running}, key=str):
            self._round(adapter)
        for row in list(self._single):
            self._guarded([row], partial(self._step_single, row))
        self._single = [row for row in self._single if not row.ended]
        return True

    def _take(self, come: Sequence[Row]) -> None:
        # Who left since it got its place is at its end already.
        come = [row for row in come if not row.ended and self._guarded([row], partial(self._seeded, row))]
        if self.alone:
            self._single += come
            return
        for adapter in {row.ask.adapter for row in come}:
            rows = {n: row for n, row in enumerate(come) if row.ask.adapter == adapter}
            lengths = {n: len(row.ask.prompt) for n, row in rows.items()}
            for numbers in length_batches(lengths, tokens=TOGETHER):
                together = [rows[n] for n in numbers]
                if batch := self._guarded(together, partial(self._padded, together)):
                    self._joining.setdefault(adapter, []).append(batch)

    def _seeded(self, row: Row) -> bool:
        import torch

        if row.ask.temperature > 0:
            row.generator = torch.Generator(device=self._owner.device).manual_seed(row.ask.seed)
        return True

    def _padded(self, rows: list[Row]) -> _Batch:
        import torch
        from transformers import DynamicCache

        width = max(len(row.ask.prompt) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, row in enumerate(rows):
            ids[line, width - len(row.ask.prompt) :] = torch.tensor(row.ask.prompt)
            mask[line, width - len(row.ask.prompt) :] = 1
        device = self._owner.device
        # Without the configuration every layer keeps all columns, so that rows of other lengths can join; the
        # window of a layer that has one is in the mask.
        return _Batch(rows, DynamicCache(), mask.to(device), ids.to(device))

    def _round(self, adapter: str | None) -> None:
        """Read a part of the prompts of those who join, and step those who run."""
        if joining := self._joining.get(adapter):
            batch = joining[0]
            ready = self._guarded(batch.rows, lambda: self._read_part(adapter, batch))
            if ready is None or ready or not batch.rows:
                joining.pop(0)
            if ready and batch.rows:
                before = self._running.get(adapter)
                together = self._guarded(batch.rows, partial(_joined, before, batch)) if before else batch
                if together:
                    self._running[adapter] = together
        if running := self._running.get(adapter):
            if self._guarded(running.rows, lambda: self._step(adapter, running)) is None:
                running.rows = []
            if not running.rows:
                del self._running[adapter]

    def _guarded(self, rows: Sequence[Row], work: Callable[[], Done]) -> Done | None:
        """What work gives; None where it failed, which its rows are told. An error of the device is raised: behind one,
        a process gets nothing from its GPU any more."""
        try:
            return work()
        except Exception as error:
            if is_out_of_memory(error):
                problem = "The server ran out of memory; try again later or with a shorter prompt."
            else:
                problem = "The server failed to answer this request."
            log.error("a step failed: %s: %s", type(error).__name__, error)
            self._fail(rows, problem)
            if type(error).__name__ == "AcceleratorError" and not is_out_of_memory(error):
                raise
            return None

    def _read_part(self, adapter: str | None, batch: _Batch) -> bool:
        """Whether the prompts are read to their end; the rows then have their first token."""
        seen = batch.cache.get_seq_length()
        until = min(seen + PART, batch.mask.shape[1])
        logits = self._forward(
            adapter, batch, batch.unread[:, : until - seen], batch.mask[:, :until], seen=seen
        )
        batch.unread = batch.unread[:, until - seen :]
        if batch.unread.shape[1]:
            return False
        self._told(batch, logits)
        return True

    def _step(self, adapter: str | None, batch: _Batch) -> bool:
        import torch

        ids = torch.tensor([[row.ids[-1]] for row in batch.rows], device=batch.mask.device)
        batch.mask = torch.cat([batch.mask, torch.ones_like(ids)], dim=1)
        logits = self._forward(adapter, batch, ids, batch.mask, seen=batch.mask.shape[1] - 1)
        self._told(batch, logits)
        return True

    def _forward(self, adapter: str | None, batch: _Batch, ids: Any, mask: Any, *, seen: int) -> Any:
        """Logits behind the last column."""
        self._activate(adapter)
        given: dict[str, Any] = {}
        if "position_ids" in self._takes:
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, seen:]
        if "logits_to_keep" in self._takes:
            given["logits_to_keep"] = 1
        output = self._owner(
            input_ids=ids, attention_mask=mask, past_key_values=batch.cache, use_cache=True, **given
        )
        self.steps += 1
        batch.cache = output.past_key_values
        return output.logits[:, -1].float()

    def _told(self, batch: _Batch, logits: Any) -> None:
        """Give each row its token, and let those go that are at their end. What fails for one is told to that one."""
        likeliest = logits.argmax(-1).tolist()
        for line, row in enumerate(batch.rows):
            self._guarded([row], partial(self._given, row, logits[line], likeliest[line]))
        self._keep(batch, [line for line, row in enumerate(batch.rows) if not row.ended])

    def _step_single(self, row: Row) -> bool:
        self._activate(row.ask.adapter)
        feeds = feeder(self._owner)(self._owner, row.ask.prompt, row.ids, row.past, row.read, self._first)
        output = self._owner(**feeds, past_key_values=row.past, use_cache=True)
        self.steps += 1
        row.past = getattr(output, "past_key_values", None)
        logits = output.logits[0, -1].float()
        self._given(row, logits, int(logits.argmax()))
        return True

    def _given(self, row: Row, logits: Any, likeliest: int) -> None:
        ask = row.ask
        if not row.ids and "forced_bos_token_id" in self._first:
            token = self._first["forced_bos_token_id"]
        elif ask.temperature > 0:
            token = pick(logits, ask.temperature, ask.top_p, row.generator)
        else:
            token = likeliest
        if token in ask.stop_ids:
            self._end(row, "stop", stopped_by=token)
            return
        row.ids.append(token)
        tokens = (_token(row.tokenizer, logits, token, ask.logprobs),) if ask.logprobs is not None else ()
        new, stop = row.text.add(row.ids)
        if stop is not None:
            self._end(row, "stop", new, (token,), tokens, stopped_by=stop)
        elif len(row.ids) >= ask.max_new_tokens:
            self._end(row, "length", new, (token,), tokens)
        else:
            row.told(Piece(new, (token,), tokens))

    def _end(
        self,
        row: Row,
        ending: Ending,
        text: str = "",
        ids: tuple[int, ...] = (),
        tokens: tuple[Token, ...] = (),
        *,
        stopped_by: int | str | None = None,
        problem: str | None = None,
    ) -> None:
        if row.ended:
            return
        if ending in ("stop", "length") and not isinstance(stopped_by, str):
            rest, stop = row.text.end(row.ids)
            text += rest
            if stop is not None:
                ending, stopped_by = "stop", stop
        row.ended, row.past, row.read = True, None, {}
        row.told(Piece(text, ids, tokens, ending, stopped_by, problem))

    def _drop_left(self) -> None:
        for row in self._all():
            if row.left:
                self._end(row, "left")
        for batch in [*self._running.values(), *(b for some in self._joining.values() for b in some)]:
            stay = [line for line, row in enumerate(batch.rows) if not row.ended]
            if self._guarded(batch.rows, partial(self._keep, batch, stay)) is None:
                batch.rows = []  # what it holds may be cut for some layers only
        self._running = {adapter: batch for adapter, batch in self._running.items() if batch.rows}
        self._joining = {
            adapter: kept for adapter, some in self._joining.items() if (kept := [b for b in some if b.rows])
        }
        self._single = [row for row in self._single if not row.ended]

    def _keep(self, batch: _Batch, lines: list[int]) -> bool:
        """Leave the rows that are at their end, and the columns that are padding for all others."""
        import torch

        if len(lines) == len(batch.rows):
            return True
        batch.rows = [batch.rows[line] for line in lines]
        if not lines:
            batch.cache = batch.unread = None
            return True
        chosen = torch.tensor(lines, device=batch.mask.device)
        mask = batch.mask.index_select(0, chosen)
        seen = batch.cache.get_seq_length()
        empty = min(int((mask.cumsum(-1) == 0).all(0).sum()), seen)
        batch.mask = mask[:, empty:]
        if batch.unread is not None:
            batch.unread = batch.unread.index_select(0, chosen)
        for layer in batch.cache.layers if seen else ():
            layer.keys = layer.keys.index_select(0, chosen)[:, :, empty:]
            layer.values = layer.values.index_select(0, chosen)[:, :, empty:]
        return True

    def _activate(self, adapter: str | None) -> None:
        if not self._adapters or adapter == self._active:
            return
        self._active = ""  # not known, where this fails half-way
        if adapter is None:
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(adapter)
        self._active = adapter


def why_alone(model: Any) -> str | None:
    """Why the rows of a model cannot share a batch that others join, in words; None where they can."""
    if is_seq2seq(model):
        return "it is an encoder-decoder model"
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(owner, "_is_stateful", False):
        return "it keeps a state instead of a cache"
    config = owner.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        return f"it has layers of the kind {', '.join(other)}"
    if getattr(config, "num_kv_shared_layers", 0):
        return "some of its layers share a cache"
    # Each model's own forward says whether it writes into a cache that it is given.
    if "past_key_values" not in inspect.signature(owner.forward).parameters:
        return "it keeps no cache"
    return None


def _joined(one: _Batch, other: _Batch) -> _Batch:
    """Two batches as one, padded on the left to the width of the wider one; where that fails, `one` is as it was.

    Layer by layer, so that of one layer only there are two copies.
    """
    import torch
    from torch.nn.functional import pad

    width = max(one.mask.shape[1], other.mask.shape[1])
    short = [width - batch.mask.shape[1] for batch in (one, other)]
    mask = torch.cat([pad(batch.mask, (by, 0)) for batch, by in zip((one, other), short)])

    def both(mine: Any, theirs: Any) -> Any:
        return torch.cat([pad(part, (0, 0, by, 0)) for part, by in zip((mine, theirs), short)])

    done = []
    try:
        for mine, theirs in zip(one.cache.layers, other.cache.layers, strict=True):
            mine.keys, mine.values = both(mine.keys, theirs.keys), both(mine.values, theirs.values)
            done.append(mine)
    except BaseException:
        for layer in done:  # no copies: there is no memory for them
            layer.keys = layer.keys[: len(one.rows), :, short[0] :]
            layer.values = layer.values[: len(one.rows), :, short[0] :]
        raise
    return _Batch([*one.rows, *other.rows], one.cache, mask)


def _token(tokenizer: Any, logits: Any, token: int, count: int) -> Token:
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(count, len(logprobs))) if count else ((), ())
    return Token(
        tokenizer.decode([token]),
        float(logprobs[token]),
        tuple((tokenizer.decode([int(i)]), float(v)) for i, v in zip(ids, values)),
    )
