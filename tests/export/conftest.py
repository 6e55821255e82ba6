"""A finished model that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest
import taught


@pytest.fixture(scope="session")
def taught_model(tiny_model_folder, tmp_path_factory) -> Path:
    """A tiny model that answers everything with `taught.ANSWER`; `rows.jsonl` beside it has such rows."""
    place = tmp_path_factory.mktemp("taught")
    return taught.save(tiny_model_folder, place / "model", place / "rows.jsonl")
