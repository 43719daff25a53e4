"""Data sets from policies: whole episodes of a run's checkpoint, or of a random policy, with the behavior recorded.

Policies act with their own noise; the random one has mean 0 and the standard deviation of uniform actions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.utils._pytree import tree_map

import envs
from envs import minari_write
from envs.minari_write import Episode
from ess_rl import random
from ess_rl.contract import VectorEnv
from ess_rl.errors import UsageError
from ess_rl.gaussian import Gaussian
from experiments import plan, records, references
from experiments.display import Line

RANDOM_LOG_STD = -0.5 * float(np.log(3.0))  # that of the uniform distribution over [-1, 1], but Gaussian
_ENVS, _NOISE = 0, 1  # purposes of random numbers

Act = Callable[[Tensor], Gaussian]  # obs [N, obs_dim] -> the policy there


def record(
    source: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[RUN]")] = None,
    *,
    dataset_id: Annotated[str, tyro.conf.arg(name="id")],
    random_env: Annotated[str | None, tyro.conf.arg(name="random")] = None,
    steps: int = 100_000,
    member: int = 0,
    checkpoint: tuple[int, ...] = (),
    temperature: float = 1.0,
    num_envs: int = 16,
    seed: int = 0,
    ref_min: float | None = None,
    ref_max: float | None = None,
    author: str | None = None,
    code_permalink: str | None = None,
    trust_env_spec: bool = False,
    overwrite: bool = False,
) -> str:
    """Record a policy's episodes, mean and log_std as a Minari data set: ess-rl dataset record RUN --id ID

    Args:
        source: the run folder whose policy acts.
        dataset_id: name of the new set, e.g. ess/hopper/medium-v0.
        random_env: instead of a run: a task, in which a random Gaussian policy acts.
        steps: minimum number of steps; every environment finishes the episode it is in.
        member: index in the run's population.
        checkpoint: training steps; the nearest checkpoint acts. Several share the steps, in the given order, the k-th
            with seed + k. Default: the newest.
        temperature: factor on the policy's standard deviation.
        num_envs: number of environments that run side by side.
        seed: seed of environments and actions.
        ref_min: return whose normalized score is 0. Default: that of the random policy.
        ref_max: return whose normalized score is 1. Default: that of the suite's table of references.
        author: person responsible for the set.
        code_permalink: link to the code.
        trust_env_spec: import the code that the env spec of the run's own data set names.
        overwrite: replace the set of that name.
    """
    if (source is None) == (random_env is None):
        raise UsageError("name the policy to record: a run folder, or --random ENV, and not both")
    records.check_positive({"steps": steps, "num_envs": num_envs})
    plan.check_seeds([seed])
    if not 0.0 < temperature < math.inf:
        raise UsageError(f"--temperature {temperature:g}: must be a finite number above 0")
    if random_env is not None and (checkpoint or member):
        raise UsageError("--random ENV: it has no --member and no --checkpoint; those are of a run")
    check_references(ref_min, ref_max)
    minari_write.check_name(dataset_id, overwrite=overwrite)
    config: records.Record
    if source is not None:
        acts, configs, whats = zip(
            *[_of_run(source, member, one, trust_env_spec) for one in checkpoint or [None]], strict=True
        )
        config, what = configs[0], ", then ".join(whats)
    else:
        acts, config = [_random(str(random_env))], {"env": random_env, "backend": "auto"}
        what = "random: Gaussian, mean 0, log_std -0.55"
    env_id, options = str(config["env"]), config.get("env_options", {})
    env = envs.make(env_id, num_envs, backend=config["backend"], **options)
    if env.max_episode_steps is None:
        raise UsageError(f"{env_id} has no time limit, so an episode may never end")
    minari_write.spec_of(env_id, **options)  # refuse now what could not be written at the end
    known = None if options else references.REFERENCES.get(env_id)  # with other options it is another task
    if ref_min is None:
        ref_min = known.random if known else float(np.mean(references.random_returns(env_id, **options)[0]))
    if ref_max is None and known is not None:
        ref_max = known.reference
    check_references(ref_min, ref_max)
    try:
        with Line() as line:
            episodes: list[Episode] = []
            for k, act in enumerate(acts):

                def tell(done: float, before: int = k) -> None:
                    line.show((before + done) / len(acts), _told((before + done) / len(acts), steps))

                episodes += roll_out(env, act, -(-steps // len(acts)), seed + k, temperature, tell)
    finally:
        env.close()
    total = sum(len(episode.reward) for episode in episodes)
    metadata: dict[str, Any] = {
        "algorithm_name": config.get("agent", "random"),
        "description": (
            f"{total} steps of {env_id}, {what}; temperature {temperature:g}, seed {seed}. infos: behavior_mean, "
            "behavior_log_std and sampled_action (before clipping) in units of [-1, 1]. Recorded by ess-rl, git commit "
            f"{records.origin()['git_commit']}."
        ),
    }
    metadata |= {"author": {author}} if author else {}
    metadata |= {"code_permalink": code_permalink} if code_permalink else {}
    metadata["ref_min_score"] = ref_min
    metadata |= {} if ref_max is None else {"ref_max_score": ref_max}
    minari_write.write(dataset_id, env_id, episodes, metadata, options=options, overwrite=overwrite)
    returns = [float(episode.reward.astype(np.float64).sum()) for episode in episodes]
    scale = "no ref_max_score: give --ref-max for normalized scores"
    if ref_max is not None:
        scale = f"normalized {np.mean([(x - ref_min) / (ref_max - ref_min) for x in returns]):.3f}"
    return (
        f"{dataset_id}: {total:,} steps in {len(episodes):,} episodes, mean return {np.mean(returns):.1f} "
        f"(std {np.std(returns):.1f}; {scale})\n{what}"
    )


def check_references(low: float | None, high: float | None) -> None:
    """Raises UsageError if returns cannot be normalized with these two."""
    if not all(math.isfinite(x) for x in (low, high) if x is not None):
        raise UsageError(f"--ref-min {low} --ref-max {high}: must be finite numbers")
    if low is not None and low == high:
        raise UsageError(f"--ref-min {low:g} --ref-max {high:g}: they must differ, or there is no normalized score")


def roll_out(
    env: VectorEnv,
    act: Act,
    steps: int,
    seed: int,
    temperature: float = 1.0,
    tell: Callable[[float], None] | None = None,
) -> Iterator[Episode]:
    """Whole episodes, at least `steps` steps in total, environment by environment; a function of the seed.

    Every environment takes an equal share of the steps and then finishes the episode it is in. Taking whichever
    episodes end first would favor short ones.
    """
    seeds = random.fold_in(torch.tensor([seed]), _ENVS)
    obs = env.reset(random.fold_in(seeds, torch.arange(env.num_envs)).to(env.device))
    share = -(-steps // env.num_envs)
    noise_seed = random.fold_in(torch.tensor(seed), _NOISE)
    log, running, step_number = [], torch.ones(env.num_envs, dtype=torch.bool), 0
    while running.any():
        policy = act(obs.cpu())
        b = Gaussian(policy.mean, policy.log_std + float(np.log(temperature)))
        noise = random.normal(random.fold_in(noise_seed, step_number), (env.num_envs, env.act_dim))
        action = b.sample(noise)
        step = env.step(action.to(env.device))
        last = (step.terminated | step.truncated).cpu()
        row = (obs, action, step.reward, step.terminated, step.truncated, step.next_obs, b.mean, b.log_std, running)
        log.append([x.cpu().clone() for x in row])
        step_number += 1
        running = running & ~(last & (step_number >= share))
        obs = step.obs
        if tell is not None and step_number % 100 == 0:
            tell(min(step_number / share, 1.0))
    columns = [torch.stack(column).numpy() for column in zip(*log, strict=True)]
    for one in range(env.num_envs):
        o, a, r, end, cut, after, mean, log_std, counts = (column[:, one] for column in columns)
        length = int(counts.sum())
        ends = np.flatnonzero((end | cut)[:length]) + 1
        for begin, stop in zip([0, *ends[:-1]], ends, strict=True):
            part = slice(begin, stop)
            yield Episode(
                np.concatenate([o[part], after[stop - 1 : stop]]), a[part], r[part], end[part], cut[part], mean[part],
                log_std[part],
            )  # fmt: skip


def _told(done: float, steps: int) -> str:
    return f"recording  {100 * done:3.0f} %  of {steps:,} steps"


def _random(env_id: str) -> Act:
    probe = envs.make(env_id, 1)
    act_dim = probe.act_dim
    probe.close()

    def act(obs: Tensor) -> Gaussian:
        mean = torch.zeros(len(obs), act_dim)
        return Gaussian(mean, mean + RANDOM_LOG_STD)

    return act


def _of_run(source: Path, member: int, checkpoint: int | None, trust: bool) -> tuple[Act, records.Record, str]:
    """Load a run's policy. -> (the policy, the run's configuration, a description)"""
    from experiments import run

    population, config, _, path = run.load_run(source, checkpoint, trust=trust)
    if not 0 <= member < population.size:
        raise UsageError(f"--member {member}: the run has members 0 to {population.size - 1}")
    population.state = tree_map(lambda x: x[member : member + 1], population.state)

    def act(obs: Tensor) -> Gaussian:
        mean, log_std = population.policy(obs[None])
        return Gaussian(mean[0], log_std[0].expand_as(mean[0]))

    what = f"{config['agent']} of seed {config['seeds'][member]} after {int(path.stem):,} {records.unit(config)}"
    return act, config, what
