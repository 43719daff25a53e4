"""P3O on data that someone else collected: the objective of arXiv 2605.12380 with rho = pi / b, b the data's behavior.

Written for one agent; `ess_rl.offline` runs P of them as one tensor program. Three parts, of which the paper has the
third alone:

    start     the first updates clone the behavior, so that the ratio begins near 1
    critic    IQL's (Kostrikov et al. 2021, arXiv 2110.06169): a value that is an expectile of Q over the actions of the
              data; 0.5 evaluates the behavior policy, one step of policy improvement (Brandfonbrener et al. 2021)
    policy    -mean( sg(min(rho, e)) A log pi ) + (1 - e) mean( KL(pi || b) ), A = Q - V standardized over the minibatch

The further the policy leaves the data, the smaller e: the less a sample pulls, the stronger the KL holds.
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
from ess_rl.networks import gaussian, gaussian_init, twin_q, twin_q_init, value, value_init
from ess_rl.objectives import expectile_loss, p3o
from ess_rl.offline import no_stats
from ess_rl.optim import adam_init, adam_steps, clip_by_global_norm, polyak
from ess_rl.random import fold_in


@dataclass(frozen=True)
class Config:
    cap: Literal["ess", "ess_per_dim"] | float = "ess"  # of the ratio; a number or e^(1/act_dim) are ablations
    pull: Literal["ess"] | float = "ess"  # weight of the KL: 1 - e; a number is an ablation
    behavior_kl: Literal["closed_form", "reverse"] = "closed_form"  # KL(pi || b), KL(b || pi)
    cloning: float = 0.2  # share of the updates, the first ones, in which the policy clones the behavior
    expectile: float = 0.7  # of Q over the actions of the data; 0.5 is the value of the behavior policy
    return_range: float = 1000.0  # rewards are scaled so that returns of the data span this; 0 leaves them as they are
    learning_rate: float = 3e-4  # of Adam, for critics, value and cloning
    policy_learning_rate: float = 1e-4  # of Adam, after cloning; falls linearly to 0
    max_grad_norm: float = 0.5  # of the policy's gradient
    discount: float = 0.99  # per control step
    tau: float = 0.005  # share of the critics that enters their targets at each update
    log_std_floor: float = -4.0  # of the policy, in units of [-1, 1]
    hidden: tuple[int, ...] = (256, 256)  # relu units of policy, value and critics
    minibatch: int = 256  # samples of one update: e is taken over them


class P3OOffline:
    """Clones the behavior; then caps the ratio at e, the batch's effective sample size, and pulls back with 1 - e."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int):
        self.config, self.obs_dim, self.act_dim = config, obs_dim, act_dim

    def init(self, seed: Tensor, hyper: dict[str, Tensor]) -> State:
        hidden = self.config.hidden
        params = {
            "policy": gaussian_init(fold_in(seed, 0), self.obs_dim, self.act_dim, hidden),
            "q": twin_q_init(fold_in(seed, 1), self.obs_dim, self.act_dim, hidden),
            "value": value_init(fold_in(seed, 2), self.obs_dim, hidden),
        }
        return {
            "params": params,
            "target_q": params["q"],
            "optimizer": {name: adam_init(net) for name, net in params.items()},
            "data_stats": no_stats(self.obs_dim, seed.device),
            "hyper": hyper,
            "progress": torch.zeros((), device=seed.device),
        }

    def act(self, state: State, obs: Tensor) -> Gaussian:
        obs = normalizer.standardize(state["data_stats"]["obs"], obs)
        return gaussian(state["params"]["policy"], obs, state["hyper"]["log_std_floor"])

    prepare = None

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        hyper, stats, progress = state["hyper"], state["data_stats"], state["progress"]
        obs, next_obs = (normalizer.standardize(stats["obs"], batch[name]) for name in ("obs", "next_obs"))
        scale = torch.where(hyper["return_range"] > 0.0, hyper["return_range"] / stats["return_range"], 1.0)
        action = batch["action"].clamp(-1.0, 1.0)  # what the environment saw of it
        b = Gaussian(batch["behavior_mean"], batch["behavior_log_std"])
        clones = progress < hyper["cloning"]

        old_q = torch.minimum(*twin_q(state["target_q"], obs, action))
        next_value = value(state["params"]["value"], next_obs, torch.relu)
        q_target = scale * batch["reward"] + hyper["discount"] * torch.where(batch["terminated"], 0.0, next_value)

        def loss_function(params: Tree) -> tuple[Tensor, Metrics]:
            v = value(params["value"], obs, torch.relu)
            value_loss = expectile_loss(old_q - v, hyper["expectile"])
            q_1, q_2 = twin_q(params["q"], obs, action)
            q_loss = (q_1 - q_target).square().mean() + (q_2 - q_target).square().mean()
            advantage = (old_q - v).detach()
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            pi = gaussian(params["policy"], obs, hyper["log_std_floor"])
            log_prob = pi.log_prob(batch["action"])
            behavior_kl = kl(pi, b) if self.config.behavior_kl == "closed_form" else kl(b, pi)
            improvement, metrics = p3o(
                log_prob,
                b.log_prob(batch["action"]),
                advantage,
                behavior_kl,
                cap=self.config.cap,
                pull=self.config.pull,
                act_dim=self.act_dim,
            )
            del metrics["weight"]  # [n]; the others are one number each
            policy_loss = torch.where(clones, -log_prob.mean(), improvement)
            metrics |= {
                "policy_loss": policy_loss,
                "q_loss": q_loss,
                "value_loss": value_loss,
                "q": q_1.mean(),
                "entropy": pi.entropy().mean(),
            }
            return policy_loss + q_loss + value_loss, metrics

        grads, metrics = grad(loss_function, has_aux=True)(state["params"])
        grads["policy"], metrics["grad_norm"] = clip_by_global_norm(grads["policy"], hyper["max_grad_norm"])
        left = (1.0 - progress) / (1.0 - hyper["cloning"]).clamp(min=1e-3)
        policy_rate = torch.where(clones, hyper["learning_rate"], left * hyper["policy_learning_rate"])
        rates = {"policy": policy_rate, "q": hyper["learning_rate"], "value": hyper["learning_rate"]}
        params, optimizer = adam_steps(state["params"], grads, state["optimizer"], rates)
        target_q = polyak(state["target_q"], params["q"], hyper["tau"])
        return {**state, "params": params, "target_q": target_q, "optimizer": optimizer}, metrics
