"""Torch environments in groups whose episodes begin alike: for training alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from envs.torch_vector import Dynamics, TorchVectorEnv


class GroupedVectorEnv(TorchVectorEnv):
    """As `TorchVectorEnv`, in groups of `group` environments that stand together.

    Episode number k of a whole group begins at `reset_state(fold_in(s, k))`, s being the seed of its first environment.
    Where the clock alone ends episodes, a group begins each of them together.
    """

    def __init__(self, env_id: str, dynamics: Dynamics, num_envs: int, *where: Any, group: int, **how: Any):
        """`group` divides `num_envs`. All else as there."""
        super().__init__(env_id, dynamics, num_envs, *where, **how)
        self.group = group

    def reset(self, seeds: Tensor) -> Tensor:
        return super().reset(seeds.view(-1, self.group)[:, :1].expand(-1, self.group).flatten())
