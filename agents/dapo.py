"""DAPO: divergence-augmented policy optimization (Wang et al. 2019, NeurIPS, arXiv 2501.15034).

Written for one agent; `ess_rl.population` runs P of them as one tensor program. (A method of 2025 with the same
acronym is unrelated.) An action is charged with the divergence of pi from the behavior b over all the steps that follow
it. So this is a divergence of the states that pi and b visit, not only of their actions:

    d_t     = log rho_t,     or the charge of another divergence: `ess_rl.objectives.divergence_slope`
    V_t     = min(1, rho_t) d_t + discount min(c_bar, rho_t) V_{t+1}      `ess_rl.returns.divergence_ahead`
    D_t     = d_t + discount V_{t+1}
    loss    = PPO's clipped loss with the advantage A_t - divergence_coef sg(D_t)

`objective="p3o"` is P3O-DA, which is ours: P3O with this divergence as its KL, so that 1 - e replaces the coefficient.
Its pull is (1 - e) mean( rho sg(D) ), whose gradient is (1 - e) mean( rho D grad log pi ). With only d_t that is P3O's,
in expectation: E_b[rho log rho grad log pi] is the gradient of KL(pi || b).

On fresh data rho = 1 and D = 0, so an iteration's first update is PPO's. The released code recomputes all of D at each
update, from whole segments. Here minibatches mix samples of all times, so d_t is that of the policy at each update, and
the part ahead, discount V_{t+1}, that of the policy at the start of the epoch (`refresh`). Other deviations: no
recurrent network; targets are computed once per iteration; the value loss is not weighted by min(rho, 3); the advantage
is standardized, not only scaled. The hyperparameters are PPO's; `c_bar` and `divergence_coef` are each one of several
values that the authors used. Their published experiments are on Atari.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ess_rl import normalizer
from ess_rl.contract import Draw, Metrics, Precision, Starts, State, Tree
from ess_rl.diagnostics import share
from ess_rl.ess import policy_ratio
from ess_rl.gaussian import Gaussian, kl
from ess_rl.networks import policy, policy_init, value, value_init
from ess_rl.objectives import Divergence, divergence_slope, p3o, ppo_clip
from ess_rl.optim import adam_init, adam_steps, clip_by_global_norm, gradient, linear_decay
from ess_rl.random import fold_in
from ess_rl.returns import Correction, corrected, divergence_ahead
from ess_rl.transitions import Transitions, flat_samples


@dataclass(frozen=True)
class Config:
    objective: Literal["clip", "p3o"] = "clip"  # PPO's clip of the augmented advantage; p3o: 1 - e as the coefficient
    clip: float = 0.2  # how far the ratio may move from 1 before its sample has no gradient
    divergence: Divergence = "kl"  # KL(pi || b), reverse_kl: KL(b || pi), hellinger
    divergence_coef: float = 0.5  # cost of the divergence, in standard deviations of the advantage; objective clip only
    c_bar: float = 0.9  # cap of the ratios that carry the divergence across steps; 0: looks one step ahead
    recursion: Literal["stated", "released"] = "stated"  # of the divergence; released: with a bug, for ablation
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
    correction: Correction = "vtrace"  # how returns of older data are corrected: none, vtrace, retrace, ess
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


class DAPO:
    """Charges an action with the divergence from the behavior that it leads to, over the steps that follow."""

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
        }

    def act(self, state: State, obs: Tensor) -> Gaussian:
        return policy(state["params"]["policy"], normalizer.standardize(state["obs_stats"], obs))

    def prepare(self, state: State, rollout: Transitions) -> dict[str, Tensor]:
        hyper, params = state["hyper"], state["params"]
        obs = normalizer.standardize(state["obs_stats"], rollout.obs)
        next_obs = normalizer.standardize(state["obs_stats"], rollout.next_obs)
        log_ratio = self._log_ratio(state, rollout)
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
        return samples | self.refresh(state, rollout)

    begin_epoch = None

    def refresh(self, state: State, rollout: Transitions) -> dict[str, Tensor]:
        """The divergence ahead of each sample, under the current policy."""
        log_ratio = self._log_ratio(state, rollout)
        ahead = divergence_ahead(
            divergence_slope(log_ratio, self.config.divergence),
            log_ratio,
            rollout.last,
            discount=state["hyper"]["discount"],
            c_bar=state["hyper"]["c_bar"],
            released=self.config.recursion == "released",
        )
        return {"divergence_ahead": ahead.flatten(0, 1)}

    def _log_ratio(self, state: State, rollout: Transitions) -> Tensor:
        b = Gaussian(rollout.behavior_mean, rollout.behavior_log_std)
        return self.act(state, rollout.obs).log_prob(rollout.action) - b.log_prob(rollout.action)

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        hyper, progress = state["hyper"], state["progress"]

        def loss_function(params: Tree) -> tuple[Tensor, Metrics]:
            pi = policy(params["policy"], batch["obs"])
            b = Gaussian(batch["behavior_mean"], batch["behavior_log_std"])
            advantage = normalizer.standardize_batch(batch["advantage"])
            log_prob, behavior_log_prob = pi.log_prob(batch["action"]), b.log_prob(batch["action"])
            log_ratio = log_prob - behavior_log_prob
            slope = divergence_slope(log_ratio, self.config.divergence)
            divergence = (slope + batch["divergence_ahead"]).detach()
            charged = policy_ratio(log_ratio) * divergence
            if self.config.objective == "clip":
                advantage = advantage - hyper["divergence_coef"] * divergence
                policy_loss, metrics, weight = ppo_clip(log_prob, behavior_log_prob, advantage, clip=hyper["clip"])
            else:
                policy_loss, metrics, weight = p3o(log_prob, behavior_log_prob, advantage, charged)
            metrics |= {"behavior_kl": kl(pi, b).mean(), "divergence": charged.mean()}
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
            "policy": linear_decay(hyper["learning_rate"], progress, hyper["final_learning_rate"]),
            "value": linear_decay(hyper["value_learning_rate"], progress),
        }
        params, optimizer = adam_steps(state["params"], grads, state["optimizer"], rates)
        return {**state, "params": params, "optimizer": optimizer}, metrics

    def observe(self, state: State, rollout: Transitions) -> State:
        return {**state, **normalizer.seen(state, rollout)}
