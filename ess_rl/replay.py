"""A ring buffer of rollouts, reaching as far back as its capacity allows: [capacity, P, N, ...] on one device."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from ess_rl.contract import Tree
from ess_rl.errors import UsageError
from ess_rl.transitions import Transitions


class Replay:
    """Holds the last `capacity` time steps of P x N environments in the order they happened.

    Args:
        capacity: time steps to keep, at least one rollout.
        population: P.
        num_envs: N, environments of one member.
        device: where the data are kept; `add` moves them there.
    """

    def __init__(
        self, capacity: int, population: int, num_envs: int, obs_dim: int, act_dim: int, device: torch.device | str
    ):
        self.capacity = capacity
        self.store = Transitions.empty((capacity, population, num_envs), obs_dim, act_dim, torch.device(device))
        self.head = 0  # where the next step is written: over the oldest one, once the ring is full
        self.size = 0  # steps held

    @torch.no_grad()
    def add(self, rollout: Transitions) -> None:
        """Write steps [T, P, N] over the oldest ones. Values only: stored data have no gradient."""
        steps = rollout.reward.shape[0]
        _check(rollout, self.store)
        if steps > self.capacity:
            raise UsageError(f"a rollout of {steps} steps does not fit a replay of {self.capacity}: raise its capacity")
        first = min(steps, self.capacity - self.head)  # the rest continues at slot 0

        def write(store: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            store[self.head : self.head + first] = new[:first]
            store[: steps - first] = new[first:]
            return store

        self.store = Transitions.zip(write, self.store, rollout)
        self.head = (self.head + steps) % self.capacity
        self.size = min(self.size + steps, self.capacity)

    def latest(self, steps: int) -> Transitions:
        """The last `steps` steps, oldest first: [steps, P, N]. A view if they do not wrap around, else a copy."""
        if steps > self.size:
            raise UsageError(f"the replay holds {self.size} steps, not the {steps} asked for")
        return self._stretch((self.head - steps) % self.capacity, steps)

    def rollouts(self, steps: int, at_most: int) -> list[Transitions]:
        """Up to `at_most` stretches of `steps` steps, newest first, as many as are held whole: [steps, P, N].

        If steps are added `steps` at a time, these are the rollouts as they were collected. None crosses the write
        head. As in `latest`, a stretch that does not wrap around is a view, which later steps overwrite.
        """
        count = min(at_most, self.size // steps)
        starts = [(self.head - (k + 1) * steps) % self.capacity for k in range(count)]
        return [self._stretch(start, steps) for start in starts]

    def segments(self, age: Tensor, member: Tensor, env: Tensor, steps: int, head: Tensor) -> Transitions:
        """Stretches of one environment each, taken from the `rollouts`: [steps, K, S].

        Args:
            age: [K, S] int64, of the rollout: 0 is the newest.
            member: [K] int64, the member whose rollout it is, below P.
            env: [K, S] int64, the environment, below N.
            steps: per rollout; the capacity must be a multiple of it, and only whole rollouts may have been added.
            head: 0-dim int64: the current `head`, as a tensor on the replay's device.
        """
        first = (head - (age + 1) * steps) % self.capacity
        slot = first + torch.arange(steps, device=age.device)[:, None, None]
        members, num_envs = self.store.reward.shape[1:]
        row = (slot * members + member[:, None]) * num_envs + env  # one index instead of three: a third of the time
        return self.store.map(lambda x: x.flatten(0, 2).index_select(0, row.flatten()).view(*row.shape, *x.shape[3:]))

    def state(self) -> Tree:
        """The whole content, as a tree of tensors that a checkpoint can store."""
        store = {f.name: getattr(self.store, f.name) for f in fields(self.store)}
        place = {name: torch.tensor(getattr(self, name), device=self.store.reward.device) for name in ("head", "size")}
        return {"store": store, **place}

    def load(self, state: Tree) -> None:
        """Load a copy of what `state` returned."""
        held = Transitions(**state["store"])
        if len(held.reward) != self.capacity:
            raise UsageError(
                f"a replay of {self.capacity} steps cannot take up one of {len(held.reward)}: make it as large"
            )
        _check(held, self.store)
        Transitions.zip(Tensor.copy_, self.store, held)
        self.head, self.size = int(state["head"]), int(state["size"])

    def _stretch(self, start: int, steps: int) -> Transitions:
        if start + steps <= self.capacity:
            return self.store.map(lambda x: x[start : start + steps])
        return self.store.map(lambda x: torch.cat([x[start:], x[: start + steps - self.capacity]]))


def _check(given: Transitions, store: Transitions) -> None:
    """Raises UsageError if the columns' shapes differ from the replay's, except in the number of steps."""
    for f in fields(store):
        one, other = getattr(given, f.name).shape[1:], getattr(store, f.name).shape[1:]
        if one != other:
            raise UsageError(
                f"{f.name} {list(one)} a step does not fit a replay of {list(other)}: [population, num_envs, ...]"
            )
