"""Whether an engine's answers are those that the model gives alone: a few of them, read again one at a time.

A greedy answer is what the model would write alone exactly where, read alone in one pass without padding, pages or
cache, each of its tokens and the stop token after it is the likeliest one. Where one is not, the difference of the two
log-probabilities tells a rounding (a near tie) from a bug: without a mask, with padding on the wrong side, or asked of
another model, differences are of another size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.generation import Generated, decoded, for_inference, generate, room
from tunesmith.models import first_tokens, is_seq2seq

if TYPE_CHECKING:
    from tunesmith.evaluation.compare import Comparison
    from tunesmith.training.run import Run, Watch

FILE = "evaluation/engine_check.json"
"""By model, in a run's folder."""
NEAR_TIE = 0.1
"""Nats between two tokens that rounding may swap in bfloat16 or float16. Measured on correct engines: up to 0.06; a
missing mask or padding on the wrong side: mostly 0.1 to 10."""
NEAR_TIE_WHOLE = 1e-3
"""The same in float32, where engines differ by some 1e-5."""


@dataclass(frozen=True)
class Read:
    """One answer, read again alone."""

    item: int
    verdict: Literal["equal", "near tie", "different"]
    tokens: int
    at: int | None = None
    """Position of the first token that is not the likeliest one."""
    gap: float | None = None
    """Nats between the likeliest token there and the answer's; None where the model is not in this process."""
    why: str | None = None


@dataclass(frozen=True)
class EngineCheck:
    """What came of the answers of one model."""

    model: str
    engine: str
    items: tuple[Read, ...]
    anew: bool = False
    """Whether greedy answers were asked for once more, since the measured ones are drawn."""

    @property
    def passed(self) -> bool:
        """Whether answers were read again, and none is another one than the model gives alone."""
        return bool(self.items) and all(read.verdict != "different" for read in self.items)

    def sentence(self) -> str:
        """`8/8 equal or near tie`, with what is behind it."""
        if not self.items:
            return "no answer was read again"
        good = sum(read.verdict != "different" for read in self.items)
        ties = sum(read.verdict == "near tie" for read in self.items)
        behind = f" ({ties} near tie)" if ties == 1 else f" ({ties} near ties)" if ties else ""
        asked = ", of questions asked greedily once more" if self.anew else ""
        return f"{good}/{len(self.items)} equal or near tie{behind}{asked}"

    def warning(self) -> str:
        """What is to be said of a check that failed."""
        if not self.items:
            return f"The engine check of {self.model} shows nothing: no answer of the {self.engine} engine was read."
        bad = [read for read in self.items if read.verdict == "different"]
        worst = max((read.gap for read in bad if read.gap is not None), default=None)
        how = f", by up to {worst:.2f} nats at a token" if worst is not None else ""
        return (
            f"The engine check of {self.model} failed: {len(bad)} of {len(self.items)} answers of the {self.engine} "
            f"engine are not what the model gives alone{how}. Use --set evaluation.engine=padded, and report this."
        )

    def as_dict(self) -> dict[str, Any]:
        """For engine_check.json."""
        return {**asdict(self), "passed": self.passed, "sentence": self.sentence()}


def keep_check(run: Run, check: EngineCheck) -> None:
    """Write a check into a run's folder and events; one that failed is a warning."""
    kept = {**(run.read(FILE) or {}), check.model: check.as_dict()}
    run.write(FILE, kept)
    run.event("decision", **_decision(check))
    if not check.passed:
        run.event("warning", message=check.warning())


def tell_check(watch: Watch, check: EngineCheck) -> None:
    """Tell a watcher of a check; one that failed is a warning."""
    watch({"kind": "decision", **_decision(check)})
    if not check.passed:
        watch({"kind": "warning", "message": check.warning()})


def _decision(check: EngineCheck) -> dict[str, Any]:
    reason = f"answers of the {check.engine} engine, read again alone by the model"
    return {"name": f"engine check of {check.model}", "value": check.sentence(), "reason": reason}


def remarked(compared: list[Comparison], kept: Mapping[str, Any]) -> list[Comparison]:
    """Comparisons of which the primary ones carry the checks that failed, on either side; `kept` has them by model."""

    def said(c: Comparison) -> tuple[str, ...]:
        return tuple(
            f"The engine check of {name} failed ({kept[name]['sentence']}), so this verdict may be the engine's."
            for name in (c.against, c.model)
            if name in kept and not kept[name]["passed"]
        )

    return [replace(c, remarks=(*c.remarks, *said(c))) if c.primary else c for c in compared]


def chosen(prompts: Sequence[Sequence[int]], count: int) -> list[int]:
    """Numbers of `count` prompts, by the order of their hashes, so that the choice depends on nothing else."""

    def mark(number: int) -> tuple[str, int]:
        return hashlib.sha256(json.dumps(list(prompts[number])).encode()).hexdigest(), number

    return sorted(sorted(range(len(prompts)), key=mark)[:count])


def read_alone(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Generated],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    numbers: Sequence[int] | None = None,
    limit: float | None = None,
) -> list[Read]:
    """Each greedy answer, read again alone by the model; `numbers` are what the items are called.

    `limit` is the largest gap of a near tie in nats, for answers that were made in another precision than the model's;
    by default that of the model's precision.
    """
    found = []
    for number, prompt, answer in zip(numbers or range(len(prompts)), prompts, answers, strict=True):
        if answer.exact:
            most = room(model, len(prompt), max_new_tokens)
            found.append(_read(model, tokenizer, prompt, answer, stop_ids, most, number, limit))
        else:
            found.append(
                _rewritten(model, tokenizer, prompt, answer, stop_ids, max_new_tokens, number, limit)
            )
    return found


def asked_again(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Generated],
    ask: Callable[[Sequence[int]], Generated],
    numbers: Sequence[int],
) -> list[Read]:
    """The same where the model is not in this process: the engine is asked again, for one answer at a time."""
    found = []
    for number, prompt, answer in zip(numbers, prompts, answers, strict=True):
        alone = ask(prompt)
        same = (alone.ids, alone.text, alone.finish_reason) == (answer.ids, answer.text, answer.finish_reason)
        at = None if same else _first_difference(answer.ids, alone.ids)
        found.append(Read(number, "equal" if same else "different", len(answer.ids), at))
    return found


def _read(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    answer: Generated,
    stop_ids: Sequence[int],
    most: int,
    number: int,
    limit: float | None,
) -> Read:
    ids = [*answer.ids, *([answer.stop_id] if answer.stop_id is not None else [])]
    ended = f"ends after {len(answer.ids)} tokens, before the limit of {most}, without a stop token"
    wrong = None
    if answer.finish_reason == "length" and len(answer.ids) != most:
        wrong = ended
    elif any(token in stop_ids for token in answer.ids):
        wrong = "goes on behind a stop token"
    elif answer.text != decoded(list(answer.ids), tokenizer):
        wrong = "its text is not that of its tokens"
    if wrong:
        return Read(number, "different", len(answer.ids), why=wrong)
    gaps, tie = _gaps(model, prompt, ids, limit)
    at = next((place for place, gap in enumerate(gaps) if gap > 0), None)
    if at is None:
        return Read(number, "equal", len(answer.ids))
    # A near tie sends the answer another way, in which it is still the model's own: all of it is looked at.
    worst = max(gaps)
    return Read(
        number,
        "near tie" if worst < tie else "different",
        len(answer.ids),
        gaps.index(worst) if worst >= tie else at,
        round(worst, 4),
    )


def _gaps(
    model: Any, prompt: Sequence[int], ids: Sequence[int], limit: float | None
) -> tuple[list[float], float]:
    """Nats by which each token is below the likeliest one, and from how many on it is no near tie."""
    import torch

    if not ids:
        return [], limit or NEAR_TIE_WHOLE
    with for_inference(model):
        if is_seq2seq(model):
            first = first_tokens(model)
            logits = model(
                input_ids=torch.tensor([list(prompt)], device=model.device),
                decoder_input_ids=torch.tensor(
                    [[first["decoder_start_token_id"], *ids[:-1]]], device=model.device
                ),
                use_cache=False,
            ).logits[0]
            if "forced_bos_token_id" in first:
                logits[0] = 0.0  # not the model's choice
        else:
            given = torch.tensor([[*prompt, *ids[:-1]]], device=model.device)
            logits = model(input_ids=given, use_cache=False).logits[0, len(prompt) - 1 :]
        # The gap of two log-probabilities is that of their logits.
        values = logits.float()
        best = values.max(-1).values
        own = values.gather(1, torch.tensor(ids, device=values.device)[:, None])[:, 0]
        reduced = logits.dtype in (torch.bfloat16, torch.float16)
        # Two logits that are next to each other in a short number type are this far apart.
        step = torch.finfo(logits.dtype).eps * float(best.abs().max()) if reduced else 0.0
        tie = limit if limit is not None else NEAR_TIE if reduced else NEAR_TIE_WHOLE
    return (best - own).tolist(), tie + step


def _rewritten(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    answer: Generated,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    number: int,
    limit: float | None,
) -> Read:
    """Of text without ids: the model writes it again, and the texts are compared."""
    [alone] = generate(model, tokenizer, [prompt], max_new_tokens=max_new_tokens, stop_ids=stop_ids)
    if alone.text == answer.text:
        return Read(number, "equal", len(answer.ids))
    at = _first_difference(alone.ids, answer.ids)
    if at >= len(answer.ids):
        return Read(number, "different", len(answer.ids), at)
    gaps, tie = _gaps(model, prompt, [*alone.ids[:at], answer.ids[at]], limit)
    return Read(
        number,
        "near tie" if gaps[-1] < tie else "different",
        len(answer.ids),
        at,
        round(gaps[-1], 4),
    )


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    shorter = min(len(one), len(other))
    return next((n for n in range(shorter) if one[n] != other[n]), shorter)
