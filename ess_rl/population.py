"""P agents as one tensor program: vmap from outside, and a compiler around it.

The agent's functions know nothing of P. Here each gets a leading population axis on its state and its data, so that
ten seeds, or six clip ranges times ten seeds, cost little more than one agent does on a machine that is idle for most
of a small network's step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from ess_rl import checks, diagnostics
from ess_rl.contract import Agent, Metrics, OfflineAgent, State
from ess_rl.errors import UsageError
from ess_rl.gaussian import Gaussian
from ess_rl.networks import in_precision
from ess_rl.program import Program
from ess_rl.transitions import Transitions


def members(seeds: Sequence[int], sweep: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """The settings of every member: the product of all swept values, times the seeds (which vary fastest)."""
    values = [[(name, v) for v in choices] for name, choices in sweep.items()]
    return [{**dict(choice), "seed": seed} for choice in itertools.product(*values) for seed in seeds]


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch's other CPU threads asleep, for work too small to share.

    A thread that has helped spins for a while, waiting for more, on the very CPU that the simulators need next.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# Samples times parameters of an update, over all members, up to which a second thread saves nothing. On two cores, with
# 11,000 parameters and minibatches of 64: one member takes 0.31 ms with one thread or two, two members 0.46 and 0.42.
_SMALL_UPDATE = 1_000_000


def is_small(work: int) -> bool:
    """Return whether an update of `work` (samples times parameters) is faster on one thread."""
    return work <= _SMALL_UPDATE


def values_of(config: Any, hyper: Mapping[str, Sequence[float]], size: int) -> dict[str, list[float]]:
    """Values of the float fields of a Config for each of `size` members, from `hyper` where members differ."""
    checks.choices(config)
    if size < 1:
        raise UsageError("no seeds: give one for each member")
    numbers = {f.name: [getattr(config, f.name)] * size for f in fields(config) if f.type in ("float", float)}
    for name, column in hyper.items():
        if name not in numbers:
            raise UsageError(f"members cannot differ in {name!r}; they can in {', '.join(numbers)}")
        if len(column) != size:
            raise UsageError(f"{name!r} has {len(column)} values for {size} members: give one for each")
        numbers[name] = list(column)
    return numbers


def initial_state(agent: Agent | OfflineAgent, seed: Tensor, hyper: dict[str, Tensor]) -> State:
    """Initial states of members with seeds [P] and hyperparameters of [P] values, as one tree.

    Tensors that vmap broadcasts have stride 0, which `contiguous()` leaves as it is on an axis of size 1. Programs are
    compiled for the strides of their inputs, and would be compiled once more for the states that updates return.
    """
    return tree_map(lambda x: x.clone(memory_format=torch.contiguous_format), vmap(agent.init)(seed, hyper))


def acting(state: State) -> State:
    """The part of a state that acting reads: all but the optimizer. vmap looks at every tensor that it is given."""
    return {name: x for name, x in state.items() if name != "optimizer"}


def move(state: State, place: State) -> None:
    """Copy a state into the tensors of the older state that it was computed from.

    GPU recordings read and write fixed addresses, while each update makes a new state. Copying goes leaf by leaf: a
    leaf that is, or is a view of, another leaf of the old state (as a target network would be) is cloned first.
    """
    olds = {x.untyped_storage().data_ptr() for x in tree_leaves(place)}

    def apart(old: Tensor, x: Tensor) -> Tensor:
        return x.clone() if x is not old and x.untyped_storage().data_ptr() in olds else x

    new = tree_map(apart, place, state)
    tree_map(lambda old, x: old.copy_(x), place, new)


class Population:
    """P members of one agent, their state held as one tree with a leading axis P.

    Args:
        agent: the pure functions.
        seeds: [P] the seed of each member; equal seeds with different `hyper` are fine.
        hyper: for each float field of the agent's Config that differs between members, its P values.
        device: where state and updates live.
        compiled: compile the functions with Inductor (needs a C++ compiler on the CPU): the same results up to
            rounding, several times as fast.
    """

    def __init__(
        self,
        agent: Agent,
        seeds: Sequence[int],
        hyper: Mapping[str, Sequence[float]] | None = None,
        *,
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ):
        self.agent, self.seeds, self.compiled = agent, list(seeds), compiled
        self.device = torch.device(device)
        self.size = len(self.seeds)
        self.first_member = 0  # its index in the run, if this is only part of the run's population
        self.seed = torch.tensor(self.seeds, dtype=torch.int64, device=self.device)  # [P]
        config = agent.config
        self.numbers = numbers = values_of(config, hyper or {}, self.size)  # name -> P values, on the host
        self.hyper = {name: torch.tensor(v, dtype=torch.float32, device=self.device) for name, v in numbers.items()}
        # Whether the behavior is the very policy that learns.
        same_time = config.lag == 0 and config.sync_interval == 1
        same_width = set(numbers["behavior_temperature"]) == {1.0}
        self.on_policy = same_time and same_width and config.rollout_precision == "fp32"
        self.state: State = initial_state(agent, self.seed, self.hyper)
        # Older states to act with, oldest first: trees of the tensors that acting reads, at fixed addresses. One for
        # each iteration of the lag, and before them the one that acts between two syncs.
        self._syncs = int(config.sync_interval > 1)
        self.behind: list[State] = [tree_map(torch.clone, self.acting()) for _ in range(self._syncs + config.lag)]
        self._parameters = sum(x[0].numel() for x in tree_leaves(self.acting()))  # of one member, approximately
        # Set from outside for an agent that imitates: demonstrated "obs" and "action" [M, ...], for all members.
        self.demonstrations: dict[str, Tensor] = {}

        def act(state: State, obs: Tensor, noise: Tensor) -> tuple[Gaussian, Tensor]:
            def one(state: State, obs: Tensor, noise: Tensor) -> tuple[Gaussian, Tensor]:
                acting = {**state, "params": in_precision(state["params"], config.rollout_precision)}
                mean, log_std = (x.float() for x in agent.act(acting, obs))
                behavior = Gaussian(mean, log_std + torch.log(state["hyper"]["behavior_temperature"]))
                return behavior, behavior.sample(noise)

            return vmap(one)(state, obs, noise)

        def prepare(state: State, rollout: Transitions) -> dict[str, Tensor]:
            return vmap(agent.prepare, in_dims=(0, 1))(state, rollout)

        def refresh(state: State, rollout: Transitions) -> dict[str, Tensor]:
            assert agent.refresh is not None
            return vmap(agent.refresh, in_dims=(0, 1))(state, rollout)

        def begin_epoch(state: State, data: dict[str, Tensor], index: Tensor) -> State:
            def one(state: State, data: dict[str, Tensor], index: Tensor) -> State:
                assert agent.begin_epoch is not None
                return agent.begin_epoch(state, {name: x[index] for name, x in data.items()})

            return vmap(one)(state, data, index)

        def update(state: State, data: dict[str, Tensor], index: Tensor) -> tuple[State, Metrics]:
            def one(state: State, data: dict[str, Tensor], index: Tensor) -> tuple[State, Metrics]:
                return agent.update(state, {name: x[index] for name, x in data.items()})

            return vmap(one)(state, data, index)

        def replayed(state: State, segments: Transitions, chosen: Tensor, active: Tensor) -> tuple[State, Metrics]:
            def one(state: State, segments: Transitions, active: Tensor) -> tuple[State, Metrics]:
                data = agent.prepare(state, segments)
                del data["log_ratio"]
                data["age"] = torch.ones_like(data["advantage"])
                after, metrics = agent.update(state, data)
                return tree_map(lambda old, new: torch.where(active, new, old), state, after), metrics

            before = tree_map(lambda x: x[chosen], state)
            after, metrics = vmap(one, in_dims=(0, 1, 0))(before, segments, active)
            return tree_map(lambda old, new: old.index_copy(0, chosen, new), state, after), metrics

        def observe(state: State, rollout: Transitions) -> State:
            return vmap(agent.observe, in_dims=(0, 1))(state, rollout)

        def diagnose(state: State, rollout: Transitions, advantage: Tensor) -> Metrics:
            def one(state: State, rollout: Transitions, advantage: Tensor) -> Metrics:
                b = Gaussian(rollout.behavior_mean, rollout.behavior_log_std)
                return diagnostics.diagnose(agent.act(state, rollout.obs), b, rollout.action, advantage)

            return vmap(one, in_dims=(0, 1, 0))(state, rollout, advantage)

        def program(function: Callable[..., Any]) -> Program:
            return Program(function, compiled=compiled)

        self._act, self._prepare, self._refresh = program(act), program(prepare), program(refresh)
        self._begin_epoch, self._update, self._replayed = program(begin_epoch), program(update), program(replayed)
        self._observe, self._diagnose = program(observe), program(diagnose)

    def actor(self) -> Callable[[Tensor, Tensor], tuple[Gaussian, Tensor]]:
        """`act` with the policy as it is now, prepared for many calls."""
        inner = self._act.held(self.behind[0] if self.behind else self.acting())

        def act(obs: Tensor, noise: Tensor) -> tuple[Gaussian, Tensor]:
            with one_thread():
                return inner(obs, noise)

        return act

    def act(self, obs: Tensor, noise: Tensor) -> tuple[Gaussian, Tensor]:
        """Behavior policy and action at obs [P, N, obs_dim], with standard normal noise [P, N, act_dim].

        The behavior is the policy that was `lag` iterations old at the last sync (`sync_interval`), with its network
        evaluated in `rollout_precision` and its standard deviation multiplied by `behavior_temperature`.
        """
        return self.actor()(obs, noise)

    def sync(self, iteration: int) -> None:
        """Before an iteration is collected: if its number is a multiple of `sync_interval`, change the acting policy.

        It becomes the policy of `lag` iterations ago, and is `sync_interval - 1` iterations older before the next sync.
        """
        if self._syncs and iteration % self.agent.config.sync_interval == 0:
            tree_map(Tensor.copy_, self.behind[0], [*self.behind, self.acting()][1])

    def age(self) -> None:
        """After an iteration has been collected: append the current policy to the `lag` older ones, drop the oldest."""
        aging = self.behind[self._syncs :]
        for older, newer in zip(aging, [*aging, self.acting()][1:], strict=True):
            tree_map(Tensor.copy_, older, newer)

    def acting(self) -> State:
        """The part of the state that acting reads."""
        return acting(self.state)

    def policy(self, obs: Tensor) -> Gaussian:
        """The policy at obs [P, N, obs_dim], never compiled: for evaluation, which has its own N."""
        return vmap(self.agent.act)(self.acting(), obs)

    def prepare(self, rollout: Transitions) -> dict[str, Tensor]:
        """Transitions [T, P, N] to samples [P, T * N, ...]."""
        return self._prepare(self.state, rollout)

    def refresh(self, rollout: Transitions) -> dict[str, Tensor]:
        """The part of `prepare(rollout)` that the agent recomputes at the start of an epoch; empty if there is none."""
        return self._refresh(self.state, rollout) if self.agent.refresh is not None else {}

    def update(self, data: dict[str, Tensor], index: Tensor) -> Metrics:
        """One gradient step of every member, on its samples `index` [P, minibatch]. Metrics are [P]."""
        return {name: x[0] for name, x in self._steps(data, index[None]).items()}

    def epoch(self, data: dict[str, Tensor], indices: Tensor) -> Metrics:
        """One `update` for each of `indices` [K, P, minibatch], in order. Metrics are [K, P]."""
        if self.agent.begin_epoch is not None:
            self.state = self._begin_epoch(self.state, data, indices.transpose(0, 1).flatten(1))
        return self._steps(data, indices)

    def replayed(self, segments: Transitions, chosen: Tensor, active: Tensor) -> Metrics:
        """One `update` of the members `chosen` [K] int64, all different, on replayed segments [T, K, S] of their own.

        Members that are not `active` [K] keep their state, but report the metrics of the update as the others do.
        Targets are those of the current policy and value. Metrics are [K].
        """
        self.state, metrics = self._replayed(self.state, segments, chosen, active)
        return metrics

    def _steps(self, data: dict[str, Tensor], indices: Tensor) -> Metrics:
        with one_thread() if is_small(indices[0].numel() * self._parameters) else nullcontext():
            self.state, metrics = self._update.scan(self.state, (data,), (indices,))
        return metrics

    def diagnose(self, rollout: Transitions, advantage: Tensor) -> Metrics:
        """How far the policy has left the behavior of transitions [T, P, N]; advantage [P, T * N]. Metrics are [P]."""
        return self._diagnose(self.acting(), rollout, advantage)

    def observe(self, rollout: Transitions) -> None:
        """Update the running statistics with transitions [T, P, N]."""
        self.state = self._observe(self.state, rollout)

    def keep(self, place: State) -> None:
        """Copy the state into the tensors of an older state of this population, and use those from now on."""
        move(self.state, place)
        self.state = place
