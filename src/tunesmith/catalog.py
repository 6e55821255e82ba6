"""The catalogue: models, data sets and strategies that have a name, the shipped ones and the user's.

`catalog.yaml` ships with tunesmith. A file of the same layout adds to it: `--catalog FILE`, else the file
that TUNESMITH_CATALOG names, else `~/.config/tunesmith/catalog.yaml`. What stands in it under a shipped
name replaces that entry; models are added to their category. Methods and metrics come from the program.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PositiveInt, ValidationError, model_validator

from tunesmith import listing
from tunesmith.errors import RecipeError, closest, nearest
from tunesmith.recipe import DataSource, Section, Task

VARIABLE = "TUNESMITH_CATALOG"
"""Environment variable that names the user's catalogue."""

_chosen: ContextVar[Path | None] = ContextVar("catalog", default=None)


class Preparation(Section):
    """How questions are made of the columns."""

    type: Literal["text_classification", "summarization"]
    """`text_classification`: a text is asked with its first `prompt_length` characters, and the rest is the
    answer. `summarization`: the columns are question and answer already."""

    prompt_prefix: str | None = None
    """Text before every question."""

    prompt_length: PositiveInt | None = None
    """Characters of the text that make the question."""

    @model_validator(mode="after")
    def _fits(self) -> Preparation:
        if (self.prompt_length is None) == (self.type == "text_classification"):
            raise ValueError("prompt_length belongs to text_classification, which needs it")
        return self


class DataSet(Section):
    """A data set with a name, and how it is read."""

    about: str
    """One line for people."""

    path: str
    """A Hub id, or a file or folder; a path that is not absolute counts from the catalogue's own folder."""

    task: Task | None = None
    """What it is usually trained for; said, never applied."""

    config: str | None = None
    split: str | None = None
    data_files: str | None = None
    revision: str | None = None
    format: str = "auto"
    columns: dict[str, str] = {}
    """Columns to rename: what it is called in the data, and what it is called in the format."""

    preparation: Preparation | None = None

    def layer(self) -> dict[str, Any]:
        """The recipe's fields of a data source that the entry sets."""
        fields = self.model_dump(exclude={"about", "path", "task", "preparation"}, exclude_defaults=True)
        if self.preparation:
            fields |= self.preparation.model_dump(exclude={"type"}, exclude_none=True)
        return {"dataset": self.path, **fields}


class Strategy(Section):
    """A way to tokenize or to batch, as settings of the recipe."""

    about: str
    recipe: dict[str, Any]
    """A sparse recipe."""


class Catalog(Section):
    """Everything that has a name."""

    model_examples: dict[str, list[str]] = Field(default={})
    """Model ids by category."""

    datasets: dict[str, DataSet] = Field(default={})
    tokenization_strategies: dict[str, Strategy] = Field(default={})
    collation_strategies: dict[str, Strategy] = Field(default={})


PARTS = (
    "model_examples", "datasets", "fine_tuning_methods", "evaluation_metrics", "tokenization_strategies",
    "collation_strategies",
)  # fmt: skip
SHORT = {"models": "model_examples", "datasets": "datasets", "methods": "fine_tuning_methods",
         "metrics": "evaluation_metrics", "tokenization": "tokenization_strategies",
         "collation": "collation_strategies"}  # fmt: skip
"""What the parts are called on the command line; their names in a catalogue file are understood as well."""


@contextlib.contextmanager
def using(file: Path | None) -> Iterator[None]:
    """Add this file's entries for the time being; None leaves what there is."""
    token = _chosen.set(file or _chosen.get())
    try:
        yield
    finally:
        _chosen.reset(token)


def catalog() -> Catalog:
    """The shipped catalogue with the user's entries. Raises RecipeError for a file that does not fit."""
    shipped, file = _shipped(), user_file()
    if file is None:
        return shipped
    own = _read(file, file.stat().st_mtime_ns if file.exists() else 0)
    models = {
        category: [*dict.fromkeys((*shipped.model_examples.get(category, ()), *own.model_examples.get(category, ())))]
        for category in {**shipped.model_examples, **own.model_examples}
    }  # fmt: skip
    return Catalog(
        model_examples=models,
        datasets={**shipped.datasets, **own.datasets},
        tokenization_strategies={**shipped.tokenization_strategies, **own.tokenization_strategies},
        collation_strategies={**shipped.collation_strategies, **own.collation_strategies},
    )


def user_file() -> Path | None:
    """The user's catalogue, if there is one: the chosen file, the variable's, or that in the home folder."""
    named = _chosen.get() or os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    file = home / "tunesmith" / "catalog.yaml"
    return file if file.is_file() else None


def resolved(source: Mapping[str, Any]) -> dict[str, Any]:
    """A data source's fields, with a name of the catalogue replaced by what it stands for.

    Fields that are given stay as they are, also where they say what is the default anyway.
    """
    entry = _entry(source.get("dataset"))
    if entry is None:
        return dict(source)
    return {**entry.layer(), **{name: value for name, value in source.items() if name != "dataset"}}


def above(source: Mapping[str, Any], name: Any) -> dict[str, Any]:
    """What remains of a lower layer's fields of a data source when a layer above names this data set.

    A recipe that a run has written holds every field of its own data set, most of them at their defaults, and
    these are nobody's wish for another set: what the entry says of them holds.
    """
    entry = _entry(name)
    if entry is None:
        return dict(source)
    said = entry.layer()
    return {
        field: value
        for field, value in source.items()
        if field not in said or value != DataSource.model_fields[field].get_default()
    }


def notes(data: Any) -> list[str]:
    """What is to be said of the catalogue's names in a recipe's data section."""
    said = []
    parts = [data, *(data.get("mix") or [])] if isinstance(data, Mapping) else []
    for part in parts:
        entry = _entry(part.get("dataset")) if isinstance(part, Mapping) else None
        if entry:
            layer = entry.layer()
            path = layer.pop("dataset")
            settings = ", ".join(f"{name} {value}" for name, value in layer.items() if name not in part)
            instead = ", ".join(f"{name} {part[name]}" for name in layer if name in part)
            said.append(
                f"data set '{part['dataset']}' of the catalogue is {path}"
                + (f": {settings}" if settings else "")
                + (f"; given instead of what it says: {instead}" if instead else "")
            )
    return said


def closest_dataset(name: str) -> str | None:
    """The data set of the catalogue that is spelled most like this name."""
    return closest(name, catalog().datasets)


def strategy(part: str, name: str, **lengths: int) -> dict[str, Any]:
    """The sparse recipe of a tokenization or collation strategy; `custom` takes `max_input_length` and
    `max_output_length`.

    Raises RecipeError for an unknown name, and for lengths that the strategy does not have.
    """
    known: Mapping[str, Strategy] = getattr(catalog(), SHORT.get(part, part))
    if name not in known:
        raise RecipeError(f"There is no {part} strategy '{name}'.", fix=nearest(name, known))
    layer = {section: dict(fields) for section, fields in known[name].recipe.items()}
    for field, value in lengths.items():
        if field not in layer.get("method", {}):
            raise RecipeError(
                f"The {part} strategy '{name}' has no {field}.", fix=nearest(field, layer.get("method", {}))
            )
        layer["method"][field] = value
    _checked(layer, f"{part} {name}")
    return layer


def get_available_options(key: str, config: Mapping[str, Any] | None = None) -> list[str]:
    """The names that a part of the catalogue has, such as `datasets` or `fine_tuning_methods`.

    `config` is a catalogue as plain values to look into instead. Raises RecipeError naming the parts.
    """
    if config is not None:
        if key not in config:
            raise RecipeError(f"The configuration has no '{key}'.", fix=nearest(key, config))
        return list(config[key])
    return [entry["key"] for entry in _listed(_part(key))]


def entries(wanted: str | None = None) -> list[dict[str, Any]]:
    """The catalogue, a part of it, or what has this name in any part, as `show catalog` lists it.

    Raises RecipeError naming what was probably meant, or the parts.
    """
    if wanted in (*PARTS, *SHORT):
        return _listed(_part(str(wanted)))
    every = [entry for part in PARTS for entry in _listed(part)]
    if wanted is None:
        return every
    found = [
        entry
        for entry in every
        if wanted == entry["key"] or (entry["part"] == "model_examples" and wanted in entry["value"])
    ]
    if not found:
        models = [name for entry in every if entry["part"] == "model_examples" for name in entry["value"]]
        known = [*SHORT, *(entry["key"] for entry in every), *models]
        raise RecipeError(
            f"The catalogue has neither a part nor an entry '{wanted}'.",
            fix=nearest(wanted, known if closest(wanted, known) else SHORT),
        )
    return found


def _part(name: str) -> str:
    part = SHORT.get(name, name)
    if part not in PARTS:
        raise RecipeError(f"The catalogue has no part '{name}'.", fix=nearest(name, SHORT))
    return part


def _listed(part: str) -> list[dict[str, Any]]:
    listed = {"model_examples": _models, "datasets": _datasets, "fine_tuning_methods": _methods,
              "evaluation_metrics": _metrics}  # fmt: skip
    lines = listed[part]() if part in listed else _strategies(part)
    short = next(name for name, long in SHORT.items() if long == part)
    return [{"name": f"{short}: {line['key']}", "part": part, **line} for line in lines]


def _models() -> list[dict[str, Any]]:
    return [{"key": c, "about": ", ".join(ids), "value": ids} for c, ids in catalog().model_examples.items()]


def _datasets() -> list[dict[str, Any]]:
    from tunesmith.assets import EXAMPLES

    examples = [
        {"key": f"example:{e.name}", "about": f"{e.about} (ships with tunesmith; {e.task})"}
        for e in EXAMPLES.values()
    ]
    named = [
        {
            "key": name,
            "about": entry.about + (f" ({entry.task})" if entry.task else ""),
            "sample": json.dumps(entry.layer(), ensure_ascii=False),
            "value": entry.layer(),
        }
        for name, entry in catalog().datasets.items()
    ]
    return [*named, *examples]


def _methods() -> list[dict[str, Any]]:
    return [{"key": entry["name"], "about": entry["about"]} for entry in listing.methods()]


def _metrics() -> list[dict[str, Any]]:
    return [{"key": entry["name"], "about": entry["about"]} for entry in listing.metrics()]


def _strategies(part: str) -> list[dict[str, Any]]:
    return [
        {
            "key": name,
            "about": entry.about,
            "sample": " ".join(
                f"--set {section}.{field}={json.dumps(value).strip(chr(34))}"
                for section, fields in entry.recipe.items()
                for field, value in fields.items()
            ),
            "value": entry.recipe,
        }
        for name, entry in getattr(catalog(), part).items()
    ]


def _entry(name: Any) -> DataSet | None:
    """The data set that a name stands for; paths, Hub ids with an owner and `example:` never are names."""
    if not isinstance(name, str) or not name or set(name) & set("/\\:") or Path(name).exists():
        return None
    return catalog().datasets.get(name)


@functools.cache
def _shipped() -> Catalog:
    text = resources.files("tunesmith").joinpath("catalog.yaml").read_text(encoding="utf-8")
    return Catalog.model_validate(yaml.safe_load(text))


@functools.lru_cache(maxsize=8)
def _read(file: Path, changed: int) -> Catalog:
    """A user's catalogue, checked whole."""
    from tunesmith.compose import read_layer

    layer = read_layer(file, what="catalogue", example="datasets: {name: {about: ..., path: ...}}")
    try:
        own = Catalog.model_validate(layer)
    except ValidationError as error:
        problems = list(dict.fromkeys(_problem(e) for e in error.errors()))
        raise RecipeError(
            f"The catalogue {file} does not fit." if len(problems) > 1 else f"{file}: {problems[0]}",
            found="\n         ".join(problems) if len(problems) > 1 else None,
            fix="docs/catalog.md says what stands in a catalogue.",
        ) from None
    bad = [name for name in own.datasets if set(name) & set("/\\:")]
    if bad:
        raise RecipeError(
            f"{file}: a data set's name has no / \\ or :, which paths and Hub ids have.", found=", ".join(bad)
        )
    for part in ("tokenization_strategies", "collation_strategies"):
        for name, entry in getattr(own, part).items():
            _checked(entry.recipe, f"{file}: {part}.{name}")
    return own.model_copy(
        update={"datasets": {name: _anchored(entry, file.parent) for name, entry in own.datasets.items()}}
    )


def _anchored(entry: DataSet, folder: Path) -> DataSet:
    """The entry with a local path in full, so that it holds from everywhere."""
    path = folder / Path(entry.path).expanduser()
    return entry.model_copy(update={"path": os.path.abspath(path)}) if path.exists() else entry


def _checked(layer: Mapping[str, Any], what: str) -> None:
    """Raises RecipeError where a strategy sets what the recipe does not have."""
    from tunesmith.compose import validated

    try:
        validated(dict(layer))
    except RecipeError as error:
        raise RecipeError(f"{what}: {error.problem}", found=error.found, fix=error.fix) from None


def _problem(error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    where, value = ".".join(path), error.get("input")
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg']}" + ("." if error["type"] == "missing" else f"; found {value!r}.")
    section: type[Section] = Catalog
    if len(path) == 3:
        section = DataSet if path[0] == "datasets" else Strategy
    elif len(path) > 3:
        section = Preparation
    return f"{where} is not known. {nearest(path[-1], section.model_fields)}"
