"""The two interfaces that hold the parts together: environment and agent.

Notation: P members of a population, N environments of one member, B environments in all (B = P * N).
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ess_rl.gaussian import Gaussian
from ess_rl.transitions import Transitions

Tree = Any  # nested dictionaries with tensors at the leaves
Draw = Literal["uniform", "recency", "ess", "reward"]
Precision = Literal["fp32", "bf16", "fp16", "fp8"]
Starts = Literal["together", "staggered"]
State = dict[str, Tree]  # everything an agent knows: parameters, optimizer, statistics, hyperparameters
BeginEpoch = Callable[[State, dict[str, Tensor]], State]
Prepare = Callable[[State, Transitions], dict[str, Tensor]]
Metrics = dict[str, Tensor]  # 0-dim tensors, left on their device until they are logged


class Step(NamedTuple):
    """Response of B environments to one action each."""

    obs: Tensor  # [B, obs_dim] to act on: already from the new episode if one ended
    next_obs: Tensor  # [B, obs_dim] to learn from: what the dynamics reached, never an obs after a reset
    reward: Tensor  # [B] per control step, raw
    terminated: Tensor  # [B] bool, the task ended
    truncated: Tensor  # [B] bool, time ran out


@runtime_checkable
class VectorEnv(Protocol):
    """B independent copies of one task, stepped together.

    When an episode ends, its environment is reset within the same `step` (Gymnasium calls this SAME_STEP), so that
    every transition is a real one. There is no info dictionary. Optional: `staggered`, bool: the clocks of the first
    episodes after a reset are ahead.
    """

    env_id: str
    # "torch", "gymnasium", "envpool", "warp" or a name of your own. "torch" makes a promise: on a GPU, `step` can be
    # recorded in a CUDA graph, because it only computes with tensors that stay where they are.
    backend: str
    num_envs: int  # B
    obs_dim: int
    act_dim: int
    device: torch.device  # where obs come out and actions go in

    @property
    def action_range(self) -> Sequence[tuple[float, float]]: ...  # of each action: what [-1, 1] is in simulator units
    @property
    def max_episode_steps(self) -> int | None: ...  # control steps until the clock ends an episode, if known

    def reset(self, seeds: Tensor) -> Tensor:
        """Start new episodes. -> obs [B, obs_dim]

        `seeds` [B] int64: environment i is a function of seeds[i] and its actions only.
        """
        ...

    def step(self, action: Tensor) -> Step:
        """One control step. `action` [B, act_dim] in units of [-1, 1]; the environment clips and scales it."""
        ...

    def close(self) -> None: ...


class Turn(Protocol):
    """Some environments that simulate in the background, between `send` and `receive`."""

    def send(self, action: Tensor) -> None: ...

    def receive(self) -> Step:
        """The outcome of the actions sent last."""
        ...


@runtime_checkable
class InTurns(Protocol):
    """A `VectorEnv` in K parts: part k holds the environments k, k + K, k + 2 K, ...

    So one part can simulate while the policy acts for another.
    """

    @property
    def turns(self) -> Sequence[Turn]: ...


@runtime_checkable
class StartsFromHints(Protocol):
    """A `VectorEnv` that begins some of its episodes where the task is easier (`ess_rl.hints`)."""

    @property
    def group(self) -> int: ...  # environments of a group, which start from a hint together

    @property
    def hinted(self) -> Tensor: ...  # [B] bool: the current episode is one of these


class Collector(Protocol):
    """Collects rollouts in parallel with the loop: one at a time, while the loop learns from the previous one."""

    def begin(self, iteration: int, acting: State, starts: Tensor | None) -> None:
        """Begin the rollout of an iteration, with the policy `acting`, which is copied.

        `starts` [B]: seeds of the environments, if they are reset; None: they continue from the previous rollout.
        """
        ...

    def rollout(self) -> Transitions:
        """Wait for the rollout that was begun. -> transitions [T, P, N] on the population's device"""
        ...


class AgentConfig(Protocol):
    """The fields of an agent's Config (a frozen dataclass with a remark for each number) that the loop reads.

    Members of a population can differ in its float fields, which reach the agent as `hyper`.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # makes it a dataclass to a type checker

    @property
    def num_envs(self) -> int: ...  # N, environments of one member
    @property
    def rollout(self) -> int: ...  # T, steps of each environment in one iteration
    @property
    def epochs(self) -> int: ...  # passes over the data of an iteration
    @property
    def minibatch(self) -> int: ...  # samples of one update
    @property
    def replay(self) -> int: ...  # older rollouts that an iteration learns from, in addition to the fresh one
    @property
    def draw(self) -> Draw: ...  # how often older rollouts are drawn from
    @property
    def lag(self) -> int: ...  # iterations by which the acting policy is older than the learning one
    @property
    def sync_interval(self) -> int: ...  # iterations for which the acting policy stays the same
    @property
    def behavior_temperature(self) -> float: ...  # factor on the acting policy's standard deviation
    @property
    def rollout_precision(self) -> Precision: ...  # of the acting network


# Optional fields of a Config, with the values that hold if it lacks them.
OPTIONAL: dict[str, Any] = {
    # Of episodes after a reset: "staggered" asks for environments whose clocks do not all start together.
    "starts": "together",
    # Size of a group of environments that start from a hint if the whole group failed (`StartsFromHints`). Each sample
    # then has "hinted", bool: its episode started from a hint.
    "hints": 0,
    # Size of a group of adjacent environments whose episodes begin in one state and fill a rollout.
    "group": 0,
    # An older run or a data set that initially fills the replay.
    "replay_from": "",
    # Source of demonstrations, for an agent that needs some. Each sample then comes with one: "expert_obs", raw, and
    # "expert_action". None: the agent takes none; "": no source has been given.
    "demonstrations": None,
}


def option(config: Any, name: str) -> Any:
    """One of the `OPTIONAL` fields of a Config."""
    return getattr(config, name, OPTIONAL[name])


@runtime_checkable
class AlternatingConfig(AgentConfig, Protocol):
    """Config of an agent that alternates on-policy updates with updates on replayed data, instead of mixing both.

    An iteration's epochs then see only the fresh rollout. They are followed by updates on replayed segments, their
    number drawn from Poisson(`replayed_updates`); `replayed_updates` is one of the `hyper`. Each segment is one
    environment's part of one of the 1 + `replay` newest rollouts.
    """

    @property
    def replayed_updates(self) -> float: ...  # mean number of updates on replayed segments
    @property
    def segments(self) -> int: ...  # in one such update
    @property
    def warm_up(self) -> int: ...  # iterations before the first such update


class Agent(Protocol):
    """A few pure functions of tensors, written for one agent: `Population` adds the population axis from outside.

    None of them draws random numbers, reads a clock or branches on data. `state` holds at least
    "hyper" (name -> 0-dim tensor), "progress" (0-dim, the fraction of training that is done; the loop sets it) and
    "params", the networks (of any structure; `rollout_precision` is applied to all of it).

    Several processes may share a run (`ess_rl.processes`). Each then calls the same functions on its equal share of
    environments and samples, with a Config that holds the sizes of this share. So an agent takes its gradient with
    `ess_rl.optim.gradient`, of a loss that is a mean over samples, and computes any other quantity of the whole batch
    with functions that account for the other processes: `effective_sample_size`, `normalizer.update`,
    `standardize_batch`, `processes.mean`.
    """

    @property
    def config(self) -> AgentConfig: ...

    def init(self, seed: Tensor, hyper: dict[str, Tensor]) -> State:
        """A new agent from a 0-dim int64 seed and the float fields of its Config as 0-dim tensors."""
        ...

    def act(self, state: State, obs: Tensor) -> Gaussian:
        """The policy at raw observations [..., obs_dim]. `state` may lack "optimizer": acting copies all else."""
        ...

    def prepare(self, state: State, rollout: Transitions) -> dict[str, Tensor]:
        """Once per iteration, before its updates: transitions [T, N] to flat samples [T * N, ...] with targets.

        They include "advantage" and "log_ratio" [T * N], the log density of the current policy minus that of the
        behavior, at the action: for the ESS of the rollout, and not handed to `update`. With replay, this is called
        separately for each rollout, fresh or old.
        """
        ...

    @property
    def begin_epoch(self) -> BeginEpoch | None:
        """Function called at the start of each epoch with all samples that it will draw, for whole-batch quantities.

        (state, batch) -> state; None if the agent needs no such function.
        """
        ...

    @property
    def refresh(self) -> Prepare | None:
        """Function called at the start of each epoch except an iteration's first, to recompute columns of `prepare`.

        (state, rollout) -> some of the columns that `prepare` returns; None if the agent recomputes none. For columns
        that need whole segments and the policy at that time; with replay, this too is called separately for each
        rollout.
        """
        ...

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        """One gradient step on a minibatch of these samples.

        With replay, each sample has an "age", 0 in the fresh rollout. If updates on fresh and replayed data alternate
        (`AlternatingConfig`), only samples of replayed segments have one. For further columns see `OPTIONAL`.
        """
        ...

    def observe(self, state: State, rollout: Transitions) -> State:
        """Once per iteration, after its updates: add the rollout to the running statistics.

        After, because the statistics are part of the policy: changed before the updates, they would make it a different
        policy from the one that acted, and the ratio of fresh data would not be 1.
        """
        ...


class OfflineConfig(Protocol):
    """The fields of an agent's Config that the offline loop reads; otherwise like `AgentConfig`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def minibatch(self) -> int: ...  # samples of one update


class OfflineAgent(Protocol):
    """An agent that learns from a fixed data set: like `Agent`, with three functions, and a fourth if it needs it.

    `state` holds at least "hyper", "params" and "progress" as in `Agent`, and "data_stats", which the loop sets: "obs",
    the statistics of all observations (`ess_rl.normalizer`), and "return_range" (`ess_rl.returns`).
    """

    act_dim: int

    @property
    def config(self) -> OfflineConfig: ...

    def init(self, seed: Tensor, hyper: dict[str, Tensor]) -> State:
        """A new agent from a 0-dim int64 seed and the float fields of its Config as 0-dim tensors."""
        ...

    def act(self, state: State, obs: Tensor) -> Gaussian:
        """The policy at raw observations [..., obs_dim]; evaluation uses its mean."""
        ...

    @property
    def prepare(self) -> Prepare | None:
        """Function called at the start of each stretch of updates (`ess_rl.offline.train`) with the whole data set.

        (state, transitions [N, ...] in the order of their episodes) -> columns [N, ...] under names of their own;
        None if the agent needs no such function.
        """
        ...

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        """One gradient step on a minibatch [n, ...] of transitions.

        `batch` has their fields as in `Transitions`, raw; the columns of `prepare`; and "noise" [n, 2, act_dim],
        standard normal.
        """
        ...


class Actors(Protocol):
    """P members that can be evaluated: a population, or anything that stands in for one."""

    @property
    def size(self) -> int: ...

    @property
    def seeds(self) -> Sequence[int]: ...

    @property
    def seed(self) -> Tensor: ...  # the same, [P]

    @property
    def device(self) -> torch.device: ...

    def policy(self, obs: Tensor) -> Gaussian:
        """The policy at obs [P, N, obs_dim]."""
        ...
