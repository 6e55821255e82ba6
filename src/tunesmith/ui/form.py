"""The recipe as a form: one control for each field, derived from its type, its limits and its docstring.

What a user sets is a sparse layer, as `compose` takes it, and nothing else is kept: a control whose field is not
in the layer shows what task, preset and method set there. Which fields take effect is found by trying them: a field
that no other value of is accepted, with what is set beside it, is not shown.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from tunesmith import catalog
from tunesmith.cli import FACTS, FLAGS
from tunesmith.compose import (
    TASKS,
    Composition,
    Layer,
    check_passwords,
    check_together,
    compose,
    faults,
    layered,
    loaded,
    nested,
    overlaid,
    preset_names,
    read_layer,
    union_members,
)
from tunesmith.errors import InputError, RecipeError, TunesmithError
from tunesmith.recipe import Recipe, Server, sections_of
from tunesmith.ui.keys import refusal
from tunesmith.ui.workspace import Workspace

if TYPE_CHECKING:
    from gradio.components import Component

Widget = Literal["switch", "choice", "own", "names", "share", "number", "text", "yaml"]
"""How a field is asked for. `choice`: one of some words; `own`: the same, or one's own; `names`: several words;
`share`: a slider between two limits; `yaml`: what has no simpler form."""


class _Unset:
    def __repr__(self) -> str:
        return "UNSET"


UNSET = _Unset()
"""The value of a control that was cleared: the field leaves the layer."""

ELSEWHERE = ("launch", "parallel")
"""Sections that the form has not: its runs are jobs of one process of this machine."""

KINDS = tuple(
    name for name, field in Recipe.model_fields.items() if field.discriminator and name not in ELSEWHERE
)
"""The recipe's unions, each chosen by its `kind`."""

CHOICES = ("task", "preset", "data.dataset", *(f"{union}.kind" for union in KINDS))
"""Fields that decide what others are where nobody sets them."""

SETTLED = {"output_dir": "Runs are kept in your workspace."}
"""Fields that the workbench sets itself, and why."""

OF_A_METHOD = frozenset({"loss", "beta", "rewards", "loss_on", "num_generations", "margin", "kl_coefficient"})
"""Fields of a method that the basic view has. Of the other sections it has those with an option of their own on the
command line."""

PLACES = frozenset(
    {"model.base", "model.chat_template", "data.dataset", "data.data_files", "method.reference_model", "method.critic"}
)  # fmt: skip
"""Fields that may name a file or a folder."""


@dataclass(frozen=True)
class Control:
    """A field of the recipe as it is asked for."""

    path: str
    kind: str | None
    """The union's member that has the field, as in `recipe.fields`."""
    widget: Widget
    about: str
    default: Any
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    whole: bool = False
    """Whether numbers are whole ones."""
    optional: bool = False
    """Whether there may be nothing."""

    @property
    def section(self) -> str:
        """The recipe's section; empty for what stands above them all."""
        return self.path.partition(".")[0] if "." in self.path else ""

    @property
    def title(self) -> str:
        """The label."""
        name = " ".join(self.path.split(".")[1:] or [self.path]).replace("_", " ")
        if self.path.removesuffix(".kind") in KINDS:
            name = self.section
        return name[0].upper() + name[1:]

    @property
    def elem_id(self) -> str:
        """Where browsers find it."""
        return "recipe-" + self.path.replace(".", "-")

    @property
    def is_basic(self) -> bool:
        """Whether the basic view has it."""
        name = self.path.rpartition(".")[2]
        if self.path in SETTLED:
            return False
        if self.section == "method":
            return name == "kind" or name in OF_A_METHOD
        return name in ("kind", "preset", "ratio") or self.path in FLAGS.values()


@functools.cache
def controls() -> tuple[Control, ...]:
    """Every field of the recipe, and the kind of every union, in the order of the recipe."""
    return tuple(_controls(Recipe, "", None))


def _controls(section: type[BaseModel], path: str, kind: str | None) -> Iterator[Control]:
    for name, field in section.model_fields.items():
        where = f"{path}.{name}" if path else name
        if where in ELSEWHERE:
            continue
        members = sections_of(field.annotation)
        if field.discriminator:
            yield Control(
                f"{where}.kind",
                None,
                "choice",
                ABOUT_KINDS.get(where, ""),
                field.get_default().kind,
                tuple(union_members(where)),
            )
        for member in members:
            own = member.model_fields["kind"].default if field.discriminator else kind
            yield from _controls(member, where, own)
        if not members and name != "kind":
            yield _control(where, kind, field)


ABOUT_KINDS = {"method": "How the model learns.", "adapter": "Which weights are trained."}


def _control(path: str, kind: str | None, field: FieldInfo) -> Control:
    parts = list(_leaves_of(field.annotation, tuple(field.metadata)))
    types = [part for part, _ in parts if part is not type(None)]
    optional = len(types) < len(parts)
    words = tuple(str(w) for part in types if get_origin(part) is Literal for w in get_args(part))
    numbers = [(part, limits) for part, limits in parts if part in (int, float)]
    low, high = _limits(numbers[0][1]) if numbers else (None, None)
    named = [part for part in types if get_origin(part) is list and get_args(part)[0] is str]
    listed = [w for part in types if get_origin(part) is list for w in _words(get_args(part)[0])]
    widget: Widget
    if path in SUGGESTED:
        widget = "names" if named else "own" if path not in CLOSED else "choice"
    elif words and (numbers or named):
        widget = "own"
    elif words or types == [bool]:
        widget = "choice" if words or optional else "switch"
        words = words or ("true", "false")
    elif numbers:
        widget = "share" if low is not None and high is not None and not optional else "number"
    elif named or listed:
        widget, words = "names", tuple(listed)
    else:
        widget = "text" if types == [str] else "yaml"
    return Control(
        path, kind, widget, _joined(field.description), field.get_default(), words, low, high,
        whole=bool(numbers) and all(part is int for part, _ in numbers), optional=optional,
    )  # fmt: skip


def _joined(text: str | None) -> str:
    return " ".join((text or "").split())


def _leaves_of(annotation: Any, metadata: tuple[Any, ...]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The plain types that a field allows, each with what limits it."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        yield from _leaves_of(inner, (*metadata, *more))
    elif origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from _leaves_of(part, metadata)
    else:
        yield annotation, metadata


def _words(annotation: Any) -> tuple[str, ...]:
    return tuple(map(str, get_args(annotation))) if get_origin(annotation) is Literal else ()


def _limits(metadata: Sequence[Any]) -> tuple[float | None, float | None]:
    """Least and greatest number, where there are such."""
    low = high = None
    for limit in (inner for m in metadata for inner in (m.metadata if isinstance(m, FieldInfo) else (m,))):
        for name in ("gt", "ge"):
            low = getattr(limit, name, None) if getattr(limit, name, None) is not None else low
        for name in ("lt", "le"):
            high = getattr(limit, name, None) if getattr(limit, name, None) is not None else high
    return low, high


def _models() -> list[str]:
    return [
        "tiny",
        *dict.fromkeys(name for names in catalog.catalog().model_examples.values() for name in names),
    ]


def _datasets() -> list[str]:
    from tunesmith.assets import EXAMPLES

    return [*(f"example:{name}" for name in EXAMPLES), *catalog.catalog().datasets]


def _formats() -> list[str]:
    from tunesmith.data.formats import FORMATS

    return ["auto", *FORMATS]


def _templates() -> list[str]:
    from tunesmith.data.templates import NAMED_TEMPLATES

    return list(NAMED_TEMPLATES)


def _metrics() -> list[str]:
    return catalog.get_available_options("evaluation_metrics")


def _presets() -> list[str]:
    return [name for name in preset_names() if name not in TASKS]


SUGGESTED: dict[str, Callable[[], list[str]]] = {
    "preset": _presets,
    "model.base": _models,
    "model.chat_template": _templates,
    "data.dataset": _datasets,
    "data.format": _formats,
    "training.eval_metrics": _metrics,
    "training.best_by": lambda: ["loss", *_metrics()],
    "evaluation.metrics": _metrics,
}
"""Values to choose from where the type says only that it is a text."""
CLOSED = frozenset({"preset", "data.format"})
"""Those of them that are all there is."""


def choices(control: Control) -> list[tuple[str, str]]:
    """What a control offers, as label and value; an empty value leaves the field out."""
    found = SUGGESTED[control.path]() if control.path in SUGGESTED else list(control.choices)
    offered = [(word, word) for word in found]
    return [("(not set)", ""), *offered] if control.optional else offered


# From a control to the layer and back


_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def read(control: Control, raw: Any) -> Any:
    """What a component holds as the field's value, or UNSET. Raises RecipeError for what is no YAML."""
    nothing = None if control.optional and control.default is not None else UNSET
    if raw is None or raw == "" or (raw == [] and not control.default):
        return nothing
    match control.widget:
        case "switch":
            return bool(raw)
        case "choice" if control.choices == ("true", "false"):
            return raw == "true"
        case "share":
            return int(raw) if control.whole and float(raw).is_integer() else raw
        case "number" | "own" if control.low is not None and _NUMBER.fullmatch(str(raw).strip()):
            number = float(raw)
            return int(number) if number.is_integer() and abs(number) < 2**53 else number
        case "yaml":
            try:
                return loaded(str(raw))
            except yaml.YAMLError as error:
                said = str(getattr(error, "problem", None) or error)
                raise RecipeError(f"{control.path} is not YAML.", found=said[:200]) from None
        case _:
            return raw


def shown(control: Control, value: Any) -> Any:
    """A field's value as its component holds it."""
    match control.widget:
        case "switch":
            return bool(value)
        case "names":
            return [] if value is None else [value] if isinstance(value, str) else [str(v) for v in value]
        case "share":
            return value if isinstance(value, int | float) and not isinstance(value, bool) else control.low
        case "yaml":
            plain = _plain(value)
            return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).strip() if plain else ""
        case _:
            if isinstance(value, bool):
                return "true" if value else "false"
            if isinstance(value, list | tuple):
                return ", ".join(map(str, value))
            return "" if value is None else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True) | (
            {"kind": value.kind} if hasattr(value, "kind") else {}
        )
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def value_at(values: Any, path: str, missing: Any = UNSET) -> Any:
    """The value at a dotted path of a layer or a recipe."""
    for part in path.split("."):
        values = values.get(part, missing) if isinstance(values, Mapping) else getattr(values, part, missing)
        if values is missing:
            return missing
    return values


def without(layer: Mapping[str, Any], path: str) -> Layer:
    """The layer without this field, and without sections that are empty then."""
    head, _, rest = path.partition(".")
    kept = dict(layer)
    if rest and isinstance(kept.get(head), Mapping):
        kept[head] = without(kept[head], rest)
        if not kept[head]:
            del kept[head]
    elif not rest:
        kept.pop(head, None)
    return kept


def put(layer: Mapping[str, Any], path: str, value: Any) -> Layer:
    """The layer with this field, or without it where the value is UNSET."""
    bare = without(layer, path)
    return bare if value is UNSET else overlaid(bare, nested(path, value))


def chosen(layer: Mapping[str, Any], union: str, kind: str) -> tuple[Layer, list[str]]:
    """The layer with a union of another kind, and the fields that the new kind has no use for, which are left out."""
    has = set(union_members(union)[kind].model_fields)
    given = layer.get(union)
    part = dict(given) if isinstance(given, Mapping) else {}
    lost = [name for name in part if name not in has]
    kept = {name: value for name, value in part.items() if name in has} | {"kind": kind}
    said = [f"{union}.{name} was left out: {union} '{kind}' has no such field." for name in lost]
    return {**layer, union: kept}, said


def changed(layer: Mapping[str, Any], control: Control, raw: Any) -> tuple[Layer, list[str]]:
    """The layer after somebody has used a control, and what fell away with it. Raises RecipeError as `read` does."""
    value = read(control, raw)
    union = control.path.removesuffix(".kind")
    if union in KINDS and value is not UNSET:
        return chosen(layer, union, value)
    return put(layer, control.path, value), []


# What a layer comes to


@dataclass(frozen=True)
class Filled:
    """A layer with all that a form shows of it."""

    layer: Layer
    base: Recipe
    """What the recipe is without the user's own values: defaults, task, preset, kinds."""
    sound: Recipe
    """The same with those of the user's values that nothing is wrong with."""
    recipe: Recipe | None
    """The recipe of the whole layer; None where something is wrong with it."""
    faults: Mapping[str, str]
    """What is wrong, by the field's path; under an empty one what is about none."""
    notes: tuple[str, ...] = ()


def filled(layer: Mapping[str, Any], workspace: Workspace | None = None) -> Filled:
    """What a layer comes to, and what is wrong with it. Nothing is read but the catalogue."""
    wrong: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    try:
        check_passwords(layer, "")
        merged, dropped = layered(layer)
        wrong, notes = faults(merged), tuple(dropped)
    except RecipeError as error:
        wrong[_blamed(layer, error)] = " ".join(part for part in (error.problem, error.fix) if part)
    if workspace:
        wrong |= outside(layer, workspace)
    base = _composed(_kinds_of(layer))
    recipe = None if wrong else _composed(layer)
    sound = recipe
    if sound is None:
        mended: Layer = dict(layer)
        for path in wrong:
            mended = without(mended, path)
        sound = _composed(mended) if not _is_wrong(mended) else base
    return Filled(dict(layer), base, sound, recipe, wrong, notes)


def _blamed(layer: Mapping[str, Any], error: RecipeError) -> str:
    """The field that an error of composing is about: a task, a preset or a kind that is not there."""
    if layer.get("task") is not None and layer["task"] not in TASKS:
        return "task"
    for union in KINDS:
        part = layer.get(union)
        if isinstance(part, Mapping) and part.get(
            "kind", next(iter(union_members(union)))
        ) not in union_members(union):
            return f"{union}.kind"
    return "preset" if layer.get("preset") and layer["preset"] not in _presets() else ""


def _composed(layer: Mapping[str, Any]) -> Recipe:
    return compose(layer).recipe


def _is_wrong(layer: Mapping[str, Any]) -> bool:
    try:
        compose(layer)
    except RecipeError:
        return True
    return False


def _kinds_of(layer: Mapping[str, Any]) -> Layer:
    """What a layer chooses, without what it sets: task, preset, data set and kinds, where they exist."""
    everything: Layer = {}
    for path in CHOICES:
        everything = put(everything, path, value_at(layer, path))
    if not _is_wrong(everything):
        return everything
    kept: Layer = {}
    for path in CHOICES:
        value = value_at(layer, path)
        if value is not UNSET and not _is_wrong(tried := put(kept, path, value)):
            kept = tried
    return kept


def takes_effect(control: Control, recipe: Recipe) -> bool:
    """Whether another value of the field is accepted beside what the recipe sets.

    The recipe's own checks are asked, those of a section and those between sections: a field that has no effect
    is an error to them.
    """
    section, _, name = control.path.rpartition(".")
    part = value_at(recipe, section) if section else recipe
    current = getattr(part, name, None)
    if not section or name == "kind" or not isinstance(part, BaseModel):
        return True
    standing = [check for check in (check_together, _check_local) if not _refused(check, recipe)]
    for probe in _probes(control, current):
        try:
            other = type(part).model_validate({**part.model_dump(), name: probe})
        except ValidationError:
            continue
        if "." in section or not any(
            _refused(check, recipe.model_copy(update={section: other})) for check in standing
        ):
            return True
    return False


def _check_local(recipe: Recipe) -> None:
    from tunesmith.data import sources

    path = sources.local(recipe.data.dataset)
    if path:
        given = recipe.data.model_dump(include={"config", "revision", "streaming", "data_files"})
        sources.check_options(recipe.data.dataset, path, **given)


def _refused(check: Callable[[Recipe], None], recipe: Recipe) -> bool:
    try:
        check(recipe)
    except TunesmithError:
        return True
    return False


def _probes(control: Control, current: Any) -> Iterator[Any]:
    """Values that a field could have instead."""
    tried: list[Any] = []
    match control.widget:
        case "switch":
            tried = [not current]
        case "choice" | "own":
            tried = list(control.choices) if control.choices != ("true", "false") else [True, False]
            tried += SUGGESTED[control.path]() if control.path in SUGGESTED else []
        case "share" | "number":
            near = current if isinstance(current, int | float) else 1
            tried = [near + 1, near * 2, near / 2, 0.001, 0.1, 0.3, 0.6, 0.9, 1, 2, 8]
            tried = [math.ceil(n) for n in tried] if control.whole else tried
        case "names":
            tried = [[word] for word in (control.choices or ("probe",))]
        case "text":
            tried = ["probe"]
        case "yaml":
            tried = [{"probe": "probe"}, ["exact_match"], [{"dataset": "example:sql"}]]
    yield from (value for value in tried if value != current)


def belongs(control: Control, recipe: Recipe) -> bool:
    """Whether the recipe's method or adapter has the field, and not only another one."""
    union = control.section
    return control.kind is None or union not in KINDS or control.kind == getattr(recipe, union).kind


def visible(found: Filled, *, expert: bool) -> tuple[Control, ...]:
    """The controls of a form: those that take effect, and those that are set or wrong in any case."""
    return tuple(
        control
        for control in controls()
        if belongs(control, found.sound)
        and (expert or control.is_basic or control.path in found.faults)
        and (
            value_at(found.layer, control.path) is not UNSET
            or control.path in found.faults
            or takes_effect(control, found.sound)
        )
    )


def current(control: Control, found: Filled) -> Any:
    """The value that a control shows: the user's own, right or wrong, else what holds without it."""
    own = value_at(found.layer, control.path)
    return value_at(found.base, control.path, None) if own is UNSET else own


# What leaves a form


def outside(layer: Mapping[str, Any], workspace: Workspace) -> dict[str, str]:
    """Fields that name files and folders which are not the user's own, by path, with what is wrong.

    A browser's user reads what is in the workspace, what ships, and what a Hub id names; nothing else of the machine.
    The layer is looked at as it stands and as the recipe that it composes to, which is what a job is given: a layer can
    say a thing in several ways (`method: {grpo: {rewards: ...}}`), a recipe in one. The first may be no recipe yet.
    """
    found = _led_out(layer, workspace)
    with suppress(RecipeError):  # what composes to no recipe, nobody plans and no job is given
        composed = compose(settled(layer, workspace)).recipe.model_dump()
        found = _led_out(composed, workspace) | found
    return found


def _led_out(layer: Mapping[str, Any], workspace: Workspace) -> dict[str, str]:
    """What of a layer, or of a whole recipe, leads outside, by path."""
    found = {}
    for path, value in _named_places(layer):
        if not isinstance(value, str):
            continue
        if said := _leads_out(path, value, workspace):
            found[path] = said
    name = layer.get("name")
    if isinstance(name, str):
        try:
            workspace.inside(workspace.runs, name)
        except InputError as error:
            found["name"] = error.problem
    for union in KINDS:
        part = layer.get(union)
        rewards = part.get("rewards") if isinstance(part, Mapping) else None
        if any(_is_function(reward) for reward in _as_list(rewards)):
            found[f"{union}.rewards"] = (
                "A Python function as a reward runs code on the server; the command line takes it, this page does not."
            )
    found.update(
        {
            path: said
            for path, name, address in _keys(layer)
            if (said := refusal(name, address, workspace.keys))
        }
    )
    if value_at(layer, "evaluation.shards.address", None):
        found["evaluation.shards.address"] = (
            "Another machine's Ray is for the command line; leave the address out."
        )
    if value_at(layer, "evaluation.run_code", None) is True and not workspace.runs_code:
        found["evaluation.run_code"] = (
            "What models write is run on this server only where it was started with `tunesmith web --run-code`."
        )
    return found


def _keys(layer: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """Variables that a layer names as keys: the field, the variable, and the address that is sent its value."""
    method, server = layer.get("method"), value_at(layer, "evaluation.server", None)
    own = Server.model_fields["base_url"].default
    for path, parts, usual in (
        ("method.rewards", _as_list(method.get("rewards") if isinstance(method, Mapping) else None), None),
        ("evaluation.server.api_key_env", _as_list(server), own),
    ):
        for part in parts:
            if isinstance(part, Mapping) and part.get("api_key_env"):
                yield path, str(part["api_key_env"]), str(part.get("base_url") or usual)


def _named_places(layer: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for path in PLACES:
        yield path, value_at(layer, path)
    data, method = layer.get("data"), layer.get("method")
    for part in _as_list(data.get("mix") if isinstance(data, Mapping) else None):
        if isinstance(part, Mapping):
            yield "data.mix", part.get("dataset")
            yield "data.mix", part.get("data_files")
    for reward in _as_list(method.get("rewards") if isinstance(method, Mapping) else None):
        if isinstance(reward, Mapping):
            yield "method.rewards", reward.get("model") if "base_url" not in reward else None


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, str):
        return value.split(",")
    return list(value) if isinstance(value, list | tuple) else [value] if isinstance(value, Mapping) else []


def _is_function(reward: Any) -> bool:
    if isinstance(reward, str):
        return ":" in reward
    return isinstance(reward, Mapping) and (reward.get("kind") == "python" or "function" in reward)


def _leads_out(field: str, value: str, workspace: Workspace) -> str | None:
    if field.endswith("data_files"):
        bad = value.startswith(("/", "~")) or ".." in Path(value).parts or ":" in value
        return "A pattern of files stays in its folder: no `..`, no leading slash, no URL." if bad else None
    if value == "tiny" or value.startswith("example:"):
        return None
    from tunesmith import models

    instead = "Upload the file, or give a Hub id or a name that ships."
    if field != "model.chat_template" and not field.startswith("data."):  # folders, which no page uploads
        instead = "Give a Hub id, `tiny`, or the folder of a run or an export in your workspace."
    if (
        "://" in value and field != "model.chat_template"
    ):  # read with what this machine may read, not the user
        return f"A URL is for the command line. {instead}"
    try:
        path = Path(value).expanduser()
        is_local = path.is_absolute() or ".." in path.parts or path.exists() or models.is_path(value)
        if not is_local or path.resolve().is_relative_to(workspace.root.resolve()):
            return None
    except (OSError, RuntimeError, ValueError):  # a name too long, a home that is not there, a NUL
        return "This is no name of a file, a folder or a Hub id."
    if field == "model.chat_template" and not path.suffix and not path.exists():
        return None  # a template's name, or a template itself
    return f"This lies outside your workspace. {instead}"


def checked(layer: Mapping[str, Any], workspace: Workspace) -> Composition:
    """The recipe that a layer stands for in a workspace: the one way from a form to what reads, plans or trains.

    Raises RecipeError for what does not fit, and InputError for what lies outside the workspace.
    """
    refused = outside(layer, workspace)
    for field, said in refused.items():
        value = value_at(layer, field)
        if value is UNSET:  # said in another way, which only composing shows
            value = value_at(compose(settled(layer, workspace)).recipe, field, None)
        raise InputError(f"{field}: {said}", found=repr(value)[:200])
    composition = compose(settled(layer, workspace))
    if (kind := composition.recipe.launch.kind) not in ("local", "accelerate"):
        raise RecipeError(
            f"The workbench trains on this machine, and not by launch.kind {kind}.",
            fix="Leave launch out, or use `tunesmith train --launch` in a shell.",
        )
    return composition


def settled(layer: Mapping[str, Any], workspace: Workspace) -> Layer:
    """The layer with what the workbench sets itself."""
    return overlaid(dict(layer), {"output_dir": str(workspace.runs)})


def argv(layer: Mapping[str, Any], verb: str = "train") -> list[str]:
    """The one command that does the same as this layer, as its arguments."""
    options = {path: option for option, path in FLAGS.items()}
    said = ["tunesmith", verb]
    for path, value in leaves(layer):
        if path == "preset" and value is not None:
            said += ["--config", str(value)]
        elif path == "adapter.kind" and value in ("lora", "qlora"):
            said.append(f"--{value}")
        elif path in options and isinstance(value, bool):
            said.append(options[path] if value else options[path].replace("--", "--no-", 1))
        elif path in options and value is not None and not isinstance(value, Mapping):
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            said += [f"{options[path]}={text}"] if text.startswith("-") else [options[path], text]
        else:
            said += ["--set", f"{path}={_assigned(path, value)}"]
    return said


_WORD = re.compile(r"[A-Za-z_][\w./-]*")
_YAML_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def _assigned(path: str, value: Any) -> str:
    """A value as `--set` reads it back."""
    if isinstance(value, str):
        fact = FACTS.get(path)
        is_text = fact is not None and fact.type in ("text", "text | null")
        odd = not value.strip() or value.strip() in ("null", "~") or value.strip().startswith(("'", '"'))
        if (is_text and not odd) or (_WORD.fullmatch(value) and value.lower() not in _YAML_WORDS):
            return value
    return json.dumps(value, ensure_ascii=False)


def leaves(layer: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The fields that a layer sets, by path."""
    known = {control.path for control in controls()}
    for name, value in layer.items():
        where = f"{path}.{name}" if path else name
        if where not in known and isinstance(value, Mapping) and value:
            yield from leaves(value, where)
        else:
            yield where, value


def as_yaml(layer: Mapping[str, Any]) -> str:
    """The layer as a recipe file."""
    if not layer:
        return "# Nothing is set: every field has its default.\n"
    return yaml.safe_dump(dict(layer), sort_keys=False, allow_unicode=True)


def imported(file: Path) -> tuple[Layer, list[str]]:
    """The layer in a recipe file, sparse, and what was left out of it.

    A recipe that a run has written holds every field; those at what task, preset and kinds set anyway are left out.
    Settings that are kept under their kind (`adapter: {lora: {rank: 4}}`) are taken where it is chosen, as `compose`
    takes them. Raises RecipeError for a file that is no recipe, and where a kind stands in a kind.
    """
    layer = read_layer(file)
    notes = [f"{path} was left out: {why}" for path, why in SETTLED.items() if path in layer]
    for path in SETTLED:
        layer.pop(path, None)
    chosen_kinds = _composed(_kinds_of(layer))
    for union in KINDS:
        part, members = layer.get(union), union_members(union)
        if not isinstance(part, Mapping):
            continue
        kind = getattr(chosen_kinds, union).kind
        own = {name: value for name, value in part.items() if name not in members}
        below: Layer = {}
        for other in (name for name in part if name in members):
            inner = part[other]
            if not isinstance(inner, Mapping) or not issubclass(members[kind], members[other]):
                notes.append(f"{union}.{other} was left out: the {union} is '{kind}'.")
                continue
            for name in inner:
                if name in members:
                    raise RecipeError(
                        f"{union}.{other} holds a kind once more.",
                        found=f"{union}.{other}.{name}"[:120],
                        fix=f"Write its settings below {union}.{other}, or beside {union}.kind.",
                    )
            below |= {name: value for name, value in inner.items() if name != "kind"}
        layer[union] = {**below, **own}
    if _is_wrong(layer):
        return layer, notes
    whole, base = _composed(layer), _composed(_kinds_of(layer))
    sparse: Layer = {}
    for path in CHOICES:
        value = value_at(layer, path)
        # Which data is said also where it is what a run takes anyway: the Data page shows what was chosen.
        if value not in (UNSET, None, *([] if path == "data.dataset" else [value_at(Recipe(), path)])):
            sparse = put(sparse, path, value)
    for path, value in leaves(layer):
        if path not in CHOICES and value_at(whole, path, None) != value_at(base, path, None):
            sparse = put(sparse, path, value)
    return (sparse if _composed(sparse) == whole else layer), notes


def found_in(layer: Mapping[str, Any], workspace: Workspace) -> tuple[Layer, list[str]]:
    """The layer with data sets that name an upload relatively (`plants.csv`, `uploads/plants.csv`) by their paths.

    Also says which. The path passes the walls as every other one does.
    """
    kept, notes = dict(layer), []
    for path in ("data.dataset", "data.mix"):
        value = value_at(kept, path)
        parts = [{"dataset": value}] if path == "data.dataset" else value
        if not isinstance(parts, list):
            continue
        named = [
            _upload(part.get("dataset") if isinstance(part, Mapping) else None, workspace) for part in parts
        ]
        notes += [f"{path}: {Path(place).name} is the one of your uploads." for place in named if place]
        if any(named):
            new = [
                {**part, "dataset": place} if place else part
                for part, place in zip(parts, named, strict=True)
            ]
            kept = put(kept, path, named[0] if path == "data.dataset" else new)
    return kept, notes


def _upload(name: Any, workspace: Workspace) -> str | None:
    """The path of an upload that is named relatively, or None."""
    if not isinstance(name, str) or name.startswith("example:"):
        return None
    with suppress(InputError, OSError):
        place = workspace.inside(workspace.uploads, name.removeprefix("./").removeprefix("uploads/"))
        return str(place) if place.is_file() else None
    return None


# The components


def component(control: Control, found: Filled) -> Component:
    """The Gradio component of a control, showing what holds; to be called where it is to stand."""
    import gradio as gr

    value: Any = "runs" if control.path in SETTLED else shown(control, current(control, found))
    common: dict[str, Any] = {
        "info": SETTLED.get(control.path, control.about),
        "elem_id": control.elem_id,
        "min_width": 240,
        "interactive": control.path not in SETTLED,
        **labelled(control, found.faults.get(control.path)),
    }
    match control.widget:
        case "switch":
            return gr.Checkbox(bool(value), **common)
        case "names":
            offered = [word for word, _ in choices(control) if word]
            return gr.Dropdown(
                list(dict.fromkeys([*offered, *value])),
                value=value,
                multiselect=True,
                allow_custom_value=True,
                **common,
            )
        case "share":
            assert control.low is not None
            assert control.high is not None
            step = 1 if control.whole else 0.001
            return gr.Slider(control.low, control.high, value=float(value), step=step, **common)
        case "number":  # as text: a number field shows 0.00002 for 2e-5, and 0 for nothing
            return gr.Textbox(
                value, placeholder="none" if control.optional else str(control.default), **common
            )
        case "choice" | "own":
            offered_too = choices(control)
            if value not in [word for _, word in offered_too]:
                offered_too = [*offered_too, (value, value)]
            own = control.widget == "own"
            return gr.Dropdown(offered_too, value=value, allow_custom_value=own, filterable=own, **common)
        case "yaml":
            return gr.Textbox(value, lines=2, max_lines=12, **common)
        case _:
            return gr.Textbox(value, lines=1, max_lines=8, **common)


def labelled(control: Control, fault: str | None) -> dict[str, Any]:
    """Label and class of a component, with what is wrong in the label, which is plain text and read aloud."""
    classes = ["ts-field", "ts-fault"] if fault else ["ts-field"]
    return {"label": f"{control.title}: {fault}" if fault else control.title, "elem_classes": classes}
