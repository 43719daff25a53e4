"""Random numbers as pure functions of a seed: no generator, hence no hidden state.

A draw is a hash of (seed, index). So every member of a population draws the same numbers whatever its neighbors are
and on any device, and a resumed run needs only its seeds and its iteration number. The hash is the finalizer of
SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"); the generator itself is
`hash(seed + index * gamma)`.

Seeds are int64 tensors of any shape [...]; a draw of `shape` gives [..., *shape].
"""

import math

import torch
from torch import Tensor

# Purposes of a member's random numbers: the first number that its seed is folded with. An agent's `init` folds its own
# numbers, from 0, into the same seed, so its draws for layer i are the bits of iteration i's noise, reshaped. That is
# harmless, and a separate purpose would change all published runs.
ENVS, ACTIONS, ORDER, EVALUATION, MINIBATCH, NOISE, DEMONSTRATIONS, REPLAYED = range(8)

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15, the odd number nearest 2^64 / golden ratio
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift of 64 bits (torch's >> keeps the sign)."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * _MIX_1
    bits = (bits ^ _shift_right(bits, 27)) * _MIX_2
    return bits ^ _shift_right(bits, 31)


def fold_in(seed: Tensor, number: int | Tensor) -> Tensor:
    """New seeds [...], one for each pair (seed, number): streams for purposes, iterations, environments."""
    if isinstance(number, int):
        number = torch.full((), number, dtype=torch.int64, device=seed.device)  # filled on the device: no transfer
    index = number.to(seed.device, torch.int64) + 1
    return _mix(_mix(seed + _GAMMA) + index * _GAMMA)


def bits(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform int64 over all 64 bits, [..., *shape]."""
    count = math.prod(shape)
    index = torch.arange(1, count + 1, device=seed.device)
    return _mix(seed.unsqueeze(-1) + index * _GAMMA).reshape(*seed.shape, *shape)


def uniform(seed: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform in [0, 1), [..., *shape], with 24 random bits for float32 and 53 for float64."""
    digits = 53 if dtype == torch.float64 else 24
    return _shift_right(bits(seed, shape), 64 - digits).to(dtype) * 2.0**-digits


def normal(seed: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal, [..., *shape], by the Box-Muller transform: each pair of uniforms gives two."""
    count = math.prod(shape)
    first, second = uniform(seed, (2, (count + 1) // 2), dtype).unbind(-2)
    radius = torch.sqrt(-2.0 * torch.log1p(-first))  # 1 - first lies in (0, 1], so the log is finite
    angle = 2.0 * math.pi * second
    pairs = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs[..., :count].reshape(*seed.shape, *shape)


def poisson(seed: Tensor, mean: Tensor) -> Tensor:
    """Poisson counts of the given mean [...], int64: how many of the products u_1, u_1 u_2, ... exceed exp(-mean).

    Source: Knuth, The Art of Computer Programming 2, Section 3.4.1. For means up to 20: counts stop at 100, which
    counts with a mean of 20 exceed with probability below 1e-30.
    """
    products = torch.cumprod(uniform(seed, (100,), torch.float64), dim=-1)
    return (products > torch.exp(-mean.double()).unsqueeze(-1)).sum(-1)


def categorical(seed: Tensor, weight: Tensor, count: int) -> Tensor:
    """`count` independent draws of an index into the last axis of `weight` [..., n] >= 0: [..., count] int64.

    Probabilities are proportional to the weights; an index of weight 0 is never drawn.
    """
    bounds = torch.cumsum(weight.double(), dim=-1)
    points = uniform(seed, (count,)).double() * bounds[..., -1:]  # of 24 bits: never rounded up to the last bound
    return torch.searchsorted(bounds, points, right=True)


def permutation(seed: Tensor, count: int) -> Tensor:
    """A random order of 0 .. count - 1, [..., count]."""
    return torch.argsort(bits(seed, (count,)), dim=-1)


def weighted_permutation(seed: Tensor, weight: Tensor) -> Tensor:
    """A random order of the last axis of `weight` [..., n], as if drawn one by one without replacement, each time with
    probability proportional to the remaining weights. Entries of weight 0 come last.

    Source: Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir": ascending -log(u) / weight.
    """
    arrival = -torch.log1p(-uniform(seed, (weight.shape[-1],), torch.float64)) / weight
    return torch.argsort(arrival, dim=-1)
