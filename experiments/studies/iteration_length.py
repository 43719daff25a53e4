"""How much of what P3O loses to a lag is due to the length of its iterations?

P3O learns from 4096 samples per iteration, PPO from 2048, so a policy K iterations old is twice as many env steps old,
and within a budget of env steps only half as many policies act. Here P3O is run with PPO's rollout and minibatch (128
and 64, instead of 256 and 128) in addition to its own, and nothing else is changed.

The question arose while the study staleness was running, whose first lags showed P3O behind; the prediction was written
before any run of the shorter iterations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.studies.staleness import under_lags
from experiments.studies.study import Finals, Outcome, Study, Verdict, curve, difference, level, picture
from experiments.suites import SMALL, SMOKE, Job

LAGS = {"p3o": (0, 1, 2, 4, 8), "p3o short": (0, 1, 2, 4, 8, 16)}
SHORT: dict[str, Any] = {"rollout": 128, "minibatch": 64}
QUICK_SHORT: dict[str, Any] = {"rollout": 32, "minibatch": 32}
_QUICK: Any = {**SMOKE, "env": "Pendulum-v1", "seeds": range(2)}
_WHOLE: Any = {"env": "HalfCheetah-v5", "steps": 300_000}


def jobs(quick: bool) -> tuple[Job, ...]:
    how, common = (_QUICK, SMALL) if quick else (_WHOLE, {})
    changes: dict[str, dict[str, Any]] = {"p3o": {}, "p3o short": QUICK_SHORT if quick else SHORT}
    made: tuple[Job, ...] = ()
    for name, lags in LAGS.items():
        method = {name: {"agent": "p3o", "settings": changes[name]}}
        made += under_lags(method, lags[:3] if quick else lags, how, common)
    return made


def _of_lag(outcome: Outcome) -> dict[str, dict[int, Finals]]:
    """own or short -> lag -> final returns"""
    found: dict[str, dict[int, Finals]] = {"p3o": {}, "p3o short": {}}
    for (job, _), finals in outcome.items():
        name, lag = job.rsplit(" lag ", 1)
        found[name][int(lag)] = finals
    return found


def judge(outcome: Outcome) -> Verdict:
    own, short = _of_lag(outcome).values()
    sentences, ahead, behind, apart = [], [], [], []
    for lag, finals in sorted(own.items()):
        d = difference(short[lag], finals)
        sentences.append(f"lag {lag}: short iterations less P3O's own: {d}")
        ahead += [lag] if lag and d.low > 0.0 else []
        behind += [lag] if d.high < 0.0 else []
        if lag and 2 * lag in short:
            d = difference(short[2 * lag], finals)
            sentences.append(f"equally old data: short iterations at lag {2 * lag} less P3O's own at lag {lag}: {d}")
            apart += [lag] if d.low > 0.0 or d.high < 0.0 else []
    sentences.append(f"clearly ahead at the lags: {', '.join(map(str, ahead)) or 'none'}")
    if behind or apart:
        return Verdict("refuted", tuple(sentences))
    return Verdict("supported" if ahead else "undecided", tuple(sentences))


def draw(outcome: Outcome, path: Path) -> None:
    with picture(path) as axis:
        for name, of_lag in _of_lag(outcome).items():
            lags = sorted(of_lag)
            curve(axis, [str(lag) for lag in lags], [level(of_lag[lag]) for lag in lags], label=name)
        axis.set_xticks(range(len(LAGS["p3o short"])), [str(lag) for lag in LAGS["p3o short"]])
        axis.set(xlabel="iterations by which the acting policy is old", ylabel="final return (IQM, 95 % interval)")


STUDY = Study(
    name="iteration-length",
    question="How much of what P3O loses to a lag is the length of its iterations?",
    prediction=(
        "With iterations half as long P3O is at no lag clearly behind itself and at one or more above 0 clearly ahead; "
        "on equally old data (twice the lag with half the length) the two are nowhere clearly apart."
    ),
    jobs=jobs,
    judge=judge,
    draw=draw,
)
