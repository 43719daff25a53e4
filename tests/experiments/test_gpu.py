"""The GPU script, run in small on the CPU: its checks can fail, and it loses nothing that it has measured."""

from pathlib import Path
from typing import Any

import pytest

import agents
import envs
from ess_rl.errors import UsageError
from experiments import records
from experiments.speed import gpu, gpu_checks, subjects


def in_this_process(function: Any, *arguments: Any) -> Any:
    return function(*arguments)


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "apart", in_this_process)
    monkeypatch.setattr(records, "origin", lambda: {"git_commit": "5eed", "versions": {"torch": "2.8"}})


def measure(out: Path, *only: str) -> dict[str, Any]:
    return gpu.measure(out, device="cpu", seconds=0.05, only=only)["parts"]


def test_the_checks_pass_where_both_devices_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    some = {"p3o", "chord", "tba_group"}, {"awac", "bc"}
    monkeypatch.setattr(agents, "AGENTS", {name: agents.AGENTS[name] for name in some[0]})
    monkeypatch.setattr(agents, "OFFLINE_AGENTS", {name: agents.OFFLINE_AGENTS[name] for name in some[1]})
    names = ("environments", "the CPU's learning", "the CPU's learning, offline")
    parts = measure(tmp_path / "gpu.json", *names, "nothing waits", "memory")
    for name, of in zip(names, (envs.ENVS, *some), strict=True):
        (found,) = [x for x in parts[name].values() if isinstance(x, dict)]
        assert set(found) <= set(of) and len(found) >= min(len(of), 8)
        assert set(found.values()) == {0.0}, name
    assert parts["nothing waits"]["iterations"] == 5
    assert all(part["passed"] for part in parts.values())


def test_a_part_that_fails_is_kept_as_failed_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def breaks(device: str) -> Any:
        raise RuntimeError("no kernel image is available")

    out, works = tmp_path / "x" / "gpu.json", gpu_checks.environments
    monkeypatch.setattr(gpu_checks, "environments", breaks)
    monkeypatch.setattr(gpu_checks, "nothing_waits", lambda device: {"passed": True, "first": True})
    with pytest.raises(UsageError, match=r"1 of 2 parts failed, see .*gpu\.json: environments"):
        measure(out, "environments", "nothing waits")
    assert "no kernel image" in records.read_json(out)["parts"]["environments"]["error"]
    assert "FAILED  RuntimeError: no kernel image" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"1 of 2 parts failed"):  # the part that failed is not forgotten
        measure(out, "nothing waits")
    monkeypatch.setattr(gpu_checks, "environments", works)
    monkeypatch.setattr(gpu_checks, "nothing_waits", breaks)  # has been measured, and is not called again
    parts = measure(out, "environments", "nothing waits")
    assert parts["environments"]["passed"] and parts["nothing waits"]["first"]


@pytest.mark.parametrize("commit", [None, "5eed+changes"])
def test_what_other_code_may_have_measured_is_not_kept(
    commit: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[int] = []
    monkeypatch.setattr(gpu_checks, "nothing_waits", lambda device: calls.append(0) or {"passed": True})
    monkeypatch.setattr(records, "origin", lambda: {"git_commit": commit, "versions": {"torch": "2.8"}})
    for _ in range(2):
        measure(tmp_path / "gpu.json", "nothing waits")
    assert len(calls) == 2
    with pytest.raises(UsageError, match=r"parts that --only leaves as they are \(nothing waits\)"):
        measure(tmp_path / "gpu.json", "environments")
    assert records.read_json(tmp_path / "gpu.json")["parts"]["nothing waits"]["passed"]
    monkeypatch.setattr(records, "origin", lambda: {"git_commit": commit, "versions": {"torch": "2.9"}})
    with pytest.raises(UsageError, match="is of another versions"):
        measure(tmp_path / "gpu.json", "nothing waits")


def test_the_floor_by_hand():
    """obs_dim 3, act_dim 1, 4 epochs. Weights: policy 3 x 64 + 64 x 64 + 64 x 1 = 4,352, and as many of the value.

    Operations: 2 x 4,352 = 8,704 a pass; one to act, three for targets, two to look back, 4 x 3 x 2 to learn: 30
    passes = 261,120.
    Bytes: a step is 2 x 3 + 3 x 1 + 3 = 12 numbers, written, prepared and read in 4 epochs: 48 x 6 = 288; activations
    2 networks x 2 layers x 64 units, written and read in 4 epochs: 4 x 2 x 4 x 64 x 4 epochs = 8,192. In all 8,480.
    """
    found = gpu.floor(3, 1, 4, (261_120e6, 8_480e3))
    assert (found["flop_per_env_step"], found["bytes_per_env_step"]) == (261_120, 8_480)
    assert found["floor_steps_per_second"] == {"arithmetic": 1e6, "memory": 1e3}
    assert "floor_steps_per_second" not in gpu.floor(3, 1, 4, None)


def test_what_cannot_be_measured_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="--only speed: the parts are 'environments', "):
        measure(tmp_path / "gpu.json", "speed")
    with pytest.raises(UsageError, match="seconds"):
        gpu.measure(tmp_path / "gpu.json", device="cpu", seconds=0.0)
