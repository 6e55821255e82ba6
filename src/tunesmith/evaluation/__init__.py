"""Evaluation: base and tuned model answer the same held-out questions along one code path.

    examples -> items -> evaluate (answers, likelihoods, scores) -> rows -> scores, compare, report

Rows are the record; every number is computed from them.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith import engines, scoring
from tunesmith.data import pairs, templates
from tunesmith.data.examples import (
    Conversation,
    Example,
    Message,
    Preference,
    Prompt,
    Rating,
    Row,
    Text,
    Unusable,
    content_hash,
)
from tunesmith.data.preferences import sides
from tunesmith.data.prompts import prompt_of
from tunesmith.data.templates import IGNORED, LossOn, end_of_turn_ids
from tunesmith.engines.check import NEAR_TIE, EngineCheck, asked_again, chosen, read_alone
from tunesmith.errors import RecipeError
from tunesmith.evaluation import classification, sandbox
from tunesmith.evaluation.code import running_allowed
from tunesmith.evaluation.compare import score_interval
from tunesmith.evaluation.lengths import length_bias
from tunesmith.evaluation.metrics import METRICS, check_runnable, known_metrics
from tunesmith.evaluation.rows import EvalRow, read_rows, write_rows
from tunesmith.generation import (
    Generated,
    context_length,
    for_inference,
    halving,
    length_batches,
)
from tunesmith.models import Head, Kind, is_reward, is_seq2seq
from tunesmith.recipe import Evaluation, Model
from tunesmith.training.run import counting, warning

__all__ = [
    "EvalRow",
    "Item",
    "answers",
    "are_answers_to",
    "check_engine",
    "check_fit",
    "check_runnable",
    "check_scoring",
    "drawn_at",
    "evaluate",
    "identity",
    "items",
    "known_metrics",
    "length_bias",
    "longer_than_read",
    "read_rows",
    "scores",
    "taken",
    "value",
    "write_rows",
]

LOGITS_IN_MEMORY = 2**27
"""Most logits of a likelihood batch: half a gigabyte in float32."""
LOGITS_AT_ONCE = 2**25
"""Of them, how many are copied to float32 at a time, twice over: all may be as large as the model itself."""


def tokens_together(batch_tokens: int, vocabulary: int) -> int:
    """Padded tokens of a likelihood batch."""
    return min(batch_tokens, LOGITS_IN_MEMORY // vocabulary)


def copied_together(vocabulary: int) -> int:
    """Tokens whose logits are copied at a time."""
    return max(LOGITS_AT_ONCE // vocabulary, 1)


@dataclass(frozen=True)
class Item:
    """One held-out example as token ids: what is asked, and what the likelihood is taken of."""

    number: int
    row: Row
    group: str | None
    prompt: Prompt | None
    """None for running text, which has nothing to answer."""
    prompt_ids: tuple[int, ...]
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    tokens_cut: int = 0
    error: str | None = None
    """Why the example cannot be asked; it is counted, not left out."""
    text: str = ""
    """The beginning of running text, or what a badly rated answer was given to, for people."""
    good: bool | None = None
    """Of a rating whether its answer is the good one."""
    rejected: Item | None = None
    """Of a preference its worse answer."""
    num_bytes: int = 0
    """UTF-8 bytes of the text of its labels, special tokens excepted."""


@dataclass(frozen=True)
class _Likelihood:
    nll: float
    tokens: int
    correct: int
    cut: int
    windows: int = 1


def items(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    loss_on: LossOn = "answers",
    max_items: int | None = None,
    max_length: int | None = None,
    kind: Kind = "causal",
) -> list[Item]:
    """The examples as items. A conversation asks for its last assistant turn, given all turns before; a preference
    for its better answer, and an answer rated good for itself. One rated bad is not asked for.

    At most `max_items` are taken, by the order of their content hashes, so that the choice depends on
    nothing else. The likelihood's part is cut to `max_length` tokens (of an encoder-decoder model its input
    and its answer, each), the question never.
    """
    return [
        _item(number, examples[number], tokenizer, loss_on=loss_on, max_length=max_length, kind=kind)
        for number in taken(examples, max_items)
    ]


def taken(examples: Sequence[Example], max_items: int | None) -> list[int]:
    """Numbers of the examples that `items` takes, in their order."""
    return sorted(sorted(range(len(examples)), key=lambda n: (content_hash(examples[n]), n))[:max_items])


def _item(
    number: int,
    example: Example,
    tokenizer: Any,
    *,
    loss_on: LossOn,
    max_length: int | None,
    kind: Kind,
) -> Item:
    # Of a judged answer its own tokens count, whatever else a method trains.
    side = partial(_item, number, tokenizer=tokenizer, loss_on="answers", max_length=max_length, kind=kind)
    match example:
        case Preference():
            (better, _), (worse, _) = sides(example)
            item, rejected = side(better), side(worse)
            if item.prompt and rejected.prompt:
                known = {**item.prompt.checks, "rejected": rejected.prompt.reference}
                item = replace(item, prompt=replace(item.prompt, checks=known))
            return replace(item, rejected=rejected, error=item.error or rejected.error)
        case Rating():
            [(conversation, good)] = sides(example)
            item = replace(side(conversation), good=good)
            asked = [turn.content for turn in example.prompt if turn.role == "user"]
            return item if good else replace(item, prompt=None, text=asked[-1] if asked else "")
    prompt = prompt_of(example)
    form = pairs if kind == "seq2seq" else templates
    text = example.text[:200] if isinstance(example, Text) else ""
    try:
        asked_ids = _asked_ids(prompt, tokenizer, kind) if prompt else ()
        if isinstance(example, Prompt) and not example.reference:
            return Item(number, example.row, example.group, prompt, asked_ids, (), ())
        encoding = form.encode(_answered(example), tokenizer, loss_on=loss_on)
    except Unusable as reason:
        return Item(number, example.row, example.group, prompt, (), (), (), error=str(reason), text=text)
    if kind == "seq2seq":
        encoding, lost = pairs.cut_to(encoding, max_length, tokenizer)
        ids, labels = tuple(encoding.input_ids), tuple(encoding.labels)
        size = _num_bytes(labels, tokenizer)
        return Item(
            number,
            example.row,
            example.group,
            prompt,
            asked_ids,
            ids,
            labels,
            tokens_cut=lost,
            num_bytes=size,
        )
    length = len(encoding.input_ids) if max_length is None else max_length
    return Item(
        number,
        example.row,
        example.group,
        prompt,
        asked_ids,
        tuple(encoding.input_ids[:length]),
        tuple(encoding.labels[:length]),
        tokens_cut=max(0, len(encoding.input_ids) - length),
        text=text,
        num_bytes=_num_bytes(encoding.labels[:length], tokenizer),
    )


def _num_bytes(labels: Sequence[int], tokenizer: Any) -> int:
    ids = [label for label in labels if label != IGNORED]
    return len(tokenizer.decode(ids, skip_special_tokens=True).encode("utf-8", "replace"))


def judged(items: Sequence[Item], *, by_score: bool = False) -> list[str]:
    """The metrics that fit items with answers that were judged, and no others: of a reward model `by_score`."""
    if by_score:
        return ["ranking_accuracy", "ranking_log_loss"] if any(item.rejected for item in items) else []
    kinds = {item.good for item in items}
    return [
        *(["preference_accuracy"] if any(item.rejected for item in items) else []),
        *(["rating_ranking"] if {True, False} <= kinds else []),
    ]


def _asked_ids(prompt: Prompt, tokenizer: Any, kind: Kind) -> tuple[int, ...]:
    if kind == "seq2seq":
        return tuple(pairs.prompt_ids(prompt.messages, tokenizer))
    return tuple(templates.prompt_ids(prompt.messages, tokenizer, tools=prompt.tools))


def _answered(example: Example) -> Example:
    """A prompt as the conversation that its reference makes of it; anything else as it is."""
    if not isinstance(example, Prompt):
        return example
    turns = (*example.messages, Message("assistant", example.reference))
    return Conversation(turns, example.row, group=example.group, tools=example.tools)


def answers(
    model: Model,
    evaluation: Evaluation,
    items: Sequence[Item],
    metrics: Sequence[str],
    *,
    name: str,
    base: str,
    tokenizer: Any,
    device: str,
    dtype: str,
    watch: Callable[[Mapping[str, Any]], None],
    head: Head | None = None,
    folder: Path | None = None,
    checked: Callable[[EngineCheck], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> list[EvalRow]:
    """One model's rows, from its folder or id: loaded here, freed when done.

    With `head` a causal model gets that head first, as at the start of its training. In `folder` answers are kept as
    they come, for a measurement that is killed. `checked` gets what the engine check found, `warn` what an engine
    did otherwise than it was asked.
    """
    if not items:
        return []
    from tunesmith import models

    runs_code = any(METRICS[name].runs_code for name in metrics)
    if runs_code and evaluation.run_code and (lacking := sandbox.missing()):
        watch({"kind": "warning", "message": lacking})

    def load(place: str = device) -> Any:
        return models.load_model(
            base, revision=revision, dtype=dtype, device=place, attention=model.attention, head=head
        )

    revision = model.revision if base == model.base else None
    source = engines.Source(
        name, tokenizer, load, base, revision, dtype=dtype, device=device, server=evaluation.server,
        shards=evaluation.shards,
    )  # fmt: skip
    return evaluate(
        source,
        tokenizer,
        items,
        name=name,
        metrics=metrics,
        max_new_tokens=evaluation.max_new_tokens,
        batch_tokens=evaluation.batch_tokens,
        run_code=evaluation.run_code,
        attempts=evaluation.attempts,
        temperature=drawn_at(evaluation),
        seed=evaluation.seed,
        progress=counting(watch),
        engine=evaluation.engine,
        folder=folder,
        engine_check=evaluation.engine_check,
        checked=checked,
        warn=warn or warning(watch),
    )


def drawn_at(evaluation: Evaluation) -> float:
    """The temperature of the answers: 0, which is greedy, unless several are asked for."""
    return evaluation.attempts_temperature if evaluation.attempts > 1 else 0.0


def identity(model: Model, base: str, *, device: str, dtype: str) -> str | None:
    """Changes with the files of the model that `answers` would load and with how it computes."""
    revision = model.revision if base == model.base else None
    return engines.Source("", None, lambda: None, base, revision, dtype=dtype, device=device).identity()


def evaluate(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    name: str,
    metrics: Sequence[str],
    max_new_tokens: int = 256,
    batch_tokens: int = 8192,
    seed: int = 0,
    run_code: bool = False,
    attempts: int = 1,
    temperature: float = 0.0,
    progress: Callable[[str, int, int], None] | None = None,
    engine: str = "padded",
    folder: Path | None = None,
    engine_check: int = 0,
    checked: Callable[[EngineCheck], None] | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> list[EvalRow]:
    """One row per item and attempt, with the model's answer, its scores and, in the first, the reference's
    likelihood. Answers are greedy unless a temperature is given.

    `model` is one in this process, or an `engines.Source`. Nothing is generated where no metric scores answers.
    Raises RecipeError for an unknown metric, for one that fits none of the items, and for one that runs the model's
    code unless `run_code` is set. `progress` is told the stage, how many are done, and of how many. `engine_check`
    answers are read again alone, and `checked` told what that gave; where they are drawn, as many of the questions are
    answered greedily once more for it.
    """
    check_runnable(metrics, run_code=run_code, attempts=attempts)
    further = [name for metric in known_metrics(metrics) for name in METRICS[metric].needs]
    metrics = known_metrics([*metrics, *further])
    usable = [item for item in items if not item.error]
    check_fit(metrics, usable)
    source = model if isinstance(model, engines.Source) else engines.Source(name, tokenizer, lambda: model)
    writes = [item for item in usable if item.prompt] if _of_kind(metrics, "answer") else []
    needed = any(_of_kind(metrics, kind) for kind in ("likelihood", "preference", "reward", "labels"))
    in_process = engines.chosen(engine, source.device) in engines.IN_PROCESS
    if in_process or not writes:
        check_scoring(metrics, gives_scores=is_reward(source.model))
    settings: dict[str, Any] = {}
    answered: dict[int, list[Generated]] = {}
    if writes:
        asked = engines.Asked(
            [item.prompt_ids for item in writes for _ in range(attempts)],
            max_new_tokens,
            end_of_turn_ids(tokenizer),
            temperature=temperature,
            seed=seed,
            batch_tokens=batch_tokens,
        )
        generated, settings = engines.answers(
            source,
            asked,
            engine=engine,
            folder=folder,
            progress=_stage(progress, f"{name}: answers", len(asked.prompts)),
            say=warn,
        )
        if identity := source.identity():
            settings["model"] = identity
        if needed:
            check_scoring(metrics, gives_scores=is_reward(source.model))
        if checked and engine_check:
            numbers = [item.number for item in writes]
            given, answers_to_check = asked, generated
            if temperature:  # drawn answers cannot be read again: the same questions, greedily
                places = chosen([item.prompt_ids for item in writes], engine_check)
                numbers = [numbers[n] for n in places]
                given = replace(asked, prompts=[writes[n].prompt_ids for n in places], temperature=0.0)
                answers_to_check, _ = engines.answers(source, given, engine=settings["engine"], say=warn)
            check = check_engine(source, given, answers_to_check, settings["engine"], numbers, engine_check)
            checked(replace(check, anew=bool(temperature)))
        parts = [generated[at : at + attempts] for at in range(0, len(generated), attempts)]
        answered = dict(zip([item.number for item in writes], parts, strict=True))
    model = source.model if needed else None
    likelihoods: dict[int, _Likelihood] = {}
    rejected: dict[int, _Likelihood] = {}
    worse = [item.rejected for item in usable if item.rejected] if "preference_accuracy" in metrics else []
    if _of_kind(metrics, "likelihood") or _of_kind(metrics, "preference"):
        told = _stage(progress, f"{name}: likelihood", len(usable))
        likelihoods = _likelihoods(model, usable, batch_tokens=batch_tokens, progress=told)
    if worse:
        told = _stage(progress, f"{name}: likelihood of rejected answers", len(worse))
        rejected = _likelihoods(model, worse, batch_tokens=batch_tokens, progress=told)
    if _of_kind(metrics, "reward"):
        told = _stage(progress, f"{name}: scores", 2 * len(usable))
        return _scored(model, tokenizer, items, name, metrics, batch_tokens=batch_tokens, progress=told)
    with running_allowed(run_code):
        rows = [
            _row(
                item,
                name,
                metrics,
                answer,
                likelihoods.get(item.number) if not sample else None,
                rejected.get(item.number) if not sample else None,
                settings,
                sample=sample,
            )
            for item in items
            for sample, answer in enumerate(answered.get(item.number) or [None])
        ]
    if "rating_ranking" in metrics:
        rows = _ranked(rows, items, likelihoods)
    if _of_kind(metrics, "labels"):
        told = _stage(progress, f"{name}: likelihood of each label", len(usable))
        rows = _labelled(rows, model, tokenizer, usable, batch_tokens=batch_tokens, progress=told)
    return _compared_among(rows, metrics)


def rows_of(
    items: Sequence[Item],
    answers: Sequence[Generated],
    *,
    name: str,
    metrics: Sequence[str],
    settings: Mapping[str, Any],
) -> list[EvalRow]:
    """Rows of answers that are there already, scored by the metrics that score answers and run nothing."""
    return [
        _row(item, name, metrics, answer, None, None, dict(settings))
        for item, answer in zip(items, answers, strict=True)
    ]


def scores(
    rows: Sequence[EvalRow], metrics: Sequence[str], *, confidence: float = 0.95, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """By metric: value, n, n_errors, low, high, groups and the interval's method, all from the rows.

    Where no row could be scored, value, low and high are None.
    """
    return {
        name: asdict(score_interval(rows, name, confidence=confidence, seed=seed))
        for name in known_metrics(metrics)
    }


def check_engine(
    source: engines.Source,
    asked: engines.Asked,
    generated: Sequence[Generated],
    engine: str,
    items: Sequence[int],
    count: int,
) -> EngineCheck:
    """A few greedy answers, chosen by the hash of their prompts, read again alone; `items` has their numbers."""
    places = chosen(asked.prompts, count)
    prompts, answers = [asked.prompts[n] for n in places], [generated[n] for n in places]
    numbers = [items[n] for n in places]
    if source.is_loaded or engine != "openai":
        found = read_alone(
            source.model,
            source.tokenizer,
            prompts,
            answers,
            stop_ids=asked.stop_ids,
            max_new_tokens=asked.max_new_tokens,
            numbers=numbers,
            limit=NEAR_TIE
            if engine == "openai"
            else None,  # in what precision a server computes is not known
        )
    else:

        def again(prompt: Sequence[int]) -> Generated:
            [answer], _ = engines.answers(source, replace(asked, prompts=[prompt]), engine=engine)
            return answer

        found = asked_again(prompts, answers, again, numbers)
    return EngineCheck(source.name, engine, tuple(found))


def value(rows: Sequence[EvalRow], metric: str) -> float | None:
    """One metric's value over the rows, without an interval; None where no row could be scored."""
    return score_interval(rows, metric, resamples=2).value


def are_answers_to(
    rows: Sequence[EvalRow],
    items: Sequence[Item],
    metrics: Sequence[str],
    *,
    max_new_tokens: int,
    attempts: int = 1,
    engine: str = "auto",
    temperature: float = 0.0,
    seed: int = 0,
    model: str | None = None,
) -> bool:
    """Whether rows answer just these items under these settings, so that they need not be made again.

    `temperature` is that of several attempts, which `seed` draws; `model` is the identity of the model's files
    (`engines.Source.identity`), where it is known.
    """
    measured = {name for row in rows for name in row.scores}
    limits = {row.generation["max_new_tokens"] for row in rows if row.generation}
    made_by = {row.generation.get("engine", "padded") for row in rows if row.generation}
    drawn = {
        (row.generation.get("temperature", 0.0), row.generation.get("seed", 0) if temperature else 0)
        for row in rows
        if row.generation
    }
    if drawn and drawn != {(temperature, seed if temperature else 0)}:
        return False
    if model and any(row.generation.get("model") != model for row in rows if row.generation):
        return False
    if engine != "auto" and not made_by <= {engine}:
        return False
    return (
        bool(rows)
        and {row.item: row.prompt_sha256 for row in rows}
        == {item.number: _asked_sha256(item) for item in items}
        and set(metrics) <= measured
        and limits <= {max_new_tokens}
        and ({row.sample for row in rows} == set(range(attempts)) or not limits)
    )


def longer_than_read(items: Sequence[Item], limit: int | None) -> str | None:
    """How many questions are longer than the inputs that an encoder-decoder model was trained to read (`limit`
    tokens), in a sentence; None where none is."""
    asked = [item for item in items if item.prompt_ids]
    longer = sum(limit is not None and len(item.prompt_ids) > limit for item in asked)
    if not longer:
        return None
    return (
        f"{longer} of {len(asked)} questions are longer than the {limit} tokens of an input that the model was trained "
        "to read; they are asked whole."
    )


def _asked_sha256(item: Item) -> str:
    """Hash of what the model is given: the prompt's ids, or those of running text."""
    asked = item.prompt_ids if item.prompt else item.input_ids
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _of_kind(metrics: Sequence[str], kind: str) -> list[str]:
    return [name for name in metrics if METRICS[name].kind == kind]


def _stage(
    progress: Callable[[str, int, int], None] | None, stage: str, total: int
) -> Callable[[int], None] | None:
    return (lambda done: progress(stage, done, total)) if progress else None


def check_fit(metrics: Sequence[str], items: Sequence[Item]) -> None:
    """Raises RecipeError for a metric that fits none of the items."""
    prompts = [item.prompt for item in items if item.prompt]
    for name in _of_kind(metrics, "answer"):
        if items and not any(METRICS[name].fits(prompt) for prompt in prompts):
            raise RecipeError(
                f"The metric '{name}' fits none of the {len(items)} held-out examples.",
                found="running text, which has no answers" if not prompts else None,
                fix="Leave evaluation.metrics open to take those that fit. " + METRICS[name].about,
            )
    for metric in (METRICS[name] for name in metrics):
        if items and metric.fits_all and not metric.fits_all(prompts):
            raise RecipeError(
                f"The metric '{metric.name}' needs few labels that occur often as references.",
                found=f"{len(classification.labels_of([p.reference for p in prompts]))} different references of "
                f"{len(prompts)} questions",
                fix=f"Use exact_match, or rows with 2 to {classification.MAX_LABELS} labels of at most "
                f"{classification.MAX_WORDS} words, {classification.PER_LABEL} questions for each.",
            )
    fitting = [*judged(items), *judged(items, by_score=True)]
    for name in [*_of_kind(metrics, "preference"), *_of_kind(metrics, "reward")]:
        if items and name not in fitting:
            raise RecipeError(
                f"The metric '{name}' fits none of the {len(items)} held-out examples.",
                fix="Leave evaluation.metrics open to take those that fit, or give --dataset with "
                + ("answers rated good and bad." if name == "rating_ranking" else "pairs of answers."),
            )


def check_scoring(metrics: Sequence[str], *, gives_scores: bool) -> None:
    """Raises RecipeError for metrics that need a reward model where there is none, and for others where one is."""
    for name in metrics:
        if gives_scores and METRICS[name].kind != "reward":
            raise RecipeError(
                f"The metric '{name}' does not fit a reward model, which gives scores and writes nothing.",
                fix="Use ranking_accuracy and ranking_log_loss, on pairs of answers.",
            )
        if not gives_scores and METRICS[name].kind == "reward":
            raise RecipeError(
                f"The metric '{name}' needs a reward model, and this one writes answers.",
                fix="Use preference_accuracy, or a model trained with --set method.kind=reward.",
            )


def _row(
    item: Item,
    name: str,
    metrics: Sequence[str],
    answer: Generated | None,
    likelihood: _Likelihood | None,
    rejected: _Likelihood | None,
    settings: dict[str, Any],
    *,
    sample: int = 0,
) -> EvalRow:
    values: dict[str, float] = {}
    flags: dict[str, list[str]] = {}
    problems = [item.error] if item.error else []
    if answer and item.prompt:
        for metric in (METRICS[m] for m in metrics):
            if metric.score is None or not metric.fits(item.prompt):
                continue
            try:
                values[metric.name] = metric.score(item.prompt, answer.text, item.prompt.reference)
                if metric.flags and (found := metric.flags(item.prompt, answer.text, item.prompt.reference)):
                    flags[metric.name] = list(found)
            except Exception as error:  # one broken reference must not end an evaluation; it is counted
                problems.append(f"{metric.name}: {error}")
    if any(found and not math.isfinite(found.nll) for found in (likelihood, rejected)):
        problems.append("the likelihood is not a number")
        likelihood = rejected = None
    if likelihood and rejected and likelihood.tokens and rejected.tokens:
        values["preference_accuracy"] = _won(likelihood, rejected)
    if item.good is False:
        likelihood = None  # what the model makes of a bad answer is no merit of its own
    if likelihood and likelihood.tokens:
        mean = likelihood.nll / likelihood.tokens
        own = {
            "perplexity": math.exp(min(mean, 700)),
            "token_accuracy": likelihood.correct / likelihood.tokens,
        }
        if item.num_bytes and not likelihood.cut:
            own["bits_per_byte"] = likelihood.nll / math.log(2) / item.num_bytes
        values |= {m: own[m] for m in _of_kind(metrics, "likelihood") if m in own}
    user = [m.content for m in item.prompt.messages if m.role == "user"] if item.prompt else []
    return EvalRow(
        model=name,
        item=item.number,
        source_row=str(item.row),
        group=item.group,
        turn=0,
        sample=sample,
        prompt_sha256=_asked_sha256(item),
        prompt_text=user[-1] if user else item.text,
        reference=item.prompt.reference if item.prompt else "",
        output=answer.text if answer else None,
        finish_reason=answer.finish_reason if answer else None,
        generation=settings if answer else {},
        scores=values,
        nll=likelihood.nll if likelihood else None,
        tokens=likelihood.tokens if likelihood else None,
        correct=likelihood.correct if likelihood else None,
        status="error:" + "; ".join(problems) if problems else "ok",
        tokens_cut=item.tokens_cut + (likelihood.cut if likelihood else 0),
        flags=flags,
        good=item.good,
        rejected_nll=rejected.nll if rejected else None,
        rejected_tokens=rejected.tokens if rejected else None,
        num_bytes=item.num_bytes if likelihood and likelihood.tokens and not likelihood.cut else None,
        windows=likelihood.windows if likelihood else 1,
        conversation=_conversation(item.prompt.messages) if item.prompt else [],
    )


def _conversation(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as rows keep them; none where a user's question is all."""
    if [message.role for message in messages] == ["user"]:
        return []
    return [
        {
            "role": message.role,
            "content": "\n".join(
                [*([message.content] if message.content else []), *map(json.dumps, message.tool_calls)]
            ),
        }
        for message in messages
    ]


def _scored(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    name: str,
    metrics: Sequence[str],
    *,
    batch_tokens: int,
    progress: Callable[[int], None] | None,
) -> list[EvalRow]:
    """The rows of a reward model: both scores of each pair, and what they come to."""
    pairs = [(item, item.rejected) for item in items if not item.error and item.rejected]
    texts = [side.input_ids for pair in pairs for side in pair]
    values = scoring.scores(model, tokenizer, texts, batch_tokens=batch_tokens, progress=progress)
    given = {
        item.number: found
        for (item, _), found in zip(pairs, zip(values[::2], values[1::2], strict=True), strict=True)
    }
    rows = []
    for item in items:
        row = _row(item, name, metrics, None, None, None, {})
        if item.number in given:
            row = _ranked_by(row, item, metrics, *given[item.number])
        rows.append(row)
    return rows


def _ranked_by(row: EvalRow, item: Item, metrics: Sequence[str], better: float, worse: float) -> EvalRow:
    assert item.rejected
    margin = better - worse
    if not math.isfinite(margin):
        return replace(row, status="error:the score is not a number")
    found = {
        "ranking_accuracy": 0.5 if margin == 0 else float(margin > 0),
        # log(1 + exp(-margin)), without what would overflow
        "ranking_log_loss": max(-margin, 0.0) + math.log1p(math.exp(-abs(margin))),
    }
    tokens, rejected_tokens = (
        sum(label != IGNORED for label in side.labels) for side in (item, item.rejected)
    )
    return replace(
        row,
        scores={name: found[name] for name in metrics},
        tokens=tokens,
        rejected_tokens=rejected_tokens,
        tokens_cut=item.tokens_cut + item.rejected.tokens_cut,
        score=better,
        rejected_score=worse,
        rejected=str(item.prompt.checks.get("rejected", "")) if item.prompt else None,
    )


def _won(better: _Likelihood, worse: _Likelihood) -> float:
    """1 where the better answer is the likelier one per token, a half where both are alike."""
    one, other = better.nll / better.tokens, worse.nll / worse.tokens
    return 0.5 if one == other else float(one < other)


def _ranked(
    rows: list[EvalRow], items: Sequence[Item], likelihoods: Mapping[int, _Likelihood]
) -> list[EvalRow]:
    """The rows, those of good answers with whether each is likelier than the bad answer that it is put beside.

    Each answer is used once, in the order of the items, so that the scores do not depend on one another.
    """
    good, bad = ([item.number for item in items if item.good is mark] for mark in (True, False))
    beside = dict(zip(good, bad, strict=False))
    found = []
    for row in rows:
        own, other = likelihoods.get(row.item), likelihoods.get(beside.get(row.item, -1))
        if (
            not row.sample
            and own
            and other
            and own.tokens
            and other.tokens
            and math.isfinite(own.nll + other.nll)
        ):
            row = replace(row, scores={**row.scores, "rating_ranking": _won(own, other)})
        found.append(row)
    return found


def _labelled(
    rows: list[EvalRow],
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    batch_tokens: int,
    progress: Callable[[int], None] | None,
) -> list[EvalRow]:
    """The first row of each item with the probability of every label of the set, as the whole answer."""
    asked = [item for item in items if item.prompt]
    labels = classification.labels_of([item.prompt.reference for item in asked if item.prompt])
    kind: Kind = "seq2seq" if is_seq2seq(model) else "causal"
    found = {}
    for done, item in enumerate(asked, 1):
        assert item.prompt
        turns = [(*item.prompt.messages, Message("assistant", spelling)) for spelling in labels.values()]
        sides = [
            _item(
                number,
                Conversation(said, item.row, tools=item.prompt.tools),
                tokenizer,
                loss_on="answers",
                max_length=None,
                kind=kind,
            )
            for number, said in enumerate(turns)
        ]
        if any(side.error for side in sides):
            continue
        measured = _likelihoods(model, sides, batch_tokens=batch_tokens, progress=None)
        logs = [-measured[number].nll for number in range(len(sides))]
        if all(map(math.isfinite, logs)):
            weights = [math.exp(value - max(logs)) for value in logs]
            found[item.number] = dict(zip(labels, (w / math.fsum(weights) for w in weights), strict=True))
        if progress:
            progress(done)
    return [replace(row, label_probs=found.get(row.item, {})) if not row.sample else row for row in rows]


def _compared_among(rows: list[EvalRow], metrics: Sequence[str]) -> list[EvalRow]:
    """The rows with the scores of metrics that look at all of a model's answers at once."""
    for metric in (METRICS[name] for name in metrics):
        if metric.among:
            wanted = "label_probs" if metric.kind == "labels" else "output"
            places = [place for place, row in enumerate(rows) if getattr(row, wanted) not in (None, {})]
            values = metric.among([rows[place] for place in places])
            for place, value in zip(places, values, strict=True):
                if value is None:
                    continue
                rows[place] = replace(rows[place], scores={**rows[place].scores, metric.name: value})
    return rows


def _likelihoods(
    model: Any, items: Sequence[Item], *, batch_tokens: int, progress: Callable[[int], None] | None
) -> dict[int, _Likelihood]:
    """Teacher-forced likelihood of every item's labels, by item number.

    What is longer than the model's context is read in windows that overlap by half: each label is counted once,
    with at least half a context before it (as far as the text has one).
    """
    # An encoder-decoder model has its limit, if any, in each half; `_pair_likelihood` keeps to it.
    limit = None if is_seq2seq(model) else context_length(model)
    likelihood = _pair_likelihood if is_seq2seq(model) else _batch_likelihood
    pieces = [(item.number, piece) for item in items for piece in _windows(item, limit)]
    by_number = {place: piece for place, (_, piece) in enumerate(pieces)}
    vocabulary = model.config.get_text_config().vocab_size
    lengths = {place: len(piece.input_ids) for place, piece in by_number.items() if len(piece.input_ids) > 1}
    found = {place: _Likelihood(0.0, 0, 0, 0) for place in by_number if place not in lengths}
    last = {number: place for place, (number, _) in enumerate(pieces)}
    num_windows = Counter(number for number, _ in pieces)
    whole = {number: _Likelihood(0.0, 0, 0, 0, windows=num_windows[number]) for number in last}
    with for_inference(model):
        for batch in length_batches(lengths, tokens=tokens_together(batch_tokens, vocabulary)):
            for part, results in halving(
                lambda numbers: likelihood(
                    model, [by_number[n] for n in numbers], [lengths[n] for n in numbers]
                ),
                batch,
            ):
                found |= dict(zip(part, results, strict=True))
                if progress:
                    progress(sum(place in found for place in last.values()))
    for place, (number, _) in enumerate(pieces):
        so_far, more = whole[number], found[place]
        whole[number] = replace(
            so_far,
            nll=so_far.nll + more.nll,
            tokens=so_far.tokens + more.tokens,
            correct=so_far.correct + more.correct,
            cut=so_far.cut + more.cut,
        )
    return whole


def _windows(item: Item, limit: int | None) -> list[Item]:
    """The item in windows of at most `limit` tokens, each with the labels that no window before it has."""
    if limit is None or len(item.input_ids) <= limit:
        return [item]
    found, done = [], 0
    while done < len(item.input_ids):
        end = min(len(item.input_ids), done + (limit if not done else max(1, limit // 2)))
        start = max(0, end - limit)
        ignored = (IGNORED,) * (done - start)
        found.append(
            replace(item, input_ids=item.input_ids[start:end], labels=ignored + item.labels[done:end])
        )
        done = end
    return found


def _batch_likelihood(model: Any, items: Sequence[Item], lengths: Sequence[int]) -> list[_Likelihood]:
    """Right-padded forward pass; the token at position t is predicted by the logits at t - 1.

    Logits are asked for at positions before a label only, where the model lets us ask.
    """
    import torch

    ids = torch.zeros(len(items), max(lengths), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for line, (item, length) in enumerate(zip(items, lengths, strict=True)):
        ids[line, :length] = torch.tensor(item.input_ids[:length])
        labels[line, :length] = torch.tensor(item.labels[:length])
        mask[line, :length] = 1
    targets = labels[:, 1:]
    kept = (targets != IGNORED).any(0).nonzero()[:, 0]
    if not len(kept):
        return [_result(item, length, 0.0, 0, 0) for item, length in zip(items, lengths, strict=True)]
    device = model.device
    options = {"logits_to_keep": kept.to(device)} if _can_select(model) else {}
    logits = model(
        input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **options
    ).logits
    if not options:
        logits = logits[:, kept.to(logits.device)]
    targets = targets[:, kept].to(logits.device)
    lines, columns = (targets != IGNORED).nonzero(as_tuple=True)
    wanted = targets[lines, columns]
    nll, correct = (
        torch.zeros(len(items), dtype=torch.float64),
        torch.zeros(len(items), dtype=torch.long),
    )
    few = copied_together(logits.shape[-1])
    for at in range(0, len(wanted), few):
        piece = slice(at, at + few)
        values = logits[lines[piece], columns[piece]].float()
        losses = torch.nn.functional.cross_entropy(values, wanted[piece], reduction="none")
        right = (values.argmax(-1) == wanted[piece]).long()
        nll.index_add_(0, lines[piece].cpu(), losses.cpu().double())
        correct.index_add_(0, lines[piece].cpu(), right.cpu())
    counts = (targets != IGNORED).sum(1).tolist()
    return [
        _result(item, length, float(nll[line]), counts[line], int(correct[line]))
        for line, (item, length) in enumerate(zip(items, lengths, strict=True))
    ]


def _pair_likelihood(model: Any, items: Sequence[Item], lengths: Sequence[int]) -> list[_Likelihood]:
    """Forward pass of an encoder-decoder model; the label at a position is predicted by the logits there."""
    import torch

    limit = context_length(model)
    parts = [pairs.parted(item.input_ids, item.labels) for item in items]
    kept = [(source[:limit], target[:limit]) for source, target in parts]
    ids = torch.zeros(len(items), max(len(source) for source, _ in kept), dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full((len(items), max(len(target) for _, target in kept)), IGNORED)
    for line, (source, target) in enumerate(kept):
        ids[line, : len(source)] = torch.tensor(source)
        mask[line, : len(source)] = 1
        labels[line, : len(target)] = torch.tensor(target)
    labels = labels.to(model.device)
    logits = model(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels=labels),
        use_cache=False,
    ).logits
    found = []
    for line, (item, (source, target)) in enumerate(zip(items, kept, strict=True)):
        values, wanted = logits[line, : len(target)].float(), labels[line, : len(target)]
        nll = torch.nn.functional.cross_entropy(values, wanted, reduction="none").double().sum()
        right = int((values.argmax(-1) == wanted).sum())
        used = len(source) + len(target)
        found.append(_Likelihood(float(nll), len(target), right, len(item.input_ids) - used))
    return found


def _result(item: Item, length: int, nll: float, tokens: int, correct: int) -> _Likelihood:
    return _Likelihood(nll, tokens, correct, len(item.input_ids) - length)


def _can_select(model: Any) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
