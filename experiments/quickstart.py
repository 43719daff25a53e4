"""A first look: P3O and PPO on the same task, side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import envs
from experiments import figures, records, run
from experiments.report import tables

OUT = Path("runs/quickstart")


def main(
    env: str = "HalfCheetah-v5",
    seeds: int = 3,
    steps: int = 150_000,
    out: Path = OUT,
    overwrite: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    compile: Literal["auto", "on", "off"] = "auto",
) -> None:
    """Train P3O and PPO and show where the curves, the plot and the checkpoints are.

    Args:
        env: the task.
        seeds: how many seeds of each agent, trained together.
        steps: env steps of each seed.
        out: where the two runs go; runs of an earlier quickstart at the default place are replaced.
        overwrite: replace runs at another place too.
        device: as for `ess-rl train`.
        compile: as for `ess-rl train`.
    """
    began = time.perf_counter()
    probe = envs.make(env, 1)
    print(f"P3O and PPO on {env} ({probe.backend}), {seeds} seeds each, {steps:,} env steps a seed\n")
    probe.close()
    folders = []
    for agent in ("p3o", "ppo"):
        folder = run.start(
            agent,
            env,
            settings={},
            sweep={},
            seeds=range(seeds),
            steps=steps,
            out=out / agent,
            device=device,
            compiled=compile,
            overwrite=overwrite or out == OUT,
        )
        run.carry_on(folder)
        print()
        folders.append(folder)
    figures.learning_curves(folders, out / "curves.png")
    print(tables.comparison(folders))
    print(f"\n{time.perf_counter() - began:.0f} s in all, compilation and evaluation included.")
    print(f"picture:      {out / 'curves.png'}")
    for folder in folders:
        print(f"checkpoint:   {records.checkpoints(folder)[-1]}")
    print(f"TensorBoard:  tensorboard --logdir {out}")
    if not env.startswith("ess/"):
        print(f"film:         ess-rl play {folders[0]}")
    print(f"go further:   ess-rl train p3o --env {env} --seeds 10")
