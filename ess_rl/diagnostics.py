"""How far a policy has left the behavior whose data it learned from: logged of every agent, once an iteration."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ess_rl import processes
from ess_rl.contract import Metrics
from ess_rl.ess import advantage_weighted_ess, effective_sample_size
from ess_rl.gaussian import Gaussian, kl

QUANTILES = {"log_ratio_q01": 0.01, "log_ratio_q50": 0.5, "log_ratio_q99": 0.99}


def diagnose(pi: Gaussian, b: Gaussian, action: Tensor, advantage: Tensor) -> Metrics:
    """What `pi` makes of n samples of `b`, no gradient, no host synchronization.

        ess_end             ESS of rho = pi(a|s) / b(a|s) over all n
        ess_end_per_dim     ess_end^(1/act_dim): comparable between tasks, since e falls exponentially in act_dim
        ess_end_advantage   ESS of rho |A|, A centered: `ess_rl.ess.advantage_weighted_ess`
        behavior_kl_end     mean KL(pi || b) in nats, in closed form
        log_ratio_q01, log_ratio_q50, log_ratio_q99   quantiles of log rho: the smallest value that the fraction 0.01,
                            0.5 or 0.99 of the samples does not exceed

    Args:
        pi: mean [..., act_dim] and log_std at the samples' observations; `b` alike, as it was recorded.
        action: [..., act_dim] as it was sampled.
        advantage: [...], of any scale and offset.

    Returns:
        0-dim tensors by these names.
    """
    log_ratio = (pi.log_prob(action) - b.log_prob(action)).flatten()
    advantage = advantage.flatten()
    ess = effective_sample_size(log_ratio)
    in_order = processes.of_all(log_ratio).sort().values
    count = len(in_order)
    return {
        "ess_end": ess,
        "ess_end_per_dim": ess ** (1.0 / action.shape[-1]),
        "ess_end_advantage": advantage_weighted_ess(log_ratio, advantage - processes.mean(advantage)),
        "behavior_kl_end": processes.mean(kl(pi, b)),
        **{name: in_order[math.ceil(q * count) - 1] for name, q in QUANTILES.items()},
    }


def share(weight: Tensor, mask: Tensor) -> Tensor:
    """sum |weight| where `mask`, over sum |weight|: 0-dim in [0, 1], and 0 where all weights are."""
    size = weight.detach().abs()
    part, whole = processes.total(torch.stack([torch.where(mask, size, 0.0).sum(), size.sum()])).unbind(0)
    return part / whole.clamp(min=torch.finfo(size.dtype).tiny)
