"""IQL: implicit Q-learning (Kostrikov, Nair, Levine 2021, arXiv 2110.06169).

Written for one agent; `ess_rl.offline` runs P of them as one tensor program. The value is an upper expectile of Q over
the actions of the data, so no action outside the data is ever evaluated; the policy imitates, weighted by exp(beta A).
Other details are those of the released code: the minimum of two critics, slowly updated targets, tanh on the policy's
mean, a log_std that does not depend on the state, the policy's learning rate falling to 0 along a cosine, rewards
scaled so that the returns of the data span 1000. Deviations: log_std begins at -1 and has a floor of -4 (theirs: 0, and
between -5 and 2); observations are normalized by the data's statistics; all gradients are taken at the same parameters
(in the released code the value steps first).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad

from ess_rl import normalizer
from ess_rl.contract import Metrics, State, Tree
from ess_rl.ess import effective_sample_size
from ess_rl.gaussian import Gaussian, kl
from ess_rl.networks import policy, policy_init, twin_q, twin_q_init, value, value_init
from ess_rl.objectives import advantage_weights, expectile_loss
from ess_rl.offline import no_stats, reward_scale
from ess_rl.optim import adam_init, adam_steps, polyak
from ess_rl.random import fold_in


@dataclass(frozen=True)
class Config:
    expectile: float = 0.7  # of Q over the actions of the data; 0.5 is the value of the behavior policy
    inverse_temperature: float = 3.0  # beta of the paper, in units of 1 / scaled reward; higher is greedier
    return_range: float = 1000.0  # rewards are scaled so that the data's returns span this range; 0: no scaling
    imitates: Literal["clipped", "sampled"] = "clipped"  # actions as the environment saw them, or as they were sampled
    learning_rate: float = 3e-4  # of Adam; the policy's falls to 0 along a cosine
    discount: float = 0.99  # per control step
    tau: float = 0.005  # share of the critics mixed into their targets at each update
    log_std: float = -1.0  # of the initial policy, in units of [-1, 1]
    log_std_floor: float = -4.0  # of the policy; no gradient at it, so a width that has reached it stays
    hidden: tuple[int, ...] = (256, 256)  # relu units of policy, value and critics
    minibatch: int = 256  # samples per update


class IQL:
    """V: expectile of Q(s, a). Q: r + discount V(s'). Policy loss -mean( min(exp(beta A), 100) log pi(a|s) )."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int):
        self.config, self.obs_dim, self.act_dim = config, obs_dim, act_dim

    def init(self, seed: Tensor, hyper: dict[str, Tensor]) -> State:
        hidden = self.config.hidden
        params = {
            "policy": policy_init(fold_in(seed, 0), self.obs_dim, self.act_dim, hidden, hyper["log_std"]),
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

    def _policy(self, params: Tree, obs: Tensor, hyper: dict[str, Tensor]) -> Gaussian:
        mean, log_std = policy(params, obs, torch.relu)
        return Gaussian(torch.tanh(mean), torch.maximum(log_std, hyper["log_std_floor"]))

    def act(self, state: State, obs: Tensor) -> Gaussian:
        obs = normalizer.standardize(state["data_stats"]["obs"], obs)
        return self._policy(state["params"]["policy"], obs, state["hyper"])

    prepare = None

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        hyper, stats = state["hyper"], state["data_stats"]
        obs, next_obs = (normalizer.standardize(stats["obs"], batch[name]) for name in ("obs", "next_obs"))
        scale = reward_scale(stats, hyper["return_range"])
        action = batch["action"].clamp(-1.0, 1.0)  # as the environment saw it
        b = Gaussian(batch["behavior_mean"], batch["behavior_log_std"])

        target_min_q = torch.minimum(*twin_q(state["target_q"], obs, action))
        next_value = value(state["params"]["value"], next_obs, torch.relu)
        q_target = scale * batch["reward"] + hyper["discount"] * torch.where(batch["terminated"], 0.0, next_value)

        def loss_function(params: Tree) -> tuple[Tensor, Metrics]:
            v = value(params["value"], obs, torch.relu)
            value_loss = expectile_loss(target_min_q - v, hyper["expectile"])
            q_1, q_2 = twin_q(params["q"], obs, action)
            q_loss = (q_1 - q_target).square().mean() + (q_2 - q_target).square().mean()
            advantage = (target_min_q - v).detach()
            weight = advantage_weights(advantage, 1.0 / hyper["inverse_temperature"], "exponential")
            pi = self._policy(params["policy"], obs, hyper)
            # A mean within the bounds cannot follow an action beyond them.
            imitated = action if self.config.imitates == "clipped" else batch["action"]
            policy_loss = -(weight * pi.log_prob(imitated)).mean()
            return policy_loss + q_loss + value_loss, {
                "policy_loss": policy_loss,
                "q_loss": q_loss,
                "value_loss": value_loss,
                "q": q_1.mean(),
                "advantage": advantage.mean(),
                "weight": weight.mean(),
                "weight_ess": effective_sample_size(torch.log(weight)),
                "ess": effective_sample_size(pi.log_prob(batch["action"]) - b.log_prob(batch["action"])),
                "behavior_kl": kl(pi, b).mean(),
            }

        grads, metrics = grad(loss_function, has_aux=True)(state["params"])
        cosine = 0.5 * (1.0 + torch.cos(math.pi * state["progress"]))
        rate = hyper["learning_rate"]
        rates = {"policy": rate * cosine, "q": rate, "value": rate}
        params, optimizer = adam_steps(state["params"], grads, state["optimizer"], rates)
        target_q = polyak(state["target_q"], params["q"], hyper["tau"])
        return {**state, "params": params, "target_q": target_q, "optimizer": optimizer}, metrics
