"""Torch environments that start from a hint after their whole group has failed: for training only."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from envs.grouped import GroupedVectorEnv
from envs.torch_vector import Dynamics
from ess_rl import random
from ess_rl.hints import starts_from_hint


class HintingDynamics(Dynamics, Protocol):
    """A task that rewards only success, and has states from which success is nearer."""

    def hint_state(self, state: Tensor, seed: Tensor) -> Tensor:
        """Replace the first states [B, S] of episodes by hints drawn from seeds [B] int64. -> [B, S]"""
        ...


class HintedVectorEnv(GroupedVectorEnv):
    """A `GroupedVectorEnv` in which the environments of a group see each other's failures.

    Only the ordinary episodes of a group start in the same state. An episode fails if none of its rewards is above 0.
    If the last ordinary episodes of a whole group failed, an environment that ends its ordinary episode k repeats it
    from `hint_state`, drawn with its own seed, and then continues with episode k + 1
    (`ess_rl.hints.starts_from_hint`). So an environment depends on its group, and no evaluation may use this class.
    """

    dynamics: HintingDynamics

    def __init__(self, env_id: str, dynamics: HintingDynamics, num_envs: int, *where: Any, group: int, **how: Any):
        """`group` divides `num_envs`. The other arguments are those of `TorchVectorEnv`."""
        super().__init__(env_id, dynamics, num_envs, *where, group=group, **how)
        self.hinted = torch.zeros(num_envs, dtype=torch.bool, device=self.device)  # [B] current episode is from a hint
        self._failed = torch.zeros_like(self.hinted)  # the last ordinary episode that ended failed
        self._paid = torch.zeros_like(self.hinted)  # the current episode has been rewarded
        self._own_seed = torch.zeros_like(self._seed)  # the environment's; `_seed` is the group's

    def reset(self, seeds: Tensor) -> Tensor:
        for memory in (self.hinted, self._failed, self._paid):
            memory.zero_()
        self._own_seed.copy_(seeds)
        return super().reset(seeds)

    def _count(self, reward: Tensor, ended: Tensor) -> None:
        self._paid |= reward > 0.0
        self._failed.copy_(torch.where(ended & ~self.hinted, ~self._paid, self._failed))
        hint = starts_from_hint(ended, self.hinted, self._failed, self.group)
        self.hinted.copy_(torch.where(ended, hint, self.hinted))
        self._paid &= ~ended
        self._episode += ended & ~hint  # a repeated episode keeps its number

    def _first_state(self) -> Tensor:
        state = super()._first_state()
        seed = random.fold_in(random.fold_in(self._own_seed, self._episode), 0)
        return torch.where(self.hinted.unsqueeze(-1), self.dynamics.hint_state(state, seed), state)
