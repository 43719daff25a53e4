"""Learning from a data set collected elsewhere: no environment, one set of transitions for all members.

Every minibatch and every noise sample is a function of (member's seed, number of the update); see `ess_rl.random`. What
an agent computes from the whole data set (`prepare`) it computes at the beginning of a stretch of updates, and a run
can be saved where a stretch ends. So a state and the number of its next update are all that a run needs to resume bit
for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from ess_rl import finite, normalizer, random
from ess_rl.contract import Metrics, OfflineAgent, State, Tree
from ess_rl.gaussian import Gaussian
from ess_rl.graphs import Graphs
from ess_rl.population import acting, initial_state, is_small, move, one_thread, values_of
from ess_rl.program import Program
from ess_rl.returns import return_range
from ess_rl.transitions import Transitions

_DRAWN_AT_ONCE = 32  # updates whose random numbers are drawn together: one by one they would cost as much as an update
# Transitions of a data set, times P, whose hidden activations exist at once: few on a CPU, to fit in a cache.
_AT_ONCE, _AT_ONCE_ON_A_GPU = 2_048, 65_536


@dataclass(frozen=True)
class OfflineProgress:
    """Results of one stretch of updates. Tensors are [P], on the CPU."""

    block: int  # stretches done, this one included
    updates: int  # of each member, since the start of the run
    metrics: dict[str, Tensor]  # of the agent's updates, averaged over the stretch
    seconds: float


class OfflinePopulation:
    """P members of one offline agent, their state held as one tree with a leading axis P; see `Population`."""

    def __init__(
        self,
        agent: OfflineAgent,
        seeds: Sequence[int],
        hyper: Mapping[str, Sequence[float]] | None = None,
        *,
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ):
        self.agent, self.seeds, self.compiled = agent, list(seeds), compiled
        self.device, self.size = torch.device(device), len(seeds)
        self.seed = torch.tensor(self.seeds, dtype=torch.int64, device=self.device)  # [P]
        numbers = values_of(agent.config, hyper or {}, self.size)
        self.hyper = {name: torch.tensor(v, dtype=torch.float32, device=self.device) for name, v in numbers.items()}
        self.state: State = initial_state(agent, self.seed, self.hyper)
        self._parameters = sum(x[0].numel() for x in tree_leaves(self.state["params"]))

        def update(
            state: State,
            data: dict[str, Tensor],
            prepared: dict[str, Tensor],
            progress: Tensor,
            index: Tensor,
            noise: Tensor,
        ) -> tuple[State, Metrics]:
            def one(state: State, prepared: dict[str, Tensor], index: Tensor, noise: Tensor) -> tuple[State, Metrics]:
                batch = {name: x[index] for name, x in (data | prepared).items()}
                return agent.update(state, {**batch, "noise": noise})

            return vmap(one)({**state, "progress": progress}, prepared, index, noise)

        self._update = Program(update, compiled=compiled)
        self._held: list[Tensor] = []  # tensors that recordings read and write
        self._given: Any = None  # what else recordings depend on

    def describe(self, data: Transitions) -> None:
        """Put the statistics of a data set [N, ...] into every member's state."""
        stats = data_stats(data, self.device)
        repeated = tree_map(lambda x: x.expand(self.size, *x.shape).clone(memory_format=torch.contiguous_format), stats)
        self.state = {**self.state, "data_stats": repeated}

    def policy(self, obs: Tensor) -> Gaussian:
        """The policy at obs [P, N, obs_dim], never compiled: for evaluation."""
        return vmap(self.agent.act)(acting(self.state), obs)

    def prepare(self, data: Transitions) -> dict[str, Tensor]:
        """Columns [P, N, ...] that each member's agent computes from a whole data set [N, ...]; most compute none."""
        if self.agent.prepare is None:
            return {}
        return vmap(self.agent.prepare, in_dims=(0, None))(self.state, data)

    def updates(
        self, data: dict[str, Tensor], first: int, count: int, total: int, prepared: dict[str, Tensor] | None = None
    ) -> Metrics:
        """Run updates `first` to `first` + `count` - 1 of `total`, counted from 0. -> the mean of their metrics, [P]

        data: columns [N, ...] that all members share; prepared: [P, N, ...], each member's own. As long as calls are
        given the same `data`, each overwrites the state that the previous one left: clone it to keep it. On a GPU,
        stretches of updates are recorded, and replayed while `data`, `total` and the state's tensors stay the same.
        """
        config, length = self.agent.config, data["reward"].shape[0]
        prepared = self._settle(data, prepared or {}, total)
        number = self._number

        def stretch(size: int) -> Metrics:
            numbers = number + torch.arange(size, device=self.device)
            index = minibatch_index(self.seed, numbers, length, config.minibatch)
            noise = update_noise(self.seed, numbers, config.minibatch, self.agent.act_dim)
            progress = (numbers.double() / total).float()[:, None].repeat(1, self.size)
            place = self.state
            state, metrics = self._update.scan(place, (data, prepared), (progress, index, noise))
            move(state, place)
            return {name: x.sum(0) for name, x in metrics.items()}

        sums: Metrics = {}
        with one_thread() if is_small(self.size * config.minibatch * self._parameters) else nullcontext():
            for begin in range(first, first + count, _DRAWN_AT_ONCE):
                size = min(_DRAWN_AT_ONCE, first + count - begin)
                number.fill_(begin)
                found = self._graphs(f"{size} updates", partial(stretch, size))
                sums = {name: sums.get(name, 0.0) + x for name, x in found.items()}
        return {name: x / count for name, x in sums.items()}

    def _settle(self, data: dict[str, Tensor], prepared: dict[str, Tensor], total: int) -> dict[str, Tensor]:
        """Keep what updates read and write in place while they go on with the same data; else start new recordings.

        They are the same while `data`, the state's tensors, `total` and the shapes in `prepared` are. With new
        recordings the state is cloned: whoever holds the old one has it unchanged. -> `prepared`, in its fixed place
        """
        held = [*data.values(), *tree_leaves(self.state)]
        given = (total, {name: x.shape for name, x in prepared.items()})
        stays = len(held) == len(self._held) and all(x is y for x, y in zip(held, self._held, strict=True))
        if not stays or given != self._given:
            self.state = tree_map(torch.clone, self.state)
            self._held, self._given = [*data.values(), *tree_leaves(self.state)], given
            self._prepared = {name: torch.empty_like(x) for name, x in prepared.items()}
            self._number = torch.zeros((), dtype=torch.int64, device=self.device)  # of a stretch's first update
            self._graphs = Graphs(self.device)
        for name, x in prepared.items():
            self._prepared[name].copy_(x)
        return self._prepared


def minibatch_index(seed: Tensor, numbers: Tensor, samples: int, minibatch: int) -> Tensor:
    """Samples that the updates `numbers` [K] see, uniform with replacement: [K, P, minibatch] of 0 .. samples - 1."""
    seeds = random.fold_in(random.fold_in(seed, random.MINIBATCH), numbers[:, None])
    return (random.uniform(seeds, (minibatch,), torch.float64) * samples).long()


def update_noise(seed: Tensor, numbers: Tensor, minibatch: int, act_dim: int) -> Tensor:
    """Standard normal noise for the actions that the updates `numbers` [K] draw: [K, P, minibatch, 2, act_dim]."""
    return random.normal(random.fold_in(random.fold_in(seed, random.NOISE), numbers[:, None]), (minibatch, 2, act_dim))


def data_stats(data: Transitions, device: torch.device) -> Tree:
    """Statistics of a whole data set that agents use: those of its observations, and the range of its returns."""
    return {
        "obs": normalizer.of_data(data.obs.to(device)),
        "return_range": return_range(data.reward, data.last).to(device, torch.float32),
    }


def no_stats(obs_dim: int, device: torch.device) -> Tree:
    """Statistics before any data, for `init`."""
    return {"obs": normalizer.init((obs_dim,), device), "return_range": torch.ones((), device=device)}


def reward_scale(stats: Tree, target: Tensor) -> Tensor:
    """Factor by which to multiply rewards so that the returns of the data span `target`; 0-dim.

    1 if `target` is 0, or if all returns of the data are equal: no factor makes those span anything.
    """
    span = stats["return_range"]
    return torch.where((target > 0.0) & (span > 0.0), target / span, 1.0)


def in_parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply `function` to a column [N, ...], some of its rows at a time."""
    rows = _AT_ONCE if x.device.type == "cpu" else _AT_ONCE_ON_A_GPU
    return torch.cat([function(part) for part in x.split(rows)])


def values_along(function: Callable[[Tensor], Tensor], data: Transitions) -> tuple[Tensor, Tensor]:
    """Apply `function` ([N, obs_dim] -> [N]) to the obs and to the next_obs of a whole data set. -> two tensors [N]

    Rows are in the order of their episodes. Within an episode, a step's next_obs is the next step's obs, so `function`
    is applied to next_obs only where an episode ends.
    """
    last = data.last.clone()
    last[-1] = True  # nothing follows the last row, whether its episode went on or not
    now, ends = in_parts(function, data.obs), last.nonzero().squeeze(-1)
    return now, now.roll(-1).index_copy(0, ends, in_parts(function, data.next_obs[ends]))


def samples(data: Transitions, device: torch.device | str) -> dict[str, Tensor]:
    """The columns of transitions [N, ...] that updates read, on the learners' device."""
    names = ("obs", "action", "reward", "terminated", "next_obs", "behavior_mean", "behavior_log_std")
    return {name: getattr(data, name).to(device) for name in names}


def train(
    population: OfflinePopulation, data: Transitions, *, updates: int, blocks: int, start: int = 0
) -> Iterator[OfflineProgress]:
    """Run `updates` gradient steps of every member, divided into `blocks` stretches, from stretch `start` on.

    The caller evaluates and saves between stretches. Each stretch begins with the agent's `prepare`, if it has one, and
    overwrites the state of the previous one: clone `population.state` to keep it.

    Raises:
        NonFiniteError: a metric is not a finite number.
    """
    if start == 0:
        population.describe(data)
    data = data.map(lambda x: x.to(population.device))
    columns = samples(data, population.device)
    for block in range(start, blocks):
        began, first = time.perf_counter(), updates * block // blocks
        done = updates * (block + 1) // blocks
        found = population.updates(columns, first, done - first, updates, population.prepare(data))
        metrics = {name: x.float().cpu() for name, x in found.items()}
        finite.check_metrics(population, f"in updates {first + 1:,} to {done:,}", metrics)
        yield OfflineProgress(block + 1, done, metrics, time.perf_counter() - began)


def warm_up(population: OfflinePopulation, data: Transitions) -> float:
    """Run two updates on the data and discard them, so that compilation happens now. -> seconds it took"""
    began, state = time.perf_counter(), dict(population.state)
    data = data.map(lambda x: x.to(population.device))
    population.updates(samples(data, population.device), 0, 2, 2, population.prepare(data))
    population.state = state
    return time.perf_counter() - began
