"""One run: from a configuration to a folder with everything in it, resumable at any moment.

`start` writes config.json; `carry_on` does the rest from that file alone. So a fresh run and a resumed one are the
same code, and what a run is can be read in its config.json.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import struct
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

import envs
from agents import AGENTS, OFFLINE_AGENTS
from envs import minari_env
from ess_rl import checkpoint, loop
from ess_rl.contract import VectorEnv
from ess_rl.errors import UsageError
from ess_rl.offline import OfflinePopulation
from ess_rl.population import Population, members
from ess_rl.replay import Replay
from experiments import figures, memory, records
from experiments.display import Display
from experiments.records import Record


def start(agent: str, env_id: str, *, out: Path, overwrite: bool = False, **arguments: Any) -> Path:
    """Check a configuration (see `plan`), make its folder and write config.json. -> the folder

    Raises:
        UsageError: anything in it cannot work, or `out` holds something else. Nothing has been written then.
    """
    record = plan(agent, env_id, **arguments)
    records.prepare_folder(out, overwrite=overwrite)
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

    Raises:
        UsageError: anything in it cannot work.
    """
    config = AGENTS[agent].config(**settings)
    records.check_positive({"steps": steps, "checkpoints": checkpoints, "episodes": episodes, "seeds": len(seeds)})
    records.check_positive({name: getattr(config, name) for name in ("num_envs", "rollout", "epochs", "minibatch")})
    loop.check_minibatch(config)
    for name, of in (("replay", "older rollouts"), ("lag", "iterations")):
        if getattr(config, name) < 0:
            raise UsageError(f"--{name} {getattr(config, name)}: must be 0 or more {of}")
    check_seeds(seeds)
    check_numbers(config, sweep)
    probe = envs.make(env_id, 1, backend=backend)  # refuses what cannot be had, before a folder is made
    resolved_backend, episode, dimensions = probe.backend, probe.max_episode_steps, (probe.obs_dim, probe.act_dim)
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
    agent_made = AGENTS[agent].agent(config, *dimensions)
    memory.check(agent_made, config, *dimensions, len(settings_of), where)
    return {
        "format": records.FORMAT,
        "agent": agent,
        "env": env_id,
        "backend": resolved_backend,
        "seeds": [member["seed"] for member in settings_of],
        "sweep": {name: [member[name] for member in settings_of] for name in sweep},
        "steps": steps,
        "iterations": iterations,
        # Some episodes must have room between two fresh starts, else none would end.
        "reset_every": max(math.ceil(iterations / checkpoints), math.ceil(4 * episode / config.rollout)),
        "episodes": episodes,
        "device": where,
        "compiled": compiled_of(compiled),
        "config": dataclasses.asdict(config),
        **records.origin(),
    }


def carry_on(run: Path) -> Record:
    """Train what is left of a run, evaluate it and write its result. -> the result

    Raises:
        UsageError: the folder, its configuration or its newest checkpoint is not usable.
        NonFiniteError: training diverged; checkpoints written before stay.
    """
    with records.alone(run):
        config = records.read_config(run)
        if (run / "result.json").exists():
            return records.read_json(run / "result.json")
        return _carry_on(run, config)


def _carry_on(run: Path, config: Record) -> Record:
    population, agent_config = restore_population(config)
    for name in dataclasses.asdict(agent_config):
        if name not in config["config"]:  # its default may not be what the run began with
            raise UsageError(
                f"{run / 'config.json'} has no {name!r}, which {config['agent']} has by now: go on with the version "
                f"that began it (git commit {config.get('git_commit')})"
            )
    env = envs.make(
        config["env"], population.size * agent_config.num_envs, backend=config["backend"], device=config["device"]
    )
    capacity = (1 + agent_config.replay) * agent_config.rollout
    replay = Replay(capacity, population.size, agent_config.num_envs, env.obs_dim, env.act_dim, population.device)
    iteration = load_newest(run, config, population)
    if iteration > 0 and _keeps_the_past(agent_config):
        path = _past_path(records.checkpoints(run)[-1])
        past, _ = checkpoint.load(path, _past(replay, population), population.device)
        replay.load(past["replay"])
        population.behind = list(past.get("behind", {}).values())  # an empty tree has no tensors to save
    rows = records.cut_metrics(run, iteration)
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
    trained = rows[-1]["seconds"] if rows else 0.0
    print(describe(config), flush=True)

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
    writer = SummaryWriter(str(run / "tensorboard"))
    for row in rows:
        tensorboard(writer, row)
    with open(run / "metrics.jsonl", "a") as log, Display(config, iteration) as display:
        for done in progress:
            trained += sum(done.seconds.values())
            row = _row(done, trained)
            rows.append(row)
            records.append_line(log, row)
            tensorboard(writer, row)
            display.update(row)
            if done.iteration % config["reset_every"] == 0 or done.iteration == config["iterations"]:
                _save(run, config, population, replay, done)
    writer.close()
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


def restore_population(config: Record) -> tuple[Any, Any]:
    """The untrained population that a config.json describes (online or offline), and its agent's Config."""
    name, known = config.get("agent"), AGENTS | OFFLINE_AGENTS
    if name not in known:
        raise UsageError(f"config.json: agent {name!r} is not known here; there are {', '.join(known)}")
    entry, kind = known[name], OfflinePopulation if name in OFFLINE_AGENTS else Population
    try:
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in config["config"].items()}
        agent_config = entry.config(**values)
        probe = envs.make(config["env"], 1, backend=config["backend"], **config.get("env_options", {}))
        agent = entry.agent(agent_config, probe.obs_dim, probe.act_dim)
        probe.close()
        population = kind(
            agent, config["seeds"], config["sweep"], device=device_of(config["device"], ""), compiled=config["compiled"]
        )
    except (KeyError, TypeError) as error:
        raise UsageError(f"config.json does not fit this version of {name}: {error}") from None
    return population, agent_config


def load_run(run: Path, *, trust: bool = False) -> tuple[Any, Record, int]:
    """A trained population from a run folder, for evaluation. -> (population, config, iteration of its checkpoint)"""
    population, config, iteration, _ = load_checkpoint(run, trust=trust)
    return population, config, iteration


def load_checkpoint(run: Path, steps: int | None = None, *, trust: bool = False) -> tuple[Any, Record, int, Path]:
    """As `load_run`, from the checkpoint nearest to `steps`; None: the newest. -> (..., the checkpoint's file)"""
    config = records.read_config(run) | {"compiled": False, "device": "cpu"}  # evaluation is small
    trust_spec(config, trust)
    population, _ = restore_population(config)
    found = records.checkpoints(run)
    if not found:
        raise UsageError(f"{run} has no checkpoint yet: 'ess-rl resume {run}' goes on with it")
    path = found[-1] if steps is None else min(found, key=lambda path: abs(int(path.stem) - steps))
    return population, config, _load(path, config, population), path


def trust_spec(config: Record, trust: bool) -> None:
    """Make the task known that a data set's own env spec describes.

    Raises:
        UsageError: there is such a spec, which names code of whoever wrote the set, and it is not trusted.
    """
    if config.get("env_spec"):
        if not trust:
            raise UsageError(
                f"the env spec of {config['dataset']} names code that is not registered: --trust-env-spec imports it"
            )
        minari_env.register_trusted(config["env_spec"])


def evaluate(population: Population | OfflinePopulation, config: Record, episodes: int, seed: int = 0) -> Tensor:
    """Returns [P, episodes] of the mean action, with frozen statistics, in environments of their own."""
    env: VectorEnv = envs.make(
        config["env"],
        population.size * episodes,
        backend=config["backend"],
        device=config["device"],
        **config.get("env_options", {}),
    )
    try:
        return loop.evaluate(population, env, seed=seed)
    finally:
        env.close()


def training_return(rows: Sequence[Record]) -> list[float | None]:
    """Mean return of the episodes that ended in the last tenth of training, one number a member.

    With exploration noise, and of all the policies of that stretch. None for a member in which none ended.
    """
    late = [row for row in rows if records.steps_of(row) > 0.9 * records.steps_of(rows[-1])]
    sums = [sum(row["return_sum"][m] for row in late) for m in range(len(late[0]["episodes"]))]
    counts = [sum(row["episodes"][m] for row in late) for m in range(len(sums))]
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]


def describe(config: Record) -> str:
    """One line: what runs, on what."""
    size = len(config["seeds"])
    how = "compiled" if config["compiled"] else "eager"
    apart = config["device"] == "cuda" and config["backend"] in ("envpool", "gymnasium")
    task = f"{config['dataset']}, evaluated in {config['env']}" if config.get("dataset") else config["env"]
    return (
        f"{config['agent']} on {task} (backend {config['backend']}): {size} member{'s' * (size > 1)}, "
        f"{config['steps']:,} {records.unit(config)} each, device {config['device']}{' (physics on the CPU)' * apart}, "
        f"{how}"
    )


def fingerprint(config: Record) -> Record:
    """What a checkpoint must share with the configuration to be taken for its own."""
    names = ("agent", "env", "backend", "seeds", "sweep", "iterations", "reset_every", "config", "dataset", "source")
    return {name: config.get(name) for name in names}


def _save(run: Path, config: Record, population: Population, replay: Replay, done: loop.Progress) -> None:
    path = run / "checkpoints" / f"{done.env_steps:09d}.safetensors"
    if _keeps_the_past(population.agent.config):
        checkpoint.save(_past_path(path), _past(replay, population), {"iteration": done.iteration})
    checkpoint.save(path, population.state, {"iteration": done.iteration, "of": fingerprint(config)})
    for old in records.checkpoints(run)[:-2]:  # a replay is large; two remain, should the newest be damaged
        _past_path(old).unlink(missing_ok=True)


def _keeps_the_past(config: Any) -> bool:
    """Whether a run goes on from more than its agents. A fresh rollout is not needed again: it was learned from."""
    return config.replay > 0 or config.lag > 0


def _past(replay: Replay, population: Population) -> dict[str, Any]:
    """Rollouts to learn from again, and policies that are still to act."""
    behind = {str(k): state for k, state in enumerate(population.behind)}
    return {"replay": replay.state(), "behind": behind}


def _past_path(checkpoint_path: Path) -> Path:
    """Where that lies for a checkpoint."""
    return checkpoint_path.with_suffix(".replay")


def load_newest(run: Path, config: Record, population: Any) -> int:
    """-> the iteration of the newest checkpoint, 0 if there is none"""
    found = records.checkpoints(run)
    return _load(found[-1], config, population) if found else 0


def _load(path: Path, config: Record, population: Any) -> int:
    """-> the iteration of this checkpoint"""
    state, info = checkpoint.load(path, population.state, population.device)
    for name, value in fingerprint(config).items():
        if info["of"].get(name) != value:
            raise UsageError(f"{path} belongs to another run: its {name!r} is {info['of'].get(name)!r}, not {value!r}")
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


def tensorboard(writer: SummaryWriter, row: Record) -> None:
    """Each member's return, and the other metrics as means over the members."""
    for member, (total, count) in enumerate(zip(row["return_sum"], row["episodes"], strict=True)):
        if count:
            writer.add_scalar(f"return/member_{member}", total / count, records.steps_of(row))
    for name, values in row.items():
        if isinstance(values, list) and name not in ("return_sum", "episodes"):
            writer.add_scalar(f"train/{name}", sum(values) / len(values), records.steps_of(row))


# What a number must be, where not every finite one will do.
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "behavior_temperature": (lambda x: x > 0.0, "above 0"),
    "ess_floor": (lambda x: 0.0 <= x < 1.0, "from 0 to below 1"),
    "target_kl": (lambda x: x > 0.0, "above 0"),
    "temperature": (lambda x: x > 0.0, "above 0"),
    "inverse_temperature": (lambda x: x > 0.0, "above 0"),
    "policy_noise": (lambda x: x > 0.0, "above 0"),
    "expectile": (lambda x: 0.0 < x < 1.0, "between 0 and 1"),
    "cloning": (lambda x: 0.0 <= x < 1.0, "from 0 to below 1"),
    "tau": (lambda x: 0.0 < x <= 1.0, "above 0 and at most 1"),
    "return_range": (lambda x: x >= 0.0, "0 or more"),
}


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises UsageError for a seed that is none, or is there twice."""
    if any(not 0 <= seed < 2**63 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds {list(seeds)[:3]} ...: give different numbers from 0 to 2^63 - 1")


def check_numbers(config: Any, sweep: Mapping[str, Sequence[float]]) -> None:
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
        return "cuda" if torch.cuda.is_available() and backend in ("torch", "warp") else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: this torch sees no CUDA device; use --device cpu, or install a CUDA build of torch"
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
