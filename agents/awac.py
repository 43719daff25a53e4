"""AWAC: advantage-weighted actor-critic (Nair et al. 2020, arXiv 2006.09359).

Written for one agent; `ess_rl.offline` runs P of them as one tensor program. The critic learns the value of the policy
itself; the policy imitates the actions of the data, with more weight on those of higher advantage. Other details are
those of the usual implementations: the minimum of two critics, slowly updated targets, a log_std that does not depend
on the state. Deviations: observations are normalized by the data's statistics; all gradients are taken at the same
parameters (in the released code the policy sees the critics after their step).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad

from ess_rl import normalizer
from ess_rl.contract import Metrics, State, Tree
from ess_rl.ess import effective_sample_size
from ess_rl.gaussian import Gaussian, kl
from ess_rl.networks import policy, policy_init, twin_q, twin_q_init
from ess_rl.objectives import advantage_weights
from ess_rl.offline import no_stats, reward_scale
from ess_rl.optim import adam_init, adam_steps, polyak
from ess_rl.random import fold_in


@dataclass(frozen=True)
class Config:
    weights: Literal["exponential", "softmax"] = "exponential"  # exp(A / temperature) up to 100; softmax over the batch
    temperature: float = 1.0  # lambda of the paper, in units of the scaled reward; lower is greedier
    return_range: float = 0.0  # rewards are scaled so that the data's returns span this range; 0: no scaling
    learning_rate: float = 3e-4  # of Adam, for the policy and the critics
    discount: float = 0.99  # per control step
    tau: float = 0.005  # share of the critics mixed into their targets at each update
    log_std: float = -1.0  # of the initial policy, in units of [-1, 1]
    log_std_floor: float = -4.0  # of the policy; no gradient at it, so a width that has reached it stays
    hidden: tuple[int, ...] = (256, 256)  # relu units of policy and critics
    minibatch: int = 256  # samples per update


class AWAC:
    """Policy loss -mean( w log pi(a|s) ), w = exp(A / temperature); A = Q(s, a) - Q(s, a'), a' drawn from pi."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int):
        self.config, self.obs_dim, self.act_dim = config, obs_dim, act_dim

    def init(self, seed: Tensor, hyper: dict[str, Tensor]) -> State:
        hidden = self.config.hidden
        params = {
            "policy": policy_init(fold_in(seed, 0), self.obs_dim, self.act_dim, hidden, hyper["log_std"]),
            "q": twin_q_init(fold_in(seed, 1), self.obs_dim, self.act_dim, hidden),
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
        return Gaussian(mean, torch.maximum(log_std, hyper["log_std_floor"]))

    def act(self, state: State, obs: Tensor) -> Gaussian:
        obs = normalizer.standardize(state["data_stats"]["obs"], obs)
        return self._policy(state["params"]["policy"], obs, state["hyper"])

    prepare = None

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        hyper, stats = state["hyper"], state["data_stats"]
        obs, next_obs = (normalizer.standardize(stats["obs"], batch[name]) for name in ("obs", "next_obs"))
        scale = reward_scale(stats, hyper["return_range"])
        action = batch["action"].clamp(-1.0, 1.0)  # as the environment saw it
        noise, next_noise = batch["noise"].unbind(-2)
        b = Gaussian(batch["behavior_mean"], batch["behavior_log_std"])

        next_action = self._policy(state["params"]["policy"], next_obs, hyper).sample(next_noise).clamp(-1.0, 1.0)
        next_q = torch.minimum(*twin_q(state["target_q"], next_obs, next_action))
        q_target = scale * batch["reward"] + hyper["discount"] * torch.where(batch["terminated"], 0.0, next_q)

        def loss_function(params: Tree) -> tuple[Tensor, Metrics]:
            q_1, q_2 = twin_q(params["q"], obs, action)
            q_loss = (q_1 - q_target).square().mean() + (q_2 - q_target).square().mean()
            pi = self._policy(params["policy"], obs, hyper)
            value = torch.minimum(*twin_q(params["q"], obs, pi.sample(noise).clamp(-1.0, 1.0)))
            advantage = (torch.minimum(q_1, q_2) - value).detach()
            weight = advantage_weights(advantage, hyper["temperature"], self.config.weights)
            log_prob = pi.log_prob(batch["action"])
            policy_loss = -(weight * log_prob).mean()
            return policy_loss + q_loss, {
                "policy_loss": policy_loss,
                "q_loss": q_loss,
                "q": q_1.mean(),
                "advantage": advantage.mean(),
                "weight": weight.mean(),
                "weight_ess": effective_sample_size(torch.log(weight)),
                "ess": effective_sample_size(log_prob - b.log_prob(batch["action"])),
                "behavior_kl": kl(pi, b).mean(),
            }

        grads, metrics = grad(loss_function, has_aux=True)(state["params"])
        rates = {"policy": hyper["learning_rate"], "q": hyper["learning_rate"]}
        params, optimizer = adam_steps(state["params"], grads, state["optimizer"], rates)
        target_q = polyak(state["target_q"], params["q"], hyper["tau"])
        return {**state, "params": params, "target_q": target_q, "optimizer": optimizer}, metrics
