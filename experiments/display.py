"""Progress: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections import deque
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from experiments import records

_PLAIN_LINES = 10  # over the whole, plus one at the start


class Line:
    """One line of progress: rewritten in a terminal, printed now and then elsewhere."""

    def __init__(self) -> None:
        self._plain_next = 0.0
        console = Console()
        self._live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None

    def __enter__(self) -> Line:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, done: float, text: str) -> None:
        """Show `text`; `done` is the completed fraction, from 0 to 1."""
        if self._live:
            self._live.update(Text(text, no_wrap=True))
        elif done >= self._plain_next:
            print(text, flush=True)
            self._plain_next = (math.floor(done * _PLAIN_LINES) + 1) / _PLAIN_LINES  # the last one is at 1

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)


class Display:
    """Shows the steps, steps/s, return, ESS and remaining time of a run. `update` takes the rows of metrics.jsonl."""

    def __init__(self, config: dict[str, Any], iteration: int = 0):
        self.label = f"{config['agent']} {config.get('dataset') or config['env']}"
        self.unit = records.unit(config).split()[-1]  # steps or updates
        self.iterations, self.members = config["iterations"], len(config["seeds"])
        self.first, self.began = iteration, time.monotonic()
        self.returns: deque[tuple[float, int]] = deque(maxlen=20)
        self.line = Line()

    def __enter__(self) -> Display:
        self.line.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.line.__exit__(kind, error, trace)

    def update(self, row: dict[str, Any]) -> None:
        self.returns.append((sum(row["return_sum"]), sum(row["episodes"])))
        self.line.show(row["iteration"] / self.iterations, self._text(row))

    def _text(self, row: dict[str, Any]) -> str:
        elapsed = time.monotonic() - self.began
        here = row["iteration"] - self.first
        steps = records.steps_of(row)
        rate = steps / row["iteration"] * here * self.members / elapsed
        left = elapsed / here * (self.iterations - row["iteration"])
        total, episodes = (sum(column) for column in zip(*self.returns, strict=True))
        score = f"{total / episodes:9.1f}" if episodes else "        -"
        ess = f"{sum(row['ess']) / self.members:.3f}" if "ess" in row else "  -  "
        done = f"{100 * row['iteration'] / self.iterations:3.0f} %  {steps:>9,} {self.unit}"
        return f"{self.label}  {done}  {rate:>7,.0f} {self.unit}/s  return {score}  ESS {ess}  {clock(left)} left"


def clock(seconds: float) -> str:
    """3:07 or 2:03:07."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
