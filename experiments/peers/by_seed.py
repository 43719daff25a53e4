"""A run of another library's agent: each seed in its own process, with one thread and one file when it is done.

So a killed run resumes with the missing seeds, and a finished one can be extended with more seeds.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from ess_rl.errors import LostProcessError, UsageError
from experiments import configurations, machine, plan, records
from experiments.records import Record


def check(library: str, config: Any, seeds: Sequence[int], *, steps: int, episodes: int) -> None:
    """Raises UsageError for a count, a seed or a number of a peer's config that cannot work, whatever the library."""
    counts = {name: value for name, value in dataclasses.asdict(config).items() if isinstance(value, int)}
    records.check_positive({"seeds": len(seeds), "steps": steps, "episodes": episodes, **counts})
    plan.check_seeds(seeds)
    if max(seeds) >= 2**32:
        raise UsageError(f"seed {max(seeds)}: {library} draws with numpy, whose seeds are below 2^32")
    plan.check_numbers(config, {})


def begin(record: Record, out: Path, same: Sequence[str], *, overwrite: bool) -> Path:
    """Make a peer's folder and write `record` as its config.json. -> the folder

    A folder whose config.json agrees in all of `same` is reused if its seeds are among those requested.
    """
    if overwrite or not (out / "config.json").exists():
        with records.new_run(out, overwrite=overwrite):
            records.write_json(out / "config.json", record)
        return out
    with records.alone(out):
        before = records.read_config(out)
        if words := configurations.differing(before, record, same):
            raise UsageError(f"--out {out} holds another run, of {words}: choose another place")
        if not set(before["seeds"]) <= set(record["seeds"]):
            raise UsageError(
                f"--out {out} holds seeds {before['seeds']}, which are not all asked for: ask for them too"
            )
        if before["seeds"] != record["seeds"]:  # a result of fewer seeds is rebuilt from the seeds' own files
            if (out / "result.json").exists() and not all(_file(out, seed).exists() for seed in before["seeds"]):
                raise UsageError(
                    f"--out {out} holds a published run, which cannot be extended with more seeds: choose another place"
                )
            (out / "result.json").unlink(missing_ok=True)
            records.write_json(out / "config.json", {**before, "seeds": record["seeds"]})
    return out


def _file(run: Path, seed: int) -> Path:
    """The file of a seed that is done."""
    return run / f"seed-{seed}.json"


def train_missing(run: Path, jobs: int | None, train: Callable[[Record, int], Record], **more: Any) -> Record:
    """Train the missing seeds with `train`, a function of (config, seed) called in other processes. -> the result

    more: additional entries of result.json, each a function of the final returns of all seeds.
    """
    if jobs is not None:
        records.check_positive({"jobs": jobs})
    with records.alone(run):
        config = records.read_config(run)
        if (run / "result.json").exists():
            return records.read_json(run / "result.json")
        missing = [seed for seed in config["seeds"] if not _file(run, seed).exists()]
        _train(run, config, missing, jobs or machine.available_cores(), train)
        parts = [records.read_json(_file(run, seed)) for seed in config["seeds"]]
        kept = ("format", "agent", "dataset", "references", "env", "backend", "seeds", "sweep", "device", "compiled")
        finals, steps = [part["final_return"] for part in parts], records.steps_name(config)
        result = {
            **{name: config[name] for name in kept if name in config},
            steps: parts[0][steps],
            "final_return": finals,
            "training_return": [part["training_return"] for part in parts],
            "episodes": config["episodes"],
            # Of one process on one thread, usually next to others: `ess-rl throughput` is the fair measure.
            "steps_per_second": sum(part[steps] / part["training_seconds"] for part in parts) / len(parts),
            "peak_memory_mib": max(part["peak_memory_mib"] for part in parts),
            **{name: function(finals) for name, function in more.items()},
            **records.origin(),
        }
        records.write_json(run / "result.json", result)
        return result


def _train(run: Path, config: Record, seeds: Sequence[int], jobs: int, train: Callable[[Record, int], Record]) -> None:
    """Train seeds, `jobs` at a time. After one has failed no other begins; those in training end and are kept."""
    task = config.get("dataset") or config["env"]
    print(f"{config['agent']} on {task}: {len(seeds)} seeds to train, {jobs} at a time", flush=True)
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    waiting, failed = list(seeds), None
    running: dict[Future[Record], int] = {}
    with ProcessPoolExecutor(max_workers=jobs, mp_context=context, initializer=machine.end_with_command) as pool:
        while waiting or running:
            while waiting and len(running) < jobs:  # no more than that: a seed handed to the pool is trained
                seed = waiting.pop(0)
                running[pool.submit(train, config, seed)] = seed
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                seed = running.pop(done)
                try:
                    part = done.result()
                except Exception as error:
                    failed, waiting = failed or error, []
                    if running and not isinstance(error, BrokenProcessPool):  # else all of them are lost
                        print(f"seed {seed} failed: waiting for the {len(running)} that are in training", flush=True)
                    continue
                records.write_json(_file(run, seed), part)
                print(f"seed {seed}: final return {part['final_return']:.1f}", flush=True)
    if isinstance(failed, BrokenProcessPool):
        raise LostProcessError(
            f"{run}: a process that trained a seed is gone (killed, or out of memory); finished seeds are kept, "
            f"and 'ess-rl resume {run}' continues"
        )
    if failed is not None:
        raise failed
