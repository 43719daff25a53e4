"""Do replayed updates between on-policy ones help, and is it the ESS that makes them help (P3O of 2019)?

Plain A2C; A2C with two replayed updates for each of its own, as published; and with their cap and KL weight fixed
instead of set by the ESS. Read from the training curves, averaged over the last tenth of the budget at every point.
The replay is smaller, and replayed updates begin earlier, than in the paper's code (`agents.p3o_2019` says why).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.studies.learning_curves import curves, draw_when, reached
from experiments.studies.study import Estimate, Outcome, Study, Verdict, by_task, difference
from experiments.suites import SMALL, SMOKE, Job

TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
SHARE = 60.0  # % of A2C's steps
METHODS: dict[str, dict[str, Any]] = {
    "A2C": {"replayed_updates": 0.0},
    "P3O 2019": {},
    "fixed": {"cap": 1.0, "pull": 0.0},
    "fixed cap": {"cap": 1.0},
}


def jobs(quick: bool) -> tuple[Job, ...]:
    made = []
    for env in ("Pendulum-v1", "ess/LQR-v0") if quick else TASKS:
        for label, changes in METHODS.items():
            how: Any = {**SMOKE, "seeds": range(2)} if quick else {"steps": 500_000}
            small = {"replay": 3, "warm_up": 1, "segments": 4} | SMALL if quick else {}
            made.append(Job("p3o_2019", env, **{**how, "settings": {**changes, **small}, "label": label}))
    return tuple(made)


def _when(outcome: Outcome) -> dict[str, Estimate]:
    return {env: reached(of["P3O 2019"], of["A2C"]) for env, of in by_task(outcome).items()}


def judge(outcome: Outcome) -> Verdict:
    sentences, early, ahead, beaten = [], [], [], []
    for env, d in _when(outcome).items():
        sentences.append(f"{env}: A2C's end is reached at {d.value:.0f} [{d.low:.0f}, {d.high:.0f}] % of the steps")
        early += [env] if d.high <= SHARE else []
    for env, of in by_task(outcome).items():
        for name in ("fixed", "fixed cap"):
            d = difference(of["P3O 2019"][:, -1], of[name][:, -1])
            sentences.append(f"{env}: P3O 2019 less {name}, at the end: {d}")
            if name == "fixed":
                ahead += [env] if d.low > 0.0 else []
                beaten += [env] if d.high < 0.0 else []
    late = [env for env, d in _when(outcome).items() if d.low > SHARE]
    tasks = len(by_task(outcome))
    if len(late) > tasks - 2 or len(beaten) > tasks - 2:  # fewer than two are left on which it could hold
        return Verdict("refuted", tuple(sentences))
    sure = len(early) >= 2 and len(ahead) >= 2
    return Verdict("supported" if sure else "undecided", tuple(sentences))


def draw(outcome: Outcome, path: Path) -> None:
    draw_when(_when(outcome), SHARE, "A2C's", path)


STUDY = Study(
    name="interleaving",
    question="Do replayed updates between on-policy ones pay, and is it the ESS that makes them pay?",
    prediction=(
        "P3O of 2019 reaches A2C's final return within 60 % of its steps on at least two of three tasks, and on as "
        "many ends clearly above the same with cap 1 and no KL."
    ),
    jobs=jobs,
    judge=judge,
    draw=draw,
    quantity="training_return",
    measure=curves,
)
