"""Any continuous Gymnasium task, copies stepped in turn in this process: the reference, and the backend for video."""

import importlib
import os
import sys
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import FlattenObservation
from torch import Tensor

from envs.spaces import BoxAction, check_shape, seeds_31_bits
from ess_rl.contract import Step
from ess_rl.errors import UsageError


def _make_single(env_id: str, options: dict[str, Any]) -> gymnasium.Env:
    """Make one task with a flat Box observation; each failure is reported in one line."""
    try:
        # The checker costs time at each step, and the conformance tests of this project check more than it does.
        env = gymnasium.make(env_id, disable_env_checker=True, **options)
    except Exception as error:  # a missing package, an unknown option, a broken library: each fails in its own way
        raise UsageError(f"Gymnasium cannot make {env_id}: {' '.join(str(error).split())}") from error
    BoxAction(env_id, env.action_space)  # refuse a space that no policy can act in before the rest is built
    try:
        # Flattening also copies, so an observation that a task reuses as a buffer is safe from its next reset.
        return FlattenObservation(env)
    except (NotImplementedError, TypeError, ValueError, AssertionError) as error:
        raise UsageError(
            f"{env_id} has the observation space {env.observation_space}, which cannot be flattened to a vector: "
            "wrap it so that it can, or choose another task"
        ) from error


class GymnasiumVectorEnv:
    """A `VectorEnv` over `gymnasium.vector.SyncVectorEnv`. Returned tensors are on the CPU.

    `reset(seeds)` seeds each copy separately; later episodes continue the copy's own random stream.
    """

    backend = "gymnasium"

    def __init__(self, env_id: str, num_envs: int, **options: Any) -> None:
        """`options` go to `gymnasium.make`."""
        self.env_id = env_id
        self.num_envs = num_envs
        self.device = torch.device("cpu")
        self._envs = SyncVectorEnv(
            [lambda: _make_single(env_id, options)] * num_envs,
            copy=False,  # the conversion to float32 copies already
            autoreset_mode=AutoresetMode.SAME_STEP,
        )
        obs_space = self._envs.single_observation_space
        if not isinstance(obs_space, gymnasium.spaces.Box):
            raise UsageError(f"{env_id} has the observation space {obs_space}, which cannot be flattened to a vector")
        self._to_simulator = BoxAction(env_id, self._envs.single_action_space)
        self.act_dim, self.action_range = self._to_simulator.act_dim, self._to_simulator.range
        self.obs_dim = int(np.prod(obs_space.shape))
        spec = self._envs.envs[0].spec
        self.max_episode_steps: int | None = None if spec is None else spec.max_episode_steps

    def reset(self, seeds: Tensor) -> Tensor:
        """Reset all environments from the low 31 bits of `seeds` [B]. -> obs [B, obs_dim]"""
        obs, _ = self._envs.reset(seed=list(seeds_31_bits(seeds, self.num_envs)))
        return torch.from_numpy(obs.astype(np.float32))

    def step(self, action: Tensor) -> Step:
        """One control step. If no episode ended, `obs` and `next_obs` are one tensor."""
        check_shape("actions", action, (self.num_envs, self.act_dim))
        after, reward, terminated, truncated, info = self._envs.step(self._to_simulator(action))
        obs = next_obs = torch.from_numpy(after.astype(np.float32))
        if "final_obs" in info:  # Gymnasium's name for what the dynamics reached, an object array [B]
            finished = np.flatnonzero(terminated | truncated)
            final_obs = np.stack([info["final_obs"][index] for index in finished]).astype(np.float32)
            next_obs = obs.clone()
            next_obs[torch.from_numpy(finished)] = torch.from_numpy(final_obs)
        return Step(
            obs=obs,
            next_obs=next_obs,
            reward=torch.from_numpy(reward.astype(np.float32)),
            terminated=torch.from_numpy(terminated),
            truncated=torch.from_numpy(truncated & ~terminated),  # a task that ends as its clock does is terminated
        )

    def close(self) -> None:
        self._envs.close()


class RenderEnv(GymnasiumVectorEnv):
    """One copy of a task that can also be rendered. After a step that ends an episode, `render` shows the next one."""

    def __init__(self, env_id: str, **options: Any) -> None:
        super().__init__(env_id, 1, render_mode="rgb_array", **options)
        self.fps = int(self._envs.metadata.get("render_fps", 30))
        task: Any = self._envs.envs[0].unwrapped
        if hasattr(task, "mujoco_renderer"):
            mujoco: Any = importlib.import_module("mujoco")  # its C part has no types
            # Gymnasium's camera is fixed, and a runner leaves its view. -1, Gymnasium's own choice, if none tracks.
            track = mujoco.mj_name2id(task.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
            task.mujoco_renderer.camera_id = track

    def render(self) -> np.ndarray:
        """The current frame, uint8 [height, width, 3]."""
        return np.array(self._envs.envs[0].render(), dtype=np.uint8)


def render_env(env_id: str, **options: Any) -> RenderEnv:
    """Make a single task for videos. Its first frame is drawn here, so that a task that cannot be drawn fails now.

    Without a display, MuJoCo renders through EGL unless MUJOCO_GL says otherwise. Raises UsageError if drawing fails.
    """
    _make_single(env_id, options).close()  # the task itself is fine: what fails from here on is rendering
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame, for the classic tasks
    chose_egl = sys.platform == "linux" and not ({"DISPLAY", "MUJOCO_GL"} & set(os.environ))
    if chose_egl:
        os.environ["MUJOCO_GL"] = "egl"
    try:
        env = RenderEnv(env_id, **options)
        env.reset(torch.zeros(1, dtype=torch.int64))
        env.render()
    except UsageError:
        raise
    except Exception as error:  # graphics libraries fail in their own ways, some with AttributeError
        if chose_egl:
            del os.environ["MUJOCO_GL"]
        raise UsageError(_render_remedy(env_id, error)) from error
    return env


def _render_remedy(env_id: str, error: Exception) -> str:
    if "mujoco" in str(gymnasium.spec(env_id.rpartition(":")[2]).entry_point):
        remedy = "`apt-get install libegl1`, or set MUJOCO_GL=osmesa and `apt-get install libosmesa6`"
    else:
        remedy = "`pip install -e '.[video]'` in the project's folder"
    return f"{env_id} cannot be drawn, try {remedy} ({type(error).__name__}: {' '.join(str(error).split())})"
