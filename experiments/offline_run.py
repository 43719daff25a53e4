"""One run on a data set: as `experiments.run`, with updates in place of env steps, into the same kind of folder.

Scores are those of the last policy, in the data set's task or that of `--eval-env`. Evaluations during training make
the curve, and select nothing: the best of them is not a score.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import envs
from agents import OFFLINE_AGENTS
from envs import minari_data, minari_env
from envs.minari_data import DataSet
from ess_rl import behavior, checkpoint, offline
from ess_rl.errors import UsageError
from ess_rl.offline import OfflinePopulation, OfflineProgress
from ess_rl.population import members
from experiments import memory, plan, records, run, training
from experiments.records import Record

BLOCKS = 100  # lines of metrics.jsonl, at most
CURVE_EPISODES = 5  # of an evaluation during training, at most


def start(agent: str, dataset_id: str, *, out: Path, overwrite: bool = False, **arguments: Any) -> Path:
    """Check a configuration (see `make`), make its folder and write config.json. -> the folder

    Raises:
        UsageError: something in it cannot work, or `out` holds something else. In either case nothing is written.
    """
    record = make(agent, dataset_id, **arguments)
    with records.new_run(out, overwrite=overwrite):
        records.write_json(out / "config.json", record)
    return out


def make(
    agent: str,
    dataset_id: str,
    *,
    settings: Mapping[str, Any],
    sweep: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    steps: int,
    eval_env: str | None = None,
    trust: bool = False,
    download: bool = False,
    backend: str = "auto",
    device: str = "auto",
    compiled: str = "auto",
    checkpoints: int = 10,
    episodes: int = records.EPISODES,
) -> Record:
    """Check a configuration. -> what config.json will hold

    Args:
        settings, sweep, compiled, episodes: as in `plan.make`.
        steps: gradient updates of each member.
        eval_env: the task to evaluate in; None: that of the data set's env spec.
        trust: whether code that the env spec names and nobody registered may be imported.
        checkpoints: maximum number, evenly spread; the members are evaluated at each.

    Raises:
        UsageError: something in it cannot work.
    """
    config = OFFLINE_AGENTS[agent].config(**settings)
    records.check_positive({"steps": steps, "checkpoints": checkpoints, "episodes": episodes, "seeds": len(seeds)})
    if config.minibatch < 2:
        raise UsageError(f"--minibatch {config.minibatch}: must be at least 2")
    plan.check_members(seeds, sweep, episodes)
    plan.check_numbers(config, sweep)
    plan.check_acting(config, sweep)
    task, dimensions = task_of(dataset_id, eval_env=eval_env, trust=trust, download=download, backend=backend)
    settings_of = members(seeds, sweep)
    where = plan.device_of(device)
    own_agent = OFFLINE_AGENTS[agent].agent(config, *dimensions)
    memory.check_offline(own_agent, config, *dimensions, len(settings_of), where)
    blocks = min(BLOCKS, steps)
    return {
        "format": records.FORMAT,
        "agent": agent,
        **task,
        "seeds": [member["seed"] for member in settings_of],
        "sweep": {name: [member[name] for member in settings_of] for name in sweep},
        "steps": steps,
        "iterations": blocks,
        "reset_every": math.ceil(blocks / checkpoints),  # stretches between two checkpoints
        "checkpoints": checkpoints,
        "episodes": episodes,
        "device": where,
        "compiled": plan.compiled_of(compiled),
        "config": dataclasses.asdict(config),
        **records.origin(),
    }


def task_of(
    dataset_id: str, *, eval_env: str | None, trust: bool, download: bool, backend: str
) -> tuple[Record, tuple[int, int]]:
    """The part of config.json on the data set and the task that policies are evaluated in; see `make`.

    -> that part, and the sizes of observations and actions

    Raises:
        UsageError: the data set cannot be read, or policies learned from it cannot be evaluated in that task.
    """
    if download:
        minari_data.download(dataset_id)
    metadata = minari_data.metadata_of(dataset_id)
    task = minari_env.Task(eval_env, {}) if eval_env else minari_env.task_of(metadata, trust=trust)
    if task is None:
        raise UsageError(f"{dataset_id} does not say in which task it was recorded: name one with --eval-env")
    if task.options.get("max_episode_steps") == -1:  # which all backends except Gymnasium take for a number of steps
        raise UsageError(f"{dataset_id} is of a {task.env_id} without a time limit: choose another --eval-env")
    data = minari_data.load(dataset_id, trust=trust, say=_say)  # after the quick checks: it may fit a model
    backend = "gymnasium" if backend == "auto" and task.options else backend  # the other backends have other options
    probe = envs.make(task.env_id, 1, backend=backend, **task.options)
    resolved, episode, dimensions = probe.backend, probe.max_episode_steps, (probe.obs_dim, probe.act_dim)
    here = probe.action_range
    probe.close()
    if episode is None:
        raise UsageError(f"{task.env_id} has no time limit, so an evaluation may never end: choose another --eval-env")
    found = (data.transitions.obs.shape[1], data.transitions.action.shape[1])
    if found != dimensions:
        raise UsageError(
            f"{dataset_id} has observations of {found[0]} numbers and actions of {found[1]}, {task.env_id} of "
            f"{dimensions[0]} and {dimensions[1]}: evaluate in another task with --eval-env"
        )
    if not np.allclose(data.action_range, here):
        raise UsageError(
            f"{dataset_id} has actions in {_pairs(data.action_range)}, {task.env_id} in {_pairs(here)}: evaluate in "
            "another task with --eval-env"
        )
    minari_data.check_order(dataset_id, data.obs_names, task.env_id, task.options, _say)
    return {
        "dataset": dataset_id,
        "source": data.source,
        "transitions": len(data.transitions.reward),
        "behavior": "recorded" if data.recorded_behavior else dataclasses.asdict(behavior.Config()),
        "references": data.references if minari_env.is_of(metadata, task.env_id, task.options) else None,
        "env": task.env_id,
        "env_options": task.options,
        "env_spec": task.spec,
        "eval_env": eval_env,
        "backend": resolved,
    }, dimensions


def _pairs(ranges: Sequence[tuple[float, float]]) -> str:
    return ", ".join(f"[{low:g}, {high:g}]" for low, high in ranges)


def carry_on(folder: Path, *, trust: bool = False) -> Record:
    """Finish training a run, evaluate it and write its result. -> the result

    Raises:
        UsageError: the folder, its configuration, its newest checkpoint or its data set is not usable.
        NonFiniteError: training diverged; earlier checkpoints are kept.
    """
    with records.alone(folder):
        config = records.read_config(folder)
        if (folder / "result.json").exists():
            return records.read_json(folder / "result.json")
        run.trust_spec(config, trust)
        return _carry_on(folder, config, data_of(config, trust=trust))


def _say(text: str) -> None:
    print(text, flush=True)


def data_of(config: Record, *, trust: bool) -> DataSet:
    """The data set named in a run's config.json. Raises UsageError if it is not what the run began with."""
    fit = None
    if config["behavior"] != "recorded":
        fit = behavior.Config(**(config["behavior"] | {"hidden": tuple(config["behavior"]["hidden"])}))
    data = minari_data.load(config["dataset"], trust=trust, fit=fit, say=_say)
    if data.source != config["source"]:
        raise UsageError(f"{config['dataset']} has changed since the run began: train again, with another --out")
    return data


def _carry_on(folder: Path, config: Record, data: DataSet) -> Record:
    population = training.restore_population(config)
    run.begin(folder, config, dataclasses.asdict(population.agent.config))
    threads = training.threads_of(config)
    block = run.load_newest(folder, config, population, threads)
    trained = records.cut_metrics(folder, block)
    print(run.describe(config), flush=True)
    compile_seconds = 0.0
    if population.compiled and block < config["iterations"]:
        compile_seconds = training.compiling(lambda: offline.warm_up(population, data.transitions))
    progress = offline.train(
        population, data.transitions, updates=config["steps"], blocks=config["iterations"], start=block
    )
    with run.log(folder, config, block) as write:
        for done in progress:
            trained += done.seconds
            saves = training.is_checkpoint(config, done.block)
            write(_row(done, trained, _on_the_way(population, config, done) if saves else None))
            if saves:
                path = folder / "checkpoints" / f"{done.updates:09d}.safetensors"
                checkpoint.save(path, population.state, run.info(config, done.block, threads))
    outcome = run.outcome(folder, config, population, compile_seconds)
    result = {
        **outcome,
        "normalized_score": normalized(config["references"], outcome["final_return"]),
        "training_return": [None] * population.size,  # no policy acted in training
        **records.origin(),
    }
    records.write_json(folder / "result.json", result)
    return result


def normalized(references: Sequence[float] | None, returns: Sequence[float]) -> list[float] | None:
    """(return - ref_min_score) / (ref_max_score - ref_min_score), as Minari defines it: 0 to 1, not 0 to 100."""
    if not references:
        return None
    low, high = references
    return [(x - low) / (high - low) for x in returns]


def _on_the_way(population: OfflinePopulation, config: Record, done: OfflineProgress) -> Tensor:
    """Returns [P, episodes], in environments other than those of the final evaluation."""
    return run.evaluate(population, config, min(CURVE_EPISODES, config["episodes"]), seed=done.block)


def _row(done: OfflineProgress, trained: float, returns: Tensor | None) -> Record:
    size = len(next(iter(done.metrics.values())))
    return {
        "iteration": done.block,
        "updates": done.updates,
        "seconds": trained,
        "episodes": [0] * size if returns is None else [returns.shape[1]] * size,
        "return_sum": [0.0] * size if returns is None else returns.sum(1).tolist(),
        **{name: x.tolist() for name, x in done.metrics.items()},
    }
