"""BC: behavioral cloning of the data's actions by maximum likelihood (Pomerleau 1991). Offline agents must beat this.

Written for one agent; `ess_rl.offline` runs P of them as one tensor program. The policy is Gaussian, with a mean and a
log_std that depend on the state; evaluation uses the mean.
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
from ess_rl.networks import gaussian, gaussian_init
from ess_rl.offline import no_stats
from ess_rl.optim import adam_init, adam_steps
from ess_rl.random import fold_in


@dataclass(frozen=True)
class Config:
    learning_rate: float = 3e-4  # of Adam
    log_std_floor: float = -4.0  # of the policy, in units of [-1, 1]
    hidden: tuple[int, ...] = (256, 256)  # relu units
    minibatch: int = 256  # samples per update


class BC:
    """loss = -mean( log pi(a|s) ) over the data."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int):
        self.config, self.obs_dim, self.act_dim = config, obs_dim, act_dim

    def init(self, seed: Tensor, hyper: dict[str, Tensor]) -> State:
        params = {"policy": gaussian_init(fold_in(seed, 0), self.obs_dim, self.act_dim, self.config.hidden)}
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

    prepare = None

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        hyper = state["hyper"]
        obs = normalizer.standardize(state["data_stats"]["obs"], batch["obs"])
        b = Gaussian(batch["behavior_mean"], batch["behavior_log_std"])

        def loss_function(params: Tree) -> tuple[Tensor, Metrics]:
            pi = gaussian(params["policy"], obs, hyper["log_std_floor"])
            log_prob = pi.log_prob(batch["action"])
            loss = -log_prob.mean()
            return loss, {
                "loss": loss,
                "ess": effective_sample_size(log_prob - b.log_prob(batch["action"])),
                "behavior_kl": kl(pi, b).mean(),
                "floored_fraction": (pi.log_std <= hyper["log_std_floor"]).any(-1).to(loss.dtype).mean(),
            }

        grads, metrics = grad(loss_function, has_aux=True)(state["params"])
        rates = {"policy": hyper["learning_rate"]}
        params, optimizer = adam_steps(state["params"], grads, state["optimizer"], rates)
        return {**state, "params": params, "optimizer": optimizer}, metrics
