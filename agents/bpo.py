"""BPO: bounded policy optimization (Ao et al. 2026, "Bounded ratio reinforcement learning", arXiv 2604.18578).

Written for one agent; `ess_rl.population` runs P of them as one tensor program. Of all policies whose ratio stays
within 1 +- clip, the best makes every action that is better than the state's median action 1 + clip times as likely,
and every other one 1 - clip times. BPO draws the ratio to these ends (`ess_rl.objectives.bpo`). PPO pulls the same way
and stops there; BPO also pulls back from beyond, so the clip is a target rather than the edge of a plateau. The
threshold between better and worse is a median U of Q, learned alongside the value V by a smoothed quantile regression:

    loss(U) = mean( softplus(Q - U) - (Q - U) / 2 ),   with the gradient 1/2 - sigmoid(Q - U)

Q is the lambda-return, on corrected data without the ratio of the action itself; A = Q - V with V and U as of each
update, and in its own unit, where PPO computes A once per iteration and standardizes it over the minibatch. Everything
else is as in `agents/ppo.py`.

Formulas and hyperparameters are those of the released code (its base configuration for MuJoCo; its sweeps tune them for
each task). Deviations: the details that all agents here share (tanh networks of 64, a first log_std of -1, half the
squared error as the value's loss, decayed learning rates, gradients clipped at 0.5 instead of 1), and U has its own
network, where theirs grows out of the value's. The regression is smoothed over about one unit of the normalized
rewards; where Q spreads less than that, U lies nearer to the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ess_rl import normalizer
from ess_rl.contract import Draw, Metrics, Precision, Starts, State, Tree
from ess_rl.diagnostics import share
from ess_rl.errors import UsageError
from ess_rl.gaussian import Gaussian, kl
from ess_rl.networks import policy, policy_init, value, value_init
from ess_rl.objectives import bpo
from ess_rl.optim import adam_init, adam_steps, clip_by_global_norm, gradient, linear_decay
from ess_rl.random import fold_in
from ess_rl.returns import Correction, corrected
from ess_rl.transitions import Transitions, flat_samples


@dataclass(frozen=True)
class Config:
    clip: float = 0.3  # how far from 1 the ratio is drawn: up for actions above the median, down for the others
    temperature: float = 0.001  # distance from the median at which that takes effect, in units of normalized returns
    learning_rate: float = 3e-4  # initial rate of Adam for the policy
    final_learning_rate: float = 0.0  # final policy rate as a fraction of learning_rate; falls linearly
    value_learning_rate: float = 3e-4  # initial rate of Adam for value and median; falls linearly to 0
    discount: float = 0.99  # per control step
    lambda_: float = 0.95  # of GAE
    value_coef: float = 0.5  # weight of the value loss; the value shares only the gradient clip with the policy
    median_coef: float = 0.5  # weight of the median loss, likewise
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
    hidden: tuple[int, ...] = (64, 64)  # tanh units of policy, value and median, which share nothing
    num_envs: int = 16  # environments per agent
    rollout: int = 128  # steps per environment between updates
    epochs: int = 10  # passes over the num_envs * rollout samples
    minibatch: int = 64  # samples per update


class BPO:
    """Draws the ratio to 1 + clip for actions better than the median action, and to 1 - clip for the others."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int):
        if not 0.0 < config.clip < 1.0:
            raise UsageError(f"clip {config.clip:g}: must lie between 0 and 1; no ratio reaches an end below 0")
        self.config, self.obs_dim, self.act_dim = config, obs_dim, act_dim

    def init(self, seed: Tensor, hyper: dict[str, Tensor]) -> State:
        params = {
            "policy": policy_init(fold_in(seed, 0), self.obs_dim, self.act_dim, self.config.hidden, hyper["log_std"]),
            "value": value_init(fold_in(seed, 1), self.obs_dim, self.config.hidden),
            "median": value_init(fold_in(seed, 2), self.obs_dim, self.config.hidden),
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
        v = value(params["value"], obs)
        advantage, value_target = corrected(
            self.config.correction,
            log_ratio,
            normalizer.scale_reward(state["return_scale"], rollout.reward),
            v,
            value(params["value"], next_obs),
            rollout.terminated,
            rollout.last,
            discount=hyper["discount"],
            lambda_=hyper["lambda_"],
        )
        # V-trace's target is that of the state and includes the action's ratio, which the objective applies itself.
        of_action = {"action_value": advantage + v}
        return flat_samples(
            rollout, obs=obs, advantage=advantage, value_target=value_target, log_ratio=log_ratio, **of_action
        )

    begin_epoch = None
    refresh = None

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        hyper, progress = state["hyper"], state["progress"]

        def loss_function(params: Tree) -> tuple[Tensor, Metrics]:
            pi = policy(params["policy"], batch["obs"])
            b = Gaussian(batch["behavior_mean"], batch["behavior_log_std"])
            q, v, u = batch["action_value"], *(value(params[name], batch["obs"]) for name in ("value", "median"))
            advantage = (q - v).detach()
            policy_loss, metrics, weight = bpo(
                pi.log_prob(batch["action"]),
                b.log_prob(batch["action"]),
                advantage,
                (q - u).detach(),
                clip=hyper["clip"],
                temperature=hyper["temperature"],
            )
            if self.config.replay > 0:
                metrics["replayed_share"] = share(weight * advantage, batch["age"] > 0)
            value_loss = 0.5 * (v - batch["value_target"]).square().mean()
            median_loss = (softplus(q - u) - 0.5 * (q - u)).mean()
            entropy = pi.entropy().mean()
            loss = policy_loss + hyper["value_coef"] * value_loss + hyper["median_coef"] * median_loss
            loss = loss - hyper["entropy_coef"] * entropy
            metrics |= {"behavior_kl": kl(pi, b).mean(), "value_loss": value_loss, "median_loss": median_loss}
            metrics |= {"above_median": (q > u).float().mean(), "entropy": entropy, "loss": loss}
            return loss, metrics

        grads, metrics = gradient(loss_function, state["params"])
        grads, metrics["grad_norm"] = clip_by_global_norm(grads, hyper["max_grad_norm"])
        rates = {
            "policy": linear_decay(hyper["learning_rate"], progress, hyper["final_learning_rate"]),
            "value": linear_decay(hyper["value_learning_rate"], progress),
            "median": linear_decay(hyper["value_learning_rate"], progress),
        }
        params, optimizer = adam_steps(state["params"], grads, state["optimizer"], rates)
        return {**state, "params": params, "optimizer": optimizer}, metrics

    def observe(self, state: State, rollout: Transitions) -> State:
        return {**state, **normalizer.seen(state, rollout)}
