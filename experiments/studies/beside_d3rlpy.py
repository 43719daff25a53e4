"""Do four offline agents end where d3rlpy's end, with equal data and hyperparameters?

From equal parameters and data, an update equals d3rlpy's except for what `experiments.peers.d3rlpy` lists; this is
tested by tests/experiments/test_d3rlpy.py. Here each library initializes its own parameters and draws its own
minibatches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.studies.few_updates import by_task
from experiments.studies.study import Outcome, Study, Verdict, difference, draw_levels, level
from experiments.suites import RANDOM, SMALL_SETS, Job

# Hyperparameters that are not an agent's defaults: d3rlpy's AWAC has only softmax weights, and our IQL imitated actions
# as they were sampled when the study was carried out.
AGENTS: dict[str, dict[str, Any]] = {
    "bc": {},
    "awac": {"weights": "softmax"},
    "iql": {"imitates": "sampled"},
    "td3_bc": {},
}
PEER = "d3rlpy-"
WITHIN = 6  # of the eight pairs


def jobs(quick: bool) -> tuple[Job, ...]:
    sets = {RANDOM: ("Pendulum-v1", "")} if quick else SMALL_SETS
    how: Any = {"steps": 10_000}
    numbers: dict[str, Any] = {"hidden": (64, 64), "learning_rate": 1e-3}
    if quick:
        how = {"seeds": range(2), "steps": 40, "options": {"episodes": 2}}
        numbers = {"hidden": (8, 8), "minibatch": 32}
    made = []
    for dataset, (env, _) in sets.items():
        for agent, more in AGENTS.items():
            made.append(Job(agent, env, dataset=dataset, settings={**numbers, **more}, **how))
            made.append(Job(PEER + agent, env, dataset=dataset, settings=numbers, **how))
    return tuple(made)


def judge(outcome: Outcome) -> Verdict:
    tasks, sentences, found, within = by_task(outcome), [], [], 0
    comparisons = len(tasks) * len(AGENTS)
    for task, of in tasks.items():
        for agent in AGENTS:
            (ours, *_), (theirs, low, high) = level(of[agent]), level(of[PEER + agent])
            d = difference(of[agent], of[PEER + agent], comparisons=comparisons)
            found.append(d)
            within += low <= ours <= high
            sentences.append(
                f"{task} {agent}: {ours:.0f}, d3rlpy's {theirs:.0f} [{low:.0f}, {high:.0f}]; less that {d}".strip()
            )
    sentences.append(f"in intervals that hold together for all {comparisons} comparisons; {within} within d3rlpy's own")
    if any(d.high < 0.0 or d.low > 0.0 for d in found):
        return Verdict("refuted", tuple(sentences))
    return Verdict("supported" if within >= WITHIN else "undecided", tuple(sentences))


def draw(outcome: Outcome, path: Path) -> None:
    draw_levels(by_task(outcome), [name for agent in AGENTS for name in (agent, PEER + agent)], path)


STUDY = Study(
    name="beside-d3rlpy",
    question="Do bc, awac, iql and td3_bc end where d3rlpy's end, with equal data and equal numbers?",
    prediction=(
        "On two small sets none of eight pairs is clearly apart, and in at least six of them the IQM of ours lies "
        "within the 95 % interval of d3rlpy's."
    ),
    jobs=jobs,
    judge=judge,
    draw=draw,
)
