"""Gymnasium's MuJoCo -v5 tasks as tensor functions of simulator data: observation, reward, termination, first state.

Each class is one task, defined by what it reads from `Physics`. Model files, constants and their names are
Gymnasium's (https://gymnasium.farama.org/environments/mujoco, version 5); the constants are fields, hence options. No
simulator is imported here: `mujoco_warp_vector` calls the functions.

Notation: B worlds, nq positions, nv velocities (degrees of freedom), nu actuators, nbody bodies (0 is the world).
SI units throughout: m, rad, s, kg, N, N m; joint coordinates are m or rad, generalized forces N or N m.

Quantities beyond `qpos` and `qvel` are as MuJoCo leaves them after a step: those of the last state in which forces were
evaluated, which precedes the end of the last integration. Gymnasium reads them this way, and rewards depend on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ess_rl import random


class Physics(NamedTuple):
    """Quantities of B worlds that a task may read. Names as in MuJoCo's mjData."""

    qpos: Tensor  # [B, nq] joint positions
    qvel: Tensor  # [B, nv] joint velocities
    xpos: Tensor  # [B, nbody, 3] origins of the bodies' frames, m
    xipos: Tensor  # [B, nbody, 3] their centers of mass, m
    site_xpos: Tensor  # [B, nsite, 3] marked points, m
    cinert: Tensor  # [B, nbody, 10] inertia, first moment and mass about the center of mass of the body's tree
    cvel: Tensor  # [B, nbody, 6] angular, then linear velocity, rad/s and m/s
    qfrc_actuator: Tensor  # [B, nv] generalized forces of the actuators
    qfrc_constraint: Tensor  # [B, nv] generalized forces of contacts and limits
    cfrc_ext: Tensor  # [B, nbody, 6] external torque, then force on each body, N m and N
    body_mass: Tensor  # [nbody] kg, a constant of the model


def _symmetric_uniform(seed: Tensor, count: int, scale: float) -> Tensor:
    """Uniform in [-scale, scale), [B, count]."""
    return scale * (2.0 * random.uniform(seed, (count,)) - 1.0)


@dataclass(frozen=True, kw_only=True)
class MujocoTask:
    """What all tasks have in common; a subclass provides the functions that differ."""

    model_file: ClassVar[str]  # among Gymnasium's assets
    max_episode_steps: ClassVar[int] = 1000  # control steps
    normal_velocity: ClassVar[bool] = False  # noise of the first velocities: normal if True, else uniform
    reads_bodies: ClassVar[bool] = False  # the start of an episode needs xpos, xipos, cinert or cvel

    frame_skip: int = 5  # simulation steps in one control step
    reset_noise_scale: float = 0.1  # uniform in +-scale, or the standard deviation of normal noise
    # Memory for contacts and for constraint rows in each world. The defaults are the most that the model can need: two
    # contacts for each pair of geoms that may touch, one if either is a sphere; four rows for each contact with
    # friction, one for each without, one for each joint with limits.
    max_contacts: int = 0
    max_constraints: int = 1

    def observe(self, now: Physics) -> Tensor:
        """-> [B, obs_dim], a new tensor."""
        raise NotImplementedError

    def position(self, now: Physics) -> Tensor:
        """The coordinate [B] in m whose change over a control step is the forward velocity."""
        return now.qpos[:, 0]

    def reward(self, now: Physics, control: Tensor, velocity: Tensor) -> Tensor:
        """Reward of one control step, -> [B].

        `control` [B, nu] in the units of the actuators; `velocity` [B] in m/s, the mean over the control step.
        """
        raise NotImplementedError

    def terminated(self, now: Physics) -> Tensor:
        """-> [B] bool."""
        return torch.zeros_like(now.qpos[:, 0], dtype=torch.bool)

    def first_state(self, seed: Tensor, qpos0: Tensor, qvel0: Tensor) -> tuple[Tensor, Tensor]:
        """An episode's first (qpos [B, nq], qvel [B, nv]): the model's own plus noise from `seed` [B] int64."""
        qpos = qpos0 + _symmetric_uniform(random.fold_in(seed, 0), len(qpos0), self.reset_noise_scale)
        seed = random.fold_in(seed, 1)
        if self.normal_velocity:
            return qpos, qvel0 + self.reset_noise_scale * random.normal(seed, (len(qvel0),))
        return qpos, qvel0 + _symmetric_uniform(seed, len(qvel0), self.reset_noise_scale)


@dataclass(frozen=True, kw_only=True)
class Runner(MujocoTask):
    """Rewards forward speed: reward = forward_reward_weight * velocity - ctrl_cost_weight * |control|^2.

    Observes qpos, except the first `hidden` coordinates, which give its location, then qvel.
    """

    hidden: ClassVar[int] = 1

    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 0.1
    exclude_current_positions_from_observation: bool = True

    def visible_qpos(self, now: Physics) -> Tensor:
        return now.qpos[:, self.hidden :] if self.exclude_current_positions_from_observation else now.qpos

    def observe(self, now: Physics) -> Tensor:
        return torch.cat([self.visible_qpos(now), now.qvel], dim=-1)

    def reward(self, now: Physics, control: Tensor, velocity: Tensor) -> Tensor:
        return self.forward_reward_weight * velocity - self.ctrl_cost_weight * control.square().sum(dim=-1)


@dataclass(frozen=True, kw_only=True)
class Walker(Runner):
    """A runner that can fall: each step in which it is healthy pays `healthy_reward`, else the episode ends."""

    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True

    def healthy(self, now: Physics) -> Tensor:
        """-> [B] bool. A state that is NaN is not healthy."""
        raise NotImplementedError

    def reward(self, now: Physics, control: Tensor, velocity: Tensor) -> Tensor:
        return super().reward(now, control, velocity) + self.healthy_reward * self.healthy(now)

    def terminated(self, now: Physics) -> Tensor:
        return ~self.healthy(now) & self.terminate_when_unhealthy


def _inside(value: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Strictly between the bounds."""
    return (bounds[0] < value) & (value < bounds[1])


@dataclass(frozen=True, kw_only=True)
class HalfCheetah(Runner):
    model_file = "half_cheetah.xml"
    normal_velocity = True

    max_contacts: int = 16
    max_constraints: int = 70


@dataclass(frozen=True, kw_only=True)
class Swimmer(Runner):
    model_file = "swimmer.xml"
    hidden = 2

    frame_skip: int = 4
    ctrl_cost_weight: float = 1e-4
    max_constraints: int = 2


@dataclass(frozen=True, kw_only=True)
class PlanarWalker(Walker):
    """Healthy while its height (m) and the angle of its torso (rad) lie in their ranges. Velocities are clipped."""

    frame_skip: int = 4
    ctrl_cost_weight: float = 1e-3
    reset_noise_scale: float = 5e-3
    healthy_z_range: tuple[float, float]
    healthy_angle_range: tuple[float, float]

    def observe(self, now: Physics) -> Tensor:
        return torch.cat([self.visible_qpos(now), now.qvel.clamp(-10.0, 10.0)], dim=-1)

    def healthy(self, now: Physics) -> Tensor:
        return _inside(now.qpos[:, 1], self.healthy_z_range) & _inside(now.qpos[:, 2], self.healthy_angle_range)


@dataclass(frozen=True, kw_only=True)
class Hopper(PlanarWalker):
    """Must also keep every coordinate except x and z, and every velocity, in `healthy_state_range`."""

    model_file = "hopper.xml"

    healthy_z_range: tuple[float, float] = (0.7, math.inf)
    healthy_angle_range: tuple[float, float] = (-0.2, 0.2)
    healthy_state_range: tuple[float, float] = (-100.0, 100.0)
    max_contacts: int = 14
    max_constraints: int = 41

    def healthy(self, now: Physics) -> Tensor:
        state = torch.cat([now.qpos[:, 2:], now.qvel], dim=-1)
        return super().healthy(now) & _inside(state, self.healthy_state_range).all(dim=-1)


@dataclass(frozen=True, kw_only=True)
class Walker2d(PlanarWalker):
    model_file = "walker2d_v5.xml"

    healthy_z_range: tuple[float, float] = (0.8, 2.0)
    healthy_angle_range: tuple[float, float] = (-1.0, 1.0)
    max_contacts: int = 14
    max_constraints: int = 62


@dataclass(frozen=True, kw_only=True)
class Ant(Walker):
    """Observes external forces, clipped, and is charged for their squares: contact_cost_weight * sum(cfrc_ext^2)."""

    model_file = "ant.xml"
    hidden = 2
    normal_velocity = True
    reads_bodies = True

    ctrl_cost_weight: float = 0.5
    contact_cost_weight: float = 5e-4
    contact_force_range: tuple[float, float] = (-1.0, 1.0)
    healthy_z_range: tuple[float, float] = (0.2, 1.0)
    include_cfrc_ext_in_observation: bool = True
    max_contacts: int = 25
    max_constraints: int = 108

    def _contact_force(self, now: Physics) -> Tensor:
        return now.cfrc_ext.clamp(*self.contact_force_range).flatten(1)  # [B, nbody * 6]

    def observe(self, now: Physics) -> Tensor:
        force = self._contact_force(now)[:, 6:]  # without that on the world
        seen = [force] if self.include_cfrc_ext_in_observation else []
        return torch.cat([self.visible_qpos(now), now.qvel, *seen], dim=-1)

    def position(self, now: Physics) -> Tensor:
        return now.xpos[:, 1, 0]  # of the torso

    def healthy(self, now: Physics) -> Tensor:
        # Unlike the other tasks' ranges, this one includes its bounds.
        low, high = self.healthy_z_range
        height = now.qpos[:, 2]
        finite = torch.cat([now.qpos, now.qvel], dim=-1).isfinite().all(dim=-1)
        return finite & (low <= height) & (height <= high)

    def reward(self, now: Physics, control: Tensor, velocity: Tensor) -> Tensor:
        cost = self.contact_cost_weight * self._contact_force(now).square().sum(dim=-1)
        return super().reward(now, control, velocity) - cost


@dataclass(frozen=True, kw_only=True)
class Humanoid(Walker):
    """The velocity is that of the center of mass. Also observes inertias, velocities and forces of all bodies.

    contact cost = contact_cost_weight * sum(cfrc_ext^2), clipped to `contact_cost_range`.
    """

    model_file = "humanoid.xml"
    hidden = 2
    reads_bodies = True

    reset_noise_scale: float = 1e-2
    forward_reward_weight: float = 1.25
    healthy_reward: float = 5.0
    healthy_z_range: tuple[float, float] = (1.0, 2.0)
    contact_cost_weight: float = 5e-7
    contact_cost_range: tuple[float, float] = (-math.inf, 10.0)
    max_contacts: int = 190
    max_constraints: int = 294

    def observe(self, now: Physics) -> Tensor:
        of_bodies = [field[:, 1:].flatten(1) for field in (now.cinert, now.cvel)]
        forces = [now.qfrc_actuator[:, 6:], now.cfrc_ext[:, 1:].flatten(1)]  # the first 6 have no actuator
        return torch.cat([self.visible_qpos(now), now.qvel, *of_bodies, *forces], dim=-1)

    def position(self, now: Physics) -> Tensor:
        return now.xipos[:, :, 0] @ now.body_mass / now.body_mass.sum()

    def healthy(self, now: Physics) -> Tensor:
        return _inside(now.qpos[:, 2], self.healthy_z_range)

    def reward(self, now: Physics, control: Tensor, velocity: Tensor) -> Tensor:
        cost = self.contact_cost_weight * now.cfrc_ext.square().sum(dim=(1, 2))
        return super().reward(now, control, velocity) - cost.clamp(*self.contact_cost_range)


@dataclass(frozen=True, kw_only=True)
class InvertedPendulum(MujocoTask):
    """Pays 1 for each step in which the pole is within 0.2 rad of upright; otherwise the episode ends."""

    model_file = "inverted_pendulum.xml"

    frame_skip: int = 2
    reset_noise_scale: float = 0.01
    max_constraints: int = 2

    def observe(self, now: Physics) -> Tensor:
        return torch.cat([now.qpos, now.qvel], dim=-1)

    def reward(self, now: Physics, control: Tensor, velocity: Tensor) -> Tensor:
        return (~self.terminated(now)).to(torch.float32)

    def terminated(self, now: Physics) -> Tensor:
        return ~self.observe(now).isfinite().all(dim=-1) | (now.qpos[:, 1].abs() > 0.2)


@dataclass(frozen=True, kw_only=True)
class InvertedDoublePendulum(MujocoTask):
    """Ends when the tip, at (x, y), is no higher than 1 m; upright it stands at 1.2 m.

    reward = healthy_reward [unless it ends] - 0.01 x^2 - (y - 2)^2 - 0.001 w1^2 - 0.005 w2^2, w in rad/s
    """

    model_file = "inverted_double_pendulum.xml"
    normal_velocity = True

    healthy_reward: float = 10.0

    def observe(self, now: Physics) -> Tensor:
        angle, force = now.qpos[:, 1:], now.qfrc_constraint[:, :1]
        seen = [now.qpos[:, :1], angle.sin(), angle.cos(), now.qvel.clamp(-10.0, 10.0), force.clamp(-10.0, 10.0)]
        return torch.cat(seen, dim=-1)

    def reward(self, now: Physics, control: Tensor, velocity: Tensor) -> Tensor:
        tip, speed = now.site_xpos[:, 0], now.qvel.square()
        distance = 0.01 * tip[:, 0].square() + (tip[:, 2] - 2.0).square()
        alive = self.healthy_reward * ~self.terminated(now)
        return alive - distance - (1e-3 * speed[:, 1] + 5e-3 * speed[:, 2])

    def terminated(self, now: Physics) -> Tensor:
        return now.site_xpos[:, 0, 2] <= 1.0


@dataclass(frozen=True, kw_only=True)
class Reacher(MujocoTask):
    """reward = -reward_dist_weight * |fingertip - target| - reward_control_weight * |control|^2.

    The target is uniform in a disk of radius 0.2 m; the other coordinates start within `reset_noise_scale` of zero,
    their velocities within a twentieth of it. (In Gymnasium the scale is not an option.)
    """

    model_file = "reacher.xml"
    max_episode_steps = 50
    reads_bodies = True

    frame_skip: int = 2
    reward_dist_weight: float = 1.0
    reward_control_weight: float = 1.0
    max_constraints: int = 3

    def _to_target(self, now: Physics) -> Tensor:
        fingertip, target = now.xpos[:, 3], now.xpos[:, 4]
        return fingertip - target  # [B, 3]

    def observe(self, now: Physics) -> Tensor:
        angle = now.qpos[:, :2]
        seen = [angle.cos(), angle.sin(), now.qpos[:, 2:], now.qvel[:, :2], self._to_target(now)[:, :2]]
        return torch.cat(seen, dim=-1)

    def reward(self, now: Physics, control: Tensor, velocity: Tensor) -> Tensor:
        distance = torch.linalg.vector_norm(self._to_target(now), dim=-1)
        return -self.reward_dist_weight * distance - self.reward_control_weight * control.square().sum(dim=-1)

    def first_state(self, seed: Tensor, qpos0: Tensor, qvel0: Tensor) -> tuple[Tensor, Tensor]:
        arm = qpos0[:2] + _symmetric_uniform(random.fold_in(seed, 0), 2, self.reset_noise_scale)
        arm_velocity = qvel0[:2] + _symmetric_uniform(random.fold_in(seed, 1), 2, 0.05 * self.reset_noise_scale)
        radius, turn = random.uniform(random.fold_in(seed, 2), (2,)).unbind(-1)
        angle = 2.0 * math.pi * turn
        target = 0.2 * radius.sqrt().unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], dim=-1)
        return torch.cat([arm, target], dim=-1), torch.cat([arm_velocity, torch.zeros_like(target)], dim=-1)


TASKS: dict[str, type[MujocoTask]] = {
    "Ant-v5": Ant,
    "HalfCheetah-v5": HalfCheetah,
    "Hopper-v5": Hopper,
    "Humanoid-v5": Humanoid,
    "InvertedDoublePendulum-v5": InvertedDoublePendulum,
    "InvertedPendulum-v5": InvertedPendulum,
    "Reacher-v5": Reacher,
    "Swimmer-v5": Swimmer,
    "Walker2d-v5": Walker2d,
}
