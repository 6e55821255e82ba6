"""Bytes by part in each stage of a run: what a traced step holds, and what is held around it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tunesmith import devices, parallel
from tunesmith.devices import DeviceFacts
from tunesmith.estimate.micro_batches import Rows
from tunesmith.estimate.step import KEPT_TRACES, STATES, Parts, Traced, undisturbed, written_at
from tunesmith.heap import most_held
from tunesmith.recipe import PPO, DeepSpeed, LoRA, Model, Recipe


def most_of(stages: Mapping[str, Parts]) -> int:
    """Bytes of the stage that takes the most."""
    return max((sum(parts.values()) for parts in stages.values()), default=0)


def stages(
    traced: Traced,
    recipe: Recipe,
    facts: DeviceFacts,
    *,
    process: int,
    evaluation: Mapping[str, Parts] | None = None,
    writing: Parts | None = None,
    outputs: int = 0,
    processes: int = 1,
    per_node: int = 1,
    lower: bool = False,
) -> dict[str, Parts]:
    """Bytes by part in each stage of a run that holds memory; in one of its processes where these are several, of which
    `per_node` share a machine. `evaluation` is what measuring takes by stage, `writing` answers that are trained on,
    `outputs` what is kept of frozen layers. `lower` as in `parallel.held`."""
    on_cpu = facts.kind == "cpu"
    fixed = {"process": process} if on_cpu else {"reserved": facts.reserved}
    whole, optimizer = fixed, traced.states
    if outputs and on_cpu:  # a GPU's are kept in the machine's memory
        fixed = {**fixed, "outputs": outputs}
    step = dict(traced.step)
    if recipe.training.gradient_accumulation_steps > 1:
        step["gradients"] = traced.trained
    # One matrix after the other on a CPU; on others all of them at once, unless it is one kernel.
    together = not on_cpu and recipe.training.optimizer == "adamw_torch"
    is_fused = recipe.training.optimizer == "adamw_torch_fused"
    moving = 0 if is_fused else traced.trained if together else 2 * traced.largest
    found: dict[str, dict[str, int]] = {
        "training": {**fixed, "weights": traced.weights, "optimizer": optimizer, **step},
        "updating": {
            **fixed, "weights": traced.weights, "gradients": traced.trained, "optimizer": optimizer + moving,
        },
        "saving": {
            **fixed, "weights": traced.weights, "optimizer": optimizer, "save": traced.saved if on_cpu else 0,
        },
    }  # fmt: skip
    if traced.validation:
        found["validating"] = {
            **fixed, "weights": traced.weights, "optimizer": optimizer, "evaluation": traced.validation,
        }  # fmt: skip
    if writing:
        found["writing"] = {**fixed, **writing, "weights": traced.weights, "optimizer": optimizer}
    tuned = traced.saved if isinstance(recipe.adapter, LoRA) else 0
    for name, parts in (evaluation or {}).items():
        found[name] = {**whole, **parts, "weights": parts["weights"] + tuned}
    replayed = None
    if on_cpu:
        asked = (
            recipe.training.gradient_accumulation_steps,
            {8.0: 2, 0.0: 0}.get(STATES[recipe.training.optimizer], 1),
            0 if is_fused else 2,
        )
        if asked not in traced.replayed:
            passes, states, places = asked
            traced.replayed[asked] = most_held(traced.blocks, passes=passes, states=states, moving=places)
        replayed = traced.replayed[asked]
    for name, parts in found.items():
        loose = sum(
            parts.get(part, 0) for part in ("gradients", "activations", "head", "evaluation", "cache")
        )
        spread = SPREAD[facts.kind] * loose
        if replayed and name in ("training", "updating"):
            spread = max(replayed[name == "updating"] - loose - parts["optimizer"], 0)
        parts["spread"] = int(spread)
    alone = parallel.Model(
        traced.weights, traced.trained, traced.states, traced.layer, traced.rest, traced.packed
    )
    held: dict[str, Parts] = {
        name: {part: size for part, size in parts.items() if size}
        if processes == 1
        else parallel.held(
            recipe.parallel,
            alone,
            parts,
            processes=processes,
            capacity=facts.memory,
            lower=lower,
            device=facts.kind,
        )
        for name, parts in found.items()
    }
    if processes > 1 and (on_cpu or (isinstance(recipe.parallel, DeepSpeed) and recipe.parallel.stage == 3)):
        # Every process reads the whole model; on a GPU ZeRO's third stage does so before it cuts it.
        held["loading"] = {**whole, "weights": traced.weights}
    if processes > 1 and on_cpu and evaluation:
        # The first process alone answers, in the memory that all of them share: its part of each process's room.
        among = max(per_node, 1)
        for stage in evaluation:
            held[stage] = {
                **whole,
                **{name: b // among for name, b in held[stage].items() if name not in whole},
            }
    return held


MEASURING = ("answering", "scoring")
"""Stages in which the models are measured, each alone."""
SPREAD = {"cpu": 0.03, "cuda": 0.03, "mps": 0.05}
"""What an allocator keeps beyond what is alive, as a share of what comes and goes, where it is not asked (`heap`)."""


def measuring(
    recipe: Recipe, rows: Rows, *, facts: DeviceFacts, dtype: str
) -> tuple[dict[str, Parts], list[str]]:
    """Bytes that writing answers to the held-out questions takes, and scoring theirs, by stage and part; and what is
    not known. Base and tuned model are loaded for it one after the other, in whole weights, whatever the training
    packs."""
    from tunesmith.evaluation import tokens_together
    from tunesmith.generation import length_batches
    from tunesmith.methods import METHODS

    questions = questions_asked(recipe, rows)
    if not questions or recipe.evaluation.engine in ("vllm", "openai"):
        return {}, []
    method = METHODS[recipe.method.kind]
    if method.head or method.model != "causal":
        return {}, [
            "measuring the models is not part of the memory figures: it is not traced for this method"
        ]
    new, tokens = recipe.evaluation.max_new_tokens, recipe.evaluation.batch_tokens
    model = recipe.model, written_at(recipe.model), facts.kind, dtype
    # As far as they are known; what is not is taken to be as the longest row, and to be all answer.
    scored = dict(enumerate(rows.scored or [(max(rows.lengths), 0)] * questions))
    # Batches as they are written and scored in, each by its size as it is traced.
    writing = length_batches({n: max(before, 1) + new for n, (_, before) in scored.items()}, tokens=tokens)
    written = [(len(batch), max(max(scored[n][1], 1) for n in batch), new) for batch in writing]
    scoring = length_batches(
        {n: whole for n, (whole, _) in scored.items()},
        tokens=tokens_together(tokens, _number(*model[:2], "vocab_size", 1)),
    )
    read = []
    for batch in scoring:
        wholes, begins = zip(*(scored[n] for n in batch), strict=True)
        width = max(wholes)
        read.append((len(batch), width, max(width - min(begins), 1), sum(wholes) - sum(begins)))
    return {
        "answering": dict(_answering(*model, max(written, key=lambda size: size[0] * size[1]))),
        "scoring": dict(_scoring(*model, max(read, key=lambda size: size[0] * size[2]))),
    }, []


def drawing(recipe: Recipe, rows: Rows, *, facts: DeviceFacts, dtype: str) -> Parts:
    """Bytes that writing the answers takes which a step learns from, by part; none where a method writes none. The
    model is the one in training."""
    if not rows.answers:
        return {}
    training, width = recipe.training, max(rows.lengths)
    count = training.per_device_train_batch_size * training.gradient_accumulation_steps
    if isinstance(recipe.method, PPO):
        count = max(min(count, recipe.method.generation_batch_tokens // (width + rows.answers)), 1)
    sizes = count, width, rows.answers
    return dict(_answering(recipe.model, written_at(recipe.model), facts.kind, dtype, sizes))


def kept_outputs(
    recipe: Recipe, rows: Rows, width: int, *, facts: DeviceFacts, dtype: str, steps: int, used: int
) -> int:
    """Bytes of the outputs of frozen layers that are kept: of every row that comes within so many steps, up to the
    share of the memory beyond `used` bytes that they may take."""
    if not recipe.training.cache_frozen:
        return 0
    from tunesmith.forward.frozen import SHARE

    training = recipe.training
    come = min(
        steps * training.per_device_train_batch_size * training.gradient_accumulation_steps, len(rows.lengths)
    )
    tokens = sum(rows.lengths) * come // max(len(rows.lengths), 1) + sum(rows.validation)
    asked = tokens * width * (4 if dtype == "float32" else 2)
    free = facts.memory - used if facts.kind == "cpu" else devices.available() - devices.resident()
    return max(min(asked, int(SHARE * free)), 0)


def questions_asked(recipe: Recipe, rows: Rows) -> int:
    """How many questions each model is measured by."""
    if recipe.evaluation.skip:
        return 0
    return min(rows.questions, recipe.evaluation.max_items or rows.questions)


@contextmanager
def _outlined(
    section: Model, kind: str, dtype: str, shape: tuple[int, int]
) -> Iterator[tuple[Any, Callable[..., Any], int]]:
    """A count of what the whole model holds, without weights; the model on rows of some width, with as few logits as it
    can; and the bytes of its weights."""
    import torch

    from tunesmith import models
    from tunesmith.tracing import counting

    with undisturbed():
        model = models.outline(
            section.base, revision=section.revision, dtype=dtype, attention=section.attention
        ).eval()
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.ones(*shape, dtype=torch.long)

        def run(logits: int, **options: Any) -> Any:
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **options}
            try:
                return model(**given, logits_to_keep=logits)
            except TypeError:  # a model that cannot leave logits out
                return model(**given)

        with torch.no_grad(), counting(vocabulary=vocabulary, kernel=kind) as count:
            weights = count.known([*model.parameters(), *model.buffers()])
            yield count, run, weights


@functools.lru_cache(KEPT_TRACES)
def _answering(section: Model, changed: int, kind: str, dtype: str, sizes: tuple[int, int, int]) -> Parts:
    """Bytes that a batch of rows, a question's width and new tokens takes, by part."""
    rows, width, new = sizes
    with _outlined(section, kind, dtype, (rows, width)) as (count, run, weights):
        out = run(1, use_cache=True)
        most, _ = count.live()
        del out.logits
        cache, _ = count.live(count.clock)
    grown = cache * (width + new) / width
    # A layer's keys and values are there twice while a token is joined to them.
    cached = int(grown * (1 + 1 / _number(section, changed, "num_hidden_layers", 1)))
    return {"weights": weights, "cache": cached, "evaluation": max(most - cached, 0)}


@functools.lru_cache(KEPT_TRACES)
def _scoring(section: Model, changed: int, kind: str, dtype: str, sizes: tuple[int, int, int, int]) -> Parts:
    """Bytes that the likelihoods of a batch of rows of some width take, of whose last columns logits are asked for, and
    likelihoods of so many tokens of them."""
    import torch

    from tunesmith.evaluation import copied_together

    rows, width, asked, answered = sizes
    with _outlined(section, kind, dtype, (rows, width)) as (count, run, weights):
        logits = run(asked, use_cache=False).logits
        few = max(min(copied_together(logits.shape[-1]), answered), 1)
        values = logits.flatten(0, 1)[:few].to(torch.float32, copy=True)
        wanted = torch.zeros(len(values), dtype=torch.long, device=values.device)
        torch.nn.functional.cross_entropy(values, wanted, reduction="none")
        most, _ = count.live()
    return {"weights": weights, "evaluation": most}


@functools.lru_cache(KEPT_TRACES)
def _number(section: Model, changed: int, name: str, least: int) -> int:
    """A number of the model's configuration."""
    from tunesmith import models

    config = models.configuration(section.base, section.revision).get_text_config()
    return max(int(getattr(config, name, least)), least)
