"""TBA with groups: trajectory balance as published (Bartoldson et al. 2025, arXiv 2503.18929), on whole episodes.

Written for one agent; `ess_rl.population` runs P of them as one tensor program. The policy sought is

    pi(tau) = pi_ref(tau) exp( R(tau) / beta ) / Z(s_0),     which maximizes the return minus beta KL(pi || pi_ref)

G environments begin an episode in the same state s_0. The log Z(s_0) that each of their trajectories implies is
averaged over the group; the loss is how far they differ (`ess_rl.objectives.vargrad_trajectory_balance`):

    log Z_j = log pi_ref(tau_j) - log pi(tau_j) + R_j / beta,     log Z = mean of log Z_j over the group
    minimized: mean of (log Z - log Z_j)^2

Its gradient is -mean of 2 / beta A_j sum_t grad log pi(a_t|s_t), with the advantage of a trajectory

    A_j = beta (log Z_j - log Z) = soft_j - mean of soft over the group,     soft_j = R_j - beta log(pi / pi_ref)(tau_j)

So steps of different trajectories can be shuffled: each is a sample that carries the A of its own trajectory, and a
minibatch's mean of A log pi has that gradient up to a factor. `prepare` computes A under the policy at the start of the
iteration, and `refresh` again at the start of each further epoch, where TBA recomputes it for each minibatch. Neither a
ratio nor a value appears, whatever the behavior. With beta 0 it is REINFORCE with the group's mean as the baseline.

This requires groups, environments that begin episodes in the same state at the same time (`envs.make_grouped`), and
whole episodes: one rollout is one episode of each. Every action of an episode is credited with all of its reward, so
the noise grows with its length; `agents/tba.py` balances segments with a learned log Z, works on every task, and
learned faster where both were tried.

The reference, which for TBA is the model before training, is an option:

    iteration   the policy at the start of the iteration: beta is the strength of a trust region, which takes
                effect from the second epoch on, since pi is pi_ref as the first begins
    initial     the untrained policy, N(about 0, exp(log_std)), as in TBA, under the current statistics of
                observations: the reference moves with them

Rewards are divided by the running standard deviation of returns so far (at discount 1: of an episode's sums up to each
of its steps), and clipped at +-10; beta is in that unit. A `discount` below 1 weights reward and log ratio of step t
by discount^t; trajectory balance has 1.

Differences from TBA: as above; data come from --lag, --async and --replay instead of searchers' buffers, drawn by
--draw, step by step, and with `reward` as in `ess_rl.batches.draw_weights`; log Z is the mean over the whole group,
whichever of its steps are drawn; beta is not annealed. An episode that the clock ends counts as ended by the task: what
would have followed is not part of R.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ess_rl import normalizer
from ess_rl.contract import Draw, Metrics, Precision, State, Tree
from ess_rl.diagnostics import share
from ess_rl.errors import UsageError
from ess_rl.ess import effective_sample_size
from ess_rl.gaussian import Gaussian, kl
from ess_rl.networks import policy, policy_init
from ess_rl.optim import adam_init, adam_steps, clip_by_global_norm, gradient, linear_decay
from ess_rl.processes import all_max
from ess_rl.random import fold_in
from ess_rl.transitions import Transitions


@dataclass(frozen=True)
class Config:
    beta: float = 0.1  # cost of one nat away from the reference, in standard deviations of the return
    reference: Literal["iteration", "initial"] = "iteration"  # pi_ref; see the module docstring
    group: int = 8  # environments whose episodes begin in the same state; divides num_envs
    learning_rate: float = 3e-3  # initial rate of Adam
    final_learning_rate: float = 0.3  # final policy rate as a fraction of learning_rate; falls linearly
    discount: float = 1.0  # per control step
    max_grad_norm: float = 0.5  # norm of the gradient
    replay: int = 0  # older rollouts that an iteration learns from, in addition to the fresh one
    draw: Draw = "uniform"  # how to draw replayed data: uniform, recency, ess, reward; see ess_rl.batches.draw_weights
    lag: int = 0  # iterations by which the acting policy is older than the learning one
    sync_interval: int = 1  # iterations for which the acting policy stays the same
    behavior_temperature: float = 1.0  # factor on the acting policy's standard deviation; not used in evaluation
    rollout_precision: Precision = "fp32"  # of the acting network; for bf16, fp16, fp8 see ess_rl.networks.in_precision
    log_std: float = -1.0  # of the initial policy, in every action dimension, in units of [-1, 1]
    hidden: tuple[int, ...] = (64, 64)  # tanh units of the policy
    num_envs: int = 16  # environments per agent
    rollout: int = 200  # steps per environment between updates: one episode
    epochs: int = 10  # passes over the num_envs * rollout samples
    minibatch: int = 100  # samples per update


class TBAGroup:
    """Balances whole trajectories that begin in the same state against each other: squared residuals, no ratio."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int):
        if config.group < 2 or config.num_envs % config.group:
            raise UsageError(
                f"group {config.group} with num_envs {config.num_envs}: trajectories are balanced against others of "
                "their group, so it takes at least 2, and a divisor"
            )
        self.config, self.obs_dim, self.act_dim = config, obs_dim, act_dim

    def init(self, seed: Tensor, hyper: dict[str, Tensor]) -> State:
        params = {
            "policy": policy_init(fold_in(seed, 0), self.obs_dim, self.act_dim, self.config.hidden, hyper["log_std"])
        }
        return {
            "params": params,
            "optimizer": {name: adam_init(net) for name, net in params.items()},
            "reference": tree_map(torch.clone, params["policy"]),
            "obs_stats": normalizer.init((self.obs_dim,), seed.device),
            "return_scale": normalizer.return_scale_init(self.config.num_envs, seed.device),
            "hyper": hyper,
            "progress": torch.zeros((), device=seed.device),
        }

    def act(self, state: State, obs: Tensor) -> Gaussian:
        return policy(state["params"]["policy"], normalizer.standardize(state["obs_stats"], obs))

    def prepare(self, state: State, rollout: Transitions) -> dict[str, Tensor]:
        b = Gaussian(rollout.behavior_mean, rollout.behavior_log_std)
        samples = {
            "obs": normalizer.standardize(state["obs_stats"], rollout.obs),
            "action": rollout.action,
            "behavior_mean": rollout.behavior_mean,
            "behavior_log_std": rollout.behavior_log_std,
            "step_weight": self._step_weights(state, rollout),
            "log_ratio": self.act(state, rollout.obs).log_prob(rollout.action) - b.log_prob(rollout.action),
        }
        return {name: x.flatten(0, 1) for name, x in samples.items()} | self.refresh(state, rollout)

    def refresh(self, state: State, rollout: Transitions) -> dict[str, Tensor]:
        """The advantage under the current policy: how far a trajectory is from balance, in units of the return."""
        obs = normalizer.standardize(state["obs_stats"], rollout.obs)
        reward = normalizer.scale_reward(state["return_scale"], rollout.reward)
        log_prob = policy(state["params"]["policy"], obs).log_prob(rollout.action)
        reference_log_prob = policy(state["reference"], obs).log_prob(rollout.action)
        soft_reward = reward - state["hyper"]["beta"] * (log_prob - reference_log_prob)
        soft = (self._step_weights(state, rollout) * soft_reward).sum(0)  # per trajectory, [N]
        groups = soft.unflatten(0, (-1, self.config.group))
        advantage = (groups - groups.mean(1, keepdim=True)).flatten()
        return {"advantage": advantage.expand_as(rollout.reward).flatten()}

    def _step_weights(self, state: State, rollout: Transitions) -> Tensor:
        """discount^t: [T, N]."""
        number = torch.arange(rollout.reward.shape[0], dtype=rollout.reward.dtype, device=rollout.reward.device)
        return (state["hyper"]["discount"] ** number)[:, None].expand_as(rollout.reward)

    begin_epoch = None

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        hyper, progress = state["hyper"], state["progress"]

        def loss_function(params: Tree) -> tuple[Tensor, Metrics]:
            pi = policy(params["policy"], batch["obs"])
            b = Gaussian(batch["behavior_mean"], batch["behavior_log_std"])
            log_prob, weight = pi.log_prob(batch["action"]), batch["step_weight"] * batch["advantage"]
            loss = -(weight * log_prob).mean()
            # Not used by the loss.
            log_ratio = (log_prob - b.log_prob(batch["action"])).detach()
            metrics = {
                "ess": effective_sample_size(log_ratio),
                "log_ratio_max": all_max(log_ratio.max()),
                "behavior_kl": kl(pi, b).mean(),
                "entropy": pi.entropy().mean(),
                "imbalance": batch["advantage"].square().mean(),
                "loss": loss,
            }
            if self.config.replay > 0:
                metrics["replayed_share"] = share(weight, batch["age"] > 0)
            return loss, metrics

        grads, metrics = gradient(loss_function, state["params"])
        grads, metrics["grad_norm"] = clip_by_global_norm(grads, hyper["max_grad_norm"])
        rate = linear_decay(hyper["learning_rate"], progress, hyper["final_learning_rate"])
        params, optimizer = adam_steps(state["params"], grads, state["optimizer"], {"policy": rate})
        return {**state, "params": params, "optimizer": optimizer}, metrics

    def observe(self, state: State, rollout: Transitions) -> State:
        reference = state["reference"]
        if self.config.reference == "iteration":  # a copy: a checkpoint cannot store a tensor twice
            reference = tree_map(torch.clone, state["params"]["policy"])
        return {**state, **normalizer.seen(state, rollout), "reference": reference}
