"""Replayed updates that alternate with on-policy ones: how many, on what data, and each member on its own."""

import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch.utils import _pytree as pytree

from agents.p3o_2019 import P3O2019, Config
from envs.pendulum import Pendulum
from envs.torch_vector import TorchVectorEnv
from ess_rl import loop, random
from ess_rl.alternate import ReplayedUpdates, taking
from ess_rl.errors import UsageError
from ess_rl.population import Population
from ess_rl.replay import Replay
from ess_rl.transitions import Transitions

N, T, KEPT = 4, 8, 3


def trained(seeds: list[int], iterations: int, hyper: Any = None, **settings: Any):
    """-> (population, replay, metrics of each iteration)"""
    config = Config(
        hidden=(8,), num_envs=N, rollout=T, minibatch=N * T, replay=KEPT - 1, segments=6, warm_up=1, details="shared"
    )
    config = replace(config, **settings)
    env = TorchVectorEnv("Pendulum-v1", Pendulum(), len(seeds) * N)
    population = Population(P3O2019(config, 3, 1), seeds, hyper)
    replay = Replay((1 + config.replay) * T, len(seeds), N, 3, 1, "cpu")
    rows = [done.metrics for done in loop.train(population, env, replay, iterations=iterations, reset_every=iterations)]
    return population, replay, rows


@pytest.fixture
def ages(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The ages of all rollouts that segments are taken from, as they are drawn."""
    drawn: list[torch.Tensor] = []
    segments = Replay.segments

    def spy(self: Replay, age: torch.Tensor, *others: Any) -> Transitions:
        drawn.append(age)
        return segments(self, age, *others)

    monkeypatch.setattr(Replay, "segments", spy)
    return drawn


def test_segments_of_the_replay_are_what_went_in():
    replay = Replay(KEPT * T, 2, N, 3, 1, "cpu")
    rollouts = []
    for k in range(5):  # overwrites the ring of three
        empty = Transitions.empty((T, 2, N), 3, 1, torch.device("cpu"))
        generator = torch.Generator().manual_seed(k)
        rollouts.append(
            empty.map(lambda x, g=generator: torch.randn(x.shape, generator=g).to(x.dtype))  # of bool: not zero
        )
        replay.add(rollouts[-1])
    age, env = torch.tensor([[0, 2, 1, 1], [2, 0, 0, 1]]), torch.tensor([[3, 0, 1, 1], [2, 2, 0, 3]])
    found = replay.segments(age, torch.arange(2), env, T, torch.tensor(replay.head))
    other = replay.segments(age[:1], torch.tensor([1]), env[:1], T, torch.tensor(replay.head))
    assert torch.equal(other.obs[:, 0, 0], rollouts[4].obs[:, 1, 3])  # of the second member only
    assert found.obs.shape == (T, 2, 4, 3)
    for p in range(2):
        for s in range(4):
            source = rollouts[4 - int(age[p, s])]
            for name in ("obs", "action", "reward", "truncated", "behavior_log_std", "version"):
                assert torch.equal(getattr(found, name)[:, p, s], getattr(source, name)[:, p, env[p, s]])


def test_there_are_as_many_as_poisson_draws_and_none_before_the_replay_is_warm():
    """Adam counts the steps: one on-policy update in each iteration except the first, plus the replayed ones."""
    seeds, iterations, warm_up = [3, 8, 5], 12, 4
    mean = [2.0, 0.0, 5.0]
    population, _, rows = trained(seeds, iterations, {"replayed_updates": mean}, warm_up=warm_up)
    purpose = random.fold_in(torch.tensor(seeds), random.REPLAYED)
    drawn = [random.poisson(random.fold_in(purpose, i), torch.tensor(mean)) for i in range(warm_up, iterations)]
    expected = iterations - 1 + torch.stack(drawn).sum(0)
    assert expected[1] == iterations - 1 < expected[0] < expected[2]
    assert population.state["optimizer"]["step"].tolist() == expected.tolist()
    assert ["replayed_ess" in row for row in rows] == [False] * warm_up + [True] * (iterations - warm_up)


def test_a_member_learns_as_it_does_alone():
    """Members with more updates to make take their turns while it waits."""
    together, _, rows = trained([3, 8, 5], 6, {"replayed_updates": [0.5, 2.0, 9.0]})
    alone, _, own = trained([3], 6, {"replayed_updates": [0.5]})
    first = pytree.tree_map(lambda x: x[:1], together.state["params"])
    torch.testing.assert_close(first, alone.state["params"], rtol=1e-4, atol=1e-6)
    for row, mine in zip(rows, own, strict=True):
        assert set(row) == set(mine)
        if "replayed_ess" in mine:
            torch.testing.assert_close(row["replayed_ess"][:1], mine["replayed_ess"])


def test_a_member_that_waits_stays_as_it_is():
    population, replay, _ = trained([3, 8], 3)
    before = population.state
    age, env, head = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[1, 1], [0, 3]]), torch.tensor(0)
    earlier = before["params"]["policy"]["log_std"]
    for chosen, active, learned in (([0, 1], [True, False], 0), ([1, 0], [True, False], 1), ([0], [True], 0)):
        population.state = before
        member, count = torch.tensor(chosen), len(chosen)
        segments = replay.segments(age[:count], member, env[:count], T, head)
        population.replayed(segments, member, torch.tensor(active))
        for x, y in zip(pytree.tree_leaves(population.state), pytree.tree_leaves(before), strict=True):
            assert torch.equal(x[1 - learned], y[1 - learned])
        assert not torch.equal(population.state["params"]["policy"]["log_std"][learned], earlier[learned])


def test_a_mean_that_no_draw_is_for_is_refused():
    with pytest.raises(UsageError, match=r"replayed_updates \[2.0, 21.0\]: must lie between 0 and 20"):
        trained([3, 8], 2, {"replayed_updates": [2.0, 21.0]})


def test_half_of_the_members_take_a_turn_and_two_at_the_least():
    assert [taking(members) for members in (1, 2, 3, 4, 5, 10)] == [1, 2, 2, 2, 3, 5]


@pytest.mark.parametrize("mean", [[2.0] * 10, [0.5, 2.0, 9.0], [0.0, 3.0], [4.0]])
def test_all_updates_that_were_drawn_are_made_in_as_few_turns_as_half_of_the_members_can(mean: list[float]):
    seeds = list(range(len(mean)))
    population, replay, _ = trained(seeds, 3, {"replayed_updates": mean})
    turns = ReplayedUpdates(population, replay, cast(Any, population.agent.config))
    purpose = random.fold_in(torch.tensor(seeds), random.REPLAYED)
    for iteration in range(3, 9):
        before = population.state["optimizer"]["step"].clone()
        calls = turns.begin(iteration)
        for _ in range(calls):
            said = turns.update()
        count = random.poisson(random.fold_in(purpose, iteration), torch.tensor(mean))
        assert (population.state["optimizer"]["step"] - before).tolist() == count.tolist()
        shares = count.clamp(min=1)  # a member that draws none still reports on a batch
        assert calls == max(int(shares.max()), math.ceil(int(shares.sum()) / taking(len(mean))))
        assert (said["replayed_ess"] > 0.0).all()


def test_without_any_it_is_a2c():
    _, _, rows = trained([3, 8], 6, replayed_updates=0.0)
    assert all("replayed_ess" not in row for row in rows)
    for row in rows[1:]:
        torch.testing.assert_close(row["ess"], torch.ones(2))  # of the one update on fresh data


def test_older_segments_have_an_ess_below_one_and_the_entropy_bonus_is_that_of_fresh_data():
    _, _, rows = trained([3, 8], 10, replayed_updates=3.0, learning_rate=0.05)
    assert all((row["replayed_ess"] < 1.0).all() for row in rows[3:])
    population, replay, _ = trained([3, 8], 2, replayed_updates=0.0)
    data = population.prepare(replay.latest(T))
    index = torch.arange(N * T).expand(2, -1)
    ends = []
    for entropy_coef in (0.0, 1.0):
        for age in ({}, {"age": torch.ones(2, N * T)}):
            one = Population(population.agent, [3, 8], {"entropy_coef": [entropy_coef] * 2})
            one.state = {**population.state, "hyper": one.state["hyper"]}
            one.update({**data, **age}, index)
            ends.append(one.state["params"]["policy"]["log_std"])
    fresh, old, fresh_with, old_with = ends
    torch.testing.assert_close(fresh, old, rtol=0.0, atol=0.0)
    torch.testing.assert_close(old, old_with, rtol=0.0, atol=0.0)
    assert (fresh_with > fresh).all()


def test_recent_rollouts_are_drawn_more_often(ages: list[torch.Tensor]):
    """Weights 1, 1/2, 1/3 of three rollouts: shares of 6/11, 3/11, 2/11."""
    trained([3, 8], 12, replayed_updates=5.0, segments=80, warm_up=3, draw="recency")
    drawn = torch.cat([age.flatten() for age in ages])
    shares = torch.bincount(drawn, minlength=KEPT) / len(drawn)
    assert len(drawn) > 5000
    torch.testing.assert_close(shares, torch.tensor([6.0, 3.0, 2.0]) / 11.0, rtol=0.0, atol=5 * 0.5 / len(drawn) ** 0.5)


def test_rollouts_that_are_kept_for_others_are_not_drawn_from(monkeypatch: pytest.MonkeyPatch):
    """A ring with room for more than 1 + replay rollouts, as --save-replay makes it, trains the same agent."""
    room = [trained([3, 8], 12, replayed_updates=2.0)[0]]
    init = Replay.__init__
    monkeypatch.setattr(Replay, "__init__", lambda self, capacity, *others: init(self, 3 * capacity, *others))
    room.append(trained([3, 8], 12, replayed_updates=2.0)[0])
    for one, other in zip(*(pytree.tree_leaves(population.state) for population in room), strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


def test_rollouts_that_are_not_there_yet_are_not_drawn(ages: list[torch.Tensor]):
    """In the second iteration the ring of three has two."""
    trained([3, 8], 2, replayed_updates=5.0, segments=80)
    assert torch.cat([age.flatten() for age in ages]).unique().tolist() == [0, 1]


def test_a_replayed_update_has_no_entropy_bonus():
    population, replay, _ = trained([3, 8], 3)
    age, env, head = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[1, 1], [0, 3]]), torch.tensor(0)
    member, ends = torch.tensor([0, 1]), []
    for entropy_coef in (0.0, 1.0):
        one = Population(population.agent, [3, 8], {"entropy_coef": [entropy_coef] * 2})
        one.state = {**population.state, "hyper": one.state["hyper"]}
        one.replayed(replay.segments(age, member, env, T, head), member, torch.tensor([True, True]))
        ends.append(one.state["params"]["policy"]["log_std"])
    assert torch.equal(*ends) and not torch.equal(ends[0], population.state["params"]["policy"]["log_std"])
