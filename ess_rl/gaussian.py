"""Diagonal Gaussian over actions. The last axis is the action dimension; log densities are in nats, summed over it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


class Gaussian(NamedTuple):
    """N(mean, diag(exp(log_std))^2)."""

    mean: Tensor  # [..., act_dim]
    log_std: Tensor  # [..., act_dim], or any shape that broadcasts against mean

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, [..., act_dim]; `noise` is standard normal, supplied by the caller."""
        return self.mean + torch.exp(self.log_std) * noise

    def log_prob(self, action: Tensor) -> Tensor:
        """log N(action), [...]. ValueError unless the action has as many dimensions as the mean."""
        if action.shape[-1:] != self.mean.shape[-1:]:
            raise ValueError(
                f"actions {list(action.shape)} of a Gaussian of {list(self.mean.shape)}: give [..., act_dim]"
            )
        z = (action - self.mean) * torch.exp(-self.log_std)
        return (-0.5 * z * z - self.log_std - _HALF_LOG_TWO_PI).sum(-1)

    def entropy(self) -> Tensor:
        """sum_i (log_std_i + log(2 pi e) / 2), [...] in nats."""
        return (self.log_std.expand_as(self.mean) + 0.5 + _HALF_LOG_TWO_PI).sum(-1)


def kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) in nats, [...], in closed form.

    sum_i [ log(sigma_q / sigma_p) + (sigma_p^2 + (mu_p - mu_q)^2) / (2 sigma_q^2) - 1/2 ]

    Written in terms of d = log sigma_p - log sigma_q, so that equal distributions give exactly 0. The KL grows as
    1 / sigma_q^2: a behavior policy with a std near zero makes it, and its gradient, arbitrarily large.
    """
    d = p.log_std - q.log_std
    z = (p.mean - q.mean) * torch.exp(-q.log_std)
    return (0.5 * (torch.expm1(2.0 * d) + z * z) - d).sum(-1)
