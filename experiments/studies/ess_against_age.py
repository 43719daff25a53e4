"""Does the ESS of replayed data fall with their age?

Otherwise the ESS would not be a measure of staleness, and P3O's mechanism not credible. Measured for each seed: the ESS
of the fresh rollout and of the twelve before it under the current policy, before an iteration's updates, averaged over
the second half of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import records
from experiments.studies.study import Finals, Outcome, Study, Verdict, curve, level, picture
from experiments.suites import SMALL, SMOKE, Job


def jobs(quick: bool) -> tuple[Job, ...]:
    if quick:
        settings = {**SMALL, "replay": 3}
        return (Job("p3o", "Pendulum-v1", **{**SMOKE, "seeds": range(2), "settings": settings}),)
    return (Job("p3o", "HalfCheetah-v5", steps=300_000, settings={"replay": 12}),)


def by_age(run: Path, members: Sequence[int]) -> Finals:
    """[members, ages], the fresh rollout first."""
    rows = list(records.metrics(run))
    late = rows[len(rows) // 2 :]
    ages = ["ess_first", *(f"ess_age_{age}" for age in range(1, records.read_config(run)["config"]["replay"] + 1))]
    return np.array([[[row[age][m] for row in late] for age in ages] for m in members], np.float64).mean(-1)


def judge(outcome: Outcome) -> Verdict:
    (ess,) = outcome.values()
    steps = [level(younger - older) for younger, older in zip(ess.T[:-1], ess.T[1:], strict=True)]
    sentences = [f"age {age}: ESS {level(x).value:.3f}" for age, x in enumerate(ess.T)]
    rises = [age for age, (_, _, high) in enumerate(steps, start=1) if high < 0.0]
    sentences.append(f"clearly above the age before: {', '.join(map(str, rises)) or 'none'}")
    if rises:
        return Verdict("refuted", tuple(sentences))
    return Verdict("supported" if all(low > 0.0 for _, low, _ in steps) else "undecided", tuple(sentences))


def draw(outcome: Outcome, path: Path) -> None:
    (ess,) = outcome.values()
    label: Any = f"P3O, {len(ess)} seeds"
    with picture(path) as axis:
        curve(axis, [str(age) for age in range(ess.shape[1])], [level(x) for x in ess.T], label=label)
        axis.set(xlabel="age of the data in iterations", ylabel="ESS (IQM, 95 % interval)", ylim=(0.0, 1.05))


STUDY = Study(
    name="ess-against-age",
    question="Does the ESS of replayed data fall with their age?",
    prediction="It falls with every iteration of age, from 1 for fresh data to that of twelve iterations.",
    jobs=jobs,
    judge=judge,
    draw=draw,
    quantity="ess_by_age",
    measure=by_age,
)
