"""Whether an artefact is the model that it was made from: the same prompt tokens, the same answers, the same score.

    prompt ids of training = transformers = server = GGUF file    logits along one path, largest difference
    greedy answers, near ties aside but in float32                score on held-out rows, paired

What is tested is what is shipped: each artefact is read back by who will read it, a `Reader`: transformers for a
folder, llama.cpp for a GGUF file, a server for what it serves.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunesmith import models
from tunesmith.data.templates import end_of_turn_ids
from tunesmith.engines import llamacpp
from tunesmith.errors import ModelError, size
from tunesmith.evaluation.compare import Comparison, difference_shown, shown
from tunesmith.evaluation.metrics import METRICS
from tunesmith.evaluation.report import VERDICTS
from tunesmith.generation import Generated, cut, decoded, for_inference, generate

if TYPE_CHECKING:
    from tunesmith.data.examples import Prompt
    from tunesmith.export.weights import Layers

VERDICT = "parity.json"
"""The verdict, beside the artefact that it is of."""

TOLERANCES = {
    "float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2,
    # llama.cpp looks its activations up in tables of float16, and multiplies quantised weights by quantised inputs.
    "f32": 1e-3, "f16": 1e-2, "bf16": 4e-2, "q8_0": 6e-2, "q5_1": 0.3, "q5_0": 0.3, "q4_1": 0.5, "q4_0": 0.5,
    "mxfp4": 0.6, "nvfp4": 0.6, "tq2_0": 1.0, "tq1_0": 1.0,
}  # fmt: skip
"""How far a logit of an artefact may be from the model's, as a share of the largest logit, by how weights are stored.
In float32 only the order of sums differs; the others are what rounding every weight to them may come to. The few-bit
ones leave little more than the score to judge by."""

EXACT = ("float32", "f32")
"""Ways to store weights that round nothing: greedy answers have to be the same tokens, near ties or not."""

COARSE = 1.0
"""Tolerance for a way to store weights that has none of its own: the score alone judges."""

NEW_TOKENS = 24
"""Length of an answer where no held-out question sets another."""


ASKED = 1.2
"""Memory that a model takes as it is asked, as a multiple of its weights."""


@dataclass(frozen=True)
class Room:
    """Memory that a proof takes, and how much is free on this machine, in bytes."""

    wanted: int
    there: int

    @property
    def suffices(self) -> bool:
        """Whether it fits."""
        return self.wanted <= self.there

    def __str__(self) -> str:
        return f"{size(self.wanted)}, and {size(self.there)} are free"


def room_for(*weights: float) -> Room:
    """The room in which models are asked beside each other, each given by the bytes of its weights."""
    from tunesmith import devices

    return Room(int(ASKED * sum(weights)), devices.available())


@dataclass(frozen=True)
class Check:
    """An artefact, as read back, against the model that it was made from, which is computed in float32."""

    prompts: int
    positions: int
    """Tokens whose logits were compared: those of the prompts and of the answers."""
    largest_difference: float
    """Between two logits for the same token."""
    largest_logit: float
    """Of the model, by amount."""
    tolerance: float
    """Largest difference allowed, as a share of the largest logit."""
    new_tokens: int
    """Tokens that the model answered with, greedily."""
    same_answers: int
    """Prompts whose answers have the same tokens."""
    ties: int
    """Prompts whose answers part at a token that the model prefers by less than the tolerance."""
    of_scores: bool = False
    """Whether the logits are scores of a reward model, one for each prompt, which has no answers."""
    of_logprobs: bool = False
    """Whether the difference is one of log-probabilities, of the tokens that a server wrote, which is what it tells."""
    exact: bool = False
    """Whether near ties excuse nothing, since nothing is rounded."""

    @property
    def passed(self) -> bool:
        """Whether every logit is within the tolerance and every answer has the same tokens: in reduced precision near
        ties aside."""
        # False for a difference that is not a number.
        close = self.largest_difference <= self.tolerance * self.largest_logit
        excused = 0 if self.exact else self.ties
        return close and self.same_answers + excused == self.prompts

    def sentence(self) -> str:
        """The result for people."""
        if self.of_scores:
            return (
                f"largest difference of a score {self.largest_difference:.2g}, allowed "
                f"{self.tolerance * self.largest_logit:.2g} ({self.tolerance:g} of the largest score "
                f"{self.largest_logit:.3g}), over {self.prompts} texts"
            )
        strict = ", which excuses nothing in float32" if self.exact else ""
        ties = f" ({self.ties} part at a near tie{strict})" if self.ties else ""
        answers = f"{self.same_answers} of {self.prompts} greedy answers have the same tokens{ties}"
        if not self.positions:
            return f"{answers}; it gives no logits to compare"
        what = "the log-probability of a token that it wrote" if self.of_logprobs else "a logit"
        return (
            f"largest difference of {what} {self.largest_difference:.2g}, allowed "
            f"{self.tolerance * self.largest_logit:.2g} ({self.tolerance:g} of the largest logit "
            f"{self.largest_logit:.3g}), over {self.positions} tokens; {answers}"
        )


@dataclass(frozen=True)
class Answered:
    """One prompt's greedy answer and the logits of all its tokens, prompt included, in float32."""

    ids: tuple[int, ...]
    logits: Any
    """None of who gives none."""
    logprobs: Sequence[float] | None = None
    """Of each of its own tokens, in nats, where it gives those and no logits."""


def answered(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    along: Sequence[Sequence[int]] | None = None,
    new_tokens: int = NEW_TOKENS,
) -> list[Answered]:
    """Each prompt's greedy answer; logits are along it, or along the answers given. Of a reward model the score,
    as its only logit."""
    if models.is_reward(model):
        with for_inference(model):
            return [Answered((), _logits(model, prompt, ())) for prompt in prompts]

    found = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=new_tokens,
        stop_ids=end_of_turn_ids(tokenizer),
        batch_tokens=1,  # one by one, so that no padding is in what is compared
    )
    paths = [answer.ids for answer in found] if along is None else along
    with for_inference(model):
        return [
            Answered(answer.ids, _logits(model, prompt, path))
            for prompt, answer, path in zip(prompts, found, paths, strict=True)
        ]


def _logits(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Any:
    """Logits of the whole path: what the model finds likely after each token of it."""
    import torch

    if models.is_seq2seq(model):
        start = models.first_tokens(model)["decoder_start_token_id"]
        ids, more = list(prompt), {"decoder_input_ids": torch.tensor([[start, *answer]])}
    else:
        ids, more = [*prompt, *answer], {}
    logits = model(input_ids=torch.tensor([ids]), use_cache=False, **more).logits
    return logits[0].float()


@dataclass(frozen=True)
class Difference:
    """One prompt's answer by an artefact against the model's."""

    largest: float
    """Between two logits for the same token, or between two log-probabilities."""
    largest_logit: float
    positions: int
    new_tokens: int
    same: bool
    gap: float | None
    """By how much the model preferred its own token to the next best where the answers part; None where they do not."""
    is_score: bool
    of_logprobs: bool = False


def difference(one: Answered, other: Answered) -> Difference:
    """`one` is the model's answer, whose path both logits are along."""
    gap, start = None, len(one.logits) - len(one.ids) - 1
    shared = next(
        (n for n, (a, b) in enumerate(zip(one.ids, other.ids, strict=False)) if a != b),
        min(len(one.ids), len(other.ids)),
    )
    if one.ids != other.ids:
        first, second = one.logits[start + shared].topk(2).values.tolist()
        gap = first - second
    largest, positions = 0.0, 0
    if other.logits is not None:
        largest, positions = float((one.logits - other.logits).abs().max()), len(one.logits)
    elif other.logprobs:
        import torch

        # Behind the token at which the answers part, the two stand on different texts.
        count = min(shared + 1, len(other.ids), len(other.logprobs))
        own = one.logits[start : start + count].log_softmax(-1)
        own = own[torch.arange(count), torch.tensor(other.ids[:count])]
        largest, positions = float((own - torch.tensor(other.logprobs[:count])).abs().max()), count
    return Difference(
        largest=largest,
        largest_logit=float(one.logits.abs().max()),
        positions=positions,
        new_tokens=len(one.ids),
        same=one.ids == other.ids,
        gap=gap,
        is_score=len(one.logits) == 1 and not one.ids,
        of_logprobs=other.logits is None,
    )


def checked(differences: Sequence[Difference], *, tolerance: float, exact: bool = False) -> Check:
    """All prompts together."""
    import numpy

    largest = max(d.largest_logit for d in differences)
    return Check(
        prompts=len(differences),
        positions=sum(d.positions for d in differences),
        # Unlike max() of Python, that of numpy keeps what is not a number.
        largest_difference=float(numpy.max([d.largest for d in differences])),
        largest_logit=largest,
        tolerance=tolerance,
        new_tokens=sum(d.new_tokens for d in differences),
        same_answers=sum(d.same for d in differences),
        ties=sum(d.gap is not None and d.gap <= 2 * tolerance * largest for d in differences),
        of_scores=all(d.is_score for d in differences),
        of_logprobs=any(d.of_logprobs for d in differences),
        exact=exact,
    )


Place = Literal["training", "transformers", "server", "gguf", "onnx"]
"""Where a prompt is read."""


@dataclass(frozen=True)
class Reading:
    """As which ids held-out prompts are read in one place, against those that the model was trained to read."""

    place: Place
    by: str
    """Who reads there, with its version."""
    asked: int
    same: int
    why: str | None = None
    """Why fewer than all are read there, or none."""


@dataclass(frozen=True)
class Parity:
    """The verdict on an artefact."""

    artefact: str
    """Its file's or folder's name."""
    quant: str
    read_by: str
    """What read it back, with its version."""
    prompts: int
    same_prompts: int
    """Prompts whose ids, by the artefact's own tokenizer and in all the other places, are those that the model was
    trained to read."""
    check: Check | None
    """None where the whole model was not asked, which `unproven` says."""
    score: Comparison | None = None
    """The run's metric on the same questions, the artefact (`tuned`) against the model (`base`)."""
    unscored: str | None = None
    """Why there is no score, or why it is not by the run's own metric."""
    too_long: int = 0
    """Questions that were left out, since the file's context has no room for an answer."""
    with_tools: int = 0
    """Questions that were left out, since they offer tools and a server is asked without."""
    layers: Layers | None = None
    """Of merged weights: each layer against base and adapter."""
    unproven: str | None = None
    """Why the whole model was not asked."""
    readings: tuple[Reading, ...] = ()
    """The same prompts read in training, by transformers, by a server and from a GGUF file."""
    reference: str = "float32"
    """Type in which the model was computed that the artefact was compared with."""

    @property
    def passed(self) -> bool | None:
        """Whether prompts are read alike, logits and answers are within the tolerance, and the score is not worse.
        None where nothing is wrong but no weight was looked at, as `unproven` says."""
        if self.problems():
            return False
        return None if self.check is None and self.layers is None else True

    def problems(self) -> list[str]:
        """What keeps it from passing."""
        found = []
        if self.same_prompts < self.prompts:
            found.append(
                f"{self.prompts - self.same_prompts} of {self.prompts} prompts are read as other tokens"
                + "".join(
                    f", {r.asked - r.same} of {r.asked} by {r.by}" for r in self.readings if r.same < r.asked
                )
            )
        found += [part.sentence() for part in (self.layers, self.check) if part and not part.passed]
        if self.score is not None and self.score.verdict == "worse":
            found.append(f"its score is worse: {difference_shown(self.score)}")
        return found

    def headline(self) -> str:
        """The verdict in one line, with the reason for one that is not good."""
        why = "; ".join(self.problems()) or ("" if self.passed else self.unproven)
        return f"{VERDICTS[self.passed]}: {why}" if why else VERDICTS[self.passed]

    def sentences(self) -> list[str]:
        """The result for people."""
        longer = f" ({self.too_long} more are longer than its context)" if self.too_long else ""
        tools = f" ({self.with_tools} more offer tools, and were not asked)" if self.with_tools else ""
        by = f"read back by {self.read_by}" if self.read_by else "read back by nobody"
        readers = [r for r in self.readings if r.place != "training"]
        lines = [
            f"{by}: {self.same_prompts} of {self.prompts} prompts are the same tokens{longer}{tools}",
            *([f"prompts as in training: {', '.join(map(_read_shown, readers))}"] if readers else []),
            *([self.layers.sentence()] if self.layers else []),
            self.check.sentence() if self.check else f"not asked as a whole: {self.unproven}",
        ]
        if self.reference != "float32":
            lines.append(f"compared with the model as computed in {self.reference}, not in float32")
        if self.score and self.score.base is not None and self.score.tuned is not None:
            metric = METRICS[self.score.metric]
            base, own = shown(self.score.base, metric), shown(self.score.tuned, metric)
            lines.append(
                f"{metric.name}: the model {base}, this file {own}, difference {difference_shown(self.score)}, "
                f"n = {self.score.n}"
            )
        if self.unscored:
            lines.append(self.unscored if self.score else f"no score: {self.unscored}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """What `parity.json` holds."""
        return {
            **asdict(self),
            **{
                name: {**asdict(part), "passed": part.passed} if part else None
                for name, part in (("check", self.check), ("layers", self.layers))
            },
            "passed": self.passed,
            "problems": self.problems(),
            "sentences": self.sentences(),
        }


def passed_in(folder: Path) -> bool | None:
    """What the verdict in a folder says; true where there is none, and None for one that is no proof."""
    try:
        said = json.loads((folder / VERDICT).read_text(encoding="utf-8"))["passed"]
    except FileNotFoundError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return said if isinstance(said, bool) else None


@dataclass(frozen=True)
class Question:
    """A prompt as the model was trained to read it, and the text that a server would be sent for it."""

    ids: tuple[int, ...]
    text: str
    prompt: Prompt | None = None
    """The conversation that the text is of, for whoever writes it by a template of its own."""


@dataclass(frozen=True)
class Held:
    """Held-out questions to prove an artefact with."""

    questions: Sequence[Question]
    new_tokens: int
    score: Callable[[Sequence[int], Sequence[Any], Sequence[Any]], tuple[Any, str | None]]
    """(numbers of questions, the model's answers to them, the artefact's) -> their comparison, and why there is none or
    it is not by the run's own metric."""


@dataclass(frozen=True)
class Reader:
    """Who reads an artefact back. A server is one without logits: its `tokens` and `greedy` are requests to it."""

    name: str
    """With its version."""
    tokens: Callable[[Question], Sequence[int]]
    """As which ids it reads a question."""
    greedy: Callable[[Sequence[int], int], Generated]
    """(prompt ids, most tokens) -> its answer."""
    logits: Callable[[Sequence[int], Sequence[int]], Any] | None
    """(prompt ids, answer ids) -> logits of the whole path, a float32 tensor."""
    length: int | None = None
    """Most tokens of a prompt with its answer, where that is limited."""
    takes_tools: bool = True
    """Whether it can be asked questions that offer tools."""
    logprobs: Callable[[Sequence[int]], Sequence[float] | None] | None = None
    """Prompt ids -> log-probability of each token of the answer that it gave to them last, of who gives no logits."""
    place: Place = "transformers"


def compared(
    model: Any,
    tokenizer: Any,
    reader: Reader,
    questions: Sequence[Question],
    *,
    new_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Difference], list[bool], list[Generated], list[Generated]]:
    """An artefact, asked by a reader, against the model in this process.

    Gives the differences, whether the reader reads each question as the same ids, and the answers of the model and of
    the artefact. One prompt at a time, so that logits of a large vocabulary need not be kept.
    """
    differences, own, others = [], [], []
    same = [list(reader.tokens(asked)) == list(asked.ids) for asked in questions]
    for done, asked in enumerate(questions, start=1):
        room = new_tokens if reader.length is None else min(new_tokens, reader.length - len(asked.ids))
        [one] = answered(model, tokenizer, [asked.ids], new_tokens=room)
        other = Generated((), "", "stop") if models.is_reward(model) else reader.greedy(asked.ids, room)
        along = reader.logits(asked.ids, one.ids) if reader.logits else None
        told = reader.logprobs(asked.ids) if reader.logprobs else None
        differences.append(difference(one, Answered(other.ids, along, told)))
        text = decoded(one.ids, tokenizer)
        own.append(Generated(one.ids, text, "stop" if len(one.ids) < room else "length"))
        others.append(other)
        progress(done)
    return differences, same, own, others


def verdict(
    model: Any,
    tokenizer: Any,
    reader: Reader,
    held: Held,
    *,
    artefact: str,
    quant: str,
    context: int | None = None,
    layers: Layers | None = None,
    reference: str = "float32",
    progress: Callable[[int], None] = lambda done: None,
) -> Parity:
    """The verdict on an artefact that a reader holds. `context` is the most tokens that it can read and write,
    `reference` the type in which `model` computes.

    Raises ModelError where no question fits into it.
    """
    taken = [
        n
        for n, asked in enumerate(held.questions)
        if reader.takes_tools or not (asked.prompt and asked.prompt.tools)
    ]
    if not taken:
        raise ModelError(
            "No question can be asked: all of them offer tools, and a server is asked without.",
            found=f"{len(held.questions)} questions",
            fix="Ask it the rows of another --dataset, or those that ship for a --task.",
        )
    numbers = [n for n in taken if context is None or len(held.questions[n].ids) < context]
    if not numbers:
        raise ModelError(
            "No question is short enough for the file's context.",
            found=f"{context} tokens, {len(held.questions)} questions",
            fix="Train on shorter rows, or serve the merged model with transformers or vLLM.",
        )
    differences, same, own, others = compared(
        model,
        tokenizer,
        reader,
        [held.questions[n] for n in numbers],
        new_tokens=held.new_tokens,
        progress=progress,
    )
    score, unscored = held.score(numbers, own, others)
    asked_of = [held.questions[n] for n in numbers]
    readings, alike = readings_of(asked_of, tokenizer, is_pair=models.is_seq2seq(model), own=(reader, same))
    return Parity(
        artefact=artefact,
        quant=quant,
        read_by=reader.name,
        prompts=len(numbers),
        same_prompts=alike,
        check=checked(
            differences,
            tolerance=max(TOLERANCES.get(quant, COARSE), TOLERANCES[reference]),
            exact=quant in EXACT and reference in EXACT,
        ),
        score=score,
        unscored=unscored,
        too_long=len(taken) - len(numbers),
        with_tools=len(held.questions) - len(taken),
        layers=layers,
        readings=readings,
        reference=reference,
    )


def readings_of(
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    is_pair: bool,
    own: tuple[Reader, Sequence[bool]] | None = None,
    absent: str = "none is part of this check",
) -> tuple[tuple[Reading, ...], int]:
    """The questions as they are read in each place, and the number of those that are read alike in all of them.

    `own` is the artefact's reader with what it found already. `absent` says why no GGUF file is read.
    """
    read: dict[Place, tuple[str, Callable[[Question], Sequence[int] | None]]] = {
        "training": ("tunesmith", lambda asked: asked.ids),
        "transformers": (transformers_version(), lambda asked: read_as(asked, tokenizer)),
        "server": (
            "tunesmith serve's own prompt function, not over HTTP",
            _served_reading(tokenizer, is_pair=is_pair),
        ),
    }
    found, alike = [], [True] * len(questions)
    for place, (by, tokens) in read.items():
        same: list[bool | None]
        if own and own[0].place == place:
            by, same = own[0].name, list(own[1])
        else:
            ids = [tokens(asked) for asked in questions]
            same = [
                None if one is None else list(one) == list(asked.ids) for one, asked in zip(ids, questions)
            ]
        found.append(_reading(place, by, same))
        alike = [a and b is not False for a, b in zip(alike, same, strict=True)]
    if own and own[0].place in ("gguf", "onnx"):
        found.append(_reading(own[0].place, own[0].name, own[1]))
        alike = [a and bool(b) for a, b in zip(alike, own[1], strict=True)]
    else:
        found.append(Reading("gguf", "nobody", 0, 0, absent))
    return tuple(found), sum(alike)


def _reading(place: Place, by: str, same: Sequence[bool | None]) -> Reading:
    left = sum(one is None for one in same)
    why = f"{left} offer tools or hold what a server is not sent" if left else None
    return Reading(place, by, len(same) - left, sum(one is True for one in same), why)


def _read_shown(reading: Reading) -> str:
    name = {"server": "served", "gguf": "GGUF file", "onnx": "ONNX"}.get(reading.place, reading.place)
    if not reading.asked:
        return f"{name} not read ({reading.why})"
    return f"{name} {reading.same} of {reading.asked}" + (f" ({reading.why})" if reading.why else "")


def _served_reading(tokenizer: Any, *, is_pair: bool) -> Callable[[Question], Sequence[int] | None]:
    """As which ids `tunesmith serve` reads a question, by the function that answers its requests; None for one that it
    is not sent."""
    from tunesmith.data.examples import Unusable
    from tunesmith.serving.models import served_as

    own = copy.copy(tokenizer)
    models.settle_template(own, is_pair=is_pair)  # as the server does where it loads one
    endpoint = served_as("artefact", own, adapter=None, is_pair=is_pair)

    def tokens(asked: Question) -> Sequence[int] | None:
        if asked.prompt is None or asked.prompt.tools:
            return None
        turns = [(message.role, message.content) for message in asked.prompt.messages]
        try:
            return endpoint.prompt(turns)
        except Unusable:
            return None

    return tokens


@contextmanager
def gguf_reader(file: Path, tokenizer: Any, *, length: int, words_only: bool = False) -> Iterator[Reader]:
    """llama.cpp, on a GGUF file: questions are put by the template that the file holds, not by the tokenizer's. With
    `words_only` it can only say as which tokens it reads them, for which no weights are loaded."""
    import torch

    stop_ids = end_of_turn_ids(tokenizer)
    with llamacpp.opened(file, length=length, words_only=words_only) as loaded:
        own = copy.copy(tokenizer)
        own.chat_template = llamacpp.chat_template(loaded)

        def tokens(asked: Question) -> Sequence[int]:
            if asked.prompt is None or not own.chat_template:
                return llamacpp.tokenized(loaded, asked.text)
            return llamacpp.tokenized(loaded, text_of(asked.prompt, own))

        yield Reader(
            name=llamacpp.version(),
            tokens=tokens,
            greedy=lambda ids, room: cut(
                llamacpp.greedy(loaded, ids, room=room, stop_ids=stop_ids), stop_ids, tokenizer
            ),
            logits=lambda ids, answer: torch.from_numpy(llamacpp.logits(loaded, ids, answer)),
            length=None if loaded.is_pair else loaded.length,
            place="gguf",
        )


def folder_reader(folder: Path) -> Reader:
    """transformers, on a folder of whole weights, loaded in float32."""
    model, tokenizer = models.load_model(str(folder)).eval(), models.load_tokenizer(str(folder))
    stop_ids = end_of_turn_ids(tokenizer)

    def greedy(ids: Sequence[int], room: int) -> Generated:
        [found] = generate(model, tokenizer, [ids], max_new_tokens=room, stop_ids=stop_ids, batch_tokens=1)
        return found

    def logits(ids: Sequence[int], answer: Sequence[int]) -> Any:
        with for_inference(model):
            return _logits(model, ids, answer)

    return Reader(transformers_version(), lambda asked: read_as(asked, tokenizer), greedy, logits)


def server_reader(
    url: str,
    name: str,
    tokenizer: Any,
    *,
    api_key_env: str | None = None,
    length: int | None = None,
    timeout: float = 300.0,
) -> Reader:
    """A served endpoint, asked as clients ask it: messages, put by its own template, and answers that it ends itself.

    `url` goes up to `/v1`. The server has to tell token ids (`return_token_ids`), as `tunesmith serve` and vLLM do.
    Raises ModelError where it does not, and where a request is refused.
    """
    from tunesmith.http import Refused, Remote

    remote = Remote(url, setting="the address", api_key_env=api_key_env, timeout=timeout)
    stop_ids = end_of_turn_ids(tokenizer)

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        asked = {"model": name, "temperature": 0, "return_token_ids": True, **body}
        try:
            reply: dict[str, Any] = remote.post(path, asked)
            return {**reply, **reply["choices"][0]}
        except Refused as refusal:
            raise ModelError(
                f"The server gives no answer as '{name}'.",
                found=str(refusal),
                fix="Check the address, the name and the key."
                if refusal.hopeless
                else "See what the server says, whether it runs, and whether it is too slow to answer in "
                f"{timeout:.0f} s.",
            ) from None
        except (KeyError, IndexError, TypeError):
            raise ModelError(
                f"The server's reply to {path} holds no answer.", fix="Give its address up to /v1."
            ) from None

    def ids(reply: dict[str, Any], kind: str) -> list[int]:
        found = reply.get(kind)
        if not isinstance(found, list):
            raise ModelError(
                "The server tells no token ids, so what it reads cannot be compared.",
                found=f"a reply without {kind}",
                fix="Use `tunesmith serve` or vLLM.",
            )
        return found

    def tokens(asked: Question) -> Sequence[int]:
        if asked.prompt is None:
            return ids(post("/completions", {"prompt": asked.text, "max_tokens": 1}), "prompt_token_ids")
        messages = [{"role": m.role, "content": m.content} for m in asked.prompt.messages]
        return ids(post("/chat/completions", {"messages": messages, "max_tokens": 1}), "prompt_token_ids")

    heard: dict[tuple[int, ...], list[float]] = {}

    def greedy(prompt: Sequence[int], room: int) -> Generated:
        reply = post("/completions", {"prompt": list(prompt), "max_tokens": room, "logprobs": 0})
        told = (reply.get("logprobs") or {}).get("token_logprobs")
        heard.clear()
        if isinstance(told, list) and all(isinstance(one, float | int) for one in told):
            heard[tuple(prompt)] = told
        written, is_ended = ids(reply, "token_ids"), reply.get("finish_reason") == "stop"
        # Nothing behind a stop token is cut away: a server that writes on there answers otherwise.
        kept = tuple(written[:-1] if is_ended and written and written[-1] in stop_ids else written)
        return Generated(kept, decoded(kept, tokenizer), "stop" if is_ended else "length")

    return Reader(
        f"the server at {remote.host}", tokens, greedy, None, length,
        takes_tools=False, logprobs=lambda prompt: heard.get(tuple(prompt)), place="server",
    )  # fmt: skip


def text_of(prompt: Prompt, tokenizer: Any) -> str:
    """A conversation as a tokenizer's chat template writes it."""
    messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
    text: str = tokenizer.apply_chat_template(
        messages, tools=list(prompt.tools) or None, tokenize=False, add_generation_prompt=True
    )
    return text


def read_as(asked: Question, tokenizer: Any) -> Sequence[int]:
    """The ids that plain transformers makes of a question with the template that is saved with a tokenizer."""
    if asked.prompt is None:
        return asked.ids
    messages = [{"role": m.role, "content": m.content} for m in asked.prompt.messages]
    found: Sequence[int] = tokenizer.apply_chat_template(
        messages,
        tools=list(asked.prompt.tools) or None,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
    )
    return found


def transformers_version() -> str:
    """transformers with its version, as a reader is named."""
    return f"transformers {metadata.version('transformers')}"


def of_folder(
    model: Any,
    tokenizer: Any,
    folder: Path,
    held: Held,
    *,
    quant: str,
    layers: Layers | None,
    reference: str = "float32",
    progress: Callable[[int], None] = lambda done: None,
) -> Parity:
    """The verdict on a folder of whole weights, against the model that it was made from."""
    return verdict(
        model, tokenizer, folder_reader(folder), held,
        artefact=folder.name, quant=quant, layers=layers, reference=reference, progress=progress,
    )  # fmt: skip


def of_prompts(
    folder: Path, questions: Sequence[Question], *, quant: str, layers: Layers | None, unproven: str
) -> Parity:
    """The verdict on a folder whose model is not loaded: how its tokenizer reads prompts, and its layers."""
    return unasked(
        folder.name, questions, models.load_tokenizer(str(folder)),
        is_pair=models.configuration(str(folder)).is_encoder_decoder, read_by=transformers_version(), quant=quant,
        layers=layers, unproven=unproven,
    )  # fmt: skip


def unasked(
    artefact: str,
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    is_pair: bool,
    read_by: str,
    quant: str,
    unproven: str,
    layers: Layers | None = None,
    own: tuple[Reader, Sequence[bool]] | None = None,
    absent: str = "none is part of this check",
) -> Parity:
    """The verdict on what was not asked as a whole, which `unproven` says why: how prompts are read, and its layers."""
    readings, alike = readings_of(questions, tokenizer, is_pair=is_pair, own=own, absent=absent)
    return Parity(
        artefact=artefact,
        quant=quant,
        read_by=read_by,
        prompts=len(questions),
        same_prompts=alike,
        check=None,
        unscored="the whole model was not asked",
        layers=layers,
        unproven=unproven,
        readings=readings,
    )
