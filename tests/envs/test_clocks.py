"""Staggered environments: the first episodes are cut by clocks that are ahead, all others are whole."""

import importlib.util

import pytest
import torch

import envs
from envs.clocks import first_clocks
from ess_rl.errors import UsageError

CASES = [("Pendulum-v1", "torch"), ("ess/TwoLinkArm-v0", "torch")]
if importlib.util.find_spec("envpool") is not None:
    CASES += [("HalfCheetah-v5", "envpool"), ("Reacher-v5", "envpool")]
if importlib.util.find_spec("mujoco_warp") is not None:
    CASES += [("HalfCheetah-v5", "warp")]


def test_clocks_are_spread_over_an_episode_and_of_the_seed_alone():
    clocks = first_clocks(torch.arange(100_000), 50)
    counts = clocks.bincount(minlength=50)
    assert len(counts) == 50 and (counts - 2_000).abs().max() < 5 * 2_000**0.5  # five deviations
    assert torch.equal(first_clocks(torch.tensor([7, 3]), 50), clocks[[7, 3]])


@pytest.mark.parametrize(("env_id", "backend"), CASES)
def test_first_episodes_are_cut_and_all_others_whole(env_id: str, backend: str):
    clock, seeds = 10, torch.tensor([3, 1, 4, 15])
    env = envs.make(env_id, 4, backend=backend, max_episode_steps=clock, staggered=True)
    plain = envs.make(env_id, 4, backend=backend, max_episode_steps=clock)
    ahead = first_clocks(seeds, clock)
    assert len(ahead.unique()) > 1
    for _ in range(2):  # each reset sets the clocks anew
        assert torch.equal(env.reset(seeds), plain.reset(seeds))
        for t in range(1, 3 * clock):
            action = torch.full((4, env.act_dim), 0.1)
            step, other = env.step(action), plain.step(action)
            assert torch.equal(step.truncated, (t + ahead) % clock == 0) and not step.terminated.any()
            if t < clock - ahead.max():  # until a clock strikes the worlds are the same
                assert torch.equal(step.next_obs, other.next_obs)
    env.close()
    plain.close()


def test_copies_that_keep_their_own_clocks_are_refused():
    with pytest.raises(UsageError, match=r"HalfCheetah-v5 \(backend gymnasium\) cannot be staggered"):
        envs.make("HalfCheetah-v5", 2, backend="gymnasium", staggered=True)
