"""Runs the unfinished run sets of a suite, each in a process of its own, several at a time.

A job's state is its folder. A job with a result.json is done; one that was stopped resumes; one that fails is
named at the end and keeps no other from running. So the command can be killed and repeated at any time.

An `Executor` decides where jobs run: `Local` on this machine, `experiments.on_ray` on a cluster.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

from ess_rl.errors import UsageError
from experiments import configurations, machine, records
from experiments.display import Line, clock
from experiments.report import tables
from experiments.suites import SUITES, Job, how_to_record

_LOOK_EVERY = 0.5  # seconds


class Executor(Protocol):
    """Runs jobs. Their run folders end up in one directory, wherever they ran, with result.json written last."""

    def room(self) -> bool:
        """Return whether another job can be started now."""
        ...

    def start(self, job: Job) -> None:
        """Start or resume a job whose folder has a config.json. Raises UsageError if that is impossible."""
        ...

    def ended(self) -> list[tuple[Job, str | None]]:
        """The jobs that ended since the last call, each with the reason if it failed, else None."""
        ...

    def steps(self, job: Job) -> int:
        """Env steps of all the job's members so far."""
        ...

    def close(self) -> None:
        """Stop what still runs. Nothing is lost: a run resumes from its newest checkpoint."""
        ...


def benchmark(suite: str, out: Path | None = None, on: Callable[[Path], Executor] | None = None) -> list[str]:
    """Train what is missing from a suite, and print its table. -> a line for each job that failed

    Args:
        suite: one of SUITES.
        out: where its run folders are; default: runs/SUITE.
        on: makes the executor, given `out`; default: `Local`, one job at a time.
    """
    if suite not in SUITES:
        raise UsageError(f"unknown suite {suite!r}: choose one of {', '.join(SUITES)}")
    return run_jobs(suite, SUITES[suite], out or Path("runs") / suite, on or Local)


def run_jobs(name: str, suite: Sequence[Job], out: Path, on: Callable[[Path], Executor]) -> list[str]:
    """As `benchmark`, for any jobs under a name of their own."""
    _check_data_sets(name, [job for job in suite if not (out / job.name / "result.json").exists()])
    if (out / "config.json").exists():
        raise UsageError(f"{out} is a run folder, and no place for those of {name}: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    with records.alone(out, "carries out jobs in this folder"):
        waiting = [job for job in suite if not _is_done(job, out, failed)]
        print(f"{name}: {len(suite)} jobs, {len(waiting)} to run, in {out}", flush=True)
        if waiting:
            executor = on(out)
            try:
                _run_all(suite, waiting, executor, failed)
            finally:
                executor.close()
    own = [out / job.name for job in suite if job.name not in failed]  # the folder of another may hold other runs
    finished = [folder for folder in own if (folder / "result.json").exists()]
    if finished:
        print(tables.comparison(finished))
    return [f"{name}: {reason}" for name, reason in failed.items()]


def _check_data_sets(name: str, suite: Sequence[Job]) -> None:
    """Raises UsageError if data sets of these jobs are not here, with the command that records the first of them."""
    if missing := _not_here(suite):
        from envs import minari_data

        wanted = {name for job in suite for name in job.data_sets}
        raise UsageError(
            f"{name}: {len(missing)} of {len(wanted)} data sets are not in {minari_data.root()}: "
            f"{', '.join(missing)}. The first is made by: {how_to_record(missing[0])}"
        )


def _not_here(suite: Sequence[Job]) -> list[str]:
    """Data sets of these jobs that are not on this machine, in the jobs' order."""
    wanted = list(dict.fromkeys(name for job in suite for name in job.data_sets))
    if not wanted:
        return []
    from envs import minari_data

    here = minari_data.local()
    return [dataset for dataset in wanted if dataset not in here]


def _is_done(job: Job, out: Path, failed: dict[str, str]) -> bool:
    """Return whether nothing is left to do for a job: it has its result, or something else occupies its folder."""
    try:
        _prepare(job, out / job.name)
    except UsageError as error:
        failed[job.name] = str(error)
        return True
    return (out / job.name / "result.json").exists()


def _prepare(job: Job, folder: Path) -> None:
    """Write config.json, or check that the existing one is this job's."""
    from agents import AGENTS, OFFLINE_AGENTS
    from experiments import offline_run, plan, run
    from experiments.peers import d3rlpy, sb3

    common: Any = {"settings": job.settings, "seeds": job.seeds, "steps": job.steps, **job.options}
    if job.agent not in AGENTS and job.agent not in OFFLINE_AGENTS:
        module, task, source = (d3rlpy, "dataset", job.dataset) if job.dataset else (sb3, "env", job.env)
        if (folder / "result.json").exists():  # checked here: `start` needs the peer's library, and its data
            config = dataclasses.asdict(module.PEERS[job.agent].config(**job.settings))
            now = {"agent": job.agent, task: source, "steps": job.steps, "config": config}
            now |= {"sweep": {}, "episodes": records.EPISODES, **job.options}
            before = records.read_config(folder)
            if words := configurations.differing(before, now, ("agent", task, "steps", "episodes", "config")):
                raise UsageError(f"{folder} holds another run, of {words}: choose another --out")
            if before["seeds"] == list(job.seeds):
                return
        module.start(job.agent, source, out=folder, **common)
        return
    kind, start, source = (offline_run, offline_run.start, job.dataset) if job.dataset else (plan, run.start, job.env)
    if (folder / "result.json").exists() and _not_here([job]):
        return  # nothing is left to do, and the data it learned from cannot be checked
    if not (folder / "config.json").exists():
        start(job.agent, source, sweep=job.sweep, out=folder, **common)
        return
    before, now = records.read_config(folder), kind.make(job.agent, source, sweep=job.sweep, **common)
    if words := configurations.differing(before, now, (*configurations.SAME, "reset_every")):
        raise UsageError(f"{folder} holds another run, of {words}: choose another --out")


def _run_all(suite: Sequence[Job], waiting: list[Job], executor: Executor, failed: dict[str, str]) -> None:
    running: list[Job] = []
    counted = [job for job in suite if job.name not in failed]  # a folder that holds another run counts for nothing
    began, at_first = time.monotonic(), sum(executor.steps(job) for job in counted)
    total = sum(job.steps * job.members for job in counted)
    unit = records.unit({"dataset": suite[0].dataset})
    with Line() as line:
        while waiting or running:
            while waiting and executor.room():
                job = waiting.pop(0)
                try:
                    executor.start(job)
                    running.append(job)
                except UsageError as error:
                    failed[job.name] = str(error)
            time.sleep(_LOOK_EVERY)
            for job, reason in executor.ended():
                running.remove(job)
                if reason is not None:
                    failed[job.name] = reason
                line.say(f"{job.name}: {'done' if reason is None else 'failed'}")
            done = sum(executor.steps(job) for job in counted)
            elapsed = time.monotonic() - began
            left = clock(elapsed * (total - done) / (done - at_first)) if done > at_first else "-"
            names = ", ".join(job.name for job in running[:4]) + f" and {len(running) - 4} more" * (len(running) > 4)
            line.show(done / total, f"{100 * done / total:3.0f} %  {done:>13,} {unit}  {left} left  {names}")


class Local:
    """Runs jobs as processes on this machine.

    Args:
        out: where their folders are.
        jobs: run sets at a time; each gets its share of the cores, and at most OMP_NUM_THREADS of torch's threads.
            Two jobs of ten seeds use two cores better than one job does.
    """

    def __init__(self, out: Path, jobs: int = 1):
        records.check_positive({"jobs": jobs})
        self._out, self._jobs = out, jobs
        self._free = list(range(jobs))
        self._running: list[tuple[Job, subprocess.Popen, int]] = []

    def room(self) -> bool:
        return bool(self._free)

    def start(self, job: Job) -> None:
        slot, cores = self._free.pop(0), machine.available_cores()
        threads = max(1, cores // self._jobs)
        if (asked := os.environ.get("OMP_NUM_THREADS", "")).isdigit():  # set by those who share the machine with others
            threads = max(1, min(threads, int(asked)))
        cpus = []
        if hasattr(os, "sched_getaffinity") and self._jobs > 1:
            mine = sorted(os.sched_getaffinity(0))
            cpus = [mine[(slot * threads + i) % cores] for i in range(threads)]
        self._running.append((job, launch(self._out / job.name, threads, cpus), slot))

    def ended(self) -> list[tuple[Job, str | None]]:
        over = [one for one in self._running if one[1].poll() is not None]
        for one in over:
            self._running.remove(one)
            self._free.append(one[2])
        return [(job, why_failed(self._out / job.name, process.returncode)) for job, process, _ in over]

    def steps(self, job: Job) -> int:
        return steps_done(job, self._out / job.name)

    def close(self) -> None:
        for _, process, _ in self._running:
            process.terminate()


def launch(folder: Path, threads: int, cpus: Collection[int] = ()) -> subprocess.Popen:
    """Start or resume the run of a folder, in a process of its own, with a log next to the folder.

    Args:
        threads: how many it may use.
        cpus: the only ones it may use; empty: all.
    """
    words = [sys.executable, "-m", "experiments", "resume", str(folder), "--jobs", str(threads)]
    root = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    with open(log_of(folder), "a") as log:
        process = subprocess.Popen(
            words,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=machine.end_with_parent if sys.platform == "linux" else None,
        )
    if cpus:
        # The simulators' threads depend on the CPUs that a process may use. It has not queried them yet.
        os.sched_setaffinity(process.pid, cpus)
    return process


def log_of(folder: Path) -> Path:
    """The log of what the processes that trained a run folder printed."""
    return folder.with_name(f"{folder.name}.log")


def why_failed(folder: Path, status: int) -> str | None:
    """One line on why a run with this exit status failed; None for 0, or if its result exists all the same."""
    if status == 0 or (folder / "result.json").exists():
        return None
    lines = log_of(folder).read_text().strip().splitlines()
    return f"{lines[-1] if lines else 'no word'} (exit status {status}; see {log_of(folder).name})"


def steps_done(job: Job, folder: Path) -> int:
    """Env steps (or updates) of all members of a job so far, according to its files."""
    if (folder / "result.json").exists():
        return job.steps * job.members
    seeds = len(list(folder.glob("seed-*.json")))  # of a peer
    rows = records.last_metrics(folder)
    return job.steps * seeds + min(job.steps, records.steps_of(rows) if rows else 0) * job.members
