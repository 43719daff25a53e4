"""Hinting: a group of environments of which all failed starts once from a hint, and its samples are trusted less.

    Roll out a group of G from one start. If all of them fail, roll the group out again from a hint, and multiply the
    loss of what came of that by Affinity^lambda (`ess_rl.diagnostics.affinity`).

Source: Wang et al. 2025 (HINT, arXiv 2510.09388), as released; of language models, whose hint is a text behind the
prompt and whose failure is a reward of 0. Here a hint is a start state from which the task is easier, and the policy
acts from there itself. That makes differences:

* the ratio is exact. Theirs is taken as if the prompt had been the plain one, here nothing was said to the policy;
* episodes do not end together. An environment whose own episode is over looks at the last ordinary episodes of its
  group, of which some may be of an earlier round, and nobody waits. Where all fail by the clock, they end together;
* failed episodes are not replaced but learned from as well: they are in older rollouts by the time the group tries
  again, and a value function makes something of them, where a group-relative advantage would be 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ess_rl.diagnostics import AFFINITY_EPSILON, affinity


def failed_groups(failed: Tensor, group: int) -> Tensor:
    """Whether all of an environment's group failed: [B] bool -> [B] bool; the environments of a group stand together.

    `group` divides B.
    """
    return failed.view(-1, group).all(-1).repeat_interleave(group)


def starts_from_hint(over: Tensor, hinted: Tensor, failed: Tensor, group: int) -> Tensor:
    """Which environments begin an episode from a hint now, [B] bool.

    Those whose ordinary episode is over, in groups that failed with all of theirs. After a hinted episode comes an
    ordinary one, whatever became of it: a group is given a hint once for each time that it fails.

    Args:
        over: [B] bool, the episode at hand has ended.
        hinted: [B] bool, it was from a hint.
        failed: [B] bool, an environment's last ordinary episode that ended was not paid; False before the first ended.
        group: number of environments that share a start.
    """
    return over & ~hinted & failed_groups(failed, group)


def affinity_weight(
    log_ratio: Tensor, advantage: Tensor, hinted: Tensor, power: float | Tensor, *, act_dim: int
) -> Tensor:
    """Weights [n] of samples: Affinity^power of those that are hinted, 1 of the others. No gradient.

    Affinity is that of the hinted samples among the n, as theirs is of a hinted group, in the band of
    `ess_rl.diagnostics.diagnose`, 0.2 sqrt(act_dim). It is 1 while the policy is the one that acted and falls as it
    leaves that, be it by ratios beyond the band or by their spread within. Multiply the advantages by them: that
    multiplies a sample's term in every objective of P3O's and PPO's families, but no penalty, KL or value loss.
    """
    epsilon = AFFINITY_EPSILON * math.sqrt(act_dim)
    of_hinted = affinity(log_ratio, torch.where(hinted, advantage, 0.0), epsilon)["affinity"]
    return torch.where(hinted, of_hinted**power, 1.0)
