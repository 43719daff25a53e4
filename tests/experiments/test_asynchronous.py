"""Runs whose rollouts are collected by another process."""

import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.utils._pytree import tree_leaves

import envs
from agents import AGENTS
from ess_rl.asynchronous import ProcessCollector
from ess_rl.errors import LostProcessError, UsageError
from ess_rl.population import Population
from experiments import configurations, records, run

SETTINGS = {"num_envs": 4, "rollout": 64, "epochs": 1, "minibatch": 64, "hidden": (8,), "lag": 2, "replay": 1}


GROUPS = {**SETTINGS, "rollout": 200, "minibatch": 80, "group": 2, "draw": "reward"}
STAGGERED = {**SETTINGS, "starts": "staggered", "sync_interval": 2}


def start(out: Path, env: str, agent: str = "p3o", **changes: Any) -> Path:
    options: dict[str, Any] = {"seeds": [3, 4], "sweep": {"learning_rate": (1e-3, 1e-4)}, "steps": 3000}
    options |= {"settings": SETTINGS, "episodes": 2, "compiled": "off"}
    folder = run.start(agent, env, out=out, **(options | changes))
    # Fresh starts more often than four episodes last: 12 iterations, a checkpoint after each 5th.
    records.write_json(folder / "config.json", records.read_config(folder) | {"reset_every": 5})
    return folder


def outcome(folder: Path) -> tuple[Any, ...]:
    """All of a run but what the clock says."""
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "phases")} for row in records.metrics(folder)]
    state = run.load_run(folder)[0].state
    finals = records.read_json(folder / "result.json")["final_return"]
    return rows, finals, [x.tolist() for x in tree_leaves(state)]


@pytest.mark.parametrize(
    ("agent", "env", "changes"),
    [
        ("p3o", "InvertedPendulum-v5", {}),
        ("p3o", "ess/TwoLinkArm-v0", {"settings": STAGGERED}),
        ("tba_group", "Pendulum-v1", {"settings": GROUPS, "steps": 9_600}),
    ],
)
def test_a_second_process_changes_nothing_but_the_time_and_its_loss_nothing_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agent: str, env: str, changes: dict[str, Any]
) -> None:
    alone = start(tmp_path / "alone", env, agent, **changes)
    apart = start(tmp_path / "apart", env, agent, asynchronous=True, **changes)
    run.carry_on(alone)
    save = run._save

    def save_and_kill(*arguments: Any) -> None:
        save(*arguments)
        (collector,) = multiprocessing.active_children()
        os.kill(collector.pid or 0, signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(run, "_save", save_and_kill)
        with pytest.raises(LostProcessError, match="was ended by signal 9; 'ess-rl resume RUN' continues"):
            run.carry_on(apart)
    assert len(records.checkpoints(apart)) == 1
    run.carry_on(apart)
    assert outcome(apart) == outcome(alone)
    assert not multiprocessing.active_children()
    assert "--async" in (configurations.command(records.read_config(apart)) or "")


def test_what_goes_wrong_in_the_other_process_is_said_in_this_one() -> None:
    config = AGENTS["ppo"].config(num_envs=2, rollout=4, minibatch=4, hidden=(4,), lag=1)
    env = envs.make("Pendulum-v1", 2)
    population = Population(AGENTS["ppo"].agent(config, env.obs_dim, env.act_dim), [0])
    make: Any = partial(envs.make, "NoSuchTask-v0", 2)
    collector = ProcessCollector(make, population, env, config.rollout)
    with pytest.raises(UsageError, match="NoSuchTask-v0"):
        collector.ready()
    collector.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lag": 0}, "--async: .* older policy .*; give --lag 1"),
        ({"hints": 2, "replay": 0}, "--async --hints: .* leave"),
    ],
)
def test_where_there_is_nothing_to_collect_meanwhile(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    env = "ess/TwoLinkArmSparse-v0"
    with pytest.raises(UsageError, match=words):
        start(tmp_path / "run", env, settings={**SETTINGS, **settings}, asynchronous=True)
    assert not (tmp_path / "run").exists()
