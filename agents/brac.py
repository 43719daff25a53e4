"""BRAC: a behavior-regularized actor-critic (Wu, Tucker, Nachum 2019, arXiv 1911.11361): maximize Q, but stay near b.

Written for one agent; `ess_rl.offline` runs P of them as one tensor program. D(s) = KL(pi(.|s) || b(.|s)) in closed
form; b is the behavior, as recorded or as fitted before training (`ess_rl.behavior`); a' is drawn from pi(.|s'):

    critic   Q_i(s, a) -> r - alpha D(s) + discount min_j Q'_j(s', a')       the value penalty; without alpha D: BRAC-p
    policy   -mean( min_i Q_i(s, a) - alpha D(s) ), a drawn from pi(.|s), with gradient

The paper's BRAC-v penalizes the next state: Q(s, a) -> r + discount (min Q' - alpha D(s')). Our Q is that Q minus
alpha D(s), which no action changes: the policy's gradient is the same, and D is needed only in states that have a
behavior. As in the released code, the policy first follows only D, and both losses use the smaller Q.

Deviations: D is computed exactly; theirs is estimated from samples, since their policy is squashed by tanh (ours is
clipped by the environment, so Q sees clipped actions); no MMD, no Wasserstein distance, no dual form; alpha is fixed,
not adapted, and in units of scaled rewards (`return_range`; theirs are as they are, so an alpha of theirs means another
one here); observations are normalized by the data's statistics; all gradients are taken at the same parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad
from torch.utils._pytree import tree_map

from ess_rl import normalizer
from ess_rl.contract import Metrics, State, Tree
from ess_rl.ess import effective_sample_size
from ess_rl.gaussian import Gaussian, kl
from ess_rl.networks import gaussian, gaussian_init, twin_q, twin_q_init
from ess_rl.offline import no_stats, reward_scale
from ess_rl.optim import adam_init, adam_steps, polyak
from ess_rl.random import fold_in


@dataclass(frozen=True)
class Config:
    penalty: Literal["value", "policy"] = "value"  # BRAC-v: on rewards and policy; BRAC-p: on the policy only
    behavior_kl: Literal["closed_form", "reverse"] = "closed_form"  # KL(pi || b), KL(b || pi)
    alpha: float = 1.0  # weight of the KL (in nats), in units of the scaled reward
    cloning: float = 0.04  # initial share of the updates in which the policy follows only the KL
    return_range: float = 1000.0  # rewards are scaled so that the data's returns span this range; 0: no scaling
    learning_rate: float = 1e-3  # of Adam, for the critics
    policy_learning_rate: float = 3e-4  # of Adam
    discount: float = 0.99  # per control step
    tau: float = 0.005  # share of the critics mixed into their targets at each update
    log_std_floor: float = -4.0  # of the policy, in units of [-1, 1]
    hidden: tuple[int, ...] = (256, 256)  # relu units of policy and critics
    minibatch: int = 256  # samples per update


class BRAC:
    """Maximizes Q minus alpha KL(pi || b): in the policy loss and, with penalty "value", in the reward too."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int):
        self.config, self.obs_dim, self.act_dim = config, obs_dim, act_dim

    def init(self, seed: Tensor, hyper: dict[str, Tensor]) -> State:
        hidden = self.config.hidden
        params = {
            "policy": gaussian_init(fold_in(seed, 0), self.obs_dim, self.act_dim, hidden),
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

    def act(self, state: State, obs: Tensor) -> Gaussian:
        obs = normalizer.standardize(state["data_stats"]["obs"], obs)
        return gaussian(state["params"]["policy"], obs, state["hyper"]["log_std_floor"])

    prepare = None

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        hyper, stats = state["hyper"], state["data_stats"]
        obs, next_obs = (normalizer.standardize(stats["obs"], batch[name]) for name in ("obs", "next_obs"))
        scale = reward_scale(stats, hyper["return_range"])
        action = batch["action"].clamp(-1.0, 1.0)  # as the environment saw it
        noise, next_noise = batch["noise"].unbind(-2)
        b = Gaussian(batch["behavior_mean"], batch["behavior_log_std"])

        def policy(params: Tree, obs: Tensor) -> Gaussian:
            return gaussian(params, obs, hyper["log_std_floor"])

        def distance(pi: Gaussian) -> Tensor:
            return kl(pi, b) if self.config.behavior_kl == "closed_form" else kl(b, pi)

        old = state["params"]["policy"]
        reward = scale * batch["reward"]
        if self.config.penalty == "value":
            reward = reward - hyper["alpha"] * distance(policy(old, obs))
        next_action = policy(old, next_obs).sample(next_noise).clamp(-1.0, 1.0)
        next_q = torch.minimum(*twin_q(state["target_q"], next_obs, next_action))
        q_target = reward + hyper["discount"] * torch.where(batch["terminated"], 0.0, next_q)

        def loss_function(params: Tree) -> tuple[Tensor, Metrics]:
            q_1, q_2 = twin_q(params["q"], obs, action)
            q_loss = (q_1 - q_target).square().mean() + (q_2 - q_target).square().mean()
            pi = policy(params["policy"], obs)
            fixed = tree_map(Tensor.detach, params["q"])
            q_chosen = torch.minimum(*twin_q(fixed, obs, pi.sample(noise).clamp(-1.0, 1.0)))
            pull_kl = distance(pi).mean()
            climbs = (state["progress"] >= hyper["cloning"]).to(q_chosen.dtype)
            policy_loss = hyper["alpha"] * pull_kl - climbs * q_chosen.mean()
            paid = {"pull_kl": pull_kl} if self.config.behavior_kl == "reverse" else {}
            return policy_loss + q_loss, paid | {
                "policy_loss": policy_loss,
                "q_loss": q_loss,
                "q": q_1.mean(),
                "q_chosen": q_chosen.mean(),
                "entropy": pi.entropy().mean(),
                "ess": effective_sample_size(pi.log_prob(batch["action"]) - b.log_prob(batch["action"])),
                "behavior_kl": kl(pi, b).mean(),
            }

        grads, metrics = grad(loss_function, has_aux=True)(state["params"])
        rates = {"policy": hyper["policy_learning_rate"], "q": hyper["learning_rate"]}
        params, optimizer = adam_steps(state["params"], grads, state["optimizer"], rates)
        target_q = polyak(state["target_q"], params["q"], hyper["tau"])
        return {**state, "params": params, "target_q": target_q, "optimizer": optimizer}, metrics
