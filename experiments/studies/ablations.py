"""Which part of P3O does the work, on data of a policy four iterations old?

Variants: only the cap, only the KL, other caps, other KLs, and e of the whole batch instead of the minibatch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.studies.study import Outcome, Study, Verdict, difference, dots, level, picture
from experiments.suites import SMALL, SMOKE, Job

WHOLE = "both"
VARIANTS: dict[str, dict[str, Any]] = {
    WHOLE: {},
    "cap alone": {"pull": 0.0},
    "KL alone": {"cap": 1e9},
    "cap 1": {"cap": 1.0},
    "cap per dim": {"cap": "ess_per_dim"},
    "KL reverse": {"behavior_kl": "reverse"},
    "KL k3": {"behavior_kl": "k3"},
    "ESS of batch": {"ess": "batch"},
}
EXPECTED_BELOW = ("cap alone", "KL k3")
_QUICK: Any = {**SMOKE, "env": "Pendulum-v1", "seeds": range(2)}
_WHOLE: Any = {"env": "HalfCheetah-v5", "steps": 500_000}


def jobs(quick: bool) -> tuple[Job, ...]:
    made = []
    for label, changes in VARIANTS.items():
        settings = {**(SMALL if quick else {}), "lag": 4, **changes}
        made.append(Job("p3o", **{**(_QUICK if quick else _WHOLE), "settings": settings, "label": label}))
    return tuple(made)


def judge(outcome: Outcome) -> Verdict:
    finals = {job: of for (job, _), of in outcome.items()}
    to_whole = {label: difference(of, finals[WHOLE]) for label, of in finals.items() if label != WHOLE}
    sentences = [f"{label} less both: {d}" for label, d in to_whole.items()]
    above = [label for label, d in to_whole.items() if d.low > 0.0]
    below = [label for label, d in to_whole.items() if d.high < 0.0]
    sentences.append(f"clearly above: {', '.join(above) or 'none'}; clearly below: {', '.join(below) or 'none'}")
    if above:
        return Verdict("refuted", tuple(sentences))
    return Verdict("supported" if set(EXPECTED_BELOW) <= set(below) else "undecided", tuple(sentences))


def draw(outcome: Outcome, path: Path) -> None:
    with picture(path) as axis:
        dots(axis, {job: level(of) for (job, _), of in outcome.items()})
        axis.set(xlabel="final return (IQM, 95 % interval)")


STUDY = Study(
    name="ablations",
    question="Which part of P3O does the work, on data of a policy four iterations old?",
    prediction=(
        "No variant is clearly better than P3O as it is; without the KL, and with the sampled k3 in place of the "
        "closed form, it is clearly worse."
    ),
    jobs=jobs,
    judge=judge,
    draw=draw,
)
