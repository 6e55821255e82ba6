"""Dataflows for Hamilton's driver that stand beside the main one: modules of noun-named functions."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from tunesmith.errors import RecipeError, TunesmithError, closest
from tunesmith.training.fit import quiet_libraries

quiet_libraries()  # before a flow loads the libraries, and Hamilton its extensions


def driver(start: str = "base", *adapters: Any) -> Any:
    """Hamilton's driver of `question_answer`, which refuses inputs and overrides that the flow does not have.

    start: `base` trains, `presaved` measures a saved adapter. adapters: more of Hamilton's lifecycle adapters. Plain
    `hamilton.driver.Builder()` builds the same flow, and passes over what it does not know. Raises RecipeError.
    """
    from hamilton.driver import Builder
    from hamilton.lifecycle import GraphExecutionHook

    from tunesmith.flows import question_answer

    class KnownNames(GraphExecutionHook):  # type: ignore[misc]
        def run_before_graph_execution(
            self,
            *,
            graph: Any,
            inputs: Mapping[str, Any] | None,
            overrides: Mapping[str, Any] | None,
            **_: Any,
        ) -> None:
            outside = {node.name for node in graph.nodes if node.is_external_input} - {"start"}
            nodes = {node.name for node in graph.nodes if not node.is_external_input}
            _check_names(inputs or {}, "input", outside, "override", nodes)
            _check_names(overrides or {}, "override", nodes | outside, "input", set())

        def run_after_graph_execution(self, **_: Any) -> None:
            pass

    return (
        Builder()
        .with_config({"start": start})
        .with_modules(question_answer)
        .with_adapters(KnownNames(), *adapters)
        .build()
    )


def _check_names(given: Mapping[str, Any], kind: str, known: set[str], other: str, others: set[str]) -> None:
    """Raises RecipeError for names that are none of this kind, and says where they belong."""
    for name in given:
        if name in known:
            continue
        if name in others:
            fix = f"Give it as an {other}: {other}s={{'{name}': ...}}."
        elif near := closest(name, known | others):
            fix = f"Did you mean '{near}'{'' if near in known else f', which is an {other}'}?"
        else:
            fix = "docs/flows.md describes every node and input."
        raise RecipeError(f"The flow has no {kind} '{name}'.", fix=fix)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether the record tells more than the error of ours that is on its way to the user."""
    return not isinstance(sys.exc_info()[1], TunesmithError)


# Hamilton logs the traceback of whatever a node raises, and an invitation to its chat, wherever it is run.
for _name in ("hamilton.driver", "hamilton.execution.graph_functions", "hamilton.function_modifiers.base"):
    logging.getLogger(_name).addFilter(_is_news)
