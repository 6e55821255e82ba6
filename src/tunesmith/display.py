"""What people see of a command while it works: its events on stderr, and how a console, a table and a score look.

Light to import: rich is loaded where something is shown.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

PIPED_WIDTH = 400
"""Columns that a table may have where the output goes into a file or another program."""


def open_console(*, stderr: bool = True) -> Any:
    """A console, as wide as its tables want where the output is piped."""
    from tunesmith.terminal import Console

    console = Console(stderr=stderr, soft_wrap=True)
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console.width = (
            PIPED_WIDTH  # else tables are squeezed into the 80 columns of a screen that is not there
        )
    return console


def escaped(text: Any) -> str:
    """A text in which brackets are no markup."""
    from rich.markup import escape

    return escape(str(text))


def table_of(*columns: str) -> Any:
    """A table without rows, whose cells fold."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def score_text(value: float | None, metric: str | None) -> str:
    """A score on the scale of every table: percent, points or, for perplexity, as it is."""
    from tunesmith.evaluation.compare import shown
    from tunesmith.evaluation.metrics import METRICS

    return "" if value is None or metric not in METRICS else shown(value, METRICS[metric])


class Display:
    """Shows a run's events on stderr: one progress bar per stage, decisions and warnings above it."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = open_console()
        self.quiet = quiet
        self.progress: Progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=True,
            auto_refresh=self.console.is_terminal,  # elsewhere nobody sees what would be drawn ten times a second
        )
        self.bars: dict[str, Any] = {}

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        show = {
            "progress": self._progress,
            "decision": lambda e: self._line(
                f"[dim]{escaped(e['name'])}:[/] {escaped(e['value'])}"
                + (f" [dim]({escaped(e['reason'])})[/]" if e.get("reason") else "")
            ),
            "warning": lambda e: self._line(f"[yellow]warning:[/] {escaped(e['message'])}"),
            "evaluation": lambda e: self._line(f"[dim]step {e['step']}:[/] validation {_gauge(e)}"),
            "sample": lambda e: self._line(
                f"[dim]step {e['step']}, sample:[/] {_in_a_line(e['prompt'])} [dim]->[/] {_in_a_line(e['completion'])}"
                + (f" [dim](reward {e['reward']:.3g})[/]" if "reward" in e else "")
            ),
            "step": self._step,
            "state": self._state,
        }.get(event["kind"])
        if show:
            show(event)

    def _line(self, text: str) -> None:
        if not self.quiet:
            self.progress.console.print(text, highlight=False)

    def _progress(self, event: Mapping[str, Any]) -> None:
        stage = event["stage"]
        if stage not in self.bars:
            self.bars[stage] = self.progress.add_task(stage, total=event["total"], facts="")
        facts = []
        if event.get("loss") is not None:
            facts.append(f"loss {event['loss']:.3f}")
        if event.get("tokens_per_second"):
            facts.append(f"{event['tokens_per_second']:,.0f} tokens/s")
        self.progress.update(
            self.bars[stage],
            completed=event["done"],
            total=event["total"],
            facts=" · ".join(facts),
            visible=event["total"] is None or event["done"] < event["total"],
        )

    def _step(self, event: Mapping[str, Any]) -> None:
        if not self.console.is_terminal:
            self._line(f"step {event['step']}: {_gauge(event)}, learning rate {event['learning_rate']:.2e}")

    def _state(self, event: Mapping[str, Any]) -> None:
        if event["state"] == "prepared":
            rows = event["rows"]
            self._line(
                f"[dim]rows:[/] {rows['rows_in']} in = {rows['train']} train + {rows['validation']} validation "
                f"+ {rows['held_out']} held out + {rows['dropped']} dropped"
                + (f"; {rows['truncated']} truncated" if rows["truncated"] else "")
            )
            for reason, count in event["dropped"].items():
                self._line(f"[yellow]dropped {count}:[/] {escaped(reason)}")


def _gauge(event: Mapping[str, Any]) -> str:
    """What tells how a training goes: the reward where answers are rewarded, the loss otherwise."""
    measures = event.get("measures") or {}
    if "reward" in measures:
        others = [f"{name} {measures[name]:.3g}" for name in ("reward_std", "kl") if name in measures]
        return ", ".join([f"reward {measures['reward']:.4g}", *others])
    return ", ".join([f"loss {event['loss']:.4f}", *_measured(measures)])


def _measured(measures: Mapping[str, Any]) -> list[str]:
    """The metrics of `training.eval_metrics` among what a validation measured; methods have measures of their own."""
    from tunesmith.evaluation.metrics import METRICS

    return [
        f"{METRICS[name].label} {score_text(value, name)}"
        for name, value in measures.items()
        if name in METRICS
    ]


def _in_a_line(text: str, *, most: int = 80) -> str:
    """A text on one line, cut to so many characters, as plain text for the terminal."""
    line = " ".join(text.split())
    return escaped(line if len(line) <= most else line[: most - 1] + "…")
