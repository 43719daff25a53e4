"""The loop: collect, learn, evaluate. A generator, so that logging, checkpoints and stopping sit with the caller.

Every draw is a function of (member's seed, purpose, iteration); see `ess_rl.random`. Environments begin anew, from
seeds of their own, every `reset_every` iterations: simulators do not hand out their whole state, so these are the
points at which a run can be saved and taken up again bit for bit.

Of several processes (`ess_rl.processes`), each collects from and learns with its own share of every member's
environments: its Config says how many of them and which part of a minibatch. Environments and actions are those that
one process with all of them would have (but for the rounding of fp8, whose scale is that of the rows at hand). Each
process shuffles its own samples: so a minibatch has as many from each, which one process's does not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ess_rl import batches, finite, processes, random
from ess_rl.alternate import ReplayedUpdates, taking
from ess_rl.collect import collect, warm_up_acting
from ess_rl.contract import (
    Actors,
    AgentConfig,
    AlternatingConfig,
    Collector,
    StartsFromHints,
    VectorEnv,
    option,
)
from ess_rl.errors import NonFiniteError, UsageError
from ess_rl.graphs import Graphs, Stopwatch
from ess_rl.population import Population
from ess_rl.replay import Replay
from ess_rl.returns import reverse_recurrence
from ess_rl.transitions import Transitions

CHECKED = 10  # iterations of a run in which the recorded behavior is compared with the policy


@dataclass(frozen=True)
class Progress:
    """What one iteration did. Tensors are [P], on the CPU."""

    iteration: int  # iterations done, this one included
    env_steps: int  # steps of each member's environments together, in all processes, from the start of the run
    # Of the agent's updates, mean over the iteration. Before them: `ess_first`, the effective sample size of the fresh
    # rollout, which is 1 unless it was not this policy that acted; `ess_age_K`, that of the rollout K iterations older.
    # After them: what `ess_rl.diagnostics.diagnose` says of the fresh rollout. With hints, `hinted_share` of its steps.
    metrics: dict[str, Tensor]
    episodes: (
        Tensor  # int64: episodes that ended in this iteration, but those from a hint or cut by a clock that was ahead
    )
    return_sum: Tensor  # float64: sum of their undiscounted raw returns
    seconds: dict[str, float] = field(default_factory=dict)  # of collect, targets, update


def train(
    population: Population,
    env: VectorEnv,
    replay: Replay,
    *,
    iterations: int,
    reset_every: int,
    start: int = 0,
    collector: Collector | None = None,
) -> Iterator[Progress]:
    """Iterations `start` + 1 to `iterations` of collecting, learning and observing.

    Iteration 1 only observes: its rollout gives the first statistics of observations and rewards, and nothing is
    learned from data that no statistics could scale. Each iteration writes over the state of the one before: clone
    `population.state` to keep it.

    Args:
        env: of population.size * config.num_envs environments; member p's stand together.
        reset_every: iterations between two fresh starts of all environments. An episode cut by one counts as truncated
            at its last step, and not among the episodes that ended. `start` must be a multiple of it.
        collector: collects each rollout while the one before is learned from, in place of `env`, which then only says
            what there is; of one process alone, without hints, and with a lag of 1 or more.
    """
    config, device = population.agent.config, population.device
    if replay.capacity < (1 + config.replay) * config.rollout or replay.capacity % config.rollout:
        raise ValueError(
            f"a replay of {replay.capacity} steps cannot hold {1 + config.replay} whole rollouts of "
            f"{config.rollout} steps, and no part of another"
        )
    if reset_every < 1 or (start % reset_every and start < iterations):
        raise ValueError(f"start={start} is not a multiple of reset_every={reset_every}, a number from 1 on")
    batches.check_minibatch(config)
    _check_hints(config, env)
    _check_group(config, env)
    if collector is not None and config.lag < 1:
        raise ValueError("a collector acts while the policy is learning, with an older one: lag must be 1 or more")
    samples = config.rollout * config.num_envs  # of a rollout, in this process
    graphs, stopwatch = Graphs(device), Stopwatch(device)
    # What the stages below read and write keeps its address, so that their recordings stay true.
    state = population.state
    number = torch.zeros((), dtype=torch.int64, device=device)  # of the iteration
    obs = torch.zeros(env.num_envs, env.obs_dim, device=env.device)
    running = torch.zeros(population.size, config.num_envs, dtype=torch.float64, device=device)
    short = torch.zeros(population.size, config.num_envs, dtype=torch.bool, device=device)  # staggered first episodes
    replayed = (
        ReplayedUpdates(population, replay, config, random.REPLAYED) if isinstance(config, AlternatingConfig) else None
    )
    shape = (config.rollout, population.size, config.num_envs)
    # Where the fresh rollout is learned from alone, it is so from one place, wherever in the ring it lies.
    alone = replayed is not None or (config.replay == 0 and replay.capacity > config.rollout)
    fresh = Transitions.empty(shape, env.obs_dim, env.act_dim, device) if alone else None
    hinted = torch.zeros(shape, dtype=torch.bool, device=device) if isinstance(env, StartsFromHints) else None

    def fresh_starts(iteration: int) -> Tensor | None:
        """Seeds [B] of environments that begin anew with this iteration."""
        if iteration % reset_every:
            return None
        seeds = random.fold_in(random.fold_in(population.seed, random.ENVS), iteration)
        seeds = env_seeds(seeds, config.num_envs * processes.world_size()).view(population.size, -1)
        return processes.share(seeds, 1).flatten()

    # The stages of an iteration. A recording is of the very tensors that they were given: its name says which.

    def collecting() -> tuple[Transitions, dict[str, Tensor]]:
        if collector is None:
            rollout, after = collect(population, env, obs, config.rollout, number, hinted)
            obs.copy_(after)
        else:
            rollout = collector.rollout()
        population.age()
        episodes, return_sum = _episodes(rollout, running, short, hinted)
        found = {"episodes": episodes, "return_sum": return_sum, "broken": (~finite.finite(rollout)).long()}
        found = {name: processes.all_sum(x) for name, x in found.items()}
        if hinted is not None:
            found["hinted_share"] = processes.all_mean(hinted.float().mean((0, 2)))
        return rollout, found

    def targets(rollouts: list[Transitions]) -> tuple[dict[str, Tensor], Tensor]:
        data, ess = batches.prepare(population, rollouts)
        return data | batches.demonstrated(population, data["advantage"].shape[1], number) | batches.marked(hinted), ess

    def updates(rollouts: list[Transitions], data: dict[str, Tensor], ess: Tensor) -> dict[str, Tensor]:
        seeds, epochs = random.fold_in(random.fold_in(population.seed, random.ORDER), number), []
        weights = batches.draw_weights(config, rollouts, ess)
        for epoch in range(config.epochs):
            order = batches.order(random.fold_in(seeds, epoch), config, weights)  # [P, samples]
            order = order.unflatten(1, (-1, config.minibatch)).transpose(0, 1).contiguous()
            present = data if epoch == 0 else batches.refreshed(population, rollouts, data)
            epochs.append(population.epoch(present, order))
        population.keep(state)
        return {name: torch.cat([m[name] for m in epochs]).mean(0) for name in epochs[0]}

    def replayed_update() -> dict[str, Tensor]:
        assert replayed is not None
        summary = replayed.update()
        population.keep(state)
        return summary

    def observe(rollout: Transitions, data: dict[str, Tensor] | None) -> dict[str, Tensor]:
        summary = {} if data is None else population.diagnose(rollout, data["advantage"][:, :samples])
        population.observe(rollout)
        population.keep(state)
        return summary

    for iteration in range(start, iterations):
        if population.state is not state:  # somebody gave it another
            population.keep(state)
        stopwatch.begin()
        number.fill_(iteration)
        state["progress"].fill_(iteration / iterations)
        starts = fresh_starts(iteration)
        if starts is not None:
            running.zero_()
            short.fill_(getattr(env, "staggered", False))
        if collector is None:
            if starts is not None:
                obs.copy_(env.reset(starts.to(env.device)))
        elif iteration == start:
            collector.begin(iteration, population.behind[0], starts)
        # Of all environments, the step of the torch ones alone can be part of a recording.
        recordable = collector is None and env.backend == "torch" and env.device.type == device.type
        rollout, found = graphs("collect", collecting) if recordable else collecting()
        if collector is not None and iteration + 1 < iterations:
            collector.begin(iteration + 1, population.behind[0], fresh_starts(iteration + 1))
        if (iteration + 1) % reset_every == 0:
            rollout.truncated[-1] |= ~rollout.terminated[-1]
        replay.add(rollout)
        if fresh is None:
            rollouts = replay.rollouts(config.rollout, 1 + config.replay)
            where = f"{replay.head} {len(rollouts)}"  # a recording is of the rollouts that lay there
        else:
            rollouts, where = [Transitions.zip(Tensor.copy_, fresh, rollout)], "alone"
        stopwatch.lap("collect")
        data, summary = None, {}
        if iteration > 0:
            data, ess = graphs(f"targets {where}", partial(targets, rollouts))
            found = found | {f"ess_age_{age}" if age else "ess_first": ess[:, age] for age in range(len(rollouts))}
        stopwatch.lap("targets")
        if data is not None:
            summary = graphs(f"updates {where}", partial(updates, rollouts, data, ess))
            for _ in range(replayed.begin(iteration) if replayed else 0):
                summary = summary | graphs("replayed", replayed_update)
        name = "observe" if data is None else f"observe {where}"
        summary = summary | graphs(name, partial(observe, rollouts[0], data))
        stopwatch.lap("update")
        found = _to_host(summary | found)  # the only wait for the device
        episodes, return_sum, broken = (found.pop(name) for name in ("episodes", "return_sum", "broken"))
        if broken.any():
            raise NonFiniteError(processes.first_word(finite.what_broke(env, population, iteration, rollout)))
        metrics = {name: x.float() for name, x in found.items()}
        finite.check_metrics(env, population, f"in the updates of iteration {iteration + 1}", metrics)
        if population.on_policy and iteration < CHECKED:
            _check_recorded(metrics)
        yield Progress(
            iteration=iteration + 1,
            env_steps=(iteration + 1) * samples * processes.world_size(),
            metrics=metrics,
            episodes=episodes.long(),
            return_sum=return_sum,
            seconds=stopwatch.seconds(),
        )


def _to_host(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors [P] of any type on any device -> float64 on the CPU, in one transfer."""
    rows = torch.stack([x.double() for x in found.values()]).cpu()
    return dict(zip(found, rows, strict=True))


def _check_hints(config: AgentConfig, env: VectorEnv) -> None:
    """Raises UsageError where an agent asks for hints that its environments do not give, or has older data too.

    What is replayed is told apart by its age alone: no record says whether its episode began from a hint.
    """
    hints = option(config, "hints")
    if hints and not isinstance(env, StartsFromHints):
        raise UsageError(f"hints {hints}: {env.env_id} gives none as it was made; envs.make_hinted makes one that does")
    if hints and config.num_envs % hints:
        raise UsageError(f"hints {hints} with num_envs {config.num_envs}: a group is of one member: choose a divisor")
    if hints and config.replay:
        raise UsageError(f"hints {hints} with replay {config.replay}: replayed steps are not marked; use replay 0")


def _check_group(config: AgentConfig, env: VectorEnv) -> None:
    """Raises UsageError where an agent asks for groups whose episodes begin alike, one a rollout, and gets others."""
    group = option(config, "group")
    if group and (getattr(env, "group", 0) != group or isinstance(env, StartsFromHints)):
        raise UsageError(f"group {group}: {env.env_id} was not made so; envs.make_grouped(..., group={group}) does it")
    if group and env.max_episode_steps != config.rollout:
        raise UsageError(f"rollout {config.rollout}: of groups it must be an episode, {env.max_episode_steps} steps")


def warm_up(population: Population, env: VectorEnv, *, acts: bool = True) -> float:
    """Run each of the population's functions on zeros, so that what is compiled is compiled now. -> seconds it took

    The state stays as it was. Each runs twice, because what a program gives back may lie in memory otherwise than
    what it was first given. Without `acts`, all but acting, which is a collector's affair.
    """
    config, began, state = population.agent.config, time.perf_counter(), population.state
    rollout = Transitions.empty(
        (config.rollout, population.size, config.num_envs), env.obs_dim, env.act_dim, population.device
    )
    samples = config.rollout * config.num_envs
    shape = (samples // config.minibatch, population.size, config.minibatch)
    index = torch.zeros(shape, dtype=torch.int64, device=population.device)
    for _ in range(2):
        if acts:
            warm_up_acting(population, env, rollout)
        data, _ = batches.prepare(population, [rollout])
        data |= batches.demonstrated(population, data["advantage"].shape[1], 0)
        data |= batches.marked(rollout.terminated if isinstance(env, StartsFromHints) else None)
        population.epoch(batches.refreshed(population, [rollout], data), index)
        population.diagnose(rollout, data["advantage"][:, :samples])
        population.observe(rollout)
        if isinstance(config, AlternatingConfig):
            chosen = torch.arange(taking(population.size), device=population.device)
            segments = (config.rollout, len(chosen), config.segments)
            segments = Transitions.empty(segments, env.obs_dim, env.act_dim, population.device)
            population.replayed(segments, chosen, torch.zeros_like(chosen, dtype=torch.bool))
    population.state = state
    return time.perf_counter() - began


def evaluate(
    population: Actors,
    env: VectorEnv,
    *,
    seed: int = 0,
    max_steps: int | None = None,
) -> Tensor:
    """Undiscounted returns of the mean action, one episode of each environment: [P, N] float64, on the CPU.

    The first episode of each environment counts and no other, so short episodes are not favored. Nothing is learned
    or observed. Member p's environments are a function of its seed and of `seed`.

    Raises:
        UsageError: if an episode does not end within `max_steps`, by default the task's time limit.
        NonFiniteError: if a return is not a finite number.
    """
    members, num_envs = population.size, env.num_envs // population.size
    seeds = random.fold_in(random.fold_in(population.seed, random.EVALUATION), seed)
    obs = env.reset(env_seeds(seeds, num_envs).to(env.device))
    total = torch.zeros(env.num_envs, dtype=torch.float64, device=env.device)
    running = torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
    max_steps = max_steps or env.max_episode_steps or 100_000
    for _ in range(max_steps):
        mean = population.policy(obs.view(members, num_envs, -1).to(population.device)).mean
        step = env.step(mean.flatten(0, 1).to(env.device))
        total += torch.where(running, step.reward, 0.0)
        running &= ~(step.terminated | step.truncated)
        obs = step.obs
        if not running.any():
            returns = total.view(members, num_envs).cpu()
            finite.check_metrics(env, population, "in an evaluation", {"return": returns.sum(1)})
            return returns
    raise UsageError(f"{env.env_id}: {int(running.sum())} episodes did not end within {max_steps} steps")


def env_seeds(seeds: Tensor, num_envs: int) -> Tensor:
    """A seed for each environment from one for each member: [P] -> [P * num_envs]."""
    return random.fold_in(seeds[:, None], torch.arange(num_envs, device=seeds.device)).flatten()


def _episodes(rollout: Transitions, running: Tensor, short: Tensor, hinted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Count and sum of returns [P] of the episodes that ended; `running` [P, N] carries the open ones, in place.

    What does not count: episodes whose clock was ahead, which are open where `short` [P, N], also in place, says so;
    and those from a hint, of which `hinted` [T, P, N] tells the steps: they began where the task is easier.
    """
    reward, last = rollout.reward.double(), rollout.last
    go_on = torch.cat([torch.ones_like(last[:1]), ~last[:-1]]).double()
    start = torch.cat([reward[:1] + running, reward[1:]])
    total = reverse_recurrence(start.flip(0), go_on.flip(0)).flip(0)  # return so far, of the episode at hand
    running.copy_(torch.where(last[-1], 0.0, total[-1]))
    counted = last & ~(short & (last.cumsum(0) == 1))
    counted = counted if hinted is None else counted & ~hinted
    short &= ~last.any(0)
    return counted.sum((0, 2)), torch.where(counted, total, 0.0).sum((0, 2))


def _check_recorded(summary: dict[str, Tensor]) -> None:
    """Raise ValueError unless the fresh rollout's behavior, as it was recorded, is the policy that now learns from it.

    The cheapest check there is that densities are recorded rightly: with equal densities every ratio, and so the
    effective sample size, is 1. It is of the first `CHECKED` iterations, where an agent that errs does so already. A
    policy that runs away later (a spread near 0 about a mean far out) is equal to itself in float32 no longer: that is
    for `ess_first` to show, and no reason to end the run of all members.
    """
    if "ess_first" in summary and (summary["ess_first"] < 1.0 - 1e-5).any():
        raise ValueError(
            f"the effective sample size of fresh data is {summary['ess_first'].min():.6f} before the first update, not "
            "1: the agent's `act` and its `prepare` do not see the same policy"
        )
