"""How should the returns of replayed data be corrected?

A quarter of what P3O learns from is fresh, the rest is from the three rollouts before. Targets are recomputed under the
current policy and value, in one of four ways (`ess_rl.returns.corrected`), and compared with using only fresh data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.studies.study import (
    Estimate,
    Outcome,
    Study,
    Verdict,
    by_task,
    difference,
    draw_kept,
    kept,
    level,
    normalized,
)
from experiments.suites import SMALL, SMOKE, Job

TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
CORRECTIONS = ("none", "vtrace", "retrace", "ess")
_QUICK: Any = {**SMOKE, "seeds": range(2)}


def jobs(quick: bool) -> tuple[Job, ...]:
    made = []
    for env in ("Pendulum-v1", "ess/LQR-v0") if quick else TASKS:
        how: Any = _QUICK if quick else {"steps": 300_000}
        base = SMALL if quick else {}
        made.append(Job("p3o", env, **{**how, "settings": base, "label": "fresh"}))
        for correction in CORRECTIONS:
            settings = {**base, "replay": 3, "correction": correction}
            made.append(Job("p3o", env, **{**how, "settings": settings, "label": correction}))
    return tuple(made)


def judge(outcome: Outcome) -> Verdict:
    sentences, beaten, vtrace_below = [], [], []
    comparisons = len(by_task(outcome)) * len(CORRECTIONS[1:])
    for env, of in by_task(outcome).items():
        for other in CORRECTIONS[1:]:
            d = difference(of["none"], of[other], comparisons=comparisons)
            sentences.append(f"{env}: none less {other}: {d}")
            beaten += [f"{env} ({other})"] if d.high < 0.0 else []
            vtrace_below += [env] if other == "vtrace" and d.low > 0.0 else []
        sentences.append(f"{env}: none less fresh data alone: {difference(of['none'], of['fresh'])}")
    sentences.append(f"all but those to fresh data in intervals that hold together for {comparisons} comparisons")
    for name in ("fresh", *CORRECTIONS):
        scores = np.stack([normalized(env, of[name]) for env, of in by_task(outcome).items()], axis=1)
        sentences.append("over all tasks, normalized: {} {:.2f} [{:.2f}, {:.2f}]".format(name, *level(scores)))
    sentences.append(f"V-trace clearly below none: {', '.join(vtrace_below) or 'nowhere'}")
    if beaten:
        return Verdict("refuted", (*sentences, f"none is clearly below: {', '.join(beaten)}"))
    return Verdict("supported" if vtrace_below else "undecided", tuple(sentences))


def draw(outcome: Outcome, path: Path) -> None:
    rows: dict[str, Estimate] = {}
    for env, of in by_task(outcome).items():
        rows |= {f"{env} {label}": kept(of[label], of["fresh"]) for label in CORRECTIONS}
    draw_kept(rows, "the return with fresh data alone", path)


STUDY = Study(
    name="correction",
    question="How should the returns of replayed data be corrected?",
    prediction=(
        "Left uncorrected, under the present value, they are on no task clearly worse than with V-trace, Retrace or "
        "traces scaled by the ESS; V-trace, whose bars cut the traces short, is clearly worse on at least one."
    ),
    jobs=jobs,
    judge=judge,
    draw=draw,
)
