"""Data of an older run: what is saved is what is replayed, what does not fit is refused, and a run goes on from it."""

import math
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import envs
from ess_rl import checkpoint
from ess_rl.errors import UsageError
from ess_rl.replay import Replay
from ess_rl.transitions import Transitions
from experiments import memory, old_data, records, run
from experiments.records import Record

SMALL = {"num_envs": 4, "rollout": 64, "epochs": 1, "minibatch": 64, "hidden": (8,)}


def start(out: Path, env: str = "Pendulum-v1", settings: dict[str, Any] | None = None, **changes: Any) -> Path:
    options: dict[str, Any] = {"seeds": [3, 8], "sweep": {}, "steps": 1024, "episodes": 2, "compiled": "off"}
    return run.start("p3o", env, out=out, settings={**SMALL, **(settings or {})}, **options | changes)


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two members, four iterations of 4 x 64 steps, of which the last three are kept."""
    folder = start(tmp_path_factory.mktemp("older") / "run", save_replay=3)
    run.carry_on(folder)
    return folder


def test_what_was_saved_fills_the_replay(tmp_path: Path):
    """Two members of the older run, three of the younger; rollouts of 2 steps there, of 3 here."""
    ring = Replay(8, 2, 1, 3, 1, "cpu")
    for iteration in range(5):
        new = Transitions.empty((2, 2, 1), 3, 1, torch.device("cpu"))
        new.version.fill_(iteration)
        new.reward[:] = torch.arange(2)[None, :, None] + 10.0 * (2 * iteration + torch.arange(2))[:, None, None]
        new.behavior_log_std.fill_(-1.0)
        if iteration == 4:
            new.behavior_log_std[1, 1] = -20.0
        ring.add(new)
    env = envs.make("Pendulum-v1", 1)
    config: Record = {"env": "Pendulum-v1", "seeds": [0, 1], "iterations": 5, "save_replay": 4}
    config["config"] = {"rollout": 2, "num_envs": 1}
    old_data.save(tmp_path, old_data.last(ring, config), env, config)
    (tmp_path / "run").mkdir()
    young: Any = SimpleNamespace(replay=2, rollout=3, num_envs=1)
    assert old_data.check(str(tmp_path), env, young) == (tmp_path / "replay.safetensors").stat().st_size
    old_data.copy(str(tmp_path), tmp_path / "run", young)
    filled = Replay(9, 3, 1, 3, 1, "cpu")
    raised = old_data.fill(tmp_path / "run", filled, young)
    # Eight steps were kept, the last six of them are two rollouts: steps 4 to 9, of iterations 2, 3 and 4 of five.
    assert filled.size == 6
    held = filled.latest(6)
    assert held.reward[:, :, 0].T.tolist() == [
        [40, 50, 60, 70, 80, 90],
        [41, 51, 61, 71, 81, 91],
        [40, 50, 60, 70, 80, 90],
    ]
    assert held.version[:, 0, 0].tolist() == [-3, -3, -2, -2, -1, -1]
    assert raised.tolist() == [0, 1, 0]
    assert held.behavior_log_std.min().item() == pytest.approx(math.log(1e-3))
    assert "1 behavior standard deviations below 0.001 were raised" in old_data.describe("old", 6, 1)


def test_a_data_set_cut_to_rollouts_by_hand():
    """Ten steps to two rollouts of two steps of two environments: stretches from 0, 2 (of 2.67), 5 (5.33) and 8."""
    data = Transitions.empty((10,), 3, 1, torch.device("cpu"))
    data.reward[:] = torch.arange(10)
    data.terminated[6] = True
    cut = old_data.as_rollouts(data, 2, 2, 2)
    assert cut["reward"][:, 0].tolist() == [[0, 2], [1, 3], [5, 8], [6, 9]]
    assert cut["truncated"][:, 0].tolist() == [[False, False], [True, True], [False, False], [False, True]]
    assert cut["version"][:, 0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert cut["obs"].shape == (4, 1, 2, 3) and not data.truncated.any()


def test_a_run_learns_from_an_older_one(older: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    kept, info = checkpoint.info(older / "replay.safetensors"), records.read_config(older)
    assert kept["steps"] == 192 and kept["iterations"] == info["iterations"] == 4
    folder = start(tmp_path / "run", settings={"replay": 2, "replay_from": str(older)})
    run.carry_on(folder)
    assert f"replay: 128 steps of each environment from {older}" in capsys.readouterr().out
    rows = list(records.metrics(folder))
    assert rows[0]["behavior_std_raised"] == [0, 0] and "behavior_std_raised" not in rows[1]
    # From its first update on it has two older rollouts: one of its own, and one of the other's.
    assert all(0.0 < share < 1.0 for share in rows[1]["replayed_share"])
    assert all("ess_age_2" in row for row in rows[1:])
    assert all(e < 1.0 - 1e-6 for e in rows[1]["ess_age_2"])


@pytest.mark.parametrize("stop_at", [3, 15])
def test_it_resumes_to_the_same_bits(older: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int):
    """Stopped before its first checkpoint, at iteration 13, and after."""
    how: dict[str, Any] = {"settings": {"replay": 2, "replay_from": str(older)}, "steps": 4000, "save_replay": 4}
    whole, stopped = start(tmp_path / "whole", **how), start(tmp_path / "stopped", **how)
    run.carry_on(whole)
    with monkeypatch.context() as impatient:

        def stop(display: run.Display, row: records.Record) -> None:
            if row["iteration"] == stop_at:
                raise KeyboardInterrupt

        impatient.setattr(run.Display, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            run.carry_on(stopped)
    run.carry_on(stopped)
    for name in ("replay.safetensors", records.checkpoints(whole)[-1].relative_to(whole)):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()
    rows = [[{k: v for k, v in row.items() if k not in ("seconds", "phases")} for row in records.metrics(x)]
            for x in (whole, stopped)]  # fmt: skip
    assert rows[0] == rows[1]


def test_keeping_rollouts_changes_nothing_else(older: Path, tmp_path: Path):
    plain = start(tmp_path / "plain")
    assert run.carry_on(plain)["final_return"] == records.read_json(older / "result.json")["final_return"]
    assert not (plain / "replay.safetensors").exists()


@pytest.mark.parametrize("how", ["cut", "missing"])
def test_the_remedy_for_a_damaged_replay_works(how: str, tmp_path: Path):
    """Eight iterations, a checkpoint after four (an episode's room) and at the end."""
    folder = start(tmp_path / "run", steps=8192, settings={"replay": 1})
    finals = run.carry_on(folder)["final_return"]
    (folder / "result.json").unlink()
    newest = records.checkpoints(folder)[-1]
    beside = records.replay_of(newest)
    beside.write_bytes(beside.read_bytes()[:500]) if how == "cut" else beside.unlink()
    with pytest.raises(UsageError, match=f"remove {newest} to continue from the checkpoint before it"):
        run.carry_on(folder)
    newest.unlink()
    assert run.carry_on(folder)["final_return"] == finals


def test_what_a_replay_was_filled_from_is_recorded_by_its_contents(
    older: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(older.parent)

    def source_of(name: str, older: Path) -> str:
        folder = start(tmp_path / name, settings={"replay": 2, "replay_from": str(older)})
        return records.read_config(folder)["source"]

    other = Path(changed(older, tmp_path / "other", more=1))
    assert source_of("a", older) == source_of("b", Path(older.name)) != source_of("c", other)
    assert {records.read_config(tmp_path / name)["config"]["replay_from"] for name in "ab"} == {older.name}


def changed(older: Path, folder: Path, **info: Any) -> str:
    """A run folder whose rollouts say other things of themselves."""
    folder.mkdir()
    path = older / "replay.safetensors"
    said = checkpoint.info(path)
    like = Transitions.empty((192, 2, 4), 3, 1, torch.device("meta"))
    tree, _ = checkpoint.load(path, {f.name: getattr(like, f.name) for f in fields(like)})
    checkpoint.save(folder / path.name, tree, said | info)
    return str(folder)


def test_data_that_do_not_fit_are_refused(older: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refusal(env: str = "Pendulum-v1", **settings: Any) -> str:
        with pytest.raises(UsageError) as caught:
            start(tmp_path / "young", env, settings={"replay": 2, "replay_from": str(older), **settings})
        assert not (tmp_path / "young").exists()
        return str(caught.value)

    assert "its env is Pendulum-v1, that of this run is ess/LQR-v0" in refusal("ess/LQR-v0")
    assert "its num_envs is 4, that of this run is 8" in refusal(num_envs=8)
    assert "with --replay 0 nothing is replayed" in refusal(replay=0)
    assert "it holds 192 steps of each environment, and a rollout of this run is 256" in refusal(rollout=256)
    assert "nor a run folder that holds replay.safetensors" in refusal(replay_from=str(tmp_path))
    wider = changed(older, tmp_path / "wider", **{"action scale": [[-3.0, 3.0]]})
    assert "its action scale is [[-3.0, 3.0]], that of this run is [[-2.0, 2.0]]" in refusal(replay_from=wider)
    longer = changed(older, tmp_path / "longer", **{"observation size": 5})
    assert "its observation size is 5, that of this run is 3" in refusal(replay_from=longer)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "replay.safetensors").write_bytes((older / "replay.safetensors").read_bytes()[:100])
    assert "damaged" in refusal(replay_from=str(tmp_path / "cut"))
    with pytest.raises(UsageError, match="is the folder of this run"):
        start(older, settings={"replay": 2, "replay_from": str(older)}, overwrite=True)
    assert (older / "replay.safetensors").exists()
    monkeypatch.setattr(memory, "free", lambda device: 2**10)
    assert "the last 3 rollouts of each kept, need at least" in refusal()
    assert "or --replay" in refusal()
