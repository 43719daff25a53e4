"""Groups of rows that may be aggregated over tasks, and their results: normalized aggregates, comparisons of agents.

A group holds methods that ran the same tasks with the same seeds on every task, under one budget of env steps.
Whatever is left out of a group is named, with the reason.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from experiments import references, statistics
from experiments.collection import Collection, Method, Row, Task, span
from experiments.statistics import Array, Interval, Scores

STATISTICS = ("IQM", "median", "mean", "optimality gap")
PAIRS_UP_TO = 8  # methods: if there are more, they are compared only with the best, for a readable table


class Estimate(NamedTuple):
    value: float
    interval: tuple[float, float] | None = None  # None: one seed


class Profiles(NamedTuple):
    """Performance profiles over the normalized scores of a group."""

    thresholds: Array
    shares: dict[str, tuple[Array, Interval | None]]  # label -> share of runs above each, and its pointwise interval


@dataclass
class Group:
    """Methods and the tasks that all of them ran."""

    steps: int
    unit: str  # of the steps
    tasks: tuple[Task, ...]  # sorted
    scored: tuple[Task, ...]  # those that have a reference return
    raw: dict[str, Scores]  # label -> final returns [seeds, tasks]
    normalized: dict[str, Scores]  # label -> normalized scores [seeds, scored tasks]; empty if nothing is scored
    left_out: list[str] = field(default_factory=list)


def groups(found: Collection) -> list[Group]:
    """All groups of a collection, largest first. What is left out of them is added to `found.problems`."""
    _name_unreferenced(found)
    made = []
    for budget in sorted({(row.task.steps, row.task.unit) for row in found.rows}, reverse=True):
        rows = [row for row in found.rows if (row.task.steps, row.task.unit) == budget and not row.repeated]
        for part in _one_backend_each(_same_seeds(rows, found)):
            made += _split(budget, part, found)
    return made


def aggregate(scores: Scores) -> dict[str, Estimate]:
    """Each of `STATISTICS` of normalized scores [seeds, tasks], with 95 % intervals if there are two seeds or more."""

    def all_of(x: Scores) -> Array:
        estimators = (statistics.iqm, statistics.median, statistics.mean, statistics.optimality_gap)
        return np.stack([estimator(x) for estimator in estimators], axis=-1)

    values, interval = all_of(scores), statistics.interval_of(scores, all_of)
    if interval is None:
        return {name: Estimate(float(value)) for name, value in zip(STATISTICS, values, strict=True)}
    low, high = interval
    return {name: Estimate(float(values[i]), (float(low[i]), float(high[i]))) for i, name in enumerate(STATISTICS)}


def improvement(x: Scores, y: Scores) -> Estimate:
    """P(X > Y) of final returns [seeds, tasks], with its interval if both have two seeds or more."""
    value = float(statistics.probability_of_improvement(x, y))
    if min(len(x), len(y)) < 2:
        return Estimate(value)
    low, high = statistics.bootstrap_interval_of_two(
        x, y, statistics.probability_of_improvement, np.random.default_rng(0)
    )
    return Estimate(value, (float(low), float(high)))


def improvements(group: Group) -> dict[tuple[str, str], Estimate]:
    """(x, y) -> P(X > Y): every pair once, or each against the best if there are many methods."""
    labels = list(group.raw)
    if len(labels) <= PAIRS_UP_TO:
        pairs = [(x, y) for i, x in enumerate(labels) for y in labels[i + 1 :]]
    else:
        best = best_of(group)
        pairs = [(x, best) for x in labels if x != best]
    return {(x, y): improvement(group.raw[x], group.raw[y]) for x, y in pairs}


def best_of(group: Group) -> str:
    """The label with the highest IQM, of normalized scores if there are any."""
    scores = group.normalized or group.raw
    return max(scores, key=lambda label: float(statistics.iqm(scores[label])))


def profiles(group: Group, points: int = 61) -> Profiles | None:
    """The performance profiles of a group; None if nothing in it is scored."""
    if not group.normalized:
        return None
    everything = np.concatenate([scores.ravel() for scores in group.normalized.values()])
    low, high = min(0.0, float(everything.min())), float(everything.max())
    thresholds = np.linspace(low, high + 0.02 * (high - low), points)  # beyond the highest, where no run is left

    def profile(scores: Scores) -> Array:
        return statistics.performance_profile(scores, thresholds)

    shares = {
        label: (profile(scores), statistics.interval_of(scores, profile, resamples=500))
        for label, scores in group.normalized.items()
    }
    return Profiles(thresholds, shares)


def missing(found: Collection) -> list[str]:
    """Tasks that a method did not run although others did under the same budget."""
    lines = []
    for steps, unit in sorted({(row.task.steps, row.task.unit) for row in found.rows}, reverse=True):
        envs: dict[str, set[str]] = defaultdict(set)
        for row in found.rows:
            if (row.task.steps, row.task.unit) == (steps, unit):
                envs[row.label].add(row.task.name)
        everything = set().union(*envs.values())
        lines += [
            f"{label}, {steps:,} {unit}: no finished run on {', '.join(sorted(everything - has))}"
            for label, has in sorted(envs.items())
            if everything - has
        ]
    return lines


def _name_unreferenced(found: Collection) -> None:
    envs = sorted({row.task.name for row in found.rows if row.task.normalized(0.0) is None})
    if envs:
        found.problems.append(
            f"no reference return (table version {references.VERSION}) for {', '.join(envs)}: no normalized score, and "
            "left out of their aggregates"
        )


def _same_seeds(rows: Sequence[Row], found: Collection) -> dict[Method, dict[Task, Row]]:
    """Each method's tasks with the seed set that most of its tasks have (the larger set if there is a tie)."""
    of_method: dict[Method, dict[Task, Row]] = defaultdict(dict)
    for row in rows:
        of_method[row.method][row.task] = row
    for method, tasks in of_method.items():
        counts = Counter(tuple(row.seeds) for row in tasks.values())
        common = max(counts, key=lambda seeds: (counts[seeds], len(seeds), [-seed for seed in seeds]))
        for task, row in list(tasks.items()):
            if tuple(row.seeds) != common:
                found.problems.append(
                    f"{found.labels[method]} on {task}: seeds {span(row.seeds)}, on its other tasks {span(common)}; "
                    "left out of aggregates"
                )
                del tasks[task]
    return dict(of_method)


def _one_backend_each(usable: dict[Method, dict[Task, Row]]) -> list[dict[Method, dict[Task, Row]]]:
    """Split by backend if some method ran an env on two: an aggregate must not count the env twice."""
    if all(len({task.name for task in tasks}) == len(tasks) for tasks in usable.values()):
        return [usable]
    backends = sorted({task.backend for tasks in usable.values() for task in tasks})
    return [
        {
            method: {task: row for task, row in tasks.items() if task.backend == backend}
            for method, tasks in usable.items()
        }
        for backend in backends
    ]


def _split(budget: tuple[int, str], usable: dict[Method, dict[Task, Row]], found: Collection) -> list[Group]:
    """Groups of methods that share tasks; each method goes into one at most."""
    made = []
    left = {method: tasks for method, tasks in usable.items() if tasks}
    while left:
        chosen = _choose(left)
        inside = {method: tasks for method, tasks in left.items() if chosen <= tasks.keys()}
        if len(inside) < 2 and len(chosen) < 2:
            break
        made.append(_group(budget, chosen, inside, found))
        left = {method: tasks for method, tasks in left.items() if method not in inside}
    for method, tasks in left.items():
        names = ", ".join(map(str, sorted(tasks)))
        found.problems.append(f"{found.labels[method]}: in no aggregate, nothing else ran on {names} to compare with")
    return made


def _choose(having: Mapping[Method, Mapping[Task, Row]]) -> frozenset[Task]:
    """The set of tasks with the most methods x tasks; one that two methods share goes before one of a single method."""
    sets = {frozenset(tasks) for tasks in having.values()}

    def worth(tasks: frozenset[Task]) -> tuple[bool, int, int, list[Task]]:
        methods = sum(tasks <= other.keys() for other in having.values())
        return methods > 1, methods * len(tasks), len(tasks), sorted(tasks)

    return max({one & other for one in sets for other in sets} - {frozenset()}, key=worth)


def _group(
    budget: tuple[int, str], chosen: frozenset[Task], inside: Mapping[Method, Mapping[Task, Row]], found: Collection
) -> Group:
    tasks = tuple(sorted(chosen))
    scored = tuple(task for task in tasks if task.normalized(0.0) is not None)
    group = Group(*budget, tasks, scored, {}, {})
    for method in sorted(inside, key=lambda method: found.labels[method]):
        label, rows = found.labels[method], inside[method]
        raw = statistics.score_matrix([list(run) for run in zip(*(rows[task].finals for task in tasks), strict=True)])
        group.raw[label] = raw
        if scored:
            columns = [[task.normalized(x) for x in rows[task].finals] for task in scored]
            group.normalized[label] = statistics.score_matrix(list(zip(*columns, strict=True)))
        if extra := sorted(rows.keys() - chosen):
            group.left_out.append(f"{label} on {', '.join(map(str, extra))}: not run by every agent of this group")
    return group
