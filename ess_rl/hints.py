"""Hinting: a group of environments that all failed starts once from a hint, and samples from there are trusted less.

    Roll out a group of G from one start. If all of them fail, roll the group out again from a hint, and multiply the
    loss of the hinted rollouts by Affinity^lambda (`ess_rl.diagnostics.affinity`).

Source: Wang et al. 2025 (HINT, arXiv 2510.09388), as released; for language models, where a hint is a text after the
prompt and a failure is a reward of 0. Here a hint is a start state from which the task is easier, and the policy itself
acts from there. Hence these differences:

* the ratio is exact. Theirs is computed as if the prompt had been the plain one; here the policy is told nothing;
* episodes do not end together. An environment whose own episode is over looks at the last ordinary episodes of its
  group, some of which may be from an earlier round, and no environment waits. If all fail by the clock, they end
  together;
* failed episodes are not replaced but learned from as well: they are in older rollouts by the time the group tries
  again, and a value function can use them, where a group-relative advantage would be 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ess_rl.diagnostics import AFFINITY_EPSILON, affinity


def failed_groups(failed: Tensor, group: int) -> Tensor:
    """True where an environment's whole group failed: [B] bool -> [B] bool; each group's environments are contiguous.

    `group` divides B.
    """
    return failed.view(-1, group).all(-1).repeat_interleave(group)


def starts_from_hint(over: Tensor, hinted: Tensor, failed: Tensor, group: int) -> Tensor:
    """Environments that begin an episode from a hint now, [B] bool.

    Those whose ordinary episode is over, in groups whose last ordinary episodes all failed. A hinted episode is
    followed by an ordinary one, whatever its outcome: a group is given a hint once for each time that it fails.

    Args:
        over: [B] bool, the current episode has ended.
        hinted: [B] bool, the current episode began from a hint.
        failed: [B] bool, the last ordinary episode to end was not rewarded; False before the first has ended.
        group: number of environments that share a start.
    """
    return over & ~hinted & failed_groups(failed, group)


def affinity_weight(
    log_ratio: Tensor, advantage: Tensor, hinted: Tensor, power: float | Tensor, *, act_dim: int
) -> Tensor:
    """Weights [n] of samples: Affinity^power for those that are hinted, 1 for the others. No gradient.

    Affinity is computed over the hinted samples among the n, as HINT's is over a hinted group, in the band of
    `ess_rl.diagnostics.diagnose`, 0.2 sqrt(act_dim). It is 1 while the policy is the behavior and falls as they
    diverge, whether by ratios outside the band or by their spread within it. Multiply the advantages by the weights:
    that scales a sample's term in every objective of P3O's and PPO's families, but no penalty, KL or value loss.
    """
    epsilon = AFFINITY_EPSILON * math.sqrt(act_dim)
    of_hinted = affinity(log_ratio, torch.where(hinted, advantage, 0.0), epsilon)["affinity"]
    return torch.where(hinted, of_hinted**power, 1.0)
