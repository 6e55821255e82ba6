"""What a sweep searches: fields of the recipe, each with the values it may take, checked before anything is trained.

training.learning_rate: loguniform(1e-5, 1e-3)
adapter.rank: choice(4, 8, 16)          # or a list: [4, 8, 16]
training.warmup_steps: int(0, 100, 10)  # every tenth; without a third number every one
training.weight_decay: uniform(0, 0.1)
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith import launch
from tunesmith.compose import nested, overlaid, read_layer, scalar, union_members, validated
from tunesmith.errors import RecipeError, TunesmithError, counted, nearest
from tunesmith.recipe import Recipe, fields

Kind = Literal["choice", "uniform", "loguniform", "int", "logint"]
KINDS = {
    "choice": "choice(A, B, ...)",
    "uniform": "uniform(LOW, HIGH)",
    "loguniform": "loguniform(LOW, HIGH)",
    "int": "int(LOW, HIGH) or int(LOW, HIGH, STEP)",
    "logint": "logint(LOW, HIGH)",
}
EXAMPLE = "training.learning_rate: loguniform(1e-5, 1e-3)"
LAYERS = {".yaml", ".yml", ".json"}
"""How names of files end that hold a space."""
COMBINED = 256
"""Combinations of a space that are composed to see that each is a recipe; of more, so many are drawn."""
PROBED = 16
"""Whole numbers of a range of which each is given to the recipe; of more, the ends."""
DOUBLES = 100
"""Draws of values that were tried before, after which the untried ones are gone through in their order."""

SAME_ROWS = "all trials are trained and validated on the same rows"
SAME_MEASURE = "all trials are validated alike"
NOT_OF_TRIALS = "it changes nothing of what a trial learns"
KEPT = {
    "data": SAME_ROWS,
    "model": "losses per token of another model are of other tokens",
    "evaluation": NOT_OF_TRIALS,
    "export": NOT_OF_TRIALS,
    "tracking": NOT_OF_TRIALS,
    "launch": NOT_OF_TRIALS,
    "parallel": NOT_OF_TRIALS,
    "task": SAME_ROWS,
    "preset": NOT_OF_TRIALS,
    "name": NOT_OF_TRIALS,
    "output_dir": NOT_OF_TRIALS,
    "training.seed": "all trials share the seed, so that they differ in what is searched alone",
    "training.eval_steps": SAME_MEASURE,
    "training.eval_metrics": SAME_MEASURE,
    "training.eval_samples": SAME_MEASURE,
    "training.best_by": SAME_MEASURE,
    "training.load_best_model_at_end": SAME_MEASURE,
    "training.save_steps": NOT_OF_TRIALS,
    "training.save_total_limit": NOT_OF_TRIALS,
    "training.logging_steps": NOT_OF_TRIALS,
    "training.per_device_eval_batch_size": NOT_OF_TRIALS,
    "training.num_workers": NOT_OF_TRIALS,
    "training.gradient_checkpointing": NOT_OF_TRIALS,
    "training.forward": NOT_OF_TRIALS,
    "training.kernels": NOT_OF_TRIALS,
    "training.compile": NOT_OF_TRIALS,
    "training.cache_frozen": NOT_OF_TRIALS,
}
"""Fields, and sections, that are the same in every trial, and why."""
SEARCHED = ("data.packing", "data.num_samples", "data.mix_seed")
"""Fields of these sections that may differ all the same."""
OWN_LOSS = "a method's own fields change what its loss means; choose by a metric (training.best_by), or sweep it alone"


@dataclass(frozen=True)
class Distribution:
    """The values that a field may take."""

    kind: Kind
    values: tuple[Any, ...] = ()
    """Of a choice."""
    low: float = 0
    high: float = 0
    step: int = 1
    """Of whole numbers, from `low` on."""

    def __str__(self) -> str:
        """As it is written."""
        if self.kind == "choice":
            return f"choice({', '.join(map(str, self.values))})"
        step = f", {self.step}" if self.step > 1 else ""
        return f"{self.kind}({_number(self.low)}, {_number(self.high)}{step})"

    @property
    def size(self) -> float:
        """How many different values there are; of fractions without end."""
        return math.inf if self.kind in ("uniform", "loguniform") else len(self.every)

    @property
    def every(self) -> Sequence[Any]:
        """All values of a choice or of whole numbers, the ends of a range of fractions."""
        match self.kind:
            case "choice":
                return self.values
            case "uniform" | "loguniform":
                return (self.low, self.high)
            case "int" | "logint":
                return range(int(self.low), int(self.high) + 1, self.step)

    @property
    def probed(self) -> Sequence[Any]:
        """The values that are given to the recipe: every one of a few, else the ends of the range."""
        return self.every if self.kind == "choice" or self.size <= PROBED else (self.low, self.high)

    def drawn(self, random: random.Random) -> Any:
        """A value by chance."""
        match self.kind:
            case "choice":
                return random.choice(self.values)
            case "uniform":
                return random.uniform(self.low, self.high)
            case "loguniform":
                return min(
                    self.high,
                    max(self.low, math.exp(random.uniform(math.log(self.low), math.log(self.high)))),
                )
            case "int":
                return random.randrange(int(self.low), int(self.high) + 1, self.step)
            case "logint":
                drawn = math.exp(random.uniform(math.log(self.low - 0.5), math.log(self.high + 0.5)))
                return min(int(self.high), max(int(self.low), round(drawn)))


Space = Mapping[str, Distribution]


def _number(value: float) -> str:
    """A number so that it is told from every other one."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))


def short(value: Any) -> str:
    """A value as tables show it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read(given: Sequence[str]) -> dict[str, Distribution]:
    """A space from `FIELD=DISTRIBUTION` texts and YAML files, which name each field once. Raises RecipeError with all
    that cannot be read."""
    found: dict[str, Any] = {}
    named: dict[str, list[str]] = {}
    for text in given:
        for path, value in _lines(text):
            found[path] = value
            named.setdefault(path, []).append(text)
    if not found:
        raise RecipeError("A sweep needs something to search.", fix=f"--space '{EXAMPLE.replace(': ', '=')}'")
    _raise(
        [
            f"{path} is given twice: --space {' and --space '.join(t)}."
            for path, t in named.items()
            if len(t) > 1
        ],
        fix="Give each field once.",
    )
    problems, space = [], {}
    for path, value in found.items():
        try:
            space[path] = distribution(value)
        except TunesmithError as error:
            problems.append(f"{path}: {error.problem}" + (f" Found: {error.found}." if error.found else ""))
    _raise(problems, fix=f"Write one of {'; '.join(KINDS.values())}.")
    return space


def _lines(text: str) -> list[tuple[str, Any]]:
    """What one `--space` names: a field of its own, or those of a file. Raises RecipeError for neither."""
    path, equals, value = text.partition("=")
    if Path(text).is_file() or (not equals and Path(text).suffix.lower() in LAYERS):
        return list(_flat(read_layer(Path(text), what="space", example=EXAMPLE)))
    if not equals:
        raise RecipeError(
            f"--space {text} says no values, and no file is called so.",
            fix=f"Write FIELD=VALUES, such as --space '{EXAMPLE.replace(': ', '=')}': {'; '.join(KINDS.values())}.",
        )
    return [(path.strip(), value.strip())]


def _flat(layer: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in layer.items():
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from _flat(value, where)
        else:
            yield where, value


def distribution(given: Any) -> Distribution:
    """A distribution from its text, or from a list of choices. Raises RecipeError."""
    if isinstance(given, list):
        return _choice(given)
    written = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", str(given), flags=re.DOTALL)
    if not written:
        raise RecipeError("This is no distribution.", found=str(given))
    kind, inner = written.groups()
    if kind not in KINDS:
        raise RecipeError(f"There is no distribution '{kind}'. {nearest(kind, KINDS)}")
    values = scalar(f"[{inner}]")
    if kind == "choice":
        return _choice(values)
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        raise RecipeError(f"{kind} takes numbers.", found=inner) from None
    whole = kind in ("int", "logint")
    if len(numbers) not in ((2, 3) if kind == "int" else (2,)) or not all(map(math.isfinite, numbers)):
        raise RecipeError(f"{kind} is written {KINDS[kind]}.", found=inner)
    if whole and any(number != int(number) for number in numbers):
        raise RecipeError(f"{kind} takes whole numbers.", found=inner)
    low, high = numbers[:2]
    if not low < high:
        raise RecipeError("The lower end has to be below the higher one.", found=inner)
    if kind in ("loguniform", "logint") and low <= 0:
        raise RecipeError(f"{kind} needs a lower end above 0.", found=inner)
    step = int(numbers[2]) if len(numbers) > 2 else 1
    if step < 1:
        raise RecipeError("A step is 1 or more.", found=inner)
    if whole:
        low, high = int(low), int(high) - (int(high) - int(low)) % step
    return Distribution(kind, low=low, high=high, step=step)  # type: ignore[arg-type]


def _choice(values: Sequence[Any]) -> Distribution:
    if not values:
        raise RecipeError("A choice needs values.")
    if any(values[n] in values[:n] for n in range(len(values))):
        raise RecipeError("A choice names a value twice.", found=", ".join(map(str, values)))
    return Distribution("choice", tuple(values))


def checked(space: Space, recipe: Recipe) -> dict[str, Distribution]:
    """The space with its values as the recipe's types have them.

    Raises RecipeError with every field that is not the recipe's, that has to be the same in all trials, or that would
    be given a value that does not fit; and for values that do not fit together.
    """
    problems: list[str] = []
    typed: dict[str, Distribution] = {}
    known = {fact.path for fact in fields()} | {
        f"{name}.kind" for name in ("method", "adapter", "launch", "parallel")
    }
    for path, given in space.items():
        if path in known and (why := _kept(path, recipe)):
            problems.append(f"{path} is not searched: {why}.")
            continue
        found = []
        for value in given.probed:
            try:
                found.append(_at(settled(recipe, {**_kinds(space, path), path: value}), path))
            except TunesmithError as error:
                problems += [part.strip() for part in (error.found or error.problem).splitlines()]
        if len(found) == len(given.probed):
            if given.kind == "choice":
                typed[path] = Distribution("choice", tuple(found))
            elif given.kind in ("uniform", "loguniform") and _is_whole(path):
                ends = f"{_number(given.low)}, {_number(given.high)}"
                problems.append(f"{path} takes whole numbers: write int({ends}).")
            else:
                typed[path] = given
    _raise(list(dict.fromkeys(problems)), fix="`tunesmith show recipe` lists every field with its meaning.")
    number = launch.processes(recipe.launch)
    for values in combinations(typed):
        try:
            launch.check(settled(recipe, values).training, number)
        except TunesmithError as error:
            told = ", ".join(f"{path}={value}" for path, value in values.items())
            raise RecipeError(
                f"The space has values that do not fit together: {told}.",
                found=" ".join(filter(None, (error.problem, error.found))),
                fix="Narrow the choices, or sweep one of them at a time.",
            ) from None
    return typed


def _raise(problems: Sequence[str], *, fix: str) -> None:
    if problems:
        many = len(problems) > 1
        raise RecipeError(
            f"The space has {counted(len(problems), 'fault')}." if many else problems[0],
            found="\n         ".join(problems) if many else None,
            fix=fix,
        )


def _kept(path: str, recipe: Recipe) -> str | None:
    """Why a field is the same in all trials; None where it may be searched."""
    if path in SEARCHED:
        return None
    section = path.split(".")[0]
    if section == "method" and recipe.training.best_by == "loss" and path != "method.neftune_noise_alpha":
        return OWN_LOSS
    return KEPT.get(path) or KEPT.get(section)


def _kinds(space: Space, path: str) -> dict[str, Any]:
    """Where the kind of a field's section is searched as well: one that has the field."""
    section, _, field = path.partition(".")
    kind = space.get(f"{section}.kind")
    if kind is None or field == "kind":
        return {}
    members = union_members(section)
    having = [value for value in kind.every if value in members and field in members[value].model_fields]
    return {f"{section}.kind": having[0]} if having else {}


def _is_whole(path: str) -> bool:
    return any(fact.type.startswith("whole number") for fact in fields() if fact.path == path)


def _at(recipe: Recipe, path: str) -> Any:
    value: Any = recipe.model_dump(mode="json")
    for part in path.split("."):
        value = value[part]
    return value


def settled(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with a trial's values. Where one is another kind of adapter or method, the fields that the kind before
    had alone, or by its own default, fall away. Raises RecipeError where the values do not fit."""
    layer = recipe.model_dump(mode="json")
    for path, value in values.items():
        section, _, field = path.partition(".")
        if field == "kind" and value != layer[section]["kind"]:
            allowed = union_members(section)[value].model_fields if value in union_members(section) else {}
            before = getattr(recipe, section)
            layer[section] = {
                name: layer[section][name]
                for name, own in type(before).model_fields.items()
                if name in allowed and getattr(before, name) != own.get_default(call_default_factory=True)
            }
    return validated(overlaid(layer, *(nested(path, value) for path, value in values.items())))


def combinations(space: Space) -> Iterator[dict[str, Any]]:
    """Every combination of the values that are probed, or as many drawn ones where there are very many."""
    names, probed = list(space), [distribution.probed for distribution in space.values()]
    if math.prod(map(len, probed)) <= COMBINED:
        yield from (dict(zip(names, values, strict=True)) for values in itertools.product(*probed))
        return
    chance = random.Random(0)
    for _ in range(COMBINED):
        yield {name: chance.choice(values) for name, values in zip(names, probed, strict=True)}


def drawn(space: Space, seed: int, number: int) -> dict[str, Any]:
    """The values of a trial by chance, which depend on the seed and its number alone."""
    chance = random.Random(f"{seed}/{number}")
    return {path: distribution.drawn(chance) for path, distribution in space.items()}


def is_used_up(space: Space, tried: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every combination of values was tried; no two of `tried` are alike."""
    return len(tried) >= math.prod(given.size for given in space.values())


def untried(
    space: Space, tried: Sequence[Mapping[str, Any]], seed: int, number: int
) -> dict[str, Any] | None:
    """The values of a trial by chance, other than those that were tried; None where the space is used up."""
    if is_used_up(space, tried):
        return None
    for again in range(DOUBLES):
        if (values := drawn(space, seed + again * 7919, number)) not in tried:
            return values
    every = itertools.product(*(given.every for given in space.values()))
    return next(v for v in (dict(zip(space, values, strict=True)) for values in every) if v not in tried)
