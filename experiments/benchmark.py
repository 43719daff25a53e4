"""Runs a suite: each run set in a process of its own, several at a time, as far as they are not finished.

A job is its folder. One that has a result.json is done; one that was stopped goes on; one that fails is named at the
end and keeps no other from running. So the command can be killed and given again at any moment.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ess_rl.errors import UsageError
from experiments import records, report
from experiments.display import Line, clock
from experiments.suites import SUITES, Job

_LOOK_EVERY = 0.5  # seconds


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    slot: int


def benchmark(suite: str, out: Path | None = None, jobs: int = 1) -> list[str]:
    """Train what is missing of a suite, and print its table. -> a line for each job that failed

    Args:
        suite: one of SUITES.
        out: where its run folders are; default: runs/SUITE.
        jobs: run sets at a time; each gets its share of the cores. Two cores are better used by two jobs of ten seeds
            than by one.
    """
    if suite not in SUITES:
        raise UsageError(f"unknown suite {suite!r}: choose one of {', '.join(SUITES)}")
    return run_jobs(suite, SUITES[suite], out or Path("runs") / suite, jobs)


def run_jobs(name: str, suite: Sequence[Job], out: Path, jobs: int) -> list[str]:
    """The same for any jobs under a name of their own."""
    records.check_positive({"jobs": jobs})
    failed: dict[str, str] = {}
    waiting = [job for job in suite if not _is_done(job, out, failed)]
    print(f"{name}: {len(suite)} jobs, {len(waiting)} to run, in {out}", flush=True)
    _run_all(suite, waiting, out, jobs, failed)
    finished = [out / job.name for job in suite if (out / job.name / "result.json").exists()]
    if finished:
        print(report.comparison(finished))
    return [f"{name}: {reason}" for name, reason in failed.items()]


def _is_done(job: Job, out: Path, failed: dict[str, str]) -> bool:
    """Whether nothing is to be done for a job: it has its result, or its place is taken by something else."""
    try:
        _prepare(job, out / job.name)
    except UsageError as error:
        failed[job.name] = str(error)
        return True
    return (out / job.name / "result.json").exists()


def _prepare(job: Job, folder: Path) -> None:
    """Write config.json, or see that the one that stands there is this job's."""
    from agents import AGENTS
    from experiments import peers, run

    common: Any = {"settings": job.settings, "seeds": job.seeds, "steps": job.steps, **job.options}
    if job.agent not in AGENTS:
        if not (folder / "result.json").exists():
            peers.start(job.agent, job.env, out=folder, **common)
        return
    if not (folder / "config.json").exists():
        run.start(job.agent, job.env, sweep=job.sweep, out=folder, **common)
        return
    before, now = records.read_config(folder), run.plan(job.agent, job.env, sweep=job.sweep, **common)
    for name in ("agent", "env", "backend", "seeds", "sweep", "steps", "episodes", "config"):
        if before[name] != _as_json(now[name]):
            raise UsageError(f"{folder} holds another run: its {name!r} is {before[name]}: remove it, or choose --out")


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _run_all(suite: Sequence[Job], waiting: list[Job], out: Path, jobs: int, failed: dict[str, str]) -> None:
    running: list[_Running] = []
    free = list(range(jobs))
    began, at_first = time.monotonic(), sum(_steps_done(job, out) for job in suite)
    total = sum(job.steps * job.members for job in suite if job.name not in failed)
    try:
        with Line() as line:
            while waiting or running:
                while waiting and free:
                    slot = free.pop(0)
                    running.append(_Running(waiting[0], _launch(waiting.pop(0), out, slot, jobs), slot))
                time.sleep(_LOOK_EVERY)
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    free.append(one.slot)
                    if one.process.returncode != 0:
                        failed[one.job.name] = _reason(out, one)
                    line.say(f"{one.job.name}: {'failed' if one.job.name in failed else 'done'}")
                done = sum(_steps_done(job, out) for job in suite)
                elapsed = time.monotonic() - began
                left = clock(elapsed * (total - done) / (done - at_first)) if done > at_first else "-"
                names = ", ".join(one.job.name for one in running)
                line.show(done / total, f"{100 * done / total:3.0f} %  {done:>13,} env steps  {left} left  {names}")
    finally:
        for one in running:
            one.process.terminate()  # nothing is lost: a run goes on from its newest checkpoint


def _launch(job: Job, out: Path, slot: int, jobs: int) -> subprocess.Popen:
    cores = records.available_cores()
    threads = max(1, cores // jobs)
    words = [sys.executable, "-m", "experiments", "resume", str(out / job.name), "--jobs", str(threads)]
    root = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    with open(out / f"{job.name}.log", "a") as log:
        linux = sys.platform == "linux"
        process = subprocess.Popen(
            words, stdout=log, stderr=subprocess.STDOUT, env=environment, preexec_fn=_end_with_parent if linux else None
        )
    if hasattr(os, "sched_setaffinity") and jobs > 1:
        # The simulators' threads go by the CPUs that a process may use. It has not begun to ask.
        mine = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(process.pid, {mine[(slot * threads + i) % cores] for i in range(threads)})
    return process


def _end_with_parent() -> None:
    """Ask the kernel to end this process when its parent ends, however it does: else a run would go on unseen."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _reason(out: Path, one: _Running) -> str:
    lines = (out / f"{one.job.name}.log").read_text().strip().splitlines()
    return f"{lines[-1] if lines else 'no word'} (exit status {one.process.returncode}; see {one.job.name}.log)"


def _steps_done(job: Job, out: Path) -> int:
    """Env steps of all members of a job so far."""
    folder = out / job.name
    if (folder / "result.json").exists():
        return job.steps * job.members
    seeds = len(list(folder.glob("seed-*.json")))  # of a peer
    rows = records.last_metrics(folder)
    return job.steps * seeds + min(job.steps, rows["env_steps"] if rows else 0) * job.members
