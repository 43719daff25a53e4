"""Helpers of the adapters: policy units to a simulator's actions, 64-bit seeds to 31 bits, and checks of shapes."""

from typing import Any

import numpy as np
from torch import Tensor

from ess_rl.errors import UsageError


def bounds(name: str, space: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds, float32, of the action space of a task or a data set: a bounded, real-valued Box.

    Raises:
        UsageError: `space`, a gymnasium.spaces.Space, is another one.
    """
    if type(space).__name__ != "Box" or not np.issubdtype(space.dtype, np.floating):
        raise UsageError(
            f"{name} has the action space {space}; the policies of this suite are Gaussian over real-valued Box "
            "actions: choose one with continuous actions"
        )
    with np.errstate(over="ignore"):
        low, high = space.low.astype(np.float32), space.high.astype(np.float32)
        finite = np.isfinite(high - low).all()  # not if the bounds are the largest numbers there are
    if not finite:
        raise UsageError(
            f"{name} has an action space with infinite bounds, {space}; actions in [-1, 1] cannot be scaled to it: "
            "wrap it with gymnasium.wrappers.TransformAction, which takes a finite Box, or choose another"
        )
    return low, high


class BoxAction:
    """Map from [-1, 1]^act_dim, the units of policies, onto the Box of one simulator: clip, then affine."""

    def __init__(self, name: str, space: Any) -> None:
        """Raises as `bounds`."""
        low, high = bounds(name, space)
        self.shape: tuple[int, ...] = space.shape
        self.act_dim = int(np.prod(space.shape))
        self._space = space
        self._half_range = 0.5 * (high - low)
        self._center = 0.5 * (high + low)
        self.range = [(float(a), float(b)) for a, b in zip(low.flatten(), high.flatten(), strict=True)]
        self._is_identity = bool((low == -1.0).all() and (high == 1.0).all())

    def __call__(self, action: Tensor) -> np.ndarray:
        """[B, act_dim] in policy units -> [B, *shape] in the simulator's units and dtype. NaN stays NaN."""
        clipped = np.clip(action.detach().cpu().numpy(), -1.0, 1.0).reshape(-1, *self.shape)
        if self._is_identity:
            return clipped.astype(self._space.dtype, copy=False)
        scaled = (self._center + self._half_range * clipped).astype(self._space.dtype, copy=False)
        return np.clip(scaled, self._space.low, self._space.high)  # rounding may have passed them


def check_shape(what: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `x` has one row per environment: it would be broadcast otherwise, or end the process."""
    if x.shape != shape:
        raise ValueError(f"{what} have the shape {tuple(x.shape)}, {shape[0]} environments need {shape}")


def seeds_31_bits(seeds: Tensor, num_envs: int) -> list[int]:
    """The low 31 bits of int64 seeds [B]: numbers in [0, 2^31), the range that both simulators take."""
    check_shape("seeds", seeds, (num_envs,))
    return [seed & 0x7FFFFFFF for seed in seeds.tolist()]
