"""How much depends on PPO's clip range, and can P3O do without one?

PPO with six clip ranges and ten seeds is one population of sixty; P3O, with its default hyperparameters, one of ten.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.studies.study import Outcome, Study, Verdict, difference, level, picture
from experiments.suites import SMOKE, Job

CLIPS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6)
_QUICK: Any = {**SMOKE, "seeds": range(2)}


def jobs(quick: bool) -> tuple[Job, ...]:
    if quick:
        return Job("p3o", "Pendulum-v1", **_QUICK), Job("ppo", "Pendulum-v1", sweep={"clip": CLIPS[::2]}, **_QUICK)
    return (
        Job("p3o", "HalfCheetah-v5", steps=300_000),
        Job("ppo", "HalfCheetah-v5", steps=300_000, sweep={"clip": CLIPS}),
    )


def judge(outcome: Outcome) -> Verdict:
    p3o = outcome["p3o", "p3o"]
    clips = {label: finals for (job, label), finals in outcome.items() if job == "ppo"}
    to_clip = {label: difference(p3o, finals) for label, finals in clips.items()}
    best = max(clips, key=lambda label: level(clips[label]).value)
    worse = [label for label, d in to_clip.items() if d.low > 0.0]
    sentences = [f"P3O less {label}: {d}" for label, d in to_clip.items()]
    sentences.append(f"best clip: {best}; clearly worse than P3O: {', '.join(worse) or 'none'}")
    if to_clip[best].high < 0.0:
        return Verdict("refuted", tuple(sentences))
    word = "supported" if to_clip[best].value >= 0.0 and len(worse) >= 2 else "undecided"
    return Verdict(word, tuple(sentences))


def draw(outcome: Outcome, path: Path) -> None:
    with picture(path) as axis:
        clips = {label: finals for (job, label), finals in outcome.items() if job == "ppo"}
        points = [(float(label.rsplit(" ", 1)[1]), *level(finals)) for label, finals in clips.items()]
        xs, values, lows, highs = zip(*sorted(points), strict=True)
        axis.plot(xs, values, "o-", label="PPO")
        axis.fill_between(xs, lows, highs, alpha=0.2)
        value, low, high = level(outcome["p3o", "p3o"])
        axis.axhline(value, color="C1", label="P3O, no clip range")
        axis.axhspan(low, high, color="C1", alpha=0.2)
        axis.set(xlabel="clip range of PPO", ylabel="final return (IQM, 95 % interval)", xscale="log")
        axis.set_xticks(xs, [f"{x:g}" for x in xs])
        axis.minorticks_off()


STUDY = Study(
    name="clip-sensitivity",
    question="How much hangs on PPO's clip range, and does P3O do without one?",
    prediction="P3O's IQM is not below that of the best of six clip ranges, and at least two are clearly worse.",
    jobs=jobs,
    judge=judge,
    draw=draw,
)
