"""Which learning rate fits: a range test (Smith 2017, arXiv 1506.01186, section 3.3) before the training.

The rate grows step by step, exponentially, while the model trains on its own batches; where the loss falls fastest and
where it stops falling say which rates are worth trying. Nothing of it stays: weights and random numbers are put back.
"""

from __future__ import annotations

import html
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import RecipeError
from tunesmith.recipe import LoRA, Recipe

STEPS = 100
SEEDS = 3
FULL = (1e-7, 1.0)
"""Rates that are tried where weights themselves are trained."""
LOW_RANK = (1e-6, 10.0)
"""Of adapters, which start at zero and take about ten times the rate (arXiv 2405.09673, section 6)."""
BEYOND = 1.0
"""The sweep stops where the smoothed loss has risen above the first ones by this share of them and by three times what
it had fallen, whichever is more: a loss that fell far may swing as far, and one that hardly fell has
noise of its own."""


@dataclass(frozen=True)
class Sweep:
    """One pass over the rates."""

    seed: int
    losses: tuple[float, ...]
    """By step, as long as the sweep went on."""
    diverged: bool


@dataclass(frozen=True)
class RateSearch:
    """What a range test came to."""

    rates: tuple[float, ...]
    sweeps: tuple[Sweep, ...]
    smoothed: tuple[float | None, ...]
    """Mean over the seeds, smoothed; None from where the first sweep had stopped."""
    suggestion: float | None
    """The rate to begin with; None where none of them lowered the loss."""
    low: float | None
    """Where the loss falls fastest."""
    high: float | None
    """A third of the rate at which it is lowest, or the suggestion where that is higher: above it training may fail."""
    spread: float | None
    """By which factor the suggestions of single seeds differ."""
    measure: str
    reason: str
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)

    def sentence(self) -> str:
        """The suggestion for people."""
        if self.suggestion is None:
            return f"No learning rate to suggest: {self.reason}"
        worth = f"worth trying from {self.low:.1e} to {self.high:.1e}"
        return f"Learning rate {self.suggestion:.1e}, {worth}. {self.reason}"


def exponential(low: float, high: float, steps: int) -> tuple[float, ...]:
    """Rates from `low` to `high`, each the same factor above the one before."""
    if not 0 < low < high or steps < 10:
        raise RecipeError(
            "These learning rates cannot be swept.",
            found=f"{steps} steps from {low:g} to {high:g}",
            fix="Give a low rate above 0, a higher one, and at least 10 steps.",
        )
    return tuple(low * (high / low) ** (n / (steps - 1)) for n in range(steps))


class Divergence:
    """Tells from one loss after the other whether a sweep has gone too far."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._mean = self._best = math.nan

    def seen(self, loss: float) -> bool:
        """Take the next loss; True where the sweep is to stop."""
        self.losses.append(loss)
        if not math.isfinite(loss):
            return True
        count = len(self.losses)
        self._mean = loss if count == 1 else 0.7 * self._mean + 0.3 * loss
        first = sum(self.losses[:5]) / min(count, 5)
        if count < 8:
            self._best = first
            return False
        self._best = min(self._best, self._mean)
        return self._mean > first + max(BEYOND * abs(first), 3 * (first - self._best))


def sweep(step: Callable[[float], float], rates: Sequence[float], *, seed: int = 0) -> Sweep:
    """Take one step at each rate, as long as it goes well; `step` gives the loss from before its update."""
    watching = Divergence()
    stopped = any(watching.seen(step(rate)) for rate in rates)
    return Sweep(seed, tuple(watching.losses), stopped)


def found(
    rates: Sequence[float], sweeps: Sequence[Sweep], *, measure: str = "loss", notes: Sequence[str] = ()
) -> RateSearch:
    """The suggestion from all sweeps.

    Losses are averaged over the seeds as far as all of them went and smoothed around each rate. The suggestion is the
    geometric mean of the rate at which the loss falls fastest and of the one at which it is lowest.
    """
    reach = min(sum(math.isfinite(x) for x in s.losses) for s in sweeps)
    mean = [sum(s.losses[n] for s in sweeps) / len(sweeps) for n in range(reach)]
    curve = smoothed(mean)
    kept = (*curve, *[None] * (len(rates) - reach))
    own = [s for one in sweeps if (s := _suggested(rates, smoothed(_finite(one.losses)))) is not None]
    chosen = _suggested(rates, curve)
    if chosen is None:
        reason = (
            f"none of the rates from {rates[0]:.0e} to {rates[max(reach - 1, 0)]:.0e} lowered the {measure}."
        )
        return RateSearch(
            tuple(rates), tuple(sweeps), kept, None, None, None, None, measure, reason, tuple(notes)
        )
    steepest, lowest = chosen
    middle = [math.sqrt(a * b) for a, b in own]
    spread = max(middle) / min(middle) if len(middle) > 1 else None
    said = list(notes)
    if not any(s.diverged for s in sweeps) and lowest >= rates[-3]:
        said.append(
            f"the highest rate tried still lowered the {measure}: a higher end may suggest a higher rate"
        )
    if spread and spread > 5:
        said.append(f"single seeds differ by a factor of {spread:.0f}: take more seeds or steps")
    falls = f"The {measure} falls fastest at {steepest:.1e} and is lowest at {lowest:.1e}"
    reason = f"{falls} (mean of {len(sweeps)} seeds)."
    return RateSearch(
        tuple(rates),
        tuple(sweeps),
        kept,
        math.sqrt(steepest * lowest),
        steepest,
        max(lowest / 3, math.sqrt(steepest * lowest)),
        spread,
        measure,
        reason,
        tuple(said),
    )


def smoothed(losses: Sequence[float]) -> tuple[float, ...]:
    """Mean of each loss and those around it, so that the curve is not shifted towards higher rates."""
    width = max(len(losses) // 30, 1)
    parts = [losses[max(n - width, 0) : n + width + 1] for n in range(len(losses))]
    return tuple(sum(part) / len(part) for part in parts)


def _finite(losses: Sequence[float]) -> list[float]:
    return [x for x in losses if math.isfinite(x)]


def _suggested(rates: Sequence[float], curve: Sequence[float]) -> tuple[float, float] | None:
    """The rates of steepest fall and of the lowest point; None where the curve does not fall beyond its noise."""
    if len(curve) < 10:
        return None
    begin = curve[: max(len(curve) // 5, 5)]
    first = sum(begin) / len(begin)
    noise = math.sqrt(sum((x - first) ** 2 for x in begin) / len(begin))
    bottom = min(range(len(curve)), key=lambda n: curve[n])
    if not curve[bottom] < first - max(2 * noise, 1e-3 * abs(first)):
        return None
    # The fall over several steps: that of single ones is noise.
    reach = max(len(curve) // 20, 2)
    places = range(reach, max(bottom + 1 - reach, reach + 1))
    steep = max(places, key=lambda n: curve[n - reach] - curve[min(n + reach, len(curve) - 1)])
    return rates[min(steep, bottom)], rates[bottom]


@contextmanager
def restored(model: Any = None) -> Iterator[None]:
    """Afterwards weights, buffers, gradients, modes and all random numbers are what they were before, to the bit."""
    import numpy as np
    import torch

    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_device = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    kept: list[tuple[Any, Any, Any, Any]] = []
    modes = {module: module.training for module in model.modules()} if model is not None else {}
    if model is not None:
        tensors = [*(p for p in model.parameters() if p.requires_grad), *model.buffers()]
        # A gradient that is there already is added to in place.
        kept = [
            (t, t.detach().cpu().clone(), t.grad, None if t.grad is None else t.grad.clone()) for t in tensors
        ]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before, gradient, value in kept:
                tensor.copy_(before)
                if gradient is not None:
                    gradient.copy_(value)
                if tensor.is_leaf:
                    tensor.grad = gradient
        for module, mode in modes.items():
            module.training = mode
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])
        if on_device is not None:
            torch.cuda.set_rng_state_all(on_device)


def swept(trainer: Any, rates: Sequence[float], *, seed: int, measure: str) -> Sweep:
    """A sweep with a method's own trainer, whose rate is set before every step; its model is left as it was."""
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    watching = Divergence()
    stopped = False

    class Watching(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            nonlocal stopped
            if measure not in logs or len(watching.losses) >= state.global_step:
                return
            value = float(logs[measure])
            stopped = stopped or watching.seen(value if measure == "loss" else -value)
            control.should_training_stop = control.should_training_stop or stopped

    def scheduler(num_training_steps: int, optimizer: Any = None) -> Any:
        trainer.lr_scheduler = LambdaLR(
            optimizer or trainer.optimizer, lambda n: rates[min(n, len(rates) - 1)] / rates[0]
        )
        return trainer.lr_scheduler

    trainer.create_scheduler = scheduler
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watching())
    with restored(trainer.model):
        trainer.train()
    return Sweep(seed, tuple(watching.losses), stopped)


def find(
    recipe: Recipe,
    inputs: Mapping[str, Any],
    *,
    low: float | None = None,
    high: float | None = None,
    steps: int = STEPS,
    seeds: int = SEEDS,
    progress: Callable[[int, int], None] | None = None,
) -> RateSearch:
    """The range test of a recipe: `inputs` are the plan, encodings and packing of its dataflow.

    Every seed gets a model of its own, loaded anew, with its own start of the adapter and order of the data. Methods
    that learn from rewards are judged by the reward, whose loss says nothing.
    """
    from transformers import set_seed

    from tunesmith import dataflow
    from tunesmith.methods import METHODS
    from tunesmith.training.fit import arguments
    from tunesmith.training.run import Run

    usual = LOW_RANK if isinstance(recipe.adapter, LoRA) else FULL
    rates = exponential(low or usual[0], high or usual[1], steps)
    method = METHODS[recipe.method.kind]
    measure = "reward" if recipe.method.draws else "loss"
    encodings = inputs["encodings"]
    training, _, _ = method.settled(recipe.method, recipe.training, len(encodings.train))
    sweeps = []
    with restored():
        for number in range(seeds):
            seed = recipe.training.seed + number
            with tempfile.TemporaryDirectory(prefix="tunesmith-find-lr-") as place:
                run = Run(Path(place))
                set_seed(seed)
                given = {
                    **arguments(
                        inputs["plan"],
                        training.model_copy(update={"seed": seed}),
                        recipe.tracking,
                        name="find-lr",
                        staging=run.path / ".staging",
                    ),
                    "max_steps": steps, "learning_rate": rates[0], "lr_scheduler_type": "constant",
                    "warmup_steps": 0, "eval_strategy": "no", "eval_steps": None, "save_strategy": "no",
                    "logging_steps": 1, "logging_first_step": True, "report_to": ["none"],
                }  # fmt: skip
                trainer = dataflow._trainer(
                    recipe,
                    run,
                    dataflow._tokenizer(recipe)[0],
                    inputs["plan"],
                    encodings,
                    inputs["packing"],
                    given,
                )
                sweeps.append(swept(trainer, rates, seed=seed, measure=measure))
            if progress:
                progress(number + 1, seeds)
    notes = []
    if recipe.method.draws:
        notes.append("this method learns from rewards: the curve is the reward with its sign changed")
    rows = steps * inputs["plan"].batch_size
    if rows > inputs["plan"].batch_rows:
        notes.append(f"a sweep takes {rows} rows and there are {inputs['plan'].batch_rows}: they repeat")
    return found(rates, sweeps, measure=measure if measure == "loss" else "negative reward", notes=notes)


def chart(search: RateSearch, *, width: int = 46, lines: int = 24) -> list[str]:
    """The smoothed curve for the terminal: one line per rate, a bar as long as the loss is high."""
    points = [(r, x) for r, x in zip(search.rates, search.smoothed, strict=True) if x is not None]
    if not points:
        return []
    points = points[:: max(len(points) // lines, 1)]
    smallest, largest = min(x for _, x in points), max(x for _, x in points)
    chosen = search.suggestion
    marked = min(points, key=lambda p: abs(math.log(p[0] / chosen)))[0] if chosen else None
    shown = []
    for rate, loss in points:
        size = round(width * (loss - smallest) / (largest - smallest)) if largest > smallest else 0
        mark = " <- suggested" if rate == marked else ""
        shown.append(f"{rate:9.1e} {loss:10.4g} {'█' * size}{mark}")
    return shown


def page(search: RateSearch, title: str) -> str:
    """The curve as one small page without scripts: every seed's losses, the smoothed mean, the suggested range."""
    values = [x for s in search.sweeps for x in s.losses if math.isfinite(x)]
    curve = [x for x in search.smoothed if x is not None]
    bottom, first = min(values, default=0.0), curve[0] if curve else 1.0
    top = max(max(curve, default=1.0), first + 0.25 * abs(first - bottom))
    left, right, upper, lower = 70.0, 880.0, 20.0, 380.0

    def x(rate: float) -> float:
        span = math.log(search.rates[-1] / search.rates[0])
        return left + (right - left) * math.log(rate / search.rates[0]) / span

    def y(loss: float) -> float:
        return lower - (lower - upper) * (min(loss, top) - bottom) / ((top - bottom) or 1.0)

    def line(losses: Sequence[float | None], style: str) -> str:
        points = [
            f"{x(rate):.1f},{y(loss):.1f}"
            for rate, loss in zip(search.rates, losses, strict=False)
            if loss is not None and math.isfinite(loss)
        ]
        return f'<polyline fill="none" {style} points="{" ".join(points)}"/>'

    parts = [line(s.losses, 'stroke="#9aa4af" stroke-width="1"') for s in search.sweeps]
    parts.append(line(search.smoothed, 'stroke="#1f6fc5" stroke-width="3"'))
    if search.suggestion and search.low and search.high:
        size = max(x(search.high) - x(search.low), 2.0)
        parts.insert(
            0,
            f'<rect x="{x(search.low):.1f}" y="{upper}" width="{size:.1f}" height="{lower - upper}" fill="#1a7f37" '
            'opacity="0.15"/>',
        )
        at = f'x1="{x(search.suggestion):.1f}" x2="{x(search.suggestion):.1f}"'
        parts.append(f'<line {at} y1="{upper}" y2="{lower}" stroke="#1a7f37" stroke-width="2"/>')
    decades = range(math.ceil(math.log10(search.rates[0])), math.floor(math.log10(search.rates[-1])) + 1)
    parts += [
        f'<text x="{x(10.0**n):.1f}" y="402" text-anchor="middle" font-size="13">1e{n}</text>'
        for n in decades
    ]
    parts += [
        f'<text x="62" y="{y(value) + 4:.1f}" text-anchor="end" font-size="13">{value:.3g}</text>'
        for value in (bottom, (bottom + top) / 2, top)
    ]
    said = "".join(f"<p>{html.escape(note)}</p>" for note in (search.sentence(), *search.notes))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light">'
        f"<title>{html.escape(title)}</title>"
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}</style>"
        f"<h1>{html.escape(title)}</h1>{said}"
        f'<svg viewBox="0 0 900 430" role="img" aria-label="{html.escape(search.measure)} by learning rate">'
        f'{"".join(parts)}<text x="475" y="424" text-anchor="middle" font-size="14">learning rate</text></svg>'
        f"<p>Grey: the {html.escape(search.measure)} of each seed. Blue: their smoothed mean. Green: the range worth "
        "trying, and the suggestion.</p></html>\n"
    )
