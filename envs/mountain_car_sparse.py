"""MountainCarContinuousSparse: MountainCarContinuous, rewarded only for reaching the goal.

Car, track and episode are those of `envs.mountain_car`. There, an agent that has not found the goal learns to spare its
engine; here it gets no signal until the goal is reached:

    reward = 1 in the step that reaches the goal (terminated), else 0

None of 1,000 episodes of 999 uniformly random actions each reached it: finding the goal takes persistence.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from envs.mountain_car import MountainCarContinuous
from ess_rl import random
from ess_rl.errors import UsageError


@dataclass(frozen=True)
class MountainCarContinuousSparse(MountainCarContinuous):
    """State and observation [B, 2]: position x, velocity v."""

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state, _, terminated = super().step(state, action)
        return state, terminated.to(state.dtype), terminated

    def hint_state(self, state: Tensor, seed: Tensor) -> Tensor:
        """A random state on the path of a car that rocks itself up from rest at -0.5, all steps equally likely."""
        way = _way_up(self, state.dtype, state.device)
        return way[(random.uniform(seed, ()) * len(way)).long()]


@cache
def _way_up(car: MountainCarContinuousSparse, dtype: torch.dtype, device: torch.device) -> Tensor:
    """States [H, 2] up to the goal at full power along the velocity. Cached, so that no step has to recompute them."""
    way, reached = [torch.tensor([[-0.5, 0.0]], dtype=torch.float64)], torch.tensor([False])
    while not reached:
        state, _, reached = car.step(way[-1], torch.where(way[-1][:, 1:] >= 0.0, 1.0, -1.0))
        way.append(state)
        if len(way) > car.max_episode_steps:
            raise UsageError("with these constants full power along the velocity does not reach the goal: no hints")
    return torch.cat(way[:-1]).to(device, dtype)
