"""A worker process: it receives tasks and sends answers, in turn or on its own, until the pipe to this one closes.

It is spawned, because torch's threads do not survive a fork. Its exceptions are raised here; if it has died, that is
reported at once, and nothing waits for it.
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

_PATIENCE = 30.0  # seconds that processes have to exit, once they have nothing to do


class Child:
    """Another process, which calls `work` with `arguments`.

    Args:
        name: what the process is, as a noun phrase, for the error that says it is gone.
        work: called in that process, hence picklable. Its first argument is a `Parent`, from which it can `hear` its
            tasks and to which it can `tell` its results, as long as there is anything to do.
        threads: number of torch threads in that process.
        cpus: the only CPUs it may use (Linux only); empty: all.
    """

    def __init__(
        self, name: str, work: Callable[..., None], *arguments: Any, threads: int = 1, cpus: Collection[int] = ()
    ):
        self.name = name
        self.peak_memory_mib = 0.0  # its peak memory as of its last answer
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        task = (theirs, work, arguments, threads, tuple(cpus))
        self._process = context.Process(target=_begin, args=task, name=name, daemon=True)
        self._process.start()
        theirs.close()  # so that the pipe closes when that process ends

    def ask(self, task: Any) -> None:
        """Send it a task. Raises the error that it ran into before, if any."""
        try:
            self._pipe.send(task)
        except OSError:
            self.answer()  # raises its last error, if it sent one
            raise self._lost() from None

    def answer(self) -> Any:
        """Wait for its next answer. Raises the error that it ran into, if any."""
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
        return LostProcessError(f"{self.name} {how}; 'ess-rl resume RUN' continues from the newest checkpoint")


def close(children: Sequence[Child]) -> None:
    """End all of them, each at its next `tell` or `hear`; they share one time limit, after which they are killed."""
    for child in children:
        child._pipe.close()
    patient_until = time.monotonic() + _PATIENCE
    for child in children:
        child._process.join(max(0.0, patient_until - time.monotonic()))
        child._process.kill()


class Parent:
    """The other end of a `Child`, in the child process."""

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
    """The other process needs nothing more, or is gone: not an error of the work, which must not catch it."""


def peak_memory_mib() -> float:
    """Peak memory of this process."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), flags=re.MULTILINE)):
        return int(found[1]) / 1024.0  # Linux, where getrusage starts from the parent process's peak
    unit = 1024.0 if sys.platform != "darwin" else 1024.0**2  # KiB; bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _begin(
    pipe: Connection, work: Callable[..., None], arguments: tuple[Any, ...], threads: int, cpus: tuple[int, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; this one ends with the other
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
    """The error with its traceback attached, for the other process; as a RuntimeError if it cannot be pickled."""
    error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    return error
