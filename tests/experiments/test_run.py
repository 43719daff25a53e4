"""Runs from inside: what happens when a simulator goes wrong, and the parts that the command line does not show."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import envs
from agents import AGENTS
from ess_rl.contract import Step
from ess_rl.errors import LostProcessError, NonFiniteError, UsageError
from ess_rl.population import Population
from experiments import benchmark, figures, memory, quickstart, records, run
from experiments.peers import by_seed, sb3
from experiments.report import tables
from experiments.suites import Job

SMALL = {"num_envs": 4, "rollout": 64, "epochs": 1, "minibatch": 64, "hidden": (8,)}


def start(out: Path, **changes: Any) -> Path:
    options: dict[str, Any] = {"seeds": [3, 8], "sweep": {}, "steps": 8000, "episodes": 2, "compiled": "off"}
    options = options | {"settings": SMALL} | changes
    return run.start("p3o", "Pendulum-v1", out=out, **options)


class Failing:
    """A simulator whose reward is not a number once: in environment 5 at its 1000th step."""

    def __init__(self, env: Any):
        self._env, self._steps = env, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def step(self, action: Tensor) -> Step:
        step = self._env.step(action)
        self._steps += 1
        if self._steps == 1000:
            step.reward[5] = torch.nan
        return step


def test_a_simulator_that_goes_wrong_stops_the_run_and_keeps_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = start(tmp_path / "run")
    whole = envs.make
    with monkeypatch.context() as broken:
        broken.setattr(envs, "make", lambda *words, **options: Failing(whole(*words, **options)))
        # Step 1000 is step 39 of iteration 16 (15 x 64 = 960); environment 5 is number 1 of member 1, whose seed is 8.
        with pytest.raises(NonFiniteError, match=r"non-finite reward in member 1 \(seed 8\)") as e:
            run.carry_on(folder)
    assert "environment 1, step 39 of iteration 16" in str(e.value)
    assert [path.stem for path in records.checkpoints(folder)] == [
        "000003328"
    ]  # 13 iterations: 4 episodes of 200 steps
    assert not (folder / "result.json").exists()
    result = run.carry_on(folder)  # mended, it goes on from there
    assert result["env_steps"] == 8192 and len(result["final_return"]) == 2


def test_members_of_a_sweep_are_those_trained_alone(tmp_path: Path) -> None:
    together = run.carry_on(start(tmp_path / "both", sweep={"learning_rate": [1e-3, 1e-4]}, seeds=[3], steps=1024))
    for member, rate in enumerate((1e-3, 1e-4)):
        alone = run.carry_on(start(tmp_path / str(rate), sweep={"learning_rate": [rate]}, seeds=[3], steps=1024))
        # Equal draws, and floats that differ by the order of sums only, which 4 iterations let grow.
        assert together["final_return"][member] == pytest.approx(alone["final_return"][0], rel=1e-3)
    assert together["final_return"][0] != together["final_return"][1]


def test_published_files_hold_the_run(tmp_path: Path) -> None:
    folder = start(tmp_path / "run")
    result = run.carry_on(folder)
    figures.publish(folder, tmp_path / "published")
    assert records.read_json(tmp_path / "published" / "result.json") == result
    head, *rows = (tmp_path / "published" / "curves.csv").read_text().splitlines()
    assert head == "env_steps,member,return,ess,behavior_kl,capped_fraction"
    assert rows[-2].startswith("8192,0,") and rows[-1].startswith("8192,1,")
    last = list(records.metrics(folder))[-1]
    assert float(rows[-1].split(",")[3]) == pytest.approx(last["ess"][1], rel=1e-5)
    peer = tmp_path / "peer"
    peer.mkdir()
    for name in ("config.json", "result.json"):
        record = records.read_json(folder / name)
        records.write_json(peer / name, {key: x for key, x in record.items() if key != "iterations"})
    changed = records.read_json(peer / "config.json")
    records.write_json(peer / "config.json", changed | {"config": {**changed["config"], "clip": 0.3}})
    with pytest.raises(
        UsageError, match=r"published holds another run, of clip .*, not 0\.3: choose another place, or"
    ):
        figures.publish(peer, tmp_path / "published")
    assert figures.publish(peer, tmp_path / "published", overwrite=True) == ["config.json", "result.json"]
    assert not (tmp_path / "published" / "curves.csv").exists()  # they were those of another run
    (peer / "result.json").unlink()
    with pytest.raises(UsageError, match=r"peer is not finished: it has no result\.json yet; 'ess-rl resume"):
        figures.publish(peer, tmp_path / "published")


def test_a_published_run_that_is_replaced_leaves_no_curves(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", steps=1024)
    run.carry_on(folder)
    figures.publish(folder, tmp_path / "published")
    again = start(tmp_path / "published", steps=1024, seeds=[7, 8, 9], overwrite=True)
    run.carry_on(again)
    assert figures.read_curves(again).values["return"].shape[1] == 3
    assert "published" not in tables.comparison([tmp_path / "published", tmp_path / "published" / "config.json"])


def test_metrics_that_a_checkpoint_has_outlived_are_not_passed_over(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", steps=1024)
    run.carry_on(folder)
    (folder / "result.json").unlink()
    log = folder / "metrics.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines()[:-3]))
    newest = records.checkpoints(folder)[-1]
    with pytest.raises(UsageError, match=rf"1 of the 4 iterations before .*{newest.name}: move that file away"):
        run.carry_on(folder)


def test_quickstart_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = start(tmp_path / "p3o", steps=1024)
    run.carry_on(older)
    quickstart.main("Pendulum-v1", seeds=1, steps=8192, out=tmp_path, compile="off", overwrite=True)
    assert records.read_config(older)["steps"] == 8192  # replaced
    printed = capsys.readouterr().out
    assert (tmp_path / "curves.png").exists()
    for word in ("curves.png", "checkpoint:", "tensorboard --logdir", "| p3o", "| ppo"):
        assert word in printed


def train_peer(out: Path, agent: str = "sb3-ppo", **changes: Any) -> dict[str, Any]:
    settings = changes.pop("settings", {"num_envs": 2})
    options: dict[str, Any] = {"seeds": range(2), "steps": 1024, "episodes": 2}
    return sb3.carry_on(sb3.start(agent, "Pendulum-v1", settings=settings, out=out, **options | changes))


def test_a_peer_leaves_the_same_records_and_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "sb3"
    result = train_peer(out)
    assert result["agent"] == "sb3-ppo" and len(result["final_return"]) == 2 and result["env_steps"] == 1024
    assert all(-2000 < score < 0 for score in result["final_return"])
    kept = out / "seed-0.json"
    kept.write_text(json.dumps({**records.read_json(kept), "final_return": -7.0}))
    (out / "result.json").unlink()
    assert sb3.carry_on(out)["final_return"][0] == -7.0  # not trained again
    assert figures.publish(out, tmp_path / "published") == ["config.json", "result.json"]  # a peer has no curves
    assert "sb3-ppo" in tables.comparison([tmp_path / "published"])
    with pytest.raises(UsageError, match="another run, of steps 1024, not 2048"):
        train_peer(out, steps=2048)
    with pytest.raises(UsageError, match=r"holds seeds \[0, 1\], which are not all asked for"):
        train_peer(out, seeds=range(1, 3))
    before = (out / "config.json").read_bytes()
    with records.alone(out), pytest.raises(UsageError, match="another process is training this run"):
        train_peer(out, seeds=range(3))
    assert (out / "config.json").read_bytes() == before  # one that trains there is left alone
    assert train_peer(out)["seeds"] == [0, 1] and (out / "config.json").read_bytes() == before
    sb3.start("sb3-ppo", "Pendulum-v1", settings={"num_envs": 2}, out=out, seeds=range(3), steps=1024, episodes=2)
    with pytest.raises(UsageError, match="sb3 is not finished"):
        tables.comparison([out])
    result = train_peer(out, seeds=range(3))
    assert not _is_done_as(out, seeds=range(3)) and "of steps 1024, not 4" in _is_done_as(out, steps=4)
    assert "of learning_rate 0.0003, not 0.1" in _is_done_as(out, settings={"num_envs": 2, "learning_rate": 0.1})
    assert result["seeds"] == [0, 1, 2] and result["final_return"][0] == -7.0


def _diverges_at_once(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """Stands in for a peer's training: seed 0 fails while seed 1 is in training."""
    if seed == 0:
        raise NonFiniteError("seed 0 diverged")
    time.sleep(1.0)
    return {"final_return": -3.0}


def test_a_seed_that_fails_costs_no_other_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_seed, "ProcessPoolExecutor", lambda max_workers, **how: ThreadPoolExecutor(max_workers))
    out, how = tmp_path / "sb3", {"settings": {"num_envs": 2}, "steps": 1024, "episodes": 2}
    sb3.start("sb3-ppo", "Pendulum-v1", out=out, seeds=range(4), **how)
    with pytest.raises(NonFiniteError, match="seed 0 diverged"):
        by_seed.train_missing(out, 2, _diverges_at_once)
    assert "seed 0 failed: waiting for the 1 that are in training" in capsys.readouterr().out
    assert [path.name for path in out.glob("seed-*")] == ["seed-1.json"]  # and the last two did not begin


def test_a_published_run_of_a_peer_is_not_taken_apart(tmp_path: Path) -> None:
    out = tmp_path / "published"
    shutil.copytree(Path(__file__).parents[2] / "experiments" / "results" / "mujoco" / "sb3-ppo-Hopper-v5", out)
    config, before = records.read_config(out), (out / "result.json").read_bytes()
    how = {"settings": config["config"], "steps": config["steps"], "episodes": config["episodes"]}
    with pytest.raises(UsageError, match="holds a published run, which cannot be extended with more seeds"):
        sb3.start("sb3-ppo", "Hopper-v5", out=out, seeds=range(10), **how)
    assert (out / "result.json").read_bytes() == before


def test_a_peer_needs_a_time_limit(tmp_path: Path) -> None:
    gymnasium.register("Endless-v0", "gymnasium.envs.classic_control.pendulum:PendulumEnv")
    try:
        with pytest.raises(UsageError, match="Endless-v0 has no time limit, so an evaluation may never end"):
            sb3.start("sb3-ppo", "Endless-v0", settings={}, seeds=[0], steps=100, out=tmp_path / "no")
    finally:
        del gymnasium.registry["Endless-v0"]
    assert not (tmp_path / "no").exists()


def _is_done_as(out: Path, **changes: Any) -> str:
    """Why a finished run of `train_peer` is not that of a suite's job; "" where it is."""
    failed: dict[str, str] = {}
    how: dict[str, Any] = {"settings": {"num_envs": 2}, "seeds": range(3), "steps": 1024, "options": {"episodes": 2}}
    job = Job("sb3-ppo", "Pendulum-v1", **how | changes)
    shutil.copytree(out, out.parent / job.name, dirs_exist_ok=True)
    assert benchmark._is_done(job, out.parent, failed)
    return "".join(failed.values())


def test_a_peer_acts_in_the_unit_of_our_agents_and_sees_one_vector() -> None:
    """Pendulum's torques are in +-2, Reacher's in +-1; a Dict of observations becomes one vector."""
    pendulum = sb3._as_ours(gymnasium.make("Pendulum-v1"))
    assert pendulum.action_space.low == -1.0 and pendulum.action_space.high == 1.0
    pendulum.reset(seed=0)
    pendulum.step(np.array([0.5], dtype=np.float32))
    assert pendulum.unwrapped.last_u == 1.0
    plain = gymnasium.make("Reacher-v5")
    assert sb3._as_ours(plain) is plain
    spaces = gymnasium.spaces.Dict({name: gymnasium.spaces.Box(-1.0, 1.0, (2,)) for name in "ab"})
    several = gymnasium.make("Pendulum-v1")
    several.observation_space = spaces
    assert sb3._as_ours(several).observation_space.shape == (4,)


def test_a_peer_that_diverges_says_so(tmp_path: Path) -> None:
    folder = sb3.start(
        "sb3-ppo", "Pendulum-v1", out=tmp_path / "a", settings={"learning_rate": 1e30, "num_envs": 1, "rollout": 64},
        seeds=[3], steps=300,
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"sb3-ppo on Pendulum-v1, seed 3: .*; finished seeds are kept"):
        sb3.train_one(records.read_config(folder), 3)


def die(config: dict[str, Any], seed: int) -> dict[str, Any]:
    os._exit(9)


def test_a_lost_process_of_a_peer_is_one_line(tmp_path: Path) -> None:
    how: dict[str, Any] = {"settings": {"num_envs": 2}, "seeds": range(2), "steps": 1024}
    folder = sb3.start("sb3-ppo", "Pendulum-v1", out=tmp_path / "a", **how)
    with pytest.raises(
        LostProcessError, match=r"a process that trained a seed is gone .* 'ess-rl resume .*a' continues"
    ):
        by_seed.train_missing(folder, 1, die)


def test_a_peer_trains_on_tasks_of_this_project() -> None:
    """Where nothing has registered them yet, as in a process of its own; SB3 asks for a picture first."""
    code = (
        "from experiments.peers import sb3; config = sb3.PPOConfig(num_envs=2, rollout=8, minibatch=8, epochs=1);"
        "sb3.ppo('ess/LQR-v0', 0, config)[0].learn(16); print('learned')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.endswith("learned\n"), done.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": [-1]}, "give different numbers from 0"),
        ({"seeds": [2**32]}, "whose seeds are below 2"),
        ({"settings": {"minibatch": 1}}, "--minibatch 1: must be at least 2"),
        ({"settings": {"num_envs": 1, "rollout": 1}}, "--num-envs 1 --rollout 1: one step has no spread"),
        ({"settings": {"learning_rate": math.nan}}, "--learning-rate nan: must be a finite number"),
        ({"settings": {"clip": -1.0}}, "--clip -1: must be"),
        ({"settings": {"discount": 2.0}}, "--discount 2: must be"),
    ],
)
def test_what_a_peer_cannot_train_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    how: dict[str, Any] = {"settings": {}, "seeds": [0], "steps": 64}
    with pytest.raises(UsageError, match=said):
        sb3.start("sb3-ppo", "Pendulum-v1", out=tmp_path / "a", **(how | changes))
    assert not (tmp_path / "a").exists()


def test_sac_is_a_peer_too(tmp_path: Path) -> None:
    settings = {"learning_starts": 100, "buffer": 1000, "minibatch": 16}
    result = train_peer(tmp_path / "sac", "sb3-sac", settings=settings, seeds=range(1), steps=300)
    assert result["agent"] == "sb3-sac" and -2000 < result["final_return"][0] < 0
    with pytest.raises(UsageError, match=r"--buffer 0: must be at least 1"):
        train_peer(tmp_path / "no", "sb3-sac", settings={"buffer": 0})
    assert not (tmp_path / "no").exists()


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a C++ compiler")
@pytest.mark.parametrize("past", [{}, {"replay": 3, "lag": 2}, {"sync_interval": 2}])
def test_a_compiled_run_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, past: dict[str, int]
) -> None:
    how: dict[str, Any] = {"compiled": "on", "settings": {**SMALL, **past}}
    whole = start(tmp_path / "whole", **how)
    run.carry_on(whole)
    stopped = start(tmp_path / "stopped", **how)
    with monkeypatch.context() as impatient:

        def stop(display: run.Display, row: records.Record) -> None:
            if row["iteration"] == 20:  # seven iterations after the checkpoint of iteration 13
                raise KeyboardInterrupt

        impatient.setattr(run.Display, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            run.carry_on(stopped)
    run.carry_on(stopped)
    ends = [records.checkpoints(folder)[-1].read_bytes() for folder in (whole, stopped)]
    assert len(records.checkpoints(stopped)) > 2 and ends[0] == ends[1]
    scores = [records.read_json(folder / "result.json")["final_return"] for folder in (whole, stopped)]
    assert scores[0] == scores[1]
    assert len(list((whole / "checkpoints").glob("*.replay"))) == (2 if past else 0)  # they are large


def test_another_number_of_threads_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = start(tmp_path / "run", steps=1024)
    for threads, printed in ((1, False), (1, False), (2, True)):
        (folder / "result.json").unlink(missing_ok=True)
        torch.set_num_threads(threads)
        try:
            run.carry_on(folder)
        finally:
            torch.set_num_threads(1)
        assert ("was trained with 1 thread of torch and goes on with 2" in capsys.readouterr().out) == printed


def test_a_population_that_cannot_fit_is_refused_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pendulum-v1, by hand: a step is 3 + 3 obs, 1 + 1 + 1 of action and behavior and a reward in float32 (40 bytes),
    two flags and an int64: 50 bytes, twice; and 2 x 64 x 4 = 512 bytes of a layer. 16 x 8 steps: 78,336 bytes."""
    config = AGENTS["p3o"].config(rollout=8)
    agent = AGENTS["p3o"].agent(config, 3, 1)
    state = sum(x.nbytes for x in tree_leaves(Population(agent, [0]).state))
    assert memory.needed(agent, config, 3, 1, 5) == 5 * (78_336 + 2 * state)
    # A lag of 2 and a sync interval keep what acts of the state three times: all but the moments of Adam.
    acts = sum(
        x.nbytes for name, x in Population(agent, [0]).state.items() if name != "optimizer" for x in tree_leaves(x)
    )
    behind = AGENTS["p3o"].config(rollout=8, lag=2, sync_interval=2)
    assert memory.needed(agent, behind, 3, 1, 5) == 5 * (78_336 + 2 * state + 3 * acts)
    # Segments of 8 steps at most: 8 x 4 numbers at each step of two rollouts; and a third rollout of 50 bytes.
    config = AGENTS["tba"].config(rollout=8, segment_length=10, replay=1)
    agent = AGENTS["tba"].agent(config, 3, 1)
    state = sum(x.nbytes for x in tree_leaves(Population(agent, [0]).state))
    assert memory.needed(agent, config, 3, 1, 5) == 5 * (78_336 + 128 * (50 + 2 * 128) + 2 * state)
    monkeypatch.setattr(memory, "free", lambda device: 2**10)
    with pytest.raises(UsageError, match=r"20 members of 4 environments x 64 steps need at least .* 0.0 GiB are free"):
        start(tmp_path / "big", seeds=range(20))
    assert not (tmp_path / "big").exists()


@pytest.mark.parametrize(
    ("agent", "changes", "said"),
    [
        ("ppo", {"settings": {"target_kl": 0.02}}, "--target-kl 0.02: does nothing here; give --objective kl too"),
        ("ppo", {"settings": {"objective": "kl"}, "sweep": {"clip": [0.1, 0.2]}}, "--clip 0.1 0.2: does nothing here"),
        ("p3o", {"sweep": {"hint_lambda": [0.5, 1.0]}}, "--hint-lambda 0.5 1: does nothing here; give --hints G too"),
        ("p3o", {"settings": {"draw": "ess"}}, "--draw ess: does nothing here; give --replay K too"),
        (
            "p3o",
            {"settings": {"cap": 1.0, "pull": 0.0, "ess": "batch"}},
            "--ess batch: does nothing here; give --cap ess",
        ),
        ("p3o", {"settings": {"pull": 0.0, "behavior_kl": "k3"}}, "--behavior-kl k3: does nothing here"),
        ("p3o_2019", {"settings": {"replayed_updates": 0.0, "segments": 7}}, "--segments 7: does nothing here"),
        ("chord", {"settings": {"phi": "one", "width": "fixed"}}, "--width fixed: does nothing here; give --phi mass"),
        (
            "p3o_prior",
            {"settings": {"prior": "mle", "gp_points": 50}},
            "--gp-points 50: does nothing here; give --prior",
        ),
        ("p3o", {"seeds": range(10**9)}, "1,000,000,000 members, of 1,000,000,000 seeds: at most 1,000,000"),
        ("p3o", {"episodes": 10**6, "seeds": [1, 2]}, "--episodes 1000000: 2 members .* at most: --episodes 500000"),
        ("p3o", {"steps": 10**17}, "--steps 100000000000000000: must be at most 2.53"),
        ("p3o", {"settings": {"lag": 10**6}}, "--lag 1000000: must be at most 10,000"),
        ("p3o", {"settings": {"num_envs": 10**9}}, "--num-envs 1000000000: must be at most 1,000,000"),
        ("p3o", {"settings": {"epochs": 10**12}}, "--epochs 1000000000000: must be at most 2,147,483,647"),
        ("p3o", {"settings": {"hidden": (10**8,)}}, "--hidden 100000000: .* of 1 to 16,384 units each"),
    ],
)
def test_what_would_do_nothing_or_fill_the_memory_is_refused(
    agent: str, changes: dict[str, Any], said: str, tmp_path: Path
):
    how: dict[str, Any] = {"settings": {}, "sweep": {}, "seeds": [3], "steps": 8000}
    with pytest.raises(UsageError, match=said):
        run.start(agent, "Pendulum-v1", out=tmp_path / "run", **how | changes)
    assert not (tmp_path / "run").exists()


def test_free_memory_is_known_on_linux():
    if sys.platform == "linux":
        assert 2**20 < (memory.free("cpu") or 0) < 2**50


def test_free_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A limit of 1000 bytes, of which 700 are used, 200 of them by files that are merely cached: 500 are left."""
    files = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 500\ninactive_file 200\nx 3\n"}
    for name, text in files.items():
        assert memory._free_in_container(tmp_path) is None  # one of them is missing
        (tmp_path / name).write_text(text)
    assert memory._free_in_container(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._free_in_container(tmp_path) is None
    monkeypatch.setattr(memory, "_free_in_container", lambda: 500)
    assert memory.free("cpu") == 500


def test_a_compiled_run_where_nothing_can_be_compiled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = start(tmp_path / "run", steps=1024)
    records.write_json(folder / "config.json", records.read_config(folder) | {"compiled": True})
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match=r"run is a compiled run, and no C\+\+ compiler was found; install g\+\+"):
        run.carry_on(folder)
    with pytest.raises(UsageError, match=r"--compile on: no C\+\+ compiler was found"):
        start(tmp_path / "other", compiled="on")


def test_a_run_of_a_version_without_replay_says_so(tmp_path: Path):
    folder = start(tmp_path / "run", steps=1024)
    config = records.read_config(folder)
    del config["config"]["replay"]
    records.write_json(folder / "config.json", config)
    with pytest.raises(UsageError, match="has no 'replay', which p3o has by now"):
        run.carry_on(folder)
