"""Environments that start from hints: whose episodes begin where, and that the hints are what they promise."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import envs
from envs.hinted import HintedVectorEnv
from envs.mountain_car_sparse import MountainCarContinuousSparse
from envs.torch_vector import TorchVectorEnv
from envs.two_link_arm_sparse import TwoLinkArmSparse
from ess_rl import random
from ess_rl.errors import UsageError

CAR, ARM = "ess/MountainCarContinuousSparse-v0", "ess/TwoLinkArmSparse-v0"


@dataclass(frozen=True)
class Counter:
    """Counts its steps in x; pays and ends where the action is above 0.5. The other half of the state says whence."""

    state_dim = obs_dim = 2
    act_dim = 1
    action_bound = 1.0
    max_episode_steps = 3
    terminates = True

    def reset_state(self, seed: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.stack([torch.zeros_like(seed, dtype=dtype), random.uniform(seed, (), dtype)], dim=-1)

    def hint_state(self, state: Tensor, seed: Tensor) -> Tensor:
        return torch.stack([state[:, 0] + 10.0 + random.uniform(seed, ()), state[:, 1]], dim=-1)

    def observe(self, state: Tensor) -> Tensor:
        return state

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        paid = action[:, 0] > 0.5
        return state + torch.tensor([1.0, 0.0]), paid.to(state.dtype), paid


def walk(env: HintedVectorEnv, successes: dict[int, set[int]], steps: int) -> list[list[bool]]:
    """Which environments are in a hinted episode as each step begins. `successes`: step -> environments paid in it."""
    seen = []
    for t in range(steps):
        seen.append(env.hinted.tolist())
        env.step(torch.tensor([[1.0 if i in successes.get(t, ()) else 0.0] for i in range(env.num_envs)]))
    return seen


def test_groups_that_fail_start_from_a_hint_once():
    """Two groups of two, clock 3. The first is never paid. In the second number 3 is paid at step 1 and goes on with
    its next episode, steps 2 to 4; number 2 fails at step 2, but not all of its group did. At step 4 number 3 has
    failed as well, so it starts from a hint; so does number 2 when its second failure is over, at step 5.
    """
    env = HintedVectorEnv("counter", Counter(), 4, group=2)
    env.reset(torch.arange(4))
    seen = walk(env, {1: {3}}, 12)
    assert [hinted[0] for hinted in seen] == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 3
    assert [hinted[1] for hinted in seen] == [hinted[0] for hinted in seen]
    assert [hinted[2] for hinted in seen] == [False] * 6 + [True] * 3 + [False] * 3
    assert [hinted[3] for hinted in seen] == [False] * 5 + [True] * 3 + [False] * 3 + [True]


def test_a_hinted_episode_that_is_paid_says_nothing_of_the_ordinary_ones():
    """One group of one: fails at 2, is paid from a hint at 3, fails again from 4 to 6, and is given another hint."""
    env = HintedVectorEnv("counter", Counter(), 1, group=1)
    env.reset(torch.arange(1))
    assert [hinted[0] for hinted in walk(env, {3: {0}}, 9)] == [False] * 3 + [True] + [False] * 3 + [True] * 2


def test_a_group_begins_alike_and_does_again_what_it_failed():
    env, plain = HintedVectorEnv("counter", Counter(), 4, group=2), TorchVectorEnv("counter", Counter(), 4)
    seeds = torch.tensor([5, 6, 7, 8])
    first, of_plain = env.reset(seeds), [plain.reset(seeds)]
    assert torch.equal(first[0], first[1]) and torch.equal(first[2], first[3]) and not torch.equal(first[1], first[2])
    assert torch.equal(first[::2], of_plain[0][::2])  # that of the group's first environment
    starts = [first]
    for _ in range(9):
        step, other = env.step(torch.zeros(4, 1)), plain.step(torch.zeros(4, 1))
        if step.truncated.any():
            starts.append(step.obs)
            of_plain.append(other.obs)
    hinted, second, again = starts[1:]
    assert torch.equal(hinted[:, 1], first[:, 1])  # the same task again, from nearer
    assert (hinted[:, 0] >= 10.0).all() and len(hinted[:, 0].unique()) == 4  # each from a hint of its own
    assert torch.equal(second[::2], of_plain[1][::2])  # then the next one
    assert torch.equal(again[:, 1], second[:, 1]) and not torch.equal(again[:, 0], hinted[:, 0])


def test_a_reset_forgets_failures():
    env = HintedVectorEnv("counter", Counter(), 2, group=2)
    runs = []
    for _ in range(2):
        env.reset(torch.arange(2))
        runs.append([env.step(torch.zeros(2, 1)) for _ in range(5)])  # and ends within a hinted episode
        assert env.hinted.all()
    for one, other in zip(*runs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_without_failures_it_is_the_plain_environment():
    """Groups of one that are paid at every end: hints never come, and seeds are the environments' own."""
    env, plain = HintedVectorEnv("counter", Counter(), 3, group=1), TorchVectorEnv("counter", Counter(), 3)
    assert torch.equal(env.reset(torch.arange(3)), plain.reset(torch.arange(3)))
    for t in range(9):
        action = torch.tensor([[float(t % 2)], [1.0], [float(t % 3 == 2)]])
        for x, y in zip(env.step(action), plain.step(action), strict=True):
            assert torch.equal(x, y)


def test_from_every_hint_the_car_gets_up_by_what_it_was_taken_from():
    car = MountainCarContinuousSparse()
    state = car.hint_state(torch.zeros(4000, 2), torch.arange(4000))
    assert len(state.unique(dim=0)) > 100  # all of the way's 106 states
    assert ((state[:, 0] >= -1.2) & (state[:, 0] < 0.45 + 0.07) & (state[:, 1].abs() <= 0.07)).all()
    reached = torch.zeros(4000, dtype=torch.bool)
    for _ in range(110):
        state, reward, _ = car.step(state, torch.where(state[:, 1:] >= 0.0, 1.0, -1.0))
        reached |= reward > 0.0
    assert reached.all()


def test_constants_without_a_way_up_are_refused():
    car = MountainCarContinuousSparse(power=1e-5)
    with pytest.raises(UsageError, match="does not reach the goal: no hints"):
        car.hint_state(torch.zeros(1, 2), torch.arange(1))


def test_the_arms_hints_are_near_the_same_target():
    arm, seeds = TwoLinkArmSparse(), torch.arange(2000)
    first = arm.reset_state(seeds, torch.float64)
    state = arm.hint_state(first, seeds + 5000)
    assert torch.equal(state[:, 4:], first[:, 4:]) and not state[:, 2:4].any()
    assert (state[:, 0].abs() <= torch.pi + 1e-9).all()
    distance = torch.linalg.vector_norm(state[:, 4:] - arm.tip(state), dim=-1)
    # Each joint is off by 0.3 rad at most and the tip 1 m at most from the shoulder, 0.5 m from the elbow.
    assert 0.05 < float(distance.median()) < 0.2 and float(distance.max()) <= 0.3 * (1.0 + 0.5)
    assert float(torch.linalg.vector_norm(first[:, 4:] - arm.tip(first), dim=-1).median()) > 0.5
    assert 0.4 < float((state[:, 1] > 0.0).double().mean()) < 0.6  # the elbow to either side


def test_the_sparse_arm_is_paid_for_touching():
    env = envs.make_torch(ARM, 3, dtype=torch.float64)
    env.reset(torch.arange(3))
    # q = (90, -90) degrees: the tip is at (0.5, 0.5), and no torque moves it. 0.019 m off, 0.021 m off, far away.
    there = [torch.pi / 2, -torch.pi / 2, 0.0, 0.0]
    env.state.copy_(torch.tensor([[*there, 0.519, 0.5], [*there, 0.5, 0.521], [*there, -0.5, 0.0]]))
    step = env.step(torch.zeros(3, 2))
    assert step.reward.tolist() == [1.0, 0.0, 0.0] and step.terminated.tolist() == [True, False, False]


def test_what_has_no_hints_is_refused():
    able = f"those that can, in torch: {CAR}, {ARM}"
    with pytest.raises(UsageError, match=f"Pendulum-v1 has no hint states to start from; {able}"):
        envs.make_hinted("Pendulum-v1", 4, 2)
    with pytest.raises(UsageError, match=rf"Hopper-v5 \(backend \w+\) cannot start from hints; {able}"):
        envs.make_hinted("Hopper-v5", 4, 2)
    with pytest.raises(UsageError, match=r"\(backend gymnasium\) cannot start"):
        envs.make_hinted(CAR, 4, 2, backend="gymnasium")
    with pytest.raises(UsageError, match="groups of 3 do not divide 4 environments"):
        envs.make_hinted(CAR, 4, 3)
