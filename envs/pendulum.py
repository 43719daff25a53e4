"""Pendulum-v1: swing a rod up with a motor that is too weak to lift it directly, and hold it there.

A uniform rod of mass m and length l, hinged at one end, under gravity g and a motor torque u. With the angle theta
measured from upright, its moment of inertia m l^2 / 3 gives the angular acceleration

    omega' = 3 g / (2 l) sin(theta) + 3 / (m l^2) u                                    [rad/s^2]

One control step of length dt, by the semi-implicit Euler method:

    omega <- clip(omega + omega' dt, -8, 8)                                             [rad/s]
    theta <- theta + omega dt          (with the new omega)                             [rad]

    reward = -(wrap(theta)^2 + 0.1 omega^2 + 0.001 u^2)   of the state before the step, wrap to [-pi, pi)

An episode starts at theta ~ U(-pi, pi), omega ~ U(-1, 1), and only the clock ends it, after 200 steps (10 s).

Source: Gymnasium's Pendulum-v1, whose constants these are; tests/envs/test_torch_envs.py compares the two step by step.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ess_rl import random


@dataclass(frozen=True)
class Pendulum:
    """State [B, 2]: theta [rad, not wrapped], omega [rad/s]. Observation [B, 3]: cos(theta), sin(theta), omega."""

    gravity: float = 10.0  # m/s^2
    mass: float = 1.0  # kg
    length: float = 1.0  # m
    time_step: float = 0.05  # s
    max_torque: float = 2.0  # N m, at action 1
    max_speed: float = 8.0  # rad/s

    state_dim = 2
    obs_dim = 3
    act_dim = 1
    action_bound = 2.0  # Gymnasium's actions are torques
    max_episode_steps = 200
    terminates = False

    def reset_state(self, seed: Tensor, dtype: torch.dtype) -> Tensor:
        theta, omega = (2.0 * random.uniform(seed, (2,), dtype) - 1.0).unbind(-1)
        return torch.stack([math.pi * theta, omega], dim=-1)

    def observe(self, state: Tensor) -> Tensor:
        theta, omega = state.unbind(-1)
        return torch.stack([torch.cos(theta), torch.sin(theta), omega], dim=-1)

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        theta, omega = state.unbind(-1)
        torque = self.max_torque * action.squeeze(-1)  # N m
        wrapped = torch.remainder(theta + math.pi, 2.0 * math.pi) - math.pi
        reward = -(wrapped**2 + 0.1 * omega**2 + 0.001 * torque**2)

        gravity_term = 1.5 * self.gravity / self.length * torch.sin(theta)
        motor_term = 3.0 / (self.mass * self.length**2) * torque
        omega = (omega + (gravity_term + motor_term) * self.time_step).clamp(-self.max_speed, self.max_speed)
        theta = theta + omega * self.time_step
        return torch.stack([theta, omega], dim=-1), reward, torch.zeros_like(reward, dtype=torch.bool)
