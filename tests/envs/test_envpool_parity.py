"""EnvPool's MuJoCo -v5 tasks against Gymnasium's, from equal states under equal actions.

EnvPool 1.2.5 carries MuJoCo 3.6.0 inside; the tests ran against the Python package mujoco 4.0.0. Measured, in
float64, largest difference of an observation over 5 seeds:

    task                       1 step    10 steps   50 steps   up to 100 steps or the fall
    Hopper                     4e-16     2e-15      7e-15      7e-15
    Walker2d                   3e-14     2e-13      5e-13      8e-13
    Swimmer                    5e-15     5e-15      1e-14      3e-14
    InvertedPendulum           0         0          0          0
    InvertedDoublePendulum     1e-17     1e-17      1e-17      1e-17
    Reacher                    1e-17     1e-17      4e-15      (50 steps)
    HalfCheetah                2e-15     1e-12      7e-8       9e-3    (chaotic)
    Ant                        7e-6      5e-2                          (the two versions of MuJoCo differ, then chaos)
    Humanoid                   2e-6      4e-2                          (as Ant)

Rewards: relative 4e-8 (EnvPool's are float32) wherever observations agree.
"""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import envs
from envs.envpool_vector import EnvPoolVectorEnv
from ess_rl.contract import InTurns

envpool = pytest.importorskip("envpool")

Positions = Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]


def hidden(count: int) -> Positions:
    """The first `count` positions are not observed; no task depends on them, so zero will do."""

    def positions(obs: np.ndarray, position_dim: int, velocity_dim: int) -> tuple[np.ndarray, np.ndarray]:
        full = np.concatenate([np.zeros(count), obs])
        return full[:position_dim], full[position_dim : position_dim + velocity_dim]

    return positions


def double_pendulum(obs: np.ndarray, position_dim: int, velocity_dim: int) -> tuple[np.ndarray, np.ndarray]:
    cart, sine_1, sine_2, cosine_1, cosine_2 = obs[:5]
    return np.array([cart, np.arctan2(sine_1, cosine_1), np.arctan2(sine_2, cosine_2)]), obs[5:8]


def reacher(obs: np.ndarray, position_dim: int, velocity_dim: int) -> tuple[np.ndarray, np.ndarray]:
    cosine_1, cosine_2, sine_1, sine_2, target_x, target_y, velocity_1, velocity_2 = obs[:8]
    angles = [np.arctan2(sine_1, cosine_1), np.arctan2(sine_2, cosine_2)]
    return np.array([*angles, target_x, target_y]), np.array([velocity_1, velocity_2, 0.0, 0.0])


# task: (qpos and qvel from the first observation, steps, tolerance of observations); 50 steps or more in all
PARITY: dict[str, tuple[Positions, int, float]] = {
    "Hopper-v5": (hidden(1), 100, 1e-11),
    "Walker2d-v5": (hidden(1), 100, 1e-11),
    "Swimmer-v5": (hidden(2), 60, 1e-11),
    "InvertedPendulum-v5": (hidden(0), 100, 1e-12),
    "InvertedDoublePendulum-v5": (double_pendulum, 100, 1e-12),
    "Reacher-v5": (reacher, 49, 1e-11),
    "HalfCheetah-v5": (hidden(1), 50, 1e-5),
    "Ant-v5": (hidden(2), 1, 1e-4),
    "Humanoid-v5": (hidden(2), 1, 1e-4),
}


@pytest.mark.parametrize("env_id", PARITY)
def test_envpool_equals_gymnasium_from_equal_states(env_id: str) -> None:
    to_state, steps, tolerance = PARITY[env_id]
    compared = 0
    for seed in range(12):
        pool = envpool.make_gymnasium(env_id, num_envs=1, num_threads=1, env_seed=[seed])
        reference: Any = gymnasium.make(env_id, disable_env_checker=True)
        reference.reset(seed=0)
        obs, _ = pool.reset()
        model = reference.unwrapped.model
        reference.unwrapped.set_state(*to_state(obs[0], model.nq, model.nv))
        random = np.random.default_rng(seed)
        low, high = reference.action_space.low, reference.action_space.high
        for _ in range(steps):
            action = random.uniform(low, high).astype(np.float32)
            pool_obs, pool_reward, pool_terminated, _, _ = pool.step(action[None].astype(np.float64))
            obs, reward, terminated, _, _ = reference.step(action)
            np.testing.assert_allclose(pool_obs[0], obs, rtol=0.0, atol=tolerance)
            np.testing.assert_allclose(pool_reward[0], reward, rtol=1e-6, atol=max(1e-6, tolerance))
            assert bool(pool_terminated[0]) == terminated
            compared += 1
            if terminated:
                break
        reference.close()
        if compared >= 50 and seed >= 1:
            break
    assert compared >= (50 if steps > 1 else 12)


def test_halves_that_take_turns_simulate_what_the_whole_does():
    """Bit for bit: an environment is a function of its seed and its actions, in whatever pool it lies."""
    seeds, generator = torch.arange(6) + 40, torch.Generator().manual_seed(0)
    whole, stepped, sent = (envs.make("Hopper-v5", 6, backend="envpool", halves=two) for two in (False, True, True))
    assert isinstance(sent, InTurns) and len(sent.turns) == 2
    first = [env.reset(seeds) for env in (whole, stepped, sent)]
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])
    ended = 0
    for _ in range(60):
        action = torch.rand(6, 3, generator=generator) * 2.0 - 1.0
        expected = whole.step(action)
        for k, part in enumerate(sent.turns):
            part.send(action[k::2])
        in_turns = [part.receive() for part in sent.turns]
        for name, x, y in zip(expected._fields, expected, stepped.step(action), strict=True):
            assert torch.equal(x, y)
            assert all(torch.equal(x[k::2], getattr(step, name)) for k, step in enumerate(in_turns))
        ended += int(expected.terminated.sum())
    assert ended > 0
    for env in (whole, stepped, sent):
        env.close()


def test_an_odd_number_of_environments_is_one_part():
    env = envs.make("Hopper-v5", 3, backend="envpool")
    assert isinstance(env, InTurns) and len(env.turns) == 1
    env.reset(torch.arange(3))
    assert env.step(torch.zeros(3, 3)).obs.shape == (3, 11)
    env.close()


@pytest.mark.parametrize(
    ("num_envs", "options", "threads"),
    [
        (16, {}, 2),  # 4 CPUs, two halves
        (16, {"halves": False}, 4),
        (16, {"num_threads": 3}, 3),  # asked for: of each half
        (2, {}, 1),  # a half of one environment
    ],
)
def test_the_halves_share_the_cpus(
    monkeypatch: pytest.MonkeyPatch, num_envs: int, options: dict[str, Any], threads: int
) -> None:
    monkeypatch.setattr("envs.envpool_vector._available_cpus", lambda: 4)
    env = envs.make("Hopper-v5", num_envs, backend="envpool", **options)
    assert isinstance(env, EnvPoolVectorEnv)
    env.reset(torch.arange(num_envs))
    assert [part._pool.config["num_threads"] for part in env.turns] == [threads] * len(env.turns)
    env.close()
