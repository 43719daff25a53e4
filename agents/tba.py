"""TBA: trajectory balance (Bartoldson et al. 2025, arXiv 2503.18929) for Gaussian policies over many steps.

Written for one agent; `ess_rl.population` runs P of them as one tensor program. The policy sought is

    pi(tau) = pi_ref(tau) exp( R(tau) / beta ) / Z,     which maximizes the return minus beta KL(pi || pi_ref)

TBA squares the difference between the logarithms of the two sides, on trajectories sampled by any policy: no ratio
appears. Its trajectories are a language model's answers, several per question, from which it estimates log Z. Here a
trajectory has a thousand steps and its own initial state. So segments of at most k steps are balanced, and a soft value
V(s) is learned for beta log Z (`ess_rl.objectives.subtrajectory_balance`, which is path consistency: PCL, Nachum et al.
2017, arXiv 1702.08892):

    delta_j = V(s_t) - discount^j V'(s_t+j) + sum_{i < j} discount^i ( beta log(pi / pi_ref) - r ),     j = 1 ... k
    minimized: sum_j w_j delta_j^2 over all t, w_j the weights of a lambda-return; lambda_ 1: only the longest j

`prepare` makes each step a sample: the segment that begins there, up to the end of its episode or of the rollout. So a
minibatch of n is n segments, up to n k steps, and an epoch sees each step k times: hence five epochs, not ten.

The reference, which for TBA is the model before training, is an option:

    iteration   the policy at the start of the iteration: beta is the strength of a trust region, and the
                target moves with each iteration (Trust-PCL, Nachum et al. 2018, arXiv 1707.01891, uses a
                running average of the policy)
    initial     the untrained policy, N(about 0, exp(log_std)), as in TBA: large actions stay costly throughout
    uniform     density 1 everywhere: log pi_ref = 0, so beta times the entropy is added to the return, as in
                PCL. Nothing else restrains the policy

`entropy_coef` adds entropy to the return with any reference. Rewards are divided by the running standard deviation of
returns, so beta is in that unit and not in the task's: leaving the reference by one nat costs beta standard deviations
of the return. While the scale settles early in training, beta in the task's own unit moves with it.

Differences from TBA: V instead of the mean over a group, which `agents/tba_group.py` has; segments, a discount; data
come from --lag, --async and --replay instead of searchers' buffers, drawn by --draw; beta is not annealed.
Differences from PCL: V' is V at the start of the iteration, without gradient (Trust-PCL has a slowly updated one);
Adam; no replay by reward unless --draw asks for it. The residual that older data leave is not corrected: V leans toward
the returns of the behavior, as far as beta log(pi / pi_ref) does not account for the difference.

Other details are those of `agents/ppo.py`; advantages are not standardized, since beta is in their unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ess_rl import normalizer
from ess_rl.contract import Draw, Metrics, Precision, Starts, State, Tree
from ess_rl.diagnostics import share
from ess_rl.errors import UsageError
from ess_rl.ess import effective_sample_size
from ess_rl.gaussian import Gaussian, kl
from ess_rl.networks import policy, policy_init, value, value_init
from ess_rl.objectives import subtrajectory_balance
from ess_rl.optim import adam_init, adam_steps, clip_by_global_norm, gradient, linear_decay
from ess_rl.processes import all_max
from ess_rl.random import fold_in
from ess_rl.returns import path_residuals, path_weights, windows, within_episode
from ess_rl.transitions import Transitions


@dataclass(frozen=True)
class Config:
    beta: float = 0.2  # cost of one nat away from the reference, in standard deviations of the return
    reference: Literal["iteration", "initial", "uniform"] = "iteration"  # pi_ref; see the module docstring
    segment_length: int = 16  # k, maximum steps of a segment; an iteration's samples take k times the memory
    lambda_: float = 0.95  # how the lengths of a segment are weighted; 1: only the longest, 0: only single steps
    learning_rate: float = 6e-4  # initial rate of Adam for the policy
    final_learning_rate: float = 0.3  # final policy rate as a fraction of learning_rate; falls linearly
    value_learning_rate: float = 1e-3  # initial rate of Adam for the value; falls linearly to 0
    discount: float = 0.99  # per control step
    value_coef: float = 0.5  # weight of the value loss; the value shares only the gradient clip with the policy
    entropy_coef: float = 0.0  # weight of entropy in the return: tau of PCL
    max_grad_norm: float = 0.5  # joint norm of all gradients
    replay: int = 0  # older rollouts that an iteration learns from, in addition to the fresh one
    replay_from: str = ""  # folder of an older run (--save-replay), or a data set, that initially fills the replay
    draw: Draw = "uniform"  # how to draw replayed data: uniform, recency, ess, reward; see ess_rl.batches.draw_weights
    lag: int = 0  # iterations by which the acting policy is older than the learning one
    sync_interval: int = 1  # iterations for which the acting policy stays the same
    behavior_temperature: float = 1.0  # factor on the acting policy's standard deviation; not used in evaluation
    rollout_precision: Precision = "fp32"  # of the acting network; for bf16, fp16, fp8 see ess_rl.networks.in_precision
    starts: Starts = "together"  # of episodes at a reset; staggered: first clocks are ahead, so ends do not coincide
    log_std: float = -1.0  # of the initial policy, in every action dimension, in units of [-1, 1]
    hidden: tuple[int, ...] = (64, 64)  # tanh units of policy and value, which share nothing
    num_envs: int = 16  # environments per agent
    rollout: int = 128  # steps per environment between updates
    epochs: int = 5  # passes over the num_envs * rollout segments
    minibatch: int = 64  # segments per update


class TBA:
    """Balances segments of trajectories against a reference policy: squared residuals, no ratio."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int):
        if config.segment_length < 1:
            raise UsageError(
                f"segment_length {config.segment_length}: a segment has at least 1 step; 8 to 32 are usual"
            )
        self.config, self.obs_dim, self.act_dim = config, obs_dim, act_dim

    def init(self, seed: Tensor, hyper: dict[str, Tensor]) -> State:
        params = {
            "policy": policy_init(fold_in(seed, 0), self.obs_dim, self.act_dim, self.config.hidden, hyper["log_std"]),
            "value": value_init(fold_in(seed, 1), self.obs_dim, self.config.hidden),
        }
        return {
            "params": params,
            "optimizer": {name: adam_init(net) for name, net in params.items()},
            "obs_stats": normalizer.init((self.obs_dim,), seed.device),
            "return_scale": normalizer.return_scale_init(self.config.num_envs, seed.device),
            "hyper": hyper,
            "progress": torch.zeros((), device=seed.device),
        } | ({"reference": params["policy"]} if self.config.reference == "initial" else {})

    def act(self, state: State, obs: Tensor) -> Gaussian:
        return policy(state["params"]["policy"], normalizer.standardize(state["obs_stats"], obs))

    def prepare(self, state: State, rollout: Transitions) -> dict[str, Tensor]:
        hyper, params, length = state["hyper"], state["params"], self.config.segment_length
        obs = normalizer.standardize(state["obs_stats"], rollout.obs)
        next_obs = normalizer.standardize(state["obs_stats"], rollout.next_obs)
        b = Gaussian(rollout.behavior_mean, rollout.behavior_log_std)
        log_prob = policy(params["policy"], obs).log_prob(rollout.action)
        reference_log_prob = self._reference_log_prob(state, obs, rollout.action, log_prob)
        reward = normalizer.scale_reward(state["return_scale"], rollout.reward)
        end_value = torch.where(rollout.terminated, 0.0, value(params["value"], next_obs))
        segments = {
            "obs": obs,
            "action": rollout.action,
            "reference_log_prob": reference_log_prob,
            "reward": reward,
            "end_value": end_value,
        }
        segments = {name: windows(x, length) for name, x in segments.items()}
        within = within_episode(rollout.last, length)
        weights = path_weights(within, hyper["lambda_"])
        charge = hyper["beta"] * (log_prob - reference_log_prob) + hyper["entropy_coef"] * log_prob - reward
        residuals = path_residuals(
            windows(charge, length), value(params["value"], obs), segments["end_value"], discount=hyper["discount"]
        )
        samples = segments | {
            "within": within,
            "behavior_mean": rollout.behavior_mean,
            "behavior_log_std": rollout.behavior_log_std,
            "advantage": -(weights * residuals).sum(-1),
            "log_ratio": log_prob - b.log_prob(rollout.action),
        }
        return {name: x.flatten(0, 1) for name, x in samples.items()}

    def _reference_log_prob(self, state: State, obs: Tensor, action: Tensor, log_prob: Tensor) -> Tensor:
        if self.config.reference == "initial":  # under the current statistics: the reference moves with them
            return policy(state["reference"], obs).log_prob(action)
        if self.config.reference == "uniform":  # not 2^-d: a constant per step would reward or punish staying alive
            return torch.zeros_like(log_prob)
        return log_prob

    begin_epoch = None
    refresh = None

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        hyper, progress = state["hyper"], state["progress"]

        def loss_function(params: Tree) -> tuple[Tensor, Metrics]:
            pi = policy(params["policy"], batch["obs"])  # at all steps of the segments, [n, k, act_dim]
            log_prob = pi.log_prob(batch["action"])
            loss, metrics, weight = subtrajectory_balance(
                log_prob,
                batch["reference_log_prob"],
                value(params["value"], batch["obs"][:, 0]),
                batch["reward"],
                batch["end_value"],
                batch["within"],
                beta=hyper["beta"],
                discount=hyper["discount"],
                lambda_=hyper["lambda_"],
                entropy_coef=hyper["entropy_coef"],
                value_coef=hyper["value_coef"],
            )
            if self.config.replay > 0:
                metrics["replayed_share"] = share(weight, batch["age"] > 0)
            # Not used by the loss. First steps only: over an epoch these are all steps, once each.
            first, b = (
                Gaussian(pi.mean[:, 0], pi.log_std[:, 0]),
                Gaussian(batch["behavior_mean"], batch["behavior_log_std"]),
            )
            log_ratio = (log_prob[:, 0] - b.log_prob(batch["action"][:, 0])).detach()
            metrics |= {
                "ess": effective_sample_size(log_ratio),
                "log_ratio_max": all_max(log_ratio.max()),
                "behavior_kl": kl(first, b).mean(),
                "entropy": first.entropy().mean(),
                "loss": loss,
            }
            return loss, metrics

        grads, metrics = gradient(loss_function, state["params"])
        grads, metrics["grad_norm"] = clip_by_global_norm(grads, hyper["max_grad_norm"])
        rates = {
            "policy": linear_decay(hyper["learning_rate"], progress, hyper["final_learning_rate"]),
            "value": linear_decay(hyper["value_learning_rate"], progress),
        }
        params, optimizer = adam_steps(state["params"], grads, state["optimizer"], rates)
        return {**state, "params": params, "optimizer": optimizer}, metrics

    def observe(self, state: State, rollout: Transitions) -> State:
        return {**state, **normalizer.seen(state, rollout)}
