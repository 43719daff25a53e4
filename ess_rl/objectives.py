"""Policy objectives: tensors in, (scalar loss to minimize, metrics) out.

All inputs are [n] over the samples of a minibatch (any common shape works; ValueError where shapes differ). Among the
metrics of each is `weight` [n], w in the gradient -mean(w A grad log pi(a|s)) of the policy loss, which says what every
sample adds; the others are 0-dim, and none has a gradient or waits for the device. `log_prob` carries the gradient of
the policy being trained, `behavior_log_prob` is the log density of the policy that acted, at the action as it was
sampled; both are in nats. Nothing here can check that the recorded density is the acting policy's: on fresh data,
before the first update, `ess` must be 1.

Where several processes share a minibatch (torch.distributed), `ess` and `log_ratio_max` are those of the whole; the
loss and the other metrics are means over a process's own samples, to be averaged as `ess_rl.optim.gradient` does.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from ess_rl.checks import same_shape
from ess_rl.ess import effective_sample_size
from ess_rl.gaussian import Gaussian
from ess_rl.processes import all_max
from ess_rl.returns import path_residuals, path_weights

MixtureKL = Literal["variational", "convex", "k3"]
Divergence = Literal["kl", "reverse_kl", "hellinger"]

_HIGHEST = 20.0  # log ratio; e^20 is 4.9e8


def policy_ratio(log_ratio: Tensor) -> Tensor:
    """rho = exp(log_ratio), at most e^20: beyond it there is no gradient.

    Deviation of all that uses it: e^89 is no float32 any more, and an infinite ratio turns the zero gradient outside a
    clip range into no number. Data of others have such ratios, where a fitted behavior is narrow and an action far off.
    """
    return torch.exp(log_ratio.clamp(max=_HIGHEST))


def _weight(ratio: Tensor, log_ratio: Tensor) -> Tensor:
    """What `policy_ratio` weighs a sample's score with: nothing where it is clamped."""
    return torch.where(log_ratio <= _HIGHEST, ratio, 0.0).detach()


def _filled(number: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor, filled in where it is needed: nothing is sent to the device."""
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
) -> tuple[Tensor, dict[str, Tensor]]:
    """P3O, "Trust the Batch": the effective sample size caps the score-function weight and sets the pull to b.

        rho = pi(a|s) / b(a|s),     e = ESS of rho over this batch
        loss = -mean( sg(min(rho, e)) A log pi(a|s) ) + (1 - e) mean( KL(pi || b) )

    On fresh data e = 1 and the gradient is the policy gradient. There is no clip range and no coefficient.

    Source: Fakoor et al. 2026 (arXiv 2605.12380), Eq. 11 and 12. Deviations: none in the formula. Their code estimates
    the KL from samples (`k3`, below); pass that as `behavior_kl` to do the same, or the closed form
    (`ess_rl.gaussian.kl(pi, b)`), which is exact and whose pull grows with the distance.

    Args:
        advantage: of a standard deviation of about 1 over the minibatch (`ess_rl.normalizer.standardize_batch`): its
            scale sets how much the first term weighs against the KL. No gradient is taken through it.
        behavior_kl: KL(pi || b) in each sample's state, with gradient.
        cap: "ess"; or a fixed number; or "ess_per_dim", e^(1/act_dim), which undoes the exponential decay of e in
            the dimension of the action. It replaces e in the cap alone: the weight of the KL stays 1 - e.
        pull: the weight of the KL: "ess", 1 - e; or a fixed number. With cap=1 and pull=0 this is the policy loss of
            V-trace's actor-critic (Espeholt et al. 2018, arXiv 1802.01561, Eq. 4), whose advantages are `vtrace`'s.
        act_dim: for "ess_per_dim" only.
        ess: e (a number, or 0-dim) to use in cap and pull in place of this batch's, as of a larger batch that this one
            is part of. The ESS of few samples is too high, so the smaller the batch, the weaker its cap and its pull.

    Returns:
        The loss and `ess` (of this batch, whatever is used), `behavior_kl` (mean), `capped_fraction` (rho above the cap
        by more than 1e-6 of it, so that rounding does not count), `log_ratio_max`, `weight`.

    Raises:
        ValueError: shapes differ; another name of a cap or a pull; "ess_per_dim" without act_dim.
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
    return loss, {
        "ess": own,
        "behavior_kl": mean_kl.detach(),
        "capped_fraction": (ratio > limit * (1.0 + 1e-6)).to(ratio.dtype).mean(),
        "log_ratio_max": all_max(log_ratio.max()),
        "weight": weight,
    }


def p4o(
    log_prob: Tensor,
    behavior_log_prob: Tensor,
    advantage: Tensor,
    behavior_kl: Tensor,
    *,
    proximal_log_prob: Tensor,
    proximal_kl: Tensor,
    mixture_kl: MixtureKL = "variational",
) -> tuple[Tensor, dict[str, Tensor]]:
    """P4O: P3O with two anchors, the policy b that acted and a recent policy p. The further one pulls more.

        rho = pi / b,   e_b = ESS of pi / b,   e_p = ESS of pi / p,   e = min(e_b, e_p)
        w_b = (1 - e_b) / ((1 - e_b) + (1 - e_p)),   w_p = 1 - w_b
        loss = -mean( sg(min(rho, e)) A log pi(a|s) ) + (1 - e) mean( KL(pi || w_b b + w_p p) )

    With p = b, and with p = pi, it is `p3o`. Where both ESS are 1, to 1e-6 together, nothing pulls: what they lack is
    rounding then, and w_b is a half, not a quotient of roundings.

    Source: Fakoor et al. 2026 (arXiv 2605.12380), Section 3.1 and Eq. 13. Deviation: the KL to a mixture of two
    Gaussians has no closed form, and the sampled k3 of the released code is no KL and breaks down where pi is narrower
    than its anchor (see `k3`). So one of three stands for it:

        variational   -log( w_b exp(-KL(pi || b)) + w_p exp(-KL(pi || p)) )
        convex        w_b KL(pi || b) + w_p KL(pi || p)
        k3            `k3` of pi and the mixture at the sampled action, as released

    The first two are upper bounds, KL <= variational <= convex, and exact with one anchor or two equal ones
    (Hershey and Olsen 2007, "Approximating the Kullback Leibler divergence between Gaussian mixture models", for the
    first). As the mixture's own KL, the first lets go of an anchor that has been left far behind while the other is
    near; the pull of the second grows with the distance to both.

    Args:
        behavior_kl: KL(pi || b) in each sample's state, with gradient.
        proximal_log_prob: log p(a|s); like `behavior_log_prob` without gradient.
        proximal_kl: KL(pi || p), likewise.

    Returns:
        The loss and the metrics of `p3o` (`ess` is e_b, `behavior_kl` the mean KL(pi || b)); with `ess_proximal` (e_p),
        `proximal_kl`, `mixture_kl` (mean, of whichever stands for it) and `behavior_share` (w_b).

    Raises:
        ValueError: shapes differ; another name of a KL.
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
    loss, metrics = p3o(log_prob, behavior_log_prob, advantage, to_mixture, ess=torch.minimum(e_b, e_p))
    return loss, metrics | {
        "behavior_kl": behavior_kl.mean().detach(),
        "ess_proximal": e_p,
        "proximal_kl": proximal_kl.mean().detach(),
        "mixture_kl": to_mixture.mean().detach(),
        "behavior_share": w_b,
    }


def ppo_clip(
    log_prob: Tensor, behavior_log_prob: Tensor, advantage: Tensor, *, clip: float | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate.

        loss = -mean( min( rho A, clamp(rho, 1 - clip, 1 + clip) A ) )

    Source: Schulman et al. 2017 (arXiv 1707.06347), Eq. 7. Metrics: `ess` of the same batch (not used by the
    loss), `clipped_fraction` (|rho - 1| > clip), `log_ratio_max`, `weight`.
    """
    same_shape(log_prob=log_prob, behavior_log_prob=behavior_log_prob, advantage=advantage)
    return _clipped_about(1.0, log_prob - behavior_log_prob.detach(), advantage.detach(), clip)


def _clipped_about(
    center: float | Tensor, log_ratio: Tensor, advantage: Tensor, clip: float | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate with its range about `center`, and the metrics of `ppo_clip`."""
    ratio = policy_ratio(log_ratio)
    clipped = ratio.clamp(min=center - clip).clamp(max=center + clip)
    loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
    return loss, {
        "ess": effective_sample_size(log_ratio),
        "clipped_fraction": ((ratio - center).abs() > clip).to(ratio.dtype).mean().detach(),
        "log_ratio_max": all_max(log_ratio.detach().max()),
        "weight": torch.where(ratio * advantage <= clipped * advantage, _weight(ratio, log_ratio), 0.0),
    }


def ppo_decoupled(
    log_prob: Tensor, behavior_log_prob: Tensor, advantage: Tensor, *, proximal_log_prob: Tensor, clip: float | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO whose clip holds on to a recent policy p, while the weight of a sample still corrects for b, that acted.

        r = pi / p,     loss = -mean( sg(p / b) min( r A, clamp(r, 1 - clip, 1 + clip) A ) )

    With p = b it is `ppo_clip`. Source: Hilton, Cobbe, Schulman 2022 (arXiv 2110.00641), Eq. 2. Which policy p is, is
    the caller's affair: theirs is an exponential average of the weights, our PPO takes the iteration's first policy.
    Metrics: `ess` of pi / b, `clipped_fraction` of r, `log_ratio_max` of pi / b, `weight`.
    """
    same_shape(
        log_prob=log_prob, behavior_log_prob=behavior_log_prob, advantage=advantage, proximal_log_prob=proximal_log_prob
    )  # fmt: skip
    correction = policy_ratio(proximal_log_prob - behavior_log_prob).detach()
    loss, metrics = ppo_clip(log_prob, proximal_log_prob, advantage.detach() * correction, clip=clip)
    log_ratio, weight = (log_prob - behavior_log_prob).detach(), correction * metrics["weight"]
    ess = effective_sample_size(log_ratio)
    return loss, metrics | {"ess": ess, "log_ratio_max": all_max(log_ratio.max()), "weight": weight}


def ppo_generalized(
    log_prob: Tensor, behavior_log_prob: Tensor, advantage: Tensor, *, proximal_log_prob: Tensor, clip: float | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO whose clip range lies about the ratio that a recent policy p has, and not about 1: for older data.

        rho = pi / b, center = p / b,     loss = -mean( min( rho A, clamp(rho, center - clip, center + clip) A ) )

    With p = b it is `ppo_clip`. Where p has become unlikelier than b at an action, the range is wide as measured in
    pi / p, and narrow where it has become likelier; `ppo_decoupled` weighs such samples and keeps the range in pi / p.
    Source: GePPO, Queeney, Paschalidis, Cassandras 2021 (arXiv 2111.00072), the surrogate of its Algorithm 1. Not taken
    over: its choice of how many older policies to learn from, and its learning rate adapted to the total variation.
    Metrics: `ess` of rho, `clipped_fraction` (|rho - center| > clip), `log_ratio_max` of rho, `weight`.
    """
    same_shape(
        log_prob=log_prob, behavior_log_prob=behavior_log_prob, advantage=advantage, proximal_log_prob=proximal_log_prob
    )  # fmt: skip
    center = policy_ratio(proximal_log_prob - behavior_log_prob).detach()
    return _clipped_about(center, log_prob - behavior_log_prob.detach(), advantage.detach(), clip)


def ppo_variance(
    log_prob: Tensor, behavior_log_prob: Tensor, advantage: Tensor, *, coefficient: float | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO with a penalty on the variance of the ratio in place of the clip.

        loss = -mean( rho A ) + coefficient mean( (rho - 1)^2 )

    E_b[rho] is 1, so the penalty estimates Var rho, and 1 / (1 + Var rho) is what the ESS estimates: a bound on one is
    a bound on the other. Source: the idea of R2VPO, Luo et al. 2026 (arXiv 2605.26784): a bounded variance of the ratio
    as a trust region, by primal and dual steps; of its text the abstract alone was at hand, so the form of penalty,
    bound and dual step is ours (the rule that adapts `coefficient` is with the agent). Metrics: `ess`,
    `ratio_variance`, `coefficient`, `log_ratio_max`, `weight` (of the first term).
    """
    same_shape(log_prob=log_prob, behavior_log_prob=behavior_log_prob, advantage=advantage)
    penalty = (policy_ratio(log_prob - behavior_log_prob.detach()) - 1.0).square()
    loss, coefficient, metrics = _penalized(log_prob, behavior_log_prob, advantage, penalty, coefficient)
    return loss, metrics | {"ratio_variance": penalty.mean().detach(), "coefficient": coefficient}


def bpo(
    log_prob: Tensor,
    behavior_log_prob: Tensor,
    advantage: Tensor,
    median_advantage: Tensor,
    *,
    clip: float | Tensor,
    temperature: float | Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """BPO: the ratio is drawn to an end of its range, from within and from beyond.

        rho* = 1 - clip + 2 clip sigmoid((Q - U) / temperature)
        loss = mean( |rho - rho*| |A| )

    U is a median of Q(s, .) under b in the state, so that half of b's actions are to become likelier. With rho within
    its range, and U on the same side of Q as the value is, the gradient is that of `ppo_clip`; beyond it PPO's is 0.

    Source: Ao et al. 2026 (arXiv 2604.18578), as in their released code. Deviations: none.

    Args:
        advantage: Q - V. Its sign does not enter: what is to become likelier is Q's side of U.
        median_advantage: Q - U; neither has a gradient.
        clip: how far from 1 the ends lie, in (0, 1).
        temperature: above 0, in the unit of Q.

    Metrics: `ess` (not used by the loss), `overshot_fraction` (rho beyond rho*, by more than 1e-6), `log_ratio_max`,
    `weight`; a sample pulls its rho back where the sign of `weight` is not that of (Q - U) A.
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
    return loss, {
        "ess": effective_sample_size(log_ratio),
        "overshot_fraction": beyond.to(ratio.dtype).mean(),
        "log_ratio_max": all_max(log_ratio.detach().max()),
        "weight": torch.sign(short) * _weight(ratio, log_ratio) * torch.sign(advantage.detach()),
    }


def ppo_band(
    log_prob: Tensor, behavior_log_prob: Tensor, advantage: Tensor, *, clip: float | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """A fixed band for the weight of the score function: P3O without the ESS and without a pull.

        loss = -mean( sg(clamp(rho, 1 - clip, 1 + clip)) A log pi(a|s) )

    Unlike PPO's clip it silences no sample. Source: CISPO, MiniMax 2025 (arXiv 2506.13585), Eq. 4 and 5, for one action
    a step and no token masks. Metrics as of `ppo_clip`.
    """
    same_shape(log_prob=log_prob, behavior_log_prob=behavior_log_prob, advantage=advantage)
    log_ratio = (log_prob - behavior_log_prob).detach()
    ratio = torch.exp(log_ratio)
    weight = ratio.clamp(min=1.0 - clip).clamp(max=1.0 + clip)
    loss = -(weight * advantage.detach() * log_prob).mean()
    return loss, {
        "ess": effective_sample_size(log_ratio),
        "clipped_fraction": ((ratio - 1.0).abs() > clip).to(ratio.dtype).mean(),
        "log_ratio_max": all_max(log_ratio.max()),
        "weight": weight,
    }


def ppo_kl(
    log_prob: Tensor,
    behavior_log_prob: Tensor,
    advantage: Tensor,
    forward_kl: Tensor,
    *,
    kl_coef: float | Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO with a KL penalty in place of the clip.

        loss = -mean( rho A ) + kl_coef mean( KL(b || pi) )

    `forward_kl` is KL(b || pi), not the KL(pi || b) of `p3o`; in each sample's state, with gradient.
    Source: Schulman et al. 2017 (arXiv 1707.06347), Eq. 8; the rule that adapts `kl_coef` is with the agent. Metrics:
    `ess`, `kl_coef`, `log_ratio_max`, `weight`.
    """
    same_shape(
        log_prob=log_prob, behavior_log_prob=behavior_log_prob, advantage=advantage, forward_kl=forward_kl
    )  # fmt: skip
    loss, coefficient, metrics = _penalized(log_prob, behavior_log_prob, advantage, forward_kl, kl_coef)
    return loss, metrics | {"kl_coef": coefficient}


def _penalized(
    log_prob: Tensor, behavior_log_prob: Tensor, advantage: Tensor, penalty: Tensor, coefficient: float | Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """-mean( rho A ) + coefficient mean( penalty ), the coefficient as a tensor, and the metrics of both that do so."""
    log_ratio = log_prob - behavior_log_prob.detach()
    coefficient = _filled(coefficient, log_ratio.detach().sum())
    ratio = policy_ratio(log_ratio)
    loss = -(ratio * advantage.detach()).mean() + coefficient * penalty.mean()
    log_ratio = log_ratio.detach()
    metrics = {
        "ess": effective_sample_size(log_ratio),
        "log_ratio_max": all_max(log_ratio.max()),
        "weight": _weight(ratio, log_ratio),
    }
    return loss, coefficient, metrics


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
) -> tuple[Tensor, dict[str, Tensor]]:
    """Trajectory balance of segments, with V as the logarithm of the normalizer: path consistency.

        delta_j = V(s_0) - discount^j V(s_j) + sum_{i < j} discount^i ( beta log(pi / pi_ref)(a_i|s_i) - r_i )
        minimized: mean( sum_j w_j delta_j^2 ) / 2,     w_j of `ess_rl.returns.path_weights`; lambda 1: j = L alone

    It is 0, for all j and every path, where pi maximizes the return less beta KL(pi || pi_ref) and V is its value. So
    whoever acted, no ratio corrects for it. That holds where the next state follows from state and action; from random
    ones it takes the mean over next states for granted, as every squared residual of a single sample does.

    What is differentiated is a sum of two terms with the gradient of that square, of the policy's part over beta +
    entropy_coef:

        loss = mean( sum_j w_j sg(delta_j) sum_{i < j} discount^i log pi(a_i|s_i) )
               + value_coef mean( sum_j w_j sg_pi(delta_j)^2 ) / 2

    so that beta = 0 remains the policy gradient (with any reference, where pi is pi_ref it is that too): -sum w_j
    delta_j is then the generalized advantage estimate, cut off after k steps. An action is credited with the whole of
    each segment it is in, also with the rewards before it, which adds variance and no bias on the policy's own data.

    With entropy_coef = tau there is tau log pi in the bracket beside: a bonus for the entropy of this and later steps.

    Source: Nachum et al. 2017 (PCL, arXiv 1702.08892), whose reference is uniform and which has the same two terms,
    policy and value apart; 2018 (Trust-PCL, arXiv 1707.01891), with a second reference, a policy that follows behind.
    As trajectory balance: Malkin et al. 2022 (arXiv 2201.13259); of parts, SubTB(lambda): Madan et al. 2022 (arXiv
    2209.12782); for language models TBA, Bartoldson et al. 2025 (arXiv 2503.18929; `vargrad_trajectory_balance`).

    Args:
        log_prob: [n, k] of the policy being trained, with gradient, at k consecutive steps.
        reference_log_prob: [n, k] of pi_ref; no gradient is taken through it.
        value: [n] V at the first step, with gradient.
        reward: [n, k]
        end_value: [n, k] V of what each step leads to, zero where the task ended. PCL has a gradient through it too;
            without one it is a target network's.
        within: [n, k] bool: the step belongs to the segment; the first always does.

    Returns:
        The loss; `value_loss`, half the mean of sum_j w_j delta_j^2; `weight` [n], w A at a segment's first step.
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
    return policy_loss + value_coef * value_loss, {"value_loss": value_loss.detach(), "weight": -pulls.sum(-1)}


def vargrad_trajectory_balance(
    log_prob: Tensor, reference_log_prob: Tensor, reward: Tensor, *, beta: float | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Trajectory balance of whole trajectories, the normalizer estimated from each group of K: VarGrad.

        log Z_j = log pi_ref(tau_j) - log pi(tau_j) + R_j / beta,     log Z = sg( mean of log Z_j over the group )
        loss    = mean( (log Z - log Z_j)^2 )

    the variance of log Z_j within groups. It is 0 where pi(tau) is proportional to pi_ref(tau) exp(R / beta) in each.
    The gradient is 2 / beta times that of REINFORCE on R - beta log(pi / pi_ref) with the group's mean as the baseline
    (which holds the sample itself: 1 - 1 / K of the policy gradient). On data of others it stays as it is: no ratio.

    All trajectories of a group must begin in one state, and what follows must follow from the actions. Over a thousand
    steps the sum of log ratios, squared, is mostly noise: `subtrajectory_balance` is for those.

    Source: Bartoldson et al. 2025 (TBA, arXiv 2503.18929), after Richter et al. 2020 (VarGrad, arXiv 2010.10436) and
    Malkin et al. 2022 (arXiv 2201.13259).

    Args:
        log_prob: [..., K] log pi summed over the steps of each trajectory, with gradient.
        reference_log_prob: [..., K] of pi_ref.
        reward: [..., K] undiscounted returns.

    Returns:
        The loss; `log_z`, the mean of log Z; `weight` [..., K], w A, with the sign and scale of this loss.
    """
    same_shape(log_prob=log_prob, reference_log_prob=reference_log_prob, reward=reward)
    log_z = reference_log_prob.detach() - log_prob + reward / beta
    of_group = log_z.detach().mean(-1, keepdim=True)
    loss = (of_group - log_z).square().mean()
    return loss, {"log_z": of_group.mean(), "weight": 2.0 * (log_z.detach() - of_group)}


def k3(log_prob: Tensor, behavior_log_prob: Tensor, *, clamp: float = 10.0) -> Tensor:
    """The sampled stand-in for KL(pi || b) in P3O's released code, one value a sample: log rho + 1 / rho - 1.

    On actions drawn from b it is not an estimate of KL(pi || b): its mean is chi^2(b || pi) - KL(b || pi), infinite
    once sigma_pi < sigma_b / sqrt(2), and its pull on a sample with rho > 1 is never more than 1. The exponent is
    clamped to +-`clamp`, as released, which hides the divergence. An option for comparison; `ess_rl.gaussian.kl` is
    the rule.

    Source: FeynRL, algs/P3O (arXiv 2605.12380); estimator: Schulman 2020, "Approximating KL divergence".
    """
    log_ratio = log_prob - behavior_log_prob
    return log_ratio + torch.exp(torch.clamp(-log_ratio, -clamp, clamp)) - 1.0


def divergence_slope(log_ratio: Tensor, divergence: Divergence) -> Tensor:
    """What a sample's action costs if a divergence D_f = E_b[f(rho)] of pi from b is to be paid: f'(rho) - f'(1).

        kl            KL(pi || b)                 log rho
        reverse_kl    KL(b || pi)                 1 - 1 / rho
        hellinger     E_b[(sqrt(rho) - 1)^2]      1 - 1 / sqrt(rho)

    The gradient of D_f is E_b[rho f'(rho) grad log pi]: that of a policy whose reward is -f'(rho), taken as given. A
    constant changes nothing in it. It is 0 on fresh data.

    Source: Wang et al. 2019 (arXiv 2501.15034), as released. From there also: the exponents of the last two are
    clamped to +-3.
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
    """How much each action of the data counts in an advantage-weighted regression, [n], without gradient.

        exponential    w_i = min(exp(A_i / temperature), cap)
        softmax        w_i = n exp(A_i / temperature) / sum_j exp(A_j / temperature)

    Source: Nair et al. 2020 (AWAC, arXiv 2006.09359): Eq. 8 and the appendix have the exponential, with the normalizer
    Z(s) left out; their code takes the softmax over the minibatch, whose mean weight is 1 whatever the scale of A. The
    cap of 100 is that of Kostrikov et al. 2021 (IQL, arXiv 2110.06169, Appendix B) and of later implementations.
    IQL's inverse temperature beta is 1 / temperature. Peng et al. 2019 (AWR, arXiv 1910.00177) have a cap of 20.
    """
    scaled = advantage.detach() / temperature
    if form == "exponential":
        highest = torch.log(cap) if isinstance(cap, Tensor) else math.log(cap)
        return torch.exp(scaled.clamp(min=-80.0).clamp(max=highest))  # above 0, so that any minibatch has an ESS
    if form == "softmax":
        return torch.softmax(scaled, dim=0) * scaled.shape[0]
    raise ValueError(f"form={form!r}: choose one of exponential, softmax")


def expectile_loss(error: Tensor, expectile: float | Tensor) -> Tensor:
    """mean( |expectile - 1(u < 0)| u^2 ) of errors u = target - prediction.

    The prediction that minimizes it is the expectile of the targets: 0.5 their mean, towards 1 their largest.

    Source: Kostrikov, Nair, Levine 2021 (IQL, arXiv 2110.06169), Eq. 5.
    """
    return (torch.abs(expectile - (error < 0.0).to(error.dtype)) * error.square()).mean()


def td3_bc_weight(q: Tensor, alpha: float | Tensor) -> Tensor:
    """lambda = alpha / mean(|Q|): what the policy's Q counts beside its squared distance to the data; 0-dim, detached.

    Source: Fujimoto and Gu 2021 (TD3+BC, arXiv 2106.06860), Eq. 5.
    """
    return alpha / q.detach().abs().mean().clamp(min=1e-8)


def expert_mass(pi: Gaussian, action: Tensor) -> Tensor:
    """How much of `pi` is less likely than `action` [n, act_dim]: u in [0, 1], [n], without gradient.

        m^2 = sum_i ((a_i - mean_i) / sigma_i)^2,     u = 1 - F(m^2), F the distribution function of chi^2 with act_dim

    1 at the mean, towards 0 far from it; uniform, whatever act_dim is, where the actions are drawn from `pi`. It has no
    unit, which the density has: so it can stand where a method for discrete actions has a probability. Ours; no source.
    """
    z = (action - pi.mean.detach()) * torch.exp(-pi.log_std.detach())
    distance = z.square().sum(-1)
    return torch.special.gammaincc(torch.full_like(distance, 0.5 * action.shape[-1]), 0.5 * distance)


def width_correction(act_dim: int) -> float:
    """kappa = E[u (1 - u) m^2 / act_dim] / E[u (1 - u)] of actions drawn from the policy itself (`expert_mass`).

    0.705, 0.833, 0.885, 0.940, 0.979 in 1, 2, 3, 6, 17 dimensions. With d the dimension, x f_d(x) = d f_(d+2)(x) for
    the density f_d of chi^2, and E[u (1 - u)] = 1 / 6: so it is 6 E[u (1 - u)] over chi^2 with d + 2.
    """
    highest = act_dim + 40.0 * math.sqrt(2.0 * act_dim) + 100.0
    x = torch.linspace(0.0, 1.0, 20_001, dtype=torch.float64).square() * highest  # finer where few dimensions need it
    u = torch.special.gammaincc(torch.full_like(x, 0.5 * act_dim), 0.5 * x)
    step = torch.special.gammainc(torch.full_like(x, 0.5 * act_dim + 1.0), 0.5 * x).diff()
    return 6.0 * ((u * (1.0 - u)).unfold(0, 2, 1).mean(-1) * step).sum().item()


def imitation(
    pi: Gaussian, action: Tensor, *, phi: Literal["one", "mass"] = "one", width: Literal["fixed"] | float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted maximum likelihood of someone else's actions [n, act_dim], up to a constant:

        loss = -mean( sg(phi) sum_i( -z_i^2 / 2 - width log sigma_i ) ),     z_i = (a_i - mean_i) / sigma_i
        phi  = 1, or u (1 - u) with u of `expert_mass`: least for the alien and for what is done already

    With width 1 the sum is log pi(a|s). The weight u (1 - u) prefers actions near the mean, and so narrows pi: from
    actions of a standard normal, sigma would go to 0.55 in one dimension. With width = `width_correction(act_dim)` it
    stays where it is; with "fixed" sigma gets no gradient.

    Source: Zhang et al. 2025 (CHORD, arXiv 2508.11408), where phi is p (1 - p) of a token's probability p; u in its
    place and the correction are ours. Metrics: `imitation_loss`, `expert_mass` (mean u), `weight` (phi).
    """
    if phi not in ("one", "mass") or (isinstance(width, str) and width != "fixed"):
        raise ValueError(f"phi={phi!r}, width={width!r}: phi is 'one' or 'mass', width a number or 'fixed'")
    u = expert_mass(pi, action)
    weight = u * (1.0 - u) if phi == "mass" else torch.ones_like(u)
    log_std = pi.log_std.detach() if width == "fixed" else pi.log_std
    z = (action - pi.mean) * torch.exp(-log_std)
    likelihood = (-0.5 * z.square() - (1.0 if isinstance(width, str) else width) * log_std).sum(-1)
    loss = -(weight * likelihood).mean()
    return loss, {"imitation_loss": loss.detach(), "expert_mass": u.mean(), "weight": weight}
