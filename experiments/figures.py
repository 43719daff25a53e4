"""Pictures from the files of runs."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import records

PANELS = (
    ("return", "return of training episodes"),
    ("ess", "effective sample size"),
    ("behavior_kl", "KL(policy || behavior) [nats]"),
)


def learning_curves(runs: Sequence[Path], out: Path, bins: int = 50) -> None:
    """One picture of one or more runs of the same env: return, ESS and KL over env steps of a member.

    A thin line is a member, a thick one the mean of those that share all settings but the seed. Returns are
    averaged over episodes within each of `bins` stretches of training.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(4.6 * len(PANELS), 3.6), layout="constrained")
    colors = iter(plt.rcParams["axes.prop_cycle"].by_key()["color"] * 10)
    for run in runs:
        config, rows = records.read_config(run), records.read_metrics(run)
        for label, group in _groups(config).items():
            color = next(colors)
            for axis, (name, _) in zip(axes, PANELS, strict=True):
                steps, curves = _curves(rows, name, group, bins)
                if not len(steps):
                    continue
                axis.plot(steps, curves, color=color, alpha=0.25, linewidth=0.7)
                axis.plot(steps, curves.mean(1), color=color, linewidth=2.0, label=f"{label} ({len(group)} seeds)")
    for axis, (_, title) in zip(axes, PANELS, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("env steps of one seed")
        axis.grid(alpha=0.25)
    if axes[0].lines:
        axes[0].legend(fontsize=8)
    figure.suptitle(
        f"{records.read_config(runs[0])['env']}  (backend {records.read_config(runs[0])['backend']})", fontsize=11
    )
    part = out.with_name("part-" + out.name)
    figure.savefig(part, dpi=110)
    plt.close(figure)
    part.replace(out)


def publish(run: Path, out: Path, bins: int = 50) -> None:
    """Copy what is small of a finished run into the folder `out`: config.json, result.json and curves.csv.

    curves.csv has a row for each member and stretch of training: env_steps, member, and what `PANELS` draws.
    """
    config, result, rows = records.read_config(run), records.read_json(run / "result.json"), records.read_metrics(run)
    out.mkdir(parents=True, exist_ok=True)
    members = list(range(len(config["seeds"])))
    columns = {name: dict(zip(*_curves(rows, name, members, bins), strict=True)) for name, _ in PANELS}
    with open(out / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["env_steps", "member", *columns])
        for steps in sorted(set().union(*columns.values())):
            for member in members:
                values = [f"{column[steps][member]:.6g}" if steps in column else "" for column in columns.values()]
                writer.writerow([steps, member, *values])
    records.write_json(out / "config.json", config)
    records.write_json(out / "result.json", result)


def _groups(config: dict[str, Any]) -> dict[str, list[int]]:
    """Members by everything but the seed: label -> their indices."""
    groups: dict[str, list[int]] = {}
    for member in range(len(config["seeds"])):
        settings = [f"{name} {values[member]:g}" for name, values in config["sweep"].items()]
        groups.setdefault(" ".join([config["agent"], *settings]), []).append(member)
    return groups


def _curves(rows: list[dict[str, Any]], name: str, group: list[int], bins: int) -> tuple[np.ndarray, np.ndarray]:
    """-> (steps [K], values [K, len(group)]) over at most `bins` stretches; one without a value continues the last."""
    source = "return_sum" if name == "return" else name
    rows = [row for row in rows if source in row]
    steps, values = [], []
    for part in np.array_split(np.arange(len(rows)), min(bins, len(rows))):
        value = np.array([[rows[i][source][m] for m in group] for i in part], dtype=float)
        if name == "return":
            count = np.array([[rows[i]["episodes"][m] for m in group] for i in part], dtype=float).sum(0)
            mean = np.divide(value.sum(0), count, out=np.full(len(group), np.nan), where=count > 0)
        else:
            mean = value.mean(0)
        steps.append(rows[part[-1]]["env_steps"])
        values.append(np.where(np.isnan(mean), values[-1], mean) if values else mean)
    # Long episodes: nothing has ended in the first stretches.
    whole = [i for i, value in enumerate(values) if not np.isnan(value).any()]
    return np.array(steps)[whole], np.array(values)[whole] if whole else np.empty((0, len(group)))
