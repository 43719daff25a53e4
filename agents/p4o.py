"""P4O: P3O with two anchors, the behavior policy and a recent one (Fakoor et al. 2026, arXiv 2605.12380, Eq. 13).

Written for one agent; `ess_rl.population` runs P of them as one tensor program. The anchors are the behavior b and p,
a snapshot of the policy being trained; each has an effective sample size, e_b of pi / b and e_p of pi / p. The smaller
one, e, caps the ratio pi / b and gives the pull its weight 1 - e; the pull is toward a mixture of both, in which b
counts as 1 - e_b and p as 1 - e_p: the anchor that pi has moved further from counts more. All this is
`ess_rl.objectives.p4o`; the rest of this file is `agents/p3o.py`, with P3O's hyperparameters.

The paper takes p at the "start of the epoch". Here that is the start of each pass over the data. In the released code
an epoch is a round of collecting and training, with several passes; `proximal="iteration"` does the same. On fresh data
p is then b, and P4O is P3O; the two differ with replay, lag, or another behavior.

Deviations from the paper: a closed-form bound replaces the KL to the mixture (`mixture_kl`; "k3" is what the released
code does, `ess_rl.objectives.p4o` says why not), and the ESS limits the learning rate, as in P3O here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ess_rl import normalizer
from ess_rl.contract import BeginEpoch, Draw, Metrics, Precision, Starts, State, Tree
from ess_rl.diagnostics import share
from ess_rl.gaussian import Gaussian, kl
from ess_rl.networks import policy, policy_init, value, value_init
from ess_rl.objectives import MixtureKL, p4o
from ess_rl.optim import adam_init, adam_steps, clip_by_global_norm, gradient, held_back, linear_decay
from ess_rl.random import fold_in
from ess_rl.returns import Correction, corrected
from ess_rl.transitions import Transitions, flat_samples


@dataclass(frozen=True)
class Config:
    proximal: Literal["epoch", "iteration"] = "epoch"  # when p is taken: at the start of each epoch or iteration
    mixture_kl: MixtureKL = "variational"  # KL to the mixture of b and p: variational, convex (both bounds), or k3
    keep_ess: float = 0.75  # ESS to keep through an iteration's updates; below it the learning rate shrinks. 0: never
    learning_rate: float = 1.5e-4  # initial rate of Adam for the policy
    final_learning_rate: float = 0.3  # final policy rate as a fraction of learning_rate; falls linearly
    value_learning_rate: float = 4e-4  # initial rate of Adam for the value; falls linearly to 0
    discount: float = 0.99  # per control step
    lambda_: float = 0.95  # of GAE
    value_coef: float = 0.5  # weight of the value loss; the value shares only the gradient clip with the policy
    entropy_coef: float = 0.0  # weight of an entropy bonus
    max_grad_norm: float = 0.5  # joint norm of all gradients
    replay: int = 0  # older rollouts that an iteration learns from, in addition to the fresh one
    replay_from: str = ""  # folder of an older run (--save-replay), or a data set, that initially fills the replay
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
    rollout: int = 256  # steps per environment between updates
    epochs: int = 10  # passes over the num_envs * rollout samples
    minibatch: int = 128  # samples per update


class P4O:
    """Caps the ratio at the smaller of two effective sample sizes; pulls toward a mixture of both anchors."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int):
        self.config, self.obs_dim, self.act_dim = config, obs_dim, act_dim

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
            "before": params["policy"],  # the policy before the iteration's updates
            "rate_factor": torch.ones((), device=seed.device),  # of the policy's learning rate, limited by the ESS
            "proximal": params["policy"],  # p
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

    @property
    def begin_epoch(self) -> BeginEpoch | None:
        return self._take_proximal if self.config.proximal == "epoch" else None

    def _take_proximal(self, state: State, batch: dict[str, Tensor]) -> State:
        """Set p to the current policy; the samples are not used."""
        return {**state, "proximal": tree_map(torch.clone, state["params"]["policy"])}

    refresh = None

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        hyper, progress = state["hyper"], state["progress"]

        def loss_function(params: Tree) -> tuple[Tensor, Metrics]:
            pi = policy(params["policy"], batch["obs"])
            b = Gaussian(batch["behavior_mean"], batch["behavior_log_std"])
            advantage = normalizer.standardize_batch(batch["advantage"])
            p = policy(state["proximal"], batch["obs"])
            policy_loss, metrics, weight = p4o(
                pi.log_prob(batch["action"]),
                b.log_prob(batch["action"]),
                advantage,
                kl(pi, b),
                proximal_log_prob=p.log_prob(batch["action"]),
                proximal_kl=kl(pi, p),
                mixture_kl=self.config.mixture_kl,
            )
            if self.config.replay > 0:
                metrics["replayed_share"] = share(weight * advantage, batch["age"] > 0)
            value_loss = 0.5 * (value(params["value"], batch["obs"]) - batch["value_target"]).square().mean()
            entropy = pi.entropy().mean()
            loss = policy_loss + hyper["value_coef"] * value_loss - hyper["entropy_coef"] * entropy
            metrics |= {"value_loss": value_loss, "entropy": entropy, "loss": loss}
            return loss, metrics

        grads, metrics = gradient(loss_function, state["params"])
        grads, metrics["grad_norm"] = clip_by_global_norm(grads, hyper["max_grad_norm"])
        rates = {
            "policy": linear_decay(
                state["rate_factor"] * hyper["learning_rate"], progress, hyper["final_learning_rate"]
            ),
            "value": linear_decay(hyper["value_learning_rate"], progress),
        }
        metrics["learning_rate"] = rates["policy"]
        params, optimizer = adam_steps(state["params"], grads, state["optimizer"], rates)
        return {**state, "params": params, "optimizer": optimizer}, metrics

    def observe(self, state: State, rollout: Transitions) -> State:
        new, obs = state["params"]["policy"], normalizer.standardize(state["obs_stats"], rollout.obs)
        after, before = (policy(net, obs).log_prob(rollout.action) for net in (new, state["before"]))
        rate_factor = held_back(state["rate_factor"], after - before, state["hyper"]["keep_ess"])
        seen = normalizer.seen(state, rollout)
        before, proximal = (tree_map(torch.clone, new) for _ in range(2))  # a checkpoint cannot store a tensor twice
        return {**state, **seen, "before": before, "proximal": proximal, "rate_factor": rate_factor}
