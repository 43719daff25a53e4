"""The MuJoCo -v5 tasks through EnvPool: B simulators in C++ threads, the fastest source of data on a CPU.

EnvPool differs from `VectorEnv` in three ways, which this adapter hides (found with EnvPool 1.2.5):

* It resets a finished environment at the *next* step, which then ignores the action. Here finished environments are
  reset at once by `reset(ids)`, so every transition is a true one.
* It reports `truncated` without `terminated` when a task ends on the very step its clock does. Here the pool's own time
  limit is one step too late to ever apply, and truncation is computed from its `elapsed_step`, so a task that ends is
  always `terminated`.
* It takes seeds only at construction. `reset(seeds)` therefore rebuilds the pool (0.1 to 0.3 s for 160 tasks).
"""

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.clocks import first_clocks
from envs.spaces import BoxAction, check_shape, seeds_31_bits
from ess_rl.contract import Step
from ess_rl.errors import UsageError


def _available_cpus() -> int:
    """Number of CPUs this process may use, in a container often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _return_freed_memory() -> None:
    """Ask the C library to return the memory of a destroyed pool to the system.

    A pool allocates from many threads, and glibc keeps what each of them freed: 60 pools of 160 HalfCheetahs, one
    after another, held on to 0.9 GB that no pool used anymore. Without glibc this does nothing.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class _Pool:
    """One EnvPool pool with the three differences removed. A `Turn`."""

    def __init__(self, make: Callable[..., Any], num_envs: int, to_simulator: BoxAction, max_episode_steps: int):
        """`make` builds the pool from its `num_envs` and its `env_seed`."""
        self._ahead = np.zeros(num_envs, dtype=np.int64)  # steps ahead of the simulator's clocks, in first episodes
        self._make = make
        self._ids = np.arange(num_envs)
        self._to_simulator = to_simulator
        self._max_episode_steps = max_episode_steps
        self._pool: Any = None

    def reset(self, env_seed: list[int], ahead: Tensor) -> Tensor:
        self._ahead[:] = ahead
        self._pool = self._make(num_envs=len(self._ids), env_seed=env_seed)
        obs, _ = self._pool.reset()
        return torch.from_numpy(obs.astype(np.float32))

    @property
    def is_open(self) -> bool:
        return self._pool is not None

    def close(self) -> None:
        """Destroy the pool and its threads. EnvPool's own `close` releases nothing; losing the last reference does."""
        self._pool = None

    def send(self, action: Tensor) -> None:
        """Start a control step of all environments; their threads keep running after this returns."""
        self._pool.send(self._to_simulator(action), self._ids)

    def receive(self) -> Step:
        """Wait for the control step that was started. If no episode ended, `obs` and `next_obs` are one tensor."""
        reached, reward, terminated, _, info = self._pool.recv()
        # Each conversion copies, so that nothing returned shares memory with EnvPool's buffers.
        next_obs = torch.from_numpy(reached.astype(np.float32))
        truncated = (info["elapsed_step"] + self._ahead >= self._max_episode_steps) & ~terminated
        obs = next_obs
        finished = np.flatnonzero(terminated | truncated)
        if finished.size:
            self._ahead[finished] = 0
            first, _ = self._pool.reset(finished)
            obs = next_obs.clone()
            obs[torch.from_numpy(finished)] = torch.from_numpy(first.astype(np.float32))
        return Step(
            obs=obs,
            next_obs=next_obs,
            reward=torch.from_numpy(reward.astype(np.float32)),
            terminated=torch.from_numpy(terminated),
            truncated=torch.from_numpy(truncated),
        )


class EnvPoolVectorEnv:
    """A `VectorEnv` over EnvPool, in two parts that can alternate if the number of environments is even.

    Returned tensors are on the CPU; those of a `Step` never change afterwards.
    """

    backend = "envpool"

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        *,
        num_threads: int | None = None,
        halves: bool = True,
        max_episode_steps: int | None = None,
        staggered: bool = False,
        **options: Any,
    ) -> None:
        """`num_threads`: threads of each part; by default the parts share the available CPUs. The fewer other threads
        spin for work, the sooner a waiting part wakes: on two CPUs, 16 HalfCheetahs and a policy took 0.83 ms per step
        with one thread in each half, 1.20 with two. `halves`: two parts, if `num_envs` is even.

        `staggered`: the clocks of the first episodes after a reset are ahead (`envs.clocks.first_clocks`).

        `options`: EnvPool's options of the task, under EnvPool's names.
        """
        import envpool

        self.env_id = env_id
        self.num_envs = num_envs
        self.staggered = staggered
        self.device = torch.device("cpu")
        try:
            spec = envpool.make_spec(env_id, **options)
        except (TypeError, ValueError, AssertionError) as error:
            raise UsageError(
                f"EnvPool refuses the options {options} for {env_id}: {' '.join(str(error).split())}"
            ) from error
        self.max_episode_steps = int(max_episode_steps or spec.config.max_episode_steps)
        self._to_simulator = BoxAction(env_id, spec.gymnasium_action_space)
        self.act_dim, self.action_range = self._to_simulator.act_dim, self._to_simulator.range
        self.obs_dim = int(np.prod(spec.gymnasium_observation_space.shape))
        self._count = 2 if halves and num_envs % 2 == 0 else 1
        options |= {
            "num_threads": num_threads or min(-(-_available_cpus() // self._count), num_envs // self._count),
            "max_episode_steps": self.max_episode_steps + 1,  # never reached: `receive` keeps the clock
        }
        self.turns = [
            _Pool(
                partial(envpool.make_gymnasium, env_id, **options),
                num_envs // self._count,
                self._to_simulator,
                self.max_episode_steps,
            )
            for _ in range(self._count)
        ]

    def reset(self, seeds: Tensor) -> Tensor:
        """Reset all environments from the low 31 bits of `seeds` [B]. -> obs [B, obs_dim]"""
        env_seed, count = seeds_31_bits(seeds, self.num_envs), self._count
        ahead = first_clocks(seeds, self.max_episode_steps) if self.staggered else torch.zeros_like(seeds)
        self.close()
        parts = [pool.reset(env_seed[part::count], ahead[part::count]) for part, pool in enumerate(self.turns)]
        return _interleave(parts)

    def step(self, action: Tensor) -> Step:
        """One control step of both parts at once."""
        check_shape("actions", action, (self.num_envs, self.act_dim))
        for part, pool in enumerate(self.turns):
            pool.send(action[part :: self._count])
        steps = [pool.receive() for pool in self.turns]
        return steps[0] if self._count == 1 else Step(*(_interleave(list(of)) for of in zip(*steps, strict=True)))

    def close(self) -> None:
        """Release the pools, their threads and their memory."""
        if not any(pool.is_open for pool in self.turns):
            return  # a collection takes half a second
        for pool in self.turns:
            pool.close()
        gc.collect()
        _return_freed_memory()


def _interleave(parts: list[Tensor]) -> Tensor:
    """Merge K parts [B / K, ...] into [B, ...]: row i comes from part i modulo K."""
    return torch.stack(parts, dim=1).flatten(0, 1)
