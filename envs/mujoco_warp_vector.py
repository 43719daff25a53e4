"""The MuJoCo -v5 tasks on mujoco_warp: B worlds as tensors on one device, mainly a GPU.

mujoco_warp is MuJoCo's engine in NVIDIA Warp. It computes in float32, where MuJoCo and EnvPool compute in float64, and
solves for contact forces to a tolerance of 1e-6 instead of 1e-8: close to those two, but not the same benchmark.
Results carry the backend's own name, and no run uses it unless asked to. `tests/envs/test_mujoco_warp.py` says how
close. One difference is larger: friction of a steep capsule on the floor points in other directions (Ant and Humanoid).

A control step is recorded once as a graph (a CUDA graph, or Warp's own on the CPU) and replayed on torch's stream. What
tasks read and what actions set are the simulator's own arrays as tensors, without a copy. So `step` has no branch on
data and does not wait for the GPU. The tensor functions of each task are in `mujoco_tasks`.

The CPU is for tests: the first use of a task compiles its kernels, which takes about a minute; Warp caches them.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import torch
from torch import Tensor

from envs.clocks import first_clocks
from envs.mujoco_tasks import TASKS, Physics
from envs.spaces import check_shape
from ess_rl import random
from ess_rl.contract import Step
from ess_rl.errors import UsageError

# Imported by name, because they belong to an extra and are untyped.
mujoco: Any = importlib.import_module("mujoco")
mjw: Any = importlib.import_module("mujoco_warp")
wp: Any = importlib.import_module("warp")

if wp.config.log_level == wp.LOG_INFO:
    wp.config.log_level = wp.LOG_ERROR  # else each of some hundred kernels prints a line, and a missing GPU a warning
wp.init()


def _load(model_file: str) -> Any:
    """Load Gymnasium's model, changed where mujoco_warp lacks a feature."""
    model = mujoco.MjModel.from_xml_path(
        str(Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / model_file)
    )
    if model.opt.solver == mujoco.mjtSolver.mjSOL_PGS:
        # Humanoid's. Newton solves the same convex problem, and to convergence, where 50 sweeps of PGS may stop short.
        model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
    return model


def _nothing(model: Any) -> Physics:
    """One world of zeros, to find the size of an observation."""
    of_joints = dict.fromkeys(("qvel", "qfrc_actuator", "qfrc_constraint"), (model.nv,))
    of_bodies = {"xpos": 3, "xipos": 3, "cinert": 10, "cvel": 6, "cfrc_ext": 6}
    shapes = of_joints | {name: (model.nbody, size) for name, size in of_bodies.items()}
    shapes |= {"qpos": (model.nq,), "site_xpos": (model.nsite, 3)}
    zeros = {name: torch.zeros(1, *shape) for name, shape in shapes.items()}
    return Physics(**zeros, body_mass=torch.ones(model.nbody))


class MujocoWarpVectorEnv:
    """A `VectorEnv` over mujoco_warp. Episode k of environment i starts from the seed `fold_in(seeds[i], k)`.

    A world that diverges (a NaN, from its action or from the physics) shows NaN until its episode ends; it is not
    silently reset, as it would be by MuJoCo.

    On the CPU an environment is, bit for bit, a function of its seed and its actions. On CUDA this holds only up to
    rounding: contacts are stored in the order in which threads find them, and sums follow that order (mujoco_warp 4.0
    has an option `deterministic`, but its sorting of contacts is not implemented yet). Chaotic tasks then drift apart.

    On CUDA, a solver that stops early needs a driver for CUDA 12.4 or later; with an older one each solve takes its
    maximum number of iterations.
    """

    backend = "warp"

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        device: torch.device | str = "cpu",
        *,
        max_episode_steps: int | None = None,
        staggered: bool = False,
        **options: Any,
    ) -> None:
        """`options`: the fields of the task in `mujoco_tasks`. Kernels are compiled at the first `reset`.

        `staggered`: the clocks of the first episodes after a reset are ahead (`envs.clocks.first_clocks`).
        """
        try:
            self.task = TASKS[env_id](**options)
        except TypeError as error:
            raise UsageError(f"{env_id} (warp) refuses the options {sorted(options)}: {error}") from error
        self.env_id = env_id
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.max_episode_steps = self.task.max_episode_steps if max_episode_steps is None else max_episode_steps
        self.staggered = staggered
        self._model = _load(self.task.model_file)
        self.act_dim = int(self._model.nu)
        self.obs_dim = self.task.observe(_nothing(self._model)).shape[-1]
        self._seconds = float(self._model.opt.timestep) * self.task.frame_skip  # of a control step
        low, high = self._tensor(self._model.actuator_ctrlrange).unbind(-1)
        # In float32, as the other simulators have it: two ranges of one task are compared exactly.
        self.action_range = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
        self._half_range, self._center = 0.5 * (high - low), 0.5 * (high + low)  # [nu]
        self._qpos0 = self._tensor(self._model.qpos0)  # [nq]
        self._qvel0 = torch.zeros(self._model.nv, device=self.device)  # [nv]
        self._seed = torch.zeros(num_envs, dtype=torch.int64, device=self.device)  # [B]
        self._episode = torch.zeros_like(self._seed)  # [B] number of the running episode, from 0
        self._elapsed = torch.zeros_like(self._seed)  # [B] control steps done in it
        self._position = torch.zeros(num_envs, device=self.device)  # [B] m, before the next step
        self._data: Any = None  # the simulator's, from the first reset on

    def _tensor(self, array: Any) -> Tensor:
        return torch.as_tensor(array, dtype=torch.float32).to(self.device)

    def _build(self) -> None:
        """Build the worlds, their arrays as tensors, and the graphs."""
        task = self.task
        with wp.ScopedDevice(wp.device_from_torch(self._seed.device)):  # "cuda" with its index
            model = mjw.put_model(self._model)
            model.opt.warn_overflow = 0  # each step would print; `_check_room` raises instead
            if self.device.type == "cuda":
                model.opt.graph_conditional = wp.is_conditional_graph_supported()
            data = mjw.make_data(self._model, self.num_envs, nconmax=task.max_contacts, njmax=task.max_constraints)
            self._data = data
            views = {name: wp.to_torch(getattr(data, name)) for name in Physics._fields if name != "body_mass"}
            self._now = Physics(**views, body_mass=self._tensor(self._model.body_mass))
            self._control: Tensor = wp.to_torch(data.ctrl)  # [B, nu]
            self._warm_start: Tensor = wp.to_torch(data.qacc_warmstart)  # [B, nv] where the next solve starts
            self._overflow: Tensor = wp.to_torch(data.overflow)  # [B] int32, bits that stay set

            def control_step() -> None:
                for _ in range(task.frame_skip):
                    mjw.step(model, data)
                mjw.rne_postconstraint(model, data)  # cfrc_ext; Gymnasium asks for it after each control step

            def bodies() -> None:
                mjw.kinematics(model, data)
                mjw.com_pos(model, data)
                mjw.com_vel(model, data)

            self._control_step = self._record(control_step)
            self._bodies = self._record(bodies)

    @staticmethod
    def _record(operations: Callable[[], None]) -> Any:
        """Record a graph of what `operations` launches; the state that this leaves behind is of no use."""
        operations()  # compiles and loads the kernels, which cannot happen while recording
        with wp.ScopedCapture() as capture:
            operations()
        return capture.graph

    def _launch(self, graph: Any) -> None:
        """Replay a graph, in order with torch's work before and after."""
        stream = wp.stream_from_torch(torch.cuda.current_stream(self.device)) if self.device.type == "cuda" else None
        wp.capture_launch(graph, stream=stream)

    def _begin(self, chosen: Tensor) -> Tensor:
        """Start a new episode in the worlds of the mask `chosen` [B]. -> first obs [B, obs_dim], meant for these"""
        seed = random.fold_in(self._seed, self._episode)
        return self._place(chosen, *self.task.first_state(seed, self._qpos0, self._qvel0))

    def _place(self, chosen: Tensor, qpos: Tensor, qvel: Tensor) -> Tensor:
        """Put the worlds of the mask `chosen` [B] at `qpos` [B, nq], `qvel` [B, nv], as if an episode began there.

        -> obs [B, obs_dim], meant for these worlds
        """
        task, now, of_world = self.task, self._now, chosen.unsqueeze(-1)
        now.qpos.copy_(torch.where(of_world, qpos, now.qpos))
        now.qvel.copy_(torch.where(of_world, qvel, now.qvel))
        self._warm_start.masked_fill_(of_world, 0.0)
        if task.reads_bodies:
            self._launch(self._bodies)  # of all worlds: the others' are recomputed in the next step anyway
        # No task starts with a control, in contact or at a limit, so there are no forces yet.
        forces = {
            name: torch.zeros_like(getattr(now, name)) for name in ("qfrc_actuator", "qfrc_constraint", "cfrc_ext")
        }
        first = now._replace(**forces)
        self._position.copy_(torch.where(chosen, task.position(first), self._position))
        return task.observe(first)

    @torch.no_grad()
    def reset(self, seeds: Tensor) -> Tensor:
        """Reset all environments from `seeds` [B] int64. -> obs [B, obs_dim]

        Raises:
            UsageError: in the steps since the last reset there was no room for some contacts or constraints.
        """
        check_shape("seeds", seeds, (self.num_envs,))
        if self._data is None:
            self._build()
            self._overflow.zero_()
        self._check_room()
        self._seed.copy_(seeds)
        self._episode.zero_()
        self._elapsed.zero_()
        if self.staggered:
            self._elapsed.copy_(first_clocks(seeds, self.max_episode_steps))
        return self._begin(torch.ones_like(self._seed, dtype=torch.bool))

    @torch.no_grad()
    def step(self, action: Tensor) -> Step:
        """One control step; `action` [B, act_dim] is clipped to [-1, 1], then scaled to the range of the actuators."""
        check_shape("actions", action, (self.num_envs, self.act_dim))
        task, now = self.task, self._now
        self._control.copy_(self._center + self._half_range * action.clamp(-1.0, 1.0))
        self._launch(self._control_step)
        next_obs = task.observe(now)
        position = task.position(now)
        reward = task.reward(now, self._control, (position - self._position) / self._seconds)
        terminated = task.terminated(now)
        self._position.copy_(position)
        self._elapsed += 1
        truncated = (self._elapsed >= self.max_episode_steps) & ~terminated
        ended = terminated | truncated
        self._episode += ended
        self._elapsed *= ~ended
        obs = torch.where(ended.unsqueeze(-1), self._begin(ended), next_obs)
        if self.device.type == "cpu":
            self._check_room()  # elsewhere this would wait for the device: there `reset` and `close` check
        return Step(obs=obs, next_obs=next_obs, reward=reward, terminated=terminated, truncated=truncated)

    def _check_room(self) -> None:
        """Raise UsageError if the simulator dropped contacts or constraints for lack of room."""
        of_solver = mjw.OverflowType.ITERATIONS | mjw.OverflowType.LS_ITERATIONS  # stopped early: not a lack of room
        short = (self._overflow & ~int(of_solver)) != 0
        count = int(short.sum())
        if count:
            self._overflow.zero_()
            room = f"max_contacts (now {self.task.max_contacts}) or max_constraints (now {self.task.max_constraints})"
            raise UsageError(
                f"{self.env_id} (warp) dropped contacts or constraints in {count} of {self.num_envs} environments for "
                f"lack of room: raise {room}"
            )

    def close(self) -> None:
        """Check once more for a lack of room (UsageError, as in `reset`), then free the simulator's memory."""
        if self._data is not None:
            try:
                self._check_room()
            finally:
                self._data = self._control_step = self._bodies = None
                del self._now, self._control, self._warm_start, self._overflow
