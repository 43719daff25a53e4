"""The two agreements that hold the parts together: what an environment is, and what an agent is.

Letters: P members of a population, N environments of one member, B environments in all (B = P * N).
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
State = dict[str, Tree]  # all that an agent knows: parameters, optimizer, statistics, hyperparameters
BeginEpoch = Callable[[State, dict[str, Tensor]], State]
Prepare = Callable[[State, Transitions], dict[str, Tensor]]
Metrics = dict[str, Tensor]  # 0-dim tensors, left on their device until somebody logs


class Step(NamedTuple):
    """What B environments answer to one action each."""

    obs: Tensor  # [B, obs_dim] to act on: already that of the new episode where one ended
    next_obs: Tensor  # [B, obs_dim] to learn from: what the dynamics reached, never an obs after a reset
    reward: Tensor  # [B] per control step, raw
    terminated: Tensor  # [B] bool, the task ended
    truncated: Tensor  # [B] bool, the clock ended


@runtime_checkable
class VectorEnv(Protocol):
    """B independent copies of one task, stepped together.

    An episode that ends is reset inside the same `step` (Gymnasium calls this SAME_STEP), so that every
    transition is a true one. There is no info dictionary.
    """

    env_id: str
    backend: str  # "torch", "gymnasium", "envpool" or "warp"
    num_envs: int  # B
    obs_dim: int
    act_dim: int
    device: torch.device  # where obs come out and actions go in

    @property
    def action_range(self) -> Sequence[tuple[float, float]]: ...  # of each action, in the simulator's units: of [-1, 1]
    @property
    def max_episode_steps(self) -> int | None: ...  # control steps until the clock ends an episode, where known

    def reset(self, seeds: Tensor) -> Tensor:
        """Begin anew. -> obs [B, obs_dim]

        `seeds` [B] int64: environment i is a function of seeds[i] and its actions alone.
        """
        ...

    def step(self, action: Tensor) -> Step:
        """One control step. `action` [B, act_dim] in units of [-1, 1]; the environment clips and scales it."""
        ...

    def close(self) -> None: ...


class Turn(Protocol):
    """Some environments that simulate in the background, between being sent actions and being asked for the outcome."""

    def send(self, action: Tensor) -> None: ...

    def receive(self) -> Step:
        """What came of the actions sent last."""
        ...


@runtime_checkable
class InTurns(Protocol):
    """A `VectorEnv` in K parts: part k holds the environments k, k + K, k + 2 K, ...

    So one part can simulate while the policy looks at another.
    """

    @property
    def turns(self) -> Sequence[Turn]: ...


@runtime_checkable
class StartsFromHints(Protocol):
    """A `VectorEnv` that begins some of its episodes where the task is easier (`ess_rl.hints`)."""

    @property
    def hinted(self) -> Tensor: ...  # [B] bool: the running episode is one of these


class Collector(Protocol):
    """Who collects rollouts beside the loop: one at a time, while the loop learns from the one before."""

    def begin(self, iteration: int, acting: State, starts: Tensor | None) -> None:
        """Begin the rollout of an iteration, with the policy `acting`, which is copied.

        `starts` [B]: seeds of environments that begin anew; None: they go on from the rollout before.
        """
        ...

    def rollout(self) -> Transitions:
        """Wait for what was begun. -> transitions [T, P, N] on the population's device"""
        ...


class AgentConfig(Protocol):
    """What the loop reads of an agent's Config (a frozen dataclass with a remark for each number).

    Its float fields are what members of a population can differ in; they reach the agent as `hyper`.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # what makes it a dataclass to a type checker

    @property
    def num_envs(self) -> int: ...  # N, environments of one member
    @property
    def rollout(self) -> int: ...  # T, steps of each environment in one iteration
    @property
    def epochs(self) -> int: ...  # passes over the data of an iteration
    @property
    def minibatch(self) -> int: ...  # samples of one update
    @property
    def replay(self) -> int: ...  # older rollouts that an iteration learns from, beside the fresh one
    @property
    def draw(self) -> Draw: ...  # how often older rollouts are drawn from
    @property
    def lag(self) -> int: ...  # iterations by which the policy that acts is older than the one that learns
    @property
    def behavior_temperature(self) -> float: ...  # what the standard deviation is multiplied with to act
    @property
    def rollout_precision(self) -> Precision: ...  # of the network that acts


# Fields that a Config may have beside them, and what holds where it has not.
OPTIONAL: dict[str, Any] = {
    # Of episodes after a reset: "staggered" asks for environments whose clocks do not all begin together.
    "starts": "together",
    # Size of a group of environments that start from a hint where all of it failed (`StartsFromHints`). Each sample
    # then has "hinted", bool: its episode did.
    "hints": 0,
    # Size of a group of environments, which stand together, whose episodes begin in one state and fill a rollout.
    "group": 0,
    # An older run or a data set that fills the replay at first.
    "replay_from": "",
    # Where demonstrations come from, for an agent that needs some. Each sample then has one beside it: "expert_obs",
    # raw, and "expert_action". None: it takes none; "": nobody has said from where.
    "demonstrations": None,
}


def option(config: Any, name: str) -> Any:
    """One of the `OPTIONAL` fields of a Config."""
    return getattr(config, name, OPTIONAL[name])


@runtime_checkable
class AlternatingConfig(AgentConfig, Protocol):
    """Of an agent whose on-policy updates take turns with others on replayed data, instead of mixing both.

    An iteration's epochs then see the fresh rollout alone. After them come as many updates on replayed segments as
    Poisson(`replayed_updates`) draws, which is one of the `hyper`. Each segment is one environment's part of one of the
    1 + `replay` newest rollouts.
    """

    @property
    def replayed_updates(self) -> float: ...  # mean of their number
    @property
    def segments(self) -> int: ...  # in one such update
    @property
    def warm_up(self) -> int: ...  # iterations before the first of them


class Agent(Protocol):
    """A few pure functions of tensors, written for one agent: `Population` adds the population axis from outside.

    None of them draws a random number, reads a clock or branches on data. `state` holds at least
    "hyper" (name -> 0-dim tensor) and "progress" (0-dim, the fraction of training that is done; the loop sets it).

    Several processes may share a run (`ess_rl.processes`). Each then calls the same functions on its equal share of
    environments and samples, with a Config that says how many these are. So an agent takes its gradient with
    `ess_rl.optim.gradient`, of a loss that is a mean over samples, and any other number of the whole batch with what
    knows of the others: `effective_sample_size`, `normalizer.update`, `standardize_batch`, `processes.mean`.
    """

    @property
    def config(self) -> AgentConfig: ...

    def init(self, seed: Tensor, hyper: dict[str, Tensor]) -> State:
        """A new agent from a 0-dim int64 seed and the float fields of its Config as 0-dim tensors."""
        ...

    def act(self, state: State, obs: Tensor) -> Gaussian:
        """The policy at raw observations [..., obs_dim]."""
        ...

    def prepare(self, state: State, rollout: Transitions) -> dict[str, Tensor]:
        """Once an iteration, before its updates: transitions [T, N] to flat samples [T * N, ...] with targets.

        Among them "advantage" and "log_ratio" [T * N]: log density of the present policy less that of the behavior, at
        the action. With replay this is called for each rollout, fresh or old, alone.
        """
        ...

    @property
    def begin_epoch(self) -> BeginEpoch | None:
        """At the beginning of each epoch, with all samples that it will draw: what is asked of a whole batch, if it is.

        (state, batch) -> state
        """
        ...

    @property
    def refresh(self) -> Prepare | None:
        """At the beginning of each epoch but an iteration's first: what of `prepare`'s samples is made anew, if any is.

        (state, rollout) -> some of what `prepare` gives. For what needs whole segments and the policy as it is by then;
        with replay this too is called for each rollout alone.
        """
        ...

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        """One gradient step on a minibatch of those samples.

        With replay each has its "age", 0 in the fresh rollout. Where fresh and replayed data take turns
        (`AlternatingConfig`), those of replayed segments alone have one. What else a sample may have: `OPTIONAL`.
        """
        ...

    def observe(self, state: State, rollout: Transitions) -> State:
        """Once an iteration, after its updates: take the rollout into the running statistics.

        After, because they are part of the policy: moved before the updates, they would make it another policy than
        the one that acted, and the ratio of fresh data would not be 1.
        """
        ...


class OfflineConfig(Protocol):
    """What the offline loop reads of an agent's Config; else as `AgentConfig`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def minibatch(self) -> int: ...  # samples of one update


class OfflineAgent(Protocol):
    """An agent that learns from a fixed data set: as `Agent`, with three functions, and a fourth where it needs it.

    `state` holds at least "hyper", "params" and "progress" as there, and "data_stats", which the loop sets: "obs", the
    statistics of all observations (`ess_rl.normalizer`), and "return_range" (`ess_rl.returns`).
    """

    act_dim: int

    @property
    def config(self) -> OfflineConfig: ...

    def init(self, seed: Tensor, hyper: dict[str, Tensor]) -> State:
        """A new agent from a 0-dim int64 seed and the float fields of its Config as 0-dim tensors."""
        ...

    def act(self, state: State, obs: Tensor) -> Gaussian:
        """The policy at raw observations [..., obs_dim]; evaluation takes its mean."""
        ...

    @property
    def prepare(self) -> Prepare | None:
        """At the beginning of each stretch of updates (`ess_rl.offline.train`): what is asked of all data, if it is.

        (state, transitions [N, ...] in the order of their episodes) -> columns [N, ...] of names of their own
        """
        ...

    def update(self, state: State, batch: dict[str, Tensor]) -> tuple[State, Metrics]:
        """One gradient step on a minibatch [n, ...] of transitions.

        Their fields as in `Transitions`, raw; the columns of `prepare`; and "noise" [n, 2, act_dim], standard normal.
        """
        ...


class Actors(Protocol):
    """What an evaluation asks of P members: populations are such, and so is whatever stands in for one."""

    @property
    def size(self) -> int: ...

    @property
    def seeds(self) -> Sequence[int]: ...

    @property
    def seed(self) -> Tensor: ...  # the same, [P]

    @property
    def device(self) -> torch.device: ...

    def policy(self, obs: Tensor) -> Gaussian:
        """At obs [P, N, obs_dim]."""
        ...
