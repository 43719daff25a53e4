"""The files of a run folder: their names, and reading and writing those that need no torch, as reports do.

config.json       first: everything the run is a function of, and where and with what it ran
metrics.jsonl     one line per iteration; every list has one entry per member
tensorboard/      the same for TensorBoard
checkpoints/      NNNNNNNNN.safetensors, named by env steps of a member, or its updates on a data set
curve.png         learning curves
replay.safetensors, replay-from.safetensors   if requested: see experiments/old_data.py
demonstrations.safetensors                    if the agent uses them: see experiments/demonstrations.py
result.json       last, by rename: a folder that has it is a finished run
lock              held by the process that trains the run
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from ess_rl.errors import UsageError
from experiments import machine

FORMAT = 1
EPISODES = 20  # of each member in the final evaluation, unless more or fewer are asked for
REPLAY, REPLAY_FROM, DEMONSTRATIONS = "replay.safetensors", "replay-from.safetensors", "demonstrations.safetensors"
UNFINISHED = ("*.part", ".tmp*")  # what a kill leaves of a file: ours, and safetensors' own
FILES = (
    "config.json",
    "metrics.jsonl",
    "tensorboard",
    "checkpoints",
    "curve.png",
    "curves.csv",  # of a published run that a new run replaces
    "result.json",
    REPLAY,
    REPLAY_FROM,
    DEMONSTRATIONS,
    "seed-*.json",
    *UNFINISHED,
)
COPIED = (REPLAY_FROM, DEMONSTRATIONS)  # written before config.json: what a run begins with
REQUIRED = ("agent", "env", "backend", "seeds", "sweep", "steps", "episodes", "device", "compiled", "config")
PACKAGES = (
    "torch",
    "numpy",
    "gymnasium",
    "mujoco",
    "mujoco-warp",
    "warp-lang",
    "envpool",
    "minari",
    "stable-baselines3",
    "d3rlpy",
)

Record = dict[str, Any]


def write_json(path: Path, record: Record) -> None:
    """Write by rename, so that a reader sees the old file or the new one, never half of one."""
    part = path.with_name(path.name + ".part")
    with open(part, "w") as file:
        json.dump(record, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_json(path: Path) -> Record:
    """Raises UsageError if the file is missing or cut short."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; is {path.parent} a run folder?") from None
    except NotADirectoryError:
        raise UsageError(f"{path.parent} is a file, and no run folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid JSON ({error}); the file is damaged") from None


def read_result(run: Path) -> Record:
    """The result of a run folder. Raises UsageError if the run is not finished."""
    if (run / "config.json").exists() and not (run / "result.json").exists():
        raise UsageError(f"{run} is not finished: it has no result.json yet; 'ess-rl resume {run}' continues it")
    return read_json(run / "result.json")


def read_config(run: Path) -> Record:
    """The configuration of a run folder."""
    config = read_json(run / "config.json")
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else None
        raise UsageError(f"{run / 'config.json'}: not the configuration of a run (format {found!r}, expected {FORMAT})")
    missing = [name for name in REQUIRED if name not in config]
    if missing:
        raise UsageError(f"{run / 'config.json'}: {missing[0]!r} is missing; the file was changed by hand")
    return config


def metrics(run: Path) -> Iterator[Record]:
    """The whole lines of metrics.jsonl, one after the other: of a large population, all of them would fill the memory.

    Raises:
        UsageError: a line is damaged, other than a last one, which a kill may have cut short.
    """
    for row, _ in _lines(run / "metrics.jsonl"):
        yield row


def _lines(path: Path) -> Iterator[tuple[Record, int]]:
    """The whole lines of a metrics.jsonl, each with the place in the file where it ends."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        number = 0
        while line := file.readline():
            number += 1
            try:
                row = json.loads(line)
            except ValueError:  # not JSON, or not UTF-8
                if not file.read(1):
                    return
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("iteration"), int):
                raise UsageError(f"{path}: line {number} is damaged")
            yield row, file.tell()


def last_metrics(run: Path) -> Record | None:
    """The last whole line of metrics.jsonl, without reading the others; None if there is none."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            end, size = file.seek(0, os.SEEK_END), 2**14
            while True:
                file.seek(max(0, end - size))
                lines = file.read().split(b"\n")[:-1]  # what follows the last newline is not a whole line
                if len(lines) > 1 or (lines and size >= end):
                    return json.loads(lines[-1])
                if size >= end:
                    return None
                size *= 4  # a line is a few KiB; of a large population, more
    except (FileNotFoundError, ValueError):  # not JSON, or not UTF-8
        return None


def unit(config: Record) -> str:
    """The unit of a run's budget: env steps, or updates if a data set replaces the environment."""
    return "updates" if config.get("dataset") else "env steps"


def steps_name(config: Record) -> str:
    """The name of that unit in files."""
    return unit(config).replace(" ", "_")


def steps_of(record: Record) -> Any:
    """Env steps or updates in a line of metrics.jsonl or in a result.json; None if there are none."""
    return record.get("updates", record.get("env_steps"))


def append_line(file: TextIO, row: Record) -> None:
    """Append a line and flush it."""
    file.write(json.dumps(row, allow_nan=False) + "\n")
    file.flush()


def cut_metrics(run: Path, iteration: int) -> float:
    """Keep the lines up to `iteration`, that of the checkpoint. -> the seconds of training that the last one tells

    Raises:
        UsageError: they do not reach that far, as after a power cut that the checkpoint survived.
    """
    path, kept, end, seconds = run / "metrics.jsonl", 0, 0, 0.0
    if iteration > 0:
        for row, after in _lines(path):
            if row["iteration"] != kept + 1:
                break
            kept, end, seconds = kept + 1, after, row["seconds"]
            if kept == iteration:
                break
    if kept < iteration:
        newest = checkpoints(run)[-1]
        raise UsageError(
            f"{path} has {kept} of the {iteration} iterations before {newest}: move that file away, and 'ess-rl resume "
            f"{run}' continues from an older one"
        )
    with open(path, "ab+") as file:
        file.truncate(end)
        file.seek(max(0, end - 1))
        if file.read(1) not in (b"", b"\n"):
            file.write(b"\n")
    return seconds


def drop_unfinished(run: Path) -> None:
    """Remove what a kill left of files that were being written: a replay may be large. Only while the run is locked."""
    for folder in (run, run / "checkpoints"):
        for name in UNFINISHED:
            for path in folder.glob(name):
                path.unlink(missing_ok=True)


def checkpoints(run: Path) -> list[Path]:
    """Oldest first; files whose names are not a number of steps are not ours."""
    found = [path for path in (run / "checkpoints").glob("*.safetensors") if path.stem.isdigit()]
    return sorted(found, key=lambda path: int(path.stem))


def replay_of(checkpoint: Path) -> Path:
    """The file next to a checkpoint that a run with older data also needs to resume."""
    return checkpoint.with_suffix(".replay")


def drop_old_replays(run: Path) -> None:
    """Remove old replays, which are large; two remain in case the newest is damaged."""
    for old in checkpoints(run)[:-2]:
        replay_of(old).unlink(missing_ok=True)


def groups(record: Record) -> dict[str, list[int]]:
    """Members of a config or a result, grouped by everything except the seed: label -> their indices."""
    found: dict[str, list[int]] = {}
    for member in range(len(record["seeds"])):
        settings = [f"{name} {values[member]!r}" for name, values in record["sweep"].items()]
        found.setdefault(" ".join([record["agent"], *settings]), []).append(member)
    return found


def default_folder(agent: str, env: str) -> Path:
    """The folder of a run without --out: runs/AGENT-ENV, with the task's id made fit for a file name."""
    return Path("runs") / f"{agent}-{re.sub('[/:]', '-', env)}"


@contextmanager
def new_run(out: Path, *, overwrite: bool) -> Iterator[None]:
    """Make `out` a folder that holds no run, or refuse; it stays locked while the caller writes what a run begins with.

    When a run is replaced, only its own files are removed.

    Raises:
        UsageError: it holds a run and `overwrite` is False, a run is being trained there, or it holds something else.
    """
    _check_new(out, overwrite)  # before a lock is put there
    out.mkdir(parents=True, exist_ok=True)
    with alone(out):
        if _check_new(out, overwrite):  # by now another command may have begun a run there
            for name in (*FILES[1:], FILES[0]):  # config.json last: a kill in between leaves a run that can be replaced
                for path in out.glob(name):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield


def _check_new(out: Path, overwrite: bool) -> bool:
    """Raises UsageError if no run can begin in `out`. -> whether it holds a run, to be replaced"""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file: choose another place")
    # What an interrupted start leaves is not a run yet: these, their .part, and what safetensors names .tmp*.
    before_config = ("config.json.part", "lock", ".tmp", *COPIED)
    if not out.exists() or all(path.name.startswith(before_config) for path in out.iterdir()):
        return False
    try:
        read_config(out)
    except UsageError:
        raise UsageError(f"--out {out} is not empty and holds no run: choose another place") from None
    if not overwrite:
        raise UsageError(f"--out {out} holds a run: 'ess-rl resume {out}' continues it, --overwrite replaces it")
    return True


def check_file(out: Path | None) -> None:
    """Raises UsageError if the file to be written is a folder: before hours of measuring, not after."""
    if out is not None and out.is_dir():
        raise UsageError(f"--out {out} is a folder: name a file")


def write_file(out: Path | None, record: Record) -> None:
    """Write a JSON file that was asked for, and make its folder; None: it was not."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, record)


def prepare_published(out: Path, names: Collection[str]) -> None:
    """Make `out` a folder that holds nothing except what is to be published there (`names`), or refuse.

    Raises:
        UsageError: it is a file, or holds something else.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: choose another place")
    if out.exists() and (others := sorted({path.name for path in out.iterdir()} - {*names, "lock"})):
        shown = ", ".join(others[:3]) + " ..." * (len(others) > 3)
        raise UsageError(f"{out} holds other files than what is to be published ({shown}): choose another place")
    out.mkdir(parents=True, exist_ok=True)


@contextmanager
def alone(run: Path, doing: str = "is training this run") -> Iterator[None]:
    """Lock a folder against other processes; the system releases it however this process ends.

    doing: what another process that holds it is doing.

    Raises:
        UsageError: another process holds it.
    """
    if not run.is_dir():
        raise UsageError(f"{run}: no such run folder")
    lock = FileLock(run / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"{run}: another process {doing}; wait for it or stop it") from None
    try:
        yield
    finally:
        lock.release()


def origin() -> Record:
    """Versions, machine and git commit, which must be quoted with any figure."""
    return {
        "versions": dict(_versions()),
        "machine": machine.describe(),
        "git_commit": _git_commit(),
        "command": ["ess-rl", *(from_here(word) for word in sys.argv[1:])],
    }


def from_here(word: str) -> str:
    """A word of a command, as it would be given in this folder: published files must name no folder of a machine."""
    return re.sub(rf"(^|=){re.escape(f'{Path.cwd()}{os.sep}')}", r"\1", word)


@cache
def _versions() -> dict[str, str]:
    """Versions of Python and of PACKAGES, as far as they are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


@cache  # what was imported does not change, even if the checkout does
def _git_commit() -> str | None:
    """Commit of the checkout that holds this file; "+changes" if it differs from that commit; None if there is none."""
    where = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else the repository merely holds an installed copy
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def check_positive(numbers: Mapping[str, int]) -> None:
    """Raises UsageError for a count below 1, or beyond what a float64 can count, naming its option."""
    for name, number in numbers.items():
        if not 1 <= number <= 2**53:
            rule = "must be at least 1" if number < 1 else f"must be at most 2^53, {2**53:,}"
            raise UsageError(f"--{name.replace('_', '-')} {number}: {rule}")
