"""Does a second process that collects while the first one learns save time, at equal return (TBA)?

Collecting at the same time costs a lag of one iteration. So the question is when the asynchronous run reaches the
synchronous one's final training return: a share of its steps, from the runs, times the ratio of the times that an
iteration takes. Those are measured apart, in turns, for a machine's speed differs from one hour to the next. The answer
is one machine's: with more cores, more is done at the same time.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.studies.learning_curves import curves, draw_when, reached
from experiments.studies.study import Estimate, Outcome, Study, Verdict, by_task
from experiments.suites import SMALL, SMOKE, Job

TASKS = ("HalfCheetah-v5", "Pendulum-v1")
METHODS = ("p3o", "ppo", "tba")
COLLECTING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "synchronous": ({}, {}),
    "asynchronous": ({"lag": 1}, {"asynchronous": True}),
}


def _tasks(quick: bool) -> tuple[str, ...]:
    return ("InvertedPendulum-v5", "Pendulum-v1") if quick else TASKS


def jobs(quick: bool) -> tuple[Job, ...]:
    made = []
    for env in _tasks(quick):
        for agent in METHODS:
            for label, (changes, collecting) in COLLECTING.items():
                how: Any = {**SMOKE, "seeds": range(2)} if quick else {"steps": 100_000, "options": {}}
                settings = {**(SMALL if quick else {}), **changes}
                options = {**how["options"], **collecting}
                how |= {"settings": settings, "options": options, "label": f"{agent} {label}"}
                made.append(Job(agent, env, **how))
    return tuple(made)


def paces(quick: bool) -> Outcome:
    """task, method and "pace" -> [rounds] time of an asynchronous iteration, in units of a synchronous one's."""
    from agents import AGENTS
    from experiments.plan import compiled_of
    from experiments.speed.subjects import apart
    from experiments.speed.throughput import ours_in_several

    found, rounds, seconds, members = {}, 1 if quick else 3, 0.2 if quick else 6.0, 2 if quick else 10
    compiled = compiled_of("off" if quick else "auto")
    for env in _tasks(quick):
        for agent in METHODS:
            config: Any = AGENTS[agent].config(**(SMALL if quick else {}))
            shape = {name: getattr(config, name) for name in ("num_envs", "rollout", "epochs", "minibatch", "hidden")}
            ratios = []
            for _ in range(rounds):
                waits, overlaps = (
                    apart(partial(ours_in_several, **how), env, agent, members, shape, seconds, "cpu", compiled)
                    for _, how in COLLECTING.values()
                )
                ratios.append(waits["steps_per_second"] / overlaps["steps_per_second"])
            print(f"{env}, {agent}: an asynchronous iteration takes {100.0 * np.median(ratios):.0f} % of the time")
            found[f"{env} {agent} pace", ""] = np.array(ratios)
    return found


def _when(outcome: Outcome) -> dict[str, tuple[Estimate, Estimate]]:
    """task and method -> (pace with its extremes, and when the synchronous return is reached), in % of its time"""
    found = {}
    for env, of in by_task(outcome).items():
        for agent in METHODS:
            pace, synchronous, asynchronous = (of[f"{agent} {label}"] for label in ("pace", *COLLECTING))
            middle = float(np.median(pace))
            percent = Estimate(*(100.0 * x for x in (middle, float(pace.min()), float(pace.max()))))
            when = Estimate(*(middle * share for share in reached(asynchronous, synchronous)))
            found[f"{env}, {agent}"] = percent, when
    return found


def judge(outcome: Outcome) -> Verdict:
    sentences, sooner, later = [], set(METHODS), set()
    for name, (pace, d) in _when(outcome).items():
        sentences.append(
            f"{name}: an iteration takes {pace.value:.0f} ({pace.low:.0f} to {pace.high:.0f}) % of the synchronous "
            f"one's time; its end is reached after {d.value:.0f} [{d.low:.0f}, {d.high:.0f}] % of its time"
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
    quantity="training_return",
    measure=curves,
    compute=paces,
)
