"""From layers to one recipe: defaults < task < preset < file < flags, merged sparse, validated once.

A layer holds only what it sets, so a preset never wipes a task's value with a default of its own.
Our task files keep settings for an adapter that is not chosen yet under its kind
(`adapter: {lora: {rank: 16}}`); they apply when that kind is chosen.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from tunesmith.catalog import above
from tunesmith.catalog import notes as catalog_notes
from tunesmith.errors import RecipeError, closest, nearest
from tunesmith.recipe import (
    DPO,
    KTO,
    PRINCIPAL,
    DataSource,
    Freeze,
    LoRA,
    Recipe,
    Task,
    fields,
    sections_of,
)

Layer = dict[str, Any]

TASKS: tuple[str, ...] = get_args(Task)


@dataclass(frozen=True)
class Composition:
    """A recipe and what was decided while composing it."""

    recipe: Recipe
    notes: tuple[str, ...] = ()


def compose(
    flags: Mapping[str, Any] | None = None,
    *,
    file: Path | None = None,
    preset: str | None = None,
) -> Composition:
    """The recipe that results from a task, a preset, a file and flags, each sparse.

    `flags` is nested like the recipe (`{"training": {"learning_rate": 2e-5}}`). Raises RecipeError with
    every problem found, not only the first.
    """
    merged, notes = layered(flags, file=file, preset=preset)
    return Composition(validated(merged), (*notes, *_unnamed(merged), *catalog_notes(merged.get("data"))))


def _unnamed(merged: Layer) -> list[str]:
    """A note where no layer names a data set, so that nobody trains on the shipped one without knowing."""
    if "dataset" in (merged.get("data") or {}):
        return []
    default = Recipe().data.dataset
    return [
        f"No data set was named, so the shipped {default} is used: --dataset, or data.dataset in a recipe, takes a "
        "file or folder of yours, a Hub id, or a name of `tunesmith show catalog`."
    ]


def layered(
    flags: Mapping[str, Any] | None = None, *, file: Path | None = None, preset: str | None = None
) -> tuple[Layer, list[str]]:
    """All layers as one that nobody has checked yet, and notes on what a choice made moot.

    Raises RecipeError for a task, a preset or a kind that is not there.
    """
    flag_layer = dict(flags or {})
    file_layer = read_layer(file) if file else {}
    preset = preset or flag_layer.get("preset") or file_layer.get("preset")
    task = flag_layer.get("task") or file_layer.get("task") or "custom"
    if task not in TASKS:
        raise RecipeError(f"There is no task '{task}'.", fix=nearest(str(task), TASKS))
    layers = [("task " + task, preset_layer(task))]
    if preset:
        known = [name for name in preset_names() if name not in TASKS]
        if preset not in known:
            raise RecipeError(f"There is no preset '{preset}'.", fix=nearest(str(preset), known))
        layers.append(("preset " + preset, preset_layer(preset)))
        flag_layer["preset"] = preset
    layers += [(str(file), file_layer), ("the command line", flag_layer)]
    layers[1:1] = method_layers(layers)
    layers = _for_data_set(layers)
    return merge(layers)


def method_layers(layers: list[tuple[str, Layer]]) -> list[tuple[str, Layer]]:
    """What the chosen method sets before presets, file and flags do: its learning rate, where it has one."""
    chosen = {
        name: next(
            (
                layer[name]["kind"]
                for _, layer in reversed(layers)
                if isinstance(layer.get(name), Mapping) and "kind" in layer[name]
            ),
            None,
        )
        for name in ("method", "adapter")
    }
    rates = getattr(union_members("method").get(str(chosen["method"])), "learning_rates", None)
    if not rates:
        return []
    rate = rates[str(chosen["adapter"]) in ("lora", "qlora")]
    return [(f"method {chosen['method']}", {"training": {"learning_rate": rate}})]


def merge(layers: list[tuple[str, Layer]]) -> tuple[Layer, list[str]]:
    """One sparse layer from many, later ones winning, and notes on settings that a choice made moot."""
    merged: Layer = {}
    for _, layer in layers:
        merged = _overlaid(merged, layer)
    notes: list[str] = []
    for name, field in Recipe.model_fields.items():
        if field.discriminator and isinstance(merged.get(name), dict):
            parts = [(who, layer[name]) for who, layer in layers if isinstance(layer.get(name), dict)]
            merged[name], dropped = _union(name, parts)
            notes += dropped
    return merged, notes


def _for_data_set(layers: list[tuple[str, Layer]]) -> list[tuple[str, Layer]]:
    """The layers, with what those below the one that names the data set say without meaning this set left out."""
    data = [layer.get("data") for _, layer in layers]
    naming = [n for n, part in enumerate(data) if isinstance(part, dict) and "dataset" in part]
    if not naming:
        return layers
    top = naming[-1]
    name = layers[top][1]["data"]["dataset"]
    return [
        (who, {**layer, "data": above(layer["data"], name)})
        if n < top and isinstance(layer.get("data"), dict)
        else (who, layer)
        for n, (who, layer) in enumerate(layers)
    ]


def _overlaid(lower: Layer, upper: Mapping[str, Any]) -> Layer:
    result = dict(lower)
    for key, value in upper.items():
        below = result.get(key)
        result[key] = (
            _overlaid(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
        )
    return result


def _union(name: str, parts: list[tuple[str, Layer]]) -> tuple[Layer, list[str]]:
    """Resolve one tagged union: the last kind named wins; fields it does not have fall away if they
    came from a lower layer than the kind itself, and stay (to be refused) if they came from above."""
    members = union_members(name)
    default = Recipe.model_fields[name].get_default()
    kind, chosen_at = default.kind, -1
    for level, (_, part) in enumerate(parts):
        if "kind" in part:
            kind, chosen_at = part["kind"], level
    if not isinstance(kind, str) or kind not in members:
        raise RecipeError(f"There is no {name} '{kind}'.", fix=nearest(str(kind), members))
    allowed = set(members[kind].model_fields)
    by_kind: Layer = {}
    fields: Layer = {}
    notes: list[str] = []
    for level, (who, part) in enumerate(parts):
        for key, value in part.items():
            if key in members and isinstance(value, dict):
                if issubclass(members[kind], members[key]):
                    by_kind |= value
            elif key == "kind" or key in allowed or level >= chosen_at:
                fields[key] = value
            else:
                notes.append(f"{name}.{key} from {who} has no effect with {name} '{kind}' and was left out.")
    return {**by_kind, **fields, "kind": kind}, notes


def union_members(name: str) -> dict[str, type[BaseModel]]:
    """The sections a tagged union of the recipe can be, by kind."""
    annotation = Recipe.model_fields[name].annotation
    return {member.model_fields["kind"].default: member for member in get_args(annotation) or (annotation,)}


_PASSWORD = re.compile(
    r"://[^/\s@]*:[^/\s@]+@|https?://[^/?#\s@]+@"
    r"|://\S*[?&][^=&\s]*(signature|sig|sas|token|jwt|secret|password|credentials?|auth|key)=[^&\s]",
    re.IGNORECASE,
)
"""A password before the host, or what may be one: a user's name there, a signed address."""


def check_passwords(value: Any, path: str) -> None:
    """Raises RecipeError, without the value, where an address has a password in it: a recipe is kept and shown."""
    if isinstance(value, str) and _PASSWORD.search(value):
        raise RecipeError(
            f"{path} has a password in its address, and a recipe is no place for one.",
            fix="Remove it; log in with the service's own command, or name an environment variable (api_key_env).",
        )
    if isinstance(value, Mapping):
        for name, inner in value.items():
            check_passwords(inner, f"{path}.{name}".removeprefix("."))
    elif isinstance(value, list | tuple):
        for inner in value:
            check_passwords(inner, path)


def validated(layer: Mapping[str, Any]) -> Recipe:
    """A recipe from a merged layer; all its problems in one RecipeError."""
    check_passwords(layer, "")
    layer = _of_kinds(layer)
    try:
        recipe = Recipe.model_validate(layer)
    except ValidationError as error:
        # A value that fits no member of a union is told once per member: one problem for us.
        problems = list(dict.fromkeys(_problem(e, layer) for e in error.errors()))
        raise RecipeError(
            "The recipe does not fit." if len(problems) > 1 else problems[0],
            found="\n         ".join(problems) if len(problems) > 1 else None,
            fix="`tunesmith show recipe` lists every field with its meaning.",
        ) from None
    check_together(recipe)
    return recipe


# What does not go together


@dataclass(frozen=True)
class Conflict:
    """Options of a recipe that exclude one another, or one that has no effect beside the others."""

    field: str
    """The one to leave out, by its path."""
    problem: str
    fix: str


def check_together(recipe: Recipe) -> None:
    """Raises RecipeError for options that do not go together, all of them at once."""
    found = conflicts(recipe)
    if len(found) == 1:
        raise RecipeError(found[0].problem, fix=found[0].fix)
    if found:
        raise RecipeError(
            "The recipe does not fit.",
            found="\n         ".join(conflict.problem for conflict in found),
            fix=" ".join(dict.fromkeys(conflict.fix for conflict in found)),
        )


def conflicts(recipe: Recipe) -> list[Conflict]:
    """What of a recipe does not go together, as far as that is seen without model, data and machine.

    What needs those is refused when they are known, before the first step (`api`).
    """
    return [found for look in (_rows, _kept_outputs, _reference) for found in look(recipe)]


def _rows(recipe: Recipe) -> Iterator[Conflict]:
    """How rows come together."""
    method, training = recipe.method, recipe.training
    if recipe.data.packing and not method.can_pack:
        yield Conflict(
            "data.packing",
            f"data.packing has no effect with the method '{method.kind}': its rows stay rows of their own.",
            "Leave data.packing out.",
        )
    if training.batches == "by_length" and (recipe.data.packing or not method.any_order):
        fixed = (
            "packed rows are all of about one length"
            if recipe.data.packing
            else f"'{method.kind}' has its own order"
        )
        yield Conflict(
            "training.batches",
            f"training.batches by_length has no effect here: {fixed}.",
            "Leave training.batches out.",
        )
    if isinstance(method, KTO) and method.loss == "kto" and training.per_device_train_batch_size < 2:
        yield Conflict(
            "training.per_device_train_batch_size",
            "KTO needs training.per_device_train_batch_size of at least 2, and it is 1: it estimates how far the model "
            "has moved from each prompt with another answer of the batch.",
            "Raise it and lower gradient_accumulation_steps, or use --set method.loss=apo_zero_unpaired.",
        )


def _kept_outputs(recipe: Recipe) -> Iterator[Conflict]:
    """Why `training.cache_frozen` has nothing to keep, as far as that is seen without the model. An adapter on modules
    that are named may leave bottom layers free of it."""
    if not recipe.training.cache_frozen:
        return
    fix = "Leave training.cache_frozen out."
    match recipe.adapter:
        case Freeze() | LoRA(targets=list()):
            why = None
        case LoRA():
            why = f"with adapter.kind {recipe.adapter.kind} an adapter sits in every layer"
        case _:
            why = f"with adapter.kind {recipe.adapter.kind} every layer is trained"
    if recipe.method.draws:
        said = (
            f"has no effect with the method '{recipe.method.kind}': it learns from answers that are drawn anew in each "
            "step, whose rows never come back"
        )
    elif recipe.method.kind == "seq2seq":
        said = "is not for encoder-decoders: nothing of theirs is kept"
    elif recipe.training.forward == "stock":
        said = "needs the fast forward, and training.forward is stock"
    elif getattr(recipe.method, "neftune_noise_alpha", None):
        said = "needs the fast forward, which method.neftune_noise_alpha does without"
    elif why:
        said = f"has nothing to keep: {why}"
        fix = "Leave training.cache_frozen out, or freeze the bottom layers: --freeze-ratio."
    else:
        return
    yield Conflict("training.cache_frozen", f"training.cache_frozen {said}.", fix)


def _reference(recipe: Recipe) -> Iterator[Conflict]:
    """Where the likelihoods of a reference come from."""
    section, adapter = recipe.method, recipe.adapter
    if not isinstance(section, DPO | KTO):
        return
    wanted, is_adapter = section.reference, isinstance(adapter, LoRA)
    said = None
    if wanted == "copy" and is_adapter:
        said = "copy is a second copy of the weights, which an adapter makes needless"
        fix = (
            "Leave it out: the model with its adapter off is the same reference. `precomputed` works as well."
        )
    elif wanted == "adapter_off" and not is_adapter:
        said = f"adapter_off needs an adapter, and the adapter is '{adapter.kind}'"
        fix = "Add --lora, or choose copy or precomputed."
    elif wanted == "adapter_off" and isinstance(adapter, LoRA) and adapter.init in PRINCIPAL:
        said = (
            f"adapter_off does not go with adapter.init {adapter.init}, which changes the weights beneath it"
        )
        fix = "Leave method.reference out; it is precomputed then."
    if said:
        yield Conflict("method.reference", f"method.reference {said}.", fix)
    if isinstance(adapter, LoRA) and adapter.bias != "none":
        yield Conflict(
            "adapter.bias",
            f"adapter.bias {adapter.bias} does not go with the method '{section.kind}': trained biases are no part of "
            "the adapter, so the reference would change with them.",
            "Leave adapter.bias out, or train without an adapter.",
        )


def _of_kinds(layer: Mapping[str, Any]) -> Layer:
    """The layer with every union of a kind: where it is left open, of the default kind."""
    return {
        name: {"kind": Recipe.model_fields[name].get_default().kind, **part}
        if name in Recipe.model_fields
        and Recipe.model_fields[name].discriminator
        and isinstance(part, Mapping)
        else part
        for name, part in layer.items()
    }


def faults(layer: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with a merged layer, by the path of the field that it is about, for those who show it there.

    What is about no single field stands under its section's name. `validated` raises the same in one error.
    """
    layer = _of_kinds(layer)
    try:
        return {found.field: found.problem for found in conflicts(Recipe.model_validate(layer))}
    except ValidationError as error:
        found: dict[str, str] = {}
        for fault in error.errors():
            if fault["type"] == "value_error" and str(fault["loc"][0]) in _sections():
                where, said = _accused(fault)
            else:
                where, said = ".".join(_path(fault)), _problem(fault, layer)
            found.setdefault(where, said)
        known = {fact.path for fact in fields()} | {f"{name}.kind" for name in _sections()}
        return {
            next((w for w in _ends(where) if w in known), where.split(".")[0]): said
            for where, said in reversed(found.items())
        }


def _ends(path: str) -> list[str]:
    """A path, and those it lies in: `a.b.c`, `a.b`, `a`."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _accused(fault: Any) -> tuple[str, str]:
    """The field that a section's own check names first, and what it says."""
    path, said = ".".join(_path(fault)), str(fault["msg"]).removeprefix("Value error, ")
    names = {fact.path.removeprefix(f"{path}.") for fact in fields() if fact.path.startswith(f"{path}.")}
    words = re.findall(r"[a-z_0-9]+", said.replace(f"{path}.", ""))
    named = next((word for word in words if word in names), None)
    return (f"{path}.{named}" if named else path), said


def _path(fault: Any) -> list[str]:
    """Where a fault is, without the union's member, which is no part of the field's name."""
    path = [str(part) for part in fault["loc"]]
    top = Recipe.model_fields.get(path[0])
    if top and top.discriminator and len(path) > 1:
        del path[1]
    return path


def _problem(error: Any, layer: Mapping[str, Any]) -> str:
    path = _path(error)
    if error["type"] == "extra_forbidden":
        return _unknown(path, layer)
    value = error.get("input")
    section = ".".join(path)
    if section in _sections() and not isinstance(value, Mapping):
        return _no_section(section, value)
    types = {fact.path: fact.type for fact in fields()}
    # What follows a field's own name is the member of its union, or the place in its list.
    field = next((".".join(path[:n]) for n in range(len(path), 0, -1) if ".".join(path[:n]) in types), None)
    if field is None or (types[field] == "list of data sources" and field != section):
        return f"{section}: {error['msg']}; found {value!r}."
    words = str(error["msg"])
    limit = words.removeprefix("Input should be ")
    if limit != words and limit.startswith(("greater", "less")):
        return f"{field} has to be {limit}; found {value!r}."
    if error["type"] == "value_error":
        return f"{field}: {words.removeprefix('Value error, ')}; found {value!r}."
    given: Any = layer
    for part in field.split("."):
        given = given.get(part) if isinstance(given, Mapping) else None
    takes = " or ".join(
        f"a {part}" if part.startswith(("number", "whole number", "list of")) else part
        for part in types[field].split(" | ")
        if part != "null"
    )
    near = closest(given, types[field].split(" | ")) if isinstance(given, str) else None
    return f"{field} takes {takes}; found {given!r}." + (f" Did you mean '{near}'?" if near else "")


def _sections() -> set[str]:
    return {name for name, field in Recipe.model_fields.items() if sections_of(field.annotation)}


def _no_section(name: str, value: Any) -> str:
    """A section that was given a plain value."""
    field = Recipe.model_fields[name]
    if field.discriminator and isinstance(value, str) and value in union_members(name):
        return f"{name} is a section: --set {name}.kind={value}, or `{name}: {{kind: {value}}}` in a file."
    example = next(iter(sections_of(field.annotation)[0].model_fields))
    found = "found nothing" if value is None else f"found {value!r}"
    return f"{name} is a section with fields of its own, such as {name}.{example}; {found}."


def _unknown(path: list[str], layer: Mapping[str, Any]) -> str:
    """A field that is not there, with the one that was probably meant."""
    where = ".".join(path)
    section: Any = Recipe
    for part in path[:-1]:
        field = section.model_fields.get(part)
        if field is None or part.isdigit():
            continue
        if field.discriminator:
            kind = layer[part].get("kind", field.get_default().kind)
            section = union_members(part)[kind]
            others = [k for k, member in union_members(part).items() if path[-1] in member.model_fields]
            if others:
                told = f"{where} has no effect with {part} '{kind}'; it belongs to {' and '.join(others)}"
                if own := next((n for n in section.model_fields if n.startswith(f"{path[-1]}_per_")), None):
                    return f"{told}; with {kind} write --set {part}.{own}={layer[part][path[-1]]}."
                option = {"lora": "--lora", "freeze": "--freeze-ratio"}.get(others[0])
                add = f"add {option or f'--set {part}.kind={others[0]}'}"
                return f"{told}: {'leave it out, or ' if 'kind' in layer[part] else ''}{add}."
        elif part == "mix":
            section = DataSource
        else:
            section = field.annotation
    return f"{where} is not a field. {_meant(path[-1], list(section.model_fields), '.'.join(path[:-1]))}"


OTHER_NAMES = {
    "lr": "learning_rate",
    "epochs": "num_epochs",
    "num_train_epochs": "num_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "accumulation": "gradient_accumulation_steps",
    "warmup": "warmup_steps",
    "lr_scheduler": "scheduler",
    "lr_scheduler_type": "scheduler",
    "optim": "optimizer",
    "patience": "early_stopping_patience",
    "precision": "mixed_precision",
    "bf16": "mixed_precision",
    "fp16": "mixed_precision",
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "use_dora": "dora",
    "use_rslora": "rank_stabilized",
    "base_model": "base",
    "model_name": "base",
    "max_seq_length": "max_length",
    "report_to": "trackers",
    "test_size": "held_out",
    "eval_dataset": "validation",
    "template": "chat_template",
    "neftune": "neftune_noise_alpha",
}
"""What fields are called elsewhere."""


def _meant(word: str, siblings: list[str], path: str) -> str:
    """The field that an unknown name probably means: in its section, or anywhere in the recipe."""
    places = {}
    for fact in reversed(list(fields())):
        places[fact.path.rpartition(".")[2]] = fact.path
    places = {name: place for name, place in places.items() if place.rpartition(".")[0] != path}
    for union in Recipe.model_fields:
        if Recipe.model_fields[union].discriminator and word in union_members(union):
            return f"Did you mean '{union}.kind={word}'?"
    name = OTHER_NAMES.get(word, word)
    if name in siblings and name != word:
        return f"Did you mean '{name}'?"
    if name in places:
        return f"Did you mean '{places[name]}'?"
    near = closest(word, siblings) or _abbreviated(word, siblings)
    if near:
        return f"Did you mean '{near}'?"
    near = closest(word, places) or _abbreviated(word, places)
    return f"Did you mean '{places[near]}'?" if near else nearest(word, siblings)


def _abbreviated(word: str, known: Iterable[str]) -> str | None:
    """The one known name that has all the words of this one, or begins with it."""
    words = set(word.split("_"))
    found = [name for name in known if words <= set(name.split("_")) or name.startswith(word)]
    return found[0] if len(found) == 1 else None


class _Twice(yaml.MarkedYAMLError):
    """A key that stands twice in one mapping."""


class _KeysOnce:
    """YAML without doubled keys, of which only the last would count, and whose errors all have a place."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value. Raises yaml.MarkedYAMLError for one that looks like a date or a number and is none, and for a number
        that is too long to be shown."""
        try:
            value = super().construct_object(node, deep)  # type: ignore[misc]
        except (ValueError, ArithmeticError) as error:
            raise yaml.MarkedYAMLError(problem=str(error)[:200], problem_mark=node.start_mark) from None
        if isinstance(value, int) and value.bit_length() > 64:
            raise yaml.MarkedYAMLError(
                problem="a whole number of more than 64 bits", problem_mark=node.start_mark
            )
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping. Raises _Twice at the second of two equal keys, yaml.MarkedYAMLError at one that is no name."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a list or a mapping stands where a name should", problem_mark=key.start_mark
                )
            if key.value in lines and key.tag != "tag:yaml.org,2002:merge":
                raise _Twice(
                    problem=f"'{key.value}' stands here again, after line {lines[key.value]}",
                    problem_mark=key.start_mark,
                )
            lines[key.value] = key.start_mark.line + 1
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)  # type: ignore[misc]
        return mapping


class _Loader(_KeysOnce, yaml.SafeLoader):
    """In Python, with the better messages."""


class _QuickLoader(_KeysOnce, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """In C where PyYAML was built with it, fifteen times as fast."""


LARGEST_FILE = 2**20
"""Bytes of a recipe at most; a long one has three thousand."""
MOST_VALUES = 10_000
"""Values in a recipe at most, each counted where it stands and wherever an alias repeats it."""


DEEPEST = 64
"""Levels in a recipe at most: with some ten thousand the C loader ends Python."""


class _Grown(yaml.MarkedYAMLError):
    """Levels without end, or aliases of aliases, which come to more than anybody wrote."""


class _Tagged(yaml.MarkedYAMLError):
    """A value that says itself of what kind it is."""


def _events(text: str) -> Iterator[Any]:
    """The parts of a YAML text. Raises yaml.YAMLError, also for what only Python's own reader trips over."""
    mark: Any = None
    events = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    while True:
        try:
            event = next(events, None)
        except (ValueError, ArithmeticError) as error:  # "\UFFFFFFFF" is no character
            raise yaml.MarkedYAMLError(problem=str(error)[:200], problem_mark=mark) from None
        if event is None:
            return
        mark = event.end_mark
        yield event


def _check_plain(text: str) -> None:
    """Raises _Tagged for tags, and _Grown for levels without end or lists that repeat lists that repeat lists: all
    before anything is made of it."""
    sizes: dict[str, int] = {}
    open_ones: list[tuple[str | None, int]] = []  # anchor, and values counted before it
    count = 0
    for event in _events(text):
        mark: Any = event.start_mark
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")[:80]
            raise _Tagged(problem=f"the tag '{tag}' stands before a value", problem_mark=mark)
        if isinstance(event, yaml.AliasEvent):
            known = sizes.get(str(event.anchor))
            if known is None and event.anchor in [anchor for anchor, _ in open_ones]:
                raise _Grown(problem=f"'*{event.anchor}' stands in itself", problem_mark=mark)
            count += known or 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_ones.append((event.anchor, count))
            count += 1
            if len(open_ones) > DEEPEST:
                raise _Grown(problem=f"more than {DEEPEST} levels", problem_mark=mark)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_ones.pop()
            if anchor:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if "\0" in event.value:
                raise yaml.MarkedYAMLError(
                    problem="a text has the character \\0, which no path and no name may have",
                    problem_mark=mark,
                )
        if count > MOST_VALUES:
            raise _Grown(problem=f"more than {MOST_VALUES:,} values", problem_mark=mark)


def loaded(text: str) -> Any:
    """A text as YAML reads it, safely: no tags, no levels or aliases without end. Raises yaml.YAMLError."""
    _check_plain(text)
    try:
        return yaml.load(text, Loader=_QuickLoader)  # a SafeLoader
    except yaml.YAMLError:
        return yaml.load(text, Loader=_Loader)  # the same, which says more


def read_layer(path: Path, *, what: str = "recipe", example: str = "section: {field: value}") -> Layer:
    """The sparse recipe in a YAML or JSON file, or what else is kept so. Raises RecipeError with line and column."""
    try:
        if path.is_file() and path.stat().st_size > LARGEST_FILE:
            raise RecipeError(
                f"{path} is too large to be a {what}.",
                found=f"{path.stat().st_size:,} bytes; at most {LARGEST_FILE:,} are read",
            )
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(
            f"The {what} file {path} cannot be read.", found=error.strerror, fix="Check the path."
        ) from None
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line, column = before.count(b"\n") + 1, len(before) - before.rfind(b"\n")
        raise RecipeError(
            f"{path}, line {line}, column {column} is not UTF-8.",
            found=f"the byte 0x{error.object[error.start]:02x}",
            fix="Save the file as UTF-8.",
        ) from None
    try:
        layer = loaded(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        # Of a mark only the index: to YAML a line ends at U+2028 as well, and to no editor.
        line, column = _line_at(text, mark.index if mark else getattr(error, "position", 0))
        place = f"{path}, line {line + 1}, column {column + 1}"
        if isinstance(error, _Twice):
            raise RecipeError(f"{place}: {error.problem}.", fix="Keep one of the two.") from None
        if isinstance(error, _Grown):
            raise RecipeError(
                f"{place}: {error.problem}.", fix="Write the values out, without aliases."
            ) from None
        if isinstance(error, _Tagged):
            raise RecipeError(f"{place}: {error.problem}.", fix="Write the value alone.") from None
        found = str(getattr(error, "problem", None) or getattr(error, "reason", error))
        raise RecipeError(f"{place} is not YAML or JSON.", found=found) from None
    if layer is None:
        raise RecipeError(f"{path} is empty.", fix=f"Write `{example}`, or leave the file out.")
    if not isinstance(layer, dict):
        is_rows = what == "recipe" and isinstance(layer, list)
        raise RecipeError(
            f"{path} holds no {what}.",
            found="a list, as of a data set's rows" if is_rows else type(layer).__name__,
            fix=f"Name a data set with --dataset {path}." if is_rows else f"Write `{example}`.",
        )
    return layer


def _line_at(text: str, position: int) -> tuple[int, int]:
    """Line and column of a character, both counted from 0."""
    before = text[:position].replace("\r\n", "\n").replace("\r", "\n")
    return before.count("\n"), len(before) - before.rfind("\n") - 1


def preset_names() -> tuple[str, ...]:
    """Names of all task and preset files that ship with tunesmith."""
    files = resources.files("tunesmith").joinpath("presets").iterdir()
    return tuple(sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml")))


def preset_layer(name: str) -> Layer:
    """A shipped task or preset, without its caption."""
    layer = _preset(name)
    layer.pop("about")
    return layer


def preset_about(name: str) -> str:
    """The one-line caption of a shipped task or preset."""
    return str(_preset(name)["about"])


def _preset(name: str) -> Layer:
    return copy.deepcopy(_read_preset(name))


@functools.cache
def _read_preset(name: str) -> Layer:
    text = resources.files("tunesmith").joinpath(f"presets/{name}.yaml").read_text(encoding="utf-8")
    found: Layer = yaml.safe_load(text)
    return found


def assignment(text: str) -> Layer:
    """`training.learning_rate=2e-5`, as given to `--set`, as a nested layer."""
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise RecipeError(f"--set {text} is not PATH=VALUE.", fix="Write --set training.learning_rate=2e-5.")
    path = path.strip()
    if not value.strip():
        return nested(path, None)
    types = {fact.type for fact in fields() if fact.path == path}
    is_text = bool(types) and types <= {"text", "text | null"}
    if is_text and value.strip() not in ("null", "~") and not value.strip().startswith(("'", '"')):
        return nested(path, value)  # as it stands: to YAML, `summarize: ` would be a mapping
    return nested(path, scalar(value))


def scalar(text: str) -> Any:
    """A value from the command line, as YAML reads it. Raises RecipeError."""
    try:
        return loaded(text)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"{text[:200]} is not a value.", found=str(getattr(error, "problem", error)), fix="Quote it."
        ) from None


def nested(path: str, value: Any) -> Layer:
    """`a.b.c` and a value as `{a: {b: {c: value}}}`."""
    for part in reversed(path.split(".")):
        value = {part: value}
    layer: Layer = value
    return layer


def overlaid(*layers: Layer) -> Layer:
    """Several sparse layers as one, later ones winning."""
    result: Layer = {}
    for layer in layers:
        result = _overlaid(result, layer)
    return result


def differing(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields in which two layers differ, by their path, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            yield from differing(before.get(key), after.get(key), f"{path}.{key}" if path else key)
    elif before != after:
        yield path, before, after


def as_yaml(recipe: Recipe) -> str:
    """The recipe in full, as the run folder keeps it; `read_layer` reads it back."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text: str = yaml.dump(recipe.model_dump(mode="json"), Dumper=dumper, sort_keys=False, allow_unicode=True)
    return text
