"""How fast training is, as a ratio against Stable-Baselines3 PPO in the same run.

Every subject is measured in a process of its own, one after the other, with the same env, epochs and minibatch.
Compilation and construction are apart. The two bounds: the environments alone under random actions, and the learner
alone on data that lie ready; 1 / (1 / envs + 1 / learner) is what a loop without overlap could reach at most.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import envs
from ess_rl.errors import UsageError
from experiments import records, report
from experiments.records import Record


def measure(
    env: str = "HalfCheetah-v5",
    agent: str = "p3o",
    seeds: tuple[int, ...] = (1, 10),
    num_envs: int = 16,
    epochs: int = 10,
    minibatch: int = 64,
    seconds: float = 20.0,
    out: Path | None = None,
) -> Record:
    """Measure and print env steps per second, all seeds together.

    Args:
        env: a task that SB3 can make as well.
        agent: p3o or ppo.
        seeds: sizes of the populations to measure.
        num_envs: environments of one seed, for us and for SB3.
        epochs: passes over the data, for us and for SB3.
        minibatch: samples of one update, for us and for SB3.
        seconds: how long each subject is measured.
        out: a JSON file to write.
    """
    shape = {"num_envs": num_envs, "rollout": 128, "epochs": epochs, "minibatch": minibatch}
    from agents import AGENTS

    if agent not in AGENTS:
        raise UsageError(f"unknown agent {agent!r}: choose one of {', '.join(AGENTS)}")
    envs.make(env, 1, backend="gymnasium").close()  # refuses what SB3 could not make
    # A fresh process each: neither memory nor thread pools of one subject reach the next.
    # SB3 with one thread of torch and with all: it gets the better of the two.
    tried = [_apart(_sb3, env, shape, seconds / 2, threads) for threads in sorted({1, os.cpu_count() or 1})]
    found: dict[str, Record] = {"sb3-ppo, 1 seed": max(tried, key=lambda one: one["steps_per_second"])}
    for count in seeds:
        found[f"{agent}, {count} seed{'s' * (count > 1)}"] = _apart(_ours, env, agent, count, shape, seconds)
    base = found["sb3-ppo, 1 seed"]["steps_per_second"]
    rows = [["subject", "env steps/s", "/ SB3", "envs alone", "learner alone", "of the bound", "compile s", "MiB"]]
    for name, one in found.items():
        one["ratio"] = one["steps_per_second"] / base
        bound = 1.0 / (1.0 / one["envs_alone"] + 1.0 / one["learner_alone"]) if "envs_alone" in one else None
        rows.append([
            name, f"{one['steps_per_second']:,.0f}", f"{one['ratio']:.2f}",
            f"{one['envs_alone']:,.0f}" if bound else "", f"{one['learner_alone']:,.0f}" if bound else "",
            f"{one['steps_per_second'] / bound:.0%}" if bound else "",
            f"{one['compile_seconds']:.0f}" if bound else "", f"{one['peak_memory_mib']:,.0f}",
        ])  # fmt: skip
    print(f"{env}, {num_envs} envs a seed, {epochs} epochs, minibatch {minibatch}")
    print(report.table(rows))
    profile = [["subject", "physics", "policy and storing", "targets", "updates"]]
    for name, one in found.items():
        if "profile" in one:
            profile.append([name, *(f"{share:.0%}" for share in one["profile"].values())])
    print(report.table(profile))
    record = {"env": env, **shape, "subjects": found, **records.origin()}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        records.write_json(out, record)
    return record


def _apart(function: Any, *arguments: Any) -> Record:
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _ours(env_id: str, agent: str, count: int, shape: Record, seconds: float) -> Record:
    import torch

    from agents import AGENTS
    from ess_rl import loop
    from ess_rl.population import Population
    from ess_rl.replay import Replay

    config = AGENTS[agent].config(**shape)
    env: Any = _Timed(envs.make(env_id, count * config.num_envs))
    population = Population(AGENTS[agent].agent(config, env.obs_dim, env.act_dim), range(count), compiled=True)
    compile_seconds = loop.warm_up(population, env)
    replay = Replay(config.rollout, count, config.num_envs, env.obs_dim, env.act_dim, "cpu")

    # The environments alone.
    env.reset(torch.arange(env.num_envs))
    generator = torch.Generator().manual_seed(0)
    actions = torch.rand(64, env.num_envs, env.act_dim, generator=generator) * 2.0 - 1.0
    for action in actions:
        env.step(action)
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds / 4:
        for action in actions:
            env.step(action)
        steps += actions.shape[0] * env.num_envs
    envs_alone = steps / (time.perf_counter() - began)

    # Training, from the second iteration on: the first has no updates.
    progress = loop.train(population, env, replay, iterations=10**6, reset_every=10**6)
    next(progress)
    next(progress)
    phases: dict[str, float] = {"collect": 0.0, "targets": 0.0, "update": 0.0}
    env.seconds, iterations, began = 0.0, 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        done = next(progress)
        iterations += 1
        phases = {name: phases[name] + done.seconds[name] for name in phases}
    elapsed = time.perf_counter() - began
    samples = config.rollout * config.num_envs * count

    # The learner alone, on the last rollout.
    data = population.prepare(replay.latest(config.rollout))
    index = torch.randint(config.rollout * config.num_envs, (count, config.minibatch), generator=generator)
    updates, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds / 4:
        population.updates(data, index.expand(50, -1, -1))
        updates += 50
    learner = updates * config.minibatch * count / config.epochs / (time.perf_counter() - began)
    return {
        "steps_per_second": iterations * samples / elapsed,
        "envs_alone": envs_alone,
        "learner_alone": learner,
        "compile_seconds": compile_seconds,
        "peak_memory_mib": records.peak_memory_mib(),
        "backend": env.backend,
        "profile": {
            "physics": env.seconds / elapsed,
            "policy": (phases["collect"] - env.seconds) / elapsed,
            "targets": phases["targets"] / elapsed,
            "update": phases["update"] / elapsed,
        },
    }


class _Timed:
    """An environment that counts the seconds spent in its steps."""

    def __init__(self, env: Any):
        self._env, self.seconds = env, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def step(self, action: Any) -> Any:
        began = time.perf_counter()
        step = self._env.step(action)
        self.seconds += time.perf_counter() - began
        return step


def _sb3(env_id: str, shape: Record, seconds: float, threads: int) -> Record:
    import torch

    from experiments import peers

    torch.set_num_threads(threads)
    model, _ = peers.build(env_id, 0, {**shape, "learning_rate": 3e-4, "log_std": 0.0})
    one = shape["num_envs"] * shape["rollout"]
    model.learn(one)
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        model.learn(2 * one, reset_num_timesteps=False)
        steps += 2 * one
    rate = steps / (time.perf_counter() - began)
    return {"steps_per_second": rate, "threads": threads, "peak_memory_mib": records.peak_memory_mib()}
