"""What is left of a return under a lag, where P3O's iterations are as long as PPO's?

The study staleness refuted its prediction with P3O's own iterations, twice as long as PPO's; the study
iteration-length then found that iterations half as long keep far more of the return, and in hindsight those runs were
nowhere clearly below the best clip range. So this tests the first study's prediction once more, with PPO's rollout and
minibatch for all, on seeds for which nobody has looked at any run under a lag.
"""

from __future__ import annotations

from typing import Any

from experiments.studies import staleness
from experiments.studies.iteration_length import QUICK_SHORT, SHORT
from experiments.studies.study import Study
from experiments.suites import SMALL, SMOKE, Job

METHODS: dict[str, dict[str, Any]] = {
    "p3o": {"agent": "p3o"},
    "ppo": {"agent": "ppo", "sweep": {"clip": (0.2, 0.4, 0.6)}},
    "decoupled": {"agent": "ppo", "settings": {"objective": "decoupled"}},
}


def jobs(quick: bool) -> tuple[Job, ...]:
    whole: Any = {"env": "HalfCheetah-v5", "steps": 300_000, "seeds": range(10, 20)}
    how = {**SMOKE, "env": "Pendulum-v1", "seeds": range(2)} if quick else whole
    alike = {**SMALL, **QUICK_SHORT} if quick else SHORT  # these are PPO's defaults
    return staleness.under_lags(METHODS, (0, 2) if quick else staleness.LAGS, how, alike)


STUDY = Study(
    name="equal-iterations",
    question="What is left of a return under a lag, where P3O's iterations are as long as PPO's?",
    prediction=(
        "At no lag up to 16 is P3O clearly below the best clip range for that lag, no single clip range keeps up with "
        "it at all lags, and at least one loses more than 30 % of its return at lag 16."
    ),
    jobs=jobs,
    judge=staleness.judge,
    draw=staleness.draw,
)
