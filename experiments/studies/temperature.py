"""What is left of a method's return when the acting policy is hotter or colder than the learning one?

With a behavior standard deviation T times the policy's, the ESS in each action dimension is, as n goes to infinity,
sqrt(2 T^2 - 1) / T^2: 0.95 at T = 1.2, 0.83 at 0.8, and 0 at and below 1 / sqrt(2) = 0.71, where E[rho^2] is infinite.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.studies.study import Outcome, Study, Verdict, curve, difference, kept, level, picture
from experiments.suites import SMOKE, Job

TEMPERATURES = (0.6, 0.8, 1.0, 1.2, 1.5)
CLIPS = (0.2, 0.6)  # the customary one, and the best of six at this budget (clip-sensitivity)
_QUICK: Any = {**SMOKE, "env": "Pendulum-v1", "seeds": range(2)}
_WHOLE: Any = {"env": "HalfCheetah-v5", "steps": 300_000}


def jobs(quick: bool) -> tuple[Job, ...]:
    how = _QUICK if quick else _WHOLE
    clips = CLIPS[:1] if quick else CLIPS
    heat = {"behavior_temperature": TEMPERATURES}
    return Job("p3o", **how, sweep=heat), Job("ppo", **how, sweep={**heat, "clip": clips})


def _curves(outcome: Outcome) -> dict[str, dict[float, Any]]:
    """method, with its clip -> temperature -> final returns"""
    curves: dict[str, dict[float, Any]] = {}
    for job, label in outcome:
        words = label.split(" ")  # agent, behavior_temperature, its value, and clip with its value if there is one
        curves.setdefault(" ".join([words[0], *words[3:]]), {})[float(words[2])] = outcome[job, label]
    return curves


def judge(outcome: Outcome) -> Verdict:
    curves = _curves(outcome)
    p3o = curves.pop("p3o")
    left = {t: kept(p3o[t], p3o[1.0]) for t in TEMPERATURES if t != 1.0}
    sentences = [f"P3O keeps {d} % of its return at T = {t:g}" for t, d in left.items()]
    for t in TEMPERATURES:
        best = max(curves, key=lambda name: level(curves[name][t]).value)
        sentences.append(f"T = {t:g}: P3O less the best clip ({best}): {difference(p3o[t], curves[best][t])}")
    if left[0.6].low > 70.0 or min(left[0.8].high, left[1.2].high) < 80.0:
        return Verdict("refuted", tuple(sentences))
    as_said = left[0.6].high < 70.0 and min(left[0.8].low, left[1.2].low) >= 80.0
    return Verdict("supported" if as_said else "undecided", tuple(sentences))


def draw(outcome: Outcome, path: Path) -> None:
    with picture(path) as axis:
        for name, of in _curves(outcome).items():
            curve(axis, [f"{t:g}" for t in TEMPERATURES], [level(of[t]) for t in TEMPERATURES], label=name)
        axis.set(xlabel="temperature of the behavior", ylabel="final return (IQM, 95 % interval)")


STUDY = Study(
    name="temperature",
    question="What is left of a method's return when the policy that acts is hotter or colder than the learning one?",
    prediction=(
        "P3O keeps at least 80 % of its return at T = 0.8 and 1.2, and loses more than 30 % at T = 0.6, where the ESS "
        "of a batch is far too high because that of all data is 0."
    ),
    jobs=jobs,
    judge=judge,
    draw=draw,
)
