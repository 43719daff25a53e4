"""Suites: run once, gone on with, and what they do with a job that fails."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import envs
from agents import AGENTS, OFFLINE_AGENTS
from ess_rl.errors import UsageError
from experiments import benchmark, machine, plan, records, run, suites
from experiments.peers.sb3 import PEERS
from experiments.report import tables
from experiments.suites import SUITES, Job

TINY: dict[str, Any] = {
    "steps": 512,
    "seeds": range(2),
    "settings": {"num_envs": 2, "rollout": 64, "epochs": 1, "minibatch": 64, "hidden": (4,)},
    "options": {"episodes": 1, "compiled": "off"},
}


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> str:
    jobs = (
        Job("p3o", "Pendulum-v1", **TINY),
        Job("ppo", "NoSuchTask-v0", **TINY),
        Job("ppo", "Pendulum-v1", **TINY, sweep={"clip": (0.1, 0.2)}),
        Job("sb3-ppo", "Pendulum-v1", steps=64, seeds=range(1), settings={"num_envs": 2, "rollout": 32}),
    )
    monkeypatch.setitem(suites.SUITES, "tiny", jobs)
    return "tiny"


@pytest.mark.parametrize("name", sorted(SUITES))
def test_every_job_of_a_suite_can_be_planned(name: str):
    for job in SUITES[name]:
        if job.dataset:
            assert job.agent in OFFLINE_AGENTS and OFFLINE_AGENTS[job.agent].config(**job.settings)
            assert job.env in suites.how_to_record(job.dataset) and job.dataset in suites.how_to_record(job.dataset)
        elif job.agent in AGENTS:
            made = plan.make(
                job.agent, job.env, settings=job.settings, sweep=job.sweep,
                seeds=job.seeds, steps=job.steps, **job.options,
            )  # fmt: skip
            assert len(made["seeds"]) == job.members
        else:
            assert job.agent in PEERS and "gymnasium" in envs.backends_of(job.env)
    assert len({job.name for job in SUITES[name]}) == len(SUITES[name])


def test_a_suite_runs_what_is_missing_and_names_what_failed(
    suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    failed = benchmark.benchmark(suite, tmp_path / "out", partial(benchmark.Local, jobs=2))
    assert len(failed) == 1 and failed[0].startswith("ppo-NoSuchTask-v0: ")
    printed = capsys.readouterr().out
    assert "tiny: 4 jobs, 3 to run" in printed and "| ppo clip 0.2" in printed and "| sb3-ppo" in printed
    result = tmp_path / "out" / "p3o-Pendulum-v1" / "result.json"
    made = result.stat().st_mtime_ns
    (tmp_path / "out" / "ppo-Pendulum-v1" / "result.json").unlink()  # as if stopped before its evaluation
    assert benchmark.benchmark(suite, tmp_path / "out") == failed
    assert "4 jobs, 1 to run" in capsys.readouterr().out
    assert result.stat().st_mtime_ns == made


def test_a_run_that_dies_does_not_stop_the_others(suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    monkeypatch.setitem(suites.SUITES, "tiny", suites.SUITES["tiny"][:3])
    (out / "p3o-Pendulum-v1").mkdir(parents=True)
    record = plan.make("p3o", "Pendulum-v1", sweep={}, **{k: v for k, v in TINY.items() if k != "options"},
                      **TINY["options"])  # fmt: skip
    records.write_json(out / "p3o-Pendulum-v1" / "config.json", record)
    (out / "p3o-Pendulum-v1" / "checkpoints").mkdir()
    (out / "p3o-Pendulum-v1" / "checkpoints" / "000000128.safetensors").write_bytes(b"cut short")
    failed = benchmark.benchmark(suite, out)
    assert [line.split(":")[0] for line in failed] == ["ppo-NoSuchTask-v0", "p3o-Pendulum-v1"]
    assert "000000128.safetensors" in failed[1] and "exit status 2" in failed[1]
    assert (out / "ppo-Pendulum-v1" / "result.json").exists()


@pytest.mark.parametrize(("asked", "threads"), [(None, 4), ("1", 1), ("16", 4), ("0", 1), ("many", 4)])
def test_jobs_take_no_more_threads_than_were_asked_for(
    asked: str | None, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Eight cores, two jobs: four each at most."""
    given = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(machine, "available_cores", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(benchmark, "launch", lambda folder, threads, cpus: given.append((threads, len(cpus))))
    benchmark.Local(tmp_path, jobs=2).start(Job("p3o", "Pendulum-v1"))
    assert given == [(threads, threads)]


def test_a_place_that_holds_another_run_is_refused(suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run.start("p3o", "Pendulum-v1", sweep={}, out=tmp_path / "p3o-Pendulum-v1", settings=TINY["settings"],
              seeds=range(5), steps=512, **TINY["options"])  # fmt: skip
    monkeypatch.setitem(suites.SUITES, "tiny", suites.SUITES["tiny"][:1])
    (line,) = benchmark.benchmark(suite, tmp_path)
    assert "holds another run, of seeds [0, 1, 2, 3, 4], not [" in line
    with pytest.raises(UsageError, match="unknown suite 'no': choose one of smoke, classic, mujoco"):
        benchmark.benchmark("no", tmp_path)


class Instant:
    """An executor whose jobs are done at once."""

    def __init__(self) -> None:
        self.running: list[Job] = []

    def room(self) -> bool:
        return not self.running

    def start(self, job: Job) -> None:
        self.running.append(job)

    def ended(self) -> list[tuple[Job, str | None]]:
        done, self.running = self.running, []
        return [(job, None) for job in done]

    def steps(self, job: Job) -> int:
        return job.steps * job.members

    def close(self) -> None:
        pass


def test_a_job_whose_place_is_taken_counts_for_no_progress(suite: str, capsys: pytest.CaptureFixture[str]):
    taken, other, *_ = suites.SUITES[suite]
    benchmark._run_all([taken, other], [other], Instant(), {taken.name: "holds another run"})
    assert re.search(r"^100 % +1,024 env steps", capsys.readouterr().out, flags=re.MULTILINE)


def test_two_do_not_carry_out_one_suite_in_one_place(suite: str, tmp_path: Path):
    with (
        records.alone(tmp_path, "carries out jobs in this folder"),
        pytest.raises(UsageError, match="another process carries out jobs in this folder"),
    ):
        benchmark.benchmark(suite, tmp_path)


def test_finished_runs_of_earlier_versions_are_taken_as_they_are(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A field that the Config did not have counts as what that version did; a setting that differs is named."""
    monkeypatch.setitem(suites.SUITES, "tiny", suites.SUITES["tiny"][:1])
    assert benchmark.benchmark(suite, tmp_path) == []
    path = tmp_path / "p3o-Pendulum-v1" / "config.json"
    config, made = records.read_config(path.parent), (path.parent / "result.json").stat().st_mtime_ns
    older = {name: value for name, value in config["config"].items() if name not in ("starts", "hints", "hint_lambda")}
    records.write_json(path, {**config, "config": older})
    assert benchmark.benchmark(suite, tmp_path) == [] and (path.parent / "result.json").stat().st_mtime_ns == made
    assert "| p3o " in capsys.readouterr().out
    records.write_json(path, {**config, "config": {**older, "starts": "staggered"}})
    (line,) = benchmark.benchmark(suite, tmp_path)
    assert line.endswith("holds another run, of starts staggered, not together: choose another --out")
    assert "| p3o " not in capsys.readouterr().out  # the table has no other runs


def test_finished_runs_need_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))
    (job, other) = suites.SUITES["offline"][:2]
    for one in (job, other):
        (tmp_path / one.name).mkdir()
        (tmp_path / one.name / "result.json").write_text("{}")
    monkeypatch.setattr(tables, "comparison", lambda runs: f"{len(runs)} runs")
    assert benchmark.run_jobs("two", (job, other), tmp_path, benchmark.Local) == []


def test_data_sets_that_are_missing_are_named_with_how_to_record_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))
    first = "ess-rl dataset record RUN --id ess/halfcheetah/medium-v0 --member 1 --checkpoint 300000 --steps 200000"
    with pytest.raises(UsageError, match=rf"9 of 9 data sets .* made by: {first}, RUN a finished run on HalfCheetah"):
        benchmark.benchmark("offline", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the seeds outlive a killed command")
def test_the_seeds_of_a_peer_end_with_its_command(tmp_path: Path, children_end_with: Callable[..., None]):
    words = ("train", "sb3-ppo", "--env", "Pendulum-v1", "--out", str(tmp_path))
    children_end_with("-m", "experiments", *words)  # a seed, and a tracker


def free(folder: Path) -> bool:
    """Whether no process is training the run of this folder."""
    try:
        with records.alone(folder):
            return True
    except UsageError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the runs outlive a killed benchmark")
def test_a_killed_benchmark_goes_on_where_it_was(tmp_path: Path):
    words = [sys.executable, "-m", "experiments", "benchmark", "smoke", "--out", str(tmp_path), "--jobs", "2"]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    first = tmp_path / "ppo-Pendulum-v1"
    deadline = time.monotonic() + 120
    while records.last_metrics(first) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while not free(first) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert free(first)  # the run has ended with the benchmark
    assert not (first / "result.json").exists()
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*/result.json"))) == 4
