"""Does charging the advantage with the divergence help on reused data, and does looking ahead help more (DAPO 2019)?

PPO with only the clip, with the divergence of this step and the next (`c_bar` 0), with that of all following steps
(`c_bar` 0.9), and P3O-DA, whose coefficient is 1 - ESS; all with V-trace for the returns of older data. With replay an
iteration has as many updates as without it, drawn from four times the data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.studies.study import Finals, Outcome, Study, Verdict, difference, dots, level, normalized, picture
from experiments.suites import BY_P3O, SMALL, SMOKE, Job

TASKS = ("HalfCheetah-v5", "Hopper-v5")
REPLAYS = (0, 3)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "PPO": ("ppo", {"correction": "vtrace"}),
    "one step": ("dapo", {"c_bar": 0.0}),
    "multi-step": ("dapo", {}),
    "P3O-DA": ("dapo", BY_P3O),
}
PAIRS = (("multi-step", "one step"), ("one step", "PPO"), ("multi-step", "PPO"), ("P3O-DA", "PPO"))


def jobs(quick: bool) -> tuple[Job, ...]:
    made = []
    for replay in REPLAYS:
        for env in ("Pendulum-v1", "ess/LQR-v0") if quick else TASKS:
            for name, (agent, changes) in METHODS.items():
                how: Any = {**SMOKE, "seeds": range(2)} if quick else {"steps": 300_000}
                settings = {**changes, **(SMALL if quick else {}), "replay": replay}
                made.append(Job(agent, env, **{**how, "settings": settings, "label": f"{name} replay {replay}"}))
    return tuple(made)


def _scores(outcome: Outcome) -> dict[int, dict[str, Finals]]:
    """replay -> method -> normalized final returns [seeds, tasks]; unscaled if a task has no reference"""
    columns: dict[int, dict[str, list[Finals]]] = {}
    for (job, _), finals in outcome.items():
        env, name = job.split(" ", 1)
        name, replay = name.rsplit(" replay ", 1)
        columns.setdefault(int(replay), {}).setdefault(name, []).append(100.0 * normalized(env, finals))
    return {replay: {name: np.stack(of, axis=1) for name, of in rows.items()} for replay, rows in columns.items()}


def judge(outcome: Outcome) -> Verdict:
    found, sentences = {}, []
    for replay, of in _scores(outcome).items():
        for one, other in PAIRS:
            found[replay, one, other] = d = difference(of[one], of[other])
            sentences.append(f"replay {replay}: {one} less {other}, in hundredths: {d}")
    fresh, reused = REPLAYS
    ahead, charged = found[reused, "multi-step", "one step"], found[reused, "one step", "PPO"]
    alike = [found[fresh, *pair] for pair in PAIRS[:3]]  # according to the prediction
    if ahead.low <= 0.0:  # by the letter of the prediction: the interval includes 0, or lies below it
        return Verdict("refuted", tuple(sentences))
    sure = charged.low > 0.0 and all(d.low <= 0.0 <= d.high for d in alike)
    return Verdict("supported" if sure else "undecided", tuple(sentences))


def draw(outcome: Outcome, path: Path) -> None:
    rows = {
        f"{name}, replay {replay}": level(finals)
        for replay, methods in _scores(outcome).items()
        for name, finals in methods.items()
    }
    with picture(path) as axis:
        dots(axis, rows)
        axis.set(xlabel="normalized final return, in hundredths (IQM, 95 % interval)")


STUDY = Study(
    name="divergence",
    question="Does charging the advantage with the divergence of the steps ahead pay on reused data?",
    prediction=(
        "With three older rollouts replayed, the multi-step divergence is clearly above the one-step one, and that "
        "above PPO's clip alone; on fresh data they do not differ. Refuted if the interval of the first difference "
        "includes 0."
    ),
    jobs=jobs,
    judge=judge,
    draw=draw,
)
