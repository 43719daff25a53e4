"""How many env steps does P3O with replay need for what PPO reaches with all of them?

Read from the training curves of both, averaged over the last tenth of the budget at every point: PPO's level is the end
of its curve (IQM over seeds), and P3O has reached it where its own (IQM over seeds) is first not below it. The interval
comes from resampling the seeds of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments import figures, statistics
from experiments.studies.study import Difference, Finals, Outcome, Study, Verdict, dots, picture
from experiments.suites import SMALL, SMOKE, Job

TASKS = ("HalfCheetah-v5", "Walker2d-v5", "Hopper-v5", "Swimmer-v5")
SHARE = 40.0  # % of PPO's steps: 400k of a million


def jobs(quick: bool) -> tuple[Job, ...]:
    made = []
    for env in ("Pendulum-v1", "ess/LQR-v0") if quick else TASKS:
        how: Any = {**SMOKE, "seeds": range(2)} if quick else {}
        base = SMALL if quick else {}
        made.append(Job("p3o", env, **{**how, "settings": {**base, "replay": 3}, "label": "p3o"}))
        made.append(Job("ppo", env, **{**how, "settings": base, "label": "ppo"}))
    return tuple(made)


def curves(run: Path, members: Sequence[int]) -> Finals:
    """[members, K] return of the training episodes in the tenth of the budget before each K-th of it."""
    of_bins = figures.read_curves(run).values["return"][:, list(members)].T
    window = max(1, of_bins.shape[1] // 10)
    smooth = np.full(of_bins.shape, np.nan)
    for k in range(window, of_bins.shape[1] + 1):
        stretch = of_bins[:, k - window : k]
        known = ~np.isnan(stretch)
        total = np.where(known, stretch, 0.0).sum(1)
        smooth[:, k - 1] = np.divide(total, known.sum(1), out=np.full(len(total), np.nan), where=known.any(1))
    return smooth


def reached(one: Finals, other: Finals) -> Difference:
    """When the IQM of curves [seeds, K] first reaches the last one of `other`, in % of the budget; inf: never."""
    generator = np.random.default_rng(0)

    def share(x: Finals, y: Finals) -> NDArray[np.float64]:
        there = statistics.iqm_over_runs(x) >= statistics.iqm_over_runs(y)[..., -1:]
        return np.where(there.any(-1), 100.0 * (there.argmax(-1) + 1) / x.shape[-1], np.inf)

    x, y = (c[generator.integers(len(c), size=(2000, len(c)))] for c in (one, other))
    low, high = np.quantile(share(x, y), [0.025, 0.975], method="inverted_cdf")  # takes no mean: inf stays inf
    return Difference(float(share(one, other)), float(low), float(high))


def _by_task(outcome: Outcome) -> dict[str, Difference]:
    of = {job: x for (job, _), x in outcome.items()}
    return {env: reached(of[f"{env} p3o"], of[f"{env} ppo"]) for env in dict.fromkeys(job.split(" ")[0] for job in of)}


def judge(outcome: Outcome) -> Verdict:
    found = _by_task(outcome)
    sentences = [f"{env}: at {d.value:.0f} [{d.low:.0f}, {d.high:.0f}] % of the steps" for env, d in found.items()]
    surely = [env for env, d in found.items() if d.high <= SHARE]
    perhaps = [env for env, d in found.items() if d.low <= SHARE]
    sentences.append(f"within {SHARE:.0f} %, interval included: {', '.join(surely) or 'nowhere'}")
    if len(surely) >= 2:
        return Verdict("supported", tuple(sentences))
    return Verdict("refuted" if len(perhaps) < 2 else "undecided", tuple(sentences))


def draw_when(found: Mapping[str, Difference], share: float, whose: str, path: Path) -> None:
    """`reached`, a row each, with a line at the share that was predicted; never: right of the end."""
    within = {env: Difference(*(min(x, 110.0) for x in (d.value, d.low, d.high))) for env, d in found.items()}
    with picture(path) as axis:
        dots(axis, within)
        axis.axvline(share, color="gray", linewidth=0.8)
        axis.set(xlabel=f"% of the steps until {whose} final return (beyond 100: not reached)", xlim=(0.0, 112.0))


def draw(outcome: Outcome, path: Path) -> None:
    draw_when(_by_task(outcome), SHARE, "PPO's", path)


STUDY = Study(
    name="sample-efficiency",
    question="How many env steps does P3O with replay need for what PPO reaches with a million?",
    prediction="At most 40 % of them on at least two of HalfCheetah, Walker2d, Hopper and Swimmer.",
    jobs=jobs,
    judge=judge,
    draw=draw,
    quantity="training_return",
    measure=curves,
)
