"""Aggregates of scores over runs and tasks, with intervals. Definitions of Agarwal et al. 2021 (arXiv 2108.13264).

An estimator is a function of scores [..., runs, tasks] that reduces the last two axes, so that the bootstrap can
pass it many resampled matrices at once. Interval functions take it as an argument: point and interval come from the
same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ess_rl.errors import UsageError

Array = NDArray[np.float64]
Scores = Array  # [runs, tasks]; a task is a column. Estimators take any leading axes before these two
Estimator = Callable[[Scores], Array]  # [..., runs, tasks] -> [...], or [..., k] if it returns k numbers
TwoSampleEstimator = Callable[[Scores, Scores], Array]  # the same for two agents; their numbers of runs may differ

_BATCH = 100  # resampled matrices held at a time: enough to keep numpy busy, small enough for hundreds of runs


class Interval(NamedTuple):
    """Both ends, each in the shape of the estimate."""

    low: Array
    high: Array


def score_matrix(columns: ArrayLike) -> Scores:
    """Checked scores [runs, tasks] from a list of runs, each a list with one number per task.

    Raises:
        UsageError: runs of different length, no run, no task, or a score that is not a finite number.
    """
    try:
        scores = np.array(columns, dtype=np.float64)
    except (TypeError, ValueError):
        raise UsageError("scores must be a matrix [runs, tasks] of numbers, every run with all tasks") from None
    if scores.ndim != 2 or scores.size == 0:
        raise UsageError(f"scores must be a matrix [runs, tasks] with a run and a task at least, not {scores.shape}")
    if not np.isfinite(scores).all():
        raise UsageError("a score is not a finite number: leave out that run, and say so")
    return scores


def iqm(scores: Scores) -> Array:
    """Interquartile mean: the mean without the lowest and the highest quarter of all runs x tasks scores.

    As in rliable, floor(n / 4) of the n scores are dropped at either end.
    """
    ordered = np.sort(_pooled(scores), axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def iqm_over_runs(scores: Scores) -> Array:
    """The interquartile mean of each column: [..., runs, tasks] -> [..., tasks]. For a curve, tasks are its points."""
    runs = np.shape(scores)[-2]
    cut = runs // 4
    return np.sort(scores, axis=-2)[..., cut : runs - cut, :].mean(-2)


def rank_correlation(x: Array, y: Array) -> float:
    """Spearman's: the correlation of the ranks of x [n] and y [n], in [-1, 1]; equal values share their mean rank.

    0 if all values of either are equal, which says nothing about the other.
    """
    ranks = []
    for values in (x, y):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - 0.5 * (counts - 1))[inverse])
    (one, other) = (rank - rank.mean() for rank in ranks)
    size = np.sqrt((one @ one) * (other @ other))
    return float(one @ other / size) if size > 0.0 else 0.0


def mean(scores: Scores) -> Array:
    """The mean of all scores. A single outlying run moves it."""
    return np.mean(scores, axis=(-2, -1))


def median(scores: Scores) -> Array:
    """The median over the tasks of each task's mean over its runs. Nearly half of the tasks cannot move it."""
    return np.median(np.mean(scores, axis=-2), axis=-1)


def optimality_gap(scores: Scores, *, target: float = 1.0) -> Array:
    """How far the scores lie below `target` on average; a score above it counts as the target. Lower is better."""
    return target - np.minimum(scores, target).mean((-2, -1))


def performance_profile(scores: Scores, thresholds: ArrayLike) -> Array:
    """The share of all runs x tasks whose score is above each threshold: [..., runs, tasks] -> [..., thresholds].

    The run-score distribution of section 4.2; strictly above, so that it is 1 below the lowest score and ends at 0.
    """
    flat = _pooled(scores)
    return (flat[..., None, :] > np.asarray(thresholds, dtype=np.float64)[:, None]).mean(-1)


def probability_of_improvement(x: Scores, y: Scores) -> Array:
    """P(X > Y): the probability that a run of x beats a run of y on a task drawn at random. Ties count half.

    The mean over the tasks of Mann-Whitney's U divided by the number of pairs. Scores need not be normalized: only
    their order within a task counts. x [..., runs_x, tasks], y [..., runs_y, tasks] -> [...].

    Raises:
        UsageError: x and y differ in their number of tasks.
    """
    if np.shape(x)[-1] != np.shape(y)[-1]:
        raise UsageError(f"{np.shape(x)[-1]} and {np.shape(y)[-1]} tasks: agents are compared on the same ones")
    difference = np.asarray(x)[..., :, None, :] - np.asarray(y)[..., None, :, :]
    return (0.5 + 0.5 * np.sign(difference)).mean((-3, -2, -1))


def less(estimator: Estimator) -> TwoSampleEstimator:
    """An estimator of the difference: the estimate of x minus that of y."""
    return lambda x, y: np.asarray(estimator(x) - estimator(y))


def bootstrap_interval(
    scores: Scores,
    estimator: Estimator,
    generator: np.random.Generator,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Percentile interval of `estimator` from resampling runs within each task, independently (stratified bootstrap).

    Raises:
        UsageError: fewer than two runs: they say nothing about how far off the next one may fall.
    """
    parts = [estimator(x) for x in _resampled(scores, generator, resamples)]
    return _percentiles(np.concatenate(parts), confidence)


def interval_of(scores: Scores, estimator: Estimator, *, resamples: int = 2000) -> Interval | None:
    """`bootstrap_interval` from a fixed random seed, or None if there is only one run."""
    if len(scores) < 2:
        return None
    return bootstrap_interval(scores, estimator, np.random.default_rng(0), resamples=resamples)


def bootstrap_interval_of_two(
    x: Scores,
    y: Scores,
    estimator: TwoSampleEstimator,
    generator: np.random.Generator,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """`bootstrap_interval` for a statistic of two agents, whose runs are resampled independently of each other.

    Raises:
        UsageError: one of them has fewer than two runs.
    """
    pairs = zip(_resampled(x, generator, resamples), _resampled(y, generator, resamples), strict=True)
    return _percentiles(np.concatenate([estimator(one, other) for one, other in pairs]), confidence)


def _pooled(scores: Scores) -> Array:
    """[..., runs, tasks] -> [..., runs * tasks]"""
    scores = np.asarray(scores, dtype=np.float64)
    return scores.reshape(*scores.shape[:-2], -1)


def _resampled(scores: Scores, generator: np.random.Generator, resamples: int) -> Iterator[Scores]:
    """Batches [batch, runs, tasks] of resampled matrices, `resamples` in all."""
    scores = np.asarray(scores, dtype=np.float64)
    runs, tasks = scores.shape
    if runs < 2:
        raise UsageError(f"an interval needs at least two runs of a task, not {runs}: train more seeds")
    for start in range(0, resamples, _BATCH):
        drawn = generator.integers(runs, size=(min(_BATCH, resamples - start), runs, tasks))
        yield np.take_along_axis(scores[None], drawn, axis=1)


def _percentiles(estimates: Array, confidence: float) -> Interval:
    tail = 100.0 * (1.0 - confidence) / 2.0
    low, high = np.percentile(estimates, [tail, 100.0 - tail], axis=0)
    return Interval(low, high)
