"""Acrobot with a continuous torque: swing the tip of a two-link arm above a line, with a motor only in its elbow.

Two equal links hang in series from a fixed, unactuated shoulder; a motor between them exerts the torque u. theta_1 is
the angle of the upper link from hanging, theta_2 that of the lower link relative to the upper. With masses m1, m2,
length l1, centers of mass at lc1, lc2, moments of inertia I1, I2 about these centers, and gravity g,

    d1 = m1 lc1^2 + m2 (l1^2 + lc2^2 + 2 l1 lc2 cos(theta_2)) + I1 + I2                              [kg m^2]
    d2 = m2 (lc2^2 + l1 lc2 cos(theta_2)) + I2                                                       [kg m^2]
    h  = m2 l1 lc2 sin(theta_2)                                                                      [kg m^2]
    p2 = m2 lc2 g sin(theta_1 + theta_2)                                                             [N m]
    p1 = -h theta_2' (theta_2' + 2 theta_1') + (m1 lc1 + m2 l1) g sin(theta_1) + p2                  [N m]
    theta_2'' = (u + d2 / d1 p1 - h theta_1'^2 - p2) / (m2 lc2^2 + I2 - d2^2 / d1)                   [rad/s^2]
    theta_1'' = -(d2 theta_2'' + p1) / d1                                                            [rad/s^2]

One control step of length dt is one fourth-order Runge-Kutta step, after which the angles are wrapped to [-pi, pi)
and the speeds clipped to 4 pi and 9 pi rad/s.

    terminated = the tip is more than one link above the shoulder: -cos(theta_1) - cos(theta_1 + theta_2) > 1
    reward = -1, and 0 for the step that ends the task

An episode starts with all four state variables ~ U(-0.1, 0.1); the clock ends it after 500 steps (100 s).

Source: Sutton and Barto, "Reinforcement Learning: An Introduction", 2nd edition, section 11.3; constants are those of
Gymnasium's Acrobot-v1, whose three actions are -1, 0 and 1 here. tests/envs/test_torch_envs.py compares the two step
by step.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from envs.integrate import runge_kutta
from ess_rl import random


@dataclass(frozen=True)
class Acrobot:
    """State [B, 4]: theta_1, theta_2 [rad], theta_1', theta_2' [rad/s].

    Observation [B, 6]: cos and sin of theta_1, cos and sin of theta_2, theta_1', theta_2'.
    """

    gravity: float = 9.8  # m/s^2
    length: float = 1.0  # m, of either link
    center: float = 0.5  # m, from a link's upper end to its center of mass
    mass: float = 1.0  # kg, of either link
    inertia: float = 1.0  # kg m^2, of either link about its center of mass
    time_step: float = 0.2  # s
    max_torque: float = 1.0  # N m, at action 1
    max_speed_1: float = 4.0 * math.pi  # rad/s
    max_speed_2: float = 9.0 * math.pi  # rad/s

    state_dim = 4
    obs_dim = 6
    act_dim = 1
    action_bound = 1.0
    max_episode_steps = 500
    terminates = True

    def reset_state(self, seed: Tensor, dtype: torch.dtype) -> Tensor:
        return 0.2 * random.uniform(seed, (4,), dtype) - 0.1

    def observe(self, state: Tensor) -> Tensor:
        first, second, speed_1, speed_2 = state.unbind(-1)
        return torch.stack(
            [torch.cos(first), torch.sin(first), torch.cos(second), torch.sin(second), speed_1, speed_2], dim=-1
        )

    def rates(self, state: Tensor, torque: Tensor) -> Tensor:
        """The time derivative of the state, [B, 4], under a torque [B] in N m."""
        first, second, speed_1, speed_2 = state.unbind(-1)
        coupling = self.mass * self.length * self.center
        own = self.mass * self.center**2 + self.inertia  # of a link about its upper end
        d1 = 2.0 * own + self.mass * self.length**2 + 2.0 * coupling * torch.cos(second)
        d2 = own + coupling * torch.cos(second)
        h = coupling * torch.sin(second)
        p2 = self.mass * self.center * self.gravity * torch.sin(first + second)
        p1 = -h * speed_2 * (speed_2 + 2.0 * speed_1) + p2
        p1 = p1 + self.mass * (self.center + self.length) * self.gravity * torch.sin(first)
        turning_2 = (torque + d2 / d1 * p1 - h * speed_1**2 - p2) / (own - d2**2 / d1)
        turning_1 = -(d2 * turning_2 + p1) / d1
        return torch.stack([speed_1, speed_2, turning_1, turning_2], dim=-1)

    def energy(self, state: Tensor) -> Tensor:
        """Kinetic and potential energy [B] in J; 0 at rest with both links level. `rates` conserves it at torque 0."""
        first, second, speed_1, speed_2 = state.unbind(-1)
        both = speed_1 + speed_2
        own = self.mass * self.center**2 + self.inertia
        kinetic = own * (speed_1**2 + both**2) + self.mass * self.length**2 * speed_1**2
        kinetic = kinetic + 2.0 * self.mass * self.length * self.center * speed_1 * both * torch.cos(second)
        height = -(self.center + self.length) * torch.cos(first) - self.center * torch.cos(first + second)
        return 0.5 * kinetic + self.mass * self.gravity * height

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        torque = self.max_torque * action.squeeze(-1)
        state = runge_kutta(lambda now: self.rates(now, torque), state, self.time_step)
        first, second, speed_1, speed_2 = state.unbind(-1)
        first, second = (torch.remainder(x + math.pi, 2.0 * math.pi) - math.pi for x in (first, second))
        speed_1 = speed_1.clamp(-self.max_speed_1, self.max_speed_1)
        speed_2 = speed_2.clamp(-self.max_speed_2, self.max_speed_2)
        terminated = -torch.cos(first) - torch.cos(first + second) > 1.0
        reward = -1.0 * ~terminated
        return torch.stack([first, second, speed_1, speed_2], dim=-1), reward.to(state.dtype), terminated
