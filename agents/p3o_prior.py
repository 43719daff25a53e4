"""P3O kept near a prior: a fixed Gaussian policy fitted to demonstrations.

Written for one agent; `ess_rl.population` runs P of them as one tensor program. The policy loss is P3O's (Fakoor et al.
2026, arXiv 2605.12380) plus one term, the regularization that Rudner et al. 2021 (arXiv 2212.13936) study:

    loss = P3O's + prior_coef mean( KL(pi || pi_0) ),     pi_0(.|s) = N(mu_0(s), prior_std^2 + v_0(s))

mu_0 and v_0 are fitted before training (`experiments.demonstrations.take_up`; in your own script, call it, or put a
prior into `population.state["prior"]`), and determine how sure pi_0 is in unseen states:

    mle         one network's mean (`ess_rl.behavior`), v_0 = 0: as sure away from the demonstrations as on them
    ensemble    mean and variance of the means of several such networks
    gp          mean and variance of a Gaussian process (`ess_rl.gaussian_process`)

The gradient of KL(pi || pi_0) grows as the inverse square of pi_0's standard deviation; that of KL(pi_0 || pi) does not
(`prior_kl`). The study collapsing-prior examines the effect.

Deviations from Rudner et al.: they use SAC, a KL in the critic's targets too, and a kernel with a length scale for each
observation; here the KL is only in the policy loss. Their released code passes the variance where a standard deviation
is expected; ours does not. `prior_std`, the prior's width on its own data, is set; theirs is fitted. Unlike in
p3o.py, the policy's width depends on the state, as the prior's does, the learning rates fall to 0, and nothing else
limits them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from ess_rl import behavior, gaussian_process, normalizer
from ess_rl.contract import Draw, Metrics, Precision, Starts, State, Tree
from ess_rl.diagnostics import share
from ess_rl.errors import UsageError
from ess_rl.gaussian import Gaussian, kl
from ess_rl.networks import gaussian_init, mlp, mlp_init, value, value_init
from ess_rl.objectives import p3o
from ess_rl.optim import adam_init, adam_steps, clip_by_global_norm, gradient, linear_decay
from ess_rl.random import fold_in
from ess_rl.returns import Correction, corrected
from ess_rl.transitions import Transitions, flat_samples

PRIOR = behavior.Config(hidden=(64, 64), minibatch=64, max_updates=1000, check_every=100, patience=5)  # prior networks
NETWORKS = {"mle": 1, "ensemble": 5}
LOG_STD_RANGE = (-7.0, 1.0)  # of the policy, in units of [-1, 1]; no gradient beyond it


@dataclass(frozen=True)
class Config:
    demonstrations: str = ""  # the data set that the prior is fitted to; --dataset is an alias
    prior: Literal["mle", "ensemble", "gp"] = "gp"  # one network, several, or a Gaussian process
    prior_std: float = 0.3  # of the prior on its demonstrations, in units of [-1, 1]; away from them, v_0 widens it
    prior_coef: float = 0.1  # weight of the KL to the prior, in nats; 0: only P3O
    prior_kl: Literal["closed_form", "reverse"] = "closed_form"  # KL(pi || pi_0), KL(pi_0 || pi)
    gp_points: int = 200  # evenly spaced demonstrations that a gp keeps; its cost per state is their number squared
    learning_rate: float = 3e-4  # initial rate of Adam for the policy; falls linearly to 0
    value_learning_rate: float = 4e-4  # initial rate of Adam for the value; falls linearly to 0
    discount: float = 0.99  # per control step
    lambda_: float = 0.95  # of GAE
    value_coef: float = 0.5  # weight of the value loss; the value shares only the gradient clip with the policy
    entropy_coef: float = 0.0  # weight of an entropy bonus
    max_grad_norm: float = 0.5  # joint norm of all gradients
    replay: int = 0  # older rollouts that an iteration learns from, in addition to the fresh one
    draw: Draw = "uniform"  # how to draw replayed data: uniform, recency, ess, reward; see ess_rl.batches.draw_weights
    correction: Correction = "none"  # how returns of older data are corrected: none, vtrace, retrace, ess
    lag: int = 0  # iterations by which the acting policy is older than the learning one
    sync_interval: int = 1  # iterations for which the acting policy stays the same
    behavior_temperature: float = 1.0  # factor on the acting policy's standard deviation; not used in evaluation
    rollout_precision: Precision = "fp32"  # of the acting network; for bf16, fp16, fp8 see ess_rl.networks.in_precision
    starts: Starts = "together"  # of episodes at a reset; staggered: first clocks are ahead, so ends do not coincide
    log_std: float = -1.0  # of the initial policy, in every state and action dimension, in units of [-1, 1]
    hidden: tuple[int, ...] = (64, 64)  # tanh units of policy mean, width and value, which share nothing
    num_envs: int = 16  # environments per agent
    rollout: int = 256  # steps per environment between updates
    epochs: int = 10  # passes over the num_envs * rollout samples
    minibatch: int = 128  # samples per update


class P3OPrior:
    """P3O plus a KL of fixed weight to a Gaussian that was fitted to demonstrations."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int):
        if not LOG_STD_RANGE[0] < config.log_std < LOG_STD_RANGE[1]:
            low, high = LOG_STD_RANGE
            raise UsageError(
                f"log_std {config.log_std:g}: must lie between {low:g} and {high:g}, beyond which it is cut"
            )
        self.config, self.obs_dim, self.act_dim = config, obs_dim, act_dim

    def init(self, seed: Tensor, hyper: dict[str, Tensor]) -> State:
        sizes = (self.obs_dim, *self.config.hidden, self.act_dim)
        params = {
            "policy": {
                "mean": mlp_init(fold_in(seed, 0), sizes, 0.01),
                "log_std": mlp_init(fold_in(seed, 2), sizes, 0.01),
            },
            "value": value_init(fold_in(seed, 1), self.obs_dim, self.config.hidden),
        }
        return {
            "params": params,
            "optimizer": {name: adam_init(net) for name, net in params.items()},
            "prior": self._untrained_prior(fold_in(seed, 3)),
            "obs_stats": normalizer.init((self.obs_dim,), seed.device),
            "return_scale": normalizer.return_scale_init(self.config.num_envs, seed.device),
            "hyper": hyper,
            "progress": torch.zeros((), device=seed.device),
        }

    def _untrained_prior(self, seed: Tensor) -> Tree:
        """A placeholder of the shapes of `experiments.demonstrations.fitted_prior`, to be replaced by it."""
        if self.config.prior == "gp":
            return gaussian_process.init(self.config.gp_points, self.obs_dim, self.act_dim, seed.device)
        each = [
            {
                "net": gaussian_init(fold_in(seed, k), self.obs_dim, self.act_dim, PRIOR.hidden),
                "obs_stats": normalizer.init((self.obs_dim,), seed.device),
            }
            for k in range(NETWORKS[self.config.prior])
        ]
        return tree_map(lambda *leaves: torch.stack(leaves), *each)

    def act(self, state: State, obs: Tensor) -> Gaussian:
        return _policy(state, state["params"]["policy"], normalizer.standardize(state["obs_stats"], obs))

    def prior(self, state: State, obs: Tensor) -> tuple[Tensor, Tensor]:
        """mu_0 and v_0 [N, act_dim] at raw observations [N, obs_dim]."""
        if self.config.prior == "gp":
            return gaussian_process.predict(state["prior"], obs)
        floor = torch.full_like(state["hyper"]["prior_std"], PRIOR.log_std_floor)
        means = vmap(behavior.predict, in_dims=(0, None, None))(state["prior"], obs, floor).mean
        return means.mean(0), means.var(0, correction=0)

    def prepare(self, state: State, rollout: Transitions) -> dict[str, Tensor]:
        hyper, params = state["hyper"], state["params"]
        obs = normalizer.standardize(state["obs_stats"], rollout.obs)
        next_obs = normalizer.standardize(state["obs_stats"], rollout.next_obs)
        b = Gaussian(rollout.behavior_mean, rollout.behavior_log_std)
        log_ratio = self.act(state, rollout.obs).log_prob(rollout.action) - b.log_prob(rollout.action)
        advantage, value_target = corrected(
            self.config.correction,
            log_ratio,
            normalizer.scale_reward(state["return_scale"], rollout.reward),
            value(params["value"], obs),
            value(params["value"], next_obs),
            rollout.terminated,
            rollout.last,
            discount=hyper["discount"],
            lambda_=hyper["lambda_"],
        )
        samples = flat_samples(rollout, obs=obs, advantage=advantage, value_target=value_target, log_ratio=log_ratio)
        samples["prior_mean"], samples["prior_variance"] = self.prior(state, rollout.obs.flatten(0, -2))
        return samples

    begin_epoch = None
    refresh = None

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        hyper, progress = state["hyper"], state["progress"]
        prior = Gaussian(batch["prior_mean"], 0.5 * torch.log(hyper["prior_std"].square() + batch["prior_variance"]))

        def loss_function(params: Tree) -> tuple[Tensor, Metrics]:
            pi = _policy(state, params["policy"], batch["obs"])
            b = Gaussian(batch["behavior_mean"], batch["behavior_log_std"])
            advantage = normalizer.standardize_batch(batch["advantage"])
            policy_loss, metrics, weight = p3o(
                pi.log_prob(batch["action"]), b.log_prob(batch["action"]), advantage, kl(pi, b)
            )
            if self.config.replay > 0:
                metrics["replayed_share"] = share(weight * advantage, batch["age"] > 0)
            prior_kl = (kl(pi, prior) if self.config.prior_kl == "closed_form" else kl(prior, pi)).mean()
            value_loss = 0.5 * (value(params["value"], batch["obs"]) - batch["value_target"]).square().mean()
            entropy = pi.entropy().mean()
            loss = policy_loss + hyper["prior_coef"] * prior_kl
            loss = loss + hyper["value_coef"] * value_loss - hyper["entropy_coef"] * entropy
            metrics |= {"prior_kl": prior_kl, "value_loss": value_loss, "entropy": entropy, "loss": loss}
            return loss, metrics

        grads, metrics = gradient(loss_function, state["params"])
        grads, metrics["grad_norm"] = clip_by_global_norm(grads, hyper["max_grad_norm"])
        rates = {
            "policy": linear_decay(hyper["learning_rate"], progress),
            "value": linear_decay(hyper["value_learning_rate"], progress),
        }
        params, optimizer = adam_steps(state["params"], grads, state["optimizer"], rates)
        return {**state, "params": params, "optimizer": optimizer}, metrics

    def observe(self, state: State, rollout: Transitions) -> State:
        return {**state, **normalizer.seen(state, rollout)}


def _policy(state: State, params: Tree, obs: Tensor) -> Gaussian:
    """The policy at normalized observations: mean and log_std each from its own network."""
    log_std = state["hyper"]["log_std"] + mlp(params["log_std"], obs).float()
    return Gaussian(mlp(params["mean"], obs), log_std.clamp(*LOG_STD_RANGE))
