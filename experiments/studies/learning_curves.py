"""When does one learning curve reach the level at which another ends?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments import figures, statistics
from experiments.studies.study import Estimate, Finals, dots, picture


def curves(run: Path, members: Sequence[int]) -> Finals:
    """[members, K] return of training episodes, averaged over the tenth of the budget before each of K points.

    The points are k / K of the budget, k = 1 ... K, whichever K stretches of training the run's curve consists of: each
    counts by its share of the tenth. NaN within the first tenth, and where no episode ended.
    """
    found = figures.read_curves(run)
    of_stretch, points = found.values["return"][:, list(members)].T, len(found.env_steps)
    ends = 10 * points * found.env_steps  # in units of 1 / (10 K) steps, in which every bound is a whole number
    begins, tenth = np.array([0, *ends[:-1]]), ends[-1] // 10
    known, smooth = ~np.isnan(of_stretch), np.full(of_stretch.shape, np.nan)
    for k in range(-(-points // 10), points + 1):
        end = k * (ends[-1] // points)
        share = known * np.maximum(np.minimum(ends, end) - np.maximum(begins, end - tenth), 0)
        total, of_all = (share * np.where(known, of_stretch, 0.0)).sum(1), share.sum(1)
        smooth[:, k - 1] = np.divide(total, of_all, out=np.full(len(total), np.nan), where=of_all > 0)
    return smooth


def reached(one: Finals, other: Finals) -> Estimate:
    """When the IQM of curves [seeds, K] first reaches that of `other` at its end, in % of the budget; inf: never."""
    generator = np.random.default_rng(0)

    def share(x: Finals, y: Finals) -> NDArray[np.float64]:
        there = statistics.iqm_over_runs(x) >= statistics.iqm_over_runs(y)[..., -1:]
        return np.where(there.any(-1), 100.0 * (there.argmax(-1) + 1) / x.shape[-1], np.inf)

    x, y = (c[generator.integers(len(c), size=(2000, len(c)))] for c in (one, other))
    low, high = np.quantile(share(x, y), [0.025, 0.975], method="inverted_cdf")  # no averaging: inf stays inf
    return Estimate(float(share(one, other)), float(low), float(high))


def draw_when(found: Mapping[str, Estimate], share: float, whose: str, path: Path, of: str = "steps") -> None:
    """Plot `reached`, one row each, with a line at the predicted share; never: right of the end."""
    within = {env: Estimate(*(min(x, 110.0) for x in (d.value, d.low, d.high))) for env, d in found.items()}
    with picture(path) as axis:
        dots(axis, within)
        axis.axvline(share, color="gray", linewidth=0.8)
        axis.set(xlabel=f"% of the {of} until {whose} final return\n(beyond 100: not reached)", xlim=(0.0, 112.0))
