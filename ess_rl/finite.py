"""Non-finite numbers: which member they belong to, and where they first occurred."""

from __future__ import annotations

import torch
from torch import Tensor

from ess_rl import processes
from ess_rl.contract import Actors, VectorEnv
from ess_rl.errors import NonFiniteError
from ess_rl.population import Population
from ess_rl.transitions import Transitions


def finite(rollout: Transitions) -> Tensor:
    """[P] bool: all numbers in a member's rollout are finite."""
    parts = (rollout.obs, rollout.action, rollout.reward.unsqueeze(-1), rollout.next_obs)
    return torch.stack([torch.isfinite(x).all(-1).all(-1).all(0) for x in parts]).all(0)


def what_broke(env: VectorEnv, population: Population, iteration: int, rollout: Transitions) -> str | None:
    """Describe the first step with a non-finite number, naming the cause before its effects; None if there is none."""
    fields = {"observation": rollout.obs, "action": rollout.action, "reward": rollout.reward}
    bad = {name: ~torch.isfinite(x) for name, x in (fields | {"next observation": rollout.next_obs}).items()}
    bad = {name: x.flatten(3).any(-1) if x.ndim > 3 else x for name, x in bad.items()}  # [T, P, N]
    found = [(*x.nonzero()[0].tolist(), name) for name, x in bad.items() if x.any()]
    if not found:
        return None
    t, member, which, name = min(found, key=lambda one: one[0])  # min keeps the order of the fields within a step
    which += processes.rank() * rollout.reward.shape[2]
    return (
        f"{env.env_id}: non-finite {name} in {_who(population, member)}, "
        f"environment {which}, step {t} of iteration {iteration + 1}; training stopped, older checkpoints are kept"
    )


def check_metrics(population: Actors, where: str, metrics: dict[str, Tensor]) -> None:
    """Raises NonFiniteError, naming the metric and the member, if one of the metrics [P] is not a finite number."""
    for name, x in metrics.items():
        if not torch.isfinite(x).all():
            member = int((~torch.isfinite(x)).nonzero()[0])
            who = _who(population, member)
            raise NonFiniteError(f"non-finite {name} in {who} {where}; stopped, older checkpoints are kept")


def _who(population: Actors, member: int) -> str:
    number = member + (population.first_member if isinstance(population, Population) else 0)
    return f"member {number} (seed {population.seeds[member]})"
