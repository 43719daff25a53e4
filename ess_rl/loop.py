"""The loop: collect, learn, evaluate. A generator, so that logging, checkpoints and stopping are up to the caller.

Every random draw is a function of (member's seed, purpose, iteration); see `ess_rl.random`. All environments are reset,
from new seeds, every `reset_every` iterations: simulators do not expose their whole state, so these are the points at
which a run can be saved and later resumed bit for bit.

With several processes (`ess_rl.processes`), each collects from and learns with its own share of every member's
environments; its Config holds the sizes of its share of environments and of a minibatch. Environments and actions
are the same as in one process with all of them (except for fp8 rounding, whose scale depends on the rows at hand). Each
process shuffles its own samples, so a minibatch has equally many from each, unlike a minibatch of a single process.
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

CHECKED = 10  # first iterations of a run, in which the recorded behavior is compared with the policy


@dataclass(frozen=True)
class Progress:
    """Results of one iteration. Tensors are [P], on the CPU."""

    iteration: int  # iterations done, this one included
    env_steps: int  # of each member since the start of the run, summed over its environments and all processes
    # Of the agent's updates, averaged over the iteration. From before them: `ess_first`, the effective sample size of
    # the fresh rollout, 1 if its behavior was this very policy; `ess_age_K`, that of the rollout K iterations older.
    # From after them: `ess_rl.diagnostics.diagnose` on the fresh rollout. With hints, the `hinted_share` of its steps.
    metrics: dict[str, Tensor]
    # int64: episodes that ended in this iteration, except those from a hint, and each environment's first after a
    # staggered reset.
    episodes: Tensor
    return_sum: Tensor  # float64: sum of their undiscounted raw returns
    seconds: dict[str, float] = field(default_factory=dict)  # of the stages collect, targets, update


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
    """Run iterations `start` + 1 to `iterations`: collect, learn, observe.

    Iteration 1 only observes: its rollout gives the first statistics of observations and rewards, and nothing is
    learned before there are statistics to scale the data with. Each iteration overwrites the state of the previous
    one: clone `population.state` to keep it.

    Args:
        env: population.size * config.num_envs environments, those of each member contiguous, made as the agent's Config
            asks for (`envs.make_for`).
        replay: (1 + config.replay) * config.rollout time steps or more, on the population's device.
        reset_every: iterations between two resets of all environments. An episode cut off by a reset counts as
            truncated at its last step, and not among the episodes that ended. `start` must be a multiple of it.
        collector: collects each rollout while the loop learns from the previous one, in place of `env`, which then only
            describes the environments. Requires a single process, no hints, and a lag of 1 or more.
    """
    config, device = population.agent.config, population.device
    if env.num_envs != population.size * config.num_envs:
        raise ValueError(
            f"{env.env_id} has {env.num_envs} environments; {population.size} members of num_envs {config.num_envs} "
            f"need {population.size * config.num_envs}"
        )
    if replay.capacity < (1 + config.replay) * config.rollout or replay.capacity % config.rollout:
        raise ValueError(
            f"a replay of {replay.capacity} steps cannot hold {1 + config.replay} whole rollouts of "
            f"{config.rollout} steps, and no part of another"
        )
    if (where := replay.store.reward.device).type != device.type:
        raise ValueError(f"a replay on {where} for a population on {device}: make both on the same device")
    if reset_every < 1 or (start % reset_every and start < iterations):
        raise ValueError(f"start={start} is not a multiple of reset_every={reset_every}, a number from 1 on")
    batches.check_minibatch(config)
    check_env(config, env)
    if collector is not None and config.lag < 1:
        raise ValueError("a collector acts with an older policy while the current one learns: lag must be 1 or more")
    samples = config.rollout * config.num_envs  # per rollout, in this process
    graphs, stopwatch = Graphs(device), Stopwatch(device)
    # Tensors that the stages below read and write keep their addresses, so that their recordings stay valid.
    state = population.state
    number = torch.zeros((), dtype=torch.int64, device=device)  # of the iteration
    obs = torch.zeros(env.num_envs, env.obs_dim, device=env.device)
    running = torch.zeros(population.size, config.num_envs, dtype=torch.float64, device=device)
    short = torch.zeros(population.size, config.num_envs, dtype=torch.bool, device=device)  # staggered first episodes
    replayed = ReplayedUpdates(population, replay, config) if isinstance(config, AlternatingConfig) else None
    shape = (config.rollout, population.size, config.num_envs)
    # Where only the fresh rollout is learned from, it is read from one fixed place, wherever in the ring it lies.
    alone = replayed is not None or (config.replay == 0 and replay.capacity > config.rollout)
    fresh = Transitions.empty(shape, env.obs_dim, env.act_dim, device) if alone else None
    hinted = torch.zeros(shape, dtype=torch.bool, device=device) if isinstance(env, StartsFromHints) else None

    def fresh_starts(iteration: int) -> Tensor | None:
        """Seeds [B] if all environments are reset at the start of this iteration, else None."""
        if iteration % reset_every:
            return None
        seeds = random.fold_in(random.fold_in(population.seed, random.ENVS), iteration)
        seeds = env_seeds(seeds, config.num_envs * processes.world_size()).view(population.size, -1)
        return processes.share(seeds, 1).flatten()

    # The stages of an iteration. A recording is tied to the tensors that its stage was given: its name says which.

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
        if population.state is not state:  # replaced from outside
            population.keep(state)
        stopwatch.begin()
        number.fill_(iteration)
        state["progress"].fill_(iteration / iterations)
        starts = fresh_starts(iteration)
        if starts is not None:
            running.zero_()
            short.fill_(_staggered(env))
        population.sync(iteration)
        if collector is None:
            if starts is not None:
                obs.copy_(env.reset(starts.to(env.device)))
        elif iteration == start:
            collector.begin(iteration, population.behind[0], starts)
        # Only the step of torch environments can be part of a recording.
        recordable = collector is None and env.backend == "torch" and env.device.type == device.type
        rollout, found = graphs("collect", collecting) if recordable else collecting()
        if collector is not None and iteration + 1 < iterations:
            population.sync(iteration + 1)
            collector.begin(iteration + 1, population.behind[0], fresh_starts(iteration + 1))
        if (iteration + 1) % reset_every == 0:
            rollout.truncated[-1] |= ~rollout.terminated[-1]
        replay.add(rollout)
        if fresh is None:
            rollouts = replay.rollouts(config.rollout, 1 + config.replay)
            where = f"{replay.head} {len(rollouts)}"  # a recording is tied to where its rollouts lie
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
        found = _to_host(summary | found)  # the only wait for the device if environments are on it
        episodes, return_sum, broken = (found.pop(name) for name in ("episodes", "return_sum", "broken"))
        if broken.any():
            raise NonFiniteError(processes.first_word(finite.what_broke(env, population, iteration, rollout)))
        metrics = {name: x.float() for name, x in found.items()}
        finite.check_metrics(population, f"in the updates of iteration {iteration + 1} on {env.env_id}", metrics)
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


def check_env(config: AgentConfig, env: VectorEnv) -> None:
    """Raises UsageError if environments lack the starts, hints or groups that a Config asks for, or have hints and
    groups that it does not.

    Hints go without replay: replayed steps are told apart by their age only, and it is not recorded whether their
    episode began from a hint. With groups a rollout is one episode.
    """
    hints, group = option(config, "hints"), option(config, "group")
    if option(config, "starts") == "staggered" and not _staggered(env):
        raise UsageError(f"starts staggered: {env.env_id} was not made so; envs.make(..., staggered=True) does it")
    if hints and not isinstance(env, StartsFromHints):
        raise UsageError(f"hints {hints}: {env.env_id} was not made with hints; use envs.make_hinted")
    if hints and config.num_envs % hints:
        raise UsageError(
            f"hints {hints} with num_envs {config.num_envs}: all of a group belong to one member: choose a divisor"
        )
    if isinstance(env, StartsFromHints) and env.group != hints:
        raise UsageError(f"hints {hints}: {env.env_id} was made with groups of {env.group}; they must be the same")
    if hints and config.replay:
        raise UsageError(f"hints {hints} with replay {config.replay}: replayed steps are not marked; use replay 0")
    if group and (getattr(env, "group", 0) != group or isinstance(env, StartsFromHints)):
        raise UsageError(f"group {group}: {env.env_id} was not made so; envs.make_grouped(..., group={group}) does it")
    if group and env.max_episode_steps != config.rollout:
        steps = env.max_episode_steps
        raise UsageError(
            f"rollout {config.rollout}: with groups it must be a whole episode, of {steps} steps for {env.env_id}"
        )


def warm_up(population: Population, env: VectorEnv, *, acts: bool = True) -> float:
    """Run each of the population's functions on zeros, so that compilation happens now. -> seconds it took

    The state stays unchanged. Each function runs twice, because a program's outputs may have another memory layout
    than its first inputs. Without `acts`, acting is left out: it is then up to a collector.
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

    Only the first episode of each environment counts, so short episodes are not favored. Nothing is learned, and no
    statistics are updated. Member p's environments are a function of its seed and `seed`.

    Raises:
        ValueError: if the environments are no multiple of the members, or staggered, which cuts first episodes short.
        UsageError: if an episode does not end within `max_steps`, by default the task's time limit.
        NonFiniteError: if a return is not a finite number.
    """
    members, num_envs = population.size, env.num_envs // population.size
    if _staggered(env):
        raise ValueError(f"{env.env_id} is staggered, so its first episodes are short: evaluate in one from envs.make")
    if env.num_envs % members:
        raise ValueError(f"{env.env_id} has {env.num_envs} environments: give a multiple of the {members} members")
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
            finite.check_metrics(population, f"in an evaluation on {env.env_id}", {"return": returns.sum(1)})
            return returns
    raise UsageError(f"{env.env_id}: {int(running.sum())} episodes did not end within {max_steps} steps")


def _staggered(env: VectorEnv) -> bool:
    """Whether the clocks of the first episodes after a reset do not all start together."""
    return getattr(env, "staggered", False)


def env_seeds(seeds: Tensor, num_envs: int) -> Tensor:
    """A seed for each environment from one for each member: [P] -> [P * num_envs]."""
    return random.fold_in(seeds[:, None], torch.arange(num_envs, device=seeds.device)).flatten()


def _episodes(rollout: Transitions, running: Tensor, short: Tensor, hinted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Count and sum of returns [P] of the episodes that ended; `running` [P, N] carries the open returns, in place.

    Not counted: episodes with a staggered clock, which are still open where `short` [P, N] (also updated in place) is
    set; and episodes from a hint, whose steps `hinted` [T, P, N] marks: they began where the task is easier.
    """
    reward, last = rollout.reward.double(), rollout.last
    go_on = torch.cat([torch.ones_like(last[:1]), ~last[:-1]]).double()
    start = torch.cat([reward[:1] + running, reward[1:]])
    total = reverse_recurrence(start.flip(0), go_on.flip(0)).flip(0)  # return so far of the current episode
    running.copy_(torch.where(last[-1], 0.0, total[-1]))
    counted = last & ~(short & (last.cumsum(0) == 1))
    counted = counted if hinted is None else counted & ~hinted
    short &= ~last.any(0)
    return counted.sum((0, 2)), torch.where(counted, total, 0.0).sum((0, 2))


def _check_recorded(summary: dict[str, Tensor]) -> None:
    """Raise ValueError unless the recorded behavior of the fresh rollout is the policy that now learns from it.

    The cheapest possible check that densities are recorded correctly: with equal densities every ratio, and so the
    effective sample size, is 1. It covers the first `CHECKED` iterations, in which a faulty agent already fails it. A
    policy that diverges later (a spread near 0 around a mean far out) no longer equals itself in float32: `ess_first`
    shows that, and it is no reason to end the run of all members.
    """
    if "ess_first" in summary and (summary["ess_first"] < 1.0 - 1e-5).any():
        raise ValueError(
            f"the effective sample size of fresh data is {summary['ess_first'].min():.6f} before the first update, not "
            "1: the agent's `act` and its `prepare` do not see the same policy"
        )
