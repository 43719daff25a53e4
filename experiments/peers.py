"""Stable-Baselines3 PPO under this suite's evaluation and records, as the reference beside our own PPO.

Each seed is one process of its own with one thread, two or more at a time, and leaves one file when it is done; a
killed run goes on with the seeds that are missing.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import envs
from ess_rl.errors import UsageError
from experiments import records
from experiments.records import Record


def sb3_ppo(
    env: str,
    seeds: int = 1,
    seed0: int = 0,
    steps: int = 1_000_000,
    num_envs: int = 16,
    rollout: int = 128,
    epochs: int = 10,
    minibatch: int = 64,
    learning_rate: float = 3e-4,
    log_std: float = 0.0,
    episodes: int = 20,
    jobs: int | None = None,
    out: Path | None = None,
) -> Path:
    """Train SB3 PPO (MlpPolicy, VecNormalize, DummyVecEnv) with a linearly decayed learning rate.

    Args:
        env: a Gymnasium id.
        seeds: how many, one after the other on each of the jobs.
        seed0: the first of them.
        steps: env steps of each seed.
        num_envs: environments of a seed.
        rollout: steps of each environment between updates.
        epochs: passes over these samples.
        minibatch: samples of one update.
        learning_rate: at the start.
        log_std: of the initial policy; SB3's own default is 0.
        episodes: of the final evaluation (mean action, statistics frozen), apart from training.
        jobs: seeds at a time; default: one a core.
        out: the run folder; default: runs/sb3-ppo-ENV. If it holds this run unfinished or with fewer seeds, it goes on.
    """
    counts = {"seeds": seeds, "steps": steps, "num_envs": num_envs, "rollout": rollout, "epochs": epochs}
    records.check_positive(
        {**counts, "minibatch": minibatch, "episodes": episodes, "jobs": 1 if jobs is None else jobs}
    )
    envs.make(env, 1, backend="gymnasium").close()  # refuses what cannot be had, before a folder is made
    out = out or records.default_folder("sb3-ppo", env)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings = {
        "num_envs": num_envs, "rollout": rollout, "epochs": epochs, "minibatch": minibatch,
        "learning_rate": learning_rate, "log_std": log_std,
    }  # fmt: skip
    config = {
        "format": records.FORMAT, "agent": "sb3-ppo", "env": env, "backend": "gymnasium",
        "seeds": list(range(seed0, seed0 + seeds)), "sweep": {}, "steps": steps, "episodes": episodes,
        "device": "cpu", "compiled": False, "config": settings, **records.origin(),
    }  # fmt: skip
    if (out / "config.json").exists():
        before = records.read_config(out)
        for name in ("agent", "env", "steps", "episodes", "config"):
            if before[name] != config[name]:
                raise UsageError(f"--out {out} holds another run: its {name!r} is {before[name]}: choose another place")
        if not set(before["seeds"]) <= set(config["seeds"]):
            raise UsageError(
                f"--out {out} holds seeds {before['seeds']}, which are not all asked for: ask for them too"
            )
        if before["seeds"] != config["seeds"]:
            (out / "result.json").unlink(missing_ok=True)  # of fewer seeds; made anew from the seeds' own files
    else:
        records.prepare_folder(out, overwrite=False)
    records.write_json(out / "config.json", config)
    missing = [seed for seed in config["seeds"] if not (out / f"seed-{seed}.json").exists()]
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(max_workers=jobs or cores, mp_context=context) as pool:
        waiting = {pool.submit(train_one, env, seed, steps, episodes, settings): seed for seed in missing}
        for done in as_completed(waiting):
            records.write_json(out / f"seed-{waiting[done]}.json", done.result())
            print(f"sb3-ppo {env} seed {waiting[done]}: final return {done.result()['final_return']:.1f}", flush=True)
    parts = [records.read_json(out / f"seed-{seed}.json") for seed in config["seeds"]]
    result = {
        **{
            name: config[name] for name in ("format", "agent", "env", "backend", "seeds", "sweep", "device", "compiled")
        },
        "env_steps": parts[0]["env_steps"],
        "final_return": [part["final_return"] for part in parts],
        "training_return": [part["training_return"] for part in parts],
        "episodes": episodes,
        # Of one process on one thread, as a rule with others beside it: `ess-rl throughput` is the fair measure.
        "steps_per_second": sum(part["env_steps"] / part["training_seconds"] for part in parts) / len(parts),
        "peak_memory_mib": max(part["peak_memory_mib"] for part in parts),
        **records.origin(),
    }
    records.write_json(out / "result.json", result)
    return out


def train_one(env: str, seed: int, steps: int, episodes: int, settings: Record, threads: int = 1) -> Record:
    """Train and evaluate one seed in this process."""
    import numpy as np
    import torch
    from stable_baselines3.common.evaluation import evaluate_policy

    torch.set_num_threads(threads)
    model, normalized = build(env, seed, settings)
    late: list[float] = []  # returns of the episodes that ended in the last tenth of training
    began = time.perf_counter()
    model.learn(steps, callback=_collect_late(late, steps))
    seconds = time.perf_counter() - began
    normalized.training = normalized.norm_reward = False
    normalized.seed(10_000 + seed)
    # The Monitor inside the environments gives raw returns; SB3 spreads the episodes evenly over the environments.
    returns, _ = evaluate_policy(model, normalized, episodes, deterministic=True, return_episode_rewards=True)
    return {
        "seed": seed,
        "env_steps": model.num_timesteps,
        "final_return": float(np.mean(returns)),
        "training_return": float(np.mean(late)) if late else None,
        "training_seconds": seconds,
        "peak_memory_mib": records.peak_memory_mib(),
    }


def build(env: str, seed: int, settings: Record) -> tuple[Any, Any]:
    """-> (SB3 PPO, its VecNormalize)"""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    vector = VecNormalize(make_vec_env(env, settings["num_envs"], seed=seed))
    start = settings["learning_rate"]
    model = PPO(
        "MlpPolicy",
        vector,
        n_steps=settings["rollout"],
        n_epochs=settings["epochs"],
        batch_size=settings["minibatch"],
        learning_rate=lambda left: max(left, 0.0) * start,  # SB3 counts past the end
        policy_kwargs={"log_std_init": settings["log_std"]},
        seed=seed,
        device="cpu",
    )
    return model, vector


def _collect_late(late: list[float], steps: int) -> Callable[[dict[str, Any], dict[str, Any]], bool]:
    def look(local: dict[str, Any], _: dict[str, Any]) -> bool:
        if local["self"].num_timesteps > 0.9 * steps:
            late.extend(info["episode"]["r"] for info in local["infos"] if "episode" in info)
        return True

    return look
