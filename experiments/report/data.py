"""All numbers of a report, computed once: the pages only format them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from ess_rl.errors import UsageError
from experiments import collection, figures, statistics
from experiments.collection import Collection, Row
from experiments.figures import CURVES, Curves
from experiments.report import aggregates
from experiments.report.aggregates import Estimate, Group, Profiles
from experiments.statistics import Array, Interval


@dataclass(frozen=True)
class Summary:
    """Summary of the final returns of a row."""

    iqm: Estimate
    mean: float
    low: float
    high: float
    normalized: float | None  # the IQM between random (0) and reference (1)


@dataclass(frozen=True)
class Band:
    """IQM over the seeds of a row, and its pointwise 95 % interval; x in env steps of a seed."""

    x: Array
    y: Array
    interval: Interval | None  # None: one seed


@dataclass(frozen=True)
class GroupReport:
    """The numbers of one group; labels are those of the methods."""

    group: Group
    aggregates: dict[str, dict[str, Estimate]]  # label -> statistic -> estimate; empty if nothing is scored
    improvements: dict[tuple[str, str], Estimate]
    profiles: Profiles | None  # None if nothing is scored


@dataclass(frozen=True)
class Report:
    """Everything the pages show."""

    title: str
    made: str
    found: Collection
    summaries: list[Summary]  # one per row
    curves: list[dict[str, Band]]  # one per row; keyed by the names in CURVES, except what the runs did not log
    groups: list[GroupReport]
    missing: list[str]


def build(root: Path) -> Report:
    """Read the runs and compute every number of the report.

    Raises:
        UsageError: `root` holds no run.
    """
    found = collection.collect(root)
    groups = [
        GroupReport(
            group,
            {label: aggregates.aggregate(scores) for label, scores in group.normalized.items()},
            aggregates.improvements(group),
            aggregates.profiles(group),
        )
        for group in aggregates.groups(found)
    ]
    return Report(
        root.resolve().name,
        datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        found,
        [summarize(row) for row in found.rows],
        _all_curves(found),
        groups,
        aggregates.missing(found),
    )


def summarize(row: Row) -> Summary:
    """Summarize the final returns of a row, without an interval if it has only one seed."""
    scores = statistics.score_matrix([[score] for score in row.finals])
    iqm, interval = float(statistics.iqm(scores)), statistics.interval_of(scores, statistics.iqm)
    return Summary(
        Estimate(iqm, None if interval is None else (float(interval.low), float(interval.high))),
        float(scores.mean()),
        float(scores.min()),
        float(scores.max()),
        row.task.normalized(iqm),
    )


def _all_curves(found: Collection) -> list[dict[str, Band]]:
    """The curves of each row. Curves that cannot be drawn are a problem; a run without any curves file is not."""
    read: dict[str, Curves | None] = {}
    for run in {run.name: run for row in found.rows for run in row.runs}.values():
        read[run.name] = None
        if not any((run.path / name).exists() for name in ("metrics.jsonl", "curves.csv")):
            continue
        try:
            read[run.name] = figures.read_curves(run.path)
        except UsageError as error:
            found.problems.append(f"{run.name}: no curves, {str(error).replace(f'{run.path}{os.sep}', '')}")
    return [_curves(row, read, found.problems) for row in found.rows]


def _curves(row: Row, read: Mapping[str, Curves | None], problems: list[str]) -> dict[str, Band]:
    curves = [read[run.name] for run in row.runs]
    first = curves[0]
    if first is None or any(one is None for one in curves):
        return {}
    if any(one is not None and not np.array_equal(one.env_steps, first.env_steps) for one in curves):
        problems.append(f"{row.label} on {row.task}: its folders logged at different {row.task.unit}: no curves drawn")
        return {}
    bands = {}
    for name, _ in CURVES:
        columns = []
        for run, member in row.members:
            one = read[run.name]
            assert one is not None
            columns.append(one.values[name][:, member])
        values = np.array(columns)  # [seeds, points]
        whole = ~np.isnan(values).any(0)
        if whole.any():
            bands[name] = _band(first.env_steps[whole], values[:, whole])
    return bands


def _band(steps: np.ndarray, values: Array) -> Band:
    interval = statistics.interval_of(values, statistics.iqm_over_runs, resamples=500)
    return Band(steps.astype(np.float64), statistics.iqm_over_runs(values), interval)
