"""Training data of an iteration: rollouts as samples under the current policy, their extra columns, their order."""

from __future__ import annotations

import torch
from torch import Tensor

from ess_rl import processes, random
from ess_rl.contract import AgentConfig, AlternatingConfig, option
from ess_rl.errors import UsageError
from ess_rl.ess import effective_sample_size
from ess_rl.population import Population
from ess_rl.transitions import Transitions


def prepare(population: Population, rollouts: list[Transitions]) -> tuple[dict[str, Tensor], Tensor]:
    """Samples of several rollouts [T, P, N], newest first, each prepared separately under the current policy and value.

    -> (samples [P, (1 + replay) * T * N, ...], ESS of each rollout [P, len(rollouts)])

    The samples have room for the largest possible number of rollouts, so that programs are compiled for them only once.
    Room that is not filled yet holds zeros and is never drawn from. With room for more than one rollout, the samples
    also have an "age".
    """
    parts = [population.prepare(rollout) for rollout in rollouts]
    ess = torch.stack([effective_sample_size(part.pop("log_ratio"), dim=1) for part in parts], dim=1)
    room = _room(population.agent.config)
    if room > 1:
        for age, part in enumerate(parts):
            part["age"] = torch.full_like(part["advantage"], age)
    return _in_one(parts, room), ess


def refreshed(population: Population, rollouts: list[Transitions], data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The samples `data` of `prepare` at the start of another epoch, with the columns that the agent recomputes."""
    if population.agent.refresh is None:
        return data
    parts = [population.refresh(rollout) for rollout in rollouts]
    return data | _in_one(parts, _room(population.agent.config))


def demonstrated(population: Population, samples: int, iteration: int | Tensor) -> dict[str, Tensor]:
    """One of the population's demonstrations for each of a member's samples, drawn again in each iteration.

    -> "expert_obs" and "expert_action" [P, samples, ...], drawn with replacement; empty if there are none to draw
    """
    if not population.demonstrations:
        return {}
    count, num_envs = len(population.demonstrations["obs"]), population.agent.config.num_envs
    seeds = random.fold_in(random.fold_in(population.seed, random.DEMONSTRATIONS), iteration)
    drawn = random.uniform(seeds, (samples // num_envs, num_envs * processes.world_size()), torch.float64)
    index = (processes.share(drawn, 2).flatten(1) * count).long()
    return {f"expert_{name}": x[index] for name, x in population.demonstrations.items()}


def marked(hinted: Tensor | None) -> dict[str, Tensor]:
    """For each sample, whether its episode began from a hint: [T, P, N] -> "hinted" [P, T * N]; empty if None."""
    return {} if hinted is None else {"hinted": hinted.transpose(0, 1).flatten(1)}


def draw_weights(config: AgentConfig, rollouts: list[Transitions], ess: Tensor) -> Tensor:
    """Unnormalized probability that each sample is drawn next: [P, K * T * N], in the order of `prepare`'s samples.

        uniform   1
        recency   1 / (1 + age), age in rollouts
        ess       the ESS of its rollout under the current policy
        reward    exp(z), z the mean reward of its trajectory (one environment's part of one rollout), standardized over
                  all of a member's trajectories that this process holds; for an agent with a `group`, its group's mean
                  is subtracted first, so that trajectories compete only with those from the same first state

    Source of the last: TBA (Bartoldson et al. 2025, arXiv 2503.18929) draws trajectories by a softmax of their reward,
    those of one question against each other, and some of the data only from the newest. Standardized here, so that it
    does not depend on the task's units. The draw is biased: a policy gradient leans toward what went well and, if
    starts differ, toward the easy ones. TBA's loss is 0 at the same policy whatever is drawn.

    Args:
        rollouts: K rollouts [T, P, N], newest first.
        ess: [P, K], of each rollout.
    """
    count, (steps, members, num_envs) = len(rollouts), rollouts[0].reward.shape
    weight = torch.ones(members, count, num_envs, dtype=torch.float64, device=ess.device)
    if config.draw == "recency":
        weight = weight / (1.0 + torch.arange(count, device=ess.device))[:, None]
    if config.draw == "ess":
        weight = weight * ess[:, :, None]
    if config.draw == "reward":
        reward = torch.stack([rollout.reward.double().mean(0) for rollout in rollouts], dim=1)
        if group := option(config, "group"):
            groups = reward.unflatten(2, (-1, group))
            reward = (groups - groups.mean(3, keepdim=True)).flatten(2)
        spread = reward.std(dim=(1, 2), correction=0, keepdim=True)
        weight = torch.exp((reward - reward.mean((1, 2), keepdim=True)) / (spread + 1e-8))
    return weight[:, :, None].expand(-1, -1, steps, -1).flatten(1)


def order(seeds: Tensor, config: AgentConfig, weights: Tensor) -> Tensor:
    """Indices of the samples of an epoch: as many as one rollout has, drawn from all rollouts. [P, samples]

    Drawn without replacement within the epoch, weighted by `weights` [P, K * samples].
    """
    if processes.world_size() > 1:
        seeds = random.fold_in(seeds, processes.rank())
    samples = config.rollout * config.num_envs
    if config.draw == "uniform":
        return random.permutation(seeds, weights.shape[1])[:, :samples]
    return random.weighted_permutation(seeds, weights)[:, :samples]


def check_minibatch(config: AgentConfig) -> None:
    """Raises UsageError unless there are samples and epochs, and the minibatch divides the samples and exceeds one."""
    for name in ("num_envs", "rollout", "epochs"):
        if getattr(config, name) < 1:
            raise UsageError(f"{name} {getattr(config, name)}: must be at least 1")
    samples = config.rollout * config.num_envs
    if config.minibatch * processes.world_size() < 2:  # each process has a share of one minibatch
        raise UsageError(f"minibatch {config.minibatch}: advantages are standardized over it, so it must be at least 2")
    if samples % config.minibatch:
        near = min((d for d in range(1, samples + 1) if samples % d == 0), key=lambda d: abs(d - config.minibatch))
        raise UsageError(
            f"minibatch {config.minibatch} does not divide the {samples} samples of an iteration "
            f"(num_envs {config.num_envs} x rollout {config.rollout}): {near} would"
        )


def _room(config: AgentConfig) -> int:
    """Number of rollouts that an epoch draws from, once the replay is full."""
    return 1 if isinstance(config, AlternatingConfig) else 1 + config.replay


def _in_one(parts: list[dict[str, Tensor]], room: int) -> dict[str, Tensor]:
    """Concatenated samples [P, n, ...] of several rollouts, with room for `room` of them."""
    if room == 1:
        return parts[0]
    data = {
        name: torch.zeros(x.shape[0], room * x.shape[1], *x.shape[2:], dtype=x.dtype, device=x.device)
        for name, x in parts[0].items()
    }
    for k, part in enumerate(parts):
        for name, x in part.items():
            data[name][:, k * x.shape[1] : (k + 1) * x.shape[1]] = x
    return data
