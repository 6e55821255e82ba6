"""A run's events.jsonl, read once for all who watch it, and thinned out for plotting.

A log of 100,000 steps has 25 MB. It is read when the first one looks, and after that only what was added; of a curve
the highest and the lowest point of each stretch are kept, so that no peak is lost.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import threading
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tunesmith.evaluation.report import curves as figure_of
from tunesmith.evaluation.report import training_figures
from tunesmith.training.run import EVENTS, OF_STEPS
from tunesmith.ui import theme

POINTS = 1000
"""Most points of a curve that are plotted, but for its first and its last."""
SAMPLES = 40
LINES = 200
"""Sample answers and lines of the log that are kept."""
DIGITS = 6
"""Significant digits that are plotted."""
PIECE = 2**20
"""Bytes of a log that are taken together."""
NUMBERS = frozenset({int, float})

FACTS = ("loss", "learning_rate", "grad_norm", "token_accuracy", "memory")
COLORS = {
    "tuned": theme.SERIES[0], "base": "#7d8590",
    "good": "#1a7f37", "bad": "#c2255c", "wait": "#c9651a", "soft": "#8250df",
}  # fmt: skip
"""Of the roles that the report's figures name; readable on light and on dark ground."""


@dataclass
class Curve:
    """Values by step."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def cut_after(self, step: int) -> None:
        """Forget the points of later steps, which a continued run takes once more."""
        kept = bisect_right(self.steps, step)
        del self.steps[kept:], self.values[kept:]


def thinned(steps: Sequence[int], values: Sequence[float], most: int = POINTS) -> list[tuple[int, float]]:
    """At most about `most` of a curve's points: of each of `most / 2` stretches the lowest and the highest.

    The first and the last point stay.
    """
    n = len(steps)
    if n <= most:
        return list(zip(steps, values, strict=True))
    size = -(-n // (most // 2))
    missing = -n % size
    y = np.asarray(values, dtype=np.float64)
    starts = np.arange(0, n, size)
    low = np.pad(y, (0, missing), constant_values=np.inf).reshape(-1, size).argmin(1) + starts
    high = np.pad(y, (0, missing), constant_values=-np.inf).reshape(-1, size).argmax(1) + starts
    kept = np.unique(np.concatenate([[0], low, high, [n - 1]]))
    return [(int(steps[k]), float(y[k])) for k in kept]


@dataclass(frozen=True, eq=False)
class Seen:
    """What there is to see of a run now; the same object as long as nothing is added."""

    version: int
    """Grows with every event; equal where nothing has changed."""
    state: str
    """The last one that was told: `prepared`, `training`, `done` and so on; empty before the first."""
    step: int
    total_steps: int | None
    seconds_left: float | None
    latest: Mapping[str, float]
    """By name the newest value of `loss`, `learning_rate`, `tokens_per_second`, `memory` and so on."""
    figures: tuple[Mapping[str, Any], ...]
    """Title, caption, traces and layout of each figure there is data for, as the report has them."""
    samples: tuple[Mapping[str, Any], ...]
    """The newest answers, newest first: step, prompt, completion, reward."""
    told: tuple[str, ...]
    """Decisions, warnings, validations and states, oldest first."""
    no_numbers: int
    """Values that are no finite numbers, which no curve can show."""


class Events:
    """One run's log. Safe to be shared by threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        """All that was ever read of the file."""
        self._lock = threading.Lock()
        self._version = 0
        self._forget()

    def _forget(self) -> None:
        self._offset, self._inode, self._size = 0, -1, -1
        self._curves: dict[tuple[str, str], Curve] = {}
        self._samples: deque[dict[str, Any]] = deque(maxlen=SAMPLES)
        self._told: deque[str] = deque(maxlen=LINES)
        self._state, self._step, self._began_at = "", 0, 0
        self._total: int | None = None
        self._pace: tuple[float, float] | None = None
        self._no_numbers = 0
        self._seen: Seen | None = None

    def look(self) -> Seen:
        """What there is to see. Reads what was added since the last look of anybody, and nothing where nothing was."""
        with self._lock:
            try:
                now = self.path.stat()
            except OSError:
                now = None
            other = now is None or now.st_ino != self._inode or now.st_size < self._offset
            if other and (self._inode != -1 or self._seen is None):  # another file, or none (any more)
                self._forget()
                self._version += 1
            if now is not None and (now.st_size, now.st_ino) != (self._size, self._inode):
                self._size, self._inode = now.st_size, now.st_ino
                with contextlib.suppress(OSError):
                    self._read()
            if self._seen is None:
                self._seen = self._as_seen()
            return self._seen

    def _read(self) -> None:
        with self.path.open("rb") as file:
            file.seek(self._offset)
            is_whole = True
            while is_whole and (lines := file.readlines(PIECE)):
                self.bytes_read += sum(map(len, lines))
                is_whole = lines[-1].endswith(b"\n")
                if not is_whole:
                    lines.pop()  # being written: looked at again when it is whole
                self._offset += sum(map(len, lines))
                self._take_all([event for event in map(_event, lines) if event is not None])

    def _take_all(self, events: Sequence[Mapping[str, Any]]) -> None:
        if events:
            self._version += len(events)
            self._seen = None
        for is_step, group in itertools.groupby(events, _is_step):
            taken = list(group)
            if is_step:
                self._take_points("step", taken)
                self._take_pace(taken)
                self._step = taken[-1]["step"]
            else:
                for event in taken:
                    self._take(event)

    def _take(self, event: Mapping[str, Any]) -> None:
        kind, step = event.get("kind"), event.get("step")
        if kind == "state":
            self._take_state(event, step if isinstance(step, int) else 0)
        elif kind == "evaluation" and isinstance(step, int):
            self._take_points("evaluation", [event])
            self._told.append(f"step {step}: validation loss {_number(event.get('loss'))}")
        elif kind == "sample":
            self._samples.append(dict(event))
        elif kind == "warning":
            self._told.append(f"warning: {event.get('message')}")
        elif kind == "decision":
            because = f" ({event['reason']})" if event.get("reason") else ""
            self._told.append(f"{event.get('name')}: {event.get('value')}{because}")

    def _take_state(self, event: Mapping[str, Any], step: int) -> None:
        self._state = str(event.get("state"))
        error = f": {event['error']}" if event.get("error") else ""
        self._told.append(f"{self._state}{error}")
        if self._state == "training":
            for curve in self._curves.values():
                curve.cut_after(step)
            kept = [e for e in self._samples if (e.get("step") or 0) <= step]
            self._samples = deque(kept, maxlen=SAMPLES)
            total = event.get("total_steps")
            self._total = total if isinstance(total, int) and total > 0 else None
            self._step = self._began_at = step
            self._pace = None

    def _take_points(self, kind: str, events: Sequence[Mapping[str, Any]]) -> None:
        """The values of neighbouring events, name by name: one by one a long log takes a third longer."""
        steps = [event["step"] for event in events]
        for name in FACTS:
            self._add(kind, name, steps, [event.get(name) for event in events])
        measures = [m if isinstance(m := event.get("measures"), dict) else {} for event in events]
        for name in dict.fromkeys(name for of_step in measures for name in of_step):
            self._add(kind, f"measures.{name}", steps, [of_step.get(name) for of_step in measures])

    def _take_pace(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Tokens per second since the step before; tokens are counted through, seconds anew in each continuation."""
        steps, paces = [], []
        for event in events:
            tokens, seconds = event.get("tokens"), event.get("seconds")
            if not isinstance(tokens, int | float) or not isinstance(seconds, int | float):
                continue
            if self._pace and seconds > self._pace[1] and tokens > self._pace[0]:
                steps.append(event["step"])
                paces.append((tokens - self._pace[0]) / (seconds - self._pace[1]))
            self._pace = (tokens, seconds)
        self._add("step", "tokens_per_second", steps, paces)

    def _add(self, kind: str, name: str, steps: list[int], values: list[Any]) -> None:
        """What of the values are finite numbers; those that are infinite or none are counted, others left out."""
        if not NUMBERS.issuperset(map(type, values)):
            steps, values = _only(lambda value: type(value) in NUMBERS, steps, values)
        if not all(map(math.isfinite, values)):
            before = len(values)
            steps, values = _only(math.isfinite, steps, values)
            self._no_numbers += before - len(values)
        if values:
            curve = self._curves.setdefault((kind, name), Curve())
            curve.steps.extend(steps)
            curve.values.extend(values)

    def _as_seen(self) -> Seen:
        left = None
        done = self._step - self._began_at
        if self._total and self._pace and done > 0:
            left = max(self._total - self._step, 0) * self._pace[1] / done
        steps, validations = (self._sparse(kind) for kind in ("step", "evaluation"))
        gigabytes = [{"step": e["step"], "memory": e["memory"] / 1e9} for e in steps if "memory" in e]
        own = [
            figure_of(
                "Speed", "Tokens per second, from one logged step to the next.", "tokens per second",
                {"tokens per second": (steps, "tokens_per_second")},
            ),
            figure_of("Memory", "The most that was taken so far.", "GB", {"memory": (gigabytes, "memory")}),
        ]  # fmt: skip
        return Seen(
            version=self._version,
            state=self._state,
            step=self._step,
            total_steps=self._total,
            seconds_left=left,
            latest={
                name: curve.values[-1]
                for (kind, name), curve in self._curves.items()
                if kind == "step" and curve.values
            },
            figures=tuple(f for f in (*training_figures(steps, validations), *own) if f),
            samples=tuple(reversed(self._samples)),
            told=tuple(self._told),
            no_numbers=self._no_numbers,
        )

    def _sparse(self, kind: str) -> list[dict[str, Any]]:
        """The points that are shown, as events that hold nothing else, for the report's own figures."""
        by_step: dict[int, dict[str, Any]] = {}
        for (of, name), curve in self._curves.items():
            if of == kind:
                for step, value in thinned(curve.steps, curve.values):
                    event = by_step.setdefault(step, {"step": step})
                    if name.startswith("measures."):
                        event = event.setdefault("measures", {})
                    event[name.removeprefix("measures.")] = value
        return [by_step[step] for step in sorted(by_step)]


assert set(OF_STEPS) == {"step", "evaluation", "sample", "checkpoint"}, "what a continued run takes once more"


def _is_step(event: Mapping[str, Any]) -> bool:
    return event.get("kind") == "step" and isinstance(event.get("step"), int)


def _only(is_kept: Callable[[Any], bool], steps: list[int], values: list[Any]) -> tuple[list[int], list[Any]]:
    """The points whose values are such."""
    kept = [place for place, value in enumerate(values) if is_kept(value)]
    return [steps[place] for place in kept], [values[place] for place in kept]


def _event(line: bytes) -> dict[str, Any] | None:
    """A line of the log; None for one that is none."""
    try:
        event = orjson.loads(line)
    except ValueError:  # NaN, an infinity, half a character: Python's own reader takes them
        try:
            event = json.loads(line.decode("utf-8", errors="replace"))
        except ValueError:
            return None
    return event if isinstance(event, dict) else None


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


@functools.lru_cache(maxsize=64)
def events_of(run: Path) -> Events:
    """The one reader of a run's log in this process."""
    return Events(run / EVENTS)


def read_ahead(run: Path) -> None:
    """Begin to read the log of a run that a page has just been given: who turns to its curves finds it read."""
    threading.Thread(target=events_of(run).look, name="read-ahead", daemon=True).start()


def plotted(figure: Mapping[str, Any], *, height: int = 260) -> str:
    """A figure of the report as Plotly's JSON, for light and dark ground alike."""
    data, layout = figure["data"]["traces"], figure["data"]["layout"]
    traces = []
    for trace in data:
        color = COLORS.get(trace.get("role", ""), COLORS["tuned"])
        traces.append(
            {
                **{key: value for key, value in trace.items() if key not in ("role", "dash", "verdicts")},
                "line": {"color": color, "width": 1.6, "dash": trace.get("dash", "solid"), **trace.get("line", {})},
                "marker": {"color": color, **trace.get("marker", {})},
                **({"y": [_short(y) for y in trace["y"]]} if trace.get("y") and trace["type"] == "scatter" else {}),
            }
        )  # fmt: skip
    plain = theme.plain_layout(height)
    shown = {
        **plain,
        "legend": {"orientation": "h", "y": 1.15, "x": 1, "xanchor": "right"},
        **layout,
        "title": theme.plot_title(figure["title"]),
        **{axis: {**plain[axis], **layout.get(axis, {})} for axis in ("xaxis", "yaxis")},
    }
    # Plotly's buttons are hidden here, so none need be made.
    return json.dumps({"data": traces, "layout": shown, "config": {"displayModeBar": False}})


def _short(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
