"""What an agent imitates beside learning by acting (chord): observations and actions of a Minari data set.

demonstrations.safetensors    their copy in the run folder, so that it resumes whatever becomes of the set
"""

from __future__ import annotations

from pathlib import Path

import torch

from envs import minari_data
from ess_rl import checkpoint
from ess_rl.contract import Tree, VectorEnv
from ess_rl.errors import UsageError
from experiments import old_data
from experiments.records import Record

COPIED = "demonstrations.safetensors"


def check(agent: str, source: str, env: VectorEnv) -> int:
    """Whether an agent that imitates can do so from `source`, a data set's name. -> bytes of its copy

    Args:
        env: one of the task to be trained on.

    Raises:
        UsageError: none is named, it is not here, or it is of another task, scale or shape.
    """
    if not source:
        raise UsageError(
            f"{agent} imitates demonstrations while it learns by acting: name their data set with --dataset ID "
            "('ess-rl dataset list' shows those that are here)"
        )
    found = minari_data.demonstrations(source, say=print)
    old_data.check_task(f"--dataset {source}", found.metadata, found.obs, found.action_range, env)
    return found.obs.nbytes + found.action.nbytes


def copy(source: str, run: Path) -> None:
    """Into a new run folder."""
    found = minari_data.demonstrations(source)
    part = run / (COPIED + ".part")
    checkpoint.save(part, {"obs": found.obs, "action": found.action}, {"source": source, "count": len(found.obs)})
    part.replace(run / COPIED)


def read(run: Path, config: Record, env: VectorEnv) -> Tree:
    """The copy in a run folder: obs [M, obs_dim] and action [M, act_dim], on the CPU; empty if the run has none."""
    if not config["config"].get("demonstrations"):
        return {}
    path = run / COPIED
    return checkpoint.load(path, room(checkpoint.info(path)["count"], env))[0]


def room(count: int, env: VectorEnv) -> Tree:
    """A tree like it of `count` demonstrations, to be filled; empty for none."""
    if count == 0:
        return {}
    return {"obs": torch.zeros(count, env.obs_dim), "action": torch.zeros(count, env.act_dim)}
