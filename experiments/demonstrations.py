"""Observations and actions of a Minari data set, for agents that act: chord imitates them, p3o_prior fits a prior.

demonstrations.safetensors    their copy in the run folder, so that the run can resume whatever happens to the data set
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from agents import p3o_prior
from envs import minari_data
from ess_rl import behavior, checkpoint, gaussian_process, processes
from ess_rl.contract import Tree, VectorEnv
from ess_rl.errors import UsageError
from ess_rl.population import Population
from ess_rl.random import fold_in
from experiments import old_data, records
from experiments.records import Record


def check(agent: str, source: str, env: VectorEnv, config: Any) -> int:
    """Check that an agent that needs demonstrations can take them from data set `source`. -> bytes of their copy

    Args:
        env: an instance of the task to be trained on.
        config: of the agent.

    Raises:
        UsageError: no data set is named, it is not here, it has another task, scale or shape, or too few steps for a
            prior.
    """
    if not source:
        raise UsageError(
            f"{agent} learns from demonstrations too: name their data set with --dataset ID "
            "('ess-rl dataset list' shows those on this machine)"
        )
    found = minari_data.demonstrations(source, say=print)
    old_data.check_task(f"--dataset {source}", found, env)
    if isinstance(config, p3o_prior.Config):
        records.check_positive({"gp-points": config.gp_points})
        least = config.gp_points if config.prior == "gp" else 2
        if len(found.obs) < least:
            remedy = f"--gp-points {len(found.obs)} or less" if config.prior == "gp" else "record more"
            raise UsageError(
                f"--dataset {source}: a prior {config.prior!r} is fitted to at least {least} steps, and it holds "
                f"{len(found.obs)}: {remedy}"
            )
    return found.obs.nbytes + found.action.nbytes


def copy(source: str, run: Path) -> None:
    """Copy the demonstrations into a new run folder."""
    found = minari_data.demonstrations(source)
    columns = {"obs": found.obs, "action": found.action}
    checkpoint.save(run / records.DEMONSTRATIONS, columns, {"source": source, "count": len(found.obs)})


def read(run: Path, config: Record, env: VectorEnv) -> Tree:
    """Read the copy in a run folder: obs [M, obs_dim], action [M, act_dim], on the CPU; empty if the run has none."""
    if not config["config"].get("demonstrations"):
        return {}
    path = run / records.DEMONSTRATIONS
    return checkpoint.load(path, room(checkpoint.info(path)["count"], env))[0]


def room(count: int, env: VectorEnv) -> Tree:
    """A tree with room for `count` demonstrations, to be filled; empty for none."""
    if count == 0:
        return {}
    return {"obs": torch.zeros(count, env.obs_dim), "action": torch.zeros(count, env.act_dim)}


def take_up(shown: Tree, population: Population, iteration: int) -> None:
    """Give a population its demonstrations: as samples alongside its own or, at the start, as a prior of each member.

    A prior is part of the state, so after `iteration` 0 the checkpoint has it.
    """
    shown = {name: x.to(population.device) for name, x in processes.broadcast(shown).items()}
    config = population.agent.config
    if isinstance(config, p3o_prior.Config):
        if iteration > 0:
            return
        prior = fitted_prior(config, shown["obs"], shown["action"], population.seeds)
        population.state = {**population.state, "prior": processes.broadcast(prior)}
    else:
        population.demonstrations = shown


def fitted_prior(config: p3o_prior.Config, obs: Tensor, action: Tensor, seeds: Sequence[int]) -> Tree:
    """Fit the prior that a Config asks for to demonstrations [M, ...]: one for each of `seeds`, [P, ...].

    Networks are fitted from their member's seed, so that members differ in them too; equal seeds give equal networks.
    The last tenth of the steps decides when to stop. A Gaussian process is the same for all members.
    """
    if config.prior == "gp":
        kept = torch.linspace(0, len(obs) - 1, config.gp_points, dtype=torch.float64).long().to(obs.device)
        process = gaussian_process.fit(obs[kept], action[kept])
        return tree_map(lambda x: x.expand(len(seeds), *x.shape).clone(), process)
    count, different = p3o_prior.NETWORKS[config.prior], list(dict.fromkeys(seeds))
    last = torch.zeros(len(obs), dtype=torch.bool, device=obs.device)
    of_all = tuple(int(fold_in(torch.tensor(seed), k)) for seed in different for k in range(count))
    model = behavior.fit(obs, action, last, seeds=of_all, config=p3o_prior.PRIOR)
    mine = torch.tensor([different.index(seed) for seed in seeds], device=obs.device)
    return tree_map(lambda x: x.unflatten(0, (-1, count))[mine].contiguous(), model.params)
