"""Pictures from the files of runs."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ess_rl.errors import UsageError
from experiments import collection, configurations, records
from experiments.collection import Series
from experiments.records import Record

BINS = 50
PANELS = (
    ("return", "return of training episodes"),
    ("ess", "effective sample size"),
    ("behavior_kl", "KL(policy || behavior) [nats]"),
)
# A report draws one more. Its name in the log depends on the agent's method; runs published without it have none.
CURVES = (*PANELS, ("capped_fraction", "share of samples with the ratio capped or clipped"))
NAMES_IN_LOG = {"capped_fraction": ("capped_fraction", "clipped_fraction")}


@dataclass(frozen=True)
class Curves:
    """Curves of a run over training: values are [K, P], NaN where nothing was measured."""

    config: Record
    env_steps: NDArray[np.int64]  # [K], of each member
    values: dict[str, NDArray[np.float64]]  # keyed by the names in CURVES


def read_curves(run: Path) -> Curves:
    """Read metrics.jsonl, averaged within at most `BINS` stretches of training, or a published curves.csv.

    Returns are averaged over the episodes that ended within a stretch.

    Raises:
        UsageError: the folder has neither.
    """
    config = records.read_config(run)
    if (run / "curves.csv").exists() and not (run / "metrics.jsonl").exists():
        return _from_csv(config, run / "curves.csv")
    members, logged = len(config["seeds"]), {name: NAMES_IN_LOG.get(name, (name,)) for name, _ in CURVES[1:]}
    needed = ("episodes", "return_sum", *(key for keys in logged.values() for key in keys))
    at, rows = [], []
    for row in records.metrics(run):
        at.append(records.steps_of(row))
        rows.append({key: np.array(row[key]) for key in needed if key in row})  # a twentieth of it
    if not rows:
        raise UsageError(f"{run} has neither metrics.jsonl nor curves.csv: there is nothing to draw")
    steps, values = [], {name: [] for name, _ in CURVES}
    edges = np.linspace(0, len(rows), min(BINS, len(rows)) + 1).round().astype(int)  # as equal as iterations allow
    for first, end in itertools.pairwise(edges):
        stretch = rows[first:end]
        steps.append(at[end - 1])
        episodes = np.sum([row["episodes"] for row in stretch], axis=0)
        total = np.sum([row["return_sum"] for row in stretch], axis=0)
        values["return"].append(np.divide(total, episodes, out=np.full(members, np.nan), where=episodes > 0))
        for name, keys in logged.items():
            known = [row[key] for row in stretch for key in keys if key in row]  # the first iteration has no updates
            values[name].append(np.mean(known, axis=0) if known else np.full(members, np.nan))
    return Curves(config, np.array(steps), {name: np.array(value) for name, value in values.items()})


def learning_curves(runs: Sequence[Path], out: Path) -> None:
    """Draw one picture of runs of the same env: return, ESS and KL over env steps of a member.

    A thin line is a member, a thick one the mean of members that differ only in their seeds, across all runs.

    Raises:
        UsageError: the runs are of several envs, one has nothing to draw, or `out` is not a .png.
    """
    if out.suffix != ".png":
        raise UsageError(f"--out {out}: the name must end in .png")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = [read_curves(run) for run in runs]
    tasks = sorted({one.config["env"] for one in curves})
    if len(tasks) > 1:
        raise UsageError(f"a picture shows one env, not {' and '.join(tasks)}: name runs of one of them")
    sets = sorted({one.config.get("dataset") or "" for one in curves})
    if len(sets) > 1:
        raise UsageError(f"a picture shows one data set, not {' and '.join(x or 'an env' for x in sets)}")
    for name in configurations.made_anew([one.config for one in curves]):
        raise UsageError(f"{name} was recorded again between these runs: draw those of one recording at a time")
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4.6 * len(PANELS), 3.6), layout="constrained")
    colors = itertools.cycle(plt.rcParams["axes.prop_cycle"].by_key()["color"])
    backends = sorted({one.config["backend"] for one in curves})
    found: dict[tuple[Series, tuple[int, ...]], list[tuple[Curves, list[int]]]] = {}
    for one in curves:
        for series, group in collection.series(one.config).items():  # an unfinished run lacks its last steps
            found.setdefault((series, tuple(one.env_steps)), []).append((one, group))
    labels, _ = collection.name_methods({series.method for series, _ in found})
    budgets = {series.task.steps for series, _ in found}
    for ((task, method), steps), parts in found.items():
        color, count = next(colors), sum(len(group) for _, group in parts)
        label = labels[method] + f", {task.backend}" * (len(backends) > 1)
        label += f", {task.steps:,} {task.unit}" * (len(budgets) > 1)
        for axis, (name, _) in zip(axes, PANELS, strict=True):
            values = np.concatenate([one.values[name][:, group] for one, group in parts], axis=1)
            whole = ~np.isnan(values).any(1)
            axis.plot(np.array(steps)[whole], values[whole], color=color, alpha=0.25, linewidth=0.7)
            named = f"{label} ({count} seed{'s' * (count > 1)})"
            axis.plot(np.array(steps)[whole], values[whole].mean(1), color=color, linewidth=2.0, label=named)
    for axis, (_, title) in zip(axes, PANELS, strict=True):
        axis.set_title("return of evaluations" if sets[0] and axis is axes[0] else title, fontsize=10)
        axis.set_xlabel(f"{records.unit(curves[0].config)} of one seed")
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=8)
    where = f"backend{'s' * (len(backends) > 1)} {' and '.join(backends)}"
    figure.suptitle(f"{tasks[0]}{', learned from ' * bool(sets[0])}{sets[0]}  ({where})", fontsize=11)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name("part-" + out.name)
    figure.savefig(part, dpi=110)
    plt.close(figure)
    part.replace(out)


def publish(run: Path, out: Path, *, overwrite: bool = False) -> list[str]:
    """Copy the small parts of a finished run into folder `out`: config.json, result.json, curves.csv. -> their names

    curves.csv has a row for each member and stretch of training: env_steps, member, and all `CURVES`. A peer's run has
    no curves.

    Raises:
        UsageError: the run is not finished, `out` holds something other than a published run, or it holds a run with
            other seeds or settings and `overwrite` is False.
    """
    config, result = check_publishable(run, out, overwrite=overwrite)
    curves = read_curves(run) if "iterations" in config else None
    records.prepare_published(out, ("config.json", "result.json", "curves.csv", "curves.csv.part"))
    (out / "curves.csv").unlink(missing_ok=True)  # it may be another run's
    records.write_json(out / "config.json", config)
    records.write_json(out / "result.json", result)
    if curves is not None:
        part = out / "curves.csv.part"
        with open(part, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([records.steps_name(config), "member", *curves.values])
            for k, steps in enumerate(curves.env_steps):
                for member in range(len(config["seeds"])):
                    row = [value[k, member] for value in curves.values.values()]
                    writer.writerow([steps, member, *("" if np.isnan(x) else f"{x:.6g}" for x in row)])
        part.replace(out / "curves.csv")
    return ["config.json", "result.json"] + ["curves.csv"] * (curves is not None)


def check_publishable(run: Path, out: Path, *, overwrite: bool) -> tuple[Record, Record]:
    """Raises UsageError as `publish` does, and writes nothing. -> (config, result)"""
    if run.resolve() in (out.resolve(), *out.resolve().parents):
        raise UsageError(f"{out} lies in the run folder {run} itself: choose another place")
    config, result = records.read_config(run), records.read_result(run)
    configurations.check_result(config, result)
    if (out / "config.json").exists() and not overwrite:
        there = records.read_config(out)
        if words := configurations.differing(there, config):
            raise UsageError(f"{out} holds another run, of {words}: choose another place, or --overwrite")
    return config, result


def _from_csv(config: Record, path: Path) -> Curves:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    members = len(config["seeds"])
    try:
        values = {
            name: np.array([float(row.get(name) or "nan") for row in rows]).reshape(-1, members) for name, _ in CURVES
        }
        return Curves(config, np.array([int(row[records.steps_name(config)]) for row in rows[::members]]), values)
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{path}: not the curves of {members} members; the file is damaged") from None
