"""Rewards: what an answer is worth, as numbers to learn from.

A reward is a metric of evaluation, a Python function, a reward model or a judge behind an endpoint; several are
added up by their weights. What raises or is not a number stops the run and names the reward and the row: a score
that is made up in its place would be learned from.
"""

from __future__ import annotations

import importlib
import inspect
import math
import numbers
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tunesmith.data import examples
from tunesmith.data.examples import Conversation, Prompt, Unusable
from tunesmith.errors import ModelError, RecipeError, RunError, TunesmithError, counted, nearest
from tunesmith.evaluation.judging import prompts, verdicts
from tunesmith.evaluation.judging.book import key
from tunesmith.evaluation.judging.client import Endpoint
from tunesmith.evaluation.judging.prompts import Message
from tunesmith.http import Refused, pause
from tunesmith.recipe import JudgeReward, MetricReward, ModelReward, PythonReward, RewardSection
from tunesmith.training.run import SAMPLE_TEXT, Run

if TYPE_CHECKING:
    from tunesmith.data.cache import Encodings
    from tunesmith.scoring import RewardModel

Score = Callable[[Sequence[Prompt], Sequence[str]], list[float]]
SHOWN = 200
"""Characters of an answer or a reply that an error shows."""


@dataclass(frozen=True)
class Reward:
    """One reward: its name in the log, its weight in the sum, and the function that scores answers."""

    name: str
    weight: float
    score: Score
    """Scores of answers, given their prompts. Raises RunError naming the row where one cannot be scored."""
    about: str
    """What it is, in a sentence."""
    facts: Callable[[], dict[str, float]] = dict
    """What it has cost so far, by name (calls, tokens); empty for what is computed here."""
    calls: bool = False
    """Whether every answer is sent to an endpoint."""


@dataclass(frozen=True)
class Scored:
    """What answers are worth."""

    totals: list[float]
    """Weighted sums."""
    columns: dict[str, list[float]]
    """Each reward's own scores, before the weights, by name."""


def check(sections: Sequence[RewardSection]) -> None:
    """Whether the rewards that a recipe names are there, before anything is read: metrics, functions, models, keys."""
    from tunesmith import models

    for section in sections:
        match section:
            case MetricReward():
                _metric(section, ())
            case PythonReward():
                _function(section.function)
            case ModelReward():
                if models.kind(section.model) != "reward":
                    raise ModelError(
                        f"'{section.model}' is no reward model: it writes answers and gives them no score.",
                        fix="Train one with --method reward, or name one with a score of one number "
                        "(AutoModelForSequenceClassification, num_labels 1).",
                    )
            case JudgeReward():
                Judge(section)


def samples(
    asked: Sequence[Prompt], texts: Sequence[str], scored: Scored, *, among: Sequence[int] | None = None
) -> Iterator[dict[str, Any]]:
    """The best and the worst of answers (of those `among` them), with what they were worth, for people to read."""
    ranked = sorted(range(len(texts)) if among is None else among, key=lambda n: scored.totals[n])
    for n in dict.fromkeys((ranked[-1], ranked[0])):
        yield {
            "row": str(asked[n].row),
            "prompt": asked[n].messages[-1].content[:SAMPLE_TEXT],
            "completion": texts[n][:SAMPLE_TEXT],
            "reward": scored.totals[n],
            "rewards": {name: column[n] for name, column in scored.columns.items()},
        }


def without_spread(totals: Sequence[float], groups: Sequence[object]) -> float:
    """Share of groups of two and more whose answers are all worth just the same; neighbours of one group stand
    together. Of a group of one nothing can be said, and without any other it is 0."""
    bounds = [0, *(n + 1 for n, (a, b) in enumerate(pairwise(groups)) if a != b), len(totals)]
    parts = [totals[begin:end] for begin, end in pairwise(bounds) if end - begin > 1]
    return fmean(max(part) == min(part) for part in parts) if parts else 0.0


def correlation(one: Sequence[float], other: Sequence[float], groups: Sequence[object]) -> float | None:
    """Pearson's correlation of two columns, each less its group's mean; None where either has no spread.

    Neighbours of one group stand together.
    """
    bounds = [0, *(n + 1 for n, (a, b) in enumerate(pairwise(groups)) if a != b), len(one)]
    centred: list[list[float]] = [[], []]
    for begin, end in pairwise(bounds):
        for column, values in zip(centred, (one, other), strict=True):
            mean = fmean(values[begin:end])
            column += [value - mean for value in values[begin:end]]
    spreads = [math.fsum(value * value for value in column) for column in centred]
    if min(spreads) <= 1e-12:
        return None
    return math.fsum(a * b for a, b in zip(*centred, strict=True)) / math.sqrt(spreads[0] * spreads[1])


def check_fit(sections: Sequence[RewardSection], prompts: Sequence[Prompt]) -> None:
    """Raises RecipeError for metrics that cannot score some of the prompts, and where none is named and none fits."""
    for section in list(sections) or [_primary(prompts)]:
        if isinstance(section, MetricReward):
            _metric(section, prompts)


def resolve(
    sections: Sequence[RewardSection],
    *,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    device: str = "cpu",
    dtype: str = "float32",
) -> list[Reward]:
    """The rewards that a recipe names, each tried for whether it can score these prompts; none named means the
    metric that would be the primary one of these prompts.

    `tokenizer` is the policy's, whose chat template a reward model without one reads. Raises RecipeError and
    ModelError for what cannot be a reward.
    """
    chosen = list(sections) or [_primary(prompts)]
    made = [_made(section, prompts, tokenizer, device, dtype) for section in chosen]
    names: dict[str, int] = {}
    for place, reward in enumerate(made):
        names[reward.name] = names.get(reward.name, 0) + 1
        if names[reward.name] > 1:
            made[place] = Reward(**{**vars(reward), "name": f"{reward.name}_{names[reward.name]}"})
    return made


def settled(
    sections: Sequence[RewardSection],
    *,
    train: Encodings,
    validation: Encodings,
    tokenizer: Any,
    device: str,
    answers: int,
    validations: int,
    run: Run,
) -> list[Reward]:
    """The rewards of a run, each said in it with what it will cost: `answers` of the training are scored, and those
    to all validation prompts `validations` times."""
    made = resolve(
        sections,
        prompts=[*train.examples, *(validation.examples if validation else ())],
        tokenizer=tokenizer,
        device=device,
        dtype="bfloat16" if device == "cuda" else "float32",
    )
    for decision in said(made, answers=answers + validations * len(validation)):
        run.event("decision", name=decision["name"], value=decision["value"], reason=decision["reason"])
    return made


def validations(steps: int, every: int | None) -> int:
    """How often is validated in so many steps; the last one always is."""
    return math.ceil(steps / every) if every else 0


def total(rewards: Sequence[Reward], prompts: Sequence[Prompt], completions: Sequence[str]) -> Scored:
    """Scores of answers, given the prompt of each.

    Raises RunError naming reward and row where a reward fails or gives anything but a finite number.
    """
    columns = {}
    for reward in rewards:
        try:
            found = list(reward.score(prompts, completions))
        except TunesmithError:
            raise
        except Exception as error:
            raise _failed(reward.name, prompts[0], "", error, of_many=len(prompts)) from error
        if len(found) != len(completions):
            raise RunError(
                f"The reward '{reward.name}' gave {len(found)} scores for {len(completions)} answers."
            )
        for prompt, completion, value in zip(prompts, completions, found, strict=True):
            if not _is_score(value):
                raise RunError(
                    f"The reward '{reward.name}' gave {value!r} for row {prompt.row}.",
                    found=f"the answer {_shown(completion)}",
                    fix="A reward has to be a finite number for every answer, an empty one included. A run that has "
                    "written a checkpoint goes on from it: tunesmith resume.",
                )
        columns[reward.name] = [float(value) for value in found]
    totals = [
        math.fsum(reward.weight * columns[reward.name][n] for reward in rewards)
        for n in range(len(completions))
    ]
    return Scored(totals, columns)


def _is_score(value: Any) -> bool:
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")


def _failed(name: str, prompt: Prompt, completion: str, error: Exception, *, of_many: int = 1) -> RunError:
    said = f"{type(error).__name__}: {error}".splitlines()[0][:SHOWN]
    where = (
        f"row {prompt.row}" if of_many == 1 else f"a batch of {of_many} rows, of which {prompt.row} is first"
    )
    answer = f"; the answer {_shown(completion)}" if of_many == 1 else ""
    return RunError(
        f"The reward '{name}' failed on {where}.",
        found=said + answer,
        fix="Mend the reward or the row. A run that has written a checkpoint goes on from it: tunesmith resume.",
    )


def _made(
    section: RewardSection, prompts: Sequence[Prompt], tokenizer: Any, device: str, dtype: str
) -> Reward:
    match section:
        case MetricReward():
            return _metric(section, prompts)
        case PythonReward():
            return _python(section)
        case ModelReward():
            return _model(section, tokenizer, device, dtype)
        case JudgeReward():
            return _judge(section)


def _each(name: str, one: Callable[[Prompt, str], Any]) -> Score:
    """Scores answers one by one, so that an error names its row."""

    def score(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        found = []
        for prompt, completion in zip(prompts, completions, strict=True):
            try:
                found.append(one(prompt, completion))
            except Exception as error:
                raise _failed(name, prompt, completion, error) from error
        return found

    return score


# A metric


def _primary(prompts: Sequence[Prompt]) -> MetricReward:
    from tunesmith.evaluation.metrics import METRICS, default_metrics

    usual = default_metrics(prompts, has_text=False)
    name = next((name for name in usual if METRICS[name].score), None)
    if name is None or any(not _fits(name, prompt) for prompt in prompts):
        raise RecipeError(
            "What answers are worth is not said, and no metric can tell for all of these prompts.",
            fix="Name rewards: --set method.rewards=METRIC, or a function as module:function (docs/rewards.md).",
        )
    return MetricReward(name=name)


def _fits(name: str, prompt: Prompt) -> bool:
    from tunesmith.evaluation.metrics import METRICS

    return METRICS[name].fits(prompt)


def _metric(section: MetricReward, prompts: Sequence[Prompt]) -> Reward:
    from tunesmith.evaluation.metrics import METRICS

    scorable = {name: metric for name, metric in METRICS.items() if metric.score and not metric.runs_code}
    if section.name not in METRICS:
        raise RecipeError(f"There is no metric '{section.name}'.", fix=nearest(section.name, scorable))
    metric = METRICS[section.name]
    score = metric.score
    if score is None:
        raise RecipeError(
            f"The metric '{section.name}' cannot be a reward: it does not score one answer by itself.",
            fix=f"Those that do: {', '.join(scorable)}.",
        )
    if metric.runs_code:
        raise RecipeError(
            f"The metric '{section.name}' cannot be a reward: it runs the code that the model writes, which only "
            "evaluation does.",
            fix=f"Those that can be: {', '.join(scorable)}.",
        )
    unfit = [prompt.row for prompt in prompts if not metric.fits(prompt)]
    if unfit:
        raise RecipeError(
            f"The reward '{section.name}' cannot score {len(unfit)} of {counted(len(prompts), 'prompt')}.",
            found=", ".join(map(str, unfit[:10])) + (f" and {len(unfit) - 10} more" if unfit[10:] else ""),
            fix="Leave these rows out, or choose another reward. " + metric.about,
        )
    sign = 1.0 if metric.higher_is_better else -1.0
    about = f"the metric '{metric.label}'" + ("" if sign > 0 else ", which counts against an answer")
    return Reward(
        section.name,
        section.weight,
        _each(section.name, lambda prompt, answer: sign * score(prompt, answer, prompt.reference)),
        about,
    )


# A function


def _python(section: PythonReward) -> Reward:
    function = _function(section.function)
    return Reward(
        section.function.rpartition(":")[2],
        section.weight,
        _each(section.function, lambda prompt, answer: function(prompt, answer, prompt.reference)),
        f"the Python function {section.function}",
    )


def _function(path: str) -> Callable[[Prompt, str, str], Any]:
    """The function of `module:function`. Raises RecipeError where there is none of that signature."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise RecipeError(f"'{path}' names no function.", fix="Write it as module:function.")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0] and error.name != module:
            raise RecipeError(f"The module {module} cannot be imported.", found=str(error)) from error
        raise RecipeError(
            f"There is no module {module} for the reward '{path}'.",
            found=f"nothing of that name in {here} or among the installed packages",
            fix="Run the command in the folder of the module.",
        ) from None
    except Exception as error:
        raise RecipeError(
            f"The module {module} cannot be imported.", found=f"{type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)  # for what the function imports when it is called
    for part in name.split("."):
        if not hasattr(found, part):
            public = [n for n in vars(found) if not n.startswith("_")] if hasattr(found, "__dict__") else []
            raise RecipeError(f"{module} has no function '{name}'.", fix=nearest(name, public))
        found = getattr(found, part)
    if not callable(found) or inspect.iscoroutinefunction(found):
        raise RecipeError(f"{path} is not a function that can be called as a reward.")
    try:
        inspect.signature(found).bind(None, "", "")
    except TypeError as error:
        raise RecipeError(
            f"The reward {path} cannot be called with prompt, completion and reference.",
            found=str(error),
            fix="Define it as (prompt, completion, reference) -> float.",
        ) from None
    except ValueError:
        pass  # written in C: its signature is not known
    function: Callable[[Prompt, str, str], Any] = found
    return function


# A reward model


def _model(section: ModelReward, tokenizer: Any, device: str, dtype: str) -> Reward:
    from tunesmith import models, scoring

    scorer = scoring.load(section.model, dtype=dtype, device=device)
    own = scorer.tokenizer
    if not models.load_tokenizer(section.model).chat_template:
        if own.get_vocab() != tokenizer.get_vocab():
            raise ModelError(
                f"The reward model {section.model} has no chat template, and another vocabulary than the model.",
                fix="Save the template that it was trained with in its tokenizer_config.json.",
            )
        own.chat_template = tokenizer.chat_template
    name = os.path.basename(os.path.normpath(section.model))
    if name == "final_model":
        name = os.path.basename(os.path.dirname(os.path.abspath(section.model)))

    def score(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        rows = [
            _read(prompt, completion, own, name)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return _scores(scorer, rows, prompts, name, section.batch_size)

    return Reward(name, section.weight, score, f"the reward model {section.model}")


def _read(prompt: Prompt, completion: str, tokenizer: Any, name: str) -> list[int]:
    """What the reward model reads: prompt and answer as it was trained on them."""
    from tunesmith.data import templates

    turns = (*prompt.messages, examples.Message("assistant", completion))
    try:
        encoding = templates.encode(Conversation(turns, prompt.row, tools=prompt.tools), tokenizer)
    except Unusable as error:
        raise _failed(name, prompt, completion, error) from error
    return list(encoding.input_ids)


def _scores(
    scorer: RewardModel, rows: Sequence[Sequence[int]], prompts: Sequence[Prompt], name: str, size: int
) -> list[float]:
    """The model's score of each row, in batches of rows of like length."""
    from tunesmith import scoring
    from tunesmith.generation import context_length

    limit = context_length(scorer.model)
    longest = max(range(len(rows)), key=lambda n: len(rows[n]), default=None)
    if longest is None:
        return []
    if limit and len(rows[longest]) > limit:
        raise RunError(
            f"The reward model '{name}' cannot read the answer to row {prompts[longest].row}.",
            found=f"{len(rows[longest])} tokens of prompt and answer, above its context of {limit}",
            fix="Lower method.max_new_tokens or data.max_length.",
        )
    return scoring.scores(scorer.model, scorer.tokenizer, rows, batch_tokens=size * len(rows[longest]))


# A judge

KEPT = 100_000
"""Ratings that are remembered, so that an answer that was given before is not paid for again."""


def _judge(section: JudgeReward) -> Reward:
    judge = Judge(section)
    return Reward(
        "judge",
        section.weight,
        judge.score,
        f"ratings by {section.model} at {judge.host}, 1 to 10 brought to 0 to 1",
        facts=judge.facts,
        calls=True,
    )


@dataclass
class Judge:
    """Rates answers by calls to an OpenAI-compatible endpoint, and counts what that costs."""

    section: JudgeReward
    calls: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    backoff: float = 0.5
    """Seconds before the first repetition; each further one waits twice as long."""
    _known: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        section = self.section
        self._endpoint = Endpoint(
            section.base_url,
            section.model,
            api_key_env=section.api_key_env,
            max_tokens=section.max_tokens,
            timeout=section.timeout,
        )
        self.host = self._endpoint.host
        shipped = prompts.load_prompts()
        self._texts = replace(
            shipped, texts={**shipped.texts, "rubric": section.rubric or shipped.texts["rubric"]}
        )

    def facts(self) -> dict[str, float]:
        """Calls so far, those that failed, and tokens as the endpoint counts them."""
        return {
            "calls": self.calls,
            "failed_calls": self.failed,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }

    def score(self, asked: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """Ratings from 0 to 1. Raises RunError naming the row that is not rated after all tries."""
        # What is asked holds a mark that is drawn anew each time; what is known goes by what was said.
        marks = [
            key([(turn.role, turn.content) for turn in one.messages], one.reference, text)
            for one, text in zip(asked, completions, strict=True)
        ]
        first = {mark: n for n, mark in reversed(list(enumerate(marks))) if mark not in self._known}

        def rate(mark: str) -> float:
            n = first[mark]
            return self._rated(self._messages(asked[n], completions[n]), asked[n], completions[n])

        with ThreadPoolExecutor(self.section.concurrency, thread_name_prefix="judge") as threads:
            rated = dict(zip(first, threads.map(rate, first), strict=True))
        found = [rated[mark] if mark in rated else self._known[mark] for mark in marks]
        if len(self._known) + len(rated) > KEPT:
            self._known.clear()
        self._known |= rated
        return found

    def _messages(self, prompt: Prompt, completion: str) -> tuple[Message, ...]:
        before, question = prompts.split([(turn.role, turn.content) for turn in prompt.messages])
        turn = prompts.Turn(question, prompt.reference)
        return prompts.single(self._texts, [turn], [completion], before=before)

    def _rated(self, messages: Sequence[Message], prompt: Prompt, completion: str) -> float:
        for attempt in range(self.section.retries + 1):
            try:
                return (_rating(self._called(messages)) - 1) / 9
            except Refused as refusal:
                with self._lock:
                    self.failed += 1
                if not refusal.again or attempt == self.section.retries:
                    raise RunError(
                        f"The judge gave no rating for row {prompt.row} in {counted(attempt + 1, 'call')}.",
                        found=f"{refusal}; the answer {_shown(completion)}",
                        fix="Check method.rewards: base_url, model, api_key_env, max_tokens; the run can be resumed "
                        "from its last checkpoint.",
                    ) from None
                time.sleep(pause(attempt, refusal, backoff=self.backoff))
        raise AssertionError("unreachable")

    def _called(self, messages: Sequence[Message]) -> str:
        """The text of one reply."""
        with self._lock:
            self.calls += 1
        reply = self._endpoint.call(messages)
        with self._lock:
            self.prompt_tokens += reply.prompt_tokens or 0
            self.completion_tokens += reply.completion_tokens or 0
        return reply.text


def _rating(reply: str) -> float:
    found = verdicts.rating(reply)
    if found is None:
        raise Refused(
            f"a reply that does not end with a rating: {_shown(reply[-SHOWN:])}", again=True, charged=True
        )
    return found


def said(rewards: Sequence[Reward], *, answers: int | None = None) -> Iterator[Mapping[str, str]]:
    """Each reward as a decision of the run; `answers` is how many a training scores in all, for what it will cost."""
    for reward in rewards:
        about = reward.about
        if reward.calls and answers:
            about += f"; about {answers:,} calls in all, fewer where answers repeat"
        yield {"name": f"reward {reward.name}", "value": f"weight {reward.weight:g}", "reason": about}
