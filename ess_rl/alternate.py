"""Updates on replayed data that take turns with on-policy ones, as P3O of 2019 and ACER have them.

An agent that asks for them has an `AlternatingConfig`. How many there are in an iteration is drawn for each member from
a Poisson distribution. So members have unlike numbers of them to make, and a program is made for one number of members:
half of them take each turn, those with most left to make. Were it all of them, most would but wait for the last one: of
ten members with two updates in the mean it takes 4.7 turns of ten, or 5.2 turns of five.
"""

from __future__ import annotations

import torch

from ess_rl import processes, random
from ess_rl.contract import AlternatingConfig, Metrics
from ess_rl.errors import UsageError
from ess_rl.population import Population
from ess_rl.replay import Replay


def taking(members: int) -> int:
    """How many members take each turn: half of them, and two at the least.

    One alone would be computed otherwise, in the last digits, than as one of several.
    """
    return max(min(members, 2), -(-members // 2))


class ReplayedUpdates:
    """The replayed updates of one iteration after the other.

    Tensors that a recording of `update` reads keep their addresses: `iteration`, what is `done`, the replay's `head`
    and how much it holds.
    """

    def __init__(self, population: Population, replay: Replay, config: AlternatingConfig, purpose: int):
        """`purpose` of the random numbers: see `ess_rl.random`.

        Raises:
            UsageError: a mean number of updates that `ess_rl.random.poisson` cannot draw for.
        """
        if not all(0.0 <= mean <= 20.0 for mean in population.numbers["replayed_updates"]):
            raise UsageError(f"replayed_updates {population.numbers['replayed_updates']}: must lie between 0 and 20")
        self._population, self._replay, self._config, self._purpose = population, replay, config, purpose
        device, numbers = population.device, population.numbers["replayed_updates"]
        self._iteration, self._head, self._held = torch.zeros(3, dtype=torch.int64, device=device).unbind(0)
        self._done = torch.zeros(population.size, dtype=torch.int64, device=device)  # turns of each member so far
        # On the device for `update`, and on the host to know how often it is to be called.
        self._mean, self._mean_on_host = population.hyper["replayed_updates"], torch.tensor(numbers)
        self._seeds_on_host = torch.tensor(population.seeds, dtype=torch.int64)
        self._sum: Metrics = {}

    def begin(self, iteration: int) -> int:
        """An iteration whose rollout the replay has taken. -> how many times `update` is to be called.

        Each member has a turn at least: one that draws no update still says what its first replayed batch is like. None
        while the replay warms up, and where no member would ever draw any.
        """
        if iteration < self._config.warm_up or not self._mean_on_host.any():
            return 0
        self._iteration.fill_(iteration)
        self._done.zero_()
        for x in self._sum.values():
            x.zero_()
        self._head.fill_(self._replay.head)
        self._held.fill_(self._replay.size // self._config.rollout)
        seeds = random.fold_in(random.fold_in(self._seeds_on_host, self._purpose), iteration)
        turns = random.poisson(seeds, self._mean_on_host).clamp(min=1)
        # Those with most left go first: so it takes as many calls as one member has turns, or as all have at `taking`
        # a call, whichever is more.
        return max(int(turns.max()), -(-int(turns.sum()) // taking(len(turns))))

    def update(self) -> Metrics:
        """One turn of the members with most left to make. -> what is said of this iteration's so far, [P]

        The mean over the updates a member made; where it has none to make, of the batch it would have begun with.
        """
        seeds = random.fold_in(random.fold_in(self._population.seed, self._purpose), self._iteration)  # [P]
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
