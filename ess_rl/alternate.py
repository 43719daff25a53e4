"""Updates on replayed data that alternate with on-policy ones, as in P3O of 2019 and ACER.

An agent that asks for them has an `AlternatingConfig`. Their number in an iteration is drawn for each member from a
Poisson distribution. So members differ in how many they have to make, while a program is compiled for a fixed number of
members: half of them take each turn, those with most updates left. If all members took each turn, most would only wait
for the last one: for ten members with a mean of two updates it takes 4.7 turns of ten, or 5.2 turns of five.
"""

from __future__ import annotations

import torch

from ess_rl import processes, random
from ess_rl.contract import AlternatingConfig, Metrics
from ess_rl.errors import UsageError
from ess_rl.population import Population
from ess_rl.replay import Replay


def taking(members: int) -> int:
    """Number of members that take each turn: half of them, but at least two.

    A member computed alone would differ, in the last digits, from the same member computed as one of several.
    """
    return max(min(members, 2), -(-members // 2))


class ReplayedUpdates:
    """The replayed updates of successive iterations.

    Tensors that a recording of `update` reads keep their addresses: the iteration, the turns done, the replay's `head`
    and how much it holds.
    """

    def __init__(self, population: Population, replay: Replay, config: AlternatingConfig):
        """Raises UsageError if a mean number of updates is out of the range of `ess_rl.random.poisson`."""
        if not all(0.0 <= mean <= 20.0 for mean in population.numbers["replayed_updates"]):
            raise UsageError(f"replayed_updates {population.numbers['replayed_updates']}: must lie between 0 and 20")
        self._population, self._replay, self._config = population, replay, config
        device, numbers = population.device, population.numbers["replayed_updates"]
        self._iteration, self._head, self._held = torch.zeros(3, dtype=torch.int64, device=device).unbind(0)
        self._done = torch.zeros(population.size, dtype=torch.int64, device=device)  # turns of each member so far
        # On the device for `update`, and on the host to know how often to call it.
        self._mean, self._mean_on_host = population.hyper["replayed_updates"], torch.tensor(numbers)
        self._seeds_on_host = torch.tensor(population.seeds, dtype=torch.int64)
        self._sum: Metrics = {}

    def begin(self, iteration: int) -> int:
        """Begin an iteration whose rollout is already in the replay. -> how many times to call `update`

        Each member has at least one turn: a member that draws no update still reports on its first replayed batch. No
        calls while the replay warms up, or if no member would ever draw an update.
        """
        if iteration < self._config.warm_up or not self._mean_on_host.any():
            return 0
        self._iteration.fill_(iteration)
        self._done.zero_()
        for x in self._sum.values():
            x.zero_()
        self._head.fill_(self._replay.head)
        self._held.fill_(self._replay.size // self._config.rollout)
        seeds = random.fold_in(random.fold_in(self._seeds_on_host, random.REPLAYED), iteration)
        turns = random.poisson(seeds, self._mean_on_host).clamp(min=1)
        # Members with most turns left go first, so the number of calls is the largest number of turns of a member, or
        # the turns of all members at `taking` per call, whichever is more.
        return max(int(turns.max()), -(-int(turns.sum()) // taking(len(turns))))

    def update(self) -> Metrics:
        """One turn of the members with most turns left. -> metrics of this iteration's replayed updates so far, [P]

        Averaged over the updates that a member made; if it has none to make, of the batch it would have begun with.
        """
        seeds = random.fold_in(random.fold_in(self._population.seed, random.REPLAYED), self._iteration)  # [P]
        count = random.poisson(seeds, self._mean)
        left = count.clamp(min=1) - self._done
        chosen = left.topk(taking(len(left))).indices  # [K]
        has_turn = left[chosen] > 0
        seeds = random.fold_in(random.fold_in(seeds[chosen], self._done[chosen]), processes.rank())
        replay, config = self._replay, self._config
        age = torch.arange(1 + config.replay, device=self._head.device)
        weight = torch.ones_like(age).double() if config.draw == "uniform" else 1.0 / (1.0 + age.double())
        weight = torch.where(age < self._held, weight, 0.0)
        ages = random.categorical(seeds, weight.expand(len(seeds), -1).contiguous(), config.segments)
        env = (torch.arange(config.segments, device=ages.device) % config.num_envs).expand_as(ages)
        metrics = self._population.replayed(
            replay.segments(ages, chosen, env, config.rollout, self._head), chosen, has_turn & (count[chosen] > 0)
        )
        self._done.index_add_(0, chosen, has_turn.long())
        for name, x in metrics.items():
            if name not in self._sum:
                self._sum[name] = torch.zeros(len(left), dtype=x.dtype, device=x.device)
            self._sum[name].index_add_(0, chosen, torch.where(has_turn, x, 0.0))
        return {f"replayed_{name}": x / self._done.clamp(min=1) for name, x in self._sum.items()}
