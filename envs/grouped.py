"""Torch environments in groups whose episodes start in the same state: for training only."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from envs.torch_vector import Dynamics, TorchVectorEnv


class GroupedVectorEnv(TorchVectorEnv):
    """A `TorchVectorEnv` in groups of `group` adjacent environments.

    Episode k of a whole group starts at `reset_state(fold_in(s, k))`, where s is the seed of its first environment.
    If only the clock ends episodes, the environments of a group start each of them together.
    """

    def __init__(self, env_id: str, dynamics: Dynamics, num_envs: int, *where: Any, group: int, **how: Any):
        """`group` divides `num_envs`. The other arguments are those of `TorchVectorEnv`."""
        super().__init__(env_id, dynamics, num_envs, *where, **how)
        self.group = group

    def reset(self, seeds: Tensor) -> Tensor:
        return super().reset(seeds.view(-1, self.group)[:, :1].expand(-1, self.group).flatten())
