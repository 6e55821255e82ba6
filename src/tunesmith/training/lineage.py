"""What is behind a model's folder: the run that it is from, and how its base was stored while it was trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.models import Packing, read_packing
from tunesmith.recipe import QLoRA
from tunesmith.training.run import Run, is_run, open_run

FACTS = "merge.json"
"""What a merged folder was made from and what the check found, in that folder."""

CARRIED = "learned.json"
"""What a finished model's folder tells of the rows that it has learned from: hashes alone, of no use for reading them.
It is not uploaded: with it anybody could ask whether a row was among them."""


def run_of(folder: Path) -> tuple[str, Path] | None:
    """Name and folder of the run that a merged model is from; None where it is no such model."""
    try:
        facts: Mapping[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        return str(facts["run"]), (folder / facts["run_folder"]).resolve()
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_behind(model: str | Path) -> Run | None:
    """The run that a model is, was merged from, or lies in: `final_model`, `best_model` or a checkpoint of it.

    A plain copy of a final model is known by the file that it carries, where its run lies beside it or in `runs`.
    """
    path = Path(model).expanduser()
    origin = run_of(path)
    places = (*([origin[1]] if origin else []), path, *path.parents[:2], *_originals(path))
    return next((open_run(folder) for folder in places if is_run(folder)), None)


def run_behind_folder(model: str | Path) -> Run | None:
    """The run behind a folder; None for what is no folder here, such as a Hub id."""
    path = Path(model).expanduser()
    return run_behind(path) if path.is_dir() else None


def _originals(copy: Path) -> list[Path]:
    """Runs near a copied model whose own final model carries just the same."""
    try:
        own = (copy / CARRIED).read_bytes()
        name = Path(str(json.loads(own)["run"])).name
    except (OSError, ValueError, KeyError, TypeError):
        return []
    near = [Path("runs"), *copy.absolute().parents[:3], *(p / "runs" for p in copy.absolute().parents[:3])]
    found = []
    for run in (place / name for place in near):
        file = run / "final_model" / CARRIED
        if file.is_file() and file.read_bytes() == own:
            found.append(run)
    return found


def packing_behind(adapter: Path, run: Run | None) -> Packing | None:
    """How the base was packed into 4 bits in training: as the file beside an adapter says, or the run behind one that
    has none. None for a whole one, and where nobody says."""
    if packing := read_packing(adapter):
        return packing
    if run and isinstance(own := run.recipe().adapter, QLoRA):
        return Packing(own.double_quantization, str((run.read("plan.json") or {}).get("dtype", "float32")))
    return None


def is_of_4_bits(adapter: Path) -> bool:
    """Whether a folder is an adapter that was trained on a base packed into 4 bits."""
    return (adapter / "adapter_config.json").is_file() and bool(packing_behind(adapter, run_behind(adapter)))
