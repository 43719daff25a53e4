"""The checks of `gpu`: that a GPU computes what the CPU computes, and that nothing waits for it.

Each returns what it found, with `passed`. On the CPU they compare that device with itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import envs
from experiments.records import Record


def environments(device: str) -> Record:
    """Compare each torch environment on both devices, with equal seeds and equal actions, in float64."""
    import torch

    worst = {}
    for env_id, entry in envs.ENVS.items():
        if entry.dynamics is None:
            continue
        pair = [
            envs.make_torch(env_id, 64, where, dtype=torch.float64, max_episode_steps=40) for where in (device, "cpu")
        ]
        seeds = torch.arange(64)
        seen = [env.reset(seeds.to(env.device)).cpu() for env in pair]
        differences = [(seen[0] - seen[1]).abs().max()]
        generator = torch.Generator().manual_seed(0)
        for _ in range(100):
            action = torch.rand(64, pair[0].act_dim, generator=generator) * 2.0 - 1.0
            one, other = (env.step(action.to(env.device)) for env in pair)
            differences += [(x.double().cpu() - y.double().cpu()).abs().max() for x, y in zip(one, other, strict=True)]
        worst[env_id] = _number(torch.stack(differences).max())
    return {"largest_difference": worst, "passed": max(worst.values()) < 1e-4}


def _population(device: str, compiled: bool, replay: int = 0, name: str = "p3o") -> tuple[Any, Any, Any]:
    import torch

    from agents import AGENTS
    from ess_rl.population import Population
    from ess_rl.replay import Replay

    entry = AGENTS[name]
    grouped = {"group": 4} if hasattr(entry.config, "group") else {}
    config = entry.config(num_envs=32, rollout=32, epochs=4, minibatch=256, replay=replay, **grouped)
    of_one_rollout = {"max_episode_steps": config.rollout} if grouped else {}
    env = envs.make_for(config, "Pendulum-v1", 4 * 32, device=device, **of_one_rollout)
    population = Population(entry.agent(config, env.obs_dim, env.act_dim), range(4), device=device, compiled=compiled)
    if hasattr(config, "demonstrations"):
        generator = torch.Generator().manual_seed(0)
        shown = {"obs": torch.randn(500, env.obs_dim, generator=generator), "action": torch.zeros(500, env.act_dim)}
        population.demonstrations = {column: x.to(device) for column, x in shown.items()}
    return population, env, Replay((1 + replay) * 32, 4, 32, env.obs_dim, env.act_dim, device)


def _trained(parts: tuple[Any, Any, Any], iterations: int = 6) -> list[Any]:
    """Parameters after some iterations, on the CPU."""
    from torch.utils._pytree import tree_leaves

    from ess_rl import loop

    for _ in loop.train(*parts, iterations=iterations, reset_every=iterations):
        pass
    return [x.double().cpu() for x in tree_leaves(parts[0].state["params"])]


def _largest(one: list[Any], other: list[Any]) -> float:
    import torch

    return _number(torch.stack([(x - y).abs().max() for x, y in zip(one, other, strict=True)]).max())


def _number(x: Any) -> float:
    """As a float; a non-finite number counts as a huge one, which no check passes."""
    return float(x.double().nan_to_num(nan=1e308, posinf=1e308))


def recorded_is_eager(device: str) -> Record:
    """Compare sixteen iterations with and without recording, compiled and not, on fresh data and with older rollouts.

    With two older ones, rollouts lie in three places in turn, each with its own recordings: made by the eighth
    iteration, replayed from then on.
    """
    from ess_rl.graphs import Graphs

    found, recorded = {}, Graphs.__call__

    def called(self: Any, name: str, function: Callable[[], Any]) -> Any:
        return function()

    for compiled in (False, True):
        for replay in (0, 2):
            Graphs.__call__ = recorded
            one = _trained(_population(device, compiled, replay), 16)
            Graphs.__call__ = called
            other = _trained(_population(device, compiled, replay), 16)
            found[f"compiled {compiled}, replay {replay}"] = _largest(one, other)
    return {"largest_difference_of_a_parameter": found, "passed": max(found.values()) < 1e-3}


def as_on_the_cpu(device: str) -> Record:
    """Compare four iterations of every agent on Pendulum-v1, the last one replayed on the device, with four on the CPU.

    Equal seeds give equal noise on both, so only rounding differs.
    """
    import torch

    from agents import AGENTS

    torch.set_num_threads(1)  # small tensors: more threads would only wait
    found = {}
    for name in AGENTS:
        one, other = (_trained(_population(where, False, name=name), 4) for where in (device, "cpu"))
        found[name] = _largest(one, other)
    return {"largest_difference_of_a_parameter": found, "passed": max(found.values()) < 1e-2}


def as_on_the_cpu_offline(device: str) -> Record:
    """Do the same for every offline agent, with 160 updates, three fifths of them replayed on the device."""
    import torch
    from torch.utils._pytree import tree_leaves

    from agents import OFFLINE_AGENTS
    from ess_rl import offline
    from ess_rl.offline import OfflinePopulation

    torch.set_num_threads(1)
    data, found = noise(2_000, 3, 1), {}
    for name, entry in OFFLINE_AGENTS.items():
        ends = []
        for where in (device, "cpu"):
            config = entry.config(hidden=(64,), minibatch=64)
            population = OfflinePopulation(entry.agent(config, 3, 1), range(4), device=where)
            for _ in offline.train(population, data, updates=160, blocks=1):
                pass
            ends.append([x.double().cpu() for x in tree_leaves(population.state["params"])])
        found[name] = _largest(*ends)
    return {"largest_difference_of_a_parameter": found, "passed": max(found.values()) < 1e-2}


def noise(count: int, obs_dim: int, act_dim: int) -> Any:
    """Meaningless random transitions [count], in episodes of 1000 steps, on the CPU."""
    import torch

    from ess_rl.transitions import Transitions

    generator = torch.Generator().manual_seed(0)
    drawn = {"obs": obs_dim, "next_obs": obs_dim, "action": act_dim}
    columns = {name: 0.3 * torch.randn(count, dim, generator=generator) for name, dim in drawn.items()}
    data = Transitions.empty((count,), obs_dim, act_dim, torch.device("cpu")).map(torch.zeros_like)
    truncated = torch.arange(count) % 1000 == 999
    return dataclasses.replace(data, **columns, reward=torch.randn(count, generator=generator), truncated=truncated)


def nothing_waits(device: str) -> Record:
    """Run iterations under torch's alarm for operations that wait for the GPU; the transfer at the end of each may."""
    from ess_rl import loop

    transfer, allowed = loop._to_host, []

    def to_host(found: dict[str, Any]) -> dict[str, Any]:
        allowed.append(len(found))
        with _alarm("default", device):
            return transfer(found)

    population, env, replay = _population(device, compiled=False)
    loop._to_host = to_host
    progress = loop.train(population, env, replay, iterations=6, reset_every=6)
    next(progress)  # includes the reset of the environments
    with _alarm("error", device):
        for _ in progress:
            pass
    return {"iterations": len(allowed) - 1, "passed": True}


@contextmanager
def _alarm(mode: str, device: str) -> Iterator[None]:
    import torch

    if device != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def memory(device: str, iterations: int) -> Record:
    """Compare the memory allocated after 20 iterations and after many."""
    import torch

    from ess_rl import loop

    held = {}
    for done in loop.train(*_population(device, compiled=False), iterations=iterations, reset_every=10):
        if done.iteration in (20, iterations):
            held[done.iteration] = torch.cuda.memory_allocated() if device == "cuda" else 0
    return {"bytes_allocated_after": held, "passed": held[iterations] <= held[20]}


def warp_is_mujoco(device: str) -> Record:
    """Compare one control step of 64 worlds with Gymnasium's, from each of 40 states on the path of random actions.

    Differences are relative for numbers above 1. The largest occur where a foot meets the floor, and depend on the
    state; Ant's come from friction that points in other directions (`envs.mujoco_warp_vector`).
    """
    import gymnasium
    import numpy as np
    import torch

    found: Record = {}
    for env_id in ("HalfCheetah-v5", "Ant-v5"):
        env: Any = envs.make(env_id, 64, backend="warp", device=device)
        theirs: Any = gymnasium.make(env_id, disable_env_checker=True).unwrapped
        env.reset(torch.arange(64, device=device))
        theirs.reset(seed=0)
        generator, gaps = torch.Generator().manual_seed(0), []
        for _ in range(40):
            action = 2.0 * torch.rand(64, env.act_dim, generator=generator) - 1.0
            qpos, qvel = (x.double().cpu().numpy().copy() for x in (env._now.qpos, env._now.qvel))
            env._warm_start.zero_()  # as Gymnasium's is after `set_state` of a fresh simulator
            reached = env.step(action.to(device)).next_obs.cpu().numpy()
            for i, position in enumerate(qpos):
                theirs.data.qacc_warmstart[:] = 0.0
                theirs.set_state(position, qvel[i])
                expected = theirs.step(action[i].numpy() * theirs.action_space.high)[0]
                gaps.append(np.abs(reached[i] - expected).max() / max(1.0, np.abs(expected).max()))
        env.close()
        found[env_id] = {
            name: _number(torch.tensor(of(gaps))) for name, of in (("median", np.median), ("largest", np.max))
        }
    return {"difference": found, "passed": found["HalfCheetah-v5"]["largest"] < 2e-3}
