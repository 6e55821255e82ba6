"""Each watch speaks where its mistake is made, once, and is silent where training goes well."""

from __future__ import annotations

from types import SimpleNamespace

from tunesmith.training.run import Run
from tunesmith.training.watching import ALARMS, Watching, divergence, length_alone, no_spread


def measures(step, **changes):
    """A step of a run that goes well."""
    return {
        "loss": 0.1, "reward": 0.1 + 0.05 * step, "reward_std": 0.4, "frac_reward_zero_std": 0.2, "kl": 0.01 * step,
        "completions/mean_length": 20.0 + step % 3, "reward_length_correlation": 0.1,
    } | changes  # fmt: skip


def test_a_run_that_goes_well_is_not_disturbed():
    logged = [measures(step) for step in range(1, 16)]
    for count in range(1, 16):
        assert not [name for name, alarm in ALARMS.items() if alarm(logged[:count])]


def test_rewards_without_any_spread_are_found():
    logged = [measures(step, reward=0.0, frac_reward_zero_std=1.0) for step in range(5)]
    assert "nothing to learn" in no_spread(logged)
    assert no_spread(logged[:4]) is None, "a few batches may be chance"
    assert no_spread([*logged[:4], measures(5, frac_reward_zero_std=0.4)]) is None


def longer(correlated, growth=3.0, rise=0.05):
    return [
        measures(
            step,
            reward=rise * step,
            reward_length_correlation=correlated,
            **{"completions/mean_length": 20 + growth * step},
        )
        for step in range(12)
    ]


def test_a_reward_that_rises_with_length_alone_is_found():
    said = length_alone(longer(0.95))
    assert "26 to 47" in said
    assert length_alone(longer(0.4)) is None, "longer answers, but that is not what is rewarded"
    assert length_alone(longer(0.95, growth=0.1)) is None, "answers did not grow"
    assert length_alone(longer(0.95, rise=-0.01)) is None, "the reward did not rise"
    assert length_alone(longer(0.95)[:5]) is None
    at_the_limit = longer(0.95)
    for late in at_the_limit[6:]:
        del late["reward_length_correlation"]
    assert "26 to 47" in length_alone(at_the_limit), "answers of one length have no correlation any more"
    for one in at_the_limit:
        one.pop("reward_length_correlation", None)
    assert length_alone(at_the_limit) is None


def test_divergence_is_found_where_it_jumps_and_where_it_stays():
    slow = [measures(n, kl=0.02 * n) for n in range(1, 20)]
    assert divergence(slow) is None
    assert "where 0.2 or less was usual" in divergence([*slow, measures(20, kl=9.0)])
    below_zero = [measures(n, kl=-0.01) for n in range(6)]
    assert "where 0.05 or less was usual" in divergence([*below_zero, measures(7, kl=1.2)])
    assert "stays there" in divergence([measures(n, kl=1.5) for n in range(5)])
    assert divergence([*slow, measures(20, kl=0.9)]) is None
    # of PPO it is the divergence of whole answers
    whole = [measures(n, kl=20.0, kl_coefficient=0.1) for n in range(6)]
    assert divergence(whole) is None
    assert divergence([m | {"kl": 60.0} for m in whole])


def test_each_thing_is_said_once_in_a_run_and_not_again_after_a_resume(tmp_path):
    run, history = Run(tmp_path), []
    state = SimpleNamespace(log_history=history, global_step=0)
    for step in range(1, 13):
        state.global_step = step
        history.append({**measures(step, reward=0.0, frac_reward_zero_std=1.0), "step": step, "clip": None})
        if step in (1, 8):
            watching = Watching(run)
        watching.on_log(None, state, None)
        history.append({"eval_loss": 1.0, "eval_reward": 0.0})
        watching.on_log(None, state, None)
    [event] = run.events()
    assert event["kind"] == "warning"
    assert event["step"] == 5
    assert event["watch"] == "no spread of rewards"
