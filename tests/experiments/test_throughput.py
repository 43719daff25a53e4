"""What `ess-rl throughput` measures, and that the eager loop beside it is the PPO it claims to be."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import envs
from agents import AGENTS
from agents.ppo import Config
from ess_rl import random
from ess_rl.contract import Step
from ess_rl.errors import LostProcessError, UsageError
from ess_rl.population import Population
from experiments import machine, records
from experiments.speed import eager_loop, subjects, throughput

OBS, ACT, SAMPLES = 5, 2, 40


def test_the_eager_loop_makes_the_update_of_our_ppo():
    config = Config(hidden=(7, 6), minibatch=SAMPLES, clip=0.05)
    population = Population(AGENTS["ppo"].agent(config, OBS, ACT), [3])
    ours = population.state["params"]
    net = eager_loop.ActorCritic(config, OBS, ACT)
    modules: list[Any] = [net.mean, net.value]
    with torch.no_grad():
        for sequential, layers in zip(modules, (ours["policy"]["mean"], ours["value"]), strict=True):
            for i, layer in layers.items():
                sequential[2 * int(i)].weight.copy_(layer["weight"][0].T)
                sequential[2 * int(i)].bias.copy_(layer["bias"][0])
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate, eps=1e-5)

    def draw(purpose: int, *shape: int) -> torch.Tensor:
        return random.normal(torch.tensor(purpose), (SAMPLES, *shape))

    mean, log_std, action = 0.3 * draw(1, ACT), torch.full((SAMPLES, ACT), -0.9), draw(2, ACT)
    shared = {"obs": draw(0, OBS), "action": action, "advantage": draw(3), "value_target": draw(4)}
    data = shared | {"behavior_mean": mean, "behavior_log_std": log_std}
    density = torch.distributions.Normal(mean, log_std.exp()).log_prob(action).sum(-1)
    for _ in range(3):
        population.update({k: x[None] for k, x in data.items()}, torch.arange(SAMPLES)[None])
        eager_loop.update(net, optimizer, config, shared | {"log_prob": density})
    ours = population.state["params"]
    torch.testing.assert_close(net.log_std, ours["policy"]["log_std"][0], rtol=1e-5, atol=1e-6)
    for sequential, layers in zip(modules, (ours["policy"]["mean"], ours["value"]), strict=True):
        for i, layer in layers.items():
            torch.testing.assert_close(sequential[2 * int(i)].weight.T, layer["weight"][0], rtol=1e-4, atol=1e-5)


def test_the_eager_loop_learns(monkeypatch: pytest.MonkeyPatch):
    """InvertedPendulum-v5 ends when the pole falls: the better the policy, the fewer episodes end."""
    env, ended = envs.make("InvertedPendulum-v5", 16), [0]
    inner = env.step

    def step(action: torch.Tensor) -> Step:
        made = inner(action)
        ended[-1] += int(made.terminated.sum())
        return made

    monkeypatch.setattr(env, "step", step)
    progress = eager_loop.train(env, Config(minibatch=256, epochs=4))
    for _ in range(30):
        assert next(progress) == 2048
        ended.append(0)
    assert ended[0] > 5 * ended[-2]


def test_all_subjects_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "available_cores", lambda: 1)  # else peers are measured with several threads as well
    throughput.measure(
        "Pendulum-v1", seeds=(3,), rollout=8, epochs=1, seconds=0.2, compile="off", asynchronous=True, split=2,
        out=tmp_path / "x" / "speed.json",
    )  # fmt: skip
    found = records.read_json(tmp_path / "x" / "speed.json")["subjects"]
    several = ["p3o, 3 seeds, async", "p3o, 3 seeds, split 2"]
    assert list(found) == ["sb3-ppo, 1 seed", "eager loop, 1 seed", "p3o, 3 seeds", *several]
    assert found["sb3-ppo, 1 seed"]["ratio"] == 1.0
    ours = found["p3o, 3 seeds"]
    assert min(ours[name] for name in ("envs_alone", "collection", "learner_alone", "steps_per_second")) > 0
    assert set(ours["profile"]) == {"physics", "policy", "targets", "update"}
    assert ours["bound"] == pytest.approx(1 / (1 / ours["envs_alone"] + 1 / ours["learner_alone"]))
    for name in several:
        assert found[name]["bound"] == ours["bound"]
        assert found[name]["steps_per_second"] > 0
    assert "of the bound" in capsys.readouterr().out


def test_a_killed_subject_is_named_in_one_line():
    with pytest.raises(LostProcessError, match=r"a process that measured a subject is gone .* has the subjects before"):
        subjects.apart(os._exit, 9)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it outlives its command")
def test_a_subject_ends_with_its_command(children_end_with: Callable[..., None]):
    words = "import time; from experiments.speed import subjects; subjects.apart(time.sleep, 300)"
    children_end_with("-c", words)  # the subject, and a tracker


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UsageError, match=r"1,000,000 members of .* GiB are free"):
        throughput.measure("Pendulum-v1", seeds=(1_000_000,))
    with pytest.raises(UsageError, match="--agent tba_group: it needs environments in groups"):
        throughput.measure(agent="tba_group")
    with pytest.raises(UsageError, match="unknown agent 'sac'"):
        throughput.measure(agent="sac")
    with pytest.raises(UsageError, match="iql learns from a data set: give --dataset ID, or choose one of p3o"):
        throughput.measure(agent="iql")
    with pytest.raises(UsageError, match="--split 4: 3 members"):
        throughput.measure("Pendulum-v1", seeds=(1, 3), split=4)
    with pytest.raises(UsageError, match="seconds"):
        throughput.measure(seconds=0)
