"""B copies of one task as tensor operations: what every torch environment shares.

A task is a small object of pure functions (`Dynamics`), usually one short file of equations. Here are the parts that
no task should repeat: clipping the action, the clock, the reset inside `step`, the seeds.

`step` has no branch on data and no host synchronization, and it updates its state in place, in tensors that keep their
addresses. Hence it runs on any device and inside a CUDA graph.
"""

from typing import Protocol

import torch
from torch import Tensor

from envs.clocks import first_clocks
from envs.spaces import check_shape
from ess_rl import random
from ess_rl.contract import Step


class Dynamics(Protocol):
    """One task as equations. S is the size of its state; every function maps each of the B rows independently."""

    @property
    def state_dim(self) -> int: ...  # S
    @property
    def obs_dim(self) -> int: ...
    @property
    def act_dim(self) -> int: ...
    @property
    def action_bound(self) -> float: ...  # of each action in Gymnasium's version; `step` always takes [-1, 1]
    @property
    def max_episode_steps(self) -> int: ...  # control steps until the clock ends the episode
    @property
    def terminates(self) -> bool: ...  # whether anything but the clock ends an episode

    def reset_state(self, seed: Tensor, dtype: torch.dtype) -> Tensor:
        """The first state of an episode, a function of its seed: [B] int64 -> [B, S] of `dtype`."""
        ...

    def observe(self, state: Tensor) -> Tensor:
        """[B, S] -> [B, obs_dim]."""
        ...

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One control step from [B, S] with actions [B, act_dim] in [-1, 1].

        -> (state [B, S], reward [B], terminated [B] bool)
        """
        ...


class TorchVectorEnv:
    """A `VectorEnv` over `Dynamics`. Episode k of environment i starts at `reset_state(fold_in(seeds[i], k))`."""

    backend = "torch"

    def __init__(
        self,
        env_id: str,
        dynamics: Dynamics,
        num_envs: int,
        device: torch.device | str = "cpu",
        *,
        dtype: torch.dtype = torch.float32,
        max_episode_steps: int | None = None,
        staggered: bool = False,
    ) -> None:
        """`dtype` is that of the state and the equations; outputs are always float32.

        `staggered`: the clocks of the first episodes after a reset are ahead (`envs.clocks.first_clocks`).
        """
        self.env_id = env_id
        self.dynamics = dynamics
        self.num_envs = num_envs
        self.obs_dim = dynamics.obs_dim
        self.act_dim = dynamics.act_dim
        self.action_range = [(-dynamics.action_bound, dynamics.action_bound)] * self.act_dim
        self.device = torch.device(device)
        self.dtype = dtype
        self.max_episode_steps = dynamics.max_episode_steps if max_episode_steps is None else max_episode_steps
        self.staggered = staggered
        self.state = torch.zeros(num_envs, dynamics.state_dim, dtype=dtype, device=self.device)  # [B, S]
        self._seed = torch.zeros(num_envs, dtype=torch.int64, device=self.device)  # [B]
        self._episode = torch.zeros_like(self._seed)  # [B] number of the running episode, from 0
        self._elapsed = torch.zeros_like(self._seed)  # [B] control steps done in it

    def _first_state(self) -> Tensor:
        return self.dynamics.reset_state(random.fold_in(self._seed, self._episode), self.dtype)

    def _observe(self, state: Tensor) -> Tensor:
        # The copy matters if `observe` is the identity: `self.state` changes in place at the next step.
        return self.dynamics.observe(state).to(torch.float32, copy=True)

    def _count(self, reward: Tensor, ended: Tensor) -> None:
        """Advance the episode numbers where an episode has `ended`, [B] bool."""
        self._episode += ended

    @torch.no_grad()
    def reset(self, seeds: Tensor) -> Tensor:
        """Reset all environments from `seeds` [B] int64. -> obs [B, obs_dim]"""
        check_shape("seeds", seeds, (self.num_envs,))
        self._seed.copy_(seeds)
        self._episode.zero_()
        self._elapsed.zero_()
        if self.staggered:
            self._elapsed.copy_(first_clocks(seeds, self.max_episode_steps))
        self.state.copy_(self._first_state())
        return self._observe(self.state)

    @torch.no_grad()
    def step(self, action: Tensor) -> Step:
        """One control step; `action` [B, act_dim] is clipped to [-1, 1]."""
        check_shape("actions", action, (self.num_envs, self.act_dim))
        state, reward, terminated = self.dynamics.step(self.state, action.to(self.dtype).clamp(-1.0, 1.0))
        self._elapsed += 1
        truncated = (self._elapsed >= self.max_episode_steps) & ~terminated
        ended = terminated | truncated
        self._count(reward, ended)
        self._elapsed *= ~ended
        self.state.copy_(torch.where(ended.unsqueeze(-1), self._first_state(), state))
        return Step(
            obs=self._observe(self.state),
            next_obs=self._observe(state),
            reward=reward.to(torch.float32),
            terminated=terminated,
            truncated=truncated,
        )

    def close(self) -> None:
        """Nothing to release."""
