"""What do offline agents make of a small data set, in few updates of small networks?

Tables of offline agents report a million updates of networks with two layers of 256 units. This is a hundredth of the
updates and a thirteenth of the network, on 100,000 steps of a half-trained policy: what can be run in minutes. Agents
that bootstrap a critic are still early in training then, and nothing here says how they end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.studies.study import Finals, Outcome, Study, Verdict, difference, draw_levels
from experiments.suites import RANDOM, SMALL_SETS, SMOKE, Job

AGENTS = ("bc", "awr", "awac", "iql", "td3_bc", "p3o_offline")
P3O, AWR = "p3o_offline", "awr"  # whose advantages are the data's returns


def jobs(quick: bool) -> tuple[Job, ...]:
    sets = {RANDOM: ("Pendulum-v1", "")} if quick else SMALL_SETS
    how: Any = {"steps": 10_000}
    numbers: dict[str, Any] = {"hidden": (64, 64)}
    if quick:
        numbers = {"hidden": (8, 8), "minibatch": 32}
        how = {**SMOKE, "seeds": range(2), "steps": 40}
    of: dict[str, dict[str, Any]] = {"iql": {"imitates": "sampled"}}  # as when the study was carried out
    return tuple(
        Job(agent, env, dataset=dataset, label=agent, **{**how, "settings": {**numbers, **of.get(agent, {})}})
        for dataset, (env, _) in sets.items()
        for agent in AGENTS
    )


def by_task(outcome: Outcome) -> dict[str, dict[str, Finals]]:
    """task -> agent -> final returns"""
    tasks: dict[str, dict[str, Finals]] = {}
    for (job, label), finals in outcome.items():
        tasks.setdefault(job.rpartition(" ")[0], {})[label] = finals
    return tasks


def judge(outcome: Outcome) -> Verdict:
    tasks, sentences, found = by_task(outcome), [], {}
    comparisons = len(tasks) * (len(AGENTS) - 1)
    for task, of in tasks.items():
        for other in (name for name in AGENTS if name != P3O):
            found[task, other] = d = difference(of[P3O], of[other], comparisons=comparisons)
            sentences.append(f"{task} {P3O} less {other}: {d}".strip())
    sentences.append(f"in intervals that hold together for all {comparisons} comparisons")
    if any(d.high < 0.0 for d in found.values()):
        return Verdict("refuted", tuple(sentences))
    return Verdict(
        "supported" if all(d.low > 0.0 for (_, other), d in found.items() if other != AWR) else "undecided",
        tuple(sentences),
    )


def draw(outcome: Outcome, path: Path) -> None:
    draw_levels(by_task(outcome), AGENTS, path)


STUDY = Study(
    name="few-updates",
    question="What do offline agents make of a small data set, in few updates of small networks?",
    prediction=(
        "On both sets P3O offline, whose advantages are the data's lambda-returns, ends clearly above cloning and "
        "clearly above AWAC, IQL and TD3+BC, whose critics are young, and not clearly below AWR, whose advantages are "
        "lambda-returns too."
    ),
    jobs=jobs,
    judge=judge,
    draw=draw,
)
