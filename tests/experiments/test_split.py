"""Runs whose members are spread over processes."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from ess_rl.errors import LostProcessError, NonFiniteError, UsageError
from experiments import configurations, demonstrations, machine, plan, records, run, training

SETTINGS = {"num_envs": 4, "rollout": 64, "epochs": 1, "minibatch": 64, "hidden": (8,)}
# Where a member's past lies: in the replay; in policies that are still to act; in what its own turns draw.
KINDS: dict[str, dict[str, Any]] = {
    "replay": {"env": "InvertedPendulum-v5", "settings": {**SETTINGS, "replay": 1}, "save_replay": 3},
    "lag": {"settings": {**SETTINGS, "lag": 2, "starts": "staggered"}},
    "turns": {
        "agent": "p3o_2019",
        "settings": {**SETTINGS, "minibatch": 256, "replay": 2, "segments": 8, "warm_up": 1},
    },
}


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch: pytest.MonkeyPatch):
    """As many threads of torch in this process as there will be in each of two others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(machine, "available_cores", lambda: 2)
    yield
    torch.set_num_threads(threads)


def start(out: Path, env: str = "ess/TwoLinkArm-v0", agent: str = "p3o", **changes: Any) -> Path:
    options: dict[str, Any] = {"seeds": [3, 4, 5], "sweep": {"learning_rate": (1e-3, 1e-4)}, "steps": 2500}
    options |= {"settings": SETTINGS, "episodes": 2, "compiled": "off"}
    folder = run.start(agent, env, out=out, **(options | changes))
    # Fresh starts more often than four episodes last: 10 iterations, a checkpoint after each fourth.
    records.write_json(folder / "config.json", records.read_config(folder) | {"reset_every": 4})
    return folder


def outcome(folder: Path) -> tuple[Any, ...]:
    """All of a run but what the clock says."""
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "phases")} for row in records.metrics(folder)]
    state = run.load_run(folder)[0].state
    finals = records.read_json(folder / "result.json")["final_return"]
    return rows, finals, [x.tolist() for x in tree_leaves(state)]


@pytest.mark.parametrize("kind", KINDS)
def test_members_apart_are_what_they_are_together_and_the_loss_of_some_is_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    together, apart = start(tmp_path / "together", **KINDS[kind]), start(tmp_path / "apart", split=2, **KINDS[kind])
    run.carry_on(together)
    save = run._save

    def save_and_kill(*arguments: Any) -> None:
        save(*arguments)
        last = next(child for child in multiprocessing.active_children() if child.name.endswith("members 3 to 5"))
        os.kill(last.pid or 0, signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(run, "_save", save_and_kill)
        with pytest.raises(LostProcessError, match=r"the process of members 3 to 5 .*; 'ess-rl resume RUN' continues"):
            run.carry_on(apart)
    assert len(records.checkpoints(apart)) == 1
    run.carry_on(apart)
    assert outcome(apart) == outcome(together)
    assert not multiprocessing.active_children()
    assert "--split 2" in (configurations.command(records.read_config(apart)) or "")
    if kind == "replay":
        assert (apart / records.REPLAY).read_bytes() == (together / records.REPLAY).read_bytes()
        (apart / records.REPLAY).unlink()
    (apart / "result.json").unlink()
    run.carry_on(apart)  # stopped after its last checkpoint: only the result is missing, and the replay that is kept
    assert outcome(apart) == outcome(together)
    if kind == "replay":
        assert (apart / records.REPLAY).read_bytes() == (together / records.REPLAY).read_bytes()


def test_of_each_member_its_own_part(tmp_path: Path) -> None:
    config = records.read_config(start(tmp_path / "run", split=4))
    shares = [training._of_members(config, share) for share in training.shares_of(6, 4)]
    assert [share["seeds"] for share in shares] == [[3], [4, 5], [3], [4, 5]]
    rates = [share["sweep"]["learning_rate"] for share in shares]
    assert rates == [[1e-3], [1e-3, 1e-3], [1e-4], [1e-4, 1e-4]]


def test_who_diverged_is_said_by_its_number_in_the_run(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", seeds=[3, 4], sweep={"learning_rate": (1e-3, 1e30)}, split=2)
    with pytest.raises(NonFiniteError, match=r"in member [23] \(seed [34]\)"):
        run.carry_on(folder)
    assert not multiprocessing.active_children()


def test_demonstrations_reach_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    config = plan.make("p3o", "Pendulum-v1", settings=SETTINGS, sweep={}, seeds=[1, 2], steps=600, compiled="off")
    shown = {"obs": torch.zeros(7, 3), "action": torch.zeros(7, 1)}
    taken: list[Any] = []
    monkeypatch.setattr(demonstrations, "take_up", lambda shown, population, _: taken.append((shown, population.seeds)))
    monkeypatch.setattr("sys.stdout", None)  # the other process has one of its own

    class ThisProcess:
        def hear(self) -> Any:
            return training._to_numpy((training.parts(config)[0].state, 0, {}, shown))

        def tell(self, answer: Any) -> None:
            self.told = answer

    parent: Any = ThisProcess()
    training._serve(parent, config, 0)
    ((found, seeds),) = taken
    assert seeds == [1, 2]
    assert all(torch.equal(found[name], shown[name]) for name in shown)
    assert parent.told["progress"]["iteration"] == config["iterations"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": 0}, "--split 0: must be at least 1"),
        ({"split": 7}, "--split 7: 6 members, .* --split 6 at most"),
        (
            {"split": 2, **KINDS["turns"], "sweep": {"replayed_updates": [2.0, 0.0]}},
            "--split --replayed-updates 0 and others",
        ),
        ({"split": 2, "asynchronous": True, "settings": {**SETTINGS, "lag": 1}}, "--split --async: .* leave one"),
    ],
)
def test_what_cannot_be_split_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        start(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
