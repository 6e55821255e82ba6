"""Where a measurement is kept: in a folder of its own, never over another one, with what tells it from others."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tunesmith import engines, evaluation
from tunesmith import plan as planning
from tunesmith.evaluation.measuring import Questions
from tunesmith.recipe import Recipe
from tunesmith.training.run import (
    Run,
    Watch,
    check_writable,
    dataset_name,
    deciding,
    is_run,
    warning,
    write_whole,
)


def check_place(models: Sequence[str | Path], output: Path | None, *, is_comparison: bool = False) -> None:
    """Raises RunError where a measurement of these models could not be kept, before the first answer."""
    runs = [Path(str(model)).expanduser() for model in models]
    run = next((Run(path) for path in runs if is_run(path)), None)
    answers = output or (run.evaluation if run else Path("evaluations"))
    fix = "Give --output with a folder that can be written."
    if is_comparison:
        fix = (
            "Give this user the right to, or copy the run to where there is room; a copy is compared as well."
        )
        check_writable((run.path.parent if run else Path()) / "comparisons", fix=fix)
    check_writable(answers, fix=fix)


def evaluation_folder(run: Run | None, model: str | Path, recipe: Recipe, facts: Mapping[str, Any]) -> Path:
    """Where a measurement is kept: never over another one, only over itself."""
    dataset = dataset_name(recipe.data.dataset)
    place = run.evaluation / dataset if run else Path("evaluations") / f"{Path(str(model)).name}_{dataset}"
    return _own_folder(place / "scores.json", {key: value for key, value in facts.items() if key != "model"})


def comparison_folder(
    run: Run | None, names: Sequence[str], dataset: str | None, facts: Mapping[str, Any]
) -> Path:
    """Where a comparison is kept, beside the first run of it; of very many models under a name that a file system
    takes."""
    name = "_vs_".join(re.sub(r"[^\w.-]+", "-", side) for side in names)
    if len(name) > 150:
        name = f"{name[:120]}_and_others_{hashlib.blake2b(name.encode(), digest_size=6).hexdigest()}"
    name = f"{name}_on_{dataset_name(dataset)}" if dataset else name
    beside = (run.path.parent if run else Path()) / "comparisons"
    return _own_folder(beside / name / "comparison.json", facts)


def _own_folder(file: Path, about: Mapping[str, Any]) -> Path:
    """The file's folder, with a number behind it where the file there tells another thing than `about`."""
    about = json.loads(json.dumps(about))
    for number in itertools.count(1):
        place = file.parent
        folder = place if number == 1 else place.with_name(f"{place.name}-{number}")
        try:
            before = json.loads((folder / file.name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return folder
        if all(key in before and before[key] == value for key, value in about.items()):
            return folder
    raise AssertionError("unreachable")


def made_with(models: Mapping[str, str | Path], recipe: Recipe) -> dict[str, Any]:
    """What tells one measurement from another on the same questions: the models' files, by name, and all settings.

    Of a server its address without user and query, and the models' names there.
    """
    device = planning.device()
    dtype = planning.inference_dtype(recipe.model.dtype, device)
    settings = recipe.evaluation.model_dump(mode="json", exclude={"server"})
    server = recipe.evaluation.server
    address = urlsplit(server.base_url)
    shown = address._replace(netloc=address.netloc.rpartition("@")[2], query="", fragment="").geturl()
    rest = recipe.model_dump(mode="json", include={"data", "method"})
    about = json.dumps([rest, recipe.model.chat_template], sort_keys=True, default=str)
    return {
        "identity": {
            name: evaluation.identity(recipe.model, str(model), device=device, dtype=dtype)
            for name, model in models.items()
        },
        "settings": {**settings, "server": {"base_url": shown, "models": dict(server.models)}},
        "data_and_method": hashlib.sha256(about.encode()).hexdigest(),
    }


def keep_leaks(facts: Mapping[str, Any] | None, file: Path, watch: Watch) -> None:
    """Write the leakage, and say where its pairs are."""
    if facts is None:
        return
    write_whole(file, json.dumps(facts, indent=1, ensure_ascii=False))
    if facts["leaked"]:
        warning(watch)(f"{facts['remark']} The pairs are in {file}.")
    elif facts["review"]:
        deciding(watch)("leakage pairs", str(file), "pairs with too much in common, to be looked at")


def short_leakage(facts: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The leakage without the texts of its pairs."""
    if facts is None:
        return None
    kept = {key: facts[key] for key in ("questions", "trained", "counts", "remark", "parts", "copied")}
    return {**kept, "leaked": len(facts["leaked"]), "review": len(facts["review"])}


def settle_answers(place: Path, questions: Questions) -> None:
    """Keep the engine checks beside the rows, which are written by now, and let go of what a kill would have needed."""
    if questions.checks:
        write_whole(place / "engine_check.json", json.dumps(questions.engine_check(), indent=1))
    engines.forget(questions.unfinished)
    with suppress(OSError):  # was never there
        questions.unfinished.rmdir()
