"""Stable-Baselines3's PPO and SAC under this suite's evaluation and records, as references next to our own agents."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import envs
from ess_rl.child import peak_memory_mib
from ess_rl.errors import NonFiniteError, UsageError
from experiments import plan, records
from experiments.peers import by_seed
from experiments.records import Record


@dataclass(frozen=True)
class PPOConfig:
    """Defaults are those of `agents.ppo`."""

    learning_rate: float = 3e-4  # of Adam, at the start; falls linearly to 0
    discount: float = 0.99  # per control step
    lambda_: float = 0.95  # of GAE
    clip: float = 0.2  # how far the ratio may move from 1 before its sample has no gradient
    log_std: float = -1.0  # of the initial policy; SB3's own default is 0
    num_envs: int = 16  # environments of one seed
    rollout: int = 128  # steps of each environment between updates
    epochs: int = 10  # passes over those num_envs * rollout samples
    minibatch: int = 64  # samples of one update


@dataclass(frozen=True)
class SACConfig:
    """Defaults are those of SB3 and of the paper (Haarnoja et al. 2018, arXiv 1812.05905).

    The exception is `learning_starts`, which is 100 in SB3 and 10,000 for HalfCheetah in the paper.
    """

    learning_rate: float = 3e-4  # of Adam, for policy, critics and temperature
    discount: float = 0.99  # per control step
    tau: float = 0.005  # share of the critics mixed into their targets at each update
    num_envs: int = 1  # environments of one seed; one update per step of each
    minibatch: int = 256  # samples of one update
    buffer: int = 1_000_000  # transitions kept
    learning_starts: int = 10_000  # random steps before the first update


def _as_ours(env: Any) -> Any:
    """Flatten observations and scale actions to [-1, 1], if needed: PPO's hyperparameters are in that unit."""
    from gymnasium.wrappers import FlattenObservation, RescaleAction

    space, low, high = env.action_space, np.float32(-1.0), np.float32(1.0)
    if len(env.observation_space.shape or ()) != 1:
        env = FlattenObservation(env)
    return env if (space.low == low).all() and (space.high == high).all() else RescaleAction(env, low, high)


def ppo(env: str, seed: int, config: PPOConfig) -> tuple[Any, Any]:
    """-> (SB3 PPO with an MlpPolicy, its environments under VecNormalize)"""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    envs.backends_of(env)  # registers this project's own tasks, in whichever process this is
    made = make_vec_env(env, config.num_envs, seed=seed, wrapper_class=_as_ours)
    vector = VecNormalize(made, gamma=config.discount)
    model = PPO(
        "MlpPolicy",
        vector,
        n_steps=config.rollout,
        n_epochs=config.epochs,
        batch_size=config.minibatch,
        gamma=config.discount,
        gae_lambda=config.lambda_,
        clip_range=config.clip,
        learning_rate=lambda left: max(left, 0.0) * config.learning_rate,  # SB3 counts past the end
        policy_kwargs={"log_std_init": config.log_std},
        seed=seed,
        device="cpu",
    )
    return model, vector


def sac(env: str, seed: int, config: SACConfig) -> tuple[Any, Any]:
    """-> (SB3 SAC with an MlpPolicy, its environments: neither observations nor rewards normalized)"""
    from stable_baselines3 import SAC
    from stable_baselines3.common.env_util import make_vec_env

    envs.backends_of(env)
    vector = make_vec_env(env, config.num_envs, seed=seed, wrapper_class=_as_ours)
    model = SAC(
        "MlpPolicy",
        vector,
        learning_rate=config.learning_rate,
        gamma=config.discount,
        tau=config.tau,
        batch_size=config.minibatch,
        buffer_size=config.buffer,
        learning_starts=config.learning_starts,
        gradient_steps=-1,  # as many as there were steps
        seed=seed,
        device="cpu",
    )
    return model, vector


class Peer(NamedTuple):
    """One algorithm of another library."""

    description: str
    config: type
    build: Callable[[str, int, Any], tuple[Any, Any]]  # env, seed, config -> (model, its environments)


PEERS: dict[str, Peer] = {
    "sb3-ppo": Peer("Stable-Baselines3's PPO, with PPO's numbers: the reference beside ours", PPOConfig, ppo),
    "sb3-sac": Peer("Stable-Baselines3's SAC: off-policy with a critic, hours a seed", SACConfig, sac),
}


def start(
    agent: str,
    env_id: str,
    *,
    settings: Mapping[str, Any],
    seeds: Sequence[int],
    steps: int,
    out: Path,
    episodes: int = records.EPISODES,
    overwrite: bool = False,
) -> Path:
    """Check a configuration, make its folder and write config.json. -> the folder

    A folder that holds the same run, with the same seeds or fewer, is reused, and the run resumes.

    Args:
        settings: fields of the peer's config that are not at their defaults.
        steps: env steps of each seed; rounded up to whole iterations by SB3.
        episodes: of the final evaluation of each seed (mean action, statistics frozen), separate from training.

    Raises:
        UsageError: something in it cannot work, or `out` holds something else. In either case nothing is written.
    """
    config = PEERS[agent].config(**settings)
    by_seed.check("Stable-Baselines3", config, seeds, steps=steps, episodes=episodes)
    if config.minibatch < 2:
        raise UsageError(
            f"--minibatch {config.minibatch}: must be at least 2, because advantages are standardized over it"
        )
    if config.num_envs * getattr(config, "rollout", 2) < 2:
        raise UsageError("--num-envs 1 --rollout 1: one step has no spread to standardize; --rollout 2 or more")
    probe = envs.make(env_id, 1, backend="gymnasium")  # refuse an unavailable task before a folder is made
    plan.time_limit(env_id, probe.max_episode_steps)
    probe.close()
    record = {
        "format": records.FORMAT, "agent": agent, "env": env_id, "backend": "gymnasium",
        "seeds": list(seeds), "sweep": {}, "steps": steps, "episodes": episodes,
        "device": "cpu", "compiled": False, "config": dataclasses.asdict(config), **records.origin(),
    }  # fmt: skip
    return by_seed.begin(record, out, ("agent", "env", "steps", "episodes", "config"), overwrite=overwrite)


def carry_on(run: Path, jobs: int | None = None) -> Record:
    """Train the missing seeds, `jobs` at a time (default: one per core), and write the result. -> the result"""
    return by_seed.train_missing(run, jobs, train_one)


def train_one(config: Record, seed: int) -> Record:
    """Train and evaluate one seed in this process."""
    import torch
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)
    peer, steps = PEERS[config["agent"]], config["steps"]
    model, environments = peer.build(config["env"], seed, peer.config(**config["config"]))
    late: list[float] = []  # returns of the episodes that ended in the last tenth of training
    began = time.perf_counter()
    try:
        model.learn(steps, callback=_collect_late(late, steps))
    except ValueError as error:  # raised by torch's distributions when the policy has become NaN
        raise _diverged(config, seed, str(error).split("\n")[0]) from None
    seconds = time.perf_counter() - began
    if isinstance(environments, VecNormalize):
        environments.training = environments.norm_reward = False
    environments.seed(10_000 + seed)
    # The Monitor inside the environments gives raw returns; SB3 spreads the episodes evenly over the environments.
    returns, _ = evaluate_policy(
        model, environments, config["episodes"], deterministic=True, return_episode_rewards=True
    )
    if not np.isfinite(returns).all():
        raise _diverged(config, seed, "a final return is not a finite number")
    return {
        "seed": seed,
        "env_steps": model.num_timesteps,
        "final_return": float(np.mean(returns)),
        "training_return": float(np.mean(late)) if late else None,
        "training_seconds": seconds,
        "peak_memory_mib": peak_memory_mib(),
    }


def _diverged(config: Record, seed: int, why: str) -> NonFiniteError:
    return NonFiniteError(f"{config['agent']} on {config['env']}, seed {seed}: {why}; finished seeds are kept")


def _collect_late(late: list[float], steps: int) -> Callable[[dict[str, Any], dict[str, Any]], bool]:
    def look(local: dict[str, Any], _: dict[str, Any]) -> bool:
        if local["self"].num_timesteps > 0.9 * steps:
            late.extend(info["episode"]["r"] for info in local["infos"] if "episode" in info)
        return True

    return look
