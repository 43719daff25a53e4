"""Command-line options of `ess-rl train AGENT`, made from the agent's Config: its fields, defaults and remarks."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from ess_rl.errors import UsageError
from experiments import records


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every run, whoever trains."""

    env: str
    """the task, e.g. HalfCheetah-v5; 'ess-rl envs' lists them"""
    seeds: int = 1
    """number of seeds"""
    seed0: int = 0
    """the first seed; the others follow it"""
    steps: int = 1_000_000
    """env steps of each seed"""
    episodes: int = records.EPISODES
    """episodes of the final evaluation, for each member"""
    out: Path | None = None
    """the run folder; default: runs/AGENT-ENV, or runs/AGENT-ENV-from-DATASET"""
    overwrite: bool = False
    """replace the run that --out holds"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerOptions(Options):
    """Options of a run of another library's algorithm: each seed is a process of its own."""

    jobs: int | None = None
    """seeds trained at the same time; default: one per core"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Options of a run of our own agents: all seeds and settings are one program."""

    backend: Literal["auto", "torch", "envpool", "gymnasium", "warp"] = "auto"
    """the simulator; auto: the first of these that has the task and is installed, never warp"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the agents live; auto: cuda if there is one and the environments run on it too"""
    compile: Literal["auto", "on", "off"] = "auto"
    """compile the agents; auto: on if a C++ compiler is found"""
    checkpoints: int = 10
    """at most this many checkpoints, evenly spaced and at least 4 episodes apart, as environments are reset at each"""
    dataset: str = ""
    """a Minari data set: old replay, the same as --replay-from with its name (offline to online); chord and p3o_prior
    take their demonstrations from it"""
    save_replay: int = 0
    """save this many of the last rollouts in a file, for --replay-from of another run"""
    asynchronous: Annotated[bool, tyro.conf.arg(name="async")] = False
    """collect in a separate process while the agents learn; needs --lag 1 or more, and gives the same result"""
    split: int = 1
    """spread the members over this many processes, each on its share of the cores: faster with ten seeds or so; results
    are those of one process with as many torch threads as each of them has"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Options of every run on a data set, whoever trains."""

    dataset: str
    """the Minari data set, e.g. mujoco/hopper/medium-v0; 'ess-rl dataset list' shows those on this machine"""
    seeds: int = 1
    """number of seeds"""
    seed0: int = 0
    """the first seed; the others follow it"""
    steps: int = 100_000
    """gradient updates of each seed"""
    episodes: int = records.EPISODES
    """episodes of the final evaluation, for each seed; those of our own agents during training take at most 5"""
    out: Path | None = None
    """the run folder; default: runs/AGENT-DATASET"""
    overwrite: bool = False
    """replace the run that --out holds"""
    eval_env: str | None = None
    """evaluate in this task; default: the data set's own"""
    trust_env_spec: bool = False
    """import whatever code the data set's env spec names; by default only what Gymnasium, Gymnasium-Robotics or this
    suite has registered"""
    download: bool = False
    """download the data set from Minari's server if it is not here"""
    backend: Literal["auto", "torch", "envpool", "gymnasium", "warp"] = "auto"
    """the simulator of evaluations; auto: the first of these that has the task and is installed, never warp"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflinePeerOptions(DataOptions):
    """Options of a run of d3rlpy's algorithms: each seed is a process of its own."""

    jobs: int | None = None
    """seeds trained at the same time; default: one per core"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflineOptions(DataOptions):
    """Options of a run of our own offline agents: all seeds and settings are one program."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the agents live; auto: cuda if there is one"""
    compile: Literal["auto", "on", "off"] = "auto"
    """compile the agents; auto: on if a C++ compiler is found"""
    checkpoints: int = 10
    """at most this many checkpoints, evenly spaced; the agents are evaluated at each"""


def of_peer(config: type) -> type:
    """A dataclass of all options of a peer."""
    return _with_fields(config, PeerOptions, sweeps=False)


def of_offline_peer(config: type) -> type:
    """A dataclass of all options of a peer that learns from a data set."""
    return _with_fields(config, OfflinePeerOptions, sweeps=False)


def of_agent(config: type) -> type:
    """A dataclass of all options of an agent. Float fields take several values, which make a sweep."""
    return _with_fields(config, RunOptions, sweeps=True)


def of_offline(config: type) -> type:
    """A dataclass of all options of an offline agent; float fields as in `of_agent`."""
    return _with_fields(config, OfflineOptions, sweeps=True)


def _with_fields(config: type, base: type, *, sweeps: bool) -> type:
    hints, help_texts = get_type_hints(config), remarks(config)
    taken = {field.name for field in dataclasses.fields(base)}
    made: list[Any] = []
    for field in dataclasses.fields(config):
        if field.name in taken:
            where = f"{config.__module__}.{config.__qualname__}"
            raise UsageError(f"{where}: {field.name!r} is the name of an option of every run: give the field another")
        kind, default = hints[field.name], field.default
        swept = sweeps and kind is float
        if swept:
            kind, default = tuple[float, ...], (default,)
        help_ = help_texts[field.name] + ("; several values make a sweep" if swept else "")
        argument = tyro.conf.arg(name=field.name.rstrip("_"), help=help_)
        made.append((field.name, Annotated[kind, argument], dataclasses.field(default=default)))
    return dataclasses.make_dataclass("Options", made, bases=(base,), frozen=True, kw_only=True)


def split(config: type, chosen: Any) -> tuple[dict[str, Any], dict[str, tuple[float, ...]]]:
    """-> (settings of the Config, sweep: float fields that were given several values)"""
    settings: dict[str, Any] = {}
    sweep: dict[str, tuple[float, ...]] = {}
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        value = getattr(chosen, field.name)
        if hints[field.name] is not float:
            settings[field.name] = value
        elif not value:
            raise UsageError(f"--{field.name.replace('_', '-').rstrip('-')} needs a value")
        else:
            settings[field.name] = value[0]
            if len(value) > 1:
                sweep[field.name] = value
    return settings, sweep


def remarks(config: type) -> dict[str, str]:
    """The trailing comment of each field in the source: written once, for readers of the file and of --help."""
    found = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config), flags=re.MULTILINE))
    return {field.name: found.get(field.name, "") for field in dataclasses.fields(config)}
