"""Minimum memory that a run needs, checked against free memory before the run starts, not when it dies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ess_rl import processes
from ess_rl.contract import Agent, OfflineAgent, State
from ess_rl.errors import UsageError
from ess_rl.population import acting, initial_state, values_of
from ess_rl.transitions import Transitions


def of_one_step(obs_dim: int, act_dim: int) -> int:
    """Bytes of one transition."""
    one = Transitions.empty((1,), obs_dim, act_dim, torch.device("meta"))
    return sum(x.nbytes for x in tree_leaves(one))


def _state(agent: Agent | OfflineAgent, config: Any) -> State:
    """The state of one member."""
    numbers = {name: torch.tensor(values) for name, values in values_of(config, {}, 1).items()}
    return initial_state(agent, torch.zeros(1, dtype=torch.int64), numbers)


def _bytes(state: State) -> int:
    return sum(x.nbytes for x in tree_leaves(state))


def _widest(config: Any) -> int:
    """Units of the widest hidden layer; 1 for an agent that has none."""
    return max(getattr(config, "hidden", (1,)))


def needed(agent: Agent, config: Any, obs_dim: int, act_dim: int, members: int, kept: int = 0) -> int:
    """Bytes that the tensors of a population hold at the same time while it learns.

    A lower bound: the replay and the rollout that is written into it, input and output of a hidden layer for all
    their steps at once (`prepare` computes their values), samples if they are whole segments, the state twice (before
    and after an update), and the older policies of a lag. Libraries and simulators come on top. Measured: 1,000
    members on Pendulum-v1 took 3.9 GiB, of which this counts 2.6.
    `kept` is the number of rollouts that the replay holds, if more than are learned from.
    """
    of_step, state = of_one_step(obs_dim, act_dim), _state(agent, config)
    steps = config.rollout * config.num_envs
    of_layer = 4 * _widest(config)  # float32
    of_sample = min(getattr(config, "segment_length", 0), config.rollout)
    # Samples that are segments: observation and action of each of their steps, for each step at which one begins.
    of_segment = 4 * (obs_dim + act_dim) * of_sample * (1 + config.replay)
    ring = max(1 + config.replay, kept)
    return members * (
        steps * ((1 + ring) * of_step + 2 * of_layer + of_segment)
        + 2 * _bytes(state)
        + (config.lag + (config.sync_interval > 1)) * _bytes(acting(state))
    )


def needed_offline(agent: OfflineAgent, config: Any, obs_dim: int, act_dim: int, members: int) -> int:
    """Bytes that the tensors of an offline population hold at the same time while it learns, besides the data set.

    A lower bound, as in `needed`: the state twice, and a minibatch with input and output of a hidden layer.
    """
    of_sample = of_one_step(obs_dim, act_dim) + 2 * 4 * _widest(config)
    return members * (2 * _bytes(_state(agent, config)) + config.minibatch * of_sample)


def free(device: str) -> int | None:
    """Bytes of memory that are free on a device, or None if the system does not tell."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), flags=re.MULTILINE)
    except OSError:
        return None
    known = [left for left in (int(found[1]) * 1024 if found else None, _free_in_container()) if left is not None]
    return min(known, default=None)


def _free_in_container(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes left below the memory limit of this process's container (cgroup v2), None if there is no limit.

    The kernel drops cached files before it kills a process, so they count as free.
    """
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), flags=re.MULTILINE)
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used) + (int(cached[1]) if cached else 0))


def check(
    agent: Agent, config: Any, obs_dim: int, act_dim: int, members: int, device: str, kept: int = 0, file: int = 0
) -> None:
    """Raises UsageError if a population, and those of the other processes here, cannot fit into the free memory.

    kept: rollouts that its replay holds, if more than it learns from.
    file: bytes of older data that are read first, on the CPU.
    """
    need, ring = needed(agent, config, obs_dim, act_dim, members, kept) + file, max(1 + config.replay, kept)
    replayed = f", the last {ring} rollouts of each kept," if ring > 1 else ""
    _refuse(
        need * (processes.local_world_size() if device == "cpu" else 1),  # each process has a CUDA device of its own
        device,
        f"{members:,} members of {config.num_envs} environments x {config.rollout} steps{replayed}",
        "a smaller --num-envs or --rollout" + " or --replay" * (ring > 1) + " or --lag" * (config.lag > 0),
    )


def check_offline(agent: OfflineAgent, config: Any, obs_dim: int, act_dim: int, members: int, device: str) -> None:
    """Raises UsageError if an offline population cannot fit into the free memory, with the data set already loaded."""
    need = needed_offline(agent, config, obs_dim, act_dim, members)
    _refuse(need, device, f"{members:,} members with layers of {_widest(config)} units", "smaller --hidden layers")


def _refuse(need: int, device: str, what: str, remedy: str) -> None:
    have = free(device)
    if have is not None and need > have:
        raise UsageError(
            f"{what} need at least {need / 2**30:,.1f} GiB on {device}, and {have / 2**30:,.1f} GiB are free: take "
            f"fewer seeds or values of a sweep, or {remedy}"
        )
