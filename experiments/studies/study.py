"""What a study is, and how `ess-rl study` carries it out: as a benchmark that ends in a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ess_rl.errors import UsageError
from experiments import benchmark, records, statistics
from experiments.suites import Job

Finals = NDArray[np.float64]  # [seeds] final returns
Outcome = Mapping[tuple[str, str], Finals]  # (label of the job, label of the members) -> theirs


@dataclass(frozen=True)
class Verdict:
    """What became of the prediction, and the numbers that say so."""

    word: Literal["supported", "refuted", "undecided"]
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """A question to experiments."""

    name: str
    question: str
    prediction: str  # written before the runs
    jobs: Callable[[bool], Sequence[Job]]  # of the whole study, or (True) of a quick one that only shows that it works
    judge: Callable[[Outcome], Verdict]
    draw: Callable[[Outcome, Path], None]


@dataclass(frozen=True)
class Difference:
    """IQM of one set of seeds less that of another, with its bootstrap 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.0f} [{self.low:+.0f}, {self.high:+.0f}]"


def difference(one: Finals, other: Finals) -> Difference:
    """Of IQMs. Raises UsageError for fewer than two seeds."""
    x, y = one[:, None], other[:, None]

    def estimator(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(statistics.iqm(x) - statistics.iqm(y))

    low, high = statistics.bootstrap_interval_of_two(x, y, estimator, np.random.default_rng(0))
    return Difference(float(estimator(x, y)), float(low), float(high))


def carry_out(study: Study, out: Path | None = None, jobs: int = 1, quick: bool = False) -> list[str]:
    """Run what is missing of a study, judge it, and write study.json and study.png. -> a line for each failed job

    Args:
        out: where its run folders are; default: runs/NAME, or runs/NAME-quick.
        jobs: run sets at a time.
        quick: minutes instead of hours, on a small task: it shows that the study works, and says nothing.
    """
    out = out or Path("runs") / (study.name + "-quick" * quick)
    todo = study.jobs(quick)
    print(f"{study.question}\nprediction: {study.prediction}")
    failed = benchmark.run_jobs(study.name, todo, out, partial(benchmark.Local, jobs=jobs))
    if failed:
        return failed
    outcome = read(todo, out)
    verdict = study.judge(outcome)
    study.draw(outcome, out / "study.png")
    scores = {" | ".join(filter(None, key)): {"final_return": list(x), "iqm": _iqm(x)} for key, x in outcome.items()}
    record = {
        "study": study.name, "question": study.question, "prediction": study.prediction, "quick": quick,
        "verdict": asdict(verdict), "scores": scores, **records.origin(),
    }  # fmt: skip
    records.write_json(out / "study.json", record)
    print(f"verdict: {verdict.word}{' (a quick study: this says nothing)' * quick}", *verdict.sentences, sep="\n  ")
    print(f"figure: {out / 'study.png'}")
    return []


def read(jobs: Sequence[Job], out: Path) -> Outcome:
    """Final returns of all members, by job and by what they were swept over."""
    outcome: dict[tuple[str, str], Finals] = {}
    for job in jobs:
        result = records.read_json(out / job.name / "result.json")
        for label, members in records.groups(result).items():
            outcome[job.label or job.agent, label] = np.array([result["final_return"][m] for m in members])
    return outcome


@contextmanager
def picture(path: Path) -> Iterator[Any]:
    """Axes to draw on; afterwards they get a grid and a legend, and lie at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.0, 3.8), layout="constrained")
    try:
        yield axis
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
        figure.savefig(path, dpi=110)
    finally:
        plt.close(figure)


def interval(finals: Finals) -> tuple[float, float, float]:
    """IQM and the ends of its 95 % interval."""
    low, high = statistics.bootstrap_interval(finals[:, None], statistics.iqm, np.random.default_rng(0))
    return _iqm(finals), float(low), float(high)


def _iqm(finals: Finals) -> float:
    return float(statistics.iqm(finals[:, None]))


def find(studies: Mapping[str, Study], name: str) -> Study:
    if name not in studies:
        raise UsageError(f"unknown study {name!r}: choose one of {', '.join(studies)}")
    return studies[name]
