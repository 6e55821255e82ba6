"""Generation engines: one question, answered by whatever is fastest here, with one shape of answer.

    ENGINES: padded (the reference)  paged (transformers' continuous batching)  vllm  openai (a server)
             ray (padded, on several workers)

`answers` is the one function behind which they stand. Prompts are token ids, answers keep the prompts' order, and each
one is kept in a file as soon as it is there, so that a measurement that was killed goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tunesmith import on_ray
from tunesmith.engines import openai, paged, vllm
from tunesmith.errors import ModelError, RecipeError, nearest
from tunesmith.generation import Generated, context_length, generate
from tunesmith.recipe import Evaluation, Server, Shards

Say = Callable[[str], None]
"""Told in a sentence what an engine does otherwise than it was asked."""
Finished = Callable[[int, Generated], None]
"""Called with a prompt's number and its answer as soon as it is there."""


@dataclass(frozen=True)
class Source:
    """Who answers: a model by its folder or id, loaded into this process only where an engine needs it there."""

    name: str
    """As rows and servers call it: base, tuned, model, or a stage's name."""
    tokenizer: Any
    load: Callable[..., Any]
    """Loads it, on a device that is given where there is a `base`, else on its own."""
    base: str | None = None
    """Folder or id; None for a model that exists in this process only."""
    revision: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    server: Server = field(default_factory=Server)
    shards: Shards = field(default_factory=Shards)

    @cached_property
    def model(self) -> Any:
        """The model in this process; an engine of vLLM makes room for it."""
        vllm.let_go(self)
        return self.load()

    def let_go(self) -> None:
        """Free the model, and an engine that was built for it; either comes back where it is asked for again."""
        vars(self).pop("model", None)
        vllm.let_go(self)

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in this process by now."""
        return "model" in vars(self)

    @cached_property
    def context(self) -> int | None:
        """Most tokens of a prompt with its answer, from the model's configuration; None where it does not say."""
        if self.is_loaded or self.base is None:
            return context_length(self.model)
        from tunesmith.models import configuration

        return context_length(SimpleNamespace(config=configuration(self.base, self.revision)))

    def identity(self) -> str | None:
        """Changes with the model's files; None where answers cannot be said to be this model's later on."""
        if self.base is None:
            return None
        from tunesmith.models import files_of, folder_of

        folder = folder_of(self.base, revision=self.revision)
        return _sha256([str(folder), self.revision, self.dtype, self.device, files_of(folder)])


@dataclass(frozen=True)
class Asked:
    """What every engine is asked alike."""

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    stop_ids: Sequence[int]
    temperature: float = 0.0
    seed: int = 0
    batch_tokens: int = 8192
    seeds: Sequence[int] = ()
    """By prompt, for engines that draw each answer by itself: another one for every copy of a prompt."""

    def room(self, prompt: Sequence[int], context: int | None) -> int:
        """New tokens that an answer may have behind a prompt; 0 where the prompt leaves none."""
        return (
            self.max_new_tokens
            if context is None
            else max(0, min(self.max_new_tokens, context - len(prompt)))
        )


Engine = Callable[[Source, Asked, Finished, Say], None]


def _padded(source: Source, asked: Asked, finished: Finished, say: Say) -> None:
    generate(
        source.model,
        source.tokenizer,
        asked.prompts,
        max_new_tokens=asked.max_new_tokens,
        stop_ids=asked.stop_ids,
        batch_tokens=asked.batch_tokens,
        temperature=asked.temperature,
        seed=asked.seed,
        finished=finished,
    )


def answers(
    source: Source,
    asked: Asked,
    *,
    engine: str = "padded",
    folder: Path | None = None,
    progress: Callable[[int], None] | None = None,
    say: Say = lambda message: None,
) -> tuple[list[Generated], dict[str, Any]]:
    """Answers in the order of the prompts, and what they were made with, for the record.

    With `folder` each answer is appended to a file there as it comes, and answers that the file has of the same model
    under the same settings are taken from it. `auto` is paged on CUDA and padded elsewhere; where a model cannot be
    paged it is padded, which `say` is told. Raises RecipeError for an unknown engine or one that does not fit, and
    TunesmithError where an answer is missing in the end.
    """
    wanted = chosen(engine, source.device)
    settings: dict[str, Any] = {
        "max_new_tokens": asked.max_new_tokens,
        "temperature": asked.temperature,
        "seed": asked.seed,
    }
    if engine == "auto" and wanted == "paged" and (why := paged.refused(source.model)):
        say(f"{source.name} is answered by the padded engine, not the paged one: {why}.")
        wanted = "padded"
    settings["engine"] = wanted
    if wanted == "openai":
        settings["served_as"] = source.server.served(source.name)
    file = _file(folder, source, asked, settings)
    with _journal(file, asked.prompts) as (found, keep):
        if progress:
            progress(len(found))
        missing = [n for n in range(len(asked.prompts)) if n not in found]

        def finished(place: int, answer: Generated) -> None:
            number = missing[place]
            found[number] = answer
            keep(number, answer)
            if progress:
                progress(len(found))

        if missing:
            seeds = _seeds(asked)
            # One stream serves all that is drawn together; from its start again it would give the same answers.
            seed = asked.seed if len(missing) == len(asked.prompts) else seeds[missing[0]]
            rest = replace(
                asked,
                prompts=[asked.prompts[n] for n in missing],
                seed=seed,
                seeds=[seeds[n] for n in missing],
            )
            ENGINES[wanted](source, rest, finished, say)
        if absent := [n for n in range(len(asked.prompts)) if n not in found]:
            raise ModelError(
                f"The engine '{wanted}' gave no answer to {len(absent)} of {len(asked.prompts)} prompts.",
                found=f"the first is number {absent[0]}",
                fix="Start again to ask for these alone, or use --set evaluation.engine=padded.",
            )
    if any(not answer.exact for answer in found.values()):
        settings["ids"] = "encoded again from the server's text"
    return [found[n] for n in range(len(asked.prompts))], settings


def chosen(engine: str, device: str) -> str:
    """The engine that a recipe's word means on a device. Raises RecipeError for an unknown one."""
    if engine == "auto":
        return "paged" if device == "cuda" else "padded"
    if engine not in ENGINES:
        raise RecipeError(f"There is no engine '{engine}'.", fix=nearest(engine, ENGINES))
    return engine


def check_shards(section: Evaluation, *, is_asked: bool = False) -> None:
    """Raises RecipeError where workers are asked for, or set to other than their defaults, of an engine without any."""
    if (is_asked or section.shards != Shards()) and section.engine != "ray":
        raise RecipeError(
            f"evaluation.shards is for the engine 'ray', and evaluation.engine is '{section.engine}'.",
            fix="Add --set evaluation.engine=ray, or leave evaluation.shards out.",
        )


def forget(folder: Path) -> None:
    """Remove the answers kept in a measurement's folder, once the rows that were made of them are written."""
    for file in folder.glob("answers-*.jsonl"):
        file.unlink(missing_ok=True)


def _file(folder: Path | None, source: Source, asked: Asked, settings: Mapping[str, Any]) -> Path | None:
    """The file of answers under just these settings; another model or another setting has another file."""
    identity = source.identity() if folder else None
    if folder is None or identity is None:
        return None
    mark = _sha256([identity, settings, list(asked.stop_ids)])
    name = re.sub(r"[^\w.-]+", "-", source.name)
    return folder / f"answers-{name}-{mark[:16]}.jsonl"


def _seeds(asked: Asked) -> list[int]:
    """A seed for each prompt, from the prompt and the number of its copy: who is asked beside it changes nothing."""
    seen: Counter[tuple[int, ...]] = Counter()
    found = []
    for prompt in asked.prompts:
        key = tuple(prompt)
        found.append(int(_sha256([asked.seed, list(prompt), seen[key]])[:7], 16))
        seen[key] += 1
    return found


@contextmanager
def _journal(
    file: Path | None, prompts: Sequence[Sequence[int]]
) -> Iterator[tuple[dict[int, Generated], Callable[[int, Generated], None]]]:
    """Answers that a file has to these prompts, and how a further one is kept.

    A prompt that is asked twice has two lines. A last line that a kill cut off is cut away.
    """
    found: dict[int, Generated] = {}
    if file is None:
        yield found, lambda number, answer: None
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        mark = _sha256(list(prompt))
        keys.append((mark, seen[mark]))
        seen[mark] += 1
    numbers = {key: n for n, key in enumerate(keys)}
    whole = file.read_bytes() if file.exists() else b""
    whole = whole[: whole.rfind(b"\n") + 1]
    for line in whole.splitlines():
        try:
            one = json.loads(line)
            number = numbers.get((one["prompt"], one["copy"]))
            answer = Generated(
                tuple(one["ids"]), one["text"], one["finish_reason"], one["stop_id"], one["exact"]
            )
        except (ValueError, KeyError, TypeError):
            continue  # asked again
        if number is not None:
            found[number] = answer
    if file.exists():
        os.truncate(file, len(whole))
    with file.open("ab") as out:

        def keep(number: int, answer: Generated) -> None:
            mark, copy = keys[number]
            line = {"prompt": mark, "copy": copy, **vars(answer)}
            out.write(json.dumps(line).encode("ascii") + b"\n")
            out.flush()  # with the system by now, so that the death of this process loses nothing

        yield found, keep


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


ENGINES: dict[str, Engine] = {
    "padded": _padded,
    "paged": paged.answer,
    "vllm": vllm.answer,
    "openai": openai.answer,
    "ray": on_ray.answer,
}
IN_PROCESS = ("padded", "paged")
"""Engines that use the model in this process."""
