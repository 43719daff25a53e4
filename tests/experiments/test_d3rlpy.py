"""d3rlpy beside our offline agents. What needs it is skipped where it is not installed; the rest is always tested."""

import dataclasses
import importlib.util
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from agents import OFFLINE_AGENTS
from ess_rl import normalizer, offline
from ess_rl.errors import UsageError
from ess_rl.offline import OfflinePopulation
from ess_rl.transitions import Transitions
from experiments import __main__, configurations, machine, offline_run, records
from experiments.peers import by_seed, d3rlpy, sb3
from experiments.peers.d3rlpy import PEERS
from experiments.report import pages, tables
from experiments.speed import offline_throughput

SET = "ess/pendulum/random-v0"
SMALL: dict[str, Any] = {"hidden": (8,), "minibatch": 16}
INSTALLED = importlib.util.find_spec("d3rlpy") is not None
needs_d3rlpy = pytest.mark.skipif(not INSTALLED, reason="d3rlpy is not installed")
OBS, ACT = 3, 2


def data() -> Transitions:
    """Three episodes: two steps and terminated, three and cut by the clock, one and cut."""
    generator = torch.Generator().manual_seed(0)
    obs, next_obs = torch.randn(2, 6, OBS, generator=generator).unbind(0)
    for t in (0, 2, 3):  # within an episode one step leads to the next
        next_obs[t] = obs[t + 1]
    return Transitions(
        obs=obs, next_obs=next_obs, action=1.5 * torch.randn(6, ACT, generator=generator), reward=torch.arange(6.0),
        terminated=torch.tensor([0, 1, 0, 0, 0, 0]).bool(), truncated=torch.tensor([0, 0, 0, 0, 1, 1]).bool(),
        behavior_mean=torch.zeros(6, ACT), behavior_log_std=torch.zeros(6, ACT), version=torch.full((6,), -1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A data set of random actions on Pendulum, 800 steps in 4 episodes."""
    folder = tmp_path_factory.mktemp("peers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "sets"))
        patch.chdir(folder)
        words = "record --random Pendulum-v1 --steps 800 --num-envs 4 --id"
        __main__.dataset([*words.split(), SET])
        yield folder


def start(out: Path, agent: str = "d3rlpy-iql", **changes: Any) -> Path:
    options: dict[str, Any] = {"settings": SMALL, "seeds": range(2), "steps": 20, "episodes": 2}
    return d3rlpy.start(agent, SET, out=out, **options | changes)


def test_an_episode_cut_by_its_clock_has_a_step_more():
    whole = data()
    stats = offline.data_stats(whole, torch.device("cpu"))
    found = list(d3rlpy.episodes(whole, stats))
    assert [(len(x["rewards"]), x["terminated"]) for x in found] == [(2, True), (4, False), (2, False)]
    obs = normalizer.standardize(stats["obs"], whole.obs)
    next_obs = normalizer.standardize(stats["obs"], whole.next_obs)
    assert torch.equal(torch.from_numpy(found[1]["observations"]), torch.cat([obs[2:5], next_obs[4:5]]))
    assert torch.equal(torch.from_numpy(found[0]["observations"]), obs[:2])
    assert found[1]["rewards"].tolist() == [[2.0], [3.0], [4.0], [0.0]] and found[2]["rewards"].tolist() == [[5.0], [0]]
    assert torch.equal(torch.from_numpy(found[0]["actions"]), whole.action[:2].clamp(-1, 1))
    # Returns 0 + 1 = 1, 2 + 3 + 4 = 9 and 5 span 8: a range of 24 makes rewards three times as large.
    scaled = list(d3rlpy.episodes(whole, stats, return_range=24.0))
    assert scaled[1]["rewards"].ravel().tolist() == [6.0, 9.0, 12.0, 0.0]


@pytest.mark.parametrize("name", PEERS)
def test_the_numbers_are_those_of_our_agent(name: str):
    peer = PEERS[name]
    ours = OFFLINE_AGENTS[peer.ours].config()
    assert name == f"d3rlpy-{peer.ours}" and name not in sb3.PEERS
    theirs = dataclasses.asdict(peer.config())
    assert theirs.pop("entropy_temperature", 1.0) == 1.0  # which ours has not, and which is theirs if nothing is said
    assert theirs.pop("first_weights", "theirs") == "theirs"
    assert theirs == {field: getattr(ours, field) for field in theirs}
    # What is missing has no counterpart in d3rlpy.
    missing = {field.name for field in dataclasses.fields(ours)} - theirs.keys()
    assert missing <= {"log_std", "log_std_floor", "weights", "imitates"}  # it imitates what is clipped, and that alone


def test_what_cannot_work_is_refused_before_anything_is_written(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(d3rlpy, "library", lambda: None)
    for message, changes in {
        "--steps 0: must be at least 1": {"steps": 0},
        "--minibatch 0": {"settings": {"minibatch": 0}},
        "--expectile 1: must be between 0 and 1": {"settings": {"expectile": 1.0}},
        "name at least one layer": {"settings": {"hidden": ()}},
        "--entropy-temperature -1: must be 0 or more": {
            "agent": "d3rlpy-awac",
            "settings": {"entropy_temperature": -1.0},
        },
        "seeds are below": {"seeds": [2**32]},
        "no data set 'ess/none-v0'": {"dataset_id": "ess/none-v0"},
        "evaluate in another task with --eval-env": {"eval_env": "ess/LQR-v0"},
    }.items():
        given: dict[str, Any] = {"settings": {}, "seeds": range(2), "steps": 20, "dataset_id": SET, **changes}
        with pytest.raises(UsageError, match=message):
            d3rlpy.start(given.pop("agent", "d3rlpy-iql"), out=place / "no", **given)
    assert not (place / "no").exists()


def test_without_d3rlpy_one_line_says_how_to_install_it(place: Path):
    with mock.patch("importlib.util.find_spec", return_value=None):
        with pytest.raises(UsageError, match=r"d3rlpy is not installed: pip install --no-deps d3rlpy==2\.8\.1 && "):
            start(place / "no")
        with pytest.raises(UsageError, match="d3rlpy is not installed"):
            offline_throughput.measure(SET, "iql")
    with (
        mock.patch("importlib.util.find_spec"),
        mock.patch("importlib.import_module", side_effect=ImportError("No module named 'gym'")),
        pytest.raises(UsageError, match=r"cannot be imported .No module named 'gym'.: pip install"),
    ):
        start(place / "no")
    assert not (place / "no").exists()


def train_nothing(config: records.Record, seed: int, *, trust: bool) -> records.Record:
    """In place of `train_one`: only what a seed leaves behind."""
    return {
        "seed": seed, "updates": config["steps"], "final_return": -700.0 - seed, "training_return": None,
        "training_seconds": 2.0, "peak_memory_mib": 1.0,
    }  # fmt: skip


def test_a_peer_leaves_the_records_of_an_offline_run(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(d3rlpy, "library", lambda: None)
    monkeypatch.setattr(d3rlpy, "train_one", train_nothing)
    monkeypatch.setattr(by_seed, "ProcessPoolExecutor", lambda max_workers, **how: ThreadPoolExecutor(max_workers))
    out = place / "runs" / "peer"
    result = d3rlpy.carry_on(start(out))
    assert result["final_return"] == [-700.0, -701.0] and result["updates"] == 20 and result["dataset"] == SET
    # (R + 1205) / (-178.3 + 1205); 20 updates in 2 s
    assert result["normalized_score"] == pytest.approx([505 / 1026.7, 504 / 1026.7])
    assert result["steps_per_second"] == 10.0
    ours = {"settings": SMALL, "sweep": {}, "seeds": range(2), "steps": 20, "episodes": 2, "compiled": "off"}
    mine = offline_run.start("iql", SET, out=place / "runs" / "iql", **ours)
    assert offline_run.carry_on(mine)["updates"] == 20
    table = tables.comparison([mine, out])
    assert f"| Pendulum-v1 from {SET} | d3rlpy-iql | torch   | 20      | 2     | -700" in table
    assert "2 finished runs, 2 agents, 1 env" in pages.write(place / "runs")
    command = configurations.command(records.read_config(out))
    assert command is not None and command.startswith(f"ess-rl train d3rlpy-iql --dataset {SET} --seeds 2")
    assert "--hidden 8 " in command and "--checkpoints" not in command and "--compile" not in command

    kept = out / "seed-0.json"
    kept.write_text(json.dumps({**records.read_json(kept), "final_return": -7.0}))
    with pytest.raises(UsageError, match="another run, of steps 20, not 30"):
        start(out, steps=30)
    result = d3rlpy.carry_on(start(out, seeds=range(3)))
    assert result["final_return"] == [-7.0, -701.0, -702.0]  # the first two were not trained again


def test_a_set_that_changed_stops_a_peer(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(d3rlpy, "library", lambda: None)
    folder = start(place / "moved")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "source": "another"}))
    with pytest.raises(UsageError, match="has changed since the run began"):
        d3rlpy.carry_on(folder)


def test_the_command_line_takes_a_data_set_and_no_env(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UsageError, match="d3rlpy-awac learns from a data set: give --dataset ID, not --env"):
        __main__.train(["d3rlpy-awac", "--env", "Pendulum-v1"])
    __main__.list_agents([])
    assert "d3rlpy-td3_bc" in capsys.readouterr().out.split("from a data set")[1]
    with pytest.raises(SystemExit):
        __main__.train(["d3rlpy-iql", "--help"])
    said = capsys.readouterr().out
    assert "--inverse-temperature" in said and "--jobs" in said and "--compile" not in said


def test_what_cannot_be_measured_is_refused(place: Path):
    with pytest.raises(UsageError, match="unknown agent 'sac': choose one of bc"):
        __main__.throughput(["--dataset", SET, "--agent", "sac"])
    with pytest.raises(UsageError, match="p3o learns by acting: leave out --dataset, or choose one of bc"):
        __main__.throughput(["--dataset", SET, "--agent", "p3o"])
    with pytest.raises(UsageError, match="d3rlpy is not measured beside awr: give --no-peers"):
        offline_throughput.measure(SET, "awr")
    with pytest.raises(UsageError, match="seconds"):
        offline_throughput.measure(SET, seconds=0)
    with pytest.raises(UsageError, match="--minibatch 0"):
        offline_throughput.measure(SET, minibatch=0)


@pytest.mark.parametrize("beside", [False, pytest.param(True, marks=needs_d3rlpy)])
def test_updates_are_counted(
    place: Path, beside: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    if not beside:  # a process apart only takes time here
        monkeypatch.setattr(offline_throughput, "apart", lambda function, *arguments: function(*arguments))
    out = place / "speed.json"
    how: Any = {"seeds": (3,), "hidden": (8,), "minibatch": 16, "seconds": 0.2, "compile": "off"}
    offline_throughput.measure(SET, "bc", **how, peers=beside, out=out)
    found = records.read_json(out)["subjects"]
    names = ["d3rlpy-bc, 1 seed", f"d3rlpy-bc, {(cores := machine.available_cores())} seeds, a process each"]
    assert list(found) == [*(names[: 1 + (cores > 1)] if beside else []), "bc, 3 seeds"]
    assert next(iter(found.values()))["ratio"] == 1.0 and found["bc, 3 seeds"]["updates_per_second"] > 0
    assert "update alone" in capsys.readouterr().out


@needs_d3rlpy
@pytest.mark.parametrize("name", PEERS)
def test_d3rlpy_draws_the_transitions_that_our_agents_see(name: str):
    peer, whole = PEERS[name], data()
    learner = d3rlpy.Learner(peer, peer.config(**SMALL), whole, 3, 10)
    scale = getattr(peer.config(), "return_range", 0.0) / learner.stats["return_range"].item() or 1.0
    obs = normalizer.standardize(learner.stats["obs"], whole.obs)
    next_obs = normalizer.standardize(learner.stats["obs"], whole.next_obs)
    batch: Any = learner.buffer.sample_transition_batch(200)
    seen = set()
    for k in range(200):
        t = int((obs - torch.from_numpy(batch.observations[k])).square().sum(1).argmin())
        seen.add(t)
        assert torch.equal(torch.from_numpy(batch.actions[k]), whole.action[t].clamp(-1, 1))
        assert batch.rewards[k, 0] == pytest.approx(scale * whole.reward[t].item())
        assert bool(batch.terminals[k, 0]) == bool(whole.terminated[t]) and batch.intervals[k, 0] == 1
        if not whole.terminated[t]:
            assert torch.equal(torch.from_numpy(batch.next_observations[k]), next_obs[t])
    assert seen == set(range(6))
    assert all(math.isfinite(value) for value in learner.update().values())
    assert learner.policy(whole.obs[None]).mean.shape == (1, 6, ACT)


@needs_d3rlpy
def test_d3rlpy_trains_and_is_a_function_of_its_seed(place: Path):
    config = records.read_config(start(place / "true", "d3rlpy-td3_bc"))
    one, same, other = (d3rlpy.train_one(config, seed) for seed in (0, 0, 1))
    assert one["final_return"] == same["final_return"] != other["final_return"] and one["updates"] == 20
    result = d3rlpy.carry_on(place / "true", jobs=2)
    assert result["final_return"] == [one["final_return"], other["final_return"]]


def beside(
    name: str, monkeypatch: pytest.MonkeyPatch, theirs: dict[str, Any] | None = None, **settings: Any
) -> tuple[OfflinePopulation, Any, Any]:
    """-> (a population of one, d3rlpy's algorithm with its first weights, a minibatch for it); no noise anywhere"""
    library = d3rlpy.library()
    peer = PEERS[f"d3rlpy-{name}"]
    numbers = {"hidden": (8, 7), "minibatch": 32, "learning_rate": 3e-3, **settings}
    config = OFFLINE_AGENTS[name].config(**numbers | ({"weights": "softmax"} if name == "awac" else {}))
    whole = data()
    population = OfflinePopulation(OFFLINE_AGENTS[name].agent(config, OBS, ACT), [4])
    population.describe(whole)
    learner = d3rlpy.Learner(peer, peer.config(first_weights="ours", **numbers, **theirs or {}), whole, 4, 10)
    zeros = lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device)  # noqa: E731
    monkeypatch.setattr("torch.distributions.normal._standard_normal", zeros)
    monkeypatch.setattr(offline, "update_noise", lambda seed, numbers, n, act: torch.zeros(len(numbers), 1, n, 2, act))
    index = offline.minibatch_index(population.seed, torch.arange(1), 6, 32)[0, 0]
    scale = getattr(config, "return_range", 0.0) / learner.stats["return_range"] or 1.0
    batch = library.TorchMiniBatch(
        observations=normalizer.standardize(learner.stats["obs"], whole.obs[index]),
        next_observations=normalizer.standardize(learner.stats["obs"], whole.next_obs[index]),
        actions=whole.action[index].clamp(-1, 1), next_actions=torch.zeros(32, ACT),
        rewards=(scale * whole.reward[index])[:, None], returns_to_go=torch.zeros(32, 1),
        terminals=whole.terminated[index].float()[:, None], intervals=torch.ones(32, 1), device="cpu:0",
    )  # fmt: skip
    columns = offline.samples(whole, "cpu") | {"action": whole.action.clamp(-1, 1)}
    population.updates(columns, 0, 1, 10)
    return population, learner.algorithm.impl, batch


def linears(module: Any) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, torch.nn.Linear)]


def assert_gradients(module: Any, moments: dict[str, Any], times: float = 1.0) -> None:
    """Our gradients, of which Adam's first moments hold a tenth after one update."""
    for linear, layer in zip(linears(module), moments.values(), strict=True):
        torch.testing.assert_close(linear.weight.grad.T / times, 10.0 * layer["weight"][0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(linear.bias.grad / times, 10.0 * layer["bias"][0], rtol=1e-3, atol=1e-5)


def gradients_of_critics(modules: Any, moments: Any) -> None:
    for q, layers in zip(modules.q_funcs, moments["q"]["m"].values(), strict=True):
        assert_gradients(q, layers)


@needs_d3rlpy
def test_a_critic_update_and_a_policy_update_of_iql_are_those_of_d3rlpy(monkeypatch: pytest.MonkeyPatch):
    ours, impl, batch = beside("iql", monkeypatch, return_range=10.0)
    moments = ours.state["optimizer"]
    impl.compute_critic_grad(batch)
    gradients_of_critics(impl.modules, moments)
    assert_gradients(impl.modules.value_func, moments["value"]["m"])
    impl.compute_actor_grad(batch)
    assert_gradients(impl.modules.policy, moments["policy"]["m"]["mean"])


@needs_d3rlpy
def test_a_critic_update_and_a_policy_update_of_td3_bc_are_those_of_d3rlpy(monkeypatch: pytest.MonkeyPatch):
    ours, impl, batch = beside("td3_bc", monkeypatch, policy_delay=1)
    monkeypatch.setattr("torch.randn", lambda shape, **how: torch.zeros(shape))  # of the noise on its target
    moments = ours.state["optimizer"]
    impl.compute_critic_grad(batch)
    gradients_of_critics(impl.modules, moments)
    impl.compute_actor_grad(batch)
    assert_gradients(impl.modules.policy, moments["policy"]["m"])


@needs_d3rlpy
def test_awac_is_that_of_d3rlpy_but_for_the_entropy_in_its_critic(monkeypatch: pytest.MonkeyPatch):
    """Its policy loss is a sum over the minibatch. Means are near 0, where tanh changes next to nothing."""
    ours, impl, batch = beside("awac", monkeypatch)
    impl.compute_critic_grad(batch)
    with pytest.raises(AssertionError):
        gradients_of_critics(impl.modules, ours.state["optimizer"])
    goal = impl.compute_target(batch)
    ours, impl, batch = beside("awac", monkeypatch, theirs={"entropy_temperature": 0.0})
    moments = ours.state["optimizer"]
    # Without noise a sample is the mean m: log pi = -sum(log_std + log(2 pi) / 2 + log(1 - tanh(m)^2)), m near 0.
    entropy = goal - impl.compute_target(batch)
    expected = torch.full_like(entropy, ACT * (-1.0 + 0.5 * math.log(2.0 * math.pi)))
    torch.testing.assert_close(entropy, expected, rtol=0.0, atol=0.01)
    impl.compute_critic_grad(batch)
    gradients_of_critics(impl.modules, moments)
    impl.compute_actor_grad(batch)
    assert_gradients(impl.modules.policy, moments["policy"]["m"]["mean"], times=32.0)
