"""Does a loss without a ratio cope better with old data (trajectory balance, TBA)?

TBA's residual is 0 for the right policy whatever the behavior, so staleness should cost it nothing; a policy gradient
that treats old data as fresh (weight 1 for every sample: a fixed band of negligible width) should pay for it. Scores
are normalized: 0 is a random policy, 1 PPO's published return. Lags are in iterations, of 2,048 env steps for TBA and
PPO, 4,096 for P3O, and 3,200 for TBA of groups. The last learns more slowly, so what it keeps is a share of less: it is
reported, not judged. Whether collecting at the same time saves time at equal return is the study `asynchrony`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.studies.study import Estimate, Outcome, Study, Verdict, curve, kept, level, normalized, picture
from experiments.suites import SMALL, SMOKE, Job

TASK = "Pendulum-v1"
LAGS = (1, 4, 16)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "TBA": ("tba", {}),
    "TBA of groups": ("tba_group", {}),
    "P3O": ("p3o", {}),
    "uncorrected": ("ppo", {"objective": "band", "clip": 1e-6}),
}
GROUPS = {"rollout": 200, "group": 2, "minibatch": 80}  # for a quick study: whole episodes
BEARS, PAYS = 95.0, 80.0  # % of the score at the shortest lag that is kept at the longest


def jobs(quick: bool) -> tuple[Job, ...]:
    made = []
    for lag in LAGS[:2] if quick else LAGS:
        for name, (agent, changes) in METHODS.items():
            how: Any = {**SMOKE, "seeds": range(2)} if quick else {"steps": 300_000}
            small = {**SMALL, **(GROUPS if agent == "tba_group" else {})} if quick else {}
            settings = {**small, **changes, "lag": lag}
            made.append(Job(agent, TASK, **{**how, "settings": settings, "label": f"{name} lag {lag}"}))
    return tuple(made)


def _scores(outcome: Outcome) -> dict[str, dict[int, Any]]:
    """method -> lag -> normalized final returns"""
    found: dict[str, dict[int, Any]] = {}
    for (job, _), finals in outcome.items():
        name, lag = job.rsplit(" lag ", 1)
        found.setdefault(name, {})[int(lag)] = normalized(TASK, finals)
    return found


def judge(outcome: Outcome) -> Verdict:
    left: dict[str, Estimate] = {}
    sentences = []
    for name, of_lag in _scores(outcome).items():
        first, last = min(of_lag), max(of_lag)
        levels = ", ".join(f"{level(of_lag[lag]).value:.2f} at lag {lag}" for lag in sorted(of_lag))
        if level(of_lag[first]).value > 0.0:
            left[name] = d = kept(of_lag[last], of_lag[first])
            sentences.append(f"{name}: {levels}; keeps {d.value:.0f} [{d.low:.0f}, {d.high:.0f}] %")
        else:
            sentences.append(f"{name}: {levels}; has nothing to keep")
    tba, uncorrected = left.get("TBA"), left.get("uncorrected")
    if (tba and tba.high < BEARS) or (uncorrected and uncorrected.low > PAYS):
        return Verdict("refuted", tuple(sentences))
    sure = tba and uncorrected and tba.low > BEARS and uncorrected.high < PAYS
    return Verdict("supported" if sure else "undecided", tuple(sentences))


def draw(outcome: Outcome, path: Path) -> None:
    with picture(path) as axis:
        for name, of_lag in _scores(outcome).items():
            lags = sorted(of_lag)
            curve(axis, [str(lag) for lag in lags], [level(of_lag[lag]) for lag in lags], label=name)
        axis.set(xlabel="iterations by which the acting policy is old", ylabel="normalized return (IQM, 95 % interval)")


STUDY = Study(
    name="balance",
    question="Does a loss without a ratio, TBA's, bear old data better than a policy gradient?",
    prediction=(
        "On Pendulum TBA keeps at least 95 % of its normalized return at lag 1 when the lag is 16, and a policy "
        "gradient that takes old data for fresh less than 80 %."
    ),
    jobs=jobs,
    judge=judge,
    draw=draw,
)
