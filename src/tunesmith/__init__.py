"""tunesmith: fine-tune a language model on your own examples, and prove that it got better.

The public names are loaded when first used, so that `import tunesmith` costs no torch. `compose` and
`plan` are modules; their functions are `tunesmith.compose.compose` and `tunesmith.api.plan`.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Read by torch when it takes its first memory: a fresh block of some megabytes then costs a page fault for each 2 MB
# and not for each 4 kB, where Linux gives huge pages to those who ask. A training step takes such blocks all the time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_HOME = {
    "LLMFineTuner": "tunesmith.finetuner",
    "Recipe": "tunesmith.recipe",
    "TunesmithError": "tunesmith.errors",
    "get_user_input": "tunesmith.finetuner",
    **dict.fromkeys(
        (
            "train",
            "resume",
            "evaluate",
            "evaluate_suite",
            "judge",
            "compare",
            "chat",
            "runs",
            "demo",
            "show",
            "push",
            "pull",
            "validate",
            "merge",
        ),
        "tunesmith.api",
    ),
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from tunesmith.api import (
        chat,
        compare,
        demo,
        evaluate,
        evaluate_suite,
        judge,
        merge,
        pull,
        push,
        resume,
        runs,
        show,
        train,
        validate,
    )
    from tunesmith.errors import TunesmithError
    from tunesmith.finetuner import LLMFineTuner, get_user_input
    from tunesmith.recipe import Recipe


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
