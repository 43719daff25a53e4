"""Data passed from run to run: the last rollouts of one in a file, and the replay of a later run filled from it.

replay.safetensors        in the run that collected them (--save-replay K): tensors in time order, and JSON
replay-from.safetensors   a copy, in the run that learns from them (--replay-from RUN): it no longer needs the other

A replay can also be filled from a Minari data set (--replay-from ID, or --dataset ID): the copy then holds a part of
it, cut into rollouts.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from envs import minari_data, minari_env
from ess_rl import checkpoint, processes
from ess_rl.contract import Tree, VectorEnv
from ess_rl.errors import UsageError
from ess_rl.replay import Replay
from ess_rl.transitions import Transitions
from experiments import memory, records
from experiments.records import Record

# KL(pi || b) and its gradient grow as 1 / sigma_b^2. In units of [-1, 1]; a policy begins at 0.37.
SMALLEST_STD = 1e-3


def last(replay: Replay, config: Record) -> Tree:
    """The last rollouts that a run is to leave, or as many as it made, from the environments of all processes."""
    steps = min(min(config["save_replay"], config["iterations"]) * config["config"]["rollout"], replay.size)
    kept = replay.latest(steps)
    return {f.name: processes.gathered(getattr(kept, f.name), 2) for f in fields(kept)}


def save(run: Path, kept: Tree, env: VectorEnv, config: Record) -> None:
    """Write what `last` returned."""
    info = {
        "env": config["env"],
        "observation size": env.obs_dim,
        "action scale": [list(pair) for pair in env.action_range],
        "num_envs": config["config"]["num_envs"],
        "members": len(config["seeds"]),
        "steps": len(kept["reward"]),
        "iterations": config["iterations"],
    }
    checkpoint.save(run / records.REPLAY, kept, info)


def check(source: str, env: VectorEnv, config: Any) -> int:
    """Check that a run's replay can be filled from `source`, a run folder or a data set's name. -> bytes of its file

    Args:
        env: an instance of the task to be trained on.
        config: of the agent.

    Raises:
        UsageError: it is neither, or its data have another task, scale or shape; the message names both.
    """
    if config.replay == 0:
        raise UsageError(f"{source} is to be replayed, but with --replay 0 nothing is replayed; give --replay 3, say")
    where = f"--replay-from {source}"
    if is_data_set(source):
        data = minari_data.load(source, say=print)
        check_task(where, data, env)
        _check_length(source, len(data.transitions.reward), config)
        return _wanted(config) * memory.of_one_step(env.obs_dim, env.act_dim)
    path = Path(source) / records.REPLAY
    if not path.exists():
        raise UsageError(
            f"{source!r} is neither a data set on this machine ({', '.join(minari_data.local()) or 'there are none'}) "
            f"nor a run folder that holds {records.REPLAY}: a run leaves one at its end if it was given --save-replay K"
        )
    said = checkpoint.info(path)
    _check_same(where, said, _task(env) | {"num_envs": config.num_envs})
    if said["steps"] < config.rollout:
        raise UsageError(
            f"--replay-from {source}: it holds {said['steps']} steps of each environment, and a rollout of this run is "
            f"{config.rollout}: train it with a larger --save-replay, or this one with a smaller --rollout"
        )
    return path.stat().st_size


def contents(source: str) -> str:
    """A hash of what a replay is filled from: a data set, or the rollouts that a run left."""
    if is_data_set(source):
        return minari_data.source_of(source)
    with open(Path(source) / records.REPLAY, "rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()[:16]


def is_data_set(source: str) -> bool:
    """Return whether `source` names a Minari data set that is here, and not a run folder."""
    return not (Path(source) / records.REPLAY).exists() and source in minari_data.local()


def check_task(where: str, data: minari_data.DataSet | minari_data.Demonstrations, env: VectorEnv) -> None:
    """Raises UsageError, its message beginning with `where`, unless a data set has this env's task, scale and shape."""
    spec = minari_env.spec_text(data.metadata)
    said = {
        "env": minari_env.id_in(spec) or env.env_id.rpartition(":")[2],  # some data sets do not say
        "choice of options": minari_env.options_in(spec),
        "observation size": len(data.obs_names),
        "action scale": [list(pair) for pair in data.action_range],
    }
    here = _task(env) | {"env": env.env_id.rpartition(":")[2], "choice of options": {}}  # without the module of an id
    _check_same(where, said, here)
    minari_data.check_order(where, data.obs_names, env.env_id, {}, print)


def _task(env: VectorEnv) -> Record:
    scale = [list(pair) for pair in env.action_range]
    return {"env": env.env_id, "observation size": env.obs_dim, "action scale": scale}


def _check_same(where: str, said: Record, here: Record) -> None:
    for name, value in here.items():
        if said.get(name) != value:
            raise UsageError(f"{where}: its {name} is {said.get(name)}, that of this run is {value}")


def _wanted(config: Any) -> int:
    """Number of data set steps that fill a replay."""
    return config.replay * config.rollout * config.num_envs


def _check_length(source: str, steps: int, config: Any) -> None:
    wanted, of_one = _wanted(config), config.rollout * config.num_envs
    if steps < wanted:
        enough = f"--replay {steps // of_one} or less" if steps >= of_one else "give a smaller --rollout or --num-envs"
        raise UsageError(
            f"--replay-from {source}: it holds {steps:,} steps, and {config.replay} rollouts are {wanted:,}: {enough}"
        )


def copy(source: str, run: Path, config: Any) -> None:
    """Copy into a new run folder, so that it can resume whatever happens to `source`. `config`: of the new run's agent.

    Raises:
        UsageError: `source` is no longer what `check` saw.
    """
    if is_data_set(source):
        data = minari_data.load(source)
        _check_length(source, len(data.transitions.reward), config)
        info = {
            "members": 1,
            "steps": config.replay * config.rollout,
            "iterations": config.replay,
            "source": data.source,
        }
        rollouts = as_rollouts(data.transitions, config.replay, config.rollout, config.num_envs)
        checkpoint.save(run / records.REPLAY_FROM, rollouts, info)
    else:
        part = run / (records.REPLAY_FROM + ".part")
        shutil.copyfile(Path(source) / records.REPLAY, part)
        part.replace(run / records.REPLAY_FROM)


def as_rollouts(data: Transitions, count: int, steps: int, num_envs: int) -> Tree:
    """Cut transitions [M, ...] into `count` rollouts of one member: columns [count * steps, 1, num_envs, ...].

    Its count * num_envs stretches of consecutive steps begin evenly spaced over all the data, in order, so that every
    policy of a mixed data set is represented. A stretch that ends within an episode counts as truncated.
    """
    stretches = count * num_envs
    first = torch.linspace(0, len(data.reward) - steps, stretches, dtype=torch.float64).long()
    index = (first.view(count, 1, num_envs) + torch.arange(steps)[:, None]).flatten(0, 1)  # [count * steps, num_envs]
    tree = {f.name: getattr(data, f.name)[index].unsqueeze(1) for f in fields(data)}
    tree["truncated"][steps - 1 :: steps] |= ~tree["terminated"][steps - 1 :: steps]
    tree["version"] = torch.arange(count).repeat_interleave(steps)[:, None, None].repeat(1, 1, num_envs)
    return tree


def fill(run: Path, replay: Replay, config: Any) -> Tensor:
    """Put the newest rollouts of the copy in `run` into an empty replay. -> [P] behavior standard deviations raised

    It puts in as many whole rollouts as the copy has, up to `config.replay`. The last iteration of the older run gets
    version -1, the one before -2, and so on. Member p takes the data of the older run's member p, wrapping around if
    that run has fewer members. A behavior standard deviation below SMALLEST_STD is raised to it: the recorded density
    is then not quite that of the behavior policy, but gradients stay bounded.
    """
    path = run / records.REPLAY_FROM
    said = checkpoint.info(path)
    _, members, num_envs, obs_dim = replay.store.obs.shape
    act_dim = replay.store.action.shape[-1]
    shape = (said["steps"], said["members"], num_envs)
    like = Transitions.empty(shape, obs_dim, act_dim, torch.device("meta"))
    tree, _ = checkpoint.load(path, {f.name: getattr(like, f.name) for f in fields(like)})
    steps = min(said["steps"] // config.rollout, config.replay) * config.rollout
    tree = {name: x[-steps:] for name, x in tree.items()}
    tree["version"] = tree["version"] - said["iterations"]
    smallest = math.log(SMALLEST_STD)
    raised = (tree["behavior_log_std"] < smallest).sum((0, 2, 3))
    tree["behavior_log_std"] = tree["behavior_log_std"].clamp(min=smallest)
    mine = torch.arange(members) % said["members"]
    for first in range(0, steps, config.rollout):  # one by one: only the replay holds all members' copies
        replay.add(Transitions(**{name: x[first : first + config.rollout, mine] for name, x in tree.items()}))
    return raised[mine]


def describe(source: str, steps: int, raised: int) -> str:
    """One line on what the replay was filled with."""
    line = f"replay: {steps} steps of each environment from {source}"
    return line + f"; {raised:,} behavior standard deviations below {SMALLEST_STD:g} were raised to it" * (raised > 0)
