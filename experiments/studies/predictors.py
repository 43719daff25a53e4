"""Does the ESS, or HINT's Affinity, predict better than the KL what an update gains?

After an iteration's updates, its data tell how far the policy has moved from the behavior policy, which is older by the
lag and one iteration: the ESS, Affinity, the KL to the behavior. Here each is compared with what these updates gained:
the mean return of the first rollout in which the new policy acts, minus that of the rollout before. Rollouts hold whole
episodes, so each return is of one policy; lags begin at 1, because without a lag the return before is that of the very
data that the predictors are measured on, and would share their noise.

Measured for each seed: Spearman's partial rank correlation of each with the gain, over all updates of its run, given
the number of the iteration (gains shrink and policies slow down during training, which predicts nothing).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments import records, statistics
from experiments.studies.study import Estimate, Finals, Outcome, Study, Verdict, dots, picture
from experiments.suites import SMALL, SMOKE, Job

TASKS = ("Pendulum-v1", "Reacher-v5")
LAGS = (1, 4, 16)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {"P3O": ("p3o", {}), "PPO": ("ppo", {"minibatch": 128})}
WHOLE_EPISODES = {"rollout": 200}  # one of Pendulum or four of Reacher in each environment
PREDICTORS = ("ess_end", "ess_end_advantage", "affinity_end", "behavior_kl_end")
NAMES = ("ESS", "ESS of rho |A|", "Affinity", "KL")
MARGIN = 0.05  # of rank correlations, below which a difference counts as none


def jobs(quick: bool) -> tuple[Job, ...]:
    made = []
    for env in TASKS[:1] if quick else TASKS:
        for lag in LAGS[:2] if quick else LAGS:
            for name, (agent, changes) in METHODS.items():
                how: Any = {**SMOKE, "seeds": range(2), "steps": 32_000} if quick else {"steps": 300_000}
                small = {**SMALL, "minibatch": 80} if quick else {}
                settings = {**changes, **small, **WHOLE_EPISODES, "lag": lag}
                made.append(Job(agent, env, **{**how, "settings": settings, "label": f"{name} lag {lag}"}))
    return tuple(made)


def correlations(run: Path, members: Sequence[int]) -> Finals:
    """[members, predictors]: rank correlation of each predictor with the gain of the updates before its measurement,
    given the number of the iteration."""
    rows, lag = list(records.metrics(run)), records.read_config(run)["config"]["lag"]
    returns = np.array([np.divide(row["return_sum"], row["episodes"]) for row in rows])  # [iterations, P]
    gain = np.diff(returns, axis=0)[lag:]  # of iteration i's updates: the return of i + 1 + lag minus the one before
    after = np.array([[row[name] for name in PREDICTORS] for row in rows[1:]])  # [updates, predictors, P]
    gain, after = gain[1:], after[: len(gain) - 1]  # the first iteration has no updates
    number = np.arange(len(gain), dtype=np.float64)
    return np.array([[_given(x, gain[:, m], number) for x in after[:, :, m].T] for m in members])


def _given(x: NDArray[np.float64], y: NDArray[np.float64], z: NDArray[np.float64]) -> float:
    """Partial rank correlation of x and y [n], given z: (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2) (1 - r_yz^2))."""
    xy, xz, yz = (statistics.rank_correlation(*pair) for pair in ((x, y), (x, z), (y, z)))
    left = (1.0 - xz**2) * (1.0 - yz**2)
    return (xy - xz * yz) / left**0.5 if left > 1e-12 else 0.0


def strengths(rho: NDArray[np.float64]) -> NDArray[np.float64]:
    """How well each predicts, with either sign: [..., seeds, jobs, predictors] -> [..., predictors]."""
    return np.abs(rho.mean(-3)).mean(-2)


def by_chance(rho: NDArray[np.float64]) -> NDArray[np.float64]:
    """The strength [predictors] that 95 % of correlations with random signs, one per seed, stay below."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(2_000, *rho.shape[:2], 1))
    return np.quantile(strengths(signs * rho), 0.95, axis=0)


def more_than_kl(outcome: Outcome) -> dict[str, Estimate]:
    """Strength of each predictor minus that of the KL; the interval resamples seeds, each with all its jobs."""
    rho = np.stack(list(outcome.values()), axis=1)  # [seeds, jobs, predictors]
    again = np.random.default_rng(0).integers(len(rho), size=(2_000, len(rho)))

    def less(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return x[..., :-1] - x[..., -1:]

    low, high = np.quantile(less(strengths(rho[again])), [0.025, 0.975], axis=0)
    values = less(strengths(rho))
    return {name: Estimate(*map(float, d)) for name, *d in zip(NAMES[:-1], values, low, high, strict=True)}


def judge(outcome: Outcome) -> Verdict:
    rho = np.stack(list(outcome.values()), axis=1)
    level, chance = strengths(rho), by_chance(rho)
    sentences = [
        f"{name}: {x:.2f}, mean of {len(outcome)} settings; by chance up to {most:.2f}"
        for name, x, most in zip(NAMES, level, chance, strict=True)
    ]
    for (job, _), rho in outcome.items():
        means = ", ".join(f"{name} {x:+.2f}" for name, x in zip(NAMES, rho.mean(0), strict=True))
        sentences.append(f"{job}: {means}")
    found = more_than_kl(outcome)
    sentences += [f"{name} less the KL: {d.value:+.2f} [{d.low:+.2f}, {d.high:+.2f}]" for name, d in found.items()]
    asked = [found["ESS"], found["Affinity"]]
    if all(level <= chance):
        return Verdict("undecided", (*sentences, "nothing foretells a gain better than chance"))
    if any(d.value >= MARGIN and d.low > 0.0 for d in asked):
        return Verdict("supported", tuple(sentences))
    return Verdict("refuted" if all(d.high < MARGIN for d in asked) else "undecided", tuple(sentences))


def draw(outcome: Outcome, path: Path) -> None:
    with picture(path) as axis:
        dots(axis, {f"{name} less the KL": d for name, d in more_than_kl(outcome).items()})
        axis.axvline(0.0, color="gray", linewidth=0.8)
        axis.axvline(MARGIN, color="gray", linewidth=0.8, linestyle=":")
        axis.set(xlabel="strength with which gains are foretold (95 % interval)")


STUDY = Study(
    name="predictors",
    question="Does the ESS, or HINT's Affinity, foretell better than the KL what an update gains?",
    prediction=(
        "The size of the rank correlation with the change of the return that follows, of P3O and PPO at lags 1, 4 and "
        f"16, is larger for the ESS or for Affinity than for the KL, by {MARGIN} or more."
    ),
    jobs=jobs,
    judge=judge,
    draw=draw,
    quantity="rank_correlation",
    measure=correlations,
)
