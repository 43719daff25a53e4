"""Jobs on a Ray cluster of this machine, one of which loses its worker."""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ess_rl.errors import UsageError
from experiments import benchmark, on_ray, records, run
from experiments.suites import SMALL, Job

OPTIONS: dict[str, Any] = {"episodes": 2, "compiled": "off", "checkpoints": 8}
LONG = Job("p3o", "Pendulum-v1", steps=6_000, seeds=range(2), settings=SMALL, options=OPTIONS)
BROKEN = Job("ppo", "Pendulum-v1", steps=1_024, seeds=range(2), settings=SMALL, options=OPTIONS)
IMPOSSIBLE = Job("p3o", "NoSuchTask-v0", steps=1_024, seeds=range(2), settings=SMALL)


def planned(job: Job) -> dict[str, Any]:
    return {"settings": job.settings, "sweep": job.sweep, "seeds": job.seeds, "steps": job.steps, **job.options}


class Unlucky(on_ray.Ray):
    """A cluster on which the worker of LONG is killed once the job's first checkpoint has come."""

    killed: Any = None

    def ended(self) -> list[tuple[Job, str | None]]:
        over = super().ended()
        if not self.killed and records.checkpoints(self._out / LONG.name):
            with pytest.raises(UsageError, match="another process is training"), records.alone(self._out / LONG.name):
                pass  # the folder on this machine is the job's until it has ended
            self.killed = Unlucky.killed = self._running[LONG.name].last.pid
            os.kill(self.killed, signal.SIGKILL)
        return over


def test_a_job_whose_worker_is_killed_goes_on_and_a_failed_one_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    out = tmp_path / "out"
    run.start(BROKEN.agent, BROKEN.env, out=out / BROKEN.name, **planned(BROKEN))
    (out / BROKEN.name / "checkpoints").mkdir()
    (out / BROKEN.name / "checkpoints" / "000000256.safetensors").write_bytes(b"cut short")
    on = partial(Unlucky, address="local", cpus=1, every=0.2)
    failed = benchmark.run_jobs("unlucky", (LONG, IMPOSSIBLE, BROKEN), out, on)
    printed = capsys.readouterr().out
    assert "3 jobs, 2 to run" in printed and "ray: 1 node," in printed and f"{LONG.name}: done" in printed
    assert [line.split(": ")[0] for line in failed] == [IMPOSSIBLE.name, BROKEN.name]
    assert "000000256.safetensors: damaged" in failed[1] and "exit status 2" in failed[1]

    assert Unlucky.killed is not None
    log = (out / f"{LONG.name}.log").read_text()
    assert log.count("lost its worker on") == 1
    assert log.count("p3o on Pendulum-v1") == 2  # begun twice, and the second time not from the start
    assert len(list(records.metrics(out / LONG.name))) == 24
    alone = run.carry_on(run.start(LONG.agent, LONG.env, out=tmp_path / "alone", **planned(LONG)))
    result = records.read_json(out / LONG.name / "result.json")
    assert result["final_return"] == alone["final_return"]
    names = {path.name for path in (out / LONG.name).iterdir()}
    assert names == {path.name for path in (tmp_path / "alone").iterdir()}
    for path in records.checkpoints(tmp_path / "alone"):
        assert (out / LONG.name / "checkpoints" / path.name).read_bytes() == path.read_bytes()

    with records.alone(out / LONG.name), records.alone(out / BROKEN.name):  # they are free again
        pass
    again = benchmark.run_jobs("unlucky", (LONG,), out, on)  # nothing to run: no cluster is asked
    assert again == [] and "1 jobs, 0 to run" in capsys.readouterr().out


def test_what_keeps_a_cluster_from_being_used_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "ray", None)
        with pytest.raises(UsageError, match=r"--on ray needs Ray: pip install -e '.\[ray\]'"):
            on_ray.Ray(tmp_path)
    monkeypatch.setattr(on_ray.importlib, "import_module", lambda name: None)  # it is not asked
    with pytest.raises(UsageError, match=r"--address 127.0.0.1:1: cannot be reached \(Connection refused\)"):
        on_ray.Ray(tmp_path, address="127.0.0.1:1")
    with pytest.raises(UsageError, match="--address ray://head:10001: give HOST:PORT"):
        on_ray.Ray(tmp_path, address="ray://head:10001")
    with pytest.raises(UsageError, match="--cpus 0: must be at least 1"):
        on_ray.Ray(tmp_path, cpus=0)
