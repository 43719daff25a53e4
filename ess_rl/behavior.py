"""A model of the policy that collected some data: a Gaussian b(a|s) by maximum likelihood, or an ensemble of them.

If a data set records only the actions, ratios pi / b and the KL to b need a density. The log-likelihood of held-out
episodes decides when to stop. The standard deviation has a floor, because the pull of KL(pi || b) grows as 1 / sigma^2
(Rudner et al. 2021, arXiv 2212.13936): states in which the model would be narrower are counted and reported.

Notation: K models of an ensemble, N transitions in the order of their episodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

from ess_rl import normalizer, random
from ess_rl.contract import Tree
from ess_rl.ess import effective_sample_size
from ess_rl.gaussian import Gaussian, kl
from ess_rl.networks import gaussian, gaussian_init
from ess_rl.optim import adam_init, adam_step


@dataclass(frozen=True)
class Config:
    """Settings of a fit."""

    hidden: tuple[int, ...] = (256, 256)  # relu units
    learning_rate: float = 1e-3  # of Adam
    minibatch: int = 512  # samples of one update
    max_updates: int = 20_000
    check_every: int = 250  # updates between two evaluations on the held-out data
    patience: int = 8  # evaluations without improvement before the fit stops
    held_out: float = 0.1  # fraction of the episodes that is held out
    log_std_floor: float = -4.0  # in units of [-1, 1]


@dataclass(frozen=True)
class Model:
    """K fitted Gaussians, with the outcome of the fit."""

    params: Tree  # [K, ...]: "net" and "obs_stats"
    log_std_floor: float
    held_out_nll: Tensor  # [K] mean negative log-likelihood of the held-out actions, nats, at its best
    updates: int  # made before the fit stopped
    held_out: Tensor  # [N] bool: transitions excluded from the fit

    def members(self, obs: Tensor, log_std_floor: float | None = None) -> Gaussian:
        """Each model at raw observations [..., obs_dim]: [K, ..., act_dim]."""
        floor = self.log_std_floor if log_std_floor is None else log_std_floor
        return vmap(predict, in_dims=(0, None, None))(self.params, obs, torch.tensor(floor, device=obs.device))

    def __call__(self, obs: Tensor, log_std_floor: float | None = None) -> Gaussian:
        """One Gaussian at raw observations [..., obs_dim]: mean and variance of the ensemble's mixture.

        Source: Lakshminarayanan et al. 2017 (arXiv 1612.01474), Section 2.4.
        """
        means, log_stds = self.members(obs, log_std_floor)
        mean = means.mean(0)
        var = (torch.exp(2.0 * log_stds) + means.square()).mean(0) - mean.square()
        lowest = torch.exp(2.0 * log_stds.amin(0))  # rounding may take the difference below it
        return Gaussian(mean, 0.5 * torch.log(torch.maximum(var, lowest)))


def predict(params: Tree, obs: Tensor, log_std_floor: Tensor) -> Gaussian:
    """One model at raw observations [..., obs_dim]."""
    return gaussian(params["net"], normalizer.standardize(params["obs_stats"], obs), log_std_floor)


def negative_log_likelihood(params: Tree, obs: Tensor, action: Tensor, log_std_floor: Tensor) -> Tensor:
    """-mean log b(a|s) in nats; 0-dim."""
    return -predict(params, obs, log_std_floor).log_prob(action).mean()


def held_out_episodes(last: Tensor, share: float, seed: int = 0) -> Tensor:
    """[N] bool: the steps of a random `share` of the episodes, at least one, and never all if there are several.

    Whole episodes, because the steps of an episode resemble each other. A single episode gives its last steps instead,
    at least one, and never all if there are several.
    """
    episode = torch.cumsum(last.long(), 0) - last.long()
    count = int(episode[-1]) + 1
    if count == 1:
        steps = len(last)
        return torch.arange(steps) >= min(steps - 1, max(1, math.floor(steps * (1.0 - share))))
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[random.permutation(torch.tensor(seed), count)[: min(count - 1, max(1, math.floor(share * count)))]] = True
    return chosen[episode]


def fit(
    obs: Tensor, action: Tensor, last: Tensor, *, seeds: tuple[int, ...] = (0,), config: Config | None = None
) -> Model:
    """Fit a Gaussian for each of `seeds` to raw observations [N, obs_dim], actions [N, act_dim], on their device.

    Random draws are functions of the seed and the update's number: equal data and seeds give equal models.

    Args:
        last: [N] bool, the ends of episodes.

    Raises:
        ValueError: fewer than two transitions.
    """
    if len(obs) < 2:
        raise ValueError(f"{len(obs)} transitions: a behavior model needs some to fit and some to validate on")
    config = config or Config()
    held_out = held_out_episodes(last.cpu(), config.held_out)
    inside = held_out.logical_not().nonzero()[:, 0].to(obs.device)
    outside = held_out.nonzero()[:, 0].to(obs.device)
    outside = outside[:: max(1, len(outside) // 20_000)]  # enough to evaluate on
    seed = torch.tensor(seeds, dtype=torch.int64, device=obs.device)
    stats = normalizer.of_data(obs[inside])
    floor = torch.tensor(config.log_std_floor, device=obs.device)
    net = vmap(lambda s: gaussian_init(s, obs.shape[1], action.shape[1], config.hidden))(random.fold_in(seed, 0))
    optimizer = vmap(adam_init)(net)

    def step(net: Tree, optimizer: Tree, index: Tensor) -> tuple[Tree, Tree]:
        def loss(net: Tree) -> Tensor:
            return negative_log_likelihood({"net": net, "obs_stats": stats}, obs[index], action[index], floor)

        return adam_step(net, grad(loss)(net), optimizer, config.learning_rate)

    def judge(net: Tree) -> Tensor:
        return negative_log_likelihood({"net": net, "obs_stats": stats}, obs[outside], action[outside], floor)

    best, best_nll = net, torch.full((len(seeds),), torch.inf, device=obs.device)
    updates, since = 0, torch.zeros(len(seeds), dtype=torch.int64, device=obs.device)  # evaluations without gain, each
    while updates < config.max_updates and (since < config.patience).any():
        for _ in range(min(config.check_every, config.max_updates - updates)):
            draws = random.uniform(random.fold_in(random.fold_in(seed, 1), updates), (config.minibatch,), torch.float64)
            net, optimizer = vmap(step)(net, optimizer, inside[(draws * len(inside)).long()])
            updates += 1
        nll = vmap(judge)(net)
        better = (nll < best_nll - 1e-4) & (since < config.patience)  # a stopped model stays as if fitted alone
        since = torch.where(better, 0, since + 1)
        best = tree_map(lambda old, new: torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old), best, net)  # noqa: B023 (used at once)
        best_nll = torch.where(better, nll, best_nll)
    whole = tree_map(lambda x: x.expand(len(seeds), *x.shape), stats)
    return Model({"net": best, "obs_stats": whole}, config.log_std_floor, best_nll.cpu(), updates, held_out)


def floored(model: Model, obs: Tensor, log_std_floor: float | None = None) -> float:
    """Fraction of states in which some model of the ensemble is at the floor in some action dimension."""
    floor = model.log_std_floor if log_std_floor is None else log_std_floor
    return (model.members(obs, floor).log_std <= floor).any(-1).any(0).float().mean().item()


def floor_report(
    model: Model, obs: Tensor, action: Tensor, reference: Gaussian | None, floors: tuple[float, ...]
) -> list[dict[str, float]]:
    """Effect of the log_std floor on the density, on transitions [N, ...]; one dictionary for each of `floors`.

    "floor", "floored" (fraction of states), "nll" (nats), and if a `reference` policy is given, such as the recorded
    one, "ess" of the model's ratio to it and "kl", the mean KL(model || reference) in nats. Without a reference, both
    compare the ensemble's first model with its second, if it has two: a measure of the model's own uncertainty.
    """
    report = []
    for floor in floors:
        b = model(obs, floor)
        found = {"floor": floor, "floored": floored(model, obs, floor), "nll": -b.log_prob(action).mean().item()}
        pair = (b, reference) if reference is not None else None
        if pair is None and len(model.held_out_nll) > 1:
            means, log_stds = model.members(obs, floor)
            pair = Gaussian(means[0], log_stds[0]), Gaussian(means[1], log_stds[1])
        if pair is not None:
            one, other = pair
            found["ess"] = effective_sample_size(one.log_prob(action) - other.log_prob(action)).item()
            found["kl"] = kl(one, other).mean().item()
        report.append(found)
    return report
