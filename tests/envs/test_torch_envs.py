"""The torch environments: equal to Gymnasium's step by step, right distributions at reset, no host synchronization."""

import math
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

import envs
from envs.torch_vector import TorchVectorEnv


def make_torch(env_id: str, num_envs: int, **options: Any) -> TorchVectorEnv:
    env = envs.make(env_id, num_envs, backend="torch", **options)
    assert isinstance(env, TorchVectorEnv)
    return env


def make_references(env_id: str, states: Tensor) -> list[gymnasium.Env]:
    """Gymnasium's own environments, one for each row of `states` [B, S], set to it."""
    references = []
    for state in states:
        reference = gymnasium.make(env_id)
        reference.reset(seed=0)
        set_state(reference, state)
        references.append(reference)
    return references


def set_state(reference: gymnasium.Env, state: Tensor) -> None:
    reference.unwrapped.state = state.to(torch.float64).numpy().copy()  # type: ignore[attr-defined]


# Exactly representable starts; the last pendulum turns fast, the last car is about to reach the goal.
PENDULUMS = torch.tensor([[math.pi, 0.0], [0.5, -1.0], [-2.0, 0.75], [3.0, 7.5]])
CARS = torch.tensor([[-0.5, 0.0], [-1.1875, -0.0625], [-0.5625, 0.0], [0.4375, 0.03125]])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-2)])
def test_pendulum_equals_gymnasium_over_an_episode(dtype: torch.dtype, tolerance: float) -> None:
    # Measured: no difference at all in float64; 2.6e-3 in float32, which the unstable upright position multiplies.
    env = make_torch("Pendulum-v1", 4, dtype=dtype)
    env.reset(torch.arange(4))
    env.state.copy_(PENDULUMS)
    references = make_references("Pendulum-v1", env.state)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for count in range(1, 201):
        # Multiples of 1/256, so that Gymnasium's own float32 arithmetic on the action is exact.
        action = torch.randint(-320, 321, (4, 1), generator=generator) / 256.0
        before = env.state.clone()
        step = env.step(action)
        for index, reference in enumerate(references):
            obs, reward, terminated, truncated, _ = reference.step(2.0 * action[index].clamp(-1.0, 1.0).numpy())
            worst = max(worst, float(np.abs(step.next_obs[index].numpy() - obs).max()))
            assert float(step.reward[index]) == pytest.approx(float(reward), abs=max(1e-5, 10 * tolerance))
            assert bool(step.terminated[index]) == terminated is False
            assert bool(step.truncated[index]) == truncated == (count == 200)
            if count < 200:
                reached = torch.from_numpy(reference.unwrapped.state)  # type: ignore[attr-defined]
                torch.testing.assert_close(env.state[index].double(), reached, rtol=tolerance, atol=tolerance)
        assert not torch.equal(before, env.state)
    assert worst <= max(tolerance, 1e-6)  # Gymnasium's observation is float32 in any case


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mountain_car_equals_gymnasium_over_an_episode(dtype: torch.dtype) -> None:
    # Gymnasium keeps this state in float32, so float64 agrees no better than float32 over an episode.
    env = make_torch("MountainCarContinuous-v0", 4, dtype=dtype)
    env.reset(torch.arange(4))
    env.state.copy_(CARS)
    references = make_references("MountainCarContinuous-v0", env.state)
    # Full power along the velocity climbs the hill; random actions do not, and run into the clock.
    generator = torch.Generator().manual_seed(0)
    alive = torch.ones(4, dtype=torch.bool)
    ends: list[tuple[int, bool]] = [(0, False)] * 4  # (step, terminated)
    hit_wall = False
    for count in range(1, 1000):
        action = torch.randint(-320, 321, (4, 1), generator=generator) / 256.0
        action[0] = 1.0 if env.state[0, 1] >= 0.0 else -1.0
        step = env.step(action)
        for index in alive.nonzero().flatten().tolist():
            reference = references[index]
            obs, reward, terminated, truncated, _ = reference.step(action[index].clamp(-1.0, 1.0).numpy())
            np.testing.assert_allclose(step.next_obs[index].numpy(), obs, atol=1e-5)  # measured: 1.2e-6
            assert float(step.reward[index]) == pytest.approx(float(reward), abs=1e-5)
            assert (bool(step.terminated[index]), bool(step.truncated[index])) == (terminated, truncated)
            hit_wall |= bool(obs[0] <= np.float32(-1.2) and obs[1] == 0.0)
            if terminated or truncated:
                alive[index] = False
                ends[index] = (count, terminated)
    assert not alive.any()
    assert hit_wall
    assert ends[0][1]
    assert 50 < ends[0][0] < 200
    assert ends[1:] == [(50, True), (999, False), (1, True)]  # the second bounces off the wall, then climbs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("env_id", "low", "high"),
    [("Pendulum-v1", (-7.0, -8.0), (7.0, 8.0)), ("MountainCarContinuous-v0", (-1.2, -0.07), (0.6, 0.07))],
)
def test_one_step_from_any_state_equals_gymnasium(
    env_id: str, low: tuple[float, float], high: tuple[float, float], dtype: torch.dtype
) -> None:
    """Over the whole state space, up to the rounding of float32."""
    count = 1000
    env = make_torch(env_id, count, dtype=dtype)
    env.reset(torch.arange(count))
    fractions = torch.rand(count, 3, generator=torch.Generator().manual_seed(1))
    env.state.copy_(torch.tensor(low) + (torch.tensor(high) - torch.tensor(low)) * fractions[:, :2])
    action = 2.0 * fractions[:, 2:] - 1.0
    [reference] = make_references(env_id, env.state[:1])
    scale = reference.action_space.high  # type: ignore[attr-defined]
    states = env.state.clone()
    step = env.step(action)
    for index in range(count):
        set_state(reference, states[index])
        obs, reward, terminated, _, _ = reference.unwrapped.step(scale * action[index].numpy())
        np.testing.assert_allclose(step.next_obs[index].numpy(), obs, rtol=3e-7, atol=3e-6)
        assert float(step.reward[index]) == pytest.approx(float(reward), rel=1e-6, abs=1e-5)
        assert bool(step.terminated[index]) == terminated
    assert (env_id == "Pendulum-v1") == (not step.terminated.any())


def test_reset_states_are_uniform() -> None:
    theta, omega = make_states("Pendulum-v1").unbind(-1)
    assert_uniform(theta, -math.pi, math.pi)
    assert_uniform(omega, -1.0, 1.0)
    assert abs(float(torch.corrcoef(torch.stack([theta, omega]))[0, 1])) < 0.05
    position, velocity = make_states("MountainCarContinuous-v0").unbind(-1)
    assert_uniform(position, -0.6, -0.4)
    assert not velocity.any()


def make_states(env_id: str) -> Tensor:
    """[8192, S]: the second episode of 8192 environments, after one step under a clock of one step."""
    env = make_torch(env_id, 8192, max_episode_steps=1)
    env.reset(torch.arange(8192))
    assert env.step(torch.zeros(8192, 1)).truncated.all()
    return env.state


def assert_uniform(sample: Tensor, low: float, high: float) -> None:
    """By its range and its quartiles; the standard error of a quartile is 0.005 of the range."""
    assert float(sample.min()) >= low
    assert float(sample.max()) <= high
    fractions = (sample - low) / (high - low)
    quartiles = torch.quantile(fractions, torch.tensor([0.001, 0.25, 0.5, 0.75, 0.999]))
    torch.testing.assert_close(quartiles, torch.tensor([0.001, 0.25, 0.5, 0.75, 0.999]), rtol=0.0, atol=0.025)


@pytest.mark.parametrize("env_id", [env_id for env_id, entry in envs.ENVS.items() if entry.dynamics is not None])
class TestOnADevice:
    def test_no_host_synchronization(self, env_id: str) -> None:
        """Tensors on the meta device have no values, so any look at one (`.item()`, `if tensor`) raises."""
        env = make_torch(env_id, 4, device="meta")
        env.reset(torch.zeros(4, dtype=torch.int64, device="meta"))
        step = env.step(torch.zeros(4, env.act_dim, device="meta"))
        assert step.obs.shape == (4, env.obs_dim)
        assert step.obs.device.type == "meta"

    def test_state_keeps_its_address(self, env_id: str) -> None:
        env = make_torch(env_id, 4)
        buffers = {name: value.data_ptr() for name, value in vars(env).items() if isinstance(value, Tensor)}
        env.reset(torch.arange(4))
        env.step(torch.zeros(4, env.act_dim))
        assert len(buffers) == 4
        assert buffers == {name: value.data_ptr() for name, value in vars(env).items() if isinstance(value, Tensor)}

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_cuda_graph_replays_the_episode(self, env_id: str) -> None:
        device = torch.device("cuda")
        seeds = torch.arange(8, device=device)
        eager, captured = (make_torch(env_id, 8, device=device, max_episode_steps=5) for _ in range(2))
        action = torch.full((8, eager.act_dim), 0.5, device=device)
        captured.reset(seeds)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            captured.step(action)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = captured.step(action)
        eager.reset(seeds)
        captured.reset(seeds)
        for _ in range(12):
            graph.replay()
            torch.testing.assert_close(tuple(replayed), tuple(eager.step(action)), rtol=0.0, atol=0.0)


def test_constants_can_be_changed() -> None:
    env = make_torch("Pendulum-v1", 1, gravity=0.0)
    env.reset(torch.arange(1))
    env.state.copy_(torch.tensor([[1.0, 0.0]]))
    env.step(torch.zeros(1, 1))
    assert env.state.tolist() == [[1.0, 0.0]]
