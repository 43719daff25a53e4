"""CartPole with a continuous force: keep a pole upright on a cart.

A cart of mass M moves without friction on a level track under a horizontal force F. A uniform pole of mass m and
half-length l is hinged to it. With the cart's position x, the angle theta of the pole from upright (positive toward
+x) and gravity g,

    a       = (F + m l theta'^2 sin(theta)) / (M + m)                                               [m/s^2]
    theta'' = (g sin(theta) - a cos(theta)) / (l (4/3 - m cos(theta)^2 / (M + m)))                  [rad/s^2]
    x''     = a - m l theta'' cos(theta) / (M + m)                                                  [m/s^2]

One control step of length dt is one explicit Euler step: all four rates are taken at its start.

    terminated = |x| > 2.4 m or |theta| > 12 degrees,     reward = 1, including the last step

An episode starts with x, x', theta and theta' ~ U(-0.05, 0.05), and the clock ends it after 500 steps (10 s).

Source: Barto, Sutton and Anderson 1983, "Neuronlike adaptive elements that can solve difficult learning control
problems", without their friction; constants and Euler step are those of Gymnasium's CartPole-v1, whose two actions are
-1 and 1 here. tests/envs/test_torch_envs.py compares the two step by step.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ess_rl import random


@dataclass(frozen=True)
class CartAndPole:
    """The equations of motion. State [B, 4]: x [m], x' [m/s], theta [rad], theta' [rad/s]."""

    gravity: float = 9.8  # m/s^2
    cart_mass: float = 1.0  # kg
    pole_mass: float = 0.1  # kg
    half_length: float = 0.5  # m
    time_step: float = 0.02  # s
    max_force: float = 10.0  # N, at action 1
    max_position: float = 2.4  # m, beyond which the task ends

    state_dim = 4
    act_dim = 1
    action_bound = 1.0
    max_episode_steps = 500
    terminates = True

    def rates(self, state: Tensor, force: Tensor) -> Tensor:
        """The time derivative of the state, [B, 4], under a force [B] in N."""
        _, velocity, angle, angular = state.unbind(-1)
        sin, cos, mass = torch.sin(angle), torch.cos(angle), self.cart_mass + self.pole_mass
        pushed = (force + self.pole_mass * self.half_length * angular**2 * sin) / mass
        resistance = self.half_length * (4.0 / 3.0 - self.pole_mass * cos**2 / mass)
        turning = (self.gravity * sin - pushed * cos) / resistance
        acceleration = pushed - self.pole_mass * self.half_length * turning * cos / mass
        return torch.stack([velocity, acceleration, angular, turning], dim=-1)

    def energy(self, state: Tensor) -> Tensor:
        """Kinetic and potential energy [B] in J; 0 at rest with the pole level. `rates` conserves it at force 0."""
        _, velocity, angle, angular = state.unbind(-1)
        along = velocity + self.half_length * angular * torch.cos(angle)  # of the pole's center of mass
        upward = -self.half_length * angular * torch.sin(angle)
        inertia = self.pole_mass * self.half_length**2 / 3.0  # about that center
        kinetic = self.cart_mass * velocity**2 + self.pole_mass * (along**2 + upward**2) + inertia * angular**2
        return 0.5 * kinetic + self.pole_mass * self.gravity * self.half_length * torch.cos(angle)


@dataclass(frozen=True)
class CartPole(CartAndPole):
    """Observation [B, 4]: the state."""

    max_angle: float = 12.0 * math.pi / 180.0  # rad, beyond which the task ends

    obs_dim = 4

    def reset_state(self, seed: Tensor, dtype: torch.dtype) -> Tensor:
        return 0.1 * random.uniform(seed, (4,), dtype) - 0.05

    def observe(self, state: Tensor) -> Tensor:
        return state

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = state + self.time_step * self.rates(state, self.max_force * action.squeeze(-1))
        position, _, angle, _ = state.unbind(-1)
        terminated = (position.abs() > self.max_position) | (angle.abs() > self.max_angle)
        return state, torch.ones_like(position), terminated
