"""P3O on data that someone else collected: the objective of arXiv 2605.12380 with rho = pi / b, b the data's behavior.

Written for one agent; `ess_rl.offline` runs P of them as one tensor program. The data set takes the place of P3O's
rollouts, as one large old batch:

    start     the first updates clone the behavior, so that the ratio begins near 1
    returns   at the start of each stretch of updates (a hundredth of training), lambda-returns and advantages of all
              the data are recomputed with the current value and policy; V-trace (Espeholt et al. 2018, arXiv
              1802.01561) accounts for the policy moving away from the behavior; `correction` offers alternatives
    policy    -mean( sg(min(rho, e)) A log pi ) + (1 - e) mean( KL(pi || b) ), A standardized over the minibatch

The further the policy moves from the data, the smaller e: the less a sample counts and the stronger the KL. Actions
outside the data are never evaluated, so there is no Q. Deviations from P3O: the policy first clones; its gradient is
clipped separately and the value's is not clipped; observations and rewards are scaled by the data's statistics, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad

from ess_rl import normalizer
from ess_rl.contract import Metrics, State, Tree
from ess_rl.gaussian import Gaussian, kl
from ess_rl.networks import gaussian, gaussian_init, value, value_init
from ess_rl.objectives import p3o
from ess_rl.offline import in_parts, no_stats, reward_scale, values_along
from ess_rl.optim import adam_init, adam_steps, clip_by_global_norm
from ess_rl.random import fold_in
from ess_rl.returns import Correction, corrected
from ess_rl.transitions import Transitions


@dataclass(frozen=True)
class Config:
    cap: Literal["ess", "ess_per_dim"] | float = "ess"  # of the ratio; ablations: a number, or e^(1/act_dim)
    pull: Literal["ess"] | float = "ess"  # weight of the KL: 1 - e; a number is an ablation
    behavior_kl: Literal["closed_form", "reverse"] = "closed_form"  # KL(pi || b), KL(b || pi)
    cloning: float = 0.2  # initial share of the updates in which the policy clones the behavior
    correction: Correction = "vtrace"  # how the behavior's returns are corrected: none, vtrace, retrace, ess
    lambda_: float = 0.95  # of the lambda-returns
    return_range: float = 10.0  # rewards are scaled so that the data's returns span this range; 0: no scaling
    learning_rate: float = 3e-4  # of Adam, for the value and for cloning
    policy_learning_rate: float = 1e-4  # of Adam, after cloning; falls linearly to 0
    max_grad_norm: float = 0.5  # of the policy's gradient
    discount: float = 0.99  # per control step
    log_std_floor: float = -4.0  # of the policy, in units of [-1, 1]
    hidden: tuple[int, ...] = (256, 256)  # relu units of policy and value
    minibatch: int = 256  # samples per update: e is computed over them


class P3OOffline:
    """Clones the behavior; then caps the ratio at e, the batch's effective sample size, and pulls with weight 1 - e."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int):
        self.config, self.obs_dim, self.act_dim = config, obs_dim, act_dim

    def init(self, seed: Tensor, hyper: dict[str, Tensor]) -> State:
        params = {
            "policy": gaussian_init(fold_in(seed, 0), self.obs_dim, self.act_dim, self.config.hidden),
            "value": value_init(fold_in(seed, 1), self.obs_dim, self.config.hidden),
        }
        return {
            "params": params,
            "optimizer": {name: adam_init(net) for name, net in params.items()},
            "data_stats": no_stats(self.obs_dim, seed.device),
            "hyper": hyper,
            "progress": torch.zeros((), device=seed.device),
        }

    def act(self, state: State, obs: Tensor) -> Gaussian:
        obs = normalizer.standardize(state["data_stats"]["obs"], obs)
        return gaussian(state["params"]["policy"], obs, state["hyper"]["log_std_floor"])

    def prepare(self, state: State, data: Transitions) -> dict[str, Tensor]:
        hyper, stats = state["hyper"], state["data_stats"]
        scale = reward_scale(stats, hyper["return_range"])

        def values(obs: Tensor) -> Tensor:
            return value(state["params"]["value"], normalizer.standardize(stats["obs"], obs), torch.relu)

        def policies(obs: Tensor) -> Tensor:
            return torch.cat(self.act(state, obs), dim=-1)

        pi = Gaussian(*in_parts(policies, data.obs).chunk(2, dim=-1))
        b = Gaussian(data.behavior_mean, data.behavior_log_std)
        advantage, value_target = corrected(
            self.config.correction,
            pi.log_prob(data.action) - b.log_prob(data.action),
            scale * data.reward,
            *values_along(values, data),
            data.terminated,
            data.last,
            discount=hyper["discount"],
            lambda_=hyper["lambda_"],
        )
        return {"advantage": advantage, "value_target": value_target}

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        hyper, progress = state["hyper"], state["progress"]
        obs = normalizer.standardize(state["data_stats"]["obs"], batch["obs"])
        b = Gaussian(batch["behavior_mean"], batch["behavior_log_std"])
        clones = progress < hyper["cloning"]

        def loss_function(params: Tree) -> tuple[Tensor, Metrics]:
            v = value(params["value"], obs, torch.relu)
            value_loss = 0.5 * (v - batch["value_target"]).square().mean()
            pi = gaussian(params["policy"], obs, hyper["log_std_floor"])
            log_prob = pi.log_prob(batch["action"])
            behavior_kl = kl(pi, b)
            improvement, metrics, _ = p3o(
                log_prob,
                b.log_prob(batch["action"]),
                normalizer.standardize_batch(batch["advantage"]),
                behavior_kl if self.config.behavior_kl == "closed_form" else kl(b, pi),
                cap=self.config.cap,
                pull=self.config.pull,
                act_dim=self.act_dim,
            )
            if self.config.behavior_kl == "reverse":
                metrics |= {"pull_kl": metrics["behavior_kl"], "behavior_kl": behavior_kl.mean()}
            policy_loss = torch.where(clones, -log_prob.mean(), improvement)
            metrics |= {
                "policy_loss": policy_loss,
                "value_loss": value_loss,
                "value": v.mean(),
                "entropy": pi.entropy().mean(),
            }
            return policy_loss + value_loss, metrics

        grads, metrics = grad(loss_function, has_aux=True)(state["params"])
        grads["policy"], metrics["grad_norm"] = clip_by_global_norm(grads["policy"], hyper["max_grad_norm"])
        left = (1.0 - progress) / (1.0 - hyper["cloning"]).clamp(min=1e-3)
        policy_rate = torch.where(clones, hyper["learning_rate"], left * hyper["policy_learning_rate"])
        rates = {"policy": policy_rate, "value": hyper["learning_rate"]}
        params, optimizer = adam_steps(state["params"], grads, state["optimizer"], rates)
        return {**state, "params": params, "optimizer": optimizer}, metrics
