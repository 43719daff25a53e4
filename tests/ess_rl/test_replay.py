import dataclasses
from dataclasses import fields

import pytest
import torch

from ess_rl.errors import UsageError
from ess_rl.replay import Replay
from ess_rl.transitions import Transitions

P, N, OBS, ACT = 2, 3, 4, 2


def rollout(first: int, steps: int) -> Transitions:
    """Steps numbered from `first`, the number written into every field."""
    number = torch.arange(first, first + steps)
    empty = Transitions.empty((steps, P, N), OBS, ACT, torch.device("cpu"))
    return empty.map(
        lambda x: (
            (number % 2 if x.dtype == torch.bool else number).view(-1, *[1] * (x.ndim - 1)).expand_as(x).to(x.dtype)
        )
    )


def assert_same(one: Transitions, other: Transitions) -> None:
    for f in fields(Transitions):
        assert torch.equal(getattr(one, f.name), getattr(other, f.name)), f.name


def replay(capacity: int) -> Replay:
    return Replay(capacity, P, N, OBS, ACT, "cpu")


@pytest.mark.parametrize("capacity", [3, 5, 6, 7, 9])
def test_holds_the_latest_steps_in_order_across_the_seam(capacity: int):
    ring = replay(capacity)
    for i in range(1, 12):
        ring.add(rollout(3 * (i - 1), 3))
        held = min(capacity, 3 * i)
        assert ring.size == held
        for steps in range(1, held + 1):  # up to the whole ring, hence every slot
            assert_same(ring.latest(steps), rollout(3 * i - steps, steps))


def test_rollouts_of_any_length():
    ring, total = replay(5), 0
    for steps in (1, 4, 2, 5, 3, 5, 1):
        ring.add(rollout(total, steps))
        total += steps
        assert_same(ring.latest(ring.size), rollout(total - ring.size, ring.size))


def test_added_data_are_copied():
    ring, data = replay(4), rollout(0, 2)
    ring.add(data)
    data.reward.fill_(-1.0)
    assert_same(ring.latest(2), rollout(0, 2))


def test_values_are_stored_without_their_gradient():
    ring, data = replay(4), rollout(0, 2)
    ring.add(dataclasses.replace(data, behavior_mean=data.behavior_mean.clone().requires_grad_()))
    assert not ring.latest(2).behavior_mean.requires_grad
    assert_same(ring.latest(2), data)


def test_refusals():
    ring = replay(4)
    with pytest.raises(UsageError, match="5 steps does not fit a replay of 4"):
        ring.add(rollout(0, 5))
    ring.add(rollout(0, 2))
    with pytest.raises(UsageError, match="holds 2 steps, not the 3"):
        ring.latest(3)


@pytest.mark.parametrize("capacity", [6, 7, 8])
def test_rollouts_come_newest_first_and_whole(capacity: int):
    ring = replay(capacity)
    for i in range(5):
        ring.add(rollout(2 * i, 2))
        held = ring.rollouts(2, at_most=3)
        assert len(held) == min(3, i + 1, capacity // 2)
        for age, one in enumerate(held):
            assert_same(one, rollout(2 * (i - age), 2))
    assert len(ring.rollouts(2, at_most=1)) == 1


def test_what_is_of_another_shape_is_refused():
    replay = Replay(8, 2, 3, 4, 1, "cpu")
    for shape in ((2, 1, 4, 1), (2, 3, 1, 1), (1, 3, 4, 1)):  # each would broadcast
        members, num_envs, obs_dim, act_dim = shape
        with pytest.raises(UsageError, match=r"a step does not fit a replay of \["):
            replay.add(Transitions.empty((2, members, num_envs), obs_dim, act_dim, torch.device("cpu")))
    with pytest.raises(UsageError, match="cannot take up one of"):
        replay.load(Replay(9, 2, 3, 4, 1, "cpu").state())


def test_what_takes_up_a_state_shares_nothing_with_it():
    one, other = (Replay(8, 2, 3, 4, 1, "cpu") for _ in range(2))
    other.load(one.state())
    rollout = Transitions.empty((2, 2, 3), 4, 1, torch.device("cpu"))
    other.add(rollout.map(lambda x: x + 1))
    assert not one.store.reward.any()


def test_its_state_brings_it_back():
    ring, other = replay(5), replay(5)
    for i in range(3):
        ring.add(rollout(3 * i, 3))
    other.load(ring.state())
    for one in (ring, other):
        one.add(rollout(9, 2))
    assert_same(other.latest(5), ring.latest(5))
    assert_same(other.latest(5), rollout(6, 5))
