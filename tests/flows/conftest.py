"""One run of the flow on a tiny T5 for all tests to look at."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from question_files import KEYS, flow, questions, save_t5, write


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory) -> Path:
    return save_t5(tmp_path_factory.mktemp("models") / "t5")


class Trained(NamedTuple):
    """A finished base run on 41 rows."""

    adapter: Path
    inputs: dict
    found: dict


@pytest.fixture(scope="session")
def trained(t5_folder, tmp_path_factory) -> Trained:
    from tunesmith.flows.question_answer import SUGGESTED_OUTPUTS

    folder = tmp_path_factory.mktemp("trained")
    inputs = {
        "data_path": str(write(folder / "questions.json", questions(41))),
        "model_id": str(t5_folder),
        "max_new_tokens": 6,
        **KEYS,
    }
    wanted = [
        *SUGGESTED_OUTPUTS, "fit_trainer", "finetuned_model", "hold_out_set_rows", "hold_out_set_metrics", "remarks",
        "hold_out_set", "validation_set", "tokenized_validation",
    ]  # fmt: skip
    found = flow().execute(wanted, inputs=inputs, overrides={"peft_model_id": str(folder / "adapter")})
    return Trained(folder / "adapter", inputs, found)
