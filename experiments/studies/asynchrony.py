"""Does a second process that collects while the first one learns save time, at equal return (TBA)?

Collecting at the same time costs a lag of one iteration. So the question is when the asynchronous run reaches the
synchronous one's final training return: a share of its steps, times the ratio of the two runs' training times, without
compiling. Its answer is one machine's: with more cores, more is done at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import records
from experiments.studies.learning_curves import curves, draw_when, reached
from experiments.studies.study import Estimate, Finals, Outcome, Study, Verdict, by_task
from experiments.suites import SMALL, SMOKE, Job

TASKS = ("HalfCheetah-v5", "Pendulum-v1")
METHODS = ("p3o", "ppo", "tba")
COLLECTING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "synchronous": ({}, {}),
    "asynchronous": ({"lag": 1}, {"asynchronous": True}),
}


def jobs(quick: bool) -> tuple[Job, ...]:
    made = []
    for env in ("InvertedPendulum-v5", "Pendulum-v1") if quick else TASKS:
        for agent in METHODS:
            for label, (changes, options) in COLLECTING.items():
                how: Any = {**SMOKE, "seeds": range(2)} if quick else {"steps": 100_000, "options": {}}
                settings = {**(SMALL if quick else {}), **changes}
                options = {**how["options"], **options}
                made.append(
                    Job(agent, env, **{**how, "settings": settings, "options": options, "label": f"{agent} {label}"})
                )
    return tuple(made)


def curves_and_time(run: Path, members: Sequence[int]) -> Finals:
    """[members, K + 1]: the K points of `curves`, and the run's seconds of training, the same for all members."""
    seconds = records.read_json(run / "result.json")["training_seconds"]
    found = curves(run, members)
    return np.column_stack([found, np.full(len(found), seconds)])


def _when(outcome: Outcome) -> dict[str, tuple[float, Estimate]]:
    """task and method -> (ratio of the training times in %, % of the synchronous time until its final return)"""
    found = {}
    for env, of in by_task(outcome).items():
        for agent in METHODS:
            waits, overlaps = (of[f"{agent} {label}"] for label in COLLECTING)
            ratio = overlaps[0, -1] / waits[0, -1]
            steps = reached(overlaps[:, :-1], waits[:, :-1])
            found[f"{env}, {agent}"] = (100.0 * ratio, Estimate(*(ratio * share for share in steps)))
    return found


def judge(outcome: Outcome) -> Verdict:
    sentences, sooner, later = [], set(METHODS), set()
    for name, (ratio, d) in _when(outcome).items():
        sentences.append(
            f"{name}: all steps take {ratio:.0f} % of the synchronous time; its end is reached after {d.value:.0f} "
            f"[{d.low:.0f}, {d.high:.0f}] %"
        )
        agent = name.split(", ")[1]
        sooner -= {agent} if d.high >= 100.0 else set()
        later |= {agent} if d.low >= 100.0 else set()
    if len(later) >= 2:  # fewer than two methods are left of which it could hold
        return Verdict("refuted", tuple(sentences))
    return Verdict("supported" if len(sooner) >= 2 else "undecided", tuple(sentences))


def draw(outcome: Outcome, path: Path) -> None:
    draw_when({name: d for name, (_, d) in _when(outcome).items()}, 100.0, "the synchronous run's", path, of="time")


STUDY = Study(
    name="asynchrony",
    question="Does collecting in a second process save time at equal return, in spite of the lag that it costs?",
    prediction=(
        "On two cores, for at least two of P3O, PPO and TBA, the asynchronous run reaches the final training return of "
        "the synchronous one in less than its time on both tasks."
    ),
    jobs=jobs,
    judge=judge,
    draw=draw,
    quantity="training_return_and_seconds",
    measure=curves_and_time,
    timed=True,
)
