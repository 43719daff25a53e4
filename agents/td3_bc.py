"""TD3+BC: TD3 with a behavioral cloning term (Fujimoto and Gu 2021, arXiv 2106.06860).

Written for one agent; `ess_rl.offline` runs P of them as one tensor program. The policy is deterministic, so there is
no ratio to the behavior and no effective sample size; `act` gives it the width of the target smoothing noise. As in the
released code, lambda is computed from Q at the policy's own actions. Deviation: all gradients are taken at the same
parameters (in the released code the policy sees the critics after their step).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad
from torch.utils._pytree import tree_map

from ess_rl import normalizer
from ess_rl.contract import Metrics, State, Tree
from ess_rl.errors import UsageError
from ess_rl.gaussian import Gaussian
from ess_rl.networks import mlp, mlp_init, twin_q, twin_q_init
from ess_rl.objectives import td3_bc_weight
from ess_rl.offline import no_stats
from ess_rl.optim import adam_init, adam_steps, polyak
from ess_rl.random import fold_in


@dataclass(frozen=True)
class Config:
    alpha: float = 2.5  # weight of Q relative to the squared distance to the data; 0 is cloning
    policy_noise: float = 0.2  # standard deviation of the noise on the target's action, in units of [-1, 1]
    noise_clip: float = 0.5  # bound of that noise
    policy_delay: int = 2  # critic updates per update of the policy and the targets
    learning_rate: float = 3e-4  # of Adam, for the policy and the critics
    discount: float = 0.99  # per control step
    tau: float = 0.005  # share of policy and critics mixed into their targets when these move
    hidden: tuple[int, ...] = (256, 256)  # relu units of policy and critics
    minibatch: int = 256  # samples per update


class TD3BC:
    """Policy loss -lambda mean( Q(s, pi(s)) ) + mean( (pi(s) - a)^2 ), lambda = alpha / mean |Q|."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int):
        if config.policy_delay < 1:
            raise UsageError(
                f"policy_delay {config.policy_delay}: the policy moves once in that many updates: 1 or more"
            )
        self.config, self.obs_dim, self.act_dim = config, obs_dim, act_dim

    def init(self, seed: Tensor, hyper: dict[str, Tensor]) -> State:
        hidden = self.config.hidden
        params = {
            "policy": mlp_init(fold_in(seed, 0), (self.obs_dim, *hidden, self.act_dim), 0.01),
            "q": twin_q_init(fold_in(seed, 1), self.obs_dim, self.act_dim, hidden),
        }
        return {
            "params": params,
            "target": params,
            "optimizer": {name: adam_init(net) for name, net in params.items()},
            "data_stats": no_stats(self.obs_dim, seed.device),
            "hyper": hyper,
            "progress": torch.zeros((), device=seed.device),
        }

    def _policy(self, params: Tree, obs: Tensor) -> Tensor:
        return torch.tanh(mlp(params, obs, torch.relu))

    def act(self, state: State, obs: Tensor) -> Gaussian:
        mean = self._policy(state["params"]["policy"], normalizer.standardize(state["data_stats"]["obs"], obs))
        return Gaussian(mean, torch.log(state["hyper"]["policy_noise"]).expand_as(mean))

    prepare = None

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        hyper, target = state["hyper"], state["target"]
        obs, next_obs = (normalizer.standardize(state["data_stats"]["obs"], batch[x]) for x in ("obs", "next_obs"))
        action = batch["action"].clamp(-1.0, 1.0)  # as the environment saw it
        clip = hyper["noise_clip"]
        noise = torch.maximum(torch.minimum(batch["noise"][:, 0] * hyper["policy_noise"], clip), -clip)
        next_action = (self._policy(target["policy"], next_obs) + noise).clamp(-1.0, 1.0)
        next_q = torch.minimum(*twin_q(target["q"], next_obs, next_action))
        q_target = batch["reward"] + hyper["discount"] * torch.where(batch["terminated"], 0.0, next_q)

        def loss_function(params: Tree) -> tuple[Tensor, Metrics]:
            q_1, q_2 = twin_q(params["q"], obs, action)
            q_loss = (q_1 - q_target).square().mean() + (q_2 - q_target).square().mean()
            chosen = self._policy(params["policy"], obs)
            q_chosen, _ = twin_q(tree_map(torch.Tensor.detach, params["q"]), obs, chosen)
            weight, distance = td3_bc_weight(q_chosen, hyper["alpha"]), (chosen - action).square().mean()
            policy_loss = -weight * q_chosen.mean() + distance
            return policy_loss + q_loss, {
                "policy_loss": policy_loss,
                "q_loss": q_loss,
                "q": q_1.mean(),
                "weight": weight,
                "distance": distance,
            }

        grads, metrics = grad(loss_function, has_aux=True)(state["params"])
        rates = {"policy": hyper["learning_rate"], "q": hyper["learning_rate"]}
        params, optimizer = adam_steps(state["params"], grads, state["optimizer"], rates)
        moves = optimizer["q"]["step"] % self.config.policy_delay == 0

        def if_it_moves(new: Tree, old: Tree) -> Tree:
            return tree_map(lambda x, y: torch.where(moves, x, y), new, old)

        params["policy"] = if_it_moves(params["policy"], state["params"]["policy"])
        optimizer["policy"] = if_it_moves(optimizer["policy"], state["optimizer"]["policy"])
        target = if_it_moves(polyak(target, params, hyper["tau"]), target)
        return {**state, "params": params, "target": target, "optimizer": optimizer}, metrics
