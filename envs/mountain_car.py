"""MountainCarContinuous-v0: a car in a valley, its engine too weak for the hill, has to rock itself up.

The track has the height sin(3 x), so gravity pulls by -cos(3 x). Position x and velocity v have no SI units: the
source measures positions in its own unit of length, and time in control steps. One step with the action a in [-1, 1]:

    v <- clip(v + 0.0015 a - 0.0025 cos(3 x), -0.07, 0.07)                              [length/step]
    x <- clip(x + v, -1.2, 0.6)          (with the new v)                               [length]
    v <- 0 if the car hit the left wall: x = -1.2 and v < 0

    terminated = x >= 0.45 and v >= 0
    reward = 100 terminated - 0.1 a^2

An episode starts at x ~ U(-0.6, -0.4), v = 0; the clock ends it after 999 steps.

Source: Gymnasium's MountainCarContinuous-v0, after A. W. Moore's thesis, "Efficient Memory-based Learning for Robot
Control" (1990); the constants are Gymnasium's, and tests/envs/test_torch_envs.py compares the two step by step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ess_rl import random


@dataclass(frozen=True)
class MountainCarContinuous:
    """State and observation [B, 2]: position x, velocity v."""

    power: float = 0.0015  # length/step^2, at action 1
    gravity: float = 0.0025  # length/step^2
    min_position: float = -1.2
    max_position: float = 0.6
    max_speed: float = 0.07
    goal_position: float = 0.45
    goal_velocity: float = 0.0

    state_dim = 2
    obs_dim = 2
    act_dim = 1
    action_bound = 1.0
    max_episode_steps = 999
    terminates = True

    def reset_state(self, seed: Tensor, dtype: torch.dtype) -> Tensor:
        position = -0.6 + 0.2 * random.uniform(seed, (), dtype)
        return torch.stack([position, torch.zeros_like(position)], dim=-1)

    def observe(self, state: Tensor) -> Tensor:
        return state

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        position, velocity = state.unbind(-1)
        force = action.squeeze(-1)
        velocity = velocity + (self.power * force - self.gravity * torch.cos(3.0 * position))
        velocity = velocity.clamp(-self.max_speed, self.max_speed)
        position = (position + velocity).clamp(self.min_position, self.max_position)
        hit_wall = (position <= self.min_position) & (velocity < 0.0)
        velocity = torch.where(hit_wall, 0.0, velocity)

        terminated = (position >= self.goal_position) & (velocity >= self.goal_velocity)
        reward = 100.0 * terminated - 0.1 * force**2
        return torch.stack([position, velocity], dim=-1), reward, terminated
