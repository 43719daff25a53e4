"""Jobs as tasks of a Ray cluster: the executor behind `ess-rl benchmark SUITE --on ray`.

A job's folder travels: the task gets its files, trains in a process of its own on whichever node has room, and sends
back what is new at each checkpoint and at the end. So no disk is shared, the folders are those that a local benchmark
makes, and a job resumes from its newest checkpoint when its worker or node is lost, or after this command was killed.
Every node needs the same version of this package, with its dependencies.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ess_rl.errors import UsageError, words
from experiments import records
from experiments.benchmark import launch, log_of, steps_done, why_failed
from experiments.suites import Job

_LOSSES = 3  # workers that a job may lose without a new checkpoint in between, before it counts as failed

Files = dict[str, bytes]  # of a run folder, keyed by their paths relative to it


@dataclass
class News:
    """A report that a task sends from time to time, and at its end."""

    host: str
    pid: int  # of the worker
    steps: int  # env steps so far
    log: bytes = b""  # printed since the last report
    files: Files = field(default_factory=dict)  # those that are new since then, if there is a new checkpoint
    status: int | None = None  # exit status, at the end


@dataclass
class _Running:
    job: Job
    task: Any  # generator of references to News
    last: News
    held: ExitStack  # the lock of its folder on this machine
    losses: int = 0


class Ray:
    """Runs jobs on a cluster.

    Args:
        out: where their folders are, on this machine.
        address: HOST:PORT of the cluster's head; this machine must belong to the cluster (`ray start`). None: the
            cluster that runs on this machine, else a new one of this machine only.
        cpus: per job. A job whose device is cuda gets a GPU too.
        every: seconds between two reports (`News`) of a job.

    Raises:
        UsageError: Ray is not installed, the address cannot be reached, or no node has that many CPUs.
    """

    def __init__(self, out: Path, address: str | None = None, cpus: int = 1, every: float = 2.0):
        records.check_positive({"cpus": cpus})
        self._ray = _connected(address or os.environ.get("RAY_ADDRESS"))
        self._out, self._cpus, self._every, self._version = out, cpus, every, _version()
        self._running: dict[str, _Running] = {}
        try:
            nodes = self._nodes()
            print(f"ray: {len(nodes)} node{'s' * (len(nodes) > 1)}, {sum(nodes):.0f} CPUs, {cpus} a job", flush=True)
            if max(nodes, default=0.0) < cpus:
                raise UsageError(f"--cpus {cpus}: the largest node of this cluster has {max(nodes, default=0.0):.0f}")
        except UsageError:
            self.close()
            raise

    def room(self) -> bool:
        # Nodes come and go. One job more than fits is always waiting: free CPUs are taken at once, and a cluster that
        # grows on demand sees the demand.
        return len(self._running) <= sum(int(cpus // self._cpus) for cpus in self._nodes())

    def start(self, job: Job) -> None:
        folder = self._out / job.name
        with ExitStack() as held:
            held.enter_context(records.alone(folder))  # nobody trains it on this machine until it has ended
            task = self._submit(job)
            self._running[job.name] = _Running(job, task, News("", 0, steps_done(job, folder)), held.pop_all())

    def ended(self) -> list[tuple[Job, str | None]]:
        over: list[tuple[Job, str | None]] = []
        while ready := self._ready():
            for one in ready:
                has_ended, reason = self._hear(one)
                if has_ended:
                    self._running.pop(one.job.name).held.close()
                    over.append((one.job, reason))
        return over

    def steps(self, job: Job) -> int:
        if job.name in self._running:
            return self._running[job.name].last.steps
        return steps_done(job, self._out / job.name)

    def close(self) -> None:
        self._ray.shutdown()  # its tasks end with it
        for one in self._running.values():
            one.held.close()

    def _nodes(self) -> list[float]:
        """CPUs of each node that is alive."""
        return [node["Resources"].get("CPU", 0.0) for node in self._ray.nodes() if node["Alive"]]

    def _submit(self, job: Job) -> Any:
        folder = self._out / job.name
        gpus = int(records.read_config(folder)["device"] == "cuda")
        files = _to_go_on(folder)
        # Ray would restart a lost task with its original files; `_lost` restarts it with those that came since.
        options = {"num_cpus": self._cpus, "num_gpus": gpus, "max_retries": 0, "num_returns": "streaming"}
        return self._ray.remote(**options)(_train).remote(job, files, self._cpus, self._every, self._version)

    def _ready(self) -> list[_Running]:
        """The jobs that have news."""
        tasks = [one.task for one in self._running.values()]
        ready = self._ray.wait(tasks, num_returns=len(tasks), timeout=0, fetch_local=False)[0] if tasks else []
        have = {id(task) for task in ready}
        return [one for one in self._running.values() if id(one.task) in have]

    def _hear(self, one: _Running) -> tuple[bool, str | None]:
        """Take the next news of a job. -> (whether it ended, why it failed if it did)"""
        try:
            self._take(one, self._ray.get(next(one.task)))
        except self._ray.exceptions.RayTaskError as error:  # from our own code on the worker
            return True, f"{words(error.cause or error)[-1]} (on {one.last.host or 'a node'})"
        except (self._ray.exceptions.RayError, StopIteration) as error:
            reason = self._lost(one, error)
            return reason is not None, reason
        return one.last.status is not None, why_failed(self._out / one.job.name, one.last.status or 0)

    def _take(self, one: _Running, news: News) -> None:
        folder = self._out / one.job.name
        with open(log_of(folder), "ab") as log:
            log.write(news.log)
        _write(folder, news.files)
        one.last, one.losses = news, 0 if news.files else one.losses

    def _lost(self, one: _Running, error: Exception) -> str | None:
        """Restart a job whose worker is gone. -> why not, if it has lost too many"""
        one.losses += 1
        what = f"lost its worker on {one.last.host or 'a node'} ({type(error).__name__})"
        with open(log_of(self._out / one.job.name), "a") as log:
            log.write(f"{what}\n")
        if one.losses >= _LOSSES:
            return f"{what}, as {_LOSSES - 1} before it since the newest checkpoint"
        try:
            one.task, one.last = self._submit(one.job), News("", 0, one.last.steps)
        except UsageError as refused:
            return str(refused)
        return None


def _connected(address: str | None) -> Any:
    """The module ray, connected to a cluster."""
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise UsageError("--on ray needs Ray: pip install -e '.[ray]' in the project's folder") from None
    here = (
        f"on this machine, first: 'ray start --address={address}' (with --num-cpus 0 it only watches); "
        "a cluster with a token wants the same one here, as RAY_AUTH_TOKEN"
    )
    if address not in (None, "auto", "local"):
        _reach(str(address))
    # For a cluster that starts here: by default its workers yield to whatever else the machine does.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, AssertionError) as error:
        raise UsageError(f"--address {address}: {words(error)[0]}; {here}") from None
    return ray


def _reach(address: str) -> None:
    """Raises UsageError unless `address` accepts a connection. Ray itself tries for minutes, then ends the process."""
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        raise UsageError(f"--address {address}: give HOST:PORT of the cluster's head, as 'ray start --head' names it")
    try:
        socket.create_connection((host, int(port)), timeout=10.0).close()
    except OSError as error:
        raise UsageError(
            f"--address {address}: cannot be reached ({error.strerror or error}); is 'ray start --head' running there?"
        ) from None


def _train(job: Job, files: Files, cpus: int, every: float, version: str) -> Iterator[News]:
    """The task: put a job's folder in a temporary place and train it there."""
    host, pid = socket.gethostname(), os.getpid()
    if _version() != version:
        raise UsageError(
            f"the package on {host} is not the version of the command: install the same version there, and start again"
        )
    with tempfile.TemporaryDirectory(prefix="ess-rl-") as place, ExitStack() as held:
        folder = Path(place, job.name)
        folder.mkdir()
        _write(folder, files)
        sent, told = _stamps(folder), 0
        process = launch(folder, cpus, _own_cpus(cpus, held))
        held.callback(process.kill)
        yield News(host, pid, steps_done(job, folder))
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(every)
            status = process.poll()
            log = log_of(folder).read_bytes()
            news = News(host, pid, steps_done(job, folder), log[told:], status=status)
            if status is not None or _milestones(folder) - sent.keys():
                now = _stamps(folder, everything=status is not None)
                news.files = _read(folder, {name for name, stamp in now.items() if sent.get(name) != stamp})
                sent = now
            told = len(log)
            yield news
            if status is not None:
                return


def _stamps(folder: Path, everything: bool = False) -> dict[str, tuple[int, int]]:
    """Names of the files that a run resumes from, or of all its files, with stamps that show when one has changed."""
    stamps = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        half = any(path.match(one) for one in records.UNFINISHED)
        if name == "lock" or half or ("tensorboard" in name and not everything):
            continue
        with suppress(FileNotFoundError):  # an old replay, removed in the meantime
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                stamps[name] = (status.st_mtime_ns, status.st_size)
    return stamps


def _milestones(folder: Path) -> set[str]:
    """Names of the files that secure progress: once one has appeared, less can be lost."""
    return {path.relative_to(folder).as_posix() for path in [*records.checkpoints(folder), *folder.glob("seed-*.json")]}


def _to_go_on(folder: Path) -> Files:
    """The files that a run needs to resume. Of its checkpoints the newest two, in case one is damaged."""
    old = {f"checkpoints/{path.stem}" for path in records.checkpoints(folder)[:-2]}
    return _read(folder, {name for name in _stamps(folder) if name.rpartition(".")[0] not in old})


def _place(name: str) -> int:
    """Rank of a file in the order of writing: a checkpoint after all that goes with it, the result last."""
    return 2 if name == "result.json" else int(name.endswith(".safetensors"))


def _read(folder: Path, names: set[str]) -> Files:
    """Read files of a run in progress, in reverse order of writing, so that a checkpoint comes with its metrics."""
    files: Files = {}
    for name in sorted(names, key=_place, reverse=True):
        with suppress(FileNotFoundError):  # an old replay was just removed
            files[name] = (folder / name).read_bytes()
    return files


def _write(folder: Path, files: Files) -> None:
    for name in sorted(files, key=_place):
        part = folder / f"{name}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(files[name])
        os.replace(part, folder / name)
    records.drop_old_replays(folder)


def _own_cpus(count: int, held: ExitStack) -> list[int]:
    """CPUs of this machine that no other job's task has, reserved until `held` closes; empty if there are too few.

    Ray counts CPUs, but does not say which ones a task may use.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    place = Path(tempfile.gettempdir(), f"ess-rl-cpus-{os.getuid()}")
    place.mkdir(exist_ok=True)
    own: list[int] = []
    for cpu in sorted(os.sched_getaffinity(0)):
        with suppress(Timeout):
            if len(own) < count:
                held.enter_context(FileLock(place / f"{cpu}.lock").acquire(timeout=0))
                own.append(cpu)
    return own if len(own) == count else []


def _version() -> str:
    """Hash of this package's sources: otherwise results of two versions would be mixed silently."""
    root = Path(__file__).parents[1]
    paths = [path for name in ("agents", "envs", "ess_rl", "experiments") for path in (root / name).rglob("*.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()
