"""MountainCarContinuousSparse: MountainCarContinuous, paid for nothing but the goal.

Car, track and episode are those of `envs.mountain_car`. There, an agent that has not found the goal learns to save its
engine; here nothing tells it anything until the goal is reached:

    reward = 1 in the step that reaches the goal (terminated), else 0

Of 1,000 episodes of 999 uniformly random actions each none reached it: whatever finds the goal has to persist.
"""

from dataclasses import dataclass

from torch import Tensor

from envs.mountain_car import MountainCarContinuous


@dataclass(frozen=True)
class MountainCarContinuousSparse(MountainCarContinuous):
    """State and observation [B, 2]: position x, velocity v."""

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state, _, terminated = super().step(state, action)
        return state, terminated.to(state.dtype), terminated
