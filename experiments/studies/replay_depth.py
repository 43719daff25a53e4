"""What is left of a return when twelve thirteenths of what an iteration learns from are old?

P3O and PPO with three clip ranges, with only fresh data and with the last twelve rollouts added, at equal numbers of
updates and env steps. All correct replayed returns with Retrace, which the study `correction` found to cost nothing on
this task with three rollouts, and P3O has iterations as long as PPO's (`iteration-length`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.studies.iteration_length import QUICK_SHORT, SHORT
from experiments.studies.study import Finals, Outcome, Study, Verdict, difference, draw_kept, kept, level
from experiments.suites import SMALL, SMOKE, Job

DEPTHS = (0, 12)
CLIPS = (0.2, 0.4, 0.6)
_QUICK: Any = {**SMOKE, "env": "Pendulum-v1", "seeds": range(2)}
_WHOLE: Any = {"env": "HalfCheetah-v5", "steps": 300_000}


def jobs(quick: bool) -> tuple[Job, ...]:
    made = []
    for depth in DEPTHS:
        base: dict[str, Any] = {**(SMALL if quick else {}), "replay": depth, "correction": "retrace"}
        how = {**(_QUICK if quick else _WHOLE), "label": f"replay {depth}"}
        made.append(Job("p3o", **{**how, "settings": base | (QUICK_SHORT if quick else SHORT)}))
        made.append(Job("ppo", **{**how, "settings": base, "sweep": {"clip": CLIPS[:1] if quick else CLIPS}}))
    return tuple(made)


def _by_method(outcome: Outcome) -> dict[str, dict[int, Finals]]:
    """method, with its clip -> depth -> final returns"""
    found: dict[str, dict[int, Finals]] = {}
    for (job, label), finals in outcome.items():
        found.setdefault(label, {})[int(job.removeprefix("replay "))] = finals
    return found


def judge(outcome: Outcome) -> Verdict:
    methods, deep = _by_method(outcome), max(DEPTHS)
    left = {name: kept(of[deep], of[0]) for name, of in methods.items()}
    sentences = [f"{name} keeps {d} % of its return with fresh data alone" for name, d in left.items()]
    p3o = methods.pop("p3o")
    for name, of in methods.items():
        sentences.append(f"with old data P3O less {name}: {difference(p3o[deep], of[deep], comparisons=len(methods))}")
    sentences.append(f"those differences in intervals that hold together for {len(methods)} comparisons")
    best = max(methods, key=lambda name: level(methods[name][deep]).value)
    sentences.append(f"best clip with old data: {best}")
    if left["p3o"].high < 80.0 or left[best].low > 70.0:
        return Verdict("refuted", tuple(sentences))
    as_said = left["p3o"].low >= 80.0 and left[best].high < 70.0
    return Verdict("supported" if as_said else "undecided", tuple(sentences))


def draw(outcome: Outcome, path: Path) -> None:
    rows = {name: kept(of[max(DEPTHS)], of[0]) for name, of in _by_method(outcome).items()}
    draw_kept(rows, "the return with fresh data alone", path)


STUDY = Study(
    name="replay-depth",
    question="What is left of a return when twelve thirteenths of what an iteration learns from are old?",
    prediction=(
        "P3O keeps at least 80 % of its return with fresh data alone, and the best of three clip ranges with old data "
        "loses more than 30 % of its own."
    ),
    jobs=jobs,
    judge=judge,
    draw=draw,
)
