"""Collecting a rollout: the policy acts in all environments of all members, for a number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from ess_rl import processes, random
from ess_rl.contract import InTurns, StartsFromHints, Step, Turn, VectorEnv
from ess_rl.population import Population
from ess_rl.transitions import Transitions


def turns(env: VectorEnv, num_envs: int) -> Sequence[Turn]:
    """The alternating parts of `env`, each with an equal share of every member's `num_envs`; or all of `env` as one."""
    if isinstance(env, InTurns) and num_envs % len(env.turns) == 0:
        return env.turns
    return [_AtOnce(env)]


def collect(
    population: Population,
    env: VectorEnv,
    obs: Tensor,
    steps: int,
    iteration: int | Tensor,
    hinted: Tensor | None = None,
) -> tuple[Transitions, Tensor]:
    """Act for `steps` steps from `obs` [B, obs_dim]. -> (transitions [T, P, N], next obs to act on [B, obs_dim])

    The transitions are on the population's device, the next obs on the environments'. From a CPU to CUDA, the
    environments' outputs wait in pinned memory. If the environments have parts (`turns`), the policy acts for one part
    while another simulates. For environments that start from hints, `hinted` [T, P, N] is set to mark the steps of such
    episodes.
    """
    members, num_envs, device = population.size, env.num_envs // population.size, population.device
    seeds = random.fold_in(random.fold_in(population.seed, random.ACTIONS), iteration)
    noise = random.normal(seeds, (steps, num_envs * processes.world_size(), env.act_dim)).transpose(0, 1)
    noise = processes.share(noise, 2)  # [T, P, N, act_dim]
    parts = turns(env, num_envs)
    count = len(parts)
    shape = (steps, members, num_envs // count)
    now = [obs[k::count] for k in range(count)]
    noises = [noise[:, :, k::count].contiguous() for k in range(count)]
    worlds = [Transitions.empty(shape, env.obs_dim, env.act_dim, env.device) for _ in parts]
    if env.device.type == "cpu" and device.type == "cuda":
        worlds = [world.map(Tensor.pin_memory) for world in worlds]
    act, acted = population.actor(), [[] for _ in parts]
    for t in range(steps + 1):
        for k, (part, world) in enumerate(zip(parts, worlds, strict=True)):
            if t > 0:
                step = part.receive()
                world.reward[t - 1] = step.reward.view(shape[1:])
                world.terminated[t - 1] = step.terminated.view(shape[1:])
                world.truncated[t - 1] = step.truncated.view(shape[1:])
                world.next_obs[t - 1] = step.next_obs.view(world.obs.shape[1:])
                now[k] = step.obs
            if t < steps:
                if hinted is not None:
                    assert isinstance(env, StartsFromHints)
                    hinted[t] = env.hinted.view(hinted.shape[1:])  # before the step, which may begin another episode
                world.obs[t] = now[k].view(world.obs.shape[1:])  # before the step, which may overwrite it
                behavior, action = act(world.obs[t].to(device, non_blocking=True), noises[k][t])
                part.send(action.flatten(0, 1).to(env.device))
                acted[k].append((behavior, action))
    rollouts = []
    for world, log in zip(worlds, acted, strict=True):
        rollouts.append(
            replace(
                world.map(lambda x: x.to(device, non_blocking=True)),
                action=torch.stack([action for _, action in log]),
                behavior_mean=torch.stack([behavior.mean for behavior, _ in log]),
                behavior_log_std=torch.stack([behavior.log_std for behavior, _ in log]),
                version=torch.zeros(shape, dtype=torch.int64, device=device) + iteration,
            )
        )
    return _interleave(rollouts), now[0] if count == 1 else torch.stack(now, dim=1).flatten(0, 1)


def warm_up_acting(population: Population, env: VectorEnv, rollout: Transitions) -> None:
    """Let the population act once, so that compilation happens now. `rollout` [T, P, N] provides the shapes."""
    count = len(turns(env, population.agent.config.num_envs))
    part = rollout.map(lambda x: x[0, :, ::count].contiguous())  # what one call of the policy sees
    population.act(part.obs, part.action)


class _AtOnce:
    """A `VectorEnv` as a `Turn`, which simulates as soon as it is sent its actions."""

    def __init__(self, env: VectorEnv):
        self._env = env

    def send(self, action: Tensor) -> None:
        self._step = self._env.step(action)

    def receive(self) -> Step:
        return self._step


def _interleave(rollouts: list[Transitions]) -> Transitions:
    """Merge K records [T, P, N / K] into one [T, P, N]: environment n of a member comes from record n modulo K."""
    if len(rollouts) == 1:
        return rollouts[0]
    columns = {
        f.name: torch.stack([getattr(rollout, f.name) for rollout in rollouts], dim=3).flatten(2, 3)
        for f in fields(Transitions)
    }
    return Transitions(**columns)
