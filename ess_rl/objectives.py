"""Policy objectives: tensors in, (scalar loss to minimize, metrics, weight) out.

All inputs are [n] over the samples of a minibatch (any common shape works; ValueError if shapes differ). Metrics are
0-dim. `weight` is [n], the w in the gradient -mean(w A grad log pi(a|s)) of the policy loss, which gives the
contribution of each sample. Neither has a gradient or waits for the device. `log_prob` carries the gradient of the
policy being trained; `behavior_log_prob` is the log density of the behavior policy, at the action as sampled; both are
in nats. Nothing here can check that the recorded density is the behavior policy's, but on
fresh data, before the first update, `ess` must be 1.

When several processes share a minibatch (torch.distributed), every effective sample size (and what is computed
from it) and `log_ratio_max` cover the whole minibatch; the loss and the other metrics are means over a process's
own samples, to be averaged as `ess_rl.optim.gradient` does.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from ess_rl.checks import same_shape
from ess_rl.ess import HIGHEST_LOG_RATIO, effective_sample_size, policy_ratio
from ess_rl.gaussian import Gaussian
from ess_rl.processes import all_max
from ess_rl.returns import path_residuals, path_weights

MixtureKL = Literal["variational", "convex", "k3"]
Divergence = Literal["kl", "reverse_kl", "hellinger"]


def _weight(ratio: Tensor, log_ratio: Tensor) -> Tensor:
    """The weight that `policy_ratio` gives to each sample's score: none where the ratio is clamped."""
    return torch.where(log_ratio <= HIGHEST_LOG_RATIO, ratio, 0.0).detach()


def _filled(number: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor, created on the device of `like`, so that nothing is copied to it."""
    return number if isinstance(number, Tensor) else torch.full_like(like, number)


def p3o(
    log_prob: Tensor,
    behavior_log_prob: Tensor,
    advantage: Tensor,
    behavior_kl: Tensor,
    *,
    cap: Literal["ess", "ess_per_dim"] | float | Tensor = "ess",
    pull: Literal["ess"] | float | Tensor = "ess",
    act_dim: int | None = None,
    ess: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """P3O, "Trust the Batch": the effective sample size caps the score-function weight and sets the pull toward b.

        rho = pi(a|s) / b(a|s),     e = ESS of rho over this batch
        loss = -mean( sg(min(rho, e)) A log pi(a|s) ) + (1 - e) mean( KL(pi || b) )

    On fresh data e = 1 and the gradient is the policy gradient. There is no clip range and no coefficient. No gradient
    is taken through e.

    Source: Fakoor et al. 2026 (arXiv 2605.12380), Eq. 11 and 12. Deviations: none in the formula. Their code estimates
    the KL from samples (`k3`, below); pass that as `behavior_kl` to do the same, or the closed form
    (`ess_rl.gaussian.kl(pi, b)`), which is exact and whose pull grows with the distance.

    Args:
        advantage: with a standard deviation of about 1 over the minibatch (`ess_rl.normalizer.standardize_batch`): its
            scale sets the weight of the first term relative to the KL. No gradient is taken through it.
        behavior_kl: KL(pi || b) at each sample's state, with gradient.
        cap: "ess"; or a fixed number; or "ess_per_dim", e^(1/act_dim), which undoes the exponential decay of e with
            the action dimension. It replaces e only in the cap: the weight of the KL stays 1 - e.
        pull: the weight of the KL: "ess" for 1 - e, or a fixed number. With cap=1 and pull=0 this is the policy loss of
            V-trace's actor-critic (Espeholt et al. 2018, arXiv 1802.01561, Eq. 4), whose advantages come from `vtrace`.
        act_dim: for "ess_per_dim" only.
        ess: e (a number or a 0-dim tensor) to use in cap and pull instead of this batch's, for example that of a larger
            batch containing it. The ESS of few samples is too high, so the smaller the batch, the weaker its cap and
            its pull.

    Returns:
        The loss; the metrics `ess` (always of this batch), `behavior_kl` (mean), `capped_fraction` (rho above the cap
        by a relative excess of more than 1e-6, so that rounding does not count), `log_ratio_max`; the weight, the
        smaller of rho and the cap.

    Raises:
        ValueError: shapes differ; an unknown cap or pull; "ess_per_dim" without act_dim.
    """
    same_shape(
        log_prob=log_prob, behavior_log_prob=behavior_log_prob, advantage=advantage, behavior_kl=behavior_kl
    )  # fmt: skip
    log_ratio = (log_prob - behavior_log_prob).detach()
    own = effective_sample_size(log_ratio)
    e = own if ess is None else _filled(ess, own)
    if isinstance(cap, str):
        if cap == "ess":
            limit = e
        elif cap == "ess_per_dim" and act_dim is not None:
            limit = e ** (1.0 / act_dim)
        else:
            raise ValueError(f"cap={cap!r}, act_dim={act_dim}: use 'ess', a number, or 'ess_per_dim' with act_dim")
    else:
        limit = _filled(cap, own)
    if isinstance(pull, str) and pull != "ess":
        raise ValueError(f"pull={pull!r}: use 'ess' or a number")
    kl_weight = 1.0 - e if isinstance(pull, str) else pull
    ratio = torch.exp(log_ratio)
    weight = torch.minimum(ratio, limit)
    mean_kl = behavior_kl.mean()
    loss = -(weight * advantage.detach() * log_prob).mean() + kl_weight * mean_kl
    metrics = {
        "ess": own,
        "behavior_kl": mean_kl.detach(),
        "capped_fraction": (ratio > limit * (1.0 + 1e-6)).to(ratio.dtype).mean(),
        "log_ratio_max": all_max(log_ratio.max()),
    }
    return loss, metrics, weight


def p4o(
    log_prob: Tensor,
    behavior_log_prob: Tensor,
    advantage: Tensor,
    behavior_kl: Tensor,
    *,
    proximal_log_prob: Tensor,
    proximal_kl: Tensor,
    mixture_kl: MixtureKL = "variational",
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """P4O: P3O with two anchors, the behavior policy b and a recent policy p. The more distant anchor pulls more.

        rho = pi / b,   e_b = ESS of pi / b,   e_p = ESS of pi / p,   e = min(e_b, e_p)
        w_b = (1 - e_b) / ((1 - e_b) + (1 - e_p)),   w_p = 1 - w_b
        loss = -mean( sg(min(rho, e)) A log pi(a|s) ) + (1 - e) mean( KL(pi || w_b b + w_p p) )

    With p = b, and with p = pi, this is `p3o`. If both ESS are 1, to within 1e-6 in total, nothing pulls: the deficits
    are then rounding errors, and w_b is one half instead of their quotient.

    Source: Fakoor et al. 2026 (arXiv 2605.12380), Section 3.1 and Eq. 13. Deviation: the KL to a mixture of two
    Gaussians has no closed form, and the sampled k3 of the released code is not a KL and breaks down where pi is
    narrower than its anchor (see `k3`). So one of three substitutes is used:

        variational   -log( w_b exp(-KL(pi || b)) + w_p exp(-KL(pi || p)) )
        convex        w_b KL(pi || b) + w_p KL(pi || p)
        k3            `k3` of pi and the mixture at the sampled action, as released

    The first two are upper bounds, KL <= variational <= convex, and exact with one anchor or two equal ones
    (Hershey and Olsen 2007, "Approximating the Kullback Leibler divergence between Gaussian mixture models", for the
    first). Like the true KL to the mixture, the first releases an anchor that has been left far behind while the other
    is near; the pull of the second grows with the distance to both.

    Args:
        behavior_kl: KL(pi || b) at each sample's state, with gradient.
        proximal_log_prob: log p(a|s); like `behavior_log_prob`, without gradient.
        proximal_kl: KL(pi || p) at each sample's state, with gradient.

    Returns:
        The loss and the metrics of `p3o` (`ess` is e_b, `behavior_kl` the mean KL(pi || b)), and also `ess_proximal`
        (e_p), `proximal_kl`, `mixture_kl` (mean of the substitute in use) and `behavior_share` (w_b).

    Raises:
        ValueError: shapes differ; an unknown `mixture_kl`.
    """
    same_shape(
        log_prob=log_prob, behavior_log_prob=behavior_log_prob, advantage=advantage, behavior_kl=behavior_kl,
        proximal_log_prob=proximal_log_prob, proximal_kl=proximal_kl,
    )  # fmt: skip
    behavior_log_prob, proximal_log_prob = behavior_log_prob.detach(), proximal_log_prob.detach()
    e_b = effective_sample_size(log_prob - behavior_log_prob)
    e_p = effective_sample_size(log_prob - proximal_log_prob)
    drift = (1.0 - e_b) + (1.0 - e_p)
    w_b = torch.where(drift > 1e-6, (1.0 - e_b) / drift.clamp(min=1e-6), 0.5)
    w_p = 1.0 - w_b
    if mixture_kl == "variational":
        to_mixture = -torch.logaddexp(torch.log(w_b) - behavior_kl, torch.log(w_p) - proximal_kl)
    elif mixture_kl == "convex":
        to_mixture = w_b * behavior_kl + w_p * proximal_kl
    elif mixture_kl == "k3":
        mixture_log_prob = torch.logaddexp(torch.log(w_b) + behavior_log_prob, torch.log(w_p) + proximal_log_prob)
        to_mixture = k3(log_prob, mixture_log_prob)
    else:
        raise ValueError(f"mixture_kl={mixture_kl!r}: choose one of variational, convex, k3")
    loss, metrics, weight = p3o(log_prob, behavior_log_prob, advantage, to_mixture, ess=torch.minimum(e_b, e_p))
    metrics |= {
        "behavior_kl": behavior_kl.mean().detach(),
        "ess_proximal": e_p,
        "proximal_kl": proximal_kl.mean().detach(),
        "mixture_kl": to_mixture.mean().detach(),
        "behavior_share": w_b,
    }
    return loss, metrics, weight


def ppo_clip(
    log_prob: Tensor, behavior_log_prob: Tensor, advantage: Tensor, *, clip: float | Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """PPO's clipped surrogate.

        loss = -mean( min( rho A, clamp(rho, 1 - clip, 1 + clip) A ) )

    Source: Schulman et al. 2017 (arXiv 1707.06347), Eq. 7. Metrics: `ess` of the same batch (not used by the
    loss), `clipped_fraction` (|rho - 1| > clip), `log_ratio_max`.
    """
    same_shape(log_prob=log_prob, behavior_log_prob=behavior_log_prob, advantage=advantage)
    return _clipped_about(1.0, log_prob - behavior_log_prob.detach(), advantage.detach(), clip)


def _clipped_about(
    center: float | Tensor, log_ratio: Tensor, advantage: Tensor, clip: float | Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The clipped surrogate with its range centered at `center`, and the metrics of `ppo_clip`."""
    ratio = policy_ratio(log_ratio)
    clipped = ratio.clamp(min=center - clip).clamp(max=center + clip)
    loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
    metrics = {
        "ess": effective_sample_size(log_ratio),
        "clipped_fraction": ((ratio - center).abs() > clip).to(ratio.dtype).mean().detach(),
        "log_ratio_max": all_max(log_ratio.detach().max()),
    }
    weight = torch.where(ratio * advantage <= clipped * advantage, _weight(ratio, log_ratio), 0.0)
    return loss, metrics, weight


def ppo_decoupled(
    log_prob: Tensor, behavior_log_prob: Tensor, advantage: Tensor, *, proximal_log_prob: Tensor, clip: float | Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """PPO clipped relative to a recent policy p, while each sample's weight still corrects for the behavior policy b.

        r = pi / p,     loss = -mean( sg(p / b) min( r A, clamp(r, 1 - clip, 1 + clip) A ) )

    With p = b this is `ppo_clip`. Source: Hilton, Cobbe, Schulman 2022 (arXiv 2110.00641), Eq. 2. The choice of p is up
    to the caller: theirs is an exponential average of the weights, our PPO uses the policy at the iteration's start.
    Metrics: `ess` of pi / b, `clipped_fraction` of r, `log_ratio_max` of pi / b.
    """
    same_shape(
        log_prob=log_prob, behavior_log_prob=behavior_log_prob, advantage=advantage, proximal_log_prob=proximal_log_prob
    )  # fmt: skip
    correction = policy_ratio(proximal_log_prob - behavior_log_prob).detach()
    loss, metrics, weight = ppo_clip(log_prob, proximal_log_prob, advantage.detach() * correction, clip=clip)
    log_ratio = (log_prob - behavior_log_prob).detach()
    metrics |= {"ess": effective_sample_size(log_ratio), "log_ratio_max": all_max(log_ratio.max())}
    return loss, metrics, correction * weight


def ppo_generalized(
    log_prob: Tensor, behavior_log_prob: Tensor, advantage: Tensor, *, proximal_log_prob: Tensor, clip: float | Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """PPO whose clip range is centered at the ratio of a recent policy p instead of 1: for older data.

        rho = pi / b, center = p / b,     loss = -mean( min( rho A, clamp(rho, center - clip, center + clip) A ) )

    With p = b this is `ppo_clip`. Measured in pi / p, the range is wide where an action is less likely under p than
    under b, and narrow where it is more likely; `ppo_decoupled` weights such samples and keeps the range in pi / p.
    Source: GePPO, Queeney, Paschalidis, Cassandras 2021 (arXiv 2111.00072), the surrogate of its Algorithm 1. Not
    adopted: its choice of how many older policies to learn from; its learning rate adapted to the total variation; its
    advantages by V-trace (of our agents' options, `--correction vtrace`), standardized with p / b as weights.
    Metrics: `ess` of rho, `clipped_fraction` (|rho - center| > clip), `log_ratio_max` of rho.
    """
    same_shape(
        log_prob=log_prob, behavior_log_prob=behavior_log_prob, advantage=advantage, proximal_log_prob=proximal_log_prob
    )  # fmt: skip
    center = policy_ratio(proximal_log_prob - behavior_log_prob).detach()
    return _clipped_about(center, log_prob - behavior_log_prob.detach(), advantage.detach(), clip)


def ppo_variance(
    log_prob: Tensor, behavior_log_prob: Tensor, advantage: Tensor, *, coefficient: float | Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """PPO with a penalty on the variance of the ratio in place of the clip.

        loss = -mean( rho A ) + coefficient mean( (rho - 1)^2 )

    E_b[rho] is 1, so the penalty estimates Var rho, and 1 / (1 + Var rho) is what the ESS estimates: a bound on one is
    a bound on the other. Source: the idea of R2VPO, Luo et al. 2026 (arXiv 2605.26784): a bound on the variance of the
    ratio as a trust region, by primal and dual steps; only its abstract was available. The penalty is also that of
    public reimplementations of its first version (arXiv 2601.03320); bound and dual step are ours (the rule that adapts
    `coefficient` is in the agent). Metrics: `ess`, `ratio_variance`,
    `coefficient`, `log_ratio_max`; the weight is that of the first term.
    """
    same_shape(log_prob=log_prob, behavior_log_prob=behavior_log_prob, advantage=advantage)
    penalty = (policy_ratio(log_prob - behavior_log_prob.detach()) - 1.0).square()
    loss, metrics, weight, coefficient = _penalized(log_prob, behavior_log_prob, advantage, penalty, coefficient)
    return loss, metrics | {"ratio_variance": penalty.mean().detach(), "coefficient": coefficient}, weight


def bpo(
    log_prob: Tensor,
    behavior_log_prob: Tensor,
    advantage: Tensor,
    median_advantage: Tensor,
    *,
    clip: float | Tensor,
    temperature: float | Tensor,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """BPO: the ratio is pulled toward one end of its range, from inside and from outside.

        rho* = 1 - clip + 2 clip sigmoid((Q - U) / temperature)
        loss = mean( |rho - rho*| |A| )

    U is a median of Q(s, .) under b in the state, so half of b's actions are to become more likely. With rho inside its
    range, and U on the same side of Q as V, the gradient is that of `ppo_clip`; beyond the range PPO's gradient is 0.

    Source: Ao et al. 2026 (arXiv 2604.18578), as in their released code. Deviations: none.

    Args:
        advantage: Q - V. Its sign is not used: whether an action is to become more likely depends on Q's side of U.
        median_advantage: Q - U. No gradient is taken through either advantage.
        clip: how far from 1 the ends lie, in (0, 1).
        temperature: above 0, in units of Q.

    Metrics: `ess` (not used by the loss), `overshot_fraction` (rho beyond rho*, by more than 1e-6), `log_ratio_max`.
    A sample pulls its rho back if the sign of its weight differs from that of (Q - U) A.
    """
    same_shape(
        log_prob=log_prob, behavior_log_prob=behavior_log_prob, advantage=advantage, median_advantage=median_advantage
    )  # fmt: skip
    log_ratio = log_prob - behavior_log_prob.detach()
    ratio = policy_ratio(log_ratio)
    target = 1.0 - clip + 2.0 * clip * torch.sigmoid(median_advantage.detach() / temperature)
    loss = ((ratio - target).abs() * advantage.detach().abs()).mean()
    short = (target - ratio).detach()
    beyond = torch.where(median_advantage > 0.0, -short, short) > 1e-6
    metrics = {
        "ess": effective_sample_size(log_ratio),
        "overshot_fraction": beyond.to(ratio.dtype).mean(),
        "log_ratio_max": all_max(log_ratio.detach().max()),
    }
    return loss, metrics, torch.sign(short) * _weight(ratio, log_ratio) * torch.sign(advantage.detach())


def ppo_band(
    log_prob: Tensor, behavior_log_prob: Tensor, advantage: Tensor, *, clip: float | Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """A fixed band for the score-function weight: P3O without the ESS and without a pull.

        loss = -mean( sg(clamp(rho, 1 - clip, 1 + clip)) A log pi(a|s) )

    Unlike PPO's clip, it leaves every sample a gradient. Source: CISPO, MiniMax 2025 (arXiv 2506.13585), Eq. 4 and 5,
    with one action per step and no token masks. Metrics as in `ppo_clip`.
    """
    same_shape(log_prob=log_prob, behavior_log_prob=behavior_log_prob, advantage=advantage)
    log_ratio = (log_prob - behavior_log_prob).detach()
    ratio = torch.exp(log_ratio)
    weight = ratio.clamp(min=1.0 - clip).clamp(max=1.0 + clip)
    loss = -(weight * advantage.detach() * log_prob).mean()
    metrics = {
        "ess": effective_sample_size(log_ratio),
        "clipped_fraction": ((ratio - 1.0).abs() > clip).to(ratio.dtype).mean(),
        "log_ratio_max": all_max(log_ratio.max()),
    }
    return loss, metrics, weight


def ppo_kl(
    log_prob: Tensor,
    behavior_log_prob: Tensor,
    advantage: Tensor,
    forward_kl: Tensor,
    *,
    kl_coef: float | Tensor,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """PPO with a KL penalty in place of the clip.

        loss = -mean( rho A ) + kl_coef mean( KL(b || pi) )

    `forward_kl` is KL(b || pi), not the KL(pi || b) of `p3o`; at each sample's state, with gradient.
    Source: Schulman et al. 2017 (arXiv 1707.06347), Eq. 8; the rule that adapts `kl_coef` is in the agent. Metrics:
    `ess`, `kl_coef`, `log_ratio_max`.
    """
    same_shape(
        log_prob=log_prob, behavior_log_prob=behavior_log_prob, advantage=advantage, forward_kl=forward_kl
    )  # fmt: skip
    loss, metrics, weight, coefficient = _penalized(log_prob, behavior_log_prob, advantage, forward_kl, kl_coef)
    return loss, metrics | {"kl_coef": coefficient}, weight


def _penalized(
    log_prob: Tensor, behavior_log_prob: Tensor, advantage: Tensor, penalty: Tensor, coefficient: float | Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """-mean( rho A ) + coefficient mean( penalty ), the metrics both callers share, the weight, the coefficient."""
    log_ratio = log_prob - behavior_log_prob.detach()
    coefficient = _filled(coefficient, log_ratio.detach().sum())
    ratio = policy_ratio(log_ratio)
    loss = -(ratio * advantage.detach()).mean() + coefficient * penalty.mean()
    log_ratio = log_ratio.detach()
    metrics = {"ess": effective_sample_size(log_ratio), "log_ratio_max": all_max(log_ratio.max())}
    return loss, metrics, _weight(ratio, log_ratio), coefficient


def subtrajectory_balance(
    log_prob: Tensor,
    reference_log_prob: Tensor,
    value: Tensor,
    reward: Tensor,
    end_value: Tensor,
    within: Tensor,
    *,
    beta: float | Tensor,
    discount: float | Tensor,
    lambda_: float | Tensor = 1.0,
    entropy_coef: float | Tensor = 0.0,
    value_coef: float | Tensor = 1.0,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Trajectory balance on segments, with V as the logarithm of the normalizer: path consistency.

        delta_j = V(s_0) - discount^j V(s_j) + sum_{i < j} discount^i ( beta log(pi / pi_ref)(a_i|s_i) - r_i )
        minimized: mean( sum_j w_j delta_j^2 ) / 2,     w_j of `ess_rl.returns.path_weights`; lambda 1: only j = L

    delta_j is 0, for all j and every path, if pi maximizes the return minus beta KL(pi || pi_ref) and V is its value.
    So no ratio is needed, whichever policy acted. This holds if state and action determine the next state; with random
    transitions, the sampled next state is taken for the mean over next states, as in every squared residual of a single
    sample.

    The loss that is differentiated is a sum of two terms with the gradient of that square, the policy's part divided by
    beta + entropy_coef:

        loss = mean( sum_j w_j sg(delta_j) sum_{i < j} discount^i log pi(a_i|s_i) )
               + value_coef mean( sum_j w_j sg_pi(delta_j)^2 ) / 2

    so that it remains the policy gradient for beta = 0 (with any reference) and also where pi is pi_ref: -sum w_j
    delta_j is then the generalized advantage estimate, truncated after k steps. An action is credited with the whole of
    each segment it is in, including the rewards before it, which adds variance but no bias on the policy's own data.

    With entropy_coef = tau, the bracket also contains tau log pi: a bonus for the entropy of this and later steps.

    Source: Nachum et al. 2017 (PCL, arXiv 1702.08892), whose reference is uniform and which has the same two terms,
    policy and value separate; 2018 (Trust-PCL, arXiv 1707.01891), with a second reference, a policy that trails behind.
    As trajectory balance: Malkin et al. 2022 (arXiv 2201.13259); on segments, SubTB(lambda): Madan et al. 2022 (arXiv
    2209.12782); for language models, TBA: Bartoldson et al. 2025 (arXiv 2503.18929; `vargrad_trajectory_balance`).

    Args:
        log_prob: [n, k] of the policy being trained, with gradient, at k consecutive steps.
        reference_log_prob: [n, k] of pi_ref; no gradient is taken through it.
        value: [n] V at the first step, with gradient.
        reward: [n, k]
        end_value: [n, k] V of the state each step leads to, zero where the task ended. PCL takes a gradient through it
            too; without one it is a target network's value.
        within: [n, k] bool: the step belongs to the segment; the first always does.

    Returns:
        The loss; `value_loss`, half the mean of sum_j w_j delta_j^2; [n], w A at each segment's first step.
    """
    same_shape(
        log_prob=log_prob, reference_log_prob=reference_log_prob, reward=reward, end_value=end_value, within=within
    )  # fmt: skip
    same_shape(value=value, first_reward=reward[..., 0])
    charge = beta * (log_prob - reference_log_prob.detach()) + entropy_coef * log_prob - reward
    weights = path_weights(within, lambda_)
    residuals = path_residuals(charge.detach(), value, end_value, discount=discount)
    pulls = (weights * residuals).detach()
    number = torch.arange(log_prob.shape[-1], dtype=log_prob.dtype, device=log_prob.device)
    policy_loss = (pulls * (discount**number * log_prob).cumsum(-1)).sum(-1).mean()
    value_loss = 0.5 * (weights * residuals.square()).sum(-1).mean()
    return policy_loss + value_coef * value_loss, {"value_loss": value_loss.detach()}, -pulls.sum(-1)


def vargrad_trajectory_balance(
    log_prob: Tensor, reference_log_prob: Tensor, reward: Tensor, *, beta: float | Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Trajectory balance on whole trajectories, with the normalizer estimated from each group of K: VarGrad.

        log Z_j = log pi_ref(tau_j) - log pi(tau_j) + R_j / beta,     log Z = sg( mean of log Z_j over the group )
        loss    = mean( (log Z - log Z_j)^2 )

    the variance of log Z_j within groups. It is 0 if pi(tau) is proportional to pi_ref(tau) exp(R / beta) in each one.
    The gradient is 2 / beta times that of REINFORCE on R - beta log(pi / pi_ref) with the group's mean as the baseline
    (which includes the sample itself: 1 - 1 / K of the policy gradient). On another policy's data nothing changes:
    there is no ratio.

    All trajectories of a group must begin in the same state, and the actions must determine the rest. Over a thousand
    steps the squared sum of log ratios is mostly noise: use `subtrajectory_balance` there.

    Source: Bartoldson et al. 2025 (TBA, arXiv 2503.18929), after Richter et al. 2020 (VarGrad, arXiv 2010.10436) and
    Malkin et al. 2022 (arXiv 2201.13259).

    Args:
        log_prob: [..., K] log pi summed over the steps of each trajectory, with gradient.
        reference_log_prob: [..., K] of pi_ref.
        reward: [..., K] undiscounted returns.

    Returns:
        The loss; `log_z`, the mean of log Z; [..., K], w A, with the sign and scale of this loss.
    """
    same_shape(log_prob=log_prob, reference_log_prob=reference_log_prob, reward=reward)
    log_z = reference_log_prob.detach() - log_prob + reward / beta
    of_group = log_z.detach().mean(-1, keepdim=True)
    loss = (of_group - log_z).square().mean()
    return loss, {"log_z": of_group.mean()}, 2.0 * (log_z.detach() - of_group)


def k3(log_prob: Tensor, behavior_log_prob: Tensor, *, clamp: float = 10.0) -> Tensor:
    """The sampled stand-in for KL(pi || b) in P3O's released code, one value per sample: log rho + 1 / rho - 1.

    On actions drawn from b it is not an estimate of KL(pi || b): its mean is chi^2(b || pi) - KL(b || pi), infinite
    once sigma_pi < sigma_b / sqrt(2), and its pull on a sample with rho > 1 is never more than 1. The exponent is
    clamped to +-`clamp`, as released, which hides the divergence: where log rho < -`clamp` only the first term has a
    gradient, and it pushes pi still further away from b. An option for comparison; `ess_rl.gaussian.kl` is the default.

    Source: FeynRL, algs/P3O (arXiv 2605.12380); estimator: Schulman 2020, "Approximating KL divergence".
    """
    same_shape(log_prob=log_prob, behavior_log_prob=behavior_log_prob)
    log_ratio = log_prob - behavior_log_prob
    return log_ratio + torch.exp(torch.clamp(-log_ratio, -clamp, clamp)) - 1.0


def divergence_slope(log_ratio: Tensor, divergence: Divergence) -> Tensor:
    """Cost of each sample's action when a divergence D_f = E_b[f(rho)] of pi from b is charged: f'(rho) - f'(1).

        kl            KL(pi || b)                 log rho
        reverse_kl    KL(b || pi)                 1 - 1 / rho
        hellinger     E_b[(sqrt(rho) - 1)^2]      1 - 1 / sqrt(rho)

    The gradient of D_f is E_b[rho f'(rho) grad log pi]: that of a policy loss with the reward -f'(rho), held fixed. A
    constant added to f' does not change it. The cost is 0 on fresh data.

    Source: Wang et al. 2019 (arXiv 2501.15034), as released, including the clamp of the last two exponents to +-3.
    """
    if divergence == "kl":
        return log_ratio
    if divergence == "reverse_kl":
        return 1.0 - torch.exp((-log_ratio).clamp(-3.0, 3.0))
    if divergence == "hellinger":
        return 1.0 - torch.exp((-0.5 * log_ratio).clamp(-3.0, 3.0))
    raise ValueError(f"divergence={divergence!r}: choose one of kl, reverse_kl, hellinger")


def advantage_weights(
    advantage: Tensor,
    temperature: float | Tensor,
    form: Literal["exponential", "softmax"],
    *,
    cap: float | Tensor = 100.0,
) -> Tensor:
    """Weight of each action of the data in an advantage-weighted regression, [n], without gradient.

        exponential    w_i = min(exp(A_i / temperature), cap)
        softmax        w_i = n exp(A_i / temperature) / sum_j exp(A_j / temperature)

    Source: Nair et al. 2020 (AWAC, arXiv 2006.09359): Eq. 8 and the appendix have the exponential, with the normalizer
    Z(s) left out; their code uses the softmax over the minibatch, whose mean weight is 1 whatever the scale of A. The
    cap of 100 is that of Kostrikov et al. 2021 (IQL, arXiv 2110.06169, Appendix B) and of later implementations.
    IQL's inverse temperature beta is 1 / temperature. Peng et al. 2019 (AWR, arXiv 1910.00177) have a cap of 20.
    """
    scaled = advantage.detach() / temperature
    if form == "exponential":
        highest = torch.log(cap) if isinstance(cap, Tensor) else math.log(cap)
        return torch.exp(scaled.clamp(min=-80.0).clamp(max=highest))  # above 0, so that any minibatch has an ESS
    if form == "softmax":
        return torch.softmax(scaled.flatten(), dim=0).view_as(scaled) * scaled.numel()
    raise ValueError(f"form={form!r}: choose one of exponential, softmax")


def expectile_loss(error: Tensor, expectile: float | Tensor) -> Tensor:
    """mean( |expectile - 1(u < 0)| u^2 ) of errors u = target - prediction.

    The prediction that minimizes it is the expectile of the targets: at 0.5 their mean, toward 1 their maximum.

    Source: Kostrikov, Nair, Levine 2021 (IQL, arXiv 2110.06169), Eq. 5.
    """
    return (torch.abs(expectile - (error < 0.0).to(error.dtype)) * error.square()).mean()


def td3_bc_weight(q: Tensor, alpha: float | Tensor) -> Tensor:
    """lambda = alpha / mean(|Q|): weight of the policy's Q against its squared distance to the data; 0-dim, detached.

    Source: Fujimoto and Gu 2021 (TD3+BC, arXiv 2106.06860), Eq. 5.
    """
    return alpha / q.detach().abs().mean().clamp(min=1e-8)


def expert_mass(pi: Gaussian, action: Tensor) -> Tensor:
    """Probability mass of `pi` that is less likely than `action` [n, act_dim]: u in [0, 1], [n], without gradient.

        m^2 = sum_i ((a_i - mean_i) / sigma_i)^2,     u = 1 - F(m^2), F the chi^2 CDF with act_dim degrees of freedom

    u is 1 at the mean and tends to 0 far from it; it is uniform, whatever act_dim is, if the actions are drawn from
    `pi`. Unlike the density, it has no unit, so it can take the place of the probability in a method for discrete
    actions. Ours; no source. ValueError unless the actions have act_dim dimensions.
    """
    pi.check(action)
    z = (action - pi.mean.detach()) * torch.exp(-pi.log_std.detach())
    distance = z.square().sum(-1)
    return torch.special.gammaincc(torch.full_like(distance, 0.5 * action.shape[-1]), 0.5 * distance)


def width_correction(act_dim: int) -> float:
    """kappa = E[u (1 - u) m^2 / act_dim] / E[u (1 - u)] for actions drawn from the policy itself (see `expert_mass`).

    0.705, 0.833, 0.885, 0.940, 0.979 in 1, 2, 3, 6, 17 dimensions. With d the dimension, x f_d(x) = d f_(d+2)(x) for
    the density f_d of chi^2, and E[u (1 - u)] = 1 / 6: so kappa is 6 E[u (1 - u)] over chi^2 with d + 2.
    """
    highest = act_dim + 40.0 * math.sqrt(2.0 * act_dim) + 100.0
    x = torch.linspace(0.0, 1.0, 20_001, dtype=torch.float64).square() * highest  # finer near zero, for few dimensions
    u = torch.special.gammaincc(torch.full_like(x, 0.5 * act_dim), 0.5 * x)
    step = torch.special.gammainc(torch.full_like(x, 0.5 * act_dim + 1.0), 0.5 * x).diff()
    return 6.0 * ((u * (1.0 - u)).unfold(0, 2, 1).mean(-1) * step).sum().item()


def imitation(
    pi: Gaussian, action: Tensor, *, phi: Literal["one", "mass"] = "one", width: Literal["fixed"] | float = 1.0
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Weighted maximum likelihood of another policy's actions [n, act_dim], up to a constant:

        loss = -mean( sg(phi) sum_i( -z_i^2 / 2 - width log sigma_i ) ),     z_i = (a_i - mean_i) / sigma_i
        phi  = 1, or u (1 - u) with u of `expert_mass`: smallest for actions far from pi and for those pi already takes

    With width 1 the sum is log pi(a|s). The weight u (1 - u) favors actions near the mean, and so narrows pi: fitted to
    actions of a standard normal, sigma would go to 0.55 in one dimension. With width = `width_correction(act_dim)`
    sigma stays where it is; with "fixed" it gets no gradient.

    Source: Zhang et al. 2025 (CHORD, arXiv 2508.11408), where phi is p (1 - p) of a token's probability p; using u
    instead, and the correction, are ours. Metrics: `imitation_loss`, `expert_mass` (mean u). The weight is phi.
    """
    if phi not in ("one", "mass") or (isinstance(width, str) and width != "fixed"):
        raise ValueError(f"phi={phi!r}, width={width!r}: phi is 'one' or 'mass', width a number or 'fixed'")
    u = expert_mass(pi, action)
    weight = u * (1.0 - u) if phi == "mass" else torch.ones_like(u)
    log_std = pi.log_std.detach() if width == "fixed" else pi.log_std
    z = (action - pi.mean) * torch.exp(-log_std)
    likelihood = (-0.5 * z.square() - (1.0 if isinstance(width, str) else width) * log_std).sum(-1)
    loss = -(weight * likelihood).mean()
    return loss, {"imitation_loss": loss.detach(), "expert_mass": u.mean()}, weight
