"""P3O 2019: alternating on-policy and off-policy updates (Fakoor, Chaudhari, Smola 2019, arXiv 1905.01756).

Each iteration takes one A2C step on the fresh rollout, then a Poisson(`replayed_updates`) number of off-policy steps,
each on `segments` segments of `rollout` steps from a first-in first-out replay, with

    gradient    E_b[ min(rho, c) A grad log pi ] - lambda grad E_b[ KL(b || pi) ],   c = ESS, lambda = 1 - ESS

P3O of 2026 adopted this objective (`agents.p3o`); at ratio 1 it is A2C's, so both kinds of steps share one function
here. Returns of older segments are lambda-returns of the behavior's trajectories, under the current value: uncorrected,
as published. Replayed steps have no entropy bonus, as published. Where another policy acted (`lag` and the like), the
step on the fresh rollout has cap and pull too, since its ratios are not 1, and keeps its entropy bonus.

The paper's code is for discrete actions and does not cover Box spaces; its hyperparameters for MuJoCo are not public.
Our choices: Gaussian behaviors are stored by mean and log_std, and their KL is in closed form; the replay holds 50,000
env steps and its warm-up lasts 15,000, where that code counts both for each of its 16 environments, which is 800,000
and 240,000 in all (`--replay 3124 --warm-up 937`): half of a run of 500,000 steps would not replay; where 1 - ESS is
nearly 0, that code sets the cap to nearly 0 as well, which would give fresh data no weight, and ours does not; it skips
the on-policy step where the mean return is exactly 0, and ours does not. Its cap by the ESS is an option that is off by
default and on in the paper. The code's KL is in fact KL(pi || b) over the number of actions: `--behavior-kl
closed_form` is that direction, the default is the paper's.

`--details published` is A2C with RMSProp and raw advantages; `--details shared` has the Adam and the standardized
advantages of `agents.ppo`, to compare only the objectives (also set PPO's learning rate, 3e-4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ess_rl import normalizer
from ess_rl.contract import Metrics, Precision, Starts, State, Tree
from ess_rl.gaussian import Gaussian, kl
from ess_rl.networks import policy, policy_init, value, value_init
from ess_rl.objectives import p3o
from ess_rl.optim import adam_init, adam_step, clip_by_global_norm, gradient, linear_decay, rmsprop_init, rmsprop_step
from ess_rl.random import fold_in
from ess_rl.returns import Correction, corrected
from ess_rl.transitions import Transitions, flat_samples


@dataclass(frozen=True)
class Config:
    replayed_updates: float = 2.0  # mean of the Poisson number of off-policy updates per on-policy update; 0: A2C
    segments: int = 96  # segments of `rollout` steps per off-policy update: 6 times 16 environments
    warm_up: int = 60  # iterations before the first off-policy update: 15,000 env steps
    cap: Literal["ess", "ess_per_dim"] | float = "ess"  # of the ratio, in both kinds of steps; a number is an ablation
    pull: Literal["ess"] | float = "ess"  # weight of the KL: 1 - ESS; a number is an ablation
    behavior_kl: Literal["reverse", "closed_form"] = "reverse"  # KL(b || pi) of the paper; KL(pi || b) of its code
    details: Literal["published", "shared"] = "published"  # RMSProp, raw advantages; or both as in agents.ppo
    learning_rate: float = 7e-4  # initial rate for policy and value; falls linearly to 0
    discount: float = 0.99  # per control step
    lambda_: float = 0.95  # of GAE
    value_coef: float = 0.5  # weight of the mean squared advantage
    entropy_coef: float = 0.01  # weight of an entropy bonus, in on-policy updates
    max_grad_norm: float = 0.5  # joint norm of all gradients
    replay: int = 199  # older rollouts that the replay holds in addition to the fresh one: 50,000 env steps
    replay_from: str = ""  # folder of an older run (--save-replay), or a data set, that initially fills the replay
    draw: Literal["uniform", "recency"] = "uniform"  # weight of a rollout in drawing segments; recency: 1 / (1 + age)
    correction: Correction = "none"  # how returns of older data are corrected: none, vtrace, retrace, ess
    lag: int = 0  # iterations by which the acting policy is older than the learning one
    sync_interval: int = 1  # iterations for which the acting policy stays the same
    behavior_temperature: float = 1.0  # factor on the acting policy's standard deviation; not used in evaluation
    rollout_precision: Precision = "fp32"  # of the acting network; for bf16, fp16, fp8 see ess_rl.networks.in_precision
    starts: Starts = "together"  # of episodes at a reset; staggered: first clocks are ahead, so ends do not coincide
    log_std: float = -1.0  # of the initial policy, in every action dimension, in units of [-1, 1]
    hidden: tuple[int, ...] = (64, 64)  # tanh units of policy and value, which share nothing
    num_envs: int = 16  # environments per agent
    rollout: int = 16  # steps per environment between updates
    epochs: int = 1  # on-policy passes over the num_envs * rollout samples
    minibatch: int = 256  # samples per on-policy update: all of them


class P3O2019:
    """A2C alternating with steps on replayed segments, whose cap and pull the effective sample size sets."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int):
        self.config, self.obs_dim, self.act_dim = config, obs_dim, act_dim
        shared = config.details == "shared"
        self._optimizer_init, self._optimizer_step = (adam_init, adam_step) if shared else (rmsprop_init, rmsprop_step)

    def init(self, seed: Tensor, hyper: dict[str, Tensor]) -> State:
        params = {
            "policy": policy_init(fold_in(seed, 0), self.obs_dim, self.act_dim, self.config.hidden, hyper["log_std"]),
            "value": value_init(fold_in(seed, 1), self.obs_dim, self.config.hidden),
        }
        return {
            "params": params,
            "optimizer": self._optimizer_init(params),
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
        hyper, replayed = state["hyper"], "age" in batch

        def loss_function(params: Tree) -> tuple[Tensor, Metrics]:
            pi = policy(params["policy"], batch["obs"])
            b = Gaussian(batch["behavior_mean"], batch["behavior_log_std"])
            advantage = batch["advantage"]
            if self.config.details == "shared":
                advantage = normalizer.standardize_batch(advantage)
            pull_kl = kl(b, pi) if self.config.behavior_kl == "reverse" else kl(pi, b)
            policy_loss, metrics, _ = p3o(
                pi.log_prob(batch["action"]), b.log_prob(batch["action"]), advantage, pull_kl,
                cap=self.config.cap, pull=self.config.pull, act_dim=self.act_dim,
            )  # fmt: skip
            if self.config.behavior_kl == "reverse":
                metrics |= {"pull_kl": metrics["behavior_kl"], "behavior_kl": kl(pi, b).mean()}
            value_loss = (value(params["value"], batch["obs"]) - batch["value_target"]).square().mean()
            entropy = pi.entropy().mean()
            loss = policy_loss + hyper["value_coef"] * value_loss
            if not replayed:
                loss = loss - hyper["entropy_coef"] * entropy
            return loss, metrics | {"value_loss": value_loss, "entropy": entropy, "loss": loss}

        grads, metrics = gradient(loss_function, state["params"])
        grads, metrics["grad_norm"] = clip_by_global_norm(grads, hyper["max_grad_norm"])
        rate = linear_decay(hyper["learning_rate"], state["progress"])
        params, optimizer = self._optimizer_step(state["params"], grads, state["optimizer"], rate)
        return {**state, "params": params, "optimizer": optimizer}, metrics

    def observe(self, state: State, rollout: Transitions) -> State:
        return {**state, **normalizer.seen(state, rollout)}
