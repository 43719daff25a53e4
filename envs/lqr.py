"""LQR: bring masses to rest at the origin, at a quadratic cost. Its values are known in closed form.

n masses of 1 kg slide without friction on n axes, each pushed by its own force: double integrators. Over a control step
of length dt the force u is held fixed, so the state s = (positions, velocities) evolves exactly as

    s_{t+1} = A s_t + B u_t,     A = [[1, dt], [0, 1]],   B = [dt^2 / 2, dt]     on every axis      [m, m/s; N]
    reward  = -(s_t' Q s_t + u_t' R u_t)                  of the state before the step

with Q = diag(position_cost, velocity_cost), R = force_cost. An episode starts with positions ~ U(-1, 1) m and
velocities ~ U(-1, 1) m/s; only the clock ends it, after 200 steps (10 s).

**The oracle.** For a linear policy with Gaussian noise, u = -K s + sigma eps, and a discount gamma (without a clock
and as long as the requested forces stay within the bounds), the value is

    V(s) = -(s' P s + c),     P = Q + K' R K + gamma (A - B K)' P (A - B K),
    c = (tr(R Sigma) + gamma tr(B' P B Sigma)) / (1 - gamma),     Sigma = diag(sigma^2)

and the optimal gain is K = gamma (R + gamma B' P B)^-1 B' P A, without noise, with P the fixed point of both equations.

Source: Bertsekas, "Dynamic Programming and Optimal Control", volume 1, section 3.1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ess_rl import random


@dataclass(frozen=True)
class LQR:
    """State and observation [B, 2 n]: n positions [m], n velocities [m/s]. Actions [B, n]."""

    axes: int = 1  # n
    time_step: float = 0.05  # s
    max_force: float = 5.0  # N, at action 1
    position_cost: float = 1.0  # 1 / m^2
    velocity_cost: float = 0.1  # s^2 / m^2
    force_cost: float = 0.1  # 1 / N^2

    action_bound = 1.0
    max_episode_steps = 200
    terminates = False

    @property
    def state_dim(self) -> int:
        return 2 * self.axes

    @property
    def obs_dim(self) -> int:
        return 2 * self.axes

    @property
    def act_dim(self) -> int:
        return self.axes

    def reset_state(self, seed: Tensor, dtype: torch.dtype) -> Tensor:
        return 2.0 * random.uniform(seed, (self.state_dim,), dtype) - 1.0

    def observe(self, state: Tensor) -> Tensor:
        return state

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        position, velocity = state.split(self.axes, dim=-1)
        force, dt = self.max_force * action, self.time_step
        cost = self.position_cost * position**2 + self.velocity_cost * velocity**2 + self.force_cost * force**2
        reached = torch.cat([position + dt * velocity + 0.5 * dt**2 * force, velocity + dt * force], dim=-1)
        reward = -cost.sum(-1)
        return reached, reward, torch.zeros_like(reward, dtype=torch.bool)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A [2n, 2n], B [2n, n], Q [2n, 2n], R [n, n], in float64."""
        one, dt = torch.eye(self.axes, dtype=torch.float64), self.time_step
        a = torch.cat([torch.cat([one, dt * one], dim=1), torch.cat([0.0 * one, one], dim=1)])
        b = torch.cat([0.5 * dt**2 * one, dt * one])
        return a, b, torch.block_diag(self.position_cost * one, self.velocity_cost * one), self.force_cost * one


def linear_policy_value(task: LQR, gain: Tensor, discount: float, std: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(P [2n, 2n], c []) of V(s) = -(s' P s + c) for the forces u = -gain s + std * eps, in float64.

    gain: [n, 2n], N per m and per m/s. std: [n], N; None means 0. discount: in [0, 1).

    Raises:
        ValueError: the value is infinite, because discount * (largest growth of the state per step)^2 >= 1.
    """
    a, b, q, r = task.matrices()
    gain = gain.double()
    closed = a - b @ gain
    growth = torch.linalg.eigvals(closed).abs().max()
    if discount * growth**2 >= 1.0:
        raise ValueError(f"infinite value: the state grows by {growth:.4f} a step and the discount is {discount}")
    # P = C + discount closed' P closed, as one linear system: vec(closed' P closed) = (closed (x) closed)' vec(P)
    system = torch.eye(closed.numel(), dtype=torch.float64) - discount * torch.kron(closed, closed).mT
    p = torch.linalg.solve(system, (q + gain.mT @ r @ gain).flatten()).view_as(q)
    variance = torch.diag(torch.zeros(task.axes, dtype=torch.float64) if std is None else std.double() ** 2)
    c = torch.trace((r + discount * b.mT @ p @ b) @ variance) / (1.0 - discount)
    return p, c


def optimal(task: LQR, discount: float) -> tuple[Tensor, Tensor]:
    """(gain [n, 2n], P [2n, 2n]) of the best policy u = -gain s, by policy iteration from gain 0, in float64.

    Each round solves for the policy's P and takes the greedy gain; Hewer 1971 shows that this converges quadratically.
    discount: in [0, 1).
    """
    a, b, _, r = task.matrices()
    gain = torch.zeros(task.axes, 2 * task.axes, dtype=torch.float64)
    for _ in range(100):
        p, _ = linear_policy_value(task, gain, discount)
        better = discount * torch.linalg.solve(r + discount * b.mT @ p @ b, b.mT @ p @ a)
        if torch.allclose(better, gain, rtol=1e-12, atol=1e-12):
            break
        gain = better
    return gain, p
