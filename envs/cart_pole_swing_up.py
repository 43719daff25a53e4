"""CartPoleSwingUp: swing the pole of CartPole up from hanging, and keep it upright near the middle of the track.

Cart, pole and force are those of `envs.cart_pole`, whose equations of motion hold here too; one control step of length
dt is one fourth-order Runge-Kutta step, because the pole turns fast. With the state after the step,

    reward = (1 + cos(theta)) / 2 * (1 + exp(-x^2)) / 2 * (1 + exp(-(theta' / 5)^2)) / 2            in [0, 1]
    terminated = |x| > 2.4 m

(x in m, theta' in rad/s): being upright counts most, and in full only in the middle and at rest. Leaving the track
costs the rewards that would have followed. An episode starts with the pole hanging, theta ~ pi + U(-0.1, 0.1), and x,
x', theta' ~ U(-0.05, 0.05); the clock ends it after 500 steps (10 s).

Source: the task is a classic without a fixed form; this reward is modeled on dm_control's cartpole swingup
(Tassa et al. 2018, arXiv 1801.00690), a product of the same goals in simpler terms, except that of small forces.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from envs.cart_pole import CartAndPole
from envs.integrate import runge_kutta
from ess_rl import random


@dataclass(frozen=True)
class CartPoleSwingUp(CartAndPole):
    """State [B, 4] of `CartAndPole`, theta not wrapped. Observation [B, 5]: x, x', cos(theta), sin(theta), theta'."""

    obs_dim = 5

    def reset_state(self, seed: Tensor, dtype: torch.dtype) -> Tensor:
        position, velocity, angle, angular = (0.1 * random.uniform(seed, (4,), dtype) - 0.05).unbind(-1)
        return torch.stack([position, velocity, math.pi + 2.0 * angle, angular], dim=-1)

    def observe(self, state: Tensor) -> Tensor:
        position, velocity, angle, angular = state.unbind(-1)
        return torch.stack([position, velocity, torch.cos(angle), torch.sin(angle), angular], dim=-1)

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        force = self.max_force * action.squeeze(-1)
        state = runge_kutta(lambda now: self.rates(now, force), state, self.time_step)
        position, _, angle, angular = state.unbind(-1)
        upright = 0.5 * (1.0 + torch.cos(angle))
        centered = 0.5 * (1.0 + torch.exp(-(position**2)))
        calm = 0.5 * (1.0 + torch.exp(-((angular / 5.0) ** 2)))
        return state, upright * centered * calm, position.abs() > self.max_position
