"""One run over two processes, as a user begins it: one folder, resumed bit for bit, and only with as many."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agents import AGENTS
from ess_rl import processes
from ess_rl.errors import UsageError
from experiments import configurations, plan, records, run

RUN = (
    "train p3o --env Pendulum-v1 --seeds 2 --steps 4096 --num-envs 4 --rollout 64 --epochs 1 --minibatch 64 --hidden 8 "
    "--replay 1 --lag 1 --episodes 1 --checkpoints 2 --compile off --out"
)


def torchrun(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "experiments", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without Gloo")
def test_two_processes_write_one_run_and_resume_it_bit_for_bit(tmp_path: Path):
    done = torchrun(*RUN.split(), "whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("device cpu, eager, 2 processes") == 1 and done.stdout.count("mean final return") == 1
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    rows = list(records.metrics(whole))
    assert [row["env_steps"] for row in rows] == [256 * (i + 1) for i in range(16)]
    assert records.read_config(whole)["processes"] == 2
    assert records.read_config(whole)["config"]["num_envs"] == 4  # of both

    shutil.copytree(whole, cut)
    newest = records.checkpoints(cut)[-1]
    assert len(records.checkpoints(cut)) == 2
    for path in (newest, records.replay_of(newest), cut / "result.json"):
        path.unlink()
    with pytest.raises(UsageError, match=r"begun with 2 processes, not 1: 'torchrun --nproc-per-node 2 -m experiments"):
        run.carry_on(cut)
    done = torchrun("resume", "cut", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in (f"checkpoints/{newest.name}", f"checkpoints/{records.replay_of(newest).name}"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    returns = [records.read_json(folder / "result.json")["final_return"] for folder in (whole, cut)]
    assert returns[0] == returns[1]
    population, config, iteration, _ = run.load_run(whole)  # one process can look at it
    assert iteration == 16 and run.evaluate(population, config, 1).flatten().tolist() == returns[0]
    line = configurations.command(records.read_config(whole))
    assert line is not None and line.startswith(
        "torchrun --nproc-per-node 2 -m experiments train p3o --env Pendulum-v1 "
    )


def test_shares_that_are_not_equal_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "world_size", lambda: 3)
    with pytest.raises(UsageError, match="--num-envs 16 over 3 processes: must be a multiple of 3"):
        run.start("ppo", "Pendulum-v1", out=tmp_path / "run", settings={}, sweep={}, seeds=[0], steps=10_000)
    with pytest.raises(UsageError, match="--minibatch 64 over 3 processes: must be a multiple of 3"):
        run.start(
            "ppo", "Pendulum-v1", out=tmp_path / "run", settings={"num_envs": 3}, sweep={}, seeds=[0], steps=10_000
        )
    assert not (tmp_path / "run").exists()
    assert plan.share(AGENTS["ppo"].config(num_envs=6, minibatch=12), 3).minibatch == 4
