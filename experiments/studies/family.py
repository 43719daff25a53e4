"""The whole family, on fresh data and on data of a policy four and sixteen iterations old.

Every method has its usual hyperparameters; none was tuned for a lag. Lags are in iterations, which are not equally
long: 4096 env steps for P3O, P4O, P3O-DA and V-trace, twice as many as for PPO, its other objectives, DAPO, BPO and
TBA, and 256 for P3O 2019. So P3O's data are as many policies old as PPO's but twice as many env steps; the study
`equal-iterations` makes them equal. P3O appears twice: with its defaults, and, as in its paper, without the limit on
how far an iteration's updates go (keep_ess 0).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments import statistics
from experiments.studies.study import Finals, Outcome, Study, Verdict, difference, level, normalized, picture
from experiments.suites import BY_P3O, SMALL, SMOKE, Job

TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
LAGS = (0, 4, 16)
PAPER = "P3O-paper"  # the same method, so it is compared but not counted
TITLES = {
    PAPER: "P3O, `keep_ess 0`",
    "P3O-2019": "P3O of 2019",
    "decoupled": "PPO, decoupled",
    "GePPO": "PPO, GePPO's clip",
    "band": "PPO, fixed band",
    "KL": "PPO, KL penalty",
    "variance": "PPO, variance penalty",
    "V-trace": "V-trace, nothing limits the policy",
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "P3O": ("p3o", {}),
    PAPER: ("p3o", {"keep_ess": 0.0}),
    "P3O-2019": ("p3o_2019", {}),
    "P4O": ("p4o", {}),
    "P3O-DA": ("dapo", BY_P3O),
    "DAPO": ("dapo", {}),
    "PPO": ("ppo", {}),
    "decoupled": ("ppo", {"objective": "decoupled"}),
    "GePPO": ("ppo", {"objective": "generalized"}),
    "band": ("ppo", {"objective": "band"}),
    "KL": ("ppo", {"objective": "kl"}),
    "variance": ("ppo", {"objective": "variance"}),
    "BPO": ("bpo", {}),
    "TBA": ("tba", {}),
    "V-trace": ("p3o", {"cap": 1.0, "pull": 0.0, "keep_ess": 0.0, "correction": "vtrace"}),  # no limit, as PAPER
}


def jobs(quick: bool) -> tuple[Job, ...]:
    made = []
    for env in ("Pendulum-v1",) if quick else TASKS:
        for lag in (0, 2) if quick else LAGS:
            for name, (agent, changes) in METHODS.items():
                if quick and lag == 0 and name not in ("P3O", "PPO"):
                    continue
                how: Any = {**SMOKE, "seeds": range(2), "steps": 2_048} if quick else {"steps": 300_000}
                settings = {**changes, **(SMALL if quick else {}), "lag": lag}
                made.append(Job(agent, env, **{**how, "settings": settings, "label": f"{name} lag {lag}"}))
    return tuple(made)


def _table(outcome: Outcome) -> dict[int, dict[str, Finals]]:
    """lag -> method -> normalized final returns [seeds, tasks]; raw returns if a task has no reference."""
    columns: dict[int, dict[str, list[Finals]]] = {}
    for (job, _), finals in outcome.items():
        name, lag = job.rsplit(" lag ", 1)
        env, _, name = name.rpartition(" ")
        columns.setdefault(int(lag), {}).setdefault(name, []).append(normalized(env, finals))
    return {lag: {name: np.stack(of, axis=1) for name, of in rows.items()} for lag, rows in columns.items()}


def judge(outcome: Outcome) -> Verdict:
    sentences, above, below = [], [], []
    table = _table(outcome)
    comparisons = sum(len(of) - 1 for of in table.values())
    for lag in sorted(table):
        p3o = table[lag]["P3O"]
        sentences.append(f"lag {lag}: P3O's normalized IQM is {float(statistics.iqm(p3o)):.2f}")
        for name, scores in table[lag].items():
            if name == "P3O":
                continue
            d = difference(100.0 * scores, 100.0 * p3o, comparisons=comparisons)
            sentences.append(f"lag {lag}: {name} less P3O, in hundredths: {d}")
            if name == PAPER:
                continue
            above += [f"{name} at lag {lag}"] if d.low > 0.0 else []
            below += [name] if d.high < 0.0 and lag == max(table) else []
    sentences.append(f"in intervals that hold together for all {comparisons} comparisons:")
    sentences.append(f"clearly above P3O: {', '.join(above) or 'none'}")
    sentences.append(f"clearly below P3O at lag {max(table)}: {', '.join(below) or 'none'}")
    if above:
        return Verdict("refuted", tuple(sentences))
    return Verdict("supported" if "PPO" in below and len(below) > 1 else "undecided", tuple(sentences))


def levels(outcome: Outcome) -> str:
    """Normalized final return over the tasks, IQM and 95 % interval: a row for each method, a column for each lag."""
    table = _table(outcome)
    heads = [f"lag {lag}" if lag else "fresh" for lag in sorted(table)]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name in METHODS:
        found = [level(table[lag][name]) if name in table[lag] else None for lag in sorted(table)]
        cells = [f"{d.value:.2f} [{d.low:.2f}, {d.high:.2f}]" if d else "" for d in found]
        lines.append(f"| {TITLES.get(name, name)} | {' | '.join(cells)} |".replace("-0.00", "0.00"))
    return "\n".join(lines) + "\n"


def draw(outcome: Outcome, path: Path) -> None:
    table = _table(outcome)
    with picture(path) as axis:
        for shift, lag in enumerate(sorted(table)):
            names = list(table[lag])
            rows = np.array([level(scores) for scores in table[lag].values()])
            places = np.array([list(METHODS).index(name) for name in names]) + 0.22 * (shift - 1)
            errors = np.stack([rows[:, 0] - rows[:, 1], rows[:, 2] - rows[:, 0]])
            axis.errorbar(rows[:, 0], places, xerr=errors, fmt="o", capsize=2, markersize=4, label=f"lag {lag}")
        axis.set_yticks(range(len(METHODS)), list(METHODS))
        axis.invert_yaxis()
        axis.set(xlabel="normalized final return over the tasks (IQM, 95 % interval)")


STUDY = Study(
    name="family",
    question="Which method learns most from fresh data, and which from data of policies 4 and 16 iterations old?",
    prediction=(
        "Over the three tasks no other method is clearly above P3O at any lag, and PPO and at least one more are "
        "clearly below it at lag 16."
    ),
    jobs=jobs,
    judge=judge,
    draw=draw,
    table=levels,
)
