"""Tables of results for a terminal, from files only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ess_rl.errors import UsageError
from experiments import collection, configurations, records, statistics
from experiments.collection import Method, Series
from experiments.records import Record
from experiments.report import text
from experiments.report.text import table
from experiments.statistics import Scores


def member_table(config: Record, columns: Mapping[str, Sequence[float | None]]) -> str:
    """One row per member: its seed, its swept settings, and the given columns."""
    rows = [["member", "seed", *config["sweep"], *columns]]
    for member, seed in enumerate(config["seeds"]):
        swept = [f"{values[member]:g}" for values in config["sweep"].values()]
        numbers = ["-" if (x := values[member]) is None else f"{x:.1f}" for values in columns.values()]
        rows.append([str(member), str(seed), *swept, *numbers])
    return table(rows)


def summary(folder: Path, result: Record) -> str:
    """Text to show when a run is done: its scores, its speed, and where everything is."""
    scores = {"final return": result["final_return"], "training return": result["training_return"]}
    if result.get("dataset"):  # no policy acted in training
        del scores["training return"]
    lines = [
        member_table(result, scores),
        f"mean final return {np.mean(result['final_return']):.1f} ({result['episodes']} episodes each, mean action); "
        f"{result['steps_per_second']:,.0f} {records.unit(result)}/s; {result['peak_memory_mib']:,.0f} MiB",
    ]
    if result.get("normalized_score"):
        low, high = result["references"]
        lines.append(f"mean normalized score {np.mean(result['normalized_score']):.3f} (0: {low:g}, 1: {high:g})")
    places = {
        "curves: ": folder / "curve.png",
        "TensorBoard: tensorboard --logdir ": folder / "tensorboard",
    }
    if found := records.checkpoints(folder):
        places["checkpoint: "] = found[-1]
    lines += [f"{what}{path}" for what, path in places.items() if path.exists()]
    return "\n".join(lines)


def folders(paths: Sequence[Path]) -> list[Path]:
    """The run folders among `paths`: DIR/* includes the logs and reports that lie next to them."""
    return [path for path in paths if not path.is_file()] or list(paths)


def comparison(runs: Sequence[Path], against: str | None = None) -> str:
    """A row for each method on a task: IQM of the final return with a bootstrap 95 % interval, mean, extremes, speed.

    Runs that differ only in their seeds are one row over all seeds. Methods named by letters are explained below it.

    Args:
        against: a method, as the table names it; a second table compares all others with it.

    Raises:
        UsageError: no run, two runs with a seed in common, or nothing to compare with `against`.
    """
    runs = folders(runs)
    if not runs:
        raise UsageError("name at least one run folder")
    head = [
        "env",
        "agent",
        "backend",
        "env steps",
        "seeds",
        "IQM",
        "95 % interval",
        "mean",
        "min",
        "max",
        "training",
        "steps/s",
    ]
    found: dict[Series, list[tuple[Record, list[int]]]] = {}
    configs = [records.read_config(run) for run in runs]
    for name in configurations.made_anew(configs):
        raise UsageError(f"{name} was recorded again between these runs: compare those of one recording at a time")
    for run, config in zip(runs, configs, strict=True):
        result = records.read_result(run)
        configurations.check_result(config, result)
        for series, group in collection.series(config).items():
            found.setdefault(series, []).append((result, group))
    units = {series.task.unit for series in found}
    rows = [[" or ".join(sorted(units)) if name == "env steps" else name for name in head]]
    labels, differing = collection.name_methods({series.method for series in found})
    scores_of: dict[Series, Scores] = {}
    for (task, method), parts in found.items():
        label = labels[method]
        by_seed = sorted(
            ((result, member) for result, group in parts for member in group),
            key=lambda one: one[0]["seeds"][one[1]],
        )  # so that a bootstrap does not depend on the order of the folders
        finals = [result["final_return"][member] for result, member in by_seed]
        trainings = [result["training_return"][member] for result, group in parts for member in group]
        speed = np.mean([result["steps_per_second"] for result, _ in parts])
        seeds = [result["seeds"][member] for result, group in parts for member in group]
        if len(set(seeds)) < len(seeds):
            raise UsageError(
                f"{label} on {task.env}: the runs share seeds, and none may count twice: leave one of them out"
            )
        scores, digits = np.array(finals)[:, None], text.decimals(min(finals), max(finals))
        scores_of[Series(task, method)] = scores
        ends = statistics.interval_of(scores, statistics.iqm)
        interval = "-" if ends is None else f"{ends.low:.{digits}f} to {ends.high:.{digits}f}"
        known = [x for x in trainings if x is not None]
        training = f"{statistics.iqm(np.array(known)[:, None]):.{digits}f}" if known else "-"
        numbers = (float(statistics.iqm(scores)), float(np.mean(finals)), min(finals), max(finals))
        iqm, *others = (f"{x:.{digits}f}" for x in numbers)
        rows.append([
            task.name, label, task.backend,
            f"{records.steps_of(parts[0][0]):,}", str(len(finals)),
            iqm, interval, *others, training, f"{speed:,.0f}",
        ])  # fmt: skip
    lettered = [agent for agent in differing if any(label.startswith(f"{agent} (") for label in labels.values())]
    keys = [table(text.settings_table(labels, agent, differing[agent])) for agent in lettered]
    compared = [] if against is None else [_differences(scores_of, labels, against)]
    return "\n\n".join([table(rows), *compared, *keys])


def _differences(scores_of: Mapping[Series, Scores], labels: Mapping[Method, str], against: str) -> str:
    """One row for each method except `against`, on each task that both have, whichever backend simulates it.

    Each method also has one row of normalized scores over all of these tasks that have a reference return: if there are
    several, none of them twice, under one budget and with equally many seeds on each.
    """
    if against not in labels.values():
        raise UsageError(f"--against {against!r}: choose one of {'; '.join(sorted(labels.values()))}")
    references = {series.task: scores for series, scores in scores_of.items() if labels[series.method] == against}
    pairs: dict[Series, tuple[Scores, Scores]] = {}
    for (task, method), scores in scores_of.items():
        others = [of for known, of in references.items() if (known.name, known.steps) == (task.name, task.steps)]
        if labels[method] == against or not others:
            continue
        other = references.get(task, others[0])  # from the same simulator, if there is one
        if min(len(scores), len(other)) < 2:
            raise UsageError(
                f"--against {against!r}: an interval needs at least two seeds of each method on {task.name}"
            )
        pairs[Series(task, method)] = scores, other
    if not pairs:
        raise UsageError(f"--against {against!r}: no other has been trained on one of its tasks for as many steps")
    rows = [["env", "agent", f"IQM less {against}", "95 % interval", f"P(above {against})", "95 % interval"]]
    for (task, method), (scores, other) in pairs.items():
        digits = text.decimals(scores.min(), scores.max())
        rows.append([task.name, labels[method], *_difference(scores, other, digits)])
    for method in dict.fromkeys(series.method for series in pairs):
        scored = {task: both for (task, of), both in pairs.items() if of == method and task.normalized(0.0) is not None}
        names, budgets = {task.name for task in scored}, {task.steps for task in scored}
        sizes = {(len(scores), len(other)) for scores, other in scored.values()}
        if 1 < len(scored) == len(names) and len(budgets) == len(sizes) == 1:
            scores, other = (
                np.hstack([np.vectorize(task.normalized)(both[i]) for task, both in scored.items()]) for i in (0, 1)
            )
            rows.append([f"all {len(scored)}, normalized", labels[method], *_difference(scores, other, 3)])
    return table(rows)


def _difference(scores: Scores, other: Scores, digits: int) -> list[str]:
    """Difference of the IQMs and P(above), each with its interval, as cells."""
    cells = []
    for estimator, form in (
        (statistics.less(statistics.iqm), f"+.{digits}f"),
        (statistics.probability_of_improvement, ".2f"),
    ):
        low, high = statistics.bootstrap_interval_of_two(scores, other, estimator, np.random.default_rng(0))
        cells += [f"{float(estimator(scores, other)):{form}}", f"{float(low):{form}} to {float(high):{form}}"]
    return cells
