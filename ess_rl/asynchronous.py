"""Collecting in a separate process, which simulates the next rollout while this process learns from the last.

The behavior is the policy of K = `lag` iterations ago, K >= 1, or an older one that has acted since the last sync. So
all that rollout i + 1 needs is available before the updates of iteration i begin, and both can run at the same time.
There are no races: the result is that of the same settings without a second process, bit for bit if torch has as many
threads, however fast either process is.

TBA (arXiv 2503.18929) sends its searchers new weights every `sync_interval` steps of the trainer and learns from
whatever has arrived by then. Here the interval counts iterations, and the age of every sample is known: from K to
K + sync_interval - 1 iterations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ess_rl.child import Child, Parent, close
from ess_rl.collect import collect, warm_up_acting
from ess_rl.contract import State, VectorEnv
from ess_rl.population import Population
from ess_rl.transitions import Transitions


class ProcessCollector:
    """A `Collector` in another process.

    Args:
        make: called in that process, hence picklable. -> (a copy of the population to act with, its `lag` 0; its
            environments)
        population: the one whose states will act.
        env: environments of the same kind as those; nothing is simulated in them.
        rollout: steps of each environment in a rollout.
    """

    def __init__(
        self,
        make: Callable[[], tuple[Population, VectorEnv]],
        population: Population,
        env: VectorEnv,
        rollout: int,
    ):
        shape = (rollout, population.size, env.num_envs // population.size)
        place = Transitions.empty(shape, env.obs_dim, env.act_dim, torch.device("cpu"))
        self._device = population.device
        self._rollout = place.map(Tensor.share_memory_)
        self._acting = tree_map(lambda x: x.cpu().clone().share_memory_(), population.acting())
        # One thread: the others are for the simulators and the learner.
        self.child = Child("the process that collects", _serve, make, self._acting, self._rollout)

    def ready(self) -> None:
        """Wait until the process can simulate. Raises the error that it ran into, if any."""
        self.child.answer()

    def begin(self, iteration: int, acting: State, starts: Tensor | None) -> None:
        tree_map(lambda place, x: place.copy_(x), self._acting, acting)
        self.child.ask((iteration, None if starts is None else starts.cpu()))

    def rollout(self) -> Transitions:
        self.child.answer()
        return self._rollout.map(lambda x: x.to(self._device, copy=True))

    def close(self) -> None:
        """End the process."""
        close([self.child])


def _serve(parent: Parent, make: Callable[[], tuple[Population, VectorEnv]], acting: State, place: Transitions) -> None:
    """Run the other process: collect a rollout into `place` for each task, until there are no more."""
    population, env = make()
    population.state = acting
    warm_up_acting(population, env, place)
    obs = torch.zeros(env.num_envs, env.obs_dim)
    parent.tell(None)
    while True:
        iteration, starts = parent.hear()
        if starts is not None:
            obs = env.reset(starts)
        rollout, obs = collect(population, env, obs, place.reward.shape[0], iteration)
        Transitions.zip(Tensor.copy_, place, rollout)
        parent.tell(None)
