"""Updates on replayed data that take turns with on-policy ones, as P3O of 2019 and ACER have them.

An agent that asks for them has an `AlternatingConfig`. How many there are in an iteration is drawn for each member from
a Poisson distribution; the members that are through wait for the others.
"""

from __future__ import annotations

import torch

from ess_rl import processes, random
from ess_rl.contract import AlternatingConfig, Metrics
from ess_rl.population import Population
from ess_rl.replay import Replay


class ReplayedUpdates:
    """The replayed updates of one iteration after the other.

    Tensors that a recording of `update` reads keep their addresses: `iteration`, `turn`, the replay's `head` and how
    much it holds.
    """

    def __init__(self, population: Population, replay: Replay, config: AlternatingConfig, purpose: int):
        """`purpose` of the random numbers: see `ess_rl.random`."""
        self._population, self._replay, self._config, self._purpose = population, replay, config, purpose
        device, numbers = population.device, population.numbers["replayed_updates"]
        self._iteration, self._turn, self._head, self._held = torch.zeros(4, dtype=torch.int64, device=device).unbind(0)
        # On the device for `update`, and on the host to know how often it is to be called.
        self._mean, self._mean_on_host = population.hyper["replayed_updates"], torch.tensor(numbers)
        self._seeds_on_host = torch.tensor(population.seeds, dtype=torch.int64)
        self._sum: Metrics = {}

    def begin(self, iteration: int) -> int:
        """An iteration whose rollout the replay has taken. -> how many turns it has, the members that wait included.

        At least one: a member that draws none still says what its first replayed batch is like. None while the replay
        warms up, and where no member would ever draw any.
        """
        if iteration < self._config.warm_up or not self._mean_on_host.any():
            return 0
        self._iteration.fill_(iteration)
        self._turn.fill_(-1)
        self._head.fill_(self._replay.head)
        self._held.fill_(self._replay.size // self._config.rollout)
        seeds = random.fold_in(random.fold_in(self._seeds_on_host, self._purpose), iteration)
        return max(1, int(random.poisson(seeds, self._mean_on_host).max()))

    def update(self) -> Metrics:
        """One update of each member that has not made all its own. -> what is said of this iteration's so far, [P]

        The mean over the updates it made; where it has none to make, of the batch it would have begun with.
        """
        self._turn += 1
        seeds = random.fold_in(random.fold_in(self._population.seed, self._purpose), self._iteration)
        count = random.poisson(seeds, self._mean)
        seeds = random.fold_in(random.fold_in(seeds, self._turn), processes.number())
        replay, config = self._replay, self._config
        age = torch.arange(1 + config.replay, device=self._head.device)
        weight = torch.ones_like(age).double() if config.draw == "uniform" else 1.0 / (1.0 + age.double())
        weight = torch.where(age < self._held, weight, 0.0)
        ages = random.categorical(seeds, weight.expand(len(seeds), -1).contiguous(), config.segments)
        env = (torch.arange(config.segments, device=ages.device) % config.num_envs).expand_as(ages)
        metrics = self._population.replayed(
            replay.segments(ages, env, config.rollout, self._head), active=self._turn < count
        )
        first = self._turn == 0
        for name, x in metrics.items():
            if name not in self._sum:
                self._sum[name] = torch.zeros_like(x)
            counted = torch.where((self._turn < count) | first, x, 0.0)
            self._sum[name].copy_(torch.where(first, counted, self._sum[name] + counted))
        made = torch.minimum(count, self._turn + 1).clamp(min=1)
        return {f"replayed_{name}": x / made for name, x in self._sum.items()}
