"""An exact Gaussian process over actions: a model of the behavior policy that is uncertain away from its data.

With a squared-exponential kernel k of one length scale over standardized observations, and standardized actions y,
modeled as a function of the observations plus noise:

    mean(s) = k(s, X) (K + noise^2 I)^-1 y,     variance(s) = 1 - k(s, X) (K + noise^2 I)^-1 k(X, s)

The variance is that of the function only, without the noise: nearly 0 at the data, and 1, that of all actions, far
from them; but an observation counts as at most 10 standard deviations away in each coordinate
(`ess_rl.normalizer.standardize`), which is not far for the largest length scales.

Source: Rasmussen and Williams 2006, Eq. 2.25, 2.26 and 5.8.

Scikit-learn has one too; this one is a few lines, needs no further dependency, and predicts as a pure function of
tensors, so that it can run inside a population. Its cost per state is quadratic in the number of points.

Notation: M points, N states.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ess_rl import normalizer
from ess_rl.contract import Tree

# The values tried, in standard deviations of the observations and of the actions.
LENGTH_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
NOISES = (0.03, 0.1, 0.3)


def init(points: int, obs_dim: int, act_dim: int, device: torch.device) -> Tree:
    """A process without data: mean 0, variance 1 everywhere."""
    return {
        "obs_stats": normalizer.init((obs_dim,), device),
        "action_stats": normalizer.init((act_dim,), device),
        "length_scale": torch.ones((), device=device),
        "points": torch.zeros(points, obs_dim, device=device),
        "weights": torch.zeros(points, act_dim, device=device),  # (K + noise^2 I)^-1 y
        "half": torch.zeros(points, points, device=device),  # L^-1, where L L^T = K + noise^2 I
    }


def fit(obs: Tensor, action: Tensor) -> Tree:
    """Fit a process to raw observations [M, obs_dim] and actions [M, act_dim]; structured as in `init`.

    Length scale and noise are the pair from `LENGTH_SCALES` and `NOISES` with the highest marginal likelihood.
    """
    stats = {"obs": normalizer.of_data(obs), "action": normalizer.of_data(action)}
    x = normalizer.standardize(stats["obs"], obs.double())
    y = normalizer.standardize(stats["action"], action.double())
    best = max(itertools.product(LENGTH_SCALES, NOISES), key=lambda pair: log_marginal_likelihood(x, y, *pair).item())
    half, weights = _solve(x, y, *best)
    return {
        "obs_stats": stats["obs"],
        "action_stats": stats["action"],
        "length_scale": torch.tensor(best[0], device=obs.device),
        "points": x.float(),
        "weights": weights.float(),
        "half": half.float(),
    }


def predict(process: Tree, obs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [N, act_dim] of the action at raw observations [N, obs_dim], without the action noise."""
    stats = process["action_stats"]
    across = kernel(normalizer.standardize(process["obs_stats"], obs), process["points"], process["length_scale"])
    known = (across @ process["half"].mT).square().sum(-1, keepdim=True)
    mean = stats["mean"].float() + torch.sqrt(stats["var"] + 1e-8).float() * (across @ process["weights"])
    return mean, stats["var"].float() * (1.0 - known).clamp(min=0.0)  # rounding may take it below 0


def kernel(one: Tensor, other: Tensor, length_scale: float | Tensor) -> Tensor:
    """exp(-|x - x'|^2 / (2 length_scale^2)) of [N, d] and [M, d]: [N, M]."""
    products = one @ other.mT
    squares = one.square().sum(-1, keepdim=True) + other.square().sum(-1) - 2.0 * products
    return torch.exp(-0.5 * squares.clamp(min=0.0) / length_scale**2)


def log_marginal_likelihood(x: Tensor, y: Tensor, length_scale: float, noise: float) -> Tensor:
    """log p(y | x) in nats, up to a constant, summed over the columns of y; 0-dim."""
    half, weights = _solve(x, y, length_scale, noise)
    return -0.5 * (y * weights).sum() + y.shape[1] * torch.log(half.diagonal()).sum()


def _solve(x: Tensor, y: Tensor, length_scale: float, noise: float) -> tuple[Tensor, Tensor]:
    """-> (L^-1 [M, M], (K + noise^2 I)^-1 y [M, act_dim])"""
    one = torch.eye(len(x), dtype=x.dtype, device=x.device)
    root = torch.linalg.cholesky(kernel(x, x, length_scale) + noise**2 * one)
    half = torch.linalg.solve_triangular(root, one, upper=False)
    return half, half.mT @ (half @ y)
