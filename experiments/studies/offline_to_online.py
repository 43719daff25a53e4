"""Does a data set as old replay halve the env steps that P3O needs?

The set is from a partially trained policy (`medium`, a policy after 300k steps). Its rollouts fill P3O's replay when
training begins, and fresh ones replace them one by one. Six rollouts: for a run's own data, the ESS at an age of five
iterations is still above 0.9, while twelve rollouts, uncorrected, cost a third of the final return (ess-against-age).

Read from training curves, averaged over the last tenth of the budget at every point. One question is when the run with
data reaches the end of the run from scratch; the other, how far a seed falls after it has first reached the mean return
of the data set itself: a policy that begins at random cannot fall before that.

In addition, and outside the prediction, chord imitates the same set while it acts, with P3O's objective: the available
way to begin near the policy that collected the data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.studies.learning_curves import curves, draw_when, reached
from experiments.studies.study import Finals, Outcome, Study, Verdict, level
from experiments.suites import BY_P3O, DATA_SETS, RANDOM, SMALL, SMOKE, Job

SETS = tuple(name for name in DATA_SETS if name.endswith("/medium-v0"))
SCRATCH, REPLAYED, IMITATED = "scratch", "old replay", "imitation"
REPLAY = 6
SHARE = 50.0  # % of the steps
FALL = 0.1  # largest fall below the data's own return, as a share of it
DATA = "data set"


def jobs(quick: bool) -> tuple[Job, ...]:
    how: Any = {**SMOKE, "seeds": range(2)} if quick else {"steps": 500_000}
    base: Any = SMALL if quick else {}
    made = []
    for dataset, env in _tasks(quick).items():
        of_arm: dict[str, tuple[str, dict[str, Any]]] = {
            SCRATCH: ("p3o", base),
            REPLAYED: ("p3o", {**base, "replay": 1 if quick else REPLAY, "replay_from": dataset}),
            IMITATED: ("chord", {**BY_P3O, **base, "demonstrations": dataset}),
        }
        for label, (agent, settings) in of_arm.items():
            made.append(Job(agent, env, **{**how, "settings": settings, "label": label}))
    return tuple(made)


def _tasks(quick: bool) -> dict[str, str]:
    """Data set -> env."""
    return {RANDOM: "Pendulum-v1"} if quick else {name: DATA_SETS[name][0] for name in SETS}


def returns_of_sets(quick: bool) -> Outcome:
    """(env, "data set") -> [1, 1], the mean return of the data set's episodes."""
    from envs import minari_data

    found = {}
    for name, env in _tasks(quick).items():
        data = minari_data.load(name, say=print)
        total = data.transitions.reward.double().sum().item()
        found[env, DATA] = np.array([[total / len(data.starts)]])
    return found


def lowest(curve: Finals, of_data: float) -> Finals:
    """Lowest return [seeds] of curves [seeds, K] once they have reached `of_data`, minus `of_data`.

    In % of the magnitude of `of_data`. NaN for a seed that never gets there.
    """
    after = np.logical_or.accumulate(curve >= of_data, axis=1)  # comparisons with NaN are False
    least = np.where(after & ~np.isnan(curve), curve, np.inf).min(1)
    return np.where(np.isinf(least), np.nan, 100.0 * (least - of_data) / abs(of_data))


def _arms(outcome: Outcome) -> tuple[dict[str, float], dict[str, dict[str, Finals]]]:
    """-> (mean return of the data set by env, curves by env and arm)"""
    of_data = {env: float(x[0, 0]) for (env, kind), x in outcome.items() if kind == DATA}
    arms: dict[str, dict[str, Finals]] = {env: {} for env in of_data}
    for (job, kind), x in outcome.items():
        if kind != DATA:
            (env,) = [env for env in of_data if job.startswith(f"{env} ")] or of_data  # a single task is not named
            arms[env][job.removeprefix(f"{env} ")] = x
    return of_data, arms


def judge(outcome: Outcome) -> Verdict:
    of_data, arms = _arms(outcome)
    sentences, wrong, open_ = [], [], []
    for env, of_arm in arms.items():
        for label in (REPLAYED, IMITATED):
            when, falls = reached(of_arm[label], of_arm[SCRATCH]), lowest(of_arm[label], of_data[env])
            there = falls[~np.isnan(falls)]
            sentences.append(
                f"{env}, {label}: the end of {SCRATCH} at {when.value:.0f} [{when.low:.0f}, {when.high:.0f}] % of the "
                f"steps; {len(there)} of {len(falls)} seeds reach the data's {of_data[env]:.0f}"
            )
            fall = level(there) if len(there) > 1 else None
            if fall:
                sentences[-1] += f", then at the lowest {fall} % to it"
            if label != REPLAYED:
                continue
            if when.low > SHARE:
                wrong.append(f"{env}: too late")
            elif when.high > SHARE:
                open_.append(f"{env}: when")
            if fall is None or len(there) < len(falls) or fall.low < -100.0 * FALL <= fall.high:
                open_.append(f"{env}: how far it falls")
            elif fall.high < -100.0 * FALL:
                wrong.append(f"{env}: falls too far")
    sentences.append(f"against the prediction: {', '.join(wrong) or 'nothing'}; open: {', '.join(open_) or 'nothing'}")
    return Verdict("refuted" if wrong else "undecided" if open_ else "supported", tuple(sentences))


def draw(outcome: Outcome, path: Path) -> None:
    found = {
        f"{env}\n{label}": reached(of_arm[label], of_arm[SCRATCH])
        for env, of_arm in _arms(outcome)[1].items()
        for label in (REPLAYED, IMITATED)
    }
    draw_when(found, SHARE, "the run from scratch's", path)


STUDY = Study(
    name="offline-to-online",
    question="Does a data set as old replay halve the env steps that P3O needs, and does it keep what the data had?",
    prediction=(
        "From a medium set as old replay P3O reaches with 250k env steps what it reaches from scratch with 500k, on "
        "HalfCheetah, Hopper and Walker2d, and having reached the set's own return never falls more than 10 % below it."
    ),
    jobs=jobs,
    judge=judge,
    draw=draw,
    quantity="training_return",
    measure=curves,
    compute=returns_of_sets,
)
