"""GPU work recorded once and replayed: a small network's update runs faster than its kernels can be launched.

A recording holds kernels and addresses, and nothing of Python. So the recorded function must read and write tensors
that stay where they are, and must never wait for the device or branch on values that the device holds; recording fails
if a function does (torch.cuda.graph).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Graphs:
    """Run functions of no arguments. On CUDA each is called once, recorded at the next call, and replayed from then on.

    The first call compiles and allocates what a recording cannot. A replay returns the tensors of the recording with
    new contents: the next replay overwrites them. On the CPU, functions are called as usual.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._called: set[str] = set()
        self._recorded: dict[str, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def __call__(self, name: str, function: Callable[[], T]) -> T:
        """Result of `function()`, which must be the same function at every call with the same `name`."""
        if self._device.type != "cuda":
            return function()
        if name not in self._called:
            self._called.add(name)
            return function()
        with torch.cuda.device(self._device):  # recording uses the current device
            if name not in self._recorded:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    result = function()
                self._recorded[name] = graph, result
            graph, result = self._recorded[name]
            graph.replay()
        return result


class Stopwatch:
    """Lap times of one round in seconds, on the device: on CUDA the time between two events of its stream."""

    def __init__(self, device: torch.device):
        self._device = device

    def begin(self) -> None:
        self._marks: list[tuple[str, Any]] = [("", self._mark())]

    def lap(self, name: str) -> None:
        self._marks.append((name, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each lap. On CUDA, call it after waiting for the device."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return {name: self._between(before, after) for (_, before), (name, after) in pairs}

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, before: Any, after: Any) -> float:
        return before.elapsed_time(after) / 1000.0 if self._device.type == "cuda" else after - before
