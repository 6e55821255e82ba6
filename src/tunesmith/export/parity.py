"""Whether an artefact is the model that it was made from: the same prompt tokens, the same answers, the same score.

    training's prompt ids = transformers' = the artefact's own tokenizer's
    logits along one path, largest difference     greedy answers, ties aside     score on held-out rows, paired

What is tested is what is shipped: each artefact is read back by who will read it, a `Reader`: transformers for a
folder, llama.cpp for a GGUF file, a server for what it serves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import models
from tunesmith.data.templates import end_of_turn_ids
from tunesmith.engines import llamacpp
from tunesmith.errors import ModelError
from tunesmith.evaluation.compare import Comparison, difference_shown, shown
from tunesmith.evaluation.metrics import METRICS
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
}  # fmt: skip
"""How far a logit of an artefact may be from the model's, as a share of the largest logit, by how weights are stored.
In float32 only the order of sums differs; the others are what rounding every weight to them may come to. The few-bit
ones leave little more than the score to judge by."""

NEW_TOKENS = 24
"""Length of an answer where no held-out question sets another."""


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

    @property
    def passed(self) -> bool:
        """Whether every logit is within the tolerance and every answer has the same tokens, ties aside."""
        # False for a difference that is not a number.
        close = self.largest_difference <= self.tolerance * self.largest_logit
        return close and self.same_answers + self.ties == self.prompts

    def sentence(self) -> str:
        """The result for people."""
        if self.of_scores:
            return (
                f"largest difference of a score {self.largest_difference:.2g}, allowed "
                f"{self.tolerance * self.largest_logit:.2g} ({self.tolerance:g} of the largest score "
                f"{self.largest_logit:.3g}), over {self.prompts} texts"
            )
        ties = f" ({self.ties} part at a tie)" if self.ties else ""
        answers = f"{self.same_answers} of {self.prompts} greedy answers have the same tokens{ties}"
        if not self.positions:
            return f"{answers}; it gives no logits to compare"
        return (
            f"largest difference of a logit {self.largest_difference:.2g}, allowed "
            f"{self.tolerance * self.largest_logit:.2g} ({self.tolerance:g} of the largest logit "
            f"{self.largest_logit:.3g}), over {self.positions} tokens; {answers}"
        )


@dataclass(frozen=True)
class Answered:
    """One prompt's greedy answer and the logits of all its tokens, prompt included, in float32."""

    ids: tuple[int, ...]
    logits: Any
    """None of who gives none."""


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
    """Between two logits for the same token."""
    largest_logit: float
    positions: int
    new_tokens: int
    same: bool
    gap: float | None
    """By how much the model preferred its own token to the next best where the answers part; None where they do not."""
    is_score: bool


def difference(one: Answered, other: Answered) -> Difference:
    """`one` is the model's answer, whose path both logits are along."""
    gap = None
    if one.ids != other.ids:
        parting = next(
            (n for n, (a, b) in enumerate(zip(one.ids, other.ids, strict=False)) if a != b),
            min(len(one.ids), len(other.ids)),
        )
        first, second = one.logits[len(one.logits) - len(one.ids) - 1 + parting].topk(2).values.tolist()
        gap = first - second
    is_compared = other.logits is not None
    return Difference(
        largest=float((one.logits - other.logits).abs().max()) if is_compared else 0.0,
        largest_logit=float(one.logits.abs().max()),
        positions=len(one.logits) if is_compared else 0,
        new_tokens=len(one.ids),
        same=one.ids == other.ids,
        gap=gap,
        is_score=len(one.logits) == 1 and not one.ids,
    )


def checked(differences: Sequence[Difference], *, tolerance: float) -> Check:
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
    )


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
    """Prompts whose ids from the artefact's tokenizer are those that the model was trained to read."""
    check: Check | None
    """None where the whole model was not asked, which `unproven` says."""
    score: Comparison | None = None
    """The run's metric on the same questions, the artefact (`tuned`) against the model (`base`)."""
    unscored: str | None = None
    """Why there is no score."""
    too_long: int = 0
    """Questions that were left out, since the file's context has no room for an answer."""
    with_tools: int = 0
    """Questions that were left out, since they offer tools and a server is asked without."""
    layers: Layers | None = None
    """Of merged weights: each layer against base and adapter."""
    unproven: str | None = None
    """Why the whole model was not asked."""

    @property
    def passed(self) -> bool:
        """Whether prompts are read alike, logits and answers are within the tolerance, and the score is not worse."""
        is_worse = self.score is not None and self.score.verdict == "worse"
        close = all(part is None or part.passed for part in (self.check, self.layers))
        return self.same_prompts == self.prompts and close and not is_worse

    def problems(self) -> list[str]:
        """What keeps it from passing."""
        found = []
        if self.same_prompts < self.prompts:
            found.append(
                f"{self.prompts - self.same_prompts} of {self.prompts} prompts are read as other tokens"
            )
        found += [part.sentence() for part in (self.layers, self.check) if part and not part.passed]
        if self.score is not None and self.score.verdict == "worse":
            found.append(f"its score is worse: {difference_shown(self.score)}")
        return found

    def sentences(self) -> list[str]:
        """The result for people."""
        longer = f" ({self.too_long} more are longer than its context)" if self.too_long else ""
        tools = f" ({self.with_tools} more offer tools, and were not asked)" if self.with_tools else ""
        lines = [
            f"read back by {self.read_by}: {self.same_prompts} of {self.prompts} prompts are the same "
            f"tokens{longer}{tools}",
            *([self.layers.sentence()] if self.layers else []),
            self.check.sentence() if self.check else f"not asked as a whole: {self.unproven}",
        ]
        if self.score and self.score.base is not None and self.score.tuned is not None:
            metric = METRICS[self.score.metric]
            base, own = shown(self.score.base, metric), shown(self.score.tuned, metric)
            lines.append(
                f"{metric.name}: the model {base}, this file {own}, difference {difference_shown(self.score)}, "
                f"n = {self.score.n}"
            )
        elif self.unscored:
            lines.append(f"no score: {self.unscored}")
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
    """(numbers of questions, the model's answers to them, the artefact's) -> their comparison, or why there is none."""


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


def compared(
    model: Any,
    tokenizer: Any,
    reader: Reader,
    questions: Sequence[Question],
    *,
    new_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Difference], int, list[Generated], list[Generated]]:
    """An artefact, asked by a reader, against the model in this process.

    Gives the differences, the number of questions that the reader reads as the same ids, and the answers of the model
    and of the artefact. One prompt at a time, so that logits of a large vocabulary need not be kept.
    """
    differences, own, others = [], [], []
    same = sum(list(reader.tokens(asked)) == list(asked.ids) for asked in questions)
    for done, asked in enumerate(questions, start=1):
        room = new_tokens if reader.length is None else min(new_tokens, reader.length - len(asked.ids))
        [one] = answered(model, tokenizer, [asked.ids], new_tokens=room)
        other = Generated((), "", "stop") if models.is_reward(model) else reader.greedy(asked.ids, room)
        along = reader.logits(asked.ids, one.ids) if reader.logits else None
        differences.append(difference(one, Answered(other.ids, along)))
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
    progress: Callable[[int], None] = lambda done: None,
) -> Parity:
    """The verdict on an artefact that a reader holds. `context` is the most tokens that it can read and write.

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
    return Parity(
        artefact=artefact,
        quant=quant,
        read_by=reader.name,
        prompts=len(numbers),
        same_prompts=same,
        check=checked(differences, tolerance=TOLERANCES[quant]),
        score=score,
        unscored=unscored,
        too_long=len(taken) - len(numbers),
        with_tools=len(held.questions) - len(taken),
        layers=layers,
    )


@contextmanager
def gguf_reader(file: Path, tokenizer: Any, *, length: int) -> Iterator[Reader]:
    """llama.cpp, on a GGUF file: questions are put by the template that the file holds, not by the tokenizer's."""
    import torch

    stop_ids = end_of_turn_ids(tokenizer)
    with llamacpp.opened(file, length=length) as loaded:
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

    def greedy(prompt: Sequence[int], room: int) -> Generated:
        reply = post("/completions", {"prompt": list(prompt), "max_tokens": room})
        written, is_ended = ids(reply, "token_ids"), reply.get("finish_reason") == "stop"
        # Nothing behind a stop token is cut away: a server that writes on there answers otherwise.
        kept = tuple(written[:-1] if is_ended and written and written[-1] in stop_ids else written)
        return Generated(kept, decoded(kept, tokenizer), "stop" if is_ended else "length")

    return Reader(f"the server at {remote.host}", tokens, greedy, None, length, takes_tools=False)


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
    progress: Callable[[int], None] = lambda done: None,
) -> Parity:
    """The verdict on a folder of whole weights, against the model that it was made from."""
    return verdict(
        model, tokenizer, folder_reader(folder), held,
        artefact=folder.name, quant=quant, layers=layers, progress=progress,
    )  # fmt: skip


def of_prompts(
    folder: Path, questions: Sequence[Question], *, quant: str, layers: Layers | None, unproven: str
) -> Parity:
    """The verdict on a folder whose model is not loaded: how its tokenizer reads prompts, and its layers."""
    tokenizer = models.load_tokenizer(str(folder))
    return Parity(
        artefact=folder.name,
        quant=quant,
        read_by=transformers_version(),
        prompts=len(questions),
        same_prompts=sum(list(read_as(asked, tokenizer)) == list(asked.ids) for asked in questions),
        check=None,
        unscored="the whole model was not asked",
        layers=layers,
        unproven=unproven,
    )
