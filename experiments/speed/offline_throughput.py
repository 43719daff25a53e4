"""Speed of learning from a data set, as a ratio to the same algorithm of d3rlpy in the same run.

Every subject is measured in its own process, one after another, with the same data, network and minibatch; compilation
and construction are excluded. An update of d3rlpy includes drawing its minibatch, as one of ours does; its update
alone, always on the same minibatch, is given next to it. A population of K seeds is one process; d3rlpy trains seeds as
`ess-rl train` does, one per core at a time with one thread each, and that is measured too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ess_rl.child import peak_memory_mib
from ess_rl.errors import UsageError
from experiments import machine, records
from experiments.records import Record
from experiments.report.text import table
from experiments.speed.subjects import apart, noting, per_second, side_by_side


def measure(
    dataset: str,
    agent: str = "awac",
    seeds: tuple[int, ...] = (1, 10),
    hidden: tuple[int, ...] = (256, 256),
    minibatch: int = 256,
    seconds: float = 20.0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    compile: Literal["auto", "on", "off"] = "auto",
    peers: bool = True,
    trust_env_spec: bool = False,
    out: Path | None = None,
) -> Record:
    """Measure and print updates per second, all seeds together.

    Args:
        dataset: a local Minari data set.
        agent: bc, awac, iql or td3_bc; with --no-peers any agent that learns from data.
        seeds: sizes of the populations to measure.
        hidden: relu units of every network, for all subjects.
        minibatch: samples of one update, for all subjects.
        seconds: how long each subject is measured.
        device: where our agents run; auto: cuda if there is one. d3rlpy: the CPU.
        compile: compile our agents; auto: on if a C++ compiler is found.
        peers: also measure d3rlpy.
        trust_env_spec: import the code that the data set's env spec names.
        out: a JSON file to write, after each subject.
    """
    from agents import AGENTS, OFFLINE_AGENTS
    from envs import minari_data
    from experiments import plan
    from experiments.peers import d3rlpy

    if agent not in OFFLINE_AGENTS:
        which = f"{agent} learns by acting: leave out --dataset, or" if agent in AGENTS else f"unknown agent {agent!r}:"
        raise UsageError(f"{which} choose one of {', '.join(OFFLINE_AGENTS)}")
    shape = {"hidden": tuple(hidden), "minibatch": minibatch}
    records.check_positive({"seeds": min(seeds, default=0), "minibatch": minibatch})
    plan.check_numbers(OFFLINE_AGENTS[agent].config(**shape), {})
    if not seconds > 0:
        raise UsageError(f"--seconds {seconds:g}: must be above 0")
    records.check_file(out)
    where, compiled = plan.device_of(device), plan.compiled_of(compile)
    beside = next((name for name, peer in d3rlpy.PEERS.items() if peer.ours == agent), None)
    if peers and beside is None:
        raise UsageError(f"d3rlpy is not measured beside {agent}: give --no-peers")
    if peers:
        d3rlpy.library()
    data = minari_data.load(dataset, trust=trust_env_spec)  # refuses an unavailable set, and flattens a new one
    found: dict[str, Record] = {}
    record = {
        "dataset": dataset, "source": data.source, "agent": agent, "hidden": list(hidden), "minibatch": minibatch,
        "device": where, "compiled": compiled, "subjects": found, **records.origin(),
    }  # fmt: skip

    note = noting(record, "updates_per_second", "updates", out)
    if peers and beside is not None:
        cores = machine.available_cores()
        # One process with one torch thread and with all, the better of the two; and one process per core.
        tried = [apart(_theirs, beside, dataset, shape, seconds / 2, n, trust_env_spec) for n in sorted({1, cores})]
        note(f"{beside}, 1 seed", max(tried, key=lambda one: one["updates_per_second"]))
        if cores > 1:
            several = _several(cores, beside, dataset, shape, seconds / 2, 1, trust_env_spec)
            note(f"{beside}, {cores} seeds, a process each", several)
    for count in seeds:
        name = f"{agent}, {count} seed{'s' * (count > 1)}"
        note(name, apart(_ours, agent, dataset, count, shape, seconds, where, compiled, trust_env_spec))
    print(f"{dataset}, {len(data.transitions.reward):,} transitions, hidden {hidden}, minibatch {minibatch}, {where}")
    print(table(_rows(found)))
    return record


def _rows(found: Record) -> list[list[str]]:
    base = next(iter(found)).split(",")[0]
    rows = [["subject", "updates/s", f"/ {base}", "update alone", "compile s", "MiB"]]
    for name, one in found.items():
        alone = f"{one['update_alone']:,.0f}" if "update_alone" in one else ""
        compiling = f"{one['compile_seconds']:.0f}" if "compile_seconds" in one else ""
        speed = f"{one['updates_per_second']:,.0f}"
        rows.append([name, speed, f"{one['ratio']:.2f}", alone, compiling, f"{one['peak_memory_mib']:,.0f}"])
    return rows


def _ours(
    agent: str, dataset: str, count: int, shape: Record, seconds: float, device: str, compiled: bool, trust: bool
) -> Record:
    """Updates per second of one population, all members together."""
    from agents import OFFLINE_AGENTS
    from envs import minari_data
    from ess_rl import offline
    from ess_rl.offline import OfflinePopulation

    data = minari_data.load(dataset, trust=trust).transitions
    entry = OFFLINE_AGENTS[agent]
    made = entry.agent(entry.config(**shape), data.obs.shape[1], data.action.shape[1])
    population = OfflinePopulation(made, range(count), device=device, compiled=compiled)
    population.describe(data)
    compile_seconds = offline.warm_up(population, data) if compiled else 0.0
    data = data.map(lambda x: x.to(population.device))
    columns, prepared = offline.samples(data, device), population.prepare(data)
    done = 0

    def learn() -> int:
        nonlocal done
        population.updates(columns, done, 32, 10**9, prepared)
        done += 32
        return 32 * count

    learn()
    return {
        "updates_per_second": per_second(learn, seconds, device),
        "compile_seconds": compile_seconds,
        "peak_memory_mib": peak_memory_mib(),
    }


def _theirs(peer: str, dataset: str, shape: Record, seconds: float, threads: int, trust: bool) -> Record:
    """Updates per second of one seed of d3rlpy, with and without drawing its minibatches."""
    import torch

    from envs import minari_data
    from experiments.peers import d3rlpy

    torch.set_num_threads(threads)
    entry = d3rlpy.PEERS[peer]
    data = minari_data.load(dataset, trust=trust).transitions
    learner = d3rlpy.Learner(entry, entry.config(**shape), data, 0, 10**9)

    def learn() -> int:
        for _ in range(8):
            learner.update()
        return 8

    batch = learner.buffer.sample_transition_batch(learner.minibatch)

    def same() -> int:
        for _ in range(8):
            learner.algorithm.update(batch)
        return 8

    learn()
    return {
        "updates_per_second": per_second(learn, seconds),
        "update_alone": per_second(same, seconds / 2),
        "threads": threads,
        "peak_memory_mib": peak_memory_mib(),
    }


def _several(count: int, *arguments: Any) -> Record:
    """Sums of the same in `count` processes at once."""
    parts = side_by_side(count, _theirs, *arguments)
    total = {name: sum(part[name] for part in parts) for name in ("updates_per_second", "update_alone")}
    return {**total, "threads": 1, "peak_memory_mib": sum(part["peak_memory_mib"] for part in parts)}
