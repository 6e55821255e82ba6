"""What there is of each kind, as `tunesmith show` prints it: entries with a name and what it is about."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tunesmith.errors import TunesmithError, nearest


def entries(what: str, name: str | None = None) -> list[dict[str, Any]]:
    """All of a kind, or the one of this name. Raises TunesmithError naming the kinds."""
    if what not in LISTS:
        raise TunesmithError(f"There is nothing called '{what}' to show.", fix=nearest(what, LISTS))
    return LISTS[what](name)


def presets(_: str | None = None) -> list[dict[str, Any]]:
    """Named layers for a situation."""
    from tunesmith.compose import TASKS, preset_about, preset_layer, preset_names

    return [
        {"name": name, "about": preset_about(name), "sample": json.dumps(preset_layer(name))}
        for name in preset_names()
        if name not in TASKS
    ]


def tasks(_: str | None = None) -> list[dict[str, Any]]:
    """What a model is tuned for."""
    from tunesmith.compose import TASKS, preset_about, preset_layer

    return [{"name": t, "about": preset_about(t), "sample": json.dumps(preset_layer(t))} for t in TASKS]


def recipe_fields(_: str | None = None) -> list[dict[str, Any]]:
    """Every field of the recipe, with type and default."""
    from tunesmith.recipe import fields

    return [
        {
            "name": f.path + (f" ({f.kind})" if f.kind else ""),
            "about": f.about,
            "sample": f"{f.type}; default {f.default!r}",
        }
        for f in fields()
    ]


def formats(_: str | None = None) -> list[dict[str, Any]]:
    """How rows may look, with a real one."""
    from tunesmith.data.formats import FORMATS

    return [
        {"name": f.name, "about": f.about, "sample": json.dumps(f.sample, ensure_ascii=False)}
        for f in FORMATS.values()
    ]


def templates(_: str | None = None) -> list[dict[str, Any]]:
    """Chat templates that have a name."""
    from tunesmith.data.templates import NAMED_TEMPLATES

    return [{"name": name, "about": template} for name, template in NAMED_TEMPLATES.items()]


def methods(_: str | None = None) -> list[dict[str, Any]]:
    """How weights are trained."""
    from tunesmith.compose import union_members

    return [
        {"name": kind, "about": " ".join(str(section.__doc__).split())}
        for kind, section in union_members("method").items()
    ]


def metrics(_: str | None = None) -> list[dict[str, Any]]:
    """How answers are measured."""
    from tunesmith.evaluation.metrics import METRICS

    return [{"name": metric.name, "about": metric.about} for metric in METRICS.values()]


def examples(_: str | None = None) -> list[dict[str, Any]]:
    """The data sets that ship, with a row of each."""
    from tunesmith.assets import EXAMPLES
    from tunesmith.data.sources import read

    return [
        {
            "name": f"example:{example.name}",
            "about": example.about,
            "sample": json.dumps(
                dict(next(read(f"example:{example.name}", max_rows=1).records).values), ensure_ascii=False
            ),
        }
        for example in EXAMPLES.values()
    ]


def model(name: str | None) -> list[dict[str, Any]]:
    """A model in numbers; the shipped one where none is named."""
    from tunesmith.training.fit import quiet_libraries

    quiet_libraries()
    from tunesmith.architecture import architecture

    named = [] if name else [{"name": "model", "about": "tiny, which ships with tunesmith (none was named)"}]
    return [*named, *architecture(name or "tiny").entries()]


def catalog(part: str | None) -> list[dict[str, Any]]:
    """The catalogue, a part of it, or an entry."""
    from tunesmith.catalog import entries

    return entries(part)


LISTS: dict[str, Callable[[str | None], list[dict[str, Any]]]] = {
    "presets": presets,
    "tasks": tasks,
    "recipe": recipe_fields,
    "formats": formats,
    "templates": templates,
    "methods": methods,
    "metrics": metrics,
    "examples": examples,
    "model": model,
    "catalog": catalog,
}
