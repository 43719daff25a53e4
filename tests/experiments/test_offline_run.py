"""Data sets as a user meets them: record, audit, train, score, report, and all that can be asked wrongly."""

import contextlib
import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from agents import p3o, p3o_prior
from envs import minari_data, minari_env, minari_write
from envs.minari_write import Episode
from ess_rl import gaussian_process
from ess_rl.errors import UsageError
from ess_rl.population import Population
from ess_rl.replay import Replay
from experiments import (
    __main__,
    collection,
    configurations,
    demonstrations,
    offline_run,
    old_data,
    records,
    run,
    suites,
)
from experiments.datasets import audit, commands, recording
from experiments.studies import offline_to_online

SET = "ess/pendulum/tiny-v0"
QUICK = ["--hidden", "8", "--minibatch", "16", "--compile", "off", "--episodes", "2", "--steps", "40", "--seeds", "2"]


def ess_rl(*words: str | Path) -> tuple[int, str, str]:
    """-> (exit status, what it printed, what it complained of), in this process"""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ess-rl", *map(str, words)])
        try:
            __main__.main()
        except SystemExit as ended:
            status = int(ended.code or 0)
    return status, out.getvalue(), err.getvalue()


def works(*words: str | Path) -> str:
    status, out, err = ess_rl(*words)
    assert status == 0, err
    return out


def refused(*words: str | Path) -> str:
    status, _, err = ess_rl(*words)
    assert status == 2 and len(err.strip().splitlines()) == 1, err
    return err


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A short run of P3O on Pendulum, and a data set of its first checkpoint."""
    folder = tmp_path_factory.mktemp("offline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "sets"))
        patch.chdir(folder)
        small = ["--num-envs", "4", "--rollout", "64", "--epochs", "1", "--minibatch", "64", "--hidden", "8"]
        works(
            "train", "p3o", "--env", "Pendulum-v1", *small, "--steps", "5000", "--checkpoints", "2", "--seeds", "2",
            "--compile", "off", "--episodes", "2", "--out", "source",
        )  # fmt: skip
        record = ["dataset", "record", "source", "--member", "1", "--checkpoint", "100", "--num-envs", "5"]
        said = works(*record, "--steps", "1500", "--id", SET)
        # Five environments, 300 steps each and then to the end of their second episode of 200: 2000 steps.
        assert f"{SET}: 2,000 steps in 10 episodes" in said and "p3o of seed 1 after 3,328 env steps" in said
        yield folder


def test_a_data_set_as_old_replay(place: Path):
    """Offline to online: 2000 steps of data, 2 rollouts of 4 x 64 steps."""
    small = ["--num-envs", "4", "--rollout", "64", "--epochs", "1", "--minibatch", "64", "--hidden", "8"]
    online = ["train", "p3o", *small, "--steps", "1024", "--seeds", "2", "--episodes", "2", "--compile", "off"]
    said = works(*online, "--env", "Pendulum-v1", "--dataset", SET, "--replay", "2", "--out", "online")
    assert f"replay: 128 steps of each environment from {SET}" in said
    assert records.read_config(place / "online")["config"]["replay_from"] == SET
    data = minari_data.load(SET).transitions
    filled = Replay(192, 2, 4, 3, 1, "cpu")
    assert old_data.fill(place / "online", filled, p3o.Config(replay=2, rollout=64, num_envs=4)).tolist() == [0, 0]
    held = filled.latest(128)
    assert torch.equal(held.obs[0, 0, 0], data.obs[0]) and torch.equal(held.next_obs[-1, 1, -1], data.next_obs[-1])
    assert held.version[:, 0, 0].unique().tolist() == [-2, -1] and held.last[63::64].all()
    rows = list(records.metrics(place / "online"))
    assert all(0.0 < share < 1.0 for share in rows[1]["replayed_share"])
    before = (place / "online" / "result.json").read_text()
    (place / "online" / "result.json").unlink()
    works("resume", "online")
    assert json.loads(before)["final_return"] == records.read_json(place / "online" / "result.json")["final_return"]

    wanted = refused(*online, "--env", "Pendulum-v1", "--dataset", SET, "--replay", "8")
    assert "it holds 2,000 steps, and 8 rollouts are 2,048: --replay 7 or less" in wanted
    long = ["--env", "Pendulum-v1", "--dataset", SET, "--replay", "1", "--rollout", "512"]
    assert "1 rollouts are 2,048: give a smaller --rollout or --num-envs" in refused(*online, *long)
    assert "with --replay 0 nothing is replayed" in refused(*online, "--env", "Pendulum-v1", "--dataset", SET)
    other = refused(*online, "--env", "ess/LQR-v0", "--dataset", SET, "--replay", "2")
    assert "its env is Pendulum-v1, that of this run is ess/LQR-v0" in other
    both = refused(*online, "--env", "Pendulum-v1", "--dataset", SET, "--replay-from", "x", "--replay", "2")
    assert "a replay is filled from one of them" in both
    nothing = refused(*online, "--env", "Pendulum-v1", "--dataset", "ess/no-v0", "--replay", "2")
    assert f"is neither a data set on this machine ({SET}) nor a run folder that holds" in nothing


def test_chord_imitates_a_data_set_while_it_acts(place: Path, monkeypatch: pytest.MonkeyPatch):
    """16 iterations, a checkpoint after 13 and at the end; the copy in the folder is all that a resumed run reads."""
    small = ["--num-envs", "4", "--rollout", "64", "--epochs", "1", "--minibatch", "64", "--hidden", "8"]
    words = ["train", "chord", *small, "--steps", "4000", "--seeds", "2", "--episodes", "2", "--compile", "off"]
    here = ["--env", "Pendulum-v1", "--dataset", SET]
    assert f"demonstrations: 2,000 steps of {SET}" in works(*words, *here, "--out", "chord")
    rows = list(records.metrics(place / "chord"))
    # The first iteration learns nothing; at 1 / 16 of training an eighth of the way is gone, after half of it all.
    assert "mu" not in rows[0]
    assert rows[1]["mu"] == pytest.approx([0.05 + 0.85 * 0.5 * (1.0 + math.cos(math.pi / 8))] * 2)
    assert rows[-1]["mu"] == pytest.approx([0.05, 0.05]) and rows[-1]["imitation_loss"][0] != 0.0
    config = records.read_config(place / "chord")
    held = demonstrations.read(place / "chord", config, run.envs.make("Pendulum-v1", 1))
    data = minari_data.load(SET).transitions
    assert torch.equal(held["obs"], data.obs) and torch.equal(held["action"], data.action)
    with monkeypatch.context() as impatient:

        def stop(display: Any, row: records.Record) -> None:
            if row["iteration"] == 14:
                raise KeyboardInterrupt

        impatient.setattr(run.Display, "update", stop)
        assert ess_rl(*words, *here, "--out", "chord-stopped")[0] == 130
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(place / "nothing"))
    works("resume", "chord-stopped")
    ends = [records.checkpoints(place / name)[-1].read_bytes() for name in ("chord", "chord-stopped")]
    assert ends[0] == ends[1]
    assert f"--demonstrations {SET}" in str(configurations.command(config))
    works("train", "ppo", *words[2:], "--env", "Pendulum-v1", "--out", "chord", "--overwrite")
    assert not (place / "chord" / "demonstrations.safetensors").exists()
    monkeypatch.undo()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(place / "sets"))
    monkeypatch.chdir(place)
    assert "chord learns from demonstrations too" in refused(*words, "--env", "Pendulum-v1")
    other = refused(*words, "--env", "ess/LQR-v0", "--dataset", SET)
    assert f"--dataset {SET}: its env is Pendulum-v1, that of this run is ess/LQR-v0" in other
    assert "demonstrations come from one of them" in refused(*words, *here, "--demonstrations", SET)
    assert "no data set 'ess/no-v0'" in refused(*words, "--env", "Pendulum-v1", "--dataset", "ess/no-v0")
    assert "chord acts in an environment" in refused("train", "chord", "--dataset", SET)
    assert "--mu-peak 2: must be from 0 to 1" in refused(*words, *here, "--mu-peak", "2")


def test_a_prior_of_demonstrations(place: Path, monkeypatch: pytest.MonkeyPatch):
    """It is that of the set's steps; a killed run goes on without the set, and does not fit it again."""
    small = ["--num-envs", "4", "--rollout", "64", "--epochs", "1", "--minibatch", "64", "--hidden", "8"]
    words = ["train", "p3o_prior", *small, "--steps", "4000", "--seeds", "1", "--episodes", "1", "--compile", "off"]
    here = ["--env", "Pendulum-v1", "--dataset", SET, "--gp-points", "50"]
    words += ["--checkpoints", "2"]
    works(*words, *here, "--prior-std", "0.1", "0.2", "--out", "prior")
    population, *_ = run.load_run(place / "prior")
    data = minari_data.load(SET).transitions
    kept = torch.linspace(0, 1999, 50, dtype=torch.float64).long()
    expected = gaussian_process.fit(data.obs[kept], data.action[kept])
    for p in range(2):
        for name in ("points", "weights", "half", "length_scale"):
            torch.testing.assert_close(population.state["prior"][name][p], expected[name])
    few = refused(*words, *here[:4], "--gp-points", "2001")
    assert f"--dataset {SET}: a prior 'gp' is fitted to at least 2001 steps, and it holds 2000: --gp-points 2000" in few
    assert "p3o_prior learns from demonstrations too" in refused(*words, "--env", "Pendulum-v1")
    assert "--prior-std 0: must be above 0" in refused(*words, *here, "--prior-std", "0")
    config, folder = records.read_config(place / "prior"), records.checkpoints(place / "prior")
    whole = folder[-1].read_bytes()
    assert len(folder) == 2 and config["iterations"] == 16
    for path in (folder[-1], place / "prior" / "result.json"):
        path.unlink()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(place / "nothing"))
    monkeypatch.setattr(demonstrations, "fitted_prior", None)
    works("resume", "prior")
    assert folder[-1].read_bytes() == whole


def test_networks_of_a_prior_are_their_members_own(place: Path, monkeypatch: pytest.MonkeyPatch):
    """Equal seeds have equal ones. They learn what was done, and disagree about what nobody showed them."""
    monkeypatch.setattr(p3o_prior, "PRIOR", replace(p3o_prior.PRIOR, max_updates=300))
    data = minari_data.load(SET).transitions
    config = p3o_prior.Config(prior="ensemble")
    prior = demonstrations.fitted_prior(config, data.obs, data.action, [3, 5, 3])
    agent = p3o_prior.P3OPrior(config, 3, 1)
    state = Population(agent, [3, 5, 3]).state
    assert tree_map(lambda x: x.shape, prior) == tree_map(lambda x: x.shape, state["prior"])
    assert all(torch.equal(x[0], x[2]) for x in tree_leaves(prior))
    weight = prior["net"]["0"]["weight"]
    assert weight.shape[:2] == (3, 5) and not torch.allclose(weight[0], weight[1])
    mean, variance = vmap(agent.prior, in_dims=(0, None))({**state, "prior": prior}, data.obs)
    assert (mean[0] - data.behavior_mean).square().mean() < 0.02
    far = data.obs * torch.tensor([4.0, 4.0, 3.0])
    _, away = vmap(agent.prior, in_dims=(0, None))({**state, "prior": prior}, far)
    assert away.mean() > 2.0 * variance.mean()


def test_studies_name_the_data_sets_that_they_need(place: Path):
    said = refused("study", "collapsing-prior", "--out", "no")
    assert "collapsing-prior: 1 of 1 data sets are not in" in said
    assert (
        "ess-rl dataset record RUN --id ess/pendulum/demonstrations-v0 --steps 400 --num-envs 2, RUN a finished" in said
    )
    said = refused("study", "offline-to-online", "--out", "no")
    assert "3 of 3 data sets are not in" in said and "--id ess/halfcheetah/medium-v0 --member 1 --checkpoint" in said
    how = "ess-rl dataset record --random Pendulum-v1 --id ess/pendulum/random-v0 --steps 400 --num-envs 2"
    assert refused("study", "offline-to-online", "--quick", "--out", "no").strip().endswith(how)
    assert not (place / "no").exists()


def test_the_return_of_a_data_set_is_the_mean_of_its_episodes(place: Path):
    works(*suites.how_to_record(suites.RANDOM).split()[1:])
    data = minari_data.load(suites.RANDOM)
    assert len(data.transitions.reward) == 400 and len(data.starts) == 2
    found = offline_to_online.returns_of_sets(quick=True)["Pendulum-v1", "data set"]
    assert found.item() == pytest.approx(data.transitions.reward.sum().item() / 2)


def test_a_suite_of_offline_jobs(place: Path, monkeypatch: pytest.MonkeyPatch):
    """Two agents on one small set; given again, nothing is left to do."""
    how: Any = {"dataset": SET, "steps": 20, "seeds": range(2), "settings": {"hidden": (8,), "minibatch": 16}}
    how["options"] = {"episodes": 1, "compiled": "off", "checkpoints": 1}
    jobs = tuple(suites.Job(agent, "Pendulum-v1", **how) for agent in ("awr", "brac"))
    monkeypatch.setitem(suites.SUITES, "tiny", jobs)
    said = works("benchmark", "tiny", "--out", "suite", "--jobs", "2")
    assert "tiny: 2 jobs, 2 to run" in said and "| awr" in said and "| brac" in said
    assert records.read_json(place / "suite" / "awr-ess-pendulum-tiny-v0" / "result.json")["updates"] == 20
    assert "2 jobs, 0 to run" in works("benchmark", "tiny", "--out", "suite")


def test_several_checkpoints_share_the_steps_of_a_set(place: Path):
    record = ["dataset", "record", "source", "--num-envs", "2", "--steps", "800", "--id", "ess/pendulum/two-v0"]
    said = works(*record, "--checkpoint", "100", "10000")
    assert "800 steps in 4 episodes" in said
    assert "p3o of seed 0 after 3,328 env steps, then p3o of seed 0 after 5,120 env steps" in said
    data = minari_data.load("ess/pendulum/two-v0").transitions
    for steps, part in ((100, slice(0, 400)), (10_000, slice(400, 800))):
        population, *_ = run.load_run(place / "source", steps)
        b = population.policy(data.obs[part].expand(2, -1, -1))
        torch.testing.assert_close(data.behavior_mean[part], b.mean[0], rtol=1e-4, atol=1e-5)


def test_what_acted_is_what_was_recorded(place: Path):
    """The means are those of the checkpoint's policy at the recorded observations, and the actions are drawn there."""
    data = minari_data.load(SET)
    population, _, _, path = run.load_run(place / "source", 100)
    assert path.stem == "000003328" and data.recorded_behavior and data.references == (-1205.0, -178.3)
    b = population.policy(data.transitions.obs.expand(2, -1, -1))
    torch.testing.assert_close(data.transitions.behavior_mean, b.mean[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(data.transitions.behavior_log_std, b.log_std[1])
    z = (data.transitions.action - b.mean[1]) / torch.exp(b.log_std[1])
    assert abs(z.mean().item()) < 0.1 and abs(z.std().item() - 1.0) < 0.1
    again = [list(recording.roll_out(run.envs.make("Pendulum-v1", 2), lambda obs: _zero(obs), 10, 3)) for _ in range(2)]
    assert all((x.obs == y.obs).all() and (x.action == y.action).all() for x, y in zip(*again, strict=True))
    assert [len(one.reward) for one in again[0]] == [200, 200]


def _zero(obs: torch.Tensor) -> Any:
    return recording.Gaussian(torch.zeros(len(obs), 1), torch.zeros(len(obs), 1))


def test_record_audit_train_score_report(place: Path):
    assert SET in works("dataset", "list") and "behavior: recorded" in works("dataset", "show", SET)
    audit = works("dataset", "audit", SET, "--model-updates", "20")
    assert "2,000 steps in 10 episodes of 200 to 200 steps" in audit and "looks wrong: nothing" in audit
    assert "(0, 1 for what acted)" in audit and "| floor" in audit
    for agent in ("awac", "p3o_offline"):
        said = works("train", agent, "--dataset", SET, *QUICK, "--checkpoints", "2", "--out", f"runs/{agent}")
        assert "2 members, 40 updates each" in said and "mean normalized score" in said
    folder = place / "runs" / "p3o_offline"
    result = json.loads((folder / "result.json").read_text())
    assert result["updates"] == 40 and result["dataset"] == SET and result["env"] == "Pendulum-v1"
    # (R + 1205) / (-178.3 + 1205)
    expected = [(x + 1205.0) / 1026.7 for x in result["final_return"]]
    assert result["normalized_score"] == pytest.approx(expected)
    rows = list(records.metrics(folder))
    assert [row["updates"] for row in rows] == list(range(1, 41))
    assert [row["iteration"] for row in rows if row["episodes"][0]] == [20, 40]
    assert [path.stem for path in records.checkpoints(folder)] == ["000000020", "000000040"]
    assert {"ess", "behavior_kl", "capped_fraction"} <= rows[-1].keys() and (folder / "curve.png").exists()
    for score in result["final_return"]:
        assert f"{score:.1f}" in works("evaluate", folder, "--episodes", "2")
    score = works("dataset", "score", SET, "runs/awac", "runs/p3o_offline", "source")
    assert f"{expected[0] / 2 + expected[1] / 2:.3f}" in score and "acting" in score
    assert f"Pendulum-v1 from {SET}" in works("compare", "runs/awac", "runs/p3o_offline", "--out", "both.png")
    assert "2 finished runs, 2 agents, 1 env, 4 seeds trained, 0 problems" in works("report", "runs")
    text = (place / "runs" / "report.md").read_text()
    assert f"Over 1 task, 40 updates\n\nPendulum-v1 from {SET} (torch)" in text and "ref_min_score" in text
    assert f"{SET}\n" in (place / "runs" / "scores.csv").read_text()
    works("publish", folder, place / "published")
    assert (place / "published" / "curves.csv").read_text().startswith("updates,member,return")
    command = configurations.command(records.read_config(folder))
    assert command is not None and f"train p3o_offline --dataset {SET}" in command and "--checkpoints 2" in command


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(place: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["train", "iql", "--dataset", SET, *QUICK, "--checkpoints", "4", "--out"]
    works(*words, "whole")
    with monkeypatch.context() as impatient:

        def stop(display: Any, row: records.Record) -> None:
            if row["iteration"] == 27:  # seven after the checkpoint of 20
                raise KeyboardInterrupt

        impatient.setattr(run.Display, "update", stop)
        assert ess_rl(*words, "stopped")[0] == 130
    works("resume", "stopped")
    ends = [records.checkpoints(place / name)[-1].read_bytes() for name in ("whole", "stopped")]
    assert ends[0] == ends[1]
    results = [records.read_json(place / name / "result.json") for name in ("whole", "stopped")]
    assert results[0]["final_return"] == results[1]["final_return"]
    mine, other = (list(records.metrics(place / name)) for name in ("whole", "stopped"))
    assert [row | {"seconds": 0} for row in mine] == [row | {"seconds": 0} for row in other]


def test_a_sweep_is_a_population(place: Path):
    works("train", "bc", "--dataset", SET, *QUICK, "--learning-rate", "1e-3", "1e-4", "--out", "sweep")
    config = records.read_config(place / "sweep")
    assert config["seeds"] == [0, 1, 0, 1] and config["sweep"] == {"learning_rate": [1e-3, 1e-3, 1e-4, 1e-4]}
    assert config["behavior"] == "recorded"


def test_a_random_policy_is_recorded_too(place: Path):
    said = works("dataset", "record", "--random", "ess/LQR-v0", "--id", "ess/lqr/random-v0", "--steps", "400")
    assert "3,200 steps in 16 episodes" in said and "no ref_max_score" in said
    data = minari_data.load("ess/lqr/random-v0")
    assert (data.transitions.behavior_mean == 0.0).all() and data.references is None
    works("train", "td3_bc", "--dataset", "ess/lqr/random-v0", *QUICK, "--out", "lqr")
    assert records.read_json(place / "lqr" / "result.json")["normalized_score"] is None
    assert "no normalized score" in refused("dataset", "score", "ess/lqr/random-v0", "lqr")
    config = records.read_config(place / "lqr")
    records.write_json(place / "lqr" / "config.json", config | {"env_options": {"max_episode_steps": 50}})
    said = refused("dataset", "score", SET, "lqr")
    assert "lqr was evaluated in ess/LQR-v0 with {'max_episode_steps': 50}" in said


def test_what_does_not_fit_is_refused_in_one_line(place: Path):
    train = ["train", "iql", "--dataset", SET, *QUICK, "--out", "no"]
    assert "iql learns from a data set: give --dataset ID, not --env" in refused("train", "iql", "--env", "Pendulum-v1")
    assert "p3o acts in an environment: give --env ID" in refused("train", "p3o", f"--dataset={SET}")
    missing = refused("train", "bc", "--dataset", "ess/nothing-v0")
    assert "no data set 'ess/nothing-v0'" in missing and "dataset record RUN --id ess/nothing-v0'" in missing
    assert "--dataset D4RL/no/set-v0 --download'" in refused("train", "bc", "--dataset", "D4RL/no/set-v0")
    assert "--eval-env" in refused(*train, "--eval-env", "Hopper-v5")
    assert "--expectile 1: must be between 0 and 1" in refused(*train, "--expectile", "1")
    assert "--log-std -5: must be above --log-std-floor, -4" in refused(*train, "--log-std", "-1", "-5")
    p3o_offline = ["train", "p3o_offline", "--dataset", SET, *QUICK, "--out", "no", "--pull", "0"]
    assert "--behavior-kl reverse: does nothing here" in refused(*p3o_offline, "--behavior-kl", "reverse")
    assert "--minibatch 1" in refused(*train, "--minibatch", "1")
    assert "at least 1" in refused(*train, "--seeds", "0")
    assert "must be at most 2^53" in refused(*train, "--seeds", "9" * 20)
    assert "at most 1,000,000 in one run" in refused(*train, "--seeds", "1000001")
    assert "fewer seeds or values of a sweep, or smaller --hidden" in refused(
        *train, "--seeds", "1000000", "--episodes", "1", "--hidden", "1024"
    )
    assert "exists already" in refused("dataset", "record", "source", "--id", SET)
    assert "not both" in refused("dataset", "record", "source", "--random", "Pendulum-v1", "--id", "a-v0")
    assert "members 0 to 1" in refused("dataset", "record", "source", "--member", "2", "--id", "a-v0")
    assert "not a name" in refused("dataset", "record", "source", "--id", "../a")
    record = ["dataset", "record", "source", "--id", "a-v0"]
    assert "--temperature nan: must be a finite number above 0" in refused(*record, "--temperature", "nan")
    assert "must be finite numbers" in refused(*record, "--ref-max", "inf")
    assert "they must differ, or there is no normalized score" in refused(*record, "--ref-min", "3", "--ref-max", "3")
    assert "give different numbers from 0 to 2^63" in refused(*record, "--seed", str(10**20))
    td3_bc = ["train", "td3_bc", "--dataset", SET, *QUICK, "--out", "no"]
    assert "--policy-delay 0: must be above 0" in refused(*td3_bc, "--policy-delay", "0")
    assert "--noise-clip -1: must be 0 or more" in refused(*td3_bc, "--noise-clip", "-1")
    assert "did you mean record" in refused("dataset", "recrod")
    assert not (place / "no").exists() and not (place / "sets" / "a-v0").exists()
    listed = works("agents")
    assert "p3o_offline" in listed and "--dataset ID" in listed and "import-d4rl" in works("dataset")
    assert set(commands.COMMANDS) == {"list", "show", "audit", "record", "score", "import-d4rl"}


def test_a_task_of_ones_own_is_recorded_and_replayed(place: Path):
    """MODULE:ID, as Gymnasium names what a module registers."""
    (place / "ones_own.py").write_text(
        "from gymnasium import register\nfrom gymnasium.envs.classic_control.pendulum import PendulumEnv\n"
        "register('own/Swing-v0', PendulumEnv, max_episode_steps=50)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        task, record = "ones_own:own/Swing-v0", ["dataset", "record", "--steps", "200", "--num-envs", "2"]
        assert "200 steps in 4 episodes" in works(*record, "--random", task, "--id", "own/swing-v0")
        assert minari_env.id_in(minari_env.spec_text(minari_data.metadata_of("own/swing-v0"))) == "own/Swing-v0"
        small = ["--num-envs", "2", "--rollout", "64", "--epochs", "1", "--minibatch", "64", "--hidden", "8"]
        online = ["--env", task, "--dataset", "own/swing-v0", "--replay", "1", "--compile", "off", "--steps", "256"]
        works("train", "p3o", *online, *small, "--episodes", "1", "--out", "swing")
        said = works("train", "bc", "--dataset", "own/swing-v0", "--eval-env", task, *QUICK, "--out", "swing-bc")
        assert "mean normalized score" not in said  # without --ref-max there is none
        assert refused(*record, "--random", task, "--id", "own/b-v0", "--member", "1").startswith(
            "ess-rl: --random ENV: it has no --member"
        )


def test_references_of_an_imported_file_must_be_two(place: Path):
    words = ["dataset", "import-d4rl", "no.hdf5", "--id", "a/b-v0", "--env", "Pendulum-v1", "--ref-min", "3"]
    assert "they must differ, or there is no normalized score" in refused(*words, "--ref-max", "3")
    assert "must be finite numbers" in refused(*words, "--ref-max", "nan")


def test_a_task_without_a_time_limit_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch):
    endless = minari_env.Task("Pendulum-v1", {"max_episode_steps": -1})
    monkeypatch.setattr(minari_env, "task_of", lambda *_, **__: endless)
    with pytest.raises(UsageError, match="is of a Pendulum-v1 without a time limit: choose another --eval-env"):
        offline_run.task_of(SET, eval_env=None, trust=False, download=False, backend="torch")


def test_a_run_that_lacks_a_field_is_not_taken_up_with_todays_default(place: Path):
    folder = offline_run.start(
        "td3_bc", SET, out=place / "lacks", settings={"hidden": (8,)}, sweep={}, seeds=[0], steps=10, compiled="off"
    )
    config = records.read_config(folder)
    del config["config"]["alpha"]
    records.write_json(folder / "config.json", config)
    assert "has no 'alpha', which td3_bc has by now" in refused("resume", folder)


def test_an_audit_is_of_all_policies_of_a_set(monkeypatch: pytest.MonkeyPatch):
    """20 episodes of 100 steps: half of the steps are every second episode."""
    monkeypatch.setattr(audit, "_SAMPLES", 1000)
    chosen = audit._some_episodes(torch.arange(0, 2000, 100), 2000)
    assert chosen.tolist() == [step for step in range(2000) if step // 100 % 2 == 0]
    assert len(audit._some_episodes(torch.tensor([0, 3000]), 6000)) == 3000  # long ones: the first


def test_an_audit_sees_an_observation_that_never_changes(place: Path):
    data = minari_data.load(SET)
    still = data.transitions.obs.clone()
    still[:, 2] = 0.1  # whose standard deviation, as float32 sums it, is not zero
    data = replace(data, transitions=replace(data.transitions, obs=still))
    assert "observations that never change: 1" in audit.audit(data, 1)


def test_a_set_of_a_task_with_options_keeps_them(place: Path):
    """g: gravity, on another planet than the one that is registered; 100 steps an episode, not 200."""
    other = {"g": 1.0, "max_episode_steps": 100}
    data = minari_data.load(SET).transitions
    obs = np.concatenate([data.obs[:100], data.next_obs[99:100]])
    never, cut = np.zeros(100, bool), np.arange(100) == 99
    what = Episode(
        obs, data.action[:100].numpy(), data.reward[:100].numpy(), never, cut, data.behavior_mean[:100].numpy(),
        data.behavior_log_std[:100].numpy(),
    )  # fmt: skip
    minari_write.write(
        "ess/moon-v0", "Pendulum-v1", [what], {"ref_min_score": 0.0, "ref_max_score": 1.0}, options=other
    )
    assert minari_env.task_of(minari_data.load("ess/moon-v0").metadata) == ("Pendulum-v1", other, None)

    small = ["--num-envs", "1", "--rollout", "64", "--epochs", "1", "--minibatch", "64", "--replay", "1"]
    online = ["train", "p3o", "--env", "Pendulum-v1", *small, "--dataset", "ess/moon-v0", "--out", "no"]
    assert "its choice of options is {'g': 1.0}, that of this run is {}" in refused(*online)
    config = {"hidden": (8,), "minibatch": 16}
    how: Any = {"settings": config, "sweep": {}, "seeds": [0], "steps": 10, "episodes": 1}
    there = offline_run.make("bc", "ess/moon-v0", **how)
    assert there["env_options"] == other and there["references"] == (0.0, 1.0)
    (series,) = collection.series(there)
    assert series.task.name == "Pendulum-v1 (g=1.0, max_episode_steps=100) from ess/moon-v0"
    here = offline_run.make("bc", "ess/moon-v0", **how, eval_env="Pendulum-v1")
    assert here["env_options"] == {} and here["references"] is None  # returns of there are no measure of here
    assert "was evaluated in Pendulum-v1, ess/moon-v0 is of Pendulum-v1, or of other options of it" in refused(
        "dataset", "score", "ess/moon-v0", "source"
    )

    # What was learned there and is recorded again, is of there.
    works("train", "bc", "--dataset", "ess/moon-v0", *QUICK, "--out", "moon")
    said = works("dataset", "record", "moon", "--id", "ess/moon-again-v0", "--steps", "150", "--num-envs", "1")
    assert "200 steps in 2 episodes" in said and "give --ref-max for normalized scores" in said
    again = minari_data.load("ess/moon-again-v0")
    assert minari_env.task_of(again.metadata) == ("Pendulum-v1", other, None)


def test_a_set_is_scored_in_its_own_task_alone(place: Path):
    """CartPole's action has another range than InvertedPendulum's; HalfCheetah and Walker2d have the same sizes."""
    config = {"hidden": (8,), "minibatch": 16}
    how: Any = {"settings": config, "sweep": {}, "seeds": [0], "steps": 10, "episodes": 1}
    assert offline_run.make("bc", SET, **how, eval_env="Pendulum-v1")["references"] is not None
    short = ["--steps", "50", "--num-envs", "1"]
    works("dataset", "record", "--random", "InvertedPendulum-v5", "--id", "ess/pole-v0", *short)
    assert "has actions in [-3, 3], ess/CartPole-v0 in [-1, 1]: evaluate in another task" in refused(
        "train", "bc", "--dataset", "ess/pole-v0", "--eval-env", "ess/CartPole-v0", "--out", "no"
    )
    works("dataset", "record", "--random", "HalfCheetah-v5", "--id", "ess/cheetah-v0", *short)
    assert offline_run.make("bc", "ess/cheetah-v0", **how)["references"] is not None
    assert offline_run.make("bc", "ess/cheetah-v0", **how, eval_env="Walker2d-v5")["references"] is None


def test_a_set_that_changed_stops_its_runs(place: Path):
    works("dataset", "record", "--random", "Pendulum-v1", "--id", "ess/moving-v0", "--steps", "200", "--num-envs", "2")
    folder = offline_run.start(
        "bc", "ess/moving-v0", out=place / "moving", settings={"hidden": (8,), "minibatch": 16}, sweep={}, seeds=[0],
        steps=10, compiled="off", episodes=1,
    )  # fmt: skip
    again = ["dataset", "record", "--random", "Pendulum-v1", "--id", "ess/moving-v0", "--steps", "200", "--seed", "1"]
    works(*again, "--num-envs", "2", "--overwrite")
    assert "has changed since the run began" in refused("resume", folder)
