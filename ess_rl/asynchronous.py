"""Collecting in a process of its own: it simulates the next rollout while this process learns from the last.

What acts is the policy of K = `lag` iterations ago, K >= 1. So all that rollout i + 1 needs is there before the updates
of iteration i begin, and both can go on at the same time. Nothing is raced for: the result is that of the same lag
without a second process, bit for bit where torch has as many threads, however fast either of the two is.

TBA (arXiv 2503.18929) sends its searchers new weights every `sync_interval` steps of the trainer and learns from
whatever has come by then. Here the interval is one iteration and the delay is K of them, known for every sample.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ess_rl.contract import State, VectorEnv
from ess_rl.errors import LostProcessError
from ess_rl.loop import collect, warm_up_acting
from ess_rl.population import Population
from ess_rl.transitions import Transitions

_PATIENCE = 30.0  # seconds that a process is given to end, once it has nothing to do


class ProcessCollector:
    """A `Collector` in another process.

    Args:
        make: called in that process, hence picklable: -> (the population as it acts: its `lag` is 0; its environments)
        population: whose states will act.
        env: of the same kind as those environments; nothing is simulated in it.
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
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, make, self._acting, self._rollout)
        self._process = context.Process(target=_serve, args=arguments, name="collector", daemon=True)
        self._process.start()
        theirs.close()  # so that the end of that process is the end of the pipe

    def ready(self) -> None:
        """Wait until it can simulate. Raises what went wrong there."""
        self._answer()

    def begin(self, iteration: int, acting: State, starts: Tensor | None) -> None:
        tree_map(lambda place, x: place.copy_(x), self._acting, acting)
        self._ask((iteration, None if starts is None else starts.cpu()))

    def rollout(self) -> Transitions:
        self._answer()
        return self._rollout.map(lambda x: x.to(self._device, copy=True))

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(_PATIENCE)
        self._process.kill()

    def _ask(self, task: Any) -> None:
        try:
            self._pipe.send(task)
        except OSError:
            raise self._lost() from None

    def _answer(self) -> None:
        try:
            error = self._pipe.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if error is not None:
            raise error

    def _lost(self) -> LostProcessError:
        self._process.join(_PATIENCE)
        code = self._process.exitcode
        how = f"was ended by signal {-code}" if code and code < 0 else f"ended with status {code}"
        return LostProcessError(
            f"the process that collects {how}; 'ess-rl resume RUN' goes on from the newest checkpoint"
        )


def _serve(
    pipe: Connection, make: Callable[[], tuple[Population, VectorEnv]], acting: State, place: Transitions
) -> None:
    """The other process: a rollout into `place` for each task, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; this one ends with the other
    torch.set_num_threads(1)  # the others are for the simulators, and for who learns
    try:
        population, env = make()
        population.state = acting
        warm_up_acting(population, env, place)
        obs = torch.zeros(env.num_envs, env.obs_dim)
        pipe.send(None)
        while True:
            iteration, starts = pipe.recv()
            if starts is not None:
                obs = env.reset(starts)
            rollout, obs = collect(population, env, obs, place.reward.shape[0], iteration)
            Transitions.zip(Tensor.copy_, place, rollout)
            pipe.send(None)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the other process wants nothing more, or is gone
    except Exception as error:
        pipe.send(error)
