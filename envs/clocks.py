"""Staggered clocks: how far ahead the clocks of the first episodes after a reset are."""

from __future__ import annotations

import torch
from torch import Tensor

from ess_rl import random

_CLOCK = -2  # folded into a seed; episode numbers are 0 and above


def first_clocks(seeds: Tensor, max_episode_steps: int) -> Tensor:
    """Control steps counted as already done in each environment's first episode: [B] int64 in [0, max_episode_steps).

    Uniform, and a function of the environment's seed only. Without these steps, environments that are reset at the same
    time and whose episodes end by the clock pass through their episodes in step: one rollout sees one stretch of them,
    the next rollout another. With them, the first episode is cut short by its clock, and all later ones are whole.

    Source: Rudin et al. 2021 (arXiv 2109.11978) start with random episode lengths for the same reason.
    """
    share = random.uniform(random.fold_in(seeds, _CLOCK), (), torch.float64)
    return (share * max_episode_steps).to(torch.int64)
