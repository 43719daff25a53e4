"""Returns used to normalize scores: score = (return - random) / (reference - random). One table for all reports.

A score of 0 is the policy that acts uniformly at random, 1 our PPO's published result; neither is a bound. Numbers
change only together with `VERSION`: normalized scores of different versions must not be shown side by side.

    python -m experiments.references                # measures the random returns and prints rows for the table

No torch at import: the report reads this.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from ess_rl.errors import UsageError

VERSION = "3 (2026-11-22)"
RANDOM_SOURCE = (
    "python -m experiments.references: actions uniform in [-1, 1], the first episode of each of 100 environments, "
    "seeds 0 to 99; gymnasium 1.4.0, mujoco 4.0.0, envpool 1.2.5, torch 2.13.0"
)
_PPO_1M = "IQM of ten seeds of PPO with clip 0.2, 1M env steps: ess-rl train ppo --env {} --seeds 10"
_PPO_300K = "IQM of ten seeds of PPO with clip 0.2, 300k env steps: ess-rl train ppo --env {} --seeds 10 --steps 300000"


@dataclass(frozen=True)
class Reference:
    """Undiscounted returns of one task."""

    random: float  # mean return of the uniformly random policy; see RANDOM_SOURCE
    random_error: float  # standard error of that mean
    reference: float | None = None  # None: nothing published yet, so the task has no normalized score
    source: str = ""  # how `reference` was measured; {} stands for the task


# The comment after each row: the backend that its random return was measured on.
REFERENCES: dict[str, Reference] = {
    "Pendulum-v1": Reference(-1205, 31, -178.3, _PPO_300K),  # torch
    "MountainCarContinuous-v0": Reference(-32.19, 1),  # torch
    "ess/MountainCarContinuousSparse-v0": Reference(0.01, 0.01),  # torch
    "ess/CartPole-v0": Reference(28.53, 1.4),  # torch
    "ess/CartPoleSwingUp-v0": Reference(5.371, 0.94),  # torch
    "ess/Acrobot-v0": Reference(-500, 0),  # torch
    "ess/TwoLinkArm-v0": Reference(-83.8, 3.6),  # torch
    "ess/TwoLinkArmSparse-v0": Reference(0.06, 0.02),  # torch
    "ess/LQR-v0": Reference(-10470, 1200),  # torch
    "Ant-v5": Reference(-68.34, 11),  # envpool
    "HalfCheetah-v5": Reference(-287.5, 8.8, 6312.6, _PPO_1M),  # envpool
    "Hopper-v5": Reference(16.25, 1.4, 2676.9, _PPO_1M),  # envpool
    "Humanoid-v5": Reference(119.3, 4),  # envpool
    "HumanoidStandup-v5": Reference(33370, 210),  # envpool
    "InvertedDoublePendulum-v5": Reference(46.33, 1.8, 2504.8, _PPO_1M),  # envpool
    "InvertedPendulum-v5": Reference(4.79, 0.36, 1000.0, _PPO_1M),  # envpool
    "Pusher-v5": Reference(-149.6, 0.81),  # envpool
    "Reacher-v5": Reference(-42.92, 0.41, -4.43, _PPO_1M),  # envpool
    "Swimmer-v5": Reference(0.2483, 1, 41.7, _PPO_1M),  # envpool
    "Walker2d-v5": Reference(1.822, 0.72, 4287.5, _PPO_1M),  # envpool
}


def normalized(env_id: str, value: float) -> float | None:
    """The return as a fraction of the way from random to the reference; None if the task has no reference."""
    known = REFERENCES.get(env_id)
    if known is None or known.reference is None:
        return None
    return (value - known.random) / (known.reference - known.random)


def random_returns(env_id: str, episodes: int = 100, seed: int = 0, **task: Any) -> tuple[list[float], str]:
    """Returns of actions drawn uniformly from [-1, 1]: the first episode of each of `episodes` environments.

    The first of each, because taking whichever episodes end first would favor short ones. `task`: its options, as
    Gymnasium knows them. -> (returns, backend)
    """
    import torch

    import envs

    torch.set_num_threads(1)
    backend = "gymnasium" if task else envs.make(env_id, 1).backend
    options: dict[str, Any] = {"num_threads": 1} if backend == "envpool" else task
    env = envs.make(env_id, episodes, backend=backend, **options)
    generator = torch.Generator().manual_seed(seed)
    env.reset(torch.arange(seed, seed + episodes))
    total, alive = torch.zeros(episodes, dtype=torch.float64), torch.ones(episodes, dtype=torch.bool)
    while alive.any():
        step = env.step(2.0 * torch.rand(episodes, env.act_dim, generator=generator) - 1.0)
        total += step.reward.double() * alive
        alive &= ~(step.terminated | step.truncated)
    env.close()
    return total.tolist(), backend


def main(env_ids: list[str]) -> None:
    """Print a row of `REFERENCES` for each task, by default for all of `envs.ENVS`."""
    import numpy as np

    import envs

    for env_id in env_ids or list(envs.ENVS):
        returns, backend = random_returns(env_id)
        error = np.std(returns, ddof=1) / len(returns) ** 0.5
        print(f'    "{env_id}": Reference({np.mean(returns):.4g}, {error:.2g}),  # {backend}', flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UsageError as error:
        sys.exit(f"references: {error}")
