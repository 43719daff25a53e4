"""Running mean and variance as plain state, for observations and for the scale of rewards.

Statistics are float64: a float32 count stops increasing at 2^24 steps.
"""

import torch
from torch import Tensor

from ess_rl import checks, processes
from ess_rl.contract import State, Tree
from ess_rl.returns import reverse_recurrence
from ess_rl.transitions import Transitions


def init(shape: tuple[int, ...], device: torch.device) -> Tree:
    """Statistics before any data: mean 0, variance 1, count 0."""
    return {
        "count": torch.zeros((), dtype=torch.float64, device=device),
        "mean": torch.zeros(shape, dtype=torch.float64, device=device),
        "var": torch.ones(shape, dtype=torch.float64, device=device),
    }


def update(stats: Tree, x: Tensor) -> Tree:
    """Statistics of all data so far plus `x` [..., *shape] (Chan, Golub, LeVeque 1979: parallel variance).

    If several processes train together, of all of their data: each must call this at once, with equally much.
    """
    return _joined(stats, *processes.pooled(*_moments(x, stats)))


def of_data(x: Tensor) -> Tree:
    """Statistics of data [N, *shape] that one process has, or each of them whole: nothing is pooled."""
    empty = init(x.shape[1:], x.device)
    return _joined(empty, *_moments(x, empty))


def _moments(x: Tensor, stats: Tree) -> tuple[int, Tensor, Tensor]:
    """Count, mean and variance (dividing by n) of x [..., *shape], where `stats` are of values of this shape."""
    axes = tuple(range(x.ndim - stats["mean"].ndim))
    var, mean = torch.var_mean(x.to(torch.float64), axes, correction=0)
    return x.numel() // stats["mean"].numel(), mean, var


def _joined(stats: Tree, count: int, mean: Tensor, var: Tensor) -> Tree:
    """Statistics of all data so far plus `count` more with this mean and variance."""
    total = stats["count"] + count
    delta = mean - stats["mean"]
    return {
        "count": total,
        "mean": stats["mean"] + delta * count / total,
        "var": (stats["var"] * stats["count"] + var * count + delta.square() * stats["count"] * count / total) / total,
    }


def standardize(stats: Tree, x: Tensor, clip: float = 10.0) -> Tensor:
    """(x - mean) / std, clipped to +-clip, in x's own precision."""
    mean, std = stats["mean"].to(x.dtype), torch.sqrt(stats["var"] + 1e-8).to(x.dtype)
    return torch.clamp((x - mean) / std, -clip, clip)


def standardize_batch(x: Tensor) -> Tensor:
    """(x - mean) / std of a minibatch [n], with the n - 1 of torch.std; of the whole one if processes share it.

    Values that are equal up to rounding are 0: their distance from the mean is rounding error, and so is their std.
    """
    if processes.world_size() == 1:
        mean, std = x.mean(), x.std()
        return torch.where(std <= 1e-6 * x.abs().amax(), 0.0, (x - mean) / (std + 1e-8))
    wide = x.to(torch.float64)  # one message instead of two; subtracting squares needs the precision
    first, second = processes.all_sum(torch.stack([wide.sum(), wide.square().sum()])).unbind(0)
    n = x.numel() * processes.world_size()
    std = torch.sqrt((second - first.square() / n).clamp(min=0.0) / (n - 1))
    return (x - (first / n).to(x.dtype)) / (std.to(x.dtype) + 1e-8)


def return_scale_init(num_envs: int, device: torch.device) -> Tree:
    """Statistics of discounted returns so far, with the running return of each environment."""
    return {**init((), device), "running": torch.zeros(num_envs, dtype=torch.float64, device=device)}


def return_scale_update(scale: Tree, reward: Tensor, last: Tensor, discount: float | Tensor) -> Tree:
    """Update the statistics with rewards [T, N]: R_t = r_t + discount R_{t-1}, restarted after each `last`.

    Dividing rewards by std(R) is the reward normalization of OpenAI Baselines' VecNormalize; R is the discounted sum of
    past rewards, not of future ones, which is what can be maintained while stepping.
    """
    checks.flags(last=last)
    checks.same_shape(reward=reward, last=last)
    reward = reward.to(torch.float64)
    goes_on = torch.cat([torch.ones_like(last[:1]), ~last[:-1]])
    decay = discount * goes_on.to(torch.float64)
    start = reward[:1] + decay[:1] * scale["running"]
    # The same recurrence, run forward in time.
    running = reverse_recurrence(torch.cat([start, reward[1:]]).flip(0), decay.flip(0)).flip(0)
    stats = update({key: scale[key] for key in ("count", "mean", "var")}, running)
    return {**stats, "running": torch.where(last[-1], 0.0, running[-1])}


def seen(state: State, rollout: Transitions) -> Tree:
    """The part of an agent's new state that a rollout [T, N] gives: "obs_stats" and "return_scale"."""
    discount = state["hyper"]["discount"]
    return {
        "obs_stats": update(state["obs_stats"], rollout.obs),
        "return_scale": return_scale_update(state["return_scale"], rollout.reward, rollout.last, discount),
    }


def scale_reward(scale: Tree, reward: Tensor, clip: float = 10.0) -> Tensor:
    """reward / std(R), clipped to +-clip."""
    return torch.clamp(reward / torch.sqrt(scale["var"] + 1e-8).to(reward.dtype), -clip, clip)
