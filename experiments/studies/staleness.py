"""What is left of a method's return when the policy that acts is K iterations old?

The same lag for all: the acting parameters and statistics are those of K iterations before, recorded with every sample.
P3O has its usual hyperparameters, PPO four clip ranges, and the two variants of PPO designed for old data (decoupled
PPO, the fixed band) their usual clip of 0.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.studies.study import Outcome, Study, Verdict, curve, difference, kept, level, picture
from experiments.suites import SMALL, SMOKE, Job

LAGS = (0, 1, 2, 4, 8, 16)
CLIPS = (0.1, 0.2, 0.4, 0.6)
METHODS: dict[str, dict[str, Any]] = {
    "p3o": {"agent": "p3o"},
    "ppo": {"agent": "ppo", "sweep": {"clip": CLIPS}},
    "decoupled": {"agent": "ppo", "settings": {"objective": "decoupled"}},
    "band": {"agent": "ppo", "settings": {"objective": "band"}},
}
_QUICK: Any = {**SMOKE, "env": "Pendulum-v1", "seeds": range(2)}
_WHOLE: Any = {"env": "HalfCheetah-v5", "steps": 300_000}


def jobs(quick: bool) -> tuple[Job, ...]:
    if quick:
        return under_lags(METHODS, (0, 2), _QUICK, SMALL)
    return under_lags(METHODS, LAGS, _WHOLE, {})


def under_lags(
    methods: Mapping[str, Any], lags: Sequence[int], how: Mapping[str, Any], common: Mapping[str, Any]
) -> tuple[Job, ...]:
    """Jobs for each method at each lag: `how` applies to every job, `common` to the settings of every job."""
    made = []
    for lag in lags:
        for name, method in methods.items():
            settings = {**common, **method.get("settings", {}), "lag": lag}
            made.append(Job(**{**how, **method, "settings": settings, "label": f"{name} lag {lag}"}))
    return tuple(made)


def _curves(outcome: Outcome) -> dict[str, dict[int, Any]]:
    """method, with its clip -> lag -> final returns"""
    curves: dict[str, dict[int, Any]] = {}
    for (job, label), finals in outcome.items():
        name, lag = job.rsplit(" lag ", 1)
        curves.setdefault(label if name in ("p3o", "ppo") else name, {})[int(lag)] = finals
    return curves


def judge(outcome: Outcome) -> Verdict:
    curves = _curves(outcome)
    p3o, clips = curves["p3o"], {name: of for name, of in curves.items() if name.startswith("ppo clip")}
    sentences, below, never_worse, comparisons = [], [], set(clips), len(p3o) * len(clips)
    for lag in sorted(p3o):
        best = max(clips, key=lambda name: level(clips[name][lag]).value)
        sentences.append(f"lag {lag}: P3O less the best clip ({best}): {difference(p3o[lag], clips[best][lag])}")
        together = {name: difference(p3o[lag], of[lag], comparisons=comparisons) for name, of in clips.items()}
        below += [f"{lag} ({name})" for name, d in together.items() if d.high < 0.0]
        never_worse -= {name for name, d in together.items() if d.low > 0.0}
    first, last = min(p3o), max(p3o)
    learned = {name: of for name, of in curves.items() if level(of[first]).value > 0.0}
    left = {name: kept(of[last], of[first]) for name, of in learned.items()}
    sentences += [f"{name} learns nothing from fresh data either" for name in curves if name not in learned]
    sentences += [
        f"{name} keeps {d.value:.0f} [{d.low:.0f}, {d.high:.0f}] % of its return at lag {last}"
        for name, d in left.items()
    ]
    lost = [name for name in clips if name in left and left[name].high < 70.0]
    sentences += [
        f"in intervals that hold together for all {comparisons} comparisons with a clip:",
        f"lags at which P3O is clearly below: {', '.join(below) or 'none'}",
        f"clips never clearly worse than P3O: {', '.join(sorted(never_worse)) or 'none'}",
    ]
    if below:
        return Verdict("refuted", tuple(sentences))
    return Verdict("supported" if lost and not never_worse else "undecided", tuple(sentences))


def draw(outcome: Outcome, path: Path) -> None:
    with picture(path) as axis:
        for name, of_lag in _curves(outcome).items():
            lags = sorted(of_lag)
            width = 2.5 if name == "p3o" else 1.2
            curve(axis, [str(lag) for lag in lags], [level(of_lag[lag]) for lag in lags], label=name, linewidth=width)
        axis.set(xlabel="iterations by which the acting policy is old", ylabel="final return (IQM, 95 % interval)")


STUDY = Study(
    name="staleness",
    question="What is left of a method's return when the policy that acts is K iterations old?",
    prediction=(
        "At no lag up to 16 is P3O clearly below the best clip range for that lag, no single clip range keeps up with "
        "it at all lags, and at least one loses more than 30 % of its return at lag 16."
    ),
    jobs=jobs,
    judge=judge,
    draw=draw,
)
