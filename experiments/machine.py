"""The machine that a run is on: its cores, its name, and ending processes with their parents. No torch."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import signal
import sys
from pathlib import Path

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here, not between fork and exec


def available_cores() -> int:
    """CPUs this process may use, which in a container are often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def describe() -> dict[str, str | int]:
    """`system`, `cpu` and `cores`, which must be quoted with any speed."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {"system": platform.system(), "cpu": model, "cores": available_cores()}


def end_with_parent() -> None:
    """Ask the kernel to end this process when its parent ends, for whatever reason: otherwise a run would go on unseen.

    On Linux; elsewhere it does nothing.
    """
    pr_set_pdeathsig = 1
    if _LIBC is not None:
        _LIBC.prctl(pr_set_pdeathsig, signal.SIGTERM)


def end_with_command() -> None:
    """As `end_with_parent`, for the start of a process of a pool, which else waits for work for ever.

    A seed that outlived its command would train unseen, next to another process for the same seed.
    """
    end_with_parent()
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)
