"""Aggregates of scores over seeds, with intervals. Definitions of Agarwal et al. 2021 (arXiv 2108.13264)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ess_rl.errors import UsageError

Scores = NDArray[np.float64]  # [runs, tasks]


def iqm(scores: Scores) -> float:
    """Interquartile mean: the mean without the lowest and the highest quarter of all runs x tasks scores.

    As in rliable, floor(n / 4) scores go at either end.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64), axis=None)
    cut = ordered.size // 4
    return float(ordered[cut : ordered.size - cut].mean())


def bootstrap_interval(
    scores: Scores,
    estimator: Callable[[Scores], float],
    generator: np.random.Generator,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, float]:
    """Percentile interval of `estimator` from resampling runs within each task (stratified bootstrap).

    Raises:
        UsageError: fewer than two runs: they say nothing of how far the next one may fall.
    """
    scores = np.asarray(scores, dtype=np.float64)
    runs, tasks = scores.shape
    if runs < 2:
        raise UsageError(f"an interval needs at least two runs of a task, not {runs}: train more seeds")
    estimates = [
        estimator(np.take_along_axis(scores, generator.integers(runs, size=(runs, tasks)), axis=0))
        for _ in range(resamples)
    ]
    tail = 100.0 * (1.0 - confidence) / 2.0
    low, high = np.percentile(estimates, [tail, 100.0 - tail])
    return float(low), float(high)
