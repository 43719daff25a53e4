"""P3O: the batch's effective sample size says how far to trust the batch (Fakoor et al. 2026, arXiv 2605.12380).

Written for one agent; `ess_rl.population` runs P of them as one tensor program. The details other than the objective
are those of the usual implementations: orthogonal initialization, observations and rewards normalized by running
statistics, standardized advantages, clipped gradients, Adam with linearly decayed learning rates of policy and value.

PPO's clip ends the gradient of a sample; P3O's cap only bounds the sample's weight, and ten epochs on one batch move
the policy as far as its learning rate allows: on some tasks too far. `keep_ess`, which is not in the paper, lets the
ESS limit this too (`ess_rl.optim.held_back`). After an iteration's updates, e is computed from the ratio between the
policies after and before them, on the fresh rollout alone (with a lag, this is not the ratio to the behavior), and the
learning rate is scaled, a little each time and never above its schedule. No quantity besides the ESS is needed.

With `hints`, environments whose whole group failed start from hints, and samples from there are weighted by Affinity^
hint_lambda in the policy loss: HINT (Wang et al. 2025, arXiv 2510.09388), as implemented in `ess_rl.hints`. Cap and
pull are not weighted: e and the KL are over all samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ess_rl import normalizer
from ess_rl.contract import BeginEpoch, Draw, Metrics, Precision, Starts, State, Tree
from ess_rl.diagnostics import share
from ess_rl.ess import effective_sample_size
from ess_rl.gaussian import Gaussian, kl
from ess_rl.hints import affinity_weight
from ess_rl.networks import policy, policy_init, value, value_init
from ess_rl.objectives import k3, p3o
from ess_rl.optim import adam_init, adam_steps, clip_by_global_norm, gradient, held_back, linear_decay
from ess_rl.random import fold_in
from ess_rl.returns import Correction, corrected
from ess_rl.transitions import Transitions, flat_samples


@dataclass(frozen=True)
class Config:
    cap: Literal["ess", "ess_per_dim"] | float = "ess"  # of the ratio; ablations: a number, or e^(1/act_dim)
    ess: Literal["minibatch", "batch"] = "minibatch"  # data that e is computed from; batch: the epoch's, at its start
    pull: Literal["ess"] | float = "ess"  # weight of the KL: 1 - e; a number is an ablation; 0: none (see keep_ess)
    behavior_kl: Literal["closed_form", "reverse", "k3"] = "closed_form"  # KL(pi || b), KL(b || pi), the paper's code
    keep_ess: float = 0.75  # ESS to keep through an iteration's updates; below it the learning rate shrinks. 0: never
    learning_rate: float = 1.5e-4  # initial rate of Adam for the policy
    final_learning_rate: float = 0.3  # final policy rate as a fraction of learning_rate; falls linearly
    value_learning_rate: float = 4e-4  # initial rate of Adam for the value; falls linearly to 0
    discount: float = 0.99  # per control step
    lambda_: float = 0.95  # of GAE
    value_coef: float = 0.5  # weight of the value loss; the value shares only the gradient clip with the policy
    entropy_coef: float = 0.0  # weight of an entropy bonus
    max_grad_norm: float = 0.5  # joint norm of all gradients
    replay: int = 0  # older rollouts that an iteration learns from, in addition to the fresh one
    replay_from: str = ""  # folder of an older run (--save-replay), or a data set, that initially fills the replay
    draw: Draw = "uniform"  # how to draw replayed data: uniform, recency, ess, reward; see ess_rl.batches.draw_weights
    correction: Correction = "none"  # how returns of older data are corrected: none, vtrace, retrace, ess
    hints: int = 0  # environments in a group that starts from a hint once all of them failed; 0: no hints (HINT)
    hint_lambda: float = 1.0  # samples from a hint are weighted by Affinity to this power; 0: like all others
    lag: int = 0  # iterations by which the acting policy is older than the learning one
    sync_interval: int = 1  # iterations for which the acting policy stays the same
    behavior_temperature: float = 1.0  # factor on the acting policy's standard deviation; not used in evaluation
    rollout_precision: Precision = "fp32"  # of the acting network; for bf16, fp16, fp8 see ess_rl.networks.in_precision
    starts: Starts = "together"  # of episodes at a reset; staggered: first clocks are ahead, so ends do not coincide
    log_std: float = -1.0  # of the initial policy, in every action dimension, in units of [-1, 1]
    hidden: tuple[int, ...] = (64, 64)  # tanh units of policy and value, which share nothing
    num_envs: int = 16  # environments per agent
    rollout: int = 256  # steps per environment between updates
    epochs: int = 10  # passes over the num_envs * rollout samples
    minibatch: int = 128  # samples per update


class P3O:
    """Caps the ratio at e, the batch's effective sample size; pulls toward the behavior policy with weight 1 - e."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int):
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
            "before": params["policy"],  # the policy before the iteration's updates
            "rate_factor": torch.ones((), device=seed.device),  # of the policy's learning rate, limited by the ESS
            "ess": torch.ones((), device=seed.device),  # of the epoch's batch
        }

    def act(self, state: State, obs: Tensor) -> Gaussian:
        return policy(state["params"]["policy"], normalizer.standardize(state["obs_stats"], obs))

    def prepare(self, state: State, rollout: Transitions) -> dict[str, Tensor]:
        hyper, params = state["hyper"], state["params"]
        obs = normalizer.standardize(state["obs_stats"], rollout.obs)
        next_obs = normalizer.standardize(state["obs_stats"], rollout.next_obs)
        b = Gaussian(rollout.behavior_mean, rollout.behavior_log_std)
        log_ratio = policy(params["policy"], obs).log_prob(rollout.action) - b.log_prob(rollout.action)
        advantage, value_target = corrected(
            self.config.correction,
            log_ratio,
            normalizer.scale_reward(state["return_scale"], rollout.reward),
            value(params["value"], obs),
            value(params["value"], next_obs),
            rollout.terminated,
            rollout.last,
            discount=hyper["discount"],
            lambda_=hyper["lambda_"],
        )
        return flat_samples(rollout, obs=obs, advantage=advantage, value_target=value_target, log_ratio=log_ratio)

    @property
    def begin_epoch(self) -> BeginEpoch | None:
        return self._ess_of_epoch if self.config.ess == "batch" else None

    def _ess_of_epoch(self, state: State, batch: dict[str, Tensor]) -> State:
        """Compute e over all samples of the epoch, under the policy at its beginning, for the whole epoch."""
        b = Gaussian(batch["behavior_mean"], batch["behavior_log_std"])
        pi = policy(state["params"]["policy"], batch["obs"])
        return {**state, "ess": effective_sample_size(pi.log_prob(batch["action"]) - b.log_prob(batch["action"]))}

    refresh = None

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        hyper, progress = state["hyper"], state["progress"]

        def loss_function(params: Tree) -> tuple[Tensor, Metrics]:
            pi = policy(params["policy"], batch["obs"])
            b = Gaussian(batch["behavior_mean"], batch["behavior_log_std"])
            advantage = normalizer.standardize_batch(batch["advantage"])
            log_prob, behavior_log_prob = pi.log_prob(batch["action"]), b.log_prob(batch["action"])
            if self.config.hints > 0:
                log_ratio, power = log_prob - behavior_log_prob, hyper["hint_lambda"]
                trust = affinity_weight(log_ratio, advantage, batch["hinted"], power, act_dim=self.act_dim)
                advantage = trust * advantage
            policy_loss, metrics, weight = self._objective(state, log_prob, behavior_log_prob, advantage, pi, b)
            if self.config.replay > 0:
                metrics["replayed_share"] = share(weight * advantage, batch["age"] > 0)
            if self.config.hints > 0:
                metrics["hint_weight"] = trust.amin()
            value_loss = 0.5 * (value(params["value"], batch["obs"]) - batch["value_target"]).square().mean()
            entropy = pi.entropy().mean()
            loss = policy_loss + hyper["value_coef"] * value_loss - hyper["entropy_coef"] * entropy
            metrics |= {"value_loss": value_loss, "entropy": entropy, "loss": loss}
            return loss, metrics

        grads, metrics = gradient(loss_function, state["params"])
        grads, metrics["grad_norm"] = clip_by_global_norm(grads, hyper["max_grad_norm"])
        rates = {
            "policy": linear_decay(
                state["rate_factor"] * hyper["learning_rate"], progress, hyper["final_learning_rate"]
            ),
            "value": linear_decay(hyper["value_learning_rate"], progress),
        }
        metrics["learning_rate"] = rates["policy"]
        params, optimizer = adam_steps(state["params"], grads, state["optimizer"], rates)
        return {**state, "params": params, "optimizer": optimizer}, metrics

    def _objective(
        self, state: State, log_prob: Tensor, behavior_log_prob: Tensor, advantage: Tensor, pi: Gaussian, b: Gaussian
    ) -> tuple[Tensor, Metrics, Tensor]:
        """`p3o` or an ablation of it: another cap or pull, another KL, the ESS of other samples."""
        behavior_kl = pull_kl = kl(pi, b)
        if self.config.behavior_kl != "closed_form":
            pull_kl = kl(b, pi) if self.config.behavior_kl == "reverse" else k3(log_prob, behavior_log_prob)
        cap, pull = self.config.cap, self.config.pull
        e = state["ess"] if self.config.ess == "batch" else None
        loss, metrics, weight = p3o(
            log_prob, behavior_log_prob, advantage, pull_kl, cap=cap, pull=pull, act_dim=self.act_dim, ess=e
        )
        if self.config.behavior_kl != "closed_form":
            metrics |= {"pull_kl": metrics["behavior_kl"], "behavior_kl": behavior_kl.mean()}
        return loss, metrics | ({} if e is None else {"ess_batch": e}), weight

    def observe(self, state: State, rollout: Transitions) -> State:
        new, obs = state["params"]["policy"], normalizer.standardize(state["obs_stats"], rollout.obs)
        after, before = (policy(net, obs).log_prob(rollout.action) for net in (new, state["before"]))
        rate_factor = held_back(state["rate_factor"], after - before, state["hyper"]["keep_ess"])
        seen = normalizer.seen(state, rollout)
        before = tree_map(torch.clone, new)  # separate tensors: a checkpoint cannot store a tensor twice
        return {**state, **seen, "before": before, "rate_factor": rate_factor}
