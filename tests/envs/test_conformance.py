"""The law of `VectorEnv`, over every task and backend that is here.

The clock is set to CLOCK steps, so that episodes end within a short rollout.
"""

import importlib.util
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import envs
from ess_rl.contract import Step, VectorEnv

CLOCK = 12
STEPS = 30
SEEDS = (5, 2**40 + 9, 7)  # a seed may use all 64 bits

CASES = [(env_id, "torch") for env_id, entry in envs.ENVS.items() if entry.dynamics is not None]
GYMNASIUM = ("Pendulum-v1", "MountainCarContinuous-v0", "Hopper-v5", "ess/TwoLinkArm-v0")
CASES += [(env_id, "gymnasium") for env_id in GYMNASIUM]
if importlib.util.find_spec("envpool") is not None:
    CASES += [(env_id, "envpool") for env_id, entry in envs.ENVS.items() if entry.in_envpool]
if importlib.util.find_spec("mujoco_warp") is not None:  # the others in `test_mujoco_warp`, on fewer environments
    CASES += [(env_id, "warp") for env_id in ("HalfCheetah-v5", "Hopper-v5")]

CLOCKS = {"Pendulum-v1": 200, "MountainCarContinuous-v0": 999, "Reacher-v5": 50, "Pusher-v5": 100}  # the others: 1000
CLOCKS |= {"ess/MountainCarContinuousSparse-v0": 999, "ess/CartPole-v0": 500, "ess/CartPoleSwingUp-v0": 500}
CLOCKS |= {"ess/Acrobot-v0": 500, "ess/TwoLinkArm-v0": 100, "ess/TwoLinkArmSparse-v0": 100, "ess/LQR-v0": 200}
NEVER_TERMINATE = {"Pendulum-v1", "HalfCheetah-v5", "HumanoidStandup-v5", "Pusher-v5", "Reacher-v5", "Swimmer-v5"}
NEVER_TERMINATE |= {"ess/TwoLinkArm-v0", "ess/LQR-v0"}


class Rollout(NamedTuple):
    obs: Tensor  # [T, B, obs_dim] acted on
    steps: Step  # of stacked fields [T, B, ...]


def build(env_id: str, backend: str, num_envs: int, **options: Any) -> VectorEnv:
    if backend == "envpool":
        options = {"num_threads": 2} | options
    options = {"max_episode_steps": CLOCK} | options
    return envs.make(env_id, num_envs, backend=backend, **options)


def actions_of(seeds: tuple[int, ...], act_dim: int, steps: int = STEPS) -> Tensor:
    """[T, B, act_dim] in [-1.5, 1.5]; those of an environment depend on its seed alone."""
    columns = [torch.rand(steps, act_dim, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return 3.0 * torch.stack(columns, dim=1) - 1.5


def roll_out(env: VectorEnv, seeds: tuple[int, ...], actions: Tensor) -> Rollout:
    obs, observations, steps = env.reset(torch.tensor(seeds)), [], []
    for action in actions:
        step = env.step(action)
        observations.append(obs)
        steps.append(step)
        obs = step.obs
    return Rollout(torch.stack(observations), Step(*(torch.stack(field) for field in zip(*steps, strict=True))))


@cache
def rollout_of(env_id: str, backend: str, seeds: tuple[int, ...] = SEEDS) -> Rollout:
    env = build(env_id, backend, len(seeds))
    try:
        return roll_out(env, seeds, actions_of(seeds, env.act_dim))
    finally:
        env.close()


def assert_equal(first: Rollout, second: Rollout) -> None:
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)


each_case = pytest.mark.parametrize(("env_id", "backend"), CASES)


@each_case
def test_attributes_shapes_and_types(env_id: str, backend: str) -> None:
    env = envs.make(env_id, 2, backend=backend)
    assert isinstance(env, VectorEnv)
    assert (env.env_id, env.backend, env.num_envs, env.device) == (env_id, backend, 2, torch.device("cpu"))
    assert getattr(env, "max_episode_steps") == CLOCKS.get(env_id, 1000)  # noqa: B009 (not part of the protocol)
    obs = env.reset(torch.tensor([1, 2]))
    step = env.step(torch.zeros(2, env.act_dim))
    env.close()
    assert obs.shape == step.obs.shape == step.next_obs.shape == (2, env.obs_dim)
    assert obs.dtype == step.obs.dtype == step.next_obs.dtype == step.reward.dtype == torch.float32
    assert step.reward.shape == step.terminated.shape == step.truncated.shape == (2,)
    assert step.terminated.dtype == step.truncated.dtype == torch.bool


@each_case
def test_deterministic_under_seeds(env_id: str, backend: str) -> None:
    env = build(env_id, backend, len(SEEDS))
    actions = actions_of(SEEDS, env.act_dim)
    roll_out(env, (3, 1, 4), actions)  # a reset forgets whatever was before
    second = roll_out(env, SEEDS, actions)
    env.close()
    assert_equal(rollout_of(env_id, backend), second)
    first_obs = second.obs[0]
    assert not torch.equal(first_obs[0], first_obs[1])
    assert not torch.equal(first_obs[1], first_obs[2])


@each_case
def test_an_environment_does_not_depend_on_its_neighbors(env_id: str, backend: str) -> None:
    three = rollout_of(env_id, backend)
    two = rollout_of(env_id, backend, (SEEDS[1], 11))  # the same seed at another place, among others
    assert torch.equal(three.obs[:, 1], two.obs[:, 0])
    for of_three, of_two in zip(three.steps, two.steps, strict=True):
        assert torch.equal(of_three[:, 1], of_two[:, 0])


@each_case
def test_next_obs_is_the_following_obs_unless_the_episode_ended(env_id: str, backend: str) -> None:
    obs, steps = rollout_of(env_id, backend)
    ended = steps.terminated | steps.truncated
    goes_on = ~ended
    assert torch.equal(steps.obs[goes_on], steps.next_obs[goes_on])
    assert torch.equal(obs[1:], steps.obs[:-1])
    assert ended.sum() >= 2 * len(SEEDS)
    assert (steps.obs[ended] != steps.next_obs[ended]).any(dim=-1).all()
    starts = torch.cat([obs[0], steps.obs[ended]])
    assert len(torch.unique(starts, dim=0)) == len(starts)  # no two episodes begin alike


@each_case
def test_the_clock_truncates_and_only_the_clock(env_id: str, backend: str) -> None:
    steps = rollout_of(env_id, backend).steps
    assert not (steps.terminated & steps.truncated).any()
    elapsed = torch.zeros(len(SEEDS), dtype=torch.int64)
    for terminated, truncated in zip(steps.terminated, steps.truncated, strict=True):
        elapsed += 1
        assert torch.equal(truncated, (elapsed == CLOCK) & ~terminated)
        elapsed[terminated | truncated] = 0
    if env_id in NEVER_TERMINATE:
        assert not steps.terminated.any()
        assert steps.truncated.any()
    if backend == "torch":
        assert envs.make_torch(env_id, 1).dynamics.terminates == (env_id not in NEVER_TERMINATE)


@pytest.mark.parametrize("backend", ["gymnasium", "envpool", "warp"])
def test_a_task_that_ends_with_its_clock_is_terminated(backend: str) -> None:
    if ("Hopper-v5", backend) not in CASES:
        pytest.skip(f"{backend} is not installed")
    action = torch.tensor([[1.0, -1.0, 1.0]])

    def steps_with_clock(clock: int) -> list[Step]:
        env = build("Hopper-v5", backend, 1, max_episode_steps=clock)
        env.reset(torch.tensor([3]))
        steps = [env.step(action) for _ in range(100)]
        env.close()
        return steps

    fall = next(index for index, step in enumerate(steps_with_clock(1000)) if step.terminated)
    assert 2 < fall < 90
    at_the_clock = steps_with_clock(fall + 1)[fall]
    assert at_the_clock.terminated
    assert not at_the_clock.truncated
    before_it = steps_with_clock(fall)[fall - 1]
    assert before_it.truncated
    assert not before_it.terminated


@each_case
def test_what_was_returned_never_changes(env_id: str, backend: str) -> None:
    env = build(env_id, backend, len(SEEDS))
    returned = [env.reset(torch.tensor(SEEDS))]
    copies = [returned[0].clone()]
    for action in actions_of(SEEDS, env.act_dim):
        given = action.clone()
        step = env.step(action)
        assert torch.equal(action, given)
        returned += step
        copies += [tensor.clone() for tensor in step]
    env.reset(torch.tensor(SEEDS))
    env.close()
    for tensor, copy in zip(returned, copies, strict=True):
        assert torch.equal(tensor, copy)
    # Within one step obs and next_obs may be one tensor; nothing is shared between two steps.
    of_steps = [{tensor.data_ptr() for tensor in returned[i : i + 5]} for i in range(1, len(returned), 5)]
    assert len(set.union(*of_steps)) == sum(len(pointers) for pointers in of_steps)


@each_case
def test_actions_are_clipped_to_one(env_id: str, backend: str) -> None:
    env = build(env_id, backend, 2)
    signs = torch.tensor([[1.0], [-1.0]]).expand(2, env.act_dim).expand(8, 2, env.act_dim)
    clipped, beyond, within = (roll_out(env, (1, 2), size * signs) for size in (1.0, 5.0, 0.5))
    env.close()
    assert_equal(clipped, beyond)
    assert not torch.equal(clipped.steps.reward, within.steps.reward) or not torch.equal(clipped.obs, within.obs)


@each_case
def test_nan_actions_do_not_crash(
    env_id: str, backend: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("nan"))  # MuJoCo writes a log file where it finds a NaN
    env = build(env_id, backend, 2)
    env.reset(torch.tensor([1, 2]))
    env.step(torch.full((2, env.act_dim), float("nan")))
    step = env.step(torch.zeros(2, env.act_dim))
    env.close()
    assert step.obs.shape == (2, env.obs_dim)


@pytest.mark.parametrize("backend", ["torch", "gymnasium", "envpool", "warp"])
def test_seeds_and_actions_of_a_wrong_shape_are_refused(backend: str) -> None:
    """One row for all would be broadcast, or end the process."""
    env_id = "ess/LQR-v0" if backend == "torch" else "Hopper-v5"
    if (env_id, backend) not in CASES:
        pytest.skip(f"{backend} is not installed")
    env = build(env_id, backend, 2)
    for seeds in ([1], [1, 2, 3]):
        with pytest.raises(ValueError, match=rf"seeds have the shape \({len(seeds)},\), 2 environments need \(2,\)"):
            env.reset(torch.tensor(seeds))
    env.reset(torch.tensor([1, 2]))
    for shape in ((1, env.act_dim), (2, env.act_dim + 1)):
        with pytest.raises(ValueError, match="actions have the shape"):
            env.step(torch.zeros(shape))
    assert env.step(torch.zeros(2, env.act_dim)).obs.shape == (2, env.obs_dim)
    env.close()
