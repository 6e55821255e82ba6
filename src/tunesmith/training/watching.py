"""Silent mistakes: what a run's own measures say is going wrong while every step looks fine.

Each alarm is a function of the measures logged so far and gives a sentence or None. The first time that one has
something to say it is written as a warning of the run, which the report shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from transformers import TrainerCallback

from tunesmith.training.run import Run

Measures = Mapping[str, float]
Alarm = Callable[[Sequence[Measures]], str | None]

RECENT = 5
"""Logged steps that are looked at together: one alone may be chance."""
LEAST = 6
"""Logged steps before anything is said of a trend."""
SAME = 0.9
"""Share of groups without any spread of rewards from which on there is nothing to learn."""
LONGER = 1.3
"""Growth of answers that counts as longer."""
BY_LENGTH = 0.8
"""Correlation of reward and length among answers from which on the reward is as good as the length."""
FAR = 1.0
"""Nats per token from which on a model has little to do with the one it started from."""
NEAR = 0.05
"""Nats per token that are no distance to speak of."""
LOST = 0.5
"""Reward of the better answers, below zero, from which on they count as lost."""
FALLEN = 1.0
"""The same, whatever became of the worse answers."""
COIN = 0.5
"""Share of pairs in the right order that a coin would reach."""
SUDDEN = 20.0
"""How many times its usual size divergence grows when it blows up."""


def no_spread(logged: Sequence[Measures]) -> str | None:
    """Groups whose answers are all worth the same teach nothing."""
    recent = [m for m in logged if {"reward", "frac_reward_zero_std"} <= m.keys()][-RECENT:]
    if len(recent) < RECENT:
        return None
    share = fmean(m["frac_reward_zero_std"] for m in recent)
    if share < SAME:
        return None
    mean = fmean(m["reward"] for m in recent)
    return (
        f"In {share:.0%} of the last comparisons all answers got the same reward (mean {mean:.3g}): "
        "there is nothing to compare and so nothing to learn. The task is too hard for the model or solved already: "
        "start from a model that succeeds sometimes, draw more answers or at a higher temperature, or use a reward "
        "with degrees."
    )


def length_alone(logged: Sequence[Measures]) -> str | None:
    """Reward that rises with the length of answers and with nothing else."""
    found = [m for m in logged if {"reward", "completions/mean_length"} <= m.keys()]
    # Answers that all run into the limit have no spread of lengths; then what was seen before counts.
    seen = [m["reward_length_correlation"] for m in found if "reward_length_correlation" in m][-RECENT:]
    if len(found) < LEAST or len(seen) < LEAST // 2:
        return None
    some = min(RECENT, len(found) // 2)
    first, last = found[:some], found[-some:]

    def grown(name: str) -> tuple[float, float]:
        return fmean(m[name] for m in first), fmean(m[name] for m in last)

    lengths, rewards = grown("completions/mean_length"), grown("reward")
    together = fmean(seen)
    if lengths[1] < LONGER * lengths[0] or rewards[1] <= rewards[0] or together < BY_LENGTH:
        return None
    return (
        f"The reward rises with length alone: answers grew from {lengths[0]:.0f} to {lengths[1]:.0f} tokens, and "
        f"among answers reward and length go together ({together:.2f}, 1 being the same). Read the samples; a limit "
        "of length as a further reward, or `loss: dr_grpo`, takes the gain away."
    )


def divergence(logged: Sequence[Measures]) -> str | None:
    """A model that has left the one it started from, step by step or all at once."""
    # KTO's is an estimate over whole answers to other prompts, and no distance of its own.
    logged = [m for m in logged if "kl" in m and "reward" in m]
    found = [m["kl"] for m in logged]
    tokens = [m.get("completions/mean_length", 1.0) for m in logged]
    if not found:
        return None
    # PPO says what an answer diverges by, the others what a token does.
    is_whole = "kl_coefficient" in logged[-1]
    each = [kl / max(count, 1.0) for kl, count in zip(found, tokens, strict=True)] if is_whole else found
    far = len(each) >= RECENT and min(each[-RECENT:]) > FAR
    # Estimates may fall below zero, and a ratio to nearly nothing says nothing.
    before = max(median(each[:-1]), NEAR) if len(each) > RECENT else math.inf
    sudden = each[-1] > FAR and each[-1] > SUDDEN * before
    if not far and not sudden:
        return None
    how = f"where {before:.2g} or less was usual" if sudden else "and stays there"
    return (
        f"The divergence from the model that training started from has reached {each[-1]:.2g} nats a token, {how}: "
        "what the model could do before may be lost. Raise the cost of divergence (beta, kl_coefficient), or lower "
        "the learning rate."
    )


def good_lost(logged: Sequence[Measures]) -> str | None:
    """Better answers that become less likely together with the worse ones (arXiv 2410.08847)."""
    # Rewards without a reference are likelihoods, and always below zero; their trainers log an imitation loss.
    names = {"rewards/chosen", "rewards/rejected"}
    found = [m for m in logged if names <= m.keys() and "nll_loss" not in m]
    if len(found) < 2:
        return None
    found = found[-min(RECENT, len(found) // 2) :]
    chosen, rejected = (fmean(m[name] for m in found) for name in sorted(names))
    if chosen > -LOST or (chosen > rejected / 2 and chosen > -FALLEN):
        return None
    return (
        "The better answers become less likely as well: against the reference their reward has fallen to "
        f"{chosen:.2f}, "
        f"that of the worse ones to {rejected:.2f}. Both may make way for something else: read the samples. "
        "method.sft_weight 1 holds the better answers up; a higher beta or a lower learning rate keeps nearer to the "
        "reference."
    )


def not_told_apart(logged: Sequence[Measures]) -> str | None:
    """Pairs that the model orders no better than a coin after some time."""
    found = [
        (_either(m, "rewards/accuracies", "accuracy"), margin)
        for m in logged
        if (margin := _either(m, "rewards/margins", "margin")) is not None
    ]
    if len(found) < 4 * RECENT:
        return None
    last = found[-2 * RECENT :]
    shares = [share for share, _ in last if share is not None]  # KTO sees no pairs, and has none
    margin = fmean(margin for _, margin in last)
    if margin > 0 or (shares and fmean(shares) > COIN):
        return None
    how = f"in {fmean(shares):.0%} of the pairs only" if shares else "no more than the worse one"
    return (
        f"After {len(found)} logged steps the better answer has the higher reward {how}, "
        f"with a margin of {margin:.2g}. The labels may be the wrong way round or arbitrary (`tunesmith inspect` shows "
        "pairs), or the learning rate is too low."
    )


def _either(measures: Measures, *names: str) -> float | None:
    """The measure under the name that a method's trainer gives it."""
    return next((measures[name] for name in names if name in measures), None)


ALARMS: dict[str, Alarm] = {
    "no spread of rewards": no_spread,
    "length alone": length_alone,
    "divergence": divergence,
    "good answers lost": good_lost,
    "pairs not told apart": not_told_apart,
}
"""The alarms by name."""


class Watching(TrainerCallback):  # type: ignore[misc]
    """Looks at the measures whenever a step is logged, and says each thing once in a run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.told = {event.get("watch") for event in run.events() if event["kind"] == "warning"}

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the alarms that have said nothing yet."""
        if not state.log_history or "loss" not in state.log_history[-1]:
            return
        logged = [
            {name: float(value) for name, value in entry.items() if isinstance(value, int | float)}
            for entry in state.log_history
            if "loss" in entry
        ]
        for name, alarm in ALARMS.items():
            if name not in self.told and (sentence := alarm(logged)):
                self.told.add(name)
                self.run.event("warning", step=state.global_step, message=sentence, watch=name)
