"""This suite's own tasks for users of Gymnasium: importing this module registers them all.

import envs.gymnasium_export

env = gymnasium.make("ess/CartPoleSwingUp-v0")
envs = gymnasium.make_vec("ess/CartPoleSwingUp-v0", num_envs=4096)      # batched torch inside, arrays outside

`gymnasium.make("envs.gymnasium_export:ess/CartPoleSwingUp-v0")` needs no import. With the same seed an environment
has the same episodes here and in `envs.make`, including the second and later ones.
"""

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

import envs
from ess_rl import random
from ess_rl.errors import UsageError


def _spaces(obs_dim: int, act_dim: int) -> tuple[Box, Box]:
    """Spaces of observations (unbounded) and actions ([-1, 1]), both float32."""
    return Box(-np.inf, np.inf, (obs_dim,), np.float32), Box(-1.0, 1.0, (act_dim,), np.float32)


class NoPictureError(UsageError, TypeError):
    """A render mode was requested. Stable-Baselines3 tries one first, and a TypeError tells it that there is none."""


class TorchTask(gymnasium.Env):
    """One copy of a task. Gymnasium's TimeLimit keeps its clock; there is no rendering."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own form)

    def __init__(self, env_id: str, render_mode: str | None = None, **options: Any) -> None:
        """`options`: the constants of the equations, as `envs.make` takes them."""
        if render_mode is not None:
            raise NoPictureError("its equations have no picture")
        self._dynamics = envs.make_torch(env_id, 1, **options).dynamics
        self.observation_space, self.action_space = _spaces(self._dynamics.obs_dim, self._dynamics.act_dim)
        self._seed: int | None = None
        self._episode = 0
        self._state = torch.empty(1, self._dynamics.state_dim)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """`seed` starts a new series of episodes; None starts the next episode of the series. `options` are ignored."""
        super().reset(seed=seed)
        if seed is None and self._seed is None:
            seed = int(self.np_random.integers(2**31))
        if seed is None:
            self._episode += 1
        else:
            self._seed, self._episode = seed, 0
        series = torch.tensor([self._seed])
        self._state = self._dynamics.reset_state(random.fold_in(series, self._episode), torch.float32)
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        clipped = torch.as_tensor(action, dtype=torch.float32).view(1, -1).clamp(-1.0, 1.0)
        self._state, reward, terminated = self._dynamics.step(self._state, clipped)
        return self._observe(), float(reward), bool(terminated), False, {}

    def _observe(self) -> np.ndarray:
        return self._dynamics.observe(self._state)[0].numpy(force=True).copy()


class TorchTasks(VectorEnv):
    """B copies as one batch of tensor operations. An episode that ends is reset in the same step (SAME_STEP)."""

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, env_id: str, num_envs: int, **options: Any) -> None:
        """`options`: `device`, `max_episode_steps`, and the constants of the equations."""
        self._env = envs.make_torch(env_id, num_envs, **options)
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = _spaces(self._env.obs_dim, self._env.act_dim)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """`seed`: one for each environment, or the first of consecutive seeds; None: a random first one."""
        super().reset(seed=seed if isinstance(seed, int) else None)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else list(seed)
        return self._env.reset(torch.tensor(seeds, device=self._env.device)).numpy(force=True), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """`info["final_obs"]` [B], where `info["_final_obs"]` is set, is what the dynamics reached before the reset."""
        step = self._env.step(torch.as_tensor(actions, dtype=torch.float32, device=self._env.device))
        obs, reached, reward, terminated, truncated = (x.numpy(force=True) for x in step)
        ended = terminated | truncated
        info: dict[str, Any] = {}
        if ended.any():
            final = np.full(self.num_envs, None, dtype=object)
            for i in np.flatnonzero(ended):
                final[i] = reached[i]
            info = {"final_obs": final, "_final_obs": ended}
        return obs, reward, terminated, truncated, info


def _register() -> None:
    for env_id in envs.ENVS:
        if env_id.startswith("ess/") and env_id not in gymnasium.registry:
            gymnasium.register(
                env_id,
                entry_point=f"{__name__}:TorchTask",
                vector_entry_point=f"{__name__}:TorchTasks",
                max_episode_steps=envs.make_torch(env_id, 1).max_episode_steps,
                kwargs={"env_id": env_id},
            )


_register()
