"""The plan of a run, checked before a folder is made: from the command line's values to what config.json holds."""

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

import envs
from agents import AGENTS
from ess_rl import batches, loop, processes
from ess_rl.contract import AlternatingConfig, option
from ess_rl.errors import UsageError
from ess_rl.population import members
from experiments import demonstrations, memory, old_data, records
from experiments.records import Record

# Far more would fill the memory before `memory.check` can say so.
MOST = 1_000_000  # members, or environments
MOST_UNITS = 16_384  # of a layer
_MOST_OF = {"num_envs": MOST, "lag": 10_000}  # each iteration of a lag is a copy of the policy


def make(
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
    episodes: int = records.EPISODES,
    save_replay: int = 0,
    asynchronous: bool = False,
    split: int = 1,
) -> Record:
    """Check a configuration. -> what config.json will hold

    Args:
        settings: fields of the agent's Config that are not at their defaults.
        sweep: float fields with several values; members are all their combinations times the seeds.
        steps: env steps of each member; rounded up to whole iterations.
        compiled: "on", "off", or "auto": on where a C++ compiler and Python's headers are found.
        checkpoints: maximum number, evenly spread. Environments start afresh at each, so they lie at least four
            episodes apart.
        episodes: per member, in the final evaluation.
        save_replay: how many of the last rollouts to keep in a file.
        asynchronous: collect in a process of its own while the agents learn.
        split: number of processes on this machine that the members are spread over.

    Raises:
        UsageError: something in it cannot work.
    """
    config = AGENTS[agent].config(**settings)
    if option(config, "replay_from"):  # one place has one name, without this machine's folders
        config = dataclasses.replace(config, replay_from=records.from_here(config.replay_from))
    records.check_positive({"steps": steps, "checkpoints": checkpoints, "episodes": episodes, "seeds": len(seeds)})
    positive = ("num_envs", "rollout", "epochs", "minibatch", "sync_interval")
    records.check_positive({name: getattr(config, name) for name in positive})
    batches.check_minibatch(config)
    if isinstance(config, AlternatingConfig):
        records.check_positive({"segments": config.segments})
    own = share(config, processes.world_size())
    counts = {"replay": (config.replay, "older rollouts"), "lag": (config.lag, "iterations")}
    counts |= {"warm-up": (config.warm_up, "iterations")} if isinstance(config, AlternatingConfig) else {}
    counts |= {"hints": (option(config, "hints"), "environments of a group")}
    for name, (count, of) in (counts | {"save-replay": (save_replay, "rollouts")}).items():
        if count < 0:
            raise UsageError(f"--{name} {count}: must be 0 or more {of}")
    check_members(seeds, sweep, episodes)
    check_numbers(config, sweep)
    check_acting(config, sweep)
    together = option(own, "hints") or option(own, "group")  # environments that come in groups of a given size
    probe = envs.make_for(own, env_id, own.num_envs if together else 1, backend=backend)  # raises if unavailable
    loop.check_env(own, probe)
    resolved_backend, episode, dimensions = probe.backend, probe.max_episode_steps, (probe.obs_dim, probe.act_dim)
    older = option(config, "replay_from")
    file = old_data.check(older, probe, config) if older else 0
    source = old_data.contents(older) if older else ""
    shown = option(config, "demonstrations")
    if shown is not None:
        file += demonstrations.check(agent, shown, probe, config)
        source = old_data.contents(shown)
    probe.close()
    episode = time_limit(env_id, episode)
    iterations = math.ceil(steps / (config.num_envs * config.rollout))
    if iterations < 2:
        raise UsageError(
            f"--steps {steps} is less than two iterations of {config.num_envs * config.rollout} env steps "
            f"(num_envs {config.num_envs} x rollout {config.rollout}); the first only measures: raise --steps"
        )
    settings_of = members(seeds, sweep)
    where = device_of(device, resolved_backend)
    if asynchronous:
        check_asynchronous(config, where, resolved_backend)
    check_split(split, len(settings_of), where, asynchronous, sweep)
    own_agent = AGENTS[agent].agent(own, *dimensions)
    for name, value in ((name, value) for name, values in sweep.items() for value in values):
        AGENTS[agent].agent(dataclasses.replace(own, **{name: value}), *dimensions)  # raises if it cannot use a value
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
        "processes": processes.world_size(),
        # Some episodes must fit between two fresh starts, or none would end.
        "reset_every": max(math.ceil(iterations / checkpoints), math.ceil(4 * episode / config.rollout)),
        "checkpoints": checkpoints,
        "episodes": episodes,
        "save_replay": save_replay,
        "asynchronous": asynchronous,
        "split": split,
        "device": where,
        "compiled": compiled_of(compiled),
        "config": dataclasses.asdict(config),
        **({"source": source} if source else {}),
        **records.origin(),
    }


def share(config: Any, count: int) -> Any:
    """The Config of one of `count` processes that share a run."""
    if count == 1:
        return config
    shared = {name: getattr(config, name) for name in ("num_envs", "minibatch", "segments") if hasattr(config, name)}
    for name, total in shared.items():
        if total % count:
            raise UsageError(
                f"--{name.replace('_', '-')} {total} over {count} processes: must be a multiple of {count}, for each "
                "has an equal share"
            )
    return dataclasses.replace(config, **{name: total // count for name, total in shared.items()})


def check_asynchronous(config: Any, device: str, backend: str) -> None:
    """Raises UsageError if nothing can be collected while the agents learn."""
    if config.lag < 1:
        raise UsageError(
            "--async: the collector acts with an older policy while the current one learns; give --lag 1 or more"
        )
    if option(config, "hints"):
        raise UsageError("--async --hints: hints are given in the process that learns; leave one of them out")
    if processes.world_size() > 1:
        raise UsageError("--async: not under torchrun, whose processes all collect and learn")
    if device == "cuda" and backend in ("torch", "warp"):
        raise UsageError(f"--async: the environments of backend {backend} share the GPU with the agents; leave it out")


def check_split(
    split: int, members: int, device: str, asynchronous: bool, sweep: Mapping[str, Sequence[float]]
) -> None:
    """Raises UsageError if members cannot be spread over that many processes."""
    records.check_positive({"split": split})
    if split == 1:
        return
    if split > members:
        raise UsageError(f"--split {split}: {members} members, each in one process: --split {members} at most")
    if asynchronous:
        raise UsageError("--split --async: both are ways to use all cores; leave one of them out")
    if processes.world_size() > 1:
        raise UsageError("--split: not under torchrun, whose processes all have all members")
    if device == "cuda":
        raise UsageError("--split: the processes would share one GPU, which one keeps busy; leave it out")
    if min(replayed := sweep.get("replayed_updates", [0.0])) == 0.0 < max(replayed):
        raise UsageError(
            "--split --replayed-updates 0 and others: a process may have those without any alone, and tell less of "
            "them than the others do; leave --split out, or train those without any in a run of their own"
        )


_Range = tuple[Callable[[float], bool], str]
_POSITIVE: _Range = (lambda x: x > 0.0, "above 0")
_NOT_NEGATIVE: _Range = (lambda x: x >= 0.0, "0 or more")
_SHARE: _Range = (lambda x: 0.0 <= x <= 1.0, "from 0 to 1")
_SHARE_BELOW_1: _Range = (lambda x: 0.0 <= x < 1.0, "from 0 to below 1")
# Allowed ranges of numbers, where not every finite one will do.
_RANGES: dict[str, _Range] = {
    **dict.fromkeys(
        ("behavior_temperature", "prior_std", "target_kl", "temperature", "inverse_temperature"), _POSITIVE
    ),
    **dict.fromkeys(("policy_noise", "max_weight", "max_grad_norm", "clip", "cap", "policy_delay"), _POSITIVE),
    **dict.fromkeys(("learning_rate", "value_learning_rate", "policy_learning_rate"), _NOT_NEGATIVE),
    **dict.fromkeys(("value_coef", "median_coef", "entropy_coef", "prior_coef", "divergence_coef"), _NOT_NEGATIVE),
    **dict.fromkeys(
        ("final_learning_rate", "hint_lambda", "return_range", "c_bar", "pull", "alpha", "beta"), _NOT_NEGATIVE
    ),
    **dict.fromkeys(("noise_clip", "entropy_temperature"), _NOT_NEGATIVE),
    **dict.fromkeys(("discount", "lambda_", "mu_peak", "mu_valley", "mu_warm_up", "mu_decay"), _SHARE),
    **dict.fromkeys(("keep_ess", "cloning"), _SHARE_BELOW_1),
    "replayed_updates": (lambda x: 0.0 <= x <= 20.0, "from 0 to 20"),
    "expectile": (lambda x: 0.0 < x < 1.0, "between 0 and 1"),
    "tau": (lambda x: 0.0 < x <= 1.0, "above 0 and at most 1"),
}


def check_members(seeds: Sequence[int], sweep: Mapping[str, Sequence[float]], episodes: int) -> None:
    """Raises UsageError for invalid seeds, more members than a run can have, or too many for its evaluation."""
    count = len(seeds) * math.prod(len(values) for values in sweep.values())
    if count > MOST:  # before a list of them is made
        raise UsageError(f"{count:,} members, of {len(seeds):,} seeds: at most {MOST:,} in one run")
    check_seeds(seeds)
    check_episodes(count, episodes)


def check_episodes(members: int, episodes: int) -> None:
    """Raises UsageError if an evaluation, with an environment for each episode of each member, is impossible."""
    records.check_positive({"episodes": episodes})
    if members * episodes > MOST:
        raise UsageError(
            f"--episodes {episodes}: {members:,} members of {episodes:,} environments each, and an evaluation has "
            f"{MOST:,} of them at most: --episodes {max(MOST // members, 1)}"
        )


def time_limit(env_id: str, max_episode_steps: int | None) -> int:
    """Return the time limit of a task. Raises UsageError if it has none."""
    if max_episode_steps is None:
        raise UsageError(
            f"{env_id} has no time limit, so an evaluation may never end: register it with max_episode_steps"
        )
    return max_episode_steps


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises UsageError for a seed that is invalid or given twice."""
    if any(not 0 <= seed < 2**63 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds {list(seeds)[:3]} ...: give different numbers from 0 to 2^63 - 1")


def check_numbers(config: Any, sweep: Mapping[str, Sequence[float]]) -> None:
    """Refuse numbers that no run can use, and values that would make two members the same."""
    for field in dataclasses.fields(config):
        values = [getattr(config, field.name), *sweep.get(field.name, ())]
        fits, rule = _RANGES.get(field.name, (lambda x: True, ""))
        for value in values:
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{flag(field.name)} {value}: must be a finite number")
            if isinstance(value, (int, float)) and not fits(value):
                raise UsageError(f"{flag(field.name)} {value:g}: must be {rule}")
            most = _MOST_OF.get(field.name, 2_147_483_647)
            if isinstance(value, int) and value > most:
                raise UsageError(f"{flag(field.name)} {value}: must be at most {most:,}")
    hidden = getattr(config, "hidden", (1,))  # a peer has networks of its own
    if not hidden or min(hidden) < 1 or max(hidden) > MOST_UNITS:
        given = " ".join(map(str, hidden))
        raise UsageError(f"--hidden {given}: name at least one layer, of 1 to {MOST_UNITS:,} units each")
    starts, floors = ([getattr(config, x, math.nan), *sweep.get(x, ())] for x in ("log_std", "log_std_floor"))
    if min(starts) <= max(floors):  # false if the agent has only one of them
        raise UsageError(
            f"--log-std {min(starts):g}: must be above --log-std-floor, {max(floors):g}; there it has no gradient"
        )
    for name, values in sweep.items():
        if len({struct.pack("f", value) for value in values}) < len(values):
            given = " ".join(f"{value:g}" for value in values)
            raise UsageError(f"{flag(name)} {given}: equal values would train the same member twice")


def _given(name: str, fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The condition that a Config's field fits; it holds if there is no such field."""
    return lambda config: not hasattr(config, name) or fits(getattr(config, name))


def _uses_ess(config: Any) -> bool:
    cap, pull = getattr(config, "cap", "ess"), getattr(config, "pull", "ess")
    return "ess" in (cap, pull) or cap == "ess_per_dim"


_REPLAYS = _given("replayed_updates", lambda mean: mean > 0.0)
# Fields that do nothing unless another is set: the condition, and the option that meets it.
_ACTS_IF: dict[str, tuple[Callable[[Any], bool], str]] = {
    "target_kl": (_given("objective", lambda name: name == "kl"), "--objective kl"),
    "hint_lambda": (_given("hints", lambda group: group > 0), "--hints G"),
    "clip": (_given("objective", lambda name: name not in ("kl", "p3o")), "another --objective"),
    "divergence_coef": (_given("objective", lambda name: name == "clip"), "--objective clip"),
    "draw": (lambda config: config.replay > 0 and _REPLAYS(config), "--replay K"),
    "segments": (_REPLAYS, "--replayed-updates"),
    "warm_up": (_REPLAYS, "--replayed-updates"),
    "ess": (_uses_ess, "--cap ess or --pull ess"),
    "behavior_kl": (_given("pull", lambda pull: pull != 0.0), "another --pull"),
    "width": (_given("phi", lambda phi: phi == "mass"), "--phi mass"),
    "gp_points": (_given("prior", lambda prior: prior == "gp"), "--prior gp"),
}


def check_acting(config: Any, sweep: Mapping[str, Sequence[float]]) -> None:
    """Refuse values of a field that does nothing in this configuration: the run would not be what it says."""
    for field in dataclasses.fields(config):
        if field.name in _ACTS_IF:
            (acts, remedy), value = _ACTS_IF[field.name], getattr(config, field.name)
            if (value != field.default or field.name in sweep) and not acts(config):
                given = " ".join(f"{x:g}" for x in sweep[field.name]) if field.name in sweep else value
                raise UsageError(f"{flag(field.name)} {given}: does nothing here; give {remedy} too, or leave it out")


def flag(name: str) -> str:
    """The command-line option of a Config's field."""
    return f"--{name.strip('_').replace('_', '-')}"


def device_of(asked: str, backend: str = "torch") -> str:
    """Resolve `asked`. auto: cuda if there is one and the environments, if any, run on it too, else the CPU."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() and backend in ("torch", "warp") else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: this torch sees no CUDA device; use --device cpu, or install a CUDA build of torch"
        )
    if asked == "cuda" and processes.local_world_size() > torch.cuda.device_count():
        raise UsageError(
            f"{processes.local_world_size()} processes for {torch.cuda.device_count()} CUDA devices of this machine: "
            "give torchrun no more processes than devices, or use --device cpu"
        )
    return asked


def compiled_of(asked: str) -> bool:
    """Resolve `asked`. auto: on if PyTorch's compiler finds what it needs."""
    missing = missing_to_compile()
    if asked == "on" and missing:
        raise UsageError(f"--compile on: {missing}, or use --compile off")
    return asked == "on" or (asked == "auto" and not missing)


def missing_to_compile() -> str | None:
    """What PyTorch's compiler needs on the CPU and does not find, with the remedy; None if it finds all."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        return "no C++ compiler was found; install g++"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers were not found; install python3-dev"
    return None
