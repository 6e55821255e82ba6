"""Models and a server that the tests of serving share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from serving_of_tests import served

from tunesmith.serving.limits import Limits


@pytest.fixture(scope="session")
def talking_folder(tiny_model_folder, tmp_path_factory) -> Path:
    """The tiny model with larger weights, so that its answers differ from one another, and end at times."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("talking")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def running(talking_folder):
    with served(talking_folder, limits=Limits(prompt_tokens=200, max_tokens=300, body_bytes=20_000)) as found:
        yield found
