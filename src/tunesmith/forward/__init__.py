"""The one fast forward: log-probabilities of labels, with the work left out that nothing depends on.

TRL's trainers ask a model for them with `model(..., labels=labels, fused_lm_head=True)`; `attach` puts this answer in
the place of TRL's own. The rows of a batch become one sequence without padding in which shared beginnings stand once
(`tree`), a token sees its own row only (`attention`), the last layer is finished and the vocabulary is asked only where
there is a label (`head`). Everything else is the model's own code, so adapters and quantised weights come along.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from tunesmith import devices
from tunesmith.errors import RecipeError, size
from tunesmith.forward import activations, adapters, attention, cuda, lookup, pairs
from tunesmith.forward.frozen import SHARE, Frozen, frozen_layers
from tunesmith.forward.head import Found, Reading, read
from tunesmith.forward.tree import Layout, Row, labelled, layout, rows_of
from tunesmith.models import decoder_layers, is_reward, is_seq2seq
from tunesmith.recipe import Training
from tunesmith.training.run import Run

COVERED = {
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gpt2",
    "llama",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
}
"""Kinds of models (`config.model_type`) of which a test shows that the result is the stock one."""
SETTINGS = {"temperature", "logit_scale", "final_logit_softcapping", "outputs"}
"""What TRL's forward knows and ours takes from it."""
UNDERSTOOD = {"input_ids", "attention_mask", "position_ids", "use_cache"}
"""Inputs without which nothing else of a batch matters."""
WORTH = 0.9
"""Share of tokens with labels from which on the last layer is finished for all."""
TRUNK = "_tunesmith_trunk"
"""Attribute of a policy with its trunk, for a method that asks for hidden states itself."""
REFERENCE = "forward of the reference"
"""Name of the decision that a reference takes the stock path where the model itself may not."""
HOOKS = "_tunesmith_rows"
"""Attribute of a model with the hooks that are set on it."""
WHOLE = {"gpt2"}
"""Kinds whose trunk wants as many tokens from its last layer as it has given to the first."""
BY_LENGTH = {"dynamic", "longrope"}
"""Kinds of rotary positions that follow the longest row, which therefore keeps its last token."""


@dataclass
class Hidden:
    """Last hidden states where they were asked for."""

    states: Tensor
    """(results, width)"""
    slots: Tensor
    """For each the number of its token in the batch, rows one after the other, padding counted."""


@dataclass
class Trunk:
    """A model below its head, run on rows without padding."""

    model: Any
    """The causal language model itself, without PEFT's wrapping."""
    say: Callable[[str], None]
    """Told, once each, why a batch took the stock path."""
    has_dropout: bool = False
    frozen: Frozen | None = None
    given: int = 0
    """Tokens of the rows that it was given in training."""
    computed: int = 0
    """Of them those that went through the layers: beginnings that rows share count once."""
    _fixed: bool = True
    _last: Any = None

    def __post_init__(self) -> None:
        self.say = cache(self.say)
        config = self.config
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        kinds = [rope, *rope.values()] if isinstance(rope, dict) else []
        self._fixed = not any(isinstance(kind, dict) and kind.get("rope_type") in BY_LENGTH for kind in kinds)
        self.has_dropout = has_dropout(self.model)
        layers = list(decoder_layers(self.model))
        for handle in getattr(self.model, HOOKS, ()):  # of an earlier training
            handle.remove()
        handles: list[Any] = [handle for layer in layers for handle in attention.held_to(layer, config)]
        handles += [*activations.keep_less(self.model.base_model), *adapters.add_in_place(self.model)]
        handles += lookup.join(self.model)
        self._last = layers[-1]
        handles.append(layers[-1].register_forward_pre_hook(_finish_kept, with_kwargs=True))
        if self.model.config.model_type in WHOLE:
            handles.append(layers[-1].register_forward_hook(_put_back, with_kwargs=True))
        setattr(self.model, HOOKS, handles)

    @property
    def config(self) -> Any:
        """The configuration that its layers read."""
        return self.model.config.get_text_config()

    def hidden(self, inputs: dict[str, Any], wanted: Tensor) -> Hidden | None:
        """The last hidden states of the tokens that `wanted` marks; None, said why, where the batch is not of the kind
        that is understood."""
        unknown = [
            n
            for n, value in inputs.items()
            if n not in UNDERSTOOD and value is not None and value is not False
        ]
        if unknown or "input_ids" not in inputs:
            self.say(f"a batch brings {', '.join(unknown) or 'no token ids'}")
            return None
        ids = inputs["input_ids"]
        rows = rows_of(
            ids, inputs.get("attention_mask"), inputs.get("position_ids"), wanted, trim=self._fixed
        )
        if rows is None:
            self.say("the mask of a batch has holes, or a label follows padding")
            return None
        if not rows:
            self.say("a batch has no label")
            return None
        plan = layout(rows, share=not (self.has_dropout and self.model.training), device=ids.device)
        if self.model.training:
            self.given += sum(len(row.ids) for row in rows)
            self.computed += plan.ids.shape[1]
        if self.frozen:
            plan = replace(plan, below=self.frozen.below(rows, plan, self._bottom))
        with attention.used_by(self.config), _stored(self._last, plan), activations.keeping():
            states = self._run(plan).last_hidden_state[0]
        if len(states) != len(plan.kept):
            states = states.index_select(0, plan.kept)
        if plan.outputs is not None:
            states = states.index_select(0, plan.outputs)
        return Hidden(states, plan.slots)

    def _run(self, plan: Layout) -> Any:
        return self.model.base_model(
            input_ids=plan.ids, position_ids=plan.positions, use_cache=False, rows=plan
        )

    def _bottom(self, row: Row) -> None:
        plan = layout([row], share=False, device=self.model.device)
        with attention.used_by(self.config):
            self._run(replace(plan, stops=True))

    def keep_frozen(self, *, most: int, full: Callable[[int], None]) -> int:
        """Keep the outputs of the frozen bottom layers, at most so many bytes; how many layers they are.

        Raises RecipeError where there are none whose outputs stay what they are.
        """
        count, why = frozen_layers(self.model)
        if not self._fixed:
            count, why = 0, "rotary positions follow the longest row"
        if not count:
            raise RecipeError(
                f"training.cache_frozen: no layer has outputs that stay what they are, since {why}.",
                fix="Leave training.cache_frozen out, or freeze the bottom layers: adapter.kind freeze.",
            )
        self.frozen = Frozen(list(decoder_layers(self.model)), count, most, full)
        getattr(self.model, HOOKS).extend(self.frozen.handles())
        return count


def has_dropout(model: nn.Module) -> bool:
    """Whether the model drops anything at random while it is trained."""
    config: Any = model.config
    return bool(
        any(isinstance(module, nn.Dropout) and module.p for module in model.modules())
        or getattr(config.get_text_config(), "attention_dropout", 0.0)
    )


@contextmanager
def _stored(last: Any, plan: Layout) -> Iterator[None]:
    """Do not run the last layer again in the backward pass where it is run on some tokens alone: the backward pass
    begins with it, so what it keeps is not held for longer than what it would compute anew."""
    before = getattr(last, "gradient_checkpointing", False)
    if not before or len(plan.kept) > WORTH * plan.ids.shape[1]:
        yield
        return
    last.gradient_checkpointing = False
    try:
        yield
    finally:
        last.gradient_checkpointing = before


class _KeysAndValues(Exception):
    """Those of a layer, reached where it would store them."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value


class _Take:
    """Stands where a layer stores keys and values, and leaves the layer with them."""

    def update(self, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """Leave."""
        raise _KeysAndValues(key, value)


class _Join:
    """Stands at the same place, and adds keys and values of other tokens to a layer's own."""

    def __init__(self, others: _KeysAndValues, order: Tensor) -> None:
        self.others, self.order = others, order

    def update(self, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """Those of all tokens, in the order of the sequence."""
        both = ((key, self.others.key), (value, self.others.value))
        joined = [torch.cat(parts, dim=2).index_select(2, self.order) for parts in both]
        return joined[0], joined[1]


def _finish_kept(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Before the last layer: run it on the tokens alone whose outputs are wanted. Of the others it gives keys and
    values."""
    rows: Layout | None = kwargs.get("rows")
    # A layer that is to be run again refuses whatever stores keys and values.
    if rows is None or len(rows.kept) > WORTH * rows.ids.shape[1] or attention.is_run_again(layer):
        return None
    given = inspect.signature(layer.forward).bind(*args, **kwargs)
    length = rows.ids.shape[1]

    def only(value: Any, places: Tensor) -> Any:
        if isinstance(value, Tensor):
            return value.index_select(1, places) if value.ndim > 1 and value.shape[1] == length else value
        if isinstance(value, tuple):
            return tuple(only(part, places) for part in value)
        return value

    def call(places: Tensor, store: Any) -> inspect.BoundArguments:
        found = inspect.BoundArguments(given.signature, type(given.arguments)())
        for name, value in given.arguments.items():
            kind = given.signature.parameters[name].kind
            found.arguments[name] = (
                {n: only(v, places) for n, v in value.items()}
                if kind is inspect.Parameter.VAR_KEYWORD
                else only(value, places)
            )
        found.arguments["past_key_values"] = store
        return found

    others = call(rows.others, _Take())
    try:
        layer.forward(*others.args, **others.kwargs)
    except _KeysAndValues as found:
        stored = _KeysAndValues(found.key, found.value)
    else:
        raise AssertionError(f"{type(layer).__name__} stores no keys and values")
    order = torch.argsort(torch.cat([rows.kept, rows.others]))
    kept = call(rows.kept, _Join(stored, order))
    return kept.args, kept.kwargs


def _put_back(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
    """Behind the last layer: the outputs of the kept tokens at their places, and zeros elsewhere."""
    rows: Layout | None = kwargs.get("rows")
    if rows is None or output.shape[1] == rows.ids.shape[1]:
        return None
    empty = output.new_zeros(1, rows.ids.shape[1], output.shape[2])
    return empty.index_copy(1, rows.kept, output)


def attach(
    trainer: Any, run: Run, training: Training, *, alike: bool | None = None, device: str | None = None
) -> bool:
    """Put the fast forward in the place of the stock one in a trainer's models, and keep in the run which one is used
    and why. Gives whether padding is computed. A plan says by `alike` and `device` whether labels weigh the same and
    what kind of device it is for, where trainer or model are not those that will be trained.

    Raises RecipeError where outputs of frozen layers are to be kept and cannot be.
    """
    say = _teller(trainer, run)
    plain = _plain(trainer.model)
    why = "as the recipe says" if training.forward == "stock" else uncovered(trainer, plain)
    if why:
        if training.cache_frozen:
            raise RecipeError(
                f"training.cache_frozen needs the fast forward, and the stock one is taken: {why}.",
                fix="Leave training.cache_frozen out.",
            )
        run.event("decision", name="forward", value="stock", reason=why)
        if training.compile:
            run.event("decision", name="compile", value="off", reason="it is of the fast forward")
        return True
    if is_seq2seq(plain):
        pairs.attach(trainer, plain, say=say, device=device)
        reason = "no padding of inputs or answers on a CPU, and the head only where it is asked"
        run.event("decision", name="forward", value="fast", reason=reason)
        if training.compile:
            why = "encoder-decoders are not compiled"
            run.event("decision", name="compile", value="off", reason=why)
        return (device or plain.device.type) != "cpu"
    from trl import SFTTrainer

    if hasattr(trainer, "likelihoods_only"):
        trainer.likelihoods_only = True
    trunks = []
    references = (getattr(trainer, name, None) for name in ("ref_model", "reference"))
    for model in (plain, *(_plain(m) for m in references if m is not None)):
        with _beneath_precision(trainer, model):
            if model is not plain and (why := uncovered(trainer, model)):
                run.event("decision", name=REFERENCE, value="stock", reason=why)
            elif is_reward(model):
                trunks.append(score_quickly(model, say=say))
            elif hasattr(trainer.model, "policy"):
                trunks.append(Trunk(model, say))
                setattr(model, TRUNK, trunks[-1])
            else:
                same = isinstance(trainer, SFTTrainer) if alike is None else alike
                trunks.append(quicken(model, alike=same, say=say, device=device))
    if training.compile:
        _compile(trunks, trainer, run)
    if training.cache_frozen:
        _cache(trunks[0], trainer, run)
    reason = "no padding, shared beginnings once, the last layer and the head only where they are asked"
    if has_dropout(plain):
        reason += "; beginnings are not shared while training, as dropout draws differ"
    run.event("decision", name="forward", value="fast", reason=reason)
    trainer.add_callback(_Sharing(trunks, run))
    if told := cuda.told(plain, trainer.args):
        run.event("decision", name="attention kernel", value=told[0], reason=told[1])
    return False


class _Sharing(TrainerCallback):  # type: ignore[misc]
    """Tells, when a training ends, how many tokens stood in beginnings that rows share."""

    def __init__(self, trunks: list[Trunk], run: Run) -> None:
        self.trunks, self.run = trunks, run

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell, where there were any."""
        given = sum(trunk.given for trunk in self.trunks)
        saved = given - sum(trunk.computed for trunk in self.trunks)
        if saved:
            why = (
                f"{saved:,} of {given:,} tokens stood in the beginning of another row of their batch, and were not "
                "computed again"
            )
            self.run.event(
                "decision", step=state.global_step, name="shared beginnings", reason=why,
                value=f"{saved / given:.0%} of the tokens",
            )  # fmt: skip


def _teller(trainer: Any, run: Run) -> Callable[[str], None]:
    """What keeps in the run why a batch took the stock path."""

    def say(why: str) -> None:
        run.event(
            "warning",
            step=trainer.state.global_step,
            message=f"The stock forward was taken for a batch, which is slower: {why}.",
        )

    return say


@contextmanager
def lent(trainer: Any, model: Any, run: Run) -> Iterator[None]:
    """The fast forward for a while, where it covers the model: for likelihoods that are worked out before training. The
    run is told where it is not taken."""
    plain = _plain(model)
    with _beneath_precision(trainer, plain):
        if why := uncovered(trainer, plain):
            run.event("decision", name=REFERENCE, value="stock", reason=why)
            yield
            return
        theirs = plain.forward
        quicken(plain, alike=False, say=_teller(trainer, run))
        try:
            yield
        finally:
            plain.forward = theirs
            for handle in plain.__dict__.pop(HOOKS):
                handle.remove()


@contextmanager
def _beneath_precision(trainer: Any, model: Any) -> Iterator[None]:
    """Take off what accelerate has laid around the forward of a model that it has prepared, as TRL has a reference
    prepared under mixed precision; afterwards it lies around whatever forward the model has."""
    bare = vars(model).pop("_original_forward", None)
    if bare is None:
        yield
        return
    model.forward = bare
    try:
        yield
    finally:
        inner = model.forward

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            with trainer.accelerator.autocast():
                return inner(*args, **kwargs)

        forward.__signature__ = inspect.signature(inner)  # type: ignore[attr-defined]
        model.forward = types.MethodType(forward, model)


def _compile(trunks: list[Trunk], trainer: Any, run: Run) -> None:
    from tunesmith.forward import compiling

    if trainer.args.gradient_checkpointing:  # `Training.compiles`
        why: str | None = "it does not go with layers that are run again in the backward pass"
    elif why := compiling.missing(trunks[0].model.device):
        why = f"nothing can be compiled here: {why}"
    if why:
        run.event("decision", name="compile", value="off", reason=why)
        return
    for trunk in trunks:
        getattr(trunk.model, HOOKS).extend(compiling.compile_layers(trunk.model))
    why = "as the recipe says: what the layers compute around the attention, for lengths that change"
    run.event("decision", name="compile", value="on", reason=why)


def _cache(trunk: Trunk, trainer: Any, run: Run) -> None:
    most = int(SHARE * (devices.available() - devices.resident()))

    def full(rows: int) -> None:
        why = f"they take {size(most)}; the frozen layers are run anew for all other rows"
        run.event("decision", step=trainer.state.global_step, name="cached rows", value=rows, reason=why)

    count = trunk.keep_frozen(most=most, full=full)
    width, itemsize = trunk.config.hidden_size, trunk.model.dtype.itemsize
    why = (
        f"as the recipe says; their outputs are kept in memory, {width * itemsize:,} bytes a token, "
        f"{size(most)} at most"
    )
    run.event("decision", name="cache_frozen", value=f"{count} layers", reason=why)


def uncovered(trainer: Any, model: Any) -> str | None:
    """Why a trainer's model has to take the stock path; None where it need not."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    kind = model.config.model_type
    if is_seq2seq(model):
        if why := pairs.uncovered(model):
            return why
    elif kind not in COVERED:
        return f"models of the kind {kind} are not covered"
    elif (
        not hasattr(trainer.model, "policy")
        and not is_reward(model)
        and not _settings(model).keys() >= SETTINGS
    ):
        return "this method asks its model for more than log-probabilities"
    if getattr(model.config.get_text_config(), "use_bidirectional_attention", None):
        return "tokens see what follows them"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "weights are spread over processes"
    if trainer.args.neftune_noise_alpha:
        return "NEFTune's noise is measured by the length of padded rows"
    if not is_reward(model):
        head = model.get_output_embeddings()
        if isinstance(head, BaseTunerLayer):
            return "the head has an adapter"
        if not isinstance(head, nn.Linear | ModulesToSaveWrapper):
            return f"the head is a {type(head).__name__}, not a product with a table"
    asked = model.config.get_text_config()._attn_implementation_internal
    if asked not in ("sdpa", "eager", "flash_attention_2"):
        return f"the attention {asked} was asked for"
    return None


def _plain(model: Any) -> Any:
    """The model itself: of a policy with its value the policy, of a model with an adapter what is beneath."""
    model = getattr(model, "policy", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _settings(model: Any) -> dict[str, Any]:
    """What TRL keeps for the forward that it has given a model; nothing where it has given none."""
    function = getattr(model.forward, "__func__", None)
    return dict(inspect.getclosurevars(function).nonlocals) if function else {}


def quicken(model: Any, *, alike: bool, say: Callable[[str], None], device: str | None = None) -> Trunk:
    """Have a model that TRL has given its head answer the same in our way, with TRL's own settings.

    `alike` says that every label of a batch weighs the same in the loss. `say` is told, once each, why single batches
    took the stock path. `device` is the kind that a hollow model is planned for.
    """
    theirs, facts = model.forward, _settings(model)
    reading = Reading(
        temperature=facts["temperature"],
        scale=facts["logit_scale"],
        softcap=facts["final_logit_softcapping"],
        outputs=tuple(facts["outputs"]),
        alike=alike,
        device=device,
    )
    trunk = Trunk(model, say)

    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        asked = {"labels": labels, "num_items_in_batch": num_items_in_batch}
        given = {name: value for name, value in asked.items() if value is not None}
        if not fused_lm_head:
            return theirs(*args, **given, **kwargs)
        found = None
        if labels is None or args:
            trunk.say("a batch brings no labels of its own")
        else:
            found = trunk.hidden(kwargs, labelled(labels))
        if found is None:
            return theirs(*args, fused_lm_head=True, **given, **kwargs)
        assert labels is not None
        return _answer(trunk.model, found, labels, reading, num_items_in_batch)

    forward.__signature__ = inspect.signature(theirs.__func__)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
    return trunk


def _answer(model: Any, hidden: Hidden, labels: Tensor, reading: Reading, num_items: Any) -> Any:
    """Per-token results in TRL's form: `(rows, tokens - 1)`, zero where there is no label."""
    from trl.trainer.utils import FusedCausalLMOutput

    head = model.get_output_embeddings()
    width = labels.shape[1]
    targets = labels.reshape(-1)[hidden.slots + 1]
    found: Found = read(hidden.states, head.weight, head.bias, targets, reading)
    places = hidden.slots - hidden.slots // width

    def spread(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        empty = values.new_zeros(labels.shape[0] * (width - 1))
        return empty.index_copy(0, places, values).view(labels.shape[0], width - 1)

    log_probs = spread(found.log_probs)
    assert log_probs is not None
    mask = labels[:, 1:] != -100
    items = mask.sum().clamp(min=1) if num_items is None else num_items
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / items,
        log_probs=log_probs,
        entropy=spread(found.entropy),
        log_sum_sq_probs=spread(found.log_sum_sq_probs),
        mean_logits=spread(found.mean_logits),
        is_top1=spread(found.is_top1),
        label_mask=mask,
    )


def score_quickly(model: Any, *, say: Callable[[str], None]) -> Trunk:
    """Have a reward model finish its last layer only for the tokens that its scores are read at."""
    from transformers.modeling_outputs import SequenceClassifierOutputWithPast

    theirs = model.forward
    trunk = Trunk(model, say)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # TRL gives the model the margins of pairs as well, which it has no use for.
        inputs = {name: value for name, value in kwargs.items() if name not in ("margin", "return_dict")}
        ids, pad = inputs.get("input_ids"), trunk.config.pad_token_id
        found = None
        if args or ids is None or pad is None or kwargs.get("return_dict") is False:
            trunk.say("a batch brings no token ids by name, nothing pads, or a tuple is asked for")
        else:
            places = torch.arange(ids.shape[1], device=ids.device)
            last = (places * (ids != pad)).argmax(1, keepdim=True)
            found = trunk.hidden(inputs, torch.zeros_like(ids, dtype=torch.bool).scatter_(1, last, True))
        if found is None:
            return theirs(*args, **kwargs)
        rows = torch.argsort(found.slots)
        return SequenceClassifierOutputWithPast(logits=trunk.model.score(found.states.index_select(0, rows)))

    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
    return trunk
