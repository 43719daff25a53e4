"""Does P3O get by with 400,000 env steps where PPO takes a million?

P3O makes four times as many updates per env step here as usual: iterations of 64 steps instead of 256, and 20 epochs
instead of 10. One arm learns from the fresh rollout and the seven before it, with Retrace for their returns; the other
only from the fresh one, in as many updates. All this was chosen on HalfCheetah-v5, with tuning seeds 100 to 104; mean
final return after 400k steps, minibatch 64:

    rollout 128, 10 epochs, replay 3, no correction       5493
    rollout 64, 10 epochs, replay 3, no correction        5500
    rollout 64, 20 epochs, replay 3, no correction        5621
    rollout 64, 20 epochs, replay 3, Retrace              6006
    rollout 64, 20 epochs, replay 7, Retrace              6373
    rollout 64, 20 epochs, replay 15, Retrace             6103

The fifth ended at 2421 on Walker2d-v5, far from PPO's return there after a million steps, and at 45 on Swimmer-v5.
PPO's runs are those of the suite `mujoco`: if you have them, or copy the published ones, they are not trained again
(`cp -r experiments/results/mujoco/ppo-{HalfCheetah,Walker2d,Hopper,Swimmer}-v5 runs/sample-efficiency/`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.studies.study import Estimate, Outcome, Study, Verdict, by_task, difference, draw_kept, kept
from experiments.suites import SMALL, SMOKE, Job

TASKS = ("HalfCheetah-v5", "Walker2d-v5", "Hopper-v5", "Swimmer-v5")
STEPS = 400_000
MORE_UPDATES: dict[str, Any] = {"rollout": 64, "epochs": 20, "minibatch": 64}
ARMS: dict[str, dict[str, Any]] = {"replay": {"replay": 7, "correction": "retrace"}, "fresh": {}}


def jobs(quick: bool) -> tuple[Job, ...]:
    made = []
    for env in ("Pendulum-v1", "ess/LQR-v0") if quick else TASKS:
        how: Any = {**SMOKE, "seeds": range(2)} if quick else {"steps": STEPS}
        base: Any = SMALL if quick else MORE_UPDATES
        made += [Job("p3o", env, **{**how, "settings": base | arm, "label": name}) for name, arm in ARMS.items()]
        made.append(Job("ppo", env, **(how if quick else {})))
    return tuple(made)


def judge(outcome: Outcome) -> Verdict:
    tasks = by_task(outcome)
    sentences, there, missed = [], [], []
    for env, of in tasks.items():
        d = difference(of["replay"], of["ppo"], comparisons=len(tasks))
        sentences.append(f"{env}: with replay less PPO: {d}")
        sentences.append(f"{env}: with replay less fresh data alone: {difference(of['replay'], of['fresh'])}")
        there += [env] if d.value >= 0.0 else []
        missed += [env] if d.high < 0.0 else []
    sentences.append(f"those to PPO in intervals that hold together for {len(tasks)} comparisons")
    sentences.append(f"not below PPO: {', '.join(there) or 'nowhere'}; clearly below: {', '.join(missed) or 'nowhere'}")
    if len(there) >= 2:
        return Verdict("supported", tuple(sentences))
    return Verdict("refuted" if len(tasks) - len(missed) < 2 else "undecided", tuple(sentences))


def draw(outcome: Outcome, path: Path) -> None:
    rows: dict[str, Estimate] = {}
    for env, of in by_task(outcome).items():
        rows |= {f"{env} {arm}": kept(of[arm], of["ppo"]) for arm in ARMS}
    draw_kept(rows, "PPO's return after a million steps", path)


STUDY = Study(
    name="sample-efficiency",
    question="Does P3O with replay get by with 400,000 env steps where PPO takes a million?",
    prediction=(
        "With it P3O's final return is not below that of a million steps of PPO, on at least two of HalfCheetah, "
        "Walker2d, Hopper and Swimmer."
    ),
    jobs=jobs,
    judge=judge,
    draw=draw,
)
