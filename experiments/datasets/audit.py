"""Audit of a data set: its contents, what looks wrong, and how well a Gaussian describes its behavior."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from envs.minari_data import DataSet
from ess_rl import behavior
from ess_rl.gaussian import Gaussian
from experiments.report.text import table

FLOORS = (-5.0, -4.0, -3.0, -2.0, -1.0)  # of log_std, in units of [-1, 1]
_SAMPLES = 200_000  # at most, for fitting models and for reports


def audit(data: DataSet, model_updates: int) -> str:
    """Report sizes, returns, flags, actions, duplicates, the behavior, and two models of it. -> Markdown"""
    return "\n".join([*_facts(data), "", *_behavior(data, model_updates)])


def _facts(data: DataSet) -> list[str]:
    d, count = data.transitions, len(data.transitions.reward)
    starts = data.starts.numpy()
    ends = np.append(starts[1:], count)
    lengths = ends - starts
    returns = np.add.reduceat(d.reward.numpy().astype(np.float64), starts)
    terminated, truncated, action = d.terminated.numpy(), d.truncated.numpy(), d.action.numpy()
    last = np.zeros(count, bool)
    last[ends - 1] = True
    lines = [
        f"{data.id}: {count:,} steps in {len(starts):,} episodes of {lengths.min()} to {lengths.max()} steps",
        f"returns: mean {returns.mean():.1f}, std {returns.std():.1f}, quartiles "
        f"{' '.join(f'{x:.1f}' for x in np.percentile(returns, [0, 25, 50, 75, 100]))}",
    ]
    if data.references:
        low, high = data.references
        lines.append(f"normalized: mean {((returns - low) / (high - low)).mean():.3f} (0: {low:g}, 1: {high:g})")
    lines.append(f"episodes that terminated: {terminated[ends - 1].mean():.1%}")
    at_bound, outside = np.abs(action) >= 0.999, np.abs(action) > 1.0 + 1e-6
    lines.append(f"actions at the bounds: {' '.join(f'{x:.1%}' for x in at_bound.mean(0))} (one an action dimension)")
    lines.append(f"actions sampled beyond the bounds: {outside.any(1).mean():.1%} of the steps")
    constant = (d.obs.amax(0) == d.obs.amin(0)).sum()
    twice = len(starts) - len({_digest(d.obs[a:b].numpy(), action[a:b]) for a, b in zip(starts, ends, strict=True)})
    wrong = {
        "steps with an end in the middle of an episode": ((terminated | truncated) & ~last).sum(),
        "steps both terminated and truncated": (terminated & truncated).sum(),
        "episodes without an end flag (taken as truncated)": data.cut,
        "duplicated episodes": twice,
        "observations that never change": int(constant),
    }
    found = [f"  {what}: {number:,}" for what, number in wrong.items() if number]
    return [*lines, "looks wrong:", *found] if found else [*lines, "looks wrong: nothing"]


def _some_episodes(starts: torch.Tensor, steps: int) -> torch.Tensor:
    """Step indices [n] of whole episodes, spread evenly because policies lie in order; n about _SAMPLES at most."""
    chosen = torch.arange(steps)
    if steps <= _SAMPLES:
        return chosen
    number = torch.bucketize(chosen, starts, right=True) - 1  # number of the episode that a step is in
    share = _SAMPLES / steps
    return chosen[torch.ceil((number + 1) * share) > torch.ceil(number * share)]  # the first episode is one of them


def _digest(obs: np.ndarray, action: np.ndarray) -> bytes:
    return hashlib.blake2b(obs.tobytes() + action.tobytes(), digest_size=16).digest()


def _behavior(data: DataSet, model_updates: int) -> list[str]:
    d = data.transitions
    part = _some_episodes(data.starts, len(d.reward))
    obs, action = d.obs[part].clone(), d.action[part].clone()
    recorded = Gaussian(d.behavior_mean[part].clone(), d.behavior_log_std[part].clone())
    lines = [f"of {len(part):,} steps, in episodes evenly spread over the set:"] if len(part) < len(d.reward) else []
    if not data.recorded_behavior:
        lines.append("behavior: not recorded")
    else:
        z = (action - recorded.mean) * torch.exp(-recorded.log_std)
        lines += [
            f"behavior: recorded; log_std {recorded.log_std.min():.2f} to {recorded.log_std.max():.2f}, "
            f"nll {-recorded.log_prob(action).mean():.3f} nats",
            f"  actions in its standard deviations: mean {z.mean():.3f}, std {z.std():.3f} (0, 1 for what acted)",
        ]
    config = behavior.Config(max_updates=model_updates)
    model = behavior.fit(obs, action, d.last[part], seeds=(0, 1), config=config)
    outside = model.held_out
    reference = Gaussian(*(x[outside] for x in recorded)) if data.recorded_behavior else None
    lines.append(
        f"behavior models: two, {model.updates:,} updates, nll on held-out episodes "
        f"{' and '.join(f'{x:.3f}' for x in model.held_out_nll.tolist())} nats"
    )
    against = (
        "the recorded behavior" if data.recorded_behavior else "one another (ess and KL of the first to the second)"
    )
    lines.append(f"how they react to the floor of log_std, on held-out episodes, against {against}:")
    rows = [["floor", "states floored", "nll", "ess", "KL"]]
    for one in behavior.floor_report(model, obs[outside], action[outside], reference, FLOORS):
        rows.append([
            f"{one['floor']:g}", f"{one['floored']:.1%}", f"{one['nll']:.3f}", f"{one['ess']:.3f}", f"{one['kl']:.4f}"
        ])  # fmt: skip
    return [*lines, table(rows)]
