"""The one record that every data source produces and every update reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """T x B environment steps, with the behavior policy that chose their actions.

    Written for time-major segments [T, B]; any leading shape is allowed ([T, P, N] for a population).
    No field is optional: ratios, log-probabilities and the closed-form KL all come from the two behavior parameters.

    Invariant, tested for every source: next_obs[t] == obs[t + 1] unless the episode ended at t.
    """

    obs: Tensor  # [T, B, obs_dim] raw: never normalized, so old data stay valid when the statistics change
    action: Tensor  # [T, B, act_dim] as sampled, before the environment clips it; units of [-1, 1]
    reward: Tensor  # [T, B] per control step, raw
    terminated: Tensor  # [T, B] bool: the task ended, the value of next_obs is zero
    truncated: Tensor  # [T, B] bool: time ran out, next_obs still has value
    next_obs: Tensor  # [T, B, obs_dim] what the dynamics reached, never the obs after a reset
    behavior_mean: Tensor  # [T, B, act_dim]
    behavior_log_std: Tensor  # [T, B, act_dim]
    # [T, B] int64: number of the iteration that collected the step, from 0. Below 0: collected before this run, the
    # newest rollout being -1; -1 for all steps of a logged data set.
    version: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Transitions:
        """The record with `function` applied to each field."""
        return Transitions(**{f.name: function(getattr(self, f.name)) for f in fields(self)})

    @staticmethod
    def zip(function: Callable[[Tensor, Tensor], Tensor], first: Transitions, second: Transitions) -> Transitions:
        """The record of `function(a, b)` over the fields of two records."""
        return Transitions(**{f.name: function(getattr(first, f.name), getattr(second, f.name)) for f in fields(first)})

    @property
    def last(self) -> Tensor:
        """[T, B] bool: the episode ended here, either way."""
        return self.terminated | self.truncated

    @staticmethod
    def empty(leading: tuple[int, ...], obs_dim: int, act_dim: int, device: torch.device) -> Transitions:
        """Storage for transitions of the given leading shape; float32, flags bool, `version` int64."""

        def room(*trailing: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*leading, *trailing, dtype=dtype, device=device)

        return Transitions(
            obs=room(obs_dim),
            action=room(act_dim),
            reward=room(),
            terminated=room(dtype=torch.bool),
            truncated=room(dtype=torch.bool),
            next_obs=room(obs_dim),
            behavior_mean=room(act_dim),
            behavior_log_std=room(act_dim),
            version=room(dtype=torch.int64),
        )


def flat_samples(rollout: Transitions, **columns: Tensor) -> dict[str, Tensor]:
    """Samples [T * N, ...] of a rollout [T, N]: the actions, the behavior's parameters and `columns` [T, N, ...]."""
    acted = {name: getattr(rollout, name) for name in ("action", "behavior_mean", "behavior_log_std")}
    return {name: x.flatten(0, 1) for name, x in (acted | columns).items()}


# vmap and compiled programs handle the record as they handle a dictionary.
pytree.register_dataclass(Transitions)
