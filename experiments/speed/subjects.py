"""Subjects of a measurement: each in a process of its own, its rate next to that of the first."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from ess_rl.errors import LostProcessError
from experiments import machine, records
from experiments.records import Record


def noting(record: Record, rate: str, unit: str, out: Path | None) -> Callable[[str, Record], None]:
    """A function that takes a subject and what was measured of it: adds both to `record`, prints and saves them.

    Args:
        record: what `out` will hold, if given; a subject goes to its "subjects", with "ratio": its `rate` in units of
            the first subject's.
    """
    found = record["subjects"]

    def note(name: str, one: Record) -> None:
        found[name] = one | {"ratio": one[rate] / next(iter(found.values()), one)[rate]}
        print(f"{name}: {one[rate]:,.0f} {unit}/s", flush=True)
        records.write_file(out, record)

    return note


def apart(function: Any, *arguments: Any) -> Record:
    """Call a function in a fresh process: neither memory nor thread pools of one subject affect the next.

    Raises:
        LostProcessError: the process is gone.
    """
    return side_by_side(1, function, *arguments)[0]


def side_by_side(count: int, function: Any, *arguments: Any) -> list[Record]:
    """As `apart`, in `count` processes at once. -> what each returned"""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=count, mp_context=context, initializer=machine.end_with_command) as pool:
        try:
            return [one.result() for one in [pool.submit(function, *arguments) for _ in range(count)]]
        except BrokenProcessPool:
            raise LostProcessError(
                "a process that measured a subject is gone (killed, or out of memory); --out has the subjects before it"
            ) from None


def per_second(piece: Callable[[], int], seconds: float, device: str = "cpu") -> float:
    """Units of work per second: `piece` does some and returns how many."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        done += piece()
        wait()
    return done / (time.perf_counter() - began)
