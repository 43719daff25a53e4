"""One run: from a configuration to a folder with everything in it, resumable at any time.

`start` writes config.json; `carry_on` does the rest from that file only. So fresh and resumed runs share the same code,
and config.json says what a run is.

With several processes (torchrun), the first does this and is the only one to know the folder; the others `follow` it.
Each process's Config then holds its share of environments and minibatch, config.json the whole. A checkpoint has the
first process's agents, which are the same in all: what differs, the running returns of each process's environments, is
zero when environments start afresh. It has all parts of the replay.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

import envs
from agents import AGENTS
from envs import minari_env
from ess_rl import checkpoint, loop, processes
from ess_rl.child import peak_memory_mib
from ess_rl.contract import Actors, VectorEnv
from ess_rl.errors import UsageError
from ess_rl.offline import OfflinePopulation
from ess_rl.population import Population
from ess_rl.replay import Replay
from experiments import demonstrations, figures, old_data, past, plan, records
from experiments.display import Display
from experiments.records import Record
from experiments.training import Begun, is_checkpoint, parts, restore_population, threads_of, training


def start(agent: str, env_id: str, *, out: Path, overwrite: bool = False, **arguments: Any) -> Path:
    """Check a configuration (see `experiments.plan`), make its folder and write config.json. -> the folder

    Raises:
        UsageError: something in it cannot work, or `out` holds something else. In either case nothing is written.
    """
    record = plan.make(agent, env_id, **arguments)
    source = record["config"].get("replay_from")
    if source and Path(source).resolve() == out.resolve():
        raise UsageError(f"--replay-from {source} is the folder of this run: choose another --out")
    with records.new_run(out, overwrite=overwrite):
        if source:
            old_data.copy(source, out, AGENTS[agent].config(**record["config"]))
        if shown := record["config"].get("demonstrations"):
            demonstrations.copy(shown, out)
        records.write_json(out / "config.json", record)
    return out


def carry_on(run: Path) -> Record:
    """Finish training a run, evaluate it and write its result. -> the result

    Raises:
        UsageError: the folder, its configuration or its newest checkpoint is not usable, or there are more or fewer
            processes than the run began with.
        NonFiniteError: training diverged; earlier checkpoints are kept.
    """
    with records.alone(run):
        config = records.read_config(run)
        if (run / "result.json").exists():
            return records.read_json(run / "result.json")
        if (began := config.get("processes", 1)) != processes.world_size():
            how = "'ess-rl resume" if began == 1 else f"'torchrun --nproc-per-node {began} -m experiments resume"
            raise UsageError(
                f"{run} was begun with {began} process{'es' * (began > 1)}, not {processes.world_size()}: "
                f"{how} {run}' continues it"
            )
        return _carry_on(run, config)


def check_fields(run: Path, config: Record, names: Iterable[str], what: str = "go on") -> None:
    """Raises UsageError if a run lacks a field, whose default may not be what the run began with."""
    for name in names:
        if name not in config["config"]:
            raise UsageError(
                f"{run / 'config.json'} has no {name!r}, which {config['agent']} has by now: {what} with the version "
                f"that began it (git commit {config.get('git_commit')})"
            )


def begin(run: Path, config: Record, fields: Iterable[str]) -> None:
    """Check what any run needs in order to go on, and remove what a kill left behind.

    fields: of the agent's Config.

    Raises:
        UsageError: one of them is missing in the run, or the run is compiled and there is no compiler here.
    """
    check_fields(run, config, fields)
    if config["compiled"] and (missing := plan.missing_to_compile()):
        raise UsageError(f"{run} is a compiled run, and {missing}: that, or a new run with --compile off")
    records.drop_unfinished(run)


def _carry_on(run: Path, config: Record) -> Record:
    population, env, replay = parts(config)
    begin(run, config, dataclasses.asdict(population.agent.config))
    threads = threads_of(config)
    iteration = load_newest(run, config, population, threads)
    begins_from, raised = past.read(run, config, replay, population, iteration)
    shown = demonstrations.read(run, config, env)
    trained = records.cut_metrics(run, iteration)
    processes.tell({"config": config, "iteration": iteration, "demonstrations": len(shown["obs"]) if shown else 0})
    print(describe(config), flush=True)
    if raised is not None:
        steps = int(begins_from["replay"]["size"])
        print(old_data.describe(config["config"]["replay_from"], steps, sum(raised)), flush=True)
    if shown:
        print(f"demonstrations: {len(shown['obs']):,} steps of {config['config']['demonstrations']}", flush=True)
    begun = Begun(iteration, begins_from, shown)
    del begins_from, shown
    with training(config, population, env, replay, begun) as found, log(run, config, iteration) as write:
        for done in found.progress:
            trained += sum(done.seconds.values())
            row = _row(done, trained)
            if done.iteration == 1 and raised is not None:
                row["behavior_std_raised"] = raised
            write(row)
            if is_checkpoint(config, done.iteration):
                _save(run, config, population, replay, done, threads)
    if config.get("save_replay"):
        old_data.save(run, old_data.last(replay, config), env, config)
    env.close()
    result = {
        **outcome(run, config, population, found.compile_seconds),
        **of_log(run),
        **records.origin(),
    }
    result["peak_memory_mib"] += found.peak_memory_mib()
    records.write_json(run / "result.json", result)
    return result


@contextmanager
def log(run: Path, config: Record, iteration: int) -> Iterator[Callable[[Record], None]]:
    """A function that adds a row to metrics.jsonl, TensorBoard and the display.

    metrics.jsonl ends with `iteration`. TensorBoard's files are rewritten: they may have later rows, now discarded.
    """
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
    with (
        SummaryWriter(str(run / "tensorboard")) as writer,
        open(run / "metrics.jsonl", "a") as file,
        Display(config, iteration) as display,
    ):
        for row in records.metrics(run):
            tensorboard(writer, row)

        def write(row: Record) -> None:
            records.append_line(file, row)
            tensorboard(writer, row)
            display.update(row)

        yield write


def outcome(
    run: Path,
    config: Record,
    population: Population | OfflinePopulation,
    compile_seconds: float,
) -> Record:
    """Draw the curves and evaluate the last policy. -> what result.json holds for any run, whatever it learned from"""
    figures.learning_curves([run], run / "curve.png")
    names = ("agent", "dataset", "references", "env", "backend", "seeds", "sweep", "device", "compiled")
    last = records.last_metrics(run) or {}
    steps, trained = records.steps_of(last), last["seconds"]
    return {
        "format": records.FORMAT,
        **{name: config[name] for name in names if name in config},
        records.steps_name(config): steps,
        "final_return": evaluate(population, config, config["episodes"]).mean(1).tolist(),
        "episodes": config["episodes"],
        "steps_per_second": steps * population.size / trained,
        "training_seconds": trained,
        "compile_seconds": compile_seconds,
        "peak_memory_mib": peak_memory_mib(),
    }


def follow() -> None:
    """Run a process other than the first: train in step with it, and write nothing. Returns if it trains nothing.

    Raises:
        UsageError, NonFiniteError: as `carry_on`.
    """
    task = processes.hear()
    if task is None:
        return
    config = task["config"]
    population, env, replay = parts(config)
    room = past.room(config, replay, population, task["iteration"])
    shown = demonstrations.room(task["demonstrations"], env)
    begun = Begun(task["iteration"], room, shown)
    del room, shown
    with training(config, population, env, replay, begun) as found:
        for done in found.progress:
            if is_checkpoint(config, done.iteration):
                past.tree(config, replay, population)  # the first process writes it
    if config.get("save_replay"):
        old_data.last(replay, config)  # and this
    env.close()


def load_run(run: Path, steps: int | None = None, *, trust: bool = False) -> tuple[Any, Record, int, Path]:
    """Load a run's population for evaluation, on the CPU, from the checkpoint nearest to `steps`; None: the newest.

    -> (population, config.json, iteration of the checkpoint, its file)
    """
    config = records.read_config(run) | {"compiled": False, "device": "cpu"}  # evaluation is small
    trust_spec(config, trust)
    population = restore_population(config)
    found = records.checkpoints(run)
    if not found:
        if (run / "result.json").exists():
            again = f"the command in {run / 'result.json'} trains it again"
            raise UsageError(f"{run} has no checkpoint, as published runs have none: {again}")
        raise UsageError(f"{run} has no checkpoint yet: 'ess-rl resume {run}' continues it")
    check_fields(run, config, population.hyper, "evaluate it")  # the state holds each of them
    path = found[-1] if steps is None else min(found, key=lambda path: abs(int(path.stem) - steps))
    return population, config, _load(path, config, population)["iteration"], path


def trust_spec(config: Record, trust: bool) -> None:
    """Register the task that a data set's own env spec describes.

    Raises:
        UsageError: there is such a spec, which names code of the data set's author, and it is not trusted.
    """
    if config.get("env_spec"):
        if not trust:
            raise UsageError(
                f"the env spec of {config['dataset']} names code that is not registered: --trust-env-spec imports it"
            )
        minari_env.register_trusted(config["env_spec"])


def evaluate(population: Actors, config: Record, episodes: int, seed: int = 0) -> Tensor:
    """Returns [P, episodes] of the mean action, with frozen statistics, in separate environments."""
    env: VectorEnv = envs.make(
        config["env"],
        population.size * episodes,
        backend=config["backend"],
        device=config["device"],
        **config.get("env_options", {}),
    )
    try:
        return loop.evaluate(population, env, seed=seed)
    finally:
        env.close()


def of_log(run: Path) -> Record:
    """What result.json holds of metrics.jsonl: `training_return` and `seconds`.

    training_return: mean return of the episodes that ended in the last tenth of training, one number per member, with
    exploration noise and over all the policies of that stretch. None for a member in which no episode ended.
    seconds: of each phase of an iteration, summed over all of them.
    """
    last = records.last_metrics(run) or {}
    sums, counts = [0.0] * len(last["episodes"]), [0] * len(last["episodes"])
    seconds = dict.fromkeys(last["phases"], 0.0)
    for row in records.metrics(run):
        for name in seconds:
            seconds[name] += row["phases"][name]
        if records.steps_of(row) > 0.9 * records.steps_of(last):
            sums = [total + x for total, x in zip(sums, row["return_sum"], strict=True)]
            counts = [count + x for count, x in zip(counts, row["episodes"], strict=True)]
    returns = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
    return {"training_return": returns, "seconds": seconds}


def describe(config: Record) -> str:
    """One line on what runs, and on what."""
    size = len(config["seeds"])
    how = "compiled" if config["compiled"] else "eager"
    several, split = config.get("processes", 1), config.get("split", 1)
    apart = config["device"] == "cuda" and config["backend"] in ("envpool", "gymnasium")
    task = f"{config['dataset']}, evaluated in {config['env']}" if config.get("dataset") else config["env"]
    return (
        f"{config['agent']} on {task} (backend {config['backend']}): {size} member{'s' * (size > 1)}, "
        f"{config['steps']:,} {records.unit(config)} each, device {config['device']}{' (physics on the CPU)' * apart}, "
        f"{how}{', collected by another process' * bool(config.get('asynchronous'))}"
        + (f", {several} processes" if several > 1 else "")
        + (f", members in {split} processes" if split > 1 else "")
    )


def fingerprint(config: Record) -> Record:
    """The fields that a checkpoint must share with the configuration to be accepted as its own."""
    names = ("agent", "env", "backend", "seeds", "sweep", "iterations", "reset_every", "processes", "config")
    return {name: config.get(name) for name in (*names, "dataset", "source")}


def _save(run: Path, config: Record, population: Population, replay: Replay, done: loop.Progress, threads: int) -> None:
    path = run / "checkpoints" / f"{done.env_steps:09d}.safetensors"
    if beside := past.tree(config, replay, population):
        checkpoint.save(records.replay_of(path), beside, {"iteration": done.iteration})
    checkpoint.save(path, population.state, info(config, done.iteration, threads))
    records.drop_old_replays(run)


def info(config: Record, iteration: int, threads: int) -> Record:
    """What a checkpoint says of itself."""
    return {"iteration": iteration, "of": fingerprint(config), "threads": threads}


def load_newest(run: Path, config: Record, population: Any, threads: int) -> int:
    """-> the iteration of the newest checkpoint, 0 if there is none. Says so if its bits cannot be continued here."""
    found = records.checkpoints(run)
    if not found:
        return 0
    said = _load(found[-1], config, population)
    if (before := said.get("threads", threads)) != threads:
        print(
            f"{run} was trained with {before} thread{'s' * (before > 1)} of torch and goes on with {threads}: sums are "
            "ordered differently, so it ends elsewhere than a run that was not stopped, within the noise of seeds",
            flush=True,
        )
    return said["iteration"]


def _load(path: Path, config: Record, population: Any) -> Record:
    """-> what this checkpoint says of itself"""
    state, said = checkpoint.load(path, population.state, population.device)
    for name, value in fingerprint(config).items():
        if said["of"].get(name) != value:
            raise UsageError(f"{path} belongs to another run: its {name!r} is {said['of'].get(name)!r}, not {value!r}")
    population.state = state
    return said


def _row(done: loop.Progress, trained: float) -> Record:
    return {
        "iteration": done.iteration,
        "env_steps": done.env_steps,
        "seconds": trained,
        "phases": done.seconds,
        "episodes": done.episodes.tolist(),
        "return_sum": done.return_sum.tolist(),
        **{name: x.tolist() for name, x in done.metrics.items()},
    }


def tensorboard(writer: SummaryWriter, row: Record) -> None:
    """Log each member's return, and the other metrics as means over the members."""
    for member, (total, count) in enumerate(zip(row["return_sum"], row["episodes"], strict=True)):
        if count:
            writer.add_scalar(f"return/member_{member}", total / count, records.steps_of(row))
    for name, values in row.items():
        if isinstance(values, list) and name not in ("return_sum", "episodes"):
            writer.add_scalar(f"train/{name}", sum(values) / len(values), records.steps_of(row))
