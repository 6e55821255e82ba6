"""Asking a judge: every request once, within a budget, through whatever the network does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from typing import Any

from tunesmith.errors import RunError, TunesmithError, counted
from tunesmith.evaluation.judging.book import Book, Entry, key
from tunesmith.evaluation.judging.client import Endpoint, Refused, Reply, pause
from tunesmith.evaluation.judging.prompts import Message, Prompts, repair
from tunesmith.evaluation.judging.settings import ADDRESSES, Judge

BYTES_PER_TOKEN = 3
"""Bytes of a request that are estimated as a token; more tokens than of English text, whose tokens have four."""
MAX_FAILED_IN_A_ROW = 20
"""Requests that may fail one after another, each after all its tries, before the judge counts as out of reach."""


@dataclass(frozen=True)
class Asker:
    """A judge that can be asked: `many` answers a few conversations at once, each as the last words of Reply."""

    name: str
    many: Callable[[Sequence[Sequence[Message]]], list[Reply]]
    """Replies in order. Raises Refused."""
    facts: Mapping[str, Any]
    """What its replies depend on, for the name under which they are kept."""
    batch: int = 1
    """Requests that are asked together."""
    concurrency: int = 1
    specials: tuple[str, ...] = ()
    """Tokens of its own that no answer may bring with it."""


@dataclass(frozen=True)
class Request:
    """One question to the judge: its messages, the name of its reply, and how to tell a verdict."""

    key: str
    messages: tuple[Message, ...]
    is_answered: Callable[[str], bool]


@dataclass(frozen=True)
class Estimate:
    """What a judging will come to, before it begins."""

    requests: int
    known: int
    """Requests whose reply is in the book."""
    calls: int
    prompt_tokens: int
    most_completion_tokens: int
    most_cost: float | None
    """Money at most without repetitions; None where no prices are given."""

    def sentence(self) -> str:
        """The estimate as people read it."""
        money = "" if self.most_cost is None else f", at most {self.most_cost:.2f} in the unit of the prices"
        known = f" ({self.known:,} more are in the book)" if self.known else ""
        return (
            f"{counted(self.calls, 'call')}{known}, about {self.prompt_tokens:,} tokens to read and at most "
            f"{self.most_completion_tokens:,} to write{money}"
        )


@dataclass
class Costs:
    """The budget of a book: a call is admitted only where even its most expensive end is within."""

    judge: Judge
    book: Book
    underway: dict[str, tuple[int, int]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def admit(self, key: str, tokens: tuple[int, int]) -> None:
        """Put the call's worst case aside. Raises OverBudget where it does not fit."""
        judge = self.judge
        with self._lock:
            spent = self.book.spent
            calls = spent.calls + len(self.underway) + 1
            read = spent.prompt_tokens + sum(t[0] for t in self.underway.values()) + tokens[0]
            written = spent.completion_tokens + sum(t[1] for t in self.underway.values()) + tokens[1]
            money = cost(judge, read, written)
            if judge.max_calls is not None and calls > judge.max_calls:
                raise OverBudget(f"call {calls} would be above max_calls: {judge.max_calls}")
            if judge.max_cost is not None and money is not None and money > judge.max_cost:
                raise OverBudget(
                    f"the next call could bring the cost to {money:.4f}, above max_cost: {judge.max_cost}"
                )
            self.underway[key] = tokens

    def settle(self, key: str) -> None:
        """The call is over and, where it cost something, in the book."""
        with self._lock:
            self.underway.pop(key, None)


class OverBudget(Exception):
    """The next call could cost more than may be spent."""


def cost(judge: Judge, prompt_tokens: int, completion_tokens: int) -> float | None:
    """Money for tokens; None where no prices are given."""
    if judge.price_input is None or judge.price_output is None:
        return None
    return (prompt_tokens * judge.price_input + completion_tokens * judge.price_output) / 1_000_000


def estimated(judge: Judge, requests: Sequence[Request], book: Book) -> Estimate:
    """What these requests will come to: replies in the book cost nothing, and equal requests are asked once."""
    new = {r.key: r for r in requests if r.key not in book.entries}
    read, written = sum(tokens_of(r.messages) for r in new.values()), len(new) * judge.max_tokens
    return Estimate(
        len({r.key for r in requests}), len({r.key for r in requests}) - len(new), len(new), read, written,
        cost(judge, read, written),
    )  # fmt: skip


def tokens_of(messages: Sequence[Message]) -> int:
    """Tokens of a request, estimated from its bytes."""
    size = sum(len(m["content"].encode("utf-8", "surrogatepass")) + 12 for m in messages)
    return -(-size // BYTES_PER_TOKEN)


def asker(judge: Judge) -> Asker:
    """The judge of these settings, loaded here where it is local. Raises RecipeError and ModelError."""
    if judge.api == "local":
        return local(judge)
    endpoint = Endpoint(
        judge.base_url or ADDRESSES[judge.api],
        judge.model,
        api=judge.api,
        api_key_env=judge.api_key_env,
        max_tokens=judge.max_tokens,
        temperature=judge.temperature,
        timeout=judge.timeout,
        max_tokens_name=judge.max_tokens_name,
    )
    facts = {
        "api": judge.api, "model": judge.model, "host": endpoint.host, "temperature": judge.temperature,
        "max_tokens": judge.max_tokens,
    }  # fmt: skip
    return Asker(
        judge.model, lambda several: [endpoint.call(m) for m in several], facts, concurrency=judge.concurrency
    )


def local(judge: Judge) -> Asker:
    """A model on this machine as the judge, greedy unless the settings say otherwise."""
    from tunesmith import models
    from tunesmith import plan as planning
    from tunesmith.data import templates
    from tunesmith.data.examples import Message as Turn
    from tunesmith.data.examples import Unusable
    from tunesmith.generation import generate

    location = models.locate(judge.model)
    tokenizer = models.load_tokenizer(judge.model)
    templates.set_template(tokenizer, None)
    device = planning.device()
    model = models.load_model(judge.model, dtype=planning.inference_dtype("auto", device), device=device)
    stop_ids = templates.end_of_turn_ids(tokenizer)

    def ids(messages: Sequence[Message]) -> list[int]:
        turns = [Turn(m["role"], m["content"]) for m in messages]
        try:
            return templates.prompt_ids(turns, tokenizer)
        except Unusable as reason:
            if turns[0].role != "system":
                raise Refused(f"the judge cannot be asked: {reason}", again=False) from None
        # Some templates have no system turn: its text then opens the question.
        first = Turn("user", f"{turns[0].content}\n\n{turns[1].content}")
        try:
            return templates.prompt_ids([first, *turns[2:]], tokenizer)
        except Unusable as reason:
            raise Refused(f"the judge cannot be asked: {reason}", again=False) from None

    def many(several: Sequence[Sequence[Message]]) -> list[Reply]:
        asked = [ids(messages) for messages in several]
        found = generate(
            model,
            tokenizer,
            asked,
            max_new_tokens=judge.max_tokens,
            stop_ids=stop_ids,
            temperature=judge.temperature or 0.0,
        )
        return [
            Reply(one.text, len(prompt), len(one.ids), one.finish_reason)
            for one, prompt in zip(found, asked, strict=True)
        ]

    specials = tuple(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
    facts = {
        "api": "local", "model": str(location), "temperature": judge.temperature, "max_tokens": judge.max_tokens,
        "batch": judge.batch_size if judge.temperature else None,
    }  # fmt: skip
    return Asker(judge.model, many, facts, batch=judge.batch_size, specials=specials)


def ask(
    requests: Sequence[Request],
    asker: Asker,
    judge: Judge,
    prompts: Prompts,
    book: Book,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Entry | str]:
    """By key the reply in the book, or in words why there is none.

    A reply without a verdict is asked for the verdict alone, once, where the settings say so. What failed is not in
    the book, so that asking again tries it again. Raises RunError where the budget ends, where the judge refuses
    everybody, and where it is out of reach; what was paid for until then is kept.
    """
    failed = _round(requests, asker, judge, book, progress)
    repairs = []
    if judge.repair:
        for request in {r.key: r for r in requests}.values():
            entry = book.entries.get(request.key)
            if entry and not request.is_answered(entry.reply.text):
                messages = repair(prompts, entry.messages, entry.reply.text)
                repairs.append(Request(key("repair", request.key), messages, request.is_answered))
        failed |= _round(repairs, asker, judge, book, None)
    found: dict[str, Entry | str] = {}
    for request in requests:
        mended = book.entries.get(key("repair", request.key)) if judge.repair else None
        entry = mended or book.entries.get(request.key)
        found[request.key] = entry if entry else failed.get(request.key, "not asked")
    return found


def _round(
    requests: Sequence[Request],
    asker: Asker,
    judge: Judge,
    book: Book,
    progress: Callable[[int, int], None] | None,
) -> dict[str, str]:
    """Ask what is not in the book yet; gives by key why a request has no reply."""
    waiting = list({r.key: r for r in requests if r.key not in book.entries}.values())
    waiting.reverse()
    total, done, in_a_row, width = len(waiting), 0, 0, asker.concurrency
    failed: dict[str, str] = {}
    costs, stop = Costs(judge, book), threading.Event()
    ended: TunesmithError | None = None
    underway: dict[Future[list[Reply]], list[Request]] = {}
    with ThreadPoolExecutor(asker.concurrency, thread_name_prefix="judge") as threads:
        try:
            while (waiting and not ended) or underway:
                while waiting and not ended and len(underway) < width:
                    part = [waiting.pop() for _ in range(min(asker.batch, len(waiting)))]
                    underway[threads.submit(_paid, part, asker, judge, book, costs, stop)] = part
                finished, _ = wait(underway, return_when=FIRST_COMPLETED)
                for future in finished:
                    part = underway.pop(future)
                    done += len(part)
                    try:
                        future.result()
                        in_a_row = 0
                    except OverBudget as error:
                        if underway:  # what they put aside may come back
                            waiting += reversed(part)
                            done, width = done - len(part), len(underway)
                            continue
                        ended = ended or _ended(
                            f"The judge's budget ends here: {error}.", book, waiting, part
                        )
                    except Refused as refusal:
                        failed |= {request.key: str(refusal) for request in part}
                        in_a_row += 1
                        if refusal.hopeless:
                            ended = ended or _ended(f"The judge refuses: {refusal}.", book, waiting, part)
                        elif in_a_row >= MAX_FAILED_IN_A_ROW:
                            said = f"The judge is out of reach: {in_a_row} requests failed, the last with {refusal}."
                            ended = ended or _ended(said, book, waiting, part)
                    if ended:
                        stop.set()
                    if progress:
                        progress(done, total)
        except BaseException:
            stop.set()
            raise
    if ended:
        raise ended
    return failed


def _ended(said: str, book: Book, waiting: Sequence[Request], part: Sequence[Request]) -> RunError:
    return RunError(
        said,
        found=f"replies in the book: {len(book.entries):,}; requests to go: {len(waiting) + len(part):,}",
        fix="Mend the judge's settings and run the same command again: nothing in the book is paid for twice.",
    )


def _paid(
    part: Sequence[Request], asker: Asker, judge: Judge, book: Book, costs: Costs, stop: threading.Event
) -> list[Reply]:
    """Replies to a few requests, in the book before anything else knows of them."""
    # A request's worst case: a token for every other byte, and the longest reply.
    worst = [(-(-tokens_of(r.messages) * BYTES_PER_TOKEN // 2), judge.max_tokens) for r in part]
    attempt = 0
    while True:
        try:
            for request, most in zip(part, worst, strict=True):
                costs.admit(request.key, most)
            try:
                replies = asker.many([request.messages for request in part])
            except Refused as refusal:
                if refusal.charged:
                    for request, most in zip(part, worst, strict=True):
                        book.lose(request.key, most, str(refusal))
                raise
            for request, reply in zip(part, replies, strict=True):
                read = tokens_of(request.messages) if reply.prompt_tokens is None else reply.prompt_tokens
                written = reply.completion_tokens
                if written is None:
                    written = tokens_of([{"content": reply.text}])
                book.add(request.key, reply, request.messages, (read, written))
            return replies
        except Refused as refusal:
            if not refusal.again or attempt >= judge.retries or stop.is_set():
                raise
            waited = pause(attempt, refusal, backoff=judge.backoff)
        finally:
            for request in part:
                costs.settle(request.key)
        attempt += 1
        if stop.wait(waited):
            raise Refused("stopped", again=False)


def spent(judge: Judge, book: Book) -> dict[str, Any]:
    """What the book's calls came to, with the money where there are prices."""
    found = book.spent
    return {**asdict(found), "cost": cost(judge, found.prompt_tokens, found.completion_tokens)}
