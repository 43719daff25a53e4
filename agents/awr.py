"""AWR: advantage-weighted regression (Peng et al. 2019, arXiv 1910.00177): returns minus a value, no Q.

Written for one agent; `ess_rl.offline` runs P of them as one tensor program. At the start of each stretch of updates (a
hundredth of training), the returns of the data are re-estimated by TD(lambda) with the current value:

    R_t = r_t + discount ((1 - lambda) V(s_{t+1}) + lambda R_{t+1}),     A = R - V(s), standardized over all the data
    value    squared distance of V(s) to R                                                          (Algorithm 1)
    policy   -mean( min(exp(A / temperature), 20) log pi(a|s) )                                     (Algorithm 1)

V and R are those of the data's policy, so this is one step of policy improvement over it. Standardized advantages,
weights that stay fixed while the policy regresses on them, and the cap of 20 are those of the released code.
Deviations: value and policy step together, with Adam, where that code takes 200 steps of the value and then 1000 of the
policy with momentum; log_std is learned, not given; rewards are scaled (`return_range`) where that code scales the
value; observations are normalized by the data's statistics; no penalty keeps the mean within the action's bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad

from ess_rl import normalizer
from ess_rl.contract import Metrics, State, Tree
from ess_rl.ess import effective_sample_size
from ess_rl.gaussian import Gaussian, kl
from ess_rl.networks import policy, policy_init, value, value_init
from ess_rl.objectives import advantage_weights
from ess_rl.offline import no_stats, reward_scale, values_along
from ess_rl.optim import adam_init, adam_steps
from ess_rl.random import fold_in
from ess_rl.returns import gae
from ess_rl.transitions import Transitions


@dataclass(frozen=True)
class Config:
    temperature: float = 1.0  # beta of the paper, in standard deviations of the advantage; lower is greedier
    max_weight: float = 20.0  # cap on the weight of an action
    lambda_: float = 0.95  # of TD(lambda); 1 takes the data's returns as they are
    return_range: float = 10.0  # rewards are scaled so that the data's returns span this range; 0: no scaling
    learning_rate: float = 3e-4  # of Adam, for the policy and the value
    discount: float = 0.99  # per control step
    log_std: float = -1.0  # of the initial policy, in units of [-1, 1]
    log_std_floor: float = -4.0  # of the policy; no gradient at it, so a width that has reached it stays
    hidden: tuple[int, ...] = (256, 256)  # relu units of policy and value
    minibatch: int = 256  # samples per update


class AWR:
    """Policy loss -mean( w log pi(a|s) ), w = min(exp(A / temperature), max_weight); A: lambda-return minus V."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int):
        self.config, self.obs_dim, self.act_dim = config, obs_dim, act_dim

    def init(self, seed: Tensor, hyper: dict[str, Tensor]) -> State:
        hidden = self.config.hidden
        params = {
            "policy": policy_init(fold_in(seed, 0), self.obs_dim, self.act_dim, hidden, hyper["log_std"]),
            "value": value_init(fold_in(seed, 1), self.obs_dim, hidden),
        }
        return {
            "params": params,
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

    def prepare(self, state: State, data: Transitions) -> dict[str, Tensor]:
        hyper, stats = state["hyper"], state["data_stats"]
        scale = reward_scale(stats, hyper["return_range"])

        def values(obs: Tensor) -> Tensor:
            return value(state["params"]["value"], normalizer.standardize(stats["obs"], obs), torch.relu)

        advantage, value_target = gae(
            scale * data.reward,
            *values_along(values, data),
            data.terminated,
            data.last,
            discount=hyper["discount"],
            lambda_=hyper["lambda_"],
        )
        return {"advantage": normalizer.standardize_batch(advantage), "value_target": value_target}

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        hyper = state["hyper"]
        obs = normalizer.standardize(state["data_stats"]["obs"], batch["obs"])
        b = Gaussian(batch["behavior_mean"], batch["behavior_log_std"])
        weight = advantage_weights(batch["advantage"], hyper["temperature"], "exponential", cap=hyper["max_weight"])

        def loss_function(params: Tree) -> tuple[Tensor, Metrics]:
            v = value(params["value"], obs, torch.relu)
            value_loss = 0.5 * (v - batch["value_target"]).square().mean()
            pi = self._policy(params["policy"], obs, hyper)
            log_prob = pi.log_prob(batch["action"])
            policy_loss = -(weight * log_prob).mean()
            return policy_loss + value_loss, {
                "policy_loss": policy_loss,
                "value_loss": value_loss,
                "value": v.mean(),
                "weight": weight.mean(),
                "weight_ess": effective_sample_size(torch.log(weight)),
                "ess": effective_sample_size(log_prob - b.log_prob(batch["action"])),
                "behavior_kl": kl(pi, b).mean(),
            }

        grads, metrics = grad(loss_function, has_aux=True)(state["params"])
        rates = {"policy": hyper["learning_rate"], "value": hyper["learning_rate"]}
        params, optimizer = adam_steps(state["params"], grads, state["optimizer"], rates)
        return {**state, "params": params, "optimizer": optimizer}, metrics
