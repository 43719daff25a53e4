"""Networks as pure functions: parameters are a tree of tensors, made from a seed; inputs have any leading shape."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ess_rl import random
from ess_rl.contract import Precision, Tree
from ess_rl.gaussian import Gaussian

Activation = Callable[[Tensor], Tensor]  # of the hidden layers


def orthogonal(seed: Tensor, rows: int, columns: int, gain: float) -> Tensor:
    """[rows, columns] matrix with orthonormal rows or columns, whichever are fewer, times `gain` (Saxe et al. 2014)."""
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


def mlp(params: Tree, x: Tensor, activation: Activation = torch.tanh) -> Tensor:
    """Layers with an activation, the last one linear: [..., in] -> [..., out].

    Layers compute in the precision of their weights (`in_precision`).
    """
    for i in range(len(params)):
        layer = params[str(i)]
        weight = layer["weight"]
        if weight.dtype == torch.float8_e4m3fn:
            rounded, scale = _to_fp8(x)
            x = (rounded.float() * scale) @ (weight.float() * layer["scale"]) + layer["bias"]
        else:
            x = _product(x.to(weight.dtype), weight) + layer["bias"]
        if i < len(params) - 1:
            x = activation(x)
    return x


_ROWS_AT_ONCE = 1024


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight, [..., in] x [in, out]; in parts if there are many rows on a GPU."""
    if x.device.type != "cuda" or x.ndim != 2 or x.shape[0] < 4 * _ROWS_AT_ONCE or x.shape[0] % _ROWS_AT_ONCE:
        return x @ weight
    return product_in_parts(x, weight)


def product_in_parts(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight, [n, in] x [in, out], 1024 rows at a time, so that the gradient of the weight is summed in parts too.

    A gradient is one small matrix summed over all rows. With several members, cuBLAS computes each such matrix on only
    a few multiprocessors: for eight members with minibatches of 32,768 this took three quarters of an iteration's time
    (Pendulum-v1 on one H200: 10.0 million env steps/s, and 30.8 in parts; for one member 31.4 and 31.7).
    """
    parts = x.unflatten(0, (-1, _ROWS_AT_ONCE))
    return torch.bmm(parts, weight.expand(parts.shape[0], *weight.shape)).flatten(0, 1)


def in_precision(params: Tree, precision: Precision) -> Tree:
    """Convert network parameters to a lower precision. What `mlp` then computes:

    "bf16", "fp16"  parameters (including log_std), the input of each layer and the sum of each layer have that type;
                    a compiled program may keep more digits where it fuses bias and tanh
    "fp8"           e4m3: the weights and the input of each layer (the normalized observation, the tanh units) are
                    rounded to 4 significant bits, each tensor after scaling its largest magnitude to 448, the largest
                    representable number; products, sums, biases, tanh and log_std stay float32. The scale of an input
                    is taken over all rows given.
    "fp32"          unchanged

    Observations are normalized before, in float32. Source of the format: Micikevicius et al. 2022 (arXiv 2209.05433);
    hardware would multiply in fp8 too, while this reproduces only the rounding.
    """
    if precision == "fp32":
        return params
    if precision not in ("bf16", "fp16", "fp8"):
        raise ValueError(f"precision={precision!r}: choose one of fp32, bf16, fp16, fp8")
    if precision != "fp8":
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        return tree_map(lambda x: x.to(dtype), params)
    if "weight" in params:
        weight, scale = _to_fp8(params["weight"])
        return {**params, "weight": weight, "scale": scale}
    return {name: in_precision(x, precision) if isinstance(x, dict) else x for name, x in params.items()}


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """-> (x / scale in e4m3, 0-dim scale)"""
    scale = x.abs().amax().clamp(min=1e-30) / torch.finfo(torch.float8_e4m3fn).max
    return (x / scale).to(torch.float8_e4m3fn), scale


def policy_init(seed: Tensor, obs_dim: int, act_dim: int, hidden: tuple[int, ...], log_std: float | Tensor) -> Tree:
    """A Gaussian policy: mean from an mlp (last gain 0.01, so it begins near zero), state-independent log_std."""
    return {
        "mean": mlp_init(seed, (obs_dim, *hidden, act_dim), 0.01),
        "log_std": torch.ones(act_dim, device=seed.device) * log_std,
    }


def policy(params: Tree, obs: Tensor, activation: Activation = torch.tanh) -> Gaussian:
    """The policy at normalized observations [..., obs_dim]; mean and log_std are [..., act_dim]."""
    mean = mlp(params["mean"], obs, activation)
    return Gaussian(mean, params["log_std"].expand_as(mean))


def value_init(seed: Tensor, obs_dim: int, hidden: tuple[int, ...]) -> Tree:
    """A state value: an mlp with one output (last gain 1)."""
    return mlp_init(seed, (obs_dim, *hidden, 1), 1.0)


def value(params: Tree, obs: Tensor, activation: Activation = torch.tanh) -> Tensor:
    """V at normalized observations: [..., obs_dim] -> [...]."""
    return mlp(params, obs, activation).squeeze(-1)


def gaussian_init(seed: Tensor, obs_dim: int, act_dim: int, hidden: tuple[int, ...]) -> Tree:
    """A Gaussian whose mean and log_std both depend on the observation: one mlp for both (last gain 0.01)."""
    return mlp_init(seed, (obs_dim, *hidden, 2 * act_dim), 0.01)


def gaussian(params: Tree, obs: Tensor, floor: float | Tensor) -> Gaussian:
    """The Gaussian of `gaussian_init` at normalized observations [..., obs_dim], relu layers; log_std in [floor, 2].

    A log_std at the floor gets no gradient; the mean does.
    """
    mean, log_std = mlp(params, obs, torch.relu).chunk(2, dim=-1)
    floor = floor if isinstance(floor, Tensor) else torch.full_like(log_std, floor)  # on its device: no transfer
    return Gaussian(mean, torch.maximum(log_std.clamp(max=2.0), floor))


def twin_q_init(seed: Tensor, obs_dim: int, act_dim: int, hidden: tuple[int, ...]) -> Tree:
    """Two action-value networks of equal shape with different weights (last gain 1)."""
    sizes = (obs_dim + act_dim, *hidden, 1)
    return {str(i): mlp_init(random.fold_in(seed, i), sizes, 1.0) for i in (1, 2)}


def twin_q(params: Tree, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Q_1 and Q_2, relu layers: normalized observations [..., obs_dim], actions [..., act_dim] -> [...] each."""
    x = torch.cat([obs, action], dim=-1)
    return mlp(params["1"], x, torch.relu).squeeze(-1), mlp(params["2"], x, torch.relu).squeeze(-1)
