"""TwoLinkArm: bring the tip of a planar arm to a point, with a motor in the shoulder and one in the elbow.

Two uniform links of length l and mass m lie in a horizontal plane, where gravity does no work. q_1 is the angle of the
upper link, q_2 that of the lower link relative to it; the joints resist with a torque of b q'. With I = m l^2 / 3, the
moment of inertia of a link about its end, and c = m l^2 / 2,

    M11 = 2 I + m l^2 + 2 c cos(q_2),    M12 = I + c cos(q_2),    M22 = I                             [kg m^2]
    f_1 = u_1 - b q_1' + c sin(q_2) q_2' (2 q_1' + q_2')                                              [N m]
    f_2 = u_2 - b q_2' - c sin(q_2) q_1'^2                                                            [N m]
    (q_1'', q_2'') = M^-1 (f_1, f_2)                                                                  [rad/s^2]

One control step of length dt is one fourth-order Runge-Kutta step. With the tip after the step,

    reward = -|tip - target| - 0.05 (a_1^2 + a_2^2)               (distance in m, actions a in [-1, 1])

An episode starts at rest with q_1, q_2 ~ U(-pi, pi) and a target uniform on a disk whose radius is 0.9 of the
arm's reach. Only the clock ends it, after 100 steps (5 s).

Source: the equations of a planar arm are textbook, e.g. Murray, Li and Sastry 1994, "A Mathematical Introduction to
Robotic Manipulation", section 4.2.3; the task is modeled on Gymnasium's Reacher.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from envs.integrate import runge_kutta
from ess_rl import random


@dataclass(frozen=True)
class TwoLinkArm:
    """State [B, 6]: q_1, q_2 [rad], q_1', q_2' [rad/s], target x, y [m].

    Observation [B, 10]: cos and sin of q_1, cos and sin of q_2, q_1', q_2', target x, y, target - tip x, y.
    """

    length: float = 0.5  # m, of either link
    mass: float = 1.0  # kg, of either link
    damping: float = 0.1  # N m s, of either joint
    time_step: float = 0.05  # s
    max_torque: float = 1.0  # N m, of either motor at action 1

    state_dim = 6
    obs_dim = 10
    act_dim = 2
    action_bound = 1.0
    max_episode_steps = 100
    terminates = False

    def reset_state(self, seed: Tensor, dtype: torch.dtype) -> Tensor:
        first, second, area, direction = random.uniform(seed, (4,), dtype).unbind(-1)
        radius, still = 0.9 * 2.0 * self.length * torch.sqrt(area), torch.zeros_like(first)
        target = (radius * torch.cos(2.0 * math.pi * direction), radius * torch.sin(2.0 * math.pi * direction))
        angles = (math.pi * (2.0 * first - 1.0), math.pi * (2.0 * second - 1.0))
        return torch.stack([*angles, still, still, *target], dim=-1)

    def tip(self, state: Tensor) -> Tensor:
        """Position of the tip, [B, 2] in m, with the shoulder at the origin."""
        first, both = state[..., 0], state[..., 0] + state[..., 1]
        x = torch.cos(first) + torch.cos(both)
        y = torch.sin(first) + torch.sin(both)
        return self.length * torch.stack([x, y], dim=-1)

    def observe(self, state: Tensor) -> Tensor:
        angles, speeds, target = state.split(2, dim=-1)
        turned = torch.stack([torch.cos(angles), torch.sin(angles)], dim=-1).flatten(-2)
        return torch.cat([turned, speeds, target, target - self.tip(state)], dim=-1)

    def rates(self, state: Tensor, torque: Tensor) -> Tensor:
        """The time derivative of the state, [B, 6], under torques [B, 2] in N m."""
        _, second, speed_1, speed_2, _, _ = state.unbind(-1)
        inertia, coupling = self.mass * self.length**2 / 3.0, self.mass * self.length**2 / 2.0
        m11 = 2.0 * inertia + self.mass * self.length**2 + 2.0 * coupling * torch.cos(second)
        m12 = inertia + coupling * torch.cos(second)
        bend = coupling * torch.sin(second)
        f1 = torque[..., 0] - self.damping * speed_1 + bend * speed_2 * (2.0 * speed_1 + speed_2)
        f2 = torque[..., 1] - self.damping * speed_2 - bend * speed_1**2
        determinant = m11 * inertia - m12**2
        turning_1 = (inertia * f1 - m12 * f2) / determinant
        turning_2 = (m11 * f2 - m12 * f1) / determinant
        still = torch.zeros_like(second)
        return torch.stack([speed_1, speed_2, turning_1, turning_2, still, still], dim=-1)

    def energy(self, state: Tensor) -> Tensor:
        """Kinetic energy [B] in J. `rates` conserves it without torque and damping."""
        second, speed_1, speed_2 = state[..., 1], state[..., 2], state[..., 3]
        inertia, coupling = self.mass * self.length**2 / 3.0, self.mass * self.length**2 / 2.0
        both = speed_1 + speed_2
        kinetic = (inertia + self.mass * self.length**2) * speed_1**2 + inertia * both**2
        return 0.5 * kinetic + coupling * speed_1 * both * torch.cos(second)

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        torque = self.max_torque * action
        state = runge_kutta(lambda now: self.rates(now, torque), state, self.time_step)
        distance = torch.linalg.vector_norm(state[..., 4:] - self.tip(state), dim=-1)
        reward = -distance - 0.05 * action.square().sum(-1)
        return state, reward, torch.zeros_like(reward, dtype=torch.bool)
