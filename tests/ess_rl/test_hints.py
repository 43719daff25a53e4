"""Hints: the environments that start from one, the weights of their samples, and their marking by the loop."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import envs
from agents import AGENTS
from ess_rl import loop
from ess_rl.batches import marked
from ess_rl.collect import collect
from ess_rl.contract import StartsFromHints
from ess_rl.diagnostics import affinity
from ess_rl.errors import UsageError
from ess_rl.hints import affinity_weight, failed_groups, starts_from_hint
from ess_rl.population import Population
from ess_rl.replay import Replay

ARM, N, T = "ess/TwoLinkArmSparse-v0", 4, 6


def bools(text: str) -> Tensor:
    return torch.tensor([letter == "1" for letter in text])


def test_a_group_failed_if_all_of_it_did():
    assert torch.equal(failed_groups(bools("11110111"), 4), bools("11110000"))
    assert torch.equal(failed_groups(bools("11110111"), 2), bools("11110011"))
    assert torch.equal(failed_groups(bools("0110"), 1), bools("0110"))


def test_who_starts_from_a_hint():
    """Groups of two: the first failed; in the second only one did; the third failed, with one in a hinted episode."""
    failed = bools("111011")
    hinted = bools("000010")
    assert torch.equal(starts_from_hint(bools("111111"), hinted, failed, 2), bools("110001"))
    assert torch.equal(starts_from_hint(bools("100110"), hinted, failed, 2), bools("100000"))
    assert not starts_from_hint(bools("000000"), hinted, failed, 2).any()


def test_hinted_samples_count_as_their_affinity():
    """Ratios 1 and 2 are hinted, with advantages 3 and -1: the band of 0.2 holds 3 of 4, without spread: 0.75."""
    log_ratio = torch.tensor([1.0, 1.0, 2.0, 1.0]).log()
    advantage, hinted = torch.tensor([7.0, 3.0, -1.0, 5.0]), bools("0110")
    for power, expected in ((1.0, 0.75), (2.0, 0.5625), (0.0, 1.0)):
        weight = affinity_weight(log_ratio, advantage, hinted, torch.tensor(power), act_dim=1)
        torch.testing.assert_close(weight, torch.tensor([1.0, expected, expected, 1.0]))
    # In four dimensions the band is 0.4 wide: a ratio of 1.3 lies inside it, but outside the band of one dimension.
    log_ratio = torch.tensor([1.3, 1.3, 1.3, 1.3]).log()
    assert affinity_weight(log_ratio, advantage, hinted, 1.0, act_dim=4).tolist() == [1.0] * 4
    assert affinity_weight(log_ratio, advantage, hinted, 1.0, act_dim=1).tolist() == [1.0, 0.0, 0.0, 1.0]


def test_the_weight_at_its_corners():
    log_ratio, advantage = torch.randn(50), torch.randn(50)
    everything, nothing = torch.ones(50, dtype=torch.bool), torch.zeros(50, dtype=torch.bool)
    whole = affinity(log_ratio, advantage, 0.2)["affinity"]
    torch.testing.assert_close(affinity_weight(log_ratio, advantage, everything, 1.0, act_dim=1), whole.expand(50))
    assert affinity_weight(log_ratio, advantage, nothing, 1.0, act_dim=1).tolist() == [1.0] * 50
    assert affinity_weight(torch.zeros(50), advantage, everything, 1.0, act_dim=1).tolist() == [1.0] * 50  # fresh


def parts(agent: str, group: int = 2, clock: int = 4, **settings: Any):
    config = AGENTS[agent].config(
        **{"hidden": (8,), "num_envs": N, "rollout": T, "epochs": 2, "minibatch": 8, "hints": group} | settings,
        learning_rate=0.05,
    )
    env = envs.make_hinted(ARM, 2 * N, group, max_episode_steps=clock)
    population = Population(AGENTS[agent].agent(config, env.obs_dim, env.act_dim), range(2))
    return population, env, Replay(T, 2, N, env.obs_dim, env.act_dim, "cpu")


def test_the_loop_marks_the_steps_of_hinted_episodes():
    """The target is never reached: the clock ends each episode after 4 steps, and every second one is from a hint."""
    population, env, _ = parts("p3o")
    assert isinstance(env, StartsFromHints)
    env.dynamics = replace(env.dynamics, tolerance=0.0)  # type: ignore[type-var]
    obs = env.reset(loop.env_seeds(population.seed, N))
    hinted = torch.zeros(20, 2, N, dtype=torch.bool)
    rollout, _ = collect(population, env, obs, 20, 0, hinted)
    assert torch.equal(hinted, ((torch.arange(20) // 4) % 2 == 1)[:, None, None].expand(20, 2, N))
    marks = marked(hinted)["hinted"]
    samples = population.prepare(rollout)
    torch.testing.assert_close(samples["action"][0][marks[0]], rollout.action[:, 0][hinted[:, 0]])


@pytest.mark.parametrize("agent", ["p3o", "ppo"])
def test_training_with_hints(agent: str):
    """Only ordinary episodes count; a weight of Affinity^0 has no effect, and any other changes what is learned."""
    ends, seen = [], []
    for power in (0.0, 1.0):
        population, env, replay = parts(agent, hint_lambda=power)
        env.dynamics = replace(env.dynamics, tolerance=0.0)  # type: ignore[type-var]
        seen.append(list(loop.train(population, env, replay, iterations=4, reset_every=4)))
        ends.append(population.state["params"]["policy"]["log_std"])
    # Of the steps 0-3 4-7 8-11 12-15 16-19 20-23 the second, fourth and sixth four are hinted; rollouts have six.
    shares = [2 / 6, 2 / 6, 4 / 6, 4 / 6]
    assert [p.metrics["hinted_share"][0].item() for p in seen[1]] == pytest.approx(shares)
    assert [p.episodes.tolist() for p in seen[1]] == [[N, N], [N, N], [0, 0], [N, N]]  # at step 3, 11, 19
    assert all((p.metrics["hint_weight"] == 1.0).all() for p in seen[0][1:])
    assert all((p.metrics["hint_weight"] < 1.0).all() for p in seen[1][1:])
    assert not torch.equal(*ends)


def test_a_run_with_hints_that_is_taken_up_again_is_the_same():
    whole, seen = parts("ppo"), []
    for p in loop.train(*whole, iterations=4, reset_every=2):
        seen.append(p)
        if p.iteration == 2:
            state = copy.deepcopy(whole[0].state)
    resumed = parts("ppo")
    resumed[0].state = state
    again = list(loop.train(*resumed, iterations=4, reset_every=2, start=2))
    torch.testing.assert_close(resumed[0].state, whole[0].state, rtol=0.0, atol=0.0)
    assert [p.return_sum.tolist() for p in again] == [p.return_sum.tolist() for p in seen[2:]]


def test_hints_that_cannot_be_are_refused():
    population, env, replay = parts("ppo", replay=1)
    replay = Replay(2 * T, 2, N, env.obs_dim, env.act_dim, "cpu")
    with pytest.raises(UsageError, match="hints 2 with replay 1: replayed steps are not marked; use replay 0"):
        next(loop.train(population, env, replay, iterations=2, reset_every=2))
    population, env, replay = parts("ppo", hints=8)
    with pytest.raises(
        UsageError, match="hints 8 with num_envs 4: all of a group belong to one member: choose a divisor"
    ):
        next(loop.train(population, env, replay, iterations=2, reset_every=2))
    for hints in (0, 4):
        population, env, replay = parts("ppo", hints=hints)
        with pytest.raises(UsageError, match=f"hints {hints}: {ARM} was made with groups of 2; they must be the same"):
            next(loop.train(population, env, replay, iterations=2, reset_every=2))
    population, _, replay = parts("ppo")
    with pytest.raises(UsageError, match="hints 2: ess/TwoLinkArmSparse-v0 was not made with hints"):
        next(loop.train(population, envs.make(ARM, 2 * N), replay, iterations=2, reset_every=2))
