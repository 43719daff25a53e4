"""Speed of training, as a ratio to Stable-Baselines3 PPO in the same run.

Every subject is measured in its own process, one after another, with the same env, epochs and minibatch. Compilation
and construction are excluded. Three parts are also measured alone: the environments under random actions (EnvPool's in
one pool, all at once), collection (environments, policy and storing), and the learner on data that are ready.
1 / (1 / envs + 1 / learner) is the most that a loop without overlap could reach; collecting in another process
(`--async`) overlaps, and so do members in their own processes (`--split`). On CUDA, training and learner replay
recordings, while environments and collection alone are launched step by step; there it is not a bound, and a recorded
collection counts as policy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import envs
from ess_rl.child import peak_memory_mib
from ess_rl.contract import InTurns, VectorEnv
from ess_rl.errors import UsageError
from experiments import machine, memory, records
from experiments.records import Record
from experiments.report.text import table
from experiments.speed.subjects import apart, noting, per_second

if TYPE_CHECKING:
    from ess_rl.population import Population
    from ess_rl.transitions import Transitions

ALONE = {"envs_alone": "envs alone", "collection": "collection alone", "learner_alone": "learner alone"}


def measure(
    env: str = "HalfCheetah-v5",
    agent: str = "p3o",
    seeds: tuple[int, ...] = (1, 10),
    num_envs: int = 16,
    rollout: int = 128,
    epochs: int = 10,
    minibatch: int = 64,
    seconds: float = 20.0,
    backend: Literal["auto", "torch", "envpool", "gymnasium", "warp"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    compile: Literal["auto", "on", "off"] = "auto",
    peers: bool = True,
    asynchronous: Annotated[bool, tyro.conf.arg(name="async")] = False,
    split: int = 1,
    out: Path | None = None,
) -> Record:
    """Measure and print env steps per second, all seeds together.

    Args:
        env: a task; SB3 is left out if Gymnasium does not have it.
        agent: one that acts, needs neither demonstrations nor groups, and has no replayed updates.
        seeds: sizes of the populations to measure.
        num_envs: environments of one seed, for all subjects.
        rollout: steps of each environment between updates, for all subjects.
        epochs: passes over the data, for all subjects.
        minibatch: samples of one update, for all subjects.
        seconds: how long each subject is measured.
        backend: of the environments of our agents and of the eager loop.
        device: where our agents run; auto: cuda if there is one and the environments run on it too. Peers: the CPU.
        compile: compile our agents; auto: on if a C++ compiler is found.
        peers: also measure SB3 PPO and an eager loop.
        asynchronous: measure our agents a second time, with another process that collects for them, at a lag of 1.
        split: above 1: measure a second time those of our populations that can be split over this many processes.
        out: a JSON file to write, after each subject.
    """
    shape = {"num_envs": num_envs, "rollout": rollout, "epochs": epochs, "minibatch": minibatch}
    from agents import AGENTS, OFFLINE_AGENTS
    from ess_rl import batches
    from ess_rl.contract import AlternatingConfig
    from experiments import plan

    if agent not in AGENTS:
        which = (
            f"{agent} learns from a data set: give --dataset ID, or"
            if agent in OFFLINE_AGENTS
            else f"unknown agent {agent!r}:"
        )
        raise UsageError(f"{which} choose one of {', '.join(AGENTS)}")
    if hasattr(AGENTS[agent].config, "demonstrations"):
        raise UsageError(f"--agent {agent}: it needs demonstrations, and here are none: choose another")
    if hasattr(AGENTS[agent].config, "group"):
        raise UsageError(f"--agent {agent}: it needs environments in groups, which are not measured: choose another")
    records.check_positive({**shape, "seeds": min(seeds, default=0)})
    config = AGENTS[agent].config(**shape)
    batches.check_minibatch(config)
    if isinstance(config, AlternatingConfig):
        raise UsageError(f"--agent {agent}: its replayed updates cannot be measured apart: choose another")
    if not seconds > 0:
        raise UsageError(f"--seconds {seconds:g}: must be above 0")
    records.check_file(out)
    probe = envs.make(env, 1, backend=backend)
    where, compiled = plan.device_of(device, probe.backend), plan.compiled_of(compile)
    made = AGENTS[agent].agent(config, probe.obs_dim, probe.act_dim)
    if asynchronous:
        plan.check_asynchronous(replace(config, lag=1), where, probe.backend)
    plan.check_split(split, max(seeds), where, False, {})
    for count in seeds:
        memory.check(made, config, probe.obs_dim, probe.act_dim, count, where)
    probe.close()
    found: dict[str, Record] = {}
    record = {"env": env, **shape, "device": where, "compiled": compiled, "subjects": found, **records.origin()}

    note = noting(record, "steps_per_second", "env steps", out)
    if peers:
        # With one torch thread and with all: a peer gets the better of the two.
        threads = sorted({1, machine.available_cores()})
        rivals = {"eager loop, 1 seed": _eager}
        if "gymnasium" in envs.backends_of(env):
            rivals = {"sb3-ppo, 1 seed": _sb3, **rivals}
        for name, rival in rivals.items():
            tried = [apart(rival, env, shape, seconds / 2, count, backend) for count in threads]
            note(name, max(tried, key=lambda one: one["steps_per_second"]))
    for count in seeds:
        name = f"{agent}, {count} seed{'s' * (count > 1)}"
        note(name, apart(ours, env, agent, count, shape, seconds, where, compiled, backend))
        several: dict[str, Record] = {"async": {"asynchronous": True}} if asynchronous else {}
        several |= {f"split {split}": {"split": split}} if 1 < split <= count else {}
        for kind, how in several.items():
            function = partial(ours_in_several, **how)
            rate = apart(function, env, agent, count, shape, seconds, where, compiled, backend)
            note(f"{name}, {kind}", rate | {"bound": found[name]["bound"]})
    print(f"{env}, {num_envs} envs a seed, {rollout} steps, {epochs} epochs, minibatch {minibatch}, device {where}")
    print(table(_speeds(found)))
    print(table(_profiles(found)))
    return record


def _speeds(found: Record) -> list[list[str]]:
    base = next(iter(found)).split(",")[0]
    rows = [["subject", "env steps/s", f"/ {base}", *ALONE.values(), "of the bound", "compile s", "MiB"]]
    for name, one in found.items():
        row = [name, f"{one['steps_per_second']:,.0f}", f"{one['ratio']:.2f}"]
        row += [f"{one[part]:,.0f}" if part in one else "" for part in ALONE]
        row += [f"{one['steps_per_second'] / one['bound']:.0%}" if "bound" in one else ""]
        row += [f"{one['compile_seconds']:.0f}" if "compile_seconds" in one else ""]
        rows.append([*row, f"{one['peak_memory_mib']:,.0f}"])
    return rows


def _profiles(found: Record) -> list[list[str]]:
    rows = [["subject", "physics", "policy and storing", "targets", "updates"]]
    return rows + [
        [name, *(f"{share:.0%}" for share in one["profile"].values())]
        for name, one in found.items()
        if "profile" in one
    ]


def ours(
    env_id: str,
    agent: str,
    count: int,
    shape: Record,
    seconds: float,
    device: str = "cpu",
    compiled: bool = True,
    backend: str = "auto",
) -> Record:
    """Rates of one population of `count` members, in env steps per second of all together; see the module docstring."""
    import torch

    from agents import AGENTS
    from ess_rl import loop
    from ess_rl.collect import collect
    from ess_rl.population import Population
    from ess_rl.replay import Replay

    config = AGENTS[agent].config(**shape)
    samples = config.rollout * config.num_envs
    env = envs.make(env_id, count * config.num_envs, backend=backend, device=device)
    simulated = _Seconds(env)
    made = AGENTS[agent].agent(config, env.obs_dim, env.act_dim)
    population = Population(made, range(count), device=device, compiled=compiled)
    compile_seconds = loop.warm_up(population, env) if compiled else 0.0
    replay = Replay(config.rollout, count, config.num_envs, env.obs_dim, env.act_dim, device)
    generator = torch.Generator(env.device).manual_seed(0)
    actions = torch.rand(64, env.num_envs, env.act_dim, generator=generator, device=env.device) * 2.0 - 1.0

    options: Record = {"halves": False} if env.backend == "envpool" else {}
    whole = envs.make(env_id, env.num_envs, backend=env.backend, device=device, **options)
    whole.reset(torch.arange(env.num_envs, device=env.device))

    def step_envs() -> int:
        for action in actions:
            whole.step(action)
        return len(actions) * env.num_envs

    step_envs()
    envs_alone = per_second(step_envs, seconds / 4, device)
    whole.close()
    obs = env.reset(torch.arange(env.num_envs, device=env.device))

    def roll_out() -> int:
        nonlocal obs
        _, obs = collect(population, env, obs, config.rollout, 0)
        return samples * count

    collection = per_second(roll_out, seconds / 4, device)

    # Training, from the fourth iteration on: the first has no updates, and on CUDA the third records.
    progress = loop.train(population, env, replay, iterations=10**6, reset_every=10**6)
    for _ in range(3):
        next(progress)
    phases = {"collect": 0.0, "targets": 0.0, "update": 0.0}

    def train() -> int:
        done = next(progress)
        for name in phases:
            phases[name] += done.seconds[name]
        return samples * count

    simulated.total, began = 0.0, time.perf_counter()
    rate = per_second(train, seconds, device)
    elapsed = time.perf_counter() - began

    learner = learner_alone(population, replay.latest(config.rollout), seconds / 4)
    return {
        "steps_per_second": rate,
        "envs_alone": envs_alone,
        "collection": collection,
        "learner_alone": learner,
        "bound": 1.0 / (1.0 / envs_alone + 1.0 / learner),
        "compile_seconds": compile_seconds,
        "peak_memory_mib": peak_memory_mib(),
        "backend": env.backend,
        "profile": {
            "physics": simulated.total / elapsed,
            "policy": (phases["collect"] - simulated.total) / elapsed,
            "targets": phases["targets"] / elapsed,
            "update": phases["update"] / elapsed,
        },
    }


def ours_in_several(
    env_id: str,
    agent: str,
    count: int,
    shape: Record,
    seconds: float,
    device: str = "cpu",
    compiled: bool = True,
    backend: str = "auto",
    **how: Any,
) -> Record:
    """The rate of training only, in several processes: `how` has the arguments of `experiments.plan` for that."""
    from experiments import plan
    from experiments.training import Begun, parts, training

    config = plan.make(
        agent, env_id, settings={**shape, "lag": int("asynchronous" in how)}, sweep={}, seeds=range(count), steps=10**9,
        backend=backend, device=device, compiled="on" if compiled else "off", **how,
    ) | {"reset_every": 10**6}  # fmt: skip
    population, env, replay = parts(config)
    with training(config, population, env, replay, Begun(0, {}, {})) as found:
        for _ in range(3):
            next(found.progress)
        rate = per_second(lambda: next(found.progress) and count * shape["rollout"] * shape["num_envs"], seconds)
        memory = peak_memory_mib() + found.peak_memory_mib()
    return {
        "steps_per_second": rate, "compile_seconds": found.compile_seconds, "peak_memory_mib": memory,
        "backend": env.backend,
    }  # fmt: skip


def learner_alone(population: Population, rollout: Transitions, seconds: float) -> float:
    """Env steps per second, all members together, that the updates could learn from if data cost nothing."""
    import torch

    from ess_rl.graphs import Graphs

    config, device = population.agent.config, population.device
    data = population.prepare(rollout)
    index = torch.randint(config.rollout * config.num_envs, (50, population.size, config.minibatch)).to(device)
    state, graphs = population.state, Graphs(device)

    def updates() -> None:
        population.epoch(data, index)
        population.keep(state)

    def learn() -> int:
        graphs("updates", updates)
        return len(index) * population.size * config.minibatch

    for _ in range(3):
        learn()
    return per_second(learn, seconds, device.type) / config.epochs


class _Seconds:
    """Counts the seconds that the loop spends in an environment: in its steps or, for parts that alternate, in
    sending actions and waiting for the outcome."""

    def __init__(self, env: VectorEnv):
        self.total = 0.0
        parts, methods = (env.turns, ("send", "receive")) if isinstance(env, InTurns) else ([env], ("step",))
        for part in parts:
            for name in methods:
                setattr(part, name, self._counted(getattr(part, name)))

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = method(*arguments)
            self.total += time.perf_counter() - began
            return result

        return call


def _sb3(env_id: str, shape: Record, seconds: float, threads: int, backend: str) -> Record:
    import torch

    from experiments.peers import sb3

    torch.set_num_threads(threads)
    model, _ = sb3.ppo(env_id, 0, sb3.PPOConfig(**shape))
    one = shape["num_envs"] * shape["rollout"]
    model.learn(one)

    def learn() -> int:
        model.learn(2 * one, reset_num_timesteps=False)
        return 2 * one

    return {
        "steps_per_second": per_second(learn, seconds), "threads": threads, "peak_memory_mib": peak_memory_mib()
    }  # fmt: skip


def _eager(env_id: str, shape: Record, seconds: float, threads: int, backend: str) -> Record:
    import torch

    from agents.ppo import Config
    from experiments.speed import eager_loop

    torch.set_num_threads(threads)
    config = Config(**shape)
    env = envs.make(env_id, config.num_envs, backend=backend)
    progress = eager_loop.train(env, config)
    next(progress)
    rate = per_second(lambda: next(progress), seconds)
    return {
        "steps_per_second": rate, "threads": threads, "peak_memory_mib": peak_memory_mib(),
        "backend": env.backend,
    }  # fmt: skip
