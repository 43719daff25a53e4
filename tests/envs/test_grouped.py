"""Environments in groups: whose episodes begin alike, and together."""

import pytest
import torch

import envs
from ess_rl.errors import UsageError


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "ess/LQR-v0", "ess/TwoLinkArm-v0"])
def test_a_group_begins_its_episodes_alike_and_together(env_id: str):
    """Two groups of three with clock 4, whose actions differ: alike at steps 0, 4 and 8, and at no other."""
    env = envs.make_grouped(env_id, 6, 3, max_episode_steps=4)
    obs, starts = env.reset(torch.tensor([5, 6, 7, 8, 9, 10])), []
    for t in range(9):
        groups = obs.unflatten(0, (2, 3))
        alike = (groups == groups[:, :1]).flatten(1).all(1)
        assert alike.tolist() == [t % 4 == 0] * 2
        if t % 4 == 0:
            starts.append(groups[:, 0])
        obs = env.step(torch.linspace(-1.0, 1.0, 6)[:, None].expand(-1, env.act_dim)).obs
    assert len(torch.cat(starts).unique(dim=0)) == 6  # groups, and episodes, begin in states of their own
    # The first of a group is what it would be alone.
    plain = envs.make_torch(env_id, 2, max_episode_steps=4)
    assert torch.equal(plain.reset(torch.tensor([5, 8])), starts[0])


def test_what_cannot_stand_in_groups_is_refused():
    able = r"those that can, in torch: Pendulum-v1, ess/TwoLinkArm-v0, ess/LQR-v0"
    with pytest.raises(UsageError, match=f"ess/CartPole-v0 may end an episode before its time limit.*; {able}"):
        envs.make_grouped("ess/CartPole-v0", 4, 2)
    with pytest.raises(UsageError, match=rf"Hopper-v5 \(backend \w+\) cannot begin the episodes of a group.*; {able}"):
        envs.make_grouped("Hopper-v5", 4, 2)
    with pytest.raises(UsageError, match="groups of 3 do not divide 4 environments"):
        envs.make_grouped("Pendulum-v1", 4, 3)
    with pytest.raises(UsageError, match="staggered starts would separate the environments of a group"):
        envs.make_grouped("Pendulum-v1", 4, 2, staggered=True)
