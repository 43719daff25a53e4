"""Film a policy."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch

import envs
from ess_rl import random
from ess_rl.errors import UsageError
from experiments import plan, records
from experiments import run as runs


def film(run: Path, member: int, out: Path, steps: int, seed: int, trust_env_spec: bool = False) -> None:
    """Film one episode of a member's mean action, rendered by Gymnasium, as .mp4 or .gif; prints its return.

    Raises:
        UsageError: no such member, no steps, an invalid seed, a file type that cannot be written here, or no way to
            render.
    """
    records.check_positive({"steps": steps})
    plan.check_seeds([seed])
    if out.suffix not in (".mp4", ".gif"):
        raise UsageError(f"--out {out}: the name must end in .mp4 or .gif")
    population, config, *_ = runs.load_run(run, trust=trust_env_spec)
    if not 0 <= member < population.size:
        raise UsageError(f"--member {member}: the run has members 0 to {population.size - 1}")
    env = envs.render_env(config["env"], **config.get("env_options", {}))
    obs = env.reset(random.fold_in(torch.tensor([seed]), 0))
    frames, total = [env.render()], 0.0
    for _ in range(steps):
        # Every member sees the same obs; one of them acts.
        action = population.policy(obs.expand(population.size, 1, -1)).mean[member]
        step = env.step(action)
        total += step.reward.item()
        if bool(step.terminated | step.truncated):
            break
        frames.append(env.render())
        obs = step.obs
    env.close()
    _write(out, np.stack(frames), env.fps)
    print(f"{out}: {len(frames)} frames, return {total:.1f} (member {member}, seed {config['seeds'][member]})")


def _write(out: Path, frames: np.ndarray, fps: float) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".gif":
        keep = max(1, round(fps / 25))  # viewers play no faster than this
        imageio.imwrite(out, frames[::keep], duration=1000.0 * keep / fps, loop=0)
        return
    try:
        imageio.imwrite(out, frames, fps=fps, codec="libx264", macro_block_size=2)
    except (ImportError, ValueError, OSError) as error:
        raise UsageError(
            f"{out}: no MP4 can be written ({error}): pip install -e '.[video]' in the project's folder, or name a .gif"
        ) from None
