"""Do hints find a reward that is paid only at the goal, and does Affinity protect what was learned from them (HINT)?

A sparse task's final return is the share of its evaluation episodes that reach the goal, from the task's own starts. An
agent has learned the task if that share is above 80 %. Affinity^lambda weights the samples of hinted episodes; lambda 0
counts them like all others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments import statistics
from experiments.studies.study import Estimate, Finals, Outcome, Study, Verdict, difference, dots, level, picture
from experiments.suites import SMALL, SMOKE, Job

TASKS = ("ess/MountainCarContinuousSparse-v0", "ess/TwoLinkArmSparse-v0")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "PPO": ("ppo", {}),
    "PPO with hints": ("ppo", {"hints": 8, "hint_lambda": 0.0}),
    "PPO with hints by Affinity": ("ppo", {"hints": 8}),
    "P3O": ("p3o", {}),
    "P3O with hints by Affinity": ("p3o", {"hints": 8}),
}
HINTED = [name for name in METHODS if "hints" in name]
LEARNED = 80.0  # % of episodes


def jobs(quick: bool) -> tuple[Job, ...]:
    made = []
    for env in TASKS[1:] if quick else TASKS:
        for label, (agent, changes) in METHODS.items():
            how: Any = {**SMOKE, "seeds": range(2)} if quick else {"steps": 300_000, "seeds": range(20, 40)}
            settings = {**(SMALL if quick else {}), **changes} | ({"hints": 4} if quick and label in HINTED else {})
            made.append(Job(agent, env, **{**how, "settings": settings, "label": label}))
    return tuple(made)


def success(finals: Finals) -> Estimate:
    """Mean share of episodes that reach the goal, in %, with its interval. Seeds succeed or fail: no IQM."""
    return level(100.0 * finals, statistics.mean)


def _by_task(outcome: Outcome) -> dict[str, dict[str, Finals]]:
    """task -> method -> final returns"""
    found: dict[str, dict[str, Finals]] = {}
    for (job, _), finals in outcome.items():
        env, method = job.split(" ", 1) if job.split(" ")[0] in TASKS else (TASKS[1], job)
        found.setdefault(env, {})[method] = finals
    return found


def judge(outcome: Outcome) -> Verdict:
    sentences, against, holds = [], [], []
    learned: dict[str, list[Estimate]] = {name: [] for name in METHODS if name not in HINTED}
    for env, finals in _by_task(outcome).items():
        levels = {name: success(of) for name, of in finals.items()}
        sentences += [f"{env}, {name}: {d.value:.0f} [{d.low:.0f}, {d.high:.0f}] %" for name, d in levels.items()]
        by_affinity, plainly = (100.0 * finals[name] for name in ("PPO with hints by Affinity", "PPO with hints"))
        weighed = difference(by_affinity, plainly, estimator=statistics.mean)
        sentences.append(f"{env}: hints by Affinity less hints counted like all: {weighed} points")
        against += [name for name in HINTED if levels[name].high < LEARNED]
        against += ["Affinity"] if weighed.high < 0.0 else []
        holds += [levels[name].low > LEARNED for name in HINTED]
        for name, on in learned.items():
            on.append(levels[name])
    for name, on in learned.items():  # without hints: not on both
        against += [name] if all(of.low > LEARNED for of in on) else []
        holds += [any(of.high < LEARNED for of in on)]
    if against:
        sentences.append(f"against the prediction: {', '.join(dict.fromkeys(against))}")
        return Verdict("refuted", tuple(sentences))
    return Verdict("supported" if all(holds) else "undecided", tuple(sentences))


def draw(outcome: Outcome, path: Path) -> None:
    rows = {
        f"{env.split('/')[1].removesuffix('-v0')}: {name}": success(finals)
        for env, methods in _by_task(outcome).items()
        for name, finals in methods.items()
    }
    with picture(path) as axis:
        dots(axis, rows)
        axis.axvline(LEARNED, color="gray", linewidth=0.8)
        axis.set(xlabel="% of evaluation episodes that reach the goal (mean, 95 % interval)", xlim=(-3.0, 103.0))


STUDY = Study(
    name="hints",
    question="Do hints find a reward that is paid at the goal alone?",
    prediction=(
        "Within 300k steps only agents with hints reach the goal of both sparse tasks in more than 80 % of episodes, "
        "and weighing hinted samples by Affinity is not clearly worse than counting them like all others."
    ),
    jobs=jobs,
    judge=judge,
    draw=draw,
)
