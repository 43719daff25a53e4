"""Networks as pure functions: parameters are a tree of tensors, made from a seed; inputs have any leading shape."""

import math

import torch
from torch import Tensor

from ess_rl import random
from ess_rl.contract import Tree
from ess_rl.gaussian import Gaussian


def orthogonal(seed: Tensor, rows: int, columns: int, gain: float) -> Tensor:
    """A [rows, columns] matrix with orthonormal rows or columns (the fewer), times `gain` (Saxe et al. 2014)."""
    flat = random.normal(seed, (max(rows, columns), min(rows, columns)))
    q, r = torch.linalg.qr(flat)
    q = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1)).unsqueeze(-2)  # else not uniform over rotations
    return gain * (q if rows >= columns else q.mT)


def mlp_init(seed: Tensor, sizes: tuple[int, ...], last_gain: float) -> Tree:
    """Layers sizes[0] -> ... -> sizes[-1]: orthogonal weights [in, out], gain sqrt(2) and `last_gain`; zero biases."""
    gains = [math.sqrt(2.0)] * (len(sizes) - 2) + [last_gain]
    return {
        str(i): {
            "weight": orthogonal(random.fold_in(seed, i), sizes[i], sizes[i + 1], gain),
            "bias": torch.zeros(sizes[i + 1], device=seed.device),
        }
        for i, gain in enumerate(gains)
    }


def mlp(params: Tree, x: Tensor) -> Tensor:
    """tanh layers, the last one linear: [..., in] -> [..., out]."""
    for i in range(len(params)):
        layer = params[str(i)]
        x = x @ layer["weight"] + layer["bias"]
        if i < len(params) - 1:
            x = torch.tanh(x)
    return x


def policy_init(seed: Tensor, obs_dim: int, act_dim: int, hidden: tuple[int, ...], log_std: float | Tensor) -> Tree:
    """A Gaussian policy: mean from an mlp (last gain 0.01, so it begins near zero), log_std free of the state."""
    return {
        "mean": mlp_init(seed, (obs_dim, *hidden, act_dim), 0.01),
        "log_std": torch.ones(act_dim, device=seed.device) * log_std,
    }


def policy(params: Tree, obs: Tensor) -> Gaussian:
    """The policy at normalized observations [..., obs_dim]; mean and log_std are [..., act_dim]."""
    mean = mlp(params["mean"], obs)
    return Gaussian(mean, params["log_std"].expand_as(mean))


def value_init(seed: Tensor, obs_dim: int, hidden: tuple[int, ...]) -> Tree:
    """A state value: an mlp to one number (last gain 1)."""
    return mlp_init(seed, (obs_dim, *hidden, 1), 1.0)


def value(params: Tree, obs: Tensor) -> Tensor:
    """V at normalized observations: [..., obs_dim] -> [...]."""
    return mlp(params, obs).squeeze(-1)
