"""The suite's own tasks: physics by law, parity with Gymnasium where it has the equations, LQR by its closed form."""

import math
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import Tensor
from torch.func import jvp

import envs
import envs.gymnasium_export
from envs.acrobot import Acrobot
from envs.cart_pole import CartPole
from envs.integrate import runge_kutta
from envs.lqr import LQR, linear_policy_value, optimal
from envs.two_link_arm import TwoLinkArm
from ess_rl.errors import UsageError

OWN = [env_id for env_id in envs.ENVS if env_id.startswith("ess/")]


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Uniform in [-1, 1], float64."""
    return 2.0 * torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 1.0


@pytest.mark.parametrize("env_id", ["ess/CartPole-v0", "ess/Acrobot-v0"])
def test_equals_gymnasium_where_it_has_the_task(env_id: str) -> None:
    """Its discrete tasks push with full force to either side: our -1 and 1. In float64, over whole episodes."""
    name, choices = {"ess/CartPole-v0": ("CartPole-v1", [-1, 1]), "ess/Acrobot-v0": ("Acrobot-v1", [-1, 0, 1])}[env_id]
    env = envs.make_torch(env_id, 4, dtype=torch.float64)
    env.reset(torch.arange(4))
    references: list[Any] = [gymnasium.make(name) for _ in range(4)]
    for reference, state in zip(references, env.state, strict=True):
        reference.reset(seed=0)
        reference.unwrapped.state = state.numpy().copy()
    picks = torch.randint(len(choices), (500, 4), generator=torch.Generator().manual_seed(1))
    alive, terminations = set(range(4)), 0
    for count, pick in enumerate(picks, start=1):
        if env_id == "ess/Acrobot-v0":
            pick[0] = 2 if env.state[0, 3] >= 0.0 else 0  # pumps with the elbow, and so reaches the line
        step = env.step(torch.tensor(choices)[pick, None])
        for i in sorted(alive):
            obs, reward, terminated, truncated, _ = references[i].step(int(pick[i]))
            np.testing.assert_allclose(step.next_obs[i].numpy(), obs, rtol=1e-6, atol=1e-6)
            assert (float(step.reward[i]), bool(step.terminated[i])) == (reward, terminated)
            assert bool(step.truncated[i]) == (truncated and not terminated) == (count == 500 and not terminated)
            terminations += terminated
            if terminated or truncated:
                alive.remove(i)
    assert not alive
    assert terminations >= 1


def power_cart(task: Any, state: Tensor, control: Tensor) -> Tensor:
    return control * state[:, 1]  # force times the velocity of the cart


def power_acrobot(task: Any, state: Tensor, control: Tensor) -> Tensor:
    return control * state[:, 3]  # torque times the speed of the elbow


def power_arm(task: Any, state: Tensor, control: Tensor) -> Tensor:
    speeds = state[:, 2:4]
    return ((control - task.damping * speeds) * speeds).sum(-1)


PHYSICS = [
    pytest.param(CartPole(), power_cart, 1, id="cart and pole"),
    pytest.param(Acrobot(), power_acrobot, 1, id="acrobot"),
    pytest.param(TwoLinkArm(), power_arm, 2, id="arm"),
    pytest.param(TwoLinkArm(damping=0.0, length=0.7, mass=2.0), power_arm, 2, id="arm without damping"),
]


@pytest.mark.parametrize(("task", "power", "controls"), PHYSICS)
def test_energy_changes_by_the_work_of_the_motor_alone(task: Any, power: Any, controls: int) -> None:
    """dE/dt along the rates = force times velocity, at 200 random states: no term is missing or of a wrong sign."""
    state = 3.0 * draw(200, task.state_dim)
    control = draw(200, controls, seed=1).squeeze(-1)
    change = jvp(task.energy, (state,), (task.rates(state, control),))[1]
    torch.testing.assert_close(change, power(task, state, control), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("task", "controls"), [(CartPole(), 1), (Acrobot(), 1), (TwoLinkArm(damping=0.0), 2)])
def test_energy_is_conserved_without_motor_and_damping(task: Any, controls: int) -> None:
    """Over two seconds from rest-like states; Runge-Kutta's error falls with the fourth power of the step."""
    start = draw(20, task.state_dim)
    free = torch.zeros(20, controls, dtype=torch.float64).squeeze(-1)
    drifts = []
    for steps in (50, 100):
        state = start
        for _ in range(steps):
            state = runge_kutta(lambda now: task.rates(now, free), state, 2.0 / steps)
        drifts.append(float((task.energy(state) - task.energy(start)).abs().max()))
    assert drifts[0] < 1e-3
    assert drifts[1] < drifts[0] / 8.0


def test_runge_kutta_on_an_exponential() -> None:
    # x' = x from 1, one step of 0.1: 1 + 0.1 + 0.01/2 + 0.001/6 + 0.0001/24 = 1.1051708333...
    state = runge_kutta(lambda x: x, torch.ones(1, 1, dtype=torch.float64), 0.1)
    assert float(state) == pytest.approx(1.0 + 0.1 + 0.01 / 2 + 0.001 / 6 + 0.0001 / 24, abs=1e-15)


def test_swing_up_pays_for_upright_centered_and_calm() -> None:
    env = envs.make_torch("ess/CartPoleSwingUp-v0", 4, dtype=torch.float64)
    env.reset(torch.arange(4))
    # Upright at rest in the middle: no force moves it, so the reward is 1. Hanging at rest: (1 - 1) / 2 = 0.
    # Upright at rest 1 m out: (1 + exp(-1)) / 2 = 0.68394. Beyond the track: ended.
    env.state.copy_(torch.tensor([[0.0, 0, 0, 0], [0, 0, math.pi, 0], [1.0, 0, 0, 0], [2.399, 1.0, 0, 0]]))
    step = env.step(torch.zeros(4, 1))
    torch.testing.assert_close(step.reward[:3], torch.tensor([1.0, 0.0, 0.68394]), rtol=0.0, atol=1e-5)
    assert step.terminated.tolist() == [False, False, False, True]


def test_the_arm_is_paid_by_the_distance_of_its_tip() -> None:
    task = TwoLinkArm()
    # q = (90, -90) degrees: the upper link ends at (0, 0.5), the lower goes on along x: the tip is at (0.5, 0.5).
    state = torch.tensor([[math.pi / 2, -math.pi / 2, 0.0, 0.0, 0.5, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(task.tip(state), torch.tensor([[0.5, 0.5]], dtype=torch.float64))
    _, reward, _ = task.step(state, torch.zeros(1, 2, dtype=torch.float64))  # nothing moves: 0.4 m to go
    assert float(reward) == pytest.approx(-0.4)
    # Held at rest by no force, so a small action moves it by little: -0.05 (0.02^2 + 0.01^2) on top
    moved, pushed, _ = task.step(state, torch.tensor([[0.02, 0.01]], dtype=torch.float64))
    distance = float(torch.linalg.vector_norm(moved[0, 4:] - task.tip(moved)[0]))
    assert float(pushed) == pytest.approx(-distance - 0.05 * (0.02**2 + 0.01**2))
    targets = task.reset_state(torch.arange(4096), torch.float64)[:, 4:]
    radius = torch.linalg.vector_norm(targets, dim=-1)
    assert float(radius.max()) <= 0.9
    assert float((radius < 0.9 / math.sqrt(2.0)).double().mean()) == pytest.approx(0.5, abs=0.03)  # uniform over area


def test_the_sparse_car_is_paid_at_the_goal_alone() -> None:
    sparse, dense = (
        envs.make_torch(name, 64) for name in ("ess/MountainCarContinuousSparse-v0", "MountainCarContinuous-v0")
    )
    sparse.reset(torch.arange(64))
    dense.reset(torch.arange(64))
    reached = 0
    for _ in range(300):
        action = torch.sign(sparse.state[:, 1:] + 1e-9)  # full power along the velocity
        ours, theirs = sparse.step(action), dense.step(action)
        assert torch.equal(ours.next_obs, theirs.next_obs)
        assert torch.equal(ours.reward, theirs.terminated.float())
        reached += int(ours.terminated.sum())
    assert reached >= 64


class TestLQR:
    """The closed form against sums of rewards, and against its own optimality."""

    task = LQR(axes=2, max_force=100.0)  # so that no force is clipped

    def gain(self) -> Tensor:
        return torch.cat([1.5 * torch.eye(2), 2.0 * torch.eye(2)], dim=1) + 0.1 * draw(2, 4).float()

    def roll_out(self, gain: Tensor, state: Tensor, steps: int, discount: float) -> Tensor:
        total = torch.zeros(len(state), dtype=torch.float64)
        for t in range(steps):
            state, reward, _ = self.task.step(state, -(state @ gain.double().mT) / self.task.max_force)
            total += discount**t * reward
        return total

    def test_value_of_a_linear_policy_is_its_discounted_return(self) -> None:
        p, c = linear_policy_value(self.task, self.gain(), 0.95)
        state = draw(10, 4)
        assert float(c) == 0.0
        value = -torch.einsum("bi,ij,bj->b", state, p, state)
        torch.testing.assert_close(value, self.roll_out(self.gain(), state, 1000, 0.95), rtol=1e-9, atol=1e-9)

    def test_noise_costs_the_constant(self) -> None:
        """V(s) = E[r + discount V(s')]. For a quadratic, eps = +-1 on each axis gives the expectation exactly."""
        std, discount = torch.tensor([0.5, 2.0], dtype=torch.float64), 0.9
        p, c = linear_policy_value(self.task, self.gain(), discount, std)
        state = draw(10, 4)
        value = -torch.einsum("bi,ij,bj->b", state, p, state) - c
        backup = torch.zeros(10, dtype=torch.float64)
        for signs in ([1, 1], [1, -1], [-1, 1], [-1, -1]):
            force = -(state @ self.gain().double().mT) + std * torch.tensor(signs)
            after, reward, _ = self.task.step(state, force / self.task.max_force)
            backup += 0.25 * (reward + discount * (-torch.einsum("bi,ij,bj->b", after, p, after) - c))
        torch.testing.assert_close(value, backup, rtol=1e-9, atol=1e-9)

    def test_no_gain_near_the_best_is_better(self) -> None:
        best, p = optimal(self.task, 0.99)
        a, b, q, _ = self.task.matrices()
        riccati = q + 0.99 * a.mT @ p @ a - 0.99 * a.mT @ p @ b @ best  # Bellman's optimality, as a fixed point of P
        torch.testing.assert_close(riccati, p, rtol=1e-9, atol=1e-9)
        for seed in range(20):
            other, _ = linear_policy_value(self.task, best + 0.05 * draw(2, 4, seed=seed), 0.99)
            assert float(torch.linalg.eigvalsh(other - p).min()) > -1e-9  # costs at least as much from every state

    def test_the_axes_do_not_touch(self) -> None:
        one, _ = optimal(LQR(axes=1), 0.99)
        three, _ = optimal(LQR(axes=3), 0.99)
        torch.testing.assert_close(three, torch.kron(one, torch.eye(3, dtype=torch.float64)), rtol=1e-9, atol=1e-12)

    def test_an_infinite_value_is_refused(self) -> None:
        with pytest.raises(ValueError, match="infinite value"):
            linear_policy_value(LQR(), torch.tensor([[-50.0, 0.0]]), 0.99)


@pytest.mark.parametrize("env_id", OWN)
class TestInGymnasium:
    @pytest.mark.filterwarnings("ignore:.*(Box observation space|render).*")
    def test_its_checker_is_content(self, env_id: str) -> None:
        env = gymnasium.make(env_id)
        check_env(env.unwrapped, skip_render_check=True)
        assert env.spec is not None and env.spec.max_episode_steps == envs.make_torch(env_id, 1).max_episode_steps

    def test_the_same_seed_gives_the_same_episodes(self, env_id: str) -> None:
        """Single, batched and through `envs.make`; beyond the end of an episode, which the clock brings soon."""
        ours = envs.make_torch(env_id, 2, max_episode_steps=5)
        single = gymnasium.make(env_id, max_episode_steps=5)
        batched: Any = gymnasium.make_vec(env_id, num_envs=2, max_episode_steps=5)
        start = ours.reset(torch.tensor([7, 8]))
        np.testing.assert_array_equal(start, batched.reset(seed=7)[0])
        np.testing.assert_array_equal(start, batched.reset(seed=[7, 8])[0])
        np.testing.assert_allclose(start[0], single.reset(seed=7)[0], atol=1e-6)
        for count in range(1, 13):
            action = (0.5 * draw(2, ours.act_dim, seed=count)).float()
            step = ours.step(action)
            obs, reward, terminated, truncated, info = batched.step(action.numpy())
            for one, other in zip(
                (step.obs, step.reward, step.terminated, step.truncated),
                (obs, reward, terminated, truncated),
                strict=True,
            ):
                np.testing.assert_array_equal(one, other)
            after, paid, *flags, _ = single.step(action[0].numpy())
            np.testing.assert_allclose(step.next_obs[0], after, rtol=1e-5, atol=1e-5)
            assert paid == pytest.approx(float(step.reward[0]), rel=1e-5, abs=1e-5)
            assert flags == [bool(step.terminated[0]), bool(step.truncated[0])]
            assert ("final_obs" in info) == (count % 5 == 0)
            if count % 5 == 0:
                np.testing.assert_array_equal(np.stack(list(info["final_obs"])), step.next_obs)
                np.testing.assert_allclose(step.obs[0], single.reset()[0], atol=1e-6)

    def test_it_says_that_it_has_no_picture(self, env_id: str) -> None:
        with pytest.raises(UsageError, match=f"{env_id} cannot be drawn"):
            envs.render_env(env_id)

    def test_without_a_seed_it_begins_somewhere(self, env_id: str) -> None:
        starts = [gymnasium.make(env_id).reset()[0] for _ in range(2)]
        batch, _ = gymnasium.make_vec(env_id, num_envs=3).reset()
        assert not np.array_equal(*starts)
        assert len(np.unique(batch, axis=0)) == 3


def test_equations_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match="backend 'torch' does not have Hopper-v5"):
        envs.make_torch("Hopper-v5", 1)
    with pytest.raises(UsageError, match="unknown environment 'ess/CartPol-v0'; did you mean ess/CartPole-v0"):
        envs.make_torch("ess/CartPol-v0", 1)


def test_an_own_task_by_module_and_name() -> None:
    assert gymnasium.make("envs.gymnasium_export:ess/LQR-v0").observation_space.shape == (2,)
    assert envs.make("ess/LQR-v0", 2, backend="gymnasium").obs_dim == 2
    assert envs.make("ess/LQR-v0", 2, axes=3).obs_dim == 6
