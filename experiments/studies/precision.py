"""What is left of a method's return when the network that acts computes in low precision?

The mismatch between trainer and rollout engine: the behavior is recorded as the low-precision network computed it, so
the ESS is below 1 before the first update. P3O has its usual hyperparameters, PPO its customary clip range and the best
of six at this budget (clip-sensitivity). fp16, with three more bits than bf16, lies between bf16 and fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.studies.study import Outcome, Study, Verdict, curve, difference, kept, level, picture
from experiments.suites import SMALL, SMOKE, Job

PRECISIONS = ("fp32", "bf16", "fp8")
CLIPS = (0.2, 0.6)
_QUICK: Any = {**SMOKE, "env": "Pendulum-v1", "seeds": range(2)}
_WHOLE: Any = {"env": "HalfCheetah-v5", "steps": 300_000}


def jobs(quick: bool) -> tuple[Job, ...]:
    made = []
    for precision in PRECISIONS:
        settings = {**(SMALL if quick else {}), "rollout_precision": precision}
        how = {**(_QUICK if quick else _WHOLE), "settings": settings, "label": precision}
        made += [Job("p3o", **how), Job("ppo", **how, sweep={"clip": CLIPS[:1] if quick else CLIPS})]
    return tuple(made)


def _curves(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """method, with its clip -> precision -> final returns"""
    curves: dict[str, dict[str, Any]] = {}
    for (precision, label), finals in outcome.items():
        curves.setdefault(label, {})[precision] = finals
    return curves


def judge(outcome: Outcome) -> Verdict:
    curves = _curves(outcome)
    p3o = curves.pop("p3o")
    sentences, below, comparisons = [], [], len(PRECISIONS) * len(curves)
    for precision in PRECISIONS:
        best = max(curves, key=lambda name: level(curves[name][precision]).value)
        d = difference(p3o[precision], curves[best][precision])
        sentences.append(f"{precision}: P3O less the best clip ({best}): {d}")
        together = {n: difference(p3o[precision], of[precision], comparisons=comparisons) for n, of in curves.items()}
        below += [f"{precision} ({name})" for name, d in together.items() if d.high < 0.0]
    sentences.append(f"in intervals that hold together for all {comparisons} comparisons with a clip:")
    sentences.append(f"P3O is clearly below: {', '.join(below) or 'nowhere'}")
    left = kept(p3o["fp8"], p3o["fp32"])
    sentences.append(f"P3O keeps {left} % of its return at fp8")
    sentences += [f"{name} keeps {kept(of['fp8'], of['fp32'])} % of its return at fp8" for name, of in curves.items()]
    if below or left.high < 80.0:
        return Verdict("refuted", tuple(sentences))
    return Verdict("supported" if left.low >= 80.0 else "undecided", tuple(sentences))


def draw(outcome: Outcome, path: Path) -> None:
    with picture(path) as axis:
        for name, of in _curves(outcome).items():
            curve(axis, PRECISIONS, [level(of[precision]) for precision in PRECISIONS], label=name)
        axis.set(xlabel="precision of the acting network", ylabel="final return (IQM, 95 % interval)")


STUDY = Study(
    name="precision",
    question="What is left of a method's return when the network that acts computes in low precision?",
    prediction=(
        "P3O keeps at least 80 % of its return when fp8 acts, and at no precision is it clearly below either of two "
        "clip ranges."
    ),
    jobs=jobs,
    judge=judge,
    draw=draw,
)
