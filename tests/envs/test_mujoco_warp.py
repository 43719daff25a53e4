"""mujoco_warp's tasks against Gymnasium's -v5, from equal states under equal actions.

Measured with mujoco 4.0.0, mujoco_warp 4.0.0 and Gymnasium 1.4.0 on a CPU: largest difference, relative for numbers
above 1. "One step" starts from each state of a random course, "run" is not synchronized after its start.

    task                       one step: obs, reward    run: obs, reward
    Hopper                     2e-6, 3e-6               7e-6, 1e-6    until the fall
    Walker2d                   6e-5, 3e-6               4e-5, 3e-6    20 steps
    HalfCheetah                1e-4, 2e-5               3e-3, 4e-4    10 steps (then chaotic: 0.2 after 20, 4 after 30)
    Swimmer                    3e-6, 1e-6               3e-5, 7e-6    50 steps
    InvertedPendulum           2e-6, 0                  3e-7, 0       until the fall
    InvertedDoublePendulum     3e-6, 2e-6               3e-5, 4e-6    until the fall
    Reacher                    9e-7, 1e-7               5e-5, 4e-7    50 steps
    Ant                        4e-3, 7e-6               4e-5, 4e-6    5 steps
    Humanoid                   5e-3, 3e-5               3e-5, 5e-7    10 steps

Of Ant and Humanoid this holds with elliptic friction cones, which both engines are told to use here. The tasks'
own pyramidal cones have directions, and mujoco_warp 4.0 turns those of a capsule that stands within 30 degrees of the
floor's normal, where MuJoCo does not (`plane_capsule` aligns them with the capsule only if it is less steep). In the
tasks as they are a leg that touches the floor so slides otherwise: up to 1.3 rad/s after one step of Ant. Humanoid's
reference also solves with PGS, which mujoco_warp lacks; here it solves with Newton, as the backend does.
"""

import importlib
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

import envs
from envs.mujoco_tasks import TASKS
from ess_rl import random
from ess_rl.contract import VectorEnv
from ess_rl.errors import UsageError

pytest.importorskip(
    "mujoco_warp", reason="mujoco_warp is not installed: pip install -e '.[warp]' in the project's folder"
)

COPIES = 4
STEPS = 50
SEEDS = torch.tensor([5, 2**40 + 9, 7, 8])  # a seed may use all 64 bits
EVERY = torch.ones(COPIES, dtype=torch.bool)
mujoco: Any = importlib.import_module("mujoco")


class Bound(NamedTuple):
    """What the differences may be: about five times what was measured."""

    one_obs: float  # after one step
    one_reward: float
    steps: int  # of the run without synchronization
    run_obs: float  # largest in it
    run_reward: float


BOUNDS: dict[str, Bound] = {
    "Hopper-v5": Bound(1e-5, 2e-5, 50, 2e-5, 1e-5),
    "Walker2d-v5": Bound(5e-4, 3e-5, 20, 1e-3, 2e-5),
    "HalfCheetah-v5": Bound(2e-3, 1e-4, 10, 2e-2, 2e-3),
    "Swimmer-v5": Bound(2e-5, 1e-5, 50, 2e-4, 5e-5),
    "InvertedPendulum-v5": Bound(6e-5, 0.0, 50, 5e-6, 0.0),
    "InvertedDoublePendulum-v5": Bound(1e-4, 7e-5, 50, 2e-4, 3e-5),
    "Reacher-v5": Bound(1e-5, 1e-6, 50, 3e-4, 3e-6),
    "Ant-v5": Bound(2e-2, 5e-5, 5, 3e-4, 3e-5),
    "Humanoid-v5": Bound(3e-2, 1e-4, 10, 1e-3, 1e-4),
}

each_task = pytest.mark.parametrize("env_id", TASKS)


def agree_on_contacts(env_id: str, model: Any) -> None:
    """Friction of equal strength in all directions, and one solver, for the bodies that move in space: see above."""
    if env_id in ("Ant-v5", "Humanoid-v5"):
        model.opt.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
        model.opt.solver, model.opt.iterations = mujoco.mjtSolver.mjSOL_NEWTON, 100


@cache
def warp_env(env_id: str) -> Any:
    env: Any = envs.make(env_id, COPIES, backend="warp")
    agree_on_contacts(env_id, env._model)
    return env


@cache
def references(env_id: str) -> list[Any]:
    made: list[Any] = [gymnasium.make(env_id, disable_env_checker=True).unwrapped for _ in range(COPIES)]
    for env in made:
        agree_on_contacts(env_id, env.model)
    return made


def gap(ours: Tensor, theirs: np.ndarray) -> float:
    """Largest difference, absolute for numbers below 1 and relative for those above."""
    return float((np.abs(ours.numpy() - theirs) / np.maximum(1.0, np.abs(theirs))).max())


def actions_of(act_dim: int, steps: int = STEPS) -> Tensor:
    return 2.0 * torch.rand(steps, COPIES, act_dim, generator=torch.Generator().manual_seed(1)) - 1.0


class Reached(NamedTuple):
    obs: np.ndarray  # [COPIES, obs_dim]
    reward: np.ndarray  # [COPIES]
    terminated: np.ndarray  # [COPIES] bool


def reference_step(env_id: str, action: Tensor) -> Reached:
    def of(env: Any, row: np.ndarray) -> tuple[Any, ...]:
        low, high = env.action_space.low, env.action_space.high
        return env.step((0.5 * (low + high) + 0.5 * (high - low) * row).astype(np.float32))[:3]

    columns = zip(*(of(env, row) for env, row in zip(references(env_id), action.numpy(), strict=True)), strict=True)
    return Reached(*(np.stack(column) for column in columns))


def states(env_id: str) -> tuple[Tensor, Tensor]:
    """The references' (qpos, qvel) [COPIES, ...], which both sides can hold without rounding once placed."""
    rows = [(env.data.qpos, env.data.qvel) for env in references(env_id)]
    qpos, qvel = (torch.tensor(np.stack(column), dtype=torch.float32) for column in zip(*rows, strict=True))
    return qpos, qvel


def place_both(env_id: str, qpos: Tensor, qvel: Tensor) -> Tensor:
    """Put both simulators where an episode would begin at these states. -> obs of mujoco_warp"""
    for env, position, velocity in zip(references(env_id), qpos.double().numpy(), qvel.double().numpy(), strict=True):
        env.set_state(position, velocity)
    return warp_env(env_id)._place(EVERY, qpos, qvel)


def measure(env_id: str) -> tuple[float, Bound, int]:
    """Largest differences: of a first observation; over STEPS; and how many steps of the run were compared."""
    env = warp_env(env_id)
    env.reset(SEEDS)
    first = np.stack([each.reset(seed=seed)[0] for seed, each in enumerate(references(env_id))])
    first_gap = gap(place_both(env_id, *states(env_id)), first)

    # A run, until a copy terminates: from then on it is no longer compared, as mujoco_warp begins anew.
    steps = BOUNDS[env_id].steps
    run_obs = run_reward = 0.0
    compared, alive, visited = 0, np.ones(COPIES, dtype=bool), []
    for action in actions_of(env.act_dim):
        visited.append(states(env_id))
        step, expected = env.step(action), reference_step(env_id, action)
        if len(visited) <= steps and alive.any():
            run_obs = max(run_obs, gap(step.next_obs[alive], expected.obs[alive]))
            run_reward = max(run_reward, gap(step.reward[alive], expected.reward[alive]))
            assert (step.terminated.numpy() == expected.terminated)[alive].all()
            compared += int(alive.sum())
            alive &= ~expected.terminated

    # One step from each state of that run; the references ran on beyond their ends, so fallen bodies are among them.
    one_obs = one_reward = 0.0
    for (qpos, qvel), action in zip(visited, actions_of(env.act_dim).flip(0), strict=True):
        place_both(env_id, qpos, qvel)
        step, expected = env.step(action), reference_step(env_id, action)
        one_obs = max(one_obs, gap(step.next_obs, expected.obs))
        one_reward = max(one_reward, gap(step.reward, expected.reward))
        assert (step.terminated.numpy() == expected.terminated).all()
    return first_gap, Bound(one_obs, one_reward, steps, run_obs, run_reward), compared


@each_task
def test_equals_gymnasium_from_equal_states(env_id: str) -> None:
    first_gap, measured, compared = measure(env_id)
    bound = BOUNDS[env_id]
    assert first_gap < 5e-6
    assert compared >= 3 * COPIES
    assert all(gap <= most for gap, most in zip(measured, bound, strict=True)), measured


@each_task
def test_first_states_are_distributed_as_gymnasiums(env_id: str) -> None:
    """Same range, same mean and same spread of every coordinate, over 500 starts there and 4000 here."""
    env = references(env_id)[0]
    theirs = np.empty((500, env.model.nq + env.model.nv))
    for seed in range(len(theirs)):
        mujoco.mj_resetData(env.model, env.data)
        gymnasium.Env.reset(env, seed=seed)
        env.reset_model()
        theirs[seed] = env.state_vector()
    qpos0 = torch.tensor(env.init_qpos, dtype=torch.float32)
    qvel0 = torch.tensor(env.init_qvel, dtype=torch.float32)
    seed = random.fold_in(torch.tensor(3), torch.arange(4000))
    ours = torch.cat(TASKS[env_id]().first_state(seed, qpos0, qvel0), dim=-1).double().numpy()
    spread = theirs.std(axis=0)
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) <= 0.2 * spread + 1e-9).all()
    np.testing.assert_allclose(ours.std(axis=0), spread, rtol=0.15, atol=1e-9)
    for column in range(ours.shape[1]):
        uniform = column < env.model.nq or not TASKS[env_id].normal_velocity
        if uniform:  # the ends of the range, where Gymnasium's 500 come near them
            low, high = theirs[:, column].min(), theirs[:, column].max()
            slack = 0.03 * (high - low)
            assert low - slack <= ours[:, column].min() <= low + slack, column
            assert high - slack <= ours[:, column].max() <= high + slack, column


@each_task
def test_room_for_whatever_may_touch(env_id: str) -> None:
    """The declared room is the most that the model can ask for, so that nothing is ever dropped."""
    mjw: Any = importlib.import_module("mujoco_warp")
    model = warp_env(env_id)._model
    sphere = int(mujoco.mjtGeom.mjGEOM_SPHERE)
    contacts, rows = 0, int(model.jnt_limited.sum())
    for first, second in mjw.put_model(model).nxn_geom_pair_filtered.numpy():
        count = 1 if sphere in (model.geom_type[first], model.geom_type[second]) else 2
        contacts += count
        rows += count * (1 if max(model.geom_condim[first], model.geom_condim[second]) == 1 else 4)
    task = TASKS[env_id]()
    assert (task.max_contacts, task.max_constraints) == (contacts, rows)


def test_no_room_is_an_error() -> None:
    env = envs.make("HalfCheetah-v5", 2, backend="warp", max_constraints=3)
    env.reset(torch.tensor([1, 2]))

    def fall() -> None:
        for action in actions_of(6)[:, :2]:
            env.step(action)

    with pytest.raises(UsageError, match=r"dropped contacts .* in \d of 2 .* max_constraints \(now 3\)") as caught:
        fall()
    assert "\n" not in str(caught.value)
    env.close()


def test_recorded_steps_are_the_simulators_own() -> None:
    """Replaying the graph gives, bit for bit, what mujoco_warp's functions give when they are called."""
    mjw: Any = importlib.import_module("mujoco_warp")
    env = warp_env("Hopper-v5")
    env.reset(SEEDS)
    model = mjw.put_model(env._model)
    data = mjw.make_data(env._model, COPIES, nconmax=env.task.max_contacts, njmax=env.task.max_constraints)
    wp: Any = importlib.import_module("warp")
    wp.to_torch(data.qpos).copy_(env._now.qpos)
    wp.to_torch(data.qvel).copy_(env._now.qvel)
    for action in actions_of(env.act_dim)[:5]:
        wp.to_torch(data.ctrl).copy_(action)
        for _ in range(env.task.frame_skip):
            mjw.step(model, data)
        step = env.step(action)
        assert not step.terminated.any()
        assert torch.equal(wp.to_torch(data.qpos), env._now.qpos)
        assert torch.equal(wp.to_torch(data.qvel), env._now.qvel)


@pytest.mark.parametrize(("env_id", "bound"), [("InvertedPendulum-v5", 3.0), ("Humanoid-v5", 0.4), ("Hopper-v5", 1.0)])
def test_actions_reach_the_range_of_the_actuators(env_id: str, bound: float) -> None:
    env = warp_env(env_id)
    env.reset(SEEDS)
    rows = torch.tensor([[1.0], [-7.0], [0.5], [0.0]]).expand(-1, env.act_dim)
    env.step(rows)
    torch.testing.assert_close(env._control, bound * rows.clamp(-1.0, 1.0))


def test_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    env = warp_env("Hopper-v5")
    action = torch.tensor([1.0, -1.0, 1.0]).expand(COPIES, -1)
    env.reset(SEEDS)
    ends = torch.stack([env.step(action).terminated for _ in range(40)])
    fall = int(ends[:, 0].nonzero()[0])
    assert fall > 2
    monkeypatch.setattr(env, "max_episode_steps", fall + 1)
    env.reset(SEEDS)
    step = [env.step(action) for _ in range(fall + 1)][-1]
    assert step.terminated[0] and not step.truncated[0]  # both at once: it has ended
    monkeypatch.setattr(env, "max_episode_steps", fall)
    env.reset(SEEDS)
    step = [env.step(action) for _ in range(fall)][-1]
    assert step.truncated[0] and not step.terminated[0]


@pytest.mark.parametrize("env_id", ["Ant-v5", "Humanoid-v5", "Reacher-v5", "InvertedDoublePendulum-v5"])
def test_same_seeds_same_course_and_chained_observations(env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The law of `VectorEnv` for tasks that read more than positions (the others: `test_conformance`)."""
    env = warp_env(env_id)
    monkeypatch.setattr(env, "max_episode_steps", 6)
    actions = actions_of(env.act_dim, 14)

    def course(columns: list[int]) -> list[Tensor]:
        obs = env.reset(SEEDS[columns])
        seen = [obs]
        for action in actions[:, columns]:
            step = env.step(action)
            ended = step.terminated | step.truncated
            assert torch.equal(step.obs[~ended], step.next_obs[~ended])
            assert (step.obs[ended] != step.next_obs[ended]).any(dim=-1).all()
            seen += [*step]
        return seen

    first = course([0, 1, 2, 3])
    copies = [tensor.clone() for tensor in first]
    env.reset(SEEDS + 1)
    moved = course([2, 0, 3, 1])  # at another place, among other neighbors in memory
    assert all(torch.equal(one, other[[1, 3, 0, 2]]) for one, other in zip(first, moved, strict=True))
    assert all(torch.equal(one, copy) for one, copy in zip(first, copies, strict=True))


def test_options_are_those_of_the_task() -> None:
    env = envs.make("Ant-v5", 2, backend="warp", include_cfrc_ext_in_observation=False, max_episode_steps=7)
    assert (env.obs_dim, env.act_dim, env.max_episode_steps) == (27, 8, 7)
    with pytest.raises(UsageError, match="frobnicate"):
        envs.make("Ant-v5", 2, backend="warp", frobnicate=1)
    shown = replace(TASKS["Swimmer-v5"](), exclude_current_positions_from_observation=False)
    assert shown != TASKS["Swimmer-v5"]()


def test_wiring() -> None:
    assert {env_id for env_id, entry in envs.ENVS.items() if entry.in_warp} == set(TASKS)
    assert isinstance(warp_env("Hopper-v5"), VectorEnv)
    assert envs.make("Hopper-v5", 1).backend != "warp"  # float32 physics is only for who asks
