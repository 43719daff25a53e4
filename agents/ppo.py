"""PPO: proximal policy optimization with a clipped ratio (Schulman et al. 2017, arXiv 1707.06347).

Written for one agent; `ess_rl.population` runs P of them as one tensor program. The details other than the objective
are those of the usual implementations: orthogonal initialization, observations and rewards normalized by running
statistics, standardized advantages, clipped gradients, Adam with linearly decayed learning rates of policy and value.

Relatives that differ only in the objective are options: decoupled PPO (Hilton et al. 2022, arXiv 2110.00641), GePPO's
clip around a recent policy's ratio (Queeney et al. 2021, arXiv 2111.00072), CISPO's fixed band (2025,
arXiv 2506.13585), the adaptive KL penalty of PPO's own paper (Section 4), and a penalty on the variance of the ratio
after R2VPO (2026, arXiv 2605.26784).

With `hints`, environments whose whole group failed start from hints, and samples from there are weighted by Affinity^
hint_lambda: HINT (Wang et al. 2025, arXiv 2510.09388), as implemented in `ess_rl.hints`. Penalties are not weighted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ess_rl import normalizer, processes
from ess_rl.contract import Draw, Metrics, Precision, Starts, State, Tree
from ess_rl.diagnostics import share
from ess_rl.gaussian import Gaussian, kl
from ess_rl.hints import affinity_weight
from ess_rl.networks import policy, policy_init, value, value_init
from ess_rl.objectives import ppo_band, ppo_clip, ppo_decoupled, ppo_generalized, ppo_kl, ppo_variance
from ess_rl.optim import adam_init, adam_steps, clip_by_global_norm, gradient, linear_decay
from ess_rl.random import fold_in
from ess_rl.returns import Correction, corrected
from ess_rl.transitions import Transitions, flat_samples

Objective = Literal["clip", "decoupled", "generalized", "band", "kl", "variance"]


@dataclass(frozen=True)
class Config:
    objective: Objective = "clip"  # with a recent policy: decoupled, generalized; CISPO's band; penalties: kl, variance
    clip: float = 0.2  # how far the ratio may move from 1 before its sample has no gradient; for variance: target std
    target_kl: float = 0.01  # objective kl only: KL(b || pi), in nats, that the weight of the KL is adapted to reach
    learning_rate: float = 3e-4  # initial rate of Adam for the policy
    final_learning_rate: float = 0.0  # final policy rate as a fraction of learning_rate; falls linearly
    value_learning_rate: float = 3e-4  # initial rate of Adam for the value; falls linearly to 0
    discount: float = 0.99  # per control step
    lambda_: float = 0.95  # of GAE
    value_coef: float = 0.5  # weight of the value loss; the value shares only the gradient clip with the policy
    entropy_coef: float = 0.0  # weight of an entropy bonus
    max_grad_norm: float = 0.5  # joint norm of all gradients
    replay: int = 0  # older rollouts that an iteration learns from, in addition to the fresh one
    replay_from: str = ""  # folder of an older run (--save-replay), or a data set, that initially fills the replay
    draw: Draw = "uniform"  # how to draw replayed data: uniform, recency, ess, reward; see ess_rl.batches.draw_weights
    correction: Correction = "none"  # how returns of older data are corrected: none, vtrace, retrace, ess
    hints: int = 0  # environments in a group that starts from a hint once all of them failed; 0: no hints (HINT)
    hint_lambda: float = 1.0  # samples from a hint are weighted by Affinity to this power; 0: like all others
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


class PPO:
    """Clips the ratio at 1 +- clip, or uses another objective of the PPO family (`Config.objective`)."""

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
            "kl_coef": torch.ones((), device=seed.device),  # weight of the penalty, in the objectives kl and variance
        }

    def act(self, state: State, obs: Tensor) -> Gaussian:
        return policy(state["params"]["policy"], normalizer.standardize(state["obs_stats"], obs))

    def prepare(self, state: State, rollout: Transitions) -> dict[str, Tensor]:
        hyper, params = state["hyper"], state["params"]
        obs = normalizer.standardize(state["obs_stats"], rollout.obs)
        next_obs = normalizer.standardize(state["obs_stats"], rollout.next_obs)
        b = Gaussian(rollout.behavior_mean, rollout.behavior_log_std)
        log_prob = policy(params["policy"], obs).log_prob(rollout.action)
        log_ratio = log_prob - b.log_prob(rollout.action)
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
        return samples | {"proximal_log_prob": log_prob.flatten(0, 1)}

    begin_epoch = None
    refresh = None

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        hyper, progress = state["hyper"], state["progress"]

        def loss_function(params: Tree) -> tuple[Tensor, Metrics]:
            pi = policy(params["policy"], batch["obs"])
            b = Gaussian(batch["behavior_mean"], batch["behavior_log_std"])
            advantage = normalizer.standardize_batch(batch["advantage"])
            log_prob, behavior_log_prob = pi.log_prob(batch["action"]), b.log_prob(batch["action"])
            if self.config.hints > 0:
                log_ratio, power = log_prob - behavior_log_prob, hyper["hint_lambda"]
                trust = affinity_weight(log_ratio, advantage, batch["hinted"], power, act_dim=self.act_dim)
                advantage = trust * advantage
            if self.config.objective == "clip":
                policy_loss, metrics, weight = ppo_clip(log_prob, behavior_log_prob, advantage, clip=hyper["clip"])
            else:
                of_samples = (log_prob, behavior_log_prob, advantage)
                policy_loss, metrics, weight = self._relative(state, batch, pi, b, of_samples)
            if self.config.replay > 0:
                metrics["replayed_share"] = share(weight * advantage, batch["age"] > 0)
            if self.config.hints > 0:
                metrics["hint_weight"] = trust.amin()
            value_loss = 0.5 * (value(params["value"], batch["obs"]) - batch["value_target"]).square().mean()
            entropy = pi.entropy().mean()
            loss = policy_loss + hyper["value_coef"] * value_loss - hyper["entropy_coef"] * entropy
            metrics |= {"behavior_kl": kl(pi, b).mean(), "value_loss": value_loss, "entropy": entropy, "loss": loss}
            return loss, metrics

        grads, metrics = gradient(loss_function, state["params"])
        grads, metrics["grad_norm"] = clip_by_global_norm(grads, hyper["max_grad_norm"])
        rates = {
            "policy": linear_decay(hyper["learning_rate"], progress, hyper["final_learning_rate"]),
            "value": linear_decay(hyper["value_learning_rate"], progress),
        }
        params, optimizer = adam_steps(state["params"], grads, state["optimizer"], rates)
        return {**state, "params": params, "optimizer": optimizer}, metrics

    def _relative(
        self,
        state: State,
        batch: dict[str, Tensor],
        pi: Gaussian,
        b: Gaussian,
        of_samples: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Metrics, Tensor]:
        """The objectives other than PPO's own, of log pi, log b and the advantage of each sample."""
        proximal, clip, coefficient = batch["proximal_log_prob"], state["hyper"]["clip"], state["kl_coef"]
        if self.config.objective == "decoupled":
            return ppo_decoupled(*of_samples, proximal_log_prob=proximal, clip=clip)
        if self.config.objective == "generalized":
            return ppo_generalized(*of_samples, proximal_log_prob=proximal, clip=clip)
        if self.config.objective == "band":
            return ppo_band(*of_samples, clip=clip)
        if self.config.objective == "variance":
            return ppo_variance(*of_samples, coefficient=coefficient)
        return ppo_kl(*of_samples, kl(b, pi), kl_coef=coefficient)

    def observe(self, state: State, rollout: Transitions) -> State:
        return {**state, **normalizer.seen(state, rollout), "kl_coef": self._adapted(state, rollout)}

    def _adapted(self, state: State, rollout: Transitions) -> Tensor:
        """The weight of a penalty: doubled or halved if the penalized quantity has left its range (Section 4), and
        unchanged before anything is learned.

        For the objective kl the quantity is KL(b || pi), with a range around `target_kl`; for the objective variance it
        is the variance of the ratio, with a range around clip^2: a root mean square of clip for rho - 1 (ours). Both
        are measured on the fresh rollout; with `replay`, the penalty also covers older ones, which the rule ignores.
        """
        if self.config.objective not in ("kl", "variance"):
            return state["kl_coef"]
        pi, b = self.act(state, rollout.obs), Gaussian(rollout.behavior_mean, rollout.behavior_log_std)
        if self.config.objective == "kl":
            reached, target = kl(b, pi), state["hyper"]["target_kl"]
        else:
            ratio = torch.exp(pi.log_prob(rollout.action) - b.log_prob(rollout.action))
            reached, target = (ratio - 1.0).square(), state["hyper"]["clip"].square()
        reached = processes.mean(reached)
        factor = torch.where(reached > 1.5 * target, 2.0, torch.where(reached < target / 1.5, 0.5, 1.0))
        factor = torch.where(state["optimizer"]["policy"]["step"] > 0.0, factor, 1.0)
        return (state["kl_coef"] * factor).clamp(1e-3, 1e3)  # our bounds: if nothing moves, the weight would vanish
