"""The arithmetic of PPO for language models: pure functions of tensors, no model and no state.

Tokens that a model wrote are actions; those of several answers lie in a table `(answers, tokens)`, each answer
from the left, with a mask that is true where there is one. Sources:

- Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage Estimation, arXiv 1506.02438
- Schulman et al., Proximal Policy Optimization Algorithms, arXiv 1707.06347
- Ziegler et al., Fine-Tuning Language Models from Human Preferences, arXiv 1909.08593
- Huang et al., The N+ Implementation Details of RLHF with PPO, arXiv 2403.17031
- Schulman, Approximating KL Divergence, joschu.net/blog/kl-approx.html (the estimators k1 and k3)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k3"]


def _same(total: Tensor) -> Tensor:
    """The sum over all processes where there is one process."""
    return total


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """What each token is rewarded with: minus its KL penalty, and the answer's score on its last token.

    An answer without tokens has nothing that its score could reward. (Ziegler et al., equation 2; the score at the
    end and the penalty at every token: N+ details, 4.4.)
    """
    rewards = -coefficient * kl * mask
    last = mask.sum(1) - 1
    rows = (last >= 0).nonzero().squeeze(1)
    rewards[rows, last[rows]] += scores[rows].to(rewards.dtype)
    return rewards


def advantages(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Generalized advantage estimates (arXiv 1506.02438, equation 16).

    `delta_t = r_t + gamma V_(t+1) - V_t` and `A_t = delta_t + gamma lam A_(t+1)`; after the last token both are 0,
    as an answer is an episode that ends there, whether at a stop token or at the length limit.
    """
    found = torch.zeros_like(rewards)
    following = rewards.new_zeros(rewards.shape[0])
    next_value = rewards.new_zeros(rewards.shape[0])
    for place in reversed(range(rewards.shape[1])):
        delta = rewards[:, place] + gamma * next_value - values[:, place]
        following = (delta + gamma * lam * following) * mask[:, place]
        next_value = values[:, place] * mask[:, place]
        found[:, place] = following
    return found


def returns(advantages: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """What the value of each state should have been: the TD(lambda) return, advantage plus value."""
    return (advantages + values) * mask


def masked_mean(values: Tensor, mask: Tensor, add: Callable[[Tensor], Tensor] = _same) -> Tensor:
    """The mean over the tokens of the mask, 0 without any; `add` sums over processes."""
    both = add(torch.stack([(values * mask).sum(), mask.sum().to(values.dtype)]))
    return both[0] / both[1].clamp(min=1)


def masked_variance(values: Tensor, mask: Tensor, add: Callable[[Tensor], Tensor] = _same) -> Tensor:
    """The variance (of the population) over the tokens of the mask."""
    return masked_mean((values - masked_mean(values, mask, add)) ** 2, mask, add)


def whiten(
    values: Tensor, mask: Tensor, *, shift_mean: bool = True, add: Callable[[Tensor], Tensor] = _same
) -> Tensor:
    """Values of variance 1, and of mean 0 unless the mean is to stay (N+ details: rewards keep theirs).

    Values that are all the same are left at that mean, or at 0. Over all tokens of a rollout.
    """
    mean, variance = masked_mean(values, mask, add), masked_variance(values, mask, add)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def policy_losses(
    logprobs: Tensor, old: Tensor, advantages: Tensor, *, cliprange: float
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of each token, negated to be minimised, and where it was clipped.

    `-min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)` (arXiv 1707.06347, equation 7).
    """
    ratio = torch.exp(logprobs - old)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(plain, clipped), clipped > plain


def value_losses(
    values: Tensor, old: Tensor, returns: Tensor, *, cliprange: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error of each token's value, and where it was clipped.

    A value counts as no nearer to its return than `cliprange` from what it was (as in the code of Ziegler et al.;
    N+ details). None: not clipped.
    """
    plain = (values - returns) ** 2
    if cliprange is None:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    near = values.clamp(old - cliprange, old + cliprange)
    clipped = (near - returns) ** 2
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def kl_estimates(logprobs: Tensor, reference: Tensor, *, estimator: KLEstimator = "k1") -> Tensor:
    """An estimate of KL(policy || reference) from each token that the policy drew.

    k1, `log p - log q`, is unbiased and what Ziegler et al. penalise; k3, `q/p - 1 - log(q/p)`, is unbiased too,
    never negative, and varies less.
    """
    ratio = reference - logprobs
    return -ratio if estimator == "k1" else torch.expm1(ratio) - ratio


def adapted_coefficient(
    coefficient: float, kl: float, *, target: float, horizon: float, num_answers: int
) -> float:
    """The KL coefficient for the next rollout: raised where KL is above its target, lowered where below.

    The proportional controller of Ziegler et al. (2.2): `e = clip(KL / target - 1, -0.2, 0.2)`, and the
    coefficient is multiplied by `1 + K e`, with K the answers of the rollout over `horizon`, as in their code.
    `kl` and `target` are nats per answer.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * num_answers / horizon)


def penalized_scores(scores: Tensor, has_ended: Tensor, penalty: float | None) -> Tensor:
    """Scores less a penalty for each answer that was cut at the length limit instead of ending.

    Taken off, as in TRL, so that a cut answer still learns from what it did well; with a large penalty it is the
    fixed low score of the N+ details.
    """
    return scores if not penalty else torch.where(has_ended, scores, scores - penalty)


def approximate_kl(logprobs: Tensor, old: Tensor) -> Tensor:
    """By k3, how far each token's distribution has moved from the one that drew it."""
    return kl_estimates(old, logprobs, estimator="k3")


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, add: Callable[[Tensor], Tensor] = _same
) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 a constant one, below 0 a harmful one.

    Not a number where all returns are the same.
    """
    variance = float(masked_variance(returns, mask, add))
    left = float(masked_variance(returns - values, mask, add))
    return 1 - left / variance if variance > 0 else float("nan")


def logprobs_and_entropy(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and entropy of each distribution, in nats and float32.

    The distributions are those that are drawn from: logits are divided by the temperature first (N+ details).
    """
    scaled = logits.float() / temperature
    chosen = -torch.nn.functional.cross_entropy(scaled, targets, reduction="none")
    if not entropy:
        return chosen, None
    logs = torch.log_softmax(scaled, -1)
    return chosen, -(logs.exp() * logs).sum(-1)
