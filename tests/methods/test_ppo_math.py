"""PPO's arithmetic against numbers worked out by hand and against loops over single tokens."""

from __future__ import annotations

import math

import pytest
import torch

from tunesmith.methods import ppo_math as ppo

T = torch.tensor


def drawn(seed: int, answers: int = 5, tokens: int = 9):
    """Random rewards, values and a mask of answers of several lengths, the last one without tokens."""
    random = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(answers, tokens, generator=random, dtype=torch.float64) for _ in "rv")
    lengths = torch.randint(1, tokens + 1, (answers,), generator=random)
    lengths[-1] = 0
    mask = torch.arange(tokens) < lengths[:, None]
    return rewards * mask, values, mask


def test_advantages_and_returns_by_hand():
    # deltas: 1 + 0.5*2 - 1 = 1;  0 + 0.5*4 - 2 = 0;  2 + 0 - 4 = -2.  gamma*lam = 0.25
    rewards, values, mask = T([[1.0, 0.0, 2.0]]), T([[1.0, 2.0, 4.0]]), T([[True, True, True]])
    found = ppo.advantages(rewards, values, mask, gamma=0.5, lam=0.5)
    assert found.tolist() == [[1 + 0.25 * -0.5, -0.5, -2.0]]
    assert ppo.returns(found, values, mask).tolist() == [[1.875, 1.5, 2.0]]


def test_values_behind_the_last_token_do_not_count():
    rewards, mask = T([[1.0, 0.0]]), T([[True, False]])
    found = ppo.advantages(rewards, T([[3.0, 100.0]]), mask, gamma=1.0, lam=1.0)
    assert found.tolist() == [[-2.0, 0.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.99, 1.0), (0.7, 0.0)])
def test_advantages_are_the_sum_of_discounted_errors(gamma, lam):
    rewards, values, mask = drawn(int(100 * gamma))
    found = ppo.advantages(rewards, values, mask, gamma=gamma, lam=lam)
    for row in range(len(rewards)):
        length = int(mask[row].sum())
        for t in range(rewards.shape[1]):
            expected = 0.0
            for step in range(length - t):  # sum over l of (gamma lam)^l delta_(t+l)
                at = t + step
                following = float(values[row, at + 1]) if at + 1 < length else 0.0
                error = float(rewards[row, at]) + gamma * following - float(values[row, at])
                expected += (gamma * lam) ** step * error
            assert float(found[row, t]) == pytest.approx(expected, abs=1e-12)


def test_lambda_one_is_the_discounted_return_less_the_value():
    rewards, values, mask = drawn(3)
    found = ppo.returns(ppo.advantages(rewards, values, mask, gamma=0.9, lam=1.0), values, mask)
    for row in range(len(rewards)):
        for t in range(int(mask[row].sum())):
            later = sum(0.9 ** (u - t) * float(rewards[row, u]) for u in range(t, rewards.shape[1]))
            assert float(found[row, t]) == pytest.approx(later, abs=1e-12)


def test_rewards_are_penalties_and_the_score_at_the_end():
    kl, mask = (
        T([[0.5, 1.0, 9.0], [1.0, 2.0, 3.0], [7.0, 7.0, 7.0]]),
        T([[1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool(),
    )
    found = ppo.token_rewards(T([10.0, -1.0, 5.0]), kl, mask, 0.1)
    assert torch.allclose(found, T([[-0.05, 9.9, 0], [-0.1, -0.2, -1.3], [0, 0, 0]]))


def test_whitening_by_hand():
    values, mask = T([[1.0, 3.0, 50.0]]), T([[True, True, False]])  # mean 2, variance 1
    assert torch.allclose(ppo.whiten(values, mask), T([[-1.0, 1.0, 0.0]]))
    assert torch.allclose(ppo.whiten(values, mask, shift_mean=False), T([[1.0, 3.0, 0.0]]))
    assert torch.allclose(ppo.whiten(T([[4.0, 4.0]]), T([[True, True]])), T([[0.0, 0.0]]))


def test_whitening_against_numpy_and_over_two_processes():
    values, _, mask = drawn(7)
    kept = values[mask].numpy()
    found = ppo.whiten(values, mask)
    assert torch.allclose(found[mask], torch.from_numpy((kept - kept.mean()) / kept.std()), atol=1e-6)
    assert not found[~mask].any()

    def halves(values, mask):
        """What each of two processes gets, each with half of the answers; sums are those of all."""
        parts = [(values[:2], mask[:2]), (values[2:], mask[2:])]
        mean = values[mask].mean()
        sums = iter(
            [torch.stack([values[mask].sum(), mask.sum().double()])] * 2
            + [torch.stack([((values[mask] - mean) ** 2).sum(), mask.sum().double()])]
        )
        return ppo.whiten(*parts[1], add=lambda _: next(sums))

    assert torch.allclose(halves(values, mask), found[2:])


def test_policy_loss_by_hand():
    # ratios 1.5 and 0.5, eps 0.2: clipped where moving on would gain, not where moving back would
    logs, old = T([1.5, 1.5, 0.5, 0.5, 1.1]).log(), torch.zeros(5)
    losses, clipped = ppo.policy_losses(logs, old, T([1.0, -1.0, 1.0, -1.0, 2.0]), cliprange=0.2)
    assert torch.allclose(losses, T([-1.2, 1.5, -0.5, 0.8, -2.2]))
    assert clipped.tolist() == [True, False, False, True, False]


def test_policy_gradient_is_that_of_the_surrogate_and_zero_where_clipped():
    logs = T([1.5, 1.5, 1.0]).log().requires_grad_()
    losses, _ = ppo.policy_losses(logs, torch.zeros(3), T([1.0, -1.0, 3.0]), cliprange=0.2)
    losses.sum().backward()
    assert torch.allclose(logs.grad, T([0.0, 1.5, -3.0]))


def test_policy_and_value_losses_against_loops():
    random = torch.Generator().manual_seed(1)
    new, old, advantage, target = (torch.randn(200, generator=random, dtype=torch.float64) for _ in range(4))
    policy, policy_clipped = ppo.policy_losses(new, old, advantage, cliprange=0.2)
    value, value_clipped = ppo.value_losses(new, old, target, cliprange=0.3)
    for n in range(200):
        p, o, a, r = (float(x[n]) for x in (new, old, advantage, target))
        ratio = math.exp(p - o)
        bound = min(max(ratio, 0.8), 1.2)
        assert float(policy[n]) == pytest.approx(-min(ratio * a, bound * a), rel=1e-12)
        assert bool(policy_clipped[n]) == (bound * a < ratio * a)
        near = min(max(p, o - 0.3), o + 0.3)
        assert float(value[n]) == pytest.approx(0.5 * max((p - r) ** 2, (near - r) ** 2), rel=1e-12)
        assert bool(value_clipped[n]) == ((near - r) ** 2 > (p - r) ** 2)


def test_value_loss_by_hand():
    values, old, target = T([2.0, 0.5, 2.0]), T([0.0, 0.0, 0.0]), T([3.0, 3.0, 0.0])
    losses, clipped = ppo.value_losses(values, old, target, cliprange=1.0)
    assert losses.tolist() == [2.0, 3.125, 2.0]  # (1 - 3)^2 / 2, (0.5 - 3)^2 / 2, (2 - 0)^2 / 2
    assert clipped.tolist() == [True, False, False]
    assert ppo.value_losses(values, old, target, cliprange=None)[0].tolist() == [0.5, 3.125, 2.0]


def test_kl_estimators_have_the_kl_as_their_mean():
    policy = torch.log_softmax(T([0.2, 1.0, -0.5, 0.0], dtype=torch.float64), 0)
    reference = torch.log_softmax(T([0.0, 0.3, 0.4, -1.0], dtype=torch.float64), 0)
    true = float((policy.exp() * (policy - reference)).sum())
    for estimator in ("k1", "k3"):
        each = ppo.kl_estimates(policy, reference, estimator=estimator)  # of every token once
        assert float((policy.exp() * each).sum()) == pytest.approx(true, rel=1e-12)
        if estimator == "k3":
            assert (each >= 0).all()
    # by hand: p = 0.5, q = 0.25
    logs, others = T([0.5]).log(), T([0.25]).log()
    assert float(ppo.kl_estimates(logs, others)) == pytest.approx(math.log(2))
    assert float(ppo.kl_estimates(logs, others, estimator="k3")) == pytest.approx(0.5 - 1 + math.log(2))


def test_the_controller_follows_ziegler():
    step = {"target": 6.0, "horizon": 10_000.0, "num_answers": 512}
    assert ppo.adapted_coefficient(0.15, 6.0, **step) == 0.15
    assert ppo.adapted_coefficient(0.15, 6.6, **step) == pytest.approx(0.15 * (1 + 0.1 * 0.0512))
    assert ppo.adapted_coefficient(0.15, 60.0, **step) == pytest.approx(0.15 * (1 + 0.2 * 0.0512))
    assert ppo.adapted_coefficient(0.15, -1.0, **step) == pytest.approx(0.15 * (1 - 0.2 * 0.0512))


def test_the_controller_brings_kl_to_its_target():
    coefficient = 0.01
    for _ in range(2_000):  # a policy whose KL is inverse to the coefficient
        kl = 1 / coefficient
        coefficient = ppo.adapted_coefficient(coefficient, kl, target=5.0, horizon=1_000, num_answers=64)
    assert 1 / coefficient == pytest.approx(5.0, rel=0.01)


def test_missing_ends_cost():
    scores, ended = T([1.0, 2.0]), T([True, False])
    assert ppo.penalized_scores(scores, ended, 1.5).tolist() == [1.0, 0.5]
    assert ppo.penalized_scores(scores, ended, None).tolist() == [1.0, 2.0]


def test_explained_variance():
    values, _, mask = drawn(11)
    assert ppo.explained_variance(values, values, mask) == 1.0
    assert ppo.explained_variance(torch.zeros_like(values), values, mask) == pytest.approx(0.0)
    assert ppo.explained_variance(-values, values, mask) == pytest.approx(-3.0)
    assert math.isnan(ppo.explained_variance(values, torch.ones_like(values), mask))


def test_logprobs_and_entropy_against_distributions():
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(6)
    logs, entropy = ppo.logprobs_and_entropy(logits, targets, temperature=0.7)
    expected = torch.distributions.Categorical(logits=logits / 0.7)
    assert torch.allclose(logs, expected.log_prob(targets), atol=1e-6)
    assert torch.allclose(entropy, expected.entropy(), atol=1e-6)
    assert float(ppo.logprobs_and_entropy(torch.zeros(1, 8), T([3]))[1]) == pytest.approx(math.log(8))


def test_approximate_kl_is_zero_where_nothing_moved():
    logs = T([-1.0, -2.0])
    assert ppo.approximate_kl(logs, logs).tolist() == [0.0, 0.0]
    # drawn under `old` with p = 0.5, now q = 0.25
    assert float(ppo.approximate_kl(T([0.25]).log(), T([0.5]).log())) == pytest.approx(0.5 - 1 + math.log(2))
