"""Progress of a run: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

_PLAIN_EVERY = 0.1  # of the run, between two plain lines


class Display:
    """Shows steps, steps/s, return, ESS and the time left. `update` takes the rows of metrics.jsonl."""

    def __init__(self, config: dict[str, Any], iteration: int = 0):
        self.label = f"{config['agent']} {config['env']}"
        self.iterations, self.members = config["iterations"], len(config["seeds"])
        self.first, self.began = iteration, time.monotonic()
        self.returns: deque[tuple[float, int]] = deque(maxlen=20)
        self.plain_next = 0.0
        console = Console()
        self.live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def update(self, row: dict[str, Any]) -> None:
        self.returns.append((sum(row["return_sum"]), sum(row["episodes"])))
        line = self._line(row)
        if self.live:
            self.live.update(Text(line, no_wrap=True))
            return
        done = row["iteration"] / self.iterations
        if done >= self.plain_next or done == 1.0:
            print(line, flush=True)
            self.plain_next = done + _PLAIN_EVERY

    def _line(self, row: dict[str, Any]) -> str:
        elapsed = time.monotonic() - self.began
        here = row["iteration"] - self.first
        rate = row["env_steps"] / row["iteration"] * here * self.members / elapsed
        left = elapsed / here * (self.iterations - row["iteration"])
        total, episodes = (sum(column) for column in zip(*self.returns, strict=True))
        score = f"{total / episodes:9.1f}" if episodes else "        -"
        ess = f"{sum(row['ess']) / self.members:.3f}" if "ess" in row else "  -  "
        return (
            f"{self.label}  {100 * row['iteration'] / self.iterations:3.0f} %  {row['env_steps']:>9,} steps  "
            f"{rate:>7,.0f} steps/s  return {score}  ESS {ess}  {_clock(left)} left"
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
