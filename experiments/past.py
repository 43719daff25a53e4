"""A run's past, which it resumes from alongside its agents: rollouts to learn from again, and policies yet to act.

It is saved next to a checkpoint, and made at the start of a run that learns from an older run's data. With several
processes, each holds its share of the environments; what is saved has all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ess_rl import checkpoint, processes
from ess_rl.contract import AgentConfig, Tree
from ess_rl.errors import UsageError
from ess_rl.population import Population
from ess_rl.replay import Replay
from experiments import old_data, records
from experiments.records import Record


def rollouts_kept(own: AgentConfig, config: Record) -> int:
    """Number of rollouts that the replay of a run holds, whose agent has the Config `own`."""
    return max(1 + own.replay, config.get("save_replay", 0))


def tree(
    config: Record, replay: Replay, population: Population, whole: Callable[..., Tensor] = processes.gathered
) -> Tree:
    """The whole past, to be saved. Empty if a run needs none: a fresh rollout is not needed again once learned from.

    `whole` turns a process's part, along the axis of environments, into that of all processes.
    """
    if config["config"]["replay"] == config.get("save_replay", 0) == len(population.behind) == 0:
        return {}
    state = replay.state()
    store = {name: whole(x, 2) for name, x in state["store"].items()}
    return {"replay": {**state, "store": store}, "behind": _behind(population)}


def _behind(population: Population) -> Tree:
    """The policies that have yet to act, as a tree that a checkpoint can keep."""
    return {str(k): state for k, state in enumerate(population.behind)}


def room(config: Record, replay: Replay, population: Population, iteration: int) -> Tree:
    """A tree shaped like the past, to be filled. Empty if a run has nothing to restore at `iteration`."""
    if iteration == 0 and not config["config"].get("replay_from"):
        return {}
    return tree(config, replay, population, lambda part, dim: torch.cat([part] * processes.world_size(), dim))


def read(
    run: Path, config: Record, replay: Replay, population: Population, iteration: int
) -> tuple[Tree, list[int] | None]:
    """Read the past of a run. -> (the past, [P] standard deviations raised in older data; None if none were read)"""
    if iteration == 0 and config["config"].get("replay_from"):
        older = replay
        if processes.world_size() > 1:  # `replay` has room for this process's share only
            num_envs, act_dim = config["config"]["num_envs"], replay.store.action.shape[-1]
            sizes = (population.size, num_envs, replay.store.obs.shape[-1], act_dim)
            older = Replay(replay.capacity, *sizes, population.device)
        raised = old_data.fill(run, older, population.agent.config)
        return {"replay": older.state(), "behind": _behind(population)}, raised.tolist()
    empty = room(config, replay, population, iteration)
    if not empty:
        return {}, None
    newest = records.checkpoints(run)[-1]
    beside = records.replay_of(newest)
    try:
        saved, _ = checkpoint.load(beside, empty, population.device)
    except UsageError as error:
        missing = "is missing" if not beside.exists() else "cannot be read"
        raise UsageError(
            f"{beside} {missing}, without which {newest.name} cannot be resumed from: remove {newest} to continue "
            f"from the checkpoint before it ({error})"
        ) from None
    return saved, None


def take_up(past: Tree, replay: Replay, population: Population) -> None:
    """Load this process's share of what the first process read."""
    past = processes.broadcast(past)
    if past:
        store = {name: processes.share(x, 2).contiguous() for name, x in past["replay"]["store"].items()}
        replay.load({**past["replay"], "store": store})
        population.behind = list(past.get("behind", {}).values())  # an empty tree has no tensors to save
