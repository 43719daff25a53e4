"""Helpers of the adapters: policy units to a simulator's actions, 64-bit seeds to 31 bits, and checks of shapes."""

from typing import Any

import numpy as np
from torch import Tensor

from ess_rl.errors import UsageError


class BoxAction:
    """Map from [-1, 1]^act_dim, the units of policies, onto the Box of one simulator: clip, then affine."""

    def __init__(self, env_id: str, space: Any) -> None:
        """`space` is a gymnasium.spaces.Space; anything but a bounded, real-valued Box is refused."""
        if type(space).__name__ != "Box" or not np.issubdtype(space.dtype, np.floating):
            raise UsageError(
                f"{env_id} has the action space {space}; the policies of this suite are Gaussian over real-valued Box "
                "actions: choose a task with continuous actions"
            )
        if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
            raise UsageError(
                f"{env_id} has an action space with infinite bounds, {space}; actions in [-1, 1] cannot be scaled to "
                "it: wrap it with gymnasium.wrappers.RescaleAction or choose another task"
            )
        self.shape: tuple[int, ...] = space.shape
        self.act_dim = int(np.prod(space.shape))
        low, high = space.low.astype(np.float32), space.high.astype(np.float32)
        self._dtype = space.dtype
        self._half_range = 0.5 * (high - low)
        self._center = 0.5 * (high + low)
        self.range = [(float(a), float(b)) for a, b in zip(low.flatten(), high.flatten(), strict=True)]
        self._is_identity = bool((low == -1.0).all() and (high == 1.0).all())

    def __call__(self, action: Tensor) -> np.ndarray:
        """[B, act_dim] in policy units -> [B, *shape] in the simulator's units and dtype. NaN stays NaN."""
        clipped = np.clip(action.detach().cpu().numpy(), -1.0, 1.0).reshape(-1, *self.shape)
        if not self._is_identity:
            clipped = self._center + self._half_range * clipped
        return clipped.astype(self._dtype, copy=False)


def check_shape(what: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `x` has one row per environment: it would be broadcast otherwise, or end the process."""
    if x.shape != shape:
        raise ValueError(f"{what} have the shape {tuple(x.shape)}, {shape[0]} environments need {shape}")


def seeds_31_bits(seeds: Tensor, num_envs: int) -> list[int]:
    """The low 31 bits of int64 seeds [B]: numbers in [0, 2^31), the range that both simulators take."""
    check_shape("seeds", seeds, (num_envs,))
    return [seed & 0x7FFFFFFF for seed in seeds.tolist()]
