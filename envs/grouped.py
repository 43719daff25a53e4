"""Torch environments in groups whose episodes begin alike: for training alone."""

from __future__ import annotations

from typing import Any

import torch
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
        self._own_seed = torch.zeros_like(self._seed)  # that of the environment, where `_seed` is the group's

    def reset(self, seeds: Tensor) -> Tensor:
        self._own_seed.copy_(seeds)
        return super().reset(seeds.view(-1, self.group)[:, :1].expand(-1, self.group).flatten())
