"""A process that works for this one: it is asked and answers, in turn or on its own, until the pipe between them ends.

It is spawned, because torch's threads do not survive a fork. Whatever goes wrong in it is raised here; should it be
gone, that is said at once, and nothing waits for it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ess_rl.errors import LostProcessError

_PATIENCE = 30.0  # seconds that processes are given to end, once they have nothing to do


class Child:
    """Another process, which calls `work` with `arguments`.

    Args:
        name: what it is, as a noun, for whoever reads that it is gone.
        work: called in that process, hence picklable, with this end's counterpart first: it `hear`s what it is asked
            and `tell`s what it has done, as long as there is anything to do.
        threads: of torch, in that process.
        cpus: the only ones it may use, where the system can say so; none named: all.
    """

    def __init__(
        self, name: str, work: Callable[..., None], *arguments: Any, threads: int = 1, cpus: Collection[int] = ()
    ):
        self.name = name
        self.peak_memory_mib = 0.0  # the most memory it had held when it last answered
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        task = (theirs, work, arguments, threads, tuple(cpus))
        self._process = context.Process(target=_begin, args=task, name=name, daemon=True)
        self._process.start()
        theirs.close()  # so that the end of that process is the end of the pipe

    def ask(self, task: Any) -> None:
        """Give it something to do. Raises what went wrong there before."""
        try:
            self._pipe.send(task)
        except OSError:
            self.answer()  # its last word, if it had one
            raise self._lost() from None

    def answer(self) -> Any:
        """Wait for what it tells next. Raises what went wrong there."""
        try:
            answer, self.peak_memory_mib = self._pipe.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _lost(self) -> LostProcessError:
        self._process.join(_PATIENCE)
        code = self._process.exitcode
        how = "does not answer" if code is None else f"ended with status {code}"
        how = f"was ended by signal {-code}" if code and code < 0 else how
        return LostProcessError(f"{self.name} {how}; 'ess-rl resume RUN' goes on from the newest checkpoint")


def close(children: Sequence[Child]) -> None:
    """End them all: each as soon as it has told or heard what it is about to; none is waited for longer than others."""
    for child in children:
        child._pipe.close()
    patient_until = time.monotonic() + _PATIENCE
    for child in children:
        child._process.join(max(0.0, patient_until - time.monotonic()))
        child._process.kill()


class Parent:
    """The other end of a `Child`, in that process."""

    def __init__(self, pipe: Connection):
        self._pipe = pipe

    def hear(self) -> Any:
        """Wait for the next task."""
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            raise _Over from None

    def tell(self, answer: Any) -> None:
        try:
            self._pipe.send((answer, peak_memory_mib()))
        except OSError:
            raise _Over from None


class _Over(BaseException):
    """The other process wants nothing more, or is gone: no error of the work, and none that it may catch."""


def peak_memory_mib() -> float:
    """The most memory this process has held."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), flags=re.MULTILINE)):
        return int(found[1]) / 1024.0  # Linux; what getrusage says there begins at the peak of who began the process
    unit = 1024.0 if sys.platform != "darwin" else 1024.0**2  # KiB, on macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _begin(
    pipe: Connection, work: Callable[..., None], arguments: tuple[Any, ...], threads: int, cpus: tuple[int, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; this one ends with the other
    if cpus:
        os.sched_setaffinity(0, cpus)
    torch.set_num_threads(threads)
    parent = Parent(pipe)
    with suppress(_Over):
        try:
            work(parent, *arguments)
        except Exception as error:
            parent.tell(_portable(error))


def _portable(error: Exception) -> Exception:
    """An error that reaches the other process whole: with where it was raised, and itself, if it can be sent."""
    error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    return error
