"""Definition of a study, and how `ess-rl study` runs it: as a benchmark that ends in a verdict."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments import benchmark, figures, records, references, statistics
from experiments.statistics import Estimator
from experiments.suites import Job

Finals = NDArray[np.float64]  # [seeds] final returns, or [seeds, ...] of whatever else a study measures
Outcome = Mapping[tuple[str, str], Finals]  # (label of the job, label of the members) -> their finals


def final_returns(run: Path, members: Sequence[int]) -> Finals:
    """[members] from a finished run folder."""
    final = records.read_json(run / "result.json")["final_return"]
    return np.array([final[m] for m in members])


@dataclass(frozen=True)
class Verdict:
    """Outcome of the prediction, and the numbers that support it."""

    word: Literal["supported", "refuted", "undecided"]
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """A question put to experiments."""

    name: str
    question: str
    prediction: str  # written before the runs
    jobs: Callable[[bool], Sequence[Job]]  # of the full study, or (True) of a quick one that only shows that it works
    judge: Callable[[Outcome], Verdict]
    draw: Callable[[Outcome, Path], None]
    quantity: str = "final_return"  # name of what the outcome holds
    measure: Callable[[Path, Sequence[int]], Finals] = final_returns  # how it is read from a run folder
    compute: Callable[[bool], Outcome] | None = None  # (quick) -> what else is judged and drawn, but comes from no run
    table: Callable[[Outcome], str] | None = None  # levels in Markdown, where sentences would be too many


class Estimate(NamedTuple):
    """A number from some seeds, or from two sets of them, and its bootstrap interval, 95 % unless stated otherwise."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.0f} [{self.low:+.0f}, {self.high:+.0f}]"


def difference(
    one: Finals,
    other: Finals,
    *,
    estimator: Estimator = statistics.iqm,
    comparisons: int = 1,
) -> Estimate:
    """Estimate for `one` minus that for `other`, [seeds] or [seeds, tasks]. UsageError for fewer than two seeds.

    Args:
        comparisons: number of differences that a verdict rests on. The more there are, the more often one of them seems
            clear by chance; all of their intervals hold jointly with at least 95 % (Bonferroni).
    """
    return _of_two(statistics.less(estimator), one, other, comparisons)


def kept(one: Finals, other: Finals) -> Estimate:
    """Quotient of two IQMs in percent, the share of `other` kept. Returns must be above 0; all else as `difference`."""

    def quotient(x: Finals, y: Finals) -> Finals:
        return np.asarray(100.0 * statistics.iqm(x) / statistics.iqm(y))

    return _of_two(quotient, one, other)


def _of_two(estimator: statistics.TwoSampleEstimator, one: Finals, other: Finals, comparisons: int = 1) -> Estimate:
    x, y = _as_columns(one), _as_columns(other)
    how = {"confidence": 1.0 - 0.05 / comparisons, "resamples": 1000 * (comparisons + 1)}  # enough for the tail, too
    low, high = statistics.bootstrap_interval_of_two(x, y, estimator, np.random.default_rng(0), **how)
    return Estimate(float(estimator(x, y)), float(low), float(high))


def carry_out(study: Study, out: Path | None = None, jobs: int = 1, quick: bool = False) -> list[str]:
    """Run the missing jobs of a study, judge it, and write what `files` lists. -> a line for each failed job

    Args:
        out: folder of its run folders; default: runs/NAME, or runs/NAME-quick.
        jobs: run sets at a time.
        quick: minutes instead of hours, on a small task: shows that the study works, but its verdict says nothing.
    """
    records.check_positive({"jobs": jobs})
    out = out or Path("runs") / (study.name + "-quick" * quick)
    todo = study.jobs(quick)
    print(f"{study.question}\nprediction: {study.prediction}")
    failed = benchmark.run_jobs(study.name, todo, out, partial(benchmark.Local, jobs=jobs))
    if failed:
        return failed
    of_runs = read(todo, out, study.measure)
    computed = study.compute(quick) if study.compute else {}
    outcome = {**of_runs, **computed}
    verdict = study.judge(outcome)
    study.draw(outcome, out / "study.png")
    if study.table:
        (out / "table.md").write_text(study.table(outcome))
    record = {
        "study": study.name, "question": study.question, "prediction": study.prediction, "quick": quick,
        "verdict": asdict(verdict), "scores": _scores(of_runs, study.quantity),
        **({"computed": _scores(computed, "values")} if computed else {}), **records.origin(),
    }  # fmt: skip
    records.write_json(out / "study.json", record)
    print(f"verdict: {verdict.word}{' (a quick study: this says nothing)' * quick}", *verdict.sentences, sep="\n  ")
    print(*(out / name for name in files(out)), sep="\n")
    return []


def files(folder: Path) -> list[str]:
    """What a finished study consists of besides its runs: the verdict, the figure and, if it has one, the table."""
    return [name for name in ("study.json", "study.png", "table.md") if (folder / name).exists()]


def publish(folder: Path, out: Path, *, overwrite: bool = False) -> list[str]:
    """Copy a finished study: its `files`, and the small files of its runs. -> the names

    Raises:
        UsageError: `out` holds something else, or other runs of these names and `overwrite` is False.
    """
    runs = sorted(path.parent for path in folder.glob("*/result.json"))
    names = [*files(folder), *(run.name for run in runs)]
    for run in runs:  # check all of them before anything is replaced
        figures.check_publishable(run, out / run.name, overwrite=overwrite)
    records.prepare_published(out, names)
    for run in runs:
        figures.publish(run, out / run.name, overwrite=overwrite)
    for name in files(folder):
        shutil.copyfile(folder / name, out / name)
    return names


def read(jobs: Sequence[Job], out: Path, measure: Callable[[Path, Sequence[int]], Finals] = final_returns) -> Outcome:
    """Result of `measure` for all members, by job (with its task, if there are several) and by swept values."""
    outcome: dict[tuple[str, str], Finals] = {}
    several = len({job.env for job in jobs}) > 1
    for job in jobs:
        name = f"{job.env} " * several + (job.label or job.agent)
        for label, members in records.groups(records.read_config(out / job.name)).items():
            outcome[name, label] = measure(out / job.name, members)
    return outcome


def by_task(outcome: Outcome) -> dict[str, dict[str, Finals]]:
    """task -> label of the job -> what is measured; for a study of several tasks without a sweep."""
    tasks: dict[str, dict[str, Finals]] = {}
    for (job, _), finals in outcome.items():
        env, label = job.split(" ", 1)
        tasks.setdefault(env, {})[label] = finals
    return tasks


@contextmanager
def picture(path: Path, panels: int = 1) -> Iterator[Any]:
    """Axes to draw on, as an array if several; afterwards they get a grid and a legend and are saved at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(6.0 * panels, 3.8), layout="constrained")
    try:
        yield axes
        for axis in figure.axes:
            axis.grid(alpha=0.25)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
        figure.savefig(path, dpi=110)
    finally:
        plt.close(figure)


def curve(axis: Any, xs: Sequence[str], ys: Sequence[Estimate], **style: Any) -> None:
    """Plot values over named positions, with their intervals as a band."""
    places = range(len(xs))
    axis.plot(places, [y.value for y in ys], "o-", **style)
    axis.fill_between(places, [y.low for y in ys], [y.high for y in ys], alpha=0.15)
    axis.set_xticks(places, xs)


def dots(axis: Any, rows: Mapping[str, Estimate]) -> None:
    """Plot a value with its interval for each row, the first on top."""
    places = range(len(rows))
    values = np.array([[d.value, d.value - d.low, d.high - d.value] for d in rows.values()])
    axis.errorbar(values[:, 0], places, xerr=values[:, 1:].T, fmt="o", capsize=3)
    axis.set_yticks(places, list(rows))
    axis.invert_yaxis()


def draw_kept(rows: Mapping[str, Estimate], whole: str, path: Path) -> None:
    """Plot `kept`, one row each, with a line at 100 %, which is `whole`."""
    with picture(path) as axis:
        dots(axis, rows)
        axis.axvline(100.0, color="gray", linewidth=0.8)
        axis.set(xlabel=f"% of {whole} (IQM, 95 % interval)")


def draw_levels(tasks: Mapping[str, Mapping[str, Finals]], rows: Sequence[str], path: Path) -> None:
    """Plot final returns: a panel for each task, with a row for each of `rows`."""
    with picture(path, panels=len(tasks)) as axes:
        for axis, (task, of) in zip(np.atleast_1d(axes), tasks.items(), strict=True):
            dots(axis, {name: level(of[name]) for name in rows})
            axis.set(title=task, xlabel="final return (IQM, 95 % interval)")


def normalized(env: str, finals: Finals) -> Finals:
    """Final returns scaled so that the env's random policy is 0 and its reference 1; unscaled without a reference."""
    scores = [references.normalized(env, x) for x in finals]
    return finals if None in scores else np.array(scores, dtype=np.float64)


def _scores(outcome: Outcome, quantity: str) -> dict[str, Any]:
    """The scores as stored in study.json."""
    return {
        " | ".join(filter(None, key)): {
            quantity: _as_json(x),
            "iqm": _as_json(statistics.iqm_over_runs(x.reshape(len(x), -1)).squeeze()),
        }
        for key, x in outcome.items()
    }


def _as_json(x: Any) -> Any:
    """Convert to nested lists; None where nothing was measured."""
    return [_as_json(y) for y in x] if np.ndim(x) else float(x) if np.isfinite(x) else None


def level(finals: Finals, estimator: Estimator = statistics.iqm) -> Estimate:
    """Estimate from [seeds] or [seeds, tasks]. UsageError for fewer than two seeds."""
    scores = _as_columns(finals)
    low, high = statistics.bootstrap_interval(scores, estimator, np.random.default_rng(0))
    return Estimate(float(estimator(scores)), float(low), float(high))


def _as_columns(finals: Finals) -> Finals:
    return finals.reshape(len(finals), -1)
