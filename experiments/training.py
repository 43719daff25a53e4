"""From a configuration to the iterations of a run, in any number of processes.

There are three mutually exclusive ways to use more than one process: torchrun's processes share each member's
environments and minibatches (`ess_rl.processes`); `--async` has one that collects (`ess_rl.asynchronous`); `--split K`
gives each of K processes some of the members, which need nothing from each other. Each process then has its share of
the cores, and neither simulators nor updates wait for a core that another has: the way to use all cores of a machine
for many seeds. A member draws and computes the same whatever its neighbors are, so it equals that of a run in one
process, bit for bit if torch has as many threads there (and each process two members or more: sums over a single one
are ordered differently).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import envs
from agents import AGENTS, OFFLINE_AGENTS
from ess_rl import loop, processes
from ess_rl.asynchronous import ProcessCollector
from ess_rl.child import Child, Parent, close
from ess_rl.contract import Tree, VectorEnv
from ess_rl.errors import UsageError
from ess_rl.offline import OfflinePopulation
from ess_rl.population import Population
from ess_rl.replay import Replay
from experiments import demonstrations, machine, past, plan
from experiments.records import Record


@dataclass
class Begun:
    """Where a run starts or resumes, apart from its population. Its trees may be large, so `take` empties them."""

    iteration: int
    past: Tree  # see `experiments.past`
    demonstrations: Tree  # see `experiments.demonstrations`

    def take(self) -> tuple[Tree, Tree]:
        taken, self.past, self.demonstrations = (self.past, self.demonstrations), {}, {}
        return taken


@dataclass(frozen=True)
class Training:
    """The remaining iterations of a run."""

    # At a checkpoint (`is_checkpoint`) population and replay are those of the run, whichever process trained them.
    progress: Iterator[loop.Progress]
    compile_seconds: float
    children: Sequence[Child] = ()  # processes that this one started

    def peak_memory_mib(self) -> float:
        """The peak memory of the children, summed."""
        return sum(child.peak_memory_mib for child in self.children)


def parts(config: Record) -> tuple[Population, VectorEnv, Replay]:
    """The untrained population of a run, its environments and its replay: this process's share of them."""
    population, env = _population_and_env(config)
    own = population.agent.config
    capacity = past.rollouts_kept(own, config) * own.rollout
    replay = Replay(capacity, population.size, own.num_envs, env.obs_dim, env.act_dim, population.device)
    return population, env, replay


def is_checkpoint(config: Record, iteration: int) -> bool:
    """Return whether a run is saved after this iteration, or this stretch of one on a data set."""
    return iteration % config["reset_every"] == 0 or iteration == config["iterations"]


def threads_of(config: Record) -> int:
    """Threads of torch that each process of a run has here. They decide the order of sums, and so the last bits."""
    if (count := config.get("split", 1)) > 1:
        return max(1, machine.available_cores() // count)
    return torch.get_num_threads()


def compiling(work: Callable[[], float]) -> float:
    """Call `work`, which returns the seconds of compilation, between the two halves of a line that says so."""
    print("compiling ...", end=" ", flush=True)
    seconds = work()
    print(f"{seconds:.0f} s", flush=True)
    return seconds


@contextmanager
def training(
    config: Record, population: Population, env: VectorEnv, replay: Replay, begun: Begun
) -> Iterator[Training]:
    """Compile, and train from where the run stands. Any other processes that it starts end with the context."""
    goes_on = begun.iteration < config["iterations"]
    if goes_on and config.get("split", 1) > 1:
        with _split(config, population, replay, begun) as found:
            yield found
    elif goes_on and config.get("asynchronous"):
        with _collector(config, population, env) as collector:
            found = _here(config, population, env, replay, begun, collector)
            yield replace(found, children=[collector.child])
    else:
        yield _here(config, population, env, replay, begun)


def _here(
    config: Record,
    population: Population,
    env: VectorEnv,
    replay: Replay,
    begun: Begun,
    collector: ProcessCollector | None = None,
) -> Training:
    """Load what the first process read, and compile."""
    if begun.iteration > 0:
        population.state = processes.broadcast(population.state)
    older, shown = begun.take()
    past.take_up(older, replay, population)
    demonstrations.take_up(shown, population, begun.iteration)
    del older, shown
    if begun.iteration == config["iterations"]:  # only the result is missing; `env` may be one that cannot train
        return Training(iter(()), 0.0)
    compile_seconds = 0.0
    if population.compiled:
        compile_seconds = compiling(lambda: loop.warm_up(population, env, acts=collector is None))
    if collector is not None:
        collector.ready()
    progress = loop.train(
        population,
        env,
        replay,
        iterations=config["iterations"],
        reset_every=config["reset_every"],
        start=begun.iteration,
        collector=collector,
    )
    return Training(progress, compile_seconds)


@contextmanager
def _collector(config: Record, population: Population, env: VectorEnv) -> Iterator[ProcessCollector]:
    """The process that collects.

    The calling process then uses half of torch's threads: those that wait for work spin, on CPUs that the other process
    needs. With all of them, ten HalfCheetahs on two CPUs were slower than without the other process.
    """
    collector = ProcessCollector(partial(_acting_parts, config), population, env, config["config"]["rollout"])
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        yield collector
    finally:
        torch.set_num_threads(threads)
        collector.close()


def _acting_parts(config: Record) -> tuple[Population, VectorEnv]:
    """What the collecting process needs: a population that acts with the state it is given, and the environments."""
    settings = {**config["config"], "lag": 0, "sync_interval": 1}
    return _population_and_env({**config, "device": "cpu", "config": settings})


@contextmanager
def _split(config: Record, population: Population, replay: Replay, begun: Begun) -> Iterator[Training]:
    """One process for each part of the members, each on its own cores."""
    count, cores, threads = config["split"], machine.available_cores(), threads_of(config)
    shares = shares_of(population.size, count)
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    children = []
    try:
        for k, share in enumerate(shares):
            own = cpus[k * cores // count : (k + 1) * cores // count] or cpus[k % cores :][:1]  # if few, one each
            name = f"the process of members {share.start} to {share.stop - 1}"
            children.append(Child(name, _serve, _of_members(config, share), share.start, threads=threads, cpus=own))
        older, shown = begun.take()
        for child, share in zip(children, shares, strict=True):
            state = tree_map(lambda x, share=share: x.narrow(0, share.start, len(share)), population.state)
            past_of = _along_members(lambda x, dim, share=share: x.narrow(dim, share.start, len(share)), older)
            child.ask(_to_numpy((state, begun.iteration, past_of, shown)))
        del older, shown

        def ready() -> float:
            return max(child.answer() for child in children)

        compile_seconds = compiling(ready) if population.compiled else ready()
        yield Training(_in_step(config, population, replay, begun.iteration, children), compile_seconds, children)
    finally:
        close(children)


def shares_of(members: int, count: int) -> list[range]:
    """The members in each of `count` processes, in parts as equal as possible."""
    return [range(k * members // count, (k + 1) * members // count) for k in range(count)]


def _in_step(
    config: Record, population: Population, replay: Replay, iteration: int, children: Sequence[Child]
) -> Iterator[loop.Progress]:
    took = [0.0] * len(children)  # seconds of each process so far: none waits for the others
    for _ in range(iteration, config["iterations"]):
        parts = [child.answer() for child in children]
        before, progress = max(took), [loop.Progress(**_to_torch(part["progress"])) for part in parts]
        took = [total + sum(part.seconds.values()) for total, part in zip(took, progress, strict=True)]
        done = _merged(progress, max(took) - before)
        if is_checkpoint(config, done.iteration):
            states, pasts = ([_to_torch(part[name]) for part in parts] for name in ("state", "past"))
            population.state = tree_map(lambda *x: torch.cat(x), *states)
            past.take_up(_along_members(lambda *x: torch.cat(x[:-1], x[-1]), *pasts), replay, population)
        yield done
        if _waits(config, done):
            for child in children:
                child.ask("go on")


def _waits(config: Record, done: loop.Progress) -> bool:
    """Return whether the processes wait until all have come this far and the run is saved: otherwise one could have
    finished by then, with its messages still waiting in the pipe."""
    return is_checkpoint(config, done.iteration) and done.iteration < config["iterations"]


def _merged(parts: Sequence[loop.Progress], seconds: float) -> loop.Progress:
    """The progress of all members in `seconds`, merged from that of each part of them."""
    phases = {name: sum(part.seconds[name] for part in parts) for name in parts[0].seconds}
    return replace(
        parts[0],
        metrics={name: torch.cat([part.metrics[name] for part in parts]) for name in parts[0].metrics},
        episodes=torch.cat([part.episodes for part in parts]),
        return_sum=torch.cat([part.return_sum for part in parts]),
        seconds={name: seconds * phase / sum(phases.values()) for name, phase in phases.items()},
    )


def _along_members(function: Callable[..., Tensor], *pasts: Tree) -> Tree:
    """Apply function(*tensors, their dimension of members) to what `experiments.past` holds, one or several of them."""
    first = pasts[0]
    if not first:  # a run that needs none
        return {}
    stores = [tree["replay"]["store"] for tree in pasts]
    store = {name: function(*(store[name] for store in stores), 1) for name in stores[0]}
    behind = {}
    if "behind" in first:  # a tree without tensors is not saved
        behind = {"behind": tree_map(lambda *x: function(*x, 0), *(tree["behind"] for tree in pasts))}
    return {"replay": {**first["replay"], "store": store}, **behind}


def _of_members(config: Record, share: range) -> Record:
    """The configuration of only some of a run's members."""
    of = slice(share.start, share.stop)
    sweep = {name: values[of] for name, values in config["sweep"].items()}
    return {**config, "seeds": config["seeds"][of], "sweep": sweep, "split": 1}


def _serve(parent: Parent, config: Record, first_member: int) -> None:
    """The other process: all iterations of its members, and its part of each checkpoint."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as there is something to print)
    population, env, replay = parts(config)
    population.first_member = first_member
    population.state, *begun = _to_torch(parent.hear())
    found = _here(config, population, env, replay, Begun(*begun))
    del begun
    parent.tell(found.compile_seconds)
    for done in found.progress:
        told: dict[str, Any] = {"progress": vars(done)}
        if is_checkpoint(config, done.iteration):
            told |= {"state": population.state, "past": past.tree(config, replay, population)}
        parent.tell(_to_numpy(told))
        if _waits(config, done):
            parent.hear()


def _to_numpy(tree: Any) -> Any:
    """Convert tensors to arrays, which a pipe copies; tensors would stay alive in both processes' memory."""
    return tree_map(lambda x: x.numpy() if isinstance(x, Tensor) else x, tree)


def _to_torch(tree: Any) -> Any:
    return tree_map(lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x, tree)


def _population_and_env(config: Record) -> tuple[Population, VectorEnv]:
    population = restore_population(config)
    if config.get("split", 1) > 1:  # one that only describes the task: other processes act
        return population, envs.make(config["env"], 1, backend=config["backend"], device=config["device"])
    own = population.agent.config
    where = {"backend": config["backend"], "device": config["device"]}
    return population, envs.make_for(own, config["env"], population.size * own.num_envs, **where)


def restore_population(config: Record) -> Any:
    """The untrained population that a config.json describes, online or offline.

    With several processes: this one's share.
    """
    name, known = config.get("agent"), AGENTS | OFFLINE_AGENTS
    if name not in known:
        raise UsageError(
            f"a run of {name!r} has scores in its result.json, but no policy that could act or learn here: "
            f"config.json names an agent that is none of {', '.join(known)}"
        )
    entry, kind = known[name], OfflinePopulation if name in OFFLINE_AGENTS else Population
    try:
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in config["config"].items()}
        agent_config = plan.share(entry.config(**values), config.get("processes", 1))
        probe = envs.make(config["env"], 1, backend=config["backend"], **config.get("env_options", {}))
        agent = entry.agent(agent_config, probe.obs_dim, probe.act_dim)
        probe.close()
        where = plan.device_of(config["device"])
        return kind(agent, config["seeds"], config["sweep"], device=where, compiled=config["compiled"])
    except (KeyError, TypeError) as error:
        raise UsageError(f"config.json does not fit this version of {name}: {error}") from None
