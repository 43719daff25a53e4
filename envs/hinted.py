"""Torch environments that start from a hint after all of their group have failed: for training alone."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from envs.grouped import GroupedVectorEnv
from envs.torch_vector import Dynamics
from ess_rl import random
from ess_rl.hints import starts_from_hint


class HintingDynamics(Dynamics, Protocol):
    """A task that pays nothing but success, and knows states from which success is nearer."""

    def hint_state(self, state: Tensor, seed: Tensor) -> Tensor:
        """In place of the first states [B, S] of episodes, drawn by seeds [B] int64: -> [B, S]."""
        ...


class HintedVectorEnv(GroupedVectorEnv):
    """As `GroupedVectorEnv`, in groups of environments that see each other's failures.

    It is the ordinary episodes of a group that begin alike. An episode fails if none of its rewards is above 0. Where
    the last ordinary episodes of a whole group failed, the environment that ends one does it again from `hint_state`,
    drawn by a seed of its own, and goes on with number k + 1 (`ess_rl.hints.starts_from_hint`). So an environment
    depends on its group, and no evaluation may use this.
    """

    dynamics: HintingDynamics

    def __init__(self, env_id: str, dynamics: HintingDynamics, num_envs: int, *where: Any, group: int, **how: Any):
        """`group` divides `num_envs`. All else as there."""
        super().__init__(env_id, dynamics, num_envs, *where, group=group, **how)
        self.hinted = torch.zeros(num_envs, dtype=torch.bool, device=self.device)  # [B] the running episode is
        self._failed = torch.zeros_like(self.hinted)  # the last ordinary episode that ended did
        self._paid = torch.zeros_like(self.hinted)  # the running episode was
        self._own_seed = torch.zeros_like(self._seed)  # that of the environment, where `_seed` is the group's

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
        self._episode += ended & ~hint  # what is done again keeps its number

    def _first_state(self) -> Tensor:
        state = super()._first_state()
        seed = random.fold_in(random.fold_in(self._own_seed, self._episode), 0)
        return torch.where(self.hinted.unsqueeze(-1), self.dynamics.hint_state(state, seed), state)
