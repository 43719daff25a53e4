"""Distance of a policy from the behavior whose data it learned from, logged once per iteration for every agent."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ess_rl import checks, processes
from ess_rl.contract import Metrics
from ess_rl.ess import advantage_weighted_ess, effective_sample_size
from ess_rl.gaussian import Gaussian, kl

AFFINITY_EPSILON = 0.2  # of the ratio band, for one action dimension: HINT's default, and PPO's clip
QUANTILES = {"log_ratio_q01": 0.01, "log_ratio_q50": 0.5, "log_ratio_q99": 0.99}


def diagnose(pi: Gaussian, b: Gaussian, action: Tensor, advantage: Tensor) -> Metrics:
    """Compare `pi` with `b` on n samples of `b`, without gradient or host synchronization.

        ess_end             ESS of rho = pi(a|s) / b(a|s) over all n
        ess_end_per_dim     ess_end^(1/act_dim): comparable across tasks, since e falls exponentially in act_dim
        ess_end_advantage   ESS of rho |A|, A centered: `ess_rl.ess.advantage_weighted_ess`
        affinity_end, affinity_eur_end, affinity_uc_end    `affinity`, A centered, with a band of 0.2 sqrt(act_dim)
        behavior_kl_end     mean KL(pi || b) in nats, in closed form
        log_ratio_q01, log_ratio_q50, log_ratio_q99   quantiles of log rho: the smallest value that the fraction 0.01,
                            0.5 or 0.99 of the samples does not exceed

    Args:
        pi: mean [..., act_dim] and log_std at the samples' observations; `b` likewise, as recorded.
        action: [..., act_dim] as sampled.
        advantage: [...], with any scale and offset.

    Returns:
        0-dim tensors with these names.
    """
    log_ratio = (pi.log_prob(action) - b.log_prob(action)).flatten()
    advantage = advantage.flatten()
    advantage = advantage - processes.mean(advantage)
    ess = effective_sample_size(log_ratio)
    in_order = processes.all_samples(log_ratio).sort().values
    count, epsilon = len(in_order), AFFINITY_EPSILON * math.sqrt(action.shape[-1])
    return {
        "ess_end": ess,
        "ess_end_per_dim": ess ** (1.0 / action.shape[-1]),
        "ess_end_advantage": advantage_weighted_ess(log_ratio, advantage),
        **{f"{name}_end": x for name, x in affinity(log_ratio, advantage, epsilon).items()},
        "behavior_kl_end": processes.mean(kl(pi, b)),
        **{name: in_order[math.ceil(q * count) - 1] for name, q in QUANTILES.items()},
    }


def affinity(log_ratio: Tensor, advantage: Tensor, epsilon: float | Tensor) -> Metrics:
    """HINT's Affinity: how much of a batch a clip range would use, and how evenly. No gradient.

        w_i  = |A_i|,   band = { i: 1 - epsilon <= rho_i <= 1 + epsilon }
        EUR  = sum_band w / sum w                                              effective update ratio
        UC   = sqrt( sum_band w (log rho - mu)^2 / sum_band w )                update consistency: a spread, 0 is best
        Affinity = EUR exp(-UC / tau),   tau = log(1 + epsilon) / 2

    with mu the mean of log rho over the band, weighted by w. Affinity is 1 where pi is b, and 0 if no sample with a
    nonzero advantage lies in the band. It is a relative of the ESS with a fixed range: like
    `ess_rl.ess.advantage_weighted_ess` it weights samples by |A|, but it has a constant to set. The log ratios of
    independent action dimensions add up, and their spread grows as sqrt(act_dim): to compare tasks, use
    epsilon sqrt(act_dim), as `diagnose` does. (From epsilon = 1 on, 25 dimensions at 0.2, the band has no lower edge.)

    Source: Wang et al. 2025 (HINT, arXiv 2510.09388), as released.

    Args:
        log_ratio: [n], any shape.
        advantage: same shape (ValueError otherwise); its scale does not matter.

    Returns:
        `affinity`, `affinity_eur`, `affinity_uc`; 0-dim, the same on all processes.
    """
    checks.same_shape(log_ratio=log_ratio, advantage=advantage)
    log_ratio, weight = log_ratio.detach(), advantage.detach().abs()
    band = torch.where((log_ratio.exp() - 1.0).abs() <= epsilon, weight, 0.0)
    inner = torch.where(band > 0.0, log_ratio, 0.0)  # values outside may be infinite
    whole, within, first = processes.all_sum(torch.stack([weight.sum(), band.sum(), (band * inner).sum()])).unbind(0)
    tiny = torch.finfo(weight.dtype).tiny
    eur, mean = within / whole.clamp(min=tiny), first / within.clamp(min=tiny)
    uc = torch.sqrt(processes.all_sum((band * (inner - mean).square()).sum()) / within.clamp(min=tiny))
    tau = 0.5 * (torch.log1p(epsilon) if isinstance(epsilon, Tensor) else math.log1p(epsilon))
    return {"affinity": eur * torch.exp(-uc / tau), "affinity_eur": eur, "affinity_uc": uc}


def share(weight: Tensor, mask: Tensor) -> Tensor:
    """sum |weight| where `mask` (bool, same shape), over sum |weight|: 0-dim in [0, 1], and 0 if all weights are."""
    checks.flags(mask=mask)
    checks.same_shape(weight=weight, mask=mask)
    size = weight.detach().abs()
    part, whole = processes.all_sum(torch.stack([torch.where(mask, size, 0.0).sum(), size.sum()])).unbind(0)
    return part / whole.clamp(min=torch.finfo(size.dtype).tiny)
