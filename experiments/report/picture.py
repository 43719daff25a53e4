"""The report's main picture, for a README or a slide: the score of each method over all tasks, and on each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import statistics
from experiments.report import text
from experiments.report.aggregates import Estimate
from experiments.report.data import GroupReport, Report

METHODS_UP_TO = 12  # in one picture; if there are more, those with the highest IQM, and its title says so
COLUMNS = 4
MARK = "ess-rl report"  # in picture and pages: tells a later report what it may replace


def write(report: Report, path: Path) -> bool:
    """Draw the largest group of methods that share tasks. -> whether there is one; if not, there is no file."""
    if not report.groups:
        path.unlink(missing_ok=True)
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    one = max(report.groups, key=lambda one: len(one.group.raw) * len(one.group.tasks))
    panels = _panels(report, one)
    scores = one.group.normalized or one.group.raw
    best = sorted(scores, key=lambda label: float(statistics.iqm(scores[label])), reverse=True)[:METHODS_UP_TO]
    shown = [label for label in scores if label in best]
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.0 * columns, rows * (0.9 + 0.24 * len(shown)) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, values) in zip(axes.flat, panels.items(), strict=False):
        _dots(axis, {label: values[label] for label in shown})
        axis.set_title(title, fontsize=9)
    some = f"; the best {len(shown)} of {len(scores)}" if len(shown) < len(scores) else ""
    figure.suptitle(
        f"IQM and 95 % interval, {text.seeds_of(one)}, {one.group.steps:,} {one.group.unit}{some}", fontsize=9
    )
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=110, metadata={"Software": MARK})
    part.replace(path)
    return True


def _panels(report: Report, one: GroupReport) -> dict[str, Mapping[str, Estimate]]:
    """title -> method -> IQM"""
    panels: dict[str, Mapping[str, Estimate]] = {}
    if one.aggregates and len(one.group.scored) > 1:
        tasks = text.count(len(one.group.scored), "task")
        panels[f"{tasks}, normalized"] = {label: values["IQM"] for label, values in one.aggregates.items()}
    titles = [task.dataset or task.name for task in one.group.tasks]  # longer titles would overlap
    if len(set(titles)) < len(titles):
        titles = [task.name for task in one.group.tasks]
    iqms = {(row.label, row.task): of.iqm for row, of in zip(report.found.rows, report.summaries, strict=True)}
    for task, title in zip(one.group.tasks, titles, strict=True):
        panels[title] = {label: iqms[label, task] for label in one.group.raw}
    return panels


def _dots(axis: Any, values: Mapping[str, Estimate]) -> None:
    """One method per line, the first on top."""
    for place, value in enumerate(values.values()):
        low, high = value.interval or (value.value, value.value)
        style: Any = {"color": f"C{place % 10}", "markersize": 4.5, "capsize": 2.5}
        axis.errorbar([value.value], [place], xerr=[[value.value - low], [high - value.value]], fmt="o", **style)
    axis.set_yticks(np.arange(len(values)), list(values))
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.tick_params(labelsize=8)
    axis.locator_params(axis="x", nbins=4)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)
