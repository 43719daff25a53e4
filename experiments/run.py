"""One run: from a configuration to a folder with everything in it, resumable at any moment.

`start` writes config.json; `carry_on` does the rest from that file alone. So a fresh run and a resumed one are the
same code, and what a run is can be read in its config.json.

Over several processes (torchrun), the first does this and alone knows the folder; the others `follow` it. Everyone's
Config then holds its share of environments and minibatch, config.json the whole. A checkpoint has the first process's
agents, which are everyone's: what differs, the running returns of each one's environments, is zero where environments
begin anew. Of the replay it has all parts.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import struct
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

import envs
from agents import AGENTS
from ess_rl import checkpoint, loop, processes
from ess_rl.contract import Tree, VectorEnv
from ess_rl.errors import UsageError
from ess_rl.population import Population, members
from ess_rl.replay import Replay
from experiments import figures, memory, old_data, past, records
from experiments.display import Display
from experiments.records import Record


def start(agent: str, env_id: str, *, out: Path, overwrite: bool = False, **arguments: Any) -> Path:
    """Check a configuration (see `plan`), make its folder and write config.json. -> the folder

    Raises:
        UsageError: anything in it cannot work, or `out` holds something else. Nothing has been written then.
    """
    record = plan(agent, env_id, **arguments)
    source = record["config"].get("replay_from")
    if source and Path(source).resolve() == out.resolve():
        raise UsageError(f"--replay-from {source} is the folder of this run: choose another --out")
    records.prepare_folder(out, overwrite=overwrite)
    if source:
        old_data.copy(Path(source), out)
    records.write_json(out / "config.json", record)
    return out


def plan(
    agent: str,
    env_id: str,
    *,
    settings: Mapping[str, Any],
    sweep: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    steps: int,
    backend: str = "auto",
    device: str = "auto",
    compiled: str = "auto",
    checkpoints: int = 10,
    episodes: int = 20,
    save_replay: int = 0,
) -> Record:
    """Check a configuration. -> what config.json will hold

    Args:
        settings: fields of the agent's Config that are not at their defaults.
        sweep: float fields with several values; members are all their combinations times the seeds.
        steps: env steps of each member; rounded up to whole iterations.
        compiled: "on", "off", or "auto": on where a C++ compiler and Python's headers are found.
        checkpoints: at most how many, evenly spread. Environments begin anew at each, so they lie at least four
            episodes apart.
        episodes: of the final evaluation, for each member.
        save_replay: how many of the last rollouts to keep in a file.

    Raises:
        UsageError: anything in it cannot work.
    """
    config = AGENTS[agent].config(**settings)
    records.check_positive({"steps": steps, "checkpoints": checkpoints, "episodes": episodes, "seeds": len(seeds)})
    records.check_positive({name: getattr(config, name) for name in ("num_envs", "rollout", "epochs", "minibatch")})
    loop.check_minibatch(config)
    own = _share(config, processes.count())
    counts = {"replay": (config.replay, "older rollouts"), "lag": (config.lag, "iterations")}
    for name, (count, of) in (counts | {"save-replay": (save_replay, "rollouts")}).items():
        if count < 0:
            raise UsageError(f"--{name} {count}: must be 0 or more {of}")
    if any(not 0 <= seed < 2**63 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds {list(seeds)[:3]} ...: give different numbers from 0 to 2^63 - 1")
    _check_numbers(config, sweep)
    probe = envs.make(env_id, 1, backend=backend)  # refuses what cannot be had, before a folder is made
    resolved_backend, episode, dimensions = probe.backend, probe.max_episode_steps, (probe.obs_dim, probe.act_dim)
    older = getattr(config, "replay_from", "")
    file = old_data.check(Path(older), probe, config) if older else 0
    probe.close()
    if episode is None:
        raise UsageError(
            f"{env_id} has no time limit, so an evaluation may never end: register it with max_episode_steps"
        )
    iterations = math.ceil(steps / (config.num_envs * config.rollout))
    if iterations < 2:
        raise UsageError(
            f"--steps {steps} is less than two iterations of {config.num_envs * config.rollout} env steps "
            f"(num_envs {config.num_envs} x rollout {config.rollout}); the first only measures: raise --steps"
        )
    settings_of = members(seeds, sweep)
    where = device_of(device, resolved_backend)
    own_agent = AGENTS[agent].agent(own, *dimensions)
    memory.check(own_agent, own, *dimensions, len(settings_of), where, save_replay, file)
    return {
        "format": records.FORMAT,
        "agent": agent,
        "env": env_id,
        "backend": resolved_backend,
        "seeds": [member["seed"] for member in settings_of],
        "sweep": {name: [member[name] for member in settings_of] for name in sweep},
        "steps": steps,
        "iterations": iterations,
        "processes": processes.count(),
        # Some episodes must have room between two fresh starts, else none would end.
        "reset_every": max(math.ceil(iterations / checkpoints), math.ceil(4 * episode / config.rollout)),
        "episodes": episodes,
        "save_replay": save_replay,
        "device": where,
        "compiled": compiled_of(compiled),
        "config": dataclasses.asdict(config),
        **records.origin(),
    }


def carry_on(run: Path) -> Record:
    """Train what is left of a run, evaluate it and write its result. -> the result

    Raises:
        UsageError: the folder, its configuration or its newest checkpoint is not usable, or there are more or fewer
            processes than the run began with.
        NonFiniteError: training diverged; checkpoints written before stay.
    """
    with records.alone(run):
        config = records.read_config(run)
        if (run / "result.json").exists():
            return records.read_json(run / "result.json")
        if (began := config.get("processes", 1)) != processes.count():
            how = "'ess-rl resume" if began == 1 else f"'torchrun --nproc-per-node {began} -m experiments resume"
            raise UsageError(
                f"{run} was begun with {began} process{'es' * (began > 1)}, not {processes.count()}: "
                f"{how} {run}' goes on with it"
            )
        return _carry_on(run, config)


def _carry_on(run: Path, config: Record) -> Record:
    population, env, replay = _parts(config)
    for name in dataclasses.asdict(population.agent.config):
        if name not in config["config"]:  # its default may not be what the run began with
            raise UsageError(
                f"{run / 'config.json'} has no {name!r}, which {config['agent']} has by now: go on with the version "
                f"that began it (git commit {config.get('git_commit')})"
            )
    iteration = _load_newest(run, config, population)
    begins_from, raised = past.read(run, config, replay, population, iteration)
    processes.tell({"config": config, "iteration": iteration})
    rows = records.cut_metrics(run, iteration)
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
    trained = rows[-1]["seconds"] if rows else 0.0
    print(describe(config), flush=True)
    if raised is not None:
        steps = int(begins_from["replay"]["size"])
        print(old_data.describe(config["config"]["replay_from"], steps, sum(raised)), flush=True)
    progress, compile_seconds = _train(config, population, env, replay, iteration, begins_from)
    del begins_from  # a replay may be large
    writer = SummaryWriter(str(run / "tensorboard"))
    for row in rows:
        _tensorboard(writer, row)
    with open(run / "metrics.jsonl", "a") as log, Display(config, iteration) as display:
        for done in progress:
            trained += sum(done.seconds.values())
            row = _row(done, trained)
            if done.iteration == 1 and raised is not None:
                row["behavior_std_raised"] = raised
            rows.append(row)
            records.append_line(log, row)
            _tensorboard(writer, row)
            display.update(row)
            if _is_checkpoint(config, done):
                _save(run, config, population, replay, done)
    writer.close()
    if config.get("save_replay"):
        old_data.save(run, old_data.last(replay, config), env, config)
    env.close()

    figures.learning_curves([run], run / "curve.png")
    returns = evaluate(population, config, config["episodes"])
    result = {
        "format": records.FORMAT,
        **{name: config[name] for name in ("agent", "env", "backend", "seeds", "sweep", "device", "compiled")},
        "env_steps": rows[-1]["env_steps"],
        "final_return": returns.mean(1).tolist(),
        "training_return": training_return(rows),
        "episodes": config["episodes"],
        "steps_per_second": rows[-1]["env_steps"] * population.size / trained,
        "training_seconds": trained,
        "compile_seconds": compile_seconds,
        "seconds": {name: sum(row["phases"][name] for row in rows) for name in rows[-1]["phases"]},
        "peak_memory_mib": records.peak_memory_mib(),
        **records.origin(),
    }
    records.write_json(run / "result.json", result)
    return result


def follow() -> None:
    """What all processes but the first do: train in step with it, and write nothing. Returns if it trains nothing.

    Raises:
        UsageError, NonFiniteError: as `carry_on`.
    """
    task = processes.hear()
    if task is None:
        return
    config = task["config"]
    population, env, replay = _parts(config)
    room = past.room(config, replay, population, task["iteration"])
    progress, _ = _train(config, population, env, replay, task["iteration"], room)
    del room
    for done in progress:
        if _is_checkpoint(config, done):
            past.tree(config, replay, population)  # the first process writes it
    if config.get("save_replay"):
        old_data.last(replay, config)  # and this
    env.close()


def _parts(config: Record) -> tuple[Population, VectorEnv, Replay]:
    """The untrained population of a run, its environments and its replay: this process's share of them."""
    population, agent_config = restore_population(config)
    env = envs.make(
        config["env"], population.size * agent_config.num_envs, backend=config["backend"], device=config["device"]
    )
    capacity = past.rollouts_kept(config) * agent_config.rollout
    replay = Replay(capacity, population.size, agent_config.num_envs, env.obs_dim, env.act_dim, population.device)
    return population, env, replay


def _train(
    config: Record, population: Population, env: VectorEnv, replay: Replay, iteration: int, begins_from: Tree
) -> tuple[Iterator[loop.Progress], float]:
    """Take up what the first process read, and compile. -> (the iterations that are left, seconds of compilation)"""
    if iteration > 0:
        population.state = processes.of_first(population.state)
    past.take_up(begins_from, replay, population)
    compile_seconds = 0.0
    if population.compiled and iteration < config["iterations"]:
        print("compiling ...", end=" ", flush=True)
        compile_seconds = loop.warm_up(population, env)
        print(f"{compile_seconds:.0f} s", flush=True)
    progress = loop.train(
        population,
        env,
        replay,
        iterations=config["iterations"],
        reset_every=config["reset_every"],
        start=iteration,
    )
    return progress, compile_seconds


def _is_checkpoint(config: Record, done: loop.Progress) -> bool:
    return done.iteration % config["reset_every"] == 0 or done.iteration == config["iterations"]


def restore_population(config: Record) -> tuple[Population, Any]:
    """The untrained population that a config.json describes, and its agent's Config: of one of its processes."""
    name = config.get("agent")
    if name not in AGENTS:
        raise UsageError(f"config.json: agent {name!r} is not known here; there are {', '.join(AGENTS)}")
    entry = AGENTS[name]
    try:
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in config["config"].items()}
        agent_config = _share(entry.config(**values), config.get("processes", 1))
        probe = envs.make(config["env"], 1, backend=config["backend"])
        agent = entry.agent(agent_config, probe.obs_dim, probe.act_dim)
        probe.close()
        population = Population(
            agent, config["seeds"], config["sweep"], device=device_of(config["device"], ""), compiled=config["compiled"]
        )
    except (KeyError, TypeError) as error:
        raise UsageError(f"config.json does not fit this version of {name}: {error}") from None
    return population, agent_config


def load_run(run: Path) -> tuple[Population, Record, int]:
    """A trained population from a run folder, for evaluation. -> (population, config, iteration of its checkpoint)"""
    config = records.read_config(run) | {"compiled": False, "device": "cpu"}  # evaluation is small
    population, _ = restore_population(config)
    iteration = _load_newest(run, config, population)
    if iteration == 0:
        raise UsageError(f"{run} has no checkpoint yet: 'ess-rl resume {run}' goes on with it")
    return population, config, iteration


def evaluate(population: Population, config: Record, episodes: int, seed: int = 0) -> Tensor:
    """Returns [P, episodes] of the mean action, with frozen statistics, in environments of their own."""
    env: VectorEnv = envs.make(
        config["env"], population.size * episodes, backend=config["backend"], device=config["device"]
    )
    try:
        return loop.evaluate(population, env, seed=seed)
    finally:
        env.close()


def training_return(rows: Sequence[Record]) -> list[float | None]:
    """Mean return of the episodes that ended in the last tenth of training, one number a member.

    With exploration noise, and of all the policies of that stretch. None for a member in which none ended.
    """
    late = [row for row in rows if row["env_steps"] > 0.9 * rows[-1]["env_steps"]]
    sums = [sum(row["return_sum"][m] for row in late) for m in range(len(late[0]["episodes"]))]
    counts = [sum(row["episodes"][m] for row in late) for m in range(len(sums))]
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]


def describe(config: Record) -> str:
    """One line: what runs, on what."""
    size = len(config["seeds"])
    how = "compiled" if config["compiled"] else "eager"
    several = config.get("processes", 1)
    apart = config["device"] == "cuda" and config["backend"] in ("envpool", "gymnasium")
    return (
        f"{config['agent']} on {config['env']} (backend {config['backend']}): {size} member{'s' * (size > 1)}, "
        f"{config['steps']:,} env steps each, device {config['device']}{' (physics on the CPU)' * apart}, {how}"
        + (f", {several} processes" if several > 1 else "")
    )


def _fingerprint(config: Record) -> Record:
    """What a checkpoint must share with the configuration to be taken for its own."""
    names = ("agent", "env", "backend", "seeds", "sweep", "iterations", "reset_every", "processes", "config")
    return {name: config.get(name) for name in names}


def _save(run: Path, config: Record, population: Population, replay: Replay, done: loop.Progress) -> None:
    path = run / "checkpoints" / f"{done.env_steps:09d}.safetensors"
    if beside := past.tree(config, replay, population):
        checkpoint.save(records.replay_of(path), beside, {"iteration": done.iteration})
    checkpoint.save(path, population.state, {"iteration": done.iteration, "of": _fingerprint(config)})
    records.drop_old_replays(run)


def _load_newest(run: Path, config: Record, population: Population) -> int:
    """-> the iteration of the newest checkpoint, 0 if there is none"""
    found = records.checkpoints(run)
    if not found:
        return 0
    state, info = checkpoint.load(found[-1], population.state, population.device)
    for name, value in _fingerprint(config).items():
        if info["of"].get(name) != value:
            raise UsageError(
                f"{found[-1]} belongs to another run: its {name!r} is {info['of'].get(name)!r}, not {value!r}"
            )
    population.state = state
    return info["iteration"]


def _row(done: loop.Progress, trained: float) -> Record:
    return {
        "iteration": done.iteration,
        "env_steps": done.env_steps,
        "seconds": trained,
        "phases": done.seconds,
        "episodes": done.episodes.tolist(),
        "return_sum": done.return_sum.tolist(),
        **{name: x.tolist() for name, x in done.metrics.items()},
    }


def _tensorboard(writer: SummaryWriter, row: Record) -> None:
    """Each member's return, and the other metrics as means over the members."""
    for member, (total, count) in enumerate(zip(row["return_sum"], row["episodes"], strict=True)):
        if count:
            writer.add_scalar(f"return/member_{member}", total / count, row["env_steps"])
    for name, values in row.items():
        if isinstance(values, list) and name not in ("return_sum", "episodes"):
            writer.add_scalar(f"train/{name}", sum(values) / len(values), row["env_steps"])


def _share(config: Any, count: int) -> Any:
    """The Config of one of `count` processes that share a run."""
    for name in ("num_envs", "minibatch"):
        if getattr(config, name) % count:
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(config, name)} over {count} processes: must be a multiple of "
                f"{count}, for each has an equal share"
            )
    if count == 1:
        return config
    return dataclasses.replace(config, num_envs=config.num_envs // count, minibatch=config.minibatch // count)


# What a number must be, where not every finite one will do.
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "behavior_temperature": (lambda x: x > 0.0, "above 0"),
    "keep_ess": (lambda x: 0.0 <= x < 1.0, "from 0 to below 1"),
    "target_kl": (lambda x: x > 0.0, "above 0"),
}


def _check_numbers(config: Any, sweep: Mapping[str, Sequence[float]]) -> None:
    """Refuse numbers that no run can use, and values that would make two members the same."""
    for name, (fits, rule) in _RANGES.items():
        for value in [*([getattr(config, name)] if hasattr(config, name) else []), *sweep.get(name, ())]:
            if math.isfinite(value) and not fits(value):
                raise UsageError(f"--{name.replace('_', '-')} {value:g}: must be {rule}")
    for field in dataclasses.fields(config):
        value: Any = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{field.name.rstrip('_')} {value}: must be a finite number")
    if not config.hidden or min(config.hidden) < 1:
        raise UsageError(f"--hidden {config.hidden}: name at least one layer, of at least 1 unit each")
    for name, values in sweep.items():
        if not all(math.isfinite(value) for value in values):
            raise UsageError(f"--{name.rstrip('_')} {values}: must be finite numbers")
        if len({struct.pack("f", value) for value in values}) < len(values):
            raise UsageError(f"--{name.rstrip('_')} {values}: equal values would train the same member twice")


def device_of(asked: str, backend: str) -> str:
    """auto: cuda where there is one and the environments run on it too, else the CPU."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() and backend in ("torch", "warp") else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: this torch sees no CUDA device; use --device cpu, or install a CUDA build of torch"
        )
    if asked == "cuda" and processes.beside() > torch.cuda.device_count():
        raise UsageError(
            f"{processes.beside()} processes for {torch.cuda.device_count()} CUDA devices of this machine: "
            "give torchrun no more processes than devices, or use --device cpu"
        )
    return asked


def compiled_of(asked: str) -> bool:
    """auto: where torch.compile finds what it needs on the CPU, a C++ compiler and Python's headers."""
    compiler = any(shutil.which(name) for name in ("g++", "clang++", "cl"))
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    found = compiler and headers
    if asked == "on" and not found:
        missing = (
            "Python's headers were not found; install python3-dev"
            if compiler
            else "no C++ compiler was found; install g++"
        )
        raise UsageError(f"--compile on: {missing}, or use --compile off")
    return asked == "on" or (asked == "auto" and found)
