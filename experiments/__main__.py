"""The command `ess-rl`. Each subcommand is a function here; the module it calls does the work."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import importlib.util
import os
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro

from ess_rl.errors import LostProcessError, NonFiniteError, UsageError, words


def train(arguments: list[str]) -> None:
    """Train an agent, or a peer from another library: ess-rl train AGENT --env ID | --dataset ID [--seeds K ...]"""
    from agents import AGENTS, OFFLINE_AGENTS
    from experiments.peers import d3rlpy
    from experiments.peers.sb3 import PEERS

    from_data = [*OFFLINE_AGENTS, *d3rlpy.PEERS]
    known = [*AGENTS, *PEERS, *from_data]
    if not arguments or arguments[0].startswith("-"):
        if "-h" not in arguments and "--help" not in arguments:
            raise UsageError(f"name an agent: ess-rl train {{{','.join(known)}}} --env ID (or --dataset ID)")
        print(f"usage: ess-rl train {{{','.join(known)}}} --env ID [options]; 'ess-rl train p3o --help' shows them")
        print(f"{', '.join(from_data)} take --dataset ID in place of --env ID")
        return
    name = _one_of("agent", arguments[0], known)
    offline = name in from_data
    given, other = ("--env", "--dataset") if offline else ("--dataset", "--env")
    options = {word.split("=")[0] for word in arguments}
    if given in options and not (name in AGENTS and other in options):  # an env and a data set: from offline to online
        learns = "learns from a data set" if offline else "acts in an environment"
        hint = f"{', '.join(OFFLINE_AGENTS)} learn from data" if not offline else f"{', '.join(AGENTS)} learn by acting"
        what = f"{other} ID beside it" if name in AGENTS else f"{other} ID, not {given}"
        raise UsageError(f"{name} {learns}: give {what}; {hint}")
    if name in d3rlpy.PEERS:
        _train_offline_peer(name, arguments[1:])
    else:
        (_train_offline if offline else _train_agent if name in AGENTS else _train_peer)(name, arguments[1:])


def _train_agent(name: str, arguments: list[str]) -> None:
    from agents import AGENTS
    from experiments import options, run

    chosen = tyro.cli(options.of_agent(AGENTS[name].config), args=arguments, prog=f"ess-rl train {name}")
    settings, sweep = options.split(AGENTS[name].config, chosen)
    if chosen.dataset:
        imitates = "demonstrations" in settings
        taken_by = "demonstrations" if imitates else "replay_from"
        if taken_by not in settings:
            raise UsageError(f"--dataset: {name} cannot learn from a data set; leave it out")
        if settings[taken_by]:
            what = "demonstrations come from" if imitates else "a replay is filled from"
            raise UsageError(f"--dataset and --{taken_by.replace('_', '-')}: {what} one of them")
        settings[taken_by] = chosen.dataset
    folder = run.start(
        name,
        chosen.env,
        settings=settings,
        sweep=sweep,
        **_common(name, chosen, "-from-".join(filter(None, [chosen.env, chosen.dataset]))),
        backend=chosen.backend,
        device=chosen.device,
        compiled=chosen.compile,
        checkpoints=chosen.checkpoints,
        save_replay=chosen.save_replay,
        asynchronous=chosen.asynchronous,
        split=chosen.split,
    )
    _finish(folder)


def _train_offline(name: str, arguments: list[str]) -> None:
    from agents import OFFLINE_AGENTS
    from experiments import offline_run, options

    config = OFFLINE_AGENTS[name].config
    chosen = tyro.cli(options.of_offline(config), args=arguments, prog=f"ess-rl train {name}")
    settings, sweep = options.split(config, chosen)
    folder = offline_run.start(
        name,
        chosen.dataset,
        settings=settings,
        sweep=sweep,
        **_common(name, chosen, chosen.dataset),
        eval_env=chosen.eval_env,
        trust=chosen.trust_env_spec,
        download=chosen.download,
        backend=chosen.backend,
        device=chosen.device,
        compiled=chosen.compile,
        checkpoints=chosen.checkpoints,
    )
    _finish(folder, trust=chosen.trust_env_spec)


def _train_peer(name: str, arguments: list[str]) -> None:
    from experiments import options
    from experiments.peers import sb3

    config = sb3.PEERS[name].config
    chosen = tyro.cli(options.of_peer(config), args=arguments, prog=f"ess-rl train {name}")
    settings = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(config)}
    _finish(sb3.start(name, chosen.env, settings=settings, **_common(name, chosen, chosen.env)), jobs=chosen.jobs)


def _train_offline_peer(name: str, arguments: list[str]) -> None:
    from experiments import options
    from experiments.peers import d3rlpy

    config = d3rlpy.PEERS[name].config
    chosen = tyro.cli(options.of_offline_peer(config), args=arguments, prog=f"ess-rl train {name}")
    folder = d3rlpy.start(
        name,
        chosen.dataset,
        settings={field.name: getattr(chosen, field.name) for field in dataclasses.fields(config)},
        **_common(name, chosen, chosen.dataset),
        eval_env=chosen.eval_env,
        trust=chosen.trust_env_spec,
        download=chosen.download,
        backend=chosen.backend,
    )
    _finish(folder, chosen.jobs, chosen.trust_env_spec)


def _common(name: str, chosen: Any, task: str) -> dict[str, Any]:
    """Arguments common to every `start`: those of `run`, `offline_run` and the `peers`."""
    from experiments import records

    records.check_positive({"seeds": chosen.seeds})
    return {
        "seeds": range(chosen.seed0, chosen.seed0 + chosen.seeds),
        "steps": chosen.steps,
        "episodes": chosen.episodes,
        "out": chosen.out or records.default_folder(name, task),
        "overwrite": chosen.overwrite,
    }


def resume(arguments: list[str]) -> None:
    """Resume a stopped run, bit for bit as if it had never been stopped: ess-rl resume RUN"""

    def command(
        run: tyro.conf.Positional[Path], jobs: int | None = None, trust_env_spec: bool = False
    ) -> tuple[Path, int | None, bool]:
        """Resume a run.

        Args:
            run: the run folder.
            jobs: for a peer, seeds at a time; default: one per core.
            trust_env_spec: import the code that the env spec of the run's data set names.
        """
        return run, jobs, trust_env_spec

    from experiments import records

    folder, jobs, trust = tyro.cli(command, args=arguments, prog="ess-rl resume", description=resume.__doc__)
    if (folder / "result.json").exists():
        records.read_config(folder)  # raises the line that says what is wrong with it, if anything
        print(f"{folder} is finished; its result:")
    _finish(folder, jobs, trust)


def evaluate(arguments: list[str]) -> None:
    """Score the newest checkpoint of a run with its mean action: ess-rl evaluate RUN [--episodes N --seed S]"""
    from experiments import plan, records, run
    from experiments.report import tables

    def command(
        run: tyro.conf.Positional[Path], episodes: int = records.EPISODES, seed: int = 0, trust_env_spec: bool = False
    ) -> tuple[Path, int, int, bool]:
        """Score the newest checkpoint.

        Args:
            run: the run folder.
            episodes: per member.
            seed: of the environments; 0 gives those of the run's own final evaluation.
            trust_env_spec: import the code that the env spec of the run's data set names.
        """
        return run, episodes, seed, trust_env_spec

    folder, episodes, seed, trust = tyro.cli(
        command, args=arguments, prog="ess-rl evaluate", description=evaluate.__doc__
    )
    records.check_positive({"episodes": episodes})
    plan.check_seeds([seed])
    population, config, iteration, _ = run.load_run(folder, trust=trust)
    plan.check_episodes(population.size, episodes)
    returns = run.evaluate(population, config, episodes, seed)
    print(f"{run.describe(config)}; checkpoint of iteration {iteration} of {config['iterations']}")
    print(
        tables.member_table(config, {"return": returns.mean(1).tolist(), "std": returns.std(1, correction=0).tolist()})
    )


def play(arguments: list[str]) -> None:
    """Film the policy of a run: ess-rl play RUN [--member I --out policy.mp4]"""
    from experiments import video

    def command(
        run: tyro.conf.Positional[Path],
        member: int = 0,
        out: Path | None = None,
        steps: int = 1000,
        seed: int = 0,
        trust_env_spec: bool = False,
    ) -> dict:
        """Film the policy.

        Args:
            run: the run folder.
            member: which member of its population.
            out: the file to write, .mp4 or .gif; default: policy.gif in the run folder.
            steps: film at most this many.
            seed: of the environment.
            trust_env_spec: import the code that the env spec of the run's data set names.
        """
        what = {"run": run, "member": member, "out": out or run / "policy.gif", "steps": steps, "seed": seed}
        return what | {"trust_env_spec": trust_env_spec}

    video.film(**tyro.cli(command, args=arguments, prog="ess-rl play", description=play.__doc__))


def compare(arguments: list[str]) -> None:
    """Compare finished runs side by side, with intervals, as a table and a picture: ess-rl compare RUN [RUN ...]"""
    from experiments.report import tables

    def command(
        runs: tyro.conf.Positional[tuple[Path, ...]], against: str | None = None, out: Path | None = None
    ) -> tuple[tuple[Path, ...], str | None, Path | None]:
        """Put runs side by side.

        Args:
            runs: run folders.
            against: a method as the table names it, e.g. ppo: differences of the others from it, with intervals.
            out: a picture (.png) of their learning curves; all runs must be on the same env.
        """
        return runs, against, out

    runs, against, out = tyro.cli(command, args=arguments, prog="ess-rl compare", description=compare.__doc__)
    print(tables.comparison(runs, against))
    if out is not None:
        from experiments import figures

        figures.learning_curves(tables.folders(runs), out)
        print(f"picture: {out}")


def publish(arguments: list[str]) -> None:
    """Copy the small parts of a finished run or study (configuration, result, curves): ess-rl publish RUN OUT"""
    from experiments import figures
    from experiments.studies import study

    def command(
        run: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path], overwrite: bool = False
    ) -> tuple[Path, Path, bool]:
        """Copy what is small.

        Args:
            run: a finished run, or a study's folder.
            out: the destination folder.
            overwrite: replace what was published there from other runs.
        """
        return run, out, overwrite

    run, out, overwrite = tyro.cli(command, args=arguments, prog="ess-rl publish", description=publish.__doc__)
    copied = (study if (run / "study.json").exists() else figures).publish(run, out, overwrite=overwrite)
    print(f"{out}: {', '.join(copied)}")


def report(arguments: list[str]) -> None:
    """Write report.html for all runs below a directory, from their files only: ess-rl report DIR [--out FILE]"""
    from experiments.report import pages

    def command(directory: tyro.conf.Positional[Path], out: Path | None = None) -> tuple[Path, Path | None]:
        """Write the report.

        Args:
            directory: every run folder below it is read.
            out: the page; default: report.html in the directory. report.md, report.png, scores.csv go next to it.
        """
        return directory, out

    print(pages.write(*tyro.cli(command, args=arguments, prog="ess-rl report", description=report.__doc__)))


def benchmark(arguments: list[str]) -> None:
    """Run a suite of agents and tasks, or what is missing from it: ess-rl benchmark SUITE [--jobs K | --on ray ...]"""
    from experiments import benchmark as module

    def command(
        suite: tyro.conf.Positional[str],
        out: Path | None = None,
        jobs: int | None = None,
        on: Literal["local", "ray"] = "local",
        address: str | None = None,
        cpus: int | None = None,
    ) -> list[str]:
        """Run a suite.

        Args:
            suite: smoke, classic, mujoco or offline; experiments/suites.py says what is in them.
            out: where its run folders are; default: runs/SUITE.
            jobs: local: run sets at a time, each with its share of the cores; default: 1.
            on: local: this machine; ray: a Ray cluster, which needs the extra 'ray'.
            address: ray: HOST:PORT of the cluster, which this machine must belong to; default: the cluster running
                here, else a new one of this machine only.
            cpus: ray: CPUs per run set; default: 1.
        """
        if on == "local":
            if (address, cpus) != (None, None):
                raise UsageError("--address and --cpus are of --on ray")
            return module.benchmark(suite, out, partial(module.Local, jobs=1 if jobs is None else jobs))
        from experiments import on_ray

        if jobs is not None:
            raise UsageError("--jobs is of --on local: how many jobs run at a time on ray follows from --cpus")
        return module.benchmark(suite, out, partial(on_ray.Ray, address=address, cpus=1 if cpus is None else cpus))

    _exit_if_failed(tyro.cli(command, args=arguments, prog="ess-rl benchmark", description=benchmark.__doc__))


def _exit_if_failed(failed: list[str]) -> None:
    if failed:
        print("failed:", *failed, sep="\n  ", file=sys.stderr)
        sys.exit(1)


def study(arguments: list[str]) -> None:
    """Carry out a study, with its prediction, figure and verdict: ess-rl study NAME [--out DIR --jobs K --quick]"""
    from experiments.studies import STUDIES
    from experiments.studies import study as module

    def command(
        name: tyro.conf.Positional[str], out: Path | None = None, jobs: int = 1, quick: bool = False
    ) -> list[str]:
        """Carry out a study.

        Args:
            name: one of those that 'ess-rl study' without a name lists; experiments/studies says what each one asks.
            out: where its run folders are; default: runs/NAME.
            jobs: run sets at a time; each gets its share of the cores.
            quick: a minute on a small task instead: shows that the study works, but is no evidence.
        """
        return module.carry_out(STUDIES[_one_of("study", name, STUDIES)], out, jobs, quick)

    if not arguments:
        width = max(map(len, STUDIES))
        print(*(f"{name:{width}}  {one.question}" for name, one in STUDIES.items()), sep="\n")
        return
    _exit_if_failed(tyro.cli(command, args=arguments, prog="ess-rl study", description=study.__doc__))


def throughput(arguments: list[str]) -> None:
    """Measure training speed against SB3's PPO, or d3rlpy: ess-rl throughput [--env ID | --dataset ID ...]"""
    from experiments.speed import offline_throughput
    from experiments.speed import throughput as module

    offline = any(word.split("=")[0] == "--dataset" for word in arguments)
    tyro.cli(
        offline_throughput.measure if offline else module.measure,
        args=arguments,
        prog="ess-rl throughput",
        description=throughput.__doc__,
    )


def quickstart(arguments: list[str]) -> None:
    """A first look, in a minute or two: P3O and PPO learn the same task side by side: ess-rl quickstart"""
    from experiments import quickstart as module

    tyro.cli(module.main, args=arguments, prog="ess-rl quickstart", description=quickstart.__doc__)


def gpu(arguments: list[str]) -> None:
    """Check a GPU against the CPU and time it, with results in one JSON file: ess-rl gpu [--out FILE]"""
    from experiments.speed import gpu as script

    tyro.cli(script.measure, args=arguments, prog="ess-rl gpu")


def list_envs(arguments: list[str]) -> None:
    """List the environments, and the backends that have them: ess-rl envs"""
    import envs

    _refuse_arguments("envs", arguments)
    width = max(map(len, envs.ENVS))
    for name, entry in envs.ENVS.items():
        print(f"{name:{width}}  {entry.description}  [{', '.join(envs.backends_of(name))}]")
    print("Any other id that Gymnasium knows works too, if its actions are a bounded Box.")


def list_agents(arguments: list[str]) -> None:
    """List the agents, and their peers from other libraries: ess-rl agents"""
    from agents import AGENTS, OFFLINE_AGENTS, VARIANTS
    from experiments.peers import d3rlpy, sb3

    _refuse_arguments("agents", arguments)
    acting, from_data = {**AGENTS, **sb3.PEERS}, {**OFFLINE_AGENTS, **d3rlpy.PEERS}
    width = max(map(len, acting | from_data))
    for head, known in (("", acting), ("\nfrom a data set, ess-rl train AGENT --dataset ID:\n", from_data)):
        print(head, end="")
        for name, entry in known.items():
            print(f"{name:{width}} {entry.description}")
    print("\nother methods, by options:")
    width = max(map(len, VARIANTS))
    for options, description in VARIANTS.items():
        print(f"{options:{width}} {description}")


def dataset(arguments: list[str]) -> None:
    """Work with Minari data sets: ess-rl dataset {list,show,audit,record,score,import-d4rl} ..."""
    from experiments.datasets import commands

    if not arguments or arguments[0] in ("-h", "--help"):
        for name, function in commands.COMMANDS.items():
            print(f"  {name:11} {(function.__doc__ or '').splitlines()[0]}")
        return
    name = _one_of("dataset command", arguments[0], commands.COMMANDS)
    function = commands.COMMANDS[name]
    print(tyro.cli(function, args=arguments[1:], prog=f"ess-rl dataset {name}"))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "quickstart": quickstart,
    "train": train,
    "resume": resume,
    "evaluate": evaluate,
    "play": play,
    "dataset": dataset,
    "benchmark": benchmark,
    "study": study,
    "compare": compare,
    "report": report,
    "publish": publish,
    "throughput": throughput,
    "gpu": gpu,
    "envs": list_envs,
    "agents": list_agents,
}


GOES_ON = "'ess-rl resume RUN' continues a run, the same command a benchmark or a study"


def main() -> None:
    """Entry point. A usage error ends in one line and exit status 2, divergence of a run in 3, the loss of another of
    its processes in 4."""
    # Before torch is imported. Its idle threads spin long enough to take the cores that the simulator needs; letting
    # them sleep at once (OMP_WAIT_POLICY=PASSIVE) made updates seven times slower. So they spin for about 0.1 ms.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    arguments = sys.argv[1:]
    try:
        _check_packages()
        if not arguments or arguments[0] in ("-h", "--help"):
            print("usage: ess-rl COMMAND ...   ('ess-rl COMMAND --help' tells more)\n")
            for name, function in COMMANDS.items():
                print(f"  {name:11} {(function.__doc__ or '').splitlines()[0]}")
            return
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started this process, and others
            _together(arguments)
            sys.stdout.flush()
            os._exit(0)  # all is written; rarely, under load, Gloo's threads abort a process that exits while they run
        _run(arguments)
    except UsageError as error:
        sys.exit(_complain(error, 2))
    except NonFiniteError as error:
        sys.exit(_complain(error, 3))
    except LostProcessError as error:
        sys.exit(_complain(error, 4))
    except BrokenPipeError:  # the reader of our output has stopped reading
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # no such file or folder, no permission
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # seldom names the file, which was already open
            where = f" ({error.filename})" if error.filename else ""
            sys.exit(_complain(f"the disk is full{where}: make room, then {GOES_ON}", 2))
        sys.exit(_complain(f"{error.filename or 'a file'}: {error.strerror or error}", 2))
    except KeyboardInterrupt:
        sys.exit(_complain(f"stopped; {GOES_ON}", 130))
    except (MemoryError, RuntimeError) as error:  # torch has an error of its own for a GPU, and none for the CPU
        said = words(error)[0]
        if not isinstance(error, MemoryError) and "OutOfMemory" not in type(error).__name__ and "allocate" not in said:
            raise
        less = "fewer seeds, environments or older rollouts need less"
        sys.exit(_complain(f"out of memory ({said}): {less}; {GOES_ON}", 2))


def _check_packages() -> None:
    """Raises UsageError if a package of the user's shadows one of ours: `envs` is a name that others use too."""
    here = Path(__file__).resolve().parents[1]
    for name in ("ess_rl", "envs", "agents"):
        spec = importlib.util.find_spec(name)
        places = [Path(place).resolve() for place in (spec.submodule_search_locations or [])] if spec else []
        if here / name not in places:
            found = places[0] if places else spec.origin if spec else "nowhere"
            raise UsageError(
                f"the package {name!r} is not the suite's but another one, {found}: put only the folder with your "
                "task's module on PYTHONPATH, and run ess-rl elsewhere than beside that package"
            )


def _run(arguments: list[str]) -> None:
    COMMANDS[_one_of("command", arguments[0], COMMANDS)](arguments[1:])


def _together(arguments: list[str]) -> None:
    """Train one run in several processes: the first carries out the command, the others follow it silently."""
    from agents import OFFLINE_AGENTS
    from ess_rl import processes
    from experiments import run
    from experiments.peers import d3rlpy, sb3

    alone = {*sb3.PEERS, *OFFLINE_AGENTS, *d3rlpy.PEERS}

    processes.join()
    try:
        if processes.rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as there is something to print)
            run.follow()
        elif arguments[0] not in ("train", "resume") or {*arguments[1:2]} & alone:
            raise _not_together(arguments[0])
        else:
            _run(arguments)
    except NonFiniteError:
        if processes.rank() == 0:
            raise  # all of them raise the same error, and only one reports it
        sys.exit(3)
    finally:
        processes.leave()


def _not_together(command: str) -> UsageError:
    return UsageError(f"torchrun is for our own agents that act: give 'ess-rl {command} ...' without it")


def _finish(folder: Path, jobs: int | None = None, trust: bool = False) -> None:
    """Finish training a run, of ours or of a peer, and print its result."""
    from experiments import records
    from experiments.peers import d3rlpy, sb3
    from experiments.report import tables

    if not folder.is_dir():
        raise UsageError(f"{folder}: no such run folder")
    config = records.read_config(folder)
    acts = config["agent"] not in sb3.PEERS and not config.get("dataset")
    if not acts and "TORCHELASTIC_RUN_ID" in os.environ:  # the other processes would wait forever
        raise _not_together("resume")
    if config["agent"] in sb3.PEERS:
        result = sb3.carry_on(folder, jobs)
    elif config["agent"] in d3rlpy.PEERS:
        result = d3rlpy.carry_on(folder, jobs, trust=trust)
    elif config.get("dataset"):
        from experiments import offline_run

        result = offline_run.carry_on(folder, trust=trust)
    else:
        from experiments import run

        result = run.carry_on(folder)
    print(tables.summary(folder, result))


def _refuse_arguments(command: str, arguments: list[str]) -> None:
    """Raises UsageError if there are any but a call for help, which the list is."""
    if others := [word for word in arguments if word not in ("-h", "--help")]:
        raise UsageError(f"ess-rl {command} takes no arguments: leave out {' '.join(others)}")


def _one_of(kind: str, name: str, known: Collection[str]) -> str:
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known)
    raise UsageError(f"unknown {kind} {name!r}; did you mean {' or '.join(near)}?")


def _complain(error: object, status: int) -> int:
    print(f"ess-rl: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
