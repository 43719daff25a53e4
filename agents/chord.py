"""CHORD: imitation of someone else's data, weighted dynamically within reinforcement learning (Zhang et al. 2025).

arXiv 2508.11408, for language models: PPO's clipped objective and supervised fine-tuning in one loss. Here, a data set
of observations and actions replaces the expert's texts; each iteration draws one demonstration for each of its samples:

    loss = (1 - mu) policy loss + mu imitation,     imitation = -mean( sg(phi) log pi(a* | s*) )
    mu      rises linearly to mu_peak, falls to mu_valley along half a cosine, stays there    (CHORD-mu: 0.9 to 0.05)
    phi     1, or in the paper p (1 - p), p the probability of the expert's token             (CHORD-phi: mu stays 0.1)

A density is not a probability, so phi "mass" uses u (1 - u) instead, where u is the share of the policy's mass that is
less likely than the expert's action; `ess_rl.objectives.imitation` describes the effect on sigma, `width` selects what
is done about it. This phi ignores an expert many sigmas from the policy, as at random initialization: phi is 0 there.

The policy loss is PPO's clip, as in the paper (without its group-relative advantages), or P3O's objective. Everything
else is as in ppo.py. Deviations: as many demonstrations as samples in a minibatch (the paper: a fifth of all); mu
follows the fraction of training, not the number of steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ess_rl import normalizer
from ess_rl.contract import Draw, Metrics, Precision, Starts, State, Tree
from ess_rl.diagnostics import share
from ess_rl.errors import UsageError
from ess_rl.gaussian import Gaussian, kl
from ess_rl.networks import policy, policy_init, value, value_init
from ess_rl.objectives import imitation, p3o, ppo_clip, width_correction
from ess_rl.optim import adam_init, adam_steps, clip_by_global_norm, gradient, linear_decay
from ess_rl.random import fold_in
from ess_rl.returns import Correction, corrected
from ess_rl.transitions import Transitions, flat_samples


@dataclass(frozen=True)
class Config:
    demonstrations: str = ""  # the data set to imitate; --dataset is an alias
    objective: Literal["clip", "p3o"] = "clip"  # policy objective next to imitation: PPO's, P3O's
    clip: float = 0.2  # objective clip only: how far the ratio may move from 1 before its sample has no gradient
    phi: Literal["one", "mass"] = "one"  # weight of a demonstration: 1, or u (1 - u)
    width: Literal["corrected", "fixed", "plain"] = "corrected"  # sigma under phi "mass": unbiased, no gradient, biased
    mu_peak: float = 0.9  # highest weight mu of imitation; the policy loss has weight 1 - mu
    mu_valley: float = 0.05  # final weight of imitation
    mu_warm_up: float = 0.0  # share of training over which mu rises to its peak
    mu_decay: float = 0.5  # share of training after that over which mu falls to its valley
    learning_rate: float = 3e-4  # initial rate of Adam for the policy
    final_learning_rate: float = 0.0  # final policy rate as a fraction of learning_rate; falls linearly
    value_learning_rate: float = 3e-4  # initial rate of Adam for the value; falls linearly to 0
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
    log_std: float = -1.0  # of the initial policy, in every action dimension, in units of [-1, 1]
    hidden: tuple[int, ...] = (64, 64)  # tanh units of policy and value, which share nothing
    num_envs: int = 16  # environments per agent
    rollout: int = 128  # steps per environment between updates
    epochs: int = 10  # passes over the num_envs * rollout samples
    minibatch: int = 64  # samples per update


class CHORD:
    """(1 - mu) times PPO's or P3O's policy loss plus mu times imitation, with mu falling during training."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int):
        self.config, self.obs_dim, self.act_dim = config, obs_dim, act_dim
        self.width: Literal["fixed"] | float = 1.0
        if config.phi == "mass" and config.width != "plain":
            self.width = "fixed" if config.width == "fixed" else width_correction(act_dim)

    def init(self, seed: Tensor, hyper: dict[str, Tensor]) -> State:
        params = {
            "policy": policy_init(fold_in(seed, 0), self.obs_dim, self.act_dim, self.config.hidden, hyper["log_std"]),
            "value": value_init(fold_in(seed, 1), self.obs_dim, self.config.hidden),
        }
        return {
            "params": params,
            "optimizer": {name: adam_init(net) for name, net in params.items()},
            "obs_stats": normalizer.init((self.obs_dim,), seed.device),
            "return_scale": normalizer.return_scale_init(self.config.num_envs, seed.device),
            "hyper": hyper,
            "progress": torch.zeros((), device=seed.device),
        }

    def act(self, state: State, obs: Tensor) -> Gaussian:
        return policy(state["params"]["policy"], normalizer.standardize(state["obs_stats"], obs))

    def prepare(self, state: State, rollout: Transitions) -> dict[str, Tensor]:
        hyper, params = state["hyper"], state["params"]
        obs = normalizer.standardize(state["obs_stats"], rollout.obs)
        next_obs = normalizer.standardize(state["obs_stats"], rollout.next_obs)
        b = Gaussian(rollout.behavior_mean, rollout.behavior_log_std)
        log_ratio = policy(params["policy"], obs).log_prob(rollout.action) - b.log_prob(rollout.action)
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
        return flat_samples(rollout, obs=obs, advantage=advantage, value_target=value_target, log_ratio=log_ratio)

    begin_epoch = None
    refresh = None

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        hyper, progress, mu = state["hyper"], state["progress"], self._mu(state)
        if "expert_obs" not in batch:
            raise UsageError("chord: no demonstrations; give `Population.demonstrations` their obs and action")
        expert_obs = normalizer.standardize(state["obs_stats"], batch["expert_obs"])

        def loss_function(params: Tree) -> tuple[Tensor, Metrics]:
            pi = policy(params["policy"], batch["obs"])
            b = Gaussian(batch["behavior_mean"], batch["behavior_log_std"])
            advantage = normalizer.standardize_batch(batch["advantage"])
            log_prob, behavior_log_prob = pi.log_prob(batch["action"]), b.log_prob(batch["action"])
            behavior_kl = kl(pi, b)
            if self.config.objective == "clip":
                policy_loss, metrics, weight = ppo_clip(log_prob, behavior_log_prob, advantage, clip=hyper["clip"])
            else:
                policy_loss, metrics, weight = p3o(log_prob, behavior_log_prob, advantage, behavior_kl)
            imitation_loss, imitated, phi = imitation(
                policy(params["policy"], expert_obs), batch["expert_action"], phi=self.config.phi, width=self.width
            )
            imitated["phi"] = phi.mean()
            if self.config.replay > 0:
                metrics["replayed_share"] = share(weight * advantage, batch["age"] > 0)
            value_loss = 0.5 * (value(params["value"], batch["obs"]) - batch["value_target"]).square().mean()
            entropy = pi.entropy().mean()
            loss = (1.0 - mu) * policy_loss + mu * imitation_loss
            loss = loss + hyper["value_coef"] * value_loss - hyper["entropy_coef"] * entropy
            metrics |= {"behavior_kl": behavior_kl.mean(), "value_loss": value_loss, "entropy": entropy, "loss": loss}
            return loss, metrics | imitated | {"mu": mu}

        grads, metrics = gradient(loss_function, state["params"])
        grads, metrics["grad_norm"] = clip_by_global_norm(grads, hyper["max_grad_norm"])
        rates = {
            "policy": linear_decay(hyper["learning_rate"], progress, hyper["final_learning_rate"]),
            "value": linear_decay(hyper["value_learning_rate"], progress),
        }
        params, optimizer = adam_steps(state["params"], grads, state["optimizer"], rates)
        return {**state, "params": params, "optimizer": optimizer}, metrics

    def observe(self, state: State, rollout: Transitions) -> State:
        return {**state, **normalizer.seen(state, rollout)}

    def _mu(self, state: State) -> Tensor:
        """The weight of imitation at this point in training."""
        hyper, time = state["hyper"], state["progress"]
        rise, fall = hyper["mu_warm_up"], hyper["mu_decay"]
        risen = torch.where(rise > 0.0, (time / rise.clamp(min=1e-6)).clamp(max=1.0), 1.0)
        fallen = torch.where(fall > 0.0, ((time - rise) / fall.clamp(min=1e-6)).clamp(0.0, 1.0), time >= rise)
        left = 0.5 * (1.0 + torch.cos(math.pi * fallen))
        return risen * (hyper["mu_valley"] + left * (hyper["mu_peak"] - hyper["mu_valley"]))
