"""Asking a judge: every request once, within a budget, through whatever the network does."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from typing import Any

from tunesmith.errors import RunError, TunesmithError, counted
from tunesmith.evaluation.judging.book import Book, Entry, key
from tunesmith.evaluation.judging.client import Endpoint, Reply
from tunesmith.evaluation.judging.prompts import Message, Prompts, repair
from tunesmith.evaluation.judging.settings import Judge
from tunesmith.http import Refused, pause

BYTES_PER_TOKEN = 3
"""Bytes of a request that are estimated as a token; more tokens than of English text, whose tokens have four."""
REPAIR_SHARE = 0.05
"""Share of replies that a forecast expects without a verdict; each takes another call."""
MAX_FAILED_IN_A_ROW = 20
"""Requests that may fail one after another, each after all its tries, before the judge counts as out of reach."""

AGAIN = "run the same command again: nothing in the book is paid for twice."
FIRST_REPLIES = 20
"""Replies after which a judge that gave no verdict in any of them is not asked on."""


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
class Forecast:
    """What all the judging of a command will come to, before its first call; repetitions of failed calls apart."""

    parts: Mapping[str, int]
    """New calls by what they are for; those for the verdict alone (`repairs`) are expected, the others counted."""
    known: int
    """Requests whose reply is in the book."""
    calls: int
    most_calls: int
    """If every reply had to be asked for its verdict again."""
    prompt_tokens: int
    most_completion_tokens: int
    """If every reply is as long as it may be."""
    cost: float | None
    """Money for these calls and tokens; None where no prices are given."""
    most_cost: float | None
    """Money in the worst case: `most_calls`, and a token for every byte."""
    max_calls: int | None = None
    max_cost: float | None = None
    spent_calls: int = 0
    """What counts against the budget already."""
    spent_cost: float | None = None

    def too_much(self) -> str:
        """In what this is expected to go beyond the budget; empty where it does not, or where there is none."""
        over = []
        if self.max_calls is not None and self.spent_calls + self.calls > self.max_calls:
            spent = f" after {self.spent_calls:,} made before" if self.spent_calls else ""
            over.append(f"{counted(self.calls, 'call')}{spent}, above max_calls: {self.max_calls:,}")
        if (
            self.max_cost is not None
            and self.cost is not None
            and (self.spent_cost or 0) + self.cost > self.max_cost
        ):
            spent = f" after {self.spent_cost:.4g} spent before" if self.spent_cost else ""
            over.append(f"a cost of {self.cost:.4g}{spent}, above max_cost: {self.max_cost:g}")
        if not over:
            return ""
        return (
            f"The judge is expected to take {' and '.join(over)}: it will stop on the way, and what it said till then "
            "is kept. Raise max_calls or max_cost, or judge fewer questions."
        )

    def sentence(self) -> str:
        """The forecast as people read it."""
        parts = ", ".join(f"{number:,} {name}" for name, number in self.parts.items() if number)
        said = counted(self.calls, "call") + (f" ({parts})" if parts else "")
        if self.known:
            said += f", {self.known:,} more are in the book"
        said += (
            f"; about {self.prompt_tokens:,} tokens to read, at most {self.most_completion_tokens:,} to write"
        )
        if self.cost is not None and self.most_cost is not None:
            said += f"; {self.cost:.2f} in the unit of the prices if all replies are so long, "
            said += f"{self.most_cost:.2f} at worst"
        limits = [
            ("max_calls", self.max_calls, self.spent_calls),
            ("max_cost", self.max_cost, self.spent_cost),
        ]
        budget = [
            f"{name} {limit:,}" + (f" ({spent:,.4g} spent)" if spent else "")
            for name, limit, spent in limits
            if limit is not None
        ]
        if budget:
            said += f"; budget: {', '.join(budget)}"
        return said


@dataclass
class Costs:
    """The budget of a book, one for all that is asked with it: a call is admitted only where even its most expensive
    end is within, beside those of the calls under way."""

    judge: Judge
    book: Book
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def admit(self, calls: Sequence[tuple[str, tuple[int, int]]]) -> None:
        """Put the worst case of calls that go together aside. Raises OverBudget where they do not fit."""
        judge, book = self.judge, self.book
        with self._lock:
            most = book.committed()
            for _, tokens in calls:
                most.add(*tokens)
            number, money = most.calls, cost(judge, most.prompt_tokens, most.completion_tokens)
            if judge.max_calls is not None and number > judge.max_calls:
                raise OverBudget(f"call {number} would be above max_calls: {judge.max_calls}")
            if judge.max_cost is not None and money is not None and money > judge.max_cost:
                raise OverBudget(
                    f"the next call could bring the cost to {money:.4f}, above max_cost: {judge.max_cost}"
                )
            for key, tokens in calls:
                book.send(key, tokens)


class OverBudget(Exception):
    """The next call could cost more than may be spent."""


def cost(judge: Judge, prompt_tokens: int, completion_tokens: int) -> float | None:
    """Money for tokens; None where no prices are given."""
    if judge.price_input is None or judge.price_output is None:
        return None
    return (prompt_tokens * judge.price_input + completion_tokens * judge.price_output) / 1_000_000


def forecast(judge: Judge, planned: Mapping[str, Sequence[Request]], book: Book) -> Forecast:
    """What requests will come to, by what they are for: replies in the book cost nothing, and equal requests are asked
    once. Of the new replies `REPAIR_SHARE` are expected to lack a verdict; of those in the book it is known."""
    new: dict[str, Request] = {}
    known: dict[str, Request] = {}
    parts = dict.fromkeys(planned, 0)
    for part, requests in planned.items():
        for request in requests:
            if request.key in book.entries:
                known[request.key] = request
            elif request.key not in new:
                new[request.key] = request
                parts[part] += 1
    due = [r for r in known.values() if judge.repair and _lacks_verdict(r, book)]
    expected = math.ceil(REPAIR_SHARE * len(new)) if judge.repair else 0
    read = sum(tokens_of(r.messages) for r in new.values())
    mean = read / len(new) if new else 0
    # Who is asked for a verdict again reads the request and its own reply.
    repairs = sum(tokens_of(r.messages) + judge.max_tokens for r in due)
    repairs += math.ceil(expected * (mean + judge.max_tokens))
    calls = len(new) + len(due) + expected
    most = [worst(judge, r.messages) for r in new.values()]
    again = [(r + judge.max_tokens * BYTES_PER_TOKEN, w) for r, w in most] if judge.repair else []
    again += [worst(judge, [*r.messages, {"content": book.entries[r.key].reply.text}]) for r in due]
    most += again
    written = calls * judge.max_tokens
    before = book.committed()
    return Forecast(
        {**parts, "repairs expected": len(due) + expected}, len(known), calls, len(most), read + repairs, written,
        cost(judge, read + repairs, written), cost(judge, sum(r for r, _ in most), sum(w for _, w in most)),
        judge.max_calls, judge.max_cost, before.calls, cost(judge, before.prompt_tokens, before.completion_tokens),
    )  # fmt: skip


def _lacks_verdict(request: Request, book: Book) -> bool:
    """Whether a reply in the book has no verdict and was not asked for it again."""
    entry = book.entries[request.key]
    return not request.is_answered(entry.reply.text) and key("repair", request.key) not in book.entries


def tokens_of(messages: Sequence[Message]) -> int:
    """Tokens of a request, estimated from its bytes."""
    return -(-_bytes(messages) // BYTES_PER_TOKEN)


def worst(judge: Judge, messages: Sequence[Message]) -> tuple[int, int]:
    """Tokens of a call at most, read and written: no tokenizer over bytes makes more tokens than bytes."""
    return _bytes(messages), judge.max_tokens


def _bytes(messages: Sequence[Message]) -> int:
    return sum(len(m["content"].encode("utf-8", "surrogatepass")) + 12 for m in messages)


def asker(judge: Judge) -> Asker:
    """The judge of these settings, loaded here where it is local. Raises RecipeError and ModelError."""
    if judge.api == "local" or judge.address is None:
        return local(judge)
    endpoint = Endpoint(
        judge.address,
        judge.model,
        api=judge.api,
        api_key_env=judge.api_key_env,
        max_tokens=judge.max_tokens,
        temperature=judge.temperature,
        timeout=judge.timeout,
        max_tokens_name=judge.max_tokens_name,
    )
    facts = {
        "api": judge.api, "model": judge.model, "endpoint": endpoint.base_url, "temperature": judge.temperature,
        "max_tokens": judge.max_tokens,
    }  # fmt: skip
    return Asker(
        judge.model, lambda several: [endpoint.call(m) for m in several], facts, concurrency=judge.concurrency
    )


def local(judge: Judge) -> Asker:
    """A model on this machine as the judge, greedy unless the settings say otherwise."""
    from tunesmith import models
    from tunesmith import plan as planning
    from tunesmith.data import examples, templates
    from tunesmith.data.examples import Unusable
    from tunesmith.engines import Source
    from tunesmith.generation import generate

    tokenizer = models.load_tokenizer(judge.model)
    templates.set_template(tokenizer, None)
    device = planning.device()
    dtype = planning.inference_dtype("auto", device)
    source = Source(
        "judge",
        tokenizer,
        lambda place=device: models.load_model(judge.model, dtype=dtype, device=place),
        judge.model,
        dtype=dtype,
        device=device,
    )
    stop_ids = templates.end_of_turn_ids(tokenizer)

    def ids(messages: Sequence[Message]) -> list[int]:
        turns = [examples.Message(m["role"], m["content"]) for m in messages]
        try:
            return templates.prompt_ids(turns, tokenizer)
        except Unusable as reason:
            if turns[0].role != "system":
                raise Refused(f"the judge cannot be asked: {reason}", again=False) from None
        # Some templates have no system turn: its text then opens the question.
        first = examples.Message("user", f"{turns[0].content}\n\n{turns[1].content}")
        try:
            return templates.prompt_ids([first, *turns[2:]], tokenizer)
        except Unusable as reason:
            raise Refused(f"the judge cannot be asked: {reason}", again=False) from None

    def many(several: Sequence[Sequence[Message]]) -> list[Reply]:
        asked = [ids(messages) for messages in several]
        found = generate(
            source.model,
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
        "api": "local", "model": source.identity(), "temperature": judge.temperature, "max_tokens": judge.max_tokens,
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
    new = list({r.key: r for r in requests if r.key not in book.entries}.values())
    total, failed = len(new), dict[str, str]()
    if progress and total:
        progress(0, total)
    if total > FIRST_REPLIES:
        first = new[:FIRST_REPLIES]
        failed |= _round(first, asker, judge, book, progress and (lambda done, _: progress(done, total)))
        if not failed:
            failed |= _repaired(first, asker, judge, prompts, book)
            if not any(_has_verdict(request, book) for request in first):
                raise _ended(
                    f"The judge gives no verdict: the first {FIRST_REPLIES} replies hold none, the last one: "
                    f"{book.entries[first[-1].key].reply.text[:80]!r}.",
                    book, new[FIRST_REPLIES:], (),
                    "Take another judge, or mend its prompts or max_tokens. The replies are kept; the same command "
                    f"goes on with the next {FIRST_REPLIES}.",
                )  # fmt: skip
    known = total - sum(r.key not in book.entries and r.key not in failed for r in new)
    left = [r for r in requests if r.key not in failed]
    failed |= _round(left, asker, judge, book, progress and (lambda done, _: progress(known + done, total)))
    failed |= _repaired(requests, asker, judge, prompts, book)
    found: dict[str, Entry | str] = {}
    for request in requests:
        mended = book.entries.get(key("repair", request.key)) if judge.repair else None
        entry = mended or book.entries.get(request.key)
        found[request.key] = entry if entry else failed.get(request.key, "not asked")
    return found


def _repaired(
    requests: Sequence[Request], asker: Asker, judge: Judge, prompts: Prompts, book: Book
) -> dict[str, str]:
    """Ask for the verdict alone where a reply has none, as the settings say; gives by key why that has no reply."""
    repairs = []
    for request in {r.key: r for r in requests}.values() if judge.repair else ():
        entry = book.entries.get(request.key)
        if entry and not request.is_answered(entry.reply.text):
            messages = repair(prompts, entry.messages, entry.reply.text)
            repairs.append(Request(key("repair", request.key), messages, request.is_answered))
    return _round(repairs, asker, judge, book, None)


def _has_verdict(request: Request, book: Book) -> bool:
    """Whether a reply in the book has a verdict, its own or the one that it was asked for again."""
    entries = (book.entries.get(name) for name in (request.key, key("repair", request.key)))
    return any(entry and request.is_answered(entry.reply.text) for entry in entries)


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
                            f"The judge's budget ends here: {error}.",
                            book,
                            waiting,
                            part,
                            f"Raise max_calls or max_cost in the judge's settings and {AGAIN}",
                        )
                    except Refused as refusal:
                        failed |= {request.key: str(refusal) for request in part}
                        in_a_row += 1
                        if refusal.hopeless:
                            ended = ended or _ended(f"The judge refuses: {refusal}.", book, waiting, part)
                        elif in_a_row >= MAX_FAILED_IN_A_ROW:
                            said = f"The judge is out of reach: {in_a_row} requests failed, the last with {refusal}."
                            fix = f"Is it running at the base_url of its settings? See to that and {AGAIN}"
                            ended = ended or _ended(said, book, waiting, part, fix)
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


def _ended(
    said: str, book: Book, waiting: Sequence[Request], part: Sequence[Request], fix: str = ""
) -> RunError:
    return RunError(
        said,
        found=f"replies in the book: {len(book.entries):,}; requests to go: {len(waiting) + len(part):,}",
        fix=fix or f"Mend the judge's settings and {AGAIN}",
    )


def _paid(
    part: Sequence[Request], asker: Asker, judge: Judge, book: Book, costs: Costs, stop: threading.Event
) -> list[Reply]:
    """Replies to a few requests, in the book before anything else knows of them."""
    most = [(r.key, worst(judge, r.messages)) for r in part]
    attempt = 0
    while True:
        costs.admit(most)
        try:
            replies = asker.many([request.messages for request in part])
        except Refused as refusal:
            for name, tokens in most:
                if refusal.charged:
                    book.lose(name, tokens, str(refusal))
                else:
                    book.free(name)
            if not refusal.again or attempt >= judge.retries or stop.is_set():
                raise
            waited = pause(attempt, refusal, backoff=judge.backoff)
        else:
            for request, reply, (_, (read, written)) in zip(part, replies, most, strict=True):
                # What an endpoint does not count is counted at its most.
                counts = (reply.prompt_tokens, reply.completion_tokens)
                used = tuple(m if n is None else n for n, m in zip(counts, (read, written), strict=True))
                book.add(request.key, reply, request.messages, (used[0], used[1]))
            return replies
        attempt += 1
        if stop.wait(waited):
            raise Refused("stopped", again=False)


def spent(judge: Judge, book: Book) -> dict[str, Any]:
    """What the book's calls came to, with the money where there are prices."""
    found = book.spent
    return {**asdict(found), "cost": cost(judge, found.prompt_tokens, found.completion_tokens)}
