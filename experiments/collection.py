"""The contents of a report: the run folders below a directory, read, checked and put into rows. Files only, no torch.

A task is an env on one backend with one budget of env steps; a method is an agent with all its settings. A row is a
method on a task, over all seeds, from any number of folders. What is wrong with a run is kept as a sentence, and
nothing wrong enters a number.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ess_rl.errors import UsageError
from experiments import configurations, records, references
from experiments.records import Record

RUNNING_MINUTES = 15  # a run without a result that wrote something within this time counts as running


class Task(NamedTuple):
    """The scope within which scores are comparable: backends and budgets are kept apart."""

    steps: int  # env steps requested for each seed; updates on a data set
    env: str
    backend: str
    dataset: str = ""  # what was learned from in place of the env
    references: tuple[float, ...] = ()  # the data set's own returns for the scores 0 and 1
    options: tuple[str, ...] = ()  # of the env, other than its defaults: "g=5"

    def __str__(self) -> str:
        return f"{self.name} ({self.backend}, {self.steps:,} {self.unit})"

    @property
    def name(self) -> str:
        env = f"{self.env} ({', '.join(self.options)})" if self.options else self.env
        return f"{env} from {self.dataset}" if self.dataset else env

    @property
    def unit(self) -> str:
        return records.unit({"dataset": self.dataset})

    def normalized(self, value: float) -> float | None:
        """A return normalized by the data set's own references, or by the suite's table; None if there are none."""
        if not self.dataset:
            return references.normalized(self.env, value)
        if not self.references:
            return None
        low, high = self.references
        return (value - low) / (high - low)


class Method(NamedTuple):
    """An agent with all its settings: two runs of one method differ only in task and seeds."""

    agent: str
    settings: tuple[tuple[str, str], ...]  # name -> value as JSON, sorted by name


class Series(NamedTuple):
    """Task and method of runs that differ only in their seeds: a row of a comparison, and a line of a picture."""

    task: Task
    method: Method


@dataclass(frozen=True)
class Run:
    """One run folder."""

    path: Path
    name: str  # relative to the directory of the report
    state: str  # "finished", "running", "stopped" (no result, nothing written lately) or "damaged"
    detail: str = ""  # how far it got, or what is wrong
    config: Record = field(default_factory=dict)
    result: Record = field(default_factory=dict)

    @property
    def wall_seconds(self) -> float | None:
        """Training and compilation of the whole run; None if not recorded."""
        if "training_seconds" not in self.result:
            return None
        return self.result["training_seconds"] + self.result.get("compile_seconds", 0.0)


@dataclass
class Row:
    """A method on a task. `members` are (run, index of the member in it), ordered by seed."""

    task: Task
    method: Method
    label: str
    members: list[tuple[Run, int]]
    repeated: bool = False  # a seed was found twice: taking either one is a choice

    @property
    def seeds(self) -> list[int]:
        return [run.config["seeds"][member] for run, member in self.members]

    @property
    def finals(self) -> list[float]:
        return [run.result["final_return"][member] for run, member in self.members]

    @property
    def runs(self) -> list[Run]:
        """Each folder once."""
        return list({run.name: run for run, _ in self.members}.values())


@dataclass
class Collection:
    """Everything in a directory, sorted: rows by task and label, runs by name."""

    runs: list[Run]
    rows: list[Row]
    labels: dict[Method, str]
    differing: dict[str, list[str]]  # agent with several methods -> the settings in which they differ
    problems: list[str]


def collect(root: Path) -> Collection:
    """Read every run folder below `root`.

    Raises:
        UsageError: `root` is no directory or holds no run folder.
    """
    if not root.is_dir():
        raise UsageError(f"{root}: no such directory")
    runs = [read_run(root, folder) for folder in run_folders(root)]
    if not runs:
        raise UsageError(f"{root} holds no run folder (one with a config.json): train something first")
    problems = [f"{run.name}: {run.detail}" for run in runs if run.state == "damaged"]
    problems += [f"{run.name}: no result ({run.state}; {run.detail})" for run in runs if run.state in _UNFINISHED]
    several = configurations.made_anew([run.config for run in runs if run.state == "finished"])
    problems += [f"{name}: recorded again between its runs, which are left out" for name in several]
    found: dict[tuple[Task, Method], list[tuple[Run, int]]] = {}
    for run in runs:
        if run.state == "finished" and not {*configurations.learned_from(run.config)} & {*several}:
            task = _task(run.config)
            for member in range(len(run.config["seeds"])):
                found.setdefault((task, method_of(run.config, member)), []).append((run, member))
    labels, differing = name_methods({method for _, method in found})
    rows = [_row(task, method, labels[method], members, problems) for (task, method), members in found.items()]
    rows.sort(key=lambda row: (row.task.env, row.task.dataset, row.task.backend, row.task.steps, row.label))
    return Collection(runs, rows, labels, differing, problems)


def run_folders(root: Path) -> list[Path]:
    """Folders with a config.json or a result.json, sorted. Folders inside a run folder are not searched."""
    found = []
    for folder, inner, files in os.walk(root):
        if {"config.json", "result.json"} & set(files):
            found.append(Path(folder))
            inner.clear()
    return sorted(found)


def read_run(root: Path, path: Path) -> Run:
    """Read a run folder in whatever state it is; its contents never make this raise."""
    name = path.relative_to(root).as_posix()
    name = root.resolve().name if name == "." else name
    config: Record = {}
    try:
        config = records.read_config(path)
        configurations.check(config)
        if not (path / "result.json").exists():
            return Run(path, name, *_progress(path, config), config=config)
        result = records.read_json(path / "result.json")
        configurations.check_result(config, result)
    except UsageError as error:
        return Run(path, name, "damaged", str(error).replace(f"{path}{os.sep}", ""), config)
    return Run(path, name, "finished", "", config, result)


def series(config: Record) -> dict[Series, list[int]]:
    """The members of a run, grouped by everything except the seed -> their indices."""
    found: dict[Series, list[int]] = {}
    for member in range(len(config["seeds"])):
        found.setdefault(Series(_task(config), method_of(config, member)), []).append(member)
    return found


def method_of(config: Record, member: int) -> Method:
    """The agent and all settings of one member of a run, including the number of evaluation episodes."""
    settings = configurations.full_settings(config)
    settings |= {name: values[member] for name, values in config["sweep"].items()}
    settings["episodes"] = config["episodes"]
    if "iterations" in config and not config.get("dataset"):  # environments start afresh at each checkpoint
        settings["checkpoints"] = config.get("checkpoints", 10)  # the number in runs that do not record it
    return Method(config["agent"], tuple(sorted((name, json.dumps(value)) for name, value in settings.items())))


def name_methods(methods: Iterable[Method]) -> tuple[dict[Method, str], dict[str, list[str]]]:
    """A short name for each method, and for each agent with several methods the settings in which they differ.

    A name is the agent's, plus what sets the method apart: settings whose value differs from that of most methods of
    the agent, or whose values have no majority. More than two such settings become a letter, explained by a table.
    """
    agents: dict[str, list[Method]] = {}
    for method in sorted(methods):
        agents.setdefault(method.agent, []).append(method)
    labels: dict[Method, str] = {}
    differing: dict[str, list[str]] = {}
    for agent, those in agents.items():
        settings = [dict(method.settings) for method in those]
        names = sorted({name for one in settings for name in one})
        names = [name for name in names if len({one.get(name) for one in settings}) > 1]
        if names:
            differing[agent] = names
        for number, (method, one) in enumerate(zip(those, settings, strict=True)):
            alike = {name: sum(other.get(name) == one.get(name) for other in settings) for name in names}
            apart = [name for name in names if 2 * alike[name] <= len(those)]
            words = ", ".join(f"{name.rstrip('_')} {show(method, name)}" for name in apart)
            labels[method] = f"{agent} ({_letters(number)})" if len(apart) > 2 else f"{agent} {words}".rstrip()
    return labels, differing


def show(method: Method, name: str) -> str:
    """A setting in readable form; a dash if the version of that run did not have it."""
    text = dict(method.settings).get(name)
    if text is None:
        return "-"
    value = json.loads(text)
    if isinstance(value, list):
        return " ".join(map(str, value))
    if value == "":  # a name that is not given
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def span(seeds: Sequence[int]) -> str:
    """Seeds as text: 0 to 9, or 1, 4, 7."""
    ordered = sorted(seeds)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered))


_UNFINISHED = ("running", "stopped")


def _task(config: Record) -> Task:
    own = tuple(config.get("references") or ())
    options = tuple(f"{name}={value}" for name, value in sorted(config.get("env_options", {}).items()))
    return Task(config["steps"], config["env"], config["backend"], config.get("dataset") or "", own, options)


def _letters(number: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    return ("" if number < 26 else _letters(number // 26 - 1)) + chr(ord("a") + number % 26)


def _row(task: Task, method: Method, label: str, members: Sequence[tuple[Run, int]], problems: list[str]) -> Row:
    """A row with each seed once, from the first folder that has it; every further occurrence is a problem."""
    kept: dict[int, tuple[Run, int]] = {}
    again: dict[tuple[str, str], list[int]] = {}
    for run, member in members:
        seed = run.config["seeds"][member]
        if seed in kept:
            again.setdefault((kept[seed][0].name, run.name), []).append(seed)
        else:
            kept[seed] = (run, member)
    for (first, second), seeds in again.items():
        where = f"twice in {first}" if first == second else f"in {first} and again in {second}"
        problems.append(
            f"{label} on {task}: seed {span(seeds)} {where}; counted once, from {first}, and left out of aggregates"
        )
    if len(kept) == 1:
        problems.append(f"{label} on {task}: one seed has no interval, it says nothing of how far the next may fall")
    return Row(task, method, label, [kept[seed] for seed in sorted(kept)], repeated=bool(again))


def _progress(path: Path, config: Record) -> tuple[str, str]:
    """-> (running or stopped, how far it got) of a run without result.json"""
    written = 0.0
    for file in path.iterdir():
        with suppress(FileNotFoundError):  # a running run may rename it at this moment
            written = max(written, file.stat().st_mtime if file.is_file() else 0.0)
    minutes = (time.time() - written) / 60.0
    row = records.last_metrics(path)
    reached = f"{records.steps_of(row):,} of {config['steps']:,} {records.unit(config)}" if row else "no metrics yet"
    if done := len(list(path.glob("seed-*.json"))):
        reached = f"{done} of {len(config['seeds'])} seeds"
    ago = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h" if minutes < 2880 else _days(minutes)
    state = "running" if minutes < RUNNING_MINUTES else "stopped"
    return state, f"{reached}, last written {ago} ago"


def _days(minutes: float) -> str:
    return f"{minutes / 1440:.0f} days"
