"""TwoLinkArmSparse: TwoLinkArm, rewarded only for touching the target.

Arm, target and clock are those of `envs.two_link_arm`. Only the observation tells the distance:

    reward = 1 in the step after which the tip is within 0.02 m of the target (terminated), else 0

Of 2,000 episodes of 100 uniformly random actions each, 49 touched it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from envs.two_link_arm import TwoLinkArm
from ess_rl import random


@dataclass(frozen=True)
class TwoLinkArmSparse(TwoLinkArm):
    """State [B, 6] and observation [B, 10] of `TwoLinkArm`."""

    tolerance: float = 0.02  # m

    terminates = True

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state, _, _ = super().step(state, action)
        touches = torch.linalg.vector_norm(state[..., 4:] - self.tip(state), dim=-1) < self.tolerance
        return state, touches.to(state.dtype), touches

    def hint_state(self, state: Tensor, seed: Tensor) -> Tensor:
        """At rest near the same target: joint angles that reach it, elbow to either side, each off by up to 0.3 rad.

        Two links of length l reach the distance r with cos(q_2) = r^2 / (2 l^2) - 1; q_1 turns the tip to the target.
        """
        side, *off = random.uniform(seed, (3,), state.dtype).unbind(-1)
        x, y = state[..., 4], state[..., 5]
        bend = torch.acos(((x**2 + y**2) / (2.0 * self.length**2) - 1.0).clamp(-1.0, 1.0))
        second = torch.where(side < 0.5, bend, -bend)
        first = torch.atan2(y, x) - 0.5 * second  # links of equal length: the tip lies half the elbow's angle further
        angles = [angle + 0.3 * (2.0 * u - 1.0) for angle, u in zip((first, second), off, strict=True)]
        first = torch.remainder(angles[0] + math.pi, 2.0 * math.pi) - math.pi
        return torch.stack([first, angles[1], *torch.zeros_like(state[..., 2:4]).unbind(-1), x, y], dim=-1)
