"""Diagonal Gaussian over actions. The last axis is the action dimension; log densities are in nats, summed over it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


class Gaussian(NamedTuple):
    """N(mean, diag(exp(log_std))^2)."""

    mean: Tensor  # [..., act_dim]
    log_std: Tensor  # [..., act_dim], or any shape that broadcasts to it, such as [act_dim]

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, [..., act_dim]; `noise` is standard normal, supplied by the caller."""
        return self.mean + torch.exp(self.log_std) * noise

    def log_prob(self, action: Tensor) -> Tensor:
        """log N(action), [...]. Raises as `check`."""
        self.check(action)
        z = (action - self.mean) * torch.exp(-self.log_std)
        return (-0.5 * z * z - self.log_std - _HALF_LOG_TWO_PI).sum(-1)

    def entropy(self) -> Tensor:
        """sum_i (log_std_i + log(2 pi e) / 2), [...] in nats. Raises as `check`."""
        self.check()
        return (self.log_std.expand_as(self.mean) + 0.5 + _HALF_LOG_TWO_PI).sum(-1)

    def check(self, *others: Tensor) -> None:
        """Raises ValueError unless log_std broadcasts to the mean, and `others`, as actions, have its last axis.

        Shapes [n] and [n, 1] would broadcast to [n, n]: each sample would be paired with all others.
        """
        mean, log_std = self.mean.shape, self.log_std.shape
        if len(log_std) > len(mean) or any(x not in (1, m) for x, m in zip(log_std[::-1], mean[::-1], strict=False)):
            raise ValueError(f"log_std {list(log_std)} of a Gaussian of {list(mean)}: give [act_dim], or its shape")
        for other in others:
            if other.shape[-1:] != mean[-1:]:
                raise ValueError(f"actions {list(other.shape)} of a Gaussian of {list(mean)}: give [..., act_dim]")


def kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) in nats, [...], in closed form. Raises as `Gaussian.check`.

    sum_i [ log(sigma_q / sigma_p) + (sigma_p^2 + (mu_p - mu_q)^2) / (2 sigma_q^2) - 1/2 ]

    Written in terms of d = log sigma_p - log sigma_q, so that equal distributions give exactly 0. The KL grows as
    1 / sigma_q^2: a behavior policy with a std near zero makes it, and its gradient, arbitrarily large.
    """
    p.check(q.mean)
    q.check()
    d = p.log_std - q.log_std
    z = (p.mean - q.mean) * torch.exp(-q.log_std)
    return (0.5 * (torch.expm1(2.0 * d) + z * z) - d).sum(-1)
