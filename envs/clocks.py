"""Clocks that do not strike together: how far those of the first episodes after a reset are ahead."""

from __future__ import annotations

import torch
from torch import Tensor

from ess_rl import random

_CLOCK = -2  # folded into a seed; the numbers of episodes are 0 and above


def first_clocks(seeds: Tensor, max_episode_steps: int) -> Tensor:
    """Control steps that count as done in each environment's first episode: [B] int64 in [0, max_episode_steps).

    Uniform, a function of the environment's seed alone. Environments that are reset at once, and whose episodes end by
    the clock, otherwise pass through their episodes in step: a rollout then sees one stretch of them, and the next
    rollout another. So an episode is cut once, where its clock says so, and from then on all are whole.

    Source: Rudin et al. 2021 (arXiv 2109.11978) begin with random episode lengths for the same reason.
    """
    share = random.uniform(random.fold_in(seeds, _CLOCK), (), torch.float64)
    return (share * max_episode_steps).to(torch.int64)
